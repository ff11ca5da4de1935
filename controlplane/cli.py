"""The command ``meshcompute-site``.

Covers reading the command line and exit codes. Does not cover what the commands do. ``ping`` and ``connect`` run for
every connection of a client through SSH, so this file imports next to nothing.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import TypeVar

import click

from controlplane.errors import SiteError
from meshcompute.protocol import DEFAULT_SOCKET

__all__ = ["main", "site"]

DEFAULT_CONFIG = "/etc/meshcompute/site.toml"
T = TypeVar("T")

NOT_HEALTHY = 1
NO_ANSWER = 2
REFUSED = 1
FINDINGS = 1

_config = click.option(
    "--config", default=DEFAULT_CONFIG, show_default=True, metavar="FILE", help="The site.toml of this site."
)
_socket = click.option(
    "--socket",
    default=lambda: os.environ.get("MESHCOMPUTE_SITE_SOCKET", DEFAULT_SOCKET),
    metavar="PATH",
    help=f"The daemon's socket. [MESHCOMPUTE_SITE_SOCKET, or {DEFAULT_SOCKET}]",
)


@click.group(name="meshcompute-site")
@click.version_option(package_name="meshcompute", prog_name="meshcompute-site")
def site() -> None:
    """Run one site of a mesh: the daemon, and what an operator needs."""


@site.command()
@_config
@click.option("--socket", default=None, metavar="PATH", help="Listen here instead of at what site.toml says.")
@click.option("--stop-clusters", is_flag=True, help="When told to end, end all clusters of this site as well.")
@click.option(
    "--log-level", type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"]), default="INFO", show_default=True
)
def serve(*, config: str, socket: str | None, stop_clusters: bool, log_level: str) -> None:
    """Serve until SIGTERM; clusters go on without the daemon until their leases end."""
    import asyncio
    import logging
    import signal
    from dataclasses import replace

    from controlplane.config import SiteConfig, read_config
    from controlplane.daemon import Daemon

    logging.basicConfig(level=log_level, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")

    async def run(found: SiteConfig) -> None:
        daemon = Daemon(found)
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await daemon.serve(stop, has_to_stop_clusters=stop_clusters)

    try:
        found = read_config(config)
        if socket is not None:
            found = replace(found, socket=os.path.abspath(socket))  # noqa: PTH100 - resolve() would follow links
        asyncio.run(run(found))
    except SiteError as exc:
        raise click.ClickException(str(exc)) from exc


@site.command()
@_config
def drain(*, config: str) -> None:
    """End all clusters of this site and remove what is left of them; the daemon must not run."""
    import asyncio
    import logging

    from controlplane.config import read_config
    from controlplane.daemon import Daemon

    logging.basicConfig(level="WARNING", stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")

    async def run() -> bool:
        return await Daemon(read_config(config)).drain()

    try:
        is_gone = asyncio.run(run())
    except SiteError as exc:
        raise click.ClickException(str(exc)) from exc
    click.echo("all clusters are gone" if is_gone else "something is left; see the messages above", err=not is_gone)
    sys.exit(0 if is_gone else NOT_HEALTHY)


@site.command()
@_config
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def check(*, config: str, as_json: bool) -> None:
    """Examine this host before it is put to use, and say how to mend what is missing."""
    from dataclasses import asdict

    from controlplane.check import examine
    from controlplane.config import read_config

    try:
        findings = examine(read_config(config))
    except SiteError as exc:
        raise click.ClickException(str(exc)) from exc
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            click.echo(str(finding))
    sys.exit(FINDINGS if any(finding.level == "bad" for finding in findings) else 0)


@site.command()
@_socket
def ping(*, socket: str) -> None:
    """Ask the daemon whether it can do its work: exit code 0 yes, 1 not all of it, 2 no answer."""
    from controlplane.talk import NoAnswerError, ping

    try:
        pong = ping(socket)
    except NoAnswerError as exc:
        click.echo(str(exc), err=True)
        sys.exit(NO_ANSWER)
    for message in pong.messages:
        click.echo(message, err=True)
    if pong.is_healthy:
        click.echo(f"the daemon at {socket} answers and is healthy")
    sys.exit(0 if pong.is_healthy else NOT_HEALTHY)


@site.command(name="list")
@_socket
def list_(*, socket: str) -> None:
    """Show your clusters at this site; operators see everybody's."""
    from controlplane.talk import list_clusters

    rows = [("cluster", "name", "user", "phase", "workers", "lease")]
    for status in _asked(lambda: list_clusters(socket)):
        running = sum(worker["state"] == "running" for worker in status["workers"])
        workers = f"{running} of {len(status['workers'])}"
        lease = f"{status['lease_remaining_seconds']:.0f} s"
        rows.append((status["cluster_id"], status["name"], status["owner"], status["phase"], workers, lease))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@site.command()
@_socket
@click.argument("cluster")
def end(*, socket: str, cluster: str) -> None:
    """End one of your clusters, by its id or the beginning of it; operators end everybody's."""
    from controlplane import talk

    _asked(lambda: talk.end(socket, cluster))
    click.echo("it is ended; what is left of it is being removed")


@site.command()
@_socket
def metrics(*, socket: str) -> None:
    """Print numbers for monitoring, as Prometheus reads them."""
    from controlplane import talk

    click.echo(_asked(lambda: talk.metrics(socket)), nl=False)


def _asked(question: Callable[[], T]) -> T:
    """Answer a question to the daemon, or end with what it said."""
    from controlplane.talk import NoAnswerError, RefusedError

    try:
        return question()
    except (NoAnswerError, RefusedError) as exc:
        click.echo(str(exc), err=True)
        sys.exit(NO_ANSWER if isinstance(exc, NoAnswerError) else REFUSED)


@site.command()
@_socket
def connect(*, socket: str) -> None:
    """Pass bytes between the daemon and standard input and output, for hosts whose sshd forbids forwarding."""
    from controlplane.talk import NoAnswerError, splice

    try:
        splice(socket)
    except NoAnswerError as exc:
        click.echo(str(exc), err=True)
        sys.exit(NO_ANSWER)


@site.command()
def openapi() -> None:
    """Print the OpenAPI document."""
    from controlplane.daemon import own_version
    from controlplane.openapi import openapi_document

    click.echo(json.dumps(openapi_document(own_version()), indent=2))


def main() -> None:
    """Run the command line."""
    site(prog_name="meshcompute-site")
