"""Arrays with the parameter axis first over several devices: the axes of a mesh, and the one product that XLA cannot split.

Every read-out of a precision is elementwise along P or a sum over it, which XLA's partitioner shards by itself and joins by
sums of (R, R) numbers. A QR decomposition it would gather on every device; ``tall_skinny_qr`` does not.

The mesh is the one in context (``jax.set_mesh``); without one, or without an axis ``weights``, everything is on one device.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

__all__ = ["DATA", "WEIGHTS", "along_weights", "on_every_device", "shards_of_weights", "tall_skinny_qr"]

Array = Any

WEIGHTS, DATA = "weights", "data"


def shards_of_weights() -> int:
    """Number of parts of the parameter axis on the mesh in context; 1 where there is none."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(WEIGHTS, 1)


def along_weights(tree: Any, size: int) -> Any:
    """The pytree with every array of ``size`` rows laid out along the mesh's axis ``weights``, all others on every device."""
    if shards_of_weights() == 1:
        return tree

    def placed(leaf: Array) -> Array:
        rows = leaf.ndim > 0 and leaf.shape[0] == size and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.lax.with_sharding_constraint(leaf, PartitionSpec(WEIGHTS) if rows else PartitionSpec())

    return jax.tree.map(placed, tree)


def on_every_device(tree: Any) -> Any:
    """The pytree whole on every device of the mesh in context, for what is as small as the data; as it is without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, PartitionSpec())


def tall_skinny_qr(tall: Array) -> tuple[Array, Array]:
    """``tall = Q R`` for tall (P, K): Q (P, min(P, K)) orthonormal, R upper trapezoidal.

    On a mesh, each device decomposes its own rows, the triangles (K, K) meet on all of them, and each turns its own rows of Q:

        tall_d = Q_d R_d,   [R_1; ..; R_n] = [S_1; ..; S_n] R,   Q = [Q_1 S_1; ..; Q_n S_n]

    as stable as Householder's on one device. Source: Demmel, Grigori, Hoemmen, Langou, SIAM J. Sci. Comput. 34 (2012).
    """
    shards = shards_of_weights()
    if shards == 1 or tall.shape[0] % shards:
        return jnp.linalg.qr(tall)

    def of_own_rows(own: Array) -> tuple[Array, Array]:
        basis, triangle = jnp.linalg.qr(own)
        turns, joint = jnp.linalg.qr(jax.lax.all_gather(triangle, WEIGHTS, tiled=True))
        height = triangle.shape[0]
        here = jax.lax.dynamic_slice_in_dim(turns, jax.lax.axis_index(WEIGHTS) * height, height)
        return basis @ here, joint

    split = PartitionSpec(WEIGHTS)
    # every device computes the same joint triangle, which the checker cannot know
    return jax.shard_map(of_own_rows, in_specs=split, out_specs=(split, PartitionSpec()), check_vma=False)(tall)
