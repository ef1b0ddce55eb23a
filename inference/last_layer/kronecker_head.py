"""A Kronecker product of outputs and features,

    S^-1 = (G / N) (x) C + I,     G = sum_n w_n Lambda_n (K, K),  C = sum_n w_n phi_n phi_n^T (D, D),  N = sum_n w_n

exact for K = 1 with one weight for all points, and for Gaussian outputs. The sums are kept: a point taken back leaves them
as they were, up to rounding. Source of the form: Ritter, Botev, Barber 2018, with one layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ssm_nn.inference.last_layer.head_likelihoods import HeadLikelihood

__all__ = ["KroneckerHead", "KroneckerInformation"]

Array = Any

NO_WALK = (
    "KroneckerHead() carries no head that moves between batches; Full(), SquareRoot(), Shared() and DiagonalHead() are "
    "accepted"
)


@dataclass(frozen=True)
class KroneckerHead:
    """One (K, K) and one (D, D) factor, in 2 (D^2 + K^2) numbers; no random walk."""

    exact = False

    def numbers(self, num_outputs: int, num_features: int) -> int:
        """Kept in the state."""
        return 2 * (num_outputs**2 + num_features**2)

    def prior(self, num_outputs: int, num_features: int, dtype: Any) -> KroneckerInformation:
        """The identity."""
        return KroneckerInformation(
            jnp.zeros((num_outputs, num_outputs), dtype),
            jnp.zeros((num_features, num_features), dtype),
            jnp.zeros((), dtype),
            jnp.eye(num_outputs, dtype=dtype),
            jnp.eye(num_features, dtype=dtype),
            jnp.ones((num_outputs, num_features), dtype),
        )

    def prior_information(self, num_outputs: int, num_features: int, dtype: Any) -> KroneckerInformation:
        """The same."""
        return self.prior(num_outputs, num_features, dtype)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["output_sum", "feature_sum", "count", "outputs", "features", "values"],
    meta_fields=[],
)
@dataclass(frozen=True)
class KroneckerInformation:
    """G, C, N, and ``S^-1 = (V_G (x) V_C) diag(values) (V_G (x) V_C)^T``; see ``HeadBelief``."""

    output_sum: Array
    feature_sum: Array
    count: Array
    outputs: Array  # V_G (K, K)
    features: Array  # V_C (D, D)
    values: Array  # (K, D), eigenvalues of the precision

    @property
    def num_outputs(self) -> int:
        """K."""
        return self.output_sum.shape[0]

    def kernel(self, phi: Array) -> Array:
        """``J S J^T`` (n, K, n, K): one (n, n) matrix a direction of the outputs."""
        turned = phi @ self.features
        between = jnp.einsum("nd,jd,md->jnm", turned, 1 / self.values, turned)
        return jnp.einsum("kj,lj,jnm->nkml", self.outputs, self.outputs, between)

    def _solve(self, v: Array) -> Array:
        return self.outputs @ ((self.outputs.T @ v @ self.features) / self.values) @ self.features.T

    def lift(self, phi: Array, a: Array) -> Array:
        """``S J^T a`` (K, D)."""
        return self._solve(a.T @ phi)

    def absorb(self, phi: Array, likelihood: HeadLikelihood, f: Array, y: Any, weight: Array) -> KroneckerInformation:
        """The sums grow."""
        return self._changed(phi, likelihood, f, y, weight, 1)

    def release(self, phi: Array, likelihood: HeadLikelihood, f: Array, y: Any, weight: Array) -> KroneckerInformation:
        """The sums shrink; the last point to go leaves the prior."""
        return self._changed(phi, likelihood, f, y, weight, -1)

    def _changed(
        self, phi: Array, likelihood: HeadLikelihood, f: Array, y: Any, weight: Array, sign: int
    ) -> KroneckerInformation:
        rows = phi * jnp.sqrt(weight)[:, None]
        output_sum = self.output_sum + sign * _sum_of_information(likelihood, f, y, weight)
        feature_sum = self.feature_sum + sign * rows.T @ rows
        return _decomposed(output_sum, feature_sum, self.count + sign * jnp.sum(weight))

    def absorbed(
        self, phi: Array, likelihood: HeadLikelihood, f: Array, y: Any, weight: Array
    ) -> tuple[KroneckerInformation, Array]:
        """``absorb`` and the log determinant of what it gives."""
        made = self.absorb(phi, likelihood, f, y, weight)
        return made, made.log_determinant()

    def output_covariance(self, phi: Array) -> Array:
        """(n, K, K)."""
        by_direction = jnp.square(phi @ self.features) @ (1 / self.values).T
        return jnp.einsum("kj,nj,lj->nkl", self.outputs, by_direction, self.outputs)

    def output_variance(self, phi: Array) -> Array:
        """Diagonals of ``output_covariance`` (n, K)."""
        return jnp.square(phi @ self.features) @ (1 / self.values).T @ jnp.square(self.outputs).T

    def information(self) -> KroneckerInformation:
        """Itself."""
        return self

    def matvec(self, v: Array) -> Array:
        """``S^-1 v`` (K, D)."""
        return self.outputs @ ((self.outputs.T @ v @ self.features) * self.values) @ self.features.T

    def block(self) -> Array:
        """(D, D), averaged over the directions that the data inform."""
        degrees = max(self.num_outputs - 1, 1)
        mean = jnp.where(self.count > 0, self.output_sum / jnp.where(self.count > 0, self.count, 1.0), 0.0)
        size = jnp.trace(mean) / degrees
        return jnp.eye(self.features.shape[0], dtype=self.features.dtype) + size * self.feature_sum

    def log_determinant(self) -> Array:
        """``log |S|``."""
        return -jnp.sum(jnp.log(self.values))

    def trace(self) -> Array:
        """``tr S``."""
        return jnp.sum(1 / self.values)

    def variance(self) -> Array:
        """Of each weight (K, D)."""
        return jnp.square(self.outputs) @ (1 / self.values) @ jnp.square(self.features).T

    def step(self, gain: Array, noise: Array) -> KroneckerInformation:
        """Refused: with noise added, a Kronecker product does not stay one."""
        raise ValueError(NO_WALK)

    def grown(self, num_new: int) -> KroneckerInformation:
        """New outputs of which nothing is known."""
        return _decomposed(jnp.pad(self.output_sum, (0, num_new)), self.feature_sum, self.count)

    def draw(self, key: Array, num_samples: int) -> Array:
        """(S, K, D) with mean 0."""
        noise = jax.random.normal(key, (num_samples, *self.values.shape), self.values.dtype) / jnp.sqrt(self.values)
        return self.outputs @ noise @ self.features.T


def _sum_of_information(likelihood: HeadLikelihood, f: Array, y: Any, weight: Array) -> Array:
    """``sum_n w_n Lambda_n`` (K, K), one column at a time."""

    def column(k):
        unit = jnp.zeros_like(f).at[:, k].set(1.0)
        return jnp.sum(jnp.where(weight[:, None] > 0, weight[:, None] * likelihood.weigh(f, y, unit), 0.0), axis=0)

    return jax.lax.map(column, jnp.arange(f.shape[1]))


def _decomposed(output_sum: Array, feature_sum: Array, count: Array) -> KroneckerInformation:
    # halves of a sum and its transpose: eigh reads one triangle, and the sums are symmetric up to rounding
    mean = jnp.where(count > 0, (output_sum + output_sum.T) / 2 / jnp.where(count > 0, count, 1.0), 0.0)
    small, outputs = jnp.linalg.eigh(mean)
    large, features = jnp.linalg.eigh((feature_sum + feature_sum.T) / 2)
    # sums of squares: what is below 0 is rounding
    values = 1 + jnp.maximum(small, 0)[:, None] * jnp.maximum(large, 0)
    return KroneckerInformation(output_sum, feature_sum, count, outputs, features, values)
