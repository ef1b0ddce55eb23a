"""Conjugate gradients: the solution, where they stop, and what a direction may carry with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_nn.inference.conjugate_gradients import conjugate_gradients

pytestmark = pytest.mark.usefixtures("x64")


def solved(matrix, right, most_steps, scale=1.0):
    """The answer, whether all directions rose, and how many products with the matrix that took."""
    products = []

    def matvec(z):
        jax.debug.callback(lambda: products.append(1))
        return jnp.asarray(matrix) @ z[0]

    found, rising = conjugate_gradients(matvec, jnp.asarray(right), lambda x: (scale * x)[None], most_steps)
    jax.effects_barrier()
    return np.asarray(found), bool(rising), len(products)


@pytest.fixture
def positive(rng):
    half = rng.normal(size=(8, 8))
    return half @ half.T + np.eye(8), rng.normal(size=8)


def test_solves_a_positive_definite_system_with_any_preconditioner(positive):
    matrix, right = positive
    for scale in (1.0, 1 / np.diag(matrix)):
        found, rising, _ = solved(matrix, right, 50, scale)
        np.testing.assert_allclose(found, np.linalg.solve(matrix, right), rtol=1e-9)
        assert rising


def test_after_few_steps_the_error_is_least_among_what_powers_of_the_matrix_reach(positive):
    matrix, right = positive
    found, rising, products = solved(matrix, right, 3)
    reached = np.stack([right, matrix @ right, matrix @ matrix @ right], axis=1)
    best = reached @ np.linalg.solve(reached.T @ matrix @ reached, reached.T @ right)
    np.testing.assert_allclose(found, best, rtol=1e-8)
    assert rising
    assert products == 3


def test_a_direction_of_negative_curvature_is_told_and_ends_the_solve():
    # the first direction rises by 2 - 0.01, the second falls
    found, rising, products = solved(np.diag([2.0, -1.0]), [1.0, 0.1], 50)
    assert not rising
    assert products == 2
    np.testing.assert_allclose(found, 1.01 / 1.99 * np.array([1.0, 0.1]))
    # where the first one falls already, it is the answer
    found, rising, products = solved(np.diag([-2.0, 1.0]), [1.0, 0.1], 50)
    assert not rising
    assert products == 1
    np.testing.assert_allclose(found, [1.0, 0.1])


def test_nothing_is_the_solution_of_nothing():
    found, rising, products = solved(np.eye(3), np.zeros(3), 50)
    np.testing.assert_array_equal(found, np.zeros(3))
    assert rising
    assert products == 0


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
    """A product more would divide by a residual that is nothing but rounding."""
    found, _, products = solved(2 * np.eye(5), np.ones(5), 50)
    np.testing.assert_allclose(found, 0.5)
    assert products == 1
    # and no later than that
    values = np.array([1.0, 1.0 + 1e-4])
    assert solved(np.diag(values), np.ones(2), 50)[2] == 2
