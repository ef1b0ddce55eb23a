"""Simulation-based calibration: is an engine's posterior right on average over the program itself?

    theta* ~ p(theta),  D* ~ p(D | theta*),  theta^1 .. theta^L ~ q(theta | D*):   rank of f(theta*) among f(theta^l)

is uniform on 0 .. L for every f if q is the posterior. Source: Talts, Betancourt, Simpson, Vehtari, Gelman 2018, arXiv
1804.06788; a function f of parameters and data, such as the log likelihood, finds what the parameters alone do not (Modrak et
al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from ssm_nn.extraction import describe
from ssm_nn.inference.checks import check_count
from ssm_nn.inference.diagnosis.trajectories import log_joint, trajectories
from ssm_nn.inference.draws import _of_data, _prior_path, leaves_of_path
from ssm_nn.inference.smoothing import Smoothed
from ssm_nn.tasks import Task, Tasks, stack_tasks

if TYPE_CHECKING:
    import xarray

__all__ = ["SimulationCalibration", "simulation_based_calibration"]

Array = Any
Quantities = Callable[[dict[str, Array], Tasks], dict[str, Array]]

MOST_NUMBERS = 2000  # ranked by default; beyond, the user says which functions matter
FEWEST_SIMULATIONS = 20
LOG_LIKELIHOOD = "log_likelihood"


@dataclass(frozen=True)
class SimulationCalibration:
    """Ranks of the truth among a posterior's draws.

    Attributes:
        ranks: name -> (simulations, ...), whole numbers in 0 .. num_draws.
        num_draws: L.
    """

    ranks: dict[str, np.ndarray]
    num_draws: int

    @property
    def num_simulations(self) -> int:
        """How many data sets were simulated."""
        return len(next(iter(self.ranks.values())))

    @property
    def pit(self) -> dict[str, np.ndarray]:
        """(rank + u) / (L + 1), u uniform with a fixed seed: continuous and uniform on [0, 1] under calibration."""
        rng = np.random.default_rng(0)
        return {name: (rank + rng.uniform(size=rank.shape)) / (self.num_draws + 1) for name, rank in self.ranks.items()}

    def to_datatree(self) -> xarray.DataTree:
        """Group ``prior_sbc``: for ``az.plot_ecdf_pit(tree, group="prior_sbc", sample_dims=["sample"])``."""
        import xarray

        def dims(name: str, rank: int) -> list[str]:
            return ["sample", *[f"{name}_dim_{axis}" for axis in range(rank - 1)]]

        data = {name: (dims(name, value.ndim), value) for name, value in self.pit.items()}
        made = xarray.Dataset(data)
        # plots of several scalars ask for a coordinate of each dimension
        made = made.assign_coords({str(dim): np.arange(size) for dim, size in made.sizes.items()})
        return xarray.DataTree.from_dict({"/prior_sbc": made})

    @property
    def p_values(self) -> dict[str, np.ndarray]:
        """Of a test of uniformity of every scalar (ArviZ's pointwise test, Cauchy combination)."""
        import arviz  # noqa: F401  registers azstats

        tree = self.to_datatree()["prior_sbc"]
        return {name: np.asarray(tree[name].azstats.uniformity_test(dim=["sample"])[0]) for name in self.ranks}

    @property
    def p_value(self) -> float:
        """Of all scalars together: Bonferroni's bound, which holds however they depend on each other."""
        values = np.concatenate([np.ravel(value) for value in self.p_values.values()])
        return float(min(1.0, len(values) * values.min()))

    def coverage(self, probability: float = 0.9) -> dict[str, np.ndarray]:
        """Share of simulations whose truth lies in the central interval of that probability, by scalar."""
        if not 0 < probability < 1:
            raise ValueError(f"probability is {probability}; a number between 0 and 1 is accepted")
        return {name: np.mean(np.abs(2 * pit - 1) <= probability, axis=0) for name, pit in self.pit.items()}

    @property
    def message(self) -> str:
        """What the ranks say, in a sentence."""
        named = {name: value for name, value in self.pit.items() if name != LOG_LIKELIHOOD} or self.pit
        pit = np.concatenate([value.reshape(len(value), -1) for value in named.values()], axis=1)
        centres, spread = pit.mean(axis=0) - 0.5, pit.std() * np.sqrt(12)
        centre = centres[np.argmax(np.abs(centres))]
        told = f"p = {self.p_value:.2g} over {self.num_simulations} simulations"
        if self.p_value > 0.01:
            return f"calibrated as far as these simulations tell: {told}"
        if abs(centre) * np.sqrt(12 * len(pit)) > 4 and abs(centre) > abs(spread - 1):
            return f"biased: the truth lies {'above' if centre > 0 else 'below'} the draws too often, {told}"
        if spread > 1:
            return f"too confident: the truth lies outside the draws too often, {told}"
        return f"too cautious: the truth lies in the middle of the draws too often, {told}"


def simulation_based_calibration(
    engine: Any,
    tasks: Tasks | Iterable[Task | Mapping[str, Any]],
    *,
    num_simulations: int = 200,
    num_draws: int = 99,
    quantities: Quantities | None = None,
    observed: Mapping[str, str] | None = None,
    hypers: Mapping[str, Any] | None = None,
    fit: Callable[[int, list[Task]], Smoothed] | None = None,
    key: int = 0,
    file: Path | str | None = None,
    progress: bool = True,
) -> SimulationCalibration:
    """Simulate tasks from the engine's program, infer, and rank the truth; inputs, contexts and masks are those of ``tasks``.

    Args:
        engine: any engine with ``program``, ``hypers``, ``run`` and ``smooth``.
        tasks: whose inputs are kept and whose observed values are replaced.
        num_simulations: 20 at least; 200 see a posterior whose standard deviations are a fifth too small.
        num_draws: L of each posterior.
        quantities: (leaves of one trajectory, tasks) -> name -> array, traced; by default every weight, and the log likelihood.
            Weights of a network are not identified: pass its outputs.
        observed: observed site -> array of the tasks that holds its values, where the names differ.
        hypers: of the program that simulates; by default the engine's.
        fit: (seed, tasks) -> Posterior for engines without ``smooth``; by default ``engine.smooth(engine.run(seed, tasks))``.
        key: a seed; simulation i does not depend on how many there are.
        file: where ranks are stored (.npz) after each simulation; a run that was stopped goes on from there.
        progress: a progress bar.

    Raises:
        ValueError: too few simulations or draws, sites whose values no array of the tasks holds, too many weights to rank, a
            file of other settings.
    """
    check_count(num_simulations=num_simulations, num_draws=num_draws)
    if num_simulations < FEWEST_SIMULATIONS or num_draws < 9:
        raise ValueError(
            f"num_simulations is {num_simulations} and num_draws {num_draws}: too few to judge ranks by; at least "
            f"{FEWEST_SIMULATIONS} and 9 are accepted"
        )
    stack = stack_tasks(tasks)
    simulate = _Simulator(engine, stack, dict(engine.hypers if hypers is None else hypers), dict(observed or {}))
    if quantities is None:
        if len(stack) * simulate.layout.size > MOST_NUMBERS:
            raise ValueError(
                f"quantities is None, but there are {len(stack)} x {simulate.layout.size} weights; up to {MOST_NUMBERS} are "
                "ranked by default: pass a function of the weights, such as the network's outputs"
            )
        quantities = lambda leaves, _: leaves  # noqa: E731
    of_paths = _of_paths(simulate.layout, quantities)
    smoothed = fit or (lambda seed, listed: engine.smooth(engine.run(seed, listed)))
    stored = _Stored(file, num_draws, key)
    for i in track(range(stored.count, num_simulations), "calibrating", disable=not progress):
        truth, data = simulate(jax.random.fold_in(jax.random.key(key), i))
        posterior = smoothed(i, [data.at(t) for t in range(len(data))])
        drawn = np.concatenate([chunk.paths for chunk in trajectories(posterior, num_draws, i)])
        paths = np.concatenate([np.asarray(truth, np.float64)[None], drawn])
        values = {name: np.asarray(value) for name, value in of_paths(paths, data).items()}
        values[LOG_LIKELIHOOD] = np.sum(log_joint(posterior, data, paths)[1], axis=1)
        for name, value in values.items():
            if not np.isfinite(value).all():
                raise ValueError(f"quantities: {name!r} is not finite in simulation {i}")
        stored.add({name: np.sum(value[1:] < value[0], axis=0) for name, value in values.items()})
    return SimulationCalibration(stored.ranks(num_simulations), num_draws)


class _Simulator:
    """Draws of (weights, tasks) from the engine's program."""

    def __init__(self, engine: Any, stack: Tasks, hypers: dict[str, Any], observed: dict[str, str]):
        self.program, self.stack, self.observed = engine.program, stack, observed
        self.hypers = {name: jnp.asarray(value, jnp.result_type(value, float)) for name, value in hypers.items()}
        self.layout = describe(engine.program, stack.at(0), self.hypers)

    def __call__(self, key: Array) -> tuple[Array, Tasks]:
        path_key, data_key = jax.random.split(key)
        path = _prior_path(self.program, self.layout, self.hypers, self.stack, path_key)
        replicated, _, _ = _of_data(self.program, self.hypers, self.stack, path, data_key)
        data = dict(self.stack.data)
        for site, values in replicated.items():
            name = self.observed.get(site, site)
            if name not in data or jnp.shape(data[name]) != values.shape:
                raise ValueError(
                    f"observed names no array of the tasks that holds the values of the site {site!r}, of shape "
                    f"{values.shape}; the tasks have {sorted(data)}: pass observed={{{site!r}: name of the array}}"
                )
            # nan stands where an example is masked
            data[name] = jnp.where(jnp.isnan(values), data[name], values).astype(data[name].dtype)
        return path, Tasks(data, self.stack.context, self.stack.mask)


def _of_paths(layout: Any, quantities: Quantities) -> Callable[[np.ndarray, Tasks], dict[str, Array]]:
    @jax.jit
    def made(paths: Array, data: Tasks) -> dict[str, Array]:
        return jax.vmap(lambda path: quantities(leaves_of_path(layout, path), data))(paths)

    def of_paths(paths: np.ndarray, data: Tasks) -> dict[str, Array]:
        with jax.enable_x64(True):
            return made(jnp.asarray(paths), data)

    return of_paths


class _Stored:
    """Ranks so far, in memory and in a file."""

    def __init__(self, file: Path | str | None, num_draws: int, key: int):
        self.file = None if file is None else Path(file)
        self.settings = np.array([num_draws, key])
        self.rows: list[dict[str, np.ndarray]] = []
        if self.file is None or not self.file.exists():
            return
        with np.load(self.file) as kept:
            if not np.array_equal(kept["settings"], self.settings):
                found = kept["settings"].tolist()
                raise ValueError(
                    f"file {self.file} holds ranks with num_draws and key {found}, not {self.settings.tolist()}"
                )
            named = {name: kept[name] for name in kept.files if name != "settings"}
        self.rows = [{name: value[i] for name, value in named.items()} for i in range(len(next(iter(named.values()))))]

    @property
    def count(self) -> int:
        return len(self.rows)

    def add(self, row: dict[str, np.ndarray]) -> None:
        self.rows.append(row)
        if self.file is not None:
            part = self.file.with_name(self.file.name + ".part.npz")
            np.savez(part, allow_pickle=False, settings=self.settings, **self.ranks(self.count))
            part.replace(self.file)

    def ranks(self, count: int) -> dict[str, np.ndarray]:
        return {name: np.stack([row[name] for row in self.rows[:count]]) for name in self.rows[0]}
