"""The notebooks run from the committed results, and are committed without their outputs."""

from pathlib import Path

import nbclient
import nbformat
import pytest

ANALYSIS = Path(__file__).resolve().parent.parent / "analysis"


@pytest.mark.parametrize("path", sorted(ANALYSIS.glob("*.ipynb")), ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_notebook_runs_from_what_was_committed(path, monkeypatch):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    monkeypatch.setenv("PYTHONPATH", str(ANALYSIS.parent))
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ANALYSIS)}}).execute()
    assert any(cell.outputs for cell in code)
