"""Where the layers of a network lie in the vector of all weights: one matrix (I + 1, O) a layer, and the weights of none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

__all__ = ["LayerPlace", "Places"]

Array = Any


class LayerPlace(NamedTuple):
    """A layer's matrix W (I, O), with the bias as a last row: static.

    Attributes:
        name: of its kernel, for messages.
        start, shape: of the kernel's leaf in theta (P,).
        input_axes, output_axis: of the leaf; rows run over the input axes in this order.
        bias_start: of the bias, or None.
    """

    name: str
    start: int
    shape: tuple[int, ...]
    input_axes: tuple[int, ...]
    output_axis: int
    bias_start: int | None

    @property
    def num_outputs(self) -> int:
        """O."""
        return self.shape[self.output_axis]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Sizes of the input axes, in their order."""
        return tuple(self.shape[i] for i in self.input_axes)

    @property
    def num_rows(self) -> int:
        """Rows of the matrix, the bias counted."""
        return int(np.prod(self.input_shape, dtype=int)) + (self.bias_start is not None)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Slices of theta that belong to the layer."""
        spans = [(self.start, self.start + int(np.prod(self.shape, dtype=int)))]
        return spans if self.bias_start is None else [*spans, (self.bias_start, self.bias_start + self.num_outputs)]

    def matrix(self, theta: Array) -> Array:
        """(I, O) out of theta (P,)."""
        (start, stop), *bias = self.spans
        leaf = theta[start:stop].reshape(self.shape).transpose(*self.input_axes, self.output_axis)
        rows = leaf.reshape(-1, self.num_outputs)
        return jnp.concatenate([rows, theta[slice(*bias[0])][None]]) if bias else rows

    def pieces(self, matrix: Array) -> dict[int, Array]:
        """The inverse of ``matrix``: start -> slice of theta."""
        rows = matrix if self.bias_start is None else matrix[:-1]
        order = np.argsort((*self.input_axes, self.output_axis))
        leaf = rows.reshape(*self.input_shape, self.num_outputs).transpose(*order)
        made = {self.start: leaf.ravel()}
        return made if self.bias_start is None else made | {self.bias_start: matrix[-1]}


class Places(NamedTuple):
    """All layers, and the slices of theta (P,) that belong to none: static and hashable."""

    layers: tuple[LayerPlace, ...]
    size: int

    @property
    def rest(self) -> list[tuple[int, int]]:
        """Slices of theta outside the layers, in order."""
        spans = sorted(span for layer in self.layers for span in layer.spans)
        ends = [0, *(stop for _, stop in spans)]
        starts = [*(start for start, _ in spans), self.size]
        return [(end, start) for end, start in zip(ends, starts, strict=True) if end < start]

    @property
    def rest_size(self) -> int:
        """Number of weights outside the layers."""
        return sum(stop - start for start, stop in self.rest)

    def rest_of(self, theta: Array) -> Array:
        """The weights outside the layers, of theta (P, ...)."""
        parts = [theta[start:stop] for start, stop in self.rest]
        return jnp.concatenate(parts) if parts else theta[:0]

    def join(self, matrices: Sequence[Array], rest: Array) -> Array:
        """The vector (P,) of the layers' matrices and the rest."""
        pieces, used = {}, 0
        for layer, matrix in zip(self.layers, matrices, strict=True):
            pieces.update(layer.pieces(matrix))
        for start, stop in self.rest:
            pieces[start] = rest[used : used + stop - start]
            used += stop - start
        return jnp.concatenate([pieces[start] for start in sorted(pieces)])
