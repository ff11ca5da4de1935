"""``meshcompute demo`` on the lab, with containers and WireGuard; and the one line that starts all of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from meshcompute.cli import mesh
from meshcompute.lab.running import RunningLab

TOP = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "meshcompute")


@contextmanager
def running(*arguments: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a command of ours, with what it prints and says as one text."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=cwd,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # as a terminal's job: a Ctrl-C reaches all of it
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """Read until a line has this text; gives all that was read."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"no {text!r} in:\n{''.join(lines)}")


def image() -> str:
    """Archive with the workers' image."""
    return os.environ["MESHCOMPUTE_WORKER_IMAGE"]


@pytest.mark.timeout(300)
def test_the_demo_in_a_lab_of_its_own_shows_the_main_job_and_leaves_a_picture_alone(
    can_have_mesh: None, expect_nothing_left: Callable[[RunningLab], None], tmp_path: Path
) -> None:
    arguments = ("--lab", "--reference", "--scale", "0.05", "--workers", "2", "--image", image(), "--output", "map.png")
    with running("demo", *arguments, cwd=tmp_path) as process:
        said = read_until(process, " reached in ")
        lab = RunningLab(f"demo-{process.pid}")
        assert {link.shape.delay_seconds for link in lab.links().values()} == {0.02}
        expect_nothing_left(lab)
        assert process.stdout is not None
        said += process.stdout.read()
        assert process.wait(60) == 0, said
    assert "3 links have shaken hands" in said
    assert "ready: 4 workers" in said
    assert "ecmwf: /data/ecmwf/predictions.nc (6.97 MiB)" in said  # read-only, at the site, where an operator puts it
    assert re.search(r"FileNotFoundError: .*'/data/(ecmwf/predictions|eumetsat/ad-hoc/observations)\.nc'", said)
    field = 48 * 64 * 4 / 2**10
    crossed = re.search(r"^   eumetsat +ecmwf .* ([\d.]+) kiB$", said, re.MULTILINE)
    assert crossed, said
    assert field <= float(crossed[1]) <= 1.2 * field
    assert "equal: the largest difference" in said
    assert "everything is taken down" in said
    assert "the lab is down" in said
    assert (tmp_path / "map.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]


@pytest.mark.timeout(300)
def test_one_line_starts_a_lab_boots_a_cluster_runs_the_demo_and_ends_both(
    can_have_mesh: None, expect_nothing_left: Callable[[RunningLab], None], tmp_path: Path
) -> None:
    boot = (str(TOP / "scripts/dask-boot.sh"), "mesh@10.8.0.4", "mesh@10.8.0.2")
    demo = ("python", "-m", "meshcompute", "demo", "--reference", "--scale", "0.05")
    name = f"line-{os.getpid()}"
    line = ("lab", "run", "--name", name, "--image", image(), "--", *boot, "--", *demo)
    with running(*line, cwd=tmp_path) as process:
        said = read_until(process, " reached in ")
        expect_nothing_left(RunningLab(name))
        assert process.stdout is not None
        said += process.stdout.read()
        assert process.wait(60) == 0, said
    assert "ready: 8 workers" in said
    assert re.search(r"ecmwf: /tmp/meshcompute-demo-\S+/ecmwf/predictions\.nc", said)  # workers wrote it, in their own
    assert "equal: the largest difference" in said
    assert (tmp_path / "meshcompute-demo.png").stat().st_size > 10_000


@pytest.mark.timeout(200)
@pytest.mark.usefixtures("can_be_interrupted")
def test_ctrl_c_half_way_ends_the_lab_as_well(
    can_have_mesh: None, expect_nothing_left: Callable[[RunningLab], None], tmp_path: Path
) -> None:
    arguments = ("--lab", "--reference", "--scale", "0.02", "--workers", "1", "--image", image())
    with running("demo", *arguments, cwd=tmp_path) as process:
        read_until(process, "gateways made")
        expect_nothing_left(RunningLab(f"demo-{process.pid}"))
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout is not None
        said = process.stdout.read()
        assert process.wait(90) == 130, said
    assert "the lab is down" in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_the_plain_demo_runs_without_root_and_its_sites_are_isolated_all_the_same(lab: RunningLab) -> None:
    demo = (*COMMAND, "demo", "--reference", "--scale", "0.02", "--workers", "1", "--output", "/home/mesh/map.png")
    said = lab.run("client", *demo, user="mesh", timeout=110).stdout
    assert "ready: 2 workers" in said
    assert "FileNotFoundError: " in said  # user namespaces hide the other site's folder
    assert "equal: the largest difference" in said
    assert not lab.run("client", "pgrep", "-u", "mesh", check=False).stdout


def test_without_root_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("meshcompute.lab.starting.os.geteuid", lambda: 1000)
    shown = CliRunner().invoke(mesh, ["demo", "--lab", "--output", str(tmp_path / "map.png")])
    assert shown.exit_code == 1
    assert shown.output == "Error: A lab needs root: it makes namespaces and mounts. Run it with sudo.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--delay", "20"], "add --lab"),
        (["--lab", "--scheduler", "tcp://127.0.0.1:8786"], "leave --scheduler and --data away"),
        (["--data", "/data"], "add --scheduler"),
    ],
)
def test_options_that_do_not_go_together_are_named(arguments: list[str], message: str) -> None:
    shown = CliRunner().invoke(mesh, ["demo", *arguments])
    assert shown.exit_code == 2
    assert message in shown.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "ecmwf"], "write SITE=FOLDER"),
        (["--data", "ecmwf=/no/such/folder"], "with a folder that exists"),
        (["--data", "metoffice=/tmp"], "no such site. It has ecmwf and eumetsat"),
        (["--nat", "metoffice"], "no such site"),
    ],
)
def test_a_lab_says_which_sites_it_has(arguments: list[str], message: str) -> None:
    shown = CliRunner().invoke(mesh, ["lab", "up", *arguments])
    assert shown.exit_code == 2
    assert message in shown.output
