"""The API reference: what is public, page by page; the text is that of the docstrings.

The names of a façade come from its ``__all__``; modules without one are listed here by their own.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"ssm_nn.models": "models", "ssm_nn.inference": "inference", "ssm_nn": "ssm_nn"}


class Page(NamedTuple):
    """Title, a line about it, and its modules."""

    title: str
    about: str
    modules: tuple[str, ...]


PAGES = {
    "language": Page(
        "The language",
        "What a program is written with. All names are imported from `ssm_nn`.",
        ("ssm_nn",),
    ),
    "models": Page(
        "Kernels, networks and programs",
        "The first group is imported from `ssm_nn.models`, the others from the modules named.",
        (
            "ssm_nn.models",
            "ssm_nn.models.rotations",
            "ssm_nn.models.networks",
            "ssm_nn.models.image_networks",
            "ssm_nn.convolutions",
            "ssm_nn.models.programs",
            "ssm_nn.models.multi_head",
            "ssm_nn.models.low_rank_perturbation",
        ),
    ),
    "data": Page(
        "Streams and data sets",
        "A stream is a function of its arguments alone; data are found in `SSM_NN_DATA`, in a cache, or fetched and verified.",
        (
            "ssm_nn.models.task_streams",
            "ssm_nn.models.image_streams",
            "ssm_nn.models.label_streams",
            "ssm_nn.models.drifting_regression",
            "ssm_nn.models.datasets",
            "ssm_nn.models.downloads",
            "ssm_nn.models.cifar",
            "ssm_nn.models.cifar100",
            "ssm_nn.models.camelyon",
            "ssm_nn.models.omniglot",
            "ssm_nn.models.tiny_imagenet",
            "ssm_nn.models.data_set_stream",
            "ssm_nn.models.svhn",
            "ssm_nn.models.not_mnist",
            "ssm_nn.models.ready_features",
            "ssm_nn.models.text_embeddings",
        ),
    ),
    "inference": Page(
        "Laplace filter and smoother",
        "All names are imported from `ssm_nn.inference`; those of the last two groups from the modules named.",
        ("ssm_nn.inference", "ssm_nn.inference.checkpoints", "ssm_nn.precision"),
    ),
    "mean_field": Page(
        "Mean field (MESU)", "Imported from `ssm_nn.inference.mean_field`.", ("ssm_nn.inference.mean_field",)
    ),
    "last_layer": Page(
        "Last layer and active learning",
        "Imported from `ssm_nn.inference.last_layer`; those of the other groups from the modules named.",
        (
            "ssm_nn.inference.last_layer",
            "ssm_nn.inference.last_layer.classifier",
            "ssm_nn.inference.last_layer.acquisition_curves",
        ),
    ),
    "perturbation": Page(
        "Low-rank perturbation (HALRP)",
        "Imported from `ssm_nn.inference.perturbation`.",
        ("ssm_nn.inference.perturbation",),
    ),
    "diagnosis": Page(
        "Diagnosis",
        "Posteriors judged; imported from `ssm_nn.inference.diagnosis`.",
        ("ssm_nn.inference.diagnosis",),
    ),
    "comparison": Page(
        "Baselines, tuning and metrics",
        "What an engine is compared with, and by which measures.",
        (
            "ssm_nn.inference.metrics",
            "ssm_nn.inference.baselines",
            "ssm_nn.inference.tuning",
        ),
    ),
}


def source_of(module: str) -> Path:
    """The file of a module."""
    package = next(name for name in FOLDERS if module == name or module.startswith(f"{name}."))
    path = ROOT.joinpath(FOLDERS[package], *module.removeprefix(package).strip(".").split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def public_names(module: str) -> list[str]:
    """``__all__`` as the file has it; nothing is imported."""
    for node in ast.parse(source_of(module).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return ast.literal_eval(node.value)
    raise ValueError(f"{module} has no __all__")


def names_of(page: Page) -> dict[str, list[str]]:
    """Module -> names that the page documents; a name stands where it is met first."""
    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    for module in page.modules:
        found[module] = [name for name in public_names(module) if name not in seen]
        seen |= set(found[module])
    return found


def pages() -> dict[str, str]:
    """Place -> Markdown with a directive for every name, which mkdocstrings fills in."""
    made = {}
    for place, page in PAGES.items():
        lines = [f"# {page.title}", "", page.about, ""]
        for module, names in names_of(page).items():
            if names:
                lines += [f"## `{module}`", ""]
                lines += [line for name in sorted(names, key=str.lower) for line in (f"::: {module}.{name}", "")]
        made[f"api/{place}.md"] = "\n".join(lines)
    return made
