"""Continual learning: the filter beside its baselines, on every scenario of the results page.

    uv run python benchmarks/continual.py [SCENARIO ...] [--quick] [--seeds 0 1 2] [--methods ...] [--out ...]

A cell is one method on one scenario at one seed, with a strength and a learning rate that were tuned on other data. Finished
cells lie in ``<out>/cells`` and are not run again; an interrupted one goes on after its last whole task. Tables and pictures
are made of all cells that the present settings have finished, also by earlier calls.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
from continual_bench import Bench, forget_compiled
from continual_cells import Store, digest_of, run_cell, settings_of, tuned
from continual_figures import draw
from continual_methods import Choice, Method, method_of
from continual_scenarios import SCENARIOS, Scenario
from continual_settings import FULL, QUICK, VALIDATION_SEED, Budget
from continual_summary import MEASURES, recorded_cells, write_tables
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

OUT = Path(__file__).parent / "results" / "continual"
QUICK_SCENARIOS = ("permuted-mnist-10", "split-mnist", "rotated-mnist-drift-50", "known-permutation-mnist")
PERCENT = ("average", "learnt", "forgetting", "before", "smoothed", "missing_gap")


def main(arguments: list[str] | None = None) -> None:
    """Run what is asked for, and write its tables."""
    parsed = _parsed(arguments)
    budget = QUICK if parsed.quick else FULL
    out = parsed.out or (OUT / "quick" if parsed.quick else OUT)
    names = parsed.scenarios or list(QUICK_SCENARIOS if parsed.quick else SCENARIOS)
    seeds = parsed.seeds or ([0] if parsed.quick else [0, 1, 2])
    console = Console(width=None if sys.stdout.isatty() else 160)  # the tables are wide, and a file has no width
    run([SCENARIOS[name] for name in names], budget, seeds, parsed.methods, out, console)


def run(
    scenarios: list[Scenario],
    budget: Budget,
    seeds: list[int],
    only: list[str] | None,
    out: Path,
    console: Console,
) -> list[list[dict[str, Any]]]:
    """All cells, then the tables of each scenario: the lines of their summaries."""
    store = Store(out / "cells")
    plan = [(scenario, methods_for(scenario, budget, only)) for scenario in scenarios]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    summaries, compiled_for = [], seeds[0]
    with Progress(*columns, console=console) as progress:
        cells = progress.add_task("cells", total=len(seeds) * sum(len(methods) for _, methods in plan))
        tasks = progress.add_task("tasks")
        for scenario, methods in plan:
            choices = {}
            for method in methods:
                progress.update(tasks, description=f"{scenario.name} {method.name}: tuning", total=None)
                choices[method.name] = tuned(store, scenario, method, budget)
            if any(len(method.candidates(budget)) > 1 for method in methods):
                forget_compiled()
            for seed in seeds:
                if seed != compiled_for:
                    forget_compiled()
                compiled_for = seed
                for method in methods:
                    choice = choices[method.name]
                    bench = Bench(scenario, budget, seed, learning_rate=choice.learning_rate)

                    def report(
                        done: int, total: int, words: str = f"{scenario.name} {method.name} seed {seed}"
                    ) -> None:
                        progress.update(tasks, description=words, completed=done, total=total)

                    run_cell(store, bench, method, choice, report)
                    progress.advance(cells)
            summaries.append(_tables(store, scenario, budget, out, console))
    return summaries


def methods_for(scenario: Scenario, budget: Budget, only: list[str] | None) -> list[Method]:
    """The scenario's methods, or those among them that were asked for."""
    names = scenario.method_names(budget)
    return [method_of(name, scenario.smoothed) for name in names if only is None or name in only]


def _tables(store: Store, scenario: Scenario, budget: Budget, out: Path, console: Console) -> list[dict[str, Any]]:
    """Of all finished cells with the present settings, in the order of the scenario's methods; cells that were run elsewhere
    stay as the tables have them."""
    order = scenario.method_names(budget)
    cells = [cell for cell in store.finished(scenario.name) if _is_present(cell, scenario, budget, order)]
    here = {(cell["settings"]["method"], cell["settings"]["seed"]) for cell in cells}
    for digest, cell in recorded_cells(out, scenario.name):
        found = cell["settings"]
        if found["method"] in order and (found["method"], found["seed"]) not in here:
            settings = _as_now(found, scenario, budget)
            if digest == digest_of(settings):
                cells.append(cell | {"settings": settings})
    cells.sort(key=lambda cell: (order.index(cell["settings"]["method"]), cell["settings"]["seed"]))
    if not cells:
        return []
    lines = write_tables(out, scenario.name, cells, {method for method, _ in here})
    draw(out, scenario.name, cells)
    console.print(_table(scenario, lines))
    return lines


def _is_present(cell: dict[str, Any], scenario: Scenario, budget: Budget, order: list[str]) -> bool:
    settings = cell["settings"]
    if settings["method"] not in order or "learning_rate" not in settings:
        return False
    return settings == _as_now(settings, scenario, budget)


def _as_now(settings: dict[str, Any], scenario: Scenario, budget: Budget) -> dict[str, Any]:
    """What a cell of this method, seed and choice has for settings now."""
    method = method_of(settings["method"], scenario.smoothed)
    choice = Choice(settings["strength"], settings["learning_rate"])
    return settings_of(scenario, method, settings["seed"], budget, choice)


def _table(scenario: Scenario, lines: list[dict[str, Any]]) -> Table:
    """Measures that some method has, as mean ± standard deviation over seeds."""
    table = Table(title=scenario.name, caption=f"{jax.devices()[0].platform}, seeds: {lines[0]['seeds']}")
    shown = [measure for measure in MEASURES if any(not math.isnan(line[measure]) for line in lines)]
    table.add_column("method")
    table.add_column("tuned")
    for measure in shown:
        table.add_column(measure, justify="right")
    for line in lines:
        strength = f"{line['strength_name']} {line['strength']:g}, " if line["strength_name"] else ""
        table.add_row(
            line["method"], f"{strength}rate {line['learning_rate']:g}", *(_words(line, measure) for measure in shown)
        )
    return table


def _words(line: dict[str, Any], measure: str) -> str:
    mean, sd = line[measure], line[measure + "_sd"]
    if math.isnan(mean):
        return ""
    scale, digits = (100, 2) if measure in PERCENT else (1, 0 if abs(mean) >= 1000 else 3)
    spread = "" if math.isnan(sd) else f" ± {sd * scale:.{digits}f}"
    return f"{mean * scale:.{digits}f}{spread}"


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Continual learning: the filter beside its baselines.")
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"any of {', '.join(SCENARIOS)} (default all)")
    quick = f"few tasks, 6,000 examples, one epoch, one seed; by default {', '.join(QUICK_SCENARIOS)}"
    parser.add_argument("--quick", action="store_true", help=f"checks that it runs: {quick}")
    parser.add_argument("--seeds", type=int, nargs="+", help=f"below {VALIDATION_SEED} (default 0 1 2; quick: 0)")
    parser.add_argument("--methods", nargs="+", help="only these of each scenario's methods")
    parser.add_argument("--out", type=Path, help=f"folder of the results (default {OUT.name}, quick: {OUT.name}/quick)")
    parsed = parser.parse_args(arguments)
    for name in parsed.scenarios:
        if name not in SCENARIOS:
            parser.error(f"scenario is {name!r}; accepted are {', '.join(SCENARIOS)}")
    for seed in parsed.seeds or []:
        if not 0 <= seed < VALIDATION_SEED:
            parser.error(f"seed is {seed}; 0 to {VALIDATION_SEED - 1} are accepted, later ones are for tuning")
    for name in parsed.methods or []:
        try:
            method_of(name)
        except ValueError as error:
            parser.error(str(error))
    return parsed


if __name__ == "__main__":
    warnings.simplefilter("once")
    sys.exit(main())
