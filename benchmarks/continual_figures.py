"""The pictures of a scenario: accuracy over the tasks seen so far, and what was lost of each task's best."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from continual_cells import AFTER, BEFORE, SMOOTHED
from continual_summary import matrix_of
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ssm_nn.inference.metrics import forgetting

Curves = dict[str, list[np.ndarray]]  # method -> one curve a seed


def draw(folder: Path, scenario: str, cells: Sequence[dict[str, Any]]) -> Path:
    """``<scenario>.png``: lines are means over seeds, bands their range."""
    last = max(row["learnt"] for cell in cells for row in cell["scores"])
    average, lost, by_task = {}, {}, {}
    for cell in cells:
        name = cell["settings"]["method"]
        views = {view: _accuracies(cell, view) for view in (AFTER, BEFORE, SMOOTHED)}
        matrix = matrix_of(views[AFTER], last)
        _append(average, name, _of_prefixes(matrix, lambda m: float(np.mean(m[-1]))))
        _append(lost, name, _of_prefixes(matrix, forgetting))
        _append(by_task, name, np.diag(matrix))
        for view in (BEFORE, SMOOTHED):
            if views[view]:
                values = np.full(last + 1, np.nan)
                for (_, tested), accuracy in views[view].items():
                    values[tested] = accuracy
                _append(by_task, f"{name}, {view}", values)
    panels = [(average, "all tasks so far"), (lost, "forgetting"), (by_task, "each task by its own belief")]
    panels = [(curves, title) for curves, title in panels if _any(curves)]
    figure = Figure(figsize=(5.2 * len(panels), 4.4), layout="constrained")
    axes = np.atleast_1d(np.asarray(figure.subplots(1, len(panels))))
    for axis, (curves, title) in zip(axes, panels, strict=True):
        _panel(axis, curves, title)
    figure.suptitle(scenario)
    path = folder / f"{scenario}.png"
    figure.savefig(path, dpi=120)
    return path


def _panel(axis: Axes, curves: Curves, title: str) -> None:
    colours = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    for number, (name, by_seed) in enumerate(curves.items()):
        stacked = np.stack(by_seed)
        known = ~np.all(np.isnan(stacked), axis=0)
        if not known.any():
            continue
        tasks, colour = np.flatnonzero(known) + 1, colours[number % len(colours)]
        mean = np.nanmean(stacked[:, known], axis=0)
        axis.plot(tasks, mean, color=colour, marker="." if len(tasks) > 1 else "*", label=name)
        if len(stacked) > 1:
            low, high = np.nanmin(stacked[:, known], axis=0), np.nanmax(stacked[:, known], axis=0)
            axis.fill_between(tasks, low, high, color=colour, alpha=0.2, linewidth=0)
    axis.set(title=title, xlabel="task", ylabel="accuracy" if title != "forgetting" else "accuracy lost")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(fontsize="x-small", frameon=False)


def _accuracies(cell: dict[str, Any], view: str) -> dict[tuple[int, int], float]:
    return {(row["learnt"], row["tested"]): row["accuracy"] for row in cell["scores"] if row["view"] == view}


def _of_prefixes(matrix: np.ndarray, measure: Any) -> np.ndarray:
    """The measure after each task; nan where a judgement is missing."""
    values = np.full(len(matrix), np.nan)
    for t in range(len(matrix)):
        prefix = matrix[: t + 1, : t + 1]
        lower = prefix[np.tril_indices(t + 1)]
        needed = prefix[-1] if measure is not forgetting else lower
        if not np.isnan(needed).any():
            values[t] = measure(prefix)
    return values


def _append(curves: Curves, name: str, values: np.ndarray) -> None:
    curves.setdefault(name, []).append(values)


def _any(curves: Curves) -> bool:
    """Whether some curve goes beyond the first task, on which all measures are alike."""
    return any(not np.isnan(values[1:]).all() for by_seed in curves.values() for values in by_seed)
