#!/usr/bin/env python
"""What pins and placement cost: CPU per task, and how long the scheduler's event loop is held.

One graph, three ways, in turn: stock (no pins), pinned (the light guard alone), and placed (``propagate_pools()``).
All threads of the workers are busy, so that the scheduler takes the graph in, queues it, and is asked to forget it
again; the CPU seconds of the client's and the scheduler's process are read from the kernel before and after. Machines
drift: figures are medians of differences between neighbours, never of runs far apart.

Run it in an environment with meshcompute installed: ``python scripts/benchmarks/overhead.py --check``
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
from distributed import Client, Event

from meshcompute import pool, propagate_pools
from meshcompute.embedded import EmbeddedMesh

WAYS = ("stock", "pinned", "placed")
BAR_MICROSECONDS = 50.0
BAR_HOLD = 1.1
TICK_SECONDS = 0.002


def build(n_tasks: int, way: str, nonce: int) -> da.Array:
    """A graph of about ``n_tasks`` tasks after fusion: two sites' chunks, added in pairs, reduced over a tree."""
    n = max(n_tasks // 4, 8)

    def values(x: np.ndarray, nonce: int) -> np.ndarray:
        return x + nonce

    def load(site: int) -> da.Array:  # two data sets: Dask would read one of the same name once
        return da.map_blocks(values, da.zeros((n, 10), chunks=(1, 10)), 2 * nonce + site, dtype=float)

    if way == "stock":
        a, b = load(0), load(1) * 2
    else:
        with pool("a"):
            a = load(0)
        with pool("b"):
            b = load(1) * 2
    return (a.rechunk((1, 10)) + b[::-1]).sum()


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and all its threads, from the kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start_watch(dask_scheduler: Any, tick: float) -> None:
    """Note how late the event loop wakes up: what held it in between."""
    import asyncio
    import time

    async def watch() -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(tick)
            dask_scheduler.longest_hold = max(dask_scheduler.longest_hold, time.perf_counter() - before - tick)

    dask_scheduler.longest_hold = 0.0
    dask_scheduler.watch = asyncio.ensure_future(watch())


def reset_watch(dask_scheduler: Any) -> float:
    """Longest hold since the last call, in seconds."""
    hold, dask_scheduler.longest_hold = dask_scheduler.longest_hold, 0.0
    return float(hold)


def n_known(dask_scheduler: Any) -> int:
    """How many tasks the scheduler knows, apart from the four that keep the workers busy."""
    return len(dask_scheduler.tasks) - 4


def wait_until(client: Client, condition: Any, what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition(client.run_on_scheduler(n_known)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"The scheduler did not {what} within 120 s")
        time.sleep(0.2)


def measure(client: Client, scheduler_pid: int, x: da.Array, way: str) -> dict[str, float]:
    """CPU seconds of one submit and cancel, and the longest hold of each."""
    client.run_on_scheduler(reset_watch)
    before = time.process_time() + cpu_seconds(scheduler_pid)
    if way == "placed":
        with propagate_pools():
            future = client.compute(x)
    else:
        future = client.compute(x)
    wait_until(client, lambda n: n > 1, "take the graph in")
    submitted = time.process_time() + cpu_seconds(scheduler_pid)
    n_tasks = client.run_on_scheduler(n_known)
    submit_hold = client.run_on_scheduler(reset_watch)
    future.release()
    del future
    wait_until(client, lambda n: n == 0, "forget the graph")
    cancelled = time.process_time() + cpu_seconds(scheduler_pid)
    cancel_hold = client.run_on_scheduler(reset_watch)
    return {
        "cpu": submitted - before,
        "cpu_with_cancel": cancelled - before,
        "n_tasks": n_tasks,
        "submit_hold": submit_hold,
        "cancel_hold": cancel_hold,
    }


def run(n_tasks: int, n_pairs: int, client: Client, scheduler_pid: int) -> dict[str, Any]:
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for i in range(n_pairs + 1):
        # Stock on both sides of each way, so that drift cancels; the first round warms up.
        order = WAYS if i % 2 else WAYS[::-1]
        round_ = {way: measure(client, scheduler_pid, build(n_tasks, way, i), way) for way in order}
        print(f"  {n_tasks} tasks, round {i} of {n_pairs}: " + ", ".join(f"{w} {round_[w]['cpu']:.2f} s" for w in WAYS))
        if i:
            for way in WAYS:
                runs[way].append(round_[way])

    def median(way: str, figure: str) -> float:
        return statistics.median(r[figure] for r in runs[way])

    def added(way: str) -> float:
        return 1e6 * statistics.median(
            (r["cpu_with_cancel"] - s["cpu_with_cancel"]) / s["n_tasks"]
            for r, s in zip(runs[way], runs["stock"], strict=True)
        )

    return {
        "requested": n_tasks,
        "tasks": {way: median(way, "n_tasks") for way in WAYS},
        "cpu_seconds": {way: median(way, "cpu") for way in WAYS},
        "submit_hold_seconds": {way: median(way, "submit_hold") for way in WAYS},
        "cancel_hold_seconds": {way: median(way, "cancel_hold") for way in WAYS},
        "added_microseconds_per_task": {way: added(way) for way in WAYS[1:]},
        "hold_ratio": statistics.median(
            max(r["submit_hold"], r["cancel_hold"]) / max(s["submit_hold"], s["cancel_hold"])
            for r, s in zip(runs["placed"], runs["stock"], strict=True)
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[10_000, 100_000], help="sizes of the graph")
    parser.add_argument("--pairs", type=int, default=5, help="counted rounds per size")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    dask.config.set({"distributed.admin.large-graph-warning-threshold": "1GB"})
    results = []
    with tempfile.TemporaryDirectory() as folder:
        stores = {name: Path(folder) / name for name in ("a", "b")}
        for store in stores.values():
            store.mkdir()
        with EmbeddedMesh(stores, workers_per_site=1, threads_per_worker=2) as mesh, mesh.client() as client:
            client.run_on_scheduler(start_watch, tick=TICK_SECONDS)
            gate = Event("open")
            busy = client.map(
                lambda _: Event("open").wait(), range(4), key=[f"busy-{i}" for i in range(4)], priority=100
            )
            results += [run(n, options.pairs, client, mesh.pids["scheduler"]) for n in options.tasks]
            gate.set()
            client.gather(busy)
    print(
        f"\n{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, dask {dask.__version__}"
    )
    print(f"{'tasks':>9}{'way':>9}{'CPU s':>9}{'added us/task':>15}{'submit hold s':>15}{'cancel hold s':>15}")
    for r in results:
        for way in WAYS:
            extra = f"{r['added_microseconds_per_task'][way]:.1f}" if way != "stock" else "-"
            print(
                f"{r['tasks'][way]:>9.0f}{way:>9}{r['cpu_seconds'][way]:>9.2f}{extra:>15}"
                f"{r['submit_hold_seconds'][way]:>15.3f}{r['cancel_hold_seconds'][way]:>15.3f}"
            )
    worst = max(r["added_microseconds_per_task"]["placed"] for r in results)
    hold = results[-1]["hold_ratio"]
    print(f"\nplaced: {worst:.1f} us of CPU per task more than stock (bar {BAR_MICROSECONDS:g}),")
    print(f"longest hold of the event loop {hold:.2f} x stock's (bar {BAR_HOLD:g})")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    return int(options.check and (worst > BAR_MICROSECONDS or hold > BAR_HOLD))


if __name__ == "__main__":
    sys.exit(main())
