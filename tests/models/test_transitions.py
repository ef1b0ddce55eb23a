"""Transition kernels against the formulae in their docstrings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_nn import Leaf, MarkovPath, Moments
from ssm_nn.models.transitions import OrnsteinUhlenbeck, Permuted, RandomWalk, Rotated, ShrinkAndPerturb, Static
from ssm_nn.moments import check_moments, moments_of, step_mean
from ssm_nn.precision_dense import DensePrecision
from ssm_nn.precision_diagonal import DiagonalPrecision
from ssm_nn.precision_low_rank import DiagonalPlusLowRank

LEAF = Leaf("layers.0.kernel", (3, 2), np.array([[0.5, -1.0]]), 2.0)
PER_ROW = np.array([[0.1], [0.0], [0.7]])

KERNELS = {
    "static": (Static(), (1, 0, 0)),
    "random walk": (RandomWalk(0.3), (1, 0, 0.09)),
    "random walk, a scale a row": (RandomWalk(PER_ROW), (1, 0, PER_ROW**2)),
    "random walk without noise": (RandomWalk(0.0), (1, 0, 0)),
    "Ornstein-Uhlenbeck": (OrnsteinUhlenbeck(0.6), (0.6, 0.4 * LEAF.loc, (1 - 0.36) * 4)),
    "Ornstein-Uhlenbeck, static": (OrnsteinUhlenbeck(1.0), (1, 0, 0)),
    "Ornstein-Uhlenbeck, drawn anew": (OrnsteinUhlenbeck(0.0), (0, LEAF.loc, 4)),
    "shrink and perturb": (ShrinkAndPerturb(0.8, 0.1), (0.8, 0, 0.01)),
    "a function": (lambda leaf: Moments(0.5, leaf.loc, 0.2), (0.5, LEAF.loc, 0.2)),
}


@pytest.mark.parametrize("name", KERNELS)
def test_moments(name):
    kernel, expected = KERNELS[name]
    moments = moments_of(kernel, LEAF)
    for found, value in zip(moments[:3], expected, strict=True):
        np.testing.assert_allclose(
            np.broadcast_to(found, LEAF.shape), np.broadcast_to(value, LEAF.shape), rtol=1e-6, atol=1e-12
        )
    assert moments.permutation is None


def test_a_static_leaf_is_written_as_one_that_never_moves():
    """Not so a random walk of scale 0, whose scale may be a hyper-parameter."""
    assert tuple(moments_of(Static(), LEAF)[:3]) == (1.0, 0.0, 0.0)
    assert all(isinstance(m, float) for m in moments_of(Static(), LEAF)[:3])
    assert isinstance(moments_of(RandomWalk(0.0), LEAF).noise, jax.Array)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("structure", ["dense", "diagonal", "low rank"])
@pytest.mark.parametrize("retention", [0.0, 0.7, 0.999, 1.0])
def test_ornstein_uhlenbeck_keeps_the_prior(structure, retention):
    """20 steps from the prior are the prior."""
    size = 6
    scale, loc = jnp.linspace(0.5, 2, size), jnp.linspace(-1, 1, size)
    precision = {
        "dense": lambda: DensePrecision(jnp.diag(1 / scale**2)),
        "diagonal": lambda: DiagonalPrecision(1 / scale**2),
        "low rank": lambda: DiagonalPlusLowRank(1 / scale**2, jnp.zeros((size, 2))),
    }[structure]()
    step = OrnsteinUhlenbeck(retention).moments(Leaf("w", (size,), loc, scale))
    step = jax.tree.map(lambda moment: jnp.broadcast_to(moment, (size,)), step)
    mean = loc
    for _ in range(20):
        precision, mean = precision.predict(step), step_mean(step, mean)
    np.testing.assert_allclose(mean, loc, rtol=1e-12)
    np.testing.assert_allclose(precision.to_dense(), np.diag(1 / scale**2), rtol=1e-12)


def test_ornstein_uhlenbeck_does_not_cancel_near_one():
    """1 - g^2 for g = 1 - 2^-22 in float32: 1 - g * g alone would be off by an eighth."""
    g = np.float32(1 - 2.0**-22)
    noise = OrnsteinUhlenbeck(jnp.float32(g)).moments(Leaf("w", (), 0.0, 1.0)).noise
    np.testing.assert_allclose(noise, 2.0**-21, rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
def test_permuted_weights_give_the_same_outputs_on_permuted_inputs(axis):
    """Axis 0 of a kernel (in, out), axis 1 of a weight (out, in)."""
    rng = np.random.default_rng(0)
    order = rng.permutation(5)
    kernel, x = rng.normal(size=(5, 4)), rng.normal(size=(7, 5))
    leaf = Leaf("w", (5, 4) if axis == 0 else (4, 5), 0.0, 1.0)
    moments = Permuted(order, axis=axis).moments(leaf)
    moved = step_mean(moments, jnp.array(kernel if axis == 0 else kernel.T))
    outputs = np.tanh(x @ kernel)
    shuffled = x[:, order]
    found = np.tanh(shuffled @ np.asarray(moved if axis == 0 else moved.T))
    np.testing.assert_allclose(found, outputs, rtol=1e-5)
    assert np.abs(np.tanh(shuffled @ kernel) - outputs).max() > 0.1


def test_permuted_keeps_the_noise_of_the_kernel_behind_it():
    moments = Permuted(np.array([2, 0, 1]), then=RandomWalk(0.3)).moments(LEAF)
    np.testing.assert_allclose(moments.noise, 0.09, rtol=1e-6)
    value = jnp.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(step_mean(moments, value), value[np.array([2, 0, 1])])
    path = MarkovPath(0.0, 1.0, moments, 2, LEAF.shape)
    expected = -0.5 * 6 * np.log(2 * np.pi) * 2 - 3 * np.log(0.09) - 0.5 * float(jnp.sum(value**2))
    np.testing.assert_allclose(path.log_prob(jnp.stack([value, value[np.array([2, 0, 1])]])), expected, rtol=1e-5)


def test_permuted_inside_permuted_is_refused():
    with pytest.raises(ValueError, match="compose the two permutations into one"):
        Permuted(np.arange(3), then=Permuted(np.arange(3))).moments(LEAF)


@pytest.mark.parametrize("order", [np.array([0, 1]), np.array([0, 1, 1]), np.array([1, 2, 3]), np.zeros((3, 1), int)])
def test_a_permutation_names_each_row_once(order):
    with pytest.raises(ValueError, match=r"each of 0 .. 2 once \(axis 0 of shape \(3, 2\)\)"):
        Permuted(order).moments(LEAF)


def orthogonal(size):
    return np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))[0]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_rotated_weights_give_the_same_outputs_on_rotated_inputs(axis):
    """Axis 0 of a kernel (in, out), axis 1 of a weight (out, in)."""
    rng = np.random.default_rng(0)
    matrix, kernel, x = orthogonal(5), rng.normal(size=(5, 4)), rng.normal(size=(7, 5))
    moments = Rotated(matrix, axis).moments(Leaf("w", (5, 4) if axis == 0 else (4, 5), 0.0, 1.0))
    moved = np.asarray(step_mean(moments, jnp.array(kernel if axis == 0 else kernel.T)))
    turned = x @ matrix.T
    np.testing.assert_allclose(turned @ (moved if axis == 0 else moved.T), x @ kernel, atol=1e-12)
    assert np.abs(turned @ kernel - x @ kernel).max() > 0.1


@pytest.mark.usefixtures("x64")
def test_a_rotation_by_a_permutation_is_the_permutation():
    order, value = np.array([2, 0, 1]), np.arange(6.0).reshape(3, 2)
    turned, permuted = (kernel.moments(LEAF) for kernel in (Rotated(np.eye(3)[order]), Permuted(order)))
    np.testing.assert_array_equal(step_mean(turned, jnp.array(value)), step_mean(permuted, jnp.array(value)))


@pytest.mark.usefixtures("x64")
def test_rotated_keeps_the_kernel_behind_it_and_its_path_the_density():
    """theta_1 ~ N(0.8 O theta_0, 0.09), theta_0 ~ N(0, 1), by numpy."""
    matrix = orthogonal(3)
    moments = Rotated(matrix, then=ShrinkAndPerturb(0.8, 0.3)).moments(LEAF)
    np.testing.assert_allclose([moments.gain, moments.shift, moments.noise], [0.8, 0, 0.09])
    path = MarkovPath(0.0, 1.0, moments, 2, LEAF.shape)
    first, second = np.random.default_rng(1).normal(size=(2, *LEAF.shape))
    residual = second - 0.8 * np.einsum("ij,jk->ik", matrix, first)
    expected = -0.5 * np.sum(first**2 + residual**2 / 0.09) - 6 * np.log(2 * np.pi) - 3 * np.log(0.09)
    np.testing.assert_allclose(path.log_prob(jnp.array([first, second])), expected, rtol=1e-12)
    still = MarkovPath(0.5, 1e-9, Rotated(matrix).moments(LEAF), 3, LEAF.shape).sample(jax.random.key(0))
    np.testing.assert_allclose(still[2], matrix @ matrix @ np.asarray(still[0]), atol=1e-6)


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        (np.eye(3) * 1.01, r"has shape \(3, 3\) and differs from an orthogonal one by 0.02"),
        (np.ones((3, 2)), r"has shape \(3, 2\) and differs from an orthogonal one by inf"),
        (np.ones(3), "an orthogonal matrix is accepted, such as orthogonal_rotation's"),
        (np.full((3, 3), np.nan), "differs from an orthogonal one by nan"),
    ],
)
def test_a_matrix_that_is_not_orthogonal_is_refused(matrix, words):
    with pytest.raises(ValueError, match=words):
        Rotated(matrix).moments(LEAF)


def test_a_matrix_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"maps axis 1 of 'layers.0.kernel' \(shape \(3, 2\)\) .* shape \(3, 3\)"):
        check_moments(Rotated(orthogonal(3), 1).moments(LEAF), LEAF)


@pytest.mark.parametrize("inner", [Permuted(np.arange(3)), Rotated(np.eye(3))])
def test_rotated_around_another_map_is_refused(inner):
    with pytest.raises(ValueError, match="multiply the two into one matrix"):
        Rotated(np.eye(3), then=inner).moments(LEAF)
    with pytest.raises(ValueError, match="compose the two"):
        Permuted(np.arange(3), then=Rotated(np.eye(3))).moments(LEAF)


def test_scales_are_checked_under_jit_only_by_their_shapes():
    """A traced scale has no value to check."""
    noise = jax.jit(lambda scale: RandomWalk(scale).moments(LEAF).noise)(0.5)
    np.testing.assert_allclose(noise, 0.25)
