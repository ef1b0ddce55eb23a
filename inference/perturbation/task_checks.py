"""A task made ready: checked, as arrays with a mask, as long as a whole number of batches; and whose it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import numpy as np

from ssm_nn.extraction import Layout, Program, describe, extract
from ssm_nn.inference.batches import as_arrays, batched, with_mask, without_masked
from ssm_nn.inference.checks import check_support, check_task
from ssm_nn.tasks import Task, as_task

__all__ = ["arrays_of", "check_place", "identity_of", "key_of", "ready", "runnable"]

Array = Any


def arrays_of(task: Task | Mapping[str, Any] | None) -> Task:
    """The task as arrays on the device.

    Raises:
        ValueError: for what is no number, such as strings.
    """
    task = as_task(task)
    try:
        return as_arrays(task)
    except TypeError as error:
        raise ValueError(f"the task holds {_words(task)}; arrays of numbers are accepted") from error


def identity_of(value: Any, argument: str = "the context's 'task'") -> int:
    """A task's identity as a whole number.

    Raises:
        ValueError: for anything else.
    """
    try:
        number = np.asarray(value).item()
        if int(number) == number and not isinstance(number, bool | str):
            return int(number)
    except (TypeError, ValueError, OverflowError):  # no number, several, or infinite
        pass
    raise ValueError(f"{argument} is {value!r}; one whole number, a task's identity, is accepted")


def key_of(key: Any) -> Array:
    """A ``jax.random.key``, of a whole number as its seed; ValueError for anything else."""
    key = jax.random.key(key) if isinstance(key, int) else key
    if not isinstance(key, jax.Array):
        raise ValueError(f"key is {key!r}; a jax.random.key is accepted, or a whole number")
    return key


def check_place(folder: Any, number: int, kept: int, found: int) -> None:
    """Raise ValueError where the task of this number is not the one that a folder has in its place."""
    if kept != found:
        raise ValueError(
            f"folder is {str(folder)!r}, where task {number} has the identity {kept}; here it has {found}: give the tasks in "
            "the order in which they were learnt, or another folder"
        )


@contextmanager
def runnable(task: Task, first: Task | None) -> Iterator[None]:
    """Turns what JAX says of a program that cannot be run on a task into a sentence about the task.

    Args:
        task: on which the program is run.
        first: that gave the network's shapes; None where it is ``task``.

    Raises:
        ValueError: for an error of shapes or types inside, naming the task's arrays.
    """
    try:
        yield
    except (TypeError, ValueError, KeyError, IndexError) as error:
        unlike = "" if first is None else _difference(task, first)
        if isinstance(error, ValueError) and not unlike:
            raise  # says what it is about
        told = error.args[0] if isinstance(error, KeyError) else str(error).split("\n")[0]
        raise ValueError(f"the program cannot be run on a task with {_words(task)}{unlike}: {told}") from error


def _difference(task: Task, first: Task) -> str:
    """What is not as in the first task, but for the number of examples."""
    here, there = ({n: (np.shape(a)[1:], _kind(a)) for n, a in t.data.items()} for t in (task, first))
    same = here.keys() <= there.keys() and all(here[name] == there[name] for name in here)
    others = {name: np.shape(a) for name, a in first.context.items()}
    same = same and {name: np.shape(a) for name, a in task.context.items()} == others
    return "" if same else f" (the first had {_words(first)})"


def _kind(array: Any) -> str:
    return np.dtype(getattr(array, "dtype", type(array))).kind


def _words(task: Task) -> str:
    parts = [
        f"{name!r} (N, {', '.join(map(str, np.shape(a)[1:]))})".replace(", )", ",)") for name, a in task.data.items()
    ]
    parts += [f"the context's {name!r} {np.shape(a)}" for name, a in task.context.items()]
    types = [str(np.asarray(a).dtype) for a in [*task.data.values(), *task.context.values()]]
    return ", ".join(f"{part} {kind}" for part, kind in zip(parts, types, strict=True)) or "no arrays"


def ready(program: Program, hypers: Any, wanted: Layout, first: Task, step: int, size: int, task: Task) -> Task:
    """The task for training in batches of ``size``; few lengths, so that little is compiled.

    Raises:
        ValueError: no data, data that are not finite or not in the support, weights of other shapes than ``wanted``, arrays
            on which the program cannot be run as on ``first``.
    """
    check_task(task)
    task = without_masked(task)
    if not task.data:
        raise ValueError("the task has no data: there is nothing to learn of its weights")
    with runnable(task, first):
        sites = describe(program, task, hypers).sites
    for here, before in zip(sites, wanted.sites, strict=True):
        if here.shape != before.shape:
            raise ValueError(
                f"the weights {here.name} have shape {here.shape} in task {step}, and {before.shape} before: a head keeps "
                "its size; give every task the largest and mask the outputs that it has not"
            )
    task = with_mask(task)
    with runnable(task, first):
        supported = _supported(program, hypers, task)
    for name, fine in supported.items():
        if not bool(fine):
            raise ValueError(f"the values observed at {name!r} lie outside the likelihood's support")
    if task.num_examples % size == 0:
        return task
    cut = batched(task, size)
    data, mask = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), (cut.data, cut.mask))
    return Task(data, task.context, mask)


@partial(jax.jit, static_argnums=0)
def _supported(program: Program, hypers: Any, task: Task) -> dict[str, Array]:
    space = extract(program, task, hypers)
    space.log_likelihood_at(
        space.layout.arrays(space.initial), task
    )  # traced, not computed: labels of a wrong type end here
    return check_support(space, task)
