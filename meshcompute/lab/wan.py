"""The WAN of the lab: one thread that moves packets between the TUN devices of the hosts.

Covers devices, the loop, and changes at run time. Does not cover what is decided about a packet (``shaping``,
``nat``), nor who asks for changes (``supervisor``). The devices die with the process that made them.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import permutations

from meshcompute.lab.shaping import Direction, Shape

__all__ = ["Wan", "open_tun"]

TUNSETIFF = 0x400454CA  # linux/if_tun.h
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
PACKET_NBYTES = 65536
BATCH = 64  # packets of one device before the others get their turn
IDLE_SECONDS = 3600.0


def open_tun(name: str) -> int:
    """Make a TUN device in this process's network namespace.

    Parameters
    ----------
    name
        Name of the device, at most 15 characters.

    Returns
    -------
    int
        File descriptor; closing it removes the device, wherever it has been moved to.
    """
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return fd


class Wan:
    """Packets between hosts.

    Parameters
    ----------
    devices
        File descriptor of each host's TUN device, by the host's name.
    addresses
        IPv4 address of each host on the WAN, as 4 bytes.
    shape
        How every direction behaves at first.
    """

    def __init__(self, devices: Mapping[str, int], addresses: Mapping[str, bytes], shape: Shape) -> None:
        self.devices = dict(devices)
        self.addresses = dict(addresses)
        self.directions = {pair: Direction(shape=shape) for pair in permutations(devices, 2)}
        self.unroutable_packets = 0
        self._names_by_fd = {fd: name for name, fd in devices.items()}
        self._names_by_address = {address: name for name, address in addresses.items()}
        self._under_way: list[tuple[float, int, Direction, int, bytes]] = []
        self._sequence = 0
        self._handlers: dict[int, Callable[[], None]] = {}
        self._is_running = True
        self._woken, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.watch(self._woken, lambda: None)

    def watch(self, fd: int, handler: Callable[[], None]) -> None:
        """Call a handler from the loop whenever a descriptor can be read."""
        self._handlers[fd] = handler

    def unwatch(self, fd: int) -> None:
        """Do so no more."""
        self._handlers.pop(fd, None)

    def stop(self) -> None:
        """End the loop; from any thread or signal handler."""
        self._is_running = False
        os.write(self._wake, b"!")

    def run(self) -> None:
        """Move packets until :meth:`stop`."""
        while self._is_running:
            now = time.monotonic()
            self._deliver_until(now)
            timeout = self._under_way[0][0] - now if self._under_way else IDLE_SECONDS
            # select, because its timeout is in microseconds; epoll's is in milliseconds, too coarse for a rate.
            readable, _, _ = select.select([*self._names_by_fd, *self._handlers], [], [], max(0.0, timeout))
            for fd in readable:
                if fd in self._names_by_fd:
                    self._read(fd)
                elif fd in self._handlers:
                    self._handlers[fd]()

    def _read(self, fd: int) -> None:
        source = self._names_by_fd[fd]
        for _ in range(BATCH):
            try:
                packet = os.read(fd, PACKET_NBYTES)
            except (BlockingIOError, OSError):  # nothing more, or the host's device is down
                return
            self._forward(source, packet)

    def _forward(self, source: str, packet: bytes) -> None:
        target = self._names_by_address.get(packet[16:20]) if packet[0] >> 4 == 4 else None
        if target is None or target == source:
            self.unroutable_packets += 1
            return
        direction = self.directions[source, target]
        now = time.monotonic()
        arrives_at = direction.admit(len(packet), now, random.random())
        if arrives_at is None:
            return
        if arrives_at <= now:
            self._write(direction, self.devices[target], packet)
            return
        self._sequence += 1
        heapq.heappush(self._under_way, (arrives_at, self._sequence, direction, self.devices[target], packet))

    def _deliver_until(self, now: float) -> None:
        while self._under_way and self._under_way[0][0] <= now:
            _, _, direction, fd, packet = heapq.heappop(self._under_way)
            self._write(direction, fd, packet)

    def _write(self, direction: Direction, fd: int, packet: bytes) -> None:
        if direction.deliver(len(packet)):
            with suppress(OSError):  # the host's device is down: it was delivered, and nobody was there
                os.write(fd, packet)
