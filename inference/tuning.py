"""The strength of a method, chosen on a validation sequence of tasks: every candidate learns it, and the best score wins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax

from ssm_nn.inference.beliefs import Belief
from ssm_nn.tasks import Task, Tasks

__all__ = ["Runs", "Tuned", "tune"]

Array = Any


class Runs(Protocol):
    """``LaplaceFilter`` and the baselines: ``run(key, tasks)`` gives one Belief a task, or an object with ``beliefs``."""

    def run(self, key: Array, tasks: Any) -> Any:
        """Learn all tasks one after another."""
        ...


class Tuned(NamedTuple):
    """What ``tune`` found.

    Attributes:
        strength: the candidate with the largest score, the first of equals.
        scores: candidate -> score, in the order of the candidates; nan where a run came to nothing.
    """

    strength: float
    scores: dict[float, float]

    @property
    def at_edge(self) -> bool:
        """Whether the best is the smallest or the largest of several candidates, so that a wider grid may hold a better."""
        return len(self.scores) > 1 and self.strength in (min(self.scores), max(self.scores))


def tune(
    make: Callable[[float], Runs],
    strengths: Iterable[float],
    tasks: Tasks | Iterable[Task | Mapping[str, Any] | None],
    score: Callable[[Belief], float],
    key: Array | int = 0,
) -> Tuned:
    """The strength whose last belief scores best; every candidate gets the same key and tasks.

    Engines made anew are compiled anew: ``make`` does best to wrap one engine, as in
    ``lambda strength: OnlineEWC(engine, strength)``.

    Args:
        make: strength -> an engine or a baseline: ``lambda power: LaplaceFilter(program, power=power)`` for example.
        strengths: the candidates, finite and different.
        tasks: the validation sequence: not one that results are reported on.
        score: of the belief after the last task, larger is better: the mean accuracy over all tasks for example.
        key: a ``jax.random.key``, or a whole number taken as its seed.

    Raises:
        ValueError: no candidate, candidates that repeat or are not finite, or no candidate with a score that is a number.
    """
    candidates = [float(strength) for strength in strengths]
    if not candidates or len(set(candidates)) < len(candidates) or not all(map(math.isfinite, candidates)):
        raise ValueError(f"strengths is {candidates}; one or more finite numbers, all different, are accepted")
    tasks = tasks if isinstance(tasks, Tasks | Sequence) else list(tasks)  # an iterator would serve the first alone
    key = jax.random.key(key) if isinstance(key, int) else key
    scores = {}
    for strength in candidates:
        result = make(strength).run(key, tasks)
        scores[strength] = float(score(getattr(result, "beliefs", result)[-1]))
    numbers = {strength: value for strength, value in scores.items() if not math.isnan(value)}
    if not numbers:
        raise ValueError(f"score gave nan for every strength of {candidates}; there is none to choose")
    return Tuned(max(numbers, key=lambda strength: numbers[strength]), scores)
