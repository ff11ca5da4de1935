"""Packing on a worker: the plugin that packs what the worker sends to other sites, and unpacks what comes.

Covers what is hooked into a worker: the handler ``get_data``, the connection that it writes to, and what the worker
says of itself when it connects. Does not cover the decision and the codec (:mod:`meshcompute.packing`).

Like :mod:`meshcompute.transfers` it travels to the workers by value and imports of ours only what travels with it. A
worker that asks another for values connects to it, and in Dask's own handshake it says its pools and the codecs that it
has. The asked worker packs if it is in none of those pools. Who says nothing (stock workers and clients) gets plain
bytes; connections that are older than the plugin are closed when they are idle, so that their successors say it.

Notes
-----
Not packed: what a client scatters or hands over in a task, P2P shuffles, actors, what a client gathers with
``direct=True``, and what workers without a pool send or get. What goes to the scheduler, on its way to a client, is
unpacked by the scheduler: any client can read it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import sys
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

from dask import sizeof as dask_sizeof  # the module: its dispatcher, pickled by value, would be a copy
from distributed.diagnostics.plugin import WorkerPlugin
from distributed.metrics import context_meter
from distributed.protocol import compression  # the module: its registry, pickled by value, would be a copy
from distributed.protocol.serialize import Serialized, serialize_and_split
from tornado.ioloop import IOLoop

from meshcompute.packing import (
    AUTO,
    MIN_NBYTES,
    MIN_SAVED,
    OFF,
    WIRE_NAME,
    Chooser,
    Given,
    Links,
    Transfer,
    Trial,
    codecs_here,
    is_worth_a_sample,
    pack,
    unpack,
)

__all__ = ["ANNOUNCED", "PLUGIN_NAME", "PackingPlugin", "announce", "link_to", "prepare_unpacking", "withdraw"]

#: Name of the plugin.
PLUGIN_NAME = "meshcompute-packing"
#: What we add to Dask's handshake.
ANNOUNCED = "meshcompute"
POOL_PREFIX = "pool-"
_SAID = "_meshcompute_said"
_MIN_RTT_OFFSET = 148  # tcpi_min_rtt of struct tcp_info, microseconds (linux/tcp.h, since 4.6)


def prepare_unpacking() -> tuple[str, ...]:
    """Let this process read packed frames. They may come as long as it lives, so this is never undone.

    Returns
    -------
    tuple of str
        The codecs that it has.
    """
    codecs = codecs_here()
    if codecs:
        compression.compressions[WIRE_NAME] = compression.Compression(WIRE_NAME, _pack_nothing, unpack)
    return tuple(name for name in codecs if _can_read(name))


def _can_read(codec: str) -> bool:
    """Try the way that a value will take: one that cannot be read at its end would be asked for again for ever."""
    plain = bytes(range(256)) * 16
    packed = pack(plain, Trial(codec, 1, 4, 1.0, 0.0))
    (there,) = compression.decompress({"compression": (WIRE_NAME,)}, [packed])
    return bytes(there) == plain


def _pack_nothing(frame: Any) -> Any:
    """Stand in for a codec that Dask itself may pack with: ours is told how by a trial."""
    return frame


def announce(server: Any, pools: list[str], codecs: tuple[str, ...]) -> None:
    """Say in every handshake from now on which pools a server is in, and what it can unpack.

    Parameters
    ----------
    server
        A worker or scheduler.
    pools
        Names; ``"client"`` for a scheduler.
    codecs
        What it has.
    """
    _say(server.rpc, {"pools": pools, "codecs": list(codecs)})


def withdraw(server: Any) -> None:
    """Undo :func:`announce`."""
    _say(server.rpc, None)


def _say(connections: Any, said: dict[str, Any] | None) -> None:
    overrides = {
        k: v for k, v in (connections.connection_args.get("handshake_overrides") or {}).items() if k != ANNOUNCED
    }
    if said is not None:
        overrides[ANNOUNCED] = said
    connections.connection_args["handshake_overrides"] = overrides
    if not hasattr(connections, _SAID):
        _renew_when_idle(connections, connections.reuse)
    setattr(connections, _SAID, said)
    connections.collect()  # idle connections have said something else: the next ones do not


def _renew_when_idle(connections: Any, original: Callable[[str, Any], None]) -> None:
    """Let a server's connections close one that is handed back, if it has said what is no longer so."""

    def reuse(address: str, comm: Any) -> None:
        original(address, comm)
        idle = connections.available[address]
        if comm in idle and comm.local_info.get(ANNOUNCED) != getattr(connections, _SAID):
            idle.discard(comm)
            IOLoop.current().add_callback(comm.close)  # as ConnectionPool.collect does: what is written still goes out
            connections.semaphore.release()

    connections.reuse = reuse


def link_to(own_pools: set[str], handshake: Mapping[str, Any]) -> tuple[str, tuple[str, ...]] | None:
    """Tell what lies between a worker and whoever connected to it.

    Parameters
    ----------
    own_pools
        The worker's pools.
    handshake
        What the other side said as it connected.

    Returns
    -------
    tuple of (str, tuple of str) or None
        The other side's pools as the link's name, and its codecs; None: the same site, or nobody knows.
    """
    said = handshake.get(ANNOUNCED)
    if not own_pools or not isinstance(said, Mapping):
        return None
    pools, codecs = sorted(said.get("pools", ())), tuple(said.get("codecs", ()))
    if not pools or not codecs or own_pools & set(pools):
        return None
    return "+".join(pools), codecs


def _round_trip_seconds(comm: Any) -> float | None:
    """Shortest round trip of a connection, as the kernel saw it; None where it does not say."""
    with contextlib.suppress(AttributeError, OSError, struct.error):
        info = comm.stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        return float(struct.unpack_from("I", info, _MIN_RTT_OFFSET)[0]) / 1e6
    return None


class PackingComm:
    """A connection to another site, for one answer: packs what is written, and learns how fast it went.

    Parameters
    ----------
    comm
        The connection.
    packer
        The worker's.
    link
        Name of the link, and the codecs of its other end.
    """

    def __init__(self, comm: Any, packer: Packer, link: tuple[str, tuple[str, ...]]) -> None:
        self._comm = comm
        self._packer = packer
        self._link, self._codecs = link
        self._plain_nbytes = self._written_nbytes = 0
        self._packing_seconds = self._began = 0.0
        self._round_trip = _round_trip_seconds(comm)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    async def write(self, msg: Any, serializers: Any = None, on_error: str = "message") -> Any:
        """Write a message; values in it are packed."""
        self._plain_nbytes = sum(self._packer.sizes(msg).values())
        began = perf_counter()
        rate = self._packer.rate(self._link, self._round_trip, self._plain_nbytes, is_near=self._comm.same_host)
        packed = await self._packer.packed(
            self._comm, msg, serializers=serializers, on_error=on_error, codecs=self._codecs, rate=rate
        )
        self._began = perf_counter()
        self._packing_seconds = self._began - began if packed is not msg else 0.0
        self._written_nbytes = await self._comm.write(packed, serializers=serializers, on_error=on_error)
        return self._written_nbytes

    async def read(self, deserializers: Any = None) -> Any:
        """Read the other side's word that it has everything."""
        answer = await self._comm.read(deserializers=deserializers)
        now = perf_counter()
        sending_seconds = now - self._began - (self._round_trip or 0.0)
        transfer = Transfer(self._plain_nbytes, self._written_nbytes, self._packing_seconds, sending_seconds)
        self._packer.links.note(self._link, transfer, now)
        return answer


class Packer:
    """Packs what one worker sends.

    Parameters
    ----------
    worker
        The worker.
    mode
        The setting.
    codecs
        Names of the codecs that this process has.
    given
        What was said of links.
    """

    def __init__(self, worker: Any, mode: str, codecs: tuple[str, ...], given: tuple[Given, ...] = ()) -> None:
        self.worker = worker
        self.mode = mode
        self.codecs = codecs
        self.links = Links(_pools_of(worker), given)
        self._has_failed = False

    def rate(self, link: str, round_trip_seconds: float | None, nbytes: int, *, is_near: bool) -> float:
        """Say for which speed of a link to decide, in bytes per second; 0 where a codec is given by the setting."""
        if self.mode != AUTO:
            return 0.0
        if is_near:
            return float("inf")
        return self.links.bytes_per_second(link, round_trip_seconds, perf_counter(), nbytes)

    def sizes(self, msg: Any) -> dict[Any, int]:
        """Tell the sizes of the values in an answer, in bytes by key."""
        return {key: self.worker.state.tasks[key].nbytes or 0 for key in msg.get("data", ())}

    async def packed(
        self, comm: Any, msg: Any, *, serializers: Any, on_error: str, codecs: tuple[str, ...], rate: float
    ) -> Any:
        """Pack the values of an answer to ``get_data``, in a thread; the message itself where that cannot pay.

        Parameters
        ----------
        comm
            The connection.
        msg
            The answer.
        serializers, on_error
            How to serialise, as Dask says.
        codecs
            What the other side can unpack.
        rate
            Speed of the link in bytes per second.
        """
        usable = [name for name in self.codecs if name in codecs and self.mode in (AUTO, name)]
        sizes = self.sizes(msg)
        large = {key: value for key, value in msg.get("data", {}).items() if sizes[key] >= MIN_NBYTES}
        if not usable or not is_worth_a_sample(sum(sizes[key] for key in large), rate):
            return msg
        context = {"sender": comm.local_info, "recipient": comm.remote_info, **comm.handshake_options}

        def pack_all() -> tuple[dict[Any, Any], float]:
            seconds = 0.0
            values = {}
            chooser = Chooser(usable, rate)
            for key, value in large.items():
                header, frames = serialize_and_split(value, serializers, on_error, context, comm.max_shard_size)
                began = perf_counter()
                values[key] = Serialized(*pack_frames(header, frames, chooser, context.get("compression")))
                seconds += perf_counter() - began
            return values, seconds

        try:
            values, seconds = await asyncio.to_thread(pack_all)
        except Exception as exc:  # whatever it is, the plain value can be sent, or Dask says why not
            if not self._has_failed:
                logging.getLogger("meshcompute.packing").warning(
                    "Values for other sites go plain where packing them fails. worker=%s error=%r",
                    self.worker.address,
                    exc,
                )
            self._has_failed = True
            return msg
        context_meter.digest_metric("compress", seconds, "seconds")
        return {**msg, "data": {**msg["data"], **values}}


def pack_frames(
    header: dict[str, Any], frames: list[Any], chooser: Chooser, stock: str | None
) -> tuple[dict[str, Any], list[Any]]:
    """Pack those frames of a serialised value for which it pays.

    Parameters
    ----------
    header, frames
        The value, as ``serialize_and_split`` makes it.
    chooser
        Of the message.
    stock
        Dask's own compression of this connection, for the other frames.

    Returns
    -------
    tuple of (dict, list)
        Header and frames, for ``Serialized``.
    """
    names = list(header["compression"])
    frames = list(frames)
    for i, frame in enumerate(frames):
        if names[i] is not None:
            continue
        how = chooser.choose(frame)
        packed = pack(frame, how) if how is not None else None
        if packed is not None and len(packed) <= (1 - MIN_SAVED) * memoryview(frame).nbytes:
            names[i], frames[i] = WIRE_NAME, packed
        else:
            names[i], frames[i] = compression.maybe_compress(frame, compression=stock)
    return {**header, "compression": tuple(names)}, frames


def weigh_groups() -> None:
    """Let Dask weigh flox's parts of variances: it sees nothing in them, and plans and measurements go by its sizes."""

    def register() -> None:
        with contextlib.suppress(ImportError):  # another flox
            from flox.multiarray import MultiArray

            dask_sizeof.sizeof.register(MultiArray, lambda part: sum(map(dask_sizeof.sizeof, part.arrays)))

    if "flox" in sys.modules:
        register()
    else:
        dask_sizeof.sizeof.register_lazy("flox", register)


class PackingPlugin(WorkerPlugin):
    """Pack what workers send to other sites, on every worker, those that join later too.

    Parameters
    ----------
    mode
        The setting ``meshcompute.compression``.
    given
        Rates of the setting ``meshcompute.links``.
    """

    def __init__(self, mode: str, given: tuple[Given, ...] = ()) -> None:
        self.mode = mode
        self.given = given
        self._undo: Callable[[], None] | None = None
        self._opening: asyncio.Task[None] | None = None

    def setup(self, worker: Any) -> None:
        """Begin, in the background: importing the codecs takes a moment that no boot should wait for.

        Parameters
        ----------
        worker
            The worker.
        """
        weigh_groups()
        if self.mode != OFF:
            self._opening = asyncio.get_running_loop().create_task(self._open(worker))

    async def _open(self, worker: Any) -> None:
        try:
            codecs = await asyncio.to_thread(prepare_unpacking)
        except Exception as exc:
            logging.getLogger("meshcompute.packing").warning("No codec here. worker=%s error=%r", worker.address, exc)
            codecs = ()
        if not codecs:
            return  # nothing is announced, so that nobody packs for this worker either
        packer = Packer(worker, self.mode, codecs, self.given)
        original = worker.handlers["get_data"]

        async def get_data(comm: Any, **kwargs: Any) -> Any:
            link = None
            if getattr(comm, "max_shard_size", None):  # TCP and TLS; inside one process nothing is serialised
                link = link_to(_pools_of(worker), comm.remote_info)
            return await original(comm if link is None else PackingComm(comm, packer, link), **kwargs)

        def undo() -> None:
            if worker.handlers.get("get_data") is get_data:
                worker.handlers["get_data"] = original
            withdraw(worker)

        self._undo = undo
        worker.handlers["get_data"] = get_data
        announce(worker, sorted(_pools_of(worker)), codecs)

    def teardown(self, worker: Any) -> None:
        """Stop packing.

        Parameters
        ----------
        worker
            The worker.
        """
        if self._opening is not None:
            self._opening.cancel()
        if self._undo is not None:
            self._undo()


def _pools_of(worker: Any) -> set[str]:
    resources = worker.state.total_resources
    return {name.removeprefix(POOL_PREFIX) for name in resources if name.startswith(POOL_PREFIX)}
