"""Packing on a scheduler: the setting reaches all workers, and results on their way to a client are unpacked.

Covers what is hooked into a scheduler. Does not cover the workers (:mod:`meshcompute.packedtransfers`) or the codec
(:mod:`meshcompute.packing`).

A result goes from a worker to the scheduler, which hands it on to the client as it came. So the scheduler asks for
packed results, being at the client's side of the WAN, and unpacks them: a client needs nothing of ours, and no codec.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from distributed.protocol.pickle import dumps
from distributed.protocol.serialize import Serialized

from meshcompute.packedtransfers import PLUGIN_NAME, PackingPlugin, announce, prepare_unpacking, withdraw
from meshcompute.packing import OFF, WIRE_NAME, Given, mode_of, unpack
from meshcompute.settings import setting
from meshcompute.shipping import by_value

__all__ = ["CLIENT", "apply_mode"]

logger = logging.getLogger(__name__)

#: The scheduler's side of a link.
CLIENT = "client"
_STATE = "_meshcompute_packing"
#: What workers are told: the mode, and rates of links.
_Told = tuple[str, tuple[Given, ...]]


class _State:
    """What is applied on one scheduler."""

    def __init__(self) -> None:
        self.wanted: _Told | None = None
        self.present: _Told | None = (OFF, ())  # workers have no plugin; None: they were told in part
        self.lock = asyncio.Lock()
        self.gather: Any = None


def apply_mode(scheduler: Any, mode: str | None) -> None:
    """Let all workers of a scheduler pack as the settings say, on its event loop, in the background. Idempotent.

    Parameters
    ----------
    scheduler
        A running scheduler.
    mode
        The setting of the client that asks. None: it has none, so that what was applied before stays; at first it is
        the setting of the scheduler's own process.
    """
    state: _State | None = getattr(scheduler, _STATE, None)
    if state is None:
        state = _State()
        setattr(scheduler, _STATE, state)
    if mode is None:
        mode = state.wanted[0] if state.wanted else mode_of(setting("compression"))
    wanted = mode, _given(scheduler) if mode != OFF else ()
    if wanted != state.wanted:
        state.wanted = wanted
        scheduler._ongoing_background_tasks.call_soon(_apply, scheduler, state)


def _given(scheduler: Any) -> tuple[Given, ...]:
    """Rates of links that were given: a worker that has not measured a link yet decides by them."""
    said = [(link.source, link.destination, link.bandwidth_bytes_per_second) for link in scheduler.pool_links.given]
    return tuple([(source, destination, rate) for source, destination, rate in said if rate])


async def _apply(scheduler: Any, state: _State) -> None:
    async with state.lock:
        wanted = state.wanted
        if wanted is None or wanted == state.present:
            return
        mode, given = wanted
        try:
            await scheduler.register_worker_plugin(
                None, plugin=_by_value(PackingPlugin(mode, given)), name=PLUGIN_NAME, idempotent=False
            )
            if mode == OFF:
                withdraw(scheduler)
            else:
                await _accept(scheduler, state)
            state.present = wanted
        except Exception:
            logger.exception("Not all workers could be told how to pack values. compression=%s", mode)
            state.wanted = state.present = None  # the next graph tries again


def _by_value(plugin: PackingPlugin) -> bytes:
    return bytes(dumps(by_value(plugin, modules=["meshcompute.packing"])))


async def _accept(scheduler: Any, state: _State) -> None:
    """Ask for packed results, where they can be unpacked."""
    codecs = await asyncio.to_thread(prepare_unpacking)
    if not codecs:
        return
    if state.gather is None:
        state.gather = original = scheduler.handlers["gather"]

        async def gather(keys: Any, serializers: Any = None) -> Any:
            answer = await original(keys=keys, serializers=serializers)
            packed = [value for value in answer.get("data", {}).values() if _is_packed(value)]
            if packed:
                await asyncio.to_thread(_unpack_all, packed)
            return answer

        scheduler.handlers["gather"] = gather
    announce(scheduler, [CLIENT], codecs)


def _is_packed(value: Any) -> bool:
    return isinstance(value, Serialized) and WIRE_NAME in value.header.get("compression", ())


def _unpack_all(values: list[Serialized]) -> None:
    for value in values:
        names = value.header["compression"]
        value.frames = [
            unpack(frame) if name == WIRE_NAME else frame for name, frame in zip(names, value.frames, strict=True)
        ]
        value.header["compression"] = tuple(None if name == WIRE_NAME else name for name in names)
