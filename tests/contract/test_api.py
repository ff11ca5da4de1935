"""The daemon as a process, spoken to over its unix socket: who may do what, what is refused, what survives."""

import json
import os
import pwd
import re
import signal
import socket
from pathlib import Path

import pytest
from sitedaemon import PATIENCE_SECONDS, SiteDaemon, acting_as, new_id
from waiting import wait_until

from controlplane.daemon import own_version
from controlplane.openapi import openapi_document
from meshcompute.protocol import STATUS_BY_ERROR_KIND, ClusterStatus, Health, SiteInfo

ACCESS = """
[access]
users = ["nobody"]
groups = ["games"]
operators_group = "mail"
[limits]
clusters = 2
clusters_total = 4
workers = 4
[workers]
processes_per_container = 1
memory_per_process = "256 MiB"
"""
CHANGES = [
    ("PUT", "/v1/clusters/{id}"),
    ("GET", "/v1/clusters/{id}"),
    ("DELETE", "/v1/clusters/{id}?epoch=1"),
    ("POST", "/v1/clusters/{id}/lease"),
    ("GET", "/v1/clusters/{id}/logs"),
    ("GET", "/v1/clusters"),
    ("GET", "/v1/site"),
]


@pytest.fixture(scope="module")
def site():
    """A daemon that this file's tests share, without workers."""
    daemon = SiteDaemon(ACCESS).start()
    yield daemon
    daemon.close()


@pytest.fixture
def own_site():
    """A daemon that a test may kill."""
    daemon = SiteDaemon(ACCESS).start()
    yield daemon
    daemon.close()


@pytest.fixture
def as_user(need):
    """Act as an account of this host."""
    need("root", os.geteuid() == 0)

    def as_user(name, *, groups=()):
        entry = pwd.getpwnam(name)
        return acting_as(entry.pw_uid, entry.pw_gid, groups)

    return as_user


@pytest.fixture
def cluster(site):
    """A cluster of this account, at epoch 5, that is ended afterwards."""
    cluster_id = new_id()
    assert site.put(cluster_id, epoch=5).status == 200
    yield cluster_id
    site.delete(cluster_id, epoch=9)
    site.wait_phase(cluster_id, "gone")


def test_the_site_says_what_it_is(site):
    info = SiteInfo.model_validate_json(site.request("GET", "/v1/site").text)
    assert (info.pool, info.role, info.runtime, info.network) == ("alpha", "both", "process", "loopback")
    assert info.limits.clusters == 2
    assert info.version == own_version()
    assert {"python", "dask", "distributed"} <= set(info.packages)


def test_the_daemon_is_healthy_and_publishes_its_document_and_numbers(site):
    assert Health.model_validate_json(site.request("GET", "/v1/health").text).is_healthy
    assert site.request("GET", "/v1/openapi.json").json == openapi_document(own_version())
    assert 'meshcompute_site_info{version="' in site.request("GET", "/v1/metrics").text


def test_everybody_reaches_the_socket_and_the_kernel_says_who_it_is(site, as_user):
    assert Path(site.socket).stat().st_mode & 0o777 == 0o666
    cluster_id = new_id()
    with as_user("nobody"):
        assert site.put(cluster_id).json["owner"] == "nobody"
        assert [found["cluster_id"] for found in site.request("GET", "/v1/clusters").json] == [cluster_id]
        assert site.delete(cluster_id).status == 200


@pytest.mark.parametrize(("method", "path"), CHANGES)
def test_whom_the_operator_does_not_name_gets_403_everywhere(site, as_user, method, path):
    with as_user("daemon"):
        answer = site.request(method, path.replace("{id}", new_id()), b"{}" if method in {"PUT", "POST"} else None)
        health = site.request("GET", "/v1/health").status
    assert (answer.status, answer.kind) == (403, "forbidden")
    assert "User daemon may not use site alpha" in answer.message
    assert health == 200


def test_a_caller_sees_and_changes_only_its_own_clusters(site, as_user):
    cluster_id = new_id()
    with as_user("nobody"):
        assert site.put(cluster_id).status == 200
    with as_user("games"):
        assert site.request("GET", "/v1/clusters").json == []
        assert site.get(cluster_id).kind == "not_found"
        assert site.delete(cluster_id, epoch=9).kind == "not_found"
        assert site.request("POST", f"/v1/clusters/{cluster_id}/lease", {"epoch": 1}).kind == "not_found"
        assert site.request("GET", f"/v1/clusters/{cluster_id}/logs").kind == "not_found"
        assert site.put(cluster_id, epoch=2).kind == "conflict"
    with as_user("nobody"):
        assert site.get(cluster_id).json["phase"] == "ready"
    with as_user("daemon", groups=[pwd.getpwnam("mail").pw_gid]):  # an operator, by a further group
        assert [found["owner"] for found in site.request("GET", "/v1/clusters").json] == ["nobody"]
        assert site.put(cluster_id, epoch=2).kind == "conflict"
        assert site.delete(cluster_id, epoch=2).status == 200
    with as_user("nobody"):
        ended = site.wait_phase(cluster_id, "gone")
        assert ended["conditions"][0]["message"] == "The cluster has ended: user daemon ended it."
    with as_user("games"):
        assert site.get(cluster_id).kind == "not_found"


def test_the_same_put_again_changes_nothing(site, cluster):
    again = ClusterStatus.model_validate_json(site.put(cluster, epoch=5).text)
    assert (again.epoch, again.phase) == (5, "ready")
    assert len(site.request("GET", "/v1/clusters").json) == 1


def test_an_older_epoch_and_the_same_epoch_with_other_content_are_conflicts(site, cluster):
    assert site.put(cluster, epoch=4).kind == "conflict"
    assert site.put(cluster, epoch=5, mtu=1400).kind == "conflict"
    assert site.request("POST", f"/v1/clusters/{cluster}/lease", {"epoch": 4}).kind == "conflict"
    assert site.request("POST", f"/v1/clusters/{cluster}/lease", {"epoch": 6}).kind == "conflict"
    assert site.delete(cluster, epoch=4).kind == "conflict"
    assert site.request("POST", f"/v1/clusters/{cluster}/lease", {"epoch": 5}).status == 200


def test_a_late_put_does_not_bring_a_deleted_cluster_back(site):
    cluster_id = new_id()
    site.put(cluster_id, epoch=1)
    assert site.delete(cluster_id, epoch=3).json["phase"] in {"removing", "gone"}
    site.wait_phase(cluster_id, "gone")
    for epoch in (1, 2, 3):
        late = site.put(cluster_id, epoch=epoch)
        assert (late.status, late.kind) == (409, "conflict")
    assert "ended" in site.request("POST", f"/v1/clusters/{cluster_id}/lease", {"epoch": 3}).message
    assert site.delete(cluster_id, epoch=1).json["phase"] == "gone"
    assert site.put(cluster_id, epoch=4).status == 200
    site.delete(cluster_id, epoch=4)


def test_a_delete_that_overtakes_its_put_wins(site):
    cluster_id = new_id()
    assert site.delete(cluster_id, epoch=2).json["phase"] == "gone"
    assert site.put(cluster_id, epoch=2).status == 409


def test_more_than_the_quota_is_429_with_what_to_do(site):
    ids = [new_id() for _ in range(3)]
    answers = [site.put(cluster_id) for cluster_id in ids]
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert "meshcompute down" in answers[2].message
    many = site.put(ids[0], epoch=2, workers={"containers": 5})
    assert (many.status, many.kind) == (429, "quota")
    for cluster_id in ids[:2]:
        site.delete(cluster_id)
        site.wait_phase(cluster_id, "gone")


def test_the_same_prefix_twice_is_refused(site, cluster):
    prefix = f"fd{cluster[:2]}:{cluster[2:6]}:{cluster[6:10]}::/48"
    assert site.put(new_id(), prefix=prefix).kind == "conflict"


WRONG = [
    ("GET", "/", None, 404, "not_found"),
    ("GET", "/v2/site", None, 404, "not_found"),
    ("GET", "/v1/clusters/", None, 404, "not_found"),
    ("GET", "/v1/clusters/../site", None, 404, "not_found"),
    ("POST", "/v1/site", b"{}", 405, "method_not_allowed"),
    ("PATCH", "/v1/clusters/{id}", b"{}", 405, "method_not_allowed"),
    ("GET", "/v1/clusters/nonsense", None, 422, "invalid"),
    ("GET", "/v1/clusters/%00", None, 422, "invalid"),
    ("GET", "/v1/clusters/{ID}", None, 422, "invalid"),
    ("GET", "/v1/clusters/{id}", None, 404, "not_found"),
    ("GET", "/v1/clusters/{id}/logs", None, 404, "not_found"),
    ("GET", "/v1/clusters/{id}/logs?lines=0", None, 400, "bad_request"),
    ("GET", "/v1/clusters/{id}/logs?lines=1&lines=2", None, 400, "bad_request"),
    ("GET", "/v1/clusters/{id}/logs?follow=1", None, 400, "bad_request"),
    ("DELETE", "/v1/clusters/{id}", None, 400, "bad_request"),
    ("DELETE", "/v1/clusters/{id}?epoch=-1", None, 400, "bad_request"),
    ("DELETE", "/v1/clusters/{id}?epoch=x", None, 400, "bad_request"),
    ("PUT", "/v1/clusters/{id}", None, 400, "bad_request"),
    ("PUT", "/v1/clusters/{id}", b"{", 400, "bad_request"),
    ("PUT", "/v1/clusters/{id}", b"\xff\xfe", 400, "bad_request"),
    ("PUT", "/v1/clusters/{id}", b"[" * 100_000, 400, "bad_request"),
    ("PUT", "/v1/clusters/{id}", b"[]", 422, "invalid"),
    ("PUT", "/v1/clusters/{id}", b"null", 422, "invalid"),
    ("PUT", "/v1/clusters/{id}", b"{}", 422, "invalid"),
    ("PUT", "/v1/clusters/{id}", b" " * 300_000, 413, "too_large"),
    ("POST", "/v1/clusters/{id}/lease", b'{"epoch": "1"}', 422, "invalid"),
    ("POST", "/v1/clusters/{id}/lease", b'{"epoch": 1, "more": 2}', 422, "invalid"),
    ("POST", "/v1/clusters/{id}/lease", b'{"epoch": 1}', 404, "not_found"),
]


@pytest.mark.parametrize(("method", "path", "body", "status", "kind"), WRONG, ids=[f"{m} {p}" for m, p, *_ in WRONG])
def test_wrong_requests_are_told_what_is_wrong(site, method, path, body, status, kind):
    answer = site.request(method, path.replace("{id}", new_id()).replace("{ID}", new_id().upper()), body)
    assert (answer.status, answer.kind) == (status, kind), answer.text
    assert STATUS_BY_ERROR_KIND[answer.kind] == status
    assert 20 < len(answer.message) <= 1000


def test_a_wrong_field_is_named_in_the_answer(site):
    answer = site.put(new_id(), epoch=0, peers=[{"site": 2, "name": "x", "endpoint": "nowhere"}])
    assert (answer.status, answer.kind) == (422, "invalid")
    assert "epoch" in answer.message
    assert "'nowhere' has no port" in answer.message


def test_what_is_no_http_harms_nobody(site):
    for rubbish in (b"\0" * 100, b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n", b""):
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(20)
            peer.connect(site.socket)
            peer.sendall(rubbish)
            peer.shutdown(socket.SHUT_WR)
            while peer.recv(1 << 16):
                pass
    assert site.answers()


def with_workers(port):
    return {
        "role": "scheduler",
        "site": 0,
        "scheduler": {"client_port": port, "dashboard_port": None},
        "workers": {"containers": 1, "scheduler_address": f"tcp://127.0.0.1:{port}"},
    }


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def registered(daemon, cluster_id):
    return "Register worker" in daemon.request("GET", f"/v1/clusters/{cluster_id}/logs?worker=scheduler").text


def test_a_daemon_that_is_stopped_or_killed_finds_its_cluster_again(own_site, port):
    cluster_id = new_id()
    assert own_site.put(cluster_id, **with_workers(port)).status == 200
    before = own_site.wait_phase(cluster_id, "ready")
    assert [worker["name"] for worker in before["workers"]] == ["alpha-0-0"]
    wait_until(lambda: registered(own_site, cluster_id), "registered worker", PATIENCE_SECONDS)
    processes = own_site.pids(cluster_id)
    assert len(processes) >= 2
    for number in (signal.SIGTERM, signal.SIGKILL):
        own_site.stop(number)
        assert own_site.pids(cluster_id) == processes
        own_site.start()
        after = own_site.wait_phase(cluster_id, "ready")
        assert own_site.pids(cluster_id) == processes
        assert (after["epoch"], after["scheduler"]) == (before["epoch"], before["scheduler"])
        assert 0 < after["lease_remaining_seconds"] < before["lease_remaining_seconds"]
    log = own_site.request("GET", f"/v1/clusters/{cluster_id}/logs?worker=alpha-0-0&lines=3").text
    assert 1 <= len(log.splitlines()) <= 3
    missing = own_site.request("GET", f"/v1/clusters/{cluster_id}/logs?worker=beta-0-0")
    assert "It has scheduler, alpha-0-0" in missing.message
    own_site.delete(cluster_id)
    own_site.wait_phase(cluster_id, "gone")
    assert own_site.pids(cluster_id) == set()


def test_a_lease_that_nobody_renews_ends_everything_and_says_so(own_site, port):
    cluster_id = new_id()
    own_site.put(cluster_id, lease_seconds=3, **with_workers(port))
    wait_until(lambda: own_site.pids(cluster_id), "process of the cluster", PATIENCE_SECONDS)
    ended = own_site.wait_phase(cluster_id, "gone")
    assert "its lease ended, because nobody renewed it" in ended["conditions"][0]["message"]
    assert own_site.pids(cluster_id) == set()
    assert own_site.put(cluster_id, epoch=1).status == 409


def test_with_a_dead_daemon_the_lease_still_ends_and_the_next_daemon_sweeps(own_site, port):
    cluster_id = new_id()
    own_site.put(cluster_id, lease_seconds=4, **with_workers(port))
    wait_until(lambda: own_site.pids(cluster_id), "process of the cluster", PATIENCE_SECONDS)
    own_site.stop(signal.SIGKILL)
    wait_until(lambda: not own_site.pids(cluster_id), "end of the cluster's processes", PATIENCE_SECONDS)
    assert list((own_site.folder / "state/units").iterdir())
    own_site.start()
    own_site.wait_phase(cluster_id, "gone")
    assert [path for path in (own_site.folder / "state/units").iterdir() if not path.name.startswith(".")] == []


def test_the_end_of_the_daemon_is_the_end_of_its_clusters_if_so_wanted(port):
    daemon = SiteDaemon(ACCESS, options=["--stop-clusters"]).start()
    cluster_id = new_id()
    daemon.put(cluster_id, **with_workers(port))
    wait_until(lambda: daemon.pids(cluster_id), "process of the cluster", PATIENCE_SECONDS)
    assert daemon.stop() == 0
    assert daemon.pids(cluster_id) == set()
    daemon.close()


def test_two_daemons_cannot_share_a_folder_or_a_socket(site):
    second = site.run("serve", "--config", site.config)
    assert second.returncode == 1
    assert "Another daemon uses the state folder" in second.stderr
    other = site.folder / "other.toml"
    other.write_text(site.config.read_text().replace("/state", "/state2"))
    third = site.run("serve", "--config", other)
    assert third.returncode == 1
    assert f"Another daemon listens at {site.socket}" in third.stderr
    assert site.answers()


def test_ping_tells_whether_the_daemon_works_and_why_not(site, tmp_path):
    assert site.run("ping", "--socket", site.socket).returncode == 0
    nobody = site.run("ping", "--socket", tmp_path / "none.sock")
    assert (nobody.returncode, "There is no socket" in nobody.stderr) == (2, True)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead.sock"))
    assert "Nobody listens" in site.run("ping", "--socket", tmp_path / "dead.sock").stderr


def test_an_operator_sees_and_ends_clusters_by_the_command_line(site):
    def run(*arguments):
        done = site.run(*arguments, "--socket", site.socket)
        return done.returncode, done.stdout + done.stderr

    cluster_id = new_id()
    assert site.put(cluster_id).status == 200
    code, said = run("list")
    assert code == 0
    assert re.search(rf"(?m)^{cluster_id}  \S+ +\S+ +(pending|ready) +\d+ of \d+ +\d+ s$", said), said
    assert run("end", "nothing") == (1, "0 clusters here begin with 'nothing': see meshcompute-site list.\n")
    assert "meshcompute_site_clusters" in run("metrics")[1]
    code, said = run("end", cluster_id[:12])
    assert (code, said) == (0, "it is ended; what is left of it is being removed\n")
    assert cluster_id not in run("list")[1]


def test_connect_passes_bytes_both_ways(site):
    asked = b"GET /v1/site HTTP/1.1\r\nHost: site\r\nConnection: close\r\n\r\n"
    run = site.run("connect", "--socket", site.socket, input=asked, text=False)
    assert run.returncode == 0, run.stderr
    head, _, content = run.stdout.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK")
    assert json.loads(content)["pool"] == "alpha"
