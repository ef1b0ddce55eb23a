"""A shared kernel as a matrix, and the perturbation that makes a task's kernel of it.

    W_t[p] = diag(s) W_0[p] diag(r) + V diag(c) U          s (I,), r (O,), V (I, k), U (k, O), c (k,) of zeros and ones

with p the positions of a convolution's window, whose perturbation is the same at each of them; a dense layer has one. I and
O are inputs (channels) and outputs: W is the transpose of the paper's, and V U stands for its (U V)^T.
Source: Li et al. 2024 (arXiv 2311.15161), section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

__all__ = ["Block", "Factors", "composed"]

Array = Any
Name = tuple[str, str]  # network, path


class Factors(NamedTuple):
    """The perturbation of one kernel.

    Attributes:
        inputs, outputs: s (I,) and r (O,).
        left, right: V (I, k) and U (k, O).
        keep: c (k,), 1 for a direction that counts and 0 for padding.
    """

    inputs: Array
    outputs: Array
    left: Array
    right: Array
    keep: Array

    @property
    def rank(self) -> int:
        """Directions that count; of concrete factors."""
        return int(np.sum(np.asarray(self.keep) > 0))

    def trimmed(self) -> Factors:
        """Without the padding, on the host: what is stored."""
        kept = np.asarray(self.keep) > 0
        return Factors(
            np.asarray(self.inputs),
            np.asarray(self.outputs),
            np.asarray(self.left)[:, kept],
            np.asarray(self.right)[kept],
            np.asarray(self.keep)[kept],
        )

    def padded(self, width: int) -> Factors:
        """With directions of zeros up to ``width``."""
        more = width - self.keep.shape[0]
        return Factors(
            jnp.asarray(self.inputs),
            jnp.asarray(self.outputs),
            jnp.pad(jnp.asarray(self.left), ((0, 0), (0, more))),
            jnp.pad(jnp.asarray(self.right), ((0, more), (0, 0))),
            jnp.pad(jnp.asarray(self.keep), (0, more)),
        )


class Block(NamedTuple):
    """One shared kernel, as static data.

    Attributes:
        name: (network, path) of its leaf.
        shape: of the leaf.
        input_axes: axes of the leaf that run over the inputs, in the order of V's rows.
        window_axes: axes over the window of a convolution, none for a dense layer.
        output_axis: axis over the outputs.
        cap: most directions that are looked at, at most min(I, O).
    """

    name: Name
    shape: tuple[int, ...]
    input_axes: tuple[int, ...]
    window_axes: tuple[int, ...]
    output_axis: int
    cap: int

    @property
    def num_inputs(self) -> int:
        """I."""
        return int(np.prod([self.shape[i] for i in self.input_axes], dtype=int))

    @property
    def num_outputs(self) -> int:
        """O."""
        return self.shape[self.output_axis]

    @property
    def cost(self) -> int:
        """Numbers of one direction, I + O."""
        return self.num_inputs + self.num_outputs

    @property
    def _order(self) -> tuple[int, ...]:
        return (*self.window_axes, *self.input_axes, self.output_axis)

    def matrix(self, leaf: Array) -> Array:
        """(positions, I, O) of a leaf."""
        return leaf.transpose(self._order).reshape(-1, self.num_inputs, self.num_outputs)

    def leaf(self, matrix: Array) -> Array:
        """The inverse of ``matrix``."""
        order = self._order
        return matrix.reshape([self.shape[i] for i in order]).transpose(np.argsort(order))

    def identity(self, dtype: Any) -> Factors:
        """The perturbation that changes nothing, padded to the cap."""
        sizes = self.num_inputs, self.num_outputs
        return Factors(
            jnp.ones(sizes[0], dtype),
            jnp.ones(sizes[1], dtype),
            jnp.zeros((sizes[0], self.cap), dtype),
            jnp.zeros((self.cap, sizes[1]), dtype),
            jnp.zeros(self.cap, dtype),
        )

    def scaled(self, leaf: Array, factors: Factors) -> Array:
        """``diag(s) W_0[p] diag(r)``, (positions, I, O)."""
        return factors.inputs[:, None] * self.matrix(leaf) * factors.outputs

    def compose(self, leaf: Array, factors: Factors) -> Array:
        """The leaf of the task's kernel."""
        return self.leaf(self.scaled(leaf, factors) + (factors.left * factors.keep) @ factors.right)


def composed(blocks: Sequence[Block], arrays: Mapping[str, Mapping[str, Any]], factors: Sequence[Factors]) -> Any:
    """The weights network -> path -> leaf with each block's kernel perturbed."""
    made = {network: dict(leaves) for network, leaves in arrays.items()}
    for block, own in zip(blocks, factors, strict=True):
        network, path = block.name
        made[network][path] = block.compose(made[network][path], own)
    return made
