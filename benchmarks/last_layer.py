"""New points for a trained head: updates beside the refit, the published rule, first order and reweighting.

    uv run python benchmarks/last_layer.py [PROBLEM ...] [--seeds 0 1 ... 9] [--quick] [--out ...]
    uv run python benchmarks/last_layer.py --evidence        # the priors in last_layer_settings.py, found anew

A cell is one problem, seed and number of points before; finished cells lie in ``<out>/cells`` and are not run again. Tables and
pictures are made of all finished cells. Where torch and laplace-torch are installed, its fit at the refit's weights is
compared too, in cells of their own; ``digits-network`` has a network below the head, which is also trained anew. What an update
costs is measured by ``benchmarks/last_layer_cost.py``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import last_layer_torch
import numpy as np
from csv_files import write_csv
from last_layer_methods import Case
from last_layer_settings import DRAWS, GAMMAS, PROBLEMS, QUICK, RATES, Problem, features_of, head_of, points_of
from last_layer_summary import draw, summarise
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ssm_nn.inference.checkpoints import replacing
from ssm_nn.inference.last_layer.evidence import tune_head
from ssm_nn.inference.last_layer.last_layer_filter import LastLayerFilter

OUT = Path(__file__).parent / "results" / "last_layer"


def main(arguments: list[str] | None = None) -> None:
    """Run what is asked for, and write its tables."""
    parsed = _parsed(arguments)
    problems = QUICK if parsed.quick else PROBLEMS
    chosen = {name: problems[name] for name in parsed.problems or problems}
    if parsed.evidence:
        for name, problem in chosen.items():
            print(f"{name}: prior precision {best_prior(problem):.4g}")
        return
    out = parsed.out or (OUT / "quick" if parsed.quick else OUT)
    seeds = parsed.seeds or ([0] if parsed.quick else list(range(10)))
    run(chosen, seeds, out, Console())


def run(problems: dict[str, Problem], seeds: list[int], out: Path, console: Console) -> list[dict[str, Any]]:
    """All cells, then a line a problem, size and method."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    cells = [(name, base, seed) for seed in seeds for name, problem in problems.items() for base in problem.base]
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("cells", total=len(cells))
        for name, base, seed in cells:
            progress.update(bar, description=f"{name}, {base} points, seed {seed}")
            _cell(out, problems[name], base, seed)
            progress.advance(bar)
    lines = []
    for name, problem in problems.items():
        rows = _finished(out, problem)
        found = summarise(rows)
        write_csv(out / f"{name}.csv", rows)
        write_csv(out / f"{name}-summary.csv", found)
        draw(out / f"{name}.png", found)
        console.print(_table(name, found))
        lines += found
    return lines


def best_prior(problem: Problem, num_points: int = 1_000) -> float:
    """The prior precision with the largest evidence of points that no seed below 1000 draws first."""
    data = features_of(problem.data)
    behind = min(problem.base) if problem.data == "digits-network" else 0  # not the points that the network has learnt
    _, places = points_of(problem, 1_000, behind, min(num_points, len(data.train_y) - behind))
    engine = LastLayerFilter(head_of(problem, 1_000, min(problem.base)))
    state, _ = engine.update(engine.init(), {"x": data.train_x[places], "y": data.train_y[places]})
    return float(tune_head(engine, state).prior_precision[0])


def _settings(problem: Problem, base: int, seed: int) -> dict[str, Any]:
    own = asdict(problem) | {"new": list(problem.new), "base": base, "seed": seed}
    own |= {"draws": DRAWS, "gammas": list(GAMMAS), "rates": list(RATES)}
    return own if last_layer_torch.version() is None else own | {"laplace-torch": last_layer_torch.version()}


def _path(out: Path, settings: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return out / "cells" / f"{settings['data']}-{settings['base']}-{settings['seed']}-{digest}.json"


def _cell(out: Path, problem: Problem, base: int, seed: int) -> None:
    settings = _settings(problem, base, seed)
    path = _path(out, settings)
    if path.exists():
        return
    case = Case(problem, seed, base)
    rows = [row for new in problem.new for row in case.rows(new)]
    with replacing(path) as file:
        file.write(json.dumps({"settings": settings, "rows": rows}).encode())


def _finished(out: Path, problem: Problem) -> list[dict[str, Any]]:
    rows = []
    for path in sorted((out / "cells").glob("*.json")):
        cell = json.loads(path.read_text())
        settings = cell["settings"]
        if settings["base"] in problem.base and settings == _settings(problem, settings["base"], settings["seed"]):
            rows += cell["rows"]
    return rows


def _table(name: str, lines: list[dict[str, Any]]) -> Table:
    table = Table(title=name, caption="means over seeds; excess: NLL above the refit's, %")
    for column in (
        "before",
        "new",
        "method",
        "seeds",
        "accuracy",
        "NLL",
        "NLL probit",
        "excess",
        "TV to refit",
        "beats rule",
    ):
        table.add_column(column, justify="left" if column == "method" else "right")
    for line in lines:
        shown = [line["base"], line["new"], line["method"], line["seeds"], f"{100 * line['accuracy']:.2f}"]
        shown += [f"{line[key]:.4f}" for key in ("nll", "nll_probit")]
        shown += [f"{line['excess']:+.2f}", f"{line['total_variation']:.4f}", f"{line['beats_published']:.2f}"]
        table.add_row(*map(str, shown))
    return table


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="New points for a trained head: updates beside their rivals.")
    parser.add_argument("problems", nargs="*", metavar="PROBLEM", help=f"any of {', '.join(PROBLEMS)} (default all)")
    parser.add_argument("--quick", action="store_true", help="checks that it runs: digits-50-10, one seed")
    parser.add_argument("--seeds", type=int, nargs="+", help="default 0 to 9; quick: 0")
    parser.add_argument("--evidence", action="store_true", help="find each problem's prior precision, and run nothing")
    parser.add_argument("--out", type=Path, help=f"folder of the results (default {OUT.name})")
    parsed = parser.parse_args(arguments)
    known = QUICK if parsed.quick else PROBLEMS
    for name in parsed.problems:
        if name not in known:
            parser.error(f"problem is {name!r}; accepted are {', '.join(known)}")
    for seed in parsed.seeds or []:
        if not 0 <= seed < 1_000:
            parser.error(f"seed is {seed}; 0 to 999 are accepted")
    return parsed


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    sys.exit(main())
