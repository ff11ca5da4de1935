#!/usr/bin/env python
"""Peak memory of pinned loads: fast loads, slow consumers, a reduction.

Dask queues the loads of ordinary graphs on its scheduler, so that no worker reads faster than it can reduce. Tasks with
a resource restriction are not queued, and data piles up. Three ways, each on fresh worker processes of the same mesh:
stock (no pins), naive (``dask.annotate(resources=...)`` without our guard, fusion off so that the annotation survives;
with ``--naive``), and ours (``pool()`` and ``propagate_pools()``). Peak memory is the workers' peak resident size
(VmHWM, from the kernel) above what they had before the graph came, all workers together.

Run it in an environment with meshcompute installed: ``python scripts/benchmarks/memory.py --check``
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np

from meshcompute import pool, propagate_pools
from meshcompute.embedded import EmbeddedMesh

BAR = 1.1
CHUNK_NBYTES = 8_000_000


def load(x: np.ndarray, nonce: int) -> np.ndarray:
    """Read a chunk, fast."""
    return np.full(CHUNK_NBYTES // 8, float(nonce))[None] + x[:, :1]


def consume(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Combine two neighbours, slowly."""
    time.sleep(0.1)
    return (x + y).sum(axis=1, keepdims=True)


def chunks(n: int, nonce: int) -> da.Array:
    shape = ((1,) * n, (CHUNK_NBYTES // 8,))
    return da.map_blocks(load, da.zeros((n, 1), chunks=1), nonce, dtype=float, chunks=shape)


def reduced(x: da.Array) -> da.Array:
    column = ((1,) * (x.numblocks[0] - 1), (1,))
    return da.map_blocks(consume, x[:-1], x[1:], dtype=float, chunks=column).sum()


def joined(x: da.Array, y: da.Array) -> da.Array:
    """Two loads, pair by pair; sliced, as else stock would fuse both loads with the join and hold nothing at all."""
    column = ((1,) * (x.numblocks[0] - 1), (1,))
    return da.map_blocks(consume, x[:-1], y[1:], dtype=float, chunks=column).sum()


def overlapping(x: da.Array) -> da.Array:
    """A stencil over neighbouring chunks."""
    y = da.map_overlap(slow, x, depth={0: 1}, boundary="reflect", dtype=float)
    return y.sum()


def rechunked(x: da.Array) -> da.Array:
    """Chunks of another shape, and a reduction of those."""
    n = x.shape[1] // 4
    with dask.config.set({"array.rechunk.method": "tasks"}):  # P2P keeps its data on disk
        y = x.rechunk((4, n))
    return da.map_blocks(slow, y, dtype=float).sum()


def slow(x: np.ndarray) -> np.ndarray:
    time.sleep(0.05)
    return x + 1.0


# Name: pools, with the worker processes of each; how many of the chunks each has; what is computed.
Shape = tuple[dict[str, int], dict[str, float], Callable[..., da.Array]]
SHAPES: dict[str, Shape] = {
    "load and reduce": ({"a": 2}, {"a": 1.0}, reduced),
    "two loads joined": ({"a": 1, "b": 1}, {"a": 0.5, "b": 0.5}, joined),
    "map_overlap": ({"a": 2}, {"a": 1.0}, overlapping),
    "rechunk and reduce": ({"a": 2}, {"a": 1.0}, rechunked),
    "pools of 3 and 1": ({"a": 3, "b": 1}, {"a": 0.8, "b": 0.2}, lambda x, y: reduced(x) + reduced(y)),
}


def compute(way: str, shape: Shape, n: int) -> float:
    """Compute a shape."""

    @contextlib.contextmanager
    def at(name: str) -> Iterator[None]:
        if way == "ours":
            with pool(name):
                yield
        elif way == "naive":
            with dask.annotate(resources={f"pool-{name}": 1}):
                yield
        else:
            yield

    _, shares, work = shape
    parts = []
    for i, (name, share) in enumerate(shares.items()):
        with at(name):
            parts.append(chunks(max(int(n * share), 4), i + 1))
    total = work(*parts)
    with propagate_pools() if way == "ours" else contextlib.nullcontext():
        return float(total.compute(optimize_graph=way != "naive"))


def peak(pids: list[int]) -> int:
    """Peak resident bytes of processes, all together."""
    return sum(_status(pid, "VmHWM") for pid in pids)


def _status(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def measure(way: str, shape: Shape, n: int) -> dict[str, float]:
    workers = shape[0]
    with tempfile.TemporaryDirectory() as folder:
        stores = {name: Path(folder) / name for name in workers}
        for store in stores.values():
            store.mkdir()
        with EmbeddedMesh(stores, workers_per_site=1, threads_per_worker=2) as mesh, mesh.client() as client:
            for name, wanted in workers.items():
                for _ in range(wanted - 1):
                    mesh.start_worker(name)
            client.wait_for_workers(sum(workers.values()), timeout=60)
            pids = [pid for name, pid in mesh.pids.items() if name != "scheduler"]
            compute(way, shape, 4 * sum(workers.values()))  # imports
            idle = sum(_status(pid, "VmRSS") for pid in pids)
            started = time.perf_counter()
            result = compute(way, shape, n)
            seconds = time.perf_counter() - started
            return {"peak_nbytes": peak(pids) - idle, "seconds": seconds, "result": result}


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the peaks of every way, by shape."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    ways = list(results[0]["peak_nbytes"])
    height = 0.8 / len(ways)
    for i, way in enumerate(ways):
        places = [row + i * height for row in range(len(results))]
        axes.barh(places, [r["peak_nbytes"][way] / 1e6 for r in results], height, label=way)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(results))], [r["shape"] for r in results])
    axes.invert_yaxis()
    axes.set_xlabel("peak memory of all workers (MB)")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=80, help="chunks of 8 MB")
    parser.add_argument("--runs", type=int, default=3, help="runs of each way, in turn")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="some of the shapes")
    parser.add_argument("--naive", action="store_true", help="measure naive pins, too")
    parser.add_argument("--check", action="store_true", help="exit with 1 if the bar is missed")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--picture", type=Path, help="draw the figures to this file")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    for name in options.shapes:
        ways = ("stock", "naive", "ours") if options.naive else ("stock", "ours")
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for i in range(options.runs):
            for way in ways if i % 2 else ways[::-1]:
                runs[way].append(measured := measure(way, SHAPES[name], options.chunks))
                peak_mb = measured["peak_nbytes"] / 1e6
                print(f"  {name}, run {i + 1} of {options.runs}, {way}: {peak_mb:.0f} MB", flush=True)
        found = [r["result"] for rs in runs.values() for r in rs]
        if not np.allclose(found, found[0]):
            raise RuntimeError(f"{name}: the ways have different results: {found}")
        results.append(
            {
                "shape": name,
                "peak_nbytes": {w: statistics.median(r["peak_nbytes"] for r in rs) for w, rs in runs.items()},
                "spread": {w: [f(r["peak_nbytes"] for r in rs) for f in (min, max)] for w, rs in runs.items()},
                "seconds": {w: statistics.median(r["seconds"] for r in rs) for w, rs in runs.items()},
            }
        )
    print(
        f"\n{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, dask {dask.__version__}"
    )
    print(f"{options.chunks} chunks of {CHUNK_NBYTES / 1e6:g} MB, 2 threads in each worker process")
    print(f"{'shape':<20}{'way':>8}{'peak MB':>10}{'min':>8}{'max':>8}{'x stock':>10}{'seconds':>10}")
    for r in results:
        for way, nbytes in r["peak_nbytes"].items():
            ratio = nbytes / r["peak_nbytes"]["stock"]
            low, high = (x / 1e6 for x in r["spread"][way])
            print(
                f"{r['shape']:<20}{way:>8}{nbytes / 1e6:>10.0f}{low:>8.0f}{high:>8.0f}{ratio:>10.2f}"
                f"{r['seconds'][way]:>10.1f}"
            )
    worst = max(r["peak_nbytes"]["ours"] / r["peak_nbytes"]["stock"] for r in results)
    print(f"\nours: {worst:.2f} x stock's peak at worst (bar {BAR:g})")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    if options.picture:
        draw(results, options.picture)
    return int(options.check and worst > BAR)


if __name__ == "__main__":
    sys.exit(main())
