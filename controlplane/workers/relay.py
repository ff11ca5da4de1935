"""Make ports of a scheduler's own network reachable at this host's 127.0.0.1.

Covers forwarding bytes of TCP connections into another network namespace: its listeners stay in this host's, its
connections start in the scheduler's. Every user of this host can reach 127.0.0.1, and whoever reaches a scheduler can
run code on its workers: so only root and the scheduler's owner are let in, as the kernel tells whose a connection is.
It is a process of its own, so that clients stay connected while the daemon restarts, and it needs Python only::

    relay.py LEASE-FOLDER PROC-OF-THE-SCHEDULER  UID GID OWNER-UID  LISTEN-FD:PORT...

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
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TextIO

__all__ = ["is_from", "relay"]

CHUNK_BYTES = 1 << 18
TICK_SECONDS = 0.2
PATIENCE_SECONDS = 10.0  # a scheduler takes some seconds to listen, and is started again when it ends
RETRY_SECONDS = 0.05
CLONE_NEWNET = 0x40000000  # linux/sched.h
PR_SET_NO_NEW_PRIVS = 38  # linux/prctl.h
ESTABLISHED = "01"  # include/net/tcp_states.h; a connection that has ended is nobody's, and shown as root's
LOOPBACK = ("0100007F", "0000000000000000FFFF00000100007F")  # 127.0.0.1 in /proc/net/tcp and, for IPv6 sockets, tcp6


def is_from(uids: frozenset[int], client_port: int, own_port: int, table: str) -> bool:
    """Tell whether a connection of this host to itself was made by one of these users.

    Parameters
    ----------
    uids
        The users.
    client_port, own_port
        The connection's ports of 127.0.0.1.
    table
        Text of the kernel's tables of TCP connections.

    Returns
    -------
    bool
        Also false of a connection that has ended meanwhile.

    References
    ----------
    Linux, Documentation/networking/proc_net_tcp.rst.
    """
    ends = {(f"{host}:{client_port:04X}", f"{host}:{own_port:04X}") for host in LOOPBACK}
    for words in map(str.split, table.splitlines()):
        if len(words) > 7 and (words[1], words[2]) in ends and words[3] == ESTABLISHED:
            return int(words[7]) in uids
    return False


async def relay(
    listeners: list[tuple[socket.socket, int]], lease: int, process: int, uids: frozenset[int], tables: Sequence[TextIO]
) -> None:
    """Forward connections until the process or its lease has ended.

    Parameters
    ----------
    listeners
        Sockets that listen, each with the port of 127.0.0.1 in the namespace of this process to which it leads.
    lease
        Descriptor of the folder with the lease.
    process
        Descriptor of the folder in /proc of the process to live with: only the same process answers through it.
    uids
        Users whose connections are forwarded.
    tables
        The kernel's tables of TCP connections, of the network namespace of the listeners.
    """

    async def serve(port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        text = "".join(_read_again(table) for table in tables)
        if is_from(uids, writer.get_extra_info("peername")[1], writer.get_extra_info("sockname")[1], text):
            await _serve(port, reader, writer)
        else:
            writer.close()

    servers = [
        await asyncio.start_server(partial(serve, port), sock=listener, limit=CHUNK_BYTES)
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


def _read_again(file: TextIO) -> str:
    file.seek(0)
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
    folder, proc, uid, gid, owner, *pairs = arguments
    listeners = [(socket.socket(fileno=int(fd)), int(port)) for fd, port in (pair.split(":") for pair in pairs)]
    lease = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    process = os.open(proc, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    # Opened here, as they show the namespace in which they were opened; a kernel without IPv6 has one of them.
    tables = [
        path.open(encoding="ascii")
        for path in map(Path, ("/proc/self/net/tcp", "/proc/self/net/tcp6"))
        if path.exists()
    ]
    libc = ctypes.CDLL(None, use_errno=True)
    namespace = os.open("ns/net", os.O_RDONLY | os.O_CLOEXEC, dir_fd=process)
    if libc.setns(namespace, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), f"{proc}/ns/net")
    os.close(namespace)
    os.setgroups([])
    os.setresgid(int(gid), int(gid), int(gid))
    os.setresuid(int(uid), int(uid), int(uid))
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    asyncio.run(relay(listeners, lease, process, frozenset((0, int(owner))), tables))


if __name__ == "__main__":
    main(sys.argv[1:])
