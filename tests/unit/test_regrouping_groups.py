"""Reductions by group that flox makes, regrouped by pool: against numpy and pandas; without a cluster."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import dask.array as da
import flox
import flox.dask
import flox.xarray
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from dask._task_spec import DataNode, Task, TaskRef
from dask.sizeof import sizeof
from flox.aggregations import Aggregation
from hypothesis import given, settings
from hypothesis import strategies as st
from regrouped import Both, blocks_of, both, climate, crossing, series, values_crossing

from meshcompute.graphs import associativegroups
from meshcompute.graphs.associative import loaded
from meshcompute.graphs.associativegroups import MERGES, STEPS, group_reduction
from meshcompute.graphs.sizes import estimate_nbytes
from meshcompute.planning import Assignment

FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(np, name) for name in ("sum", "mean", "min", "max", "var", "std", "prod", "any", "all")},
    **{f"nan{name}": getattr(np, f"nan{name}") for name in ("sum", "mean", "min", "max", "var", "std", "prod")},
    "count": lambda block, axis: (~np.isnan(block)).sum(axis),
}


def by_group(values: np.ndarray, labels: np.ndarray, groups: Sequence[Any], function: Callable[..., Any]) -> np.ndarray:
    """Reduce the first axis, group by group, in plain numpy; groups lie along the last axis."""
    return np.stack([function(values[labels == group], axis=0) for group in groups], axis=-1)


def reduced(blocks: Sequence[np.ndarray], pools: str, labels: np.ndarray, func: Any, **options: Any) -> Both:
    lazy, *_ = flox.groupby_reduce(da.moveaxis(series(blocks, pools), 0, -1), labels, func=func, **options)
    return both(lazy)


def n_parts_crossing(assignment: Assignment) -> int:
    return len(values_crossing(assignment))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("method", ["map-reduce", "cohorts"])
@pytest.mark.parametrize("pools", ["ab", "aabab", "abc"])
@pytest.mark.parametrize("func", FUNCTIONS)
def test_reductions_by_group_are_regrouped_and_right(func: str, pools: str, method: str) -> None:
    blocks = [block / 100 for block in blocks_of(24, (4, 5))]
    for block in blocks[::3]:
        block[1] = np.nan
    if func in {"any", "all"}:
        blocks = [block > -3 for block in blocks]
    labels = np.tile([3, 1, 1, 2], 24)
    x = reduced(blocks, pools, labels, func, method=method)
    given, regrouped = x.values()
    assert sum(x.names.values()) == 1
    assert regrouped.dtype == given.dtype
    np.testing.assert_allclose(regrouped, given, rtol=1e-12)
    expected = by_group(np.concatenate(blocks), labels, [1, 2, 3], FUNCTIONS[func])
    np.testing.assert_allclose(regrouped, expected, rtol=1e-9)
    assert crossing(x.regrouped) <= 0.51 * crossing(x.given)
    assert n_parts_crossing(x.regrouped) == len(set(pools)) - 1


@pytest.mark.parametrize("dtype", ["i1", "u1", "i4", "i8", "?"])
@pytest.mark.parametrize("func", ["sum", "min", "max", "count", "prod"])
def test_integers_come_out_exactly_overflow_included(func: str, dtype: str) -> None:
    rng = np.random.default_rng(2)
    ends = (0, 2) if dtype == "?" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    blocks = [rng.integers(*ends, (3, 4)).astype(dtype) for _ in range(30)]
    labels = np.tile([0, 1, 1], 30)
    x = reduced(blocks, "ab", labels, func, method="map-reduce")
    assert x.names
    given, regrouped = x.values()
    np.testing.assert_array_equal(regrouped, given)
    function = (lambda block, axis: np.full(block.shape[1:], len(block))) if func == "count" else FUNCTIONS[func]
    np.testing.assert_array_equal(regrouped, by_group(np.concatenate(blocks), labels, [0, 1], function))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("func", ["sum", "mean", "var", "min", "max"])
@pytest.mark.parametrize("kind", ["huge range", "large offset", "infinite", "small floats"])
def test_adverse_values_come_out_as_numpy_has_them(kind: str, func: str) -> None:
    rng = np.random.default_rng(1)
    make: dict[str, Callable[[], np.ndarray]] = {
        "huge range": lambda: 10.0 ** rng.integers(-150, 140, (2, 4)) * rng.choice([-1, 1], (2, 4)),
        "large offset": lambda: 1e6 + rng.random((2, 4)),
        "infinite": lambda: np.where(rng.random((2, 4)) < 0.1, np.inf, 1.0),
        "small floats": lambda: rng.random((2, 4), dtype=np.float32),
    }
    blocks = [make[kind]() for _ in range(26)]
    labels = np.tile([0, 1], 26)
    x = reduced(blocks, "ab", labels, func, method="map-reduce")
    assert x.names
    given, regrouped = x.values()
    expected = by_group(np.concatenate(blocks).astype("f8"), labels, [0, 1], FUNCTIONS[func])
    tolerance = 1e-4 if kind == "small floats" or (kind, func) == ("large offset", "var") else 1e-9
    finite = np.isfinite(expected)
    np.testing.assert_allclose(regrouped[finite], expected[finite], rtol=tolerance)
    np.testing.assert_array_equal(np.isfinite(regrouped), np.isfinite(given))


@pytest.mark.parametrize("func", ["nansum", "nanmean", "nanmax", "nanstd", "count"])
def test_groups_without_values_and_values_without_a_group_come_out_as_flox_has_them(func: str) -> None:
    """Of groups 0 to 4 nobody has 3; group 4 has nothing but NaN; one label in five is missing."""
    blocks = [block.copy() for block in blocks_of(20, (5, 3))]
    labels = np.tile([0.0, 1.0, 2.0, 4.0, np.nan], 20)
    for block in blocks:
        block[3] = np.nan
    options = {"expected_groups": np.arange(5), "fill_value": -9.0}
    x = reduced(blocks, "aab", labels, func, method="map-reduce", **options)
    assert x.names
    given, regrouped = x.values()
    np.testing.assert_allclose(regrouped, given, rtol=1e-12)
    eager, *_ = flox.groupby_reduce(np.moveaxis(np.concatenate(blocks), 0, -1), labels, func=func, **options)
    np.testing.assert_allclose(regrouped, eager, rtol=1e-9)
    assert (regrouped[..., 3] == -9.0).all()


@pytest.mark.parametrize(
    "labels",
    [
        np.repeat(pd.date_range("2001-01-01", periods=12).values, 4),
        np.array([f"t{i % 5}" for i in range(48)]),
        np.arange(48) % 2 == 0,
    ],
    ids=["times", "texts", "booleans"],
)
@pytest.mark.parametrize("func", ["mean", "max"])
def test_labels_may_be_of_any_type(func: str, labels: np.ndarray) -> None:
    blocks = blocks_of(24, (2, 3))
    x = reduced(blocks, "ab", labels, func, method="map-reduce")
    assert x.names
    expected = by_group(np.concatenate(blocks), labels, np.unique(labels), FUNCTIONS[func])
    np.testing.assert_allclose(x.values()[1], expected, rtol=1e-9)


@pytest.mark.parametrize("func", ["nansum", "nanmean", "nanvar", "nanmin"])
@pytest.mark.parametrize("axis", [0, 1])
def test_labels_in_two_dimensions_are_reduced_over_both(func: str, axis: int) -> None:
    """A map of regions; its blocks lie in pools along one axis or the other."""
    fields = np.random.default_rng(3).normal(size=(3, 24, 24))
    fields[:, ::5] = np.nan
    regions = np.random.default_rng(4).integers(0, 4, (24, 24))
    blocks = np.split(fields, 12, axis=1 + axis)
    array = series(blocks, "ab", axis=1 + axis).rechunk({2 - axis: 12})
    lazy, *_ = flox.groupby_reduce(array, regions, func=func, method="map-reduce")
    x = both(lazy)
    assert x.names
    flat = np.moveaxis(fields.reshape(3, -1), -1, 0)
    expected = by_group(flat, regions.ravel(), range(4), FUNCTIONS[func])
    np.testing.assert_allclose(x.values()[1], expected, rtol=1e-9)
    assert crossing(x.regrouped) < crossing(x.given)


@pytest.mark.parametrize("method", ["map-reduce", "cohorts"])
def test_parts_that_find_their_groups_themselves_are_regrouped_and_right(method: str) -> None:
    """Not every block has every group, and none is told which there are."""
    blocks = blocks_of(24, (2, 3))
    labels = np.repeat(np.arange(48) // 6 % 5, 1)
    x = reduced(blocks, "ab", labels, "nanmean", method=method, reindex=False)
    assert x.names
    expected = by_group(np.concatenate(blocks), labels, range(5), np.mean)
    np.testing.assert_allclose(x.values()[1], expected, rtol=1e-9)


@pytest.mark.parametrize("pools", ["ab", "abc"])
@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.groupby("time.dayofweek").mean(),
        lambda x: x.groupby("time.season").std(),
        lambda x: x.groupby("time.season").count(),
        lambda x: x.groupby("time.quarter").min(),
        lambda x: (x > 0.5).groupby("time.season").any(),
        lambda x: (x > 0.001).groupby("time.season").all(),
        lambda x: x.groupby("time.season").sum(min_count=3),
        lambda x: x.groupby("time.season").mean(skipna=False),
        lambda x: x.resample(time="6MS").mean(),
        lambda x: x.groupby_bins("y", [0, 1.5, 9]).mean(["time", "y", "x"]),
        lambda x: (x.groupby("time.season") - x.groupby("time.season").mean()).max("time"),
        lambda x: flox.xarray.xarray_reduce(x, "time.season", func="nanmean"),
    ],
)
def test_what_xarray_hands_to_flox_is_regrouped_and_as_xarray_has_it(
    make: Callable[[xr.DataArray], xr.DataArray], pools: str
) -> None:
    lazy, eager = (x.assign_coords(y=[0.5, 1.0, 2.0]) for x in climate(pools))
    with xr.set_options(use_flox=True):
        result = make(lazy)
    with xr.set_options(use_flox=False):
        expected = make(eager).transpose(*result.dims)
    x = both(result.data)
    assert x.names
    np.testing.assert_allclose(x.values()[1], expected, rtol=1e-9)
    assert crossing(x.regrouped) < crossing(x.given)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.resample(time="MS").mean(),
        lambda x: flox.xarray.xarray_reduce(x.chunk(time=-1), "time.season", func="nanmean", method="blockwise"),
        lambda x: x.groupby("time.season").first(),
        lambda x: x.groupby("time.season").last(),
        lambda x: flox.xarray.xarray_reduce(x, "time.season", func="argmax", method="map-reduce"),
        lambda x: x.chunk(time=-1).groupby("time.season").median(),
        lambda x: x.groupby("time.season").cumsum(),
    ],
    ids=["groups within blocks", "blockwise", "first", "last", "positions", "median", "scan"],
)
def test_where_nothing_is_merged_or_order_counts_the_graph_stays(make: Callable[[Any], Any]) -> None:
    lazy, eager = climate("aabab")
    with xr.set_options(use_flox=True):
        result = make(lazy)
        expected = make(eager)
    x = both(result.data)
    assert not x.names
    assert x.given.tasks.keys() == x.regrouped.tasks.keys()
    np.testing.assert_allclose(x.values()[1], expected.transpose(*result.dims), rtol=1e-9)


@settings(max_examples=50)
@given(
    pools=st.lists(st.sampled_from("abc"), min_size=2, max_size=30),
    func=st.sampled_from(["nansum", "nanmean", "nanvar", "nanmax"]),
    method=st.sampled_from(["map-reduce", "cohorts"]),
    data=st.data(),
)
def test_any_mixture_of_pools_and_groups_is_right_and_never_costs_more_bytes(
    pools: list[str], func: str, method: str, data: st.DataObject
) -> None:
    n = len(pools)
    labels = np.array(data.draw(st.lists(st.integers(0, 4), min_size=2 * n, max_size=2 * n)))
    blocks = blocks_of(n, (2, 3), seed=n)
    x = reduced(blocks, "".join(pools), labels, func, method=method)
    expected = by_group(np.concatenate(blocks), labels, np.unique(labels), FUNCTIONS[func])
    np.testing.assert_allclose(x.values()[1], expected, rtol=1e-9, atol=1e-9)
    assert crossing(x.regrouped) <= crossing(x.given) * (1 + 1e-9)


@pytest.mark.parametrize("func", ["nanmean", "nansum", "nanmax", "count"])
def test_counts_cross_as_one_number_for_each_group_where_nothing_is_missing(func: str) -> None:
    blocks = blocks_of(24, (4, 500))
    options = {"expected_groups": np.arange(4), "fill_value": np.nan}
    x = reduced(blocks, "ab", np.tile([0, 1, 1, 2], 24), func, method="map-reduce", **options)
    given, regrouped = x.values()
    np.testing.assert_allclose(regrouped, given, rtol=1e-12)
    (part,) = values_crossing(x.regrouped)
    counts = [array for array in part["intermediates"] if array.dtype == np.intp]
    assert counts
    assert all(array.strides[0] == 0 and array.strides[-1] != 0 for array in counts)
    assert sizeof(part) < 500 * 4 * 8 * (len(part["intermediates"]) - len(counts)) + 1000


def test_counts_that_differ_cross_as_they_are() -> None:
    blocks = [block.copy() for block in blocks_of(24, (4, 50))]
    for block in blocks:
        block[0, ::2] = np.nan
    labels = np.tile([0, 0, 1, 1], 24)
    x = reduced(blocks, "ab", labels, "nanmean", method="map-reduce")
    np.testing.assert_allclose(x.values()[1], by_group(np.concatenate(blocks), labels, [0, 1], np.nanmean), rtol=1e-9)
    (part,) = values_crossing(x.regrouped)
    assert all(0 not in array.strides for array in part["intermediates"])


# ---------------------------------------------------------------------------------------------------------------
# Another flox, and what it may be given


def total(array: np.ndarray, axis: Any, keepdims: bool) -> np.ndarray:
    """A function of the user."""
    return np.sum(array, axis=axis, keepdims=keepdims)


def test_an_aggregation_of_the_user_is_regrouped_if_what_it_merges_by_is_known() -> None:
    labels = np.tile([0, 1], 24)
    options: dict[str, Any] = {"name": "ours", "chunk": "sum", "numpy": "sum", "fill_value": 0}
    known = reduced(blocks_of(), "ab", labels, Aggregation(combine="sum", **options), method="map-reduce")
    unknown = reduced(blocks_of(), "ab", labels, Aggregation(combine=(total,), **options), method="map-reduce")
    assert known.names
    assert not unknown.names
    np.testing.assert_allclose(known.values()[1], unknown.values()[1])


def function_of(x: Both, name: str) -> Any:
    """What a step of a given graph calls."""
    functions = [getattr(task, "func", None) for task in x.given.tasks.values()]
    inner = [getattr(f, "func", None) for task in x.given.tasks.values() for f in nested(task)]
    return next(f for f in [*functions, *inner] if getattr(getattr(f, "func", None), "__name__", "") == name)


def nested(task: Any) -> list[Any]:
    steps = task.args[0] if getattr(task, "args", ()) and isinstance(task.args[0], dict) else {}
    return list(steps.values())


class Unhashable:
    """A function that cannot be looked up."""

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, array: np.ndarray, **options: Any) -> np.ndarray:
        return array


@pytest.mark.parametrize("name", STEPS)
def test_the_size_of_what_an_unknown_flox_makes_is_a_guess_and_no_error(name: str) -> None:
    step = Task("step", functools.partial(loaded(STEPS[name]), odd=1), TaskRef(("part", 0)))
    sizes = estimate_nbytes({"step": step, ("part", 0): DataNode(("part", 0), np.ones(100))}, {})
    assert 700 < sizes["step"] <= 800


@pytest.mark.parametrize("name", ["_simple_combine", "_aggregate"])
def test_a_flox_that_calls_its_steps_otherwise_is_left_alone(name: str) -> None:
    function = function_of(reduced(blocks_of(), "ab", np.tile([0, 1], 24), "nanmean", method="map-reduce"), name)
    assert group_reduction(function) is not None
    options = function.keywords
    others: list[dict[str, Any]] = [
        {**options, "weights": 1},
        {key: value for key, value in options.items() if key != "reindex"},
        {**options, "keepdims": False},
        {**options, "axis": 2},
        {**options, "agg": None},
        {**options, "agg": "mean"},
    ]
    if name == "_aggregate":
        others += [{**options, "combine": flox.dask._simple_combine}, {**options, "combine": None}]
    for attributes in (
        {"simple_combine": None},
        {"simple_combine": (Unhashable(),) * len(options["agg"].chunk)},
        {"dtype": None},
        {"dtype": {"intermediate": ("no type",) * len(options["agg"].chunk)}},
        {"chunk": ()},
        {"reduction_type": "scan"},
    ):
        agg = Aggregation("mean", chunk="sum", combine="sum", fill_value=0)
        agg.__dict__.update({**options["agg"].__dict__, **attributes})
        others.append({**options, "agg": agg})
    for other in others:
        assert group_reduction(functools.partial(function.func, **other)) is None
    assert group_reduction(functools.partial(function.func, "positional", **options)) is None


@pytest.mark.parametrize("name", STEPS)
def test_a_flox_without_these_functions_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STEPS, name, "flox.dask:gone")
    monkeypatch.setattr(associativegroups, "_CHUNK", "flox.core:gone")
    labels = np.repeat(np.arange(24) // 2 % 4, 2)
    x = reduced(blocks_of(), "ab", labels, "nanmean", method="cohorts")
    given, regrouped = x.values()
    np.testing.assert_allclose(regrouped, given, rtol=1e-12)
    if name == "_simple_combine":
        assert not x.names
        assert x.given.tasks.keys() == x.regrouped.tasks.keys()


@pytest.mark.parametrize("name", [*STEPS.values(), *MERGES, associativegroups._CHUNK])
def test_every_function_of_flox_that_is_looked_for_exists(name: str) -> None:
    assert callable(loaded(name))
