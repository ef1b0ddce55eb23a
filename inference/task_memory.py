"""A new task or a known one: a belief for each task met so far, and which of them a batch of data belongs to.

    p(j | D)    proportional to  (1 - novelty) / J  Z_j     task j of J, Z_j the evidence of the batch from its belief
    p(new | D)  proportional to  novelty  Z_new             from the prior, or from a kernel that frees the weights

The most probable task's belief takes the batch in. The evidence charges a belief for every label that it did not expect, and
the prior for every weight that the batch must first determine: a batch goes to a known task unless that task predicts it
worse than a network that knows nothing yet. For networks that is rare: a belief learnt on one task explains another,
turned or with its pixels permuted, better than the prior does (100 digits: -115 against -132 nats), and only labels that
contradict it make a task new, from a kernel that frees the weights. Source: the assignment step of a mixture of tasks, by its
maximum (compare Jerfel, Grant, Griffiths and Heller 2019, arXiv 1812.06080).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from ssm_nn.inference.beliefs import FilterState, Info
from ssm_nn.inference.laplace import LaplaceFilter
from ssm_nn.tasks import Task, Tasks, as_task, listed_tasks

__all__ = ["MemoryInfo", "MemoryState", "Recognised", "TaskMemory"]

Array = Any


class MemoryState(NamedTuple):
    """All that the next update needs, as arrays.

    Attributes:
        beliefs: one FilterState a known task, in the order in which they were met.
        last: index of the task of the last batch; 0 before any.
        key: of the random choices to come.
    """

    beliefs: tuple[FilterState, ...]
    last: int
    key: Array


class MemoryInfo(NamedTuple):
    """What one update says of itself.

    Attributes:
        info: of the update that was kept.
        task: index of the task that the batch was given to.
        is_new: whether it was met for the first time.
        probabilities: (J + 1,), of each task known before, and of a new one, given the batch.
        log_evidences: (J + 1,), of the batch under each.
    """

    info: Info
    task: int
    is_new: bool
    probabilities: np.ndarray
    log_evidences: np.ndarray


@dataclass(frozen=True)
class Recognised:
    """What a run leaves behind.

    Attributes:
        state: the beliefs of all tasks met.
        infos: one MemoryInfo a batch.
    """

    state: MemoryState
    infos: tuple[MemoryInfo, ...]

    @property
    def tasks(self) -> np.ndarray:
        """(B,), the task of each batch."""
        return np.array([info.task for info in self.infos])


class TaskMemory:
    """Recognises tasks on a stream without boundaries; J + 1 updates a batch, J the tasks known.

    Args:
        engine: the filter that continues a known task: a static kernel where tasks come back as they were, a small noise
            where they drift meanwhile.
        new: the filter that begins a new task from the belief of the last: a kernel with a large noise. None begins from
            the prior.
        novelty: probability that a batch belongs to a new task, in (0, 1).

    Raises:
        ValueError: naming the argument, for what is not accepted.
    """

    def __init__(self, engine: LaplaceFilter, *, new: LaplaceFilter | None = None, novelty: float = 0.1):
        if not 0 < novelty < 1:
            raise ValueError(f"novelty is {novelty}; a probability in (0, 1) is accepted")
        if new is not None and new.structure != engine.structure:
            raise ValueError(f"new has the structure {new.structure}, engine {engine.structure}; one is accepted")
        self.engine, self.new, self.novelty = engine, new, float(novelty)

    def init(self, key: Array | int, task: Task | Mapping[str, Any] | None = None) -> MemoryState:
        """No task known; ``task`` gives shapes and is checked."""
        return MemoryState((), 0, self.engine.init(key, task).key)

    def update(self, state: MemoryState, task: Task | Mapping[str, Any] | None) -> tuple[MemoryState, MemoryInfo]:
        """Give the batch to the most probable task and learn from it there.

        Raises:
            ValueError: for a batch without data, which belongs to no task.
        """
        task = as_task(task)
        if not task.data:
            raise ValueError("task has no data; a batch with examples is accepted")
        key, own = jax.random.split(state.key)
        updates = [self.engine.update(belief, task) for belief in state.beliefs]
        if self.new is None or not state.beliefs:
            updates.append(self.engine.update(self.engine.init(own, task), task))
        else:
            updates.append(self.new.update(state.beliefs[state.last], task))
        evidences = np.array([info.log_evidence for _, info in updates])
        known = len(state.beliefs)
        prior = np.append(np.full(known, (1 - self.novelty) / max(known, 1)), self.novelty if known else 1.0)
        joint = np.where(np.isfinite(evidences), evidences, -np.inf) + np.log(prior)
        if np.all(
            np.isneginf(joint)
        ):  # every update failed, and says so in its Info: the batch stays where the last was
            joint = np.where(np.arange(known + 1) == state.last, 0.0, -np.inf)
        probabilities = np.exp(joint - np.logaddexp.reduce(joint))
        chosen = int(np.argmax(probabilities))
        after, info = updates[chosen]
        beliefs = (*state.beliefs[:chosen], after, *state.beliefs[chosen + 1 :])
        return (
            MemoryState(beliefs, chosen, key),
            MemoryInfo(info, chosen, chosen == known, probabilities, evidences),
        )

    def run(self, key: Array | int, batches: Tasks | Iterable[Task | Mapping[str, Any] | None]) -> Recognised:
        """All batches one after another; equal to ``init`` and the ``update``s."""
        listed, infos = listed_tasks(batches), []
        state = self.init(key, listed[0])
        for batch in listed:
            state, info = self.update(state, batch)
            infos.append(info)
        return Recognised(state, tuple(infos))
