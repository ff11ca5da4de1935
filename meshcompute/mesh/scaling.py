"""How many workers a site should have.

Covers a person's wish (a total, or a number for each site) in units of containers, and a simple policy for a site that
grows while its workers are busy and shrinks while they are idle; pure. Does not cover asking for them
(:mod:`meshcompute.mesh.cluster`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from meshcompute.errors import MeshError

__all__ = ["ScalingError", "SiteLoad", "adapted_containers", "containers_for", "share_workers"]

BUSY_LOOKS = 2  # a worker is busy for a moment with anything
IDLE_LOOKS = 3  # a pause between two computations must not cost a site its workers


class ScalingError(MeshError, ValueError):
    """A number of workers that cannot be; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteLoad:
    """What a site's workers do now, and how often in a row they were seen idle, or all busy with more waiting.

    ``n_waiting`` are tasks that workers hold. The scheduler gives a worker few more than it has threads and keeps the
    rest, so any that wait where all threads are busy mean that there is more.
    """

    containers: int
    n_threads: int
    n_executing: int
    n_waiting: int
    n_idle_looks: int = 0
    n_busy_looks: int = 0


def share_workers(total: int, pools: Mapping[int, str]) -> dict[int, int]:
    """Share a number of workers among sites, as evenly as it goes, the first sites first.

    Parameters
    ----------
    total
        Workers of all sites together.
    pools
        Pool by number of the site.

    Returns
    -------
    dict
        Workers by number of the site.

    Raises
    ------
    ScalingError
        There are fewer workers than sites.
    """
    if total < len(pools):
        named = ", ".join(pools.values())
        raise ScalingError(
            f"{total} workers are too few for {len(pools)} sites ({named}): each keeps one container at least; "
            "close the cluster to have none."
        )
    each, rest = divmod(total, len(pools))
    return {site: each + (number < rest) for number, site in enumerate(sorted(pools))}


def containers_for(workers: int, processes_per_container: int) -> int:
    """Round workers up to whole containers.

    Parameters
    ----------
    workers
        Worker processes; at least 1.
    processes_per_container
        How many of them each container runs.

    Returns
    -------
    int
        Containers.

    Raises
    ------
    ScalingError
        There would be none.
    """
    if workers < 1:
        raise ScalingError(
            f"A site keeps one container at least, and {workers} workers were asked for; close the cluster."
        )
    return -(-workers // processes_per_container)


def adapted_containers(load: SiteLoad, *, minimum: int, maximum: int) -> int:
    """Say how many containers a site should have, from what its workers do.

    Parameters
    ----------
    load
        What they do.
    minimum, maximum
        Containers.

    Returns
    -------
    int
        Twice as many after two looks at busy workers with tasks that wait; one fewer after three at idle ones.
    """
    wanted = load.containers
    if load.n_busy_looks >= BUSY_LOOKS:
        wanted = 2 * load.containers
    elif load.n_idle_looks >= IDLE_LOOKS:
        wanted = load.containers - 1
    return max(minimum, min(maximum, wanted))
