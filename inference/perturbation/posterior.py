"""Laplace's approximation over a task's own parameters, given the base.

    z | D_t ~ N(z^, P^-1),   P = prior's precision + sum_n J_n^T L_n L_n^T J_n,   J_n = d eta_n / d z

As a belief over all weights theta its draws are ``d theta / d z (z - z^)``, so that ``Linearised`` predictions are those of
the network linearised in z. P is a matrix for up to 1,024 own parameters, and its diagonal beyond, with one random sign a
column of L: one backward pass an example, unbiased. The diagonal does not see that V, U, r and s move outputs together:
predictions are under-confident.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import solve_triangular

from ssm_nn.extraction import Layout, extract
from ssm_nn.inference.batches import index_batches, rows, single
from ssm_nn.inference.beliefs import Belief
from ssm_nn.inference.perturbation.curvature import evenly
from ssm_nn.inference.perturbation.factored import run_perturbed
from ssm_nn.inference.perturbation.fitting import OwnParameters, Perturbed, Surroundings, joined
from ssm_nn.tasks import Task

__all__ = ["DenseOwnPrecision", "DiagonalOwnPrecision", "diagonal_information", "own_belief"]

Array = Any

_MOST_DENSE = 1024  # own parameters of which P is a matrix
_CHUNK_NUMBERS = 2**22  # gradients of single examples held together: 16 MiB in float32


def diagonal_information(
    kind: Perturbed, own: OwnParameters, around: Surroundings, task: Task, key: Array, examples: int
) -> OwnParameters:
    """``sum_n (J_n^T L_n e_n)^2`` for each of the task's own parameters, scaled up from ``examples`` to all examples."""
    return _information(kind, own, around, task, _chunks(own, task, examples), key)


@partial(jax.jit, static_argnums=0)
def _information(
    kind: Perturbed, own: OwnParameters, around: Surroundings, task: Task, chunks: Array, key: Array
) -> OwnParameters:
    columns = _example_columns(kind, own, around, task)

    def of_one(data: Any, mask: Array, key: Array) -> OwnParameters:
        pull, factor = columns(single(task, data, mask))
        return jax.tree.map(jnp.square, pull(factor @ jax.random.rademacher(key, factor.shape[1:], factor.dtype))[0])

    def step(sums: Any, inputs: Any) -> tuple[Any, None]:
        indices, chunk_key = inputs
        batch = rows(task, indices)
        squares = jax.vmap(of_one)(batch.data, batch.mask, jax.random.split(chunk_key, indices.shape[0]))
        new = jax.tree.map(lambda s: jnp.sum(s, axis=0), squares), jnp.sum(batch.mask)
        return jax.tree.map(jnp.add, sums, new), None

    zeros = jax.tree.map(jnp.zeros_like, own), jnp.zeros((), int)
    (summed, seen), _ = jax.lax.scan(step, zeros, (chunks, jax.random.split(key, chunks.shape[0])))
    scale = jnp.sum(task.mask) / jnp.maximum(seen, 1)
    return jax.tree.map(lambda s: (s * scale).astype(s.dtype), summed)


def own_precision(
    kind: Perturbed, own: OwnParameters, around: Surroundings, information: OwnParameters
) -> OwnParameters:
    """P: prior and information; infinite for padding and pruned entries, which are known to be zero."""
    factors = []
    for f, seen in zip(own.factors, information.factors, strict=True):
        prior = kind.prior.precision(f)
        factors.append(
            seen._replace(
                inputs=prior.inputs + seen.inputs,
                outputs=prior.outputs + seen.outputs,
                left=jnp.where(f.left != 0, prior.left + seen.left, jnp.inf),
                right=jnp.where(f.right != 0, prior.right + seen.right, jnp.inf),
                keep=jnp.full_like(f.keep, jnp.inf),
            )
        )
    plain = joined(information.own, information.base)
    total = {
        network: {path: around.prior.precision[network][path] + leaf for path, leaf in leaves.items()}
        for network, leaves in plain.items()
    }

    def part(names: Any) -> Any:
        return {network: {path: total[network][path] for path in leaves} for network, leaves in names.items()}

    return OwnParameters(part(own.own), tuple(factors), part(own.base))


@dataclass(frozen=True)
class _OwnPrecision:
    """A belief's precision that lives in z (m numbers): what ``predict_from`` asks of it.

    Attributes:
        own: z^.
        around: what stands beside it.
        example: one example, which gives the program its shapes.
        free: (m,), false for padding and pruned entries, which are known to be zero.
        kind: how z makes weights.
    """

    own: OwnParameters
    around: Surroundings
    example: Task
    free: Array
    kind: Perturbed

    def own_noise(self, key: Array) -> Array:
        """Standard normals (m,), 0 where z is known."""
        return jnp.where(self.free, jax.random.normal(key, self.free.shape, ravel_pytree(self.own)[0].dtype), 0.0)

    def own_shift(self, noise: Array) -> OwnParameters:
        """``P^-1/2 noise``."""
        raise NotImplementedError

    def sample(self, key: Array) -> Array:
        """``d theta / d z P^-1/2 e`` (P,)."""
        return jax.jvp(self._theta, (self.own,), (self.own_shift(self.own_noise(key)),))[1]

    def _theta(self, own: OwnParameters) -> Array:
        return self._layout.packed(self.kind.composed(own, self.around))

    @property
    def _layout(self) -> Layout:
        return extract(self.kind.program, self.example, self.around.hypers).layout


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["own", "around", "example", "free", "values"],
    meta_fields=["kind"],
)
@dataclass(frozen=True)
class DiagonalOwnPrecision(_OwnPrecision):
    """``values``: diag(P)."""

    values: OwnParameters

    def own_shift(self, noise: Array) -> OwnParameters:
        """Elementwise."""
        return jax.tree.map(lambda e, p: e / jnp.sqrt(p), ravel_pytree(self.own)[1](noise), self.values)

    def variance(self) -> Array:
        """``diag(d theta / d z P^-1 (d theta / d z)^T)`` (P,): of ``s w r + v u`` the four squares, each with its variance."""
        spread = jax.tree.map(lambda p: 1 / p, self.values)
        made = self.kind.arrays(spread, self.around._replace(base=jax.tree.map(jnp.zeros_like, self.around.base)))
        still = jax.tree.map(jnp.square, self.kind.arrays(self.own, self.around))
        for block, z, v in zip(self.kind.blocks, self.own.factors, spread.factors, strict=True):
            squares = jax.tree.map(jnp.square, z)
            first = squares._replace(inputs=v.inputs, left=v.left)
            second = squares._replace(outputs=v.outputs, right=v.right)
            network, path = block.name
            kernel = still[network][path]
            made[network][path] = block.compose(kernel, first) + block.compose(kernel, second)
        return self._layout.packed(made)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["own", "around", "example", "free", "root"],
    meta_fields=["kind"],
)
@dataclass(frozen=True)
class DenseOwnPrecision(_OwnPrecision):
    """``root`` (m, m), lower: ``root root^T = P`` on the free entries, the identity elsewhere."""

    root: Array

    def own_shift(self, noise: Array) -> OwnParameters:
        """``root^-T noise``."""
        solved = solve_triangular(self.root, noise, trans=1, lower=True)
        return ravel_pytree(self.own)[1](jnp.where(self.free, solved, 0.0))

    def variance(self) -> Array:
        """``diag(d theta / d z P^-1 (d theta / d z)^T)`` (P,), a column of the root at a time."""
        start = jnp.zeros_like(self._theta(self.own))

        def add(total: Array, noise: Array) -> tuple[Array, None]:
            shift = self.own_shift(jnp.where(self.free, noise, 0.0))
            return total + jnp.square(jax.jvp(self._theta, (self.own,), (shift,))[1]), None

        return jax.lax.scan(add, start, jnp.eye(len(self.free), dtype=self.root.dtype))[0]


def own_belief(
    kind: Perturbed, own: OwnParameters, around: Surroundings, task: Task, theta: Array, key: Array, examples: int
) -> Belief:
    """The belief over all weights, mean ``theta`` (P,), of a task with training data ``task``."""
    data, mask = jax.tree.map(lambda a: a[:1], (task.data, task.mask))
    known = own_precision(kind, own, around, jax.tree.map(jnp.zeros_like, own))
    free = jnp.isfinite(ravel_pytree(known)[0])
    common = own, around, Task(data, task.context, mask), free, kind
    if len(free) > _MOST_DENSE:
        values = own_precision(kind, own, around, diagonal_information(kind, own, around, task, key, examples))
        return Belief(theta, DiagonalOwnPrecision(*common, values))
    chunks = _chunks(own, task, examples)
    total = _dense_information(kind, own, around, task, chunks) + jnp.diag(ravel_pytree(known)[0])
    both = free[:, None] & free
    root = jnp.linalg.cholesky(jnp.where(both, total, jnp.eye(len(free), dtype=total.dtype)))
    return Belief(theta, DenseOwnPrecision(*common, root))


@partial(jax.jit, static_argnums=0)
def _dense_information(kind: Perturbed, own: OwnParameters, around: Surroundings, task: Task, chunks: Array) -> Array:
    """``sum_n J_n^T L_n L_n^T J_n`` (m, m), scaled up from the examples of ``chunks`` to all."""
    columns = _example_columns(kind, own, around, task)

    def of_one(data: Any, mask: Array) -> Array:
        pull, factor = columns(single(task, data, mask))
        return jax.vmap(lambda column: ravel_pytree(pull(column)[0])[0])(factor.T)

    def step(sums: tuple[Array, Array], indices: Array) -> tuple[tuple[Array, Array], None]:
        batch = rows(task, indices)
        new = jax.vmap(of_one)(batch.data, batch.mask).reshape(-1, sums[0].shape[0])
        return (sums[0] + new.T @ new, sums[1] + jnp.sum(batch.mask)), None

    flat = ravel_pytree(own)[0]
    zeros = jnp.zeros((len(flat), len(flat)), flat.dtype), jnp.zeros((), int)
    (summed, seen), _ = jax.lax.scan(step, zeros, chunks)
    return summed * (jnp.sum(task.mask) / jnp.maximum(seen, 1)).astype(flat.dtype)


def _chunks(own: OwnParameters, task: Task, examples: int) -> Array:
    """Indices of at most so many examples, as many together as their gradients fit."""
    chosen = evenly(task, examples)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(own))
    size = max(min(_CHUNK_NUMBERS // numbers, 128, len(chosen)), 1)
    return index_batches(jnp.asarray(chosen), size, task.num_examples)


def _example_columns(
    kind: Perturbed, own: OwnParameters, around: Surroundings, task: Task
) -> Callable[[Task], tuple[Callable[[Array], tuple[OwnParameters]], Array]]:
    """Of an example: products with ``J^T``, and L (K, C)."""
    space = extract(kind.program, task, around.hypers)
    theta = space.layout.packed(kind.composed(own, around))

    def of(example: Task) -> tuple[Any, Array]:
        def outputs(own: OwnParameters) -> Array:
            return run_perturbed(lambda a: space.outputs_at(a, example), kind.arrays(own, around), kind.named(own))

        at_own, pull = jax.vjp(outputs, own)
        return pull, space.output_factor(theta, example).astype(at_own.dtype)

    return of
