"""The benchmark of engines that learn parts of a network, at a tiny size: rows are kept, and summed up."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # commands, no package

import parts_against_nuts


@pytest.mark.slow
def test_rows_are_measured_once_and_summed_up(tmp_path, monkeypatch, capsys):
    sizes = ["--seeds", "0", "--draws", "60", "--out", str(tmp_path)]
    parts_against_nuts.main(sizes)
    monkeypatch.setattr(parts_against_nuts, "one_seed", lambda *_: pytest.fail("measured again"))
    parts_against_nuts.main(sizes)
    rows = parts_against_nuts.read_csv(tmp_path / "parts.csv")
    lines = parts_against_nuts.summary_of(rows)
    assert [(line["program"], line["engine"]) for line in lines] == [
        ("head", "NUTS"),
        ("head", "dense"),
        ("head", "last layer"),
        ("own", "NUTS"),
        ("own", "dense"),
        ("own", "low-rank perturbation"),
    ]
    # the program of the head is linear and Gaussian: two exact engines
    head = {line["engine"]: line for line in lines[:3]}
    assert abs(head["dense"]["loo_minus_nuts"] - head["last layer"]["loo_minus_nuts"]) < 2
    assert head["last layer"]["task_khat"] < 0.7
    assert "engines of parts against NUTS" in capsys.readouterr().out
