#!/usr/bin/env python
"""Peak memory of pinned loads: fast loads, slow consumers, a reduction.

Dask queues the loads of ordinary graphs on its scheduler, so that no worker reads faster than it can reduce. Tasks with
a resource restriction are not queued, and data piles up. Three ways, each on a mesh of its own, run by run in turn:
stock (no pins), naive (``dask.annotate(resources=...)`` without our guard, fusion off so that the annotation survives;
with ``--naive``), and ours (``pool()`` and ``propagate_pools()``). Peak memory is the largest resident size of all
workers together, above what they had just before the graph came: the kernel's figures, looked at every few
milliseconds. Meshes are made anew after a few runs, and every run has data of its own: in which order equal tasks come
is Dask's choice by their names, and differs from one graph to the next by a fifth. The ratio to stock is the geometric
mean of the runs' own ratios, with its standard error. As long as the bar is less than two standard errors away, more
runs are made, up to ``--most``, and as long as ``--minutes`` last. Peaks are medians.

Run it in an environment with meshcompute installed: ``python scripts/benchmarks/memory.py --check``
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import dask
import dask.array as da
import numpy as np
from inlab import surroundings

from meshcompute import pool, propagate_pools
from meshcompute.embedded import EmbeddedMesh

BAR = 1.1
TICK_SECONDS = 0.003
_PAGE_NBYTES = os.sysconf("SC_PAGE_SIZE")
CHUNK_NBYTES = 8_000_000
RUNS_PER_MESH = 4


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


def compute(way: str, shape: Shape, n: int, nonce: int) -> float:
    """Compute a shape, on data of its own."""

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
            parts.append(chunks(max(int(n * share), 4), 10 * nonce + i + 1))
    total = work(*parts)
    with propagate_pools() if way == "ours" else contextlib.nullcontext():
        return float(total.compute(optimize_graph=way != "naive"))


def resident_nbytes(pids: Sequence[int]) -> int:
    """Resident bytes of processes now, all together."""
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids) * _PAGE_NBYTES


class Watch:
    """Look at processes while a block runs: the most bytes that they had at once, beyond what they began with."""

    def __init__(self, pids: Sequence[int]) -> None:
        self.pids = pids
        self.peak_nbytes = 0

    def __enter__(self) -> Self:
        self._is_over = threading.Event()
        self._idle_nbytes = resident_nbytes(self.pids)
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._is_over.wait(TICK_SECONDS):
            self.peak_nbytes = max(self.peak_nbytes, resident_nbytes(self.pids) - self._idle_nbytes)

    def __exit__(self, *exc_info: object) -> None:
        self._is_over.set()
        self._thread.join()


@contextlib.contextmanager
def started(workers: dict[str, int]) -> Iterator[EmbeddedMesh]:
    """Start a mesh with so many worker processes of two threads in every pool."""
    with tempfile.TemporaryDirectory() as folder:
        stores = {name: Path(folder) / name for name in workers}
        for store in stores.values():
            store.mkdir()
        with EmbeddedMesh(stores, workers_per_site=1, threads_per_worker=2) as mesh:
            for name, wanted in workers.items():
                for _ in range(wanted - 1):
                    mesh.start_worker(name)
            yield mesh


def trim() -> None:
    """Give memory back that was freed: what is left of one run is not the next one's."""
    import ctypes
    import gc

    gc.collect()
    with contextlib.suppress(AttributeError):  # not every C library has it
        ctypes.CDLL(None).malloc_trim(0)


def measure(way: str, mesh: EmbeddedMesh, shape: Shape, n: int, nonce: int) -> dict[str, float]:
    """Compute a shape once, on a mesh that is idle."""
    with mesh.client() as client:
        client.wait_for_workers(sum(shape[0].values()), timeout=60)
        client.run(trim)
        pids = [pid for name, pid in mesh.pids.items() if name != "scheduler"]
        begun = time.perf_counter()
        with Watch(pids) as watch:
            result = compute(way, shape, n, nonce)
        return {"peak_nbytes": watch.peak_nbytes, "seconds": time.perf_counter() - begun, "result": result}


def measured(
    name: str, ways: Sequence[str], n: int, *, least: int, is_enough: Callable[[int], bool]
) -> list[dict[str, dict[str, float]]]:
    """Measure a shape in all ways, run by run, until the figures are not near the bar or there are enough."""
    shape = SHAPES[name]
    runs: list[dict[str, dict[str, float]]] = []
    while len(runs) < least or (not is_enough(len(runs)) and is_near_the_bar(runs)):
        with contextlib.ExitStack() as meshes:
            mesh = {way: meshes.enter_context(started(shape[0])) for way in ways}
            for way in ways:
                measure(way, mesh[way], shape, 4 * sum(shape[0].values()), 0)  # imports
            for _ in range(RUNS_PER_MESH):
                i = len(runs)
                order = ways if i % 2 else ways[::-1]
                runs.append({way: measure(way, mesh[way], shape, n, i + 1) for way in order})
                figures = ", ".join(f"{way} {runs[-1][way]['peak_nbytes'] / 1e6:.0f} MB" for way in ways)
                print(f"  {name}, run {i + 1}: {figures}", flush=True)
    for run in runs:
        found = [figures["result"] for figures in run.values()]
        if not np.allclose(found, found[0]):
            raise RuntimeError(f"{name}: the ways have different results: {found}")
    return runs


def ratio(runs: Sequence[dict[str, dict[str, float]]], way: str = "ours") -> tuple[float, float]:
    """Geometric mean of the runs' ratios to stock, and its standard error as a part of it."""
    logs = [math.log(run[way]["peak_nbytes"] / run["stock"]["peak_nbytes"]) for run in runs]
    return math.exp(statistics.fmean(logs)), statistics.stdev(logs) / math.sqrt(len(logs))


def is_near_the_bar(runs: Sequence[dict[str, dict[str, float]]]) -> bool:
    """Whether the bar is within two standard errors."""
    mean, error = ratio(runs)
    return abs(math.log(mean / BAR)) < 2 * error


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
    parser.add_argument("--runs", type=int, default=8, help="runs of each way, in turn")
    parser.add_argument("--most", type=int, default=60, help="runs of a shape whose figures are near the bar")
    parser.add_argument("--minutes", type=float, default=6.0, help="after so long, no more runs than --runs are made")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="some of the shapes")
    parser.add_argument("--naive", action="store_true", help="measure naive pins, too")
    parser.add_argument("--check", action="store_true", help="exit with 1 if the bar is missed")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--picture", type=Path, help="draw the figures to this file")
    options = parser.parse_args()
    where = surroundings()
    results: list[dict[str, Any]] = []
    deadline = time.monotonic() + 60 * options.minutes
    ways = ("stock", "naive", "ours") if options.naive else ("stock", "ours")
    for name in options.shapes:
        runs = measured(
            name,
            ways,
            options.chunks,
            least=options.runs,
            is_enough=lambda n: n >= options.most or time.monotonic() > deadline,
        )
        peaks = {way: [run[way]["peak_nbytes"] for run in runs] for way in ways}
        results.append(
            {
                "shape": name,
                "runs": len(runs),
                "peak_nbytes": {way: statistics.median(found) for way, found in peaks.items()},
                "spread": {way: [min(found), max(found)] for way, found in peaks.items()},
                "ratio": {way: ratio(runs, way)[0] for way in ways},
                "error": {way: ratio(runs, way)[1] for way in ways},
                "seconds": {way: statistics.median(run[way]["seconds"] for run in runs) for way in ways},
            }
        )
    print(f"\n{where}")
    print(f"{options.chunks} chunks of {CHUNK_NBYTES / 1e6:g} MB, 2 threads in each worker process")
    print(
        f"{'shape':<20}{'runs':>6}{'way':>8}{'peak MB':>10}{'min':>8}{'max':>8}{'x stock':>10}{'+-':>8}{'seconds':>10}"
    )
    for r in results:
        for way, nbytes in r["peak_nbytes"].items():
            low, high = (x / 1e6 for x in r["spread"][way])
            print(
                f"{r['shape']:<20}{r['runs']:>6}{way:>8}{nbytes / 1e6:>10.0f}{low:>8.0f}{high:>8.0f}"
                f"{r['ratio'][way]:>10.2f}{r['error'][way]:>8.2f}{r['seconds'][way]:>10.1f}"
            )
    worst = max(r["ratio"]["ours"] for r in results)
    print(f"\nours: {worst:.2f} x stock's peak at worst (bar {BAR:g})")
    if options.json:
        options.json.write_text(json.dumps({"where": where, "rows": results}, indent=1))
    if options.picture:
        draw(results, options.picture)
    return int(options.check and worst > BAR)


if __name__ == "__main__":
    sys.exit(main())
