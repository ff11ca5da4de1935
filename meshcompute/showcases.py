"""The two calculations that the demo shows: real climate scenarios, and the reference's ensemble.

Covers, for each, which file lies at which of two sites, the calculation as a scientist writes it, the same in plain
xarray on plain files, and the picture. Does not cover clusters, pools or printing: neither the calculation nor the
picture knows where its data is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from meshcompute import sampledata

__all__ = ["Ensemble", "Scenarios", "Showcase"]


class Showcase(Protocol):
    """A calculation on the files of two sites."""

    #: One line that says what is computed.
    title: str
    #: Names of the files at the first and at the second site.
    files: tuple[str, str]
    #: How to chunk them when they are opened.
    chunks: Any
    #: Dask's configuration while they are chunked.
    config: Mapping[str, Any]

    def define(self, first: xr.Dataset, second: xr.Dataset) -> Any:
        """Define the calculation on two datasets, lazy or not."""

    def paint(self, result: Any, path: Path) -> None:
        """Save a picture of the result."""


class Scenarios:
    """Difference of two climate scenarios' means per decade: (decade 24, latitude 37, longitude 49), in kelvin."""

    title = "A1B minus E1: difference of the means per decade of air temperature, 1860-2099"
    files = (sampledata.SCENARIOS["A1B"], sampledata.SCENARIOS["E1"])
    chunks: Any = {"time": 10}  # noqa: RUF012 - a constant; ten years, because the file begins with a decade
    config: Mapping[str, Any] = {}

    def define(self, first: xr.Dataset, second: xr.Dataset) -> xr.DataArray:
        """Define the calculation.

        Parameters
        ----------
        first, second
            Datasets with ``air_temperature`` (time 240, latitude 37, longitude 49) in kelvin.

        Returns
        -------
        xarray.DataArray
            The difference (decade 24, latitude 37, longitude 49).
        """
        # The sites' workers may not have flox.
        with xr.set_options(use_flox=False):  # type: ignore[no-untyped-call]
            means = [
                dataset.air_temperature.groupby((dataset.time.dt.year // 10 * 10).rename("decade")).mean()
                for dataset in (first, second)
            ]
        difference: xr.DataArray = means[0] - means[1]
        return difference

    def paint(self, result: xr.DataArray, path: Path) -> None:
        """Save a map of the last decade, and the mean over the map through all decades.

        Parameters
        ----------
        result
            What :meth:`define` gave, computed.
        path
            File to save to; its ending chooses the format.
        """
        last = result.isel(decade=-1)
        decade = int(last.decade)
        figure = Figure(figsize=(8, 7.5), layout="constrained")
        upper, lower = figure.subplots(2, 1, height_ratios=[3, 1])
        mesh = upper.pcolormesh(
            last.longitude - 360, last.latitude, last, cmap="YlOrRd", vmin=0, vmax=float(np.ceil(last.max()))
        )
        _label_map(upper, aspect=1.3)  # a degree of longitude is that much shorter in the middle of the map
        upper.set_title(
            f"North America in the {decade}s: scenario A1B warmer than E1\ndifference of the decades' means"
        )
        figure.colorbar(mesh, ax=upper, label="air temperature at 1.5 m, A1B − E1 [K]")
        # A degree of latitude is worth its cosine of area.
        weighted = result.weighted(np.cos(np.deg2rad(result.latitude))).mean(("latitude", "longitude"))
        lower.plot(result.decade, weighted, marker="o", color="firebrick")
        lower.axhline(0, color="grey", linewidth=0.8)
        lower.set(xlabel="decade", ylabel="A1B − E1 [K]", title="mean over the map")
        lower.grid(alpha=0.3)
        figure.savefig(path, dpi=120)


class Ensemble:
    """The reference's calculation: an ensemble's mean at one height minus observations.

    Parameters
    ----------
    scale
        Size of the horizontal grid; 1 is the reference's own.
    """

    files = ("predictions.nc", "ad-hoc/observations.nc")
    chunks: Any = "auto"

    def __init__(self, scale: float) -> None:
        self.scale = scale
        shape = " x ".join(map(str, sampledata.reference_shape(scale)))
        self.title = f"mean of an ensemble ({shape}, float32) at height 10, minus observations"
        # The reference's chunks at scale 1 (40 of them, Dask's own 128 MiB), and as many at every other scale.
        self.config: Mapping[str, Any] = {"array.chunk-size": max(1, round(128 * 2**20 * scale**2))}

    def define(self, first: xr.Dataset, second: xr.Dataset) -> xr.Dataset:
        """Define the calculation, inefficient on purpose: it averages all heights and keeps one.

        Parameters
        ----------
        first
            Predictions: ``air_pressure`` (realization, height, latitude, longitude).
        second
            Observations: ``air_pressure`` (latitude, longitude).

        Returns
        -------
        xarray.Dataset
            The difference of all variables that both have.
        """
        averages = first.mean("realization")
        difference: xr.Dataset = averages.isel(height=10) - second
        return difference

    def paint(self, result: xr.Dataset, path: Path) -> None:
        """Save a map of the difference of pressures.

        Parameters
        ----------
        result
            What :meth:`define` gave, computed.
        path
            File to save to; its ending chooses the format.
        """
        field = result.to_array()[0, ..., 0] / 100
        limit = float(np.abs(field).max())
        figure = Figure(figsize=(9, 4.8), layout="constrained")
        axes = figure.subplots()
        mesh = axes.pcolormesh(field.longitude, field.latitude, field, cmap="RdBu_r", vmin=-limit, vmax=limit)
        _label_map(axes)
        axes.set_title(f"Ensemble mean minus observations at {float(result.height):g} m (synthetic fields)")
        figure.colorbar(mesh, ax=axes, label="air pressure, difference [hPa]")
        figure.savefig(path, dpi=120)


def _label_map(axes: Any, *, aspect: float = 1.0) -> None:
    """Give a map of longitude and latitude the axes that it deserves."""
    axes.set_aspect(aspect)
    axes.set(xlabel="longitude", ylabel="latitude")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda degrees, _: _compass(degrees, "W", "E")))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda degrees, _: _compass(degrees, "S", "N")))


def _compass(degrees: float, negative: str, positive: str) -> str:
    return f"{abs(degrees):g}°" + (negative if degrees < 0 else positive if degrees > 0 else "")
