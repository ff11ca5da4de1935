"""The calculations of ``reference.py``: their data, what a scientist writes, and what must come out.

Covers writing the files of each site, the calculation on two opened datasets, the field that is painted, and the same
result from plain numpy. Does not cover where anything runs. Importing it imports nothing of meshcompute: clients
without meshcompute compute the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import xarray as xr

SITES = ("ecmwf", "eumetsat")
HEIGHT = 10


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


class Ensemble:
    """The reference's calculation: an ensemble's mean at all heights, one height taken, minus observations.

    Parameters
    ----------
    scale
        Size of the horizontal grid; 1 is the reference's own, 18 x 33 x 960 x 1280.
    is_compressed
        Whether the predictions lie compressed (zlib) and in chunks, as in many archives, instead of contiguous.
    """

    files: ClassVar = {"ecmwf": "000490262cdd067721a34112963bcaa2b44860ab.nc", "eumetsat": "ad-hoc/observations.nc"}
    chunks: ClassVar[Any] = "auto"
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


class Scenarios:
    """Real data: difference of two climate scenarios' means per decade (decade 24, latitude 37, longitude 49), in K."""

    name = "scenarios"
    title = "Met Office scenarios: A1B minus E1, means per decade of air temperature, 1860-2099"
    files: ClassVar = {"ecmwf": "A1B_north_america.nc", "eumetsat": "E1_north_america.nc"}
    chunks: ClassVar[Any] = {"time": 10}  # ten years, because the file begins with a decade
    config: ClassVar[dict[str, Any]] = {}
    tolerance = 1e-3  # K

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

    def average(self, dataset: xr.Dataset) -> xr.DataArray:
        """The part that needs one site's data alone."""
        decade = (dataset.time.dt.year // 10 * 10).rename("decade")
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


def calculation(name: str, scale: float) -> Any:
    """Give a calculation by its name."""
    return Scenarios() if name == "scenarios" else Ensemble(scale, is_compressed=name == "compressed")
