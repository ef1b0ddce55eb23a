"""Every precision structure against dense numpy algebra in float64."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_nn.coordinate_map import CoordinateMap, LeafMap
from ssm_nn.moments import Moments
from ssm_nn.precision_dense import DensePrecision
from ssm_nn.precision_diagonal import DiagonalPrecision
from ssm_nn.precision_low_rank import DiagonalPlusLowRank

P = 5
# zero gain, zero noise, and both beside ordinary numbers
GAIN = np.array([0.7, 0.0, 1.0, -0.5, 1.0])
NOISE = np.array([0.3, 0.5, 0.0, 0.2, 0.0])
STRUCTURES = ["dense", "diagonal", "rank 0", "rank 3", "rank 5", "rank 7"]


class Case(NamedTuple):
    precision: object
    site: object
    dense: np.ndarray
    dense_site: np.ndarray
    x: np.ndarray
    wide: np.ndarray


def make_case(structure: str, gain=GAIN, noise=NOISE) -> Case:
    rng = np.random.default_rng(STRUCTURES.index(structure))
    diagonal, factor = rng.uniform(0.5, 3, P), rng.normal(size=(P, 7))
    seen, columns = rng.uniform(0, 2, P) * (np.arange(P) != 1), rng.normal(size=(P, 7))
    x, wide = rng.normal(size=P), rng.normal(size=(P, 4))
    if structure == "diagonal":
        return Case(
            DiagonalPrecision(jnp.array(diagonal)),
            DiagonalPrecision(jnp.array(seen)),
            np.diag(diagonal),
            np.diag(seen),
            x,
            wide,
        )
    rank = 2 if structure == "dense" else int(structure.split()[1])
    factor, columns = factor[:, :rank], columns[:, : min(rank, 2)]
    dense, dense_site = np.diag(diagonal) + factor @ factor.T, np.diag(seen) + columns @ columns.T
    if structure == "dense":
        return Case(DensePrecision(jnp.array(dense)), DensePrecision(jnp.array(dense_site)), dense, dense_site, x, wide)
    low, site = (DiagonalPlusLowRank(jnp.array(d), jnp.array(u)) for d, u in ((diagonal, factor), (seen, columns)))
    return Case(low, site, dense, dense_site, x, wide)


def moments(gain=GAIN, noise=NOISE, permutation=None) -> Moments:
    return Moments(jnp.array(gain), jnp.zeros(P), jnp.array(noise), permutation)


def predicted(dense, gain=GAIN, noise=NOISE):
    """(A Lambda^-1 A + Q)^-1."""
    return np.linalg.inv(np.diag(gain) @ np.linalg.inv(dense) @ np.diag(gain) + np.diag(noise))


def gain_matrix(dense, gain=GAIN, noise=NOISE):
    """Cov(theta_t, theta_t+1) Cov(theta_t+1)^-1."""
    return np.linalg.inv(dense) @ np.diag(gain) @ predicted(dense, gain, noise)


def conditional(dense, gain=GAIN, noise=NOISE):
    """Covariance of theta_t given theta_t+1."""
    covariance = np.linalg.inv(dense)
    return covariance - gain_matrix(dense, gain, noise) @ np.diag(gain) @ covariance


def normal_log_density(residual, covariance):
    _, logdet = np.linalg.slogdet(2 * np.pi * covariance)
    return -0.5 * (residual @ np.linalg.solve(covariance, residual) + logdet)


def assert_close(actual, expected, tolerance=1e-10):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=tolerance, atol=tolerance)


def assert_covariance(draws, covariance):
    """Sample moments within five standard errors: Var(s_ij) = (c_ii c_jj + c_ij^2) / n for a normal with mean zero."""
    n, scale = len(draws), np.diag(covariance)
    error = np.sqrt((np.outer(scale, scale) + covariance**2) / n)
    assert np.all(np.abs(draws.T @ draws / n - covariance) <= 5 * error + 1e-12)
    assert np.all(np.abs(draws.mean(0)) <= 5 * np.sqrt(scale / n) + 1e-12)


each = pytest.mark.parametrize("structure", STRUCTURES)
pytestmark = pytest.mark.usefixtures("x64")


@each
def test_the_whitening_is_a_square_root_of_the_precision(structure):
    case = make_case(structure)
    whitening = case.precision.whitening()
    root = np.asarray(jax.vmap(whitening.whiten, out_axes=1)(jnp.eye(P)))
    assert_close(root.T @ root, case.dense)
    assert_close(jax.vmap(whitening.colour, in_axes=1, out_axes=1)(jnp.array(root)), np.eye(P))
    least = np.linalg.eigvalsh(case.dense)[0]
    assert 0 < whitening.smallest <= least * (1 + 1e-12)
    if structure in ("dense", "diagonal", "rank 0"):
        assert_close(whitening.smallest, least)


@each
def test_read_outs_equal_dense_algebra(structure):
    case = make_case(structure)

    @jax.jit
    def read(p, x, wide):
        return {
            "to_dense": p.to_dense(),
            "matvec": p.matvec(x),
            "solve": p.solve(x),
            "solve many": p.solve(wide),
            "solver": p.solver()(x),
            "logdet": p.logdet(),
            "diagonal": p.precision_diagonal(),
            "variance": p.variance(),
            "quadratic": p.quadratic(x),
        }

    covariance = np.linalg.inv(case.dense)
    expected = {
        "to_dense": case.dense,
        "matvec": case.dense @ case.x,
        "solve": covariance @ case.x,
        "solve many": covariance @ case.wide,
        "solver": covariance @ case.x,
        "logdet": np.linalg.slogdet(case.dense)[1],
        "diagonal": np.diag(case.dense),
        "variance": np.diag(covariance),
        "quadratic": case.x @ case.dense @ case.x,
    }
    found = read(case.precision, case.x, case.wide)
    for name, value in expected.items():
        assert_close(found[name], value)


@each
def test_sums_and_orders_equal_dense_algebra(structure):
    case, order = make_case(structure), np.array([3, 0, 4, 1, 2])
    assert_close(case.precision.add(case.site).to_dense(), case.dense + case.dense_site)
    wide = case.precision.add_columns(jnp.array(case.wide))
    assert_close(wide.to_dense(), case.dense + case.wide @ case.wide.T)
    assert_close(wide.solve(case.x), np.linalg.solve(case.dense + case.wide @ case.wide.T, case.x))
    moved = np.eye(P)[order]
    coordinates = CoordinateMap((LeafMap(jnp.array(order), 0, (P,), 0),))
    assert_close(case.precision.mapped(coordinates).to_dense(), moved @ case.dense @ moved.T)


@each
def test_step_equals_dense_algebra(structure):
    """Prediction, gain, conditional density and backward message, gain and noise with zeros."""
    case = make_case(structure)

    @jax.jit
    def read(p, site, step, x):
        return {
            "predict": p.predict(step).to_dense(),
            "gain": jax.vmap(lambda e: p.smoother_gain(step, e), out_axes=1)(jnp.eye(P)),
            "conditional": p.conditional_log_density(step, x),
            "message": p.message_before(site, step).to_dense(),
        }

    found = read(case.precision, case.site, moments(), case.x)
    assert_close(found["predict"], predicted(case.dense))
    assert_close(found["gain"], gain_matrix(case.dense))
    moves = NOISE > 0
    covariance = conditional(case.dense)[np.ix_(moves, moves)]
    assert_close(found["conditional"], normal_log_density(case.x[moves], covariance))
    message = case.dense_site @ np.linalg.inv(np.eye(P) + np.diag(NOISE) @ case.dense_site)
    assert_close(found["message"], np.diag(GAIN) @ message @ np.diag(GAIN))


@each
def test_message_is_what_the_next_state_tells_of_this_one(structure):
    """Lambda plus the message is the precision of theta_t after an observation of theta_t+1."""
    case = make_case(structure)
    message = case.precision.message_before(case.site, moments())
    covariance = np.linalg.inv(case.dense)
    cross = covariance @ np.diag(GAIN)
    seen = np.linalg.inv(case.dense_site + predicted(case.dense))
    gain = gain_matrix(case.dense)
    after = covariance - gain @ cross.T + gain @ seen @ gain.T
    assert_close(np.linalg.inv(np.asarray(case.precision.add(message).to_dense())), after)


@pytest.mark.parametrize("structure", ["dense", "diagonal", "rank 0", "rank 7"])
def test_draws_have_the_stated_covariance(structure, key):
    case, number = make_case(structure), 20_000

    @jax.jit
    def draw(p, step, keys):
        return jax.vmap(p.sample)(keys), jax.vmap(lambda k: p.sample_conditional(step, k))(keys)

    draws, conditional_draws = draw(case.precision, moments(), jax.random.split(key, number))
    assert_covariance(np.asarray(draws), np.linalg.inv(case.dense))
    assert_covariance(np.asarray(conditional_draws), conditional(case.dense))


@each
def test_two_steps_equal_one_of_twice_the_noise(structure):
    precision = make_case(structure).precision
    ones, noise = np.ones(P), NOISE
    twice = precision.predict(moments(ones, noise)).predict(moments(ones, noise))
    assert_close(twice.to_dense(), precision.predict(moments(ones, 2 * noise)).to_dense())


@each
def test_a_step_without_motion_is_the_identity(structure):
    case, still = make_case(structure), moments(np.ones(P), np.zeros(P))
    moved, pulled = case.precision.predict(still).to_dense(), case.precision.smoother_gain(still, jnp.array(case.x))
    # the dense twin goes by way of the covariance, and is exact to rounding
    tolerance = 1e-12 if structure == "dense" else 0
    np.testing.assert_allclose(moved, case.precision.to_dense(), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(pulled, case.x, rtol=tolerance, atol=tolerance)
    assert_close(case.precision.message_before(case.site, still).to_dense(), case.dense_site, 1e-14)


@each
def test_large_noise_forgets_the_history_of_its_coordinates_only(structure):
    case, forgotten = make_case(structure), np.array([True, False, False, True, False])
    large = moments(np.ones(P), np.where(forgotten, 1e9, 0.0))
    after = np.linalg.inv(np.asarray(case.precision.predict(large).to_dense()))
    correlation = after / np.sqrt(np.outer(np.diag(after), np.diag(after)))
    kept = ~forgotten
    assert_close(np.diag(after)[forgotten] / 1e9, 1, 1e-7)
    assert np.abs(correlation[forgotten][:, kept]).max() < 1e-4
    assert_close(after[np.ix_(kept, kept)], np.linalg.inv(case.dense)[np.ix_(kept, kept)], 1e-7)
    assert (
        np.abs(np.asarray(case.precision.smoother_gain(large, jnp.array(np.where(forgotten, case.x, 0.0))))).max()
        < 1e-7
    )


# whitened by the float64 result, hence relative in every direction. A float32 matrix cannot hold that of its small
# eigenvalues: rounding its entries, 1e4 eps = 6e-4, is as large; a factor holds it
@pytest.mark.parametrize(("structure", "tolerance"), [("diagonal", 1e-5), ("low rank", 1e-4), ("dense", 1e-2)])
def test_float32_stays_positive_definite(structure, tolerance):
    """20 steps at a largest precision of 1e4 and a noise of 1e-6, beside the same in float64."""
    rng = np.random.default_rng(0)
    size = 30
    factor = jnp.array(1e2 * np.linalg.qr(rng.normal(size=(size, 3)))[0], jnp.float32)
    diagonal = jnp.array(rng.uniform(0.5, 2, size), jnp.float32)
    start = {
        "diagonal": DiagonalPrecision(5e3 * diagonal),
        "low rank": DiagonalPlusLowRank(diagonal, factor),
        "dense": DensePrecision(jnp.diag(diagonal) + factor @ factor.T),
    }[structure]

    def moved(dtype):
        precision = jax.tree.map(lambda array: array.astype(dtype), start)
        step = Moments(jnp.ones(size, dtype), jnp.zeros(size, dtype), jnp.full(size, 1e-6, dtype))
        precision, _ = jax.lax.scan(lambda p, _: (p.predict(step), None), precision, length=20)
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(precision))
        exact = jax.tree.map(lambda array: array.astype(jnp.float64), precision)
        return np.asarray(exact.to_dense()), np.asarray(precision.variance())

    (single, single_variance), (double, double_variance) = moved(jnp.float32), moved(jnp.float64)
    assert np.linalg.eigvalsh(single).min() > 0
    root = np.linalg.inv(np.linalg.cholesky(double))
    assert np.abs(np.linalg.eigvalsh(root @ single @ root.T) - 1).max() < tolerance
    np.testing.assert_allclose(single_variance, double_variance, rtol=tolerance)
