"""What the keeper inside every unit promises, with processes that need no Dask."""

import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from waiting import wait_until

from controlplane.workers import entrypoint, nursery


@pytest.fixture
def keep(tmp_path):
    """Start a keeper with shell scripts as its processes; they are ended with the test."""
    keepers = []

    def keep(*scripts, deadline_seconds=60.0, stdout=subprocess.PIPE, **plan):
        processes = [
            {"name": f"p{number}", "argv": ["sh", "-c", script], "environment": {"NUMBER": str(number)}}
            for number, script in enumerate(scripts)
        ]
        defaults = {"address": None, "address_timeout_seconds": 1.0, "grace_seconds": 0.5, "log_bytes_max": 1 << 20}
        defaults |= {"replaces": True, "nursery": None, "scratch": str(tmp_path / "scratch"), "processes": processes}
        plan = {**defaults, **plan}
        (tmp_path / "given").mkdir()
        (tmp_path / "given/plan.json").write_text(json.dumps(plan))
        renew(tmp_path, deadline_seconds)
        command = [sys.executable, "-I", entrypoint.__file__, str(tmp_path / "given")]
        keepers.append(subprocess.Popen(command, stdout=stdout))
        return keepers[-1]

    yield keep
    for keeper in keepers:
        keeper.kill()
        keeper.wait()
        if keeper.stdout is not None:
            keeper.stdout.close()


def renew(folder, deadline_seconds):
    (folder / "new").write_text(repr(time.monotonic() + deadline_seconds))
    (folder / "new").rename(folder / "given/lease")


def test_a_passed_deadline_ends_what_ignores_sigterm(keep, tmp_path):
    keeper = keep(f"trap '' TERM; echo $$ > {tmp_path}/pid; while :; do sleep 1; done", deadline_seconds=1.0)
    assert keeper.wait(30) == entrypoint.EXIT_LEASE_ENDED
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()
    assert not list((tmp_path / "scratch").iterdir())


def test_a_lease_that_cannot_be_read_leaves_the_last_deadline(keep, tmp_path):
    started = time.monotonic()
    keeper = keep(f"touch {tmp_path}/runs; sleep 100", deadline_seconds=1.5)
    wait_until((tmp_path / "runs").exists, "the process")
    (tmp_path / "given/lease").unlink()
    assert keeper.wait(30) == entrypoint.EXIT_LEASE_ENDED
    assert time.monotonic() - started >= 1.5


@pytest.mark.parametrize("nonsense", ["nan", "-inf", "0"])
def test_a_deadline_that_means_nothing_has_passed(keep, tmp_path, nonsense):
    keeper = keep(f"touch {tmp_path}/runs; sleep 100")
    wait_until((tmp_path / "runs").exists, "the process")
    (tmp_path / "given/lease").write_text(nonsense)
    assert keeper.wait(30) == entrypoint.EXIT_LEASE_ENDED


def test_a_folder_that_takes_the_name_later_is_not_obeyed(keep, tmp_path):
    keeper = keep(f"touch {tmp_path}/runs; sleep 100", deadline_seconds=2.0)
    wait_until((tmp_path / "runs").exists, "the process")
    (tmp_path / "given").rename(tmp_path / "old")
    (tmp_path / "old/lease").unlink()
    (tmp_path / "given").mkdir()
    renew(tmp_path, 600)
    assert keeper.wait(30) == entrypoint.EXIT_LEASE_ENDED


def test_an_address_that_does_not_appear_ends_the_wait(keep, tmp_path):
    keeper = keep(f"touch {tmp_path}/runs", address="fda5:c0ff:eeee:9::9", address_timeout_seconds=0.3)
    output, _ = keeper.communicate(timeout=30)
    assert keeper.returncode == entrypoint.EXIT_NO_ADDRESS
    assert b"fda5:c0ff:eeee:9::9 did not appear in 0.3 s" in output
    assert not (tmp_path / "runs").exists()


def test_an_address_that_is_here_lets_the_processes_start(keep, tmp_path):
    keep(f"touch {tmp_path}/runs; sleep 100", address="::1")
    wait_until((tmp_path / "runs").exists, "the process")


def test_what_exits_is_started_again_with_longer_and_longer_pauses(keep, tmp_path):
    keep(f"date +%s.%N >> {tmp_path}/starts")
    wait_until(
        lambda: (tmp_path / "starts").exists() and len((tmp_path / "starts").read_text().split()) >= 4, "restarts"
    )
    starts = [float(word) for word in (tmp_path / "starts").read_text().split()]
    pauses = [later - earlier for earlier, later in pairwise(starts)]
    assert pauses[0] >= 0.2
    assert pauses[1] >= 0.4
    assert pauses[2] >= 0.8


def test_a_program_that_is_missing_is_said_and_does_not_end_the_others(keep, tmp_path):
    processes = [
        {"name": "missing", "argv": ["/no/such/program"], "environment": {}},
        {"name": "there", "argv": ["sh", "-c", f"touch {tmp_path}/runs; sleep 100"], "environment": {}},
    ]
    keeper = keep(processes=processes)
    wait_until((tmp_path / "runs").exists, "the other process")
    keeper.terminate()
    output, _ = keeper.communicate(timeout=30)
    assert keeper.returncode == 0
    assert b"keeper | missing cannot be started" in output


def test_a_reader_that_has_stopped_does_not_keep_the_deadline_from_passing(keep):
    keeper = keep("yes nobody reads this", deadline_seconds=2.0)  # nobody reads the pipe, as when an engine has died
    assert keeper.wait(30) == entrypoint.EXIT_LEASE_ENDED


def test_a_log_file_stays_bounded(keep, tmp_path):
    with (tmp_path / "log").open("ab") as log:
        keeper = keep("yes | head -c 1000000", "sleep 100", stdout=log, log_bytes_max=100_000, deadline_seconds=2.0)
    assert keeper.wait(30) == entrypoint.EXIT_LEASE_ENDED
    assert (tmp_path / "log").stat().st_size < 300_000


def test_lines_come_whole_and_with_the_name_of_who_wrote_them(keep, tmp_path):
    with (tmp_path / "log").open("ab") as log:
        keeper = keep("printf 'one\\ntw'; sleep 0.3; printf 'o\\nno end'; sleep 100", stdout=log)
    wait_until(lambda: b"o\n" in (tmp_path / "log").read_bytes(), "the second line")
    keeper.terminate()
    assert keeper.wait(30) == 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line for line in lines if line.startswith("p0 | ")] == ["p0 | one", "p0 | two", "p0 | no end"]


def test_where_nothing_is_replaced_the_end_of_one_process_is_the_end_of_the_unit(keep, tmp_path):
    keeper = keep(f"echo $$ > {tmp_path}/pid; exec sleep 100", "sleep 0.2; exit 7", replaces=False)
    assert keeper.wait(30) == entrypoint.EXIT_NOT_REPLACED
    said = keeper.stdout.read().decode()
    assert "p1 ended with code 7" in said
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


# Says what it is, as `python -m job`; what the nursery has imported for it says where.
JOB = """
import json, os, random, sys, time
from pathlib import Path
about = {"pid": os.getpid(), "parent": os.getppid(), "session": os.getsid(0), "argv": sys.argv[1:], "name": __name__}
about |= {"folder": os.getcwd(), "shown": Path("/proc/self/cmdline").read_text().rstrip(chr(0)).split(chr(0))}
about |= {"chance": random.random(), "imported": getattr(sys, "imported_in", None)}
about |= {"variable": os.environ["NUMBER"], "fds": sorted(os.listdir("/proc/self/fd"))}
print("hello from", sys.argv[1], flush=True)
Path(sys.argv[2], "new-" + sys.argv[1]).write_text(json.dumps(about))
Path(sys.argv[2], "new-" + sys.argv[1]).rename(Path(sys.argv[2], sys.argv[1]))
time.sleep(100)
"""


@pytest.fixture
def hatch(keep, tmp_path):
    """Start a keeper with two processes that come from a nursery; waits for both and gives what they say."""

    def hatch(imports, **options):
        (tmp_path / "path").mkdir()
        (tmp_path / "path/job.py").write_text(JOB)
        (tmp_path / "path/shared.py").write_text("import os, sys\nsys.imported_in = os.getpid()\n")
        thread = "import threading, time\nthreading.Thread(target=time.sleep, args=(100,), daemon=True).start()\n"
        (tmp_path / "path/threaded.py").write_text(thread)
        environment = {"NUMBER": "7", "PYTHONPATH": str(tmp_path / "path")}
        processes = [
            {"name": name, "argv": [sys.executable, "-m", "job", name, str(tmp_path)], "environment": environment}
            for name in ("p0", "p1")
        ]
        program = {"argv": [sys.executable, nursery.__file__], "imports": imports}
        keeper = keep(processes=processes, nursery=program, **options)
        return keeper, [said(tmp_path / name) for name in ("p0", "p1")]

    return hatch


def said(file):
    wait_until(file.exists, f"{file.name} says what it is")
    return json.loads(file.read_text())


def test_what_comes_from_the_nursery_shares_its_imports_and_is_else_as_if_started_by_itself(hatch, tmp_path):
    keeper, (first, second) = hatch(["shared"], address="::1")
    assert first["imported"] == second["imported"] not in {None, first["pid"], second["pid"]}
    assert first["chance"] != second["chance"]
    (tmp_path / "p1").unlink()
    subprocess.run(["kill", "-9", str(second["pid"])], check=True)
    again = said(tmp_path / "p1")  # by itself, this time
    assert (first["imported"], again["imported"]) == (second["imported"], None)
    for about in (first, second, again):
        assert (about["parent"], about["session"]) == (keeper.pid, about["pid"])
        assert (about["name"], about["variable"]) == ("__main__", "7")
        assert about["shown"] == [sys.executable, "-m", "job", *about["argv"]]
        assert about["folder"] == str(tmp_path / "scratch" / about["argv"][0])
        assert about["fds"] == again["fds"]
    keeper.terminate()
    output, _ = keeper.communicate(timeout=30)
    assert output.count(b"p1 | hello from p1") == 2
    assert b"p1 ended by signal 9" in output
    for about in (first, again):
        assert not Path(f"/proc/{about['pid']}").exists()


def test_what_comes_from_the_nursery_dies_with_the_keeper(hatch):
    keeper, processes = hatch([])
    keeper.kill()
    wait_until(
        lambda: not any(Path(f"/proc/{about['pid']}").exists() for about in processes), "the end of the processes"
    )


@pytest.mark.parametrize(
    ("imports", "reason"),
    [("no_such_module", b"No module named 'no_such_module'"), ("threaded", b"the imports have started 1 threads")],
)
def test_where_the_nursery_fails_everything_is_started_by_itself(hatch, imports, reason):
    keeper, processes = hatch([imports])
    assert [about["imported"] for about in processes] == [None, None]
    keeper.terminate()
    output, _ = keeper.communicate(timeout=30)
    assert reason in output
    assert b"p1 does not come from the nursery" in output
