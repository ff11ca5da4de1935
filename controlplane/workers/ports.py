"""Ports of this host's 127.0.0.1 at which a scheduler is reached.

Covers taking them, or saying by name which one is taken. Does not cover what goes through them.
"""

from __future__ import annotations

import socket

from controlplane.workers.base import PortTakenError, WorkerSpec

__all__ = ["listen_locally"]

BACKLOG = 128


def listen_locally(spec: WorkerSpec) -> list[socket.socket]:
    """Listen at the ports of a scheduler: Dask itself would take another port, or fail where nobody looks.

    Parameters
    ----------
    spec
        The scheduler's unit.

    Returns
    -------
    list of socket.socket
        For clients, and for browsers if it has a dashboard.

    Raises
    ------
    PortTakenError
        Somebody else listens there, or may not this process.
    """
    listeners: list[socket.socket] = []
    for port in (spec.client_port, spec.dashboard_port):
        if port is None:
            continue
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listeners.append(listener)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended take no port
        try:
            listener.bind(("127.0.0.1", port))
            listener.listen(BACKLOG)
        except OSError as exc:
            for opened in listeners:
                opened.close()
            raise PortTakenError(
                f"127.0.0.1:{port}, where scheduler {spec.name!r} should be reached, cannot be had ({exc.strerror}): "
                "ask for another port, or end what listens there."
            ) from exc
    return listeners
