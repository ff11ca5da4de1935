"""Sites of this machine: real daemons under MeshCluster, which see their own data and do not outlive their owner."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed import Client

from meshcompute.embedded import MeshStartError
from meshcompute.mesh.cluster import MeshCluster
from meshcompute.mesh.clusterrecord import records
from meshcompute.mesh.localsites import LocalSites

# Its owner waits for the end; everything that belongs to it has its folder in the command line or the environment.
OWNER = """
import os, signal, sys, threading
from meshcompute.mesh.cluster import MeshCluster
from meshcompute.mesh.localsites import LocalSites

def main():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a script starts with &
    with LocalSites({"north": sys.argv[1]}, workers_per_site=2) as local:
        options = {"scheduler": local.scheduler, "lease_seconds": 5.0, "quiet": True, "progress": lambda line: None}
        with MeshCluster(local.addresses, **options) as cluster:
            print(local.root, *local.pids.values(), flush=True)
            threading.Event().wait()

main()
"""


def _files_seen(paths):
    return [path for path in paths if os.path.exists(path)]  # noqa: PTH110 (runs where only the standard library is sure)


def _processes_of(root):
    """Processes that belong to local sites: they name the sites' folder."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes()
            if str(root).encode() in line + (entry / "environ").read_bytes():
                found[int(entry.name)] = line.replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
    return found


def _wait_until_ended(root, timeout_seconds=40):
    deadline = time.monotonic() + timeout_seconds
    while running := _processes_of(root):
        assert time.monotonic() < deadline, running
        time.sleep(0.05)


@pytest.fixture
def stores(tmp_path):
    folders = {site: tmp_path / site for site in ("north", "south")}
    for site, folder in folders.items():
        folder.mkdir()
        (folder / "data.txt").write_text(site)
    return folders


def test_each_site_sees_its_own_folder_read_only_and_everything_ends_with_the_block(need, stores):
    said = []
    with LocalSites(stores, workers_per_site=2) as local:
        root = local.root
        options = {"scheduler": local.scheduler, "progress": said.append}
        with MeshCluster(local.addresses, **options) as cluster, Client(cluster) as client:
            assert cluster.observed == {"north-1-0", "north-1-1", "south-2-0", "south-2-1"}
            assert [record.name for record in records() if record.pid == os.getpid()] == [cluster.name]
            seen_here = [str(local.folder(site) / "data.txt") for site in stores]
            need("a mount namespace", not _files_seen(seen_here), "run where `unshare --mount` works")
            paths = [*seen_here, *(str(folder / "data.txt") for folder in stores.values())]
            assert client.run_on_scheduler(_files_seen, paths) == []
            addresses = {worker["name"]: address for address, worker in client.scheduler_info()["workers"].items()}
            for number, (site, path) in enumerate(zip(stores, seen_here, strict=True), 1):
                workers = [addresses[f"{site}-{number}-{process}"] for process in range(2)]
                assert list(client.run(_files_seen, paths, workers=workers).values()) == [[path], [path]]

                def write(path=path):
                    with open(path, "w"):  # noqa: PTH123 (runs at the worker)
                        pass

                with pytest.raises(OSError, match="Read-only file system"):
                    client.submit(write, workers=workers, pure=False).result(30)
        assert said[-1].endswith("everything is taken down")
    assert _processes_of(root) == {}
    assert not root.exists()
    assert (stores["north"] / "data.txt").read_text() == "north"
    local.close()


@pytest.fixture
def owner(stores):
    with subprocess.Popen([sys.executable, "-c", OWNER, stores["north"]], stdout=subprocess.PIPE, text=True) as owner:
        try:
            root, *daemons = owner.stdout.readline().split()
            assert len(daemons) == 2
            assert len(_processes_of(root)) >= 2 + 3  # two daemons, a scheduler, two workers, and who keeps them
            yield owner, Path(root), [int(pid) for pid in daemons]
        finally:
            owner.kill()


@pytest.mark.usefixtures("can_be_interrupted")
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_nothing_outlives_the_process_that_started_it(owner, stores, by):
    process, root, _ = owner
    process.send_signal(by)
    process.wait(timeout=60)
    _wait_until_ended(root)
    with LocalSites(stores):  # whoever comes next removes what a killed process could not
        assert not root.exists()


def test_workers_end_with_their_lease_when_the_daemons_are_killed_as_well(owner):
    process, root, daemons = owner
    for pid in (*daemons, process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait(timeout=60)
    _wait_until_ended(root)


def test_a_daemon_that_cannot_start_is_named_and_its_log_shown(stores, tmp_path):
    with pytest.raises(MeshStartError, match=r"the daemon of No Pool ended with exit code 1(.|\n)*'No Pool' is not"):
        LocalSites({"No Pool": stores["north"]}).start()
    with pytest.raises(FileNotFoundError, match="site 'x' does not exist"):
        LocalSites({"x": tmp_path / "nowhere"}).start()
    with pytest.raises(ValueError, match="cannot be a site"):
        LocalSites({"client": stores["north"]})
