"""The one door to OpenSSH: a site's unix socket, brought to this host.

Covers forwarding the socket (:class:`SshTunnel`), talking through a command's stdin and stdout where forwarding is
off (:class:`SshBridge`), and naming the cause when neither works (:func:`diagnose`). Does not cover what is said
through it (:mod:`meshcompute.mesh.control`). The user's own configuration, agent and jump hosts hold.

::

    aiohttp ── folder/NAME.sock ── ssh -N -L ══════ sshd ── /run/meshcompute/site.sock     SshTunnel
    aiohttp ── folder/NAME.sock ── ssh HOST meshcompute-site connect ── …/site.sock        SshBridge, one per connection

Nothing of it outlives this process, whatever ends it: ``ssh`` runs below a small shell that gets a signal when its
parent dies, ends ``ssh`` and removes the socket and its folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shlex
import shutil
import signal
import tempfile
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from meshcompute.mesh.sites import Cause, SiteAddress, SiteUnreachableError
from meshcompute.protocol import DEFAULT_SOCKET

__all__ = ["SshBridge", "SshTunnel", "cause_of_ssh", "choose_socket_folder", "diagnose", "ssh_command"]

MAX_SOCKET_PATH = 100  # a unix socket's path ends at 107 bytes on Linux and at 103 on others
CONNECT_TIMEOUT_SECONDS = 10
# A dead peer is noticed after 15 s, so that a lease of 120 s leaves time for several attempts to come back.
SERVER_ALIVE_SECONDS = 5
SERVER_ALIVE_COUNT = 3
OPEN_TIMEOUT_SECONDS = 30.0  # jump hosts and slow name servers included
STOP_TIMEOUT_SECONDS = 2.0
POLL_SECONDS = 0.01
NO_SUCH_COMMAND = 127  # as every shell says it
ANSWERS = (0, 1)  # meshcompute-site ping: the daemon can do its work, or not all of it
SSH_FAILED = 255  # as ssh says that the failure was its own

SSH_OPTIONS = (
    "BatchMode=yes",  # never a question: nobody may be there to answer
    "ControlMaster=no",  # a shared connection could end, or forbid forwarding, for reasons of somebody else's
    "ControlPath=none",
    f"ConnectTimeout={CONNECT_TIMEOUT_SECONDS}",
    f"ServerAliveInterval={SERVER_ALIVE_SECONDS}",
    f"ServerAliveCountMax={SERVER_ALIVE_COUNT}",
    "ForwardAgent=no",  # the site gets nothing of the user's
    "ForwardX11=no",
    "PermitLocalCommand=no",
    "RequestTTY=no",
    "LogLevel=ERROR",  # no banners: what ssh writes names the cause of a failure
)

# $1 our process, $2 socket, $3 its folder, then the command. Our death arrives as TERM, and can come at any time: the
# folder is made by nobody who could die before it is removed. What the command writes is what the guard writes.
_GUARD = """
trap 'ended=1; kill $! 2>/dev/null' TERM HUP INT
[ "$PPID" = "$1" ] || exit 1
socket=$2 folder=$3; shift 3
mkdir -m 700 "$folder" || exit 1
if [ -z "$ended" ]; then "$@" & fi
[ -z "$ended" ] || kill $! 2>/dev/null
wait $!; status=$?
rm -f "$socket"; rmdir "$folder" 2>/dev/null
exit $status
"""

# What OpenSSH writes, the cause, and what to say about it; the first that fits is it.
_CAUSES: Sequence[tuple[str, Cause, str]] = (
    (
        r"Could not resolve hostname",
        "no_route",
        "the name of the host is not known here; check its spelling, your name server and ~/.ssh/config",
    ),
    (
        r"connect to .*: Connection refused",
        "no_route",
        "the host answers, but nobody listens on SSH's port; check the port, and that sshd runs there",
    ),
    (
        r"connect to .*: (No route to host|Network is unreachable|Connection timed out|Operation timed out)",
        "no_route",
        "no route to the host; check that the network or VPN of the control plane is up, and any firewall",
    ),
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED|Offending .* key in|host key for .* has changed",
        "changed_host_key",
        "its host key is not the one that you know; ask the operator why, before ssh-keygen -R removes the old one",
    ),
    (
        r"Host key verification failed|No .* host key is known|authenticity of host",
        "unknown_host_key",
        "its host key is not known here; log in once with ssh by hand, compare the key with the operator's, accept it",
    ),
    (
        r"Permission denied|Too many authentication failures|No more authentication methods",
        "refused_key",
        "it refuses your key; check the account's name, that ssh-add -l shows the key, and that the operator has it",
    ),
    (
        r"Bad owner or permissions|Bad configuration option|terminating, \d+ bad configuration|Can't open user config",
        "other",
        "OpenSSH does not accept your own configuration",
    ),
    (
        r"kex_exchange_identification|banner exchange|Connection (closed|reset) by|Timeout, server .* not responding",
        "no_route",
        "the connection broke before anybody was let in; check that the port is sshd's, and sshd's log there",
    ),
)


def ssh_command(address: SiteAddress, *, ssh: Sequence[str] = ("ssh",), options: Sequence[str] = ()) -> list[str]:
    """Write the command that runs OpenSSH for a site, up to the host; a remote command may follow.

    Parameters
    ----------
    address
        The site; not a local one.
    ssh
        The program and arguments of its own, e.g. ``("ssh", "-F", file)``.
    options
        Further arguments.

    Returns
    -------
    list of str
        Program and arguments.
    """
    if address.host is None:
        raise ValueError(f"{address} is on this host and needs no ssh")
    command = [*ssh, "-T"]
    for option in SSH_OPTIONS:
        command += ["-o", option]
    command += options
    if address.user is not None:
        command += ["-l", address.user]
    if address.port is not None:
        command += ["-p", str(address.port)]
    return [*command, "--", address.host]


def choose_socket_folder() -> Path:
    """Choose where a private folder for a socket will be, with a path that is short enough for that.

    Returns
    -------
    pathlib.Path
        Nothing is there yet. The guard of the socket makes the folder, and removes it.
    """
    for parent in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"):  # noqa: S108 (mkdtemp's is private)
        if parent and len(parent) + len("/mesh-XXXXXXXX/999.sock") <= MAX_SOCKET_PATH and os.access(parent, os.W_OK):
            return Path(parent, f"mesh-{secrets.token_hex(4)}")
    raise OSError("there is no folder for sockets: set XDG_RUNTIME_DIR or TMPDIR to a writable one with a short path")


def cause_of_ssh(stderr: str) -> tuple[Cause, str]:
    """Read what OpenSSH wrote as it failed.

    Parameters
    ----------
    stderr
        All of it.

    Returns
    -------
    tuple of str
        The cause, and what to say about it: one sentence's worth, with the cure.
    """
    last = next((line.strip() for line in reversed(stderr.splitlines()) if line.strip()), "it said nothing")
    for pattern, cause, sentence in _CAUSES:
        if re.search(pattern, stderr):
            return cause, f"{sentence} (ssh: {last})"
    return "other", f"ssh ended; try the same with ssh by hand (ssh: {last})"


class SshTunnel:
    """The socket of a site's daemon, forwarded by OpenSSH to a socket of this host.

    Parameters
    ----------
    address
        The site.
    path
        Where the local socket is made; its folder is removed with it when it is empty.
    ssh
        The program and arguments of its own.
    """

    def __init__(self, address: SiteAddress, path: Path, *, ssh: Sequence[str] = ("ssh",)) -> None:
        self.address = address
        self.path = path
        self._ssh = tuple(ssh)
        self._process: asyncio.subprocess.Process | None = None
        self._written: deque[str] = deque(maxlen=50)
        self._reader: asyncio.Task[None] | None = None

    @property
    def is_alive(self) -> bool:
        """Whether ``ssh`` runs."""
        return self._process is not None and self._process.returncode is None

    @property
    def stderr(self) -> str:
        """What ``ssh`` wrote, the last lines of it."""
        return "\n".join(self._written)

    async def start(self) -> None:
        """Start ``ssh`` and wait until the local socket is there.

        Raises
        ------
        SiteUnreachableError
            It ended, or the socket was not there in time.
        """
        options = ["-N", "-o", "ExitOnForwardFailure=yes", "-o", "StreamLocalBindUnlink=yes"]
        options += ["-o", "StreamLocalBindMask=0177", "-L", f"{self.path}:{self.address.socket}"]
        command = ssh_command(self.address, ssh=self._ssh, options=options)
        _require_ssh(self.address, self._ssh)
        self._process = await _run(_guarded(self.path, command))
        self._reader = asyncio.create_task(self._read())
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_SECONDS):
                while not self.path.is_socket():
                    if not self.is_alive:
                        await self._reader
                        raise SiteUnreachableError(str(self.address), *cause_of_ssh(self.stderr))
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            await self.stop()
            message = f"ssh did not get through within {OPEN_TIMEOUT_SECONDS:g} s; try the same with ssh by hand"
            raise SiteUnreachableError(str(self.address), "no_route", message) from None
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """End ``ssh`` and remove the local socket. Calling it again does nothing."""
        if self._process is not None:
            await _end(self._process)
        if self._reader is not None:
            await self._reader
        self._process = self._reader = None
        self.path.unlink(missing_ok=True)

    async def _read(self) -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            self._written.append(line.decode(errors="replace").rstrip())


class SshBridge:
    """A local socket each connection of which is one ``ssh HOST meshcompute-site connect``.

    Parameters
    ----------
    address
        The site.
    path
        Where the local socket is made.
    ssh
        The program and arguments of its own.
    site_command
        How ``meshcompute-site`` is called there.
    """

    def __init__(
        self,
        address: SiteAddress,
        path: Path,
        *,
        ssh: Sequence[str] = ("ssh",),
        site_command: str = "meshcompute-site",
    ) -> None:
        self.address = address
        self.path = path
        self._ssh = tuple(ssh)
        self._command = [
            *ssh_command(address, ssh=ssh, options=["-o", "ClearAllForwardings=yes"]),
            _remote(address, site_command, "connect"),
        ]
        self._guard: asyncio.subprocess.Process | None = None
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def is_alive(self) -> bool:
        """Whether the local socket takes connections."""
        return self._server is not None

    async def start(self) -> None:
        """Make the local socket. ``ssh`` starts with each connection.

        Raises
        ------
        SiteUnreachableError
            There is no ``ssh`` here.
        """
        _require_ssh(self.address, self._ssh)
        self._guard = await _run(_guarded(self.path, ["sleep", "infinity"]))
        while not self.path.parent.is_dir():
            if self._guard.returncode is not None:
                raise SiteUnreachableError(str(self.address), "other", f"{self.path.parent} could not be made here")
            await asyncio.sleep(POLL_SECONDS)
        self._server = await asyncio.start_unix_server(self._accept, self.path)

    async def stop(self) -> None:
        """End every connection and remove the local socket. Calling it again does nothing."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        if self._guard is not None:
            await _end(self._guard)
            self._guard = None
        self.path.unlink(missing_ok=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        process = None
        try:
            process = await _run([*_dies_with_parent("KILL"), *self._command], stdin=asyncio.subprocess.PIPE)
            assert process.stdin is not None
            assert process.stdout is not None
            async with asyncio.TaskGroup() as both:
                both.create_task(_copy(reader, process.stdin))
                both.create_task(_copy(process.stdout, writer))
        except asyncio.CancelledError:
            pass  # stop() ends what still runs; nobody else awaits this task
        except (OSError, ExceptionGroup):
            pass  # whoever is at the other end of the socket sees it close
        finally:
            self._connections.discard(task)
            writer.close()
            if process is not None:
                await _end(process)


async def diagnose(
    address: SiteAddress, *, ssh: Sequence[str] = ("ssh",), site_command: str = "meshcompute-site"
) -> SiteUnreachableError | None:
    """Find out why a site cannot be talked to, by running its ``meshcompute-site ping`` through SSH.

    Parameters
    ----------
    address
        The site.
    ssh
        The program and arguments of its own.
    site_command
        How ``meshcompute-site`` is called there.

    Returns
    -------
    SiteUnreachableError or None
        The cause; None if its daemon answers on its own host, so that only the forwarding is at fault.
    """
    site = str(address)
    command = ssh_command(address, ssh=ssh, options=["-o", "ClearAllForwardings=yes"])
    try:
        _require_ssh(address, ssh)
    except SiteUnreachableError as exc:
        return exc
    process = await _run([*_dies_with_parent("KILL"), *command, _remote(address, site_command, "ping")])
    try:
        async with asyncio.timeout(OPEN_TIMEOUT_SECONDS):
            stdout, stderr = await process.communicate()
    except TimeoutError:
        message = f"ssh did not get through within {OPEN_TIMEOUT_SECONDS:g} s; try the same with ssh by hand"
        return SiteUnreachableError(site, "no_route", message)
    finally:
        await _end(process)
    written = stderr.decode(errors="replace")
    if process.returncode in ANSWERS:
        return None
    if process.returncode == SSH_FAILED:
        return SiteUnreachableError(site, *cause_of_ssh(written))
    if process.returncode == NO_SUCH_COMMAND:
        message = (
            f"the host has no command {site_command}; its operator installs it with scripts/install-site.sh, and the "
            "command must be on the PATH of logins without a terminal"
        )
        return SiteUnreachableError(site, "not_installed", message)
    said = " ".join((written or stdout.decode(errors="replace")).split()) or f"exit code {process.returncode}"
    message = f"no control daemon answers there; ask its operator to look at this: {said}"
    return SiteUnreachableError(site, "no_daemon", message)


def _remote(address: SiteAddress, site_command: str, verb: str) -> str:
    """Write a command for the shell of the other side."""
    words = [*shlex.split(site_command), verb]
    if address.socket != DEFAULT_SOCKET:
        words += ["--socket", address.socket]
    return shlex.join(words)


def _dies_with_parent(kind: str) -> list[str]:
    """Write what lets Linux end a process when the thread that started it ends; elsewhere nothing."""
    setpriv = shutil.which("setpriv")
    return [] if setpriv is None else [setpriv, "--pdeathsig", kind]


def _require_ssh(address: SiteAddress, ssh: Sequence[str]) -> None:
    if shutil.which(ssh[0]) is None:
        message = f"this host has no program {ssh[0]!r}; install OpenSSH's client (apt-get install openssh-client)"
        raise SiteUnreachableError(str(address), "no_ssh", message)


def _guarded(path: Path, command: Sequence[str]) -> list[str]:
    """Run a command that needs the folder of a socket; whatever ends it, or us, the folder goes."""
    guard = ["sh", "-c", _GUARD, "sh", str(os.getpid()), str(path), str(path.parent)]
    return [*_dies_with_parent("TERM"), *guard, *_dies_with_parent("KILL"), *command]


async def _run(command: Sequence[str], *, stdin: int = asyncio.subprocess.DEVNULL) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *command,
        stdin=stdin,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL if stdin == asyncio.subprocess.PIPE else asyncio.subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C in the terminal is for us; we end things in order
    )


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a process and everything in its session that ignores it."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_SECONDS):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while block := await reader.read(1 << 16):
            writer.write(block)
            await writer.drain()
    finally:
        writer.close()
