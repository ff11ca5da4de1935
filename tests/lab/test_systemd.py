"""A site that an operator installs on a host with systemd: from the first command to the last.

Covers the installer and the unit, with containers and WireGuard as the unit's sandbox really lets them be. The tests
go through the life of one installation, in the order in which they stand. Does not cover the kernel's WireGuard.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from types import MappingProxyType
from typing import Any

import pytest
from controlbench import ID, spec
from labbench import TOP, Boot, LabBench, open_lab_bench
from wheels import pack_wheels, repack

from meshcompute.lab.topology import default_hosts

pytestmark = pytest.mark.timeout(300)  # pip installs some 70 packages, in 20 s where nothing else runs

SITE = "ecmwf"
UNIT = "meshcompute-site.service"
MADE = (
    "/opt/meshcompute",
    "/usr/local/bin/meshcompute-site",
    "/etc/meshcompute",
    f"/etc/systemd/system/{UNIT}",
    f"/etc/systemd/system/{UNIT}.d",
    "/var/lib/meshcompute",
    "/run/meshcompute",
)
CONFIG = "/etc/meshcompute/site.toml"
PYTHON = str(getattr(sys, "_base_executable", sys.executable))
INSTALL_SECONDS = 280.0
START_SECONDS = 120.0  # of a daemon; a few where nothing else runs
IMPORTED_BY_THE_DAEMON = (
    "controlplane.cli, controlplane.daemon, controlplane.network.gateway, controlplane.workers.docker"
)
NEW_VERSION = "99.0"
# In a mount namespace of its own: a device 0:0 in an upper layer hides the file of that name.
HIDE_PROGRAMS = """
mount -t tmpfs hidden /mnt
for folder in bin sbin; do
    mkdir /mnt/$folder /mnt/$folder.work
    for program in wg nft sshd; do mknod /mnt/$folder/$program c 0 0; done
    mount -t overlay -o lowerdir=/usr/$folder,upperdir=/mnt/$folder,workdir=/mnt/$folder.work hidden /usr/$folder
done
"""
ASK_FOR_WORKERS = f"""
import sys
from controlplane.talk import UnixConnection
connection = UnixConnection("/run/meshcompute/site.sock")
connection.request("PUT", "/v1/clusters/{ID}", sys.argv[1])
answer = connection.getresponse()
assert answer.status == 200, answer.read()
"""
COMPUTE = """
import sys
from distributed import Client
with Client(sys.argv[1], timeout="60s") as client:
    client.wait_for_workers(4)
    print(sum(client.gather(client.map(lambda n: n * n, range(100)))))
"""


CLUSTER = "meshcompute.cluster"  # the label of containers that belong to one


class Host:
    """The operator's host: what is done and seen there.

    Parameters
    ----------
    bench
        The lab.
    wheel
        The software, as the host sees it.
    """

    def __init__(self, bench: LabBench, wheel: str) -> None:
        self.bench = bench
        self.wheel = wheel

    def run(self, *command: str, **options: Any) -> CompletedProcess[str]:
        """Run a command as root; options as of :meth:`.RunningLab.run`."""
        return self.bench.lab.run(SITE, *command, **options)

    def install(
        self, *options: str, wheel: str | None = None, pip: Mapping[str, str] = MappingProxyType({}), before: str = ""
    ) -> CompletedProcess[str]:
        """Run the installer, with Python as it is here and with the wheels that are there instead of an index."""
        software = wheel or self.wheel
        settings = {"NO_INDEX": "1", "FIND_LINKS": str(Path(software).parent), **pip}
        variables = [f"PIP_{name}={value}" for name, value in settings.items()]
        script = [str(TOP / "scripts/install-site.sh"), "--python", PYTHON, "--wheel", software, *options]
        return self.run(
            *("unshare", "--mount", "sh", "-ec", f'{before} exec env "$@"', "sh", *variables, "bash", *script),
            timeout=INSTALL_SECONDS,
            check=False,
        )

    def property(self, name: str) -> str:
        """Ask systemd for a property of the unit."""
        return self.run("systemctl", "show", "--value", "--property", name, UNIT).stdout.strip()

    def data_plane(self) -> Mapping[str, object]:
        """See what must outlive the daemon: the keeper and its WireGuard, their key, and the containers."""
        (keeper,) = self.bench.pids(SITE, "network/keeper.py")
        enter = ("nsenter", f"--mount=/proc/{keeper}/ns/mnt")
        return {
            "keeper": keeper,
            "wireguard": self.bench.pids(SITE, "wireguard-go"),
            "key": self.run(*enter, "wg", "show", "all", "public-key").stdout,
            # Not the one that a daemon asks for its image's versions as it starts.
            "containers": self.run("docker", "ps", "--no-trunc", "--quiet", "--filter", f"label={CLUSTER}").stdout,
        }

    def has_nothing(self) -> None:
        """Nothing of what the installer makes is there."""
        assert self.made() == []
        assert self.run("getent", "group", "meshcompute", check=False).returncode == 2

    def made(self) -> list[str]:
        """List what the installer makes and is there."""
        return [path for path in MADE if self.run("test", "-e", path, check=False).returncode == 0]

    def answers(self) -> bool:
        """Whether the daemon answers and is healthy."""
        return self.run("meshcompute-site", "ping", check=False).returncode == 0


@pytest.fixture(scope="module")
def host(can_have_mesh: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A site's host on which nothing is installed, and a client's host."""
    folder = tmp_path_factory.mktemp("wheels")
    folder.chmod(0o755)
    wheel = pack_wheels(folder, "meshcompute[site]")
    repack(wheel, NEW_VERSION)
    # The folder of wheels is the site's data as well: a folder of the machine that the host sees at /data.
    hosts = tuple(
        replace(each, has_systemd=True, data=str(folder)) if each.name == SITE else each for each in default_hosts()[:2]
    )
    with open_lab_bench(hosts=hosts) as bench:
        yield Host(bench, f"/data/{SITE}/{wheel.name}")


@pytest.fixture(scope="module")
def untouched(host: Host) -> Mapping[str, Mapping[str, Counter[str]]]:
    """What the hosts were before anything was installed, but after tools of the system left their own traces."""
    traces = "for folder in /tmp /var/tmp /opt /usr/local/bin; do touch $folder/.trace; rm $folder/.trace; done"
    for name in ("client", SITE):
        host.bench.lab.run(name, "sh", "-ec", f"{traces}; groupadd --system trace; groupdel trace")
    return host.bench.observe()


@pytest.fixture(scope="module")
def installed(host: Host, untouched: object) -> Host:
    """The host after the first installation, of which the account ``mesh`` may use the site."""
    # Most of the time would go into compiling what the daemon never imports, so that is done afterwards for the rest.
    # 0 because pip takes the value of this variable for that of the setting, which is "compile".
    done = host.install("--pool", SITE, pip={"NO_COMPILE": "0"})
    assert done.returncode == 0, done.stdout + done.stderr
    host.run("/opt/meshcompute/bin/python", "-c", f"import {IMPORTED_BY_THE_DAEMON}")
    host.run("usermod", "--append", "--groups", "meshcompute", "mesh")
    config = host.run("cat", CONFIG).stdout
    config = config.replace("data_folders = []", f'data_folders = ["/data/{SITE}"]')
    config = config.replace("endpoints = []", 'endpoints = ["10.8.0.4"]')
    host.run("tee", CONFIG, input=config)
    host.run("systemctl", "restart", UNIT, timeout=START_SECONDS)
    return host


@pytest.fixture(scope="module")
def boot(installed: Host) -> Iterator[Boot]:
    """A cluster with four workers at the site."""
    with installed.bench.booted(sites=("mesh@10.8.0.4",)) as boot:
        yield boot


@pytest.mark.parametrize(
    ("options", "before", "said"),
    [
        ((), "", "the first installation needs --pool NAME"),
        (("--pool", "No Name"), "", "at most 40 lower-case letters"),
        (("--pool", SITE, "--purge"), "", "--purge goes with --remove"),
        (("--pool", SITE, "--wheel", "/nowhere.whl"), "", "there is no /nowhere.whl"),
        (
            ("--pool", SITE),
            HIDE_PROGRAMS,
            "Install them (apt-get install wireguard-tools nftables openssh-server), then run this again",
        ),
        (
            ("--pool", SITE, "--python", "/mnt/python"),
            f"mount -t tmpfs -o mode=0700 closed /mnt; ln -s {PYTHON} /mnt/python;",
            "other accounts cannot run",
        ),
    ],
)
def test_what_cannot_be_installed_says_why_and_leaves_nothing(
    host: Host, untouched: object, options: tuple[str, ...], before: str, said: str
) -> None:
    done = host.install(*options, before=before)
    assert done.returncode == 1
    assert said in done.stderr
    host.has_nothing()


def test_an_installation_without_an_index_leaves_nothing(host: Host, untouched: object) -> None:
    done = host.install("--pool", SITE, pip={"FIND_LINKS": "/var/empty"})
    assert done.returncode == 1
    assert "pip could not install it (see above); nothing was changed" in done.stderr
    host.has_nothing()


def test_the_installed_daemon_is_active_and_answers_everybody_and_serves_its_users(installed: Host) -> None:
    assert [installed.property(name) for name in ("ActiveState", "SubState", "Type")] == ["active", "running", "notify"]
    assert installed.run("systemctl", "is-enabled", UNIT).stdout.strip() == "enabled"
    assert installed.run("stat", "-c", "%a %U", "/run/meshcompute", "/run/meshcompute/site.sock").stdout.split() == [
        *("755", "root"),
        *("666", "root"),
    ]
    checked = installed.run("meshcompute-site", "check").stdout
    assert "BAD" not in checked
    assert f"data folder: /data/{SITE}, read-only for workers" in checked
    assert "systemd: meshcompute-site.service is enabled" in checked
    # As clients do, from their own host, as users of the site's.
    ping = ("ssh", "mesh@10.8.0.4", "meshcompute-site", "ping")
    assert "is healthy" in installed.bench.lab.run("client", *ping, user="mesh").stdout


def test_the_daemon_is_confined(installed: Host) -> None:
    pid = installed.property("MainPID")
    status = dict(re.findall(r"(?m)^(\w+):\s*(.*)$", installed.run("cat", f"/proc/{pid}/status").stdout))
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    allowed = installed.property("CapabilityBoundingSet").split()
    assert int(status["CapBnd"], 16).bit_count() == len(allowed)  # the machine has them all
    inside = ("nsenter", f"--target={pid}", "--mount")
    for folder in ("/etc", "/usr", "/root", f"/data/{SITE}"):
        refused = installed.run(*inside, "touch", f"{folder}/written", check=False)
        assert "Read-only file system" in refused.stderr, folder
    [cgroup] = [line for line in installed.run("cat", f"/proc/{pid}/cgroup").stdout.splitlines() if UNIT in line][:1]
    assert cgroup.endswith(f"{SITE}.systemd/system.slice/{UNIT}")


def test_a_cluster_is_made_under_the_unit_and_computes(installed: Host, boot: Boot) -> None:
    assert installed.data_plane()["containers"]
    assert installed.bench.python(COMPUTE, boot.address).split() == ["328350"]


def test_a_restart_adopts_the_running_data_plane(installed: Host, boot: Boot) -> None:
    before, pid = installed.data_plane(), installed.property("MainPID")
    installed.run("systemctl", "restart", UNIT, timeout=START_SECONDS)
    assert installed.answers()
    assert installed.property("MainPID") != pid
    assert installed.data_plane() == before
    assert "adopt clusters n=1" in installed.run("journalctl", "--unit", UNIT).stdout
    assert installed.bench.python(COMPUTE, boot.address).split() == ["328350"]


def test_a_killed_daemon_is_started_again_by_systemd(installed: Host, boot: Boot) -> None:
    before, pid = installed.data_plane(), installed.property("MainPID")
    installed.run("kill", "-9", pid)
    installed.bench.wait_until(lambda: installed.property("MainPID") not in {pid, "0"}, "another daemon", START_SECONDS)
    installed.bench.wait_until(installed.answers, "the daemon answers", START_SECONDS)
    assert installed.property("NRestarts") == "1"
    assert installed.data_plane() == before
    assert installed.bench.python(COMPUTE, boot.address).split() == ["328350"]


def test_an_upgrade_keeps_the_settings_and_the_running_data_plane(installed: Host, boot: Boot) -> None:
    before, config = installed.data_plane(), installed.run("cat", CONFIG).stdout
    new = installed.wheel.replace(re.findall(r"-([^-]+)-", installed.wheel)[0], NEW_VERSION)
    done = installed.install(wheel=new)
    assert done.returncode == 0, done.stdout + done.stderr
    assert NEW_VERSION in installed.run("meshcompute-site", "--version").stdout
    assert installed.run("cat", CONFIG).stdout == config
    assert installed.data_plane() == before
    assert installed.bench.python(COMPUTE, boot.address).split() == ["328350"]


def test_an_upgrade_that_does_not_understand_the_settings_changes_nothing(installed: Host) -> None:
    config, pid = installed.run("cat", CONFIG).stdout, installed.property("MainPID")
    installed.run("tee", CONFIG, input=f"colour = 'red'\n{config}")
    try:
        done = installed.install()
        assert done.returncode == 1
        assert "colour" in done.stderr
        assert NEW_VERSION in installed.run("meshcompute-site", "--version").stdout
        assert installed.property("MainPID") == pid
    finally:
        installed.run("tee", CONFIG, input=config)


def test_an_operator_sees_who_has_what_and_ends_it(installed: Host, boot: Boot) -> None:
    listed = installed.run("meshcompute-site", "list").stdout
    row = re.search(r"(?m)^(\w{32})  \S+ +mesh +ready +4 of 4 +\d+ s$", listed)
    assert row, listed
    stranger = installed.bench.lab.run(SITE, "meshcompute-site", "list", user="guest", check=False)
    assert (stranger.returncode, "guest" in stranger.stderr) == (1, True), stranger.stderr
    metrics = installed.run("meshcompute-site", "metrics").stdout
    assert 'meshcompute_site_workers{state="running"} 4' in metrics.splitlines()
    label = ("docker", "ps", "--filter", "label=meshcompute.owner", "--format", "{{.Names}}")
    assert installed.run(*label).stdout.split() == installed.bench.containers(SITE)
    installed.run("meshcompute-site", "end", row[1][:8])
    installed.bench.wait_until(lambda: not installed.bench.pids(SITE, "network/keeper.py"), "the gateway is gone")
    assert boot.wait() != 0
    assert "root" in boot.said


def test_clusters_of_a_stopped_daemon_go_on_until_their_lease(installed: Host) -> None:
    before = installed.bench.observe()
    with installed.bench.booted("--lease", "10", sites=("mesh@10.8.0.4",)) as short:
        plane = installed.data_plane()
        installed.run("systemctl", "stop", UNIT)
        assert installed.data_plane() == plane
        bench = installed.bench
        bench.wait_until(lambda: not bench.pids(SITE, "network/keeper.py"), "the gateway has ended by itself")
        bench.wait_until(lambda: not bench.containers(SITE, every=False), "the workers have ended by themselves")
        short.wait()
    installed.run("systemctl", "start", UNIT, timeout=START_SECONDS)
    installed.bench.wait_as(before)


def test_plain_process_workers_run_under_the_unit_as_the_account_that_asked(installed: Host) -> None:
    bench, config, before = installed.bench, installed.run("cat", CONFIG).stdout, installed.bench.observe()
    plain = config.replace("[access]", 'runtime = "process"\nnetwork = "loopback"\n[access]')
    installed.run("tee", CONFIG, input=plain)
    try:
        installed.run("systemctl", "restart", UNIT, timeout=START_SECONDS)
        ask = ("/opt/meshcompute/bin/python", "-c", ASK_FOR_WORKERS, spec().model_dump_json())
        bench.lab.run(SITE, *ask, user="mesh")
        bench.wait_until(
            lambda: "4 of 4" in installed.run("meshcompute-site", "list").stdout, "all workers run", START_SECONDS
        )
        programs = bench.pids(SITE, "entrypoint.py")
        assert "mesh" in {installed.run("stat", "-c", "%U", f"/proc/{pid}").stdout.strip() for pid in programs}
        bench.lab.run(SITE, "meshcompute-site", "end", ID, user="mesh")
        bench.wait_until(lambda: ID not in installed.run("meshcompute-site", "list").stdout, "the cluster is gone")
    finally:
        installed.run("tee", CONFIG, input=config)
        installed.run("systemctl", "restart", UNIT, timeout=START_SECONDS)
    bench.wait_as(before)


def test_removing_ends_all_clusters_and_keeps_the_settings_and_purging_leaves_nothing(
    installed: Host, untouched: Mapping[str, Mapping[str, Counter[str]]]
) -> None:
    with installed.bench.booted(sites=("mesh@10.8.0.4",)) as boot:
        done = installed.install("--remove")
        assert done.returncode == 0, done.stdout + done.stderr
        assert installed.made() == ["/etc/meshcompute", "/var/lib/meshcompute"]
        assert not installed.bench.containers(SITE)
        assert not installed.bench.pids(SITE, "network/keeper.py")
        boot.stop()
    done = installed.install("--remove", "--purge")
    assert done.returncode == 0, done.stdout + done.stderr
    installed.has_nothing()
    installed.bench.wait_as(untouched)
