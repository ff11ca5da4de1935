"""A site against everything that clients, time, crashes and the engine can do to it, in any order.

Covers leases, epochs, reconcile, the store and adoption together: the shipped Site, Loop, Store and LoopbackPlane, with
a clock that is moved by hand and the runtime in memory. After every step the loop does what is due, and then what is
there must be what a simple model says.
"""

import asyncio
import shutil
import tempfile
from pathlib import Path

from controlbench import FakeClock, FakeRuntime, caller, config, spec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from controlplane.errors import ConflictError, NotFoundError, QuotaError
from controlplane.loop import Loop
from controlplane.network.loopback import LoopbackPlane
from controlplane.site import Site
from controlplane.state import Store
from meshcompute.protocol import WorkerRequest

IDS = [f"{digit * 8}{digit * 24}" for digit in "abc"]
USERS = [caller(1000), caller(1001)]
LEASES = (5.0, 60.0)
CLUSTERS_PER_USER = 2


class SiteMachine(RuleBasedStateMachine):
    """The model: for each cluster its owner, epoch, containers and deadline while it lives, and its epoch when dead."""

    def __init__(self):
        super().__init__()
        in_memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # every record is forced to its disk
        self.folder = Path(tempfile.mkdtemp(prefix="site-machine-", dir=in_memory))
        self.clock = FakeClock()
        self.runtime = FakeRuntime(self.clock.monotonic)
        self.plane = LoopbackPlane(clock=self.clock)
        self.config = config(limits={"clusters": CLUSTERS_PER_USER})
        self.alive = {}
        self.dead = {}
        self.owners = {}
        self.events = asyncio.new_event_loop()
        self.start_daemon()

    def teardown(self):
        self.events.close()
        shutil.rmtree(self.folder)

    def start_daemon(self):
        self.site = Site(config=self.config, store=Store(self.folder), clock=self.clock, runtime=self.runtime)
        self.site.open()
        self.loop = Loop(plane=self.plane, runtime=self.runtime, wishes=self.site, clock=self.clock)
        self.loop.adopt()
        self.do(self.loop.work())
        # Answers must not wait for the machine here: nobody works while a rule runs.
        self.site._loop = self.loop
        self.loop.wait_settled = _no_wait

    def do(self, work):
        return self.events.run_until_complete(work)

    def work(self):
        self.do(self.loop.work())

    def expire(self):
        """What the model knows of time: a lease that is over buries its cluster."""
        for cluster_id, cluster in list(self.alive.items()):
            if self.clock.now >= cluster["deadline"]:
                self.dead[cluster_id] = max(cluster["epoch"], self.dead.get(cluster_id, 0))
                del self.alive[cluster_id]

    @rule(
        cluster_id=st.sampled_from(IDS),
        user=st.sampled_from(USERS),
        epoch=st.integers(1, 6),
        containers=st.integers(1, 2),
        lease=st.sampled_from(LEASES),
    )
    def put(self, cluster_id, user, epoch, containers, lease):
        wanted = spec(
            epoch,
            prefix=f"fd00:{cluster_id[:4]}::/48",
            workers=WorkerRequest(containers=containers, processes_per_container=1),
            lease_seconds=lease,
        )
        before = self.alive.get(cluster_id)
        try:
            self.do(self.site.put(cluster_id, wanted, user))
        except QuotaError:
            others = [key for key, found in self.alive.items() if found["uid"] == user.uid and key != cluster_id]
            assert len(others) >= CLUSTERS_PER_USER
        except ConflictError:
            is_anothers = cluster_id in self.site.cluster_ids() and self.owners[cluster_id] != user.uid
            is_late = epoch <= self.dead.get(cluster_id, 0)
            is_old = before is not None and (
                epoch < before["epoch"] or (epoch == before["epoch"] and before["spec"] != wanted)
            )
            assert is_anothers or is_late or is_old
        else:
            assert epoch > self.dead.get(cluster_id, 0)
            assert before is None or epoch >= before["epoch"]
            deadline = self.clock.now + lease
            self.owners[cluster_id] = user.uid
            self.alive[cluster_id] = {
                "uid": user.uid,
                "epoch": epoch,
                "containers": containers,
                "deadline": deadline,
                "spec": wanted,
            }
        self.work()

    @rule(cluster_id=st.sampled_from(IDS), user=st.sampled_from(USERS), epoch=st.integers(1, 6))
    def renew(self, cluster_id, user, epoch):
        cluster = self.alive.get(cluster_id)
        try:
            self.do(self.site.renew(cluster_id, epoch, user))
        except (NotFoundError, ConflictError):
            assert cluster is None or cluster["uid"] != user.uid or cluster["epoch"] != epoch
        else:
            assert (cluster["uid"], cluster["epoch"]) == (user.uid, epoch)
            cluster["deadline"] = max(cluster["deadline"], self.clock.now + cluster["spec"].lease_seconds)
        self.work()

    @rule(cluster_id=st.sampled_from(IDS), user=st.sampled_from(USERS), epoch=st.integers(1, 6))
    def delete(self, cluster_id, user, epoch):
        cluster = self.alive.get(cluster_id)
        try:
            status = self.do(self.site.delete(cluster_id, epoch, user))
        except NotFoundError:
            assert self.owners[cluster_id] != user.uid
        except ConflictError:
            assert epoch < cluster["epoch"]
        else:
            assert status.phase in {"removing", "gone"}
            assert cluster is None or cluster["uid"] == user.uid
            self.owners.setdefault(cluster_id, user.uid)
            self.alive.pop(cluster_id, None)
            self.dead[cluster_id] = max(epoch, self.dead.get(cluster_id, 0))
        self.work()

    @rule(seconds=st.sampled_from([0.1, 1.0, 4.0, 31.0, 61.0]))
    def time_passes(self, seconds):
        self.clock.now += seconds
        self.expire()
        self.work()

    @rule()
    def daemon_is_killed_and_started_again(self):
        self.plane = LoopbackPlane(clock=self.clock)  # its memory goes with the daemon
        self.start_daemon()

    @rule(seconds=st.sampled_from([1.0, 10.0, 100.0]))
    def daemon_is_dead_for_a_while(self, seconds):
        self.clock.now += seconds
        self.expire()
        self.plane = LoopbackPlane(clock=self.clock)
        self.start_daemon()

    @rule(number=st.integers(0, 3))
    def a_unit_is_killed(self, number):
        names = sorted(self.runtime.specs)
        if not self.runtime.is_down and number < len(names):
            self.runtime.exit(names[number])
            self.clock.now += 31.0  # longer than any retry waits; leases may end meanwhile
            self.expire()
            self.work()

    @rule()
    def the_engine_stops(self):
        self.runtime.is_down = True
        self.work()

    @rule()
    def the_engine_answers_again(self):
        self.runtime.is_down = False
        self.clock.now += 31.0
        self.expire()
        self.work()

    @rule(is_broken=st.booleans(), cluster_id=st.sampled_from(IDS))
    def starting_fails_or_works_again(self, is_broken, cluster_id):
        name = f"mc-{cluster_id[:8]}-ecmwf-1-u0"
        (self.runtime.fails.add if is_broken else self.runtime.fails.discard)(name)
        self.clock.now += 31.0
        self.expire()
        self.work()

    @invariant()
    def nothing_outlives_its_lease(self):
        if self.runtime.is_down:
            return
        alive = {spec.cluster_id for name, spec in self.runtime.specs.items() if name not in self.runtime.exited}
        assert alive <= set(self.alive)

    @invariant()
    def what_was_asked_for_is_there(self):
        if self.runtime.is_down:
            return
        self.clock.now += 5.0 if all(c["deadline"] > self.clock.now + 5.0 for c in self.alive.values()) else 0.0
        self.work()
        running = {name for name in self.runtime.specs if name not in self.runtime.exited}
        for cluster_id, cluster in self.alive.items():
            for number in range(cluster["containers"]):
                name = f"mc-{cluster_id[:8]}-ecmwf-1-u{number}"
                is_held_up = any(fail[:11] == name[:11] for fail in self.runtime.fails)
                starts = self.loop._seen[cluster_id].memory.starts_by_unit.get(name, (0, 0.0))
                assert name in running or is_held_up or starts[0] > 1
        assert set(self.site.cluster_ids()) == set(self.alive)

    @invariant()
    def what_runs_has_the_deadline_of_its_lease(self):
        for cluster_id, cluster in self.alive.items():
            assert abs(self.plane._gateways[cluster_id].ends_at - cluster["deadline"]) < 0.6
        for name, found in self.runtime.specs.items():
            if not self.runtime.is_down and name not in self.runtime.exited and found.cluster_id in self.alive:
                assert abs(self.runtime.deadlines[name] - self.alive[found.cluster_id]["deadline"]) < 0.6

    @invariant()
    def gateways_are_those_of_living_clusters(self):
        gateways = set(self.do(self.plane.observe()))
        assert gateways == set(self.alive)

    @invariant()
    def the_store_says_the_same_as_memory(self):
        records, tombstones = Store(self.folder).load()
        assert records == self.site._records
        assert {key: stone.epoch for key, stone in tombstones.items()} == self.dead

    @invariant()
    def nobody_sees_the_clusters_of_others(self):
        for user in USERS:
            found = self.do(self.site.list_clusters(user))
            assert {status.cluster_id for status in found if status.phase != "removing"} == {
                key for key, cluster in self.alive.items() if cluster["uid"] == user.uid
            }


async def _no_wait(cluster_id, timeout_seconds):
    """Instead of Loop.wait_settled."""


TestSite = SiteMachine.TestCase
TestSite.settings = settings(max_examples=100, stateful_step_count=20, deadline=None)
