"""The noise of one step given all tasks, w = theta_{t+1} - (a theta_t + b): the disturbance smoother.

With N(m', Lambda'^-1) the prediction of task t+1, X the information about theta_{t+1} in its own data and all later ones, and
m^s the smoothed mean,

    D = (Lambda'^-1 + X^-1)^-1 = Lambda' - Lambda' S^s Lambda',    S^s = (Lambda' + X)^-1 the smoothed covariance
    E[w]      = q Lambda' (m^s - m')
    Var[w]    = q - q^2 diag D
    Cov[w, x] = -q diag(D A Lambda_x^-1),    x = theta_t in the coordinates in which the gain acts

No difference of two beliefs is taken, so that nothing cancels, and noise 0 gives exactly 0. Source: de Jong 1989, Koopman
1993 (the disturbance smoother), here by precisions.
"""

from __future__ import annotations

from dataclasses import replace
from functools import singledispatch
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from ssm_nn.inference.beliefs import Belief
from ssm_nn.inference.smoothing import Smoothed
from ssm_nn.moments import Moments
from ssm_nn.precision import permuted, step_mean_vector
from ssm_nn.precision_dense import DensePrecision
from ssm_nn.precision_diagonal import DiagonalPrecision
from ssm_nn.precision_kronecker import KroneckerEigen
from ssm_nn.precision_low_rank import DiagonalPlusLowRank

__all__ = ["Disturbance", "disturbances", "parallel_sum", "product_diagonal"]

Array = Any


class Disturbance(NamedTuple):
    """Moments of one step's noise w and of what it acts on, x = O theta_t, given all tasks; (P,) each.

    Attributes:
        noise: the variance q that the kernel gave w.
        square: E[w^2]; 0 where q is 0.
        product: E[w x].
        before: E[x^2].
    """

    noise: Array
    square: Array
    product: Array
    before: Array


def disturbances(smoothed: Smoothed) -> list[Disturbance]:
    """One Disturbance for each step between tasks; O(T P R^2). Exact where the filter is."""
    beliefs, infos = smoothed.filtered.beliefs, smoothed.filtered.infos
    return [
        _of_step(beliefs[t], infos[t + 1].moments, infos[t + 1].site, smoothed.messages[t + 1], *smoothed_pair)
        for t, smoothed_pair in enumerate(
            zip(smoothed.means[:-1], smoothed.beliefs[:-1], smoothed.means[1:], strict=True)
        )
    ]


@jax.jit
def _of_step(
    belief: Belief, moments: Moments, site: Any, message: Any, mean: Array, smoothed: Belief, mean_after: Array
) -> Disturbance:
    precision = permuted(belief.precision, moments)
    prediction = precision.predict(moments)
    shared = parallel_sum(prediction, site if message is None else message.add(site))
    noise = moments.noise
    pull = noise * prediction.matvec(mean_after - step_mean_vector(moments, belief.mean))
    # D is at most 1 / q: rounding alone makes the variance negative
    variance = noise * jnp.maximum(1 - noise * shared.precision_diagonal(), 0.0)
    x = mean if moments.permutation is None else moments.permutation(mean)
    spread = permuted(smoothed.precision, moments).variance()
    covariance = -noise * product_diagonal(shared, moments.gain, precision)
    return Disturbance(noise, jnp.square(pull) + variance, pull * x + covariance, jnp.square(x) + spread)


@singledispatch
def parallel_sum(precision: Any, information: Any) -> Any:
    """``(Lambda^-1 + X^-1)^-1`` for a precision Lambda and positive semi-definite X of one structure, X singular or not."""
    raise ValueError(f"parallel_sum knows no {type(precision).__name__}; register one for it")


@parallel_sum.register
def _(precision: DensePrecision, information: Any) -> DensePrecision:
    # X - X (Lambda + X)^-1 X in the metric of Lambda, where X's large eigenvalues cancel nothing:
    # L [I - (I + Y)^-1] L^T, Y = L^-1 X L^-T, by Y's eigenvalues y / (1 + y)
    root = jnp.linalg.cholesky(precision.matrix)
    half = solve_triangular(root, information.matrix, lower=True)
    values, vectors = jnp.linalg.eigh(solve_triangular(root, half.T, lower=True))
    values = jnp.maximum(values, 0.0)
    turned = root @ (vectors * jnp.sqrt(values / (1 + values)))
    return DensePrecision(turned @ turned.T)


@parallel_sum.register
def _(precision: DiagonalPrecision, information: Any) -> DiagonalPrecision:
    d, x = precision.diagonal, information.diagonal
    return DiagonalPrecision(d * (x / (d + x)))


@parallel_sum.register
def _(precision: DiagonalPlusLowRank, information: Any) -> DiagonalPlusLowRank:
    """``diag(D f) + C K^-1 C^T``, f = x / (D + x), C = [-f U, (1 - f) W], ``K = I + Z^T diag(1 / (D + x)) Z``, Z = [U W]."""
    total = precision.diagonal + information.diagonal
    share = (information.diagonal / total)[:, None]
    both = jnp.concatenate([precision.factor, information.factor], axis=1)
    root = jnp.linalg.cholesky(jnp.eye(both.shape[1], dtype=both.dtype) + both.T @ (both / total[:, None]))
    inverse = solve_triangular(root, jnp.eye(root.shape[0], dtype=root.dtype), lower=True)
    turned = jnp.concatenate([-share * precision.factor, (1 - share) * information.factor], axis=1) @ inverse.T
    return DiagonalPlusLowRank(precision.diagonal * share[:, 0], turned)


@parallel_sum.register
def _(precision: KroneckerEigen, information: Any) -> KroneckerEigen:
    """``d = l x / (l + x)`` in the information's basis, l the diagonal of Lambda there, as the filter's own update takes it.

    Exact where the two share a basis.
    """
    blocks = []
    for one, two in zip(precision.blocks, information.blocks, strict=True):
        here = one.in_basis(two.inputs, two.outputs)
        blocks.append(two._replace(values=here * (two.values / (here + two.values))))
    return replace(information, blocks=tuple(blocks), rest=parallel_sum(precision.rest, information.rest))


@singledispatch
def product_diagonal(information: Any, gain: Array, precision: Any) -> Array:
    """``diag(D A Lambda^-1)`` (P,) for D and Lambda of one structure, A = diag(gain)."""
    raise ValueError(f"product_diagonal knows no {type(information).__name__}; register one for it")


@product_diagonal.register
def _(information: DensePrecision, gain: Array, precision: Any) -> Array:
    return jnp.diagonal(precision.solve(gain[:, None] * information.matrix))


@product_diagonal.register
def _(information: DiagonalPrecision, gain: Array, precision: Any) -> Array:
    return information.diagonal * gain / precision.diagonal


@product_diagonal.register
def _(information: DiagonalPlusLowRank, gain: Array, precision: Any) -> Array:
    along = precision.solve(gain[:, None] * information.factor)
    return information.diagonal * gain * precision.variance() + jnp.sum(information.factor * along, axis=1)


@product_diagonal.register
def _(information: KroneckerEigen, gain: Array, precision: Any) -> Array:
    """A layer's trace, spread evenly over its weights; exact outside the layers.

    The diagonal of a product in two bases takes (I O)^2 numbers a layer, its trace I O. With one gain and one noise a layer,
    which is all that the structure carries, nothing but sums over layers is asked for.
    """
    matrices, places = [], precision.places
    for one, two, layer, step in zip(
        information.blocks, precision.blocks, places.layers, places.firsts(gain), strict=True
    ):
        inverse = two._replace(values=1 / two.values).in_basis(one.inputs, one.outputs)
        trace = step * jnp.sum(one.values * inverse)
        matrices.append(jnp.full_like(inverse, trace / layer.size))
    return places.join(matrices, product_diagonal(information.rest, places.rest_of(gain), precision.rest))
