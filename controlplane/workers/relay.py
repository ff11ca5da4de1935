"""Make ports of a scheduler's own network reachable at this host's 127.0.0.1.

Covers forwarding bytes of TCP connections into another network namespace: its listeners stay in this host's, its
connections start in the scheduler's. Does not cover who may connect: every user of this host can reach 127.0.0.1.
It is a process of its own, so that clients stay connected while the daemon restarts, and it needs Python only::

    relay.py LEASE-FOLDER PROC-OF-THE-SCHEDULER  UID GID  LISTEN-FD:PORT...

It ends with the scheduler's process, or when the lease of :mod:`.entrypoint` has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import socket
import sys
import time
from functools import partial

__all__ = ["relay"]

CHUNK_BYTES = 1 << 18
TICK_SECONDS = 0.2
PATIENCE_SECONDS = 10.0  # a scheduler takes some seconds to listen, and is started again when it ends
RETRY_SECONDS = 0.05
CLONE_NEWNET = 0x40000000  # linux/sched.h
PR_SET_NO_NEW_PRIVS = 38  # linux/prctl.h


async def relay(listeners: list[tuple[socket.socket, int]], lease: int, process: int) -> None:
    """Forward connections until the process or its lease has ended.

    Parameters
    ----------
    listeners
        Sockets that listen, each with the port of 127.0.0.1 in the namespace of this process to which it leads.
    lease
        Descriptor of the folder with the lease.
    process
        Descriptor of the folder in /proc of the process to live with: only the same process answers through it.
    """
    servers = [
        await asyncio.start_server(partial(_serve, port), sock=listener, limit=CHUNK_BYTES)
        for listener, port in listeners
    ]
    deadline = time.monotonic()
    while _is_alive(process):
        with contextlib.suppress(OSError, ValueError, IndexError):
            word = _read(lease, "lease").split()[0]
            deadline = -1.0 if word == "stop" else float(word)
        if not time.monotonic() < deadline:
            break
        await asyncio.sleep(TICK_SECONDS)
    for server in servers:
        server.close()


async def _serve(port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port, limit=CHUNK_BYTES)
            break
        except OSError:
            if time.monotonic() > until:
                writer.close()
                return
        await asyncio.sleep(RETRY_SECONDS)
    await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
    with contextlib.suppress(OSError, RuntimeError):
        writer.close()


def _read(folder: int, name: str) -> str:
    with open(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder), encoding="utf-8") as file:  # noqa: PTH123
        return file.read()


def _is_alive(process: int) -> bool:
    try:
        return _read(process, "stat").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def main(arguments: list[str]) -> None:
    """Enter the namespace, give up all rights, and forward.

    Parameters
    ----------
    arguments
        As in the docstring of this module.
    """
    folder, proc, uid, gid, *pairs = arguments
    listeners = [(socket.socket(fileno=int(fd)), int(port)) for fd, port in (pair.split(":") for pair in pairs)]
    lease = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    process = os.open(proc, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    libc = ctypes.CDLL(None, use_errno=True)
    namespace = os.open("ns/net", os.O_RDONLY | os.O_CLOEXEC, dir_fd=process)
    if libc.setns(namespace, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), f"{proc}/ns/net")
    os.close(namespace)
    os.setgroups([])
    os.setresgid(int(gid), int(gid), int(gid))
    os.setresuid(int(uid), int(uid), int(uid))
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    asyncio.run(relay(listeners, lease, process))


if __name__ == "__main__":
    main(sys.argv[1:])
