"""Each step of a filter against the least time that this machine allows for it.

    uv run python benchmarks/floors.py [--weights 1000000] [--rank 32] [--repeats 7]

A step on a diagonal-plus-low-rank belief of P weights and R columns in float32. Its floor is the larger of

    bytes that must move / bandwidth     of an array scaled or summed, whichever is faster
    operations / rate                    of a product of large square matrices; a symmetric product counts as any other

A factor that is needed before the first row of the result can be made, and again for that row, is read twice: it is larger than
the cache. Both rates are measured in the same rounds as the steps, and a ratio is within a round.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from csv_files import write_csv
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ssm_nn.inference import smoothing
from ssm_nn.inference.beliefs import Belief, predict_belief
from ssm_nn.moments import Moments
from ssm_nn.precision_low_rank import DiagonalPlusLowRank, compress

AIM = 2.0
NUMBER = 4  # bytes, float32
SQUARE = 2048  # rows of the matrices whose product gives the rate


class Step(NamedTuple):
    """A compiled step with its arguments, the bytes that it must move, and its operations."""

    run: Callable[[], Any]
    bytes: float
    operations: float


def steps(weights: int, rank: int) -> dict[str, Step]:
    """By name; every array is an argument, so that nothing is folded into the program."""
    key = jax.random.key(0)
    belief = Belief(
        jnp.zeros(weights), DiagonalPlusLowRank(jnp.full(weights, 2.0), jax.random.normal(key, (weights, rank)) / 100)
    )
    moments = Moments(jnp.full(weights, 0.9), jnp.full(weights, 0.1), jnp.full(weights, 0.01))
    after = jax.random.normal(key, (weights,))
    wide = jnp.concatenate([belief.precision.factor, jax.random.normal(key, (weights, rank)) / 50], axis=1)
    metric = belief.precision.diagonal
    factor, vector = NUMBER * weights * rank, NUMBER * weights
    product = 2 * weights * rank**2  # (R, P) by (P, R), or (P, R) by (R, R)

    def step(function: Callable[..., Any], *arguments: Any, moved: float, operations: float) -> Step:
        compiled = jax.jit(function)
        return Step(lambda: compiled(*arguments), moved, operations)

    return {
        # U^T diag U, then U M^-T/2; mean, diagonal and three moments are read, mean and diagonal written
        "predict": step(predict_belief, belief, moments, moved=3 * factor + 7 * vector, operations=2 * product),
        # 2 R columns: a triangle or a Gram matrix of them, then their turned first R; metric read, dropped diagonal written
        "compress": step(
            lambda wide, metric: compress(wide, metric, rank),
            wide,
            metric,
            moved=(2 * 2 + 1) * factor + 2 * vector,
            operations=(4 + 2) * product,
        ),
        # U^T D^-1 U, then U (..)
        "solve": step(
            lambda precision, x: precision.solve(x),
            belief.precision,
            after,
            moved=2 * factor + 3 * vector,
            operations=product,
        ),
        # U^T diag U, then U (..); two means, diagonal and three moments are read, a mean written
        "smoothing mean": step(
            smoothing._mean_before, belief, moments, after, moved=2 * factor + 7 * vector, operations=product
        ),
    }


def gauges(weights: int) -> tuple[Step, ...]:
    """What the rates are measured by: an array scaled, an array summed, a product."""
    long = jnp.ones(max(16 * weights, 2**24))
    square = jnp.ones((SQUARE, SQUARE))
    scaled, summed, product = jax.jit(lambda x: 0.5 * x), jax.jit(jnp.sum), jax.jit(lambda a: a @ a)
    return (
        Step(lambda: scaled(long), 2 * long.nbytes, 0),
        Step(lambda: summed(long), long.nbytes, 0),
        Step(lambda: product(square), 0, 2 * SQUARE**3),
    )


def timed(step: Step) -> float:
    """Seconds until the result is there."""
    began = time.perf_counter()
    jax.block_until_ready(step.run())
    return time.perf_counter() - began


def measured(weights: int, rank: int, repeats: int) -> list[dict[str, Any]]:
    """A row a step; rates and steps alternate."""
    found, of_rates = steps(weights, rank), gauges(weights)
    for step in (*found.values(), *of_rates):
        timed(step)  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in found}
    floors: dict[str, list[float]] = {name: [] for name in found}
    bandwidths, products = [], []
    for _ in track(range(repeats), "rounds"):
        # the faster of each kind: a floor is what the machine can do
        rounds = [[timed(step) for step in of_rates] for _ in range(3)]
        scaled, summed, product = (min(times) for times in zip(*rounds, strict=True))
        bandwidths.append(max(of_rates[0].bytes / scaled, of_rates[1].bytes / summed))
        products.append(of_rates[2].operations / product)
        for name, step in found.items():
            seconds[name].append(timed(step))
            floors[name].append(max(step.bytes / bandwidths[-1], step.operations / products[-1]))
    rows = []
    for name, step in found.items():
        ratios = [s / f for s, f in zip(seconds[name], floors[name], strict=True)]
        by_bytes = step.bytes / statistics.median(bandwidths) >= step.operations / statistics.median(products)
        rows.append(
            {
                "step": name,
                "seconds": statistics.median(seconds[name]),
                "floor": statistics.median(floors[name]),
                "bound_by": "bytes" if by_bytes else "operations",
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "aim": AIM,
                "gigabytes": step.bytes / 1e9,
                "gigaoperations": step.operations / 1e9,
                "bandwidth_gigabytes": statistics.median(bandwidths) / 1e9,
                "product_gigaoperations": statistics.median(products) / 1e9,
                "weights": weights,
                "rank": rank,
                "conditions": conditions(repeats),
            }
        )
    return rows


def conditions(repeats: int) -> str:
    """Where and how."""
    device = jax.devices()[0]
    return (
        f"{repeats} rounds; {device.platform} {device.device_kind}, {os.cpu_count()} cores, {platform.machine()}, "
        f"jax {jax.__version__}"
    )


def show(rows: list[dict[str, Any]]) -> None:
    """The table on the terminal."""
    first = rows[0]
    table = Table(
        title=f"P = {first['weights']:,}, R = {first['rank']}: {first['bandwidth_gigabytes']:.1f} GB/s, "
        f"{first['product_gigaoperations']:.0f} Gflop/s"
    )
    for heading in ("step", "seconds", "floor", "bound by", "ratio", "aim"):
        table.add_column(heading, justify="left" if heading in ("step", "bound by") else "right")
    for row in rows:
        ratio = f"{row['ratio']:.2f} [{row['ratio_min']:.2f}, {row['ratio_max']:.2f}]"
        met = "met" if row["ratio"] <= AIM else "missed"
        table.add_row(
            row["step"], f"{row['seconds']:.4f}", f"{row['floor']:.4f}", row["bound_by"], ratio, f"{AIM:g}: {met}"
        )
    Console().print(table)


def main(arguments: list[str] | None = None) -> None:
    """Measure, write the table, print it."""
    parser = argparse.ArgumentParser(description="Each step of a filter against its floor.")
    parser.add_argument("--weights", type=int, default=10**6, help="P (default 1000000)")
    parser.add_argument("--rank", type=int, default=32, help="R (default 32)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds (default 7)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    given = parser.parse_args(arguments)
    for name in ("weights", "rank", "repeats"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} is {getattr(given, name)}; a whole number >= 1 is accepted")
    rows = measured(given.weights, given.rank, given.repeats)
    given.out.mkdir(parents=True, exist_ok=True)
    write_csv(given.out / "floors.csv", rows)
    show(rows)


if __name__ == "__main__":
    main()
