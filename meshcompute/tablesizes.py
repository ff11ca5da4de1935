"""Estimate sizes of parts of tables: what reading one yields, and what the first step of a reduction leaves of it.

Covers what files and functions tell by themselves; nothing is read here. Does not cover arrays, and not what tasks do
to tables in general (:mod:`meshcompute.sizes`).

References
----------
dask/dataframe: dask_expr/_reductions.py, groupby.py, dask_expr/_groupby.py, dask_expr/io/parquet.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dask._task_spec import Task

__all__ = ["read_nbytes", "table_nbytes"]

# What is left of a table: a row (its columns are not known here), or groups. Both are guesses.
_ROW_NBYTES = 256
_SHARE_OF_GROUPS = 0.1
_ROW_REDUCTIONS = {"All", "Any", "Count", "Len", "Max", "Min", "NBytes", "Prod", "Size", "Sum"}
# What only joins parts of tables, or changes how they hold their texts.
_JOINING = {"_concat", "concat"}
_CONVERTING = {"_to_string_dtype", "to_pyarrow_string"}
_SAMPLED_PARTS = 100  # of a container: a task that reads so many files is rare


def read_nbytes(task: Task) -> tuple[float, bool]:
    """Estimate what a task reads from files.

    Parameters
    ----------
    task
        A task without inputs.

    Returns
    -------
    float
        Bytes in memory, 0.0 where nothing tells.
    bool
        Whether that rests on the files' own counts of rows and columns, rather than on their size on the disk.
    """
    tell = getattr(task.func, "estimated_nbytes", None)  # meshcompute.sitetables.TableReader
    if tell is not None and (nbytes := tell(*task.args, **task.kwargs)):
        return float(nbytes), True
    return _file_nbytes((*task.args, *task.kwargs.values())), False


def _file_nbytes(value: Any, depth: int = 4) -> float:
    """Sum up the sizes of files, where dask.dataframe's descriptions of them tell."""
    if isinstance(value, Task):
        value = (*value.args, *value.kwargs.values())
    if isinstance(value, list | tuple):
        return sum([_file_nbytes(part, depth - 1) for part in value[:_SAMPLED_PARTS]]) if depth else 0.0
    size = getattr(value, "_file_size", None)
    return float(size) if isinstance(size, int) else 0.0


def table_nbytes(function: Any, inputs: Sequence[float]) -> tuple[float, bool] | None:
    """Estimate what a function of ``dask.dataframe`` makes of parts of tables.

    Parameters
    ----------
    function
        What a task calls.
    inputs
        Bytes of its inputs, at least one.

    Returns
    -------
    (float, bool) or None
        Bytes, and whether that is a guess; None for other functions.
    """
    module = getattr(function, "__module__", None) or ""
    if not module.startswith("dask.dataframe"):
        return None
    name = getattr(function, "__name__", "")
    if name in _JOINING:
        return sum(inputs), False
    if name in _CONVERTING:
        return max(inputs), False
    if module == "dask.dataframe.dask_expr._reductions":
        reduction = getattr(getattr(function, "__self__", None), "__name__", "")
        return (min(_ROW_NBYTES, max(inputs)), True) if reduction in _ROW_REDUCTIONS else None
    is_step = "chunk" in name or name == "_groupby_apply_funcs"
    return (_SHARE_OF_GROUPS * max(inputs), True) if is_step and "groupby" in module else None
