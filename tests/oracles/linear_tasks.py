"""Random linear-Gaussian task sequences, as a program and as the chain of matrices that it stands for.

Two leaves, a step of its own for every task (gain, shift, noise and order of every weight, zeros among them), and noise
of its own for every example.
"""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from oracles_gaussian import Chain

from ssm_nn import ByPath, Moments, PerTask, Task, weights

SIZES = {"first": 4, "second": 2}
P, N, T = 6, 5, 5
LOC = {"first": np.array([0.5, -1.0, 0.0, 2.0]), "second": np.array([1.0, -0.5])}
SCALE = {"first": np.array([1.0, 2.0, 0.5, 1.5]), "second": np.array([0.7, 3.0])}


def apply(params, x):
    return x[..., :4] @ params["first"] + x[..., 4:] @ params["second"]


def program(tasks):
    """y_n ~ N(x_n . theta_t, sd_n^2); the step into task t is its context."""
    # dtypes follow the data, so that one program serves float32 and float64
    dtype = tasks.context["gain"]["first"].dtype

    def kernel(context):
        def moments(leaf):
            gain, shift, noise, order = (context[name][leaf.path] for name in ("gain", "shift", "noise", "order"))
            return Moments(gain, shift, noise, order)

        return moments

    prior = {path: dist.Normal(jnp.asarray(LOC[path], dtype), jnp.asarray(SCALE[path], dtype)) for path in SIZES}
    net = weights(
        "net",
        (apply, {path: jnp.zeros(size, dtype) for path, size in SIZES.items()}),
        prior=ByPath(prior),
        transition=PerTask(kernel, tasks.context),
        num_tasks=len(tasks),
    )

    def observe(f, task):
        with numpyro.plate("examples", task["x"].shape[0]):
            numpyro.sample("y", dist.Normal(f(task["x"]), task["sd"]), obs=task["y"])

    net.over(tasks, observe)


def step(rng, kind="any"):
    """Context of one step. ``any``: every number at random; ``noisy``: no zero; ``walk``: a random walk; ``still``."""

    def leaf(size):
        one, none = np.ones(size), np.zeros(size)
        noise = rng.uniform(0.1, 1, size)
        if kind == "still":
            return one, none, none, np.arange(size)
        if kind == "walk":
            return one, none, 0.3 * one, np.arange(size)
        gain, shift, order = rng.uniform(-1.2, 1.2, size), rng.normal(size=size), rng.permutation(size)
        if kind == "any":
            # a weight drawn anew, and one that does not move
            gain, noise = np.where(np.arange(size) == 0, 0, gain), np.where(np.arange(size) == 1, 0, noise)
        return gain, shift, noise, order

    parts = {path: leaf(size) for path, size in SIZES.items()}
    return {
        name: {path: part[i] for path, part in parts.items()}
        for i, name in enumerate(("gain", "shift", "noise", "order"))
    }


def tasks_of(seed, kind="any", missing=(), num_tasks=T, size=N):
    """A list of tasks, one seed one sequence."""
    rng = np.random.default_rng(seed)
    tasks = []
    for t in range(num_tasks):
        context = step(rng, kind)
        data = {"x": rng.normal(size=(size, P)), "y": rng.normal(size=size), "sd": rng.uniform(0.3, 1.5, size)}
        tasks.append(Task({} if t in missing else data, context))
    return tasks


def chain_of(tasks):
    """The same as matrices."""
    steps, data = [], []
    for t, task in enumerate(tasks):
        gain, shift, noise = (
            np.concatenate([task.context[name][path] for path in SIZES]) for name in ("gain", "shift", "noise")
        )
        order = np.concatenate([task.context["order"]["first"], 4 + task.context["order"]["second"]])
        if t:
            steps.append((np.diag(gain) @ np.eye(P)[order], shift, np.diag(noise)))
        counted = np.ones(task.num_examples, bool) if task.mask is None else np.asarray(task.mask)
        empty = not task.data or not counted.any()
        data.append(None if empty else (task["x"][counted], task["y"][counted], np.diag(task["sd"][counted] ** 2)))
    loc, scale = (np.concatenate([values[path] for path in SIZES]) for values in (LOC, SCALE))
    return Chain(loc, np.diag(scale**2), steps, data)
