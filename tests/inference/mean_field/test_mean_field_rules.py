"""Forgetting and update rules against the recursions of the papers, written in NumPy in the papers' own symbols."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_nn.inference.mean_field.forgetting import Gaussian, Window, forget, forgetting_moments
from ssm_nn.inference.mean_field.rules import FirstOrder, FixedPoint, Ivon, Natural, sigma_factor

pytestmark = pytest.mark.usefixtures("x64")
RULES = [FirstOrder(), FixedPoint(), Natural(), Ivon()]
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
INF = float("inf")


def beliefs(rng, size=50):
    prior = Gaussian(rng.normal(size=size), rng.uniform(0.5, 2, size))
    return Gaussian(rng.normal(size=size), prior.sigma * rng.uniform(0.05, 1.5, size)), prior


@partial(jax.jit, static_argnums=(0, 6))
def step(rule, belief, prior, rho, g, h, trust=INF):
    return rule.update(rule.predict(belief, prior, rho), prior, rho, g, h, trust)


@partial(jax.jit, static_argnums=0)
def after(rule, belief, prior, rho, h, count):
    """The belief after ``count`` steps of curvature h."""
    return jax.lax.fori_loop(0, count, lambda _, b: step(rule, b, prior, rho, 0.0 * b.mean, h).belief, belief)


def test_forgetting_is_the_geometric_mean_with_the_prior(rng):
    belief, prior = beliefs(rng)
    for rho in (0.0, 1e-6, 0.3, 1.0):
        found = forget(belief, prior, jnp.asarray(rho))
        precision = (1 - rho) / belief.sigma**2 + rho / prior.sigma**2
        mean = ((1 - rho) * belief.mean / belief.sigma**2 + rho * prior.mean / prior.sigma**2) / precision
        np.testing.assert_allclose(found.sigma, precision**-0.5, rtol=1e-13)
        np.testing.assert_allclose(found.mean, mean, rtol=1e-11, atol=1e-13)
    for rho in (0.0, 0.2):
        same = forget(prior, prior, jnp.asarray(rho))
        np.testing.assert_array_equal(same.mean, prior.mean)
        np.testing.assert_array_equal(same.sigma, prior.sigma)


def test_forgetting_is_a_kernel_whose_smoother_gain_is_constant(rng):
    belief, prior = beliefs(rng)
    for rho in (0.01, 0.6):
        moments, later = forgetting_moments(belief, prior, rho), forget(belief, prior, rho)
        v = belief.sigma**2
        np.testing.assert_allclose(moments.gain * belief.mean + moments.shift, later.mean, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(moments.gain**2 * v + moments.noise, later.sigma**2, rtol=1e-12)
        np.testing.assert_allclose(v * moments.gain / later.sigma**2, 1 - rho, rtol=1e-12)
        assert np.all(moments.noise > 0)


@each_rule
def test_without_data_sigma_relaxes_to_the_prior_by_the_logistic_law(rule):
    window, sigma0, prior_sigma = 2000, 0.1, 1.5
    belief, prior = (
        Gaussian(jnp.asarray(0.8), jnp.asarray(sigma0)),
        Gaussian(jnp.asarray(0.0), jnp.asarray(prior_sigma)),
    )
    half = round(window * np.log(prior_sigma**2 / sigma0**2))  # when a well-learnt mean has gone half the way
    for t in (window // 2, half):
        found = after(rule, belief, prior, 1 / window, 0.0, t)
        expected = prior_sigma**2 / (1 + (prior_sigma**2 / sigma0**2 - 1) * np.exp(-t / window))
        assert float(found.sigma) ** 2 == pytest.approx(expected, rel=5e-3)
        assert float(found.mean) == pytest.approx(0.8 * np.exp(-t / window) * expected / sigma0**2, rel=5e-3)
    assert float(found.mean) == pytest.approx(0.4, rel=0.02)


@each_rule
def test_sigma_settles_where_the_window_holds_its_information_and_means_take_newton_steps(rule, rng):
    window, h, prior_sigma = 200, rng.uniform(0.01, 3, 20), rng.uniform(0.5, 2, 20)
    prior = Gaussian(jnp.zeros(20), jnp.asarray(prior_sigma))
    settled = 1 / (window * h + 1 / prior_sigma**2)
    # from near by: first order is stable where sigma^2 H is small
    belief = after(rule, Gaussian(jnp.zeros(20), jnp.sqrt(1.3 * settled)), prior, 1 / window, h, 12 * window)
    # the fixed-point form is exact to first order in 1 / window
    np.testing.assert_allclose(belief.sigma**2, settled, rtol=1.5 / window if isinstance(rule, FixedPoint) else 1e-4)
    g = rng.normal(size=20)
    moved = step(rule, belief, prior, 1 / window, g, h).belief.mean - belief.mean
    np.testing.assert_allclose(moved, -settled * g, rtol=2.5 / window)


def test_an_infinite_window_adds_the_information_of_all_examples():
    """1 / (n sigma^2) tends to H."""
    belief = prior = Gaussian(jnp.zeros(2), jnp.ones(2))
    h = np.array([0.3, 2.0])
    belief = after(Natural(), belief, prior, 0.0, h, 3000)
    np.testing.assert_allclose(1 / belief.sigma**2, 1 + 3000 * h, rtol=1e-10)


def test_the_rules_agree_to_first_order(rng):
    """Half the information and half the rate: a quarter of the difference."""
    belief, prior = beliefs(rng)
    g, h = rng.normal(size=50), rng.uniform(0, 1, 50)

    def spread(scale):
        made = [step(rule, belief, prior, 0.02 * scale, g * scale, h * scale).belief for rule in RULES]
        return [np.std([getattr(m, name) for m in made], axis=0) for name in ("mean", "sigma")]

    for large, small in zip(spread(1e-3), spread(5e-4), strict=True):
        np.testing.assert_allclose(np.median(small / large), 0.25, rtol=0.02)


def test_first_order_is_the_published_rule(rng):
    (mu, s), (mu_p, s_p) = beliefs(rng)
    n, c_mu, c_sigma = 300, rng.normal(size=50), 0.1 * rng.normal(size=50)
    d_mu = -(s**2) * c_mu + s**2 * (mu_p - mu) / (n * s_p**2)
    d_sigma = -(s**2) / 2 * c_sigma + s * (s_p**2 - s**2) / (2 * n * s_p**2)
    found = step(FirstOrder(), Gaussian(mu, s), Gaussian(mu_p, s_p), 1 / n, c_mu, c_sigma / s).belief
    np.testing.assert_allclose(found.mean, mu + d_mu, rtol=1e-12)
    np.testing.assert_allclose(found.sigma, s + d_sigma, rtol=1e-12)


def test_the_fixed_point_with_an_infinite_window_is_bgd_and_diagonal_foo_vb(rng):
    """Zeno et al., algorithm 1 with learning rate 1: E1 = E[dL/dtheta], E2 = E[dL/dtheta e]; FOO-VB's closed form with a
    diagonal covariance (arXiv 2010.00373) is the same."""
    (mu, s), prior = beliefs(rng)
    e1, e2 = rng.normal(size=50), rng.normal(size=50)
    found = step(FixedPoint(), Gaussian(mu, s), prior, 0.0, e1, e2 / s).belief
    np.testing.assert_allclose(found.mean, mu - s**2 * e1, rtol=1e-12)
    np.testing.assert_allclose(found.sigma, s * np.sqrt(1 + (s * e2 / 2) ** 2) - s**2 * e2 / 2, rtol=1e-9)


def test_ivon_is_ivon(rng):
    """Shen et al. 2024, algorithm 1 without momentum: ess = N B, beta2 = 1 - 1/N, learning rate 1/N, weight decay delta."""
    steps, batch, prior_sigma, size = 40, 8, 1.3, 50
    ess, delta = steps * batch, 1 / (steps * batch * prior_sigma**2)
    m, h = rng.normal(size=size), rng.uniform(0.01, 1, size)
    g_hat, h_hat = rng.normal(size=size), rng.normal(size=size)  # means over the batch
    belief = Gaussian(m, (ess * (h + delta)) ** -0.5)
    prior = Gaussian(np.zeros(size), np.full(size, prior_sigma))
    beta2 = 1 - 1 / steps
    new_h = beta2 * h + (1 - beta2) * h_hat + (1 - beta2) ** 2 * (h - h_hat) ** 2 / (2 * (h + delta))
    new_m = m - (g_hat + delta * m) / (new_h + delta) / steps
    found = step(Ivon(), belief, prior, 1 / steps, batch * g_hat, batch * h_hat).belief
    np.testing.assert_allclose(found.sigma, (ess * (new_h + delta)) ** -0.5, rtol=1e-10)
    np.testing.assert_allclose(found.mean, new_m, rtol=1e-10, atol=1e-12)


def test_the_natural_rule_is_conjugate_bayes_behind_the_forgetting(rng):
    belief, prior = beliefs(rng)
    h, y = rng.uniform(0.1, 2, 50), rng.normal(size=50)  # y = w + N(0, 1/h)
    predicted = forget(belief, prior, 0.1)
    found = step(Natural(), belief, prior, 0.1, h * (predicted.mean - y), h).belief
    precision = 1 / predicted.sigma**2 + h
    np.testing.assert_allclose(1 / found.sigma**2, precision, rtol=1e-12)
    np.testing.assert_allclose(found.mean, (predicted.mean / predicted.sigma**2 + h * y) / precision, rtol=1e-10)


def test_the_drift_of_log_sigma_under_noise_about_zero():
    """0 for the fixed point, -h^2 / 2 for first order: noise alone makes the published rule surer."""
    belief = prior = Gaussian(jnp.ones(2), jnp.full(2, 0.7))
    h = 0.05
    curvature = 2 * np.array([h, -h]) / 0.7**2
    for rule, drift in ((FixedPoint(), 0.0), (FirstOrder(), -(h**2) / 2)):
        found = step(rule, belief, prior, 0.0, 0.0, curvature).belief.sigma
        assert np.mean(np.log(found / 0.7)) == pytest.approx(drift, abs=h**4)


def test_the_factor_of_sigma_does_not_cancel():
    h = jnp.array([0.0, 1e-9, -1e-9, 3.0, -3.0, 1e6, -1e6, 1e12], jnp.float32)
    exact = np.exp(-np.arcsinh(np.asarray(h, np.float64)))
    np.testing.assert_allclose(sigma_factor(h), exact, rtol=3e-7)


@each_rule
@pytest.mark.parametrize("trust", [0.5, 1.0, 1.9])
def test_the_trust_region_holds_whatever_comes(rule, trust, rng):
    belief, prior = beliefs(rng, 400)
    g, h = 1e3 * rng.standard_cauchy(400), 1e3 * rng.standard_cauchy(400)
    found = step(rule, belief, prior, 0.0, g, h, trust)
    assert np.all(np.abs(found.belief.mean - belief.mean) <= trust * belief.sigma * (1 + 1e-12) * (1 + trust))
    change = np.abs(found.belief.sigma / belief.sigma - 1)
    assert np.all(change <= trust / 2 * (1 + 1e-9))
    assert np.all(found.belief.sigma > 0)
    assert 0.9 < np.mean(found.clipped) <= 1


@pytest.mark.parametrize("examples", [0.0, -3.0, float("nan")])
def test_a_window_of_no_length_is_refused(examples):
    with pytest.raises(ValueError, match=r"the window is .* examples; a number > 0 is accepted, inf for no forgetting"):
        Window(examples)
