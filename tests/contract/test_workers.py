"""What every worker runtime promises, for each of them: real processes, a real scheduler, a real engine.

The process runtime needs nothing. The Docker runtime needs root, an engine and an image; ``tests/workerbench.py``
starts an engine of its own in namespaces of its own, which end with this process.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
from workerbench import DockerBench, ProcessBench, client_of

from controlplane.errors import RuntimeUnknownError
from controlplane.workers.base import (
    FolderError,
    ImageError,
    PortTakenError,
    UnitStartError,
    UnitUnknownError,
    WorkerSpec,
)
from controlplane.workers.docker import DockerRuntime
from controlplane.workers.processes import is_alive, read_record
from docker import DockerClient

BENCHES = {"process": ProcessBench, "docker": DockerBench}

only_process = pytest.mark.parametrize("bench", ["process"], indirect=True)
only_docker = pytest.mark.parametrize("bench", ["docker"], indirect=True)


@pytest.fixture(scope="module", params=["process", "docker"])
def bench(request, tmp_path_factory, need):
    """A runtime with a scheduler in a unit of its own, and a client."""
    if request.param == "docker":
        need("root", os.geteuid() == 0)
        need("a container engine", shutil.which("dockerd"), "apt-get install docker.io")
        archive = os.environ.get("MESHCOMPUTE_WORKER_IMAGE", "")
        cure = "scripts/build-image.sh --own-engine --base debootstrap --save FILE; MESHCOMPUTE_WORKER_IMAGE=FILE"
        need("the archive of the worker image", Path(archive).is_file(), cure)
    folder = tmp_path_factory.mktemp("bench")
    with BENCHES[request.param](folder) as bench:
        yield bench


@pytest.fixture(scope="module")
def unit(bench):
    """A unit of two workers that the tests of this file share, where they do not end it."""
    spec = bench.spec("shared", processes=(0, 1))
    bench.do(bench.runtime.start(spec))
    bench.attach(spec)
    return spec


def test_a_spec_says_at_once_what_cannot_be(bench):
    with pytest.raises(ValueError, match="no name for a worker"):
        bench.spec("../elsewhere")
    with pytest.raises(ValueError, match="different names"):
        bench.spec("unit", processes=(0, 0))
    with pytest.raises(ValueError, match="where their scheduler is"):
        replace(bench.spec("unit"), scheduler_address=None)
    with pytest.raises(ValueError, match="absolute"):
        replace(bench.spec("unit"), data_folders=("data",))


def test_the_processes_of_a_unit_register_with_their_names_and_their_pool(bench, unit):
    workers = bench.wait_for_workers(*unit.process_names)
    for name in unit.process_names:
        assert workers[name]["resources"] == {f"pool-{bench.pool}": 1}
        assert workers[name]["nthreads"] == unit.threads_per_process
        assert workers[name]["memory_limit"] == unit.memory_bytes_per_process
        assert bench.on(name, lambda: os.environ["POOL_NAME"]) == bench.pool


def test_a_unit_that_runs_is_observed_and_starting_it_again_changes_nothing(bench, unit):
    before = bench.do(bench.runtime.observe())[unit.name]
    assert (before.state, before.cluster_id, before.name) == ("running", unit.cluster_id, unit.name)
    assert before.netns
    assert bench.do(bench.runtime.start(unit)) == before


def test_a_new_runtime_object_finds_what_runs(bench, unit):
    bench.wait_for_workers(*unit.process_names)
    adopted = bench.opened(bench.new_runtime())
    assert bench.do(adopted.observe())[unit.name] == bench.do(bench.runtime.observe())[unit.name]
    bench.do(adopted.renew(unit.name, 60))


def test_a_worker_that_is_killed_is_replaced(bench, unit):
    name = unit.process_names[0]
    address = bench.wait_for_workers(name)[name]["address"]
    [pid] = bench.pids(name)
    os.kill(pid, signal.SIGKILL)
    bench.wait(lambda: bench.workers().get(name, {"address": address})["address"] != address, f"another {name}")
    assert bench.on(name, lambda: "it works") == "it works"
    assert f"keeper | {name} ended by signal 9" in bench.do(bench.runtime.logs(unit.name, 1000))


def test_processes_have_no_capability_and_cannot_get_any(bench, unit):
    bench.wait_for_workers(*unit.process_names)
    for name in unit.process_names:
        [pid] = bench.pids(name)
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        assert status["NoNewPrivs"] == "1"
        if bench.kind == "docker":
            assert {status[kind] for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
        assert status["Uid"].split() == [str(unit.uid)] * 4
        assert status["Gid"].split() == [str(unit.gid)] * 4


def test_the_versions_of_packages_are_those_that_workers_have(bench, unit):
    told = bench.do(bench.runtime.packages(None))
    assert {"python", "dask", "distributed", "numpy", "meshcompute"} <= set(told)
    names = set(told) - {"python"}

    def versions():
        import importlib.metadata
        import platform

        return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}

    assert bench.on(unit.process_names[0], versions) == told
    assert bench.do(bench.opened(bench.new_runtime()).packages(None)) == told


@only_docker
def test_an_image_is_asked_for_its_packages_by_a_container_of_which_nothing_is_left(bench):
    def names():
        with contextlib.closing(DockerClient(base_url=bench.base_url)) as engine:
            return {container.name for container in engine.containers.list(all=True)}

    before = names()
    assert bench.do(bench.opened(bench.new_runtime()).packages(None))["dask"]
    assert names() == before
    with pytest.raises(ImageError, match="no-such-image"):
        bench.do(bench.runtime.packages("no-such-image:1"))


@only_docker
def test_a_data_folder_that_is_not_mounted_is_named(bench):
    spec = replace(bench.spec("folderless"), data_folders=("/data/not-mounted",))
    with pytest.raises(FolderError, match=r"/data/not-mounted .*workers\.data_folders"):
        bench.do(bench.runtime.start(spec))
    assert spec.name not in bench.do(bench.runtime.observe())


def test_data_can_be_read_at_its_own_path_and_not_be_written(bench, unit):
    path = f"{unit.data_folders[0]}/field.txt"

    def write():
        try:
            Path(path).write_text("changed")
        except OSError as error:
            return error.strerror
        return "written"

    bench.wait_for_workers(unit.process_names[0])
    assert bench.on(unit.process_names[0], lambda: Path(path).read_text()) == "data of a"
    assert bench.on(unit.process_names[0], write) == "Read-only file system"


def test_logs_say_which_process_wrote_what(bench, unit):
    first, second = unit.process_names
    bench.wait_for_workers(first, second)
    text = bench.do(bench.runtime.logs(unit.name, 1000))
    assert {line.split(" | ")[0] for line in text.splitlines()} >= {first, second}
    alone = bench.do(bench.runtime.logs(unit.name, 5, process=second)).splitlines()
    assert 0 < len(alone) <= 5
    assert all(line.startswith(f"{second} | ") for line in alone)


def test_what_nobody_started_is_unknown_and_stopping_it_is_fine(bench):
    with pytest.raises(UnitUnknownError, match="'nobody'"):
        bench.do(bench.runtime.logs("nobody", 5))
    with pytest.raises(UnitUnknownError, match="'nobody'"):
        bench.do(bench.runtime.renew("nobody", 5))
    bench.do(bench.runtime.stop("nobody", 1))


def test_stopping_leaves_nothing_though_a_worker_does_not_end_and_a_task_left_a_process(bench):
    spec = bench.spec("stubborn", processes=(8, 9))
    bench.do(bench.runtime.start(spec))
    bench.attach(spec)
    bench.wait_for_workers(*spec.process_names)
    marker = f"outlives-{os.getpid()}"

    def leave_a_process():
        subprocess.Popen(["sh", "-c", "sleep 600; exit", marker], start_new_session=True)

    bench.on(bench.worker(8), leave_a_process)
    bench.wait(lambda: bench.pids(marker), "the task's own process")
    [stopped] = bench.pids(bench.worker(9))
    os.kill(stopped, signal.SIGSTOP)  # it will never take note of a SIGTERM
    started = time.monotonic()
    bench.do(bench.runtime.stop(spec.name, 1))
    assert time.monotonic() - started < 20
    bench.wait(lambda: not bench.pids(*spec.process_names, marker), "the end of all processes")
    assert spec.name not in bench.do(bench.runtime.observe())
    assert bench.leftovers(spec.name) == []


def test_a_unit_that_is_not_renewed_ends_though_nobody_asks_and_is_replaced_when_asked_for(bench):
    spec = bench.spec("short", processes=(7,))
    bench.do(bench.runtime.start(spec))
    bench.attach(spec)
    until = time.monotonic() + 4.0
    bench.do(bench.runtime.renew(spec.name, 4.0))
    bench.wait(lambda: bench.pids(bench.worker(7)), "the worker's process")
    bench.wait(lambda: not bench.pids(bench.worker(7)), "the end of the worker")
    assert time.monotonic() > until
    bench.wait(lambda: bench.do(bench.runtime.observe())[spec.name].state == "exited", "the end of the unit")
    state = bench.do(bench.opened(bench.new_runtime()).observe())[spec.name]
    assert state.exit_code in {3, None}
    assert bench.do(bench.runtime.start(spec)).state in {"starting", "running"}
    bench.do(bench.runtime.stop(spec.name, 1))


def test_what_is_inside_dies_with_its_keeper(bench):
    spec = bench.spec("headless", processes=(6,))
    bench.do(bench.runtime.start(spec))
    bench.attach(spec)
    bench.wait_for_workers(bench.worker(6))
    for pid in bench.keepers(spec.name):
        os.kill(pid, signal.SIGKILL)
    bench.wait(lambda: not bench.pids(bench.worker(6)), "the end of the worker")
    bench.wait(lambda: bench.do(bench.runtime.observe())[spec.name].state == "exited", "the end of the unit")
    bench.do(bench.runtime.stop(spec.name, 1))


def test_a_scheduler_is_reached_at_localhost_and_goes_when_it_is_stopped(bench):
    port = bench.client_port
    identity = bench.client.sync(bench.client.scheduler.identity)
    assert identity["type"] == "Scheduler"
    with socket.create_connection(("127.0.0.1", bench.dashboard_port), timeout=10):
        pass
    second = replace(bench.scheduler, name="second", process_names=("scheduler-2",))
    with pytest.raises(PortTakenError, match=f"127.0.0.1:{port}"):
        bench.do(bench.runtime.start(second))
    assert "second" not in bench.do(bench.runtime.observe())


@only_process
def test_units_outlive_a_daemon_that_is_killed_but_not_their_lease(bench):
    code = f"""
        import asyncio, os, signal
        from dataclasses import replace
        from controlplane.workers.base import WorkerSpec
        from controlplane.workers.process import ProcessRuntime
        runtime = ProcessRuntime({str(bench.runtime.folder.path)!r})
        asyncio.run(runtime.start({bench.spec("orphan", processes=(5,))!r}))
        asyncio.run(runtime.renew("orphan", 5.0))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    daemon = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False, timeout=60)
    assert daemon.returncode == -signal.SIGKILL
    assert bench.do(bench.runtime.observe())["orphan"].state == "running"
    bench.wait(lambda: bench.pids(bench.worker(5)), "the worker's process")
    bench.wait(lambda: not bench.pids(bench.worker(5)), "the end of the worker")
    bench.wait(lambda: bench.do(bench.runtime.observe())["orphan"].state == "exited", "the end of the unit")
    bench.do(bench.runtime.stop("orphan", 1))
    assert bench.leftovers("orphan") == []


@only_process
def test_what_is_inside_dies_with_the_process_that_stands_for_the_unit(bench):
    spec = bench.spec("beheaded", processes=(4,))
    state = bench.do(bench.runtime.start(spec))
    bench.wait(lambda: bench.pids(*spec.process_names), "the worker's process")
    os.kill(state.pid, signal.SIGKILL)
    bench.wait(lambda: not bench.pids(*spec.process_names), "the end of the worker")
    assert bench.do(bench.runtime.observe())[spec.name].state == "exited"
    bench.do(bench.runtime.stop(spec.name, 1))
    assert bench.leftovers(spec.name) == []


@only_process
def test_a_process_sees_nothing_in_the_folders_of_other_sites(bench, unit):
    bench.wait_for_workers(unit.process_names[0])
    hidden = bench.hidden
    assert Path(hidden, "secret.txt").read_text() == "data of b"
    assert bench.on(unit.process_names[0], lambda: list(Path(hidden).iterdir())) == []


def test_a_spec_goes_through_its_folder_unchanged(bench, unit):
    assert bench.runtime.folder.spec(unit.name) == unit
    assert isinstance(bench.runtime.folder.spec(unit.name), WorkerSpec)


@only_docker
def test_a_container_can_write_its_scratch_folder_and_nothing_else(bench, unit):
    def try_to_write():
        found = {}
        for folder in ("/", "/etc", "/opt/meshcompute", "/run/meshcompute", "/scratch", "/tmp"):
            try:
                Path(folder, "file").write_text("")
                found[folder] = "written"
            except OSError as error:
                found[folder] = error.strerror
        return found

    assert bench.on(unit.process_names[0], try_to_write) == {
        "/": "Read-only file system",
        "/etc": "Read-only file system",
        "/opt/meshcompute": "Read-only file system",
        "/run/meshcompute": "Read-only file system",
        "/scratch": "written",
        "/tmp": "written",
    }


@only_docker
def test_a_container_knows_the_names_of_its_spec(bench, unit):
    (name, address), *_ = unit.hosts

    def look_up():
        return {entry[4][0] for entry in socket.getaddrinfo(name, 9000, type=socket.SOCK_STREAM)}

    assert bench.on(unit.process_names[0], look_up) == {str(address)}


@only_docker
def test_a_container_has_the_rights_and_the_limits_of_its_spec(bench, unit):
    def look():
        groups = os.getgroups()
        scratch = os.statvfs("/scratch")
        links = sorted(path.name for path in Path("/sys/class/net").iterdir())
        memory = Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
        memory = memory if memory.exists() else Path("/sys/fs/cgroup/memory.max")
        return groups, scratch.f_blocks * scratch.f_frsize, links, int(memory.read_text())

    groups, scratch_nbytes, links, memory_nbytes = bench.on(unit.process_names[0], look)
    shares = unit.memory_bytes_per_process * len(unit.process_names)
    assert set(groups) == {unit.gid, *unit.groups}
    assert scratch_nbytes < shares
    assert links == ["lo", "mesh0"]
    assert shares + scratch_nbytes <= memory_nbytes < 2 * shares + scratch_nbytes
    with client_of(bench.base_url) as engine:
        host = engine.containers.get(unit.name).attrs["HostConfig"]
    assert host["CpuQuota"] == host["CpuPeriod"] * unit.threads_per_process * len(unit.process_names)
    assert host["MemorySwap"] == host["Memory"] == memory_nbytes
    assert host["RestartPolicy"]["Name"] == "no"
    assert host["NetworkMode"] == "none"
    assert host["Init"]


@only_docker
def test_workers_listen_nowhere_but_on_the_data_plane_and_their_own_localhost(bench, unit):
    def listening():
        found = set()
        for table in ("tcp", "tcp6", "udp", "udp6"):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                _, local, _, state = line.split()[:4]
                if state == "0A" or table.startswith("udp"):
                    words = bytes.fromhex(local.split(":")[0])
                    found.add(b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4)))
        return found

    found = bench.on(unit.process_names[0], listening)
    assert found == {unit.address.packed, bytes([127, 0, 0, 1])}


@only_docker
def test_an_image_that_is_not_here_is_named(bench):
    bench.do(bench.runtime.check_image(None))
    with pytest.raises(ImageError, match="nobody/nothing:1"):
        bench.do(bench.runtime.check_image("nobody/nothing:1"))
    with pytest.raises(ImageError, match="nobody/nothing:1"):
        bench.do(bench.runtime.start(replace(bench.spec("imageless", processes=(4,)), image="nobody/nothing:1")))
    assert "imageless" not in bench.do(bench.runtime.observe())


@only_docker
def test_what_the_engine_refuses_is_an_error_that_says_why_and_leaves_nothing(bench):
    with tempfile.TemporaryDirectory(dir="/run") as folder:  # this engine has a /run of its own
        spec = replace(bench.spec("impossible", processes=(4,)), data_folders=(folder,))
        with pytest.raises(UnitStartError, match=folder):
            bench.do(bench.runtime.start(spec))
    assert bench.leftovers("impossible") == []


@only_docker
def test_a_unit_may_have_more_threads_than_the_host_has_processors(bench):
    spec = replace(bench.spec("wide", processes=(4,)), threads_per_process=4 * os.cpu_count())
    assert bench.do(bench.runtime.start(spec)).state == "running"
    bench.do(bench.runtime.stop(spec.name, 1))


@only_docker
def test_a_container_that_a_crash_left_without_starting_it_is_no_unit_that_runs(bench):
    spec = bench.spec("halfway", processes=(4,))
    bench.do(bench.runtime.start(spec))
    with client_of(bench.base_url) as engine:
        labels = engine.containers.get(spec.name).labels
        engine.containers.get(spec.name).remove(force=True)
        assert bench.do(bench.runtime.observe())[spec.name].state == "exited"
        engine.containers.create(bench.runtime.image, name=spec.name, labels=labels)
    assert bench.do(bench.runtime.observe())[spec.name].state == "exited"
    assert bench.do(bench.runtime.start(spec)).state == "running"
    bench.do(bench.runtime.stop(spec.name, 1))
    assert bench.leftovers(spec.name) == []


@only_docker
def test_containers_of_others_are_neither_seen_nor_touched(bench, unit, tmp_path):
    other = bench.opened(DockerRuntime(tmp_path, base_url=bench.base_url))
    assert bench.do(other.observe()) == {}
    with pytest.raises(UnitStartError, match="not one of this daemon's"):
        bench.do(other.stop(unit.name, 1))
    with pytest.raises(UnitStartError, match="not one of this daemon's"):
        bench.do(other.start(unit))
    assert bench.do(bench.runtime.observe())[unit.name].state == "running"


@only_docker
def test_a_relay_that_was_killed_comes_back_with_the_next_renewal(bench):
    spec = bench.second_scheduler()
    bench.do(bench.runtime.start(spec))
    record = read_record(bench.runtime.folder.folder(spec.name) / "relay.json")
    os.kill(record.pid, signal.SIGKILL)
    bench.wait(lambda: not is_alive(record), "the end of the relay")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", spec.client_port), timeout=10)
    bench.do(bench.opened(bench.new_runtime()).renew(spec.name, 120))
    with socket.create_connection(("127.0.0.1", spec.client_port), timeout=10):
        pass
    bench.do(bench.runtime.stop(spec.name, 1))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", spec.client_port), timeout=10)


@only_docker
def test_an_engine_that_does_not_answer_means_unknown_and_deadlines_hold_without_it(bench, tmp_path):
    spec = bench.spec("abandoned", processes=(4,))
    bench.do(bench.runtime.start(spec))
    bench.attach(spec)
    bench.wait_for_workers(*spec.process_names)
    impatient = bench.opened(bench.new_runtime(timeout_seconds=1))
    assert spec.name in bench.do(impatient.observe())
    os.kill(bench.engine, signal.SIGSTOP)
    try:
        with pytest.raises(RuntimeUnknownError, match="does not answer"):
            bench.do(impatient.observe())
        with pytest.raises(RuntimeUnknownError, match="does not answer"):
            bench.do(impatient.stop(spec.name, 1))  # cannot be carried out, but the lease is withdrawn
        bench.wait(lambda: not bench.pids(*spec.process_names), "the end of the worker", has_engine=False)
    finally:
        os.kill(bench.engine, signal.SIGCONT)
    bench.wait(lambda: bench.do(bench.runtime.observe())[spec.name].state == "exited", "the end of the unit")
    bench.do(bench.runtime.stop(spec.name, 1))
    gone = bench.opened(DockerRuntime(tmp_path, base_url=f"unix://{tmp_path}/nobody.sock"))
    with pytest.raises(RuntimeUnknownError, match=r"nobody\.sock"):
        bench.do(gone.observe())
