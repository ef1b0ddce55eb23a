"""Scales, residual and directions in their limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_nn.inference.perturbation.blocks import Block
from ssm_nn.inference.perturbation.directions import PlainSVD, Sides, Whitened, least_squares_scales, residual

DENSE = Block(("net", "k"), (7, 5), (0,), (), 1, 5)
WIDE = Block(("net", "k"), (5, 7), (0,), (), 1, 5)
CONVOLUTION = Block(("net", "k"), (3, 3, 4, 6), (2,), (0, 1), 3, 4)


def draw(rng, block):
    return jnp.asarray(rng.normal(size=block.shape))


def sides_of(rng, block):
    a, g = rng.normal(size=(30, block.num_inputs)), rng.normal(size=(30, block.num_outputs))
    return Sides(jnp.asarray(a.T @ a / 30), jnp.asarray(g.T @ g / 30))


def full(block, free, base, split):
    inputs, outputs = least_squares_scales(block, free, base)
    factors = block.identity(base.dtype)._replace(inputs=inputs, outputs=outputs)
    difference = residual(block, free, base, factors)
    sigma, left, right = split(difference)
    return sigma, factors._replace(left=left, right=right, keep=jnp.ones(block.cap)), difference


@pytest.mark.parametrize("block", [DENSE, CONVOLUTION], ids=["dense", "convolution"])
@pytest.mark.parametrize("directions", [PlainSVD(), Whitened()], ids=["plain", "whitened"])
def test_unchanged_weights_give_unit_scales_and_no_directions(rng, block, directions):
    base = draw(rng, block)
    sigma, factors, difference = full(block, base, base, lambda d: directions.split(block, d, sides_of(rng, block)))
    assert np.all(np.asarray(factors.inputs) == 1)
    assert np.all(np.asarray(factors.outputs) == 1)
    assert not np.any(np.asarray(difference))
    assert not np.any(np.asarray(sigma))
    assert np.array_equal(block.compose(base, factors), base)


@pytest.mark.parametrize("directions", [PlainSVD(), Whitened()], ids=["plain", "whitened"])
def test_full_rank_gives_the_free_weights(rng, directions):
    base, free = draw(rng, DENSE), draw(rng, DENSE)
    assert base.dtype == jnp.float32
    _, factors, _ = full(DENSE, free, base, lambda d: directions.split(DENSE, d, sides_of(rng, DENSE)))
    np.testing.assert_allclose(DENSE.compose(base, factors), free, atol=1e-5)


def test_full_rank_of_a_convolution_gives_the_mean_of_the_free_weights_over_the_window(x64, rng):
    base, free = draw(rng, CONVOLUTION), draw(rng, CONVOLUTION)
    _, factors, _ = full(CONVOLUTION, free, base, lambda d: PlainSVD().split(CONVOLUTION, d, None))
    np.testing.assert_allclose(CONVOLUTION.compose(base, factors).mean((0, 1)), free.mean((0, 1)), atol=1e-12)


def test_plain_directions_are_the_singular_value_decomposition(x64, rng):
    difference = jnp.asarray(rng.normal(size=DENSE.shape))
    sigma, left, right = PlainSVD().split(DENSE, difference, None)
    u, s, v = np.linalg.svd(difference, full_matrices=False)
    np.testing.assert_allclose(sigma, s, rtol=1e-10)
    for rank in range(6):
        np.testing.assert_allclose(left[:, :rank] @ right[:rank], (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-10)
    np.testing.assert_allclose(np.linalg.norm(left, axis=0), np.sqrt(s), rtol=1e-10)  # U = u sqrt(sigma)


def root_of(side, damping):
    values, vectors = np.linalg.eigh(np.asarray(side) + damping * np.mean(np.diag(side)) * np.eye(len(side)))
    return (vectors * np.sqrt(values)) @ vectors.T


@pytest.mark.parametrize("block", [DENSE, WIDE], ids=["tall", "wide"])
def test_whitened_directions_are_singular_ones_in_the_metric(x64, rng, block):
    difference, sides = jnp.asarray(rng.normal(size=block.shape)), sides_of(rng, block)
    sigma, left, right = Whitened(1e-2).split(block, difference, sides)
    before, after = root_of(sides.inputs, 1e-2), root_of(sides.outputs, 1e-2)
    u, s, v = np.linalg.svd(before @ difference @ after, full_matrices=False)
    np.testing.assert_allclose(sigma, s, rtol=1e-8)
    for rank in range(6):
        best = np.linalg.inv(before) @ (u[:, :rank] * s[:rank]) @ v[:rank] @ np.linalg.inv(after)
        np.testing.assert_allclose(left[:, :rank] @ right[:rank], best, atol=1e-9)


def test_whitened_directions_of_numbers_whose_squares_vanish_are_the_same(rng):
    difference, sides = draw(rng, DENSE), sides_of(rng, DENSE)
    assert difference.dtype == jnp.float32
    _, left, right = Whitened().split(DENSE, difference, sides)
    little = Sides(1e-12 * sides.inputs, 1e-12 * sides.outputs)
    _, small, other = Whitened().split(DENSE, 1e-10 * difference, little)
    np.testing.assert_allclose(1e10 * (small[:, :2] @ other[:2]), left[:, :2] @ right[:2], atol=1e-3)


@pytest.mark.parametrize("block", [DENSE, WIDE], ids=["tall", "wide"])
def test_whitened_increments_add_up_under_a_kronecker_curvature(x64, rng, block):
    difference, sides = jnp.asarray(rng.normal(size=block.shape)), sides_of(rng, block)
    damping = 1e-9
    sigma, left, right = Whitened(damping).split(block, difference, sides)

    def loss(w):
        return 0.5 * np.trace(w.T @ sides.inputs @ w @ sides.outputs)

    for _ in range(10):
        gone = rng.random(5) < 0.5
        dropped = (left * gone) @ right
        np.testing.assert_allclose(loss(dropped), 0.5 * np.sum(np.square(sigma) * gone), rtol=1e-6)


def test_whitened_truncation_loses_less_than_the_plain_one(x64, rng):
    difference, sides = jnp.asarray(rng.normal(size=DENSE.shape)), sides_of(rng, DENSE)
    sides = sides._replace(inputs=sides.inputs * np.geomspace(0.1, 10, 7)[:, None] * np.geomspace(0.1, 10, 7))

    def loss(split):
        w = difference - split[1][:, :2] @ split[2][:2]
        return float(np.trace(w.T @ sides.inputs @ w @ sides.outputs))

    assert loss(Whitened(1e-6).split(DENSE, difference, sides)) < loss(PlainSVD().split(DENSE, difference, None))


def test_scales_solve_the_alternating_normal_equations(x64, rng):
    base, free = np.asarray(draw(rng, CONVOLUTION)), np.asarray(draw(rng, CONVOLUTION))
    r = np.array([(free[..., j] * base[..., j]).sum() / (base[..., j] ** 2).sum() for j in range(6)])
    rows = base * r
    s = np.array([(free[:, :, i] * rows[:, :, i]).sum() / (rows[:, :, i] ** 2).sum() for i in range(4)])
    inputs, outputs = least_squares_scales(CONVOLUTION, jnp.asarray(free), jnp.asarray(base))
    np.testing.assert_allclose(outputs, r, atol=1e-4)
    np.testing.assert_allclose(inputs, s, atol=1e-4)


def test_weights_that_are_a_scaled_base_are_found_by_the_scales_alone(x64, rng):
    base = draw(rng, DENSE)
    s, r = rng.uniform(0.5, 2, 7), rng.uniform(0.5, 2, 5)
    free = s[:, None] * base * r
    inputs, outputs = least_squares_scales(DENSE, free, base, sweeps=200)
    np.testing.assert_allclose(inputs[:, None] * base * outputs, free, atol=1e-4)


def test_a_row_of_almost_zeros_keeps_its_scale(rng):
    base = draw(rng, DENSE).at[2].set(1e-9)
    inputs, _ = least_squares_scales(DENSE, draw(rng, DENSE), base)
    assert abs(float(inputs[2]) - 1) < 1e-2


def test_bad_damping_is_refused():
    with pytest.raises(ValueError, match="damping is 0"):
        Whitened(0)


def test_splits_are_fit_for_jit(rng):
    jax.jit(lambda d: PlainSVD().split(DENSE, d, None))(draw(rng, DENSE))
