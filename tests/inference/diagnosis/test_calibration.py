"""Calibration over the program: simulation-based ranks, innovations and coverage, and the test of the kernel."""

import jax
import numpy as np
import pytest
from judged_tasks import SCALE, SD, D, N, T, joint_of, labelled, logistic, regression, tasks_of
from oracles_gaussian import condition
from scipy.stats import kstest

from ssm_nn.inference import Dense, Diagonal, LaplaceFilter, LowRank
from ssm_nn.inference.diagnosis import innovations, kernel_test, simulation_based_calibration
from ssm_nn.inference.diagnosis.simulation_calibration import SimulationCalibration
from ssm_nn.inference.mean_field import AtPrior, MeanFieldFilter, WeightSampling, filter_path, smooth_path

SHORT = tasks_of(0, num_tasks=2, size=4)


@pytest.fixture(scope="module")
def engine():
    return LaplaceFilter(regression, Dense(), hypers={"scale": SCALE})


def calibrated(engine, **settings):
    return simulation_based_calibration(engine, SHORT, num_simulations=100, num_draws=49, progress=False, **settings)


def test_the_exact_engine_is_calibrated(engine):
    found = calibrated(engine)
    assert found.ranks["net.weight"].shape == (100, 2, D)
    assert found.p_value > 0.05
    assert "calibrated" in found.message
    coverage = np.mean(found.coverage(0.9)["net.weight"])
    assert coverage == pytest.approx(0.9, abs=0.06)


@pytest.mark.parametrize(
    ("power", "word"), [(8.0, "too confident"), pytest.param(0.1, "too cautious", marks=pytest.mark.slow)]
)
def test_a_wrong_belief_is_not(engine, power, word):
    found = calibrated(engine.with_power(power))
    assert found.p_value < 1e-3
    assert word in found.message


@pytest.mark.slow
def test_a_wrong_kernel_is_seen_when_data_come_from_another(engine):
    found = calibrated(engine.with_hypers({"scale": 0.02}), hypers={"scale": 1.0})
    assert found.p_value < 1e-3


def test_ranks_are_stored_and_a_run_goes_on_from_them(engine, tmp_path):
    settings = {"num_draws": 9, "progress": False}
    whole = simulation_based_calibration(engine, SHORT, num_simulations=22, **settings)
    file = tmp_path / "ranks.npz"
    simulation_based_calibration(engine, SHORT, num_simulations=20, file=file, **settings)
    calls = []

    def fit(seed, tasks):
        calls.append(seed)
        return engine.smooth(engine.run(seed, tasks))

    again = simulation_based_calibration(engine, SHORT, num_simulations=22, file=file, fit=fit, **settings)
    assert calls == [20, 21]
    np.testing.assert_array_equal(again.ranks["net.weight"], whole.ranks["net.weight"])
    with pytest.raises(ValueError, match=r"holds ranks with num_draws and key \[9, 0\], not \[9, 1\]"):
        simulation_based_calibration(engine, SHORT, num_simulations=22, file=file, key=1, **settings)


def test_pit_values_go_into_the_group_that_arviz_plots():
    rng = np.random.default_rng(0)
    ranks = {"a": rng.integers(0, 100, (200, 2)), "b": rng.integers(40, 60, 200)}
    found = SimulationCalibration(ranks, 99)
    tree = found.to_datatree()
    assert tree["prior_sbc"]["a"].dims[0] == "sample"
    assert 0 < float(tree["prior_sbc"]["a"].min()) < float(tree["prior_sbc"]["a"].max()) < 1
    p = found.p_values
    assert (p["a"] > 0.01).all()
    assert p["b"] < 1e-6
    with pytest.raises(ValueError, match="probability is 1"):
        found.coverage(1.0)


def test_every_dimension_of_the_ranks_has_a_coordinate():
    ranks = {"weight": np.zeros((20, 4, 2), int), "log_likelihood": np.zeros(20, int)}
    made = SimulationCalibration(ranks, 9).to_datatree()["prior_sbc"]
    assert dict(made.sizes) == {"sample": 20, "weight_dim_0": 4, "weight_dim_1": 2}
    assert set(made.coords) == set(made.sizes)


@pytest.mark.slow
def test_arviz_plots_the_ranks(engine):
    import arviz as az

    tree = calibrated(engine).to_datatree()
    az.plot_ecdf_pit(tree, group="prior_sbc", sample_dims=["sample"], backend="matplotlib")


@pytest.mark.slow
@pytest.mark.parametrize("structure", [LowRank(D), Diagonal()])
def test_other_engines_are_judged_by_the_same_call(structure):
    """Correlated inputs: the diagonal is wrong about sums of weights, which the log likelihood sees."""
    found = calibrated(LaplaceFilter(regression, structure, hypers={"scale": SCALE}))
    assert (found.p_value > 0.05) == isinstance(structure, LowRank)


@pytest.mark.slow
def test_an_engine_that_learns_batch_by_batch_is_judged_through_fit():
    engine = MeanFieldFilter(regression, hypers={"scale": SCALE}, estimator=WeightSampling(), start=AtPrior())
    found = calibrated(engine, fit=lambda seed, tasks: smooth_path(filter_path(engine, seed, tasks)))
    assert found.num_simulations == 100


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_simulations": 19}, "num_simulations is 19 and num_draws 99: too few"),
        ({"num_draws": 8}, "num_draws 8: too few"),
        ({"observed": {"y": "label"}}, "no array of the tasks that holds the values of the site 'y'"),
    ],
)
def test_bad_settings_are_refused(engine, settings, message):
    with pytest.raises(ValueError, match=message):
        simulation_based_calibration(engine, SHORT, progress=False, **settings)


# innovations


def by_task(tasks, hypers=SCALE, seed=0):
    engine = LaplaceFilter(regression, Dense(), hypers={"scale": hypers})
    return innovations(engine.smooth(engine.run(0, tasks)), tasks, key=seed)


def test_innovations_are_the_exact_mahalanobis_squares():
    """Of the data under the joint Gaussian given all earlier tasks; replicates have their mean, the degrees of freedom."""
    tasks = tasks_of(0)
    found = by_task(tasks)
    assert np.isnan(found.statistic[0])
    for t in range(1, T):
        exact = joint_of_prediction(tasks, t)
        assert found.statistic[t] == pytest.approx(exact, rel=2e-3)
        assert found.expected[t] == pytest.approx(N, rel=0.2)
    assert np.abs(found.score[1:]).max() < 4


def joint_of_prediction(tasks, t):
    from oracles_gaussian import Chain

    steps = [(np.eye(D), np.zeros(D), SCALE**2 * np.eye(D))] * (T - 1)
    data = [(k["x"].astype(float), k["y"].astype(float), SD**2 * np.eye(N)) for k in tasks]
    joint = condition(Chain(np.zeros(D), np.eye(D), steps, data), t - 1)
    x, y, _ = data[t]
    residual = y - x @ joint.mean[t]
    return residual @ np.linalg.solve(x @ joint.covariance[t, :, t] @ x.T + SD**2 * np.eye(N), residual)


@pytest.mark.parametrize(("noise", "sign"), [(2 * SD, 1), (SD / 3, -1)])
def test_data_that_vary_more_or_less_than_the_program_says_are_seen(noise, sign):
    found = by_task(tasks_of(0, noise=noise))
    assert sign * found.total_score > 3
    if sign > 0:
        assert found.total_coverage_score[0.9] < -2


@pytest.mark.slow
def test_scores_and_p_values_are_calibrated_over_data_sets():
    scores, coverages, p = [], [], []
    for seed in range(60):
        found = by_task(tasks_of(seed), seed=seed)
        scores.append(found.total_score)
        coverages.append(found.total_coverage_score[0.9])
        p.extend(found.p_value[1:])
    assert abs(np.mean(scores)) < 4 / np.sqrt(60)
    assert 0.7 < np.std(scores) < 1.4
    assert abs(np.mean(coverages)) < 4 / np.sqrt(60)
    assert kstest(p, "uniform").pvalue > 1e-3


@pytest.mark.slow
def test_class_labels_and_missing_tasks_are_judged_too():
    tasks = labelled(0, num_tasks=3)
    engine = LaplaceFilter(logistic, Dense())
    given = [tasks[0], None, tasks[2]]
    found = innovations(engine.smooth(engine.run(0, given)), stacked_with_gap(given), num_samples=100)
    assert np.isnan(found.statistic[:2]).all()
    assert np.isfinite(found.statistic[2])
    assert 0 < found.coverage[0.5][2] < 1
    with pytest.raises(ValueError, match="num_samples is 99"):
        innovations(engine.smooth(engine.run(0, given)), stacked_with_gap(given), num_samples=99)


def stacked_with_gap(tasks):
    from ssm_nn import stack_tasks

    return stack_tasks(tasks)


# the kernel


def test_smoothed_disturbances_have_their_covariance_and_the_slope_is_the_evidences():
    tasks = tasks_of(3)
    with jax.enable_x64(True):
        wide = [{name: value.astype("float64") for name, value in task.items()} for task in tasks]
        engine = LaplaceFilter(regression, Dense(), hypers={"scale": SCALE})
        found = kernel_test(engine.smooth(engine.run(0, wide)))["net.weight"]
    up, down = (joint_of(tasks, SCALE * np.exp(step / 2)).log_evidence for step in (1e-4, -1e-4))
    assert found.slope == pytest.approx((up - down) / 2e-4, rel=1e-4, abs=1e-6)
    assert min(found.p_too_small, found.p_too_large) > 1e-3
    assert not found.still


@pytest.mark.parametrize(("scale", "which"), [(SCALE / 20, "p_too_small"), (8 * SCALE, "p_too_large")])
def test_a_kernel_that_moves_too_little_or_too_much_is_seen(scale, which):
    tasks = tasks_of(0)
    engine = LaplaceFilter(regression, LowRank(D), hypers={"scale": scale})
    found = kernel_test(engine.smooth(engine.run(0, tasks)))["net.weight"]
    assert getattr(found, which) < 1e-4
    assert (found.ratio > 1) == (which == "p_too_small")
