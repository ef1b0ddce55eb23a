"""Baselines with a head for every task, in their limits."""

import jax
import numpy as np
import optax
import pytest

from ssm_nn.inference import Minibatch
from ssm_nn.inference.perturbation.baselines import ElasticHeads, FineTuned, HeadTraining, L2ToBase, Packed, SingleTask
from ssm_nn.inference.perturbation.directions import PlainSVD
from ssm_nn.inference.perturbation.filter import PerturbationFilter
from ssm_nn.inference.perturbation.joint import train_jointly
from ssm_nn.models.datasets import load
from ssm_nn.models.multi_head import multi_head
from ssm_nn.models.networks import mlp
from ssm_nn.models.streams import permuted

STREAM = permuted(load("digits"), 3, train_size=320, test_size=100)
TASKS = [STREAM.train[t] for t in range(3)]
PROGRAM = multi_head(mlp((64, 16, 10), "relu"), "layers.1.*", prior_scale=0.5)
ENGINE = PerturbationFilter(
    PROGRAM,
    minibatch=Minibatch(optax.adam(5e-3), epochs=20, batch_size=64),
    directions=PlainSVD(),
    curvature_examples=64,
)
KERNEL = "layers.0.kernel"


def learnt(method, order=(0, 1, 2)):
    training = HeadTraining(ENGINE, method)
    states = [training.init(0, TASKS[0])]
    for t in order:
        states.append(training.update(states[-1], TASKS[t])[0])
    return training, states


def kernel(training, state, t):
    return np.asarray(training.weights(state, t)["net"][KERNEL])


def accuracy(training, state, t):
    return (training.predict(state, STREAM.test[t])["y"].probabilities.argmax(1) == STREAM.test[t]["y"]).mean()


def test_a_task_learnt_alone_starts_where_the_network_does():
    training, states = learnt(SingleTask())
    assert training.storage(states[-1]).growth == 2
    assert np.array_equal(kernel(training, states[1], 0), kernel(training, states[3], 0))
    # nothing but the random order of the batches differs when others came before
    other, turned = learnt(SingleTask(), (1, 0, 2))
    assert np.array_equal(kernel(training, states[3], 2), kernel(other, turned[3], 2))


def test_fine_tuning_shares_what_elastic_heads_and_an_anchor_hold():
    tuned, states = learnt(FineTuned())
    assert np.array_equal(kernel(tuned, states[3], 0), kernel(tuned, states[3], 2))
    moved = np.abs(kernel(tuned, states[2], 1) - kernel(tuned, states[1], 0)).max()
    free, loose = learnt(ElasticHeads(0.0))
    np.testing.assert_allclose(kernel(free, loose[3], 2), kernel(tuned, states[3], 2), atol=1e-4)
    stiff, held = learnt(ElasticHeads(1e6))
    shift = np.abs(kernel(stiff, held[2], 1) - kernel(stiff, held[1], 0))
    known = np.asarray(held[1].note["net"][KERNEL]) > 0.1
    assert shift[known].max() < 0.05 * moved
    near, anchored = learnt(L2ToBase(1e8))
    assert np.abs(kernel(near, anchored[3], 2) - kernel(near, anchored[1], 0)).max() < 0.05 * moved


def test_packed_weights_of_earlier_tasks_stay():
    training, states = learnt(Packed(1 / 3))
    for t in range(3):
        first = training.predict(states[t + 1], STREAM.test[t])["y"].probabilities
        assert np.array_equal(first, training.predict(states[3], STREAM.test[t])["y"].probabilities)
    used = [np.count_nonzero(kernel(training, states[3], t)) for t in range(3)]
    third = round(64 * 16 / 3)
    assert used[0] <= third
    assert used[2] > used[1] > used[0]
    mine = kernel(training, states[3], 0) != 0
    assert np.array_equal(kernel(training, states[3], 2)[mine], kernel(training, states[3], 0)[mine])


@pytest.mark.slow
def test_joint_training_shares_one_kernel_and_learns_every_task():
    state = train_jointly(ENGINE, 0, TASKS)
    reader = HeadTraining(ENGINE, FineTuned())
    assert all(np.array_equal(kernel(reader, state, 0), kernel(reader, state, t)) for t in range(3))
    assert min(accuracy(reader, state, t) for t in range(3)) > 0.6
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.weights))


def test_bad_input_of_baselines_is_named():
    training, states = learnt(FineTuned(), (0,))
    with pytest.raises(ValueError, match="learnt before"):
        training.update(states[1], TASKS[0])
    with pytest.raises(ValueError, match="never seen"):
        training.weights(states[1], 2)
    with pytest.raises(ValueError, match="share is 0"):
        Packed(0.0)
    with pytest.raises(ValueError, match="strength is -1"):
        HeadTraining(ENGINE, ElasticHeads(-1.0))
