"""Laplace's approximation over a task's own parameters, given the base.

    z | D_t ~ N(z^, diag(P)^-1),   P = prior's precision + diag sum_n J_n^T F_n J_n,   J_n = d eta_n / d z

with one random sign a column of F's factor: one backward pass an example, unbiased. As a belief over all weights theta its
draws are ``d theta / d z (z - z^)``, so that ``Linearised`` predictions are those of the network linearised in z. The diagonal
does not see that V, U, r and s move outputs together: predictions are under-confident.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ssm_nn.extraction import extract
from ssm_nn.inference.batches import index_batches, rows, single
from ssm_nn.inference.beliefs import Belief
from ssm_nn.inference.perturbation.curvature import evenly
from ssm_nn.inference.perturbation.factored import run_perturbed
from ssm_nn.inference.perturbation.fitting import OwnParameters, Perturbed, Surroundings, joined
from ssm_nn.tasks import Task

__all__ = ["OwnPrecision", "diagonal_information", "own_belief"]

Array = Any

_CHUNK_NUMBERS = 2**22  # gradients of single examples held together: 16 MiB in float32


def diagonal_information(
    kind: Perturbed, own: OwnParameters, around: Surroundings, task: Task, key: Array, examples: int
) -> OwnParameters:
    """``sum_n (J_n^T L_n e_n)^2`` for each of the task's own parameters, scaled up from ``examples`` to all examples."""
    chosen = evenly(task, examples)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(own))
    size = max(min(_CHUNK_NUMBERS // numbers, 128, len(chosen)), 1)
    chunks = index_batches(jnp.asarray(chosen), size, task.num_examples)
    return _information(kind, own, around, task, chunks, key)


@partial(jax.jit, static_argnums=0)
def _information(
    kind: Perturbed, own: OwnParameters, around: Surroundings, task: Task, chunks: Array, key: Array
) -> OwnParameters:
    space = extract(kind.program, task, around.hypers)
    theta = space.layout.packed(kind.composed(own, around))

    def of_one(data: Any, mask: Array, key: Array) -> OwnParameters:
        example = single(task, data, mask)

        def outputs(own: OwnParameters) -> Array:
            return run_perturbed(lambda a: space.outputs_at(a, example), kind.arrays(own, around), kind.named(own))

        at_own, pull = jax.vjp(outputs, own)
        factor = space.output_factor(theta, example).astype(at_own.dtype)
        return jax.tree.map(jnp.square, pull(factor @ jax.random.rademacher(key, factor.shape[1:], at_own.dtype))[0])

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


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["own", "around", "values", "example"],
    meta_fields=["kind"],
)
@dataclass(frozen=True)
class OwnPrecision:
    """A belief's precision that lives in z: what ``predict_from`` asks of it.

    Attributes:
        own: z^.
        around: what stands beside it.
        values: P.
        example: one example, which gives the program its shapes.
        kind: how z makes weights.
    """

    own: OwnParameters
    around: Surroundings
    values: OwnParameters
    example: Task
    kind: Perturbed

    def _theta(self, own: OwnParameters) -> Array:
        layout = extract(self.kind.program, self.example, self.around.hypers).layout
        return layout.packed(self.kind.composed(own, self.around))

    def sample(self, key: Array) -> Array:
        """``d theta / d z e / sqrt P`` (P,)."""
        leaves, treedef = jax.tree.flatten(self.values)
        keys = jax.random.split(key, len(leaves))
        shifts = [jax.random.normal(k, v.shape, v.dtype) / jnp.sqrt(v) for k, v in zip(keys, leaves, strict=True)]
        return jax.jvp(self._theta, (self.own,), (jax.tree.unflatten(treedef, shifts),))[1]

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
        layout = extract(self.kind.program, self.example, self.around.hypers).layout
        return layout.packed(made)


def own_belief(
    kind: Perturbed, own: OwnParameters, around: Surroundings, task: Task, theta: Array, key: Array, examples: int
) -> Belief:
    """The belief over all weights, mean ``theta`` (P,), of a task with training data ``task``."""
    information = diagonal_information(kind, own, around, task, key, examples)
    data, mask = jax.tree.map(lambda a: a[:1], (task.data, task.mask))
    values = own_precision(kind, own, around, information)
    return Belief(theta, OwnPrecision(own, around, values, Task(data, task.context, mask), kind))
