"""Kernels and engines side by side: by evidence, and by leave-one-out.

p(M | D)  ∝  Z_M        at equal prior odds; a nat of evidence is a factor of e
elpd_M    by PSIS-LOO, differences with the standard error of their paired points
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ssm_nn.inference.diagnosis.scores import LeaveOneOut, _quietly, loo_by_task

if TYPE_CHECKING:
    import pandas

__all__ = ["EvidenceComparison", "compare_evidence", "compare_loo"]


@dataclass(frozen=True)
class EvidenceComparison:
    """Best first.

    Attributes:
        names: of the models.
        log_evidence: (M,), in nats.
        difference: (M,) to the best, <= 0.
        probability: (M,), posterior probability at equal prior odds.
        by_task: (M, T).
    """

    names: tuple[str, ...]
    log_evidence: np.ndarray
    difference: np.ndarray
    probability: np.ndarray
    by_task: np.ndarray


def compare_evidence(models: Mapping[str, Any]) -> EvidenceComparison:
    """Rank by log evidence; for each engine's own approximation of it.

    Args:
        models: name -> Filtered or Posterior of the same tasks.

    Raises:
        ValueError: fewer than two, another number of tasks, tasks of which one model had data and another none, or an evidence
            that is not finite.
    """
    _check_several(models)
    runs = {name: getattr(model, "filtered", model) for name, model in models.items()}
    for name, run in runs.items():
        if not hasattr(run, "infos"):
            raise ValueError(
                f"models[{name!r}] is {type(run).__name__}; what engine.run or engine.smooth returns is accepted"
            )
    infos = {name: run.infos for name, run in runs.items()}
    lengths = {name: len(info) for name, info in infos.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"models have different numbers of tasks, {lengths}: their evidence is of different data")
    by_task = np.array([[info.log_evidence for info in row] for row in infos.values()], float)
    if not np.isfinite(by_task).all():
        bad = [name for name, row in zip(models, by_task, strict=True) if not np.isfinite(row).all()]
        raise ValueError(f"models {', '.join(bad)} have an evidence that is not finite: an update failed")
    seen = by_task != 0
    if (seen != seen[0]).any():
        raise ValueError("models were given data for different tasks: their evidence is of different data")
    order = np.argsort(-by_task.sum(axis=1))
    total = by_task.sum(axis=1)[order]
    difference = total - total[0]
    probability = np.exp(difference) / np.exp(difference).sum()
    names = tuple(np.array(list(models))[order].tolist())
    return EvidenceComparison(names, total, difference, probability, by_task[order])


def compare_loo(models: Mapping[str, Any]) -> pandas.DataFrame:
    """ArviZ's ``compare`` on leave-one-out, after the checks without which it drops a model silently.

    Args:
        models: name -> DataTree with log likelihoods (of an engine, or of NUTS), or a LeaveOneOut. Those of ``leave_one_out``
            are of the linearised network, those of a DataTree of the network itself; of Laplace posteriors take the former.

    Returns:
        ArviZ's table, best first: rank, elpd, elpd_diff, dse, weight, ...; for ``az.plot_compare``.

    Raises:
        ValueError: fewer than two, no log likelihoods, other numbers of chains, draws or points.
    """
    import arviz

    _check_several(models)
    scored = {name: model if isinstance(model, LeaveOneOut) else loo_by_task(model) for name, model in models.items()}
    shapes = {name: tuple(loo.tree["log_likelihood"]["y"].shape) for name, loo in scored.items()}
    if len({shape[2] for shape in shapes.values()}) > 1:
        points = {name: shape[2] for name, shape in shapes.items()}
        raise ValueError(
            f"models have different numbers of observed points, {points}: they were made from different data"
        )
    if len({shape[:2] for shape in shapes.values()}) > 1:
        sizes = {name: shape[:2] for name, shape in shapes.items()}
        raise ValueError(
            f"models have different numbers of (chains, draws), {sizes}, of which ArviZ would drop some without a word; draw "
            "as many of each (num_samples), as one chain"
        )
    return _quietly(lambda: arviz.compare({name: loo.tree for name, loo in scored.items()}))


def _check_several(models: Mapping[str, Any]) -> None:
    if not isinstance(models, Mapping) or len(models) < 2:
        raise ValueError("models is not a mapping of at least two: name -> model is accepted")
