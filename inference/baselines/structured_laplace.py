"""Online structured Laplace with summed factors: the Kronecker precision of Ritter et al., which keeps two matrices a layer.

    theta_t = argmin -log p(D_t | theta) + 1/2 |theta - theta_{t-1}|^2_Lambda
    Lambda  = 1 / s_0^2 + strength / t  (sum_s A_s) (x) (sum_s G_s)          a layer, s over the t tasks so far

with A_s the mean of ``a a^T`` over a task's examples and G_s the sum of ``g g^T``, a a layer's inputs and g the gradients at
its outputs. The product of the sums counts every task's inputs with every other task's gradients: exact for one task of a
model linear in its weights with Gaussian noise, and for tasks with equal inputs. The filter with ``Kronecker`` adds up the
information instead. Weights outside the layers keep the diagonal of their Fisher information, as in elastic weight
consolidation. Source: Ritter, Botev and Barber 2018 (arXiv 1805.07810); the share 1 / t is ours, so that strength 1 counts
every task once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssm_nn.extraction import Program, extract
from ssm_nn.inference.baselines.elastic_weights import diagonal_fisher
from ssm_nn.inference.baselines.training import TaskByTask
from ssm_nn.inference.batches import some_examples, with_mask
from ssm_nn.inference.beliefs import Belief
from ssm_nn.inference.checks import check_count, check_finite
from ssm_nn.inference.kronecker import Kronecker
from ssm_nn.inference.laplace import LaplaceFilter
from ssm_nn.inference.layer_passes import LayerPasses
from ssm_nn.inference.map_problem import NOT_FINITE, MapResult, all_finite
from ssm_nn.precision_kronecker import EigenBlock, KroneckerEigen
from ssm_nn.tasks import Task

__all__ = ["StructuredLaplace", "StructuredState"]

Array = Any


class StructuredState(NamedTuple):
    """All that the next task needs of the past.

    Attributes:
        step: number of tasks so far.
        key: of the random choices to come.
        mean: (P,), the weights.
        factors: (sum of A (I, I), sum of G (O, O)) of each layer; the bias counts as an input.
        rest: the summed Fisher diagonal of the weights outside the layers.
        tasks: number of tasks that had data.
    """

    step: Array
    key: Array
    mean: Array
    factors: tuple[tuple[Array, Array], ...]
    rest: Array
    tasks: Array


class StructuredLaplace(TaskByTask[StructuredState]):
    """Online structured Laplace on the program, prior, power and estimator of a filter.

    Args:
        engine: the filter to compare with, of the structure ``Kronecker``; its kernel is not read.
        strength: how often the past information counts, >= 0; 0 is fine-tuning with the weights pulled to where they were.
        examples: of each task, for its factors; a task of fewer is used whole.
    """

    def __init__(self, engine: LaplaceFilter, strength: float = 1.0, examples: int = 10_000):
        super().__init__(engine)
        check_finite(0.0, strength=strength)
        check_count(examples=examples)
        if not isinstance(engine.structure, Kronecker):
            raise ValueError(f"the engine's structure is {engine.structure}; Kronecker() is accepted")
        self.strength, self.examples = float(strength), examples

    def init(self, key: Array, task: Task | Mapping[str, Any] | None = None) -> StructuredState:
        """No information yet, and the weights where the filter's first search starts.

        Args:
            key: a ``jax.random.key``, or a whole number taken as its seed.
            task: the first task; it gives shapes and is checked.
        """
        begun, prior = self._begun(key, task), self._prior(task).precision
        factors = tuple((jnp.zeros_like(b.inputs), jnp.zeros_like(b.outputs)) for b in prior.blocks)
        return StructuredState(*begun, factors, jnp.zeros_like(prior.rest.diagonal), jnp.zeros((), jnp.int32))

    def belief(self, state: StructuredState, task: Task | Mapping[str, Any] | None = None) -> Belief:
        """N(weights, Lambda^-1)."""
        strength = jnp.asarray(self.strength, state.mean.dtype)
        return Belief(state.mean, _precision(self._prior(task).precision, state, strength))

    def _learn(self, state: StructuredState, task: Task) -> tuple[StructuredState, MapResult]:
        key, map_key = jax.random.split(state.key)
        prior = self._prior(task)
        around = prior if int(state.tasks) == 0 else self.belief(state, task)
        mean, found = self._search(state.mean, around, task, map_key)
        if found.status == NOT_FINITE:
            return state._replace(step=state.step + 1, key=key), found
        power = jnp.asarray(self.engine.power, mean.dtype)
        new = _factors(
            self.engine.program,
            self.engine.hypers,
            mean,
            with_mask(task),
            self.examples,
            jax.random.fold_in(map_key, 0),
        )
        factors = tuple(
            (a + inputs, g + power * outputs) for (a, g), (inputs, outputs) in zip(state.factors, new, strict=True)
        )
        rest = state.rest
        if prior.precision.places.rest_size:
            fisher = diagonal_fisher(self.engine.program, self.engine.hypers, mean, with_mask(task), map_key)
            rest = rest + power * prior.precision.places.rest_of(fisher)
        if not bool(all_finite((factors, rest))):
            return state._replace(step=state.step + 1, key=key), found._replace(status=NOT_FINITE)
        return StructuredState(state.step + 1, key, mean, factors, rest, state.tasks + 1), found


@jax.jit
def _precision(prior: KroneckerEigen, state: StructuredState, strength: Array) -> KroneckerEigen:
    """``1 / s_0^2 + strength / t (sum A) (x) (sum G)``, in the eigenvectors of the sums."""
    share = strength / jnp.maximum(state.tasks, 1)
    blocks = []
    for block, (inputs, outputs) in zip(prior.blocks, state.factors, strict=True):
        (a, basis_a), (g, basis_g) = jnp.linalg.eigh(inputs), jnp.linalg.eigh(outputs)
        information = share * jnp.maximum(a, 0)[:, None] * jnp.maximum(g, 0)
        blocks.append(EigenBlock(basis_a, basis_g, block.in_basis(basis_a, basis_g) + information))
    rest = prior.rest._replace(diagonal=prior.rest.diagonal + strength * state.rest)
    return replace(prior, blocks=tuple(blocks), rest=rest)


@partial(jax.jit, static_argnums=(0, 4))
def _factors(
    program: Program, hypers: Any, theta: Array, task: Task, examples: int, key: Array
) -> tuple[tuple[Array, Array], ...]:
    """(A, G) of each layer, A a mean over examples and positions and G a sum over them, scaled up to the whole task."""
    space = extract(program, task, hypers)
    subset_key, sign_key = jax.random.split(key)
    chosen, counted = some_examples(subset_key, task, examples)
    passes = LayerPasses(space, theta, task, chosen, sign_key, examples)
    scale = jnp.sum(task.mask) / counted
    return tuple(
        (inputs / (counted * layer.positions), outputs * scale)
        for layer, (inputs, outputs) in zip(passes.layers, passes.sides(), strict=True)
    )
