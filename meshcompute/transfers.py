"""Counting transfers on a worker: the part of ``measure_traffic()`` that runs there.

Covers what is hooked into a worker, what one transfer counts, and how it is taken out again. This is the door to
distributed's worker internals: ``Worker.transfer_outgoing_log``, ``Worker.handlers``, ``Worker.stream_handlers``,
``ShuffleRun._send`` and ``distributed.client.gather_from_workers``. Does not cover pools or clients
(:mod:`meshcompute.traffic`).

The module travels to the workers by value, because they need not have meshcompute. So it imports the standard library,
dask and distributed only, keeps no state in its globals (each copy has its own), and hangs what copies share on the
worker itself. All of it runs on the worker's event loop, so that nothing needs a lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import BuiltinFunctionType, FunctionType
from typing import Any

from dask import sizeof as dask_sizeof  # the module: its dispatcher, pickled by value, would come without numpy
from dask._task_spec import Alias, DataNode, GraphNode, Task, TaskRef
from distributed.diagnostics.plugin import WorkerPlugin
from distributed.metrics import time

__all__ = ["CLIENT", "TransferPlugin", "embedded_nbytes", "report_after_settling", "shards_nbytes"]

CLIENT = "client"
POOL_PREFIX = "pool-"
REPORT_SECONDS = 1.0  # what a worker that is killed takes with it, at most
LAST_REPORT_SECONDS = 2.0  # a worker that closes waits this long for a scheduler that may be gone
EMBEDDED_MIN_NBYTES = 1024  # smaller values are arguments (shapes, slices, names), part of the task's message
_TAP = "_meshcompute_tap"
_MOST_PARTS = 100_000  # of one task: beyond, a list that holds itself is likelier
_SAMPLED_FROM = 32  # values in a container
_FUNCTIONS = (FunctionType, BuiltinFunctionType)
_CONTAINERS = frozenset({tuple, list, set, frozenset, dict})
_SMALL_TYPES = frozenset({int, float, complex, bool, type(None), slice, type, range, TaskRef, Alias, *_FUNCTIONS})


class Block:
    """What one measured block counted on one worker.

    Parameters
    ----------
    since_seconds
        When the block began, by the worker's clock.
    """

    def __init__(self, since_seconds: float) -> None:
        self.since_seconds = since_seconds
        self.until_seconds = float("inf")
        self.counts: dict[tuple[str, str, str], list[int]] = {}
        self.n_counted = 0
        self.n_reported = -1
        self.settling_since_seconds = float("inf")
        self.n_unsettled = 0

    def settle(self, now_seconds: float, n_in_flight: int) -> None:
        """Note how many transfers are in flight, to see when those have ended and not later ones.

        Parameters
        ----------
        now_seconds
            The time, by the worker's clock.
        n_in_flight
            Transfers that have begun and not ended.
        """
        self.settling_since_seconds, self.n_unsettled = now_seconds, n_in_flight


class CountingLog(deque):  # type: ignore[type-arg]
    """The worker's log of outgoing transfers, which keeps its last entries only, so each is counted on append."""

    tap: Tap

    def append(self, entry: Any, /) -> None:
        """Keep an entry, as the log does, and count it.

        Parameters
        ----------
        entry
            One transfer, as ``Worker.get_data`` writes it.
        """
        super().append(entry)
        try:  # harmless() itself costs as much as counting
            self.tap.gathered(entry)
        except Exception as exc:
            self.tap._miss("transfers between workers, and results", exc)


class Tap:
    """All hooks of one worker, shared by the blocks that are open at one time.

    Parameters
    ----------
    worker
        The worker.
    """

    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self.blocks: dict[str, Block] = {}
        self.missing: list[str] = []
        self._undo: list[Callable[[], None]] = []

    def install(self) -> None:
        """Put the hooks in; one that this version of distributed has no place for is noted in ``missing``."""
        hooks = {
            "transfers between workers, and results": self._hook_log,
            "scattered data": self._hook_scatter,
            "data inside tasks": self._hook_tasks,
            "P2P shuffles and rechunks": self._hook_shuffles,
            "tasks that gather with a client of their own": self._hook_clients_of_tasks,
        }
        for what, hook in hooks.items():
            with self.harmless(what):
                hook()

    @contextlib.contextmanager
    def harmless(self, what: str) -> Iterator[None]:
        """Keep an error of ours from the worker's own work, and note what could not be counted.

        Parameters
        ----------
        what
            What is counted here.
        """
        try:
            yield
        except Exception as exc:
            self._miss(what, exc)

    def _miss(self, what: str, error: Exception) -> None:
        """Note what could not be counted, once."""
        if not any(text.startswith(what) for text in self.missing):
            self.missing.append(f"{what} ({error!r})")

    def uninstall(self) -> None:
        """Take every hook out; the worker is then as it was, with the entries that its log got meanwhile."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def count(self, way: tuple[str, str, str], nbytes: int, wire_nbytes: int, began: float) -> None:
        """Count one transfer in every open block in which it began.

        Parameters
        ----------
        way
            What was moved, from where, to where: addresses of workers, or ``"client"``.
        nbytes
            Payload in bytes.
        wire_nbytes
            Bytes as written to the connection.
        began
            When it began, by this worker's clock.
        """
        for block in self.blocks.values():
            if block.since_seconds <= began <= block.until_seconds:
                row = block.counts.get(way)
                if row is None:
                    row = block.counts[way] = [0, 0, 0]
                row[0] += 1
                row[1] += nbytes
                row[2] += wire_nbytes
                block.n_counted += 1

    def gathered(self, entry: dict[str, Any]) -> None:
        """Count one entry of the log of outgoing transfers.

        Parameters
        ----------
        entry
            The entry: ``who`` asked (None: a client), ``total`` payload bytes, ``compressed`` bytes written.
        """
        nbytes, who = int(entry["total"]), entry["who"]
        began = entry["start"] - self.worker.scheduler_delay  # the log is in the scheduler's time
        wire_nbytes = entry["compressed"]
        wire = int(wire_nbytes) if wire_nbytes > 1 else nbytes  # connections inside one process write "1"
        for block in self.blocks.values():
            if began <= block.settling_since_seconds:
                block.n_unsettled -= 1
        way = ("result", self.worker.address, CLIENT) if who is None else ("gather", self.worker.address, who)
        self.count(way, nbytes, wire, began)

    def _hook_log(self) -> None:
        worker = self.worker
        original = worker.transfer_outgoing_log
        log = CountingLog(original, maxlen=original.maxlen)
        log.tap = self
        worker.transfer_outgoing_log = log

        def undo() -> None:
            if worker.transfer_outgoing_log is log:
                original.clear()
                original.extend(log)
                worker.transfer_outgoing_log = original

        self._undo.append(undo)

    def _hook_scatter(self) -> None:
        original = self.worker.handlers["update_data"]

        def update_data(**kwargs: Any) -> Any:
            answer = original(**kwargs)
            with self.harmless("scattered data"):
                nbytes = sum(answer["nbytes"].values())
                self.count(("scatter", CLIENT, self.worker.address), nbytes, nbytes, time())
            return answer

        self._replace(self.worker.handlers, "update_data", update_data)

    def _hook_tasks(self) -> None:
        original = self.worker.stream_handlers["compute-task"]

        def compute_task(**kwargs: Any) -> Any:
            with self.harmless("data inside some tasks"):
                nbytes = embedded_nbytes(kwargs.get("run_spec"))
                if nbytes >= EMBEDDED_MIN_NBYTES:
                    self.count(("task", CLIENT, self.worker.address), nbytes, nbytes, time())
            return original(**kwargs)

        self._replace(self.worker.stream_handlers, "compute-task", compute_task)

    def _replace(self, handlers: dict[str, Any], name: str, handler: Callable[..., Any]) -> None:
        original, handlers[name] = handlers[name], handler

        def undo() -> None:
            if handlers.get(name) is handler:
                handlers[name] = original

        self._undo.append(undo)

    def _hook_shuffles(self) -> None:
        from distributed.shuffle._core import ShuffleRun

        def counting(original: Any, taps: dict[str, Any]) -> Any:
            @functools.wraps(original)
            async def send(run: Any, address: str, shards: Any) -> Any:
                tap = taps.get(run.local_address)
                if tap is not None and address != run.local_address:  # a shard for the sender itself stays there
                    with tap.harmless("P2P shuffles and rechunks"):
                        nbytes = shards_nbytes(shards)
                        tap.count(("shuffle", run.local_address, address), nbytes, nbytes, time())
                return await original(run, address, shards)

            return send

        self._share(ShuffleRun, "_send", self.worker.address, counting)

    def _hook_clients_of_tasks(self) -> None:
        import distributed.client

        def counting(original: Any, taps: dict[str, Any]) -> Any:
            @functools.wraps(original)
            async def gather_from_workers(who_has: Any, rpc: Any, **kwargs: Any) -> Any:
                for address, tap in taps.items():
                    if kwargs.get("who") is None and tap._owns_client_with(rpc):
                        kwargs["who"] = address  # else the sender takes the task's client for the user's
                return await original(who_has, rpc, **kwargs)

            return gather_from_workers

        self._share(distributed.client, "gather_from_workers", self.worker.address, counting)

    def _owns_client_with(self, rpc: Any) -> bool:
        """Tell whether connections are those of the client that this worker made for its tasks."""
        client = self.worker._client
        return client is not None and client.rpc is rpc and client in type(self.worker)._initialized_clients

    def _share(self, owner: Any, name: str, address: str, counting: Callable[[Any, dict[str, Any]], Any]) -> None:
        """Replace a function of the whole process once, for however many workers the process has."""
        present = getattr(owner, name)
        taps: dict[str, Any] | None = getattr(present, _TAP, None)
        if taps is None:
            taps = {}
            replacement = counting(present, taps)
            setattr(replacement, _TAP, taps)
            setattr(owner, name, replacement)
        taps[address] = self

        def undo() -> None:
            taps.pop(address, None)
            present = getattr(owner, name)
            if not taps and getattr(present, _TAP, None) is taps:
                setattr(owner, name, present.__wrapped__)

        self._undo.append(undo)

    def report(self, name: str, *, is_last: bool = False) -> dict[str, Any]:
        """Say what a block counted here so far, as plain data that msgpack can carry.

        Parameters
        ----------
        name
            Name of the block.
        is_last
            Whether this worker will not report again.

        Returns
        -------
        dict
            The worker's address, its id, its pools, and rows of (kind, source, destination, transfers, bytes, bytes
            on the wire).
        """
        block = self.blocks[name]
        resources: Iterable[str] = self.worker.state.total_resources
        return {
            "address": self.worker.address,
            "worker_id": str(self.worker.id),
            "pools": sorted(r.removeprefix(POOL_PREFIX) for r in resources if r.startswith(POOL_PREFIX)),
            "n_counted": block.n_counted,
            "rows": [[*key, *row] for key, row in block.counts.items()],
            "in_flight": 0,
            "is_last": is_last,
            "missing": list(self.missing),
        }


class TransferPlugin(WorkerPlugin):
    """Count the transfers of one block on every worker, those that join later too.

    Parameters
    ----------
    name
        Name of the block, which is also the topic of the reports.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._reporting: asyncio.Task[None] | None = None

    def setup(self, worker: Any) -> None:
        """Hook into the worker, unless another block has done so, and begin to count.

        Parameters
        ----------
        worker
            The worker.
        """
        tap = getattr(worker, _TAP, None)
        if tap is None:
            tap = Tap(worker)
            setattr(worker, _TAP, tap)
            tap.install()
        tap.blocks[self.name] = Block(time())
        self._reporting = asyncio.get_running_loop().create_task(self._report_regularly(worker, tap))

    async def _report_regularly(self, worker: Any, tap: Tap) -> None:
        block = tap.blocks[self.name]
        reported_seconds = 0.0
        while True:
            is_due = time() > reported_seconds + REPORT_SECONDS or worker.status.name == "closing_gracefully"
            if is_due and block.n_counted != block.n_reported:
                block.n_reported, reported_seconds = block.n_counted, time()
                worker.log_event(self.name, tap.report(self.name))
            await asyncio.sleep(REPORT_SECONDS / 10)  # a worker that is retired may have no time for a last report

    async def teardown(self, worker: Any) -> None:
        """Stop counting; the last block to end takes the hooks out, and a worker that closes reports a last time.

        Parameters
        ----------
        worker
            The worker.
        """
        if self._reporting is not None:
            self._reporting.cancel()
        tap = getattr(worker, _TAP, None)
        if tap is None or self.name not in tap.blocks:
            return
        report = tap.report(self.name, is_last=True)
        del tap.blocks[self.name]
        if not tap.blocks:
            tap.uninstall()
            delattr(worker, _TAP)
        if worker.status.name.startswith("clos"):  # the scheduler may have closed the stream of Worker.log_event
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                await asyncio.wait_for(worker.scheduler.log_event(topic=self.name, msg=report), LAST_REPORT_SECONDS)


async def report_after_settling(name: str, timeout_seconds: float, ends: bool, dask_worker: Any) -> Any:
    """Report a block's counts when the transfers that began in it are through.

    Parameters
    ----------
    name
        Name of the block.
    timeout_seconds
        How long to wait for transfers in flight.
    ends
        Whether the block ends here: transfers that begin from now on are not counted.
    dask_worker
        The worker, filled in by ``Client.run``.

    Returns
    -------
    dict or None
        The report, with the transfers still ``in_flight``; None if this worker does not count for the block.
    """
    tap = getattr(dask_worker, _TAP, None)
    if tap is None or name not in tap.blocks:
        return None
    block = tap.blocks[name]
    now = time()
    if ends:
        block.until_seconds = now
    # A transfer is logged when its receiver has confirmed it, a moment after the receiver goes on with the data.
    block.settle(now, dask_worker.transfer_outgoing_count)
    # Nothing announces that, so it is looked for.
    while True:
        n = min(block.n_unsettled, dask_worker.transfer_outgoing_count)
        if n <= 0 or time() > now + timeout_seconds:
            break
        await asyncio.sleep(0.005)
    return tap.report(name) | {"in_flight": max(n, 0)}


def shards_nbytes(shards: Any) -> int:
    """Count the payload bytes of the shards that one P2P message carries.

    Parameters
    ----------
    shards
        Pickled shards, or nested tuples and lists of (partition, shard).

    Returns
    -------
    int
        Payload in bytes; the numbers of the partitions count nothing.
    """
    if isinstance(shards, (list, tuple)):
        return sum(map(shards_nbytes, shards))
    if isinstance(shards, (bytes, bytearray)):
        return len(shards)
    if type(shards) in _SMALL_TYPES or isinstance(shards, str):
        return 0
    nbytes = getattr(shards, "nbytes", None)  # arrays, memoryviews and Arrow tables say what they hold
    return nbytes if isinstance(nbytes, int) else int(dask_sizeof.sizeof(shards))


def embedded_nbytes(node: Any) -> int:
    """Count the bytes of the values that a task carries inside itself.

    Parameters
    ----------
    node
        A task as the scheduler sends it, or a part of one.

    Returns
    -------
    int
        Bytes of arguments that are values; references to other tasks, the functions and lazy arrays of files
        (which travel as a path) count next to nothing.
    """
    nbytes = 0
    parts = [node]
    for _ in range(_MOST_PARTS):
        if not parts:
            return nbytes
        part = parts.pop()
        kind = type(part)
        if kind in _SMALL_TYPES:
            continue
        if isinstance(part, Task):
            parts += part.args
            parts += part.kwargs.values()
            if type(part.func) is functools.partial:
                parts.append(part.func)
        elif kind in _CONTAINERS:
            values = part.values() if kind is dict else part
            if len(part) <= _SAMPLED_FROM or any(isinstance(value, GraphNode) for value in values):
                parts += values
            else:
                nbytes += int(dask_sizeof.sizeof(part))  # looks at some of the values only
        elif kind is str:
            nbytes += len(part)
        elif isinstance(part, DataNode):
            parts.append(part.value)
        elif kind is functools.partial:
            parts += part.args
            parts += part.keywords.values()
        elif not callable(part):
            nbytes += _value_nbytes(part)
    raise RuntimeError(f"a task of more than {_MOST_PARTS} parts")


def _value_nbytes(value: Any) -> int:
    """Sizes of xarray's containers are those of the numpy arrays in them: ``nbytes`` would count lazy ones in full."""
    if type(value).__module__.startswith("xarray."):
        variables = getattr(value, "variables", None) or getattr(value, "_coords", None) or {}
        parts = [*variables.values(), getattr(value, "_variable", None), getattr(value, "_data", None)]
        return sum(_value_nbytes(part) for part in parts if part is not None and part is not value)
    return int(dask_sizeof.sizeof(value))
