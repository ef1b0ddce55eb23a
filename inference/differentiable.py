"""One task of the filter as a differentiable function: its belief and evidence, given where its MAP search ended.

The MAP shift d solves grad F(d; hypers, m', Lambda') = 0, so that by the implicit function theorem

    d d* = -H^-1 d(grad F),     H the Hessian of F at d*

No step of the search is differentiated. H is that of the objective itself, solved by conjugate gradients with the belief's
own precision as preconditioner. That is the Gauss-Newton matrix: one step where the network is linear in its weights, and
elsewhere not the derivative by itself. At a saddle, where a search ends when two units mirror each other, the solve stops at
the first direction of negative curvature, and the derivative is too small or too large: a solve with random numbers looks for
such a direction beforehand, and the task is reported. The columns that a low-rank structure keeps are likewise the solution of
an equation, and differentiated through it: see ``DifferentiableLowRank``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ssm_nn.extraction import StateSpace, extract
from ssm_nn.inference.beliefs import Belief, predict_belief
from ssm_nn.inference.conjugate_gradients import conjugate_gradients
from ssm_nn.inference.laplace import LaplaceFilter
from ssm_nn.inference.map_problem import MapProblem
from ssm_nn.inference.structures import Cut, LowRank, Structure
from ssm_nn.precision_low_rank import DiagonalPlusLowRank, singular_directions
from ssm_nn.tasks import Task

__all__ = ["MOST_STEPS", "PROBING_STEPS", "DifferentiableLowRank", "TaskEvidence", "Updated", "differentiable"]

Array = Any
Updated = tuple[tuple[Belief, Array], Array]

MOST_STEPS = 200  # of conjugate gradients; more than a few tens say that the MAP search ended at no minimum
PROBING_STEPS = 50  # for a direction of negative curvature, which lies at the end of the spectrum and is met early


class TaskEvidence:
    """An engine's (hypers, belief before, task, found shift) -> (belief after, log evidence), compiled with its pull-back.

    ``first``, ``later`` for the first task and the others, with a third result: whether the shift is at a saddle; ``prior``,
    ``prediction`` the same for tasks without data, whose value is the belief alone. ``pull`` applies a pull-back.
    """

    def __init__(self, engine: LaplaceFilter):
        self.engine = engine
        self.structure = differentiable(engine.structure)
        self.first = jax.jit(self._with_pullback(self._first, has_aux=True))
        self.later = jax.jit(self._with_pullback(self._later, has_aux=True))
        self.prior = jax.jit(self._with_pullback(self._without_data_first))
        self.prediction = jax.jit(self._with_pullback(self._without_data))
        self.pull = jax.jit(lambda pullback, cotangents: pullback(cotangents))

    @staticmethod
    def _with_pullback(function: Callable[..., Any], has_aux: bool = False) -> Callable[..., Any]:
        """(differentiated arguments, others) -> value and pull-back, a pytree: both directions are compiled once a shape."""
        return lambda arguments, *fixed: jax.vjp(lambda *free: function(*free, *fixed), *arguments, has_aux=has_aux)

    def _space(self, hypers: Any, task: Task) -> StateSpace:
        return extract(self.engine.program, task, hypers)

    def _prior(self, space: StateSpace) -> Belief:
        return Belief(space.prior_mean, self.structure.prior(space.prior_variance))

    def _without_data_first(self, hypers: Any, task: Task) -> Belief:
        return self._prior(self._space(hypers, task))

    def _without_data(self, hypers: Any, before: Belief, task: Task) -> Belief:
        return predict_belief(before, self._space(hypers, task).moments)

    def _first(self, hypers: Any, task: Task, shift: Array, power: Array, key: Array) -> Updated:
        space = self._space(hypers, task)
        return self._update(space, hypers, self._prior(space), task, shift, power, key)

    def _later(self, hypers: Any, before: Belief, task: Task, shift: Array, power: Array, key: Array) -> Updated:
        space = self._space(hypers, task)
        return self._update(space, hypers, predict_belief(before, space.moments), task, shift, power, key)

    def _update(
        self, space: StateSpace, hypers: Any, predicted: Belief, task: Task, shift: Array, power: Array, key: Array
    ) -> Updated:
        problem = MapProblem(predicted.mean, predicted.precision, task, hypers, power)
        value_of = problem.objective(space)
        # the preconditioner of the solve, made where nothing is differentiated
        frozen = jax.lax.stop_gradient((predicted.mean, predicted.precision))
        curvature = self.engine.curvature
        rough = curvature.gather(space, self.structure, frozen[0] + shift, task, frozen[1], power, key)
        metric = jax.lax.stop_gradient(self.structure.cut(frozen[1].absorb(rough.site)).precision)
        d, saddle = _implicit(value_of, shift, metric.solver(), key)
        theta = predicted.mean + d
        information = curvature.gather(space, self.structure, theta, task, predicted.precision, power, key)
        precision = self.structure.cut(predicted.precision.absorb(information.site)).precision
        return (Belief(theta, precision), -value_of(d) - 0.5 * information.logdet_gain), saddle


def _implicit(
    objective: Callable[[Array], Array], found: Array, precondition: Callable[[Array], Array], key: Array
) -> tuple[Array, Array]:
    """``found`` with the derivative of the minimum of ``objective``; whether it is a saddle instead."""
    gradient = jax.grad(objective)(found)
    # closed over without their derivatives: the Hessian's own change does not count where the gradient is 0
    hessian = jax.linearize(jax.grad(objective), found)[1]

    def by_conjugate_gradients(matvec: Callable[[Array], Array], right: Array, most_steps: int) -> tuple[Array, Array]:
        return conjugate_gradients(lambda x: matvec(x[0]), right, lambda x: precondition(x)[None], most_steps)

    def solve(matvec: Callable[[Array], Array], right: Array) -> Array:
        return by_conjugate_gradients(matvec, right, MOST_STEPS)[0]

    moved = gradient - jax.lax.stop_gradient(gradient)
    probe = jax.random.normal(key, found.shape, found.dtype)
    _, rising = jax.lax.stop_gradient(by_conjugate_gradients(hessian, probe, PROBING_STEPS))
    return found - jax.lax.custom_linear_solve(hessian, moved, solve, symmetric=True), ~rising


@dataclass(frozen=True)
class DifferentiableLowRank(LowRank):
    """``LowRank`` with a derivative that stays finite where singular values are equal.

    For whitened columns B = metric^-1/2 W and the singular vectors [V_R, V_d] that are kept and dropped,

        kept factor     metric^1/2 B V,    V = V_R + V_d C,    C_ji = (B v_j).(B v_i) / (s_i^2 - s_j^2)

    where C is 0 and its derivative that of the kept subspace. Turning the basis inside the subspace changes nothing, so that
    only gaps between kept and dropped values divide; a gap of rounding's size takes no part.
    """

    def _cut(self, wide: DiagonalPlusLowRank, metric: Array) -> Cut:
        columns = wide.factor.shape[1]
        if columns <= self.rank:
            return super()._cut(wide, metric)
        scale = jnp.sqrt(metric)
        white = wide.factor / scale[:, None]
        turned = white @ singular_directions(*jax.lax.stop_gradient((wide.factor, metric)), self.rank)
        kept, dropped = turned[:, : self.rank], turned[:, self.rank :]
        squares = jax.lax.stop_gradient(jnp.sum(jnp.square(turned), axis=0))
        gap = squares[: self.rank] - squares[self.rank :, None]
        open_ = gap > jnp.sqrt(jnp.finfo(white.dtype).eps) * jnp.max(squares)
        mixed = jnp.where(open_, dropped.T @ kept / jnp.where(open_, gap, 1.0), 0.0)
        mixed = mixed - jax.lax.stop_gradient(mixed)
        factor = scale[:, None] * (kept + dropped @ mixed)
        rest = scale[:, None] * (dropped - kept @ mixed.T)
        diagonal = wide.diagonal + (jnp.sum(jnp.square(rest), axis=1) if self.keep_diagonal else 0.0)
        total = jnp.maximum(jnp.sum(squares), jnp.finfo(white.dtype).tiny)
        return Cut(DiagonalPlusLowRank(diagonal, factor), jnp.sum(squares[self.rank :]) / total)


def differentiable(structure: Structure) -> Structure:
    """The structure with derivatives that hold; the same beliefs."""
    return (
        DifferentiableLowRank(structure.rank, structure.keep_diagonal) if isinstance(structure, LowRank) else structure
    )
