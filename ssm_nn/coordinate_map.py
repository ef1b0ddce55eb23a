"""A known orthogonal map of the weights: leaves reordered, or turned, along one of their axes.

    theta' = O theta,   O orthogonal, acting on one axis of some leaves and leaving the rest where it is

A permutation of the inputs moves the rows of the first layer, one of the labels the columns of the last, a rotation of the
images mixes rows. Every structure carries permutations; a matrix turns a diagonal into none, so that only the dense and the
Kronecker form carry it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["CoordinateMap", "LeafMap", "along_axis"]

Array = Any


@partial(jax.tree_util.register_dataclass, data_fields=["turn"], meta_fields=["start", "shape", "axis"])
@dataclass(frozen=True)
class LeafMap:
    """The map of one leaf: ``turn`` holds indices (n,) or an orthogonal matrix (n, n) for the leaf's ``axis``."""

    turn: Array
    start: int
    shape: tuple[int, ...]
    axis: int

    @property
    def stop(self) -> int:
        """End of the leaf in the vector of all weights."""
        return self.start + int(np.prod(self.shape, dtype=int))


@partial(jax.tree_util.register_dataclass, data_fields=["leaves"], meta_fields=[])
@dataclass(frozen=True)
class CoordinateMap:
    """The maps of all leaves that have one, in the order of the vector theta (P,)."""

    leaves: tuple[LeafMap, ...]

    @property
    def is_permutation(self) -> bool:
        """Whether every leaf is only reordered."""
        return all(is_indices(leaf.turn) for leaf in self.leaves)

    def __call__(self, x: Array) -> Array:
        """``O x`` for x (P,) or (P, K)."""
        parts, end = [], 0
        for leaf in self.leaves:
            parts.append(x[end : leaf.start])
            here = x[leaf.start : leaf.stop]
            moved = along_axis(leaf.turn, here.reshape(leaf.shape + x.shape[1:]), leaf.axis)
            parts.append(moved.reshape(here.shape))
            end = leaf.stop
        return jnp.concatenate([*parts, x[end:]])

    def inverse(self) -> CoordinateMap:
        """``O^T``."""
        return CoordinateMap(
            tuple(
                LeafMap(
                    jnp.argsort(leaf.turn) if is_indices(leaf.turn) else leaf.turn.T, leaf.start, leaf.shape, leaf.axis
                )
                for leaf in self.leaves
            )
        )

    def indices(self, size: int) -> Array:
        """``order`` (P,) with ``O x = x[order]``, of a permutation.

        Raises:
            ValueError: where a leaf is turned by a matrix.
        """
        if not self.is_permutation:
            raise ValueError(
                "the kernel turns a leaf by an orthogonal matrix, which no diagonal survives: LowRank and Diagonal carry "
                "permutations only; Kronecker and Dense carry matrices too"
            )
        return self(jnp.arange(size))


def is_indices(turn: Array) -> bool:
    """Whether a turn is a permutation; by dtype, since an axis of tasks may stand in front."""
    return jnp.issubdtype(jnp.result_type(turn), jnp.integer)


def along_axis(turn: Array, value: Array, axis: int) -> Array:
    """A leaf reordered, or turned, along ``axis``."""
    if is_indices(turn):
        return jnp.take(value, turn, axis=axis)
    return jnp.moveaxis(jnp.tensordot(jnp.asarray(turn, value.dtype), value, axes=(1, axis)), 0, axis)
