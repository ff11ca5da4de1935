"""Links between the data centres that break while a computation runs, for less and for more than a lease."""

from __future__ import annotations

import time

import pytest
from labbench import SITES, LabBench
from labwork import names, working

pytestmark = pytest.mark.timeout(300)  # a few boots, and waits that are the point, on a busy machine

LEASE_SECONDS = 10
SSHD_SECONDS = 90.0  # sshd takes 30 s to see that a session was cut off, as the lab has it


@pytest.mark.timeout(400)
def test_partitions_of_20_and_of_60_seconds_lose_no_worker_and_the_computation_completes(bench: LabBench) -> None:
    before = bench.observe()
    with bench.booted() as boot, working(bench, boot) as work:
        for seconds in (20.0, 60.0):  # how long the link is cut is what this is about: nothing could be waited for
            bench.lab.cut("eumetsat")
            time.sleep(seconds)
            stood_at = work.rounds
            bench.lab.join("eumetsat")
            work.wait_rounds(3, timeout=120.0)
            assert work.rounds > stood_at
        done = work.finish()
        assert done.is_right
        assert set(done.addresses_after) == names(4)
        assert done.addresses_after == done.addresses_before
        assert boot.stop() == 0
        assert boot.said.count("removed in") == 1 + len(SITES)
    bench.wait_as(before, SSHD_SECONDS)


def test_a_site_that_is_cut_off_for_longer_than_its_lease_ends_its_part_and_the_client_names_it(
    bench: LabBench,
) -> None:
    before = bench.observe()
    with bench.booted("--lease", str(LEASE_SECONDS), "--processes", "1") as boot:
        bench.lab.cut("eumetsat")
        bench.wait_until(
            lambda: not any(bench.pids("eumetsat", what) for what in ("meshcompute-gateway/", "entrypoint.py")),
            "eumetsat has ended its part",
            LEASE_SECONDS + 30.0,
        )
        boot.wait_for("trying on, its lease ends in")
        boot.wait_for("its lease has ended")
        boot.wait_for("going on without mesh@10.8.0.2 (eumetsat)")
        said = bench.python(PINNED, boot.address).splitlines()
        assert said[0] == "2"
        assert "eumetsat" in said[1]
        assert "ecmwf" in said[1]
        bench.lab.join("eumetsat")
        assert boot.stop() == 0
        assert boot.said.count("removed in") == 1 + len(SITES), boot.said
    bench.wait_as(before, SSHD_SECONDS)


PINNED = """
import sys
from distributed import Client
from meshcompute import pool
with Client(sys.argv[1], timeout="60s") as client:
    with pool("ecmwf"):
        print(client.submit(sum, [1, 1]).result(60))
    with pool("eumetsat"):
        lost = client.submit(sum, [2, 2])
    print(repr(lost.exception(60)))
"""
