"""The columns of a task against Hessians taken by differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from ssm_nn import Task, extract, weights
from ssm_nn.inference.batches import with_mask
from ssm_nn.inference.curvature import columns
from ssm_nn.models.transitions import Static

N, D, K = 4, 3, 3
pytestmark = pytest.mark.usefixtures("x64")


def linear(params, x):
    return x @ params["kernel"] + params["bias"]


def tanh_network(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


LINEAR = {"kernel": np.zeros((D, K)), "bias": np.zeros(K)}
TANH = {"first": np.zeros((D, 2)), "second": np.zeros((2, K))}

# likelihoods in natural parameters: outputs of the network, values
NATURAL = {
    "Categorical": (lambda f: dist.Categorical(logits=f), np.array([0, 2, 1, 1])),
    "Multinomial": (lambda f: dist.Multinomial(5, logits=f), np.array([[5, 0, 0], [1, 2, 2], [0, 4, 1], [2, 2, 1]])),
    "Bernoulli": (
        lambda f: dist.Bernoulli(logits=f).to_event(1),
        np.array([[0, 1, 1], [1, 1, 0], [0, 0, 0], [1, 0, 1]]),
    ),
    "Binomial": (
        lambda f: dist.Binomial(4, logits=f).to_event(1),
        np.array([[0, 1, 4], [3, 1, 0], [2, 2, 2], [1, 0, 1]]),
    ),
    "Poisson": (lambda f: dist.Poisson(jnp.exp(f)).to_event(1), np.array([[0, 1, 4], [3, 1, 0], [2, 2, 2], [1, 0, 1]])),
    "Normal": (lambda f: dist.Normal(f, 0.7).to_event(1), np.linspace(-1, 1, 12).reshape(4, 3)),
}


def program_of(likelihood, network=(linear, LINEAR), handler=None):
    def observe(f, task):
        with numpyro.plate("examples", task["x"].shape[0]):
            if handler is None:
                numpyro.sample("y", likelihood(f(task["x"])), obs=task["y"])
            else:
                with handler(task):
                    numpyro.sample("y", likelihood(f(task["x"])), obs=task["y"])

    def program(tasks):
        net = weights("net", network, prior=dist.Normal(0.0, 1.0), transition=Static(), num_tasks=len(tasks))
        net.over(tasks, observe)

    return program


def task_of(value, **extra):
    x = np.random.default_rng(0).normal(size=(len(value), D))
    return jax.tree.map(jnp.asarray, with_mask(Task({"x": x, "y": value, **extra})))


def information(program, task, theta):
    """V V^T and the Hessian of the negative log likelihood."""

    @jax.jit
    def both(theta, task):
        space = extract(program, task)
        v = columns(space, theta, task)
        return v @ v.T, jax.hessian(lambda w: -space.log_likelihood(w, task))(theta)

    return tuple(np.asarray(matrix) for matrix in both(theta, task))


def drawn(size):
    return jnp.array(np.random.default_rng(1).normal(size=size))


@pytest.mark.parametrize("name", NATURAL)
def test_in_natural_parameters_columns_are_a_root_of_the_hessian(name):
    likelihood, value = NATURAL[name]
    found, hessian = information(program_of(likelihood), task_of(value), drawn(D * K + K))
    np.testing.assert_allclose(found, hessian, atol=1e-9)
    assert np.abs(hessian).max() > 0.1


def test_of_a_network_columns_are_a_root_of_the_gauss_newton_matrix():
    """J^T H J with dense Jacobians; not the Hessian, which has the network's own curvature in it."""
    likelihood, value = NATURAL["Categorical"]
    theta, task = drawn(6 + 6), task_of(value)
    found, hessian = information(program_of(likelihood, (tanh_network, TANH)), task, theta)
    expected = np.zeros_like(found)
    for x in np.asarray(task["x"]):

        def logits(w, x=x):
            return tanh_network({"first": w[:6].reshape(D, 2), "second": w[6:].reshape(2, K)}, x)

        jacobian = np.asarray(jax.jacobian(logits)(theta))
        p = np.exp(logits(theta)) / np.exp(logits(theta)).sum()
        expected += jacobian.T @ (np.diag(p) - np.outer(p, p)) @ jacobian
    np.testing.assert_allclose(found, expected, atol=1e-10)
    assert np.abs(found - hessian).max() > 1e-2


def test_a_noise_that_the_network_gives_is_curved_too():
    """Fisher information of Normal(f_0, exp(f_1)): 1 / sigma^2 and 2."""

    def likelihood(f):
        return dist.Normal(f[..., 0], jnp.exp(f[..., 1]))

    theta, task = drawn(D * K + K), task_of(np.array([0.3, -1.0, 2.0, 0.1]))
    found, _ = information(program_of(likelihood), task, theta)
    expected = np.zeros_like(found)
    for x in np.asarray(task["x"]):
        jacobian = np.zeros((K, D * K + K))
        for k in range(K):
            jacobian[k, k], jacobian[k, K + k :: K] = 1, x
        scale = np.exp(jacobian[1] @ theta)
        expected += jacobian[:2].T @ np.diag([1 / scale**2, 2]) @ jacobian[:2]
    np.testing.assert_allclose(found, expected, atol=1e-9)


WEIGHT = np.array([0.5, 2.0, 0.0, 1.0])
KEPT = np.array([True, False, True, True])
WEIGHTED = {
    "scale": (lambda task: numpyro.handlers.scale(scale=task["w"]), WEIGHT),
    "mask": (lambda task: numpyro.handlers.mask(mask=task["keep"]), KEPT),
}


@pytest.mark.parametrize("how", WEIGHTED)
def test_masks_and_scales_weigh_the_likelihood_and_its_curvature(how):
    """Beside the task's own mask, which stands on padded examples."""
    (handler, factor), (likelihood, value) = WEIGHTED[how], NATURAL["Categorical"]
    task = task_of(value, w=WEIGHT, keep=KEPT)
    task = Task(task.data, {}, jnp.array([True, True, True, False]))
    theta = drawn(D * K + K)
    found, hessian = information(program_of(likelihood, handler=handler), task, theta)
    expected = np.zeros_like(hessian)
    for x, weight in zip(np.asarray(task["x"]), factor * np.asarray(task.mask), strict=True):
        # the bias comes first, as leaves are sorted by name
        wide = np.kron(np.concatenate([[1.0], x]), np.eye(K))
        p = np.exp(wide @ theta) / np.exp(wide @ theta).sum()
        expected += weight * wide.T @ (np.diag(p) - np.outer(p, p)) @ wide
    np.testing.assert_allclose(hessian, expected, atol=1e-10)
    np.testing.assert_allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize("where", ["outside", "in the event"])
def test_a_mask_of_the_distribution_itself_is_counted(where):
    """``mask`` inside or outside ``to_event``, as for labels of several kinds of which some are missing."""

    def likelihood(f):
        if where == "outside":
            return dist.Bernoulli(logits=f[..., 0]).mask(f[..., 1] > 0)
        return dist.Bernoulli(logits=f).mask(jnp.array([True, False, True])).to_event(1)

    value = np.array([0, 1, 1, 0]) if where == "outside" else NATURAL["Bernoulli"][1]
    found, hessian = information(program_of(likelihood), task_of(value), drawn(D * K + K))
    np.testing.assert_allclose(found, hessian, atol=1e-10)


def test_several_sites_add_up():
    def observe(f, task):
        out = f(task["x"])
        with numpyro.plate("examples", task["x"].shape[0]):
            numpyro.sample("kind", dist.Bernoulli(logits=out[..., 0]), obs=task["kind"])
            numpyro.sample("count", dist.Poisson(jnp.exp(out[..., 1])), obs=task["count"])
            numpyro.sample("size", dist.Normal(out[..., 2], 0.5), obs=task["size"])

    def program(tasks):
        net = weights("net", (linear, LINEAR), prior=dist.Normal(0.0, 1.0), transition=Static(), num_tasks=len(tasks))
        net.over(tasks, observe)

    rng = np.random.default_rng(2)
    data = {
        "x": rng.normal(size=(N, D)),
        "kind": np.array([0, 1, 1, 0]),
        "count": np.array([3, 0, 1, 2]),
        "size": rng.normal(size=N),
    }
    found, hessian = information(program, jax.tree.map(jnp.asarray, with_mask(Task(data))), drawn(D * K + K))
    np.testing.assert_allclose(found, hessian, atol=1e-10)


def test_a_likelihood_without_exact_information_is_never_negative():
    """StudentT by its Fisher information, Gamma by the positive part of its Hessian; outliers make both concave."""
    for likelihood, value in (
        (lambda f: dist.StudentT(3.0, f[..., 0], 0.1), np.array([9.0, -9.0, 0.0, 3.0])),
        (lambda f: dist.Gamma(jnp.exp(f[..., 0]), jnp.exp(f[..., 1])), np.array([0.01, 20.0, 1.0, 3.0])),
    ):
        found, hessian = information(program_of(likelihood), task_of(value), drawn(D * K + K))
        assert np.linalg.eigvalsh(hessian).min() < -1e-3
        assert np.linalg.eigvalsh(found).min() > -1e-9
        assert np.all(np.isfinite(found))
