"""The filter as a whole: Kalman's sums where they are exact, loops equal to steps, bad input, failures, resuming."""

import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from oracles_gaussian import Chain, condition, of_task
from rich.console import Console

from ssm_nn import stack_tasks, weights
from ssm_nn.inference import FilterWarning
from ssm_nn.inference.mean_field.engine import Checkpoint, MeanFieldFilter
from ssm_nn.inference.mean_field.forgetting import Window
from ssm_nn.inference.mean_field.gradients import Gathered, LocalReparameterisation, Outcome
from ssm_nn.inference.mean_field.progress import LearningBar
from ssm_nn.inference.mean_field.rules import FirstOrder, FixedPoint, Natural
from ssm_nn.inference.mean_field.starts import AtPrior, FanIn, OwnWeights
from ssm_nn.inference.mean_field.streams import Batches
from ssm_nn.inference.mean_field.trajectory import filter_path, posterior_of, smooth_path
from ssm_nn.models.networks import mlp
from ssm_nn.models.transitions import OrnsteinUhlenbeck, Permuted, RandomWalk, Static

D, K, SD, LOC, SCALE = 4, 3, 0.5, 0.3, 1.2
INF = float("inf")


class Exact:
    """g and H at the mean by differentiation: exact for quadratic losses."""

    def gather(self, space, mean, sigma, batch, key):
        del key, sigma
        at = space.layout.packed(mean)

        def loss(w):
            return -space.log_likelihood(w, batch)

        g, h = jax.grad(loss)(at), jnp.diag(jax.hessian(loss)(at))
        nothing = jnp.zeros(())
        outcome = Outcome(loss(at), nothing, nothing, nothing, jnp.sum(batch.mask))
        return Gathered(space.layout.arrays(g), space.layout.arrays(h), outcome)


def linear(transition, scale=1.0):
    """y = x . w + noise: with one weight an example a mean field is exact."""

    def program(tasks):
        net = weights(
            "net",
            (lambda p, x: x @ p["w"], {"w": jnp.zeros(D)}),
            prior=dist.Normal(LOC, SCALE),
            transition=transition,
            num_tasks=len(tasks),
        )

        def observe(f, task):
            with (
                numpyro.plate("examples", task["x"].shape[0]),
                numpyro.handlers.scale(scale=scale or 1 / len(task["x"])),
            ):
                numpyro.sample("y", dist.Normal(f(task["x"]), SD), obs=task["y"])

        net.over(tasks, observe)

    return program


def linear_batches(rng, sizes):
    return [{"x": np.eye(D)[rng.integers(0, D, n)] * rng.normal(size=(n, 1)), "y": rng.normal(size=n)} for n in sizes]


def chain(batches, step, window):
    """The program and its window as matrices; the window's step depends on the filtered variance, found on the way."""
    v, steps, data = np.full(D, SCALE**2), [], []
    gain, shift, noise = step
    for t, batch in enumerate(batches):
        rho = len(batch["y"]) / window
        a, b, q = (gain, shift, noise) if t else (1.0, 0.0, 0.0)
        moved = a**2 * v + q
        v_after = 1 / ((1 - rho) / moved + rho / SCALE**2)
        fade = (1 - rho) * v_after / moved
        if t:  # the first batch meets the prior, which forgetting leaves as it is
            matrix = np.full(D, fade * a)
            offset = fade * b + rho * v_after * LOC / SCALE**2
            steps.append((np.diag(matrix), offset, np.diag(fade**2 * q + v_after * (1 - (1 - rho) * fade))))
        data.append((batch["x"], batch["y"], SD**2 * np.eye(len(batch["y"]))))
        v = 1 / (1 / v_after + (batch["x"] ** 2).sum(0) / SD**2)
    return Chain(np.full(D, LOC), SCALE**2 * np.eye(D), steps, data)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("transition", "step", "window"),
    [
        (Static(), (1.0, 0.0, 0.0), 40.0),
        (RandomWalk(0.4), (1.0, 0.0, 0.16), INF),
        (OrnsteinUhlenbeck(0.9), (0.9, 0.1 * LOC, 0.19 * SCALE**2), 25.0),
    ],
    ids=["window", "random walk", "both"],
)
def test_filter_and_smoother_are_dense_conditioning(transition, step, window, rng):
    """The natural rule on quadratic losses; the chain's kernel is that of the window at the filtered variances."""
    batches = linear_batches(rng, [3, 3, 5, 1, 3, 5])
    engine = MeanFieldFilter(
        linear(transition), Window(window), rule=Natural(), estimator=Exact(), start=AtPrior(), trust=INF
    )
    filtered = filter_path(engine, 0, batches)
    smoothed = smooth_path(filtered)
    oracle = chain(batches, step, window)
    for beliefs, up_to in ((filtered.beliefs, lambda t: t), (smoothed.beliefs, lambda t: None)):
        for t, belief in enumerate(beliefs):
            mean, covariance = of_task(condition(oracle, up_to(t)), t)
            np.testing.assert_allclose(belief.mean, mean, rtol=1e-8, atol=1e-9)
            np.testing.assert_allclose(belief.precision.variance(), np.diag(covariance), rtol=1e-8)
    if step == (1.0, 0.0, 0.0):  # the gain is the constant of the window
        later, predicted = smoothed.beliefs[1], filtered.infos[1].moments
        before = filtered.beliefs[0]
        gain = 1 - 3 / window
        np.testing.assert_allclose(
            smoothed.beliefs[0].mean,
            before.mean + gain * (later.mean - predicted.gain * before.mean - predicted.shift),
            rtol=1e-9,
        )


@pytest.mark.usefixtures("x64")
def test_the_batch_size_does_not_matter_to_a_sum_and_does_to_a_mean(rng):
    (whole,) = linear_batches(rng, [12])
    ones = [{name: array[n : n + 1] for name, array in whole.items()} for n in range(12)]

    def learnt(batches, scale):
        engine = MeanFieldFilter(linear(Static(), scale), rule=Natural(), estimator=Exact(), start=AtPrior(), trust=INF)
        state, _ = engine.run(0, batches)
        return np.stack([state.mean, state.sigma])

    np.testing.assert_allclose(learnt([whole], 1.0), learnt(ones, 1.0), rtol=1e-9)
    assert np.max(np.abs(learnt([whole], None) / learnt(ones, None) - 1)) > 0.5


def classes(transition=Static()):  # noqa: B008
    def program(tasks):
        net = weights("net", mlp((2, 4, K)), prior=dist.Normal(0.0, 1.0), transition=transition, num_tasks=len(tasks))

        def observe(f, task):
            with numpyro.plate("examples", task["x"].shape[0]):
                numpyro.sample("y", dist.Categorical(logits=f(task["x"])), obs=task.get("y"))

        net.over(tasks, observe)

    return program


def examples(size=22, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(size, 2)).astype(np.float32)
    return {"x": x, "y": ((x[:, 0] > 0).astype(np.int32) + (x[:, 1] > 0.5)).astype(np.int32)}


@pytest.fixture(scope="module")
def engine():
    """One engine for all tests that may share what is compiled."""
    return MeanFieldFilter(classes(), Window(200), estimator=LocalReparameterisation(4))


def equal(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(
            np.asarray(jax.random.key_data(a) if a.dtype.name.startswith("key") else a),
            np.asarray(jax.random.key_data(b) if b.dtype.name.startswith("key") else b),
        )


@pytest.mark.slow
def test_a_run_is_its_updates(engine):
    """By arrays, by an iterator of batches, and one by one; the last batch is shorter."""
    batches = Batches(examples(), 4, seed=3)
    state = start = engine.init(0, examples())
    infos = []
    for batch in batches:
        state, info = engine.update(state, batch)
        infos.append(info)
    by_arrays, info = engine.run(start, batches)
    by_iterator, _ = engine.run(start, (dict(batch.data) for batch in batches))
    assert int(by_arrays.step) == len(batches) == 6
    assert int(by_arrays.examples) == 22
    for found in (by_arrays, by_iterator):
        np.testing.assert_allclose(found.mean, state.mean, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(found.sigma, state.sigma, rtol=2e-5)
    np.testing.assert_allclose(info.free_energy, [i.free_energy[0] for i in infos], rtol=1e-4)
    np.testing.assert_array_equal(info.counted, [4, 4, 4, 4, 4, 2])
    assert 0 <= info.accuracy <= 1
    assert np.all(info.epistemic >= 0)
    assert np.all(-info.log_predictive <= info.free_energy + 1e-6)  # Jensen
    assert info.divergence > 0


def test_everything_is_compiled_once_a_shape(engine, caplog):
    batches = Batches(examples(), 4, seed=0)
    engine.run(0, batches)
    before = engine._learn._cache_size(), engine._begin._cache_size()
    state, _ = engine.run(5, Batches(examples(seed=4), 4, seed=1))
    engine.run(state, Batches(examples(seed=5), 4))
    assert (engine._learn._cache_size(), engine._begin._cache_size()) == before
    saved = jax.tree.map(np.asarray, state._replace(key=0))._replace(key=state.key)
    with jax.log_compiles(), caplog.at_level("WARNING"):  # a state that comes from the host
        engine.run(saved, Batches(examples(seed=5), 4))
    assert not [record for record in caplog.records if "Compiling jit(_block)" in record.getMessage()]


def test_a_stopped_run_goes_on_to_the_last_bit(engine, tmp_path):
    batches, start = Batches(examples(), 4, epochs=3, seed=3), engine.init(0, examples())
    place = Checkpoint(tmp_path / "state.npz", 5)
    whole, _ = engine.run(start, batches)

    def stop(done, state, info):
        del state, info
        if done >= 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.run(start, batches, checkpoint=place, progress=stop)
    resumed, info = engine.run(start, batches, checkpoint=place)
    equal(resumed, whole)
    assert len(info.counted) == 18 - 10
    again, info = engine.run(start, batches, checkpoint=place)  # from batch 15 on
    equal(again, whole)
    assert len(info.counted) == 3


def test_a_stopped_run_over_a_generator_goes_on(engine, tmp_path):
    """The batches before the checkpoint are drawn from the generator again, and left aside."""
    batches, start = [dict(batch.data) for batch in Batches(examples(), 4)], engine.init(0, examples())
    place = Checkpoint(tmp_path / "state.npz", 2)
    whole, _ = engine.run(start, batches, checkpoint=Checkpoint(tmp_path / "whole.npz", 2))
    engine.run(start, batches[:4], checkpoint=place)
    resumed, info = engine.run(start, (batch for batch in batches), checkpoint=place)
    equal(resumed, whole)
    assert len(info.counted) == 2


def test_the_bar_says_how_fast_and_how_well(engine):
    screen = io.StringIO()
    batches = Batches(examples(), 4)
    with LearningBar(len(batches), console=Console(file=screen, width=120, force_terminal=True)) as bar:
        _, info = engine.run(0, batches, progress=bar)
    shown = screen.getvalue()
    assert "6/6" in shown
    assert re.search(r"[\d,]+ examples/s", shown)
    assert f"accuracy {info.accuracy:.1%}  epistemic {np.sum(info.epistemic) / 22:.3f} nats" in shown


def test_float32_stays_float32(engine):
    state, _ = engine.run(0, Batches(examples(), 4))
    assert state.mean.dtype == state.sigma.dtype == jnp.float32


def test_bad_data_are_named(engine):
    state, bad = engine.init(0, examples()), examples()
    bad["x"][[2, 5], 1] = np.nan
    for call in (lambda: engine.update(state, bad), lambda: engine.init(0, bad)):
        with pytest.raises(ValueError, match="'x' of the task is not finite in 2 examples, the first at index 2"):
            call()
    for label in (-1, K):
        wrong = examples() | {"y": np.full(22, label, np.int32)}
        with pytest.raises(ValueError, match="the values observed at 'y' lie outside the support"):
            engine.update(state, wrong)
    for batches in ([], iter(())):
        with pytest.raises(ValueError, match="batches is empty; at least one batch is needed"):
            engine.run(0, batches)
    with pytest.raises(ValueError, match=r"the window is 200 examples, shorter than a batch of 201"):
        engine.update(state, examples(201))
    with pytest.raises(ValueError, match="state has 1 weights whose sigma is not positive"):
        engine.update(state._replace(sigma=state.sigma.at[3].set(-0.1)), examples())
    mixed = [{"x": examples(4)["x"], "y": examples(4)["y"]}, {"x": np.ones((4, 3)), "y": examples(4)["y"]}]
    with pytest.raises(ValueError, match=r"'x' of batch 1 in the block holds examples of shape \(3,\)"):
        engine.run(0, mixed)


def test_a_batch_with_nan_is_left_out_and_named(engine):
    """In a run the rest is learnt as if that batch had taught nothing."""
    batches = list(Batches(examples(), 4))
    spoilt = {name: np.array(value) for name, value in batches[2].data.items()}
    spoilt["x"][1, 0] = np.nan
    start = engine.init(0, examples())
    with pytest.warns(
        FilterWarning, match=r"batch 2 \(1 in all\).*'x' of the batch is not finite in 1 examples.*index 1"
    ):
        found, info = engine.run(start, [*batches[:2], spoilt, *batches[3:]])
    np.testing.assert_array_equal(info.left_out, [2])
    assert np.isnan(info.free_energy[2])
    expected, _ = engine.run(start, batches[:2])
    expected, _ = engine.run(expected._replace(step=expected.step + 1), batches[3:])
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-5, atol=1e-6)
    assert int(found.step) == 6


def test_a_sigma_that_would_turn_negative_is_left_out():
    """First order without a trust region, at sigma dC/dsigma >= 2; the fixed point takes the same batch."""
    (batch,) = linear_batches(np.random.default_rng(0), [40])
    settings = {"estimator": Exact(), "start": OwnWeights(1.0), "trust": INF}
    published = MeanFieldFilter(linear(Static()), rule=FirstOrder(), **settings)
    state = published.init(0, batch)
    with pytest.warns(FilterWarning, match=r"batch 0 \(1 in all\): .* no positive sigma.*sigma dC/dsigma >= 2"):
        kept, info = published.update(state, batch)
    equal(kept._replace(step=state.step, examples=state.examples), state)
    np.testing.assert_array_equal(info.left_out, [0])
    for rule, trust in ((FixedPoint(), INF), (FirstOrder(), 1.0)):
        fine, _ = MeanFieldFilter(linear(Static()), rule=rule, **(settings | {"trust": trust})).update(state, batch)
        assert np.all(fine.sigma > 0)
        assert np.all(fine.sigma < state.sigma)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MeanFieldFilter(3), "program is 3"),
        (lambda: MeanFieldFilter(classes(), 300), r"window is 300; Window\(examples\) and None are accepted"),
        (lambda: MeanFieldFilter(classes(), rule="natural"), r"rule is 'natural'; FixedPoint\(\), FirstOrder\(\)"),
        (lambda: MeanFieldFilter(classes(), estimator=10), r"estimator is 10; LocalReparameterisation\(draws\)"),
        (lambda: MeanFieldFilter(classes(), start=0), r"start is 0; FanIn\(\)"),
        (lambda: MeanFieldFilter(classes(), trust=0.0), "trust is 0.0; a number > 0 is accepted"),
        (lambda: OwnWeights(0.0), "sigma is 0.0; a finite number > 0 is accepted"),
        (lambda: FanIn(-1.0), "reach is -1.0; a finite number >= 0 is accepted"),
        (lambda: Batches(examples(), 0), "size is 0; a whole number >= 1 is accepted"),
        (lambda: Batches({}), "task has no examples to learn from"),
        (
            lambda: MeanFieldFilter(linear(Permuted(np.arange(D)))).init(0, {"x": np.ones((1, D)), "y": np.ones(1)}),
            "kernel maps coordinates",
        ),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_batches_cover_each_epoch_once_in_another_order():
    batches = Batches({"x": np.arange(10.0)}, 4, epochs=2, seed=1)
    values = [np.asarray(batch["x"]) for batch in batches]
    assert [len(v) for v in values] == [4, 4, 2, 4, 4, 2]
    epochs = np.concatenate(values[:3]), np.concatenate(values[3:])
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(10))
    assert not np.array_equal(*epochs)
    np.testing.assert_array_equal(np.concatenate([b["x"] for b in Batches({"x": np.arange(10.0)}, 4)]), np.arange(10))


def test_the_start_goes_by_the_inputs_of_a_layer(engine):
    state = engine.init(0, examples())
    for site, fan_in, kernel in zip(
        ("0.bias", "0.kernel", "1.bias", "1.kernel"), (2, 2, 4, 4), (0, 1, 0, 1), strict=True
    ):
        found = next(s for s in _layout(engine).sites if s.path == f"layers.{site}")
        np.testing.assert_allclose(state.sigma[found.start : found.stop], 2 / np.sqrt(fan_in), rtol=1e-6)
        mean = np.abs(state.mean[found.start : found.stop])
        assert np.all(mean <= 4 / np.sqrt(fan_in))
        assert np.any(mean > 1 / np.sqrt(fan_in)) == bool(kernel)


def _layout(engine):
    return posterior_of(engine, engine.init(0, examples()), examples()).layout


@pytest.mark.slow
def test_the_posterior_serves_predictive_and_arviz(engine):
    """Guide, DataTree, predictions with the two parts of their entropy, and strange inputs found by them."""
    state, _ = engine.run(0, Batches(examples(400), 4, epochs=2, seed=0))
    posterior = posterior_of(engine, state, examples())
    draws = numpyro.infer.Predictive(engine.program, guide=posterior.guide, params={}, num_samples=3)(
        jax.random.key(0), stack_tasks([examples()])
    )
    assert draws["y"].shape == (3, 1, 22)
    tree = posterior.to_datatree(num_samples=5, tasks=[examples()])
    np.testing.assert_allclose(
        tree["filtered"]["net.layers.0.bias.mean"].values[0], _layout(engine).leaves(state.mean)["net.layers.0.bias"]
    )
    test = examples(300, 9)
    prediction = engine.predict(state, test)["y"]
    assert np.mean(prediction.probabilities.argmax(1) == test["y"]) > 0.85
    entropy = -(prediction.probabilities * np.log(prediction.probabilities)).sum(1)
    np.testing.assert_allclose(prediction.aleatoric + prediction.epistemic, entropy, rtol=1e-3, atol=1e-4)
    certain = engine.predict(state._replace(sigma=jnp.full_like(state.sigma, 1e-9)), test)["y"]
    np.testing.assert_allclose(certain.epistemic, 0, atol=1e-5)
