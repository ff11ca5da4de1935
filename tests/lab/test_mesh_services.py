"""A service on one site's LAN, which its operator names: workers of that site reach it, and nobody else does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from labbench import LabBench
from labprobes import REACH, reachable

from controlplane.network.topology import address_of, parse_prefix, service_address_of

pytestmark = pytest.mark.timeout(300)
SITE_FILE = "/etc/meshcompute/site.toml"
PREFIX = parse_prefix("fda5:c0ff:eeee")
NAME, STORE, PORT = "objects.ecmwf.example", "10.1.0.5", 9000
SERVE = """
import socket, sys
with socket.create_server((sys.argv[1], int(sys.argv[2]))) as server:
    print("listening", flush=True)
    while True:
        server.accept()[0].close()
"""
FROM_THE_CLUSTER = f"""
{REACH}
import json, sys
from distributed import Client
targets = json.loads(sys.argv[2])
with Client(sys.argv[1]) as client:
    names = {{address: w["name"] for address, w in client.scheduler_info(n_workers=-1)["workers"].items()}}
    found = {{names[address]: answer for address, answer in client.run(reach, targets).items()}}
    print(json.dumps({{**found, "scheduler": client.run_on_scheduler(reach, targets)}}))
"""


@pytest.fixture
def store(bench: LabBench) -> Iterator[None]:
    """Have something that listens on ecmwf's own LAN, of which the WAN knows nothing, and its operator names it."""
    bench.lab.run("ecmwf", "ip", "address", "add", f"{STORE}/32", "dev", "lo")
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "text": True}
    server = bench.lab.popen("ecmwf", sys.executable, "-c", SERVE, STORE, str(PORT), **pipes)
    text = bench.lab.run("ecmwf", "cat", SITE_FILE).stdout
    try:
        assert server.stdout.readline() == "listening\n"
        line = f'services = {{ "{NAME}" = "{STORE}:{PORT}" }}'
        configure(bench, re.sub(r"(?m)^endpoints = .*", rf"\g<0>\n{line}", text))
        yield
    finally:
        configure(bench, text)
        bench.kill("ecmwf", *bench.pids("ecmwf", "create_server"))
        server.wait(10)
        server.stdout.close()
        bench.lab.run("ecmwf", "ip", "address", "del", f"{STORE}/32", "dev", "lo")


def configure(bench: LabBench, text: str) -> None:
    bench.lab.run("ecmwf", "sh", "-c", 'cat >"$1"', "sh", SITE_FILE, input=text)
    bench.kill("ecmwf", *bench.pids("ecmwf", "meshcompute-site"), signum=15)
    bench.wait_until(lambda: not bench.pids("ecmwf", "meshcompute-site"), "ecmwf's daemon has ended")
    bench.restart_daemon("ecmwf")


def test_workers_of_the_site_reach_a_service_by_its_name_and_nobody_else_does(bench: LabBench, store: None) -> None:
    said = bench.lab.run("ecmwf", "meshcompute-site", "check", check=False).stdout
    assert f"service: workers reach {NAME}:{PORT} at {STORE}" in said
    address = str(service_address_of(PREFIX, 1, NAME))
    gateway = str(address_of(PREFIX, 1, 1))
    targets = [(NAME, PORT), (address, PORT), (address, 22), (STORE, PORT), (gateway, PORT), ("10.8.0.4", 22)]
    with bench.booted("--processes", "1", "--prefix", "fda5:c0ff:eeee") as boot:
        found = json.loads(bench.python(FROM_THE_CLUSTER, boot.address, json.dumps(targets)))
        assert found == {
            "ecmwf-1-0": [[NAME, PORT], [address, PORT]],
            "eumetsat-2-0": [],
            "scheduler": [],
        }
        outside = {host: reachable(bench.lab, host, targets[1:4]) for host in ("client", "ecmwf", "eumetsat")}
        assert outside == {"client": set(), "ecmwf": {(STORE, PORT)}, "eumetsat": set()}
