"""What dies under a running computation and is made again: it goes on, and no worker is lost that did not die itself.

Covers the daemon of a site, what holds its gateway, WireGuard, and workers, one after the other on one cluster.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from labbench import Boot, LabBench
from labwork import Work, names, working

pytestmark = pytest.mark.timeout(300)  # a few boots, and waits that are the point, on a busy machine

DAEMON = "/etc/meshcompute/site.toml"
KEEPER = "meshcompute-gateway/"
WIREGUARD = "wireguard-go"
WORKERS = names(2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A cluster that the tests of this file share."""

    bench: LabBench
    boot: Boot

    def processes(self, host: str) -> dict[str, list[int]]:
        """Everything of the cluster at a host."""
        return {what: self.bench.pids(host, what) for what in (KEEPER, WIREGUARD, "entrypoint.py")}

    def keys(self, host: str) -> str:
        """Public key and port of a gateway, and its peers."""
        (keeper,) = self.bench.pids(host, KEEPER)
        enter = ["nsenter", "-t", str(keeper), "-m", "-n", "--"]
        shown = self.bench.lab.run(host, *enter, "sh", "-c", "wg show all public-key; wg show all listen-port")
        return shown.stdout


@pytest.fixture(scope="module")
def cluster(mesh_lab: LabBench) -> Iterator[Cluster]:
    """A cluster of two workers at each site; when it is stopped, every host must look as before."""
    before = mesh_lab.observe()
    with mesh_lab.booted("--processes", "2") as boot:
        yield Cluster(bench=mesh_lab, boot=boot)
        assert boot.stop() == 0, boot.said
        assert "everything is taken down" in boot.said
    mesh_lab.wait_as(before)


@pytest.fixture
def work(cluster: Cluster) -> Iterator[Work]:
    """A computation on it."""
    with working(cluster.bench, cluster.boot, n_workers=len(WORKERS)) as work:
        yield work


def test_a_daemon_that_was_killed_and_started_again_adopts_what_runs(cluster: Cluster, work: Work) -> None:
    bench = cluster.bench
    processes, keys, containers = cluster.processes("ecmwf"), cluster.keys("ecmwf"), bench.containers("ecmwf")
    bench.kill("ecmwf", *bench.pids("ecmwf", DAEMON))
    bench.wait_until(lambda: not bench.pids("ecmwf", DAEMON), "the daemon is gone")
    work.wait_rounds()
    bench.restart_daemon("ecmwf")
    work.wait_rounds()
    assert (cluster.processes("ecmwf"), cluster.keys("ecmwf")) == (processes, keys)
    assert bench.containers("ecmwf") == containers
    assert len(containers) == 1
    done = work.finish()
    assert done.is_right
    assert done.addresses_after == done.addresses_before
    assert set(done.addresses_after) == WORKERS


def test_wireguard_that_was_killed_is_made_again_with_the_same_key_and_no_worker_is_lost(
    cluster: Cluster, work: Work
) -> None:
    bench, host = cluster.bench, "eumetsat"
    (before,), keys = bench.pids(host, WIREGUARD), cluster.keys(host)
    bench.kill(host, before)
    bench.wait_until(lambda: bench.pids(host, WIREGUARD) not in ([], [before]), "another wireguard-go")
    work.wait_rounds()
    assert cluster.keys(host) == keys
    done = work.finish()
    assert done.is_right
    assert done.addresses_after == done.addresses_before


def test_the_process_that_holds_a_gateway_is_made_again_with_all_that_went_with_it(
    cluster: Cluster, work: Work
) -> None:
    bench, host = cluster.bench, "eumetsat"
    before, keys = cluster.processes(host), cluster.keys(host)
    bench.kill(host, *before[KEEPER])
    bench.wait_until(lambda: bench.pids(host, KEEPER) not in ([], before[KEEPER]), "another gateway")
    work.wait_rounds()
    after = cluster.processes(host)
    assert after["entrypoint.py"] == before["entrypoint.py"]
    assert after[WIREGUARD] != before[WIREGUARD]
    assert cluster.keys(host) == keys
    done = work.finish()
    assert done.is_right
    assert done.addresses_after == done.addresses_before


def test_gateway_and_daemon_killed_together_come_back_with_a_new_key_that_is_handed_round(
    cluster: Cluster, work: Work
) -> None:
    bench, host = cluster.bench, "ecmwf"
    keys = cluster.keys(host)
    bench.kill(host, *bench.pids(host, DAEMON), *bench.pids(host, KEEPER))
    bench.wait_until(lambda: not bench.pids(host, DAEMON) and not bench.pids(host, KEEPER), "both are gone")
    bench.restart_daemon(host)
    cluster.boot.wait_for("a gateway was made anew: handing its public key round")
    work.wait_rounds()
    assert cluster.keys(host) != keys
    done = work.finish()
    assert done.is_right
    assert done.addresses_after == done.addresses_before


def test_a_worker_process_that_was_killed_is_started_again_under_its_name(cluster: Cluster, work: Work) -> None:
    bench = cluster.bench
    bench.kill("ecmwf", *bench.pids("ecmwf", "ecmwf-1-1"))
    work.wait_rounds()
    done = work.finish()
    assert done.is_right
    changed = {name for name in WORKERS if done.addresses_before[name] != done.addresses_after[name]}
    assert changed == {"ecmwf-1-1"}


def test_a_container_that_was_killed_is_started_again_with_its_workers(cluster: Cluster, work: Work) -> None:
    bench = cluster.bench
    (container,) = bench.containers("eumetsat")
    bench.lab.run("eumetsat", "docker", "kill", container)
    work.wait_rounds()
    done = work.finish()
    assert done.is_right
    changed = {name for name in WORKERS if done.addresses_before[name] != done.addresses_after[name]}
    assert changed == {name for name in WORKERS if name.startswith("eumetsat")}


def test_a_worker_that_does_not_end_when_asked_is_killed(cluster: Cluster) -> None:
    bench = cluster.bench
    (stopped,) = bench.pids("ecmwf", "ecmwf-1-0")
    bench.kill("ecmwf", stopped, signum=signal.SIGSTOP)
    # It hears nothing any more. The end of the cluster, which the fixture expects to be whole, needs SIGKILL.
    assert bench.lab.run("ecmwf", "grep", "-c", "^State:\tT", f"/proc/{stopped}/status").stdout.strip() == "1"
