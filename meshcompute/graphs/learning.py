"""Sizes learnt: what tasks of a kind yielded in earlier runs corrects what is estimated for the next.

Covers the book of what was measured, how the estimates of a new graph are corrected by it, and how sure one may be of
a size. Does not cover the estimates themselves (:mod:`meshcompute.graphs.sizes`) or who reports a task that has ended
(:mod:`meshcompute.scheduler.state`).

Tasks that ran before tell best: the same load of the same table has the same token, and so the same group. Where the
group is new, tasks of its kind tell: they bear the same name (as the dashboard shows it, without tokens), read as many
values and would be estimated alike, so that the same function on chunks of another shape is another kind. What counts
is the mean over a group of tasks, whose single sizes keep their proportions.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Container, Mapping
from typing import Any, NamedTuple

from dask._task_spec import Alias, GraphNode
from dask.typing import Key
from dask.utils import key_split
from distributed.utils import key_split_group

__all__ = ["Kind", "SizeBook", "Sure", "correct", "group_of", "kinds_of"]

# What is kept: a record of 150 bytes each, the least recently used go first.
_MOST_KINDS = 4096
_MOST_GROUPS = 4096
# Of a kind, measurements beyond this many count half with every doubling: what data looks like changes.
_MEMORY = 1024
# Estimates nearer than this to what was measured stay: else every run would change the next plan a little.
_NEAR = 0.1


class Kind(NamedTuple):
    """What tasks have to share, for one to tell of the other.

    Attributes
    ----------
    name
        As the dashboard shows it.
    n_inputs
        Values that the first of them reads.
    nbytes
        Their mean estimated size, to three digits.
    """

    name: str
    n_inputs: int
    nbytes: float


class Sure:
    """How sure one is of a size: the words that ``explain()`` uses, surest first."""

    MEASURED = "measured"
    EXACT = "from metadata"
    LEARNT = "learnt"
    GUESSED = "guessed"
    ALL = (MEASURED, EXACT, LEARNT, GUESSED)


class _Record:
    """Tasks that ended: how many, and how large their values were."""

    __slots__ = ("estimate", "n", "nbytes")

    def __init__(self, estimate: float) -> None:
        self.n, self.nbytes, self.estimate = 0.0, 0.0, estimate

    def count(self, nbytes: float) -> None:
        """Add a task."""
        self.n += 1.0
        self.nbytes += nbytes

    def fade(self) -> None:
        """Let what was counted until now count half of what comes."""
        self.n, self.nbytes = self.n / 2, self.nbytes / 2


class SizeBook:
    """What was measured, by group and by kind of task; groups are announced, and then their tasks report.

    Notes
    -----
    Plans are made, and groups announced, in a thread; tasks report on the event loop, by changing records that they
    find by a single look-up. Bounded: ten thousand small graphs leave no more than one large one.
    """

    def __init__(self) -> None:
        self._kinds: dict[Kind, _Record] = {}
        self._groups: dict[str, tuple[_Record, ...]] = {}  # its own, and that of its kind
        self._lock = threading.Lock()

    def expect(self, kind_by_group: Mapping[str, Kind]) -> None:
        """Announce groups of tasks that will run.

        Parameters
        ----------
        kind_by_group
            Their kinds.
        """
        with self._lock:
            for group, kind in kind_by_group.items():
                of_kind = self._kinds.pop(kind, None) or _Record(kind.nbytes)
                if of_kind.n > _MEMORY:
                    of_kind.fade()
                self._kinds[kind] = of_kind
                before = self._groups.pop(group, ())
                if _is_nameless(group, kind):
                    self._groups[group] = (of_kind,)
                    continue
                own = before[0] if before else _Record(kind.nbytes)
                if own.n >= 1.0:  # the same tasks again: this time counts most
                    own.fade()
                own.estimate = kind.nbytes
                self._groups[group] = own, of_kind
            _forget(self._kinds, _MOST_KINDS)
            _forget(self._groups, _MOST_GROUPS)

    def ended(self, group: str, nbytes: float) -> None:
        """Count a task that has ended; of a group that nobody announced, nothing is noted.

        Parameters
        ----------
        group
            Name of its group.
        nbytes
            Size of its value.
        """
        for record in self._groups.get(group, ()):
            record.count(nbytes)

    def learnt(self, kind_by_group: Mapping[str, Kind]) -> dict[str, float]:
        """Tell the mean size of a group's values, where tasks of the group, or else of its kind, have ended.

        Parameters
        ----------
        kind_by_group
            What is asked for. Kinds may be plain tuples.
        """
        found = {}
        for group, kind in kind_by_group.items():
            records = () if _is_nameless(group, kind) else self._groups.get(group, ())
            record = records[0] if records and records[0].n else self._kinds.get(kind)
            if record is not None and record.n:
                found[group] = record.nbytes / record.n
        return found

    def expected(self, group: str) -> float:
        """Tell the mean size of a group's values: measured, estimated, or not a number where nothing is known.

        Parameters
        ----------
        group
            Name of the group.
        """
        records = self._groups.get(group, ())
        estimate = records[0].estimate if records else math.nan
        return next((record.nbytes / record.n for record in records if record.n), estimate)

    def __len__(self) -> int:
        return max(len(self._kinds), len(self._groups))


def _is_nameless(group: str, kind: Kind) -> bool:
    """Whether a group is all tasks of a name: a key that is a string is counted without its token."""
    return group == kind[0]


def _forget(records: dict[Any, Any], most: int) -> None:
    """Drop the oldest entries beyond a number."""
    while len(records) > most:
        del records[next(iter(records))]


def group_of(key: Key) -> str:
    """Name the group that the scheduler will count a task in."""
    return str(key[0]) if type(key) is tuple else str(key_split_group(key))


def kinds_of(
    tasks: Mapping[Key, GraphNode], nbytes: Mapping[Key, float], senders: Container[Key] = ()
) -> dict[str, Kind]:
    """Find the groups of a graph's tasks, and their kinds, apart from tasks whose values are those of others.

    Parameters
    ----------
    tasks
        Task by key.
    nbytes
        Estimated sizes by key; tasks without one belong to no group.
    senders
        Keys of tasks of P2P shuffles that return a number: what counts is what they send, which they read.

    Returns
    -------
    dict
        Kind by name of the group.
    """
    totals: dict[Any, list[Any]] = {}
    for key, task in tasks.items():
        if (size := nbytes.get(key)) is None or type(task) is Alias or key in senders:
            continue
        group = key[0] if type(key) is tuple else key_split_group(key)
        if (entry := totals.get(group)) is None:
            totals[group] = [key, 1, size]
        else:
            entry[1] += 1
            entry[2] += size
    return {
        str(group): Kind(str(key_split(key)), len(tasks[key].dependencies), float(f"{total / n:.3g}"))
        for group, (key, n, total) in totals.items()
    }


def correct(
    nbytes: Mapping[Key, float], kind_by_group: Mapping[str, Kind], learnt: Mapping[str, float]
) -> tuple[dict[Key, float], frozenset[str]]:
    """Correct estimates by what was measured before.

    Parameters
    ----------
    nbytes
        Estimated sizes by key.
    kind_by_group
        As of :func:`kinds_of`.
    learnt
        Measured mean size by group.

    Returns
    -------
    dict
        Size by key of what was measured, for what rests on it to be estimated anew; empty if estimates were right.
    frozenset of str
        Groups of which something was learnt, whether the estimates have to be changed or not.
    """
    known = learnt.keys() & kind_by_group.keys()
    factors: dict[str, float] = {}
    for group in known:
        mean, estimate = learnt[group], kind_by_group[group].nbytes
        if abs(mean - estimate) > _NEAR * estimate:
            factors[group] = mean / estimate if estimate >= 1.0 else 0.0
    sizes: dict[Key, float] = {}
    if factors:
        for key, size in nbytes.items():
            if (group := group_of(key)) in known:
                factor = factors.get(group, 1.0)
                sizes[key] = size * factor if factor or kind_by_group[group].nbytes >= 1.0 else learnt[group]
    return sizes, frozenset(known)
