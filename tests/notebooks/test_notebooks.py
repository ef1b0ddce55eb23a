"""Every notebook runs from top to bottom, and is stored without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


LONG = {  # minutes
    "02_kernels_and_shift",
    "03_filtering_and_smoothing",
    "04_forgetting_and_uncertainty",
    "05_last_layer",
    "06_what_ranks_say",
    "07_diagnosing",
    "08_own_engine_and_kernel",
}


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in LONG else []) for path in NOTEBOOKS],
)
def test_notebook_runs_and_is_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()
    errors = [out for cell in code for out in cell.outputs if out.output_type == "error"]
    assert not errors
    assert any("image/png" in out.get("data", {}) for cell in code for out in cell.outputs)
