"""Pictures of the mean-field benchmarks."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

PUBLISHED = {"last_five": 0.9134, "learnt": 0.9468}
LABELS = {"learnt": "the task just learnt", "last_five": "the last five tasks", "all": "all tasks so far"}


def draw_stream(path: Path, rows: list[dict], title: str, published: bool) -> None:
    """Accuracy and out-of-distribution AUROC over the tasks of one long run."""
    matplotlib.use("Agg")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for name, words in LABELS.items():
        points = [(row["task"], row[name]) for row in rows if name in row]
        if points:
            (line,) = left.plot(*np.transpose(points), "." if name == "learnt" else "o-", ms=4, label=words)
            if published and name in PUBLISHED:
                left.axhline(PUBLISHED[name], color=line.get_color(), ls=":", lw=1)
    left.set(xlabel="task", ylabel="test accuracy", title=title, ylim=(min(0.8, left.get_ylim()[0]), 1.0))
    left.legend(fontsize=8)
    for name in ("epistemic", "entropy"):
        points = [(row["task"], row[f"auroc_{name}"]) for row in rows if f"auroc_{name}" in row]
        if points:
            right.plot(*np.transpose(points), "o-", ms=4, label=f"by {name}")
    right.set(xlabel="task", ylabel="AUROC", title="digits against clothes, under the last permutation")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_trade(path: Path, rows: list[dict]) -> None:
    """What a window gives and takes, by width: average over all tasks against the task just learnt, means over the seeds."""
    matplotlib.use("Agg")
    figure, axis = plt.subplots(figsize=(5.5, 4), layout="constrained")
    for width in sorted({row["hidden"] for row in rows}):
        points = []
        for window in sorted({row["window"] for row in rows if row["hidden"] == width}):
            runs = [row for row in rows if (row["hidden"], row["window"]) == (width, window)]
            points.append([window, *(np.mean([run[name] for run in runs]) for name in ("learnt_mean", "all"))])
        axis.plot([p[1] for p in points], [p[2] for p in points], "o-", label=f"{width} units")
        for window, new, everything in points:
            axis.annotate(f"{window:g}", (new, everything), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axis.set(xlabel="accuracy on the task just learnt", ylabel="average over all tasks", title="by window, in examples")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_hessian(path: Path, exact: np.ndarray, found: np.ndarray, words: str) -> None:
    """Read-out against the exact diagonal, weight by weight."""
    matplotlib.use("Agg")
    figure, axis = plt.subplots(figsize=(4.5, 4), layout="constrained")
    kept = exact > 0
    axis.loglog(exact[kept], np.maximum(found[kept], 1e-8), ".", ms=3)
    ends = np.array([exact[kept].min(), exact.max()])
    axis.loglog(ends, ends, "k-", lw=0.7)
    axis.set(xlabel="exact diagonal of the Hessian, an example", ylabel="read from sigma", title=words)
    figure.savefig(path, dpi=120)
    plt.close(figure)
