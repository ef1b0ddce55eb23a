"""Learning a kernel's noises and gains by expectation maximisation: filter, smooth, and a maximum in closed form.

With w the noise of a step and x what its gain acts on (``inference/disturbances.py``), all sums over a group's weights and over
the steps between tasks, n of them, and q = h c the noise with hyper-parameter h,

    delta = sum E[w x] / q  /  sum E[x^2] / q          a <- a + delta
    ratio = 1/n sum E[(w - delta x)^2] / q             h <- h ratio         (h <- h sqrt(ratio) for a standard deviation)

In exact programs no such step lowers the evidence. But its rate is that of the missing information: a task of 50 labels says
next to nothing of most of a network's weights, and a step moves log h by a thousandth of the way. The E-step however holds the
slope of the evidence, n/2 (ratio - 1) for log h (Fisher's identity), and with it quasi-Newton steps in log h reach the same
fixed points in a few runs of the filter; they are checked against the evidence and give way to EM's own. Laplace's
approximation and a precision cut to size part the two: the slope does not know how the curvature moves with the MAP, and may
even point the other way (maximise_evidence follows the evidence itself); the best iterate is kept.
A noise of 0 stays 0. Sources: Shumway and
Stoffer 1982; Jamshidian and Jennrich 1997 for the acceleration.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssm_nn.extraction import describe
from ssm_nn.inference.beliefs import Filtered, FilterState
from ssm_nn.inference.disturbances import Disturbance, disturbances
from ssm_nn.inference.hyper_parameters import check_known, coordinates, supports
from ssm_nn.inference.laplace import FilterWarning, LaplaceFilter
from ssm_nn.inference.smoothing import smooth
from ssm_nn.moments import Moments
from ssm_nn.tasks import Task, Tasks, listed_tasks

__all__ = ["Iterate", "LearntKernel", "learn_kernel"]

Array = Any

_RADIUS = 2.0  # log h moves by so much in one step: from a wrong decade to the right one in two

_MESSAGES = {
    "converged": "the evidence has no slope left",
    "budget": "the evidence still rose when the iterations were used up: allow more, or start where this ended",
    "fell": "the evidence fell by more than the tolerance: Laplace's approximation and EM part here, or a MAP search did "
    "not converge; the best iterate was kept",
    "support": "a step left the support of a hyper-parameter's prior; the best iterate was kept",
    "not finite": "the evidence was not finite; the best iterate was kept",
}


class Iterate(NamedTuple):
    """Hyper-parameters and their log evidence in nats."""

    hypers: dict[str, float]
    log_evidence: float


@dataclass(frozen=True)
class LearntKernel:
    """What learning a kernel ends with.

    Attributes:
        hypers: all hyper-parameters of the engine, the learnt ones at their best iterate.
        filtered: the filter's run there.
        history: every iterate that was evaluated, in order.
        status: ``"converged"``, ``"budget"``, ``"fell"``, ``"support"`` or ``"not finite"``.
    """

    hypers: dict[str, Array]
    filtered: Filtered
    history: tuple[Iterate, ...]
    status: str

    @property
    def log_evidence(self) -> float:
        """Of the best iterate, in nats."""
        return self.filtered.log_evidence

    @property
    def converged(self) -> bool:
        """Whether the evidence has no slope left."""
        return self.status == "converged"

    @property
    def message(self) -> str:
        """The status in a sentence."""
        return _MESSAGES[self.status]


class _Expected(NamedTuple):
    """What an E-step says at some hyper-parameters, in free coordinates, (J,) each.

    Attributes:
        slope: of the evidence (Fisher's identity).
        step: the M-step.
        unit: of the slope: 1 for a noise; for a gain the root of its information were the weights known.
    """

    slope: np.ndarray
    step: np.ndarray
    unit: np.ndarray


class _Group(NamedTuple):
    """A learnt hyper-parameter: its weights, and k in noise ~ h^k; 0 for a gain."""

    inside: Array
    exponent: int


def learn_kernel(
    engine: LaplaceFilter,
    tasks: Tasks | Iterable[Task | Mapping[str, Any] | None],
    noises: Mapping[str, str],
    *,
    gains: Mapping[str, str] | None = None,
    key: Array | int = 0,
    max_iterations: int = 50,
    tolerance: float = 0.1,
    accelerate: bool = True,
) -> LearntKernel:
    """Learn noises (and gains) from the values in ``engine.hypers`` on, by EM on all tasks.

    Args:
        engine: the filter; every noise to be learnt starts at its value in ``engine.hypers``, > 0.
        tasks: two or more; they are read once an iteration.
        noises: hyper-parameter -> pattern of the leaves whose noise it is: ``{"noise.first": "layers.0.*"}``. The noise
            must be proportional to it, or to its square (a standard deviation); a factor of its own for every task, such
            as the time since the last, is allowed.
        gains: hyper-parameter -> pattern of the leaves whose gain it is.
        key: as for ``engine.run``, the same in every iteration.
        max_iterations: runs of the filter at most.
        tolerance: converged when the evidence's slopes are below so many nats for a factor e of a noise, and for a
            gain's standard deviation were the weights known.
        accelerate: take quasi-Newton steps; False takes the M-steps of EM alone.

    Returns:
        The best iterate. A FilterWarning says so where the iterations did not converge.

    Raises:
        ValueError: unknown names and patterns, a noise that starts at 0, a kernel that is not of the form above.
    """
    gains = dict(gains or {})
    if not noises and not gains:
        raise ValueError("noises is empty; at least one hyper-parameter and pattern is accepted")
    if max_iterations < 1:
        raise ValueError(f"max_iterations is {max_iterations}; a whole number >= 1 is accepted")
    if not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance}; a number > 0 is accepted")
    check_known(noises, engine.hypers, "noises")
    check_known(gains, engine.hypers, "gains")
    listed = listed_tasks(tasks, at_least=2)
    groups = _groups(engine, listed, noises, gains)
    search = _Search(engine, listed, groups, key, max_iterations, tolerance)
    status = search.run(accelerate)
    if status != "converged":
        warnings.warn(_MESSAGES[status], FilterWarning, stacklevel=2)
    return LearntKernel(search.best.hypers, search.best, tuple(search.history), status)


class _Search:
    """Steps in free coordinates (log h for a noise, a for a gain), with every run of the filter recorded."""

    def __init__(
        self,
        engine: LaplaceFilter,
        tasks: list[Task],
        groups: Mapping[str, _Group],
        key: Array | int,
        budget: int,
        tolerance: float,
    ):
        self.engine, self.tasks, self.groups, self.key = engine, tasks, groups, key
        self.budget, self.tolerance = budget, tolerance
        self.supports = supports(engine.program, tasks[0], engine.hypers)
        self.history: list[Iterate] = []
        self.best = self._evaluate(self._free(engine.hypers))

    def run(self, accelerate: bool) -> str:
        """Iterate to the end; the status."""
        here, filtered = self._free(self.engine.hypers), self.best
        if not np.isfinite(filtered.log_evidence):
            return "not finite"
        expected = self._expect(here, filtered)
        curvature, radius = None, _RADIUS
        while np.any(np.abs(expected.slope) >= self.tolerance * expected.unit):
            limit = np.maximum(radius * _unit_step(expected), np.abs(expected.step))
            step = _newton(expected, curvature, limit) if accelerate else expected.step
            if accelerate and not self._inside(here + step):
                step = expected.step
            if not self._inside(here + step):
                return "support"
            if len(self.history) >= self.budget:
                return "budget"
            trial = self._evaluate(here + step)
            if not np.isfinite(trial.log_evidence):
                return "not finite"
            found = self._expect(here + step, trial)
            curvature = _secant(curvature, step, expected.slope - found.slope)
            if trial.log_evidence >= filtered.log_evidence - self._rounding(filtered):
                here, filtered, expected, radius = here + step, trial, found, _RADIUS
            elif np.all(np.abs(step) <= np.abs(expected.step) * (1 + 1e-9)):
                return "fell"
            else:
                radius = float(np.max(np.abs(step) / _unit_step(expected))) / 4
        return "converged"

    def _expect(self, here: np.ndarray, filtered: Filtered) -> _Expected:
        return _expectation(self._named(here), disturbances(smooth(filtered)), self.groups)

    def _free(self, hypers: Mapping[str, Any]) -> np.ndarray:
        return np.array([np.log(float(hypers[n])) if g.exponent else float(hypers[n]) for n, g in self.groups.items()])

    def _named(self, free: np.ndarray) -> dict[str, float]:
        return {n: float(np.exp(v) if g.exponent else v) for (n, g), v in zip(self.groups.items(), free, strict=True)}

    def _inside(self, free: np.ndarray) -> bool:
        hypers = self._named(free)
        return all(bool(np.all(self.supports[name](jnp.asarray(value)))) for name, value in hypers.items())

    def _rounding(self, filtered: Filtered) -> float:
        # a sum in single precision has no more digits
        return 10 * float(jnp.finfo(filtered.beliefs[0].mean.dtype).eps) * abs(filtered.log_evidence)

    def _evaluate(self, free: np.ndarray) -> Filtered:
        learnt = self._named(free)
        hypers = self.engine.hypers | {n: jnp.asarray(v, self.engine.hypers[n].dtype) for n, v in learnt.items()}
        filtered = self.engine.with_hypers(hypers).run(self.key, self.tasks)
        self.history.append(Iterate(learnt, filtered.log_evidence))
        if len(self.history) == 1 or filtered.log_evidence > self.best.log_evidence:
            self.best = filtered
        return filtered


def _expectation(hypers: Mapping[str, float], steps: list[Disturbance], groups: Mapping[str, _Group]) -> _Expected:
    """Slope, information and M-step from all steps; weights that a step gives no noise say nothing of it."""
    shift = jnp.zeros_like(steps[0].noise)
    slope, information, step = {}, {}, {}
    for name, group in groups.items():
        if group.exponent == 0:
            sums = np.sum([_gain_sums(moved, group.inside) for moved in steps], axis=0)
            slope[name], information[name] = sums
            step[name] = sums[0] / sums[1]
            shift = jnp.where(group.inside, step[name], shift)
    for name, group in groups.items():
        if group.exponent:
            at_once, after, count = np.sum([_noise_sums(moved, group.inside, shift) for moved in steps], axis=0)
            slope[name] = group.exponent * (at_once - count) / 2
            information[name] = group.exponent**2 * count / 2
            step[name] = np.log(after / count) / group.exponent
    # a gain has no scale of its own: its unit is one standard deviation were the weights known
    unit = [1.0 if group.exponent else np.sqrt(information[name]) for name, group in groups.items()]
    return _Expected(np.array([slope[n] for n in groups]), np.array([step[n] for n in groups]), np.array(unit))


def _unit_step(expected: _Expected) -> np.ndarray:
    return 1 / expected.unit


def _newton(expected: _Expected, curvature: np.ndarray | None, limit: np.ndarray) -> np.ndarray:
    """A quasi-Newton step up, shortened until no coordinate moves beyond its limit; without a curvature, up to it."""
    if curvature is None:
        direction = expected.slope / expected.unit**2  # of one unit for all
        return direction / np.max(np.abs(direction) / limit)
    step = np.linalg.solve(curvature, expected.slope)
    return step / max(1.0, np.max(np.abs(step) / limit))


def _secant(curvature: np.ndarray | None, step: np.ndarray, fall: np.ndarray) -> np.ndarray | None:
    """BFGS: minus the evidence's Hessian from how far its slope fell; none where the evidence is not concave."""
    bend = step @ fall
    if not bend > 0:
        return None
    if curvature is None:
        curvature = np.eye(len(step)) * (fall @ fall) / bend
    pulled = curvature @ step
    return curvature - np.outer(pulled, pulled) / (step @ pulled) + np.outer(fall, fall) / bend


@jax.jit
def _gain_sums(step: Disturbance, inside: Array) -> Array:
    """Sums of E[w x] / q and E[x^2] / q."""
    moves = inside & (step.noise > 0)
    noise = jnp.where(moves, step.noise, 1.0)
    return jnp.stack([jnp.sum(jnp.where(moves, part / noise, 0.0)) for part in (step.product, step.before)])


@jax.jit
def _noise_sums(step: Disturbance, inside: Array, shift: Array) -> Array:
    """Sums of E[w^2] / q before and after the gain's step, and the number of their terms."""
    moves = inside & (step.noise > 0)
    after = step.square - 2 * shift * step.product + jnp.square(shift) * step.before
    noise = jnp.where(moves, step.noise, 1.0)
    return jnp.stack([jnp.sum(jnp.where(moves, part / noise, 0.0)) for part in (step.square, after, noise)])


def _groups(
    engine: LaplaceFilter, tasks: Sequence[Task], noises: Mapping[str, str], gains: Mapping[str, str]
) -> dict[str, _Group]:
    """The learnt hyper-parameters, after a look at what halving each does to the step into the second task."""
    first, task = tasks[:2]
    state = engine.init(0, first)
    layout = describe(engine.program, first, engine.hypers)
    now = _step(engine, state, task, {})
    groups = {}
    for argument, patterns in (("noises", noises), ("gains", gains)):
        taken = jnp.zeros(layout.size, bool)
        for name, pattern in patterns.items():
            inside = coordinates(layout, pattern, argument)
            if bool(jnp.any(taken & inside)):
                raise ValueError(f"{argument}: the pattern {pattern!r} of {name!r} has leaves of another pattern too")
            taken = taken | inside
            halved = _step(engine, state, task, {name: engine.hypers[name] / 2})
            if argument == "gains":
                groups[name] = _gain_group(name, pattern, inside, engine.hypers[name], now, halved)
            else:
                groups[name] = _noise_group(name, pattern, inside, engine.hypers[name], now, halved)
    return groups


def _step(engine: LaplaceFilter, state: FilterState, task: Task, changed: Mapping[str, Array]) -> Moments:
    moments, _, _ = engine._advance(engine.hypers | dict(changed), state, jax.tree.map(jnp.asarray, task), state.key)
    return moments


def _noise_group(name: str, pattern: str, inside: Array, value: Array, now: Moments, halved: Moments) -> _Group:
    if not float(value) > 0:
        raise ValueError(f"noises: {name!r} starts at {float(value)}; EM never leaves 0, so a number > 0 is accepted")
    for exponent in (1, 2):
        expected = jnp.where(inside, now.noise / 2**exponent, now.noise)
        if _close(halved.noise, expected) and _close(halved.gain, now.gain) and _close(halved.shift, now.shift):
            if not bool(jnp.any(inside & (now.noise > 0))):
                raise ValueError(f"noises: the leaves {pattern!r} of {name!r} have no noise in the step into task 1")
            return _Group(inside, exponent)
    raise ValueError(
        f"noises: the noise of the leaves {pattern!r}, and nothing else, must be proportional to {name!r} or to its square"
    )


def _gain_group(name: str, pattern: str, inside: Array, value: Array, now: Moments, halved: Moments) -> _Group:
    same = _close(halved.noise, now.noise) and _close(halved.shift, now.shift)
    expected = jnp.where(inside, now.gain / 2, now.gain)
    if not same or not _close(halved.gain, expected) or not _close(now.gain[inside], value):
        raise ValueError(f"gains: the gain of the leaves {pattern!r}, and nothing else, must be {name!r}")
    return _Group(inside, 0)


def _close(one: Array, other: Array) -> bool:
    return bool(jnp.allclose(one, other, rtol=1e3 * float(jnp.finfo(one.dtype).eps), atol=0.0))
