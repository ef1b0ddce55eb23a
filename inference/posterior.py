"""The smoother's posterior with everything that users ask of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ssm_nn.inference.beliefs import Belief, Filtered, FilterState, Info
from ssm_nn.inference.datatree import to_datatree
from ssm_nn.inference.guide import guide_of
from ssm_nn.inference.predictive import LINEARISED, Method, Prediction, predict
from ssm_nn.inference.smoothing import Smoothed
from ssm_nn.tasks import Task, Tasks

if TYPE_CHECKING:
    import xarray

__all__ = ["Belief", "FilterState", "Filtered", "Info", "Posterior"]

Array = Any


@dataclass(frozen=True)
class Posterior(Smoothed):
    """The belief of every task given all tasks: what ``LaplaceFilter.smooth`` returns.

    ``beliefs[t]`` is a Gaussian with ``mean`` (P,) and ``precision``; ``layout.leaves(mean)`` names its parts;
    ``sample_path(key)`` draws all tasks together.
    """

    @cached_property
    def guide(self) -> Callable[..., dict[str, Array]]:
        """A NumPyro guide: ``Predictive(program, guide=posterior.guide, params={}, num_samples=300)``."""
        return guide_of(self)

    def predict(
        self, t: int, task: Task | Mapping[str, Any], *, method: Method = LINEARISED, key: Array | int = 0
    ) -> dict[str, Prediction]:
        """Predict the examples of ``task`` with the smoothed belief of task ``t``; see ``predictive.predict``."""
        return predict(self, t, task, method=method, key=key)

    def to_datatree(
        self,
        *,
        num_samples: int = 200,
        key: Array | int = 0,
        tasks: Tasks | Iterable[Task | Mapping[str, Any]] | None = None,
        keep: Sequence[str] = ("*",),
    ) -> xarray.DataTree:
        """As an ArviZ DataTree; see ``datatree.to_datatree``."""
        return to_datatree(self, num_samples=num_samples, key=key, tasks=tasks, keep=keep)
