"""Estimate sizes of parts of tables: what reading one yields, and what the first step of a reduction leaves of it.

Covers what files and functions tell by themselves, and what shuffles make of a table on its way; nothing is read here.
Does not cover arrays, and not what tasks do to tables in general (:mod:`meshcompute.graphs.sizes`).

References
----------
dask/dataframe: dask_expr/_reductions.py, groupby.py, dask_expr/_groupby.py, dask_expr/io/parquet.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dask._task_spec import GraphNode, Task
from dask.typing import Key

__all__ = ["Shuffles", "is_table_sender", "read_nbytes", "sent_per_byte", "table_nbytes"]

# What is left of a table: a row (its columns are not known here), or groups. Both are guesses.
_ROW_NBYTES = 256
_SHARE_OF_GROUPS = 0.1
_ROW_REDUCTIONS = {"All", "Any", "Count", "Len", "Max", "Min", "NBytes", "Prod", "Size", "Sum"}
# What only joins parts of tables, or changes how they hold their texts.
_JOINING = {"_concat", "concat"}
_CONVERTING = {"_to_string_dtype", "to_pyarrow_string"}
_FIXED_WIDTH = "biufcmM"  # kinds of dtypes of numpy whose values are all equally large
_TEXT_NBYTES = 20  # of a text or anything else, with its offset: a guess
_INDEX_NBYTES = 8
_HASH_COLUMN = "__hash_partition"  # dask.dataframe.dask_expr._merge._HASH_COLUMN_NAME
# What adds a column: of links in a chain that would otherwise count the same, the one before is cut.
_WIDENING = {"reset_index", "assign", "AssignPartitioningIndex.operation"}
_WIDER = 1 + 2**-13
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
    tell = getattr(task.func, "estimated_nbytes", None)  # meshcompute.data.sitetables.TableReader
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
    called = getattr(function, "method", None) or getattr(function, "__qualname__", "")  # dask.utils.methodcaller
    if called in _WIDENING and module.startswith(("dask.dataframe", "dask.utils")):
        return max(inputs) * _WIDER, False
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


class Shuffles:
    """The P2P shuffles of a graph.

    Parameters
    ----------
    dsk
        The graph.

    Attributes
    ----------
    readers : Counter
        How many tasks read each barrier, by key.
    growth_by_sender : dict
        How many bytes a sender sends for each byte that it reads, by key.
    """

    __slots__ = ("growth_by_sender", "readers")

    def __init__(self, dsk: Mapping[Key, GraphNode]) -> None:
        self.readers: Counter[Key] = Counter()
        self.growth_by_sender: dict[Key, float] = {}
        for node in dsk.values():
            if getattr(getattr(node, "func", None), "__name__", "").endswith("unpack"):
                self.readers.update(node.dependencies)
            elif (spec := getattr(node, "spec", None)) is not None:
                self.growth_by_sender.update(dict.fromkeys(node.dependencies, sent_per_byte(spec)))


def is_table_sender(function: Any) -> bool:
    """Tell whether a function of ``dask.dataframe`` sends a table's part to a P2P shuffle.

    Parameters
    ----------
    function
        What a task calls.
    """
    module = getattr(function, "__module__", None) or ""
    return module.startswith("dask.dataframe") and getattr(function, "__name__", "").endswith("_transfer")


def sent_per_byte(spec: Any) -> float:
    """Tell how many bytes a P2P shuffle sends for each byte of a table in memory.

    Parameters
    ----------
    spec
        Of the shuffle, as its barrier has it.

    Returns
    -------
    float
        1.0 for arrays.

    Notes
    -----
    Rows travel as Arrow, with their index, that of a ``RangeIndex`` too, which takes no memory; and with the number of
    the partition that they belong to. Joins add that on the way: no more bytes than it needs
    (``dask.dataframe.shuffle.partitioning_index``), whatever the schema of the shuffle says.

    References
    ----------
    distributed/shuffle/_shuffle.py: ``split_by_worker``; dask/dataframe/dask_expr/_merge.py: ``HashJoinP2P``.
    """
    meta = getattr(spec, "meta", None)
    if meta is None:
        return 1.0
    in_memory = sent = 0.0
    for name, dtype in meta.dtypes.items():
        if str(name) == _HASH_COLUMN:
            sent += 1.0 if spec.npartitions < 2**7 else 2.0 if spec.npartitions < 2**15 else 4.0
        else:
            width = _width(dtype)
            in_memory, sent = in_memory + width, sent + width
    if type(meta.index).__name__ == "RangeIndex":
        sent += _INDEX_NBYTES
    else:
        width = sum(_width(dtype) for dtype in getattr(meta.index, "dtypes", [meta.index.dtype]))
        in_memory, sent = in_memory + width, sent + width
    return sent / in_memory if in_memory else 1.0


def _width(dtype: Any) -> float:
    """Tell how many bytes a value takes."""
    return float(dtype.itemsize) if getattr(dtype, "kind", "O") in _FIXED_WIDTH else float(_TEXT_NBYTES)
