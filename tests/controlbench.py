"""What the tests of the control plane share: a clock to move by hand, a runtime in memory, and plain examples."""

import asyncio
import importlib.metadata
import platform

from controlplane.config import parse_config
from controlplane.errors import ApplyError, RuntimeUnknownError
from controlplane.identity import Caller
from controlplane.leases import grant
from controlplane.state import ClusterRecord, Owner
from controlplane.workers.base import UnitUnknownError, WorkerState
from meshcompute.protocol import ClusterSpec, Peer, SchedulerRequest, WorkerRequest

ID = "0123456789abcdef0123456789abcdef"
OTHER_ID = "fedcba9876543210fedcba9876543210"
PREFIX = "fda5:c0ff:eeee::/48"
KEYS = [f"{letter * 42}A=" for letter in "abcdefgh"]  # shaped like WireGuard's public keys
BOOT = "boot-1"


class FakeClock:
    """Time that moves when told to."""

    def __init__(self, now=1000.0):
        self.now = now
        self.boot_id = BOOT

    def monotonic(self):
        return self.now

    def wall(self):
        return 1_700_000_000.0 + self.now

    async def wait(self, event, timeout_seconds):
        await asyncio.sleep(0)
        return event.is_set()


class FakeRuntime:
    """Units as entries of a dictionary; passes the contract in tests/contract/test_fake_runtime.py.

    ``is_down``: the engine does not answer. ``fails``: names of units that cannot be started.
    """

    def __init__(self, monotonic, *, has_namespaces=False):
        self.monotonic = monotonic
        self.has_namespaces = has_namespaces
        self.specs = {}
        self.deadlines = {}
        self.exited = {}
        self.is_down = False
        self.fails = set()
        self.calls = []

    def _check(self):
        if self.is_down:
            raise RuntimeUnknownError("The engine does not answer. Start it.")
        for name in self.specs:
            if self.monotonic() >= self.deadlines[name]:
                self.exited.setdefault(name, "its lease has ended")

    def _state(self, name):
        number = 4000 + sorted(self.specs).index(name)
        if name in self.exited:
            return WorkerState(
                cluster_id=self.specs[name].cluster_id, name=name, state="exited", message=self.exited[name]
            )
        netns = f"/proc/{number}/ns/net" if self.has_namespaces else None
        return WorkerState(cluster_id=self.specs[name].cluster_id, name=name, state="running", pid=number, netns=netns)

    async def observe(self):
        self._check()
        return {name: self._state(name) for name in self.specs}

    async def start(self, spec):
        self._check()
        self.calls.append(("start", spec.name))
        if spec.name in self.fails:
            raise ApplyError(f"Unit {spec.name} cannot be started. Try again.")
        if spec.name not in self.specs or spec.name in self.exited:
            self.exited.pop(spec.name, None)
            self.specs[spec.name] = spec
            self.deadlines[spec.name] = self.monotonic() + spec.deadline_seconds
        return self._state(spec.name)

    async def stop(self, name, grace_seconds):
        self._check()
        self.calls.append(("stop", name))
        for known in (self.specs, self.deadlines, self.exited):
            known.pop(name, None)

    async def renew(self, name, deadline_seconds):
        self._check()
        if name not in self.specs:
            raise UnitUnknownError(f"There is no unit {name}.")
        self.deadlines[name] = self.monotonic() + deadline_seconds

    async def logs(self, name, lines, process=None):
        self._check()
        if name not in self.specs:
            raise UnitUnknownError(f"There is no unit {name}.")
        written = [f"{each} | line {n}\n" for n in range(3) for each in self.specs[name].process_names]
        return "".join([line for line in written if process is None or line.startswith(f"{process} |")][-lines:])

    async def check_image(self, image):
        self._check()

    async def packages(self, image):
        self._check()
        return {"python": platform.python_version(), "dask": importlib.metadata.version("dask")}

    def exit(self, name):
        """A unit ends by itself."""
        self.exited[name] = "it was killed"


def config(**tables):
    """A site of processes on the loopback address; arguments as in site.toml."""
    return parse_config({"pool": "ecmwf", "runtime": "process", "network": "loopback", "role": "both", **tables})


def mesh_config(**tables):
    """A site of containers with WireGuard."""
    return parse_config({"pool": "ecmwf", "role": "both", **tables})


def spec(epoch=1, **fields):
    """A cluster's part at site 1 with two containers of two workers."""
    given = {
        "name": "test",
        "epoch": epoch,
        "role": "site",
        "prefix": PREFIX,
        "site": 1,
        "peers": (Peer(site=0, name="client", public_key=KEYS[0], endpoint="192.0.2.1:51820", initiates=True),),
        "workers": WorkerRequest(containers=2, processes_per_container=2),
    }
    return ClusterSpec(**{**given, **fields})


def scheduler_spec(epoch=1, **fields):
    """A cluster's part at the client's host."""
    given = {"role": "scheduler", "site": 0, "peers": (), "workers": None, "scheduler": SchedulerRequest()}
    return spec(epoch, **{**given, **fields})


def caller(uid=1000, **fields):
    """An account that may use the site."""
    given = {"gid": uid, "user": f"user{uid}", "groups": (uid,), "is_allowed": True, "is_operator": False}
    return Caller(uid=uid, **{**given, **fields})


def record(cluster_id=ID, *, wanted=None, uid=1000, now=1000.0, **fields):
    """A cluster as the site has noted it."""
    wanted = wanted or spec()
    owner = Owner(uid=uid, gid=uid, user=f"user{uid}", groups=(uid,))
    given = {"boot_id": BOOT, "listen_port": 51820, "lease": grant(wanted.lease_seconds, now)}
    return ClusterRecord(cluster_id=cluster_id, owner=owner, run_as=owner, spec=wanted, **{**given, **fields})
