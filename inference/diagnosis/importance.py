"""Importance correction: the smoother's trajectories as proposal, Pareto-smoothed weights, and when not to trust them.

    w_s  ∝  p(D, theta^s) / q(theta^s),   theta^s ~ q                  overall, the whole trajectory
    w_ts ∝  p(D_t | theta) N(theta; m'_t, Lambda'_t^-1) / q_t(theta)      one task: its Laplace step alone, given the prediction

Weights are smoothed, and k-hat, the shape of their tail, estimated by PSIS (Vehtari, Simpson, Gelman, Yao, Gabry 2024, JMLR
25(72)); all in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import logsumexp

from ssm_nn.extraction import Program, extract
from ssm_nn.inference.beliefs import Belief
from ssm_nn.inference.checks import check_count
from ssm_nn.inference.diagnosis.ahead import predicted_beliefs
from ssm_nn.inference.diagnosis.trajectories import checked_tasks, log_joint, trajectories, widened
from ssm_nn.inference.draws import leaves_of_path
from ssm_nn.inference.smoothing import Smoothed
from ssm_nn.tasks import Task, Tasks

if TYPE_CHECKING:
    import xarray

__all__ = ["Importance", "ParetoWeights", "check_draws", "importance_weights", "pareto_weights"]

Array = Any

FEWEST_DRAWS = 100  # the tail of PSIS is then 20 draws; below, its shape says nothing
LARGEST_KHAT = 0.7  # above, no number of draws that one can afford makes the estimates reliable


class ParetoWeights(NamedTuple):
    """``log_weights`` (S,) sum to one; ``khat``, the tail's shape; ``ess``, 1 / sum w^2."""

    log_weights: np.ndarray
    khat: float
    ess: float


@dataclass(frozen=True)
class Importance:
    """Importance weights of a posterior's trajectories.

    Attributes:
        posterior: the proposal.
        seed: key of the draws.
        log_ratios: (S,), log p(D, theta) - log q(theta), of which the program's hyper-parameter priors are no part.
        log_weights: (S,), smoothed, summing to one.
        khat, ess: of the whole trajectory.
        task_khat, task_ess: (T,), of each task's own update; nan for a task without data.
    """

    posterior: Smoothed
    seed: int
    log_ratios: np.ndarray
    log_weights: np.ndarray
    khat: float
    ess: float
    task_khat: np.ndarray
    task_ess: np.ndarray

    @property
    def limit(self) -> float:
        """The largest k-hat with which so many draws correct: min(1 - 1 / log10 S, 0.7)."""
        return min(1 - 1 / np.log10(len(self.log_ratios)), LARGEST_KHAT)

    @property
    def reliable(self) -> bool:
        """Whether the weights may be used."""
        return bool(self.khat <= self.limit)

    @property
    def message(self) -> str:
        """Whether the weights may be used, and why, in a sentence."""
        size, wild = len(self.log_ratios), int((~np.isfinite(self.log_ratios)).sum())
        if wild:
            return (
                f"{wild} of {size} draws have a density that is not finite: the belief is no Gaussian any more (rounding), or "
                "weights move without noise, where the program has no density (Static() says that they stand still)"
            )
        said = f"k-hat is {self.khat:.2f} ({size} draws, effective {self.ess:.0f}; at most {self.limit:.2f} is fit)"
        if self.reliable:
            return f"{said}: the draws can be corrected"
        judged = np.where(np.isnan(self.task_khat), -np.inf, self.task_khat)
        worst = int(np.argmax(judged))
        where = (
            f"; the update of task {worst} alone has {judged[worst]:.2f}"
            if judged[worst] > LARGEST_KHAT
            else "; each task's own update is fit, so that their errors add up over the trajectory"
        )
        return f"{said}: a few draws carry all the weight, and corrected expectations would be wrong{where}"

    @property
    def log_evidence(self) -> float:
        """log mean_s w_s before normalisation: log p(D) by importance sampling, to hold beside the filter's.

        Raises:
            ValueError: where the weights may not be used.
        """
        self._check()
        return float(logsumexp(self.log_ratios) - np.log(len(self.log_ratios)))

    def expectation(self, function: Callable[[dict[str, Array]], Any]) -> Any:
        """``sum_s w_s f(theta^s)`` under the program's exact posterior.

        Args:
            function: from the leaves of one trajectory (site name -> (T, *leaf), or (1, *leaf) for leaves that never move) to
                an array or a pytree of arrays; traced.

        Raises:
            ValueError: where the weights may not be used, in the words of ``message``.
        """
        self._check()
        weights, start, total = np.exp(self.log_weights), 0, None
        layout = self.posterior.layout

        @jax.jit
        def summed(paths: Array, weights: Array) -> Any:
            values = jax.vmap(lambda path: function(leaves_of_path(layout, path)))(paths)
            return jax.tree.map(lambda value: jnp.tensordot(weights, value, 1), values)

        for chunk in trajectories(self.posterior, len(weights), self.seed):
            part = weights[start : start + len(chunk.paths)]
            start += len(part)
            with jax.enable_x64(True):
                found = jax.tree.map(np.asarray, summed(chunk.paths, part))
            total = found if total is None else jax.tree.map(np.add, total, found)
        return total

    def resampled(self, num_samples: int, key: int = 0) -> dict[str, np.ndarray]:
        """Draws of the exact posterior, leaf by leaf (S', T, *leaf), by systematic resampling.

        Raises:
            ValueError: where the weights may not be used.
        """
        self._check()
        check_count(num_samples=num_samples)
        offset = np.random.default_rng(key).uniform()
        places = (np.arange(num_samples) + offset) / num_samples
        chosen = np.minimum(np.searchsorted(np.cumsum(np.exp(self.log_weights)), places), len(self.log_weights) - 1)
        start, kept = 0, []
        for chunk in trajectories(self.posterior, len(self.log_weights), self.seed):
            kept.append(chunk.paths[chosen[(chosen >= start) & (chosen < start + len(chunk.paths))] - start])
            start += len(chunk.paths)
        paths = np.concatenate(kept)
        leaves = self.posterior.layout.leaves(paths)
        return {s.name: leaves[s.name][:, -1:] if s.frozen else leaves[s.name] for s in self.posterior.layout.sites}

    def to_datatree(self) -> xarray.DataTree:
        """Group ``importance``: log_ratio and log_weight by chain and draw, khat and ess, and by task task_khat, task_ess."""
        import xarray

        def by_draw(values: np.ndarray) -> tuple[tuple[str, str], np.ndarray]:
            return ("chain", "draw"), values[None]

        data = {
            "log_ratio": by_draw(self.log_ratios),
            "log_weight": by_draw(self.log_weights),
            "khat": ((), self.khat),
            "ess": ((), self.ess),
            "task_khat": ("task", self.task_khat),
            "task_ess": ("task", self.task_ess),
        }
        sizes = {"chain": 1, "draw": len(self.log_ratios), "task": len(self.task_khat)}
        made = xarray.Dataset(data, coords={name: np.arange(size) for name, size in sizes.items()})
        return xarray.DataTree.from_dict({"/importance": made})

    def _check(self) -> None:
        if not self.reliable:
            raise ValueError(self.message)


def importance_weights(
    posterior: Smoothed,
    tasks: Tasks | Iterable[Task | Mapping[str, Any]],
    *,
    num_samples: int = 1000,
    key: int = 0,
) -> Importance:
    """Weigh draws of the smoother's trajectories by the program's joint density.

    Where the smoother is exact all weights are equal. k-hat grows with the number of weights: for a network it says that its
    posterior over weights is not this Gaussian, not that its predictions are wrong.

    Args:
        posterior: what ``LaplaceFilter.smooth`` returned.
        tasks: its tasks.
        num_samples: S >= 100 draws.
        key: a seed.

    Raises:
        ValueError: too few draws, tasks of another posterior.
    """
    check_count(0, key=key)
    check_draws(num_samples)
    stack, power = checked_tasks(posterior, tasks)
    ratios = []
    for chunk in trajectories(posterior, num_samples, key):
        prior, likelihood = log_joint(posterior, stack, chunk.paths)
        ratios.append(prior + power * np.sum(likelihood, axis=1) - chunk.log_q)
    log_ratios = np.concatenate(ratios)
    whole = pareto_weights(log_ratios)
    by_task = _of_tasks(posterior, stack, power, num_samples, key)
    return Importance(
        posterior,
        key,
        log_ratios,
        *whole,
        np.array([np.nan if found is None else found.khat for found in by_task]),
        np.array([np.nan if found is None else found.ess for found in by_task]),
    )


def check_draws(num_samples: int) -> None:
    """Raise ValueError for fewer draws than the tail of the weights can be judged by."""
    check_count(num_samples=num_samples)
    if num_samples < FEWEST_DRAWS:
        raise ValueError(
            f"num_samples is {num_samples}: too few draws to judge the tail of the weights; at least {FEWEST_DRAWS} are "
            "accepted, and 1000 are advisable"
        )


def pareto_weights(log_ratios: np.ndarray) -> ParetoWeights:
    """PSIS of log ratios (S,); k-hat is infinite where one of them is not finite, or one draw carries all the weight."""
    import arviz  # noqa: F401  registers azstats
    from xarray import DataArray

    ratios = np.asarray(log_ratios, np.float64)
    if not np.isfinite(ratios).all():
        return ParetoWeights(np.full(len(ratios), np.nan), float("inf"), 0.0)
    if np.ptp(ratios) < 1e-9 * (1 + np.abs(ratios).max()):
        # equal but for rounding: there is no tail whose shape could be fitted; that of equal weights is -1
        return ParetoWeights(np.full(len(ratios), -np.log(len(ratios))), -1.0, float(len(ratios)))
    # azstats takes minus the log ratio
    centred: Any = DataArray((np.max(ratios) - ratios)[None], dims=["chain", "draw"])
    smoothed, khat = centred.azstats.psislw(dim=["chain", "draw"])
    weights = np.asarray(smoothed)[0]
    normal = weights - np.asarray(logsumexp(weights))
    # where all other weights of the tail are 0 beside one, it has no shape that could be fitted
    shape = float(khat) if np.isfinite(khat) else float("inf")
    return ParetoWeights(normal, shape, float(np.exp(-np.asarray(logsumexp(2 * normal)))))


def _of_tasks(
    posterior: Smoothed, stack: Tasks, power: float, num_samples: int, key: int
) -> list[ParetoWeights | None]:
    """Each task's filter update as a proposal for its own target."""
    filtered, found = posterior.filtered, []
    ahead = predicted_beliefs(filtered, stack)
    for t, (predicted, belief) in enumerate(zip(ahead, filtered.beliefs, strict=True)):
        task = stack.at(t)
        if task.mask is not None and not bool(np.any(task.mask)):
            found.append(None)
            continue
        with jax.enable_x64(True):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(key), t), num_samples)
            beliefs = widened((Belief(predicted.mean, predicted.precision), Belief(belief.mean, belief.precision)))
            ratios = np.asarray(
                _update_ratios(filtered.program, widened(filtered.hypers), *beliefs, widened(task), power, keys)
            )
        found.append(pareto_weights(ratios))
    return found


@partial(jax.jit, static_argnums=0)
def _update_ratios(
    program: Program, hypers: Any, predicted: Belief, belief: Belief, task: Task, power: Array, keys: Array
) -> Array:
    """(S,), without the constants."""
    space = extract(program, task, hypers)
    before, after = predicted.precision.quadratic_form(), belief.precision.quadratic_form()

    def one(key: Array) -> Array:
        shift = belief.precision.sample(key)
        theta = belief.mean + shift
        log_target = power * space.log_likelihood(theta, task) - 0.5 * before(theta - predicted.mean)
        return log_target + 0.5 * after(shift)

    return jax.lax.map(one, keys)
