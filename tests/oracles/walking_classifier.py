"""A tanh network of two inputs and three classes whose weights walk, and tasks for it; shared by the tests of its evidence."""

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

import ssm_nn
from ssm_nn.models import RandomWalk


def walking_classifier(rng, num_hidden):
    """The program; the scale of the walk is a latent site."""
    initial = {"hidden": 0.7 * rng.normal(size=(2, num_hidden)), "head": 0.7 * rng.normal(size=(num_hidden, 3))}

    def model(tasks):
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        network = (lambda params, x: jnp.tanh(x @ params["hidden"]) @ params["head"], initial)
        net = ssm_nn.weights(
            "net", network, prior=dist.Normal(0.0, 1.0), transition=RandomWalk(scale), num_tasks=len(tasks)
        )

        def observe(f, task):
            with numpyro.plate("examples", task["x"].shape[0]):
                numpyro.sample("y", dist.Categorical(logits=f(task["x"])), obs=task["y"])

        net.over(tasks, observe)

    return model


def quadrants(x):
    """A task of inputs (n, 2), labelled 0, 1 or 2."""
    return {"x": x, "y": (x[:, 0] > 0).astype(int) + (x[:, 1] > 0.5)}
