"""Maximum a posteriori weights in mini-batches: all weights freely, or a task's own parameters beside a fixed base.

    free       - log p(D | theta) + 1/2 (theta - m)^T P (theta - m)                    P diagonal
    perturbed  - log p(D | W(W_0, z)) + 1/2 |own - m|^2 / v + 1/2 (|r - 1|^2 + |s - 1|^2) / tau^2
               + l1 (|U| + |V|) + l2 / 2 (|U|^2 + |V|^2)

Each is one compiled epoch for every task, rank and number of epochs.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import optax

from ssm_nn.extraction import Program, extract
from ssm_nn.inference.batches import rows
from ssm_nn.inference.checks import check_finite, check_positive
from ssm_nn.inference.epochs import Passes, run_epochs
from ssm_nn.inference.laplace import FilterWarning
from ssm_nn.inference.map_problem import NOT_FINITE
from ssm_nn.inference.minibatch import Minibatch
from ssm_nn.inference.perturbation.blocks import Block, Factors, composed
from ssm_nn.inference.perturbation.factored import run_perturbed
from ssm_nn.tasks import Task

__all__ = [
    "Anchor",
    "FreeWeights",
    "OwnParameters",
    "Perturbed",
    "SitePrior",
    "Surroundings",
    "fit",
    "joined",
    "standing",
    "task_key",
    "warn_of",
]

Array = Any
Arrays = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class SitePrior:
    """Of a task's perturbation: ``r, s ~ N(1, scales^2)``, ``log p(U, V) = -l1 |.| - l2 / 2 |.|^2``.

    Args:
        scales: tau, standard deviation of the scales.
        l1, l2: of the factors, >= 0, in nats; l1 = 0 is Normal(0, 1 / l2).
    """

    scales: float = 1.0
    l1: float = 1.0
    l2: float = 1.0

    def __post_init__(self):
        check_positive(scales=self.scales)
        check_finite(0.0, l1=self.l1, l2=self.l2)

    @classmethod
    def of_mean_loss(cls, l1: float, weight_decay: float, num_examples: int, scales: float = 1.0) -> Self:
        """The paper's penalties, which are added to the mean cross-entropy: times N they are nats."""
        return cls(scales, l1 * num_examples, weight_decay * num_examples)

    def penalty(self, factors: Factors) -> Array:
        """Negative log density of one kernel's sites, up to a constant."""
        scales = jnp.sum(jnp.square(factors.inputs - 1)) + jnp.sum(jnp.square(factors.outputs - 1))
        both = factors.left * factors.keep, factors.right * factors.keep[:, None]
        absolute = sum(jnp.sum(jnp.abs(f)) for f in both)
        square = sum(jnp.sum(jnp.square(f)) for f in both)
        return scales / (2 * self.scales**2) + self.l1 * absolute + self.l2 / 2 * square

    def precision(self, factors: Factors) -> Factors:
        """Of a Gaussian with the prior's variance; the double exponential's is 2 / l1^2."""
        of_scales, of_factors = 1 / self.scales**2, self.l2 + self.l1**2 / 2
        inputs, outputs = (jnp.full_like(f, of_scales) for f in factors[:2])
        left, right = (jnp.full_like(f, of_factors) for f in factors[2:4])
        return Factors(inputs, outputs, left, right, factors.keep)


class Anchor(NamedTuple):
    """``N(mean, 1 / precision)`` over weights, as arrays network -> path -> leaf.

    Attributes:
        moves: 1 where a weight may move and 0 where it may not; None lets all move.
    """

    mean: Arrays
    precision: Arrays
    moves: Arrays | None = None


class OwnParameters(NamedTuple):
    """z of a task: leaves of its own (network -> path -> leaf), one perturbation a block, and the base where it may move."""

    own: Arrays
    factors: tuple[Factors, ...]
    base: Arrays


class Surroundings(NamedTuple):
    """What the objective of a task's own parameters reads beside them.

    Attributes:
        hypers: of the program.
        base: kernels that stand still (network -> path -> leaf).
        prior: of the own leaves, and of the base where it moves.
        moves: per block 0 and 1 for entries of V and U that are pruned; None prunes nothing.
    """

    hypers: Any
    base: Arrays
    prior: Anchor
    moves: tuple[tuple[Array, Array], ...] | None = None


@dataclass(frozen=True)
class FreeWeights:
    """All weights: the carry is arrays, the surroundings (hypers, Anchor)."""

    program: Program

    def log_likelihood(self, space: Any, weights: Arrays, around: tuple[Any, Anchor], batch: Task) -> Array:
        """Of a batch."""
        del around
        return space.log_likelihood_at(weights, batch)

    def penalty(self, weights: Arrays, around: tuple[Any, Anchor]) -> Array:
        """Half the squared distance from the anchor."""
        return _half_square(weights, around[1])

    def mask(self, gradient: Arrays, around: tuple[Any, Anchor]) -> Arrays:
        """Zero where a weight stands still."""
        moves = around[1].moves
        return gradient if moves is None else jax.tree.map(jnp.multiply, gradient, moves)


@dataclass(frozen=True)
class Perturbed:
    """A task's own parameters: the carry is OwnParameters, the surroundings Surroundings."""

    program: Program
    blocks: tuple[Block, ...]
    prior: SitePrior

    def arrays(self, own: OwnParameters, around: Surroundings) -> dict[str, dict[str, Array]]:
        """All leaves, the kernels as they stand in the base."""
        return joined(around.base, own.base, own.own)

    def named(self, own: OwnParameters) -> dict[Any, Factors]:
        """Factors by the names of their kernels."""
        return {block.name: f for block, f in zip(self.blocks, own.factors, strict=True)}

    def log_likelihood(self, space: Any, own: OwnParameters, around: Surroundings, batch: Task) -> Array:
        """Of a batch, on the factored path."""
        return run_perturbed(lambda a: space.log_likelihood_at(a, batch), self.arrays(own, around), self.named(own))

    def penalty(self, own: OwnParameters, around: Surroundings) -> Array:
        """Negative log prior of all parts."""
        sites = sum(self.prior.penalty(f) for f in own.factors)
        return _half_square(joined(own.own, own.base), around.prior) + sites

    def mask(self, gradient: OwnParameters, around: Surroundings) -> OwnParameters:
        """Zero for what is no parameter: the padding, and pruned entries."""
        factors = tuple(f._replace(keep=jnp.zeros_like(f.keep)) for f in gradient.factors)
        if around.moves is not None:
            factors = tuple(
                f._replace(left=f.left * left, right=f.right * right)
                for f, (left, right) in zip(factors, around.moves, strict=True)
            )
        return gradient._replace(factors=factors)

    def composed(self, own: OwnParameters, around: Surroundings) -> dict[str, dict[str, Array]]:
        """The task's weights."""
        return composed(self.blocks, self.arrays(own, around), own.factors)


def standing(own: OwnParameters) -> tuple[tuple[Array, Array], ...]:
    """``Surroundings.moves`` that hold the entries of V and U which are zero."""
    return tuple(tuple((f != 0).astype(f.dtype) for f in (z.left, z.right)) for z in own.factors)  # type: ignore[misc]


def joined(*parts: Arrays) -> dict[str, dict[str, Array]]:
    """Leaves of several parts together; a later one wins."""
    made: dict[str, dict[str, Array]] = {}
    for part in parts:
        for network, leaves in part.items():
            made.setdefault(network, {}).update(leaves)
    return made


def _half_square(weights: Arrays, anchor: Anchor) -> Array:
    total: Any = 0.0
    for network, leaves in weights.items():
        for path, leaf in leaves.items():
            off = leaf - anchor.mean[network][path]
            total = total + jnp.sum(anchor.precision[network][path] * jnp.square(off))
    return 0.5 * total


def task_key(key: Array, identity: int, use: int) -> Array:
    """For one use of random numbers in a task: the same in whatever order tasks come, so that orders differ in nothing else."""
    return jax.random.fold_in(jax.random.fold_in(key, identity % 2**32), use)


def fit(kind: Any, settings: Minibatch, start: Any, around: Any, task: Task, key: Array) -> Passes:
    """The carry after the epochs of ``settings`` from ``start``, on a task that has a mask.

    Args:
        kind: FreeWeights or Perturbed.
        settings: optimiser, epochs, batch size and patience; ``prior_every`` is not read.
        start: the carry; it is copied.
        around: what the kind reads beside it.
    """
    carry = start, settings.optimizer.init(start)
    epoch = partial(_epoch, kind, settings.optimizer, settings.batch_size, around, task)
    passes = run_epochs(settings, epoch, carry, -(-task.num_examples // settings.batch_size), key)
    return passes._replace(carry=passes.carry[0])


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def _epoch(
    kind: Any, optimizer: optax.GradientTransformation, size: int, around: Any, task: Task, carry: Any, key: Array
) -> tuple[Any, Array]:
    hypers = around.hypers if isinstance(around, Surroundings) else around[0]
    space = extract(kind.program, task, hypers)
    total = task.num_examples
    # examples that count first, so that padding fills whole batches at the end
    order = jnp.argsort(jnp.where(task.mask, jax.random.uniform(key, (total,)), 2.0))
    order = jnp.pad(order, (0, -total % size), constant_values=total).reshape(-1, size)
    counted = jnp.maximum(jnp.sum(task.mask), 1)

    def step(carry: Any, indices: Array) -> tuple[Any, Array]:
        weights, state = carry
        batch = rows(task, indices)
        here = jnp.sum(batch.mask)
        scale = counted / jnp.maximum(here, 1)

        def objective(weights: Any) -> Array:
            misfit = -scale * kind.log_likelihood(space, weights, around, batch)
            return (misfit + kind.penalty(weights, around)) / counted

        value, gradient = jax.value_and_grad(objective)(weights)
        change, moved = optimizer.update(kind.mask(gradient, around), state, weights)
        change = kind.mask(change, around)  # weight decay and momentum move what has no gradient
        # a batch of padding alone says nothing, and moves nothing
        kept = jax.tree.map(lambda new, old: jnp.where(here > 0, new, old), moved, state)
        weights = jax.tree.map(lambda w, c: jnp.where(here > 0, w + c, w).astype(w.dtype), weights, change)
        return (weights, kept), jnp.where(here > 0, value, 0.0) * here

    carry, values = jax.lax.scan(step, carry, order)
    return carry, jnp.sum(values)


def warn_of(step: int, status: int) -> None:
    """Warn where the training of task ``step`` was not finite."""
    if status == NOT_FINITE:
        warnings.warn(
            f"task {step}: training is not finite, and what it started from is kept: lower the learning rate, or look "
            "for outliers in the data",
            FilterWarning,
            stacklevel=3,
        )
