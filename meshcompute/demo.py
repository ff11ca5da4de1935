"""``meshcompute demo``: one calculation on data of two sites, without pools and with them.

Covers the order of what is shown, and what is printed. Does not cover the calculations (:mod:`meshcompute.showcases`),
their data (:mod:`meshcompute.sampledata`) or the sites: those of this machine (:mod:`meshcompute.mesh.localsites`, with
a :class:`~meshcompute.mesh.cluster.MeshCluster`), or of a cluster that is there.

Notes
-----
The same steps run on the sites that the demo starts and on a cluster that somebody else started. There, the sites have
the files already, or a worker of each writes its own.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import dask
import numpy as np
import xarray as xr
from dask.utils import format_bytes
from distributed import Client, get_worker

import meshcompute
from meshcompute import sampledata
from meshcompute.embedded import POOL_PREFIX
from meshcompute.errors import MeshError
from meshcompute.mesh.cluster import MeshCluster
from meshcompute.mesh.localsites import LocalSites
from meshcompute.scratch import ScratchFolder
from meshcompute.shipping import by_value
from meshcompute.showcases import Ensemble, Scenarios, Showcase

__all__ = ["SITES", "Demo"]

SITES = ("ecmwf", "eumetsat")  # the reference's two sites
PROGRESS_TOPIC = "meshcompute-demo"
START_TIMEOUT_SECONDS = 300.0  # a laptop may be busy
LEASE_SECONDS = 60.0  # of the sites on this machine: how long their workers can outlive this process and the daemons


class Demo:
    """Everything that ``meshcompute demo`` shows.

    Parameters
    ----------
    reference
        Whether to use synthetic fields in the shape of the reference instead of real climate scenarios.
    scale
        Size of the synthetic fields; 1 is the reference's own.
    output
        Where to save the picture.
    workers_per_site
        Worker processes that are started at each of the two sites.
    keep
        Whether to leave everything running until Ctrl-C.
    scheduler
        Address of a cluster to use; None starts one on this machine.
    data
        Folder in which each site of that cluster has its files already, as ``<data>/<site>/<file>``; None lets a worker
        of each site write them to its folder for temporary files.
    say
        Prints a line.
    """

    def __init__(
        self,
        *,
        reference: bool = False,
        scale: float = 0.125,
        output: Path = Path("meshcompute-demo.png"),
        workers_per_site: int = 4,
        keep: bool = False,
        scheduler: str | None = None,
        data: Path | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.reference = reference
        self.showcase: Showcase = Ensemble(scale) if reference else Scenarios()
        self.scale = scale
        self.output = output
        self.workers_per_site = workers_per_site
        self.keep = keep
        self.scheduler = scheduler
        self.data = data
        self.say = say or (lambda line: print(line, flush=True))

    def run(self) -> bool:
        """Show it.

        Returns
        -------
        bool
            Whether the result was that of plain xarray on plain files.
        """
        self.check_output()
        self.say(f"{self.showcase.title}\n")
        with self._sites() as sites, ExitStack() as delivered:
            self.say("1. The data: each file is at one site")
            paths = self._deliver(sites, delivered)
            self._show_failure(sites, paths)
            result = self._show_answer(sites, paths)
            is_right = self._compare(sites, paths, result)
            self.showcase.paint(result, self.output)
            self.say(f"   picture saved: {self.output}")
            if self.keep:
                self._wait(sites, paths)
        return is_right

    def check_output(self) -> None:
        """Find out now, not after the calculation, that the picture cannot be saved.

        Raises
        ------
        MeshError
            Its folder does not exist.
        """
        if not self.output.absolute().parent.is_dir():
            raise MeshError(f"The folder for the picture does not exist: {self.output.absolute().parent}")

    def write_files(self, stores: Mapping[str, Path]) -> None:
        """Write the file of each site.

        Parameters
        ----------
        stores
            The folder of each site, as this process writes it.
        """
        for (site, store), file, write in zip(stores.items(), self.showcase.files, self._writers(), strict=True):
            write(str(store / file), lambda line, site=site: self.say(f"   {site}: {line}"))

    # The steps

    @contextmanager
    def _sites(self) -> Iterator[_Sites]:
        if self.scheduler is not None:
            with Client(self.scheduler) as client:
                folder = Path(tempfile.gettempdir()) / f"meshcompute-demo-{uuid.uuid4().hex[:8]}"
                sites = _Sites.of_client(client, self.data or folder)
                self.say(f"   using the cluster at {self.scheduler} with the pools {' and '.join(sites.names)}")
                yield sites
            return
        names = " and ".join(SITES)
        self.say(f"starting a site daemon each for {names}, and a cluster of {self.workers_per_site} workers at each")
        with ScratchFolder("meshcompute-data-") as private:
            stores = {site: private.path / site for site in SITES}
            for store in stores.values():
                store.mkdir()
            local = LocalSites(stores, workers_per_site=self.workers_per_site)
            with (
                local,
                MeshCluster(
                    local.addresses,
                    scheduler=local.scheduler,
                    lease_seconds=LEASE_SECONDS,
                    start_timeout_seconds=START_TIMEOUT_SECONDS,
                    propagate=False,  # this is what is shown
                    progress=lambda line: self.say(f"  {line.replace(f'local:{local.root}/', '')}"),
                ) as cluster,
                Client(cluster) as client,
            ):
                self.say(f"   workers: {', '.join(sorted(cluster.observed))}\n")
                yield _Sites.of_client(client, local.root / "data", stores=stores)

    def _deliver(self, sites: _Sites, delivered: ExitStack) -> tuple[str, str]:
        """See to it that each site has its file; where a worker wrote it, it is removed in the end."""
        if sites.stores is not None:
            self.write_files(sites.stores)
        elif self.data is None:
            self._let_workers_write(sites, delivered)
        paths = [str(sites.folder / site / file) for site, file in zip(sites.names, self.showcase.files, strict=True)]
        for site, path in zip(sites.names, paths, strict=True):
            self.say(f"   {site}: {path} ({format_bytes(sites.nbytes(site, path))})")
        return paths[0], paths[1]

    def _let_workers_write(self, sites: _Sites, delivered: ExitStack) -> None:
        sites.client.subscribe_topic(PROGRESS_TOPIC, lambda event: self.say(f"   {event[1]}"))
        for site, file, write in zip(sites.names, self.showcase.files, self._writers(), strict=True):
            delivered.callback(sites.run_on_hosts, site, _remove, str(sites.folder))
            try:
                sites.run_on_hosts(site, write, str(sites.folder / site / file))
            except (OSError, RuntimeError) as exc:  # the second is HDF5's for a full disk
                cure = (
                    "If there is no room for it, take a smaller --scale, or name a folder that has the files (--data)."
                )
                raise MeshError(f"Site {site} cannot write its file in {sites.folder.parent} ({exc}). {cure}") from exc
        sites.client.unsubscribe_topic(PROGRESS_TOPIC)

    def _writers(self) -> tuple[_Writer, _Writer]:
        if self.reference:
            return (
                _Generate(sampledata.write_predictions, self.scale),
                _Generate(sampledata.write_observations, self.scale),
            )
        return _Copy(sampledata.scenario_file("A1B").read_bytes()), _Copy(sampledata.scenario_file("E1").read_bytes())

    def _show_failure(self, sites: _Sites, paths: tuple[str, str]) -> None:
        """Run the calculation as anybody would, where no site can read the other's file."""
        self.say("\n2. Without pools: Dask sends the reading to any worker")
        seen_elsewhere = [
            other
            for path, other in zip(paths, reversed(sites.names), strict=True)
            if any(sites.run_on_hosts(other, os.path.exists, path))
        ]
        if seen_elsewhere:
            self.say(f"   not shown: workers of {' and '.join(seen_elsewhere)} can read the other site's file here")
            return
        self.say("   no site sees the other's file, and this process sees none of them")
        datasets = [sites.open_metadata(site, path) for site, path in zip(sites.names, paths, strict=True)]
        with dask.config.set(self.showcase.config):
            lazy = [dataset.chunk(self.showcase.chunks) for dataset in datasets]
        difference = self.showcase.define(*lazy)
        try:
            difference.compute()
        except FileNotFoundError as exc:
            self.say(f"   FileNotFoundError: {exc}")
        else:
            # With eight workers and dozens of chunks this takes luck, so it is worth a line.
            self.say("   it worked, by luck: every chunk happened to be read at its own site")

    def _show_answer(self, sites: _Sites, paths: tuple[str, str]) -> Any:
        self.say("\n3. With pools: reading stays at the data, the rest goes where fewest bytes cross")
        started = time.perf_counter()
        with dask.config.set(self.showcase.config):
            lazy = [
                meshcompute.open_dataset(site, path, chunks=self.showcase.chunks)
                for site, path in zip(sites.names, paths, strict=True)
            ]
        difference = self.showcase.define(*lazy)
        with meshcompute.propagate_pools():
            plan = meshcompute.explain(difference)
            self.say(_indent(str(plan)))
            planned = time.perf_counter()
            with meshcompute.measure_traffic() as traffic:
                result = difference.compute()
        ended = time.perf_counter()
        self.say("")
        self.say(_traffic_table(plan.bytes_between_pools, traffic.bytes_between_pools))
        whole = sum(sites.nbytes(site, path) for site, path in zip(sites.names, paths, strict=True))
        self.say(f"   both files, for comparison: {format_bytes(whole)}")
        self.say(f"   {ended - planned:.2f} s to compute, {planned - started:.2f} s to open and plan")
        return result

    def _compare(self, sites: _Sites, paths: tuple[str, str], result: Any) -> bool:
        self.say("\n4. The same in plain xarray, without Dask, on plain files")
        if self.reference:
            # As the file may be larger than memory, one level is averaged where it lies.
            level = sites.run_at(sites.names[0], _plain_ensemble_mean, paths[0])
            expected = level - sites.run_at(sites.names[1], _plain_observations, paths[1])
            computed = result["air_pressure"].values
        else:
            with (
                xr.open_dataset(sampledata.scenario_file("A1B")) as first,
                xr.open_dataset(sampledata.scenario_file("E1")) as second,
            ):
                expected = self.showcase.define(first.load(), second.load()).values
            computed = result.values
        if computed.shape != expected.shape:
            self.say(f"   WRONG: shape {computed.shape}, expected {expected.shape}")
            return False
        largest = float(np.abs(computed - expected).max())
        # Sums of float32 in another order differ in the last bits of the operands.
        is_right = bool(np.allclose(computed, expected, rtol=1e-5, atol=1e-6 * _magnitude(self.reference)))
        self.say(f"   {'equal' if is_right else 'WRONG'}: the largest difference is {largest:.2g}")
        return is_right

    def _wait(self, sites: _Sites, paths: tuple[str, str]) -> None:
        client = sites.client
        self.say("\nThe sites stay until Ctrl-C. In another Python:")
        self.say(f"   from distributed import Client; client = Client({client.scheduler.address!r})")
        self.say("   import meshcompute; meshcompute.propagate_pools()")
        for site, path in zip(sites.names, paths, strict=True):
            self.say(f"   meshcompute.open_dataset({site!r}, {path!r})")
        if client.dashboard_link:
            self.say(f"   dashboard: {client.dashboard_link}")
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


class _Sites:
    """Two pools of a cluster, and where each keeps its files."""

    def __init__(
        self,
        client: Client,
        workers_by_site: dict[str, dict[str, str]],
        folder: Path,
        stores: Mapping[str, Path] | None,
    ) -> None:
        self.client = client
        self.names: tuple[str, str] = tuple(workers_by_site)  # type: ignore[assignment]
        self.folder = folder  # each site's own is in it, by its name
        self.stores = stores  # where this process can write what sites see there, if it can
        # One worker per host: what it writes is there for the host's others.
        self._hosts = {
            site: list({host: address for address, host in workers.items()}.values())
            for site, workers in workers_by_site.items()
        }

    @classmethod
    def of_client(cls, client: Client, folder: Path, *, stores: Mapping[str, Path] | None = None) -> _Sites:
        workers = client.sync(client.scheduler.identity, n_workers=-1)["workers"]
        hosts_by_site: dict[str, dict[str, str]] = {}
        for address, worker in workers.items():
            for resource in worker["resources"]:
                if resource.startswith(POOL_PREFIX):
                    hosts_by_site.setdefault(resource.removeprefix(POOL_PREFIX), {})[address] = worker["host"]
        if len(hosts_by_site) < 2:
            raise MeshError(
                f"The demo needs workers of two sites; the cluster at {client.scheduler.address} has the pools: "
                f"{', '.join(hosts_by_site) or 'none'}. Start workers with --resources pool-<site>=1."
            )
        return cls(client, {site: hosts_by_site[site] for site in sorted(hosts_by_site)[:2]}, folder, stores)

    def run_on_hosts(self, site: str, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call a function once on every host of a site; workers need not have meshcompute."""
        futures = [
            self.client.submit(_travelling(function), *args, workers=[address], pure=False)
            for address in self._hosts[site]
        ]
        return list(self.client.gather(futures))

    def run_at(self, site: str, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function on one host of a site."""
        return self.client.submit(_travelling(function), *args, workers=self._hosts[site][:1], pure=False).result()

    def open_metadata(self, site: str, path: str) -> xr.Dataset:
        """Open a file at its site and give back the lazy dataset, as if the file were mounted here: no pin."""
        dataset: xr.Dataset = self.run_at(site, _open_metadata, path)
        return dataset

    def nbytes(self, site: str, path: str) -> int:
        """Size of a file at a site."""
        return int(self.run_at(site, os.path.getsize, path))


# What runs at the sites. Workers may lack meshcompute: these travel by value.


def _travelling(function: Callable[..., Any]) -> by_value:
    return by_value(function, modules=[sampledata.__name__])


_Writer = Callable[..., int]


class _Copy:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def __call__(self, path: str, _say: Callable[[str], None] | None = None) -> int:
        os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120 - any worker
        with open(path, "wb") as file:  # noqa: PTH123 - any worker
            return file.write(self.content)


class _Generate:
    def __init__(self, write: Callable[..., int], scale: float) -> None:
        self.write = write
        self.scale = scale

    def __call__(self, path: str, say: Callable[[str], None] | None = None) -> int:
        if self.write.__name__ != "write_predictions":
            return self.write(path, self.scale)
        tell = say or (lambda line: get_worker().log_event(PROGRESS_TOPIC, line))
        shown = [time.monotonic()]

        def report(done: int, n_levels: int) -> None:
            if time.monotonic() - shown[0] > 1 or done == n_levels:
                shown[0] = time.monotonic()
                tell(f"generated {done} of {n_levels} levels")

        return self.write(path, self.scale, report)


def _remove(folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _open_metadata(path: str) -> Any:
    import xarray

    dataset = xarray.open_dataset(path, cache=False)
    for variable in dataset.variables.values():
        if not variable.dims:  # Dask has no chunks of scalars, so whoever computes with one reads it at once
            variable.load()
    return dataset


def _plain_ensemble_mean(path: str) -> Any:
    import xarray

    with xarray.open_dataset(path) as dataset:
        return dataset["air_pressure"].isel(height=10).load().mean("realization").values


def _plain_observations(path: str) -> Any:
    import xarray

    with xarray.open_dataset(path) as dataset:
        return dataset["air_pressure"].values


# What is printed


def _magnitude(is_pressure: bool) -> float:
    return sampledata.SEA_LEVEL_PRESSURE_PA if is_pressure else 300.0


def _indent(text: str) -> str:
    return "\n".join(f"   {line}" for line in text.splitlines())


def _traffic_table(predicted: dict[tuple[str, str], float], measured: dict[tuple[str, str], int]) -> str:
    rows = [f"   {'from':<12}{'to':<12}{'predicted':>14}{'measured':>14}"]
    for source, destination in sorted({*predicted, *measured}):
        crossing = (source, destination)
        guess = format_bytes(round(predicted[crossing])) if crossing in predicted else "-"
        rows.append(f"   {source:<12}{destination:<12}{guess:>14}{format_bytes(measured.get(crossing, 0)):>14}")
    return "\n".join(rows)
