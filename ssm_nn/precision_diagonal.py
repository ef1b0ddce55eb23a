"""Diagonal precision: ``Lambda = diag(d)``; the filter with it is online EWC with the whole posterior kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssm_nn.coordinate_map import CoordinateMap
from ssm_nn.moments import Moments
from ssm_nn.precision_low_rank import DiagonalPlusLowRank
from ssm_nn.whitening import Whitening

__all__ = ["DiagonalPrecision"]

Array = Any


class DiagonalPrecision(NamedTuple):
    """``diag(diagonal)``; see ``ssm_nn.precision.Precision`` for the read-outs.

    Attributes:
        diagonal: (P,), > 0 for a precision, >= 0 for the information of a task.
    """

    diagonal: Array

    def matvec(self, x: Array) -> Array:
        """``d x``."""
        return self.diagonal * x

    def solve(self, x: Array) -> Array:
        """``x / d``."""
        return x / (self.diagonal if x.ndim == 1 else self.diagonal[:, None])

    def solver(self) -> Callable[[Array], Array]:
        """Nothing to prepare."""
        return self.solve

    def logdet(self) -> Array:
        """``sum log d``."""
        return jnp.sum(jnp.log(self.diagonal))

    def precision_diagonal(self) -> Array:
        """d."""
        return self.diagonal

    def variance(self) -> Array:
        """``1 / d``."""
        return 1 / self.diagonal

    def quadratic(self, x: Array) -> Array:
        """``sum d x^2``."""
        return jnp.sum(self.diagonal * jnp.square(x))

    def quadratic_form(self) -> Callable[[Array], Array]:
        """``quadratic`` itself."""
        return self.quadratic

    def whitening(self) -> Whitening:
        """``sqrt(d)``."""
        root = jnp.sqrt(self.diagonal)
        return Whitening(lambda x: root * x, lambda z: z / root, jnp.min(self.diagonal))

    def sample(self, key: Array) -> Array:
        """``e / sqrt(d)``."""
        return jax.random.normal(key, self.diagonal.shape, self.diagonal.dtype) / jnp.sqrt(self.diagonal)

    def to_dense(self) -> Array:
        """(P, P)."""
        return jnp.diag(self.diagonal)

    def add(self, site: DiagonalPrecision) -> DiagonalPrecision:
        """Sum of the diagonals."""
        return DiagonalPrecision(self.diagonal + site.diagonal)

    def add_columns(self, columns: Array) -> DiagonalPlusLowRank:
        """Diagonal plus the columns."""
        return DiagonalPlusLowRank(self.diagonal, columns)

    def absorb(self, site: DiagonalPrecision) -> DiagonalPrecision:
        """``add``."""
        return self.add(site)

    def no_information(self) -> DiagonalPrecision:
        """Zeros."""
        return DiagonalPrecision(jnp.zeros_like(self.diagonal))

    def mapped(self, coordinates: CoordinateMap) -> DiagonalPrecision:
        """In the new order."""
        return DiagonalPrecision(self.diagonal[coordinates.indices(self.diagonal.shape[0])])

    def predict(self, moments: Moments) -> DiagonalPrecision:
        """``d / (a^2 + q d)``."""
        return DiagonalPrecision(self.diagonal / (jnp.square(moments.gain) + moments.noise * self.diagonal))

    def smoother_gain(self, moments: Moments, x: Array) -> Array:
        """``a x / (a^2 + q d)``."""
        return moments.gain * x / (jnp.square(moments.gain) + moments.noise * self.diagonal)

    def sample_conditional(self, moments: Moments, key: Array) -> Array:
        """Standard deviation ``sqrt(q / (a^2 + q d))``."""
        free = moments.noise / (jnp.square(moments.gain) + moments.noise * self.diagonal)
        return jnp.sqrt(free) * jax.random.normal(key, free.shape, free.dtype)

    def conditional_log_density(self, moments: Moments, residual: Array) -> Array:
        """Over the coordinates with noise."""
        moves = moments.noise > 0
        free = moments.noise / (jnp.square(moments.gain) + moments.noise * self.diagonal)
        free = jnp.where(moves, free, 1.0)
        terms = jnp.square(residual) / free + jnp.log(free) + jnp.log(2 * jnp.pi)
        return -0.5 * jnp.sum(jnp.where(moves, terms, 0.0))

    def message_before(self, message: DiagonalPrecision, moments: Moments) -> DiagonalPrecision:
        """``a^2 b / (1 + q b)``."""
        return DiagonalPrecision(jnp.square(moments.gain) * message.diagonal / (1 + moments.noise * message.diagonal))
