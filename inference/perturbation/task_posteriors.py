"""The posteriors of all tasks together, for predictions by draws and for a DataTree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ssm_nn.extraction import Layout, describe
from ssm_nn.inference.marginals import Marginals
from ssm_nn.inference.perturbation.filter import PerturbationFilter
from ssm_nn.inference.perturbation.state import PerturbationState, UpdateInfo
from ssm_nn.tasks import Task, Tasks, as_task, listed_tasks

__all__ = ["posterior_of"]

Array = Any


def posterior_of(
    engine: PerturbationFilter,
    state: PerturbationState,
    tasks: Tasks | Iterable[Task | Mapping[str, Any]],
    infos: Sequence[UpdateInfo] = (),
    key: Array | int = 0,
) -> Marginals:
    """``engine.posterior`` of each task: Laplace's belief over its own parameters, given the base.

    The tasks' posteriors are independent given the base. Every leaf, the perturbed kernels too, has draws by task.

    Args:
        engine: the filter.
        state: in which the tasks were learnt.
        tasks: their training data, in the order in which they came.
        infos: one for each, from the updates; they become the group ``filter_stats`` of a DataTree.
        key: of the random signs of the curvature; a whole number is taken as a seed.

    Raises:
        ValueError: for a task that was never learnt, and for as many infos as there are no tasks.
    """
    listed = listed_tasks(tasks)
    if infos and len(infos) != len(listed):
        raise ValueError(f"infos holds {len(infos)} infos, but there are {len(listed)} tasks; one for each is accepted")
    key = jax.random.key(key) if isinstance(key, int) else key
    beliefs = tuple(
        engine.posterior(state, t, k) for t, k in zip(listed, jax.random.split(key, len(listed)), strict=True)
    )
    layout = describe(engine.program, jax.tree.map(jnp.asarray, as_task(listed[0])), engine.hypers)
    by_task = Layout(tuple(site._replace(frozen=False) for site in layout.sites))
    return Marginals(engine.program, engine.hypers, by_task, beliefs, _statistics(infos))


def _statistics(infos: Sequence[UpdateInfo]) -> dict[str, list[float]]:
    if not infos:
        return {}
    growth = [0.0, *(sum(info.storage.by_task) / info.storage.base for info in infos[1:])]
    return {
        "rank": [sum(info.ranks.values()) for info in infos],
        "objective": [info.objective for info in infos],
        "predicted_change": [info.predicted_change for info in infos],
        "pruned": [info.pruned for info in infos],
        "growth": growth,
        "status": [info.status for info in infos],
        "seconds": [sum(info.seconds.values()) for info in infos],
    }
