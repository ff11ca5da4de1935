"""The command ``meshcompute``, which is also ``dask mesh``.

Covers reading the command line and exit codes. Does not cover what the commands do. Every ``dask`` command loads this
file, so it imports click alone, and the rest when a command runs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

import meshcompute
from meshcompute import clustercli
from meshcompute.errors import MeshError
from meshcompute.lab.cli import lab

__all__ = ["main", "mesh"]

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


@click.group(name="mesh")
@click.version_option(meshcompute.__version__, prog_name="meshcompute")
def mesh() -> None:
    """Compute across data centres: the work goes to the data."""


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
def demo(*, reference: bool, scale: float, output: Path, workers: int, keep: bool, scheduler: str | None) -> None:
    """Show one calculation on data of two sites: how it fails without pools, and the answer with them.

    Real data: the Met Office's climate scenarios A1B at one site and E1 at the other. The exit code is 0 only if the
    result equals the one of plain xarray on plain files.
    """
    from meshcompute.demo import Demo

    try:
        is_right = Demo(
            reference=reference, scale=scale, output=output, workers_per_site=workers, keep=keep, scheduler=scheduler
        ).run()
    except (MeshError, OSError, ValueError) as exc:
        raise click.ClickException(str(exc)) from exc
    except KeyboardInterrupt:
        click.echo("interrupted; everything that was started has been ended", err=True)
        sys.exit(INTERRUPTED)
    sys.exit(0 if is_right else 1)


mesh.add_command(lab)
for command in clustercli.COMMANDS:
    mesh.add_command(command)


def main() -> None:
    """Run the command line."""
    mesh(prog_name="meshcompute")
