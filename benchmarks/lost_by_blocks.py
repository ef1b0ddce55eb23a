"""What a belief without correlations between layers loses in LOO, and what counting a task's information more often gives back.

    uv run python benchmarks/lost_by_blocks.py [--seeds 0 1 2]

The network and the visits of engines_against_nuts.py, whose rows give NUTS' LOO. "dense by layer" is the dense belief with each
number between two layers set to 0, which a Kronecker form approximates further. Degrees of freedom are the sum over readings of
a prediction's variance in units of the noise's, trace(G_t Sigma_t) summed over visits: how much of the data a belief's own
spread takes up.
Rows go to ``<out>/blocks.csv``; a run that was stopped goes on after the last finished seed.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from csv_files import as_text, read_csv, write_csv
from drifting_curve import NOISE, visits_of
from engines_against_nuts import NEW, OUT, READINGS, VISITS, covered, program_of
from rich.console import Console
from rich.table import Table

from ssm_nn.extraction import describe
from ssm_nn.inference import Dense, Diagonal, FilterWarning, Kronecker, KroneckerCurvature, LaplaceFilter, predict
from ssm_nn.inference.diagnosis import leave_one_out
from ssm_nn.inference.structures import Cut
from ssm_nn.models.networks import mlp
from ssm_nn.precision_dense import DensePrecision
from ssm_nn.tasks import as_task

STRENGTHS = (1.0, 1.5, 2.0, 3.0)


@dataclass(frozen=True)
class DenseByLayer(Dense):
    """The dense matrix without what lies between two layers.

    Args:
        layers: the layer of each weight.
    """

    layers: tuple[int, ...] = ()

    def gather(self, site: DensePrecision | None, columns: Any, metric: Any) -> Cut:
        """``V V^T`` within layers."""
        layers, found = np.asarray(self.layers), super().gather(site, columns, metric)
        return Cut(
            DensePrecision(jnp.where(layers[:, None] == layers, found.precision.matrix, 0.0)), found.dropped_share
        )


def engines_of(program: Any, visit: Any) -> dict[str, Callable[[], LaplaceFilter]]:
    """By name."""
    sites = describe(program, as_task(visit)).sites
    layers = tuple(int(".layers.1." in site.name) for site in sites for _ in range(site.start, site.stop))
    named: dict[str, Callable[[], LaplaceFilter]] = {
        "dense": lambda: LaplaceFilter(program, Dense()),
        "dense by layer": lambda: LaplaceFilter(program, DenseByLayer(layers)),
        "diagonal": lambda: LaplaceFilter(program, Diagonal()),
    }
    for strength in STRENGTHS:
        curvature = KroneckerCurvature(strength=strength)
        named[f"Kronecker, strength {strength:g}"] = lambda c=curvature: LaplaceFilter(
            program, Kronecker(), curvature=c
        )
    return named


def one_seed(seed: int, nuts: float) -> list[dict[str, Any]]:
    """A row an engine."""
    program = program_of(mlp((1, 6, 1), "tanh", seed=seed))
    visits, new = visits_of(seed, VISITS, READINGS, NEW)
    rows = []
    for name, make in engines_of(program, visits[0]).items():
        engine = make()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FilterWarning)  # what it costs is in the row
            posterior = engine.smooth(engine.run(seed, visits))
        seen, found = (
            [predict(posterior, t, {"x": visit["x"]}, key=seed)["y"] for t, visit in enumerate(of)]
            for of in (visits, new)
        )
        rows.append(
            {
                "seed": seed,
                "engine": name,
                "loo_minus_nuts": leave_one_out(posterior, visits, key=seed).elpd - nuts,
                "degrees_of_freedom": sum(float(np.sum(f.variance / NOISE**2 - 1)) for f in seen),
                "covered": covered(np.stack([f.mean for f in found]), np.stack([f.variance for f in found]), new),
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measures the seeds that are missing, and prints means over all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=OUT)
    parsed = parser.parse_args(arguments)
    file = parsed.out / "blocks.csv"
    nuts = {row["seed"]: float(row["elpd"]) for row in read_csv(parsed.out / "engines.csv") if row["engine"] == "NUTS"}
    rows = read_csv(file)
    for seed in parsed.seeds:
        if str(seed) not in nuts:
            parser.error(f"--seeds names {seed}, for which {parsed.out / 'engines.csv'} has no NUTS: run that first")
        if not any(row["seed"] == str(seed) for row in rows):
            rows += as_text(one_seed(seed, nuts[str(seed)]))
            write_csv(file, rows)
    Console().print(shown(rows))


def shown(rows: list[dict[str, str]]) -> Table:
    """Means over seeds, and the LOO that lies furthest from NUTS'."""
    table = Table("engine", "LOO - NUTS'", "at most", "degrees of freedom", "covered")
    for name in dict.fromkeys(row["engine"] for row in rows):
        own = [row for row in rows if row["engine"] == name]
        away, freedom, share = (
            np.array([float(row[column]) for row in own])
            for column in ("loo_minus_nuts", "degrees_of_freedom", "covered")
        )
        table.add_row(
            name, f"{away.mean():.1f}", f"{abs(away).max():.1f}", f"{freedom.mean():.1f}", f"{share.mean():.3f}"
        )
    return table


if __name__ == "__main__":
    main()
