"""Designs and look-ahead strategies, against dense algebra and against updates that are really made."""

import itertools

import jax
import numpy as np
import pytest
from scipy.stats import entropy

from ssm_nn.inference.last_layer.acquisition import Entropy, Margin, Pool, Random
from ssm_nn.inference.last_layer.acquisition_design import (
    BAIT,
    InformationGain,
    absorbed,
    fisher_probes,
    removal_costs,
    trace_gains,
)
from ssm_nn.inference.last_layer.acquisition_information import BALD, BatchBALD
from ssm_nn.inference.last_layer.acquisition_lookahead import ExpectedEntropy, Foreseen, Sequential, _entropy_falls
from ssm_nn.inference.last_layer.diagonal_head import DiagonalHead
from ssm_nn.inference.last_layer.full_covariance import Full
from ssm_nn.inference.last_layer.head_likelihoods import Bernoulli, Categorical, Gaussian
from ssm_nn.inference.last_layer.heads import feature_head
from ssm_nn.inference.last_layer.kronecker_head import KroneckerHead
from ssm_nn.inference.last_layer.last_layer_filter import LastLayerFilter
from ssm_nn.inference.last_layer.shared_covariance import Shared
from ssm_nn.inference.last_layer.square_root import SquareRoot

pytestmark = pytest.mark.usefixtures("x64")

N, WIDTH, CLASSES, KNOWN = 20, 3, 3, 8
KEY = jax.random.key(5)


def make_pool(likelihood=None, structure=None, precision=0.5):
    likelihood = Categorical(CLASSES) if likelihood is None else likelihood
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, WIDTH))
    y = rng.integers(0, 2, N) if likelihood.num_outputs == 1 else np.argmax(x + 0.3 * rng.normal(size=x.shape), axis=1)
    y = x[:, :1] if isinstance(likelihood, Gaussian) else y
    engine = LastLayerFilter(feature_head(likelihood, WIDTH, prior_precision=precision), structure or Full())
    state, _ = engine.update(engine.init(), {"x": x[:KNOWN], "y": y[:KNOWN]})
    left, known = np.arange(KNOWN, N), np.arange(KNOWN)
    return Pool(likelihood, state.belief, state.mean, engine.features(x), left, known), engine, state, x


@pytest.fixture(scope="module")
def made():
    with jax.enable_x64(True):
        return make_pool()


class Dense:
    """S and each point's J^T Lambda J (K D, K D), in NumPy."""

    def __init__(self, pool):
        f = pool.features @ np.asarray(pool.mean).T
        p = np.exp(f) / np.exp(f).sum(axis=1, keepdims=True)
        weights = [np.diag(row) - np.outer(row, row) for row in p]
        self.points = [np.kron(w, np.outer(phi, phi)) for w, phi in zip(weights, pool.features, strict=True)]
        self.precision = np.linalg.inv(np.asarray(pool.belief.matrix))
        self.candidates = pool.candidates

    def covariance(self, batch):
        return np.linalg.inv(self.precision + sum((self.points[n] for n in batch), np.zeros_like(self.precision)))

    def objective(self, batch):
        """tr(F S'), F over the whole pool."""
        return np.trace(sum(self.points) / len(self.points) @ self.covariance(batch))

    def information(self, batch):
        return 0.5 * (np.linalg.slogdet(self.covariance([]))[1] - np.linalg.slogdet(self.covariance(batch))[1])


@pytest.fixture(scope="module")
def dense(made):
    return Dense(made[0])


def test_baits_gains_and_costs_are_changes_of_the_dense_objective(made, dense):
    pool = made[0]
    phi_e = jax.numpy.asarray(pool.features)
    probes = fisher_probes(pool.likelihood, phi_e, pool.mean, N * CLASSES, KEY)
    gains = np.asarray(trace_gains(pool.belief, *pool.at_mean, phi_e, probes))[: len(pool.candidates)]
    expected = [dense.objective([]) - dense.objective([n]) for n in pool.candidates]
    np.testing.assert_allclose(gains, expected, rtol=1e-9)
    taken = [2, 7, 5]
    after = pool.belief
    for place in taken:
        after = absorbed(after, *pool.at_mean, place)
    costs = np.asarray(removal_costs(after, *pool.at_mean, np.array(taken), phi_e, probes))
    batch = pool.candidates[taken]
    expected = [dense.objective(np.delete(batch, n)) - dense.objective(batch) for n in range(3)]
    np.testing.assert_allclose(costs, expected, rtol=1e-9)


@pytest.mark.slow
def test_for_one_covariance_of_all_outputs_baits_gains_are_those_of_its_kronecker_product():
    pool, _, _, _ = make_pool(structure=Shared())
    covariance = np.kron(np.eye(CLASSES), np.asarray(pool.belief.covariance))
    f = pool.features @ np.asarray(pool.mean).T
    p = np.exp(f) / np.exp(f).sum(axis=1, keepdims=True)
    weights = [np.diag(row) - np.outer(row, row) for row in p]
    matrix = sum(np.kron(w, np.outer(phi, phi)) for w, phi in zip(weights, pool.features, strict=True)) / N
    gains, falls = [], []
    for n in pool.candidates:
        point = np.kron(
            np.trace(weights[n]) / (CLASSES - 1) * np.eye(CLASSES), np.outer(pool.features[n], pool.features[n])
        )
        after = np.linalg.inv(np.linalg.inv(covariance) + point)
        gains.append(np.trace(matrix @ (covariance - after)))
        falls.append(0.5 * (np.linalg.slogdet(covariance)[1] - np.linalg.slogdet(after)[1]))
    probes = fisher_probes(pool.likelihood, pool.features, pool.mean, N * CLASSES, KEY)
    found = trace_gains(pool.belief, *pool.at_mean, pool.features, probes)
    np.testing.assert_allclose(np.asarray(found)[: len(gains)], gains, rtol=1e-9)
    np.testing.assert_allclose(InformationGain().score(pool, KEY), falls, rtol=1e-9)


def test_bait_is_the_dense_forward_and_backward_search(made, dense):
    pool = made[0]
    batch, size = [], 3
    while len(batch) < 2 * size:
        left = [n for n in pool.candidates if n not in batch]
        batch.append(min(left, key=lambda n: dense.objective([*batch, n])))
    while len(batch) > size:
        batch.remove(min(batch, key=lambda n: dense.objective([b for b in batch if b != n])))
    np.testing.assert_array_equal(BAIT().select(pool, size, KEY), batch)


@pytest.mark.slow
def test_random_probes_make_baits_matrix_without_bias(made):
    pool = made[0]

    def matrix(num_probes, key):
        probes = np.asarray(fisher_probes(pool.likelihood, pool.features, pool.mean, num_probes, key))
        return np.einsum("rek,rgl->ekgl", probes, probes)

    exact = matrix(N * CLASSES, KEY)
    drawn = np.mean([matrix(50, jax.random.key(seed)) for seed in range(40)], axis=0)
    assert np.abs(exact).max() > 0.01
    np.testing.assert_allclose(drawn, exact, atol=0.0025)  # 2,000 probes, entries of 0.0125 at most: five deviations


def test_the_information_gain_is_the_fall_of_the_dense_determinant(made, dense):
    pool = made[0]
    expected = [dense.information([n]) for n in pool.candidates]
    np.testing.assert_allclose(InformationGain().score(pool, KEY), expected, rtol=1e-9)


def test_foreseen_information_is_the_greedy_design_of_the_dense_determinant(made, dense):
    pool, batch = made[0], []
    while len(batch) < 5:
        left = [n for n in pool.candidates if n not in batch]
        batch.append(max(left, key=lambda n: dense.information([*batch, n])))
    np.testing.assert_array_equal(Foreseen(InformationGain()).select(pool, 5, KEY), batch)
    assert set(InformationGain().select(pool, 5, KEY)) != set(batch)


def test_for_numbers_the_information_gain_is_exact():
    pool, _, _, _ = make_pool(Gaussian(0.4))
    phi = pool.features
    covariance = np.linalg.inv(np.eye(phi.shape[1]) + phi[:KNOWN].T @ phi[:KNOWN] / 0.4**2)
    variance = np.sum(phi[KNOWN:] @ covariance * phi[KNOWN:], axis=1)
    np.testing.assert_allclose(InformationGain().score(pool, KEY), 0.5 * np.log1p(variance / 0.4**2), rtol=1e-10)


@pytest.mark.slow
def test_where_the_outputs_are_nearly_known_bald_and_batch_bald_are_the_information_gain():
    pool, _, _, _ = make_pool(precision=2e3)
    dense = Dense(pool)
    gains = InformationGain().score(pool, KEY)
    assert gains.max() < 2e-3
    np.testing.assert_allclose(
        BALD(20_000).score(pool, KEY), gains, rtol=0.06
    )  # 20,000 draws of two degrees: 1.4 % of noise
    chosen = BatchBALD(20_000).select(pool, 3, KEY)
    best = max(dense.information(batch) for batch in itertools.combinations(pool.candidates, 3))
    assert dense.information(chosen) > 0.97 * best


def test_expected_entropy_is_what_updates_with_every_label_give(made):
    pool, engine, state, x = made

    def mean_entropy(state):
        return entropy(engine.predict(state, x).probabilities, axis=1).mean()

    p = engine.predict(state, x).probabilities
    expected = []
    for n in pool.candidates[:3]:
        after = [mean_entropy(engine.update(state, {"x": x[n : n + 1], "y": [c]})[0]) for c in range(CLASSES)]
        expected.append(mean_entropy(state) - p[n] @ after)
    scores = ExpectedEntropy().score(pool, KEY)
    np.testing.assert_allclose(scores[:3], expected, rtol=1e-7)


@pytest.mark.slow
def test_expected_entropy_reads_two_classes_of_one_output_as_of_two():
    pool, engine, state, x = make_pool(Bernoulli())
    p = engine.predict(state, x).probabilities
    after = [
        entropy(engine.predict(engine.update(state, {"x": x[-1:], "y": [c]})[0], x).probabilities, axis=1).mean()
        for c in (0, 1)
    ]
    expected = entropy(p, axis=1).mean() - p[-1] @ after
    np.testing.assert_allclose(ExpectedEntropy().score(pool, KEY)[-1], expected, rtol=1e-7)


@pytest.mark.parametrize(
    "strategy", [Random(), Margin(), Entropy(), BALD(20), InformationGain(), ExpectedEntropy()], ids=repr
)
def test_one_point_foreseen_is_the_strategy_itself(made, strategy):
    pool = made[0]
    for wrapped in (Foreseen(strategy), Sequential(strategy)):
        np.testing.assert_array_equal(wrapped.select(pool, 1, KEY), strategy.select(pool, 1, KEY))
    assert Sequential(strategy).at_once(10) == 1
    assert Foreseen(strategy).at_once(10) == 10


@pytest.mark.slow
def test_twins_are_not_all_foreseen(made):
    pool = made[0]
    best = int(InformationGain().select(pool, 1, KEY)[0])
    twins = np.concatenate([pool.features, np.repeat(pool.features[best : best + 1], 3, axis=0)])
    pool = Pool(pool.likelihood, pool.belief, pool.mean, twins, np.arange(KNOWN, N + 3), pool.labelled)
    same = {best, N, N + 1, N + 2}
    assert set(InformationGain().select(pool, 4, KEY).tolist()) == same
    assert len(same & set(Foreseen(InformationGain()).select(pool, 4, KEY).tolist())) <= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "structure", [SquareRoot(), Shared(), KroneckerHead(), DiagonalHead()], ids=lambda s: type(s).__name__
)
def test_every_structure_serves_every_strategy(structure):
    pool, _, _, _ = make_pool(structure=structure)
    for strategy in (BAIT(), InformationGain(), Foreseen(BALD(20)), ExpectedEntropy()):
        chosen = strategy.select(pool, 3, KEY)
        assert len(set(chosen.tolist())) == 3
        assert set(chosen.tolist()) <= set(pool.candidates.tolist())
    if isinstance(structure, SquareRoot):
        exact, _, _, _ = make_pool()
        np.testing.assert_array_equal(BAIT().select(pool, 3, KEY), BAIT().select(exact, 3, KEY))


@pytest.mark.slow
def test_designs_serve_numbers():
    pool, _, _, _ = make_pool(Gaussian(0.4))
    for strategy in (BAIT(), Foreseen(InformationGain()), Random()):
        assert len(set(strategy.select(pool, 4, KEY).tolist())) == 4
    with pytest.raises(ValueError, match="the likelihood is Gaussian"):
        ExpectedEntropy().select(pool, 1, KEY)


@pytest.mark.slow
def test_in_float32_the_choices_are_the_same(made):
    pool = made[0]
    with jax.enable_x64(False):
        single, _, _, _ = make_pool()
        assert single.mean.dtype == np.float32
        found = [strategy.select(single, 4, KEY) for strategy in (BAIT(), Foreseen(InformationGain()))]
    np.testing.assert_array_equal(found[0], BAIT().select(pool, 4, KEY))
    np.testing.assert_array_equal(found[1], Foreseen(InformationGain()).select(pool, 4, KEY))


def test_a_batch_compiles_nothing_that_an_earlier_one_has(made):
    pool, engine, state, x = made
    later, _ = engine.update(state, {"x": x[-1:], "y": [0]})
    smaller = Pool(pool.likelihood, later.belief, later.mean, pool.features, pool.candidates[:-1], np.arange(KNOWN + 1))
    pieces = (trace_gains, removal_costs, absorbed, _entropy_falls)
    strategies = (BAIT(), ExpectedEntropy(), Foreseen(InformationGain()))
    for strategy in strategies:
        strategy.select(pool, 3, KEY)
    before = [piece._cache_size() for piece in pieces]
    for strategy in strategies:
        strategy.select(smaller, 3, jax.random.key(9))
    assert [piece._cache_size() for piece in pieces] == before


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BAIT(num_probes=0), "num_probes is 0"),
        (lambda: ExpectedEntropy(num_evaluated=0), "num_evaluated is 0"),
        (lambda: Foreseen("margin"), "strategy is 'margin'"),
        (lambda: Sequential(None), "strategy is None"),
    ],
)
def test_bad_arguments_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
