"""What a sweep's finished cells say: sweep.csv, a line for every cell and method; sweep.svg; and the table that is printed."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from ssm_nn.command_cells import cells_of, combinations, is_finished, varied
from ssm_nn.command_evaluate import LAST, LEARNT, SMOOTHED
from ssm_nn.command_figures import COLOURS, STYLE, WIDTH
from ssm_nn.command_summary import Spread, Summary, shown
from ssm_nn.inference.checkpoints import replacing

__all__ = ["print_table", "write_table"]

Line = dict[str, Any]
_MEASURES = {
    "accuracy learnt": (LEARNT, "accuracy"),
    "accuracy smoothed": (SMOOTHED, "accuracy"),
    "accuracy last": (LAST, "accuracy"),
    "nll learnt": (LEARNT, "nll"),
    "nll smoothed": (SMOOTHED, "nll"),
    "nll last": (LAST, "nll"),
}


def write_table(sweep: Path) -> list[Line]:
    """Write sweep.csv and sweep.svg of what is finished, and return the lines: spreads over a cell's seeds by measure."""
    summaries = [(cell.path.name, Summary(cell)) for cell in cells_of(sweep) if is_finished(cell)]
    settings = [summary.settings for _, summary in summaries]
    names = varied(settings)
    lines: list[Line] = []
    for (cell, summary), values in zip(summaries, combinations(names, settings), strict=True):
        for line in summary.lines:
            spreads: dict[str, Spread | None] = {
                measure: summary.spread(line, view, metric) if view in line.views else None
                for measure, (view, metric) in _MEASURES.items()
            }
            spreads |= {"forgetting": summary.forgetting(line), "log evidence": summary.log_evidence(line)}
            named = dict(zip(names, values, strict=True))
            lines.append({"cell": cell, "settings": named, "method": line.label, "spreads": spreads})
    lines.sort(key=lambda line: [_sortable(value) for value in line["settings"].values()])
    with replacing(sweep / "sweep.csv") as file:
        file.write(_csv(lines, names).encode())
    if lines:
        with replacing(sweep / "sweep.svg") as file:
            _figure(lines).savefig(file, format="svg", metadata={"Date": None})
    return lines


def print_table(console: Console, lines: list[Line]) -> None:
    """A row a cell: its chosen filter and smoother."""
    if not lines:
        console.print("No cell is finished yet.")
        return
    table = Table(box=box.HORIZONTALS, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in lines[0]["settings"]:
        table.add_column(f"{name.replace('_', '-')}\n")
    headings = ("just\nlearnt, %", "smoothed,\n%", "last, on\nall tasks, %", "forgetting,\npoints", "log\nevidence")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for by_method in _by_cell(lines):
        chosen, smoother = by_method["chosen filter"]["spreads"], by_method["smoother"]["spreads"]
        table.add_row(
            *by_method["smoother"]["settings"].values(),
            shown(chosen["accuracy learnt"], ".1f", 100),
            shown(smoother["accuracy smoothed"], ".1f", 100),
            shown(chosen["accuracy last"], ".1f", 100),
            shown(chosen["forgetting"], ".1f", 100),
            shown(chosen["log evidence"], ".1f"),
        )
    console.print(table)


def _by_cell(lines: list[Line]) -> list[dict[str, Line]]:
    found: dict[str, dict[str, Line]] = {}
    for line in lines:
        found.setdefault(line["cell"], {})[line["method"]] = line
    return list(found.values())


def _csv(lines: list[Line], names: list[str]) -> str:
    text = io.StringIO()
    measures = (*_MEASURES, "forgetting", "log evidence")
    columns = [f"{measure}{ending}".replace(" ", "_") for measure in measures for ending in ("", "_sd")]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["cell", *names, "method", *columns])
    for line in lines:
        spreads = [line["spreads"][measure] for measure in measures]
        numbers = [
            "" if number is None or math.isnan(number) else number
            for spread in spreads
            for number in ((spread.mean, spread.sd) if spread is not None else (None, None))
        ]
        writer.writerow([line["cell"], *line["settings"].values(), line["method"], *numbers])
    return text.getvalue()


def _sortable(value: str) -> tuple[float, str]:
    try:
        return float(value), ""
    except ValueError:
        return math.inf, value


def _figure(lines: list[Line]) -> Figure:
    """A row a cell: accuracy of each task by its own belief, and of the last belief on all tasks."""
    cells = _by_cell(lines)
    named = [", ".join(f"{name} {value}" for name, value in next(iter(c.values()))["settings"].items()) for c in cells]
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.8 + 0.42 * len(cells)), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        panels = {
            "Each task by its own belief": (
                ("fine-tuning", "accuracy learnt"),
                ("chosen filter", "accuracy learnt"),
                ("smoother", "accuracy smoothed"),
            ),
            "All tasks by the last belief": (
                ("fine-tuning", "accuracy last"),
                ("chosen filter", "accuracy last"),
                ("joint training", "accuracy last"),
            ),
        }
        for ax, (title, shown_) in zip(axes, panels.items(), strict=True):
            for offset, (method, measure) in zip((-0.18, 0.0, 0.18), shown_, strict=True):
                spreads = [cell[method]["spreads"][measure] for cell in cells]
                ax.errorbar(
                    [100 * spread.mean for spread in spreads],
                    [row + offset for row in range(len(cells))],
                    xerr=[0.0 if math.isnan(spread.sd) else 100 * spread.sd for spread in spreads],
                    fmt="o",
                    color=COLOURS[method],
                    label=method,
                )
            ax.set_title(title)
            ax.set_xlabel("accuracy, %")
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.55 / (0.3 + 0.42 * len(cells))), ncols=3)
        axes[0].set_yticks(range(len(cells)), named)
        axes[0].invert_yaxis()
    return figure
