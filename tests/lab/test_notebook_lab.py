"""The notebook of two data centres runs from top to bottom on the client's host of the lab."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from labbench import LabBench

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "02-two-data-centres.ipynb"
# Small fields: what is shown does not depend on their size.
WRITE = """
import sys
from meshcompute import sampledata
getattr(sampledata, "write_" + sys.argv[1])(sys.argv[2], 0.05)
"""
# Jupyter's and matplotlib's own files go where nothing stays.
EXECUTE = """
import json, os, sys, tempfile
with tempfile.TemporaryDirectory() as home:
    os.environ |= {"IPYTHONDIR": home, "JUPYTER_RUNTIME_DIR": home, "JUPYTER_CONFIG_DIR": home, "MPLCONFIGDIR": home}
    import nbformat
    from nbclient import NotebookClient
    notebook = nbformat.read(sys.argv[1], 4)
    NotebookClient(notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": home}}).execute()
    print("executed" + json.dumps([cell.get("outputs", []) for cell in notebook.cells]))
"""


@pytest.mark.timeout(400)
def test_it_runs_from_boot_to_plot(bench: LabBench) -> None:
    files = {"ecmwf": "predictions.nc", "eumetsat": "ad-hoc/observations.nc"}
    bench.lab.shape(delay_seconds=0.02)
    try:
        for site, file in files.items():
            what = Path(file).stem
            bench.lab.run(site, sys.executable, "-c", WRITE, what, f"/data/{site}/{file}")
        said = bench.python(EXECUTE, str(NOTEBOOK), timeout=380)
    finally:
        for site, file in files.items():
            bench.lab.run(site, "rm", "-r", f"/data/{site}/{Path(file).parts[0]}")
    outputs = [output for cell in json.loads(said.partition("executed")[2]) for output in cell]
    text = "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")
    assert "ecmwf-1-0     tcp://[fda5:c0ff:eeee:1::11]:" in text
    assert "No such file or directory" in text  # without pools
    copied, sent = (
        float(re.search(rf"{way} .* ([\d.]+) MiB", text)[1]) for way in ("copy_then_compute", "at_the_data")
    )
    assert sent < copied / 5
    assert "everything is taken down" in text
    assert "no cluster of yours runs on this host" in text
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
