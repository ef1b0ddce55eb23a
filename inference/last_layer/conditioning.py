"""A batch of points enters a belief: the climb to its new mean, the information there, and the way back.

Pure functions of arrays, compiled once a shape, whichever engine calls; fit for ``jit`` and ``vmap``.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssm_nn.inference.last_layer.full_covariance import identity_plus_root, weighted_factor
from ssm_nn.inference.last_layer.head_likelihoods import HeadLikelihood
from ssm_nn.inference.last_layer.map_search import Found, climb_in_outputs, climb_in_weights, weighted
from ssm_nn.inference.last_layer.square_root import SquareRootInformation
from ssm_nn.inference.last_layer.structures import HeadBelief, HeadInformation

__all__ = ["Conditioned", "condition_few", "condition_many", "take_back"]

Array = Any


class Conditioned(NamedTuple):
    """The belief after some points.

    Attributes:
        mean: (K, D).
        belief: the covariance.
        found: the climb: outputs f (n, K) at the mean, steps, decrement.
        log_evidence: Laplace's approximation of ``log p(y | all points before)``, exact for Gaussian outputs in an exact
            structure.
    """

    mean: Array
    belief: HeadBelief
    found: Found
    log_evidence: Array


@jax.jit
def condition_few(
    belief: HeadBelief,
    mean: Array,
    phi: Array,
    likelihood: HeadLikelihood,
    y: Any,
    weight: Array,
    max_steps: Array | int = 100,
) -> Conditioned:
    """The iterated update with n points in the dual: O(n^3 K^3) a step of Newton, and one pass over the covariance.

    Args:
        belief, mean: before; S and (K, D), whitened.
        phi: (n, D), whitened.
        y: labels of n points.
        weight: (n,), >= 0.
        max_steps: of Newton; 1 is the extended Kalman filter's update, not iterated.
    """
    kernel = belief.kernel(phi)
    found = climb_in_outputs(kernel, phi @ mean.T, likelihood, y, weight, max_steps)
    factor = weighted_factor(likelihood, found.outputs, y, weight)
    core = jnp.einsum("nkb,nkml,mlc->nbmc", factor, kernel, factor)
    size = factor.shape[0] * factor.shape[2]
    root = identity_plus_root(core.reshape(size, size))
    log_evidence = found.log_likelihood - 0.5 * found.square - jnp.sum(jnp.log(jnp.diagonal(root)))
    moved = mean + belief.lift(phi, found.position)
    after = belief.absorb(phi, likelihood, found.outputs, y, weight)
    if isinstance(belief, SquareRootInformation) and isinstance(after, SquareRootInformation):
        moved = after.corrected(belief, mean, moved, phi, likelihood, y, weight)
        found = found._replace(outputs=phi @ moved.T)
    return Conditioned(moved, after, found, log_evidence)


@jax.jit
def condition_many(
    information: HeadInformation,
    mean: Array,
    start: Array,
    phi: Array,
    likelihood: HeadLikelihood,
    y: Any,
    weight: Array,
    max_steps: Array | int = 100,
) -> Conditioned:
    """The same in the weights, for many points; the climb begins at ``start`` (K, D)."""
    found = climb_in_weights(information, mean, start, phi, likelihood, y, weight, max_steps)
    belief, after = information.absorbed(phi, likelihood, found.outputs, y, weight)
    gain = 0.5 * (after - information.log_determinant())
    return Conditioned(found.position, belief, found, found.log_likelihood - 0.5 * found.square + gain)


@jax.jit
def take_back(
    belief: HeadBelief, mean: Array, phi: Array, likelihood: HeadLikelihood, f: Array, y: Any, weight: Array
) -> tuple[Array, HeadBelief]:
    """Mean and belief without points that stand in it linearised at f (n, K):

        S_-^{-1} = S^{-1} - J^T Lambda J,    m_- = m + S_- J^T [Lambda (J m - f) - g]

    Not finite where the points do not stand in it.
    """
    before = belief.release(phi, likelihood, f, y, weight)
    pull = likelihood.weigh(f, y, phi @ mean.T - f) - likelihood.gradient(f, y)
    return mean + before.lift(phi, weighted(weight, pull)), before


@partial(jax.jit, static_argnums=(1,))
def grown(belief: HeadBelief, num_new: int) -> HeadBelief:
    """With outputs of which nothing is known."""
    return belief.grown(num_new)


information_of = jax.jit(lambda belief: belief.information())
