"""Keep the processes of a unit: the program that runs inside a worker's container, and as its own process elsewhere.

Covers waiting for the data-plane address, starting the processes of a plan, replacing those that exit (unless the plan
says that the end of one is the end of the unit), forwarding what they write, and ending all of them on a signal or when
the deadline has passed. Does not cover who writes the plan and renews the deadline (:mod:`.runfolder`) nor the command
lines in it (:mod:`.commands`).

It needs Python and nothing else, so that it runs in any image: ``python -I entrypoint.py FOLDER``. The folder, which
the processes cannot write, has ``plan.json`` and ``lease``: a point in time of CLOCK_MONOTONIC, or
``stop`` and the seconds that processes get to end by themselves.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import selectors
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["EXIT_LEASE_ENDED", "EXIT_NOT_REPLACED", "EXIT_NO_ADDRESS", "Keeper", "Lease"]

EXIT_LEASE_ENDED = 3
EXIT_NO_ADDRESS = 4
EXIT_NOT_REPLACED = 5
TICK_SECONDS = 0.2  # how late a passed deadline is seen at most
RESTART_SECONDS_MIN = 0.2
RESTART_SECONDS_MAX = 10.0
STEADY_SECONDS = 30.0  # who ran that long is restarted at once
LINE_BYTES_MAX = 1 << 16
PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36


class Lease:
    """The deadline in a file; what cannot be read leaves the last deadline as it was.

    Parameters
    ----------
    folder
        Descriptor of the open folder with the file: a folder that takes its name later is not ours.
    """

    def __init__(self, folder: int) -> None:
        self.folder = folder
        self.deadline = time.monotonic()
        self.is_stopped = False
        self.grace_seconds: float | None = None

    def read(self) -> None:
        """Take the deadline from the file. Another file takes its place at once, so it is never half written."""
        try:
            words = _read(self.folder, "lease").split()
            if words[0] == "stop":
                self.is_stopped = True
                self.grace_seconds = float(words[1])
            else:
                self.deadline = float(words[0])
        except (OSError, ValueError, IndexError):
            return  # its folder may be gone; the last deadline still ends us

    def has_ended(self) -> bool:
        """Tell whether the deadline has passed; a deadline that is not a number has."""
        return not time.monotonic() < self.deadline


@dataclass(slots=True)
class _Kept:
    name: str
    argv: list[str]
    environment: dict[str, str]
    scratch: Path
    pid: int | None = None
    started: float = 0.0
    start_again: float = 0.0
    pause: float = RESTART_SECONDS_MIN
    unwritten: bytes = b""
    output: int | None = field(default=None)


class Keeper:
    """Start the processes of a plan and keep them until the lease ends.

    Parameters
    ----------
    plan
        ``processes`` (``name``, ``argv``, ``environment``), ``address`` to wait for or ``None``,
        ``address_timeout_seconds``, ``grace_seconds``, ``scratch``, ``log_bytes_max``, ``replaces``: whether a
        process that exits is started again, and ``nursery`` (``argv``, ``imports``): the program from which they all
        come at first, with the environment of the first (:mod:`.nursery`), or ``None``.
    lease
        When to end.
    """

    def __init__(self, plan: dict[str, Any], lease: Lease) -> None:
        self.plan = plan
        self.lease = lease
        self.kept = [
            _Kept(p["name"], p["argv"], p["environment"], Path(plan["scratch"]) / p["name"]) for p in plan["processes"]
        ]
        self.is_ending = False
        self._is_over = False
        self._selector = selectors.DefaultSelector()
        self._libc = ctypes.CDLL(None)
        self._nursery: subprocess.Popen[bytes] | None = None
        self._reports: int | None = None  # of the nursery, as long as it may write
        self._reported = b""

    def run(self) -> int:
        """Do all of it.

        Returns
        -------
        int
            Exit code: 0 after a signal or ``stop``, else one of the constants of this module.
        """
        self._libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # children of tasks come to us when their parent ends
        self._listen_to_signals()
        os.set_blocking(1, False)  # an engine that has died must not keep us from ending: see _write
        self._start_nursery()
        code = self._wait_for_address()
        if code is None:
            self._release_nursery()
        while code is None:
            code = self._reason_to_end()
            if code is None:
                self._start_missing()
                self._turn()
        self._end()
        return code

    def _listen_to_signals(self) -> None:
        def end(number: int, _frame: object) -> None:
            self.is_ending |= number != signal.SIGCHLD

        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, end)
        self._selector.register(reader, selectors.EVENT_READ)

    def _reason_to_end(self) -> int | None:
        self.lease.read()
        if self.is_ending or self.lease.is_stopped:
            self._say("ending")
            return 0
        if self.lease.has_ended():
            self._say("the lease has ended, and so does this unit")
            return EXIT_LEASE_ENDED
        if self._is_over:
            self._say("what ended is not started again, and so this unit ends")
            return EXIT_NOT_REPLACED
        return None

    def _wait_for_address(self) -> int | None:
        address = self.plan["address"]
        if address is None:
            return None
        self._say(f"waiting for the address {address}")
        until = time.monotonic() + self.plan["address_timeout_seconds"]
        while (code := self._reason_to_end()) is None:
            with contextlib.suppress(OSError), socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
                probe.bind((address, 0))  # fails while the address is missing, or tentative
                return None
            if time.monotonic() > until:
                self._say(f"the address {address} did not appear in {self.plan['address_timeout_seconds']:g} s")
                return EXIT_NO_ADDRESS
            self._turn(0.05)
        return code

    def _turn(self, seconds: float = TICK_SECONDS) -> None:
        """Wait for something to happen, and take it in."""
        for key, _ in self._selector.select(seconds):
            if key.fd == self._reports:
                continue
            data = b""
            with contextlib.suppress(BlockingIOError):
                data = os.read(key.fd, LINE_BYTES_MAX)
            if isinstance(key.data, _Kept):
                self._forward(key.data, key.fd, data)
        self._hear_nursery()
        self._reap()

    # Processes

    def _start_missing(self) -> None:
        now = time.monotonic()
        for kept in self.kept:
            if kept.pid is None and now >= kept.start_again:
                self._start(kept, now)

    def _start(self, kept: _Kept, now: float) -> None:
        kept.started = now
        reader, writer = os.pipe()
        try:
            kept.scratch.mkdir(parents=True, exist_ok=True)
            process = self._popen(kept.argv, kept.environment, writer, stdin=subprocess.DEVNULL, cwd=kept.scratch)
        except OSError as exc:
            os.close(reader)
            self._say(f"{kept.name} cannot be started: {exc}")
            self._plan_restart(kept)
            return
        finally:
            os.close(writer)
        kept.pid = process.pid
        self._listen_to(kept, reader)

    def _popen(
        self, argv: list[str], environment: dict[str, str], output: int, **options: Any
    ) -> subprocess.Popen[bytes]:
        keeper = os.getpid()

        def die_with_keeper() -> None:
            self._libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != keeper:
                os._exit(1)

        process = subprocess.Popen(
            argv,
            stdout=output,
            stderr=output,
            env={**os.environ, **environment},
            start_new_session=True,  # a group of its own, so that what it starts ends with it
            preexec_fn=die_with_keeper,  # noqa: PLW1509 - this program has one thread
            **options,
        )
        process.returncode = 0  # waited for in _reap, with everybody else
        return process

    def _listen_to(self, kept: _Kept, reader: int) -> None:
        os.set_blocking(reader, False)
        kept.output = reader
        self._selector.register(reader, selectors.EVENT_READ, kept)

    # The nursery, from which they come at first

    def _start_nursery(self) -> None:
        """Let it import while the address is awaited; without it each process is started by itself."""
        if self.plan["nursery"] is None:
            return
        reports, report = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        outputs = [os.pipe() for _ in self.kept]
        writers = [writer for _, writer in outputs]
        room = max(sum(len(os.fsencode(word)) + 1 for word in kept.argv) for kept in self.kept)
        argv = [
            *self.plan["nursery"]["argv"],
            str(self.lease.folder),
            str(report),
            ",".join(map(str, writers)),
            " " * room,
        ]
        try:
            for kept in self.kept:
                kept.scratch.mkdir(parents=True, exist_ok=True)
            fds = (self.lease.folder, report, *writers)
            environment = self.kept[0].environment
            self._nursery = self._popen(argv, environment, writers[0], stdin=subprocess.PIPE, pass_fds=fds)
        except OSError as exc:
            self._say(f"the nursery cannot be started: {exc}")
            for fd in (reports, *(reader for reader, _ in outputs)):
                os.close(fd)
            return
        finally:
            for fd in (report, *writers):
                os.close(fd)
        self._reports = reports
        self._selector.register(reports, selectors.EVENT_READ)
        for kept, (reader, _) in zip(self.kept, outputs, strict=True):
            kept.start_again = math.inf
            self._listen_to(kept, reader)

    def _release_nursery(self) -> None:
        """Tell it that the address is there."""
        if self._nursery is not None:
            assert self._nursery.stdin is not None
            with contextlib.suppress(BrokenPipeError), self._nursery.stdin as stdin:
                stdin.write(b"\n")

    def _hear_nursery(self) -> None:
        """Take note of processes that it has made, and at its end start those that it has not."""
        while self._reports is not None:
            try:
                data = os.read(self._reports, LINE_BYTES_MAX)
            except BlockingIOError:
                return
            *lines, self._reported = (self._reported + data).split(b"\n")
            for line in lines:
                number, pid = map(int, line.split())
                self.kept[number].pid, self.kept[number].started = pid, time.monotonic()
            if not data:  # it and all that it has made have closed the other end
                self._selector.unregister(self._reports)
                os.close(self._reports)
                self._reports = None
                for kept in self.kept:
                    if kept.pid is None and kept.start_again == math.inf:
                        self._say(f"{kept.name} does not come from the nursery, and is started by itself")
                        kept.start_again = 0.0

    def _plan_restart(self, kept: _Kept) -> None:
        self._is_over |= not self.plan["replaces"]
        now = time.monotonic()
        kept.pause = RESTART_SECONDS_MIN if now - kept.started > STEADY_SECONDS else kept.pause
        kept.start_again = now + kept.pause
        kept.pause = min(2 * kept.pause, RESTART_SECONDS_MAX)

    def _reap(self) -> None:
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            self._hear_nursery()  # before it ends, it has named all that may have ended after it
            kept = next((k for k in self.kept if k.pid == ended.si_pid), None)
            if kept is not None:
                # Before its number can be given to another: whatever it has started goes with it.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(ended.si_pid, signal.SIGKILL)
            os.waitpid(ended.si_pid, 0)
            if kept is not None:
                self._take_note(kept, ended)

    def _take_note(self, kept: _Kept, ended: os.waitid_result) -> None:
        how = "with code" if ended.si_code == os.CLD_EXITED else "by signal"
        kept.pid = None
        self._forward_rest(kept)
        shutil.rmtree(kept.scratch, ignore_errors=True)  # what it spilled is of no use to the next one
        self._plan_restart(kept)
        self._say(f"{kept.name} ended {how} {ended.si_status}")

    def _end(self) -> None:
        self._signal_all(signal.SIGTERM)
        grace = self.plan["grace_seconds"] if self.lease.grace_seconds is None else self.lease.grace_seconds
        until = time.monotonic() + grace
        while any(k.pid for k in self.kept) and time.monotonic() < until:
            self._turn(0.05)
        slow = [k.name for k in self.kept if k.pid]
        if slow:
            self._say(f"killing what did not end in {grace:g} s: {', '.join(slow)}")
        self._signal_all(signal.SIGKILL)
        # Children of tasks that left their group have come to us: nobody else would ever end them.
        until = time.monotonic() + 5
        while (orphans := _children()) and time.monotonic() < until:
            for pid in orphans:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            self._turn(0.02)
        for kept in self.kept:
            shutil.rmtree(kept.scratch, ignore_errors=True)

    def _signal_all(self, number: signal.Signals) -> None:
        for kept in self.kept:
            if kept.pid is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    (os.killpg if number == signal.SIGKILL else os.kill)(kept.pid, number)

    # What they write

    def _forward(self, kept: _Kept, source: int, data: bytes) -> None:
        if not data:
            self._selector.unregister(source)
            os.close(source)
            kept.output = None if kept.output == source else kept.output
        *lines, kept.unwritten = (kept.unwritten + data).split(b"\n")
        if kept.unwritten and (not data or len(kept.unwritten) >= LINE_BYTES_MAX):
            lines, kept.unwritten = [*lines, kept.unwritten], b""
        self._write(kept.name, lines)

    def _forward_rest(self, kept: _Kept) -> None:
        if kept.output is None:
            return
        with contextlib.suppress(BlockingIOError):
            while kept.output is not None:
                self._forward(kept, kept.output, os.read(kept.output, LINE_BYTES_MAX))
        if kept.output is not None:  # something that left the group still holds the other end
            self._forward(kept, kept.output, b"")

    def _say(self, text: str) -> None:
        self._write("keeper", [text.encode()])

    def _write(self, name: str, lines: list[bytes]) -> None:
        about = os.fstat(1)
        if stat.S_ISREG(about.st_mode) and about.st_size > self.plan["log_bytes_max"]:
            os.ftruncate(1, 0)  # opened for appending; Docker bounds its own logs
        text = b"".join(name.encode() + b" | " + line + b"\n" for line in lines)
        with contextlib.suppress(OSError):  # a full disk, or a reader that is gone, must not stop us
            while text:
                text = text[os.write(1, text) :]


def _children() -> list[int]:
    with contextlib.suppress(OSError):
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    return []


def _read(folder: int, name: str) -> str:
    with open(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder), encoding="utf-8") as file:  # noqa: PTH123
        return file.read()


def main(folder: str) -> int:
    """Run the plan in a folder.

    Parameters
    ----------
    folder
        Has ``plan.json`` and ``lease``.

    Returns
    -------
    int
        The exit code.
    """
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    return Keeper(json.loads(_read(opened, "plan.json")), Lease(opened)).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
