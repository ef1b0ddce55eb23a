"""Arrays with the parameter axis first over several devices: the axes of a mesh, and what XLA cannot split by itself.

Every read-out of a precision is elementwise along P or a sum over it, which XLA's partitioner shards by itself and joins by
sums of (R, R) numbers. A QR decomposition it would gather on every device; ``tall_skinny_qr`` does not. Eigenvectors it would
make on every device anew; ``eigenvectors_of_each`` makes those of each matrix once.

The mesh is the one in context (``jax.set_mesh``); without one, or without an axis ``weights``, everything is on one device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

__all__ = [
    "DATA",
    "WEIGHTS",
    "along_weights",
    "by_rows",
    "eigenvectors_of_each",
    "on_every_device",
    "shards_of_weights",
    "tall_skinny_qr",
]

Array = Any

WEIGHTS, DATA = "weights", "data"


def shards_of_weights() -> int:
    """Number of parts of the parameter axis on the mesh in context; 1 where there is none."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(WEIGHTS, 1)


def along_weights(tree: Any, size: int) -> Any:
    """The pytree with every array of ``size`` rows laid out along the mesh's axis ``weights``, all others on every device.

    A node that lays itself out, by a method ``along_weights``, does so.
    """
    if shards_of_weights() == 1:
        return tree

    def placed(leaf: Any) -> Any:
        if hasattr(leaf, "along_weights"):
            return leaf.along_weights()
        rows = leaf.ndim > 0 and leaf.shape[0] == size and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.lax.with_sharding_constraint(leaf, PartitionSpec(WEIGHTS) if rows else PartitionSpec())

    return jax.tree.map(placed, tree, is_leaf=lambda node: hasattr(node, "along_weights"))


def by_rows(leaf: Array) -> Array:
    """An array with its rows along the mesh's axis ``weights`` where their number allows it, else on every device."""
    split = leaf.shape[0] % shards_of_weights() == 0
    return jax.lax.with_sharding_constraint(leaf, PartitionSpec(WEIGHTS) if split else PartitionSpec())


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


def eigenvectors_of_each(matrices: Sequence[Array]) -> list[Array]:
    """Eigenvectors of symmetric matrices, as columns, eigenvalues rising.

    On a mesh each matrix is decomposed by one device, the largest first by the one that has least to do: all of them meet on
    every device while that lasts.
    """
    shards = shards_of_weights()
    if shards == 1 or not matrices:
        return [jnp.linalg.eigh(matrix)[1] for matrix in matrices]
    owner, burden = [0] * len(matrices), [0] * shards
    for k in sorted(range(len(matrices)), key=lambda k: -matrices[k].shape[0]):
        owner[k] = burden.index(min(burden))
        burden[owner[k]] += matrices[k].shape[0] ** 3

    def own(*matrices: Array) -> tuple[Array, ...]:
        here = jax.lax.axis_index(WEIGHTS)
        made = [
            jax.lax.cond(here == mine, lambda m: jnp.linalg.eigh(m)[1], jnp.zeros_like, matrix)
            for mine, matrix in zip(owner, matrices, strict=True)
        ]
        return tuple(jax.lax.psum(vectors, WEIGHTS) for vectors in made)

    everywhere = PartitionSpec()
    # only one device's are not zero, so that the sum is the same on all, which the checker cannot know
    return list(jax.shard_map(own, in_specs=everywhere, out_specs=everywhere, check_vma=False)(*matrices))
