"""Which functions of Dask merge parts of a reduction, and how: the table of what may be regrouped.

Covers what is known of one step's function (:class:`Reduction`), and the functions of arrays. Does not cover arrays by
group (:mod:`meshcompute.graphs.associativegroups`), tables and bags (:mod:`meshcompute.graphs.associativetables`),
tasks (:mod:`meshcompute.graphs.reductionsteps`), nor which of them should merge other parts than they do
(:mod:`meshcompute.graphs.regrouping`).

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import toolz

__all__ = [
    "FAMILIES",
    "KINDS_OF_NUMBERS",
    "NUMBERS",
    "NUMPY",
    "PART_NBYTES",
    "Family",
    "Reduction",
    "array_families",
    "array_reduction",
    "loaded",
]

#: Kinds of dtypes whose sums depend on the order by rounding alone. A sum of objects or texts may do anything.
KINDS_OF_NUMBERS = "biufcmM"

#: Bytes of a part beside its arrays, by family: dask.sizeof of a dict with so many empty arrays.
PART_NBYTES = {"mean": 320, "moment": 402}
_NUMBER_NBYTES = 8

#: What has to be known of the values before a reduction may be regrouped.
NUMPY = "numpy"  # the blocks are numpy's
NUMBERS = "numbers"  # they hold numbers (or times), not texts or objects


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reduction:
    """What a step of a reduction does.

    Attributes
    ----------
    family
        Name of the family.
    is_combine
        It makes a part, which may be merged again.
    identity
        Equal for the steps of one reduction.
    combine
        Merges parts: called with ``before``, a list of parts, ``after`` and ``options``.
    before, after
        Arguments of ``combine`` around the parts.
    options
        Keywords of ``combine``.
    n_levels
        How deep lists are nested around the parts that ``combine`` is given.
    final
        What the step calls when its parts come in another order; None: what it calls anyhow.
    condition
        What has to be known of the values: :data:`NUMPY`, :data:`NUMBERS`, or nothing.
    count_share
        Share of a part's arrays that counts take up, 0 if it has none.
    has_equal_counts
        The counts are one number, repeated, if the blocks are numpy's: nothing is skipped.
    are_rows_ordered
        Parts are tables whose rows come in the order in which they first came up.
    has_equal_parts
        What is merged of two parts is as large as each of them.
    """

    family: str
    is_combine: bool
    identity: tuple[Any, ...]
    combine: Callable[..., Any]
    before: tuple[Any, ...] = ()
    after: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    n_levels: int = 1
    final: Callable[..., Any] | None = None
    condition: str = ""
    count_share: float = 0.0
    has_equal_counts: bool = False
    are_rows_ordered: bool = False
    has_equal_parts: bool = False

    def sent_nbytes(self, nbytes: float) -> float:
        """Return the bytes of a part whose counts are sent as one number.

        Parameters
        ----------
        nbytes
            Its bytes as it is.
        """
        arrays = nbytes - PART_NBYTES.get(self.family, 0)
        return nbytes - arrays * self.count_share + _NUMBER_NBYTES if arrays > 0 else nbytes


def loaded(name: str) -> Any:
    """Return a function if its module is loaded, else None.

    Parameters
    ----------
    name
        ``module:name``.
    """
    module, _, attribute = name.partition(":")
    return getattr(sys.modules.get(module), attribute, None)


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
    is_counting
        Parts hold the number of values of each element.
    """

    finals: tuple[str, ...]
    combine: str
    kept: tuple[str, ...] = ()
    n_kept: int = 0
    added: Mapping[str, str] = field(default_factory=dict)
    is_concatenated: bool = True
    is_ordered: bool = False
    is_counting: bool = False


_REDUCTIONS = "dask.array.reductions:"
_ROUTINES = "dask.array.routines:"
_CONCATENATE = "dask.array.core:_concatenate2"

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
    "mean": Family(
        finals=(f"{_REDUCTIONS}mean_agg",),
        combine=f"{_REDUCTIONS}mean_combine",
        is_concatenated=False,
        is_counting=True,
    ),
    # number, total and central moments (Chan, Golub, LeVeque 1979; Pebay 2008). A part without elements has none: its
    # mean is NaN, which nansum leaves out as Dask's final step does.
    "moment": Family(
        finals=(f"{_REDUCTIONS}moment_agg",),
        combine=f"{_REDUCTIONS}moment_combine",
        kept=("order",),
        added={"sum": "numpy:nansum"},
        is_concatenated=False,
        is_counting=True,
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


def array_families() -> dict[Any, tuple[str, bool, bool]]:
    """Return by function: name of the family, whether it may be a final step, whether a combine."""
    found: dict[Any, tuple[str, bool, bool]] = {}
    for name, family in FAMILIES.items():
        finals, combine = [loaded(f) for f in family.finals], loaded(family.combine)
        if combine is None or None in finals:  # not loaded, or another Dask: its trees stay as they are
            continue
        found[combine] = name, False, True
        for final in finals:
            found[final] = name, True, final is combine
    return found


def array_reduction(function: Any, families: Mapping[Any, tuple[str, bool, bool]]) -> Reduction | None:
    """Recognise a function as ``dask.array.reductions.reduction`` makes it, None if it is not one that is known."""
    whole, concatenate = function, None
    if hasattr(function, "funcs") and hasattr(function, "first"):  # compose(partial(...), partial(_concatenate2, ...))
        concatenate = function.first
        if len(function.funcs) != 1 or getattr(concatenate, "func", None) is not loaded(_CONCATENATE):
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
    if not _is_of_numbers(keywords.get("dtype")):
        return None
    options = {keyword: keywords[keyword] for keyword in family.kept if keyword in keywords}
    told = [_name_of(arg) for arg in function.args] + [f"{key}={value}" for key, value in sorted(options.items())]
    identity = name, axis, *told
    options |= {keyword: loaded(value) for keyword, value in family.added.items()}
    combine: Any = functools.partial(loaded(family.combine), *function.args, **options, axis=axis, keepdims=True)
    final = whole
    if family.is_ordered:
        # Parts lie one behind the other along the last axis that is reduced (_nested in reductionsteps).
        by_position = functools.partial(loaded("numpy:sort"), axis=max(axis), order="arg")
        combine = toolz.compose(combine, by_position, concatenate)
        final = toolz.compose(function, by_position, concatenate)
    elif concatenate is not None:
        combine = toolz.compose(combine, concatenate)
    return Reduction(
        family=name,
        is_combine=is_combine,
        identity=identity,
        combine=combine,
        n_levels=len(axis),
        final=final,
        condition=NUMPY if family.is_ordered else "",
        count_share=_count_share(name, keywords) if family.is_counting else 0.0,
        has_equal_counts=family.is_counting and "sum" not in keywords,  # those that skip NaN have sums of their own
        has_equal_parts=True,
    )


def _count_share(family: str, keywords: Mapping[str, Any]) -> float:
    """Return the share of the counts: a mean has them and totals, a moment also one array for each order from 2."""
    if family == "mean":
        return 0.5
    itemsize: int = loaded("numpy:dtype")(keywords.get("dtype", "f8")).itemsize
    return 8 / (8 + itemsize * int(keywords.get("order", 2)))


def _role(function: Any, families: Mapping[Any, tuple[str, bool, bool]]) -> tuple[str, bool, bool] | None:
    try:
        return families.get(function)
    except TypeError:  # a callable that cannot be hashed is none of Dask's
        return None


def _name_of(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', repr(function))}"


def _is_of_numbers(dtype: Any) -> bool:
    if dtype is None:  # extremes, and reductions to booleans
        return True
    try:
        return loaded("numpy:dtype")(dtype).kind in KINDS_OF_NUMBERS
    except TypeError:
        return False
