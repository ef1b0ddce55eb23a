"""What is kept of the tasks, and what it takes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ssm_nn.inference.perturbation.blocks import Factors

__all__ = ["PerturbationState", "Storage", "TaskRecord", "UpdateInfo", "record_numbers"]

Array = Any


class TaskRecord(NamedTuple):
    """One task.

    Attributes:
        identity: its number, by which it is asked for.
        own: its own leaves (biases, normalisers, head), network -> path -> leaf.
        factors: one perturbation a block, unpadded; none for the first task, whose kernels are the base.
    """

    identity: int
    own: Any
    factors: tuple[Factors, ...]


class PerturbationState(NamedTuple):
    """All tasks so far.

    Attributes:
        step: number of tasks so far.
        key: of all random choices, each task's by its identity.
        base: the shared kernels, network -> path -> leaf.
        precision: of the base where it is uncertain, leaf by leaf; else None.
        records: one a task, in the order in which they came.
    """

    step: int
    key: Array
    base: Any
    precision: Any
    records: tuple[TaskRecord, ...]

    def record(self, identity: int) -> TaskRecord:
        """The task's.

        Raises:
            ValueError: for a task that was never learnt.
        """
        for record in self.records:
            if record.identity == identity:
                return record
        raise ValueError(
            f"task identity {identity} was never seen: there are weights for {[r.identity for r in self.records]}"
        )


class Storage(NamedTuple):
    """Numbers kept: of the first task, and by each task after it (those of its own leaves, scales, and factors)."""

    base: int
    by_task: tuple[float, ...]

    @property
    def growth(self) -> float:
        """What the later tasks add, as a share of the first: 0.6 is 60 %."""
        return float(sum(self.by_task)) / self.base


class UpdateInfo(NamedTuple):
    """What one update says of itself.

    Attributes:
        identity: of the task.
        ranks: directions kept in each layer, by name; none for the first task.
        keep, scores: the choice among all directions, and what it was made of; None for the first task.
        predicted_change: of the mean loss by dropping the rest, nats; nan where the allocation reads no curvature.
        objective: mean objective of the last epoch, nats of the whole task.
        status: of the last fit, a code of ``ssm_nn.inference.map_problem``.
        pruned: entries of factors set to zero.
        storage: after the task.
        seconds: wall time by phase.
    """

    identity: int
    ranks: dict[str, int]
    keep: np.ndarray | None
    scores: Any
    predicted_change: float
    objective: float
    status: int
    pruned: int
    storage: Storage
    seconds: dict[str, float]


def record_numbers(record: TaskRecord) -> float:
    """Numbers that a task keeps: own leaves, scales, and factors' entries that are not zero.

    Factors with zeros are kept as their other entries and one bit an entry that says which: a 32nd of a number.
    """
    numbers: float = sum(int(np.size(leaf)) for leaves in record.own.values() for leaf in leaves.values())
    for f in record.factors:
        entries = np.size(f.left) + np.size(f.right)
        filled = np.count_nonzero(f.left) + np.count_nonzero(f.right)
        numbers += np.size(f.inputs) + np.size(f.outputs)
        numbers += float(entries if filled == entries else min(entries, filled + entries / 32) * (filled > 0))
    return numbers
