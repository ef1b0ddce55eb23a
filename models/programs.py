"""Ready programs: one network whose weights walk at random, a noise for each group of its leaves.

The noises are sites ``noise.<group>`` of the program: an engine takes them as hyper-parameters, so that one compiled
engine serves every kernel (``engine.with_hypers``), and NUTS or SVI can infer them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from ssm_nn.moments import Leaf, Moments
from ssm_nn.program import ByPath, weights
from ssm_nn.tasks import Task, Tasks

__all__ = ["MAX_NOISE", "classification", "regression"]

MAX_NOISE = (
    100.0  # of the uniform prior of a noise; ten prior standard deviations a step, at the usual prior scale of 1
)

Program = Callable[[Tasks], None]
EVERY_LEAF = {"all": "*"}


def classification(network: Any, prior_scale: float = 1.0, groups: Mapping[str, str] = EVERY_LEAF) -> Program:
    """``y ~ Categorical(softmax f_t(x))``, ``theta_0 ~ N(0, prior_scale^2)``, ``theta_t ~ N(theta_{t-1}, q_group)``.

    Args:
        network: whatever ``ssm_nn.weights`` takes; its outputs (N, K) are the logits of K classes.
        prior_scale: standard deviation of every weight of the first task, > 0.
        groups: name -> pattern of paths, every leaf in exactly one: ``{"first": "layers.0.*", "last": "layers.1.*"}``.

    Returns:
        A program for tasks with "x" (N, ...) and "y" (N,) in 0 .. K - 1. Its network is ``net``; its sites
        ``noise.<group>`` hold the variance q of one step, >= 0, where 0 keeps the group as it is.

    Raises:
        ValueError: a prior scale that is not positive, no group.
    """

    def observe(f: Callable[[Any], Any], task: Task) -> None:
        with numpyro.plate("examples", task["x"].shape[0]):
            numpyro.sample("y", dist.CategoricalLogits(f(task["x"])), obs=task.get("y"))

    return _walking(network, prior_scale, groups, observe)


def regression(
    network: Any, noise_scale: float, prior_scale: float = 1.0, groups: Mapping[str, str] = EVERY_LEAF
) -> Program:
    """``y ~ N(f_t(x), noise_scale^2)`` with weights as in ``classification``.

    Args:
        network: its outputs (N, 1) or (N,) are the means.
        noise_scale: standard deviation of the observations, > 0.
        prior_scale, groups: as for ``classification``.

    Returns:
        A program for tasks with "x" (N, ...) and "y" (N,).

    Raises:
        ValueError: a scale that is not positive, no group.
    """
    _check_positive("noise_scale", noise_scale)

    def observe(f: Callable[[Any], Any], task: Task) -> None:
        num_examples = task["x"].shape[0]
        with numpyro.plate("examples", num_examples):
            numpyro.sample("y", dist.Normal(jnp.reshape(f(task["x"]), num_examples), noise_scale), obs=task.get("y"))

    return _walking(network, prior_scale, groups, observe)


def _walking(network: Any, prior_scale: float, groups: Mapping[str, str], observe: Callable[..., None]) -> Program:
    _check_positive("prior_scale", prior_scale)
    if not groups:
        raise ValueError("groups is empty; at least one name and pattern is accepted, such as {'all': '*'}")

    def program(tasks: Tasks) -> None:
        # Uniform, because its support holds 0: a group that stands still
        noises = {name: numpyro.sample(f"noise.{name}", dist.Uniform(0.0, MAX_NOISE)) for name in groups}
        kernels = {pattern: _walk(noises[name]) for name, pattern in groups.items()}
        net = weights(
            "net", network, prior=dist.Normal(0.0, prior_scale), transition=ByPath(kernels), num_tasks=len(tasks)
        )
        net.over(tasks, observe)

    return program


def _walk(noise: Any) -> Callable[[Leaf], Moments]:
    # RandomWalk takes the standard deviation, whose root has no derivative at noise 0
    return lambda leaf: Moments(noise=noise)


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} is {value}; a positive number is accepted")
