"""The language: network weights as latent states, and the loop over tasks.

    def program(tasks):
        scale = numpyro.sample("scale", dist.HalfNormal(0.5))
        net = ssm_nn.weights("net", mlp, prior=dist.Normal(0.0, 1.0), transition=RandomWalk(scale), num_tasks=len(tasks))

        def observe(f, task):
            with numpyro.plate("examples", task["x"].shape[0]):
                numpyro.sample("y", dist.Categorical(logits=f(task["x"])), obs=task.get("y"))

        net.over(tasks, observe)

It is an ordinary NumPyro program: NUTS, SVI, Predictive and the handlers run on it as it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.contrib.control_flow import scan

from ssm_nn.markov_path import MarkovPath, never_moves
from ssm_nn.moments import Leaf, Moments, Transition, check_moments, moments_of
from ssm_nn.networks import Network, as_network
from ssm_nn.path_patterns import assign
from ssm_nn.tasks import Task, Tasks, stack_tasks

__all__ = ["ByPath", "PerTask", "Weights", "over", "weights"]

Kernel = Transition | Callable[[Leaf], Moments]
Observe = Callable[..., Any]


class ByPath:
    """A value for each leaf by patterns of its path: ``ByPath({"layers.1.*": RandomWalk(0.3)}, otherwise=Static())``.

    Serves kernels and priors. Every leaf must fit one pattern; leaves that fit none take ``otherwise`` if it is given.
    """

    def __init__(self, patterns: Mapping[str, Any], otherwise: Any = None):
        if not patterns:
            raise ValueError("patterns is empty; ByPath takes at least one pattern")
        self.patterns, self.otherwise = dict(patterns), otherwise

    def __repr__(self) -> str:
        return f"ByPath({self.patterns!r}, otherwise={self.otherwise!r})"


class PerTask:
    """A kernel that depends on the task: ``PerTask(lambda context: RandomWalk(s * context["gap"]), tasks.context)``.

    Args:
        kernel: from the context of task t to the kernel of the step into task t.
        context: pytree of arrays with a leading axis of T, usually ``tasks.context``.
    """

    def __init__(self, kernel: Callable[[Any], Kernel | ByPath], context: Any):
        if not jax.tree.leaves(context):
            raise ValueError("context holds no arrays; PerTask takes a context with a leading task axis")
        self.kernel, self.context = kernel, context


class Weights:
    """The weights of one network over all tasks, as the program holds them.

    Attributes:
        name: the network's name in the program; its sites are ``name.path``.
        network: the network as a function of named arrays.
        paths: dotted path -> (T, *leaf), or (1, *leaf) for a leaf that never moves.
    """

    def __init__(self, name: str, network: Network, paths: Mapping[str, Any], num_tasks: int):
        self.name, self.network, self.paths, self.num_tasks = name, network, dict(paths), num_tasks

    def over(self, tasks: Tasks, observe: Observe) -> None:
        """Observe every task: ``observe(f, task)`` with ``f`` the network at the task's weights."""
        over([self], tasks, observe)


class TaskBody:
    """What is observed of one task, given the weights of its networks; the body of the scan over tasks."""

    def __init__(self, networks: Sequence[Weights], observe: Observe, still: Mapping[str, Mapping[str, Any]]):
        self.networks, self.observe, self.still = networks, observe, still

    def __call__(self, carry, inputs):
        moving, data, context, mask = inputs
        arrays = {net.name: {**moving[net.name], **self.still[net.name]} for net in self.networks}
        self.run(arrays, _rebuilt(data, context, mask))
        return carry, None

    def run(self, arrays: Mapping[str, Mapping[str, Any]], task: Task) -> None:
        """Execute ``observe`` for one task at given weights (network name -> path -> leaf)."""
        bound = [net.network.bind(arrays[net.name]) for net in self.networks]
        if task.mask is None:
            self.observe(*bound, task)
        else:
            with handlers.mask(mask=task.mask):
                self.observe(*bound, task)


def _rebuilt(data, context, mask) -> Task:
    return Task.tree_unflatten(None, (data, context, mask))  # inside a trace: lengths were checked outside


def weights(
    name: str, network: Any, *, prior: dist.Normal | ByPath, transition: Kernel | ByPath | PerTask, num_tasks: int
) -> Weights:
    """Declare a network's weights as the latent states of a Gauss-Markov process over tasks.

    One site ``name.path`` for each leaf, its distribution a MarkovPath of event shape (T, *leaf).

    Args:
        name: name of the network in the program.
        network: a flax.nnx module, an equinox module, or a pair (apply, params).
        prior: the Normal of the first task's weights, broadcastable to every leaf, or one by path.
        transition: the kernel that moves weights between tasks, one for all leaves, by path, or per task.
        num_tasks: T, usually ``len(tasks)``.

    Raises:
        ValueError: naming the argument, for what is not accepted.
    """
    made = as_network(network)
    if isinstance(num_tasks, bool) or not isinstance(num_tasks, int) or num_tasks < 1:
        raise ValueError(f"num_tasks is {num_tasks!r}; a positive whole number is accepted")
    names = list(made.initial)
    priors = (
        assign(prior.patterns, names, "prior", prior.otherwise)
        if isinstance(prior, ByPath)
        else dict.fromkeys(names, prior)
    )
    paths: dict[str, Any] = {}
    for path, initial in made.initial.items():
        leaf = _leaf(path, jnp.shape(initial), priors[path])
        site = _path_distribution(leaf, transition, names, num_tasks)
        value = numpyro.sample(f"{name}.{path}", site)
        if jnp.shape(value) != site.event_shape:
            raise ValueError(
                f"the weights {name}.{path} have shape {jnp.shape(value)}, not {site.event_shape}: "
                "weights() stands outside every plate"
            )
        paths[path] = value
    return Weights(name, made, paths, num_tasks)


def over(networks: Sequence[Weights], tasks: Tasks, observe: Observe) -> None:
    """Observe every task with several networks: ``observe(f, g, ..., task)``.

    Where tasks are padded, their mask is applied to every site that ``observe`` samples: the examples are then the
    last batch axis of each site. Inside ``observe`` stand observed sites only.
    """
    if not isinstance(tasks, Tasks):
        tasks = Tasks(tasks) if isinstance(tasks, Mapping) else stack_tasks(tasks)
    for net in networks:
        if net.num_tasks != len(tasks):
            raise ValueError(f"num_tasks is {net.num_tasks} for {net.name!r}, but there are {len(tasks)} tasks")
    names = [net.name for net in networks]
    if len(set(names)) < len(names):
        raise ValueError(f"networks has the names {names}; each network is passed once")
    one = len(tasks) == 1
    still = {net.name: {p: v[0] for p, v in net.paths.items() if v.shape[0] == 1 and not one} for net in networks}
    moving = {net.name: {p: v for p, v in net.paths.items() if p not in still[net.name]} for net in networks}
    scan(TaskBody(networks, observe, still), None, (moving, tasks.data, tasks.context, tasks.mask), length=len(tasks))


def _leaf(path: str, shape: tuple[int, ...], prior: Any) -> Leaf:
    if not isinstance(prior, dist.Normal):
        raise ValueError(
            f"prior of {path!r} is {type(prior).__name__}; numpyro's Normal is accepted, or ByPath of them"
        )
    try:
        fits = jnp.broadcast_shapes(prior.batch_shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"prior of {path!r} has the batch shape {prior.batch_shape}; it must broadcast to {shape}")
    return Leaf(path, shape, prior.loc, prior.scale)


def _path_distribution(leaf: Leaf, transition: Any, names: Sequence[str], num_tasks: int) -> MarkovPath:
    per_task = isinstance(transition, PerTask)
    if per_task:
        lengths = {jnp.shape(array)[0] if jnp.ndim(array) else None for array in jax.tree.leaves(transition.context)}
        if lengths != {num_tasks}:
            raise ValueError(
                f"the context of PerTask has leading axes {lengths}; each must be the number of tasks, {num_tasks}"
            )

        def step(context):
            moments = _moments(transition.kernel(context), leaf, names)
            return jax.tree.map(jnp.asarray, moments)

        moments = jax.vmap(step)(transition.context)
        moments = moments._replace(
            **{m: _per_task_shape(getattr(moments, m), leaf) for m in ("gain", "shift", "noise")}
        )
        check_moments(moments, leaf, leading=(num_tasks,))
        return MarkovPath(leaf.loc, leaf.scale, moments, num_tasks, leaf.shape, per_task=True)
    moments = _moments(transition, leaf, names)
    check_moments(moments, leaf)
    return MarkovPath(leaf.loc, leaf.scale, moments, num_tasks, leaf.shape, frozen=never_moves(moments))


def _moments(transition: Any, leaf: Leaf, names: Sequence[str]) -> Moments:
    if isinstance(transition, ByPath):
        transition = assign(transition.patterns, names, "transition", transition.otherwise)[leaf.path]
    return moments_of(transition, leaf)


def _per_task_shape(value: Any, leaf: Leaf) -> Any:
    """(T, *s) with s broadcastable to the leaf, as (T, 1, ..., *s): the task axis must not meet an axis of the leaf."""
    shape = jnp.shape(value)
    return jnp.reshape(value, (shape[0],) + (1,) * (len(leaf.shape) - len(shape) + 1) + shape[1:])
