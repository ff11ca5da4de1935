"""Tasks that know their pin: the part of the door to Dask's graph internals that deals with single tasks.

Covers the class of task that carries a pin, finding pins again whatever the nesting, taking them off before a graph
runs, and taking fused tasks apart that would need two pools. Does not cover layers, expressions and optimisation
(:mod:`meshcompute.graphs.taskgraph`).

Runs in the client's process and in the scheduler's; imports nothing that a stock scheduler may lack.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, TypeVar

import toolz
from dask._expr import ProhibitReuse
from dask._task_spec import Alias, DataNode, GraphNode, Task, TaskRef, _execute_subgraph
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
]

Graph = dict[Key, GraphNode]
AnyTask = TypeVar("AnyTask", bound=Task)


class PinnedTask(Task):
    """A task that knows its pin.

    It lives between the creation of a collection and the scheduler: :func:`extract_pins` turns it back into a
    plain task, so that workers need not know the class.

    Notes
    -----
    The pin is the class's: there is one subclass for every pin. So instances are laid out as plain tasks are, Dask
    handles them as fast, and turning one back is a change of its class instead of a copy.
    """

    __slots__ = ()
    _pin: ClassVar[Pin]

    def copy(self) -> PinnedTask:
        return type(self)(self.key, self.func, *self.args, _data_producer=self._data_producer, **self.kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self._pin, self.__getstate__())


@functools.lru_cache(maxsize=1024)
def _kind_of(pin: Pin) -> type[PinnedTask]:
    return type("PinnedTask", (PinnedTask,), {"__slots__": (), "__module__": __name__, "_pin": pin})


def _restored(pin: Pin, state: Any) -> PinnedTask:
    activate()  # see Pin: a pin that arrives by pickle is respected here
    kind = _kind_of(pin)
    task = kind.__new__(kind)
    task.__setstate__(state)
    return task


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
        return _as(_kind_of(pin), task)
    if isinstance(task, PinnedTask) or _is_p2p(task):
        return task
    value: Any = TaskRef(task.target) if isinstance(task, Alias) else task
    return _kind_of(pin)(task.key, toolz.identity, value, _data_producer=task.data_producer)


def is_copied(task: GraphNode) -> bool:
    """Report whether Dask copied a task out of a collection that was handed to ``delayed``: it was made elsewhere."""
    return isinstance(task, Task) and task.func is ProhibitReuse._identity


def has_pin(task: object) -> bool:
    """Report whether a task, or a part of it, has a pin."""
    return any(True for _ in _pins_in(task))


def _as(kind: type[AnyTask], task: Task) -> AnyTask:
    # Task.__init__ walks the arguments for dependencies, which are known here: 1 us instead of 3.
    new: AnyTask = object.__new__(kind)
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
        The same tasks without anything of ours in them. A fused task whose parts must run in different pools is taken
        apart.
    dict
        Pin by key, for the tasks that have one. A fused task has what all its parts allow.
    """
    pins: dict[Key, Pin] = {}
    plain = dict(graph)
    extractor = _Extractor()
    apart: list[tuple[Key, GraphNode]] = []
    for key, task in itertools.chain(graph.items(), apart):
        kind = type(task)
        if kind is Alias or kind is DataNode or not isinstance(task, Task):
            continue
        fused: Task = task
        while is_copied(fused) and isinstance(fused.args[0], Task):
            fused = fused.args[0]
        if fused.func is _execute_subgraph:
            found = extractor.pins_of(fused.args[0])
            if len(found) > 1 and _is_conflict(found):
                parts = _taken_apart(key, fused)
                plain.update(parts)
                apart += parts.items()
                continue
            if not found and kind is Task and fused is task:
                continue
        new, pin = extractor(task)
        if new is not task:
            plain[key] = new
        if pin is not None:
            pins[key] = pin
    return plain, pins


def _is_conflict(pins: Iterable[Pin]) -> bool:
    found = {frozenset(pin.pools) for pin in pins if pin.pools}
    return len(found) > 1 and not frozenset.intersection(*found)


class _Extractor:
    """Strip pins, remembering sub-graphs that many tasks share (all blocks of a fused layer share one).

    They are known by their id: what is asked about must be kept by who asks.
    """

    def __init__(self) -> None:
        self._pins: dict[int, tuple[Pin, ...]] = {}
        self._subgraphs: dict[int, dict[Key, Any]] = {}

    def __call__(self, task: Task) -> tuple[Task, Pin | None]:
        pin = None
        if isinstance(task, PinnedTask):
            pin = task._pin
            task = _as(Task, task)
        if task.func is _execute_subgraph:
            for inner_pin in self.pins_of(task.args[0]):
                pin = _both(pin, inner_pin)
            inner = self._subgraph(task.args[0])
            if inner is not task.args[0]:
                task = _with_args(task, (inner, *task.args[1:]))
            return task, pin
        for i, arg in enumerate(task.args):
            if isinstance(arg, Task):
                new, arg_pin = self(arg)
                if new is not arg:
                    task = _with_args(task, (*task.args[:i], new, *task.args[i + 1 :]))
                pin = _both(pin, arg_pin)
        return task, pin

    def pins_of(self, graph: dict[Key, Any]) -> tuple[Pin, ...]:
        """Find the pins in a sub-graph, each once."""
        if (known := self._pins.get(id(graph))) is not None:
            return known
        found: tuple[Pin, ...] = ()
        for task in graph.values():
            kind = type(task)
            if kind is Alias or kind is DataNode or not isinstance(task, Task):
                continue
            pins: Iterable[Pin] = ()
            if kind is Task and task.func is _execute_subgraph:
                pins = self.pins_of(task.args[0])
            elif kind is not Task or any(map(_is_task, task.args)):
                pins = _pins_in(task)
            for pin in pins:
                if pin not in found:
                    found = (*found, pin)
        self._pins[id(graph)] = found
        return found

    def _subgraph(self, graph: dict[Key, Any]) -> dict[Key, Any]:
        if not self.pins_of(graph):
            return graph
        result = self._subgraphs.get(id(graph))
        if result is None:
            result = {key: self(task)[0] if isinstance(task, Task) else task for key, task in graph.items()}
            self._subgraphs[id(graph)] = result
        return result


def _is_task(part: object) -> bool:
    return isinstance(part, Task)


def _with_args(task: Task, args: tuple[Any, ...]) -> Task:
    new = copy.copy(task) if type(task) is not Task else _as(Task, task)
    new.args = args
    new._token = new._repr = None
    return new


def _both(a: Pin | None, b: Pin | None) -> Pin | None:
    """What two parts of one task allow together."""
    if a is None or b is None or a == b:
        return a if b is None else b
    resources = tuple(sorted(toolz.merge_with(max, dict(a.resources), dict(b.resources)).items()))
    marks = a.stays or b.stays, a.leaves or b.leaves
    if not a.pools or not b.pools:
        return Pin(a.pools or b.pools, resources, *marks)
    pools = tuple(p for p in a.pools if p in b.pools)
    if not pools:
        raise UnsupportedPinError(
            f"One task reads data of pool {a} and of pool {b} in a single step that Dask does not let us take apart. "
            "Open each pool's data inside its own pool() block and combine them outside."
        )
    return Pin(pools, resources, *marks)


def _pins_in(task: Any) -> Iterator[Pin]:
    if isinstance(task, PinnedTask):
        yield task._pin
    if isinstance(task, Task):
        parts = task.args[0].values() if task.func is _execute_subgraph else task.args
        for part in parts:
            if isinstance(part, Task):
                yield from _pins_in(part)


def _taken_apart(key: Key, task: Task) -> Graph:
    # A linear chain pinned to a, then to b, is one task after Dask's low-level fusion, and no worker could run it.
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
