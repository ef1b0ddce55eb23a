"""What the mean-field benchmarks share: the published network as a program, and permuted images, standardised."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import ssm_nn
from ssm_nn.models import Static
from ssm_nn.models.datasets import load

PIXELS, CLASSES = 784, 10


def network(hidden: int):
    """784-hidden-10, ReLU, no bias."""

    def apply(params, x):
        return jax.nn.relu(x @ params["hidden"]) @ params["head"]

    return apply, {"hidden": jnp.zeros((PIXELS, hidden)), "head": jnp.zeros((hidden, CLASSES))}


def classifier(made, prior_scale: float = 1.0):
    """Class labels by the softmax of a network; weights stand still, and forgetting is the window's."""

    def program(tasks):
        net = ssm_nn.weights(
            "net", made, prior=dist.Normal(0.0, prior_scale), transition=Static(), num_tasks=len(tasks)
        )

        def observe(f, task):
            with numpyro.plate("examples", task["x"].shape[0]):
                numpyro.sample("y", dist.Categorical(logits=f(task["x"])), obs=task.get("y"))

        net.over(tasks, observe)

    return program


@cache
def images(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training and test images (N, 784) by MNIST's mean and deviation, and their labels."""
    data, reference = load(name), load("mnist").train_x
    train, test = (standardised(x, reference) for x in (data.train_x, data.test_x))
    return train, data.train_y, test, data.test_y


def standardised(x: np.ndarray, reference: np.ndarray | None = None) -> np.ndarray:
    """Images as rows (N, 784), by the mean and deviation of all pixels of ``reference``, or of their own."""
    reference = x if reference is None else reference
    return ((x - reference.mean()) / reference.std()).reshape(len(x), -1).astype(np.float32)


def permutation(seed: int, task: int) -> np.ndarray:
    """Of the pixels of a task; the identity for the first. Tasks are made one at a time: 200 of them are 47 GiB."""
    order = np.arange(PIXELS)
    if task:
        np.random.default_rng([seed, task]).shuffle(order)
    return order
