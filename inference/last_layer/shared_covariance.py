"""One covariance (D, D) shared by the outputs, S = I (x) Sigma: with weight c_n for point n,

    Sigma^-1 = I + sum_n w_n c_n phi_n phi_n^T,      c = tr Lambda / rank Lambda    ((1 - sum p^2) / (K - 1) for classes)

Exact for K = 1, and for Gaussian outputs. The published form has c = p_max (1 - p_max): arXiv 2210.06112.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ssm_nn.inference.last_layer.full_covariance import identity_plus_root, inverse_of
from ssm_nn.inference.last_layer.head_likelihoods import HeadLikelihood
from ssm_nn.inference.last_layer.split_covariance import along_features, half_solved, minus_square
from ssm_nn.weight_mesh import shards_of_weights

__all__ = ["Shared", "SharedCovariance", "isotropic_weight"]

Array = Any


@dataclass(frozen=True)
class Shared:
    """One covariance for every output, in 2 D^2 numbers."""

    exact = False

    def numbers(self, num_outputs: int, num_features: int) -> int:
        """Kept in the state."""
        del num_outputs
        return 2 * num_features**2

    def prior(self, num_outputs: int, num_features: int, dtype: Any) -> SharedCovariance:
        """The identity."""
        identity = jnp.eye(num_features, dtype=dtype)
        return SharedCovariance(identity, identity + 0, num_outputs)

    def prior_information(self, num_outputs: int, num_features: int, dtype: Any) -> SharedCovariance:
        """The same."""
        return self.prior(num_outputs, num_features, dtype)


def isotropic_weight(likelihood: HeadLikelihood, f: Array, y: Any, weight: Array) -> Array:
    """``w tr Lambda / rank`` (n,): the multiple of the identity nearest to Lambda where Lambda is not 0."""
    trace = jnp.sum(likelihood.diagonal(f, y), axis=-1)
    return jnp.where(weight > 0, weight * trace / likelihood.degrees, 0.0)


@partial(jax.tree_util.register_dataclass, data_fields=["covariance", "precision"], meta_fields=["num_outputs"])
@dataclass(frozen=True)
class SharedCovariance:
    """Sigma and its inverse (D, D); see ``ssm_nn.inference.last_layer.structures.HeadBelief``."""

    covariance: Array
    precision: Array
    num_outputs: int

    def _between(self, phi: Array) -> Array:
        return phi @ (self.covariance @ phi.T)

    def kernel(self, phi: Array) -> Array:
        """``J S J^T`` (n, K, n, K)."""
        return jnp.einsum("nm,kl->nkml", self._between(phi), jnp.eye(self.num_outputs, dtype=phi.dtype))

    def lift(self, phi: Array, a: Array) -> Array:
        """``S J^T a`` (K, D)."""
        return (a.T @ phi) @ self.covariance

    def absorb(self, phi: Array, likelihood: HeadLikelihood, f: Array, y: Any, weight: Array) -> SharedCovariance:
        """Few points by Woodbury's identity, many by a new inverse."""
        return self._changed(phi, isotropic_weight(likelihood, f, y, weight), 1)

    def absorb_few(
        self, phi: Array, likelihood: HeadLikelihood, f: Array, y: Any, weight: Array
    ) -> tuple[SharedCovariance, Array]:
        """``absorb`` by Woodbury's identity on a mesh, the rows of both matrices split; and the change of ``log |S|``."""
        return self._changed_by_rows(phi * jnp.sqrt(isotropic_weight(likelihood, f, y, weight))[:, None], 1)

    def _changed_by_rows(self, rows: Array, sign: int) -> tuple[SharedCovariance, Array]:
        wide = along_features((self.covariance @ rows.T)[None])
        turned, change = half_solved(wide, rows @ wide[0], sign)
        covariance = minus_square(self.covariance[None, :, None], turned, sign)[0, :, 0]
        precision = along_features((self.precision + sign * rows.T @ rows)[None])[0]
        made = replace(self, covariance=covariance, precision=precision)
        return made, -sign * self.num_outputs * change

    def release(self, phi: Array, likelihood: HeadLikelihood, f: Array, y: Any, weight: Array) -> SharedCovariance:
        """The reverse of ``absorb``."""
        return self._changed(phi, isotropic_weight(likelihood, f, y, weight), -1)

    def _changed(self, phi: Array, c: Array, sign: int) -> SharedCovariance:
        rows = phi * jnp.sqrt(c)[:, None]
        if shards_of_weights() > 1:
            return self._changed_by_rows(rows, sign)[0]
        precision = self.precision + sign * rows.T @ rows
        if 4 * phi.shape[0] > phi.shape[1]:
            return replace(self, covariance=inverse_of(precision)[0], precision=precision)
        wide = rows @ self.covariance
        between = wide @ rows.T
        root = (
            identity_plus_root(between)
            if sign > 0
            else jnp.linalg.cholesky(jnp.eye(len(rows), dtype=rows.dtype) - between)
        )
        solved = jax.scipy.linalg.solve_triangular(root, wide, lower=True)
        return replace(self, covariance=self.covariance - sign * solved.T @ solved, precision=precision)

    def absorbed(
        self, phi: Array, likelihood: HeadLikelihood, f: Array, y: Any, weight: Array
    ) -> tuple[SharedCovariance, Array]:
        """``absorb`` and the log determinant of what it gives."""
        made = self.absorb(phi, likelihood, f, y, weight)
        return made, made.log_determinant()

    def output_covariance(self, phi: Array) -> Array:
        """(n, K, K)."""
        return self._variance(phi)[:, None, None] * jnp.eye(self.num_outputs, dtype=phi.dtype)

    def output_variance(self, phi: Array) -> Array:
        """(n, K), the same for each output."""
        return jnp.broadcast_to(self._variance(phi)[:, None], (phi.shape[0], self.num_outputs))

    def _variance(self, phi: Array) -> Array:
        return jnp.sum((phi @ self.covariance) * phi, axis=1)

    def information(self) -> SharedCovariance:
        """Itself."""
        return self

    def matvec(self, v: Array) -> Array:
        """``S^-1 v`` (K, D)."""
        return v @ self.precision

    def block(self) -> Array:
        """(D, D)."""
        return self.precision

    def log_determinant(self) -> Array:
        """``log |S|``."""
        root = jnp.linalg.cholesky(self.covariance)
        return 2 * self.num_outputs * jnp.sum(jnp.log(jnp.diagonal(root)))

    def trace(self) -> Array:
        """``tr S``."""
        return self.num_outputs * jnp.trace(self.covariance)

    def variance(self) -> Array:
        """Of each weight (K, D)."""
        return jnp.broadcast_to(jnp.diagonal(self.covariance), (self.num_outputs, self.covariance.shape[0]))

    def step(self, gain: Array, noise: Array) -> SharedCovariance:
        """``A Sigma A + Q``."""
        covariance = gain[:, None] * self.covariance * gain + jnp.diag(noise)
        return replace(self, covariance=covariance, precision=inverse_of(covariance)[0])

    def grown(self, num_new: int) -> SharedCovariance:
        """New outputs share what the old ones have: their uncertainty is underrated until a sweep."""
        return replace(self, num_outputs=self.num_outputs + num_new)

    def draw(self, key: Array, num_samples: int) -> Array:
        """(S, K, D) with mean 0."""
        root = jnp.linalg.cholesky(self.covariance)
        noise = jax.random.normal(key, (num_samples, self.num_outputs, root.shape[0]), root.dtype)
        return noise @ root.T
