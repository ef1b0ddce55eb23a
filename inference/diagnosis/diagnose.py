"""One call that looks at a posterior from every side, and says what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ssm_nn.inference.diagnosis import lights as rules
from ssm_nn.inference.diagnosis.importance import Importance, check_draws, importance_weights
from ssm_nn.inference.diagnosis.innovations import Innovations, innovations
from ssm_nn.inference.diagnosis.kernel_test import kernel_test
from ssm_nn.inference.diagnosis.lights import Colour, Light
from ssm_nn.inference.diagnosis.rounding import rounding
from ssm_nn.inference.diagnosis.scores import LeaveOneOut, Prequential, leave_one_out, no_scores, prequential
from ssm_nn.inference.diagnosis.structure_loss import StructureLoss, structure_loss
from ssm_nn.inference.diagnosis.trajectories import check_smoothed, checked_tasks
from ssm_nn.inference.smoothing import Smoothed
from ssm_nn.tasks import Task, Tasks

if TYPE_CHECKING:
    import xarray

__all__ = ["Diagnosis", "diagnose"]

_ORDER = [Colour.RED, Colour.AMBER, Colour.GREEN, Colour.GREY]


@dataclass(frozen=True)
class Diagnosis:
    """What ``diagnose`` found.

    Attributes:
        lights: one finding each, worst first.
        importance, innovations, loo, prequential, structure: the numbers that they were read from.
        log_evidence: (T,), in nats.
        title: of the page.
    """

    lights: tuple[Light, ...]
    importance: Importance
    innovations: Innovations
    loo: LeaveOneOut
    prequential: Prequential
    structure: StructureLoss
    log_evidence: np.ndarray
    title: str

    def light(self, name: str) -> Light:
        """The light of that name."""
        return next(light for light in self.lights if light.name == name)

    @property
    def worst(self) -> Colour:
        """The worst colour of all."""
        return self.lights[0].colour

    @property
    def by_task(self) -> dict[str, np.ndarray]:
        """Every number that there is one of for each task, (T,)."""
        found = self.innovations
        return {
            "log_evidence": self.log_evidence,
            "elpd_loo": self.loo.by_task,
            "log_density_ahead": self.prequential.log_density,
            "accuracy_ahead": self.prequential.accuracy,
            "rmse_ahead": self.prequential.rmse,
            "khat": self.importance.task_khat,
            "ess": self.importance.task_ess,
            "nats_lost": self.structure.lost,
            "innovation": found.statistic / found.expected,
            "innovation_score": found.score,
            "innovation_p_value": found.p_value,
        } | {f"coverage_{level:.0%}".rstrip("%"): share for level, share in found.coverage.items()}

    @property
    def table(self) -> Table:
        """The lights as a rich table: ``rich.print(diagnosis.table)``."""
        table = Table("", "looked at", "found", "what to try", title=self.title, show_lines=True)
        styles = {Colour.GREEN: "green", Colour.AMBER: "yellow", Colour.RED: "red", Colour.GREY: "bright_black"}
        for light in self.lights:
            colour = styles[light.colour]
            table.add_row(f"[{colour}]● {light.colour}[/{colour}]", light.name, light.finding, light.advice)
        return table

    def to_datatree(self) -> xarray.DataTree:
        """Groups ``diagnosis`` (by task), ``lights`` (colour, finding, advice), ``importance`` and ``log_likelihood``."""
        import xarray

        tasks = {"task": np.arange(len(self.log_evidence))}
        by_task = xarray.Dataset({name: ("task", value) for name, value in self.by_task.items()}, coords=tasks)
        words = {
            field: ("light", [str(getattr(light, field)) for light in self.lights])
            for field in ("colour", "finding", "advice")
        }
        named = xarray.Dataset(words, coords={"light": [light.name for light in self.lights]})
        return xarray.DataTree.from_dict(
            {
                "/diagnosis": by_task,
                "/lights": named,
                "/importance": self.importance.to_datatree()["importance"].to_dataset(),
                "/log_likelihood": self.loo.tree["log_likelihood"].to_dataset(),
                "/posterior": self.loo.tree["posterior"].to_dataset(),
            }
        )

    @property
    def html(self) -> str:
        """One page that needs nothing else."""
        template = files("ssm_nn").joinpath("diagnosis.html.jinja").read_text(encoding="utf-8")
        page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(template)
        columns = {name: values for name, values in self.by_task.items() if np.isfinite(values).any()}
        rows = [[str(t), *(_shown(values[t]) for values in columns.values())] for t in range(len(self.log_evidence))]
        return page.render(
            title=self.title,
            lead=self._lead(),
            lights=self.lights,
            head=["task", *(name.replace("_", " ") for name in columns)],
            rows=rows,
        )

    def write_html(self, file: Path | str) -> Path:
        """Write ``html``, and say where."""
        path = Path(file)
        path.write_text(self.html, encoding="utf-8")
        return path

    def _lead(self) -> str:
        count = {colour: sum(light.colour == colour for light in self.lights) for colour in Colour}
        told = {
            Colour.RED: "Something is wrong: begin with the red lights.",
            Colour.AMBER: "Nothing is wrong for certain; the amber lights deserve a look.",
            Colour.GREEN: "Nothing wrong was found.",
            Colour.GREY: "Nothing could be judged.",
        }[self.worst]
        shown = ", ".join(f"{number} {colour}" for colour, number in count.items() if number)
        return (
            f"{told} {shown}. Log evidence {np.sum(self.log_evidence):.1f} nats; leave-one-out ELPD {self.loo.elpd:.1f} ± "
            f"{self.loo.se:.1f} nats."
        )

    def __rich__(self) -> Table:
        return self.table


def diagnose(
    posterior: Smoothed,
    tasks: Tasks | Iterable[Task | Mapping[str, Any]],
    *,
    num_samples: int = 1000,
    key: int = 0,
    title: str = "Diagnosis",
    progress: bool = False,
) -> Diagnosis:
    """Judge a posterior: MAP search, structure, kernel, rounding, importance weights, innovations, coverage, leave-one-out.

    Args:
        posterior: what ``LaplaceFilter.smooth`` or ``mean_field.smooth_path`` returned.
        tasks: the tasks that it was made from, with their observed values.
        num_samples: draws, at least 100.
        key: a seed.
        title: of table and page.
        progress: a progress bar.

    Returns:
        A Diagnosis: ``rich.print(found)``, ``found.to_datatree()``, ``found.write_html("diagnosis.html")``.

    Raises:
        ValueError: tasks of another posterior or program, without observed values, or too few draws.
    """
    check_smoothed(posterior)
    check_draws(num_samples)
    stack, power = checked_tasks(posterior, tasks)
    with Progress(console=Console(stderr=True), disable=not progress, transient=True) as bar:
        steps = bar.add_task("diagnosing", total=7)

        def done(found: Any) -> Any:
            bar.advance(steps)
            return found

        weights = done(importance_weights(posterior, stack, num_samples=num_samples, key=key))
        ahead = done(innovations(posterior, stack, num_samples=min(num_samples, 400), key=key))
        finite = bool(np.isfinite(weights.log_ratios).all())
        loo = done(
            leave_one_out(posterior, stack, num_samples=num_samples, key=key) if finite else no_scores(len(stack))
        )
        scores = done(prequential(posterior, stack, key=key))
        moves = done(kernel_test(posterior, key=key))
        rounded = done(rounding(posterior))
        loss = done(structure_loss(posterior, stack, power, key))
    filtered = posterior.filtered
    infos = filtered.infos
    found = [
        rules.map_light(infos),
        rules.structure_light(loss, repr(filtered.structure)),
        rules.kernel_light(moves, single=len(posterior) == 1),
        rules.precision_light(rounded),
        rules.khat_light(weights, posterior.layout.size),
        rules.innovation_light(ahead),
        rules.coverage_light(ahead),
        rules.loo_light(loo.pareto_k, loo.task),
        rules.power_light(power),
    ]
    shown = sorted((light for light in found if light is not None), key=lambda light: _ORDER.index(light.colour))
    evidence = np.array([info.log_evidence for info in infos])
    return Diagnosis(tuple(shown), weights, ahead, loo, scores, loss, evidence, title)


def _shown(value: float) -> str:
    return "" if not np.isfinite(value) else f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"
