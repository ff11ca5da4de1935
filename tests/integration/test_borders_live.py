"""Values that must not leave their pools, on a live scheduler: what it refuses, whoever asks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from dask import delayed
from distributed import Client, Event, Future, futures_of, get_worker, wait
from distributed.worker_client import worker_client
from waiting import wait_until

from meshcompute import errors, explain, may_leave, measure_traffic, pool, propagate_pools


def raw(shape: tuple[int, int] = (400, 400)) -> da.Array:
    """Chunks of 320 kB at pool a that must not leave it."""
    with pool("a", never_leave=True):
        return da.map_blocks(
            lambda block: block + hash(get_worker().name) * 0, da.ones(shape, chunks=(100, shape[1])), dtype=float
        )


def holders(client: Client, key: Any) -> set[str]:
    """Sites that hold a value, as the scheduler itself knows; clients are not told."""

    def ask(dask_scheduler: Any) -> list[str]:
        return [ws.name.split("-")[0] for ws in dask_scheduler.tasks[key].who_has or ()]

    return set(client.run_on_scheduler(ask))


@pytest.fixture
def held(sites: Any) -> Iterator[list[Future]]:
    """Raw chunks in the memory of pool a."""
    futures = futures_of(raw().persist())
    wait(futures)
    assert set().union(*[holders(sites.client, future.key) for future in futures]) == {"a"}
    sites.client.publish_dataset(futures[0], name="raw", override=True)
    yield futures
    sites.client.unpublish_dataset("raw")


@pytest.fixture
def stranger(sites: Any) -> Any:
    """A client that says nothing about pools."""
    with Client(sites.mesh.scheduler_address, set_as_default=False) as client, dask.annotate():
        yield client


@pytest.mark.parametrize("is_propagating", [False, True])
def test_compute_of_raw_data_fails_before_anything_runs(is_propagating: bool, sites: Any) -> None:
    with dask.config.set({"meshcompute.propagate": is_propagating}):
        for wanted in (raw(), raw().mean()):
            with pytest.raises(errors.SovereigntyError, match="the client"):
                wanted.compute()


def test_a_reduction_that_may_leave_comes_and_nothing_else_crosses(sites: Any) -> None:
    with propagate_pools(), measure_traffic() as traffic:
        assert may_leave(raw().mean()).compute() == 1
    crossed = {pair: n for pair, n in traffic.bytes_between_pools.items() if pair[0] == "a"}
    assert sum(crossed.values()) < 1000


def test_a_reduction_that_may_leave_is_worked_on_at_another_site(sites: Any) -> None:
    partial = may_leave(raw().sum(0))
    with pool("b"):
        other = da.random.random((400, 400), chunks=(100, 400))
    with propagate_pools(), measure_traffic() as traffic:
        assert (partial + other).sum().compute() > 400 * 400 * 400
    assert 400 * 8 <= traffic.bytes_between_pools["a", "b"] < 50_000


def test_a_reduction_of_raw_and_other_data_is_regrouped_where_the_raw_data_is(sites: Any) -> None:
    blocks = []
    for i in range(24):
        with pool("ab"[i % 2], never_leave=i % 2 == 0):
            blocks.append(da.random.default_rng(i).random((2, 5000), chunks=-1))
    reduced = may_leave(da.concatenate(blocks).std(0))
    with propagate_pools(), measure_traffic() as traffic:
        plan = explain(reduced)
        result = reduced.compute()
    with dask.config.set(scheduler="sync"):
        np.testing.assert_allclose(result, reduced.compute())
    assert "1 reductions regrouped" in str(plan)
    assert traffic.bytes_between_pools.get(("a", "b"), 0) == 0
    assert 5000 * 8 <= traffic.bytes_between_pools["b", "a"] <= 5000 * 8 * 2 + 1000  # totals and squares, once


def test_gather_is_refused_to_every_client(held: list[Future], stranger: Client, sites: Any) -> None:
    with pytest.raises(errors.SovereigntyError, match="a client"):
        sites.client.gather(held)
    with pytest.raises(errors.SovereigntyError, match="a client"):
        sites.client.gather(held, direct=True)
    with pytest.raises(errors.SovereigntyError, match="a client"):
        stranger.gather(stranger.get_dataset("raw"))
    with pytest.raises(errors.SovereigntyError, match="a client"):
        held[0].result()


def test_a_client_is_not_told_where_such_values_are(held: list[Future], sites: Any) -> None:
    with pytest.raises(errors.SovereigntyError, match="a client"):
        sites.client.who_has(held[:1])
    assert held[0].key not in sites.client.who_has()


def test_a_task_elsewhere_is_refused(held: list[Future], sites: Any) -> None:
    with pool("b"):
        total = sites.client.submit(np.sum, held[0])
    with pytest.raises(errors.SovereigntyError, match="pool b"):
        total.result()


def test_a_task_of_a_client_without_pools_is_kept_in_the_pool_and_so_is_its_result(
    held: list[Future], stranger: Client, sites: Any
) -> None:
    total = stranger.submit(np.sum, stranger.get_dataset("raw"))
    double = stranger.submit(lambda x: 2 * x, total)
    wait([total, double])
    assert holders(sites.client, total.key) == holders(sites.client, double.key) == {"a"}
    for future in (total, double):
        with pytest.raises(errors.SovereigntyError, match="a client"):
            future.result()


def test_a_task_of_a_client_without_pools_that_names_workers_elsewhere_is_refused(
    held: list[Future], stranger: Client, sites: Any
) -> None:
    elsewhere = list(sites.workers("b").values())
    for options in ({}, {"allow_other_workers": True}):
        total = stranger.submit(np.sum, stranger.get_dataset("raw"), workers=elsewhere, pure=False, **options)
        with pytest.raises(errors.SovereigntyError, match="elsewhere"):
            total.result()
    here = stranger.submit(np.sum, stranger.get_dataset("raw"), workers=list(sites.workers("a").values()))
    wait(here)
    assert here.status == "finished"


def test_copies_elsewhere_are_refused(held: list[Future], sites: Any) -> None:
    with pytest.raises(errors.SovereigntyError, match="replicate"):
        sites.client.replicate(held)
    with pytest.raises(errors.SovereigntyError, match="rebalance"):
        sites.client.rebalance(held)
    sites.client.rebalance()
    assert set().union(*[holders(sites.client, future.key) for future in held]) == {"a"}


def test_a_task_cannot_gather_such_values_into_another_pool(held: list[Future], sites: Any) -> None:
    def gathers() -> str:
        with worker_client() as client:
            try:
                client.get_dataset("raw").result()
            except Exception as exc:
                return f"{type(exc).__name__}: {exc}"
        return "got it"

    with pool("b"):
        said = sites.client.submit(gathers, pure=False).result()
    assert "must not leave" in said


def test_what_is_submitted_in_such_a_block_stays(sites: Any) -> None:
    with pool("a", never_leave=True):
        loaded = sites.client.submit(np.ones, 7, pure=False)
    wait(loaded)
    assert holders(sites.client, loaded.key) == {"a"}
    with pytest.raises(errors.SovereigntyError):
        loaded.result()
    with pytest.raises(errors.UnsupportedPinError, match="scatter"), pool("a", never_leave=True):
        sites.client.scatter([1, 2, 3])


def test_the_last_step_of_compute_in_such_a_block_may_leave_with_what_it_works_on(sites: Any) -> None:
    with pool("a", never_leave=True), propagate_pools():
        assert may_leave(raw().mean()).compute() == 1


def test_work_without_such_values_goes_on_as_before(held: list[Future], stranger: Client, sites: Any) -> None:
    assert stranger.submit(sum, [1, 2]).result() == 3
    with propagate_pools(), pool("b"):
        assert da.ones((100, 100), chunks=50).sum().compute() == 10_000


def test_retiring_a_worker_keeps_such_values_in_their_pool(start_sites: Any) -> None:
    sites = start_sites()
    futures = futures_of(sites.client.persist(raw()))
    wait(futures)
    first = next(iter(sites.workers("a").values()))
    sites.client.retire_workers([first], close_workers=False)
    wait_until(lambda: set().union(*[holders(sites.client, f.key) for f in futures]) == {"a"}, "all values in pool a")


@pytest.mark.parametrize("is_there", [True, False])
def test_a_value_that_is_there_or_on_its_way_without_borders_gets_those_that_a_later_graph_gives_it(
    is_there: bool, sites: Any
) -> None:
    gate = Event(f"open, {is_there}")

    def load(n: int) -> np.ndarray:
        gate.wait()
        return np.ones(n)

    name = f"raw-{is_there}"
    with pool("a"):
        free = sites.client.compute(delayed(load)(1000, dask_key_name=name))
    try:
        if is_there:
            gate.set()
            wait(free)
        with pool("a", never_leave=True):
            confined = delayed(load)(1000, dask_key_name=name).persist()
        wait_until(
            lambda: sites.client.run_on_scheduler(stays, key=name) == ("a",), "the border of a value that is there"
        )
    finally:
        gate.set()
    wait(free)
    with pytest.raises(errors.SovereigntyError):
        sites.client.gather(free)
    with pool("b"), pytest.raises(errors.SovereigntyError):
        delayed(np.sum)(confined).persist().compute()


def stays(key: str, dask_scheduler: Any = None) -> tuple[str, ...]:
    ts = dask_scheduler.tasks.get(key)
    return tuple(getattr(ts.resource_restrictions, "stays", ())) if ts is not None else ()
