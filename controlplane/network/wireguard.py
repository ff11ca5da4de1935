"""The one door to WireGuard's tools: keys, configuration, and what an interface knows.

Covers ``wg`` for interfaces of the kernel and of wireguard-go alike. Does not cover making interfaces
(:mod:`controlplane.network.interfaces`), deciding about peers (:mod:`controlplane.network.peers`), nor what the text
of ``wg`` means (:mod:`controlplane.network.wgformat`).

Facts that shape it (wireguard-tools 1.0.20210914, wireguard-go 0.0.20220316):

- ``wg syncconf`` without the private key erases it, so peers change by ``wg set``.
- wireguard-go's control socket keeps the name that the interface was made with, wherever the interface goes.
- ``wg`` resolves names of hosts where it runs, which is no place that has a resolver: endpoints must be numbers.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable, Sequence

from controlplane.command import run
from controlplane.errors import ApplyError
from controlplane.network.peers import Step
from controlplane.network.wgformat import InterfaceDump, PrivateKey, parse_dump, render_steps

__all__ = [
    "WireGuard",
    "generate_key",
    "public_key_of",
    "resolve",
]


async def generate_key() -> PrivateKey:
    """Make a new private key."""
    return PrivateKey((await run(["wg", "genkey"])).stdout.strip())


async def public_key_of(key: PrivateKey) -> str:
    """Compute the public key that goes with a private one."""
    return (await run(["wg", "pubkey"], stdin=key.reveal() + "\n")).stdout.strip()


async def resolve(endpoint: str) -> str:
    """Find the address that an endpoint's name stands for; IPv4 first, as most sites have it.

    Raises
    ------
    ApplyError
        The name is not known.
    """
    host, _colon, port = endpoint.rpartition(":")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError) as exc:  # the latter for names that cannot be names
        raise ApplyError(f"The host of {endpoint!r} is not known here ({exc}). Write an address instead.") from exc
    family, _type, _protocol, _name, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    number = str(address[0])
    return f"[{number}]:{port}" if family == socket.AF_INET6 else f"{number}:{port}"


class WireGuard:
    """``wg`` for one interface.

    Parameters
    ----------
    name
        Of the interface, as it was made.
    wrapper
        Command that enters the namespaces where ``wg`` finds the interface.
    """

    def __init__(self, name: str, wrapper: Sequence[str] = ()) -> None:
        self.name = name
        self._wrapper = tuple(wrapper)

    async def set_key(self, key: PrivateKey) -> None:
        """Give the interface its private key, through a pipe."""
        await run([*self._wrapper, "wg", "set", self.name, "private-key", "/dev/fd/0"], stdin=key.reveal() + "\n")

    async def set_port(self, listen_port: int) -> None:
        """Listen at this UDP port; the interface should be up, or a port that is taken is not noticed."""
        await run([*self._wrapper, "wg", "set", self.name, "listen-port", str(listen_port)])

    async def apply(self, steps: Iterable[Step]) -> None:
        """Do these steps, in this order. Endpoints must be numbers."""
        arguments = render_steps(steps)
        if arguments:
            await run([*self._wrapper, "wg", "set", self.name, *arguments])

    async def show(self) -> InterfaceDump:
        """Read everything that the interface knows."""
        return parse_dump((await run([*self._wrapper, "wg", "show", self.name, "dump"])).stdout)
