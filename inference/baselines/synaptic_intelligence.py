"""Synaptic intelligence: each weight's share of the fall in loss, read off the path that training took.

    path_i      = - sum over steps of  d loss / d theta_i  times  the step of theta_i
    importance <- importance + max(path, 0) / ((theta_t - theta_{t-1})^2 + damping)               after task t
    theta_t     = argmin -log p(D_t | theta) + 1/2 |theta - m_0|^2 / s_0^2
                         + strength sum_i importance_i (theta_i - theta_{t-1,i})^2

The loss of the path is the task's negative log likelihood alone, summed over its examples (N / B times a batch's), so that
the importance is in nats per squared weight. A quadratic loss of diagonal curvature h, minimised by small steps, has the
importance h / 2 without damping: at strength 1 the penalty is that loss again. A path below 0, which noise leaves where
nothing was learnt, counts as 0. Source: Zenke, Poole, Ganguli 2017 (arXiv 1703.04200).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ssm_nn.extraction import Program, extract
from ssm_nn.inference.baselines.anchoring import AnchoredState, Anchoring
from ssm_nn.inference.baselines.training import minibatch_of
from ssm_nn.inference.batches import index_batches
from ssm_nn.inference.checks import check_positive
from ssm_nn.inference.epochs import batch_log_likelihood, run_epochs
from ssm_nn.inference.laplace import LaplaceFilter
from ssm_nn.inference.map_problem import NOT_FINITE, MapProblem, MapResult
from ssm_nn.inference.minibatch import Minibatch
from ssm_nn.tasks import Task

__all__ = ["SynapticIntelligence"]

Array = Any


class SynapticIntelligence(Anchoring):
    """SI on the program, prior and power of a filter.

    Args:
        engine: the filter to compare with; its kernel and structure are not read.
        strength: c, how often the path's fall in loss counts as penalty, >= 0; 0 is fine-tuning.
        damping: xi, a squared change of a weight below which the importance is damped, > 0.
        minibatch: optimiser, epochs and batch size; by default the engine's estimator, which must be a Minibatch. The
            prior's gradient is computed in every step.
    """

    def __init__(
        self, engine: LaplaceFilter, strength: float = 1.0, damping: float = 1e-3, minibatch: Minibatch | None = None
    ):
        super().__init__(engine, strength, firmness=2 * strength)
        check_positive(damping=damping)
        self.damping = float(damping)
        self.minibatch = minibatch_of(engine, minibatch, type(self).__name__)

    def _learn(self, state: AnchoredState, task: Task) -> tuple[AnchoredState, MapResult]:
        key, path_key = jax.random.split(state.key)
        around = self._around(state, task)
        problem = self._problem(around, task)
        start = state.mean - around.mean
        carry = (start, jnp.zeros_like(start), self.minibatch.optimizer.init(start))
        epoch = partial(_epoch, self.engine.program, self.minibatch, problem)
        steps = -(-task.num_examples // self.minibatch.batch_size)
        passes = run_epochs(self.minibatch, epoch, carry, steps, path_key)
        shift, path, _ = passes.carry
        found = MapResult(shift, *passes[1:])
        if found.status == NOT_FINITE:
            return state._replace(step=state.step + 1, key=key), found
        gained = jnp.maximum(path, 0) / (jnp.square(shift - start) + self.damping)
        return AnchoredState(state.step + 1, key, around.mean + shift, state.importance + gained), found


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _epoch(
    program: Program, settings: Minibatch, problem: MapProblem, carry: Any, key: Array
) -> tuple[tuple[Array, Array, Any], Array]:
    """One pass of (shift (P,), path (P,), the optimiser's state), and its mean objective."""
    space = extract(program, problem.task, problem.hypers)
    total = problem.task.num_examples
    order = index_batches(jax.random.permutation(key, total), settings.batch_size, total)
    counted = jnp.maximum(jnp.sum(problem.task.mask), 1)

    def step(carry: Any, indices: Array) -> Any:
        shift, path, optimiser = carry
        log_likelihood = batch_log_likelihood(space, problem.task, indices)
        loss, slope = jax.value_and_grad(lambda d: -problem.power * log_likelihood(problem.mean + d))(shift)
        pull = problem.precision.matvec(shift)
        change, optimiser = settings.optimizer.update((slope + pull) / counted, optimiser, shift)
        value = loss + 0.5 * problem.precision.quadratic(shift)
        return (optax.apply_updates(shift, change), path - slope * change, optimiser), value

    carry, values = jax.lax.scan(step, carry, order)
    return carry, jnp.mean(values)
