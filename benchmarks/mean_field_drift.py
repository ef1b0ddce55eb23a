"""Concept drift without boundaries: prequential accuracy (predict, then learn) on two streams, beside online classifiers.

Inputs are standardised by what has been seen before them. Online classifiers are scikit-learn's ``partial_fit``, and river's
where it is installed (``uv run --group drift``). Hyper-parameters are not tuned: every window is shown, and scikit-learn's and
river's are their defaults, with a constant rate beside scikit-learn's falling one. Its naive Bayes is left out: it smooths by
the variance of a batch, which is 0 for one example.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from csv_files import write_csv
from mean_field_programs import classifier
from rich.progress import track

from ssm_nn.inference.mean_field.engine import MeanFieldFilter
from ssm_nn.inference.mean_field.forgetting import Window
from ssm_nn.inference.mean_field.rules import FixedPoint
from ssm_nn.inference.mean_field.streams import Batches
from ssm_nn.models.datasets import load_stream
from ssm_nn.models.networks import mlp

STREAMS = ("electricity", "weather")
WINDOWS = (300.0, 1_000.0, 3_000.0, 10_000.0, float("inf"))
HIDDEN = 32


def measure(out: Path, streams: list[str], seeds: int) -> None:
    """A table and a picture a stream: prequential accuracy by method, mean and standard deviation over seeds, seconds."""
    for stream in streams:
        data = load_stream(stream)
        x = standardised(data.x)
        rows, curves = [], {}
        for name, method in methods(x.shape[1]):
            stochastic = name.startswith("mean field")
            began = time.perf_counter()
            correct = [method(x, data.y, seed) for seed in range(seeds if stochastic else 1)]
            seconds = (time.perf_counter() - began) / len(correct)
            each = [float(np.mean(c)) for c in correct]
            row = {"stream": stream, "method": name, "accuracy": np.mean(each), "sd": np.std(each), "seeds": len(each)}
            rows.append(row | {"seconds": seconds})
            curves[name] = correct[0]
            print(f"{stream:12s} {name:48s} {row['accuracy']:.4f} ± {row['sd']:.4f}  {seconds:.1f} s", flush=True)
            write_csv(out / f"drift-{stream}.csv", rows)
        draw(out / f"drift-{stream}.png", stream, curves)


def standardised(x: np.ndarray) -> np.ndarray:
    """Each row by the mean and deviation of the rows before it; the first hundred by their own."""
    x = x.astype(np.float64)
    count = np.arange(1, len(x) + 1)[:, None]
    mean = np.cumsum(x, 0) / count
    deviation = np.sqrt(np.maximum(np.cumsum(x**2, 0) / count - mean**2, 0))
    before = np.maximum(np.arange(len(x)) - 1, 99)
    return ((x - mean[before]) / np.maximum(deviation[before], 1e-6)).astype(np.float32)


def methods(width: int) -> Iterator[tuple[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]]]:
    """Name, and (x, y, seed) -> whether each example was predicted right before it was learnt."""
    for hidden in (0, HIDDEN):
        sizes = (width, hidden, 2) if hidden else (width, 2)
        for window in WINDOWS:
            words = f"{hidden} units" if hidden else "linear"
            yield (
                f"mean field, {words}, window {window:g}",
                lambda x, y, s, z=sizes, w=window: mean_field(x, y, s, z, w),
            )
    yield "the label before", lambda x, y, s: np.concatenate([[False], y[1:] == y[:-1]])
    for name, make in _scikit().items():
        yield name, lambda x, y, s, make=make: partial_fits(x, y, make())
    for name, make in _river().items():
        yield name, lambda x, y, s, make=make: river_learns(x, y, make())


def mean_field(x: np.ndarray, y: np.ndarray, seed: int, sizes: tuple[int, ...], window: float) -> np.ndarray:
    """One example at a time, in the order of time."""
    engine = MeanFieldFilter(classifier(mlp(sizes, "relu")), Window(window), rule=FixedPoint())
    return engine.run(seed, Batches({"x": x, "y": y}, 1))[1].correct


def partial_fits(x: np.ndarray, y: np.ndarray, model) -> np.ndarray:
    """scikit-learn, one example at a time."""
    correct = np.zeros(len(y), bool)
    model.partial_fit(x[:1], y[:1], classes=[0, 1])
    for n in track(range(1, len(y)), type(model).__name__, transient=True):
        correct[n] = model.predict(x[n : n + 1])[0] == y[n]
        model.partial_fit(x[n : n + 1], y[n : n + 1])
    return correct


def river_learns(x: np.ndarray, y: np.ndarray, model) -> np.ndarray:
    """river, one example at a time."""
    correct = np.zeros(len(y), bool)
    for n in track(range(len(y)), type(model).__name__, transient=True):
        features = dict(enumerate(map(float, x[n])))
        correct[n] = model.predict_one(features) == y[n]
        model.learn_one(features, int(y[n]))
    return correct


def _scikit() -> dict[str, Callable]:
    from sklearn.linear_model import Perceptron, SGDClassifier

    return {
        "scikit-learn SGDClassifier, log loss": lambda: SGDClassifier(loss="log_loss", random_state=0),
        "scikit-learn SGDClassifier, log loss, rate 0.01": lambda: SGDClassifier(
            loss="log_loss", learning_rate="constant", eta0=0.01, random_state=0
        ),
        "scikit-learn Perceptron": lambda: Perceptron(random_state=0),
    }


def _river() -> dict[str, Callable]:
    try:
        names = ("tree", "forest", "linear_model", "naive_bayes")
        tree, forest, linear, bayes = (importlib.import_module(f"river.{name}") for name in names)
    except ImportError:
        print("river is not installed, and its classifiers are left out: uv run --group drift installs it", flush=True)
        return {}
    return {
        "river GaussianNB": bayes.GaussianNB,
        "river LogisticRegression": linear.LogisticRegression,
        "river HoeffdingAdaptiveTree": lambda: tree.HoeffdingAdaptiveTreeClassifier(seed=0),
        "river ARFClassifier": lambda: forest.ARFClassifier(seed=0),
    }


def draw(path: Path, title: str, curves: dict[str, np.ndarray]) -> None:
    """Running accuracy of the best window of each network, and of the others."""
    matplotlib.use("Agg")
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for kind in ("linear", f"{HIDDEN} units"):
        best = max((n for n in curves if f", {kind}," in n), key=lambda n: np.mean(curves[n]))
        axis.plot(_running(curves[best]), lw=1.5, label=best)
    for name, correct in curves.items():
        if not name.startswith("mean field"):
            axis.plot(_running(correct), lw=0.7, label=name)
    axis.set(title=title, xlabel="example", ylabel="accuracy, running mean of 1,000")
    axis.legend(fontsize=6)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _running(correct: np.ndarray, width: int = 1000) -> np.ndarray:
    return np.convolve(correct, np.ones(width) / width, mode="valid")
