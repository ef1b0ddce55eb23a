"""Learning curves: what test points say as labels come, the area under a curve, and differences paired by seed.

The area under a score s over the number of labels n is the trapezoids' sum over n, divided by the range of n: the mean of
the score over the labels spent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ssm_nn.inference.metrics import accuracy, brier, ece, nll
from ssm_nn.inference.predictive import Prediction

if TYPE_CHECKING:
    import xarray

__all__ = ["LearningCurve", "PairedDifference", "curves_datatree", "paired_difference", "plot_curves", "scores_of"]


class LearningCurve(NamedTuple):
    """One run of one strategy at one seed; R batches.

    Attributes:
        num_labelled: (R + 1,), labels known before the first batch and after each.
        scores: name -> (R + 1,), of the test points.
        seconds: (R,), of each batch: choosing, updating and sweeping, not the labels' nor the scores'.
        chosen: (n,), indices into the pool in the order in which they were labelled.
    """

    num_labelled: np.ndarray
    scores: dict[str, np.ndarray]
    seconds: np.ndarray
    chosen: np.ndarray

    def area(self, score: str = "accuracy") -> float:
        """The mean of a score over the labels spent; nan for a curve of one point."""
        if score not in self.scores:
            raise ValueError(f"score is {score!r}; the curve has {sorted(self.scores)}")
        return area_under(self.num_labelled, self.scores[score])


class PairedDifference(NamedTuple):
    """Of areas at the same seeds: mean and the bounds of Student's 95 % interval."""

    mean: float
    low: float
    high: float
    num_seeds: int


def area_under(num_labelled: np.ndarray, score: np.ndarray) -> float:
    """Trapezoids over the number of labels, divided by its range."""
    if len(num_labelled) < 2:
        return float("nan")
    return float(np.trapezoid(score, num_labelled) / (num_labelled[-1] - num_labelled[0]))


def scores_of(prediction: Prediction, labels: Any) -> dict[str, float]:
    """Accuracy, NLL, Brier score and calibration error of classes; NLL and root mean square error of numbers."""
    if prediction.probabilities is not None:
        p, y = prediction.probabilities, np.asarray(labels).astype(int)
        return {"accuracy": accuracy(p, y), "nll": nll(p, y), "brier": brier(p, y), "ece": ece(p, y)}
    assert prediction.log_density is not None
    missed = np.asarray(labels, float).reshape(np.shape(prediction.mean)) - prediction.mean
    return {"nll": -float(np.mean(prediction.log_density)), "rmse": float(np.sqrt(np.mean(missed**2)))}


def paired_difference(first: Sequence[float], second: Sequence[float]) -> PairedDifference:
    """``mean(first - second)`` with Student's 95 % interval; values of the same seeds at the same places.

    Raises:
        ValueError: fewer than two seeds, another number of them in the two.
    """
    from scipy.stats import t

    a, b = np.asarray(first, float), np.asarray(second, float)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"first has shape {a.shape} and second {b.shape}; (S,) of at least 2 seeds is accepted")
    difference = a - b
    half = float(t.ppf(0.975, len(a) - 1) * difference.std(ddof=1) / np.sqrt(len(a)))
    mean = float(difference.mean())
    return PairedDifference(mean, mean - half, mean + half, len(a))


def curves_datatree(curves: Mapping[str, Sequence[LearningCurve]], seeds: Sequence[int]) -> xarray.DataTree:
    """Curves of several strategies at several seeds, all with the same numbers of labels.

        learning_curves   every score: strategy, seed, num_labelled; seconds of the batch before it, nan at first
        areas             the area under each score: strategy, seed
        choices           index: strategy, seed, order

    Args:
        curves: by strategy, one curve a seed.
        seeds: their numbers.

    Raises:
        ValueError: curves that differ in length, in labels, or in number.
    """
    import xarray
    from arviz_base import dict_to_dataset

    listed = [curve for own in curves.values() for curve in own]
    if not listed or any(len(own) != len(seeds) for own in curves.values()):
        counts = {name: len(own) for name, own in curves.items()}
        raise ValueError(f"curves holds {counts}; {len(seeds)} of each strategy, one a seed, are accepted")
    first = listed[0]
    for curve in listed:
        if not np.array_equal(curve.num_labelled, first.num_labelled) or set(curve.scores) != set(first.scores):
            raise ValueError("the curves differ in their numbers of labels or in their scores; equal ones are accepted")

    def stacked(read: Any) -> np.ndarray:
        return np.stack([np.stack([read(curve) for curve in own]) for own in curves.values()])

    coords: dict[str, Any] = {
        "strategy": list(curves),
        "seed": list(seeds),
        "num_labelled": first.num_labelled,
        "order": np.arange(len(first.chosen)),
    }

    def dataset(values: dict[str, np.ndarray], *axes: str) -> Any:
        dims = ("strategy", "seed", *axes)
        return dict_to_dataset(
            values, coords={dim: coords[dim] for dim in dims}, dims=dict.fromkeys(values, dims), sample_dims=[]
        )

    scores = {name: stacked(lambda curve, name=name: curve.scores[name]) for name in first.scores}
    scores["seconds"] = stacked(lambda curve: np.concatenate([[np.nan], curve.seconds]))
    areas = {name: stacked(lambda curve, name=name: np.array(curve.area(name))) for name in first.scores}
    return xarray.DataTree.from_dict(
        {
            "/learning_curves": dataset(scores, "num_labelled"),
            "/areas": dataset(areas),
            "/choices": dataset({"index": stacked(lambda curve: curve.chosen)}, "order"),
        }
    )


def plot_curves(tree: xarray.DataTree, score: str = "accuracy", axis: Any = None) -> Any:
    """The mean of a score over seeds by number of labels, with bands of one standard error; the axes.

    Args:
        tree: of ``curves_datatree``.
        score: one of its learning curves.
        axis: of matplotlib; a new figure where there is none.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    group: Any = tree["learning_curves"]
    if score not in group:
        raise ValueError(f"score is {score!r}; the curves have {[str(name) for name in group.data_vars]}")
    if axis is None:
        axis = Figure(layout="constrained").subplots()
    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    labels = group["num_labelled"].values
    for number, name in enumerate(group["strategy"].values):
        values = group[score].sel(strategy=name).values
        mean, colour = values.mean(axis=0), colours[number % len(colours)]
        axis.plot(labels, mean, color=colour, label=str(name))
        if len(values) > 1:
            error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
            axis.fill_between(labels, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
    axis.set(xlabel="labels", ylabel=score)
    axis.legend(fontsize="x-small", frameon=False)
    return axis
