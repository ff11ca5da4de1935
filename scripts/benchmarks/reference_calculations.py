"""The calculations of ``reference.py``: their data, what a scientist writes, and what must come out.

Covers writing what each site has, opening it where it is seen, the calculation on two opened datasets, the field
that is painted, and the same result from plain numpy. Does not cover where anything runs. Importing it imports nothing
of meshcompute: clients without meshcompute compute the same. A calculation has

``files``
    by site: below ``/data/<site>``, or the bucket of that name in the site's object store.
``held_to``
    in what ours must be ahead of ways that move the data. Small data are moved in no time.
``has_objects``
    whether the data lie in object stores and not in files.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import dask
import numpy as np
import xarray as xr

SITES = ("ecmwf", "eumetsat")
HEIGHT = 10
STORE_PORT = 9000
STORE_KEY, STORE_SECRET = "reference", "reference"  # the store takes any


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossings:
    """What any placement sends: one of the operands to the other's site, and the result to the client.

    Attributes
    ----------
    operands, result
        The values.
    others_nbytes
        Bytes of small values that go along, both times together.
    """

    operands: tuple[np.ndarray, ...]
    result: np.ndarray
    others_nbytes: int

    def nbytes(self, size_of: Callable[[np.ndarray], int]) -> int:
        """Fewest bytes, where a value takes so many."""
        return min(map(size_of, self.operands)) + size_of(self.result) + self.others_nbytes


class Files:
    """What calculations on NetCDF files share: at a site they lie below ``/data/<site>``.

    Their own are ``files``, ``chunks`` and ``config``.
    """

    files: ClassVar[dict[str, str]]
    chunks: ClassVar[Any] = "auto"
    config: dict[str, Any]
    held_to = frozenset({"seconds", "bytes"})
    has_objects = False

    def open(self, site: str, top: str = "/data") -> xr.Dataset:
        """Open what a site has, where its files are seen below a folder."""
        with dask.config.set(self.config):
            return xr.open_dataset(f"{top}/{site}/{self.files[site]}").chunk(self.chunks)

    def open_remotely(self, site: str) -> xr.Dataset:
        """Open what a site has, which is seen only there."""
        from meshcompute import open_dataset

        with dask.config.set(self.config):
            return open_dataset(site, f"/data/{site}/{self.files[site]}", chunks=self.chunks)

    def copy(self, site: str, top: Path, copier: Sequence[str]) -> None:
        """Copy what a site has to ``top/<site>`` here."""
        target = top / site / self.files[site]
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([*copier, f"{site}:/data/{site}/{self.files[site]}", str(target)], check=True)


class Ensemble(Files):
    """The reference's calculation: an ensemble's mean at all heights, one height taken, minus observations.

    Parameters
    ----------
    scale
        Size of the horizontal grid; 1 is the reference's own, 18 x 33 x 960 x 1280.
    is_compressed
        Whether the predictions lie compressed (zlib) and in chunks, as in many archives, instead of contiguous.
    """

    files: ClassVar = {"ecmwf": "000490262cdd067721a34112963bcaa2b44860ab.nc", "eumetsat": "ad-hoc/observations.nc"}
    tolerance = 0.1  # Pa, of 1e5: what float32 loses in a mean of 18

    def __init__(self, scale: float, *, is_compressed: bool = False) -> None:
        self.scale = scale
        self.is_compressed = is_compressed
        self.name = "compressed" if is_compressed else "ensemble"
        # The reference's chunks at scale 1 (40 of them, of Dask's own 128 MiB at most), and as many at every scale.
        self.config = {"array.chunk-size": max(1, round(128 * 2**20 * scale**2))}

    @property
    def title(self) -> str:
        """One line for people."""
        from meshcompute.sampledata import reference_shape

        shape = " x ".join(map(str, reference_shape(self.scale)))
        stored = "zlib, chunked" if self.is_compressed else "contiguous"
        return f"mean of an ensemble ({shape} float32, {stored}) at one height, minus observations"

    def write(self, folder: Path, report: Callable[[int, int], Any]) -> None:
        """Write what each site has to ``folder/<site>``, unless it is there."""
        from meshcompute import sampledata

        predictions, observations = (folder / site / file for site, file in self.files.items())
        if not observations.exists():
            sampledata.write_predictions(str(predictions), self.scale, report, is_compressed=self.is_compressed)
            sampledata.write_observations(str(observations), self.scale)

    def define(self, first: xr.Dataset, second: xr.Dataset) -> xr.Dataset:
        """Define it as a scientist does, inefficient on purpose."""
        averages = self.average(first)
        difference: xr.Dataset = averages - second
        return difference

    def parts(self, first: xr.Dataset, second: xr.Dataset) -> tuple[Any, Any]:
        """What a user with a cluster at each site computes at each."""
        return self.average(first), second

    def combine(self, first: Any, second: Any) -> Any:
        """What that user makes of the parts."""
        return first - second

    def average(self, first: xr.Dataset) -> xr.Dataset:
        """The part that needs the first site's data alone."""
        level: xr.Dataset = first.mean("realization").isel(height=HEIGHT)
        return level

    def field(self, result: xr.Dataset) -> Any:
        """What is painted."""
        return result.to_array()[0, ..., 0]

    def expected(self, folder: Path) -> np.ndarray:
        """The field from plain numpy."""
        import netCDF4

        predictions, observations = (folder / site / file for site, file in self.files.items())
        with netCDF4.Dataset(predictions) as file:
            levels = np.asarray(file["air_pressure"][:, HEIGHT], "f8")
        with netCDF4.Dataset(observations) as file:
            result: np.ndarray = levels.mean(axis=0) - np.asarray(file["air_pressure"][:], "f8")
        return result

    def crossings(self, folder: Path) -> Crossings:
        """What any placement sends."""
        first, second = (xr.open_dataset(folder / site / file) for site, file in self.files.items())
        with first, second:
            level = first.air_pressure.isel(height=HEIGHT).mean("realization").values
            observed = second.air_pressure.values
            bounds = sum(second[name].nbytes for name in ("latitude_bnds", "longitude_bnds"))
        return Crossings(operands=(level, observed), result=level - observed, others_nbytes=2 * bounds)


class Scenarios(Files):
    """Real data: difference of two climate scenarios' means per decade (decade 24, latitude 37, longitude 49), in K."""

    name = "scenarios"
    title = "Met Office scenarios: A1B minus E1, means per decade of air temperature, 1860-2099"
    files: ClassVar = {"ecmwf": "A1B_north_america.nc", "eumetsat": "E1_north_america.nc"}
    chunks: ClassVar[Any] = {"time": 10}  # ten years, because the file begins with a decade
    config: ClassVar[dict[str, Any]] = {}
    tolerance = 1e-3  # K
    held_to = frozenset()

    def write(self, folder: Path, report: Callable[[int, int], Any]) -> None:
        """Copy what each site has to ``folder/<site>``."""
        from meshcompute.sampledata import scenario_file

        for (site, file), scenario in zip(self.files.items(), ("A1B", "E1"), strict=True):
            (folder / site).mkdir(parents=True, exist_ok=True)
            (folder / site / file).write_bytes(scenario_file(scenario).read_bytes())

    def define(self, first: xr.Dataset, second: xr.Dataset) -> xr.DataArray:
        """Define it as a scientist does."""
        difference: xr.DataArray = self.average(first) - self.average(second)
        return difference

    def parts(self, first: xr.Dataset, second: xr.Dataset) -> tuple[Any, Any]:
        """What a user with a cluster at each site computes at each."""
        return self.average(first), self.average(second)

    def combine(self, first: Any, second: Any) -> Any:
        """What that user makes of the parts."""
        return first - second

    def average(self, dataset: xr.Dataset) -> xr.DataArray:
        """The part that needs one site's data alone."""
        decade = (dataset.time.dt.year // 10 * 10).rename("decade")
        with xr.set_options(use_flox=False):  # the sites' workers may not have it
            mean: xr.DataArray = dataset.air_temperature.groupby(decade).mean()
        return mean

    def field(self, result: xr.DataArray) -> Any:
        """What is painted."""
        return result.isel(decade=-1)

    def expected(self, folder: Path) -> np.ndarray:
        """The field from plain numpy."""
        import netCDF4

        means = []
        for site, file in self.files.items():
            with netCDF4.Dataset(folder / site / file) as dataset:
                means.append(np.asarray(dataset["air_temperature"][-10:], "f8").mean(axis=0))  # 2090-2099
        result: np.ndarray = means[0] - means[1]
        return result

    def crossings(self, folder: Path) -> Crossings:
        """What any placement sends."""
        means = []
        for site, file in self.files.items():
            with xr.open_dataset(folder / site / file) as dataset:
                means.append(self.average(dataset).values)
        return Crossings(operands=tuple(means), result=means[0] - means[1], others_nbytes=0)


class Series:
    """A time series split between the sites, as Zarr in an object store at each, against its common climatology.

    Parameters
    ----------
    scale
        Size of the horizontal grid; 1 is the reference's, 960 x 1280, for 40 years of months.
    """

    name = "zarr"
    files: ClassVar = {"ecmwf": "series.zarr", "eumetsat": "series.zarr"}
    first_years: ClassVar = {"ecmwf": 1980, "eumetsat": 2000}
    years = 20  # at each site, one chunk for each of them
    last_months = 60
    tolerance = 1e-2  # K, of 280: what float32 loses in a mean of 480
    held_to = frozenset({"bytes"})
    has_objects = True

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.shape = max(2, round(960 * scale)), max(2, round(1280 * scale))

    @property
    def title(self) -> str:
        """One line for people."""
        months = 12 * self.years * len(SITES)
        shape = " x ".join(map(str, (months, *self.shape)))
        return f"last 5 years of a series ({shape} float32, Zarr in an object store per site) minus its mean"

    def write(self, folder: Path, report: Callable[[int, int], Any]) -> None:
        """Write what each site's store will have to ``folder/<site>``, unless it is there."""
        for site in SITES:
            path = folder / site / self.files[site]
            if not (path / "t" / f"{self.years - 1}.0.0").exists():  # what is written last
                self._write_site(path, self.first_years[site])

    def _write_site(self, path: Path, first_year: int) -> None:
        import dask.array as da
        import numcodecs
        import pandas as pd
        import zarr

        from meshcompute.sampledata import _smooth_field

        n, chunks = 12 * self.years, (12, *self.shape)
        lazy = da.zeros((n, *self.shape), chunks=chunks, dtype="f4")
        times = pd.date_range(f"{first_year}-01-01", periods=n, freq="MS")
        dataset = xr.Dataset({"t": (("time", "latitude", "longitude"), lazy)}, {"time": times})
        encoding = {
            "t": {"compressors": numcodecs.Blosc("zstd", shuffle=numcodecs.Blosc.SHUFFLE), "chunks": chunks},
            "time": {"units": "days since 1900-01-01", "dtype": "i4", "chunks": (n,)},
        }
        dataset.to_zarr(path, mode="w", zarr_format=2, encoding=encoding, consolidated=True, compute=False)
        stored = zarr.open_group(path)["t"]
        latitude = np.linspace(-1, 1, self.shape[0])[:, None]
        for year in range(self.years):
            random = np.random.default_rng([19, first_year, year])
            warming = 0.02 * (first_year - min(self.first_years.values()) + year)
            mean = 288 - 40 * latitude**2 + warming
            seasons = (20 * latitude * np.cos(month / 6 * np.pi) for month in range(12))
            fields = [mean + season + 3 * _smooth_field(random, *self.shape) for season in seasons]
            stored[12 * year : 12 * (year + 1)] = np.round(fields, 1).astype("f4")

    def open(self, site: str, top: str = "") -> xr.Dataset:
        """Open what a site's store has, or a copy of it below a folder."""
        if top:
            return xr.open_zarr(f"{top}/{site}/{self.files[site]}")
        return xr.open_zarr(f"s3://{site}/{self.files[site]}", storage_options=store_options(store_name(site)))

    def open_remotely(self, site: str) -> xr.Dataset:
        """Open what a site's store has, which is reached only there."""
        from meshcompute import open_zarr

        options = store_options(store_name(site))
        return open_zarr(site, f"s3://{site}/{self.files[site]}", storage_options=options, chunks={})

    def copy(self, site: str, top: Path, copier: Sequence[str]) -> None:
        """Copy what a site's store has to ``top/<site>`` here."""
        import s3fs

        store = s3fs.S3FileSystem(**store_options(store_name(site)))
        store.get(f"{site}/{self.files[site]}", str(top / site / self.files[site]), recursive=True)

    def define(self, first: xr.Dataset, second: xr.Dataset) -> xr.DataArray:
        """Define it as a scientist does."""
        series = xr.concat([first.t, second.t], "time")
        anomaly = series - series.mean("time")
        last: xr.DataArray = anomaly.isel(time=slice(-self.last_months, None)).mean("time")
        return last

    def average(self, dataset: xr.Dataset) -> xr.DataArray:
        """The part that needs one site's data alone."""
        mean: xr.DataArray = dataset.t.mean("time")
        return mean

    def parts(self, first: xr.Dataset, second: xr.Dataset) -> tuple[Any, Any]:
        """What a user with a cluster at each site computes at each."""
        last = second.t.isel(time=slice(-self.last_months, None)).mean("time")
        return self.average(first), xr.Dataset({"mean": self.average(second), "last": last})

    def combine(self, first: Any, second: Any) -> Any:
        """What that user makes of the parts, which are of the same length."""
        return second["last"] - (first + second["mean"]) / 2

    def field(self, result: xr.DataArray) -> Any:
        """What is painted."""
        return result

    def expected(self, folder: Path) -> np.ndarray:
        """The field from plain numpy."""
        total, last = np.zeros(self.shape), np.zeros(self.shape)
        for site in SITES:
            values = xr.open_zarr(folder / site / self.files[site], chunks=None).t
            for year in range(self.years):
                total += values[12 * year : 12 * (year + 1)].values.astype("f8").sum(axis=0)
            if site == SITES[-1]:
                last += values[-self.last_months :].values.astype("f8").mean(axis=0)
        return last - total / (12 * self.years * len(SITES))

    def crossings(self, folder: Path) -> Crossings:
        """What any placement of this graph sends: two partial sums, with their counts, of one site to the other.

        Dask adds up chunks in groups of four: of 20 there are five sums, of which four become one before any of the
        other site's comes in.
        """
        values = xr.open_zarr(folder / SITES[0] / self.files[SITES[0]], chunks=None).t
        months = 12 * 16
        sums = [part.sum("time").values for part in (values[:months], values[months:])]
        counts = [np.full_like(sums[0], n) for n in (months, len(values) - months)]
        result = self.expected(folder).astype("f4")
        return Crossings(operands=(np.stack([*sums, *counts]),), result=result, others_nbytes=0)


def store_name(site: str) -> str:
    """Give the name of a site's object store, as users write it."""
    return f"objects.{site}.example"


def store_options(host: str) -> dict[str, Any]:
    """Give the options with which s3fs reaches a store."""
    return {
        "key": STORE_KEY,
        "secret": STORE_SECRET,
        "client_kwargs": {"endpoint_url": f"http://{host}:{STORE_PORT}"},
    }


def calculation(name: str, scale: float) -> Any:
    """Give a calculation by its name."""
    if name == "scenarios":
        return Scenarios()
    return Series(scale) if name == "zarr" else Ensemble(scale, is_compressed=name == "compressed")
