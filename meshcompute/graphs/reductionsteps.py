"""Steps of reductions as tasks: recognised in a graph that is ready to run, and made anew with other inputs.

Covers the forms in which Dask writes such steps: alone or with what was fused to them, with lists in the new style and
in the old. Does not cover which functions merge parts (:mod:`meshcompute.graphs.associative`).

Runs in the client's process and in the scheduler's; imports nothing that a stock scheduler may lack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import toolz
from dask._task_spec import Alias, Dict, GraphNode, List, Task, TaskRef, _execute_subgraph, _identity_cast
from dask.typing import Key
from dask.utils import apply

from meshcompute.graphs.associative import Reduction, array_families, array_reduction, loaded
from meshcompute.graphs.associativegroups import group_reduction
from meshcompute.graphs.associativetables import bag_reduction, table_reduction
from meshcompute.shipping import by_value_once

__all__ = ["Reader", "Step", "first_key", "merged", "with_inputs", "with_short_counts"]

_IS_LIST = {"typ": list}  # how a list in a graph of the old style is written as a task


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """A task that is a step of a reduction, alone or with what was fused to it.

    Attributes
    ----------
    reduction
        What it does first.
    is_combine
        It makes a part and does nothing else.
    inputs
        Keys of the parts that it reads, in order.
    position
        Which argument of its function holds the parts.
    n_levels
        How deep lists are nested around them there.
    """

    reduction: Reduction
    is_combine: bool
    inputs: Sequence[Key]
    position: int
    n_levels: int


class Reader:
    """Recognise steps of reductions. Remembers functions, which all tasks of a layer share."""

    def __init__(self) -> None:
        self._families = array_families()
        self._of_bags = loaded("dask.bag.core:empty_safe_aggregate")
        self._known: dict[int, tuple[Any, Reduction | None]] = {}

    def step(self, task: GraphNode) -> Step | None:
        """Recognise a task, None if it is not a step of a reduction that is known.

        Parameters
        ----------
        task
            A task of a graph that is ready to run.
        """
        function = getattr(task, "func", None)
        if function is not _execute_subgraph:
            return self._single(task, function)
        steps = iter(task.args[0].values())
        first = next(steps)
        step = self._single(first, getattr(first, "func", None))
        if step is None or first.dependencies != task.dependencies:
            return None
        if step.is_combine and not all(self._continues(other, step) for other in steps):
            step = replace(step, is_combine=False)
        return step

    def _single(self, task: Any, function: Any) -> Step | None:
        """Recognise a task to which nothing was fused."""
        if (known := self._known.get(id(function))) is None:
            # The function itself is kept, so that its id stays taken.
            found = array_reduction(function, self._families) or group_reduction(function)
            known = self._known[id(function)] = function, found
        reduction, position = known[1], 0
        n_levels = reduction.n_levels if reduction is not None else 0
        if reduction is None:
            if function is apply:
                reduction, position, n_levels = table_reduction(task.args[0], _options(task)), 1, 2
            elif type(function) is MethodType and not task.kwargs:
                reduction, n_levels = table_reduction(function, {}), 1
            elif function is self._of_bags and function is not None:
                reduction, position, n_levels = bag_reduction(task), 1, 1
            if reduction is None:
                return None
        inputs = _keys_in(task.args[position], n_levels)
        if not inputs:
            return None
        return Step(
            reduction=reduction, is_combine=reduction.is_combine, inputs=inputs, position=position, n_levels=n_levels
        )

    def _continues(self, task: Any, step: Step) -> bool:
        """Tell whether a task that was fused to a combine merely combines again."""
        other = self._single(task, getattr(task, "func", None))
        return other is not None and other.is_combine and other.reduction.identity == step.reduction.identity


def _options(task: Task) -> Mapping[str, Any] | None:
    """Return the keywords that a task hands to ``dask.utils.apply``, None if they hold other tasks."""
    given: Any = task.args[2] if len(task.args) > 2 else {}
    if isinstance(given, Dict):
        return None if given.dependencies else given()
    return given if isinstance(given, dict) else None


def _keys_in(parts: Any, n_levels: int) -> list[Key] | None:
    """Return the keys in nested lists of so many levels, in order; None for anything else."""
    if not (type(parts) is List or (type(parts) is Task and parts.func is _identity_cast and parts.kwargs == _IS_LIST)):
        return None
    if n_levels > 1:
        keys: list[Key] = []
        for part in parts.args:
            if (inner := _keys_in(part, n_levels - 1)) is None:
                return None
            keys += inner
        return keys
    keys = []
    for part in parts.args:
        kind = type(part)
        if kind is Alias:
            keys.append(part.target)
        elif kind is TaskRef:
            keys.append(part.key)
        else:
            return None
    return keys


def first_key(task: GraphNode) -> Key:
    """Return the key that a task's first step had before anything was fused to it."""
    if isinstance(task, Task) and task.func is _execute_subgraph:
        key: Key = next(iter(task.args[0]))
        return key
    return task.key


def merged(reduction: Reduction, key: Key, inputs: Sequence[Key], order: Mapping[Key, int]) -> Task:
    """Make a task that merges parts into one.

    Parameters
    ----------
    reduction
        What merges them.
    key
        Key of the new task.
    inputs
        Keys of the parts.
    order
        Place of a value that is no part of ours in the order of the given tree, by key.

    Notes
    -----
    Tables whose rows are in order are merged into a table and where each of its rows came up first: a few numbers,
    since rows of one place follow each other.
    """
    if reduction.are_rows_ordered:
        places = tuple([order.get(key, -1) for key in inputs])
        return Task(key, _MERGE_ROWS, reduction.combine, dict(reduction.options), _nested(inputs, 1), places)
    parts = _nested(inputs, reduction.n_levels)
    return Task(key, reduction.combine, *reduction.before, parts, *reduction.after, **reduction.options)


def with_inputs(task: Task, step: Step, inputs: Sequence[Key], order: Mapping[Key, int]) -> Task:
    """Make a step anew that reads other parts.

    Parameters
    ----------
    task
        The step, alone or with what was fused to it.
    step
        What is known of it.
    inputs
        Keys of the parts that it shall read.
    order
        As of :func:`merged`.

    Returns
    -------
    Task
        A task with the same key and, to rounding, the same value.
    """
    if task.func is _execute_subgraph:
        inner, outkey = task.args[:2]
        name, first = next(iter(inner.items()))
        changed = {**inner, name: _reading(first, step, inputs, order)}
        refs = [TaskRef(key) for key in inputs]
        return Task(task.key, task.func, changed, outkey, tuple(inputs), *refs, _data_producer=task._data_producer)
    return _reading(task, step, inputs, order)


def _reading(task: Task, step: Step, inputs: Sequence[Key], order: Mapping[Key, int]) -> Task:
    args: list[Any] = list(task.args)
    if step.reduction.are_rows_ordered:
        parts: GraphNode = Task(None, _ROWS_IN_ORDER, _nested(inputs, 1), tuple([order.get(key, -1) for key in inputs]))
        for _ in range(step.n_levels - 1):
            parts = List(parts)
        args[step.position] = parts
    else:
        args[step.position] = _nested(inputs, step.n_levels)
    function = step.reduction.final or task.func
    return Task(task.key, function, *args, _data_producer=task._data_producer, **task.kwargs)


def with_short_counts(task: Task) -> Task:
    """Make a task anew whose value, a part with counts, can be sent with one number for them.

    Parameters
    ----------
    task
        The task, alone or with what was fused to it.

    Returns
    -------
    Task
        A task with the same key and an equal value. Counts that differ, as they do where values are missing, and those
        of masked or foreign arrays, stay as they are.
    """
    if task.func is _execute_subgraph:
        inner, outkey = task.args[:2]
        while isinstance(last := inner.get(outkey), Alias):
            outkey = last.target
        if not isinstance(last, Task):
            return task
        args = {**inner, outkey: with_short_counts(last)}, *task.args[1:]
        return Task(task.key, task.func, *args, _data_producer=task._data_producer)
    function = toolz.compose(_SHORT, task.func)
    return Task(task.key, function, *task.args, _data_producer=task._data_producer, **task.kwargs)


def _with_one_count(part: Any) -> Any:
    # Runs on workers, which may not have meshcompute: it travels by value, and imports what it uses.
    import numpy as np

    def short(counts: Any, n_kept: int) -> Any:
        if type(counts) is not np.ndarray or counts.size < 2 or counts.dtype.kind not in "iufc":
            return counts
        ones = counts[(0,) * (counts.ndim - n_kept)]
        # Dask sends an array with strides of 0 as what is in memory: one element, or as many as there are groups.
        return np.broadcast_to(ones, counts.shape) if (counts == ones).all() else counts

    if type(part) is not dict:
        return part
    if "n" in part:
        return {**part, "n": short(part["n"], 0)}
    if "intermediates" in part:  # of flox: sums are of any type, counts are integers
        arrays = [short(a, 1) if getattr(a, "dtype", None) == np.intp else a for a in part["intermediates"]]
        return {**part, "intermediates": arrays}
    return part


_SHORT: Callable[[Any], Any] = by_value_once(_with_one_count)


def _merge_rows(combine: Any, options: Any, parts: Any, places: Any) -> Any:
    # Runs on workers, as the function above.
    tables = _tables(parts, places)
    rows = combine([table for _, table in tables], **options)
    if not rows.index.is_unique:
        return {"rows": rows, "places": [tables[0][0]], "ends": [len(rows)]}
    found: list[int] = []
    ends: list[int] = []
    for place, table in tables:
        end = int(rows.index.get_indexer(table.index).max(initial=-1)) + 1
        if not ends or end > ends[-1]:
            found.append(place)
            ends.append(end)
    ends[-1] = len(rows)
    return {"rows": rows, "places": found, "ends": ends}


def _rows_in_order(parts: Any, places: Any) -> Any:
    # Runs on workers, as the function above.
    return [table for _, table in _tables(parts, places)]


def _tables(parts: Any, places: Any) -> list[tuple[int, Any]]:
    """Cut parts into tables of rows that came up first in one place, in the order of places."""
    tables = []
    for part, place in zip(parts, places, strict=True):
        if type(part) is not dict:
            tables.append((place, part))
            continue
        start = 0
        for first, end in zip(part["places"], part["ends"], strict=True):
            tables.append((first, part["rows"].iloc[start:end]))
            start = end
    return sorted(tables, key=lambda table: table[0])


_MERGE_ROWS: Callable[..., Any] = by_value_once(_merge_rows)
_ROWS_IN_ORDER: Callable[..., Any] = by_value_once(_rows_in_order)


def _nested(inputs: Iterable[Key], n_levels: int) -> List:
    """Wrap the keys of parts in lists.

    Notes
    -----
    Of arrays, one list of all parts, innermost: parts have size one along every axis that is reduced (or there is one
    such axis), so that any number of them fit together along the last of these axes.
    """
    parts = List(*[TaskRef(key) for key in inputs])
    for _ in range(n_levels - 1):
        parts = List(parts)
    return parts
