"""What travels to a process without meshcompute; each test asks a Python that really cannot import it."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from distributed.protocol import deserialize, serialize

import meshcompute
from meshcompute import shipping
from meshcompute.errors import UnknownPoolError, VersionMismatchError
from meshcompute.pools import Pin
from meshcompute.shipping import SCHEDULER_MODULES, Shipment, by_value

# Unpickles standard input where neither an installed meshcompute nor this checkout can be imported; what was shipped
# is appended behind these finders, and is found.
STRANGER = """
import pickle, sys
class PathWithout:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] == "meshcompute" else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [PathWithout(finder) for finder in sys.meta_path]
obj = pickle.loads(sys.stdin.buffer.read())
"""


def at_stranger(obj: Any, code: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", STRANGER + code],
        input=pickle.dumps(obj),
        capture_output=True,
        timeout=60,
        check=False,
        cwd="/",
    )
    assert run.returncode == 0, run.stderr.decode()
    return run.stdout.decode().strip()


def test_a_function_of_ours_arrives_without_the_package() -> None:
    assert at_stranger(by_value(shipping.by_value.__call__), "print(obj.__name__)") == "__call__"


def test_an_object_arrives_with_the_sources_it_needs() -> None:
    code = "import meshcompute.scheduler.guard, meshcompute.clients; print(obj.pools, obj.__class__.__module__)"
    assert at_stranger(Shipment(Pin(("a", "b")), with_sources=True), code) == "('a', 'b') meshcompute.pools"


def test_without_sources_the_reason_is_raised_where_dask_asks_for_tasks() -> None:
    code = "try: obj.__dask_graph__()\nexcept RuntimeError as exc: print(exc)\n"
    assert "Connect a new Client" in at_stranger(Shipment(Pin(("a",)), with_sources=False), code)


def test_another_version_is_refused_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meshcompute, "__version__", "0.0.7")
    data = pickle.dumps(Shipment(Pin(("a",)), with_sources=False))
    monkeypatch.undo()
    refused = pickle.loads(data)
    with pytest.raises(VersionMismatchError, match=r"client has meshcompute 0\.0\.7") as caught:
        refused.__dask_graph__()
    assert caught.value.scheduler_version == meshcompute.__version__
    with pytest.raises(VersionMismatchError):
        refused(dask_scheduler=None)


def test_large_buffers_stay_out_of_band() -> None:
    import numpy as np

    array = np.ones(1_000_000)
    header, frames = serialize(Shipment({"x": array}, with_sources=False), serializers=["pickle"])
    assert any(len(memoryview(frame).cast("B")) == array.nbytes for frame in frames)
    np.testing.assert_array_equal(deserialize(header, frames)["x"], array)


def test_what_goes_to_a_scheduler_needs_nothing_that_is_not_sent() -> None:
    folder = Path(meshcompute.__file__).parent
    for name in SCHEDULER_MODULES:
        for node in ast.walk(ast.parse((folder / f"{name.replace('.', '/')}.py").read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            package, _, module = node.module.partition(".")
            if package == "meshcompute" and module not in SCHEDULER_MODULES:  # then it is a folder
                prefix = f"{module}." if module else ""
                assert {f"{prefix}{alias.name}" for alias in node.names} <= set(SCHEDULER_MODULES), (name, node.module)


def test_errors_keep_their_facts_when_pickled() -> None:
    error = pickle.loads(pickle.dumps(UnknownPoolError("c", ["b", "a"], 30.0, "key")))
    assert (error.pool, error.pools, error.timeout_seconds, error.key) == ("c", ("a", "b"), 30.0, "key")
    assert "Pools of this cluster: a, b" in str(error)
