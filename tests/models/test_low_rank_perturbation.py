"""The perturbation as a kernel of a program: its moments, its sites, and NUTS on a tiny one."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS

import ssm_nn
from ssm_nn.extraction import extract
from ssm_nn.models.low_rank_perturbation import LowRankPerturbation
from ssm_nn.models.multi_head import multi_head
from ssm_nn.models.networks import mlp
from ssm_nn.tasks import stack_tasks


def program_of(kernel, network, own=None):
    def program(tasks):
        prior = dist.Normal(0.0, 1.0)
        net = kernel.weights("net", network, own=own, prior=prior, num_tasks=len(tasks))

        def observe(f, task):
            with numpyro.plate("n", task["x"].shape[0]):
                numpyro.sample("y", dist.Normal(f(task["x"])[:, 0], 0.1), obs=task.get("y"))

        net.over(tasks, observe)

    return program


def test_moments_are_those_of_the_products(x64, rng):
    """By expectations of products of independent factors, written out entry by entry."""
    w, tau, sigma, k = rng.normal(size=(3, 2)), 0.3, 0.7, 2
    moments = LowRankPerturbation(k, tau, sigma).moments(jnp.asarray(w))
    expected = np.zeros((6, 6))
    for a in range(6):
        for b in range(6):
            (i, j), (m, n) = divmod(a, 2), divmod(b, 2)
            scales = (1 + tau**2 * (i == m)) * (1 + tau**2 * (j == n)) - 1
            expected[a, b] = w[i, j] * w[m, n] * scales + k * sigma**4 * (a == b)
    np.testing.assert_allclose(moments.dense(), expected, atol=1e-12)
    np.testing.assert_array_equal(moments.mean, w.ravel())


def test_draws_of_the_program_have_the_moments(rng):
    kernel, network = LowRankPerturbation(1, 0.2, 0.6), mlp((2, 2), "relu")
    tasks = stack_tasks([{"x": np.zeros((1, 2), np.float32)}] * 2000)

    def trace(key):
        return numpyro.handlers.trace(numpyro.handlers.seed(program_of(kernel, network), key)).get_trace(tasks)

    sites = {name: np.asarray(site["value"]) for name, site in trace(jax.random.key(0)).items()}
    base = sites["net.base.layers.0.kernel"][0]
    s, r = sites["net.inputs.layers.0.kernel"], sites["net.outputs.layers.0.kernel"]
    v, u = sites["net.left.layers.0.kernel"], sites["net.right.layers.0.kernel"]
    drawn = (s[:, :, None] * base * r[:, None] + v @ u).reshape(2000, 4)
    moments = kernel.moments(jnp.asarray(base))
    np.testing.assert_allclose(drawn.mean(0), moments.mean, atol=0.05)
    np.testing.assert_allclose(np.cov(drawn.T), moments.dense(), atol=0.05)


@pytest.mark.slow
def test_nuts_finds_tasks_that_are_scaled_copies(rng):
    """One input, one output: y = s r w x, whose posterior mean is the least-squares slope of each task."""
    slopes, x = np.array([0.6, 1.0, 1.5]), np.linspace(-1, 1, 9)[:, None].astype(np.float32)
    tasks = [{"x": x, "y": (a * x[:, 0]).astype(np.float32)} for a in slopes]
    network = (lambda p, x: x @ p["kernel"], {"kernel": jnp.ones((1, 1))})
    chain = MCMC(
        NUTS(program_of(LowRankPerturbation(0, 0.5), network)), num_warmup=300, num_samples=300, progress_bar=False
    )
    chain.run(jax.random.key(1), stack_tasks(tasks))
    found = chain.get_samples()
    base = found["net.base.kernel"][:, :, 0, 0]
    product = base * found["net.inputs.kernel"][:, :, 0] * found["net.outputs.kernel"][:, :, 0]
    np.testing.assert_allclose(product.mean(0), slopes, atol=0.06)


def test_bad_kernels_are_named():
    network, prior = mlp((2, 3, 2), "relu"), dist.Normal(0.0, 1.0)
    for kernel, own, words in [
        (LowRankPerturbation(-1), None, "rank is -1"),
        (LowRankPerturbation(1), "*kernel", "no kernel to share"),
        (LowRankPerturbation(1), "head.*", "no weights match"),
    ]:
        with pytest.raises(ValueError, match=words):
            kernel.weights("net", network, own=own, prior=prior, num_tasks=2)


def test_a_multi_head_program_shares_kernels_and_draws_the_rest_anew(rng):
    program = multi_head(mlp((4, 3, 2), "relu"), "layers.1.*", prior_scale=0.5)
    task = ssm_nn.Task({"x": rng.normal(size=(5, 4)).astype(np.float32), "y": np.zeros(5, np.int32)})
    space = extract(program, task)
    for site in space.layout.sites:
        gain = np.unique(np.asarray(space.moments.gain)[site.start : site.stop])
        assert gain.tolist() == [1.0 if site.path == "layers.0.kernel" else 0.0]
    np.testing.assert_allclose(space.prior_variance, 0.25)


def test_classes_that_a_task_has_not_get_no_probability(rng):
    program = multi_head(mlp((4, 3, 3), "relu"), "layers.1.*")
    task = ssm_nn.Task(
        {"x": np.ones((1, 4), np.float32), "y": np.ones(1, np.int32)}, {"classes": np.array([1, 1, 0], bool)}
    )
    space = extract(program, task)
    (site,) = space.observed(space.initial, task).values()
    probabilities = jax.nn.softmax(site.distribution.logits)
    assert probabilities[0, 2] == 0
    assert np.isfinite(np.asarray(site.log_likelihood())).all()


@pytest.mark.parametrize(
    ("head", "scale", "words"),
    [
        ("head", 1.0, "head"),
        ("*kernel", 1.0, "no kernel"),
        ("*1*", 0.0, "prior_scale"),
        ("*1*", "1", "prior_scale"),
        (None, 1.0, "head is None"),
    ],
)
def test_bad_programs_are_named(head, scale, words):
    with pytest.raises(ValueError, match=words):
        multi_head(mlp((4, 3, 2), "relu"), head, scale)
