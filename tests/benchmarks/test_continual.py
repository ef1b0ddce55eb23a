"""The benchmark command at tiny sizes: a finished cell is read, a begun one goes on, the summary says what the CSV says."""

import csv
import io
import math
import shutil
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # commands, no package

import continual
import continual_cells
import continual_settings
from continual_bench import Bench
from continual_methods import Choice, method_of
from continual_scenarios import SCENARIOS, TASK_CLASSES, Scenario, dealt, validation_data
from continual_settings import Budget

from ssm_nn.inference.baselines.elastic_weights import OnlineEWC
from ssm_nn.models.datasets import load
from ssm_nn.models.streams import permuted, split

TINY = Budget(
    epochs=1,
    hidden=(8,),
    joint_examples=1_500,
    ranks=(3,),
    strengths=2,
    validation_tasks=2,
    validation_examples=260,
    held_out=100,
)
DIGITS = Scenario("digits", "digits", permuted, 3, examples=300, test_examples=100, methods=("fine-tuning", "ewc"))
SEEDS = [0, 1]


@pytest.fixture(autouse=True, scope="module")
def compiled_once():
    """What one test compiles serves the next."""
    with pytest.MonkeyPatch.context() as patch:
        forget = continual.forget_compiled
        patch.setattr(continual, "forget_compiled", lambda: None)
        yield
        forget()


def run(out, scenario=DIGITS, seeds=SEEDS, only=None):
    return continual.run([scenario], TINY, seeds, only, out, Console(file=io.StringIO()))[0]


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def counted(monkeypatch, owner, name):
    """How often a method of a class is called."""
    calls, original = [], getattr(owner, name)

    def spy(*arguments, **named):
        calls.append(arguments)
        return original(*arguments, **named)

    monkeypatch.setattr(owner, name, spy)
    return calls


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compiled_once):
    """A folder with both methods and seeds, and the summary's lines."""
    out = tmp_path_factory.mktemp("continual")
    return out, run(out)


def test_a_finished_cell_is_not_run_again(finished, monkeypatch):
    out, lines = finished
    before = {path: path.read_bytes() for path in out.glob("*.csv")}
    assert len(before) == 3
    updates = counted(monkeypatch, OnlineEWC, "update")
    again = run(out)
    assert not updates
    np.testing.assert_equal(again, lines)
    assert {path: path.read_bytes() for path in out.glob("*.csv")} == before


def test_lines_of_cells_that_were_run_elsewhere_stay(finished, tmp_path):
    out, lines = finished
    for table in out.glob("*.csv"):
        shutil.copy(table, tmp_path)
    shutil.copytree(
        out / "cells", tmp_path / "cells", ignore=lambda folder, names: [n for n in names if n[:4] == "ewc-"]
    )
    np.testing.assert_equal(run(tmp_path, only=["fine-tuning"]), lines)
    for table in out.glob("*.csv"):
        assert (tmp_path / table.name).read_bytes() == table.read_bytes()
    for run_here in ("fine-tuning", "ewc"):  # seconds of two runs are not compared
        (tmp_path / "cells" / "digits").rename(tmp_path / "cells" / "away")
        keep = shutil.ignore_patterns(*({"fine-tuning-*", "ewc-*"} - {f"{run_here}-*"}))
        shutil.copytree(out / "cells" / "digits", tmp_path / "cells" / "digits", ignore=keep)
        ratios = {line["method"]: line["ratio"] for line in run(tmp_path, only=[run_here])}
        assert math.isnan(ratios["ewc"]) == (run_here == "ewc")
        shutil.rmtree(tmp_path / "cells" / "digits")
        (tmp_path / "cells" / "away").rename(tmp_path / "cells" / "digits")
    others = (tmp_path / "digits.csv").read_text().replace("ewc,10.0", "ewc,20.0")
    (tmp_path / "digits.csv").write_text(others)
    assert [line["method"] for line in run(tmp_path, only=["fine-tuning"])] == ["fine-tuning"], "other settings"


@pytest.mark.slow
def test_a_killed_cell_goes_on_after_its_last_whole_task_with_the_same_result(finished, tmp_path, monkeypatch):
    whole = [row for row in rows_of(finished[0] / "digits.csv") if row["method"] == "ewc" and row["seed"] == "0"]
    save, written = continual_cells.save, []

    def killed_at_the_third(path, tree):
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        save(path, tree)

    monkeypatch.setattr(continual_cells, "save", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, seeds=[0], only=["ewc"])
    monkeypatch.setattr(continual_cells, "save", save)
    updates = counted(monkeypatch, OnlineEWC, "update")
    run(tmp_path, seeds=[0], only=["ewc"])
    assert len(updates) == 1
    assert rows_of(tmp_path / "digits.csv") == whole
    assert not list(tmp_path.rglob("*.npz"))


def test_the_summary_is_what_the_csv_says(finished):
    out, lines = finished
    accuracy, nll = defaultdict(dict), defaultdict(dict)
    for row in rows_of(out / "digits.csv"):
        at = int(row["learnt"]), int(row["tested"])
        accuracy[row["method"], row["seed"]][at] = float(row["accuracy"])
        nll[row["method"], row["seed"]][at] = float(row["nll"])
    seconds = defaultdict(list)
    for row in rows_of(out / "digits-tasks.csv"):
        seconds[row["method"], row["seed"]].append(float(row["seconds"]))
    assert [line["method"] for line in lines] == ["fine-tuning", "ewc"]
    for line in lines:
        a = [accuracy[line["method"], str(seed)] for seed in SEEDS]
        assert all(len(one) == 6 for one in a)
        averages = [(one[2, 0] + one[2, 1] + one[2, 2]) / 3 for one in a]
        learnt = [(one[0, 0] + one[1, 1] + one[2, 2]) / 3 for one in a]
        lost = [(max(one[0, 0], one[1, 0]) - one[2, 0] + one[1, 1] - one[2, 1]) / 2 for one in a]
        ratios = [np.median(seconds[line["method"], s]) / np.median(seconds["fine-tuning", s]) for s in "01"]
        own_nll = [sum(nll[line["method"], s][t, t] for t in range(3)) / 3 for s in "01"]
        for measure, values in {
            "average": averages,
            "learnt": learnt,
            "forgetting": lost,
            "ratio": ratios,
            "learnt_nll": own_nll,
        }.items():
            np.testing.assert_allclose(line[measure], np.mean(values), rtol=1e-12)
            np.testing.assert_allclose(line[measure + "_sd"], abs(values[0] - values[1]) / math.sqrt(2), atol=1e-12)
        assert math.isnan(line["smoothed"])
        assert line["seeds"] == 2
    parameters = 64 * 8 + 8 + 8 * 10 + 10
    assert [line["numbers"] for line in lines] == [parameters, 2 * parameters]
    written = rows_of(out / "digits-summary.csv")
    assert [float(row["average"]) for row in written] == [line["average"] for line in lines]


def test_other_settings_make_other_cells(finished, monkeypatch, tmp_path):
    out, _ = finished
    method = method_of("ewc")
    store = continual_cells.Store(out / "cells")
    settings = continual_cells.settings_of(DIGITS, method, 0, TINY, Choice(10.0, 1e-2))
    narrower = replace(DIGITS, prior_scale=1e-4)
    assert store.path(continual_cells.settings_of(narrower, method, 0, TINY, Choice(10.0, 1e-2))) != store.path(
        settings
    )
    monkeypatch.setattr(continual_settings, "CURVATURE_EXAMPLES", 7)
    assert store.path(continual_cells.settings_of(DIGITS, method, 0, TINY, Choice(10.0, 1e-2))) != store.path(settings)


def test_strengths_are_tuned_on_no_test_example():
    data = load("digits")
    held = validation_data(data, 100, 5)
    both = np.concatenate([held.train_x, held.test_x]).reshape(len(data.train_x), -1)
    np.testing.assert_array_equal(np.unique(both, axis=0), np.unique(data.train_x.reshape(len(both), -1), axis=0))
    bench = Bench(DIGITS, TINY, 5, validation=True)
    assert bench.num_tasks == 2
    assert [task.num_examples for task in bench.stream.train] == [260, 260]


@pytest.mark.slow
def test_strengths_of_classes_dealt_out_are_tuned_on_what_examples_there_are():
    bench = Bench(Scenario("dealt", "digits", dealt, 5), replace(TINY, validation_examples=30_000), 5, validation=True)
    data = validation_data(load("digits"), TINY.held_out, 5)
    fewest = min(int(np.isin(data.train_y, classes).sum()) for classes in np.array_split(np.arange(10), 2))
    assert [bench.stream.train[t].num_examples for t in range(2)] == [fewest] * 2


def test_classes_that_a_task_has_not_are_never_predicted(tmp_path):
    scenario = Scenario("split", "digits", split, 5, methods=("fine-tuning", "joint", "replay-200"), world=TASK_CLASSES)
    lines = run(tmp_path, scenario, seeds=[0])
    # of two classes at random one in two is right, of ten one in ten
    assert all(line["average"] > 0.4 for line in lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["permuted"], "scenario is 'permuted'"),
        (["--seeds", "1000"], "seed is 1000"),
        (["--methods", "magic"], "method is 'magic'"),
    ],
)
def test_bad_arguments_are_named(arguments, words, capsys):
    with pytest.raises(SystemExit):
        continual.main(arguments)
    assert words in capsys.readouterr().err


def test_every_scenario_names_methods_that_there_are():
    for scenario in SCENARIOS.values():
        for name in scenario.method_names(continual_settings.FULL):
            assert method_of(name, scenario.smoothed).strengths
