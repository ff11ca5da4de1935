"""The errors of meshcompute.

Our tree::

    MeshError
    ├── PoolNameError (also ValueError)          a name that cannot be a pool
    ├── NotACollectionError (also TypeError)     something that is not a Dask collection
    ├── UnsupportedPinError (also TypeError)     a collection or call that cannot carry a pin
    ├── NoClientError (also RuntimeError)        no Dask client, and one is needed
    ├── PoolsMissingError (also RuntimeError)    a cluster none of whose workers has a pool
    ├── UnknownPoolError (also RuntimeError)     work is pinned to a pool that nobody has
    │   └── UnmetDemandError                     ... or that has no worker with what else the work asks for
    ├── SovereigntyError (also RuntimeError)     data that must not leave a pool is wanted elsewhere
    ├── SettingError (also ValueError)           a setting that cannot be read
    ├── VersionMismatchError (also RuntimeError) client and scheduler run different meshcompute
    └── MissingDependencyError (also ImportError) an optional package or program is not installed

    those of one module only, next to what raises them:
    ├── embedded.MeshStartError, localports.PortTakenError, clusterrecord.UnknownClusterError
    ├── plan.MeshPlanError, scaling.ScalingError
    ├── lab.errors.LabError and below            a lab on this machine
    └── sites.SiteError                          a site that cannot be had: SiteAddressError, SiteUnreachableError,
                                                 SiteRefusedError, SiteStartError

Every message says what failed, with which value, and what to do next. Facts are attributes, and every error
survives pickling, because Dask carries errors between processes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

__all__ = [
    "MeshError",
    "MissingDependencyError",
    "NoClientError",
    "NotACollectionError",
    "PoolNameError",
    "PoolsMissingError",
    "SettingError",
    "SovereigntyError",
    "UnknownPoolError",
    "UnmetDemandError",
    "UnsupportedPinError",
    "VersionMismatchError",
]


class MeshError(Exception):
    """Root of everything that meshcompute raises on purpose."""


class PoolNameError(MeshError, ValueError):
    """A name that Dask's worker resources cannot carry as ``pool-<name>``.

    Parameters
    ----------
    name
        The name that was given.
    reason
        Why it cannot be used.
    """

    def __init__(self, name: object, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name!r} cannot be the name of a pool: {self.reason}."


class NotACollectionError(MeshError, TypeError):
    """An object that is not a Dask collection where one is needed.

    Parameters
    ----------
    function
        The function that was called.
    type_name
        Type of the object that it was given.
    """

    def __init__(self, function: str, type_name: str) -> None:
        super().__init__(function, type_name)
        self.function = function
        self.type_name = type_name

    def __str__(self) -> str:
        return (
            f"{self.function}() takes Dask collections (dask.array, xarray with chunks, dataframe, bag, delayed), "
            f"not {self.type_name}. If the data should be lazy, open it with chunks={{}}."
        )


class UnsupportedPinError(MeshError, TypeError):
    """A collection or a call that cannot carry a pin, so that the pin would be lost."""


class NoClientError(MeshError, RuntimeError):
    """No Dask client in this process where one is needed.

    Parameters
    ----------
    function
        The function that was called.
    """

    def __init__(self, function: str) -> None:
        super().__init__(function)
        self.function = function

    def __str__(self) -> str:
        return f"{self.function}() needs a Dask client: connect one first, for example Client('localhost:8786')."


class PoolsMissingError(MeshError, RuntimeError):
    """None of the cluster's workers belongs to a pool.

    Parameters
    ----------
    address
        The scheduler's address.
    n_workers
        How many workers it has.
    """

    def __init__(self, address: str, n_workers: int) -> None:
        super().__init__(address, n_workers)
        self.address = address
        self.n_workers = n_workers

    def __str__(self) -> str:
        return (
            f"None of the {self.n_workers} workers of the cluster at {self.address} belongs to a pool. "
            "Start each worker with its site's resource, for example: "
            f"dask worker {self.address} --resources pool-ecmwf=1"
        )


class UnknownPoolError(MeshError, RuntimeError):
    """Work is pinned to a pool that no worker of the cluster has.

    Parameters
    ----------
    pool
        Name of the pool that is missing, without the prefix ``pool-``.
    pools
        Names of the pools that exist.
    timeout_seconds
        How long the work waited for a worker.
    key
        One of the tasks that waited, if it is known.
    """

    def __init__(self, pool: str, pools: Iterable[str], timeout_seconds: float, key: Any = None) -> None:
        self.pool = pool
        self.pools = tuple(sorted(pools))
        self.timeout_seconds = timeout_seconds
        self.key = key
        super().__init__(pool, self.pools, timeout_seconds, key)

    def __str__(self) -> str:
        task = "" if self.key is None else f" (task {self.key!r})"
        exist = ", ".join(self.pools) if self.pools else "none"
        return (
            f"No worker of pool {self.pool!r} came within {self.timeout_seconds:g} s, and work is pinned to it{task}. "
            f"Pools of this cluster: {exist}. Correct the name, or start a worker there with "
            f"--resources pool-{self.pool}=1 and compute again."
        )


class UnmetDemandError(UnknownPoolError):
    """Work is pinned to a pool, and no worker of it offers what else the work asks for.

    Parameters
    ----------
    pool
        Name of the pool.
    pools
        Names of the pools that exist.
    timeout_seconds
        How long the work waited.
    key
        One of the tasks that waited.
    demands
        What it asks for besides the pool: resources with amounts, and names of workers.
    """

    def __init__(  # noqa: PLR0917 - errors are unpickled from positional arguments
        self,
        pool: str,
        pools: Iterable[str],
        timeout_seconds: float,
        key: Any = None,
        demands: Mapping[str, float] | None = None,
        workers: Collection[str] = (),
    ) -> None:
        super().__init__(pool, pools, timeout_seconds, key)
        self.demands = dict(demands or {})
        self.workers = tuple(sorted(workers))
        self.args = (pool, self.pools, timeout_seconds, key, self.demands, self.workers)

    def __str__(self) -> str:
        wanted = [f"{name}={amount:g}" for name, amount in sorted(self.demands.items())]
        if self.workers:
            wanted.append("being one of " + ", ".join(self.workers))
        return (
            f"Pool {self.pool!r} has workers, but for {self.timeout_seconds:g} s none with {' and '.join(wanted)}, "
            f"which task {self.key!r} asks for. Start a worker of this pool that offers it, for example with "
            f'--resources "pool-{self.pool}=1 {" ".join(w for w in wanted if "=" in w)}", or ask for less.'
        )


class SovereigntyError(MeshError, RuntimeError):
    """Data that must not leave its pools is wanted elsewhere.

    Parameters
    ----------
    data
        Name of the data: key or kind of the task that makes it.
    pools
        The pools that it may not leave.
    reader
        Who wants it, and where.
    """

    def __init__(self, data: str, pools: Iterable[str], reader: str) -> None:
        self.data = data
        self.pools = tuple(pools)
        self.reader = reader
        super().__init__(data, self.pools, reader)

    def __str__(self) -> str:
        here = " and ".join(repr(pool) for pool in self.pools) or "any pool"
        return (
            f"{self.data} must not leave {'pool' if len(self.pools) == 1 else 'the pools'} {here}, and {self.reader} "
            "wants it. What may leave, a reduction of it for example, has to be said to: meshcompute.may_leave(x). "
            "Without that, work on it inside the pool, and write the result there."
        )


class SettingError(MeshError, ValueError):
    """A setting of meshcompute that cannot be read.

    Parameters
    ----------
    name
        Its name below ``meshcompute.``.
    value
        What stands there.
    reason
        What is wrong with it, and what would do.
    """

    def __init__(self, name: str, value: object, reason: str) -> None:
        self.name = name
        self.value = value
        self.reason = reason
        super().__init__(name, value, reason)

    def __str__(self) -> str:
        return f"The setting meshcompute.{self.name} is {self.value!r}: {self.reason}."


class VersionMismatchError(MeshError, RuntimeError):
    """Client and scheduler run different versions of meshcompute.

    Parameters
    ----------
    client_version
        Version at the client.
    scheduler_version
        Version that the scheduler's process has loaded.
    """

    def __init__(self, client_version: str, scheduler_version: str) -> None:
        super().__init__(client_version, scheduler_version)
        self.client_version = client_version
        self.scheduler_version = scheduler_version

    def __str__(self) -> str:
        return (
            f"This client has meshcompute {self.client_version}, the scheduler's process has {self.scheduler_version}. "
            "Install the same version on both (pip install meshcompute==<version>) and restart the scheduler."
        )


class MissingDependencyError(MeshError, ImportError):
    """A package or program that this function needs is not installed.

    Parameters
    ----------
    function
        The function that was called.
    missing
        What is missing.
    cure
        The command that installs it.
    """

    def __init__(self, function: str, missing: str, cure: str) -> None:
        super().__init__(function, missing, cure)
        self.function = function
        self.missing = missing
        self.cure = cure

    def __str__(self) -> str:
        return f"{self.function}() needs {self.missing}, which is not installed here. Install it: {self.cure}"
