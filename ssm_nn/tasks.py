"""One task, and a stack of tasks.

A task is a mapping of arrays with the examples on the leading axis, (N, ...), and a context: whatever belongs to the task
as a whole (its angle, its permutation, the time since the last task). A stack holds T tasks of one size, (T, N, ...);
where tasks differ in size it carries a mask (T, N) that is false on the padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Task", "Tasks", "as_task", "each_task", "listed_tasks", "stack_tasks"]


class _Arrays(Mapping[str, Any]):
    """A read-only mapping of arrays beside a context and an optional mask; a pytree."""

    __slots__ = ("context", "data", "mask")

    def __init__(self, data: Mapping[str, Any], context: Mapping[str, Any] | None = None, mask: Any = None):
        self.data = dict(data)
        self.context = dict(context or {})
        self.mask = mask

    def __getitem__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError:
            raise KeyError(f"this task has no {name!r}; it has {sorted(self.data)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        return ((key("data"), self.data), (key("context"), self.context), (key("mask"), self.mask)), None

    @classmethod
    def tree_unflatten(cls, _, children):
        made = object.__new__(cls)
        made.data, made.context, made.mask = children
        return made

    def __repr__(self) -> str:
        shapes = {name: getattr(value, "shape", value) for name, value in self.data.items()}
        return f"{type(self).__name__}({shapes}, context={sorted(self.context)})"


@jax.tree_util.register_pytree_with_keys_class
class Task(_Arrays):
    """One task: ``task["x"]`` of shape (N, ...), ``task.context["angle"]``, ``task.mask`` (N,) or None.

    Args:
        data: arrays with the examples on the leading axis, all of one length N. An empty mapping is a task without
            data: the engines predict, and the smoother fills it in.
        context: what belongs to the task as a whole.
        mask: (N,) booleans, false for examples that do not count.
    """

    __slots__ = ()

    def __init__(
        self, data: Mapping[str, Any] | None = None, context: Mapping[str, Any] | None = None, mask: Any = None
    ):
        super().__init__(data or {}, context, mask)
        lengths = {name: np.shape(value)[0] if np.ndim(value) else None for name, value in self.data.items()}
        if None in lengths.values():
            scalar = next(name for name, length in lengths.items() if length is None)
            raise ValueError(
                f"data[{scalar!r}] is a scalar; every array of a task has its examples on the leading axis "
                "(what belongs to the task as a whole goes into its context)"
            )
        if len(set(lengths.values())) > 1:
            raise ValueError(f"data: the arrays of a task must have one length, not {lengths}")
        if mask is not None and self.data and np.shape(mask) != (self.num_examples,):
            raise ValueError(f"mask has shape {np.shape(mask)}, but the task has {self.num_examples} examples")

    @property
    def num_examples(self) -> int:
        """N, padding included; 0 for a task without data."""
        return next((np.shape(value)[0] for value in self.data.values()), 0)


@jax.tree_util.register_pytree_with_keys_class
class Tasks(_Arrays):
    """A stack of T tasks: ``tasks["x"]`` of shape (T, N, ...), ``len(tasks)`` is T, ``tasks.at(t)`` is task t.

    The program receives it; as a pytree it passes through NUTS, SVI, ``jit`` and ``vmap``. Made by ``stack_tasks``.
    """

    __slots__ = ()

    def __len__(self) -> int:
        for leaf in jax.tree.leaves((self.data, self.context, self.mask)):
            return leaf.shape[0]
        return 0

    def at(self, t: int) -> Task:
        """Task ``t``, its padding still masked."""
        if not -len(self) <= t < len(self):
            raise IndexError(f"t = {t}, but there are {len(self)} tasks")
        data, context, mask = jax.tree.map(lambda leaf: leaf[t], (self.data, self.context, self.mask))
        return Task(data, context, mask)

    def without(self, *names: str) -> Tasks:
        """The same tasks without the arrays ``names``, for example the labels that ``Predictive`` is to draw."""
        return Tasks({k: v for k, v in self.data.items() if k not in names}, self.context, self.mask)


def as_task(task: Task | Mapping[str, Any] | None) -> Task:
    """A mapping or None (a task without data) as a Task."""
    if task is None:
        return Task()
    if isinstance(task, Task):
        return task
    if isinstance(task, Tasks):
        raise ValueError("this is a stack of tasks, where one task is needed: take one with tasks.at(t)")
    if isinstance(task, Mapping):
        return Task(task)
    raise ValueError(f"a task is a Task, a mapping of arrays or None, not {type(task).__name__}")


def each_task(tasks: Tasks | Iterable[Task | Mapping[str, Any] | None]) -> Iterator[Task]:
    """The tasks of a stack, a list or any iterator, one at a time.

    Raises:
        ValueError: for one task in the place of several, or none at all.
    """
    if not isinstance(tasks, Iterable) or (isinstance(tasks, Mapping) and not isinstance(tasks, Tasks)):
        kind = "a mapping" if isinstance(tasks, Mapping) else f"of type {type(tasks).__name__}"
        raise ValueError(f"tasks is {kind}; a stack made by stack_tasks, a list or an iterator of tasks is accepted")
    empty = True
    for task in (tasks.at(t) for t in range(len(tasks))) if isinstance(tasks, Tasks) else tasks:
        empty = False
        yield as_task(task)
    if empty:
        raise ValueError("tasks is empty; at least one task is needed")


def listed_tasks(tasks: Tasks | Iterable[Task | Mapping[str, Any] | None], at_least: int = 1) -> list[Task]:
    """Tasks that are to be read many times.

    Raises:
        ValueError: for fewer than ``at_least``.
    """
    listed = list(each_task(tasks))
    if len(listed) < at_least:
        raise ValueError(f"tasks has {len(listed)} tasks; at least {at_least} are needed")
    return listed


@overload
def stack_tasks(tasks: Tasks) -> Tasks: ...
@overload
def stack_tasks(tasks: Iterable[Task | Mapping[str, Any]]) -> Tasks: ...
def stack_tasks(tasks):
    """Stack tasks into arrays (T, N, ...), the shorter ones filled with copies of an example under a mask (T, N).

    Copies, not zeros: a zero may lie outside a likelihood's support, and its gradient is not finite even under a mask.

    Raises:
        ValueError: if there is no task, or tasks differ in their names, dtypes or trailing shapes.
    """
    if isinstance(tasks, Tasks):
        return tasks
    listed: Sequence[Task] = [as_task(task) for task in tasks]
    if not listed:
        raise ValueError("tasks is empty; at least one task is needed")
    check_alike(listed)
    longest = max(task.num_examples for task in listed)
    ragged = any(task.num_examples != longest or task.mask is not None for task in listed)
    with_data = next((task for task in listed if task.num_examples), listed[0])

    def padded(task: Task, name: str) -> np.ndarray:
        own = np.asarray((task if task.num_examples else with_data)[name])
        filling = np.repeat(own[:1], longest - (len(own) if task.num_examples else 0), axis=0)
        return np.concatenate([own, filling]) if task.num_examples else filling

    def counted(task: Task) -> np.ndarray:
        row = np.zeros(longest, bool)
        row[: task.num_examples] = True if task.mask is None else task.mask
        return row

    data = {name: jnp.asarray(np.stack([padded(task, name) for task in listed])) for name in with_data}
    context = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *[task.context for task in listed])
    mask = jnp.asarray(np.stack([counted(task) for task in listed])) if ragged else None
    return Tasks(data, context, mask)


def check_alike(tasks: Sequence[Task]) -> None:
    """Raise ValueError unless the tasks agree in names, dtypes, trailing shapes and contexts."""
    first = next(((t, task) for t, task in enumerate(tasks) if task.data), None)
    for t, task in enumerate(tasks):
        if sorted(task.context) != sorted(tasks[0].context):
            raise ValueError(f"task {t} has the context {sorted(task.context)}, task 0 has {sorted(tasks[0].context)}")
        if first is None or not task.data:
            continue
        if sorted(task) != sorted(first[1]):
            raise ValueError(f"task {t} has the arrays {sorted(task)}, task {first[0]} has {sorted(first[1])}")
        for name in task:
            here, there = np.asarray(task[name]), np.asarray(first[1][name])
            if here.shape[1:] != there.shape[1:] or here.dtype != there.dtype:
                raise ValueError(
                    f"task {t}: {name!r} holds examples of shape {here.shape[1:]} and dtype {here.dtype}, "
                    f"in task {first[0]} they are {there.shape[1:]} and {there.dtype}"
                )
