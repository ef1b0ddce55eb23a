"""Known maps of the weights against dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_nn.coordinate_map import CoordinateMap, LeafMap, along_axis, is_indices
from ssm_nn.moments import Moments
from ssm_nn.precision import permuted, step_mean_vector, unpermuted, unpermuted_vector
from ssm_nn.precision_dense import DensePrecision
from ssm_nn.precision_diagonal import DiagonalPrecision
from ssm_nn.precision_low_rank import DiagonalPlusLowRank

# theta: 1 untouched, a leaf (3, 2), 2 untouched, a leaf (2, 2, 3), 1 untouched
P = 22
FIRST, SECOND = (1, (3, 2)), (9, (2, 2, 3))

pytestmark = pytest.mark.usefixtures("x64")


def orthogonal(size, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def leaf(turn, place, axis):
    start, shape = place
    return LeafMap(jnp.array(turn), start, shape, axis)


MAPS = {
    "permutations": lambda: CoordinateMap((leaf([2, 0, 1], FIRST, 0), leaf([1, 2, 0], SECOND, 2))),
    "matrices": lambda: CoordinateMap((leaf(orthogonal(2), FIRST, 1), leaf(orthogonal(2, 1), SECOND, 1))),
    "one of each": lambda: CoordinateMap((leaf(orthogonal(3), FIRST, 0), leaf([1, 0], SECOND, 0))),
    "one leaf": lambda: CoordinateMap((leaf(orthogonal(3), SECOND, 2),)),
    "none": lambda: CoordinateMap(()),
}
each = pytest.mark.parametrize("name", MAPS)


def dense(coordinates):
    """By Kronecker products with identities."""
    matrix = np.eye(P)
    for part in coordinates.leaves:
        turn = np.asarray(part.turn)
        turn = np.eye(len(turn))[turn] if turn.ndim == 1 else turn
        before, after = (int(np.prod(s)) for s in (part.shape[: part.axis], part.shape[part.axis + 1 :]))
        matrix[part.start : part.stop, part.start : part.stop] = np.kron(np.kron(np.eye(before), turn), np.eye(after))
    return matrix


def random(*shape):
    return np.random.default_rng(5).normal(size=shape)


@each
def test_the_map_and_its_inverse_are_the_matrix_and_its_transpose(name):
    coordinates, x, wide = MAPS[name](), random(P), random(P, 4)
    matrix = dense(coordinates)
    apply = jax.jit(lambda c, x: (c(x), c.inverse()(x)))
    for value in (x, wide):
        forward, backward = apply(coordinates, value)
        np.testing.assert_allclose(forward, matrix @ value, atol=1e-12)
        np.testing.assert_allclose(backward, matrix.T @ value, atol=1e-12)
    np.testing.assert_allclose(coordinates.inverse()(coordinates(x)), x, atol=1e-12)


@each
def test_indices_are_those_of_a_permutation_or_refused(name):
    coordinates = MAPS[name]()
    assert coordinates.is_permutation == (name in ("permutations", "none"))
    if coordinates.is_permutation:
        np.testing.assert_array_equal(random(P)[coordinates.indices(P)], coordinates(jnp.array(random(P))))
    else:
        with pytest.raises(ValueError, match=r"LowRank and Diagonal carry permutations only; Kronecker and Dense"):
            coordinates.indices(P)


def precisions():
    diagonal, factor = np.random.default_rng(1).uniform(0.5, 2, P), random(P, 3)
    return {
        "dense": DensePrecision(jnp.array(np.diag(diagonal) + factor @ factor.T)),
        "diagonal": DiagonalPrecision(jnp.array(diagonal)),
        "low rank": DiagonalPlusLowRank(jnp.array(diagonal), jnp.array(factor)),
    }


@each
@pytest.mark.parametrize("structure", ["dense", "diagonal", "low rank"])
def test_structures_carry_a_map_or_say_which_can(structure, name):
    precision, coordinates = precisions()[structure], MAPS[name]()
    matrix = dense(coordinates)
    moments = Moments(jnp.ones(P), jnp.zeros(P), jnp.zeros(P), coordinates)
    if structure != "dense" and not coordinates.is_permutation:
        with pytest.raises(ValueError, match="Kronecker and Dense carry matrices too"):
            precision.mapped(coordinates)
        return
    moved = permuted(precision, moments)
    before = np.asarray(precision.to_dense())
    np.testing.assert_allclose(moved.to_dense(), matrix @ before @ matrix.T, atol=1e-12)
    np.testing.assert_allclose(unpermuted(moved, moments).to_dense(), before, atol=1e-12)
    x = random(P)
    np.testing.assert_allclose(unpermuted_vector(moments, jnp.array(x)), matrix.T @ x, atol=1e-12)


@each
def test_a_step_maps_before_it_scales_and_shifts(name):
    coordinates, gain, shift, mean = MAPS[name](), random(P), random(P) + 1, random(P) - 1
    found = step_mean_vector(Moments(jnp.array(gain), jnp.array(shift), jnp.zeros(P), coordinates), jnp.array(mean))
    np.testing.assert_allclose(found, gain * (dense(coordinates) @ mean) + shift, atol=1e-12)


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
def test_a_leaf_is_turned_along_any_axis(axis):
    value, matrix = random(3, 3, 2), orthogonal(3 if axis != -1 else 2)
    expected = np.moveaxis(np.tensordot(matrix, value, (1, axis)), 0, axis)
    np.testing.assert_allclose(along_axis(jnp.array(matrix), jnp.array(value), axis), expected, atol=1e-12)
    order = np.roll(np.arange(len(matrix)), 1)
    np.testing.assert_array_equal(along_axis(jnp.array(order), jnp.array(value), axis), np.take(value, order, axis))


def test_a_matrix_takes_the_dtype_of_the_leaf():
    turned = along_axis(jnp.array(orthogonal(3)), jnp.ones((3, 2), jnp.float32), 0)
    assert turned.dtype == jnp.float32


def test_what_is_a_permutation_is_told_by_dtype():
    """Tasks may stand in front: then indices are a matrix too."""
    assert is_indices(jnp.zeros((4, 3), int))
    assert not is_indices(jnp.eye(3))
