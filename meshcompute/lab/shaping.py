"""What the WAN does to a packet between two hosts (pure).

Covers rate, queue, delay, loss, partition and counters of one direction between two hosts. Does not cover packets'
content, sockets or clocks: times are given.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Counters", "Direction", "Shape"]

QUEUE_SECONDS = 0.2  # what waits for the line at most: long enough for TCP to fill it, as in routers at large
QUEUE_NBYTES_AT_LEAST = 131072  # so that slow lines still take one burst of TCP's


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How one direction between two hosts behaves.

    Attributes
    ----------
    rate_bits_per_second
        What the line carries; ``None``: as fast as it goes.
    delay_seconds
        Time from one end to the other, one way.
    loss
        Share of packets that are lost, 0 to 1.
    is_cut
        Whether nothing passes at all.
    """

    rate_bits_per_second: float | None = None
    delay_seconds: float = 0.0
    loss: float = 0.0
    is_cut: bool = False

    def __post_init__(self) -> None:
        rate = self.rate_bits_per_second
        if rate is not None and rate <= 0:
            raise ValueError(f"A rate must be more than 0 bit/s, not {rate:g}; to stop all traffic, cut the link.")
        if self.delay_seconds < 0:
            raise ValueError(f"A delay must be 0 s or more, not {self.delay_seconds:g}.")
        if not 0 <= self.loss <= 1:
            raise ValueError(f"A loss is a share from 0 to 1, not {self.loss:g}.")

    @property
    def queue_nbytes(self) -> float:
        """Bytes that may wait for the line."""
        rate = self.rate_bits_per_second or 0.0
        return max(QUEUE_NBYTES_AT_LEAST, rate / 8 * QUEUE_SECONDS)


@dataclass(slots=True, kw_only=True)
class Counters:
    """What one direction has seen, in whole IP packets: sent = delivered + dropped + what is on its way.

    Of what was sent, UDP is counted apart: it is the data plane's, the rest the control plane's.
    """

    sent_packets: int = 0
    sent_nbytes: int = 0
    sent_udp_packets: int = 0
    sent_udp_nbytes: int = 0
    delivered_packets: int = 0
    delivered_nbytes: int = 0
    dropped_packets: int = 0
    dropped_nbytes: int = 0


@dataclass(slots=True, kw_only=True)
class Direction:
    """One direction between two hosts."""

    shape: Shape = field(default_factory=Shape)
    counters: Counters = field(default_factory=Counters)
    free_at: float = 0.0

    def admit(self, nbytes: int, now: float, draw: float, *, is_udp: bool = False) -> float | None:
        """Count a packet, and decide when it arrives.

        Parameters
        ----------
        nbytes
            Its size, IP header included.
        now
            Time, in seconds.
        draw
            A random number from 0 to 1 that decides about loss.
        is_udp
            Whether it is a datagram of UDP.

        Returns
        -------
        float or None
            Time of arrival; ``None``: it is lost (and counted as dropped).
        """
        self.counters.sent_packets += 1
        self.counters.sent_nbytes += nbytes
        if is_udp:
            self.counters.sent_udp_packets += 1
            self.counters.sent_udp_nbytes += nbytes
        shape = self.shape
        start = max(now, self.free_at)
        rate = shape.rate_bits_per_second
        waiting_nbytes = 0.0 if rate is None else (start - now) * rate / 8
        if shape.is_cut or draw < shape.loss or waiting_nbytes + nbytes > shape.queue_nbytes:
            self.drop(nbytes)
            return None
        if rate is None:
            return now + shape.delay_seconds
        self.free_at = start + nbytes * 8 / rate
        return self.free_at + shape.delay_seconds

    def deliver(self, nbytes: int) -> bool:
        """Count a packet that has arrived; false if the link was cut while it was on its way."""
        if self.shape.is_cut:
            self.drop(nbytes)
            return False
        self.counters.delivered_packets += 1
        self.counters.delivered_nbytes += nbytes
        return True

    def refuse(self, nbytes: int) -> None:
        """Count a packet that was sent and does not even get on its way."""
        self.counters.sent_packets += 1
        self.counters.sent_nbytes += nbytes
        self.drop(nbytes)

    def drop(self, nbytes: int) -> None:
        """Count a packet that will never arrive."""
        self.counters.dropped_packets += 1
        self.counters.dropped_nbytes += nbytes

    def reshape(self, shape: Shape, now: float) -> None:
        """Behave differently from now on; what is on its way arrives when it was going to."""
        if shape.rate_bits_per_second != self.shape.rate_bits_per_second:
            self.free_at = now
        self.shape = shape
