"""The benchmark of the reference calculation, small: every way gives the right result, and ours is ahead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meshcompute.lab.starting import find_program

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/benchmarks/reference.py"


@pytest.fixture
def can_mount(can_have_mesh: None, need: Callable[..., None]) -> None:
    """What the benchmark needs beside a lab."""
    need("sshfs", find_program("sshfs"), "apt-get install sshfs")
    need("FUSE", os.access("/dev/fuse", os.R_OK | os.W_OK))


def run_quick(folder: Path, *options: str) -> dict[str, Any]:
    """Run it small, and give what it found out about each calculation."""
    common = ("--quick", "--check", "--output", str(folder), "--data", str(folder / "data"))
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([sys.executable, str(SCRIPT), *common, *options], **pipes) as process:
        try:
            said = process.communicate(timeout=1740)[0]
        finally:
            process.terminate()  # it ends in order, if it has not
    assert process.returncode == 0, said
    found: dict[str, Any] = json.loads((folder / "reference.json").read_text())["calculations"]
    return found


@pytest.mark.timeout(1800)  # two minutes on a machine that has nothing else to do
def test_every_way_computes_the_reference_and_ours_sends_least(can_mount: None, tmp_path: Path) -> None:
    found = run_quick(tmp_path)["ensemble"]
    rows = {row["number"]: row for row in found["rows"]}
    assert list(rows) == list("12345678")
    assert all(row["is_right"] for row in rows.values())
    for picture in ("ways", "traffic", "7-tasks"):
        assert (tmp_path / f"ensemble-{picture}.png").stat().st_size > 10_000
    assert (tmp_path / "ensemble-7-report.html").exists()


@pytest.mark.timeout(1800)  # one minute
def test_data_in_object_stores_that_only_their_sites_reach_are_computed_there(can_mount: None, tmp_path: Path) -> None:
    found = run_quick(tmp_path, "--calculations", "zarr", "--ways", "2,7")["zarr"]
    rows = {row["number"]: row for row in found["rows"]}
    assert list(rows) == ["2", "7"]
    assert all(row["is_right"] for row in rows.values())
    assert rows["7"]["reads"] > 0
    assert rows["7"]["reads_away"] == 0
