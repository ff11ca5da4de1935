"""A cluster over two data centres, from its start to its end, as the person who starts it sees it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from labbench import SITES, TOP, LabBench

CLIENT = """
import json, os, sys, urllib.request
from distributed import Client
import dask.array as da
from meshcompute import pool, propagate_pools
"""
LOOK = f"""{CLIENT}
with Client("localhost:8786") as client:
    client.wait_for_workers(8, timeout=60)
    info = client.scheduler_info(n_workers=-1)
    pages = [urllib.request.urlopen("http://localhost:8787" + path, timeout=30) for path in ("/status", "/health")]
    print(json.dumps({{
        "scheduler": info["address"],
        "workers": {{worker["name"]: address for address, worker in info["workers"].items()}},
        "resources": {{worker["name"]: worker["resources"] for worker in info["workers"].values()}},
        "pool names": client.run(lambda dask_worker: [dask_worker.name, os.environ["POOL_NAME"]]),
        "pages": [page.status for page in pages],
    }}))
    for page in pages:
        page.close()
"""
COMPUTE = f"""{CLIENT}
with Client(*sys.argv[1:]) as client:
    client.wait_for_workers(8, timeout=60)
    with pool("ecmwf"):
        left = da.ones((1000, 1000), chunks=250)
    with pool("eumetsat"):
        right = da.ones((1000, 1000), chunks=250)
    with propagate_pools():
        print(float((left.mean(axis=0) + right.mean(axis=0)).sum().compute()))
"""
HOLD = """
import socket, sys, time
held = [socket.create_server(("127.0.0.1", int(port))) for port in sys.argv[1:]]
print("held", flush=True)
time.sleep(1000)
"""
NAMES = {f"{pool}-{number}" for pool in ("ecmwf-1", "eumetsat-2") for number in range(4)}


@contextmanager
def held_ports(bench: LabBench, *ports: int) -> Iterator[None]:
    """Let another program of the client's host have ports of its loopback address."""
    holder = bench.start_python(HOLD, *map(str, ports), user="guest")
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        yield
    finally:
        holder.kill()
        holder.communicate()


def mesh(bench: LabBench, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run ``meshcompute`` as the user on the client's host."""
    return bench.lab.run("client", "meshcompute", *arguments, user="mesh", check=check)


def test_a_cluster_has_the_reference_s_addresses_and_names_computes_and_leaves_nothing(bench: LabBench) -> None:
    before = bench.observe()
    with bench.booted("--prefix", "fda5:c0ff:eeee") as boot:
        assert re.search(r"ready: 8 workers", boot.said)
        assert boot.address == "tcp://127.0.0.1:8786"
        assert boot.wait_for("dashboard at ").endswith("http://127.0.0.1:8787/status")
        seen = json.loads(bench.python(LOOK))
        assert seen["scheduler"] == "tcp://[fda5:c0ff:eeee::1]:8786"
        hosts = {name: address.rpartition(":")[0] for name, address in seen["workers"].items()}
        assert hosts == {
            name: f"tcp://[fda5:c0ff:eeee:{number}::11]" for name in NAMES for number in [name.split("-")[1]]
        }
        assert seen["resources"] == {name: {f"pool-{name.split('-')[0]}": 1.0} for name in NAMES}
        assert dict(seen["pool names"].values()) == {name: name.split("-")[0] for name in NAMES}
        assert seen["pages"] == [200, 200]
        assert bench.python(COMPUTE, boot.address).split()[-1] == "2000.0"
        assert boot.stop(signal.SIGINT) == 0
        assert "everything is taken down" in boot.said
    bench.wait_as(before)


def test_a_command_finds_its_cluster_and_its_output_and_exit_code_are_passed_on(bench: LabBench) -> None:
    before = bench.observe()
    program = f"{COMPUTE}\nprint(os.environ['DASK_SCHEDULER_ADDRESS'])\nsys.exit(7)"
    command = (str(TOP / "scripts/dask-boot.sh"), *SITES, "--", sys.executable, "-c", program)
    done = bench.lab.run("client", *command, user="mesh", check=False, timeout=100)
    assert done.returncode == 7, done.stderr
    assert done.stdout.split() == ["2000.0", "tcp://127.0.0.1:8786"]  # progress is no output
    assert "everything is taken down" in done.stderr
    bench.wait_as(before)


def test_a_signal_ends_the_command_and_the_cluster(bench: LabBench) -> None:
    before = bench.observe()
    boot = bench.start_boot(*SITES, "--processes", "1", "--", "sh", "-c", "echo begun >&2; exec sleep 1000.25")
    boot.wait_for("begun")
    assert len(bench.pids("client", "1000.25")) == 2  # dask-boot.sh has it in its command line, too
    assert boot.stop(signal.SIGTERM) == 128 + signal.SIGTERM
    assert "everything is taken down" in boot.said
    bench.wait_as(before)


def test_a_detached_cluster_is_shown_gives_its_logs_and_is_taken_down_by_name(bench: LabBench) -> None:
    before = bench.observe()
    with held_ports(bench, 8786, 8787):
        boot = bench.start_boot(*SITES, "--detach", "--name", "apart")
        boot.wait_for("it runs on in the background; `meshcompute down apart` takes it down")
        assert boot.wait() == 0
        port = int(boot.address.rpartition(":")[2])
        page = boot.wait_for("dashboard at ").split()[-1]
        assert port not in {8786, 8787}
        assert ":8787/" not in page

        shown = mesh(bench, "status").stdout
        assert shown.startswith("apart ")
        assert f"127.0.0.1:{port}" in shown
        for site in ("mesh@10.8.0.4", "mesh@10.8.0.2"):
            assert re.search(
                rf"{site} +ready, lease \d+ s, 4 of 4 workers run, link 0: .* ago, link [12]: .* ago", shown
            )
        assert bench.python(COMPUTE, boot.address).split()[-1] == "2000.0"

        logs = mesh(bench, "logs", "ecmwf").stdout
        assert {line.removeprefix("--- ") for line in logs.splitlines() if line.startswith("--- ")} == {
            name for name in NAMES if name.startswith("ecmwf")
        }
        one = mesh(bench, "logs", "eumetsat", "eumetsat-2-1", "--lines", "5").stdout.splitlines()
        assert one[0] == "--- eumetsat-2-1"
        assert 1 < len(one) <= 6
        assert all(line.startswith("eumetsat-2-1 | ") for line in one[1:])
        assert "Scheduler at" in mesh(bench, "logs", "scheduler").stdout
        unknown = mesh(bench, "logs", "mars", check=False)
        assert unknown.returncode == 1
        assert "has no site 'mars'; it has scheduler, ecmwf, eumetsat" in unknown.stderr

        assert "removed in" in mesh(bench, "down", "apart").stderr
        assert mesh(bench, "status").stdout == "no cluster of yours runs on this host\n"
    bench.wait_as(before)


def test_a_port_that_was_asked_for_and_is_taken_is_named_and_nothing_is_built(bench: LabBench) -> None:
    before = bench.observe()
    with held_ports(bench, 9786):
        boot = bench.start_boot(*SITES, "--port", "9786")
        assert boot.wait() == 1
        assert "Port 9786 of 127.0.0.1, wanted for the scheduler, is in use; end what listens there, name" in boot.said
        assert "gateways made" not in boot.said
    bench.wait_as(before)
