"""Notebooks as pages: executed with a kernel, their outputs kept beside the build by a hash of what they depend on."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
KEPT = ROOT / "build" / "notebooks"
# what a cell returns that ends with a call of matplotlib: the picture says it
HANDLES = re.compile(r"^\[?(<matplotlib|Text\(|\(array\()")


def notebooks() -> list[Path]:
    """All of them, in order."""
    return sorted(FOLDER.glob("*.ipynb"))


def digest(path: Path) -> str:
    """Of the notebook, of the package's sources, and of the size asked for."""
    total = hashlib.sha256(os.environ.get("SSM_NN_NOTEBOOKS", "").encode())
    sources = [file for folder in ("ssm_nn", "models", "inference") for file in (ROOT / folder).rglob("*.py")]
    for file in (path, *sorted(set(sources))):
        total.update(file.read_bytes())
    return total.hexdigest()[:16]


def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook with outputs; run anew where it, the package or the size asked for has changed."""
    kept = KEPT / f"{path.stem}-{digest(path)}.ipynb"
    if not kept.exists():
        notebook = nbformat.read(path, as_version=4)
        print(f"executing {path.name}", flush=True)
        os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # there is no front end that would draw a bar
        client = NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(FOLDER)}})
        client.execute()
        KEPT.mkdir(parents=True, exist_ok=True)
        for old in KEPT.glob(f"{path.stem}-*.ipynb"):
            old.unlink()
        nbformat.write(notebook, kept)
    return nbformat.read(kept, as_version=4)


def pages(with_outputs: bool) -> dict[str, str | bytes]:
    """Place -> Markdown, and the pictures; without outputs where no notebook is to be executed."""
    settings = Config({"NbConvertBase": {"display_data_priority": ["text/html", "image/png", "text/plain"]}})
    exporter = MarkdownExporter(config=settings)
    made: dict[str, str | bytes] = {}
    for path in notebooks():
        notebook = _without_handles(executed(path)) if with_outputs else nbformat.read(path, as_version=4)
        names = {"unique_key": path.stem, "output_files_dir": path.stem}
        text, resources = exporter.from_notebook_node(notebook, resources=names)
        made[f"notebooks/{path.stem}.md"] = text + _origin(path)
        made |= {f"notebooks/{name}": content for name, content in resources["outputs"].items()}
    return made


def _without_handles(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    for cell in notebook.cells:
        if cell.cell_type == "code":
            texts = [out.get("data", {}).get("text/plain", "") for out in cell.outputs]
            cell.outputs = [
                out
                for out, text in zip(cell.outputs, texts, strict=True)
                if out.output_type != "execute_result" or not HANDLES.match(text)
            ]
    return notebook


def _origin(path: Path) -> str:
    return f"\n\n---\n\nThis page is `notebooks/{path.name}`, run from top to bottom.\n"
