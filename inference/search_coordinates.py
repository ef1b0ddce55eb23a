"""The coordinates in which mini-batches move the weights, and what the prior is there.

    round     z = R d / s,    Lambda' = R^T R,  s^2 its least eigenvalue          prior 1/2 s^2 |z|^2, its gradient elementwise
    by leaf   m' + d, the optimiser's changes multiplied by  sqrt(min_j D_j / D_i),  D the diagonal of Lambda'

In both, weights known well move as little as their standard deviation says, and one that is known least moves by the learning
rate; minima stay where they are. Round coordinates cost two products with R a step, of which ``layer_coordinates`` spares a
Kronecker form the largest; by leaf, the prior's gradient ``Lambda' d`` serves several steps, each with the shift since by the
diagonal: cheaper, but a rougher path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from ssm_nn.extraction import Layout, StateSpace
from ssm_nn.tasks import Task

__all__ = ["ByLeaf", "Round", "SearchCoordinates"]

Array = Any


class SearchCoordinates(Protocol):
    """Positions are pytrees."""

    def enter(self, shift: Array) -> Any:
        """The position of a shift d (P,)."""
        ...

    def leave(self, position: Any) -> Array:
        """Back to d (P,)."""
        ...

    def inputs(self, space: StateSpace, task: Task) -> Any:
        """What the likelihood reads beside the data: a pytree with the examples on the leading axis, made once a task."""
        ...

    def log_likelihood(self, space: StateSpace, position: Any, batch: Task, inputs: Any) -> Array:
        """Of a batch, with the rows of ``inputs`` that belong to it."""
        ...

    def prior(self, origin: Any) -> tuple[Array, Callable[[Any], Any]]:
        """``share / 2  d^T Lambda' d`` at ``origin``, and the gradient at positions near it."""
        ...

    def scaled(self, change: Any) -> Any:
        """The optimiser's change as it is applied."""
        ...


class OfWeights:
    """Coordinates whose likelihood reads the weights by leaf, and nothing beside the data."""

    def weights(self, position: Any) -> Any:
        """The weights m' + d by leaf."""
        raise NotImplementedError

    def inputs(self, space: StateSpace, task: Task) -> tuple[()]:
        del space, task
        return ()

    def log_likelihood(self, space: StateSpace, position: Any, batch: Task, inputs: tuple[()]) -> Array:
        del inputs
        return space.log_likelihood_at(self.weights(position), batch)


class Round(OfWeights):
    """By the root of the precision; the prior counts ``share``."""

    def __init__(self, layout: Layout, mean: Array, precision: Any, share: Array):
        self.layout, self.mean, self.whitening, self.share = layout, mean, precision.whitening(), share
        self.unit = jnp.sqrt(self.whitening.smallest)

    def enter(self, shift: Array) -> Array:
        return self.whitening.whiten(shift) / self.unit

    def leave(self, position: Array) -> Array:
        return self.whitening.colour(self.unit * position)

    def weights(self, position: Array) -> Any:
        return self.layout.arrays(self.mean + self.leave(position))

    def prior(self, origin: Array) -> tuple[Array, Callable[[Array], Array]]:
        square = self.share * jnp.square(self.unit)
        return 0.5 * square * jnp.sum(jnp.square(origin)), lambda position: square * position

    def scaled(self, change: Array) -> Array:
        return change


class ByLeaf(OfWeights):
    """Without packing the weights in each step, nor adding the mean; the prior counts ``share``."""

    def __init__(self, layout: Layout, mean: Array, precision: Any, share: Array):
        self.layout, self.mean, self.share = layout, mean, share
        self.square = precision.quadratic_form()
        diagonal = precision.precision_diagonal()
        self.diagonal = share * diagonal
        self.speed = layout.arrays(jnp.sqrt(jnp.min(diagonal) / diagonal))

    def enter(self, shift: Array) -> Any:
        return self.layout.arrays(self.mean + shift)

    def leave(self, position: Any) -> Array:
        return self.layout.packed(position) - self.mean

    def weights(self, position: Any) -> Any:
        return position

    def prior(self, origin: Any) -> tuple[Array, Callable[[Any], Any]]:
        shift = self.leave(origin)
        half_square, pull = jax.value_and_grad(lambda d: 0.5 * self.share * self.square(d))(shift)
        # a line in the position: two arrays are read a step
        at_zero, slope = (
            self.layout.arrays(pull - self.diagonal * (self.mean + shift)),
            self.layout.arrays(self.diagonal),
        )

        def gradient(position: Any) -> Any:
            return jax.tree.map(lambda a, b, d: a + b * d, at_zero, slope, position)

        return half_square, gradient

    def scaled(self, change: Any) -> Any:
        return jax.tree.map(jnp.multiply, change, self.speed)
