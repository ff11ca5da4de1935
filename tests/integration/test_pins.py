"""Pins against a scheduler in its own process, default fusion, and folders that only their site sees.

A task that runs at the wrong site fails here by nature: the file is not there.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
import uuid
from collections.abc import Iterator
from typing import Any

import cloudpickle
import dask
import dask.array as da
import dask.bag as db
import numpy as np
import pytest
import xarray as xr
from dask import delayed
from distributed import Client, LocalCluster, get_worker, wait, worker_client

from meshcompute.clients import pool, propagate_pools
from meshcompute.errors import PoolNameError, PoolsMissingError, UnknownPoolError
from meshcompute.explaining import explain, get_pool, propagate_pools_in_collection
from meshcompute.traffic import measure_traffic

cloudpickle.register_pickle_by_value(sys.modules[__name__])

N_CHUNKS = 6
CHUNK = 50


@pytest.fixture(scope="module", autouse=True)
def data(sites: Any) -> dict[str, np.ndarray]:
    """One file per chunk at each site."""
    values = {}
    for offset, site in enumerate(("a", "b")):
        values[site] = np.arange(N_CHUNKS * CHUNK, dtype=float) ** 2 + offset
        for i in range(N_CHUNKS):
            # Plain bytes: numpy.load parses a header, which CPython 3.11 cannot do in several threads at once.
            values[site][i * CHUNK : (i + 1) * CHUNK].tofile(sites.store(site, f"chunk-{i}"))
    return values


@pytest.fixture(params=["guard only", "propagate_pools"])
def rules(request: pytest.FixtureRequest, sites: Any) -> Iterator[str]:
    """Every pin must hold with and without placement."""
    with propagate_pools() if request.param == "propagate_pools" else contextlib.nullcontext():
        yield request.param


def read_chunk(folder: str, i: int, nonce: str = "") -> np.ndarray:
    return np.fromfile(f"{folder}/chunk-{i}")


def read(folder: str, nonce: str, block_info: Any = None) -> np.ndarray:
    return read_chunk(folder, block_info[None]["chunk-location"][0])


def new_nonce() -> str:
    """Something that makes keys new, so that no test finds another's values in memory."""
    return uuid.uuid4().hex


def add_length(x: np.ndarray, folder: str) -> np.ndarray:
    return x + len(read_chunk(folder, 0)) if len(x) else x


def chunk_sum(i: int, folder: str) -> float:
    return float(read_chunk(folder, i).sum())


def blockwise(sites: Any, site: str) -> da.Array:
    """An array whose tasks come from one blockwise layer."""
    return da.map_blocks(
        read, sites.path(site), new_nonce(), chunks=((CHUNK,) * N_CHUNKS,), dtype=float, meta=np.empty(0)
    )


def materialized(sites: Any, site: str) -> da.Array:
    """An array whose tasks come from layers that are plain dicts."""
    parts = [delayed(read_chunk)(sites.path(site), i, new_nonce()) for i in range(N_CHUNKS)]
    return da.concatenate([da.from_delayed(part, (CHUNK,), float) for part in parts])


@pytest.fixture(params=[blockwise, materialized])
def both(request: pytest.FixtureRequest, sites: Any) -> tuple[da.Array, da.Array]:
    """One array pinned at each site."""
    with pool("a"):
        a = request.param(sites, "a")
    with pool("b"):
        b = request.param(sites, "b")
    return a, b


def where(*_: object) -> str:
    """Name the pool that this runs in."""
    return str(get_worker().name).split("-")[0]


def test_without_pools_the_same_program_fails(sites: Any) -> None:
    with pytest.raises(FileNotFoundError):
        (blockwise(sites, "a") + blockwise(sites, "b")).sum().compute()


EXPRESSIONS = {
    "reduction of one": (lambda a, b: (a * 2).sum(), lambda a, b: (a * 2).sum()),
    "sum of both": (lambda a, b: (a + b).sum(), lambda a, b: (a + b).sum()),
    "whole sum of both": (lambda a, b: a + b, lambda a, b: a + b),
    "difference of means": (lambda a, b: a.mean() - b.mean(), lambda a, b: a.mean() - b.mean()),
    "slices of both": (lambda a, b: (a[10:] - b[:-10]).std(), lambda a, b: (a[10:] - b[:-10]).std()),
    "concatenated": (lambda a, b: da.concatenate([a, b]).max(), lambda a, b: np.concatenate([a, b]).max()),
    "rechunked": (lambda a, b: (a.rechunk(70) + b.rechunk(70)).sum(), lambda a, b: (a + b).sum()),
    "overlap": (
        lambda a, b: da.overlap.overlap(a, 1, "nearest").sum() * b.sum(),
        lambda a, b: (
            sum(np.pad(a, 1, mode="edge")[i * CHUNK : (i + 1) * CHUNK + 2].sum() for i in range(N_CHUNKS)) * b.sum()
        ),
    ),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_arrays_of_two_sites_give_numpys_answer(name: str, both: Any, data: Any, rules: str) -> None:
    ours, numpys = EXPRESSIONS[name]
    np.testing.assert_allclose(ours(*both).compute(), numpys(data["a"], data["b"]))


def test_pins_hold_without_optimisation(both: Any, data: Any, rules: str) -> None:
    a, b = both
    result = (a + b).sum().compute(optimize_graph=False)
    np.testing.assert_allclose(result, (data["a"] + data["b"]).sum())


def test_pins_survive_dask_optimize(both: Any, data: Any, rules: str) -> None:
    a, b = dask.optimize(both[0] + 1, both[1])
    np.testing.assert_allclose((a * b).sum().compute(), ((data["a"] + 1) * data["b"]).sum())


def test_pins_survive_a_call_that_takes_the_whole_array(both: Any, data: Any, rules: str) -> None:
    a, b = both
    total = delayed(lambda x, y: x.sum() + y[0].sum())(a, [b])
    np.testing.assert_allclose(total.compute(), data["a"].sum() + data["b"].sum())


def test_pins_survive_conversion_to_delayed_and_back(both: Any, data: Any, rules: str) -> None:
    blocks = (both[0] + 1).to_delayed().ravel()
    again = da.concatenate([da.from_delayed(block, (CHUNK,), float) for block in blocks])
    np.testing.assert_allclose((again + both[1]).compute(), data["a"] + 1 + data["b"])


def test_pins_survive_pickling(both: Any, data: Any, rules: str) -> None:
    a, b = (cloudpickle.loads(cloudpickle.dumps(x)) for x in both)
    np.testing.assert_allclose((a + b).compute(), data["a"] + data["b"])


def test_persisted_data_stays_in_its_pool(both: Any, data: Any, sites: Any, rules: str) -> None:
    a = (both[0] + 1).persist()
    holders = {w for ws in sites.client.who_has(a).values() for w in ws}
    if rules == "propagate_pools":
        assert holders <= set(sites.workers("a").values())
    np.testing.assert_allclose((a + both[1]).sum().compute(), (data["a"] + 1 + data["b"]).sum())


def test_a_second_client_that_never_entered_a_pool_keeps_the_pins(sites: Any, data: Any, tmp_path: Any) -> None:
    import subprocess

    with pool("a"):
        a = blockwise(sites, "a")
    sites.client.publish_dataset(pinned=a + 1)
    try:
        code = (
            "import sys; from distributed import Client\n"
            f"with Client({sites.mesh.scheduler_address!r}) as c:\n"
            "    x = c.get_dataset('pinned')\n"
            "    print(float(x.sum().compute()))\n"
        )
        run = subprocess.run(
            [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60, cwd=tmp_path
        )
    finally:
        sites.client.unpublish_dataset("pinned")
    assert run.returncode == 0, run.stderr
    np.testing.assert_allclose(float(run.stdout), (data["a"] + 1).sum())


def test_xarray_is_pinned_where_it_is_opened(sites: Any, rules: str) -> None:
    for offset, site in enumerate(("a", "b")):
        xr.Dataset({"t": (("y", "x"), np.arange(24.0).reshape(4, 6) + offset)}).to_netcdf(sites.store(site, "t.nc"))
    with pool("a"):
        a = sites.client.submit(xr.open_dataset, sites.path("a", "t.nc"), cache=False).result().chunk(y=2)
    with pool("b"):
        b = sites.client.submit(xr.open_dataset, sites.path("b", "t.nc"), cache=False).result().chunk(y=2)
    assert get_pool(a.t.data) == "a"
    np.testing.assert_allclose((b - a).t.compute(), np.ones((4, 6)))
    np.testing.assert_allclose((b.mean("y") - a.mean("y")).to_array()[0].compute(), np.ones(6))


def test_a_bag_is_read_at_its_site(sites: Any, data: Any, rules: str) -> None:
    with pool("a"):
        a = db.from_sequence(range(N_CHUNKS), npartitions=N_CHUNKS).map(chunk_sum, folder=sites.path("a"))
    with pool("b"):
        b = db.from_sequence(range(N_CHUNKS), npartitions=N_CHUNKS).map(chunk_sum, folder=sites.path("b"))
    np.testing.assert_allclose(db.zip(a, b).map(sum).sum().compute(), data["a"].sum() + data["b"].sum())
    np.testing.assert_allclose(
        a.sum().compute() + dask.compute(*b.to_delayed())[0][0], data["a"].sum() + data["b"][:CHUNK].sum()
    )


def test_delayed_calls_run_at_their_site(sites: Any, data: Any, rules: str) -> None:
    with pool("a"):
        a = delayed(read_chunk)(sites.path("a"), 0)
    with pool("b"):
        b = delayed(read_chunk)(sites.path("b"), 0)
    np.testing.assert_allclose(delayed(np.add)(a, b).sum().compute(), (data["a"] + data["b"])[:CHUNK].sum())


def test_futures_run_and_are_scattered_in_their_pool(sites: Any, rules: str) -> None:
    client = sites.client
    for site in ("a", "b"):
        with pool(site):
            assert client.submit(where, pure=False).result() == site
            assert set(client.gather(client.map(where, range(6), pure=False))) == {site}
            future = client.scatter(np.arange(3), hash=False)
            assert set(client.who_has(future)[future.key]) <= set(sites.workers(site).values())
            [one] = client.scatter([np.arange(4)], hash=False, broadcast=True)
            assert set(client.who_has(one)[one.key]) == set(sites.workers(site).values())


@pytest.mark.parametrize("site", ["a", "b"])
def test_resources_that_name_a_pool_hold_while_everything_else_is_placed(sites: Any, site: str) -> None:
    with propagate_pools():
        futures = [sites.client.submit(where, i, resources={f"pool-{site}": 0}, pure=False) for i in range(4)]
        assert sites.client.gather(futures) == [site] * 4


def test_computing_inside_a_block_pins_what_has_no_pin(sites: Any, both: Any, rules: str) -> None:
    def unpinned() -> da.Array:  # new keys each time: a result still in memory would not be computed again
        return da.map_blocks(lambda x: np.array([where()] * len(x)), da.random.random(6, chunks=2), dtype="U1")

    with pool("b"):
        inside = unpinned()
    outside = unpinned(), unpinned()
    assert set(inside.compute()) == {"b"}
    with pool("b"):
        assert set(outside[0].compute()) == {"b"}
    with dask.annotate(resources={"pool-a": 1}):
        assert set(outside[1].compute()) == {"a"}


def test_pool_none_ends_a_pin(sites: Any, both: Any) -> None:
    with pool("a"), pool(None):
        free = da.zeros(3, chunks=1)
    assert get_pool(free) is None
    with pool("a"), pool("b"):
        assert sites.client.submit(where, pure=False).result() == "b"


def test_a_chain_through_two_pools_is_not_fused_into_one_task(sites: Any, data: Any, rules: str) -> None:
    with pool("a"):
        a = blockwise(sites, "a")
    with pool("b"):
        b = a.map_blocks(add_length, folder=sites.path("b"), dtype=float)
    with pool("a"):
        c = b.map_blocks(add_length, folder=sites.path("a"), dtype=float)
    np.testing.assert_allclose((c + 1).compute(), data["a"] + 2 * CHUNK + 1)


def test_replicas_run_at_either_pool(sites: Any, data: Any, rules: str) -> None:
    with pool("a", "b"):
        either = da.map_blocks(lambda x: np.array([where()]), da.zeros(8, chunks=1), dtype="U1", chunks=((1,) * 8,))
    assert get_pool(either) == ("a", "b")
    assert set(either.compute()) <= {"a", "b"}
    plan = explain(either.astype("U2"))
    assert set(plan.tasks_by_pool) <= {"a", "b"}


def test_the_same_call_in_two_pools_is_two_keys(sites: Any) -> None:
    results = {}
    arrays = {}
    for site in ("a", "b"):
        with pool(site):
            results[site] = sites.client.submit(where)
            arrays[site] = da.from_array(np.zeros(3), chunks=1)
    assert results["a"].key != results["b"].key
    assert {site: future.result() for site, future in results.items()} == {"a": "a", "b": "b"}
    assert arrays["a"].name != arrays["b"].name


def test_a_task_can_pin_its_children(sites: Any) -> None:
    def parent() -> list[str]:
        with worker_client() as client:
            with pool("b"):
                pinned = client.submit(where, pure=False)
            return [where(), client.submit(where, pure=False).result(), pinned.result()]

    with pool("a"):
        assert sites.client.submit(parent, pure=False).result() == ["a", "a", "b"]


def test_four_tasks_run_at_once_on_the_pools_threads(sites: Any) -> None:
    from distributed import Event

    def meet(i: int) -> int:
        if i == 3:
            Event("all-here").set()
        return int(Event("all-here").wait(timeout=20))

    with pool("a"):
        futures = sites.client.map(meet, range(4), pure=False)
    assert sites.client.gather(futures) == [1, 1, 1, 1]


def test_a_p2p_rechunk_of_pinned_data_stays_in_its_pool(sites: Any, data: Any, rules: str) -> None:
    with pool("b"):
        x = blockwise(sites, "b")
    with measure_traffic() as traffic:
        y = x.rechunk(70, method="p2p").persist()
        wait(y, timeout=60)
    assert {pair for pair in traffic.bytes_between_pools if "client" not in pair} == set()
    np.testing.assert_array_equal(y.compute(), data["b"])


def test_explain_counts_tasks_and_bytes(both: Any, sites: Any) -> None:
    a, b = both
    plan = explain((a + 1).sum() - b.sum())
    assert set(plan.tasks_by_pool) == {"a", "b"}
    assert sum(plan.bytes_between_pools.values()) < 3 * 8 + 200
    assert "a" in str(plan)
    assert "<table>" in plan._repr_html_()
    assert plan.pool_of(a.__dask_keys__()[0]) == "a"


def test_a_collection_can_be_placed_at_once(both: Any, data: Any) -> None:
    placed = propagate_pools_in_collection(both[0].sum() + both[1].sum())
    np.testing.assert_allclose(placed.compute(), data["a"].sum() + data["b"].sum())
    assert get_pool(placed) in {"a", "b"}


@pytest.mark.parametrize("name", ["", "a b", "a,b", "a=1", "pool-a", 3, "tab\t"])
def test_a_name_that_cannot_be_a_pool_is_refused(name: Any) -> None:
    with pytest.raises(PoolNameError, match="cannot be the name of a pool"):
        pool(name)


def test_work_for_a_pool_that_nobody_has_fails_with_its_name(sites: Any) -> None:
    sites.client.run_on_scheduler(_set_timeout, "1s")
    try:
        with pool("c"):
            future = sites.client.submit(where, pure=False)
        with pytest.raises(UnknownPoolError, match=r"pool 'c'.*a, b"):
            future.result(timeout=30)
        with pool("c"), pytest.raises(UnknownPoolError, match="pool 'c'"):
            da.zeros(4, chunks=2).sum().compute()
        with pool("c"), pytest.raises(UnknownPoolError, match="pool 'c'"):
            sites.client.scatter(1)
    finally:
        sites.client.run_on_scheduler(_set_timeout, "30s")
    with pool("a"):
        assert sites.client.submit(where, pure=False).result() == "a"


def _set_timeout(value: str) -> None:
    dask.config.set({"meshcompute.missing-pool-timeout": value})


def test_an_object_that_cannot_be_pickled_leaves_everything_usable(sites: Any) -> None:
    with pool("a"):
        lock = contextlib.nullcontext(iter([1]).__iter__)
        with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
            sites.client.submit(lambda: sys._getframe() and lock, workers=None, key=None, pure=False, x=_unpicklable())
        assert sites.client.submit(where, pure=False).result() == "a"


def _unpicklable() -> object:
    return sys._getframe()


def test_a_cluster_without_pools_is_told_so() -> None:
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster),
        pytest.raises(PoolsMissingError, match="--resources pool-ecmwf=1"),
    ):
        propagate_pools()
