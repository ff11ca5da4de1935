"""The notebooks run from top to bottom, as a reader would run them, and are kept without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
BY_NAME = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["01-pools"]


@BY_NAME
def test_a_notebook_is_kept_without_outputs(path):
    for cell in nbformat.read(path, 4).cells:
        assert not cell.get("outputs"), cell.source
        assert cell.get("execution_count") is None, cell.source


@BY_NAME
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default::DeprecationWarning")  # Jupyter's own, in the process that drives the kernel
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(path, 4)
    # Its folder is empty: what it imports is installed, what it reads it has made.
    client = NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    written = [output["text"] for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    assert not [text for text in written if "Traceback" in text or "Error" in text], written
    assert any("image/png" in output.get("data", {}) for output in outputs)
