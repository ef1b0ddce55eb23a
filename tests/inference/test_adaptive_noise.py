"""Noise that follows the shift: exact on linear-Gaussian streams, useful on one that stands still but for a jump."""

import math
from functools import cache

import numpy as np
import pytest
from oracles_gaussian import condition
from walking_regression import GAINS, NOISES, P, chain_of, program, tasks_of

from ssm_nn.inference.adaptive_noise import AdaptiveFilter
from ssm_nn.inference.laplace import LaplaceFilter
from ssm_nn.inference.structures import Dense, Diagonal, LowRank

pytestmark = pytest.mark.usefixtures("x64")

STRUCTURES = {"dense": Dense(), "full rank": LowRank(P)}
exact = pytest.mark.parametrize("structure", STRUCTURES)
CENTRE = (0.05, 0.05)
# still, but for a jump of the first group into task 5
JUMP = [(30.0 if t == 5 else 1e-8, 1e-8) for t in range(10)]


def hypers_of(noise):
    return dict(zip([*NOISES, *GAINS], [*noise, 1.0, 1.0], strict=True))


@cache
def engine(structure):
    return LaplaceFilter(program, STRUCTURES[structure], hypers=hypers_of(CENTRE))


@exact
def test_the_choice_is_the_maximum_of_the_exact_evidence_over_the_grid(structure):
    """Every pair of scales tried by the dense joint Gaussian, given what was chosen before."""
    tasks = tasks_of(4, noise=[(2.0 if t == 2 else 0.01, 0.05) for t in range(4)], num_tasks=4)
    scales, spread = (0.01, 0.1, 1.0, 10.0, 100.0), 1.5
    filter_ = AdaptiveFilter(engine(structure), list(NOISES), spread=spread, scales=scales)
    found = filter_.run(0, tasks)
    chosen = []
    for t in range(1, 4):
        merits = {}
        for one in scales:
            for two in scales:
                noises = [*chosen, (CENTRE[0] * one, CENTRE[1] * two)]
                chain = chain_of(tasks[: t + 1], CENTRE)
                steps = [
                    (m, b, np.diag(np.repeat(q, [3, 2]))) for (m, b, _), q in zip(chain.steps, noises, strict=True)
                ]
                penalty = 0.5 * (math.log(one) ** 2 + math.log(two) ** 2) / spread**2
                merits[noises[-1]] = condition(chain._replace(steps=steps)).log_evidence - penalty
        best = max(merits, key=merits.__getitem__)
        chosen.append(best)
        info = found.infos[t]
        np.testing.assert_allclose([info.hypers[name] for name in NOISES], best, rtol=1e-9)
        np.testing.assert_allclose(np.asarray(info.info.moments.noise), np.repeat(best, [3, 2]), rtol=1e-9)
    # and the closed form needs no second round to find it
    assert max(len(info.tried) for info in found.infos) <= 3


@exact
def test_a_jump_frees_its_group_and_a_repeated_task_does_not(structure):
    tasks = tasks_of(7, noise=JUMP, num_tasks=10)
    found = AdaptiveFilter(engine(structure), list(NOISES)).run(0, tasks)
    first, second = found.noises("noise.first"), found.noises("noise.second")
    assert np.isnan(first[0])
    assert np.isnan(second[0])
    assert first[5] > 1
    still = np.append(np.delete(first, [0, 5]), second[1:])
    assert np.all(still <= CENTRE[0] * (1 + 1e-9))
    assert np.median(still) < 0.6 * CENTRE[0]
    fixed = engine(structure).run(0, tasks)
    assert found.filtered.log_evidence > fixed.log_evidence + 5
    # the smoother takes the chosen noise: it does not carry what came after the jump to before it
    smoothed = engine(structure).smooth(found.filtered)
    steps = np.linalg.norm(np.diff(np.stack(smoothed.means), axis=0), axis=1)
    assert np.argmax(steps) == 4
    assert steps[4] > 20 * np.delete(steps, 4).max()


def test_updates_equal_run_and_tasks_without_data_take_the_centre():
    tasks = tasks_of(8, noise=JUMP[:4], num_tasks=4, missing=(2,))
    filter_ = AdaptiveFilter(engine("dense"), ["noise.first"])
    found = filter_.run(3, tasks)
    state = filter_.init(3, tasks[0])
    for t, task in enumerate(tasks):
        state, info = filter_.update(state, task)
        assert np.array_equal(state.mean, found.filtered.beliefs[t].mean)
        assert info.hypers == found.infos[t].hypers
    assert found.infos[2].hypers == {}
    np.testing.assert_allclose(np.asarray(found.infos[2].info.moments.noise), 0.05)


def test_the_diagonal_filter_adapts_too():
    tasks = tasks_of(7, noise=JUMP, num_tasks=10)
    filter_ = LaplaceFilter(program, Diagonal(), hypers=hypers_of(CENTRE))
    first = AdaptiveFilter(filter_, list(NOISES)).run(0, tasks).noises("noise.first")
    assert np.nanargmax(first) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noises": []}, "noises is "),
        ({"noises": ["q"]}, "noises names 'q'; the engine has"),
        ({"spread": 0.0}, "spread is 0.0"),
        ({"scales": (0.5, 2.0)}, "scales is "),
        ({"scales": (-1.0, 1.0)}, "scales is "),
        ({"centre": (0.0, 0.1)}, "'noise.first' is 0.0; a centre > 0 is accepted"),
    ],
)
def test_what_cannot_adapt_is_refused(change, message):
    filter_ = engine("dense").with_hypers(hypers_of(change.pop("centre", CENTRE)))
    with pytest.raises(ValueError, match=message):
        AdaptiveFilter(filter_, **({"noises": list(NOISES)} | change))
