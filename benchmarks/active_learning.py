"""Active learning on the last layer: strategies beside their look-ahead forms, on ready features.

    uv run python benchmarks/active_learning.py [digits cifar10 dbpedia banking77] [--seeds 10] [--methods ...] [--quick]

A cell is one strategy on one data set at one seed; all strategies of a seed have the same pool, first labels and test points.
Finished cells lie in ``<out>/cells`` and are not run again; an interrupted one goes on after its last whole batch. Tables and
pictures are made of the seeds at which all methods with a cell are finished.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from active_learning_cells import Store, curve_of, run_cell, settings_of
from active_learning_settings import SETTINGS, VALIDATION_SEED, Setting, methods_of
from csv_files import write_csv
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ssm_nn.inference.last_layer.acquisition_curves import (
    LearningCurve,
    curves_datatree,
    paired_difference,
    plot_curves,
)

OUT = Path(__file__).parent / "results" / "active_learning"
SCORES = ("accuracy", "nll", "brier", "ece")
QUICK = {"pool": 120, "num_batches": 2, "test": 100, "draws": 10, "configurations": 16, "probes": 50}
Curves = dict[str, dict[int, LearningCurve]]  # method -> seed -> curve
Lines = list[dict[str, Any]]


def main(arguments: list[str] | None = None) -> None:
    """Run what is asked for, and write its tables."""
    parsed = _parsed(arguments)
    settings = [SETTINGS[name] for name in parsed.settings or SETTINGS]
    out = parsed.out or (OUT / "quick" if parsed.quick else OUT)
    if parsed.quick:
        settings = [replace(setting, **QUICK) for setting in settings]
    run(settings, 2 if parsed.quick and parsed.seeds is None else parsed.seeds or 10, parsed.methods, out, Console())


def run(settings: list[Setting], num_seeds: int, only: list[str] | None, out: Path, console: Console) -> list[Lines]:
    """All cells, seed by seed, then the tables of each data set: the lines of their summaries."""
    store = Store(out / "cells")
    plan = [
        (setting, [m for m in methods_of(setting).values() if only is None or m.name in only]) for setting in settings
    ]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    summaries = []
    with Progress(*columns, console=console) as progress:
        cells = progress.add_task("cells", total=num_seeds * sum(len(methods) for _, methods in plan))
        batches = progress.add_task("batches")
        for setting, methods in plan:
            for seed in range(num_seeds):
                for method in methods:
                    words = f"{setting.name} {method.name} seed {seed}"
                    progress.update(batches, description=words, completed=0, total=setting.num_batches)
                    run_cell(store, setting, method, seed, lambda done, *_: progress.update(batches, completed=done))
                    progress.advance(cells)
            summaries.append(_tables(store, setting, out, console))
    return summaries


def _tables(store: Store, setting: Setting, out: Path, console: Console) -> Lines:
    curves = paired(store, setting)
    if not curves:
        return []
    methods = methods_of(setting)
    lines = []
    for name, own in curves.items():
        plain = methods[name].plain
        line: dict[str, Any] = {"dataset": setting.name, "method": name, "seeds": len(own)}
        for score in SCORES:
            areas = [curve.area(score) for curve in own.values()]
            line[f"area_{score}"] = float(np.mean(areas))
            line[f"area_{score}_sd"] = float(np.std(areas, ddof=1)) if len(areas) > 1 else math.nan
        line["last_accuracy"] = float(np.mean([curve.scores["accuracy"][-1] for curve in own.values()]))
        line["seconds"] = float(np.median(np.concatenate([curve.seconds for curve in own.values()])))
        line |= _compared("random", own, curves.get("random") if name != "random" else None)
        line |= {"plain": plain or ""} | _compared("plain", own, curves.get(plain) if plain else None)
        lines.append(line)
    write_csv(out / f"{setting.name}-summary.csv", lines)
    rows = (
        {"method": name, "seed": seed, "labels": int(count), "seconds": float(curve.seconds[n - 1]) if n else math.nan}
        | {score: float(curve.scores[score][n]) for score in SCORES}
        for name, own in curves.items()
        for seed, curve in own.items()
        for n, count in enumerate(curve.num_labelled)
    )
    write_csv(out / f"{setting.name}.csv", rows)
    _draw(out, setting, curves, lines)
    console.print(_table(setting, lines))
    return lines


def paired(store: Store, setting: Setting) -> Curves:
    """Finished cells of the present methods, at the seeds that all of them have."""
    methods = methods_of(setting)
    found: Curves = {name: {} for name in methods}
    for cell in store.finished(setting):
        name, seed = cell["settings"]["method"], cell["settings"]["seed"]
        if name in methods and cell["settings"]["strategy"] == settings_of(setting, methods[name], seed)["strategy"]:
            found[name][seed] = curve_of(cell)
    found = {name: own for name, own in found.items() if own}
    if not found:
        return {}
    shared = set.intersection(*(set(own) for own in found.values()))
    return {name: {seed: own[seed] for seed in sorted(shared)} for name, own in found.items() if shared}


def _compared(words: str, own: dict[int, LearningCurve], other: dict[int, LearningCurve] | None) -> dict[str, float]:
    """Differences of areas at the same seeds: mean and Student's 95 % interval, of accuracy and of NLL."""
    made = {}
    for score in ("accuracy", "nll"):
        mean = low = high = math.nan
        if other is not None and len(own) > 1:
            pairs = [(own[seed].area(score), other[seed].area(score)) for seed in own]
            mean, low, high, _ = paired_difference(*zip(*pairs, strict=True))
        made |= {f"{score}_over_{words}": mean, f"{score}_over_{words}_low": low, f"{score}_over_{words}_high": high}
    return made


def _draw(out: Path, setting: Setting, curves: Curves, lines: Lines) -> None:
    """Curves of accuracy and NLL, and the areas over the plain forms'."""
    seeds = list(next(iter(curves.values())))
    tree = curves_datatree({name: list(own.values()) for name, own in curves.items()}, seeds)
    figure = Figure(figsize=(16, 5), layout="constrained")
    axes = figure.subplots(1, 3)
    plot_curves(tree, "accuracy", axes[0])
    plot_curves(tree, "nll", axes[1])
    axes[1].get_legend().remove()
    ahead = [line for line in lines if line["plain"] and not math.isnan(line["accuracy_over_plain"])]
    for place, line in enumerate(reversed(ahead)):
        low, mean, high = (100 * line[f"accuracy_over_plain{end}"] for end in ("_low", "", "_high"))
        axes[2].errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color="tab:blue", capsize=3)
    axes[2].axvline(0, color="0.5", linewidth=1)
    axes[2].set_yticks(range(len(ahead)), [f"{line['method']} - {line['plain']}" for line in reversed(ahead)])
    axes[2].set(xlabel="difference of the area under the accuracy, points", title="look-ahead over plain, 95 %")
    figure.suptitle(f"{setting.name}, {len(seeds)} seeds")
    figure.savefig(out / f"{setting.name}.png", dpi=110)


def _table(setting: Setting, lines: Lines) -> Table:
    table = Table(title=f"{setting.name}, {lines[0]['seeds']} seeds: areas under the curves, points")
    for column in ("method", "accuracy", "over random", "over its plain form", "NLL", "last accuracy", "s a batch"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for line in lines:
        table.add_row(
            line["method"],
            f"{100 * line['area_accuracy']:.2f}",
            _interval(line, "random"),
            _interval(line, "plain"),
            f"{line['area_nll']:.3f}",
            f"{100 * line['last_accuracy']:.2f}",
            f"{line['seconds']:.2f}",
        )
    return table


def _interval(line: dict[str, Any], words: str) -> str:
    low, mean, high = (100 * line[f"accuracy_over_{words}{end}"] for end in ("_low", "", "_high"))
    return "" if math.isnan(mean) else f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Active learning on the last layer: strategies and their look-ahead forms."
    )
    parser.add_argument("settings", nargs="*", metavar="DATASET", help=f"any of {', '.join(SETTINGS)} (default all)")
    parser.add_argument(
        "--quick", action="store_true", help="checks that it runs: two batches of small pools, two seeds"
    )
    parser.add_argument("--seeds", type=int, help="how many (default 10; quick: 2)")
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--out", type=Path, help=f"folder of the results (default {OUT.name}, quick: {OUT.name}/quick)")
    parsed = parser.parse_args(arguments)
    for name in parsed.settings:
        if name not in SETTINGS:
            parser.error(f"data set is {name!r}; accepted are {', '.join(SETTINGS)}")
    if parsed.seeds is not None and not 1 <= parsed.seeds <= VALIDATION_SEED:
        parser.error(f"seeds is {parsed.seeds}; 1 to {VALIDATION_SEED} are accepted")
    for name in parsed.methods or []:
        if not any(name in methods_of(setting) for setting in SETTINGS.values()):
            parser.error(f"method is {name!r}; accepted are {', '.join(methods_of(SETTINGS['digits']))}")
    return parsed


if __name__ == "__main__":
    warnings.simplefilter("once")
    sys.exit(main())
