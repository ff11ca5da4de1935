"""A port of a host of the lab, made reachable at this machine's 127.0.0.1: the dashboard in the machine's browser.

Covers listening, connecting and passing bytes on. Does not cover UDP, nor finding the host (``cli``).

The socket that listens is made in the machine's network namespace and handed to a process that then lives in the
host's, and connects there. So no route, address or rule of the machine is needed, and it ends with the lab.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress

__all__ = ["listen", "main", "render_forwarder"]

CHUNK_NBYTES = 65536


def listen(port: int) -> socket.socket:
    """Listen at a port of 127.0.0.1; 0 takes a free one.

    Raises
    ------
    OSError
        The port is taken, or not for us.
    """
    return socket.create_server(("127.0.0.1", port))


def render_forwarder(listener: socket.socket, pid: int, target: str) -> Sequence[str]:
    """Render the command that passes on what comes to a socket, which it must inherit.

    Parameters
    ----------
    listener
        A socket that listens.
    pid
        A process of the host.
    target
        ``address:port`` as the host sees it.
    """
    forwarder = [sys.executable, "-m", __name__, "--listen-fd", str(listener.fileno()), "--target", target]
    dies_with_parent = ["setpriv", "--pdeathsig", "KILL"]
    # In the host's pid namespace, too, so that it cannot outlive the host and keep its network alive.
    enter = ["nsenter", f"--target={pid}", "--net", "--pid", "--"]
    return [*dies_with_parent, *enter, *dies_with_parent, *forwarder]


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(CHUNK_NBYTES):
            writer.write(data)
            await writer.drain()
        writer.write_eof()


async def _serve(listener: socket.socket, host: str, port: int) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(host, port)
        except OSError:  # nobody listens there, or not yet
            writer.close()
            return
        try:
            await asyncio.gather(_pass_on(reader, far_writer), _pass_on(far_reader, writer))
        finally:
            writer.close()
            far_writer.close()

    server = await asyncio.start_server(handle, sock=listener)
    await server.serve_forever()


def main() -> None:
    """Pass bytes on until killed; the command line is for :func:`render_forwarder` only."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen-fd", type=int, required=True)
    parser.add_argument("--target", required=True)
    arguments = parser.parse_args()
    host, _, port = arguments.target.rpartition(":")
    with suppress(KeyboardInterrupt):
        asyncio.run(_serve(socket.socket(fileno=arguments.listen_fd), host, int(port)))


if __name__ == "__main__":
    main()
