"""Expected gradients and curvatures: both estimators against expectations found by quadrature or by plain draws."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx

from ssm_nn import Task, extract, weights
from ssm_nn.inference.batches import with_mask
from ssm_nn.inference.mean_field import gradients
from ssm_nn.inference.mean_field.gradients import (
    LocalReparameterisation,
    WeightSampling,
    drawn_as_outputs,
    layers_of,
)
from ssm_nn.models.networks import cnn, mlp
from ssm_nn.models.transitions import Static

pytestmark = pytest.mark.usefixtures("x64")
BOTH = pytest.mark.parametrize("estimator", [WeightSampling, LocalReparameterisation])


def program_of(network, classes=True):
    def program(tasks):
        net = weights("net", network, prior=dist.Normal(0.0, 1.0), transition=Static(), num_tasks=len(tasks))

        def observe(f, task):
            with numpyro.plate("examples", task["x"].shape[0]):
                out = f(task["x"])
                kind = dist.Categorical(logits=out) if classes else dist.Normal(out[:, 0], 0.5)
                numpyro.sample("y", kind, obs=task["y"])

        net.over(tasks, observe)

    return program


def setting(network, shape, classes=True, size=3, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, size) if classes else rng.normal(size=size)
    task = with_mask(Task({"x": jnp.asarray(rng.normal(size=(size, *shape))), "y": jnp.asarray(y)}))
    space = extract(program_of(network, classes), task)
    mean = space.layout.arrays(jnp.asarray(rng.normal(size=space.layout.size)) / 2)
    sigma = space.layout.arrays(jnp.asarray(rng.uniform(0.1, 0.6, space.layout.size)))
    return space, mean, sigma, task


def gathered(estimator, space, mean, sigma, task, key=0):
    return jax.jit(lambda *inputs: estimator.gather(space, *inputs))(mean, sigma, task, jax.random.key(key))


def averaged(estimator, space, mean, sigma, task, repeats):
    """Mean of g and H over many keys, packed, and their standard errors."""

    def one(key):
        found = estimator.gather(space, mean, sigma, task, key)
        return space.layout.packed(found.gradient), space.layout.packed(found.curvature)

    keys = jax.random.split(jax.random.key(1), repeats)
    draws = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=512))(keys)
    return [(np.mean(d, 0), np.std(d, 0) / np.sqrt(repeats)) for d in draws]


@BOTH
@pytest.mark.filterwarnings("ignore:no layer was found")
def test_they_are_exact_by_quadrature_for_a_logistic_weight(estimator):
    """One weight, one input: E[grad] and E[Hessian] by Gauss-Hermite."""

    def apply(params, x):
        return jnp.stack([x @ params["w"], jnp.zeros(len(x))], -1)

    space, mean, sigma, task = setting((apply, {"w": jnp.zeros(1)}), (1,), size=4)
    task = with_mask(Task({"x": task["x"], "y": task["y"] % 2}))
    nodes, weight = np.polynomial.hermite_e.hermegauss(40)
    weight = weight / weight.sum()
    w = mean["net"]["w"][0] + sigma["net"]["w"][0] * nodes
    x, y = np.asarray(task["x"])[:, 0], np.asarray(task["y"])
    p = 1 / (1 + np.exp(-np.outer(x, w)))  # of class 0
    g = weight @ ((p - (y == 0)[:, None]) * x[:, None]).sum(0)
    h = weight @ (p * (1 - p) * x[:, None] ** 2).sum(0)
    (found_g, error_g), (found_h, error_h) = averaged(estimator(2), space, mean, sigma, task, 20_000)
    np.testing.assert_allclose(found_g, g, atol=5 * error_g[0])
    np.testing.assert_allclose(found_h, h, atol=5 * error_h[0])
    assert error_h[0] < 0.02 * h


def test_local_draws_have_the_expectations_of_drawn_weights():
    """A network with biases, tanh, three classes: against draws of whole networks written out here."""
    space, mean, sigma, task = setting(mlp((2, 3, 3)), (2,), size=2)
    flat_mean, flat_sigma = space.layout.packed(mean), space.layout.packed(sigma)

    def plain(e):
        gradient = jax.grad(lambda w: -space.log_likelihood(w, task))
        up, down = gradient(flat_mean + flat_sigma * e), gradient(flat_mean - flat_sigma * e)
        return (up + down) / 2, e * (up - down) / 2 / flat_sigma

    noise = jax.random.normal(jax.random.key(7), (20_000, len(flat_mean)))
    reference = [
        (np.mean(d, 0), np.std(d, 0) / 20_000**0.5)
        for d in jax.jit(lambda e: jax.lax.map(plain, e, batch_size=256))(noise)
    ]
    found = averaged(LocalReparameterisation(4), space, mean, sigma, task, 4_000)
    for (mine, my_error), (expected, error) in zip(found, reference, strict=True):
        z = (mine - expected) / np.hypot(my_error, error)
        assert np.max(np.abs(z)) < 5
        assert 0.6 < np.std(z) < 1.5  # and no bias hides in wide errors
        assert np.max(error) < 0.1 * np.max(np.abs(expected))


def test_weights_that_an_example_meets_twice_are_drawn_as_weights():
    """f = w x_1 + w x_2, as a convolution does it: the variance of f is v (x_1 + x_2)^2, not v (x_1^2 + x_2^2)."""

    def apply(params, x):
        return jnp.sum(x[..., None] @ params["w"], axis=-2)

    space, mean, sigma, task = setting((apply, {"w": jnp.zeros((1, 1))}), (2,), classes=False)
    (layer,) = layers_of(space, mean, task)
    assert layer.positions == 2
    assert drawn_as_outputs(layer) is None
    x, y, m, s = (np.asarray(a) for a in (task["x"], task["y"], mean["net"]["w"], sigma["net"]["w"]))
    with pytest.warns(UserWarning, match=r"net\.w meet an example in several positions.*their weights are drawn"):
        found = gathered(LocalReparameterisation(2000), space, mean, sigma, task)
    total = x.sum(1)
    expected = (total * (m[0, 0] * total - y)).sum() / 0.25, (total**2).sum() / 0.25
    np.testing.assert_allclose(found.gradient["net"]["w"], expected[0], rtol=1e-9)
    np.testing.assert_allclose(found.curvature["net"]["w"], expected[1], rtol=0.15)
    energy = (((m[0, 0] * total - y) ** 2 + s[0, 0] ** 2 * total**2) / 0.5 + 0.5 * np.log(2 * np.pi * 0.25)).sum()
    np.testing.assert_allclose(found.outcome.free_energy, energy, rtol=0.05)


class Flax(nnx.Module):
    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x)))


class Equinox(eqx.Module):
    first: eqx.nn.Linear
    last: eqx.nn.Linear

    def __init__(self, key):
        self.first, self.last = eqx.nn.Linear(4, 5, key=key), eqx.nn.Linear(5, 3, key=key)

    def __call__(self, x):
        return jax.vmap(lambda one: self.last(jax.nn.relu(self.first(one))))(x)


@pytest.mark.filterwarnings("ignore:.*several positions")
@pytest.mark.parametrize(
    ("make", "shape", "local", "kept"),
    [
        pytest.param(lambda: mlp((4, 5, 3)), (4,), 2, 0, marks=pytest.mark.slow),
        pytest.param(lambda: Flax(nnx.Rngs(0)), (4,), 2, 0, marks=pytest.mark.slow),
        (lambda: Equinox(jax.random.key(0)), (4,), 2, 0),
        (lambda: cnn((5, 5), (2,), num_outputs=3, normaliser=None), (5, 5), 1, 1),
    ],
    ids=["ours", "flax", "equinox", "convolutions"],
)
def test_layers_of_any_library_are_found(make, shape, local, kept):
    space, mean, sigma, task = setting(make(), shape)
    layers = layers_of(space, mean, task)
    assert [drawn_as_outputs(layer) is not None for layer in layers].count(True) == local
    assert len(layers) - local == kept
    found = gathered(LocalReparameterisation(2), space, mean, sigma, task)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(found[:2]))
    assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(found.gradient))


def test_tied_weights_are_drawn_as_weights_and_it_is_said():
    def apply(params, x):
        return jnp.tanh(x @ params["w"]) @ params["w"]

    space, mean, sigma, task = setting((apply, {"w": jnp.zeros((3, 3))}), (3,))
    with pytest.warns(UserWarning, match=r"the weights net\.w are used 2 times.*the weights of all layers are drawn"):
        found = gathered(LocalReparameterisation(6), space, mean, sigma, task)
    same = gathered(WeightSampling(6), space, mean, sigma, task)
    np.testing.assert_allclose(found.gradient["net"]["w"], same.gradient["net"]["w"], rtol=1e-12)


def test_a_program_without_layers_is_drawn_as_weights_and_it_is_said():
    space, mean, sigma, task = setting((lambda p, x: jnp.sin(x * p["w"]), {"w": jnp.zeros(3)}), (3,))
    with pytest.warns(UserWarning, match="no layer was found in the likelihood: all weights are drawn"):
        found = gathered(LocalReparameterisation(6), space, mean, sigma, task)
    same = gathered(WeightSampling(6), space, mean, sigma, task)
    np.testing.assert_allclose(found.gradient["net"]["w"], same.gradient["net"]["w"], rtol=1e-12)


@BOTH
def test_antithetic_pairs_take_the_odd_noise_out(estimator):
    """Of a quadratic loss the gradient is exact with one pair."""
    space, mean, sigma, task = setting((lambda p, x: x @ p["w"], {"w": jnp.zeros((4, 1))}), (4,), classes=False)
    x, y = np.asarray(task["x"]), np.asarray(task["y"])
    exact = x.T @ (x @ np.asarray(mean["net"]["w"])[:, 0] - y) / 0.25
    paired = gathered(estimator(2), space, mean, sigma, task)
    np.testing.assert_allclose(paired.gradient["net"]["w"][:, 0], exact, rtol=1e-10)
    single = gathered(estimator(2, antithetic=False), space, mean, sigma, task)
    assert not np.allclose(single.gradient["net"]["w"][:, 0], exact, rtol=1e-2)


def test_draws_in_chunks_are_the_same_draws(monkeypatch):
    space, mean, sigma, task = setting(mlp((4, 5, 3)), (4,))
    whole = gathered(WeightSampling(12), space, mean, sigma, task, 3)
    monkeypatch.setattr(gradients, "_DRAWN_NUMBERS", 4 * 2 * space.layout.size)  # four pairs of six: three at a time
    parts = gathered(WeightSampling(12), space, mean, sigma, task, 3)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-14)


def test_an_input_of_zeros_leaves_finite_gradients():
    space, mean, sigma, task = setting(mlp((4, 5, 3), "relu"), (4,))
    mean["net"]["layers.0.bias"] = jnp.full(5, -50.0)  # no unit is ever awake
    task = with_mask(Task({"x": jnp.zeros_like(task["x"]), "y": task["y"]}))
    found = gathered(LocalReparameterisation(4), space, mean, sigma, task)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(found))
    np.testing.assert_array_equal(found.curvature["net"]["layers.1.kernel"], 0)


@BOTH
def test_masked_examples_do_not_count(estimator):
    """In expectation, for outputs are drawn by example: here the draws themselves are compared where they are shared."""
    space, mean, sigma, task = setting((lambda p, x: x @ p["w"], {"w": jnp.zeros((4, 1))}), (4,), classes=False)
    half = Task({"x": task["x"], "y": task["y"]}, mask=jnp.array([True, False, True]))
    x, y = np.asarray(task["x"])[[0, 2]], np.asarray(task["y"])[[0, 2]]
    exact = x.T @ (x @ np.asarray(mean["net"]["w"])[:, 0] - y) / 0.25
    found = gathered(estimator(2), space, mean, sigma, half)
    np.testing.assert_allclose(found.gradient["net"]["w"][:, 0], exact, rtol=1e-10)
    assert int(found.outcome.counted) == 2


def test_what_the_draws_predict():
    """Accuracy, mutual information and log predictive density of a batch, from draws made here."""
    space, mean, sigma, task = setting(mlp((4, 3)), (4,), size=40)
    outcome = gathered(WeightSampling(4000), space, mean, sigma, task).outcome
    rng = np.random.default_rng(5)
    m, s = (np.asarray(space.layout.packed(tree)) for tree in (mean, sigma))
    sites = {site.path: slice(site.start, site.stop) for site in space.layout.sites}
    w = m + s * rng.normal(size=(4000, len(m)))
    kernel, bias = w[:, sites["layers.0.kernel"]].reshape(-1, 4, 3), w[:, sites["layers.0.bias"]]
    logits = np.asarray(task["x"]) @ kernel + bias[:, None]
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    y, mixture = np.asarray(task["y"]), p.mean(0)
    picked = p[:, np.arange(40), y]
    information = -(mixture * np.log(mixture)).sum(-1) + (p * np.log(p)).sum(-1).mean(0)
    assert float(outcome.log_predictive) == pytest.approx(np.log(picked.mean(0)).sum(), rel=0.02)
    assert float(outcome.free_energy) == pytest.approx(-np.log(picked).mean(0).sum(), rel=0.02)
    assert float(outcome.epistemic) == pytest.approx(information.sum(), rel=0.05)
    assert abs(float(outcome.correct) - (mixture.argmax(-1) == y).sum()) <= 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightSampling(0), "draws is 0; a whole number >= 1 is accepted"),
        (lambda: LocalReparameterisation(-2), "draws is -2; a whole number >= 1 is accepted"),
        (lambda: LocalReparameterisation(2.0), "draws is 2.0; a whole number >= 1 is accepted"),
        (lambda: WeightSampling(5), "draws is 5; antithetic pairs need an even number"),
    ],
)
def test_numbers_of_draws_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
