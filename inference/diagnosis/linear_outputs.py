"""Tasks whose outputs are linear in the weights: the matrices Phi_t, and their products over the weights of one kernel.

    E[y_t | theta_t] = Phi_t theta_t + f_t        Phi_t holds neither weights nor hyper-parameters, f_t may hold these
    G_c = Phi_c Phi_c^T                           Phi_c (T N, P_c): all tasks, the weights that share prior, gain and noise

Whether a program has this form is read off its trace, not tried at points.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.extend.core import (
    ClosedJaxpr,  # pyright: ignore[reportPrivateImportUsage]
    jaxpr_as_fun,
)
from jax.interpreters import partial_eval

from ssm_nn.extraction import Layout, Program, StateSpace, extract, path_distributions
from ssm_nn.inference.batches import counted_copies
from ssm_nn.markov_path import MarkovPath
from ssm_nn.tasks import Task, Tasks

__all__ = ["LinearTasks", "NormalElements", "cell_shape", "linear_tasks", "normal_elements"]

Array = Any

_FEW = 200  # outputs that are cheap, however few weights there are
_MOST_NUMBERS = 2**27  # of Phi, and of all Gram matrices together


class LinearTasks(NamedTuple):
    """What of a stack of T tasks does not change with the hyper-parameters.

    Attributes:
        tasks: every leaf with the tasks in front; copies of counted examples in the place of masked ones.
        grams: site name -> (C, T N, T N), the products G_c.
        num_weights: P.
    """

    tasks: Task
    grams: dict[str, Array]
    num_weights: int

    @property
    def num_elements(self) -> int:
        """T N."""
        return next(iter(self.grams.values())).shape[-1]


class NormalElements(NamedTuple):
    """What a task observes, element by element (N,): mean, standard deviation, value, and how often it counts."""

    mean: Array
    scale: Array
    value: Array
    weight: Array


def linear_tasks(program: Program, stack: Tasks, hypers: Mapping[str, Array]) -> LinearTasks | None:
    """The Gram matrices, or None: for sites that are not normal, steps that reorder the weights, or too many outputs.

    Args:
        program: the NumPyro program.
        stack: tasks; arrays that are not traced are worked on at once, also inside a trace.
        hypers: every latent site outside the weights, of which only shapes are read.
    """
    mask = stack.mask if stack.mask is not None else jnp.ones((len(stack), stack.at(0).num_examples), bool)
    tasks = jax.vmap(counted_copies)(Task.tree_unflatten(None, (stack.data, stack.context, mask)))
    paths = jax.eval_shape(lambda values: path_distributions(program, stack, values), dict(hypers))
    if any(path.moments.permutation is not None for path in paths.values()):
        return None
    means = _Means.of(program, tasks, hypers)
    if means is None:
        return None
    elements, cells = len(stack) * means.num_elements, {name: cell_shape(path) for name, path in paths.items()}
    widest = max(means.layout.size, sum(int(np.prod(shape)) for shape in cells.values()) * elements)
    if elements > max(means.layout.size, _FEW) or elements * widest > _MOST_NUMBERS:
        return None
    rows = jax.lax.map(means.design, tasks).reshape(-1, means.layout.size)
    designs = means.layout.leaves(rows)
    return LinearTasks(tasks, {name: _grams(designs[name], cells[name]) for name in cells}, means.layout.size)


def cell_shape(path: MarkovPath) -> tuple[int, ...]:
    """How far prior scale, gain and noise differ within a leaf: a shape of its rank that broadcasts to it."""
    per_task = path.per_task
    shapes = [jnp.shape(path.scale)] + [jnp.shape(m)[per_task:] for m in (path.moments.gain, path.moments.noise)]
    shape = np.broadcast_shapes(*shapes)
    return (1,) * (len(path.leaf_shape) - len(shape)) + shape


def normal_elements(space: StateSpace, theta: Array, task: Task) -> NormalElements:
    """Of all sites; raises ``NotNormal`` for a site of another kind."""
    parts = []
    for site in space.observed(theta, task).values():
        distribution, weight, value = site.distribution, site.weight, jnp.asarray(site.value)
        while isinstance(distribution, dist.Independent):
            weight = weight.reshape(weight.shape + (1,) * distribution.reinterpreted_batch_ndims)
            distribution = distribution.base_dist
        if type(distribution) is not dist.Normal:
            raise NotNormal
        each = distribution.loc, distribution.scale, value, weight
        parts.append([jnp.ravel(jnp.broadcast_to(jnp.asarray(a, theta.dtype), value.shape)) for a in each])
    return NormalElements(*(jnp.concatenate(column) for column in zip(*parts, strict=True)))


class NotNormal(Exception):
    """A site that is not normal."""


class _Means(NamedTuple):
    """The trace of one task's means along a change of the weights: leaves of the task, ``unread`` ones, change -> (N,)."""

    traced: ClosedJaxpr
    layout: Layout
    unread: list[Array]
    change: jax.ShapeDtypeStruct

    @classmethod
    def of(cls, program: Program, tasks: Task, hypers: Mapping[str, Array]) -> _Means | None:
        """None where the derivative holds weights or hyper-parameters, or where scales hold weights."""
        layouts = []

        def read(task: Task, theta: Array, values: Any, change: Array) -> tuple[Array, Array]:
            space = extract(program, task, values)
            layouts.append(space.layout)

            def mean(x: Array) -> tuple[Array, Array]:
                seen = normal_elements(space, x, task)
                return seen.mean, jnp.stack([seen.scale, seen.weight])

            _, derivative, rest = jax.jvp(mean, (theta,), (change,), has_aux=True)
            return derivative, rest

        first = jax.tree.map(lambda leaf: leaf[0], tasks)
        theta = jax.eval_shape(lambda task, values: extract(program, task, values).prior_mean, first, dict(hypers))
        arguments = first, theta, dict(hypers), theta
        try:
            traced = jax.make_jaxpr(read)(*arguments)
        except NotNormal:
            return None
        names = np.repeat(["task", "theta", "hypers", "change"], [len(jax.tree.leaves(part)) for part in arguments])

        def holds(output: int) -> set[str]:
            return set(names[partial_eval.dce_jaxpr(traced.jaxpr, [i == output for i in range(2)])[1]])

        if holds(0) & {"theta", "hypers"} or holds(1) & {"theta", "change"}:
            return None
        shapes = [jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(arguments)]
        unread = [jnp.ones_like(a) for a, name in zip(shapes, names, strict=True) if name in ("theta", "hypers")]
        return cls(traced, layouts[0], unread, shapes[-1])

    @property
    def num_elements(self) -> int:
        """N."""
        return self.traced.out_avals[0].shape[0]  # pyright: ignore[reportAttributeAccessIssue]

    def design(self, task: Task) -> Array:
        """Phi (N, P) of one task."""
        run = jaxpr_as_fun(self.traced)
        along = lambda x: run(*jax.tree.leaves(task), *self.unread, x)[0]  # noqa: E731
        return jax.jacrev(along)(jnp.zeros_like(self.change))


def _grams(design: Array, cells: tuple[int, ...]) -> Array:
    """(C, R, R) of Phi (R, *leaf): summed over the axes along which the cells do not differ."""
    apart = [1 + axis for axis, size in enumerate(cells) if size > 1]
    rows = jnp.moveaxis(design, apart, range(len(apart)))
    rows = rows.reshape(int(np.prod(cells, dtype=int)), design.shape[0], -1)
    return rows @ jnp.swapaxes(rows, 1, 2)
