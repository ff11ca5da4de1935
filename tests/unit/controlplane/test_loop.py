"""The loop with its site: what fails is told and tried again, and never ends the loop."""

import asyncio

import pytest
from controlbench import ID, OTHER_ID, FakeClock, FakeRuntime, caller, config, spec

from controlplane import loop as loop_module
from controlplane.desired import desired_cluster
from controlplane.errors import ApplyError, NotFoundError, StoreError
from controlplane.loop import Loop
from controlplane.network.loopback import LoopbackPlane
from controlplane.site import Site
from controlplane.state import Store

U0, U1 = "mc-01234567-ecmwf-1-u0", "mc-01234567-ecmwf-1-u1"


class Bench:
    """A site whose time and engine are in our hands."""

    def __init__(self, folder):
        self.clock = FakeClock()
        self.runtime = FakeRuntime(self.clock.monotonic)
        self.plane = LoopbackPlane(clock=self.clock)
        self.store = Store(folder)
        self.site = Site(config=config(), store=self.store, clock=self.clock, runtime=self.runtime)
        self.site.open()
        self.loop = Loop(plane=self.plane, runtime=self.runtime, wishes=self.site, clock=self.clock)
        self.loop.adopt()

    def do(self, work):
        return asyncio.run(work)

    def put(self, *arguments, cluster_id=ID, **fields):
        async def put():
            self.site.use(None)  # answers must not wait for a loop that does not run
            await self.site.put(cluster_id, spec(*arguments, **fields), caller())
            self.site.use(self.loop)
            self.loop.poke(cluster_id, is_changed=True)
            await self.loop.work()

        self.do(put())

    def work(self, seconds=0.0):
        self.clock.now += seconds
        self.do(self.loop.work())

    def status(self):
        return self.do(self.site.get(ID, caller()))


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path / "state")


def test_what_is_asked_for_comes_and_a_second_look_does_nothing(bench):
    bench.put()
    assert bench.status().phase == "ready"
    calls = list(bench.runtime.calls)
    bench.work(30.0)
    assert bench.runtime.calls == calls == [("start", U0), ("start", U1)]


def test_a_unit_that_cannot_be_started_is_told_and_tried_again_while_the_others_run(bench):
    bench.runtime.fails = {U0}
    bench.put()
    status = bench.status()
    assert status.phase == "pending"
    [workers] = [condition for condition in status.conditions if condition.kind == "workers"]
    assert workers.message == f"Unit {U0} cannot be started. Try again."
    assert set(bench.runtime.specs) == {U1}
    bench.runtime.fails = set()
    bench.work(31.0)
    bench.work(1.0)
    assert bench.status().phase == "ready"


def test_units_wait_for_a_gateway_that_cannot_be_made(bench):
    async def fail(config):
        raise ApplyError("No gateway. Load the module.")

    bench.plane.ensure, ensure = fail, bench.plane.ensure
    bench.put()
    assert bench.runtime.calls == []
    [gateway] = [condition for condition in bench.status().conditions if condition.kind == "gateway"]
    assert (gateway.is_true, gateway.message) == (False, "No gateway. Load the module.")
    bench.plane.ensure = ensure
    bench.work(31.0)
    bench.work(1.0)
    assert bench.status().phase == "ready"


def test_a_defect_becomes_a_condition_and_not_the_end_of_the_loop(bench):
    async def fail():
        raise ZeroDivisionError("oops")

    bench.plane.observe, observe = fail, bench.plane.observe
    bench.put()
    assert "ZeroDivisionError: oops" in bench.status().conditions[0].message
    bench.plane.observe = observe
    bench.work(31.0)
    bench.work(1.0)
    assert bench.status().phase == "ready"


def test_what_belongs_to_no_cluster_is_swept_and_what_does_stays(bench):
    bench.put()
    stranger = desired_cluster(bench.site._records[ID], config(), bench.clock.now).units[0]
    lost = type(stranger)(
        **{**{name: getattr(stranger, name) for name in stranger.__slots__}, "cluster_id": OTHER_ID, "name": "mc-lost"}
    )
    bench.do(bench.runtime.start(lost))
    bench.work(61.0)
    assert set(bench.runtime.specs) == {U0, U1}


def test_nothing_is_swept_while_the_engine_does_not_answer(bench):
    bench.put()
    bench.runtime.is_down = True
    bench.work(61.0)
    assert set(bench.runtime.specs) == {U0, U1}
    assert bench.loop.engine_problem.message == "The engine does not answer. Start it."
    status = bench.status()
    assert {worker.state for worker in status.workers} == {"unknown"}
    bench.runtime.is_down = False
    bench.work(31.0)
    assert bench.loop.engine_problem is None
    assert bench.status().phase == "ready"


def test_a_cluster_that_is_deleted_while_the_engine_does_not_answer_is_removed_when_it_does(bench):
    bench.put()
    bench.runtime.is_down = True

    async def delete():
        bench.site.use(None)
        await bench.site.delete(ID, 1, caller())
        bench.site.use(bench.loop)
        bench.loop.poke(ID, is_changed=True)
        await bench.loop.work()

    bench.do(delete())
    status = bench.status()
    assert status.phase == "removing"
    assert [condition.kind for condition in status.conditions] == ["ended", "engine"]
    assert bench.do(bench.plane.observe()) == {}
    assert set(bench.runtime.specs) == {U0, U1}
    bench.runtime.is_down = False
    bench.work(31.0)
    assert bench.runtime.specs == {}
    assert bench.status().phase == "gone"


def test_a_full_disk_does_not_keep_a_cluster_alive_beyond_its_lease(bench):
    bench.put(lease_seconds=10.0)

    def full(thing):
        raise StoreError("Cannot write: No space left on device.")

    bench.store.save = bench.store.bury = full
    bench.work(11.0)
    assert bench.runtime.specs == {}
    assert bench.status().phase == "gone"


def test_leases_of_an_earlier_boot_are_over(bench, tmp_path):
    bench.put()
    bench.clock.boot_id = "boot-2"
    bench.clock.now = 5.0  # the clock of a new boot begins anew, so that the old deadline seems far away
    again = Site(config=config(), store=Store(tmp_path / "state"), clock=bench.clock, runtime=bench.runtime)
    again.open()
    assert again.desired(ID, bench.clock.now) is None


def test_logs_are_those_of_all_units_that_have_started_or_of_one_worker(bench):
    bench.runtime.fails = {U1}
    bench.put()
    assert bench.do(bench.site.logs(ID, None, 10, caller())).startswith("ecmwf-1-0 | line 0")
    one = bench.do(bench.site.logs(ID, "ecmwf-1-1", 2, caller()))
    assert one == "ecmwf-1-1 | line 1\necmwf-1-1 | line 2\n"
    with pytest.raises(NotFoundError, match="There is no unit"):
        bench.do(bench.site.logs(ID, "ecmwf-1-2", 2, caller()))


def test_an_engine_that_is_stuck_is_unknown_and_is_asked_once(bench, monkeypatch):
    monkeypatch.setattr(loop_module, "ENGINE_PATIENCE_SECONDS", 0.01)
    bench.put()
    asked, answer = [], asyncio.Event()

    async def observe():
        asked.append(1)
        await answer.wait()
        return {}

    async def look_twice_and_once_more_when_it_answers():
        monkeypatch.setattr(bench.runtime, "observe", observe)
        for _ in range(2):
            await bench.loop.refresh([ID])
            assert bench.loop.report(ID).observed.units is None
        assert len(asked) == 1
        answer.set()
        await bench.loop.refresh([ID])
        assert bench.loop.report(ID).observed.units == {}
        assert len(asked) == 2  # the first answer is about a time long past

    bench.do(look_twice_and_once_more_when_it_answers())
