"""Memory and time where weights or tasks are many, with the history on disk.

    uv run python benchmarks/large.py [--weights 10000000] [--rank 16] [--tasks 5]     MNIST, turned by 5 degrees a task
    uv run python benchmarks/large.py --stream [--tasks 1000]                          small digits, a long sequence

The first filters and smooths a few tasks of a network of about so many weights, and looks at every smoothed belief; results go
to benchmarks/results/large.csv. The second does so for many tasks of 1,810 weights, and notes the process's memory on the way
(results/stream.csv).
"""

from __future__ import annotations

import argparse
import math
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from conditions import machine
from csv_files import write_csv
from rich.progress import Progress

from ssm_nn.inference import (
    Filtered,
    LaplaceFilter,
    LowRank,
    Minibatch,
    OnDisk,
    Posterior,
    SketchedCurvature,
    prefetched,
)
from ssm_nn.models.datasets import load
from ssm_nn.models.networks import mlp
from ssm_nn.models.programs import classification
from ssm_nn.models.streams import rotated

NOISE = 0.03  # variance of a step, in units of the prior's
BATCH = 100


def main(arguments: list[str] | None = None) -> None:
    """Run one of the two, and write its table."""
    given = parsed(arguments)
    place = tempfile.TemporaryDirectory(dir=given.scratch, prefix="history-")
    with place as folder:
        rows = (stream if given.stream else large)(given, Path(folder))
    given.out.mkdir(parents=True, exist_ok=True)
    write_csv(given.out / ("stream.csv" if given.stream else "large.csv"), rows)
    for row in rows:
        print(
            "  ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
            )
        )


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Memory and time where weights or tasks are many.")
    parser.add_argument("--stream", action="store_true", help="many tasks of a small network")
    parser.add_argument(
        "--weights", type=int, default=10**7, help="about so many (default 10000000); not with --stream"
    )
    parser.add_argument("--rank", type=int, default=16, help="columns kept (default 16)")
    parser.add_argument("--tasks", type=int, help="default 5, with --stream 1000")
    parser.add_argument("--examples", type=int, help="a task; default 1000, with --stream 50")
    parser.add_argument("--scratch", type=Path, help="where the history lies meanwhile; default: the temporary folder")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    given = parser.parse_args(arguments)
    usual = {"tasks": 1000, "examples": 50} if given.stream else {"tasks": 5, "examples": 1000}
    for name, number in usual.items():
        if getattr(given, name) is None:
            setattr(given, name, number)
    for name, least in (("weights", 1000), ("rank", 1), ("tasks", 2), ("examples", 2)):
        if getattr(given, name) < least:
            parser.error(f"--{name} is {getattr(given, name)}; a whole number >= {least} is accepted")
    return given


def large(given: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One row: few tasks of many weights."""
    images = load("mnist")
    inputs = math.prod(images.train_x.shape[1:])
    width = width_of(inputs, images.num_classes, given.weights)
    tasks = rotated(images, given.tasks, train_size=given.examples, test_size=1).train
    # a variance of 1 / width keeps the outputs of the order of one
    program = classification(mlp((inputs, width, width, images.num_classes), "relu"), 1 / math.sqrt(width))
    search = Minibatch(optax.adam(1e-3), epochs=1, batch_size=min(BATCH, given.examples), prior_every=8)
    # as many random columns as the sketch of this rank needs, and half as many again
    curvature = SketchedCurvature(given.examples, column_batch=max(given.examples // (3 * (given.rank + 10)), 1))
    engine = LaplaceFilter(
        program, LowRank(given.rank), hypers={"noise.all": NOISE / width}, estimator=search, curvature=curvature
    )
    filtered, learning = learnt(engine, tasks, folder)
    began = time.perf_counter()
    posterior = engine.smooth(filtered)
    smoothing = time.perf_counter() - began
    return [
        {
            "weights": filtered.layout.size,
            "rank": given.rank,
            "tasks": given.tasks,
            "examples": given.examples,
            "first_task_seconds": learning[0],
            "later_task_seconds": float(np.median(learning[1:])),
            "smoothed_task_seconds": smoothing / (given.tasks - 1),
            "peak_gib": peak(),
            "disk_gib": on_disk(folder),
            "finite": finite(posterior),
            "conditions": machine(),
        }
    ]


def stream(given: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A row at each tenth of the tasks, and one after smoothing."""
    tasks = rotated(load("digits"), given.tasks, step=360 / given.tasks, train_size=given.examples, test_size=1).train
    program = classification(mlp((64, 24, 10)), 1.0)
    engine = LaplaceFilter(program, LowRank(given.rank), hypers={"noise.all": NOISE})
    rows: list[dict[str, Any]] = []

    def note(done: int, what: str, seconds: float) -> None:
        shared = {"rank": given.rank, "examples": given.examples, "conditions": machine()}
        memory = {"resident_gib": resident(), "peak_gib": peak(), "disk_gib": on_disk(folder)}
        rows.append({"tasks": done, "after": what, "seconds_a_task": seconds} | memory | shared)

    began = time.perf_counter()

    def noted(t: int) -> None:
        if (t + 1) % max(given.tasks // 10, 1) == 0:
            note(t + 1, "filtering", (time.perf_counter() - began) / (t + 1))

    filtered, _ = learnt(engine, tasks, folder, noted)
    began = time.perf_counter()
    posterior = engine.smooth(filtered)
    note(given.tasks, "smoothing", (time.perf_counter() - began) / (given.tasks - 1))
    ends = finite(posterior)
    return [{"weights": filtered.layout.size, "finite": ends} | row for row in rows]


def learnt(engine: LaplaceFilter, tasks: Any, folder: Path, noted: Any = None) -> tuple[Filtered, list[float]]:
    """All tasks, the next one read while one is learnt, and the seconds of each; what is written meanwhile counts."""
    seconds: list[float] = []
    with Progress() as progress:
        bar = progress.add_task("tasks", total=len(tasks))
        before = time.perf_counter()

        def show(t: int, state: Any, info: Any) -> None:
            nonlocal before
            del state, info
            seconds.append(time.perf_counter() - before)
            before = time.perf_counter()
            progress.update(bar, completed=t + 1)
            if noted is not None:
                noted(t)

        return engine.run(0, prefetched(tasks), show, OnDisk(folder)), seconds


def finite(posterior: Posterior) -> bool:
    """Whether all smoothed means and variances are, and no variance is negative."""
    variance = jax.jit(lambda precision: precision.variance())
    for belief in posterior.beliefs:
        spread = variance(belief.precision)
        if not (np.isfinite(belief.mean).all() and np.isfinite(spread).all() and (np.asarray(spread) > 0).all()):
            return False
    return True


def width_of(inputs: int, outputs: int, weights: int) -> int:
    """h of (inputs, h, h, outputs) with biases: ``h^2 + h (inputs + outputs + 2) + outputs = weights``."""
    linear = inputs + outputs + 2
    return max(round((-linear + math.sqrt(linear**2 + 4 * (weights - outputs))) / 2), 1)


def peak() -> float:
    """GiB of resident memory at most so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def resident() -> float:
    """GiB of resident memory now; of Linux's /proc, elsewhere the peak."""
    statistics = Path("/proc/self/statm")
    if not statistics.exists():
        return peak()
    return int(statistics.read_text().split()[1]) * resource.getpagesize() / 2**30


def on_disk(folder: Path) -> float:
    """GiB of the history."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**30


if __name__ == "__main__":
    main()
