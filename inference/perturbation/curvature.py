"""What a task's examples say of the directions: the loss as a quadratic in how much of each is kept.

    T[n, c, a] = d eta_nc / d keep_a,   M = 1/N sum_n T_n^T F_n T_n,   b = -d loss / d keep,   loss = -1/N sum_n log p(y_n)

at keep = 1: dropping the set S changes the loss by ``b.1_S + 1/2 1_S^T M 1_S`` up to the network's own curvature, F the
likelihood's Fisher information in the outputs. One pass for each column of a factor of F; batches change nothing. The same
pass gives the Kronecker factors of each kernel and the paper's sensitivity, the mean squared gradient of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssm_nn.extraction import Program, extract
from ssm_nn.inference.batches import index_batches, rows, single
from ssm_nn.inference.perturbation.blocks import Block, Factors, composed
from ssm_nn.inference.perturbation.directions import Sides
from ssm_nn.inference.perturbation.factored import run_perturbed
from ssm_nn.layers import find_layers, run_layers
from ssm_nn.tasks import Task

__all__ = ["DropQuadratic", "drop_quadratic", "kernel_statistics", "losses_at"]

Array = Any

_CHUNK_NUMBERS = 2**23  # of what one chunk of examples holds: 32 MiB in float32


class DropQuadratic(NamedTuple):
    """``loss`` at all directions kept, b (A,), M (A, A), directions of all layers one after another."""

    loss: Array
    linear: Array
    matrix: Array


def drop_quadratic(
    program: Program,
    blocks: tuple[Block, ...],
    hypers: Any,
    arrays: Any,
    factors: Sequence[Factors],
    task: Task,
    examples: int,
    chunk: int | None = None,
) -> DropQuadratic:
    """The quadratic from ``examples`` examples (at most N, evenly spread) of a task that has a mask."""
    chosen = evenly(task, examples)
    width = sum(block.cap for block in blocks)
    widest = max(block.num_inputs + block.num_outputs for block in blocks)
    size = chunk or int(np.clip(_CHUNK_NUMBERS // (10 * (width + widest)), 1, min(256, len(chosen))))
    chunks = index_batches(jnp.asarray(chosen), size, task.num_examples)
    return _quadratic(program, blocks, hypers, arrays, tuple(factors), task, chunks)


def evenly(task: Task, examples: int) -> np.ndarray:
    """Indices of at most ``examples`` examples that count, evenly over the task."""
    return _spread(
        np.arange(task.num_examples) if task.mask is None else np.flatnonzero(np.asarray(task.mask)), examples
    )


def _spread(indices: np.ndarray, number: int) -> np.ndarray:
    return indices[np.linspace(0, len(indices) - 1, min(number, len(indices))).round().astype(int)]


def losses_at(
    program: Program,
    blocks: tuple[Block, ...],
    hypers: Any,
    arrays: Any,
    factors: Sequence[Factors],
    gains: Sequence[Array],
    task: Task,
    examples: int,
) -> np.ndarray:
    """(C,) mean losses with the directions' ``gains``, (C, k) a block, on other examples than the quadratic's.

    A task that has no more than ``examples`` examples, which must have a mask, is judged on all of them.
    """
    counted = np.flatnonzero(np.asarray(task.mask))
    others = np.setdiff1d(counted, evenly(task, examples))
    chosen = _spread(others if len(others) else counted, examples)
    chunks = index_batches(jnp.asarray(chosen), min(256, len(chosen)), task.num_examples)
    return np.asarray(_losses(program, blocks, hypers, arrays, tuple(factors), tuple(gains), task, chunks))


@partial(jax.jit, static_argnums=(0, 1))
def _losses(
    program: Program,
    blocks: tuple[Block, ...],
    hypers: Any,
    arrays: Any,
    factors: Any,
    gains: Any,
    task: Task,
    chunks: Array,
) -> Array:
    space = extract(program, task, hypers)

    def of(gains: Any) -> Array:
        weights = composed(blocks, arrays, [f._replace(keep=g) for f, g in zip(factors, gains, strict=True)])

        def step(sums: Any, indices: Array) -> tuple[Any, None]:
            batch = rows(task, indices)
            new = -space.log_likelihood_at(weights, batch), jnp.sum(batch.mask)
            return jax.tree.map(jnp.add, sums, new), None

        zeros = jnp.zeros((), factors[0].keep.dtype), jnp.zeros((), int)
        (loss, count), _ = jax.lax.scan(step, zeros, chunks)
        return loss / jnp.maximum(count, 1)

    return jax.lax.map(of, gains)


@partial(jax.jit, static_argnums=(0, 1))
def _quadratic(
    program: Program, blocks: tuple[Block, ...], hypers: Any, arrays: Any, factors: Any, task: Task, chunks: Array
) -> DropQuadratic:
    space = extract(program, task, hypers)
    names = [block.name for block in blocks]
    ones = tuple(f.keep for f in factors)
    theta = space.layout.packed(composed(blocks, arrays, factors))

    def at(keep, function):
        return run_perturbed(
            function, arrays, {n: f._replace(keep=k) for n, f, k in zip(names, factors, keep, strict=True)}
        )

    def of_example(data: Any, mask: Array) -> tuple[Array, Array, Array]:
        example = single(task, data, mask)
        loss, slope = jax.value_and_grad(lambda k: -at(k, lambda a: space.log_likelihood_at(a, example)))(ones)
        outputs, pull = jax.vjp(lambda k: at(k, lambda a: space.outputs_at(a, example)), ones)
        factor = space.output_factor(theta, example).astype(outputs.dtype)
        columns = jax.vmap(lambda column: jnp.concatenate(pull(column)[0]), in_axes=1)(factor)
        return loss, jnp.concatenate(slope), columns

    def step(sums: Any, indices: Array) -> tuple[Any, None]:
        batch = rows(task, indices)
        losses, slopes, columns = jax.vmap(of_example)(batch.data, batch.mask)
        wide = columns.reshape(-1, columns.shape[-1])
        new = jnp.sum(losses), jnp.sum(slopes, axis=0), wide.T @ wide, jnp.sum(batch.mask)
        return jax.tree.map(jnp.add, sums, new), None

    size, dtype = sum(block.cap for block in blocks), ones[0].dtype
    zeros = jnp.zeros((), dtype), jnp.zeros(size, dtype), jnp.zeros((size, size), dtype), jnp.zeros((), int)
    (loss, slope, matrix, count), _ = jax.lax.scan(step, zeros, chunks)
    number = jnp.maximum(count, 1)
    return DropQuadratic(loss / number, -slope / number, matrix / number)


class KernelStatistics(NamedTuple):
    """By block: the Kronecker factors, and the mean squared gradient of a weight over the examples."""

    sides: tuple[Sides, ...]
    sensitivity: Array


def kernel_statistics(
    program: Program, blocks: tuple[Block, ...], hypers: Any, arrays: Any, task: Task, examples: int
) -> KernelStatistics:
    """A, G and f at the weights ``arrays``; A of the inputs summed over the window, as the perturbation meets them."""
    chosen = evenly(task, examples)
    widest = max(block.num_inputs + block.num_outputs for block in blocks)
    size = int(np.clip(_CHUNK_NUMBERS // (200 * widest), 1, min(256, len(chosen))))
    chunks = index_batches(jnp.asarray(chosen), size, task.num_examples)
    return _statistics(program, blocks, hypers, arrays, task, chunks)


@partial(jax.jit, static_argnums=(0, 1))
def _statistics(
    program: Program, blocks: tuple[Block, ...], hypers: Any, arrays: Any, task: Task, chunks: Array
) -> KernelStatistics:
    space = extract(program, task, hypers)
    first = single(task, jax.tree.map(lambda a: a[0], task.data), jnp.asarray(True))
    layers = find_layers(lambda a: space.outputs_at(a, first), arrays)
    places = {layer.kernel: number for number, layer in enumerate(layers)}
    theta = space.layout.packed(arrays)

    def of_example(data: Any, mask: Array) -> Any:
        example = single(task, data, mask)
        nothing = [jnp.zeros((layer.positions, layer.num_outputs), theta.dtype) for layer in layers]
        outputs, pull, inputs = jax.vjp(
            lambda p: run_layers(lambda a: space.outputs_at(a, example), arrays, p), nothing, has_aux=True
        )
        slope = jax.grad(lambda p: run_layers(lambda a: space.log_likelihood_at(a, example), arrays, p)[0])(nothing)
        factor = space.output_factor(theta, example).astype(outputs.dtype)
        gradients = jax.vmap(lambda column: pull(column)[0], in_axes=1)(factor)
        made = []
        for block in blocks:
            number = places[block.name]
            a, g, e = inputs[number] * mask, gradients[number], slope[number]
            window = int(np.prod([block.shape[i] for i in block.window_axes], dtype=int))
            seen = jnp.sum(a.reshape(a.shape[0], block.num_inputs, window), axis=-1)
            square = jnp.sum(jnp.square(a)) * jnp.sum(jnp.square(e)) if len(a) == 1 else jnp.sum(jnp.square(a.T @ e))
            made.append((seen / np.sqrt(len(a)), g.reshape(-1, g.shape[-1]), square))
        return made

    def gram(rows: Array) -> Array:
        flat = rows.reshape(-1, rows.shape[-1])
        return flat.T @ flat

    def step(sums: Any, indices: Array) -> tuple[Any, None]:
        batch = rows(task, indices)
        found = jax.vmap(of_example)(batch.data, batch.mask)
        # one product for all examples of a chunk: a matrix for each would be written to memory, and read again
        new = [(gram(a), gram(g), jnp.sum(square)) for a, g, square in found], jnp.sum(batch.mask)
        return jax.tree.map(jnp.add, sums, new), None

    dtype = theta.dtype
    zeros = [
        (jnp.zeros((b.num_inputs,) * 2, dtype), jnp.zeros((b.num_outputs,) * 2, dtype), jnp.zeros((), dtype))
        for b in blocks
    ]
    (sums, count), _ = jax.lax.scan(step, (zeros, jnp.zeros((), int)), chunks)
    number = jnp.maximum(count, 1)
    sides = tuple(Sides(a / number, g / number) for a, g, _ in sums)
    sizes = jnp.asarray([np.prod(block.shape) for block in blocks])
    return KernelStatistics(sides, jnp.stack([square for *_, square in sums]) / (number * sizes))
