"""Engines that are silent or die while a cluster runs, and two daemons at one: what is not known is not ended."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from labbench import LabBench, open_lab_bench
from labwork import names, working

pytestmark = pytest.mark.timeout(300)  # a few boots, and waits that are the point, on a busy machine

HOST = "ecmwf"
SITE = "mesh@10.8.0.4"
LEASE_SECONDS = 60
DAEMON = "/etc/meshcompute/site.toml"
KEEPER = "meshcompute-gateway/"

STATUS = """
import asyncio, sys
from meshcompute.mesh.control import SiteControl
from meshcompute.mesh.sites import parse_site

async def main():
    site = SiteControl(parse_site(sys.argv[1]))
    try:
        (status,) = await site.call(lambda client: client.clusters())
    finally:
        await site.close()
    print(status.phase, *sorted({worker.state for worker in status.workers}))
    print(*(condition.message for condition in status.conditions if not condition.is_true))

asyncio.run(main())
"""


def status(bench: LabBench) -> str:
    """What a site says of the only cluster that it has: phase, states of workers, and what is not as it should be."""
    return bench.python(STATUS, SITE)


@contextmanager
def stopped(bench: LabBench, pids: list[int]) -> Iterator[None]:
    """Processes of the host that do nothing while the block runs."""
    bench.kill(HOST, *pids, signum=signal.SIGSTOP)
    try:
        yield
    finally:
        bench.kill(HOST, *pids, signum=signal.SIGCONT)


def test_an_engine_that_does_not_answer_is_unknown_and_nothing_ends_because_of_it(bench: LabBench) -> None:
    before = bench.observe()
    boot_options = ("--processes", "1", "--lease", str(LEASE_SECONDS))
    with bench.booted(*boot_options) as boot, working(bench, boot, n_workers=2) as work:
        units = bench.pids(HOST, "entrypoint.py")
        with stopped(bench, bench.pids(HOST, "dockerd")):
            bench.wait_until(lambda: status(bench).startswith("pending unknown"), "the engine is unknown")
            assert "nobody knows which workers run" in status(bench)
            wait_renewed(bench)
            bench.kill(HOST, *bench.pids(HOST, DAEMON))  # a new one, which remembers nothing, must not sweep either
            bench.wait_until(lambda: not bench.pids(HOST, DAEMON), "the daemon is gone")
            start_daemon(bench)
            wait_renewed(bench)
            work.wait_rounds()
            assert status(bench).startswith("pending unknown")
            assert bench.pids(HOST, "entrypoint.py") == units
        bench.wait_until(lambda: status(bench).startswith("ready running"), "all is as before")
        done = work.finish()
        assert done.is_right
        assert done.addresses_after == done.addresses_before
        assert boot.stop() == 0
    bench.wait_as(before)


def wait_renewed(bench: LabBench) -> None:
    """Wait until the deadline that the workers' container carries itself has moved."""

    def lease() -> str:
        return bench.lab.run(HOST, "sh", "-c", "cat /var/lib/meshcompute/units/*/given/lease").stdout

    before = lease()
    bench.wait_until(lambda: lease() != before, "the container's own deadline is renewed", LEASE_SECONDS)


def start_daemon(bench: LabBench) -> None:
    """Start the daemon again; as long as its engine is silent it answers, and is not healthy."""
    bench.lab.run(HOST, "sh", "-c", "rm -f /run/lab.site.ended; setsid sh /etc/lab/site </dev/null >/dev/null 2>&1 &")
    ask = (sys.executable, "-c", STATUS, SITE)
    bench.wait_until(
        lambda: "unknown" in bench.lab.run("client", *ask, user="mesh", check=False).stdout,
        "the daemon answers",
        LEASE_SECONDS,
    )


@pytest.mark.usefixtures("can_have_mesh")
def test_an_engine_that_was_killed_and_comes_back_has_its_workers_started_again() -> None:
    # An engine that is started anew has sockets of other names: this lab is not used by other tests.
    with (
        open_lab_bench() as bench,
        bench.booted("--processes", "1") as boot,
        working(bench, boot, n_workers=2) as work,
    ):
        bench.kill(HOST, *bench.pids(HOST, "dockerd"))
        try:
            bench.wait_until(lambda: status(bench).startswith("pending unknown"), "the engine is unknown")
            work.wait_rounds()  # containers do not need it
        finally:
            restart_engine(bench)
        # Without live-restore it ends all containers when it comes back; the daemon starts them again.
        bench.wait_until(lambda: status(bench).startswith("ready running"), "all is as before")
        work.wait_rounds()
        done = work.finish()
        assert done.is_right
        assert set(done.addresses_after) == names(1)
        assert boot.stop() == 0
        assert bench.containers(HOST) == []


def restart_engine(bench: LabBench) -> None:
    """Start the host's engine again, which was killed; returns when it answers."""
    script = "rm -f /run/lab.engine.ended; setsid sh /etc/lab/engine </dev/null >/dev/null 2>&1 &"
    bench.lab.run(HOST, "sh", "-c", script)
    bench.wait_until(
        lambda: bench.lab.run(HOST, "docker", "info", check=False).returncode == 0, f"{HOST}'s engine answers"
    )


# A second daemon of the same site at the same engine, with a state folder and a socket of its own.
SECOND = "/run/second"
PREPARE = f"""
mkdir -m 755 {SECOND}
(echo 'state_folder = "{SECOND}/state"'; echo 'socket = "{SECOND}/site.sock"'; cat {DAEMON}) >{SECOND}/site.toml
"""
START = f"setsid meshcompute-site serve --config {SECOND}/site.toml </dev/null >{SECOND}/log 2>&1 &"

HAVE = """
import asyncio, sys
from meshcompute.mesh.control import SiteClient
from meshcompute.protocol import ClusterSpec, WorkerRequest

async def main(socket, cluster_id, prefix, lease_seconds):
    workers = WorkerRequest(containers=1, processes_per_container=1)
    wanted = ClusterSpec(
        name="two", epoch=1, role="site", prefix=prefix, site=1, lease_seconds=float(lease_seconds), workers=workers
    )
    async with SiteClient(socket) as client:
        status = await client.put(cluster_id, wanted)
        while {worker.state for worker in status.workers} != {"running"}:
            await asyncio.sleep(0.1)
            status = await client.status(cluster_id)

asyncio.run(main(*sys.argv[1:]))
"""


def test_a_daemon_sweeps_its_own_leftovers_and_those_of_no_other(bench: LabBench) -> None:
    before = bench.observe()
    mine, others = "a" * 32, "b" * 32
    bench.lab.run(HOST, "sh", "-c", PREPARE)
    second = f"{SECOND}/site.toml"
    ping = ("meshcompute-site", "ping", "--socket", f"{SECOND}/site.sock")

    def start_second() -> None:
        bench.lab.run(HOST, "sh", "-c", START)
        bench.wait_until(lambda: bench.lab.run(HOST, *ping, check=False).returncode == 0, "the second daemon answers")

    def kill(*configs: str) -> None:
        bench.kill(HOST, *(pid for config in configs for pid in bench.pids(HOST, config)))
        bench.wait_until(lambda: not any(bench.pids(HOST, config) for config in configs), "they are gone")

    def keepers() -> set[str]:
        return {each for each in (mine, others) if bench.pids(HOST, each)}

    start_second()
    run_here(bench, "/run/meshcompute/site.sock", mine, "fda5:c0ff:eee1::/48", "600")
    run_here(bench, f"{SECOND}/site.sock", others, "fda5:c0ff:eee2::/48", "45")
    assert keepers() == {mine, others}
    kill(DAEMON, second)
    # As if its disk had lost the record: what runs belongs to no cluster that it knows.
    bench.lab.run(HOST, "rm", f"/var/lib/meshcompute/clusters/{mine}.json")
    bench.restart_daemon(HOST)
    bench.wait_until(lambda: keepers() == {others}, "its own gateway is swept")
    bench.wait_until(lambda: len(bench.containers(HOST)) == 1, "and its own container")
    assert len(bench.containers(HOST, every=False)) == 1
    assert bench.containers(HOST)[0].startswith(f"mc-{others[:8]}")
    # Nobody renews the others; they end by their own deadlines, and the next daemon of theirs clears them away.
    bench.wait_until(lambda: not keepers(), "the other gateway ends by its deadline", 90.0)
    bench.wait_until(lambda: not bench.containers(HOST, every=False), "and its container", 90.0)
    start_second()
    bench.wait_until(lambda: not bench.containers(HOST), "its own daemon clears it away")
    # Asked to end, not killed: it may be asking the image which versions it has.
    bench.kill(HOST, *bench.pids(HOST, second), signum=signal.SIGTERM)
    bench.wait_until(lambda: not bench.pids(HOST, second), "it is gone")
    bench.lab.run(HOST, "rm", "-r", SECOND)
    bench.wait_as(before)


def run_here(bench: LabBench, *arguments: str) -> None:
    """Ask a daemon of the host itself for a gateway and a worker."""
    bench.lab.run(HOST, sys.executable, "-c", HAVE, *arguments, user="mesh")
