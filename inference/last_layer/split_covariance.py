"""The whole covariance S of a head's weights with its rows over the devices of a mesh, split by features.

Device d of s keeps S[:, d-th part of D, :, :]. Points come in by Woodbury's identity alone, which factorises nothing larger
than their outputs:

    S' = S - T T^T,   T = S U (I + U^T S U)^-T/2 (K, D, M) split likewise

In T T^T each device's rows meet the rows of T of all others: these go round the ring of devices, one s-th of T at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ssm_nn.inference.last_layer.full_covariance import identity_plus_root, rounding_of, weighted_factor
from ssm_nn.inference.last_layer.head_likelihoods import HeadLikelihood
from ssm_nn.weight_mesh import WEIGHTS, shards_of_weights

__all__ = ["SplitCovariance", "along_features", "half_solved", "minus_square"]

Array = Any

_ROWS = PartitionSpec(None, WEIGHTS)


def along_features(array: Array) -> Array:
    """(K, D, ...) with D along the mesh's axis ``weights``."""
    return jax.lax.with_sharding_constraint(array, _ROWS)


def half_solved(columns: Array, core: Array, sign: int) -> tuple[Array, Array]:
    """``columns (I + sign core)^-T/2`` and ``log |I + sign core|``; columns (K, D, M), core (M, M).

    By the inverse of the small root: a triangular solve of split columns would bring all of them to every device. Not finite
    where I - core is not positive definite.
    """
    identity = jnp.eye(core.shape[0], dtype=core.dtype)
    root = identity_plus_root(core) if sign > 0 else jnp.linalg.cholesky(identity - core)
    inverse = jax.scipy.linalg.solve_triangular(root, identity, lower=True)
    log_determinant = 2 * jnp.sum(jnp.log(jnp.diagonal(root)))
    # less the derivative of what the root has added to the identity: small for one direction, not for all of a part
    corrected = log_determinant - rounding_of(core) * jnp.sum(jnp.square(inverse))
    return along_features(columns @ inverse.T), corrected


def minus_square(blocks: Array, turned: Array, sign: int) -> Array:
    """``S - sign T T^T`` for blocks (K, D, K, D) and T (K, D, M), both split along the first D."""
    shards = shards_of_weights()
    size = turned.shape[1] // shards
    ring = [(device, (device + 1) % shards) for device in range(shards)]

    def of_own_rows(own: Array, rows: Array) -> Array:
        here = jax.lax.axis_index(WEIGHTS)

        def turn(number: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            own, passing = carry
            place = (here - number) % shards * size
            part = jax.lax.dynamic_slice_in_dim(own, place, size, 3)
            part = part - sign * jnp.einsum("kdm,lem->kdle", rows, passing)
            own = jax.lax.dynamic_update_slice_in_dim(own, part, place, 3)
            return own, jax.lax.ppermute(passing, WEIGHTS, ring)

        return jax.lax.fori_loop(0, shards, turn, (own, rows))[0]

    return jax.shard_map(of_own_rows, in_specs=(_ROWS, _ROWS), out_specs=_ROWS)(blocks, turned)


@partial(jax.tree_util.register_dataclass, data_fields=["blocks"], meta_fields=[])
@dataclass(frozen=True)
class SplitCovariance:
    """S (K, D, K, D), its first D split; what a ``HeadBelief`` offers without a factor of S."""

    blocks: Array

    @property
    def num_outputs(self) -> int:
        """K."""
        return self.blocks.shape[0]

    @property
    def matrix(self) -> Array:
        """(K D, K D), as ``FullCovariance`` has it, on one device."""
        size = self.blocks.shape[0] * self.blocks.shape[1]
        return self.blocks.reshape(size, size)

    def lift(self, phi: Array, a: Array) -> Array:
        """``S J^T a`` (K, D)."""
        return jnp.einsum("kdle,le->kd", self.blocks, a.T @ phi)

    def absorb_few(
        self, phi: Array, likelihood: HeadLikelihood, f: Array, y: Any, weight: Array
    ) -> tuple[SplitCovariance, Array]:
        """With the information of points that are linearised at f; and the change of ``log |S|``."""
        return self._changed(phi, weighted_factor(likelihood, f, y, weight), 1)

    def release(self, phi: Array, likelihood: HeadLikelihood, f: Array, y: Any, weight: Array) -> SplitCovariance:
        """Without it again; not finite where the points were never absorbed."""
        return self._changed(phi, weighted_factor(likelihood, f, y, weight), -1)[0]

    def _changed(self, phi: Array, factor: Array, sign: int) -> tuple[SplitCovariance, Array]:
        num, _, kinds = factor.shape
        lifted = jnp.einsum("kdle,ne->kdnl", self.blocks, phi)
        wide = jnp.einsum("kdnl,nlc->kdnc", lifted, factor).reshape(*self.blocks.shape[:2], num * kinds)
        wide = along_features(wide)
        between = jnp.einsum("nd,kdm->nkm", phi, wide)
        core = jnp.einsum("nkm,nkc->ncm", between, factor).reshape(num * kinds, num * kinds)
        turned, change = half_solved(wide, core, sign)
        return replace(self, blocks=minus_square(self.blocks, turned, sign)), -sign * change

    def output_covariance(self, phi: Array) -> Array:
        """(n, K, K), one pair of outputs at a time."""
        size = self.num_outputs
        first, second = jnp.triu_indices(size)

        def one(pair):
            row, column = pair
            # over the columns, which every device has, before the rows, which are split
            return jnp.sum((phi @ self.blocks[row, :, column, :].T) * phi, axis=1)

        upper = jax.lax.map(one, (first, second))
        whole = jnp.zeros((size, size, phi.shape[0]), phi.dtype)
        return whole.at[first, second].set(upper).at[second, first].set(upper).transpose(2, 0, 1)

    def output_variance(self, phi: Array) -> Array:
        """Diagonals of ``output_covariance`` (n, K)."""

        def one(k):
            return jnp.sum((phi @ self.blocks[k, :, k, :].T) * phi, axis=1)

        return jax.lax.map(one, jnp.arange(self.num_outputs)).T

    def variance(self) -> Array:
        """Of each weight (K, D)."""
        return jnp.einsum("kdkd->kd", self.blocks)

    def trace(self) -> Array:
        """``tr S``."""
        return jnp.sum(self.variance())

    def grown(self, num_new: int) -> SplitCovariance:
        """New outputs, independent of the old and as uncertain as at first."""
        size, width = self.blocks.shape[:2]
        pads = (0, num_new), (0, 0), (0, num_new), (0, 0)
        new = jnp.diag(jnp.arange(size + num_new) >= size).astype(self.blocks.dtype)
        fresh = jnp.einsum("kl,de->kdle", new, jnp.eye(width, dtype=self.blocks.dtype))
        return replace(self, blocks=along_features(jnp.pad(self.blocks, pads) + fresh))
