"""The report of a run: one HTML file that needs nothing else."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from ssm_nn import command_figures as figures
from ssm_nn.command_evaluate import LAST, LEARNT, SMOOTHED
from ssm_nn.command_folder import RunFolder
from ssm_nn.command_run import CHOSEN, FINE_TUNING, JOINT
from ssm_nn.command_settings import Settings
from ssm_nn.command_summary import Summary, shown

__all__ = ["write_report"]

SHIFTS = {
    "rotate": "rotated {step:g} degrees further with each task",
    "permute": "with pixels permuted",
    "split": "split by class",
}


def write_report(folder: RunFolder) -> None:
    """Write report.html from what lies in the run's folder."""
    summary = Summary(folder)
    settings, made_with = folder.open()
    chosen, tuned, joint = (
        [folder.read_arrays(seed, method) for seed in range(summary.seeds)] for method in (CHOSEN, FINE_TUNING, JOINT)
    )
    template = files("ssm_nn").joinpath("report.html.jinja").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(template)
    over = "one seed" if summary.seeds == 1 else f"{summary.seeds} seeds"
    content = {
        "title": f"{settings.tasks} tasks of {settings.data}, {_shift(settings)}",
        "lead": _lead(settings, over),
        "findings": _findings(summary),
        "warnings": summary.warnings,
        "accuracy": _accuracy(summary, over),
        "sections": [
            {
                "title": "Which kernel the evidence prefers",
                "picture": figures.evidence(summary),
                "table": None,
                "caption": "Total log evidence of the training labels under each candidate kernel, less that of the "
                f"reference, for {over}. Right of zero, the labels are better explained by weights that move in this way. "
                "No test example is used for the choice.",
            },
            {
                "title": "Each task by its own belief",
                "picture": figures.views_by_task(summary),
                "table": None,
                "caption": "Accuracy on the held-out examples of task t by the belief of task t: right after learning it, and "
                "smoothed, when later tasks have been seen too. The last task has no later ones, so smoothing leaves it "
                f"as it is. Bands: one standard deviation over {over}.",
            },
            {
                "title": "Forgetting",
                "picture": figures.forgetting_curves(summary),
                "table": None,
                "caption": "Left: the newest belief on tasks learnt some tasks ago, averaged over tasks; falling lines forget. "
                "Right: the last belief on every task. The smoothed beliefs, one for each task, forget nothing: each is the "
                f"best guess for its own task. Bands: one standard deviation over {over}.",
            },
            {
                "title": "Accuracy matrix",
                "picture": figures.accuracy_matrices(summary),
                "table": None,
                "caption": f"Row i, column j: accuracy on task j after learning task i, in per cent, mean of {over}. "
                "The diagonal is the task just learnt, the last row what is left at the end; above the diagonal "
                "lie tasks still to come.",
            },
            {
                "title": "Calibration",
                "picture": figures.calibration(chosen, tuned, joint),
                "table": _calibration(summary),
                "caption": "On the dotted line, confidence is what it says; above it predictions are too cautious. All "
                f"held-out examples of all tasks and {over}, in 15 bins. Averaging over the belief "
                f"({settings.draws} draws through the "
                "linearised network) widens every prediction by the uncertainty of the weights: with a prior that is wide for "
                "the network and few labels, that is more than the errors call for, and the predictions at the mean weights "
                "are the better calibrated. The table has both.",
            },
            {
                "title": "Predictive uncertainty on examples",
                "picture": figures.examples(chosen[0]),
                "table": None,
                "caption": f"Held-out images of task {int(chosen[0]['shown task']) + 1}, seed {settings.seed}, "
                "under its smoothed belief, averaged over the weights: the most certain above, the least certain "
                "below. Green: the true class; red: a wrong prediction. Epistemic: what the weights' "
                "uncertainty adds to the entropy of the prediction, in nats.",
            },
        ],
        "settings": _settings(settings, made_with),
    }
    folder.write_text(folder.report_file, page.render(**content))


def _shift(settings: Settings) -> str:
    return SHIFTS[settings.shift].format(step=settings.step)


def _lead(settings: Settings, over: str) -> str:
    labels = "all labels" if settings.labels is None else f"{settings.labels} labels"
    rank = f" of rank {settings.rank}" if settings.rank is not None else ""
    widths = "–".join(map(str, settings.hidden)) or "no"
    return (
        f"{labels} a task, {over}. Hidden layers: {widths} ({settings.activation}). Prior of every weight: "
        f"N(0, {settings.prior_scale:g}²). Filtered with a {settings.engine} precision{rank}."
    )


def _findings(summary: Summary) -> list[str]:
    lines = {line.label: line for line in summary.lines}
    tuned, chosen, smoother = (lines[n] for n in ("fine-tuning", "chosen filter", "smoother"))

    def per_cent(line: Any, view: str) -> str:
        return shown(summary.spread(line, view, "accuracy"), ".1f", 100) + " %"

    return [
        f"On the task just learnt: fine-tuning {per_cent(tuned, LEARNT)}, filter {per_cent(chosen, LEARNT)}; "
        f"smoothed {per_cent(smoother, SMOOTHED)}.",
        f"One last model for all tasks: fine-tuning {per_cent(tuned, LAST)}, filter {per_cent(chosen, LAST)}, "
        f"joint training {per_cent(lines['joint training'], LAST)}.",
        summary.evidence_sentence(),
    ]


def _accuracy(summary: Summary, over: str) -> dict[str, Any]:
    head = [
        "",
        "task just learnt, %",
        "smoothed belief, %",
        "last belief, all tasks, %",
        "forgetting, points",
        "log evidence, nats",
    ]
    rows = []
    for line in summary.lines:
        views = [
            shown(summary.spread(line, view, "accuracy") if view in line.views else None, ".1f", 100)
            for view in (LEARNT, SMOOTHED, LAST)
        ]
        lost = summary.forgetting(line)
        rows.append([line.label, *views, shown(lost, ".1f", 100), shown(summary.log_evidence(line), ".1f")])
    caption = (
        f"Held-out examples, mean of {summary.settings.tasks} tasks; mean ± standard deviation over {over}. "
        "Three views: belief t on task t right after learning it; the smoothed belief t on task t; the last belief on all "
        "tasks. Forgetting: loss from a task's best accuracy since it was learnt to that at the end."
    )
    return {"head": head, "rows": rows, "words": 1, "caption": caption}


def _calibration(summary: Summary) -> dict[str, Any]:
    head = [
        "",
        "judged",
        "NLL at the mean",
        "NLL averaged",
        "ECE at the mean",
        "ECE averaged",
        "Brier at the mean",
        "Brier averaged",
    ]
    metrics = ("nll", "nll_averaged", "ece", "ece_averaged", "brier", "brier_averaged")
    rows = [
        [line.label, view, *[shown(summary.spread(line, view, metric), ".3f") for metric in metrics]]
        for line in summary.lines
        for view in line.views
    ]
    return {"head": head, "rows": rows, "words": 2}


def _settings(settings: Settings, made_with: dict[str, str]) -> dict[str, Any]:
    def words(value: Any) -> str:
        if isinstance(value, list):
            return ", ".join(map(str, value)) or "none"
        return "–" if value is None else str(value)

    rows = [
        [name.replace("_", "-"), words(value)] for name, value in settings.to_json().items() if name != "data_folder"
    ]
    rows += [[name, value] for name, value in made_with.items()]
    return {"head": ["option", "value"], "rows": rows, "words": 2}
