"""Folders go with their owner, at the latest when the next one comes."""

from __future__ import annotations

import subprocess
import sys
import uuid

import pytest

from meshcompute.scratch import ScratchFolder, sweep


@pytest.fixture(name="prefix")
def _prefix() -> str:
    return f"meshcompute-test-{uuid.uuid4().hex[:8]}-"


def test_a_folder_is_there_in_its_block_only(prefix: str) -> None:
    with ScratchFolder(prefix) as folder:
        (folder.path / "x").write_text("x")
        assert sweep(prefix) == []
        assert folder.path.exists()
    assert not folder.path.exists()
    folder.remove()


def test_what_a_killed_owner_left_goes_when_the_next_one_comes(prefix: str) -> None:
    code = f"from meshcompute.scratch import ScratchFolder; print(ScratchFolder({prefix!r}).path, flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        left = owner.stdout.readline().strip()
        with ScratchFolder(prefix) as other:
            assert sweep(prefix) == []
            owner.kill()
            owner.wait()
            assert [str(path) for path in sweep(prefix)] == [left]
            assert other.path.exists()


def test_a_folder_that_is_not_ours_is_left_alone(prefix: str) -> None:
    import shutil
    import tempfile
    from pathlib import Path

    other = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        with ScratchFolder(prefix):
            assert other.exists()
    finally:
        shutil.rmtree(other)
