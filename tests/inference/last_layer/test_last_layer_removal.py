"""Points taken back leave no trace; ids, new classes, a walking head, and what is refused."""

import pickle
from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import pytest

from ssm_nn.inference.last_layer.conditioning import condition_few
from ssm_nn.inference.last_layer.diagonal_head import DiagonalHead
from ssm_nn.inference.last_layer.full_covariance import Full
from ssm_nn.inference.last_layer.head_likelihoods import Bernoulli, Categorical, Gaussian, Poisson
from ssm_nn.inference.last_layer.head_predictions import AtMode, MonteCarlo, Probit
from ssm_nn.inference.last_layer.heads import feature_head
from ssm_nn.inference.last_layer.kronecker_head import KroneckerHead
from ssm_nn.inference.last_layer.last_layer_filter import LastLayerFilter
from ssm_nn.inference.last_layer.published_rule import PublishedRule
from ssm_nn.inference.last_layer.shared_covariance import Shared
from ssm_nn.inference.last_layer.sites import Sites
from ssm_nn.inference.last_layer.square_root import SquareRoot

WIDTH = 3


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(5)
    return rng.normal(size=(32, WIDTH)), rng.integers(0, 3, 32)


def batch(data, start, stop):
    return {"x": data[0][start:stop], "y": data[1][start:stop]}


def engine_of(structure=None, likelihood=None, **kwargs):
    return LastLayerFilter(feature_head(likelihood or Categorical(3), WIDTH, prior_precision=0.5), structure, **kwargs)


def assert_same_belief(one, two, atol):
    np.testing.assert_allclose(one.mean, two.mean, rtol=0, atol=atol)
    np.testing.assert_allclose(one.belief.variance(), two.belief.variance(), rtol=0, atol=atol)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "structure",
    [
        Full(),
        KroneckerHead(),
        *(pytest.param(s, marks=pytest.mark.slow) for s in (SquareRoot(), Shared(), DiagonalHead())),
    ],
    ids=str,
)
def test_a_removed_point_leaves_no_trace(structure, data):
    engine = engine_of(structure)
    before, _ = engine.update(engine.init(), batch(data, 0, 8))
    after, _ = engine.update(before, batch(data, 8, 16))
    back, info = engine.remove(after, np.arange(8, 16))
    assert info.num_points == 8
    assert_same_belief(back, before, 1e-10)  # the last batch taken back: as it was, without a sweep
    # a point from the middle, then a sweep: as if it had never come
    rest, _ = engine.remove(after, [3])
    swept, _ = engine.sweep(rest)
    keep = np.delete(np.arange(16), 3)
    never, _ = engine.sweep(engine.update(engine.init(), {"x": data[0][keep], "y": data[1][keep]})[0])
    assert_same_belief(swept, never, 1e-8)
    assert 3 not in swept.sites.ids
    nothing, _ = engine.remove(before, np.arange(8))
    assert_same_belief(nothing, engine.init(), 0)


def test_ids_that_no_point_has_are_refused(data):
    engine = engine_of(Full())
    state, _ = engine.update(engine.init(), batch(data, 0, 8), ids=np.arange(100, 108))
    for ids, words in (
        ([99], r"ids holds \[99\], which no point has; the state holds 8 points"),
        (np.arange(100, 109), r"ids holds \[108\]"),
        ([100, 100], "ids holds 100 more than once"),
        ([0.5], "whole numbers of shape"),
    ):
        with pytest.raises(ValueError, match=words):
            engine.remove(state, ids)
    with pytest.raises(ValueError, match=r"ids holds \[101\], which points of the state have already"):
        engine.update(state, batch(data, 8, 10), ids=[101, 5])
    state, _ = engine.update(state, batch(data, 8, 10))
    assert state.sites.ids[-2:].tolist() == [108, 109]
    same, _ = engine.remove(state, [])
    assert same is state
    forgetful = engine_of(Full(), keep_sites=False)
    state, _ = forgetful.update(forgetful.init(), batch(data, 0, 8))
    assert state.sites.num_points == 0
    for call in (lambda: forgetful.remove(state, [0]), lambda: forgetful.sweep(state)):
        with pytest.raises(ValueError, match="keep_sites is False"):
            call()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: feature_head(Categorical(3), 3, prior_precision=0.0), "prior_precision is 0.0; a finite number > 0"),
        (lambda: feature_head(Categorical(3), 3, prior_precision=-1.0), "prior_precision is -1.0"),
        (lambda: feature_head(Categorical(3), 0), "num_features is 0"),
        (lambda: feature_head("softmax", 3), "likelihood is 'softmax'; Categorical"),
        (lambda: Categorical(1), "num_classes is 1; a whole number >= 2"),
        (lambda: Gaussian(0.0), "noise_scale is 0.0; a finite number > 0"),
        (lambda: LastLayerFilter("head"), "head is str"),
        (lambda: engine_of("full"), "structure is 'full'; Full()"),
        (lambda: PublishedRule(engine_of(Shared()), gamma=0.0), "gamma is 0.0; a finite number > 0"),
        (lambda: PublishedRule(engine_of(Full())), "engine is not one with structure"),
        (lambda: MonteCarlo(0), "num_samples is 0"),
        (lambda: engine_of(Full()).with_scale(0.0), "scale is"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(make, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(").replace(")", r"\)")):
        make()


def test_bad_batches_are_refused_and_an_empty_one_changes_nothing(data):
    engine = engine_of(Full())
    x, y = data[0][:4], data[1][:4]
    broken = x.copy()
    broken[2, 0] = np.nan
    for bad, words in (
        ({"x": x, "y": [0, 1, 2, 3]}, "y is 3 at index 3; whole numbers from 0 to 2 are accepted"),
        ({"x": x, "y": [0, -1, 2, 1]}, "y is -1 at index 1"),
        ({"x": x, "y": [0, 0.5, 2, 1]}, "y is 0.5 at index 1"),
        ({"x": x[:, :2], "y": y}, r"x has shape \(4, 2\); \(n, 3\) is accepted"),
        ({"x": broken, "y": y}, "1 points are not finite, the first at index 2"),
        ({"x": x, "y": y[:3]}, "4 inputs and 3 labels"),
        ({"x": x}, "the batch has no 'y'"),
    ):
        with pytest.raises(ValueError, match=words):
            engine.update(engine.init(), bad)
    for weights in (np.ones(3), -np.ones(4), np.full(4, np.nan)):
        with pytest.raises(ValueError, match="weights has shape"):
            engine.update(engine.init(), {"x": x, "y": y}, weights=weights)
    for likelihood, labels, words in (
        (Bernoulli(), [0, 1, 2, 0], "y is 2 at index 2; 0 and 1 are accepted"),
        (Poisson(), [0, 1, -2, 0], "y is -2 at index 2; whole numbers >= 0"),
        (Gaussian(1.0), [0.0, np.inf, 0.0, 0.0], "not finite"),
    ):
        other = engine_of(Full(), likelihood)
        with pytest.raises(ValueError, match=words):
            other.update(other.init(), {"x": x, "y": labels})
    state = engine.init()
    same, info = engine.update(state, {"x": x[:0], "y": y[:0]})
    assert same is state
    assert info.num_points == 0


@pytest.mark.parametrize(
    "structure", [Full(), *(pytest.param(s, marks=pytest.mark.slow) for s in (KroneckerHead(),))], ids=str
)
def test_large_logits_and_many_classes_stay_finite(structure):
    rng = np.random.default_rng(0)
    x = np.array([[1e4], [-1e4], [1e4]])
    head = feature_head(Categorical(2), 1, prior_precision=1.0, intercept=False)
    engine = LastLayerFilter(head, structure)
    state, info = engine.update(engine.init(), {"x": x, "y": [0, 1, 1]})
    assert np.isfinite(info.log_evidence)
    many = LastLayerFilter(
        feature_head(Categorical(1000), 2), DiagonalHead() if isinstance(structure, Full) else structure
    )
    state, info = many.update(many.init(), {"x": rng.normal(size=(1, 2)), "y": [999]})
    assert info.status == 0
    p = many.predict(state, rng.normal(size=(5, 2))).probabilities
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-5)
    assert np.isfinite(np.log(p)).all()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "structure", [Full(), *(pytest.param(s, marks=pytest.mark.slow) for s in (Shared(), DiagonalHead()))], ids=str
)
def test_a_class_that_comes_later_ends_as_if_it_had_been_there(structure, data):
    small, large = engine_of(structure, Categorical(2)), engine_of(structure, Categorical(3))
    x, y = data
    old = y < 2
    state, _ = small.update(small.init(), {"x": x[old], "y": y[old]})
    engine, state = small.grow(state, 1)
    p = engine.predict(state, x).probabilities  # an unseen class is not impossible
    assert p.shape == (32, 3)
    assert (p[:, 2] > 0.01).all()
    state, _ = engine.update(state, {"x": x[~old], "y": y[~old]})
    swept, _ = engine.sweep(state)
    whole, _ = large.update(large.init(), {"x": x, "y": y})
    assert_same_belief(swept, whole, 1e-8)
    before, _ = engine.remove(state, state.sites.ids[-int((~old).sum()) :])  # the old sites are as they were
    np.testing.assert_allclose(
        before.mean[:2], small.update(small.init(), {"x": x[old], "y": y[old]})[0].mean, atol=1e-8
    )


def test_the_structure_goes_by_size_and_says_why():
    def chosen(classes, width):
        return LastLayerFilter(feature_head(Categorical(classes), width, intercept=False)).choice

    assert isinstance(chosen(10, 257).structure, Full)
    banking = chosen(77, 384)
    assert isinstance(banking.structure, KroneckerHead)
    assert "K = 77, D = 384" in banking.reason
    assert "29568 x 29568" in banking.reason
    assert isinstance(chosen(10, 10_000).structure, DiagonalHead)


def test_updates_of_similar_sizes_compile_once(data):
    engine = engine_of(Full())
    state, _ = engine.update(engine.init(), batch(data, 0, 8))
    before = condition_few._cache_size()
    for start, stop in ((8, 15), (15, 23), (23, 30)):  # 7, 8 and 7 points
        state, _ = engine.update(state, batch(data, start, stop))
    other = engine.with_scale(2.0)
    other.update(other.init(), batch(data, 0, 7))
    assert condition_few._cache_size() == before


def test_points_of_many_small_updates_are_copied_a_few_times_and_states_stay_apart():
    def one(n):
        values = [np.full((1, 2), n), np.full((1, 3), n), np.full(1, n), np.full(1, n), np.full(1, n), np.full(1, n)]
        return Sites(*values)

    sites, buffers, every = one(0), set(), []
    for n in range(1, 400):
        every.append(sites)
        sites = sites.plus(one(n))
        buffers.add(sites.features.ctypes.data)
    assert len(buffers) < 20
    early = next(one for one, two in pairwise(every[100:]) if one.ids.ctypes.data == two.ids.ctypes.data)
    start = early.num_points
    other = early.plus(one(-1)).plus(one(-2))  # from a state whose room another has taken
    for kept in (*every, sites):
        assert kept.ids.tolist() == list(range(kept.num_points))
    np.testing.assert_array_equal(sites.features[:, 1], np.arange(400))
    assert other.ids.tolist() == [*range(start), -1, -2]
    turned = Sites(*(part[::-1] for part in early)).plus(one(7))
    assert turned.ids.tolist() == [*range(start - 1, -1, -1), 7]
    assert pickle.loads(pickle.dumps(sites)).plus(one(400)).ids.tolist() == list(range(401))


def test_a_long_float32_stream_of_ill_conditioned_features_stays_right_in_square_root_form():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(96, 6)) * np.logspace(0, -2, 6) + 1.0
    y = x @ rng.normal(size=(6, 1)) + 0.1 * rng.normal(size=(96, 1))
    head = feature_head(Gaussian(0.1), 6, prior_precision=1e-4)
    phi = np.column_stack([np.float32(x), np.ones(96)])
    exact = np.linalg.solve(1e-4 * np.eye(7) + phi.T @ phi / 0.01, phi.T @ np.float32(y) / 0.01)
    errors = {}
    for structure in (Full(), SquareRoot()):
        engine = LastLayerFilter(head, structure, keep_sites=False)
        state = engine.init()
        for start in range(0, 96, 8):
            state, _ = engine.update(state, {"x": x[start : start + 8], "y": y[start : start + 8]})
        fitted = phi @ engine.weights(state).T
        errors[structure] = np.abs(fitted - phi @ exact).max() / np.abs(phi @ exact).max()
    assert errors[SquareRoot()] < 1e-4
    assert errors[SquareRoot()] < 0.1 * errors[Full()]


def test_methods_are_objects(data):
    engine = engine_of(Full())
    with pytest.raises(ValueError, match=r"method is 'probit'; Probit\(\)"):
        engine.predict(engine.init(), data[0], "probit")
    with pytest.raises(ValueError, match="x holds no point"):
        engine.predict(engine.init(), data[0][:0])
    assert engine.predict(engine.init(), data[0], Probit()).probabilities.shape == (32, 3)
    assert engine.predict(engine.init(), {"x": data[0], "y": data[1]}, AtMode()).log_density.shape == (32,)
    assert jnp.ndim(engine.init().mean) == 2
