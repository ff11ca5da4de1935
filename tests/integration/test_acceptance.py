"""A scheduler and workers started from the command line, each site seeing only its own folder, the scheduler none.

The same, every time: with an environment that has meshcompute and with one that does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from dask import delayed
from distributed import Client, futures_of, wait

from meshcompute import measure_traffic, open_dataset, pool, propagate_pools

N = 6


@pytest.fixture(scope="module", params=["with meshcompute", "without meshcompute"])
def anywhere(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The two kinds of environment."""
    found = request.getfixturevalue("sites" if request.param == "with meshcompute" else "stock_sites")
    with Client(found.mesh.scheduler_address) as client:  # Dask's default client, whatever came before
        yield type(found)(mesh=found.mesh, client=client)


@pytest.fixture(scope="module")
def fields(anywhere: Any) -> dict[str, xr.Dataset]:
    """One NetCDF file, one CSV file and a file of lines at each site."""
    datasets = {}
    for offset, site in enumerate(("a", "b"), start=1):
        field = np.arange(24 * 40, dtype="f4").reshape(24, 40) * offset
        datasets[site] = xr.Dataset({"t": (("time", "x"), field)}, coords={"time": np.arange(24)})
        datasets[site].to_netcdf(anywhere.store(site, "field.nc"))
        for i in range(N):
            table = pd.DataFrame({"k": np.arange(10) % 3, "x": np.arange(10.0) * offset + i})
            table.to_csv(anywhere.store(site, f"table-{i}.csv"), index=False)
    return datasets


def read_column(folder: str, i: int) -> np.ndarray:
    return np.asarray(pd.read_csv(f"{folder}/table-{i}.csv")["x"], dtype=float)


def read_table(i: int, folder: str) -> pd.DataFrame:
    return pd.read_csv(f"{folder}/table-{i}.csv")


# As in a notebook: pickled by value, so that nobody has to import this file.
read_column.__module__ = read_table.__module__ = "__main__"


@pytest.fixture
def counted(anywhere: Any) -> Iterator[Any]:
    """No task may have run outside of its pool."""
    with propagate_pools():
        yield anywhere

    def statistics(dask_scheduler: Any) -> dict[str, Any]:
        found: dict[str, Any] = dask_scheduler.plugins["meshcompute"].statistics()
        return found

    counts = anywhere.client.run_on_scheduler(statistics)
    assert counts["wrong_pool"] == 0
    assert counts["finished"] > 0


def test_two_netcdf_files_are_combined(counted: Any, fields: dict[str, xr.Dataset]) -> None:
    a = open_dataset("a", counted.path("a", "field.nc"), chunks={"time": 4})
    b = open_dataset("b", counted.path("b", "field.nc"), chunks={"time": 4})
    with measure_traffic() as traffic:
        result = (a.mean("time") - b.isel(time=3)).compute()
    xr.testing.assert_allclose(result, fields["a"].mean("time") - fields["b"].isel(time=3))
    crossed = sum(n for (s, d), n in traffic.bytes_between_pools.items() if "client" not in {s, d})
    assert crossed < 1000


def test_arrays_are_combined(counted: Any, fields: Any) -> None:
    parts = {}
    for site in ("a", "b"):
        with pool(site):
            lazy = [da.from_delayed(delayed(read_column)(counted.path(site), i), (10,), float) for i in range(N)]
            parts[site] = da.concatenate(lazy)
    expected = {s: np.concatenate([np.arange(10.0) * o + i for i in range(N)]) for o, s in ((1, "a"), (2, "b"))}
    np.testing.assert_allclose((parts["a"] + parts["b"]).compute(), expected["a"] + expected["b"])
    np.testing.assert_allclose(parts["a"].std().compute(), expected["a"].std())


def test_dataframes_are_combined(counted: Any, fields: Any) -> None:
    meta = pd.DataFrame({"k": pd.Series(dtype="int64"), "x": pd.Series(dtype="float64")})
    frames = {}
    for site in ("a", "b"):
        with pool(site):
            frames[site] = dd.from_map(read_table, range(N), folder=counted.path(site), meta=meta)
    left = frames["a"].groupby("k").x.sum().reset_index()
    right = frames["b"].groupby("k").x.sum().reset_index()
    result = left.merge(right, on="k", suffixes=("_a", "_b")).compute().sort_values("k")
    assert result.k.tolist() == [0, 1, 2]
    whole = {o: np.concatenate([np.arange(10.0) * o + i for i in range(N)]) for o in (1, 2)}
    assert result.x_a.sum() == pytest.approx(whole[1].sum())
    assert result.x_b.sum() == pytest.approx(whole[2].sum())


def test_delayed_calls_are_combined(counted: Any, fields: Any) -> None:
    lazy = []
    for site in ("a", "b"):
        with pool(site):
            lazy.append(delayed(read_column)(counted.path(site), 2))
    np.testing.assert_allclose(delayed(np.add)(*lazy).compute(), np.arange(10.0) * 3 + 4)


def test_bags_are_combined(counted: Any, fields: Any) -> None:
    bags = []
    for site in ("a", "b"):
        with pool(site):
            numbers = db.from_sequence(range(N), npartitions=N)
            bags.append(numbers.map(lambda i, folder: float(read_column(folder, i).sum()), folder=counted.path(site)))
    assert db.zip(*bags).map(sum).sum().compute() == pytest.approx(sum(45.0 * 3 + 20 * i for i in range(N)))


def test_a_p2p_rechunk_of_pinned_data_finishes_inside_its_pool(counted: Any) -> None:
    with pool("b"):
        x = da.map_blocks(lambda x: x + 1, da.zeros((40, 40), chunks=(4, 40)), dtype=float)
    y = x.rechunk((40, 4), method="p2p")
    held = counted.client.persist(y)
    wait(held, timeout=60)
    holders = {w for ws in counted.client.who_has(futures_of(held)).values() for w in ws}
    assert holders <= set(counted.workers("b").values())
    np.testing.assert_array_equal(held.compute(), np.ones((40, 40)))


def test_a_p2p_rechunk_of_data_of_two_pools_finishes(counted: Any) -> None:
    parts = []
    for site in ("a", "b"):
        with pool(site):
            parts.append(da.map_blocks(lambda x: x + 1, da.zeros((40, 40), chunks=(4, 40)), dtype=float))
    y = da.concatenate(parts).rechunk((80, 4), method="p2p")
    np.testing.assert_array_equal(y.sum(0).compute(), np.full(40, 80.0))
