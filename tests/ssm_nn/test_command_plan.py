"""The plan: numbers of the cost model against the arrays themselves, and the advice at its borders."""

import timeit

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from ssm_nn import command_costs
from ssm_nn.command_costs import BYTES, Job, Rates, advice, costs, in_words
from ssm_nn.command_line import main
from ssm_nn.inference import Dense, Diagonal, Kronecker, LaplaceFilter, LowRank
from ssm_nn.models.networks import mlp
from ssm_nn.models.programs import classification
from ssm_nn.tasks import Task

RATES = Rates(product=1e11, tall=2e10, small=2e9)
GIB = 2.0**30
SMALL = Job(widths=(5, 4, 3), rank=6, tasks=7, examples=20)
STRUCTURES = {"Dense()": Dense(), "Kronecker()": Kronecker(), "LowRank(6)": LowRank(6), "Diagonal()": Diagonal()}


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_disk_is_what_a_history_holds(name):
    program = classification(mlp(SMALL.widths))
    engine = LaplaceFilter(program, STRUCTURES[name], hypers={"noise.all": 0.1})
    task = Task({"x": np.ones((20, 5), np.float32), "y": np.zeros(20, int)})
    state, info = engine._entry_like(engine.init(0, task), task)
    of_belief = [state.mean, state.precision]
    smoothed = [state.mean, info.site]
    sizes = jax.tree.map(lambda leaf: leaf.size, [of_belief, list(info.moments[:3]), info.site, smoothed])
    found = {cost.structure: cost for cost in costs(SMALL, RATES)}[name]
    assert SMALL.weights == state.mean.size
    assert found.disk_bytes == BYTES * SMALL.tasks * sum(jax.tree.leaves(sizes))


def test_devices_divide_what_is_sharded_and_nothing_else():
    one, eight = (costs(Job((100, 50, 10), 20, 5, 100, devices), RATES) for devices in (1, 8))
    for alone, divided in zip(one, eight, strict=True):
        share = 8 if divided.sharded else 1
        assert divided.device_bytes == pytest.approx(alone.device_bytes / share)
        assert divided.disk_bytes == alone.disk_bytes
    assert [cost.structure for cost in eight if cost.sharded] == ["LowRank(20)", "Diagonal()"]


def advised(widths, memory, *, rank=50, tasks=5, devices=1, disk=1e15):
    job = Job(widths, rank, tasks, 1000, devices)
    return advice(job, costs(job, RATES), memory * GIB, disk)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"widths": (10, 3), "memory": 8}, "Choose Dense()"),
        ({"widths": (784, 100, 10), "memory": 16, "tasks": 50}, "Choose Kronecker(): over more than 10 tasks"),
        ({"widths": (784, 100, 10), "memory": 16, "tasks": 5}, "Choose LowRank(50)"),
        ({"widths": (784, 1000, 1000, 10), "memory": 1}, "Choose Diagonal(): LowRank(50) needs"),
        ({"widths": (10_000, 100_000, 10), "memory": 8}, "Nothing fits 8 GiB a device"),
        ({"widths": (784, 100, 10), "memory": 16, "disk": 1e6}, "filter without smoothing"),
        ({"widths": (784, 1000, 1000, 10), "memory": 16, "tasks": 200}, "history=OnDisk(folder)"),
    ],
)
def test_the_advice_follows_from_what_fits(arguments, words):
    assert words in advised(**arguments)


def test_a_mesh_makes_room_for_a_low_rank():
    widths = (784, 1000, 1000, 10)
    assert "Choose Diagonal()" in advised(widths, 1)
    assert "Choose LowRank(50)" in advised(widths, 1, devices=64)


def test_the_devices_that_are_asked_for_suffice():
    widths = (10_000, 100_000, 10)
    needed = int(advised(widths, 8).split(" on ")[1].split()[0])
    assert "Nothing fits" not in advised(widths, 8, devices=needed)
    assert "Nothing fits" in advised(widths, 8, devices=needed // 2)


@pytest.mark.parametrize("size", [0, 1, 1023, 1e3, 1e6, 1e12, 1e18])
def test_sizes_are_said_in_words(size):
    number, unit = in_words(size).split()
    power = ["B", "KiB", "MiB", "GiB", "TiB"].index(unit)
    assert float(number) * 1024.0**power == pytest.approx(size, rel=0.01)


def invoke(*arguments):
    return CliRunner().invoke(main, ["plan", *arguments])


def test_the_command_prints_a_table_and_an_advice(monkeypatch):
    monkeypatch.setattr(command_costs, "measure_rates", lambda: RATES)
    result = invoke("--widths", "64,24,10", "--tasks", "30", "--devices", "4", "--memory", "8")
    assert result.exit_code == 0, result.output
    for word in ("1,810 weights", "Dense()", "Kronecker()", "LowRank(100)", "Diagonal()", "Choose"):
        assert word in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--widths", "64"), "at least two numbers"),
        (("--widths", "64,x"), "--widths is '64,x'"),
        (("--tasks", "0"), "--tasks is 0"),
        (("--rank", "-1"), "--rank is -1"),
        (("--devices", "0"), "--devices is 0"),
        (("--memory", "nan"), "--memory is nan"),
    ],
)
def test_a_bad_option_is_one_sentence(arguments, words):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert words in result.output
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.slow
def test_rates_are_measured_in_seconds():
    rates = command_costs.measure_rates()
    assert rates.product > rates.tall > 0
    assert rates.small > 0
    square = np.ones((1024, 1024), np.float32)
    seconds = min(timeit.repeat(lambda: square @ square, number=1, repeat=10))
    # folded into the program, the product would be thousands of times faster than NumPy's
    assert rates.product < 20 * 2 * 1024**3 / seconds
