"""A whole run of the filter as one traced function of the hyper-parameters: its log evidence, differentiable.

    log Z(h) = sum_t log Z_t(h)        one scan over the tasks, compiled once a shape

Where all tasks together have no more outputs than there are weights, by covariances of the outputs (output_space.py). In
reverse mode the MAP of a task enters by the implicit function theorem, so that no step of its search is differentiated
(inference/differentiable.py). The value is that of ``engine.with_hypers(h).run(key, tasks)``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssm_nn.extraction import StateSpace, extract
from ssm_nn.inference.automatic import AutomaticEstimator
from ssm_nn.inference.batches import counted_copies
from ssm_nn.inference.beliefs import Belief, predict_belief
from ssm_nn.inference.curvature import ExactCurvature
from ssm_nn.inference.diagnosis.output_space import OutputSpace
from ssm_nn.inference.differentiable import TaskEvidence, Updated
from ssm_nn.inference.gauss_newton import GaussNewton
from ssm_nn.inference.laplace import LaplaceFilter
from ssm_nn.inference.lbfgs import Lbfgs
from ssm_nn.inference.map_problem import CONVERGED, MapProblem
from ssm_nn.tasks import Task, Tasks

__all__ = ["Evidence", "TracedFilter"]

Array = Any

# a task's derivative holds some twenty matrices of the belief's size; up to 512 MiB in float32 they are kept, not made again
_KEPT_MATRICES, _KEPT_NUMBERS = 20, 2**27


class Evidence(NamedTuple):
    """``log_evidence`` in nats, and ``unconverged``, the number of tasks whose MAP search did not end at a minimum."""

    log_evidence: Array
    unconverged: Array


class TracedFilter:
    """``TracedFilter(engine)(hypers, tasks, key)``: the Evidence; fit for ``jit``, ``vmap`` and reverse-mode derivatives.

    Memory of a derivative: the belief of every task; a task's columns are made again on the way back.

    Args:
        engine: a LaplaceFilter whose curvature is ``ExactCurvature`` and whose estimator is ``GaussNewton``, ``Lbfgs`` or
            the automatic one.
        by_outputs: whether covariances of outputs may be used; ``OutputSpace.resolves`` says of given tasks whether they
            are precise enough.

    Raises:
        ValueError: for another engine, curvature or estimator.
    """

    def __init__(self, engine: LaplaceFilter, *, by_outputs: bool = True):
        if not isinstance(engine, LaplaceFilter):
            raise ValueError(f"engine is {type(engine).__name__}; a LaplaceFilter is accepted")
        if not isinstance(engine.curvature, ExactCurvature):
            raise ValueError(f"engine has the curvature {engine.curvature!r}; ExactCurvature() has a derivative")
        if not isinstance(engine.estimator, AutomaticEstimator):
            _check_estimator(engine.estimator)
        self.engine, self._pieces = engine, TaskEvidence(engine)
        self._few = OutputSpace(engine) if by_outputs else None

    def __call__(self, hypers: Any, tasks: Tasks, key: Array) -> Evidence:
        """At ``hypers``, every latent site of the program outside its weights.

        Args:
            hypers: name -> value.
            tasks: a stack; tasks of other lengths, and tasks without data, lie under its mask.
            key: a ``jax.random.key``, as ``engine.run`` takes it.
        """
        engine = self.engine
        first = counted_copies(tasks.at(0))
        space = extract(engine.program, first, hypers)
        if self._few is not None and self._few.serves(space, first, len(tasks), hypers):
            values, unconverged = self._few(hypers, tasks, key)
            return Evidence(jnp.sum(values), jnp.sum(unconverged))
        before = Belief(space.prior_mean, self._pieces.structure.prior(space.prior_variance))
        dtype = space.prior_mean.dtype
        kept = len(tasks) * _KEPT_MATRICES * jax.tree.reduce(lambda n, leaf: n + leaf.size, before.precision, 0)
        revised = self._revised if kept <= _KEPT_NUMBERS else jax.checkpoint(self._revised)

        def step(carry: tuple[Belief, Array, Array], parts: Any) -> tuple[Any, tuple[Array, Array]]:
            belief, index, key = carry
            task = counted_copies(Task.tree_unflatten(None, parts))
            next_key, map_key, curvature_key = jax.random.split(key, 3)
            found, status = self._search(hypers, belief, index, task, map_key)
            (belief, value), saddle = revised(hypers, belief, index, task, found, curvature_key)
            return (belief, index + 1, next_key), (value, (status != CONVERGED) | saddle)

        masked = tasks.mask if tasks.mask is not None else jnp.ones((len(tasks), first.num_examples), bool)
        start = (before, jnp.zeros((), jnp.int32), key)
        _, (values, unconverged) = jax.lax.scan(step, start, (tasks.data, tasks.context, masked))
        return Evidence(jnp.sum(values, dtype=dtype), jnp.sum(unconverged))

    def _predicted(self, space: StateSpace, belief: Belief, index: Array) -> Belief:
        """The prior itself for the first task."""
        return jax.lax.cond(index == 0, lambda: belief, lambda: predict_belief(belief, space.moments))

    def _search(self, hypers: Any, belief: Belief, index: Array, task: Task, key: Array) -> tuple[Array, Array]:
        """Where the MAP search ends, as a shift from the prediction, and its status; nothing here is differentiated."""
        engine = self.engine
        hypers, belief = jax.lax.stop_gradient((hypers, belief))
        space = extract(engine.program, task, hypers)
        predicted = self._predicted(space, belief, index)
        power = jnp.asarray(engine.power, predicted.mean.dtype)
        problem = MapProblem(predicted.mean, predicted.precision, task, hypers, power)

        def first() -> Array:
            """As LaplaceFilter starts: at the network's own weights, or a prior draw where these are zero."""
            drawn = predicted.precision.sample(key)
            return jnp.where(jnp.any(space.initial != 0), space.initial - predicted.mean, drawn)

        start = jax.lax.cond(index == 0, first, lambda: jnp.zeros_like(predicted.mean))
        estimator = engine.estimator
        if isinstance(estimator, AutomaticEstimator):
            estimator = estimator.choice(engine.program, problem)
        shift, _, status, _ = _check_estimator(estimator)._minimise(engine.program, problem, start)
        return jax.lax.stop_gradient(shift), status

    def _revised(self, hypers: Any, belief: Belief, index: Array, task: Task, shift: Array, key: Array) -> Updated:
        """The belief after the task and its log evidence; whether the shift is at a saddle."""
        space = extract(self.engine.program, task, hypers)
        predicted = self._predicted(space, belief, index)
        power = jnp.asarray(self.engine.power, predicted.mean.dtype)
        return self._pieces._update(space, hypers, predicted, task, shift, power, key)


def _check_estimator(estimator: Any) -> GaussNewton | Lbfgs:
    if not isinstance(estimator, GaussNewton | Lbfgs):
        raise ValueError(
            f"engine finds the MAP weights of these tasks by {type(estimator).__name__}; the evidence has a derivative with "
            "GaussNewton(...) and Lbfgs(...): pass one as estimator"
        )
    return estimator
