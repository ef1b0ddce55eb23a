"""Weights held where the last task left them, each as firmly as it mattered: what EWC and SI have in common.

    theta_t = argmin -log p(D_t | theta) + 1/2 |theta - m_0|^2 / s_0^2 + 1/2 firmness sum_i I_i (theta_i - theta_{t-1,i})^2

I, the importance, is what the methods differ in.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from ssm_nn.inference.baselines.training import TaskByTask
from ssm_nn.inference.beliefs import Belief
from ssm_nn.inference.checks import check_finite
from ssm_nn.inference.laplace import LaplaceFilter
from ssm_nn.precision_diagonal import DiagonalPrecision
from ssm_nn.tasks import Task

__all__ = ["AnchoredState", "Anchoring"]

Array = Any


class AnchoredState(NamedTuple):
    """All that the next task needs of the past.

    Attributes:
        step: number of tasks so far.
        key: of the random choices to come.
        mean: (P,), the weights.
        importance: (P,), >= 0, of each weight for the tasks so far, in nats per squared weight.
    """

    step: Array
    key: Array
    mean: Array
    importance: Array


class Anchoring(TaskByTask[AnchoredState], ABC):
    """Training around the last weights.

    Args:
        engine: the filter to compare with; its kernel and structure are not read.
        strength: how often the importance counts, as a method's own formula writes it, >= 0.
        firmness: what the penalty's precision is, for an importance of 1.
    """

    def __init__(self, engine: LaplaceFilter, strength: float, firmness: float):
        super().__init__(engine)
        check_finite(0.0, strength=strength)
        self.strength, self.firmness = float(strength), float(firmness)

    def init(self, key: Array, task: Task | Mapping[str, Any] | None = None) -> AnchoredState:
        """Nothing is important yet, and the weights are where the filter's first search starts.

        Args:
            key: a ``jax.random.key``, or a whole number taken as its seed.
            task: the first task; it gives shapes and is checked.
        """
        begun = self._begun(key, task)
        return AnchoredState(*begun, jnp.zeros_like(begun.mean))

    def belief(self, state: AnchoredState, task: Task | Mapping[str, Any] | None = None) -> Belief:
        """N(weights, 1 / (prior's precision + firmness I)): the penalty read as a log density."""
        precision = self._diagonal_prior(task).precision.diagonal + self.firmness * state.importance
        return Belief(state.mean, DiagonalPrecision(precision))

    def _around(self, state: AnchoredState, task: Task) -> Belief:
        """``N(prior) N(weights, 1 / (firmness I))`` up to a constant; an importance of 0 says nothing."""
        prior = self._diagonal_prior(task)
        weight = self.firmness * state.importance
        total = prior.precision.diagonal + weight
        return Belief(prior.mean + weight / total * (state.mean - prior.mean), DiagonalPrecision(total))
