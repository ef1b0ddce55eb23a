"""Entries cut to a budget, and the rest fitted again."""

from dataclasses import replace

import numpy as np
import optax
import pytest

from ssm_nn.inference import Minibatch
from ssm_nn.inference.perturbation import FixedRank, Growth, OwnTask, PerturbationFilter
from ssm_nn.inference.perturbation.blocks import Factors
from ssm_nn.inference.perturbation.spending import Spending
from ssm_nn.inference.perturbation.state import TaskRecord, record_numbers
from ssm_nn.models.datasets import load
from ssm_nn.models.multi_head import multi_head
from ssm_nn.models.networks import mlp
from ssm_nn.models.streams import permuted


def record(rng, identity):
    factors = Factors(np.ones(9), np.ones(5), rng.normal(size=(9, 3)), rng.normal(size=(3, 5)), np.ones(3))
    return TaskRecord(identity, {"net": {"bias": np.zeros(5)}}, (factors,))


def test_the_smallest_entries_go_and_no_more_than_needed(rng):
    records = record(rng, 0), record(rng, 1)
    whole = record_numbers(records[1])
    after, cut = OwnTask().prune(records, np.inf, whole - 10)
    assert after[0] is records[0]
    before = np.concatenate([f.ravel() for f in records[1].factors[0][2:4]])
    left = np.concatenate([f.ravel() for f in after[1].factors[0][2:4]])
    assert np.count_nonzero(left == 0) == cut
    assert np.abs(before[left == 0]).max() < np.abs(before[left != 0]).min()
    assert whole - 10 - 1 < record_numbers(after[1]) <= whole - 10  # a bit an entry counts: 42 / 32


def test_an_allocation_may_fill_the_room_as_often_as_the_cut_empties_it():
    growth = Growth(0.5, 3)
    assert Spending(growth, None).budget(100) == 100
    assert Spending(growth, OwnTask(2.5)).budget(100) == 250
    assert Spending(growth, OwnTask()).budget(100) is None
    assert Spending(None, None).budget(None) is None
    with pytest.raises(ValueError, match=r"spread is 0.5"):
        OwnTask(0.5)


@pytest.mark.slow
def test_what_is_cut_stays_at_zero_and_the_rest_fits_better():
    stream = permuted(load("digits"), 3, train_size=320, test_size=10)
    settings = Minibatch(optax.adam(5e-3), epochs=15, batch_size=64)
    program = multi_head(mlp((64, 20, 10), "relu"), "layers.1.*", prior_scale=0.5)

    def learnt(refit):
        made = PerturbationFilter(
            program,
            minibatch=settings,
            fine_tuning=replace(settings, optimizer=optax.adam(1e-2)),
            allocation=FixedRank(6),
            growth=Growth(0.9, 3),
            pruning=OwnTask(2.0, refit),
            curvature_examples=64,
        )
        return made, *made.run(0, stream.train)

    made, cut, infos = learnt(None)
    _, again, _ = learnt(replace(settings, optimizer=optax.adam(2e-3)))
    assert infos[1].pruned > 0
    assert made.storage(again).growth <= 0.9
    for one, two in zip(cut.records[1].factors[0][2:4], again.records[1].factors[0][2:4], strict=True):
        assert np.array_equal(one == 0, two == 0)
        assert not np.array_equal(one, two)
    loss = [-made.predict(state, stream.train[1])["y"].log_density.mean() for state in (cut, again)]
    assert loss[1] < loss[0]
