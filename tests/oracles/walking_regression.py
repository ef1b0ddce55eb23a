"""Linear regression whose weights walk, two groups with a noise of their own; exact evidence by one dense joint Gaussian."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from oracles_gaussian import Chain, condition

from ssm_nn import ByPath, Moments, Task, weights

SIZES = {"first": 3, "second": 2}
P, SD = 5, 0.3
GROUP = np.repeat([0, 1], [3, 2])
NOISES = {"noise.first": "first", "noise.second": "second"}
GAINS = {"gain.first": "first", "gain.second": "second"}


def apply(params, x):
    return x[..., :3] @ params["first"] + x[..., 3:] @ params["second"]


def program(tasks):
    """theta_t ~ N(a theta_{t-1}[order], gap q), y ~ N(x . theta, SD^2); order (of the first group) and gap are of the task."""
    noise = {g: numpyro.sample(f"noise.{g}", dist.Uniform(0.0, 100.0)) for g in SIZES}
    gain = {g: numpyro.sample(f"gain.{g}", dist.Uniform(-2.0, 2.0)) for g in SIZES}
    order = tasks.context["order"][0] if "order" in tasks.context else None
    gap = tasks.context["gap"][0] if "gap" in tasks.context else 1.0

    def kernel(group):
        return lambda leaf: Moments(gain[group], 0.0, gap * noise[group], order if group == "first" else None)

    net = weights(
        "net",
        (apply, {g: jnp.zeros(n) for g, n in SIZES.items()}),
        prior=dist.Normal(0.0, 1.0),
        transition=ByPath({g: kernel(g) for g in SIZES}),
        num_tasks=len(tasks),
    )

    def observe(f, task):
        with numpyro.plate("examples", task["x"].shape[0]):
            numpyro.sample("y", dist.Normal(f(task["x"]), SD), obs=task["y"])

    net.over(tasks, observe)


def tasks_of(seed, noise=(0.3, 0.05), gain=(1.0, 1.0), num_tasks=12, size=8, orders=None, gaps=None, missing=()):
    """A list of tasks drawn from the program; ``noise`` and ``gain`` by group, or one pair a task."""
    rng = np.random.default_rng(seed)
    noise, gain = (np.broadcast_to(v, (num_tasks, 2)) for v in (noise, gain))
    theta, tasks = rng.normal(size=P), []
    for t in range(num_tasks):
        context = {}
        if orders is not None:
            context["order"] = np.asarray(orders[t])
        if gaps is not None:
            context["gap"] = np.asarray(gaps[t])
        if t:
            theta = theta if orders is None else theta[np.append(orders[t], [3, 4])]
            spread = np.sqrt(noise[t][GROUP] * (1.0 if gaps is None else gaps[t]))
            theta = gain[t][GROUP] * theta + spread * rng.normal(size=P)
        x = rng.normal(size=(size, P))
        data = {"x": x, "y": x @ theta + SD * rng.normal(size=size)}
        tasks.append(Task({} if t in missing else data, context))
    return tasks


def chain_of(tasks, noise, gain=(1.0, 1.0)):
    """The program at given hyper-parameters, as matrices."""
    steps, data = [], []
    for t, task in enumerate(tasks):
        order = np.append(task.context["order"], [3, 4]) if "order" in task.context else np.arange(P)
        gap = task.context.get("gap", 1.0)
        if t:
            steps.append(
                (np.asarray(gain)[GROUP, None] * np.eye(P)[order], np.zeros(P), gap * np.diag(np.asarray(noise)[GROUP]))
            )
        data.append((task["x"], task["y"], SD**2 * np.eye(task.num_examples)) if task.data else None)
    return Chain(np.zeros(P), np.eye(P), steps, data)


def evidence(tasks, noise, gain=(1.0, 1.0)):
    """Exact log evidence."""
    return condition(chain_of(tasks, noise, gain)).log_evidence
