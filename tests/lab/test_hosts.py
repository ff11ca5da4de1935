"""Hosts of a lab: ssh, files, accounts, processes, engines.

Does not cover the WAN between them, nor their end.
"""

from __future__ import annotations

import pwd
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from meshcompute.lab.errors import LabError
from meshcompute.lab.running import RunningLab

SITES = {"ecmwf": "10.8.0.4", "eumetsat": "10.8.0.2"}


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize(("user", "account"), [("root", "mesh"), ("mesh", "mesh"), ("guest", "guest")])
def test_the_client_reaches_every_site_by_ssh_without_a_question(
    lab: RunningLab, site: str, user: str, account: str
) -> None:
    done = lab.run("client", "ssh", SITES[site], "hostname; id -un; echo $SSH_CLIENT", user=user)
    assert done.stdout.split()[:3] == [site, account, "10.8.0.3"]


def test_sites_do_not_let_each_other_in(lab: RunningLab) -> None:
    options = ("-oBatchMode=yes", "-oStrictHostKeyChecking=no", "-oUserKnownHostsFile=/dev/null")
    done = lab.run("ecmwf", "ssh", *options, "10.8.0.2", check=False)
    assert done.returncode == 255
    assert "Permission denied" in done.stderr


def test_a_site_s_data_is_seen_by_this_site_only(lab: RunningLab) -> None:
    lab.run("ecmwf", "sh", "-c", "echo forecast > /data/ecmwf/field")
    assert lab.run("ecmwf", "find", "/data").stdout.split() == ["/data", "/data/ecmwf", "/data/ecmwf/field"]
    assert lab.run("eumetsat", "find", "/data").stdout.split() == ["/data", "/data/eumetsat"]
    assert lab.run("client", "find", "/data").stdout.split() == ["/data"]
    assert not Path("/data/ecmwf").exists()


def test_what_a_host_writes_reaches_neither_the_machine_nor_other_hosts(lab: RunningLab) -> None:
    for folder in ("/etc", "/usr/local", "/root", "/run", "/tmp", "/dev/shm"):
        file = f"{folder}/written-by-a-lab-host"
        lab.run("ecmwf", "touch", file)
        assert not Path(file).exists()
        assert lab.run("eumetsat", "test", "-e", file, check=False).returncode == 1


def test_the_machine_s_own_keys_are_not_on_hosts(lab: RunningLab) -> None:
    assert lab.run("ecmwf", "ls", "/root/.ssh").stdout.split() == ["README"]
    assert lab.run("client", "sh", "-c", "ls /root/.ssh").stdout.split() == [
        "README", "config", "id_ed25519", "id_ed25519.pub", "known_hosts",
    ]  # fmt: skip


def test_accounts_are_the_hosts_and_not_the_machine_s(lab: RunningLab) -> None:
    accounts = {account.name: account.uid for account in lab.status().lab.accounts}
    assert set(accounts) == {"mesh", "guest"}
    for host in ("client", *SITES):
        assert lab.run(host, "id", "-u", user="mesh").stdout.strip() == str(accounts["mesh"])
    assert not {entry.pw_name for entry in pwd.getpwall()} & set(accounts)


def test_accounts_of_hosts_can_run_this_python_wherever_it_lies(lab: RunningLab) -> None:
    mode = Path("/root").stat().st_mode
    script = "import sys, meshcompute; print(sys.version)"
    assert lab.run("client", sys.executable, "-c", script, user="mesh").stdout == sys.version + "\n"
    assert lab.run("client", "ssh", "ecmwf", sys.executable, "-c", f"'{script}'").stdout == sys.version + "\n"
    assert Path("/root").stat().st_mode == mode


def test_a_host_sees_its_own_processes_and_devices_only(lab: RunningLab) -> None:
    assert lab.run("ecmwf", "cat", "/proc/1/comm").stdout == "tini\n"
    seen = set(lab.run("ecmwf", "sh", "-c", "cat /proc/[0-9]*/comm").stdout.split())
    assert {"tini", "sshd"} < seen <= {"tini", "sshd", "sh", "cat"}
    assert lab.run("ecmwf", "ls", "/sys/class/net").stdout.split() == ["lo", "uplink"]
    assert lab.run("ecmwf", "hostname").stdout == "ecmwf\n"


def test_a_command_s_input_output_and_exit_code_are_passed_on(lab: RunningLab, command: Callable[..., object]) -> None:
    done = lab.run("ecmwf", "sh", "-c", "cat; echo oops >&2; exit 7", input="hello", check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("hello", "oops\n", 7)
    done = command("exec", "--name", lab.name, "eumetsat", "--", "sh", "-c", "hostname; exit 3")  # type: ignore[assignment]
    assert (done.stdout, done.returncode) == ("eumetsat\n", 3)


def test_a_command_keeps_its_folder_where_the_host_has_it(
    lab: RunningLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a host sees the machine's files, though it cannot change them
    assert lab.run("ecmwf", "pwd").stdout.strip() == str(tmp_path)


def test_a_command_ends_with_the_process_that_started_it(lab: RunningLab) -> None:
    script = "import sys; from meshcompute.lab.running import *; RunningLab(sys.argv[1]).run('ecmwf', 'sleep', '321')"
    starter = subprocess.Popen([sys.executable, "-c", script, lab.name])
    lab.run("ecmwf", "sh", "-c", "until grep -qx sleep /proc/[0-9]*/comm; do :; done", timeout=20)
    starter.kill()
    starter.wait()
    lab.run("ecmwf", "sh", "-c", "while grep -qsx sleep /proc/[0-9]*/comm; do :; done", timeout=20)


def test_an_unknown_host_is_named_with_those_that_exist(lab: RunningLab) -> None:
    with pytest.raises(LabError, match=r"no host 'ecwmf'\. Its hosts: .*ecmwf"):
        lab.run("ecwmf", "true")


def test_a_port_of_a_host_can_be_opened_from_the_machine(lab: RunningLab) -> None:
    from meshcompute.lab.forwarding import listen, render_forwarder

    serve = "import socket\nwith socket.create_server(('127.0.0.1', 8787)) as s:\n print('ready', flush=True)\n"
    serve += " c, _ = s.accept(); c.sendall(c.recv(99).upper()); c.close()"
    server = lab.popen("client", sys.executable, "-c", serve, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    with listen(0) as listener:
        command = render_forwarder(listener, lab.status().pids["client"], "127.0.0.1:8787")
        forwarder = subprocess.Popen(command, pass_fds=[listener.fileno()])
        with socket.create_connection(listener.getsockname(), timeout=20) as connection:
            connection.sendall(b"hello")
            assert connection.recv(99) == b"HELLO"
            assert connection.recv(99) == b""
    forwarder.kill()
    forwarder.wait()
    server.communicate(timeout=20)


def test_each_host_has_an_engine_of_its_own(can_have_engine: None, start: Callable[..., RunningLab]) -> None:
    lab = start(engine=True)
    for host in ("client", *SITES):
        assert lab.run(host, "docker", "info", "--format", "{{.Name}}").stdout == f"{host}\n"
    lab.run("ecmwf", "docker", "volume", "create", "only-here")
    assert lab.run("ecmwf", "docker", "volume", "ls", "-q").stdout == "only-here\n"
    assert lab.run("eumetsat", "docker", "volume", "ls", "-q").stdout == ""


def test_a_folder_of_the_machine_can_be_shared_with_the_client_and_be_a_site_s_data(
    start: Callable[..., RunningLab], tmp_path: Path
) -> None:
    from dataclasses import replace

    from meshcompute.lab.topology import default_hosts

    shared, data = tmp_path / "shared", tmp_path / "data"
    shared.mkdir()
    data.mkdir()
    (data / "file").write_text("archived")
    hosts = tuple(replace(host, data=str(data) if host.name == "ecmwf" else None) for host in default_hosts())
    lab = start(hosts=hosts, shared=str(shared))
    lab.run("client", "touch", f"{shared}/result")
    assert (shared / "result").exists()
    assert lab.run("ecmwf", "cat", "/data/ecmwf/file").stdout == "archived"
    assert "Read-only file system" in lab.run("ecmwf", "touch", "/data/ecmwf/new", check=False).stderr
