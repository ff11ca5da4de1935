"""Pins inside Dask's task graphs: with :mod:`meshcompute.graphs.pinnedtasks`, the one door to Dask's graph internals.

Covers how a pin survives optimisation: a layer's pin (its annotation) is put on the layer's tasks themselves
before Dask fuses them; what will run when an expression is evaluated; and relays, by which a value crosses to a
pool once. Does not cover which pool a task gets (:mod:`meshcompute.placement.placing`, :mod:`meshcompute.planning`).

Runs in the client's process and in the scheduler's; imports nothing that a stock scheduler may lack.

Notes
-----
Why on the tasks: low-level fusion turns the layers of arrays and bags into one plain dict and drops every
annotation (dask#7036), and client-side optimisation (``dask.optimize``, ``delayed(f)(array)``) does the same
to all kinds of collections. A task object is kept by all of them.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import toolz
from dask._expr import Expr, LLGExpr
from dask._task_spec import Alias, GraphNode, Task, TaskRef, _execute_subgraph, convert_legacy_graph
from dask.blockwise import Blockwise
from dask.core import toposort
from dask.delayed import Delayed
from dask.highlevelgraph import HighLevelGraph, Layer, MaterializedLayer
from dask.typing import Key
from dask.utils import key_split

from meshcompute.graphs.associative import NUMBERS, NUMPY
from meshcompute.graphs.associativetables import are_numbers
from meshcompute.graphs.pinnedtasks import Graph, extract_pins, has_pin, is_copied, pinned
from meshcompute.pools import ANNOTATION, Pin, pin_of_annotations, split_resources

__all__ = [
    "as_tasks",
    "has_pins",
    "holds",
    "inputs_of",
    "layers_of",
    "materialize",
    "name_of",
    "optimize_array",
    "optimize_bag",
    "optimize_delayed",
    "optimize_with",
    "relay",
    "shuffles_of",
]


# ---------------------------------------------------------------------------------------------------------------
# Before fusion: layers -> tasks


def has_pins(expr: Any) -> bool:
    """Report whether an expression holds a pin anywhere.

    Parameters
    ----------
    expr
        A Dask expression, before or after optimisation.
    """
    for node in _walk(expr):
        for operand in node.operands:
            graph = operand.dask if isinstance(operand, Delayed) else operand  # what frames are made from
            if isinstance(graph, HighLevelGraph):
                if any(_layer_has_pin(layer) for layer in graph.layers.values()):
                    return True
            elif isinstance(graph, Mapping) and any(has_pin(t) for t in graph.values()):
                return True
        if getattr(type(node), "has_pin", False):  # a dataframe's pinned node
            return True
    return False


def _layer_has_pin(layer: Layer) -> bool:
    if pin_of_annotations(layer.annotations) is not None:
        return True
    if isinstance(layer, MaterializedLayer):
        return any(has_pin(t) for t in layer.mapping.values())
    return isinstance(layer, Blockwise) and has_pin(layer.task)


def _walk(expr: Any) -> Iterator[Any]:
    stack, seen = [expr], set()
    while stack:
        node = stack.pop()
        if not isinstance(node, Expr) or id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        stack.extend(node.operands)


def layers_of(expr: Any) -> dict[str, Layer]:
    """Collect the layers of an expression as they were before optimisation.

    Parameters
    ----------
    expr
        A Dask expression.

    Returns
    -------
    dict
        Layer by name: they know chunks and dtypes, which fused tasks no longer do.
    """
    layers: dict[str, Layer] = {}
    for node in _walk(expr):
        for operand in node.operands:
            if isinstance(operand, HighLevelGraph):
                layers.update(operand.layers)
    return layers


def holds(expr: Any, condition: str, name: Any) -> bool:
    """Tell whether a condition on values is known to hold, from what is known of a graph before it was fused.

    Parameters
    ----------
    expr
        A Dask expression.
    condition
        One of :mod:`meshcompute.graphs.associative`.
    name
        Name of the layer, or of the expression, whose values are meant.
    """
    if condition == NUMPY:
        layer = layers_of(expr).get(name)
        stated = getattr(layer, "collection_annotations", None) or {}
        return stated.get("chunk_type") == "numpy.ndarray"
    meta = next(
        (node._meta for node in _walk(expr) if type(node).__name__ == "TreeReduce" and node._name == name), None
    )
    return condition == NUMBERS and meta is not None and are_numbers(meta)


def _mark(hlg: HighLevelGraph) -> HighLevelGraph:
    """Put each pinned layer's pin on its tasks, and let layers of one pool be fused with each other."""
    pins = {name: pin for name, layer in hlg.layers.items() if (pin := pin_of_annotations(layer.annotations))}
    groups = _fusion_groups(hlg, pins)
    layers: dict[str, Layer] = {}
    all_keys: set[Key] | None = None
    for name, layer in hlg.layers.items():
        pin = pins.get(name)
        group = groups.get(name)
        annotations = _without_pin(layer.annotations)
        if group is not None:
            annotations = {**annotations, ANNOTATION: group}
        if pin is None and annotations == (layer.annotations or {}):
            layers[name] = layer
            continue
        new = copy.copy(layer)
        if pin is not None:
            if isinstance(new, Blockwise):
                new.task = pinned(new.task, pin)
                new.__dict__.pop("_cached_dict", None)
            else:
                if all_keys is None:
                    all_keys = set(hlg.get_all_external_keys())
                tasks = convert_legacy_graph(dict(layer), all_keys)
                # What was handed to delayed() in this block belongs to the block in which it was made.
                new = MaterializedLayer({k: t if is_copied(t) else pinned(t, pin) for k, t in tasks.items()})
                new.collection_annotations = layer.collection_annotations
        new.annotations = annotations or None
        layers[name] = new
    return HighLevelGraph(layers, hlg.dependencies)


def _without_pin(annotations: Mapping[str, Any] | None) -> dict[str, Any]:
    kept = {k: v for k, v in (annotations or {}).items() if k != ANNOTATION}
    if isinstance(resources := kept.get("resources"), Mapping):
        kept["resources"] = split_resources(resources)[1]
        if not kept["resources"]:
            del kept["resources"]
    return kept


def _fusion_groups(hlg: HighLevelGraph, pins: Mapping[str, Pin]) -> dict[str, Pin]:
    """Say which layers may be fused with each other.

    Blockwise fusion happens between layers whose annotations are equal. A layer without a pin that reads the
    data of one pin only, or that is read by such layers only, may be fused with them, as stock Dask would.
    """
    order = hlg._toposort_layers()
    groups: dict[str, Pin | None] = {name: pin for name, pin in pins.items() if pin.pools}
    for names, neighbours in ((order, hlg.dependencies), (reversed(order), hlg.dependents)):
        for name in names:
            if name in groups or name in pins:
                continue
            near = {groups.get(n) for n in neighbours[name]}
            if len(near) == 1 and (pin := near.pop()) is not None:
                groups[name] = pin
    return {name: pin for name, pin in groups.items() if pin is not None}


def optimize_with(stock: Callable[..., Any], dsk: Any, keys: Any, **kwargs: Any) -> Any:
    """Optimise a graph with a given function, keeping pins.

    Parameters
    ----------
    stock
        An optimiser as Dask's collections have them: graph and keys in, graph out.
    dsk
        The graph.
    keys
        The keys that are wanted.
    **kwargs
        Passed on.
    """
    if not isinstance(dsk, HighLevelGraph) or not any(
        pin_of_annotations(layer.annotations) is not None for layer in dsk.layers.values()
    ):
        return stock(dsk, keys, **kwargs)
    result = stock(_mark(dsk), keys, **kwargs)
    if isinstance(result, HighLevelGraph):  # fusion is off: the groups have done their work, the tasks have the pins
        layers = {}
        for name, layer in result.layers.items():
            layers[name] = layer
            if layer.annotations and ANNOTATION in layer.annotations:
                layers[name] = copy.copy(layer)
                layers[name].annotations = _without_pin(layer.annotations) or None
        result = HighLevelGraph(layers, result.dependencies)
    return result


def optimize_array(dsk: Any, keys: Any, **kwargs: Any) -> Any:
    """Optimise a graph of arrays as Dask does, keeping pins (configuration key ``array_optimize``)."""
    from dask.array.optimization import optimize

    return optimize_with(optimize, dsk, keys, **kwargs)


def optimize_bag(dsk: Any, keys: Any, **kwargs: Any) -> Any:
    """Optimise a graph of bags as Dask does, keeping pins (configuration key ``bag_optimize``)."""
    from dask.bag.core import optimize

    if not isinstance(dsk, HighLevelGraph) or not any(_layer_has_pin(layer) for layer in dsk.layers.values()):
        return optimize(dsk, keys, **kwargs)
    # Its last pass builds every task anew (dask.bag.core.lazify), so that the pins have to wait outside.
    tasks, pins = extract_pins(as_tasks(_mark(dsk)))
    # Inside a fused task bags are lazy iterators, so that this one must not be taken apart: the second half would do
    # the work of the first.
    kwargs["fuse_keys"] = [*(kwargs.get("fuse_keys") or ()), *_boundaries(tasks, pins)]
    result: Graph = {}
    for key, task in optimize(tasks, keys, **kwargs).items():
        if isinstance(task, Task) and task.func is _execute_subgraph and pins.keys() & task.args[0].keys():
            inner = {k: pinned(t, pins[k]) if k in pins else t for k, t in task.args[0].items()}
            result[key] = Task(key, task.func, inner, *task.args[1:], _data_producer=task._data_producer)
        elif key in pins and not isinstance(task, Alias):
            result[key] = pinned(task, pins[key])
        else:
            result[key] = task
    return result


def _boundaries(graph: Graph, pins: Mapping[Key, Pin]) -> set[Key]:
    """Find the tasks whose reader has to run in another pool than a chain that ends with them."""
    boundaries: set[Key] = set()
    allowed: dict[Key, frozenset[str] | None] = {}
    for key in toposort(graph):
        task = graph[key]
        pin = pins.get(key)
        own = frozenset(pin.pools) if pin is not None and pin.pools else None
        if len(task.dependencies) == 1:  # only chains are fused
            (source,) = task.dependencies
            given = allowed.get(source)
            if own is None:
                own = given
            elif given is not None and own & given:
                own &= given
            elif given is not None:
                boundaries.add(source)
        allowed[key] = own
    return boundaries


def optimize_delayed(dsk: Any, keys: Any, **kwargs: Any) -> Any:
    """Optimise a graph of delayed calls as Dask does, keeping pins (configuration key ``delayed_optimize``)."""
    from dask.delayed import optimize

    return optimize_with(optimize, dsk, keys, **kwargs)


# ---------------------------------------------------------------------------------------------------------------
# After fusion: tasks -> pins


def materialize(expr: Any, keys: Iterable[Key]) -> tuple[Graph, dict[str, dict[Key, Any]]]:
    """Turn an expression into the tasks that will run.

    Parameters
    ----------
    expr
        An optimised Dask expression.
    keys
        What the client asked for.

    Returns
    -------
    dict
        Task by key, fused, without what nobody needs.
    dict
        Annotations: value by key, by kind.
    """
    graph = convert_legacy_graph(expr.__dask_graph__())
    annotations = {kind: dict(values) for kind, values in expr.__dask_annotations__().items()}
    if isinstance(expr, LLGExpr):  # other expressions cull by themselves; the scheduler does it only for its own kind
        needed, stack = {}, list(keys)
        while stack:
            key = stack.pop()
            if key not in needed and key in graph:
                needed[key] = graph[key]
                stack.extend(graph[key].dependencies)
        graph = needed
    return graph, annotations


# ---------------------------------------------------------------------------------------------------------------
# Relays


def relay(graph: Graph, source: Key, consumers: Iterable[Key], pool: str) -> Key:
    """Let several tasks of one pool read a value of another pool through one task of their own pool.

    Parameters
    ----------
    graph
        The tasks; changed in place.
    source
        Key of the value.
    consumers
        Keys of the tasks that read it.
    pool
        Their pool.

    Returns
    -------
    Key
        Key of the new task: it has to run in ``pool``.

    Notes
    -----
    Without it the value crosses once per worker that wants it, and often once more after that: a gather takes
    any holder. The relay fetches it once; its readers find it in their own pool.
    """
    name, *index = source if isinstance(source, tuple) else (source,)
    new_name = f"relay-{pool}-{name}"
    key: Key = (new_name, *index) if isinstance(source, tuple) else new_name
    graph[key] = Task(key, toolz.identity, TaskRef(source))
    for consumer in consumers:
        graph[consumer] = graph[consumer].substitute({source: key})
    return key


def shuffles_of(graph: Graph) -> dict[Key, list[Key]]:
    """Find the P2P shuffles of a graph.

    Parameters
    ----------
    graph
        The tasks.

    Returns
    -------
    dict
        By key of the barrier: the barrier and its readers, which have to run in one pool. What goes in may come
        from anywhere.
    """
    groups = {key: [key] for key, task in graph.items() if type(task).__name__ == "P2PBarrierTask"}
    if groups:
        for key, task in graph.items():
            for barrier in task.dependencies & groups.keys():
                groups[barrier].append(key)
    return groups


#: Keys of what a task reads. The public name is a property: 0.1 us for every task of a million.
inputs_of: Callable[[GraphNode], frozenset[Key]] = operator.attrgetter("_dependencies")


def name_of(key: Key) -> str:
    """Name of a task's kind, as the dashboard shows it."""
    return str(key_split(key))


def as_tasks(graph: Mapping[Key, Any]) -> Graph:
    """Convert a graph that may hold tuples, as old code writes it, to task objects."""
    return dict(convert_legacy_graph(graph))
