"""The last-layer benchmark runs, and compares every method that it names with the refit."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # commands, no package

import last_layer
from last_layer_network import trained
from last_layer_settings import PROBLEMS, features_of, head_of, points_of


@pytest.mark.slow
def test_a_quick_run_has_a_line_for_every_method(tmp_path):
    last_layer.main(["--quick", "--out", str(tmp_path)])
    with (tmp_path / "digits-50-10-summary.csv").open(newline="") as file:
        lines = {line["method"]: line for line in csv.DictReader(file)}
    assert set(lines) >= {"refit", "none", "update Full", "published 10", "first order", "reweighting"}
    assert float(lines["update and sweep Full"]["total_variation"]) < 1e-4
    assert float(lines["update Full"]["total_variation"]) < 0.03
    assert (tmp_path / "digits-50-10.png").exists()


@pytest.mark.slow
def test_a_networks_features_have_seen_the_points_before_and_no_others():
    problem, data = PROBLEMS["digits-network"], features_of("digits-network")
    places, _ = points_of(problem, 0, 100, 0)
    apply, params = trained(data.train_x[places], data.train_y[places], 0)
    learnt = np.asarray(apply(params, data.train_x[places])).argmax(axis=1)
    assert (learnt == data.train_y[places]).mean() > 0.98
    hidden = np.maximum(data.test_x[:5] @ params["layers"][0]["kernel"] + params["layers"][0]["bias"], 0)
    features = head_of(problem, 0, 100).features({"x": data.test_x[:5]})
    np.testing.assert_allclose(features[:, :-1], hidden, atol=1e-5)
