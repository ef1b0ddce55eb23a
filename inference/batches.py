"""Examples of a task in batches of one size, the rest masked: one compiled program whatever the task's length."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ssm_nn.tasks import Task

__all__ = [
    "as_arrays",
    "batched",
    "counted_copies",
    "index_batches",
    "one_batch",
    "rows",
    "single",
    "some_examples",
    "with_mask",
    "without_masked",
]

Array = Any


def as_arrays(task: Task) -> Task:
    """The task with every leaf on the device."""
    return jax.tree.map(jnp.asarray, task)


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
        # copies of an example, not zeros: a zero may be no scale, and 0 times its infinite gradient is nan
        copies = jnp.pad(array, padding, mode="edge" if total else "constant")
        return copies.reshape((batches, size, *array.shape[1:]))

    counted = jnp.pad(masked.mask, (0, batches * size - total)).reshape(batches, size)
    return _made(jax.tree.map(cut, masked.data), masked.context, counted)


def without_masked(task: Task) -> Task:
    """The task with a counted example in the place of each masked one; no data if none counts.

    What stands under a mask may be anything. In a gradient nan would survive its weight of 0.
    """
    if task.data and (not task.num_examples or (task.mask is not None and not bool(jnp.any(task.mask)))):
        return Task({}, task.context)
    return task if task.mask is None or not task.data else counted_copies(task)


def counted_copies(task: Task) -> Task:
    """With a mask, and the first counted example in the place of each masked one; may be traced."""
    task = with_mask(task)
    source = jnp.where(task.mask, jnp.arange(task.mask.shape[0]), jnp.argmax(task.mask))
    return _made(jax.tree.map(lambda array: jnp.take(array, source, axis=0), task.data), task.context, task.mask)


def some_examples(key: Array, task: Task, most: int) -> tuple[Array, Array]:
    """Indices of at most ``most`` examples (n,), drawn without replacement where there are more, and how many count."""
    total = task.num_examples
    chosen = jnp.arange(total)
    if total > most:
        chosen = jax.random.permutation(key, total)[:most]
    return chosen, jnp.maximum(jnp.sum(jnp.take(task.mask, chosen)), 1)


def index_batches(indices: Array, size: int, total: int) -> Array:
    """(batches, size) of ``indices`` (n,), the rest filled with ``total``, which ``rows`` turns into masked examples."""
    batches = max(-(-indices.shape[0] // size), 1)
    filling = jnp.full(batches * size - indices.shape[0], total, indices.dtype)
    return jnp.concatenate([indices, filling]).reshape(batches, size)


def one_batch(batches: Task, data: Any, mask: Array) -> Task:
    """A batch met in a scan over ``batches``."""
    return _made(data, batches.context, mask)


def single(task: Task, data: Any, mask: Array) -> Task:
    """One example, met in a vmap, as a task of length 1."""
    return _made(jax.tree.map(lambda a: a[None], data), task.context, mask[None])


def _made(data: Any, context: Any, mask: Any) -> Task:
    return Task.tree_unflatten(None, (data, context, mask))
