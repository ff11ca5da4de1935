"""What a plan hands on to the scheduler, whatever that knows already."""

from __future__ import annotations

from typing import Any

import dask
import pytest
from dask import delayed
from dask._task_spec import Task, TaskRef
from dask.tokenize import tokenize

from meshcompute import pool
from meshcompute.planning import Request, assign
from meshcompute.scheduler.live import EmptyView, Known


class _Knows(EmptyView):
    """A cluster that knows some tasks."""

    def __init__(self, **known: Known) -> None:
        self._known = known

    def pools(self) -> tuple[str, ...]:
        return ("a", "b")

    def among(self, keys: Any) -> list[Any]:
        return [key for key in keys if key in self._known]

    def known(self, key: Any) -> Known | None:
        return self._known.get(key)


@pytest.mark.parametrize("is_propagating", [False, True])
def test_a_plan_can_run_although_the_cluster_forgets_what_it_knew_when_it_was_made(is_propagating: bool) -> None:
    with pool("a"):
        x = delayed(tokenize)(1, dask_key_name="x")
    with pool("b"):
        y = delayed(tokenize)(x, dask_key_name="y")
        wanted = delayed(tokenize)(y, dask_key_name="wanted")
    expr = dask.base.collections_to_expr([wanted]).optimize()
    reads_relay = Known(nbytes=-1.0, pools=("b",), task=Task("y", tokenize, TaskRef("relay-b-x")))
    plan = assign(expr, Request(keys=("wanted",), is_propagating=is_propagating), _Knows(y=reads_relay))
    assert {dep for task in plan.tasks.values() for dep in task.dependencies} <= plan.tasks.keys()
    assert plan.pool_by_key["y"] == "b"
