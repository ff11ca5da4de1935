"""Units as containers of this host's Docker engine.

Covers what a container is like and what it may do, starting, adopting and ending containers, and the relay that makes
a scheduler's ports reachable at localhost. Does not cover the network: a container starts with none, and its link is
attached to its namespace from outside (:mod:`..network`). ::

    container "<unit>"   uid of the caller, no capability, read-only root, no network but the cluster's
        docker-init ──► keeper ──► dask worker a-1-0, a-1-1 …
        /run/meshcompute   the unit's folder, read-only: keeper, plan and lease
        /scratch, /tmp     tmpfs, bounded; what is in them counts as memory of the container
        /data/…            as on this host, read-only
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import requests
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.types import LogConfig, Mount

import docker
from controlplane.workers import entrypoint, locallistener, nursery
from controlplane.workers.base import (
    FolderError,
    ImageError,
    RuntimeUnknownError,
    UnitStartError,
    WorkerSpec,
    WorkerState,
)
from controlplane.workers.commands import (
    plan_unit,
    reason_of,
    spill_bytes_of,
)
from controlplane.workers.inventory import inventory_command, parse_inventory
from controlplane.workers.namespaces import submounts_of
from controlplane.workers.ports import listen_locally
from controlplane.workers.relays import Relays
from controlplane.workers.runfolder import RunFolder, unknown_unit

__all__ = ["DockerRuntime", "container_options"]

GIVEN = "/run/meshcompute"  # the unit's folder, as the container sees it
SCRATCH = "/scratch"
GRACE_SECONDS = 5.0  # at the end of a lease; stop() says its own
TMP_BYTES = 64 << 20
KEEPER_BYTES = 64 << 20  # the keeper and docker-init, and the kernel's own memory for them
# TCP doubles its pauses up to 2 minutes, so that a link of 60 s that is back would stay silent for up to a minute more.
# 5 s are short enough; with as many more retries a connection still gives up after the usual quarter of an hour.
AFTER_A_PARTITION = {"net.ipv4.tcp_rto_max_ms": "5000", "net.ipv4.tcp_retries2": "190"}
CPU_PERIOD_MICROSECONDS = 100_000  # the kernel's own default
PROCESSES_PER_WORKER = 256  # threads count, too: Dask's own, those of NumPy's libraries, and what tasks start
NOBODY = "65534:65534"
INVENTORY_BYTES, INVENTORY_PROCESSES = 256 << 20, 16
ENGINE_TIMEOUT_SECONDS = 30.0
RTO_MAX = Path("/proc/sys/net/ipv4/tcp_rto_max_ms")
LABEL_CLUSTER, LABEL_NAME, LABEL_OWNER = "meshcompute.cluster", "meshcompute.name", "meshcompute.owner"
LABEL_FOLDER = "meshcompute.folder"  # whose it is: two daemons at one engine leave each other's alone

logger = logging.getLogger(__name__)


def container_options(
    spec: WorkerSpec, *, given: str, folder: str, image: str, mounts: tuple[str, ...], has_rto_max: bool = False
) -> dict[str, Any]:
    """Decide what the container of a unit is like. Pure.

    Parameters
    ----------
    spec
        The unit.
    given
        Folder of this host with what the container gets to read.
    folder
        Folder of the runtime, which its containers are known by.
    image
        Image to use.
    mounts
        Folders of this host that it sees, at the same paths.
    has_rto_max
        Whether the kernel bounds TCP's pauses between retransmissions (Linux 6.15).

    Returns
    -------
    dict
        Arguments of the Docker library's ``containers.create``.
    """
    number = len(spec.process_names)
    spill = spill_bytes_of(spec) * number + TMP_BYTES
    memory = spec.memory_bytes_per_process * number + spill + TMP_BYTES + KEEPER_BYTES
    owned = f"uid={spec.uid},gid={spec.gid},mode=0700"
    return {
        "image": image,
        "name": spec.name,
        "hostname": spec.name,
        "entrypoint": ["python3", "-I", f"{GIVEN}/entrypoint.py"],
        "command": [GIVEN],
        "init": True,
        "restart_policy": {"Name": "no"},  # a container that starts again has lost its link
        "user": f"{spec.uid}:{spec.gid}",
        "group_add": [str(group) for group in spec.groups],
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "network_mode": "none",
        "extra_hosts": {name: str(address) for name, address in spec.hosts},
        # Without a network Docker switches IPv6 off, and the link that comes later could have no address.
        "sysctls": {
            "net.ipv6.conf.all.disable_ipv6": "0",
            "net.ipv6.conf.default.disable_ipv6": "0",
            **(AFTER_A_PARTITION if has_rto_max else {}),
        },
        "mem_limit": memory,
        "memswap_limit": memory,
        # Not as nano_cpus: the engine refuses more of those than the host has, though a limit above that does no harm.
        "cpu_period": CPU_PERIOD_MICROSECONDS,
        "cpu_quota": CPU_PERIOD_MICROSECONDS * spec.threads_per_process * number,
        "pids_limit": PROCESSES_PER_WORKER * number,
        "tmpfs": {SCRATCH: f"size={spill},{owned}", "/tmp": f"size={TMP_BYTES},mode=1777"},  # noqa: S108 - its own
        "mounts": [
            Mount(GIVEN, given, type="bind", read_only=True, propagation="rprivate"),
            *(Mount(path, path, type="bind", read_only=True, propagation="rprivate") for path in mounts),
        ],
        "environment": {"HOME": SCRATCH},
        "labels": {
            LABEL_CLUSTER: spec.cluster_id,
            LABEL_NAME: spec.name,
            LABEL_OWNER: spec.owner,
            LABEL_FOLDER: folder,
        },
        "log_config": LogConfig(type="json-file", config={"max-size": "8m", "max-file": "2"}),
    }


def inventory_options(image: str, name: str) -> dict[str, Any]:
    """Decide what the container is like that tells the versions of an image's packages. Pure.

    Parameters
    ----------
    image
        The image.
    name
        Of the container.

    Returns
    -------
    dict
        Arguments of the Docker library's ``containers.create``.
    """
    entrypoint, *command = inventory_command("python3")
    return {
        "image": image,
        "name": name,
        "entrypoint": [entrypoint],
        "command": command,
        "user": NOBODY,
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "network_mode": "none",
        "mem_limit": INVENTORY_BYTES,
        "pids_limit": INVENTORY_PROCESSES,
    }


class DockerRuntime:
    """Start units as containers.

    Parameters
    ----------
    folder
        Where the units have their folders, which containers see in part. Whoever can write it can end them.
    base_url
        The engine's socket. Who may use it is as powerful as root.
    image
        The image of units that name none.
    proc
        Where the engine's /proc is seen, if its process numbers are not those of this process.
    timeout_seconds
        How long the engine may take to answer.
    monotonic
        Reads CLOCK_MONOTONIC, in seconds.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        base_url: str = "unix:///var/run/docker.sock",
        image: str = "meshcompute-worker:latest",
        proc: str = "/proc",
        timeout_seconds: float = ENGINE_TIMEOUT_SECONDS,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = RunFolder(Path(folder).absolute(), monotonic)
        self.timeout_seconds = timeout_seconds
        self.base_url = base_url
        self.image = image
        self.proc = proc
        self._client: Any = None
        self._starting: set[str] = set()
        self._packages_by_image: dict[str, dict[str, str]] = {}
        self._relays = Relays(self.folder, monotonic)

    async def observe(self) -> dict[str, WorkerState]:
        """Look at all containers of this runtime; see :meth:`.WorkerRuntime.observe`."""
        return await asyncio.to_thread(self._observe)

    async def start(self, spec: WorkerSpec) -> WorkerState:
        """Start a container; see :meth:`.WorkerRuntime.start`."""
        self._starting.add(spec.name)
        try:
            return await asyncio.to_thread(self._start, spec)
        finally:
            self._starting.discard(spec.name)

    async def stop(self, name: str, grace_seconds: float) -> None:
        """End and remove a container; see :meth:`.WorkerRuntime.stop`."""
        await asyncio.to_thread(self._stop, name, grace_seconds)

    async def logs(self, name: str, lines: int, process: str | None = None) -> str:
        """Read the end of a container's log; see :meth:`.WorkerRuntime.logs`."""
        return await asyncio.to_thread(self._logs, name, lines, process)

    async def renew(self, name: str, deadline_seconds: float) -> None:
        """Give a container a new deadline, and a scheduler its relay back; see :meth:`.WorkerRuntime.renew`."""
        self.folder.renew(name, deadline_seconds)
        spec = self.folder.spec(name)
        if spec.role == "scheduler" and not self._relays.is_there(name):
            await asyncio.to_thread(self._mend_relay, spec)

    async def check_image(self, image: str | None) -> None:
        """Look for an image at the engine; see :meth:`.WorkerRuntime.check_image`."""
        await asyncio.to_thread(self._check_image, image or self.image)

    async def packages(self, image: str | None) -> dict[str, str]:
        """Ask an image, once, by a container that only prints; see :meth:`.WorkerRuntime.packages`."""
        return await asyncio.to_thread(self._packages, image or self.image)

    async def close(self) -> None:
        """Close the connections to the engine; see :meth:`.WorkerRuntime.close`."""
        self._relays.disown()
        client, self._client = self._client, None
        if client is not None:
            client.close()

    # How

    @contextmanager
    def _engine(self) -> Iterator[Any]:
        """Lend the engine's client; whatever says that the engine does not answer becomes one error."""
        try:
            if self._client is None:
                _probe(self.base_url)
                client = docker.DockerClient(base_url=self.base_url, timeout=self.timeout_seconds)
                self._client = client
            yield self._client
        except (ImageNotFound, NotFound, APIError) as exc:
            if not isinstance(exc, (ImageNotFound, NotFound)) and exc.is_server_error() and _is_engine_ending(exc):
                raise self._unknown(exc) from exc
            raise
        except (DockerException, requests.exceptions.RequestException, OSError) as exc:
            raise self._unknown(exc) from exc

    def _unknown(self, cause: Exception) -> RuntimeUnknownError:
        return RuntimeUnknownError(
            f"The container engine at {self.base_url} does not answer ({cause}), so nobody knows which workers run: "
            "start it (systemctl start docker), or correct its socket in site.toml."
        )

    def _observe(self) -> dict[str, WorkerState]:
        # Before the containers: a unit that is ready in between has a container, and is no leftover.
        folders = [name for name in self.folder.names() if name not in self._starting]
        with self._engine() as engine:
            found = engine.containers.list(
                all=True, filters={"label": f"{LABEL_FOLDER}={self.folder.path}"}, ignore_removed=True
            )
        states = {container.name: self._state(container) for container in found}
        for name in folders:
            if name not in states and name in self.folder.names():
                spec = self.folder.spec(name)
                message = "it was started only in part, or its container was removed"
                states[name] = WorkerState(
                    cluster_id=spec.cluster_id,
                    name=name,
                    state="exited",
                    message=message,
                    has_run=self._relays.record(name) is not None,  # only a scheduler has one, once it runs
                )
        return states

    def _state(self, container: Any) -> WorkerState:
        state = container.attrs["State"]
        about = {"cluster_id": container.labels.get(LABEL_CLUSTER, ""), "name": container.name}
        if state["Status"] == "created":
            if container.name in self._starting:
                return WorkerState(**about, state="starting")
            return WorkerState(**about, state="exited", message="it was started only in part")
        if not state["Running"] or not state["Pid"]:
            message = "its memory was not enough" if state.get("OOMKilled") else reason_of(state["ExitCode"])
            return WorkerState(**about, state="exited", exit_code=state["ExitCode"], message=message, has_run=True)
        return WorkerState(**about, state="running", pid=state["Pid"], netns=f"{self.proc}/{state['Pid']}/ns/net")

    def _start(self, spec: WorkerSpec) -> WorkerState:
        image = spec.image or self.image
        with self._engine() as engine:
            with suppress(NotFound):
                found = engine.containers.get(spec.name)
                self._check_owner(found)
                state = self._state(found)
                if state.state == "running":
                    return state
                self._remove(spec.name, 0)
            self._check_image(image)
            _check_folders(spec)
            listeners = listen_locally(spec) if spec.role == "scheduler" else []
            try:
                self._give(spec)
                mounts = tuple(path + mount for path in spec.data_folders for mount in ("", *submounts_of(path)))
                options = container_options(
                    spec,
                    given=str(self.folder.given(spec.name)),
                    folder=str(self.folder.path),
                    image=image,
                    mounts=mounts,
                    has_rto_max=RTO_MAX.exists(),
                )
                container = engine.containers.create(**options)
                container.start()
                container.reload()
                state = self._state(container)
                if listeners and state.pid is not None:
                    self._relays.start(spec, listeners, f"{self.proc}/{state.pid}")
            except APIError as exc:
                with suppress(RuntimeUnknownError):
                    self._stop(spec.name, 0)
                raise UnitStartError(
                    f"The engine refused to start container {spec.name!r} of image {image}: {exc.explanation or exc}. "
                    "Correct what it names (meshcompute-site check examines this host)."
                ) from exc
            finally:
                for listener in listeners:
                    listener.close()
        logger.info("started a container name=%s pid=%s processes=%d", spec.name, state.pid, len(spec.process_names))
        return state

    def _give(self, spec: WorkerSpec) -> None:
        """Fill the folder that the container sees; what runs in it comes along, so that any image with Dask will do."""
        listener = f"{GIVEN}/locallistener.py" if spec.role == "scheduler" and spec.address is not None else None
        plan = plan_unit(
            spec,
            python="python3",
            scratch=SCRATCH,
            grace_seconds=GRACE_SECONDS,
            nursery=f"{GIVEN}/nursery.py",
            listener=listener,
        )
        try:
            self.folder.create(spec, plan)
            for module in (entrypoint, nursery, locallistener):
                copy = self.folder.given(spec.name) / Path(str(module.__file__)).name
                shutil.copyfile(str(module.__file__), copy)
                copy.chmod(0o644)
        except OSError as exc:
            raise UnitStartError(
                f"The folder of container {spec.name!r} cannot be written: {exc}. Mend it, it is tried again."
            ) from exc

    def _stop(self, name: str, grace_seconds: float) -> None:
        self.folder.end(name, grace_seconds)  # first: it works without an engine, too
        with self._engine():
            self._remove(name, grace_seconds)
        self._relays.end(name)
        self.folder.remove(name)

    def _remove(self, name: str, grace_seconds: float) -> None:
        with self._engine() as engine, suppress(NotFound):
            container = engine.containers.get(name)
            self._check_owner(container)
            if container.attrs["State"]["Running"]:
                container.stop(timeout=int(grace_seconds) + 1)  # the keeper takes the grace, then the engine kills all
            container.remove(force=True, v=True)

    def _check_owner(self, container: Any) -> None:
        if container.labels.get(LABEL_FOLDER) != str(self.folder.path):
            raise UnitStartError(
                f"Container {container.name!r} is not one of this daemon's ({self.folder.path}), so it stays as it is: "
                "remove it (docker rm), or use another name."
            )

    def _logs(self, name: str, lines: int, process: str | None) -> str:
        with self._engine() as engine:
            try:
                text = engine.containers.get(name).logs(tail="all" if process else lines).decode(errors="replace")
            except NotFound:
                raise unknown_unit(name) from None
        wanted = [line for line in text.splitlines() if process is None or line.startswith(f"{process} | ")]
        return "".join(f"{line}\n" for line in wanted[-lines:])

    def _check_image(self, image: str) -> None:
        with self._engine() as engine:
            try:
                engine.images.get(image)
            except ImageNotFound:
                raise ImageError(
                    f"The image {image} is not at this site's engine: load it (docker load, docker pull), or build it "
                    f"with scripts/build-image.sh --tag {image}."
                ) from None

    def _packages(self, image: str) -> dict[str, str]:
        name = f"mc-packages-{hashlib.sha256(f'{self.folder.path} {image}'.encode()).hexdigest()[:8]}"
        with self._engine() as engine:
            self._check_image(image)
            image_id = engine.images.get(image).id
            if image_id in self._packages_by_image:
                return self._packages_by_image[image_id]
            _discard(engine, name)  # of a daemon that was killed in the midst of this
            try:
                container = engine.containers.create(**inventory_options(image_id, name))
                container.start()
                container.wait(timeout=self.timeout_seconds)
                found = parse_inventory(container.logs(stderr=False).decode(errors="replace"))
            except (APIError, ValueError) as exc:
                raise ImageError(
                    f"The image {image} does not say which packages it has ({exc}): it needs python3 3.11 or newer, "
                    "and Dask. Build it with scripts/build-image.sh."
                ) from exc
            finally:
                _discard(engine, name)
        self._packages_by_image[image_id] = found
        return found

    def _mend_relay(self, spec: WorkerSpec) -> None:
        with self._engine() as engine, suppress(NotFound):
            state = self._state(engine.containers.get(spec.name))
            if state.pid is not None:
                listeners = listen_locally(spec)
                try:
                    self._relays.start(spec, listeners, f"{self.proc}/{state.pid}")
                finally:
                    for listener in listeners:
                        listener.close()


def _discard(engine: Any, name: str) -> None:
    with suppress(NotFound):
        engine.containers.get(name).remove(force=True)


def _check_folders(spec: WorkerSpec) -> None:
    """Refuse a folder that is not here; the engine would say so, too, and be asked again and again."""
    for folder in spec.data_folders:
        if not Path(folder).is_dir():
            raise FolderError(
                f"The data folder {folder} is not at this site now: its operator has to mount it, or to take it out of "
                "workers.data_folders in site.toml."
            )


def _probe(base_url: str) -> None:
    """Fail where nobody listens; Docker's library would fail, too, and leave its socket open."""
    if base_url.startswith("unix://"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.connect(base_url.removeprefix("unix://"))


def _is_engine_ending(error: APIError) -> bool:
    return any(words in str(error) for words in ("shutting down", "containerd", "connection refused", "transport"))
