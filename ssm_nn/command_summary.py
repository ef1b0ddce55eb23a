"""metrics.csv and kernels.csv in a few numbers: what the table prints and the report shows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ssm_nn.command_evaluate import LAST, LEARNT, MATRIX, SMOOTHED
from ssm_nn.command_folder import RunFolder
from ssm_nn.command_run import FILTER, FINE_TUNING, JOINT
from ssm_nn.command_settings import STATIC, Kernel, Settings, kernels_of

__all__ = ["Line", "Spread", "Summary"]


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (nan for one seed) over seeds."""

    mean: float
    sd: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one number a seed."""
        return cls(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan)


@dataclass(frozen=True)
class Line:
    """A line of the table: ``kernels`` holds one kernel's name a seed, empty for the baselines."""

    label: str
    method: str
    kernels: tuple[str, ...]
    views: tuple[str, ...]

    @property
    def has_matrix(self) -> bool:
        """Whether its newest belief was judged on every task after every task."""
        return LEARNT in self.views


class Summary:
    """The tables of a run, by seed.

    Attributes:
        settings: of the run.
        seeds: number of finished seeds.
        chosen: the kernel of the highest total log evidence, by seed.
        warnings: what did not go as it should, in sentences.
    """

    def __init__(self, folder: RunFolder):
        self.settings: Settings = folder.open()[0]
        self.kernels: list[Kernel] = kernels_of(self.settings)
        self._values: dict[tuple[int, str, str, str, str], list[tuple[str, str, float]]] = defaultdict(list)
        for row in folder.read_table(folder.metrics_file):
            key = (int(row["seed"]), row["method"], row["kernel"], row["view"], row["metric"])
            self._values[key].append((row["learnt"], row["task"], float(row["value"])))
        self.seeds = 1 + max(key[0] for key in self._values)
        self._evidence: dict[tuple[int, str], float] = defaultdict(float)
        self.warnings: list[str] = []
        for row in folder.read_table(folder.kernels_file):
            seed, kernel = int(row["seed"]), row["kernel"]
            self._evidence[seed, kernel] += float(row["log_evidence"])
            if row["status"] not in (
                "converged",
                "the MAP search used its fixed budget of epochs; convergence was not judged",
            ):
                self.warnings.append(f"seed {seed}, kernel {kernel}, task {row['task']}: {row['status']}")
        self.chosen = [self._best(seed) for seed in range(self.seeds)]

    def _best(self, seed: int) -> str:
        def usable(name: str) -> float:
            value = self.evidence(seed, name)
            return -math.inf if math.isnan(value) else value

        return max((kernel.name for kernel in self.kernels), key=usable)

    def evidence(self, seed: int, kernel: str) -> float:
        """Total log evidence in nats; nan where a task failed."""
        return self._evidence[seed, kernel]

    @property
    def lines(self) -> list[Line]:
        """What is compared."""
        lines = [Line("fine-tuning", FINE_TUNING, ("",) * self.seeds, (LEARNT, LAST))]
        still = (STATIC,) * self.seeds
        with_static = any(kernel.name == STATIC for kernel in self.kernels)
        if with_static:
            lines.append(Line("static filter", FILTER, still, (LEARNT, LAST)))
        lines.append(Line("chosen filter", FILTER, tuple(self.chosen), (LEARNT, LAST)))
        if with_static:
            lines.append(Line("static smoother", FILTER, still, (SMOOTHED,)))
        lines.append(Line("smoother", FILTER, tuple(self.chosen), (SMOOTHED,)))
        lines.append(Line("joint training", JOINT, ("",) * self.seeds, (LAST,)))
        return lines

    def by_seed(self, line: Line, view: str, metric: str) -> list[float] | None:
        """Mean over tasks, one number a seed; None where the run has none."""
        found = [self._values.get((seed, line.method, line.kernels[seed], view, metric)) for seed in range(self.seeds)]
        if any(values is None for values in found):
            return None
        return [float(np.mean([value for _, _, value in values or []])) for values in found]

    def spread(self, line: Line, view: str, metric: str) -> Spread | None:
        """Over seeds, of means over tasks."""
        values = self.by_seed(line, view, metric)
        return None if values is None else Spread.of(values)

    def forgetting(self, line: Line) -> Spread | None:
        """Over seeds; of what learns task by task."""
        return None if SMOOTHED in line.views or line.method == JOINT else self.spread(line, MATRIX, "forgetting")

    def log_evidence(self, line: Line) -> Spread | None:
        """Over seeds; only filters have one."""
        if line.method != FILTER or SMOOTHED in line.views:
            return None
        return Spread.of([self.evidence(seed, kernel) for seed, kernel in enumerate(line.kernels)])

    def by_task(self, line: Line, view: str, metric: str) -> np.ndarray:
        """(seed, task)."""
        return np.array(
            [
                [value for _, _, value in self._values[seed, line.method, line.kernels[seed], view, metric]]
                for seed in range(self.seeds)
            ]
        )

    def matrix(self, line: Line) -> np.ndarray:
        """Accuracy matrices (seed, T, T): task j after learning task i."""
        size = self.settings.tasks
        return self.by_task(line, MATRIX, "accuracy").reshape(self.seeds, size, size)

    def kernel_counts(self) -> Mapping[str, int]:
        """In how many seeds the evidence chose each kernel, most frequent first."""
        counts = {kernel.name: self.chosen.count(kernel.name) for kernel in self.kernels}
        return dict(sorted(((k, n) for k, n in counts.items() if n), key=lambda pair: -pair[1]))

    def evidence_sentence(self) -> str:
        """Which kernel the evidence chose in how many seeds, and how the candidates compare."""
        if len(self.kernels) == 1:
            return f"One kernel, {self.kernels[0].name}: nothing was chosen."
        seeds = "seed" if self.seeds == 1 else "seeds"
        picks = ", ".join(f"{name} in {count}" for name, count in self.kernel_counts().items())
        differences = []
        favourite = next(iter(self.kernel_counts()))
        for kernel in self.kernels:
            if kernel.name != favourite:
                gaps = [self.evidence(s, kernel.name) - self.evidence(s, favourite) for s in range(self.seeds)]
                differences.append((float(np.mean(gaps)), kernel.name))
        listed = ", ".join(f"{name} {gap:+.1f}" for gap, name in sorted(differences, reverse=True))
        return (
            f"Of {self.seeds} {seeds} the evidence chose {picks}. "
            f"Mean difference of log evidence to {favourite}, in nats: {listed}."
        )


def shown(value: Spread | None, form: str, scale: float = 1.0) -> str:
    """``mean ± sd``, a dash where there is none."""
    if value is None or math.isnan(value.mean):
        return "–"
    mean = format(scale * value.mean, form)
    return mean if math.isnan(value.sd) else f"{mean} ± {scale * value.sd:{form}}"
