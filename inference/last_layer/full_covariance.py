"""The whole covariance S (K D, K D) of a head's weights: exact; an update of n points costs O((K D)^2 n K).

    S' = S - S U (I + U^T S U)^-1 U^T S,   U = [L_n (x) phi_n],      S_- = S + S U (I - U^T S U)^-1 U^T S

Weights V (K, D) are numbered class by class, index k D + d.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ssm_nn.inference.last_layer.head_likelihoods import HeadLikelihood

__all__ = ["Full", "FullCovariance", "FullPrecision", "information_matrix", "inverse_of"]

Array = Any

_LEAF = 512  # below it LAPACK is faster than its halves


@dataclass(frozen=True)
class Full:
    """The whole covariance, exact, in (K D)^2 numbers."""

    exact = True

    def numbers(self, num_outputs: int, num_features: int) -> int:
        """Kept in the state."""
        return (num_outputs * num_features) ** 2

    def prior(self, num_outputs: int, num_features: int, dtype: Any) -> FullCovariance:
        """The identity."""
        size = num_outputs * num_features
        return FullCovariance(jnp.eye(size, dtype=dtype), num_outputs)

    def prior_information(self, num_outputs: int, num_features: int, dtype: Any) -> FullPrecision:
        """The identity, of which nothing needs to be inverted."""
        size = num_outputs * num_features
        return FullPrecision(jnp.eye(size, dtype=dtype), jnp.zeros((), dtype), num_outputs)


@partial(jax.tree_util.register_dataclass, data_fields=["matrix"], meta_fields=["num_outputs"])
@dataclass(frozen=True)
class FullCovariance:
    """S (K D, K D); see ``ssm_nn.inference.last_layer.structures.HeadBelief``."""

    matrix: Array
    num_outputs: int

    @property
    def num_features(self) -> int:
        """D."""
        return self.matrix.shape[0] // self.num_outputs

    def _times(self, phi: Array) -> Array:
        """``S J^T`` (K D, K, n): one product of two matrices, since batches of thin ones take ten times as long."""
        cut = self.matrix.reshape(-1, self.num_features) @ phi.T
        return cut.reshape(self.matrix.shape[0], self.num_outputs, -1)

    def _project(self, phi: Array, columns: Array) -> Array:
        """``J columns`` (K, n, C) of columns (K D, C)."""
        return phi @ columns.reshape(self.num_outputs, self.num_features, -1)

    def kernel(self, phi: Array) -> Array:
        """``J S J^T`` (n, K, n, K)."""
        size, num = self.num_outputs, phi.shape[0]
        between = self._project(phi, self._times(phi).reshape(self.matrix.shape[0], -1))
        return between.reshape(size, num, size, num).transpose(1, 0, 3, 2)

    def lift(self, phi: Array, a: Array) -> Array:
        """``S J^T a`` (K, D)."""
        return (self.matrix @ (a.T @ phi).ravel()).reshape(self.num_outputs, -1)

    def _columns(self, phi: Array, factor: Array) -> tuple[Array, Array]:
        """``S U`` (K D, n C) and ``U^T S U`` (n C, n C)."""
        size = factor.shape[0] * factor.shape[2]
        wide = jnp.einsum("akn,nkc->anc", self._times(phi), factor).reshape(-1, size)
        between = self._project(phi, wide).reshape(self.num_outputs, phi.shape[0], size)
        core = jnp.einsum("knm,nkb->nbm", between, factor)
        return wide, core.reshape(size, size)

    def absorb(self, phi: Array, likelihood: HeadLikelihood, f: Array, y: Any, weight: Array) -> FullCovariance:
        """Down by ``S U (I + U^T S U)^-1 U^T S``: a square is subtracted, so no variance grows."""
        wide, core = self._columns(phi, weighted_factor(likelihood, f, y, weight))
        root = identity_plus_root(core)
        solved = jax.scipy.linalg.solve_triangular(root, wide.T, lower=True)
        return replace(self, matrix=self.matrix - solved.T @ solved)

    def release(self, phi: Array, likelihood: HeadLikelihood, f: Array, y: Any, weight: Array) -> FullCovariance:
        """Up by ``S U (I - U^T S U)^-1 U^T S``; not finite where the points were never absorbed."""
        wide, core = self._columns(phi, weighted_factor(likelihood, f, y, weight))
        root = jnp.linalg.cholesky(jnp.eye(core.shape[0], dtype=core.dtype) - core)
        solved = jax.scipy.linalg.solve_triangular(root, wide.T, lower=True)
        return replace(self, matrix=self.matrix + solved.T @ solved)

    def output_covariance(self, phi: Array) -> Array:
        """(n, K, K), one pair of outputs at a time."""
        size = self.num_outputs
        blocks = self.matrix.reshape(size, self.num_features, size, self.num_features)
        first, second = jnp.triu_indices(size)

        def one(pair):
            row, column = pair
            return jnp.sum((phi @ blocks[row, :, column, :]) * phi, axis=1)

        upper = jax.lax.map(one, (first, second))
        whole = (
            jnp.zeros((size, size, phi.shape[0]), phi.dtype).at[first, second].set(upper).at[second, first].set(upper)
        )
        return whole.transpose(2, 0, 1)

    def output_variance(self, phi: Array) -> Array:
        """Diagonals of ``output_covariance`` (n, K)."""
        size = self.num_outputs
        blocks = self.matrix.reshape(size, self.num_features, size, self.num_features)
        return jax.lax.map(lambda k: jnp.sum((phi @ blocks[k, :, k, :]) * phi, axis=1), jnp.arange(size)).T

    def information(self) -> FullPrecision:
        """The inverse, by Cholesky's factor."""
        inverse, log_determinant = inverse_of(self.matrix)
        return FullPrecision(inverse, log_determinant, self.num_outputs)

    def log_determinant(self) -> Array:
        """``log |S|``."""
        return 2 * jnp.sum(jnp.log(jnp.diagonal(jnp.linalg.cholesky(self.matrix))))

    def trace(self) -> Array:
        """``tr S``."""
        return jnp.trace(self.matrix)

    def variance(self) -> Array:
        """Of each weight (K, D)."""
        return jnp.diagonal(self.matrix).reshape(self.num_outputs, -1)

    def step(self, gain: Array, noise: Array) -> FullCovariance:
        """``A S A + Q`` for gains and noises (D,) of each feature."""
        gain, noise = (jnp.tile(part, self.num_outputs) for part in (gain, noise))
        return replace(self, matrix=gain[:, None] * self.matrix * gain + jnp.diag(noise))

    def grown(self, num_new: int) -> FullCovariance:
        """New outputs, independent of the old and as uncertain as at first."""
        new = jnp.eye(num_new * self.num_features, dtype=self.matrix.dtype)
        return FullCovariance(jax.scipy.linalg.block_diag(self.matrix, new), self.num_outputs + num_new)

    def draw(self, key: Array, num_samples: int) -> Array:
        """(S, K, D) with mean 0."""
        root = jnp.linalg.cholesky(self.matrix)
        noise = jax.random.normal(key, (num_samples, root.shape[0]), root.dtype)
        return (noise @ root.T).reshape(num_samples, self.num_outputs, -1)


@partial(jax.tree_util.register_dataclass, data_fields=["matrix", "log_covariance"], meta_fields=["num_outputs"])
@dataclass(frozen=True)
class FullPrecision:
    """``S^-1`` (K D, K D) and ``log |S|``, where many points come at once."""

    matrix: Array
    log_covariance: Array
    num_outputs: int

    def log_determinant(self) -> Array:
        """``log |S|``."""
        return self.log_covariance

    def matvec(self, v: Array) -> Array:
        """(K, D) to (K, D)."""
        return (self.matrix @ v.ravel()).reshape(v.shape)

    def block(self) -> Array:
        """(D, D): the blocks of one output, averaged over the outputs."""
        size = self.num_outputs
        cut = self.matrix.reshape(size, -1, size, self.matrix.shape[0] // size)
        return jnp.einsum("kdke->de", cut) / size

    def absorbed(
        self, phi: Array, likelihood: HeadLikelihood, f: Array, y: Any, weight: Array
    ) -> tuple[FullCovariance, Array]:
        """``(S^-1 + H)^-1`` and its log determinant."""
        inverse, log_determinant = inverse_of(self.matrix + information_matrix(phi, likelihood, f, y, weight))
        return FullCovariance(inverse, self.num_outputs), -log_determinant


def weighted_factor(likelihood: HeadLikelihood, f: Array, y: Any, weight: Array) -> Array:
    """``sqrt(w) L`` (n, K, C), 0 for points that do not count."""
    factor = likelihood.factor(f, y)
    return jnp.where(weight[:, None, None] > 0, factor * jnp.sqrt(weight)[:, None, None], 0.0)


def identity_plus_root(core: Array) -> Array:
    """Cholesky's factor of ``I + core`` for core >= 0.

    What is added to the identity is the rounding of core: without it a core of large numbers is not positive definite.
    """
    return jnp.linalg.cholesky(core + (1 + rounding_of(core)) * jnp.eye(core.shape[0], dtype=core.dtype))


def rounding_of(core: Array) -> Array:
    """What ``identity_plus_root`` adds to the diagonal."""
    return 2 * jnp.finfo(core.dtype).eps * jnp.trace(core)


def information_matrix(phi: Array, likelihood: HeadLikelihood, f: Array, y: Any, weight: Array) -> Array:
    """``H = sum_n w_n Lambda_n (x) phi_n phi_n^T`` (K D, K D), one product for each pair of outputs."""
    size, width = f.shape[1], phi.shape[1]
    first, second = jnp.triu_indices(size)

    def of_pair(pair):
        own, other = pair
        unit = jnp.zeros_like(f).at[:, other].set(1.0)
        scale = jnp.where(weight > 0, weight * likelihood.weigh(f, y, unit)[:, own], 0.0)
        return (phi * scale[:, None]).T @ phi

    blocks = jax.lax.map(of_pair, (first, second))
    whole = jnp.zeros((size, size, width, width), phi.dtype)
    whole = whole.at[first, second].set(blocks).at[second, first].set(blocks)
    return whole.transpose(0, 2, 1, 3).reshape(size * width, size * width)


def inverse_of(matrix: Array) -> tuple[Array, Array]:
    """Of a positive definite matrix (N, N), symmetric; and the log determinant of the matrix itself."""
    root = jnp.linalg.cholesky(matrix)
    return _gram_of_lower(_inverse_of_lower(root)), 2 * jnp.sum(jnp.log(jnp.diagonal(root)))


def _inverse_of_lower(root: Array) -> Array:
    """``L^-1`` by halves: products of whole matrices, which leave out the zeros, are faster than a triangular solve."""
    size = root.shape[0]
    if size <= _LEAF:
        return jax.scipy.linalg.solve_triangular(root, jnp.eye(size, dtype=root.dtype), lower=True)
    half = size // 2
    upper, lower = _inverse_of_lower(root[:half, :half]), _inverse_of_lower(root[half:, half:])
    corner = -lower @ (root[half:, :half] @ upper)
    return jnp.block([[upper, jnp.zeros((half, size - half), root.dtype)], [corner, lower]])


def _gram_of_lower(lower: Array) -> Array:
    """``M^T M`` of a lower triangular M, by halves likewise."""
    size = lower.shape[0]
    if size <= _LEAF:
        return lower.T @ lower
    half = size // 2
    corner, last = lower[half:, :half], lower[half:, half:]
    beside = last.T @ corner
    return jnp.block(
        [[_gram_of_lower(lower[:half, :half]) + corner.T @ corner, beside.T], [beside, _gram_of_lower(last)]]
    )
