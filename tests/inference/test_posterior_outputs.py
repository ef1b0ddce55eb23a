"""What comes out of the smoother: predictions, the guide, and the DataTree."""

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray
from numpyro.infer import Predictive
from numpyro.infer.util import log_density

import ssm_nn
from ssm_nn.inference import AtMean, Dense, LaplaceFilter, Linearised, LowRank, ThroughNetwork, predict
from ssm_nn.models import RandomWalk, Static

T, N, D, NOISE = 3, 7, 2, 0.5
RNG = np.random.default_rng(0)
LISTED = [
    {"x": RNG.normal(size=(n, D)).astype("float32"), "y": RNG.normal(size=n).astype("float32")} for n in (N, N - 2, N)
]


def apply(params, x):
    return x @ params["slope"] + params["offset"]


def linear_program(tasks):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    net = ssm_nn.weights(
        "net",
        (apply, {"slope": jnp.zeros(D), "offset": jnp.zeros(())}),
        prior=dist.Normal(0.2, 1.0),
        transition=ssm_nn.ByPath({"slope": RandomWalk(scale), "offset": Static()}),
        num_tasks=len(tasks),
    )

    def observe(f, task):
        with numpyro.plate("n", task["x"].shape[0]):
            numpyro.sample("y", dist.Normal(f(task["x"]), NOISE), obs=task.get("y"))

    net.over(tasks, observe)


def class_program(tasks):
    params = {"w": jnp.asarray(RNG.normal(size=(D, 4)), jnp.float32), "v": jnp.ones((4, 3))}
    net = ssm_nn.weights(
        "net",
        (lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], params),
        prior=dist.Normal(0.0, 1.0),
        transition=RandomWalk(0.2),
        num_tasks=len(tasks),
    )

    def observe(f, task):
        with numpyro.plate("n", task["x"].shape[0]):
            numpyro.sample("y", dist.Categorical(logits=f(task["x"])), obs=task.get("y"))

    net.over(tasks, observe)


@pytest.fixture(scope="module")
def linear():
    engine = LaplaceFilter(linear_program, Dense(), hypers={"scale": 0.3})
    filtered = engine.run(0, LISTED)
    return filtered, engine.smooth(filtered)


@pytest.fixture(scope="module")
def classes():
    tasks = [{"x": task["x"], "y": (np.arange(len(task["y"])) % 3).astype("int32")} for task in LISTED]
    engine = LaplaceFilter(class_program, LowRank(10))
    return tasks, engine.smooth(engine.run(0, tasks))


def design(x):
    """Rows of the outputs' Jacobian in the order of the layout: offset, slope (paths are sorted)."""
    return np.concatenate([np.ones((len(x), 1)), x], axis=1)


@pytest.mark.parametrize("which", [0, 1])
def test_linear_gaussian_predictive_moments_and_densities_are_exact(linear, which):
    posterior, task = linear[which], LISTED[0]
    belief = posterior.beliefs[0]
    covariance = np.linalg.inv(np.asarray(belief.precision.to_dense(), np.float64))
    assert [site.path for site in posterior.layout.sites] == ["offset", "slope"]
    rows = design(task["x"])
    mean, variance = rows @ np.asarray(belief.mean), np.einsum("ni,ij,nj->n", rows, covariance, rows) + NOISE**2
    made = predict(posterior, 0, task, method=Linearised(4000))["y"]
    np.testing.assert_allclose(made.mean, mean, atol=5 * np.sqrt(variance.max() / 4000))
    np.testing.assert_allclose(made.variance, variance, rtol=0.15)
    exact = -0.5 * ((task["y"] - mean) ** 2 / variance + np.log(2 * np.pi * variance))
    np.testing.assert_allclose(made.log_density, exact, atol=0.1)


def test_a_network_linear_in_its_weights_predicts_the_same_through_itself(linear):
    drawn = [predict(linear[1], 1, LISTED[0], method=m, key=3)["y"] for m in (Linearised(20), ThroughNetwork(20))]
    np.testing.assert_allclose(drawn[0].mean, drawn[1].mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(drawn[0].log_density, drawn[1].log_density, rtol=1e-3, atol=1e-4)


def test_smoothed_means_are_read_in_the_network_linearised_at_the_filtered_mean(classes):
    tasks, posterior = classes
    x = jnp.asarray(tasks[0]["x"])
    centre, mean = posterior.filtered.beliefs[0].mean, posterior.beliefs[0].mean

    def logits(theta):
        leaves = posterior.layout.leaves(theta)
        return jnp.tanh(x @ leaves["net.w"]) @ leaves["net.v"]

    value, change = jax.jvp(logits, (centre,), (mean - centre,))
    made = predict(posterior, 0, {"x": tasks[0]["x"]}, method=AtMean())["y"]
    np.testing.assert_allclose(made.probabilities, jax.nn.softmax(value + change), rtol=1e-4, atol=1e-6)
    itself = predict(posterior, 0, {"x": tasks[0]["x"]}, method=AtMean(linearised=False))["y"]
    np.testing.assert_allclose(itself.probabilities, jax.nn.softmax(logits(mean)), rtol=1e-4, atol=1e-6)
    assert made.log_density is None


def test_uncertainty_splits_into_parts_that_vanish_where_they_should(classes):
    tasks, posterior = classes
    averaged = posterior.predict(0, tasks[0])["y"]
    total = -np.sum(averaged.probabilities * np.log(averaged.probabilities), axis=1)
    np.testing.assert_allclose(averaged.aleatoric + averaged.epistemic, total, atol=1e-5)
    assert (averaged.epistemic > 0).all()
    np.testing.assert_allclose(predict(posterior, 0, tasks[0], method=AtMean())["y"].epistemic, 0, atol=1e-6)


def test_examples_are_predicted_alike_alone_and_in_many_batches(linear):
    x = np.tile(LISTED[0]["x"], (150, 1))  # more than two batches, the last one padded
    together, alone = (predict(linear[1], 0, {"x": part}, method=Linearised(5))["y"] for part in (x, x[:N]))
    np.testing.assert_allclose(together.mean[-N:], alone.mean, rtol=1e-5)
    assert together.mean.shape == (len(x),)


def test_bad_requests_are_refused(linear):
    with pytest.raises(ValueError, match="t is 3, but there are 3 tasks"):
        predict(linear[1], 3, LISTED[0])
    with pytest.raises(ValueError, match="num_samples is 0"):
        Linearised(0)
    with pytest.raises(ValueError, match="no data to predict"):
        predict(linear[1], 0, {})
    with pytest.raises(ValueError, match="holds 1 tasks, but the posterior has 3"):
        linear[1].to_datatree(tasks=LISTED[:1])


def test_guide_draws_the_smoothed_moments_and_the_right_shapes(linear):
    posterior, tasks = linear[1], ssm_nn.stack_tasks(LISTED)
    sites = Predictive(posterior.guide, num_samples=3000)(jax.random.key(0), tasks)
    assert sites["net.slope"].shape == (3000, T, D)
    assert sites["net.offset"].shape == (3000, 1)
    assert (sites["scale"] == jnp.float32(0.3)).all()
    for t, belief in enumerate(posterior.beliefs):
        drawn = np.concatenate([sites["net.offset"], sites["net.slope"][:, t]], axis=1)
        covariance = np.linalg.inv(np.asarray(belief.precision.to_dense(), np.float64))
        error = np.sqrt(np.diag(covariance) / 3000)
        assert (np.abs(drawn.mean(0) - belief.mean) < 5 * error).all()
        np.testing.assert_allclose(np.cov(drawn.T), covariance, atol=0.15 * covariance.max())
    out = Predictive(linear_program, guide=posterior.guide, params={}, num_samples=4)(
        jax.random.key(1), tasks.without("y")
    )
    assert out["y"].shape == (4, T, N)


def test_datatree_holds_the_groups_with_dims_and_survives_netcdf(linear, tmp_path):
    tree = linear[1].to_datatree(num_samples=30, tasks=LISTED)
    assert tree["posterior"]["net.slope"].dims == ("chain", "draw", "task", "net.slope_axis_0")
    assert tree["posterior"]["net.offset"].dims == ("chain", "draw")
    assert tree["prior"]["net.slope"].shape == (1, 30, T, D)
    assert tree["log_likelihood"]["y"].dims == ("chain", "draw", "task", "example")
    assert np.isnan(tree["log_likelihood"]["y"].values[0, :, 1, -2:]).all()  # masked
    np.testing.assert_array_equal(tree["observed_data"]["y"].values[0], LISTED[0]["y"])
    assert tree["constant_data"]["x"].dims == ("task", "example", "x_axis_0")
    np.testing.assert_allclose(tree["smoothed"]["net.slope.mean"].values[1], linear[1].means[1][1:], rtol=1e-6)
    assert tree["filter_stats"]["log_evidence"].dims == ("task",)
    tree.to_netcdf(tmp_path / "posterior.nc")
    with xarray.open_datatree(tmp_path / "posterior.nc") as again:
        xarray.testing.assert_identical(again["posterior"]["net.slope"].load(), tree["posterior"]["net.slope"])
    assert len(az.summary(tree, var_names=["net.slope"], kind="stats")) == T * D


def test_only_the_draws_that_are_asked_for_are_kept(linear):
    tree = linear[1].to_datatree(num_samples=3, tasks=LISTED, keep=["net.sl*"])
    assert list(tree["posterior"].data_vars) == list(tree["prior"].data_vars) == ["net.slope"]
    assert "net.offset.mean" in tree["smoothed"].data_vars
    with pytest.raises(ValueError, match=r"fits none of net\.offset, net\.slope"):
        linear[1].to_datatree(num_samples=3, keep=["head.*"])


def test_joint_and_smoother_densities_of_the_draws_are_numpyros(linear):
    posterior, stack = linear[1], ssm_nn.stack_tasks(LISTED)
    tree = posterior.to_datatree(num_samples=3, tasks=LISTED)
    for draw in range(3):
        sites = {name: jnp.asarray(tree["posterior"][name].values[0, draw]) for name in ("net.slope", "net.offset")}
        sites["net.offset"] = sites["net.offset"][None]
        given = numpyro.handlers.condition(linear_program, {"scale": posterior.hypers["scale"]})
        joint, _ = log_density(given, (stack,), {}, sites)
        own = dist.HalfNormal(1.0).log_prob(posterior.hypers["scale"])
        np.testing.assert_allclose(tree["sample_stats"]["lp"].values[0, draw], joint - own, rtol=1e-4)
    # the smoother is exact here, so that lp - log_q is the log marginal likelihood for every draw
    gap = (tree["sample_stats"]["lp"] - tree["sample_stats"]["log_q"]).values
    np.testing.assert_allclose(gap, posterior.filtered.log_evidence, atol=5e-3)
