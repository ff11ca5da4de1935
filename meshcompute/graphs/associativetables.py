"""Reductions of tables and bags that may be regrouped: the second half of the table in :mod:`.associative`.

Covers ``dask.dataframe``'s tree reductions, by row and by group, and ``dask.bag``'s, each recognised by the very class
or function that it calls. Not covered, and left as they are: what depends on the order of rows (first, last, idxmin,
nlargest, value_counts, mode, unique), what merges nothing before its last step (cov, corr), functions of the user,
and reductions that Dask does by a shuffle (``split_out`` above one, which it chooses itself for many partitions).

Notes
-----
Rows of a result by group stay sorted where that was asked for. Where it was not, Dask's order is that in which groups
first come up in its partitions, and regrouped it is the same: parts know in which partition their rows came up first
(:func:`meshcompute.graphs.reductionsteps.merged`).

References
----------
dask/dataframe/dask_expr/_reductions.py (TreeReduce, ApplyConcatApply), dask/dataframe/dask_expr/_groupby.py,
dask/bag/core.py (Bag.reduction).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dask._task_spec import Task

from meshcompute.graphs.associative import KINDS_OF_NUMBERS, NUMBERS, Reduction, loaded

__all__ = ["BAGS", "TABLES", "Table", "are_numbers", "bag_reduction", "table_reduction"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A class of ``dask.dataframe`` that reduces.

    Attributes
    ----------
    name
        Its ``module:name``.
    kept
        Options of the final step that a combine has, too.
    other
        Further options that the final step may have.
    wanted
        Options of the final step that must have this value.
    is_sum
        It adds up: only for numbers.
    is_by_group
        There is a row for each group.
    calls
        It applies a method by name (option ``aggfunc``), or several (``aggregate_funcs``).
    """

    name: str
    kept: tuple[str, ...] = ()
    other: tuple[str, ...] = ()
    wanted: Mapping[str, Any] | None = None
    is_sum: bool = False
    is_by_group: bool = False
    calls: str = ""


_ROWS = "dask.dataframe.dask_expr._reductions:"
_GROUPS = "dask.dataframe.dask_expr._groupby:"
_OF_GROUPS = ("levels", "observed", "dropna")
#: Methods of pandas that merge groups: of the parts' sums, counts and extremes.
_MERGING = {"all", "any", "max", "min", "prod", "sum"}

TABLES: dict[str, Table] = {
    "rows sum": Table(name=f"{_ROWS}Sum", kept=("skipna", "axis"), is_sum=True),
    "rows prod": Table(name=f"{_ROWS}Prod", kept=("skipna", "axis"), is_sum=True),
    "rows max": Table(name=f"{_ROWS}Max", kept=("skipna", "axis")),
    "rows min": Table(name=f"{_ROWS}Min", kept=("skipna", "axis")),
    "rows any": Table(name=f"{_ROWS}Any"),
    "rows all": Table(name=f"{_ROWS}All"),
    "rows count": Table(name=f"{_ROWS}Count"),
    "rows len": Table(name=f"{_ROWS}Len"),
    "rows size": Table(name=f"{_ROWS}Size"),
    "rows nbytes": Table(name=f"{_ROWS}NBytes"),
    "rows index count": Table(name=f"{_ROWS}IndexCount"),
    # without skipna a partition without rows would spoil what it is merged with
    "rows var": Table(
        name=f"{_ROWS}Var", kept=("skipna",), other=("ddof", "meta", "index"), wanted={"skipna": True}, is_sum=True
    ),
    "groups mean": Table(name=f"{_GROUPS}Mean", kept=_OF_GROUPS, is_sum=True, is_by_group=True),
    "groups var": Table(
        name=f"{_GROUPS}Var", kept=_OF_GROUPS, other=("ddof", "numeric_only"), is_sum=True, is_by_group=True
    ),
    **{
        f"groups {name.lower()}": Table(
            name=f"{_GROUPS}{name}",
            kept=(*_OF_GROUPS, "sort", "numeric_only", "aggfunc"),
            is_sum=name in ("Sum", "Prod"),
            is_by_group=True,
            calls="aggfunc",
        )
        for name in ("Sum", "Prod", "Min", "Max", "Count", "Size")
    },
    "groups agg": Table(
        name=f"{_GROUPS}DecomposableGroupbyAggregation",
        kept=("level", "observed", "dropna", "sort"),
        other=("arg", "columns", "finalize_funcs", "is_series", "aggregate_funcs"),
        is_sum=True,
        is_by_group=True,
        calls="aggregate_funcs",
    ),
}

#: Functions that merge a bag's parts, as ``module:name``.
BAGS = ("builtins:sum", "builtins:max", "builtins:min", "builtins:any", "builtins:all")


def bag_reduction(task: Task) -> Reduction | None:
    """Recognise a step of a bag's reduction, None if its function is not one that is known.

    Parameters
    ----------
    task
        A task that calls ``dask.bag.core.empty_safe_aggregate``.
    """
    function, _, is_last = task.args
    if not any(function is loaded(name) for name in BAGS):
        return None
    return Reduction(
        family=f"bag {function.__name__}",
        is_combine=is_last is False,
        identity=("bag", function.__name__),
        combine=task.func,
        before=(function,),
        after=(False,),
    )


def table_reduction(method: Any, options: Mapping[str, Any] | None) -> Reduction | None:
    """Recognise a step of a table's reduction, None if its class or its options are not among those that are known.

    Parameters
    ----------
    method
        What the step calls: ``aggregate`` or ``combine`` of a class of ``dask.dataframe``.
    options
        With which keywords; None: they are not known.
    """
    kind = getattr(method, "__self__", None)
    name = next((name for name, table in TABLES.items() if kind is loaded(table.name)), None)
    if kind is None or name is None or options is None:
        return None
    table = TABLES[name]
    is_final = method.__func__ is getattr(kind.aggregate, "__func__", None)
    # A class whose final step and combine are one function: a combine where nothing else says what it is.
    is_combine = not is_final or not hasattr(kind.combine, "__func__")
    if not options.keys() <= {*table.kept, *table.other, "sort", "funcs"}:
        return None
    if is_final and any(options.get(key) != value for key, value in (table.wanted or {}).items()):
        return None
    kept = {key: options[key] for key in table.kept if key in options}
    combine = kind.combine or kind.aggregate
    if table.calls == "aggregate_funcs":
        functions = options.get("aggregate_funcs", options.get("funcs"))
        if not isinstance(functions, list) or not all(_merges_column(entry) for entry in functions):
            return None
        kept["funcs"] = functions
    elif table.calls and not _merges(options.get(table.calls)):
        return None
    told = {**kept, "sort": None, "funcs": [(column, options) for column, _, options in kept.get("funcs", ())]}
    return Reduction(
        family=name,
        is_combine=is_combine,
        identity=(name, *[f"{key}={value}" for key, value in sorted(told.items())]),
        combine=combine,
        options=kept,
        condition=NUMBERS if table.is_sum else "",
        are_rows_ordered=table.is_by_group and options.get("sort") is not True,
    )


def _merges(function: Any) -> bool:
    """Tell whether a function is a method of pandas that merges groups."""
    return type(function) is loaded("dask.utils:methodcaller") and function.method in _MERGING


def _merges_column(entry: Any) -> bool:
    _, function, options = entry
    apply: Callable[..., Any] | None = loaded("dask.dataframe.groupby:_apply_func_to_column")
    return function is apply and _merges(options.get("func"))


def are_numbers(meta: Any) -> bool:
    """Tell whether an empty table, column or number, as Dask keeps to know types, holds numbers or times only.

    Parameters
    ----------
    meta
        A pandas-like table, series or scalar without data.
    """
    dtypes = getattr(meta, "dtypes", getattr(meta, "dtype", None))
    if dtypes is None:
        return isinstance(meta, int | float | complex)
    kinds = [getattr(dtype, "kind", "O") for dtype in (dtypes if hasattr(dtypes, "__iter__") else [dtypes])]
    return all(kind in KINDS_OF_NUMBERS for kind in kinds)
