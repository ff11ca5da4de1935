"""Estimated sizes against the true ones: every graph here is run, and every value's size taken.

Covers arrays, xarray, tables, delayed, fused and not fused, and odd input. The true size is Dask's own count of bytes,
which is what a transfer is logged with (tests/integration/test_sizes_measured.py).
"""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from dask._task_spec import Alias, DataNode, GraphNode, Task, TaskRef, convert_legacy_graph, fuse_linear_task_spec
from dask.base import collections_to_expr
from dask.dataframe.dask_expr.io.parquet import FragmentWrapper
from dask.highlevelgraph import HighLevelGraph, Layer, MaterializedLayer
from dask.order import order
from dask.sizeof import sizeof
from dask.typing import Key

from meshcompute.graphs.sizes import estimate_nbytes

DEFAULT_NBYTES = 1024  # distributed.scheduler.default-data-size
SLACK_NBYTES = 200  # below it, the overhead of Python's objects blurs every ratio


def layers_of(collection: Any) -> Mapping[str, Layer]:
    graph = collection.__dask_graph__()
    return graph.layers if isinstance(graph, HighLevelGraph) else {}


def fused_graph(collection: Any) -> dict[Key, GraphNode]:
    return convert_legacy_graph(collections_to_expr(collection).finalize_compute().optimize().__dask_graph__())


def plain_graph(collection: Any) -> dict[Key, GraphNode]:
    return convert_legacy_graph(dict(collection.__dask_graph__()))


def true_nbytes(dsk: Mapping[Key, GraphNode]) -> dict[Key, float]:
    priorities = order(dsk)
    values: dict[Key, Any] = {}
    for key in sorted(dsk, key=priorities.__getitem__):
        values[key] = dsk[key](values)
    return {key: weight(value) for key, value in values.items()}


def weight(value: Any) -> float:
    """Size of a value; Dask does not see what is inside flox's arrays of several."""
    if isinstance(value, dict) and "intermediates" in value:
        return sum(map(sizeof, [array for one in value["intermediates"] for array in getattr(one, "arrays", [one])]))
    return sizeof(value)


def misjudged(dsk: Mapping[Key, GraphNode], layers: Mapping[str, Layer]) -> dict[Key, tuple[float, float]]:
    """Return estimated and true sizes of the tasks whose estimate is not within 0.7 - 1.4 of the truth."""
    estimated, true = estimate_nbytes(dsk, layers), true_nbytes(dsk)
    assert estimated.keys() == dsk.keys()
    return {
        key: (estimated[key], true[key])
        for key in dsk
        if not 0.7 * true[key] <= estimated[key] <= 1.4 * true[key] and abs(estimated[key] - true[key]) > SLACK_NBYTES
    }


def array(dtype: str = "f8") -> da.Array:
    values = np.random.default_rng(0).random((120, 60, 50)) * 100
    return da.from_array(values.astype(dtype), chunks=(10, 30, 50))


def field() -> xr.DataArray:
    times = xr.date_range("2000-01-01", periods=120)
    return xr.DataArray(
        array("f4"), dims=("time", "y", "x"), coords={"time": times, "y": np.arange(60), "x": np.arange(50)}
    )


REDUCTIONS = [
    *("sum", "mean", "std", "var", "min", "max", "any", "all", "argmin", "argmax", "ptp"),
    *("nansum", "nanmean", "nanvar", "nanstd", "nanmin", "nanmax", "nanargmax"),
]


@pytest.mark.parametrize("graph_of", [fused_graph, plain_graph])
@pytest.mark.parametrize("dtype", ["f8", "f4", "i2"])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_are_estimated_by_what_their_steps_carry(
    name: str, dtype: str, graph_of: Callable[[Any], dict[Key, GraphNode]]
) -> None:
    for axis in (0, None) if "arg" in name or name == "ptp" else (0, (0, 1), None):
        result = getattr(da, name)(array(dtype), axis=axis)
        assert misjudged(graph_of(result), layers_of(result)) == {}


ARRAYS: dict[str, Callable[[da.Array], Any]] = {
    "third moment": lambda x: da.reductions.moment(x, 3, axis=0),
    "topk": lambda x: da.topk(x, 3, axis=0),
    "smallest two": lambda x: da.topk(x, -2, axis=1),
    "argtopk": lambda x: da.argtopk(x, 3, axis=0).rechunk(5),
    "count_nonzero": lambda x: da.count_nonzero(x > 50, axis=0),
    "histogram": lambda x: da.histogram(x, bins=50, range=(0, 100))[0],
    "average": lambda x: da.average(x, axis=0, weights=np.arange(120)),
    "cumsum": lambda x: x.cumsum(0),
    "blelloch": lambda x: da.cumsum(x, axis=0, method="blelloch"),
    "median": lambda x: da.median(x, axis=0),
    "rechunk": lambda x: x.rechunk((7, 31, 9), method="tasks"),
    "overlap": lambda x: x.map_overlap(lambda block: block, depth=1),
    "slice": lambda x: x[5:77:3, ::2] + 1,
    "fancy index": lambda x: x[[1, 50, 3, 99]] * 2,
    "concatenate": lambda x: da.concatenate([x, x + 1]),
    "stack": lambda x: da.stack([x, x * 2]),
    "where": lambda x: da.where(x > 3, x, 0),
    "astype": lambda x: x.astype("f4").mean(0),
    "tensordot": lambda x: da.tensordot(x[:, 0], x[:, 0], axes=([0], [0])),
    "matmul": lambda x: x[:, 0].T @ x[:, 0],
    "covariance": lambda x: da.cov(x[:, 0].T),
    "einsum": lambda x: da.einsum("ijk,ij->k", x, x[:, :, 0]),
    "reshape": lambda x: x.reshape(120, -1),
    "transpose": lambda x: x.T + 0,
    "ones": lambda x: da.ones((100, 100), chunks=10) + x[:100, 0, 0],
    "searchsorted": lambda x: da.searchsorted(da.arange(1000, chunks=500), x[:, 0, 0]),
    "fft": lambda x: da.fft.fft(x, axis=2),
    "generalised ufunc": lambda x: da.apply_gufunc(lambda a: a.mean(-1), "(i)->()", x, output_dtypes="f8"),
    "irregular chunks": lambda x: x.rechunk(((1, 100, 19), (60,), (3, 40, 7))).std(0),
}


@pytest.mark.parametrize("graph_of", [fused_graph, plain_graph])
@pytest.mark.parametrize("name", ARRAYS)
def test_array_functions_are_estimated_by_chunks_and_dtypes(
    name: str, graph_of: Callable[[Any], dict[Key, GraphNode]]
) -> None:
    result = ARRAYS[name](array())
    # The first step of an argtopk is not worth a rule: its second value is as long as one axis.
    wrong = {key for key in misjudged(graph_of(result), layers_of(result)) if "argtopk_preprocess" not in str(key)}
    assert wrong == set()


XARRAYS: dict[str, Callable[[xr.DataArray], Any]] = {
    "mean": lambda t: t.mean("time"),
    "standard deviation": lambda t: t.std("time"),
    "sum over two": lambda t: t.sum(["time", "x"]),
    "count": lambda t: t.count("time"),
    "argmax": lambda t: t.argmax("time"),
    "idxmax": lambda t: t.idxmax("time"),
    "quantile": lambda t: t.chunk(time=-1).quantile(0.5, "time"),
    "climatology": lambda t: t.groupby("time.month").mean(),
    "anomaly": lambda t: t.groupby("time.month") - t.groupby("time.month").mean(),
    "spread per month": lambda t: t.groupby("time.month").std(),
    "coarsen": lambda t: t.coarsen(time=5).mean(),
    "rolling": lambda t: t.rolling(time=5).mean(),
    "resample": lambda t: t.resample(time="7D").mean(),
    "weighted": lambda t: t.weighted(np.cos(np.deg2rad(t.y))).mean(("y", "x")),
    "select": lambda t: t.sel(time="2000-02").mean("time"),
    "shift": lambda t: t.shift(time=1),
    "difference": lambda t: t.diff("time"),
    "concat": lambda t: xr.concat([t, t + 1], "time"),
    "correlation": lambda t: xr.corr(t, t + t.mean("time"), "time"),
    "dot": lambda t: xr.dot(t, t + 1, dim="time"),
    "masked": lambda t: t.where(t > 50).mean("time"),
    "parallelized ufunc": lambda t: xr.apply_ufunc(lambda a: a * 2, t, dask="parallelized", output_dtypes=["f4"]),
    "dataset": lambda t: xr.Dataset({"t": t, "u": t.astype("f8")}).mean("time"),
}


@pytest.mark.parametrize("name", XARRAYS)
def test_xarray_is_estimated_by_the_arrays_beneath(name: str) -> None:
    with xr.set_options(use_flox=False):
        result = XARRAYS[name](field())
    assert misjudged(fused_graph(result), layers_of(result)) == {}


GROUPS: dict[str, Callable[[xr.DataArray], Any]] = {
    **{name: XARRAYS[name] for name in ("climatology", "anomaly", "spread per month", "resample")},
    "each day of the week": lambda t: t.groupby("time.dayofweek").mean(),
    "spread of days of the week": lambda t: t.astype("f8").groupby("time.dayofweek").std(),
    "count of days of the week": lambda t: t.groupby("time.dayofweek").count(),
    "longer than blocks": lambda t: t.resample(time="25D").max(),
    "a few groups in a block": lambda t: t.groupby(t.time.dt.dayofyear // 7).sum(),
    "in two dimensions": lambda t: t.groupby_bins("y", [0, 9, 30, 60]).mean(...),
}


@pytest.mark.parametrize("name", GROUPS)
def test_parts_of_flox_are_as_large_as_their_groups(name: str) -> None:
    with xr.set_options(use_flox=True):
        result = GROUPS[name](field())
    assert misjudged(fused_graph(result), layers_of(result)) == {}


def test_opened_files_are_estimated_by_their_chunks(tmp_path: Path) -> None:
    field().to_dataset(name="t").compute().to_netcdf(tmp_path / "t.nc")
    with xr.open_dataset(tmp_path / "t.nc", chunks={"time": 7}) as ds:
        result = ds.t.mean("time")
        wrong = misjudged(fused_graph(result), layers_of(result))
    assert all(str(key).startswith("original-") for key in wrong), wrong


def test_stored_blocks_leave_nothing_behind(tmp_path: Path) -> None:
    stored = array().to_zarr(str(tmp_path / "x.zarr"), compute=False)
    dsk = fused_graph(stored)
    sizes = estimate_nbytes(dsk, layers_of(stored))
    assert {size for key, size in sizes.items() if "store-map" in str(key)} == {sizeof(None)}


@pytest.mark.parametrize("name", ["mean", "var", "argmin"])
def test_layers_that_were_pickled_say_the_same(name: str) -> None:
    result = getattr(da, name)(array(), axis=0)
    dsk, layers = fused_graph(result), dict(layers_of(result))
    there = pickle.loads(cloudpickle.dumps((dsk, layers)))
    assert estimate_nbytes(*there) == estimate_nbytes(dsk, layers)


def test_a_fused_chain_has_the_size_of_its_last_step_under_its_new_key_and_its_old_one() -> None:
    x = array()[:40].astype("f4")
    chain = fuse_linear_task_spec(plain_graph(x), set())
    renamed = {node.target: key for key, node in chain.items() if isinstance(node, Alias)}
    assert renamed
    sizes = estimate_nbytes(chain, layers_of(x))
    assert {(sizes[new], sizes[old]) for new, old in renamed.items()} == {(10 * 30 * 50 * 4.0,) * 2}


def test_literal_data_counts_as_what_it_is() -> None:
    values = np.zeros(1000)
    dsk: dict[Key, GraphNode] = {"data": DataNode("data", values), "alias": Alias("alias", "data")}
    assert estimate_nbytes(dsk, {}) == {"data": 8000.0, "alias": 8000.0}


def test_a_function_nobody_knows_yields_a_little_less_than_its_largest_input() -> None:
    x = dask.delayed(np.zeros(1000), pure=True)
    result = dask.delayed(max)(dask.delayed(abs)(x, dask_key_name="a"), dask.delayed(len)("x", dask_key_name="b"))
    sizes = estimate_nbytes(plain_graph(result), layers_of(result))
    assert sizes["b"] == DEFAULT_NBYTES
    assert 7900.0 < sizes[result.key] < sizes["a"] < 8000.0


def test_parts_of_a_table_are_larger_than_their_sums() -> None:
    frame = pd.DataFrame({"a": np.arange(10_000), "b": np.arange(10_000.0), "k": np.arange(10_000) % 7})
    table = dd.from_pandas(frame, npartitions=4)
    for result in (table.b.sum(), table.max(), table.groupby("k").b.mean()):
        dsk = convert_legacy_graph(result.optimize().__dask_graph__())
        sizes, true = estimate_nbytes(dsk, {}), true_nbytes(dsk)
        parts = [key for key, node in dsk.items() if isinstance(node, DataNode)]
        sums = [key for key in dsk if isinstance(key, tuple) and "chunk" in str(key[0])]
        assert len(parts) == len(sums) == 4
        for part, condensed in zip(parts, sums, strict=True):
            assert 0.7 * true[part] <= sizes[part] <= 1.4 * true[part]
            assert sizes[condensed] <= 0.1 * sizes[part]


def test_what_adds_a_column_to_a_table_makes_it_larger() -> None:
    frame = pd.DataFrame({"a": np.arange(10_000), "b": np.arange(10_000.0), "k": np.arange(10_000) % 7})
    lazy = dd.from_pandas(frame, npartitions=4).groupby("k").agg(["mean", "std"], split_out=2)
    dsk = convert_legacy_graph(lazy.optimize(fuse=False).__dask_graph__())
    sizes = estimate_nbytes(dsk, {})
    names = {key: getattr(getattr(node, "func", None), "__qualname__", "") for key, node in dsk.items()}
    wider = [key for key in dsk if key[0].startswith("reset_index") or names[key].startswith("AssignPartitioning")]
    assert len(wider) == 8
    for key in wider:
        (source,) = dsk[key].dependencies
        assert sizes[key] > sizes[source]


def test_a_table_s_part_has_the_size_of_the_files_it_is_read_from_where_that_is_known() -> None:
    # Arrow lists sizes in object stores; of local files dask.dataframe does not ask for them.
    fragments = [(FragmentWrapper(object(), None, file_size=5000), None) for _ in range(2)]
    known = Task(("known", 0), print, Task(None, print, fragment_wrapper=fragments[0][0]))
    fused = Task(("fused", 0), print, fragments)
    unknown = Task(("unknown", 0), print, FragmentWrapper(object(), None))
    sizes = estimate_nbytes({node.key: node for node in (known, fused, unknown)}, {})
    assert sizes == {known.key: 5000.0, fused.key: 10_000.0, unknown.key: DEFAULT_NBYTES}


def test_p2p_rechunk_sends_blocks_and_hands_on_little_else() -> None:
    distributed_shuffle = pytest.importorskip("distributed.shuffle._rechunk")
    x = array()
    y = distributed_shuffle.rechunk_p2p(
        x, chunks=((60, 60), (60,), (25, 25)), threshold=4, block_size_limit=10**9, balance=False
    )
    sizes = estimate_nbytes(plain_graph(y), layers_of(y))
    assert {size for key, size in sizes.items() if key[0] == y.name} == {60 * 60 * 25 * 8.0}
    sent = [size for key, size in sizes.items() if "transfer" in str(key)]
    assert sum(sent) == x.nbytes
    small = [size for key, size in sizes.items() if "barrier" in str(key)]
    assert small
    assert max(small) < SLACK_NBYTES


def test_a_gufunc_s_blocks_have_its_core_dimensions() -> None:
    x = array("f4").rechunk((10, 60, 50))
    both = da.apply_gufunc(
        lambda v: (np.repeat(v, 3, axis=-1), v.sum(axis=(-2, -1))),
        "(i,j)->(i,k),()",
        x,
        output_dtypes=("f4", "f4"),
        output_sizes={"k": 150},
    )
    for y in (both[0], da.apply_gufunc(np.transpose, "(i,j)->(j,i)", x[0], output_dtypes="f4")):
        assert not misjudged(fused_graph(y), layers_of(y))
        assert not misjudged(plain_graph(y), layers_of(y))


def test_p2p_shuffle_hands_on_equal_shares() -> None:
    from distributed.shuffle._core import p2p_barrier
    from distributed.shuffle._shuffle import shuffle_transfer, shuffle_unpack

    dsk: dict[Key, GraphNode] = {}
    for i in range(3):
        dsk["part", i] = DataNode(("part", i), np.zeros(1000))
        dsk["transfer", i] = Task(("transfer", i), shuffle_transfer, dsk["part", i].ref(), "id", i)
    dsk["barrier"] = Task("barrier", p2p_barrier, "id", *[dsk["transfer", i].ref() for i in range(3)])
    for i in range(4):
        dsk["unpack", i] = Task(("unpack", i), shuffle_unpack, "id", i, dsk["barrier"].ref())
    sizes = estimate_nbytes(dsk, {})
    assert [sizes["unpack", i] for i in range(4)] == [6000.0] * 4
    assert sizes["transfer", 0] == 8000
    assert sizes["barrier"] == 28


def shuffled_tables(kind: str) -> dict[Key, GraphNode]:
    """Tasks of a join, or of a shuffle, of tables of numbers and texts, with and without an index of their own."""
    n = 20_000
    left = pd.DataFrame({"k": np.arange(n) % 997, "v": np.arange(n) * 1.0, "name": [f"n{i}" for i in range(n)]})
    right = pd.DataFrame({"k": np.arange(n) % 997, "w": np.arange(n) * 1.0}).set_index("w", drop=False)
    tables = [dd.from_pandas(frame, npartitions=5) for frame in (left, right)]
    with dask.config.set({"dataframe.shuffle.method": "p2p"}):
        result = tables[0].merge(tables[1], on="k") if kind == "join" else tables[0][["k", "v"]].shuffle("k")
        return dict(convert_legacy_graph(result.optimize().__dask_graph__()))


@pytest.mark.parametrize("kind", ["join", "shuffle"])
def test_a_table_on_its_way_through_a_shuffle_has_the_size_of_its_message(kind: str) -> None:
    arrow = pytest.importorskip("distributed.shuffle._arrow")
    shuffle = pytest.importorskip("distributed.shuffle._shuffle")
    dsk = shuffled_tables(kind)
    sizes = estimate_nbytes(dsk, {})
    sent: dict[Key, int] = {}
    for barrier in [node for node in dsk.values() if type(node).__name__ == "P2PBarrierTask"]:
        spec = barrier.spec  # type: ignore[attr-defined]
        workers = pd.Series(dict.fromkeys(range(spec.npartitions), "tcp://a"), name="_workers").astype("category")
        for key in barrier.dependencies:
            (source,) = dsk[key].dependencies
            frame = dask.get(dsk, source)
            if spec.column not in frame:
                frame = frame.assign(**{spec.column: (frame.k % spec.npartitions).astype("int8")})
            (table,) = shuffle.split_by_worker(frame, spec.column, spec.meta, workers).values()
            sent[key] = len(arrow.serialize_table(table))
    assert len(sent) == (10 if kind == "join" else 5)
    for key, nbytes in sent.items():
        assert sizes[key] == pytest.approx(nbytes, rel=0.1)
    made = [size for key, size in sizes.items() if str(key[0]).startswith(("hashjoin", "p2pshuffle"))]
    sources = [sizes[source] for key in sent for source in dsk[key].dependencies]
    assert sum(made) == pytest.approx(sum(sources))


def test_what_is_made_of_measured_values_is_estimated_by_them() -> None:
    dsk: dict[Key, GraphNode] = {
        "load": Task("load", print),
        "name": Alias("name", "load"),
        "made": Task("made", print, TaskRef("name")),
        "joined": Task("joined", print, TaskRef("made"), TaskRef("elsewhere")),
    }
    guessed: set[Key] = set()
    sizes = estimate_nbytes(dsk, {}, guessed, {"load": 99_000.0, "elsewhere": 500_000.0})
    assert sizes["load"] == sizes["name"] == 99_000
    assert sizes["made"] == pytest.approx(99_000, rel=0.01)
    assert sizes["joined"] == pytest.approx(500_000, rel=0.01)
    assert guessed == {"made", "joined"}


def test_unknown_chunks_and_odd_layers_are_no_error() -> None:
    x = array()
    bounded = x[x > 50]
    wild = MaterializedLayer({("w", 0): 1}, collection_annotations={"chunks": ((math.nan,),), "dtype": np.dtype("f8")})
    odd = MaterializedLayer({}, collection_annotations={"chunks": "?", "dtype": "not a dtype"})
    dsk = {
        **plain_graph(bounded),
        ("w", 0): Task(("w", 0), len, "abc"),
        ("w", "extra"): Task(("w", "extra"), len, "abc"),
        ("odd", 0): Task(("odd", 0), len, "abc"),
        "gone": Task("gone", abs, Alias("somewhere else")),
        (): Task((), len, "abc"),
        7: Task(7, len, "abc"),
    }
    sizes = estimate_nbytes(dsk, {**layers_of(bounded), "w": wild, "odd": odd})
    assert sizes.keys() == dsk.keys()
    assert all(0 <= size < math.inf for size in sizes.values())
    assert sizes["w", 0] == sizes["odd", 0] == DEFAULT_NBYTES == pytest.approx(sizes["gone"], rel=1e-3)


def test_a_chain_of_unknown_functions_is_followed_without_recursion() -> None:
    dsk: dict[Key, GraphNode] = {"0": DataNode("0", np.zeros(10))}
    for i in range(1, 5000):
        dsk[str(i)] = Task(str(i), abs, Alias(str(i - 1)))
    backwards = dict(reversed(dsk.items()))
    sizes = estimate_nbytes(backwards, {})
    assert all(sizes[str(i)] < sizes[str(i - 1)] for i in range(2, 5000))
    assert 40.0 < sizes["4999"] < sizes["0"] == 80.0
    (fused,) = [node for node in fuse_linear_task_spec(dsk, {"4999"}).values() if not isinstance(node, Alias)]
    assert estimate_nbytes({fused.key: fused}, {})[fused.key] == pytest.approx(sizes["4999"])


def test_estimating_takes_a_few_microseconds_per_task() -> None:
    x = da.ones((300, 300), chunks=3)
    for name, result in {"mean": (x + 1).mean(0), "rechunk": x.rechunk((5, 7)), "overlap": x.cumsum(0)}.items():
        dsk, layers = fused_graph(result), layers_of(result)
        began = time.process_time()
        sizes = estimate_nbytes(dsk, layers)
        spent = time.process_time() - began
        print(f"{name}: {spent / len(dsk) * 1e6:.1f} microseconds of CPU per task, {len(dsk)} tasks")
        assert sizes.keys() == dsk.keys()
