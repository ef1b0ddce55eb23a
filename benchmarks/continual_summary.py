"""Tables of a scenario: every judgement as CSV, and each method in one line, mean and spread over seeds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
from continual_cells import AFTER, BEFORE, SMOOTHED, digest_of
from csv_files import read_csv, write_csv

from ssm_nn.inference.metrics import forgetting

MEASURES = {
    "average": "accuracy of the last belief, mean over all tasks",
    "learnt": "accuracy on each task right after it",
    "forgetting": "loss of accuracy since a task's best",
    "before": "accuracy on each task before its data, the first left out",
    "smoothed": "accuracy on each task given all tasks",
    "missing_gap": "smoothed accuracy on the task without data less its neighbours' mean",
    "learnt_nll": "NLL on each task right after it, nats an example",
    "smoothed_nll": "NLL on each task given all tasks",
    "smoothing_gains": "tasks but the last whose NLL smoothing lowers",
    "log_evidence": "sum over tasks, nats",
    "seconds": "a task, median; the first ones compile",
    "ratio": "seconds over those of fine-tuning at the same seed",
    "numbers": "kept after the last task",
}
CELL = ("scenario", "method", "strength_name", "strength", "learning_rate", "seed")


def cell_columns(cell: dict[str, Any]) -> dict[str, Any]:
    """What names a cell in every table."""
    named = {name: cell["settings"][name] for name in CELL if name != "strength_name"}
    return {**named, **_word(cell), "settings": digest_of(cell["settings"])}


def _word(cell: dict[str, Any]) -> dict[str, str]:
    return {"strength_name": cell["strength_name"]}


def measures_of(cell: dict[str, Any]) -> dict[str, float]:
    """The measures of one cell but for the ratio; nan where the cell has none."""
    accuracy: dict[str, dict[tuple[int, int], float]] = defaultdict(dict)
    nll: dict[str, dict[tuple[int, int], float]] = defaultdict(dict)
    for row in cell["scores"]:
        at = (row["learnt"], row["tested"])
        accuracy[row["view"]][at], nll[row["view"]][at] = row["accuracy"], row["nll"]
    last = max(learnt for view in accuracy.values() for learnt, _ in view)
    after, learnt = accuracy[AFTER], [t for t in range(last + 1) if (t, t) in accuracy[AFTER]]
    every = [(last, t) for t in range(last + 1)]
    judged_all = all(at in after for at in every)
    whole = all((i, j) in after for i in range(last + 1) for j in range(i + 1))
    trained_each = len(learnt) == last + 1
    earlier = [t for t in range(last) if (last, t) in nll[SMOOTHED]]
    return {
        "average": float(np.mean([after[at] for at in every])) if judged_all else math.nan,
        "learnt": _mean(after[t, t] for t in learnt if trained_each),
        "forgetting": forgetting(matrix_of(after, last)) if whole else math.nan,
        "before": _mean(accuracy[BEFORE].values()),
        "smoothed": _mean(accuracy[SMOOTHED].values()),
        "missing_gap": _missing_gap(accuracy[SMOOTHED], last) if "middle_missing" in cell["settings"] else math.nan,
        "learnt_nll": _mean(nll[AFTER][t, t] for t in learnt if trained_each),
        "smoothed_nll": _mean(nll[SMOOTHED].values()),
        "smoothing_gains": float(sum(nll[SMOOTHED][last, t] < nll[AFTER][t, t] for t in earlier))
        if earlier
        else math.nan,
        "log_evidence": float(np.sum([row["log_evidence"] for row in cell["tasks"]])),
        "seconds": float(np.median([row["seconds"] for row in cell["tasks"]])),
        "numbers": float(cell["tasks"][-1]["numbers"]),
    }


def _missing_gap(smoothed: dict[tuple[int, int], float], last: int) -> float:
    """Smoothed accuracy on the task in the middle, which had no data, less its neighbours' mean."""
    middle = (last + 1) // 2
    if (last, middle) not in smoothed:
        return math.nan
    return smoothed[last, middle] - (smoothed[last, middle - 1] + smoothed[last, middle + 1]) / 2


def matrix_of(after: dict[tuple[int, int], float], last: int) -> np.ndarray:
    """A (T, T), nan above the diagonal."""
    matrix = np.full((last + 1, last + 1), np.nan)
    for (i, j), value in after.items():
        matrix[i, j] = value
    return matrix


def summary_of(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a method in the order of ``cells``: its strength, number of seeds, mean and standard deviation of each measure."""
    measured = {(cell["settings"]["method"], cell["settings"]["seed"]): measures_of(cell) for cell in cells}
    plain = {seed: found["seconds"] for (method, seed), found in measured.items() if method == "fine-tuning"}
    for (_, seed), found in measured.items():
        found["ratio"] = found["seconds"] / plain[seed] if seed in plain else math.nan
    named = {cell["settings"]["method"]: cell for cell in cells}
    lines = []
    for method, cell in named.items():
        own = [found for (name, _), found in measured.items() if name == method]
        line = {**cell_columns(cell), "seeds": len(own)}
        del line["seed"], line["settings"]
        for measure in MEASURES:
            values = [found[measure] for found in own]
            line[measure] = float(np.mean(values))
            line[measure + "_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
        lines.append(line)
    return lines


def write_tables(folder: Path, scenario: str, cells: Sequence[dict[str, Any]], here: Set[str]) -> list[dict[str, Any]]:
    """``<scenario>.csv`` (judgements), ``<scenario>-tasks.csv`` and ``<scenario>-summary.csv``; the summary's lines.

    Args:
        here: methods that were run here; the others keep the ratio of their own run. Beside a fine-tuning that was not, there
            is none.
    """
    lines = summary_of(cells)
    before = {row["method"]: row for row in read_csv(folder / f"{scenario}-summary.csv")}
    for line in lines:
        old = before.get(line["method"], {}) if line["method"] not in here else {}
        if line["method"] not in here or "fine-tuning" not in here:
            line |= {name: float(old.get(name) or "nan") for name in ("ratio", "ratio_sd")}
    write_csv(folder / f"{scenario}.csv", (cell_columns(c) | row for c in cells for row in c["scores"]))
    write_csv(folder / f"{scenario}-tasks.csv", (cell_columns(c) | row for c in cells for row in c["tasks"]))
    write_csv(folder / f"{scenario}-summary.csv", lines)
    return lines


def recorded_cells(folder: Path, scenario: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The cells behind the tables that lie in a folder, each with the digest of its settings, of which it has some."""
    cells: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {}
    for table, part in ((f"{scenario}.csv", "scores"), (f"{scenario}-tasks.csv", "tasks")):
        for row in read_csv(folder / table):
            named = {name: row.pop(name) for name in CELL}
            settings = {"method": named["method"], "seed": int(named["seed"])}
            settings |= {name: float(named[name]) for name in ("strength", "learning_rate")}
            new = {"settings": settings, "strength_name": named["strength_name"], "scores": [], "tasks": []}
            _, cell = cells.setdefault((named["method"], named["seed"]), (row.pop("settings", ""), new))
            cell[part].append({name: _number(name, text) for name, text in row.items() if name != "settings"})
    yield from cells.values()


def _number(name: str, text: str) -> Any:
    if name == "view":
        return text
    return int(text) if name in ("learnt", "tested", "task", "numbers") else float(text or "nan")


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return float(np.mean(listed)) if listed else math.nan
