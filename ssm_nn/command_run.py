"""The experiment behind ``ssm-nn run``: filter a stream with every kernel, let the evidence choose, smooth, compare.

For each seed: fine-tuning, joint training, and the filter with each candidate kernel, task by task; then the smoother for
the kernel of the highest total log evidence, which reads the training labels alone. After each task the state goes to the
run's folder, after each method its rows; whatever lies there is not computed again.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from ssm_nn.command_evaluate import LAST, LEARNT, SMOOTHED, Evaluator, Row, matrix_rows, shown_examples, view_rows
from ssm_nn.command_folder import METRIC_COLUMNS, TASK_COLUMNS, RunFolder
from ssm_nn.command_settings import WHOLE_TASK_LABELS, CommandError, Kernel, Settings, kernels_of
from ssm_nn.extraction import describe, extract
from ssm_nn.inference.baselines.plain import FineTuning, JointTraining, TrainingState
from ssm_nn.inference.beliefs import Filtered, FilterState, Info
from ssm_nn.inference.checkpoints import CheckpointError, load, replacing, save
from ssm_nn.inference.curvature import ExactCurvature
from ssm_nn.inference.laplace import FilterWarning, LaplaceFilter
from ssm_nn.inference.lbfgs import Lbfgs
from ssm_nn.inference.minibatch import Minibatch
from ssm_nn.inference.sketch import SketchedCurvature
from ssm_nn.inference.smoothing import smooth, smooth_means
from ssm_nn.inference.structures import Dense, Diagonal, LowRank
from ssm_nn.models.datasets import load as load_data
from ssm_nn.models.networks import mlp
from ssm_nn.models.programs import classification
from ssm_nn.models.streams import TaskStream, permuted, rotated, split
from ssm_nn.tasks import Task, as_task

__all__ = ["CHOSEN", "FINE_TUNING", "JOINT", "Experiment", "Report"]

Array = Any

FINE_TUNING, JOINT, FILTER, CHOSEN = "fine-tuning", "joint", "filter", "chosen"
MAX_TEST_EXAMPLES = 2000  # a task: a standard error of 1 % at the most

# seed (from 0), name of the method, task, accuracy on it, log evidence so far or nan
Report = Callable[[int, str, int, float, float], None]


@dataclass
class Experiment:
    """One run in its folder.

    Args:
        settings: what to run.
        folder: where; holds whatever was finished before.
        report: called after each task.
        damaged: checkpoints that were cut short or altered, and that the run went back before.
    """

    settings: Settings
    folder: RunFolder
    report: Report
    damaged: list[Path] = field(default_factory=list)

    @property
    def kernels(self) -> list[Kernel]:
        """The candidates."""
        return kernels_of(self.settings)

    @property
    def total(self) -> int:
        """Number of updates, of all seeds and methods together."""
        return self.settings.seeds * self.settings.tasks * (2 + len(self.kernels))

    @cached_property
    def dataset(self) -> Any:
        """Images with classes."""
        return load_data(self.settings.data, self.settings.data_folder)

    @cached_property
    def network(self) -> Any:
        """(apply, params); the same initial weights for every seed, so that nothing is compiled twice."""
        size = int(np.prod(self.dataset.train_x.shape[1:]))
        widths = (size, *self.settings.hidden, self.dataset.num_classes)
        return mlp(widths, self.settings.activation, self.settings.seed)

    @cached_property
    def program(self) -> Any:
        """A noise for each layer."""
        groups = {f"layer{n}": f"layers.{n}.*" for n in range(self.settings.num_layers)}
        return classification(self.network, self.settings.prior_scale, groups)

    @cached_property
    def estimator(self) -> Any:
        """L-BFGS on the whole task where it is small, else Adam on mini-batches."""
        if not self._in_batches:
            return Lbfgs()
        return Minibatch(optax.adam(1e-3), epochs=self.settings.epochs, batch_size=self.settings.batch_size)

    @cached_property
    def engine(self) -> LaplaceFilter:
        """Compiled once, for all kernels and seeds."""
        structure = {"dense": Dense, "diagonal": Diagonal, "low-rank": lambda: LowRank(self.settings.rank or 0)}
        return LaplaceFilter(
            self.program,
            structure[self.settings.engine](),
            hypers=self._hypers(self.kernels[0]),
            estimator=self.estimator,
            curvature=SketchedCurvature() if self._in_batches else ExactCurvature(),
        )

    @cached_property
    def evaluator(self) -> Evaluator:
        """Of the network."""
        layout = describe(self.program, self._example, self._hypers(self.kernels[0]))
        return Evaluator(self.network, layout, self.program, self.settings.draws)

    @cached_property
    def _example(self) -> Task:
        """A task to trace with."""
        return as_task(self.stream(0).train[0])

    @cached_property
    def _in_batches(self) -> bool:
        """Whether a task is too large to be read whole at every step."""
        tasks = self.settings.tasks if self.settings.shift == "split" else 1
        return (self.settings.labels or len(self.dataset.train_x) // tasks) > WHOLE_TASK_LABELS

    def _hypers(self, kernel: Kernel) -> dict[str, Array]:
        # float, not a weak type: a kernel of another type would be compiled again
        return {f"noise.layer{n}": jnp.asarray(np.asarray(q, float)) for n, q in enumerate(kernel.noise)}

    def stream(self, seed: int) -> TaskStream:
        """The tasks of a seed; seeds differ in the examples that are labelled."""
        s = self.settings
        test_size = MAX_TEST_EXAMPLES if s.shift != "split" and len(self.dataset.test_x) > MAX_TEST_EXAMPLES else None
        common = {"train_size": s.labels, "test_size": test_size, "seed": s.seed + seed}
        try:
            if s.shift == "rotate":
                return rotated(self.dataset, s.tasks, step=s.step or 0.0, **common)
            return (permuted if s.shift == "permute" else split)(self.dataset, s.tasks, **common)
        except ValueError as error:
            raise CommandError(_in_options(str(error))) from None

    def check(self) -> None:
        """Raise CommandError for what only the data can tell; nothing is written."""
        self.stream(0)

    def run(self) -> None:
        """All seeds; what the folder holds already is not computed again."""
        for seed in range(self.settings.seeds):
            stream = self.stream(seed)
            self._baseline(seed, FINE_TUNING, stream)
            self._baseline(seed, JOINT, stream)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FilterWarning)  # the status goes to kernels.csv, and to the report
                for kernel in self.kernels:
                    self._filter(seed, kernel, stream)
                    self._keep_best(seed)
            self._smooth(seed, stream)
            self.folder.drop_checkpoints(seed)
            self.write_tables()

    # fine-tuning and joint training

    def _baseline(self, seed: int, method: str, stream: TaskStream) -> None:
        if self._done(seed, method, stream):
            return
        trainer = (FineTuning if method == FINE_TUNING else JointTraining)(self.engine)
        state = trainer.init(self.settings.seed + seed, stream.train[0])
        means: list[Array] = []
        for t in range(self.settings.tasks):
            file = self.folder.checkpoint(seed, method, t)
            stored = self._stored(file, state)
            if stored is None:
                state = self._train(trainer, state, stream, t)
                save(file, state)
            else:
                state = stored
            means.append(state.mean)
            self._show(seed, method, stream, t, state.mean, math.nan)
        matrix = self.evaluator.matrix(means, stream)
        last = len(means) - 1
        final = [self.evaluator.at_mean(means[-1], task) for task in stream.test]
        learnt = [self.evaluator.at_mean(mean, task) for mean, task in zip(means, stream.test, strict=True)]
        rows = view_rows(LAST, [last] * len(means), final, stream)
        if method == FINE_TUNING or not self._in_batches:
            rows += matrix_rows(matrix) + view_rows(LEARNT, range(len(means)), learnt, stream)
        shown = learnt if method == FINE_TUNING else final
        self.folder.write_result(seed, method, {"rows": rows}, {"at_mean": np.concatenate(shown), "y": _labels(stream)})
        self.folder.drop_checkpoints(seed, method)

    def _train(self, trainer: Any, state: TrainingState, stream: TaskStream, t: int) -> TrainingState:
        if isinstance(trainer, FineTuning):
            return trainer.update(state, stream.train[t])[0]
        if self._in_batches and t < len(stream) - 1:
            return state._replace(step=state.step + 1)  # every prefix would cost T / 2 times the last
        tasks = [stream.train[i] for i in range(t + 1)]
        return trainer.update(state, tasks, self._joint_size(stream))[0]

    def _joint_size(self, stream: TaskStream) -> int:
        if self.settings.labels is not None:
            return self.settings.labels * self.settings.tasks
        return sum(task.num_examples for task in stream.train)

    # the filter

    def _filter(self, seed: int, kernel: Kernel, stream: TaskStream) -> None:
        if self._done(seed, kernel.slug, stream):
            return
        filtered = self._filtered(seed, kernel, stream)
        means = [belief.mean for belief in filtered.beliefs]
        smoothed = smooth_means(filtered)
        at_mean = self.evaluator.at_mean
        last = len(means) - 1
        learnt = [at_mean(mean, task) for mean, task in zip(means, stream.test, strict=True)]
        later = [at_mean(m, task, c) for m, task, c in zip(smoothed, stream.test, means, strict=True)]
        final = [at_mean(means[-1], task) for task in stream.test]
        rows = matrix_rows(self.evaluator.matrix(means, stream)) + view_rows(LEARNT, range(len(means)), learnt, stream)
        rows += view_rows(SMOOTHED, [last] * len(means), later, stream) + view_rows(
            LAST, [last] * len(means), final, stream
        )
        tasks = [_numbers(info) for info in filtered.infos]
        result = {"rows": rows, "tasks": tasks, "log_evidence": filtered.log_evidence}
        self.folder.write_result(seed, kernel.slug, result, {})

    def _filtered(self, seed: int, kernel: Kernel, stream: TaskStream) -> Filtered:
        """From the folder as far as it goes, then by updates."""
        engine = self.engine.with_hypers(self._hypers(kernel))
        state = engine.init(self.settings.seed + seed, stream.train[0])
        like = (state, self._info_template(kernel, state))
        states: list[FilterState] = []
        infos: list[Info] = []
        for t in range(self.settings.tasks):
            file = self.folder.checkpoint(seed, kernel.slug, t)
            stored = self._stored(file, like)
            if stored is None:
                state, info = engine.update(state, stream.train[t])
                save(file, (state, info))
            else:
                state, info = stored
            states.append(state)
            infos.append(info)
            self._show(seed, kernel.name, stream, t, state.mean, sum(i.log_evidence for i in infos))
        return engine.filtered(states, infos, describe(self.program, self._example, self._hypers(kernel)))

    def _stored(self, file: Path, like: Any) -> Any:
        """What a checkpoint holds; None where there is none, or one that is damaged: the state before it then serves."""
        if not file.exists():
            return None
        try:
            return load(file, like)
        except CheckpointError:
            self.damaged.append(file)
            return None

    def _info_template(self, kernel: Kernel, state: FilterState) -> Info:
        moments = extract(self.program, self._example, self._hypers(kernel)).moments
        site = state.precision.no_information()
        return Info.without_data(moments, site, 0.0)

    def _evidence(self, seed: int, kernel: Kernel) -> float | None:
        """Total log evidence; -inf where a task failed, None where the kernel is still to come."""
        result = self.folder.read_result(seed, kernel.slug)
        if result is None:
            return None
        return -math.inf if math.isnan(result["log_evidence"]) else result["log_evidence"]

    def best(self, seed: int) -> Kernel | None:
        """The finished kernel of the highest total log evidence; the first of equals."""
        found = [
            (kernel, evidence) for kernel in self.kernels if (evidence := self._evidence(seed, kernel)) is not None
        ]
        return max(found, key=lambda pair: pair[1])[0] if found else None

    def _keep_best(self, seed: int) -> None:
        """Drop the checkpoints that no later step needs."""
        best = self.best(seed)
        for kernel in self.kernels:
            if kernel != best and self._evidence(seed, kernel) is not None:
                self.folder.drop_checkpoints(seed, kernel.slug)

    # the smoother

    def _smooth(self, seed: int, stream: TaskStream) -> None:
        kernel = self.best(seed)
        assert kernel is not None
        if self.folder.read_result(seed, CHOSEN) is not None:
            return
        filtered = self._filtered(seed, kernel, stream)
        smoothed = smooth(filtered)
        hypers, last = filtered.hypers, len(filtered) - 1
        key = self.settings.seed + seed
        arrays: dict[str, np.ndarray] = {"y": _labels(stream)}
        rows: list[Row] = []
        views = {
            LEARNT: (filtered.beliefs, range(last + 1)),
            SMOOTHED: (smoothed.beliefs, [last] * (last + 1)),
            LAST: ([filtered.beliefs[-1]] * (last + 1), [last] * (last + 1)),
        }
        for view, (beliefs, learnt) in views.items():
            pairs = list(zip(beliefs, stream.test, strict=True))
            averaged, epistemic = zip(
                *[self.evaluator.averaged(b, hypers, task, key) for b, task in pairs], strict=True
            )
            rows += view_rows(view, learnt, averaged, stream, suffix="_averaged")
            arrays[f"{view} averaged"] = np.concatenate(averaged)
            arrays[f"{view} at_mean"] = np.concatenate(
                [self.evaluator.at_mean(b.mean, task, b.centre) for b, task in pairs]
            )
            arrays[f"{view} epistemic"] = np.concatenate(epistemic)
        if seed == 0:
            arrays |= shown_examples(stream, arrays)
            self._write_posterior(smoothed)
        self.folder.write_result(seed, CHOSEN, {"rows": rows, "kernel": kernel.name}, arrays)

    def _write_posterior(self, smoothed: Any) -> None:
        from ssm_nn.inference.datatree import to_datatree

        tree = to_datatree(smoothed, num_samples=self.settings.draws, key=self.settings.seed)
        with replacing(self.folder.posterior_file) as file:
            tree.to_netcdf(file.name, engine="h5netcdf")

    # progress and tables

    def _done(self, seed: int, method: str, stream: TaskStream) -> bool:
        """Whether a method is finished; its tasks then count as shown."""
        if self.folder.read_result(seed, method) is None:
            return False
        self.report(seed, method, self.settings.tasks - 1, math.nan, math.nan)
        return True

    def _show(self, seed: int, method: str, stream: TaskStream, t: int, mean: Array, log_evidence: float) -> None:
        right = self.evaluator.at_mean(mean, stream.test[t]).argmax(axis=1) == stream.test[t]["y"]
        self.report(seed, method, t, float(np.mean(right)), log_evidence)

    def write_tables(self) -> None:
        """metrics.csv and kernels.csv of the finished seeds, from their results."""
        finished = [self.folder.read_result(seed, CHOSEN) is not None for seed in range(self.settings.seeds)]
        seeds = [*finished, False].index(False)
        if not seeds:
            raise CommandError(
                f"{self.folder.path} has no finished seed yet; go on with `ssm-nn resume {self.folder.path}`."
            )
        metrics, tasks = [], []
        for seed in range(seeds):
            named = {FINE_TUNING: (FINE_TUNING, ""), JOINT: (JOINT, "")}
            named |= {kernel.slug: (FILTER, kernel.name) for kernel in self.kernels}
            for method, label in named.items():
                result = self._finished(seed, method)
                metrics += [(seed, *label, *row) for row in result["rows"]]
                tasks += [(seed, label[1], t, *numbers) for t, numbers in enumerate(result.get("tasks", []))]
            chosen = self._finished(seed, CHOSEN)
            metrics += [(seed, FILTER, chosen["kernel"], *row) for row in chosen["rows"]]
        self.folder.write_table(self.folder.metrics_file, METRIC_COLUMNS, metrics)
        self.folder.write_table(self.folder.kernels_file, TASK_COLUMNS, tasks)

    def _finished(self, seed: int, method: str) -> dict[str, Any]:
        result = self.folder.read_result(seed, method)
        assert result is not None
        return result


def _numbers(info: Info) -> list[Any]:
    """The columns of kernels.csv after seed, kernel and task."""
    return [
        info.log_evidence,
        info.log_likelihood,
        info.gradient_norm,
        info.dropped_share,
        info.steps,
        info.message if not info.converged else "converged",
        round(info.seconds, 3),
    ]


def _labels(stream: TaskStream) -> np.ndarray:
    """(T N,)."""
    return np.concatenate([task["y"] for task in stream.test])


def _in_options(message: str) -> str:
    """A message about arguments of a stream in the words of the command line."""
    for argument, option in {"train_size": "--labels", "num_tasks": "--tasks", "step is": "--step is"}.items():
        message = message.replace(argument, option)
    return message.replace(" and None for all", " and all") + "."
