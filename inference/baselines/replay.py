"""Replay: some examples of each past task are kept, and stand for the rest in every batch.

    theta_t = argmin -log p(D_t | theta) - sum_{s < t} N_s / k_s log p(M_s | theta) + 1/2 |theta - m_0|^2 / s_0^2

with M_s the k_s examples kept of the N_s of task s, drawn without replacement: an unbiased estimate of joint training's
objective, and that objective itself where all are kept. A batch holds examples of the new task and of the memory; each
half is scaled to what it stands for, so that the share of the memory moves the noise of a step and not its mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssm_nn.extraction import Program, extract
from ssm_nn.inference.baselines.training import TaskByTask, minibatch_of
from ssm_nn.inference.batches import as_arrays, index_batches, one_batch, rows
from ssm_nn.inference.beliefs import Belief
from ssm_nn.inference.checks import check_count
from ssm_nn.inference.epochs import batch_log_likelihood, run_epochs
from ssm_nn.inference.laplace import LaplaceFilter
from ssm_nn.inference.map_problem import NOT_FINITE, MapProblem, MapResult
from ssm_nn.inference.minibatch import Minibatch
from ssm_nn.tasks import Task, as_task, check_alike

__all__ = ["Memory", "Replay", "ReplayState"]

Array = Any


class Memory(NamedTuple):
    """Examples of past tasks.

    Attributes:
        data: arrays (capacity, ...); the capacity doubles when it is full, so that few sizes are compiled for.
        weight: (capacity,), how many examples of its task each one stands for; 0 where a place is free.
    """

    data: dict[str, Array]
    weight: Array


class ReplayState(NamedTuple):
    """All that the next task needs of the past.

    Attributes:
        step: number of tasks so far.
        key: of the random choices to come.
        mean: (P,), the weights.
        memory: the examples kept.
    """

    step: Array
    key: Array
    mean: Array
    memory: Memory


class Replay(TaskByTask[ReplayState]):
    """Training on each task and a memory of the tasks before it, on the program, prior and power of a filter.

    The memory meets the context of the newest task: a program whose observations read the context has no replay.

    Args:
        engine: the filter to compare with; its kernel and structure are not read.
        examples_per_task: kept of each task, >= 1; a task of fewer is kept whole.
        share: of a batch that comes from the memory, in (0, 1); at least one example of each kind is in a batch. An epoch
            is a pass over the new task, and takes ``1 / (1 - share)`` times its steps.
        minibatch: optimiser, epochs and batch size; by default the engine's estimator, which must be a Minibatch.
    """

    def __init__(
        self,
        engine: LaplaceFilter,
        examples_per_task: int = 200,
        share: float = 0.5,
        minibatch: Minibatch | None = None,
    ):
        super().__init__(engine)
        check_count(examples_per_task=examples_per_task)
        if not 0 < share < 1:
            raise ValueError(f"share is {share}; a number between 0 and 1 is accepted")
        self.examples_per_task, self.share = examples_per_task, float(share)
        self.minibatch = minibatch_of(engine, minibatch, type(self).__name__)
        if self.minibatch.batch_size < 2:
            raise ValueError("batch_size is 1; a batch of Replay holds at least one new and one kept example")

    def init(self, key: Array, task: Task | Mapping[str, Any] | None = None) -> ReplayState:
        """An empty memory, and the weights where the filter's first search starts.

        Args:
            key: a ``jax.random.key``, or a whole number taken as its seed.
            task: the first task; it gives shapes and is checked.
        """
        begun = self._begun(key, task)
        empty = {name: array[:0] for name, array in as_arrays(as_task(task)).data.items()}
        return ReplayState(*begun, Memory(empty, jnp.zeros(0, begun.mean.dtype)))

    def belief(self, state: ReplayState, task: Task | Mapping[str, Any] | None = None) -> Belief:
        """The weights of ``state`` with the prior's precision: replay knows no other uncertainty."""
        return Belief(state.mean, self._prior(task).precision)

    def _learn(self, state: ReplayState, task: Task) -> tuple[ReplayState, MapResult]:
        if state.memory.weight.shape[0]:
            check_alike([Task(state.memory.data, task.context), task])
        key, train_key = jax.random.split(state.key)
        problem = self._problem(self._diagonal_prior(task), task)
        start = state.mean - problem.mean
        size = self.minibatch.batch_size
        replayed = min(max(round(self.share * size), 1), size - 1) if state.memory.weight.shape[0] else 0
        carry = (start, self.minibatch.optimizer.init(start))
        epoch = partial(_epoch, self.engine.program, self.minibatch, replayed, problem, state.memory)
        steps = -(-task.num_examples // (size - replayed))
        passes = run_epochs(self.minibatch, epoch, carry, steps, train_key)
        shift, _ = passes.carry
        found = MapResult(shift, *passes[1:])
        if found.status == NOT_FINITE:
            return state._replace(step=state.step + 1, key=key), found
        memory = remember(state.memory, problem.task, self.examples_per_task, jax.random.fold_in(train_key, 0))
        return ReplayState(state.step + 1, key, problem.mean + shift, memory), found


def remember(memory: Memory, task: Task, size: int, key: Array) -> Memory:
    """The memory with ``size`` examples more, drawn among those of ``task`` (with a mask) that count."""
    counted = np.flatnonzero(np.asarray(task.mask))
    chosen = counted[np.asarray(jax.random.permutation(key, len(counted)))[:size]]
    old = np.asarray(memory.weight)
    filled = int(np.count_nonzero(old))
    capacity = size
    while capacity < filled + len(chosen):
        capacity *= 2
    free = capacity - filled - len(chosen)
    # on the host, as every length would be compiled for; copies in the free places, where zeros may be no valid example
    data = {
        name: jnp.asarray(
            np.pad(
                np.concatenate([np.asarray(memory.data[name])[:filled], np.asarray(new)[chosen]])
                if filled
                else np.asarray(new)[chosen],
                [(0, free)] + [(0, 0)] * (new.ndim - 1),
                mode="edge",
            )
        )
        for name, new in task.data.items()
    }
    weight = np.concatenate([old[:filled], np.full(len(chosen), len(counted) / len(chosen)), np.zeros(free)])
    return Memory(data, jnp.asarray(weight, memory.weight.dtype))


def recalled(weight: Array, num_draws: int, key: Array) -> Array:
    """``num_draws`` places of the memory in random order, each as often as its weight says, rounded up or down."""
    offset_key, order_key = jax.random.split(key)
    cumulative = jnp.cumsum(weight)
    points = (jnp.arange(num_draws) + jax.random.uniform(offset_key, dtype=weight.dtype)) / num_draws
    # strictly below 1, also after rounding: beyond it lie the free places
    points = jnp.minimum(points, 1 - jnp.finfo(weight.dtype).epsneg)
    places = jnp.searchsorted(cumulative / cumulative[-1], points, side="right")
    return jax.random.permutation(order_key, places)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def _epoch(
    program: Program, settings: Minibatch, replayed: int, problem: MapProblem, memory: Memory, carry: Any, key: Array
) -> tuple[tuple[Array, Any], Array]:
    """One pass of (shift (P,), the optimiser's state) over the new task, and its mean objective."""
    space = extract(program, problem.task, problem.hypers)
    total = problem.task.num_examples
    order_key, recall_key = jax.random.split(key)
    order = index_batches(jax.random.permutation(order_key, total), settings.batch_size - replayed, total)
    places = jnp.zeros((order.shape[0], 0), int)
    if replayed:
        places = recalled(memory.weight, order.shape[0] * replayed, recall_key).reshape(-1, replayed)
    past = one_batch(problem.task, memory.data, memory.weight > 0)
    represented = jnp.sum(memory.weight)
    counted = jnp.maximum(jnp.sum(problem.task.mask) + represented, 1)

    def step(carry: Any, inputs: Any) -> Any:
        shift, optimiser = carry
        new_indices, old_indices = inputs
        of_new = batch_log_likelihood(space, problem.task, new_indices)

        def objective(shift: Array) -> Array:
            log_likelihood = of_new(problem.mean + shift)
            if replayed:
                of_old = space.log_likelihood(problem.mean + shift, rows(past, old_indices))
                log_likelihood = log_likelihood + represented / replayed * of_old
            return (0.5 * problem.precision.quadratic(shift) - problem.power * log_likelihood) / counted

        value, gradient = jax.value_and_grad(objective)(shift)
        change, optimiser = settings.optimizer.update(gradient, optimiser, shift)
        return (optax.apply_updates(shift, change), optimiser), value

    carry, values = jax.lax.scan(step, carry, (order, places))
    return carry, jnp.mean(values) * counted
