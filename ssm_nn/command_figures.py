"""The pictures of the report, each a function of the run's summary and arrays; SVG as an address that a page can hold."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssm_nn.command_evaluate import LAST, LEARNT, SMOOTHED
from ssm_nn.command_settings import STATIC, Kernel
from ssm_nn.command_summary import Line, Summary
from ssm_nn.inference.metrics import reliability

__all__ = ["accuracy_matrices", "calibration", "evidence", "examples", "forgetting_curves", "views_by_task"]

Arrays = Mapping[str, np.ndarray]

# Okabe and Ito's colours, told apart with any colour vision
BLUE, ORANGE, GREEN, PURPLE, GREY, SKY = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#6b6b6b", "#56B4E9"
COLOURS = {
    "fine-tuning": ORANGE,
    "static filter": GREY,
    "chosen filter": BLUE,
    "static smoother": SKY,
    "smoother": GREEN,
    "joint training": PURPLE,
}
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "svg.hashsalt": "ssm-nn",
}
WITHOUT_GRID: dict[Any, Any] = {**STYLE, "axes.grid": False}
WIDTH = 9.6  # inches, the page's


def _figure(height: float, columns: int, **options: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, **options)
    return figure, list(axes[0])


def _address(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def _line(summary: Summary, label: str) -> Line | None:
    return next((line for line in summary.lines if line.label == label), None)


def _tasks(axes: Axes, number: int) -> None:
    """Ticks at whole tasks, numbered from 1, at most a dozen."""
    every = max(math.ceil(number / 12), 1)
    axes.set_xticks(range(1, number + 1, every))


def _band(
    axes: Axes, x: Sequence[int] | np.ndarray, values: np.ndarray, colour: str, label: str, style: str = "o-"
) -> None:
    """Mean over seeds (the first axis) and one standard deviation to both sides, in per cent."""
    mean = 100 * np.mean(values, axis=0)
    axes.plot(x, mean, style, color=colour, label=label)
    if len(values) > 1:
        sd = 100 * np.std(values, axis=0, ddof=1)
        axes.fill_between(x, mean - sd, mean + sd, color=colour, alpha=0.13, linewidth=0)


def accuracy_matrices(summary: Summary) -> str:
    """A[i, j] for fine-tuning, the static filter and the chosen filter, mean over seeds."""
    lines = [line for line in summary.lines if line.has_matrix]
    matrices = [100 * np.mean(summary.matrix(line), axis=0) for line in lines]
    size = summary.settings.tasks
    with mpl.rc_context(WITHOUT_GRID):
        figure, panels = _figure(0.9 + WIDTH / max(len(lines), 2) * 0.92, len(lines), sharey=True)
        low, high = min(m.min() for m in matrices), max(m.max() for m in matrices)
        image = None
        for axes, line, matrix in zip(panels, lines, matrices, strict=True):
            image = axes.imshow(matrix, vmin=low, vmax=high, cmap="viridis", extent=(0.5, size + 0.5, size + 0.5, 0.5))
            axes.set_title(line.label)
            axes.set_xlabel("judged on task")
            _tasks(axes, size)
            if size <= 12:
                for (i, j), value in np.ndenumerate(matrix):
                    dark = value < low + 0.6 * (high - low)
                    axes.text(
                        j + 1,
                        i + 1,
                        f"{value:.0f}",
                        ha="center",
                        va="center",
                        fontsize=6.5,
                        color="white" if dark else "black",
                    )
        panels[0].set_ylabel("after learning task")
        panels[0].set_yticks(panels[0].get_xticks())
        assert image is not None
        figure.colorbar(image, ax=panels, label="accuracy, %", shrink=0.75)
        return _address(figure)


def forgetting_curves(summary: Summary) -> str:
    """Accuracy on a task against the number of tasks learnt since, mean over tasks; smoothed beliefs beside."""
    size = summary.settings.tasks
    with mpl.rc_context(STYLE):
        figure, (left, right) = _figure(3.5, 2, sharey=True)
        for line in summary.lines:
            if not line.has_matrix:
                continue
            matrices = summary.matrix(line)
            ages = [[np.mean([m[j + age, j] for j in range(size - age)]) for age in range(size)] for m in matrices]
            _band(left, range(size), np.array(ages), COLOURS[line.label], line.label)
            _band(right, range(1, size + 1), matrices[:, -1, :], COLOURS[line.label], line.label)
        smoother = _line(summary, "smoother")
        assert smoother is not None
        smoothed = summary.by_task(smoother, SMOOTHED, "accuracy")
        colour = COLOURS[smoother.label]
        # the tasks that are at least so old when the stream ends
        old = [[np.mean(values[: size - age]) for age in range(size)] for values in smoothed]
        _band(left, range(size), np.array(old), colour, "smoothed belief of the task", "s--")
        _band(right, range(1, size + 1), smoothed, colour, "smoothed belief of the task", "s--")
        left.set_title("Accuracy on a task, some tasks later")
        left.set_xlabel("tasks learnt since")
        left.set_xticks(range(0, size, max(math.ceil(size / 12), 1)))
        left.set_ylabel("accuracy, %")
        left.legend()
        right.set_title("Accuracy at the end of the stream")
        right.set_xlabel("task")
        _tasks(right, size)
        return _address(figure)


def views_by_task(summary: Summary) -> str:
    """Belief t on task t, right after learning and smoothed, for every task."""
    size = summary.settings.tasks
    with mpl.rc_context(STYLE):
        figure, (axes, gain) = _figure(3.4, 2)
        shown = [("fine-tuning", LEARNT), ("chosen filter", LEARNT), ("smoother", SMOOTHED)]
        found: dict[str, np.ndarray] = {}
        for label, view in shown:
            line = _line(summary, label)
            assert line is not None
            found[label] = summary.by_task(line, view, "accuracy")
            _band(
                axes,
                range(1, size + 1),
                found[label],
                COLOURS[label],
                label if view == SMOOTHED else f"{label}, {view}",
            )
        axes.set_title("Each task by its own belief")
        axes.set_xlabel("task")
        axes.set_ylabel("accuracy, %")
        _tasks(axes, size)
        axes.legend(loc="lower right")
        difference = found["smoother"] - found["chosen filter"]
        gain.axhline(0, color="#444444", linewidth=1)
        _band(gain, range(1, size + 1), difference, GREEN, "")
        gain.set_title("Gained by smoothing")
        gain.set_xlabel("task")
        gain.set_ylabel("percentage points")
        _tasks(gain, size)
        return _address(figure)


def evidence(summary: Summary) -> str:
    """Log evidence of the candidates: along the noise by place, and kernel by kernel, every seed a dot."""
    reference = STATIC if any(k.name == STATIC for k in summary.kernels) else summary.kernels[0].name
    seeds = range(summary.seeds)
    gaps = {
        k.name: np.array([summary.evidence(s, k.name) - summary.evidence(s, reference) for s in seeds])
        for k in summary.kernels
    }
    with mpl.rc_context(STYLE):
        figure, (left, right) = _figure(0.9 + 0.32 * max(len(gaps), 7), 2)
        _profile(left, summary, gaps, reference)
        order = sorted(gaps, key=lambda name: np.nanmean(gaps[name]))
        for place, name in enumerate(order):
            right.plot(gaps[name], np.full(len(gaps[name]), place), "o", color=SKY, alpha=0.75)
            right.plot(np.mean(gaps[name]), place, "|", color="black", markersize=14, markeredgewidth=2)
        right.set_yticks(range(len(order)), order)
        right.axvline(0, color="#444444", linewidth=1)
        right.set_title("All candidates (bar: mean)")
        right.set_xlabel(f"log evidence less that of {reference}, nats")
        return _address(figure)


def _profile(axes: Axes, summary: Summary, gaps: Mapping[str, np.ndarray], reference: str) -> None:
    lines = {"all": BLUE, "first": ORANGE, "last": GREEN}
    smallest = min((max(k.noise) for k in summary.kernels if max(k.noise) > 0), default=0.1)
    still = smallest / 10  # where noise 0 stands on a logarithmic axis
    drawn = False
    for place, colour in lines.items():
        points = sorted((max(k.noise), k.name) for k in summary.kernels if _is_walk_of(k, place))
        if not points:
            continue
        drawn = True
        x = [q for q, _ in points]
        values = np.stack([gaps[name] for _, name in points], axis=1)
        if reference == STATIC:
            x, values = [still, *x], np.concatenate([np.zeros((len(values), 1)), values], axis=1)
        for row in values:
            axes.plot(x, row, "-", color=colour, alpha=0.3, linewidth=0.9)
        name = {"all": "all weights"}.get(place, f"{place} layer")
        axes.plot(x, np.mean(values, axis=0), "o-", color=colour, label=name)
    axes.axhline(0, color="#444444", linewidth=1)
    axes.set_title("Along the noise (thin: seeds)")
    axes.set_xlabel("variance of one step, q")
    axes.set_ylabel(f"log evidence less that of {reference}, nats")
    if drawn:
        axes.set_xscale("log")
        largest = max(max(k.noise) for k in summary.kernels)
        ticks = [10.0**e for e in range(math.floor(math.log10(smallest)), math.ceil(math.log10(largest)) + 1)]
        axes.set_xticks(
            [still, *[t for t in ticks if t > still * 1.5]], ["0", *[f"{t:g}" for t in ticks if t > still * 1.5]]
        )
        axes.minorticks_off()
        axes.legend()


def _is_walk_of(kernel: Kernel, place: str) -> bool:
    return kernel.name.startswith(f"{place}=") and "+" not in kernel.name


def calibration(filtered: Sequence[Arrays], tuned: Sequence[Arrays], joint: Sequence[Arrays]) -> str:
    """Reliability diagrams over the test examples of all tasks and seeds."""

    def pooled(arrays: Sequence[Arrays], name: str) -> tuple[np.ndarray, np.ndarray]:
        values = np.concatenate([a[name].reshape(-1, a[name].shape[-1]) for a in arrays])
        return values, np.concatenate([a["y"] for a in arrays])

    panels = {
        "At the mean weights": [
            ("fine-tuning, just learnt", ORANGE, pooled(tuned, "at_mean")),
            ("filter, just learnt", BLUE, pooled(filtered, f"{LEARNT} at_mean")),
            ("smoother", GREEN, pooled(filtered, f"{SMOOTHED} at_mean")),
            ("joint training, last", PURPLE, pooled(joint, "at_mean")),
        ],
        "Averaged over the belief": [
            ("filter, just learnt", BLUE, pooled(filtered, f"{LEARNT} averaged")),
            ("smoother", GREEN, pooled(filtered, f"{SMOOTHED} averaged")),
            ("filter, last", SKY, pooled(filtered, f"{LAST} averaged")),
        ],
    }
    with mpl.rc_context(STYLE):
        figure, axes = _figure(4.4, 2, sharey=True)
        for panel, (title, curves) in zip(axes, panels.items(), strict=True):
            panel.plot([0, 1], [0, 1], color="#444444", linewidth=1, linestyle=":")
            for label, colour, (probabilities, labels) in curves:
                bins = reliability(probabilities, labels)
                enough = bins.count >= 0.002 * np.sum(bins.count)  # fewer examples say nothing
                panel.plot(bins.confidence[enough], bins.accuracy[enough], "o-", color=colour, label=label)
            panel.set_title(title)
            panel.set_xlabel("confidence")
            panel.set_xlim(0, 1)
            panel.set_ylim(0, 1.02)
            panel.set_aspect("equal")
            panel.legend(loc="lower right")
            panel.text(0.04, 0.93, "too cautious", color="#777777", fontsize=9)
        axes[0].set_ylabel("accuracy")
        return _address(figure)


def examples(arrays: Arrays) -> str:
    """Test images with their predictive class probabilities: the most certain above, the least certain below."""
    x, y, probabilities = arrays["shown x"], arrays["shown y"], arrays["shown probabilities"]
    side = math.isqrt(x.shape[1])
    half = len(x) // 2
    with mpl.rc_context(WITHOUT_GRID):
        figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
        grid = figure.subplots(4, half, gridspec_kw={"height_ratios": [1.25, 1, 1.25, 1]}, squeeze=False)
        for n in range(len(x)):
            row, column = 2 * (n // half), n % half
            picture, bars = grid[row, column], grid[row + 1, column]
            picture.imshow(x[n].reshape(side, side), cmap="gray_r", interpolation="nearest")
            picture.set_axis_off()
            guess = int(probabilities[n].argmax())
            right = guess == y[n]
            picture.set_title(
                f"{y[n]}, predicted {guess}", fontsize=9, color="#222222" if right else "#B00000", loc="center"
            )
            colours = [
                GREEN if k == y[n] else "#B00000" if k == guess else "#bbbbbb" for k in range(probabilities.shape[1])
            ]
            bars.bar(range(probabilities.shape[1]), probabilities[n], color=colours)
            bars.set_ylim(0, 1)
            bars.set_xticks(range(probabilities.shape[1]))
            bars.tick_params(labelsize=7.5, length=0)
            bars.set_yticks([0, 1] if column == 0 else [])
            bars.text(
                0.02,
                0.9,
                f"epistemic {arrays['shown epistemic'][n]:.2f}",
                transform=bars.transAxes,
                fontsize=7.5,
                color="#555555",
            )
        grid[1, 0].set_ylabel("most certain")
        grid[3, 0].set_ylabel("least certain")
        return _address(figure)
