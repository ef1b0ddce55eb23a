"""What a perturbation is compared with: all weights trained freely, task by task, each task with its own head.

    SingleTask     theta_t from the network's own start: nothing shared, everything stored
    FineTuned      shared weights go on from task to task
    L2ToBase       theta_t with 1/2 strength |W_t - W_0|^2, everything stored
    ElasticHeads   fine-tuning with 1/2 strength sum_i F_i (W_i - W_{t-1,i})^2: online EWC on the shared weights
    Packed         each task takes a share of the free shared weights by magnitude and freezes it (PackNet)

``train_jointly`` (``joint.py``) trains all tasks together. The own leaves of a task are always stored. Sources: Kirkpatrick
et al. 2017 (arXiv 1612.00796), Schwarz et al. 2018 (arXiv 1805.06370), Mallya and Lazebnik 2018 (arXiv 1711.05769).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssm_nn.inference.beliefs import Belief
from ssm_nn.inference.map_problem import NOT_FINITE
from ssm_nn.inference.perturbation.filter import PerturbationFilter
from ssm_nn.inference.perturbation.fitting import (
    Anchor,
    FreeWeights,
    OwnParameters,
    Surroundings,
    fit,
    joined,
    task_key,
    warn_of,
)
from ssm_nn.inference.perturbation.posterior import diagonal_information
from ssm_nn.inference.perturbation.reading import Reading
from ssm_nn.inference.perturbation.state import Storage
from ssm_nn.inference.perturbation.task_checks import arrays_of, identity_of
from ssm_nn.inference.predictive import AtMean, Prediction, predict_from
from ssm_nn.tasks import Task

__all__ = ["ElasticHeads", "FineTuned", "FreeState", "HeadTraining", "L2ToBase", "Packed", "SingleTask"]

Array = Any


class FreeState(NamedTuple):
    """What a baseline keeps.

    Attributes:
        step: number of tasks so far.
        key: of all random choices, each task's by its identity.
        shared: the shared kernels after the last task, network -> path -> leaf.
        weights: per task the leaves that are its own, and its kernels where the method stores them.
        note: what the method carries along: Fisher information, or owners of the weights.
    """

    step: int
    key: Array
    shared: Any
    weights: dict[int, Any]
    note: Any


class Rule(NamedTuple):
    """One task's training: where it starts, and what holds it."""

    start: Any
    anchor: Anchor


@dataclass(frozen=True)
class SingleTask:
    """Each task alone."""

    stores_all = True

    def rule(self, reading: Reading, state: FreeState) -> Rule:
        """From the network's own weights, under the prior."""
        del state
        return Rule(reading.initial, reading.prior)

    def after(self, note: Any, weights: Any, information: Any) -> tuple[Any, Any]:
        """The weights as they are, and the note."""
        del information
        return weights, note


@dataclass(frozen=True)
class FineTuned(SingleTask):
    """The last task's shared weights go on."""

    stores_all = False

    def rule(self, reading: Reading, state: FreeState) -> Rule:
        """From the last task, the head anew, under the prior."""
        return Rule(_going_on(reading, state), reading.prior)


@dataclass(frozen=True)
class L2ToBase(SingleTask):
    """All weights of every task, held near the first task's.

    Args:
        strength: precision of the pull, >= 0, in nats.
    """

    strength: float = 1.0

    def rule(self, reading: Reading, state: FreeState) -> Rule:
        """Around the first task's kernels."""
        if state.note is None:
            return Rule(reading.initial, reading.prior)
        precision = jax.tree.map(lambda w: jnp.full_like(w, self.strength), state.note)
        anchor = Anchor(joined(reading.prior.mean, state.note), joined(reading.prior.precision, precision))
        return Rule(joined(_going_on(reading, state), state.note), anchor)

    def after(self, note: Any, weights: Any, information: Any) -> tuple[Any, Any]:
        """The first task's kernels are noted."""
        del information
        return weights, weights if note is None else note


@dataclass(frozen=True)
class ElasticHeads(SingleTask):
    """Online EWC with a head for every task.

    Args:
        strength: how often the past information counts, >= 0.
    """

    strength: float = 1.0

    stores_all = False

    def rule(self, reading: Reading, state: FreeState) -> Rule:
        """The prior times a Gaussian around the last shared weights."""
        if state.note is None:
            return Rule(reading.initial, reading.prior)
        pull = jax.tree.map(lambda f: self.strength * f, state.note)
        total = jax.tree.map(jnp.add, reading.shared(reading.prior.precision), pull)
        prior_mean = reading.shared(reading.prior.mean)
        mean = jax.tree.map(lambda m, w, p, t: m + p / t * (w - m), prior_mean, state.shared, pull, total)
        anchor = Anchor(joined(reading.prior.mean, mean), joined(reading.prior.precision, total))
        return Rule(_going_on(reading, state), anchor)

    def after(self, note: Any, weights: Any, information: Any) -> tuple[Any, Any]:
        """Fisher diagonals add up."""
        return weights, information if note is None else jax.tree.map(jnp.add, note, information)


@dataclass(frozen=True)
class Packed(SingleTask):
    """Each task owns a share of the shared weights and may read those of earlier ones.

    The free weights start anew from the network's own; weights cut to zero stay free, and are not retrained around.

    Args:
        share: of a layer's weights a task keeps, in (0, 1].
    """

    share: float = 0.1

    stores_all = (
        True  # of each kernel the weights that the task may read; counted as a bit each beside the common values
    )

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}; a share in (0, 1] is accepted")

    def rule(self, reading: Reading, state: FreeState) -> Rule:
        """Frozen weights stand still."""
        if state.note is None:
            return Rule(reading.initial, reading.prior)
        frozen, packed = state.note
        start = jax.tree.map(jnp.where, frozen, packed, reading.shared(reading.initial))
        moves = jax.tree.map(lambda f, w: jnp.where(f, 0.0, 1.0).astype(w.dtype), frozen, packed)
        ones = jax.tree.map(jnp.ones_like, reading.prior.mean)
        return Rule(joined(_going_on(reading, state), start), reading.prior._replace(moves=joined(ones, moves)))

    def after(self, note: Any, weights: Any, information: Any) -> tuple[Any, Any]:
        """The largest free weights are kept and frozen, the other free ones are zero for this task."""
        del information
        frozen, packed = (jax.tree.map(lambda w: jnp.zeros_like(w, bool), weights), weights) if note is None else note

        def owned(frozen: Array, leaf: Array) -> Array:
            size = np.where(np.asarray(frozen), -1.0, np.abs(np.asarray(leaf)))
            count = min(round(self.share * size.size), int((size >= 0).sum()))
            chosen = np.zeros(size.size, bool)
            chosen[np.argsort(-size, axis=None, kind="stable")[:count]] = True
            return jnp.asarray(chosen.reshape(size.shape))

        mine = jax.tree.map(owned, frozen, weights)
        kept = jax.tree.map(lambda f, m, w: jnp.where(f | m, w, 0.0).astype(w.dtype), frozen, mine, weights)
        return kept, (jax.tree.map(jnp.logical_or, frozen, mine), jax.tree.map(jnp.where, mine, weights, packed))


def _going_on(reading: Reading, state: FreeState) -> Any:
    """Shared weights and own leaves of the last task, the head anew."""
    if not state.weights:
        return reading.initial
    last = state.weights[list(state.weights)[-1]]
    return joined(state.shared, reading.own(last), reading.head(reading.initial))


class HeadTraining:
    """A baseline on the program, optimiser and epochs of a filter.

    Args:
        engine: the filter to compare with.
        method: SingleTask, FineTuned, L2ToBase, ElasticHeads or Packed.
    """

    def __init__(self, engine: PerturbationFilter, method: Any):
        strength = getattr(method, "strength", 0.0)
        if not 0 <= strength < float("inf"):
            raise ValueError(f"strength is {strength}; a finite number >= 0 is accepted")
        self.engine, self.method = engine, method

    def init(self, key: Array, task: Task | Mapping[str, Any] | None = None) -> FreeState:
        """Before any task."""
        begun = self.engine.init(key, task)
        return FreeState(0, begun.key, begun.base, {}, None)

    def update(self, state: FreeState, task: Task | Mapping[str, Any]) -> tuple[FreeState, None]:
        """Learn one task.

        Raises:
            ValueError: as ``PerturbationFilter.update``.
        """
        engine = self.engine
        task = engine._checked(state.step, task)
        reading, identity = engine._read(task), engine._identity(task, state.step)
        if identity in state.weights:
            raise ValueError(f"task identity {identity} was learnt before; identities so far are {list(state.weights)}")
        rule = self.method.rule(reading, state)
        anchor = rule.anchor
        if isinstance(self.method, Packed) and anchor.moves is None:
            anchor = anchor._replace(
                moves=jax.tree.map(jnp.ones_like, anchor.mean)
            )  # one compiled program for all tasks
        key = task_key(state.key, identity, 2)
        passes = fit(FreeWeights(engine.program), engine.minibatch, rule.start, (engine.hypers, anchor), task, key)
        warn_of(state.step, passes.status)
        weights = rule.start if passes.status == NOT_FINITE else passes.carry
        information = self._information(reading, weights, task, key) if isinstance(self.method, ElasticHeads) else None
        shared, note = self.method.after(state.note, reading.shared(weights), information)
        own = reading.own(weights)
        kept = joined(own, shared) if self.method.stores_all else own
        kept = jax.tree.map(np.asarray, kept)
        after = FreeState(state.step + 1, state.key, shared, {**state.weights, identity: kept}, note)
        return after, None

    def weights(self, state: FreeState, identity: int) -> Any:
        """Of a task; ValueError for one that was never learnt."""
        if identity not in state.weights:
            raise ValueError(f"task identity {identity} was never seen: there are weights for {list(state.weights)}")
        return joined(state.shared, state.weights[identity])

    def predict(
        self, state: FreeState, task: Task | Mapping[str, Any], identity: int | None = None
    ) -> dict[str, Prediction]:
        """At the weights of the task."""
        task = arrays_of(task)
        if identity is None and "task" not in task.context:
            raise ValueError("identity is None and the task's context has no 'task': whose weights are to predict?")
        identity = identity_of(task.context["task"]) if identity is None else identity_of(identity, "identity")
        weights = self.weights(state, identity)
        belief = Belief(self.engine._known().layout.packed(weights), None)
        return predict_from(self.engine.program, self.engine.hypers, belief, task, method=AtMean())

    def storage(self, state: FreeState) -> Storage:
        """Numbers kept for prediction; what only serves training (Fisher information) is counted with the first task."""
        reading = self.engine._known()
        shared = sum(leaf.size for leaf in jax.tree.leaves(state.shared))
        own = reading.layout.size - shared
        extra = shared if isinstance(self.method, ElasticHeads) else 0
        if isinstance(self.method, Packed):
            return Storage(reading.layout.size, tuple(own + shared / 32 for _ in range(len(state.weights) - 1)))
        each = reading.layout.size if self.method.stores_all else own
        return Storage(reading.layout.size, tuple(each + extra * (n == 0) for n in range(len(state.weights) - 1)))

    def _information(self, reading: Reading, weights: Any, task: Task, key: Array) -> Any:
        kind = replace(self.engine._kind(reading), blocks=())
        own = OwnParameters({}, (), reading.shared(weights))
        around = Surroundings(self.engine.hypers, reading.own(weights), reading.prior)
        return diagonal_information(kind, own, around, task, key, self.engine.curvature_examples).base
