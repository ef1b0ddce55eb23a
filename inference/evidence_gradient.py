"""The derivative of a program's evidence in its hyper-parameters, and its maximum by gradient steps.

    d/d hypers  sum_t log Z_t      by reverse mode over the tasks, one compiled step each; the MAP of a task enters by the
                                   implicit function theorem (inference/differentiable.py)

Exact for the evidence that the filter reports, up to the tolerance of its MAP search. All beliefs stay in memory for the way
back; what else a task's derivative reads (the columns of its curvature, P N C numbers, and some twenty matrices of a dense
belief's size) stays for as many tasks as fit in 1 GiB, and is made again for the others, without a search.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpyro.distributions import biject_to

from ssm_nn.inference.batches import with_mask, without_masked
from ssm_nn.inference.beliefs import Belief, FilterState
from ssm_nn.inference.curvature import ExactCurvature
from ssm_nn.inference.differentiable import TaskEvidence
from ssm_nn.inference.expectation_maximisation import Iterate
from ssm_nn.inference.hyper_parameters import check_known, supports
from ssm_nn.inference.laplace import FilterWarning, LaplaceFilter
from ssm_nn.inference.map_problem import NOT_CONVERGED, NOT_FINITE, MapProblem
from ssm_nn.tasks import Task, Tasks, listed_tasks

__all__ = ["EvidenceGradient", "EvidenceMaximum", "Slope", "maximise_evidence"]

Array = Any

_KEPT_BYTES = 2**30  # of pull-backs that wait for the way back


class Slope(NamedTuple):
    """The evidence and its derivative.

    Attributes:
        log_evidence: in nats, as ``engine.run`` reports it.
        gradient: by hyper-parameter, in the shape of its value.
        unconverged: tasks whose MAP search did not converge, or ended at a saddle; the derivative is wrong there.
    """

    log_evidence: float
    gradient: dict[str, Array]
    unconverged: tuple[int, ...]


class EvidenceGradient:
    """``EvidenceGradient(engine)(hypers, tasks)``: the evidence and its derivative; compiled once a shape.

    Args:
        engine: a filter whose curvature is ``ExactCurvature``.

    Raises:
        ValueError: for another curvature: a sketch has no derivative.
    """

    def __init__(self, engine: LaplaceFilter):
        if not isinstance(engine.curvature, ExactCurvature):
            raise ValueError(f"engine has the curvature {engine.curvature!r}; ExactCurvature() has a derivative")
        self.engine, self._evidence = engine, TaskEvidence(engine)

    def __call__(
        self,
        hypers: Mapping[str, Any],
        tasks: Tasks | Iterable[Task | Mapping[str, Any] | None],
        *,
        key: Array | int = 0,
    ) -> Slope:
        """At ``hypers``, all of the engine's.

        Raises:
            ValueError: for data or hyper-parameters that the filter does not accept.
        """
        engine = self.engine.with_hypers(hypers)
        listed = listed_tasks(tasks)
        state = engine.init(key, listed[0])
        total, pulls, unconverged, room = 0.0, [], [], _KEPT_BYTES
        for t, task in enumerate(listed):
            state, value, pull, at_minimum = self._forward(engine, state, task)
            room -= pull.keep(room)
            total += value
            pulls.append(pull)
            if not at_minimum:
                unconverged.append(t)
        gradient, bar = jax.tree.map(jnp.zeros_like, engine.hypers), None
        for pull in reversed(pulls):
            here, *before = pull(bar)
            gradient = jax.tree.map(jnp.add, gradient, here)
            bar = before[0] if before else None
        return Slope(total, gradient, tuple(unconverged))

    def _forward(
        self, engine: LaplaceFilter, state: FilterState, task: Task
    ) -> tuple[FilterState, float, _PullBack, bool]:
        """One task as ``engine.update`` does it; how its belief's cotangent goes back through it; whether at a minimum."""
        task, pieces = without_masked(jax.tree.map(jnp.asarray, task)), self._evidence
        next_key, map_key, curvature_key = jax.random.split(state.key, 3)
        first = int(state.step) == 0
        free = (engine.hypers,) if first else (engine.hypers, Belief(state.mean, state.precision))
        if not task.data:
            made = partial(pieces.prior if first else pieces.prediction, free, task)
            after, back = made()
            moved = FilterState(state.step + 1, next_key, after.mean, after.precision)
            return moved, 0.0, _PullBack(pieces, after, (), made, back), True
        _, predicted, start = engine._advance(engine.hypers, state, task, map_key)
        task, power = with_mask(task), jnp.asarray(engine.power, state.mean.dtype)
        problem = MapProblem(predicted.mean, predicted.precision, task, engine.hypers, power)
        found = engine._estimate(problem, start, map_key)
        update = pieces.first if first else pieces.later
        made = partial(update, free, task, found.shift, power, curvature_key)
        (after, value), back, saddle = made()
        moved = FilterState(state.step + 1, next_key, after.mean, after.precision)
        pull = _PullBack(pieces, after, (jnp.ones_like(value),), made, back)
        return moved, float(value), pull, found.status not in (NOT_CONVERGED, NOT_FINITE) and not bool(saddle)


@dataclass
class _PullBack:
    """How the cotangent of a task's belief goes back through it.

    Attributes:
        pieces: whose step it is.
        after: the belief.
        of_value: the cotangent of the task's evidence, where it has one.
        make: the step and its pull-back once more.
        back: the pull-back; None where it is not kept.
    """

    pieces: TaskEvidence
    after: Belief
    of_value: tuple[Array, ...]
    make: Callable[[], Any]
    back: Any

    def keep(self, room: int) -> int:
        """Bytes that the pull-back takes of ``room``; it is dropped if they do not fit."""
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(self.back))
        if size <= room:
            return size
        self.back = None
        return 0

    def __call__(self, bar: Belief | None) -> tuple[Any, ...]:
        back = self.make()[1] if self.back is None else self.back
        self.back = None  # each is used once
        bar = _or_zeros(bar, self.after)
        return self.pieces.pull(back, (bar, *self.of_value) if self.of_value else bar)


def _or_zeros(cotangent: Belief | None, of: Belief) -> Belief:
    return jax.tree.map(jnp.zeros_like, of) if cotangent is None else cotangent


@dataclass(frozen=True)
class EvidenceMaximum:
    """What maximising the evidence ends with.

    Attributes:
        hypers: all hyper-parameters of the engine, the learnt ones at the best step.
        log_evidence: there, in nats.
        history: every step, in order, with the values that moved in it.
        slope: largest derivative of the last step, in nats for a unit of the unconstrained space.
        converged: whether it fell below the tolerance.
        unconverged_tasks: at the last step, the tasks whose MAP search did not converge, or ended at a saddle.
    """

    hypers: dict[str, Array]
    log_evidence: float
    history: tuple[Iterate, ...]
    slope: float
    converged: bool
    unconverged_tasks: tuple[int, ...]


def maximise_evidence(
    engine: LaplaceFilter,
    tasks: Tasks | Iterable[Task | Mapping[str, Any] | None],
    learn: Sequence[str],
    *,
    starts: Sequence[Mapping[str, float]] = (),
    optimizer: optax.GradientTransformation | None = None,
    steps: int = 50,
    tolerance: float = 0.1,
    key: Array | int = 0,
) -> EvidenceMaximum:
    """Maximise the evidence over the hyper-parameters ``learn`` from their values in ``engine.hypers`` on.

    The search runs in the unconstrained space of each site's support (``numpyro.distributions.biject_to``): near 0 of a
    noise that is its logarithm. No prior of a hyper-parameter takes part. Evidences of networks are rough, each run of the
    filter ending in modes of its own: several starts find higher maxima than one. A 0 on the edge of a support, the noise of
    weights that stand still, lies infinitely far away in the unconstrained space: it is tried at the end, and where it is
    better, kept while the others ascend again.

    Args:
        engine: the filter.
        tasks: all tasks; they are read once a step.
        learn: names of hyper-parameters, single numbers inside their supports.
        starts: further values to start from, each naming some of ``learn``; the others start as in ``engine.hypers``.
        optimizer: any optax optimiser; by default Adam, 0.3.
        steps: at most, from each start.
        tolerance: converged when no derivative exceeds so many nats for a unit of the unconstrained space.
        key: as for ``engine.run``, the same in every step.

    Returns:
        The best step of the start that came highest. A FilterWarning says so where its steps did not converge, or its last
        one is wrong.

    Raises:
        ValueError: unknown names, values on the edge of their support, an evidence that is not finite at a start.
    """
    if isinstance(learn, str) or not learn:
        raise ValueError(f"learn is {learn!r}; a sequence of one or more names is accepted")
    if steps < 1:
        raise ValueError(f"steps is {steps}; a whole number >= 1 is accepted")
    if not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance}; a number > 0 is accepted")
    check_known(learn, engine.hypers, "learn")
    listed = listed_tasks(tasks)
    constraints = supports(engine.program, listed[0], engine.hypers)
    maps = {name: biject_to(constraints[name]) for name in learn}
    begin = []
    for start in ({}, *starts):
        if unknown := set(start) - set(learn):
            raise ValueError(f"starts names {sorted(unknown)}; learn names {list(learn)}")
        values = {name: jnp.asarray(start.get(name, value)) for name, value in engine.hypers.items() if name in maps}
        free = {name: maps[name].inv(value.astype(engine.hypers[name].dtype)) for name, value in values.items()}
        for name, value in free.items():
            if not bool(jnp.isfinite(value)):
                raise ValueError(
                    f"learn names {name!r}, which starts at {float(values[name])}, on the edge of its support or outside: "
                    f"{constraints[name]}; a value inside is accepted"
                )
        begin.append(free)
    rule, gradient_of = optax.adam(0.3) if optimizer is None else optimizer, EvidenceGradient(engine)

    def ascend(hypers: Mapping[str, Array], free: Mapping[str, Array]) -> EvidenceMaximum:
        return _ascend(gradient_of, hypers, listed, free, maps, rule, steps, tolerance, key)

    found = max((ascend(engine.hypers, free) for free in begin), key=lambda end: end.log_evidence)
    moving = list(learn)
    for name in learn:
        if bool(constraints[name](0.0)) and not bool(jnp.isfinite(maps[name].inv(jnp.zeros(())))):
            still = found.hypers | {name: jnp.zeros_like(found.hypers[name])}
            reached = engine.with_hypers(still).run(key, listed).log_evidence
            if reached > found.log_evidence:
                moving.remove(name)
                again = ascend(still, {other: maps[other].inv(still[other]) for other in moving})
                found = replace(again, history=found.history + again.history)
    if not found.converged:
        warnings.warn(
            f"the evidence still has a slope of {found.slope:.3g} nats after {len(found.history)} steps: allow more, or a "
            "larger learning rate",
            FilterWarning,
            stacklevel=2,
        )
    if found.unconverged_tasks:
        warnings.warn(
            f"the MAP search of tasks {list(found.unconverged_tasks)} did not end at a minimum, so that the evidence's slope "
            "is wrong there: allow the estimator more steps, or give the units of the network different starts",
            FilterWarning,
            stacklevel=2,
        )
    return found


def _ascend(
    gradient_of: EvidenceGradient,
    others: Mapping[str, Array],
    tasks: list[Task],
    free: Any,  # name -> value
    maps: Mapping[str, Any],
    rule: optax.GradientTransformation,
    steps: int,
    tolerance: float,
    key: Array | int,
) -> EvidenceMaximum:
    """Steps up the evidence from ``free``, values in the unconstrained space; all else stays as in ``others``."""
    state = rule.init(free)
    history, best, slope, found = [], None, float("inf"), None
    for _ in range(steps):
        constrained, pull = jax.vjp(lambda z: {name: maps[name](z[name]) for name in z}, free)
        hypers = dict(others) | {name: v.astype(others[name].dtype) for name, v in constrained.items()}
        found = gradient_of(hypers, tasks, key=key)
        history.append(Iterate({name: float(hypers[name]) for name in free}, found.log_evidence))
        (uphill,) = pull({name: found.gradient[name].astype(v.dtype) for name, v in constrained.items()})
        slope = max((abs(float(part)) for part in uphill.values()), default=0.0)
        if not np.isfinite(found.log_evidence) or not np.isfinite(slope):
            break
        if best is None or found.log_evidence > best[1]:
            best = hypers, found.log_evidence
        if slope < tolerance:
            break
        change, state = rule.update(jax.tree.map(jnp.negative, uphill), state, free)
        free = optax.apply_updates(free, change)
    if best is None or found is None:
        at = {name: float(maps[name](value)) for name, value in free.items()}
        raise ValueError(f"engine: the log evidence is {history[0].log_evidence} at {at}; finite is needed")
    return EvidenceMaximum(best[0], best[1], tuple(history), slope, slope < tolerance, found.unconverged)
