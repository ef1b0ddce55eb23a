"""A program whose weights the filter has integrated out: its density, its derivative, and what NUTS and SVI make of it."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.util import log_density
from oracles_gaussian import Chain, condition
from walking_classifier import quadrants, walking_classifier
from walking_regression import P, evidence, program, tasks_of

import ssm_nn
from ssm_nn.inference import (
    Dense,
    Diagonal,
    EvidenceGradient,
    LaplaceFilter,
    Lbfgs,
    LowRank,
    Minibatch,
    SketchedCurvature,
)
from ssm_nn.inference.diagnosis import marginalize
from ssm_nn.inference.diagnosis.traced_filter import TracedFilter
from ssm_nn.models import RandomWalk

D, T, N = 2, 8, 6
HYPERS = {"noise.first": 0.4, "noise.second": 0.05, "gain.first": 0.8, "gain.second": -0.5}


def walking(tasks):
    """Both the kernel's scale and the noise of the data are unknown."""
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    noise = numpyro.sample("noise", dist.LogNormal(-1.0, 0.5))
    net = ssm_nn.weights(
        "net",
        (lambda params, x: x @ params, jnp.zeros(D)),
        prior=dist.Normal(0.0, 1.0),
        transition=RandomWalk(scale),
        num_tasks=len(tasks),
    )

    def observe(f, task):
        with numpyro.plate("examples", task["x"].shape[0]):
            numpyro.sample("y", dist.Normal(f(task["x"]), noise), obs=task["y"])

    net.over(tasks, observe)


def walking_tasks():
    rng = np.random.default_rng(2)
    theta, tasks = rng.normal(size=D), []
    for _ in range(T):
        x = rng.normal(size=(N, D)).astype("float32")
        tasks.append({"x": x, "y": (x @ theta + 0.3 * rng.normal(size=N)).astype("float32")})
        theta = theta + 0.4 * rng.normal(size=D)
    return tasks


def posterior_by_quadrature(tasks):
    """Means and standard deviations of log scale and log noise, on a grid over the exact evidence."""
    scale, noise = np.linspace(-3.5, 1.0, 46), np.linspace(-2.2, 0.0, 34)
    log_density_ = np.zeros((len(scale), len(noise)))
    for i, s in enumerate(np.exp(scale)):
        for j, r in enumerate(np.exp(noise)):
            steps = [(np.eye(D), np.zeros(D), s**2 * np.eye(D))] * (T - 1)
            data = [(t["x"].astype(float), t["y"].astype(float), r**2 * np.eye(N)) for t in tasks]
            log_density_[i, j] = condition(Chain(np.zeros(D), np.eye(D), steps, data)).log_evidence
            log_density_[i, j] += -(s**2) / 2 + np.log(s) - (np.log(r) + 1) ** 2 / (2 * 0.5**2)
    weight = np.exp(log_density_ - log_density_.max())
    edge = weight.sum(1)[[0, -1]].max() + weight.sum(0)[[0, -1]].max()
    assert edge < 1e-3 * weight.sum()
    weight /= weight.sum()
    by_name = {"scale": (scale, weight.sum(1)), "noise": (noise, weight.sum(0))}
    means = {name: (grid @ w) for name, (grid, w) in by_name.items()}
    return {name: (means[name], np.sqrt((grid - means[name]) ** 2 @ w)) for name, (grid, w) in by_name.items()}


@pytest.fixture(scope="module")
def tasks():
    return walking_tasks()


@pytest.fixture(scope="module")
def exact(tasks):
    return posterior_by_quadrature(tasks)


def nuts(model, tasks, *, samples, seed=0):
    mcmc = MCMC(NUTS(model), num_warmup=200, num_samples=samples, progress_bar=False)
    mcmc.run(jax.random.key(seed), ssm_nn.stack_tasks(tasks))
    return mcmc.get_samples()


def assert_agree(draws, exact):
    """Within four standard errors, of a mean and of a standard deviation, by the effective number of draws."""
    for name, (mean, sd) in exact.items():
        values = np.log(np.asarray(draws[name], np.float64))
        number = min(float(numpyro.diagnostics.effective_sample_size(v[None])) for v in (values, (values - mean) ** 2))
        assert number > 100
        assert abs(values.mean() - mean) < 4 * sd / np.sqrt(number), name
        assert abs(values.std() / sd - 1) < 4 / np.sqrt(number), name


@pytest.mark.slow
def test_collapsed_nuts_finds_the_exact_posterior_of_the_hyper_parameters(tasks, exact):
    engine = LaplaceFilter(walking, Dense(), hypers={"scale": 1.0, "noise": 1.0})
    draws = nuts(marginalize(walking, engine), tasks, samples=400)
    assert_agree(draws, exact)
    assert (draws["unconverged_tasks"] == 0).all()
    at = {name: float(draws[name][0]) for name in ("scale", "noise")}
    assert float(draws["log_evidence"][0]) == pytest.approx(engine.with_hypers(at).run(0, tasks).log_evidence, rel=1e-4)


@pytest.mark.slow
def test_full_nuts_finds_the_same(tasks, exact):
    moved = numpyro.handlers.reparam(walking, config={"net.weight": ssm_nn.InnovationReparam()})
    assert_agree(nuts(moved, tasks, samples=1500), exact)


def traced_slope(engine, listed):
    traced, stack, key = TracedFilter(engine), ssm_nn.stack_tasks(listed), jax.random.key(0)
    return jax.jit(jax.value_and_grad(lambda h: traced(h, stack, key).log_evidence))(engine.hypers)


@pytest.mark.usefixtures("x64")
def test_density_and_derivative_are_those_of_the_exact_evidence():
    """Tasks without data among them, the first one too."""
    listed = tasks_of(0, num_tasks=5, size=4, missing=(0, 2))
    found, slope = traced_slope(LaplaceFilter(program, Dense(), hypers=HYPERS), listed)

    def exact_(h):
        return evidence(listed, (h["noise.first"], h["noise.second"]), (h["gain.first"], h["gain.second"]))

    assert float(found) == pytest.approx(exact_(HYPERS), abs=1e-9)
    for name, value in HYPERS.items():
        up, down = (exact_(HYPERS | {name: value + step}) for step in (1e-5, -1e-5))
        assert float(slope[name]) == pytest.approx((up - down) / 2e-5, rel=1e-6, abs=1e-7), name


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("structure", [Dense(), LowRank(P), LowRank(2), Diagonal()])
def test_density_and_derivative_are_those_of_the_filter(structure):
    listed = tasks_of(0, num_tasks=5, size=4, missing=(0, 2))
    engine = LaplaceFilter(program, structure, hypers=HYPERS)
    found, slope = traced_slope(engine, listed)
    expected = EvidenceGradient(engine)(HYPERS, listed)
    assert float(found) == pytest.approx(expected.log_evidence, abs=1e-9)
    for name, part in expected.gradient.items():
        assert float(slope[name]) == pytest.approx(float(part), abs=1e-9), name


def test_log_density_is_the_priors_times_the_evidence_and_sites_may_be_fixed(tasks):
    engine = LaplaceFilter(walking, Dense(), hypers={"scale": 0.4, "noise": 0.3})
    model = marginalize(walking, engine)
    run = engine.run(0, tasks).log_evidence
    joint, trace = log_density(model, (tasks,), {}, {"scale": 0.4, "noise": 0.3})
    priors = dist.HalfNormal(1.0).log_prob(0.4) + dist.LogNormal(-1.0, 0.5).log_prob(0.3)
    assert float(joint) == pytest.approx(run + float(priors), rel=1e-5)
    assert set(trace) == {"scale", "noise", "log_evidence", "unconverged_tasks", "log_evidence_of_tasks"}
    fixed = numpyro.handlers.condition(model, {"noise": jnp.asarray(0.3)})
    again, trace = log_density(fixed, (tasks,), {}, {"scale": 0.4})
    assert float(again) == pytest.approx(float(joint), rel=1e-6)
    assert trace["noise"]["is_observed"]


@pytest.mark.slow
def test_svi_maximises_the_same_density(tasks, exact):
    engine = LaplaceFilter(walking, Dense(), hypers={"scale": 1.0, "noise": 1.0})
    model = marginalize(walking, engine)
    guide = AutoNormal(model)
    svi = SVI(model, guide, numpyro.optim.Adam(0.1), Trace_ELBO())
    result = svi.run(jax.random.key(0), 300, ssm_nn.stack_tasks(tasks), progress_bar=False)
    found = guide.median(result.params)
    for name, (mean, sd) in exact.items():
        assert abs(np.log(float(found[name])) - mean) < sd, name


@pytest.mark.slow
def test_a_network_and_the_lbfgs_search_are_differentiated_too():
    """Against differences of the filter's own evidence, in float64 with a tight search that ends in minima.

    With fewer examples or more units two units may mirror each other, and the search ends at a saddle.
    """
    rng = np.random.default_rng(3)
    listed = [quadrants(one) for one in rng.normal(size=(3, 40, 2))]
    model = walking_classifier(rng, 2)

    with jax.enable_x64(True):
        engine = LaplaceFilter(model, Dense(), hypers={"scale": 0.3}, estimator=Lbfgs(tolerance=1e-9))
        traced, stack = TracedFilter(engine), ssm_nn.stack_tasks(listed)
        found, slope = jax.value_and_grad(lambda s: traced({"scale": s}, stack, jax.random.key(0)).log_evidence)(0.3)
        runs = [engine.with_hypers({"scale": 0.3 + step}).run(0, listed).log_evidence for step in (-1e-3, 0.0, 1e-3)]
        assert float(found) == pytest.approx(runs[1], abs=1e-6)
        assert float(slope) == pytest.approx((runs[2] - runs[0]) / 2e-3, rel=1e-3)


def test_the_evidence_is_compiled_once_a_shape(tasks):
    engine = LaplaceFilter(walking, Dense(), hypers={"scale": 1.0, "noise": 1.0})
    traces = []

    def counted(hypers, stack, key):
        traces.append(1)
        return TracedFilter(engine)(hypers, stack, key)

    once = jax.jit(counted)
    for scale in (0.1, 0.2):
        hypers = {"scale": jnp.asarray(scale), "noise": jnp.asarray(0.3)}
        once.trace(hypers, ssm_nn.stack_tasks(tasks), jax.random.key(0))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"curvature": SketchedCurvature()}, "has the curvature"),
        ({"estimator": Minibatch()}, "by Minibatch; the evidence has a derivative with"),
    ],
)
def test_engines_without_a_derivative_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        marginalize(walking, LaplaceFilter(walking, LowRank(2), hypers={"scale": 1.0, "noise": 1.0}, **change))


def test_another_program_another_engine_and_bad_data_are_refused(tasks):
    engine = LaplaceFilter(walking, Dense(), hypers={"scale": 1.0, "noise": 1.0})
    with pytest.raises(ValueError, match="engine was made for the program walking, not for program"):
        marginalize(program, engine)
    twin = types.FunctionType(walking.__code__, walking.__globals__, "walking")
    with pytest.raises(ValueError, match="not for walking of the same name, which is another function"):
        marginalize(twin, engine)
    with pytest.raises(ValueError, match="a LaplaceFilter is accepted"):
        marginalize(walking, "filter")
    bad = [{"x": tasks[0]["x"], "y": np.full(N, np.nan, np.float32)}]
    with pytest.raises(ValueError, match="'y' of the task is not finite"):
        log_density(marginalize(walking, engine), (bad,), {}, {"scale": 0.4, "noise": 0.3})
