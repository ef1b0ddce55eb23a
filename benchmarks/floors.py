"""Each step of a filter against the least time that this machine allows for it.

    uv run python benchmarks/floors.py [--weights 1000000] [--rank 32] [--repeats 7]

A step on a diagonal-plus-low-rank belief of P weights and R columns in float32. Its floor is the larger of

    bytes read / rate + bytes written / rate    of an array summed, and of one filled: written memory is new, as every result's
    operations / rate                           of a product of large square matrices; a symmetric one counts as any other

A factor that is needed before the first row of the result can be made, and again for that row, is read twice: it is larger than
the cache. The rates are measured in the same rounds as the steps, and a ratio is within a round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from conditions import machine
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
    """A compiled step with its arguments, the bytes that it must read and write, and its operations."""

    run: Callable[[], Any]
    read: float
    written: float
    operations: float


class Rates(NamedTuple):
    """A second's worth of each."""

    read: float
    written: float
    operations: float

    def floor(self, step: Step) -> tuple[float, float]:
        """Seconds of a step by its bytes, and by its operations."""
        return step.read / self.read + step.written / self.written, step.operations / self.operations


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

    def step(function: Callable[..., Any], *arguments: Any, read: float, written: float, operations: float) -> Step:
        compiled = jax.jit(function)
        return Step(lambda: compiled(*arguments), read, written, operations)

    return {
        # U^T diag U, then U M^-T/2; mean, diagonal and three moments are read, mean and diagonal written
        "predict": step(
            predict_belief,
            belief,
            moments,
            read=2 * factor + 5 * vector,
            written=factor + 2 * vector,
            operations=2 * product,
        ),
        # 2 R columns: a triangle or a Gram matrix of them, then their turned first R; metric read, dropped diagonal written
        "compress": step(
            lambda wide, metric: compress(wide, metric, rank),
            wide,
            metric,
            read=4 * factor + vector,
            written=factor + vector,
            operations=(4 + 2) * product,
        ),
        # U^T D^-1 U, then U (..)
        "solve": step(
            lambda precision, x: precision.solve(x),
            belief.precision,
            after,
            read=2 * factor + 2 * vector,
            written=vector,
            operations=product,
        ),
        # U^T diag U, then U (..); two means, diagonal and three moments are read, a mean written
        "smoothing mean": step(
            smoothing._mean_before,
            belief,
            moments,
            after,
            read=2 * factor + 6 * vector,
            written=vector,
            operations=product,
        ),
    }


def gauges(weights: int) -> tuple[Step, ...]:
    """What the rates are measured by: an array summed, an array filled, a product."""
    long, square = jnp.ones(max(16 * weights, 2**24)), jnp.ones((SQUARE, SQUARE))
    summed, product = jax.jit(jnp.sum), jax.jit(lambda a: a @ a)
    filled = jax.jit(lambda value: jnp.full(long.shape, value))
    return (
        Step(lambda: summed(long), long.nbytes, 0, 0),
        Step(lambda: filled(jnp.float32(1.0)), 0, long.nbytes, 0),
        Step(lambda: product(square), 0, 0, 2 * SQUARE**3),
    )


def timed(step: Step) -> float:
    """Seconds until the result is there."""
    began = time.perf_counter()
    jax.block_until_ready(step.run())
    return time.perf_counter() - began


def rates_of(by: tuple[Step, ...]) -> Rates:
    """The best of three: a floor is what the machine can do."""
    read, written, product = (min(timed(step) for _ in range(3)) for step in by)
    return Rates(by[0].read / read, by[1].written / written, by[2].operations / product)


def measured(weights: int, rank: int, repeats: int) -> list[dict[str, Any]]:
    """A row a step; rates and steps alternate."""
    found, by = steps(weights, rank), gauges(weights)
    for step in (*found.values(), *by):
        timed(step)  # compiles
    rates: list[Rates] = []
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for _ in track(range(repeats), "rounds"):
        rates.append(rates_of(by))
        for name, step in found.items():
            seconds[name].append(timed(step))
    usual = Rates(*(statistics.median(rate) for rate in zip(*rates, strict=True)))
    rows = []
    for name, step in found.items():
        ratios = [s / max(rate.floor(step)) for s, rate in zip(seconds[name], rates, strict=True)]
        by_bytes, by_operations = usual.floor(step)
        rows.append(
            {
                "step": name,
                "seconds": statistics.median(seconds[name]),
                "floor_by_bytes": by_bytes,
                "floor_by_operations": by_operations,
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "aim": AIM,
                "gigabytes_read": step.read / 1e9,
                "gigabytes_written": step.written / 1e9,
                "gigaoperations": step.operations / 1e9,
                "gigabytes_read_a_second": usual.read / 1e9,
                "gigabytes_written_a_second": usual.written / 1e9,
                "gigaoperations_a_second": usual.operations / 1e9,
                "weights": weights,
                "rank": rank,
                "conditions": f"{repeats} rounds; {machine()}",
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The table on the terminal."""
    first = rows[0]
    table = Table(
        title=f"P = {first['weights']:,}, R = {first['rank']}; a second: {first['gigabytes_read_a_second']:.1f} GB read, "
        f"{first['gigabytes_written_a_second']:.1f} GB written, {first['gigaoperations_a_second']:.0f} Gflop"
    )
    for heading in ("step", "ms", "floor by bytes", "by operations", "ratio", "aim"):
        table.add_column(heading, justify="left" if heading == "step" else "right")
    for row in rows:
        milliseconds = [f"{1e3 * row[name]:.1f}" for name in ("seconds", "floor_by_bytes", "floor_by_operations")]
        ratio = f"{row['ratio']:.2f} [{row['ratio_min']:.2f}, {row['ratio_max']:.2f}]"
        table.add_row(row["step"], *milliseconds, ratio, f"{AIM:g}: {'met' if row['ratio'] <= AIM else 'missed'}")
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
