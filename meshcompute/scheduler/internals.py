"""What pools rely on inside distributed's scheduler, compared with what is installed.

Covers the list of those internals and :func:`check_internals`. A part of the one door to distributed's scheduler
internals. Does not cover what is done with them (:mod:`meshcompute.scheduler.state`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import distributed
from distributed import scheduler as scheduler_module
from distributed.scheduler import Scheduler, TaskState, WorkerState

from meshcompute.errors import MeshError
from meshcompute.scheduler.extensions import EXTENSIONS

__all__ = ["check_internals"]

# What we override or call, with the parameters that we rely on.
_METHODS: dict[str, tuple[str, ...]] = {
    "_add_to_processing": ("ts", "ws", "stimulus_id"),
    "_apply_annotations": ("tasks", "annotations_by_type", "global_annotations"),
    "_create_taskstate_from_graph": ("dsk", "submitting_task", "annotations_by_type"),
    "_task_to_msg": ("ts",),
    "_transition_no_worker_processing": ("key", "stimulus_id"),
    "_transition_processing_memory": ("key", "stimulus_id", "worker", "nbytes"),
    "_transition_queued_processing": ("key", "stimulus_id"),
    "_transition_waiting_processing": ("key", "stimulus_id"),
    "_transition_waiting_queued": ("key", "stimulus_id"),
    "add_resources": ("worker", "resources"),
    "decide_worker_non_rootish": ("ts",),
    "gather": ("keys", "serializers"),
    "gather_on_worker": ("worker_address", "who_has"),
    "get_comm_cost": ("ts", "ws"),
    "get_who_has": ("keys",),
    "handle_request_refresh_who_has": ("keys", "worker", "stimulus_id"),
    "heartbeat_worker": ("address", "metrics"),
    "handle_worker_status_change": ("status", "worker", "stimulus_id"),
    "is_rootish": ("ts",),
    "rebalance": ("keys",),
    "remove_resources": ("worker",),
    "replicate": ("keys",),
    "request_acquire_replicas": ("addr", "keys", "stimulus_id"),
    "stimulus_queue_slots_maybe_opened": ("stimulus_id",),
    "transition": ("key", "finish", "stimulus_id"),
    "transitions": ("recommendations", "stimulus_id"),
    "update_graph": ("client", "expr_ser", "keys"),
    "valid_workers": ("ts",),
    "validate_queued": ("key",),
    "worker_objective": ("ts", "ws"),
}
_ATTRIBUTES: dict[Any, str] = {
    Scheduler: "WORKER_SATURATION extensions idle_task_count n_tasks plugins queued resources running tasks unrunnable "
    "workers",
    TaskState: (
        "_queueable actor annotations dependencies dependents group host_restrictions loose_restrictions priority "
        "processing_on resource_restrictions run_spec waiters who_has worker_restrictions"
    ),
    WorkerState: "address has_what nthreads processing resources status",
}
# Of a living scheduler only: they are no slots.
_INSTANCE_ATTRIBUTES = (
    "bandwidth handlers periodic_callbacks rootish_tg_dependencies_threshold rootish_tg_threshold stream_comms "
    "stream_handlers task_prefixes"
)
_TRANSITIONS = {
    ("released", "waiting"),
    ("waiting", "processing"),
    ("waiting", "queued"),
    ("waiting", "no-worker"),
    ("queued", "processing"),
    ("queued", "released"),
    ("no-worker", "processing"),
    ("no-worker", "released"),
    ("no-worker", "erred"),
    ("processing", "memory"),
}


def check_internals(scheduler: Any = None) -> None:
    """Compare what pools rely on with the distributed that is installed.

    Parameters
    ----------
    scheduler
        A living scheduler, of which more can be compared than of the class.

    Raises
    ------
    MeshError
        Something is missing or has other parameters. Nothing has been changed.
    """
    missing = [f"Scheduler.{name}" for name, names in _METHODS.items() if not _accepts(Scheduler, name, names)]
    for kind, attributes in _ATTRIBUTES.items():
        missing += [f"{kind.__name__}.{name}" for name in attributes.split() if not hasattr(kind, name)]
    if scheduler is not None:
        missing += [f"Scheduler().{name}" for name in _INSTANCE_ATTRIBUTES.split() if not hasattr(scheduler, name)]
    table = getattr(Scheduler, "_TRANSITIONS_TABLE", {})
    missing += [f"the transition {start} to {finish}" for start, finish in _TRANSITIONS - set(table)]
    if not hasattr(scheduler_module, "_worker_full"):
        missing.append("scheduler._worker_full")
    for extension in EXTENSIONS.values():
        base = extension.__bases__[0]
        for name, method in vars(extension).items():
            if inspect.isfunction(method) and hasattr(method, "overrides"):
                names = tuple(inspect.signature(method).parameters)[1:]
                if not _accepts(base, name, names):
                    missing.append(f"{base.__name__}.{name}")
    if missing:
        raise MeshError(
            f"distributed {distributed.__version__} on the scheduler differs from what pools need: "
            f"{', '.join(sorted(missing))}. Install a version of distributed that this version of meshcompute names "
            "in its requirements, or a newer meshcompute."
        )


def _accepts(kind: Any, name: str, parameters: Iterable[str]) -> bool:
    method = getattr(kind, name, None)
    return callable(method) and set(parameters) <= set(inspect.signature(method).parameters)
