"""Task-incremental programs: kernels that all tasks share, and leaves of each task's own, its head among them.

    W ~ N(0, prior_scale^2)                        shared: kernels that never move
    own_t ~ N(0, prior_scale^2), fresh for every t  head, biases, normalisers
    y ~ Categorical(softmax f(x; W, own_t))

The task's identity says which own leaves are meant. Under NUTS and SVI it is an ordinary program; under
``PerturbationFilter`` the shared kernels are perturbed by each task after the first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.core import Tracer

from ssm_nn.models.transitions import OrnsteinUhlenbeck, Static
from ssm_nn.networks import as_network
from ssm_nn.path_patterns import assign
from ssm_nn.program import ByPath, weights
from ssm_nn.tasks import Task, Tasks

__all__ = ["NEVER", "multi_head"]

NEVER = -1e9  # logit of a class that the task has not: finite, so that nothing is nan

Program = Callable[[Tasks], None]


def multi_head(network: Any, head: str, prior_scale: float = 1.0) -> Program:
    """A classification program of many tasks with a head each.

    A task's own are the leaves that fit ``head`` and all leaves of fewer than two axes; leaves that start at one
    (scales of normalisers) have prior mean 1, the others 0.

    Args:
        network: whatever ``ssm_nn.weights`` takes; its outputs (N, K) are the logits of K classes.
        head: pattern of the paths of the head's leaves, ``"layers.2.*"`` for the third layer of ``mlp``.
        prior_scale: standard deviation of every weight, > 0.

    Returns:
        A program for tasks with "x" (N, ...) and "y" (N,) in 0 .. K - 1. Its network is ``net``. Where a task's context has
        "classes" (K,), the classes that are false there have no probability.

    Raises:
        ValueError: a prior scale that is not positive, a pattern that fits no leaf, no leaf left to share.
    """
    if not isinstance(head, str):
        raise ValueError(f"head is {head!r}; a pattern of paths is accepted, 'head.*' for instance")
    if not isinstance(prior_scale, int | float | np.number) or not 0 < prior_scale < float("inf"):
        raise ValueError(f"prior_scale is {prior_scale!r}; a positive number is accepted")
    initial = as_network(network).initial
    if any(isinstance(leaf, Tracer) for leaf in initial.values()):
        raise ValueError(
            "network is made while a program is traced, where its weights are no numbers yet; make it, and the program by "
            "multi_head, once and outside. A head keeps its size: give it the most classes and each task's context 'classes'"
        )
    is_head = assign({head: True}, list(initial), "head", False)
    own = [path for path, leaf in initial.items() if is_head[path] or jnp.ndim(leaf) < 2]
    if len(own) == len(initial):
        raise ValueError(f"head is {head!r}, which leaves no kernel to share; the leaves are {', '.join(initial)}")
    fresh = OrnsteinUhlenbeck(0.0)
    transition = ByPath({path: fresh if path in own else Static() for path in initial})
    means = {path: 1.0 if bool(np.all(np.asarray(leaf) == 1)) else 0.0 for path, leaf in initial.items()}
    prior = ByPath({path: dist.Normal(means[path], prior_scale) for path in initial})

    def observe(f: Callable[[Any], Any], task: Task) -> None:
        logits = f(task["x"])
        if "classes" in task.context:
            logits = jnp.where(task.context["classes"], logits, jnp.asarray(NEVER, logits.dtype))
        with numpyro.plate("examples", task["x"].shape[0]):
            numpyro.sample("y", dist.CategoricalLogits(logits), obs=task.get("y"))

    def program(tasks: Tasks) -> None:
        net = weights("net", network, prior=prior, transition=transition, num_tasks=len(tasks))
        net.over(tasks, observe)

    return program
