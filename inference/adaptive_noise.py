"""Noise chosen anew for every task from its own data: a large shift frees the weights, a repeated task does not.

For the step into task t, with s_g the scale of group g's noise about its learnt value h_g,

    s = argmax  log Z_t(s h)  -  1/2 sum_g (log s_g / spread)^2

an empirical-Bayes choice under a log-normal prior. Around the MAP theta found with one kernel, with the log likelihood's
gradient g and the task's information G there, the evidence of any other kernel has a closed form that reads no data,

    log Z(s) = log p(D | theta) - 1/2 e^T Lambda' e + 1/2 r^T (Lambda' + G)^-1 r + 1/2 logdet Lambda' - 1/2 logdet(Lambda' + G)
    e = theta - m'(s),    r = g - Lambda'(s) e

which is searched on a grid, group by group; the filter's update with the winner gives a new theta, until the winner stays.
Exact in linear-Gaussian programs, up to the grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssm_nn.extraction import extract
from ssm_nn.inference.beliefs import Belief, Filtered, FilterState, Info, predict_belief
from ssm_nn.inference.expectation_maximisation import Iterate
from ssm_nn.inference.hyper_parameters import check_known, supports
from ssm_nn.inference.laplace import LaplaceFilter
from ssm_nn.moments import Moments
from ssm_nn.tasks import Task, Tasks, as_task, each_task

__all__ = ["Adapted", "AdaptedInfo", "AdaptiveFilter"]

Array = Any

_SWEEPS = 2  # over the groups, on the closed form
_ROUNDS = 4  # of update and closed form


class AdaptedInfo(NamedTuple):
    """What one update says of itself.

    Attributes:
        info: of the filter's update with the chosen noise.
        hypers: the chosen noises.
        tried: the noises that were updated with, and their log evidence.
    """

    info: Info
    hypers: dict[str, float]
    tried: tuple[Iterate, ...]


@dataclass(frozen=True)
class Adapted:
    """What a run leaves behind.

    Attributes:
        filtered: as of any filter; each Info holds the moments of the chosen noise, so that ``engine.smooth`` uses them.
        infos: one AdaptedInfo a task.
    """

    filtered: Filtered
    infos: tuple[AdaptedInfo, ...]

    def noises(self, name: str) -> np.ndarray:
        """(T,), the noise chosen for each task; nan for the first and for tasks without data, where none was."""
        return np.array([info.hypers.get(name, math.nan) for info in self.infos])


class AdaptiveFilter:
    """A filter whose noises follow the size of the shift.

    Args:
        engine: the filter; the noises in its ``hypers`` are the centres of their priors, > 0 (learn them first, with
            ``learn_kernel``).
        noises: names of the hyper-parameters that adapt.
        spread: standard deviation of log s, > 0.
        scales: the grid of s; one of them is 1.

    Raises:
        ValueError: naming the argument, for what is not accepted.
    """

    def __init__(
        self,
        engine: LaplaceFilter,
        noises: Sequence[str],
        *,
        spread: float = math.log(10.0),
        scales: Sequence[float] = tuple(10.0 ** (0.25 * i) for i in range(-12, 13)),
    ):
        if isinstance(noises, str) or not noises:
            raise ValueError(f"noises is {noises!r}; a sequence of one or more names is accepted")
        check_known(noises, engine.hypers, "noises")
        for name in noises:
            if not float(engine.hypers[name]) > 0:
                raise ValueError(f"noises: {name!r} is {float(engine.hypers[name])}; a centre > 0 is accepted")
        if not 0 < spread < math.inf:
            raise ValueError(f"spread is {spread}; a finite number > 0 is accepted")
        if not all(0 < s < math.inf for s in scales) or 1.0 not in scales:
            raise ValueError(f"scales is {scales}; finite numbers > 0 are accepted, 1.0 among them")
        self.engine, self.noises, self.spread, self.scales = engine, tuple(noises), spread, tuple(scales)
        self._score = jax.jit(self._scores)
        self._grids: dict[str, list[float]] | None = None

    def init(self, key: Array, task: Task | Mapping[str, Any] | None = None) -> FilterState:
        """The prior, as of the engine."""
        return self.engine.init(key, task)

    def update(self, state: FilterState, task: Task | Mapping[str, Any] | None) -> tuple[FilterState, AdaptedInfo]:
        """One task; the first, and tasks without data, meet the engine's own noise."""
        task = as_task(task)
        here = {name: float(self.engine.hypers[name]) for name in self.noises}
        after, info = self.engine.update(state, task)
        tried = [Iterate(here, info.log_evidence)]
        if int(state.step) == 0 or not task.data or not math.isfinite(info.log_evidence):
            return after, AdaptedInfo(info, {}, tuple(tried))
        found, best, chosen = (after, info), self._merit(tried[0]), here
        kept = found
        for _ in range(_ROUNDS):
            there = self._search(here, state, task, *found)
            if any(there == one.hypers for one in tried):
                break
            here = there
            found = self.engine.with_hypers(self._hypers(here)).update(state, task)
            tried.append(Iterate(here, found[1].log_evidence))
            if not self._merit(tried[-1]) > best:
                break
            kept, best, chosen = found, self._merit(tried[-1]), here
        return kept[0], AdaptedInfo(kept[1], chosen, tuple(tried))

    def run(self, key: Array, tasks: Tasks | Iterable[Task | Mapping[str, Any] | None]) -> Adapted:
        """All tasks one after another; equal to ``init`` and the ``update``s."""
        state, states, infos = None, [], []
        for task in each_task(tasks):
            state = self.init(key, task) if state is None else state
            state, info = self.update(state, task)
            states.append(state)
            infos.append(info)
        return Adapted(self.engine.filtered(states, [info.info for info in infos]), tuple(infos))

    def _hypers(self, noises: Mapping[str, float]) -> dict[str, Array]:
        hypers = self.engine.hypers
        return hypers | {name: jnp.asarray(value, hypers[name].dtype) for name, value in noises.items()}

    def _penalty(self, noises: Mapping[str, float]) -> float:
        logs = [math.log(value / float(self.engine.hypers[name])) / self.spread for name, value in noises.items()]
        return -0.5 * sum(part**2 for part in logs)

    def _merit(self, tried: Iterate) -> float:
        merit = tried.log_evidence + self._penalty(tried.hypers)
        return merit if math.isfinite(merit) else -math.inf

    def _search(
        self, here: Mapping[str, float], state: FilterState, task: Task, after: FilterState, info: Info
    ) -> dict[str, float]:
        """The best noises by the closed form around the MAP found with ``here``."""
        self._grids = self._inside(task) if self._grids is None else self._grids
        context, best = Task({}, jax.tree.map(jnp.asarray, task.context)), dict(here)
        for _ in range(_SWEEPS):
            for name in self.noises:
                grid = [best | {name: value} for value in self._grids[name]]
                stacked = jax.tree.map(lambda *values: jnp.stack(values), *[self._hypers(one) for one in grid])
                scores = self._score(stacked, state, context, after.mean, info.moments, info.site)
                merits = np.asarray(scores, float) + [self._penalty(one) for one in grid]
                best = grid[int(np.argmax(np.where(np.isfinite(merits), merits, -np.inf)))]
        return best

    def _inside(self, task: Task) -> dict[str, list[float]]:
        """The grid of each noise, as far as it lies in the support of its prior."""
        allowed = supports(self.engine.program, task, self.engine.hypers)
        grids = {name: [s * float(self.engine.hypers[name]) for s in self.scales] for name in self.noises}
        return {name: [q for q in grid if bool(jnp.all(allowed[name](q)))] for name, grid in grids.items()}

    def _scores(
        self, stacked: Any, state: FilterState, context: Task, theta: Array, moments: Moments, site: Any
    ) -> Array:
        """The closed form for every entry of ``stacked``, up to the log likelihood, which they share."""
        before = Belief(state.mean, state.precision)
        met = predict_belief(before, moments)
        gradient = met.precision.matvec(theta - met.mean)  # of the log likelihood: the MAP is stationary

        def score(hypers: Any) -> Array:
            mean, precision, _ = predict_belief(before, extract(self.engine.program, context, hypers).moments)
            both = precision.absorb(site)
            pull = gradient - precision.matvec(theta - mean)
            fit = pull @ both.solve(pull) - precision.quadratic(theta - mean)
            return 0.5 * (fit + precision.logdet() - both.logdet())

        return jax.lax.map(score, stacked)
