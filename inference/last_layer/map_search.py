"""Newton's method for the weights of a head under a Gaussian belief N(m, S) and new points.

    maximise  sum_n w_n log p(y_n | f_n) - 1/2 |V - m|^2_{S^-1},     f = V phi

Few points, in the dual: with f_0 = m phi, K = J S J^T, Lambda = L L^T, all weighted,

    r = g - a;   a <- a + r - L (I + L^T K L)^-1 L^T K r;   f = f_0 + K a;   V = m + S J^T a at the end

(equal to the form with b = Lambda (f - f_0) + g, less its cancellation), the inverse by Cholesky's factor where n K is small,
else by conjugate gradients. Many points, in the weights: conjugate gradients on
S^-1 + J^T Lambda J, preconditioned by one (D, D) matrix for all outputs. Both halve a step that does not climb. The
objective is concave for the likelihoods of this package.
Source: the iterated update of Rasmussen and Williams 2006, section 3.5; inexact Newton of Dembo, Eisenstat, Steihaug 1982.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssm_nn.inference.last_layer.full_covariance import identity_plus_root, weighted_factor
from ssm_nn.inference.last_layer.head_likelihoods import HeadLikelihood
from ssm_nn.inference.last_layer.shared_covariance import isotropic_weight
from ssm_nn.inference.last_layer.structures import HeadInformation

__all__ = ["Found", "climb_by_products", "climb_in_outputs", "climb_in_weights"]

Array = Any

NEARLY = 1e3  # times the tolerance: what rounding may leave to be climbed
_DIRECT = 256  # outputs up to which Cholesky's factor costs less than some tens of products
_MAX_PRODUCTS = 500  # of one direction
_MAX_HALVINGS = 30  # a step of 1e-9 that does not climb is rounding


class Found(NamedTuple):
    """Where a climb ended.

    Attributes:
        position: a (n, K) in the dual, V (K, D) in the weights.
        outputs: f (n, K).
        steps: of Newton.
        decrement: sqrt(g^T H^-1 g), the length of the next step in standard deviations of the posterior.
        log_likelihood, square: the objective's parts, ``|V - m|^2_{S^-1}``.
    """

    position: Array
    outputs: Array
    steps: Array
    decrement: Array
    log_likelihood: Array
    square: Array


class _Climb(NamedTuple):
    position: Array
    outputs: Array
    value: Array
    steps: Array
    decrement: Array
    going: Array


def tolerance(dtype: Any) -> float:
    """Of the decrement: 4e-11 in float64, 2e-5 in float32. The next step would be its square."""
    return float(jnp.finfo(dtype).eps ** (2 / 3))


def weighted(weight: Array, value: Array) -> Array:
    """``w v``, 0 where w is 0 whatever v is."""
    w = weight.reshape(weight.shape + (1,) * (value.ndim - 1))
    return jnp.where(w > 0, w * value, 0.0)


def climb_in_outputs(
    kernel: Array,
    f_0: Array,
    likelihood: HeadLikelihood,
    y: Any,
    weight: Array,
    max_steps: Array | int = 100,
) -> Found:
    """The dual climb from the prediction f_0.

    Args:
        kernel: K (n, K, n, K).
        f_0: (n, K).
        weight: (n,), >= 0; a point of weight 0 changes nothing.
        max_steps: of Newton.
    """
    size = f_0.size
    matrix = kernel.reshape(size, size)

    def times_kernel(a):
        return (matrix @ a.ravel()).reshape(f_0.shape)

    def solved_directly(residual, factor, far):
        del far
        lifted = jnp.einsum("pmk,mkc->pmc", matrix.reshape(size, *f_0.shape), factor)
        core = jnp.einsum("nkmc,nkb->nbmc", lifted.reshape(*f_0.shape, *lifted.shape[1:]), factor)
        root = identity_plus_root(core.reshape(-1, factor.shape[0] * factor.shape[2]))
        right = jnp.einsum("nkc,nk->nc", factor, times_kernel(residual))
        solved = jax.scipy.linalg.cho_solve((root, True), right.ravel()).reshape(right.shape)
        change = residual - jnp.einsum("nkc,nc->nk", factor, solved)
        return change, times_kernel(change)

    direction = solved_directly if size <= _DIRECT else None
    return _climb_in_outputs(times_kernel, direction, f_0, jnp.zeros_like(f_0), likelihood, y, weight, max_steps)


def climb_by_products(
    times_kernel: Callable[[Array], Array],
    f_0: Array,
    start: Array,
    likelihood: HeadLikelihood,
    y: Any,
    weight: Array,
    max_steps: Array | int = 100,
) -> Found:
    """The dual climb where the kernel is too large to be made: by its products (n, K) -> (n, K), from ``start`` a (n, K)."""
    return _climb_in_outputs(times_kernel, None, f_0, start, likelihood, y, weight, max_steps)


def _climb_in_outputs(
    times_kernel: Callable[[Array], Array],
    solved_directly: Any,
    f_0: Array,
    start: Array,
    likelihood: HeadLikelihood,
    y: Any,
    weight: Array,
    max_steps: Array | int,
) -> Found:
    def log_likelihood(f):
        return jnp.sum(weighted(weight, likelihood.log_prob(f, y)))

    def value(a, f):
        return log_likelihood(f) - 0.5 * jnp.sum(a * (f - f_0))

    def by_products(residual, factor, far):
        def weigh(f):
            return jnp.einsum("nkc,nc->nk", factor, jnp.einsum("nkc,nk->nc", factor, f))

        return _conjugate_gradients_in_outputs(times_kernel, weigh, residual, far)

    def step(climb):
        residual = weighted(weight, likelihood.gradient(climb.outputs, y)) - climb.position
        factor = weighted_factor(likelihood, climb.outputs, y, weight)
        change, along_f = (solved_directly or by_products)(residual, factor, climb.decrement)
        slope = jnp.sum(residual * along_f)

        def at(s):
            return climb.position + s * change, climb.outputs + s * along_f

        return _stepped(climb, at, value, slope, max_steps)

    f = f_0 + times_kernel(start)
    end = _run(step, _Climb(start, f, value(start, f), *_begun(f_0.dtype)))
    f = f_0 + times_kernel(end.position)
    square = jnp.sum(end.position * (f - f_0))
    return Found(end.position, f, end.steps, end.decrement, log_likelihood(f), square)


def climb_in_weights(
    information: HeadInformation,
    mean: Array,
    start: Array,
    phi: Array,
    likelihood: HeadLikelihood,
    y: Any,
    weight: Array,
    max_steps: Array | int = 100,
) -> Found:
    """The climb over the weights from ``start`` (K, D), under N(mean, information^-1).

    Args:
        phi: (n, D).
        max_steps: of Newton.
    """
    block = information.block()

    def log_likelihood(f):
        return jnp.sum(weighted(weight, likelihood.log_prob(f, y)))

    def value(v, f):
        shift = v - mean
        return log_likelihood(f) - 0.5 * jnp.sum(shift * information.matvec(shift))

    def direction(climb):
        f = climb.outputs
        slope = weighted(weight, likelihood.gradient(f, y)).T @ phi - information.matvec(climb.position - mean)
        rows = phi * jnp.sqrt(isotropic_weight(likelihood, f, y, weight))[:, None]
        root = jax.scipy.linalg.cho_factor(block + rows.T @ rows, lower=True)

        def hessian(v):
            return information.matvec(v) + weighted(weight, likelihood.weigh(f, y, phi @ v.T)).T @ phi

        def precondition(v):
            return jax.scipy.linalg.cho_solve(root, v.T).T

        change = _conjugate_gradients(hessian, precondition, slope)
        return change, jnp.sum(slope * change)

    def step(climb):
        change, slope = direction(climb)
        along_f = phi @ change.T

        def at(s):
            return climb.position + s * change, climb.outputs + s * along_f

        return _stepped(climb, at, value, slope, max_steps)

    f = phi @ start.T
    end = _run(step, _Climb(start, f, value(start, f), *_begun(f.dtype)))
    f = phi @ end.position.T
    shift = end.position - mean
    square = jnp.sum(shift * information.matvec(shift))
    return Found(end.position, f, end.steps, end.decrement, log_likelihood(f), square)


def _begun(dtype: Any) -> tuple[Array, Array, Array]:
    return jnp.zeros((), jnp.int32), jnp.asarray(jnp.inf, dtype), jnp.asarray(True)


def _run(step: Any, start: _Climb) -> _Climb:
    return jax.lax.while_loop(lambda climb: climb.going, step, start)


def _stepped(climb: _Climb, at: Any, value: Any, slope: Array, max_steps: Array | int) -> _Climb:
    """One Newton step, halved until it climbs. The step that ends a climb is taken too: it is Newton's best."""
    decrement = jnp.sqrt(jnp.maximum(slope, 0.0))
    small = decrement <= tolerance(decrement.dtype)
    # a sum of many terms is not known better than this: near the top, gains are smaller
    rounding = 10 * jnp.finfo(decrement.dtype).eps * (1 + jnp.abs(climb.value))

    def worse(carry):
        s, halvings = carry
        reached = value(*at(s))
        climbs = reached >= climb.value + 1e-4 * s * slope - rounding  # Armijo's usual constant
        return ~climbs & ~small & (halvings < _MAX_HALVINGS)

    whole = jnp.ones((), decrement.dtype), jnp.zeros((), jnp.int32)
    s, halvings = jax.lax.while_loop(worse, lambda c: (c[0] / 2, c[1] + 1), whole)
    stuck = halvings >= _MAX_HALVINGS
    position, outputs = at(jnp.where(stuck, 0.0, s))
    steps = climb.steps + 1
    # Newton's steps shrink by their square; near the end, those that do not are rounding
    stuck |= (decrement <= NEARLY * tolerance(decrement.dtype)) & (decrement > 0.5 * climb.decrement)
    going = ~small & ~stuck & (steps < max_steps) & jnp.isfinite(decrement)
    return _Climb(position, outputs, value(position, outputs), steps, decrement, going)


def _accuracy(far: Array) -> Array:
    """Of a Newton step's direction: the next decrement is then about the square of this one, quadratic convergence, but no
    less than the last one needs."""
    limit = tolerance(far.dtype)
    return jnp.minimum(0.1, jnp.maximum(far, 0.1 * limit / jnp.maximum(far, limit)))


def _conjugate_gradients(hessian: Any, precondition: Any, slope: Array) -> Array:
    """``H^-1 slope`` as precisely as a Newton step that far from the top deserves."""
    toward = precondition(slope)
    first = jnp.sum(slope * toward)
    wanted = jnp.square(_accuracy(jnp.sqrt(first))) * first

    def unsolved(carry):
        _, _, _, size, steps = carry
        return (size > wanted) & (steps < _MAX_PRODUCTS)

    def step(carry):
        x, residual, toward, size, steps = carry
        image = hessian(toward)
        length = size / jnp.sum(toward * image)
        x, residual = x + length * toward, residual - length * image
        turned = precondition(residual)
        new = jnp.sum(residual * turned)
        return x, residual, turned + new / size * toward, new, steps + 1

    start = (jnp.zeros_like(slope), slope, toward, first, jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(unsolved, step, start)[0]


def _conjugate_gradients_in_outputs(
    times_kernel: Any, weigh: Any, residual: Array, decrement: Array
) -> tuple[Array, Array]:
    """``x = (I + Lambda K)^-1 r`` and K x by conjugate gradients in the inner product of K, where I + Lambda K is symmetric.

    The iterates are those in the weights, preconditioned by S: stopped anywhere, x climbs. Solving for ``L v = r - x`` and
    taking the difference does not: with a wide prior x is small beside r, and the error of v is of the size of r.
    Stopped where a step gains little of what all have gained (Nash, Sofer 1990), ``decrement``: the last Newton step's.
    """
    accuracy = jnp.square(_accuracy(decrement))

    def unsolved(carry):
        *_, size, gain, total, steps = carry
        return (steps * gain > accuracy * total) & (size > 0) & (steps < _MAX_PRODUCTS)

    def step(carry):
        x, along, residual, toward, image, size, _, total, steps = carry
        turned = toward + weigh(image)
        # a kernel that rounding has made indefinite: no step, which ends the loop
        bend = jnp.sum(image * turned)
        length = jnp.where(bend > 0, size / jnp.where(bend > 0, bend, 1.0), 0.0)
        residual = residual - length * turned
        lifted = times_kernel(residual)
        new = jnp.sum(residual * lifted)
        gain, share = length * size, new / size
        x, along = x + length * toward, along + length * image
        toward, image = residual + share * toward, lifted + share * image
        return x, along, residual, toward, image, new, gain, total + gain, steps + 1

    image, zero = times_kernel(residual), jnp.zeros_like(residual)
    size = jnp.sum(residual * image)
    # the first step is always made: inf of gain beside none
    start = (zero, zero, residual, residual, image, size, jnp.full_like(size, jnp.inf), jnp.zeros_like(size))
    x, along, *_ = jax.lax.while_loop(unsolved, step, (*start, jnp.ones((), jnp.int32)))
    return x, along
