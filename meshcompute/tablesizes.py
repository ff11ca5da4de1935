"""Estimate sizes of parts of tables: what reading one yields, and what the first step of a reduction leaves of it.

Covers what files and functions tell by themselves; nothing is read here. Does not cover arrays, and not what tasks do
to tables in general (:mod:`meshcompute.sizes`).

References
----------
dask/dataframe: dask_expr/_reductions.py, groupby.py, dask_expr/_groupby.py, dask_expr/io/parquet.py.
"""

from __future__ import annotations

from typing import Any

from dask._task_spec import Task

__all__ = ["condensed_nbytes", "read_nbytes"]

# What is left of a table: a row (its columns are not known here), or groups. Both are guesses.
_ROW_NBYTES = 256
_SHARE_OF_GROUPS = 0.1
_ROW_REDUCTIONS = {"All", "Any", "Count", "Len", "Max", "Min", "NBytes", "Prod", "Size", "Sum"}
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


def condensed_nbytes(function: Any, nbytes: float) -> float | None:
    """Return the size of a part of a table after a reduction's first step, None for other functions.

    Parameters
    ----------
    function
        What a task calls.
    nbytes
        Bytes of its largest input.
    """
    module = getattr(function, "__module__", None) or ""
    if module == "dask.dataframe.dask_expr._reductions":
        reduction = getattr(getattr(function, "__self__", None), "__name__", "")
        return min(_ROW_NBYTES, nbytes) if reduction in _ROW_REDUCTIONS else None
    name = getattr(function, "__name__", "")
    is_step = "chunk" in name or name == "_groupby_apply_funcs"
    if is_step and module.startswith("dask.dataframe") and "groupby" in module:
        return _SHARE_OF_GROUPS * nbytes
    return None
