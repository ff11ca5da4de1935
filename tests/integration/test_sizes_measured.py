"""What a transfer is logged with is what sizes count: Dask's own size of the value.

Covers the values that reductions hand on, sent between two worker processes. Does not cover the estimates themselves
(tests/unit/test_sizes.py holds them against Dask's size of every value), nor the protocol's overhead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cloudpickle
import dask.array as da
import numpy as np
import pytest
from dask._task_spec import Task, convert_legacy_graph
from dask.base import collections_to_expr
from distributed import Client, LocalCluster, Worker, wait

from meshcompute.graphs.sizes import estimate_nbytes


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        yield client


def sent(dask_worker: Worker) -> list[tuple[Any, int]]:
    return [(key, nbytes) for entry in dask_worker.transfer_outgoing_log for key, nbytes in entry["keys"].items()]


def evaluate(pickled_task: bytes) -> Any:
    return cloudpickle.loads(pickled_task)()


def first_step(name: str) -> tuple[Task, float]:
    """Return the task of one block's part of a reduction, and its estimate."""
    x = da.from_array(np.random.default_rng(0).random((120, 200, 50)), chunks=(40, 200, 50))
    result = getattr(da, name)(x, axis=0)
    dsk = convert_legacy_graph(collections_to_expr(result).finalize_compute().optimize().__dask_graph__())
    sizes = estimate_nbytes(dsk, result.__dask_graph__().layers)
    task = next(node for key, node in dsk.items() if isinstance(node, Task) and key[1:] == (0, 0, 0))
    return task, sizes[task.key]


@pytest.mark.parametrize("name", ["sum", "mean", "var", "min", "argmin", "any", "nanmean", "nanstd"])
def test_a_partial_reduction_crosses_with_the_bytes_that_were_estimated(client: Client, name: str) -> None:
    task, estimated = first_step(name)
    source, destination = client.scheduler_info()["workers"]
    # As bytes: Dask takes a task among the arguments for a part of the graph.
    part = client.submit(evaluate, cloudpickle.dumps(task), workers=[source], key=f"part-of-{name}")
    wait(client.submit(type, part, workers=[destination], key=f"reader-of-{name}"), timeout=60)
    (nbytes,) = [nbytes for key, nbytes in client.run(sent, workers=[source])[source] if key == part.key]
    print(f"{name}: estimated {estimated:.0f}, sent {nbytes}")
    assert 0.7 * nbytes <= estimated <= 1.4 * nbytes
