"""All tasks at once, a head each: the ceiling of task-incremental learning.

    argmin over W, own_1 .. own_T of   - sum_t log p(D_t | W, own_t) - log p(W) - sum_t log p(own_t)

A batch holds examples of one task; an epoch is a pass over all examples of all tasks, in random order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ssm_nn.extraction import Program, extract
from ssm_nn.inference.batches import rows
from ssm_nn.inference.epochs import run_epochs
from ssm_nn.inference.perturbation.baselines import FreeState
from ssm_nn.inference.perturbation.filter import PerturbationFilter
from ssm_nn.inference.perturbation.fitting import Anchor, joined, warn_of
from ssm_nn.tasks import Task, Tasks, stack_tasks

__all__ = ["train_jointly"]

Array = Any


def train_jointly(
    engine: PerturbationFilter, key: Array, tasks: Tasks | Iterable[Task | Mapping[str, Any]]
) -> FreeState:
    """The weights of all tasks; ``HeadTraining(engine, FineTuned()).predict`` reads the state.

    Args:
        engine: its program, prior, optimiser, epochs and batch size are taken.
        key: a ``jax.random.key``, or a whole number taken as its seed.
        tasks: all of them; they are stacked, so that their arrays are held at once.
    """
    stack = stack_tasks(tasks)
    checked = [engine._checked(t, stack.at(t)) for t in range(len(stack))]
    stack = stack_tasks(checked)
    reading = engine._read(checked[0])
    begun = engine.init(key, checked[0])
    own = jax.tree.map(lambda leaf: jnp.repeat(jnp.asarray(leaf)[None], len(stack), 0), reading.own(reading.initial))
    carry = reading.shared(reading.initial), own
    settings = engine.minibatch
    steps = len(stack) * stack.mask.shape[1] // settings.batch_size
    epoch = partial(
        _epoch, engine.program, settings.optimizer, settings.batch_size, engine.hypers, reading.prior, stack
    )
    passes = run_epochs(settings, epoch, (carry, settings.optimizer.init(carry)), steps, begun.key)
    warn_of(0, passes.status)
    (shared, own), _ = passes.carry
    identities = [engine._identity(task, t) for t, task in enumerate(checked)]
    weights = {identity: jax.tree.map(lambda leaf, t=t: leaf[t], own) for t, identity in enumerate(identities)}
    return FreeState(len(stack), begun.key, shared, weights, None)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=6)
def _epoch(
    program: Program,
    optimizer: optax.GradientTransformation,
    size: int,
    hypers: Any,
    prior: Anchor,
    stack: Tasks,
    carry: Any,
    key: Array,
) -> tuple[Any, Array]:
    num_tasks, total = stack.mask.shape
    example_key, order_key = jax.random.split(key)
    scores = jnp.where(stack.mask, jax.random.uniform(example_key, stack.mask.shape), 2.0)
    batches = jnp.argsort(scores, axis=1).reshape(-1, size)
    owners = jnp.repeat(jnp.arange(num_tasks), total // size)
    order = jax.random.permutation(order_key, len(owners))
    everything = jnp.maximum(jnp.sum(stack.mask), 1)

    def step(carry: Any, inputs: Any) -> tuple[Any, Array]:
        (shared, own), state = carry
        t, indices = inputs
        data, context, mask = jax.tree.map(lambda a: a[t], (stack.data, stack.context, stack.mask))
        batch = rows(Task.tree_unflatten(None, (data, context, mask)), indices)
        space = extract(program, batch, hypers)
        here = jnp.sum(batch.mask)

        def objective(weights: Any) -> Array:
            shared, own = weights
            leaves = joined(shared, jax.tree.map(lambda a: a[t], own))
            misfit = -space.log_likelihood_at(leaves, batch) / jnp.maximum(here, 1)
            return misfit + (_half_square(shared, prior) + _half_square(own, prior)) / everything

        value, gradient = jax.value_and_grad(objective)((shared, own))
        change, moved = optimizer.update(gradient, state, (shared, own))
        new = optax.apply_updates((shared, own), change), moved
        kept = jax.tree.map(lambda a, b: jnp.where(here > 0, a, b), new, carry)
        return kept, value * here

    carry, values = jax.lax.scan(step, carry, (owners[order], batches[order]))
    return carry, jnp.sum(values)


def _half_square(weights: Any, prior: Anchor) -> Array:
    total: Any = 0.0
    for network, leaves in weights.items():
        for path, leaf in leaves.items():
            off = leaf - prior.mean[network][path]
            total = total + jnp.sum(prior.precision[network][path] * jnp.square(off))
    return 0.5 * total
