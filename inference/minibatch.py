"""Maximum a posteriori weights by any optax optimiser on mini-batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ssm_nn.extraction import StateSpace, extract
from ssm_nn.inference.batches import index_batches, rows
from ssm_nn.inference.checks import check_count
from ssm_nn.inference.layer_coordinates import LayerCoordinates, turned_layers
from ssm_nn.inference.map_problem import CONVERGED, FIXED_BUDGET, NOT_CONVERGED, NOT_FINITE, MapProblem, MapResult
from ssm_nn.inference.search_coordinates import ByLeaf, Round, SearchCoordinates
from ssm_nn.precision_kronecker import KroneckerEigen

__all__ = ["Minibatch"]

Array = Any


@dataclass(frozen=True)
class Minibatch:
    """Epochs of mini-batches, reshuffled; the likelihood of a batch is scaled by N / B, the prior counts once.

    The objective is divided by N, and the weights move in the coordinates of ``ssm_nn.inference.search_coordinates``, so that
    weights known well move little, and learning rates keep their usual scale.

    Args:
        optimizer: any optax optimiser.
        epochs: passes over the task at most.
        batch_size: examples a step; the last batch of an epoch is padded under a mask.
        prior_every: 1 moves in coordinates in which the prior is round; more moves leaf by leaf, with one gradient of the
            prior for so many steps, which saves time with large structures on a rougher path.
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
        check_count(epochs=self.epochs, batch_size=self.batch_size, prior_every=self.prior_every)
        if self.patience is not None:
            check_count(patience=self.patience)

    def bind(self, program: Any) -> Callable[[MapProblem, Array, Array], MapResult]:
        """The minimiser for ``program``; one epoch is one compiled call."""
        epoch = partial(jax.jit, donate_argnums=(2, 3))(partial(self._epoch, program))
        begin = jax.jit(partial(self._begin, program))
        end = jax.jit(partial(self._end, program))

        def run(problem: MapProblem, start: Array, key: Array) -> MapResult:
            inputs, position, state = begin(problem, start)
            best, since, mean = float("inf"), 0, float("inf")
            steps = -(-problem.task.num_examples // self.batch_size)
            for done in range(1, self.epochs + 1):
                position, state, mean_array = epoch(problem, inputs, position, state, jax.random.fold_in(key, done))
                mean = float(mean_array)
                if not mean < float("inf"):  # nan or infinite
                    return MapResult(end(problem, position), done * steps, NOT_FINITE, mean)
                since = 0 if mean < best - self.tolerance * (1 + abs(mean)) else since + 1
                best = min(best, mean)
                if self.patience is not None and since >= self.patience:
                    return MapResult(end(problem, position), done * steps, CONVERGED, mean)
            status = FIXED_BUDGET if self.patience is None else NOT_CONVERGED
            return MapResult(end(problem, position), self.epochs * steps, status, mean)

        return run

    def _coordinates(self, space: StateSpace, problem: MapProblem) -> SearchCoordinates:
        share = 1 / jnp.maximum(jnp.sum(problem.task.mask), 1).astype(problem.mean.dtype)
        searched = space.layout, problem.mean, problem.precision, share
        if self.prior_every > 1:
            return ByLeaf(*searched)
        if not isinstance(problem.precision, KroneckerEigen):
            return Round(*searched)
        steps = self.epochs * -(-problem.task.num_examples // self.batch_size)
        turned = turned_layers(space, problem.precision, problem.task, steps, self.batch_size)
        return LayerCoordinates(*searched, turned)

    def _begin(self, program: Any, problem: MapProblem, start: Array) -> tuple[Any, Any, Any]:
        """What is made once a task, the first position, and the optimiser's state."""
        space = extract(program, problem.task, problem.hypers)
        coordinates = self._coordinates(space, problem)
        position = coordinates.enter(start)
        return coordinates.inputs(space, problem.task), position, self.optimizer.init(position)

    def _end(self, program: Any, problem: MapProblem, position: Any) -> Array:
        space = extract(program, problem.task, problem.hypers)
        return self._coordinates(space, problem).leave(position)

    def _epoch(
        self, program: Any, problem: MapProblem, inputs: Any, position: Any, state: Any, key: Array
    ) -> tuple[Any, Any, Array]:
        space = extract(program, problem.task, problem.hypers)
        coordinates = self._coordinates(space, problem)
        total = problem.task.num_examples
        order = index_batches(jax.random.permutation(key, total), self.batch_size, total)
        counted = jnp.sum(problem.task.mask)

        def block(carry, indices):
            half_square, prior_gradient = coordinates.prior(carry[0])

            def step(carry, indices):
                position, state = carry
                batch = rows(problem.task, indices)
                beside = jax.tree.map(lambda array: jnp.take(array, indices, axis=0, mode="clip"), inputs)
                scale = problem.power / jnp.maximum(jnp.sum(batch.mask), 1)

                def misfit(position):
                    return -scale * coordinates.log_likelihood(space, position, batch, beside)

                value, gradient = jax.value_and_grad(misfit)(position)
                gradient = jax.tree.map(jnp.add, gradient, prior_gradient(position))
                change, state = self.optimizer.update(gradient, state, position)
                return (optax.apply_updates(position, coordinates.scaled(change)), state), value + half_square

            return jax.lax.scan(step, carry, indices)

        every = self.prior_every
        whole = order.shape[0] // every * every
        carry, values = jax.lax.scan(block, (position, state), order[:whole].reshape(-1, every, order.shape[1]))
        summed = jnp.sum(values)
        if whole < order.shape[0]:
            carry, values = block(carry, order[whole:])
            summed = summed + jnp.sum(values)
        return *carry, summed * counted / order.shape[0]
