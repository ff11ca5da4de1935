#!/usr/bin/env python
"""How long a cluster takes from nothing to work, and back to nothing.

The command ``scripts/dask-boot.sh mesh@10.8.0.4 mesh@10.8.0.2`` in the lab, images warm, with the start of its process
and all that Python imports: until 8 workers at two sites are registered and every link has shaken hands; and, after
SIGTERM, until it has ended and nothing is left. The delay is that of a round trip between any two hosts (20 ms: 10 ms
each way). That it is ready is not taken from the command: the scheduler is asked for its workers, which says when each
came, and every gateway's WireGuard for its handshakes. After taking down, every engine must be empty.

Run it as root where meshcompute is installed: ``python scripts/benchmarks/boot.py --check``
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from inlab import HOSTS, Boot, add_options, containers, open_lab, report, run, say, surroundings

from meshcompute.lab.running import RunningLab

BAR_READY_SECONDS = 6.0
BAR_DOWN_SECONDS = 2.0
N_WORKERS = 8
N_HANDSHAKES = 6  # three links, seen from both ends

# Each ends with a line of the command, or with what the scheduler noted; in order of their ends.
STAGES = {
    "command and imports": "its own host's daemon has answered",
    "sites reached": "through SSH",
    "keys": "gateways made, public keys exchanged",
    "peers": "every gateway knows the others",
    "links": "handshakes seen, containers run",
    "first worker": "registered at the scheduler",
    "all workers": "registered at the scheduler",
    "ready": "the command says so",
}
SAID = {
    "command and imports": "local (client): reached",
    "keys": "public keys exchanged",
    "peers": "every gateway knows the others",
    "links": "links have shaken hands",
    "ready": " ready: ",
}

# Runs on the client's host, and has imported all it needs before the clock starts. An address in, what is there out.
_OBSERVER = """
import asyncio, json, sys
from distributed.core import rpc

async def ask(address):
    async with rpc(address) as scheduler:
        identity = await scheduler.identity(n_workers=-1)
        events = await scheduler.events(topic="all")
    came = {event["worker"]: at for at, event in events if event["action"] == "add-worker"}
    workers = {name: worker["name"] for name, worker in identity["workers"].items()}
    return {"started": identity["started"], "came": {str(workers[name]): came[name] for name in workers}}

print("ready", flush=True)
for line in sys.stdin:
    print(json.dumps(asyncio.run(ask(line.strip()))), flush=True)
"""

# wireguard-go shows itself through files that only its keeper sees, the kernel's WireGuard in its network only: so this
# looks from the view of every process that has one of its own. In a container there is no `wg`, and nothing to see.
_HANDSHAKES = """
import glob, os, subprocess
views = {}
for path in glob.glob("/proc/[0-9]*/ns"):
    try:
        views.setdefault((os.readlink(path + "/mnt"), os.readlink(path + "/net")), path.split("/")[2])
    except OSError:
        pass
seen = set()
for pid in views.values():
    command = ["nsenter", "--target", pid, "--mount", "--net", "wg", "show", "all", "latest-handshakes"]
    seen |= set(subprocess.run(command, capture_output=True, text=True).stdout.splitlines())
print("\\n".join(seen))
"""


@contextmanager
def observer(lab: RunningLab) -> Iterator[subprocess.Popen[str]]:
    """Have a process on the client's host that can ask schedulers."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with lab.popen("client", sys.executable, "-c", _OBSERVER, user="mesh", **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.stdin.close()


def handshakes(lab: RunningLab) -> list[int]:
    """Ask WireGuard at every host when each of its peers has shaken hands last: seconds of the clock, 0 if never."""
    lines = [line for host in HOSTS for line in lab.run(host, sys.executable, "-c", _HANDSHAKES).stdout.splitlines()]
    return [int(line.split()[-1]) for line in lines if line]


def measure(lab: RunningLab, asked: subprocess.Popen[str]) -> dict[str, float]:
    """Start a cluster, look whether it is there, and take it down; seconds since the command's start."""
    boot = Boot(lab)
    try:
        boot.wait_for(SAID["ready"])
        assert asked.stdin is not None
        assert asked.stdout is not None
        asked.stdin.write(boot.address + "\n")
        asked.stdin.flush()
        there = json.loads(asked.stdout.readline())
        shaken = handshakes(lab)
        came = sorted(at - boot.started for at in there["came"].values())
        times = {stage: boot.wait_for(text)[0] for stage, text in SAID.items()}
        if len(came) != N_WORKERS or came[-1] > times["ready"]:
            raise RuntimeError(f"The command says it is ready, and the scheduler knows {len(came)} of {N_WORKERS}")
        if len(shaken) != N_HANDSHAKES or not all(shaken):
            raise RuntimeError(f"The command says it is ready, and WireGuard shows the handshakes {shaken}")
        times["sites reached"] = max(at for at, line in boot.lines if ": reached in" in line)
        times["first worker"], times["all workers"] = came[0], came[-1]
        times["scheduler"] = there["started"] - boot.started
    except BaseException:
        boot.process.kill()
        boot.process.wait()
        raise
    times["down"] = boot.stop()
    left = {host: found for host in HOSTS if (found := containers(lab, host))}
    if left or handshakes(lab):
        raise RuntimeError(f"The command has ended, and there are still {left or 'gateways'}")
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Summarise runs."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="counted runs; one more before them warms up")
    parser.add_argument("--round-trip", type=float, default=20.0, metavar="MS", help="delay there and back")
    add_options(parser)
    options = parser.parse_args()
    where = surroundings()
    runs: list[dict[str, float]] = []
    say("starting the lab")
    with (
        open_lab(options.image, delay_seconds=options.round_trip / 2e3) as lab,
        observer(lab) as asked,
    ):
        for i in range(options.runs + 1):
            times = measure(lab, asked)
            runs += [times] if i else []
            what = f"run {i} of {options.runs}" if i else "warm-up"
            say(f"  {what}: ready in {times['ready']:.2f} s, down in {times['down']:.2f} s")
            time.sleep(0.5)  # what the machine still does for the last one is not the next one's
    seconds = {name: spread([times[name] for times in runs]) for name in (*STAGES, "scheduler", "down")}
    print(f"\n{where}\nround trip {options.round_trip:g} ms, no limit of rate, {len(runs)} runs")
    print(f"{'seconds since the command':<26}{'median':>8}{'min':>7}{'max':>7}{'step':>7}")
    before = 0.0
    for stage, what in STAGES.items():
        s = seconds[stage]
        print(f"{stage:<26}{s['median']:>8.2f}{s['min']:>7.2f}{s['max']:>7.2f}{s['median'] - before:>7.2f}  {what}")
        before = s["median"]
    for name, what in (("scheduler", "(runs, meanwhile)"), ("down", "after SIGTERM: all is gone")):
        s = seconds[name]
        print(f"{name:<26}{s['median']:>8.2f}{s['min']:>7.2f}{s['max']:>7.2f}{'':>7}  {what}")
    missed = [
        f"{what} took {seconds[name]['median']:.2f} s (median), and the bar is {bar:g} s"
        for name, what, bar in (
            ("ready", "from the command to all workers", BAR_READY_SECONDS),
            ("down", "taking everything down", BAR_DOWN_SECONDS),
        )
        if seconds[name]["median"] >= bar
    ]
    results = {"where": where, "round_trip_ms": options.round_trip, "seconds": seconds, "runs": runs, "missed": missed}
    return report(results, missed, options)


if __name__ == "__main__":
    run(main)
