"""From an expression to a plan: a pool for every task, before anything runs.

Covers the composition: materialise the user's expression, take the pins off its tasks, estimate sizes, look up
what is in memory already, place, add relays, and write the result as annotations that the scheduler obeys.
:class:`PlannedExpression` is what a client sends in place of the user's expression: Dask evaluates it in the
thread that it keeps for graphs, so that planning never holds the scheduler's event loop.
Does not cover the decision itself (:mod:`meshcompute.placement.placing`) or what happens at run time
(:mod:`meshcompute.scheduler.guard`).
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dask._task_spec import Alias, GraphNode
from dask.typing import Key

from meshcompute.collecting import ask_uncollected, uncollected
from meshcompute.errors import UnsupportedPinError
from meshcompute.graphs import learning, taskgraph
from meshcompute.graphs.numbering import Index, dependencies_of, ordered
from meshcompute.graphs.pinnedtasks import extract_pins
from meshcompute.graphs.regrouping import Regrouped, Regrouping, regroup
from meshcompute.graphs.sizes import estimate_nbytes
from meshcompute.graphs.sovereignty import confine, pin_in_block, refuse_delivery
from meshcompute.links import Link, LinkTable
from meshcompute.placement import placing
from meshcompute.pools import ANNOTATION, PLAN, Held, Pin, pin_of_annotations, split_resources
from meshcompute.scheduler.live import EmptyView, Known, SchedulerView, View, find_scheduler

__all__ = ["Assignment", "PlannedExpression", "Request", "assign"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a client asks for.

    Attributes
    ----------
    keys
        Keys whose values the client wants.
    pin
        Pin of the block in which the computation was started: for tasks without one of their own.
    resources
        Worker resources that every task of this computation asks for.
    is_propagating
        Place the tasks without a pin, too.
    compression
        Setting ``meshcompute.compression`` of the client; None: it has none.
    is_regrouping
        Setting ``meshcompute.regroup-reductions`` of the client.
    links
        Setting ``meshcompute.links`` of the client; None: it has none, and the scheduler's counts.
    objective
        Setting ``meshcompute.objective`` of the client.
    is_gathered
        The values go to the client at once.
    """

    keys: tuple[Key, ...]
    pin: Pin | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    is_propagating: bool = False
    compression: str | None = None
    is_regrouping: bool = True
    links: tuple[Link, ...] | None = None
    objective: str = "bytes"
    is_gathered: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """The plan, in the terms of Dask.

    Attributes
    ----------
    tasks
        Task by key, relays included, with nothing of ours in it.
    annotations
        Annotations of the user's: value by key, by kind.
    held_by_key
        What the scheduler holds each task to that has a pool.
    pool_by_key
        Pool of every task that has one, and of the values in memory that they read.
    pinned
        Keys that their pin, not the planner, put there.
    nbytes_by_key
        Estimated bytes of every value; measured ones for values in memory.
    relays
        Key of the relayed value by key of the relay.
    keys
        What the client asked for.
    guessed
        Keys whose estimates rest on a rule of thumb.
    learnt
        Groups of tasks of which something was learnt in earlier runs (:func:`meshcompute.graphs.learning.group_of`).
    measured
        Keys whose values are in memory.
    links
        What is known of links.
    regrouped
        Reductions that merge by pool what the given graph merges across pools, by kind.
    """

    tasks: Mapping[Key, GraphNode]
    annotations: Mapping[str, Mapping[Key, Any]]
    held_by_key: Mapping[Key, Held] = field(default_factory=dict)
    pool_by_key: Mapping[Key, str]
    pinned: frozenset[Key]
    nbytes_by_key: Mapping[Key, float]
    relays: Mapping[Key, Key]
    keys: tuple[Key, ...]
    guessed: frozenset[Key] | set[Key] = frozenset()
    learnt: frozenset[str] = frozenset()
    measured: frozenset[Key] = frozenset()
    links: LinkTable = field(default_factory=LinkTable)
    regrouped: tuple[Regrouped, ...] = ()


def assign(expr: Any, request: Request, view: View) -> Assignment:
    """Give the tasks of an expression their pools.

    Parameters
    ----------
    expr
        An optimised Dask expression.
    request
        What the client asks for.
    view
        What the cluster holds.

    Returns
    -------
    Assignment
        The plan.

    Raises
    ------
    UnsupportedPinError
        Tasks that Dask cannot take apart are pinned to different pools.
    SovereigntyError
        A value that must not leave its pools is wanted elsewhere.
    """
    layers = taskgraph.layers_of(expr)
    tasks, annotations = taskgraph.materialize(expr, request.keys)
    tasks, pins = extract_pins(tasks)
    for key, task in tasks.items():  # a task that was renamed by fusion leaves its old key behind
        if isinstance(task, Alias) and task.target in pins:
            pins.setdefault(key, pins[task.target])
    _add_annotated_pins(pins, annotations)
    if request.pin is not None and request.pin.pools:
        pins = {key: pins.get(key) or pin_in_block(request.pin, key, tasks) for key in tasks}
    external = {dep for task in tasks.values() for dep in taskgraph.inputs_of(task) if dep not in tasks}
    known = {key: seen for keys in (tasks, external) for key in view.among(keys) if (seen := view.known(key))}
    # What the cluster knows reads there what it was planned to read: relays, parts of reductions. That counts here, but
    # is not handed on: until this graph is taken in, the cluster may have forgotten it, and what it read.
    given = {key: tasks[key] for key, seen in known.items() if key in tasks and seen.task is not None}
    tasks.update({key: seen.task for key in given if (seen := known[key]).task is not None})
    own_pins = dict(pins)
    held_back = {key: seen.stays for key, seen in known.items() if seen.stays}
    stays = confine(tasks, pins, held_back)
    if stays:
        view.watch_borders()
    if request.is_gathered:
        refuse_delivery(stays, request.keys)
    pins = {key: pin for key, pin in pins.items() if pin.pools}
    if not pins and not (request.is_propagating and any(seen.pools for seen in known.values())):
        tasks.update(given)
        return Assignment(
            tasks=tasks,
            annotations=annotations,
            pool_by_key={},
            pinned=frozenset(),
            nbytes_by_key={},
            relays={},
            keys=request.keys,
        )
    nbytes: dict[Key, float] = {}
    guessed: set[Key] = set()
    learnt: frozenset[str] = frozenset()
    regrouping = Regrouping()
    links = LinkTable(given=request.links or (), objective=request.objective)
    shuffles = taskgraph.shuffles_of(tasks)
    if request.is_propagating or shuffles or any(len(pin.pools) > 1 for pin in pins.values()):
        measured = {key: seen.nbytes for key, seen in known.items() if seen.is_in_memory}
        nbytes = estimate_nbytes(tasks, layers, guessed, measured)
        kinds = learning.kinds_of(tasks, nbytes, {key for barrier in shuffles for key in tasks[barrier].dependencies})
        corrected, learnt = learning.correct(nbytes, kinds, view.learnt(kinds))
        if corrected:
            guessed.clear()
            nbytes = estimate_nbytes(tasks, layers, guessed, {**corrected, **measured})
        if request.is_propagating and request.is_regrouping:
            held = [{*request.keys}, {key for key, pin in own_pins.items() if pin.pools}, *annotations.values()]
            regrouping = _regroup(expr, tasks, nbytes, pins=pins, known=known, kept=held)
            if stays and regrouping.kinds:  # a part of what must not leave must not leave either
                stays = confine(tasks, own_pins, held_back)
                pins = {key: pin for key, pin in own_pins.items() if pin.pools}
            if kinds_of_parts := learning.kinds_of(regrouping.parts, nbytes):
                sizes = {key: nbytes[key] for key in regrouping.parts}
                corrected, learnt_of_parts = learning.correct(sizes, kinds_of_parts, view.learnt(kinds_of_parts))
                nbytes.update(corrected)
                learnt |= learnt_of_parts
                kinds |= kinds_of_parts
        links = view.links(request.links, request.objective)
        pool_by_key = _place(
            tasks, pins, known, nbytes, shuffles=shuffles.values(), wanted=request.keys, links=links, view=view
        )
        if not request.is_propagating:  # a shuffle of pinned data is confined all the same: Dask would spread it
            kept = pins.keys() | {key for group in shuffles.values() for key in group}
            pool_by_key = {key: pool for key, pool in pool_by_key.items() if key in kept}
        cost = (lambda a, b: links.cost(a, b, 1.0) or 0.0) if links.objective == "money" else None
        regrouping.settle(tasks, pool_by_key, nbytes, cost=cost, stays=stays)
        for key in regrouping.shortened - regrouping.parts.keys():  # others of their kind are larger
            kinds.pop(learning.group_of(key), None)
        view.expect(kinds)
    else:
        pool_by_key = {key: pin.pools[0] for key, pin in pins.items()}
    relays, fetching = _relays(tasks, pool_by_key, known) if request.is_propagating else ({}, set())
    for key, source in relays.items():
        if source in nbytes:
            nbytes[key] = nbytes[source]
        if source in stays:
            stays[key] = stays[source]
    tasks.update(given)
    held_by_key = _held(annotations, tasks, pool_by_key, pins, fetching=fetching, common=request.resources, stays=stays)
    return Assignment(
        tasks=tasks,
        annotations=annotations,
        held_by_key=held_by_key,
        pool_by_key=pool_by_key,
        pinned=frozenset(pins),
        nbytes_by_key=nbytes,
        relays=relays,
        keys=request.keys,
        guessed=guessed,
        learnt=learnt,
        links=links,
        measured=frozenset([key for key, seen in known.items() if seen.is_in_memory]),
        regrouped=regrouping.kinds,
    )


def _add_annotated_pins(pins: dict[Key, Pin], annotations: dict[str, dict[Key, Any]]) -> None:
    """Read the pins of layers that no optimiser has touched (``optimize_graph=False``, delayed)."""
    by_key = annotations.pop(ANNOTATION, {})
    resources = annotations.get("resources", {})
    for key in by_key.keys() | {key for key, value in resources.items() if isinstance(value, Mapping)}:
        pin = pin_of_annotations({ANNOTATION: by_key.get(key), "resources": resources.get(key)})
        if pin is not None:
            pins.setdefault(key, pin)


def _regroup(
    expr: Any,
    tasks: dict[Key, GraphNode],
    nbytes: dict[Key, float],
    *,
    pins: Mapping[Key, Pin],
    known: Mapping[Key, Known],
    kept: Iterable[Container[Key]],
) -> Regrouping:
    """Let each pool reduce its own part first, where data of several pools is reduced together."""
    held = {seen.pools for seen in known.values() if seen.pools}
    if len({name for pools in held.union([pin.pools for pin in pins.values()]) for name in pools}) < 2:
        return Regrouping()

    def pools_of(key: Key) -> tuple[str, ...] | None:
        pin, seen = pins.get(key), known.get(key)
        if pin is not None and not (seen is not None and seen.is_in_memory):
            return pin.pools
        return (seen.pools or None) if seen is not None else None

    return regroup(
        tasks,
        nbytes,
        pools_of=pools_of,
        is_known=known.__contains__,
        is_kept=lambda key: any(key in keys for keys in kept),
        holds=functools.cache(functools.partial(taskgraph.holds, expr)),
    )


def _place(
    tasks: Mapping[Key, GraphNode],
    pins: Mapping[Key, Pin],
    known: Mapping[Key, Known],
    nbytes: Mapping[Key, float],
    *,
    shuffles: Iterable[Iterable[Key]],
    wanted: Iterable[Key],
    links: LinkTable,
    view: View,
) -> dict[Key, str]:
    """Translate keys to integers, place, translate back."""
    keys = ordered([*tasks, *(key for key in known if key not in tasks)])
    index = Index(keys)
    names = sorted({p for pin in pins.values() for p in pin.pools} | {p for seen in known.values() for p in seen.pools})
    is_present = set(view.pools())
    sealed = {key for key, seen in known.items() if seen.is_in_memory}
    seconds = None
    if links.objective == "seconds":  # threads elsewhere may save time, too
        names = sorted({*names, *is_present})
        kinds = {key: taskgraph.name_of(key) for key in keys if key in tasks and key not in sealed}
        durations = view.durations(set(kinds.values()))
        seconds = [durations[kinds[key]] if key in kinds else 0.0 for key in keys]
    number = {name: i for i, name in enumerate(names)}
    allowed: dict[tuple[str, ...], tuple[int, ...]] = {}

    def numbers(pools: tuple[str, ...]) -> tuple[int, ...]:
        if pools not in allowed:  # of several replicas, those whose pool has workers
            usable = [p for p in pools if p in is_present] or pools
            allowed[pools] = tuple(number[p] for p in usable)
        return allowed[pools]

    pinned: list[tuple[int, ...] | None] = [None] * len(keys)
    for key, pin in pins.items():
        if key in index:
            pinned[index[key]] = numbers(pin.pools)
    for key, seen in known.items():
        if seen.pools and (seen.is_in_memory or key not in pins):
            pinned[index[key]] = numbers(seen.pools)
        elif seen.is_in_memory:
            pinned[index[key]] = None
    graph = placing.Graph(
        dependencies=dependencies_of(index, tasks, sealed),
        nbytes=[nbytes.get(key, 0.0) for key in keys],
        pins=pinned,
        together=[[index[key] for key in group] for group in shuffles],
        wanted=[index[key] for key in wanted if key in index],
        seconds=seconds,
    )
    threads = view.threads() if seconds is not None else {}
    costs = links.costs(
        names,
        [threads.get(name, 1.0) for name in names] if threads else None,
        has_replicas=any(len(pools) > 1 for pools in allowed),
    )
    try:
        pools = placing.place(graph, len(names), costs).pools
    except placing.ContradictingPinsError as exc:
        group = [taskgraph.name_of(keys[i]) for i in exc.tasks]
        raise UnsupportedPinError(
            f"A shuffle or rechunk has outputs pinned to different pools ({', '.join(sorted(set(group)))}). "
            "Rechunk the data of each pool on its own, or outside of any pool() block."
        ) from exc
    return {key: names[pool] for key, pool in zip(keys, pools, strict=True) if pool >= 0}


def _relays(
    tasks: dict[Key, GraphNode], pool_by_key: dict[Key, str], known: Mapping[Key, Known]
) -> tuple[dict[Key, Key], set[Key]]:
    """Add a relay wherever several tasks of one pool read one value of another.

    Returns
    -------
    dict
        Key of the relayed value by key of the relay.
    set
        Keys of the tasks that read from another pool: relays, and single readers.
    """
    readers: dict[tuple[Key, str], list[Key]] = defaultdict(list)
    pool_of = pool_by_key.get
    for key, task in tasks.items():
        pool = pool_of(key)
        for dep in taskgraph.inputs_of(task):
            if pool is None or pool_of(dep, pool) == pool or (dep in known and pool in known[dep].pools):
                continue
            if key not in known or known[key].task is None:
                readers[dep, pool].append(key)
    relays = {}
    fetching = set()
    for (source, pool), consumers in readers.items():
        if len(consumers) > 1:
            key = taskgraph.relay(tasks, source, consumers, pool)
            relays[key] = source
            pool_by_key[key] = pool
            fetching.add(key)
        else:
            fetching.update(consumers)
    return relays, fetching


def _held(
    annotations: dict[str, dict[Key, Any]],
    tasks: Mapping[Key, GraphNode],
    pool_by_key: Mapping[Key, str],
    pins: Mapping[Key, Pin],
    *,
    fetching: Container[Key],
    common: Mapping[str, float],
    stays: Mapping[Key, tuple[str, ...]],
) -> dict[Key, Held]:
    """Say what the scheduler holds each task to; what users ask for beside their pools moves there, too."""
    given = annotations.get("resources", {})
    held: dict[Key, Held] = {}
    shared: dict[tuple[Any, ...], Held] = {}
    for key, pool in pool_by_key.items():
        if key not in tasks:
            continue
        pin, is_fetching = pins.get(key), key in fetching
        extra = pin.resources if pin is not None else ()
        if given and key in given and isinstance(given[key], Mapping):
            extra = tuple(sorted({**split_resources(given.pop(key))[1], **dict(extra)}.items()))
        confined = stays.get(key, ()) if stays else ()
        is_pinned, leaves = pin is not None or bool(confined), pin is not None and pin.leaves
        replicas = pin.pools if pin is not None and len(pin.pools) > 1 else ()
        kind = pool, is_pinned, is_fetching, extra, confined, leaves, replicas
        if (one := shared.get(kind)) is None:
            one = shared[kind] = Held(
                pool,
                {**common, **dict(extra)},
                is_pinned=is_pinned,
                is_fetching=is_fetching,
                stays=confined,
                leaves=leaves,
                replicas=replicas,
            )
        held[key] = one
    return held


class PlannedExpression:
    """What a client sends to its scheduler in place of the user's expression.

    Parameters
    ----------
    expr
        The user's expression, optimised as far as the client does that.
    request
        What the client asks for.
    scheduler_id
        ``Scheduler.id`` of the scheduler that it is sent to.

    Notes
    -----
    Unpickling it on that scheduler installs the guard: so a graph never runs without it, whether the client is
    asynchronous, the scheduler was started again, or another client was first. Unpickling happens on the event
    loop; the plan is made in the scheduler's thread for graphs, by the two methods that Dask calls there.
    """

    def __init__(self, expr: Any, request: Request, scheduler_id: str) -> None:
        self.expr = expr
        self.request = request
        self.scheduler_id = scheduler_id
        self.view: View = EmptyView()

    def __getstate__(self) -> dict[str, Any]:
        return {"expr": self.expr, "request": self.request, "scheduler_id": self.scheduler_id}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.view = EmptyView()
        if (scheduler := find_scheduler(self.scheduler_id)) is not None:
            request = self.request
            install_guard(scheduler, request.compression, request.links, request.objective)
            self.view = SchedulerView(scheduler)
            ask_uncollected()

    @functools.cached_property
    def assignment(self) -> Assignment:
        """The plan, made when it is first asked for."""
        with uncollected():
            return assign(self.expr, self.request, self.view)

    def __dask_graph__(self) -> Mapping[Key, GraphNode]:
        return self.assignment.tasks  # nobody changes it: the scheduler makes a graph of its own

    def __dask_annotations__(self) -> dict[str, Mapping[Any, Any]]:
        return {**self.assignment.annotations, PLAN: {PLAN: self.assignment.held_by_key}}


def install_guard(
    scheduler: Any,
    compression: str | None = None,
    links: tuple[Link, ...] | None = None,
    objective: str | None = None,
) -> None:
    """Install the guard on a scheduler of this process, and packing on its workers. Idempotent.

    Parameters
    ----------
    scheduler
        A running scheduler.
    compression
        Setting ``meshcompute.compression`` of the client that asks; None: it has none.
    links, objective
        The same for its settings ``meshcompute.links`` and ``meshcompute.objective``.
    """
    from meshcompute.scheduler.guard import Guard
    from meshcompute.scheduler.packing import apply_mode

    Guard.install(scheduler)
    scheduler.give_links(links, objective)
    apply_mode(scheduler, compression)
