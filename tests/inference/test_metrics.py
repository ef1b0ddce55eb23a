"""Metrics against scikit-learn, SciPy, loops, and cases worked by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from ssm_nn.inference import metrics

MATRIX = np.array([[0.90, 0.40, 0.10], [0.70, 0.80, 0.30], [0.75, 0.60, 0.95]])
PER_EXAMPLE = [metrics.accuracy, metrics.nll, metrics.brier, metrics.ece, metrics.auroc_one_vs_rest]


@pytest.fixture
def predictions(rng):
    """Probabilities (200, 4) that are informative and overconfident, and labels."""
    labels = rng.integers(0, 4, 200)
    logits = 2 * rng.normal(size=(200, 4)) + 1.5 * np.eye(4)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return probabilities, labels


def test_accuracy_nll_brier_and_auroc_are_scikit_learns(predictions):
    p, y = predictions
    assert metrics.accuracy(p, y) == pytest.approx(sk.accuracy_score(y, p.argmax(1)))
    assert metrics.nll(p, y) == pytest.approx(sk.log_loss(y, p))
    assert metrics.auroc_one_vs_rest(p, y) == pytest.approx(sk.roc_auc_score(y, p, multi_class="ovr"))
    binary = p[:, :2] / p[:, :2].sum(axis=1, keepdims=True)
    # scikit-learn's binary score counts one of the two classes.
    assert metrics.brier(binary, y % 2) == pytest.approx(2 * sk.brier_score_loss(y % 2, binary[:, 1]))


def test_brier_by_hand():
    assert metrics.brier([[0.5, 0.3, 0.2], [0.0, 0.0, 1.0]], [0, 0]) == pytest.approx((0.25 + 0.09 + 0.04 + 2) / 2)


def test_nll_is_infinite_for_what_was_impossible():
    assert metrics.nll([[1.0, 0.0], [0.5, 0.5]], [1, 0]) == np.inf
    assert metrics.nll([[1.0, 0.0]], [0]) == 0


@pytest.mark.parametrize("num_bins", [1, 7, 15])
def test_ece_is_the_textbooks_loop(predictions, num_bins):
    p, y = predictions
    confidence, correct = p.max(axis=1), p.argmax(axis=1) == y
    expected = 0.0
    for b in range(num_bins):
        inside = [n for n in range(len(y)) if b / num_bins < confidence[n] <= (b + 1) / num_bins]
        if inside:
            expected += len(inside) / len(y) * abs(correct[inside].mean() - confidence[inside].mean())
    assert metrics.ece(p, y, num_bins) == pytest.approx(expected)


def test_ece_by_hand():
    """Two examples at 0.8, one right: |0.5 - 0.8| / 2 each; two at 0.6, both right: |1 - 0.6| / 2."""
    p = np.array([[0.8, 0.2], [0.8, 0.2], [0.6, 0.4], [0.6, 0.4]])
    assert metrics.ece(p, [0, 1, 0, 0]) == pytest.approx(0.5 * 0.3 + 0.5 * 0.4)


def test_reliability_bins_are_closed_on_the_right_and_nan_where_empty():
    bins = metrics.reliability([[0.5, 0.5], [0.75, 0.25], [0.76, 0.24], [1.0, 0.0]], [0, 0, 1, 0], num_bins=4)
    np.testing.assert_array_equal(bins.edges, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_array_equal(bins.count, [0, 1, 1, 2])
    np.testing.assert_allclose(bins.confidence, [np.nan, 0.5, 0.75, 0.88])
    np.testing.assert_allclose(bins.accuracy, [np.nan, 1, 1, 0.5])


def test_a_calibrated_forecast_has_a_small_ece(rng):
    p = rng.dirichlet([0.5, 0.5, 0.5], 200_000)
    y = (p.cumsum(axis=1) < rng.random((len(p), 1))).sum(axis=1).clip(max=2)
    assert metrics.ece(p, y) < 0.005
    assert metrics.ece(p, (y + 1) % 3) > 0.3


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_is_scikit_learns_with_and_without_ties(rng, ties):
    labels = rng.integers(0, 2, 300)
    scores = rng.normal(size=300) + labels
    scores = scores.round(0) if ties else scores
    assert metrics.auroc(scores, labels) == pytest.approx(sk.roc_auc_score(labels, scores))
    assert metrics.auroc(scores, labels == 1) == pytest.approx(sk.roc_auc_score(labels, scores))


def test_auroc_by_hand():
    assert metrics.auroc([0.1, 0.2, 0.3], [0, 1, 1]) == 1
    assert metrics.auroc([0.3, 0.2, 0.1], [0, 1, 1]) == 0
    assert metrics.auroc([1, 1, 1], [0, 1, 1]) == 0.5
    assert metrics.auroc([1, 2, 3, 3], [0, 1, 0, 1]) == pytest.approx((1 + 0 + 1 + 0.5) / 4)


def test_the_accuracy_matrix_by_hand():
    assert metrics.average_accuracy(MATRIX) == pytest.approx((0.75 + 0.60 + 0.95) / 3)
    assert metrics.learning_accuracy(MATRIX) == pytest.approx((0.90 + 0.80 + 0.95) / 3)
    assert metrics.forgetting(MATRIX) == pytest.approx(((0.90 - 0.75) + (0.80 - 0.60)) / 2)
    assert metrics.backward_transfer(MATRIX) == pytest.approx(((0.75 - 0.90) + (0.60 - 0.80)) / 2)
    baseline = [0.1, 0.15, 0.05]
    assert metrics.forward_transfer(MATRIX, baseline) == pytest.approx(((0.40 - 0.15) + (0.30 - 0.05)) / 2)


def test_forgetting_counts_from_the_best_since_the_task_was_learnt():
    improved = MATRIX.copy()
    improved[1, 0] = 0.97
    assert metrics.forgetting(improved) == pytest.approx(((0.97 - 0.75) + 0.20) / 2)
    known_before = MATRIX.copy()
    known_before[0, 1] = 0.99
    assert metrics.forgetting(known_before) == metrics.forgetting(MATRIX)


def test_summaries_need_only_the_entries_they_read():
    lower = np.where(np.tri(3), MATRIX, np.nan)
    for summary in (metrics.average_accuracy, metrics.learning_accuracy, metrics.forgetting, metrics.backward_transfer):
        assert summary(lower) == summary(MATRIX)


def test_one_task_has_no_forgetting_and_no_transfer():
    assert metrics.average_accuracy([[0.5]]) == metrics.learning_accuracy([[0.5]]) == 0.5
    assert np.isnan(metrics.forgetting([[0.5]]))
    assert np.isnan(metrics.backward_transfer([[0.5]]))
    assert np.isnan(metrics.forward_transfer([[0.5]], [0.1]))


def test_order_disparity_by_hand():
    got = metrics.order_disparity([[0.9, 0.5, 0.7], [0.8, 0.9, 0.7], [0.85, 0.6, 0.7]])
    np.testing.assert_allclose(got.per_task, [0.1, 0.4, 0.0], atol=1e-15)
    assert got.average == pytest.approx(0.5 / 3)
    assert got.maximum == pytest.approx(0.4)


def test_the_entropy_splits_as_scipy_computes_it(rng):
    p = rng.dirichlet([0.3] * 5, (20, 30))
    got = metrics.predictive_entropy(p)
    np.testing.assert_allclose(got.total, stats.entropy(p.mean(axis=0), axis=-1))
    np.testing.assert_allclose(got.aleatoric, stats.entropy(p, axis=-1).mean(axis=0))
    mutual = stats.entropy(p, p.mean(axis=0, keepdims=True), axis=-1).mean(axis=0)
    np.testing.assert_allclose(got.epistemic, mutual)


def test_draws_that_agree_leave_nothing_epistemic_and_sure_ones_that_disagree_nothing_aleatoric():
    same = metrics.predictive_entropy(np.full((7, 3, 4), 0.25))
    np.testing.assert_allclose(same.aleatoric, np.log(4))
    np.testing.assert_array_equal(same.epistemic, 0)
    sure = metrics.predictive_entropy(np.eye(2)[:, None, :])
    np.testing.assert_allclose(sure.epistemic, np.log(2))
    np.testing.assert_array_equal(sure.aleatoric, 0)


def test_jax_arrays_in_float32_give_the_same(predictions):
    p, y = predictions
    for metric in PER_EXAMPLE:
        assert metric(jnp.asarray(p, jnp.float32), jnp.asarray(y)) == pytest.approx(metric(p, y), abs=1e-6)


@pytest.mark.parametrize("metric", PER_EXAMPLE)
@pytest.mark.parametrize(
    ("p", "y", "message"),
    [
        ([0.5, 0.5], [0], r"probabilities has shape \(2,\); \(N, K\)"),
        (np.zeros((0, 3)), [], r"probabilities has shape \(0, 3\)"),
        ([[0.5, 0.5]], [0, 1], r"labels has shape \(2,\); one label for each of the 1 rows"),
        ([[0.5, 0.5]], [2], "labels runs from 2 to 2; 0 to 1 are accepted"),
        ([[0.5, 0.5]], [-1], "labels runs from -1 to -1"),
        ([[0.5, 0.5]], [0.0], "labels has dtype float64; integers"),
        ([[0.5, 0.5], [2.0, -1.0]], [0, 1], r"probabilities\[1\] is \[2.0, -1.0\]"),
        ([[0.5, 0.5], [0.5, np.nan]], [0, 1], r"probabilities\[1\] is \[0.5, nan\]"),
        ([[0.7, 0.7]], [0], r"probabilities\[0\] is \[0.7, 0.7\]; numbers that are not negative and sum to 1"),
    ],
)
def test_bad_predictions_are_named(metric, p, y, message):
    with pytest.raises(ValueError, match=message):
        metric(p, y)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.ece([[1.0, 0.0]], [0], num_bins=0), "num_bins is 0; at least 1"),
        (lambda: metrics.auroc([0.1, 0.2], [0, 2]), r"labels holds \[0, 2\]; 0 and 1"),
        (lambda: metrics.auroc([0.1, 0.2], [1, 1]), "labels has 2 positive and 0 negative examples"),
        (lambda: metrics.auroc([0.1, np.nan], [0, 1]), "scores has 1 nan"),
        (lambda: metrics.auroc([0.1], [0, 1]), r"scores has shape \(1,\) and labels \(2,\)"),
        (lambda: metrics.auroc_one_vs_rest([[1.0, 0.0]], [0]), "labels are all 0; at least two classes"),
        (lambda: metrics.average_accuracy([[1.0, 0.0]]), r"matrix has shape \(1, 2\); \(T, T\)"),
        (lambda: metrics.forgetting(np.zeros((0, 0))), r"matrix has shape \(0, 0\)"),
        (lambda: metrics.forward_transfer(MATRIX, [0.1]), r"baseline has shape \(1,\); one number for each of the 3"),
        (lambda: metrics.order_disparity([[0.1, 0.2]]), r"performance has shape \(1, 2\); \(R, T\)"),
        (lambda: metrics.order_disparity("a"), "performance is 'a'; numbers"),
        (lambda: metrics.predictive_entropy([[0.5, 0.5]]), r"probabilities has shape \(1, 2\); \(S, N, K\)"),
        (lambda: metrics.predictive_entropy([[[0.5, 0.9]]]), r"probabilities\[0, 0\] is \[0.5, 0.9\]"),
    ],
)
def test_other_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
