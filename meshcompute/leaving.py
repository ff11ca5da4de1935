"""What may leave: the word that lets a result out of a pool that its data must not leave.

Covers :func:`may_leave`. Does not cover what must stay (:func:`meshcompute.pool` with ``never_leave=True``), nor how
that is kept (:mod:`meshcompute.graphs.sovereignty`, :mod:`meshcompute.scheduler.borders`).
"""

from __future__ import annotations

from typing import Any, TypeVar

import toolz
from dask._task_spec import Task, TaskRef
from dask.base import is_dask_collection
from dask.core import flatten
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer
from dask.tokenize import tokenize
from dask.typing import Key

from meshcompute.errors import NotACollectionError, UnsupportedPinError
from meshcompute.pools import ANNOTATION, Pin, activate

__all__ = ["may_leave"]

T = TypeVar("T")


def may_leave(collection: T) -> T:
    """Say that a result may leave the pools that the data it was made of must not leave.

    Parameters
    ----------
    collection
        A Dask collection: an array, what xarray makes of arrays, delayed, a bag.

    Returns
    -------
    collection
        An equal collection whose values may go anywhere; all that is made of it may, too.

    Raises
    ------
    NotACollectionError
        It is not a Dask collection.
    UnsupportedPinError
        Of a dataframe single results may leave: those of its ``to_delayed()``.

    Notes
    -----
    The chunks of this very result may leave, not what they were made of: those are still worked on inside the pool.
    Whether a result tells too much about its inputs, nobody but you can judge.

    Examples
    --------
    >>> with pool("hospital", never_leave=True):  # doctest: +SKIP
    ...     patients = xarray.open_dataset("/data/patients.nc", chunks={})
    >>> may_leave(patients.age.mean()).compute()  # doctest: +SKIP
    """
    if not is_dask_collection(collection):
        raise NotACollectionError("may_leave", type(collection).__name__)
    whole: Any = collection
    graph = whole.__dask_graph__()
    if not isinstance(graph, HighLevelGraph):
        raise UnsupportedPinError(
            f"may_leave() cannot mark a {type(collection).__name__}, whose graph is made when it runs. "
            "Mark single results of a dataframe: [may_leave(part) for part in frame.to_delayed()]."
        )
    activate()
    keys: list[Key] = list(flatten([whole.__dask_keys__()]))
    names = {name: f"may-leave-{tokenize(name)}" for name in dict.fromkeys(map(_name_of, keys))}
    layers, dependencies = dict(graph.layers), dict(graph.dependencies)
    for name, new in names.items():
        tasks = {
            renamed: Task(renamed, toolz.identity, TaskRef(key))
            for key in keys
            if _name_of(key) == name
            for renamed in [_renamed(key, new)]
        }
        layer = MaterializedLayer(tasks, annotations={ANNOTATION: Pin((), leaves=True)})
        old = graph.layers.get(name)
        layer.collection_annotations = getattr(old, "collection_annotations", None)
        layers[new], dependencies[new] = layer, {n for n in graph.layers if n == name} or _makers(graph, keys, name)
    rebuild, args = whole.__dask_postpersist__()
    rebuilt: T = rebuild(HighLevelGraph(layers, dependencies), *args, rename=names)
    return rebuilt


def _name_of(key: Key) -> str:
    return str(key[0] if isinstance(key, tuple) else key)


def _renamed(key: Key, name: str) -> Key:
    return (name, *key[1:]) if isinstance(key, tuple) else name


def _makers(graph: HighLevelGraph, keys: list[Key], name: str) -> set[str]:
    """Layers whose names are not those of their keys."""
    wanted = {key for key in keys if _name_of(key) == name}
    return {n for n, layer in graph.layers.items() if wanted & set(layer.keys())}
