"""The command ``meshcompute``, which is also ``dask mesh``.

Covers reading the command line and exit codes. Does not cover what the commands do. Every ``dask`` command loads this
file, so it imports click alone, and the rest when a command runs.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

import meshcompute
from meshcompute.errors import MeshError
from meshcompute.lab.cli import lab
from meshcompute.mesh import clustercli

__all__ = ["main", "mesh"]

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def is_news(record: logging.LogRecord) -> bool:
    """Tell whether a user should see what is logged.

    Parameters
    ----------
    record
        What is logged.

    Returns
    -------
    bool
        False for what ``distributed.utils.sync`` raises in its own thread where Ctrl-C comes before a call has begun:
        it wants to cancel a future that it does not have yet.
    """
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, NameError) and "free variable 'future'" in str(error))


@click.group(name="mesh")
@click.version_option(meshcompute.__version__, prog_name="meshcompute")
def mesh() -> None:
    """Compute across data centres: the work goes to the data."""
    logging.getLogger("tornado.application").addFilter(is_news)


@mesh.command()
@click.option("--reference", is_flag=True, help="Synthetic fields in the shape of the reference instead of real ones.")
@click.option(
    "--scale",
    type=float,
    default=0.125,
    show_default=True,
    help="Size of latitude and longitude with --reference; 1 is 18 x 33 x 960 x 1280, a file of 2.7 GiB.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    default=Path("meshcompute-demo.png"),
    show_default=True,
    help="Where to save the map.",
)
@click.option("--workers", type=click.IntRange(1, 64), default=4, show_default=True, help="Worker processes per site.")
@click.option("--keep", is_flag=True, help="Leave the sites running afterwards, until Ctrl-C.")
@click.option(
    "--scheduler",
    envvar="DASK_SCHEDULER_ADDRESS",
    metavar="ADDRESS",
    help="Use this cluster instead of starting one; its workers carry resources pool-<site>. [DASK_SCHEDULER_ADDRESS]",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Where the sites of that cluster have their files: FOLDER/<site>/<file>. [workers write them]",
)
@click.option(
    "--lab",
    "is_in_lab",
    is_flag=True,
    help="In data centres simulated on this machine, with containers and WireGuard (Linux, root).",
)
@click.option(
    "--rate", type=float, metavar="MBIT", help="With --lab: what each link carries, in Mbit/s; else no limit."
)
@click.option("--delay", type=float, metavar="MS", help="With --lab: delay one way, in ms. [20]")
@click.option("--image", metavar="FILE", help="With --lab: archive with the workers' image. [built]")
@click.pass_context
def demo(
    ctx: click.Context,
    /,
    *,
    is_in_lab: bool,
    rate: float | None,
    delay: float | None,
    image: str | None,
    workers: int,
    **options: Any,
) -> None:
    """Show one calculation on data of two sites: how it fails without pools, and the answer with them.

    Real data: the Met Office's climate scenarios A1B at one site and E1 at the other. The exit code is 0 only if the
    result equals the one of plain xarray on plain files. Without --scheduler and --lab, the sites are daemons of this
    machine with plain processes as workers.
    """
    if is_in_lab:
        if options["data"] is not None or ctx.get_parameter_source("scheduler") is ParameterSource.COMMANDLINE:
            raise click.UsageError("--lab starts a cluster and writes its data: leave --scheduler and --data away.")
        options["scheduler"] = None
    elif (rate, delay, image) != (None, None, None):
        raise click.UsageError("--rate, --delay and --image are of the lab: add --lab.")
    if options["data"] is not None and options["scheduler"] is None:
        raise click.UsageError("--data is where the sites of a cluster have their files: add --scheduler.")
    from meshcompute.demo import Demo
    from meshcompute.labdemo import run_demo_in_lab

    try:
        shown = Demo(workers_per_site=workers, **options)
        if is_in_lab:
            sys.exit(run_demo_in_lab(shown, rate=rate, delay=20.0 if delay is None else delay, image=image))
        is_right = shown.run()
    except (MeshError, OSError, ValueError) as exc:
        raise click.ClickException(str(exc)) from exc
    except KeyboardInterrupt:
        click.echo("interrupted; everything that was started has been ended", err=True)
        sys.exit(INTERRUPTED)
    sys.exit(0 if is_right else 1)


@mesh.command("sample-data")
@click.option("--scale", type=float, default=0.125, show_default=True, help="As of the demo with --reference.")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def sample_data(*, scale: float, folder: Path) -> None:
    """Write what the reference has at its two sites to FOLDER/ecmwf and FOLDER/eumetsat, with synthetic fields."""
    from meshcompute.demo import SITES, Demo

    try:
        Demo(reference=True, scale=scale, say=click.echo).write_files({site: folder / site for site in SITES})
    except (MeshError, OSError, ValueError) as exc:
        raise click.ClickException(str(exc)) from exc


mesh.add_command(lab)
for command in clustercli.COMMANDS:
    mesh.add_command(command)


def main() -> None:
    """Run the command line."""
    mesh(prog_name="meshcompute")
