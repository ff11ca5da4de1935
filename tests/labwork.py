"""A computation over both sites that goes on until it is told that it is enough, for tests that break things meanwhile.

Covers starting it on a cluster in the lab, how far it is, and who worked for it. Does not cover the lab
(``labbench``).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from labbench import Boot, LabBench
from waiting import Lines

ENOUGH = "/run/lab-work-is-enough"
ROUND_SECONDS = 60.0
SITE_NAMES = ("ecmwf", "eumetsat")


def names(processes: int) -> set[str]:
    """Names of the workers, so many at each site."""
    return {f"{site}-{number}-{n}" for number, site in enumerate(SITE_NAMES, 1) for n in range(processes)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What a computation has done. A worker that was started again has another port, and so another address."""

    rounds: int
    is_right: bool
    addresses_before: Mapping[str, str]
    addresses_after: Mapping[str, str]


class Work:
    """Rounds of small tasks, whose values cross from one site to the other and back.

    Parameters
    ----------
    bench
        The lab.
    address
        Of the scheduler, as seen from the client's host.
    n_workers
        How many workers there are to wait for, before and after.
    """

    def __init__(self, bench: LabBench, address: str, *, n_workers: int = 8) -> None:
        self._bench = bench
        self.process: subprocess.Popen[str] = bench.start_python(_WORK, address, ENOUGH, str(n_workers))
        assert self.process.stdout is not None
        self._written = Lines(self.process.stdout)

    @property
    def rounds(self) -> int:
        """How many rounds are over."""
        return sum(line.isdecimal() for line in self._written)

    def wait_rounds(self, more: int = 2, timeout: float = ROUND_SECONDS) -> None:
        """Wait until so many more rounds are over: whatever was broken is whole again, or did not matter."""
        wanted = self.rounds + more
        self._written.wait_until(lambda: self.rounds >= wanted, f"{wanted} rounds", timeout)

    def finish(self, timeout: float = ROUND_SECONDS) -> Done:
        """Tell it that it is enough; gives what it has done."""
        self._bench.lab.run("client", "touch", ENOUGH)
        code = self.process.wait(timeout)
        assert code == 0, self.errors()
        self._written.close(timeout)
        return Done(**json.loads(self._written.lines[-1]))

    def errors(self) -> str:
        """What it wrote to its standard error, once it has ended."""
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def close(self) -> None:
        """End it, and take back what was said to it."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._written.close(ROUND_SECONDS)
        assert self.process.stderr is not None
        self.process.stderr.close()
        self._bench.lab.run("client", "rm", "-f", ENOUGH)


@contextmanager
def working(bench: LabBench, boot: Boot, *, n_workers: int = 8) -> Iterator[Work]:
    """Have a computation run on a cluster; it has begun when the block does."""
    work = Work(bench, boot.address, n_workers=n_workers)
    try:
        work.wait_rounds(1)
        yield work
    finally:
        work.close()


_WORK = """
import json, os, sys, time
import numpy as np
from distributed import Client
from meshcompute import pool

address, enough, n_workers = sys.argv[1], sys.argv[2], int(sys.argv[3])

def make(number):
    return np.full(1000, number)

def grow(data):
    time.sleep(0.05)
    return data + 1

def find_addresses(client):
    client.wait_for_workers(n_workers, timeout=60)
    return {info["name"]: address for address, info in client.scheduler_info(n_workers=-1)["workers"].items()}

with Client(address, timeout="60s") as client:
    before = find_addresses(client)
    rounds, is_right = 0, True
    while not os.path.exists(enough):
        values = [rounds] * 8
        for act, site in ((make, "ecmwf"), (grow, "eumetsat"), (grow, "ecmwf")):
            with pool(site):
                values = client.map(act, values, pure=False)
        is_right &= all((value == rounds + 2).all() for value in client.gather(values))
        rounds += 1
        print(rounds, flush=True)
    after = find_addresses(client)
    done = {"rounds": rounds, "is_right": bool(is_right), "addresses_before": before, "addresses_after": after}
    print(json.dumps(done))
"""
