"""Whatever dies, in any order, nothing outlives its lease: clients, schedulers, daemons, and boots that were cut short.

Covers deaths that end a cluster or a site's part of it. Does not cover what is made again under a running computation
(``test_mesh_mending.py``), engines (``test_mesh_engines.py``), nor links that break (``test_mesh_partitions.py``).
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Callable

import pytest
from labbench import HOSTS, SITES, TOP, Boot, LabBench

pytestmark = pytest.mark.timeout(300)  # a few boots, and waits that are the point, on a busy machine

LEASE_SECONDS = 8
GONE_SECONDS = LEASE_SECONDS + 25  # what is late then is not late because the machine is slow
SMALL = ("--lease", str(LEASE_SECONDS), "--processes", "1")
DAEMON = "/etc/meshcompute/site.toml"
OF_A_CLUSTER = ("meshcompute-gateway/", "wireguard-go", "entrypoint.py", "relay.py")
SLEEP = ("--", "sleep", "1000")


def start(bench: LabBench, *arguments: str) -> Boot:
    """Start a small cluster with a short lease, which is ready."""
    boot = bench.start_boot(*SITES, *SMALL, *arguments)
    boot.wait_for(" ready: ")
    if "--" not in arguments:
        boot.wait_for("Ctrl-C takes it down")
    return boot


def kill(boot: Boot, signum: int = signal.SIGKILL) -> int:
    """Kill a client, with nothing that it could still do."""
    os.kill(boot.pid, signum)
    return boot.wait()


def kill_daemons(bench: LabBench, *hosts: str) -> None:
    for host in hosts:
        bench.kill(host, *bench.pids(host, DAEMON))


def wait_nothing_runs(bench: LabBench, *hosts: str) -> None:
    """Wait until no process of any cluster is there, by the deadlines that they carry themselves."""

    def left() -> list[tuple[str, int]]:
        return [(host, pid) for host in hosts for what in OF_A_CLUSTER for pid in bench.pids(host, what)]

    bench.wait_until(lambda: not left(), f"nothing of a cluster runs at {' and '.join(hosts)}", GONE_SECONDS)


def status(bench: LabBench) -> str:
    return bench.lab.run("client", "meshcompute", "status", user="mesh").stdout


def wait_forgotten(bench: LabBench) -> None:
    """Wait until the person's own list of clusters is empty; whoever asks for it sweeps it."""
    bench.wait_until(lambda: "no cluster of yours" in status(bench), "the record is swept", GONE_SECONDS)


def test_a_client_that_was_killed_leaves_nothing_after_its_lease(bench: LabBench) -> None:
    before = bench.observe()
    boot = start(bench, "--name", "orphan")
    kill(boot)
    shown = status(bench)
    assert re.search(r"orphan .*kept by nobody: it ends with its leases", shown), shown
    bench.wait_until(lambda: not any(map(bench.containers, HOSTS)), "no container is left", GONE_SECONDS)
    wait_forgotten(bench)
    bench.wait_as(before)


def test_what_a_killed_client_has_left_is_ended_at_once_by_down(bench: LabBench) -> None:
    before = bench.observe()
    boot = bench.start_boot(*SITES, "--processes", "1", "--name", "orphan")  # with a lease of two minutes
    boot.wait_for(" ready: ")
    kill(boot)
    down = bench.lab.run("client", "meshcompute", "down", "orphan", user="mesh")
    assert down.stderr.count("removed in") == len(HOSTS), down.stderr
    bench.wait_as(before)


def kill_scheduler_process(bench: LabBench) -> None:
    bench.kill("client", *bench.pids("client", "locallistener.py"))  # which it loads


def kill_scheduler_container(bench: LabBench) -> None:
    (container,) = bench.containers("client")
    bench.lab.run("client", "docker", "kill", container)


def remove_scheduler_container(bench: LabBench) -> None:
    (container,) = bench.containers("client")
    bench.lab.run("client", "docker", "rm", "-f", container)


@pytest.mark.parametrize(
    ("end_it", "command"),
    [(kill_scheduler_process, SLEEP), (kill_scheduler_container, ()), (remove_scheduler_container, ())],
)
def test_a_scheduler_that_died_ends_the_cluster_and_the_client_says_so(
    bench: LabBench, end_it: Callable[[LabBench], None], command: tuple[str, ...]
) -> None:
    before = bench.observe()
    boot = start(bench, *command)
    end_it(bench)
    assert boot.wait() == 1, boot.said
    assert "The scheduler has ended" in boot.said
    assert "the scheduler is gone: ending the rest" in boot.said
    assert boot.said.count("removed in") == len(HOSTS)
    assert ("ending sleep: its cluster is gone" in boot.said) == bool(command)
    bench.wait_as(before)


def test_a_site_whose_daemon_stays_dead_ends_its_part_by_itself_and_the_rest_goes_on(bench: LabBench) -> None:
    before = bench.observe()
    boot = start(bench)
    kill_daemons(bench, "ecmwf")
    wait_nothing_runs(bench, "ecmwf")
    boot.wait_for("its lease has ended")
    boot.wait_for("going on without mesh@10.8.0.4 (ecmwf)")
    # The scheduler was told that its worker is gone, and the other one is there.
    assert bench.python(_WORKERS, boot.address).split() == ["eumetsat-2-0"]
    assert boot.stop() == 0
    assert "mesh@10.8.0.2 (eumetsat): removed in" in boot.said
    assert re.search(r"Site mesh@10.8.0.4.*; it ends its part by itself", boot.said)
    bench.restart_daemon("ecmwf")
    bench.wait_as(before)


_WORKERS = """
import sys
from distributed import Client
with Client(sys.argv[1], timeout="60s") as client:
    print(*(worker["name"] for worker in client.scheduler_info(n_workers=-1)["workers"].values()))
"""


def test_a_client_whose_own_daemon_stays_dead_says_so_and_ends_the_rest(bench: LabBench) -> None:
    before = bench.observe()
    boot = start(bench, *SLEEP)
    kill_daemons(bench, "client")
    assert boot.wait() == 1, boot.said
    assert "the scheduler is gone: ending the rest" in boot.said
    assert "mesh@10.8.0.4 (ecmwf): removed in" in boot.said
    assert "mesh@10.8.0.2 (eumetsat): removed in" in boot.said
    wait_nothing_runs(bench, *HOSTS)
    bench.restart_daemon("client")
    bench.wait_as(before)


def test_when_client_and_all_daemons_die_at_once_nothing_runs_after_the_lease(bench: LabBench) -> None:
    before = bench.observe()
    boot = start(bench)
    kill_daemons(bench, *HOSTS)
    kill(boot)
    wait_nothing_runs(bench, *HOSTS)
    for host in HOSTS:
        bench.restart_daemon(host)
    wait_forgotten(bench)
    bench.wait_as(before)


STAGES = ("reached in", "public keys exchanged", "every gateway knows", "links have shaken hands")


def test_boots_that_were_killed_half_way_leave_nothing_after_their_leases_and_hinder_no_new_one(
    bench: LabBench,
) -> None:
    before = bench.observe()
    for stage in STAGES[:3]:  # as many as a person may have besides the last one
        boot = bench.start_boot(*SITES, *SMALL)
        boot.wait_for(stage)
        kill(boot)
    boot = start(bench)
    assert "ready: 2 workers" in boot.said
    assert boot.stop() == 0
    boot = bench.start_boot(*SITES, *SMALL)
    boot.wait_for(STAGES[3])
    kill(boot)
    wait_forgotten(bench)
    bench.wait_as(before, GONE_SECONDS)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_boot_that_is_interrupted_half_way_takes_down_what_there_is_and_says_so(
    bench: LabBench, signum: signal.Signals
) -> None:
    before = bench.observe()
    boot = bench.start_boot(*SITES, "--processes", "1")
    boot.wait_for("public keys exchanged" if signum == signal.SIGINT else "links have shaken hands")
    assert boot.stop(signum) == 128 + signum
    assert boot.said.count("removed in") == len(HOSTS), boot.said
    assert "everything is taken down" in boot.said
    bench.wait_as(before)


LATE = """
import asyncio, json, sys
from meshcompute.mesh.control import SiteControl
from meshcompute.protocol import MAX_EPOCH, ClusterSpec
from meshcompute.mesh.sites import SiteRefusedError, parse_site

def spec(epoch):
    return ClusterSpec(name="late", epoch=epoch, role="site", prefix="fda5:c0ff:eeee::/48", site=1, lease_seconds=60)

async def main(cluster_id, steps):
    site = SiteControl(parse_site("mesh@10.8.0.4"))
    try:
        for step in steps:
            try:
                if step == "put":
                    status = await site.call(lambda client: client.put(cluster_id, spec(1)))
                elif step == "renew":
                    status = await site.call(lambda client: client.renew(cluster_id, 1))
                else:
                    status = await site.call(lambda client: client.delete(cluster_id, MAX_EPOCH))
                    while status.phase != "gone":
                        status = await site.call(lambda client: client.status(cluster_id))
                print(status.phase)
            except SiteRefusedError as exc:
                print(exc.kind, exc.message)
    finally:
        await site.close()

asyncio.run(main(sys.argv[1], sys.argv[2:]))
"""


def test_a_late_put_does_not_bring_an_ended_cluster_back_also_after_a_restart_of_the_daemon(bench: LabBench) -> None:
    before = bench.observe()
    cluster_id = f"{os.getpid():032x}"
    said = bench.python(LATE, cluster_id, "put", "delete", "put", "renew").splitlines()
    assert said[0] in ("pending", "ready")
    assert said[1] == "gone"
    assert re.match(r"conflict .*A late request does not bring it back", said[2]), said
    assert re.match(r"conflict .*has ended here: user mesh ended it", said[3]), said
    kill_daemons(bench, "ecmwf")
    bench.wait_until(lambda: not bench.pids("ecmwf", DAEMON), "the daemon is gone")
    bench.restart_daemon("ecmwf")
    assert bench.python(LATE, cluster_id, "put").startswith("conflict ")
    # A request to end what was never here is remembered, too: its PUT may still be on its way.
    other_id = f"{os.getpid() + 1:032x}"
    assert bench.python(LATE, other_id, "delete", "put").split()[:2] == ["gone", "conflict"]
    bench.wait_as(before)


def test_a_detached_cluster_is_kept_after_the_session_that_started_it(bench: LabBench) -> None:
    before = bench.observe()
    boot = shlex.join([str(TOP / "scripts/dask-boot.sh"), *SITES, *SMALL, "--detach", "--name", "apart"])
    # A session with a terminal of its own, which hangs up at its end, as a person's does at logout.
    session = ["setsid", "--wait", "script", "--quiet", "--return", "--command", boot, "/dev/null"]
    said = bench.lab.run("client", *session, user="mesh", timeout=100.0, stdin=subprocess.DEVNULL).stdout
    assert "it runs on in the background" in said
    record = bench.lab.run("client", "sh", "-c", "ls /tmp/meshcompute-*/apart.json").stdout.strip()
    written = bench.lab.run("client", "stat", "-c", "%.Y", record).stdout
    bench.wait_until(
        lambda: bench.lab.run("client", "stat", "-c", "%.Y", record).stdout != written, "it renews its leases"
    )
    assert "kept by process" in status(bench)
    down = bench.lab.run("client", "meshcompute", "down", "apart", user="mesh")
    assert down.stderr.count("removed in") == len(HOSTS), down.stderr
    bench.wait_as(before)
