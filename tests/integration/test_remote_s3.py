"""NetCDF, Zarr and Parquet in an object store that only one site can reach.

::

    client, scheduler, site a ──✗──  http://objects:<port>  ◄── the worker of site s3
                                     (a name that only its /etc/hosts knows)

The server is moto's, in a process of its own. It takes any credentials: what is tested of them is that they are in no
log and no repr.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pandas as pd
import pytest
import xarray as xr

import meshcompute as mc
from meshcompute.data.writing import to_zarr

KEY, SECRET = "AKIAMESHCANARYKEY000", "mesh/canary/secret/0123456789"
HOST = "objects"
DEADLINE_SECONDS = 60


def wait_until(condition: Any, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """An object store on this machine, under a name that nobody resolves."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    log = tmp_path_factory.mktemp("moto") / "log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(number)], stdout=out, stderr=out
        )

    def answers() -> bool:
        try:
            socket.create_connection(("127.0.0.1", number), timeout=1).close()
        except OSError:
            return False
        return True

    try:
        wait_until(answers, server, log)
        yield number
    finally:
        server.kill()
        server.wait()


@dataclass(frozen=True)
class ObjectStore:
    """The store as its own administrator and as the site see it."""

    bucket: Any
    options: dict[str, Any]
    log: Path


@pytest.fixture(scope="module")
def store(sites: Any, port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """Start a site s3, whose worker alone knows the address of the store."""
    folder = tmp_path_factory.mktemp("s3")
    hosts = folder / "hosts"
    hosts.write_text(f"127.0.0.1 localhost {HOST}\n")
    command = [sys.executable, "-m", "dask", "worker", sites.mesh.scheduler_address, "--name", "s3-3-0"]
    command += ["--resources", "pool-s3=1", "--nthreads", "2", "--host", "127.0.0.1", "--no-nanny", "--no-dashboard"]
    command += ["--death-timeout", "60", "--local-directory", str(folder)]
    script = f"mount --bind {shlex.quote(str(hosts))} /etc/hosts; exec {shlex.join(command)}"
    log = folder / "log"
    environment = {**os.environ, "DASK_LOGGING__DISTRIBUTED": "debug"}
    with log.open("wb") as out:
        worker = subprocess.Popen(
            [*sites.mesh._namespace, "sh", "-ec", script], stdout=out, stderr=out, env=environment
        )
    admin = boto3.resource(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        region_name="us-east-1",
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
    )
    options = {"key": KEY, "secret": SECRET, "client_kwargs": {"endpoint_url": f"http://{HOST}:{port}"}}
    try:
        wait_until(lambda: sites.workers("s3"), worker, log)
        yield ObjectStore(admin.create_bucket(Bucket="archive"), options, log)
    finally:
        worker.kill()
        worker.wait()


@pytest.fixture(scope="module")
def stored(store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    folder = tmp_path_factory.mktemp("source")
    dataset = xr.Dataset(
        {"t": (("time", "x"), np.arange(80.0).reshape(8, 10), {"units": "K"}), "u": ("x", np.arange(10.0))},
        {"time": np.arange(8)},
    )
    encoding = {"t": {"chunksizes": (2, 10)}}
    dataset.to_netcdf(folder / "model.nc", encoding=encoding)
    dataset.to_zarr(folder / "model.zarr", zarr_format=2, encoding={"t": {"chunks": (2, 10)}})
    pd.DataFrame({"x": np.arange(5.0)}).to_parquet(folder / "table.parquet")
    for path in folder.rglob("*"):
        if path.is_file():
            store.bucket.upload_file(str(path), str(path.relative_to(folder)))
    return dataset


def test_only_the_site_knows_the_store(sites: Any, store: ObjectStore) -> None:
    with pytest.raises(OSError, match=r"known|resolution"):
        socket.getaddrinfo(HOST, 80)
    for site, knows in (("a", False), ("s3", True)):
        with mc.pool(site):
            assert sites.client.submit(_resolves, HOST, pure=False).result() is knows


def _resolves(host: str) -> bool:
    import socket

    try:
        return bool(socket.getaddrinfo(host, 80))
    except OSError:
        return False


@pytest.mark.parametrize(("name", "engine"), [("model.zarr", "zarr"), ("model.nc", "h5netcdf")])
def test_a_dataset_in_the_store_is_opened_through_its_site(
    store: ObjectStore, stored: xr.Dataset, name: str, engine: str
) -> None:
    opened = mc.open_dataset("s3", f"s3://archive/{name}", engine=engine, storage_options=store.options)
    assert opened.t.chunks == ((2, 2, 2, 2), (10,))
    xr.testing.assert_identical(opened.compute(), stored)
    assert float((opened.t + opened.u).sum()) == float((stored.t + stored.u).sum())


def test_many_stores_are_found_by_pattern(store: ObjectStore, stored: xr.Dataset) -> None:
    opened = mc.open_mfdataset(
        "s3", "s3://archive/mod*.zarr", engine="zarr", storage_options=store.options, data_vars="all", compat="override"
    )
    xr.testing.assert_identical(opened.compute(), stored)


def test_a_store_is_written_through_its_site(store: ObjectStore, stored: xr.Dataset) -> None:
    opened = mc.open_zarr("s3", "s3://archive/model.zarr", storage_options=store.options)
    with mc.pool("s3"):
        (opened + 1).to_zarr("s3://archive/out.zarr", storage_options=store.options, zarr_format=2)
    again = mc.open_zarr("s3", "s3://archive/out.zarr", storage_options=store.options)
    np.testing.assert_array_equal(again.t, stored.t + 1)


def test_files_of_the_store_are_listed_and_read(store: ObjectStore, stored: xr.Dataset) -> None:
    files = mc.filesystem("s3", "s3", **store.options)
    assert "archive/model.nc" in files.ls("s3://archive", detail=False)
    assert files.glob("archive/*.parquet") == ["archive/table.parquet"]
    with files.open("s3://archive/model.nc") as file:
        assert file.read(4) == b"\x89HDF"


def test_a_table_in_the_store_is_a_lazy_frame(store: ObjectStore, stored: xr.Dataset) -> None:
    table = mc.open_dataframe("s3", "s3://archive/table.parquet", storage_options=store.options)
    assert table.x.sum().compute() == 10


def test_errors_of_the_store_name_the_site(store: ObjectStore, stored: xr.Dataset) -> None:
    for name, options in (("nothing.zarr", {"engine": "zarr"}), ("nothing.nc", {"engine": "h5netcdf"})):
        with pytest.raises(FileNotFoundError) as caught:
            mc.open_dataset("s3", f"s3://archive/{name}", storage_options=store.options, **options)
        assert "site 's3'" in caught.value.__notes__[-1]
    with pytest.raises(Exception, match=HOST) as caught:
        mc.filesystem("a", "s3", **store.options).ls("archive")
    assert "site 'a'" in caught.value.__notes__[-1]


def test_credentials_are_in_no_log_and_no_repr(sites: Any, store: ObjectStore, stored: xr.Dataset) -> None:
    opened = mc.open_zarr("s3", "s3://archive/model.zarr", storage_options=store.options)
    table = mc.open_dataframe("s3", "s3://archive/table.parquet", storage_options=store.options)
    broken = mc.open_dataset("s3", "s3://archive/model.nc", engine="h5netcdf", storage_options=store.options)
    writes = to_zarr(
        "s3", opened, "s3://archive/more.zarr", storage_options=store.options, compute=False, zarr_format=2
    )
    texts = [repr(opened), opened._repr_html_(), repr(opened.t.data.dask), repr(dict(opened.t.data.dask))]
    texts += [repr(table), table.expr.tree_repr(), repr(writes), repr(dict(writes.dask)), str(mc.explain(opened))]
    texts += [repr(dict(broken.t.data.dask))]
    store.bucket.Object("model.nc").delete()
    try:
        with pytest.raises(FileNotFoundError) as caught:
            broken.t.compute()
    finally:
        store.bucket.put_object(Key="model.nc", Body=b"gone")
    texts += [repr(caught.value), *caught.value.__notes__, str(caught.value)]
    worker_log = store.log.read_text()
    assert "Compute Failed" in worker_log
    assert "DEBUG" in worker_log
    texts += [worker_log, *(sites.mesh.log(name) for name in sites.mesh.pids)]
    for text in texts:
        assert SECRET not in text
        assert KEY not in text
