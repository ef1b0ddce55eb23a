"""A small drifting network by every engine, judged by NUTS on the same program.

    uv run python benchmarks/engines_against_nuts.py [--seeds 0 1 2] [--draws 1000]

Network 1-6-1 (tanh) whose output layer walks, 6 visits of 20 noisy readings of a curve whose height drifts. Judged are k-hat of
the trajectory and of each visit's own update, the distance of predictions to those of NUTS (W2 in NUTS' standard deviations),
coverage of 90 % intervals for new readings, and PSIS-LOO of linearised predictions. NUTS runs two chains; it is said where
their predictions have not mixed. Rows go to ``<out>/engines.csv``; a run that was stopped goes on after the last finished seed.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from csv_files import as_text, read_csv, write_csv
from drifting_curve import NOISE, visits_of
from numpyro.diagnostics import gelman_rubin
from numpyro.infer import MCMC, NUTS
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import norm

import ssm_nn
from ssm_nn.inference import Dense, Diagonal, FilterWarning, Kronecker, LaplaceFilter, LowRank, predict
from ssm_nn.inference.diagnosis import (
    functional_distance,
    importance_weights,
    leave_one_out,
    log_likelihood_tree,
    loo_by_task,
)
from ssm_nn.inference.mean_field import MeanFieldFilter, filter_path, smooth_path
from ssm_nn.models import RandomWalk, Static
from ssm_nn.models.networks import mlp
from ssm_nn.networks import as_network

OUT = Path(__file__).parent / "results" / "diagnosis"
VISITS, READINGS, NEW, WALK, LEVEL = 6, 20, 200, 0.25, 0.9
WALKING = ssm_nn.ByPath({"layers.0.*": Static(), "layers.1.*": RandomWalk(WALK)})
ENGINES: Mapping[str, Any] = {
    "dense": Dense(),
    "low rank 20": LowRank(20),
    "low rank 5": LowRank(5),
    "diagonal": Diagonal(),
    "Kronecker": Kronecker(),
    "mean field": None,
}


def main(arguments: list[str] | None = None) -> None:
    """Runs the seeds that are missing, and prints the table of all."""
    parsed = parsed_of(__doc__ or "", arguments)
    file = parsed.out / "engines.csv"
    rows = read_csv(file)
    for seed in track(parsed.seeds, "seeds", console=Console(stderr=True)):
        if not any(row["seed"] == str(seed) for row in rows):
            rows += as_text(one_seed(seed, parsed.draws))
            write_csv(file, rows)
    lines = summary_of(rows)
    write_csv(parsed.out / "engines-summary.csv", lines)
    Console().print(shown(lines))


def parsed_of(words: str, arguments: list[str] | None) -> argparse.Namespace:
    """Seeds, draws and folder of results, which is made; ``words`` open with what the command does."""
    parser = argparse.ArgumentParser(description=words.split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--draws", type=int, default=1000, help="of each chain, after as many of warm-up")
    parser.add_argument("--out", type=Path, default=OUT)
    parsed = parser.parse_args(arguments)
    parsed.out.mkdir(parents=True, exist_ok=True)
    return parsed


def program_of(network: Any, kernel: Any = WALKING) -> Callable[[Any], None]:
    """Readings of the network with normal noise; by default the output layer walks, and the hidden one stands still."""

    def program(tasks: Any) -> None:
        net = ssm_nn.weights("net", network, prior=dist.Normal(0.0, 1.0), transition=kernel, num_tasks=len(tasks))

        def observe(f: Any, task: Any) -> None:
            with numpyro.plate("readings", task["x"].shape[0]):
                numpyro.sample("y", dist.Normal(f(task["x"])[:, 0], NOISE), obs=task.get("y"))

        net.over(tasks, observe)

    return program


class Reference(NamedTuple):
    """NUTS on a program: its draws by site, its functions (S, T, N) at the new inputs, and the columns of its row."""

    samples: dict[str, np.ndarray]
    functions: np.ndarray
    row: dict[str, Any]


def by_nuts(program: Any, network: Any, visits: list[Any], new: list[Any], seed: int, num_draws: int) -> Reference:
    """Two chains, each of ``num_draws`` after as many of warm-up."""
    began = time.perf_counter()
    sampler = NUTS(program, target_accept_prob=0.9)
    chains = {"num_chains": 2, "chain_method": "vectorized", "progress_bar": False}
    mcmc = MCMC(sampler, num_warmup=num_draws, num_samples=num_draws, **chains)
    mcmc.run(jax.random.key(seed), ssm_nn.stack_tasks(visits))
    samples = {name: np.asarray(value) for name, value in mcmc.get_samples().items()}
    seconds = time.perf_counter() - began
    functions = outputs_of(network, samples, new)
    row = {"engine": "NUTS", "khat": "", "task_khat": "", "distance": 0.0, "seconds": seconds}
    row["covered"] = covered(functions.mean(0), functions.var(0) + NOISE**2, new)
    row["r_hat"] = float(np.max(gelman_rubin(functions.reshape(2, -1, *functions.shape[1:]))))
    return Reference(samples, functions, row)


def one_seed(seed: int, num_draws: int) -> list[dict[str, Any]]:
    """NUTS, and a row an engine."""
    network = mlp((1, 6, 1), "tanh", seed=seed)
    program = program_of(network)
    visits, new = visits_of(seed, VISITS, READINGS, NEW)
    samples, _, row = by_nuts(program, network, visits, new, seed, num_draws)
    row = {"seed": seed} | row
    rows = [row]
    for name, structure in ENGINES.items():
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FilterWarning)  # what it costs is in the row
            if structure is None:
                posterior = by_mean_field(program, visits, seed)
            else:
                engine = LaplaceFilter(program, structure)
                posterior = engine.smooth(engine.run(seed, visits))
        seconds = time.perf_counter() - began
        if "elpd" not in row:
            row["elpd"] = loo_by_task(log_likelihood_tree(posterior, samples, visits)).elpd
        found = [predict(posterior, t, {"x": visit["x"]}, key=seed)["y"] for t, visit in enumerate(new)]
        weights = importance_weights(posterior, visits, key=seed)
        rows.append(
            {
                "seed": seed,
                "engine": name,
                "khat": weights.khat,
                "task_khat": float(np.median(weights.task_khat)),
                "distance": float(np.mean(functional_distance(posterior, samples, new, key=seed).w2)),
                "covered": covered(np.stack([f.mean for f in found]), np.stack([f.variance for f in found]), new),
                "elpd": leave_one_out(posterior, visits, key=seed).elpd,
                "seconds": seconds,
            }
        )
    return rows


def by_mean_field(program: Any, visits: list[Any], seed: int) -> Any:
    """One update a visit: the engine is made for long streams, and reads every example once."""
    return smooth_path(filter_path(MeanFieldFilter(program), seed, visits))


def outputs_of(network: Any, samples: Mapping[str, np.ndarray], new: list[Any]) -> np.ndarray:
    """(S, T, N): NUTS' functions at the new inputs; a still weight has one place for all tasks."""
    bind = as_network(network).bind
    outputs = jax.jit(jax.vmap(lambda arrays, x: bind(arrays)(x)[:, 0], in_axes=(0, None)))
    by_task = []
    for t, visit in enumerate(new):
        here = {name.removeprefix("net."): value[:, min(t, value.shape[1] - 1)] for name, value in samples.items()}
        by_task.append(np.asarray(outputs(here, visit["x"])))
    return np.stack(by_task, axis=1)


def covered(mean: np.ndarray, variance: np.ndarray, new: list[Any]) -> float:
    """Share of the new readings in their central interval."""
    y = np.stack([visit["y"] for visit in new])
    return float(np.mean(np.abs(y - mean) < norm.ppf(0.5 + LEVEL / 2) * np.sqrt(variance)))


def summary_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line an engine: means over seeds; LOO as the difference to NUTS, in nats, its largest size beside it."""
    nuts = {row["seed"]: row for row in rows if row["engine"] == "NUTS"}
    lines = []
    for name in ("NUTS", *ENGINES):
        own = [row for row in rows if row["engine"] == name]
        line: dict[str, Any] = {"engine": name, "seeds": len(own)}
        for column in ("khat", "task_khat", "distance", "covered", "seconds"):
            values = [float(row[column]) for row in own if row[column]]
            line[column] = float(np.mean(values)) if values else np.nan
        away = np.array([float(row["elpd"]) - float(nuts[row["seed"]]["elpd"]) for row in own])
        line |= {"loo_minus_nuts": float(away.mean()), "loo_at_most_away": float(np.abs(away).max())}
        line["largest_r_hat"] = max(float(row["r_hat"]) for row in nuts.values()) if name == "NUTS" else np.nan
        lines.append(line)
    return lines


def shown(lines: list[dict[str, Any]], title: str = "engines against NUTS: means over seeds") -> Table:
    """The summary."""
    table = Table(title=title)
    for column in lines[0]:
        table.add_column(column.replace("_", " "), justify="left" if column in ("program", "engine") else "right")
    for line in lines:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in line.values()))
    return table


if __name__ == "__main__":
    main()
