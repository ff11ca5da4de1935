#!/usr/bin/env python
"""What pins and placement cost: CPU per task, tasks, and how long the scheduler's event loop is held.

One graph, two ways, in turn: stock (no pins), and placed (pins, and ``propagate_pools()``). All
threads of the workers are busy, so that the scheduler takes the graph in, queues it, and is asked to forget it again;
the CPU seconds of the client's and the scheduler's process are read from the kernel before and after. Machines drift:
figures are medians of differences between neighbours, never of runs far apart, and the spread stands beside them. Where
the middle half of the pairs lies on both sides of a bar, more pairs are run, whichever side the median is on: up to
``--most``, and as long as ``--minutes`` last. The table says how many it were.

The event loop is held for as long as it wakes up late, or for the CPU time of the scheduler's process meanwhile if that
is less: what other processes of the machine take is not counted.

Run it in an environment with meshcompute installed: ``python scripts/benchmarks/overhead.py --check``
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import string
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
from distributed import Client, Event
from inlab import surroundings

from meshcompute import pool, propagate_pools
from meshcompute.embedded import EmbeddedMesh

WAYS = ("stock", "placed")
BAR_MICROSECONDS = 20.0
BAR_HOLD = 1.1
BAR_TASKS = 1.1
TICK_SECONDS = 0.002
# Tasks, pools. Growth is seen from the first to the last row of two pools.
ROWS = ((1_000, 2), (10_000, 2), (10_000, 3), (10_000, 5), (100_000, 2))
FULL_ROWS = (*ROWS, (10_000, 16), (100_000, 16), (1_000_000, 2))
_SMALLEST = 50_000  # tasks from which the bar of CPU holds: below, it is the cost of a graph that counts
_LARGEST_WARM_UP = 20_000


def build(n_tasks: int, way: str, nonce: int, n_pools: int = 2) -> da.Array:
    """A graph of about ``n_tasks`` tasks after fusion: the sites' chunks, added, reduced over a tree."""
    n = max(n_tasks // (2 * n_pools + 1), 8)

    def values(x: np.ndarray, nonce: int) -> np.ndarray:
        return x + nonce

    def load(site: int) -> da.Array:  # data sets of their own: Dask would read one of the same name once
        x = da.map_blocks(values, da.zeros((n, 10), chunks=(1, 10)), 100 * nonce + site, dtype=float)
        return x * 2 if site else x

    parts = []
    for site, name in enumerate(string.ascii_lowercase[:n_pools]):
        if way == "stock":
            parts.append(load(site))
        else:
            with pool(name):
                parts.append(load(site))
    total = parts[0].rechunk((1, 10))
    for part in parts[1:]:
        total = total + part[::-1]
    return total.sum()


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and all its threads, from the kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start_watch(dask_scheduler: Any, tick: float) -> None:
    """Note how late the event loop wakes up, and what of that this process has computed: what held it in between."""
    import asyncio
    import time

    async def watch() -> None:
        while True:
            before, cpu_before = time.perf_counter(), time.process_time()
            await asyncio.sleep(tick)
            hold = min(time.perf_counter() - before - tick, time.process_time() - cpu_before)
            dask_scheduler.longest_hold = max(dask_scheduler.longest_hold, hold)

    dask_scheduler.longest_hold = 0.0
    dask_scheduler.watch = asyncio.ensure_future(watch())


def reset_watch(dask_scheduler: Any) -> float:
    """Longest hold since the last call, in seconds."""
    hold, dask_scheduler.longest_hold = dask_scheduler.longest_hold, 0.0
    return float(hold)


def n_known(dask_scheduler: Any) -> int:
    """How many tasks the scheduler knows, apart from those that keep the workers busy."""
    return sum(not str(key).startswith("busy-") for key in dask_scheduler.tasks)


def wait_until(client: Client, condition: Callable[[int], bool], what: str) -> None:
    deadline = time.monotonic() + 900
    while not condition(client.run_on_scheduler(n_known)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"The scheduler did not {what} within 900 s")
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


def run(
    n_tasks: int, n_pools: int, client: Client, scheduler_pid: int, *, least: int, is_enough: Callable[[int], bool]
) -> dict[str, Any]:
    """Measure a graph both ways, pair by pair.

    Parameters
    ----------
    n_tasks, n_pools
        Size of the graph.
    client, scheduler_pid
        The cluster.
    least
        Pairs that are always run.
    is_enough
        Tells, of a number of pairs, whether they have to do even if the figures are near a bar.
    """
    for way in WAYS:
        measure(client, scheduler_pid, build(min(n_tasks, _LARGEST_WARM_UP), way, -1, n_pools), way)
    pairs: list[dict[str, dict[str, float]]] = []
    while len(pairs) < least or (not is_enough(len(pairs)) and is_near_a_bar(pairs)):
        # Each way first in turn, so that drift cancels.
        order = WAYS if len(pairs) % 2 else WAYS[::-1]
        i = len(pairs)
        pairs.append({way: measure(client, scheduler_pid, build(n_tasks, way, i, n_pools), way) for way in order})
        figures = ", ".join(f"{way} {pairs[-1][way]['cpu_with_cancel']:.2f} s" for way in WAYS)
        print(f"  {n_tasks} tasks, {n_pools} pools, pair {i + 1}: {figures}", flush=True)

    def median(way: str, figure: str) -> float:
        return statistics.median(pair[way][figure] for pair in pairs)

    added, holds = added_microseconds(pairs), hold_ratios(pairs)
    return {
        "requested": n_tasks,
        "pools": n_pools,
        "pairs": len(pairs),
        "tasks": {way: median(way, "n_tasks") for way in WAYS},
        "cpu_seconds": {way: median(way, "cpu_with_cancel") for way in WAYS},
        "submit_hold_seconds": {way: median(way, "submit_hold") for way in WAYS},
        "cancel_hold_seconds": {way: median(way, "cancel_hold") for way in WAYS},
        "added_microseconds_per_task": {"placed": statistics.median(added)},
        "added_spread": {"placed": [added[0], added[-1]]},
        "hold_ratio": statistics.median(holds),
        "hold_spread": [holds[0], holds[-1]],
    }


def added_microseconds(pairs: Sequence[dict[str, dict[str, float]]]) -> list[float]:
    """CPU per task that placement adds, of every pair, least first."""
    return sorted(
        1e6 * (p["placed"]["cpu_with_cancel"] - p["stock"]["cpu_with_cancel"]) / p["stock"]["n_tasks"] for p in pairs
    )


def hold_ratios(pairs: Sequence[dict[str, dict[str, float]]]) -> list[float]:
    """How many times as long the event loop is held, of every pair, least first."""
    longest = [{way: max(p[way]["submit_hold"], p[way]["cancel_hold"]) for way in WAYS} for p in pairs]
    return sorted(hold["placed"] / hold["stock"] for hold in longest)


def is_near_a_bar(pairs: Sequence[dict[str, dict[str, float]]]) -> bool:
    """Whether the middle half of the pairs lies on both sides of a bar."""
    if pairs[0]["stock"]["n_tasks"] < _SMALLEST:
        return False
    for found, bar in ((added_microseconds(pairs), BAR_MICROSECONDS), (hold_ratios(pairs), BAR_HOLD)):
        first, _, third = statistics.quantiles(found, n=4)
        if first <= bar <= third:
            return True
    return False


def missed(results: Sequence[dict[str, Any]]) -> list[str]:
    """Say which bars are missed, with their figures."""
    found = []
    for r in results:
        name = f"{r['tasks']['stock']:.0f} tasks, {r['pools']} pools"
        if (tasks := r["tasks"]["placed"] / r["tasks"]["stock"]) > BAR_TASKS:
            found.append(f"{name}: {tasks:.2f} x stock's tasks, the bar is {BAR_TASKS:g}")
        if r["requested"] < _SMALLEST:
            continue
        if (added := r["added_microseconds_per_task"]["placed"]) > BAR_MICROSECONDS:
            found.append(f"{name}: {added:.1f} us of CPU per task, the bar is {BAR_MICROSECONDS:g}")
        if r["hold_ratio"] > BAR_HOLD:
            found.append(f"{name}: the event loop is held {r['hold_ratio']:.2f} x as long, the bar is {BAR_HOLD:g}")
    return found


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw what is added per task, against the number of tasks, by number of pools."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, (cost, hold) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for n_pools in sorted({r["pools"] for r in results}):
        rows = [r for r in results if r["pools"] == n_pools]
        tasks = [r["tasks"]["stock"] for r in rows]
        added = [r["added_microseconds_per_task"]["placed"] for r in rows]
        spread = [
            [a - r["added_spread"]["placed"][0] for a, r in zip(added, rows, strict=True)],
            [r["added_spread"]["placed"][1] - a for a, r in zip(added, rows, strict=True)],
        ]
        cost.errorbar(tasks, added, yerr=spread, marker="o", capsize=3, label=f"{n_pools} pools")
        hold.plot(tasks, [r["hold_ratio"] for r in rows], marker="o", label=f"{n_pools} pools")
    cost.set(xscale="log", xlabel="tasks", ylabel="CPU added per task (µs)")
    hold.set(xscale="log", xlabel="tasks", ylabel="longest hold of the event loop, stock = 1")
    cost.axhline(BAR_MICROSECONDS, color="grey", linestyle="--", label="bar")
    hold.axhline(BAR_HOLD, color="grey", linestyle="--", label="bar")
    cost.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def measured(rows: Sequence[tuple[int, int]], least: int, is_enough: Callable[[int], bool]) -> list[dict[str, Any]]:
    """Measure all rows, with a mesh for every number of pools; the small ones first."""
    results = []
    for n_pools in sorted({n for _, n in rows}, key=lambda n: max(size for size, pools in rows if pools == n)):
        with tempfile.TemporaryDirectory() as folder:
            stores = {name: Path(folder) / name for name in string.ascii_lowercase[:n_pools]}
            for store in stores.values():
                store.mkdir()
            with EmbeddedMesh(stores, workers_per_site=1, threads_per_worker=2) as mesh, mesh.client() as client:
                client.run_on_scheduler(start_watch, tick=TICK_SECONDS)
                busy = [f"busy-{i}" for i in range(2 * n_pools)]
                held = client.map(lambda _: Event("open").wait(), busy, key=busy, priority=100)
                pid = mesh.pids["scheduler"]
                results += [
                    run(n_tasks, n_pools, client, pid, least=least, is_enough=is_enough)
                    for n_tasks, n in rows
                    if n == n_pools
                ]
                Event("open").set()
                client.gather(held)
    return sorted(results, key=lambda r: (r["pools"], r["requested"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", help="sizes of the graph, instead of the usual rows")
    parser.add_argument("--pools", type=int, default=2, help="pools of the rows of --tasks")
    parser.add_argument("--pairs", type=int, default=5, help="pairs that are run of every size")
    parser.add_argument(
        "--most", type=int, default=11, help="pairs that are run of a size whose figures are near a bar"
    )
    parser.add_argument("--minutes", type=float, default=6.0, help="after so long, no more pairs than --pairs are run")
    parser.add_argument("--full", action="store_true", help="with 1 000 000 tasks and 16 pools, too")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--picture", type=Path, help="draw the figures to this file")
    options = parser.parse_args()
    where = surroundings()
    dask.config.set({"distributed.admin.large-graph-warning-threshold": "10GB"})
    rows = FULL_ROWS if options.full else ROWS
    if options.tasks:
        rows = tuple((n, options.pools) for n in options.tasks)
    deadline = time.monotonic() + 60 * options.minutes
    results = measured(rows, options.pairs, lambda n: n >= options.most or time.monotonic() > deadline)
    print(f"\n{where}")
    print(
        f"{'tasks':>9}{'pools':>7}{'pairs':>7}{'way':>9}{'CPU s':>9}{'added us/task':>15}{'min':>8}{'max':>8}"
        f"{'submit hold s':>15}{'cancel hold s':>15}"
    )
    for r in results:
        for way in WAYS:
            added = f"{r['added_microseconds_per_task'][way]:.1f}" if way != "stock" else "-"
            low, high = (f"{x:.1f}" for x in r["added_spread"][way]) if way != "stock" else ("-", "-")
            print(
                f"{r['tasks'][way]:>9.0f}{r['pools']:>7}{r['pairs']:>7}{way:>9}{r['cpu_seconds'][way]:>9.2f}{added:>15}"
                f"{low:>8}{high:>8}"
                f"{r['submit_hold_seconds'][way]:>15.3f}{r['cancel_hold_seconds'][way]:>15.3f}"
            )
    print()
    for r in results:
        print(
            f"{r['tasks']['stock']:.0f} tasks, {r['pools']} pools: longest hold of the event loop "
            f"{r['hold_ratio']:.2f} x stock's ({r['hold_spread'][0]:.2f} to {r['hold_spread'][1]:.2f}), "
            f"tasks {r['tasks']['placed'] / r['tasks']['stock']:.3f} x"
        )
    if options.json:
        options.json.write_text(json.dumps({"where": where, "rows": results}, indent=1))
    if options.picture:
        draw(results, options.picture)
    failures = missed(results)
    for failure in failures:
        print(f"MISSED {failure}")
    return int(options.check and bool(failures))


if __name__ == "__main__":
    sys.exit(main())
