"""Sovereignty: which values must not leave their pools, and where what reads them may run.

Covers the decision, over a graph with pins: values of tasks pinned with ``never_leave`` stay, and so does all that is
made of them, until a task that was marked by :func:`meshcompute.may_leave`. Does not cover what a scheduler refuses at
run time (:mod:`meshcompute.scheduler.borders`).

Fail closed: nothing that was made of such a value leaves because it is small, reduced or merely different. How much a
mean tells of its inputs is for people to judge, so it takes a word of theirs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from dask._task_spec import GraphNode
from dask.core import toposort
from dask.typing import Key
from dask.utils import key_split

from meshcompute.errors import SovereigntyError
from meshcompute.pools import Pin

__all__ = ["confine", "pin_in_block", "refuse_delivery"]


def pin_in_block(pin: Pin, key: Key, tasks: Mapping[Key, GraphNode]) -> Pin:
    """Give the pin of the surrounding block to a task that has none.

    Parameters
    ----------
    pin
        Pin of the block in which the computation was started.
    key
        Key of the task.
    tasks
        All tasks of the graph.

    Notes
    -----
    What a task makes must not leave if it reads data itself, as what is submitted does. What only works on other tasks
    of its graph (the last step of a ``compute``, for example) stays if those stay.
    """
    if not pin.stays or not any(dep in tasks for dep in tasks[key].dependencies):
        return pin
    return replace(pin, stays=False)


def confine(
    tasks: Mapping[Key, GraphNode], pins: dict[Key, Pin], held: Mapping[Key, tuple[str, ...]]
) -> dict[Key, tuple[str, ...]]:
    """Find the values that must stay, and pin what reads them to where they are.

    Parameters
    ----------
    tasks
        Task by key.
    pins
        Pins by key, those without pools included; changed in place.
    held
        Pools that values which the cluster has already must not leave, by key; only of those that must not.

    Returns
    -------
    dict
        Pools that a value must not leave, by key; values that may leave are not in it.

    Raises
    ------
    SovereigntyError
        A task reads what must not leave a pool, and is pinned elsewhere or reads the same of another pool.
    """
    stays: dict[Key, tuple[str, ...]] = dict(held)
    if not held and not any(pin.stays for pin in {id(pin): pin for pin in pins.values()}.values()):
        return stays
    inputs = {key: {dep for dep in task.dependencies if dep in tasks} for key, task in tasks.items()}
    for key in toposort(dict(tasks), dependencies=inputs):
        pin = pins.get(key)
        confined = [dep for dep in tasks[key].dependencies if dep in stays]
        if not confined:
            if pin is not None and pin.stays and not pin.leaves:
                stays.setdefault(key, pin.pools)
            continue
        allowed = _common([stays[dep] for dep in confined])
        if not allowed:
            raise SovereigntyError(
                _names(confined), sorted({pool for dep in confined for pool in stays[dep]}), _reader(key, pin)
            )
        if pin is not None and pin.pools:
            here = _common([allowed, pin.pools])
            if not here:
                raise SovereigntyError(_names(confined), allowed, _reader(key, pin))
            allowed = here
        leaves = pin is not None and pin.leaves
        pins[key] = Pin(allowed, stays=not leaves, leaves=leaves) if pin is None else replace(pin, pools=allowed)
        if not leaves:
            stays[key] = allowed
    return stays


def refuse_delivery(stays: Mapping[Key, tuple[str, ...]], wanted: Iterable[Key]) -> None:
    """Refuse to bring values to the client that must not leave.

    Parameters
    ----------
    stays
        As of :func:`confine`.
    wanted
        Keys that the client is going to get.

    Raises
    ------
    SovereigntyError
        One of them must not leave its pools.
    """
    refused = [key for key in wanted if key in stays]
    if refused:
        raise SovereigntyError(_names(refused), stays[refused[0]], "the client")


def _common(groups: Collection[tuple[str, ...]]) -> tuple[str, ...]:
    """Names that are in every group, in the order of the first."""
    first, *rest = groups
    return tuple([name for name in first if all(name in group for group in rest)])


def _names(keys: Iterable[Key]) -> str:
    return " and ".join(sorted({repr(str(key_split(key))) for key in keys}))


def _reader(key: Key, pin: Pin | None) -> str:
    where = f" in pool {pin}" if pin is not None and pin.pools else ""
    return f"{str(key_split(key))!r}{where}"
