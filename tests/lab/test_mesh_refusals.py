"""Every way in which a site cannot be had: one sentence that names site, cause and cure, and nothing is left.

Covers what a person sees of it, with OpenSSH, daemons and engines that are really so. Each refusal is of one site of
two: the other one has its part built by then, and is as before afterwards. The lab is this file's own.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pytest
from labbench import SITES, TOP, LabBench, open_lab_bench

pytestmark = pytest.mark.timeout(300)  # ten boots in one test take 30 s where nothing else runs
ECMWF, EUMETSAT = SITES
KNOWN_HOSTS = "/home/mesh/.ssh/known_hosts"
AUTHORIZED_KEYS = "/home/mesh/.ssh/authorized_keys"
SSHD_CONFIG = "/etc/ssh/lab/sshd_config"
SITE_FILE = "/etc/meshcompute/site.toml"
COMMAND = "/usr/local/bin/meshcompute-site"
LEASE = ("--lease", "20")
# A daemon of another release: all of it is this one's, but the number.
OTHER_VERSION = """
import sys
import meshcompute.protocol
meshcompute.protocol.API_VERSION = 99
from controlplane.cli import main
sys.argv = ["meshcompute-site", "serve"]
main()
"""
HOLD_UDP = """
import socket, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
    taken.bind(("0.0.0.0", 51820))
    print("taken", flush=True)
    time.sleep(1000)
"""
HOLD_TCP = """
import socket, time
with socket.create_server(("127.0.0.1", 8786)) as taken:
    print("taken", flush=True)
    time.sleep(1000)
"""
COMPUTE = """
import os, sys
from distributed import Client
with Client(os.environ["DASK_SCHEDULER_ADDRESS"]) as client:
    pools = {name.rsplit("-", 2)[0] for name in client.run(lambda dask_worker: dask_worker.name).values()}
    sys.exit(7 if pools == {"eumetsat"} else 8)
"""


@pytest.fixture(scope="module")
def own_lab(can_have_mesh: None) -> Iterator[LabBench]:
    with open_lab_bench() as bench:
        yield bench


@contextmanager
def refusals(bench: LabBench, *, user: str = "mesh") -> Iterator[Callable[..., str]]:
    """Have boots refused with a sentence; after the block every host must be as it was before it."""
    before = bench.observe()

    def refuse(*arguments: str, sentence: str) -> str:
        boot = bench.start_boot(*arguments, user=user)
        code = boot.wait()
        assert code == 1, boot.said
        assert "Traceback" not in boot.said
        assert re.fullmatch(f"Error: {sentence}", boot.lines[-1]), boot.said
        assert "everything is taken down" in boot.said
        return boot.said

    yield refuse
    bench.wait_as(before)


@contextmanager
def without_daemon(bench: LabBench, host: str) -> Iterator[None]:
    """End a host's daemon for the length of the block."""
    pids = bench.pids(host, "meshcompute-site")
    bench.kill(host, *pids, signum=15)
    bench.wait_until(lambda: not bench.pids(host, "meshcompute-site"), f"{host}'s daemon has ended")
    try:
        yield
    finally:
        bench.restart_daemon(host)


@contextmanager
def changed_file(bench: LabBench, host: str, path: str, change: Callable[[str], str]) -> Iterator[str]:
    """Have another text in a file of a host; owner and mode stay."""
    before = bench.lab.run(host, "cat", path).stdout
    after = change(before)
    assert after != before, f"{path} of {host} has not what is changed:\n{before}"
    bench.lab.run(host, "sh", "-c", 'cat >"$1"', "sh", path, input=after)
    try:
        yield after
    finally:
        bench.lab.run(host, "sh", "-c", 'cat >"$1"', "sh", path, input=before)


@contextmanager
def site_file(bench: LabBench, host: str, change: Callable[[str], str]) -> Iterator[None]:
    """Have a daemon with another ``site.toml``."""
    try:
        with changed_file(bench, host, SITE_FILE, change):
            with without_daemon(bench, host):
                pass  # it reads the file at its start
            yield
    finally:
        with without_daemon(bench, host):
            pass


@contextmanager
def sshd_settings(bench: LabBench, host: str, changes: Mapping[str, str], more: str = "") -> Iterator[None]:
    """Have other values in an sshd's settings, and lines at their end; connections that are open stay as they are."""

    def change(text: str) -> str:
        for key, value in changes.items():
            text = re.sub(rf"^{key}\b.*", f"{key} {value}", text, flags=re.MULTILINE)
        return text + more

    def reload() -> None:
        listener = bench.lab.run(host, "cat", "/run/sshd.pid").stdout.strip()
        bench.lab.run(host, "rm", "/run/sshd.pid")
        bench.lab.run(host, "kill", "-HUP", listener)
        bench.wait_until(
            lambda: bench.lab.run(host, "test", "-s", "/run/sshd.pid", check=False).returncode == 0, "sshd"
        )

    try:
        with changed_file(bench, host, SSHD_CONFIG, change):
            reload()
            yield
    finally:
        reload()


@contextmanager
def running(bench: LabBench, host: str, program: str) -> Iterator[None]:
    """Have a Python program on a host that says when it is ready."""
    process = bench.lab.popen(
        host, sys.executable, "-c", program, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "taken\n"
            yield
        finally:
            process.kill()


def test_a_host_that_cannot_be_reached_is_named_and_with_allow_partial_left_out(own_lab: LabBench) -> None:
    no_route = rf"Site {ECMWF}: no route to the host; check that the network or VPN .*"
    own_lab.lab.cut("ecmwf")
    try:
        before = own_lab.observe()
        boots = {  # all at once: ssh waits 10 s for a host that is down
            "refused": own_lab.start_boot(ECMWF, EUMETSAT),
            "none left": own_lab.start_boot(ECMWF, "--allow-partial", "--port", "9001"),
            "partial": own_lab.start_boot(ECMWF, EUMETSAT, "--allow-partial", "--", sys.executable, "-c", COMPUTE),
        }
        codes = {name: boot.wait() for name, boot in boots.items()}
    finally:
        own_lab.lab.join()
    assert codes == {"refused": 1, "none left": 1, "partial": 7}, boots["partial"].said
    for name in ("refused", "none left"):
        assert re.fullmatch(f"Error: {no_route}", boots[name].lines[-1])
        assert "going on without" not in boots[name].said
    assert f"going on without {ECMWF}" in boots["partial"].said
    assert "ready: 4 workers" in boots["partial"].said
    assert not any("Traceback" in boot.said for boot in boots.values())
    own_lab.wait_as(before)


def test_every_trouble_that_ssh_has_is_told_with_its_cure(own_lab: LabBench) -> None:
    with refusals(own_lab) as refuse:
        refuse("mesh@nowhere.invalid", EUMETSAT, sentence="Site mesh@nowhere.invalid: .*not known here; check its sp.*")
        refuse(f"{ECMWF}:2222", EUMETSAT, sentence=f"Site {ECMWF}:2222: .* nobody listens on SSH's port; check .*")
        with changed_file(own_lab, "client", KNOWN_HOSTS, lambda text: re.sub("(?m)^ecmwf,.*\n", "", text)):
            refuse(ECMWF, EUMETSAT, sentence=f"Site {ECMWF}: its host key is not known here; log in once with ssh .*")
        with changed_file(own_lab, "client", KNOWN_HOSTS, _with_the_key_of_another):
            refuse(ECMWF, EUMETSAT, sentence=f"Site {ECMWF}: its host key is not the one that you know; ask the .*")
        with changed_file(own_lab, "ecmwf", AUTHORIZED_KEYS, lambda text: f"# {text}"):
            refuse(ECMWF, EUMETSAT, sentence=f"Site {ECMWF}: it refuses your key; check the account's name, .*")


def _with_the_key_of_another(known: str) -> str:
    key = next(line.partition(" ")[2] for line in known.splitlines() if line.startswith("eumetsat,"))
    return re.sub("(?m)^(ecmwf,[^ ]+) .*", lambda match: f"{match[1]} {key}", known)


def test_a_host_without_a_daemon_or_with_another_version_of_it_is_told_from_one_without_our_command(
    own_lab: LabBench,
) -> None:
    with without_daemon(own_lab, "ecmwf"), refusals(own_lab) as refuse:
        refuse(ECMWF, EUMETSAT, sentence=f"Site {ECMWF}: no control daemon .* There is no socket .*systemctl start .*")
        own_lab.lab.run("ecmwf", "mv", COMMAND, f"{COMMAND}.aside")
        try:
            with sshd_settings(own_lab, "ecmwf", {"SetEnv": "PATH=/usr/local/bin:/usr/bin:/bin"}):
                refuse(ECMWF, EUMETSAT, sentence=f"Site {ECMWF}: the host has no command meshcompute-site; .*install.*")
        finally:
            own_lab.lab.run("ecmwf", "mv", f"{COMMAND}.aside", COMMAND)
        with own_lab.lab.popen("ecmwf", sys.executable, "-c", OTHER_VERSION, stderr=subprocess.DEVNULL) as other:
            try:
                connect = "import socket; socket.socket(socket.AF_UNIX).connect('/run/meshcompute/site.sock')"
                own_lab.wait_until(
                    lambda: own_lab.lab.run("ecmwf", sys.executable, "-c", connect, check=False).returncode == 0,
                    "the other daemon listens",
                )
                refuse(
                    ECMWF, EUMETSAT, sentence=f"Site {ECMWF}: .* does not know version 1 of the protocol, .* same .*"
                )
            finally:
                own_lab.kill("ecmwf", *own_lab.pids("ecmwf", "API_VERSION = 99"), signum=15)
                other.wait(30)
    with without_daemon(own_lab, "client"), refusals(own_lab) as refuse:
        refuse(*SITES, sentence="Site local: no control daemon answers .* scripts/install-site.sh --role scheduler, .*")
    own_lab.lab.run("client", "chmod", "0600", "/run/meshcompute/site.sock")
    with refusals(own_lab) as refuse:
        refuse(
            *SITES, sentence="Site local: this account may not use the daemon's socket .*; its operator sets mode .*"
        )
    own_lab.lab.run("client", "chmod", "0666", "/run/meshcompute/site.sock")


def test_where_sshd_forbids_forwarding_the_daemons_command_is_the_way_and_without_it_there_is_none(
    own_lab: LabBench,
) -> None:
    only_ping = 'ForceCommand case "$SSH_ORIGINAL_COMMAND" in *ping*) exec meshcompute-site ping;; *) exit 1;; esac\n'
    off = {"AllowStreamLocalForwarding": "no"}
    before = own_lab.observe()
    with sshd_settings(own_lab, "ecmwf", off):
        boot = own_lab.start_boot(ECMWF, *LEASE, "--", "true")
        assert boot.wait() == 0, boot.said
        assert "without socket forwarding" in boot.wait_for(f"{ECMWF} (ecmwf): reached")
    with sshd_settings(own_lab, "ecmwf", off, more=only_ping), refusals(own_lab) as refuse:
        refuse(ECMWF, EUMETSAT, sentence=f"Site {ECMWF}: .* neither sshd's forwarding .* AllowStreamLocalForwarding .*")
    own_lab.wait_as(before)


def test_what_the_operator_does_not_allow_is_refused_with_the_key_that_says_so(own_lab: LabBench) -> None:
    limits = (
        '[limits]\nclusters = 1\nworkers = 4\nthreads_per_worker = 2\nmemory_per_worker = "1 GiB"\nlease_seconds = 60\n'
    )

    def restrict(text: str) -> str:
        text = text.replace('"guest", ', "").replace("[workers]\n", '[workers]\nimages = ["other:latest"]\n')
        return text.replace("[network_options]\n", "[network_options]\nudp_ports = [51820, 51820]\n") + limits

    site = f"Site {ECMWF}: "
    with site_file(own_lab, "ecmwf", restrict):
        with refusals(own_lab) as refuse:
            for arguments, sentence in (
                (("--containers", "2", *LEASE), "8 worker processes are more than the 4 .* limits.workers."),
                (("--threads", "3", *LEASE), "3 threads per worker are more than the 2 .* limits.threads_per_worker."),
                (("--memory", "2GiB", *LEASE), "2048 MiB of memory .* than the 1024 .* limits.memory_per_worker."),
                ((), "A lease of 120 s is longer than 60 s, .* Ask for a shorter one.*"),
                (("--image", "evil:latest", *LEASE), "Site ecmwf does not run the image 'evil:latest'; it has .*"),
            ):
                refuse(ECMWF, EUMETSAT, *arguments, sentence=site + sentence)
            missing = (
                "The image other:latest is not at this site's engine: load it .*build-image.sh --tag other:latest."
            )
            refuse(ECMWF, "--image", "other:latest", *LEASE, sentence=r"Site mesh@10.8.0.4 \(ecmwf\): " + missing)
        with running(own_lab, "ecmwf", HOLD_UDP), refusals(own_lab) as refuse:
            taken = "All UDP ports from 51820 to 51820 of site ecmwf are taken, .* network_options.udp_ports."
            refuse(ECMWF, EUMETSAT, *LEASE, sentence=site + taken)
        with refusals(own_lab, user="guest") as refuse:
            who = "guest@10.8.0.4"
            refuse(who, *LEASE, sentence=f"Site {who}: User guest may not use site ecmwf. .* access.users, or .*")
        with own_lab.booted(*LEASE, "--prefix", "fda5:c0ff:eeee"), refusals(own_lab) as refuse:
            refuse(*SITES, *LEASE, sentence=f"{site}User mesh has 1 of the 1 clusters that site ecmwf allows .* down.*")
            prefix = "The prefix fda5:c0ff:eeee::/48 is in use by another cluster at this site. Leave --prefix away .*"
            refuse(EUMETSAT, *LEASE, "--prefix", "fda5:c0ff:eeee", sentence=f"Site local: {prefix}")


def test_a_site_that_is_not_as_its_file_says_is_refused_and_with_allow_partial_left_out(own_lab: LabBench) -> None:
    def with_missing_folder(text: str) -> str:
        return text.replace('["/data/ecmwf"]', '["/data/ecmwf", "/data/archive"]')

    folder = r"Site mesh@10.8.0.4 \(ecmwf\): .*data folder /data/archive .* mount it, or .*"
    with site_file(own_lab, "ecmwf", with_missing_folder), refusals(own_lab) as refuse:
        refuse(*SITES, *LEASE, sentence=folder)
        boot = own_lab.start_boot(*SITES, *LEASE, "--allow-partial", "--", sys.executable, "-c", COMPUTE)
        assert boot.wait() == 7, boot.said
        assert f"going on without {ECMWF}" in boot.said
    same_pool, other_role = ('pool = "ecmwf"', 'pool = "eumetsat"'), ('role = "site"', 'role = "scheduler"')
    with site_file(own_lab, "ecmwf", lambda text: text.replace(*same_pool)), refusals(own_lab) as refuse:
        refuse(*SITES, sentence=f"The sites {ECMWF} and {EUMETSAT} have the same pool 'eumetsat'; name each .*")
    with site_file(own_lab, "ecmwf", lambda text: text.replace(*other_role)), refusals(own_lab) as refuse:
        refuse(*SITES, sentence=f"Site {ECMWF}: its daemon has the role 'scheduler' and 'site' is needed; .*")


def test_ports_of_the_persons_own_host_that_are_taken_are_named_when_they_were_asked_for(own_lab: LabBench) -> None:
    with running(own_lab, "client", HOLD_TCP), refusals(own_lab) as refuse:
        taken = "Port 8786 of 127.0.0.1, wanted for the {}, is in use; end what listens there, name another port, or .*"
        refuse(*SITES, "--port", "8786", sentence=taken.format("scheduler"))
        refuse(*SITES, "--dashboard-port", "8786", sentence=taken.format("dashboard"))


def test_a_site_that_is_named_twice_is_refused_however_it_is_written(own_lab: LabBench) -> None:
    with refusals(own_lab) as refuse:
        refuse(ECMWF, ECMWF, sentence=f"The site {ECMWF} is named twice; name each site once.")
        refuse(
            ECMWF, "mesh@ecmwf", sentence=f"The sites {ECMWF} and mesh@ecmwf have the same pool 'ecmwf'; name each .*"
        )


WRONG = {
    "no site": ((), 2, r"Error: Missing argument 'USER@HOST\[:PORT\]...'."),
    "no host": (("mesh@",), 1, "Error: 'mesh@' names no site: the host is missing. Write user@host .*"),
    "no user": (("@10.8.0.4",), 1, "Error: '@10.8.0.4' names no site: there is nothing before the '@'. Write .*"),
    "no port": (("a@b:99999",), 1, "Error: 'a@b:99999' names no site: '99999' is no port from 1 to 65535. Write .*"),
    "bare IPv6": (("mesh@fe80::1",), 1, r"Error: .* an IPv6 address goes in brackets: mesh@\[fe80::1\]. Write .*"),
    "an option of ssh": (("mesh@-oProxyCommand=x",), 1, "Error: .* '-oProxyCommand=x' is no host's name. Write .*"),
    "prefix": (("a@b", "--prefix", "2001:db8::"), 1, "Error: '2001:db8::' is no /48 of fd00::/8 .*; write it like .*"),
    "memory": (("a@b", "--memory", "lots"), 2, "Error: --memory: 'lots' is no size; write it like 2GiB."),
    "too little": (("a@b", "--memory", "1KiB"), 1, "Error: memory_bytes_per_process cannot be 1024: it should be .*"),
    "containers": (
        ("a@b", "--containers", "0"),
        2,
        "Error: Invalid value for '--containers': 0 is not in the range .*",
    ),
    "lease": (("a@b", "--lease", "1"), 2, "Error: Invalid value for '--lease': 1.0 is not in the range 5<=x<=3600."),
    "name": (("a@b", "--name", "a/b"), 1, "Error: name cannot be 'a/b': it should match pattern .*"),
    "image": (("a@b", "--image", "a b"), 1, "Error: image cannot be 'a b': it should match pattern .*"),
    "link": (("a@b", "--link", "wire"), 2, "Error: Invalid value for '--link': 'wire' is not one of .*"),
    "detach": (("a@b", "--detach", "--", "true"), 2, "Error: --detach and a command exclude each other: .*"),
}


@pytest.mark.parametrize(("arguments", "code", "sentence"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_meant_is_said_before_anybody_is_asked(
    arguments: tuple[str, ...], code: int, sentence: str
) -> None:
    command = [str(TOP / "scripts/dask-boot.sh"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    assert re.fullmatch(sentence, done.stderr.splitlines()[-1]), done.stderr
    assert "Traceback" not in done.stderr
    assert "reached" not in done.stderr
