"""Scans over a task's examples for what enters and what reaches the layers of its network.

a (p, I)   inputs of a layer at its positions, with a 1 for the bias
g (c, p, O)   gradients at its outputs of the columns of the output factor, g ~ J^T L e
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssm_nn.extraction import StateSpace
from ssm_nn.inference.batches import index_batches, rows, single
from ssm_nn.inference.curvature import factor_columns
from ssm_nn.layers import Layer, find_layers, read_data_alone, run_layers
from ssm_nn.precision_kronecker import EigenBlock
from ssm_nn.tasks import Task

__all__ = ["LayerPasses", "layers_of", "reads_data_alone"]

Array = Any

# numbers of one chunk of inputs, gradients and their products (64 MiB in float32), and its examples at most
_CHUNK_NUMBERS, _CHUNK_EXAMPLES = 2**24, 1024


def layers_of(space: StateSpace, task: Task, arrays: Any) -> tuple[Layer, ...]:
    """The layers of a program's networks, in the order in which they are met."""
    return find_layers(_outputs_of_one(space, task), arrays)


def reads_data_alone(space: StateSpace, task: Task, arrays: Any) -> tuple[bool, ...]:
    """Whether what enters each layer depends on no weight."""
    return read_data_alone(_outputs_of_one(space, task), arrays)


def _outputs_of_one(space: StateSpace, task: Task) -> Callable[[Any], Array]:
    # shapes alone are read: a task may have no example yet
    blank = jax.tree.map(lambda a: jnp.zeros(jnp.shape(a)[1:], jnp.result_type(a)), task.data)
    first = single(task, blank, jnp.asarray(True))
    return lambda arrays: space.outputs_at(arrays, first)


class LayerPasses:
    """At fixed weights, or at a draw of them for each chunk of examples.

    Args:
        space, theta, task: of the network.
        chosen: (n,), the examples.
        key: of the random signs.
        exact_columns: while n times the columns of the factor is at most so many, all are used; beyond, one an example with
            random signs, whose second moment is the same.
        draw: key -> weights (P,), instead of ``theta``.
    """

    def __init__(
        self,
        space: StateSpace,
        theta: Array,
        task: Task,
        chosen: Array,
        key: Array,
        exact_columns: int,
        draw: Callable[[Array], Array] | None = None,
    ):
        self.space, self.theta, self.task, self.draw = space, theta, task, draw
        self.layers = layers_of(space, task, space.layout.arrays(theta))
        width = factor_columns(space, task)
        self.all_columns = chosen.shape[0] * width <= exact_columns
        used = width if self.all_columns else 1
        numbers = (
            max(
                layer.positions * (layer.num_inputs + used * layer.num_outputs)
                + (used * layer.num_inputs * layer.num_outputs if layer.positions > 1 else 0)
                for layer in self.layers
            )
            if self.layers
            else 1
        )
        size = int(np.clip(_CHUNK_NUMBERS // numbers, 1, min(_CHUNK_EXAMPLES, chosen.shape[0])))
        self.chunks = index_batches(chosen, size, task.num_examples)
        self.keys = jax.random.split(key, self.chunks.shape)

    def sides(self) -> list[tuple[Array, Array]]:
        """A (I, I) and G (O, O) of each layer, summed over examples and positions."""

        def of_layer(inputs: Array, gradients: Array) -> tuple[Array, Array]:
            flat = gradients.reshape(-1, gradients.shape[-1])
            return _gram(inputs.reshape(-1, inputs.shape[-1])), _gram(flat)

        return self._summed(lambda layers: [of_layer(*layer) for layer in layers])

    def squares(self, blocks: list[EigenBlock]) -> list[Array]:
        """Sum over examples of the squared gradients (I, O) in the given bases."""

        def of_layer(block: EigenBlock, inputs: Array, gradients: Array) -> Array:
            # rows of no weight have no inputs
            a, g = inputs @ block.inputs[: inputs.shape[-1]], gradients @ block.outputs  # (n, p, I), (n, c, p, O)
            if a.shape[1] == 1:
                return jnp.square(a[:, 0]).T @ jnp.sum(jnp.square(g[:, :, 0]), axis=1)
            return jnp.sum(jnp.square(jnp.einsum("npi,ncpo->ncio", a, g)), axis=(0, 1))

        return self._summed(lambda layers: [of_layer(b, *layer) for b, layer in zip(blocks, layers, strict=True)])

    def _summed(self, of_chunk: Callable[[list[tuple[Array, Array]]], Any]) -> Any:
        def chunk(indices, keys):
            batch = rows(self.task, indices)
            theta = self.theta if self.draw is None else self.draw(jax.random.fold_in(keys[0], 0))
            return of_chunk(jax.vmap(partial(self._of_example, theta))(batch.data, batch.mask, keys))

        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(chunk, self.chunks[0], self.keys[0]))

        def step(sums, inputs):
            return jax.tree.map(jnp.add, sums, chunk(*inputs)), None

        return jax.lax.scan(step, zeros, (self.chunks, self.keys))[0]

    def _of_example(self, theta: Array, data: Any, mask: Array, key: Array) -> list[tuple[Array, Array]]:
        """For each layer its inputs (p, I) with a 1 for the bias, and gradients (c, p, O) for each column of the factor."""
        example = single(self.task, data, mask)

        def perturbed(perturbations):
            arrays = self.space.layout.arrays(theta)
            return run_layers(lambda arrays: self.space.outputs_at(arrays, example), arrays, perturbations)

        nothing = [jnp.zeros((layer.positions, layer.num_outputs), theta.dtype) for layer in self.layers]
        outputs, pull, inputs = jax.vjp(perturbed, nothing, has_aux=True)
        factor = self.space.output_factor(theta, example).astype(outputs.dtype)
        if not self.all_columns:
            factor = factor @ jax.random.rademacher(key, (factor.shape[1], 1), factor.dtype)
        gradients = jax.vmap(lambda cotangent: pull(cotangent)[0], in_axes=1)(factor)
        return [
            (_with_one(layer, jnp.where(mask, a, 0.0), mask), g)
            for layer, a, g in zip(self.layers, inputs, gradients, strict=True)
        ]


def _with_one(layer: Layer, inputs: Array, mask: Array) -> Array:
    if layer.bias is None:
        return inputs
    ones = jnp.broadcast_to(jnp.asarray(mask, inputs.dtype), (inputs.shape[0], 1))
    return jnp.concatenate([inputs, ones], axis=1)


def _gram(wide: Array) -> Array:
    return wide.T @ wide
