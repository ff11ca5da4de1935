"""Pictures: graphs coloured by pool, and the bytes that cross between pools.

Covers :func:`visualize_pools` (graphviz), :func:`plot_traffic` (matplotlib) and the colours that both share. Does not
cover where the facts come from: :mod:`meshcompute.explaining` predicts, :mod:`meshcompute.traffic` measures.
"""

from __future__ import annotations

import os
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dask.base import is_dask_collection
from dask.delayed import Delayed
from dask.highlevelgraph import HighLevelGraph
from dask.typing import Key

from meshcompute.errors import MissingDependencyError, NotACollectionError
from meshcompute.explaining import Plan, explain
from meshcompute.graphs import taskgraph
from meshcompute.pools import pin_of_annotations
from meshcompute.traffic import CLIENT, UNPOOLED

__all__ = ["colour_of_pool", "plot_traffic", "visualize_pools"]

# Okabe and Ito's colours for all kinds of colour vision, then Paul Tol's "muted" for clusters of many pools.
# References: https://jfly.uni-koeln.de/color/, https://personal.sron.nl/~pault/
_FIRST_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_MORE_COLOURS = (
    "#F0E442",
    "#332288",
    "#DDCC77",
    "#117733",
    "#88CCEE",
    "#882255",
    "#44AA99",
    "#999933",
    "#AA4499",
    "#CC6677",
)
_COLOURS = (*_FIRST_COLOURS, *_MORE_COLOURS)
_CLIENT_COLOUR = "#4D4D4D"
_ANYWHERE_COLOUR = "#DDDDDD"
_colour_by_pool: dict[str, str] = {CLIENT: _CLIENT_COLOUR, UNPOOLED: "#A6A6A6"}


def colour_of_pool(pool: str) -> str:
    """Give a pool's colour, the same in all pictures of this process.

    Parameters
    ----------
    pool
        Name of the pool, or ``"client"``.

    Returns
    -------
    str
        The colour as ``#RRGGBB``. It follows from the name, so that it is the same tomorrow, unless another pool has
        taken it: up to 16 pools have colours of their own.
    """
    if pool not in _colour_by_pool:
        first = zlib.crc32(pool.encode()) % len(_FIRST_COLOURS)
        candidates = _FIRST_COLOURS[first:] + _FIRST_COLOURS[:first] + _MORE_COLOURS
        taken = set(_colour_by_pool.values())
        _colour_by_pool[pool] = next((c for c in candidates if c not in taken), _COLOURS[first])
    return _colour_by_pool[pool]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Node:
    """One box of a picture: a layer or a task, with the pools that its tasks run in."""

    label: str
    pools: frozenset[str]
    dependencies: frozenset[Key]


def visualize_pools(
    *collections: Any,
    filename: str | os.PathLike[str] | None = "dask-pools.svg",
    format: str | None = None,  # noqa: A002 - the name that the published library and dask.visualize have
    tasks: bool = False,
    **kwargs: Any,
) -> Any:
    """Draw the graph of collections, coloured by the pools that ``propagate_pools()`` would use.

    Parameters
    ----------
    *collections
        Dask collections or high-level graphs.
    filename
        File to write. None: write none, and show the picture in a notebook only.
    format
        ``svg``, ``png``, ``pdf``, ``dot`` or ``jpeg``. Taken from the filename if not given; png if that has none.
    tasks
        Draw each task as it will run, after fusion, instead of layers.
    **kwargs
        Attributes of graphviz for the whole graph, for example ``rankdir="LR"``.

    Returns
    -------
    IPython.display.SVG or IPython.display.Image
        The picture, for a notebook; None where IPython is not installed.

    Raises
    ------
    NotACollectionError
        An argument is neither a Dask collection nor a high-level graph.
    MissingDependencyError
        The Python package graphviz or its program ``dot`` is not installed.

    Notes
    -----
    A layer with tasks in several pools is striped in their colours; one without a pool is grey: it may run anywhere.
    """
    for collection in collections or (None,):
        if not isinstance(collection, HighLevelGraph) and not is_dask_collection(collection):
            raise NotACollectionError("visualize_pools", type(collection).__name__)
    try:
        import graphviz
    except ImportError as exc:
        raise MissingDependencyError("visualize_pools", "the Python package graphviz", "pip install graphviz") from exc
    from dask.dot import graphviz_to_file

    plan = explain(*(part for collection in collections for part in _as_collections(collection)))
    picture = _picture(graphviz, _nodes_of_tasks(plan) if tasks else _nodes_of_layers(plan, collections), kwargs)
    try:
        return graphviz_to_file(picture, None if filename is None else os.fspath(filename), format)
    except graphviz.ExecutableNotFound as exc:
        cure = "apt install graphviz, brew install graphviz, or conda install graphviz"
        raise MissingDependencyError("visualize_pools", "the program dot of Graphviz", cure) from exc


def _as_collections(obj: Any) -> list[Any]:
    """Turn a bare graph into collections of its outputs, which is what a plan is made for."""
    if not isinstance(obj, HighLevelGraph):
        return [obj]
    read = set().union(*obj.dependencies.values())
    return [
        Delayed(key, obj, layer=name)
        for name, layer in obj.layers.items()
        if name not in read
        for key in layer.get_output_keys()
    ]


def _nodes_of_tasks(plan: Plan) -> dict[Key, _Node]:
    assignment = plan._assignment
    pools = assignment.pool_by_key
    return {
        key: _Node(
            label=_short(taskgraph.name_of(key)) + (f"\\n{key[1:]}" if isinstance(key, tuple) else ""),
            pools=frozenset({pools[key]} if key in pools else ()),
            dependencies=frozenset(task.dependencies),
        )
        for key, task in assignment.tasks.items()
    }


def _nodes_of_layers(plan: Plan, objects: Sequence[Any]) -> dict[Key, _Node]:
    graphs = [obj if isinstance(obj, HighLevelGraph) else obj.__dask_graph__() for obj in objects]
    if not all(isinstance(graph, HighLevelGraph) for graph in graphs):  # dataframes: their layers are the plan's
        return _grouped(_nodes_of_tasks(plan))
    graph = HighLevelGraph.merge(*graphs)
    planned = plan.pools_by_layer()
    readers: dict[str, set[str]] = defaultdict(set)
    for name, dependencies in graph.dependencies.items():
        for dependency in dependencies:
            readers[dependency].add(name)
    pools: dict[str, frozenset[str]] = {}
    for name in reversed(graph._toposort_layers()):
        pin = pin_of_annotations(graph.layers[name].annotations)
        if name in planned:
            pools[name] = planned[name]
        elif pin is not None and pin.pools:
            pools[name] = frozenset(pin.pools)
        else:  # fusion has made it part of its readers
            pools[name] = frozenset().union(*(pools[reader] for reader in readers[name]))
    return {
        name: _Node(
            label=f"{_short(taskgraph.name_of(name))}\\n{_times(len(layer.get_output_keys()))}",
            pools=pools[name],
            dependencies=frozenset(graph.dependencies[name]),
        )
        for name, layer in graph.layers.items()
    }


def _grouped(tasks: Mapping[Key, _Node]) -> dict[Key, _Node]:
    def layer_of(key: Key) -> Key:
        return key[0] if isinstance(key, tuple) else key

    members: dict[Key, list[Key]] = defaultdict(list)
    for key in tasks:
        members[layer_of(key)].append(key)
    return {
        layer: _Node(
            label=f"{_short(taskgraph.name_of(keys[0]))}\\n{_times(len(keys))}",
            pools=frozenset().union(*(tasks[key].pools for key in keys)),
            dependencies=frozenset({layer_of(d) for key in keys for d in tasks[key].dependencies} - {layer}),
        )
        for layer, keys in members.items()
    }


def _times(n: int) -> str:
    return "1 task" if n == 1 else f"{n} tasks"


def _short(name: str) -> str:
    return name if len(name) <= 28 else name[:27] + "…"


def _picture(graphviz: Any, nodes: Mapping[Key, _Node], attributes: Mapping[str, Any]) -> Any:
    font = "Helvetica,Arial,sans-serif"
    picture = graphviz.Digraph(
        graph_attr={"rankdir": "BT", "fontname": font, "bgcolor": "white"} | {k: str(v) for k, v in attributes.items()},
        node_attr={"shape": "box", "fontname": font, "fontsize": "11", "penwidth": "0", "margin": "0.14,0.07"},
        edge_attr={"color": "#888888", "arrowsize": "0.6"},
    )
    number = {key: str(i) for i, key in enumerate(nodes)}
    for key, node in nodes.items():
        where = " or ".join(sorted(node.pools)) if len(node.pools) == 1 else " + ".join(sorted(node.pools))
        picture.node(number[key], f"{node.label}\\n{where or 'anywhere'}", **_fill(node.pools))
    for key, node in nodes.items():
        for dependency in sorted(number[d] for d in node.dependencies if d in number):
            picture.edge(dependency, number[key])
    with picture.subgraph(name="cluster_legend") as legend:
        legend.attr(label="pools", fontsize="11", color="#CCCCCC", style="rounded")
        for pool in sorted({pool for node in nodes.values() for pool in node.pools}):
            legend.node(f"legend {pool}", pool, **_fill({pool}))
        if any(not node.pools for node in nodes.values()):
            legend.node("legend", "anywhere", **_fill(()))
    return picture


def _fill(pools: Iterable[str]) -> dict[str, str]:
    colours = [colour_of_pool(pool) for pool in sorted(pools)]
    if len(colours) > 1:  # stripes make no background to read white letters on
        return {"style": "striped", "fillcolor": ":".join(f"{colour}B0" for colour in colours), "fontcolor": "black"}
    colour = colours[0] if colours else _ANYWHERE_COLOUR
    return {"style": "rounded,filled", "fillcolor": colour, "fontcolor": _ink_on(colour)}


def _ink_on(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"  # luma, ITU-R BT.601


class _HasTraffic(Protocol):
    @property
    def bytes_between_pools(self) -> Mapping[tuple[str, str], int]: ...


def plot_traffic(*sources: _HasTraffic, ax: Any = None) -> Any:
    """Draw the bytes between pools as a matrix: rows send, columns receive.

    Parameters
    ----------
    *sources
        What ``measure_traffic()`` or ``explain()`` gave; or one of each, for predicted beside measured.
    ax
        Axes of matplotlib to draw in; a new figure if not given.

    Returns
    -------
    matplotlib.axes.Axes
        The axes. The figure is its ``figure``: ``plot_traffic(traffic).figure.savefig("traffic.png")``.

    Raises
    ------
    TypeError
        Nothing to draw was given, more than two, or something without ``bytes_between_pools``.

    Notes
    -----
    The colours of the cells are logarithmic; with two sources they show the measured bytes.
    """
    if not 1 <= len(sources) <= 2 or not all(hasattr(source, "bytes_between_pools") for source in sources):
        raise TypeError("plot_traffic() takes what measure_traffic() or explain() gave, or one of each.")
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, to_hex

    # Measured before predicted, in whatever order they came.
    ordered = sorted(sources, key=lambda source: isinstance(source, Plan))
    values = [dict(source.bytes_between_pools) for source in ordered]
    names = ["predicted" if isinstance(source, Plan) else "measured" for source in ordered]
    rows, columns = _sides(ordered, values)
    if ax is None:
        from matplotlib import pyplot as plt

        width = max(4.2, 0.84 * len(columns) + 2.7)
        _, ax = plt.subplots(figsize=(width, max(2.6, 0.56 * len(rows) + 1.7)), layout="constrained")
    numbers = [n for value in values for n in value.values() if n > 0]
    high = max(numbers, default=1)
    norm = LogNorm(vmin=min([high / 100, *numbers]), vmax=max(high, 1))
    blues = colormaps["YlGnBu"]
    scale = LinearSegmentedColormap.from_list("traffic", [blues(0.08 + 0.82 * i / 255) for i in range(256)])
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            shown = [value.get((row, column), 0) for value in values]
            main = shown[0] or max(shown)
            if row != column:
                background = to_hex(scale(norm(main))) if main else "#F4F4F2"
                _draw_cell(ax, (j, i), background, _cell_text(shown), len(columns))
    _finish(ax, rows, columns, _title(values, names))
    if numbers:
        mappable = ScalarMappable(norm=norm, cmap=scale)
        bar = ax.figure.colorbar(mappable, ax=ax, shrink=0.9, aspect=24, pad=0.03)
        bar.outline.set_visible(False)
        bar.set_ticks(_ticks(min([high / 100, *numbers]), high))
        bar.ax.yaxis.set_major_formatter(lambda value, _position: _bytes_text(value))
        bar.ax.minorticks_off()
        bar.ax.tick_params(length=0, labelsize=8, colors="#555555")
    return ax


def _sides(sources: Sequence[Any], values: Sequence[Mapping[tuple[str, str], int]]) -> tuple[list[str], list[str]]:
    """Give the names of rows and columns: every pool in both, the others only where they send or receive."""
    senders = {source for value in values for (source, _), n in value.items() if n}
    receivers = {destination for value in values for (_, destination), n in value.items() if n}
    known = {pool for source in sources for pool in getattr(source, "pools", ())}
    known |= {pool for source in sources for pool in getattr(source, "tasks_by_pool", ())}
    others = [UNPOOLED, CLIENT]
    pools = sorted((senders | receivers | known) - set(others))
    rows = pools + [name for name in others if name in senders]
    columns = pools + [name for name in others if name in receivers]
    return rows, columns


def _draw_cell(ax: Any, where: tuple[int, int], colour: str, text: str, n_columns: int) -> None:
    from matplotlib.patches import FancyBboxPatch

    x, y = where
    ax.add_patch(
        FancyBboxPatch(
            (x - 0.42, y - 0.42), 0.84, 0.84, boxstyle="round,pad=0.04,rounding_size=0.1", linewidth=0, facecolor=colour
        )
    )
    size = 9.5 if n_columns <= 6 else 8 if n_columns <= 10 else 7
    ax.text(x, y, text, ha="center", va="center", fontsize=size, color=_ink_on(colour), linespacing=1.35)


def _cell_text(shown: Sequence[int]) -> str:
    if not any(shown):
        return ""
    lines = [_bytes_text(shown[0]) if shown[0] else "0"]
    lines += [f"({_bytes_text(n) if n else '0'})" for n in shown[1:]]
    return "\n".join(lines)


def _ticks(low: float, high: float) -> list[float]:
    fine = [m * 1024.0**k for k in range(6) for m in (1, 10, 100)]
    ticks = [tick for tick in fine if low <= tick <= high]
    return ticks if len(ticks) <= 7 else [tick for tick in ticks if tick in fine[::3]]


def _bytes_text(n: float) -> str:
    for unit, power in (("GiB", 3), ("MiB", 2), ("kiB", 1)):
        if n >= 1024**power:
            value = n / 1024**power
            return f"{value:.1f} {unit}" if value < 99.95 else f"{value:.0f} {unit}"
    return f"{n:.0f} B"


def _title(values: Sequence[Mapping[tuple[str, str], int]], names: Sequence[str]) -> str:
    totals = [_bytes_text(sum(value.values())) for value in values]
    if len(values) == 1:
        return f"{names[0]}, {totals[0]} in all"
    return f"{names[0]} {totals[0]} in all ({names[1]} {totals[1]})"


def _finish(ax: Any, rows: Sequence[str], columns: Sequence[str], subtitle: str) -> None:
    ax.set_xlim(-0.55, len(columns) - 0.45)
    ax.set_ylim(len(rows) - 0.45, -0.55)
    ax.set_xticks(range(len(columns)), columns, fontsize=10)
    ax.set_yticks(range(len(rows)), rows, fontsize=10)
    ax.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    if len(columns) > 6:
        for label in ax.get_xticklabels():
            label.set(rotation=35, ha="left", rotation_mode="anchor")
    for labels, pools in ((ax.get_xticklabels(), columns), (ax.get_yticklabels(), rows)):
        for label, pool in zip(labels, pools, strict=True):
            colour = colour_of_pool(pool)
            label.set(color=_ink_on(colour), bbox={"boxstyle": "round,pad=0.3", "facecolor": colour, "linewidth": 0})
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_xlabel("to", fontsize=9, color="#777777", labelpad=9)
    ax.xaxis.set_label_position("top")
    ax.set_ylabel("from", fontsize=9, color="#777777", labelpad=7)
    ax.set_title(f"Bytes between pools\n{subtitle}", fontsize=11, loc="left", pad=14, linespacing=1.4)
