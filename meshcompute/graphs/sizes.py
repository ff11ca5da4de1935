"""Estimate how many bytes every task's value has when it is sent to another worker.

Covers graphs as they run, after fusion, with what is known of them before: chunks and dtypes of the array layers they
came from, what partial reductions of ``dask.array`` and flox really carry, literal data, rules of thumb for the rest.
Does not cover values that exist already (the scheduler knows their size) nor what a protocol adds to the payload.

Where an estimate comes from, the first that applies::

    a literal in the graph                     its own size
    a block of an array layer                  chunk shape times bytes per element; see _Blocks.of
    an alias, a fused task                     what it stands for
    slices, concatenations, finalize           computed from the inputs
    P2P transfer / barrier / unpack            what it sends / a number / an equal share of what went in
    first steps of a table's reductions        a row, or a share of the groups: guesses, but smaller than a table
    a table's part read from files             rows and columns as the files count them, else the files' size
    anything else                              nearly as large as its largest input; without inputs, Dask's default size

The last rule errs on the large side for functions that condense their input (delayed, bag): their code cannot be seen.
It and all that rests on it are guesses, and said to be. Arrays of objects count eight bytes per element, as in Dask.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import dask
from dask._task_spec import Alias, DataNode, GraphNode, NestedContainer, Task, TaskRef, _execute_subgraph
from dask.blockwise import Blockwise
from dask.highlevelgraph import Layer, MaterializedLayer
from dask.sizeof import sizeof
from dask.typing import Key
from dask.utils import parse_bytes

from meshcompute.graphs.associative import PART_NBYTES
from meshcompute.graphs.associativegroups import STEPS, grouped_chunks, grouped_nbytes
from meshcompute.graphs.tablesizes import Shuffles, is_table_sender, read_nbytes, table_nbytes

__all__ = ["estimate_nbytes"]

_NUMBER_NBYTES = 28  # sys.getsizeof of a Python int: what the barrier of a P2P shuffle returns
_NONE_NBYTES = 16  # sys.getsizeof(None)
# Functions that nobody knows condense more often than they inflate: of links in a chain that would otherwise count the
# same, the last one is cut.
_SHRINKING = 1 - 2**-13
_COUNT_NBYTES = 8  # an int64 or a float64 per element

# Functions of dask.array, numpy and dask._task_spec, by name.
_CONCATENATIONS = {"_concatenate2", "concatenate", "concatenate3", "concatenate_arrays", "concatenate_shaped"}
_CONTAINERS = {"_identity_cast", "to_container"}
_STORINGS = {"store_chunk", "load_store_chunk"}
_SLICINGS = {"getitem", "_getitem", "getter", "getter_nofancy", "getter_inline"}


def estimate_nbytes(
    dsk: Mapping[Key, GraphNode],
    layers: Mapping[str, Layer],
    guessed: set[Key] | None = None,
    measured: Mapping[Key, float] | None = None,
) -> dict[Key, float]:
    """Estimate how many bytes each task's value will have.

    Parameters
    ----------
    dsk
        The graph that will run: nodes of ``dask._task_spec``, fused or not.
    layers
        The layers that the graph was made of, by name, before it was optimised: they know chunks and dtypes.
    guessed
        Gets the keys added whose estimate rests on a rule of thumb.
    measured
        Bytes by key where one knows better: they stay, and what is made of such values is estimated by them.

    Returns
    -------
    dict
        Bytes by key, for every key of the graph and for those in ``measured``.
    """
    return _Estimate(dsk, layers, set() if guessed is None else guessed, measured or {}).sizes


class _Blocks:
    """Shapes and sizes of the blocks of one array layer."""

    __slots__ = ("dims", "itemsize", "per_block", "per_element", "uniform")

    def __init__(self, dims: Sequence[Sequence[float]], itemsize: float, per_element: float, per_block: float) -> None:
        self.dims = dims
        self.itemsize = itemsize
        self.per_element = per_element
        self.per_block = per_block
        self.uniform: float | None = None
        if all(lengths and min(lengths) == max(lengths) for lengths in dims):
            self.uniform = _known(per_block + per_element * math.prod(lengths[0] for lengths in dims))

    def shape(self, index: Sequence[Any]) -> tuple[float, ...] | None:
        """Return the shape of a block, None if the index is not one of a block."""
        if len(index) != len(self.dims):
            return None
        try:
            return tuple([lengths[i] for lengths, i in zip(self.dims, index, strict=True)])
        except (IndexError, TypeError):
            return None

    def nbytes(self, index: Sequence[Any]) -> float | None:
        """Return the size of a block, None if it is not known."""
        if self.uniform is not None and len(index) == len(self.dims):
            return self.uniform
        shape = self.shape(index)
        return None if shape is None else _known(self.per_block + self.per_element * math.prod(shape))

    @classmethod
    def of(cls, layer: Layer, layers: Mapping[str, Layer]) -> _Blocks | None:
        """Find out what a layer's blocks are, None if the layer does not say.

        Notes
        -----
        The chunks that a layer states are right except in a reduction's first step, where they are the input's: axes
        that are reduced have length one. An element has the dtype's size, unless a reduction hands on several arrays.
        """
        stated = layer.collection_annotations or {}
        dtype, chunks = stated.get("dtype"), stated.get("chunks")
        if chunks is not None and (per_loop := _core_nbytes(layer, len(chunks), layers)) is not None:
            return cls(chunks, 0, per_loop, 0)
        itemsize = getattr(dtype, "itemsize", None)
        if itemsize is None or chunks is None:
            return None
        function, options, sample = _function_of(layer)
        if (grouped := grouped_chunks(layer, sample, chunks, layers)) is not None:
            return cls(grouped[0], 0, grouped[1], 0)
        name = _dask_array_name(function)
        if name == "broadcast_to":
            return None  # a view of its input, sent as such
        if name == "_broadcast_trick_inner":
            return cls(chunks, itemsize, 0, itemsize)  # ones, zeros, full: one element, repeated
        if name in _STORINGS and not options.get("return_stored", False):
            return cls(chunks, itemsize, 0, _NONE_NBYTES)
        axes = _axes(options.get("axis"), len(chunks))
        is_topk = name in {"topk", "topk_aggregate", "argtopk", "argtopk_aggregate"} and "k" in options
        length = abs(options["k"]) if is_topk else 1
        if axes and options.get("keepdims") is True and (isinstance(layer, Blockwise) or length > 1):
            chunks = tuple(
                tuple([length if isinstance(layer, MaterializedLayer) else min(length, n) for n in lengths])
                if axis in axes
                else lengths
                for axis, lengths in enumerate(chunks)
            )
        per_element, per_block = _content(name, options, itemsize, sample, layers)
        return cls(chunks, itemsize, per_element, per_block)


def _core_nbytes(layer: Layer, n_loops: int, layers: Mapping[str, Layer]) -> float | None:
    """Return the bytes per loop index of what ``apply_gufunc`` hands to its outputs, None for other layers.

    The chunks that it states are those of the loop dimensions; its outputs, named after it, know the core dimensions.
    """
    name, _, token = layer.output.rpartition("-") if isinstance(layer, Blockwise) else ("", "", "")
    outputs = [o for i in range(8) if name and (o := layers.get(f"{name}_{i}-{token}")) is not None]
    stated = [o.collection_annotations or {} for o in outputs]
    if not stated or any(len(s.get("chunks", ())) < n_loops or "dtype" not in s for s in stated):
        return None
    return float(sum(s["dtype"].itemsize * math.prod(n[0] for n in s["chunks"][n_loops:]) for s in stated))


def _known(nbytes: float) -> float | None:
    return float(nbytes) if 0 <= nbytes < math.inf else None


def _axes(axis: Any, ndim: int) -> frozenset[int]:
    """Normalise a reduction's axis keyword; none if it is not given or odd."""
    axes = axis if isinstance(axis, tuple | list) else () if axis is None else (axis,)
    return frozenset([a % ndim for a in axes if isinstance(a, int)]) if ndim else frozenset()


def _function_of(layer: Layer) -> tuple[Any, dict[str, Any], Any]:
    """Return the function that a layer applies, its keywords and one of its tasks, without building the layer."""
    if isinstance(layer, Blockwise):
        sample: Any = layer.task
    elif isinstance(layer, MaterializedLayer):
        sample = next(iter(layer.mapping.values()), None)
    else:
        return None, {}, None
    options: dict[str, Any] = {}
    if isinstance(sample, Task):
        inner = _inner(sample)
        function, options = inner.func, dict(inner.kwargs)
    elif isinstance(sample, tuple) and sample and callable(sample[0]):
        function = sample[0]
    else:
        return None, {}, sample
    return *_unwrapped(function, options), sample


def _inner(task: Task) -> Task:
    """Return the task that yields a fused task's value."""
    while task.func is _execute_subgraph:
        last = task.args[0].get(task.args[1])
        if not isinstance(last, Task):
            return task
        task = last
    return task


def _unwrapped(function: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Look through partial functions and compositions."""
    while True:
        if hasattr(function, "keywords") and hasattr(function, "func"):  # functools.partial, toolz.curry
            options = {**function.keywords, **options}
            function = function.func
        elif hasattr(function, "funcs") and hasattr(function, "first"):  # toolz.compose: the last one decides
            function = function.funcs[-1] if function.funcs else function.first
        else:
            return function, options


def _dask_array_name(function: Any) -> str:
    """Return a function's name if it is dask.array's or numpy's, else an empty text."""
    module = getattr(function, "__module__", None) or ""
    return getattr(function, "__name__", "") if module.startswith(("dask.array", "numpy")) else ""


def _content(
    name: str, options: dict[str, Any], itemsize: float, sample: Any, layers: Mapping[str, Layer]
) -> tuple[float, float]:
    """Return bytes per element and per block of what a step of a reduction hands on (dask/array/reductions.py)."""
    if name == "mean_chunk":
        # {n, total}; counts of an array without missing values are one number, repeated
        counts = getattr(options.get("numel"), "__name__", "numel") != "numel"
        return (2 * itemsize, PART_NBYTES["mean"]) if counts else (itemsize, PART_NBYTES["mean"] + itemsize)
    if name == "mean_combine":
        return 2 * itemsize, PART_NBYTES["mean"]
    if name in {"moment_chunk", "moment_combine"}:
        # {n, total, M}, M with one array for each order from the second
        return _COUNT_NBYTES + itemsize * options.get("order", 2), PART_NBYTES["moment"]
    if name in {"arg_chunk", "arg_combine"}:
        # the extremes with their positions; the layer states the dtype of the positions alone
        return _COUNT_NBYTES + _value_itemsize(sample, layers, itemsize), 0
    if name == "argtopk":
        return _COUNT_NBYTES + itemsize, 0
    return itemsize, 0


def _value_itemsize(sample: Any, layers: Mapping[str, Layer], default: float) -> float:
    """Return the itemsize of the values whose positions an arg-reduction seeks: walk back to before its first step."""
    for _ in range(64):  # steps of a tree reduction; far more than any has
        layer = layers.get(_first_input(sample, layers))
        if layer is None:
            return default
        function, _, sample = _function_of(layer)
        if _dask_array_name(function) not in {"arg_chunk", "arg_combine"}:
            dtype = (layer.collection_annotations or {}).get("dtype")
            return getattr(dtype, "itemsize", default)
    return default


def _first_input(sample: Any, layers: Mapping[str, Layer]) -> str:
    """Return the name of a layer that a task, new style or old, reads."""
    if isinstance(sample, GraphNode):
        names: Iterable[Any] = (key[0] if isinstance(key, tuple) else key for key in sample.dependencies)
        return next((name for name in names if name in layers), "")
    if isinstance(sample, tuple | list):
        if sample and isinstance(sample[0], str) and sample[0] in layers:
            return sample[0]
        for part in sample:
            if isinstance(part, tuple | list) and (name := _first_input(part, layers)):
                return name
    return ""


class _Estimate:
    """Sizes of one graph; what needs its inputs' sizes first is put off until they are there."""

    def __init__(
        self, dsk: Mapping[Key, GraphNode], layers: Mapping[str, Layer], guessed: set[Key], known: Mapping[Key, float]
    ) -> None:
        self.dsk, self.layers, self.guessed = dsk, layers, guessed
        self.default = float(parse_bytes(dask.config.get("distributed.scheduler.default-data-size", "1kiB")))
        self.blocks_by_name: dict[Any, _Blocks | None] = {}
        self.shapes: dict[Key, tuple[tuple[float, ...], float]] = {}
        self.shuffles: Shuffles | None = None
        self.sizes: dict[Key, float] = dict(known)
        self.is_guess = False
        self._estimate()

    def _estimate(self) -> None:
        sizes, blocks_by_name = self.sizes, self.blocks_by_name
        pending: list[Key] = []
        for key, node in self.dsk.items():
            if key in sizes:
                continue
            kind = type(node)
            if kind is DataNode:
                sizes[key] = _literal_nbytes(node.value)
                continue
            if kind is not Alias and type(key) is tuple and key:
                name = key[0]
                blocks = blocks_by_name[name] if name in blocks_by_name else self._blocks(name)
                if blocks is not None and (nbytes := blocks.nbytes(key[1:])) is not None:
                    sizes[key] = nbytes
                    continue
            pending.append(key)
        for key in pending:
            if key not in sizes:
                self._settle(key)

    def _blocks(self, name: Any) -> _Blocks | None:
        if name not in self.blocks_by_name:
            try:
                self.blocks_by_name[name] = _Blocks.of(self.layers[name], self.layers) if name in self.layers else None
            except Exception:  # annotations are anybody's; an estimate is never worth a failure
                self.blocks_by_name[name] = None
        return self.blocks_by_name[name]

    def _settle(self, key: Key) -> None:
        """Find a size after those of its inputs, without recursion: chains can be long."""
        dsk, sizes = self.dsk, self.sizes
        stack, entered = [key], set()
        while stack:
            current = stack[-1]
            if current not in sizes:
                node = dsk[current]
                if current not in entered:
                    entered.add(current)
                    missing = [k for k in node.dependencies if k not in sizes and k in dsk and k not in entered]
                    if missing:
                        stack.extend(missing)
                        continue
                self.is_guess = not self.guessed.isdisjoint(node.dependencies)
                sizes[current] = self._computed(current, node)
                if self.is_guess:
                    self.guessed.add(current)
            stack.pop()

    def _computed(self, key: Key, node: GraphNode) -> float:
        """Estimate a task by what it does to its inputs."""
        if isinstance(node, Alias):
            if node.target in self.shapes:
                self.shapes[key] = self.shapes[node.target]
            nbytes = self.sizes.get(node.target, self.default)
            return min(nbytes, stated) if (stated := self._block_nbytes(key)) is not None else nbytes
        if not isinstance(node, Task):
            return self.default
        if node.func is _execute_subgraph:
            return self._fused(key, node)
        return self._applied(key, node, [self.sizes.get(k, self.default) for k in node.dependencies])

    def _fused(self, key: Key, task: Task) -> float:
        """Estimate a fused task: walk back from its last step to one whose value is known."""
        inner, step = task.args[0], task.args[1]
        steps: list[tuple[Key, Task]] = []
        limit = math.inf
        while True:
            node = inner.get(step)
            if isinstance(node, Alias):
                # The target may be larger than its name says (a view that was cut) or smaller (ones, a broadcast).
                stated = self._block_nbytes(step)
                limit = limit if stated is None else min(limit, stated)
                step = node.target
                continue
            nbytes = _literal_nbytes(node.value) if isinstance(node, DataNode) else self._block_nbytes(step)
            if nbytes is not None:
                self.is_guess = False
                break
            if not isinstance(node, Task):
                nbytes = self.sizes.get(step, self.default)
                break
            steps.append((step, node))
            before = next((k for k in node.dependencies if k in inner), None)
            if before is None:
                break
            step = before
        while steps:
            step, node = steps.pop()
            inputs = [self.sizes.get(k, self.default) for k in node.dependencies if k not in inner]
            if nbytes is not None:
                inputs.append(nbytes)
            nbytes = self._applied(step, node, inputs)
        if task.args[1] in self.shapes:
            self.shapes[key] = self.shapes[task.args[1]]
        return min(self.default if nbytes is None else nbytes, limit)

    def _blocks_of(self, key: Any) -> _Blocks | None:
        return self._blocks(key[0]) if type(key) is tuple and key else None

    def _block_nbytes(self, key: Any) -> float | None:
        """Return the size of a block of an array layer, None for other keys."""
        return None if (blocks := self._blocks_of(key)) is None else blocks.nbytes(key[1:])

    def _block_shape(self, key: Any) -> tuple[float, ...] | None:
        return None if (blocks := self._blocks_of(key)) is None else blocks.shape(key[1:])

    def _applied(self, key: Key, task: Task, inputs: Sequence[float]) -> float:
        """Estimate what one function makes of inputs of known size."""
        function, _ = _unwrapped(task.func, {})
        name = getattr(function, "__name__", "")
        if name in _SLICINGS and (nbytes := self._sliced(key, task)) is not None:
            return nbytes
        if name in STEPS and (nbytes := grouped_nbytes(task, inputs, self._block_shape)) is not None:
            return nbytes
        is_of_shuffle = (getattr(function, "__module__", None) or "").startswith("distributed.shuffle")
        if is_of_shuffle or is_table_sender(function):
            return self._shuffled(key, name, task, inputs)
        if name in _STORINGS and not task.kwargs.get("return_stored", False):
            return _NONE_NBYTES
        if not inputs:
            return self._root(key, task)
        if (found := table_nbytes(function, inputs)) is not None:
            self.is_guess |= found[1]
            return found[0]
        if name in _CONCATENATIONS or name in _CONTAINERS or (isinstance(key, str) and key.startswith("finalize-")):
            return sum(inputs)
        if _is_carry(key):
            return min(inputs)  # the carry before it, plus a slice of a block
        self.is_guess = True
        return max(inputs) * _SHRINKING

    def _sliced(self, key: Key, task: Task) -> float | None:
        """Return the size of a slice of a block whose shape is known."""
        if len(task.args) < 2:
            return None
        source: Any = getattr(task.args[0], "key", None)
        index: Any = task.args[1]
        if isinstance(index, TaskRef):  # dask.array's shuffle keeps its indices beside the graph, as (1, index)
            node = self.dsk.get(index.key)
            index = node.value[1] if isinstance(node, DataNode) and isinstance(node.value, tuple) else None
        if source not in self.shapes:
            blocks = self._blocks_of(source)
            if blocks is None or blocks.per_element != blocks.itemsize or (shape := blocks.shape(source[1:])) is None:
                return None
            self.shapes[source] = shape, blocks.itemsize
        shape, itemsize = self.shapes[source]
        sliced = _sliced_shape(shape, index if isinstance(index, tuple) else (index,))
        if sliced is None or (nbytes := _known(itemsize * math.prod(sliced))) is None:
            return None
        self.shapes[key] = sliced, itemsize
        return nbytes

    def _shuffled(self, key: Key, name: str, task: Task, inputs: Sequence[float]) -> float:
        """Return what a task of a P2P shuffle sends (a transfer, by itself) or returns (the others)."""
        if self.shuffles is None:
            self.shuffles = Shuffles(self.dsk)
        if name.endswith("transfer"):
            return sum(inputs) * self.shuffles.growth_by_sender.get(key, 1.0)
        if not name.endswith("unpack"):
            return _NUMBER_NBYTES
        barriers = [barrier for barrier in task.dependencies if barrier in self.dsk]
        self.is_guess |= len(barriers) > 1  # a join: as large as what goes in
        found = 0.0
        for barrier in barriers:
            for sender in self.dsk[barrier].dependencies:
                nbytes = self.sizes.get(sender, self.default) / self.shuffles.growth_by_sender.get(sender, 1.0)
                found += nbytes / self.shuffles.readers[barrier]
        return found or self.default

    def _root(self, key: Key, task: Task) -> float:
        """Estimate a task without inputs: as large as the data that it is called with, if any."""
        blocks = self._blocks(key[0]) if _is_carry(key) else None
        if blocks is not None and isinstance(task.args[-1], NestedContainer):
            shape = dict(zip(task.args[-1].args[::2], task.args[-1].args[1::2], strict=False)).get("shape", ())
            return float(blocks.itemsize * math.prod(shape))
        given = (*task.args, *task.kwargs.values())
        if literals := [_literal_nbytes(a) for a in given if hasattr(a, "nbytes") or hasattr(a, "memory_usage")]:
            return max(literals)
        nbytes, is_counted = read_nbytes(task)
        self.is_guess = not is_counted
        return nbytes or self.default


def _is_carry(key: Any) -> TypeGuard[tuple[Any, ...]]:
    """Tell whether a key is that of what a cumulative reduction carries from block to block."""
    return isinstance(key, tuple) and key[1:2] == ("extra",)


def _literal_nbytes(value: Any) -> float:
    """Return the size of a value that is there; foreign types may fail to tell it."""
    try:
        return float(sizeof(value))
    except Exception:
        return 0.0


def _sliced_shape(shape: Sequence[float], index: Sequence[Any]) -> tuple[float, ...] | None:
    """Return the shape of ``array[index]``, None for an index that is not of slices, numbers and lists."""
    result: list[float] = []
    axis = 0
    for part in index:
        if part is None:
            result.append(1)
            continue
        if axis >= len(shape) or shape[axis] != shape[axis]:
            return None
        if isinstance(part, slice):
            result.append(len(range(*part.indices(int(shape[axis])))))
        elif isinstance(part, Sequence) or getattr(part, "ndim", None) == 1:
            result.append(len(part))
        elif not isinstance(part, int):
            return None
        axis += 1
    return (*result, *shape[axis:])
