"""The published settings: penalties of the mean loss in nats, and a filter that runs with them."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from ssm_nn.inference.perturbation import CIFAR100, PERMUTED_MNIST, AllTasks, PerturbationFilter, PlainSVD
from ssm_nn.inference.perturbation.blocks import Factors
from ssm_nn.models.datasets import load
from ssm_nn.models.multi_head import multi_head
from ssm_nn.models.networks import mlp
from ssm_nn.models.streams import permuted


def test_penalties_are_those_of_the_mean_loss_times_the_examples(rng):
    left, right = jnp.asarray(rng.normal(size=(4, 2))), jnp.asarray(rng.normal(size=(2, 3)))
    factors = Factors(jnp.ones(4), jnp.ones(3), left, right, jnp.ones(2))
    of_mean = 1e-4 * sum(np.abs(f).sum() + (np.asarray(f) ** 2).sum() / 2 for f in (left, right))
    assert CIFAR100.arguments(5000)["prior"].penalty(factors) == pytest.approx(5000 * of_mean, rel=1e-5)
    assert 0.5 / CIFAR100.prior_scale(5000) ** 2 == pytest.approx(5000 * 1e-4 / 2)


@pytest.mark.slow
def test_a_filter_with_them_keeps_to_the_published_growth():
    stream = permuted(load("digits"), 3, train_size=256, test_size=10)
    network = mlp((64, 100, 10), "relu")
    program = multi_head(network, "layers.1.*", PERMUTED_MNIST.prior_scale(256))
    made = PerturbationFilter(program, **replace(PERMUTED_MNIST, epochs=2, growth=0.7).arguments(256))
    assert (made.cap, made.warm_up_epochs, made.allocation.alpha) == (100, 1, 0.9)
    assert (made.directions, made.pruning) == (PlainSVD(), AllTasks())
    state, infos = made.run(0, stream.train)
    assert infos[2].pruned > 0
    assert made.storage(state).growth <= 0.7
    with pytest.raises(ValueError, match="num_examples is 0"):
        PERMUTED_MNIST.arguments(0)
