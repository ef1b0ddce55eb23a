"""The loop of active learning: what it asks, what it keeps, and what it says of itself."""

import io

import jax
import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from ssm_nn.inference.checkpoints import CheckpointError
from ssm_nn.inference.last_layer import active_learner
from ssm_nn.inference.last_layer.acquisition import Margin, Random, Strategy
from ssm_nn.inference.last_layer.acquisition_curves import (
    LearningCurve,
    curves_datatree,
    paired_difference,
    plot_curves,
    scores_of,
)
from ssm_nn.inference.last_layer.acquisition_lookahead import Sequential
from ssm_nn.inference.last_layer.acquisition_progress import LabellingBar
from ssm_nn.inference.last_layer.active_learner import ActiveLearner
from ssm_nn.inference.last_layer.full_covariance import Full
from ssm_nn.inference.last_layer.head_likelihoods import Categorical
from ssm_nn.inference.last_layer.heads import feature_head
from ssm_nn.inference.last_layer.last_layer_filter import LastLayerFilter
from ssm_nn.inference.metrics import accuracy, nll

pytestmark = pytest.mark.usefixtures("x64")

N, WIDTH, CLASSES, BATCH = 40, 3, 3, 2
BEFORE = [3, *range(10, 18)]  # ids of nine earlier labels: with up to seven more one size is compiled
GENERATOR = np.random.default_rng(3)
X = GENERATOR.normal(size=(N + 30, WIDTH))
Y = np.argmax(X + 0.5 * GENERATOR.normal(size=X.shape), axis=1)
POOL, LABELS, TEST = X[:N], Y[:N], {"x": X[N:], "y": Y[N:]}


@pytest.fixture(scope="module")
def engine():
    with jax.enable_x64(True):
        return LastLayerFilter(feature_head(Categorical(CLASSES), WIDTH, prior_precision=0.5), Full())


def learner_of(engine, strategy=None, **named):
    named = {"batch_size": BATCH, "start": started(engine)} | named
    return ActiveLearner(engine, Margin() if strategy is None else strategy, POOL, **named)


def started(engine):
    return engine.update(engine.init(), {"x": X[N : N + 9], "y": Y[N : N + 9]}, ids=BEFORE)[0]


def same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.fixture(scope="module")
def finished(engine):
    with jax.enable_x64(True):
        return learner_of(engine).run(LABELS.__getitem__, 3, TEST)


def test_the_belief_is_that_of_all_labels_at_once(engine, finished):
    state, _ = finished
    places = np.concatenate([np.arange(N, N + 9), state.chosen])
    all_at_once, _ = engine.update(engine.init(), {"x": X[places], "y": Y[places]})
    np.testing.assert_allclose(state.head.mean, all_at_once.mean, atol=1e-8)
    np.testing.assert_allclose(state.head.belief.matrix, all_at_once.belief.matrix, atol=1e-8)
    np.testing.assert_array_equal(state.head.sites.ids, [*BEFORE, *(18 + state.chosen)])


def test_the_curve_says_what_the_predictions_score(engine, finished):
    state, curve = finished
    assert curve.num_labelled.tolist() == [9, 11, 13, 15]
    assert len(set(curve.chosen.tolist())) == 6
    p = engine.predict(state.head, TEST["x"]).probabilities
    assert curve.scores["accuracy"][-1] == accuracy(p, TEST["y"])
    p = engine.predict(started(engine), TEST["x"]).probabilities
    assert curve.scores["nll"][0] == nll(p, TEST["y"])


def test_asking_and_telling_by_hand_is_the_run(engine, finished):
    learner = learner_of(engine)
    state = learner.init()
    for _ in range(3):
        indices = learner.ask(state)
        np.testing.assert_array_equal(indices, learner.ask(state))
        assert len(indices) == BATCH
        state, _ = learner.tell(state, indices, LABELS[indices])
    same(state, finished[0])


def test_a_run_that_was_killed_goes_on_with_the_same_result(engine, finished, tmp_path, monkeypatch):
    path, save, written = tmp_path / "run.npz", active_learner.save, []

    def killed_at_the_second(place, tree):
        written.append(place)
        if len(written) == 2:
            raise KeyboardInterrupt
        save(place, tree)

    monkeypatch.setattr(active_learner, "save", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        learner_of(engine).run(LABELS.__getitem__, 3, TEST, path=path)
    monkeypatch.setattr(active_learner, "save", save)
    asked = []

    def oracle(indices):
        asked.extend(indices.tolist())
        return LABELS[indices]

    state, curve = learner_of(engine).run(oracle, 3, TEST, path=path)
    assert len(asked) == 2 * BATCH
    same(state, finished[0])
    same(curve.scores, finished[1].scores)
    np.testing.assert_array_equal(curve.chosen, finished[1].chosen)
    with pytest.raises(CheckpointError, match="of another learner"):
        learner_of(engine, seed=1).run(LABELS.__getitem__, 3, TEST, path=path)


def test_sequential_learns_between_the_labels_of_a_batch(engine):
    one_by_one, _ = learner_of(engine, Sequential(Margin()), batch_size=6).run(LABELS.__getitem__, 1, TEST)
    single = learner_of(engine, batch_size=100)
    state = single.init()
    for _ in range(6):
        indices = single.ask(state, 1)
        state, _ = single.tell(state, indices, LABELS[indices])
    np.testing.assert_array_equal(one_by_one.chosen, state.chosen)
    plain = learner_of(engine, batch_size=6)
    at_once = plain.ask(plain.init())
    assert one_by_one.chosen[0] == at_once[0]
    assert one_by_one.chosen.tolist() != at_once.tolist()


def test_a_run_may_be_made_longer_and_looks_at_so_many_candidates(engine, tmp_path):
    learner = learner_of(engine, Random(), candidates=5)
    state, _ = learner.run(LABELS.__getitem__, 2, TEST, path=tmp_path / "run.npz")
    again, curve = learner.run(LABELS.__getitem__, 3, TEST, path=tmp_path / "run.npz")
    np.testing.assert_array_equal(again.chosen[:4], state.chosen)
    np.testing.assert_array_equal(again.head.sites.features[:13], state.head.sites.features)
    assert curve.num_labelled.tolist() == [9, 11, 13, 15]


class Looks(Strategy):
    """Remembers what it was shown."""

    def select(self, pool, size, key):
        self.pool = pool
        return Random().select(pool, size, key)


def test_a_strategy_sees_what_is_labelled_also_before_the_pool(engine):
    looks = Looks()
    learner = learner_of(engine, looks)
    state, _ = learner.tell(learner.init(), [5, 9], LABELS[[5, 9]])
    chosen = learner.ask(state, 3)
    np.testing.assert_array_equal(
        looks.pool.features[looks.pool.labelled], engine.features(X[[5, 9, *range(N, N + 9)]])
    )
    assert not set(chosen.tolist()) & {5, 9}
    assert chosen.max() < N


def test_the_last_points_of_a_pool_are_asked_for(engine):
    learner = ActiveLearner(engine, Random(), POOL[:5], batch_size=2, start=started(engine))
    state, _ = learner.run(LABELS.__getitem__, 2, TEST)
    indices = learner.ask(state)
    assert len(indices) == 1
    state, _ = learner.tell(state, indices, LABELS[indices])
    np.testing.assert_array_equal(np.sort(state.chosen), np.arange(5))
    with pytest.raises(ValueError, match="all 5 points"):
        learner.ask(state)


def test_the_bar_shows_labels_and_scores(engine):
    text = io.StringIO()
    with LabellingBar(2, console=Console(file=text, force_terminal=True, width=160)) as bar:
        learner_of(engine, Random()).run(LABELS.__getitem__, 2, TEST, progress=bar)
    assert "13 labels" in text.getvalue()
    assert "accuracy" in text.getvalue()


def made_curves():
    def curve(shift):
        labels = np.array([5, 7, 11])
        return LearningCurve(labels, {"accuracy": np.array([0.2, 0.4, 0.8]) + shift}, np.ones(2), np.arange(6))

    return {"first": [curve(0.1), curve(0.05)], "second": [curve(0.0), curve(0.0)]}


def test_the_area_is_the_mean_over_labels():
    curve = made_curves()["second"][0]
    assert curve.area() == pytest.approx((2 * 0.3 + 4 * 0.6) / 6)


def test_curves_become_a_datatree_and_a_picture(tmp_path):
    curves = made_curves()
    tree = curves_datatree(curves, [4, 9])
    assert tree["learning_curves"]["accuracy"].dims == ("strategy", "seed", "num_labelled")
    assert tree["areas"]["accuracy"].sel(strategy="first", seed=9).item() == pytest.approx(curves["first"][1].area())
    assert tree["choices"]["index"].shape == (2, 2, 6)
    assert np.isnan(tree["learning_curves"]["seconds"].values[..., 0]).all()
    tree.to_netcdf(tmp_path / "curves.nc")
    axis = plot_curves(tree, "accuracy")
    np.testing.assert_allclose(axis.lines[0].get_ydata(), [0.275, 0.475, 0.875])
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["first", "second"]


def test_paired_intervals_are_students(rng):
    first, second = rng.normal(size=8), rng.normal(size=8)
    found = paired_difference(first, second)
    expected = scipy.stats.ttest_rel(first, second).confidence_interval(0.95)
    np.testing.assert_allclose([found.low, found.high], expected)
    assert found.num_seeds == 8


def test_numbers_are_scored_by_their_error():
    from ssm_nn.inference.predictive import Prediction

    fields = dict.fromkeys(Prediction._fields)
    prediction = Prediction(**(fields | {"mean": np.array([[1.0], [2.0]]), "log_density": np.array([-1.0, -3.0])}))
    assert scores_of(prediction, np.array([1.0, 4.0])) == {"nll": 2.0, "rmse": pytest.approx(np.sqrt(2))}


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda learner, state: learner.tell(state, [50], [0]), "indices runs from 50 to 50; 0 to 39"),
        (lambda learner, state: learner.tell(state, [1, 1], [0, 0]), "each once"),
        (lambda learner, state: learner.tell(state, [1.5], [0]), "whole numbers"),
        (lambda learner, state: learner.tell(state, state.chosen[:1], [0]), "whose labels are known"),
        (lambda learner, state: learner.tell(state, np.setdiff1d(np.arange(9), state.chosen)[:1], [7]), "y is 7"),
        (lambda learner, state: learner.run(LABELS.__getitem__, 21, TEST), "num_batches is 21: 42 labels"),
        (lambda learner, state: learner.run(LABELS.__getitem__, 1, {"x": POOL}), "test has"),
        (lambda learner, state: learner_of(learner.engine, "margin"), "strategy is 'margin'"),
        (lambda learner, state: learner_of(learner.engine, batch_size=0), "batch_size is 0"),
        (lambda learner, state: learner_of(learner.engine, candidates=1), "candidates is 1; a whole number >= 2"),
        (lambda learner, state: learner_of(learner.engine, seed=-1), "seed is -1"),
        (lambda learner, state: ActiveLearner(learner.engine, Margin(), POOL[:, :2]), r"\(40, 2\)"),
        (lambda learner, state: ActiveLearner(learner.engine, Margin(), np.full((4, WIDTH), np.nan)), "not finite"),
        (lambda learner, state: made_curves()["first"][0].area("nll"), "score is 'nll'"),
        (lambda learner, state: curves_datatree(made_curves(), [0]), "one a seed"),
        (lambda learner, state: paired_difference([1.0], [2.0]), "at least 2 seeds"),
    ],
)
def test_bad_input_is_named(engine, finished, act, words):
    with pytest.raises(ValueError, match=words):
        act(learner_of(engine), finished[0])


def test_labels_that_come_to_nothing_are_reported(engine, monkeypatch):
    learner = learner_of(engine)
    broken = learner.init()._replace(head=engine.init()._replace(mean=engine.init().mean * np.nan))
    with pytest.warns(match="not finite"), pytest.raises(FloatingPointError, match="were not taken in"):
        learner.tell(broken, [0, 1], LABELS[:2])
