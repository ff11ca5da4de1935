"""Pins of dask.dataframe at the level of graphs: which task carries which pin, and how many tasks there are.

Results are compared with pandas, task counts with the same query without pins.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
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
from dask._task_spec import Alias, Task, _execute_subgraph, convert_legacy_graph
from dask.base import collections_to_expr
from dask.core import flatten
from distributed.shuffle._core import P2PBarrierTask
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal, assert_series_equal

from meshcompute.clients import pool
from meshcompute.graphs import frames, pinnedtasks, taskgraph
from meshcompute.graphs.pinnedtasks import PinnedTask
from meshcompute.pools import Pin, current_pin


@pytest.fixture(autouse=True)
def _tasks_shuffle() -> Iterator[None]:
    # Whether P2P is Dask's default depends on a client being there.
    with dask.config.set({"dataframe.shuffle.method": "tasks"}):
        yield


def part(site: str, i: int, columns: Any = None) -> pd.DataFrame:
    rng = np.random.default_rng([ord(site), i])
    z = np.arange(20) + 20 * i
    frame = pd.DataFrame({"k": z % 4, "x": rng.normal(size=20), "y": 1.0 + i, "z": z}, index=z)
    return frame if columns is None else frame[columns]


# One function per site: a task that calls it reads there.
def read_a(i: int, columns: Any = None) -> pd.DataFrame:
    return part("a", i, columns)


def read_b(i: int, columns: Any = None) -> pd.DataFrame:
    return part("b", i, columns)


def record_a(i: int) -> dict[str, int]:
    return {"x": i, "y": 2 * i}


def block_a(i: int) -> Any:
    return np.full((3, 2), i)


def second(_frame: pd.DataFrame, other: Any) -> Any:
    return other


def frame_of(site: str, n: int = 4) -> Any:
    reader = {"a": read_a, "b": read_b}[site]
    return dd.from_map(reader, range(n), meta=part(site, 0).iloc[:0], divisions=[*range(0, 20 * n, 20), 20 * n - 1])


def in_pandas(site: str, n: int = 4) -> pd.DataFrame:
    return pd.concat([part(site, i) for i in range(n)])


@pytest.fixture
def a() -> Any:
    with pool("a"):
        return frame_of("a")


@pytest.fixture
def b() -> Any:
    with pool("b"):
        return frame_of("b", 2)


def calls(task: Any) -> set[str]:
    """Names of all functions that a task calls."""
    if not isinstance(task, Task):
        return set()
    parts = list(task.args[0].values()) if task.func is _execute_subgraph else [*task.args, *task.kwargs.values()]
    names = {getattr(f, "__name__", "") for f in (task.func, *parts)}
    return names.union(*(calls(p) for p in parts))


def tasks_and_pins(*collections: Any) -> tuple[dict[Any, Any], dict[Any, Pin]]:
    """The tasks that would run, and their pins, as by ``frame.compute()`` and ``dask.compute(*collections)``."""
    if len(collections) == 1 and isinstance(collections[0], dd.DataFrame | dd.Series | dd.Scalar):
        collections = (collections[0].optimize(),)
    expr = collections_to_expr(collections).finalize_compute().optimize()
    expr = pickle.loads(cloudpickle.dumps(expr))
    graph, _ = taskgraph.materialize(expr, list(flatten(expr.__dask_keys__())))
    return pinnedtasks.extract_pins(graph)


def pools_of_reads(*collections: Any) -> set[tuple[str, tuple[str, ...] | None]]:
    """Which function reads in which pools, over all tasks."""
    tasks, pins = tasks_and_pins(*collections)
    found = set()
    for key, task in tasks.items():
        for name in calls(task):
            if name in ("read_a", "read_b", "record_a", "block_a"):
                found.add((name, pins[key].pools if key in pins else None))
    return found


def n_tasks(frame: Any) -> int:
    graph = convert_legacy_graph(frame.optimize().__dask_graph__())
    readers = Counter(dep for task in graph.values() for dep in task.dependencies)
    # The scheduler resolves the alias of a value that nobody else reads.
    return sum(not (isinstance(task, Alias) and readers[task.target] <= 1) for task in graph.values())


def assert_same(result: Any, expected: Any) -> None:
    result = result.compute(scheduler="sync")
    if isinstance(expected, pd.DataFrame):
        columns = list(expected.columns)
        result, expected = (f[columns].sort_values(columns, ignore_index=True) for f in (result, expected))
        assert_frame_equal(result, expected, check_dtype=False)
    elif isinstance(expected, pd.Series):
        assert_series_equal(result.sort_index(), expected.sort_index(), check_dtype=False, check_names=False)
    else:
        assert result == pytest.approx(expected)


QUERIES: dict[str, Callable[[Any], Any]] = {
    "all of it": lambda f: f,
    "a column": lambda f: f["x"],
    "two columns": lambda f: f[["x", "k"]],
    "arithmetic of columns": lambda f: f.x * 2 + f.y / 3,
    "a new column": lambda f: f.assign(q=f.x + f.y),
    "a filter": lambda f: f[f.x > 0],
    "a filter, then a column": lambda f: f[f.x > 0][["y"]],
    "a filter on a mean": lambda f: f[f.x > f.x.mean()],
    "a filter on a list": lambda f: f[f.k.isin([1, 2])],
    "a sum": lambda f: f.x.sum(),
    "several reductions": lambda f: f.x.std() + f.y.sum() - f.z.max(),
    "anomalies": lambda f: (f - f.mean()) / f.std(),
    "a group's mean": lambda f: f.groupby("k").x.mean(),
    "distinct values": lambda f: f.k.nunique(),
    "counts": lambda f: f.k.value_counts(),
    "a merge with itself": lambda f: f.merge(f[f.x > 0], on="z"),
    "no rows with holes": lambda f: f.dropna(),
    "cumulated": lambda f: f.y.cumsum(),
    "set as index": lambda f: f.set_index("z")[["x"]],
}


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_a_query_on_one_pool_is_as_right_and_as_small_as_without_pins(a, query, where):
    if where == "inside":
        with pool("a"):
            result = query(a)
    else:
        result = query(a)
    assert_same(result, query(in_pandas("a")))
    assert pools_of_reads(result) == {("read_a", ("a",))}
    assert n_tasks(result) <= n_tasks(query(frame_of("a")))


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_everything_made_in_a_block_is_pinned(query):
    with pool("a"):
        result = query(frame_of("a"))
    graph = convert_legacy_graph(result.optimize().__dask_graph__())
    assert all(isinstance(task, (PinnedTask, Alias)) for task in graph.values())


def test_columns_chosen_outside_are_the_only_ones_read(a):
    leaf = a[["x", "z"]].z.optimize().expr
    assert "columns=['z']" in leaf.tree_repr()


def test_filters_made_outside_are_applied_in_the_pool(a):
    tasks, pins = tasks_and_pins(a[a.x > 0])
    filters = {key for key, task in tasks.items() if "gt" in calls(task)}
    assert filters
    assert filters <= pins.keys()


def test_a_filter_that_needs_another_pool_stays_outside(a, b):
    result = a[a.x > b.x.mean()]
    pa, pb = in_pandas("a"), in_pandas("b", 2)
    assert_same(result, pa[pa.x > pb.x.mean()])
    tasks, pins = tasks_and_pins(result)
    assert {pins[key].pools for key, task in tasks.items() if "read_b" in calls(task)} == {("b",)}
    assert all(key not in pins for key, task in tasks.items() if "gt" in calls(task))


COMBINATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "merge": lambda a, b: a.merge(b, on="k"),
    "merge, then columns": lambda a, b: a.merge(b[b.x > 0], on="k", suffixes=("", "_b"))[["x", "x_b"]],
    "sum of sums": lambda a, b: a.x.sum() + b.y.sum(),
    "filter by the other's mean": lambda a, b: a[a.x > b.x.mean()],
    "groups of a merge": lambda a, b: a.merge(b, on="k").groupby("k").x_y.mean(),
}


@pytest.mark.parametrize("combine", COMBINATIONS.values(), ids=COMBINATIONS)
def test_frames_of_two_pools_combine_without_mixing_their_reads(a, b, combine):
    result = combine(a, b)
    assert_same(result, combine(in_pandas("a"), in_pandas("b", 2)))
    assert pools_of_reads(result) == {("read_a", ("a",)), ("read_b", ("b",))}
    # A read whose next step needs both pools cannot be fused with it.
    assert n_tasks(result) <= n_tasks(combine(frame_of("a"), frame_of("b", 2))) + 4


def test_two_aligned_reads_of_two_pools_are_not_fused(a):
    with pool("b"):
        other = frame_of("b")
    result = a.x + other.y
    assert_same(result, in_pandas("a").x + in_pandas("b").y)
    assert pools_of_reads(result) == {("read_a", ("a",)), ("read_b", ("b",))}


def test_stock_dask_fuses_the_reads_of_two_sites():
    # The failure that pins prevent. If it goes away, the barrier may be simpler.
    tasks, _ = tasks_and_pins(frame_of("a").x + frame_of("b").y)
    assert any({"read_a", "read_b"} <= calls(task) for task in tasks.values())


def test_steps_of_another_pool_keep_their_inputs_where_they_are(a, b):
    with pool("c"):
        result = a.merge(b, on="k")
    assert_same(result, in_pandas("a").merge(in_pandas("b", 2), on="k"))
    _, pins = tasks_and_pins(result)
    assert pools_of_reads(result) == {("read_a", ("a",)), ("read_b", ("b",))}
    assert {pin.pools for pin in pins.values()} == {("a",), ("b",), ("c",)}


def test_the_same_read_in_two_pools_is_two_reads():
    with pool("a"):
        first = frame_of("a")
    with pool("b"):
        second = frame_of("a")
    result = first.x.sum() + second.x.sum()
    assert_same(result, 2 * in_pandas("a").x.sum())
    assert pools_of_reads(result) == {("read_a", ("a",)), ("read_a", ("b",))}
    assert not tasks_and_pins(first)[1].keys() & tasks_and_pins(second)[1].keys()


def test_what_two_frames_of_a_pool_share_is_read_once(a):
    with pool("a"):
        high, mean = a[a.x + a.y > 1], a.groupby("k").x.mean()
    tasks, _ = tasks_and_pins(high.merge(mean.rename("m").to_frame(), left_on="k", right_index=True))
    assert sum("read_a" in calls(task) for task in tasks.values()) == 4


def test_nested_blocks_the_innermost_counts():
    with pool("a"):
        outer = frame_of("a")
        with pool("b"):
            inner = frame_of("b")
        with pool(None):
            none = frame_of("a")
    assert pools_of_reads(outer) == {("read_a", ("a",))}
    assert pools_of_reads(inner) == {("read_b", ("b",))}
    assert pools_of_reads(none) == {("read_a", None)}
    assert none.expr._name == frame_of("a").expr._name


def test_replicas_are_one_pin_with_several_pools():
    with pool("a", "b"):
        frame = frame_of("a")
    assert pools_of_reads(frame.x.sum()) == {("read_a", ("a", "b"))}


def test_an_index_that_dask_computes_while_it_plans_is_computed_in_the_pool():
    with pool("a"):
        frame = frame_of("a")[["x"]].assign(q=1).map_partitions(note_pin).set_index("x")
    seen_pins.clear()
    with dask.config.set(scheduler="sync"):
        frame.optimize()
    assert seen_pins == {Pin(("a",))}


seen_pins: set[Any] = set()


def note_pin(frame: pd.DataFrame) -> pd.DataFrame:
    if len(frame) > 2:  # not for the meta
        seen_pins.add(current_pin())
    return frame


CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "values": lambda f: f[["x", "y"]].values,
    "to_dask_array": lambda f: f[["x", "y"]].to_dask_array(lengths=[20] * 4).mean(),
    "to_dask_array, not optimised": lambda f: f[["x", "y"]].to_dask_array(optimize=False),
    "to_records": lambda f: f.to_records(),
    "to_delayed": lambda f: f.to_delayed(),
    "to_delayed, not optimised": lambda f: f.to_delayed(optimize_graph=False),
    "to_bag": lambda f: f.to_bag(),
    "to_bag of frames": lambda f: f.to_bag(format="frame"),
    "delayed(f)(frame)": delayed(len),
    "pickle": lambda f: pickle.loads(cloudpickle.dumps(f)),
    "frame.optimize": lambda f: f.optimize(),
    "dask.optimize": lambda f: dask.optimize(f)[0],
    "to_parquet": lambda f: f.to_parquet("/nowhere", compute=False, compute_kwargs={}),
    "to delayed and back": lambda f: dd.from_delayed(f.to_delayed(), meta=f._meta),
    "to an array and back": lambda f: dd.from_dask_array(f[["x", "y"]].to_dask_array(lengths=[20] * 4)),
    "to a bag and back": lambda f: f[["x", "y"]].to_bag(format="dict").to_dataframe(meta={"x": float, "y": float}),
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_a_frame_keeps_its_pin_when_it_becomes_something_else(a, convert, where):
    if where == "inside":
        with pool("a"):
            result = convert(a)
    else:
        result = convert(a)
    assert pools_of_reads(*(result if isinstance(result, list) else [result])) == {("read_a", ("a",))}


def test_dask_optimize_gives_the_same_values(a):
    assert_same(dask.optimize(a.x + 1)[0].sum(), in_pandas("a").x.sum() + 80)


def test_frames_made_of_pinned_things_have_their_pins():
    with pool("a"):
        parts = [delayed(read_a)(i) for i in range(3)]
        array = da.from_delayed(delayed(block_a)(3), (3, 2), float)
        bag = db.from_sequence(range(4), npartitions=2).map(record_a)
    meta = part("a", 0).iloc[:0]
    assert pools_of_reads(dd.from_delayed(parts, meta=meta)) == {("read_a", ("a",))}
    assert pools_of_reads(dd.from_delayed(parts, meta=meta, verify_meta=False).x.sum()) == {("read_a", ("a",))}
    assert pools_of_reads(dd.from_dask_array(array)) == {("block_a", ("a",))}
    assert pools_of_reads(array.to_dask_dataframe(columns=["p", "q"]).p.sum()) == {("block_a", ("a",))}
    for optimize_graph in (True, False):
        frame = bag.to_dataframe(meta={"x": int, "y": int}, optimize_graph=optimize_graph)
        assert pools_of_reads(frame) == {("record_a", ("a",))}
    local = dd.from_pandas(pd.DataFrame({"x": [1, 2]}), npartitions=2)
    assert pools_of_reads(local.map_partitions(second, parts[0], meta=meta)) == {("read_a", ("a",))}


def test_frames_computed_together_with_arrays_keep_their_pins(a, b):
    with pool("a"):
        array = da.from_delayed(delayed(block_a)(3), (3, 2), float)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Computing mixed collections")
        found = pools_of_reads(a.x.sum(), array.sum(), b)
    assert found == {("read_a", ("a",)), ("read_b", ("b",)), ("block_a", ("a",))}


@pytest.mark.parametrize("step", [lambda f: f.shuffle("k"), lambda f: f.merge(f.assign(z=f.z + 1), on="z")])
def test_p2p_shuffles_of_two_pools_have_ids_of_their_own(step):
    results = {}
    with dask.config.set({"dataframe.shuffle.method": "p2p", "dataframe.convert-string": False}):
        for name in ("a", "b"):
            with pool(name):
                results[name] = step(frame_of("a"))
        graphs = {name: tasks_and_pins(result) for name, result in results.items()}
    barriers = {}
    for name, (tasks, pins) in graphs.items():
        found = [task for task in tasks.values() if isinstance(task, P2PBarrierTask)]
        assert found
        assert all(task.key == f"shuffle-barrier-{task.spec.id}" for task in found)
        assert all(dep in tasks for task in tasks.values() for dep in task.dependencies)
        readers = [key for key, task in tasks.items() if any(b.key in task.dependencies for b in found)]
        assert {pins[key].pools for key in readers} == {(name,)}
        barriers[name] = {task.key for task in found}
    assert not barriers["a"] & barriers["b"]


def test_dask_warns_of_other_annotations_only(monkeypatch):
    from dask.dataframe.dask_expr import _collection

    monkeypatch.setattr(_collection, "_WARN_ANNOTATIONS", True)
    with pool("a"):
        frame_of("a")  # warnings are errors
        with dask.annotate(priority=3), pytest.warns(UserWarning, match=r"\{'priority': 3\}"):
            frame_of("a")


def test_outside_of_blocks_frames_are_dask_s_own():
    frame = frame_of("a")
    assert {type(node).__module__.partition(".")[0] for node in frame.optimize().expr.walk()} == {"dask"}
    assert not taskgraph.has_pins(frame.optimize().expr)


def test_activating_twice_changes_nothing():
    from dask.dataframe.dask_expr._collection import FrameBase

    before = FrameBase.__init__
    frames.activate()
    assert FrameBase.__init__ is before


def test_pandas_is_loaded_neither_by_the_package_nor_by_a_block_and_frames_imported_in_one_are_pinned():
    code = """
import sys
from meshcompute.clients import pool
with pool("a"):
    assert "pandas" not in sys.modules and "dask.dataframe" not in sys.modules
    watchers = [f for f in sys.meta_path if type(f).__module__ == "meshcompute.imports"]
    assert len(watchers) == 1
    with pool("b"):
        assert [f for f in sys.meta_path if type(f).__module__ == "meshcompute.imports"] == watchers
    import dask.dataframe as dd
    frame = dd.from_dict({"x": [1, 2, 3]}, npartitions=2)
    assert type(frame.expr).__name__ == "PinnedFrame"
assert not any(name.startswith("dask") for watcher in watchers for name in watcher.hooks)
assert frame.x.sum().compute(scheduler="sync") == 6
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ---------------------------------------------------------------------------------------------------------------
# Any query at all


def step_a(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(y=frame.y + 1)


def step_b(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(y=frame.y + 2)


STEPS: dict[str, Callable[..., Any]] = {
    "filter": lambda f: f[f.x > 0],
    "filter by a list": lambda f: f[f.k.isin([0, 2, 3])],
    "filter by a mean": lambda f: f[f.x < f.x.mean()],
    "later rows": lambda f: f.loc[15:],
    "new column": lambda f: f.assign(x=f.x * 2 + f.y),
    "columns and back": lambda f: f[["k", "x", "z"]].assign(y=f.y),
    "fill": lambda f: f.fillna(0),
    "fewer partitions": lambda f: f.repartition(npartitions=1) if isinstance(f, dd.DataFrame) else f,
    "group's mean": lambda f: f.merge(f.groupby("k").x.mean().rename("m").to_frame(), left_on="k", right_index=True)[
        ["k", "x", "y", "z"]
    ],
    "cumulated": lambda f: f.assign(y=f.y.cumsum()),
}
ENDS: dict[str, Callable[[Any], Any]] = {
    "frame": lambda f: f[["k", "x", "y", "z"]],
    "sum": lambda f: f.x.sum(),
    "length": len,
    "groups": lambda f: f.groupby("k").y.sum(),
    "two reductions": lambda f: f.x.max() + f.y.min(),
}


def step(frame: Any, name: str) -> Any:
    if name in ("step_a", "step_b"):
        function = globals()[name]
        return frame.map_partitions(function, meta=frame._meta) if isinstance(frame, dd.DataFrame) else function(frame)
    return STEPS[name](frame)


def both(left: Any, right: Any) -> Any:
    merged = left.merge(right[["z", "x"]], on="z", suffixes=("", "_r"))
    return merged.assign(x=merged.x + merged.x_r)[["k", "x", "y", "z"]]


steps_in_blocks = st.lists(st.tuples(st.sampled_from([None, "a", "b"]), st.sampled_from(list(STEPS))), max_size=4)
marked = st.sampled_from([("a", "step_a"), ("b", "step_b")])


@pytest.mark.parametrize("blocks", list(itertools.product([None, "a", "b"], repeat=3)))
def test_steps_pass_blocks_in_any_order(blocks):
    # Dask checks which steps may pass each other with the readers of all of them at hand, one pass at a time.
    with pool("b"):
        frame = frame_of("b", 3).repartition(npartitions=1)
    for where in blocks:
        with pool(where) if where else contextlib.nullcontext():
            frame = step(frame, "filter by a list")
    assert_same(frame, step(in_pandas("b", 3), "filter by a list"))


@given(left=steps_in_blocks, right=steps_in_blocks, mark=marked, end=st.sampled_from(list(ENDS)))
@settings(max_examples=10)
def test_any_query_gives_what_pandas_gives_and_runs_where_its_blocks_say(left, right, mark, end):
    results = []
    for site, steps in (("a", left), ("b", right)):
        with pool(site):
            frame, expected = frame_of(site, 3), in_pandas(site, 3)
        for where, name in [*steps, mark]:
            with pool(where) if where else contextlib.nullcontext():
                frame, expected = step(frame, name), step(expected, name)
        results.append((frame, expected))
    (first, pandas_first), (second, pandas_second) = results
    frame, expected = both(first, second), both(pandas_first, pandas_second)
    tasks, pins = tasks_and_pins(frame)
    for key, task in tasks.items():
        needed = {name[-1] for name in calls(task) if name in ("read_a", "read_b", "step_a", "step_b")}
        assert len(needed) <= 1
        assert not needed or pins[key].pools == tuple(needed)
    if end == "length":
        with dask.config.set(scheduler="sync"):
            assert len(frame) == len(expected)
    else:
        assert_same(ENDS[end](frame), ENDS[end](expected))
