"""The command group ``meshcompute lab``.

Covers reading the command line, printing, and exit codes. Does not cover what the commands do. The command line of
meshcompute loads this file, so it imports click alone, and the rest when a command runs.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import click

from meshcompute.errors import MeshError

__all__ = ["lab", "run_in_lab"]

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


@click.group()
def lab() -> None:
    """Try it in data centres that are simulated on this machine (Linux, root)."""


def _options(command: Any) -> Any:
    for option in reversed(
        [
            click.option("--name", default="lab", show_default=True, help="Two labs at once need two names."),
            click.option(
                "--rate", type=float, metavar="MBIT", help="What each link carries, in Mbit/s; else no limit."
            ),
            click.option("--delay", type=float, default=0.0, metavar="MS", help="Delay one way, in ms."),
            click.option("--loss", type=float, default=0.0, metavar="SHARE", help="Share of packets lost, 0 to 1."),
            click.option("--nat", multiple=True, metavar="SITE", help="A site behind a router with NAT (repeatable)."),
            click.option("--data", multiple=True, metavar="SITE=FOLDER", help="What a site has as /data/SITE."),
            click.option("--engine/--no-engine", default=None, help="A Docker engine per host [if there is dockerd]."),
            click.option("--image", metavar="FILE", help="Archive with the workers' image [built]; none: no image."),
            click.option(
                "--share", type=click.Path(exists=True, file_okay=False), help="Folder shared with the client."
            ),
        ]
    ):
        command = option(command)
    return command


@lab.command()
@_options
def up(**options: Any) -> None:
    """Start the lab: a client's host and two sites, with a WAN between them."""
    _start(options, dies_with_us=False)
    name = options["name"]
    more = "" if name == "lab" else f" --name {name}"
    click.echo(f"the lab is up; try: meshcompute lab exec{more} client -- ssh 10.8.0.4 hostname")


@lab.command()
@click.option("--name", default="lab", show_default=True)
def down(name: str) -> None:
    """End the lab; nothing stays."""
    from meshcompute.lab.running import RunningLab

    with _Errors():
        RunningLab(name).stop()
    click.echo("the lab is down")


@lab.command()
@click.option("--name", default="lab", show_default=True)
def status(name: str) -> None:
    """Show the hosts, and each link with what has crossed it."""
    from meshcompute.lab.running import RunningLab

    with _Errors():
        found = RunningLab(name).status()
    click.echo(f"lab {name}: supervisor is process {found.supervisor_pid}")
    for host in found.lab.hosts:
        nat = f", {host.inner_address} behind NAT" if host.name in found.hosts_with_nat else ""
        click.echo(f"  {host.name:<10} {host.address!s:<10} process {found.pids.get(host.name, 'not yet')}{nat}")
    for link in found.links.values():
        rate, counters = link.shape.rate_bits_per_second, link.counters
        speed = "cut" if link.shape.is_cut else f"{rate / 1e6:g} Mbit/s" if rate else "no limit"
        shape = f"{speed}, {link.shape.delay_seconds * 1e3:g} ms, loss {link.shape.loss:g}"
        counted = f"{counters.sent_packets} packets, {counters.sent_nbytes} bytes; {counters.dropped_packets} dropped"
        click.echo(f"  {link.source:>10} → {link.target:<10} {shape}: {counted}")


@lab.command()
@click.option("--name", default="lab", show_default=True)
@click.option("--rate", type=float, metavar="MBIT", help="In Mbit/s; 0 is no limit.")
@click.option("--delay", type=float, metavar="MS", help="One way, in ms.")
@click.option("--loss", type=float, metavar="SHARE", help="Share of packets lost, 0 to 1.")
@click.option("--cut/--join", default=None, help="Let nothing pass, or everything again.")
@click.option("--nat/--no-nat", default=None, help="Put the hosts behind routers with NAT, or take them out.")
@click.argument("hosts", nargs=-1)
def wan(
    *,
    name: str,
    rate: float | None,
    delay: float | None,
    loss: float | None,
    cut: bool | None,
    nat: bool | None,
    hosts: tuple[str, ...],
) -> None:
    """Change the WAN while it runs.

    With no HOSTS everywhere; with one between it and all others; with two between them, in both directions.
    """
    from meshcompute.lab.running import RunningLab

    changes: dict[str, Any] = {}
    if rate is not None:
        changes["rate_bits_per_second"] = rate * 1e6 or None
    if delay is not None:
        changes["delay_seconds"] = delay / 1e3
    if loss is not None:
        changes["loss"] = loss
    if cut is not None:
        changes["is_cut"] = cut
    with _Errors():
        running = RunningLab(name)
        if changes:
            running.shape(running.pairs(*hosts), **changes)
        if nat is not None:
            if not hosts:
                raise click.UsageError("Say which hosts stand behind NAT.")
            for host in hosts:
                running.set_nat(host, nat)


@lab.command()
@click.option("--name", default="lab", show_default=True)
@click.option("--port", type=int, help="Port of this machine's 127.0.0.1 [the same].")
@click.argument("host", default="client")
@click.argument("target", default="127.0.0.1:8787")
def forward(name: str, port: int | None, host: str, target: str) -> None:
    """Make TARGET, as HOST sees it, reachable at this machine's 127.0.0.1, until Ctrl-C.

    Without arguments: the dashboard, for the machine's browser.
    """
    from meshcompute.lab.errors import LabError
    from meshcompute.lab.forwarding import listen, render_forwarder
    from meshcompute.lab.running import RunningLab

    with _Errors():
        pids = RunningLab(name).status().pids
        if host not in pids:
            raise LabError(f"The lab has no host {host!r}. Its hosts: {', '.join(pids)}.")
        wanted = int(target.rpartition(":")[2]) if port is None else port
        try:
            listener = listen(wanted)
        except OSError as exc:
            raise LabError(
                f"Port {wanted} of 127.0.0.1 cannot be had ({exc.strerror}). Choose another --port."
            ) from exc
        with listener:
            process = subprocess.Popen(render_forwarder(listener, pids[host], target), pass_fds=[listener.fileno()])
            click.echo(f"{target} of {host} is at http://127.0.0.1:{listener.getsockname()[1]}; Ctrl-C ends it")
            process.wait()


@lab.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--name", default="lab", show_default=True)
@click.option("--user", default="root", show_default=True, help="root, or the account mesh.")
@click.argument("host")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def execute(name: str, user: str, host: str, command: tuple[str, ...]) -> None:
    """Run COMMAND on HOST; its exit code is this one's."""
    from meshcompute.lab.running import RunningLab

    if command[0] == "--":
        command = command[1:]
    with _Errors():
        arguments, environment = RunningLab(name).command(host, command, user=user)
        os.execvpe(arguments[0], arguments, environment)  # noqa: S606 - the command is what was asked for


@lab.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@_options
@click.option("--user", default="root", show_default=True, help="root, or the account mesh.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(*, user: str, command: tuple[str, ...], **options: Any) -> None:
    """Start the lab, run COMMAND on the client's host, end the lab; the exit code is COMMAND's.

    The current folder is shared with the client's host, so that what COMMAND writes there stays.
    """
    if options["share"] is None and Path.cwd() != Path("/"):
        options["share"] = str(Path.cwd())
    sys.exit(run_in_lab(command, user=user, **options))


def run_in_lab(
    command: Sequence[str],
    *,
    user: str = "root",
    name: str = "lab",
    rate: float | None = None,
    delay: float = 0.0,
    loss: float = 0.0,
    nat: Sequence[str] = (),
    data: Sequence[str] = (),
    engine: bool | None = None,
    image: str | None = None,
    share: str | None = None,
) -> int:
    """Start a lab, run a command on the client's host, and end the lab.

    Parameters
    ----------
    command
        Program and arguments.
    user
        ``root``, or an account of the host.
    name, rate, delay, loss, nat, data, engine, image, share
        As the options of ``meshcompute lab up``: Mbit/s, milliseconds, share of packets; ``SITE=FOLDER``.

    Returns
    -------
    int
        The command's exit code, as a shell reports it.
    """
    from meshcompute.lab.running import RunningLab

    options: dict[str, Any] = {"name": name, "rate": rate, "delay": delay, "loss": loss, "nat": nat}
    options |= {"data": data, "engine": engine, "image": image, "share": share}
    _start(options, dies_with_us=True)
    running = RunningLab(name)
    process: subprocess.Popen[Any] | None = None
    try:
        with _Errors():
            process = running.popen("client", *command, user=user)
            code = process.wait()
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        code = INTERRUPTED
        if process is not None:  # it got the same signal from the terminal; its own cleaning up has some time
            with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                process.wait(20)
    finally:
        with _Errors():
            running.stop()
        click.echo("the lab is down", err=True)
    return code if code >= 0 else 128 - code


def _start(options: dict[str, Any], *, dies_with_us: bool) -> None:
    from dataclasses import replace

    from meshcompute.lab.images import open_image_store
    from meshcompute.lab.starting import find_accounts, find_readable, has_engine, start_lab
    from meshcompute.lab.topology import SYSTEM_PATH, Lab, default_hosts

    data = dict(_data_of_site(item) for item in options["data"])
    hosts = tuple(
        replace(host, data=data.get(host.name), has_nat=host.name in options["nat"]) for host in default_hosts()
    )
    _check_sites("--data", data)
    _check_sites("--nat", options["nat"])
    rate = options["rate"]
    # Hosts find what the caller finds, and first of all what was installed with meshcompute.
    folders = [str(Path(sys.executable).parent), *os.get_exec_path(), *SYSTEM_PATH.split(":")]
    path = ":".join(dict.fromkeys(folders))
    shared = options["share"] and str(Path(options["share"]).resolve())
    engine = has_engine() if options["engine"] is None else options["engine"]
    wanted = Lab(
        name=options["name"],
        hosts=hosts,
        shared=shared,
        path=path,
        accounts=find_accounts(),
        readable=find_readable(shared),
        delay_seconds=options["delay"] / 1e3,
        rate_bits_per_second=None if rate is None else rate * 1e6,
        loss=options["loss"],
        # Without an engine there are no containers, and a site has nothing to give to the mesh.
        daemon=engine and shutil.which("meshcompute-site", path=path) is not None,
        engine=engine,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    locks = []
    with _Errors():
        if wanted.engine and options["image"] != "none":
            archive = options["image"] and Path(options["image"])
            store, lock = open_image_store(archive, say=lambda line: click.echo(line, err=True))
            wanted = replace(wanted, image_store=str(store))
            locks.append(lock)
        started = time.monotonic()
        start_lab(
            wanted,
            say=lambda line: click.echo(f"{time.monotonic() - started:6.2f} s  {line}", err=True),
            dies_with_us=dies_with_us,
            locks=locks,
        )


def _data_of_site(item: str) -> tuple[str, str]:
    site, has_folder, folder = item.partition("=")
    if not has_folder or not Path(folder).is_dir():
        raise click.UsageError(f"--data {item}: write SITE=FOLDER, with a folder that exists.")
    return site, str(Path(folder).resolve())


def _check_sites(option: str, names: Iterable[str]) -> None:
    from meshcompute.lab.topology import default_hosts

    sites = [host.name for host in default_hosts() if host.is_site]
    for name in names:
        if name not in sites:
            raise click.UsageError(f"{option} {name}: the lab has no such site. It has {' and '.join(sites)}.")


class _Errors:
    """Turn our errors into one line and an exit code."""

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, (MeshError, OSError, ValueError)):
            raise click.ClickException(str(error)) from error
        if isinstance(error, KeyboardInterrupt):
            click.echo("interrupted; everything that was started has been ended", err=True)
            sys.exit(INTERRUPTED)
