"""Tasks that know their pin: the part of the door to Dask's graph internals that deals with single tasks.

Covers the class of task that carries a pin, finding pins again whatever the nesting, taking them off before a graph
runs, and taking fused tasks apart that would need two pools. Does not cover layers, expressions and optimisation
(:mod:`meshcompute.taskgraph`).

Runs in the client's process and in the scheduler's; imports nothing that a stock scheduler may lack.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import toolz
from dask._expr import ProhibitReuse
from dask._task_spec import Alias, GraphNode, Task, TaskRef, _execute_subgraph
from dask.tokenize import tokenize
from dask.typing import Key
from dask.utils import key_split

from meshcompute.errors import UnsupportedPinError
from meshcompute.pools import Pin, activate

__all__ = [
    "Graph",
    "PinnedTask",
    "extract_pins",
    "has_pin",
    "inner_keys",
    "is_copied",
    "pinned",
    "split_conflicts",
]

Graph = dict[Key, GraphNode]


class PinnedTask(Task):
    """A task that knows its pin.

    It lives between the creation of a collection and the scheduler: :func:`extract_pins` turns it back into a
    plain task, so that workers need not know the class.
    """

    __slots__ = ("_pin",)
    _pin: Pin

    def __init__(
        self, key: Any, func: Callable[..., Any], /, *args: Any, _pin: Pin, _data_producer: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(key, func, *args, _data_producer=_data_producer, **kwargs)
        self._pin = _pin

    def copy(self) -> PinnedTask:
        return type(self)(
            self.key, self.func, *self.args, _pin=self._pin, _data_producer=self._data_producer, **self.kwargs
        )

    def __setstate__(self, state: Any) -> None:
        activate()  # see Pin: a pin that arrives by pickle is respected here
        super().__setstate__(state)


def _is_p2p(task: object) -> bool:
    # P2P tasks are recognised by their class on the scheduler: never wrap or rebuild one.
    return type(task).__name__.startswith("P2P")


def pinned(task: GraphNode, pin: Pin) -> GraphNode:
    """Put a pin on a task.

    Parameters
    ----------
    task
        Any node of a graph.
    pin
        The pin. A task that has one already keeps it.

    Returns
    -------
    GraphNode
        A task with the same key and result. The barrier of a P2P shuffle comes back as it is: the planner
        keeps it with its neighbours.
    """
    if type(task) is Task:
        if task.func is _execute_subgraph and any(has_pin(t) for t in task.args[0].values()):
            inner = {k: pinned(t, pin) for k, t in task.args[0].items()}
            return Task(task.key, task.func, inner, *task.args[1:], _data_producer=task._data_producer)
        return PinnedTask(task.key, task.func, *task.args, _pin=pin, _data_producer=task._data_producer, **task.kwargs)
    if isinstance(task, PinnedTask) or _is_p2p(task):
        return task
    value: Any = TaskRef(task.target) if isinstance(task, Alias) else task
    return PinnedTask(task.key, toolz.identity, value, _pin=pin, _data_producer=task.data_producer)


def is_copied(task: GraphNode) -> bool:
    """Report whether Dask copied a task out of a collection that was handed to ``delayed``: it was made elsewhere."""
    return isinstance(task, Task) and task.func is ProhibitReuse._identity


def has_pin(task: object) -> bool:
    """Report whether a task, or a part of it, has a pin."""
    return any(True for _ in _pins_in(task))


def _plain(task: PinnedTask) -> Task:
    # Task.__init__ walks the arguments for dependencies, which are known here: 1 us instead of 3.
    new = Task.__new__(Task)
    new.key, new.func, new.args, new.kwargs = task.key, task.func, task.args, task.kwargs
    new._dependencies = task._dependencies
    new._data_producer = task._data_producer
    new._is_coro = new._token = new._repr = None
    return new


def extract_pins(graph: Graph) -> tuple[Graph, dict[Key, Pin]]:
    """Take the pins off the tasks.

    Parameters
    ----------
    graph
        Tasks as Dask's optimisation left them. Not changed.

    Returns
    -------
    dict
        The same tasks without anything of ours in them.
    dict
        Pin by key, for the tasks that have one. A fused task has what all its parts allow.
    """
    pins: dict[Key, Pin] = {}
    plain: Graph = {}
    extractor = _Extractor()
    for key, task in split_conflicts(graph).items():
        plain[key], pin = extractor(task)
        if pin is not None:
            pins[key] = pin
    return plain, pins


class _Extractor:
    """Strip pins, remembering sub-graphs that many tasks share (all blocks of a fused layer share one)."""

    def __init__(self) -> None:
        self._subgraphs: dict[int, tuple[dict[Key, Any], Any, Pin | None]] = {}

    def __call__(self, task: GraphNode) -> tuple[GraphNode, Pin | None]:
        kind = type(task)
        pin = None
        if kind is PinnedTask:
            pin = task._pin
            task = _plain(task)
        elif not isinstance(task, Task):
            return task, None
        if task.func is _execute_subgraph:
            inner, inner_pin = self._subgraph(task.args[0])
            if inner is not task.args[0]:
                task = _with_args(task, (inner, *task.args[1:]))
            return task, _both(pin, inner_pin)
        for i, arg in enumerate(task.args):
            if isinstance(arg, Task):
                new, arg_pin = self(arg)
                if new is not arg:
                    task = _with_args(task, (*task.args[:i], new, *task.args[i + 1 :]))
                pin = _both(pin, arg_pin)
        return task, pin

    def _subgraph(self, graph: dict[Key, Any]) -> tuple[dict[Key, Any], Pin | None]:
        if (known := self._subgraphs.get(id(graph))) is not None:
            return known[1], known[2]
        pin = None
        new = {}
        is_changed = False
        for key, task in graph.items():
            new[key], task_pin = self(task)
            is_changed |= new[key] is not task
            pin = _both(pin, task_pin)
        result = new if is_changed else graph
        self._subgraphs[id(graph)] = graph, result, pin  # the graph itself, so that its id stays taken
        return result, pin


def _with_args(task: Task, args: tuple[Any, ...]) -> Task:
    new = copy.copy(task) if type(task) is not Task else _plain(task)
    new.args = args
    new._token = new._repr = None
    return new


def _both(a: Pin | None, b: Pin | None) -> Pin | None:
    """What two parts of one task allow together."""
    if a is None or b is None or a == b:
        return a if b is None else b
    resources = tuple(sorted(toolz.merge_with(max, dict(a.resources), dict(b.resources)).items()))
    if not a.pools or not b.pools:
        return Pin(a.pools or b.pools, resources)
    pools = tuple(p for p in a.pools if p in b.pools)
    if not pools:
        raise UnsupportedPinError(
            f"One task reads data of pool {a} and of pool {b} in a single step that Dask does not let us take apart. "
            "Open each pool's data inside its own pool() block and combine them outside."
        )
    return Pin(pools, resources)


def split_conflicts(graph: Graph) -> Graph:
    """Take fused tasks apart whose parts must run in different pools.

    Parameters
    ----------
    graph
        Tasks as Dask's optimisation left them.

    Returns
    -------
    dict
        The same graph where nothing conflicts; otherwise one with the parts as tasks of their own.

    Notes
    -----
    A linear chain pinned to a, then to b, is one task after Dask's low-level fusion, and no worker could run it.
    """
    result: Graph | None = None
    checked: dict[int, tuple[Any, bool]] = {}
    for key, node in graph.items():
        task = node
        while is_copied(task) and isinstance(task.args[0], Task):
            task = task.args[0]
        if not (isinstance(task, Task) and task.func is _execute_subgraph):
            continue
        inner = task.args[0]
        if (known := checked.get(id(inner))) is None:
            known = checked[id(inner)] = inner, _conflicts(inner)
        if known[1]:
            if result is None:
                result = dict(graph)
            result.update(_taken_apart(key, task))
    return graph if result is None else split_conflicts(result)


def _conflicts(inner: Mapping[Key, Any]) -> bool:
    found = {frozenset(p.pools) for t in inner.values() for p in _pins_in(t) if p.pools}
    return len(found) > 1 and not frozenset.intersection(*found)


def _pins_in(task: Any) -> Iterator[Pin]:
    if isinstance(task, PinnedTask):
        yield task._pin
    if isinstance(task, Task):
        parts = task.args[0].values() if task.func is _execute_subgraph else task.args
        for part in parts:
            if isinstance(part, Task):
                yield from _pins_in(part)


def _taken_apart(key: Key, task: Task) -> Graph:
    inner, outkey, inkeys, *values = task.args
    new_keys = {k: f"{key_split(k)}-{tokenize(key, k)}" for k in inner}
    new_keys[outkey] = key
    substitutes: dict[Key, Any] = {**new_keys, **dict(zip(inkeys, values, strict=True))}
    parts = {}
    for k, part in inner.items():
        subs = {d: substitutes[d] for d in part.dependencies if d in substitutes}
        parts[new_keys[k]] = part.substitute(subs, key=new_keys[k])
    return parts


def inner_keys(task: GraphNode) -> tuple[Key, ...]:
    """Keys of the tasks that were fused into a task, none if it was not fused."""
    if isinstance(task, Task) and task.func is _execute_subgraph:
        inner = task.args[0]
        return (*inner, *(key for part in inner.values() for key in inner_keys(part)))
    return ()
