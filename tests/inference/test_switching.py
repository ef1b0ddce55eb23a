"""Which kernel moved the weights, and which task a batch belongs to."""

import itertools
import warnings
from functools import cache

import numpy as np
import pytest
from oracles_gaussian import condition
from walking_regression import GAINS, NOISES, P, chain_of, program, tasks_of

from ssm_nn import Task
from ssm_nn.inference.laplace import FilterWarning, LaplaceFilter
from ssm_nn.inference.lbfgs import Lbfgs
from ssm_nn.inference.structures import Dense, Diagonal, LowRank
from ssm_nn.inference.switching import SwitchingFilter
from ssm_nn.inference.task_memory import TaskMemory
from ssm_nn.models.datasets import load
from ssm_nn.models.networks import mlp
from ssm_nn.models.programs import classification
from ssm_nn.models.streams import rotated

STRUCTURES = {"dense": Dense(), "full rank": LowRank(P)}
exact = pytest.mark.parametrize(
    "structure", [pytest.param(name, marks=[pytest.mark.slow] if name != "dense" else []) for name in STRUCTURES]
)
x64 = pytest.mark.usefixtures("x64")
STILL, FIRST, SECOND = (1e-4, 1e-4), (20.0, 1e-4), (1e-4, 20.0)
KERNELS = (STILL, FIRST, SECOND)
# the kernel of the step into each task; the first entry is not used
TRUTH = [0, 0, 0, 1, 1, 1, 0, 0, 2, 2, 0, 0]


@cache
def engines(structure):
    base = LaplaceFilter(program, STRUCTURES[structure], hypers=hypers_of(STILL))
    return [base.with_hypers(hypers_of(noise)) for noise in KERNELS]


def hypers_of(noise):
    return dict(zip([*NOISES, *GAINS], [*noise, 1.0, 1.0], strict=True))


@x64
@exact
def test_known_switch_times_are_found(structure):
    tasks = tasks_of(5, noise=[KERNELS[k] for k in TRUTH], num_tasks=len(TRUTH), size=30)
    found = SwitchingFilter(engines(structure), stay=0.8).run(0, tasks)
    assert found.kernels[1:].tolist() == TRUTH[1:]
    assert np.all(found.probabilities[np.arange(1, len(TRUTH)), TRUTH[1:]] > 0.9)
    np.testing.assert_allclose(found.probabilities.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(found.probabilities[0], 1 / 3, rtol=1e-6)
    # the belief is the filter's that was told the kernels
    chain = chain_of(tasks, STILL)
    steps = [
        (m, b, np.diag(np.repeat(KERNELS[k], [3, 2]))) for (m, b, _), k in zip(chain.steps, TRUTH[1:], strict=True)
    ]
    told = condition(chain._replace(steps=steps))
    smoothed = engines(structure)[0].smooth(found.filtered)
    np.testing.assert_allclose(np.stack(smoothed.means), told.mean, atol=1e-8)
    single = [engine.run(0, tasks).log_evidence for engine in engines(structure)]
    assert found.log_evidence > max(single) + 5


@x64
def test_probabilities_of_one_step_are_bayes_rule_on_the_exact_evidence():
    """And with a gap in the data the kernels' chain moves on."""
    tasks = tasks_of(6, noise=(0.3, 0.3), num_tasks=2)
    transition = np.array([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    initial = np.array([0.2, 0.5, 0.3])
    filter_ = SwitchingFilter(engines("dense"), transition=transition, initial=initial)
    found = filter_.run(0, tasks)
    joint = np.array([condition(chain_of(tasks, noise)).log_evidence for noise in KERNELS]) + np.log(initial)
    expected = np.exp(joint - np.logaddexp.reduce(joint))
    np.testing.assert_allclose(found.probabilities[1], expected, atol=1e-9)
    assert found.log_evidence == pytest.approx(np.logaddexp.reduce(joint), abs=1e-8)
    state = filter_.init(0, tasks[0])
    for task in tasks:
        state, _ = filter_.update(state, task)
    np.testing.assert_allclose(state.weights, expected @ transition, atol=1e-9)
    state, info = filter_.update(state, None)
    np.testing.assert_allclose(info.probabilities, expected @ transition, atol=1e-9)
    np.testing.assert_allclose(state.weights, expected @ transition @ transition, atol=1e-9)


@x64
def test_greedy_weights_agree_with_all_histories_where_kernels_are_told_apart():
    """The exact filter sums over all K^(T-1) histories."""
    truth, count = [0, 0, 1, 0, 2], len(KERNELS)
    tasks = tasks_of(9, noise=[KERNELS[k] for k in truth], num_tasks=5, size=30)
    found = SwitchingFilter(engines("dense"), stay=0.8).run(0, tasks)
    chain, total, last = chain_of(tasks, STILL), [], np.zeros(count)
    transition = np.where(np.eye(count) > 0, 0.8, 0.1)
    for history in itertools.product(range(count), repeat=4):
        steps = [
            (m, b, np.diag(np.repeat(KERNELS[k], [3, 2]))) for (m, b, _), k in zip(chain.steps, history, strict=True)
        ]
        prior = -np.log(count) + sum(np.log(transition[j, k]) for j, k in itertools.pairwise(history))
        total.append((history[-1], prior + condition(chain._replace(steps=steps)).log_evidence))
    all_ = np.logaddexp.reduce([value for _, value in total])
    for kernel, value in total:
        last[kernel] += np.exp(value - all_)
    np.testing.assert_allclose(found.probabilities[-1], last, atol=0.02)
    assert found.log_evidence == pytest.approx(all_, abs=0.1)


@x64
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 1}, "engines has 1 entries"),
        ({"stay": 1.0}, "stay is 1.0"),
        ({"transition": np.ones((3, 3))}, "transition is "),
        ({"initial": [0.5, 0.5]}, "initial is "),
        ({"other": Diagonal()}, "engines have the structures"),
    ],
)
def test_kernels_that_cannot_be_weighed_are_refused(change, message):
    chosen = engines("dense")[: change.pop("count", 3)]
    if "other" in change:
        chosen = [*chosen, LaplaceFilter(program, change.pop("other"), hypers=hypers_of(STILL))]
    with pytest.raises(ValueError, match=message):
        SwitchingFilter(chosen, **change)


@x64
def test_programs_with_other_weights_are_refused():
    other = LaplaceFilter(classification(mlp((5, 2))), Dense(), hypers={"noise.all": 0.1})
    task = Task({"x": np.ones((3, 5), np.float32), "y": np.zeros(3, np.int32)})
    with pytest.raises(ValueError, match="programs with different weights"):
        SwitchingFilter([other, engines("dense")[0]]).init(0, task)


@x64
@exact
def test_memory_tells_linear_tasks_apart(structure):
    """Three weight vectors in turn, each met several times; the belief of each is that of its own batches alone."""
    truth = [0, 0, 1, 0, 1, 2, 2, 0]
    parts = {k: iter(tasks_of(20 + k, noise=(0.0, 0.0), num_tasks=8)) for k in range(3)}
    batches = [next(parts[k]) for k in truth]
    still = engines(structure)[0].with_hypers(hypers_of((0.0, 0.0)))
    found = TaskMemory(still).run(0, batches)
    assert found.tasks.tolist() == truth
    assert [info.is_new for info in found.infos] == [t in (0, 2, 5) for t in range(8)]
    for k, belief in enumerate(found.state.beliefs):
        own = [batch for batch, owner in zip(batches, truth, strict=True) if owner == k]
        alone = condition(chain_of(own, (0.0, 0.0)))
        np.testing.assert_allclose(belief.mean, alone.mean[-1], atol=1e-8)
    assert all(info.probabilities[info.task] > 0.9 for info in found.infos)


@x64
def test_memory_refuses_what_it_cannot_place():
    with pytest.raises(ValueError, match=r"novelty is 1\.0"):
        TaskMemory(engines("dense")[0], novelty=1.0)
    with pytest.raises(ValueError, match="new has the structure"):
        TaskMemory(engines("dense")[0], new=engines("full rank")[0])
    task = tasks_of(0, num_tasks=1)[0]
    memory = TaskMemory(engines("dense")[0])
    with pytest.raises(ValueError, match="task has no data"):
        memory.update(memory.init(0, task), None)


@pytest.mark.slow
def test_memory_recognises_digits_that_are_labelled_otherwise():
    """Three ways of naming the digits, 100 other images each time."""
    truth = [0, 1, 0, 1, 2, 0, 2, 1]
    images = rotated(load("digits"), len(truth), 0.0, 100).train
    batches = [Task({"x": images[t]["x"], "y": (images[t]["y"] + 3 * way) % 10}) for t, way in enumerate(truth)]
    model = classification(mlp((64, 24, 10)), prior_scale=0.3)
    still = LaplaceFilter(model, LowRank(50), hypers={"noise.all": 0.0}, estimator=Lbfgs())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FilterWarning)
        found = TaskMemory(still, new=still.with_hypers({"noise.all": 0.09})).run(0, batches)
    assert found.tasks.tolist() == truth
