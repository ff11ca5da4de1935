"""``meshcompute-site check`` on a host of the lab: says that it is fine, or what is missing and how to mend it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from labbench import LabBench

pytestmark = pytest.mark.timeout(300)
HOST = "eumetsat"
OTHER_FILE = "/run/check.toml"
OTHER_SETTINGS = "/run/check.sshd_config"
TAKE_PORT = """
import socket, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
    taken.bind(("0.0.0.0", 52000))
    print("taken", flush=True)
    time.sleep(1000)
"""


def check(bench: LabBench, *, changes: dict[str, str] | None = None, code: int = 1) -> str:
    """Run it, with another ``site.toml`` if there are changes; gives its output, each finding on one line."""
    arguments: tuple[str, ...] = ()
    if changes:
        text = bench.lab.run(HOST, "cat", "/etc/meshcompute/site.toml").stdout
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        bench.lab.run(HOST, "sh", "-c", 'cat >"$1"', "sh", OTHER_FILE, input=text)
        arguments = ("--config", OTHER_FILE)
    done = bench.lab.run(HOST, "meshcompute-site", "check", *arguments, check=False)
    bench.lab.run(HOST, "rm", "-f", OTHER_FILE)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return re.sub(r"\n +-> ", " -> ", done.stdout)


@contextmanager
def covered(bench: LabBench, source: str, *paths: str) -> Iterator[None]:
    """Have another file in the place of files of the host; below it they stay as they are."""
    for path in paths:
        bench.lab.run(HOST, "mount", "--bind", source, path)
    try:
        yield
    finally:
        bench.lab.run(HOST, "umount", *paths)


def test_a_good_host_is_fine_in_every_respect(bench: LabBench) -> None:
    said = check(bench, code=0)
    assert "BAD" not in said
    for line in (
        "access: for mesh, guest, root",
        "data folder: /data/eumetsat, read-only for workers",
        "ports: UDP 51820-51899, 80 of 80 free",
        "endpoint: 10.8.0.2; firewalls on the way must let UDP 51820-51899 in",
        "image: meshcompute-worker:latest",
        "sshd: forwards /run/meshcompute/site.sock for its users",
    ):
        assert f"ok    {line}\n" in said, said
    assert re.search(r"WireGuard: (of the kernel|in user space)", said)
    assert re.search(r"ok    engine: Docker \d+\..* as powerful as root", said)


def test_whatever_a_host_lacks_is_named_with_its_mend(bench: LabBench) -> None:
    go = bench.lab.run(HOST, "sh", "-c", "command -v wireguard-go").stdout.strip()
    wg = bench.lab.run(HOST, "sh", "-c", "command -v wg").stdout.strip()
    with covered(bench, "/dev/null", wg, go):
        said = check(bench)
        assert "BAD   wg: is not installed -> install the package wireguard-tools\n" in said, said
        if "WireGuard: of the kernel" not in said:
            assert re.search(r"BAD   WireGuard: neither .* -> modprobe wireguard .*wireguard-go", said), said
    wrong = check(
        bench,
        changes={
            'data_folders = ["/data/eumetsat"]': 'data_folders = ["/data/eumetsat", "/data/archive"]',
            "[workers]\n": '[workers]\nimages = ["other:latest"]\n',
            "[network_options]\n": "[network_options]\nudp_ports = [52000, 52003]\n",
            'users = ["mesh"': 'users = ["nobody-there", "mesh"',
        },
    )
    assert "BAD   data folder: /data/archive does not exist -> mount or create it" in wrong, wrong
    assert "BAD   image: other:latest is not here -> build it (scripts/build-image.sh --tag other:latest)" in wrong, (
        wrong
    )
    assert "ok    image: meshcompute-worker:latest\n" in wrong, wrong
    assert (
        "note  ports: UDP 52000-52003, 4 of 4 free, for 16 clusters at once -> set a wider network_options" in wrong
    ), wrong
    assert "BAD   access: 'nobody-there' is no account of this host -> create it" in wrong, wrong
    taken = bench.lab.popen(
        HOST, sys.executable, "-c", TAKE_PORT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    )
    with taken:
        assert taken.stdout is not None
        assert taken.stdout.readline() == "taken\n"
        said = check(bench, changes={"[network_options]\n": "[network_options]\nudp_ports = [52000, 52000]\n"})
        assert "BAD   ports: UDP 52000-52000, 0 of 1 free, for 16 clusters at once -> set a wider" in said, said
        taken.kill()
    # As its operator has it who forbids forwarding, but for the users of this site.
    for who, is_forwarded in (("mesh", True), ("guest", False)):
        text = f"AllowStreamLocalForwarding no\nMatch User {who}\n  AllowStreamLocalForwarding local\n"
        bench.lab.run(HOST, "sh", "-c", 'cat >"$1"', "sh", OTHER_SETTINGS, input=text)
        with covered(bench, OTHER_SETTINGS, "/etc/ssh/sshd_config"):
            said = check(bench, code=0)
        is_fine = "ok    sshd: forwards /run/meshcompute/site.sock for its users\n" in said
        is_named = "note  sshd: AllowStreamLocalForwarding no forbids forwarding for mesh; clients talk" in said
        assert (is_fine, is_named) == (is_forwarded, not is_forwarded), said
    bench.lab.run(HOST, "rm", OTHER_SETTINGS)
    assert "-> set DisableForwarding no and AllowStreamLocalForwarding local in sshd_config" in said, said


def test_an_engine_that_does_not_answer_is_named_with_its_mend(bench: LabBench) -> None:
    said = check(bench, changes={"[network_options]": '[docker]\nengine = "unix:///run/none.sock"\n[network_options]'})
    assert re.search(r"BAD   engine: does not answer at /run/none.sock .* -> install and start Docker \(system", said)
    engine = bench.pids(HOST, "dockerd")
    bench.kill(HOST, *engine, signum=signal.SIGSTOP)
    try:
        said = check(bench)
    finally:
        bench.kill(HOST, *engine, signum=signal.SIGCONT)
    assert re.search(r"BAD   engine: does not answer at /var/run/docker.sock .* -> install and start Docker", said), (
        said
    )
    bench.wait_until(
        lambda: bench.lab.run(HOST, "meshcompute-site", "ping", check=False).returncode == 0, "the daemon is well again"
    )
