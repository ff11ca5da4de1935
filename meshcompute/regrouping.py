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

_SHORT = 4  # a chain of so many tasks is walked again sooner than looked up
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

    nodes: list[Key]  # the last step, then the combines, each after the one that reads it
    parents: list[int]  # for each node, the index of the one that reads it; -1 for the last step
    leaves: list[Key]  # in the order in which they are read
    readers: list[int]  # for each leaf, the index of the node that reads it
    names: list[Key]  # aliases of nodes
    pools: list[str] = field(default_factory=list)  # for each leaf


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
    names = {alias: target for alias, target in aliases.items() if target in inner}
    homes = _Homes(tasks, nbytes, pools_of)
    trees = _grown(steps, inner, names)
    if not sum(map(homes.assign, trees)):
        return Regrouping()
    if others := _with_other_readers(inner, names, tasks, steps, is_kept):
        inner -= others
        trees = _grown(steps, inner, names)
        for tree in trees:
            homes.assign(tree)
    chosen: list[tuple[_Tree, float]] = []
    needed: set[Key] = set()
    for tree in trees:
        saving = 0.0
        if tree.pools:
            root = tree.nodes[0]
            condition = steps[root].reduction.condition
            if not condition or holds(condition, _layer_of(first_key(tasks[root]))):
                saving = _saving(tree, nbytes)
        if saving > 0.0:
            chosen.append((tree, saving))
        else:
            needed.update(tree.nodes, tree.names)
    return _rebuilt(tasks, nbytes, chosen, steps=steps, needed=needed)


def _with_other_readers(
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


def _grown(steps: Mapping[Key, Step], inner: set[Key], names: Mapping[Key, Key]) -> list[_Tree]:
    """Collect the trees of a graph."""
    target_of = {**{key: key for key in inner}, **{alias: key for alias, key in names.items() if key in inner}}
    below: set[Key] = set()
    trees = [_grown_from(root, steps, target_of, below) for root in steps if root not in inner]
    # Combines that no step reads: what a user did with keepdims=True looks like one.
    trees += [_grown_from(root, steps, target_of, below) for root in steps if root in inner and root not in below]
    return [tree for tree in trees if tree.nodes[0] not in below]


def _grown_from(root: Key, steps: Mapping[Key, Step], target_of: Mapping[Key, Key], below: set[Key]) -> _Tree:
    tree = _Tree(nodes=[root], parents=[-1], leaves=[], readers=[], names=[])
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

    def assign(self, tree: _Tree) -> bool:
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


def _saving(tree: _Tree, nbytes: Mapping[Key, float]) -> float:
    """Return how many bytes fewer cross if a tree is regrouped, wherever its result is wanted.

    Notes
    -----
    By dynamic programming over the given tree (Sankoff 1975): its least cost with a combine in this pool or that.
    """
    number = {pool: i for i, pool in enumerate(sorted(set(tree.pools)))}
    leaf_nbytes = _mean_nbytes(tree.leaves, nbytes)
    part_nbytes = _mean_nbytes(tree.nodes[1:] or tree.leaves, nbytes)
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
    result = _mean_nbytes(tree.nodes[:1], nbytes)  # it may be made elsewhere than it is wanted
    saving = max(
        min(a, min(given) + result) - min(b, min(regrouped) + result) for a, b in zip(given, regrouped, strict=True)
    )
    return saving if saving > _LEAST_SAVING * max(given) else 0.0


def _mean_nbytes(keys: Sequence[Key], nbytes: Mapping[Key, float]) -> float:
    mean = sum([nbytes.get(key, 1.0) for key in keys]) / len(keys)
    return mean if 0.0 < mean < math.inf else 1.0


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
        root = tree.nodes[0]
        step = steps[root]
        most = max(2, *[len(steps[key].inputs) for key in tree.nodes])
        part_nbytes = _mean_nbytes(tree.nodes[1:] or tree.leaves, nbytes)
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
        gone.update(tree.nodes[1:], tree.names)
        task = tasks[root]
        assert isinstance(task, Task)
        tasks[root] = with_inputs(task, step, inputs)
        result._roots[root] = step, inputs
        result._n_readers.update(inputs)
        saved.setdefault(str(key_split(root)), []).append(saving)
    for key in gone:
        if key not in needed:
            del tasks[key]
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
