"""The optax transformation takes the engine's steps, and the read-out finds the curvature."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssm_nn.inference.mean_field.forgetting import Gaussian, forget
from ssm_nn.inference.mean_field.rules import FirstOrder, FixedPoint, Ivon, Natural
from ssm_nn.inference.mean_field.transformation import draw, mean_field

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("rule", [FirstOrder(), FixedPoint(), Natural(), Ivon()], ids=lambda r: type(r).__name__)
def test_it_takes_the_rules_steps(rule, rng):
    """Parameters are the belief as predicted: update, then forget."""
    shapes = {"a": (3, 2), "b": (4,)}
    params = Gaussian(
        {n: jnp.asarray(rng.normal(size=s)) for n, s in shapes.items()},
        {n: jnp.asarray(rng.uniform(0.1, 1, s)) for n, s in shapes.items()},
    )
    transform = mean_field(50, rule, prior_mean=0.2, prior_sigma=1.5)
    state, found = transform.init(params), params
    expected = {n: Gaussian(params.mean[n], params.sigma[n]) for n in shapes}
    for _ in range(3):
        g, h = ({n: jnp.asarray(rng.normal(size=s)) for n, s in shapes.items()} for _ in range(2))
        grads = Gaussian(g, {n: h[n] * found.sigma[n] for n in shapes})
        updates, state = transform.update(grads, state, found)
        found = optax.apply_updates(found, updates)
        for n in shapes:
            prior = Gaussian(jnp.full(shapes[n], 0.2), jnp.full(shapes[n], 1.5))
            made = rule.update(expected[n], prior, 0.02, g[n], h[n], 1.0).belief
            expected[n] = made if isinstance(rule, FirstOrder | Ivon) else forget(made, prior, 0.02)
            np.testing.assert_allclose(found.mean[n], expected[n].mean, rtol=1e-12)
            np.testing.assert_allclose(found.sigma[n], expected[n].sigma, rtol=1e-12)


def test_it_learns_a_regression_by_draws(rng):
    """To the posterior of a model with orthogonal features."""
    x, w = np.eye(3)[rng.integers(0, 3, 600)], np.array([1.0, -2.0, 0.5])
    y = x @ w + 0.3 * rng.normal(size=600)
    params = Gaussian(jnp.zeros(3), jnp.ones(3))
    transform = mean_field(float("inf"))

    @jax.jit
    def learn(params):
        def step(params, inputs):
            x, y, key = inputs
            grads = jax.grad(lambda p: jnp.mean(jax.vmap(lambda k: (y - x @ draw(p, k)) ** 2 / 0.18)(key)))(params)
            return optax.apply_updates(params, transform.update(grads, optax.EmptyState(), params)[0]), None

        keys = jax.random.split(jax.random.key(0), (600, 20))
        return jax.lax.scan(step, params, (x, y, keys))[0]

    found = learn(params)
    precision = 1 + x.sum(0) / 0.09
    np.testing.assert_allclose(found.sigma, precision**-0.5, rtol=0.15)
    np.testing.assert_allclose(found.mean, (x.T @ y) / 0.09 / precision, atol=4 * np.max(precision**-0.5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mean_field(0.5), "steps is 0.5; a number >= 1 is accepted"),
        (lambda: mean_field(10, prior_sigma=0.0), "prior_sigma is 0.0; a number > 0 is accepted"),
        (lambda: mean_field(10, trust=-1), "trust is -1; a number > 0 is accepted"),
        (lambda: mean_field(10).init({"w": jnp.ones(2)}), "params is of type dict; Gaussian"),
        (lambda: mean_field(10).update(None, optax.EmptyState()), "params is None; the mean-field update needs"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
