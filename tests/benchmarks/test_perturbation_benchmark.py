"""The perturbation benchmark at tiny sizes: a finished cell is read, tables and pictures are made."""

import csv
import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # commands, no package

import perturbation
import perturbation_cells
from perturbation_scenarios import SCENARIOS, Budget

from ssm_nn.models.datasets import load
from ssm_nn.models.networks import mlp
from ssm_nn.models.streams import permuted


def stream(budget, seed, order):
    return permuted(load("digits"), 2, 128, 100, seed, [1, 0] if order else None)


TINY = replace(
    SCENARIOS["permuted-mnist"],
    stream=stream,
    network=lambda inputs, classes, seed: (mlp((*inputs, 8, classes), "relu", seed), "layers.1.*"),
    budget=Budget(1, 1, 1, 1, curvature=50),
    growth=2.0,
)


@pytest.mark.slow
def test_cells_are_run_once_and_summarised(tmp_path, monkeypatch):
    def run(orders):
        names = ["perturbation", "fine-tuning", "allocations"]
        return perturbation.run([TINY], names, orders, [0], tmp_path, Console(file=io.StringIO()))[0]

    lines = run([0, 1])
    assert [line["method"] for line in lines] == ["perturbation", "fine-tuning"]
    assert lines[0]["forgetting"] == 0
    assert lines[0]["mopd"] >= lines[0]["aopd"] >= 0
    assert 0 < lines[0]["growth"] <= 2
    with (tmp_path / "permuted-mnist-tasks.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2 * 2 * 2
    assert (tmp_path / "permuted-mnist.png").stat().st_size > 1000
    assert (tmp_path / "permuted-mnist-allocations.csv").exists()
    monkeypatch.setattr(perturbation_cells, "learner", None)  # nothing is learnt again
    assert run([0, 1]) == lines


def test_unknown_names_are_refused(capsys):
    for arguments in (["nothing"], ["permuted-mnist", "--methods", "nothing"]):
        with pytest.raises(SystemExit):
            perturbation.main(arguments)
        assert "accepted are" in capsys.readouterr().err
