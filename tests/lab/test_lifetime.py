"""What starts and ends a lab, and that nothing stays, whatever was killed.

The kernel is asked: processes by namespace, links, routes, rules, mounts, cgroups, sockets, files, accounts.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from labbench import SITES, open_lab_bench

from meshcompute.lab.errors import LabMissingError, LabStartError, LabStateError
from meshcompute.lab.forwarding import listen, render_forwarder
from meshcompute.lab.running import CGROUPS, RunningLab
from meshcompute.lab.starting import check_machine, find_accounts, start_lab
from meshcompute.lab.topology import Lab

Note = Callable[[RunningLab], None]
COMMAND = (sys.executable, "-c", "from meshcompute.lab.cli import lab; lab(prog_name='meshcompute lab')")


@contextmanager
def lab_run(name: str, *command: str, **options: object) -> Iterator[subprocess.Popen[str]]:
    """``meshcompute lab run`` in the background, until its command says ready."""
    arguments = [*COMMAND, "run", "--name", name, "--no-engine", *command]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.communicate()


@contextmanager
def busy(lab: RunningLab) -> Iterator[None]:
    """Sessions with processes in the foreground and in the background, which must end by themselves."""
    sleeps = "setsid sleep 1000 & sleep 1000"
    sessions = [lab.popen("ecmwf", "sh", "-c", sleeps), lab.popen("client", "ssh", "ecmwf", sleeps)]
    counted = "until [ $(grep -xl sleep /proc/[0-9]*/comm 2>/dev/null | wc -l) -ge 4 ]; do :; done"
    lab.run("ecmwf", "sh", "-c", counted)
    yield
    for session in sessions:
        session.wait(20)


def name_of_mine() -> str:
    return f"test-{os.getpid()}-{time.monotonic_ns()}"


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def test_down_leaves_nothing(start: Callable[..., RunningLab], expect_nothing_left: Note) -> None:
    lab = start()
    expect_nothing_left(lab)
    with busy(lab), listen(0) as listener:
        forwarder = render_forwarder(listener, lab.status().pids["client"], "127.0.0.1:8787")
        forwarding = subprocess.Popen(forwarder, pass_fds=[listener.fileno()])
        lab.stop()
        forwarding.wait(20)
    with pytest.raises(LabStateError, match=f"No lab '{lab.name}' is up on this machine. Start it: meshcompute lab up"):
        lab.status()


@pytest.mark.parametrize("victim", ["supervisor", "process 1", "unshare", "guardian"])
def test_kill_9_of_any_process_above_the_hosts_leaves_nothing(
    start: Callable[..., RunningLab], expect_nothing_left: Note, victim: str
) -> None:
    lab = start()
    expect_nothing_left(lab)
    with busy(lab):
        pid = lab.status().supervisor_pid
        for _ in range(["supervisor", "process 1", "unshare", "guardian"].index(victim)):
            pid = parent_of(pid)
        os.kill(pid, signal.SIGKILL)


def test_kill_9_with_engines_and_containers_leaves_nothing(
    can_have_engine: None, start: Callable[..., RunningLab], expect_nothing_left: Note
) -> None:
    lab = start(engine=True)
    expect_nothing_left(lab)
    # The machine's own sleep with its libraries is an image that needs no registry.
    lab.run("ecmwf", "sh", "-c", "tar ch /bin/sleep $(ldd /bin/sleep | grep -o '/[^ ]*') | docker import - tiny")
    lab.run("ecmwf", "docker", "run", "--detach", "--network", "none", "tiny", "/bin/sleep", "1000")
    assert lab.run("ecmwf", "docker", "ps", "--quiet").stdout
    assert [path for path in Path("/sys/fs/cgroup").glob(f"**/meshcompute-lab/{lab.name}/ecmwf/*") if path.is_dir()]
    os.kill(lab.status().supervisor_pid, signal.SIGKILL)


def test_kill_9_with_a_running_cluster_leaves_nothing(can_have_mesh: None, expect_nothing_left: Note) -> None:
    with open_lab_bench() as bench:
        expect_nothing_left(bench.lab)
        boot = bench.start_boot(*SITES, "--processes", "1")
        boot.wait_for(" ready: ")
        assert len([*CGROUPS.glob(f"**/meshcompute-lab/{bench.lab.name}/*/*/")]) >= 3  # a container on every host
        os.kill(bench.lab.status().supervisor_pid, signal.SIGKILL)
        boot.wait()


def test_run_passes_the_exit_code_and_output_on_and_leaves_nothing(
    can_have_lab: None, command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    name = name_of_mine()
    done = command("run", "--name", name, "--no-engine", "--", "sh", "-c", "ssh eumetsat hostname; exit 9")
    assert (done.returncode, done.stdout) == (9, "eumetsat\n")
    assert "ecmwf is up at 10.8.0.4" in done.stderr
    assert done.stderr.endswith("the lab is down\n")
    assert command("run", "--name", name, "--no-engine", "sh", "-c", "kill -TERM $$").returncode == 128 + signal.SIGTERM
    assert command("down", "--name", name).returncode == 1


def test_what_run_s_command_writes_in_the_current_folder_stays(
    can_have_lab: None, command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    command("run", "--name", name_of_mine(), "--no-engine", "--", "sh", "-c", "echo 42 > result; echo 43 > /etc/result")
    assert (tmp_path / "result").read_text() == "42\n"
    assert not Path("/etc/result").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_run_ends_the_lab_and_leaves_nothing(
    can_have_lab: None, expect_nothing_left: Note, number: signal.Signals
) -> None:
    name = name_of_mine()
    with lab_run(name, "sh", "-c", "echo ready; sleep 1000", process_group=0) as process:
        expect_nothing_left(RunningLab(name))
        if number == signal.SIGINT:  # a terminal sends it to the whole group
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        process.wait(30)
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number


def test_a_second_lab_of_the_same_name_is_refused_and_another_one_is_not(start: Callable[..., RunningLab]) -> None:
    first = start()
    with pytest.raises(LabStateError, match=f"The lab '{first.name}' is up already. End it"):
        start(name=first.name)
    second = start()
    second.run("ecmwf", "touch", "/data/ecmwf/second")
    assert first.run("ecmwf", "ls", "/data/ecmwf").stdout == ""
    assert first.run("client", "ssh", "ecmwf", "hostname").stdout == "ecmwf\n"
    assert second.run("client", "ssh", "ecmwf", "hostname").stdout == "ecmwf\n"


def test_a_host_that_cannot_start_is_named_with_its_log_and_nothing_stays(can_have_lab: None, tmp_path: Path) -> None:
    name = name_of_mine()
    wanted = Lab(name=name, accounts=find_accounts(), shared=str(tmp_path / "missing"))
    with pytest.raises(LabStartError, match=r"host client ended with exit code (?s:.*)/missing"):
        start_lab(wanted)
    with pytest.raises(LabStateError):
        RunningLab(name).status()


def test_what_is_missing_is_named_with_the_package_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Lab(name="x", accounts=())
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(LabMissingError, match="needs root"):
        check_machine(wanted)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda program, path=None: None if program in {"tini", "sshd"} else program)
    with pytest.raises(LabMissingError, match=r"sshd, tini, not found .*apt-get install openssh-server tini"):
        check_machine(wanted)


def test_cgroups_that_a_killed_guardian_left_are_swept_by_the_next_up(start: Callable[..., RunningLab]) -> None:
    controllers = [parent for parent in Path("/sys/fs/cgroup").glob("*/") if os.access(parent / "tasks", os.W_OK)]
    name = name_of_mine()
    left = [controller / "meshcompute-lab" / name / "ecmwf/0123" for controller in controllers]
    for folder in left:
        folder.mkdir(parents=True)
    start(name=name)
    assert not [folder for folder in left if folder.parents[1].exists()]
