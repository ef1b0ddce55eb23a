"""The mean-field benchmarks on a handful of made-up images: a longer run goes on from a shorter one, tables hold their runs."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optax
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # commands, no package

import mean_field
import mean_field_baselines as baselines
import mean_field_drift
import mean_field_permuted
from csv_files import read_csv


def made_up(name="mnist", size=96):
    rng = np.random.default_rng(len(name))
    x, y = rng.normal(size=(size, 784)).astype(np.float32), rng.integers(0, 10, size).astype(np.int32)
    return x, y, x[:40], y[:40]


@pytest.fixture
def small(monkeypatch):
    for module in (mean_field_permuted, baselines):
        monkeypatch.setattr(module, "images", made_up)
    monkeypatch.setattr(mean_field_permuted, "load_images", lambda name: SimpleNamespace(test_x=made_up(name)[2]))


@pytest.mark.slow
def test_a_longer_run_goes_on_from_a_shorter_one_to_the_last_digit(small, tmp_path):
    def rows(folder, *tasks):
        for number in tasks:
            command = ["permuted", "--hidden", "3", "--window", "500", "--examples", "96", "--tasks", str(number)]
            mean_field.main(["--out", str(tmp_path / folder), *command])
        (table,) = (tmp_path / folder).glob("permuted-*.csv")
        return [{k: v for k, v in row.items() if k != "examples_per_second"} for row in read_csv(table)]

    once = rows("once", 3)
    again = rows("again", 2, 3)
    assert [row["task"] for row in once] == ["1", "2", "3"]
    assert [row["learnt"] for row in again] == [row["learnt"] for row in once]
    assert again[-1] == once[-1]
    assert 0 <= float(once[-1]["auroc_epistemic_as_published"]) <= 1


@pytest.mark.slow
def test_the_trade_has_a_row_a_run(small, tmp_path):
    command = [
        "trade",
        "--widths",
        "3",
        "--windows",
        "100",
        "inf",
        "--seeds",
        "0",
        "1",
        "--tasks",
        "2",
        "--examples",
        "64",
    ]
    mean_field.main(["--out", str(tmp_path), *command])
    found = [(row["window"], row["seed"]) for row in read_csv(tmp_path / "trade.csv")]
    assert found == [("100.0", "0"), ("inf", "0"), ("100.0", "1"), ("inf", "1")]
    assert (tmp_path / "trade.png").exists()


@pytest.mark.slow
def test_every_baseline_has_a_row_and_is_read_back(small, tmp_path, monkeypatch):
    single = {name: replace(method, choices=method.choices[:1]) for name, method in baselines.METHODS.items()}
    monkeypatch.setattr(baselines, "METHODS", single)
    monkeypatch.setattr(baselines, "TUNING_TASKS", 1)
    command = ["--out", str(tmp_path), "baselines", "--tasks", "2", "--seeds", "0"]
    mean_field.main(command)
    table = (tmp_path / "baselines.csv").read_bytes()
    rows = {row["method"]: row for row in read_csv(tmp_path / "baselines.csv")}
    assert list(rows) == list(baselines.METHODS)
    assert len({row["learnt"] for row in rows.values()}) > 3  # not one model under seven names
    assert all(0 <= float(row["all"]) <= 1 for row in rows.values())
    monkeypatch.setattr(baselines, "images", None)
    mean_field.main(command)
    assert (tmp_path / "baselines.csv").read_bytes() == table


def test_a_plain_pass_is_gradient_steps_in_the_order_of_the_batches(monkeypatch):
    """The gradient written out; the last batch is shorter."""
    monkeypatch.setattr(baselines, "BATCH", 4)
    learner = baselines.Plain(optax.sgd(0.1), 0)
    x, y = made_up(size=6)[:2]
    x = np.abs(x)
    first = {name: np.asarray(leaf, np.float64) for name, leaf in learner.params.items()}
    order = np.random.default_rng([7, 0]).permutation(6)
    for rows in (order[:4], order[4:]):
        inside = x[rows].astype(np.float64) @ first["hidden"]
        logits = np.maximum(inside, 0) @ first["head"]
        p = np.exp(logits - logits.max(1, keepdims=True))
        wrong = (p / p.sum(1, keepdims=True) - np.eye(10)[y[rows]]) / len(rows)
        back = (wrong @ first["head"].T) * (inside > 0)
        first["head"] -= 0.1 * np.maximum(inside, 0).T @ wrong
        first["hidden"] -= 0.1 * x[rows].T.astype(np.float64) @ back
    learner.learn({"x": x, "y": y}, 7)
    for name, expected in first.items():
        np.testing.assert_allclose(learner.params[name], expected, rtol=2e-4, atol=2e-5)


def test_rows_are_standardised_by_those_before_them():
    x = np.random.default_rng(0).normal(3.0, 2.0, (150, 2))
    found = mean_field_drift.standardised(x)
    for n in (5, 120, 149):
        seen = x[: max(n, 100)]
        np.testing.assert_allclose(found[n], (x[n] - seen.mean(0)) / seen.std(0), rtol=1e-4, atol=1e-5)
