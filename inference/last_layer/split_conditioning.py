"""A batch of any size enters a belief that is split over a mesh, in the dual throughout.

    a = argmax  sum_n w_n log p(y_n | f_n) - 1/2 a^T K a,   f = f_0 + K a,   K a = J S J^T a;       m' = m + S J^T a

K is a product, never an array, so that n has no limit; afterwards the points' information comes in part by part, linearised
where the climb of all of them ended. The same mode and covariance as with one device, where many points are climbed in the
weights: that needs an inverse of S, which no device holds whole.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ssm_nn.inference.last_layer.conditioning import Conditioned
from ssm_nn.inference.last_layer.diagonal_head import DiagonalHead, DiagonalInformation
from ssm_nn.inference.last_layer.full_covariance import Full, identity_plus_root, weighted_factor
from ssm_nn.inference.last_layer.head_likelihoods import HeadLikelihood
from ssm_nn.inference.last_layer.heads import Head
from ssm_nn.inference.last_layer.map_search import climb_by_products, weighted
from ssm_nn.inference.last_layer.shared_covariance import Shared, SharedCovariance
from ssm_nn.inference.last_layer.split_covariance import SplitCovariance, along_features
from ssm_nn.inference.last_layer.structures import HeadStructure
from ssm_nn.weight_mesh import DATA, WEIGHTS, on_every_device

__all__ = ["check_splits", "check_whole", "condition_in_parts", "padded_to_parts", "points_of_part", "split_prior"]

Array = Any

_OUTPUTS = 256  # of a part: what goes round the ring at once is K D / shards times as many numbers


def check_splits(structure: HeadStructure, head: Head) -> None:
    """Raise ValueError for what needs a factor of the whole covariance at every update."""
    if not isinstance(structure, Full | Shared | DiagonalHead):
        raise ValueError(
            f"mesh serves Full(), Shared() and DiagonalHead(), not {structure}, which decomposes whole matrices at every update"
        )
    if head.moving:
        raise ValueError("mesh serves heads that stand still between batches; run one that moves on one device")


def check_whole(what: str, mesh: Mesh | None) -> None:
    """Raise ValueError where ``what`` needs the whole covariance on one device."""
    if mesh is not None:
        raise ValueError(f"{what} needs the whole covariance on one device; an engine without a mesh is accepted")


def split_prior(structure: HeadStructure, shape: tuple[int, int], dtype: Any, mesh: Mesh) -> Any:
    """The identity (K, D, K, D), (D, D) or (K, D), each device making its own part."""
    size, width = shape
    along = NamedSharding(mesh, PartitionSpec(None, WEIGHTS))
    rows = NamedSharding(mesh, PartitionSpec(WEIGHTS))
    if isinstance(structure, DiagonalHead):
        return jax.jit(lambda: DiagonalInformation(jnp.ones(shape, dtype)), out_shardings=along)()

    def identity(size: int) -> Array:
        # by comparison: each device fills its own rows, and no whole array is cut up
        index = [jax.lax.broadcasted_iota(jnp.int32, (size, width, size, width), axis) for axis in range(4)]
        return ((index[0] == index[2]) & (index[1] == index[3])).astype(dtype)

    if isinstance(structure, Shared):
        covariance = jax.jit(lambda: identity(1)[0, :, 0], out_shardings=rows)
        return SharedCovariance(covariance(), covariance(), size)
    return SplitCovariance(jax.jit(lambda: identity(size), out_shardings=along)())


def points_of_part(num_outputs: int) -> int:
    """Points that come in together, a power of two."""
    return 1 << (max(_OUTPUTS // num_outputs, 1).bit_length() - 1)


def padded_to_parts(num_points: int, num_outputs: int) -> tuple[int, int]:
    """Points to which a batch is filled up, and points of a part: few shapes, and parts of equal length."""
    part = points_of_part(num_outputs)
    if num_points <= part:
        return (power := 1 << max(num_points - 1, 0).bit_length()), power
    number = -(-num_points // part)
    coarse = 1 << max(number.bit_length() - 3, 0)  # at most a quarter of the parts is filling
    return -(-number // coarse) * coarse * part, part


@partial(jax.jit, static_argnames=("part", "kernel"))
def condition_in_parts(
    belief: Any,
    mean: Array,
    phi: Array,
    likelihood: HeadLikelihood,
    y: Any,
    weight: Array,
    at: Array | None,
    part: int,
    kernel: bool = False,
    max_steps: Array | int = 100,
) -> Conditioned:
    """The iterated update with n points, n a multiple of ``part``; see ``Conditioned``.

    Args:
        belief, mean: before; as ``split_prior`` makes the first, and (K, D).
        kernel: the evidence by the kernel (n K, n K), as one device takes it for few points; else by what is kept of S. The
            same for an exact structure.
        at: outputs (n, K) whose factors give the weights where the climb begins; None begins at ``mean``.
    """
    phi, y, weight = _along_data((phi, y, weight))
    f_0 = phi @ mean.T
    start = jnp.zeros_like(f_0) if at is None else weighted(weight, likelihood.gradient(at, y))

    def times_kernel(a: Array) -> Array:
        return phi @ belief.lift(phi, a).T

    found = climb_by_products(times_kernel, f_0, start, likelihood, y, weight, max_steps)
    moved = along_features(mean + belief.lift(phi, found.position))
    parts = jax.tree.map(
        lambda whole: whole.reshape(-1, part, *whole.shape[1:]), on_every_device((phi, found.outputs, y, weight))
    )

    def absorb(carry: tuple[Any, Array], points: Any) -> tuple[tuple[Any, Array], None]:
        belief, change = carry
        phi, f, y, weight = points
        belief, own = belief.absorb_few(phi, likelihood, f, y, weight)
        return (belief, change + own), None

    (after, change), _ = jax.lax.scan(absorb, (belief, jnp.zeros((), f_0.dtype)), parts)
    if kernel:
        factor = weighted_factor(likelihood, found.outputs, y, weight)
        core = jnp.einsum("nkb,nkml,mlc->nbmc", factor, belief.kernel(phi), factor)
        root = identity_plus_root(core.reshape((factor.shape[0] * factor.shape[2],) * 2))
        change = -2 * jnp.sum(jnp.log(jnp.diagonal(root)))
    log_evidence = found.log_likelihood - 0.5 * found.square + 0.5 * change
    return Conditioned(moved, after, on_every_device(found), on_every_device(log_evidence))


def _along_data(tree: Any) -> Any:
    """Points along the mesh's axis ``data``, where their number allows it."""
    shards = dict(jax.sharding.get_abstract_mesh().shape).get(DATA, 1)

    def placed(leaf: Array) -> Array:
        if leaf.shape[0] % shards:
            return leaf
        return jax.lax.with_sharding_constraint(leaf, PartitionSpec(DATA))

    return tree if shards == 1 else jax.tree.map(placed, tree)
