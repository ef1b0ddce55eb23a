"""What a structure loses of a task: its precision against the one it was cut from, as a divergence in nats.

    KL(N(m, Lambda^-1) || N(m, Lambda_*^-1)) = 1/2 [tr(Lambda_* Lambda^-1) - P + log det Lambda - log det Lambda_*]
    Lambda_* = Lambda' + G_t      uncut; G_t the Gauss-Newton matrix of the whole task

The trace is an average over draws of the belief, of products with J alone; log det Lambda_* comes from the evidence that the
filter recorded. Beside it stands what the task brought, 1/2 log det(Lambda_* Lambda'^-1).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssm_nn.extraction import Program, extract
from ssm_nn.inference.batches import batched, single, with_mask
from ssm_nn.inference.beliefs import Belief
from ssm_nn.inference.diagnosis.ahead import predicted_beliefs
from ssm_nn.inference.diagnosis.trajectories import widened
from ssm_nn.inference.map_problem import FIXED_BUDGET, NOT_FINITE
from ssm_nn.inference.smoothing import Smoothed
from ssm_nn.tasks import Task, Tasks

__all__ = ["StructureLoss", "structure_loss"]

Array = Any

_DRAWS = 100
_EXAMPLES = 256  # of one pass


class StructureLoss(NamedTuple):
    """By task (T,), in nats, nan where it cannot be told: ``lost`` by the cut, and ``brought`` by the task's data."""

    lost: np.ndarray
    brought: np.ndarray


def structure_loss(posterior: Smoothed, stack: Tasks, power: float = 1.0, key: int = 0) -> StructureLoss:
    """Of each task's own cut; 0 for a structure that holds every precision.

    Args:
        posterior: of a LaplaceFilter.
        stack: its tasks.
        power: how often the filter counted the likelihood.
        key: of the draws.
    """
    filtered = posterior.filtered
    rows = []
    for t, predicted in enumerate(predicted_beliefs(filtered, stack)):
        belief, info, task = filtered.beliefs[t], filtered.infos[t], with_mask(stack.at(t))
        if info.status in (FIXED_BUDGET, NOT_FINITE) or not bool(np.any(task.mask)):
            rows.append((np.nan, np.nan))
            continue
        with jax.enable_x64(True):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(key), t), _DRAWS)
            both = widened((Belief(predicted.mean, predicted.precision), Belief(belief.mean, belief.precision)))
            made = _products(filtered.program, widened(filtered.hypers), *both, widened(task), power, keys)
            square, change, logdets = (np.asarray(part) for part in made)
        gain = 2 * (info.log_likelihood - 0.5 * float(square) - info.log_evidence)
        lost = 0.5 * (float(np.mean(change)) + float(logdets) - gain)
        rows.append((max(lost, 0.0), gain / 2))
    return StructureLoss(*(np.array(column) for column in zip(*rows, strict=True)))


@partial(jax.jit, static_argnums=0)
def _products(
    program: Program, hypers: Any, predicted: Belief, belief: Belief, task: Task, power: Array, keys: Array
) -> tuple[Array, Array, Array]:
    """d^T Lambda' d of the MAP's shift; s^T (Lambda_* - Lambda) s of draws s (S,); log det Lambda - log det Lambda'."""
    space = extract(program, task, hypers)
    batches = batched(task, min(task.num_examples, _EXAMPLES))
    before, after = predicted.precision.quadratic_form(), belief.precision.quadratic_form()

    def information(shift: Array) -> Array:
        """|L^T J s|^2 over all examples."""

        def of_example(d: Any, m: Array) -> Array:
            example = single(task, d, m)
            _, moved = jax.jvp(lambda theta: space.outputs(theta, example), (belief.mean,), (shift,))
            return jnp.sum(jnp.square(space.output_factor(belief.mean, example).T @ moved))

        return jnp.sum(jax.lax.map(lambda chunk: jnp.sum(jax.vmap(of_example)(*chunk)), (batches.data, batches.mask)))

    def change(key: Array) -> Array:
        shift = belief.precision.sample(key)
        return before(shift) + power * information(shift) - after(shift)

    logdets = belief.precision.logdet() - predicted.precision.logdet()
    return before(belief.mean - predicted.mean), jax.lax.map(change, keys), logdets
