"""Any settings and any damaged file: one sentence and code 2, or a run; never a traceback."""

import json
import random
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from ssm_nn.command_line import main
from ssm_nn.command_run import Experiment
from ssm_nn.command_settings import CommandError

WORDS = st.sampled_from(
    [
        "",
        "0",
        "1",
        "-1",
        "2",
        "3",
        "10",
        "1e3",
        "nan",
        "inf",
        "-inf",
        "1_0",
        "all",
        "none",
        "x",
        "9" * 5000,
        "٣",
        "\x00",
        "🌀",
    ]
)
NUMBERS = st.integers(-3, 12).map(str) | WORDS
PARTS = st.tuples(st.sampled_from(["all", "first", "last", "0", "1", "7", "", "middle", "²"]), NUMBERS).map("=".join)
KERNELS = st.lists(st.lists(PARTS, min_size=1, max_size=3).map("+".join), min_size=1, max_size=3).map(",".join)
OPTIONS = {
    "--data": st.sampled_from(["digits", "cifar", ""]),
    "--shift": st.sampled_from(["rotate", "permute", "split", "melt"]),
    "--tasks": NUMBERS,
    "--step": NUMBERS,
    "--labels": NUMBERS,
    "--hidden": st.lists(NUMBERS, max_size=3).map(",".join),
    "--activation": st.sampled_from(["tanh", "relu", "sine"]),
    "--prior-scale": NUMBERS,
    "--engine": st.sampled_from(["low-rank", "dense", "diagonal", "sparse"]),
    "--rank": NUMBERS,
    "--kernel": st.sampled_from(["auto", "static", "walk", "run"]),
    "--noise": KERNELS | WORDS,
    "--epochs": NUMBERS,
    "--batch-size": NUMBERS,
    "--seeds": NUMBERS,
    "--seed": NUMBERS,
    "--draws": NUMBERS,
}
CHOSEN = st.lists(st.sampled_from(sorted(OPTIONS)), max_size=4, unique=True).flatmap(
    lambda names: st.tuples(*[OPTIONS[name].map(lambda value, name=name: (name, value)) for name in names])
)
PLANS = st.dictionaries(
    st.sampled_from(["--widths", "--rank", "--tasks", "--examples", "--devices", "--memory"]), NUMBERS
)

few = settings(
    max_examples=40, deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
many = settings(few, max_examples=200, derandomize=False)


class Reached(CommandError):
    """In the place of a run."""


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    def stop(self):
        raise Reached("The run begins.")

    monkeypatch.setattr(Experiment, "run", stop)


def check_one_sentence(result):
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert result.output.strip()


def check_options(tmp_path, options):
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    arguments = [word for pair in options for word in pair]
    check_one_sentence(CliRunner().invoke(main, ["run", *arguments, "--out", str(tmp_path / "run"), "--quiet"]))


@few
@given(options=CHOSEN)
def test_any_options_end_in_one_sentence(tmp_path, options):
    check_options(tmp_path, options)


@pytest.mark.slow
@many
@given(options=CHOSEN)
def test_many_options_end_in_one_sentence(tmp_path, options):
    check_options(tmp_path, options)


@few
@given(options=PLANS)
def test_any_plan_ends_in_one_sentence_or_a_table(monkeypatch, options):
    from ssm_nn import command_costs

    monkeypatch.setattr(command_costs, "measure_rates", lambda: command_costs.Rates(1e11, 1e10, 1e9))
    result = CliRunner().invoke(main, ["plan", *[word for pair in options.items() for word in pair]])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (0, 2)


# settings.json


VALUES = (
    st.none() | st.booleans() | st.integers(-5, 20) | st.floats() | st.text(max_size=3) | st.lists(st.integers(-2, 3))
)


@pytest.fixture
def begun(tmp_path):
    """A folder with the settings of a run that has not learnt anything."""
    path = tmp_path / "begun"
    check_one_sentence(CliRunner().invoke(main, ["run", "--out", str(path), "--quiet"]))
    return path


@few
@given(
    name=st.sampled_from(["tasks", "hidden", "rank", "engine", "data", "shift", "noise", "seeds", "labels", "step"]),
    value=VALUES,
)
def test_settings_of_any_value_end_in_one_sentence(begun, name, value):
    content = json.loads((begun / "settings.json").read_text())
    original = content["settings"][name]
    content["settings"][name] = value
    (begun / "settings.json").write_text(json.dumps(content))
    check_one_sentence(CliRunner().invoke(main, ["resume", str(begun), "--quiet"]))
    content["settings"][name] = original
    (begun / "settings.json").write_text(json.dumps(content))


@few
@given(seed=st.integers(0, 10**6))
def test_settings_with_any_bytes_end_in_one_sentence(begun, seed):
    file, dice = begun / "settings.json", random.Random(seed)
    original = file.read_bytes()
    content = bytearray(original)
    for _ in range(dice.randint(1, 5)):
        content[dice.randrange(len(content))] = dice.randrange(256)
    file.write_bytes(content[: dice.choice([len(content), dice.randrange(len(content))])])
    for command in ("resume", "report"):
        check_one_sentence(CliRunner().invoke(main, [command, str(begun)]))
    file.write_bytes(original)
