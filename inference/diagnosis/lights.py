"""Traffic lights: each reads some numbers of a posterior, and says in words what is wrong and what to try."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from ssm_nn.inference.beliefs import Info
from ssm_nn.inference.diagnosis.importance import LARGEST_KHAT, Importance
from ssm_nn.inference.diagnosis.innovations import Innovations
from ssm_nn.inference.diagnosis.kernel_test import KernelTest
from ssm_nn.inference.diagnosis.rounding import Rounding
from ssm_nn.inference.diagnosis.structure_loss import StructureLoss
from ssm_nn.inference.map_problem import FIXED_BUDGET, NOT_CONVERGED, NOT_FINITE

__all__ = ["Colour", "Light"]


class Colour(StrEnum):
    """``GREY``: not judged."""

    GREEN = "green"
    AMBER = "amber"
    RED = "red"
    GREY = "grey"


@dataclass(frozen=True)
class Light:
    """One finding.

    Attributes:
        name: what was looked at.
        colour: how it stands.
        finding: what was found, with its numbers.
        advice: what to try; empty where nothing is to be done.
    """

    name: str
    colour: Colour
    finding: str
    advice: str = ""


def map_light(infos: Sequence[Info]) -> Light:
    """Whether the MAP searches ended."""
    name = "MAP search"
    failed = [t for t, info in enumerate(infos) if info.status == NOT_FINITE]
    open_ = [t for t, info in enumerate(infos) if info.status == NOT_CONVERGED]
    budget = [t for t, info in enumerate(infos) if info.status == FIXED_BUDGET]
    if failed:
        return Light(
            name,
            Colour.RED,
            f"the update of {_tasks(failed)} was not finite, and {'its' if len(failed) == 1 else 'their'} data were left out",
            "Look for outliers in the data, scale the inputs, lower the learning rate, or compute in float64.",
        )
    if open_:
        norm = max(infos[t].gradient_norm for t in open_)
        return Light(
            name,
            Colour.RED,
            f"the search did not converge for {_tasks(open_)} (largest gradient norm {norm:.3g}): the belief is not "
            "centred on a mode",
            "Allow more steps or epochs (GaussNewton(max_steps=...), Lbfgs(max_steps=...), Minibatch(epochs=...)), or a "
            "smaller learning rate.",
        )
    if budget:
        return Light(
            name,
            Colour.AMBER,
            f"convergence was not judged for {_tasks(budget)}: the search had a fixed budget",
            "Give Minibatch(patience=...), or compare with a longer run.",
        )
    return Light(name, Colour.GREEN, f"converged for all {len(infos)} tasks")


def structure_light(loss: StructureLoss, structure: str) -> Light:
    """How much of what the data brought the structure let go."""
    name = "Structure"
    if not np.isfinite(loss.lost).any():
        return Light(name, Colour.GREY, f"what {structure} leaves out cannot be told from what the engine recorded")
    lost, brought = np.nansum(loss.lost), np.nansum(loss.brought)
    worst = int(np.nanargmax(loss.lost))
    share = lost / max(brought, np.finfo(float).tiny)
    most = f"{loss.lost[worst]:.2g} in task {worst}"
    said = f"{structure} lost {lost:.3g} of the {brought:.3g} nats that the tasks brought ({most})"
    advice = (
        "Raise the rank until the log evidence stops changing, or take Kronecker(), whose memory does not grow with the tasks; "
        "Dense() for small networks."
    )
    # half a nat a task moves nothing that one would look at; a tenth of the information is seen in predictions
    if lost > 0.5 * len(loss.lost) and share > 0.1:
        return Light(name, Colour.RED, f"the rank is too low: {said}", advice)
    if lost > 0.5 * len(loss.lost) and share > 0.02:
        return Light(name, Colour.AMBER, said, advice)
    return Light(name, Colour.GREEN, said)


def kernel_light(tests: Mapping[str, KernelTest], single: bool) -> Light:
    """Whether the weights move as the kernel says."""
    name = "Kernel"
    if single or not tests:
        return Light(name, Colour.GREY, "one task alone says nothing of how weights move")
    if not np.isfinite([test.ratio for test in tests.values()]).all():
        return Light(name, Colour.GREY, "the smoothed steps of the weights are not finite")
    count = len(tests)
    small = {site: test for site, test in tests.items() if count * test.p_too_small < 1e-2}
    large = {site: test for site, test in tests.items() if count * test.p_too_large < 1e-2 and not test.still}
    if small:
        worst = min(small, key=lambda site: (small[site].p_too_small, -small[site].ratio))
        test = small[worst]
        strong = count * test.p_too_small < 1e-5
        moves = (
            "stand still by their kernel, but the data move them"
            if test.still
            else "move further than the kernel lets them"
        )
        return Light(
            name,
            Colour.RED if strong else Colour.AMBER,
            f"q is too small: the weights {', '.join(sorted(small))} {moves} (the steps of {worst} are {test.ratio:.3g} times "
            f"what they should be, p = {test.p_too_small:.1g})",
            "Raise the kernel's noise for these leaves, or learn it (learn_kernel, maximise_evidence, marginalize); if one "
            "task stands out, look at its data or use SwitchingFilter.",
        )
    if large:
        worst = min(large, key=lambda site: large[site].p_too_large)
        return Light(
            name,
            Colour.AMBER,
            f"q is too large: the weights {', '.join(sorted(large))} move less than the kernel lets them (the steps of {worst} "
            f"are {large[worst].ratio:.2g} times what they should be): earlier tasks are forgotten for nothing",
            "Lower the kernel's noise for these leaves, or learn it (learn_kernel, maximise_evidence, marginalize).",
        )
    return Light(name, Colour.GREEN, "the weights move from task to task as the kernel says")


def precision_light(found: Rounding) -> Light:
    """What rounding does to the belief."""
    name = "Rounding"
    worst = float(np.nanmax(np.concatenate([found.variance, found.step])))
    if found.dtype == "float64":
        return Light(name, Colour.GREEN, "computed in float64")
    task = int(np.nanargmax(np.fmax(found.variance, found.step)))
    shown = "beyond measure" if not np.isfinite(worst) else f"by up to {worst:.1%}"
    advice = (
        "Compute in float64 (jax.config.update('jax_enable_x64', True), float64 data); or scale inputs and outputs to one, and "
        "take a narrower prior."
    )
    if worst > 0.05:
        return Light(name, Colour.RED, f"{found.dtype} changes variances of task {task} {shown}", advice)
    if worst > 0.005:
        return Light(name, Colour.AMBER, f"{found.dtype} changes variances of task {task} {shown}", advice)
    return Light(name, Colour.GREEN, f"{found.dtype} suffices: variances change {shown}")


def khat_light(found: Importance, weights: int) -> Light:
    """Whether the belief over the weights is close to the program's posterior."""
    name = "Importance weights"
    worst = np.nan if np.isnan(found.task_khat).all() else float(np.nanmax(found.task_khat))
    bad = [t for t, khat in enumerate(found.task_khat) if khat > LARGEST_KHAT]
    if not np.isfinite(found.log_ratios).all():
        return Light(name, Colour.RED, found.message, "See the lights of rounding and of the MAP search.")
    if found.reliable and not bad:
        return Light(
            name,
            Colour.GREEN,
            f"k-hat {found.khat:.2f} over the trajectory, at most {worst:.2f} by task: the draws can be corrected",
        )
    advice = (
        "Judge predictions rather than weights: linearised predictions, leave-one-out and coverage may be right all the same; "
        "compare with NUTS by functional_distance on a small problem. A larger rank, a converged MAP search or more data a "
        "task bring the belief closer."
    )
    if not bad:
        return Light(
            name,
            Colour.AMBER,
            f"k-hat is {found.khat:.2f} over the trajectory of {weights} weights a task, but fit for each task alone (at most "
            f"{worst:.2f}): small errors add up, and trajectories cannot be corrected",
            advice,
        )
    colour = Colour.RED if worst > 1 else Colour.AMBER
    return Light(
        name,
        colour,
        f"k-hat is {worst:.2f} for task {int(np.nanargmax(found.task_khat))} ({len(bad)} of {len(found.task_khat)} tasks above "
        f"{LARGEST_KHAT}): the belief over weights is not the program's posterior, and no reweighting mends it",
        advice,
    )


def innovation_light(found: Innovations) -> Light:
    """Whether tasks surprise as much as the filter expects."""
    name = "Innovations"
    if not np.isfinite(found.total_score):
        return Light(name, Colour.GREY, "no task was predicted from an earlier one")
    ratio = np.nansum(found.statistic) / np.nansum(found.expected)
    worst = int(np.nanargmax(np.abs(found.score)))
    said = (
        f"tasks surprise {ratio:.2f} times as much as the filter expects ({found.total_score:+.1f} standard deviations; most "
        f"for task {worst}, {found.score[worst]:+.1f})"
    )
    if abs(found.total_score) < 3 and np.nanmax(np.abs(found.score)) < 4:
        return Light(name, Colour.GREEN, said)
    strong = abs(found.total_score) > 5 or np.nanmax(np.abs(found.score)) > 8
    colour = Colour.RED if strong else Colour.AMBER
    if found.total_score > 0 or found.score[worst] > 0:
        return Light(
            name,
            colour,
            said,
            "The filter is too sure of the next task: raise the kernel's noise or the likelihood's, count the likelihood less "
            "(power < 1), or look at that task's data.",
        )
    return Light(
        name,
        colour,
        said,
        "The filter is too cautious: lower the kernel's noise, the likelihood's, or the prior's width.",
    )


def coverage_light(found: Innovations) -> Light:
    """Whether one-step predictive intervals hold what they promise."""
    name = "Coverage"
    if not np.isfinite([found.total_score, *found.total_coverage.values()]).all():
        return Light(name, Colour.GREY, "no task was predicted from an earlier one")
    said = ", ".join(
        f"{share:.0%} of outcomes in the {level:.0%} intervals" for level, share in found.total_coverage.items()
    )
    scores = np.array(list(found.total_coverage_score.values()))
    worst = scores[np.argmax(np.abs(scores))]
    said = f"one task ahead, {said} ({worst:+.1f} standard deviations at the worst)"
    if abs(worst) < 3:
        return Light(name, Colour.GREEN, said)
    colour = Colour.RED if abs(worst) > 5 else Colour.AMBER
    if worst < 0:
        return Light(
            name,
            colour,
            f"too narrow: {said}",
            "Raise the likelihood's noise or the kernel's, or let the likelihood count less.",
        )
    return Light(name, colour, f"too wide: {said}", "Lower the likelihood's noise, the kernel's, or the prior's width.")


def loo_light(pareto_k: np.ndarray, tasks: np.ndarray) -> Light:
    """Whether leave-one-out can be trusted, and which examples bear on the belief most."""
    name = "Leave-one-out"
    bad = pareto_k > LARGEST_KHAT
    if not len(pareto_k):
        return Light(name, Colour.GREY, "the draws are not finite: there is nothing to leave out of")
    if not bad.any():
        return Light(name, Colour.GREEN, f"no example decides alone: the largest k-hat is {pareto_k.max():.2f}")
    worst = int(np.argmax(pareto_k))
    return Light(
        name,
        Colour.RED if bad.mean() > 0.1 else Colour.AMBER,
        f"{int(bad.sum())} of {len(bad)} examples weigh too much to be left out by reweighting (k-hat up to "
        f"{pareto_k[worst]:.2f}, in task {int(tasks[worst])}): their part of the ELPD is not reliable",
        "Look at these examples (outliers?), take a likelihood with heavier tails, or refit without them.",
    )


def power_light(power: float) -> Light | None:
    """A note on tempered likelihoods."""
    if power == 1:
        return None
    return Light(
        "Likelihood",
        Colour.AMBER,
        f"the filter counted the likelihood {power:.3g} times: its belief is that of a tempered posterior",
        "Judge it by its predictions; Bayes' rule is power=1.",
    )


def _tasks(which: Sequence[int]) -> str:
    shown = ", ".join(map(str, which[:5])) + (", ..." if len(which) > 5 else "")
    return f"task{'s' if len(which) > 1 else ''} {shown}"
