"""What only large heads meet: inverses by halves, and the dual climb by conjugate gradients."""

import jax.numpy as jnp
import numpy as np
import pytest

from ssm_nn.inference.last_layer import map_search
from ssm_nn.inference.last_layer.full_covariance import inverse_of
from ssm_nn.inference.last_layer.head_likelihoods import Categorical

pytestmark = pytest.mark.usefixtures("x64")


def test_an_inverse_by_halves_is_the_inverse(rng):
    wide = rng.normal(size=(1100, 1100))
    matrix = np.eye(1100) + wide @ wide.T / 1100
    inverse, log_determinant = inverse_of(jnp.asarray(matrix))
    np.testing.assert_allclose(inverse, np.linalg.inv(matrix), atol=1e-12)
    assert float(log_determinant) == pytest.approx(np.linalg.slogdet(matrix)[1], rel=1e-12)


@pytest.mark.parametrize("width", [1.0, 100.0])  # of the prior, in standard deviations
def test_a_dual_climb_by_conjugate_gradients_ends_where_the_direct_one_does(width, rng, monkeypatch):
    root = width * rng.normal(size=(300, 40))
    kernel = jnp.asarray(root @ root.T / 10).reshape(60, 5, 60, 5)
    y, f_0 = jnp.asarray(rng.integers(0, 5, 60)), jnp.asarray(rng.normal(size=(60, 5)))
    assert f_0.size > map_search._DIRECT
    found = map_search.climb_in_outputs(kernel, f_0, Categorical(5), y, jnp.ones(60))
    monkeypatch.setattr(map_search, "_DIRECT", f_0.size)
    expected = map_search.climb_in_outputs(kernel, f_0, Categorical(5), y, jnp.ones(60))
    np.testing.assert_allclose(found.outputs, expected.outputs, atol=1e-9 * width)
    np.testing.assert_allclose(found.log_likelihood, expected.log_likelihood, rtol=1e-9)
    assert found.steps <= expected.steps + 3  # of Newton: each direction is good enough
