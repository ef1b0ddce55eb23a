"""EWC, SI, VCL and replay against closed forms, loops and limits, on programs small enough for them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssm_nn.inference.baselines import elastic_weights, replay, synaptic_intelligence, variational_continual
from ssm_nn.inference.baselines.elastic_weights import OnlineEWC, diagonal_fisher
from ssm_nn.inference.baselines.plain import FineTuning, JointTraining
from ssm_nn.inference.baselines.replay import Memory, Replay, recalled, remember
from ssm_nn.inference.baselines.synaptic_intelligence import SynapticIntelligence
from ssm_nn.inference.baselines.variational_continual import VariationalContinual, divergence
from ssm_nn.inference.beliefs import Belief
from ssm_nn.inference.gauss_newton import GaussNewton
from ssm_nn.inference.laplace import FilterWarning, LaplaceFilter
from ssm_nn.inference.map_problem import NOT_FINITE
from ssm_nn.inference.metrics import accuracy
from ssm_nn.inference.minibatch import Minibatch
from ssm_nn.inference.predictive import AtMean, predict_from
from ssm_nn.inference.structures import Diagonal
from ssm_nn.inference.tuning import tune
from ssm_nn.models.datasets import load
from ssm_nn.models.networks import mlp
from ssm_nn.models.programs import classification, regression
from ssm_nn.models.streams import permuted
from ssm_nn.tasks import Task

PRIOR, NOISE, SIZE = 0.7, 0.3, 4
ALL = (OnlineEWC, SynapticIntelligence, VariationalContinual, Replay)


def linear(params, x):
    return x @ params["w"]


def engine(prior=PRIOR, estimator=None, power=1.0, start=0.25):
    program = regression((linear, {"w": jnp.full(SIZE, start, float)}), NOISE, prior)
    estimator = Minibatch(optax.sgd(1e-2), epochs=2, batch_size=4, prior_every=1) if estimator is None else estimator
    return LaplaceFilter(program, Diagonal(), hypers={"noise.all": 0.0}, estimator=estimator, power=power)


def tasks(rng, sizes=(8, 8, 8), dtype=np.float64):
    return [Task({"x": rng.normal(size=(n, SIZE)).astype(dtype), "y": rng.normal(size=n).astype(dtype)}) for n in sizes]


def orthogonal_tasks(rng, num_tasks=3):
    """Features of which no two are ever on together, so that the posterior factorises."""
    made = []
    for _ in range(num_tasks):
        x = np.kron(np.eye(SIZE), np.ones((3, 1))) * rng.uniform(0.3, 1.5, size=(3 * SIZE, 1))
        made.append(Task({"x": x, "y": x @ rng.normal(size=SIZE) + NOISE * rng.normal(size=len(x))}))
    return made


def exact(stream, prior):
    """Mean and variance of the weights given all tasks, for orthogonal features."""
    x, y = (np.concatenate([task[name] for task in stream]) for name in "xy")
    precision = np.sum(x**2, axis=0) / NOISE**2 + prior**-2
    return x.T @ y / NOISE**2 / precision, 1 / precision


# elastic weight consolidation


@pytest.mark.usefixtures("x64")
def test_ewc_of_a_flat_prior_is_the_exact_posterior_of_orthogonal_features(rng):
    stream, prior = orthogonal_tasks(rng), 1e4
    beliefs = OnlineEWC(engine(prior, GaussNewton())).run(0, stream)
    for t, belief in enumerate(beliefs):
        mean, variance = exact(stream[: t + 1], prior)
        np.testing.assert_allclose(belief.mean, mean, rtol=1e-6)
        np.testing.assert_allclose(belief.precision.variance(), variance, rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_ewc_follows_its_recursion_at_any_strength_decay_and_power(rng):
    strength, decay, power = 2.5, 0.6, 1.7
    stream = tasks(rng)
    beliefs = OnlineEWC(engine(estimator=GaussNewton(), power=power), strength, decay).run(0, stream)
    mean, fisher = np.zeros(SIZE), np.zeros(SIZE)
    for task, belief in zip(stream, beliefs, strict=True):
        x, y = task["x"], task["y"]
        matrix = power * x.T @ x / NOISE**2 + np.diag(PRIOR**-2 + strength * fisher)
        mean = np.linalg.solve(matrix, power * x.T @ y / NOISE**2 + strength * fisher * mean)
        fisher = decay * fisher + power * np.sum(x**2, axis=0) / NOISE**2
        np.testing.assert_allclose(belief.mean, mean, rtol=1e-8)
        np.testing.assert_allclose(belief.precision.diagonal, PRIOR**-2 + strength * fisher, rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_the_fisher_of_classes_is_unbiased_over_its_signs(rng):
    """Softmax has as many columns as classes; each draw of the signs is right on average alone."""
    weights, x = rng.normal(size=(3, 4)), rng.normal(size=(5, 3))
    program = classification((lambda params, x: x @ params["w"], {"w": weights}))
    task = Task({"x": jnp.asarray(x), "y": jnp.zeros(5, int)}, mask=jnp.arange(5) < 4)
    p = np.exp(x @ weights)
    p /= p.sum(axis=1, keepdims=True)
    expected = (x[:4] ** 2).T @ (p * (1 - p))[:4]
    hypers, theta = {"noise.all": jnp.zeros(())}, jnp.asarray(weights.ravel())
    draws = jax.vmap(lambda key: diagonal_fisher(program, hypers, theta, task, key))(
        jax.random.split(jax.random.key(1), 4000)
    )
    error = np.std(draws, axis=0) / np.sqrt(4000)
    np.testing.assert_array_less(np.abs(np.mean(draws, axis=0) - expected.ravel()), 4.5 * error + 1e-12)


def test_the_fisher_does_not_depend_on_its_chunks(rng, monkeypatch):
    task = Task({"x": jnp.asarray(rng.normal(size=(7, SIZE))), "y": jnp.zeros(7)}, mask=jnp.arange(7) != 2)
    program, hypers = engine().program, {"noise.all": jnp.zeros(())}
    whole = diagonal_fisher(program, hypers, jnp.ones(SIZE), task, jax.random.key(0))
    monkeypatch.setattr(elastic_weights, "_CHUNK_NUMBERS", 3 * SIZE)
    chunked = diagonal_fisher.__wrapped__(program, hypers, jnp.ones(SIZE), task, jax.random.key(0))
    np.testing.assert_allclose(whole, chunked, rtol=1e-5)
    np.testing.assert_allclose(whole, np.sum(np.delete(task["x"], 2, 0) ** 2, axis=0) / NOISE**2, rtol=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("make", [OnlineEWC, SynapticIntelligence])
def test_without_strength_it_is_fine_tuning(rng, make):
    stream = tasks(rng)
    expected = FineTuning(engine()).run(3, stream)
    for belief, tuned in zip(make(engine(), strength=0.0).run(3, stream), expected, strict=True):
        np.testing.assert_allclose(belief.mean, tuned.mean, rtol=1e-10)


# synaptic intelligence


@pytest.mark.usefixtures("x64")
def test_importance_is_the_line_integral_along_the_path(rng):
    rate, epochs, strength, damping, power = 2e-3, 25, 0.8, 1e-2, 1.3
    stream = tasks(rng)
    settings = Minibatch(optax.sgd(rate), epochs=epochs, batch_size=8)  # the whole task
    trainer = SynapticIntelligence(engine(estimator=settings, power=power), strength, damping)
    state = trainer.init(0, stream[0])
    theta, importance = np.full(SIZE, 0.25), np.zeros(SIZE)
    for task in stream:
        x, y, start, path = task["x"], task["y"], theta.copy(), np.zeros(SIZE)
        for _ in range(epochs):
            slope = power * x.T @ (x @ theta - y) / NOISE**2
            pull = theta / PRIOR**2 + 2 * strength * importance * (theta - start)
            step = -rate * (slope + pull) / len(x)
            path -= slope * step
            theta = theta + step
        importance = importance + np.maximum(path, 0) / ((theta - start) ** 2 + damping)
        state, found = trainer.update(state, task)
        np.testing.assert_allclose(state.mean, theta, rtol=1e-9)
        np.testing.assert_allclose(state.importance, importance, rtol=1e-9)
        assert found.steps == epochs
        belief = trainer.belief(state, task)
        np.testing.assert_allclose(belief.precision.diagonal, PRIOR**-2 + 2 * strength * importance, rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_a_quadratic_loss_has_half_its_curvature_as_importance(rng):
    """Small steps to the minimum of one weight's loss, with hardly a prior and hardly any damping."""
    task = orthogonal_tasks(rng, 1)[0]
    settings = Minibatch(optax.sgd(4e-3), epochs=2500, batch_size=12, patience=100, tolerance=1e-13)
    trainer = SynapticIntelligence(engine(1e4, settings), damping=1e-12)
    state, _ = trainer.update(trainer.init(0, task), task)
    curvature = np.sum(task["x"] ** 2, axis=0) / NOISE**2
    np.testing.assert_allclose(2 * state.importance, curvature, rtol=2e-2)


# variational continual learning


@pytest.mark.usefixtures("x64")
def test_vcl_converges_to_the_exact_posterior_of_orthogonal_features(rng):
    stream = orthogonal_tasks(rng, 2)
    rate = optax.cosine_decay_schedule(0.04, 800)
    settings = Minibatch(optax.adam(rate), epochs=800, batch_size=12)
    trainer = VariationalContinual(engine(estimator=settings), initial_sigma=0.3, num_draws=32, sigma_rate=1.0)
    for t, belief in enumerate(trainer.run(0, stream)):
        mean, variance = exact(stream[: t + 1], PRIOR)
        np.testing.assert_allclose((belief.mean - mean) / np.sqrt(variance), 0, atol=0.07)
        np.testing.assert_allclose(belief.precision.variance(), variance, rtol=0.07)


@pytest.mark.usefixtures("x64")
def test_the_divergence_is_that_of_two_gaussians(rng):
    shift, sigma, prior = rng.normal(size=5), rng.uniform(0.1, 2, 5), rng.uniform(0.1, 2, 5)
    expected = np.sum(np.log(prior / sigma) + (sigma**2 + shift**2) / (2 * prior**2) - 0.5)
    trainer = VariationalContinual(engine())
    made = trainer.belief(trainer.init(0, tasks(rng)[0])._replace(sigma=jnp.asarray(prior))).precision
    assert float(divergence(shift, np.log(sigma), made)) == pytest.approx(expected)


@pytest.mark.usefixtures("x64")
def test_a_heavy_divergence_holds_the_belief_at_the_prior(rng):
    settings = Minibatch(optax.adam(optax.cosine_decay_schedule(0.04, 300)), epochs=300, batch_size=8)
    trainer = VariationalContinual(engine(estimator=settings), kl_weight=1e5, initial_sigma=PRIOR / 2, sigma_rate=1.0)
    belief = trainer.run(0, tasks(rng)[:1])[0]
    np.testing.assert_allclose(belief.mean, 0, atol=1e-2)
    np.testing.assert_allclose(belief.precision.variance(), PRIOR**2, rtol=1e-2)


# replay


@pytest.mark.usefixtures("x64")
def test_replay_of_everything_is_joint_training(rng):
    """Batches of all that there is, the memory twice over, so that nothing is left to chance."""
    stream = tasks(rng)[:2]
    settings = Minibatch(optax.sgd(5e-3), epochs=40, batch_size=32, prior_every=1)
    one = engine(estimator=settings)
    replayed, joint = Replay(one, examples_per_task=8), JointTraining(one)
    state, _ = replayed.update(replayed.init(0, stream[0]), stream[0])
    started = joint.init(0, stream[0])._replace(mean=state.mean)
    expected, joint_found = joint.update(started, stream)
    found_state, found = replayed.update(state, stream[1])
    np.testing.assert_allclose(found_state.mean, expected.mean, rtol=1e-10)
    assert found.objective == pytest.approx(float(joint_found.objective), rel=1e-10)
    assert not np.allclose(state.mean, expected.mean, atol=1e-3)


@pytest.mark.usefixtures("x64")
def test_the_memory_holds_counted_examples_and_what_they_stand_for(rng):
    memory = Memory({"x": jnp.zeros((0, 1)), "y": jnp.zeros(0)}, jnp.zeros(0))
    sizes = []
    for t, (size, counted) in enumerate([(10, 9), (6, 6), (2, 2), (5, 5)]):
        x = 100 * t + np.arange(size, dtype=float)
        task = Task({"x": x[:, None], "y": x}, mask=np.arange(size) < counted)
        memory = remember(memory, jax.tree.map(jnp.asarray, task), 3, jax.random.key(t))
        sizes.append(len(memory.weight))
    assert sizes == [3, 6, 12, 12]
    kept, weight = np.asarray(memory.data["y"]), np.asarray(memory.weight)
    np.testing.assert_allclose(weight, [3] * 3 + [2] * 3 + [1] * 2 + [5 / 3] * 3 + [0])
    np.testing.assert_array_equal(kept[:11] // 100, [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3])
    assert len(set(kept[:11])) == 11
    assert np.all(kept % 100 < 9)
    np.testing.assert_array_equal(memory.data["x"][:, 0], kept)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_each_example_is_recalled_as_often_as_its_weight_says(dtype):
    with jax.enable_x64(dtype == np.float64):
        weight = jnp.asarray([3.0, 1.0, 2.0, 2.0, 0.0, 0.0], dtype)
        for seed in range(20):
            often = np.bincount(recalled(weight, 21, jax.random.key(seed)), minlength=6)
            np.testing.assert_array_less(np.abs(often - 21 * np.asarray(weight) / 8), 1)
            np.testing.assert_array_equal(often[4:], 0)


# all of them


@pytest.mark.parametrize("make", ALL)
def test_a_task_without_data_changes_nothing(rng, make):
    stream = tasks(rng, dtype=np.float32)
    trainer = make(engine())
    state, _ = trainer.update(trainer.init(0, stream[0]), stream[0])
    for empty in (None, Task(stream[1].data, mask=np.zeros(8, bool))):
        after, found = trainer.update(state, empty)
        assert found is None
        assert int(after.step) == 2
        for left, right in zip(
            jax.tree.leaves(after._replace(step=0)), jax.tree.leaves(state._replace(step=0)), strict=True
        ):
            assert bool(jnp.all(left == right))


@pytest.mark.parametrize("make", ALL)
def test_data_that_cannot_be_learnt_from_are_refused_but_not_under_a_mask(rng, make):
    good = tasks(rng, dtype=np.float32)[0]
    x = good["x"].copy()
    x[3] = np.nan
    trainer = make(engine())
    state = trainer.init(0, good)
    with pytest.raises(ValueError, match="'x' of the task is not finite in 1 examples, the first at index 3"):
        trainer.update(state, Task({"x": x, "y": good["y"]}))
    after, _ = trainer.update(state, Task({"x": x, "y": good["y"]}, mask=np.arange(8) != 3))
    assert bool(jnp.all(jnp.isfinite(after.mean)))


@pytest.mark.parametrize("make", ALL)
def test_training_that_is_not_finite_warns_and_keeps_what_was_known(rng, make):
    stream = tasks(rng, dtype=np.float32)
    trainer = make(engine(estimator=Minibatch(optax.sgd(1e30), epochs=3, batch_size=4)))
    state = trainer.init(0, stream[0])
    with pytest.warns(FilterWarning, match=f"task 0: the training of {make.__name__} is not finite"):
        after, found = trainer.update(state, stream[0])
    assert found.status == NOT_FINITE
    for left, right in zip(jax.tree.leaves(after[2:]), jax.tree.leaves(state[2:]), strict=True):
        np.testing.assert_array_equal(left, right)


PASSES = {
    SynapticIntelligence: synaptic_intelligence._epoch,
    VariationalContinual: variational_continual._epoch,
    Replay: replay._epoch,
    OnlineEWC: diagonal_fisher,
}


@pytest.mark.parametrize("make", ALL)
def test_an_epoch_is_compiled_once_a_shape_whatever_the_strength(rng, make):
    stream, one = tasks(rng, (8, 8, 8, 8), np.float32), engine()
    before = PASSES[make]._cache_size()
    other = (
        {"share": 0.5} if make is Replay else {"kl_weight": 3.0} if make is VariationalContinual else {"strength": 3.0}
    )
    make(one).run(0, stream)
    make(one, **other).run(1, stream)
    # the memory of 200 a task holds all tasks here: empty, and not
    assert PASSES[make]._cache_size() - before == (2 if make is Replay else 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OnlineEWC(engine(), strength=-1.0), "strength is -1.0"),
        (lambda: OnlineEWC(engine(), decay=1.5), "decay is 1.5; a number from 0 to 1"),
        (lambda: SynapticIntelligence(engine(), strength=np.inf), "strength is inf"),
        (lambda: SynapticIntelligence(engine(), damping=0.0), "damping is 0.0; a finite number > 0"),
        (
            lambda: SynapticIntelligence(engine(estimator=GaussNewton())),
            "the engine's estimator is GaussNewton, but Syn",
        ),
        (lambda: VariationalContinual(engine(), minibatch=3), "minibatch is int, but VariationalContinual trains in"),
        (lambda: VariationalContinual(engine(), kl_weight=0.0), "kl_weight is 0.0"),
        (lambda: VariationalContinual(engine(), num_draws=0), "num_draws is 0"),
        (lambda: Replay(engine(), examples_per_task=0), "examples_per_task is 0"),
        (lambda: Replay(engine(), share=1.0), "share is 1.0; a number between 0 and 1"),
        (lambda: Replay(engine(), minibatch=Minibatch(batch_size=1)), "batch_size is 1"),
        (lambda: tune(None, [], [], None), "strengths is"),
        (lambda: tune(None, [1.0, 1.0], [], None), "strengths is"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# tuning


class Known:
    """A belief that is its strength."""

    def __init__(self, strength):
        self.strength = strength

    def run(self, key, tasks):
        return tuple(Belief(jnp.asarray(self.strength), None) for _ in tasks)


def test_tune_takes_the_best_score_and_passes_over_nan():
    scores = {1.0: 0.5, 2.0: np.nan, 3.0: 0.9, 4.0: 0.9, 5.0: 0.1}
    tuned = tune(Known, scores, iter([None, None]), lambda belief: scores[float(belief.mean)])
    assert tuned.strength == 3.0
    np.testing.assert_equal(tuned.scores, scores)
    assert not tuned.at_edge
    assert tune(Known, [3.0, 5.0], [None], lambda belief: float(belief.mean)).at_edge
    with pytest.raises(ValueError, match="score gave nan for every strength"):
        tune(Known, [2.0], [None], lambda belief: np.nan)


@pytest.mark.slow
def test_each_baseline_forgets_less_than_fine_tuning_on_permuted_digits():
    stream = permuted(load("digits"), 3, train_size=600, test_size=200, seed=2)
    train = [stream.train[t] for t in range(3)]
    program = classification(mlp((64, 32, 10), "relu", seed=1))
    hypers = {"noise.all": 0.0}

    def filter_of(power):
        estimator = Minibatch(optax.adam(5e-3), epochs=6, batch_size=32)
        return LaplaceFilter(program, Diagonal(), hypers=hypers, estimator=estimator, power=power)

    def score(belief):
        predictions = [predict_from(program, hypers, belief, task, method=AtMean())["y"] for task in stream.test]
        return np.mean([accuracy(p.probabilities, t["y"]) for p, t in zip(predictions, stream.test, strict=True)])

    one = filter_of(1.0)
    forgetful = score(FineTuning(one).run(0, train)[-1])
    for make, grid in (
        (lambda s: OnlineEWC(one, s), (3.0, 30.0)),
        (lambda s: SynapticIntelligence(one, s), (0.1, 1.0)),
        (lambda s: VariationalContinual(one, s), (0.03, 0.1)),
        (lambda s: Replay(one, int(s)), (20, 50)),
        (filter_of, (1.0,)),
    ):
        tuned = tune(make, grid, train, score)
        assert tuned.scores[tuned.strength] > forgetful + 0.03, (tuned, forgetful)
