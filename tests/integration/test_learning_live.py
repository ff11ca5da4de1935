"""Sizes learnt on a live cluster: the second plan knows what the first run measured, and explain() says so."""

from __future__ import annotations

from typing import Any

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from dask import delayed
from distributed import futures_of, wait
from waiting import wait_until

import meshcompute as mc
from meshcompute import explain, measure_traffic, pool, propagate_pools


def load(n: int) -> np.ndarray:
    return np.zeros(n)


def combined(x: np.ndarray, y: np.ndarray) -> float:
    return float(x.sum() + y.sum())


def between(plan_or_traffic: Any) -> int:
    return sum(n for (s, d), n in plan_or_traffic.bytes_between_pools.items() if "client" not in (s, d))


def test_the_second_plan_moves_what_the_first_run_found_to_be_small(sites: Any) -> None:
    def work() -> Any:
        with pool("a"):
            large = delayed(load)(1_000_000)
        with pool("b"):
            small = delayed(load)(1_000 + len(work.__name__))
        return delayed(combined)(large, small)

    with propagate_pools():
        first = explain(work())
        assert set(first.bytes_by_certainty) == {"guessed"}
        work().compute()
        second = wait_until(lambda: (p := explain(work())).bytes_by_certainty.get("learnt") and p, "a learnt size")
        assert "learnt" in str(second)
        with measure_traffic() as traffic:
            work().compute()
    # Kinds tell the two loads apart no more than their names do, so the mean of both is what was learnt.
    assert between(second) == pytest.approx(4_000_000, rel=0.01)
    # Which of them moves is a toss-up that the plan and the run decide alike.
    crossed = {row[:2] for row in second.against(traffic).rows if "client" not in row[:2]}
    assert len(crossed) == 1


def read_rows(part: int, n: int) -> pd.DataFrame:
    return pd.DataFrame({"k": np.arange(n) % 97, "v": np.arange(n) * 1.0})


def test_two_tables_read_by_one_function_have_each_its_own_size_when_they_are_read_again(sites: Any) -> None:
    def work() -> Any:
        with pool("a"):
            large = dd.from_map(read_rows, [0, 1], n=20_001, meta=read_rows(0, 0))
        with pool("b"):
            small = dd.from_map(read_rows, [0, 1, 2, 3, 4, 5], n=11, meta=read_rows(0, 0))
        return large.merge(small, on="k", how="inner").v_x.sum()

    with propagate_pools():
        work().compute()
        plan = wait_until(lambda: (p := explain(work())).bytes_by_certainty.get("learnt") and p, "a learnt size")
        with measure_traffic() as traffic:
            work().compute()
    large_nbytes = 2 * 20_001 * 16
    assert 0 < between(plan) < large_nbytes / 10
    assert between(traffic) < large_nbytes / 10


def test_values_in_memory_count_as_measured_and_chunks_as_metadata(sites: Any) -> None:
    import dask.array as da

    with propagate_pools():  # of a size of their own: on this cluster other tests' arrays are learnt
        with pool("a"):
            x = da.random.random((403, 331), chunks=(101, 331))
        with pool("b"):
            y = da.random.random((403, 331), chunks=(101, 331))
        plan = explain((x - y).sum())
        assert "measured" not in plan.bytes_by_certainty
        assert plan.bytes_by_certainty["from metadata"] > 1_000_000
        x, y = x.persist(), y.persist()
        wait(futures_of([x, y]))
        held = explain((x - y).sum())
        assert held.bytes_by_certainty["measured"] > 1_000_000


def test_a_table_at_a_site_has_sizes_by_what_its_files_count(sites: Any) -> None:
    frame = pd.DataFrame({"x": np.arange(50_000.0), "n": np.arange(50_000), "name": [f"s{i}" for i in range(50_000)]})
    frame.to_parquet(sites.store("a", "sized.parquet"), row_group_size=10_000)
    opened = mc.open_dataframe("a", sites.path("a", "sized.parquet"), split_row_groups=True)
    with pool("b"):
        other = delayed(load)(10)
    parts = [delayed(combined_rows)(part, other) for part in opened.to_delayed()]
    with propagate_pools():
        plan = explain(opened)
        made = sum(plan.bytes_by_pool.values())
        with measure_traffic() as traffic:
            opened.compute()
    assert len(parts) == 5
    assert plan.bytes_by_certainty.get("from metadata", 0) == pytest.approx(plan.bytes_between_pools["a", "client"])
    assert plan.bytes_between_pools["a", "client"] == pytest.approx(
        traffic.bytes_between_pools["a", "client"], rel=0.25
    ), (str(plan), made)
    narrow = explain(opened[["x"]])
    assert narrow.bytes_between_pools["a", "client"] < 0.5 * plan.bytes_between_pools["a", "client"]


def combined_rows(part: Any, other: Any) -> int:
    return len(part) + len(other)
