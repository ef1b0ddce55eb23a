"""Preconditioned conjugate gradients that stop at rounding, and at a direction in which the matrix is not positive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["conjugate_gradients"]

Array = Any

# roundings that a sum over the weights may lose: a smaller residual need not be reached
_ROUNDINGS = 100


def conjugate_gradients(
    matvec: Callable[[Array], Array], right: Array, precondition: Callable[[Array], Array], most_steps: int
) -> tuple[Array, Array]:
    """``H^-1 right``, and whether no direction of negative curvature was met.

    Args:
        matvec: ``H z`` (P,) from a direction (K, P): z in the first row, below it what a product with H also reads.
        right: (P,).
        precondition: a residual (P,) -> a direction (K, P).
        most_steps: at most.
    """
    tolerance = (_ROUNDINGS * jnp.finfo(right.dtype).eps) ** 2

    def unfinished(carry: tuple[Any, ...]) -> Array:
        _, _, _, size, count, rising = carry
        return (size > tolerance * start) & (count < most_steps) & rising

    def iterate(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        x, residual, direction, size, count, _ = carry
        image = matvec(direction)
        bend = direction[0] @ image
        rising = bend > 0
        length = jnp.where(rising, size / jnp.where(rising, bend, 1.0), jnp.where(count == 0, 1.0, 0.0))
        x, residual = x + length * direction[0], residual - length * image
        white = precondition(residual)
        after = residual @ white[0]
        return x, residual, white + after / size * direction, after, count + 1, rising

    white = precondition(right)
    start = right @ white[0]
    carry = (jnp.zeros_like(right), right, white, start, jnp.asarray(0), jnp.asarray(True))
    x, *_, rising = jax.lax.while_loop(unfinished, iterate, carry)
    return x, rising
