"""Which functions of Dask merge parts of a reduction, and how: the one table of what may be regrouped.

Covers recognising a step of a tree reduction by the very function that it calls, and making such steps anew with other
inputs. Does not cover which steps should be made anew (:mod:`meshcompute.regrouping`).

A tree of a reduction has steps of two kinds. A *combine* makes one part of several parts; a *final* step makes the
result of them. A family is in the table if for its functions, whatever the parts::

    final([a, b, c, d]) = final([combine([a, c]), combine([b, d])])      to rounding; exactly for integers

so that parts may be merged in any order and number. Functions that are not in the table are anybody's, or depend on
order as first, last and cumulative sums do: their trees stay as they are. So do sums of objects and texts.

Runs in the client's process and in the scheduler's; imports nothing that a stock scheduler may lack: functions are
looked up in modules that are loaded already, as they must be when a task calls one of them.

References
----------
dask/array/_reductions_generic.py (_tree_reduce, partial_reduce), dask/array/reductions.py, dask/array/routines.py.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import toolz
from dask._task_spec import Alias, GraphNode, List, Task, TaskRef, _execute_subgraph, _identity_cast
from dask.typing import Key

__all__ = ["FAMILIES", "Family", "Reader", "Reduction", "Step", "first_key", "with_inputs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Functions that reduce, and merge what was reduced.

    Attributes
    ----------
    finals
        Functions of the final step, each as ``module:name``.
    combine
        Function that merges parts, as ``module:name``.
    kept
        Keywords that a final step and a combine have in common.
    n_kept
        How many positional arguments of a partial function they have in common.
    added
        Keywords of a combine that a tree without one gets: value, or ``module:name`` of a function, by name.
    is_concatenated
        The parts reach the function as one array, not as lists.
    is_ordered
        The first of equals counts, and parts say where they come from.
    """

    finals: tuple[str, ...]
    combine: str
    kept: tuple[str, ...] = ()
    n_kept: int = 0
    added: Mapping[str, str] = field(default_factory=dict)
    is_concatenated: bool = True
    is_ordered: bool = False


_REDUCTIONS = "dask.array.reductions:"
_ROUTINES = "dask.array.routines:"
_CONCATENATE = "dask.array.core:_concatenate2"
_IS_LIST = {"typ": list}  # how a list of a graph in the old style is written as a task

#: Reductions of arrays. What each merges:
FAMILIES: dict[str, Family] = {
    # sums, also of what is not missing, of weights times values, of counts, of histograms
    "sum": Family(finals=("numpy:sum",), combine="numpy:sum", kept=("dtype",)),
    "prod": Family(finals=("numpy:prod",), combine="numpy:prod", kept=("dtype",)),
    "any": Family(finals=("numpy:any",), combine="numpy:any"),
    "all": Family(finals=("numpy:all",), combine="numpy:all"),
    # parts without elements count for nothing
    "min": Family(finals=("numpy:min",), combine=f"{_REDUCTIONS}chunk_min"),
    "max": Family(finals=("numpy:max",), combine=f"{_REDUCTIONS}chunk_max"),
    "nanmin": Family(finals=(f"{_REDUCTIONS}_nanmin_skip",), combine=f"{_REDUCTIONS}_nanmin_skip"),
    "nanmax": Family(finals=(f"{_REDUCTIONS}_nanmax_skip",), combine=f"{_REDUCTIONS}_nanmax_skip"),
    # number and total
    "mean": Family(finals=(f"{_REDUCTIONS}mean_agg",), combine=f"{_REDUCTIONS}mean_combine", is_concatenated=False),
    # number, total and central moments (Chan, Golub, LeVeque 1979; Pebay 2008). A part without elements has none: its
    # mean is NaN, which nansum leaves out as Dask's final step does.
    "moment": Family(
        finals=(f"{_REDUCTIONS}moment_agg",),
        combine=f"{_REDUCTIONS}moment_combine",
        kept=("order",),
        added={"sum": "numpy:nansum"},
        is_concatenated=False,
    ),
    # extremes with their positions, which are in the data: the first position counts, whatever the order of the parts
    "arg": Family(
        finals=(f"{_REDUCTIONS}arg_agg", f"{_REDUCTIONS}nanarg_agg"),
        combine=f"{_REDUCTIONS}arg_combine",
        n_kept=1,
        is_ordered=True,
    ),
    # the largest, not in order before the final step
    "topk": Family(finals=("dask.array.chunk:topk_aggregate",), combine="dask.array.chunk:topk", kept=("k",)),
    # of a product of matrices, block by block
    "matmul": Family(
        finals=(f"{_ROUTINES}_chunk_sum",), combine=f"{_ROUTINES}_chunk_sum", kept=("dtype",), is_concatenated=False
    ),
    "bincount": Family(
        finals=(f"{_ROUTINES}_bincount_agg",),
        combine=f"{_ROUTINES}_bincount_agg",
        kept=("dtype",),
        is_concatenated=False,
    ),
}


def _function(name: str) -> Any:
    """Return a function if its module is loaded, else None."""
    module, _, attribute = name.partition(":")
    return getattr(sys.modules.get(module), attribute, None)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reduction:
    """What a step's function does.

    Attributes
    ----------
    family
        Name of the family.
    is_combine
        It makes a part, which may be merged again.
    identity
        Equal for the steps of one reduction.
    combine
        Merges parts.
    options
        Keywords of ``combine``.
    final
        What the step calls when its parts come in another order.
    position
        Which argument holds the parts.
    n_levels
        How deep lists are nested around the parts.
    """

    family: str
    is_combine: bool
    identity: tuple[Any, ...]
    combine: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    final: Callable[..., Any]
    position: int = 0
    n_levels: int

    def nested(self, inputs: Iterable[Key]) -> List:
        """Wrap the keys of parts in as many lists as the function expects.

        Notes
        -----
        One list of all parts, innermost. Parts have size one along every axis that is reduced (or there is one such
        axis), so that any number of them fit together along one of these axes.
        """
        parts = List(*[TaskRef(key) for key in inputs])
        for _ in range(self.n_levels - 1):
            parts = List(parts)
        return parts

    def merged(self, key: Key, inputs: Iterable[Key]) -> Task:
        """Make a task that merges parts into one.

        Parameters
        ----------
        key
            Its key.
        inputs
            Keys of the parts.
        """
        parts = self.nested(inputs)
        for _ in range(self.position):  # under dask.utils.apply there is one more list, of the arguments
            parts = parts.args[0]
        return Task(key, self.combine, parts, **self.options)


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
    """

    reduction: Reduction
    is_combine: bool
    inputs: Sequence[Key]


class Reader:
    """Recognise steps of reductions. Remembers functions, which all tasks of a layer share."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, Reduction | None]] = {}
        self._families = _families()

    def step(self, task: GraphNode) -> Step | None:
        """Recognise a task, None if it is not a step of a reduction that is known.

        Parameters
        ----------
        task
            A task of a graph that is ready to run.
        """
        function = getattr(task, "func", None)
        if function is None:
            return None
        if function is not _execute_subgraph:
            if (reduction := self._reduction(function)) is None:
                return None
            inputs = _keys_in(task.args[reduction.position], reduction.n_levels)
            return Step(reduction=reduction, is_combine=reduction.is_combine, inputs=inputs) if inputs else None
        inner = task.args[0]
        first, *others = inner.values()
        if type(first) is not Task or (reduction := self._reduction(first.func)) is None:
            return None
        inputs = _keys_in(first.args[reduction.position], reduction.n_levels)
        if not inputs or first.dependencies != task.dependencies:
            return None
        is_combine = reduction.is_combine and all(self._combines(other, reduction) for other in others)
        return Step(reduction=reduction, is_combine=is_combine, inputs=inputs)

    def _combines(self, task: Any, like: Reduction) -> bool:
        found = self._reduction(task.func) if type(task) is Task else None
        return found is not None and found.is_combine and found.identity == like.identity

    def _reduction(self, function: Any) -> Reduction | None:
        if (known := self._known.get(id(function))) is None:
            # The function itself is kept, so that its id stays taken.
            known = self._known[id(function)] = function, _array_reduction(function, self._families)
        return known[1]


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


def with_inputs(task: Task, step: Step, inputs: Sequence[Key]) -> Task:
    """Make a step anew that reads other parts.

    Parameters
    ----------
    task
        The step, alone or with what was fused to it.
    step
        What is known of it.
    inputs
        Keys of the parts that it shall read.

    Returns
    -------
    Task
        A task with the same key and, to rounding, the same value.
    """
    if task.func is _execute_subgraph:
        inner, outkey, _, *_ = task.args
        name, first = next(iter(inner.items()))
        changed = {**inner, name: _reading(first, step.reduction, inputs)}
        refs = [TaskRef(key) for key in inputs]
        return Task(task.key, task.func, changed, outkey, tuple(inputs), *refs, _data_producer=task._data_producer)
    return _reading(task, step.reduction, inputs)


def _reading(task: Task, reduction: Reduction, inputs: Iterable[Key]) -> Task:
    at = reduction.position
    args = (*task.args[:at], reduction.nested(inputs), *task.args[at + 1 :])
    return Task(task.key, reduction.final, *args, _data_producer=task._data_producer, **task.kwargs)


# ---------------------------------------------------------------------------------------------------------------
# Arrays


def _families() -> dict[Any, tuple[str, bool, bool]]:
    """Return by function: name of the family, whether it may be a final step, whether a combine."""
    found: dict[Any, tuple[str, bool, bool]] = {}
    for name, family in FAMILIES.items():
        finals, combine = [_function(f) for f in family.finals], _function(family.combine)
        if combine is None or None in finals:  # not loaded, or another Dask: its trees stay as they are
            continue
        found[combine] = name, False, True
        for final in finals:
            found[final] = name, True, final is combine
    return found


def _array_reduction(function: Any, families: Mapping[Any, tuple[str, bool, bool]]) -> Reduction | None:
    """Recognise a function as ``dask.array.reductions.reduction`` makes it, None if it is not one that is known."""
    whole, concatenate = function, None
    if hasattr(function, "funcs") and hasattr(function, "first"):  # compose(partial(...), partial(_concatenate2, ...))
        concatenate = function.first
        if len(function.funcs) != 1 or getattr(concatenate, "func", None) is not _function(_CONCATENATE):
            return None
        function = function.funcs[0]
    if type(function) is not functools.partial or (found := _role(function.func, families)) is None:
        return None
    name, is_final, is_combine = found
    family, keywords = FAMILIES[name], function.keywords
    axis = keywords.get("axis")
    is_combine &= keywords.get("keepdims") is True
    if not (is_final or is_combine) or not isinstance(axis, tuple) or not axis:
        return None
    if len(function.args) != family.n_kept or family.is_concatenated != (concatenate is not None):
        return None
    if _is_of_objects(keywords.get("dtype")):  # "+" may be anything
        return None
    options = {keyword: keywords[keyword] for keyword in family.kept if keyword in keywords}
    told = [_name_of(arg) for arg in function.args] + [f"{key}={value}" for key, value in sorted(options.items())]
    identity = name, axis, *told
    options |= {keyword: _function(value) for keyword, value in family.added.items()}
    combine: Any = functools.partial(_function(family.combine), *function.args, **options, axis=axis, keepdims=True)
    final = whole
    if family.is_ordered:
        # Parts of one list lie one behind the other along the last axis that is reduced: see Reduction.nested.
        by_position = functools.partial(_function("numpy:sort"), axis=max(axis), order="arg")
        combine = toolz.compose(combine, by_position, concatenate)
        final = toolz.compose(function, by_position, concatenate)
    elif concatenate is not None:
        combine = toolz.compose(combine, concatenate)
    return Reduction(
        family=name, is_combine=is_combine, identity=identity, combine=combine, final=final, n_levels=len(axis)
    )


def _role(function: Any, families: Mapping[Any, tuple[str, bool, bool]]) -> tuple[str, bool, bool] | None:
    try:
        return families.get(function)
    except TypeError:  # a callable that cannot be hashed is none of Dask's
        return None


def _name_of(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', repr(function))}"


def _is_of_objects(dtype: Any) -> bool:
    return dtype is object or bool(getattr(dtype, "hasobject", False))
