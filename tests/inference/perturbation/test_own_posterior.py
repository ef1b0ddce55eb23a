"""Laplace's belief over a task's own parameters: the Gauss-Newton matrix where they are few, its diagonal beyond."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from ssm_nn.inference import Minibatch
from ssm_nn.inference.perturbation import FixedRank, PerturbationFilter
from ssm_nn.inference.perturbation import posterior as posterior_module
from ssm_nn.inference.perturbation.posterior import DenseOwnPrecision, DiagonalOwnPrecision, diagonal_information
from ssm_nn.models.datasets import load
from ssm_nn.models.multi_head import multi_head
from ssm_nn.models.networks import mlp
from ssm_nn.models.streams import permuted

NETWORK = mlp((64, 5, 10), "tanh")
EXAMPLES = 60


@pytest.fixture(scope="module")
def learnt():
    """A filter, its state after two tasks, and the second one's belief."""
    stream = permuted(load("digits"), 2, train_size=EXAMPLES, test_size=20)
    program = multi_head(NETWORK, "layers.1.*", prior_scale=0.5)
    # rank 2 of 3 that are looked at: padding is left
    settings = {"minibatch": Minibatch(epochs=3, batch_size=20), "allocation": FixedRank(2), "cap": 3}
    made = PerturbationFilter(program, **settings, curvature_examples=EXAMPLES)
    state, _ = made.run(0, [stream.train[0], stream.train[1]])
    return made, state, stream.train[1], made.posterior(state, stream.train[1])


def dense_precision(known, task):
    """P (m, m) from the weights as they are composed, one example's Jacobian after another, in float64."""
    flat, unravel = ravel_pytree(known.own)

    def logits(z):
        a = known.kind.composed(unravel(z), known.around)["net"]
        tree = {"layers": [{k: a[f"layers.{n}.{k}"] for k in ("kernel", "bias")} for n in range(2)]}
        return NETWORK[0](tree, task["x"])

    jacobian = np.asarray(jax.jacobian(logits)(flat), np.float64)
    p = np.asarray(jax.nn.softmax(logits(flat)), np.float64)
    total = np.zeros((flat.size, flat.size))
    for j, q in zip(jacobian, p, strict=True):
        total += j.T @ (np.diag(q) - np.outer(q, q)) @ j
    return total


def test_few_own_parameters_have_the_dense_gauss_newton_matrix(learnt):
    _, _, task, belief = learnt
    known = belief.precision
    assert isinstance(known, DenseOwnPrecision)
    free = np.asarray(known.free)
    assert 0 < (~free).sum() < free.size  # the padding, and the mask itself
    information = dense_precision(known, task)[np.ix_(free, free)]
    root = np.asarray(known.root, np.float64)
    found = (root @ root.T)[np.ix_(free, free)]
    prior = found - information
    np.testing.assert_allclose(prior, np.diag(np.diag(prior)), atol=2e-4 * found.max())
    # own leaves N(0, .5^2); scales N(1, 1); factors l1 = l2 = 1: 1 + 1 / 2
    assert {round(float(v), 2) for v in np.diag(prior)} <= {4.0, 1.0, 1.5}


def test_shifts_and_variances_are_those_of_its_inverse(learnt):
    _, _, _, belief = learnt
    known = belief.precision
    free = np.asarray(known.free)
    count = free.size
    shifts = jax.vmap(lambda e: ravel_pytree(known.own_shift(e))[0])(jnp.diag(known.free.astype(float)))
    assert np.all(np.asarray(shifts)[:, ~free] == 0)
    root = np.asarray(known.root, np.float64)
    inverse = np.linalg.inv(root @ root.T)
    np.testing.assert_allclose((shifts.T @ shifts)[np.ix_(free, free)], inverse[np.ix_(free, free)], atol=1e-4)
    flat, unravel = ravel_pytree(known.own)
    jacobian = np.asarray(jax.jacobian(lambda z: known._theta(unravel(z)))(flat), np.float64)
    inverse[~free] = inverse[:, ~free] = 0
    np.testing.assert_allclose(known.variance(), np.einsum("pi,ij,pj->p", jacobian, inverse, jacobian), atol=2e-4)
    noise = known.own_noise(jax.random.key(1))
    assert noise.shape == (count,)
    assert np.all(np.asarray(noise)[~free] == 0)
    drawn = known.sample(jax.random.key(1))
    np.testing.assert_allclose(drawn, jacobian @ ravel_pytree(known.own_shift(noise))[0], atol=1e-4)


def test_many_have_its_diagonal_by_random_signs(learnt, monkeypatch):
    made, state, task, belief = learnt
    known = belief.precision
    ready = made._checked(1, task)
    kind, own, around = known.kind, known.own, known.around
    drawn = [
        ravel_pytree(diagonal_information(kind, own, around, ready, jax.random.key(seed), EXAMPLES))[0]
        for seed in range(60)
    ]
    mean, spread = np.mean(drawn, axis=0), np.std(drawn, axis=0) / np.sqrt(60)
    exact = np.diag(dense_precision(known, task))
    free = np.asarray(known.free)
    assert np.all(np.abs(mean - exact)[free] <= 5 * spread[free] + 1e-3)
    monkeypatch.setattr(posterior_module, "_MOST_DENSE", 10)
    wide = made.posterior(state, task).precision
    assert isinstance(wide, DiagonalOwnPrecision)
    noise = wide.own_noise(jax.random.key(0))
    shift = ravel_pytree(wide.own_shift(noise))[0]
    values = ravel_pytree(wide.values)[0]
    np.testing.assert_allclose(shift[free], (noise / jnp.sqrt(values))[free], rtol=1e-6)
    assert np.all(np.asarray(shift)[~free] == 0)
