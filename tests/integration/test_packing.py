"""Values between sites travel packed, those inside a site do not, and nobody sees a difference but in the bytes."""

from __future__ import annotations

import os
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
from distributed import Client, wait, worker_client
from waiting import wait_until

from meshcompute import explain, measure_traffic, pool, propagate_pools
from meshcompute.clients import ensure_guard

NBYTES = 960 * 1280 * 4


PATIENCE_SECONDS = 60


def field(seed: int) -> Any:
    """A smooth field of 4.69 MiB, rounded to one decimal; never the same for two seeds."""
    y, x = np.linspace(0, 6, 960)[:, None], np.linspace(0, 9, 1280)
    return (280 + 10 * np.sin(y + seed) * np.cos(x)).round(1).astype("f4")


def announcements(client: Client) -> list[Any]:
    """What workers and scheduler say as they connect."""

    def said(server: Any) -> Any:
        return (server.rpc.connection_args.get("handshake_overrides") or {}).get("meshcompute")

    answers = client.run(lambda dask_worker: said(dask_worker)).values()  # noqa: PLW0108 - Dask looks at the name
    return [*answers, client.run_on_scheduler(lambda dask_scheduler: said(dask_scheduler))]  # noqa: PLW0108 - as above


@contextmanager
def compression(client: Client, mode: str) -> Iterator[None]:
    """The setting, in force on every worker."""

    def modes() -> set[str]:
        return set(
            client.run(
                lambda dask_worker: getattr(dask_worker.plugins.get("meshcompute-packing"), "mode", None)
            ).values()
        )

    with dask.config.set({"meshcompute.compression": mode}):
        ensure_guard(client)  # as propagate_pools() does with the default client
        wait_until(lambda: modes() == {mode}, "the workers know the setting", PATIENCE_SECONDS)
        wait_until(
            lambda: all(announcements(client)) == (mode != "off"), "everybody says what it can unpack", PATIENCE_SECONDS
        )
        yield


@pytest.fixture
def packed(sites: Any) -> Iterator[Any]:
    """Sites between which values are packed, although they are on one machine."""
    with compression(sites.client, "zstd"):
        yield sites
    with compression(sites.client, "auto"):
        pass


def cross(client: Client, seed: int, *, source: str = "a", destination: str = "b") -> Any:
    """Make a field in one pool and read it in another; its checksum there."""
    with pool(source):
        value = client.submit(field, seed, pure=False)
    with pool(destination):
        there = client.submit(lambda x: (x.tobytes(), x.flags.writeable, x.dtype.str), value, pure=False)
    wait(there)
    with pool(destination):
        same = client.submit(lambda x, seed: x == (field(seed).tobytes(), True, "<f4"), there, seed, pure=False)
    return same.result()


def kernels_bytes(client: Client, workers: dict[str, str], of: dict[str, str]) -> int:
    """Bytes that connections of some workers to others have received, as the kernel counted them."""

    def received(addresses: list[str], dask_worker: Any) -> int:
        import socket
        import struct

        comms = [comm for address in addresses for comm in dask_worker.rpc.available[address]]
        info = [c.stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256) for c in comms if c.stream]
        return sum(struct.unpack_from("Q", data, 128)[0] for data in info)

    return sum(client.run(received, list(of.values()), workers=list(workers.values())).values())


def test_a_field_that_crosses_is_sent_packed_and_arrives_as_it_was(packed: Any) -> None:
    client = packed.client
    before = kernels_bytes(client, packed.workers("b"), packed.workers("a"))
    with measure_traffic() as traffic:
        assert cross(client, 1)
    sent = traffic.wire_bytes_between_pools["a", "b"]
    assert traffic.bytes_between_pools["a", "b"] == NBYTES
    assert 10_000 < sent < 0.5 * NBYTES
    # Connections stay open for the next transfer, so that the kernel still knows them.
    assert sent <= kernels_bytes(client, packed.workers("b"), packed.workers("a")) - before < sent + 20_000


def test_inside_a_pool_nothing_is_packed(packed: Any) -> None:
    client = packed.client
    first, second = packed.workers("a").values()
    value = client.submit(field, 2, workers=[first], pure=False)
    wait(value)

    def sent(dask_worker: Any) -> list[int]:
        return [entry["compressed"] for entry in dask_worker.transfer_outgoing_log if entry["total"] == NBYTES]

    before = len(client.run(sent, workers=[first])[first])
    assert client.submit(np.shape, value, workers=[second], pure=False).result() == (960, 1280)
    (nbytes,) = wait_until(
        lambda: client.run(sent, workers=[first])[first][before:], "the transfer is logged", PATIENCE_SECONDS
    )
    assert nbytes > NBYTES


def test_a_result_comes_packed_to_the_clients_side(packed: Any) -> None:
    with pool("b"):
        value = packed.client.submit(field, 3, pure=False)
    with measure_traffic() as traffic:
        there = value.result()
    np.testing.assert_array_equal(there, field(3))
    assert there.flags.writeable
    assert traffic.bytes_between_pools == {("b", "client"): NBYTES}
    assert traffic.wire_bytes_between_pools["b", "client"] < 0.5 * NBYTES


def test_a_client_that_knows_no_codec_reads_every_result(packed: Any) -> None:
    with pool("b"):
        value = packed.client.submit(field, 4, pure=False)
    packed.client.publish_dataset(value, name="field")
    code = (
        "import sys; sys.modules['numcodecs'] = sys.modules['meshcompute'] = None\n"
        "from distributed import Client\n"
        "with Client(sys.argv[1]) as client:\n"
        "    print(client.get_dataset('field').result().sum(dtype='f8'))\n"
        "    print(client.get_dataset('field').result().shape)"
    )
    with measure_traffic() as traffic:
        command = [sys.executable, "-c", code, packed.mesh.scheduler_address]
        run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    packed.client.unpublish_dataset("field")
    assert run.stdout.splitlines() == [str(field(4).sum(dtype="f8")), "(960, 1280)"]
    assert traffic.wire_bytes_between_pools["b", "client"] < NBYTES


def test_arrays_and_persisted_data_are_the_same_with_and_without(packed: Any) -> None:
    def difference() -> Any:
        with pool("a"):
            a = da.from_delayed(dask.delayed(field)(5), (960, 1280), dtype="f4").rechunk((240, 1280))
        with pool("b"):
            b = da.from_delayed(dask.delayed(field)(6), (960, 1280), dtype="f4").rechunk((240, 1280))
        with propagate_pools():
            return (a - b).persist()

    with measure_traffic() as traffic:
        with_packing = difference()
        wait(with_packing)
    crossing = sum(traffic.bytes_between_pools.values())
    assert crossing >= NBYTES
    assert sum(traffic.wire_bytes_between_pools.values()) < 0.5 * crossing
    np.testing.assert_array_equal(with_packing.compute(), field(5) - field(6))


def test_the_plan_says_that_its_bytes_are_an_upper_bound(packed: Any) -> None:
    with pool("a"):
        a = da.ones((1000, 1000), chunks=500)
    with pool("b"):
        b = da.ones((1000, 1000), chunks=500)
    plan = explain(a - b)
    assert plan.compression == "zstd"
    assert "at most: values that cross are packed (zstd)" in str(plan)
    assert "at most" in plan._repr_html_()
    assert sum(plan.bytes_between_pools.values()) >= 8_000_000
    with dask.config.set({"meshcompute.compression": "off"}):
        assert "at most" not in str(explain(a - b))
    with dask.config.set({"meshcompute.compression": "auto"}):
        assert "zstd or lz4, where that is sooner across" in str(explain(a - b))
    with dask.config.set({"meshcompute.compression": "gzip"}), pytest.raises(ValueError, match="gzip"):
        explain(a - b)


def test_noise_goes_plain(packed: Any) -> None:
    with pool("a"):
        value = packed.client.submit(os.urandom, 4_000_000, pure=False)
    with pool("b"), measure_traffic() as traffic:
        assert packed.client.submit(len, value, pure=False).result() == 4_000_000
    assert 4_000_000 <= traffic.wire_bytes_between_pools["a", "b"] < 4_010_000


def test_a_task_that_gathers_with_a_client_of_its_own_gets_what_it_asked_for(packed: Any) -> None:
    with pool("a"):
        value = packed.client.submit(field, 7, pure=False)
    packed.client.publish_dataset(value, name="seven")

    def gather_inside() -> float:
        with worker_client() as client:
            return float(client.get_dataset("seven").result().sum(dtype="f8"))

    with pool("b"):
        assert packed.client.submit(gather_inside, pure=False).result() == float(field(7).sum(dtype="f8"))
    packed.client.unpublish_dataset("seven")


def test_copies_that_the_scheduler_asks_for_arrive(packed: Any) -> None:
    client = packed.client
    value = client.submit(field, 8, workers=list(packed.workers("a").values()), pure=False)
    wait(value)
    client.replicate([value])
    holders = client.who_has(value)[value.key]
    assert len(holders) == 4
    sums = client.run(lambda dask_worker: float(dask_worker.data[value.key].sum(dtype="f8")))
    assert set(sums.values()) == {float(field(8).sum(dtype="f8"))}


def test_dasks_own_metrics_know_what_packing_costs(packed: Any) -> None:
    def seconds(dask_worker: Any) -> tuple[float, float]:
        digests = dask_worker.digests_total
        packing = digests.get(("get-data", "compress", "seconds"), 0.0)
        return packing, sum(v for k, v in digests.items() if "decompress" in k and k[-1] == "seconds")

    before = packed.client.run(seconds)
    assert cross(packed.client, 9)
    after = packed.client.run(seconds)
    spent = {pool: [after[w][0] - before[w][0] for w in packed.workers(pool).values()] for pool in "ab"}
    assert 0 < sum(spent["a"]) < 10
    assert sum(after[w][1] - before[w][1] for w in packed.workers("b").values()) > 0


def test_on_one_machine_and_where_it_is_off_values_go_plain(packed: Any) -> None:
    for mode in ("off", "auto"):
        with compression(packed.client, mode), measure_traffic() as traffic:
            assert cross(packed.client, 10)
        assert traffic.wire_bytes_between_pools["a", "b"] > NBYTES
    with compression(packed.client, "off"):
        assert not any(announcements(packed.client))
    with compression(packed.client, "lz4"), measure_traffic() as traffic:
        assert cross(packed.client, 11)
    assert traffic.wire_bytes_between_pools["a", "b"] < NBYTES


def test_work_of_a_client_that_says_nothing_leaves_the_setting_alone(packed: Any) -> None:
    with dask.config.set({"meshcompute": {}}):
        assert cross(packed.client, 12)
    modes = packed.client.run(lambda dask_worker: dask_worker.plugins["meshcompute-packing"].mode)
    assert set(modes.values()) == {"zstd"}


def test_workers_are_told_what_was_said_of_links_and_forget_what_is_taken_back(packed: Any) -> None:
    def given() -> set[Any]:
        return set(packed.client.run(lambda dask_worker: dask_worker.plugins["meshcompute-packing"].given).values())

    for links, told in (
        ([{"from": "a", "to": "b", "bandwidth": "4 MB/s"}, {"from": "b", "to": "a", "cost": 1}], (("a", "b", 4e6),)),
        ([], ()),
    ):
        with dask.config.set({"meshcompute.links": links}):
            assert cross(packed.client, 22)  # whatever comes next brings the news
        wait_until(lambda told=told: given() == {told}, f"the workers know {told}", PATIENCE_SECONDS)


def test_a_codec_that_fails_costs_one_line_in_the_log_and_nothing_else(packed: Any) -> None:
    def breaks(dask_worker: Any) -> None:
        from numcodecs import blosc

        def compress(*_: Any, **__: Any) -> bytes:
            raise RuntimeError("out of luck")

        blosc.kept, blosc.compress = blosc.compress, compress

    def mends(dask_worker: Any) -> None:
        from numcodecs import blosc

        blosc.compress = blosc.kept
        del blosc.kept

    packed.client.run(breaks)
    try:
        with measure_traffic() as traffic:
            for seed in (13, 14, 15):
                assert cross(packed.client, seed)
    finally:
        packed.client.run(mends)
    assert traffic.wire_bytes_between_pools["a", "b"] > 3 * NBYTES
    logs = [packed.mesh.log(name) for name in packed.workers("a")]
    assert 1 <= sum("out of luck" in log for log in logs) <= 2
    assert all(log.count("out of luck") <= 1 for log in logs)


@contextmanager
def extra_worker(address: str, folder: Path, pool: str, **environment: str) -> Iterator[None]:
    command = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--name", f"{pool}-1-0", "--no-nanny"]
    command += ["--resources", f"pool-{pool}=1", "--no-dashboard", "--local-directory", str(folder)]
    with (
        (folder / "worker.log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **environment}) as process,
    ):
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def test_a_worker_that_joins_later_sends_and_reads_packed_values(packed: Any, tmp_path: Path) -> None:
    client = packed.client
    with extra_worker(packed.mesh.scheduler_address, tmp_path, "late"):
        wait_until(lambda: packed.workers("late"), "the worker joins", PATIENCE_SECONDS)
        wait_until(lambda: all(announcements(client)), "it says what it can unpack", PATIENCE_SECONDS)
        with measure_traffic() as traffic:
            assert cross(client, 16, source="a", destination="late")
            assert cross(client, 17, source="late", destination="b")
    assert traffic.wire_bytes_between_pools["a", "late"] < 0.5 * NBYTES
    assert traffic.wire_bytes_between_pools["late", "b"] < 0.5 * NBYTES
    wait_until(lambda: not packed.workers("late"), "the worker leaves", PATIENCE_SECONDS)


def test_a_worker_without_the_codec_sends_and_gets_plain_values(packed: Any, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['numcodecs'] = None\n")
    client = packed.client
    with extra_worker(packed.mesh.scheduler_address, tmp_path, "poor", PYTHONPATH=str(tmp_path)):
        (address,) = wait_until(lambda: list(packed.workers("poor").values()), "the worker joins", PATIENCE_SECONDS)
        opening = "meshcompute-packing"
        wait_until(
            lambda: client.run(lambda dask_worker: dask_worker.plugins[opening]._opening.done(), workers=[address])[
                address
            ],
            "it has looked for codecs",
            PATIENCE_SECONDS,
        )
        with measure_traffic() as traffic:
            assert cross(client, 18, source="a", destination="poor")
            assert cross(client, 19, source="poor", destination="b")
    assert traffic.wire_bytes_between_pools["a", "poor"] > NBYTES
    assert traffic.wire_bytes_between_pools["poor", "b"] > NBYTES
    wait_until(lambda: not packed.workers("poor"), "the worker leaves", PATIENCE_SECONDS)


def test_workers_and_a_scheduler_without_meshcompute_pack_too(stock_sites: Any) -> None:
    client = stock_sites.client
    with compression(client, "zstd"), measure_traffic(client) as traffic:
        assert cross(client, 20)
        with pool("b"):
            np.testing.assert_array_equal(client.submit(field, 21).result(), field(21))
    assert traffic.wire_bytes_between_pools["a", "b"] < 0.5 * NBYTES
    assert traffic.wire_bytes_between_pools["b", "client"] < 0.5 * NBYTES
