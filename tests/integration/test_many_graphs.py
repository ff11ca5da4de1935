"""Many small graphs in a row: a scheduler that serves its users for weeks must not grow or slow down.

A few thousand, so that this takes seconds; ``MESHCOMPUTE_MANY_GRAPHS=10000 pytest`` runs as many as one likes. The logs
in which distributed keeps the last messages and transitions are made short here, so that they are full after a few
hundred graphs, and whatever still grows then grows for ever.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import dask.array as da
import pytest
from dask import delayed
from distributed import Client, wait
from waiting import wait_until

from meshcompute import pool, propagate_pools
from meshcompute.graphs.learning import _MOST_GROUPS

N_GRAPHS = int(os.environ.get("MESHCOMPUTE_MANY_GRAPHS", "2400"))
STEP = 400
LEARNT = ("entries of pool_sizes", "meshcompute.graphs.learning.")  # has a bound of its own
SHORT_LOGS = {"DASK_DISTRIBUTED__ADMIN__LOW_LEVEL_LOG_LENGTH": "50"}


def joined(x: Any, y: Any) -> Any:
    return x, y


def small_graph(i: int) -> Any:
    """A graph as users send them: of one task, of tasks in two pools, or of an array's chunks; no two are equal."""
    if i % 10 == 0:
        with pool("a"):
            x = da.full((8, 8), i, chunks=4, name=f"many-{i}")
        return x.sum()
    with pool("ab"[i % 2]):
        x = delayed(int)(i, dask_key_name=f"many-x-{i}")
    with pool("ab"[i // 2 % 2]):
        y = delayed(int)(i, dask_key_name=f"many-y-{i}")
    return delayed(joined)(x, y, dask_key_name=f"many-joined-{i}")


def state(dask_scheduler: Any) -> tuple[float, Counter[str]]:
    """CPU seconds of the scheduler's process so far; what it holds: objects by class, and entries of our own books."""
    import gc
    import time

    gc.collect()
    found: Counter[str] = Counter()
    for one in gc.get_objects():
        kind = type(one)
        ours = str(kind.__module__).startswith("meshcompute")
        found[f"{kind.__module__}.{kind.__qualname__}" if ours else "others"] += 1
    for name, book in vars(dask_scheduler).items():
        if name.startswith(("pool_", "_pool_")):
            for part, value in [("", book), *getattr(book, "__dict__", {}).items()]:
                if hasattr(value, "__len__"):
                    found[f"entries of {name} {part}"] += len(value)
    return time.process_time(), found


def run(client: Client, numbers: range) -> None:
    futures = [client.compute(small_graph(i)) for i in numbers]
    wait(futures, timeout=60)
    assert {future.status for future in futures} == {"finished"}
    del futures
    wait_until(lambda: client.run_on_scheduler(lambda dask_scheduler: not dask_scheduler.tasks), "all to be forgotten")


@pytest.mark.timeout(N_GRAPHS / 8)  # 20 ms each where nobody else is at work
def test_thousands_of_small_graphs_do_not_grow_the_scheduler_or_slow_it_down(start_sites: Callable[..., Any]) -> None:
    client = start_sites(isolated=False, environment=SHORT_LOGS).client
    states = []
    with propagate_pools():
        for start in range(0, N_GRAPHS, STEP):
            run(client, range(start, start + STEP))
            states.append(client.run_on_scheduler(state))
            print(start + STEP, states[-1][0], dict(states[-1][1]))  # shown where it fails
    (_, before), (_, end) = states[len(states) * 2 // 3 - 1], states[-1]
    n = STEP * (len(states) - len(states) * 2 // 3)
    # Stock distributed itself gains 0.2 to 0.7 objects with each graph: its history of computations, asyncio.
    allowed = {"others": 2 * n} | {kind: _MOST_GROUPS for kind in end if kind.startswith(LEARNT)}
    grown = {kind: more for kind in end if (more := end[kind] - before[kind]) > allowed.get(kind, n // 20)}
    assert not grown
    assert all(end[kind] <= _MOST_GROUPS for kind in end if kind.startswith(LEARNT))
    seconds = [later[0] - earlier[0] for earlier, later in itertools.pairwise(states)]
    assert min(seconds[-2:]) < 2 * max(seconds[:2])
