"""The last-layer benchmark's rows as one line a size and method, and as a picture."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MEASURES = ("accuracy", "nll", "nll_probit", "total_variation", "seconds")


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means and standard deviations over seeds, in the order in which the methods first stand in the rows.

    ``excess`` is the mean NLL above the refit's in per cent, ``beats_published`` the share of seeds in which the NLL is below
    that of the published rule with gamma 10.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["data"], row["base"], row["new"], row["method"]].append(row)

    def by_seed(key: tuple[Any, ...], method: str) -> dict[int, float]:
        return {row["seed"]: row["nll"] for row in groups[*key[:3], method]}

    lines = []
    for key in sorted(groups, key=lambda k: k[:3]):
        own = groups[key]
        mine, refit, rule = by_seed(key, key[3]), by_seed(key, "refit"), by_seed(key, "published 10")
        line = dict(zip(("data", "base", "new", "method"), key, strict=True)) | {"seeds": len(own)}
        for measure in MEASURES:
            values = [row[measure] for row in own]
            line[measure] = float(np.mean(values))
            line[measure + "_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
        line["excess"] = 100 * float(np.mean([mine[s] / refit[s] - 1 for s in mine]))
        line["beats_published"] = float(np.mean([mine[s] < rule[s] for s in mine]))
        lines.append(line)
    return lines


def draw(path: Path, lines: list[dict[str, Any]]) -> None:
    """NLL above the refit's over the number of new points: a panel a data set and number of points before."""
    shown = [line for line in lines if line["method"] not in ("refit", "reweighting")]
    panels = sorted({(line["data"], line["base"]) for line in shown})
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3.4), squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels, strict=True):
        own = [line for line in shown if (line["data"], line["base"]) == panel]
        for method in dict.fromkeys(line["method"] for line in own):
            curve = [line for line in own if line["method"] == method]
            axis.plot([c["new"] for c in curve], [c["excess"] for c in curve], marker="o", markersize=3, label=method)
        axis.set(title=f"{panel[0]}, {panel[1]} before", xscale="log", xlabel="new points")
        axis.set_yscale("symlog", linthresh=1.0)
        axis.axhline(2.0, color="grey", linewidth=0.8, linestyle=":")
    axes[0, 0].set_ylabel("NLL above the refit's, %")
    axes[0, -1].legend(fontsize=6)
    figure.savefig(path, dpi=110)
    plt.close(figure)
