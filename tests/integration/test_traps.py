"""Traps of Dask that pools fall into, each shown on the published library's approach, then passed with ours.

The published approach is ``dask.annotate(resources=...)`` when data is created, and an optimisation set by
``dask.config`` with fusion off at the client. It runs in a process of its own that has never heard of meshcompute,
against a scheduler of its own, with default settings there.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import dask.array as da
import numpy as np
import pytest
from dask import delayed
from distributed import Client, get_worker
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshcompute import measure_traffic, pool, propagate_pools

PUBLISHED = """
import sys, time, dask, dask.array as da, numpy as np
from dask import delayed
from distributed import Client, get_worker, wait, futures_of
def pool(name):
    return dask.annotate(resources={"pool-" + name: 0})
def propagate_pools():
    return dask.config.set({"optimizations": (lambda dsk, keys, **kw: dsk,), "optimization.fuse.active": False})
def where(x=None):
    return np.array([ord(get_worker().name[0])])
def places(n=12):
    return da.map_blocks(where, da.random.random(n, chunks=1), dtype=int)
def names(values):
    return "".join(sorted({chr(int(v)) for v in np.ravel(values)}))
client = Client(sys.argv[1])
"""


@pytest.fixture(scope="module")
def published(start_sites: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Run a program in the published way; returns what it prints."""
    address = start_sites(threads_per_worker=1).mesh.scheduler_address
    folder = tmp_path_factory.mktemp("published")

    def run(program: str) -> str:
        command = [sys.executable, "-W", "ignore", "-c", PUBLISHED + program, address]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=90, cwd=folder)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def places(n: int = 12) -> da.Array:
    """An array that says where its chunks were made."""

    def where(x: np.ndarray) -> np.ndarray:
        return np.array([ord(get_worker().name[0])])

    return da.map_blocks(where, da.random.random(n, chunks=1), dtype=int)


def names(values: Any) -> str:
    return "".join(sorted({chr(int(v)) for v in np.ravel(values)}))


def test_annotations_of_arrays_do_not_survive_default_fusion(published: Callable[[str], str], sites: Any) -> None:
    assert published("with pool('a'): x = places()\nwith propagate_pools(): print(names((x + 0).compute()))") == "ab"
    with pool("a"):
        x = places()
    assert names((x + 0).compute()) == "a"


def test_a_call_that_takes_an_array_loses_its_annotations(published: Callable[[str], str], sites: Any) -> None:
    program = "with pool('a'): x = places()\nwith propagate_pools(): print(names(delayed(np.array)(x).compute()))"
    assert published(program) == "ab"
    with pool("a"):
        x = places()
    assert names(delayed(np.array)(x).compute()) == "a"


def test_a_chain_through_two_pools_is_fused_into_one_place(published: Callable[[str], str], sites: Any) -> None:
    program = """
with pool('a'): x = places(6)
with pool('b'): y = x.map_blocks(lambda v: v * 256 + where(), dtype=int)
with propagate_pools(): r = y.compute()
print(int(all((v // 256, v % 256) == (ord('a'), ord('b')) for v in r)))
"""
    assert published(program) == "0"
    with pool("a"):
        x = places(6)
    with pool("b"):
        y = x.map_blocks(lambda v: v * 256 + ord(get_worker().name[0]), dtype=int)
    assert {(int(v) // 256, int(v) % 256) for v in y.compute()} == {(ord("a"), ord("b"))}


def test_the_same_call_under_two_pools_is_one_key(published: Callable[[str], str], sites: Any) -> None:
    program = """
with pool('a'): x = client.submit(where)
with pool('b'): y = client.submit(where)
print(int(x.key == y.key))
"""
    assert published(program) == "1"
    with pool("a"):
        x = delayed(np.zeros, pure=True)(3)
    with pool("b"):
        y = delayed(np.zeros, pure=True)(3)
    assert x.key != y.key


def test_scattered_data_ignores_the_pool(published: Callable[[str], str], sites: Any) -> None:
    program = """
with pool('a'): x = client.scatter(list(range(8)), hash=False)
found = client.scheduler_info(n_workers=-1)['workers']
print(''.join(sorted({found[w]['name'][0] for ws in client.who_has(x).values() for w in ws})))
"""
    assert published(program) == "ab"
    with pool("a"):
        x = sites.client.scatter(list(range(8)), hash=False)
    holders = {w for ws in sites.client.who_has(x).values() for w in ws}
    assert holders <= set(sites.workers("a").values())


def test_resources_of_a_submit_replace_the_pool(published: Callable[[str], str], sites: Any) -> None:
    program = """
with pool('a'): futures = [client.submit(where, pure=False, resources={'pool-b': 0}) for i in range(2)]
print(names(client.gather(futures)))
"""
    assert published(program) == "b"
    with pool("a"):  # merged: a worker of a with a GPU would be asked for, and nobody has one
        future = sites.client.submit(lambda: 1, pure=False, resources={"GPU": 1})

    def demands(dask_scheduler: Any, key: str) -> dict[str, float] | None:
        ts = dask_scheduler.tasks.get(key)
        return ts and ts.resource_restrictions

    deadline = time.monotonic() + 20
    while not (found := sites.client.run_on_scheduler(demands, key=future.key)):
        assert time.monotonic() < deadline
    assert found == {"pool-a": 0, "GPU": 1}
    future.cancel()


def test_as_many_pinned_tasks_run_at_once_as_a_worker_has_threads(start_sites: Callable[..., Any]) -> None:
    mesh = start_sites(pools=("a",), workers_per_site=1, threads_per_worker=4).mesh
    with Client(mesh.scheduler_address) as client:
        with pool("a"):
            futures = client.map(_meet, range(4), pure=False)
        assert client.gather(futures) == [True] * 4


def _meet(i: int) -> bool:
    from distributed import Event

    if i == 3:
        Event("all four run at once").set()
    return bool(Event("all four run at once").wait(timeout=30))


_meet.__module__ = "__main__"  # pickled by value, as in a notebook


@st.composite
def graphs(draw: st.DrawFn) -> list[tuple[list[int], tuple[str, ...] | None]]:
    """Random task graphs: inputs and pin of every task."""
    n = draw(st.integers(2, 14))
    pins = st.sampled_from([None, None, ("a",), ("b",), ("a", "b")])
    return [(draw(st.lists(st.integers(0, i - 1), max_size=3, unique=True)) if i else [], draw(pins)) for i in range(n)]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(graph=graphs(), is_propagating=st.booleans())
def test_no_task_of_any_graph_runs_outside_of_its_pool(
    graph: list[tuple[list[int], tuple[str, ...] | None]], is_propagating: bool, sites: Any
) -> None:
    def work(i: int, pools: tuple[str, ...] | None, *inputs: int) -> int:
        own = str(get_worker().name).split("-")[0]
        if pools is not None and own not in pools:
            raise AssertionError(f"task {i} of {pools} ran in {own}")
        return i + sum(inputs)

    lazy: list[Any] = []
    expected: list[int] = []
    for i, (inputs, pools) in enumerate(graph):
        with pool(*pools) if pools else contextlib.nullcontext():
            lazy.append(delayed(work, pure=False)(i, pools, *(lazy[j] for j in inputs)))
        expected.append(i + sum(expected[j] for j in inputs))
    with propagate_pools() if is_propagating else contextlib.nullcontext():
        assert sites.client.gather(sites.client.compute(lazy)) == expected


def test_a_value_with_two_readers_crosses_once_with_ours(sites: Any) -> None:
    with pool("a"):
        x = delayed(np.ones)(500_000)
    with pool("b"):
        readers = [delayed(lambda v, i: float(v[i]))(x, i) for i in range(6)]
    with propagate_pools(), measure_traffic() as traffic:
        assert sites.client.gather(sites.client.compute(readers)) == [1.0] * 6
    assert traffic.bytes_between_pools["a", "b"] == pytest.approx(4e6, rel=0.01)
