"""The few fields of IPv4 packets that the WAN reads and rewrites (pure).

Covers addresses, ports, checksums, and the answer of a router that knows no way. Does not cover IPv6, fragments'
ports, or what is decided with these.
"""

from __future__ import annotations

import struct

__all__ = [
    "ICMP",
    "TCP",
    "UDP",
    "addresses_of",
    "is_fragment",
    "ports_of",
    "rewrite_source",
    "rewrite_target",
    "unreachable",
]

ICMP, TCP, UDP = 1, 6, 17  # IANA protocol numbers
ECHO_REPLY, ECHO_REQUEST = 0, 8
CHECKSUM_AT = {ICMP: 2, TCP: 16, UDP: 6}  # offset in the header of the protocol
HEADER_NBYTES = 20
QUOTED_NBYTES = 8  # of the payload, in an ICMP error (RFC 792)


def addresses_of(packet: bytes) -> tuple[bytes, bytes] | None:
    """Tell source and target of an IPv4 packet; ``None`` for anything else."""
    if len(packet) < HEADER_NBYTES or packet[0] >> 4 != 4:
        return None
    return packet[12:16], packet[16:20]


def is_fragment(packet: bytes) -> bool:
    """Tell whether a packet is a part of a larger one, so that it may have no ports."""
    return bool(int.from_bytes(packet[6:8]) & 0x3FFF)


def ports_of(packet: bytes) -> tuple[int, int, int] | None:
    """Tell protocol, source port and target port; echo requests and replies have one number for both.

    Parameters
    ----------
    packet
        An IPv4 packet.

    Returns
    -------
    tuple of int or None
        ``None`` where there are no ports: fragments, ICMP errors, other protocols.
    """
    protocol, start = packet[9], (packet[0] & 15) * 4
    if is_fragment(packet) or len(packet) < start + 8:
        return None
    if protocol in {TCP, UDP}:
        return (protocol, int.from_bytes(packet[start : start + 2]), int.from_bytes(packet[start + 2 : start + 4]))
    if protocol == ICMP and packet[start] in {ECHO_REPLY, ECHO_REQUEST}:
        number = int.from_bytes(packet[start + 4 : start + 6])
        return protocol, number, number
    return None


def rewrite_source(packet: bytes, address: bytes, port: int) -> bytes:
    """Give a packet that has ports another source, with checksums that fit."""
    return _rewrite(packet, 12, 0, address, port)


def rewrite_target(packet: bytes, address: bytes, port: int) -> bytes:
    """Give a packet that has ports another target, with checksums that fit."""
    return _rewrite(packet, 16, 2, address, port)


def _rewrite(packet: bytes, address_at: int, port_at: int, address: bytes, port: int) -> bytes:
    changed = bytearray(packet)
    protocol, start = packet[9], (packet[0] & 15) * 4
    number_at = start + (4 if protocol == ICMP else port_at)
    number = port.to_bytes(2)
    old_address, old_number = (packet[address_at : address_at + 4], packet[number_at : number_at + 2])
    changed[address_at : address_at + 4] = address
    changed[number_at : number_at + 2] = number
    _adjust(changed, 10, old_address, address)
    # The checksums of TCP and UDP cover the addresses, too; the one of ICMP does not.
    covered = (b"", b"") if protocol == ICMP else (old_address, address)
    at = start + CHECKSUM_AT[protocol]
    has_none = protocol == UDP and packet[at : at + 2] == b"\0\0"  # allowed over IPv4 (RFC 768)
    if not has_none:
        _adjust(changed, at, covered[0] + old_number, covered[1] + number)
    return bytes(changed)


def _adjust(packet: bytearray, at: int, old: bytes, new: bytes) -> None:
    """Update a checksum for bytes that changed (RFC 1624, equation 3)."""
    total = ~int.from_bytes(packet[at : at + 2]) & 0xFFFF
    for i in range(0, len(old), 2):
        total += (~int.from_bytes(old[i : i + 2]) & 0xFFFF) + int.from_bytes(new[i : i + 2])
    packet[at : at + 2] = (~_fold(total) & 0xFFFF).to_bytes(2)


def _fold(total: int) -> int:
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def _checksum(data: bytes) -> bytes:
    padded = data + b"\0" * (len(data) % 2)
    return (~_fold(sum(struct.unpack(f"!{len(padded) // 2}H", padded))) & 0xFFFF).to_bytes(2)


def unreachable(packet: bytes, router: bytes) -> bytes | None:
    """Make the answer of a router that knows no way to the packet's target.

    Parameters
    ----------
    packet
        An IPv4 packet.
    router
        Address of the router.

    Returns
    -------
    bytes or None
        ICMP "host unreachable" (RFC 792) for the packet's source; ``None`` for packets that must not be answered.
    """
    if packet[9] == ICMP or is_fragment(packet) or packet[16] >= 224:  # never an error about an error, or a group
        return None
    start = (packet[0] & 15) * 4
    body = struct.pack("!BBHI", 3, 1, 0, 0) + packet[: start + QUOTED_NBYTES]
    body = body[:2] + _checksum(body) + body[4:]
    header = struct.pack("!BBHHHBBH", 0x45, 0xC0, HEADER_NBYTES + len(body), 0, 0, 64, ICMP, 0)
    header += router + packet[12:16]
    return header[:10] + _checksum(header) + header[12:] + body
