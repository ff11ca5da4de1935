#!/usr/bin/env python
"""Peak memory of pinned loads: fast loads, slow consumers, a reduction.

Dask queues the loads of ordinary graphs on its scheduler, so that no worker reads faster than it can reduce. Tasks with
a resource restriction are not queued, and data piles up. Three ways, each on fresh worker processes of the same mesh:
stock (no pins), naive (``dask.annotate(resources=...)`` without our guard, fusion off so that the annotation survives),
and ours (``pool()`` and ``propagate_pools()``). Peak memory is the workers' peak resident size (VmHWM, from the kernel)
above what they had before the graph came, all workers together.

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
from collections.abc import Iterator
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


SHAPES = {"load and reduce": ("a",), "two sites joined": ("a", "b")}


def compute(way: str, pools: tuple[str, ...], n: int) -> float:
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

    parts = []
    for i, name in enumerate(pools):
        with at(name):
            parts.append(chunks(n // len(pools), i + 1))
    total = sum(reduced(part) for part in parts)
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


def measure(way: str, pools: tuple[str, ...], n: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        stores = {name: Path(folder) / name for name in pools}
        for store in stores.values():
            store.mkdir()
        with EmbeddedMesh(stores, workers_per_site=2 // len(pools), threads_per_worker=2) as mesh, mesh.client():
            pids = [pid for name, pid in mesh.pids.items() if name != "scheduler"]
            compute(way, pools, 4 * len(pools))  # imports
            idle = sum(_status(pid, "VmRSS") for pid in pids)
            started = time.perf_counter()
            result = compute(way, pools, n)
            seconds = time.perf_counter() - started
            expected = sum((i + 1) * 2 * (n // len(pools) - 1) * CHUNK_NBYTES / 8 for i in range(len(pools)))
            if not np.isclose(result, expected):
                raise RuntimeError(f"{way}: the result is {result}, not {expected}")
            return {"peak_nbytes": peak(pids) - idle, "seconds": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=100, help="chunks of 8 MB")
    parser.add_argument("--runs", type=int, default=3, help="runs of each way, in turn")
    parser.add_argument("--check", action="store_true", help="exit with 1 if the bar is missed")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    for shape, pools in SHAPES.items():
        runs: dict[str, list[dict[str, float]]] = {"stock": [], "naive": [], "ours": []}
        for i in range(options.runs):
            for way, measured in runs.items():
                measured.append(measure(way, pools, options.chunks))
                print(f"  {shape}, run {i + 1} of {options.runs}, {way}: {measured[-1]['peak_nbytes'] / 1e6:.0f} MB")
        results.append(
            {
                "shape": shape,
                "peak_nbytes": {w: statistics.median(r["peak_nbytes"] for r in rs) for w, rs in runs.items()},
                "seconds": {w: statistics.median(r["seconds"] for r in rs) for w, rs in runs.items()},
            }
        )
    print(
        f"\n{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, dask {dask.__version__}"
    )
    print(f"{options.chunks} chunks of {CHUNK_NBYTES / 1e6:g} MB, 4 threads in all")
    print(f"{'shape':<20}{'way':>8}{'peak MB':>10}{'x stock':>10}{'seconds':>10}")
    for r in results:
        for way, nbytes in r["peak_nbytes"].items():
            ratio = nbytes / r["peak_nbytes"]["stock"]
            print(f"{r['shape']:<20}{way:>8}{nbytes / 1e6:>10.0f}{ratio:>10.2f}{r['seconds'][way]:>10.1f}")
    worst = max(r["peak_nbytes"]["ours"] / r["peak_nbytes"]["stock"] for r in results)
    print(f"\nours: {worst:.2f} x stock's peak at worst (bar {BAR:g})")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    return int(options.check and worst > BAR)


if __name__ == "__main__":
    sys.exit(main())
