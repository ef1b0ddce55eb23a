"""Where the layers of a network lie in the vector of all weights: one matrix (I + 1, O) a layer, and the weights of none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from ssm_nn.weight_mesh import on_every_device

__all__ = ["LayerPlace", "Places", "SpreadLeaves"]

Array = Any


class LayerPlace(NamedTuple):
    """A layer's matrix W (I, O), with the bias as a last row and perhaps empty rows behind it: static.

    Attributes:
        name: of its kernel, for messages.
        start, shape: of the kernel's leaf in theta (P,).
        input_axes, output_axis: of the leaf; rows run over the input axes in this order.
        bias_start: of the bias, or None.
        filling: number of rows behind the others that stand for no weight, where a mesh of devices asks for them.
    """

    name: str
    start: int
    shape: tuple[int, ...]
    input_axes: tuple[int, ...]
    output_axis: int
    bias_start: int | None
    filling: int = 0

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
        """Rows of the matrix that are weights, the bias counted."""
        return int(np.prod(self.input_shape, dtype=int)) + (self.bias_start is not None)

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.num_rows * self.num_outputs

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Slices of theta that belong to the layer."""
        spans = [(self.start, self.start + int(np.prod(self.shape, dtype=int)))]
        return spans if self.bias_start is None else [*spans, (self.bias_start, self.bias_start + self.num_outputs)]

    def matrix(self, theta: Array, filling: Any = 0.0) -> Array:
        """(I, O) out of theta (P,); ``filling`` stands in the rows of no weight."""
        kernel, *bias = (theta[start:stop] for start, stop in self.spans)
        return self.matrix_of(kernel.reshape(self.shape), bias[0] if bias else None, filling)

    def matrix_of(self, kernel: Array, bias: Array | None, filling: Any = 0.0) -> Array:
        """(I, O) of the layer's leaves."""
        rows = kernel.transpose(*self.input_axes, self.output_axis).reshape(-1, self.num_outputs)
        rows = rows if bias is None else jnp.concatenate([rows, bias[None]])
        return jnp.pad(rows, ((0, self.filling), (0, 0)), constant_values=filling) if self.filling else rows

    def real(self, matrix: Array) -> Array:
        """The rows of weights."""
        return matrix[: self.num_rows] if self.filling else matrix

    def pieces(self, matrix: Array) -> dict[int, Array]:
        """The inverse of ``matrix``: start -> slice of theta."""
        # as large as the weights themselves; cut where it lies, every row would be moved by itself
        matrix = on_every_device(self.real(matrix))
        rows = matrix if self.bias_start is None else matrix[:-1]
        order = np.argsort((*self.input_axes, self.output_axis))
        leaf = rows.reshape(*self.input_shape, self.num_outputs).transpose(*order)
        made = {self.start: leaf.ravel()}
        return made if self.bias_start is None else made | {self.bias_start: matrix[-1]}


class SpreadLeaves(Protocol):
    """A layout in which leaves do not lie one behind another: ``inference.sharding.ShardedLayout``."""

    @property
    def sites(self) -> tuple[Any, ...]:
        """The leaves, with ``name``, ``shape``, and ``start`` and ``stop`` of the plain layout."""
        ...

    @property
    def size(self) -> int:
        """P of theta."""
        ...

    def leaves(self, theta: Array) -> dict[str, Array]:
        """Site name -> leaf."""
        ...

    def filled(self, leaves: Mapping[str, Array], filling: Any) -> Array:
        """The inverse; ``filling`` stands where no weight is."""
        ...


class Places(NamedTuple):
    """All layers, and the weights that belong to none: static and hashable.

    Attributes:
        layers: of the network.
        size: number of weights.
        spread: how theta is laid out, where that is not leaf by leaf; ``start`` and ``stop`` then name leaves only.
    """

    layers: tuple[LayerPlace, ...]
    size: int
    spread: SpreadLeaves | None = None

    @property
    def length(self) -> int:
        """P of theta."""
        return self.size if self.spread is None else self.spread.size

    @property
    def rest(self) -> list[tuple[int, int]]:
        """Slices of weights outside the layers, in order."""
        spans = sorted(span for layer in self.layers for span in layer.spans)
        ends = [0, *(stop for _, stop in spans)]
        starts = [*(start for start, _ in spans), self.size]
        return [(end, start) for end, start in zip(ends, starts, strict=True) if end < start]

    @property
    def rest_size(self) -> int:
        """Number of weights outside the layers."""
        return sum(stop - start for start, stop in self.rest)

    def matrices(self, theta: Array, filling: Any = 0.0) -> list[Array]:
        """(I, O) of each layer, of theta (P,)."""
        if self.spread is None:
            return [layer.matrix(theta, filling) for layer in self.layers]
        leaves = self._by_start(theta)
        return [
            layer.matrix_of(
                leaves[layer.start], None if layer.bias_start is None else leaves[layer.bias_start], filling
            )
            for layer in self.layers
        ]

    def firsts(self, theta: Array) -> list[Array]:
        """The first weight of each layer, of theta (P,)."""
        if self.spread is None:
            return [theta[layer.start] for layer in self.layers]
        leaves = self._by_start(theta)
        return [leaves[layer.start].ravel()[0] for layer in self.layers]

    def rest_of(self, theta: Array) -> Array:
        """The weights outside the layers, of theta (P, ...); (P,) where it is spread."""
        if self.spread is None:
            parts = [theta[start:stop] for start, stop in self.rest]
        else:
            leaves = self._by_start(theta)
            parts = [leaves[site.start].ravel() for site in self._rest_sites()]
        return jnp.concatenate(parts) if parts else theta[:0]

    def join(self, matrices: Sequence[Array], rest: Array, filling: Any = 0.0) -> Array:
        """The vector (P,) of the layers' matrices and the rest; ``filling`` stands where theta has no weight."""
        pieces, used = {}, 0
        for layer, matrix in zip(self.layers, matrices, strict=True):
            pieces.update(layer.pieces(matrix))
        spans = self.rest if self.spread is None else [(site.start, site.stop) for site in self._rest_sites()]
        for start, stop in spans:
            pieces[start] = rest[used : used + stop - start]
            used += stop - start
        if self.spread is None:
            return jnp.concatenate([pieces[start] for start in sorted(pieces)])
        leaves = {site.name: pieces[site.start].reshape(site.shape) for site in self.spread.sites}
        return self.spread.filled(leaves, filling)

    def _by_start(self, theta: Array) -> dict[int, Array]:
        assert self.spread is not None
        leaves = self.spread.leaves(theta)
        return {site.start: leaves[site.name] for site in self.spread.sites}

    def _rest_sites(self) -> list[Any]:
        assert self.spread is not None
        return [s for s in self.spread.sites if any(start <= s.start < stop for start, stop in self.rest)]
