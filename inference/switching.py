"""An unknown shift among K candidate kernels: a switching filter.

    k_t | k_{t-1} ~ Categorical(transition[k_{t-1}]),      theta_t | theta_{t-1}, k_t  by kernel k_t
    p(k_t = k | D_1 .. D_t)  proportional to  Z_{t,k} sum_j transition[j, k] p(k_{t-1} = j | D_1 .. D_{t-1})

with Z_{t,k} the evidence of task t under kernel k from the belief so far. Of the K beliefs the most probable is carried on: the
mixture's covariance has no diagonal-plus-low-rank form, and a Gaussian of its moments blurs a permutation with its absence. The
kernels' probabilities are carried whole. Exact where the losing kernels' probability is 0. Source: generalised pseudo-Bayes of
order one (Ackerson and Fu 1970; Bar-Shalom, Li and Kirubarajan 2001, chapter 11), without its merging.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ssm_nn.extraction import describe
from ssm_nn.inference.beliefs import Filtered, FilterState, Info
from ssm_nn.inference.laplace import LaplaceFilter
from ssm_nn.tasks import Task, Tasks, as_task, each_task

__all__ = ["SwitchInfo", "SwitchState", "Switched", "SwitchingFilter"]

Array = Any


class SwitchState(NamedTuple):
    """All that the next update needs, as arrays.

    Attributes:
        filter: the belief carried on.
        weights: (K,), probability of each kernel for the step to come.
    """

    filter: FilterState
    weights: Array


class SwitchInfo(NamedTuple):
    """What one update says of itself.

    Attributes:
        info: of the most probable kernel's update.
        kernel: its index.
        probabilities: (K,), of each kernel for this step given the tasks so far; for the first task, into which no step
            leads, and for a task without data those before it.
        log_evidences: (K,), of this task under each kernel; nan where an update failed.
        log_evidence: of this task, all kernels together.
    """

    info: Info
    kernel: int
    probabilities: np.ndarray
    log_evidences: np.ndarray
    log_evidence: float


@dataclass(frozen=True)
class Switched:
    """What a run leaves behind.

    Attributes:
        filtered: along the most probable kernels; each Info holds its kernel's moments, so that ``engine.smooth`` uses
            them. Its ``program`` is the first engine's.
        infos: one SwitchInfo a task.
    """

    filtered: Filtered
    infos: tuple[SwitchInfo, ...]

    @property
    def probabilities(self) -> np.ndarray:
        """(T, K)."""
        return np.stack([info.probabilities for info in self.infos])

    @property
    def kernels(self) -> np.ndarray:
        """(T,), the most probable kernel of each task."""
        return np.array([info.kernel for info in self.infos])

    @property
    def log_evidence(self) -> float:
        """Of all tasks, the kernels summed out one step at a time."""
        return float(sum(info.log_evidence for info in self.infos))


class SwitchingFilter:
    """A filter that weighs K kernels by their evidence; K updates a task.

    Args:
        engines: one filter a kernel, of one structure and of programs with the same weights and prior: the same program
            at other hyper-parameters (``engine.with_hypers``, compiled once), or another program.
        stay: probability that the next step has the same kernel, in (0, 1); the others share the rest.
        transition: (K, K), rows that sum to 1, instead of ``stay``.
        initial: (K,), probability of each kernel for the first step; uniform by default.

    Raises:
        ValueError: naming the argument, for what is not accepted.
    """

    def __init__(
        self,
        engines: Sequence[LaplaceFilter],
        *,
        stay: float = 0.9,
        transition: Any = None,
        initial: Any = None,
    ):
        self.engines = tuple(engines)
        count = len(self.engines)
        if count < 2:
            raise ValueError(f"engines has {count} entries; one for each of two or more kernels is accepted")
        if len({engine.structure for engine in self.engines}) > 1:
            raise ValueError(f"engines have the structures {[e.structure for e in self.engines]}; one is accepted")
        if not 0 < stay < 1:
            raise ValueError(f"stay is {stay}; a probability in (0, 1) is accepted")
        even = np.full((count, count), (1 - stay) / (count - 1))
        np.fill_diagonal(even, stay)
        self.transition = even if transition is None else np.asarray(transition, float)
        self.initial = np.full(count, 1 / count) if initial is None else np.asarray(initial, float)
        for name, table, shape in (
            ("transition", self.transition, (count, count)),
            ("initial", self.initial, (count,)),
        ):
            if table.shape != shape or not np.all(table >= 0) or not np.allclose(table.sum(-1), 1):
                raise ValueError(
                    f"{name} is {table.tolist()}; probabilities of shape {shape} that sum to 1 are accepted"
                )

    def init(self, key: Array, task: Task | Mapping[str, Any] | None = None) -> SwitchState:
        """The prior, and the kernels' initial probabilities.

        Raises:
            ValueError: if the programs differ in their weights.
        """
        layouts = {describe(e.program, as_task(task), e.hypers).sites for e in self.engines}
        if len({tuple(site._replace(frozen=False) for site in sites) for sites in layouts}) > 1:
            raise ValueError(
                "engines have programs with different weights; the same leaves in the same order are accepted"
            )
        return SwitchState(self.engines[0].init(key, task), jnp.asarray(self.initial))

    def update(self, state: SwitchState, task: Task | Mapping[str, Any] | None) -> tuple[SwitchState, SwitchInfo]:
        """One task under every kernel; a task without data is predicted by the most probable kernel."""
        task, weights = as_task(task), np.asarray(state.weights, float)
        first = int(state.filter.step) == 0
        if first or not task.data:
            likely = int(np.argmax(weights))
            after, info = self.engines[likely].update(state.filter, task)
            known = np.full(len(weights), info.log_evidence)
            next_weights = weights if first else weights @ self.transition
            return SwitchState(after, jnp.asarray(next_weights)), SwitchInfo(
                info, likely, weights, known, info.log_evidence
            )
        updates = [engine.update(state.filter, task) for engine in self.engines]
        evidences = np.array([info.log_evidence for _, info in updates])
        with np.errstate(divide="ignore"):
            joint = np.where(np.isfinite(evidences), evidences, -np.inf) + np.log(weights)
        if np.all(np.isneginf(joint)):  # every update failed: their Infos say so, and nothing was learnt of the kernel
            joint, total = np.log(np.maximum(weights, np.finfo(float).tiny)), float("nan")
        else:
            total = float(np.logaddexp.reduce(joint))
        probabilities = np.exp(joint - np.logaddexp.reduce(joint))
        likely = int(np.argmax(probabilities))
        after, info = updates[likely]
        return (
            SwitchState(after, jnp.asarray(probabilities @ self.transition)),
            SwitchInfo(info, likely, probabilities, evidences, total),
        )

    def run(self, key: Array, tasks: Tasks | Iterable[Task | Mapping[str, Any] | None]) -> Switched:
        """All tasks one after another; equal to ``init`` and the ``update``s."""
        state, states, infos = None, [], []
        for task in each_task(tasks):
            state = self.init(key, task) if state is None else state
            state, info = self.update(state, task)
            states.append(state.filter)
            infos.append(info)
        filtered = self.engines[0].filtered(states, [info.info for info in infos])
        return Switched(filtered, tuple(infos))
