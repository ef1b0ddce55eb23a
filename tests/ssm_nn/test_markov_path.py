"""The distribution of one leaf over all tasks, against formulae written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from numpyro.infer.util import log_density
from scipy import stats

from ssm_nn import InnovationReparam, MarkovPath, Moments

T, LEAF = 4, (3, 2)
LOC, SCALE = np.array([[0.5, -1.0]]), 1.5
GAIN, SHIFT, NOISE = np.array([[0.9], [0.5], [-0.3]]), 0.2, np.array([[0.3, 2.0]])
ORDER = np.array([2, 0, 1])
pytestmark = pytest.mark.usefixtures("x64")


def plain_path(permutation=None):
    return MarkovPath(jnp.array(LOC), SCALE, Moments(jnp.array(GAIN), SHIFT, jnp.array(NOISE), permutation), T, LEAF)


def step_moments(t):
    """Different numbers for each task; those of task 0 are not read."""
    return GAIN * (1 + 0.1 * t), SHIFT + t, NOISE * (1 + t), np.roll(ORDER, t)


def per_task_path():
    gain, shift, noise, order = (jnp.array(np.stack(parts)) for parts in zip(*map(step_moments, range(T)), strict=True))
    moments = Moments(gain, shift.reshape(T, 1, 1), noise, order)
    return MarkovPath(jnp.array(LOC), SCALE, moments, T, LEAF, per_task=True)


def frozen_path():
    return MarkovPath(jnp.array(LOC), SCALE, Moments(), T, LEAF, frozen=True)


# name: distribution, moments of the step into task t
PATHS = {
    "plain": (plain_path, lambda t: (GAIN, SHIFT, NOISE, np.arange(3))),
    "permuted": (lambda: plain_path(jnp.array(ORDER)), lambda t: (GAIN, SHIFT, NOISE, ORDER)),
    "per task": (per_task_path, step_moments),
    "frozen": (frozen_path, None),
}
each = pytest.mark.parametrize("name", PATHS)


def expected_log_density(name, path):
    step = PATHS[name][1]
    total = stats.norm.logpdf(path[0], LOC, SCALE).sum()
    for t in range(1, len(path)):
        gain, shift, noise, order = step(t)
        total += stats.norm.logpdf(path[t], gain * path[t - 1][order] + shift, np.sqrt(noise)).sum()
    return total


@each
def test_log_density_is_the_sum_over_the_steps(name):
    path = PATHS[name][0]()
    values = np.random.default_rng(0).normal(size=(5, *path.event_shape))
    expected = [expected_log_density(name, value) for value in values]
    np.testing.assert_allclose(path.log_prob(values), expected, rtol=1e-12)
    np.testing.assert_allclose(path.log_prob(values[0]), expected[0], rtol=1e-12)
    np.testing.assert_allclose(path.log_prob(values.reshape(5, 1, *path.event_shape))[:, 0], expected, rtol=1e-12)


@each
def test_draws_have_the_moments_of_the_process(name, key):
    path, step, number = PATHS[name][0](), PATHS[name][1], 20_000
    draws = path.sample(key, (number,))
    assert draws.shape == (number, *path.event_shape)
    assert path.sample(key).shape == path.event_shape
    assert path.sample(key, (2, 3)).shape == (2, 3, *path.event_shape)
    mean, variance = [np.broadcast_to(LOC, LEAF)], [np.full(LEAF, SCALE**2)]
    for t in range(1, path.event_shape[0]):
        gain, shift, noise, order = step(t)
        mean.append(gain * mean[-1][order] + shift)
        variance.append(gain**2 * variance[-1][order] + noise)
    mean, variance = np.stack(mean), np.stack(variance)
    np.testing.assert_allclose(path.mean, mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(path.variance, variance, rtol=1e-12)
    # five standard errors
    assert np.all(np.abs(draws.mean(0) - mean) < 5 * np.sqrt(variance / number))
    assert np.all(np.abs(draws.var(0) / variance - 1) < 5 * np.sqrt(2 / number))


def test_neighbouring_tasks_are_correlated_as_the_gain_says(key):
    draws = np.asarray(plain_path(jnp.array(ORDER)).sample(key, (20_000,)))
    before, after = draws[:, 0][:, ORDER] - LOC, draws[:, 1]
    covariance = (before * (after - after.mean(0))).mean(0)
    error = np.sqrt((SCALE**2 * after.var(0) + (GAIN * SCALE**2) ** 2) / 20_000)
    assert np.all(np.abs(covariance - GAIN * SCALE**2) < 5 * error)


@each
def test_shapes_and_support(name):
    path = PATHS[name][0]()
    assert path.batch_shape == ()
    assert path.event_shape == ((1 if name == "frozen" else T), *LEAF)
    assert path.support.event_dim == 3
    assert bool(path.support(jnp.zeros(path.event_shape)))
    assert not bool(path.support(jnp.full(path.event_shape, jnp.nan)))
    assert path.has_rsample


def test_under_vmap_and_expanded(key):
    """Over the noise, as over particles of a hyper-parameter; and over a plate outside."""
    scales, value = jnp.array([0.5, 1.0, 2.0]), jnp.array(np.random.default_rng(1).normal(size=(2, *LEAF)))

    def made(scale):
        return MarkovPath(0.0, 1.0, Moments(noise=scale**2), 2, LEAF)

    found = jax.vmap(lambda scale: made(scale).log_prob(value))(scales)
    np.testing.assert_allclose(found, [made(scale).log_prob(value) for scale in scales], rtol=1e-12)
    paths = jax.vmap(made)(scales)
    np.testing.assert_allclose(jax.vmap(lambda path: path.log_prob(value))(paths), found, rtol=1e-12)
    wide = made(0.5).expand((3,))
    assert wide.sample(key).shape == (3, 2, *LEAF)
    np.testing.assert_allclose(wide.log_prob(jnp.stack([value] * 3)), np.full(3, found[0]), rtol=1e-12)
    with numpyro.handlers.seed(rng_seed=0), numpyro.plate("chains", 3):
        assert numpyro.sample("w", made(0.5)).shape == (3, 2, *LEAF)


def test_reparametrised_gradients_reach_the_hyper_parameters(key):
    def spread(scale):
        return jnp.sum(MarkovPath(0.0, 1.0, Moments(noise=scale**2), 3, LEAF).sample(key) ** 2)

    difference = (spread(1.0 + 1e-6) - spread(1.0 - 1e-6)) / 2e-6
    np.testing.assert_allclose(jax.grad(spread)(1.0), difference, rtol=1e-5)
    assert abs(difference) > 0


def sampled(noise=0.5):
    numpyro.sample(
        "w", MarkovPath(jnp.array(LOC), SCALE, Moments(jnp.array(GAIN), SHIFT, noise, jnp.array(ORDER)), T, LEAF)
    )


def test_innovations_give_the_same_density_up_to_the_volume():
    """log p(path) = log p(innovations) - log |d path / d innovations|, a product of standard deviations."""
    innovations = jnp.array(np.random.default_rng(2).normal(size=(T, *LEAF)))
    config = {"w": InnovationReparam()}
    moved = numpyro.handlers.reparam(sampled, config=config)
    density, trace = log_density(moved, (), {}, {"w_innovations": innovations})
    path = trace["w"]["value"]
    volume = np.prod(LEAF) * (np.log(SCALE) + (T - 1) * 0.5 * np.log(0.5))
    straight, _ = log_density(sampled, (), {}, {"w": path})
    np.testing.assert_allclose(straight, density - volume, rtol=1e-10)


def test_innovations_allow_zero_noise(key):
    def still():
        sampled(jnp.array([[0.0, 0.4]]))

    moved = numpyro.handlers.reparam(still, config={"w": InnovationReparam()})
    path = np.asarray(numpyro.handlers.trace(numpyro.handlers.seed(moved, key)).get_trace()["w"]["value"])
    for t in range(1, T):
        np.testing.assert_allclose(path[t, :, 0], (GAIN * path[t - 1][ORDER] + SHIFT)[:, 0], rtol=1e-12)
        assert np.all(path[t, :, 1] != (GAIN * path[t - 1][ORDER] + SHIFT)[:, 1])


def test_innovations_are_for_latent_paths_only():
    def other():
        numpyro.sample("w", numpyro.distributions.Normal(0.0, 1.0))

    for program, message in (
        (other, "'w' is a Normal; InnovationReparam takes the sites of weights"),
        (numpyro.handlers.condition(sampled, {"w": jnp.zeros((T, *LEAF))}), "'w' is observed"),
    ):
        with pytest.raises(ValueError, match=message), numpyro.handlers.seed(rng_seed=0):
            numpyro.handlers.reparam(program, config={"w": InnovationReparam()})()
