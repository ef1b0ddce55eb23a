"""Variational continual learning, mean field: the best diagonal Gaussian for each task, the last one as its prior.

    q_t = argmin -E_q[log p(D_t | theta)] + kl_weight KL(q | q_{t-1}),   q = N(mu, diag sigma^2),  q_0 the program's prior

by the gradients of ``theta = mu + sigma e``, e standard normal, with respect to mu and log sigma; the likelihood of a batch is
scaled by N / B, the KL counts once. Exact, up to Monte-Carlo noise, for models that are linear in their weights with Gaussian
noise and orthogonal features. Source: Nguyen, Li, Bui, Turner 2018 (arXiv 1710.10628), without coresets.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ssm_nn.extraction import Program, extract
from ssm_nn.inference.baselines.training import TaskByTask, minibatch_of
from ssm_nn.inference.batches import index_batches
from ssm_nn.inference.beliefs import Belief
from ssm_nn.inference.checks import check_count, check_positive
from ssm_nn.inference.epochs import batch_log_likelihood, run_epochs
from ssm_nn.inference.laplace import LaplaceFilter
from ssm_nn.inference.map_problem import NOT_FINITE, MapProblem, MapResult
from ssm_nn.inference.minibatch import Minibatch
from ssm_nn.precision_diagonal import DiagonalPrecision
from ssm_nn.tasks import Task

__all__ = ["VariationalContinual", "VariationalState"]

Array = Any


class VariationalState(NamedTuple):
    """All that the next task needs of the past.

    Attributes:
        step: number of tasks so far.
        key: of the random choices to come.
        mean, sigma: (P,), the belief, which is the next task's prior: means and standard deviations.
        start_mean, start_sigma: (P,), where the next training starts: the belief itself once there is one, before that
            where the filter's first search starts, with ``initial_sigma``.
    """

    step: Array
    key: Array
    mean: Array
    sigma: Array
    start_mean: Array
    start_sigma: Array


class VariationalContinual(TaskByTask[VariationalState]):
    """VCL on the program, prior and power of a filter.

    Args:
        engine: the filter to compare with; its kernel and structure are not read.
        kl_weight: how often the divergence from the last belief counts, > 0; 1 is the variational bound, less is a cold
            posterior.
        initial_sigma: standard deviation of every weight where the first training starts, > 0.
        num_draws: of all weights, for each step.
        sigma_rate: the optimiser's steps in log sigma are so many times those in the means, > 0. With Adam at 1 sigma
            changes by a factor e in 1 / learning rate steps: in short trainings it stays near where it starts.
        minibatch: optimiser, epochs and batch size; by default the engine's estimator, which must be a Minibatch. The
            divergence's gradient is computed in every step.
    """

    def __init__(
        self,
        engine: LaplaceFilter,
        kl_weight: float = 1.0,
        initial_sigma: float = 0.03,
        num_draws: int = 1,
        sigma_rate: float = 1.0,
        minibatch: Minibatch | None = None,
    ):
        super().__init__(engine)
        check_positive(kl_weight=kl_weight, initial_sigma=initial_sigma, sigma_rate=sigma_rate)
        check_count(num_draws=num_draws)
        self.kl_weight, self.initial_sigma, self.sigma_rate = float(kl_weight), float(initial_sigma), float(sigma_rate)
        self.num_draws = num_draws
        self.minibatch = minibatch_of(engine, minibatch, type(self).__name__)

    def init(self, key: Array, task: Task | Mapping[str, Any] | None = None) -> VariationalState:
        """The prior as belief, and where the first training starts.

        Args:
            key: a ``jax.random.key``, or a whole number taken as its seed.
            task: the first task; it gives shapes and is checked.
        """
        begun, prior = self._begun(key, task), self._diagonal_prior(task)
        sigma = jax.lax.rsqrt(prior.precision.diagonal)
        return VariationalState(
            begun.step, begun.key, prior.mean, sigma, begun.mean, jnp.full_like(sigma, self.initial_sigma)
        )

    def belief(self, state: VariationalState, task: Task | Mapping[str, Any] | None = None) -> Belief:
        """q as it stands; ``task`` is not read."""
        del task
        return Belief(state.mean, DiagonalPrecision(1 / jnp.square(state.sigma)))

    def _learn(self, state: VariationalState, task: Task) -> tuple[VariationalState, MapResult]:
        key, draws_key = jax.random.split(state.key)
        problem = self._problem(self.belief(state), task)
        variational = (state.start_mean - state.mean, jnp.log(state.start_sigma))
        carry = (variational, self.minibatch.optimizer.init(variational))
        rates = jnp.asarray([self.kl_weight, self.sigma_rate], state.mean.dtype)
        epoch = partial(_epoch, self.engine.program, self.minibatch, self.num_draws, problem, rates)
        steps = -(-task.num_examples // self.minibatch.batch_size)
        passes = run_epochs(self.minibatch, epoch, carry, steps, draws_key)
        (shift, log_sigma), _ = passes.carry
        found = MapResult(shift, *passes[1:])
        if found.status == NOT_FINITE:
            return state._replace(step=state.step + 1, key=key), found
        mean, sigma = state.mean + shift, jnp.exp(log_sigma)
        return VariationalState(state.step + 1, key, mean, sigma, mean, sigma), found


def divergence(shift: Array, log_sigma: Array, prior: DiagonalPrecision) -> Array:
    """KL(N(m + shift, sigma^2) | N(m, prior^-1)), a sum of terms that are never negative."""
    log_ratio = log_sigma + 0.5 * jnp.log(prior.diagonal)
    return 0.5 * (jnp.sum(jnp.expm1(2 * log_ratio) - 2 * log_ratio) + prior.quadratic(shift))


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def _epoch(
    program: Program, settings: Minibatch, num_draws: int, problem: MapProblem, rates: Array, carry: Any, key: Array
) -> tuple[tuple[Any, Any], Array]:
    """One pass of ((shift, log sigma) (P,), the optimiser's state), and its mean negative bound."""
    space = extract(program, problem.task, problem.hypers)
    total = problem.task.num_examples
    order_key, draws_key = jax.random.split(key)
    order = index_batches(jax.random.permutation(order_key, total), settings.batch_size, total)
    counted = jnp.maximum(jnp.sum(problem.task.mask), 1)
    kl_weight, sigma_rate = rates[0], rates[1]

    def step(carry: Any, inputs: Any) -> Any:
        variational, optimiser = carry
        indices, step_key = inputs
        log_likelihood = batch_log_likelihood(space, problem.task, indices)
        noise = jax.random.normal(step_key, (num_draws, *problem.mean.shape), problem.mean.dtype)

        def negative_bound(variational: Any) -> Array:
            shift, log_sigma = variational
            expected = jnp.mean(
                jax.vmap(lambda e: log_likelihood(problem.mean + shift + jnp.exp(log_sigma) * e))(noise)
            )
            kl = divergence(shift, log_sigma, problem.precision)
            return (kl_weight * kl - problem.power * expected) / counted

        value, gradient = jax.value_and_grad(negative_bound)(variational)
        changes: Any
        changes, optimiser = settings.optimizer.update(gradient, optimiser, variational)
        changes = (changes[0], sigma_rate * changes[1])
        return (optax.apply_updates(variational, changes), optimiser), value

    carry, values = jax.lax.scan(step, carry, (order, jax.random.split(draws_key, order.shape[0])))
    return carry, jnp.mean(values) * counted
