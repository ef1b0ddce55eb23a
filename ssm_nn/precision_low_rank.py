"""Diagonal plus low-rank precision: ``Lambda = diag(D) + U U^T``, D > 0 (P,), U (P, R).

All formulas are in forms without cancellation and without the inverse of a noise or of U's core, so that they hold for
noise 0, gain 0, and in float32. Cost O(P R^2). Source: the model of Sliwa et al. (arXiv 2410.06800); where that paper hands
precisions to a gain that needs covariances, or drops the truncated mass, these differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssm_nn.coordinate_map import CoordinateMap
from ssm_nn.moments import Moments
from ssm_nn.weight_mesh import shards_of_weights, tall_skinny_qr
from ssm_nn.whitening import Whitening

__all__ = [
    "Compressed",
    "DiagonalPlusLowRank",
    "cholesky_of_identity_plus",
    "compress",
    "singular_directions",
    "times_inverse_transposed",
]

Array = Any

_BLOCK_ROWS = 4096  # of some tens of columns: half a MiB
_LEAST_BLOCKS = 8
# an eigenvalue of a Gram matrix that is larger than this many roundings of the largest has its direction to a thousandth
_RESOLVED = 1e3


class DiagonalPlusLowRank(NamedTuple):
    """``diag(diagonal) + factor factor^T``; see ``ssm_nn.precision.Precision`` for the read-outs.

    Attributes:
        diagonal: (P,), > 0 for a precision, >= 0 for the information of a task.
        factor: (P, R).
    """

    diagonal: Array
    factor: Array

    @property
    def rank(self) -> int:
        """R."""
        return self.factor.shape[1]

    def _root(self) -> Array:
        """The Cholesky factor L of ``I + U^T D^-1 U``."""
        return cholesky_of_identity_plus(_weighted_gram(self.factor, 1 / self.diagonal))

    def matvec(self, x: Array) -> Array:
        """``D x + U (U^T x)``."""
        return self.diagonal * x + self.factor @ _project(self.factor, x)

    def solve(self, x: Array) -> Array:
        """``(x - U (L L^T)^-1 U^T (x / D)) / D``."""
        if x.ndim == 1:
            gram, projected = _gram_and_projection(self.factor, 1 / self.diagonal, x / self.diagonal)
            inner = jax.scipy.linalg.cho_solve((cholesky_of_identity_plus(gram), True), projected)
            return (x - self.factor @ inner) / self.diagonal
        root = self._root()
        inner = jax.scipy.linalg.cho_solve((root, True), self.factor.T @ (x / self.diagonal[:, None]))
        return (x - self.factor @ inner) / self.diagonal[:, None]

    def solver(self) -> Callable[[Array], Array]:
        """By one root."""
        root = self._root()

        def solve(x: Array) -> Array:
            inner = jax.scipy.linalg.cho_solve((root, True), _project(self.factor, x / self.diagonal))
            return (x - self.factor @ inner) / self.diagonal

        return solve

    def logdet(self) -> Array:
        """``sum log D + 2 sum log diag L``."""
        root = self._root()
        return jnp.sum(jnp.log(self.diagonal)) + 2 * jnp.sum(jnp.log(jnp.diagonal(root)))

    def precision_diagonal(self) -> Array:
        """``D + rowsum(U^2)``."""
        return self.diagonal + jnp.sum(jnp.square(self.factor), axis=1)

    def variance(self) -> Array:
        """``(1 - rowsum((U L^-T)^2) / D) / D``."""
        squares = jnp.sum(jnp.square(times_inverse_transposed(self.factor, self._root())), axis=1)
        return (1 - squares / self.diagonal) / self.diagonal

    def quadratic(self, x: Array) -> Array:
        """``sum D x^2 + |U^T x|^2``."""
        return jnp.sum(self.diagonal * jnp.square(x)) + jnp.sum(jnp.square(_project(self.factor, x)))

    def quadratic_form(self) -> Callable[[Array], Array]:
        """``quadratic`` with U stored by columns: a product with U^T reads it ten times faster on a CPU."""
        columns = jax.lax.optimization_barrier(self.factor.T)  # keeps XLA from undoing the transpose
        return lambda x: jnp.sum(self.diagonal * jnp.square(x)) + jnp.sum(jnp.square(columns @ x))

    def whitening(self) -> Whitening:
        """``(I + Q (sqrt(1 + s^2) - 1) Q^T) sqrt(D)``, Q and s of the singular value decomposition of ``U / sqrt(D)``."""
        root = jnp.sqrt(self.diagonal)
        smallest = jnp.min(self.diagonal, initial=jnp.inf)
        if not self.factor.size:
            return Whitening(lambda x: root * x, lambda z: z / root, smallest)
        basis, triangle = tall_skinny_qr(self.factor / root[:, None])
        left, singular, _ = jnp.linalg.svd(triangle, full_matrices=False)
        # by rows, as for the quadratic form
        directions = jax.lax.optimization_barrier((basis @ left).T)
        stretch = jnp.sqrt(1 + jnp.square(singular))

        def along(x: Array, change: Array) -> Array:
            return x + (change * (directions @ x)) @ directions

        return Whitening(lambda x: along(root * x, stretch - 1), lambda z: along(z, 1 / stretch - 1) / root, smallest)

    def sample(self, key: Array) -> Array:
        """``Lambda^-1 (sqrt(D) e1 + U e2)``."""
        one, two = jax.random.split(key)
        dtype = self.diagonal.dtype
        noise = jnp.sqrt(self.diagonal) * jax.random.normal(one, self.diagonal.shape, dtype)
        return self.solve(noise + self.factor @ jax.random.normal(two, (self.rank,), dtype))

    def to_dense(self) -> Array:
        """(P, P)."""
        return jnp.diag(self.diagonal) + self.factor @ self.factor.T

    def add(self, site: DiagonalPlusLowRank) -> DiagonalPlusLowRank:
        """Rank R plus the site's rank."""
        return DiagonalPlusLowRank(self.diagonal + site.diagonal, jnp.concatenate([self.factor, site.factor], axis=1))

    def add_columns(self, columns: Array) -> DiagonalPlusLowRank:
        """Rank R + K."""
        return DiagonalPlusLowRank(self.diagonal, jnp.concatenate([self.factor, columns], axis=1))

    def absorb(self, site: DiagonalPlusLowRank) -> DiagonalPlusLowRank:
        """``add``."""
        return self.add(site)

    def no_information(self) -> DiagonalPlusLowRank:
        """Zeros."""
        return DiagonalPlusLowRank(jnp.zeros_like(self.diagonal), jnp.zeros_like(self.factor))

    def mapped(self, coordinates: CoordinateMap) -> DiagonalPlusLowRank:
        """Rows of both in the new order."""
        order = coordinates.indices(self.diagonal.shape[0])
        return DiagonalPlusLowRank(self.diagonal[order], self.factor[order])

    def predict(self, moments: Moments) -> DiagonalPlusLowRank:
        """Exact, rank kept: ``E = 1/(a^2 + q D)``, ``M = I + U^T diag(q E) U``, ``D' = D E``, ``U' = diag(a E) U M^-T/2``."""
        gain, _, noise = moments[:3]
        shrink, root = self._step_root(gain, noise)
        # scaled after the product, in the product's own memory
        moved = (gain * shrink)[:, None] * times_inverse_transposed(self.factor, root)
        return DiagonalPlusLowRank(self.diagonal * shrink, moved)

    def _step_root(self, gain: Array, noise: Array) -> tuple[Array, Array]:
        """E and the Cholesky factor of ``M = I + U^T diag(q E) U``."""
        shrink = 1 / (jnp.square(gain) + noise * self.diagonal)
        return shrink, cholesky_of_identity_plus(_weighted_gram(self.factor, noise * shrink))

    def smoother_gain(self, moments: Moments, x: Array) -> Array:
        """``(I - diag(q E) U M^-1 U^T) diag(a E) x``; exactly x for noise 0 and gain 1."""
        gain, _, noise = moments[:3]
        shrink = 1 / (jnp.square(gain) + noise * self.diagonal)
        pulled = gain * shrink * x
        gram, projected = _gram_and_projection(self.factor, noise * shrink, pulled)
        inner = jax.scipy.linalg.cho_solve((cholesky_of_identity_plus(gram), True), projected)
        return pulled - noise * shrink * (self.factor @ inner)

    def sample_conditional(self, moments: Moments, key: Array) -> Array:
        """Draw from N(0, (diag(1/f) + U U^T)^-1), ``f = q E``, never dividing by f."""
        gain, _, noise = moments[:3]
        shrink, root = self._step_root(gain, noise)
        free = noise * shrink
        one, two = jax.random.split(key)
        dtype = self.diagonal.dtype
        draw = jnp.sqrt(free) * jax.random.normal(one, free.shape, dtype)
        draw = draw + free * (self.factor @ jax.random.normal(two, (self.rank,), dtype))
        inner = jax.scipy.linalg.cho_solve((root, True), _project(self.factor, draw))
        return draw - free * (self.factor @ inner)

    def conditional_log_density(self, moments: Moments, residual: Array) -> Array:
        """Over the coordinates with noise: ``diag(1/f) + U U^T`` restricted to them."""
        gain, _, noise = moments[:3]
        shrink, root = self._step_root(gain, noise)
        moves = noise > 0
        free = jnp.where(moves, noise * shrink, 1.0)
        inside = jnp.where(moves, residual, 0.0)
        squares = jnp.sum(jnp.square(inside) / free) + jnp.sum(jnp.square(_project(self.factor, inside)))
        logdet = 2 * jnp.sum(jnp.log(jnp.diagonal(root))) - jnp.sum(jnp.log(free))
        return 0.5 * (logdet - squares - jnp.sum(moves) * jnp.log(2 * jnp.pi))

    def message_before(self, message: DiagonalPlusLowRank, moments: Moments) -> DiagonalPlusLowRank:
        """``E = 1/(1 + q b)``, ``M = I + W^T diag(q E) W``, ``b <- a^2 b E``, ``W <- diag(a E) W M^-T/2``."""
        gain, _, noise = moments[:3]
        shrink = 1 / (1 + noise * message.diagonal)
        root = cholesky_of_identity_plus(_weighted_gram(message.factor, noise * shrink))
        factor = (gain * shrink)[:, None] * times_inverse_transposed(message.factor, root)
        return DiagonalPlusLowRank(jnp.square(gain) * message.diagonal * shrink, factor)


class Compressed(NamedTuple):
    """A factor cut to fewer columns.

    Attributes:
        factor: (P, R).
        dropped_diagonal: (P,), the diagonal of what was cut off.
        dropped_share: what was cut off, as a share of the whitened trace.
    """

    factor: Array
    dropped_diagonal: Array
    dropped_share: Array


def compress(factor: Array, metric: Array, rank: int) -> Compressed:
    """The best ``rank`` columns of ``factor`` (P, K) in the whitened metric: SVD of ``metric^-1/2 factor``.

    K <= rank returns the factor padded with zero columns.
    """
    size, columns = factor.shape
    if columns <= rank:
        padding = jnp.zeros((size, rank - columns), factor.dtype)
        return Compressed(
            jnp.concatenate([factor, padding], axis=1),
            jnp.zeros(size, factor.dtype),
            jnp.zeros((), factor.dtype),
        )
    directions = singular_directions(factor, metric, rank)
    # two products: one, cut in two, would be written whole
    dropped = jnp.sum(jnp.square(factor @ directions[:, rank:]), axis=1)
    kept = factor @ directions[:, :rank]
    dropped_trace, kept_trace = jnp.sum(dropped / metric), jnp.sum(jnp.square(kept) / metric[:, None])
    share = dropped_trace / jnp.maximum(dropped_trace + kept_trace, jnp.finfo(factor.dtype).tiny)
    return Compressed(kept, dropped, share)


def singular_directions(factor: Array, metric: Array, rank: int) -> Array:
    """Right singular vectors V (K, K) of ``metric^-1/2 factor``, such that the first ``rank`` belong to the largest values.

    By the Gram matrix where the values kept stand clear of its rounding (1e-2 of the largest in float32), else by the triangle
    of a QR decomposition, six times slower.
    """
    squares, upwards = jnp.linalg.eigh(_weighted_gram(factor, 1 / metric))

    def by_triangle() -> Array:
        _, triangle = tall_skinny_qr(factor / jnp.sqrt(metric)[:, None])
        return jnp.linalg.svd(triangle)[2].T

    resolved = squares[-rank] > _RESOLVED * jnp.finfo(factor.dtype).eps * squares[-1] if rank else True
    return jax.lax.cond(resolved, lambda: upwards[:, ::-1], by_triangle)


def _weighted_gram(factor: Array, weight: Array) -> Array:
    """``factor^T diag(weight) factor``."""
    return _over_rows(lambda some, weight: some.T @ (weight[:, None] * some), factor, weight)


def _gram_and_projection(factor: Array, weight: Array, x: Array) -> tuple[Array, Array]:
    """``factor^T diag(weight) factor`` and ``factor^T x`` (R,) for x (P,)."""
    if not _goes_by_blocks(factor):
        return _weighted_gram(factor, weight), _project(factor, x)
    return _over_rows(lambda some, weight, x: (some.T @ (weight[:, None] * some), x @ some), factor, weight, x)


def _goes_by_blocks(factor: Array) -> bool:
    return shards_of_weights() == 1 and factor.shape[0] >= _LEAST_BLOCKS * _BLOCK_ROWS


def _over_rows(function: Callable[..., Any], *arrays: Array) -> Any:
    """The sum of a function over rows of arrays (P, ...).

    On one device, many rows by blocks that stay in the cache: a weighted copy would be written and read once.
    """
    if not _goes_by_blocks(arrays[0]):
        return function(*arrays)
    blocks = arrays[0].shape[0] // _BLOCK_ROWS

    def add(i: Array, total: Any) -> Any:
        some = [jax.lax.dynamic_slice_in_dim(array, i * _BLOCK_ROWS, _BLOCK_ROWS) for array in arrays]
        return jax.tree.map(jnp.add, total, function(*some))

    return jax.lax.fori_loop(0, blocks, add, function(*(array[blocks * _BLOCK_ROWS :] for array in arrays)))


def cholesky_of_identity_plus(gram: Array) -> Array:
    """Cholesky factor of ``I + gram``, gram symmetric positive semi-definite: eigenvalues >= 1, so no jitter is needed."""
    return jnp.linalg.cholesky(jnp.eye(gram.shape[0], dtype=gram.dtype) + gram)


def _project(factor: Array, x: Array) -> Array:
    """``factor^T x`` (R,) for x (P,): a product and a sum, which XLA fuses, reads the factor four times faster than its dot."""
    return jnp.sum(factor * x[:, None], axis=0)


def times_inverse_transposed(wide: Array, root: Array) -> Array:
    """``wide L^-T`` for wide (P, R), by way of the small inverse: a triangular solve over P columns is ten times slower.

    L is the root of ``I + gram``, so that no entry of its inverse is larger than one.
    """
    inverse = jax.scipy.linalg.solve_triangular(root, jnp.eye(root.shape[0], dtype=root.dtype), lower=True)
    return wide @ inverse.T
