"""The plan, before anything runs: which pool does what, and what will cross between pools.

Covers :func:`explain` and the :class:`Plan` it returns, with how sure its sizes are, and the questions about the pins
of a collection, :func:`get_pool` and :func:`propagate_pools_in_collection`. Does not cover pictures
(:mod:`meshcompute.plots`) or what was measured in a run (:mod:`meshcompute.traffic`).
"""

from __future__ import annotations

import functools
import html
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from dask._expr import FinalizeCompute
from dask._task_spec import Alias
from dask.base import collections_to_expr, is_dask_collection
from dask.core import flatten
from dask.highlevelgraph import HighLevelGraph
from dask.typing import Key
from dask.utils import format_bytes
from distributed.client import _get_global_client

from meshcompute import planning
from meshcompute.clients import links_wanted
from meshcompute.comparing import Comparison
from meshcompute.errors import NotACollectionError
from meshcompute.graphs import pinnedtasks, taskgraph
from meshcompute.graphs.learning import Sure, group_of
from meshcompute.packing import AUTO, OFF, mode_of
from meshcompute.pools import Pin, activate, current_pin, pin_of_annotations
from meshcompute.scheduler.live import ClientView, EmptyView, View, answer_view
from meshcompute.settings import setting
from meshcompute.shipping import by_value

__all__ = ["CLIENT", "Crossing", "Plan", "explain", "get_pool", "propagate_pools_in_collection"]

#: Name of the client's side in traffic.
CLIENT = "client"
_SHOWN_CROSSINGS = 10
# What blockwise fusion appends to a layer's name (dask.blockwise._unique_dep): block indices such as "_.0_.1".
_BLOCK_INDICES = re.compile(r"(_\.\d+)+$")

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """Values of one kind that cross from one pool to another.

    Attributes
    ----------
    name
        Kind of the task that makes them, as the dashboard names it.
    reader
        Kind of the task that reads them.
    source, destination
        The pools; the destination may be ``"client"``.
    nbytes
        Predicted bytes, all values together.
    count
        How many values.
    """

    name: str
    reader: str
    source: str
    destination: str
    nbytes: float
    count: int


class Plan:
    """What would run where, and what would cross.

    Parameters
    ----------
    assignment
        The plan in the terms of Dask.
    compression
        Setting ``meshcompute.compression``.

    Attributes
    ----------
    tasks_by_pool : dict of str to int
        Number of tasks. Tasks that may run anywhere are not in it.
    bytes_by_pool : dict of str to int
        Predicted bytes that the tasks of a pool make.
    bytes_between_pools : dict of (str, str) to int
        Predicted bytes from a source to a destination pool, or to ``"client"``. A value counts once per
        destination, with its size in memory: packed, fewer bytes cross, how many nobody knows before the run.
    seconds_between_pools : dict of (str, str) to float
        Predicted seconds that this takes across the link, one value after the other, for the links whose bandwidth is
        given or was measured.
    money_between_pools : dict of (str, str) to float
        Predicted price, for the links that have one.
    bytes_by_certainty : dict of str to int
        Predicted bytes that cross, by how sure their sizes are: ``"measured"`` (the values are in memory),
        ``"from metadata"`` (chunks and dtypes, literals, rows that files count), ``"learnt"`` (from earlier runs on
        this scheduler), ``"guessed"``.
    compression : str
        What happens to values between sites: ``"auto"``, ``"off"`` or a codec.
    crossings : tuple of Crossing
        What crosses, largest first.
    n_tasks : int
        Number of all tasks.
    """

    def __init__(self, assignment: planning.Assignment, compression: str = OFF) -> None:
        self._assignment = assignment
        self.compression = compression
        tasks, pools = assignment.tasks, assignment.pool_by_key
        self.n_tasks = len(tasks)
        self.tasks_by_pool: dict[str, int] = dict(sorted(Counter(pools[k] for k in tasks if k in pools).items()))
        produced: Counter[str] = Counter()
        for key in tasks:
            if key in pools and key not in assignment.relays:
                produced[pools[key]] += int(self._nbytes(key))
        self.bytes_by_pool: dict[str, int] = dict(sorted(produced.items()))
        between: Counter[tuple[str, str]] = Counter()
        certainty: Counter[str] = Counter()
        kinds: dict[tuple[str, str, str, str], list[float]] = defaultdict(list)
        for key, reader, source, destination in self._crossings():
            nbytes = self._nbytes(key)
            between[source, destination] += int(nbytes)
            certainty[self.certainty_of(key)] += int(nbytes)
            kinds[taskgraph.name_of(key), reader, source, destination].append(nbytes)
        self.bytes_between_pools: dict[tuple[str, str], int] = dict(sorted(between.items()))
        self.bytes_by_certainty: dict[str, int] = {sure: certainty[sure] for sure in Sure.ALL if sure in certainty}
        self.crossings = tuple(
            sorted(
                (
                    Crossing(name=n, reader=r, source=s, destination=d, nbytes=sum(sizes), count=len(sizes))
                    for (n, r, s, d), sizes in kinds.items()
                ),
                key=lambda c: (-c.nbytes, c.name),
            )
        )
        self._weigh_links()

    def _nbytes(self, key: Key) -> float:
        return self._assignment.nbytes_by_key.get(key, 0.0)

    def _weigh_links(self) -> None:
        links = self._assignment.links
        counts: Counter[tuple[str, str]] = Counter()
        for crossing in self.crossings:
            counts[crossing.source, crossing.destination] += crossing.count
        self.seconds_between_pools: dict[tuple[str, str], float] = {
            pair: links.seconds(*pair, nbytes, counts[pair])
            for pair, nbytes in self.bytes_between_pools.items()
            if links.is_known(*pair)
        }
        self.money_between_pools: dict[tuple[str, str], float] = {
            pair: cost
            for pair, nbytes in self.bytes_between_pools.items()
            if (cost := links.cost(*pair, nbytes)) is not None
        }

    def certainty_of(self, key: Key) -> str:
        """Tell how sure the size of a value is; the words are those of ``bytes_by_certainty``.

        Parameters
        ----------
        key
            Key of a task of the plan.
        """
        assignment = self._assignment
        key = assignment.relays.get(key, key)
        while key not in assignment.measured and isinstance(task := assignment.tasks.get(key), Alias):
            key = task.target
        if key in assignment.measured:
            return Sure.MEASURED
        if group_of(key) in assignment.learnt:
            return Sure.LEARNT
        return Sure.GUESSED if key in assignment.guessed else Sure.EXACT

    def against(self, traffic: Any) -> Comparison:
        """Put what was predicted beside what was measured.

        Parameters
        ----------
        traffic
            Of the run that this plan was made for: what :func:`meshcompute.measure_traffic` gives, or bytes by
            (source, destination).

        Returns
        -------
        Comparison
            A table when printed.

        Notes
        -----
        Data that the client itself sends, as arguments in tasks or by ``scatter``, is measured and not predicted.
        """
        measured = getattr(traffic, "bytes_between_pools", traffic)
        return Comparison(self.bytes_between_pools, measured)

    def _crossings(self) -> Iterator[tuple[Key, str, str, str]]:
        assignment = self._assignment
        pools = assignment.pool_by_key
        seen: set[tuple[Key, str]] = set()
        for key, task in assignment.tasks.items():
            pool = pools.get(key)
            if pool is None:
                continue
            for dep in task.dependencies:
                source = pools.get(dep)
                if source is None or source == pool or (dep, pool) in seen:
                    continue
                seen.add((dep, pool))
                reader = assignment.relays.get(key)
                name = taskgraph.name_of(key) if reader is None else f"several tasks (relayed in {pool})"
                yield dep, name, source, pool
        for key in assignment.keys:
            if key in pools:
                yield key, "the result", pools[key], CLIENT

    def pool_of(self, key: Key) -> str | None:
        """Tell which pool a task would run in.

        Parameters
        ----------
        key
            Key of a task, also of one that was fused into another.

        Returns
        -------
        str or None
            The pool, None if the task may run anywhere.

        Raises
        ------
        KeyError
            The plan has no such task.
        """
        if key in self._assignment.tasks or key in self._assignment.pool_by_key:
            return self._assignment.pool_by_key.get(key)
        layer, index = _layer_name(key), key[1:] if isinstance(key, tuple) else ()
        found: set[str | None] = set()
        for fused, task in self._assignment.tasks.items():
            inner = pinnedtasks.inner_keys(task)
            if key in inner:
                return self._assignment.pool_by_key.get(fused)
            # Blockwise fusion leaves names without an index: the reader's own index tells, or all agree.
            if any(_layer_name(name) == layer for name in inner):
                pool = self._assignment.pool_by_key.get(fused)
                if isinstance(fused, tuple) and fused[1:] == index:
                    return pool
                found.add(pool)
        if len(found) == 1:
            return found.pop()
        raise KeyError(f"No task {key!r} in this plan, or it became a part of several")

    def pools_by_layer(self) -> dict[str, frozenset[str]]:
        """Tell which pools the tasks of each layer would run in.

        Returns
        -------
        dict
            Pools by name of the layer (first part of its keys). A layer none of whose tasks has a pool has an
            empty set.
        """
        pools: dict[str, set[str]] = defaultdict(set)
        for key, task in self._assignment.tasks.items():
            pool = self._assignment.pool_by_key.get(key)
            for name in {_layer_name(key), *map(_layer_name, pinnedtasks.inner_keys(task))}:
                pools[name] |= {pool} if pool is not None else set()
        return {name: frozenset(found) for name, found in pools.items()}

    def __str__(self) -> str:
        if not self.tasks_by_pool:
            return (
                f"Plan: {self.n_tasks} tasks, none of them tied to a pool. "
                'Open data inside "with pool(...)" to say where it is.'
            )
        lines = [f"Plan: {self.n_tasks} tasks", "", f"{'pool':<24}{'tasks':>10}{'makes':>14}"]
        lines += [
            f"{name:<24}{n:>10}{format_bytes(self.bytes_by_pool.get(name, 0)):>14}"
            for name, n in self.tasks_by_pool.items()
        ]
        free = self.n_tasks - sum(self.tasks_by_pool.values())
        if free:
            lines.append(f"{'(anywhere)':<24}{free:>10}")
        lines += ["", f"{'from -> to':<34}{'predicted':>14}{''.join(f'{head:>12}' for head in self._link_heads())}"]
        for a, b, nbytes, *weights in self._link_rows():
            lines.append(f"{f'{a} -> {b}':<34}{nbytes:>14}{''.join(f'{weight:>12}' for weight in weights)}")
        if not self.bytes_between_pools:
            lines.append("nothing crosses between pools")
        elif self.compression != OFF:
            lines.append(_packing_note(self.compression))
        if regrouped := self._assignment.regrouped:
            saved = format_bytes(int(sum(kind.nbytes_saved for kind in regrouped)))
            lines.append(f"{sum(kind.count for kind in regrouped)} reductions regrouped by pool: {saved} less cross")
        if self.bytes_by_certainty:
            lines.append(self._certainty_note())
        if self.crossings:
            lines += ["", "largest crossings"]
            lines += [
                f"  {format_bytes(int(c.nbytes)):>10}  {c.source} -> {c.destination}"
                f"  {c.count} x {c.name}, for {c.reader}"
                for c in self.crossings[:_SHOWN_CROSSINGS]
            ]
            if len(self.crossings) > _SHOWN_CROSSINGS:
                lines.append(f"  ... and {len(self.crossings) - _SHOWN_CROSSINGS} more kinds")
        return "\n".join(lines)

    __repr__ = __str__

    def _link_heads(self) -> list[str]:
        return ["seconds"] * bool(self.seconds_between_pools) + ["money"] * bool(self.money_between_pools)

    def _link_rows(self) -> Iterator[tuple[str, ...]]:
        for pair, nbytes in self.bytes_between_pools.items():
            seconds, money = self.seconds_between_pools.get(pair), self.money_between_pools.get(pair)
            weights = []
            if self.seconds_between_pools:
                weights.append("" if seconds is None else f"{seconds:.3g}")
            if self.money_between_pools:
                weights.append("" if money is None else f"{money:.3g}")
            yield (*pair, format_bytes(nbytes), *weights)

    def _certainty_note(self) -> str:
        return "sizes: " + ", ".join(f"{format_bytes(n)} {sure}" for sure, n in self.bytes_by_certainty.items())

    def _repr_html_(self) -> str:
        def table(head: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
            cells = "".join(f"<th>{html.escape(h)}</th>" for h in head)
            body = "".join(
                "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
            )
            return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"

        tasks = table(
            ("pool", "tasks", "makes"),
            ((p, n, format_bytes(self.bytes_by_pool.get(p, 0))) for p, n in self.tasks_by_pool.items()),
        )
        between = table(("from", "to", "predicted", *self._link_heads()), self._link_rows())
        crossings = table(
            ("predicted", "from", "to", "values", "read by"),
            (
                (format_bytes(int(c.nbytes)), c.source, c.destination, f"{c.count} x {c.name}", c.reader)
                for c in self.crossings[:_SHOWN_CROSSINGS]
            ),
        )
        is_packed = self.compression != OFF and self.bytes_between_pools
        note = f"<p>{_packing_note(self.compression)}</p>" if is_packed else ""
        note += f"<p>{self._certainty_note()}</p>" if self.bytes_by_certainty else ""
        return f"<div><b>Plan: {self.n_tasks} tasks</b>{tasks}{between}{note}{crossings}</div>"


def _packing_note(compression: str) -> str:
    how = "zstd or lz4, where that is sooner across" if compression == AUTO else compression
    return f"at most: values that cross are packed ({how})"


def _layer_name(key: Key) -> str:
    name = str(key[0] if isinstance(key, tuple) else key)
    return _BLOCK_INDICES.sub("", name)


def explain(*collections: Any) -> Plan:
    """Say what would run where, and what would cross between pools, without running anything.

    Parameters
    ----------
    *collections
        Dask collections, or containers of ours and xarray's that hold them; as for ``dask.compute``.

    Returns
    -------
    Plan
        The plan as ``propagate_pools()`` would make it now. With a client that is not asynchronous, values in
        memory count with their place and size.

    Raises
    ------
    NotACollectionError
        An argument is not a Dask collection.
    SovereigntyError
        A value that must not leave its pools is wanted elsewhere, the client included.
    """
    for collection in collections:
        if not is_dask_collection(collection):
            raise NotACollectionError("explain", type(collection).__name__)
    if not collections:
        raise NotACollectionError("explain", "nothing")
    activate()
    expr = FinalizeCompute(collections_to_expr(collections)).optimize()
    assignment = _assign(expr, tuple(flatten(expr.__dask_keys__())), is_gathered=True)
    return Plan(assignment, compression=mode_of(setting("compression")))


def _assign(expr: Any, keys: tuple[Key, ...], *, is_gathered: bool) -> planning.Assignment:
    request = planning.Request(
        keys=keys,
        pin=current_pin(),
        is_propagating=True,
        is_regrouping=bool(setting("regroup-reductions")),
        **links_wanted(),
        is_gathered=is_gathered,
    )
    return planning.assign(expr, request, _view())


def _view() -> View:
    client = _get_global_client()
    if client is None or client.asynchronous or client.status != "running":
        return EmptyView()
    ask = functools.partial(client.run_on_scheduler, by_value(answer_view))
    return ClientView(ask, list(client.futures))


def get_pool(collection: Any) -> str | tuple[str, ...] | None:
    """Tell which pool a collection was pinned to.

    Parameters
    ----------
    collection
        A Dask collection.

    Returns
    -------
    str, tuple of str or None
        The pool; several names if it has replicas; None if this collection itself has no pin (what it is made
        from may have).

    Raises
    ------
    NotACollectionError
        It is not a Dask collection.
    """
    if not is_dask_collection(collection):
        raise NotACollectionError("get_pool", type(collection).__name__)
    pins = {pin.pools for pin in _pins_of(collection) if pin.pools}
    names = set.intersection(*map(set, pins)) if pins else set()
    if not names:
        return None
    return next(iter(names)) if len(names) == 1 else tuple(sorted(names))


def _pins_of(collection: Any) -> list[Pin]:
    expr = getattr(collection, "expr", None)
    if (pin := getattr(expr, "pin", None)) is not None:  # a dataframe pinned as a whole
        return [pin]
    graph = collection.__dask_graph__()
    keys = list(flatten([collection.__dask_keys__()]))
    if isinstance(graph, HighLevelGraph):
        names = {_layer_name(key) for key in keys}
        layers = [graph.layers[name] for name in names if name in graph.layers]
        pins = [pin for layer in layers if (pin := pin_of_annotations(layer.annotations)) is not None]
        if pins:
            return pins
    tasks: Mapping[Key, Any] = dict(graph)
    _, found = pinnedtasks.extract_pins(taskgraph.as_tasks({key: tasks[key] for key in keys if key in tasks}))
    return list(found.values())


def propagate_pools_in_collection(collection: T) -> T:
    """Place all tasks of a collection now.

    Parameters
    ----------
    collection
        A Dask collection.

    Returns
    -------
    collection
        An equal collection every task of which is pinned to the pool that ``propagate_pools()`` would give it.

    Raises
    ------
    NotACollectionError
        It is not a Dask collection.
    """
    if not is_dask_collection(collection):
        raise NotACollectionError("propagate_pools_in_collection", type(collection).__name__)
    activate()
    expr = collections_to_expr(collection).optimize()
    assignment = _assign(expr, tuple(flatten(expr.__dask_keys__())), is_gathered=False)
    tasks = {
        key: pinnedtasks.pinned(task, Pin((pool,))) if (pool := assignment.pool_by_key.get(key)) else task
        for key, task in assignment.tasks.items()
    }
    rebuild, args = collection.__dask_postpersist__()  # type: ignore[attr-defined]
    rebuilt: T = rebuild(tasks, *args)
    return rebuilt
