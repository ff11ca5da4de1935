"""The commands ``meshcompute up | down | status | logs``.

Covers reading the command line, running a person's command with a cluster, signals, and exit codes. Does not cover
what a cluster is (:mod:`meshcompute.mesh.cluster`), nor what is asked of one that another process keeps
(:mod:`meshcompute.mesh.views`). Imports click alone, and the rest when a command runs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import click

from meshcompute.errors import MeshError

__all__ = ["COMMANDS", "Terminated", "down", "logs", "status", "up"]

NOT_FOUND = 127  # as shells report a command that does not exist
CHILD_GRACE_SECONDS = 10.0
LOOK_SECONDS = 0.2
DETACH_TIMEOUT_SECONDS = 300.0


class Terminated(KeyboardInterrupt):
    """A signal that asks this program to end.

    Parameters
    ----------
    signum
        Its number.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class _WithCommand(click.Command):
    """A command line that may end with ``--`` and a command of the person's own."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            cut = args.index("--")
            ctx.meta["meshcompute.command"] = tuple(args[cut + 1 :])
            args = args[:cut]
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- COMMAND...]"]


_SITE_OPTIONS = (
    click.option("--scheduler-site", default="local", hidden=True, help="How this host's own daemon is reached."),
    click.option("--socket", envvar="MESHCOMPUTE_SITE_SOCKET", hidden=True, help="Path of the daemons' sockets."),
    click.option("--ssh", default="ssh", envvar="MESHCOMPUTE_SSH", show_default=True, help="OpenSSH, with arguments."),
    click.option("--site-command", default="meshcompute-site", envvar="MESHCOMPUTE_SITE_COMMAND", hidden=True),
)


@click.command(cls=_WithCommand)
@click.argument("sites", nargs=-1, required=True, metavar="USER@HOST[:PORT]...")
@click.option("--name", help="What you call the cluster.")
@click.option("--prefix", help="Prefix of its network, e.g. fda5:c0ff:eeee; a random one by default.")
@click.option("--allow-partial", is_flag=True, help="Go on without sites that cannot be had.")
@click.option("--detach", is_flag=True, help="Return when it is ready; a process in the background keeps it.")
@click.option("--port", type=click.IntRange(1, 65535), help="Port on localhost. [8786, else a free one]")
@click.option("--dashboard-port", type=click.IntRange(1, 65535), help="Port of the dashboard. [8787, else a free one]")
@click.option("--containers", type=click.IntRange(1, 256), default=1, show_default=True, help="Containers per site.")
@click.option("--processes", type=click.IntRange(1, 256), help="Worker processes per container. [the site's default]")
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads per process. [the site's default]")
@click.option("--memory", help="Memory per process, e.g. 2GiB. [the site's default]")
@click.option("--image", help="Image of the workers. [the site's default]")
@click.option("--link", type=click.Choice(["veth", "wireguard"]), default="veth", show_default=True, help="To workers.")
@click.option("--lease", type=click.FloatRange(5, 3600), default=120.0, show_default=True, help="Seconds.")
@click.option("--timeout", type=click.FloatRange(1, 3600), default=120.0, show_default=True, help="Of the boot.")
@click.option("--keeper", is_flag=True, hidden=True)
@click.pass_context
def up(ctx: click.Context, /, **options: Any) -> None:
    """Start a cluster at sites, and take it down again.

    With a COMMAND it runs that with DASK_SCHEDULER_ADDRESS set, and ends the cluster when the command ends, with its
    exit code. Without one the cluster runs until Ctrl-C, or with --detach until `meshcompute down`.
    """
    command: tuple[str, ...] = ctx.meta.get("meshcompute.command", ())
    if options["detach"] and command:
        raise click.UsageError("--detach and a command exclude each other: the cluster ends with the command.")
    try:
        with _signals_raise():
            if options["detach"]:
                code = _detach(options["name"] or f"mesh-{uuid.uuid4().hex[:8]}")
            else:
                code = _keep(options, command)
    except (MeshError, OSError, ValueError) as exc:
        raise click.ClickException(str(exc)) from exc
    except Terminated as exc:
        _say("interrupted")
        sys.exit(128 + exc.signum)
    sys.exit(code)


for _option in reversed(_SITE_OPTIONS):
    up = _option(up)


@click.command()
@click.argument("name", required=False)
@click.option("--all", "is_all", is_flag=True, help="All clusters of yours that this host keeps.")
def down(*, name: str | None, is_all: bool) -> None:
    """Take a cluster down that was started in another process."""
    from meshcompute.mesh.clusterrecord import find_record, records
    from meshcompute.mesh.views import end

    try:
        found = records() if is_all else [find_record(name)]
        is_gone = [end(record, _say) for record in found]
    except (MeshError, OSError) as exc:
        raise click.ClickException(str(exc)) from exc
    sys.exit(0 if all(is_gone) else 1)


@click.command()
@click.argument("name", required=False)
def status(*, name: str | None) -> None:
    """Show clusters, what every site says of them, and who keeps them."""
    from meshcompute.mesh.clusterrecord import find_record, records
    from meshcompute.mesh.views import describe

    try:
        found = [find_record(name)] if name else records()
        for record in found:
            click.echo(describe(record))
    except (MeshError, OSError) as exc:
        raise click.ClickException(str(exc)) from exc
    if not found:
        click.echo("no cluster of yours runs on this host")


@click.command()
@click.argument("site")
@click.argument("worker", required=False)
@click.option("--name", help="Name of the cluster, if there are several.")
@click.option("--lines", type=click.IntRange(1, 10_000), default=200, show_default=True)
def logs(*, site: str, worker: str | None, name: str | None, lines: int) -> None:
    """Print what the workers of SITE wrote: a pool, a user@host, or `scheduler`."""
    from meshcompute.mesh.clusterrecord import find_record
    from meshcompute.mesh.views import read_logs

    try:
        for of, text in read_logs(find_record(name), site, worker, lines).items():
            click.echo(f"--- {of}\n{text.rstrip()}")
    except (MeshError, OSError) as exc:
        raise click.ClickException(str(exc)) from exc


COMMANDS: Sequence[click.Command] = (up, down, status, logs)


def _say(line: str) -> None:
    click.echo(line, err=True)  # standard output is the command's


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Turn signals into :class:`Terminated`: the first starts taking down, the third gives up waiting for it."""
    count = 0

    def handle(signum: int, _frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count == 2:
            _say("taking everything down; once more, and the rest is left to the leases")
            return
        raise Terminated(signum)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _keep(options: dict[str, Any], command: Sequence[str]) -> int:
    """Start a cluster, run the command or wait, and take the cluster down."""
    import shlex

    from dask.utils import parse_bytes
    from distributed.core import Status

    from meshcompute.mesh.cluster import MeshCluster
    from meshcompute.mesh.plan import told_plainly
    from meshcompute.protocol import DEFAULT_SOCKET, WorkerRequest

    try:
        memory = int(parse_bytes(options["memory"])) if options["memory"] else None
    except ValueError as exc:
        raise click.UsageError(f"--memory: {options['memory']!r} is no size; write it like 2GiB.") from exc
    with told_plainly():
        workers = WorkerRequest(
            containers=options["containers"],
            processes_per_container=options["processes"],
            threads_per_process=options["threads"],
            memory_bytes_per_process=memory,
            image=options["image"],
            link=options["link"],
        )
    with MeshCluster(
        options["sites"],
        prefix=options["prefix"],
        allow_partial=options["allow_partial"],
        name=options["name"],
        workers=workers,
        client_port=options["port"],
        dashboard_port=options["dashboard_port"],
        lease_seconds=options["lease"],
        start_timeout_seconds=options["timeout"],
        scheduler=options["scheduler_site"],
        socket=options["socket"] or DEFAULT_SOCKET,
        ssh=tuple(shlex.split(options["ssh"])),
        site_command=options["site_command"],
        progress=_say,
    ) as cluster:
        if command:
            return _run(command, cluster.scheduler_address, lambda: cluster.status == Status.running)
        try:
            if not options["keeper"]:
                _say("Ctrl-C takes it down")
            while cluster.status == Status.running:
                time.sleep(LOOK_SECONDS)
        except Terminated:
            return 0  # this is how it is meant to end
        return 1


def _run(command: Sequence[str], address: str, has_cluster: Callable[[], bool]) -> int:
    """Run a person's command and return its exit code as a shell would; without its cluster it ends, too."""
    environment = {**os.environ, "DASK_SCHEDULER_ADDRESS": address, "DASK_MESHCOMPUTE__PROPAGATE": "True"}
    try:
        process = subprocess.Popen(command, env=environment)
    except OSError as exc:
        _say(f"{command[0]}: {exc.strerror}")
        return NOT_FOUND
    try:
        while (code := process.poll()) is None and has_cluster():
            with suppress(subprocess.TimeoutExpired):
                process.wait(LOOK_SECONDS)
        if code is None:
            _say(f"ending {command[0]}: its cluster is gone")
            process.terminate()
            _end(process)
            return 1
    except Terminated as exc:
        if exc.signum != signal.SIGINT:  # a Ctrl-C in the terminal has reached it, too
            process.send_signal(exc.signum)
        _end(process)
        raise
    return code if code >= 0 else 128 - code


def _end(process: subprocess.Popen[bytes]) -> None:
    for ask in (process.terminate, process.kill):
        try:
            process.wait(CHILD_GRACE_SECONDS)
            return
        except subprocess.TimeoutExpired:
            ask()
    process.wait()


def _detach(name: str) -> int:
    """Start this command again in the background, and wait until its cluster is ready."""
    from meshcompute.mesh.clusterrecord import record_folder, records

    log = record_folder() / f"{name}.log"
    arguments = [argument for argument in sys.argv[sys.argv.index("up") + 1 :] if argument != "--detach"]
    command = [sys.executable, "-m", "meshcompute.mesh.clustercli", "up", *arguments, "--name", name, "--keeper"]
    with log.open("wb") as written:
        keeper = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=written, stderr=written, start_new_session=True
        )
    shown = 0
    try:
        deadline = time.monotonic() + DETACH_TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            code = keeper.poll()
            shown = _show(log, shown)
            if code is not None:
                log.unlink(missing_ok=True)
                return code or 1
            if any(record.name == name and record.pid == keeper.pid for record in records()):
                _say(f"it runs on in the background; `meshcompute down {name}` takes it down")
                return 0
            time.sleep(LOOK_SECONDS)
        raise MeshError(f"{name} was not ready after {DETACH_TIMEOUT_SECONDS:g} s; see {log}")
    except BaseException:
        keeper.terminate()
        keeper.wait()
        _show(log, shown)
        log.unlink(missing_ok=True)
        raise


def _show(log: Path, shown: int) -> int:
    """Pass on what was written since; return how much that is by now."""
    text = log.read_bytes()
    if len(text) > shown:
        click.echo(text[shown:].decode(errors="replace"), err=True, nl=False)
    return len(text)


@click.group()
def _alone() -> None:
    """Only these commands, for the process in the background."""


for _command in COMMANDS:
    _alone.add_command(_command)

if __name__ == "__main__":
    _alone(prog_name="meshcompute")
