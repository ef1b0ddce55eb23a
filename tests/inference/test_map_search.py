"""The searches for a task's maximum a posteriori weights, on one problem whose objective is written out here."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from linear_tasks import P, chain_of, tasks_of
from linear_tasks import program as linear_program

from ssm_nn import Task, weights
from ssm_nn.inference.batches import with_mask
from ssm_nn.inference.gauss_newton import GaussNewton
from ssm_nn.inference.lbfgs import Lbfgs
from ssm_nn.inference.map_problem import CONVERGED, FIXED_BUDGET, NOT_CONVERGED, NOT_FINITE, MapProblem
from ssm_nn.inference.minibatch import Minibatch
from ssm_nn.models.transitions import Static
from ssm_nn.precision_dense import DensePrecision

N, D, K = 8, 2, 3
MEAN = np.linspace(-0.5, 0.5, 10)
PRECISION = np.diag(np.linspace(1, 3, 10)) + 0.3
START = np.random.default_rng(1).normal(size=10) - MEAN
POWER = 1.5

pytestmark = pytest.mark.usefixtures("x64")


def tanh_network(params, x):
    return jnp.tanh(x @ params["hidden"]) @ params["head"]


def program(tasks):
    params = {"head": np.ones((2, K)), "hidden": np.ones((D, 2))}
    net = weights("net", (tanh_network, params), prior=dist.Normal(0.0, 1.0), transition=Static(), num_tasks=len(tasks))

    def observe(f, task):
        with numpyro.plate("examples", task["x"].shape[0]):
            numpyro.sample("y", dist.Categorical(logits=f(task["x"])), obs=task["y"])

    net.over(tasks, observe)


def data():
    x = np.random.default_rng(0).normal(size=(N, D))
    return x, (x[:, 0] > 0).astype(int) + (x[:, 1] > 0.5)


def problem():
    x, y = data()
    task = jax.tree.map(jnp.asarray, with_mask(Task({"x": x, "y": y})))
    return MapProblem(jnp.array(MEAN), DensePrecision(jnp.array(PRECISION)), task, {}, jnp.array(POWER))


def objective(shift):
    x, y = data()
    theta = MEAN + shift
    logits = jnp.tanh(x @ theta[6:].reshape(D, 2)) @ theta[:6].reshape(2, K)
    log_likelihood = jnp.sum(jax.nn.log_softmax(logits)[np.arange(N), y])
    return 0.5 * shift @ PRECISION @ shift - POWER * log_likelihood


def search(estimator):
    return estimator.bind(program)(problem(), jnp.array(START), jax.random.key(0))


def adam(batch_size, epochs=600, **settings):
    """A rate that falls to nothing, so that the noise of the batches dies out."""
    schedule = optax.cosine_decay_schedule(0.05, epochs * -(-N // batch_size))
    return Minibatch(optax.adam(schedule), epochs=epochs, batch_size=batch_size, **settings)


# the likelihood of a batch is scaled by N / B, the last batch is smaller, and the prior counts once
@pytest.mark.parametrize(
    ("estimator", "status", "tolerance"),
    [
        (GaussNewton(max_steps=500, tolerance=1e-13), CONVERGED, 1e-5),
        (Lbfgs(tolerance=1e-7), CONVERGED, 1e-5),
        (adam(N), FIXED_BUDGET, 1e-4),
        (adam(3), FIXED_BUDGET, 2e-2),
        (adam(N, prior_every=7), FIXED_BUDGET, 1e-4),
        (adam(3, prior_every=4), FIXED_BUDGET, 2e-2),
    ],
    ids=["GaussNewton", "Lbfgs", "Minibatch of all", "Minibatch of three", "one prior for seven", "one for four"],
)
def test_every_search_ends_at_the_minimum(estimator, status, tolerance):
    found = search(estimator)
    assert found.status == status
    gradient, hessian = jax.jit(jax.grad(objective))(found.shift), jax.jit(jax.hessian(objective))(found.shift)
    assert np.linalg.eigvalsh(hessian).min() > 0.5
    # the distance that is left, by one Newton step
    assert np.linalg.norm(np.linalg.solve(hessian, gradient)) < tolerance
    assert float(objective(found.shift)) < float(objective(jnp.array(START))) - 1


def test_searches_that_may_not_go_on_say_so():
    newton = search(GaussNewton(max_steps=1))
    assert (newton.status, newton.steps) == (NOT_CONVERGED, 1)
    assert search(Lbfgs(max_steps=2)).status == NOT_CONVERGED
    budget = search(adam(3, epochs=2))
    assert (budget.status, budget.steps) == (FIXED_BUDGET, 2 * 3), "two epochs of 3 + 3 + 2 examples"
    patient = search(adam(N, epochs=20, patience=30))
    assert (patient.status, patient.steps) == (NOT_CONVERGED, 20)


def test_patience_ends_a_search_that_no_longer_improves():
    found = search(adam(N, patience=5))
    assert found.status == CONVERGED
    assert 50 < found.steps < 600
    assert float(objective(found.shift)) < float(objective(search(adam(N)).shift)) + 1e-2


@pytest.mark.parametrize("rate", [1e12, np.nan])
def test_a_search_that_diverges_says_so(rate):
    found = search(Minibatch(optax.sgd(rate), epochs=50, batch_size=N))
    assert found.status == NOT_FINITE
    assert found.steps < 50


@pytest.mark.parametrize("estimator", [GaussNewton(), Lbfgs()])
def test_a_start_that_is_not_finite_says_so(estimator):
    found = estimator.bind(program)(problem(), jnp.full(10, jnp.nan), jax.random.key(0))
    assert found.status == NOT_FINITE


def test_one_gauss_newton_step_is_exact_on_a_linear_gaussian_problem():
    """And more do not move it."""
    (task,) = tasks_of(8, num_tasks=1)
    (design, value, noise), mean = chain_of([task]).data[0], np.linspace(-1, 1, P)
    precision = np.eye(P) + 0.5
    arrays = jax.tree.map(jnp.asarray, with_mask(task))
    linear = MapProblem(jnp.array(mean), DensePrecision(jnp.array(precision)), arrays, {}, jnp.array(1.0))
    weighted = design.T @ np.linalg.inv(noise)
    expected = np.linalg.solve(precision + weighted @ design, weighted @ (value - design @ mean))
    for estimator in (GaussNewton(max_steps=1), GaussNewton(tolerance=1e-30)):
        found = estimator.bind(linear_program)(linear, jnp.ones(P), jax.random.key(0))
        np.testing.assert_allclose(found.shift, expected, atol=1e-10)
