"""Which noise of the weights' walk: one for all layers, one for each by a grid, by the evidence's gradient, or by EM?

    python benchmarks/kernel_choice.py [digits mnist fashion-mnist] [--seeds 0 1 2 3 4]

Images turned 5 degrees further each task, 50 labels a task, 10 tasks; diagonal plus low rank. Every choice is made on the
training labels of the stream alone. Judged are its evidence, and what filter and smoother say of each task's test images,
at their mean weights and (``averaged``) over the belief. Writes ``results/kernel_choice.csv``, a line a choice,
``-tasks.csv``, a line a task of it, and ``-summary.csv``; begun runs go on after the last finished seed.
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from csv_files import as_text, read_csv, write_csv
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ssm_nn.inference import AtMean, FilterWarning, LaplaceFilter, Linearised, LowRank, predict
from ssm_nn.inference.evidence_gradient import maximise_evidence
from ssm_nn.inference.expectation_maximisation import learn_kernel
from ssm_nn.inference.metrics import accuracy, nll
from ssm_nn.models.datasets import load
from ssm_nn.models.networks import mlp
from ssm_nn.models.programs import classification
from ssm_nn.models.streams import TaskStream, rotated

OUT = Path(__file__).parent / "results"
GROUPS = {"first": "layers.0.*", "last": "layers.1.*"}
NOISES = (0.0, 0.1, 0.5, 2.0)  # variances of a step, over a prior variance of PRIOR_SCALES squared
PRIOR_SCALES = {"digits": 1.0, "mnist": 0.3, "fashion-mnist": 0.3}  # hundreds of inputs, not 64
START = 0.1  # of the gradient and of EM, over the prior variance
FURTHER_STARTS = ((0.1, 1.0),)  # of the gradient: first and last layer
STEPS = 30  # of the gradient, from each start
RANK, HIDDEN, LABELS, STEP = 100, 24, 50, 5.0
STATIC, SINGLE, GRID, GRADIENT, EM = "static", "single", "grid", "gradient", "em"
ROUNDING = 0.05  # nats
SHOWN = ("first", "last", "log_evidence")
SHOWN += tuple(f"{view}_{m}" for view in ("filtered", "smoothed") for m in ("accuracy", "nll", "averaged_nll"))
Row = dict[str, Any]
Chosen = tuple[Mapping[str, Any], float]  # hyper-parameters, seconds


def main(arguments: list[str] | None = None) -> None:
    """Runs what is missing, and prints the table of all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("datasets", nargs="*", default=["digits"], choices=list(PRIOR_SCALES), metavar="dataset")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--noises", type=float, nargs="+", default=NOISES, help="of the grid, 0 among them")
    parser.add_argument("--out", type=Path, default=OUT)
    parsed = parser.parse_args(arguments)
    if 0.0 not in parsed.noises:
        parser.error(f"--noises is {parsed.noises}; 0 is wanted among them: it is the static model")
    parsed.out.mkdir(parents=True, exist_ok=True)
    files = [parsed.out / name for name in ("kernel_choice.csv", "kernel_choice-tasks.csv")]
    choices, tasks = (read_csv(file) for file in files)
    cells = list(itertools.product(parsed.datasets, parsed.seeds))
    with Progress(console=Console(stderr=True)) as bar:
        for dataset, seed in bar.track(cells, description="seeds"):
            if any(row["dataset"] == dataset and row["seed"] == str(seed) for row in choices):
                continue
            stream = rotated(load(dataset), parsed.tasks, step=STEP, train_size=LABELS, seed=seed)
            here, judged = one_seed(dataset, seed, stream, parsed.noises, bar)
            choices += as_text(here)
            tasks += as_text(judged)
            for file, rows in zip(files, (choices, tasks), strict=True):
                write_csv(file, rows)
    lines = summary_of(choices, tasks)
    write_csv(parsed.out / "kernel_choice-summary.csv", lines)
    for dataset in dict.fromkeys(line["dataset"] for line in lines):
        Console().print(shown(dataset, [line for line in lines if line["dataset"] == dataset]))


def one_seed(
    dataset: str, seed: int, stream: TaskStream, noises: tuple[float, ...], bar: Progress
) -> tuple[list[Row], list[Row]]:
    """A line a choice, and a line a task of it."""
    variance = PRIOR_SCALES[dataset] ** 2
    engine = engine_of(stream, seed, PRIOR_SCALES[dataset])
    tasks = [stream.train[t] for t in range(len(stream))]

    def at(first: float, last: float) -> Mapping[str, Any]:
        return {"noise.first": first * variance, "noise.last": last * variance}

    grid, began = {}, time.perf_counter()
    pairs = list(itertools.product(noises, noises))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FilterWarning)  # counted below
        for pair in bar.track(pairs, description=f"{dataset} {seed}: grid"):
            grid[pair] = engine.with_hypers(at(*pair)).run(seed, tasks).log_evidence
        spent = time.perf_counter() - began
        equal = [pair for pair in pairs if pair[0] == pair[1]]

        def best(of: list[tuple[float, float]]) -> Chosen:
            return at(*max(of, key=grid.__getitem__)), spent * len(of) / len(pairs)

        start = engine.with_hypers(at(START, START))
        chosen: dict[str, Chosen] = {
            STATIC: (at(0.0, 0.0), spent / len(pairs)),
            SINGLE: best(equal),
            GRID: best(pairs),
            GRADIENT: _timed(lambda: by_gradient(start, [at(*pair) for pair in FURTHER_STARTS], tasks, seed)),
            EM: _timed(
                lambda: learn_kernel(start, tasks, {f"noise.{k}": v for k, v in GROUPS.items()}, key=seed).hypers
            ),
        }
        lines, judged = [], []
        for name, (hypers, seconds) in chosen.items():
            line, rows = judge(engine.with_hypers(hypers), stream, tasks, seed)
            named = {"dataset": dataset, "seed": seed, "choice": name}
            noise = {key: float(hypers[f"noise.{key}"]) / variance for key in GROUPS}
            lines.append(named | noise | line | {"seconds": round(seconds, 2)})
            judged += [named | row for row in rows]
    return lines, judged


def by_gradient(
    start: LaplaceFilter, further: Sequence[Mapping[str, Any]], tasks: list[Any], seed: int
) -> Mapping[str, Any]:
    """Adam on the logarithms, and 0 for the noise of each layer where the evidence prefers it."""
    return maximise_evidence(start, tasks, list(start.hypers), starts=further, steps=STEPS, key=seed).hypers


def engine_of(stream: TaskStream, seed: int, prior_scale: float) -> LaplaceFilter:
    """One hidden layer of tanh; a noise for each layer."""
    size = int(np.prod(stream.input_shape))
    assert stream.num_classes is not None
    network = mlp((size, HIDDEN, stream.num_classes), "tanh", seed=seed)
    hypers = {f"noise.{name}": START for name in GROUPS}
    return LaplaceFilter(classification(network, prior_scale, GROUPS), LowRank(RANK), hypers=hypers)


def judge(engine: LaplaceFilter, stream: TaskStream, tasks: list[Any], seed: int) -> tuple[Row, list[Row]]:
    """Evidence, MAP searches that did not converge, and a row a task."""
    filtered = engine.run(seed, tasks)
    smoothed = engine.smooth(filtered)
    rows = []
    for t in range(len(tasks)):
        test, row = stream.test[t], {"task": t}
        for view, beliefs in (("filtered", filtered), ("smoothed", smoothed)):
            at_mean, averaged = (
                predict(beliefs, t, {"x": test["x"]}, method=method, key=seed)["y"].probabilities
                for method in (AtMean(), Linearised())
            )
            row |= {f"{view}_accuracy": accuracy(at_mean, test["y"]), f"{view}_nll": nll(at_mean, test["y"])}
            row[f"{view}_averaged_nll"] = nll(averaged, test["y"])
        rows.append(row)
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0] if name != "task"}
    unconverged = sum(not info.converged for info in filtered.infos)
    return {"log_evidence": filtered.log_evidence, **means, "unconverged": unconverged}, rows


def _timed(choose: Callable[[], Mapping[str, Any]]) -> Chosen:
    began = time.perf_counter()
    return choose(), time.perf_counter() - began


def summary_of(choices: list[Row], tasks: list[Row]) -> list[Row]:
    """A line a data set and choice: means over seeds, and in how many seeds, or tasks of a seed, it is above another."""
    lines = []
    for dataset in dict.fromkeys(row["dataset"] for row in choices):
        by = {(row["choice"], row["seed"]): row for row in choices if row["dataset"] == dataset}
        seeds = list(dict.fromkeys(seed for _, seed in by))
        for name in (STATIC, SINGLE, GRID, GRADIENT, EM):
            own = [by[name, seed] for seed in seeds]

            def gains(column: str, other: str, own: list[Row] = own, by: Any = by) -> list[float]:
                return [float(row[column]) - float(by[other, row["seed"]][column]) for row in own]

            line: Row = {"dataset": dataset, "choice": name, "seeds": len(seeds)}
            for column in (*SHOWN, "seconds"):
                line[column] = float(np.mean([float(row[column]) for row in own]))
            for other in (STATIC, SINGLE):
                line[f"evidence_above_{other}"] = sum(gain > 0 for gain in gains("log_evidence", other))
                line[f"nll_below_{other}"] = sum(gain < 0 for gain in gains("smoothed_nll", other))
            line["at_least_the_grid"] = sum(gain >= -ROUNDING for gain in gains("log_evidence", GRID))
            of_tasks = [row for row in tasks if row["dataset"] == dataset and row["choice"] == name]
            for metric, sign in (("nll", -1), ("accuracy", 1)):
                helped = [
                    sign * (float(r[f"smoothed_{metric}"]) - float(r[f"filtered_{metric}"])) > 0 for r in of_tasks
                ]
                line[f"tasks_smoothing_helps_{metric}"] = len(of_tasks) / len(seeds) * float(np.mean(helped))
            lines.append(line)
    return lines


def shown(dataset: str, lines: list[Row]) -> Table:
    """The summary of a data set, a column a choice."""
    table = Table(title=f"{dataset}, drifting rotation, 50 labels a task: means over {lines[0]['seeds']} seeds")
    table.add_column("")
    for line in lines:
        table.add_column(line["choice"], justify="right")
    for name in lines[0]:
        if name not in ("dataset", "choice", "seeds"):
            values = (line[name] for line in lines)
            table.add_row(name.replace("_", " "), *(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values))
    return table


if __name__ == "__main__":
    main()
