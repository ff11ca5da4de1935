"""dask.dataframe on two sites: a scheduler in its own process, default settings, folders that only their site sees.

A read at the wrong site fails by nature: the file is not there. Results are compared with pandas.
"""

from __future__ import annotations

import contextlib
import pickle
import subprocess
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from dask import delayed
from distributed import Client, futures_of, wait
from pandas.testing import assert_frame_equal, assert_series_equal

from meshcompute.clients import pool, propagate_pools

cloudpickle.register_pickle_by_value(sys.modules[__name__])

N_PARTS = 4
ROWS = 60


@pytest.fixture(scope="module", autouse=True)
def data(sites: Any) -> dict[str, pd.DataFrame]:
    """One file per partition at each site."""
    frames = {}
    for site in ("a", "b"):
        rng = np.random.default_rng(ord(site))
        z = np.arange(ROWS)
        frames[site] = pd.DataFrame({"k": z % 5, "x": rng.normal(size=ROWS), "y": z + 0.5, "z": z})
        for i, part in enumerate(np.array_split(z, N_PARTS)):
            frames[site].iloc[part].to_csv(sites.store(site, f"part-{i}.csv"), index=False)
    return frames


@pytest.fixture(params=["guard only", "propagate_pools"])
def rules(request: pytest.FixtureRequest, sites: Any) -> Iterator[str]:
    """Every pin must hold with and without placement."""
    with propagate_pools() if request.param == "propagate_pools" else contextlib.nullcontext():
        yield request.param


META = pd.DataFrame({"k": pd.Series(dtype="i8"), "x": 0.0, "y": 0.0, "z": pd.Series(dtype="i8")})


def read(i: int, folder: str, nonce: str = "", columns: Any = None) -> pd.DataFrame:
    frame = pd.read_csv(f"{folder}/part-{i}.csv")
    return frame if columns is None else frame[columns]


def read_block(folder: str, i: int) -> Any:
    return read(i, folder)[["x", "y"]].to_numpy()


def read_records(i: int, folder: str) -> list[dict[str, float]]:
    return read(i, folder)[["x", "y"]].to_dict("records")


def sum_of_x(frame: pd.DataFrame) -> float:
    return float(frame.x.sum())


def frame_of(sites: Any, site: str) -> Any:
    """A frame whose keys are new, so that no test finds another's values in memory."""
    with pool(site):
        return dd.from_map(read, range(N_PARTS), folder=sites.path(site), nonce=uuid.uuid4().hex, meta=META)


@pytest.fixture
def a(sites: Any) -> Any:
    return frame_of(sites, "a")


@pytest.fixture
def b(sites: Any) -> Any:
    return frame_of(sites, "b")


def assert_same(result: Any, expected: Any) -> None:
    if isinstance(expected, pd.DataFrame):
        columns = list(expected.columns)
        result, expected = (f[columns].sort_values(columns, ignore_index=True) for f in (result, expected))
        assert_frame_equal(result, expected, check_dtype=False)
    elif isinstance(expected, pd.Series):
        assert_series_equal(result.sort_index(), expected.sort_index(), check_dtype=False, check_names=False)
    else:
        assert result == pytest.approx(expected)


COMBINATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "sums": lambda a, b: a.x.sum() - b.x.sum(),
    "merge": lambda a, b: a.merge(b, on="z"),
    "filter, merge, columns": lambda a, b: a[a.x > 0].merge(b, on="z")[["x_x", "x_y"]],
    "groups of a merge": lambda a, b: a.merge(b, on="z").groupby("k_x").x_y.mean(),
    "a group's mean over the other's": lambda a, b: a.groupby("k").x.mean() / b.groupby("k").y.mean(),
    "filter by the other's mean": lambda a, b: a[a.x > b.x.mean()],
    "set as index, then aligned": lambda a, b: a.set_index("z").x + b.set_index("z").x,
}


@pytest.mark.parametrize("combine", COMBINATIONS.values(), ids=COMBINATIONS)
def test_frames_of_two_sites_combine_as_in_pandas(a, b, data, rules, combine):
    assert_same(combine(a, b).compute(), combine(data["a"], data["b"]))


@pytest.mark.parametrize("combine", COMBINATIONS.values(), ids=COMBINATIONS)
def test_steps_inside_of_a_block_run_at_that_site_and_reads_at_theirs(a, b, data, combine):
    with pool("a"):
        result = combine(a, b)
    assert_same(result.compute(), combine(data["a"], data["b"]))


def test_steps_that_read_files_themselves_run_where_the_block_says(sites, a, b, data, rules):
    folder = sites.path("b")
    merged = a.merge(b, on="z")
    with pool("b"):
        result = merged.map_partitions(lambda f: f.assign(n=len(read(0, folder))), meta={**merged.dtypes, "n": int})
    assert set(result.compute().n) == {ROWS // N_PARTS}


def test_lengths_and_first_rows(a, data, rules):
    assert len(a) == ROWS
    assert len(a[a.x > 0]) == (data["a"].x > 0).sum()
    assert_same(a.head(3), data["a"].head(3))
    assert_same(a.tail(3), data["a"].tail(3))


def test_what_dask_has_to_look_at_for_the_types_is_read_at_the_site_only(sites, data, rules):
    with pool("b"):
        frame = dd.from_map(read, range(N_PARTS), folder=sites.path("b"), nonce=uuid.uuid4().hex)
    assert_same(frame[["x"]].x.sum().compute(), data["b"].x.sum())


def workers_of(sites: Any, frame: Any) -> set[str]:
    """Names of the sites that hold the partitions of a persisted frame."""
    futures = futures_of(frame)
    wait(futures, timeout=60)
    by_address = {address: site for site in ("a", "b") for address in sites.workers(site).values()}
    return {by_address[address] for held in sites.client.who_has(futures).values() for address in held}


@pytest.mark.parametrize("method", ["tasks", "p2p"])
def test_a_shuffle_inside_of_a_block_stays_at_its_site(sites, a, data, rules, method):
    with dask.config.set({"dataframe.shuffle.method": method}):
        with pool("a"):
            shuffled = a.shuffle("k").persist()
        assert workers_of(sites, shuffled) == {"a"}
        assert_same(shuffled.compute(), data["a"])


@pytest.mark.parametrize("method", ["tasks", "p2p"])
def test_shuffles_outside_of_blocks_are_right(a, b, data, rules, method):
    with dask.config.set({"dataframe.shuffle.method": method}):
        assert_same(a.shuffle("k").compute(), data["a"])
        assert_same(a.merge(b, on="z").compute(), data["a"].merge(data["b"], on="z"))


def test_p2p_merges_inside_of_a_block_stay_at_its_site(sites, a, data, rules):
    with dask.config.set({"dataframe.shuffle.method": "p2p"}):
        with pool("a"):
            merged = a.merge(a.assign(q=a.x), on="z", broadcast=False).persist()
        assert workers_of(sites, merged) == {"a"}
        assert_same(merged.compute(), data["a"].merge(data["a"].assign(q=data["a"].x), on="z"))


def test_persisted_frames_are_where_their_data_is(sites, a, b, data, rules):
    kept_a, kept_b = a.persist(), b.persist()
    assert workers_of(sites, kept_a) == {"a"}
    assert workers_of(sites, kept_b) == {"b"}
    assert_same((kept_a.x.sum() + kept_b.x.sum()).compute(), data["a"].x.sum() + data["b"].x.sum())
    with pool("a"):
        again = kept_a[kept_a.x > 0].persist()
    assert_same(again.compute(), data["a"][data["a"].x > 0])


CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "values": lambda f: f.x.values.sum(),
    "to_dask_array": lambda f: f[["x"]].to_dask_array(lengths=True).sum(),
    "to_delayed": lambda f: delayed(sum)([delayed(sum_of_x)(part) for part in f.to_delayed()]),
    "delayed(f)(frame)": delayed(sum_of_x),
    "to_bag": lambda f: f.x.to_bag().sum(),
    "to delayed and back": lambda f: dd.from_delayed(f.to_delayed(), meta=f._meta).x.sum(),
    "to an array and back": lambda f: dd.from_dask_array(f[["x"]].to_dask_array(lengths=True))[0].sum(),
    "to a bag and back": lambda f: f[["x"]].to_bag(format="dict").to_dataframe(meta={"x": float}).x.sum(),
    "pickle": lambda f: pickle.loads(cloudpickle.dumps(f)).x.sum(),
    "dask.optimize": lambda f: dask.optimize(f)[0].x.sum(),
    "frame.optimize": lambda f: f.optimize().x.sum(),
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_what_a_frame_becomes_reads_at_its_site(a, data, rules, convert):
    assert convert(a).compute() == pytest.approx(data["a"].x.sum())


def test_what_becomes_a_frame_reads_at_its_site(sites, data, rules):
    folder = sites.path("b")
    with pool("b"):
        parts = [delayed(read)(i, folder, uuid.uuid4().hex) for i in range(N_PARTS)]
        block = da.from_delayed(delayed(read_block)(folder, 1), (ROWS // N_PARTS, 2), float)
        records = db.from_sequence(range(N_PARTS), npartitions=2).map(read_records, folder).flatten()
    expected = data["b"]
    assert_same(dd.from_delayed(parts, meta=META).compute(), expected)
    assert_same(dd.from_dask_array(block)[0].sum().compute(), expected.x[15:30].sum())
    assert_same(records.to_dataframe(meta={"x": float, "y": float}).compute(), expected[["x", "y"]])


def test_frames_and_arrays_in_one_compute(sites, a, b, data, rules):
    folder = sites.path("b")
    with pool("b"):
        block = da.from_delayed(delayed(read_block)(folder, 0), (ROWS // N_PARTS, 2), float)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Computing mixed collections")
        x, y, total = dask.compute(a.x.sum(), b, block.sum())
    assert_same(x, data["a"].x.sum())
    assert_same(y, data["b"])
    assert_same(total, data["b"][["x", "y"]].iloc[:15].to_numpy().sum())


def test_client_compute_of_several_frames(sites, a, b, data, rules):
    results = sites.client.gather(sites.client.compute([a.x.sum(), b, a.merge(b, on="z")]))
    for result, expected in zip(
        results, [data["a"].x.sum(), data["b"], data["a"].merge(data["b"], on="z")], strict=True
    ):
        assert_same(result, expected)


def test_a_published_frame_keeps_its_pins_for_a_second_client(sites, a, b, data):
    name = f"frame-{uuid.uuid4().hex}"
    sites.client.publish_dataset(a.merge(b, on="z"), name=name)
    with Client(sites.mesh.scheduler_address, set_as_default=False) as second:
        frame = second.get_dataset(name)
        assert_same(second.compute(frame).result(timeout=60), data["a"].merge(data["b"], on="z"))


def test_a_pickled_frame_keeps_its_pins_in_a_process_that_never_entered_a_pool(sites, a, b, data, tmp_path):
    file = tmp_path / "frame"
    file.write_bytes(cloudpickle.dumps(a.x.sum() + b.x.sum()))
    code = """
import pickle, sys
from distributed import Client
with Client(sys.argv[1]) as client, open(sys.argv[2], "rb") as file:
    print(client.compute(pickle.load(file)).result(timeout=60))
"""
    command = [sys.executable, "-c", code, sites.mesh.scheduler_address, str(file)]
    done = subprocess.run(command, check=True, timeout=100, capture_output=True, text=True)
    assert float(done.stdout) == pytest.approx(data["a"].x.sum() + data["b"].x.sum())


def test_with_a_scheduler_and_workers_that_do_not_have_meshcompute(stock_sites):
    for site, x in (("a", [1.0, 2.0]), ("b", [10.0, 20.0])):
        for i in range(2):
            file = stock_sites.store(site, f"part-{i}.csv")
            pd.DataFrame({"k": [0, 1], "x": x, "y": x, "z": [2 * i, 2 * i + 1]}).to_csv(file, index=False)

    def read_file(path: str) -> pd.DataFrame:  # local, so that it is pickled by value: workers do not have this file
        return pd.read_csv(path)

    frames = {}
    for site in ("a", "b"):
        with pool(site):
            paths = [stock_sites.path(site, f"part-{i}.csv") for i in range(2)]
            frames[site] = dd.from_map(read_file, paths, meta=META)
    merged = frames["a"].merge(frames["b"], on="z")
    assert stock_sites.client.compute(merged.x_y.sum()).result(timeout=60) == 60
    with dask.config.set({"dataframe.shuffle.method": "p2p"}), pool("a"):
        shuffled = frames["a"].shuffle("k")
    assert len(stock_sites.client.compute(shuffled).result(timeout=60)) == 4


def test_columns_and_filters_chosen_outside_reach_into_a_parquet_read(tmp_path: Path) -> None:
    # No site: what is read is seen in the optimised expression.
    path = tmp_path / "frame.parquet"
    pd.DataFrame({"x": [1.0, 2.0, 3.0], "y": [4, 5, 6], "z": [7, 8, 9]}).to_parquet(path)
    with pool("a"):
        frame = dd.read_parquet(path, filesystem="arrow")  # the one whose filters Dask pushes down
    result = frame[frame.z > 7][["x"]]
    tree = result.optimize().expr.tree_repr()
    assert "columns=['x']" in tree
    assert "filters=[[('z', '>', 7)]]" in tree
    assert result.compute(scheduler="sync").x.tolist() == [2.0, 3.0]
    assert len(frame.optimize()) == 3
