"""Reductions of arrays by group, as flox makes them: the third part of the table in :mod:`.associative`.

xarray hands ``groupby`` and ``resample`` to flox where it is installed. Covers the trees of its methods ``map-reduce``
and ``cohorts``: what merges the parts of groups, and how large parts are. Not covered, and left as they are: positions
of extremes, first and last (order counts), labels that nobody knows before the run, scans, and the method
``blockwise``, in which nothing is merged.

A part is the same kind of thing at every level of such a tree, so that parts may be merged in any order and number::

    {"groups": labels, "intermediates": [array (..., 1, number of groups) for each of several sums or extremes]}

Notes
-----
What is recognised is a form: functions of these names, called with these keywords, that merge by functions of this
table. Of a flox in which any of it is different nothing is recognised, and its trees stay as they are.

References
----------
flox/dask.py (dask_groupby_agg, _simple_combine, _aggregate, reindex_intermediates), flox/aggregations.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dask._task_spec import Task
from dask.blockwise import Blockwise
from dask.highlevelgraph import Layer
from dask.typing import Key

from meshcompute.graphs.associative import KINDS_OF_NUMBERS, Reduction, loaded

__all__ = ["MERGES", "STEPS", "group_reduction", "grouped_chunks", "grouped_nbytes"]

#: Functions that make parts of parts, or results: as ``module:name``, by name.
STEPS = {name: f"flox.dask:{name}" for name in ("reindex_intermediates", "_simple_combine", "_aggregate")}
_CHUNK = "flox.core:chunk_reduce"  # makes the first parts

#: How many arrays there are in what they merge, by ``module:name`` of functions that may merge in any order.
MERGES = {
    **{f"numpy:{name}": 1 for name in ("sum", "prod", "min", "max", "nanmin", "nanmax", "any", "all")},
    "flox.aggregations:_var_combine": 3,  # squared deviations, sum and number (Chan, Golub, LeVeque 1979)
}

_OPTIONS_OF_COMBINE = {"agg", "axis", "keepdims", "reindex"}
_OPTIONS_OF_FINAL = {*_OPTIONS_OF_COMBINE, "combine", "expected_groups", "fill_value"}
_NO_GROUP = -1  # in place of a label: the value belongs to no group
_COUNT = "nanlen"  # what flox calls the number of values that are not missing


def group_reduction(function: Any) -> Reduction | None:
    """Recognise a function of a step as flox makes it, None if it is not one that is known.

    Parameters
    ----------
    function
        What a task calls.
    """
    if type(function) is not functools.partial or function.args:
        return None
    options = function.keywords
    merge: Any = function
    if function.func is loaded(STEPS["_simple_combine"]):
        is_combine = True
    elif function.func is loaded(STEPS["_aggregate"]):
        is_combine, merge = False, options.get("combine")
    else:
        return None
    if options.keys() != (_OPTIONS_OF_COMBINE if is_combine else _OPTIONS_OF_FINAL) or options["keepdims"] is not True:
        return None
    if not is_combine and not (
        type(merge) is functools.partial
        and merge.func is loaded(STEPS["_simple_combine"])
        and not merge.args
        and merge.keywords.keys() == {"reindex"}
    ):
        return None
    agg, axis = options["agg"], options["axis"]
    arrays = _arrays_of(agg)
    if not arrays or not isinstance(axis, tuple) or not axis:
        return None
    nbytes = sum(arrays)
    counts = [size for size, chunk in zip(arrays, agg.chunk, strict=True) if isinstance(chunk, str) and chunk == _COUNT]
    return Reduction(
        family=f"groupby_{agg.name}",
        is_combine=is_combine,
        identity=("groups", agg.name, axis, *arrays),
        combine=functools.partial(merge, agg=agg, axis=axis, keepdims=True),
        n_levels=len(axis),
        count_share=sum(counts) / nbytes,
        has_equal_parts=True,
    )


def _arrays_of(agg: Any) -> list[int]:
    """Return for each of an aggregation's intermediates the bytes per element; none if it is not one that is known."""
    merges, chunk, dtypes = (getattr(agg, name, None) for name in ("simple_combine", "chunk", "dtype"))
    dtypes = dtypes.get("intermediate") if isinstance(dtypes, Mapping) else None
    if not (isinstance(merges, tuple) and isinstance(chunk, tuple) and isinstance(dtypes, tuple)):
        return []
    if not isinstance(getattr(agg, "name", None), str) or getattr(agg, "reduction_type", None) != "reduce":
        return []
    if not len(merges) == len(chunk) == len(dtypes):
        return []
    known = {loaded(name): n for name, n in MERGES.items()}
    try:
        n_arrays = [known.get(merge, 0) if callable(merge) else 0 for merge in merges]
        dtypes = [loaded("numpy:dtype")(dtype) for dtype in dtypes]
    except TypeError:  # functions that cannot be hashed, and types that are none of numpy's, are none of ours
        return []
    if 0 in n_arrays or any(dtype.kind not in KINDS_OF_NUMBERS for dtype in dtypes):
        return []
    return [n * dtype.itemsize for n, dtype in zip(n_arrays, dtypes, strict=True)]


def grouped_chunks(
    layer: Layer, called: Any, chunks: Sequence[Sequence[float]], layers: Mapping[str, Layer]
) -> tuple[Sequence[Sequence[float]], float] | None:
    """Return lengths and bytes per element of the blocks that a layer of flox makes, None for other layers.

    Parameters
    ----------
    layer
        A layer of arrays.
    called
        One of its tasks, new style or old.
    chunks
        Lengths of its blocks, by axis, as flox states them: of its first step, those of what is reduced.
    layers
        Layers by name: that of the labels says which groups there are in a block.

    Returns
    -------
    tuple
        Lengths of the blocks of parts, by axis, with groups along the last one, and bytes per element. Later steps do
        not say how many groups there are: their bytes per element are NaN, see :func:`grouped_nbytes`.
    """
    function, options = _first_of(called[0] if isinstance(called, tuple) and called else getattr(called, "func", None))
    if getattr(function, "__name__", "") in STEPS:
        return chunks, math.nan
    if function is not loaded(_CHUNK) or not {"axis", "dtype", "expected_groups", "func"} <= options.keys():
        return None
    groups, axes = options["expected_groups"], {axis % len(chunks) for axis in options["axis"]}
    parts = [[1] * len(lengths) if axis in axes else lengths for axis, lengths in enumerate(chunks)]
    parts[-1] = _n_groups(layer, layers, chunks[-1]) if groups is None else [len(groups)] * len(chunks[-1])
    n_arrays = [3 if callable(reduce) else 1 for reduce in options["func"]]
    dtypes = map(loaded("numpy:dtype"), options["dtype"])
    return parts, sum(n * dtype.itemsize for n, dtype in zip(n_arrays, dtypes, strict=True))


def _n_groups(layer: Layer, layers: Mapping[str, Layer], lengths: Sequence[float]) -> Sequence[float]:
    """Return how many groups there are in blocks along the last axis; where labels are not at hand, as many as fit."""
    name: Any = layer.indices[-1][0] if isinstance(layer, Blockwise) else None
    labels: Mapping[Any, Any] = layers.get(name, {})
    blocks = [getattr(labels.get((name, i)), "tolist", None) for i in range(len(lengths))]
    if any(block is None for block in blocks):
        return lengths
    return [max(1, len({*block()} - {_NO_GROUP})) for block in blocks if block is not None]


def grouped_nbytes(
    task: Task, inputs: Sequence[float], shape_of: Callable[[Key], Sequence[float] | None]
) -> float | None:
    """Return the bytes of what one of :data:`STEPS` makes of parts, None if that is not known.

    Parameters
    ----------
    task
        A task that calls it.
    inputs
        Bytes of the parts that it reads.
    shape_of
        Tells the shape of a block, groups along its last axis, by key; None: it is not known.
    """
    function, options = _first_of(task.func)
    part = max(inputs, default=0.0)
    if function is loaded(STEPS["_simple_combine"]):
        return part
    if function is loaded(STEPS["_aggregate"]) and (arrays := _arrays_of(options.get("agg"))):
        return part * getattr(options["agg"].dtype.get("final"), "itemsize", 0) / sum(arrays) or None
    if function is loaded(STEPS["reindex_intermediates"]) and task.dependencies:
        shape = shape_of(next(iter(task.dependencies)))
        return part * len(options.get("unique_groups", ())) / max(1.0, shape[-1]) or None if shape else None
    return None


def _first_of(function: Any) -> tuple[Any, Mapping[str, Any]]:
    """Look through partial functions and compositions for what is called first, with which keywords."""
    options: dict[str, Any] = {}
    while True:
        if type(function) is functools.partial:
            function, options = function.func, {**function.keywords, **options}
        elif hasattr(function, "funcs") and hasattr(function, "first"):  # toolz.compose
            function = function.first
        else:
            return function, options
