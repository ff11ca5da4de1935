"""Join a site's workers to what its operator lets them reach beside their cluster: an object store on the site's LAN.

Covers forwarding the bytes of TCP connections: its listeners are in the gateway's network namespace, where only workers
of the site come through (:mod:`.keeper` has the rules), and its connections start in the host's. Does not cover what is
said in them, which may be encrypted. A process of its own under the keeper, with no rights, with which it ends::

    servicerelay.py KEEPER-PID  LISTEN-FD,HOST,PORT...

HOST is a number: names are looked up by the daemon, as a keeper does not see all files that this needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import resource
import signal
import socket
import struct
import sys
from functools import partial

__all__ = ["relay"]

CHUNK_BYTES = 1 << 18
CONNECT_SECONDS = 30.0
NOBODY = 65534
PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_NO_NEW_PRIVS = 38


async def relay(listeners: list[tuple[socket.socket, str, int]]) -> None:
    """Forward connections until this process is ended.

    Parameters
    ----------
    listeners
        Sockets that listen, each with the address and the port to which it leads.
    """
    for listener, host, port in listeners:
        await asyncio.start_server(partial(_serve, host, port), sock=listener, limit=CHUNK_BYTES)
    await asyncio.get_running_loop().create_future()


async def _serve(host: str, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            far_reader, far_writer = await asyncio.open_connection(host, port, limit=CHUNK_BYTES)
    except OSError:  # also of the timeout
        _reset(writer)
        return
    try:
        await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))
    except OSError:
        _reset(writer)
        _reset(far_writer)
    finally:
        writer.close()
        far_writer.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection so that it does not look as if all had been said."""
    linger = struct.pack("ii", 1, 0)  # socket(7): on, for no time
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(CHUNK_BYTES):
        writer.write(data)
        await writer.drain()
    with contextlib.suppress(OSError):
        writer.write_eof()  # the other direction may still have something to say


def main(keeper: str, *services: str) -> None:
    """Give up all rights, and forward.

    Parameters
    ----------
    keeper
        Process to end with.
    *services
        As in the docstring of this module.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a change of the user clears it, so now
    if os.getppid() != int(keeper):
        sys.exit(1)
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    listeners = []
    for service in services:
        number, host, port = service.split(",")
        listeners.append((socket.socket(fileno=int(number)), host, int(port)))
    asyncio.run(relay(listeners))


if __name__ == "__main__":
    main(*sys.argv[1:])
