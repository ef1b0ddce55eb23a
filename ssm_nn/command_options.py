"""From the options of ``ssm-nn run``, as they were typed, to checked settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssm_nn.command_settings import (
    DEFAULT_NOISE,
    DEFAULT_RANK,
    DEFAULT_STEP,
    DEFAULT_TASKS,
    CommandError,
    Engine,
    KernelChoice,
    Settings,
    Shift,
    whole_numbers,
)

__all__ = ["settings_of", "without_meaningless"]


def settings_of(options: Mapping[str, Any]) -> Settings:
    """The settings; ``options`` holds every option of ``ssm-nn run`` by name, and may hold others.

    Raises:
        CommandError: for options that have no meaning together, and for values that are not accepted.
    """
    shift, engine, kernel = Shift(options["shift"]), Engine(options["engine"]), KernelChoice(options["kernel"])
    for name, sentence in _meaningless(options).items():
        if options[name] is not None:
            raise CommandError(sentence)
    folder, tasks, step, rank = (options[name] for name in ("data_folder", "tasks", "step", "rank"))
    return Settings(
        data=options["data"].value,
        data_folder=None if folder is None else str(folder),
        shift=shift.value,
        tasks=DEFAULT_TASKS[shift.value] if tasks is None else tasks,
        step=(DEFAULT_STEP if step is None else step) if shift == Shift.ROTATE else None,
        labels=_labels(options["labels"]),
        hidden=_widths(options["hidden"]),
        activation=options["activation"].value,
        engine=engine.value,
        rank=(DEFAULT_RANK if rank is None else rank) if engine == Engine.LOW_RANK else None,
        kernel=kernel.value,
        noise=() if kernel == KernelChoice.STATIC else tuple((options["noise"] or DEFAULT_NOISE).split(",")),
        **{name: options[name] for name in ("prior_scale", "seeds", "seed", "draws", "epochs", "batch_size")},
    )


def without_meaningless(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without those that have no meaning beside the others."""
    return dict(options) | dict.fromkeys(_meaningless(options))


def _meaningless(options: Mapping[str, Any]) -> dict[str, str]:
    """Name -> why, of the options that the others leave without a meaning."""
    shift, engine, kernel = options["shift"], options["engine"], options["kernel"]
    found = {}
    if shift != Shift.ROTATE:
        found["step"] = f"--step is for --shift rotate; it has no meaning with --shift {shift.value}."
    if engine != Engine.LOW_RANK:
        found["rank"] = f"--rank is for --engine low-rank; it has no meaning with --engine {engine.value}."
    if kernel == KernelChoice.STATIC:
        found["noise"] = "--noise has no meaning with --kernel static; use --kernel auto or walk."
    return found


def _labels(text: str) -> int | None:
    if text in ("0", "all"):
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10):  # Python reads no number of thousands of digits
        raise CommandError(f"--labels is {text!r}; a whole number >= 1, or 0 or all for all examples, is accepted.")
    return int(text)


def _widths(text: str) -> tuple[int, ...]:
    return () if text == "none" else whole_numbers("--hidden", text, ", or none,")
