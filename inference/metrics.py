"""What a prediction is worth: per task, over the stream, and how much of its uncertainty is the model's.

Arrays may be NumPy's or JAX's; everything is computed in float64 on the host. Logarithms are natural.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from scipy.special import entr

__all__ = [
    "Entropy",
    "OrderDisparity",
    "Reliability",
    "accuracy",
    "auroc",
    "auroc_one_vs_rest",
    "average_accuracy",
    "backward_transfer",
    "brier",
    "ece",
    "forgetting",
    "forward_transfer",
    "learning_accuracy",
    "nll",
    "order_disparity",
    "predictive_entropy",
    "reliability",
]

# A softmax in float32 or bfloat16 over many classes misses 1 by less.
SUM_TOLERANCE = 1e-2


def accuracy(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """mean_n [argmax_k p_nk = y_n]; the first of equal maxima counts.

    Args:
        probabilities: (N, K).
        labels: (N,), integers in 0 ... K - 1.

    Raises:
        ValueError: shapes that disagree, no example, labels out of range, rows that are no probabilities.
    """
    p, y = _checked(probabilities, labels)
    return float(np.mean(p.argmax(axis=1) == y))


def nll(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """-mean_n log p_n[y_n], in nats; infinite where a label came that was given probability 0.

    Args, errors: as for ``accuracy``.
    """
    p, y = _checked(probabilities, labels)
    with np.errstate(divide="ignore"):
        return float(-np.mean(np.log(p[np.arange(len(y)), y])))


def brier(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """mean_n sum_k (p_nk - [y_n = k])^2, from 0 to 2 (Brier 1950).

    Args, errors: as for ``accuracy``.
    """
    p, y = _checked(probabilities, labels)
    return float(np.mean(np.sum((p - np.eye(p.shape[1])[y]) ** 2, axis=1)))


class Reliability(NamedTuple):
    """Confidence against accuracy in B bins of equal width; nan in a bin without examples."""

    edges: Float[np.ndarray, " edge"]
    count: Int[np.ndarray, " bin"]
    confidence: Float[np.ndarray, " bin"]
    accuracy: Float[np.ndarray, " bin"]


def reliability(probabilities: ArrayLike, labels: ArrayLike, num_bins: int = 15) -> Reliability:
    """Mean confidence max_k p_nk and accuracy in the bins ((b - 1) / B, b / B], for a reliability diagram.

    Args:
        probabilities: (N, K).
        labels: (N,), integers in 0 ... K - 1.
        num_bins: B.

    Raises:
        ValueError: as for ``accuracy``; num_bins below 1.
    """
    p, y = _checked(probabilities, labels)
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}; at least 1 is needed")
    confidence = p.max(axis=1)
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    bins = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, num_bins - 1)
    count = np.bincount(bins, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(bins, confidence, num_bins) / count
        mean_accuracy = np.bincount(bins, p.argmax(axis=1) == y, num_bins) / count
    return Reliability(edges, count, mean_confidence, mean_accuracy)


def ece(probabilities: ArrayLike, labels: ArrayLike, num_bins: int = 15) -> float:
    """sum_b (n_b / N) |accuracy_b - confidence_b|, the expected calibration error over bins of equal width.

    Source: Guo et al. 2017, "On calibration of modern neural networks". Args, errors: as for ``reliability``.
    """
    bins = reliability(probabilities, labels, num_bins)
    gaps = np.where(bins.count > 0, np.abs(bins.accuracy - bins.confidence), 0.0)
    return float(np.sum(bins.count * gaps) / np.sum(bins.count))


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """P(s+ > s-) + P(s+ = s-) / 2 for a positive and a negative example: the area under the ROC curve.

    Args:
        scores: (N,), higher for what should be positive.
        labels: (N,), 1 (positive) and 0, or booleans.

    Raises:
        ValueError: shapes that disagree, nan, labels other than 0 and 1, or labels all of one kind.
    """
    s, y = np.asarray(scores, np.float64), np.asarray(labels)
    if s.ndim != 1 or s.shape != y.shape:
        raise ValueError(f"scores has shape {s.shape} and labels {y.shape}; both should be (N,)")
    if np.isnan(s).any():
        raise ValueError(f"scores has {int(np.isnan(s).sum())} nan; numbers are needed")
    if not np.isin(y, (0, 1)).all():
        raise ValueError(f"labels holds {np.unique(y).tolist()[:5]}; 0 and 1 are accepted")
    positive = int(np.sum(y == 1))
    negative = len(y) - positive
    if not positive or not negative:
        raise ValueError(f"labels has {positive} positive and {negative} negative examples; both kinds are needed")
    _, place, count = np.unique(s, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[place]  # from 1; ties share their mean
    # Mann-Whitney: the ranks of the positives, less the least they could be.
    above = ranks[y == 1].sum() - positive * (positive + 1) / 2
    return float(above / (positive * negative))


def auroc_one_vs_rest(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """mean_k auroc(p_k, [y = k]) over the classes that occur.

    Args:
        probabilities: (N, K).
        labels: (N,), integers in 0 ... K - 1, of at least two classes.

    Raises:
        ValueError: as for ``accuracy``, or labels all of one class.
    """
    p, y = _checked(probabilities, labels)
    present = np.unique(y)
    if len(present) < 2:
        raise ValueError(f"labels are all {present[0]}; at least two classes are needed")
    return float(np.mean([auroc(p[:, k], y == k) for k in present]))


def average_accuracy(matrix: ArrayLike) -> float:
    """mean_j A[T-1, j]: the last belief on all tasks.

    Args:
        matrix: A, (T, T); A[i, j] is the accuracy on task j after learning task i. Entries that a summary does not read
            may be nan.

    Raises:
        ValueError: a matrix that is not square or is empty.
    """
    return float(np.mean(_square(matrix)[-1]))


def learning_accuracy(matrix: ArrayLike) -> float:
    """mean_j A[j, j]: each task right after it was learnt (plasticity). Args, errors: as for ``average_accuracy``."""
    return float(np.mean(np.diag(_square(matrix))))


def forgetting(matrix: ArrayLike) -> float:
    """1/(T-1) sum_{j<T-1} (max_{j<=i<T-1} A[i, j] - A[T-1, j]): the loss since a task's best; nan for one task.

    The maximum starts at i = j: what was known before task j came does not count as learnt. Source: Chaudhry et al.
    2018, "Riemannian walk for incremental learning". Args, errors: as for ``average_accuracy``.
    """
    a = _square(matrix)
    last = len(a) - 1
    return _mean_of_later([np.max(a[j:last, j]) - a[last, j] for j in range(last)])


def backward_transfer(matrix: ArrayLike) -> float:
    """1/(T-1) sum_{j<T-1} (A[T-1, j] - A[j, j]): what later tasks did to earlier ones; nan for one task.

    Source: Lopez-Paz and Ranzato 2017, "Gradient episodic memory". Args, errors: as for ``average_accuracy``.
    """
    a = _square(matrix)
    return _mean_of_later([a[-1, j] - a[j, j] for j in range(len(a) - 1)])


def forward_transfer(matrix: ArrayLike, baseline: ArrayLike) -> float:
    """1/(T-1) sum_{j>0} (A[j-1, j] - b_j): what earlier tasks did for the next one; nan for one task.

    Source: Lopez-Paz and Ranzato 2017.

    Args:
        matrix: as for ``average_accuracy``.
        baseline: b, (T,); accuracy on each task before anything was learnt. b_0 is not read.

    Raises:
        ValueError: a matrix that is not square or is empty, a baseline of another length.
    """
    a, b = _square(matrix), np.asarray(baseline, np.float64)
    if b.shape != (len(a),):
        raise ValueError(f"baseline has shape {b.shape}; one number for each of the {len(a)} tasks is needed")
    return _mean_of_later([a[j - 1, j] - b[j] for j in range(1, len(a))])


class OrderDisparity(NamedTuple):
    """``per_task`` is OPD_t; ``average`` its mean over tasks (AOPD), ``maximum`` its maximum (MOPD)."""

    average: float
    maximum: float
    per_task: Float[np.ndarray, " task"]


def order_disparity(performance: ArrayLike) -> OrderDisparity:
    """OPD_t = max_r P[r, t] - min_r P[r, t] over the orders r in which the tasks came.

    Source: Yoon et al. 2020, "Scalable and order-robust continual learning with additive parameter decomposition".

    Args:
        performance: P, (R, T); the final performance on task t, by its natural number, when tasks came in order r.

    Raises:
        ValueError: fewer than two orders, no task, what is no number.
    """
    try:
        p = np.asarray(performance, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"performance is {performance!r}; numbers (R, T), a row for each order, are needed") from error
    if p.ndim != 2 or p.shape[0] < 2 or p.shape[1] < 1:
        raise ValueError(f"performance has shape {p.shape}; (R, T) with at least two orders R is needed")
    per_task = p.max(axis=0) - p.min(axis=0)
    return OrderDisparity(float(per_task.mean()), float(per_task.max()), per_task)


class Entropy(NamedTuple):
    """Predictive entropy in nats and its two parts, total = aleatoric + epistemic."""

    total: Float[np.ndarray, " n"]
    aleatoric: Float[np.ndarray, " n"]
    epistemic: Float[np.ndarray, " n"]


def predictive_entropy(probabilities: ArrayLike) -> Entropy:
    """H[mean_s p_s] = mean_s H[p_s] + I: what the draws agree is uncertain, and what they disagree about.

    I is the mutual information between label and weights.
    Source: Depeweg et al. 2018, "Decomposition of uncertainty in Bayesian deep learning".

    Args:
        probabilities: (S, N, K), one row of K for each posterior draw and example.

    Raises:
        ValueError: another number of axes, no draw, rows that are no probabilities.
    """
    p = np.asarray(probabilities, np.float64)
    if p.ndim != 3 or p.shape[0] < 1 or p.shape[2] < 1:
        raise ValueError(f"probabilities has shape {p.shape}; (S, N, K) with at least one draw is needed")
    p = _normalised(p)
    total = entr(p.mean(axis=0)).sum(axis=-1)
    aleatoric = entr(p).sum(axis=-1).mean(axis=0)
    # Jensen makes the difference non-negative; rounding may not.
    epistemic = np.maximum(total - aleatoric, 0.0)
    return Entropy(aleatoric + epistemic, aleatoric, epistemic)


def _checked(probabilities: ArrayLike, labels: ArrayLike) -> tuple[Float[np.ndarray, "n k"], Int[np.ndarray, " n"]]:
    p, y = np.asarray(probabilities, np.float64), np.asarray(labels)
    if p.ndim != 2 or 0 in p.shape:
        raise ValueError(f"probabilities has shape {p.shape}; (N, K) with at least one example is needed")
    if y.shape != (len(p),):
        raise ValueError(f"labels has shape {y.shape}; one label for each of the {len(p)} rows is needed")
    if not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"labels has dtype {y.dtype}; integers are needed")
    if y.min() < 0 or y.max() >= p.shape[1]:
        raise ValueError(f"labels runs from {y.min()} to {y.max()}; 0 to {p.shape[1] - 1} are accepted")
    return _normalised(p), y


def _normalised(p: Float[np.ndarray, "*rows k"]) -> Float[np.ndarray, "*rows k"]:
    """Rows that sum to 1 in float64; they come in a lower precision. ValueError where they are no probabilities."""
    sums = p.sum(axis=-1, keepdims=True)
    wrong = ~(np.abs(sums - 1) <= SUM_TOLERANCE)[..., 0] | (p < 0).any(axis=-1)
    if wrong.any():
        row = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"probabilities{list(row)} is {np.round(p[row], 4).tolist()[:10]}; "
            "numbers that are not negative and sum to 1 are needed (logits go through a softmax first)"
        )
    return p / sums


def _square(matrix: ArrayLike) -> Float[np.ndarray, "task task"]:
    a = np.asarray(matrix, np.float64)
    if a.ndim != 2 or a.shape[0] != a.shape[1] or not len(a):
        raise ValueError(f"matrix has shape {a.shape}; (T, T) with at least one task is needed")
    return a


def _mean_of_later(terms: list[float]) -> float:
    return float(np.mean(terms)) if terms else float("nan")
