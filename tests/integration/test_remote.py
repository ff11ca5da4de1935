"""Opening datasets at sites whose folders neither the client nor the scheduler sees."""

from __future__ import annotations

import pickle
import sys
import time
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from distributed import Client, LocalCluster, wait

import meshcompute as mc
from meshcompute.data.sitearrays import Reader, describe_dataset
from meshcompute.data.siteside import SiteCall
from meshcompute.errors import PoolsMissingError, UnknownPoolError

cloudpickle.register_pickle_by_value(sys.modules[__name__])

# Chunks that are smaller than the file's: xarray warns of them, here as elsewhere.
pytestmark = pytest.mark.filterwarnings("ignore:The specified chunks separate:UserWarning")

N_TIMES, N_Y, N_X = 12, 20, 30

#: xarray announces new defaults for what is not said.
COMBINE = {"data_vars": "minimal", "coords": "minimal", "compat": "override", "join": "outer"}


@pytest.fixture(scope="module")
def stored() -> xr.Dataset:
    """Model output: a packed variable, dates that numpy cannot hold, a scalar, a two-dimensional coordinate."""
    rng = np.random.default_rng(1)
    dates = xr.date_range("2000-01-01", periods=N_TIMES, freq="D", unit="s")
    return xr.Dataset(
        {
            "t": (("time", "y", "x"), np.round(rng.normal(280, 10, (N_TIMES, N_Y, N_X)), 1), {"units": "K"}),
            "bounds": (
                ("time", "side"),
                xr.date_range("2000-01-01", periods=2 * N_TIMES, calendar="360_day", use_cftime=True).values.reshape(
                    -1, 2
                ),
            ),
            "height": ((), 2.0),
        },
        {"time": dates, "y": np.arange(N_Y, dtype=float), "lat": (("y", "x"), rng.random((N_Y, N_X)))},
        {"title": "a test"},
    )


@pytest.fixture(scope="module", autouse=True)
def files(sites: Any, stored: xr.Dataset) -> None:
    packed = {
        "t": {
            "dtype": "int16",
            "scale_factor": 0.1,
            "add_offset": 280.0,
            "_FillValue": -9999,
            "chunksizes": (3, N_Y, N_X),
        }
    }
    for site in ("a", "b"):
        stored.to_netcdf(sites.store(site, "model.nc"), encoding=packed)
    stored.to_netcdf(sites.store("a", "grouped.nc"), group="forecast/first", encoding=packed)
    stored.to_zarr(sites.store("a", "model.zarr"), zarr_format=2, encoding={"t": {"chunks": (3, N_Y, N_X)}})
    for i in range(4):
        stored.isel(time=slice(3 * i, 3 * i + 3)).to_netcdf(sites.store("a", f"part-{i}.nc"))
    sites.store("a", "not-a-dataset.nc").write_text("hello")
    sites.store("a", "folder").mkdir()


def workers_of(sites: Any, site: str) -> set[str]:
    return set(sites.workers(site).values())


def ran_at(sites: Any, collection: Any) -> set[str]:
    """Compute and return the addresses of the workers that hold the result."""
    persisted = collection.persist()
    wait(persisted)
    found = {address for addresses in sites.client.who_has(persisted).values() for address in addresses}
    assert found
    return found


def assert_nothing_is_here(sites: Any, site: str) -> None:
    assert list(Path(sites.path(site)).iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------
# Datasets


@pytest.mark.parametrize("name", ["model.nc", "model.zarr"])
def test_a_dataset_at_a_site_is_what_xarray_reads_there(sites: Any, stored: xr.Dataset, name: str) -> None:
    assert_nothing_is_here(sites, "a")
    with pytest.raises((OSError, ValueError)):
        xr.open_dataset(sites.path("a", name))
    opened = (mc.open_zarr if name.endswith("zarr") else mc.open_dataset)("a", sites.path("a", name))
    assert {v for v in opened.variables if opened[v].chunks is None} == {"time", "y", "height"}
    there = xr.open_dataset(sites.store("a", name), chunks={})
    assert {v: opened[v].chunks for v in opened.data_vars} == {v: there[v].chunks for v in there.data_vars}
    assert {v: opened[v].encoding.get("preferred_chunks") for v in opened} == {
        v: there[v].encoding.get("preferred_chunks") for v in there
    }
    xr.testing.assert_allclose(opened.compute(), stored, rtol=1e-6)
    xr.testing.assert_identical(opened.compute(), xr.open_dataset(sites.store("a", name)).load())


@pytest.mark.parametrize("chunks", [None, {}, "auto", -1, {"time": 2}, {"time": 5, "x": 7}])
def test_chunks_mean_what_they_mean_in_xarray(sites: Any, chunks: Any) -> None:
    opened = mc.open_dataset("a", sites.path("a", "model.nc"), chunks=chunks)
    expected = xr.open_dataset(sites.store("a", "model.nc"), chunks={} if chunks is None else chunks)
    assert opened.t.chunks == expected.t.chunks is not None
    assert opened.bounds.chunks == expected.bounds.chunks


def test_every_chunk_is_read_at_its_site(sites: Any) -> None:
    for site in ("a", "b"):
        opened = mc.open_dataset(site, sites.path(site, "model.nc"), chunks={"time": 1})
        assert ran_at(sites, opened.t.data) <= workers_of(sites, site)


def test_opening_ships_metadata_and_no_values(sites: Any) -> None:
    path = sites.path("a", "large.nc")
    shape = (50, 200, 200)
    xr.Dataset({f"v{i}": (("time", "y", "x"), np.zeros(shape, "f4")) for i in range(5)}).to_netcdf(
        sites.store("a", "large.nc")
    )
    with mc.measure_traffic() as traffic:
        opened = mc.open_dataset("a", path, chunks=None)
    assert opened.nbytes == 5 * 50 * 200 * 200 * 4
    assert 0 < sum(traffic.bytes_between_pools.values()) < 20_000
    assert len(pickle.dumps(opened)) < 40_000


@pytest.mark.parametrize(
    "options",
    [
        {"mask_and_scale": False},
        {"decode_times": False},
        {"drop_variables": ["lat", "bounds"]},
        {"engine": "netcdf4", "decode_cf": False},
        {"engine": "h5netcdf"},
        {"create_default_indexes": False},
        {"inline_array": True},
        {"backend_kwargs": {"group": "/"}},
    ],
    ids=str,
)
def test_options_of_xarray_pass_through(sites: Any, options: dict[str, Any]) -> None:
    opened = mc.open_dataset("a", sites.path("a", "model.nc"), **options)
    expected = xr.open_dataset(sites.store("a", "model.nc"), chunks={}, **options)
    assert opened.t.dtype == expected.t.dtype
    assert set(opened.xindexes) == set(expected.xindexes)
    with dask.config.set(scheduler="synchronous"):  # in this process, not at the cluster
        expected = expected.compute()
    xr.testing.assert_identical(opened.compute(), expected)


def test_a_group_of_a_file_is_opened(sites: Any, stored: xr.Dataset) -> None:
    opened = mc.open_dataset("a", sites.path("a", "grouped.nc"), group="forecast/first")
    xr.testing.assert_allclose(opened.compute(), stored, rtol=1e-6)


def test_a_file_that_was_replaced_is_another_dataset(sites: Any) -> None:
    path = sites.path("a", "replaced.nc")
    values = []
    for value in (1.0, 2.0):
        xr.Dataset({"v": ("x", np.full(3, value))}).to_netcdf(sites.store("a", "new.nc"))
        sites.store("a", "new.nc").rename(sites.store("a", "replaced.nc"))
        values.append(mc.open_dataset("a", path).v.persist())
        wait(values[-1])
    assert values[0].data.name != values[1].data.name
    assert [float(v.sum()) for v in values] == [3.0, 6.0]


def test_two_sites_are_combined(sites: Any, stored: xr.Dataset) -> None:
    with mc.propagate_pools():
        a, b = (mc.open_dataset(site, sites.path(site, "model.nc"), chunks={"time": 3}) for site in ("a", "b"))
        assert float(abs(a.t.mean("time") - b.t.mean("time")).max()) == 0
        np.testing.assert_allclose((a.t + b.t).mean(), 2 * stored.t.mean(), rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------
# Many files


def test_files_that_match_a_pattern_are_one_dataset(sites: Any, stored: xr.Dataset) -> None:
    opened = mc.open_mfdataset("a", sites.path("a", "part-*.nc"), chunks={"time": 1}, **COMBINE)
    assert opened.t.chunks[0] == (1,) * N_TIMES
    assert ran_at(sites, opened.t.data) <= workers_of(sites, "a")
    xr.testing.assert_allclose(opened.compute(), stored, rtol=1e-6)


def test_folders_match_a_pattern_too(sites: Any, stored: xr.Dataset) -> None:
    opened = mc.open_mfdataset("a", sites.path("a", "mode?.zarr"), engine="zarr", **COMBINE)
    xr.testing.assert_allclose(opened.compute(), stored, rtol=1e-6)


def test_a_list_of_files_is_preprocessed_and_combined_in_its_order(sites: Any, stored: xr.Dataset) -> None:
    paths = [sites.path("a", f"part-{i}.nc") for i in (2, 0)]
    opened = mc.open_mfdataset(
        "a",
        paths,
        preprocess=lambda ds: ds[["t"]].isel(x=0),
        combine="nested",
        concat_dim="time",
        attrs_file=paths[1],
        **COMBINE,
    )
    assert opened.attrs == stored.attrs
    np.testing.assert_allclose(opened.t, np.concatenate([stored.t[6:9, :, 0], stored.t[:3, :, 0]]), rtol=1e-6)


def test_files_that_cannot_be_opened_are_left_out_on_demand(sites: Any) -> None:
    paths = [sites.path("a", "part-0.nc"), sites.path("a", "nothing.nc"), sites.path("a", "part-1.nc")]
    with pytest.raises(FileNotFoundError, match="nothing"):
        mc.open_mfdataset("a", paths, **COMBINE)
    opened = mc.open_mfdataset("a", paths, errors="ignore", **COMBINE)
    assert opened.sizes["time"] == 6


def test_a_pattern_that_nothing_matches_is_an_error_with_the_site(sites: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"none-\*") as caught:
        mc.open_mfdataset("a", sites.path("a", "none-*.nc"))
    assert "'a'" in caught.value.__notes__[-1]


def test_hdf5_is_entered_by_one_thread_of_a_process_whoever_opened_the_files(sites: Any) -> None:
    address, *others = sites.workers("a").values()
    calls = [SiteCall(describe_dataset, sites.path("a", "model.nc"), {}, None) for _ in (address, *others)]
    described = [
        sites.client.submit(call, workers=[worker], pure=False).result()[0]
        for call, worker in zip(calls, (address, *others), strict=True)
    ]
    assert len(described) == 2
    readers = [Reader(d["variables"]["t"].sealed, "t", None) for d in described]

    def locks_in(readers: list[Reader]) -> set[int]:
        from xarray.backends.locks import HDF5_LOCK

        found = {id(HDF5_LOCK.lock)}
        for reader in readers:
            reader[0]
            data = reader.variable._data
            while not hasattr(data, "datastore"):
                data = data.array
            found |= {id(lock.lock) for lock in data.datastore.lock.locks if lock.token == HDF5_LOCK.token}
            found.add(id(HDF5_LOCK.lock) if any(k is HDF5_LOCK for k in data.datastore.lock.locks) else 0)
        return found

    assert len(sites.client.submit(locks_in, readers, workers=[address]).result()) == 1


def test_many_threads_read_files_that_several_workers_opened(sites: Any, stored: xr.Dataset) -> None:
    opened = [mc.open_dataset("a", sites.path("a", "model.nc"), chunks={"time": 1, "y": 5}) for _ in range(4)]
    arrays = dask.compute(*(ds.t.data + i for i, ds in enumerate(opened)))
    for i, array in enumerate(arrays):
        np.testing.assert_allclose(array, stored.t + i, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("name", "error"),
    [("nothing.nc", FileNotFoundError), ("not-a-dataset.nc", ValueError), ("folder", Exception)],
)
def test_errors_of_a_site_arrive_as_they_are_and_name_it(sites: Any, name: str, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        mc.open_dataset("a", sites.path("a", name))
    assert "site 'a'" in caught.value.__notes__[-1]
    assert name in caught.value.__notes__[-1]
    assert mc.open_dataset("a", sites.path("a", "model.nc")).sizes["time"] == N_TIMES


class LockedArchive(xr.backends.BackendEntrypoint):
    """A backend of a user's own, which exists in no module that a worker could import. (Root may read any file.)"""

    open_dataset_parameters = ("filename_or_obj", "drop_variables")

    def open_dataset(self, filename_or_obj: Any, *, drop_variables: Any = None) -> xr.Dataset:
        raise PermissionError(13, "Permission denied", filename_or_obj)


def test_a_backend_of_ones_own_runs_at_the_site_and_its_error_arrives(sites: Any) -> None:
    with pytest.raises(PermissionError, match="model") as caught:
        mc.open_dataset("a", sites.path("a", "model.nc"), engine=LockedArchive)
    assert caught.value.filename == sites.path("a", "model.nc")
    assert "site 'a'" in caught.value.__notes__[-1]


def test_a_file_that_is_gone_when_it_is_read_is_named_with_its_site(sites: Any) -> None:
    sites.store("a", "gone.nc").write_bytes(sites.store("a", "model.nc").read_bytes())
    opened = mc.open_dataset("a", sites.path("a", "gone.nc"))
    sites.store("a", "gone.nc").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        opened.t.compute()
    assert any("t of" in note and "at a" in note for note in caught.value.__notes__)


def test_an_unknown_site_is_named_soon_with_those_that_exist(sites: Any) -> None:
    start = time.monotonic()
    with pytest.raises(UnknownPoolError) as caught:
        mc.open_dataset("nowhere", "/data/x.nc")
    assert caught.value.pools == ("a", "b")
    assert time.monotonic() - start < 15
    with pytest.raises(UnknownPoolError):
        mc.filesystem("nowhere").exists("/data")


def test_one_replica_is_enough(sites: Any) -> None:
    assert mc.open_dataset(("nowhere", "b"), sites.path("b", "model.nc")).sizes["time"] == N_TIMES


def test_a_cluster_without_pools_says_how_to_start_workers(sites: Any) -> None:
    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster),
        pytest.raises(PoolsMissingError, match="--resources"),
    ):
        mc.open_dataset("a", "/data/x.nc")


@pytest.mark.parametrize("path", [3, None, [b"x"]])
def test_what_is_no_path_is_refused(sites: Any, path: Any) -> None:
    with pytest.raises(TypeError, match="path"):
        mc.open_dataset("a", path)


def test_metadata_is_read_before_work_that_was_submitted_earlier(sites: Any) -> None:
    with mc.pool("a"):
        busy = sites.client.map(lambda i: time.sleep(0.2), range(100), pure=False)
    try:
        mc.open_dataset("a", sites.path("a", "model.nc"))
        assert sum(not future.done() for future in busy) > 20
    finally:
        sites.client.cancel(busy, force=True)


# ---------------------------------------------------------------------------------------------------------------
# Without meshcompute at the sites


def test_a_cluster_without_meshcompute_opens_reads_and_writes(stock_sites: Any, stored: xr.Dataset) -> None:
    sites = stock_sites
    stored.to_netcdf(sites.store("a", "model.nc"))
    table = pd.DataFrame({"x": np.arange(10.0)})
    table.to_parquet(sites.store("a", "table.parquet"))
    with sites.client.as_current():
        opened = mc.open_dataset("a", sites.path("a", "model.nc"), chunks={"time": 3})
        xr.testing.assert_allclose(opened.compute(), stored)
        with mc.pool("a"):
            opened[["t"]].to_zarr(sites.path("a", "out.zarr"), zarr_format=2)
        np.testing.assert_allclose(mc.open_zarr("a", sites.path("a", "out.zarr")).t, stored.t)
        assert mc.filesystem("a").glob(sites.path("a", "*.nc")) == [sites.path("a", "model.nc")]
        assert mc.open_dataframe("a", sites.path("a", "table.parquet")).x.sum().compute() == 45
        modules = sites.client.run(lambda: [m for m in sys.modules if m.startswith("meshcompute.site")])
    assert set(map(tuple, modules.values())) == {()}
