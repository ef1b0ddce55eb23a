"""Whose kernels a task perturbs.

    Star            W_t = W(W_0, z_t)                    the paper's: tasks know of each other through W_0 alone
    Chain           W_t = W(W_{t-1}, z_t)                a task starts from the one before it
    UncertainBase   W_t = W(W_0, z_t), W_0 ~ N(m_t, P_t^-1)

In the last one W_0 keeps a Laplace posterior with diagonal P. Each task refines it, P_{t+1} = P_t + diag of its Fisher
information in W_0, and the mean moves with it; earlier tasks are read at the newest mean, with their own z as it was: the
smoothed mean of a belief in which W_0 and z_t are independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax

from ssm_nn.inference.perturbation.blocks import Block, composed
from ssm_nn.inference.perturbation.state import PerturbationState

__all__ = ["Chain", "Graph", "Star", "UncertainBase"]


class Graph(Protocol):
    """Hashable."""

    @property
    def base_moves(self) -> bool:
        """Whether later tasks refine the base."""
        ...

    def reference(self, blocks: Sequence[Block], state: PerturbationState) -> Any:
        """The kernels that the next task perturbs, network -> path -> leaf."""
        ...

    def kernels(self, blocks: Sequence[Block], state: PerturbationState, index: int) -> Any:
        """The kernels of the task that came as number ``index``."""
        ...


@dataclass(frozen=True)
class Star:
    """Every task perturbs the first one's kernels."""

    base_moves = False

    def reference(self, blocks: Sequence[Block], state: PerturbationState) -> Any:
        """The base."""
        del blocks
        return state.base

    def kernels(self, blocks: Sequence[Block], state: PerturbationState, index: int) -> Any:
        """The base with the task's factors."""
        return _perturbed(blocks, state.base, state, index)


@dataclass(frozen=True)
class Chain:
    """Every task perturbs the kernels of the task before it; reading task t takes t products a layer."""

    base_moves = False

    def reference(self, blocks: Sequence[Block], state: PerturbationState) -> Any:
        """Those of the last task."""
        return self.kernels(blocks, state, len(state.records) - 1)

    def kernels(self, blocks: Sequence[Block], state: PerturbationState, index: int) -> Any:
        """One perturbation after another."""
        kernels = state.base
        for t in range(1, index + 1):
            kernels = _perturbed(blocks, kernels, state, t)
        return kernels


@dataclass(frozen=True)
class UncertainBase(Star):
    """A star whose centre is learnt from all tasks: old tasks' outputs change, each within what was known of the base."""

    base_moves = True


def _perturbed(blocks: Sequence[Block], kernels: Any, state: PerturbationState, index: int) -> Any:
    factors = state.records[index].factors
    if not factors:  # the first task: not a bit of the base is touched
        return kernels
    return _composed(tuple(blocks), kernels, tuple(f.padded(b.cap) for b, f in zip(blocks, factors, strict=True)))


# one compiled product for all ranks
_composed = jax.jit(composed, static_argnums=0)
