"""What the tests share: two sites on this machine, an environment without meshcompute, missing components.

Covers fixtures only. ``sites`` is a running mesh with the pools a and b, its scheduler in a process of its own, each
site's workers seeing only their own folder. Tests that end workers make a mesh of their own with ``start_sites``.
"""

from __future__ import annotations

import inspect
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from distributed import Client
from hypothesis import settings

from meshcompute.embedded import EmbeddedMesh

# Other people's load must not fail a test of ours: pytest-timeout holds the deadline of the whole test.
settings.register_profile("meshcompute", deadline=None, print_blob=True)
settings.load_profile("meshcompute")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let what test files define travel by value: no scheduler or worker can import a test file.

    Dask pickles by reference whatever this process can import; what belongs to ``__main__`` it pickles by value.
    """
    for module in {item.module for item in items if isinstance(item, pytest.Function)}:
        for name, defined in vars(module).items():
            is_ours = getattr(defined, "__module__", None) == module.__name__ and not name.lower().startswith("test")
            if is_ours and (inspect.isfunction(defined) or inspect.isclass(defined)):
                defined.__module__ = "__main__"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sites:
    """A running mesh with pools a and b, and a client that is Dask's default."""

    mesh: EmbeddedMesh
    client: Client

    def store(self, site: str, name: str = "") -> Path:
        """Path at which a test can write a file of a site (the sites' workers use :meth:`path`)."""
        return self.mesh.sites[site] / name

    def path(self, site: str, name: str = "") -> str:
        """Path at which workers of that site, and nobody else, find the file."""
        return str(self.mesh.folder(site) / name)

    def workers(self, site: str) -> dict[str, str]:
        """Addresses of a site's workers by name."""
        found = self.client.sync(self.client.scheduler.identity, n_workers=-1)["workers"]
        by_name = {worker["name"]: address for address, worker in found.items()}
        return {name: by_name[name] for name in sorted(by_name) if name.rsplit("-", 2)[0] == site}


@pytest.fixture(scope="session")
def need() -> Callable[..., None]:
    """Skip, naming what is missing; fail instead where CI=true, so that nothing is left out unseen there."""

    def need(component: str, is_there: object, cure: str = "") -> None:
        if is_there:
            return
        message = f"{component} is missing here" + (f" ({cure})" if cure else "")
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)

    return need


@pytest.fixture(scope="session")
def stock_python(need: Callable[..., None]) -> str:
    """Interpreter of an environment with Dask, xarray and pandas in our versions, and without meshcompute."""
    python = os.environ.get("MESHCOMPUTE_STOCK_PYTHON", "")
    need("an environment without meshcompute", shutil.which(python), "scripts/test.sh sets MESHCOMPUTE_STOCK_PYTHON")
    check = "import dask, distributed, importlib.util; assert importlib.util.find_spec('meshcompute') is None"
    subprocess.run([python, "-c", check], check=True, timeout=60, cwd="/")
    return python


@pytest.fixture(scope="session")
def dot(need: Callable[..., None]) -> str:
    """Graphviz' program."""
    found = shutil.which("dot")
    need("graphviz' program dot", found, "apt-get install graphviz")
    assert found
    return found


def _start(
    stack: ExitStack, folder: Path, *, pools: tuple[str, ...] = ("a", "b"), isolated: bool = True, **options: Any
) -> EmbeddedMesh:
    stores = {pool: folder / pool for pool in pools}
    for store in stores.values():
        store.mkdir()
    options = {"workers_per_site": 2, "threads_per_worker": 2, **options}
    mesh = stack.enter_context(EmbeddedMesh(stores, **options))
    if isolated and not mesh.isolated:
        message = "mount namespaces are missing here: sites cannot be isolated"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return mesh


@pytest.fixture
def can_be_interrupted() -> Iterator[None]:
    """Processes that this test starts heed Ctrl-C, also where the whole run ignores it (as background jobs do)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def start_sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Sites]]:
    """Start a mesh of one's own; arguments as of EmbeddedMesh, and ``pools``. It ends with the test file."""
    with ExitStack() as stack:

        def start_sites(**options: Any) -> Sites:
            mesh = _start(stack, tmp_path_factory.mktemp("sites"), **options)
            return Sites(mesh=mesh, client=mesh.client())

        yield start_sites


@pytest.fixture(scope="session")
def _shared_mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedMesh]:
    with ExitStack() as stack:
        yield _start(stack, tmp_path_factory.mktemp("sites"))


@pytest.fixture(scope="module")
def sites(_shared_mesh: EmbeddedMesh) -> Iterator[Sites]:
    """Pools a and b, two workers with two threads each, isolated folders; every test file gets a client of its own.

    The processes are shared by the whole run, so whoever kills a worker uses ``start_sites``.
    """
    mesh = _shared_mesh
    with Client(mesh.scheduler_address) as client:
        yield Sites(mesh=mesh, client=client)
    for name, pid in mesh.pids.items():
        assert Path(f"/proc/{pid}").exists(), f"{name} did not survive this test file:\n{mesh.log(name)[-3000:]}"


@pytest.fixture(scope="module")
def stock_sites(stock_python: str, start_sites: Callable[..., Sites]) -> Sites:
    """The same with a scheduler and workers that do not have meshcompute."""
    return start_sites(scheduler_python=stock_python, worker_python=stock_python)
