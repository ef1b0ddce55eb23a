"""Kronecker-eigen precision: a layer's weights in a basis of its inputs and one of its outputs, one number for each pair.

    Lambda_l = (V_A (x) V_G) diag(vec S) (V_A (x) V_G)^T,   V_A (I, I), V_G (O, O) orthogonal, S (I, O) > 0

for the matrix W (I, O) of a layer, its bias as last row; independent between layers. In the layer's own coordinates
Z = V_A^T W V_G everything is elementwise. It is closed under a step with one gain and one noise a layer, and under known
maps of a layer's inputs or outputs. Weights outside the layers keep a diagonal plus low rank.

On a mesh V_A and S lie by rows along its axis ``weights``, V_G where its size allows it. Rows that no weight has, which make
their number divisible, have a basis of their own, learn nothing, and count nowhere.

Source of the basis: Martens and Grosse 2015 (arXiv 1503.05671), of the eigenvalues George et al. 2018 (arXiv 1806.03884).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssm_nn.coordinate_map import CoordinateMap, LeafMap, along_axis
from ssm_nn.layer_places import LayerPlace, Places
from ssm_nn.moments import Moments
from ssm_nn.precision_low_rank import DiagonalPlusLowRank
from ssm_nn.weight_mesh import by_rows, eigenvectors_of_each, on_every_device
from ssm_nn.whitening import Whitening

__all__ = ["EigenBlock", "KroneckerEigen"]

Array = Any


class EigenBlock(NamedTuple):
    """One layer: V_A (I, I), V_G (O, O), S (I, O)."""

    inputs: Array
    outputs: Array
    values: Array

    def rotate(self, matrix: Array) -> Array:
        """``V_A^T W V_G``."""
        return self.inputs.T @ matrix @ self.outputs

    def back(self, turned: Array) -> Array:
        """``V_A Z V_G^T``."""
        return self.inputs @ turned @ self.outputs.T

    def diagonal(self, values: Array) -> Array:
        """Diagonal (I, O) of the matrix with eigenvalues ``values``."""
        return jnp.square(self.inputs) @ values @ jnp.square(self.outputs).T

    def in_basis(self, inputs: Array, outputs: Array) -> Array:
        """Diagonal (I, O) in another basis: ``(V_A'^T V_A)^2 S ((V_G'^T V_G)^2)^T``."""
        return jnp.square(inputs.T @ self.inputs) @ self.values @ jnp.square(outputs.T @ self.outputs).T

    def traces(self) -> tuple[Array, Array]:
        """Partial traces over the outputs (I, I) and over the inputs (O, O)."""
        over_outputs = (self.inputs * jnp.sum(self.values, axis=1)) @ self.inputs.T
        over_inputs = (self.outputs * jnp.sum(self.values, axis=0)) @ self.outputs.T
        return over_outputs, over_inputs


@partial(jax.tree_util.register_dataclass, data_fields=["blocks", "rest"], meta_fields=["places"])
@dataclass(frozen=True)
class KroneckerEigen:
    """One block a layer, and a diagonal plus low rank for what is outside them; see ``ssm_nn.precision.Precision``.

    Attributes:
        blocks: one EigenBlock a layer.
        rest: of the weights outside the layers.
        places: where these lie in theta (P,).
    """

    blocks: tuple[EigenBlock, ...]
    rest: DiagonalPlusLowRank
    places: Places

    @classmethod
    def diagonal(cls, values: Array, places: Places, rank: int) -> KroneckerEigen:
        """``diag(values)``, exactly, in the basis of the weights themselves."""
        blocks = []
        for matrix in places.matrices(values, filling=1.0):
            rows, outputs = matrix.shape
            blocks.append(EigenBlock(jnp.eye(rows, dtype=matrix.dtype), jnp.eye(outputs, dtype=matrix.dtype), matrix))
        rest = places.rest_of(values)
        # no columns for no weights: sums would add to them, and every shape be compiled for
        factor = jnp.zeros((rest.shape[0], rank if rest.shape[0] else 0), rest.dtype)
        return cls(tuple(blocks), DiagonalPlusLowRank(rest, factor), places)

    def along_weights(self) -> KroneckerEigen:
        """Laid out by rows along the mesh in context."""
        return replace(self, blocks=jax.tree.map(by_rows, self.blocks), rest=on_every_device(self.rest))

    def _vector(
        self, of_block: Callable[[EigenBlock, Array], Array], of_rest: Callable[[Array], Array], x: Array
    ) -> Array:
        """Apply one function to each layer's matrix and one to the rest."""
        matrices = [of_block(b, w) for b, w in zip(self.blocks, self.places.matrices(x), strict=True)]
        return self.places.join(matrices, of_rest(self.places.rest_of(x)))

    def matvec(self, x: Array) -> Array:
        """``V_A (S * Z) V_G^T``."""
        return self._vector(lambda b, w: b.back(b.values * b.rotate(w)), self.rest.matvec, x)

    def solve(self, x: Array) -> Array:
        """``V_A (Z / S) V_G^T``."""

        def one(x):
            return self._vector(lambda b, w: b.back(b.rotate(w) / b.values), self.rest.solve, x)

        return one(x) if x.ndim == 1 else jax.vmap(one, in_axes=1, out_axes=1)(x)

    def solver(self) -> Callable[[Array], Array]:
        """Nothing to prepare."""
        return self.solve

    def logdet(self) -> Array:
        """``sum log S``."""
        return sum((jnp.sum(jnp.log(values)) for values in self._real_values()), self.rest.logdet())

    def _real_values(self) -> list[Array]:
        """S of the rows that are weights."""
        return [layer.real(b.values) for b, layer in zip(self.blocks, self.places.layers, strict=True)]

    def _diagonal(self, matrices: Sequence[Array], rest: Array) -> Array:
        """(P,), all of it positive."""
        return self.places.join(matrices, rest, filling=jnp.max(matrices[0]) if matrices else 1.0)

    def precision_diagonal(self) -> Array:
        """(P,)."""
        return self._diagonal([b.diagonal(b.values) for b in self.blocks], self.rest.precision_diagonal())

    def variance(self) -> Array:
        """(P,)."""
        return self._diagonal([b.diagonal(1 / b.values) for b in self.blocks], self.rest.variance())

    def quadratic(self, x: Array) -> Array:
        """``sum S Z^2``."""
        total = self.rest.quadratic(self.places.rest_of(x))
        for block, matrix in zip(self.blocks, self.places.matrices(x), strict=True):
            total = total + jnp.sum(block.values * jnp.square(block.rotate(matrix)))
        return total

    def quadratic_form(self) -> Callable[[Array], Array]:
        """``quadratic``: two products with small matrices a layer."""
        return self.quadratic

    def whitening(self) -> Whitening:
        """``sqrt S * Z``, elementwise but for the turn into the basis and back."""
        rest = self.rest.whitening()
        smallest = jnp.stack([*(jnp.min(values) for values in self._real_values()), rest.smallest])
        return Whitening(
            lambda x: self._vector(lambda b, w: jnp.sqrt(b.values) * b.rotate(w), rest.whiten, x),
            lambda z: self._vector(lambda b, w: b.back(w / jnp.sqrt(b.values)), rest.colour, z),
            jnp.min(smallest),
        )

    def sample(self, key: Array) -> Array:
        """``V_A (e / sqrt S) V_G^T``."""
        return self._noise(key, [1 / b.values for b in self.blocks], self.rest.sample)

    def _noise(self, key: Array, variances: Sequence[Array], of_rest: Callable[[Array], Array]) -> Array:
        """A draw with the given variances (I, O) in each basis."""
        rest_key, *keys = jax.random.split(key, len(self.blocks) + 1)
        matrices = [
            b.back(jnp.sqrt(v) * jax.random.normal(k, v.shape, v.dtype))
            for b, v, k in zip(self.blocks, variances, keys, strict=True)
        ]
        return self.places.join(matrices, of_rest(rest_key))

    def to_dense(self) -> Array:
        """(P, P)."""
        return jax.vmap(self.matvec, out_axes=1)(jnp.eye(self.places.length, dtype=self.rest.diagonal.dtype))

    def add(self, site: KroneckerEigen) -> KroneckerEigen:
        """The sum, in the basis of its partial traces: exact where the sum is a Kronecker product, else its diagonal there."""
        pairs = list(zip(self.blocks, site.blocks, strict=True))
        bases = common_bases(self.places.layers, [[one.traces(), two.traces()] for one, two in pairs])
        blocks = tuple(
            EigenBlock(*basis, one.in_basis(*basis) + two.in_basis(*basis))
            for basis, (one, two) in zip(bases, pairs, strict=True)
        )
        return replace(self, blocks=blocks, rest=self.rest.add(site.rest))

    def absorb(self, site: KroneckerEigen) -> KroneckerEigen:
        """The sum in the site's basis, which was chosen for both: trace and diagonal there are exact."""
        blocks = tuple(
            two._replace(values=one.in_basis(two.inputs, two.outputs) + two.values)
            for one, two in zip(self.blocks, site.blocks, strict=True)
        )
        return replace(self, blocks=blocks, rest=self.rest.add(site.rest))

    def add_columns(self, columns: Array) -> PlusColumns:
        """Exactly, beside the Kronecker form: only ``solve`` is offered of the sum."""
        return PlusColumns(self, columns)

    def no_information(self) -> KroneckerEigen:
        """Zeros in the same basis."""
        blocks = tuple(b._replace(values=jnp.zeros_like(b.values)) for b in self.blocks)
        return replace(self, blocks=blocks, rest=self.rest.no_information())

    def mapped(self, coordinates: CoordinateMap) -> KroneckerEigen:
        """A map of a layer's inputs turns V_A, one of its outputs V_G."""
        maps = {leaf.start: leaf for leaf in coordinates.leaves}
        blocks = tuple(
            _turned(block, layer, maps) for block, layer in zip(self.blocks, self.places.layers, strict=True)
        )
        return replace(self, blocks=blocks, rest=self._mapped_rest(maps))

    def _mapped_rest(self, maps: dict[int, LeafMap]) -> DiagonalPlusLowRank:
        own, before = [], 0
        for start, stop in self.places.rest:
            own += [
                replace(leaf, start=before + leaf.start - start) for leaf in maps.values() if start <= leaf.start < stop
            ]
            before += stop - start
        return self.rest.mapped(CoordinateMap(tuple(own))) if own else self.rest

    def steps(self, moments: Moments) -> list[tuple[Array, Array]]:
        """Gain and noise of each layer, read at its first weight: they are checked to be one number a layer."""
        return list(zip(self.places.firsts(moments.gain), self.places.firsts(moments.noise), strict=True))

    def _rest_moments(self, moments: Moments) -> Moments:
        return Moments(*(self.places.rest_of(m) for m in moments[:3]))

    def predict(self, moments: Moments) -> KroneckerEigen:
        """``S' = S / (a^2 + q S)``, bases unchanged: exact."""
        blocks = tuple(
            b._replace(values=b.values / (jnp.square(a) + q * b.values))
            for b, (a, q) in zip(self.blocks, self.steps(moments), strict=True)
        )
        return replace(self, blocks=blocks, rest=self.rest.predict(self._rest_moments(moments)))

    def smoother_gain(self, moments: Moments, x: Array) -> Array:
        """``a / (a^2 + q S)``, elementwise in the basis."""
        matrices = []
        for b, matrix, (a, q) in zip(self.blocks, self.places.matrices(x), self.steps(moments), strict=True):
            # a step without noise pulls all the way, to the last bit
            pulled = b.back(a / (jnp.square(a) + q * b.values) * b.rotate(matrix))
            matrices.append(jnp.where((q == 0) & (a == 1), matrix, pulled))
        rest = self.rest.smoother_gain(self._rest_moments(moments), self.places.rest_of(x))
        return self.places.join(matrices, rest)

    def sample_conditional(self, moments: Moments, key: Array) -> Array:
        """Variances ``q / (a^2 + q S)`` in the basis."""
        steps = zip(self.blocks, self.steps(moments), strict=True)
        variances = [q / (jnp.square(a) + q * b.values) for b, (a, q) in steps]
        rest_moments = self._rest_moments(moments)
        return self._noise(key, variances, lambda key: self.rest.sample_conditional(rest_moments, key))

    def conditional_log_density(self, moments: Moments, residual: Array) -> Array:
        """Sum over the layers with noise."""
        total = self.rest.conditional_log_density(self._rest_moments(moments), self.places.rest_of(residual))
        residuals, layers = self.places.matrices(residual), self.places.layers
        for b, matrix, layer, (a, q) in zip(self.blocks, residuals, layers, self.steps(moments), strict=True):
            moves = q > 0
            precision = (jnp.square(a) + q * b.values) / jnp.where(moves, q, 1.0)
            terms = jnp.log(precision / (2 * jnp.pi)) - precision * jnp.square(b.rotate(matrix))
            total = total + jnp.where(moves, 0.5 * jnp.sum(layer.real(terms)), 0.0)
        return total

    def message_before(self, message: KroneckerEigen, moments: Moments) -> KroneckerEigen:
        """``a^2 B / (1 + q B)`` in the message's own basis: exact."""
        blocks = tuple(
            b._replace(values=jnp.square(a) * b.values / (1 + q * b.values))
            for b, (a, q) in zip(message.blocks, self.steps(moments), strict=True)
        )
        return replace(message, blocks=blocks, rest=self.rest.message_before(message.rest, self._rest_moments(moments)))


class PlusColumns(NamedTuple):
    """``Lambda + V V^T`` with V (P, K) of few columns, by Woodbury's identity."""

    precision: KroneckerEigen
    columns: Array

    def solve(self, x: Array) -> Array:
        """``(Lambda + V V^T)^-1 x`` for x (P,)."""
        wide, here = self.precision.solve(self.columns), self.precision.solve(x)
        core = jnp.eye(wide.shape[1], dtype=wide.dtype) + self.columns.T @ wide
        return here - wide @ jax.scipy.linalg.solve(core, self.columns.T @ here, assume_a="pos")


def common_bases(
    layers: Sequence[LayerPlace], traces: Sequence[Sequence[tuple[Array, Array]]]
) -> list[tuple[Array, Array]]:
    """V_A and V_G of each layer: eigenvectors of summed partial traces, a basis that would diagonalise a sum that is a
    Kronecker product. Inputs may be given with or without the rows of no weight, which keep a basis of their own.
    """
    sides = []
    for layer, pairs in zip(layers, traces, strict=True):
        n = layer.num_rows
        sides += [_normalised(sum(inputs[:n, :n] for inputs, _ in pairs)), _normalised(sum(o for _, o in pairs))]
    found = iter(eigenvectors_of_each(sides))
    return [(_with_own(next(found), layer.filling), next(found)) for layer in layers]


def _normalised(side: Array) -> Array:
    return side / jnp.maximum(jnp.trace(side), jnp.finfo(side.dtype).tiny)


def _with_own(basis: Array, filling: int) -> Array:
    return jax.scipy.linalg.block_diag(basis, jnp.eye(filling, dtype=basis.dtype)) if filling else basis


def _turned(block: EigenBlock, layer: LayerPlace, maps: dict[int, LeafMap]) -> EigenBlock:
    kernel = maps.get(layer.start)
    bias = None if layer.bias_start is None else maps.get(layer.bias_start)
    on_outputs = kernel is not None and kernel.axis == layer.output_axis
    if (layer.bias_start is not None and on_outputs and bias is None) or (bias is not None and not on_outputs):
        raise ValueError(
            f"the kernel maps the outputs of {layer.name!r} in its weights or in its bias alone, but a Kronecker form holds "
            "both in one matrix: map both alike; Dense, Diagonal and LowRank take either alone"
        )
    if kernel is None:
        return block
    if on_outputs:
        return block._replace(outputs=along_axis(kernel.turn, block.outputs, 0))
    rows = block.inputs if layer.bias_start is None else block.inputs[:-1]
    shaped = rows.reshape(*layer.input_shape, -1)
    turned = along_axis(kernel.turn, shaped, layer.input_axes.index(kernel.axis)).reshape(rows.shape)
    return block._replace(inputs=turned if layer.bias_start is None else jnp.concatenate([turned, block.inputs[-1:]]))
