"""Programs on the client's host that share their imports.

Covers a server that has imported what users import, and forks a process for every connection: its first line names the
program and its options; after that the connection is the program's standard input and output. Does not cover what they
do (``reference_way.py``, ``reference_watch.py``). meshcompute is not imported here: a program that does not import it
lacks it.

Run as ``reference_programs.py SOCKET``; it says "listening".
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import traceback
import warnings

from reference_watch import say, watch
from reference_way import Way


def main() -> None:
    """Serve until killed; programs end with the lab."""
    warnings.filterwarnings("ignore", "Mismatched versions found")  # the image's Python may be another 3.11
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(sys.argv[1])
        listener.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
        say("listening")
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                break
            connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for fd in (0, 1):
        os.dup2(connection.fileno(), fd)
    connection.close()
    try:
        options = json.loads(sys.stdin.readline())
        if options["program"] == "watch":
            watch(options)
        else:
            Way(options).run()
    except Exception:
        say(json.dumps({"failed": traceback.format_exc()}))
    finally:
        os._exit(0)  # a child of ours must not run what is registered for the server's end, nor wait for its threads


if __name__ == "__main__":
    main()
