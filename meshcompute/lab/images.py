"""The image that the lab's workers run from, and a store of its layers that all engines of a lab share.

Covers building the image once (with ``scripts/build-image.sh``) or loading an archive of it, keeping it, and
forgetting those that nobody needs any more. Does not cover what is in the image.

A store is the data folder of a Docker engine that has ended. Every host's engine gets a copy of its index and the
layers themselves bind-mounted, read-only, which takes milliseconds where loading an image takes seconds per host::

    /var/cache/meshcompute/lab/
    ├── base.tar             the base image, so that only changes of ours have to be built again
    └── <key>/               one store; the key changes with our code, Python and the packages' versions
        ├── lock             shared by labs that use it (released by the kernel, whoever was killed)
        └── engine/          image/, overlay2/, …
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

from meshcompute.lab.errors import LabError, LabMissingError

__all__ = ["IMAGE", "open_image_store"]

IMAGE = "meshcompute-worker:latest"
CACHE = Path("/var/cache/meshcompute/lab")
PACKAGE = Path(__file__).parents[1]
STORES_KEPT = 1  # besides the one that is made: going back to it, and forth, should cost nothing
ENGINE_TIMEOUT_SECONDS = 60.0
POLL_SECONDS = 0.05
CGROUP = "/meshcompute-lab-images"
# Of the engine's folder, only these two are the images'; the rest belongs to containers, networks and builds.
_ENGINE = """\
mount -t tmpfs run /run
ip link set lo up
exec dockerd --host "unix://$1/docker.sock" --data-root "$1/engine" --exec-root /run/docker --pidfile /run/docker.pid \
    --bridge=none --iptables=false --ip6tables=false --storage-driver=overlay2 --cgroup-parent="$2" \
    >"$1/engine.log" 2>&1
"""


def open_image_store(archive: Path | None, *, say: Callable[[str], None], cache: Path = CACHE) -> tuple[Path, int]:
    """Find the store with the image, or make it.

    Parameters
    ----------
    archive
        What ``docker save`` has written; ``None``: build the image from this source tree.
    say
        Called with each line of progress.
    cache
        Where stores are kept.

    Returns
    -------
    store
        Data folder of an engine, complete and not used by any.
    lock
        File descriptor; while a process has it, nobody removes the store.

    Raises
    ------
    LabMissingError
        There is neither an archive nor a source tree to build from.
    LabError
        The image could not be built or loaded.
    """
    builder = None if archive is not None else _find_builder()
    key = _key_of_archive(archive) if archive is not None else _key_of_build(builder)
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / "building.lock", fcntl.LOCK_EX):  # one builds, the others wait for it
        folder = cache / key
        if not folder.exists():
            _forget_unused(cache)
            started = time.monotonic()
            new = cache / f"{key}.new"
            _remove(new)
            (new / "engine").mkdir(parents=True)
            try:
                with _engine(new) as environment:
                    if archive is not None:
                        say(f"loading {archive}")
                        _run(["docker", "load", "--input", str(archive)], environment)
                    else:
                        assert builder is not None
                        _build(builder, cache / "base.tar", environment, say)
                _strip(new)
                new.rename(folder)
            except BaseException:
                _remove(new)
                raise
            say(f"the image is ready ({time.monotonic() - started:.0f} s; kept in {folder})")
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_SH)
        os.utime(lock)
    return folder / "engine", lock


def _find_builder() -> Path:
    for top in (PACKAGE.parent, Path.cwd()):
        script = top / "scripts/build-image.sh"
        if script.is_file() and (top / "docker/worker.Dockerfile").is_file():
            return script
    raise LabMissingError(
        "The image of the workers is built from meshcompute's source tree, and this is not one. Run this in a clone "
        "of it, or name an archive made by docker save: --image FILE."
    )


def _key_of_archive(archive: Path) -> str:
    try:
        status = archive.stat()
    except OSError as exc:
        raise LabError(f"The archive of the image cannot be read: {archive}: {exc.strerror}.") from exc
    return _digest(f"{archive.resolve()} {status.st_size} {status.st_mtime_ns}".encode())


def _key_of_build(builder: Path | None) -> str:
    assert builder is not None
    top = builder.parents[1]
    files = [builder, top / "docker/worker.Dockerfile", top / "pyproject.toml"]
    for package in ("meshcompute", "controlplane"):
        files += sorted((top / package).rglob("*.py"))
    versions = sorted(f"{found.name}=={found.version}" for found in metadata.distributions())
    parts = [platform.python_version(), *versions, *(f"{file.relative_to(top)}" for file in files)]
    return _digest("\n".join(parts).encode(), *(file.read_bytes() for file in files))


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


def _build(builder: Path, base: Path, environment: dict[str, str], say: Callable[[str], None]) -> None:
    if not base.exists():
        say("no image yet: making one takes a few minutes, once")
    command = [str(builder), "--tag", IMAGE, "--like", sys.executable]
    command += ["--base", "debootstrap", "--keep-base", str(base)]
    # Not from a source tree that is found by accident: PYTHON is what the script makes its own environment with.
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "TERM", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment | {"PYTHON": sys.executable, "DOCKER_BUILDKIT": "0"},
    )
    assert process.stdout is not None
    wrote = []
    try:
        for line in process.stdout:
            wrote.append(line)
            say(line.rstrip())
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if code != 0:
        raise LabError(f"The image could not be built ({builder}, exit code {code}): {''.join(wrote[-5:]).strip()}")


@contextmanager
def _engine(folder: Path) -> Iterator[dict[str, str]]:
    """Run an engine of our own that keeps its images in a folder; yields the variables that lead to it."""
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--net", "--pid", "--ipc", "--fork"]
    command += ["--kill-child", "--mount-proc", "--propagation", "private", "--", "sh", "-ec", _ENGINE, "sh"]
    process = subprocess.Popen([*command, str(folder), CGROUP], stdin=subprocess.DEVNULL, start_new_session=True)
    environment = {**os.environ, "DOCKER_HOST": f"unix://{folder}/docker.sock"}
    try:
        deadline = time.monotonic() + ENGINE_TIMEOUT_SECONDS
        while subprocess.run(["docker", "version"], env=environment, capture_output=True, check=False).returncode != 0:
            if process.poll() is not None or time.monotonic() > deadline:
                log = (folder / "engine.log").read_text(errors="replace")[-1000:]
                raise LabError(f"The engine that builds the image does not answer. The end of its log:\n{log}")
            time.sleep(POLL_SECONDS)
        yield environment
        # What is written must be complete before the engine's end, which is a kill.
        for entry in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            os.kill(int(entry), 15)
        with suppress(subprocess.TimeoutExpired):
            process.wait(ENGINE_TIMEOUT_SECONDS)
    finally:
        process.kill()
        process.wait()
        for cgroup in Path("/sys/fs/cgroup").glob(f"*{CGROUP}"):
            for inner in (*sorted(cgroup.rglob("*/"), reverse=True), cgroup):
                with suppress(OSError):
                    inner.rmdir()


def _strip(new: Path) -> None:
    """Leave nothing in a store but images: no container, no socket, no build."""
    engine = new / "engine"
    for entry in engine.iterdir():
        if entry.name not in {"image", "overlay2"}:
            _remove(entry)
    _remove(engine / "image/overlay2/layerdb/mounts")
    for name in ("docker.sock", "engine.log"):
        (new / name).unlink(missing_ok=True)


def _forget_unused(cache: Path) -> None:
    """Remove stores that no lab uses, but for the newest ones, and what a killed build left."""
    for left in cache.glob("*.new"):
        _remove(left)
    stores = sorted(cache.glob("*/lock"), key=lambda lock: lock.stat().st_mtime)
    for lock in stores[:-STORES_KEPT]:
        fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(lock.parent)
        except BlockingIOError:  # a lab uses it
            pass
        finally:
            os.close(fd)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _locked(file: Path, kind: int) -> Iterator[None]:
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, kind)
        yield
    finally:
        os.close(fd)


def _run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LabError(f"{' '.join(command)} failed with exit code {done.returncode}: {done.stderr.strip()}")
