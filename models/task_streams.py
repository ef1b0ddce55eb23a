"""A stream of tasks, made when they are asked for; streams with data taken out, and with tasks that come again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, overload

import numpy as np

from ssm_nn.tasks import Task

__all__ = ["LazyTasks", "TaskStream", "repeating", "without"]


class LazyTasks(Sequence[Task]):
    """Tasks 0 ... T - 1, each made when it is asked for.

    Args:
        make: task number -> Task; called once more each time a task is asked for, unless ``keep``.
        num_tasks: T.
        keep: hold on to tasks once they are made.
    """

    def __init__(self, make: Callable[[int], Task], num_tasks: int, keep: bool = False):
        self._make = cache(make) if keep else make
        self._num_tasks = num_tasks

    def __len__(self) -> int:
        return self._num_tasks

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> list[Task]: ...
    def __getitem__(self, index: int | slice) -> Task | list[Task]:
        if isinstance(index, slice):
            return [self._make(t) for t in range(self._num_tasks)[index]]
        try:
            return self._make(range(self._num_tasks)[index])
        except IndexError:
            raise IndexError(f"task {index} was asked for, but there are {self._num_tasks} tasks") from None


@dataclass(frozen=True, eq=False)
class TaskStream:
    """A stream of T tasks.

    Attributes:
        name: ``"rotated digits"`` for example.
        train: T tasks, made when they are asked for.
        test: T tasks of examples that no training task holds, kept once they are made.
        num_classes: labels are 0 ... num_classes - 1; None where the targets are numbers.
        input_shape: shape of one input, (D,) where images are flattened.
        settings: the arguments that made the stream, as numbers, strings, booleans, lists and None.
    """

    name: str
    train: Sequence[Task]
    test: Sequence[Task]
    num_classes: int | None
    input_shape: tuple[int, ...]
    settings: dict[str, Any]

    def __len__(self) -> int:
        return len(self.train)


def without(stream: TaskStream, tasks: Sequence[int]) -> TaskStream:
    """The same stream with the training data of some tasks taken out, to be filled in by a smoother.

    A task without data keeps its place and its context (its angle, its time, its permutation), holds no arrays, and
    its test task stays as it was.

    Args:
        stream: T tasks.
        tasks: positions in the stream, 0 ... T - 1, each at most once; not all of them.

    Raises:
        ValueError: a position outside the stream or named twice, no task left with data.
    """
    missing = [int(t) for t in tasks]
    if len(set(missing)) < len(missing) or not set(missing) < set(range(len(stream))):
        raise ValueError(
            f"tasks is {list(tasks)}; different numbers among 0 ... {len(stream) - 1} are accepted, but not all of them"
        )

    def train(t: int) -> Task:
        task = stream.train[t]
        return Task({}, task.context) if t in missing else task

    settings = stream.settings | {"without": sorted(missing)}
    return replace(stream, train=LazyTasks(train, len(stream)), settings=settings)


def repeating(stream: TaskStream, visits: Sequence[int]) -> TaskStream:
    """The tasks of a stream in a given order in which they may come again: ``visits = [0, 1, 0, 2, 1]``.

    The training examples of a task are dealt out over its visits in their order, as evenly as can be, so that no
    example is counted twice; a task that is visited once keeps all of its own. A visit is tested on the test task.

    Args:
        stream: K base tasks. Contexts that carry the step from the task before as "permutation" (``permuted``,
            ``relabelled``) get that of the step from the visit before; a "gap" in time is refused.
        visits: numbers of base tasks, 0 ... K - 1, one or more; some may not come at all.

    Returns:
        A stream of len(visits) tasks, in whose contexts "task" is the number of the base task (its position in
        ``stream``), int32.

    Raises:
        ValueError: a visit outside the stream, none at all, more visits to a task than it has training examples, tasks
            with gaps.
    """
    order = [int(k) for k in visits]
    if not order or not set(order) <= set(range(len(stream))):
        raise ValueError(f"visits is {list(visits)}; numbers among 0 ... {len(stream) - 1} are accepted, one or more")
    contexts = [stream.test[k].context for k in range(len(stream))]
    if any("gap" in context for context in contexts):
        raise ValueError("stream has tasks with a gap since the task before, which a task that comes again has not")
    reached: list[np.ndarray] = []  # the permutation of each base task relative to the first of them
    for context in contexts:
        step = context.get("permutation")
        if step is not None:
            reached.append(reached[-1][step] if reached else np.arange(len(step), dtype=step.dtype))

    def context_at(t: int) -> dict[str, Any]:
        context = contexts[order[t]] | {"task": np.int32(order[t])}
        if reached:
            here, before = reached[order[t]], reached[order[max(t - 1, 0)]]
            context["permutation"] = np.argsort(before)[here].astype(here.dtype)
        return context

    def train(t: int) -> Task:
        task, k = stream.train[order[t]], order[t]
        times, number = order.count(k), order[:t].count(k)
        if 0 < task.num_examples < times:
            raise ValueError(f"visits has {times} to task {k}, which has {task.num_examples} training examples")
        start, stop = (task.num_examples * n // times for n in (number, number + 1))
        mask = None if task.mask is None else task.mask[start:stop]
        return Task({name: task[name][start:stop] for name in task}, context_at(t), mask)

    def test(t: int) -> Task:
        task = stream.test[order[t]]
        return Task(task.data, context_at(t), task.mask)

    return replace(
        stream,
        name=f"repeating {stream.name}",
        train=LazyTasks(train, len(order)),
        test=LazyTasks(test, len(order), keep=True),
        settings=stream.settings | {"visits": order},
    )
