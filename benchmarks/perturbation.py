"""Low-rank perturbation beside its baselines, task-incremental, over orders and seeds.

    uv run python benchmarks/perturbation.py [SCENARIO ...] [--quick] [--methods ...] [--orders 0 1] [--seeds 0 1 2]
        [--examples 6000] [--first 2] [--out ...]

A cell is one method on one scenario, order and seed. Finished cells lie in ``<out>/cells`` and are not run again; a begun
one goes on after its last whole task. The method ``allocations`` compares the two rules at equal parameters. Tables and
pictures are made of all finished cells.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from csv_files import write_csv
from matplotlib.figure import Figure
from perturbation_cells import ALLOCATIONS, Cells, run_cell
from perturbation_scenarios import SCENARIOS, Scenario
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from ssm_nn.inference.metrics import order_disparity

BEYOND_TRAINING = ("factors", "svd", "quadratic")  # phases of a task; the others fit
OUT = Path(__file__).parent / "results" / "perturbation"


def main(arguments: list[str] | None = None) -> None:
    """Run what is asked for, and write its tables."""
    parser = argparse.ArgumentParser(description="Low-rank perturbation beside its baselines.")
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"any of {', '.join(SCENARIOS)}")
    parser.add_argument(
        "--quick", action="store_true", help="three small tasks, one epoch, one seed: checks that it runs"
    )
    parser.add_argument("--methods", nargs="+", help="only these; also allocations")
    parser.add_argument("--orders", type=int, nargs="+", help="numbers of orders (default: the scenario's)")
    parser.add_argument("--seeds", type=int, nargs="+", help="default 0 1 2; quick: 0")
    parser.add_argument("--examples", type=int, help="training examples a task (default: the scenario's)")
    parser.add_argument("--first", type=int, help="learn only so many tasks of the sequence")
    parser.add_argument("--out", type=Path, help=f"folder of the results (default {OUT.name}, quick: {OUT.name}/quick)")
    parsed = parser.parse_args(arguments)
    for name in parsed.scenarios:
        if name not in SCENARIOS:
            parser.error(f"scenario is {name!r}; accepted are {', '.join(SCENARIOS)}")
    for name in ("examples", "first"):
        if (number := getattr(parsed, name)) is not None and number < 1:
            parser.error(f"{name} is {number}; a whole number >= 1 is accepted")
    names = parsed.scenarios or ["permuted-mnist"]
    scenarios = [SCENARIOS[name].quick() if parsed.quick else SCENARIOS[name] for name in names]
    if parsed.examples is not None or parsed.first is not None:
        scenarios = [scenario.smaller(parsed.examples, parsed.first) for scenario in scenarios]
    for scenario in scenarios:
        for method in parsed.methods or []:
            if method not in (*scenario.methods, ALLOCATIONS):
                parser.error(f"method is {method!r}; accepted are {', '.join(scenario.methods)}, {ALLOCATIONS}")
    seeds = parsed.seeds or ([0] if parsed.quick else [0, 1, 2])
    out = parsed.out or (OUT / "quick" if parsed.quick else OUT)
    run(scenarios, parsed.methods, parsed.orders, seeds, out, Console())


def run(
    scenarios: list[Scenario],
    only: list[str] | None,
    orders: list[int] | None,
    seeds: list[int],
    out: Path,
    console: Console,
) -> list[list[dict[str, Any]]]:
    """All cells, then the tables of each scenario: the lines of their summaries."""
    cells, summaries = Cells(out / "cells"), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for scenario in scenarios:
            # seeds first, so that an early stop leaves whole comparisons
            plan = [
                (seed, order, method)
                for seed in seeds
                for order in (range(scenario.num_orders) if orders is None else orders)
                for method in (only or scenario.methods)
            ]
            bar, tasks = progress.add_task(scenario.name, total=len(plan)), progress.add_task("tasks")
            for seed, order, method in plan:
                words = f"{method} order {order} seed {seed}"
                report = partial(_report, progress, tasks, words)

                run_cell(cells, scenario, method, order, seed, report)
                jax.clear_caches()  # the next cell has another network
                progress.advance(bar)
            summaries.append(summarise(cells, scenario, out, console))
    return summaries


def _report(progress: Progress, bar: TaskID, words: str, done: int, total: int) -> None:
    progress.update(bar, description=words, completed=done, total=total)


def summarise(cells: Cells, scenario: Scenario, out: Path, console: Console) -> list[dict[str, Any]]:
    """``<scenario>.csv``, a line a method, ``<scenario>-tasks.csv`` and the pictures; the lines."""
    finished = [cell for cell in cells.finished(scenario) if cell["settings"]["method"] != ALLOCATIONS]
    compared = [cell for cell in cells.finished(scenario) if cell["settings"]["method"] == ALLOCATIONS]
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for method in scenario.methods:
        own = [cell for cell in finished if cell["settings"]["method"] == method]
        if own:
            lines.append({"method": method, **_line(own)})
    if lines:
        write_csv(out / f"{scenario.name}.csv", lines)
        write_csv(out / f"{scenario.name}-tasks.csv", [_flat(cell, row) for cell in finished for row in cell["tasks"]])
        _draw(out / f"{scenario.name}.png", scenario, finished)
        table = Table(title=scenario.name)
        for name in lines[0]:
            table.add_column(name, justify="left" if name == "method" else "right")
        for line in lines:
            table.add_row(*(v if isinstance(v, str) else f"{v:.4g}" for v in line.values()))
        console.print(table)
    if compared:
        rows = [_flat(cell, row) for cell in compared for row in cell["tasks"]]
        write_csv(out / f"{scenario.name}-allocations.csv", rows)
        for name, words in (("exact", "exact allocation"), ("set", "its choice of a set alone")):
            gain = np.array([row["paper_truncated_nll"] - row[f"{name}_truncated_nll"] for row in rows])
            console.print(
                f"{scenario.name}: {words} lowers the NLL after truncation in {np.sum(gain > 0)} of {len(gain)} tasks, "
                f"equals it in {np.sum(gain == 0)} (mean {gain.mean():.4f} ± {gain.std():.4f} nats)"
            )
        tuned = np.array([row["paper_nll"] - row["exact_nll"] for row in rows])
        console.print(f"{scenario.name}: after fine-tuning by {tuned.mean():.4f} ± {tuned.std():.4f}")
    return lines


def _line(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over cells with the spread of the accuracy; disparities over orders, averaged over seeds."""
    accuracy = [np.mean([row["accuracy"] for row in cell["tasks"]]) for cell in cells]
    learnt = [[row.get("learnt_accuracy", np.nan) - row["accuracy"] for row in cell["tasks"][:-1]] for cell in cells]
    disparities = []
    for seed in sorted({cell["settings"]["seed"] for cell in cells}):
        own = [cell for cell in cells if cell["settings"]["seed"] == seed]
        if len(own) > 1:
            tables = [[row["accuracy"] for row in sorted(cell["tasks"], key=lambda row: row["task"])] for cell in own]
            found = order_disparity(np.array(tables))
            disparities.append(tuple(found[:2]))
    aopd, mopd = np.mean(disparities, axis=0) if disparities else (np.nan, np.nan)

    def mean(name: str) -> float:
        return float(np.mean([row[name] for cell in cells for row in cell["tasks"]]))

    def middle(name: str) -> float:
        """Median over tasks, but for those that compile; joint training has no CPU seconds."""
        return float(np.median([row.get(name, np.nan) for cell in cells for row in cell["tasks"][2:] or cell["tasks"]]))

    return {
        "cells": len(cells),
        "examples": cells[0]["settings"]["common"]["budget"]["examples"] or "all",
        "tasks": len(cells[0]["tasks"]),
        "accuracy": float(np.mean(accuracy)),
        "accuracy_sd": float(np.std(accuracy, ddof=1)) if len(cells) > 1 else np.nan,
        "forgetting": float(np.mean(learnt)) if len(cells[0]["tasks"]) > 1 else np.nan,
        "nll": mean("nll"),
        "ece": mean("ece"),
        "growth": float(np.mean([cell["tasks"][-1]["growth"] for cell in cells])),
        "aopd": float(aopd),
        "mopd": float(mopd),
        "seconds": middle("seconds"),
        "cpu_seconds": middle("cpu_seconds"),
        "beyond_training": _beyond_training(cells),
    }


def _beyond_training(cells: list[dict[str, Any]]) -> float:
    """Share of a task's wall time for factors, directions and quadratic: the median, as of the seconds."""
    phases = [row["phases"] for cell in cells for row in cell["tasks"][2:] if "svd" in row.get("phases", ())]
    shares = [sum(p[name] for name in BEYOND_TRAINING) / sum(p.values()) for p in phases]
    return float(np.median(shares)) if shares else np.nan


def _flat(cell: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    named = {name: cell["settings"][name] for name in ("scenario", "method", "order", "seed")}
    flat = {name: value for name, value in row.items() if not isinstance(value, dict)}
    nested = {f"{k}_{n}": v for k, value in row.items() if isinstance(value, dict) for n, v in value.items()}
    return named | flat | nested


def _draw(path: Path, scenario: Scenario, cells: list[dict[str, Any]]) -> None:
    """Accuracy of each task in the order in which it came, growth, and the ranks of each layer."""
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    accuracy, growth, ranks = figure.subplots(1, 3)
    colours = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    methods = [m for m in scenario.methods if any(c["settings"]["method"] == m for c in cells)]
    with_ranks = next((m for m in ("perturbation", "initial", *methods) if m in methods), None)
    for number, method in enumerate(methods):
        own = [cell["tasks"] for cell in cells if cell["settings"]["method"] == method]
        for axis, name in ((accuracy, "accuracy"), (growth, "growth")):
            values = np.array([[row[name] for row in tasks] for tasks in own])
            where = np.arange(1, values.shape[1] + 1)
            axis.plot(where, values.mean(0), color=colours[number % 20], label=method, marker=".")
            axis.fill_between(where, values.min(0), values.max(0), color=colours[number % 20], alpha=0.15, linewidth=0)
        if method == with_ranks:
            kept = [row["ranks"] for tasks in own for row in tasks if row.get("ranks")]
            bins = np.linspace(0, max((rank for row in kept for rank in row.values()), default=0) + 1, 26)
            for layer in kept[0] if kept else ():  # one set of bins: a layer may have one rank in all tasks
                ranks.hist([row[layer] for row in kept], bins=bins, alpha=0.6, label=layer)
    accuracy.set(title="accuracy of each task, at the end", xlabel="task")
    growth.set(title="growth", xlabel="task", yscale="symlog")
    ranks.set(title=f"ranks, {with_ranks}", xlabel="rank", ylabel="tasks")
    for axis in (accuracy, ranks):
        axis.legend(fontsize="x-small", frameon=False)
    figure.suptitle(scenario.name)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    warnings.simplefilter("once")
    sys.exit(main())
