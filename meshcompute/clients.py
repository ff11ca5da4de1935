"""What a scientist writes: ``pool()`` and ``propagate_pools()``; and the one door to ``distributed.Client``.

Covers the two blocks, and the hooks that make this process respect pins: the optimisers of array, bag and
delayed, the one place where every Dask client turns an expression into futures, ``Client.scatter``, and the
salting of keys. Does not cover what happens on the scheduler (:mod:`meshcompute.planning`,
:mod:`meshcompute.scheduler.guard`).

Notes
-----
Nothing is hooked by importing Dask or this package: it happens when a pool is entered first, or when a pinned
collection arrives by pickle, and a graph without pins then still goes to the scheduler as it always did.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import dask
import dask.tokenize
from distributed import Client, get_client
from distributed.client import _get_global_client

from meshcompute import planning, shipping
from meshcompute.errors import (
    MeshError,
    NoClientError,
    PoolNameError,
    PoolsMissingError,
    UnknownPoolError,
    UnsupportedPinError,
)
from meshcompute.graphs import frames, taskgraph
from meshcompute.imports import when_imported
from meshcompute.links import objective_of, parse_links
from meshcompute.packing import mode_of
from meshcompute.pools import (
    ANNOTATION,
    UNPINNED,
    Pin,
    activate,
    current_pin,
    pools_of_resources,
    split_resources,
    validate_pool_name,
)
from meshcompute.settings import setting

__all__ = ["current_client", "pool", "pools_of_client", "propagate_pools"]

_OPTIMIZERS = {
    "array_optimize": taskgraph.optimize_array,
    "bag_optimize": taskgraph.optimize_bag,
    "delayed_optimize": taskgraph.optimize_delayed,
}


def pool(*names: str | None, never_leave: bool = False) -> contextlib.AbstractContextManager[None]:
    """Pin what is created in this block to a pool of workers: the place where its data is.

    Parameters
    ----------
    *names
        Name of the pool, as its workers have it: ``dask worker --resources pool-ecmwf=1`` is pool "ecmwf".
        Several names: the data is at all of them, and the planner picks. None: no pin in this block, whatever
        surrounds it.
    never_leave
        What is created in this block, and everything that is made of it, must not leave the pool, not to the client
        either, unless :func:`meshcompute.may_leave` says so of a result.

    Raises
    ------
    PoolNameError
        No name, an empty one, or one that Dask's worker resources cannot carry.
    UnsupportedPinError
        ``dask.array`` is in its experimental query-planning mode, which drops every annotation.

    Notes
    -----
    Of nested blocks the innermost counts. ``compute`` and ``persist`` inside the block pin every task that has
    no pin of its own. The same path or call in two pools is two keys.

    Examples
    --------
    >>> with pool("ecmwf"):  # doctest: +SKIP
    ...     predictions = xarray.open_dataset("/data/ecmwf/predictions.nc", chunks="auto")
    """
    pin = _pin_of_names(names, never_leave=never_leave)
    if _is_array_query_planning():
        raise UnsupportedPinError(
            "dask.array is in query-planning mode, in which it drops annotations, and with them the pin. "
            "Set dask.config 'array.query-planning' to False before dask.array is imported."
        )
    return _block(pin)


@contextlib.contextmanager
def _block(pin: Pin) -> Iterator[None]:
    activate()
    frames.activate()
    when_imported("xarray", _hook_writing)
    with dask.annotate(**{ANNOTATION: pin}):
        yield


def _hook_writing(_: Any) -> None:
    # A layer above: what xarray writes inside of a block is written at the site. A scheduler never comes here.
    importlib.import_module("meshcompute.data.writing").activate()


def _pin_of_names(names: tuple[str | None, ...], *, never_leave: bool) -> Pin:
    if names == (None,):
        if never_leave:
            raise PoolNameError(None, "never_leave=True needs the name of the pool that data must not leave")
        return UNPINNED
    if not names:
        validate_pool_name("")
    return Pin(tuple(dict.fromkeys(validate_pool_name(name) for name in names)), stays=never_leave)


def _is_array_query_planning() -> bool:
    module = sys.modules.get("dask.array")  # importing it just to ask would cost a second
    enabled = getattr(module, "ARRAY_EXPR_ENABLED", None)
    return bool(dask.config.get("array.query-planning", False) if enabled is None else enabled)


class propagate_pools:  # noqa: N801 - a block, named as the published library has it
    """Place every other task, too, so that few bytes cross between pools.

    Use it as a block, or call it once for the rest of the session. Without a client it takes effect with the
    next one. Graphs in flight keep their rules when the block ends.

    Raises
    ------
    PoolsMissingError
        None of the current client's workers belongs to a pool.
    VersionMismatchError
        The scheduler's process has another version of meshcompute.

    Notes
    -----
    It is the setting ``meshcompute.propagate`` of ``dask.config`` (default False), so that a configuration file
    can switch it on. As all of Dask's configuration it holds for the whole process: while a block is open in one
    thread, graphs of the others are placed, too.

    Examples
    --------
    >>> with propagate_pools():  # doctest: +SKIP
    ...     difference.compute()
    """

    def __init__(self) -> None:
        activate()
        client = _get_global_client()
        if client is not None and client.status == "running" and not client.asynchronous:
            check_pools(client)
            ensure_guard(client)
        with _propagation:
            self._before = bool(setting("propagate"))
            _propagating.append(self)
            dask.config.set({"meshcompute.propagate": True})

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc_info: object) -> None:
        with _propagation:
            i = _propagating.index(self)
            del _propagating[i]
            if i < len(_propagating):
                # A later one is still open, in another thread for example: it restores what was before this one.
                _propagating[i]._before = self._before
            else:
                dask.config.set({"meshcompute.propagate": self._before})


_propagation = threading.Lock()
_propagating: list[propagate_pools] = []


# ---------------------------------------------------------------------------------------------------------------
# Clients


def current_client(function: str) -> Client:
    """Return this process's client.

    Parameters
    ----------
    function
        Who asks, for the error.

    Raises
    ------
    NoClientError
        There is none.
    """
    try:
        return get_client()
    except ValueError as exc:
        raise NoClientError(function) from exc


def pools_of_client(client: Client) -> dict[str, tuple[str, ...]]:
    """Ask a scheduler for its pools.

    Parameters
    ----------
    client
        A connected client that is not asynchronous.

    Returns
    -------
    dict
        Addresses of the workers by pool.
    """
    return workers_by_pool(client.sync(client.scheduler.identity))


def workers_by_pool(identity: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Sort the workers of a scheduler's identity by pool."""
    pools: dict[str, list[str]] = {}
    for address, worker in identity["workers"].items():
        for name in pools_of_resources(worker["resources"]):
            pools.setdefault(name, []).append(address)
    return {name: tuple(addresses) for name, addresses in sorted(pools.items())}


def check_pools(client: Client) -> None:
    """Raise PoolsMissingError if the cluster has workers and none belongs to a pool."""
    identity = client.sync(client.scheduler.identity)
    if identity["workers"] and not workers_by_pool(identity):
        raise PoolsMissingError(identity["address"], len(identity["workers"]))


def ensure_guard(client: Client) -> None:
    """Install the guard on a client's scheduler now, without waiting for the first graph."""
    client.run_on_scheduler(shipping.Shipment(_InstallGuard(compression_wanted()), with_sources=True))
    _provided(client).add(scheduler_id(client))


class _InstallGuard:
    def __init__(self, compression: str | None) -> None:
        self.compression = compression

    def __call__(self, dask_scheduler: Any = None) -> None:
        planning.install_guard(dask_scheduler, self.compression)


def compression_wanted() -> str | None:
    """Read the setting ``meshcompute.compression`` of this process; None if it has none.

    Raises
    ------
    ValueError
        It is none of the values that there are.
    """
    given = dask.config.get("meshcompute.compression", default=_NOT_SET)
    return None if given is _NOT_SET else mode_of(given)


_NOT_SET = object()


def links_wanted() -> dict[str, Any]:
    """Read the settings ``meshcompute.links`` and ``meshcompute.objective`` of this process, for a request.

    Raises
    ------
    SettingError
        They cannot be read.
    """
    given = setting("links")
    return {"links": None if given is None else parse_links(given), "objective": objective_of(setting("objective"))}


def scheduler_id(client: Client) -> str:
    """``Scheduler.id`` of a client's scheduler, empty while it is not connected."""
    return str(client._scheduler_identity.get("id", ""))


def _provided(client: Client) -> set[str]:
    """Ids of the schedulers that this client has sent the sources to."""
    provided: set[str] = client.__dict__.setdefault("_meshcompute_provided", set())
    return provided


# ---------------------------------------------------------------------------------------------------------------
# Hooks


def check_internals() -> None:
    """Check that Dask has what the hooks take hold of.

    Raises
    ------
    MeshError
        This version of Dask is built in another way.
    """
    missing = [
        name
        for name, is_there in {
            "Client._graph_to_futures(expr, keys, ...)": _takes(
                Client, "_graph_to_futures", "expr", "keys", "resources"
            ),
            "Client.get(dsk, keys, sync, ...)": _takes(Client, "get", "dsk", "keys", "sync"),
            "Client.scatter(data, workers, ...)": _takes(Client, "scatter", "data", "workers"),
            "Client._scatter(data, workers, ...)": _takes(Client, "_scatter", "data", "workers"),
            "dask.tokenize._tokenize": _takes(dask.tokenize, "_tokenize", "args", "kwargs"),
            "dask.tokenize._ENSURE_DETERMINISTIC": hasattr(dask.tokenize, "_ENSURE_DETERMINISTIC"),
            "dask.base._annotations": hasattr(dask.base, "_annotations"),
        }.items()
        if not is_there
    ]
    if missing:
        raise MeshError(
            f"Pools do not work with dask {dask.__version__}: it has no {', '.join(missing)}. "
            "Install a version of dask that this meshcompute names in its requirements, or a newer meshcompute."
        )


def _takes(owner: Any, name: str, *parameters: str) -> bool:
    function = getattr(owner, name, None)
    return function is not None and set(parameters) <= set(inspect.signature(function).parameters)


def install() -> None:
    """Hook what makes this process respect pins. Called once, by :func:`meshcompute.pools.activate`.

    Raises
    ------
    MeshError
        This version of Dask is built in another way.
    """
    check_internals()
    hook_optimizers()
    Client._graph_to_futures = _hooked(Client._graph_to_futures, _graph_to_futures)
    Client.get = _hooked(Client.get, _get)
    Client.scatter = _hooked(Client.scatter, _scatter)
    Client._scatter = _hooked(Client._scatter, _scatter_in_pools)
    dask.tokenize._tokenize = _hooked(dask.tokenize._tokenize, _salted_tokenize)


def hook_optimizers() -> None:
    """Let the optimisers of array, bag and delayed keep pins; one that the user has configured stays in force."""
    for key, optimizer in _OPTIMIZERS.items():
        given = dask.config.get(key, None)
        if given is None:
            dask.config.set({key: optimizer})
        elif callable(given) and given is not optimizer:
            dask.config.set({key: functools.partial(taskgraph.optimize_with, given)})


def _hooked(original: Callable[..., Any], hook: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    return wrapper


def _graph_to_futures(
    original: Callable[..., Any], self: Client, expr: Any, keys: Any, *args: Any, **kwargs: Any
) -> Any:
    """Wrap a graph that has pins, or that is to be placed."""
    is_propagating = bool(setting("propagate"))
    pin = current_pin()
    if pin is UNPINNED and not is_propagating and not taskgraph.has_pins(expr):
        pin = None
    if pin is None and not is_propagating and not taskgraph.has_pins(expr):
        return original(self, expr, keys, *args, **kwargs)
    annotations = dask.get_annotations()
    resources = kwargs.pop("resources", None) or annotations.get("resources") or {}
    names, common = split_resources(resources) if isinstance(resources, Mapping) else ((), {})
    if pin is None and names:  # client.submit(..., resources={"pool-ecmwf": 0}): Dask's own words for a pin
        pin = Pin(names)
    request = planning.Request(
        keys=tuple(keys),
        pin=pin,
        resources=common,
        is_propagating=is_propagating,
        compression=compression_wanted(),
        is_regrouping=bool(setting("regroup-reductions")),
        is_gathered=_is_gathering.get(),
        **links_wanted(),
    )
    identity = scheduler_id(self)
    planned = planning.PlannedExpression(expr, request, identity)
    provided = _provided(self)
    shipment = shipping.Shipment(planned, with_sources=identity not in provided)
    shipment.pack()  # what cannot be pickled is said here, not by Dask about a class of ours
    if is_propagating:
        kwargs["internal_priority"] = None  # relays need one, too: let the scheduler order the graph
    kept = {k: v for k, v in annotations.items() if k not in (ANNOTATION, "resources")}
    if common:
        kept["resources"] = common
    token = dask.base._annotations.set(kept)
    try:
        futures = original(self, shipment, keys, *args, **kwargs)
    finally:
        dask.base._annotations.reset(token)
    provided.add(identity)
    return futures


def _get(original: Callable[..., Any], self: Client, *args: Any, **kwargs: Any) -> Any:
    """Note that the values of a graph go to the client: what must not leave its pool is refused before it is made."""
    given = inspect.signature(original).bind(self, *args, **kwargs).arguments
    token = _is_gathering.set(bool(given.get("sync", True)))
    try:
        return original(self, *args, **kwargs)
    finally:
        _is_gathering.reset(token)


_is_gathering = contextvars.ContextVar("_is_gathering", default=False)


class _InPools:
    """Stands for the workers of a pin's pools until the scheduler has been asked who they are."""

    def __init__(self, pin: Pin) -> None:
        self.pin = pin


def _scatter(
    original: Callable[..., Any], self: Client, data: Any, workers: Any = None, *args: Any, **kwargs: Any
) -> Any:
    pin = current_pin()
    if pin is not None and pin.stays:
        raise UnsupportedPinError(
            "scatter() sends data that is at the client, and this block is for data that never leaves a pool. Scatter "
            "it in a pool() block without never_leave=True, or load it where it must stay."
        )
    if workers is None and pin is not None and pin.pools:
        workers = _InPools(pin)
    return original(self, data, workers, *args, **kwargs)


async def _scatter_in_pools(
    original: Callable[..., Any], self: Client, data: Any, workers: Any = None, *args: Any, **kwargs: Any
) -> Any:
    if isinstance(workers, _InPools):
        pools = workers_by_pool(await self.scheduler.identity())
        wanted = workers.pin.pools
        workers = [address for name in wanted for address in pools.get(name, ())]
        if not workers:
            raise UnknownPoolError(wanted[0], pools, 0.0)
    return await original(self, data, workers, *args, **kwargs)


def _salted_tokenize(original: Callable[..., str], *args: object, **kwargs: object) -> str:
    """Make the same call in two pools two keys.

    Tokens that must be deterministic name Dask's expressions: those are made again on the scheduler, outside of
    any block, and have to come out the same. Dataframes get their pool's name in another way.
    """
    pin = current_pin()
    if pin is not None and pin.pools and not dask.tokenize._ENSURE_DETERMINISTIC.get(None):
        return original(*args, ("pool", *pin.pools), **kwargs)
    return original(*args, **kwargs)
