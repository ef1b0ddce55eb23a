"""A task made ready: checked, as arrays with a mask, as long as a whole number of batches."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax

from ssm_nn.extraction import Layout, Program, describe, extract
from ssm_nn.inference.batches import as_arrays, batched, with_mask, without_masked
from ssm_nn.inference.checks import check_support, check_task
from ssm_nn.tasks import Task, as_task

__all__ = ["ready"]

Array = Any


def ready(program: Program, hypers: Any, wanted: Layout, step: int, size: int, task: Task | Mapping[str, Any]) -> Task:
    """The task for training in batches of ``size``; few lengths, so that little is compiled.

    Raises:
        ValueError: no data, data that are not finite or not in the support, weights of other shapes than ``wanted``.
    """
    task = as_arrays(as_task(task))
    check_task(task)
    task = without_masked(task)
    if not task.data:
        raise ValueError("the task has no data: there is nothing to learn of its weights")
    for here, first in zip(describe(program, task, hypers).sites, wanted.sites, strict=True):
        if here.shape != first.shape:
            raise ValueError(
                f"the weights {here.name} have shape {here.shape} in task {step}, and {first.shape} before: a head keeps its "
                "size; give every task the largest and mask the outputs that it has not"
            )
    task = with_mask(task)
    for name, fine in _supported(program, hypers, task).items():
        if not bool(fine):
            raise ValueError(f"the values observed at {name!r} lie outside the likelihood's support")
    if task.num_examples % size == 0:
        return task
    cut = batched(task, size)
    data, mask = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), (cut.data, cut.mask))
    return Task(data, task.context, mask)


@partial(jax.jit, static_argnums=0)
def _supported(program: Program, hypers: Any, task: Task) -> dict[str, Array]:
    return check_support(extract(program, task, hypers), task)
