"""Engines that learn parts of a network, judged by NUTS on the nearest program that they accept.

    uv run python benchmarks/parts_against_nuts.py [--seeds 0 1 2] [--draws 1000]

Visits of ``engines_against_nuts.py``: 6 of 20 noisy readings of a curve whose height drifts. ``head`` is its network 1-6-1
with the hidden layer fixed where the dense filter left it, so that only the output layer is unknown, and walks: the last-layer
engine. ``own`` shares the kernel of the hidden layer among all visits, and draws biases and output layer anew for each:
low-rank perturbation, whose own parameters are scales, factors and the drawn leaves. The dense filter learns both too.
k-hat is of a visit's own update, given the prediction (given the base, for the perturbation); the dense filter's trajectories
have one too. Distance, coverage and LOO are those of ``engines_against_nuts.py``, LOO of each engine's own draws. Rows go to
``<out>/parts.csv``; a run that was stopped goes on after the last finished seed.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import xarray
from csv_files import as_text, read_csv, write_csv
from drifting_curve import NOISE, visits_of
from engines_against_nuts import NEW, READINGS, VISITS, WALK, by_nuts, covered, parsed_of, program_of, shown
from rich.console import Console
from rich.progress import track

import ssm_nn
from ssm_nn import Task
from ssm_nn.extraction import extract
from ssm_nn.inference import Dense, FilterWarning, LaplaceFilter, Linearised, Minibatch, predict
from ssm_nn.inference.diagnosis import importance_weights, leave_one_out, log_likelihood_tree, loo_by_task
from ssm_nn.inference.diagnosis.importance import pareto_weights
from ssm_nn.inference.last_layer import Full, LastLayerFilter, head_datatree, program_head, smooth_head
from ssm_nn.inference.perturbation import Evidence, PerturbationFilter, posterior_of
from ssm_nn.models import OrnsteinUhlenbeck, RandomWalk, Static
from ssm_nn.models.networks import mlp

DRAWS = 1000
ENGINES: Mapping[str, str] = {"head": "last layer", "own": "low-rank perturbation"}
COLUMNS = ("khat", "task_khat", "distance", "covered", "seconds")


class Judged(NamedTuple):
    """What is asked of an engine: predictive means and variances (T, N) of new readings, and the columns of a row."""

    mean: np.ndarray
    variance: np.ndarray
    elpd: float
    khat: float | str
    task_khat: float


def main(arguments: list[str] | None = None) -> None:
    """Runs the seeds that are missing, and prints the table of all."""
    parsed = parsed_of(__doc__ or "", arguments)
    file = parsed.out / "parts.csv"
    rows = read_csv(file)
    for seed in track(parsed.seeds, "seeds", console=Console(stderr=True)):
        for kind in ENGINES:
            if not any(row["seed"] == str(seed) and row["program"] == kind for row in rows):
                rows += as_text(one_seed(kind, seed, parsed.draws))
                write_csv(file, rows)
    lines = summary_of(rows)
    write_csv(parsed.out / "parts-summary.csv", lines)
    Console().print(shown(lines, "engines of parts against NUTS: means over seeds"))


def fixed_below(visits: list[Any], seed: int) -> tuple[Any, dict[str, Any]]:
    """The output layer of 1-6-1 alone, as ``(apply, params)``; the hidden layer is that of the dense filter's last mean."""
    program = program_of(mlp((1, 6, 1), "tanh", seed=seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FilterWarning)
        filtered = LaplaceFilter(program, Dense()).run(seed, visits)
    arrays = filtered.layout.arrays(filtered.beliefs[-1].mean)["net"]
    kernel, bias = (np.asarray(arrays[f"layers.0.{name}"]) for name in ("kernel", "bias"))

    def apply(params: dict[str, Any], x: Any) -> Any:
        return jnp.tanh(x @ kernel + bias) @ params["kernel"] + params["bias"]

    return apply, {"kernel": jnp.zeros((6, 1)), "bias": jnp.zeros(1)}


def one_seed(kind: str, seed: int, num_draws: int) -> list[dict[str, Any]]:
    """NUTS, the dense filter and the engine on the program ``kind``."""
    visits, new = visits_of(seed, VISITS, READINGS, NEW)
    if kind == "head":
        network, kernel = fixed_below(visits, seed), RandomWalk(WALK)
    else:
        network = mlp((1, 6, 1), "tanh", seed=seed)
        kernel = ssm_nn.ByPath({"layers.0.kernel": Static()}, otherwise=OrnsteinUhlenbeck(0.0))
    program = program_of(network, kernel)
    samples, functions, nuts = by_nuts(program, network, visits, new, seed, num_draws)
    mean, sd = functions.mean(0), np.sqrt(functions.var(0) + NOISE**2)
    rows = [{"program": kind, "seed": seed} | nuts]
    methods = {"dense": by_dense_filter, ENGINES[kind]: by_last_layer if kind == "head" else by_perturbation}
    for name, method in methods.items():
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FilterWarning)
            found, posterior = method(program, visits, new, seed)
        row = {"program": kind, "seed": seed, "engine": name, "khat": found.khat, "task_khat": found.task_khat}
        apart = np.square(found.mean - mean) + np.square(np.sqrt(found.variance) - sd)
        row |= {"distance": float(np.mean(np.sqrt(apart) / sd)), "covered": covered(found.mean, found.variance, new)}
        rows.append(row | {"elpd": found.elpd, "seconds": time.perf_counter() - began})
        if name == "dense":
            rows[0]["elpd"] = loo_by_task(log_likelihood_tree(posterior, samples, visits)).elpd
    return rows


def by_dense_filter(program: Any, visits: list[Any], new: list[Any], seed: int) -> tuple[Judged, Any]:
    """The whole belief, smoothed."""
    engine = LaplaceFilter(program, Dense())
    posterior = engine.smooth(engine.run(seed, visits))
    weights = importance_weights(posterior, visits, key=seed)
    found = [predict(posterior, t, {"x": visit["x"]}, key=seed)["y"] for t, visit in enumerate(new)]
    elpd = leave_one_out(posterior, visits, key=seed).elpd
    return Judged(*_both(found), elpd, weights.khat, float(np.median(weights.task_khat))), posterior


def by_last_layer(program: Any, visits: list[Any], new: list[Any], seed: int) -> tuple[Judged, Any]:
    """The walking head, smoothed."""
    engine = LastLayerFilter(program_head(program, visits[0]), Full())
    state, khats = engine.init(), []
    for t, visit in enumerate(visits):
        before = engine.advance(state) if t else state
        state, _ = engine.update(state, visit)
        khats.append(_of_head(engine, before, state, visit, seed + t))
    path = smooth_head(engine, state)
    steps = zip(path.means, path.beliefs, new, strict=True)
    found = [engine.predict(state._replace(mean=m, belief=b), {"x": visit["x"]}) for m, b, visit in steps]
    elpd = loo_by_task(head_datatree(engine, state, num_samples=DRAWS, key=seed, tasks=visits)).elpd
    return Judged(*_both(found), elpd, "", float(np.median(khats))), state


def _of_head(engine: LastLayerFilter, before: Any, after: Any, visit: Any, seed: int) -> float:
    """k-hat of one update: its belief as proposal for prediction times likelihood, in float64."""
    features, y = np.asarray(engine.features(visit), np.float64), np.asarray(visit["y"], np.float64)
    mean, old = (np.asarray(state.mean, np.float64)[0] for state in (after, before))
    covariance, wide = (np.asarray(state.belief.matrix, np.float64) for state in (after, before))
    shift = np.random.default_rng(seed).normal(size=(DRAWS, len(mean))) @ np.linalg.cholesky(covariance).T
    log_likelihood = -0.5 * np.sum(np.square((y - (mean + shift) @ features.T) / NOISE), axis=1)
    ahead, own = mean + shift - old, np.linalg.inv(covariance)
    log_prior = -0.5 * np.einsum("sd,de,se->s", ahead, np.linalg.inv(wide), ahead)
    return pareto_weights(log_likelihood + log_prior + 0.5 * np.einsum("sd,de,se->s", shift, own, shift)).khat


def by_perturbation(program: Any, visits: list[Any], new: list[Any], seed: int) -> tuple[Judged, Any]:
    """Visits with their identity, and Laplace's diagonal belief over each one's own parameters."""
    tasks = [
        Task({k: jnp.asarray(v) for k, v in visit.items()}, {"task": np.int32(t)}) for t, visit in enumerate(visits)
    ]
    fitted = Minibatch(optax.adam(1e-2), epochs=1000, batch_size=READINGS)
    engine = PerturbationFilter(program, minibatch=fitted, warm_up_epochs=300, allocation=Evidence())
    state, infos = engine.run(seed, tasks)
    posterior = posterior_of(engine, state, tasks, infos, key=seed)
    found = []
    for t, (belief, visit) in enumerate(zip(posterior.beliefs, new, strict=True)):
        found.append(engine.predict(state, {"x": visit["x"]}, identity=t, belief=belief, method=Linearised(DRAWS))["y"])
    pairs = zip(posterior.beliefs, tasks, strict=True)
    khats = [_of_own(program, belief, task, seed) for belief, task in pairs]
    elpd = loo_by_task(_linearised(network_of(program, tasks[0]), posterior, tasks, seed)).elpd
    return Judged(*_both(found), elpd, "", float(np.median(khats))), posterior


def _linearised(outputs: Callable[[Any, Any], Any], posterior: Any, tasks: list[Task], seed: int) -> xarray.DataTree:
    """Log likelihoods of the network linearised at each visit's mean, as ``leave_one_out`` takes them of a whole path."""
    by_task = []
    for t, (belief, task) in enumerate(zip(posterior.beliefs, tasks, strict=True)):
        at_mean, push = jax.linearize(lambda theta, x=task["x"]: outputs(theta, x), belief.mean)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), t), DRAWS)
        drawn = at_mean + jax.lax.map(lambda key, b=belief, p=push: p(b.precision.sample(key)), keys)
        by_task.append(np.asarray(dist.Normal(drawn, NOISE).log_prob(task["y"])))
    values = np.stack(by_task, axis=1)[None]
    made = xarray.Dataset({"y": (("chain", "draw", "task", "example"), values)})
    return xarray.DataTree.from_dict({"/log_likelihood": made})


def network_of(program: Any, task: Task) -> Callable[[Any, Any], Any]:
    """(theta, x) -> outputs (N,)."""
    net, layout = extract(program, task, {}).body.networks[0], extract(program, task, {}).layout
    return lambda theta, x: net.network.bind(layout.arrays(theta)[net.name])(x)[:, 0]


def _of_own(program: Any, belief: Any, task: Task, seed: int) -> float:
    """k-hat of one visit's belief over its own parameters z: proposal for p(D_t | W(base, z)) p(z)."""
    known = belief.precision
    kind, around = known.kind, known.around
    task = Task(task.data, task.context, jnp.ones(task.num_examples, bool))

    @jax.jit
    def ratio(key: Any) -> Any:
        noise = known.own_noise(key)
        z = jax.tree.map(jnp.add, known.own, known.own_shift(noise))
        log_target = kind.log_likelihood(extract(program, task, around.hypers), z, around, task)
        return log_target - kind.penalty(z, around) + 0.5 * jnp.sum(jnp.square(noise))

    return pareto_weights(np.asarray(jax.lax.map(ratio, jax.random.split(jax.random.key(seed), DRAWS)))).khat


def _both(found: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    shape = len(found), -1
    return tuple(np.stack([getattr(f, name) for f in found]).reshape(shape) for name in ("mean", "variance"))


def summary_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a program and engine: means over seeds; LOO as the difference to NUTS, in nats, its largest size beside it."""
    nuts = {(row["program"], row["seed"]): row for row in rows if row["engine"] == "NUTS"}
    lines = []
    for kind, engine in ENGINES.items():
        for name in ("NUTS", "dense", engine):
            own = [row for row in rows if (row["program"], row["engine"]) == (kind, name)]
            if not own:
                continue
            line: dict[str, Any] = {"program": kind, "engine": name, "seeds": len(own)}
            for column in COLUMNS:
                values = [float(row[column]) for row in own if row[column] and np.isfinite(float(row[column]))]
                line[column] = float(np.mean(values)) if values else np.nan
            away = np.array([float(row["elpd"]) - float(nuts[kind, row["seed"]]["elpd"]) for row in own])
            line |= {"loo_minus_nuts": float(away.mean()), "loo_at_most_away": float(np.abs(away).max())}
            worst = max(float(row["r_hat"]) for (where, _), row in nuts.items() if where == kind)
            lines.append(line | {"largest_r_hat": worst if name == "NUTS" else np.nan})
    return lines


if __name__ == "__main__":
    main()
