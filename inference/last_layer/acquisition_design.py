"""Optimal designs: what labels are expected to do to the covariance S of the weights, in closed form.

With J_n the Jacobian of the outputs of point n and ``Lambda_n = L_n L_n^T`` their information, a label changes
``S^-1 <- S^-1 + J_n^T Lambda_n J_n``, whatever the label is.

``InformationGain``   1/2 log |I + L_n^T V_n L_n|, V_n = J_n S J_n^T: how much log |S| falls, BALD's closed form. Exact for
                      Gaussian labels; for others where the outputs' variance is small.
``BAIT``              the least tr(F S'), F = 1/M sum_e J_e^T Lambda_e J_e over points e of the pool, after a whole batch: grown
                      greedily to more points than are asked for, then pruned (Ash, Goel, Krishnamurthy, Kakade 2021,
                      arXiv 2106.09675)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssm_nn.inference.checks import check_count
from ssm_nn.inference.last_layer.acquisition import Pool, Scored, Strategy, check_size, largest, pseudo_labels
from ssm_nn.inference.last_layer.full_covariance import FullCovariance
from ssm_nn.inference.last_layer.head_likelihoods import HeadLikelihood
from ssm_nn.inference.last_layer.shared_covariance import SharedCovariance, isotropic_weight
from ssm_nn.inference.last_layer.square_root import SquareRootInformation
from ssm_nn.inference.last_layer.structures import HeadBelief

__all__ = ["BAIT", "InformationGain", "absorbed", "fisher_probes", "removal_costs", "trace_gains"]

Array = Any

_TOGETHER = 32  # candidates whose (probes, K) arrays are made at a time


@dataclass(frozen=True)
class InformationGain(Scored):
    """``1/2 log |I + L^T V L|`` in nats; any likelihood."""

    def score(self, pool: Pool, key: Array) -> np.ndarray:
        """(n,), >= 0."""
        return np.asarray(_information_gains(pool.belief, *pool.at_mean))[: len(pool.candidates)]


@dataclass(frozen=True)
class BAIT(Strategy):
    """The batch after which the outputs of the pool are expected to be known best, weighted by their information.

    Any likelihood. Structures that cannot take a single point back exactly (Kronecker, diagonal) are grown to the batch and
    not pruned.

    Args:
        num_evaluated: points of the pool in F, drawn anew for each batch; all of them where there are no more.
        num_probes: F is exact where it has at most so many columns, M times the rank of Lambda; else it is the mean over so
            many random combinations of them, without bias.
        oversampling: grown to so many times the batch before it is pruned.
    """

    num_evaluated: int = 100
    num_probes: int = 1000
    oversampling: int = 2

    def __post_init__(self):
        check_count(num_evaluated=self.num_evaluated, num_probes=self.num_probes, oversampling=self.oversampling)

    def select(self, pool: Pool, size: int, key: Array) -> np.ndarray:
        """Those that are left, in the order in which they were taken."""
        check_size(pool, size)
        drawing, probing, ties = jax.random.split(key, 3)
        count = min(self.num_evaluated, len(pool.features))
        evaluated = np.asarray(jax.random.choice(drawing, len(pool.features), (count,), replace=False))
        phi_e = jnp.asarray(pool.features[evaluated])
        probes = fisher_probes(pool.likelihood, phi_e, pool.mean, self.num_probes, probing)
        belief, candidates = pool.belief, len(pool.candidates)
        grown = min(self.oversampling * size, candidates) if isinstance(belief, _PRUNABLE) else size
        chosen: list[int] = []
        for step in range(grown):
            gains = np.array(trace_gains(belief, *pool.at_mean, phi_e, probes))[:candidates]
            gains[chosen] = -np.inf
            place = int(largest(gains, 1, jax.random.fold_in(ties, step))[0])
            chosen.append(place)
            belief = absorbed(belief, *pool.at_mean, place)
        while len(chosen) > size:
            places = np.resize(chosen, grown)  # one shape is compiled, whatever is left
            costs = np.asarray(removal_costs(belief, *pool.at_mean, places, phi_e, probes))[: len(chosen)]
            belief = _released(belief, *pool.at_mean, chosen.pop(int(np.argmin(costs))))
        return pool.candidates[chosen]


_PRUNABLE = (FullCovariance, SquareRootInformation, SharedCovariance)


@partial(jax.jit, static_argnums=3)
def fisher_probes(likelihood: HeadLikelihood, phi_e: Array, mean: Array, num_probes: int, key: Array) -> Array:
    """A (R, M, K) with ``F = sum_r z_r z_r^T, z_r = J^T a_r``: the columns of L_e / sqrt(M), or random sums of them."""
    f = phi_e @ mean.T
    factor = likelihood.factor(f, pseudo_labels(likelihood, f)) / np.sqrt(f.shape[0])
    num_points, _, rank = factor.shape
    if num_points * rank <= num_probes:
        eye = jnp.eye(num_points, dtype=f.dtype)
        return jnp.einsum("ekc,eg->ecgk", factor, eye).reshape(num_points * rank, num_points, -1)
    signs = jax.random.rademacher(key, (num_probes, num_points, rank), f.dtype) / np.sqrt(num_probes)
    return jnp.einsum("ekc,rec->rek", factor, signs)


@jax.jit
def trace_gains(
    belief: HeadBelief, phi: Array, likelihood: HeadLikelihood, f: Array, y: Any, phi_e: Array, probes: Array
) -> Array:
    """How much a label of each point (n,) is expected to lower ``tr(F S)``:

    tr[(I + L^T V L)^-1 L^T J S F S J^T L]
    """
    return _trace_changes(belief, phi, likelihood, f, y, phi_e, probes, 1)


@jax.jit
def removal_costs(
    belief: HeadBelief,
    phi: Array,
    likelihood: HeadLikelihood,
    f: Array,
    y: Any,
    places: Array,
    phi_e: Array,
    probes: Array,
) -> Array:
    """How much ``tr(F S)`` would grow without each of the points at ``places`` (b,), whose expected information S has."""
    return _trace_changes(belief, phi[places], likelihood, f[places], y[places], phi_e, probes, -1)


def _trace_changes(
    belief: HeadBelief, phi: Array, likelihood: HeadLikelihood, f: Array, y: Any, phi_e: Array, probes: Array, sign: int
) -> Array:
    if isinstance(belief, SharedCovariance):
        # all is a multiple of the identity in the outputs, and one (D, D) matrix has S F S summed over them
        c = isotropic_weight(likelihood, f, y, jnp.ones(len(f), f.dtype))
        turned = phi_e @ belief.covariance
        image = phi @ (turned.T @ jnp.einsum("rek,rgk->eg", probes, probes) @ turned)
        variance = belief.output_variance(phi)[:, 0]
        return c * jnp.sum(image * phi, axis=1) / (1 + sign * c * variance)
    lifted = jax.vmap(lambda a: belief.lift(phi_e, a))(probes)  # S z_r (R, K, D)
    factor = likelihood.factor(f, y)
    covariance = belief.output_covariance(phi)
    identity = jnp.eye(factor.shape[2], dtype=phi.dtype)

    def of_point(point):
        own_phi, own_factor, own_covariance = point
        seen = (lifted @ own_phi) @ own_factor  # z_r^T S J^T L (R, C)
        inner = identity + sign * own_factor.T @ own_covariance @ own_factor
        solved = jax.scipy.linalg.solve(inner, seen.T, assume_a="pos")
        return jnp.sum(solved * seen.T)

    return jax.lax.map(of_point, (phi, factor, covariance), batch_size=_TOGETHER)


@jax.jit
def _information_gains(belief: HeadBelief, phi: Array, likelihood: HeadLikelihood, f: Array, y: Any) -> Array:
    if isinstance(belief, SharedCovariance):
        c = isotropic_weight(likelihood, f, y, jnp.ones(len(f), f.dtype))
        return 0.5 * belief.num_outputs * jnp.log1p(c * belief.output_variance(phi)[:, 0])
    factor = likelihood.factor(f, y)
    inner = jnp.einsum("nkb,nkl,nlc->nbc", factor, belief.output_covariance(phi), factor)
    root = jnp.linalg.cholesky(inner + jnp.eye(inner.shape[1], dtype=inner.dtype))
    return jnp.sum(jnp.log(jnp.diagonal(root, axis1=1, axis2=2)), axis=1)


@jax.jit
def absorbed(
    belief: HeadBelief, phi: Array, likelihood: HeadLikelihood, f: Array, y: Any, place: Array | int
) -> HeadBelief:
    """The covariance that the label of the point at ``place`` is expected to leave, linearised at f (n, K)."""
    phi, f, y = (jax.lax.dynamic_slice_in_dim(array, place, 1) for array in (phi, f, y))
    return belief.absorb(phi, likelihood, f, y, jnp.ones(1, f.dtype))


@jax.jit
def _released(
    belief: HeadBelief, phi: Array, likelihood: HeadLikelihood, f: Array, y: Any, place: Array | int
) -> HeadBelief:
    phi, f, y = (jax.lax.dynamic_slice_in_dim(array, place, 1) for array in (phi, f, y))
    return belief.release(phi, likelihood, f, y, jnp.ones(1, f.dtype))
