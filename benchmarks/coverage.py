"""Do the predictive intervals of a drifting regression hold what they promise?

    python benchmarks/coverage.py [--seeds 20]

A curve ``h_t sin(1.5 x) + 0.3 x`` whose height walks at random, read 12 times a visit with noise, 20 visits; a network of
16 units whose output layer walks, the scale of its walk learnt from the stream by the evidence's gradient. Judged are
central intervals for new readings at every visit, as filter and smoother predict them. Writes ``results/coverage.csv``, a
line a seed, view and level; begun runs go on after the last finished seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from csv_files import as_text, read_csv, write_csv
from drifting_curve import NOISE, visits_of
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import norm

from ssm_nn.inference import Dense, LaplaceFilter, predict
from ssm_nn.inference.evidence_gradient import maximise_evidence
from ssm_nn.models.networks import mlp
from ssm_nn.models.programs import regression

OUT = Path(__file__).parent / "results"
LEVELS = (0.5, 0.8, 0.95)
READINGS, NEW, HIDDEN = 12, 200, 16
GROUPS = {"hidden": "layers.0.*", "output": "layers.1.*"}


def main(arguments: list[str] | None = None) -> None:
    """Runs what is missing, and prints the table of all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--visits", type=int, default=20)
    parser.add_argument("--out", type=Path, default=OUT)
    parsed = parser.parse_args(arguments)
    parsed.out.mkdir(parents=True, exist_ok=True)
    file = parsed.out / "coverage.csv"
    rows = read_csv(file)
    for seed in track(range(parsed.seeds), "seeds", console=Console(stderr=True)):
        if not any(row["seed"] == str(seed) for row in rows):
            rows += as_text(one_seed(seed, parsed.visits))
            write_csv(file, rows)
    lines = summary_of(rows)
    write_csv(parsed.out / "coverage-summary.csv", lines)
    Console().print(shown(lines))


def one_seed(seed: int, num_visits: int) -> list[dict[str, Any]]:
    """A line a view and level."""
    visits, new = visits_of(seed, num_visits, READINGS, NEW)
    program = regression(mlp((1, HIDDEN, 1), "tanh", seed=seed), NOISE, 1.0, GROUPS)
    engine = LaplaceFilter(program, Dense(), hypers={"noise.hidden": 0.0, "noise.output": 0.05})
    engine = engine.with_hypers(maximise_evidence(engine, visits, ["noise.output"], key=seed).hypers)
    filtered = engine.run(seed, visits)
    rows = []
    for view, beliefs in (("filtered", filtered), ("smoothed", engine.smooth(filtered))):
        found = [predict(beliefs, t, {"x": visit["x"]}, key=seed)["y"] for t, visit in enumerate(new)]
        scaled = [(visit["y"] - f.mean) / np.sqrt(f.variance) for f, visit in zip(found, new, strict=True)]
        for level in LEVELS:
            inside = np.abs(np.stack(scaled)) < norm.ppf(0.5 + level / 2)
            rows.append({"seed": seed, "view": view, "level": level, "covered": float(inside.mean())})
            rows[-1] |= {"noise": float(engine.hypers["noise.output"])}
    return rows


def summary_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a view and level: mean over seeds, and its standard error."""
    lines = []
    for view in ("filtered", "smoothed"):
        for level in LEVELS:
            own = [float(r["covered"]) for r in rows if r["view"] == view and float(r["level"]) == level]
            error = float(np.std(own, ddof=1) / np.sqrt(len(own))) if len(own) > 1 else np.nan
            line = {"view": view, "level": level, "covered": float(np.mean(own)), "standard_error": error}
            lines.append(line | {"seeds": len(own)})
    return lines


def shown(lines: list[dict[str, Any]]) -> Table:
    """The summary."""
    table = Table("view", "nominal", "covered", "standard error", "seeds", title="central predictive intervals")
    for line in lines:
        shares = (f"{line[name]:.1%}" for name in ("level", "covered", "standard_error"))
        table.add_row(line["view"], *shares, str(line["seeds"]))
    return table


if __name__ == "__main__":
    main()
