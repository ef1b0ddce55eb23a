"""What the filter leaves behind: states, diagnostics, and the beliefs of all tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from ssm_nn.extraction import Layout, Program
from ssm_nn.inference.histories import History
from ssm_nn.inference.map_problem import CONVERGED, FIXED_BUDGET, NOT_CONVERGED, NOT_FINITE
from ssm_nn.inference.structures import Structure
from ssm_nn.moments import Moments
from ssm_nn.precision import permuted, step_mean_vector

__all__ = ["Belief", "FilterState", "Filtered", "Info", "predict_belief"]

Array = Any

_MESSAGES = {
    CONVERGED: "the MAP search converged",
    FIXED_BUDGET: "the MAP search used its fixed budget of epochs; convergence was not judged",
    NOT_CONVERGED: "the MAP search did not converge: allow more steps or epochs, or lower the learning rate",
    NOT_FINITE: (
        "the MAP search or the curvature is not finite, and the task's information was left out: lower the learning "
        "rate, or look for outliers in the data"
    ),
}


class Belief(NamedTuple):
    """N(mean, precision^-1) over the weights.

    Attributes:
        mean: (P,).
        precision: in the filter's structure.
        centre: (P,), where the network was linearised to get this belief; None is the mean itself. A smoothed belief
            keeps the filter's: its mean belongs to that linear model, and is worse through the network itself.
    """

    mean: Array
    precision: Any
    centre: Array | None = None


def predict_belief(belief: Belief, moments: Moments) -> Belief:
    """The belief of the next task before its data: ``m' = a O m + b``, ``Lambda' = (A Lambda^-1 A + Q)^-1`` after O."""
    return Belief(step_mean_vector(moments, belief.mean), permuted(belief.precision, moments).predict(moments))


class FilterState(NamedTuple):
    """All that the next update needs, as arrays.

    Attributes:
        step: number of tasks so far.
        key: of the random choices to come.
        mean, precision: the belief after the last task.
    """

    step: Array
    key: Array
    mean: Array
    precision: Any


class Info(NamedTuple):
    """What one update says of itself, and what the smoother needs of it.

    Attributes:
        moments: the step into this task, (P,) each.
        site: the information of the task's data, in the structure's form.
        log_evidence: log p(D_t | D_1 .. D_{t-1}), Laplace's approximation, in nats; 0 without data, nan if it failed.
        log_likelihood: sum over the task at the MAP weights.
        gradient_norm: norm of the objective's gradient there.
        dropped_share: what a compression moved out of the factor, as a share of the whitened trace; 0 is exact.
        steps: of the MAP search.
        status: code of ``message``.
        seconds: wall time of the update.
    """

    moments: Moments
    site: Any
    log_evidence: float
    log_likelihood: float
    gradient_norm: float
    dropped_share: float
    steps: int
    status: int
    seconds: float

    @classmethod
    def without_data(cls, moments: Moments, site: Any, seconds: float) -> Self:
        """Of a task without data."""
        return cls(moments, site, 0.0, 0.0, 0.0, 0.0, 0, CONVERGED, seconds)

    @property
    def converged(self) -> bool:
        """Whether the MAP search met its own criterion."""
        return self.status == CONVERGED

    @property
    def message(self) -> str:
        """The status in a sentence."""
        return _MESSAGES[self.status]


@dataclass(frozen=True)
class Filtered:
    """The belief of each task given the tasks up to it.

    Attributes:
        program, layout, hypers, structure: what they belong to.
        beliefs: one Belief a task.
        infos: one Info a task.
        history: where they are read from, where that is not the device's memory.
    """

    program: Program
    layout: Layout
    hypers: dict[str, Array]
    structure: Structure
    beliefs: Sequence[Belief]
    infos: Sequence[Info]
    history: History | None = None

    def __len__(self) -> int:
        return len(self.beliefs)

    def entry(self, t: int) -> tuple[Belief, Info]:
        """Belief and Info of task ``t``, read once."""
        if self.history is None:
            return self.beliefs[t], self.infos[t]
        state, info = self.history.get(range(len(self))[t])
        return Belief(state.mean, state.precision), info

    @property
    def log_evidence(self) -> float:
        """Sum of the tasks' log evidence, log p(D_1 .. D_T)."""
        return float(sum(info.log_evidence for info in self.infos))
