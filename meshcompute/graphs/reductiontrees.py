"""Trees of reductions: which tasks they are made of, in which pools their values lie, and what regrouping them saves.

Covers reading a graph. Does not cover single steps (:mod:`meshcompute.graphs.reductionsteps`) nor changing anything
(:mod:`meshcompute.graphs.regrouping`).

Runs in the client's process and in the scheduler's; imports nothing that a stock scheduler may lack.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dask._task_spec import GraphNode
from dask.typing import Key

from meshcompute.graphs.reductionsteps import Step

__all__ = ["Homes", "Tree", "cheapest_ways", "grown", "mean_nbytes", "saving_of", "with_other_readers"]

_SHORT = 4  # a chain of so many tasks is walked again sooner than looked up
_MOST_SENDERS = 4  # all of whose ways are tried: 5 ** 4
_LEAST_SAVING = 1e-6  # of what crosses: less is a rounding error of the comparison


@dataclass(slots=True, kw_only=True, eq=False)
class Tree:
    """One reduction: its last step, the combines below it, and the values that it reduces."""

    nodes: list[Key]  # the last step, then the combines, each after the one that reads it
    parents: list[int]  # for each node, the index of the one that reads it; -1 for the last step
    leaves: list[Key]  # in the order in which they are read
    readers: list[int]  # for each leaf, the index of the node that reads it
    names: list[Key]  # aliases of nodes
    pools: list[str] = field(default_factory=list)  # for each leaf


def with_other_readers(
    inner: Container[Key],
    names: Mapping[Key, Key],
    tasks: Mapping[Key, GraphNode],
    steps: Mapping[Key, Step],
    is_kept: Callable[[Key], bool],
) -> set[Key]:
    """Find the combines that something else than a step of the same reduction reads."""
    found = {target for alias, target in names.items() if is_kept(alias)}
    watched = {**{key: key for key in steps if key in inner}, **names}
    keys = watched.keys()
    for key, task in tasks.items():
        dependencies = task.dependencies
        if not dependencies or keys.isdisjoint(dependencies) or key in names:
            continue
        step = steps.get(key)
        for dep in dependencies:
            target = watched.get(dep)
            if target is not None and (step is None or step.reduction.identity != steps[target].reduction.identity):
                found.add(target)
    return found


def grown(steps: Mapping[Key, Step], inner: set[Key], names: Mapping[Key, Key]) -> list[Tree]:
    """Collect the trees of a graph."""
    target_of = {**{key: key for key in inner}, **{alias: key for alias, key in names.items() if key in inner}}
    below: set[Key] = set()
    trees = [_grown_from(root, steps, target_of, below) for root in steps if root not in inner]
    # Combines that no step reads: what a user did with keepdims=True looks like one.
    trees += [_grown_from(root, steps, target_of, below) for root in steps if root in inner and root not in below]
    return [tree for tree in trees if tree.nodes[0] not in below]


def _grown_from(root: Key, steps: Mapping[Key, Step], target_of: Mapping[Key, Key], below: set[Key]) -> Tree:
    tree = Tree(nodes=[root], parents=[-1], leaves=[], readers=[], names=[])
    leaves, readers = tree.leaves, tree.readers
    stack = [(0, key) for key in reversed(steps[root].inputs)]
    while stack:
        reader, key = stack.pop()
        target = target_of.get(key)
        if target is None:
            leaves.append(key)
            readers.append(reader)
            continue
        if target is not key:
            tree.names.append(key)
        below.add(target)
        node = len(tree.nodes)
        tree.nodes.append(target)
        tree.parents.append(reader)
        stack += [(node, below_it) for below_it in reversed(steps[target].inputs)]
    return tree


class Homes:
    """In which pools values would lie if nothing crossed that need not: where most of what they are made of lies."""

    def __init__(
        self,
        tasks: Mapping[Key, GraphNode],
        nbytes: Mapping[Key, float],
        pools_of: Callable[[Key], tuple[str, ...] | None],
    ) -> None:
        self._tasks = tasks
        self._nbytes = nbytes
        self._pools_of = pools_of
        self._found: dict[Key, tuple[str, ...]] = {}

    def of(self, key: Key) -> tuple[str, ...]:
        """Name the pools in which a value may lie, all as good as each other; none: anywhere."""
        found = self._found
        if (home := self._pools_of(key)) is not None:
            return home
        passed: list[Key] = []  # along chains nothing has to be weighed
        current = key
        while (home := found.get(current)) is None and (home := self._pools_of(current)) is None:
            task = self._tasks.get(current)
            if task is None or len(task.dependencies) != 1:
                home = self._weighed(current)
                break
            passed.append(current)
            (current,) = task.dependencies
        if len(passed) > _SHORT:
            found.update(dict.fromkeys(passed, home))
        return home

    def _weighed(self, key: Key) -> tuple[str, ...]:
        """Find the home of a value of several inputs after theirs, without recursion: chains can be long."""
        found, tasks = self._found, self._tasks
        stack, entered = [key], set()
        while stack:
            current = stack[-1]
            if current not in found:
                if (pools := self._pools_of(current)) is not None:
                    found[current] = pools
                elif (task := tasks.get(current)) is None:
                    found[current] = ()
                else:
                    if current not in entered:
                        entered.add(current)
                        missing = [dep for dep in task.dependencies if dep not in found and dep not in entered]
                        if missing:
                            stack += missing
                            continue
                    found[current] = self._heaviest(task.dependencies)
            stack.pop()
        return found[key]

    def _heaviest(self, keys: Iterable[Key]) -> tuple[str, ...]:
        keys = list(keys)
        if len(keys) == 1:
            return self._found.get(keys[0], ())
        held: dict[str, float] = {}
        for key in keys:
            for pool in self._found.get(key, ()):
                held[pool] = held.get(pool, 0.0) + _size(self._nbytes, key)
        most = max(held.values(), default=0.0)
        return tuple(sorted([pool for pool, size in held.items() if size >= most * (1 - 1e-9)]))

    def assign(self, tree: Tree) -> bool:
        """Give each leaf of a tree a pool, if there are several.

        Returns
        -------
        bool
            Whether there are.
        """
        choices = list(map(self.of, tree.leaves))
        kinds = set(choices)
        if len(kinds) == 1 and len(choices[0]) < 2:
            return False
        count = Counter([pools[0] for pools in choices if len(pools) == 1])
        ranked = sorted(count, key=lambda pool: (-count[pool], pool))
        rank = {pool: i for i, pool in enumerate(ranked)}
        for pools in sorted(kinds):
            for pool in pools:
                rank.setdefault(pool, len(rank))
        best = min(rank, key=rank.__getitem__, default="")
        choice = {pools: min(pools, key=rank.__getitem__) if pools else best for pools in kinds}
        if len(set(choice.values())) == 1:
            return False
        tree.pools = [choice[pools] for pools in choices]
        return True


def saving_of(tree: Tree, nbytes: Mapping[Key, float]) -> float:
    """Return how many bytes fewer cross if a tree is regrouped, wherever its result is wanted.

    Notes
    -----
    By dynamic programming over the given tree (Sankoff 1975): its least cost with a combine in this pool or that.
    """
    number = {pool: i for i, pool in enumerate(sorted(set(tree.pools)))}
    leaf_nbytes = mean_nbytes(tree.leaves, nbytes)
    part_nbytes = mean_nbytes(tree.nodes[1:] or tree.leaves, nbytes)
    costs = [[0.0] * len(number) for _ in tree.nodes]
    read = [0] * len(tree.nodes)
    counts = [0] * len(number)
    for reader, pool in zip(tree.readers, tree.pools, strict=True):
        own = number[pool]
        costs[reader][own] -= leaf_nbytes
        read[reader] += 1
        counts[own] += 1
    for node in range(len(costs) - 1, -1, -1):
        everywhere = read[node] * leaf_nbytes
        cost = costs[node] = [everywhere + less for less in costs[node]]
        if node:
            elsewhere = min(cost) + part_nbytes
            above = tree.parents[node]
            costs[above] = [sofar + min(here, elsewhere) for sofar, here in zip(costs[above], cost, strict=True)]
    given = costs[0]
    sent = [min(count * leaf_nbytes, part_nbytes) for count in counts]
    regrouped = [sum(sent) - size for size in sent]
    result = mean_nbytes(tree.nodes[:1], nbytes)  # it may be made elsewhere than it is wanted
    saving = max(
        min(a, min(given) + result) - min(b, min(regrouped) + result) for a, b in zip(given, regrouped, strict=True)
    )
    return saving if saving > _LEAST_SAVING * max(given) else 0.0


def cheapest_ways(senders: Sequence[str], reader: str, cost: Callable[[str, str], float]) -> dict[str, str]:
    """Say to which pool each sends its part, so that all of them together reach the reader at the least cost.

    Parameters
    ----------
    senders
        Pools with a part each. One that gets others' parts merges them with its own and sends one.
    reader
        Pool in which the result is made.
    cost
        Cost of sending a part from one pool to another.

    Returns
    -------
    dict
        Next pool by sender.

    Notes
    -----
    Parts are equally large, so this is a least arborescence with the reader as its root. Of few senders all are tried;
    of many, one gathers what comes cheaper by it.
    """
    pools = [*senders, reader]
    ways: Iterable[Sequence[str]]
    if len(senders) <= _MOST_SENDERS:
        ways = itertools.product(pools, repeat=len(senders))
    else:
        hub = min(senders, key=lambda pool: sum(min(cost(a, pool), cost(a, reader)) for a in senders if a != pool))
        ways = [[hub if a != hub and cost(a, hub) < cost(a, reader) else reader for a in senders]]
    trees = [dict.fromkeys(senders, reader), *(dict(zip(senders, way, strict=True)) for way in ways)]
    valid = [tree for tree in trees if all(_reaches(tree, sender, reader) for sender in senders)]
    return min(valid, key=lambda tree: sum(cost(a, b) for a, b in tree.items()))


def _reaches(tree: Mapping[str, str], pool: str, reader: str) -> bool:
    for _ in tree:
        pool = tree[pool]
        if pool == reader:
            return True
    return False


def mean_nbytes(keys: Sequence[Key], nbytes: Mapping[Key, float]) -> float:
    """Return the mean size of values, 1 where it is not known.

    Parameters
    ----------
    keys
        Their keys; at least one.
    nbytes
        Bytes by key.
    """
    mean = sum([nbytes.get(key, 1.0) for key in keys]) / len(keys)
    return mean if 0.0 < mean < math.inf else 1.0


def _size(nbytes: Mapping[Key, float], key: Key) -> float:
    size = nbytes.get(key, 1.0)
    return size if 0.0 < size < math.inf else 1.0
