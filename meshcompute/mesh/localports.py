"""Ports of this host's loopback address, for what people open in a browser or a client.

Covers choosing one. Does not cover holding it: whoever is first gets it.
"""

from __future__ import annotations

import socket

from meshcompute.errors import MeshError

__all__ = ["PortTakenError", "choose_port"]


class PortTakenError(MeshError, OSError):
    """A port of this host that was asked for is in use.

    Parameters
    ----------
    what
        What the port is for.
    port
        Its number.
    """

    def __init__(self, what: str, port: int) -> None:
        super().__init__(what, port)
        self.what = what
        self.port = port
        self.args = (what, port)

    def __str__(self) -> str:
        return (
            f"Port {self.port} of 127.0.0.1, wanted for the {self.what}, is in use; end what listens there, name "
            "another port, or name none and a free one is taken."
        )


def choose_port(what: str, wanted: int | None, usual: int, *, but_not: int | None = None) -> int:
    """Take the port that was asked for, else the usual one, else one that is free.

    Parameters
    ----------
    what
        What it is for.
    wanted
        The port that was asked for, if any.
    usual
        What people expect where none was asked for.
    but_not
        A port that is taken in a moment.

    Returns
    -------
    int
        Its number.

    Raises
    ------
    PortTakenError
        The port that was asked for is in use.
    """
    for port in (wanted or usual, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: old connections do not count
            try:
                probe.bind(("127.0.0.1", port))
                chosen = int(probe.getsockname()[1])
            except OSError as exc:
                if wanted is not None:
                    raise PortTakenError(what, wanted) from exc
                continue
            if chosen != but_not:
                return chosen
    raise PortTakenError(what, usual)
