"""Regroup associative reductions so that each pool reduces its own part first, and one part per pool crosses.

Covers the trees of reductions in a graph that is ready to run: which of them merge values of several pools before the
values of one pool are merged, whether merging them by pool saves bytes, and the tasks that do. Does not cover which
functions are associative (:mod:`meshcompute.graphs.associative`) nor where tasks run
(:mod:`meshcompute.placement.placing`).

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

*Ways.* Where links differ in price, parts need not go straight to the last step: they go along the cheapest tree of
links, and a pool that others' parts come by merges them with its own.

*Numerically* a sum in another order differs by rounding, as it does between two chunkings: chunks of a pool keep their
order, and pools come in the order of their first chunks. Integers come out the same to the last bit.

*Memory.* A pool merges as many parts at once as the given tree does; the last step may read one part more per pool.

*Keys* of results stay. New keys hold a digest of what goes in, so that the same key is the same value, whatever
was computed before with other pools.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dask._task_spec import Alias, GraphNode, Task
from dask.typing import Key
from dask.utils import key_split

from meshcompute.graphs.associative import NUMPY
from meshcompute.graphs.reductionsteps import Reader, Step, first_key, merged, with_inputs, with_short_counts
from meshcompute.graphs.reductiontrees import (
    Homes,
    Tree,
    cheapest_ways,
    grown,
    mean_nbytes,
    saving_of,
    with_other_readers,
)

__all__ = ["Regrouped", "Regrouping", "regroup"]


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
class Regrouping:
    """What was done to a graph, and what is left to do when its tasks have their pools.

    Attributes
    ----------
    kinds
        Reductions that were regrouped, by kind.
    parts
        The new tasks, by key.
    shortened
        Keys of tasks whose values have become smaller than those of their kind.
    """

    kinds: tuple[Regrouped, ...] = ()
    parts: dict[Key, GraphNode] = field(default_factory=dict)
    shortened: set[Key] = field(default_factory=set)
    _roots: dict[Key, tuple[Step, list[Key], dict[Key, int]]] = field(default_factory=dict)
    _merged_by_part: dict[Key, list[Key]] = field(default_factory=dict)
    _n_readers: Counter[Key] = field(default_factory=Counter)
    # of each step that reads counts: the parts that it reads, and what makes them
    _counting: list[tuple[Key, list[tuple[Key, Key]]]] = field(default_factory=list)

    def settle(
        self,
        tasks: dict[Key, GraphNode],
        pool_by_key: dict[Key, str],
        nbytes: dict[Key, float],
        *,
        cost: Callable[[str, str], float] | None = None,
        stays: Container[Key] = (),
    ) -> None:
        """Spare the parts of the pools in which the results are made, and shorten the counts in parts that cross.

        Parameters
        ----------
        tasks
            The graph; changed in place.
        pool_by_key
            Pool by key; changed in place.
        nbytes
            Bytes by key; those of new tasks are added.
        cost
            Cost of a byte from one pool to another: parts go the cheapest way, and are merged where ways meet. None:
            all cost the same.
        stays
            Keys of values that must not leave their pools.

        Notes
        -----
        What a pool's part is made of may as well be read by the last step, if that runs there: a task fewer.
        """
        ways = (
            functools.cache(functools.partial(cheapest_ways, cost=cost)) if cost is not None and self._roots else None
        )
        n_readers = Counter([key for task in tasks.values() for key in task.dependencies] if ways is not None else ())
        for root, (step, inputs, order) in self._roots.items():
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
            if ways is not None:
                settled = self._merged_on_the_way(
                    root,
                    settled,
                    tasks,
                    pool_by_key,
                    nbytes,
                    ways=ways,
                    is_free=lambda key: n_readers[key] < 2 and key not in stays,
                )
            if settled != inputs:
                task = tasks[root]
                assert isinstance(task, Task)
                tasks[root] = with_inputs(task, step, settled, order)
        for reader, parts in self._counting:
            pool = pool_by_key.get(reader)
            for part, maker in parts:
                if pool_by_key.get(part, pool) == pool or maker in self.shortened:
                    continue
                if isinstance(task := tasks.get(maker), Task):
                    self.shortened.add(maker)
                    tasks[maker] = with_short_counts(task)

    def _merged_on_the_way(
        self,
        root: Key,
        inputs: list[Key],
        tasks: dict[Key, GraphNode],
        pool_by_key: dict[Key, str],
        nbytes: dict[Key, float],
        *,
        ways: Callable[[tuple[str, ...], str], dict[str, str]],
        is_free: Callable[[Key], bool],
    ) -> list[Key]:
        """Let parts go the cheapest way to the last step, and be merged where ways meet; say what that step reads then.

        Parts that are not free, since others read them or they must not go everywhere, go straight.
        """
        step, _, order = self._roots[root]
        reader = pool_by_key.get(root)
        straight: list[Key] = []
        sent: dict[str, list[Key]] = {}
        for key in inputs:
            homes = {pool_by_key.get(part) for part in self._merged_by_part.get(key, (key,))}
            home = homes.pop() if len(homes) == 1 else None  # where it is made of what lies there
            if home is None or home == reader or not is_free(key):
                straight.append(key)
            else:
                sent.setdefault(home, []).append(key)
        if reader is None or len(sent) < 2 or not step.reduction.has_equal_parts:
            return inputs
        next_by_pool = ways(tuple(sent), reader)

        def arriving(there: str) -> list[Key]:
            return [leaving(pool) for pool in sent if next_by_pool[pool] == there]

        def leaving(pool: str) -> Key:
            parts = [*sent[pool], *arriving(pool)]
            pool_by_key.update(dict.fromkeys(sent[pool], pool))
            if len(parts) == 1:
                return parts[0]
            name = f"{step.reduction.family}-part-{pool}-{_digest(('on the way', step.reduction.identity, parts), 16)}"
            key = name, 0
            tasks[key] = merged(step.reduction, key, parts, order)
            pool_by_key[key] = pool
            nbytes[key] = nbytes.get(parts[0], 0.0)
            if step.reduction.count_share:
                self._counting.append((root, [(key, key)]))
            return key

        return straight + arriving(reader)


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
        Whether a key must not disappear: it is asked for, or has annotations or a pin of its own.
    holds
        Whether a condition of :mod:`meshcompute.graphs.associative` is known to hold for the values of a layer, by its
        name.

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
    inner = {key for key, step in steps.items() if step.is_combine and not is_kept(key)}
    names = {alias: target for alias, target in aliases.items() if target in inner}
    homes = Homes(tasks, nbytes, pools_of)
    trees = grown(steps, inner, names)
    if not sum(map(homes.assign, trees)):
        return Regrouping()
    if others := with_other_readers(inner, names, tasks, steps, is_kept):
        inner -= others
        trees = grown(steps, inner, names)
        for tree in trees:
            homes.assign(tree)
    is_numpy = functools.partial(holds, NUMPY)
    counting = _with_counts(trees, steps, tasks, nbytes, is_known=is_known, is_numpy=is_numpy)
    chosen: list[tuple[Tree, float]] = []
    needed: set[Key] = set()
    for tree in trees:
        saving = 0.0
        if tree.pools:
            root = tree.nodes[0]
            condition = steps[root].reduction.condition
            if not condition or holds(condition, _layer_of(first_key(tasks[root]))):
                saving = saving_of(tree, nbytes)
        if saving > 0.0:
            chosen.append((tree, saving))
        else:
            needed.update(tree.nodes, tree.names)
    result = _rebuilt(tasks, nbytes, chosen, steps=steps, needed=needed)
    for key in counting:
        if key in tasks:
            inputs = result._roots[key][1] if key in result._roots else steps[key].inputs
            makers = [(part, aliases.get(part, part)) for part in inputs]  # fusion leaves an alias behind
            result._counting.append((key, [(part, maker) for part, maker in makers if not is_known(maker)]))
    return result


def _with_counts(
    trees: Iterable[Tree],
    steps: Mapping[Key, Step],
    tasks: Mapping[Key, GraphNode],
    nbytes: dict[Key, float],
    *,
    is_known: Callable[[Key], bool],
    is_numpy: Callable[[Key], bool],
) -> list[Key]:
    """Find the steps that read counts from other pools perhaps, and take the counts off the sizes of what they read."""
    found: list[Key] = []
    shortened: set[Key] = set()
    for tree in trees:
        root = tree.nodes[0]
        reduction = steps[root].reduction
        if not tree.pools or not reduction.count_share:
            continue
        found += tree.nodes
        if not is_numpy(_layer_of(first_key(tasks[root]))):  # the counts of masked arrays are any
            continue
        parts = [key for key in tree.nodes[1:] if steps[key].reduction.has_equal_counts]
        if reduction.family == "moment" and reduction.has_equal_counts:
            parts += tree.leaves  # those of a mean are short as they come
        for key in parts:
            if key in nbytes and key not in shortened and not is_known(key):
                shortened.add(key)
                nbytes[key] = reduction.sent_nbytes(nbytes[key])
    return found


def _rebuilt(
    tasks: dict[Key, GraphNode],
    nbytes: dict[Key, float],
    trees: Sequence[tuple[Tree, float]],
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
        part_nbytes = mean_nbytes(tree.nodes[1:] or tree.leaves, nbytes)
        order = {leaf: place for place, leaf in enumerate(tree.leaves)} if step.reduction.are_rows_ordered else {}
        leaves_by_pool: dict[str, list[Key]] = {}
        for leaf, pool in zip(tree.leaves, tree.pools, strict=True):
            leaves_by_pool.setdefault(pool, []).append(leaf)
        inputs: list[Key] = []
        for pool, leaves in leaves_by_pool.items():
            if len(leaves) == 1:
                inputs += leaves
                continue
            whole = _name_of_parts(names, step.reduction.family, pool, leaves[0])
            identity = (step.reduction.identity, most, [order[leaf] for leaf in leaves] if order else None, *leaves)
            parts = _parts(f"sub{whole}", whole, identity, leaves, most)
            for key, batch in parts.items():
                tasks[key] = result.parts[key] = merged(step.reduction, key, batch, order)
                nbytes[key] = part_nbytes
            top, batch = parts.popitem()
            result._merged_by_part[top] = batch
            inputs.append(top)
        gone.update(tree.nodes[1:], tree.names)
        task = tasks[root]
        assert isinstance(task, Task)
        tasks[root] = with_inputs(task, step, inputs, order)
        result._roots[root] = step, inputs, order
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


def _parts(name: str, whole: str, identity: tuple[Any, ...], leaves: Sequence[Key], most: int) -> dict[Key, list[Key]]:
    """Say which parts to merge: keys of what is merged by key of the merged part, the last one made of all.

    That has a name of its own: it crosses, so that it may be smaller than the others.
    """
    digest = _digest(identity, 8)
    parts: dict[Key, list[Key]] = {}
    keys = list(leaves)
    while len(keys) > 1:
        batches = [keys[i : i + most] for i in range(0, len(keys), most)]
        keys = []
        for batch in batches:
            if len(batch) > 1:
                parts[key := (name if len(batches) > 1 else whole, digest, len(parts))] = batch
                keys.append(key)
            else:
                keys += batch
    return parts


def _digest(content: object, nbytes: int) -> str:
    return hashlib.blake2b(repr(content).encode(), digest_size=nbytes).hexdigest()
