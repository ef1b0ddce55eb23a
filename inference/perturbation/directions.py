"""From freely trained weights to scales and a few directions: what of W_free - W_0 is worth a name.

    r_j = sum W_f W_0 / sum W_0^2,   s_i = sum r_j W_0 W_f / sum (r_j W_0)^2          alternating least squares
    D = mean_p (W_f[p] - diag(s) W_0[p] diag(r)) = sum_a sigma_a v_a u_a^T            sums over positions too

``PlainSVD`` takes the singular directions of D. ``Whitened`` takes those of A^1/2 D G^1/2, with A and G the Kronecker factors
of the curvature: sigma_a^2 / 2 is then what dropping direction a costs, whichever others are dropped, as far as the
curvature is A (x) G. Only the smaller side has its eigenvectors taken. V = D w and U = w^T with w an orthonormal basis of
that side (whitened: V = D G^1/2 w, U = w^T G^-1/2): all directions together give D back to the last bits, also those that
float32 sees only as noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp

from ssm_nn.inference.checks import check_positive
from ssm_nn.inference.perturbation.blocks import Block, Factors

__all__ = ["Directions", "PlainSVD", "Whitened", "least_squares_scales", "residual"]

Array = Any

NEAR_ZERO = 1e-3  # of the usual length of a row: below it, a row's scale is held at 1


class Sides(NamedTuple):
    """Kronecker factors of one kernel: A (I, I) of its inputs, G (O, O) of the gradients at its outputs, by example."""

    inputs: Array
    outputs: Array


class Directions(Protocol):
    """How a residual is taken apart; hashable and pure."""

    @property
    def needs_sides(self) -> bool:
        """Whether ``split`` reads the Kronecker factors."""
        ...

    def split(self, block: Block, difference: Array, sides: Sides | None) -> tuple[Array, Array, Array]:
        """sigma (k,) descending, V (I, k), U (k, O) with ``V U`` the best of that rank; k is the block's cap."""
        ...


def least_squares_scales(block: Block, free: Array, base: Array, sweeps: int = 1) -> tuple[Array, Array]:
    """s (I,) and r (O,), near 1 where the base is next to zero. One sweep is the paper's."""
    target, start = block.matrix(free), block.matrix(base)
    inputs, outputs = jnp.ones(block.num_inputs, start.dtype), jnp.ones(block.num_outputs, start.dtype)

    def ratio(over: Array, under: Array) -> Array:
        # a row of zeros but for rounding (a pixel that is always black) would be scaled by millions
        ridge = NEAR_ZERO**2 * jnp.mean(under) + jnp.finfo(under.dtype).tiny
        return (over + ridge) / (under + ridge)

    for _ in range(sweeps):
        rows = inputs[:, None] * start
        outputs = ratio(jnp.sum(target * rows, axis=(0, 1)), jnp.sum(rows * rows, axis=(0, 1)))
        columns = start * outputs
        inputs = ratio(jnp.sum(target * columns, axis=(0, 2)), jnp.sum(columns * columns, axis=(0, 2)))
    return inputs, outputs


def residual(block: Block, free: Array, base: Array, factors: Factors) -> Array:
    """D (I, O): what the scales leave, in the mean over the window."""
    return jnp.mean(block.matrix(free) - block.scaled(base, factors), axis=0)


@dataclass(frozen=True)
class PlainSVD:
    """The singular directions of the residual: the paper's."""

    needs_sides = False

    def split(self, block: Block, difference: Array, sides: Sides | None) -> tuple[Array, Array, Array]:
        """Of D."""
        del sides
        return _split(difference, block.cap)


@dataclass(frozen=True)
class Whitened:
    """The singular directions in the metric of the curvature.

    Args:
        damping: added to A and G, as a share of their mean eigenvalue: directions that no example sees would else cost
            nothing at any size, and be divided by.
    """

    damping: float = 1e-3

    needs_sides = True

    def __post_init__(self):
        check_positive(damping=self.damping)

    def split(self, block: Block, difference: Array, sides: Sides | None) -> tuple[Array, Array, Array]:
        """Of ``A^1/2 D G^1/2``, taken back by the inverse roots."""
        assert sides is not None
        if block.num_inputs < block.num_outputs:
            sigma, right, left = self._tall(difference.T, Sides(sides.outputs, sides.inputs), block.cap)
            return sigma, *_balanced(left.T, right.T)
        sigma, left, right = self._tall(difference, sides, block.cap)
        return sigma, *_balanced(left, right)

    def _tall(self, difference: Array, sides: Sides, count: int) -> tuple[Array, Array, Array]:
        """With w the eigenvectors of ``G^1/2 D^T A D G^1/2``: ``V = D G^1/2 w`` and ``U = w^T G^-1/2``. A needs no root."""
        wide = sides.inputs + self._level(sides.inputs) * jnp.eye(len(sides.inputs), dtype=difference.dtype)
        values, vectors = jnp.linalg.eigh(sides.outputs)
        roots = jnp.sqrt(jnp.maximum(values, 0.0) + self._level(sides.outputs))
        moved = difference @ ((vectors * roots) @ vectors.T)
        basis = _leading(moved, wide @ moved, count)
        left = moved @ basis
        sigma = jnp.sqrt(jnp.maximum(jnp.sum(left * (wide @ left), axis=0), 0.0))
        return sigma, left, basis.T @ ((vectors / roots) @ vectors.T)

    def _level(self, side: Array) -> Array:
        return self.damping * jnp.maximum(jnp.mean(jnp.diagonal(side)), jnp.finfo(side.dtype).tiny)


def _split(matrix: Array, count: int) -> tuple[Array, Array, Array]:
    """By the eigenvectors of the smaller Gram matrix, exact as a product: D = (D w) w^T for any orthonormal w."""
    if matrix.shape[0] < matrix.shape[1]:
        sigma, right, left = _split(matrix.T, count)
        return sigma, left.T, right.T
    basis = _leading(matrix, matrix, count)
    left = matrix @ basis
    sigma = jnp.sqrt(jnp.sum(jnp.square(left), axis=0))
    return sigma, *_balanced(left, basis.T)


def _leading(one: Array, other: Array, count: int) -> Array:
    """Eigenvectors of ``one^T other``, symmetric and >= 0, that belong to its largest eigenvalues, these first."""

    def scaled(matrix: Array) -> Array:  # squares of small numbers would be zero
        peak = jnp.max(jnp.abs(matrix))
        return matrix / jnp.where(peak > 0, peak, 1.0)

    return jnp.linalg.eigh(scaled(one).T @ scaled(other))[1][:, ::-1][:, :count]


def _balanced(left: Array, right: Array) -> tuple[Array, Array]:
    """The same products with columns and rows of equal length: U = u sqrt(sigma), V = sqrt(sigma) v."""
    a, b = jnp.linalg.norm(left, axis=0), jnp.linalg.norm(right, axis=1)
    both = (a > 0) & (b > 0)
    factor = jnp.where(both, jnp.sqrt(jnp.where(both, b, 1.0) / jnp.where(both, a, 1.0)), 0.0)
    return left * factor, right * jnp.where(both, 1 / jnp.where(both, factor, 1.0), 0.0)[:, None]
