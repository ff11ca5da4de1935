"""Writing Zarr stores at sites whose folders neither the client nor the scheduler sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import meshcompute as mc
from meshcompute.data import sitecalls
from meshcompute.data.writing import to_zarr


@pytest.fixture(scope="module")
def stored() -> xr.Dataset:
    rng = np.random.default_rng(1)
    return xr.Dataset(
        {"t": (("time", "y", "x"), rng.normal(280, 10, (12, 20, 30)), {"units": "K"}), "height": ((), 2.0)},
        {
            "time": xr.date_range("2000-01-01", periods=12, freq="D", unit="s"),
            "y": np.arange(20.0),
            "lat": (("y", "x"), rng.random((20, 30))),
        },
        {"title": "a test"},
    )


@pytest.fixture(scope="module", autouse=True)
def files(sites: Any, stored: xr.Dataset) -> None:
    stored.to_netcdf(sites.store("a", "source.nc"), encoding={"t": {"chunksizes": (3, 20, 30)}})


@pytest.fixture
def opened(sites: Any) -> xr.Dataset:
    return mc.open_dataset("a", sites.path("a", "source.nc"))


def read_back(sites: Any, site: str, name: str) -> xr.Dataset:
    """Read what was written, in this process and past the cluster."""
    return xr.open_dataset(sites.store(site, name), engine="zarr").load()


def test_to_zarr_in_a_block_writes_at_that_site(sites: Any, stored: xr.Dataset, opened: xr.Dataset) -> None:
    with mc.pool("a"):
        written = (opened[["t"]] + 1).to_zarr(sites.path("a", "out.zarr"), zarr_format=2)
    assert isinstance(written, xr.backends.ZarrStore)
    assert list(Path(sites.path("a")).iterdir()) == []
    np.testing.assert_allclose(read_back(sites, "a", "out.zarr").t, stored.t + 1, rtol=1e-6)
    again = mc.open_zarr("a", sites.path("a", "out.zarr"))
    assert again.t.chunks == opened.t.chunks


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.filterwarnings("ignore:Consolidated metadata")
def test_a_store_is_made_in_three_calls_whatever_it_holds(
    sites: Any, stored: xr.Dataset, opened: xr.Dataset, zarr_format: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = sitecalls.submit_at
    monkeypatch.setattr(sitecalls, "submit_at", lambda *args: (calls.append(args), original(*args))[1])
    to_zarr("a", opened, sites.path("a", f"calls-{zarr_format}.zarr"), zarr_format=zarr_format)
    assert len(calls) <= 3
    xr.testing.assert_allclose(read_back(sites, "a", f"calls-{zarr_format}.zarr"), stored, rtol=1e-6)


def test_data_of_one_site_is_written_at_another(sites: Any, stored: xr.Dataset, opened: xr.Dataset) -> None:
    with mc.pool("b"):
        opened[["t"]].to_zarr(sites.path("b", "from-a.zarr"), zarr_format=2)
    np.testing.assert_allclose(read_back(sites, "b", "from-a.zarr").t, stored.t, rtol=1e-6)


def test_writing_later_is_a_pinned_delayed(sites: Any, stored: xr.Dataset, opened: xr.Dataset) -> None:
    with mc.pool("a"):
        writes = opened[["t"]].to_zarr(sites.path("a", "later.zarr"), compute=False, zarr_format=2)
    assert np.isnan(read_back(sites, "a", "later.zarr").t).all()
    writes.compute()
    np.testing.assert_allclose(read_back(sites, "a", "later.zarr").t, stored.t, rtol=1e-6)


def test_a_store_is_appended_to_and_overwritten(sites: Any, stored: xr.Dataset, opened: xr.Dataset) -> None:
    path = sites.path("a", "grows.zarr")
    parts = [opened[["t"]].isel(time=slice(3 * i, 3 * i + 3)) for i in range(3)]
    with mc.pool("a"):
        parts[0].to_zarr(path, zarr_format=2)
        parts[1].to_zarr(path, append_dim="time", zarr_format=2)
        np.testing.assert_allclose(read_back(sites, "a", "grows.zarr").t, stored.t[:6], rtol=1e-6)
        assert (read_back(sites, "a", "grows.zarr").time == stored.time[:6]).all()
        with pytest.raises(FileExistsError) as caught:
            parts[2].to_zarr(path, zarr_format=2)
        assert "at a" in caught.value.__notes__[-1]
        parts[2].to_zarr(path, mode="w", zarr_format=2)
    np.testing.assert_allclose(read_back(sites, "a", "grows.zarr").t, stored.t[6:9], rtol=1e-6)


def test_a_region_of_a_store_is_written(sites: Any, stored: xr.Dataset, opened: xr.Dataset) -> None:
    path = sites.path("a", "region.zarr")
    opened = opened[["t"]]
    to_zarr("a", opened, path, compute=False, zarr_format=2)
    part = opened.isel(time=slice(3, 6)).drop_vars(["time", "y", "lat"])
    to_zarr("a", part, path, region={"time": slice(3, 6)}, zarr_format=2)
    written = read_back(sites, "a", "region.zarr").t
    np.testing.assert_allclose(written[3:6], stored.t[3:6], rtol=1e-6)
    assert np.isnan(written[6:]).all()


def test_arrays_trees_and_data_in_memory_are_written_too(sites: Any, stored: xr.Dataset, opened: xr.Dataset) -> None:
    opened = opened[["t"]]
    to_zarr("a", opened.t, sites.path("a", "array.zarr"), zarr_format=2)
    to_zarr("a", stored, sites.path("a", "memory.zarr"), zarr_format=2)
    to_zarr("a", xr.DataTree.from_dict({"/inner": opened}), sites.path("a", "tree.zarr"), zarr_format=2)
    np.testing.assert_allclose(read_back(sites, "a", "array.zarr").t, stored.t, rtol=1e-6)
    xr.testing.assert_allclose(read_back(sites, "a", "memory.zarr"), stored)
    inner = xr.open_dataset(sites.store("a", "tree.zarr"), engine="zarr", group="inner").load()
    np.testing.assert_allclose(inner.t, stored.t, rtol=1e-6)


def test_a_place_that_cannot_be_written_is_an_error_with_the_site(sites: Any, opened: xr.Dataset) -> None:
    opened = opened[["t"]]
    with mc.pool("a"), pytest.raises(OSError) as caught:  # which one depends on the kernel
        opened.to_zarr("/proc/nobody/out.zarr", zarr_format=2)
    assert any("'a'" in note for note in caught.value.__notes__)
