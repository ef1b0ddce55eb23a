"""Passes over a task in mini-batches for methods that need more of a step than its weights, by Minibatch's settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssm_nn.extraction import StateSpace
from ssm_nn.inference.batches import rows
from ssm_nn.inference.map_problem import CONVERGED, FIXED_BUDGET, NOT_CONVERGED, NOT_FINITE, all_finite
from ssm_nn.inference.minibatch import Minibatch
from ssm_nn.tasks import Task

__all__ = ["Passes", "batch_log_likelihood", "run_epochs"]

Array = Any


class Passes(NamedTuple):
    """What ``run_epochs`` ends with: the carry, and steps, status and mean objective of the last epoch, as in MapResult."""

    carry: Any
    steps: int
    status: int
    objective: float


def run_epochs(
    settings: Minibatch, epoch: Callable[[Any, Array], tuple[Any, Array]], carry: Any, steps_an_epoch: int, key: Array
) -> Passes:
    """``epoch(carry, key) -> (carry, mean objective)`` until the budget or the patience of ``settings`` is used up.

    The carry may be donated by ``epoch``: what is given here is copied. Status is NOT_FINITE, and the rest of the epochs is
    left out, once the objective is not finite or the last carry is not.
    """
    carry = jax.tree.map(jnp.copy, carry)
    best, since, mean = float("inf"), 0, float("inf")
    status = FIXED_BUDGET if settings.patience is None else NOT_CONVERGED
    done = 0
    for done in range(1, settings.epochs + 1):
        carry, mean_array = epoch(carry, jax.random.fold_in(key, done))
        mean = float(mean_array)
        if not abs(mean) < float("inf"):
            return Passes(carry, done * steps_an_epoch, NOT_FINITE, mean)
        since = 0 if mean < best - settings.tolerance * (1 + abs(mean)) else since + 1
        best = min(best, mean)
        if settings.patience is not None and since >= settings.patience:
            status = CONVERGED
            break
    status = status if bool(all_finite(carry)) else NOT_FINITE
    return Passes(carry, done * steps_an_epoch, status, mean)


def batch_log_likelihood(space: StateSpace, task: Task, indices: Array) -> Callable[[Array], Array]:
    """theta -> ``N / B`` times the log likelihood of the examples at ``indices`` (B,), an estimate of the whole task's."""
    batch = rows(task, indices)
    scale = jnp.sum(task.mask) / jnp.maximum(jnp.sum(batch.mask), 1)
    return lambda theta: scale * space.log_likelihood(theta, batch)
