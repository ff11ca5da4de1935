"""Sizes learnt: what tasks of a kind yielded in earlier runs corrects what is estimated for the next.

Covers the book of what was measured, how the estimates of a new graph are corrected by it, and how sure one may be of
a size. Does not cover the estimates themselves (:mod:`meshcompute.sizes`) or who reports a task that has ended
(:mod:`meshcompute.schedulerstate`).

Tasks are of one kind if they bear the same name (as the dashboard shows it, without tokens), read as many values and
would be estimated alike: so the same function on chunks of another shape is another kind. What counts is the mean
over a group of tasks, whose single sizes keep their proportions.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from dask._task_spec import GraphNode
from dask.typing import Key
from dask.utils import key_split
from distributed.utils import key_split_group

__all__ = ["Kind", "SizeBook", "Sure", "correct", "group_of", "kinds_of"]

# What is kept: a record of 150 bytes each, the least recently used go first.
_MOST_KINDS = 4096
_MOST_GROUPS = 4096
# Measurements beyond this many count half with every doubling: what data looks like changes.
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


class SizeBook:
    """What was measured, by kind of task; and the groups of tasks that are expected to report.

    Notes
    -----
    Plans are made, and groups announced, in a thread; tasks report on the event loop, by changing a record that they
    find by a single look-up. Bounded: ten thousand small graphs leave no more than one large one.
    """

    def __init__(self) -> None:
        self._records: dict[Kind, list[float]] = {}
        #: Record of a group of tasks, by the group's name: number of tasks that ended, their bytes, and the estimate.
        self.groups: dict[str, list[float]] = {}
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
                record = self._records.pop(kind, None) or [0, 0.0, kind.nbytes]
                if record[0] > _MEMORY:
                    record[:2] = record[0] / 2, record[1] / 2
                self._records[kind] = record
                self.groups.pop(group, None)
                self.groups[group] = record
            _forget(self._records, _MOST_KINDS)
            _forget(self.groups, _MOST_GROUPS)

    def learnt(self, kinds: Iterable[Kind]) -> dict[Kind, float]:
        """Tell the mean size of those kinds of which tasks have ended.

        Parameters
        ----------
        kinds
            What is asked for.
        """
        found = {}
        for kind in kinds:
            record = self._records.get(kind)
            if record is not None and record[0]:
                found[kind] = record[1] / record[0]
        return found

    def expected(self, group: str) -> float:
        """Tell the mean size of a group's values: measured, estimated, or not a number where nothing is known.

        Parameters
        ----------
        group
            Name of the group.
        """
        record = self.groups.get(group)
        if record is None:
            return math.nan
        return record[1] / record[0] if record[0] else record[2]

    def __len__(self) -> int:
        return len(self._records)


def _forget(records: dict[Any, Any], most: int) -> None:
    """Drop the oldest entries beyond a number."""
    while len(records) > most:
        del records[next(iter(records))]


def group_of(key: Key) -> str:
    """Name the group that the scheduler will count a task in."""
    return str(key[0]) if type(key) is tuple else str(key_split_group(key))


def kinds_of(tasks: Mapping[Key, GraphNode], nbytes: Mapping[Key, float]) -> dict[str, Kind]:
    """Find the groups of a graph's tasks, and their kinds.

    Parameters
    ----------
    tasks
        Task by key.
    nbytes
        Estimated sizes by key; tasks without one belong to no group.

    Returns
    -------
    dict
        Kind by name of the group.
    """
    totals: dict[Any, list[Any]] = {}
    for key in tasks:
        if (size := nbytes.get(key)) is None:
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
    nbytes: dict[Key, float],
    kind_by_group: Mapping[str, Kind],
    learnt: Mapping[Kind, float],
    read_by_sender: Mapping[Key, Iterable[Key]] | None = None,
) -> frozenset[str]:
    """Correct estimates by what was measured before.

    Parameters
    ----------
    nbytes
        Estimated sizes by key; changed in place.
    kind_by_group
        As of :func:`kinds_of`.
    learnt
        Measured mean size by kind.
    read_by_sender
        What the senders of P2P shuffles read, by key: they return a number, and what counts is what they send.

    Returns
    -------
    frozenset of str
        Groups of which something was learnt, whether the estimates had to be changed or not.
    """
    known: set[str] = set()
    factors: dict[str, float] = {}
    sent = {sender: nbytes[sender] for sender in read_by_sender or () if sender in nbytes}
    for group, kind in kind_by_group.items():
        if (mean := learnt.get(kind)) is None:
            continue
        known.add(group)
        if abs(mean - kind.nbytes) > _NEAR * kind.nbytes:
            factors[group] = mean / kind.nbytes if kind.nbytes >= 1.0 else 0.0
    if factors:
        for key, size in nbytes.items():
            group = group_of(key)
            if group in factors:
                kind = kind_by_group[group]
                nbytes[key] = size * factors[group] if kind.nbytes >= 1.0 else learnt[kind]
    for sender, size in sent.items():
        nbytes[sender] = sum([nbytes[key] for key in (read_by_sender or {})[sender] if key in nbytes]) or size
    return frozenset(known)
