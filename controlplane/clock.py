"""The one door to time.

Covers reading clocks and waiting. Everything else in this package gets a :class:`Clock` or a number of seconds, so
that tests move time by hand.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Protocol

__all__ = ["Clock", "SystemClock"]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Clock(Protocol):
    """What the daemon needs of time."""

    @property
    def boot_id(self) -> str:
        """What monotonic times are comparable within: the machine's boot."""

    def monotonic(self) -> float:
        """Seconds of a clock that is never set, the same in every process of this boot."""

    def wall(self) -> float:
        """Seconds since 1970: only for ages of what must survive a boot."""

    async def wait(self, event: asyncio.Event, timeout_seconds: float | None) -> bool:
        """Wait until the event is set (True), or the time is over (False)."""


class SystemClock:
    """The machine's clocks."""

    def __init__(self) -> None:
        self._boot_id = ""

    @property
    def boot_id(self) -> str:
        """The kernel's name of this boot."""
        if not self._boot_id:
            self._boot_id = _BOOT_ID.read_text(encoding="ascii").strip()
        return self._boot_id

    def monotonic(self) -> float:
        """CLOCK_MONOTONIC: stands still while a machine sleeps, so a laptop that wakes finds its clusters."""
        return time.monotonic()

    def wall(self) -> float:
        """CLOCK_REALTIME."""
        return time.time()

    async def wait(self, event: asyncio.Event, timeout_seconds: float | None) -> bool:
        """Wait in the running loop."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await event.wait()
        except TimeoutError:
            return False
        return True
