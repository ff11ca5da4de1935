"""Site daemons without root: `meshcompute-site serve` with plain processes as workers, on the loopback address."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

SITE_COMMAND = f"{sys.executable} -c 'from controlplane.cli import main; main()'"


class Daemons:
    """One daemon for each pool, in a folder with a short path; all end with the with block, and their clusters too."""

    def __init__(self, folder: Path, pools: tuple[str, ...], *, lines: str = "") -> None:
        self.folder = folder
        self.pools = pools
        self.lines = lines
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def socket(self, pool: str) -> str:
        return str(self.folder / pool / "site.sock")

    def log(self, pool: str) -> str:
        return (self.folder / pool / "log").read_text()

    def start(self, pool: str) -> None:
        folder = self.folder / pool
        folder.mkdir(exist_ok=True)
        (folder / "site.toml").write_text(
            f'pool = "{pool}"\nrole = "both"\nruntime = "process"\nnetwork = "loopback"\n'
            f'socket = "{folder}/site.sock"\nstate_folder = "{folder}/state"\n'
            '[access]\nusers = ["*"]\n[workers]\nprocesses_per_container = 2\n' + self.lines
        )
        command = [sys.executable, "-c", "from controlplane.cli import main; main()", "serve", "--stop-clusters"]
        command += ["--config", str(folder / "site.toml")]
        if shutil.which("setpriv"):
            command = ["setpriv", "--pdeathsig", "TERM", *command]
        with (folder / "log").open("ab") as log:
            self._processes[pool] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def kill(self, pool: str) -> None:
        process = self._processes.pop(pool)
        process.kill()
        process.wait()

    def __enter__(self) -> Self:
        for pool in self.pools:
            self.start(pool)
        deadline = time.monotonic() + 90
        for pool in self.pools:
            while not Path(self.socket(pool)).exists():
                assert self._processes[pool].poll() is None, f"the daemon of {pool} ended: {self.log(pool)}"
                assert time.monotonic() < deadline, f"the daemon of {pool} does not listen: {self.log(pool)}"
                time.sleep(0.05)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in self._processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self._processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
