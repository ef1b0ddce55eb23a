"""Strategies for choosing points to label, against enumeration and dense NumPy."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import entropy

from ssm_nn.inference.last_layer.acquisition import Entropy, Margin, Pool, Random
from ssm_nn.inference.last_layer.acquisition_diversity import BADGE, TypiClust, gradient_embedding, typicality
from ssm_nn.inference.last_layer.acquisition_information import BALD, BatchBALD, batch_information
from ssm_nn.inference.last_layer.full_covariance import Full
from ssm_nn.inference.last_layer.head_likelihoods import Bernoulli, Categorical, Gaussian
from ssm_nn.inference.last_layer.heads import feature_head
from ssm_nn.inference.last_layer.last_layer_filter import LastLayerFilter

pytestmark = pytest.mark.usefixtures("x64")

N, WIDTH, CLASSES, KNOWN = 20, 3, 3, 8
KEY = jax.random.key(5)


def make_pool(likelihood=None, precision=0.5, seed=0):
    """A pool of N points of which the first KNOWN are labelled, its engine and its state."""
    likelihood = Categorical(CLASSES) if likelihood is None else likelihood
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N, WIDTH))
    y = rng.integers(0, 2, N) if likelihood.num_outputs == 1 else np.argmax(x + 0.3 * rng.normal(size=x.shape), axis=1)
    engine = LastLayerFilter(feature_head(likelihood, WIDTH, prior_precision=precision), Full())
    state, _ = engine.update(engine.init(), {"x": x[:KNOWN], "y": y[:KNOWN]})
    left, known = np.arange(KNOWN, N), np.arange(KNOWN)
    return Pool(likelihood, state.belief, state.mean, engine.features(x), left, known), engine, state, x


@pytest.fixture(scope="module")
def made():
    with jax.enable_x64(True):
        return make_pool()


def of_draws(pool, num_samples, key):
    outputs = pool.drawn_outputs(num_samples, key)[:, : len(pool.candidates)]
    p = np.exp(outputs - outputs.max(axis=2, keepdims=True))
    return p / p.sum(axis=2, keepdims=True)


def joint_information(p, batch):
    """I(y_batch; W) of p (S, n, K), by a loop over every labelling."""
    total = 0.0
    for labels in itertools.product(range(p.shape[2]), repeat=len(batch)):
        given = np.prod([p[:, place, label] for place, label in zip(batch, labels, strict=True)], axis=0)
        total -= given.mean() * np.log(given.mean())
    return total - sum(entropy(p[:, place], axis=1).mean() for place in batch)


def test_margin_and_entropy_order_the_predictions(made):
    pool, engine, state, x = made
    p = engine.predict(state, x[KNOWN:]).probabilities
    best = -np.sort(-p, axis=1)
    by_margin = pool.candidates[np.argsort(best[:, 0] - best[:, 1])]
    np.testing.assert_array_equal(Margin().select(pool, 5, KEY), by_margin[:5])
    np.testing.assert_array_equal(Entropy().select(pool, 5, KEY), pool.candidates[np.argsort(-entropy(p, axis=1))][:5])


def test_points_of_the_same_score_come_in_random_order(made):
    pool, engine, _, _ = made
    state = engine.init()
    empty = Pool(pool.likelihood, state.belief, state.mean, pool.features, np.arange(N), np.zeros(0, int))
    for strategy in (Random(), Margin()):  # at the prior all margins are 0
        first = [int(strategy.select(empty, 1, jax.random.key(seed))[0]) for seed in range(40)]
        assert len(set(first)) > 12  # of 20 points; 17.4 are expected
    np.testing.assert_array_equal(np.sort(Random().select(empty, N, KEY)), np.arange(N))


def test_bald_is_the_mutual_information_by_enumeration(made):
    pool = made[0]
    p = of_draws(pool, 30, KEY)
    expected = [joint_information(p, [place]) for place in range(len(pool.candidates))]
    np.testing.assert_allclose(BALD(30).score(pool, KEY), expected, rtol=1e-10, atol=1e-14)
    assert min(expected) > 0


def test_the_information_of_a_batch_is_that_of_every_labelling(made):
    pool = made[0]
    p = of_draws(pool, 20, KEY)
    chosen = [4, 1, 7]
    found = batch_information(jnp.asarray(p), chosen, KEY, CLASSES**3)
    expected = [joint_information(p, [*chosen, place]) for place in range(p.shape[1]) if place not in chosen]
    np.testing.assert_allclose(np.delete(found, chosen), expected, rtol=1e-10)


def test_drawn_configurations_find_the_same_information(made):
    pool = made[0]
    p = of_draws(pool, 20, KEY)
    chosen = [4, 1, 7]
    exact = batch_information(jnp.asarray(p), chosen, KEY, CLASSES**3)
    drawn = np.mean(
        [batch_information(jnp.asarray(p), chosen, jax.random.key(seed), CLASSES**3 - 1) for seed in range(200)], axis=0
    )
    # 5,200 labellings of surprise with a deviation below 1 nat
    np.testing.assert_allclose(drawn, exact, atol=0.05)


def test_batch_bald_grows_by_the_best_point_and_begins_with_balds(made):
    pool = made[0]
    found = BatchBALD(20, 30).select(pool, 4, KEY)
    p = of_draws(pool, 20, jax.random.split(KEY, 3)[0])
    chosen = []
    for _ in range(4):
        gains = [-np.inf if n in chosen else joint_information(p, [*chosen, n]) for n in range(p.shape[1])]
        chosen.append(int(np.argmax(gains)))
    np.testing.assert_array_equal(found, pool.candidates[chosen])
    information = [joint_information(p, [n]) for n in range(p.shape[1])]
    assert found[0] == pool.candidates[np.argmax(information)]


@pytest.mark.parametrize(
    "likelihood",
    [Categorical(CLASSES), pytest.param(Bernoulli(), marks=pytest.mark.slow)],
    ids=["categorical", "bernoulli"],
)
def test_badge_embeds_points_by_the_gradient_at_their_most_probable_label(likelihood):
    pool, _, _, _ = make_pool(likelihood)
    embedding = gradient_embedding(pool)
    phi = pool.features[KNOWN:]
    likely = likelihood.distribution(jnp.asarray(phi) @ pool.mean.T).probs
    likely = np.asarray(likely).reshape(len(phi), -1)
    labels = likely.argmax(axis=1) if likely.shape[1] > 1 else (likely[:, 0] > 0.5).astype(int)

    def log_likelihood(weights, n):
        return likelihood.distribution(weights @ phi[n]).log_prob(labels[n])

    dense = np.stack([np.asarray(jax.grad(log_likelihood)(pool.mean, n)).ravel() for n in range(len(phi))])
    np.testing.assert_allclose(
        np.einsum("nk,nd->nkd", embedding.residuals, embedding.features).reshape(len(phi), -1), dense, atol=1e-12
    )
    np.testing.assert_allclose(embedding.squares(), np.sum(dense**2, axis=1), rtol=1e-12)
    np.testing.assert_allclose(embedding.squared_distances(3), np.sum((dense - dense[3]) ** 2, axis=1), atol=1e-12)


def test_badge_draws_by_squared_distance_after_the_largest_gradient(made):
    pool = made[0]
    pool = Pool(pool.likelihood, pool.belief, pool.mean, pool.features, pool.candidates[:5], pool.labelled)
    embedding = gradient_embedding(pool)
    vectors = np.einsum("nk,nd->nkd", embedding.residuals, embedding.features).reshape(5, -1)
    first = int(np.argmax(np.sum(vectors**2, axis=1)))
    far = np.sum((vectors - vectors[first]) ** 2, axis=1)
    draws = [BADGE().select(pool, 2, jax.random.key(seed)) for seed in range(400)]
    assert {int(pair[0]) for pair in draws} == {int(pool.candidates[first])}
    counts = np.array([sum(pair[1] == index for pair in draws) for index in pool.candidates])
    expected = 400 * far / far.sum()
    assert np.sum((counts - expected)[far > 0] ** 2 / expected[far > 0]) < 16.3  # chi-square of 3 degrees, p = 0.001
    np.testing.assert_array_equal(np.sort(BADGE().select(pool, 5, KEY)), pool.candidates)


def test_badge_goes_on_where_all_gradients_are_the_same(made):
    pool = made[0]
    same = np.repeat(pool.features[:1], 6, axis=0)
    pool = Pool(pool.likelihood, pool.belief, pool.mean, same, np.arange(6), np.zeros(0, int))
    np.testing.assert_array_equal(np.sort(BADGE().select(pool, 6, KEY)), np.arange(6))


def test_typicality_is_the_inverse_mean_distance_to_the_neighbours(rng):
    features = rng.normal(size=(9, 2))
    distances = np.linalg.norm(features[:, None] - features, axis=2)
    expected = [1 / np.mean(np.sort(np.delete(row, n))[:4]) for n, row in enumerate(distances)]
    np.testing.assert_allclose(typicality(features, 4), expected, rtol=1e-6)
    nearly_all = [1 / np.mean(np.delete(row, n)) for n, row in enumerate(distances)]
    np.testing.assert_allclose(typicality(features, 20), nearly_all, rtol=1e-6)


def test_typiclust_takes_the_thick_of_clusters_without_labels(made, rng):
    pool = made[0]
    centres = 20 * np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    sizes = [12, 10, 9, 6]
    blobs = np.repeat(np.arange(4), sizes)
    features = centres[blobs] + 0.5 * rng.normal(size=(sum(sizes), 2))
    labelled = np.array([0])
    candidates = np.arange(1, len(blobs))
    pool = Pool(pool.likelihood, pool.belief, pool.mean, features, candidates, labelled)
    chosen = TypiClust().select(pool, 3, KEY)
    np.testing.assert_array_equal(blobs[chosen], [1, 2, 3])  # the largest first; blob 0 has a label
    for blob, index in zip((1, 2, 3), chosen, strict=True):
        own = np.flatnonzero(blobs == blob)
        distances = np.linalg.norm(features[own][:, None] - features[own], axis=2)
        assert index == own[np.argmin(distances.sum(axis=1))]  # fewer than 20 neighbours: all count
    # more points than clusters of their own: no point twice, none that has a label
    many = TypiClust(max_clusters=4).select(pool, 30, KEY)
    assert len(set(many.tolist())) == 30
    assert 0 not in many


@pytest.mark.parametrize(
    "strategy", [Random(), Margin(), Entropy(), BALD(10), BatchBALD(10), BADGE(), TypiClust()], ids=repr
)
def test_a_strategy_repeats_itself_and_chooses_each_point_once(made, strategy):
    pool = made[0]
    chosen = strategy.select(pool, 6, KEY)
    np.testing.assert_array_equal(chosen, strategy.select(pool, 6, KEY))
    assert len(set(chosen.tolist())) == 6
    assert set(chosen.tolist()) <= set(pool.candidates.tolist())
    assert strategy.at_once(6) == 6


@pytest.mark.parametrize("strategy", [Margin(), Entropy(), BALD(), BatchBALD(), BADGE()], ids=repr)
def test_strategies_for_classes_refuse_numbers(made, strategy):
    with pytest.raises(ValueError, match="the likelihood is Gaussian"):
        strategy.select(replace(made[0], likelihood=Gaussian(0.4)), 1, KEY)


@pytest.mark.parametrize("strategy", [Random(), Margin(), BatchBALD(), BADGE(), TypiClust()], ids=repr)
@pytest.mark.parametrize(("size", "words"), [(0, "size is 0"), (13, "has 12 candidates left")])
def test_sizes_that_the_pool_has_not_are_refused(made, strategy, size, words):
    with pytest.raises(ValueError, match=words):
        strategy.select(made[0], size, KEY)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BALD(0), "num_samples is 0"),
        (lambda: BatchBALD(num_configurations=-1), "num_configurations is -1"),
        (lambda: TypiClust(max_clusters=0), "max_clusters is 0"),
    ],
)
def test_bad_arguments_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_scores_that_are_nan_are_reported(made):
    pool = made[0]
    broken = Pool(pool.likelihood, pool.belief, pool.mean * np.nan, pool.features, pool.candidates, pool.labelled)
    with pytest.raises(ValueError, match="scores are nan"):
        Entropy().select(broken, 1, KEY)
