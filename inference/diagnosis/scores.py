"""What a posterior's predictions are worth, task by task: leave-one-out, and one task ahead.

elpd_t  = sum_n log p(y_n | D without n)      PSIS-LOO over the draws, of the linearised network
ahead_t = log p(D_t | D_1 .. D_{t-1})         the evidence, and example by example log p(y_n | D_1 .. D_{t-1})
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ssm_nn.inference.beliefs import Filtered
from ssm_nn.inference.diagnosis.ahead import predicted_beliefs
from ssm_nn.inference.diagnosis.importance import check_draws
from ssm_nn.inference.diagnosis.trajectories import (
    checked_tasks,
    example_log_likelihood,
    paths_of_samples,
    trajectories,
)
from ssm_nn.inference.predictive import LINEARISED, AtMean, Method, ThroughNetwork, predict_from
from ssm_nn.inference.smoothing import Smoothed
from ssm_nn.tasks import Task, Tasks

if TYPE_CHECKING:
    import xarray

__all__ = ["LeaveOneOut", "Prequential", "leave_one_out", "log_likelihood_tree", "loo_by_task", "prequential"]

Array = Any


@dataclass(frozen=True)
class LeaveOneOut:
    """PSIS-LOO of one posterior.

    Attributes:
        elpd: expected log predictive density in nats, over all points; ``se`` its standard error.
        by_task: (T,), nan for tasks without data.
        pareto_k: (points,), and ``task`` (points,), the task of each.
        tree: groups posterior (of no weights) and log_likelihood by chain, draw and point: for ``az.loo``, ``az.compare``.
    """

    elpd: float
    se: float
    by_task: np.ndarray
    pareto_k: np.ndarray
    task: np.ndarray
    tree: xarray.DataTree


def leave_one_out(
    posterior: Smoothed,
    tasks: Tasks | Iterable[Task | Mapping[str, Any]],
    *,
    num_samples: int = 1000,
    key: int = 0,
) -> LeaveOneOut:
    """PSIS-LOO of every example under the linearised network; draws are taken as draws of the posterior.

    Args:
        posterior: what ``LaplaceFilter.smooth`` returned.
        tasks: its tasks.
        num_samples: at least 100.
        key: a seed.

    Raises:
        ValueError: too few draws, tasks of another posterior.
    """
    check_draws(num_samples)
    stack, _ = checked_tasks(posterior, tasks)
    chunks = [
        example_log_likelihood(posterior, stack, chunk.paths, linearised=True)
        for chunk in trajectories(posterior, num_samples, key)
    ]
    densities = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    return _loo({name: value[None] for name, value in densities.items()}, len(stack))


def loo_by_task(tree: Any) -> LeaveOneOut:
    """PSIS-LOO of a DataTree, of an engine or of NUTS: its group log_likelihood by chain, draw, task and example.

    The tree of an engine has the network's own likelihoods at draws of the weights. Those are what NUTS is judged by; of the
    linearised network, which a Laplace posterior belongs to, ``leave_one_out`` makes them.

    Masked examples (nan) do not count, nor do variables without a task axis, such as hyper-parameters that were fixed by
    ``condition`` and are logged as observed.

    Raises:
        ValueError: without log likelihoods by task, or with too few draws.
    """
    if "log_likelihood" not in getattr(tree, "children", {}):
        raise ValueError(
            "tree has no group log_likelihood; make it with posterior.to_datatree(tasks=tasks), or add it to NUTS draws with "
            "log_likelihood_tree(posterior, samples, tasks)"
        )
    group = tree["log_likelihood"].to_dataset()
    values = {}
    for name, array in group.data_vars.items():
        if "task" not in array.dims:
            continue
        kept = array.transpose("chain", "draw", "task", ...)
        values[str(name)] = np.asarray(kept.values, np.float64).reshape((*kept.shape[:3], -1))
    if not values:
        raise ValueError(f"tree's group log_likelihood has {list(group.data_vars)}, none of them by task")
    first = next(iter(values.values()))
    check_draws(first.shape[0] * first.shape[1])
    return _loo(values, first.shape[2])


def no_scores(num_tasks: int) -> LeaveOneOut:
    """Of a posterior whose draws are not finite."""
    import xarray

    empty = np.zeros((1, 0, 0))
    dims = ("chain", "draw", "point")
    tree = {"/log_likelihood": xarray.Dataset({"y": (dims, empty)}), "/posterior": xarray.Dataset()}
    nothing = np.full(num_tasks, np.nan)
    return LeaveOneOut(np.nan, np.nan, nothing, np.zeros(0), np.zeros(0, int), xarray.DataTree.from_dict(tree))


def _loo(values: Mapping[str, np.ndarray], num_tasks: int) -> LeaveOneOut:
    """From site -> (chain, draw, task, point), nan where masked."""
    import arviz
    import xarray

    parts, task = [], []
    for value in values.values():
        counted = ~np.isnan(value).any(axis=(0, 1))
        parts.append(value[:, :, counted])
        task.append(np.nonzero(counted)[0])
    joined, of_task = np.concatenate(parts, axis=2), np.concatenate(task)
    dims = ("chain", "draw", "point")
    coords = {"chain": np.arange(joined.shape[0]), "draw": np.arange(joined.shape[1]), "task": ("point", of_task)}
    tree = xarray.DataTree.from_dict(
        {
            "/log_likelihood": xarray.Dataset({"y": (dims, joined)}, coords=coords),
            "/posterior": xarray.Dataset(
                {"log_density": (dims[:2], joined.sum(axis=2))}, coords={"chain": coords["chain"]}
            ),
        }
    )
    found = _quietly(lambda: arviz.loo(tree, pointwise=True, reff=1.0))
    elpd = np.asarray(found.elpd_i)
    by_task = np.array([elpd[of_task == t].sum() if (of_task == t).any() else np.nan for t in range(num_tasks)])
    return LeaveOneOut(float(found.elpd), float(found.se), by_task, np.asarray(found.pareto_k), of_task, tree)


def _quietly(call: Any) -> Any:
    """Without the warning about k-hat, which is an attribute of the result and a light of the diagnosis."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Estimated shape parameter of Pareto distribution")
        return call()


def log_likelihood_tree(
    posterior: Smoothed, samples: Mapping[str, Array], tasks: Tasks | Iterable[Task | Mapping[str, Any]]
) -> xarray.DataTree:
    """Log likelihoods of NUTS draws through the network itself, as ``loo_by_task`` and ``compare`` read them.

    Args:
        posterior: of the same program: it says how the weights lie, and at which hyper-parameters.
        samples: site -> (S, T, *leaf), as ``MCMC.get_samples()`` gives them.
        tasks: the tasks.
    """
    import xarray

    stack, _ = checked_tasks(posterior, tasks)
    paths = paths_of_samples(posterior, samples)
    found = example_log_likelihood(posterior, stack, paths, linearised=False)
    dims = ("chain", "draw", "task", "example")
    sizes = {"chain": 1, "draw": len(paths), "task": len(stack)}
    made = xarray.Dataset(
        {name: (dims, value[None]) for name, value in found.items()},
        coords={name: np.arange(size) for name, size in sizes.items()},
    )
    return xarray.DataTree.from_dict({"/log_likelihood": made})


@dataclass(frozen=True)
class Prequential:
    """One-task-ahead scores: every task judged by the belief before it came.

    Attributes:
        log_evidence: (T,), of the whole task, in nats.
        log_density: (T,), mean over its examples, each by itself.
        accuracy: (T,) for class likelihoods, else nan.
        rmse: (T,) for the others, else nan.
    """

    log_evidence: np.ndarray
    log_density: np.ndarray
    accuracy: np.ndarray
    rmse: np.ndarray


def prequential(
    filtered: Filtered | Smoothed,
    tasks: Tasks | Iterable[Task | Mapping[str, Any]],
    *,
    method: Method = LINEARISED,
    key: int = 0,
) -> Prequential:
    """Predict every task before it is learnt; the first by the prior, through the network itself (its mean is no weights).

    Args:
        filtered: what ``engine.run`` returned, or a posterior.
        tasks: its tasks.
        method: of the expectation over the weights.
        key: of its draws.

    Raises:
        ValueError: tasks of another posterior.
    """
    own = filtered.filtered if isinstance(filtered, Smoothed) else filtered
    if not isinstance(own, Filtered):
        raise ValueError(f"filtered is {type(own).__name__}; what engine.run or engine.smooth returns is accepted")
    stack, _ = checked_tasks(filtered if isinstance(filtered, Smoothed) else _as_smoothed(own), tasks)
    rows = []
    for t, (belief, info) in enumerate(zip(predicted_beliefs(own, stack), own.infos, strict=True)):
        task = stack.at(t)
        counted = np.ones(task.num_examples, bool) if task.mask is None else np.asarray(task.mask)
        if not counted.any():
            rows.append((0.0, np.nan, np.nan, np.nan))
            continue
        chosen = method
        if t == 0 and not isinstance(method, AtMean):
            chosen = ThroughNetwork(method.num_samples)
        made = predict_from(own.program, own.hypers, belief, task, method=chosen, key=key)
        rows.append((info.log_evidence, *_of_task(made, task, counted)))
    return Prequential(*(np.array(column) for column in zip(*rows, strict=True)))


def _as_smoothed(filtered: Filtered) -> Smoothed:
    """A Smoothed of the filter's own means: enough for checks that read the filter alone."""
    means = tuple(belief.mean for belief in filtered.beliefs)
    return Smoothed(filtered, means, (None,) * len(means))


def _of_task(made: Mapping[str, Any], task: Task, counted: np.ndarray) -> tuple[float, float, float]:
    density, right, squares = np.zeros(len(counted)), [], []
    for name, site in made.items():
        density = density + site.log_density
        if name not in task:  # the site's values lie under another name
            continue
        value = np.asarray(task[name])
        if site.probabilities is not None:
            right.append(site.probabilities.argmax(-1)[counted] == value[counted])
        else:
            squares.append(np.square(site.mean - value)[counted])
    accuracy = float(np.mean(np.concatenate([np.ravel(r) for r in right]))) if right else np.nan
    rmse = float(np.sqrt(np.mean(np.concatenate([np.ravel(s) for s in squares])))) if squares else np.nan
    return float(density[counted].mean()), accuracy, rmse
