"""Pools and pins: names, the pin that is current in this context, and keys salted with it.

Covers what a pin is and which one holds where a line of the user's program stands. Does not cover how a pin
reaches Dask's graphs (:mod:`meshcompute.graphs.taskgraph`), clients (:mod:`meshcompute.clients`) or schedulers.
"""

from __future__ import annotations

import importlib
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import dask

from meshcompute.errors import PoolNameError

__all__ = [
    "ANNOTATION",
    "PLAN",
    "POOL_PREFIX",
    "UNPINNED",
    "Held",
    "Pin",
    "current_pin",
    "pin_of_annotations",
    "pools_of_resources",
    "resource_of",
    "split_resources",
    "validate_pool_name",
]

#: A worker belongs to pool x when it has the resource ``pool-x``; the name is the published prototype's.
POOL_PREFIX = "pool-"

#: The annotation that carries a pin. A key that Dask does not know stops blockwise fusion across pools
#: (``dask.blockwise._can_fuse_annotations``).
ANNOTATION = "pool"

#: Where a plan travels among the annotations of a graph: ``{PLAN: {PLAN: held by key}}``. Not as annotations of single
#: tasks: Dask would take those apart for every task, on the scheduler's event loop.
PLAN = "meshcompute-plan"

# ``dask worker --resources`` splits its text at commas and white space, then at "=".
_UNUSABLE = re.compile(r"[\s,=\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class Pin:
    """Where a task must run: one of these pools, and what else it asks of a worker.

    Attributes
    ----------
    pools
        Names of the pools where the data is. Several names are replicas: the planner picks. No name means
        "no pin, whatever surrounds it" (``pool(None)``).
    resources
        Other worker resources that the task asks for, as sorted (name, amount) pairs.
    stays
        The value, and what is made of it, must not leave these pools.
    leaves
        The value may leave, whatever it was made of.

    Notes
    -----
    Unpickling a pin makes this process respect pins: a collection that was pinned elsewhere must not lose its
    pin because nobody called ``pool()`` here.
    """

    pools: tuple[str, ...]
    resources: tuple[tuple[str, float], ...] = ()
    stays: bool = False
    leaves: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive_pin, (self.pools, self.resources, self.stays, self.leaves)

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return "meshcompute.Pin", self.pools, self.resources, self.stays, self.leaves

    def __str__(self) -> str:
        return " or ".join(self.pools) or "no pool"


#: The pin of ``pool(None)``.
UNPINNED = Pin(())


class Held(dict[str, float]):
    """What a task that is held to a pool asks of its worker: worker resources, name to amount.

    A scheduler keeps it as the task's ``resource_restrictions``; being of this class, and nothing else, makes a task
    ours. One object serves all tasks that ask for the same: a million of their own would be slow and large.

    Parameters
    ----------
    pool
        Name of the pool.
    demands
        Other worker resources, name to amount; pools among them are left out.
    is_pinned
        Pinned there by its user: it may not leave the pool if that is lost.
    is_fetching
        It reads a value of another pool: stolen half-way, it would fetch that again.
    stays
        Pools that its value must not leave; none: it may go anywhere.
    leaves
        Its value may leave, although it reads some that must not.
    replicas
        Pools that its user named, if they are several: it may move among them.

    Attributes
    ----------
    lane
        For the scheduler's own use: the workers that can meet it.
    """

    __slots__ = ("is_fetching", "is_pinned", "lane", "leaves", "pool", "replicas", "stays")

    def __init__(
        self,
        pool: str,
        demands: Mapping[str, float] | None = None,
        *,
        is_pinned: bool,
        is_fetching: bool = False,
        stays: tuple[str, ...] = (),
        leaves: bool = False,
        replicas: tuple[str, ...] = (),
    ) -> None:
        rest = {name: amount for name, amount in (demands or {}).items() if not name.startswith(POOL_PREFIX)}
        super().__init__({POOL_PREFIX + pool: 0, **rest})
        self.pool = pool
        self.is_pinned = is_pinned
        self.is_fetching = is_fetching
        self.stays = stays
        self.leaves = leaves
        self.replicas = replicas
        self.lane: Any = None

    def moved(self, pool: str, *, is_fetching: bool) -> Held:
        """Say the same of another pool.

        Parameters
        ----------
        pool
            Name of the pool.
        is_fetching
            Whether a task there reads a value of another pool.
        """
        return Held(
            pool,
            self,
            is_pinned=self.is_pinned,
            is_fetching=is_fetching,
            stays=self.stays,
            leaves=self.leaves,
            replicas=self.replicas,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)  # elsewhere it is a plain dictionary, as Dask sends it to workers


def _receive_pin(
    pools: tuple[str, ...], resources: tuple[tuple[str, float], ...], stays: bool = False, leaves: bool = False
) -> Pin:
    activate()
    return Pin(pools, resources, stays, leaves)


_is_active = False
_activation = threading.RLock()


def activate() -> None:
    """Make this process respect pins. Idempotent and cheap after the first call.

    Notes
    -----
    This is the one place that reaches up a layer: what has to be hooked lives in :mod:`meshcompute.clients`,
    and a pin that arrives by pickle in a process that never imported it must still be respected.
    """
    global _is_active  # noqa: PLW0603 - one flag of the process
    if not _is_active:
        with _activation:  # hooked twice, by two threads at once, a graph would be planned twice
            if not _is_active:
                importlib.import_module("meshcompute.clients").install()
                _is_active = True


def validate_pool_name(name: object) -> str:
    """Check a pool's name.

    Parameters
    ----------
    name
        The name, without the prefix ``pool-``.

    Returns
    -------
    str
        The same name.

    Raises
    ------
    PoolNameError
        It is no text, empty, or holds a character that ``dask worker --resources`` cannot carry.
    """
    if not isinstance(name, str):
        raise PoolNameError(name, f"a name is text, not {type(name).__name__}")
    if not name:
        raise PoolNameError(name, 'it is empty; pool(None) means "no pin"')
    if match := _UNUSABLE.search(name):
        raise PoolNameError(name, f"{match.group()!r} cannot be part of a Dask worker resource")
    if name.startswith(POOL_PREFIX):
        raise PoolNameError(name, f"leave out the prefix {POOL_PREFIX!r}: write {name.removeprefix(POOL_PREFIX)!r}")
    return name


def resource_of(pool: str) -> str:
    """Name of the worker resource that stands for a pool."""
    return POOL_PREFIX + pool


def pools_of_resources(resources: Iterable[str] | None) -> tuple[str, ...]:
    """Names of the pools among the names of resources, sorted."""
    return tuple(sorted(r.removeprefix(POOL_PREFIX) for r in resources or () if r.startswith(POOL_PREFIX)))


def split_resources(resources: Mapping[str, float]) -> tuple[tuple[str, ...], dict[str, float]]:
    """Split what a task asks for into pools and the rest.

    Parameters
    ----------
    resources
        Worker resources, name to amount.

    Returns
    -------
    tuple of str
        Pools, sorted.
    dict
        All other resources.
    """
    rest = {name: amount for name, amount in resources.items() if not name.startswith(POOL_PREFIX)}
    return pools_of_resources(resources), rest


def pin_of_annotations(annotations: Mapping[str, Any] | None) -> Pin | None:
    """Read the pin that a set of annotations stands for.

    Parameters
    ----------
    annotations
        Annotations of a layer, a task or the surrounding block.

    Returns
    -------
    Pin or None
        None where nothing is said about pools.

    Notes
    -----
    ``dask.annotate(resources={"pool-ecmwf": 1})``, the long form of the reference, counts as a pin. The
    annotation ``pool`` wins over it. Resources given as a function of the key are left to Dask.
    """
    if not annotations:
        return None
    resources = annotations.get("resources")
    pools, rest = split_resources(resources) if isinstance(resources, Mapping) else ((), {})
    value = annotations.get(ANNOTATION)
    pin = value if isinstance(value, Pin) else None
    if pin is None and isinstance(value, Mapping):  # the plain form that travels to the scheduler
        name = value.get("name")
        if name and not value.get("pinned"):
            return None  # the planner's own choice
        pin = Pin((name,)) if name else UNPINNED
    if pin is None:
        if not pools:
            return None
        pin = Pin(pools)
    if pin.pools and rest and not pin.resources:
        pin = replace(pin, resources=tuple(sorted(rest.items())))
    return pin


def current_pin() -> Pin | None:
    """Return the pin of the innermost ``pool()`` block around this line, None outside of any."""
    return pin_of_annotations(dask.get_annotations())
