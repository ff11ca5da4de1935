"""The notebooks run from top to bottom, as a reader would run them, and are kept as they should be.

``02-two-data-centres`` needs the lab: ``tests/lab/test_notebook_lab.py`` runs it.
"""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
ANYWHERE = FOLDER / "01-pools.ipynb"
IN_THE_LAB = FOLDER / "02-two-data-centres.ipynb"
NBYTES_MAX = 400_000  # of a notebook with its pictures


def test_there_are_notebooks():
    assert sorted(FOLDER.glob("*.ipynb")) == [ANYWHERE, IN_THE_LAB]


def test_what_everybody_can_run_is_kept_without_outputs():
    for cell in nbformat.read(ANYWHERE, 4).cells:
        assert not cell.get("outputs"), cell.source
        assert cell.get("execution_count") is None, cell.source


def test_what_needs_the_lab_is_kept_as_it_was_executed():
    cells = [cell for cell in nbformat.read(IN_THE_LAB, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "execute_result", "display_data"}  # no error
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert IN_THE_LAB.stat().st_size < NBYTES_MAX
    assert not re.search(r"/(root|work|site-packages|\.venv[\w-]*)/", IN_THE_LAB.read_text())  # nobody's own paths


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default::DeprecationWarning")  # Jupyter's own, in the process that drives the kernel
def test_what_everybody_can_run_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(ANYWHERE, 4)
    # Its folder is empty: what it imports is installed, what it reads it has made.
    client = NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    written = [output["text"] for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    assert not [text for text in written if "Traceback" in text or "Error" in text], written
    assert any("image/png" in output.get("data", {}) for output in outputs)
