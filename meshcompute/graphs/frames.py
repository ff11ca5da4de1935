"""Pins of dask.dataframe: what is created in a ``pool()`` block gets a pin.

Covers the hooks: the constructor of frames, through which all of them pass, and the ways by which arrays, bags and
delayed objects become frames. Does not cover how a frame carries its pin (:mod:`meshcompute.graphs.pinnedframes`).

Notes
-----
dask.dataframe takes about a second to import and is never imported here. Where it is loaded later, even inside of a
block, its modules are hooked as they are loaded; the finder that waits for them is gone when both have been.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import dask
from dask._task_spec import Alias, TaskRef, convert_legacy_graph
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer
from dask.tokenize import tokenize
from dask.typing import Key
from dask.utils import key_split

from meshcompute.graphs.taskgraph import optimize_with
from meshcompute.imports import when_imported
from meshcompute.pools import ANNOTATION, current_pin, pin_of_annotations

__all__ = ["activate"]


def activate() -> None:
    """Give frames that are created in a ``pool()`` block their pin, from now on in this process. Idempotent."""
    for name, hook in _HOOKS.items():
        when_imported(name, hook)


# ---------------------------------------------------------------------------------------------------------------
# The constructor of frames


def _hook_collection(module: Any) -> None:
    """Hook ``dask.dataframe.dask_expr._collection``."""
    original = module.FrameBase.__init__
    if getattr(original, "carries_pins", False):
        return

    def __init__(self: Any, expr: Any) -> None:  # noqa: N807 - it becomes this method
        original(self, _with_pin(_with_pins_on_tasks(expr)))

    rebuilt = module.FrameBase.__dask_postpersist__

    def __dask_postpersist__(self: Any) -> tuple[Any, tuple[Any, ...]]:  # noqa: N807 - same
        rebuild, state = rebuilt(self)
        is_pinned = any(getattr(type(node), "has_pin", False) for node in self.expr.walk())
        return (_rebuild, (rebuild, state, self.expr.__dask_keys__())) if is_pinned else (rebuild, state)

    __init__.carries_pins = True  # type: ignore[attr-defined]
    module.FrameBase.__init__ = __init__
    module.FrameBase.__dask_postpersist__ = __dask_postpersist__
    module.get_annotations = _other_annotations


def _rebuild(graph: Mapping[Key, Any], rebuild: Callable[..., Any], state: tuple[Any, ...], keys: list[Key]) -> Any:
    """Make a frame of what ``persist`` or ``dask.optimize`` made of its graph.

    ``dask.optimize`` hands over the whole graph, of which Dask takes the first keys, in alphabetical order, for the
    frame's partitions. Only a graph of results, as of ``persist``, is left to Dask.
    """
    if not graph.keys() > set(keys):
        return rebuild(graph, *state)
    from dask.dataframe.dask_expr import from_graph

    tasks = convert_legacy_graph(graph)
    needed, stack = {}, list(keys)
    while stack:
        key = stack.pop()
        if key in tasks and key not in needed:
            needed[key] = tasks[key]
            stack.extend(tasks[key].dependencies)
    meta, divisions, name = state
    return from_graph(needed, meta, divisions, keys, name)


def _other_annotations() -> dict[str, Any]:
    """Annotations that dask.dataframe ignores, and rightly warns about: all but the pin."""
    annotations: dict[str, Any] = dask.get_annotations()
    if (pin := pin_of_annotations(annotations)) is None:
        return annotations
    carried = {ANNOTATION, "resources"} if pin.pools else {ANNOTATION}
    return {key: value for key, value in annotations.items() if key not in carried}


def _with_pin(expr: Any) -> Any:
    pin = current_pin()
    if pin is None or not pin.pools:
        return expr
    from meshcompute.graphs.pinnedframes import PinnedFrame, PinnedGraph

    if isinstance(expr, (PinnedFrame, PinnedGraph)) or _is_in_memory(expr):
        return expr
    return PinnedFrame(_with_meta(expr), pin)


def _with_meta(expr: Any) -> Any:
    """Keep what Dask has found out in the block by calling the user's function: it would call it again elsewhere."""
    from dask.dataframe.dask_expr.io.io import FromMap
    from dask.typing import no_default

    for node in expr.find_operations(FromMap):
        if node.operand("user_meta") is no_default:
            meta = getattr(node, "frame_meta", node._meta)
            expr = expr.substitute(node, node.substitute_parameters({"user_meta": meta}))
    return expr


def _is_in_memory(expr: Any) -> bool:
    """Say whether a frame is made of futures: its data is where it is."""
    from dask.dataframe.dask_expr.io.io import FromGraph

    return isinstance(expr, FromGraph) and all(isinstance(task, TaskRef) for task in expr.operand("layer").values())


# ---------------------------------------------------------------------------------------------------------------
# From other kinds of collections

# Expressions that were looked at before: every step of a query passes here with all the steps before it.
_seen: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def _with_pins_on_tasks(expr: Any) -> Any:
    """Put the pins of graphs that a frame is made of, which are annotations of layers, on their tasks."""
    from dask.dataframe.dask_expr._expr import DelayedsExpr, _DelayedExpr
    from dask.dataframe.dask_expr.io.io import FromGraph

    found = []
    stack = [expr]
    while stack:
        node = stack.pop()
        if _seen.get(node._name) is not None:
            continue
        _seen[node._name] = node
        if isinstance(node, (FromGraph, DelayedsExpr, _DelayedExpr)):
            found.append(node)
        stack.extend(node.dependencies())
    for node in found:
        if isinstance(node, FromGraph):
            new = node.substitute_parameters({"layer": _tasks_with_pins(node.operand("layer"))})
        else:
            new = type(node)(*(_delayed_with_pins(operand) for operand in node.operands))
        expr = expr.substitute(node, new)
    return expr


def _has_pinned_layers(graph: Any) -> bool:
    return isinstance(graph, HighLevelGraph) and any(
        pin_of_annotations(layer.annotations) is not None for layer in graph.layers.values()
    )


def _unchanged(dsk: Any, _keys: Any) -> Any:
    return dsk


def _tasks_with_pins(graph: Any) -> Any:
    return dict(optimize_with(_unchanged, graph, [])) if _has_pinned_layers(graph) else graph


def _delayed_with_pins(value: Any) -> Any:
    from dask.delayed import Delayed

    if not isinstance(value, Delayed) or not _has_pinned_layers(value.dask):
        return value
    # Under a new key, because dask.dataframe keeps one expression per key.
    key = f"{key_split(value.key)}-{tokenize('pinned', value.key)}"
    graph = optimize_with(_unchanged, value.dask, [])
    alias = MaterializedLayer({key: Alias(key, value.key)})
    alias.annotations = None  # not even those of the block around us: it vanishes
    layers, dependencies = {**graph.layers, key: alias}, {**graph.dependencies, key: set(value.__dask_layers__())}
    return Delayed(key, HighLevelGraph(layers, dependencies))


def _hook_io(module: Any) -> None:
    """Hook ``dask.dataframe.io.io``: from_dask_array() turns the array's graph into a dict first."""
    original = module.ensure_dict
    if getattr(original, "carries_pins", False):
        return

    def ensure_dict(graph: Any, *args: Any, **kwargs: Any) -> Any:
        return original(_tasks_with_pins(graph), *args, **kwargs)

    ensure_dict.carries_pins = True  # type: ignore[attr-defined]
    module.ensure_dict = ensure_dict


_HOOKS: Mapping[str, Callable[[Any], None]] = {
    "dask.dataframe.dask_expr._collection": _hook_collection,
    "dask.dataframe.io.io": _hook_io,
}
