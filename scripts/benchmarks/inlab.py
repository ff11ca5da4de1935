"""What the benchmarks in the lab share: the lab itself, clusters started in it as a person would, and the surroundings.

Covers starting a lab with engines, daemons and the image of workers, ``dask-boot.sh`` on its client's host with the
time of every line that it writes, and naming machine and commit. Does not cover measuring anything (``boot.py``,
``tunnel.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask

from meshcompute.lab.errors import LabError
from meshcompute.lab.images import IMAGE, open_image_store
from meshcompute.lab.running import RunningLab
from meshcompute.lab.starting import check_machine, find_accounts, find_readable, start_lab
from meshcompute.lab.topology import SYSTEM_PATH, Lab

TOP = Path(__file__).resolve().parents[2]
SITES = {"ecmwf": "mesh@10.8.0.4", "eumetsat": "mesh@10.8.0.2"}
HOSTS = ("client", *SITES)
READY_SECONDS = 120.0
GONE_SECONDS = 60.0
LOOK_SECONDS = 0.02


class Boot:
    """``dask-boot.sh`` on the client's host, as a person starts it.

    Parameters
    ----------
    lab
        Where.
    *arguments
        Of the command, after the sites.
    sites
        Names of the sites.
    """

    def __init__(self, lab: RunningLab, *arguments: str, sites: Iterable[str] = tuple(SITES)) -> None:
        command = (str(TOP / "scripts/dask-boot.sh"), *(SITES[site] for site in sites), *arguments)
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        prepared, variables = lab.command("client", command, user="mesh")
        self.started = time.time()
        self.process = subprocess.Popen(prepared, env=variables, text=True, **pipes)
        self.lines: list[tuple[float, str]] = []  # seconds since it was started, and what it wrote
        self._arrived = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._arrived:
                self.lines.append((time.time() - self.started, line.rstrip("\n")))
                self._arrived.notify_all()
        with self._arrived:
            self._arrived.notify_all()

    def wait_for(self, text: str, timeout: float = READY_SECONDS) -> tuple[float, str]:
        """Wait for a line with this text; gives when it came, in seconds since the start, and the line."""
        deadline = time.monotonic() + timeout
        with self._arrived:
            while True:
                for line in self.lines:
                    if text in line[1]:
                        return line
                if not self._reader.is_alive() or time.monotonic() > deadline:
                    raise RuntimeError(f"dask-boot.sh did not say {text!r}:\n" + "\n".join(x for _, x in self.lines))
                self._arrived.wait(0.2)

    @property
    def address(self) -> str:
        """Where the scheduler is, as seen from the client's host."""
        return self.wait_for("scheduler at ")[1].rpartition("scheduler at ")[2].split()[0]

    def stop(self) -> float:
        """Have it take everything down; gives how many seconds that took."""
        if self.process.poll() is not None:
            raise RuntimeError("dask-boot.sh has ended:\n" + "\n".join(line for _, line in self.lines))
        began = time.time()
        # The process on the host: what enters the host for it passes no signal on.
        for child in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGTERM)
        code = self.process.wait(GONE_SECONDS)
        took = time.time() - began
        self._reader.join(GONE_SECONDS)
        if code:
            raise RuntimeError(f"dask-boot.sh ended with {code}:\n" + "\n".join(line for _, line in self.lines))
        return took


@contextmanager
def booted(lab: RunningLab, *arguments: str, sites: Iterable[str] = tuple(SITES)) -> Iterator[Boot]:
    """Have a cluster while the block runs; it is taken down if the block has not done so."""
    boot = Boot(lab, *arguments, sites=sites)
    try:
        boot.wait_for(" ready: ")
        yield boot
    finally:
        if boot.process.poll() is None:
            boot.stop()


@contextmanager
def open_lab(image: Path | None, **options: Any) -> Iterator[RunningLab]:
    """Have a lab while the block runs; it ends with this process, whatever ends that. Options are those of ``Lab``."""
    path = ":".join(dict.fromkeys([str(Path(sys.executable).parent), *os.get_exec_path(), *SYSTEM_PATH.split(":")]))
    lab = Lab(
        name=f"benchmark-{os.getpid()}",
        path=path,
        accounts=find_accounts(),
        readable=find_readable(str(TOP)),
        engine=True,
        daemon=True,
        **options,
    )
    check_machine(lab)  # before the image, which takes long
    with ExitStack() as stack:
        store, lock = open_image_store(image, say=say)
        stack.callback(os.close, lock)
        lab = replace(lab, image_store=str(store))
        guardian = start_lab(lab, dies_with_us=True, locks=(lock,))
        running = RunningLab(lab.name)

        def stop() -> None:
            running.stop()
            guardian.wait(GONE_SECONDS)

        stack.callback(stop)
        for host in HOSTS:
            asked: tuple[tuple[str, ...], ...] = (("docker", "image", "inspect", IMAGE), ("meshcompute-site", "ping"))
            for command in asked:
                wait_until(
                    lambda h=host, c=command: running.run(h, *c, check=False).returncode == 0,
                    f"{host} answers `{' '.join(command)}`",
                )
        yield running


def wait_until(is_true: Callable[[], object], what: str) -> None:
    """Wait for a state."""
    deadline = time.monotonic() + GONE_SECONDS
    while not is_true():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {GONE_SECONDS:g} s: {what}")
        time.sleep(LOOK_SECONDS)


def containers(lab: RunningLab, host: str) -> dict[str, int]:
    """Containers that a host's engine has: the process of each, by name, as that host numbers it."""
    names = lab.run(host, "docker", "ps", "--all", "--format", "{{.Names}}").stdout.split()
    form = "{{.State.Pid}}"
    return {name: int(lab.run(host, "docker", "inspect", "--format", form, name).stdout) for name in names}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what all of these benchmarks take."""
    image = os.environ.get("MESHCOMPUTE_WORKER_IMAGE")
    parser.add_argument(
        "--image",
        type=Path,
        default=Path(image) if image else None,
        help="archive with the image of workers [$MESHCOMPUTE_WORKER_IMAGE, else the lab builds one]",
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    parser.add_argument("--json", type=Path, help="write the figures to this file")


def surroundings() -> str:
    """Name the machine and what was measured on it."""
    commit = subprocess.run(
        ["git", "-C", str(TOP), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return (
        f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, dask {dask.__version__}, "
        f"commit {commit.stdout.strip() or 'unknown'}, load {os.getloadavg()[0]:.1f} before the first run"
    )


def report(results: dict[str, Any], missed: list[str], options: argparse.Namespace) -> int:
    """Write the figures if that was asked for, name the bars that were missed, and give the exit code."""
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    for line in missed:
        print(f"MISSED: {line}")
    return int(bool(options.check and missed))


def run(main: Callable[[], int]) -> None:
    """Run a benchmark as a program: what it could not do is one message, and everything is ended on Ctrl-C and TERM."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    try:
        code = main()
    except KeyboardInterrupt:
        say("interrupted; everything that was started has been ended")
        code = 130  # as shells report it
    except (LabError, RuntimeError, OSError) as exc:
        say(f"error: {exc}")
        code = 2
    sys.exit(code)


def say(line: str) -> None:
    """Tell a waiting person; standard output has the figures."""
    print(line, file=sys.stderr, flush=True)
