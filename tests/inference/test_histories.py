"""Histories: the same posterior wherever beliefs live, to the last bit, and memory that does not grow with the tasks."""

import gc
import json

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import ssm_nn
from ssm_nn.inference import Diagonal, GaussNewton, LaplaceFilter, LowRank
from ssm_nn.inference.checkpoints import CheckpointError
from ssm_nn.inference.histories import InMemory, OnDisk, OnHost, Recalled
from ssm_nn.models import RandomWalk
from ssm_nn.models.networks import mlp

T, INPUTS = 5, 4


def program(tasks):
    net = ssm_nn.weights(
        "net", mlp((INPUTS, 2)), prior=dist.Normal(0.0, 1.0), transition=RandomWalk(0.1), num_tasks=len(tasks)
    )

    def observe(f, task):
        with numpyro.plate("examples", task["x"].shape[0]):
            numpyro.sample("y", dist.Normal(f(task["x"]), 0.5).to_event(1), obs=task.get("y"))

    net.over(tasks, observe)


def tasks_of(number, missing=()):
    for t in range(number):
        rng = np.random.default_rng(t)
        data = {k: rng.normal(size=(3, n)).astype(np.float32) for k, n in (("x", INPUTS), ("y", 2))}
        yield None if t in missing else data


@pytest.fixture(scope="module")
def engine():
    return LaplaceFilter(program, LowRank(3), estimator=GaussNewton())


@pytest.fixture(scope="module")
def in_memory(engine):
    return engine.smooth(engine.run(0, tasks_of(T, missing=(2,))))


def check_same(one, other):
    """Filtered and smoothed beliefs, Infos, draws: to the last bit."""
    for here, there in zip(
        (*one.filtered.beliefs, *one.beliefs), (*other.filtered.beliefs, *other.beliefs), strict=True
    ):
        jax.tree.map(np.testing.assert_array_equal, here, there)
    for here, there in zip(one.filtered.infos, other.filtered.infos, strict=True):
        jax.tree.map(np.testing.assert_array_equal, here._replace(seconds=0.0), there._replace(seconds=0.0))
    path = one.sample_path(jax.random.key(1))
    np.testing.assert_array_equal(path, other.sample_path(jax.random.key(1)))
    np.testing.assert_array_equal(one.log_density(path), other.log_density(path))
    assert one.filtered.log_evidence == other.filtered.log_evidence


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_every_history_gives_the_same_posterior(engine, in_memory, tmp_path, kind):
    history = OnHost() if kind == "host" else OnDisk(tmp_path / "run")
    posterior = engine.smooth(engine.run(0, tasks_of(T, missing=(2,)), history=history))
    check_same(posterior, in_memory)
    last = posterior.beliefs[-1]
    np.testing.assert_array_equal(last.mean, in_memory.beliefs[-1].mean)
    assert len(posterior.beliefs[1:]) == T - 1
    prediction = posterior.predict(0, {"x": np.ones((2, INPUTS), np.float32)})["y"]
    np.testing.assert_array_equal(
        prediction.mean, in_memory.predict(0, {"x": np.ones((2, INPUTS), np.float32)})["y"].mean
    )


def learnt_after(engine, folder, number):
    """Which of ``number`` tasks are learnt anew, and the posterior."""
    learnt = []
    update = LaplaceFilter.update

    def counted(self, state, task):
        learnt.append(int(state.step))
        return update(self, state, task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LaplaceFilter, "update", counted)
        filtered = engine.run(0, tasks_of(number, missing=(2,)), history=OnDisk(folder))
    return learnt, engine.smooth(filtered)


def test_a_run_goes_on_behind_the_tasks_on_disk(engine, in_memory, tmp_path):
    engine.run(0, tasks_of(3, missing=(2,)), history=OnDisk(tmp_path))
    learnt, posterior = learnt_after(engine, tmp_path, T)
    assert learnt == [3, 4]
    check_same(posterior, in_memory)


def test_smoothing_again_after_more_tasks_takes_all_of_them(engine, in_memory, tmp_path):
    engine.smooth(engine.run(0, tasks_of(3, missing=(2,)), history=OnDisk(tmp_path)))
    posterior = engine.smooth(engine.run(0, tasks_of(T, missing=(2,)), history=OnDisk(tmp_path)))
    check_same(posterior, in_memory)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_damaged_file_costs_the_tasks_behind_it(engine, in_memory, tmp_path, share):
    engine.run(0, tasks_of(T, missing=(2,)), history=OnDisk(tmp_path))
    file = tmp_path / "task-000003.npz"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    (tmp_path / ".task-000004.npz.1.tmp").write_bytes(b"half")
    learnt, posterior = learnt_after(engine, tmp_path, T)
    assert learnt == [3, 4]
    check_same(posterior, in_memory)
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_file_damaged_after_the_run_is_an_error_not_a_number(engine, tmp_path):
    filtered = engine.run(0, tasks_of(3), history=OnDisk(tmp_path))
    (tmp_path / "task-000001.npz").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cut short or altered"):
        engine.smooth(filtered)


@pytest.mark.parametrize("other", ["structure", "key", "hypers"])
def test_the_folder_of_another_run_is_refused_and_left_alone(engine, tmp_path, other):
    engine.run(0, tasks_of(2), history=OnDisk(tmp_path))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    another = LaplaceFilter(program, Diagonal(), estimator=GaussNewton()) if other == "structure" else engine
    another = another.with_power(2.0) if other == "hypers" else another
    with pytest.raises(ValueError, match="the history of another run"):
        another.run(1 if other == "key" else 0, tasks_of(2), history=OnDisk(tmp_path))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_place_that_is_no_folder_is_refused(engine, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be used for a history"):
        engine.run(0, tasks_of(1), history=OnDisk(tmp_path / "file"))


def test_a_damaged_description_is_refused(engine, tmp_path):
    (tmp_path / "history.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be used for a history"):
        engine.run(0, tasks_of(1), history=OnDisk(tmp_path))


def test_a_writer_that_fails_is_heard_of(engine, tmp_path, monkeypatch):
    def full(path, tree):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ssm_nn.inference.histories.save", full)
    with pytest.raises(OSError, match="No space left"):
        engine.run(0, tasks_of(3), history=OnDisk(tmp_path))


def test_the_description_says_what_the_run_was(engine, tmp_path):
    engine.run(0, tasks_of(1), history=OnDisk(tmp_path))
    mark = json.loads((tmp_path / "history.json").read_text())["of"]
    assert "LowRank(rank=3" in mark
    assert "0x" not in mark


def test_recalled_items_are_made_when_asked_for():
    made = []
    items = Recalled(lambda t: made.append(t) or t * t, range(6))
    assert not made
    assert items[-1] == 25
    assert list(items[1:3]) == [1, 4]
    assert len(items[::2]) == 3
    assert made == [5, 1, 2]
    with pytest.raises(IndexError):
        items[6]


def test_an_in_memory_history_given_by_hand_is_the_default(engine, in_memory):
    check_same(engine.smooth(engine.run(0, tasks_of(T, missing=(2,)), history=InMemory())), in_memory)


@pytest.mark.slow
def test_a_thousand_tasks_on_disk_take_the_memory_of_fifty(engine, tmp_path):
    """Bytes in arrays on the device while filtering and smoothing, after 50 tasks and at any later fiftieth."""
    held = []

    def note(t, state, info):
        del state, info
        if t % 50 == 49:
            gc.collect()
            held.append(sum(array.nbytes for array in jax.live_arrays()))

    filtered = engine.run(0, tasks_of(1000), note, history=OnDisk(tmp_path))
    assert len(held) == 20
    most = 2 * held[0]  # the writer holds a task or two, kept beliefs would be a thousand
    assert max(held) <= most
    posterior = engine.smooth(filtered)
    gc.collect()
    assert sum(array.nbytes for array in jax.live_arrays()) <= most
    np.testing.assert_array_equal(posterior.means[-1], filtered.beliefs[-1].mean)
    assert np.isfinite(posterior.means[0]).all()
