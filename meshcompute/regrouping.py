"""Regroup associative reductions so that each pool reduces its own part first, and one part per pool crosses.

Covers the trees of reductions in a graph that is ready to run: which of them merge values of several pools before the
values of one pool are merged, whether merging them by pool saves bytes, and the tasks that do. Does not cover which
functions are associative (:mod:`meshcompute.associative`) nor where tasks run (:mod:`meshcompute.placement`).

A mean of chunks that alternate between two sites, as Dask gives it and regrouped::

    a  b  a  b    a  b  a  b                a  a  a  a      b  b  b  b
     \\ \\  / /      \\ \\  / /                 \\ \\  / /        \\ \\  / /
      part           part                    part a          part b
          \\         /                            \\           /
            result                                  result
    up to four chunks cross                 one part crosses

Notes
-----
*Never worse.* With parts of one size, what leaves a pool in a plan of the given tree is a part, or every chunk of that
pool by itself; the regrouped tree sends the smaller of the two. A tree is changed only if that is less.

*Numerically* a sum in another order differs by rounding, as it does between two chunkings: chunks of a pool keep their
order, and pools come in the order of their first chunks. Integers come out the same to the last bit.

*Memory.* A pool merges as many parts at once as the given tree does; the last step may read one part more per pool.

*Keys* of results stay. New keys hold a digest of what goes in, so that the same key is the same value, whatever
was computed before with other pools.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dask._task_spec import Alias, GraphNode, Task
from dask.typing import Key
from dask.utils import key_split

from meshcompute.associative import Reduction
from meshcompute.reductionsteps import Reader, Step, first_key, merged, with_inputs

__all__ = ["Regrouped", "Regrouping", "regroup"]

_LEAST_SAVING = 1e-6  # of what crosses: less is a rounding error of the comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class Regrouped:
    """Reductions of one kind that were regrouped.

    Attributes
    ----------
    name
        Kind of the task that makes the result, as the dashboard names it.
    count
        How many trees.
    nbytes_saved
        Predicted bytes that do not cross because of it, all trees together.
    """

    name: str
    count: int
    nbytes_saved: float


@dataclass(slots=True, kw_only=True, eq=False)
class _Tree:
    """One reduction: its last step, the combines below it, and the values that it reduces."""

    root: Key
    step: Step
    combines: list[Key]  # each after the one that reads it
    leaves: list[Key]  # in the order in which they are read
    pools: list[str] = field(default_factory=list)  # one for each leaf


@dataclass(slots=True, kw_only=True, eq=False)
class Regrouping:
    """What was done to a graph, and what is left to do when its tasks have their pools.

    Attributes
    ----------
    kinds
        Reductions that were regrouped, by kind.
    """

    kinds: tuple[Regrouped, ...] = ()
    _roots: dict[Key, tuple[Step, list[Key]]] = field(default_factory=dict)
    _merged_by_part: dict[Key, list[Key]] = field(default_factory=dict)
    _n_readers: Counter[Key] = field(default_factory=Counter)

    def settle(self, tasks: dict[Key, GraphNode], pool_by_key: dict[Key, str]) -> None:
        """Spare the parts of the pools in which the results are made.

        Parameters
        ----------
        tasks
            The graph; changed in place.
        pool_by_key
            Pool by key; changed in place.

        Notes
        -----
        What a pool's part is made of may as well be read by the last step, if that runs there: a task fewer.
        """
        for root, (step, inputs) in self._roots.items():
            pool = pool_by_key.get(root)
            settled: list[Key] = []
            for key in inputs:
                merged = self._merged_by_part.get(key)
                if merged is None or pool_by_key.get(key) != pool or self._n_readers[key] > 1:
                    settled.append(key)
                    continue
                settled += merged
                del tasks[key]
                pool_by_key.pop(key, None)
            if len(settled) > len(inputs):
                task = tasks[root]
                assert isinstance(task, Task)
                tasks[root] = with_inputs(task, step, settled)


def regroup(
    tasks: dict[Key, GraphNode],
    nbytes: dict[Key, float],
    *,
    pools_of: Callable[[Key], tuple[str, ...] | None],
    is_known: Callable[[Key], bool],
    is_kept: Callable[[Key], bool],
    holds: Callable[[str, Key], bool],
) -> Regrouping:
    """Regroup the reductions of a graph by pool, where that saves bytes.

    Parameters
    ----------
    tasks
        Tasks as they will run; changed in place.
    nbytes
        Bytes by key; those of new tasks are added.
    pools_of
        Pools that a key is tied to, None if to none.
    is_known
        Whether the cluster knows a task already: its inputs stay what they are.
    is_kept
        Whether a key must not disappear: it is asked for, or has annotations.
    holds
        Whether a condition of :mod:`meshcompute.associative` is known to hold for the values of a layer, by its name.

    Returns
    -------
    Regrouping
        What was done.
    """
    reader = Reader()
    steps: dict[Key, Step] = {}
    aliases: dict[Key, Key] = {}
    for key, task in tasks.items():
        if type(task) is Alias:
            aliases[key] = task.target
        elif (step := reader.step(task)) is not None and not is_known(key):
            steps[key] = step
    if not steps:
        return Regrouping()
    inner = {key for key, step in steps.items() if step.is_combine and not is_kept(key) and pools_of(key) is None}
    _drop_those_with_other_readers(inner, tasks, steps, aliases, is_kept)
    homes = _Homes(tasks, nbytes, pools_of)
    trees: list[tuple[_Tree, float]] = []
    needed: set[Key] = set()
    for root, step in steps.items():
        if root in inner:
            continue
        tree = _grown(root, steps, aliases, inner)
        is_split = homes.assign(tree)
        if is_split and step.reduction.condition:
            is_split = holds(step.reduction.condition, _layer_of(first_key(tasks[root])))
        if is_split and (saving := _saving(tree, steps, aliases, inner, nbytes)) > 0.0:
            trees.append((tree, saving))
        else:
            needed.update(tree.combines)
    return _rebuilt(tasks, nbytes, trees, steps=steps, needed=needed)


def _drop_those_with_other_readers(
    inner: set[Key],
    tasks: Mapping[Key, GraphNode],
    steps: Mapping[Key, Step],
    aliases: Mapping[Key, Key],
    is_kept: Callable[[Key], bool],
) -> None:
    """Leave only those combines that nothing but steps of the same reductions read."""
    named = {alias: target for alias, target in aliases.items() if target in inner}
    inner.difference_update([target for alias, target in named.items() if is_kept(alias)])
    if not inner:
        return
    watched = inner | named.keys()
    for key, task in tasks.items():
        if watched.isdisjoint(task.dependencies):
            continue
        step = steps.get(key)
        for dep in task.dependencies & watched:
            target = named.get(dep, dep)
            if step is None:
                if key not in named:
                    inner.discard(target)
            elif step.reduction.identity != steps[target].reduction.identity:
                inner.discard(target)


def _grown(root: Key, steps: Mapping[Key, Step], aliases: Mapping[Key, Key], inner: Container[Key]) -> _Tree:
    """Collect the combines and leaves of a tree."""
    step = steps[root]
    combines, leaves = [], []
    stack = list(reversed(step.inputs))
    while stack:
        key = stack.pop()
        target = aliases.get(key, key)
        if target in inner:
            combines.append(target)
            if target is not key:
                combines.append(key)
            stack += reversed(steps[target].inputs)
        else:
            leaves.append(key)
    return _Tree(root=root, step=step, combines=combines, leaves=leaves)


class _Homes:
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
        found, tasks = self._found, self._tasks
        if (known := found.get(key)) is not None:
            return known
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

    def assign(self, tree: _Tree) -> bool:
        """Give each leaf of a tree a pool.

        Returns
        -------
        bool
            Whether there are several.
        """
        choices = [self.of(leaf) for leaf in tree.leaves]
        if len(set(choices)) == 1 and len(choices[0]) < 2:
            return False
        count = Counter([pools[0] for pools in choices if len(pools) == 1])
        ranked = sorted(count, key=lambda pool: (-count[pool], pool))
        rank = {pool: i for i, pool in enumerate(ranked)}
        for pools in choices:
            for pool in pools:
                rank.setdefault(pool, len(rank))
        best = min(rank, key=rank.__getitem__, default="")
        tree.pools = [min(pools, key=rank.__getitem__) if pools else best for pools in choices]
        return len(set(tree.pools)) > 1


def _saving(
    tree: _Tree,
    steps: Mapping[Key, Step],
    aliases: Mapping[Key, Key],
    inner: Container[Key],
    nbytes: Mapping[Key, float],
) -> float:
    """Return how many bytes fewer cross if a tree is regrouped, wherever its result is wanted.

    Notes
    -----
    By dynamic programming over the given tree (Sankoff 1975): its least cost with a combine in this pool or that.
    """
    pools = sorted(set(tree.pools))
    number = {pool: i for i, pool in enumerate(pools)}
    pool_of_leaf = dict(zip(tree.leaves, tree.pools, strict=True))
    part = _part_nbytes(tree, nbytes)
    costs: dict[Key, list[float]] = {}
    for key in (*reversed(tree.combines), tree.root):
        if key in aliases:
            continue
        total = [0.0] * len(pools)
        everywhere = 0.0
        for child in steps[key].inputs:
            target = aliases.get(child, child)
            if target in inner:
                below = costs[target]
                least = min(below) + part
                total = [sofar + min(cost, least) for sofar, cost in zip(total, below, strict=True)]
            else:
                size = _size(nbytes, child)
                everywhere += size
                total[number[pool_of_leaf[child]]] -= size
        costs[key] = [cost + everywhere for cost in total]
    given = costs[tree.root]
    sent = [0.0] * len(pools)
    for leaf, pool in pool_of_leaf.items():
        sent[number[pool]] += _size(nbytes, leaf)
    sent = [min(size, part) for size in sent]
    regrouped = [sum(sent) - size for size in sent]
    result = _size(nbytes, tree.root)  # it may be made elsewhere than it is wanted
    saving = max(
        min(a, min(given) + result) - min(b, min(regrouped) + result) for a, b in zip(given, regrouped, strict=True)
    )
    return saving if saving > _LEAST_SAVING * max(given) else 0.0


def _part_nbytes(tree: _Tree, nbytes: Mapping[Key, float]) -> float:
    """Return the size of a merged part of a tree: that of its combines, else that of its leaves."""
    known = [_size(nbytes, key) for key in (tree.combines or tree.leaves)]
    return sum(known) / len(known)


def _size(nbytes: Mapping[Key, float], key: Key) -> float:
    size = nbytes.get(key, 1.0)
    return size if 0.0 < size < math.inf else 1.0


def _rebuilt(
    tasks: dict[Key, GraphNode],
    nbytes: dict[Key, float],
    trees: Sequence[tuple[_Tree, float]],
    *,
    steps: Mapping[Key, Step],
    needed: Container[Key],
) -> Regrouping:
    """Put the regrouped trees into the graph."""
    result = Regrouping()
    saved: dict[str, list[float]] = {}
    names: dict[tuple[str, str, Key], str] = {}
    gone: set[Key] = set()
    for tree, saving in trees:
        root, step = tree.root, tree.step
        most = max(2, len(step.inputs), *[len(steps[key].inputs) for key in tree.combines if key in steps])
        part_nbytes = _part_nbytes(tree, nbytes)
        leaves_by_pool: dict[str, list[Key]] = {}
        for leaf, pool in zip(tree.leaves, tree.pools, strict=True):
            leaves_by_pool.setdefault(pool, []).append(leaf)
        inputs: list[Key] = []
        for pool, leaves in leaves_by_pool.items():
            if len(leaves) == 1:
                inputs += leaves
                continue
            name = _name_of_parts(names, step.reduction.family, pool, leaves[0])
            parts = _parts(name, step.reduction, leaves, most)
            for key, batch in parts.items():
                tasks[key] = merged(step.reduction, key, batch)
                nbytes[key] = part_nbytes
            top, batch = parts.popitem()
            result._merged_by_part[top] = batch
            inputs.append(top)
        gone.update([key for key in tree.combines if key not in needed])
        task = tasks[root]
        assert isinstance(task, Task)
        tasks[root] = with_inputs(task, step, inputs)
        result._roots[root] = step, inputs
        result._n_readers.update(inputs)
        saved.setdefault(str(key_split(root)), []).append(saving)
    for key in gone:
        tasks.pop(key, None)
    result.kinds = tuple(
        Regrouped(name=name, count=len(sizes), nbytes_saved=sum(sizes)) for name, sizes in sorted(saved.items())
    )
    return result


def _layer_of(key: Key) -> Key:
    return key[0] if isinstance(key, tuple) else key


def _name_of_parts(names: dict[tuple[str, str, Key], str], family: str, pool: str, leaf: Key) -> str:
    """Return the name that the parts of one pool share in all trees of one layer: distributed groups tasks by it."""
    layer = _layer_of(leaf)
    if (name := names.get((family, pool, layer))) is None:
        name = names[family, pool, layer] = f"{family}-part-{pool}-{_digest((family, pool, layer), 16)}"
    return name


def _parts(name: str, reduction: Reduction, leaves: Sequence[Key], most: int) -> dict[Key, list[Key]]:
    """Say which parts to merge: keys of what is merged by key of the merged part, the last one made of all."""
    digest = _digest((reduction.identity, most, *leaves), 8)
    parts: dict[Key, list[Key]] = {}
    keys = list(leaves)
    while len(keys) > 1:
        batches = [keys[i : i + most] for i in range(0, len(keys), most)]
        keys = []
        for batch in batches:
            if len(batch) > 1:
                parts[key := (name, digest, len(parts))] = batch
                keys.append(key)
            else:
                keys += batch
    return parts


def _digest(content: object, nbytes: int) -> str:
    return hashlib.blake2b(repr(content).encode(), digest_size=nbytes).hexdigest()
