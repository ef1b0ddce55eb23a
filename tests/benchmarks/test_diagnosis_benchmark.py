"""The diagnosis benchmark at a tiny size: a finished row is read, and both methods are shown side by side."""

import csv
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # commands, no package

import diagnosis


@pytest.mark.slow
def test_rows_are_measured_once_and_shown(tmp_path, monkeypatch, capsys):
    sizes = ["--tasks", "3", "--examples", "5", "--draws", "60", "--warmup", "60", "--out", str(tmp_path)]
    diagnosis.main(["--weights", "4", *sizes])
    with (tmp_path / "marginalize.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["marginalized", "full"]
    assert all(float(row["cpu_seconds_per_effective"]) > 0 for row in rows)
    monkeypatch.setenv("COLUMNS", "200")  # twelve columns
    monkeypatch.setattr(diagnosis, "measured", lambda *_: pytest.fail("measured again"))
    diagnosis.main(["--weights", "4", *sizes])
    assert "integrated out" in capsys.readouterr().out
