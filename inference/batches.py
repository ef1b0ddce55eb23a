"""Examples of a task in batches of one size, the rest masked: one compiled program whatever the task's length."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ssm_nn.tasks import Task

__all__ = ["batched", "rows", "with_mask"]

Array = Any


def with_mask(task: Task) -> Task:
    """The task with a mask (N,) in any case."""
    return task if task.mask is not None else _made(task.data, task.context, jnp.ones(task.num_examples, bool))


def rows(task: Task, indices: Array) -> Task:
    """The examples at ``indices`` (B,); an index of N or more gives a masked example."""
    masked = with_mask(task)
    inside = indices < masked.mask.shape[0]
    data = jax.tree.map(lambda array: jnp.take(array, indices, axis=0, mode="clip"), masked.data)
    return _made(data, masked.context, jnp.take(masked.mask, indices, mode="clip") & inside)


def batched(task: Task, size: int) -> Task:
    """All examples as (batches, size, ...), the last batch padded under the mask; the context is not repeated."""
    total = task.num_examples
    batches = max(-(-total // size), 1)
    masked = with_mask(task)

    def cut(array: Array) -> Array:
        padding = [(0, batches * size - total)] + [(0, 0)] * (array.ndim - 1)
        return jnp.pad(array, padding).reshape((batches, size, *array.shape[1:]))

    return _made(jax.tree.map(cut, masked.data), masked.context, cut(masked.mask))


def one_batch(batches: Task, data: Any, mask: Array) -> Task:
    """A batch met in a scan over ``batches``."""
    return _made(data, batches.context, mask)


def single(task: Task, data: Any, mask: Array) -> Task:
    """One example, met in a vmap, as a task of length 1."""
    return _made(jax.tree.map(lambda a: a[None], data), task.context, mask[None])


def _made(data: Any, context: Any, mask: Any) -> Task:
    return Task.tree_unflatten(None, (data, context, mask))
