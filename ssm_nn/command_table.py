"""The tables that ``ssm-nn run`` prints."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ssm_nn.command_evaluate import LAST, LEARNT, SMOOTHED
from ssm_nn.command_summary import Summary, shown

__all__ = ["print_summary"]


def print_summary(console: Console, summary: Summary) -> None:
    """Accuracy in the three views, calibration, and what the evidence chose."""
    s = summary.settings
    spread = f", mean ± sd of {summary.seeds} seeds" if summary.seeds > 1 else ", one seed"
    console.print()
    console.print(_accuracy(summary, f"Accuracy, % (mean of {s.tasks} tasks{spread})"))
    console.print()
    console.print(_calibration(summary, f"Predicted probabilities (mean of {s.tasks} tasks{spread})"))
    console.print(Text("At the belief's mean weights, and averaged over the belief (linearised network)."))
    console.print()
    console.print(Text(summary.evidence_sentence()))
    for sentence in summary.warnings[:5]:
        console.print(Text(f"Warning: {sentence}", style="yellow"))
    if len(summary.warnings) > 5:
        console.print(Text(f"... and {len(summary.warnings) - 5} more warnings, see the report.", style="yellow"))


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", box=box.HORIZONTALS, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
    )


def _accuracy(summary: Summary, title: str) -> Table:
    table = _table(title)
    table.add_column("", no_wrap=True)
    for heading in ("just\nlearnt", "smoothed\n", "last, on\nall tasks", "forgetting\n", "log\nevidence"):
        table.add_column(heading, justify="right", no_wrap=True)
    for line in summary.lines:
        cells = [
            shown(summary.spread(line, view, "accuracy") if view in line.views else None, ".1f", 100)
            for view in (LEARNT, SMOOTHED, LAST)
        ]
        cells += [
            shown(summary.forgetting(line), ".1f", 100),
            shown(summary.log_evidence(line), ".1f"),
        ]
        table.add_row(line.label, *cells)
    return table


def _calibration(summary: Summary, title: str) -> Table:
    table = _table(title)
    table.add_column("", no_wrap=True)
    table.add_column("judged", no_wrap=True)
    for heading in ("NLL at\nthe mean", "NLL\naveraged", "ECE at\nthe mean", "ECE\naveraged"):
        table.add_column(heading, justify="right", no_wrap=True)
    for line in summary.lines:
        for view in line.views:
            cells = [
                shown(summary.spread(line, view, metric), ".2f")
                for metric in ("nll", "nll_averaged", "ece", "ece_averaged")
            ]
            table.add_row(line.label, view, *cells)
    return table
