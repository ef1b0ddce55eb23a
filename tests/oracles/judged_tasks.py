"""A linear regression whose weights walk, with correlated inputs: small enough that every diagnosis is known."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from oracles_gaussian import Chain, condition

import ssm_nn
from ssm_nn.models import RandomWalk

D, T, N, SCALE, SD = 3, 5, 12, 0.4, 0.3


def regression(tasks):
    """y ~ N(x . theta_t, SD^2), theta_t ~ N(theta_{t-1}, scale^2)."""
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    net = ssm_nn.weights(
        "net",
        (lambda params, x: x @ params, jnp.zeros(D)),
        prior=dist.Normal(0.0, 1.0),
        transition=RandomWalk(scale),
        num_tasks=len(tasks),
    )

    def observe(f, task):
        with numpyro.plate("examples", task["x"].shape[0]):
            numpyro.sample("y", dist.Normal(f(task["x"]), SD), obs=task.get("y"))

    net.over(tasks, observe)


def tasks_of(seed, scale=SCALE, noise=SD, num_tasks=T, size=N):
    """Tasks drawn from the program, with other scales where asked; inputs that share one direction."""
    rng = np.random.default_rng(seed)
    theta, tasks = rng.normal(size=D), []
    for _ in range(num_tasks):
        x = 0.3 * rng.normal(size=(size, D)) + rng.normal(size=(size, 1))
        tasks.append({"x": x.astype("float32"), "y": (x @ theta + noise * rng.normal(size=size)).astype("float32")})
        theta = theta + scale * rng.normal(size=D)
    return tasks


def joint_of(tasks, scale=SCALE):
    """The exact Gaussian posterior of all weights."""
    steps = [(np.eye(D), np.zeros(D), scale**2 * np.eye(D))] * (len(tasks) - 1)
    data = [(t["x"].astype(float), t["y"].astype(float), SD**2 * np.eye(len(t["y"]))) for t in tasks]
    return condition(Chain(np.zeros(D), np.eye(D), steps, data))


def logistic(tasks):
    """A classifier with two hidden units."""
    params = {"hidden": jnp.asarray([[1.0, -0.5], [0.3, 0.8]]), "head": jnp.asarray([1.0, -1.0])}
    net = ssm_nn.weights(
        "net",
        (lambda p, x: jnp.tanh(x @ p["hidden"]) @ p["head"], params),
        prior=dist.Normal(0.0, 1.0),
        transition=RandomWalk(0.2),
        num_tasks=len(tasks),
    )

    def observe(f, task):
        with numpyro.plate("examples", task["x"].shape[0]):
            numpyro.sample("y", dist.Bernoulli(logits=f(task["x"])), obs=task.get("y"))

    net.over(tasks, observe)


def labelled(seed, num_tasks=3, size=30):
    """Tasks for ``logistic``."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_tasks, size, 2)).astype("float32")
    y = (x.sum(-1) + 0.5 * rng.normal(size=(num_tasks, size)) > 0).astype("int32")
    return [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]
