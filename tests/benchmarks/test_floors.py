"""The benchmark of steps at a tiny size: a row for each, its floor made of the rates measured beside it."""

import csv
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # commands, no package

import floors


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_every_step_has_a_floor_and_a_ratio(tmp_path):
    floors.main(["--weights", "1000", "--rank", "3", "--repeats", "2", "--out", str(tmp_path)])
    rows = rows_of(tmp_path / "floors.csv")
    assert [row["step"] for row in rows] == ["predict", "compress", "solve", "smoothing mean"]
    for row in rows:
        by_bytes = float(row["gigabytes"]) / float(row["bandwidth_gigabytes"])
        by_operations = float(row["gigaoperations"]) / float(row["product_gigaoperations"])
        # medians of a quotient and quotients of medians
        assert float(row["floor"]) == pytest.approx(max(by_bytes, by_operations), rel=0.5)
        assert float(row["ratio_min"]) <= float(row["ratio"]) <= float(row["ratio_max"])
