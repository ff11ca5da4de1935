"""Measured bytes against known sizes, on a scheduler in its own process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from distributed import Client, LocalCluster, get_task_stream, performance_report, wait, worker_client
from waiting import wait_until

from meshcompute import pool, propagate_pools
from meshcompute.errors import PoolsMissingError
from meshcompute.traffic import Traffic, measure_traffic

IN_A, IN_B = {"pool-a": 0}, {"pool-b": 0}
MB = 1_000_000


def ones(client: Client, n_bytes: int, where: dict[str, int]) -> Any:
    """A value of known size in a pool."""
    future = client.submit(np.ones, n_bytes // 8, resources=where, pure=False)
    wait(future)
    return future


def left_behind(client: Client) -> dict[str, Any]:
    """What a block has put on workers and scheduler and that is still there."""

    def look(dask_worker: Any) -> list[str]:
        import distributed.client
        from distributed.shuffle._core import ShuffleRun

        functions = {
            "_send": ShuffleRun._send,
            "gather_from_workers": distributed.client.gather_from_workers,
            "update_data": dask_worker.handlers["update_data"],
            "compute-task": dask_worker.stream_handlers["compute-task"],
            "append": type(dask_worker.transfer_outgoing_log).append,
        }
        ours = [name for name, f in functions.items() if "meshcompute" in str(getattr(f, "__code__", None))]
        names = [*dask_worker.plugins, *vars(dask_worker)]
        return ours + [name for name in names if name.startswith(("meshcompute-traffic", "_meshcompute_tap"))]

    def look_at_scheduler(dask_scheduler: Any) -> list[str]:
        names = [*dask_scheduler._broker._topics, *dask_scheduler.worker_plugins]
        return [name for name in names if name.startswith("meshcompute-traffic")]

    found = {address: names for address, names in client.run(look).items() if names}
    at_scheduler = client.run_on_scheduler(look_at_scheduler)
    return found | ({"scheduler": at_scheduler} if at_scheduler else {})


@contextmanager
def extra_worker(scheduler: str, folder: Path, name: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """One more worker from the command line; ended by its pid."""
    command = [sys.executable, "-m", "distributed.cli.dask_worker", scheduler, "--name", name, "--no-dashboard"]
    command += ["--nthreads", "1", "--memory-limit", "0", "--local-directory", str(folder), *options]
    with (folder / f"{name}.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def test_a_value_that_crosses_once_counts_with_its_exact_size(sites: Any) -> None:
    client = sites.client
    with measure_traffic() as traffic:
        value = ones(client, 8 * MB, IN_A)
        assert client.submit(len, value, resources=IN_B).result() == MB
    assert traffic.bytes_between_pools["a", "b"] == 8 * MB
    assert 8 * MB <= traffic.wire_bytes_between_pools["a", "b"] < 1.01 * 8 * MB
    assert traffic.transfers_between_pools["a", "b"] == 1
    assert ("b", "a") not in traffic.bytes_between_pools
    assert all(source != destination for source, destination in traffic.bytes_between_pools)
    assert traffic.bytes_between_pools["b", "client"] < 100
    assert 0 < traffic.duration_seconds < 60
    assert traffic.warnings == ()
    assert left_behind(client) == {}


@pytest.mark.parametrize("direct", [False, True])
def test_a_result_counts_as_sent_to_the_client(sites: Any, *, direct: bool) -> None:
    value = ones(sites.client, 8 * MB, IN_B)
    with measure_traffic(sites.client) as traffic:
        sites.client.gather(value, direct=direct)
    assert traffic.bytes_between_pools == {("b", "client"): 8 * MB}
    assert traffic.bytes_by_kind == {"result": 8 * MB}
    assert traffic.transfers == 1


@pytest.mark.parametrize("direct", [False, True])
def test_scattered_data_counts_as_sent_by_the_client(sites: Any, *, direct: bool) -> None:
    workers = list(sites.workers("b").values())
    with measure_traffic() as traffic:
        future = sites.client.scatter(np.random.default_rng().random(500_000), workers=workers, direct=direct)
        wait(future)
    assert traffic.bytes_between_pools == {("client", "b"): 4 * MB}
    assert traffic.bytes_by_kind == {"scatter": 4 * MB}


def test_data_inside_a_task_counts_as_sent_by_the_client(sites: Any) -> None:
    data = np.random.default_rng().random(625_000)
    with measure_traffic() as traffic, dask.config.set({"distributed.admin.large-graph-warning-threshold": "1GB"}):
        assert sites.client.submit(len, data, resources=IN_A).result() == len(data)
        with pool("b"):
            array = da.from_array(data, chunks=312_500, name=False)
        total = array.sum().compute()
    assert total == pytest.approx(data.sum())
    assert traffic.bytes_between_pools["client", "a"] == pytest.approx(5 * MB, rel=0.01)
    assert traffic.bytes_between_pools["client", "b"] == pytest.approx(5 * MB, rel=0.01)
    assert traffic.bytes_by_kind["task"] == pytest.approx(10 * MB, rel=0.01)


def test_shards_of_a_p2p_rechunk_count_from_pool_to_pool(sites: Any) -> None:
    addresses = [address for pool in "ab" for address in sites.workers(pool).values()]
    rows = [
        sites.client.submit(np.full, (500, 2000), i, workers=[address], pure=False)
        for i, address in enumerate(addresses)
    ]
    wait(rows)
    array = da.concatenate([da.from_delayed(row, (500, 2000), dtype=float) for row in map(dask.delayed, rows)])
    # Larger chunks than the inputs are not allowed, or Dask puts the inputs together on one worker first.
    config = dask.config.set({"array.chunk-size": "8MB"})
    with config, get_task_stream(sites.client) as stream, measure_traffic() as traffic:
        columns = array.rechunk((2000, 500), method="p2p").persist()
        wait(columns)
    # Each of the four inputs sends a quarter of its 8 MB to each of the four outputs, from where it was cut up.
    senders = [task["worker"] for task in stream.data if str(task["key"]).startswith("('rechunk-transfer")]
    receivers = [where[0] for where in sites.client.who_has(columns).values()]
    pool_of = {address: pool for pool in "ab" for address in sites.workers(pool).values()}
    n_crossing = sum(pool_of[sender] != pool_of[receiver] for sender in senders for receiver in receivers)
    assert len(senders) == len(receivers) == 4
    assert n_crossing > 0
    assert traffic.bytes_by_kind["shuffle"] == pytest.approx(n_crossing * 2 * MB, rel=0.01)
    np.testing.assert_array_equal(columns[:, 0].compute(), np.repeat(np.arange(4), 500))


@pytest.mark.usefixtures("sites")
def test_a_p2p_rechunk_inside_one_pool_crosses_nothing() -> None:
    with pool("a"):
        array = da.ones((1000, 1000), chunks=(250, 1000))
    with propagate_pools(), measure_traffic() as traffic:
        columns = array.rechunk((1000, 250), method="p2p").persist()
        wait(columns)
    assert "shuffle" not in traffic.bytes_by_kind
    assert sum(traffic.bytes_between_pools.values()) < 100_000


def test_a_task_that_gathers_with_a_client_of_its_own_is_no_client(sites: Any) -> None:
    def gather_inside(workers: list[str]) -> int:
        with worker_client() as client:
            return int(client.submit(np.ones, MB, workers=workers, pure=False).result().nbytes)

    with measure_traffic() as traffic:
        inside = sites.client.submit(gather_inside, list(sites.workers("a").values()), resources=IN_B, pure=False)
        assert inside.result() == 8 * MB
    assert traffic.bytes_between_pools["a", "b"] == 8 * MB
    assert ("a", "client") not in traffic.bytes_between_pools


def test_blocks_one_after_the_other_share_nothing_and_nested_ones_both_count(sites: Any) -> None:
    client = sites.client
    first, second, third = (ones(client, n * MB, IN_A) for n in (1, 2, 4))
    with measure_traffic() as outer:
        with measure_traffic() as one:
            # On a worker five hooks, one tap and two plugins; on the scheduler two plugins and two topics.
            assert {len(names) for names in left_behind(client).values()} == {8, 4}
            client.gather(first)
        with measure_traffic() as two:
            client.gather(second)
        client.gather(third)
    client.gather(third)
    totals = [traffic.bytes_between_pools for traffic in (one, two, outer)]
    assert totals == [{("a", "client"): n * MB} for n in (1, 2, 7)]
    assert left_behind(client) == {}


def test_a_transfer_in_flight_at_the_end_is_waited_for(sites: Any) -> None:
    client = sites.client
    value = ones(client, 100 * MB, IN_A)

    def begun() -> int:
        return sum(client.run(lambda dask_worker: dask_worker.transfer_outgoing_count_total).values())

    before = begun()
    with measure_traffic() as traffic:
        size = client.submit(len, value, resources=IN_B, pure=False)
        wait_until(lambda: begun() > before, "the transfer begins")
    assert traffic.bytes_between_pools["a", "b"] == 100 * MB
    assert traffic.warnings == ()
    size.result()


def test_figures_can_be_read_inside_the_block(sites: Any) -> None:
    value = ones(sites.client, MB, IN_A)
    with measure_traffic() as traffic:
        assert traffic.bytes_between_pools == {}
        assert "Nothing crossed" in str(traffic)
        sites.client.gather(value)
        assert traffic.bytes_between_pools == {("a", "client"): MB}
        assert "client" in str(traffic)
        assert "open" in repr(traffic)
    assert "0.95 MiB" in traffic._repr_html_()


def test_the_log_keeps_its_entries_and_its_identity(sites: Any) -> None:
    value = ones(sites.client, MB, IN_A)
    sites.client.gather(value)

    def log_of(dask_worker: Any) -> tuple[int, list[int]]:
        log = dask_worker.transfer_outgoing_log
        return id(log), [entry["total"] for entry in log]

    before = sites.client.run(log_of)
    with measure_traffic():
        sites.client.gather(value)
        inside = sites.client.run(log_of)
    after = sites.client.run(log_of)
    assert {address: log[0] for address, log in after.items()} == {address: log[0] for address, log in before.items()}
    assert {address: log[1] for address, log in after.items()} == {address: log[1] for address, log in inside.items()}
    assert sum(len(log[1]) for log in after.values()) == sum(len(log[1]) for log in before.values()) + 1


def test_an_error_inside_the_block_passes_and_the_counters_go(sites: Any) -> None:
    with pytest.raises(ZeroDivisionError), measure_traffic() as traffic:
        sites.client.submit(lambda: 1 / 0, resources=IN_A, pure=False).result()
    assert traffic.bytes_between_pools == {}
    assert left_behind(sites.client) == {}
    with pytest.raises(RuntimeError, match="measure_traffic"), traffic:
        pass


def test_an_asynchronous_client_measures_with_async_with(sites: Any) -> None:
    async def run() -> Traffic:
        async with Client(sites.mesh.scheduler_address, asynchronous=True, set_as_default=False) as client:
            value = client.submit(np.ones, MB // 8, resources=IN_A, pure=False)
            await value
            with pytest.raises(TypeError, match="async with"), measure_traffic(client):
                pass
            async with measure_traffic(client) as traffic:
                await client.gather(value)
                await traffic.refresh()
                assert traffic.bytes_between_pools == {("a", "client"): MB}
            return traffic

    assert asyncio.run(run()).bytes_between_pools == {("a", "client"): MB}
    assert left_behind(sites.client) == {}


def test_a_worker_that_joins_or_leaves_inside_the_block_counts(start_sites: Any, tmp_path: Path) -> None:
    sites = start_sites(isolated=False)
    client, address = sites.client, sites.mesh.scheduler_address
    with measure_traffic(client) as traffic:
        with extra_worker(address, tmp_path, "c-1-0", "--resources", "pool-c=1", "--nanny") as process:
            wait_until(lambda: "c-1-0" in sites.workers("c"), "the worker joins")
            value = ones(client, 8 * MB, {"pool-c": 0})
            client.submit(len, value, resources=IN_A).result()
            client.retire_workers([sites.workers("c")["c-1-0"]])
            process.wait(30)
        client.gather(ones(client, MB, IN_B))
    assert traffic.bytes_between_pools["c", "a"] == 8 * MB
    assert traffic.bytes_between_pools["b", "client"] >= MB
    assert "c" in traffic.pools
    assert traffic.warnings == ()


def test_a_worker_that_is_killed_is_named_and_the_rest_counts(start_sites: Any, tmp_path: Path) -> None:
    sites = start_sites(isolated=False)
    client, address = sites.client, sites.mesh.scheduler_address
    with (
        extra_worker(address, tmp_path, "d-1-0", "--resources", "pool-d=1", "--no-nanny") as process,
        measure_traffic(client) as traffic,
    ):
        wait_until(lambda: "d-1-0" in sites.workers("d"), "the worker joins")
        lost = sites.workers("d")["d-1-0"]
        value = ones(client, MB, {"pool-d": 0})
        client.gather(value)
        wait_until(lambda: lost in {key[0] for key in traffic._reports}, "the worker reports")
        process.kill()
        wait_until(lambda: not sites.workers("d"), "the worker is lost")
        client.gather(ones(client, 2 * MB, IN_A))
    assert traffic.bytes_between_pools["a", "client"] == 2 * MB
    assert len(traffic.warnings) == 1
    assert lost in traffic.warnings[0]
    assert traffic.warnings[0] in str(traffic)
    assert left_behind(client) == {}


def test_workers_without_meshcompute_count_too(stock_sites: Any) -> None:
    client = stock_sites.client
    with measure_traffic(client) as traffic:
        value = ones(client, 8 * MB, IN_A)
        client.submit(len, value, resources=IN_B).result()
        client.submit(len, np.ones(625_000), resources=IN_A).result()
    assert traffic.bytes_between_pools["a", "b"] == 8 * MB
    assert traffic.bytes_between_pools["client", "a"] == pytest.approx(5 * MB, rel=0.01)
    assert "could not be counted" not in " ".join(traffic.excluded)
    assert left_behind(client) == {}


def test_task_stream_and_performance_report_show_the_transfers(sites: Any, tmp_path: Path) -> None:
    client = sites.client
    page = tmp_path / "report.html"
    value = ones(client, 8 * MB, IN_A)
    with performance_report(filename=str(page)), get_task_stream(client) as stream, measure_traffic() as traffic:
        client.submit(len, value, resources=IN_B, pure=False).result()
    moves = [step for task in stream.data for step in task["startstops"] if step["action"] == "transfer"]
    assert moves
    assert moves[0]["source"] in sites.workers("a").values()
    assert traffic.bytes_between_pools["a", "b"] == 8 * MB
    assert "transfer-len" in page.read_text(encoding="utf-8")


def test_a_cluster_without_pools_is_refused_and_stays_usable() -> None:
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        with pytest.raises(PoolsMissingError, match="pool-"), measure_traffic(client):
            pass
        assert client.submit(sum, [1, 2]).result() == 3
        assert left_behind(client) == {}


def test_workers_in_the_process_of_the_client_are_counted_and_left_as_they_were() -> None:
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0", resources={"pool-a": 1}
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        value = ones(client, MB, IN_A)
        with measure_traffic(client) as traffic:
            client.gather(value, direct=True)
        assert traffic.bytes_between_pools == traffic.wire_bytes_between_pools == {("a", "client"): MB}
        assert left_behind(client) == {}


def test_a_client_that_closes_inside_the_block_is_a_warning(sites: Any) -> None:
    with Client(sites.mesh.scheduler_address, set_as_default=False) as client, measure_traffic(client) as traffic:
        client.close()
    assert traffic.warnings
    assert "closed" in traffic.warnings[0]
    assert traffic.duration_seconds > 0
    (plugin,) = set(left_behind(sites.client)["scheduler"])  # it stays, as the warning says: here is who takes it out
    sites.client.unregister_worker_plugin(plugin)
    assert set(left_behind(sites.client)) == {"scheduler"}
