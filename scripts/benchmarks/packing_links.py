#!/usr/bin/env python
"""What packing saves between two sites, on slow links and fast ones: with `meshcompute.compression` auto, and off.

A cluster in the lab with one worker at each of two sites, 20 ms apart, on links of several rates. Fields cross one by
one, packed and plain in alternating groups, because machines drift; each is timed from the start of the task
that needs it to its end. Of two kinds: as the reference has them (smooth, rounded), and random bytes, which nothing
packs; and
with processors to spare, and with four busy programs at the sending site.

What the setting must never do is to make a transfer slower than a plain one. The figure is the median of auto over the
median of off.

Run it as root where meshcompute is installed: ``python scripts/benchmarks/packing_links.py --check``
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from inlab import SITES, add_options, booted, open_lab, report, run, say, surroundings

from meshcompute.lab.running import RunningLab

BAR = 1.1  # slower than plain is a defect; a tenth is what medians of few transfers differ by themselves
ROUND_TRIP_SECONDS = 0.02
SOURCE, TARGET = SITES
KINDS = ("field", "noise")
HOGS = 4

# Runs on the client's host: (mode, kind, transfers) in; seconds of each, and what it was on the wire, out.
_MOVER = """
import json, sys, time
import dask, numpy as np
from distributed import Client, wait
from meshcompute import measure_traffic, pool, propagate_pools

address, source, target = sys.argv[1:4]

def make(kind, seed):
    import numpy as np
    random = np.random.default_rng(seed)
    if kind == "noise":
        return np.frombuffer(random.bytes(960 * 1280 * 4), "f4")
    y, x = np.linspace(0, 6, 960)[:, None], np.linspace(0, 9, 1280)
    waves = sum(random.normal() / k**2 * np.sin(k * y + random.normal()) * np.cos(k * x) for k in range(1, 30))
    return (280 + 10 * waves + random.normal(0, 0.1, (960, 1280))).round(1).astype("f4")

def use(chunk):
    return chunk.nbytes

def announced(server):
    return (server.rpc.connection_args.get("handshake_overrides") or {}).get("meshcompute") is not None

with Client(address) as client:
    propagate_pools()
    print("ready", flush=True)
    for line in sys.stdin:
        mode, kind, n = json.loads(line)
        dask.config.set({"meshcompute.compression": mode})
        with pool(target):
            client.submit(use, np.zeros(1), pure=False).result()  # brings the setting along
        while any(told != (mode != "off") for told in client.run(lambda dask_worker: announced(dask_worker)).values()):
            time.sleep(0.02)
        seconds = []
        with measure_traffic() as traffic:
            for seed in range(n):
                with pool(source):
                    chunk = client.submit(make, kind, seed, pure=False)
                wait(chunk)
                began = time.monotonic()
                with pool(target):
                    used = client.submit(use, chunk, pure=False)
                wait(used)
                seconds.append(time.monotonic() - began)
        print(json.dumps([seconds, traffic.wire_bytes_between_pools.get((source, target), 0)]), flush=True)
"""


@contextmanager
def busy(lab: RunningLab, n: int) -> Iterator[None]:
    """Have programs that take all they can get at the sending site while the block runs."""
    with ExitStack() as stack:
        for _ in range(n):
            process = lab.popen(SOURCE, sys.executable, "-c", "while True: pass")
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield


def measure(mover: subprocess.Popen[str], kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Let fields of one kind cross, packed and plain by turns."""
    seconds: dict[str, list[float]] = {"auto": [], "off": []}
    nbytes = dict.fromkeys(seconds, 0)
    assert mover.stdin is not None
    assert mover.stdout is not None
    for i in range(options.groups):
        for mode in ("auto", "off") if i % 2 else ("off", "auto"):
            mover.stdin.write(json.dumps([mode, kind, options.transfers]) + "\n")
            mover.stdin.flush()
            took, wire = json.loads(mover.stdout.readline())
            seconds[mode] += took
            nbytes[mode] += wire
    median = {mode: statistics.median(values) for mode, values in seconds.items()}
    n = options.groups * options.transfers
    return {
        "kind": kind,
        "seconds": seconds,
        "median_seconds": median,
        "ratio": median["auto"] / median["off"],
        "wire_mib": {mode: total / n / 2**20 for mode, total in nbytes.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[30.0, 100.0, 300.0, 1000.0], metavar="MBIT")
    parser.add_argument("--groups", type=int, default=6, help="alternating groups of transfers of each mode")
    parser.add_argument("--transfers", type=int, default=4, help="of each group")
    add_options(parser)
    options = parser.parse_args()
    where = surroundings()
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        lab = stack.enter_context(open_lab(options.image, delay_seconds=ROUND_TRIP_SECONDS / 2))
        boot = stack.enter_context(booted(lab, "--containers", "1", "--processes", "1"))
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        arguments = (sys.executable, "-c", _MOVER, boot.address, SOURCE, TARGET)
        mover = stack.enter_context(lab.popen("client", *arguments, user="mesh", **pipes))
        stack.callback(mover.kill)
        assert mover.stdout is not None
        if mover.stdout.readline() != "ready\n":
            raise RuntimeError(f"the client in the lab ended with {mover.wait()}")
        for rate in options.rates:
            lab.shape(rate_bits_per_second=rate * 1e6)
            for n_busy in (0, HOGS):
                for kind in KINDS:
                    with busy(lab, n_busy):
                        rows.append({"rate_mbit": rate, "busy": n_busy, **measure(mover, kind, options)})
                    row = rows[-1]
                    say(f"  {rate:g} Mbit/s, {n_busy} busy, {kind}: {row['ratio']:.2f} of plain")
    print(where)
    print(f"{'Mbit/s':>8}{'busy':>6}  {'value':<7}{'auto s':>8}{'off s':>8}{'ratio':>7}{'auto MiB':>10}{'off MiB':>9}")
    for row in rows:
        median, wire = row["median_seconds"], row["wire_mib"]
        print(
            f"{row['rate_mbit']:>8g}{row['busy']:>6}  {row['kind']:<7}{median['auto']:>8.3f}{median['off']:>8.3f}"
            f"{row['ratio']:>7.2f}{wire['auto']:>10.2f}{wire['off']:>9.2f}"
        )
    missed = [
        f"{row['kind']} at {row['rate_mbit']:g} Mbit/s, {row['busy']} busy: {row['ratio']:.2f} of plain, bar {BAR:g}"
        for row in rows
        if row["ratio"] > BAR
    ]
    return report({"where": where, "rows": rows}, missed, options)


if __name__ == "__main__":
    run(main)
