"""From a program to its state-space form: all that an engine sees.

The program is traced with one task at a time. Its hyper-parameters are fixed; the sites of ``weights`` give the prior and
the step into this task; the body of the loop over tasks gives the likelihood. Nothing of size T x P is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.core import Tracer
from numpyro import handlers
from numpyro.primitives import Messenger

from ssm_nn.coordinate_map import CoordinateMap, LeafMap
from ssm_nn.likelihoods import likelihood_of
from ssm_nn.markov_path import MarkovPath
from ssm_nn.moments import Moments
from ssm_nn.program import TaskBody
from ssm_nn.tasks import Task, Tasks

__all__ = ["Layout", "ObservedSite", "Site", "StateSpace", "extract"]

Array = Any
Arrays = Mapping[str, Mapping[str, Any]]  # network name -> path -> leaf
Program = Callable[[Tasks], Any]


class Site(NamedTuple):
    """One leaf in the vector of all weights: ``name`` of its site, ``network``, ``path``, shape, slice, frozen or not."""

    name: str
    network: str
    path: str
    shape: tuple[int, ...]
    start: int
    stop: int
    frozen: bool


@dataclass(frozen=True)
class Layout:
    """How the weights of all networks lie in one vector theta (P,); hashable, so that it may be static under ``jit``."""

    sites: tuple[Site, ...]

    @property
    def size(self) -> int:
        """P, the number of weights."""
        return self.sites[-1].stop

    def leaves(self, theta: Array) -> dict[str, Array]:
        """Site name -> leaf; leading axes of ``theta`` (..., P) are kept."""
        return {s.name: theta[..., s.start : s.stop].reshape(theta.shape[:-1] + s.shape) for s in self.sites}

    def vector(self, leaves: Mapping[str, Array]) -> Array:
        """The inverse of ``leaves``: (P,)."""
        return jnp.concatenate([jnp.ravel(leaves[s.name]) for s in self.sites])

    def packed(self, arrays: Arrays, filling: float = 0.0) -> Array:
        """The inverse of ``arrays``: (P,); a layout with places that hold no weight puts ``filling`` there."""
        del filling
        return jnp.concatenate([jnp.ravel(arrays[s.network][s.path]) for s in self.sites])

    def arrays(self, theta: Array) -> dict[str, dict[str, Array]]:
        """Network name -> path -> leaf, for one theta (P,)."""
        named: dict[str, dict[str, Array]] = {}
        for s in self.sites:
            named.setdefault(s.network, {})[s.path] = theta[s.start : s.stop].reshape(s.shape)
        return named


@runtime_checkable
class PlacedProgram(Protocol):
    """A program that lays the weights out in its own way."""

    def __call__(self, tasks: Tasks, /) -> Any: ...

    def placed(self, space: StateSpace) -> StateSpace:
        """The same state-space form in another layout."""
        ...


class ObservedSite(NamedTuple):
    """One observed site of a task: its distribution (unmasked), its value or None, and the weight of each element."""

    distribution: dist.Distribution
    value: Array | None
    weight: Array  # broadcastable to the batch shape

    def log_likelihood(self) -> Array:
        """Weighted log density of an observed value, by element of the batch."""
        value: Any = self.value
        log_prob = self.distribution.log_prob(value)
        # where, not a product: a masked element may be anything, nan too
        return jnp.where(self.weight > 0, self.weight * jnp.where(self.weight > 0, log_prob, 0.0), 0.0)


class StateSpace(NamedTuple):
    """The state-space form of a program, traced with one task.

    Attributes:
        layout: where each leaf lies in theta (P,).
        prior_mean, prior_variance: (P,), of the first task's weights.
        moments: gain, shift, noise (P,) of the step into this task, and a CoordinateMap or None.
        initial: (P,), the networks' own initial weights.
        body: what is observed of a task.
    """

    layout: Layout
    prior_mean: Array
    prior_variance: Array
    moments: Moments
    initial: Array
    body: TaskBody

    def observe(self, theta: Array, task: Task) -> dict[str, ObservedSite]:
        """The observed sites of ``task`` at weights ``theta``, by name."""
        return self.observe_at(self.layout.arrays(theta), task)

    def observe_at(self, arrays: Arrays, task: Task) -> dict[str, ObservedSite]:
        """``observe`` with the weights as named arrays, as ``Layout.arrays`` makes them."""
        recorder = _RecordSites()
        with handlers.block(), recorder:
            self.body.run(arrays, task)
        return recorder.sites

    def observed(self, theta: Array, task: Task) -> dict[str, ObservedSite]:
        """``observe`` for learning: every site must have a value.

        Raises:
            ValueError: for a site without a value, or no site at all.
        """
        return self.observed_at(self.layout.arrays(theta), task)

    def observed_at(self, arrays: Arrays, task: Task) -> dict[str, ObservedSite]:
        """``observed`` with the weights as named arrays."""
        sites = self.observe_at(arrays, task)
        for name, site in sites.items():
            if site.value is None:
                raise ValueError(
                    f"the site {name!r} inside the task body is not observed: only sites with obs=... may stand there "
                    "(latent ones go outside the loop over tasks), and the task must hold what they observe"
                )
        if not sites:
            raise ValueError("the program observes nothing: the task body has no site with obs=...")
        return sites

    def log_likelihood(self, theta: Array, task: Task) -> Array:
        """Sum over the task's examples and sites of ``log p(y | theta)``, masks and scales counted."""
        total = self.log_likelihood_at(self.layout.arrays(theta), task)
        return jnp.asarray(total, theta.dtype)  # data of a wider type widen no state

    def log_likelihood_at(self, arrays: Arrays, task: Task) -> Array:
        """``log_likelihood`` with the weights as named arrays: a gradient by leaf, nothing packed."""
        return jnp.asarray(sum(jnp.sum(site.log_likelihood()) for site in self.observed_at(arrays, task).values()))

    def outputs(self, theta: Array, example: Task) -> Array:
        """Canonical outputs (K,) of one example (a task of length 1), all sites joined."""
        return self.outputs_at(self.layout.arrays(theta), example)

    def outputs_at(self, arrays: Arrays, example: Task) -> Array:
        """``outputs`` with the weights as named arrays."""
        sites = self.observe_at(arrays, example).values()
        return jnp.concatenate([jnp.ravel(likelihood_of(site.distribution).outputs) for site in sites])

    def output_factor(self, theta: Array, example: Task) -> Array:
        """L (K, C) of one example with ``L L^T`` the Fisher information in its outputs, weights counted."""
        blocks = []
        for site in self.observed(theta, example).values():
            likelihood = likelihood_of(site.distribution)
            factor = likelihood.factor(site.value)
            if likelihood.exact:
                batch = site.distribution.batch_shape
                # an Independent site weighs its whole event: its factor has the event's axes between batch and (K, C)
                weight = jnp.broadcast_to(site.weight, batch).reshape(batch + (1,) * (factor.ndim - len(batch)))
            else:
                weight = jnp.max(site.weight)
            blocks.append(_block_diagonal(jnp.where(weight > 0, factor * jnp.sqrt(weight), 0.0)))
        return jax.scipy.linalg.block_diag(*blocks)


def _block_diagonal(factor: Array) -> Array:
    """(..., K, C) as one block-diagonal matrix."""
    flat = factor.reshape((-1, *factor.shape[-2:]))
    return flat[0] if flat.shape[0] == 1 else jax.scipy.linalg.block_diag(*flat)


class _RecordSites(Messenger):
    """Collect the sample sites of a task body; unobserved ones get a placeholder, so that nothing is drawn."""

    def __init__(self):
        self.sites: dict[str, ObservedSite] = {}
        super().__init__(None)

    def process_message(self, msg):
        if msg["type"] == "param":
            raise ValueError(
                f"numpyro.param({msg['name']!r}) inside the task body; it goes outside the loop over tasks"
            )
        if msg["type"] != "sample":
            return
        if msg["name"] in self.sites:
            raise ValueError(f"the task body has two sites named {msg['name']!r}")
        distribution, weight = msg["fn"], 1.0 if msg["scale"] is None else msg["scale"]
        while isinstance(distribution, dist.MaskedDistribution):  # one layer a mask: the task's, and the user's own
            weight = weight * jnp.asarray(distribution._mask, float)
            distribution = distribution.base_dist
        value = msg["value"] if msg["is_observed"] else None
        if value is not None:
            _check_value(msg["name"], distribution, value)
        self.sites[msg["name"]] = ObservedSite(distribution, value, jnp.asarray(weight, float))
        if value is None:
            msg["value"] = jnp.zeros(distribution.shape(), _value_dtype(distribution))


def _value_dtype(distribution: dist.Distribution) -> Any:
    return int if distribution.support is not None and distribution.support.is_discrete else float


def _check_value(name: str, distribution: dist.Distribution, value: Array) -> None:
    if jnp.shape(value) != distribution.shape():
        raise ValueError(
            f"the site {name!r} observes values of shape {jnp.shape(value)}, but its {type(distribution).__name__} has "
            f"shape {distribution.shape()}: the network's output does not fit the likelihood"
        )


class _ReadProgram(Messenger):
    """Read the sites of ``weights`` without drawing them, and the body of the loop over tasks without running it."""

    def __init__(self):
        self.paths: dict[str, MarkovPath] = {}
        self.body: TaskBody | None = None
        self.initial: dict[str, Array] = {}
        super().__init__(None)

    def process_message(self, msg):
        if msg["type"] == "sample" and isinstance(msg["fn"], MarkovPath):
            self.paths[msg["name"]] = msg["fn"]
            msg["value"] = jnp.broadcast_to(jnp.asarray(msg["fn"].loc, float), msg["fn"].event_shape)
        elif msg["type"] == "sample" and msg["value"] is None and not msg["is_observed"]:
            raise ValueError(
                f"hypers has no value for the latent site {msg['name']!r}; an engine takes every site outside the "
                "weights as given"
            )
        elif msg["type"] == "control_flow":
            if not isinstance(msg["args"][0], TaskBody):
                raise ValueError(
                    "the program has a scan of its own; only the loop over tasks of weights().over is accepted"
                )
            if self.body is not None:
                raise ValueError("the program loops over its tasks twice; use over([f, g], tasks, observe) once")
            self.body = msg["args"][0]
            msg["value"] = (None, None, None), (_NoSites(), None)


class _NoSites:
    trace: dict[str, Any] = {}


def extract(program: Program, task: Task, hypers: Mapping[str, Array] | None = None) -> StateSpace:
    """The state-space form of ``program``, traced with ``task`` alone; a pure function, fit for ``jit``.

    Args:
        program: the NumPyro program; it takes a stack of tasks.
        task: one task; only its context reaches the kernel, only its shapes the rest.
        hypers: the value of every latent site outside the weights.

    Raises:
        ValueError: for a program without weights or observations, a missing, unknown or impossible hyper-parameter.
    """
    hypers = dict(hypers or {})
    mask = task.mask if task.data or task.mask is not None else jnp.ones(0, bool)  # gives an empty task its length
    parts = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], (task.data, task.context, mask))
    stack = Tasks.tree_unflatten(None, parts)
    reader = _ReadProgram()
    with handlers.block(), reader, handlers.trace() as trace, handlers.condition(data=hypers):
        program(stack)
    _check_hypers(hypers, trace)
    if not reader.paths:
        raise ValueError("the program has no weights; declare them with ssm_nn.weights(...)")
    if reader.body is None:
        raise ValueError("the program observes no task: call weights(...).over(tasks, observe)")
    space = _assemble(reader.paths, reader.body)
    # a program over a mesh of devices lays its weights out anew
    return program.placed(space) if isinstance(program, PlacedProgram) else space


def path_distributions(
    program: Program, tasks: Tasks, hypers: Mapping[str, Array] | None = None
) -> dict[str, MarkovPath]:
    """The distribution of every leaf over all tasks of a stack, by site name, at fixed hyper-parameters."""
    reader = _ReadProgram()
    with handlers.block(), reader, handlers.condition(data=dict(hypers or {})):
        program(tasks)
    return reader.paths


def describe(program: Program, task: Task, hypers: Mapping[str, Array] | None = None) -> Layout:
    """The layout alone, by abstract evaluation: no array of the program is computed."""
    found: list[Layout] = []

    def trace(task):
        found.append(extract(program, task, hypers).layout)

    jax.eval_shape(trace, task)
    return found[0]


def _check_hypers(hypers: Mapping[str, Array], trace: Mapping[str, Any]) -> None:
    for name, value in hypers.items():
        site = trace.get(name)
        if site is None or site["type"] != "sample" or isinstance(site["fn"], MarkovPath):
            latent = [n for n, s in trace.items() if s["type"] == "sample" and not isinstance(s["fn"], MarkovPath)]
            raise ValueError(f"hypers has {name!r}, which is no latent site outside the weights; those are {latent}")
        if isinstance(value, Tracer):
            continue
        with jax.ensure_compile_time_eval():
            inside = bool(np.all(site["fn"].support(jnp.asarray(value))))
        if not inside:
            raise ValueError(f"hypers[{name!r}] is {value}; accepted is {site['fn'].support}")


def _assemble(paths: Mapping[str, MarkovPath], body: TaskBody) -> StateSpace:
    sites, means, variances, initials, parts = [], [], [], [], []
    start = 0
    # sites are named prefix + network.path in the order of the networks' own leaves, which is how they were sampled
    named = [(net, path) for net in body.networks for path in net.paths]
    if len(named) != len(paths):
        unused = sorted(set(paths) - {f"{net.name}.{path}" for net, path in named})
        raise ValueError(f"weights that no task observes: {', '.join(unused)}; pass every network to over(...)")
    by_name = {_owner(name, named): (name, fn) for name, fn in paths.items()}
    for net, path in named:
        name, fn = by_name[net.name, path]
        shape, size = fn.leaf_shape, int(np.prod(fn.leaf_shape, dtype=int))
        step = fn.step_into(0)
        sites.append(Site(name, net.name, path, shape, start, start + size, fn.frozen))
        initial = net.network.initial[path]
        dtype = jnp.result_type(initial)

        def wide(value, dtype=dtype, shape=shape):
            return jnp.ravel(jnp.broadcast_to(jnp.asarray(value, dtype), shape))

        means.append(wide(fn.loc))
        variances.append(wide(jnp.square(fn.scale)))
        initials.append(wide(initial))
        parts.append((wide(step.gain), wide(step.shift), wide(step.noise), _leaf_map(step, shape, start)))
        start += size
    gain, shift, noise = (jnp.concatenate([part[i] for part in parts]) for i in range(3))
    maps = tuple(part[3] for part in parts if part[3] is not None)
    moments = Moments(gain, shift, noise, CoordinateMap(maps) if maps else None)
    return StateSpace(
        Layout(tuple(sites)),
        jnp.concatenate(means),
        jnp.concatenate(variances),
        moments,
        jnp.concatenate(initials),
        body,
    )


def _owner(name: str, named: list[tuple[Any, str]]) -> tuple[str, str]:
    """The (network, path) of a site, whose name a handler such as ``scope`` may have given a prefix."""
    for net, path in named:
        if name == f"{net.name}.{path}" or name.endswith(f"/{net.name}.{path}"):
            return net.name, path
    raise ValueError(f"the weights {name!r} are observed by no task; pass every network to over(...)")


def _leaf_map(step: Moments, shape: tuple[int, ...], start: int) -> LeafMap | None:
    if step.permutation is None:
        return None
    return LeafMap(jnp.asarray(step.permutation), start, shape, step.axis % len(shape))
