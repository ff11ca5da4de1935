"""Settings of meshcompute and their defaults, as keys of Dask's own configuration.

Covers reading: every setting is read when it is used, so that ``dask.config.set`` works at any time. Does not
cover writing or files: ``dask.config`` does that (YAML files, ``DASK_MESHCOMPUTE__...`` in the environment).
The scheduler's process reads its own configuration, not the client's.
"""

from __future__ import annotations

from typing import Any

import dask
from dask.utils import parse_timedelta

__all__ = ["DEFAULTS", "setting", "setting_seconds"]

DEFAULTS: dict[str, Any] = {
    # Place tasks that have no pin (what propagate_pools() switches on).
    "propagate": False,
    # How long work that is pinned to a pool waits for the pool's first worker before it fails.
    "missing-pool-timeout": "30s",
    # What workers do to values for other sites: auto, off, or the name of a codec (meshcompute.packing).
    "compression": "auto",
    # Bandwidth, latency and price of links between pools (meshcompute.links.parse_links); None: what is measured.
    "links": None,
    # What plans are to have little of: bytes, money or seconds.
    "objective": "bytes",
    # Let each site reduce its own part first where data of several sites is reduced together (graphs.regrouping).
    "regroup-reductions": True,
}


def setting(name: str) -> Any:
    """Read one setting.

    Parameters
    ----------
    name
        Its name below ``meshcompute.``, one of :data:`DEFAULTS`.

    Returns
    -------
    object
        The configured value, or the default.
    """
    return dask.config.get(f"meshcompute.{name}", default=DEFAULTS[name])


def setting_seconds(name: str) -> float:
    """Read one setting that is a duration.

    Parameters
    ----------
    name
        Its name below ``meshcompute.``.

    Returns
    -------
    float
        The duration in seconds.

    Raises
    ------
    ValueError
        The configured text is not a duration.
    """
    return float(parse_timedelta(setting(name), default="seconds"))
