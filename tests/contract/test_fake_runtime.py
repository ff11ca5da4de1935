"""The runtime in memory keeps the same promises as real processes, as far as the control plane rests on them."""

import asyncio
import time
from dataclasses import replace

import pytest
from controlbench import ID, FakeClock, FakeRuntime

from controlplane.workers.base import UnitUnknownError, WorkerSpec
from controlplane.workers.process import ProcessRuntime

SPEC = WorkerSpec(
    cluster_id=ID,
    name="mc-contract-u0",
    pool="a",
    site=1,
    process_names=("a-1-0",),
    threads_per_process=1,
    memory_bytes_per_process=1 << 28,
    scheduler_address="tcp://127.0.0.1:1",  # nobody is there: a worker tries, and waits
    address=None,
    uid=0,
    gid=0,
    deadline_seconds=60.0,
)


@pytest.fixture(params=["fake", "process"])
def bench(request, tmp_path):
    """A runtime, and a way to wait for a state in its own time."""
    if request.param == "fake":
        clock = FakeClock()
        runtime = FakeRuntime(clock.monotonic)

        def pass_seconds(seconds):
            clock.now += seconds
    else:
        runtime = ProcessRuntime(tmp_path / "units")

        def pass_seconds(seconds):
            time.sleep(0.05)

    async def state_of(name):
        return (await runtime.observe())[name].state

    async def wait_for(name, state):
        until = time.monotonic() + 30
        while await state_of(name) != state:
            assert time.monotonic() < until, f"{name} is {await state_of(name)}, not {state}"
            pass_seconds(1)

    runtime.wait_for = wait_for
    yield runtime
    asyncio.run(runtime.stop(SPEC.name, 0.1))


@pytest.fixture
def unit():
    """A unit that this account may start."""
    import os

    return replace(SPEC, uid=os.geteuid(), gid=os.getegid())


def test_a_unit_is_observed_from_its_start_until_it_is_stopped(bench, unit):
    async def act():
        assert await bench.observe() == {}
        started = await bench.start(unit)
        assert (started.name, started.cluster_id) == (unit.name, unit.cluster_id)
        assert started.state in {"starting", "running"}
        await bench.wait_for(unit.name, "running")
        assert set(await bench.observe()) == {unit.name}
        await bench.stop(unit.name, 0.1)
        assert await bench.observe() == {}

    asyncio.run(act())


def test_a_start_again_changes_nothing_and_replaces_what_has_exited(bench, unit):
    async def act():
        await bench.start(unit)
        await bench.wait_for(unit.name, "running")
        before = (await bench.observe())[unit.name]
        assert await bench.start(unit) == before
        await bench.renew(unit.name, 0.0)
        await bench.wait_for(unit.name, "exited")
        assert (await bench.observe())[unit.name].pid is None
        await bench.start(unit)
        await bench.wait_for(unit.name, "running")

    asyncio.run(act())


def test_what_is_not_there_can_be_stopped_but_neither_renewed_nor_read(bench, unit):
    async def act():
        await bench.stop("mc-nobody", 0.1)
        with pytest.raises(UnitUnknownError):
            await bench.renew("mc-nobody", 10.0)
        with pytest.raises(UnitUnknownError):
            await bench.logs("mc-nobody", 10)

    asyncio.run(act())
