"""What the benchmark of placement has on schedulers and workers, which import it: little, since they wait for it.

Covers notes of the size and the maker of every value, of what the senders of P2P shuffles send (they return a number),
and resources that tie tasks to sites in stock Dask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distributed import SchedulerPlugin
from distributed.shuffle._rechunk import ArrayRechunkRun
from distributed.shuffle._shuffle import DataFrameShuffleRun
from distributed.worker import thread_state

RECORD = "placement-record"

#: On a worker: bytes of the pieces that each sender of a shuffle has sent, by its key.
SENT: dict[Any, int] = {}


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


def note_senders() -> None:
    """Have shuffles note on this worker what they send; once is enough."""
    for kind in (DataFrameShuffleRun, ArrayRechunkRun):
        if not hasattr(kind._shard_partition, "is_noting"):
            kind._shard_partition = _noting(kind._shard_partition)


def _noting(shard: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    def shard_and_note(*args: Any, **kwargs: Any) -> dict[str, Any]:
        pieces = shard(*args, **kwargs)
        SENT[thread_state.key] = sum(_piece_nbytes(piece) for _, piece in pieces.values())
        return pieces

    shard_and_note.is_noting = True  # type: ignore[attr-defined]
    return shard_and_note


def _piece_nbytes(piece: Any) -> int:
    """Tell the size of Arrow's message, or of arrays with their places."""
    return len(piece) if isinstance(piece, bytes) else sum(array.nbytes for _, (_, array) in piece)


def take_sent() -> dict[Any, int]:
    """Hand out what this worker's senders have sent, and begin anew."""
    sent = dict(SENT)
    SENT.clear()
    return sent
