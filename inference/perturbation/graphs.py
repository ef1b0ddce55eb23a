"""Whose kernels a task perturbs.

    Star            W_t = W(W_0, z_t)                    the paper's: tasks know of each other through W_0 alone
    Chain           W_t = W(W_{t-1}, z_t)                a task starts from the one before it
    UncertainBase   W_t = W(W_0, z_t), W_0 ~ N(m_t, P_t^-1)
    InitialStar     W_t = W(W_init, z_t)                 W_init as the network was made: tasks know nothing of each other

In an uncertain base W_0 keeps a Laplace posterior with diagonal P. Each task refines it, P_{t+1} = P_t + diag of its Fisher
information in W_0, and the mean moves with it; earlier tasks are read at the newest mean, with their own z as it was: the
smoothed mean of a belief in which W_0 and z_t are independent.

Where the first task's features serve no other one (permuted images under convolutions), trained weights are a worse start
than untrained ones, and no perturbation of them makes up for it: Ash and Adams 2020, "On warm-starting neural network
training" (arXiv 1910.08475).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax

from ssm_nn.inference.perturbation.blocks import Block, composed
from ssm_nn.inference.perturbation.reading import Reading
from ssm_nn.inference.perturbation.state import PerturbationState

__all__ = ["Chain", "Graph", "InitialStar", "Star", "Start", "UncertainBase"]


class Start(NamedTuple):
    """Where a task starts: ``kernels``, which it perturbs, and leaves of its ``own``; network -> path -> leaf."""

    kernels: Any
    own: Any


class Graph(Protocol):
    """Hashable."""

    @property
    def base_moves(self) -> bool:
        """Whether later tasks refine the base."""
        ...

    def start(self, reading: Reading, state: PerturbationState) -> Start:
        """Of the next task."""
        ...

    def kernels(self, reading: Reading, state: PerturbationState, index: int) -> Any:
        """The kernels of the task that came as number ``index``, network -> path -> leaf."""
        ...


@dataclass(frozen=True)
class Star:
    """Every task perturbs the first one's kernels."""

    base_moves = False

    def start(self, reading: Reading, state: PerturbationState) -> Start:
        """The first task's weights."""
        del reading
        return Start(state.base, state.records[0].own)

    def kernels(self, reading: Reading, state: PerturbationState, index: int) -> Any:
        """The base with the task's factors."""
        return _perturbed(reading.blocks, state.base, state, index)


@dataclass(frozen=True)
class Chain:
    """Every task perturbs the kernels of the task before it; reading task t takes t products a layer."""

    base_moves = False

    def start(self, reading: Reading, state: PerturbationState) -> Start:
        """The last task's weights."""
        return Start(self.kernels(reading, state, len(state.records) - 1), state.records[-1].own)

    def kernels(self, reading: Reading, state: PerturbationState, index: int) -> Any:
        """One perturbation after another."""
        kernels = state.base
        for t in range(1, index + 1):
            kernels = _perturbed(reading.blocks, kernels, state, t)
        return kernels


@dataclass(frozen=True)
class UncertainBase(Star):
    """A star whose centre is learnt from all tasks: old tasks' outputs change, each within what was known of the base."""

    base_moves = True


@dataclass(frozen=True)
class InitialStar:
    """Every task but the first perturbs the network's own kernels, which are the program's and count as no stored number."""

    base_moves = False

    def start(self, reading: Reading, state: PerturbationState) -> Start:
        """The network's own weights."""
        del state
        return Start(reading.shared(reading.initial), reading.own(reading.initial))

    def kernels(self, reading: Reading, state: PerturbationState, index: int) -> Any:
        """The network's own with the task's factors; the first task's are stored."""
        return _perturbed(reading.blocks, reading.shared(reading.initial) if index else state.base, state, index)


def _perturbed(blocks: Sequence[Block], kernels: Any, state: PerturbationState, index: int) -> Any:
    factors = state.records[index].factors
    if not factors:  # the first task: not a bit of the base is touched
        return kernels
    return _composed(tuple(blocks), kernels, tuple(f.padded(b.cap) for b, f in zip(blocks, factors, strict=True)))


# one compiled product for all ranks
_composed = jax.jit(composed, static_argnums=0)
