"""Maximum a posteriori weights by any optax optimiser on mini-batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ssm_nn.extraction import extract
from ssm_nn.inference.batches import index_batches, rows
from ssm_nn.inference.map_problem import CONVERGED, FIXED_BUDGET, NOT_CONVERGED, NOT_FINITE, MapProblem, MapResult

__all__ = ["Minibatch"]

Array = Any


@dataclass(frozen=True)
class Minibatch:
    """Epochs of mini-batches, reshuffled; the likelihood of a batch is scaled by N / B, the prior counts once.

    The objective is divided by N, which gives learning rates their usual scale and moves no minimum.

    Args:
        optimizer: any optax optimiser.
        epochs: passes over the task at most.
        batch_size: examples a step; the last batch of an epoch is padded under a mask.
        patience: stop after this many epochs without improvement of the epoch's mean objective; None runs all epochs
            and does not judge convergence.
        tolerance: an improvement counts when it exceeds ``tolerance * (1 + |objective|)``.
    """

    optimizer: optax.GradientTransformation = field(default_factory=lambda: optax.adam(1e-3))
    epochs: int = 5
    batch_size: int = 128
    patience: int | None = None
    tolerance: float = 1e-4

    def __post_init__(self):
        for name in ("epochs", "batch_size", "patience"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}; a whole number >= 1 is accepted")

    def bind(self, program: Any) -> Callable[[MapProblem, Array, Array], MapResult]:
        """The minimiser for ``program``; one epoch is one compiled call."""
        epoch = partial(jax.jit, donate_argnums=(1, 2))(partial(self._epoch, program))

        def run(problem: MapProblem, start: Array, key: Array) -> MapResult:
            shift, state = jnp.copy(start), self.optimizer.init(start)
            best, since, mean = float("inf"), 0, float("inf")
            steps = -(-problem.task.num_examples // self.batch_size)
            for done in range(1, self.epochs + 1):
                shift, state, mean_array = epoch(problem, shift, state, jax.random.fold_in(key, done))
                mean = float(mean_array)
                if not mean < float("inf"):  # nan or infinite
                    return MapResult(shift, done * steps, NOT_FINITE, mean)
                since = 0 if mean < best - self.tolerance * (1 + abs(mean)) else since + 1
                best = min(best, mean)
                if self.patience is not None and since >= self.patience:
                    return MapResult(shift, done * steps, CONVERGED, mean)
            status = FIXED_BUDGET if self.patience is None else NOT_CONVERGED
            return MapResult(shift, self.epochs * steps, status, mean)

        return run

    def _epoch(
        self, program: Any, problem: MapProblem, shift: Array, state: Any, key: Array
    ) -> tuple[Array, Any, Array]:
        space = extract(program, problem.task, problem.hypers)
        total = problem.task.num_examples
        order = index_batches(jax.random.permutation(key, total), self.batch_size, total)
        counted = jnp.sum(problem.task.mask)
        objective = problem.objective(space)

        def step(carry, indices):
            shift, state = carry
            batch = rows(problem.task, indices)
            scale = counted / jnp.maximum(jnp.sum(batch.mask), 1)

            def per_example(shift):
                return objective(shift, batch, scale) / jnp.maximum(counted, 1)

            value, gradient = jax.value_and_grad(per_example)(shift)
            change, state = self.optimizer.update(gradient, state, shift)
            return (optax.apply_updates(shift, change), state), value

        (shift, state), values = jax.lax.scan(step, (shift, state), order)
        return shift, state, jnp.mean(values) * jnp.maximum(counted, 1)
