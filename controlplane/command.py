"""The one door to other programs: run one, with a deadline, and say well what went wrong.

Covers programs that do one thing and end. Does not cover processes that stay (each has a keeper of its own).

What a program reads and writes may be a private key, so neither is ever logged or put into an error; what it complains
about is. Standard input is a true pipe, which ``/dev/fd/0`` can be opened as (asyncio's is a socket, which cannot).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field

from controlplane.errors import ApplyError

__all__ = ["CommandError", "Output", "run"]

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 10.0
_COMPLAINT_CHARACTERS = 500
# Where Debian, Fedora and Alpine keep what is needed; a service's PATH may lack the sbin folders.
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PACKAGE_OF = {
    "wg": "wireguard-tools",
    "wireguard-go": "wireguard-go",
    "nft": "nftables",
    "ip": "iproute2",
    "nsenter": "util-linux",
}


class CommandError(ApplyError):
    """A program could not be started, failed, or took too long.

    Parameters
    ----------
    command
        The program and its arguments.
    reason
        What happened, with what the program complained about.
    """

    def __init__(self, command: Sequence[str], reason: str) -> None:
        super().__init__(tuple(command), reason)
        self.command = tuple(command)
        self.reason = reason

    def __str__(self) -> str:
        return f"{' '.join(self.command)}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What a program wrote; hidden from logs, for it may be a secret."""

    stdout: str = field(repr=False)


async def run(command: Sequence[str], *, stdin: str = "", timeout_seconds: float = TIMEOUT_SECONDS) -> Output:
    """Run a program to its end.

    Parameters
    ----------
    command
        Program and arguments. Nothing secret: every user of the machine can read them.
    stdin
        What the program reads.
    timeout_seconds
        When to kill it, with all that it started.

    Returns
    -------
        What it wrote to standard output.

    Raises
    ------
    CommandError
        It could not be started, ended with another code than 0, or took too long.
    """
    read_end, write_end = os.pipe()
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=read_end,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            env={"PATH": _PATH, "LC_ALL": "C"},
        )
    except FileNotFoundError as exc:
        os.close(write_end)
        package = _PACKAGE_OF.get(command[0], command[0])
        raise CommandError(command, f"{command[0]} is not installed (Debian's package is {package})") from exc
    except OSError as exc:
        os.close(write_end)
        raise CommandError(command, f"could not be started: {exc}") from exc
    finally:
        os.close(read_end)
    try:
        async with asyncio.timeout(timeout_seconds):
            feeding = asyncio.to_thread(_feed, write_end, stdin.encode())
            (stdout, stderr), _fed = await asyncio.gather(process.communicate(), feeding)
    except TimeoutError as exc:
        raise CommandError(command, f"was not done after {timeout_seconds:g} s, and was killed") from exc
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    logger.debug("ran a program command=%r returncode=%s", " ".join(command), process.returncode)
    if process.returncode != 0:
        complaint = stderr.decode(errors="replace").strip()[-_COMPLAINT_CHARACTERS:]
        raise CommandError(command, f"ended with {process.returncode}: {complaint or 'it said nothing'}")
    return Output(stdout=stdout.decode(errors="replace"))


def _feed(write_end: int, data: bytes) -> None:
    """Write everything; a program that does not read to the end is no error of ours."""
    with contextlib.suppress(BrokenPipeError), os.fdopen(write_end, "wb") as pipe:
        pipe.write(data)
