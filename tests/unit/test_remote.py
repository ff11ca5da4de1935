"""Opening at a site without any cluster: what is hidden, what is refused, what a store at a site remembers."""

from __future__ import annotations

import io
import pickle
import threading
from pathlib import Path

import dask.array
import numpy as np
import pytest
import xarray
from distributed.core import error_message
from xarray.backends import locks

from meshcompute import (
    open_dataframe,
    open_dataset,
    open_mfdataset,
    open_zarr,
    pool,
)
from meshcompute.data import opening, sitearrays, siteside, writing
from meshcompute.data.sitecalls import names_of_site
from meshcompute.data.sitefiles import SiteFileSystem, filesystem
from meshcompute.data.sitestore import SiteStore, _Changes
from meshcompute.data.tables import _Piece
from meshcompute.errors import NoClientError, PoolNameError, UnsupportedPinError
from meshcompute.shipping import by_value

SECRET = "wJalrXUtnFEMI-canary"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def lazy() -> xarray.Dataset:
    return xarray.Dataset({"t": ("x", dask.array.ones(4, chunks=2))})


@pytest.mark.parametrize(
    "thing",
    [
        siteside.SiteCall(siteside.read_store, "s3://bucket", {"secret": SECRET}, "key"),
        by_value(siteside.SiteCall(siteside.read_store, "s3://bucket", {"secret": SECRET}, "key")),
        sitearrays.Reader(siteside.seal({"secret": SECRET}), "t of s3://bucket at a", None),
        filesystem("a", "s3", secret=SECRET),
        SiteStore(("a",), "s3://bucket", {"secret": SECRET}),
        _Piece(siteside.seal({"secret": SECRET})),
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_credentials_are_in_no_repr(thing: object) -> None:
    assert SECRET not in repr(thing) + str(thing)
    assert "zlib" not in repr(thing)
    assert r"\x" not in repr(thing)


def test_what_travels_shows_no_credentials_when_dask_logs_its_bytes() -> None:
    call = siteside.SiteCall(siteside.read_store, "s3://bucket", {"secret": SECRET}, "key")
    store = SiteStore(("a",), "s3://bucket", {"secret": SECRET})
    for thing in (by_value(call), store):
        assert SECRET.encode() not in pickle.dumps(thing)
    assert siteside.unseal(call.sealed) == (("s3://bucket", {"secret": SECRET}, "key"), {})


def test_hdf5_locks_become_those_of_the_process_that_unpickles() -> None:
    file = io.BytesIO()
    pickler = sitearrays._Pickler(file, locks)
    pickler.dump(locks.combine_locks([locks.NETCDFC_LOCK, locks.HDF5_LOCK]))
    assert pickler.is_locked
    assert locks.HDF5_LOCK.token.encode() not in file.getvalue()
    assert set(pickle.loads(file.getvalue()).locks) == {locks.NETCDFC_LOCK, locks.HDF5_LOCK}


class TwoLayouts(ValueError, FileNotFoundError):
    """Of the kind that tblib cannot unpickle, as zarr's GroupNotFoundError."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)


class HoldsSocket(ConnectionError):
    """Of the kind that HTTP libraries raise."""

    def __init__(self, message: str) -> None:
        super().__init__(message, threading.Lock())


def raises(error: Exception, cause: Exception | None = None) -> None:
    raise error from cause


def test_an_error_that_dask_cannot_carry_arrives_as_what_it_is() -> None:
    value, sealed = siteside.SiteCall(raises, TwoLayouts("nothing"))()
    assert value is None
    error = siteside.unseal_error(sealed)
    assert type(error) is TwoLayouts
    assert error.args == ("nothing",)


def test_an_error_with_a_chain_that_cannot_be_pickled_keeps_it_as_a_note() -> None:
    def call() -> None:
        raise FileNotFoundError(2, "nothing", "x.nc") from HoldsSocket("refused")

    with pytest.raises(FileNotFoundError) as caught:
        siteside.SiteCall(call)()
    assert "refused" in caught.value.__notes__[0]
    sent = pickle.loads(error_message(caught.value)["exception"].data)
    assert (type(sent), sent.filename, sent.__notes__) == (FileNotFoundError, "x.nc", caught.value.__notes__)


def test_an_error_that_cannot_be_pickled_at_all_arrives_as_its_nearest_base() -> None:
    def call() -> None:
        raise HoldsSocket("refused")

    with pytest.raises(ConnectionError) as caught:
        siteside.SiteCall(call)()
    assert type(caught.value) is not HoldsSocket


def test_a_variable_of_dates_that_numpy_cannot_hold_is_laid_out_too(tmp_path: Path) -> None:
    path = tmp_path / "x.nc"
    dates = xarray.date_range("2000-01-01", periods=6, calendar="360_day", use_cftime=True).values.reshape(3, 2)
    stored = xarray.Dataset({"t": ("time", np.arange(3.0))}, {"bounds": (("time", "side"), dates)})
    stored.to_netcdf(path)
    source = opening._Description(("a",), str(path), {}, None)
    source._content = sitearrays.describe_dataset(str(path), {}, None)
    for chunks in ({}, "auto", {"time": 1}):
        opened = opening._open_description(source, {"chunks": chunks})
        assert opened.bounds.dtype == object
        assert opened.bounds.chunks == xarray.open_dataset(path, chunks=chunks).bounds.chunks
        with dask.config.set(scheduler="synchronous"):
            xarray.testing.assert_identical(opened.compute(), stored)


def test_a_client_needs_nothing_but_the_description_to_lay_out_a_dataset(tmp_path: Path) -> None:
    path = tmp_path / "x.nc"
    stored = xarray.Dataset(
        {"t": (("time", "x"), np.arange(12.0).reshape(4, 3), {"units": "K"})}, {"time": [1, 2, 3, 4], "n": 5}
    )
    stored.to_netcdf(path)
    content = sitearrays.describe_dataset(str(path), {}, None)
    path.unlink()
    described = {name: v.values is None for name, v in content["variables"].items()}
    assert described == {"t": True, "time": False, "n": False}
    assert len(pickle.dumps(content)) < 8_000


@pytest.mark.parametrize("function", [open_dataset, open_zarr, open_mfdataset, open_dataframe])
def test_without_a_client_the_error_says_so(function) -> None:
    with pytest.raises(NoClientError, match=function.__name__ if function is not open_zarr else "open_dataset"):
        function("a", "/data/x")


@pytest.mark.parametrize("site", ["", (), "pool-a", "a b", ("a", ""), 3, None])
def test_a_site_whose_name_no_pool_can_have_is_refused(site) -> None:
    with pytest.raises((PoolNameError, TypeError)):
        names_of_site(site)


def test_a_site_may_be_several_replicas() -> None:
    assert names_of_site("a") == ("a",)
    assert names_of_site(("b", "a", "b")) == ("b", "a")


def test_the_same_path_at_two_sites_is_two_datasets() -> None:
    def named(sites: tuple[str, ...], version: object, **options: object) -> str:
        source = opening._Description(sites, "/data/x.nc", options, None)
        source._content = {"version": version}
        return dask.base.tokenize(source)

    assert named(("a",), 1) == named(("a",), 1)
    assert len({named(("a",), 1), named(("b",), 1), named(("a",), 2), named(("a",), 1, group="g")}) == 4


def test_options_are_split_into_those_for_the_site_and_those_for_the_client() -> None:
    at_site, local = opening._split_options(
        {
            "chunks": None,
            "engine": None,
            "cache": True,
            "group": "g",
            "backend_kwargs": {"lock": None},
            "inline_array": True,
        }
    )
    assert at_site == {"group": "g", "lock": None}
    assert local == {"chunks": {}, "inline_array": True}
    with pytest.raises(ValueError, match="chunked_array_type"):
        opening._split_options({"chunks": {}, "chunked_array_type": "cubed"})


@pytest.mark.parametrize(
    ("path", "stripped"),
    [("/data/x/", "/data/x"), ("/", "/"), ("file:///data", "/data"), ("s3://bucket/key", "bucket/key"), ("", "")],
)
def test_paths_of_a_site_lose_their_protocol(path: str, stripped: str) -> None:
    assert SiteFileSystem._strip_protocol(path) == stripped
    assert SiteFileSystem._strip_protocol([path]) == [stripped]


def test_a_file_system_of_a_site_pickles_and_compares() -> None:
    first = filesystem("a", "s3", secret=SECRET)
    assert pickle.loads(pickle.dumps(first)) == first
    assert first != filesystem("b", "s3", secret=SECRET)
    with pytest.raises(NotImplementedError, match="to_zarr"):
        first.open("/x", "wb")


class TestChanges:
    """What a store at a site remembers between two calls there."""

    def test_a_value_that_was_set_is_known(self) -> None:
        changes = _Changes()
        changes.set("t/zarr.json", b"{}")
        assert changes.known["t/zarr.json"].to_bytes() == b"{}"
        assert changes.steps == [("set", "t/zarr.json", b"{}")]

    def test_a_deleted_key_says_nothing_of_its_neighbours(self) -> None:
        changes = _Changes()
        changes.delete("t")
        assert changes.is_gone("t")
        assert not changes.is_gone("t/zarr.json")
        assert not changes.is_gone("tt")

    def test_a_deleted_folder_takes_everything_below_it(self) -> None:
        changes = _Changes()
        changes.set("t/c/0", b"1")
        changes.set("tt", b"2")
        changes.delete_dir("t/")
        assert changes.is_gone("t/c/0")
        assert changes.is_gone("t/")
        assert not changes.is_gone("tt")
        assert list(changes.known) == ["tt"]

    def test_an_empty_store_has_only_what_was_put_into_it(self) -> None:
        changes = _Changes()
        changes.delete_dir("")
        assert changes.is_gone("anything/at/all")


def test_lazy_data_is_not_written_to_a_relative_path_in_a_block(lazy: xarray.Dataset) -> None:
    writing.activate()
    with pool("a"), pytest.raises(ValueError, match="no absolute path"):
        lazy.to_zarr("out.zarr")
    assert list(Path().iterdir()) == []


def test_replicas_are_not_written_at_once(lazy: xarray.Dataset) -> None:
    writing.activate()
    with pool("a", "b"), pytest.raises(ValueError, match="one site at a time"):
        lazy.to_zarr("/data/out.zarr")


def test_lazy_data_is_not_written_to_netcdf_in_a_block(lazy: xarray.Dataset) -> None:
    writing.activate()
    for data in (lazy, lazy.t, xarray.DataTree(lazy)):
        with pool("a"), pytest.raises(UnsupportedPinError, match="to_zarr"):
            data.to_netcdf("/data/out.nc")


def test_data_in_memory_and_relative_paths_stay_xarrays_business(lazy: xarray.Dataset) -> None:
    writing.activate()
    writing.activate()
    with pool("a"):
        lazy.compute().to_zarr("out.zarr", consolidated=False)
        lazy.compute().to_netcdf("out.nc")
    with pool("a"), pool(None):
        lazy.to_zarr("none.zarr", consolidated=False, compute=False)
    lazy.to_zarr("outside.zarr", consolidated=False, compute=False)
    assert sorted(map(str, Path().iterdir())) == ["none.zarr", "out.nc", "out.zarr", "outside.zarr"]


def test_a_store_at_a_site_needs_a_client_and_leaves_nothing_here(lazy: xarray.Dataset, tmp_path: Path) -> None:
    with pytest.raises(NoClientError):
        writing.to_zarr("a", lazy, tmp_path / "out.zarr")
    assert list(tmp_path.iterdir()) == []
