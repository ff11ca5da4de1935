"""The tasks of a graph as integers, in an order that is the same in every process.

Covers what placement needs of keys: their order, and who reads whom as flat arrays. Does not cover sizes or pins, nor
the decision (:mod:`meshcompute.placement.placing`).

Where two plans cost the same, ``explain()`` and the scheduler must choose the same one; the order of Dask's own graphs,
and of a task's inputs, depends on the hashes of strings, which differ between processes.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Mapping
from typing import Any

from dask._task_spec import GraphNode
from dask.typing import Key

from meshcompute.graphs.taskgraph import inputs_of
from meshcompute.placement.objective import Flat

__all__ = ["Index", "dependencies_of", "ordered"]


class Index(dict[Key, int]):
    """Number of every key; -1 for keys that have none.

    Parameters
    ----------
    keys
        The keys, in their order.
    """

    def __init__(self, keys: Iterable[Key]) -> None:
        super().__init__(zip(keys, range(2**63), strict=False))

    def __missing__(self, key: Key) -> int:
        return -1


def ordered(keys: Iterable[Key]) -> list[Key]:
    """Sort keys, whatever they are made of.

    Parameters
    ----------
    keys
        Keys, each once.

    Returns
    -------
    list
        By name; those of one name by index.
    """
    # To sort by str(key) costs ten times as much: most keys are ("name-token", 1, 2).
    groups: dict[Any, list[Key]] = {}
    for key in keys:
        name = key[0] if type(key) is tuple and key else key
        group = groups.get(name)
        if group is None:
            groups[name] = [key]
        else:
            group.append(key)
    result: list[Key] = []
    for name in sorted(groups, key=str):
        group = groups[name]
        if len(group) > 1:
            try:
                group.sort()
            except TypeError:  # ("name", "extra", 1) beside ("name", 0, 1)
                group.sort(key=str)
        result += group
    return result


def dependencies_of(index: Index, tasks: Mapping[Key, GraphNode], sealed: Container[Key] = ()) -> Flat:
    """Number what every task reads.

    Parameters
    ----------
    index
        Number of every key; what has none does not count.
    tasks
        Task by key; none for values that are just there.
    sealed
        Keys whose inputs do not count: their values are in memory.

    Returns
    -------
    Flat
        The dependencies of every key in turn, each sorted where numpy is there.
    """
    values: list[int] = []
    ends = [0]
    number, get = index.__getitem__, tasks.get
    for key in index:
        task = get(key)
        if task is not None and key not in sealed:
            values.extend(map(number, inputs_of(task)))
        ends.append(len(values))
    try:
        import numpy as np
    except ImportError:  # placement does without, slowly; so does this
        return _flat(ends, values)
    n = len(index)
    indices: Any = np.array(values, dtype=np.int64)
    counts: Any = np.diff(np.array(ends, dtype=np.int64))
    readers: Any = np.repeat(np.arange(n), counts)
    if (is_there := indices >= 0).all():
        edges = readers * n + indices
    else:
        edges = readers[is_there] * n + indices[is_there]
    edges.sort()
    readers, indices = np.divmod(edges, max(n, 1))
    indptr: Any = np.concatenate([[0], np.bincount(readers, minlength=n).cumsum()])
    return Flat(indptr, indices)


def _flat(ends: list[int], values: list[int]) -> Flat:
    indptr, indices = [0], []
    for start, end in itertools.pairwise(ends):
        indices += sorted([i for i in values[start:end] if i >= 0])
        indptr.append(len(indices))
    return Flat(indptr, indices)
