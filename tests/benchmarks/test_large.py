"""The benchmark of size at tiny sizes: what a run took, memory on the way, finite beliefs."""

import csv
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # commands, no package

import large


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_large_run_reports_what_it_took(tmp_path, data_folder):
    sizes = ["--weights", "5000", "--rank", "2", "--tasks", "2", "--examples", "60"]
    large.main([*sizes, "--out", str(tmp_path), "--scratch", str(tmp_path)])
    (row,) = rows_of(tmp_path / "large.csv")
    assert row["finite"] == "True"
    assert int(row["weights"]) == pytest.approx(5000, rel=0.1)
    assert all(float(row[name]) > 0 for name in row if name.endswith(("_seconds", "_gib")))
    assert [path.name for path in tmp_path.iterdir()] == ["large.csv"]


@pytest.mark.slow
def test_a_stream_notes_its_memory_on_the_way(tmp_path):
    large.main(["--stream", "--rank", "2", "--tasks", "4", "--examples", "5", "--out", str(tmp_path)])
    rows = rows_of(tmp_path / "stream.csv")
    assert [(row["tasks"], row["after"]) for row in rows] == [
        *((str(t), "filtering") for t in (1, 2, 3, 4)),
        ("4", "smoothing"),
    ]
    assert all(row["finite"] == "True" and float(row["resident_gib"]) > 0 for row in rows)


@pytest.mark.parametrize("weights", [10**4, 10**6, 10**7])
def test_the_width_gives_about_the_weights(weights):
    width = large.width_of(784, 10, weights)
    assert 785 * width + (width + 1) * width + (width + 1) * 10 == pytest.approx(weights, rel=0.06)


@pytest.mark.parametrize("option", ["--weights", "--rank", "--tasks", "--examples"])
def test_a_size_out_of_range_is_refused(option, capsys):
    with pytest.raises(SystemExit):
        large.main([option, "-1"])
    assert f"{option} is -1" in capsys.readouterr().err
