"""The sweep: which cells there are, what is refused, what is run again and what is not."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import typer
from typer.testing import CliRunner

from ssm_nn import command_cells
from ssm_nn.command_cells import begin_cells, cells_of, is_finished
from ssm_nn.command_folder import RunFolder
from ssm_nn.command_line import main
from ssm_nn.command_options import settings_of

COMMON = ["--tasks", "2", "--labels", "10", "--hidden", "3", "--draws", "2", "--kernel", "static", "--seeds", "2"]


def invoke(*arguments):
    return CliRunner().invoke(main, list(arguments))


def settings(*arguments):
    run = typer.main.get_command(main).commands["run"]  # pyright: ignore[reportAttributeAccessIssue]
    return settings_of(run.make_context("run", [*COMMON, *arguments]).params)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run, whose results stand for those of every cell."""
    path = tmp_path_factory.mktemp("run") / "whole"
    result = invoke("run", *COMMON, "--out", str(path))
    assert result.exit_code == 0, result.output
    return path


@pytest.fixture
def finished(whole, monkeypatch):
    """The cells that were run, in order; those of rank 7 fail."""
    made = []

    def finish(path):
        made.append(path.name)
        if RunFolder(path).open()[0].rank == 7:
            return path, "Error: seven"
        shutil.copytree(whole, path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("settings.json"))
        return path, None

    monkeypatch.setattr(command_cells, "_finish", finish)
    return made


def ranks(sweep):
    return sorted(cell.open()[0].rank or 0 for cell in cells_of(sweep))


def test_every_combination_is_a_cell_and_what_has_no_meaning_is_left_out(tmp_path, finished):
    vary = ["--vary", "engine=low-rank diagonal dense", "--vary", "rank=3 5", "--vary", "seed=0 1"]
    result = invoke("sweep", str(tmp_path / "sweep"), *vary, "--", *COMMON)
    assert result.exit_code == 0, result.output
    found = [cell.open()[0] for cell in cells_of(tmp_path / "sweep")]
    assert sorted((s.engine, s.rank, s.seed) for s in found if s.rank is not None) == [
        ("low-rank", rank, seed) for rank in (3, 5) for seed in (0, 1)
    ]
    assert sorted((s.engine, s.seed) for s in found if s.rank is None) == [
        (engine, seed) for engine in ("dense", "diagonal") for seed in (0, 1)
    ]
    assert len(finished) == len(found) == 8


def test_a_cell_is_named_by_its_settings_alone(tmp_path):
    one, again, other = settings("--rank", "3"), settings("--rank", "3"), settings("--rank", "4")
    first, second, third = begin_cells(tmp_path, [one, again, other])
    assert first.path == second.path != third.path
    assert first.open()[0] == one


def test_other_values_add_cells_and_finished_ones_are_not_run_again(tmp_path, finished):
    sweep = tmp_path / "sweep"
    assert invoke("sweep", str(sweep), "--vary", "rank=3 4", "--", *COMMON).exit_code == 0
    assert invoke("sweep", str(sweep), "--vary", "rank=4 5", "--", *COMMON).exit_code == 0
    assert ranks(sweep) == [3, 4, 5]
    assert len(finished) == len(set(finished)) == 3


def test_without_vary_what_was_begun_is_finished(tmp_path, finished):
    begin_cells(tmp_path, [settings("--rank", "3"), settings("--rank", "4")])
    assert not any(map(is_finished, cells_of(tmp_path)))
    result = invoke("sweep", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert all(map(is_finished, cells_of(tmp_path)))


def test_a_cell_that_fails_is_named_and_the_others_are_finished(tmp_path, finished):
    result = invoke("sweep", str(tmp_path), "--jobs", "2", "--vary", "rank=3 7 4", "--", *COMMON)
    assert result.exit_code == 1
    assert "failed: Error: seven" in result.output
    assert len(finished) == 3
    with (tmp_path / "sweep.csv").open() as file:
        assert {row["rank"] for row in csv.DictReader(file)} == {"3", "4"}


def test_table_and_picture_say_what_the_runs_say(tmp_path, finished, whole):
    result = invoke("sweep", str(tmp_path), "--vary", "rank=10 9", "--", *COMMON)
    with (tmp_path / "sweep.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "smoother"]
    assert [row["rank"] for row in rows] == ["9", "10"]  # by size, not by letters
    with (whole / "metrics.csv").open() as file:
        judged = [r for r in csv.DictReader(file) if r["view"] == "smoothed" and r["metric"] == "accuracy"]
    expected = sum(float(row["value"]) for row in judged) / len(judged)
    assert float(rows[0]["accuracy_smoothed"]) == pytest.approx(expected)
    assert f"{100 * expected:.1f} ±" in result.output
    picture = (tmp_path / "sweep.svg").read_text()
    assert picture.startswith("<?xml")
    assert "<script" not in picture


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--vary", "depth=3"], "--vary is 'depth=3'; an option of `ssm-nn run` and its values"),
        (["--vary", "rank="], "--vary is 'rank='"),
        (["--vary", "rank"], "--vary is 'rank'"),
        (["--vary", "out=a b"], "--vary is 'out=a b'"),
        (["--vary", "rank=3", "--vary", "rank=4"], "--vary names an option twice"),
        (["--vary", "rank=3 x"], "'--rank'"),
        (["--vary", "rank=3 -1"], "--rank is -1"),
        (["--vary", "engine=dense cubic"], "'cubic'"),
        (["--vary", "rank=3", "--", "--labels", "few"], "--labels is 'few'"),
        (["--vary", "rank=3", "--", "--nothing"], "No such option"),
        (["--vary", "rank=3", "--", "--out", "x"], "--out is of one run"),
        (["--vary", "rank=3", "--jobs", "0"], "--jobs is 0"),
        (["--", "--labels", "10"], "need --vary"),
        ([], "is no sweep yet"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(arguments, words, tmp_path):
    result = invoke("sweep", str(tmp_path / "sweep"), *arguments)
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "sweep").exists()


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    result = invoke("sweep", str(tmp_path), "--vary", "rank=3", "--", *COMMON)
    assert result.exit_code == 2
    assert "holds something else than a sweep" in result.output
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_a_sweep_that_is_terminated_goes_on(tmp_path):
    sweep = tmp_path / "sweep"
    command = [sys.executable, "-m", "ssm_nn", "sweep", str(sweep), "--vary", "rank=3 4", "--", *COMMON]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while process.poll() is None and not list(sweep.glob("cells/*/checkpoints/*/*/*.npz")):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert f"Go on with: ssm-nn sweep {sweep}" in said
    assert "Traceback" not in said
    assert not all(map(is_finished, cells_of(sweep)))
    done = subprocess.run([sys.executable, "-m", "ssm_nn", "sweep", str(sweep)], env=os.environ, check=False)
    assert done.returncode == 0
    assert all(map(is_finished, cells_of(sweep)))
