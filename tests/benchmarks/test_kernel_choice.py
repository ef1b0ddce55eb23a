"""The benchmark of the walk's noise at a tiny size: a finished seed is read, and the choices are what they are called."""

import csv
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # commands, no package

import kernel_choice


@pytest.mark.slow
def test_choices_are_ordered_as_their_names_say_and_a_finished_seed_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernel_choice, "HIDDEN", 3)
    monkeypatch.setattr(kernel_choice, "RANK", 4)
    monkeypatch.setattr(kernel_choice, "LABELS", 12)
    command = ["digits", "--seeds", "0", "--tasks", "2", "--noises", "0", "0.5", "--out", str(tmp_path)]
    kernel_choice.main(command)
    first = (tmp_path / "kernel_choice.csv").read_bytes()
    rows = {row["choice"]: row for row in csv.DictReader(first.decode().splitlines())}
    evidence = {name: float(row["log_evidence"]) for name, row in rows.items()}
    assert list(rows) == ["static", "single", "grid", "gradient", "em"]
    assert evidence["static"] <= evidence["single"] <= evidence["grid"]
    assert (float(rows["static"]["first"]), float(rows["static"]["last"])) == (0.0, 0.0)
    assert rows["single"]["first"] == rows["single"]["last"]
    tasks = kernel_choice.read_csv(tmp_path / "kernel_choice-tasks.csv")
    assert [row["task"] for row in tasks] == ["0", "1"] * 5

    monkeypatch.setattr(kernel_choice, "one_seed", None)
    kernel_choice.main(command)
    assert (tmp_path / "kernel_choice.csv").read_bytes() == first
    assert "gradient" in capsys.readouterr().out


def test_a_grid_without_the_static_model_is_refused(capsys):
    with pytest.raises(SystemExit):
        kernel_choice.main(["digits", "--noises", "0.5"])
    assert "0 is wanted among them" in capsys.readouterr().err
