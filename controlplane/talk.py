"""Talk to the daemon from its own host: ``meshcompute-site ping``, ``connect``, ``list`` and so on.

Covers single questions over the socket, and passing bytes between a socket and this process's standard input and
output: what a client runs through SSH to find out why it cannot reach a site, and where sshd forbids forwarding. Loads
nothing but the standard library, because it runs for every connection.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import selectors
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from controlplane.errors import SiteError

__all__ = [
    "NoAnswerError",
    "Pong",
    "RefusedError",
    "UnixConnection",
    "end",
    "list_clusters",
    "metrics",
    "ping",
    "splice",
]

TIMEOUT_SECONDS = 5.0
MAX_ANSWER_NBYTES = 1 << 26
FIRST_ERROR = 400  # RFC 9110, 15.5
CHUNK_NBYTES = 1 << 16
LINGER_SECONDS = 10.0  # of silence after our own end; longer than the daemon waits for the machine before it answers


class NoAnswerError(SiteError):
    """Nobody answers at the socket, or not as a site's daemon does."""


class RefusedError(SiteError):
    """The daemon understood, and refuses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    """What the daemon said."""

    is_healthy: bool
    messages: tuple[str, ...]


def _connected(path: str) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    peer.settimeout(TIMEOUT_SECONDS)
    try:
        peer.connect(path)
    except FileNotFoundError:
        peer.close()
        raise NoAnswerError(
            f"There is no socket {path}: the daemon does not run. Start it (systemctl start meshcompute-site), or name "
            "another socket with --socket."
        ) from None
    except ConnectionRefusedError:
        peer.close()
        raise NoAnswerError(
            f"Nobody listens at {path}: the daemon has ended. See journalctl -u meshcompute-site, and start it again."
        ) from None
    except PermissionError:
        peer.close()
        raise NoAnswerError(
            f"This account may not reach {path}. Folder (mode 0755) and socket (0666) must be open to everybody."
        ) from None
    except OSError as exc:
        peer.close()
        raise NoAnswerError(f"{path} cannot be reached: {exc.strerror or exc}. Is it the daemon's socket?") from exc
    return peer


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket.

    Parameters
    ----------
    path
        The socket.
    """

    def __init__(self, path: str) -> None:
        super().__init__("site", timeout=TIMEOUT_SECONDS)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = _connected(self._path)


def ping(path: str) -> Pong:
    """Ask the daemon whether it can do its work.

    Parameters
    ----------
    path
        Its socket.

    Returns
    -------
    Pong
        Its answer.

    Raises
    ------
    NoAnswerError
        With the reason why there is none.
    """
    with _answers_expected(path):
        content = _ask(path, "GET", "/v1/health")
        conditions = content["conditions"]
        return Pong(
            is_healthy=bool(content["is_healthy"]),
            messages=tuple(str(condition["message"]) for condition in conditions if not condition["is_true"]),
        )


def list_clusters(path: str) -> list[dict[str, Any]]:
    """Ask for all clusters that this account may see; operators see everybody's.

    Parameters
    ----------
    path
        The daemon's socket.

    Returns
    -------
    list of dict
        The daemon's words for each (:class:`meshcompute.protocol.ClusterStatus`).

    Raises
    ------
    NoAnswerError
        With the reason why there is no answer.
    RefusedError
        This account may not use the site.
    """
    with _answers_expected(path):
        return [dict(status) for status in _ask(path, "GET", "/v1/clusters")]


def end(path: str, cluster_id: str) -> None:
    """End a cluster.

    Parameters
    ----------
    path
        The daemon's socket.
    cluster_id
        The cluster, or the beginning of its id, if it is the only one.

    Raises
    ------
    NoAnswerError
        With the reason why there is no answer.
    RefusedError
        There is no such cluster, or more than one, or it is somebody else's.
    """
    found = [status for status in list_clusters(path) if status["cluster_id"].startswith(cluster_id)]
    if len(found) != 1:
        raise RefusedError(f"{len(found)} clusters here begin with {cluster_id!r}: see meshcompute-site list.")
    with _answers_expected(path):
        _ask(path, "DELETE", f"/v1/clusters/{found[0]['cluster_id']}?epoch={found[0]['epoch']}")


def metrics(path: str) -> str:
    """Ask for the numbers for monitoring, as Prometheus reads them.

    Parameters
    ----------
    path
        The daemon's socket.

    Returns
    -------
    str
        The text.

    Raises
    ------
    NoAnswerError
        With the reason why there is no answer.
    RefusedError
        The daemon does not say.
    """
    with _answers_expected(path):
        return _fetch(path, "GET", "/v1/metrics").decode()


def _ask(path: str, method: str, url: str) -> Any:
    return json.loads(_fetch(path, method, url))


def _fetch(path: str, method: str, url: str) -> bytes:
    connection = UnixConnection(path)
    try:
        connection.request(method, url)
        response = connection.getresponse()
        content = response.read(MAX_ANSWER_NBYTES)
        if response.status >= FIRST_ERROR:
            raise RefusedError(str(json.loads(content)["error"]["message"]))
        return content
    finally:
        connection.close()


@contextlib.contextmanager
def _answers_expected(path: str) -> Iterator[None]:
    """Say of whatever else comes back that it is no answer."""
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as exc:
        raise NoAnswerError(
            f"What listens at {path} gives no answer of a site's daemon ({type(exc).__name__}: {exc}). "
            "See journalctl -u meshcompute-site."
        ) from exc


def splice(path: str, source: int = 0, sink: int = 1) -> None:
    """Pass bytes between the daemon's socket and two file descriptors, until the daemon or both ends are done.

    Parameters
    ----------
    path
        The daemon's socket.
    source
        What comes in here goes to the daemon. Its end is not passed on: the daemon would take it for a client that is
        gone, and give no answer. The rest of an answer is waited for, but not for long.
    sink
        What the daemon says goes here.

    Raises
    ------
    NoAnswerError
        If nobody listens at the socket.
    """
    with _connected(path) as peer, selectors.DefaultSelector() as selector:
        peer.settimeout(None)
        selector.register(peer, selectors.EVENT_READ)
        with contextlib.suppress(PermissionError):  # a file is always ready, and epoll does not take it
            selector.register(source, selectors.EVENT_READ)
        linger_seconds: float | None = None
        while True:
            ready = {key.fileobj for key, _events in selector.select(linger_seconds)}
            if not ready:
                return
            if peer in ready:
                chunk = _received(peer)
                if not chunk or not _write_all(sink, chunk):
                    return
            if source in ready:
                chunk = os.read(source, CHUNK_NBYTES)
                if chunk:
                    try:
                        peer.sendall(chunk)
                    except (BrokenPipeError, ConnectionResetError):
                        return
                else:
                    selector.unregister(source)
                    linger_seconds = LINGER_SECONDS


def _received(peer: socket.socket) -> bytes:
    try:
        return peer.recv(CHUNK_NBYTES)
    except ConnectionResetError:
        return b""


def _write_all(sink: int, chunk: bytes) -> bool:
    view = memoryview(chunk)
    try:
        while view:
            view = view[os.write(sink, view) :]
    except BrokenPipeError:
        return False
    return True
