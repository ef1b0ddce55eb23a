"""What the next task may spend under a growth limit, and what it keeps when entries are cut."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np

from ssm_nn.inference.perturbation.pruning import Growth, Pruning
from ssm_nn.inference.perturbation.reading import Reading
from ssm_nn.inference.perturbation.state import PerturbationState, TaskRecord, record_numbers

__all__ = ["Spending", "base_numbers", "least_numbers"]


def base_numbers(state: PerturbationState) -> int:
    """Numbers of the first task, and of what is known of an uncertain base."""
    first = state.base, state.precision, state.records[0].own
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(first))


def least_numbers(reading: Reading) -> int:
    """Numbers of a task at rank 0: own leaves and scales."""
    own = sum(int(np.size(leaf)) for leaf in jax.tree.leaves(reading.own(reading.initial)))
    return own + sum(block.cost for block in reading.blocks)


@dataclass(frozen=True)
class Spending:
    """A limit, if there is one, and what is cut."""

    growth: Growth | None
    pruning: Pruning | None

    def check(self, reading: Reading) -> None:
        """Raise ValueError for a limit that cannot hold all tasks at rank 0."""
        if self.growth is not None and self.growth.num_tasks is not None:
            least, later = least_numbers(reading), self.growth.num_tasks - 1
            self.growth.room(reading.layout.size, (later - 1) * least, later, least)

    def room(self, reading: Reading, state: PerturbationState) -> int | None:
        """Numbers that the next task may spend on directions; None where nothing limits it.

        Raises:
            ValueError: for less than nothing.
        """
        if self.growth is None:
            return None
        least = least_numbers(reading)
        spent = sum(record_numbers(r) for r in state.records[1:])
        if self.pruning is not None and self.pruning.cuts_earlier:
            spent = least * (len(state.records) - 1)
        return self.growth.room(reading.layout.size, spent, state.step, least) - least

    def budget(self, room: int | None) -> int | None:
        """Numbers that an allocation may spend: the room, or so much more as the pruning cuts again."""
        if self.pruning is None or room is None:
            return room
        return None if self.pruning.spread is None else int(self.pruning.spread * room)

    def pruned(
        self, reading: Reading, state: PerturbationState, record: TaskRecord
    ) -> tuple[tuple[TaskRecord, ...], int]:
        """All tasks' records with the newest, within the limit, and the number of entries cut."""
        records, room = (*state.records, record), self.room(reading, state)
        if self.pruning is None or self.growth is None or room is None:
            return records, 0
        allowed = self.growth.limit * base_numbers(state)
        return self.pruning.prune(records, allowed, room + least_numbers(reading))
