"""Reaching a site's daemon for real: OpenSSH's client and server, a socket of this host, and each way to fail."""

import asyncio
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from uuid import uuid4

import pytest
from sitedaemon import BreakingDoor, SiteDaemon
from sshd import Sshd

import meshcompute.mesh.sshtunnel
from meshcompute.mesh.control import SiteClient, SiteControl
from meshcompute.mesh.sites import SiteRefusedError, SiteUnreachableError, parse_site
from meshcompute.protocol import ClusterSpec, WorkerRequest

SITE_COMMAND = f"{sys.executable} -c 'from controlplane.cli import main; main()'"
SPEC = ClusterSpec(name="test", epoch=1, role="site", prefix="fda5:c0ff:eeee::/48", site=1)
OTHER_VERSION = """
import sys
import meshcompute.protocol
meshcompute.protocol.API_VERSION = 99
from controlplane.cli import main
main()
"""


@pytest.fixture(scope="module")
def openssh(need):
    need("OpenSSH's client", shutil.which("ssh"), "apt-get install openssh-client")
    server = shutil.which("sshd") or shutil.which("/usr/sbin/sshd")
    need("OpenSSH's server", server, "apt-get install openssh-server")


@pytest.fixture(scope="module")
def sshd(openssh, tmp_path_factory):
    with Sshd(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture(autouse=True)
def sockets(tmp_path_factory, monkeypatch):
    """Folder in which the client makes its sockets; a test must leave it as empty as it found it."""
    folder = tmp_path_factory.mktemp("s")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    yield folder
    assert list(folder.rglob("*")) == []


@pytest.fixture(scope="module")
def real_daemon():
    started = SiteDaemon().start()
    yield started
    started.close()


@pytest.fixture
def daemon(real_daemon, tmp_path):
    """The socket of a daemon that all tests of this file share; of each test's clusters nothing may be left."""
    door = BreakingDoor(real_daemon.socket, tmp_path / "site.sock")
    yield door
    door.close()
    for cluster in real_daemon.request("GET", "/v1/clusters").json:
        real_daemon.delete(cluster["cluster_id"])
        real_daemon.wait_phase(cluster["cluster_id"], "gone")


def control(sshd, path, *, site=None, ssh=None, site_command=SITE_COMMAND, **options):
    address = parse_site(site or sshd.site, socket=str(path))
    return SiteControl(address, ssh=ssh or sshd.ssh, site_command=site_command, **options)


def opened(site):
    """Open a site and close it; what it says, or why it cannot be had."""

    async def run():
        try:
            return await site.open()
        finally:
            await site.close()

    return asyncio.run(run())


def failure_of(site):
    with pytest.raises(SiteUnreachableError) as excinfo:
        opened(site)
    assert str(site.address) in str(excinfo.value)
    return excinfo.value


def processes_with(text):
    """Ids of processes on whose command line something stands."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (folder / "cmdline").read_bytes() and int(folder.name) != os.getpid():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def test_a_socket_is_forwarded_and_every_request_answered(sshd, daemon, sockets):
    async def run():
        site = control(sshd, daemon.path)
        info = await site.open()
        assert (info.pool, site.transport) == ("alpha", "forwarding")
        folder = next(sockets.iterdir())
        assert folder.stat().st_mode & 0o777 == 0o700
        assert next(folder.iterdir()).stat().st_mode & 0o077 == 0
        key = uuid4().hex
        status = await site.call(lambda client: client.put(key, SPEC))
        assert (status.cluster_id, status.epoch, status.phase) == (key, 1, "ready")
        assert [one.cluster_id for one in await site.call(SiteClient.clusters)] == [key]
        assert 100 < (await site.call(lambda client: client.renew(key, 1))).lease_remaining_seconds <= 120
        assert (await site.call(lambda client: client.status(key))).owner == getpass.getuser()
        with pytest.raises(SiteRefusedError, match="has no worker 'alpha-1-0' here"):
            await site.call(lambda client: client.logs(key, "alpha-1-0", 7))
        assert (await site.call(SiteClient.health)).is_healthy
        assert (await site.call(lambda client: client.delete(key, 1))).phase in ("removing", "gone")
        with pytest.raises(SiteRefusedError, match="not newer than epoch 1") as excinfo:
            await site.call(lambda client: client.put(key, SPEC))
        assert (excinfo.value.kind, excinfo.value.site) == ("conflict", sshd.site)
        await site.close()

    asyncio.run(run())
    assert not processes_with(str(sockets))


def test_where_forwarding_is_off_the_command_connect_is_used(openssh, daemon, tmp_path):
    (tmp_path / "sshd").mkdir()
    with Sshd(tmp_path / "sshd", options=("AllowStreamLocalForwarding no",)) as strict:

        async def run():
            site = control(strict, daemon.path)
            assert (await site.open()).pool == "alpha"
            assert site.transport == "connect"
            key = uuid4().hex
            answers = await asyncio.gather(*(site.call(lambda client: client.put(key, SPEC)) for _ in range(6)))
            assert {answer.cluster_id for answer in answers} == {key}
            await site.close()

        asyncio.run(run())


def test_where_forwarding_and_connect_are_off_the_error_says_so(openssh, daemon, tmp_path):
    (tmp_path / "sshd").mkdir()
    only_ping = tmp_path / "site-command"
    only_ping.write_text(f'#!/bin/sh\n[ "$1" = ping ] && exec {SITE_COMMAND} "$@"\nexit 1\n')
    only_ping.chmod(0o755)
    with Sshd(tmp_path / "sshd", options=("AllowStreamLocalForwarding no",)) as strict:
        failure = failure_of(control(strict, daemon.path, site_command=str(only_ping)))
    assert failure.cause == "forwarding_forbidden"
    assert "AllowStreamLocalForwarding yes" in str(failure)


def test_nobody_at_the_port_is_no_route(sshd, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        failure = failure_of(control(sshd, "/x.sock", site=f"root@127.0.0.1:{unused.getsockname()[1]}"))
    assert failure.cause == "no_route"
    assert "check the port" in str(failure)


def test_a_host_that_nobody_knows_is_no_route(sshd):
    failure = failure_of(control(sshd, "/x.sock", site="root@no-such-host.invalid"))
    assert (failure.cause, "spelling" in str(failure)) == ("no_route", True)


def test_an_unknown_host_key_is_not_accepted(sshd, daemon):
    (sshd.folder / "known_hosts").unlink()
    try:
        failure = failure_of(control(sshd, daemon.path))
    finally:
        sshd.trust()
    assert (failure.cause, "compare the key" in str(failure)) == ("unknown_host_key", True)


def test_a_changed_host_key_is_not_accepted(sshd, daemon):
    sshd.trust(key="stranger")
    try:
        failure = failure_of(control(sshd, daemon.path))
    finally:
        sshd.trust()
    assert (failure.cause, "ask the operator" in str(failure)) == ("changed_host_key", True)


def test_a_key_that_the_site_does_not_know_is_refused(sshd, daemon):
    stranger = (sshd.folder / "ssh_config").read_text().replace(f"{sshd.folder}/user", f"{sshd.folder}/stranger")
    (sshd.folder / "stranger_config").write_text(stranger)
    failure = failure_of(control(sshd, daemon.path, ssh=("ssh", "-F", str(sshd.folder / "stranger_config"))))
    assert (failure.cause, "ssh-add -l" in str(failure)) == ("refused_key", True)


def test_a_host_without_a_daemon_is_told_from_one_that_forbids_forwarding(sshd, tmp_path):
    failure = failure_of(control(sshd, tmp_path / "missing.sock"))
    assert failure.cause == "no_daemon"
    assert f"There is no socket {tmp_path}/missing.sock" in str(failure)
    assert "systemctl start meshcompute-site" in str(failure)


def test_a_host_without_our_command_is_told_from_one_without_a_daemon(sshd, tmp_path):
    failure = failure_of(control(sshd, tmp_path / "missing.sock", site_command="/opt/none/meshcompute-site"))
    assert (failure.cause, "install-site.sh" in str(failure)) == ("not_installed", True)


def test_a_host_without_ssh_is_told(daemon):
    failure = failure_of(control(None, daemon.path, site="mesh@127.0.0.1", ssh=("ssh-that-is-not-there",)))
    assert (failure.cause, "openssh-client" in str(failure)) == ("no_ssh", True)


def test_another_version_of_the_protocol_is_refused():
    other = SiteDaemon()
    other.program = ["-c", OTHER_VERSION]
    other.health = "/v99/health"
    other.start()
    try:
        failure = failure_of(SiteControl(parse_site(f"local:{other.socket}")))
    finally:
        other.close()
    assert (failure.cause, "install the same release at both ends" in str(failure)) == ("wrong_version", True)


def test_no_daemon_on_this_host_is_said_with_how_to_install_one(tmp_path):
    failure = failure_of(SiteControl(parse_site(f"local:{tmp_path}/none.sock")))
    assert failure.cause == "no_daemon"
    assert "scripts/install-site.sh --role scheduler" in str(failure)


def test_what_the_daemon_refuses_is_passed_on_and_not_tried_again(daemon):
    async def run():
        site = SiteControl(parse_site(f"local:{daemon.path}"))
        await site.open()
        before = daemon.n_requests
        wanted = SPEC.model_copy(update={"workers": WorkerRequest(containers=256)})
        with pytest.raises(SiteRefusedError, match="Ask for less, or ask the operator") as excinfo:
            await site.call(lambda client: client.put(uuid4().hex, wanted))
        assert (excinfo.value.kind, daemon.n_requests - before) == ("quota", 1)
        await site.close()

    asyncio.run(run())


def test_a_connection_that_breaks_is_made_anew(sshd, daemon):
    async def run():
        site = control(sshd, daemon.path)
        await site.open()
        daemon.break_next = 2
        assert (await site.call(SiteClient.site_info)).pool == "alpha"
        assert daemon.break_next == 0
        await site.close()

    asyncio.run(run())


def test_after_a_bounded_number_of_broken_connections_there_is_an_error(daemon):
    async def run():
        site = SiteControl(parse_site(f"local:{daemon.path}"))
        await site.open()
        daemon.break_next = 100
        with pytest.raises(SiteUnreachableError):
            await site.call(SiteClient.site_info)
        assert 94 <= daemon.break_next <= 97  # aiohttp itself may try once more each time
        await site.close()

    asyncio.run(run())


def test_a_tunnel_that_was_killed_is_replaced(sshd, daemon, sockets):
    async def run():
        site = control(sshd, daemon.path)
        await site.open()
        before = processes_with(str(sockets))
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        assert (await site.call(SiteClient.site_info)).pool == "alpha"
        assert set(processes_with(str(sockets))).isdisjoint(before)
        await site.close()

    asyncio.run(run())


def test_a_daemon_that_never_answers_is_given_up_in_time(tmp_path):
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(tmp_path / "mute.sock"))
        mute.listen(20)
        failure = failure_of(SiteControl(parse_site(f"local:{tmp_path}/mute.sock"), timeout_seconds=0.2))
    assert (failure.cause, "journalctl" in str(failure)) == ("no_answer", True)


def test_nothing_is_left_when_the_client_is_killed(sshd, daemon, sockets):
    code = (
        "import asyncio, json, sys\n"
        "from meshcompute.mesh.control import SiteControl\n"
        "from meshcompute.mesh.sites import parse_site\n"
        "async def run():\n"
        "    site = SiteControl(parse_site(sys.argv[1], socket=sys.argv[2]), ssh=json.loads(sys.argv[3]))\n"
        "    await site.open()\n"
        "    print('open', flush=True)\n"
        "    await asyncio.sleep(100)\n"
        "asyncio.run(run())\n"
    )
    ssh = '["ssh", "-F", "%s"]' % (sshd.folder / "ssh_config")
    command = [sys.executable, "-c", code, sshd.site, str(daemon.path), ssh]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
        assert client.stdout.readline() == b"open\n"
        assert processes_with(str(sockets))
        assert list(sockets.rglob("*.sock"))
        client.kill()
    deadline = time.monotonic() + 10
    while processes_with(str(sockets)) or list(sockets.rglob("*")):
        assert time.monotonic() < deadline, f"left: {processes_with(str(sockets))} {list(sockets.rglob('*'))}"
        time.sleep(0.02)


def test_the_path_of_the_socket_is_short_wherever_the_runtime_folder_is(monkeypatch, tmp_path):
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    folder = meshcompute.mesh.sshtunnel.choose_socket_folder()
    assert len(str(folder / "site.sock")) <= meshcompute.mesh.sshtunnel.MAX_SOCKET_PATH
    assert folder.parent != long
    assert not folder.exists()
