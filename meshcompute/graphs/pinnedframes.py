"""Expressions of dask.dataframe that carry a pin.

Covers two expressions. :class:`PinnedFrame` marks what was created in a ``pool()`` block; projections, filters and
the like that are made outside of the block still pass through it into the read. When Dask lowers it, it becomes a
:class:`PinnedGraph`: a leaf whose tasks carry the pin, so that no fusion can mix two pools, and whose keys are those
of its pool, so that the same read at two sites is two reads.
Does not cover which frames get a pin (:mod:`meshcompute.graphs.frames`). Imports pandas, and therefore only where
frames are used.

How, for ``(A.x + B.y).sum()`` with A read in pool a and B in pool b::

    Sum                          Sum                              Sum
    └── Add                      └── Add                          └── Add
        ├── x                        ├── PinnedFrame a                ├── PinnedGraph a: read, fused
        │   └── PinnedFrame a        │   └── read, columns x          └── PinnedGraph b: read, fused
        │       └── read             └── PinnedFrame b
        └── y                            └── read, columns y
            └── PinnedFrame b
                └── read
         as written                    simplified                        lowered
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import dask
from dask._task_spec import Alias, GraphNode, convert_legacy_graph
from dask.dataframe.dask_expr._expr import (
    Blockwise,
    Expr,
    Filter,
    Head,
    Index,
    Lengths,
    Literal,
    Projection,
    Tail,
    _DelayedExpr,
    is_valid_blockwise_op,
    plain_column_projection,
)
from dask.dataframe.dask_expr._merge import HashJoinP2P
from dask.dataframe.dask_expr._reductions import Len
from dask.dataframe.dask_expr._shuffle import P2PShuffle
from dask.tokenize import tokenize
from dask.typing import Key
from dask.utils import key_split

from meshcompute.graphs.pinnedtasks import pinned
from meshcompute.pools import ANNOTATION, Pin, current_pin

__all__ = ["PinnedFrame", "PinnedGraph"]

# The key of a P2P barrier is made of the shuffle's id, and scheduler and workers take the one for the other.
_P2P = (P2PShuffle, HashJoinP2P)


@contextlib.contextmanager
def _inside(pin: Pin) -> Iterator[None]:
    """Evaluate the inside of a pinned frame as its block would: some expressions compute (``set_index``)."""
    with dask.annotate(**{ANNOTATION: pin}):
        yield


def _dependents_of(expr: Any, dependents: Any) -> list[Any]:
    return [found for reference in dependents[expr._name] if (found := reference()) is not None]


class PinnedFrame(Blockwise):
    """A frame that must be made in one of the pools of its pin.

    Attributes
    ----------
    frame
        The frame's expression.
    pin
        The pin.

    Notes
    -----
    It is block-wise, because Dask then sees that a frame and what was derived from it in the block are aligned,
    and takes partitions from inside; but it never becomes a task. Dask asks children about their parents with the
    dependents of the whole query: what several frames of one pool have in common stays a leaf of its own and is
    read once, everything else is merged into one.
    """

    _parameters = ["frame", "pin"]  # noqa: RUF012 - as Dask's expressions declare theirs
    _preserves_partitioning_information = True
    _filter_passthrough = True
    has_pin = True

    @functools.cached_property
    def _meta(self) -> Any:
        with _inside(self.operand("pin")):
            return self.frame._meta

    @functools.cached_property
    def _name(self) -> str:
        return f"pinned-{key_split(self.frame._name)}-{self.deterministic_token}"

    @property
    def npartitions(self) -> int:
        with _inside(self.operand("pin")):
            return int(self.frame.npartitions)

    def _divisions(self) -> Any:
        with _inside(self.operand("pin")):
            return self.frame.divisions

    def _broadcast_dep(self, dep: Any) -> bool:
        return False  # one frame, as it is; Dask would ask for its partitions, which may take a computation

    def _around(self, frame: Any) -> _Fence:
        return _Fence((frame,), self.operand("pin"))

    def _task(self, name: Key, index: int) -> Any:
        raise NotImplementedError("A pinned frame has no tasks before it is lowered. Optimise the frame first.")

    def _layer(self) -> dict[Key, GraphNode]:
        # dask.optimize() asks expressions for their graph as they are; frames._rebuild leaves out what is not needed.
        lowered = self._lower()
        graph: dict[Key, GraphNode] = dict(lowered.__dask_graph__())
        for i in range(self.npartitions):
            graph[self._name, i] = Alias((self._name, i), (lowered._name, i))
        return graph

    # Simplification

    def simplify_once(self, dependents: Any, simplified: Any) -> Any:
        merged = self._merged(dependents)
        if merged._name != self._name:
            return merged
        with _inside(self.operand("pin")):
            return super().simplify_once(dependents=dependents, simplified=simplified)

    def _merged(self, dependents: Any) -> Any:
        """Merge with the pinned frames inside that nobody else reads."""
        frame, pin = self.frame, self.operand("pin")
        if isinstance(frame, (PinnedFrame, PinnedGraph)):
            return frame
        names = {self._name}

        def is_mine(node: Any) -> bool:
            readers = [d._name for d in _dependents_of(node, dependents)]
            is_same = isinstance(node, PinnedFrame) and node.operand("pin") == pin
            return is_same and bool(readers) and names.issuperset(readers)

        while True:
            # Not below other pinned frames: what is in there is theirs.
            nodes = list(_walk(frame, lambda node: isinstance(node, (PinnedFrame, _Fence))))
            names.update(node._name for node in nodes)
            if (inner := next(filter(is_mine, nodes), None)) is None:
                return self if frame is self.frame else PinnedFrame(frame, pin)
            frame = frame.substitute(inner, inner.frame)
            if isinstance(frame, (PinnedFrame, PinnedGraph)):
                return frame

    def _filter_passthrough_available(self, parent: Any, dependents: Any) -> bool:
        return _reads_only(parent.predicate, self) and super()._filter_passthrough_available(parent, dependents)

    def _simplify_up(self, parent: Any, dependents: Any) -> Any:
        """Let steps that leave less to carry pass into the pool."""
        if isinstance(parent, Projection):
            new = plain_column_projection(self, parent, dependents) if self.ndim == 2 else None
            return self._around(new.frame) if isinstance(new, PinnedFrame) else new
        if isinstance(parent, Filter):
            if parent.frame._name != self._name or not self._filter_passthrough_available(parent, dependents):
                return None
            new = self._filter_simplification(parent)
            return None if new is None else self._around(new.frame)
        if type(parent) in (Head, Tail):
            return self._around(type(parent)(self.frame, *parent.operands[1:]))
        if isinstance(parent, Index):
            others = [d for d in _dependents_of(self, dependents) if not isinstance(d, Index)]
            return None if others or self.ndim < 2 else self._around(Index(self.frame))
        if isinstance(parent, (Len, Lengths)):
            return self._known_length(type(parent))
        return None

    def _known_length(self, kind: Any) -> Any:
        """Length as the file's metadata has it, as Dask answers ``len(df)`` without reading."""
        frame = self.frame.frame if isinstance(self.frame, Index) else self.frame
        with _inside(self.operand("pin")):
            length = kind(frame).simplify()
        return length if isinstance(length, Literal) else None

    def rewrite(self, kind: str, rewritten: Any) -> Any:
        with _inside(self.operand("pin")):
            return super().rewrite(kind, rewritten)

    # Lowering

    def _lower(self) -> Any:
        pin = self.operand("pin")
        with _inside(pin):
            return _pinned_graph(self.frame.lower_completely().simplify(), pin)


class _Fence(Expr):
    """A pinned frame that has just taken a step in: for the rest of this pass Dask does not look inside.

    Dask would simplify it right away, outside of the frame's block, and without knowing who reads the new steps.
    """

    _parameters = ["frames", "pin"]  # noqa: RUF012 - as Dask's expressions declare theirs

    @property
    def frame(self) -> Any:
        return self.operand("frames")[0]

    def dependencies(self) -> list[Any]:
        return [self.frame]

    def simplify_once(self, dependents: Any, simplified: Any) -> Any:
        return PinnedFrame(self.frame, self.operand("pin")).simplify_once(dependents, simplified)

    @functools.cached_property
    def _meta(self) -> Any:
        with _inside(self.operand("pin")):
            return self.frame._meta

    @property
    def npartitions(self) -> int:
        with _inside(self.operand("pin")):
            return int(self.frame.npartitions)

    def _divisions(self) -> Any:
        with _inside(self.operand("pin")):
            return self.frame.divisions


def _walk(expr: Any, is_end: Callable[[Any], bool]) -> Iterator[Any]:
    """Walk an expression down to the nodes where it ends for us, which are included."""
    stack, seen = [expr], set()
    while stack:
        node = stack.pop()
        if node._name in seen:
            continue
        seen.add(node._name)
        yield node
        if not is_end(node):
            stack.extend(node.dependencies())


def _reads_only(predicate: Any, frame: Any) -> bool:
    """Say whether a predicate reads nothing but this frame, so that it can be evaluated in the frame's pool."""
    stack = [predicate]
    while stack:
        node = stack.pop()
        if node._name == frame._name or isinstance(node, (Literal, _DelayedExpr)):
            continue
        if isinstance(node, PinnedFrame):
            if node.operand("pin") != frame.operand("pin"):
                return False
            continue
        inputs = node.dependencies()
        if not inputs:
            return False
        stack.extend(inputs)
    return True


def _with_own_shuffles(expr: Any, pin: Pin) -> Any:
    """Give the P2P shuffles of an expression ids of this pool: their keys cannot be renamed afterwards."""
    done: set[str] = set()

    def is_next(node: Any) -> bool:
        waiting = [n._name for n in node.walk() if isinstance(n, _P2P) and n._name not in done]
        return waiting == [node._name]

    # From the inputs up, because a shuffle whose input changes is made anew.
    while (node := next(filter(is_next, expr.walk()), None)) is not None:
        new = type(node)(*node.operands, _determ_token=tokenize("pool", pin, node.deterministic_token))
        done.add(new._name)
        expr = expr.substitute(node, new)
    return expr


def _pinned_graph(frame: Any, pin: Pin, inputs: Collection[str] = (), *, is_pinned: bool = True) -> Any:
    """Make the leaf of a lowered frame, which reads these inputs (by name) and any pinned graph."""
    if isinstance(frame, PinnedGraph):
        return frame

    def is_input(node: Any) -> bool:
        return isinstance(node, PinnedGraph) or node._name in inputs

    return PinnedGraph((frame,), pin, is_pinned, *filter(is_input, _walk(frame, is_input)))


def _is_graph_of(node: Any, pin: Pin) -> bool:
    return isinstance(node, PinnedGraph) and node.operand("pin") == pin


def _is_direct(node: Any, pin: Pin) -> bool:
    # Dask may still rewrite other expressions, and their names with them.
    return all(isinstance(child, _DelayedExpr) or _is_graph_of(child, pin) for child in node.dependencies())


def _reads_only_graphs(node: Any, pin: Pin) -> bool:
    """Say whether an expression is block-wise down to pinned graphs of one pool."""
    if _is_graph_of(node, pin) or isinstance(node, _DelayedExpr):
        return True
    children = node.dependencies()
    return bool(children) and is_valid_blockwise_op(node) and all(_reads_only_graphs(c, pin) for c in children)


def _next_private(nodes: Mapping[str, Any], pin: Pin, readers: set[str], dependents: Any) -> Any:
    """Find a graph of this pool that nobody reads but these readers."""
    for name, node in nodes.items():
        is_known = name in readers or not _is_graph_of(node, pin)
        if not is_known and readers.issuperset(d._name for d in _dependents_of(node, dependents)):
            return node
    return None


class PinnedGraph(Expr):
    """The graph of a pinned frame: lowered, and closed to everything that Dask does later.

    Attributes
    ----------
    frames
        The frame's lowered expression, in a tuple, which hides it from Dask's rewriting.
    pin
        The pin.
    is_pinned
        False for steps that were made outside of the block and read several pinned graphs of this pool, or one that
        others read, too: they are fused with each other and may run anywhere.
    *inputs
        What the frame reads: pinned graphs, of this or other pools, and delayed values without a pin.

    Notes
    -----
    Block-wise steps that were made outside of the block and read only this frame join it, as stock Dask would fuse
    them with the read: a partial sum runs where its partition is.
    """

    _parameters = ["frames", "pin", "is_pinned"]  # noqa: RUF012 - as Dask's expressions declare theirs
    has_pin = True

    @property
    def _frame(self) -> Any:
        return self.operand("frames")[0]

    @functools.cached_property
    def _fused(self) -> Any:
        return _with_own_shuffles(self._frame.fuse(), self.operand("pin"))

    @functools.cached_property
    def _name(self) -> str:
        if isinstance(self._fused, _P2P):
            return str(self._fused._name)
        return f"{key_split(self._fused._name)}-{self.deterministic_token}"

    @functools.cached_property
    def _meta(self) -> Any:
        return self._frame._meta

    @property
    def npartitions(self) -> int:
        return int(self._frame.npartitions)

    def _divisions(self) -> Any:
        return self._frame.divisions

    @functools.cached_property
    def unique_partition_mapping_columns_from_shuffle(self) -> Any:
        return self._frame.unique_partition_mapping_columns_from_shuffle

    def _simplify_up(self, parent: Any, dependents: Any) -> Any:
        pin = self.operand("pin")
        around = current_pin()
        if not is_valid_blockwise_op(parent) or (around is not None and around.pools and around != pin):
            return None
        if not _is_direct(parent, pin):
            return None
        frame, joined, is_pinned = parent, {parent._name}, False
        inputs = {node._name: node for node in parent.dependencies()}
        while (graph := _next_private(inputs, pin, joined, dependents)) is not None:
            frame = frame.substitute(graph, graph._frame)
            joined.add(graph._name)
            is_pinned |= graph.operand("is_pinned")
            inputs = {**inputs, **{node._name: node for node in graph.dependencies()}}
        if frame is parent and not all(
            _reads_only_graphs(reader, pin) for reader in _dependents_of(parent, dependents)
        ):
            return None  # the ways from this graph up do not meet again
        return _pinned_graph(frame, pin, inputs, is_pinned=is_pinned)

    def _tree_repr_lines(self, indent: int = 0, recursive: bool = True) -> list[str]:
        header = " " * indent + f"PinnedGraph: {self.operand('pin')}"
        return [header, *self._frame._tree_repr_lines(indent + 2, recursive)] if recursive else [header]

    def _layer(self) -> dict[Key, GraphNode]:
        layers: dict[Key, Any] = {}
        fixed: set[Key] = set()
        inputs = {node._name for node in self.dependencies()}
        for node in _walk(self._fused, lambda node: node._name in inputs):
            if node._name in inputs:
                continue
            layer = node._layer()
            layers.update(layer)
            if isinstance(node, _P2P):
                fixed.update(layer)
        outside = {(node._name, i) for node in self.dependencies() for i in range(node.npartitions)}
        tasks: dict[Key, GraphNode] = convert_legacy_graph(layers, layers.keys() | outside)
        keys = self._keys(tasks, fixed)
        readers = Counter(dep for task in tasks.values() for dep in task.dependencies)
        pin = self.operand("pin")
        graph = {}
        for old, task in tasks.items():
            if isinstance(task, Alias):  # some of Dask's aliases have their target's key
                new = Alias(keys[old], keys.get(task.target, task.target))
            else:
                new = task.substitute(keys, key=keys[old])
            # An alias of a value that nobody else reads vanishes on the scheduler.
            if self.operand("is_pinned") and not (isinstance(task, Alias) and readers[task.target] <= 1):
                new = pinned(new, pin)
            graph[new.key] = new
        return graph

    def _keys(self, tasks: dict[Key, GraphNode], fixed: set[Key]) -> dict[Key, Key]:
        """Choose new keys, by old ones, for the tasks of this pool."""
        pin, names = self.operand("pin"), {self._fused._name: self._name}
        keys: dict[Key, Key] = {}
        for key in tasks:
            name, *index = key if isinstance(key, tuple) else (key,)
            if key in fixed:
                keys[key] = key
                continue
            if name not in names:
                names[name] = f"{key_split(name)}-{tokenize('pool', pin, name)}"
            keys[key] = (names[name], *index) if isinstance(key, tuple) else names[name]
        return keys
