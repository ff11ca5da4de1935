"""Import once, and become the processes of a unit by forking: a program that the keeper runs before them.

Covers what happens once, as a unit starts: half a second of a processor for importing Dask, which each of its workers
would take for itself. Does not cover keeping the processes, nor starting them again: that is the keeper's
(:mod:`.entrypoint`), which starts by itself what does not come from here: all, if an import fails or starts a thread.
It needs Python and what it imports::

    nursery.py PLAN-FOLDER-FD REPORT-FD OUTPUT-FD,...  PADDING
        imports ── a line on stdin: the address is there ── forks ── ends
                                                              ├─ process 0: reports "0 PID", is adopted by the keeper,
                                                              ├─ process 1:   and is what `python -m ...` would be
                                                              └─ ...

The padding is room for the command lines of the processes, so that those who look find each by its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

ADOPTION_POLL_SECONDS = 0.001
PR_SET_PDEATHSIG = 1  # linux/prctl.h
ARGUMENTS_START, ARGUMENTS_END = 45, 46  # arg_start, arg_end: fields 48 and 49 of /proc/PID/stat, from the third on


def become(
    number: int, process: dict[str, Any], *, scratch: str, report: int, outputs: list[int], nursery: int, keeper: int
) -> None:
    """Report, wait until the keeper is the parent, and run what the process should be.

    Parameters
    ----------
    number
        Of the process in its plan.
    process
        ``name`` and ``argv``: an interpreter, ``-m``, the module and its arguments.
    scratch
        Folder of the folders of all processes.
    report
        Where the keeper hears of it.
    outputs
        What each process of the plan writes to.
    nursery, keeper
        The parent now, and the one that adopts.
    """
    os.setsid()
    os.write(report, b"%d %d\n" % (number, os.getpid()))
    os.close(report)
    for target in (1, 2):
        os.dup2(outputs[number], target)
    for output in outputs:
        os.close(output)
    while os.getppid() == nursery:
        time.sleep(ADOPTION_POLL_SECONDS)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != keeper:
        os._exit(1)
    os.chdir(Path(scratch) / process["name"])
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    _show_as(process["argv"])
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()  # Python's own does so by itself
    sys.argv = process["argv"][2:]
    runpy.run_module(process["argv"][2], run_name="__main__", alter_sys=True)


def _show_as(argv: list[str]) -> None:
    """Let the kernel show this command line, as far as there is room for it."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[ARGUMENTS_START]), int(fields[ARGUMENTS_END])
    text = b"".join(word.encode() + b"\0" for word in argv)
    if 0 < start < end:
        ctypes.memmove(start, text[: end - start - 1].ljust(end - start, b"\0"), end - start)


def main(arguments: list[str]) -> None:
    """Import, wait for the line, and fork.

    Parameters
    ----------
    arguments
        As in the docstring of this module.
    """
    nursery, keeper = os.getpid(), os.getppid()
    folder, report, outputs = int(arguments[0]), int(arguments[1]), [int(fd) for fd in arguments[2].split(",")]
    with open(os.open("plan.json", os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder), encoding="utf-8") as file:  # noqa: PTH123
        plan = json.load(file)
    os.close(folder)
    del sys.path[0]  # the folder of this file is nobody's to import from
    for module in plan["nursery"]["imports"]:
        importlib.import_module(module)
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        raise RuntimeError(f"the imports have started {threads - 1} threads, which a fork would lose")
    if not sys.stdin.readline():
        return
    with contextlib.suppress(OSError), open(os.devnull) as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 0)
    gc.freeze()  # so that collections do not copy what all share
    for number, process in enumerate(plan["processes"]):
        if os.fork() == 0:
            scratch = plan["scratch"]
            become(number, process, scratch=scratch, report=report, outputs=outputs, nursery=nursery, keeper=keeper)
            return
    os._exit(0)  # what modules have registered for the end is for the processes


if __name__ == "__main__":
    main(sys.argv[1:])
