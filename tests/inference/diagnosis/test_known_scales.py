"""Columns of information that may differ from zero: scales that no weight enters have none."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import ssm_nn
from ssm_nn.extraction import extract
from ssm_nn.inference.batches import counted_copies
from ssm_nn.inference.curvature import columns
from ssm_nn.inference.diagnosis.known_scales import informative_columns
from ssm_nn.models import RandomWalk


def constant(f, task):
    numpyro.sample("y", dist.Normal(f[..., 0], 0.3), obs=task["y"])


def by_weights(f, task):
    numpyro.sample("y", dist.Normal(f[..., 0], jnp.exp(f[..., 1])), obs=task["y"])


def by_input(f, task):
    numpyro.sample("y", dist.Normal(f[..., 0], jnp.exp(task["x"][:, 0])), obs=task["y"])


def after_labels(f, task):
    numpyro.sample("label", dist.Bernoulli(logits=f[..., 1]), obs=task["label"])
    numpyro.sample("y", dist.Normal(f[..., 0], 0.3), obs=task["y"])


def both(f, task):
    numpyro.sample("a", dist.Normal(f[..., 1], 1.0), obs=task["y"])
    by_weights(f, task)


def another_scale(f, task):
    numpyro.sample("y", dist.Laplace(f[..., 0], 0.3), obs=task["y"])


@pytest.mark.parametrize(
    ("observe", "kept"),
    [
        (constant, (0,)),
        (by_weights, (0, 1)),
        (by_input, (0,)),
        (after_labels, (0, 1)),
        (both, (0, 2, 3)),
        (another_scale, (0, 1)),
    ],
)
def test_columns_that_are_kept_are_those_that_weights_fill(observe, kept, rng):
    def program(tasks):
        network = (lambda w, x: x @ w, jnp.ones((2, 2)))
        net = ssm_nn.weights("net", network, prior=dist.Normal(0, 1), transition=RandomWalk(0.1), num_tasks=len(tasks))

        def body(f, task):
            with numpyro.plate("n", task["x"].shape[0]):
                observe(f(task["x"]), task)

        net.over(tasks, body)

    x = rng.normal(size=(3, 2)).astype("float32")
    tasks = ssm_nn.stack_tasks([{"x": x, "y": x[:, 0], "label": np.array([0, 1, 1], "int32")}])
    task = counted_copies(tasks.at(0))
    space = extract(program, task, {})
    assert informative_columns(space, task) == kept
    # nothing that is left out differs from zero
    every = np.asarray(columns(space, space.initial, task)).reshape(4, 3, -1)
    left_out = [c for c in range(every.shape[2]) if c not in kept]
    assert not every[..., left_out].any()
