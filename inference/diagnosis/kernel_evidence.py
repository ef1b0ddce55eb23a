"""The evidence of a program that is linear in its weights, by the kernel between the outputs of all its tasks.

    theta_t = mean_t + sum_r A_tr w_r^1/2 xi_r      A_tr = a_{r+1} ... a_t,  w_0 the prior's variance, w_r the step's noise
    K_tu = sum_c (A_c diag(w_c) A_c^T)_tu Phi_tc Phi_uc^T                       c: weights that share prior, gain and noise
    B = I + D K D,   D = diag(p^1/2 / s),   x = D (y - mean)                    p: power times how often an element counts
    log Z = - 1/2 log det B - 1/2 x^T B^-1 x - 1/2 sum p log(2 pi s^2)

Exact. Value and derivative cost O((T N)^3 + C (T N)^2) for T tasks of N elements and C cells, however many weights there are:
the products Phi_tc Phi_uc^T hold no hyper-parameter (linear_outputs.py). Source: Rasmussen and Williams 2006, section 2.7.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.scipy.linalg import solve_triangular

from ssm_nn.extraction import Program, extract, path_distributions
from ssm_nn.inference.diagnosis.linear_outputs import LinearTasks, NormalElements, cell_shape, normal_elements
from ssm_nn.markov_path import MarkovPath
from ssm_nn.tasks import Task, Tasks

__all__ = ["kernel_evidence", "kernel_resolves"]

Array = Any

_RESOLVED = 1e-4  # roundings of B, in units of its smallest eigenvalue, above which its determinant is wrong
_SMALL = 50  # rows that are solved by substitution


class _Standard(NamedTuple):
    """B (T N, T N), x (T N,), and what the density of y has beside that of x."""

    covariance: Array
    distance: Array
    heights: Array


def kernel_evidence(program: Program, linear: LinearTasks, hypers: Mapping[str, Array], power: float = 1.0) -> Array:
    """``log Z`` of all tasks; fit for ``jit``, ``vmap`` and reverse-mode derivatives.

    Args:
        program: of which ``linear`` was made.
        linear: Gram matrices, and the tasks.
        hypers: every latent site outside the weights.
        power: of the likelihood.
    """
    covariance, distance, heights = _standard(program, linear, hypers, power)
    return _log_normal(covariance, distance) - heights


def kernel_resolves(program: Program, linear: LinearTasks, hypers: Mapping[str, Array], power: float = 1.0) -> bool:
    """Whether rounding leaves enough of B at these hyper-parameters; ``linear`` must not be traced.

    In float64 always. In float32 not where noise is far below what the weights spread, and outputs are many for them.
    """
    covariance = _standard(program, linear, hypers, power).covariance
    epsilon = float(jnp.finfo(covariance.dtype).eps)
    single = epsilon >= float(jnp.finfo(jnp.float32).eps)
    return not single or epsilon * float(jnp.linalg.cond(covariance)) <= _RESOLVED


def _standard(program: Program, linear: LinearTasks, hypers: Mapping[str, Array], power: float) -> _Standard:
    tasks = linear.tasks
    paths = path_distributions(program, Tasks.tree_unflatten(None, (tasks.data, tasks.context, tasks.mask)), hypers)
    count = len(jax.tree.leaves(tasks)[0])
    moved = {name: jnp.broadcast_to(p.mean, (count, *p.leaf_shape)) for name, p in paths.items() if not _centred(p)}

    def read(task: Task, leaves: Mapping[str, Array]) -> NormalElements:
        space = extract(program, task, hypers)
        nothing = space.layout.leaves(jnp.zeros_like(space.prior_mean))
        return normal_elements(space, space.layout.vector({**nothing, **leaves}), task)

    seen = NormalElements(*map(jnp.ravel, jax.vmap(read)(tasks, moved)))
    counts = power * seen.weight
    root = jnp.sqrt(counts) / seen.scale
    kernel: Any = sum(_kernel(paths[name], count, gram) for name, gram in linear.grams.items())
    covariance = jnp.eye(len(counts), dtype=kernel.dtype) + root[:, None] * kernel * root
    distance = root * jnp.where(counts > 0, seen.value - seen.mean, 0.0)
    return _Standard(covariance, distance, 0.5 * jnp.sum(counts * jnp.log(2 * jnp.pi * jnp.square(seen.scale))))


def _centred(path: MarkovPath) -> bool:
    """Whether the mean is zero at all hyper-parameters."""
    return not any(isinstance(m, Tracer) or np.any(np.asarray(m)) for m in (path.loc, path.moments.shift))


def _kernel(path: MarkovPath, count: int, gram: Array) -> Array:
    """(T N, T N), of one leaf."""
    cells = cell_shape(path)
    gain, noise = (_by_task(m, path, count, cells) for m in (path.moments.gain, path.moments.noise))
    first = jnp.broadcast_to(jnp.square(path.scale), cells).reshape(1, -1)
    weight = jnp.concatenate([first, noise[1:]])
    later = (np.arange(count)[:, None] > np.arange(count))[..., None]
    steps = jnp.cumprod(jnp.where(later, gain[:, None], 1.0), axis=0)  # (t, r, c): a_{r+1} ... a_t, below the diagonal
    steps = jnp.where(later | np.eye(count, dtype=bool)[..., None], steps, 0.0)
    covariance = jnp.einsum("trc,rc,urc->ctu", steps, weight, steps).astype(gram.dtype)
    each = gram.reshape(len(gram), count, -1, count, gram.shape[-1] // count)
    return jnp.sum(covariance[:, :, None, :, None] * each, axis=0).reshape(gram.shape[1:])


def _by_task(moment: Array, path: MarkovPath, count: int, cells: tuple[int, ...]) -> Array:
    """(T, C); entry t of the step into task t."""
    each = jnp.asarray(moment, float)
    each = each if path.per_task else each[None]
    shape = (len(each), *(1,) * (len(cells) - each.ndim + 1), *each.shape[1:])
    return jnp.broadcast_to(each.reshape(shape), (count, *cells)).reshape(count, -1)


@jax.custom_vjp
def _log_normal(covariance: Array, x: Array) -> Array:
    """``-1/2 log det B - 1/2 x^T B^-1 x``, whose derivative takes one inverse where Cholesky's own takes several products."""
    root = jnp.linalg.cholesky(covariance, symmetrize_input=False)
    return _value(root, solve_triangular(root, x, lower=True))


def _log_normal_forward(covariance: Array, x: Array) -> tuple[Array, tuple[Array, Array]]:
    root = jnp.linalg.cholesky(covariance, symmetrize_input=False)
    inverse = _inverse(root)
    white = inverse @ x
    return _value(root, white), (inverse, white)


def _log_normal_back(rest: tuple[Array, Array], change: Array) -> tuple[Array, Array]:
    inverse, white = rest
    solved = white @ inverse
    return 0.5 * change * (jnp.outer(solved, solved) - inverse.T @ inverse), -change * solved


_log_normal.defvjp(_log_normal_forward, _log_normal_back)


def _value(root: Array, white: Array) -> Array:
    return -jnp.sum(jnp.log(jnp.diagonal(root))) - 0.5 * white @ white


def _inverse(root: Array) -> Array:
    """Of a lower triangle, by halves: products are several times as fast as substitution."""
    size = len(root)
    if size <= _SMALL:
        return solve_triangular(root, jnp.eye(size, dtype=root.dtype), lower=True)
    half = size // 2
    first, last = _inverse(root[:half, :half]), _inverse(root[half:, half:])
    below = -last @ (root[half:, :half] @ first)
    return jnp.block([[first, jnp.zeros((half, size - half), root.dtype)], [below, last]])
