"""The command: errors in one sentence, runs that survive a kill to the last bit."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ssm_nn.command_line import Activation, main
from ssm_nn.command_settings import MAX_NOISE, CommandError, Settings, kernels_of, parse_kernel
from ssm_nn.models import networks, programs

TINY = [
    "--tasks",
    "3",
    "--labels",
    "12",
    "--hidden",
    "4",
    "--rank",
    "6",
    "--seeds",
    "1",
    "--draws",
    "4",
    "--noise",
    "last=0.5",
]


def invoke(*arguments):
    return CliRunner().invoke(main, list(arguments))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that was not interrupted."""
    path = tmp_path_factory.mktemp("run") / "whole"
    result = invoke("run", *TINY, "--out", str(path))
    assert result.exit_code == 0, result.output
    return path, result.output


# bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--noise", "last=-1"], "the variance must be a number from 0 to 100"),
        (["--noise", "last=x"], "the variance must be a number"),
        (["--noise", "middle=1"], "all, first, last or a layer's number from 0 to 1"),
        (["--noise", "all=1+last=1"], "gives layer 1 two variances"),
        (["--noise", "last=0.5,1=0.5"], "the same kernel twice"),
        (["--noise", "last=1", "--kernel", "static"], "--noise has no meaning with --kernel static"),
        (["--rank", "-1"], "--rank is -1"),
        (["--rank", "3", "--engine", "dense"], "--rank is for --engine low-rank"),
        (["--step", "3", "--shift", "split"], "--step is for --shift rotate"),
        (["--step", "nan"], "--step is nan"),
        (["--labels", "few"], "--labels is 'few'"),
        (["--labels", "5000"], "--labels is 5000; accepted are 1 to 1297"),
        (["--hidden", "24,"], "--hidden is '24,'"),
        (["--tasks", "0"], "--tasks is 0"),
        (["--tasks", "11", "--shift", "split"], "--tasks is 11"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--draws", "0"], "--draws is 0"),
        (["--prior-scale", "0"], "--prior-scale is 0"),
        (["--data", "mnist", "--data-folder", "no-such-folder"], "no-such-folder"),
    ],
)
def test_a_bad_option_is_one_sentence_and_writes_nothing(tmp_path, arguments, words):
    result = invoke("run", *arguments, "--out", str(tmp_path / "run"))
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [["--data", "cifar"], ["--nonsense", "1"], ["--kernel", "magic"]])
def test_an_unknown_option_or_choice_exits_with_2(arguments):
    result = invoke("run", *arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_a_folder_that_holds_a_run_is_refused(finished):
    path, _ = finished
    before = (path / "metrics.csv").read_bytes()
    result = invoke("run", *TINY, "--out", str(path))
    assert result.exit_code == 2
    assert "holds a run already" in result.output
    assert (path / "metrics.csv").read_bytes() == before


@pytest.mark.parametrize("command", ["resume", "report"])
def test_a_folder_without_a_run_is_refused(tmp_path, command):
    result = invoke(command, str(tmp_path))
    assert result.exit_code == 2
    assert "is no run folder" in result.output


def test_damaged_settings_are_an_error(tmp_path):
    (tmp_path / "settings.json").write_text("{")
    result = invoke("resume", str(tmp_path))
    assert result.exit_code == 2
    assert "cannot be read as the settings" in result.output


# kernels and settings


def test_a_kernel_gives_each_layer_its_variance():
    assert parse_kernel("all=0.1", 3).noise == (0.1, 0.1, 0.1)
    assert parse_kernel("first=0.1+last=2", 3).noise == (0.1, 0.0, 2.0)
    assert parse_kernel("1=1e-3", 3).noise == (0.0, 1e-3, 0.0)
    with pytest.raises(CommandError):
        parse_kernel("3=1", 3)


def test_settings_survive_json(finished):
    path, _ = finished
    values = json.loads((path / "settings.json").read_text())["settings"]
    settings = Settings.from_json(values)
    assert settings.to_json() == values
    assert [kernel.name for kernel in kernels_of(settings)] == ["static", "last=0.5"]


def test_the_command_and_the_program_agree():
    assert MAX_NOISE == programs.MAX_NOISE
    assert [name.value for name in Activation] == list(networks.ACTIVATIONS)


# runs


def test_help_explains_every_option():
    text = invoke("run", "--help").output
    for option in (
        "--data",
        "--shift",
        "--labels",
        "--hidden",
        "--engine",
        "--rank",
        "--kernel",
        "--noise",
        "--seeds",
        "--out",
    ):
        assert option in text


def test_a_run_leaves_its_tables_its_posterior_and_its_report(finished):
    path, output = finished
    assert {p.name for p in path.iterdir()} == {
        "settings.json", "metrics.csv", "kernels.csv", "posterior.nc", "report.html", "results"
    }  # fmt: skip
    for label in (
        "fine-tuning",
        "static filter",
        "chosen filter",
        "static smoother",
        "smoother",
        "joint training",
        "the evidence chose",
    ):
        assert label in output
    page = (path / "report.html").read_text()
    assert not re.search("(src|href)=.http", page)
    assert page.count("data:image/svg+xml") == 6
    import xarray

    with xarray.open_datatree(path / "posterior.nc", engine="h5netcdf") as tree:
        assert tree["posterior"].sizes["task"] == 3
        assert tree["posterior"].sizes["draw"] == 4


def test_a_report_is_made_anew_from_the_folder(finished):
    path, _ = finished
    before = (path / "report.html").read_bytes()
    (path / "report.html").unlink()
    assert invoke("report", str(path)).exit_code == 0
    assert (path / "report.html").read_bytes() == before


def test_resuming_a_finished_run_changes_nothing(finished):
    path, _ = finished
    before = (path / "metrics.csv").read_bytes()
    assert invoke("resume", str(path), "--quiet").exit_code == 0
    assert (path / "metrics.csv").read_bytes() == before


@pytest.mark.parametrize(
    "after",
    [
        pytest.param("fine-tuning/task-001.npz", marks=pytest.mark.slow),
        "static/task-001.npz",
        pytest.param("last-0.5/task-000.npz", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(finished, tmp_path, after):
    """SIGKILL as soon as a certain checkpoint lies there."""
    whole, _ = finished
    path = tmp_path / "killed"
    command = [
        sys.executable,
        "-c",
        "from ssm_nn.command_line import main; main()",
        "run",
        *TINY,
        "--out",
        str(path),
        "--quiet",
    ]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])})
    awaited = path / "checkpoints" / "seed-0" / after
    try:
        while process.poll() is None and not awaited.exists():
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (path / "metrics.csv").exists()
    result = invoke("resume", str(path), "--quiet")
    assert result.exit_code == 0, result.output
    assert (path / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    assert not (path / "checkpoints").exists()
