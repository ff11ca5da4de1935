"""MeshCluster and the commands, on real daemons: two sites behind SSH, the client's own, plain processes as workers."""

import asyncio
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import dask
import pytest
from daemons import SITE_COMMAND, Daemons
from distributed import Client
from sshd import Sshd

import meshcompute
from meshcompute.errors import MeshError
from meshcompute.mesh.cluster import MeshCluster
from meshcompute.mesh.clusterrecord import UnknownClusterError, records
from meshcompute.mesh.localports import PortTakenError
from meshcompute.mesh.scaling import ScalingError
from meshcompute.mesh.sites import SiteRefusedError, SiteStartError, SiteUnreachableError
from meshcompute.mesh.views import describe
from meshcompute.protocol import WorkerRequest

BOOT_SCRIPT = Path(__file__).parents[2] / "scripts" / "dask-boot.sh"
ONE = WorkerRequest(processes_per_container=1)
WORKERS = {"ecmwf-1-0", "ecmwf-1-1", "eumetsat-2-0", "eumetsat-2-1"}


class World:
    """Two sites that are reached through SSH at addresses of their own, and the client's host."""

    def __init__(self, daemons, sshd):
        self.daemons = daemons
        self.sshd = sshd
        # sshd is the same for both; which daemon answers is decided by the socket, as `local:` says it.
        self.sites = [f"local:{daemons.socket(pool)}" for pool in ("ecmwf", "eumetsat")]
        self.scheduler = f"local:{daemons.socket('client')}"

    def options(self, **options):
        return {"scheduler": self.scheduler, "lease_seconds": 6.0, "progress": self.said.append, **options}

    def cluster(self, sites=None, **options):
        self.said = []
        return MeshCluster(self.sites if sites is None else sites, **self.options(**options))

    def command(self, *arguments):
        boot = [str(BOOT_SCRIPT), *self.sites, "--scheduler-site", self.scheduler, "--lease", "6", "--processes", "1"]
        return [*boot, *arguments]

    def left(self):
        """What runs for any cluster: processes on whose command line or in whose environment the sites' folder is."""
        mark = str(self.daemons.folder).encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                line = (folder / "cmdline").read_bytes()
                if b"--stop-clusters" not in line and mark in line + (folder / "environ").read_bytes():
                    found.append(f"{folder.name} {line.replace(bytes(1), b' ').decode(errors='replace')}")
            except OSError:
                continue
        return found

    def wait_nothing_left(self, timeout_seconds):
        deadline = time.monotonic() + timeout_seconds
        while left := self.left():
            assert time.monotonic() < deadline, "\n".join(left)
            time.sleep(0.05)


@pytest.fixture(scope="module")
def world(need, tmp_path_factory):
    need("OpenSSH's server", shutil.which("sshd") or shutil.which("/usr/sbin/sshd"), "apt-get install openssh-server")
    folder = Path(tempfile.mkdtemp(prefix="mc-"))  # short: paths of sockets are
    try:
        with (
            Daemons(folder, ("client", "ecmwf", "eumetsat")) as daemons,
            Sshd(tmp_path_factory.mktemp("sshd")) as sshd,
        ):
            yield World(daemons, sshd)
    finally:
        shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def runtime_folder(tmp_path_factory, monkeypatch):
    """Where records and sockets go; every test leaves it empty."""
    folder = tmp_path_factory.mktemp("r")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    monkeypatch.setenv("PYTHON", sys.executable)
    yield folder
    assert list(folder.rglob("*")) == []


def _import_nothing():
    return 1


def test_one_call_makes_a_cluster_and_closing_it_leaves_nothing(world):
    with world.cluster(prefix="fda5:c0ff:eeee", name="demo") as cluster:
        assert cluster.observed == WORKERS
        assert cluster.mesh.plan.prefix == "fda5:c0ff:eeee::/48"
        assert dask.config.get("meshcompute.propagate") is True
        assert cluster.dashboard_link.startswith("http://127.0.0.1:")
        assert world.left()  # or the assertion below would mean nothing
        with Client(cluster) as client:
            assert client.submit(_import_nothing).result(30) == 1
            with meshcompute.pool("eumetsat"):
                where = client.submit(os.getenv, "POOL_NAME", pure=False)
            assert where.result(30) == "eumetsat"
            resources = client.run(lambda dask_worker: dict(dask_worker.state.total_resources))
            assert sorted(map(str, resources.values())) == 2 * ["{'pool-ecmwf': 1.0}"] + 2 * ["{'pool-eumetsat': 1.0}"]

            attached = MeshCluster.from_name("demo")
            assert attached.scheduler_address == cluster.scheduler_address
            assert attached.observed == WORKERS
            with pytest.raises(MeshError, match="kept by another process"):
                attached.scale(4)
            attached.close()
            assert client.submit(_import_nothing, pure=False).result(30) == 1  # it only let go

            logs = cluster.site_logs("ecmwf", "ecmwf-1-1")
            assert "ecmwf-1-1" in logs["ecmwf-1-1"]
            assert "Start worker" in logs["ecmwf-1-1"]
            with pytest.raises(MeshError, match="has no site 'nowhere'"):
                cluster.site_logs("nowhere")

            cluster.scale(4, site="ecmwf")
            client.wait_for_workers(6, timeout=60)
            assert cluster.observed == WORKERS | {"ecmwf-1-2", "ecmwf-1-3"}
            kept = client.scatter({"x": 1}, workers=["ecmwf-1-3"])
            cluster.scale({"ecmwf": 2})
            _wait_until(lambda: cluster.observed == WORKERS)
            assert client.gather(kept) == {"x": 1}  # what a leaving worker holds moves first
            with pytest.raises(ScalingError, match="too few for 2 sites"):
                cluster.scale(1)
            with pytest.raises(MeshError, match="it has ecmwf, eumetsat"):
                cluster.scale(4, site="nowhere")

            told = time.monotonic()  # the last change, which renewed the leases, was before
            _wait_until(lambda: time.monotonic() - told > 6.5)  # longer than a lease
            assert client.submit(_import_nothing, pure=False).result(30) == 1
            assert cluster.observed == WORKERS
        said = "\n".join(world.said)
    assert dask.config.get("meshcompute.propagate", None) is not True
    assert "ready: 4 workers" in said
    for site, pool in zip(world.sites, ("ecmwf", "eumetsat"), strict=True):
        assert f"{site} ({pool}): reached in" in said
        assert f"{site} ({pool}): removed in" in "\n".join(world.said)
    assert world.said[-1].endswith("everything is taken down")
    assert world.left() == []
    cluster.close()  # again: nothing happens


def _wait_for_file(path):
    while not os.path.exists(path):  # noqa: PTH110 (runs where only the standard library is sure)
        time.sleep(0.05)


def test_a_site_grows_while_its_workers_are_busy_and_shrinks_when_they_are_idle(world, tmp_path):
    with world.cluster([world.sites[0]], workers=ONE) as cluster, Client(cluster) as client:
        cluster.adapt(maximum=2, interval_seconds=0.3)
        work = client.map(_wait_for_file, [str(tmp_path / "done")] * 6, pure=False)
        _wait_until(lambda: cluster.observed == {"ecmwf-1-0", "ecmwf-1-1"})
        (tmp_path / "done").touch()
        client.gather(work)
        _wait_until(lambda: cluster.observed == {"ecmwf-1-0"})
    assert world.left() == []


def _wait_until(is_so, timeout_seconds=30):
    deadline = time.monotonic() + timeout_seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_it_works_in_coroutines_over_ssh(world):
    daemons, sshd = world.daemons, world.sshd

    async def run():
        # One daemon is reached through SSH, with its socket at another place than usual.
        options = {"socket": daemons.socket("ecmwf"), "ssh": sshd.ssh, "site_command": SITE_COMMAND, "workers": ONE}
        async with MeshCluster([sshd.site], asynchronous=True, **world.options(**options)) as cluster:
            assert cluster.observed == {"ecmwf-1-0"}
            async with Client(cluster, asynchronous=True) as client:
                assert await client.submit(_import_nothing) == 1

    world.said = []
    asyncio.run(run())
    assert f"{sshd.site} (ecmwf): reached in" in "\n".join(world.said)
    assert world.left() == []


def test_a_site_that_cannot_be_had_fails_the_boot_and_everything_is_taken_down(world):
    missing = f"local:{world.daemons.folder}/none.sock"
    with pytest.raises(SiteUnreachableError, match=r"none\.sock.* no control daemon answers"):
        world.cluster([world.sites[0], missing])
    assert world.left() == []
    with pytest.raises(SiteRefusedError, match=f"Site {world.sites[0]}.*workers"):
        world.cluster(workers=WorkerRequest(containers=200))
    assert world.left() == []


def test_allow_partial_goes_on_without_a_site_and_keeps_the_numbers_of_the_others(world):
    missing = f"local:{world.daemons.folder}/none.sock"
    with world.cluster([missing, world.sites[1]], allow_partial=True, workers=ONE) as cluster:
        assert cluster.observed == {"eumetsat-2-0"}
        assert set(cluster.mesh.left_out) == {1}
    assert any(f"going on without {missing}" in line for line in world.said)
    with pytest.raises(SiteUnreachableError):
        world.cluster([missing], allow_partial=True)  # nobody is left


def test_a_site_whose_workers_never_register_is_left_out_if_that_is_allowed(world):
    """Its processes run, so that its daemon is content; only the scheduler can know that nobody comes."""
    folder = Path(tempfile.mkdtemp(prefix="mc-"))
    mute = folder / "python"
    mute.write_text(
        f'#!/bin/sh\ncase "$*" in *nursery* | *"dask worker"*) exec sleep 600 ;; esac\nexec {sys.executable} "$@"\n'
    )
    mute.chmod(0o755)
    try:
        with Daemons(folder, ("mute",), lines=f'[process]\npython = "{mute}"\n') as daemons:
            sites = [f"local:{daemons.socket('mute')}", world.sites[1]]
            options = {"workers": ONE, "start_timeout_seconds": 15.0}
            with world.cluster(sites, allow_partial=True, **options) as cluster:
                assert cluster.observed == cluster.mesh.worker_names == {"eumetsat-2-0"}
                assert set(cluster.mesh.left_out) == {1}
                with Client(cluster) as client:
                    assert client.submit(_import_nothing).result(timeout=30) == 1
            assert any("mute-1-0 did not register within 15 s" in line for line in world.said)
            with pytest.raises(SiteStartError, match="mute-1-0 did not register within 5 s"):
                world.cluster(sites, **{**options, "start_timeout_seconds": 5.0})
    finally:
        shutil.rmtree(folder)
    assert world.left() == []


def test_what_cannot_be_right_is_an_error_before_anybody_is_asked(world):
    with pytest.raises(ValueError, match="write it like fda5:c0ff:eeee"):
        world.cluster(prefix="2001:db8::/48")
    with pytest.raises(ValueError, match="at least one user@host"):
        world.cluster([])
    with pytest.raises(ValueError, match="'mesh@' names no site"):
        world.cluster(["mesh@"])
    with pytest.raises(MeshError, match="named twice"):
        world.cluster([world.sites[0], world.sites[0]])
    with pytest.raises(UnknownClusterError, match="No cluster 'none' of yours runs on this host"):
        MeshCluster.from_name("none")


def test_a_port_that_was_asked_for_and_is_taken_is_named(world):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortTakenError, match=f"Port {port} of 127.0.0.1, wanted for the scheduler, is in use"):
            world.cluster(client_port=port)
    assert world.left() == []


@contextmanager
def running(command, **options):
    """A process that is killed at the end, whatever happened; its lines come as they are written."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process, text):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"{text!r} was never written:\n{''.join(lines)}")


WORK = """
import os, sys
from distributed import Client
client = Client(os.environ["DASK_SCHEDULER_ADDRESS"])
import dask, meshcompute
assert dask.config.get("meshcompute.propagate") is True
print("workers", len(client.nthreads()), flush=True)
client.close()
sys.exit(7)
"""


def test_the_script_runs_a_command_and_ends_with_its_exit_code(world):
    done = subprocess.run(
        world.command("--", sys.executable, "-c", WORK), capture_output=True, text=True, timeout=90, check=False
    )
    assert (done.returncode, done.stdout) == (7, "workers 2\n"), done.stderr
    assert "everything is taken down" in done.stderr
    assert world.left() == []


def test_a_signal_ends_the_command_and_takes_everything_down(world):
    sleep = f"{shlex.quote(sys.executable)} -c 'import time; print(\"working\", flush=True); time.sleep(600)'"
    with running(world.command("--", "sh", "-c", f"exec {sleep}")) as process:
        read_until(process, "working")
        process.send_signal(signal.SIGTERM)
        said = process.stdout.read()
        assert process.wait(60) == 128 + signal.SIGTERM
    assert "everything is taken down" in said
    assert world.left() == []


def test_ctrl_c_while_it_boots_takes_down_what_there_is(world):
    with running(world.command()) as process:
        read_until(process, "the sites are ready")
        process.send_signal(signal.SIGINT)
        said = process.stdout.read()
        assert process.wait(60) == 128 + signal.SIGINT, said
    assert "removed in" in said
    assert "everything is taken down" in said
    assert world.left() == []


def test_a_client_that_was_killed_leaves_nothing_after_its_lease(world, runtime_folder):
    with running(world.command()) as process:
        read_until(process, "Ctrl-C takes it down")
        assert world.left()
        process.kill()
        process.wait()
    world.wait_nothing_left(30)
    assert len(records()) == 1  # nobody could remove it; whoever looks next does
    deadline = time.monotonic() + 30
    while records():
        assert time.monotonic() < deadline
        shown = describe(records()[0])
        assert "kept by nobody" in shown


def test_a_detached_cluster_is_shown_read_and_ended_by_other_commands(world):
    def meshcompute_command(*arguments):
        command = [sys.executable, "-m", "meshcompute.mesh.clustercli", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)

    started = subprocess.run(
        world.command("--detach", "--name", "apart"), capture_output=True, text=True, timeout=90, check=False
    )
    assert started.returncode == 0, started.stderr
    assert "ready: 2 workers" in started.stderr
    try:
        shown = meshcompute_command("status").stdout
        assert re.search(r"apart .* kept by process \d+", shown)
        assert shown.count("1 of 1 workers run") == 2
        assert "Start worker" in meshcompute_command("logs", "eumetsat", "eumetsat-2-0").stdout
        assert "--- scheduler" in meshcompute_command("logs", "scheduler").stdout
        wrong = meshcompute_command("logs", "nowhere")
        assert (wrong.returncode, "it has scheduler, ecmwf, eumetsat" in wrong.stderr) == (1, True)
        with MeshCluster.from_name("apart") as attached, Client(attached) as client:
            assert client.submit(_import_nothing).result(30) == 1
    finally:
        ended = meshcompute_command("down", "apart")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("removed in") == 3
    assert world.left() == []
    assert meshcompute_command("down").returncode == 1


def test_a_cluster_that_was_ended_at_its_scheduler_ends_itself(world):
    from meshcompute.mesh.control import SiteControl
    from meshcompute.mesh.sites import parse_site
    from meshcompute.protocol import MAX_EPOCH

    cluster = world.cluster([world.sites[0]], workers=ONE)

    async def end_there():
        site = SiteControl(parse_site(world.scheduler))
        try:
            await site.call(lambda client: client.delete(cluster.mesh.plan.cluster_id, MAX_EPOCH))
        finally:
            await site.close()

    asyncio.run(end_there())
    _wait_until(lambda: cluster.status.name == "closed")
    assert any("the scheduler is gone: ending the rest" in line for line in world.said)
    cluster.close()
    assert world.left() == []
