"""What a filter is compared with: fine-tuning, which forgets, and joint training, which keeps all the data.

    fine-tuning       theta_t = argmin -log p(D_t | theta) + 1/2 |theta - m_0|^2 / s_0^2,   started at theta_{t-1}
    joint training    theta_t = argmin -log p(D_1 .. D_t | theta) + 1/2 |theta - m_0|^2 / s_0^2

Both are made from a filter, ``FineTuning(engine)``, and minimise its objective by its estimator on its program; only prior and
data differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from ssm_nn.inference.baselines.training import TaskByTask, Training, TrainingState
from ssm_nn.inference.batches import as_arrays
from ssm_nn.inference.beliefs import Belief
from ssm_nn.inference.map_problem import MapResult
from ssm_nn.tasks import Task, Tasks, check_alike, listed_tasks

__all__ = ["FineTuning", "JointTraining", "TrainingState", "join"]

Array = Any


class _UnderThePrior(Training):
    """MAP training under the first task's prior alone; the subclasses say on which data."""

    def init(self, key: Array, task: Task | Mapping[str, Any] | None = None) -> TrainingState:
        """Where training starts: where the filter's first search does.

        Args:
            key: a ``jax.random.key``, or a whole number taken as its seed.
            task: the first task; it gives shapes and is checked.
        """
        return self._begun(key, task)

    def belief(self, state: TrainingState, task: Task | Mapping[str, Any] | None = None) -> Belief:
        """The weights of ``state`` with the prior's precision: these baselines know no other uncertainty."""
        return Belief(state.mean, self._prior(task).precision)

    def _learn(self, state: TrainingState, task: Task) -> tuple[TrainingState, MapResult]:
        key, map_key = jax.random.split(state.key)
        mean, found = self._search(state.mean, self._prior(task), task, map_key)
        return TrainingState(state.step + 1, key, mean), found


class FineTuning(_UnderThePrior, TaskByTask[TrainingState]):
    """Train on each task alone, from the weights of the task before, under the prior of the first task."""


class JointTraining(_UnderThePrior):
    """Train one set of weights on the examples of all tasks so far: the ceiling of a model that does not move.

    The examples of all tasks are joined into one task under the context of the last; a program whose observations read
    the context has no joint task.
    """

    def update(
        self, state: TrainingState, tasks: Tasks | Iterable[Task | Mapping[str, Any] | None], size: int | None = None
    ) -> tuple[TrainingState, MapResult | None]:
        """Train on ``tasks``, all tasks so far, from the weights of ``state``.

        Args:
            state: of ``init`` or of the update before.
            tasks: the tasks from the first to the newest.
            size: pad the joint task under a mask to so many examples: updates of one size compile once.

        Raises:
            ValueError: data that are not finite or outside the likelihood's support, tasks that differ in names, dtypes or
                shapes, a size too small.
        """
        joint = self._checked(join(tasks, size))
        if not joint.data:
            return state._replace(step=state.step + 1), None
        learnt, found = self._learn(state, joint)
        self._warn(state.step, found)
        return learnt, found

    def run(self, key: Array, tasks: Tasks | Iterable[Task | Mapping[str, Any] | None]) -> tuple[Belief, ...]:
        """One Belief a task, each trained on all tasks up to it."""
        listed = listed_tasks(tasks)
        size = sum(task.num_examples for task in listed)
        state, beliefs = None, []
        for t, task in enumerate(listed):
            state = self.init(key, task) if state is None else state
            state, _ = self.update(state, listed[: t + 1], size)
            beliefs.append(self.belief(state, task))
        return tuple(beliefs)


def join(tasks: Tasks | Iterable[Task | Mapping[str, Any] | None], size: int | None = None) -> Task:
    """The examples of all tasks as one task, padded with masked zeros to ``size``; the context is the last task's."""
    listed = listed_tasks(tasks)
    check_alike(listed)
    total = sum(task.num_examples for task in listed)
    size = total if size is None else size
    if size < total:
        raise ValueError(f"size is {size}, but the tasks have {total} examples; at least as many are accepted")
    with_data = [task for task in listed if task.data]
    if not with_data:
        return Task({}, listed[-1].context)
    masks = [np.ones(task.num_examples, bool) if task.mask is None else task.mask for task in with_data]
    data = {name: _padded([task[name] for task in with_data], size) for name in with_data[0]}
    return as_arrays(Task(data, listed[-1].context, _padded(masks, size)))


def _padded(parts: list[Array], size: int) -> np.ndarray:
    # on the host: on the device every length would be compiled for
    joined = np.concatenate([np.asarray(part) for part in parts])
    return np.pad(joined, [(0, size - joined.shape[0])] + [(0, 0)] * (joined.ndim - 1))
