#!/usr/bin/env python
"""What Dask gets through the tunnel, of what iperf3 gets through the same one.

A cluster in the lab with one worker at each of two sites. iperf3 runs as server and client inside the network
namespaces of the two workers' containers, one TCP stream; Dask moves random bytes (nothing to compress) from tasks at
the first site to tasks pinned to the second, several chunks on their way at once, as long as iperf3 took. Both in
alternating pairs, because machines drift; the figure is the median of the pairs' ratios. Dask's bytes and seconds are
those of the receiving worker's own log, from its first request to the last byte: starting tasks does not count, the
pauses between messages do. iperf3's first seconds, in which TCP finds its rate, do not count; Dask's has found it in a
transfer before.

Each of: a worker joined to its gateway by veth and by WireGuard; no delay and no limit, and a WAN of 100 ms there and
back with a rate.

Run it as root where meshcompute is installed: ``python scripts/benchmarks/tunnel.py --check``
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlab import SITES, add_options, booted, containers, open_lab, report, run, say, surroundings, wait_until

from meshcompute.lab.running import RunningLab

BAR = 0.9
LINKS = ("veth", "wireguard")
SOURCE, TARGET = SITES
CHUNKS_MIN = 6
IPERF_PORT = 5201
IPERF_OMIT_SECONDS = 3  # at 100 ms bbr takes more than two

# Runs on the client's host: the number of chunks in, the receiving worker's transfers out.
_MOVER = """
import json, sys
import numpy as np
from distributed import Client, wait
from meshcompute import pool

address, source, target, nbytes = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])

def make(i):
    return np.frombuffer(np.random.default_rng().bytes(nbytes), dtype="u1")

def use(chunk):
    return chunk.nbytes

def received(dask_worker):
    log = [dict(entry) for entry in dask_worker.transfer_incoming_log]
    dask_worker.transfer_incoming_log.clear()
    return [(entry["start"], entry["stop"], entry["total"]) for entry in log]

with Client(address) as client:
    print("ready", flush=True)
    for line in sys.stdin:
        with pool(source):
            chunks = client.map(make, range(int(line)), pure=False)
        wait(chunks)
        client.run(received)
        with pool(target):
            moved = sum(client.gather(client.map(use, chunks, pure=False)))
        assert moved == int(line) * nbytes, moved
        print(json.dumps(sum(client.run(received).values(), [])), flush=True)
        del chunks
"""

# What else runs on the machine would take its share from a container and not from iperf3 beside it.
_ENTER = """
pid=$1; shift
while IFS=: read -r _ controllers group; do
    case $controllers in cpu | cpu,* | "") echo $$ >"/sys/fs/cgroup/$controllers$group/cgroup.procs" ;; esac
done <"/proc/$pid/cgroup" 2>/dev/null
exec nsenter --net="/proc/$pid/ns/net" "$@"
"""


@dataclass(frozen=True, kw_only=True)
class Wan:
    """How the lab's WAN behaves: between any two hosts, each way."""

    round_trip_ms: float
    rate_mbit: float | None

    def __str__(self) -> str:
        return f"{self.round_trip_ms:g} ms, " + (f"{self.rate_mbit:g} Mbit/s" if self.rate_mbit else "no limit")

    def use(self, lab: RunningLab) -> None:
        """Have a lab's WAN behave so from now on."""
        rate = self.rate_mbit and self.rate_mbit * 1e6
        lab.shape(delay_seconds=self.round_trip_ms / 2e3, rate_bits_per_second=rate)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A worker's container, as root of its host sees it."""

    lab: RunningLab
    host: str
    pid: int

    @classmethod
    def of(cls, lab: RunningLab, host: str) -> Place:
        """Find the only one at a host."""
        [pid] = containers(lab, host).values()
        return cls(lab=lab, host=host, pid=pid)

    def inside(self, *command: str) -> tuple[str, ...]:
        """Say how to run a program of the host in its network, with the container's share of the processors."""
        return ("sh", "-c", _ENTER, "sh", str(self.pid), *command)

    def run(self, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a program so."""
        return self.lab.run(self.host, *self.inside(*command), **options)

    @property
    def interface(self) -> dict[str, Any]:
        """Its link, as ``ip`` tells it: the one besides lo."""
        [found] = [x for x in json.loads(self.run("ip", "-j", "-6", "address").stdout) if x["ifname"] != "lo"]
        return dict(found)

    @property
    def address(self) -> str:
        """Its address on the data plane."""
        return next(str(a["local"]) for a in self.interface["addr_info"] if a["scope"] == "global")

    @property
    def tcp(self) -> str:
        """What its kernel does with TCP; a limit of the buffer is one of rate times round trip."""
        folder = Path("/proc/sys/net/ipv4")
        names = ("tcp_congestion_control", "tcp_wmem", "tcp_rmem")
        return ", ".join(f"{n} {' '.join(self.run('cat', str(folder / n)).stdout.split())}" for n in names)


@contextmanager
def iperf_server(place: Place) -> Iterator[None]:
    """Have an iperf3 server while the block runs."""
    command = ("iperf3", "--server", "--bind", place.address, "--port", str(IPERF_PORT))
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}
    with place.lab.popen(place.host, *place.inside(*command), **silent) as process:
        try:
            wait_until(lambda: f":{IPERF_PORT}" in place.run("ss", "-Hltn").stdout, "the server of iperf3 listens")
            yield
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()


def iperf(source: Place, target: str, seconds: float) -> float:
    """Send with iperf3 for a time; bytes per second that arrived."""
    command = ["iperf3", "--client", target, "--port", str(IPERF_PORT), "--json"]
    command += ["--time", f"{seconds:g}", "--omit", str(IPERF_OMIT_SECONDS)]
    told = json.loads(source.run(*command, timeout=seconds + 60).stdout)
    return float(told["end"]["sum_received"]["bits_per_second"]) / 8


@contextmanager
def mover(lab: RunningLab, address: str, chunk_nbytes: int) -> Iterator[subprocess.Popen[str]]:
    """Have a process on the client's host that lets the cluster move chunks."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    # The patch releases of Python here and in the image may differ, which is no news.
    command = (sys.executable, "-W", "ignore", "-c", _MOVER, address, SOURCE, TARGET, str(chunk_nbytes))
    with lab.popen("client", *command, user="mesh", **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("No client could connect to the cluster; what it wrote stands above")
            yield process
        finally:
            process.stdin.close()


def move(process: subprocess.Popen[str], n_chunks: int, chunk_nbytes: int) -> float:
    """Let Dask move chunks; bytes per second."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{n_chunks}\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("The client has ended; what it wrote stands above")
    transfers = json.loads(line)
    seconds = max(stop for _, stop, _ in transfers) - min(start for start, _, _ in transfers)
    moved = sum(nbytes for _, _, nbytes in transfers)
    if not 1 <= moved / (n_chunks * chunk_nbytes) < 1.01:  # Dask counts some bytes about each chunk
        raise RuntimeError(f"{n_chunks} chunks were to be moved, and the worker's log has {moved} bytes")
    return float(moved / seconds)


def compare(
    process: subprocess.Popen[str], source: Place, target: str, options: argparse.Namespace
) -> list[dict[str, float]]:
    """Measure alternating pairs."""
    chunk = options.chunk * 2**20
    expected = iperf(source, target, 2)
    move(process, CHUNKS_MIN, chunk)  # now both are warm
    pairs = []
    for i in range(options.pairs):
        pair = {}
        for way in ("iperf3", "dask") if i % 2 else ("dask", "iperf3"):
            if way == "iperf3":
                pair[way] = expected = iperf(source, target, options.seconds)
            else:
                pair[way] = move(process, max(CHUNKS_MIN, math.ceil(expected * options.seconds / chunk)), chunk)
        pairs.append(pair)
        say(
            f"  pair {i + 1} of {options.pairs}: " + ", ".join(f"{w} {r * 8 / 1e6:.1f} Mbit/s" for w, r in pair.items())
        )
    return pairs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="alternating pairs of each link and WAN")
    parser.add_argument("--seconds", type=float, default=8.0, help="how long each half of a pair takes, about")
    parser.add_argument("--chunk", type=int, default=16, metavar="MIB", help="size of a chunk; at least 8")
    parser.add_argument("--round-trip", type=float, default=100.0, metavar="MS", help="of the WAN, there and back")
    parser.add_argument("--rate", type=float, default=100.0, metavar="MBIT", help="of the WAN, each way, in Mbit/s")
    parser.add_argument("--links", nargs="+", choices=LINKS, default=LINKS)
    add_options(parser)
    options = parser.parse_args()
    if shutil.which("iperf3") is None:
        raise RuntimeError("iperf3 is not here, and this compares with it: apt-get install iperf3")
    where = surroundings()
    wans = (Wan(round_trip_ms=0.0, rate_mbit=None), Wan(round_trip_ms=options.round_trip, rate_mbit=options.rate))
    results: list[dict[str, Any]] = []
    say("starting the lab")
    with open_lab(options.image) as lab:
        for link in options.links:
            wans[0].use(lab)
            say(f"starting a cluster, workers joined by {link}")
            with booted(lab, "--link", link, "--processes", "1", "--threads", "2", "--memory", "2GiB") as boot:
                source, target = Place.of(lab, SOURCE), Place.of(lab, TARGET)
                tcp, mtu, address = source.tcp, source.interface["mtu"], target.address
                with iperf_server(target), mover(lab, boot.address, options.chunk * 2**20) as process:
                    for wan in wans:
                        say(f"{link}, {wan}")
                        wan.use(lab)
                        pairs = compare(process, source, address, options)
                        results.append({"link": link, "wan": str(wan), "mtu": mtu, "pairs": pairs})
                wans[0].use(lab)
    print(f"\n{where}\nworker: {tcp}")
    print(f"chunks of {options.chunk} MiB, {options.pairs} pairs of {options.seconds:g} s, one stream; Mbit/s, medians")
    print(f"{'link':<11}{'WAN, round trip':<24}{'MTU':>6}{'iperf3':>9}{'dask':>9}{'ratio':>8}{'min':>7}{'max':>7}")
    missed = []
    for r in results:
        ratios = [pair["dask"] / pair["iperf3"] for pair in r["pairs"]]
        r["ratio"] = statistics.median(ratios)
        iperf3, dask = (statistics.median(pair[way] for pair in r["pairs"]) * 8 / 1e6 for way in ("iperf3", "dask"))
        print(
            f"{r['link']:<11}{r['wan']:<24}{r['mtu']:>6}{iperf3:>9.1f}{dask:>9.1f}{r['ratio']:>8.2f}"
            f"{min(ratios):>7.2f}{max(ratios):>7.2f}"
        )
        if r["ratio"] < BAR:
            missed.append(f"{r['link']}, {r['wan']}: Dask gets {r['ratio']:.2f} of iperf3, and the bar is {BAR:g}")
    return report({"where": where, "tcp": tcp, "results": results, "missed": missed}, missed, options)


if __name__ == "__main__":
    run(main)
