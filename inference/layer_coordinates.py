"""Round coordinates of a Kronecker-eigen belief, layer by layer, with the data turned once instead of the weights each step.

    W = M + V_A (C * Z) V_G^T,   C = s / sqrt S (I, O),  s^2 the least eigenvalue of Lambda'        prior 1/2 s^2 |Z|^2
    [x 1] W = x' (V_A^T M V_G + C * Z) V_G^T,   x' = [x 1] V_A

for a layer W (I, O), its bias as last row. Positions are those of ``search_coordinates.Round``, and so is the path. A layer
that reads the data alone, as the first dense layer of a network does, takes x' (N, I), made once a task, in the place of two
products with V_A in every step; it is kept beside the data meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssm_nn.extraction import Layout, StateSpace
from ssm_nn.inference.batches import rows, single
from ssm_nn.inference.layer_passes import layers_of, reads_data_alone
from ssm_nn.layers import find_layers, run_layers, run_with_products
from ssm_nn.precision_kronecker import KroneckerEigen
from ssm_nn.tasks import Task

__all__ = ["LayerCoordinates", "turned_layers"]

Array = Any


class LayerPosition(NamedTuple):
    """Z (I, O) of each layer, and the round coordinates of the weights outside them."""

    layers: tuple[Array, ...]
    rest: Array


class LayerCoordinates:
    """See ``search_coordinates.SearchCoordinates``; the prior counts ``share``.

    Args:
        layout, mean, precision, share: of the search.
        turned: numbers of the layers that take turned data.
    """

    def __init__(self, layout: Layout, mean: Array, precision: KroneckerEigen, share: Array, turned: tuple[int, ...]):
        self.layout, self.mean, self.places, self.blocks = layout, mean, precision.places, precision.blocks
        self.share, self.turned = share, turned
        self.rest = precision.rest.whitening()
        self.unit = jnp.sqrt(precision.whitening().smallest)
        self.scales = [self.unit / jnp.sqrt(block.values) for block in self.blocks]
        self.means = self.places.matrices(mean)
        # in the layer's own basis, where its data are
        self.turned_means = {k: self.blocks[k].rotate(self.means[k]) for k in turned}

    def enter(self, shift: Array) -> LayerPosition:
        """The position of a shift d (P,)."""
        turned = [block.rotate(matrix) for block, matrix in zip(self.blocks, self.places.matrices(shift), strict=True)]
        layers = tuple(matrix / scale for matrix, scale in zip(turned, self.scales, strict=True))
        return LayerPosition(layers, self.rest.whiten(self.places.rest_of(shift)) / self.unit)

    def leave(self, position: LayerPosition) -> Array:
        """Back to d (P,)."""
        return self.places.join([self._shift(k, z) for k, z in enumerate(position.layers)], self._rest_shift(position))

    def prior(self, origin: LayerPosition) -> tuple[Array, Callable[[LayerPosition], LayerPosition]]:
        """``share / 2  d^T Lambda' d`` at ``origin``, and the gradient at positions near it."""
        square = self.share * jnp.square(self.unit)
        total = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(origin))
        return 0.5 * square * total, lambda position: jax.tree.map(lambda leaf: square * leaf, position)

    def scaled(self, change: LayerPosition) -> LayerPosition:
        """The optimiser's change as it is applied."""
        return change

    def inputs(self, space: StateSpace, task: Task) -> tuple[Array, ...]:
        """x' (N, I) of each layer that takes turned data."""
        if not self.turned:
            return ()
        arrays = self.layout.arrays(jnp.zeros_like(self.mean))

        def of_example(data: Any, mask: Array) -> list[Array]:
            example = single(task, data, mask)
            _, entering = run_layers(lambda a: space.outputs_at(a, example), arrays, lambda number, rows: None)
            return [entering[k][0] for k in self.turned]

        made = []
        for k, entering in zip(self.turned, jax.vmap(of_example)(task.data, task.mask), strict=True):
            basis, wide = self.blocks[k].inputs, entering.astype(self.mean.dtype)
            # once a task, so to the last digit on every device
            turned = jnp.matmul(wide, basis[: wide.shape[1]], precision=jax.lax.Precision.HIGHEST)
            biased = self.places.layers[k].bias_start is not None
            made.append(turned + basis[wide.shape[1]] if biased else turned)
        return tuple(made)

    def log_likelihood(
        self, space: StateSpace, position: LayerPosition, batch: Task, inputs: tuple[Array, ...]
    ) -> Array:
        """Of a batch, with the rows of ``inputs`` that belong to it."""
        pieces = {}
        for k, (layer, z) in enumerate(zip(self.places.layers, position.layers, strict=True)):
            matrix = jnp.zeros_like(z) if k in self.turned else self.means[k] + self._shift(k, z)
            pieces.update(layer.pieces(matrix))
        arrays = self._arrays(pieces, self.places.rest_of(self.mean) + self._rest_shift(position))
        if not self.turned:
            return space.log_likelihood_at(arrays, batch)
        names = {site.start: (site.network, site.path) for site in self.layout.sites}
        products = {
            names[self.places.layers[k].start]: x
            @ (self.turned_means[k] + self.scales[k] * position.layers[k])
            @ self.blocks[k].outputs.T
            for k, x in zip(self.turned, inputs, strict=True)
        }
        return run_with_products(lambda a: space.log_likelihood_at(a, batch), arrays, products)

    def _shift(self, number: int, z: Array) -> Array:
        return self.blocks[number].back(self.scales[number] * z)

    def _rest_shift(self, position: LayerPosition) -> Array:
        return self.rest.colour(self.unit * position.rest)

    def _arrays(self, pieces: Mapping[int, Array], rest: Array) -> dict[str, dict[str, Array]]:
        """The weights by leaf, without packing them into one vector."""
        named: dict[str, dict[str, Array]] = {}
        used = 0
        for site in self.layout.sites:
            size = site.stop - site.start
            leaf = pieces.get(site.start)
            if leaf is None:
                leaf, used = rest[used : used + size], used + size
            named.setdefault(site.network, {})[site.path] = leaf.reshape(site.shape)
        return named


def turned_layers(
    space: StateSpace, precision: KroneckerEigen, task: Task, steps: int, batch_size: int
) -> tuple[int, ...]:
    """Numbers of the layers whose data are better turned once than their weights in each of so many steps.

    Those that meet an example in one product, read the data alone, and save products: N I^2 for turning the data against
    2 I^2 O a step, forwards and backwards.
    """
    arrays = space.layout.arrays(space.prior_mean)
    layers, alone = layers_of(space, task, arrays), reads_data_alone(space, task, arrays)
    batch = rows(task, jnp.zeros(batch_size, jnp.int32))
    # as a batch passes through the network: a product for each example, in their order
    together = {layer.kernel: layer for layer in find_layers(lambda a: space.log_likelihood_at(a, batch), arrays)}

    def pays(layer: Any) -> bool:
        whole = together.get(layer.kernel)
        fits = layer.positions == 1 and whole is not None and whole.positions == batch_size
        return fits and task.num_examples <= 2 * layer.num_outputs * steps

    return tuple(k for k, layer in enumerate(layers) if alone[k] and pays(layer))
