"""Dense precision: the exact twin of every other structure, for up to a few thousand weights. Cost O(P^3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve, solve_triangular

from ssm_nn.coordinate_map import CoordinateMap
from ssm_nn.moments import Moments
from ssm_nn.whitening import Whitening

__all__ = ["DensePrecision"]

Array = Any


class DensePrecision(NamedTuple):
    """A full matrix (P, P); see ``ssm_nn.precision.Precision`` for the read-outs.

    Attributes:
        matrix: (P, P), symmetric positive definite for a precision, semi-definite for the information of a task.
    """

    matrix: Array

    def matvec(self, x: Array) -> Array:
        """``Lambda x``."""
        return self.matrix @ x

    def solve(self, x: Array) -> Array:
        """By Cholesky."""
        return self.solver()(x)

    def solver(self) -> Callable[[Array], Array]:
        """By one Cholesky factor."""
        root = jnp.linalg.cholesky(self.matrix)
        return lambda x: cho_solve((root, True), x)

    def logdet(self) -> Array:
        """``2 sum log diag L``."""
        return 2 * jnp.sum(jnp.log(jnp.diagonal(jnp.linalg.cholesky(self.matrix))))

    def precision_diagonal(self) -> Array:
        """(P,)."""
        return jnp.diagonal(self.matrix)

    def variance(self) -> Array:
        """``colsum((L^-1)^2)``."""
        root = jnp.linalg.cholesky(self.matrix)
        inverse = solve_triangular(root, jnp.eye(root.shape[0], dtype=root.dtype), lower=True)
        return jnp.sum(jnp.square(inverse), axis=0)

    def quadratic(self, x: Array) -> Array:
        """``|L^T x|^2``."""
        return self.quadratic_form()(x)

    def quadratic_form(self) -> Callable[[Array], Array]:
        """``quadratic`` with the Cholesky factor made once."""
        upper = jnp.linalg.cholesky(self.matrix).T
        return lambda x: jnp.sum(jnp.square(upper @ x))

    def whitening(self) -> Whitening:
        """``L^T`` of the Cholesky factor."""
        root = jnp.linalg.cholesky(self.matrix)

        def colour(z: Array) -> Array:
            return jax.scipy.linalg.solve_triangular(root, z, lower=True, trans="T")

        return Whitening(lambda x: root.T @ x, colour, jnp.linalg.eigvalsh(self.matrix)[0])

    def sample(self, key: Array) -> Array:
        """``L^-T e``."""
        root = jnp.linalg.cholesky(self.matrix)
        noise = jax.random.normal(key, root.shape[:1], root.dtype)
        return solve_triangular(root, noise, lower=True, trans=1)

    def to_dense(self) -> Array:
        """Itself."""
        return self.matrix

    def add(self, site: DensePrecision) -> DensePrecision:
        """Sum of the matrices."""
        return DensePrecision(self.matrix + site.matrix)

    def add_columns(self, columns: Array) -> DensePrecision:
        """``matrix + V V^T``."""
        return DensePrecision(self.matrix + columns @ columns.T)

    def absorb(self, site: DensePrecision) -> DensePrecision:
        """``add``."""
        return self.add(site)

    def no_information(self) -> DensePrecision:
        """Zeros."""
        return DensePrecision(jnp.zeros_like(self.matrix))

    def mapped(self, coordinates: CoordinateMap) -> DensePrecision:
        """``O Lambda O^T``."""
        return DensePrecision(coordinates(coordinates(self.matrix).T))

    def predict(self, moments: Moments) -> DensePrecision:
        """``(A Sigma A + Q)^-1``, by way of the covariance: exact for noise 0 and gain 0 alike."""
        gain, _, noise = moments[:3]
        covariance = _inverse(self.matrix)
        return DensePrecision(_inverse(gain[:, None] * covariance * gain + jnp.diag(noise)))

    def smoother_gain(self, moments: Moments, x: Array) -> Array:
        """``Sigma A Lambda' x``."""
        return self.solve(moments.gain * self.predict(moments).matvec(x))

    def _conditional(self, moments: Moments) -> tuple[Array, Array]:
        """S = sqrt(Q) and the Cholesky factor of S Lambda S + A^2: ``H = S (S Lambda S + A^2)^-1 S``.

        That is ``(Lambda + A Q^-1 A)^-1`` without dividing by the noise; gain and noise must not vanish together.
        """
        spread = jnp.sqrt(moments.noise)
        core = spread[:, None] * self.matrix * spread + jnp.diag(jnp.square(moments.gain))
        return spread, jnp.linalg.cholesky(core)

    def sample_conditional(self, moments: Moments, key: Array) -> Array:
        """``S K^-T e`` with ``K K^T = S Lambda S + A^2``."""
        spread, root = self._conditional(moments)
        noise = jax.random.normal(key, spread.shape, spread.dtype)
        return spread * solve_triangular(root, noise, lower=True, trans=1)

    def conditional_log_density(self, moments: Moments, residual: Array) -> Array:
        """Over the coordinates with noise: the rows and columns of ``Lambda + A Q^-1 A`` that belong to them."""
        moves = moments.noise > 0
        spread = jnp.where(moves, jnp.sqrt(moments.noise), 1.0)
        kept = jnp.where(moves[:, None] & moves, spread[:, None] * self.matrix * spread, 0.0)
        core = kept + jnp.diag(jnp.where(moves, jnp.square(moments.gain), 1.0))
        root = jnp.linalg.cholesky(core)
        scaled = jnp.where(moves, residual / spread, 0.0)
        logdet = 2 * jnp.sum(jnp.log(jnp.diagonal(root))) - 2 * jnp.sum(jnp.log(spread))
        squares = jnp.sum(jnp.square(root.T @ scaled))
        return 0.5 * (logdet - squares - jnp.sum(moves) * jnp.log(2 * jnp.pi))

    def message_before(self, message: DensePrecision, moments: Moments) -> DensePrecision:
        """``A (B - B S (I + S B S)^-1 S B) A`` with ``S = sqrt(Q)``; B may be singular, Q zero."""
        gain, _, noise = moments[:3]
        spread = jnp.sqrt(noise)
        right = message.matrix * spread
        core = jnp.eye(spread.shape[0], dtype=spread.dtype) + spread[:, None] * right
        half = solve_triangular(jnp.linalg.cholesky(core), right.T, lower=True)
        return DensePrecision(gain[:, None] * (message.matrix - half.T @ half) * gain)


def _inverse(matrix: Array) -> Array:
    """Inverse of a symmetric positive definite matrix, symmetric to the last bit."""
    root = jnp.linalg.cholesky(matrix)
    half = solve_triangular(root, jnp.eye(root.shape[0], dtype=root.dtype), lower=True)
    return half.T @ half
