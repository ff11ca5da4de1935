"""Pins through every kind of optimisation, at the level of graphs."""

from __future__ import annotations

import pickle
from typing import Any

import dask
import dask.array as da
import dask.bag as db
import numpy as np
import pytest
from dask import delayed
from dask._expr import FinalizeCompute
from dask._task_spec import Task
from dask.base import collections_to_expr
from dask.core import flatten

from meshcompute.clients import pool
from meshcompute.errors import UnsupportedPinError
from meshcompute.graphs import taskgraph
from meshcompute.graphs.pinnedtasks import PinnedTask, extract_pins, pinned
from meshcompute.pools import Pin

A, B = Pin(("a",)), Pin(("b",))


def planned(*collections: Any, optimize_graph: bool = True) -> tuple[dict[Any, Any], dict[Any, Pin]]:
    """The tasks that would run, and their pins."""
    expr = FinalizeCompute(collections_to_expr(collections, optimize_graph)).optimize()
    tasks, annotations = taskgraph.materialize(expr, tuple(flatten(expr.__dask_keys__())))
    tasks, pins = extract_pins(tasks)
    return tasks, {**annotations.get("pool", {}), **pins}


def reads(site: str, n: int = 4) -> da.Array:
    with pool(site):
        return da.map_blocks(lambda x: x + ord(site), da.zeros(n * 2, chunks=2), dtype=float)


def holds_nothing_of_ours(tasks: dict[Any, Any]) -> bool:
    return not any(isinstance(part, PinnedTask) for task in tasks.values() for part in _parts(task))


def _parts(task: Any) -> Any:
    yield task
    for arg in getattr(task, "args", ()):
        for part in arg.values() if isinstance(arg, dict) else [arg]:
            if isinstance(part, Task):
                yield from _parts(part)


@pytest.mark.parametrize("is_fused", [True, None, False])
def test_every_read_keeps_its_pin_and_no_task_has_two(is_fused: bool | None) -> None:
    with dask.config.set({"optimization.fuse.active": is_fused}):
        tasks, pins = planned((reads("a") * 2 + reads("b")).sum())
    assert {pin.pools for pin in pins.values()} == {("a",), ("b",)}
    assert sum(pin == A for pin in pins.values()) == sum(pin == B for pin in pins.values()) >= 4
    assert holds_nothing_of_ours(tasks)


def test_pinning_one_pool_makes_no_more_tasks_than_stock() -> None:
    def build() -> da.Array:
        x = da.map_blocks(lambda x: x + 1, da.zeros((40, 40), chunks=4), dtype=float)
        return ((x - x.mean(0)) ** 2).sum()

    stock, _ = planned(build())
    with pool("a"):
        inside = build()
    ours, _ = planned(inside)
    assert len(ours) <= len(stock)
    with pool("a"):
        x = da.map_blocks(lambda x: x + 1, da.zeros((40, 40), chunks=4), dtype=float)
    outside, pins = planned(((x - x.mean(0)) ** 2).sum())
    assert len(outside) <= 1.1 * len(stock)
    assert pins


def test_a_pin_survives_bags_and_their_lazy_pass() -> None:
    with pool("a"):
        bag = db.from_sequence(range(8), npartitions=4).map(lambda x: x + 1).filter(bool)
    tasks, pins = planned(bag.map(str))
    assert len([k for k, pin in pins.items() if pin == A]) >= 4
    assert holds_nothing_of_ours(tasks)


def test_a_pin_survives_delayed_calls() -> None:
    with pool("a"):
        x = delayed(np.ones)(3)
    _, pins = planned(delayed(np.sum)(x))
    assert [pin.pools for pin in pins.values() if pin is not None] == [("a",)]
    (optimized,) = dask.optimize(delayed(np.sum)(x))
    _, pins = planned(optimized)
    assert A in pins.values()


def test_a_chain_of_two_pools_is_taken_apart_and_gives_the_same() -> None:
    with pool("a"):
        x = da.map_blocks(lambda x: x + 1, da.zeros(4, chunks=2), dtype=float)
    with pool("b"):
        y = x.map_blocks(lambda x: x * 3)
    z = (y + 1).map_blocks(lambda x: x - 7)
    tasks, pins = planned(z)
    assert {pin.pools for pin in pins.values()} == {("a",), ("b",)}
    (key,) = [k for k in tasks if str(k).startswith("finalize")]
    np.testing.assert_array_equal(dask.get(tasks, key), np.full(4, -3.0))


def test_pins_that_cannot_be_taken_apart_are_refused() -> None:
    inner = pinned(Task("x", np.ones, 3), A)
    outer = pinned(Task("y", np.sum, inner), B)
    with pytest.raises(UnsupportedPinError, match="pool b and of pool a"):
        extract_pins({"y": outer})


def test_replicas_fused_with_one_of_them_run_there() -> None:
    either = pinned(Task("x", np.ones, 3), Pin(("a", "b")))
    outer = pinned(Task("y", np.sum, either), B)
    _, pins = extract_pins({"y": outer})
    assert pins == {"y": B}


def test_other_resources_of_fused_tasks_are_merged() -> None:
    x = pinned(Task("x", np.ones, 3), Pin(("a",), (("GPU", 1),)))
    y = pinned(Task("y", np.sum, x), Pin(("a",), (("GPU", 2), ("MEMORY", 5))))
    _, pins = extract_pins({"y": y})
    assert pins == {"y": Pin(("a",), (("GPU", 2), ("MEMORY", 5)))}


def test_an_argument_called_like_ours_reaches_the_function() -> None:
    task = pinned(Task("x", dict, pools=1, pin=2, key=3), A)
    copied = pickle.loads(pickle.dumps(task)).substitute({}, key="y")
    assert copied.key == "y"
    assert copied() == {"pools": 1, "pin": 2, "key": 3}
    tasks, pins = extract_pins({"y": copied})
    assert type(tasks["y"]) is Task
    assert tasks["y"]() == {"pools": 1, "pin": 2, "key": 3}
    assert pins == {"y": A}


def test_a_relay_is_read_in_place_of_the_value() -> None:
    from dask._task_spec import TaskRef

    graph = {("x", 0): Task(("x", 0), np.ones, 3)}
    for i in range(2):
        graph[f"sum-{i}"] = Task(f"sum-{i}", np.sum, TaskRef(("x", 0)))
    key = taskgraph.relay(graph, ("x", 0), ["sum-0", "sum-1"], "b")
    assert graph[key].dependencies == {("x", 0)}
    assert {graph[f"sum-{i}"].dependencies for i in range(2)} == {frozenset({key})}
    assert dask.get(graph, ["sum-0", "sum-1"]) == (3.0, 3.0)
