"""Watch a cluster while somebody computes on it: what crosses, which worker reads which file, and how much memory.

Covers a program for the client's host (``reference_programs.py`` starts it), and what it runs on workers; the ways that
compute at the client watch their own workers with the same functions. Does not cover what is computed: the user's own
program knows nothing of this one.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from typing import Any

import cloudpickle
from distributed import Client

# Workers have no such module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def start_watching(*, has_objects: bool = False) -> None:
    """On a worker: import what tasks need, count reads by path from now on, and forget the peak of memory."""
    from collections import Counter

    from xarray.backends.netCDF4_ import NetCDF4ArrayWrapper

    if has_objects:
        watch_zarr()

    if not hasattr(NetCDF4ArrayWrapper, "plain_getitem"):
        plain = NetCDF4ArrayWrapper.plain_getitem = NetCDF4ArrayWrapper._getitem

        def counted(self: Any, key: Any) -> Any:
            NetCDF4ArrayWrapper.reads[self.datastore._filename] += 1  # also if it fails
            return plain(self, key)

        NetCDF4ArrayWrapper._getitem = counted
    NetCDF4ArrayWrapper.reads = Counter()
    reset_peak()


def watch_zarr() -> None:
    """Count reads of Zarr, too; those of object stores by their address."""
    import s3fs  # noqa: F401 - imported beforehand, as everything that tasks need
    from xarray.backends.netCDF4_ import NetCDF4ArrayWrapper
    from xarray.backends.zarr import ZarrArrayWrapper

    if hasattr(ZarrArrayWrapper, "plain_getitem"):
        return
    plain = ZarrArrayWrapper.plain_getitem = ZarrArrayWrapper.__getitem__

    def counted(self: Any, key: Any) -> Any:
        store = self._array.store
        NetCDF4ArrayWrapper.reads[f"s3://{store.path}" if hasattr(store, "fs") else str(store.root)] += 1
        return plain(self, key)

    ZarrArrayWrapper.__getitem__ = counted


def stop_watching(dask_worker: Any) -> dict[str, Any]:
    """On a worker: what has been seen since."""
    from xarray.backends.netCDF4_ import NetCDF4ArrayWrapper

    return {
        "name": str(dask_worker.name),
        "reads": dict(NetCDF4ArrayWrapper.reads),
        "peak_nbytes": peak_nbytes(),
    }


def reset_peak() -> None:
    """Forget this process's peak of resident memory (proc(5), clear_refs)."""
    with open("/proc/self/clear_refs", "w") as file:  # noqa: PTH123 - runs on workers, too
        file.write("5")


def peak_nbytes() -> int:
    """Peak of this process's resident memory."""
    with open("/proc/self/status") as file:  # noqa: PTH123 - runs on workers, too
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))


def say(word: str) -> None:
    """Tell the benchmark how far this is."""
    print(word, flush=True)


def wait_for_go() -> None:
    """Wait for the benchmark's next line; its end ends this program."""
    if not sys.stdin.readline():
        sys.exit("the benchmark has ended")


def watch(options: dict[str, Any]) -> None:
    """Watch clusters: say "ready" when all is set, and after another line what was seen, as JSON.

    Parameters
    ----------
    options
        ``addresses`` of the schedulers; ``report``, the file for Dask's performance report of the first.
    """
    from distributed import get_task_stream, performance_report

    from meshcompute import measure_traffic

    with ExitStack() as stack:
        clients = [stack.enter_context(Client(address, set_as_default=False)) for address in options["addresses"]]
        for client in clients:
            client.run(start_watching, has_objects=options["has_objects"])
        first = clients[0]
        with first.as_current(), performance_report(options["report"]), get_task_stream(first) as stream:
            traffic = [stack.enter_context(measure_traffic(client)) for client in clients]
            say("ready")
            wait_for_go()
            workers = {a: seen for client in clients for a, seen in client.run(stop_watching).items()}
    payload: dict[str, int] = {}
    encoded: dict[str, int] = {}
    for each in traffic:
        for sums, pairs in ((payload, each.bytes_between_pools), (encoded, each.wire_bytes_between_pools)):
            for (source, target), nbytes in pairs.items():
                sums[f"{source}>{target}"] = sums.get(f"{source}>{target}", 0) + nbytes
    seen = {
        "workers": list(workers.values()),
        "payload": payload,
        "encoded": encoded,
        "warnings": [text for each in traffic for text in each.warnings],
        "tasks": [
            {"worker": workers[task["worker"]]["name"], "key": str(task["key"]), "startstops": task["startstops"]}
            for task in stream.data
            if task["worker"] in workers
        ],
    }
    say(json.dumps(seen, default=str))
