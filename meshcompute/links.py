"""Links: what it takes and costs to send bytes from one pool to another, as it was given or measured.

Covers the settings ``meshcompute.links`` and ``meshcompute.objective``, the book of measured rates, and the matrices
that placement asks for. Does not cover how rates get measured (:mod:`meshcompute.scheduler.links`) or what is made of
them (:mod:`meshcompute.placement.placing`).

A link is an ordered pair: what there costs nothing may cost much on the way back.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dask.utils import parse_bytes, parse_timedelta

from meshcompute.errors import SettingError
from meshcompute.placement import placing

__all__ = ["ANY", "CLIENT", "OBJECTIVES", "Link", "LinkTable", "RateBook", "objective_of", "parse_links"]

#: Stands for every pool in ``from`` and ``to``.
ANY = "*"
#: The client's side.
CLIENT = "client"
#: What the setting ``meshcompute.objective`` may be.
OBJECTIVES = ("bytes", "money", "seconds")

_KEYS = ("from", "to", "bandwidth", "latency", "cost")
_GIGABYTE = 1e9  # as networks are billed
# Neither given nor measured: what distributed takes every connection to have (distributed.scheduler.bandwidth).
_UNMEASURED_BYTES_PER_SECOND = 100e6
_SAMPLES = 32  # the median of so many of the last transfers is a link's rate: half of them may be odd
_BITS = re.compile(r"^\s*([\d.eE+]+)\s*([kKmMgGtT]?)(?:bit|b)(?:/s|ps)\s*$")
# Where plans cost the same money, the one with fewer bytes is better: a share of the dearest price.
_TIE = 1e-6
# Plans whose bytes differ by less are the same but for their links. Less than any estimate is good for.
_SAME_BYTES = 1e-3
_TYPICAL_NBYTES = 1e6  # for which links are compared: about a chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What was said about one link.

    Attributes
    ----------
    source, destination
        Names of pools, ``"client"``, or ``"*"`` for all.
    bandwidth_bytes_per_second, latency_seconds, cost_per_gigabyte
        None: nothing was said about it. The cost is for 10^9 bytes, in whatever money.
    """

    source: str
    destination: str
    bandwidth_bytes_per_second: float | None = None
    latency_seconds: float | None = None
    cost_per_gigabyte: float | None = None


def parse_links(value: Any) -> tuple[Link, ...]:
    """Read the setting ``meshcompute.links``.

    Parameters
    ----------
    value
        A list of mappings with the keys ``from`` and ``to`` (names of pools, ``"client"``, or ``"*"`` for all), and any
        of ``bandwidth`` (bytes per second, or text such as ``"100 MiB/s"`` or ``"1 Gbit/s"``), ``latency`` (seconds, or
        text such as ``"20 ms"``) and ``cost`` (money for 10^9 bytes).

    Returns
    -------
    tuple of Link
        In the given order: later ones count where several fit a pair.

    Raises
    ------
    SettingError
        Something else stands there; it says what, and what would do.
    """
    if value is None:
        return ()
    if isinstance(value, Mapping | str) or not isinstance(value, Iterable):
        raise SettingError("links", value, "it is a list: write [{'from': 'a', 'to': 'b', 'bandwidth': '1 Gbit/s'}]")
    return tuple([_parse_link(entry) for entry in value])


def _parse_link(entry: Any) -> Link:
    if not isinstance(entry, Mapping):
        raise SettingError("links", entry, "each link is a mapping with the keys " + ", ".join(_KEYS))
    if unknown := [str(key) for key in entry if key not in _KEYS]:
        raise SettingError("links", entry, f"a link has no key {unknown[0]!r}; there are {', '.join(_KEYS)}")
    for end in ("from", "to"):
        if not isinstance(entry.get(end), str) or not entry[end]:
            raise SettingError("links", entry, f"{end!r} names a pool, 'client', or '*' for all pools")
    if entry["from"] == entry["to"] != ANY:
        raise SettingError("links", entry, "a link joins two different pools")
    return Link(
        source=entry["from"],
        destination=entry["to"],
        bandwidth_bytes_per_second=_number(entry, "bandwidth", _parse_rate, "100 MiB/s", above_zero=True),
        latency_seconds=_number(entry, "latency", _parse_seconds, "20 ms"),
        cost_per_gigabyte=_number(entry, "cost", float, "0.09"),
    )


def _number(entry: Mapping[str, Any], key: str, parse: Any, example: str, *, above_zero: bool = False) -> float | None:
    given = entry.get(key)
    if given is None:
        return None
    try:
        number = math.nan if isinstance(given, bool) else float(parse(given))
    except (TypeError, ValueError, KeyError):
        number = math.nan
    if not 0.0 <= number < math.inf or (above_zero and not number):
        raise SettingError("links", entry, f"the {key} {given!r} is not like {example!r}")
    return number


def _parse_rate(given: Any) -> float:
    if not isinstance(given, str):
        return float(given)
    if match := _BITS.match(given):
        return float(match[1]) * 1000.0 ** " kmgt".index(match[2].lower() or " ") / 8
    return float(parse_bytes(re.sub(r"\s*(/s|ps)\s*$", "", given)))


def _parse_seconds(given: Any) -> float:
    return float(parse_timedelta(given, default="seconds"))


def objective_of(value: Any) -> str:
    """Read the setting ``meshcompute.objective``.

    Parameters
    ----------
    value
        One of :data:`OBJECTIVES`.

    Raises
    ------
    SettingError
        It is something else.
    """
    if value not in OBJECTIVES:
        raise SettingError("objective", value, f"it is one of {', '.join(OBJECTIVES)}")
    return str(value)


class RateBook:
    """Rates of links as transfers showed them: for each ordered pair, the median of the last ones."""

    def __init__(self) -> None:
        self._samples: dict[tuple[str, str], deque[float]] = {}

    def add(self, source: str, destination: str, bytes_per_second: float) -> None:
        """Note one transfer between two pools.

        Parameters
        ----------
        source, destination
            The pools.
        bytes_per_second
            How fast it was.
        """
        if bytes_per_second > 0.0:
            self._samples.setdefault((source, destination), deque(maxlen=_SAMPLES)).append(bytes_per_second)

    def rates(self) -> dict[tuple[str, str], float]:
        """Bytes per second by (source, destination)."""
        return {pair: statistics.median(samples) for pair, samples in list(self._samples.items())}


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkTable:
    """All that is known of links.

    Attributes
    ----------
    given
        What was said: it counts before what was measured.
    measured
        Bytes per second by (source, destination).
    objective
        What plans are to have little of.
    """

    given: tuple[Link, ...] = ()
    measured: Mapping[tuple[str, str], float] = field(default_factory=dict)
    objective: str = "bytes"

    def _said(self, source: str, destination: str, attribute: str) -> float | None:
        for link in reversed(self.given):
            if link.source in (source, ANY) and link.destination in (destination, ANY):
                value: float | None = getattr(link, attribute)
                if value is not None:
                    return value
        return None

    def bytes_per_second(self, source: str, destination: str) -> float:
        """Rate of a link: given, measured, or else what distributed takes every connection to have."""
        said = self._said(source, destination, "bandwidth_bytes_per_second")
        return said or self.measured.get((source, destination)) or _UNMEASURED_BYTES_PER_SECOND

    def is_known(self, source: str, destination: str) -> bool:
        """Whether the rate of a link was given or measured."""
        return (
            self._said(source, destination, "bandwidth_bytes_per_second") is not None
            or (source, destination) in self.measured
        )

    def latency_seconds(self, source: str, destination: str) -> float:
        """Latency of a link; nothing where none was given."""
        return self._said(source, destination, "latency_seconds") or 0.0

    def cost(self, source: str, destination: str, nbytes: float) -> float | None:
        """Money for some bytes, None where no price was given."""
        price = self._said(source, destination, "cost_per_gigabyte")
        return None if price is None else price * nbytes / _GIGABYTE

    def seconds(self, source: str, destination: str, nbytes: float, n_values: int = 1) -> float:
        """Time that some values take across a link, one after the other."""
        return nbytes / self.bytes_per_second(source, destination) + n_values * self.latency_seconds(
            source, destination
        )

    def costs(
        self, pools: Sequence[str], threads: Sequence[float] | None = None, *, has_replicas: bool = False
    ) -> placing.Links | None:
        """Say what crossing costs, as placement asks for it.

        Parameters
        ----------
        pools
            Names of the pools, in the order of the matrices.
        threads
            Threads of every pool, for the objective ``seconds``.
        has_replicas
            Whether some tasks may run in several pools, which are named: as many bytes may then cross better links.

        Returns
        -------
        placing.Links or None
            None: every byte between two pools costs the same.

        Raises
        ------
        SettingError
            The objective is money, and a pair of pools has no price.
        """
        if self.objective == "seconds":
            return placing.Links.of_seconds(
                [[self.bytes_per_second(a, b) for b in pools] for a in pools],
                [[self.latency_seconds(a, b) if a != b else 0.0 for b in pools] for a in pools],
                bytes_per_second_to_client=[self.bytes_per_second(a, CLIENT) for a in pools],
                latencies_seconds_to_client=[self.latency_seconds(a, CLIENT) for a in pools],
                threads=threads,
            )
        if self.objective == "money":
            prices = [[self._price(a, b) if a != b else 0.0 for b in pools] for a in pools]
            to_client = [self.cost(a, CLIENT, 1.0) or 0.0 for a in pools]
            tie = _TIE * (max([*to_client, *(price for row in prices for price in row)]) or 1.0 / _GIGABYTE)
            return placing.Links.of_money(
                [[price + tie if i != j else 0.0 for j, price in enumerate(row)] for i, row in enumerate(prices)],
                to_client,
            )
        return self._bytes_by_sooner_links(pools) if has_replicas else None

    def _bytes_by_sooner_links(self, pools: Sequence[str]) -> placing.Links | None:
        """Let bytes cost the same but for a trifle, by which the sooner one of two links is the better one."""
        if len(pools) < 3 or not any(self.is_known(a, b) for a in pools for b in pools if a != b):
            return None  # of two pools, one has the reader
        seconds = [[self.seconds(a, b, _TYPICAL_NBYTES) if a != b else 0.0 for b in pools] for a in pools]
        longest = max(max(row) for row in seconds)
        return placing.Links(
            per_byte=[
                [1.0 + _SAME_BYTES * time / longest if i != j else 0.0 for j, time in enumerate(row)]
                for i, row in enumerate(seconds)
            ]
        )

    def _price(self, source: str, destination: str) -> float:
        price = self.cost(source, destination, 1.0)
        if price is None:
            raise SettingError(
                "links",
                [f"{link.source} -> {link.destination}" for link in self.given],
                f"the objective is money, and {source} -> {destination} has no cost: give it one, or give one to "
                "{'from': '*', 'to': '*'}",
            )
        return price
