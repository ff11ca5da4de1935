"""Calls of a function at a site: on a worker of its pool, ahead of the work that waits there.

Covers which site can be asked, sending the call, and its error with the site named. Does not cover what is called.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from distributed import Client, Future

from meshcompute.clients import current_client, pool, workers_by_pool
from meshcompute.data.siteside import SiteCall, unseal_error
from meshcompute.errors import PoolsMissingError, UnknownPoolError
from meshcompute.pools import validate_pool_name
from meshcompute.settings import setting_seconds
from meshcompute.shipping import by_value

__all__ = ["Site", "call_at", "names_of_site", "result_at", "submit_at"]

#: A pool, or several that all have the data.
Site = str | tuple[str, ...]

# Metadata is small, and a person waits for it: it goes before any amount of work that was submitted earlier.
_PRIORITY = 1_000_000

# How long a site may be missing while others are there, before the name is taken for wrong.
_GRACE_SECONDS = 2.0


def names_of_site(site: Site) -> tuple[str, ...]:
    """Names of the pools that a site stands for.

    Parameters
    ----------
    site
        Name of a pool, or several names.

    Raises
    ------
    PoolNameError
        There is no name, or one that no pool can have.
    """
    names = (site,) if isinstance(site, str) else tuple(site)
    if not names:
        validate_pool_name("")
    return tuple(dict.fromkeys(validate_pool_name(name) for name in names))


def client_for(function: str, sites: Sequence[str]) -> Client:
    """Return the current client, once its cluster has one of the sites.

    Parameters
    ----------
    function
        Who asks, for the error.
    sites
        Names of pools, of which one is enough.

    Returns
    -------
    distributed.Client
        The client.

    Raises
    ------
    NoClientError
        There is no client.
    PoolsMissingError
        The cluster has workers, and none belongs to a pool.
    UnknownPoolError
        None of the sites is among the cluster's pools.

    Notes
    -----
    A cluster that has no worker yet, or fewer than it has asked for, is starting: it gets the time of the setting
    ``meshcompute.missing-pool-timeout``. Otherwise the name is most likely wrong, and the wait is short.
    """
    client = current_client(function)
    start = time.monotonic()
    while True:
        identity = client.sync(client.scheduler.identity)
        pools = workers_by_pool(identity)
        if any(site in pools for site in sites):
            return client
        is_starting = len(getattr(client.cluster, "plan", ())) > len(identity["workers"]) or not identity["workers"]
        waited = time.monotonic() - start
        if waited >= (setting_seconds("missing-pool-timeout") if is_starting else _GRACE_SECONDS):
            if not pools and identity["workers"]:
                raise PoolsMissingError(identity["address"], len(identity["workers"]))
            raise UnknownPoolError(sites[0], pools, waited)
        time.sleep(0.1)


def submit_at(client: Client, sites: Sequence[str], call: SiteCall) -> Future:
    """Send a call to a site.

    Parameters
    ----------
    client
        The client.
    sites
        Names of pools; a worker of any of them makes the call.
    call
        What to call.

    Returns
    -------
    distributed.Future
        For :func:`result_at`.
    """
    key = f"{call.function.__name__}-{'-'.join(sites)}-{uuid.uuid4()}"
    with pool(*sites):
        shipped = by_value(call, [call.function.__module__])
        return client.submit(shipped, key=key, pure=False, priority=_PRIORITY)


def result_at(future: Future, sites: Sequence[str], subject: str) -> Any:
    """Wait for what a call returns.

    Parameters
    ----------
    future
        From :func:`submit_at`.
    sites
        Where it was sent, for the error.
    subject
        What it was about (a path), for the error.

    Raises
    ------
    Exception
        Whatever was raised at the site, as it is, with a note that names the site.
    """
    try:
        value, error = future.result()
        if error is not None:
            raise unseal_error(error)
        return value
    except Exception as exc:
        # Here and not at the site: an exception with a __reduce__ of its own may lose its notes on the way.
        exc.add_note(f"While site {' or '.join(map(repr, sites))} was asked for {subject}.")
        raise


def call_at(function: str, sites: Sequence[str], call: SiteCall, subject: str) -> Any:
    """Call at a site and wait for what it returns.

    Parameters
    ----------
    function
        Who asks, for the error when there is no client.
    sites
        Names of pools; a worker of any of them makes the call.
    call
        What to call.
    subject
        What it is about (a path), for the error.
    """
    return result_at(submit_at(client_for(function, sites), sites, call), sites, subject)
