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

    The objective is divided by N, and the optimiser's change of a weight multiplied by

        sqrt(min_j D_j / D_i),   D the diagonal of Lambda'

    so that weights known well move as little as their standard deviation says, and learning rates keep their usual scale;
    neither moves a minimum. The prior's gradient may serve several steps, each with the shift s since by the diagonal,
    ``Lambda' d + D s``: fixed points stay where they are, but the path to them is rougher.

    Args:
        optimizer: any optax optimiser.
        epochs: passes over the task at most.
        batch_size: examples a step; the last batch of an epoch is padded under a mask.
        prior_every: steps that share one gradient of the prior; 1 computes it in each, more saves time with large structures.
        patience: stop after this many epochs without improvement of the epoch's mean objective; None runs all epochs
            and does not judge convergence.
        tolerance: an improvement counts when it exceeds ``tolerance * (1 + |objective|)``.
    """

    optimizer: optax.GradientTransformation = field(default_factory=lambda: optax.adam(1e-3))
    epochs: int = 5
    batch_size: int = 128
    prior_every: int = 1
    patience: int | None = None
    tolerance: float = 1e-4

    def __post_init__(self):
        for name in ("epochs", "batch_size", "prior_every", "patience"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}; a whole number >= 1 is accepted")

    def bind(self, program: Any) -> Callable[[MapProblem, Array, Array], MapResult]:
        """The minimiser for ``program``; one epoch is one compiled call."""
        epoch = partial(jax.jit, donate_argnums=(1, 2))(partial(self._epoch, program))
        begin = jax.jit(partial(self._begin, program))
        end = jax.jit(partial(self._end, program))

        def run(problem: MapProblem, start: Array, key: Array) -> MapResult:
            shift, state = begin(problem, start)
            best, since, mean = float("inf"), 0, float("inf")
            steps = -(-problem.task.num_examples // self.batch_size)
            for done in range(1, self.epochs + 1):
                shift, state, mean_array = epoch(problem, shift, state, jax.random.fold_in(key, done))
                mean = float(mean_array)
                if not mean < float("inf"):  # nan or infinite
                    return MapResult(end(problem, shift), done * steps, NOT_FINITE, mean)
                since = 0 if mean < best - self.tolerance * (1 + abs(mean)) else since + 1
                best = min(best, mean)
                if self.patience is not None and since >= self.patience:
                    return MapResult(end(problem, shift), done * steps, CONVERGED, mean)
            status = FIXED_BUDGET if self.patience is None else NOT_CONVERGED
            return MapResult(end(problem, shift), self.epochs * steps, status, mean)

        return run

    def _begin(self, program: Any, problem: MapProblem, start: Array) -> tuple[Any, Any]:
        """The shift by leaf, which costs no packing in each step, and the optimiser's state."""
        shift = extract(program, problem.task, problem.hypers).layout.arrays(start)
        return shift, self.optimizer.init(shift)

    def _end(self, program: Any, problem: MapProblem, shift: Any) -> Array:
        return extract(program, problem.task, problem.hypers).layout.packed(shift)

    def _epoch(self, program: Any, problem: MapProblem, shift: Any, state: Any, key: Array) -> tuple[Any, Any, Array]:
        space = extract(program, problem.task, problem.hypers)
        total = problem.task.num_examples
        order = index_batches(jax.random.permutation(key, total), self.batch_size, total)
        counted = jnp.sum(problem.task.mask)
        square = problem.precision.quadratic_form()
        mean = space.layout.arrays(problem.mean)
        diagonal = problem.precision.precision_diagonal()
        curvature = space.layout.arrays(diagonal)
        speed = space.layout.arrays(jnp.sqrt(jnp.min(diagonal) / diagonal))

        def block(carry, indices):
            half_square, pull = jax.value_and_grad(lambda d: 0.5 * square(d))(space.layout.packed(carry[0]))
            pull = space.layout.arrays(pull)
            origin = carry[0]

            def step(carry, indices):
                shift, state = carry
                batch = rows(problem.task, indices)
                scale = problem.power * counted / jnp.maximum(jnp.sum(batch.mask), 1)

                def misfit(shift):
                    return -scale * space.log_likelihood_at(jax.tree.map(jnp.add, mean, shift), batch)

                value, gradient = jax.value_and_grad(misfit)(shift)
                prior = jax.tree.map(lambda p, c, d, o: p + c * (d - o), pull, curvature, shift, origin)
                gradient = jax.tree.map(lambda a, b: (a + b) / jnp.maximum(counted, 1), gradient, prior)
                change, state = self.optimizer.update(gradient, state, shift)
                change = jax.tree.map(jnp.multiply, change, speed)
                return (optax.apply_updates(shift, change), state), value + half_square

            return jax.lax.scan(step, carry, indices)

        whole = order.shape[0] // self.prior_every * self.prior_every
        blocks = order[:whole].reshape(-1, self.prior_every, order.shape[1])
        carry, values = jax.lax.scan(block, (shift, state), blocks)
        (shift, state), last_values = block(carry, order[whole:])
        return shift, state, (jnp.sum(values) + jnp.sum(last_values)) / order.shape[0]
