"""NUTS on the program itself and the smoother agree where the network is linear in its weights."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import MCMC, NUTS

from ssm_nn import InnovationReparam, Tasks, weights
from ssm_nn.inference.laplace import LaplaceFilter
from ssm_nn.inference.structures import Dense
from ssm_nn.models.transitions import RandomWalk

T, D, DRAWS = 3, 2, 1_000


def tasks_of(kind, size):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(T, size, D))
    y = rng.normal(size=(T, size)) if kind == "Gaussian" else rng.integers(0, 2, (T, size))
    return Tasks({"x": jnp.array(x), "y": jnp.array(y)})


def program_of(kind):
    def program(tasks):
        net = weights(
            "net",
            (lambda params, x: x @ params, jnp.zeros(D)),
            prior=dist.Normal(0.3, 1.0),
            transition=RandomWalk(0.4),
            num_tasks=len(tasks),
        )

        def observe(f, task):
            likelihood = dist.Normal(f(task["x"]), 0.7) if kind == "Gaussian" else dist.Bernoulli(logits=f(task["x"]))
            with numpyro.plate("examples", task["x"].shape[0]):
                numpyro.sample("y", likelihood, obs=task["y"])

        net.over(tasks, observe)

    return program


# Laplace is exact for the first. For the second, what it neglects is of relative order 1 / examples: with 60 a task, in
# units of the posterior's standard deviation, a tenth is allowed
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("kind", "size", "bias"), [("Gaussian", 4, 0.0), pytest.param("Bernoulli", 60, 0.1, marks=pytest.mark.slow)]
)
def test_nuts_and_the_smoother_agree(kind, size, bias):
    tasks, program = tasks_of(kind, size), program_of(kind)
    # innovations are nearly round, so that the draws are nearly independent
    moved = handlers.reparam(program, config={"net.weight": InnovationReparam()})
    mcmc = MCMC(NUTS(moved), num_warmup=200, num_samples=DRAWS, progress_bar=False)
    mcmc.run(jax.random.key(0), tasks)
    draws = np.asarray(mcmc.get_samples()["net.weight"])
    filter_ = LaplaceFilter(program, Dense())
    smoothed = filter_.smooth(filter_.run(0, tasks))
    number = min(float(np.min(statistics["n_eff"])) for statistics in numpyro.diagnostics.summary(draws[None]).values())
    assert number > DRAWS / 4
    for t, belief in enumerate(smoothed.beliefs):
        covariance = np.linalg.inv(belief.precision.to_dense())
        scale = np.sqrt(np.diag(covariance))
        # five standard errors of a mean and of a covariance
        np.testing.assert_array_less(np.abs(draws[:, t].mean(0) - belief.mean) / scale, 5 / np.sqrt(number) + bias)
        found = np.cov(draws[:, t].T) / np.outer(scale, scale)
        assert np.all(np.abs(found - covariance / np.outer(scale, scale)) < 5 * np.sqrt(2 / number) + 2 * bias)
