"""An SSH server of the tests' own, on the loopback address, with keys, configuration and log in one folder."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self


class Sshd:
    """sshd at a free port of 127.0.0.1 that lets in one key; :attr:`ssh` is the client that has it."""

    def __init__(self, folder: Path, *, options: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.options = options
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def site(self) -> str:
        return f"{getpass.getuser()}@127.0.0.1:{self.port}"

    @property
    def ssh(self) -> tuple[str, ...]:
        """The client with a configuration of its own: it reads nothing of the person who runs the tests."""
        return ("ssh", "-F", str(self.folder / "ssh_config"))

    def trust(self, *, key: str = "host", alias: str = "known_hosts") -> None:
        """Let the client know a key as the server's."""
        public = (self.folder / f"{key}.pub").read_text()
        (self.folder / alias).write_text(f"[127.0.0.1]:{self.port} {public}")

    def __enter__(self) -> Self:
        program = shutil.which("sshd") or "/usr/sbin/sshd"
        for name in ("host", "user", "stranger"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(self.folder / name)]
            subprocess.run(command, check=True, timeout=20)
        shutil.copy(self.folder / "user.pub", self.folder / "authorized_keys")
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd wants it, and only the service makes it
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        lines = [
            f"ListenAddress 127.0.0.1:{self.port}",
            f"HostKey {self.folder / 'host'}",
            f"AuthorizedKeysFile {self.folder / 'authorized_keys'}",
            "PidFile none",
            "UsePAM no",
            "StrictModes no",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "PermitRootLogin prohibit-password",
            *self.options,
        ]
        (self.folder / "sshd_config").write_text("\n".join(lines) + "\n")
        client = [
            f"IdentityFile {self.folder / 'user'}",
            "IdentitiesOnly yes",
            "IdentityAgent none",
            f"UserKnownHostsFile {self.folder / 'known_hosts'}",
            "GlobalKnownHostsFile none",
            "StrictHostKeyChecking yes",
        ]
        (self.folder / "ssh_config").write_text("\n".join(client) + "\n")
        self.trust()
        command = [program, "-D", "-e", "-f", str(self.folder / "sshd_config")]
        if shutil.which("setpriv"):
            command = ["setpriv", "--pdeathsig", "KILL", *command]
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return self
            except OSError:
                log_text = (self.folder / "log").read_text()
                assert self._process.poll() is None, f"sshd ended: {log_text}"
                assert time.monotonic() < deadline, f"sshd does not listen: {log_text}"
                time.sleep(0.02)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(10)
