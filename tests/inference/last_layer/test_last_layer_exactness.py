"""Last-layer updates against dense NumPy: closed forms for Gaussian labels, Newton's method on all points for the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_nn.inference.last_layer.conditioning import condition_few
from ssm_nn.inference.last_layer.diagonal_head import DiagonalHead
from ssm_nn.inference.last_layer.full_covariance import Full, information_matrix
from ssm_nn.inference.last_layer.head_likelihoods import Bernoulli, Categorical, Gaussian, Poisson
from ssm_nn.inference.last_layer.heads import feature_head
from ssm_nn.inference.last_layer.kronecker_head import KroneckerHead
from ssm_nn.inference.last_layer.last_layer_filter import LastLayerFilter
from ssm_nn.inference.last_layer.shared_covariance import Shared
from ssm_nn.inference.last_layer.square_root import SquareRoot

pytestmark = pytest.mark.usefixtures("x64")

N, WIDTH, TAU = 24, 3, 0.7
EXACT = [Full(), SquareRoot()]
APPROXIMATE = [Shared(), KroneckerHead(), DiagonalHead()]
LIKELIHOODS = {
    "categorical": Categorical(3),
    "bernoulli": Bernoulli(),
    "poisson": Poisson(),
    "gaussian": Gaussian(0.4, 2),
}


def points(likelihood, seed=0, num=N, width=WIDTH):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num, width))
    if isinstance(likelihood, Categorical):
        y = rng.integers(0, likelihood.num_classes, num)
    elif isinstance(likelihood, Bernoulli):
        y = (x[:, 0] + rng.normal(size=num) > 0).astype(int)
    elif isinstance(likelihood, Poisson):
        y = rng.poisson(np.exp(0.5 * x[:, 0]))
    else:
        y = x[:, :1] + rng.normal(size=(num, likelihood.num_outputs))
    return x, y


def engine_of(likelihood, structure=None, width=WIDTH):
    return LastLayerFilter(feature_head(likelihood, width, prior_precision=TAU), structure)


def in_parts(engine, x, y, sizes, **kwargs):
    state, infos, start = engine.init(), [], 0
    for size in sizes:
        state, info = engine.update(state, {"x": x[start : start + size], "y": y[start : start + size]}, **kwargs)
        infos.append(info)
        start += size
    return state, infos


def dense_gaussian(x, y, noise):
    """Mean (K, D) and covariance (D, D) of one output, and the log evidence, of ridge regression."""
    phi = np.column_stack([x, np.ones(len(x))])
    covariance = np.linalg.inv(TAU * np.eye(phi.shape[1]) + phi.T @ phi / noise**2)
    total = noise**2 * np.eye(len(x)) + phi @ phi.T / TAU
    evidence = -0.5 * np.sum(y * np.linalg.solve(total, y))
    evidence -= 0.5 * y.shape[1] * np.linalg.slogdet(2 * np.pi * total)[1]
    return y.T @ phi @ covariance / noise**2, covariance, evidence


def log_joint(likelihood, x, y, weights=1.0):
    """Of the weights (K, D) as a vector, in JAX for its derivatives, from nothing of the engine but the density."""
    phi = jnp.column_stack([x, jnp.ones(len(x))])

    def value(vector):
        w = vector.reshape(-1, phi.shape[1])
        return jnp.sum(weights * likelihood.distribution(phi @ w.T).log_prob(y)) - TAU / 2 * vector @ vector

    return value


def dense_mode(value, size):
    vector = np.zeros(size)
    value, derivatives = jax.jit(value), jax.jit(lambda v: (jax.grad(value)(v), jax.hessian(value)(v)))
    while True:
        gradient, hessian = map(np.asarray, derivatives(vector))
        step = -np.linalg.solve(hessian, gradient)
        length = 1.0
        while value(vector + length * step) < value(vector) - 1e-10:
            length /= 2
        vector = vector + length * step
        if np.abs(step).max() < 1e-10:
            return vector, np.linalg.inv(-hessian)


def covariance_of(engine, state):
    """(K D, K D) in units of W, for the exact structures."""
    belief = state.belief
    matrix = belief.matrix if hasattr(belief, "matrix") else np.linalg.inv(belief.root.T @ belief.root)
    scale = np.tile(engine.head.scale, engine.head.num_outputs)
    return scale[:, None] * np.asarray(matrix) * scale


@pytest.mark.parametrize(
    "structure",
    [Full(), SquareRoot(), *(pytest.param(s, marks=pytest.mark.slow) for s in (Shared(), KroneckerHead()))],
    ids=str,
)
@pytest.mark.parametrize("sizes", [[24], [8, 8, 8]], ids=str)
def test_gaussian_labels_in_any_batches_give_the_ridge_posterior_and_evidence(structure, sizes):
    likelihood = LIKELIHOODS["gaussian"]
    x, y = points(likelihood)
    engine = engine_of(likelihood, structure)
    state, infos = in_parts(engine, x, y, sizes)
    mean, covariance, evidence = dense_gaussian(x, y, 0.4)
    np.testing.assert_allclose(engine.weights(state), mean, rtol=0, atol=1e-12)
    variance = np.asarray(state.belief.variance()) * engine.head.scale**2
    np.testing.assert_allclose(variance, np.tile(np.diag(covariance), (2, 1)), rtol=1e-10)
    # the log evidence is the sum of one-step log predictives
    assert sum(info.log_evidence for info in infos) == pytest.approx(evidence, abs=1e-9)


def test_the_order_of_gaussian_points_changes_nothing(rng):
    likelihood = LIKELIHOODS["gaussian"]
    x, y = points(likelihood)
    order = rng.permutation(N)
    engine = engine_of(likelihood, Full())
    one, _ = in_parts(engine, x, y, [8, 8, 8])
    two, _ = in_parts(engine, x[order], y[order], [8, 8, 8])
    np.testing.assert_allclose(one.mean, two.mean, rtol=0, atol=1e-12)
    np.testing.assert_allclose(one.belief.matrix, two.belief.matrix, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "structure"),
    [
        ("categorical", Full()),
        pytest.param("bernoulli", SquareRoot(), marks=pytest.mark.slow),
        pytest.param("poisson", Full(), marks=pytest.mark.slow),
        pytest.param("categorical", SquareRoot(), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_all_points_in_one_batch_are_the_newton_refit(name, structure):
    likelihood = LIKELIHOODS[name]
    x, y = points(likelihood)
    value = log_joint(likelihood, x, y)
    mode, covariance = dense_mode(value, likelihood.num_outputs * (WIDTH + 1))
    engine = engine_of(likelihood, structure)
    state, info = engine.update(engine.init(), {"x": x, "y": y})
    np.testing.assert_allclose(engine.weights(state).ravel(), mode, rtol=0, atol=1e-9)
    np.testing.assert_allclose(covariance_of(engine, state), covariance, rtol=0, atol=1e-9)
    laplace = float(value(mode)) + 0.5 * np.linalg.slogdet(TAU * covariance)[1]
    assert info.log_evidence == pytest.approx(laplace, abs=1e-8)
    assert info.status == 0
    # and the dual climb of few points reaches the same
    phi = jnp.asarray(engine.features({"x": x}))
    first = engine.init()
    made = condition_few(first.belief, first.mean, phi, likelihood, jnp.asarray(y), jnp.ones(N))
    np.testing.assert_allclose(made.mean, state.mean, rtol=0, atol=1e-9)
    assert float(made.log_evidence) == pytest.approx(info.log_evidence, abs=1e-8)


@pytest.mark.parametrize(
    "structure",
    [
        Full(),
        KroneckerHead(),
        *(pytest.param(s, marks=pytest.mark.slow) for s in (SquareRoot(), Shared(), DiagonalHead())),
    ],
    ids=str,
)
def test_sweeps_reach_the_batch_posterior_whatever_the_order(structure):
    likelihood = LIKELIHOODS["categorical"]
    x, y = points(likelihood)
    engine = engine_of(likelihood, structure)
    batch, _ = engine.update(engine.init(), {"x": x, "y": y})
    state, _ = in_parts(engine, x[::-1], y[::-1], [8, 8, 8])
    errors = []
    for _ in range(6):
        errors.append(float(np.abs(state.mean - batch.mean).max()))
        state, _ = engine.sweep(state, max_steps=1)
    assert errors[0] > 1e-3  # the batches' sites stand where they were made
    assert errors[-1] < 1e-8
    swept, info = engine.sweep(state)
    assert info.status == 0
    for one, two in zip(jax.tree.leaves(swept.belief), jax.tree.leaves(batch.belief), strict=True):
        if not isinstance(structure, KroneckerHead):  # whose eigenvectors have signs
            np.testing.assert_allclose(one, two, rtol=0, atol=1e-8)
    np.testing.assert_allclose(swept.belief.variance(), batch.belief.variance(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("structure", [SquareRoot(), *APPROXIMATE], ids=str)
@pytest.mark.slow
def test_the_mode_of_one_batch_is_the_same_in_every_structure(structure):
    likelihood = LIKELIHOODS["categorical"]
    x, y = points(likelihood)
    engine = engine_of(likelihood, structure)
    state, _ = engine.update(engine.init(), {"x": x, "y": y})
    mode, _ = dense_mode(log_joint(likelihood, x, y), 3 * (WIDTH + 1))
    np.testing.assert_allclose(engine.weights(state).ravel(), mode, rtol=0, atol=1e-9)


def test_the_hessian_of_the_head_is_that_of_jax(rng):
    likelihood, width = Categorical(3), 5
    phi, w = rng.normal(size=(5, width)), rng.normal(size=(3, width)) / 8
    y, weight = jnp.asarray([0, 2, 1, 1, 0]), jnp.asarray([1.0, 2.0, 0.0, 0.5, 1.0])

    def loss(vector):
        return -jnp.sum(weight * likelihood.log_prob(phi @ vector.reshape(3, width).T, y))

    made = information_matrix(jnp.asarray(phi), likelihood, jnp.asarray(phi @ w.T), y, weight)
    np.testing.assert_allclose(made, jax.hessian(loss)(w.ravel()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_gradients_and_factors_are_the_derivatives_of_the_density(name, rng):
    likelihood = LIKELIHOODS[name]
    _, y = points(likelihood, num=6)
    f = jnp.asarray(rng.normal(size=(6, likelihood.num_outputs)))
    v = jnp.asarray(rng.normal(size=f.shape))
    y = jnp.asarray(y)

    def one(f, y):
        return jnp.sum(likelihood.distribution(f).log_prob(y))

    np.testing.assert_allclose(likelihood.log_prob(f, y), jax.vmap(one)(f, y), atol=1e-12)
    np.testing.assert_allclose(likelihood.gradient(f, y), jax.vmap(jax.grad(one))(f, y), atol=1e-12)
    hessian = -jax.vmap(jax.hessian(one))(f, y)
    factor = likelihood.factor(f, y)
    np.testing.assert_allclose(factor @ factor.transpose(0, 2, 1), hessian, atol=1e-12)
    np.testing.assert_allclose(likelihood.weigh(f, y, v), jnp.einsum("nkl,nl->nk", hessian, v), atol=1e-12)
    np.testing.assert_allclose(likelihood.diagonal(f, y), jnp.einsum("nkk->nk", hessian), atol=1e-12)


@pytest.mark.parametrize(
    "structure",
    [Full(), *(pytest.param(s, marks=pytest.mark.slow) for s in (SquareRoot(), Shared(), DiagonalHead()))],
    ids=str,
)
def test_two_copies_count_as_weight_two_and_weight_zero_as_nothing(structure):
    likelihood = LIKELIHOODS["categorical"]
    x, y = points(likelihood, num=6)
    engine = engine_of(likelihood, structure)
    twice, _ = engine.update(engine.init(), {"x": np.repeat(x, 2, axis=0), "y": np.repeat(y, 2)})
    weighed, _ = engine.update(engine.init(), {"x": x, "y": y}, weights=np.full(6, 2.0))
    np.testing.assert_allclose(twice.mean, weighed.mean, rtol=0, atol=1e-9)
    np.testing.assert_allclose(twice.belief.variance(), weighed.belief.variance(), rtol=0, atol=1e-9)
    outlier = {"x": np.r_[x, 100 * x[:1]], "y": np.r_[y, y[:1]]}
    zero, _ = engine.update(engine.init(), outlier, weights=np.r_[np.full(6, 2.0), 0.0])
    np.testing.assert_allclose(zero.mean, weighed.mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "structure", [Full(), *(pytest.param(s, marks=pytest.mark.slow) for s in (SquareRoot(), *APPROXIMATE))], ids=str
)
def test_no_variance_grows_with_data(structure):
    likelihood = LIKELIHOODS["categorical"]
    x, y = points(likelihood)
    engine = engine_of(likelihood, structure)
    phi = jnp.asarray(engine.features(x))
    state = engine.init()
    for start in range(0, N, 8):
        before = np.asarray(state.belief.output_variance(phi))
        state, _ = engine.update(state, {"x": x[start : start + 8], "y": y[start : start + 8]})
        if not isinstance(structure, KroneckerHead):  # the mean of Lambda may fall faster than the features' sum grows
            assert (np.asarray(state.belief.output_variance(phi)) <= before * (1 + 1e-12)).all()
        assert (np.asarray(state.belief.output_variance(phi)) <= np.square(phi).sum(axis=1, keepdims=True)).all()


@pytest.mark.parametrize(
    "structure",
    [
        Full(),
        KroneckerHead(),
        *(pytest.param(s, marks=pytest.mark.slow) for s in (SquareRoot(), Shared(), DiagonalHead())),
    ],
    ids=str,
)
def test_read_outs_agree_with_the_kernel_and_with_draws(structure, key):
    likelihood = LIKELIHOODS["categorical"]
    x, y = points(likelihood)
    engine = engine_of(likelihood, structure)
    belief = engine.update(engine.init(), {"x": x[:8], "y": y[:8]})[0].belief
    phi = jnp.asarray(engine.features(x[:4]))
    kernel = np.asarray(belief.kernel(phi))
    own = np.stack([kernel[n, :, n] for n in range(4)])
    np.testing.assert_allclose(belief.output_covariance(phi), own, atol=1e-12)
    np.testing.assert_allclose(belief.output_variance(phi), np.einsum("nkk->nk", own), atol=1e-12)
    a = np.random.default_rng(1).normal(size=(4, 3))
    np.testing.assert_allclose(phi @ belief.lift(phi, a).T, np.einsum("nkml,ml->nk", kernel, a), atol=1e-12)
    information = belief.information()
    np.testing.assert_allclose(information.matvec(belief.lift(phi, a)), a.T @ phi, atol=1e-9)
    np.testing.assert_allclose(information.log_determinant(), belief.log_determinant(), atol=1e-9)
    np.testing.assert_allclose(belief.trace(), belief.variance().sum(), atol=1e-12)
    drawn = np.einsum("nd,skd->snk", phi, belief.draw(key, 20_000))
    covariance = np.einsum("snk,sml->nkml", drawn, drawn) / len(drawn)
    np.testing.assert_allclose(covariance, kernel, atol=0.05 * kernel.max())
