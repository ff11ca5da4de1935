#!/usr/bin/env python
"""What packing values for other sites costs and gains: codecs on real sizes, and in a run.

:func:`rate_codecs` packs one value with every codec and every way to sort its bytes, :func:`packing_seconds` asks a
cluster's workers for the CPU seconds that they have spent on it. As a script it rates fields in the shape of the
reference (one level of one member, the mean of the members, what is left after the observations), and says on which
links each would be packed. Values are single-threaded, medians of ``--runs``.

Run it in an environment with meshcompute installed: ``python scripts/benchmarks/packing.py``
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
from distributed import Client

from meshcompute.packing import CODECS, Trial, choose, pack, unpack
from meshcompute.pools import pools_of_resources
from meshcompute.sampledata import write_observations, write_predictions

LINKS_MBIT_PER_SECOND = (30, 100, 1_000, 10_000)


def rate_codecs(value: Any, runs: int = 5) -> list[dict[str, Any]]:
    """Pack and unpack one array with every codec.

    Parameters
    ----------
    value
        A contiguous numpy array.
    runs
        How often; medians count.

    Returns
    -------
    list of dict
        By codec and shuffle: plain and packed bytes, and bytes of the plain value per second of packing and unpacking.
    """
    rows = []
    for codec in CODECS:
        for shuffle in (1, 2):
            how = Trial(codec, shuffle, value.itemsize, 1.0, 0.0)
            with ThreadPoolExecutor(1) as pool:  # as workers do it; in its main thread a process uses all cores
                nbytes, pack_seconds, unpack_seconds = pool.submit(_rate, value, how, runs).result()
            rows.append(
                {
                    "codec": codec,
                    "sorted": ("", "bytes", "bits")[shuffle],
                    "plain": value.nbytes,
                    "packed": nbytes,
                    "packs": value.nbytes / pack_seconds,
                    "unpacks": value.nbytes / unpack_seconds,
                    "trial": Trial(
                        codec,
                        shuffle,
                        value.itemsize,
                        nbytes / value.nbytes,
                        (pack_seconds + unpack_seconds) / value.nbytes,
                    ),
                }
            )
    return rows


def _rate(value: Any, how: Trial, runs: int) -> tuple[int, float, float]:
    times = []
    for _ in range(runs):
        began = time.thread_time()
        packed = pack(value.ravel().data, how)
        middle = time.thread_time()
        there = unpack(packed)
        times.append((middle - began, time.thread_time() - middle))
    assert bytes(there) == value.tobytes()
    pack_seconds, unpack_seconds = (statistics.median(column) for column in zip(*times, strict=True))
    return len(packed), pack_seconds, unpack_seconds


def packing_seconds(client: Client) -> dict[str, tuple[float, float]]:
    """Ask what packing and unpacking has cost since the workers started.

    Parameters
    ----------
    client
        A connected client.

    Returns
    -------
    dict
        Seconds of (packing, unpacking) by pool, as Dask's own metrics have them. What the scheduler unpacks for a
        client is not in them.
    """

    def seconds(dask_worker: Any) -> tuple[float, float]:
        packing = unpacking = 0.0
        for label, value in dask_worker.digests_total.items():
            if isinstance(label, tuple) and label[-1] == "seconds":
                packing += value if label[0] == "get-data" and "compress" in label else 0.0
                unpacking += value if "decompress" in label else 0.0
        return packing, unpacking

    workers = client.scheduler_info(n_workers=-1)["workers"]
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for address, (packing, unpacking) in client.run(seconds).items():
        pool = "+".join(pools_of_resources(workers[address]["resources"])) or "unpooled"
        sums[pool][0] += packing
        sums[pool][1] += unpacking
    return {pool: (packing, unpacking) for pool, (packing, unpacking) in sorted(sums.items())}


def fields(scale: float) -> dict[str, Any]:
    """Make the values that cross in the reference's calculation, by name."""
    with tempfile.TemporaryDirectory() as folder:
        write_predictions(f"{folder}/predictions.nc", scale)
        write_observations(f"{folder}/observations.nc", scale)
        with netCDF4.Dataset(f"{folder}/predictions.nc") as predictions:
            members = np.asarray(predictions["air_pressure"][:, 10])
        with netCDF4.Dataset(f"{folder}/observations.nc") as observations:
            observed = np.asarray(observations["air_pressure"][:])
    mean = members.mean(axis=0, dtype="f4")
    return {"one member": members[0].copy(), "mean of members": mean, "difference": mean - observed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scale", type=float, default=0.25, help="of the reference's grid (1: its own, 2.7 GiB on disk)"
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    args = parser.parse_args()
    report: dict[str, Any] = {}
    for name, value in fields(args.scale).items():
        rows = rate_codecs(value, args.runs)
        print(f"{name}: {value.nbytes / 2**20:.2f} MiB of {value.dtype}")
        print(f"  {'codec':<6}{'sorted':<8}{'MiB':>7}{'of plain':>10}{'packs MB/s':>12}{'unpacks MB/s':>14}")
        for row in rows:
            figures = f"{row['packed'] / 2**20:7.2f}{row['packed'] / row['plain']:10.2f}"
            figures += f"{row['packs'] / 1e6:12.0f}{row['unpacks'] / 1e6:14.0f}"
            print(f"  {row['codec']:<6}{row['sorted']:<8}{figures}")
        trials = [row.pop("trial") for row in rows]
        for rate in LINKS_MBIT_PER_SECOND:
            best = choose(trials, rate * 1e6 / 8)
            how = "plain" if best is None else f"{best.codec}, {('', 'bytes', 'bits')[best.shuffle]} sorted"
            print(f"  on {rate:>6} Mbit/s: {how}")
        report[name] = rows
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
