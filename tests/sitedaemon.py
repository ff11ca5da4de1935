"""A site's daemon as a process of its own, and requests to it over its socket as any account."""

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from pathlib import Path

from waiting import wait_until

from controlplane.talk import UnixConnection

START_SECONDS = 60.0
PATIENCE_SECONDS = 60.0


def new_id():
    return uuid.uuid4().hex


@contextlib.contextmanager
def acting_as(uid, gid=None, groups=()):
    """Let connections that are made here come from another account; needs root."""
    own_groups = os.getgroups()
    os.setgroups([gid or uid, *groups])
    os.setegid(gid or uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(own_groups)


class Answer:
    """An answer's status and body."""

    def __init__(self, status, headers, content):
        self.status = status
        self.headers = headers
        self.text = content.decode()
        self.json = json.loads(content) if headers.get("Content-Type", "").startswith("application/json") else None

    @property
    def kind(self):
        return self.json["error"]["kind"]

    @property
    def message(self):
        return self.json["error"]["message"]


class SiteDaemon:
    """``meshcompute-site serve`` with a folder of its own, which everybody may enter."""

    def __init__(self, toml="", *, options=()):
        self.folder = Path(tempfile.mkdtemp(prefix="site-", dir="/tmp"))  # sockets must have short paths
        self.folder.chmod(0o755)
        self.socket = str(self.folder / "site.sock")
        self.config = self.folder / "site.toml"
        head = (
            'pool = "alpha"\nrole = "both"\nruntime = "process"\nnetwork = "loopback"\n'
            f'socket = "{self.socket}"\nstate_folder = "{self.folder}/state"\n'
        )
        self.config.write_text(head + toml)
        self.options = options
        self.program = ["-m", "controlplane"]
        self.health = "/v1/health"
        self.process = None
        self.log = self.folder / "log"

    def command(self, *arguments):
        return [sys.executable, *self.program, *map(str, arguments)]

    def run(self, *arguments, **options):
        """Run the command meshcompute-site to its end."""
        options = {"capture_output": True, "text": True, "timeout": 60, **options}
        return subprocess.run(self.command(*arguments), cwd="/", check=False, **options)

    def start(self):
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command("serve", "--config", str(self.config), "--log-level", "DEBUG", *self.options),
                stdout=log,
                stderr=log,
                cwd="/",
            )
        wait_until(self.answers, f"answer of the daemon; its log:\n{self.log.read_text()[-2000:]}", START_SECONDS)
        return self

    def answers(self):
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.request("GET", self.health).status == 200
        except OSError:
            return False
        except Exception as exc:
            return "There is no socket" in str(exc) and False

    def stop(self, number=signal.SIGTERM):
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)
        if self.process is not None:
            self.process.wait(timeout=90)
        return self.process.returncode if self.process is not None else None

    def request(self, method, path, body=None, *, headers=None):
        connection = UnixConnection(self.socket)
        connection.timeout = 20
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()

    def put(self, cluster_id, epoch=1, **fields):
        spec = {
            "name": "c",
            "epoch": epoch,
            "role": "site",
            "prefix": f"fd{cluster_id[:2]}:{cluster_id[2:6]}:{cluster_id[6:10]}::/48",
            "site": 1,
            **fields,
        }
        return self.request("PUT", f"/v1/clusters/{cluster_id}", spec)

    def get(self, cluster_id):
        return self.request("GET", f"/v1/clusters/{cluster_id}")

    def delete(self, cluster_id, epoch=1):
        return self.request("DELETE", f"/v1/clusters/{cluster_id}?epoch={epoch}")

    def wait_phase(self, cluster_id, phase):
        def has_it():
            answer = self.get(cluster_id)
            return answer.status == 200 and answer.json["phase"] == phase and answer.json

        return wait_until(has_it, f"cluster in phase {phase}: {self.get(cluster_id).text}", PATIENCE_SECONDS)

    def pids(self, cluster_id):
        """Processes that belong to a cluster: they carry the names of its units' folders."""
        mark = f"{self.folder}/state/units/mc-{cluster_id[:8]}".encode()
        found = set()
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes():
                    found.add(int(path.parent.name))
        return found

    def close(self):
        """End it with all its clusters, and remove its folder."""
        self.stop()
        subprocess.run(self.command("drain", "--config", str(self.config)), check=True, timeout=90, cwd="/")
        shutil.rmtree(self.folder)


class _Door:
    """Passes bytes between a listener's clients and the daemon's socket, until one side is done; then both are."""

    def __init__(self, path, listener):
        self.target = path
        self.listener = listener
        self.threads = [threading.Thread(target=self._serve)]
        self.threads[0].start()

    def _serve(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            self.threads.append(threading.Thread(target=self._pass, args=(client,)))
            self.threads[-1].start()

    def _pass(self, client):
        with client, socket.socket(socket.AF_UNIX) as server, contextlib.suppress(OSError):
            server.connect(self.target)
            other = {client: server, server: client}
            while True:
                for source in select.select([client, server], [], [], 30)[0]:
                    chunk = source.recv(1 << 16)
                    if not chunk or (source is client and not self.lets_pass(chunk)):
                        return
                    other[source].sendall(chunk)

    def lets_pass(self, chunk):
        return True

    def close(self):
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for thread in self.threads:
            thread.join(40)


class TcpDoor(_Door):
    """The daemon's socket at a port of 127.0.0.1, for clients that know no unix sockets. For tests only."""

    def __init__(self, path):
        super().__init__(path, socket.create_server(("127.0.0.1", 0)))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"


class BreakingDoor(_Door):
    """A unix socket in front of the daemon's that can close connections instead of passing a request on."""

    def __init__(self, target, path):
        self.path = path
        self.break_next = 0  # so many requests from now on get no answer; questions after its health always do
        self.n_requests = 0
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(64)
        super().__init__(target, listener)

    def lets_pass(self, chunk):
        if b" HTTP/1.1\r\n" not in chunk or b" /v1/health " in chunk:
            return True
        self.n_requests += 1
        if self.break_next == 0:
            return True
        self.break_next -= 1
        return False

    def close(self):
        super().close()
        self.path.unlink()


__all__ = ["PATIENCE_SECONDS", "Answer", "BreakingDoor", "SiteDaemon", "TcpDoor", "acting_as", "new_id"]
