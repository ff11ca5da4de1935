"""The WAN of the lab: one thread that moves packets between the TUN devices of the hosts.

Covers devices, the loop, capture, and changes at run time. Does not cover what is decided about a packet
(``shaping``, ``nat``), nor who asks for changes (``supervisor``). The devices die with the process that made them.
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
from pathlib import Path
from typing import BinaryIO

from meshcompute.lab.nat import Nat
from meshcompute.lab.packets import UDP, addresses_of, unreachable
from meshcompute.lab.shaping import Direction, Shape

__all__ = ["Wan", "open_tun"]

TUNSETIFF = 0x400454CA  # linux/if_tun.h
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
PACKET_NBYTES = 65536
BATCH = 64  # packets of one device before the others get their turn
IDLE_SECONDS = 3600.0
PCAP_MAGIC, LINKTYPE_RAW = 0xA1B2C3D4, 101  # draft-ietf-opsawg-pcap


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
    router
        Address that answers for targets to which there is no way.
    """

    def __init__(self, devices: Mapping[str, int], addresses: Mapping[str, bytes], shape: Shape, router: bytes) -> None:
        self.devices = dict(devices)
        self.addresses = dict(addresses)
        self.directions = {pair: Direction(shape=shape) for pair in permutations(devices, 2)}
        self.nats: dict[str, Nat] = {}
        self.capture: BinaryIO | None = None
        self.unroutable_packets = 0
        self._router = router
        self._names_by_fd = {fd: name for name, fd in devices.items()}
        self._names_by_address = {address: name for name, address in addresses.items()}
        self._under_way: list[tuple[float, int, str, str, bytes]] = []
        self._sequence = 0
        self._handlers: dict[int, Callable[[], None]] = {}
        self._is_running = True
        self._woken, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.watch(self._woken, lambda: None)

    def watch(self, fd: int, handler: Callable[[], None]) -> None:
        """Call a handler from the loop whenever a descriptor can be read."""
        self._handlers[fd] = handler

    def stop(self) -> None:
        """End the loop; from any thread or signal handler."""
        self._is_running = False
        os.write(self._wake, b"!")

    def reshape(self, source: str, target: str, shape: Shape) -> None:
        """Let one direction behave differently from now on."""
        self.directions[source, target].reshape(shape, time.monotonic())

    def start_capture(self, path: str) -> None:
        """Write every packet that enters the WAN to a file that tcpdump and wireshark read."""
        self.stop_capture()
        self.capture = Path(path).open("wb", buffering=0)  # noqa: SIM115 - open until the capture ends
        self.capture.write(struct.pack("=IHHiIII", PCAP_MAGIC, 2, 4, 0, 0, PACKET_NBYTES, LINKTYPE_RAW))

    def stop_capture(self) -> None:
        """Write no more."""
        if self.capture is not None:
            self.capture.close()
        self.capture = None

    def run(self) -> None:
        """Move packets until :meth:`stop`."""
        while self._is_running:
            now = time.monotonic()
            while self._under_way and self._under_way[0][0] <= now:
                _, _, source, target, packet = heapq.heappop(self._under_way)
                self._deliver(source, target, packet, now)
            timeout = self._under_way[0][0] - now if self._under_way else IDLE_SECONDS
            # select, because its timeout is in microseconds; epoll's is in milliseconds, too coarse for a rate.
            readable, _, _ = select.select([*self._names_by_fd, *self._handlers], [], [], max(0.0, timeout))
            for fd in readable:
                if fd in self._names_by_fd:
                    self._read(fd)
                else:
                    self._handlers[fd]()

    def _read(self, fd: int) -> None:
        source = self._names_by_fd[fd]
        for _ in range(BATCH):
            try:
                packet = os.read(fd, PACKET_NBYTES)
            except OSError:  # nothing more, or the host's device is down
                return
            self._forward(source, packet, time.monotonic())

    def _forward(self, source: str, packet: bytes, now: float) -> None:
        addresses = addresses_of(packet)
        if addresses is None:  # IPv6: hosts ask for routers, and there are none
            self.unroutable_packets += 1
            return
        target = self._names_by_address.get(addresses[1])
        if target is None or target == source:
            self.unroutable_packets += 1
            answer = unreachable(packet, self._router)
            if answer is not None:
                self._write(source, answer)
            return
        direction = self.directions[source, target]
        if source in self.nats:
            translated = self.nats[source].send(packet, now)
            if translated is None:
                direction.refuse(len(packet))
                return
            packet = translated
        if self.capture is not None:
            self._record(packet)
        arrives_at = direction.admit(len(packet), now, random.random(), is_udp=packet[9] == UDP)
        if arrives_at is None:
            return
        if arrives_at <= now:
            self._deliver(source, target, packet, now)
            return
        self._sequence += 1  # packets with one time of arrival keep their order
        heapq.heappush(self._under_way, (arrives_at, self._sequence, source, target, packet))

    def _deliver(self, source: str, target: str, packet: bytes, now: float) -> None:
        direction = self.directions[source, target]
        if target in self.nats:
            translated = self.nats[target].receive(packet, now)
            if translated is None:
                direction.drop(len(packet))
                return
            packet = translated
        if direction.deliver(len(packet)):
            self._write(target, packet)

    def _write(self, target: str, packet: bytes) -> None:
        with suppress(OSError):  # the host's device is down: it was delivered, and nobody was there
            os.write(self.devices[target], packet)

    def _record(self, packet: bytes) -> None:
        assert self.capture is not None
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        head = struct.pack("=IIII", seconds, nanoseconds // 1000, len(packet), len(packet))
        try:
            self.capture.write(head + packet)
        except OSError:  # a full disk ends the capture, not the WAN
            self.stop_capture()
