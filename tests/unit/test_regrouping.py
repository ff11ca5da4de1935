"""Reductions regrouped by pool, against numpy, pandas and the graph as Dask gives it; without a cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import dask
import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from dask.sizeof import sizeof
from hypothesis import given, settings
from hypothesis import strategies as st
from regrouped import blocks_of, both, climate, crossing, expression, plan, series, values_crossing

from meshcompute.clients import pool
from meshcompute.explaining import Plan
from meshcompute.graphs.associative import FAMILIES, loaded
from meshcompute.graphs.associativetables import BAGS, TABLES
from meshcompute.graphs.reductionsteps import Reader

ARRAYS: dict[str, Callable[[Any], Any]] = {
    "sum": lambda x: x.sum(0),
    "sum of all": lambda x: x.sum(),
    "sum with keepdims": lambda x: x.sum(0, keepdims=True),
    "prod": lambda x: (x / 100).prod(0),
    "mean": lambda x: x.mean(0),
    "mean of all": lambda x: x.mean(),
    "mean over axes in another order": lambda x: x.mean(axis=(1, 0)),
    "var": lambda x: x.var(0, ddof=1),
    "std of all": lambda x: x.std(),
    "min": lambda x: x.min(0),
    "max of all": lambda x: x.max(),
    "any": lambda x: (x > 300).any(0),
    "all": lambda x: (x > -300).all(),
    "argmax": lambda x: x.argmax(0),
    "argmin of all": lambda x: x.argmin(),
    "anomaly, then standard deviation": lambda x: (x - x.mean(0)).std(0),
    "several at once": lambda x: x.max(0) - x.min(0) + x.mean(0),
    "two of the same parts": lambda x: x.var(0, ddof=0) + x.var(0, ddof=1),
    "matmul": lambda x: x.T @ x,
}
FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "nansum": (da.nansum, np.nansum),
    "nanprod": (da.nanprod, np.nanprod),
    "nanmean": (da.nanmean, np.nanmean),
    "nanvar": (da.nanvar, np.nanvar),
    "nanstd": (da.nanstd, np.nanstd),
    "nanmin": (da.nanmin, np.nanmin),
    "nanmax": (da.nanmax, np.nanmax),
    "nanargmin": (da.nanargmin, np.nanargmin),
    "nanargmax": (da.nanargmax, np.nanargmax),
}


@pytest.mark.parametrize("pools", ["ab", "aabab", "abc"])
@pytest.mark.parametrize("name", ARRAYS)
def test_reductions_of_arrays_that_alternate_between_pools_are_regrouped_and_right(name: str, pools: str) -> None:
    blocks = blocks_of(shape=(40, 5))
    x = both(ARRAYS[name](series(blocks, pools)))
    assert x.names
    given, regrouped = x.values()
    np.testing.assert_allclose(regrouped, given, rtol=1e-12)
    np.testing.assert_allclose(regrouped, ARRAYS[name](np.concatenate(blocks)), rtol=1e-9)
    assert crossing(x.regrouped) <= 0.51 * crossing(x.given)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_reductions_that_skip_what_is_missing_are_regrouped_and_right(name: str, axis: int | None) -> None:
    blocks = [block / 100 for block in blocks_of()]
    for block in blocks[::3]:
        block[:, 1] = np.nan
    ours, numpy = FUNCTIONS[name]
    x = both(ours(series(blocks, "ab", axis=axis or 0), axis=axis))
    assert x.names
    given, regrouped = x.values()
    np.testing.assert_allclose(regrouped, given, rtol=1e-12)
    np.testing.assert_allclose(regrouped, numpy(np.concatenate(blocks, axis=axis or 0), axis=axis), rtol=1e-9)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: da.histogram(x, bins=7, range=(-200, 200))[0],
        lambda x: da.bincount(abs(x[:, 0]).astype(int) % 7),
        lambda x: da.topk(x, 3, axis=0),
        lambda x: da.topk(x, -2, axis=0),
        lambda x: da.average(x, axis=0, weights=x[:, 0] ** 2),
        lambda x: da.tensordot(x, x, axes=(0, 0)),
        lambda x: da.einsum("ti,tj->ij", x, x),
        lambda x: da.reductions.moment(x, 4, axis=0),
        lambda x: da.count_nonzero(x > 0, axis=0),
        lambda x: da.ptp(x, axis=0),
        da.linalg.norm,
    ],
)
def test_what_is_made_of_sums_and_extremes_is_regrouped_and_right(make: Callable[[da.Array], da.Array]) -> None:
    x = both(make(series(blocks_of(), "ab")))
    assert x.names
    given, regrouped = x.values()
    np.testing.assert_allclose(regrouped, given, rtol=1e-9)
    assert crossing(x.regrouped) < crossing(x.given)


def test_one_part_of_each_pool_crosses() -> None:
    x = both(series(blocks_of(48), "abc").sum(0))
    assert crossing(x.regrouped) == 2 * 5 * 8
    assert crossing(x.given) >= 10 * crossing(x.regrouped)
    assert len(x.regrouped.tasks) <= 1.1 * len(x.given.tasks)


COUNTING: dict[str, Callable[[Any], Any]] = {
    "mean": lambda x: x.mean(0),
    "std": lambda x: x.std(0),
    "fourth moment": lambda x: da.reductions.moment(x, 4, axis=0),
    "mean of all": lambda x: x.mean(),
}
LAYOUTS = {"interleaved": "ab" * 12, "split": "a" * 12 + "b" * 12, "a chunk of each": "ab"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", COUNTING)
def test_counts_cross_as_one_number_and_the_plan_says_so(name: str, layout: str) -> None:
    pools = LAYOUTS[layout]
    blocks = blocks_of(len(pools), (2, 500))
    x = both(COUNTING[name](series(blocks, pools)))
    given, regrouped = x.values()
    np.testing.assert_allclose(regrouped, given, rtol=1e-12)
    assert regrouped.dtype == given.dtype
    assert str(regrouped.flags) == str(given.flags)
    parts = values_crossing(x.regrouped)
    assert parts
    assert all(set(part["n"].strides) == {0} or part["n"].size == 1 for part in parts)
    assert sum(map(sizeof, parts)) == crossing(x.regrouped)


def test_counts_that_differ_and_those_of_masked_arrays_cross_as_they_are() -> None:
    blocks = blocks_of(24, (2, 50))
    for block in blocks:
        block[0, ::2] = np.nan
    x = series(blocks, "ab")
    for reduced in (da.nanmean(x, axis=0), da.nanstd(x, axis=0), da.ma.masked_invalid(x).mean(0)):
        y = both(reduced)
        given, regrouped = y.values()
        np.testing.assert_allclose(regrouped, given, rtol=1e-12)
        assert type(regrouped) is type(given)
        parts = values_crossing(y.regrouped)
        assert all(0 not in part["n"].strides for part in parts)
        assert 0 < sum(map(sizeof, parts)) <= crossing(y.regrouped)


def test_where_nothing_is_missing_what_skips_the_missing_sends_one_number_too() -> None:
    y = both(da.nanmean(series(blocks_of(24, (2, 500)), "ab"), axis=0))
    assert sum(map(sizeof, values_crossing(y.regrouped))) < 0.6 * crossing(y.regrouped)


def test_no_step_reads_more_parts_than_a_given_one_but_for_one_of_each_pool() -> None:
    given, regrouped = (
        max(len(task.dependencies) for task in a.tasks.values())
        for x in [both(series(blocks_of(100), "ab").sum(0))]
        for a in (x.given, x.regrouped)
    )
    assert regrouped <= given + 1


def total(block: np.ndarray, axis: Any, keepdims: bool) -> np.ndarray:
    """A function of the user."""
    return block.sum(axis=axis, keepdims=keepdims)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: da.cumsum(x, axis=0)[-1],
        lambda x: da.reduction(x, total, total, 0, dtype=float),
        lambda x: da.argtopk(x, 2, axis=0),
        lambda x: x.astype(object).sum(0),
        lambda x: x + 1,
    ],
    ids=["cumulative sum", "a function of the user", "argtopk", "objects", "no reduction"],
)
def test_what_depends_on_order_or_is_not_known_stays_as_it_is(make: Callable[[da.Array], da.Array]) -> None:
    x = both(make(series(blocks_of(), "ab")))
    assert not x.names
    assert x.given.tasks.keys() == x.regrouped.tasks.keys()


def test_texts_are_summed_in_their_order() -> None:
    words = [np.array([f"w{i}"], dtype=object) for i in range(20)]
    x = both(series(words, "ab").sum())
    assert not x.names
    assert x.values()[1] == "".join(f"w{i}" for i in range(20))


def test_series_whose_pools_lie_one_after_the_other_are_left_as_they_are() -> None:
    x = both(series(blocks_of(32), "a" * 16 + "b" * 16).mean(0))
    assert not x.names


@pytest.mark.parametrize("pools", ["a", "b"])
def test_reductions_within_a_pool_are_left_as_they_are(pools: str) -> None:
    blocks = blocks_of()
    x = both(series(blocks, pools).mean(0) - series(blocks[:2], "ab"[pools == "a"]))
    assert not x.names


def test_the_first_of_equals_counts_wherever_it_lies() -> None:
    blocks = [np.zeros((1, 3)) for _ in range(30)]
    for at in (1, 2, 7, 28):
        blocks[at][:] = 9.0
    for axis in (0, None):
        x = series(blocks, "ab")
        assert both(x.argmax(axis)).names
        np.testing.assert_array_equal(both(x.argmax(axis)).values()[1], np.concatenate(blocks).argmax(axis))
        np.testing.assert_array_equal(both(x.argmin(axis)).values()[1], np.concatenate(blocks).argmin(axis))


ADVERSE: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "nothing": lambda rng, i: rng.random((i % 3, 4)),
    "not a number": lambda rng, i: np.where(rng.random((2, 4)) < 0.1, np.nan, 1.0),
    "infinite": lambda rng, i: np.array([[np.inf, -np.inf, 1.0, np.inf if i % 2 else -np.inf]]),
    "huge range": lambda rng, i: 10.0 ** rng.integers(-150, 140, (2, 4)) * rng.choice([-1, 1], (2, 4)),
    "large offset": lambda rng, i: 1e9 + rng.random((2, 4)),
    "small floats": lambda rng, i: rng.random((2, 4), dtype=np.float32),
    "complex": lambda rng, i: rng.random((2, 4)) + 1j * rng.random((2, 4)),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::numpy.exceptions.ComplexWarning")
@pytest.mark.parametrize(
    ("name", "reduce"),
    [
        (name, reduce)
        for name in ADVERSE
        for reduce in ("sum", "prod", "mean", "var", "std", "min", "max")
        if (name, reduce) != ("huge range", "prod")  # overflows or not, as the order is
    ],
)
def test_adverse_values_come_out_as_numpy_has_them(name: str, reduce: str) -> None:
    rng = np.random.default_rng(1)
    blocks = [ADVERSE[name](rng, i) for i in range(26)]
    if name == "nothing" and reduce in {"min", "max"}:
        blocks = [block.ravel() for block in blocks]  # Dask itself fails for two dimensions
    x = both(getattr(series(blocks, "ab"), reduce)(0))
    assert x.names
    expected = getattr(np.concatenate(blocks), reduce)(0)
    tolerance = 1e-4 if blocks[0].dtype == np.float32 else 1e-6 if name == "large offset" else 1e-9
    np.testing.assert_allclose(x.values()[1], expected, rtol=tolerance)
    assert x.values()[1].dtype == expected.dtype


@pytest.mark.parametrize("dtype", ["i1", "u1", "i4", "i8", "u8", "?"])
def test_integers_come_out_exactly_overflow_included(dtype: str) -> None:
    rng = np.random.default_rng(2)
    ends = (0, 2) if dtype == "?" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    blocks = [rng.integers(*ends, (3, 4), dtype="u8" if dtype == "u8" else "i8").astype(dtype) for _ in range(30)]
    for reduce in ("sum", "prod", "min", "max"):
        for options in ({}, {"dtype": "i4"} if reduce in {"sum", "prod"} else {}):
            x = both(getattr(series(blocks, "ab"), reduce)(axis=0, **options))
            assert x.names
            expected = getattr(np.concatenate(blocks), reduce)(axis=0, **options)
            np.testing.assert_array_equal(x.values()[1], expected)
            assert x.values()[1].dtype == expected.dtype


def test_masked_arrays_are_regrouped_and_right() -> None:
    blocks = blocks_of()
    masked = da.ma.masked_greater(series(blocks, "ab"), 50)
    expected = np.ma.masked_greater(np.concatenate(blocks), 50)
    for reduce in ("sum", "mean", "var", "max"):
        x = both(getattr(masked, reduce)(axis=0))
        assert x.names
        np.testing.assert_allclose(x.values()[1], getattr(expected, reduce)(axis=0))


def test_blocks_in_two_dimensions_are_merged_by_pool() -> None:
    rng = np.random.default_rng(3)
    values = rng.random((12, 15))
    rows = []
    for i in range(6):
        row = []
        for j in range(5):
            with pool("ab"[(i + j) % 2]):
                row.append(da.from_array(values[2 * i : 2 * i + 2, 3 * j : 3 * j + 3], chunks=(2, 3)))
        rows.append(row)
    x = da.block(rows)
    for axis in (0, 1, None, (0, 1)):
        for reduce in ("sum", "mean", "var", "max", "argmin"):
            if reduce == "argmin" and isinstance(axis, tuple):
                continue
            y = both(getattr(x, reduce)(axis=axis))
            assert y.names
            np.testing.assert_allclose(y.values()[1], getattr(values, reduce)(axis=axis))


@settings(max_examples=60)
@given(
    pools=st.lists(st.sampled_from("abc"), min_size=2, max_size=40),
    reduce=st.sampled_from(["sum", "mean", "var", "max"]),
    split_every=st.sampled_from([2, 3, 4, 8]),
    axis=st.sampled_from([0, None]),
)
def test_any_mixture_of_pools_gives_the_right_result_and_never_more_bytes(
    pools: list[str], reduce: str, split_every: int, axis: int | None
) -> None:
    blocks = blocks_of(len(pools), (1, 3), seed=len(pools))
    x = both(getattr(series(blocks, "".join(pools)), reduce)(axis=axis, split_every=split_every))
    np.testing.assert_allclose(x.values()[1], getattr(np.concatenate(blocks), reduce)(axis=axis), rtol=1e-9)
    assert crossing(x.regrouped) <= crossing(x.given) * (1 + 1e-9)


@settings(max_examples=40)
@given(st.data())
def test_reductions_of_shared_values_never_cost_more_bytes(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 12))
    pools = "".join(data.draw(st.lists(st.sampled_from("ab"), min_size=n, max_size=n)))
    x = series(blocks_of(n, (1, 4)), pools) * 2
    with pool(data.draw(st.sampled_from("ab"))):
        elsewhere = da.from_array(np.ones(4), chunks=4)
    y = both((x.mean(0) + x.var(0) * x.sum(0)) * elsewhere)
    given, regrouped = y.values()
    np.testing.assert_allclose(regrouped, given, rtol=1e-9)
    assert crossing(y.regrouped) <= crossing(y.given) * (1 + 1e-9)


def test_planning_twice_and_in_any_order_makes_the_same_keys() -> None:
    expr = expression(series(blocks_of(), "ab").std(0))
    first, second = plan(expr), plan(expr)
    assert first.tasks.keys() == second.tasks.keys()
    other = plan(expression(series(blocks_of(), "ba").std(0)))
    parts = {key for key in first.tasks if "part" in str(key)}
    assert parts
    assert not parts & other.tasks.keys()


def test_results_keep_their_keys() -> None:
    x = both(series(blocks_of(), "ab").mean(0))
    assert set(x.regrouped.keys) <= x.regrouped.tasks.keys()
    assert x.given.keys == x.regrouped.keys


def test_parts_that_a_user_asked_for_stay() -> None:
    """A sum over axes with keepdims looks like a part; others may read it, too."""
    total = series(blocks_of(), "ab").sum(0, keepdims=True)
    x = both(da.concatenate([total, total * 2]))
    given, regrouped = x.values()
    np.testing.assert_allclose(regrouped, given)
    with dask.config.set({"optimization.fuse.active": False}):
        y = both(da.concatenate([total, total * 2]))
        np.testing.assert_allclose(y.values()[1], given)


def test_reductions_with_annotations_of_their_own_keep_them() -> None:
    x = series(blocks_of(), "ab")
    with dask.annotate(priority=3), dask.config.set({"optimization.fuse.active": False}):
        total = x.sum(0)
    with dask.config.set({"optimization.fuse.active": False}):
        assignment = plan(expression(total))
        given, regrouped = both(total).values()
    np.testing.assert_allclose(regrouped, given)
    assert set(assignment.annotations.get("priority", {})) <= assignment.tasks.keys()


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.mean("time"),
        lambda x: x.mean("time", skipna=False),
        lambda x: x.std("time"),
        lambda x: x.sum(),
        lambda x: x.max(["time", "x"]),
        lambda x: x.min("time"),
        lambda x: x.prod("time"),
        lambda x: x.var("time", ddof=1),
        lambda x: (x > 0.5).any("time"),
        lambda x: (x > 0.001).all("time"),
        lambda x: x.groupby("time.season").std(),
        lambda x: x.groupby("time.quarter").sum(),
        lambda x: x.count("time"),
        lambda x: x.groupby("time.quarter").mean(),
        lambda x: x.groupby("time.season").max(),
        lambda x: x.resample(time="QS").mean(),
        lambda x: x.weighted(xr.DataArray(np.arange(1, 4), dims="y")).mean(["time", "y"]),
        lambda x: (x - x.mean("time")).std("time"),
    ],
)
@pytest.mark.parametrize("use_flox", [False, True])
def test_xarray_reductions_are_regrouped_and_right(
    use_flox: bool, make: Callable[[xr.DataArray], xr.DataArray]
) -> None:
    lazy, eager = climate("aabab")
    with xr.set_options(use_flox=use_flox):
        result = make(lazy)
    x = both(result.data)
    assert x.names
    np.testing.assert_allclose(x.values()[1], make(eager).transpose(*result.dims), rtol=1e-9)
    assert crossing(x.regrouped) < crossing(x.given)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.cumsum("time"),
        lambda x: x.chunk(time=-1).quantile(0.3, "time"),
        lambda x: x.chunk(time=-1).median("time"),
        lambda x: x.chunk(time=-1).groupby("time.season").quantile(0.5),
        lambda x: x.isel(time=slice(2, None)),
    ],
    ids=["cumulative sum", "quantile", "median", "quantile by group", "no reduction"],
)
@pytest.mark.parametrize("use_flox", [False, True])
def test_what_xarray_cannot_do_in_parts_stays_and_is_right(
    use_flox: bool, make: Callable[[xr.DataArray], xr.DataArray]
) -> None:
    lazy, eager = climate("aabab")
    with xr.set_options(use_flox=use_flox):
        result = make(lazy)
    x = both(result.data)
    assert not x.names
    np.testing.assert_allclose(x.values()[1], make(eager).transpose(*result.dims), rtol=1e-12)


def frame(pools: str = "ab", n: int = 14) -> tuple[dd.DataFrame, pd.DataFrame]:
    rng = np.random.default_rng(5)
    parts, frames = [], []
    for i in range(n):
        values = {"k": rng.integers(0, 5, 40), "v": rng.normal(size=40), "w": rng.integers(0, 99, 40)}
        frames.append(pd.DataFrame({**values, "s": [f"t{i}-{j}" for j in range(40)]}))
        with pool(pools[i % len(pools)]):
            parts.append(dd.from_pandas(frames[-1], npartitions=1))
    return dd.concat(parts), pd.concat(frames)


FRAMES: dict[str, Callable[[Any], Any]] = {
    "sum": lambda d: d.v.sum(),
    "sum of columns": lambda d: d[["v", "w"]].sum(),
    "prod": lambda d: d.v.prod(),
    "mean": lambda d: d.v.mean(),
    "min": lambda d: d.v.min(),
    "max of texts": lambda d: d.s.max(),
    "any": lambda d: (d.v > 3).any(),
    "all": lambda d: (d.v > -9).all(),
    "count": lambda d: d.w.count(),
    "std": lambda d: d.v.std(),
    "sum by group": lambda d: d.groupby("k")[["v", "w"]].sum(),
    "mean by group": lambda d: d.groupby("k").v.mean(),
    "std by group": lambda d: d.groupby("k").v.std(),
    "max by group": lambda d: d.groupby("k").v.max(),
    "size by group": lambda d: d.groupby("k").size(),
    "several by group": lambda d: d.groupby("k").agg({"v": ["mean", "std", "max"], "w": "sum"}),
    "sorted groups": lambda d: d.groupby("k", sort=True).w.sum(),
}


@pytest.mark.parametrize("name", FRAMES)
def test_reductions_of_tables_are_regrouped_and_right(name: str) -> None:
    lazy, eager = frame()
    x = both(FRAMES[name](lazy))
    assert x.names
    given, regrouped = x.values()
    assert_same(regrouped, given)
    expected = FRAMES[name](eager)
    if isinstance(expected, pd.DataFrame | pd.Series) and "group" in name:
        assert regrouped.index.equals(given.index)
        regrouped = regrouped.sort_index()  # Dask sorts groups only where that is asked for
    assert_same(regrouped, expected)


def assert_same(left: Any, right: Any) -> None:
    if isinstance(right, pd.DataFrame):
        pd.testing.assert_frame_equal(left, right, check_dtype=False)
    elif isinstance(right, pd.Series):
        pd.testing.assert_series_equal(left, right, check_dtype=False, check_names=False)
    elif isinstance(right, str):
        assert left == right
    else:
        assert left == pytest.approx(right)


@pytest.mark.parametrize(
    "make",
    [
        lambda d: d.s.sum(),
        lambda d: d.groupby("k").s.sum(),
        lambda d: d.groupby("k").v.first(),
        lambda d: d.groupby("k").agg({"v": "last"}),
        lambda d: d.v.idxmax(),
        lambda d: d.v.value_counts(),
        lambda d: d.k.nunique(),
        lambda d: d.k.drop_duplicates(),
        lambda d: d.k.unique(),
        lambda d: d.groupby("k").v.median(),
        lambda d: d.groupby("k").v.cumsum(),
        lambda d: d.v.cumsum(),
        lambda d: d.v.quantile(0.5),
        lambda d: d.v.mode(),
        lambda d: d.nlargest(3, "v"),
        lambda d: d.v.reduction(lambda p: p.sum(), lambda p: p.sum()),
    ],
)
def test_tables_whose_order_counts_or_whose_function_is_not_known_stay(make: Callable[[Any], Any]) -> None:
    x = both(make(frame()[0]))
    assert not x.names


GROUPS: dict[str, Callable[..., Any]] = {
    "sum": lambda d, **options: d.groupby("k", **options).v.sum(),
    "mean": lambda d, **options: d.groupby("k", **options).v.mean(),
    "std": lambda d, **options: d.groupby("k", **options).v.std(),
    "size": lambda d, **options: d.groupby("k", **options).size(),
    "several": lambda d, **options: d.groupby("k", **options).agg({"v": ["mean", "max"], "m": "sum"}),
    "several groups": lambda d, **options: d.groupby(["m", "k"], **options).v.max(),
    "categories": lambda d, **options: d.groupby("c", observed=False, **options).v.sum(),
    "observed categories": lambda d, **options: d.groupby("c", observed=True, **options).v.mean(),
    "no group": lambda d, **options: d.groupby("m", dropna=False, **options).v.sum(),
}


@pytest.mark.parametrize("sort", [None, True, False])
@pytest.mark.parametrize("pools", ["ab", "abbac"])
@pytest.mark.parametrize("name", GROUPS)
def test_rows_of_groups_come_in_the_order_in_which_dask_has_them(name: str, pools: str, sort: bool | None) -> None:
    """Each partition has few of the groups, so that some come up first in a late one."""
    rng = np.random.default_rng(6)
    parts = []
    for i in range(14):
        n = 0 if i in {0, 7} else 6
        values = {"k": rng.integers(0, 40, n), "m": rng.choice([1.0, 2.0, np.nan], n), "v": rng.normal(size=n)}
        part = pd.DataFrame({**values, "c": pd.Categorical(rng.choice(list("zxy"), n), categories=list("wxyz"))})
        with pool(pools[i % len(pools)]):
            parts.append(dd.from_pandas(part, npartitions=1, sort=False))
    x = both(GROUPS[name](dd.concat(parts), **({} if sort is None else {"sort": sort})))
    given, regrouped = x.values()
    assert regrouped.index.equals(given.index)
    assert_same(regrouped, given)
    if sort:
        assert regrouped.index.dropna().is_monotonic_increasing
    if name != "several groups" or sort:  # Dask shuffles those otherwise
        assert x.names


@pytest.mark.parametrize("name", ["sum", "max", "min", "count", "any", "all"])
def test_reductions_of_bags_are_regrouped_and_right(name: str) -> None:
    parts = []
    for i in range(30):
        with pool("ab"[i % 2]):
            parts.append(db.from_sequence(range(i % 4, i + 1), npartitions=1))
    x = both(getattr(db.concat(parts), name)())
    assert x.names
    given, regrouped = x.values()
    assert regrouped == given
    assert not both(db.concat(parts).fold(lambda a, b: a + b)).names


def test_calls_of_delayed_functions_are_left_as_they_are() -> None:
    @dask.delayed
    def total(parts: list[float]) -> float:
        return sum(parts)

    values = []
    for i in range(8):
        with pool("ab"[i % 2]):
            values.append(dask.delayed(float)(i))
    assert not both(total([total(values[:4]), total(values[4:])])).names


def test_explain_says_how_many_reductions_were_regrouped() -> None:
    x = both(series(blocks_of(), "ab").sum(0))
    assert "1 reductions regrouped by pool" in str(Plan(x.regrouped))
    assert "regrouped" not in str(Plan(x.given))


def test_the_setting_switches_it_off() -> None:
    assignment = plan(expression(series(blocks_of(), "ab").mean(0)), is_regrouping=False)
    assert not assignment.regrouped
    assert "part-a" not in "".join(map(str, assignment.tasks))


# ---------------------------------------------------------------------------------------------------------------
# What this relies on in Dask: fails loudly when Dask changes


@pytest.mark.parametrize("name", FAMILIES)
def test_every_function_of_the_table_of_arrays_exists(name: str) -> None:
    family = FAMILIES[name]
    for function in (*family.finals, family.combine, *family.added.values()):
        assert callable(loaded(function)), function


@pytest.mark.parametrize("name", TABLES)
def test_every_class_of_the_table_of_tables_exists(name: str) -> None:
    kind = loaded(TABLES[name].name)
    assert callable(kind.aggregate)
    assert callable(kind.combine or kind.aggregate)


def test_every_function_of_bags_exists() -> None:
    assert all(callable(loaded(name)) for name in BAGS)
    assert callable(loaded("dask.bag.core:empty_safe_aggregate"))


def families_in(x: Any) -> Counter[str]:
    reader, found = Reader(), Counter[str]()
    for task in plan(expression(x), is_regrouping=False).tasks.values():
        if (step := reader.step(task)) is not None:
            found[step.reduction.family] += 1
    return found


@pytest.mark.parametrize(
    ("family", "make"),
    [
        ("sum", lambda x: x.sum(0)),
        ("prod", lambda x: x.prod(0)),
        ("any", lambda x: (x > 0).any(0)),
        ("all", lambda x: (x > 0).all(0)),
        ("min", lambda x: x.min(0)),
        ("max", lambda x: x.max(0)),
        ("nanmin", lambda x: da.nanmin(x, 0)),
        ("nanmax", lambda x: da.nanmax(x, 0)),
        ("mean", lambda x: x.mean(0)),
        ("moment", lambda x: x.var(0)),
        ("arg", lambda x: x.argmax(0)),
        ("topk", lambda x: x.topk(2, axis=0)),
        ("matmul", lambda x: x.T @ x),
        ("bincount", lambda x: da.bincount(x[:, 0].astype(int))),
    ],
)
def test_dask_still_writes_each_family_in_the_form_that_is_recognised(
    family: str, make: Callable[[da.Array], da.Array]
) -> None:
    """Two levels of combines and a last step: 24 blocks, four at a time."""
    assert families_in(make(series(blocks_of(), "a"))) == {family: 6 + 2 + 1}


def test_a_dask_without_these_functions_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "mean", replace(FAMILIES["mean"], combine="dask.array.reductions:gone"))
    x = both(series(blocks_of(), "ab").mean(0))
    assert not x.names
    assert x.given.tasks.keys() == x.regrouped.tasks.keys()
