"""What the methods that a filter is compared with have in common: where they start, what they check, how they go on.

Each is made from a filter, and takes its program, hyper-parameters, power and estimator as they are. The prior of the first
task stands for every task: the kernel is not read.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssm_nn.inference.batches import as_arrays, with_mask, without_masked
from ssm_nn.inference.beliefs import Belief
from ssm_nn.inference.checks import check_task
from ssm_nn.inference.laplace import FilterWarning, LaplaceFilter
from ssm_nn.inference.map_problem import NOT_FINITE, MapProblem, MapResult, all_finite
from ssm_nn.inference.minibatch import Minibatch
from ssm_nn.precision_diagonal import DiagonalPrecision
from ssm_nn.tasks import Task, Tasks, as_task, each_task

__all__ = ["TaskByTask", "Training", "TrainingState"]

Array = Any


class TrainingState(NamedTuple):
    """All that the next task needs of the past.

    Attributes:
        step: number of tasks so far.
        key: of the random choices to come.
        mean: (P,), the weights; before any task, where the first search starts.
    """

    step: Array
    key: Array
    mean: Array


class Training:
    """Weights trained on data under the prior of the first task.

    Args:
        engine: the filter to compare with. Its program, hyper-parameters, power and estimator are taken as they are, and
            so is what it has compiled.
    """

    def __init__(self, engine: LaplaceFilter):
        self.engine = engine

    def _begun(self, key: Array, task: Task | Mapping[str, Any] | None) -> TrainingState:
        """Where training starts: where the filter's first search does."""
        prior = self.engine.init(key, task)
        next_key, start_key = jax.random.split(prior.key)
        _, _, start = self.engine._advance(self.engine.hypers, prior, as_arrays(as_task(task)), start_key)
        return TrainingState(jnp.zeros((), jnp.int32), next_key, prior.mean + start)

    def _prior(self, task: Task | Mapping[str, Any] | None) -> Belief:
        return self.engine._first(self.engine.hypers, as_arrays(as_task(task)))

    def _diagonal_prior(self, task: Task | Mapping[str, Any] | None) -> Belief:
        prior = self._prior(task)
        return Belief(prior.mean, DiagonalPrecision(prior.precision.precision_diagonal()))

    def _checked(self, task: Task | Mapping[str, Any] | None) -> Task:
        """The task as arrays, no data if none counts; ValueError for values that are not finite or not in the support."""
        task = as_arrays(as_task(task))
        check_task(task)
        task = without_masked(task)
        if task.data:
            self.engine._check_values(task)
        return task

    def _problem(self, around: Belief, task: Task) -> MapProblem:
        power = jnp.asarray(self.engine.power, around.mean.dtype)
        return MapProblem(around.mean, around.precision, with_mask(task), self.engine.hypers, power)

    def _search(self, start: Array, around: Belief, task: Task, key: Array) -> tuple[Array, MapResult]:
        """The engine's search from the weights ``start``, under the Gaussian ``around``; ``start`` again if it fails."""
        found = self.engine._estimate(self._problem(around, task), start - around.mean, key)
        if found.status != NOT_FINITE and not bool(all_finite(found.shift)):
            found = found._replace(status=NOT_FINITE)
        return start if found.status == NOT_FINITE else around.mean + found.shift, found

    def _warn(self, step: Array, found: MapResult) -> None:
        if found.status == NOT_FINITE:
            warnings.warn(
                f"task {int(step)}: the training of {type(self).__name__} is not finite, and what was known before is "
                "kept: lower the learning rate or the strength, or look for outliers in the data",
                FilterWarning,
                stacklevel=3,
            )


class TaskByTask[State: NamedTuple](Training, ABC):
    """Training that meets one task at a time, and keeps of it what its state holds."""

    @abstractmethod
    def init(self, key: Array, task: Task | Mapping[str, Any] | None = None) -> State:
        """The state before any task.

        Args:
            key: a ``jax.random.key``, or a whole number taken as its seed.
            task: the first task; it gives shapes and is checked.
        """

    @abstractmethod
    def belief(self, state: State, task: Task | Mapping[str, Any] | None = None) -> Belief:
        """The belief over the weights that stands in ``state``."""

    @abstractmethod
    def _learn(self, state: State, task: Task) -> tuple[State, MapResult]:
        """One task that has data and was checked."""

    def update(self, state: State, task: Task | Mapping[str, Any] | None) -> tuple[State, MapResult | None]:
        """One task. Without data it changes nothing and gives None; training that fails warns and keeps what was known.

        Raises:
            ValueError: for data that are not finite, or outside the likelihood's support.
        """
        task = self._checked(task)
        waited: Any = state
        if not task.data:
            return waited._replace(step=waited.step + 1), None
        learnt, found = self._learn(state, task)
        self._warn(waited.step, found)
        return learnt, found

    def run(self, key: Array, tasks: Tasks | Iterable[Task | Mapping[str, Any] | None]) -> tuple[Belief, ...]:
        """One Belief a task, as ``init`` and the ``update``s give them."""
        state, beliefs = None, []
        for task in each_task(tasks):
            state = self.init(key, task) if state is None else state
            state, _ = self.update(state, task)
            beliefs.append(self.belief(state, task))
        return tuple(beliefs)


def minibatch_of(engine: LaplaceFilter, minibatch: Minibatch | None, owner: str) -> Minibatch:
    """The settings given, or the engine's; ValueError where neither are mini-batches."""
    chosen = engine.estimator if minibatch is None else minibatch
    if not isinstance(chosen, Minibatch):
        name = "the engine's estimator" if minibatch is None else "minibatch"
        raise ValueError(
            f"{name} is {type(chosen).__name__}, but {owner} trains in mini-batches: give it minibatch=Minibatch(...), or an "
            "engine whose estimator is one"
        )
    return chosen
