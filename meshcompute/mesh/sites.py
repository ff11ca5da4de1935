"""How a person names a site, and how it is said that one cannot be had.

Covers parsing ``user@host[:port]`` and ``local``, and the errors that name a site, the cause and the cure. Pure: it
opens nothing (:mod:`meshcompute.mesh.control` does).

Our part of the tree of errors::

    MeshError
    └── SiteError                                   something about one site; has .site
        ├── SiteAddressError (also ValueError)      what was written names no site
        ├── SiteUnreachableError (also OSError)     its daemon cannot be talked to; .cause is one of CAUSES
        └── SiteRefusedError (also RuntimeError)    its daemon answered with an error; .kind as in the protocol
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from meshcompute.errors import MeshError
from meshcompute.protocol import DEFAULT_SOCKET

__all__ = [
    "CAUSES",
    "Cause",
    "SiteAddress",
    "SiteAddressError",
    "SiteError",
    "SiteRefusedError",
    "SiteUnreachableError",
    "parse_site",
]

Cause = Literal[
    "no_ssh",  # this host has no OpenSSH client
    "no_route",  # the host's name or address leads nowhere, or nobody listens there
    "unknown_host_key",
    "changed_host_key",
    "refused_key",
    "not_installed",  # the host has no meshcompute-site
    "no_daemon",  # ... it has, and no daemon answers
    "forwarding_forbidden",  # ... and neither forwarding nor the daemon's command gives a way in
    "wrong_version",
    "no_answer",  # it was fine, and then no answer came in time
    "other",
]
CAUSES: tuple[str, ...] = get_args(Cause)

LOCAL = "local"
MAX_PORT = 65535
# What OpenSSH and resolvers take. A leading '-' would be read as an option by ssh, so neither may start with one.
_USER = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.$-]{0,63}")
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252})")
_IPV6 = re.compile(r"[0-9A-Fa-f:.]+(%[A-Za-z0-9_.-]+)?")


class SiteError(MeshError):
    """Something about one site.

    Parameters
    ----------
    site
        The site, as it was written: ``mesh@10.8.0.4``.
    message
        What happened, and what to do next.
    """

    def __init__(self, site: str, message: str) -> None:
        super().__init__(site, message)
        self.site = site
        self.message = message

    def __str__(self) -> str:
        return f"Site {self.site}: {self.message}"


class SiteAddressError(SiteError, ValueError):
    """What was written names no site."""

    def __str__(self) -> str:
        return f"{self.site!r} names no site: {self.message}. Write user@host or user@host:port, e.g. mesh@10.8.0.4."


class SiteUnreachableError(SiteError, OSError):
    """A site's daemon cannot be talked to.

    Parameters
    ----------
    site
        The site, as it was written.
    cause
        One of :data:`CAUSES`.
    message
        The cause and the cure in one sentence.
    """

    def __init__(self, site: str, cause: Cause, message: str) -> None:
        super().__init__(site, message)
        self.cause: Cause = cause
        self.args = (site, cause, message)


class SiteRefusedError(SiteError, RuntimeError):
    """A site's daemon answered with an error.

    Parameters
    ----------
    site
        The site, as it was written.
    kind
        A key of :data:`meshcompute.protocol.STATUS_BY_ERROR_KIND`.
    message
        What the daemon said: what, which value, what to do next.
    """

    def __init__(self, site: str, kind: str, message: str) -> None:
        super().__init__(site, message)
        self.kind = kind
        self.args = (site, kind, message)


class SiteStartError(SiteError, RuntimeError):
    """A site was reached, and could not do what it was asked to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteAddress:
    """Where a site's control daemon is.

    Attributes
    ----------
    host
        A name, an address, or a ``Host`` of ``~/.ssh/config``; None for a daemon of this host.
    user
        The account there; None leaves it to ``~/.ssh/config``.
    port
        SSH's port; None leaves it to ``~/.ssh/config``.
    socket
        Path of the daemon's unix socket, there.
    """

    host: str | None
    user: str | None = None
    port: int | None = None
    socket: str = DEFAULT_SOCKET

    @property
    def is_local(self) -> bool:
        """Whether the daemon is on this host."""
        return self.host is None

    def __str__(self) -> str:
        if self.host is None:
            return LOCAL if self.socket == DEFAULT_SOCKET else f"{LOCAL}:{self.socket}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        user = "" if self.user is None else f"{self.user}@"
        return f"{user}{host}" + ("" if self.port is None else f":{self.port}")


def parse_site(text: str, *, socket: str = DEFAULT_SOCKET) -> SiteAddress:
    """Read what a person wrote for a site.

    Parameters
    ----------
    text
        ``user@host``, ``user@host:port``, ``user@[v6]:port``, a ``Host`` of ``~/.ssh/config``; ``local`` or
        ``local:/path/to.sock`` for a daemon of this host.
    socket
        Path of the daemon's socket on that host, where the text does not say.

    Returns
    -------
    SiteAddress
        What it means.

    Raises
    ------
    SiteAddressError
        It means nothing.
    """
    if text == LOCAL:
        return SiteAddress(host=None, socket=socket)
    if text.startswith(f"{LOCAL}:"):
        path = text.removeprefix(f"{LOCAL}:")
        if not path.startswith("/"):
            raise SiteAddressError(text, f"after 'local:' comes the absolute path of a socket, not {path!r}")
        return SiteAddress(host=None, socket=path)
    user, at, rest = text.rpartition("@")
    if at and not _USER.fullmatch(user):
        raise SiteAddressError(text, f"{user!r} is no account's name" if user else "there is nothing before the '@'")
    if rest.startswith("["):
        host, bracket, port = rest[1:].partition("]")
        if not bracket or not _IPV6.fullmatch(host) or (port and not port.startswith(":")):
            raise SiteAddressError(text, f"{rest!r} is no IPv6 address in brackets")
    elif rest.count(":") > 1:
        raise SiteAddressError(text, f"an IPv6 address goes in brackets: {user}{at}[{rest}]")
    else:
        host, colon, port = rest.partition(":")
        port = colon + port
        if not _HOST.fullmatch(host):
            raise SiteAddressError(text, f"{host!r} is no host's name" if host else "the host is missing")
    number = port.removeprefix(":")
    if port and not (number.isascii() and number.isdecimal() and 1 <= int(number[:6]) <= MAX_PORT):
        raise SiteAddressError(text, f"{number!r} is no port from 1 to {MAX_PORT}")
    return SiteAddress(host=host, user=user or None, port=int(number) if port else None, socket=socket)
