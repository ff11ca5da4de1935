"""Two people with clusters at the same sites at once: neither sees, changes, reads or ends what is the other's.

The order of the tests counts: the last two end the clusters.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv6Network
from typing import Any

import pytest
from labbench import HOSTS, Boot, LabBench
from labprobes import ask_site

MAX_EPOCH = 2**53 - 1
USERS = ("mesh", "guest")
OTHER = {"mesh": "guest", "guest": "mesh"}
COMPUTE = """
import os, sys
from distributed import Client
import dask.array as da
from meshcompute import pool, propagate_pools
with Client(sys.argv[1]) as client:
    client.wait_for_workers(2, timeout=60)
    while True:
        with propagate_pools():
            with pool("ecmwf"):
                left = da.ones((100, 100), chunks=50)
            with pool("eumetsat"):
                right = da.ones((100, 100), chunks=50)
            print(float((left + right).sum().compute()), len(client.scheduler_info()["workers"]), flush=True)
        if len(sys.argv) == 2 or os.path.exists(sys.argv[2]):
            break
"""
# Tries to open, as whoever runs it, each file or socket; names those that let it.
OPEN = """
import json, os, socket, stat, sys
def opens(path):
    try:
        if path.startswith("@") or stat.S_ISSOCK(os.stat(path).st_mode):
            kind = socket.SOCK_SEQPACKET if path.startswith("@meshcompute-gateway") else socket.SOCK_STREAM
            with socket.socket(socket.AF_UNIX, kind) as connection:
                connection.settimeout(5)
                connection.connect(path.replace("@", "\\0", 1))
                connection.send(json.dumps({"do": "status"}).encode())
                return bool(connection.recv(100))
        os.listdir(path) if os.path.isdir(path) else open(path, "rb").close()
        return True
    except OSError:
        return False
print(json.dumps([path for path in json.load(sys.stdin) if opens(path)]))
"""
# Names the places that answer something to an HTTP request: the dashboard does, and a scheduler greets everybody.
KNOCK = """
import json, socket, sys
def answers(place):
    host, port = place.split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        try:
            connection.sendall(b"GET /health HTTP/1.0\\r\\n\\r\\n")
            return bool(connection.recv(1))
        except ConnectionError:
            return False
print(json.dumps([place for place in json.loads(sys.argv[1]) if answers(place)]))
"""
SOCKETS = r"""
import glob, json, os, re, sys
own = int(sys.argv[1])
sockets = [line.split() for line in open("/proc/net/unix")]
found = [words[7] for words in sockets if len(words) > 7 and words[7].startswith("@meshcompute-gateway/")]
for top in filter(lambda path: os.lstat(path).st_uid == own, [*glob.glob("/tmp/*"), *glob.glob("/run/*")]):
    found.append(top)
    for folder, folders, names in os.walk(top):
        found += [os.path.join(folder, name) for name in (*folders, *names)]
for process in glob.glob("/proc/[0-9]*"):
    try:
        if os.stat(process).st_uid == own:
            found.append(process + "/environ")
    except OSError:
        pass
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Both:
    """The clusters of both people."""

    bench: LabBench
    boots: dict[str, Boot]
    ids: dict[str, str]

    def ask(
        self, host: str, method: str, path: str, body: object = None, *, user: str, groups: str = ""
    ) -> tuple[int, Any]:
        """Ask a host's daemon as somebody; gives the status and the body."""
        (answer,) = ask_site(self.bench.lab, host, (method, path, body), user=user, groups=groups)
        return answer[0], answer[1]


@pytest.fixture(scope="module")
def both(mesh_lab: LabBench) -> Iterator[Both]:
    """Have clusters of both people, whose boots run at the same time; afterwards, every host looks as before."""
    bench = mesh_lab
    before = bench.observe()
    boots = {}
    try:
        for user in USERS:
            sites = (f"{user}@10.8.0.4", f"{user}@10.8.0.2")
            boots[user] = bench.start_boot(*sites, "--processes", "1", "--name", f"of-{user}", user=user)
        ids = {}
        for user, boot in boots.items():
            boot.wait_for(" ready: ")
            ((_ok, (cluster,)),) = ask_site(bench.lab, "ecmwf", ("GET", "/v1/clusters"), user=user)
            ids[user] = cluster["cluster_id"]
        yield Both(bench=bench, boots=boots, ids=ids)
    finally:
        for boot in boots.values():
            if boot.process.poll() is None:
                boot.stop()
    bench.wait_as(before)


def test_both_compute_at_once(both: Both) -> None:
    addresses = {boot.address for boot in both.boots.values()}
    assert len(addresses) == 2  # of one host: whoever came second took another port
    runs = [both.bench.start_python(COMPUTE, boot.address, user=user) for user, boot in both.boots.items()]
    for run in runs:
        out, said = run.communicate(timeout=100)
        assert out == "20000.0 2\n", said


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("user", USERS)
def test_a_person_is_told_of_the_own_cluster_only(both: Both, user: str, host: str) -> None:
    status, clusters = both.ask(host, "GET", "/v1/clusters", user=user)
    assert status == 200
    assert [cluster["cluster_id"] for cluster in clusters] == [both.ids[user]]
    theirs = f"/v1/clusters/{both.ids[OTHER[user]]}"
    unit = "scheduler" if host == "client" else "ecmwf-1-0" if host == "ecmwf" else "eumetsat-2-0"
    nobodys = f"/v1/clusters/{'0' * 32}"
    for method, more, body in (
        ("GET", "", None),
        ("DELETE", f"?epoch={MAX_EPOCH}", None),
        ("POST", "/lease", {"epoch": 1}),
        ("GET", f"/logs?worker={unit}", None),
    ):
        status, answer = both.ask(host, method, theirs + more, body, user=user)
        assert (status, answer["error"]["kind"]) == (404, "not_found")
        if method != "DELETE":  # which takes note of an id that nobody has, so that a late PUT does not bring it
            _status, unknown = both.ask(host, method, nobodys + more, body, user=user)
            said = answer["error"]["message"].replace(both.ids[OTHER[user]], "0" * 32)
            assert said == unknown["error"]["message"]  # as if there were none
        status, _own = both.ask(host, "GET", f"/v1/clusters/{both.ids[user]}", user=user)
        assert status == 200


@pytest.mark.parametrize("user", USERS)
def test_the_commands_know_the_own_cluster_only(both: Both, user: str) -> None:
    run = both.bench.lab.run
    shown = run("client", "meshcompute", "status", user=user).stdout
    assert f"of-{user} " in shown
    assert f"of-{OTHER[user]}" not in shown
    for command in (("down", f"of-{OTHER[user]}"), ("logs", "ecmwf", "--name", f"of-{OTHER[user]}")):
        refused = run("client", "meshcompute", *command, user=user, check=False)
        assert refused.returncode == 1
        assert f"No cluster 'of-{OTHER[user]}' of yours runs on this host. There are: of-{user}." in refused.stderr


def test_nobody_takes_the_id_or_the_prefix_of_another_s_cluster(both: Both) -> None:
    (theirs,) = both.ask("ecmwf", "GET", "/v1/clusters", user="mesh")[1]
    spec = {"name": "x", "epoch": MAX_EPOCH - 1, "role": "site", "site": 1, "prefix": "fdcc:cccc:cccc::/48"}
    status, answer = both.ask("ecmwf", "PUT", f"/v1/clusters/{theirs['cluster_id']}", spec, user="guest")
    assert (status, answer["error"]["kind"]) == (409, "conflict"), answer
    assert "mesh " not in answer["error"]["message"]
    prefix = str(IPv6Network((theirs["address"], 48), strict=False))
    status, answer = both.ask("ecmwf", "PUT", f"/v1/clusters/{'1' * 32}", {**spec, "prefix": prefix}, user="guest")
    assert (status, answer["error"]["kind"]) == (409, "conflict"), answer
    assert "is in use by another cluster at this site" in answer["error"]["message"]
    assert both.ask("ecmwf", "GET", f"/v1/clusters/{theirs['cluster_id']}", user="mesh")[1]["epoch"] == theirs["epoch"]


@pytest.mark.parametrize("user", USERS)
def test_a_scheduler_s_ports_answer_to_its_owner_and_root_alone(both: Both, user: str) -> None:
    boot = both.boots[user]
    places = [boot.address.removeprefix("tcp://"), boot.wait_for("dashboard at http://").split("/")[-2]]
    answers = {
        who: json.loads(both.bench.python(KNOCK, json.dumps(places), user=who)) for who in (user, OTHER[user], "root")
    }
    assert answers == {user: places, OTHER[user]: [], "root": places}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("user", USERS)
def test_a_person_can_open_nothing_of_the_other_s(both: Both, user: str, host: str) -> None:
    lab = both.bench.lab
    account = next(account for account in lab.status().lab.accounts if account.name == OTHER[user])
    theirs = json.loads(lab.run(host, sys.executable, "-c", SOCKETS, str(account.uid)).stdout)
    assert any(path.startswith("@meshcompute-gateway/") for path in theirs)
    assert any(path.endswith("/environ") for path in theirs)
    if host == "client":  # sockets of SSH's forwarding, and the record of the cluster
        assert any(path.endswith(".sock") for path in theirs)
        assert any(path.endswith(f"/of-{OTHER[user]}.json") for path in theirs)
    theirs += ["/run/docker.sock", "/var/run/docker/containerd/containerd.sock", "/var/lib/meshcompute/clusters"]
    opened = {
        who: json.loads(lab.run(host, sys.executable, "-c", OPEN, user=who, input=json.dumps(theirs)).stdout)
        for who in (user, "root")
    }
    assert opened[user] == []
    assert len(opened["root"]) > 0.5 * len(theirs)  # they are there, and can be opened


def test_the_end_of_one_cluster_does_not_touch_the_other(both: Both) -> None:
    bench = both.bench
    enough = "/tmp/enough-of-guest"
    run = bench.start_python(COMPUTE, both.boots["guest"].address, enough, user="guest")
    assert run.stdout is not None
    try:
        assert run.stdout.readline() == "20000.0 2\n"
        assert both.boots["mesh"].stop() == 0
        assert "everything is taken down" in both.boots["mesh"].said
        for _round in range(3):
            assert run.stdout.readline() == "20000.0 2\n"
    finally:
        bench.lab.run("client", "touch", enough)
        out, said = run.communicate(timeout=60)
        bench.lab.run("client", "rm", enough)
    assert set(out.splitlines()) <= {"20000.0 2"}, said
    assert run.returncode == 0, said
    for host in HOSTS:
        assert both.ask(host, "GET", f"/v1/clusters/{both.ids['guest']}", user="guest")[1]["phase"] == "ready"
        assert all(both.ids["guest"][:8] in name for name in bench.containers(host))


def test_the_operators_group_sees_everybody_s_clusters_and_ends_them(both: Both) -> None:
    for host in HOSTS:
        status, clusters = both.ask(host, "GET", "/v1/clusters", user="mesh", groups="operator")
        assert status == 200
        assert both.ids["guest"] in [cluster["cluster_id"] for cluster in clusters]
    for host in HOSTS:
        path = f"/v1/clusters/{both.ids['guest']}"
        assert both.ask(host, "GET", path, user="mesh")[0] == 404
        assert both.ask(host, "DELETE", f"{path}?epoch={MAX_EPOCH}", user="mesh", groups="operator")[0] == 200
    assert both.boots["guest"].wait() == 1
    assert "the scheduler is gone" in both.boots["guest"].said
