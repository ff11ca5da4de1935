"""Fields to show and measure with: real climate scenarios, and synthetic ones in the shape of the reference.

Covers finding the Met Office's files and writing synthetic NetCDF files in bounded memory. Does not cover where the
files lie: a function that writes runs where its file belongs, at a site's worker, and imports the standard library,
numpy and netCDF4 only, all of them inside.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from meshcompute.errors import MissingDependencyError

__all__ = [
    "REFERENCE_SHAPE",
    "SCENARIOS",
    "reference_shape",
    "scenario_file",
    "write_observations",
    "write_predictions",
]

# Two runs of one model from 1860 to 2099, a field of air temperature each year. Up to 1999 they are the same run; then
# A1B lets emissions grow, and E1 is an aggressive mitigation scenario.
SCENARIOS = {"A1B": "A1B_north_america.nc", "E1": "E1_north_america.nc"}

# MOGREPS-G, the Met Office's global ensemble on 20 km: realization, height, latitude, longitude.
REFERENCE_SHAPE = (18, 33, 960, 1280)
SEA_LEVEL_PRESSURE_PA = 101325.0  # the standard atmosphere's, ISO 2533
SCALE_HEIGHT_M = 8434.0  # of the same atmosphere: pressure falls by a factor of e


def scenario_file(scenario: str) -> Path:
    """Find the file of a climate scenario, as installed with the package ``iris-sample-data``.

    Parameters
    ----------
    scenario
        One of :data:`SCENARIOS`.

    Returns
    -------
    pathlib.Path
        A NetCDF file with ``air_temperature`` (time 240, latitude 37, longitude 49) in kelvin.

    Raises
    ------
    MissingDependencyError
        The package is not installed.
    """
    spec = importlib.util.find_spec("iris_sample_data")
    if spec is None or spec.origin is None:
        raise MissingDependencyError("scenario_file", "the package iris-sample-data", "pip install iris-sample-data")
    return Path(spec.origin).parent / "sample_data" / SCENARIOS[scenario]


def reference_shape(scale: float) -> tuple[int, int, int, int]:
    """Scale the reference's grid.

    Parameters
    ----------
    scale
        1 is the reference's own grid; latitude and longitude are multiplied by it.

    Returns
    -------
    tuple of int
        Sizes of realization, height, latitude and longitude.

    Raises
    ------
    ValueError
        Fewer than two points would be left along an axis, or the scale is beyond 4.
    """
    realization, height, latitude, longitude = REFERENCE_SHAPE
    if not 2 / latitude <= scale <= 4:
        raise ValueError(f"scale must lie between {2 / latitude:.4f} and 4, where 1 is {REFERENCE_SHAPE}; got {scale}")
    return realization, height, max(2, round(latitude * scale)), max(2, round(longitude * scale))


def write_predictions(
    path: str, scale: float, report: Callable[[int, int], Any] | None = None, *, is_compressed: bool = False
) -> int:
    """Write an ensemble of pressure fields like the reference's predictions: one variable of float32.

    Parameters
    ----------
    path
        File to write; its folder is made.
    scale
        See :func:`reference_shape`.
    report
        Called with (levels written, levels in all) after each realization.
    is_compressed
        Whether it lies in compressed chunks, as in many archives, and not contiguous, as the reference's.

    Returns
    -------
    int
        Size of the file in bytes.

    Notes
    -----
    Holds a few horizontal fields at a time, whatever the number of realizations and heights. The fields are smooth on
    all scales (a power law, as weather is) and rounded to one decimal, as such files are: noise would make transfers
    look worse than they are, constants better.
    """
    import numpy as np

    n_realization, n_height, n_latitude, n_longitude = reference_shape(scale)
    # Levels of the reference run from 5 m to 6 km, close together near the ground.
    heights = np.round(np.geomspace(5, 6000, n_height)).astype("f4")
    members = np.array([0, *range(36 - n_realization, 35)][:n_realization], "i4")
    sizes = {"realization": n_realization, "height": n_height, "latitude": n_latitude, "longitude": n_longitude}
    with _create(path, sizes, is_compressed=is_compressed) as file:
        file.createVariable("realization", "i4", ("realization",))[:] = members
        height = file.createVariable("height", "f4", ("height",))
        height[:] = heights
        height.setncatts({"units": "m", "positive": "up", "standard_name": "height"})
        pressure = file["air_pressure"]
        for member in range(n_realization):
            random = np.random.default_rng([18, member])
            ground, aloft = (_smooth_field(random, n_latitude, n_longitude) for _ in range(2))
            for level, metres in enumerate(heights):
                mix = metres / heights[-1]
                pressure[member, level] = _pressure(metres, (1 - mix) * ground + mix * aloft)
            if report is not None:
                report((member + 1) * n_height, n_realization * n_height)
    return os.path.getsize(path)  # noqa: PTH202 - runs where only numpy and netCDF4 are sure to be


def write_observations(path: str, scale: float) -> int:
    """Write one pressure field like the reference's observations, on the same grid as the predictions.

    Parameters
    ----------
    path
        File to write; its folder is made.
    scale
        See :func:`reference_shape`.

    Returns
    -------
    int
        Size of the file in bytes.
    """
    import numpy as np

    _, _, n_latitude, n_longitude = reference_shape(scale)
    with _create(path, {"latitude": n_latitude, "longitude": n_longitude}) as file:
        field = _smooth_field(np.random.default_rng(7), n_latitude, n_longitude)
        file["air_pressure"][:] = _pressure(np.float32(47), field)
    return os.path.getsize(path)  # noqa: PTH202 - as above


def _create(path: str, sizes: dict[str, int], *, is_compressed: bool = False) -> Any:
    """Create a file with what both kinds share, its variables in the reference's order: the pressure first."""
    import netCDF4
    import numpy as np

    os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120 - as above
    file = netCDF4.Dataset(path, "w")
    file.setncatts(
        {
            "Conventions": "CF-1.7",
            "source": "synthetic, in the shape of MOGREPS-G on a global 20 km grid",
            "least_significant_digit": np.int32(1),
        }
    )
    for name, size in {**sizes, "bnds": 2}.items():
        file.createDimension(name, size)
    # Contiguous is how the reference's file lies on the disk; without a fill value nothing is written twice.
    layout: dict[str, Any] = {"contiguous": True}
    if is_compressed:  # a level in 5 x 8 parts: those of the reference's chunks (192 x 160 at its own scale)
        parts = (1, 1, -(-sizes["latitude"] // 5), -(-sizes["longitude"] // 8))
        layout = {"compression": "zlib", "complevel": 4, "shuffle": True, "chunksizes": parts}
    pressure = file.createVariable("air_pressure", "f4", tuple(sizes), fill_value=False, **layout)
    pressure.setncatts({"units": "Pa", "standard_name": "air_pressure", "grid_mapping": "latitude_longitude"})
    mapping = file.createVariable("latitude_longitude", "i4", ())
    mapping[...] = -2147483647  # as in the reference's file: only the attributes of such a variable count
    mapping.grid_mapping_name = "latitude_longitude"
    for name, width, units in (("latitude", 180.0, "degrees_north"), ("longitude", 360.0, "degrees_east")):
        edges = np.linspace(-width / 2, width / 2, sizes[name] + 1)
        axis = file.createVariable(name, "f4", (name,))
        axis[:] = (edges[:-1] + edges[1:]) / 2
        axis.setncatts({"units": units, "standard_name": name, "bounds": f"{name}_bnds"})
        file.createVariable(f"{name}_bnds", "f4", (name, "bnds"))[:] = np.stack([edges[:-1], edges[1:]], axis=1)
    return file


def _pressure(metres: Any, anomaly: Any) -> Any:
    """Pressure in pascal with one decimal at a height, given the weather in units of its standard deviation."""
    import numpy as np

    mean = SEA_LEVEL_PRESSURE_PA * np.exp(-metres / SCALE_HEIGHT_M)
    # About 10 hPa of weather near the ground, less higher up.
    return np.round(mean * (1 + 0.01 * anomaly), 1).astype("f4")


def _smooth_field(random: Any, n_latitude: int, n_longitude: int) -> Any:
    """Draw a field of mean 0 and deviation 1 that is smooth on all scales: amplitude falls with wavenumber squared."""
    import numpy as np

    rows = np.fft.fftfreq(n_latitude, 1 / n_latitude)[:, None]
    columns = np.fft.rfftfreq(n_longitude, 1 / n_longitude)[None, :]
    # The energy of the atmosphere's large scales falls with the cube of the wavenumber (here: beyond 3). A ring of the
    # plane has as many modes as its wavenumber, so a mode's energy falls with the fourth power, its amplitude with
    # the second.
    amplitude = 1 / (9 + rows**2 + columns**2)
    noise = random.standard_normal(amplitude.shape) + 1j * random.standard_normal(amplitude.shape)
    noise[0, 0] = 0
    field = np.fft.irfft2(noise * amplitude, s=(n_latitude, n_longitude))
    return (field / field.std()).astype("f4")
