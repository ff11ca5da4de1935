"""The benchmark of the reference calculation, small: every way gives the right result, and ours is ahead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from meshcompute.lab.starting import find_program

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/benchmarks/reference.py"


@pytest.mark.timeout(1800)  # two minutes on a machine that has nothing else to do
def test_every_way_computes_the_reference_and_ours_sends_least(
    can_have_mesh: None, need: Callable[..., None], tmp_path: Path
) -> None:
    need("sshfs", find_program("sshfs"), "apt-get install sshfs")
    need("FUSE", os.access("/dev/fuse", os.R_OK | os.W_OK))
    options = ("--quick", "--check", "--output", str(tmp_path), "--data", str(tmp_path / "data"))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([sys.executable, str(SCRIPT), *options], **pipes) as process:
        try:
            said = process.communicate(timeout=1740)[0]
        finally:
            process.terminate()  # it ends in order, if it has not
    assert process.returncode == 0, said
    found = json.loads((tmp_path / "reference.json").read_text())["calculations"]["ensemble"]
    rows = {row["number"]: row for row in found["rows"]}
    assert list(rows) == list("12345678")
    assert all(row["is_right"] for row in rows.values())
    for picture in ("ways", "traffic", "7-tasks"):
        assert (tmp_path / f"ensemble-{picture}.png").stat().st_size > 10_000
    assert (tmp_path / "ensemble-7-report.html").exists()
