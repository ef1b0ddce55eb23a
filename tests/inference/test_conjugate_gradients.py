"""Conjugate gradients: the solution, where they stop, and what a direction may carry with it."""

import jax.numpy as jnp
import numpy as np
import pytest

from ssm_nn.inference.conjugate_gradients import conjugate_gradients

pytestmark = pytest.mark.usefixtures("x64")


def solved(matrix, right, most_steps, scale=1.0):
    found, rising = conjugate_gradients(
        lambda z: jnp.asarray(matrix) @ z[0], jnp.asarray(right), lambda x: (scale * x)[None], most_steps
    )
    return np.asarray(found), bool(rising)


@pytest.fixture
def positive(rng):
    half = rng.normal(size=(8, 8))
    return half @ half.T + np.eye(8), rng.normal(size=8)


def test_solves_a_positive_definite_system_with_any_preconditioner(positive):
    matrix, right = positive
    for scale in (1.0, 1 / np.diag(matrix)):
        found, rising = solved(matrix, right, 50, scale)
        np.testing.assert_allclose(found, np.linalg.solve(matrix, right), rtol=1e-9)
        assert rising


def test_after_few_steps_the_error_is_least_among_what_powers_of_the_matrix_reach(positive):
    matrix, right = positive
    found, rising = solved(matrix, right, 3)
    reached = np.stack([right, matrix @ right, matrix @ matrix @ right], axis=1)
    best = reached @ np.linalg.solve(reached.T @ matrix @ reached, reached.T @ right)
    np.testing.assert_allclose(found, best, rtol=1e-8)
    assert rising


def test_a_direction_of_negative_curvature_is_told_and_ends_the_solve():
    # the first direction rises by 2 - 0.01, the second falls
    found, rising = solved(np.diag([2.0, -1.0]), [1.0, 0.1], 50)
    assert not rising
    np.testing.assert_allclose(found, 1.01 / 1.99 * np.array([1.0, 0.1]))
    # where the first one falls already, it is the answer
    found, rising = solved(np.diag([-2.0, 1.0]), [1.0, 0.1], 50)
    assert not rising
    np.testing.assert_allclose(found, [1.0, 0.1])


def test_nothing_is_the_solution_of_nothing():
    found, rising = solved(np.eye(3), np.zeros(3), 50)
    np.testing.assert_array_equal(found, np.zeros(3))
    assert rising


def test_a_direction_carries_its_image_under_a_part_of_the_matrix(positive):
    matrix, right = positive
    part = np.diag(np.diag(matrix))
    rest = jnp.asarray(matrix - part)

    def whitened(x):
        white = x / jnp.diagonal(jnp.asarray(part))
        return jnp.stack([white, x])

    found, rising = conjugate_gradients(lambda z: z[1] + rest @ z[0], jnp.asarray(right), whitened, 50)
    np.testing.assert_allclose(found, np.linalg.solve(matrix, right), rtol=1e-9)
    assert bool(rising)


def test_stops_at_rounding():
    """A product more would divide by a residual that is nothing but rounding: a count of the steps tells."""
    products = []

    def counted(z):
        import jax

        jax.debug.callback(lambda: products.append(1))
        return 2.0 * z[0]

    found, _ = conjugate_gradients(counted, jnp.ones(5), lambda x: x[None], 50)
    np.testing.assert_allclose(found, 0.5)
    assert len(products) == 1
