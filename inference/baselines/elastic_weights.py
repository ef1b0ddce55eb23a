"""Online elastic weight consolidation: weights that mattered for past tasks are held where they were.

    theta_t = argmin -log p(D_t | theta) + 1/2 |theta - m_0|^2 / s_0^2 + strength / 2 sum_i F_i (theta_i - theta_{t-1,i})^2
    F      <- decay F + diag sum_n J_n^T L_n L_n^T J_n                                            at theta_t

F is the diagonal of the true Fisher information of the whole task, summed over its examples; one random sign a column of L_n
(K, C) makes of it ``E[(J_n^T L_n e)^2]``, one backward pass an example: exact where C is 1, elsewhere unbiased. With
strength and decay 1 and a flat prior the weights are the exact posterior mean of a model that is linear in them, with
Gaussian noise and orthogonal features; a prior that is not flat pulls once more in every task, as weight decay does.
Sources: Kirkpatrick et al. 2017 (arXiv 1612.00796); Schwarz et al. 2018 (arXiv 1805.06370), the online form.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ssm_nn.extraction import Program, extract
from ssm_nn.inference.baselines.anchoring import AnchoredState, Anchoring
from ssm_nn.inference.batches import index_batches, rows, single, with_mask
from ssm_nn.inference.curvature import random_column
from ssm_nn.inference.laplace import LaplaceFilter
from ssm_nn.inference.map_problem import NOT_FINITE, MapResult, all_finite
from ssm_nn.tasks import Task

__all__ = ["OnlineEWC", "diagonal_fisher"]

Array = Any

_CHUNK_NUMBERS = 2**24  # gradients of single examples held together: 64 MiB in float32


class OnlineEWC(Anchoring):
    """Online EWC on the program, prior, power and estimator of a filter.

    Args:
        engine: the filter to compare with; its kernel and structure are not read.
        strength: how often the past information counts, >= 0; 0 is fine-tuning, 1 the diagonal Laplace approximation.
        decay: share of the past information kept from one task to the next, in [0, 1].
    """

    def __init__(self, engine: LaplaceFilter, strength: float = 1.0, decay: float = 1.0):
        super().__init__(engine, strength, firmness=strength)
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is {decay}; a number from 0 to 1 is accepted")
        self.decay = float(decay)

    def _learn(self, state: AnchoredState, task: Task) -> tuple[AnchoredState, MapResult]:
        key, map_key = jax.random.split(state.key)
        mean, found = self._search(state.mean, self._around(state, task), task, map_key)
        fisher = state.importance
        if found.status != NOT_FINITE:
            sign_key = jax.random.fold_in(map_key, 0)
            new = diagonal_fisher(self.engine.program, self.engine.hypers, mean, with_mask(task), sign_key)
            fisher = self.decay * state.importance + self.engine.power * new
            if not bool(all_finite(fisher)):
                mean, fisher, found = state.mean, state.importance, found._replace(status=NOT_FINITE)
        return AnchoredState(state.step + 1, key, mean, fisher), found


@partial(jax.jit, static_argnums=0)
def diagonal_fisher(program: Program, hypers: Any, theta: Array, task: Task, key: Array) -> Array:
    """``sum_n (J_n^T L_n e_n)^2`` (P,) with random signs e_n (C,), over all examples of a task that has a mask."""
    space = extract(program, task, hypers)
    total = task.num_examples
    chunks = index_batches(jnp.arange(total), max(min(_CHUNK_NUMBERS // theta.shape[0], total), 1), total)

    def of_one(data: Any, mask: Array, key: Array) -> Array:
        return jnp.square(random_column(space, theta, single(task, data, mask), key))

    def step(summed: Array, inputs: Any) -> tuple[Array, None]:
        indices, chunk_key = inputs
        chunk = rows(task, indices)
        squares = jax.vmap(of_one)(chunk.data, chunk.mask, jax.random.split(chunk_key, indices.shape[0]))
        return summed + jnp.sum(squares, axis=0), None

    summed, _ = jax.lax.scan(step, jnp.zeros_like(theta), (chunks, jax.random.split(key, chunks.shape[0])))
    return summed
