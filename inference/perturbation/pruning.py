"""A budget for what tasks may add, and what is cut when it is exceeded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ssm_nn.inference.checks import check_finite, is_finite
from ssm_nn.inference.minibatch import Minibatch
from ssm_nn.inference.perturbation.state import TaskRecord, record_numbers

__all__ = ["AllTasks", "Growth", "OwnTask", "Pruning"]


@dataclass(frozen=True)
class Growth:
    """The later tasks together add at most ``limit`` times the numbers of the first.

    What a task leaves over is the next one's: task t of T - 1 may fill the budget up to t / (T - 1).

    Args:
        limit: 0.6 is 60 %.
        num_tasks: T, the first task counted; None lets any task take all that is left.
    """

    limit: float
    num_tasks: int | None = None

    def __post_init__(self):
        if not (is_finite(self.limit) and self.limit > 0):
            raise ValueError(f"limit is {self.limit!r}; a share > 0 is accepted, 0.6 for 60 %")
        if self.num_tasks is not None and (not isinstance(self.num_tasks, int) or self.num_tasks < 2):
            raise ValueError(f"num_tasks is {self.num_tasks!r}; a whole number >= 2 is accepted, or None")

    def room(self, base: int, spent: float, step: int, least: int) -> int:
        """Numbers that task ``step`` >= 1 may keep.

        Raises:
            ValueError: if that is less than ``least``, what a task takes at rank 0; it says which limit would do.
        """
        share = 1.0 if self.num_tasks is None else min(step / (self.num_tasks - 1), 1.0)
        room = int(self.limit * base * share - spent)
        if room < least:
            needed = (spent + least) / (base * share)
            raise ValueError(
                f"the growth limit is {self.limit:g}, which leaves task {step} {max(room, 0)} numbers, but at rank 0 it "
                f"takes {least} (own leaves and scales); the minimum is {np.ceil(needed * 1e4) / 1e4:g}"
            )
        return room


class Pruning(Protocol):
    """Which entries of U and V go when the budget is exceeded; hashable."""

    @property
    def cuts_earlier(self) -> bool:
        """Whether earlier tasks make room."""
        ...

    @property
    def spread(self) -> float | None:
        """How often the room for directions an allocation may fill before the cut; None lets it choose freely."""
        ...

    @property
    def refit(self) -> Minibatch | None:
        """How the newest task's other entries are fitted again after the cut; None leaves them as they are."""
        ...

    def prune(self, records: tuple[TaskRecord, ...], allowed: float, room: float) -> tuple[tuple[TaskRecord, ...], int]:
        """The records, the last of which is new, and the number of entries cut.

        Args:
            records: of all tasks.
            allowed: numbers for all but the first together.
            room: numbers for the newest.
        """
        ...


@dataclass(frozen=True)
class OwnTask:
    """The smallest entries of the newest task's factors: nothing else changes.

    More directions than there is room for, each with fewer entries, say more than few whole ones where inputs are
    sparse: ``OwnTask(2.0, refit=Minibatch(...))``.

    Args:
        spread: the allocation may fill so often the room for directions, >= 1; None lets it choose freely.
        refit: optimiser and epochs with which the entries that are left are fitted again; None leaves them as they are.
    """

    spread: float | None = None
    refit: Minibatch | None = None

    cuts_earlier = False

    def __post_init__(self):
        if self.spread is not None:
            check_finite(1.0, spread=self.spread)
        if self.refit is not None and not isinstance(self.refit, Minibatch):
            raise ValueError(f"refit is {self.refit!r}; a Minibatch is accepted, or None")

    def prune(self, records: tuple[TaskRecord, ...], allowed: float, room: float) -> tuple[tuple[TaskRecord, ...], int]:
        """Until the newest task fits into its own room."""
        del allowed
        pruned, cut = _smallest((records[-1],), lambda r: record_numbers(r[0]) <= room)
        return (*records[:-1], *pruned), cut


@dataclass(frozen=True)
class AllTasks:
    """The smallest entries of all tasks' factors, the paper's rule: earlier tasks lose something too."""

    cuts_earlier, spread, refit = True, None, None

    def prune(self, records: tuple[TaskRecord, ...], allowed: float, room: float) -> tuple[tuple[TaskRecord, ...], int]:
        """Until all later tasks fit together."""
        del room
        pruned, cut = _smallest(records[1:], lambda rs: sum(map(record_numbers, rs)) <= allowed)
        return (*records[:1], *pruned), cut


def _smallest(
    records: tuple[TaskRecord, ...], fits: Callable[[tuple[TaskRecord, ...]], bool]
) -> tuple[tuple[TaskRecord, ...], int]:
    """Zero the smallest entries in magnitude, as few as needed, by bisection on their number."""
    if fits(records):
        return records, 0
    entries = [np.abs(np.concatenate([f.left.ravel(), f.right.ravel()])) for r in records for f in r.factors]
    values = np.sort(np.concatenate([e[e > 0] for e in entries]))
    low, high = 0, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(_below(records, values[middle - 1])) else (middle, high)
    return _below(records, values[high - 1]), high


def _below(records: tuple[TaskRecord, ...], level: float) -> tuple[TaskRecord, ...]:
    def cut(array: np.ndarray) -> np.ndarray:
        return np.where(np.abs(array) <= level, np.zeros((), array.dtype), array)

    return tuple(
        r._replace(factors=tuple(f._replace(left=cut(f.left), right=cut(f.right)) for f in r.factors)) for r in records
    )
