"""Turning images, and the orthogonal matrices nearest to it."""

import numpy as np
import pytest
from scipy import linalg, ndimage

from ssm_nn.models.datasets import load
from ssm_nn.models.rotations import orthogonal_rotation, rotation, turned

ANGLES = [5.0, -37.5, 45.0, 120.0, 359.0]


@pytest.mark.parametrize("degrees", ANGLES)
@pytest.mark.parametrize("image", [(8, 8), (9, 9), (6, 11)])
def test_it_is_orthogonal_to_the_precision_of_float64(image, degrees):
    matrix = orthogonal_rotation(*image, degrees)
    assert matrix.dtype == np.float64
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(len(matrix)), atol=1e-13)


@pytest.mark.parametrize("degrees", ANGLES)
def test_it_is_the_polar_factor_of_the_bilinear_rotation(degrees):
    dense = rotation(8, 8, degrees).toarray().astype(np.float64)
    matrix = orthogonal_rotation(8, 8, degrees)
    stretch = matrix.T @ dense  # R = O P with P symmetric and positive semi-definite, whatever the route to O
    np.testing.assert_allclose(stretch, stretch.T, atol=1e-12)
    assert np.linalg.eigvalsh(stretch).min() > -1e-12
    if np.linalg.cond(dense) < 1e6:
        np.testing.assert_allclose(matrix, linalg.polar(dense)[0], atol=1e-6)


def test_no_other_orthogonal_matrix_is_nearer(rng):
    dense = rotation(7, 7, 20.0).toarray()
    matrix = orthogonal_rotation(7, 7, 20.0)
    distance = np.linalg.norm(matrix - dense)
    for size in (1e-3, 1e-1, 1.0):
        skew = rng.normal(size=matrix.shape) * size
        assert np.linalg.norm(matrix @ linalg.expm(skew - skew.T) - dense) > distance
    assert np.linalg.norm(orthogonal_rotation(7, 7, 21.0) - dense) > distance


@pytest.mark.parametrize("quarters", [0, 1, 2, 3, 4, -1])
@pytest.mark.parametrize("size", [8, 9, 28])
def test_quarter_turns_are_exact(size, quarters, rng):
    x = rng.random((size, size))
    moved = (orthogonal_rotation(size, size, 90.0 * quarters) @ x.ravel()).reshape(size, size)
    np.testing.assert_array_equal(moved, np.rot90(x, quarters))


def test_a_half_turn_of_an_oblong_image_is_exact_too(rng):
    x = rng.random((6, 11))
    np.testing.assert_allclose(
        (orthogonal_rotation(6, 11, 180.0) @ x.ravel()).reshape(6, 11), x[::-1, ::-1], atol=1e-13
    )


@pytest.mark.parametrize("degrees", [15.0, 45.0])
def test_a_layer_moved_by_it_answers_to_turned_digits_as_before(degrees, rng):
    """Digits of 28 x 28 hold little beyond what the interpolation keeps; smooth weights answer nearly alike."""
    blurred = ndimage.gaussian_filter(rng.normal(size=(20, 28, 28)), (0, 2, 2))
    weights = (blurred * np.hanning(28)[:, None] * np.hanning(28)).reshape(20, -1).T
    x = ndimage.zoom(load("digits").test_x[:50], (1, 2.5, 2.5), order=1)
    x = np.pad(x, ((0, 0), (4, 4), (4, 4)))
    before, after = x.reshape(50, -1) @ weights, turned(x, degrees).reshape(50, -1) @ weights
    moved = turned(x, degrees).reshape(50, -1) @ (orthogonal_rotation(28, 28, degrees) @ weights)
    assert np.linalg.norm(moved - before) < 0.05 * np.linalg.norm(before)
    assert np.linalg.norm(moved - before) < 0.2 * np.linalg.norm(after - before)


def test_each_channel_is_turned_by_itself(rng):
    x = rng.random((4, 6, 7, 3)).astype(np.float32)
    together = turned(x, 25.0)
    assert (together.shape, together.dtype) == (x.shape, np.float32)
    for channel in range(3):
        np.testing.assert_array_equal(together[..., channel], turned(x[..., channel], 25.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 3, 5.0), "height and width are 0 and 3"), ((3, 3, float("inf")), "degrees is inf; a finite number")],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        orthogonal_rotation(*arguments)
