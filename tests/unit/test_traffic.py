"""What is counted and how it is shown, without a cluster."""

from __future__ import annotations

import functools
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from dask._task_spec import Alias, DataNode, List, Task, TaskRef
from distributed.metrics import time

from meshcompute import transfers
from meshcompute.errors import NoClientError
from meshcompute.traffic import CLIENT, EXCLUDED, UNPOOLED, Traffic, measure_traffic
from meshcompute.transfers import Block, CountingLog, Tap, embedded_nbytes, shards_nbytes


def identity(value: Any) -> Any:
    return value


def worker_of(log: deque[Any]) -> Any:
    return SimpleNamespace(address="tcp://a:1", scheduler_delay=0.0, transfer_outgoing_log=log)


def entry(total: int, who: str | None, *, start: float | None = None) -> dict[str, Any]:
    return {"total": total, "compressed": total // 2, "who": who, "start": time() if start is None else start}


def traffic_of(*rows: tuple[str, str, str, int, int, int], pools: dict[str, tuple[str, ...]]) -> Traffic:
    traffic = Traffic()
    for address, names in pools.items():
        traffic._note_pools(address, names)
    own = {"address": next(iter(pools)), "worker_id": "1", "pools": pools[next(iter(pools))], "missing": []}
    traffic._receive({**own, "n_counted": len(rows), "rows": rows, "is_last": False})
    return traffic


class TestCounting:
    def test_every_append_counts_also_when_the_log_forgets_it(self) -> None:
        worker = worker_of(deque(maxlen=10))
        tap = Tap(worker)
        tap.blocks["x"] = block = Block(time())
        tap._hook_log()
        for _ in range(2500):
            worker.transfer_outgoing_log.append(entry(8, "tcp://b:1"))
        assert block.counts == {("gather", "tcp://a:1", "tcp://b:1"): [2500, 20_000, 10_000]}
        assert len(worker.transfer_outgoing_log) == 10

    def test_the_original_log_comes_back_with_what_was_added(self) -> None:
        original = deque([entry(1, None)], maxlen=3)
        worker = worker_of(original)
        tap = Tap(worker)
        tap._hook_log()
        assert isinstance(worker.transfer_outgoing_log, CountingLog)
        worker.transfer_outgoing_log.append(entry(2, None))
        tap.uninstall()
        assert worker.transfer_outgoing_log is original
        assert [e["total"] for e in original] == [1, 2]
        assert original.maxlen == 3

    def test_a_transfer_belongs_to_the_blocks_in_which_it_began(self) -> None:
        tap = Tap(worker_of(deque()))
        tap.blocks = {"early": Block(10.0), "late": Block(20.0)}
        tap.blocks["early"].until_seconds = 15.0
        for start in (9.0, 12.0, 16.0, 22.0):
            tap.gathered(entry(8, None, start=start))
        assert [block.n_counted for block in tap.blocks.values()] == [1, 1]

    def test_an_entry_that_cannot_be_counted_is_kept_and_named(self) -> None:
        worker = worker_of(deque())
        tap = Tap(worker)
        tap._hook_log()
        worker.transfer_outgoing_log.append({"unknown": 1})
        assert list(worker.transfer_outgoing_log) == [{"unknown": 1}]
        assert len(tap.missing) == 1
        assert "KeyError" in tap.missing[0]

    def test_a_hook_that_finds_no_place_is_named_and_the_others_go_in(self) -> None:
        worker = worker_of(deque())  # it has no handlers
        tap = Tap(worker)
        tap.install()
        try:
            assert any(text.startswith("scattered data") for text in tap.missing)
            assert isinstance(worker.transfer_outgoing_log, CountingLog)
        finally:
            tap.uninstall()


class TestSizes:
    array = np.ones(1000)

    @pytest.mark.parametrize(
        ("node", "nbytes"),
        [
            (Task("x", identity, array), 8000),
            (Task("x", identity, value=array), 8000),
            (Task("x", identity, array, value=array), 16_000),
            (Task("x", functools.partial(identity, array)), 8000),
            (Task("x", identity, List(array, TaskRef("y"), array)), 16_000),
            (Task("x", identity, {"inner": Task("inner", identity, array)}), 8000),
            (Task("x", identity, {"inner": DataNode("inner", array)}), 8000),
            (DataNode("x", array), 8000),
            (DataNode("x", b"0" * 5000), 5000),
            (Task("x", identity, TaskRef("y"), 1, None, slice(1, 2)), 0),
            (Alias("x", "y"), 0),
            (None, 0),
        ],
    )
    def test_values_inside_a_task_count_wherever_they_are(self, node: Any, nbytes: int) -> None:
        assert embedded_nbytes(node) == nbytes

    def test_a_lazy_array_of_a_file_counts_as_what_travels_and_not_as_the_file(self) -> None:
        class Lazy:
            nbytes = 10**12

        assert embedded_nbytes(Task("x", identity, Lazy())) < transfers.EMBEDDED_MIN_NBYTES

    def test_long_lists_count_and_endless_ones_are_an_error_and_no_hang(self) -> None:
        assert embedded_nbytes(Task("x", identity, [self.array] * 100)) == pytest.approx(800_000, rel=0.01)
        endless: list[Any] = []
        endless.append(endless)
        with pytest.raises(RuntimeError, match="parts"):
            embedded_nbytes(Task("x", identity, DataNode("y", endless)))

    def test_xarray_objects_count_with_their_arrays(self) -> None:
        xarray = pytest.importorskip("xarray")
        array = xarray.DataArray(self.array, dims="x", coords={"y": ("x", self.array)})
        assert embedded_nbytes(Task("x", identity, array)) == 16_000
        assert embedded_nbytes(Task("x", identity, array.to_dataset(name="v"))) == 16_000

    def test_shards_count_without_the_numbers_of_their_partitions(self) -> None:
        assert shards_nbytes([(1, self.array), ((0, 2), (3, self.array)), (4, b"12345")]) == 16_005
        assert shards_nbytes(b"12345") == 5


class TestFigures:
    rows = (
        ("gather", "tcp://a:1", "tcp://b:1", 2, 3 * 2**20, 2**20),
        ("gather", "tcp://a:1", "tcp://a:2", 1, 999, 999),
        ("result", "tcp://a:1", CLIENT, 1, 2**20, 2**20),
        ("shuffle", "tcp://a:1", "tcp://b:1", 1, 2**20, 2**20),
        ("gather", "tcp://a:1", "tcp://u:1", 1, 7, 7),
    )
    pools = {"tcp://a:1": ("a",), "tcp://a:2": ("a",), "tcp://b:1": ("b", "c"), "tcp://u:1": ()}  # noqa: RUF012

    def test_pairs_add_up_without_what_stays_in_a_pool(self) -> None:
        traffic = traffic_of(*self.rows, pools=self.pools)
        assert traffic.bytes_between_pools == {("a", "b+c"): 2**22, ("a", CLIENT): 2**20, ("a", UNPOOLED): 7}
        assert traffic.wire_bytes_between_pools["a", "b+c"] == 2**21
        assert traffic.transfers == 5
        assert traffic.bytes_by_kind == {"gather": 3 * 2**20 + 7, "result": 2**20, "shuffle": 2**20}
        assert traffic.pools == ("a", "b", "c")

    def test_the_table_has_a_row_per_pair_and_a_total(self) -> None:
        lines = str(traffic_of(*self.rows, pools=self.pools)).splitlines()
        assert len(lines) == 6
        assert len({len(line) for line in lines[1:]}) == 1
        assert "4.00 MiB" in lines[2]
        assert lines[-1].startswith("total")

    def test_html_escapes_what_it_shows(self) -> None:
        traffic = traffic_of(self.rows[0], pools={"tcp://a:1": ("<a>",), "tcp://b:1": ("b",)})
        page = traffic._repr_html_()
        assert "&lt;a&gt;" in page
        assert "<a>" not in page

    def test_an_older_report_does_not_replace_a_newer_one(self) -> None:
        traffic = traffic_of(*self.rows, pools=self.pools)
        before = traffic.bytes_between_pools
        old = {"address": "tcp://a:1", "worker_id": "1", "pools": ["a"], "missing": [], "is_last": False}
        traffic._receive({**old, "n_counted": 1, "rows": self.rows[:1]})
        assert traffic.bytes_between_pools == before

    def test_another_worker_at_the_same_address_adds_up(self) -> None:
        traffic = traffic_of(self.rows[0], pools=self.pools)
        other = {"address": "tcp://a:1", "worker_id": "2", "pools": ["a"], "missing": [], "is_last": False}
        traffic._receive({**other, "n_counted": 1, "rows": self.rows[:1]})
        assert traffic.bytes_between_pools == {("a", "b+c"): 6 * 2**20}

    def test_what_a_worker_could_not_count_is_among_the_excluded(self) -> None:
        traffic = traffic_of(pools={"tcp://a:1": ("a",)})
        assert traffic.excluded == EXCLUDED
        report = {"address": "tcp://a:1", "worker_id": "1", "pools": ["a"], "is_last": False}
        traffic._receive({**report, "n_counted": 1, "rows": [], "missing": ["P2P shuffles (gone)"]})
        assert "P2P shuffles (gone)" in traffic.excluded[-1]


def test_without_a_client_the_error_says_what_to_do() -> None:
    with pytest.raises(NoClientError, match=r"measure_traffic\(\) needs a Dask client"), measure_traffic():
        pass
