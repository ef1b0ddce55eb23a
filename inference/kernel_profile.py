"""The evidence over a grid of one hyper-parameter, the others held fixed or learnt anew at every point."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from ssm_nn.inference.hyper_parameters import check_known
from ssm_nn.inference.laplace import LaplaceFilter
from ssm_nn.tasks import Task, Tasks, listed_tasks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["KernelProfile", "profile_kernel"]

Array = Any
Refit = Callable[[LaplaceFilter], Mapping[str, Any]]


@dataclass(frozen=True)
class KernelProfile:
    """A table of the evidence.

    Attributes:
        name: the hyper-parameter.
        values: (G,), the grid in rising order.
        log_evidence: (G,), in nats.
        hypers: all hyper-parameters at each point.
    """

    name: str
    values: np.ndarray
    log_evidence: np.ndarray
    hypers: tuple[dict[str, float], ...]

    @property
    def best(self) -> int:
        """Index of the highest evidence."""
        return int(np.nanargmax(self.log_evidence))

    def rows(self) -> list[dict[str, float]]:
        """One mapping a point: every hyper-parameter, and ``log_evidence``."""
        return [{**h, "log_evidence": float(e)} for h, e in zip(self.hypers, self.log_evidence, strict=True)]

    def plot(self, ax: Axes | None = None, marks: Mapping[str, float] | None = None) -> Axes:
        """The profile with its maximum, and a line for each of ``marks``, such as ``{"EM": 0.08}``."""
        import matplotlib.pyplot as plt

        made = plt.subplots()[1] if ax is None else ax
        positive = self.values[self.values > 0]
        if len(positive) and positive[-1] > 10 * positive[0]:
            # linear below the smallest positive point, so that 0 has a place on the axis
            made.set_xscale("symlog", linthresh=float(positive[0]))
        (line,) = made.plot(self.values, self.log_evidence, marker=".", label="log evidence")
        top = self.values[self.best], self.log_evidence[self.best]
        made.plot(
            *top, marker="o", fillstyle="none", linestyle="none", color=line.get_color(), label="best of the grid"
        )
        for i, (label, value) in enumerate((marks or {}).items(), 1):
            made.axvline(float(value), linestyle="--", color=f"C{i}", label=label)
        made.set_xlabel(self.name)
        made.set_ylabel("log evidence (nats)")
        made.legend()
        return made


def profile_kernel(
    engine: LaplaceFilter,
    tasks: Tasks | Iterable[Task | Mapping[str, Any] | None],
    name: str,
    values: Sequence[float],
    *,
    refit: Refit | None = None,
    key: Array | int = 0,
) -> KernelProfile:
    """The evidence of ``tasks`` at each of ``values`` of the hyper-parameter ``name``.

    Args:
        engine: the filter; its other hyper-parameters stay as they are.
        tasks: read once a point.
        name: a hyper-parameter, a single number.
        values: two or more, in any order.
        refit: learns the others at every point: from the engine at that point to its hyper-parameters, for example
            ``lambda engine: learn_kernel(engine, tasks, {"noise.last": "layers.1.*"}).hypers``. It must leave ``name`` alone.
        key: as for ``engine.run``.

    Raises:
        ValueError: an unknown name, fewer than two values, values outside the support of ``name``.
    """
    check_known([name], engine.hypers, "name")
    grid = np.unique(np.asarray(values, float))
    if len(grid) < 2:
        raise ValueError(f"values is {list(values)}; two or more different numbers are accepted")
    listed, evidence, hypers = listed_tasks(tasks), [], []
    for value in grid:
        here = engine.with_hypers(engine.hypers | {name: jnp.asarray(value, engine.hypers[name].dtype)})
        if refit is not None:
            here = here.with_hypers(here.hypers | {k: v for k, v in refit(here).items() if k != name})
        evidence.append(here.run(key, listed).log_evidence)
        hypers.append({k: float(v) for k, v in here.hypers.items() if np.ndim(v) == 0})
    return KernelProfile(name, grid, np.array(evidence), tuple(hypers))
