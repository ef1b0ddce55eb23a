"""Cutting a factor to fewer columns: the best cut there is, and what becomes of the rest."""

import jax.numpy as jnp
import numpy as np
import pytest

from ssm_nn.inference.structures import Dense, Diagonal, LowRank
from ssm_nn.precision_low_rank import DiagonalPlusLowRank, compress

P = 9
pytestmark = pytest.mark.usefixtures("x64")


def drawn(columns, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(P, columns)), rng.uniform(0.2, 5, P)


@pytest.mark.parametrize(("columns", "rank"), [(0, 0), (0, 3), (2, 4), (4, 4), (12, 9), (12, 11)])
def test_exact_where_the_columns_fit(columns, rank):
    factor, metric = drawn(columns)
    cut = compress(jnp.array(factor), jnp.array(metric), rank)
    assert cut.factor.shape == (P, rank)
    np.testing.assert_allclose(cut.factor @ cut.factor.T, factor @ factor.T, atol=1e-12)
    np.testing.assert_allclose(cut.dropped_diagonal, 0, atol=1e-12)
    np.testing.assert_allclose(cut.dropped_share, 0, atol=1e-12)


@pytest.mark.parametrize(("columns", "rank"), [(6, 0), (6, 3), (14, 4)])
def test_optimal_in_the_whitened_metric(columns, rank):
    """Eckart-Young: the error's eigenvalues are the squares of the singular values cut off."""
    factor, metric = drawn(columns, seed=columns)
    cut = compress(jnp.array(factor), jnp.array(metric), rank)
    white = factor / np.sqrt(metric)[:, None]
    squares = np.linalg.svd(white, compute_uv=False) ** 2
    error = (factor @ factor.T - np.asarray(cut.factor @ cut.factor.T)) / np.sqrt(np.outer(metric, metric))
    remaining = np.zeros(P)
    remaining[: len(squares) - rank] = squares[rank:]
    np.testing.assert_allclose(np.sort(np.linalg.eigvalsh(error)), np.sort(remaining), atol=1e-12)
    np.testing.assert_allclose(cut.dropped_share, squares[rank:].sum() / squares.sum())


@pytest.mark.parametrize("rank", [0, 2, 5])
def test_what_is_cut_off_keeps_the_diagonal_and_the_trace(rank):
    factor, metric = drawn(7)
    wide = DiagonalPlusLowRank(jnp.array(metric), jnp.array(factor))
    cut = LowRank(rank).cut(wide)
    assert cut.precision.rank == rank
    np.testing.assert_allclose(np.diag(cut.precision.to_dense()), np.diag(wide.to_dense()), rtol=1e-12)
    np.testing.assert_allclose(cut.precision.precision_diagonal(), wide.precision_diagonal(), rtol=1e-12)
    gathered = LowRank(rank).gather(
        LowRank(rank).prior(jnp.ones(P)).no_information(), jnp.array(factor), jnp.array(metric)
    )
    np.testing.assert_allclose(np.diag(gathered.precision.to_dense()), np.sum(factor**2, axis=1), rtol=1e-12)


@pytest.mark.parametrize("rank", [0, 2, 5])
def test_dropping_never_under_estimates_a_covariance(rank):
    factor, metric = drawn(7)
    wide = DiagonalPlusLowRank(jnp.array(metric), jnp.array(factor))
    kept = LowRank(rank, keep_diagonal=False).cut(wide).precision
    excess = np.linalg.inv(kept.to_dense()) - np.linalg.inv(wide.to_dense())
    assert np.linalg.eigvalsh(excess).min() > -1e-12
    assert np.linalg.eigvalsh(excess).max() > 1e-3
    np.testing.assert_allclose(kept.diagonal, metric)


def test_small_singular_values_survive_float32():
    """A Gram matrix alone would lose those below 1e-4 of the largest."""
    rng = np.random.default_rng(1)
    left, right = (np.linalg.qr(rng.normal(size=(size, 4)))[0] for size in (P, 6))
    singular = np.array([1e5, 1e2, 1.0, 0.5])
    factor = left * singular @ right.T
    cut = compress(jnp.array(factor, jnp.float32), jnp.ones(P, jnp.float32), 3)
    found = np.linalg.svd(np.asarray(cut.factor, np.float64), compute_uv=False)
    np.testing.assert_allclose(found[:2], singular[:2], rtol=1e-4)
    np.testing.assert_allclose(found[2], singular[2], rtol=0.05)


@pytest.mark.parametrize("blocks", [0.5, 8, 9.3])
def test_the_same_cut_by_blocks_of_rows_and_whole(blocks):
    """Kept values a thousandth of the largest need the triangle in float32, half of it do with the Gram matrix."""
    rows = int(blocks * 4096)
    rng = np.random.default_rng(int(10 * blocks))
    metric = rng.uniform(0.5, 2, rows)
    left, right = (np.linalg.qr(rng.normal(size=(size, 6)))[0] for size in (rows, 6))
    for least in (1e-3, 0.5):
        singular = np.array([1.0, 1.0, 0.9, least, least / 8, least / 9])
        factor = np.sqrt(metric)[:, None] * (left * singular @ right.T)
        cut = compress(jnp.array(factor, jnp.float32), jnp.array(metric, jnp.float32), 4)
        white = np.asarray(cut.factor, np.float64) / np.sqrt(metric)[:, None]
        np.testing.assert_allclose(np.linalg.svd(white, compute_uv=False), singular[:4], rtol=2e-3)
        np.testing.assert_allclose(cut.dropped_share, np.sum(singular[4:] ** 2) / np.sum(singular**2), rtol=0.05)


def test_dense_and_diagonal_keep_what_they_can_hold():
    factor, metric = drawn(7)
    dense = Dense().gather(Dense().prior(jnp.ones(P)).no_information(), jnp.array(factor), jnp.array(metric))
    np.testing.assert_allclose(dense.precision.to_dense(), factor @ factor.T, atol=1e-12)
    assert dense.dropped_share == 0
    diagonal = Diagonal().gather(Diagonal().prior(jnp.ones(P)).no_information(), jnp.array(factor), jnp.array(metric))
    np.testing.assert_allclose(diagonal.precision.diagonal, np.sum(factor**2, axis=1))


@pytest.mark.parametrize("structure", [LowRank(3), Diagonal(), Dense()])
def test_the_prior_of_a_structure(structure):
    _, variance = drawn(0)
    np.testing.assert_allclose(structure.prior(jnp.array(variance)).to_dense(), np.diag(1 / variance))


@pytest.mark.parametrize("rank", [-1, 2.0, True, "3"])
def test_a_rank_is_a_whole_number(rank):
    with pytest.raises(ValueError, match="a whole number >= 0 is accepted"):
        LowRank(rank)
