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
        number = {name: float(value) for name, value in row.items() if name not in ("step", "conditions")}
        by_bytes = sum(number[f"gigabytes_{how}"] / number[f"gigabytes_{how}_a_second"] for how in ("read", "written"))
        assert number["floor_by_bytes"] == pytest.approx(by_bytes)
        assert number["floor_by_operations"] == pytest.approx(
            number["gigaoperations"] / number["gigaoperations_a_second"]
        )
        assert 0 < number["ratio_min"] <= number["ratio"] <= number["ratio_max"]
