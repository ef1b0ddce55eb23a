"""Batches in blocks: what one compiled loop learns at a time, from arrays that are at hand or from any iterator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssm_nn.inference.batches import rows, with_mask
from ssm_nn.inference.checks import check_count
from ssm_nn.tasks import Task, as_task

__all__ = ["Batches", "Block", "blocks_of"]

Array = Any

_MOST_BATCHES = 1024  # of a block: a report every tenth of a second or so
_MOST_EXAMPLES = 8192  # of a block, so that images of an iterator are held by the dozen MiB


class Block(NamedTuple):
    """Batches in a row.

    Attributes:
        task: examples, with a mask.
        indices: (K, B) rows of ``task``; the number of its rows stands for no example.
        count: how many of the K batches are meant, >= 1.
    """

    task: Task
    indices: np.ndarray
    count: int


class Batches:
    """The examples of a task in batches of one size, for one epoch or more; iterating gives Tasks.

    ``MeanFieldFilter.run`` takes the arrays as they are, and puts batches together on the device.

    Args:
        task: arrays with the examples on the leading axis.
        size: examples a batch; the last one of an epoch may hold fewer.
        epochs: passes over the examples.
        seed: of the order, another in every epoch; None keeps the order of the task.
    """

    def __init__(
        self, task: Task | Mapping[str, Any], size: int = 1, *, epochs: int = 1, seed: int | None = None
    ) -> None:
        check_count(size=size, epochs=epochs)
        made = as_task(task)
        if not made.num_examples:
            raise ValueError("task has no examples to learn from")
        self.task = with_mask(jax.tree.map(jnp.asarray, made))
        self.size, self.epochs, self.seed = size, epochs, seed
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.epochs * self._an_epoch

    @property
    def _an_epoch(self) -> int:
        return -(-self.task.num_examples // self.size)

    def __iter__(self) -> Iterator[Task]:
        for number in range(len(self)):
            indices = self.indices(number, number + 1)[0]
            yield rows(self.task, indices[indices < self.task.num_examples])

    def indices(self, start: int, stop: int) -> np.ndarray:
        """(stop - start, size) rows of the batches from ``start`` to ``stop``."""
        numbers = range(start, min(stop, len(self)))
        return np.stack([self._order(n // self._an_epoch)[n % self._an_epoch] for n in numbers])

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            total = self.task.num_examples
            order = np.arange(total, dtype=np.int32)
            if self.seed is not None:
                np.random.default_rng([self.seed, epoch]).shuffle(order)
            filling = np.full(self._an_epoch * self.size - total, total, np.int32)
            self._orders = {epoch: np.concatenate([order, filling]).reshape(-1, self.size)}
        return self._orders[epoch]


def blocks_of(batches: Batches | Iterable[Any], skip: int, until: int | None) -> Iterator[Block]:
    """The batches from number ``skip`` on in blocks, cut where the number of batches is a multiple of ``until``."""
    if isinstance(batches, Batches):
        yield from _of_arrays(batches, skip, until)
    else:
        yield from _of_iterator(iter(batches), skip, until)


def block_length(size: int) -> int:
    """K for batches of ``size``."""
    return max(min(_MOST_BATCHES, _MOST_EXAMPLES // size), 1)


def _of_arrays(batches: Batches, skip: int, until: int | None) -> Iterator[Block]:
    length = min(block_length(batches.size), len(batches))
    start = skip
    while start < len(batches):
        stop = min(start + length, len(batches))
        if until is not None:
            stop = min(stop, (start // until + 1) * until)
        indices = batches.indices(start, stop)
        filling = np.full((length - len(indices), batches.size), batches.task.num_examples, np.int32)
        yield Block(batches.task, np.concatenate([indices, filling]), stop - start)
        start = stop


def _of_iterator(batches: Iterator[Any], skip: int, until: int | None) -> Iterator[Block]:
    """Batches are gathered on the host until the block is full, or the next has a larger batch or another context."""
    waiting: list[Task] = []
    size = 0
    for number, raw in enumerate(batches):
        if number < skip:
            continue
        batch = jax.tree.map(np.asarray, as_task(raw))
        if not batch.num_examples:
            raise ValueError(f"batch {number} has no examples; a mapping of arrays with one or more is accepted")
        if waiting and (batch.num_examples > size or not _same_context(batch, waiting[0])):
            yield _joined(waiting, size)
            waiting = []
        size = max(size, batch.num_examples)
        waiting.append(batch)
        if len(waiting) == block_length(size) or (until is not None and (number + 1) % until == 0):
            yield _joined(waiting, size)
            waiting = []
    if waiting:
        yield _joined(waiting, size)


def _joined(waiting: list[Task], size: int) -> Block:
    length = block_length(size)
    total = length * size
    sizes = np.array([batch.num_examples for batch in waiting])
    ends = np.cumsum(sizes)
    indices = np.full((length, size), total, np.int32)
    for number, (end, count) in enumerate(zip(ends, sizes, strict=True)):
        indices[number, :count] = np.arange(end - count, end)

    def joined(*arrays: np.ndarray) -> np.ndarray:
        whole = np.concatenate(arrays)
        # copies of an example, not zeros: a zero may lie outside a likelihood's support
        return np.concatenate([whole, np.broadcast_to(whole[-1:], (total - len(whole), *whole.shape[1:]))])

    names = sorted(waiting[0])
    for number, batch in enumerate(waiting):
        if sorted(batch) != names:
            raise ValueError(f"a batch has the arrays {sorted(batch)}, one before it in the block had {names}")
        for name in names:
            if batch[name].shape[1:] != waiting[0][name].shape[1:]:
                raise ValueError(
                    f"{name!r} of batch {number} in the block holds examples of shape {batch[name].shape[1:]}, in the first "
                    f"they are {waiting[0][name].shape[1:]}"
                )
    masks = [np.ones(b.num_examples, bool) if b.mask is None else b.mask for b in waiting]
    data = {name: joined(*(batch[name] for batch in waiting)) for name in names}
    return Block(Task(data, waiting[0].context, joined(*masks)), indices, len(waiting))


def _same_context(one: Task, other: Task) -> bool:
    if sorted(one.context) != sorted(other.context):
        return False
    return all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one.context), jax.tree.leaves(other.context), strict=True)
    )
