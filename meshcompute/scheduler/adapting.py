"""Place again what has not started, when pools come or go or links are no longer what they were.

Covers the decision, over plain data: whether a situation differs enough, and where tasks should move. Does not cover
how a live scheduler is read and changed (:mod:`meshcompute.scheduler.replacing`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dask.typing import Key

from meshcompute.links import LinkTable
from meshcompute.placement import placing

__all__ = ["DRIFT", "Situation", "has_drifted", "plan_moves"]

#: A link's rate has to change by this factor before anything is placed again: rates of TCP vary by half by themselves.
DRIFT = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """Tasks that have not started, and what they read and are read by.

    Attributes
    ----------
    keys
        Tasks and values, each once, shape (n,).
    dependencies
        For each, the indices of what it reads, shape (n,); nothing for values that are there.
    nbytes
        Size of each value, measured or estimated, shape (n,).
    pools
        For each, the pools that it may be in: where the value is, where the task runs or is pinned, or all that there
        are, shape (n,).
    movable
        Indices of the tasks that may move, with the pool that they are held to.
    seconds
        For each, how long one thread has still to work on it, shape (n,); None where time does not count.
    threads
        Threads by name of pool, where time counts.
    """

    keys: Sequence[Key]
    dependencies: Sequence[Sequence[int]]
    nbytes: Sequence[float]
    pools: Sequence[tuple[str, ...]]
    movable: Mapping[int, str]
    seconds: Sequence[float] | None = None
    threads: Mapping[str, float] = field(default_factory=dict)


def plan_moves(situation: Situation, links: LinkTable) -> dict[Key, str]:
    """Choose where tasks should run that have not started.

    Parameters
    ----------
    situation
        What there is.
    links
        What is known of links now, and the objective.

    Returns
    -------
    dict
        New pool by key, of the tasks that should move. Values that are there and tasks that run stay.
    """
    if not situation.movable:
        return {}
    names = sorted({pool for pools in situation.pools for pool in pools})
    number = {name: i for i, name in enumerate(names)}
    shared = {pools: tuple([number[pool] for pool in pools]) for pools in set(situation.pools)}
    graph = placing.Graph(
        dependencies=situation.dependencies,
        nbytes=situation.nbytes,
        pins=[shared[pools] or None for pools in situation.pools],
        seconds=situation.seconds,
    )
    has_replicas = any(1 < len(situation.pools[i]) < len(names) for i in situation.movable)
    # A pool without workers, where values are awaited, has no time to give: one thread, as when a graph comes in.
    threads = None if situation.seconds is None else [situation.threads.get(name, 1.0) for name in names]
    chosen = placing.place(graph, len(names), links.costs(names, threads, has_replicas=has_replicas)).pools
    moves = {}
    for i, pool in situation.movable.items():
        new = names[chosen[i]] if chosen[i] >= 0 else pool
        if new != pool:
            moves[situation.keys[i]] = new
    return moves


def has_drifted(before: LinkTable, now: LinkTable, pools: Sequence[str]) -> bool:
    """Tell whether links differ enough for plans to differ.

    Parameters
    ----------
    before, now
        What was known when plans were made last, and what is.
    pools
        Names of the pools that there are.
    """
    if now.objective == "bytes" and before.objective == "bytes":
        return False
    for source in pools:
        for destination in pools:
            if source == destination:
                continue
            old, new = before.bytes_per_second(source, destination), now.bytes_per_second(source, destination)
            if max(old, new) >= DRIFT * min(old, new):
                return True
            if before.cost(source, destination, 1.0) != now.cost(source, destination, 1.0):
                return True
    return False
