"""What the benchmark of placement has on schedulers and workers, which import it: little, since they wait for it.

Covers notes of the size and the maker of every value, and resources that tie tasks to sites in stock Dask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distributed import SchedulerPlugin

RECORD = "placement-record"


class Record(SchedulerPlugin):
    """Notes the size of every value when it is made, and the worker that made it."""

    name = RECORD

    def start(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.seen: dict[Any, tuple[int, str]] = {}

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        if finish == "memory" and key not in self.seen:
            task = self.scheduler.tasks[key]
            holder = next(iter(task.who_has), None)
            self.seen[key] = task.get_nbytes(), "" if holder is None else str(holder.name)


def take_record(dask_scheduler: Any) -> dict[Any, tuple[int, str]]:
    """Hand out what was noted, and begin anew."""
    plugin = dask_scheduler.plugins[RECORD]
    seen, plugin.seen = plugin.seen, {}
    return dict(seen)


def count_tasks(dask_scheduler: Any) -> int:
    return len(dask_scheduler.tasks)


@dataclass(frozen=True)
class Restrictions:
    """Resources by key, as an annotation that the scheduler asks for every task."""

    by_key: Mapping[Any, str]

    def __call__(self, key: Any) -> dict[str, float]:
        return {self.by_key[key]: 0.0} if key in self.by_key else {}


def place_resource(pools: Sequence[str]) -> str:
    """Name the resource that the workers of these sites have, and no others."""
    return "at-" + "-".join(pools)


async def have_resources(names: Sequence[str], dask_worker: Any) -> None:
    await dask_worker.set_resources(**dict.fromkeys(names, 1.0))
