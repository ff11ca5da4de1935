#!/usr/bin/env python
"""The reference calculation, side by side: every way that a user has, in one run, on the same data.

Predictions lie at one site and observations at another; the client is elsewhere, and all are joined by a WAN (30 Mbit/s
and 20 ms there and back unless you say otherwise). The calculation is the reference's own: the mean over all
realizations at all heights, one height of it, minus the observations, painted at the client. The ways to get there:

  1  everything at the client, the files over a remote mount (sshfs)
  2  the files copied to the client first (rsync), then as 1
  3  one stock Dask cluster over both sites, each site's files mounted at the other one
  4  one Dask cluster per site, brought together by hand
  5  one cluster, Dask's own resource annotations, fusion off
  6  pools: the client sees the files' metadata over a mount
  7  pools: the client sees no file
  8  as 7, with meshcompute.compression off

Beside the reference's own calculation (``ensemble``) there are, on request, the same with predictions compressed
(``compressed``), real data (``scenarios``: two climate scenarios), and a time series split between the sites as Zarr in
an object store per site (``zarr``: moto's S3 server at an address of each site's own LAN, which the site's operator
names as a service for workers; "mounted" then means that SSH forwards the store, and copies are made through that).

Time is from opening the files to the painted picture; mounts, clusters and imports are there beforehand. Bytes are
those that crossed the WAN in that time, in both directions, control plane and result included, by the lab's own
counters; those of the data plane are checked against WireGuard's. The WAN, the hosts and the sites are emulated on this
machine (`meshcompute lab`); engines, containers, WireGuard, SSH and Dask are real.

Run it as root where meshcompute is installed; it needs sshfs, and rsync (scp serves where that is missing):
  python scripts/benchmarks/reference.py --output FOLDER            full size; wants a quiet machine for an hour
  python scripts/benchmarks/reference.py --quick --check            small; asserts orders and bytes
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from inlab import add_options, booted, open_lab, report, run, say, surroundings
from reference_calculations import SITES, calculation
from reference_figures import Floor, Row, missed_bars, render_checks, render_floor, render_table, save_pictures
from reference_lab import (
    Counters,
    Pair,
    Program,
    Programs,
    Progress,
    Reading,
    forwarded,
    let_sites_mount,
    mounted,
    serving,
)

from meshcompute.lab.running import RunningLab
from meshcompute.lab.starting import find_program
from meshcompute.lab.topology import default_hosts

CALCULATIONS = ("ensemble", "compressed", "scenarios", "zarr")
QUICK = {"scale": 0.125, "transfer": 2_000_000, "processes": 2}
RSYNC = ("rsync", "--whole-file", "--inplace")
SCP = ("scp", "-q", "-B")
CLIENT_MOUNTS = tuple(("client", site) for site in SITES)
SITE_MOUNTS = ((SITES[0], SITES[1]), (SITES[1], SITES[0]))
BOOT_SECONDS = 10.0
REPORT, PICTURE, RESULT = "/tmp/report.html", "/tmp/picture.png", "/tmp/result.npy"  # noqa: S108 - the lab's own


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to compute.

    Attributes
    ----------
    method
        Of the user's program.
    title
        For people.
    cluster
        Which clusters it needs: ``none``, one over ``both`` sites, one with ``mounts`` at the sites, or two ``apart``.
    has_mounts
        Whether the client sees the files over a mount.
    moves_files
        Whether whole files cross the WAN.
    compression
        Setting ``meshcompute.compression``.
    objects_title
        For people, where the data lie in object stores; the same title if there is none.
    """

    method: str
    title: str
    cluster: str
    has_mounts: bool
    moves_files: bool = False
    compression: str = "auto"
    objects_title: str = ""


WAYS = {
    "1": Way(
        method="compute_over_mount",
        title="remote mount",
        objects_title="stores by SSH",
        cluster="none",
        has_mounts=True,
        moves_files=True,
    ),
    "2": Way(method="copy_then_compute", title="copy first", cluster="none", has_mounts=False, moves_files=True),
    "3": Way(
        method="one_stock_cluster",
        title="stock Dask, mounts",
        objects_title="stock Dask, by SSH",
        cluster="mounts",
        has_mounts=True,
        moves_files=True,
    ),
    "4": Way(method="a_cluster_per_site", title="cluster per site", cluster="apart", has_mounts=True),
    "5": Way(method="plain_annotations", title="plain annotations", cluster="both", has_mounts=True),
    "6": Way(method="pools", title="pools", cluster="both", has_mounts=True),
    "7": Way(method="pools_without_files", title="pools, no file", cluster="both", has_mounts=False),
    "8": Way(
        method="pools_without_files", title="as 7, not packed", cluster="both", has_mounts=False, compression="off"
    ),
}
OURS = ("6", "7", "8")


class Bench:
    """The lab with its data, in which ways are measured.

    Parameters
    ----------
    lab
        The lab.
    data
        Folder with the data of each site.
    name
        Of the calculation.
    options
        The command line's.
    """

    def __init__(self, lab: RunningLab, data: Path, name: str, options: argparse.Namespace) -> None:
        self.lab, self.data, self.name, self.options = lab, data, name, options
        self.wanted = calculation(name, options.scale)
        self.counters = Counters(lab)
        self.programs = Programs(lab)
        self.copier = RSYNC if find_program("rsync") else SCP

    @contextmanager
    def clusters(self, kind: str) -> Iterator[list[str]]:
        """Have the clusters that a way needs; gives their schedulers' addresses."""
        with ExitStack() as stack:
            if kind == "mounts":
                stack.enter_context(self._seen_from_afar(SITE_MOUNTS))
            sites: Sequence[Sequence[str]] = {"none": [], "apart": [[site] for site in SITES]}.get(kind, [SITES])
            arguments = ("--processes", str(self.options.processes))
            yield [stack.enter_context(booted(self.lab, *arguments, sites=names)).address for names in sites]

    def _seen_from_afar(self, pairs: Sequence[Pair]) -> AbstractContextManager[None]:
        """Have the data of sites at other hosts."""
        return (forwarded if self.wanted.has_objects else mounted)(self.lab, pairs)

    def measure(self, number: str, addresses: list[str]) -> Row:
        """Measure one way once."""
        way = WAYS[number]
        title = (way.objects_title if self.wanted.has_objects else "") or way.title
        what = f"({number}) {title}"
        size = nbytes_below(self.data)
        # Who copies objects needs to reach the store, too; files are copied through SSH anyway.
        has_mounts = way.has_mounts or (way.moves_files and self.wanted.has_objects)
        with ExitStack() as stack:
            stack.enter_context(self._seen_from_afar(CLIENT_MOUNTS if has_mounts else ()))
            watch = None
            if addresses:
                watched: dict[str, Any] = {"program": "watch", "addresses": addresses, "report": REPORT}
                watched["has_objects"] = self.wanted.has_objects
                watch = stack.enter_context(self.programs.started(watched))
            program = stack.enter_context(self._start(way.method, addresses, way.compression))
            if watch is not None:
                watch.wait_for("ready")
            program.wait_for("ready")
            progress = Progress(self.counters, what, size if way.moves_files else 0)
            before = self.counters.read()
            program.go()
            program.wait_for("done", progress)
            after = self.counters.read()
            seen = {} if watch is None else watch.result()
            told = program.result()
            right = None if "error" in told else self._is_right()
            if self.options.output and watch is not None:
                name = f"{self.name}-{number}-report.html"
                shutil.copy(self._at_client(REPORT), self.options.output / name)
        if told["has_meshcompute"] != (number in OURS):
            raise RuntimeError(
                f"{what}: the user's program {'has' if told['has_meshcompute'] else 'lacks'} meshcompute"
            )
        row = row_of(number, told=told, seen=seen, before=before, after=after)
        is_by_scp = way.method.startswith("copy") and self.copier is SCP and not self.wanted.has_objects
        return replace(row, title=title, is_right=right, note="by scp" if is_by_scp else "")

    def floor(self, addresses: list[str]) -> Floor:
        """Measure what nobody can avoid."""
        pair: Pair = (SITES[0], SITES[1])
        with self._start("one_transfer", addresses) as program:
            program.wait_for("ready")
            before = self.counters.read()
            program.go()
            program.wait_for("done")
            after = self.counters.read()
            told = program.result()
        there, back = (after.sent[way].nbytes - before.sent[way].nbytes for way in (pair, pair[::-1]))
        with self._start("average_at_its_site", addresses) as program:
            program.wait_for("ready")
            program.go()
            program.wait_for("done")
            average = program.result()
        for what in (told, average):
            if "error" in what:
                raise RuntimeError(f"The floor could not be measured: {what['error']}")
        n = self.options.transfer
        crossings = self.wanted.crossings(self.data)
        return Floor(
            payload_nbytes=crossings.nbytes(lambda value: value.nbytes),
            packed_nbytes=crossings.nbytes(packed_nbytes),
            forward_factor=there / n,
            backward_factor=back / n,
            transfer_bits_per_second=n * 8 / told["seconds"],
            read_seconds=average["seconds"],
            rate_bits_per_second=self.options.rate * 1e6,
            delay_seconds=self.options.round_trip / 2e3,
        )

    def close(self) -> None:
        """End what looks and computes."""
        self.programs.close()
        self.counters.close()

    def _start(self, method: str, addresses: list[str], compression: str = "auto") -> AbstractContextManager[Program]:
        is_timed = method in {way.method for way in WAYS.values()}
        return self.programs.started(
            {
                "program": method,
                "calculation": self.name,
                "scale": self.options.scale,
                "addresses": addresses,
                "copier": self.copier,
                "compression": compression,
                "nbytes": self.options.transfer,
                "picture": PICTURE if is_timed else "",
                "result": RESULT,
            }
        )

    def _at_client(self, path: str) -> Path:
        return Path(f"/proc/{self.lab.status().pids['client']}/root{path}")

    def _is_right(self) -> bool:
        result = np.load(self._at_client(RESULT))
        return bool(np.allclose(result, self.wanted.expected(self.data), rtol=0, atol=self.wanted.tolerance))


def nbytes_below(folder: Path) -> int:
    """Size of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def packed_nbytes(value: np.ndarray) -> int:
    """Size of a value packed as meshcompute packs it at best, from the whole value and not from a sample."""
    from meshcompute.packing import CODECS, Trial, pack

    frame = memoryview(np.ascontiguousarray(value)).cast("B")
    return min(len(pack(frame, Trial(codec, how, value.itemsize, 1.0, 0.0))) for codec in CODECS for how in (1, 2))


def row_of(number: str, *, told: Mapping[str, Any], seen: Mapping[str, Any], before: Reading, after: Reading) -> Row:
    """Bring together what the program, the watch and the counters found."""
    workers = [*seen.get("workers", []), *told.get("workers", [])]
    reads = [(str(worker["name"]), path, n) for worker in workers for path, n in worker["reads"].items()]
    # A worker's name begins with its site's; those of a client's own cluster are numbers.
    away = sum(
        n for name, path, n in reads if path.startswith(("/data/", "s3://")) and not name.startswith(path.split("/")[2])
    )
    return Row(
        number=number,
        title=WAYS[number].title,
        seconds=told["seconds"],
        error=told.get("error", ""),
        reads=sum(n for _, _, n in reads),
        reads_away=away,
        client_peak_nbytes=told["client_peak_nbytes"],
        workers_peak_nbytes=sum(worker["peak_nbytes"] for worker in workers),
        sent={f"{a}>{b}": asdict(counted - before.sent[a, b]) for (a, b), counted in after.sent.items()},
        settled=[asdict(counted - before.settled[pair]) for pair, counted in after.settled.items()],
        unsure_nbytes=before.unsure_nbytes + after.unsure_nbytes,
        payload=seen.get("payload"),
        encoded=seen.get("encoded"),
        predicted=told.get("predicted"),
        plan=told.get("plan", ""),
        tasks=seen.get("tasks", []),
        warnings=tuple(seen.get("warnings", ())),
        copied_seconds=told.get("copied_seconds"),
    )


@contextmanager
def open_data(options: argparse.Namespace) -> Iterator[Path]:
    """Have the data of every calculation that is asked for, as ``<folder>/<calculation>/<site>``."""
    with ExitStack() as stack:
        top = options.data
        if top is None:
            top = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="meshcompute-reference-", dir="/var/tmp"))
            )
            top.chmod(0o755)
        for name in options.calculations:
            began = time.monotonic()
            say(f"data of {name}: {calculation(name, options.scale).title}")
            folder = top / f"{name}-{options.scale:g}"
            calculation(name, options.scale).write(folder, lambda *_: None)
            say(f"    written in {time.monotonic() - began:.0f} s")
        yield top


def estimate_seconds(options: argparse.Namespace, nbytes: int) -> float:
    """How long ways take, roughly: those that move files as long as the WAN needs for them, the others little."""
    moving = sum(WAYS[number].moves_files for number in options.ways)
    return 20 + moving * nbytes * 8 * 1.15 / (options.rate * 1e6) + len(options.ways) * (BOOT_SECONDS + 10)


def measure_all(options: argparse.Namespace, name: str, data: Path) -> tuple[list[Row], Floor | None]:
    """Measure every way of one calculation, in a lab of its own."""
    rows: list[Row] = []
    floor = None
    hosts = tuple(replace(h, data=str(data / h.name)) if h.is_site else h for h in default_hosts())
    shape = {"rate_bits_per_second": options.rate * 1e6, "delay_seconds": options.round_trip / 2e3}
    nbytes = nbytes_below(data)
    say(f"{name}: {nbytes / 2**20:.1f} MiB at the sites; about {estimate_seconds(options, nbytes) / 60:.0f} min")
    with ExitStack() as stack:
        lab = stack.enter_context(open_lab(options.image, hosts=hosts, **shape))
        let_sites_mount(lab)
        bench = Bench(lab, data, name, options)
        stack.callback(bench.close)
        if bench.wanted.has_objects:
            stack.enter_context(serving(lab))
        bench.programs.wait_listening()
        for kind in dict.fromkeys(WAYS[number].cluster for number in options.ways):
            began = time.monotonic()
            with bench.clusters(kind) as addresses:
                if addresses:
                    say(f"  clusters ({kind}) are ready after {time.monotonic() - began:.1f} s")
                for number in options.ways:
                    if WAYS[number].cluster == kind:
                        if floor is None and number in OURS:  # not before 5: from here on values are packed
                            floor = bench.floor(addresses)
                        rows.append(bench.measure(number, addresses))
                        say(f"  {rows[-1]}")
    return sorted(rows, key=lambda row: row.number), floor


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="of latitude and longitude; 1 is the reference's")
    parser.add_argument("--rate", type=float, default=30.0, metavar="MBIT", help="of each link, each way, in Mbit/s")
    parser.add_argument("--round-trip", type=float, default=20.0, metavar="MS", help="delay there and back")
    parser.add_argument("--ways", default=",".join(WAYS), help="which, e.g. 2,7")
    parser.add_argument("--calculations", default="ensemble", help="of ensemble,compressed,scenarios,zarr, or all")
    parser.add_argument("--quick", action="store_true", help=f"scale {QUICK['scale']:g}, a few minutes in all")
    parser.add_argument("--data", type=Path, help="folder that keeps the data for another run")
    parser.add_argument("--output", type=Path, help="folder for pictures, Dask's performance reports and figures")
    add_options(parser)
    options = parser.parse_args()
    options.transfer = QUICK["transfer"] if options.quick else 4 * QUICK["transfer"]
    options.scale = QUICK["scale"] if options.quick else options.scale
    options.processes = QUICK["processes"] if options.quick else 4
    options.ways = options.ways.split(",")
    options.calculations = CALCULATIONS if options.calculations == "all" else options.calculations.split(",")
    if unknown := set(options.ways) - set(WAYS):
        parser.error(f"unknown ways: {', '.join(sorted(unknown))}")
    if unknown := set(options.calculations) - set(CALCULATIONS):
        parser.error(f"unknown calculations: {', '.join(sorted(unknown))}")
    if find_program("sshfs") is None or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise RuntimeError("Remote mounts need sshfs and /dev/fuse: apt-get install sshfs")
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
    where = surroundings()
    results: dict[str, Any] = {"where": where, "rate_mbit": options.rate, "round_trip_ms": options.round_trip}
    results |= {"scale": options.scale, "calculations": {}}
    missed: list[str] = []
    with open_data(options) as data:
        for name in options.calculations:
            rows, floor = measure_all(options, name, data / f"{name}-{options.scale:g}")
            wanted = calculation(name, options.scale)
            title = wanted.title
            print(
                f"\n{title}\n{where}\n{options.rate:g} Mbit/s and {options.round_trip:g} ms there and back per link\n"
            )
            print(render_table(rows))
            if floor is not None:
                print(render_floor(floor, rows))
            print(render_checks(rows))
            missed += [
                f"{name}: {line}"
                for line in missed_bars(
                    rows, floor, is_full=options.scale == 1 and name == CALCULATIONS[0], held_to=wanted.held_to
                )
            ]
            results["calculations"][name] = {
                "title": title,
                "rows": [asdict(row) for row in rows],
                "floor": floor and asdict(floor),
            }
            if options.output:
                save_pictures(rows, floor, options.output / name, title=title)
    if options.output:
        (options.output / "reference.json").write_text(json.dumps(results, indent=1))
    return report(results, missed, options)


if __name__ == "__main__":
    run(main)
