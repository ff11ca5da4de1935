"""The calculations of the benchmark of placement, each over any number of sites, with the results that they must have.

Covers what a scientist would write (arrays, xarray, dataframes, delayed calls), over data that only its own site can
read, and the same in plain numpy and pandas. Does not cover running or counting anything.

A series of fields over time lies at the sites in one of two ways::

    split         a a a a a a b b b b b b        each site has a part of the time
    interleaved   a b a b a b a b a b a b        every second chunk is at the other site
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import scipy.sparse
import xarray as xr
from distributed import Client, LocalCluster
from placement_fields import Field

from meshcompute import open_dataframe, pool

SIDE = 64  # of a field, in points
STEPS = 2  # of time in a chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A calculation over given sites.

    Attributes
    ----------
    results
        Dask collections, in the order in which they are computed, one after the other.
    expected
        What they must be.
    kept
        A collection that is persisted first.
    """

    results: Sequence[Any]
    expected: Sequence[Any]
    kept: Any = None

    def given(self, kept: Any) -> Sequence[Any]:
        """Tell the results in terms of what was persisted."""
        return self.results if self.kept is None else [result(kept) for result in self.results]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One row of the benchmark.

    Attributes
    ----------
    name
        For people.
    build
        Makes the calculation over sites.
    opens_files
        Whether it is also given the folder of every site, and a client whose workers are at all of them.
    config
        Of Dask, while it is built and computed.
    regroups
        Whether it is a reduction of interleaved data, which a reduction at each site first does with a tenth of the
        bytes of the graph as Dask makes it.
    """

    name: str
    build: Callable[..., Job]
    opens_files: bool = False
    config: tuple[tuple[str, Any], ...] = ()
    regroups: bool = False

    def job(self, sites: Sequence[str], stores: Mapping[str, Path]) -> Job:
        """Make the calculation.

        Notes
        -----
        Files are opened by a cluster in this process, so that the scheduler that will run it has nothing of ours when
        stock Dask's turn comes.
        """
        if not self.opens_files:
            return self.build(sites)
        resources = dict.fromkeys([f"pool-{site}" for site in sites], 1)
        with (
            LocalCluster(n_workers=1, processes=False, dashboard_address="127.0.0.1:0", resources=resources) as cluster,
            Client(cluster),
        ):
            return self.build(sites, stores)


def shares(n: int, n_sites: int) -> list[range]:
    """Share things between sites as evenly as it goes, neighbours together."""
    return [range(n * i // n_sites, n * (i + 1) // n_sites) for i in range(n_sites)]


def n_chunks(sites: Sequence[str]) -> int:
    """Tell how many chunks a series has: at least a dozen at every site, so that there is something to reduce there."""
    return max(60, 12 * len(sites))


def series(sites: Sequence[str], *, seed: int = 0, is_split: bool, dims: tuple[int, ...] = (SIDE, SIDE)) -> da.Array:
    """Make a series whose chunks lie at the sites, split or interleaved."""
    n = n_chunks(sites)
    chunks = [range(i, i + 1) for i in range(n)]
    parts = []
    for i, some in enumerate(shares(n, len(sites)) if is_split else chunks):
        site = sites[i % len(sites)]
        with pool(site):
            part = Field([site], (len(some) * STEPS, *dims), seed=seed, start=some.start * STEPS)
            parts.append(part.array((STEPS, *dims)))
    return da.concatenate(parts)


def true_series(sites: Sequence[str], *, seed: int = 0, dims: tuple[int, ...] = (SIDE, SIDE)) -> np.ndarray:
    """Give the same in numpy."""
    return Field((), (n_chunks(sites) * STEPS, *dims), seed=seed)[:]


def labelled(values: Any, freq: str) -> xr.DataArray:
    """Give a series times and places."""
    times = pd.date_range("2000-01-01", periods=len(values), freq=freq)
    return xr.DataArray(values, dims=("time", "y", "x"), coords={"time": times})


def headline(sites: Sequence[str]) -> Job:
    """Mean over the members at all levels, one level of it, minus the observations: the reference calculation."""
    dims = ("member", "level", "y", "x")
    shape, models = (6, 4, 128, 128), sites[:-1]
    forecasts, truth = [], []
    for i, site in enumerate(models):
        field = Field([site], shape, dtype="f4", seed=i)
        with pool(site):
            forecasts.append(xr.DataArray(field.array((6, 4, 64, 64)), dims=dims))
        truth.append(Field((), shape, dtype="f4", seed=i)[:].mean(0)[1])
    observed = Field([sites[-1]], shape[2:], dtype="f4", seed=9)
    with pool(sites[-1]):
        observations = xr.DataArray(observed.array((64, 64)), dims=dims[2:])
    average = sum(forecast.mean("member").isel(level=1) for forecast in forecasts) / len(models)
    expected = sum(truth) / len(models) - Field((), shape[2:], dtype="f4", seed=9)[:]
    return Job(results=[average - observations], expected=[expected])


def mean_of(values: Any) -> Any:
    return values.mean(0)


def deviation_of(values: Any) -> Any:
    return values.std(0)


def anomaly_of(values: Any) -> Any:
    return (values - values.mean(0)).std(0)


def of_series(function: Callable[[Any], Any], *, is_split: bool) -> Callable[[Sequence[str]], Job]:
    """Build jobs that do the same with Dask's array and with numpy's."""

    def build(sites: Sequence[str]) -> Job:
        return Job(results=[function(series(sites, is_split=is_split))], expected=[function(true_series(sites))])

    return build


def climatology(sites: Sequence[str]) -> Job:
    def monthly(values: Any) -> Any:
        with xr.set_options(use_flox=False):  # one graph, whatever is installed here
            return labelled(values, "MS").groupby("time.month").mean()

    return Job(results=[monthly(series(sites, is_split=True))], expected=[monthly(true_series(sites))])


def weighted(sites: Sequence[str]) -> Job:
    """Means over the area, by weights that lie at the last site."""
    weights = Field([sites[-1]], (SIDE, SIDE), seed=4)
    with pool(sites[-1]):
        lazy = weights.array((SIDE, SIDE))

    def average(values: Any, area: Any) -> Any:
        return labelled(values, "D").weighted(xr.DataArray(abs(area), dims=("y", "x"))).mean(("y", "x"))

    truth = Field((), (SIDE, SIDE), seed=4)[:]
    return Job(results=[average(series(sites, is_split=True), lazy)], expected=[average(true_series(sites), truth)])


def resampled(sites: Sequence[str]) -> Job:
    def spread(values: Any) -> Any:
        with xr.set_options(use_flox=False):
            return labelled(values, "D").resample(time="10D").mean().std("time")

    return Job(results=[spread(series(sites, is_split=True))], expected=[spread(true_series(sites))])


def coarsened(sites: Sequence[str]) -> Job:
    """Compare coarse fields of each site with those of the first one."""

    def spread(fields: Sequence[Any]) -> Any:
        coarse = [labelled(field, "D").coarsen(y=4, x=4).mean() for field in fields]
        return sum(((other - coarse[0]) ** 2).mean("time") for other in coarse[1:])

    shape = (24, SIDE, SIDE)
    fields = []
    for i, site in enumerate(sites):
        with pool(site):
            fields.append(Field([site], shape, seed=i).array((2, SIDE, SIDE)))
    return Job(results=[spread(fields)], expected=[spread([Field((), shape, seed=i)[:] for i in range(len(sites))])])


def summed(sites: Sequence[str]) -> Job:
    """Add fields of equal size, one of each site."""

    def total(fields: Sequence[Any]) -> Any:
        return (sum(fields[1:], fields[0]) ** 2).sum(0)

    shape = (24, SIDE, SIDE)
    fields = []
    for i, site in enumerate(sites):
        with pool(site):
            fields.append(Field([site], shape, seed=i).array((2, SIDE, SIDE)))
    return Job(results=[total(fields)], expected=[total([Field((), shape, seed=i)[:] for i in range(len(sites))])])


def covariance(sites: Sequence[str]) -> Job:
    """Covariances of a matrix at the first site with one at each of the others."""

    def covariances(matrices: Sequence[Any]) -> list[Any]:
        centred = [matrix - matrix.mean(0) for matrix in matrices]
        return [centred[0].T @ other / len(other) for other in centred[1:]]

    shape = (4000, 24)
    lazy = []
    for i, site in enumerate(sites):
        with pool(site):
            lazy.append(Field([site], shape, seed=i).array((500, 24)))
    expected = covariances([Field((), shape, seed=i)[:] for i in range(len(sites))])
    return Job(results=[da.stack(covariances(lazy))], expected=[np.stack(expected)])


def gram(sites: Sequence[str]) -> Job:
    """A matrix, whose rows are interleaved, times itself."""
    per_chunk, n_columns = 400, 48
    parts = []
    for i in range(n_chunks(sites)):
        site = sites[i % len(sites)]
        with pool(site):
            field = Field([site], (per_chunk, n_columns), start=i * per_chunk)
            parts.append(field.array((per_chunk, n_columns)))
    x, truth = da.concatenate(parts), Field((), (n_chunks(sites) * per_chunk, n_columns))[:]
    return Job(results=[x.T @ x], expected=[truth.T @ truth])


def regrid(block: np.ndarray, *, weights: Any) -> np.ndarray:
    """Bring fields to another grid by a sparse matrix of weights, as regridding libraries do."""
    n = int(np.sqrt(weights.shape[0]))
    return np.asarray((weights @ block.reshape(len(block), -1).T).T).reshape(len(block), n, n)


def regrid_weights(n_fine: int, n_coarse: int) -> Any:
    """Make weights of a conservative regridding from squares to squares of several points."""
    ratio = n_fine // n_coarse
    one = scipy.sparse.kron(scipy.sparse.eye_array(n_coarse), np.full((1, ratio), 1 / ratio))
    return scipy.sparse.csr_array(scipy.sparse.kron(one, one))


def regridded(sites: Sequence[str]) -> Job:
    """Bring a series to the coarse grid of the observations at the last site, and compare."""
    weights = regrid_weights(SIDE, SIDE // 4)
    shape = (n_chunks(sites) * STEPS, SIDE // 4, SIDE // 4)
    with pool(sites[-1]):
        observations = Field([sites[-1]], shape, seed=3).array((STEPS, *shape[1:]))
    fine = series(sites, is_split=True)
    coarse = da.map_blocks(regrid, fine, weights=weights, dtype="f8", chunks=(fine.chunks[0], *shape[1:]))
    expected = abs(regrid(true_series(sites), weights=weights) - Field((), shape, seed=3)[:]).mean(0)
    return Job(results=[abs(coarse - observations).mean(0)], expected=[expected])


def smoothed(sites: Sequence[str]) -> Job:
    """Smooth in time, which needs a step of each neighbour, and reduce."""

    def smooth(block: np.ndarray) -> np.ndarray:
        return (np.roll(block, 1, 0) + block + np.roll(block, -1, 0)) / 3

    lazy = da.overlap.map_overlap(smooth, series(sites, is_split=True), depth={0: 1}, boundary="nearest", dtype="f8")
    truth = np.pad(true_series(sites), ((1, 1), (0, 0), (0, 0)), mode="edge")
    return Job(results=[lazy.std(0)], expected=[smooth(truth)[1:-1].std(0)])


def rechunked(sites: Sequence[str]) -> Job:
    """Go to whole time series and back: detrend each point, then take the extremes."""

    def detrend(block: np.ndarray) -> np.ndarray:
        return block - np.linspace(block[0], block[-1], len(block))

    dims = (SIDE // 2, SIDE // 2)
    fields = series(sites, is_split=True, dims=dims)
    columns = fields.rechunk((-1, SIDE // 4, SIDE // 4)).map_blocks(detrend, dtype="f8")
    lazy = columns.rechunk((4 * STEPS, *dims)).max(0)
    return Job(results=[lazy], expected=[detrend(true_series(sites, dims=dims)).max(0)])


def singular_values(sites: Sequence[str]) -> Job:
    shape = (4000, 48)
    per_site, chunk = shape[0] // 4 // len(sites) * 4, 100
    parts, truth = [], []
    for i, site in enumerate(sites):
        rows = per_site // chunk * chunk
        with pool(site):
            parts.append(Field([site], (rows, shape[1]), start=i * rows).array((chunk, shape[1])))
        truth.append(Field((), (rows, shape[1]), start=i * rows)[:])
    _, lazy, _ = da.linalg.svd_compressed(da.concatenate(parts), 3, n_power_iter=1, seed=1)
    return Job(results=[lazy], expected=[np.linalg.svd(np.concatenate(truth), compute_uv=False)[:3]])


def true_table(parts: range, *, n_rows: int, seed: int) -> pd.DataFrame:
    """Give rows of a table."""
    rows = np.arange(parts.start * n_rows, parts.stop * n_rows)
    values = {f"v{i}": np.cos(rows * 0.1 + seed + i) for i in range(3)}
    return pd.DataFrame({"key": (rows * 7 + seed) % 997, "kind": rows % 10, **values})


def table(stores: Mapping[str, Path], site: str, parts: range, *, n_rows: int, seed: int) -> Any:
    """Write a table's parts to a site as Parquet, and open it there."""
    folder = stores[site] / f"table-{seed}-{n_rows}"
    folder.mkdir(exist_ok=True)
    for part in parts:
        one = true_table(range(part, part + 1), n_rows=n_rows, seed=seed)
        one.to_parquet(folder / f"{part:03}.parquet", index=False)
    return open_dataframe(site, folder)


def joined(sites: Sequence[str], stores: Mapping[str, Path]) -> Job:
    """Join tables of all sites but one with a small one at the last, and sum by kind."""
    n_others = len(sites) - 1
    n_parts, n_rows = max(12, n_others), 4000

    def totals(left: Any, right: Any) -> Any:
        return left.merge(right[["key", "v0"]], on="key", suffixes=("", "_other")).groupby("kind").v0_other.sum()

    parts = shares(n_parts, n_others)
    lefts = [table(stores, site, part, n_rows=n_rows, seed=1) for site, part in zip(sites, parts, strict=False)]
    left = lefts[0] if len(lefts) == 1 else dd.concat(lefts)
    right = table(stores, sites[-1], range(4), n_rows=250, seed=2)
    truth = totals(true_table(range(n_parts), n_rows=n_rows, seed=1), true_table(range(4), n_rows=250, seed=2))
    return Job(results=[totals(left, right)], expected=[truth])


def grouped(sites: Sequence[str], stores: Mapping[str, Path]) -> Job:
    """Statistics by kind of tables that lie at all sites."""

    def statistics(frame: Any) -> Any:
        return frame.groupby("kind")[["v0", "v1"]].agg(["mean", "std"])

    n_parts = 30
    parts = shares(n_parts, len(sites))
    frames = [table(stores, site, part, n_rows=2000, seed=1) for site, part in zip(sites, parts, strict=True)]
    truth = statistics(true_table(range(n_parts), n_rows=2000, seed=1))
    return Job(results=[statistics(dd.concat(frames))], expected=[truth])


@dask.delayed
def load_part(site: str, part: int) -> np.ndarray:
    """Read a part; nobody knows how large it is."""
    return Field([site], (16, SIDE, SIDE), start=16 * part)[:]


@dask.delayed
def clean(values: np.ndarray) -> np.ndarray:
    return np.clip(values, -1, 1)


@dask.delayed
def profile(values: np.ndarray) -> np.ndarray:
    """Condense a part to its profile along one axis."""
    return values.mean((0, 2))


@dask.delayed
def combine(profiles: Sequence[np.ndarray]) -> np.ndarray:
    return np.sum(profiles, axis=0)


def pipelines(sites: Sequence[str]) -> Job:
    """Load, clean, condense, combine: calls of functions of the user's own."""
    profiles = []
    for part in range(30):
        site = sites[part % len(sites)]
        with pool(site):
            loaded = load_part(site, part)
        profiles.append(profile(clean(loaded)))
    groups = [combine(profiles[i : i + 5]) for i in range(0, len(profiles), 5)]
    truth = [np.clip(Field((), (16, SIDE, SIDE), start=16 * part)[:], -1, 1).mean((0, 2)) for part in range(30)]
    return Job(results=[combine(groups)], expected=[np.sum(truth, axis=0)])


def unpinned(sites: Sequence[str]) -> Job:
    """Compare with something that can be had anywhere, chunk by chunk and as a whole."""
    shape = (n_chunks(sites) * STEPS, SIDE, SIDE)
    everywhere = Field((), shape, seed=5).array((STEPS, SIDE, SIDE))
    mask = Field((), shape[1:], seed=6).array(shape[1:])

    def difference(values: Any, others: Any, weights: Any) -> Any:
        return ((values - others) * weights).std(0)

    truth = difference(true_series(sites), Field((), shape, seed=5)[:], Field((), shape[1:], seed=6)[:])
    return Job(results=[difference(series(sites, is_split=False), everywhere, mask)], expected=[truth])


def replicas(sites: Sequence[str]) -> Job:
    """Compare a series at all sites with one that two of them have."""
    shape = (n_chunks(sites) * STEPS, SIDE, SIDE)
    with pool(*sites[:2]):
        other = Field(sites[:2], shape, seed=5).array((STEPS, SIDE, SIDE))
    truth = abs(true_series(sites) - Field((), shape, seed=5)[:]).max(0)
    return Job(results=[abs(series(sites, is_split=False) - other).max(0)], expected=[truth])


def reused(sites: Sequence[str]) -> Job:
    """Persist anomalies, and compute two things from them, one after the other."""
    values, truth = series(sites, is_split=True), true_series(sites)
    anomaly = truth - truth.mean(0)
    return Job(
        kept=values - values.mean(0),
        results=[lambda kept: kept.std(0), lambda kept: abs(kept).max(0)],
        expected=[anomaly.std(0), abs(anomaly).max(0)],
    )


TASKS = (("array.rechunk.method", "tasks"),)

WORKLOADS = (
    Workload(name="headline", build=headline),
    Workload(name="mean, split", build=of_series(mean_of, is_split=True)),
    Workload(name="std, split", build=of_series(deviation_of, is_split=True)),
    Workload(name="anomaly, split", build=of_series(anomaly_of, is_split=True)),
    Workload(name="mean, interleaved", build=of_series(mean_of, is_split=False), regroups=True),
    Workload(name="std, interleaved", build=of_series(deviation_of, is_split=False), regroups=True),
    Workload(name="anomaly, interleaved", build=of_series(anomaly_of, is_split=False)),
    Workload(name="climatology", build=climatology),
    Workload(name="weighted mean", build=weighted),
    Workload(name="resample", build=resampled),
    Workload(name="coarsen", build=coarsened),
    Workload(name="a + b", build=summed),
    Workload(name="covariance", build=covariance),
    Workload(name="matmul, interleaved", build=gram, regroups=True),
    Workload(name="sparse regrid", build=regridded),
    Workload(name="map_overlap", build=smoothed),
    Workload(name="rechunk, tasks", build=rechunked, config=TASKS),
    Workload(name="rechunk, default", build=rechunked),
    Workload(name="svd_compressed", build=singular_values),
    Workload(name="frames joined", build=joined, opens_files=True),
    Workload(name="frames grouped", build=grouped, opens_files=True),
    Workload(name="delayed", build=pipelines),
    Workload(name="unpinned operand", build=unpinned),
    Workload(name="replicas", build=replicas),
    Workload(name="persisted", build=reused),
)
