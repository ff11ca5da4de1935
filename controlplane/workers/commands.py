"""Decide what runs in a unit: the command lines, the environment and the limits of Dask's processes. Pure.

Covers the plan that the keeper (:mod:`.entrypoint`) carries out. Does not cover what surrounds it: containers
(:mod:`.docker`), namespaces of processes (:mod:`.process`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from controlplane.workers.base import WorkerSpec
from controlplane.workers.entrypoint import EXIT_LEASE_ENDED, EXIT_NO_ADDRESS, EXIT_NOT_REPLACED

__all__ = ["SCHEDULER_DASHBOARD_PORT", "SCHEDULER_PORT", "plan_unit", "reason_of", "spill_bytes_of"]

SCHEDULER_PORT = 8786  # on the data plane, in a network of its own
SCHEDULER_DASHBOARD_PORT = 8787
ADDRESS_TIMEOUT_SECONDS = 60.0  # attaching the link takes well below 1 s; the daemon may be restarting
DEATH_TIMEOUT_SECONDS = 60  # a worker without scheduler exits, and is started again while the lease lives
COMM_TIMEOUT_SECONDS_MIN = 60.0
WORKER_TTL_SECONDS_MIN = 300.0  # distributed.scheduler.worker-ttl: its default
LOG_BYTES_MAX = 16 << 20
SPILL_SHARE = 4  # a process may spill a quarter of its memory

# As distributed's nanny sets them for its workers (distributed.nanny.pre-spawn-environ); ours have no nanny.
_PRE_SPAWN = {
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}

# What `dask worker` imports before it looks at its options.
_IMPORTS_OF_WORKERS = ["dask.cli", "distributed.cli.dask_worker"]


def spill_bytes_of(spec: WorkerSpec) -> int:
    """How much one process of a unit may spill, in bytes."""
    return spec.memory_bytes_per_process // SPILL_SHARE


def reason_of(exit_code: int | None) -> str:
    """Say for people why a unit ended.

    Parameters
    ----------
    exit_code
        Of its keeper, or None if that is not known.

    Returns
    -------
    str
        The end of a sentence about the unit.
    """
    known = {
        None: "it has ended",
        0: "it was told to end",
        EXIT_LEASE_ENDED: "its lease has ended",
        EXIT_NOT_REPLACED: "its process ended: see its log",
        EXIT_NO_ADDRESS: f"its address on the data plane did not appear in {ADDRESS_TIMEOUT_SECONDS:g} s",
    }
    return known.get(exit_code, f"it ended with code {exit_code}: see its log")


def plan_unit(
    spec: WorkerSpec,
    *,
    python: str,
    scratch: str,
    grace_seconds: float,
    nursery: str,
    listener: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Plan what the keeper of a unit does.

    Parameters
    ----------
    spec
        The unit.
    python
        The interpreter of Dask's processes, as they see it.
    scratch
        A folder that they can write, as they see it.
    grace_seconds
        How long they may take to end by themselves.
    nursery
        The file of :mod:`.nursery`, as workers see it.
    listener
        The file of :mod:`.locallistener`, as a scheduler sees it, if it is to listen on its own 127.0.0.1, too.
    environment
        Further variables, which win over ours.

    Returns
    -------
    dict
        What :class:`.entrypoint.Keeper` takes; it can be written as JSON.
    """
    surroundings = {**_environment(spec), **(environment or {})}
    has_nursery = spec.role == "worker" and len(spec.process_names) > 1  # for one there is nothing to share
    return {
        "address": None if spec.address is None else str(spec.address),
        "address_timeout_seconds": ADDRESS_TIMEOUT_SECONDS,
        "grace_seconds": grace_seconds,
        "scratch": scratch,
        "log_bytes_max": LOG_BYTES_MAX,
        "nursery": {"argv": [python, nursery], "imports": _IMPORTS_OF_WORKERS} if has_nursery else None,
        "replaces": spec.role == "worker",  # what a scheduler knew is lost with it
        "processes": [
            {"name": name, "argv": _command(spec, name, python, scratch, listener), "environment": surroundings}
            for name in spec.process_names
        ],
    }


def _command(spec: WorkerSpec, name: str, python: str, scratch: str, listener: str | None) -> list[str]:
    if spec.role == "scheduler":
        return [python, "-m", "dask", "scheduler", *_scheduler_options(spec, listener)]
    host = "127.0.0.1" if spec.address is None else f"[{spec.address}]"
    command = [python, "-m", "dask", "worker", str(spec.scheduler_address), "--name", name, "--host", host]
    command += ["--resources", f"pool-{spec.pool}=1", "--nthreads", str(spec.threads_per_process)]
    command += ["--memory-limit", str(spec.memory_bytes_per_process), "--local-directory", f"{scratch}/{name}"]
    # The keeper does what a nanny would; without dashboards a worker starts in half the time. Its HTTP server stays,
    # and by default it listens to everybody.
    command += ["--no-nanny", "--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
    return [*command, "--death-timeout", str(DEATH_TIMEOUT_SECONDS)]


def _scheduler_options(spec: WorkerSpec, listener: str | None) -> list[str]:
    if spec.address is None:
        host, port, dashboard_port = "127.0.0.1", spec.client_port, spec.dashboard_port
    else:
        host, port, dashboard_port = f"[{spec.address}]", SCHEDULER_PORT, SCHEDULER_DASHBOARD_PORT
    options = ["--host", host, "--port", str(port)]
    if spec.dashboard_port is None:
        options += ["--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
    else:
        options += ["--dashboard", "--dashboard-address", f"127.0.0.1:{dashboard_port}"]
    if listener is not None:
        options += ["--preload", listener]
    return options


def _environment(spec: WorkerSpec) -> dict[str, str]:
    # A link that is cut for less than the lease must lose no worker: TCP waits longer than any lease lasts.
    timeout = max(2 * spec.deadline_seconds, COMM_TIMEOUT_SECONDS_MIN)
    return {
        **_PRE_SPAWN,
        "POOL_NAME": spec.pool,
        "PYTHONUNBUFFERED": "1",
        "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": f"{timeout:g}s",
        "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": f"{max(timeout, WORKER_TTL_SECONDS_MIN):g}s",
        "DASK_DISTRIBUTED__WORKER__MEMORY__MAX_SPILL": str(spill_bytes_of(spec)),
    }
