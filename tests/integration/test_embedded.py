"""The embedded mesh: what its sites see, how it is named, and that nothing of it stays."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import dask
import pytest
from distributed import Client

from meshcompute.embedded import EmbeddedMesh, MeshStartError


def _files_seen(paths):
    return [path for path in paths if os.path.exists(path)]  # noqa: PTH110 (runs where only the standard library is sure)


def _running(pid):
    """Whether a process still runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def _wait_until_ended(pids, timeout_seconds=20):
    deadline = time.monotonic() + timeout_seconds
    while running := [pid for pid in pids if _running(pid)]:
        assert time.monotonic() < deadline, f"still running: {running}"
        time.sleep(0.02)


def test_each_site_sees_only_its_own_folder_and_others_see_none(sites):
    paths = []
    for site in "ab":
        sites.store(site, "seen.txt").write_text(site)
        paths += [sites.path(site, "seen.txt"), str(sites.store(site, "seen.txt"))]
    assert _files_seen(paths) == [str(sites.store(site, "seen.txt")) for site in "ab"]  # the test wrote them
    assert sites.client.run_on_scheduler(_files_seen, paths) == []
    for site, own in (("a", paths[:2]), ("b", paths[2:])):
        seen = sites.client.run(_files_seen, paths, workers=list(sites.workers(site).values()))
        assert list(seen.values()) == [own, own]


def test_workers_are_named_by_pool_site_and_process_and_carry_their_pool(sites):
    assert list(sites.workers("a")) == ["a-1-0", "a-1-1"]
    assert list(sites.workers("b")) == ["b-2-0", "b-2-1"]
    resources = sites.client.run(lambda dask_worker: dask_worker.state.total_resources)
    for site in "ab":
        for address in sites.workers(site).values():
            assert resources[address] == {f"pool-{site}": 1}
    names = sites.client.run(lambda: os.environ["POOL_NAME"])
    assert sorted(names.values()) == ["a", "a", "b", "b"]


def test_workers_are_started_as_by_a_nanny_and_what_the_user_has_set_counts(start_sites, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    mine = start_sites(workers_per_site=1)
    names = ("MALLOC_TRIM_THRESHOLD_", "OMP_NUM_THREADS")
    found = mine.client.run(lambda: [os.environ.get(name) for name in names])
    assert list(found.values()) == [["65536", "3"]] * 2


def test_everything_listens_on_the_loopback_address_only(sites):
    addresses = [sites.mesh.scheduler_address, *sites.workers("a").values(), *sites.workers("b").values()]
    assert all(address.startswith("tcp://127.0.0.1:") for address in addresses)
    for pid in sites.mesh.pids.values():
        sockets = {link.readlink().name for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if f"socket:[{fields[9]}]" in sockets and fields[3] == "0A":  # 0A: listening
                    assert fields[1].split(":")[0] == "0100007F", line


def test_what_a_site_writes_stays_in_its_folder(sites):
    target = sites.path("a", "written.txt")

    def write():
        with open(target, "w") as file:  # noqa: PTH123 (runs at the worker)
            return file.write("here")

    assert sites.client.submit(write, workers=list(sites.workers("a").values()), pure=False).result() == 4
    assert sites.store("a", "written.txt").read_text() == "here"


def test_a_lost_worker_can_be_replaced_under_its_name(start_sites):
    mine = start_sites(workers_per_site=1, threads_per_worker=1)
    mine.mesh.kill("b-2-0")
    assert mine.mesh.start_worker("b") == "b-2-0"
    deadline = time.monotonic() + 60
    while "b-2-0" not in mine.workers("b"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert mine.client.submit(lambda: 1, workers=["b-2-0"]).result(timeout=30) == 1


def test_settings_of_dask_reach_every_process_through_the_environment(start_sites):
    mine = start_sites(workers_per_site=1, environment={"DASK_MESHCOMPUTE__MISSING_POOL_TIMEOUT": "7s"})

    def timeout():
        return dask.config.get("meshcompute.missing-pool-timeout")

    assert mine.client.run_on_scheduler(timeout) == "7s"
    assert set(mine.client.run(timeout).values()) == {"7s"}


def test_close_ends_all_processes_and_removes_the_folder(tmp_path):
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "data.txt").write_text("stays")
    with EmbeddedMesh({"only": tmp_path / "only"}, workers_per_site=1) as mesh:
        root, pids = mesh.root, mesh.pids
        assert set(pids) == {"scheduler", "only-1-0"}
    _wait_until_ended(pids.values())
    assert not root.exists()
    assert (tmp_path / "only" / "data.txt").read_text() == "stays"
    mesh.close()


def test_without_namespaces_the_mesh_works_and_says_that_it_is_not_isolated(tmp_path, monkeypatch):
    monkeypatch.setattr("meshcompute.embedded._NAMESPACES", ())
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "data.txt").write_text("stays")
    lines = []
    with EmbeddedMesh({"x": tmp_path / "x"}, workers_per_site=1, progress=lines.append) as mesh:
        assert not mesh.isolated
        with Client(mesh.scheduler_address, set_as_default=False) as client:
            path = str(mesh.folder("x") / "data.txt")
            assert list(client.run(_files_seen, [path]).values()) == [[path]]
    assert any("every site sees the folders of all" in line for line in lines)
    assert (tmp_path / "x" / "data.txt").read_text() == "stays"


def test_a_process_that_cannot_start_is_named_and_its_log_shown(tmp_path):
    (tmp_path / "x").mkdir()
    broken = tmp_path / "broken-python"
    broken.write_text("#!/bin/sh\necho no Dask here\nexit 3\n")
    broken.chmod(0o755)
    mesh = EmbeddedMesh({"x": tmp_path / "x"}, workers_per_site=1, worker_python=str(broken))
    with pytest.raises(MeshStartError, match=r"x-1-0 ended with exit code 3(.|\n)*no Dask here"):
        mesh.start()
    assert mesh.pids == {}


def test_a_folder_that_does_not_exist_is_named_before_anything_starts(tmp_path):
    mesh = EmbeddedMesh({"x": tmp_path / "nowhere"})
    with pytest.raises(FileNotFoundError, match="site 'x' does not exist"):
        mesh.start()


@pytest.mark.usefixtures("can_be_interrupted")
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_the_process_that_started_it(tmp_path, by):
    (tmp_path / "x").mkdir()
    script = (
        "import signal, sys, threading\n"
        "from meshcompute.embedded import EmbeddedMesh\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in what a script starts with &
        "with EmbeddedMesh({'x': sys.argv[1]}, workers_per_site=2) as mesh:\n"
        "    print(*mesh.pids.values(), flush=True)\n"
        "    threading.Event().wait()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "x"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as owner:
        try:
            pids = [int(word) for word in owner.stdout.readline().split()]
            assert len(pids) == 3
            assert all(map(_running, pids))
            owner.send_signal(by)
            owner.wait(timeout=60)
        finally:
            owner.kill()
    _wait_until_ended(pids)


def test_workers_may_run_without_meshcompute(stock_sites):
    import_fails = stock_sites.client.run(lambda: __import__("importlib.util").util.find_spec("meshcompute") is None)
    assert list(import_fails.values()) == [True] * 4
