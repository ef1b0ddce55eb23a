"""Every engine's posterior is a DataTree of the same groups, dimensions and names, on which ArviZ works as it stands."""

import tracemalloc

import arviz as az
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import xarray
from scipy.stats import multivariate_normal

import ssm_nn
from ssm_nn.inference import (
    Dense,
    Diagonal,
    LaplaceFilter,
    Minibatch,
    marginals_of,
    to_datatree,
    without_masked,
    write_datatree,
)
from ssm_nn.inference.last_layer import Gaussian, LastLayerFilter, feature_head, head_datatree
from ssm_nn.inference.mean_field import AtPrior, MeanFieldFilter, WeightSampling, filter_path, posterior_of, smooth_path
from ssm_nn.inference.perturbation import PerturbationFilter
from ssm_nn.inference.perturbation import posterior as perturbation_posterior
from ssm_nn.inference.perturbation import posterior_of as perturbed_posterior
from ssm_nn.models import RandomWalk, Static
from ssm_nn.models.multi_head import multi_head
from ssm_nn.models.networks import mlp

D, NOISE, SIZES, DRAWS = 2, 0.5, (9, 6, 9), 60
RNG = np.random.default_rng(0)
BATCHES = [{"x": RNG.normal(size=(n, D)).astype("float32"), "y": RNG.normal(size=n).astype("float32")} for n in SIZES]
LABELLED = [
    ssm_nn.Task(
        {"x": RNG.normal(size=(24, 4)).astype("float32"), "y": RNG.integers(0, 3, 24).astype("int32")},
        {"task": np.int32(t)},
    )
    for t in range(2)
]
COMMON = {"posterior", "posterior_predictive", "log_likelihood", "sample_stats", "prior", "prior_predictive"}
COMMON |= {"observed_data", "constant_data", "filter_stats"}
# few examples and draws: ArviZ may doubt its estimates, which is not at stake here
DOUBTS = pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto distribution")


def linear(tasks):
    net = ssm_nn.weights(
        "net",
        (lambda p, x: x @ p["slope"] + p["offset"], {"slope": jnp.zeros(D), "offset": jnp.zeros(())}),
        prior=dist.Normal(0.0, 1.0),
        transition=ssm_nn.ByPath({"slope": RandomWalk(0.3)}, otherwise=Static()),
        num_tasks=len(tasks),
    )

    def observe(f, task):
        with numpyro.plate("n", task["x"].shape[0]):
            numpyro.sample("y", dist.Normal(f(task["x"]), NOISE), obs=task.get("y"))

    net.over(tasks, observe)


@pytest.fixture(scope="module")
def filtered():
    return LaplaceFilter(linear, Dense()).run(0, BATCHES)


@pytest.fixture(scope="module")
def perturbed():
    """The posterior of two tasks, its engine, state and infos."""
    engine = PerturbationFilter(
        multi_head(mlp((4, 3, 3)), "layers.1.*"), minibatch=Minibatch(optax.adam(1e-2), epochs=2, batch_size=12)
    )
    state, infos = engine.run(0, LABELLED)
    return perturbed_posterior(engine, state, LABELLED, infos), engine, state, infos


def learnt_head(transition=None):
    engine = LastLayerFilter(feature_head(Gaussian(NOISE), D, transition=transition))
    state, infos = engine.init(), []
    for batch in BATCHES:
        state, info = engine.update(state, batch)
        infos.append(info)
    return engine, state, infos


@pytest.fixture(scope="module")
def heads():
    return {"head": learnt_head(), "walking head": learnt_head(RandomWalk(0.3))}


@pytest.fixture(scope="module")
def trees(filtered, perturbed, heads):
    mean_field = MeanFieldFilter(linear, start=AtPrior(), estimator=WeightSampling())
    path = filter_path(mean_field, 0, BATCHES)
    state, _ = mean_field.update(mean_field.init(0, BATCHES[0]), BATCHES[0])
    made = {
        "smoother": LaplaceFilter(linear, Dense()).smooth(filtered).to_datatree(num_samples=DRAWS, tasks=BATCHES),
        "filter": to_datatree(filtered, num_samples=DRAWS, tasks=BATCHES),
        "mean field": posterior_of(mean_field, state, BATCHES[0]).to_datatree(num_samples=DRAWS, tasks=BATCHES[:1]),
        "mean-field smoother": smooth_path(path).to_datatree(num_samples=DRAWS, tasks=BATCHES),
        "perturbation": to_datatree(perturbed[0], num_samples=DRAWS, tasks=LABELLED),
    }
    for name, (engine, state, infos) in heads.items():
        made[name] = head_datatree(engine, state, num_samples=DRAWS, tasks=BATCHES, infos=infos)
    return made


ENGINES = ["smoother", "filter", "mean field", "mean-field smoother", "perturbation", "head", "walking head"]
each_engine = pytest.mark.parametrize("engine", ENGINES)


@each_engine
def test_groups_dimensions_and_names_are_the_same(trees, engine):
    tree = trees[engine]
    wanted = COMMON - ({"sample_stats"} if engine == "perturbation" else set())
    assert wanted <= set(tree.children)
    assert {"filtered", "smoothed"} & set(tree.children)
    for name, leaf in tree["posterior"].data_vars.items():
        assert leaf.dims[:2] == ("chain", "draw")
        axes = [axis for axis in leaf.dims[2:] if axis != "task"]
        assert axes == [f"{name}_axis_{i}" for i in range(len(axes))]
        assert leaf.shape[:2] == (1, DRAWS)
        summary = tree["smoothed" if "smoothed" in tree.children else "filtered"]
        assert summary[f"{name}.mean"].dims == summary[f"{name}.sd"].dims == ("task", *axes)
        assert tree["prior"][name].dims == leaf.dims
    for group in ("posterior_predictive", "prior_predictive", "log_likelihood"):
        assert tree[group]["y"].dims == ("chain", "draw", "task", "example")
    assert tree["observed_data"]["y"].dims == ("task", "example")
    assert tree["filter_stats"]["seconds"].dims == ("task",)


@DOUBTS
@each_engine
def test_arviz_works_on_it_unmodified(trees, engine):
    tree = trees[engine]
    name = next(iter(tree["posterior"].data_vars))
    assert len(az.summary(tree, var_names=[name], kind="stats")) == np.prod(tree["posterior"][name].shape[2:])
    az.plot_forest(tree, var_names=[name])
    labels = np.issubdtype(tree["observed_data"]["y"].dtype, np.integer)
    az.plot_ppc_dist(tree, num_samples=5, kind="ecdf" if labels else "auto")  # ArviZ warns of densities of labels
    found = az.loo(without_masked(tree), var_name="y", pointwise=True)
    assert np.isfinite(found.elpd)
    az.plot_khat(found)
    plt.close("all")


@each_engine
def test_it_comes_back_from_netcdf_and_zarr(trees, engine, tmp_path):
    tree = trees[engine]
    tree.to_netcdf(tmp_path / "tree.nc")
    tree.to_zarr(tmp_path / "tree.zarr", zarr_format=2)
    for name, reader in (("tree.nc", "h5netcdf"), ("tree.zarr", "zarr")):
        with xarray.open_datatree(tmp_path / name, engine=reader) as again:
            for group in tree.children:
                xarray.testing.assert_equal(again[group].to_dataset().load(), tree[group].to_dataset())


def test_draws_of_the_filter_have_its_moments_and_density(filtered):
    tree = to_datatree(filtered, num_samples=1000, keep=["net.slope"])
    slopes = tree["posterior"]["net.slope"].values[0]
    for t, belief in enumerate(filtered.beliefs):
        covariance = np.linalg.inv(np.asarray(belief.precision.to_dense(), float))[1:, 1:]  # offset, then slope
        error = np.sqrt(np.diag(covariance) / 1000)
        assert (np.abs(slopes[:, t].mean(0) - belief.mean[1:]) < 5 * error).all()
        np.testing.assert_allclose(np.cov(slopes[:, t].T), covariance, atol=0.25 * covariance.max())
    path = marginals_of(filtered).sample_path(jax.random.key(3))
    expected = sum(
        multivariate_normal(b.mean, np.linalg.inv(np.asarray(b.precision.to_dense(), float))).logpdf(theta)
        for b, theta in zip(filtered.beliefs, path, strict=True)
    )
    np.testing.assert_allclose(marginals_of(filtered).log_density(path), expected, rtol=1e-4)
    assert "lp" not in tree["sample_stats"]


def test_what_is_written_in_portions_is_the_tree_to_the_last_bit(filtered, tmp_path):
    posterior = LaplaceFilter(linear, Dense()).smooth(filtered)
    tree = posterior.to_datatree(num_samples=10, tasks=BATCHES)
    seen = []
    write_datatree(
        tmp_path / "a.zarr", posterior, num_samples=10, chunk=4, tasks=BATCHES, progress=lambda done: seen.append(done)
    )
    assert seen == [4, 8, 10]
    with xarray.open_datatree(tmp_path / "a.zarr", engine="zarr") as again:
        assert set(again.children) == set(tree.children)
        for group in tree.children:
            xarray.testing.assert_equal(again[group].to_dataset().load(), tree[group].to_dataset())


def test_an_interruption_leaves_nothing_behind(filtered, tmp_path):
    def stop(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_datatree(tmp_path / "a.zarr", filtered, num_samples=4, chunk=2, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_masked_examples_are_left_out_and_the_others_keep_their_places(trees):
    tree = trees["smoother"]
    flat = without_masked(tree)
    assert flat["log_likelihood"]["y"].dims == ("chain", "draw", "observation")
    np.testing.assert_array_equal(flat["observed_data"]["y"], np.concatenate([batch["y"] for batch in BATCHES]))
    np.testing.assert_array_equal(flat["observed_data"]["task"], np.repeat(range(3), SIZES))
    np.testing.assert_array_equal(flat["constant_data"]["x"], np.concatenate([batch["x"] for batch in BATCHES]))
    assert not np.isnan(flat["log_likelihood"]["y"]).any()
    assert flat["posterior"]["net.slope"].dims == tree["posterior"]["net.slope"].dims
    with pytest.raises(ValueError, match="no group 'observed_data'"):
        without_masked(tree.drop_nodes("observed_data"))


def test_a_gaussian_heads_density_over_its_draws_is_the_evidence(heads):
    """lp - log_q is log p(y) for every draw where the posterior is exact: here by the dense marginal of all targets."""
    engine, state, infos = heads["head"]
    tree = head_datatree(engine, state, num_samples=5, tasks=BATCHES, infos=infos)
    x = np.concatenate([batch["x"] for batch in BATCHES]).astype(float)
    rows = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    covariance = rows @ rows.T + NOISE**2 * np.eye(len(x))
    exact = multivariate_normal(np.zeros(len(x)), covariance).logpdf(np.concatenate([b["y"] for b in BATCHES]))
    gap = (tree["sample_stats"]["lp"] - tree["sample_stats"]["log_q"]).values
    np.testing.assert_allclose(gap, exact, atol=5e-3)
    np.testing.assert_allclose(tree["filter_stats"]["log_evidence"].sum(), exact, atol=5e-3)


def test_a_walking_head_is_the_smoother_of_its_program(heads, filtered):
    """The offset stands still in the program and walks in the head, so that only shapes and the last task's data agree."""
    engine, state, _ = heads["walking head"]
    tree = head_datatree(engine, state, num_samples=4000, tasks=BATCHES)
    drawn = tree["posterior"]["head.weights"].values[0, :, :, 0]
    mean, sd = (tree["smoothed"][f"head.weights.{name}"].values[:, 0] for name in ("mean", "sd"))
    assert (np.abs(drawn.mean(0) - mean) < 5 * sd / np.sqrt(4000)).all()
    np.testing.assert_allclose(drawn.std(0), sd, rtol=0.06)
    assert "lp" not in tree["sample_stats"]


@pytest.mark.parametrize("most_dense", [1024, 0], ids=["matrix", "diagonal"])
def test_variances_of_perturbed_weights_are_those_of_the_linear_map(perturbed, monkeypatch, most_dense):
    _, engine, state, infos = perturbed
    monkeypatch.setattr(perturbation_posterior, "_MOST_DENSE", most_dense)
    posterior = perturbed_posterior(engine, state, LABELLED, infos)
    precision = posterior.beliefs[1].precision
    noises = jnp.diag(precision.free.astype(float))
    moved = jax.vmap(lambda noise: jax.jvp(precision._theta, (precision.own,), (precision.own_shift(noise),))[1])(
        noises
    )
    expected = np.sum(np.square(moved), axis=0)
    assert (expected > 0).any()
    np.testing.assert_allclose(precision.variance(), expected, rtol=1e-4, atol=1e-8)
    still = posterior.beliefs[0].precision.variance()
    sites = {site.path: slice(site.start, site.stop) for site in posterior.layout.sites}
    assert (still[sites["layers.0.kernel"]] == 0).all()  # the first task's kernel is the base
    assert (still[sites["layers.1.kernel"]] > 0).all()


def test_each_task_of_a_perturbation_has_kernels_of_its_own(trees, perturbed):
    _, engine, state, _ = perturbed
    tree = trees["perturbation"]
    kernels = tree["posterior"]["net.layers.0.kernel"]
    assert kernels.dims[2] == "task"
    assert (kernels.isel(task=0) == kernels.isel(task=0, draw=0)).all()
    assert (kernels.isel(task=1).std("draw") > 0).all()
    for t in range(2):
        own = engine.weights(state, t)["net"]["layers.0.kernel"]
        np.testing.assert_allclose(tree["filtered"]["net.layers.0.kernel.mean"].values[t], own, rtol=1e-6)
    np.testing.assert_array_equal(tree["filter_stats"]["growth"].values[1], engine.storage(state).growth)


def test_bad_requests_are_refused(filtered, perturbed, heads, tmp_path):
    _, engine, state, infos = perturbed
    with pytest.raises(ValueError, match=r"posterior is dict; what smooth, run or posterior_of returned"):
        to_datatree({})
    with pytest.raises(ValueError, match="holds 1 tasks, but the posterior has 3"):
        to_datatree(filtered, tasks=BATCHES[:1])
    with pytest.raises(ValueError, match="num_samples is 0"):
        write_datatree(tmp_path / "a.zarr", filtered, num_samples=0)
    with pytest.raises(ValueError, match="chunk is 0"):
        write_datatree(tmp_path / "a.zarr", filtered, chunk=0)
    with pytest.raises(ValueError, match="where something lies already"):
        write_datatree(tmp_path, filtered)
    with pytest.raises(ValueError, match="infos holds 1 infos, but there are 2 tasks"):
        perturbed_posterior(engine, state, LABELLED, infos[:1])
    with pytest.raises(ValueError, match="the head walked 3 steps"):
        head_datatree(*heads["walking head"][:2], tasks=BATCHES[:2])


@pytest.mark.slow
def test_memory_is_bounded_by_the_portion_for_a_million_weights(tmp_path):
    size, draws, portion = 1000, 40, 2

    def program(tasks):
        params = {"in": jnp.zeros((size, size), jnp.float32)}
        net = ssm_nn.weights(
            "net",
            (lambda p, x: jnp.sum(jnp.tanh(x @ p["in"]), axis=1) / size**0.5, params),
            prior=dist.Normal(0.0, 1.0),
            transition=RandomWalk(0.1),
            num_tasks=len(tasks),
        )

        def observe(f, task):
            with numpyro.plate("n", task["x"].shape[0]):
                numpyro.sample("y", dist.Normal(f(task["x"]), 1.0), obs=task.get("y"))

        net.over(tasks, observe)

    tasks = [
        {"x": RNG.normal(size=(4, size)).astype("float32"), "y": RNG.normal(size=4).astype("float32")} for _ in range(2)
    ]
    settings = Minibatch(optax.adam(1e-3), epochs=1, batch_size=4)
    beliefs = LaplaceFilter(program, Diagonal(), estimator=settings).run(0, tasks)
    one_draw = 4 * size**2 * len(tasks)
    tracemalloc.start()
    write_datatree(tmp_path / "a.zarr", beliefs, num_samples=draws, chunk=portion, tasks=tasks)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # posterior and prior, each as a list of draws, stacked, and in the writer's hands
    assert peak < 2 * 4 * portion * one_draw < draws * one_draw / 2
    with xarray.open_datatree(tmp_path / "a.zarr", engine="zarr") as tree:
        assert tree["posterior"]["net.in"].shape == (1, draws, len(tasks), size, size)
        one = tree["posterior"]["net.in"].isel(draw=draws - 1, task=1, **{"net.in_axis_0": 0})
        assert np.isfinite(one).all()
