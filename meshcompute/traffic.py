"""Measuring what crosses between pools while a block of code runs.

Covers the client's side: opening a block on every worker, collecting what each counted, and adding it up per ordered
pair of pools. Does not cover how a worker counts (:mod:`meshcompute.transfers`), predictions
(:mod:`meshcompute.planning`) or pictures (:mod:`meshcompute.plots`).
"""

from __future__ import annotations

import asyncio
import html
import uuid
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self

from dask.utils import format_bytes
from distributed import WorkerPlugin
from distributed.client import Client, default_client
from distributed.metrics import time

from meshcompute import transfers
from meshcompute.errors import NoClientError, PoolsMissingError
from meshcompute.pools import pools_of_resources
from meshcompute.shipping import by_value

__all__ = ["CLIENT", "EXCLUDED", "UNPOOLED", "Traffic", "measure_traffic"]

#: The client's side: the client itself and the scheduler beside it.
CLIENT = transfers.CLIENT
#: Workers that belong to no pool.
UNPOOLED = "unpooled"
#: How long the end of a block waits for transfers that are still in flight.
SETTLE_SECONDS = 10.0

EXCLUDED = (
    f"Messages of the scheduler: states, keys, functions, values under {transfers.EMBEDDED_MIN_NBYTES} bytes in tasks.",
    "The way of data between the client and its scheduler, which is the client's side too.",
    "Actors, client.run(), queues, variables, events, uploaded files, the dashboard: Dask does not size them.",
    "What tasks read and write themselves: files, object stores, sockets.",
    "What the network adds: TCP, IP and tunnel headers, and what is sent again after a loss.",
)


class Traffic:
    """Bytes that crossed between pools inside a block; what :func:`measure_traffic` gives.

    Parameters
    ----------
    client
        The Dask client, or None for the current one when the block begins.

    Notes
    -----
    Read inside its block, every figure is fetched from the workers anew (with an asynchronous client: is that of
    the last :meth:`refresh` or of the last second). After the block the figures stand.
    """

    def __init__(self, client: Client | None = None) -> None:
        self._client = client
        self._name = f"meshcompute-traffic-{uuid.uuid4().hex}"
        self._is_open = False
        self._began_seconds = 0.0
        self._ended_seconds: float | None = None
        self._reports: dict[tuple[str, str], dict[str, Any]] = {}  # (address, id of the worker) to its last one
        self._reported_seconds: dict[tuple[str, str], float] = {}
        self._pool_of_address: dict[str, str] = {}
        self._seen: set[str] = set()
        self._pools: set[str] = set()
        self._warnings: list[str] = []

    # Opening and closing

    def __enter__(self) -> Self:
        client = self._require_client()
        if client.asynchronous:
            raise TypeError("This client is asynchronous: write `async with measure_traffic(client) as traffic:`.")
        client.sync(self._open)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        client = self._require_client()
        if client.status == "closed":
            self._abandon()
        else:
            client.sync(self._close)

    async def __aenter__(self) -> Self:
        client = self._require_client()
        if not client.asynchronous:
            raise TypeError("This client is not asynchronous: write `with measure_traffic(client) as traffic:`.")
        await self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._require_client().status == "closed":
            self._abandon()
        else:
            await self._close()

    def _require_client(self) -> Any:
        if self._client is None:
            try:
                self._client = default_client()
            except ValueError as exc:
                raise NoClientError("measure_traffic") from exc
        return self._client

    async def _open(self) -> None:
        client = self._require_client()
        if self._ended_seconds is not None or self._is_open:
            raise RuntimeError("This measurement has been used: call measure_traffic() again for another block.")
        workers = await self._observe_workers()
        if workers and not self._pools:
            raise PoolsMissingError(client.scheduler.address, len(workers))
        client.subscribe_topic(self._name, _receiver(self))
        try:
            await client.register_plugin(_Travelling(transfers.TransferPlugin(self._name)), name=self._name)
        except BaseException:
            await self._remove_plugin()
            raise
        self._began_seconds = time()
        self._is_open = True

    async def _close(self) -> None:
        if not self._is_open:
            return
        try:
            await self._collect(ends=True)
        except (OSError, RuntimeError) as exc:  # a scheduler that is gone must not hide the error of the block
            self._warnings.append(f"The last counts of the workers could not be had: {exc!r}.")
        finally:
            self._ended_seconds = time()
            self._is_open = False
            await self._remove_plugin()
            self._client = None  # the figures may live long; they need no client

    def _abandon(self) -> None:
        self._ended_seconds = time()
        self._is_open = False
        self._client = None
        self._warnings.append(
            "The client was closed inside the block: these are the counts of the last reports, and the counters "
            "stay on the workers until those end. Close the client after the block."
        )

    async def _remove_plugin(self) -> None:
        client = self._require_client()
        try:
            await client.unregister_worker_plugin(self._name)
            await client.run_on_scheduler(by_value(_forget_topic), self._name)
        except (OSError, RuntimeError, ValueError) as exc:
            self._warnings.append(f"The counters could not be taken from the workers: {exc!r}.")

    # Collecting

    def refresh(self) -> Any:
        """Fetch the figures from the workers, once the transfers in flight are through.

        Returns
        -------
        None or Awaitable
            To be awaited with an asynchronous client.
        """
        return self._require_client().sync(self._collect, ends=False)

    async def _observe_workers(self) -> dict[str, Any]:
        identity = await self._require_client().scheduler.identity(n_workers=-1)
        workers: dict[str, Any] = identity["workers"]
        for address, worker in workers.items():
            self._note_pools(address, pools_of_resources(worker["resources"]))
        return workers

    def _note_pools(self, address: str, pools: Iterable[str]) -> None:
        pools = tuple(pools)
        self._seen.add(address)
        self._pools.update(pools)
        self._pool_of_address[address] = "+".join(pools) or UNPOOLED

    def _receive(self, report: dict[str, Any]) -> None:
        key = report["address"], report["worker_id"]
        known = self._reports.get(key)
        if known is None or report["n_counted"] >= known["n_counted"]:
            self._reports[key] = report
            self._reported_seconds[key] = time()
            self._note_pools(report["address"], report["pools"])

    async def _collect(self, *, ends: bool) -> None:
        client = self._require_client()
        workers = await self._observe_workers()
        answers = await client.run(
            by_value(transfers.report_after_settling), self._name, SETTLE_SECONDS, ends, on_error="return"
        )
        now = time()
        for address, report in answers.items():
            if isinstance(report, dict):
                self._receive(report)
                if ends and report["in_flight"]:
                    self._warnings.append(
                        f"{report['in_flight']} transfers from {address} had not ended {SETTLE_SECONDS:g} s after the "
                        "block; they are not counted."
                    )
        if not ends:
            return
        answered = {address for address, report in answers.items() if isinstance(report, dict)}
        gone = self._seen - answered
        while gone - self._last() and time() < now + transfers.LAST_REPORT_SECONDS:  # noqa: ASYNC110
            # The last reports take another way than the answers, and nothing announces that there is none.
            await asyncio.sleep(0.02)
        for address in sorted(gone):
            keys = [key for key in self._reports if key[0] == address]
            if address in workers:
                self._warnings.append(f"Worker {address} did not answer ({answers.get(address)!r}).")
            if not keys:
                self._warnings.append(f"Worker {address} was lost and had reported nothing; what it sent is missing.")
            for key in keys:
                if not self._reports[key]["is_last"]:
                    age = now - self._reported_seconds[key]
                    self._warnings.append(
                        f"Worker {address} was lost; what it sent after its last report, {age:.1f} s before the end "
                        "of the block, is missing."
                    )

    def _last(self) -> set[str]:
        return {address for (address, _), report in self._reports.items() if report["is_last"]}

    # Reading

    def _sum(self, column: int) -> dict[tuple[str, str], int]:
        if self._is_open and not self._require_client().asynchronous:
            self.refresh()
        sums: dict[tuple[str, str], int] = defaultdict(int)
        for kind_source_destination, counts in self._rows():
            _, source, destination = kind_source_destination
            if source != destination:
                sums[source, destination] += counts[column]
        return dict(sorted(sums.items()))

    def _rows(self) -> Iterable[tuple[tuple[str, str, str], tuple[int, int, int]]]:
        for report in list(self._reports.values()):
            for kind, source, destination, *counts in report["rows"]:
                yield (kind, self._pool(source), self._pool(destination)), tuple(counts)

    def _pool(self, address: str) -> str:
        return CLIENT if address == CLIENT else self._pool_of_address.get(address, UNPOOLED)

    @property
    def bytes_between_pools(self) -> dict[tuple[str, str], int]:
        """Payload bytes by (source pool, destination pool), as large as the values are in memory.

        The client's side is ``"client"``, workers without a pool are ``"unpooled"``, a worker in several pools is in
        ``"a+b"``. What stays inside a pool is not in it.
        """
        return self._sum(1)

    @property
    def wire_bytes_between_pools(self) -> dict[tuple[str, str], int]:
        """Bytes by (source pool, destination pool) as Dask wrote them to its connections.

        Packed where they cross between sites (setting ``meshcompute.compression``). Known for what workers send each
        other and the client; for P2P, scatter and data inside tasks Dask does not say it, and the payload stands here.
        """
        return self._sum(2)

    @property
    def transfers_between_pools(self) -> dict[tuple[str, str], int]:
        """Messages with data by (source pool, destination pool)."""
        return self._sum(0)

    @property
    def transfers(self) -> int:
        """Messages with data between pools, all pairs together."""
        return sum(self.transfers_between_pools.values())

    @property
    def bytes_by_kind(self) -> dict[str, int]:
        """Payload bytes between pools by what moved them.

        ``gather``: a worker took its input from another; ``result``: to the client; ``shuffle``: P2P; ``scatter``
        and ``task``: from the client, the latter inside tasks.
        """
        if self._is_open and not self._require_client().asynchronous:
            self.refresh()
        sums: dict[str, int] = defaultdict(int)
        for (kind, source, destination), counts in self._rows():
            if source != destination:
                sums[kind] += counts[1]
        return dict(sorted(sums.items()))

    @property
    def pools(self) -> tuple[str, ...]:
        """Names of the pools that were seen, sorted."""
        return tuple(sorted(self._pools))

    @property
    def duration_seconds(self) -> float:
        """Length of the block, so far if it has not ended."""
        if not self._began_seconds:
            return 0.0
        return (self._ended_seconds or time()) - self._began_seconds

    @property
    def excluded(self) -> tuple[str, ...]:
        """What is not counted and why, one sentence each."""
        missing = sorted({text for report in self._reports.values() for text in report["missing"]})
        return (*EXCLUDED, *(f"With this version of Dask, this could not be counted: {text}." for text in missing))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was lost in this block: workers that died, transfers that did not end; one sentence each."""
        return tuple(self._warnings)

    def __str__(self) -> str:
        rows = self._table()
        if not rows:
            lines = [f"Nothing crossed between pools in {self.duration_seconds:.1f} s"]
        else:
            widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
            lines = [
                "  ".join(
                    [
                        row[0].ljust(widths[0]),
                        row[1].ljust(widths[1]),
                        *(cell.rjust(w) for cell, w in zip(row[2:], widths[2:], strict=True)),
                    ]
                )
                for row in rows
            ]
            lines.insert(0, f"Bytes between pools in {self.duration_seconds:.1f} s")
        return "\n".join([*lines, *(f"Warning: {text}" for text in self.warnings)])

    def __repr__(self) -> str:
        state = "open" if self._is_open else "ended" if self._ended_seconds else "not begun"
        return f"<Traffic {state}, {format_bytes(sum(self.bytes_between_pools.values()))} between pools>"

    def _table(self) -> list[tuple[str, ...]]:
        nbytes = self.bytes_between_pools
        wire, n = self._settled(self.wire_bytes_between_pools, nbytes), self.transfers_between_pools
        if not nbytes:
            return []
        rows: list[tuple[str, ...]] = [("from", "to", "bytes", "on the wire", "transfers")]
        rows += [(*pair, format_bytes(nbytes[pair]), format_bytes(wire[pair]), str(n[pair])) for pair in nbytes]
        if len(nbytes) > 1:
            total = sum(nbytes.values()), sum(wire.values()), sum(n.values())
            rows.append(("total", "", format_bytes(total[0]), format_bytes(total[1]), str(total[2])))
        return rows

    @staticmethod
    def _settled(later: Mapping[tuple[str, str], int], first: Mapping[tuple[str, str], int]) -> dict[Any, int]:
        return {pair: later.get(pair, 0) for pair in first}

    def _repr_html_(self) -> str:
        rows = self._table()
        title = f"Bytes between pools in {self.duration_seconds:.1f} s"
        if not rows:
            body = "<p>Nothing crossed.</p>"
        else:
            head, *data = [[html.escape(cell) for cell in row] for row in rows]
            body = "<table><thead><tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr></thead><tbody>"
            body += "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in data)
            body += "</tbody></table>"
        notes = "".join(f"<li>{html.escape(text)}</li>" for text in self.excluded)
        warnings = "".join(f"<p><b>Warning:</b> {html.escape(text)}</p>" for text in self.warnings)
        return (
            f"<div><b>{title}</b>{body}{warnings}"
            f"<details><summary>What is not counted</summary><ul>{notes}</ul></details></div>"
        )


def measure_traffic(client: Client | None = None) -> Traffic:
    """Measure the bytes that cross between pools inside a ``with`` block.

    Parameters
    ----------
    client
        The Dask client; the current one if not given. With an asynchronous client write ``async with``.

    Returns
    -------
    Traffic
        A context manager, readable inside its block and after it: ``bytes_between_pools``, ``transfers``,
        ``duration_seconds``, ``excluded``, and a table when printed.

    Raises
    ------
    NoClientError
        There is no client.
    PoolsMissingError
        The cluster has workers, and none belongs to a pool.

    Notes
    -----
    The whole cluster is counted, whoever causes the transfers. A transfer belongs to the block in which it begins,
    so that blocks one after the other share nothing, and a block inside another is counted in both. Wait for the
    results inside the block: what has not begun when it ends is not counted. Nothing stays on the workers.

    Examples
    --------
    >>> with measure_traffic() as traffic:  # doctest: +SKIP
    ...     difference.compute()
    >>> traffic.bytes_between_pools  # doctest: +SKIP
    {('ecmwf', 'eumetsat'): 4915200, ('eumetsat', 'client'): 4915200}
    """
    return Traffic(client)


class _Travelling(WorkerPlugin):
    """Stand-in for a plugin of ours that unpickles as the plugin itself, on workers without meshcompute too."""

    def __init__(self, plugin: WorkerPlugin) -> None:
        self.plugin = plugin

    def __reduce__(self) -> tuple[Any, ...]:
        return by_value(self.plugin).__reduce__()


def _receiver(traffic: Traffic) -> Callable[[tuple[float, dict[str, Any]]], None]:
    """Make a handler of reports that does not keep the traffic alive: Dask clients never forget a handler."""
    reference = weakref.ref(traffic)

    def receive(event: tuple[float, dict[str, Any]]) -> None:
        target = reference()
        if target is not None:
            target._receive(event[1])

    return receive


def _forget_topic(name: str, dask_scheduler: Any) -> None:
    """Drop the reports of an ended block, and the subscription, from the scheduler's memory."""
    dask_scheduler._broker._topics.pop(name, None)
