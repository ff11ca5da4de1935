"""What the Guard decides, without a cluster; and what it relies on in distributed."""

from __future__ import annotations

import asyncio
import gc
import itertools
import pickle
import weakref
from types import SimpleNamespace

import distributed
import pytest
from distributed import Scheduler
from distributed.protocol import dumps, loads
from distributed.stealing import WorkStealing
from hypothesis import given
from hypothesis import strategies as st

from meshcompute.errors import MeshError, UnknownPoolError, UnmetDemandError
from meshcompute.pools import Held
from meshcompute.scheduler import internals
from meshcompute.scheduler.extensions import EXTENSIONS
from meshcompute.scheduler.guard import Guard, shuffle_pool
from meshcompute.scheduler.internals import check_internals
from meshcompute.scheduler.queues import (
    IdleWorkers,
    Lanes,
    PoolQueue,
    assign_pool,
    drop_pool,
    hold_as_noted,
    is_pinned,
    pool_of,
)
from meshcompute.scheduler.state import PoolScheduler

# ---------------------------------------------------------------------- what we rely on in distributed


def test_the_installed_distributed_has_the_internals_that_we_rely_on():
    check_internals()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (Scheduler, "_transition_waiting_processing"),
        (Scheduler, "stimulus_queue_slots_maybe_opened"),
        (WorkStealing, "_get_thief"),
    ],
)
def test_a_method_that_is_gone_is_named_with_the_version_of_distributed(monkeypatch, kind, name):
    owner = next(k for k in kind.__mro__ if name in vars(k))
    monkeypatch.delattr(owner, name)
    with pytest.raises(MeshError, match=rf"{kind.__name__}\.{name}") as caught:
        check_internals()
    assert distributed.__version__ in str(caught.value)


def test_a_method_with_other_parameters_is_named(monkeypatch):
    owner = next(k for k in Scheduler.__mro__ if "valid_workers" in vars(k))
    monkeypatch.setattr(owner, "valid_workers", lambda self, task_state: None)
    with pytest.raises(MeshError, match=r"Scheduler\.valid_workers"):
        check_internals()


def test_a_transition_that_is_gone_is_named(monkeypatch):
    table = {move: do for move, do in Scheduler._TRANSITIONS_TABLE.items() if move != ("queued", "processing")}
    monkeypatch.setattr(Scheduler, "_TRANSITIONS_TABLE", table)
    with pytest.raises(MeshError, match="queued to processing"):
        check_internals()


def test_every_method_that_we_override_exists_and_is_checked():
    for extension in EXTENSIONS.values():
        base = extension.__mro__[1]
        for name, method in vars(extension).items():
            assert hasattr(method, "overrides") == (name in dir(base)) or name.startswith("__"), (extension, name)
    ours = {"pool_transitions", "_parent", "_plan", "pool_lanes", "pool_counts", "pool_sizes", "is_pool_expected"}
    for name, method in vars(PoolScheduler).items():
        if callable(method) and not name.startswith("__") and name not in ours and hasattr(Scheduler, name):
            assert name in internals._METHODS, name


# ---------------------------------------------------------------------- pools of tasks


class Task:
    """The part of a scheduler's task that pools look at."""

    def __init__(self, pool: str | None = None, priority: int = 0, *, pinned: bool = True, **demands: float) -> None:
        self.key = priority
        self.priority = (0, 1, priority)
        self.state, self.waiters, self.dependencies = "waiting", set(), set()
        self.annotations: dict | None = None
        self.resource_restrictions = Held(pool, demands, is_pinned=pinned) if pool else demands or None


def test_a_task_that_came_without_a_plan_has_a_pool_only_where_annotation_and_resource_agree():
    for noted in (None, {}, {"pool": None}, {"pool": "swimming"}, {"pool": {}}, {"pool": {"name": "b"}}):
        task = Task()
        task.resource_restrictions, task.annotations = {"pool-a": 0, "GPU": 1}, noted
        hold_as_noted(task)
        assert pool_of(task) is None
    for pinned in (True, False):
        task.annotations = {"pool": {"name": "a", "pinned": pinned}}
        task.resource_restrictions = {"pool-a": 0, "GPU": 1}
        hold_as_noted(task)
        assert pool_of(task) == "a"
        assert is_pinned(task) is pinned
        assert task.resource_restrictions == {"pool-a": 0, "GPU": 1}


def test_what_a_task_is_held_to_travels_to_workers_as_a_plain_dictionary():
    message = {"resource_restrictions": Held("a", {"GPU": 1}, is_pinned=True)}
    assert loads(dumps(message)) == {"resource_restrictions": {"pool-a": 0, "GPU": 1}}


def test_a_pool_is_assigned_and_dropped_beside_other_demands_without_touching_shared_ones():
    shared = {"GPU": 1}
    task = Task()
    task.resource_restrictions = shared
    assign_pool(task, "a", pinned=True)
    assert task.resource_restrictions == {"pool-a": 0, "GPU": 1}
    assert pool_of(task) == "a"
    assert is_pinned(task)
    assign_pool(task, "b", pinned=False)
    assert task.resource_restrictions == {"pool-b": 0, "GPU": 1}
    assert not is_pinned(task)
    drop_pool(task)
    assert task.resource_restrictions == shared == {"GPU": 1}
    assert pool_of(task) is None


# ---------------------------------------------------------------------- lanes and queues


class FakeScheduler(SimpleNamespace):
    """Workers with resources; all run and have a free slot."""

    def __init__(self, resources_by_worker: dict[str, dict[str, float]]) -> None:
        workers = {name: Worker(name) for name in resources_by_worker}
        resources: dict[str, dict[str, float]] = {}
        for name, offers in resources_by_worker.items():
            for resource, amount in offers.items():
                resources.setdefault(resource, {})[name] = amount
        super().__init__(
            WORKER_SATURATION=1.1,
            workers=workers,
            resources=resources,
            running=set(workers.values()),
            idle_task_count=set(workers.values()),
        )


class Worker:
    """A worker, as far as lanes look at it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.nthreads = 2


def names(workers) -> set[str]:
    return {ws.address for ws in workers}


def test_a_lane_is_all_running_workers_that_meet_all_demands():
    scheduler = FakeScheduler(
        {
            "a0": {"pool-a": 1},
            "a1": {"pool-a": 1, "GPU": 2},
            "a2": {"pool-a": 1, "GPU": 1},
            "b0": {"pool-b": 1, "GPU": 2},
        }
    )
    lanes = Lanes(scheduler, lambda lane: True)
    scheduler.idle_task_count = IdleWorkers(scheduler.idle_task_count, lanes)
    lane = lanes.of(Task("a", GPU=2))
    assert names(lane.workers) == {"a1"}
    everyone = lanes.of(Task("a"))
    assert names(everyone.workers) == {"a0", "a1", "a2"}
    assert lanes.of(Task("a")) is everyone
    assert lanes.of(Task(GPU=1)) is None
    assert everyone.nthreads == 6

    a1 = scheduler.workers["a1"]
    scheduler.idle_task_count.discard(a1)
    assert not lane.idle
    assert names(everyone.idle) == {"a0", "a2"}
    scheduler.idle_task_count.add(a1)
    assert names(lane.idle) == {"a1"}

    scheduler.running.discard(a1)  # paused: it may come back
    lanes.invalidate()
    lane = lanes.of(Task("a", GPU=2))
    assert not lane.workers
    assert lane.n_present == 1
    assert lanes.of(Task("mars")).n_present == 0


def test_lanes_without_queued_tasks_are_forgotten_when_there_are_too_many():
    lanes = Lanes(FakeScheduler({"a0": {"pool-a": 1}}), lambda lane: lane.demands.get("MEM") == 7)
    for amount in range(1000):
        lanes.of(Task("a", MEM=amount))
    assert len(lanes.fresh()) < 100
    assert any(lane.demands["MEM"] == 7 for lane in lanes.fresh())


@given(
    st.lists(st.tuples(st.sampled_from([None, "a", "b"]), st.integers(0, 99)), unique_by=lambda t: t[1]),
    st.sets(st.sampled_from(["a0", "b0"])),
    st.data(),
)
def test_a_queue_starts_the_first_task_that_a_free_worker_may_take(tasks, idle_names, data):
    scheduler = FakeScheduler({"a0": {"pool-a": 1}, "b0": {"pool-b": 1}})
    scheduler.idle_task_count = {scheduler.workers[name] for name in idle_names}
    lanes = Lanes(scheduler, lambda lane: True)
    queue = PoolQueue(lanes.of)
    queued = {Task(pool, priority) for pool, priority in tasks}
    for task in queued:
        queue.add(task)
        queue.add(task)
    gone = data.draw(st.sets(st.sampled_from(sorted(queued, key=lambda t: t.priority)))) if queued else set()
    for task in gone:
        drop_pool(task)  # its lane may change while it is queued
        queue.discard(task)
        queue.discard(task)
    left = queued - gone
    assert set(queue) == left
    assert len(queue) == len(left)
    assert [t.key for t in queue.sorted()] == sorted(t.key for t in left)
    assert queue.has_pools() == any(pool_of(t) for t in left)

    free = {name[0] for name in idle_names}
    startable = [t for t in left if (pool_of(t) in free if pool_of(t) else free)]
    found = queue.next_to_start(scheduler.idle_task_count, set())
    assert (found and found[1]) == min(startable, key=lambda t: t.priority, default=None)
    if found:
        other = queue.next_to_start(scheduler.idle_task_count, {found[0]})
        assert other is None or pool_of(other[1]) != pool_of(found[1])


def two_queues(n_exports, *, graph_of_b=1, workers_of_a=("a0",)):
    """Loads of a and b in turn, b's worker free; b has made values that wait for tasks of a."""
    offers = {name: {f"pool-{name[0]}": 1} for name in (*workers_of_a, "b0")}
    scheduler = FakeScheduler(offers)
    scheduler.idle_task_count = {scheduler.workers["b0"]}
    lanes = Lanes(scheduler, lambda lane: True)
    queue = PoolQueue(lanes.of)
    queue.lanes = lanes
    loads = [Task("ab"[i % 2], 10 + i) for i in range(8)]
    for load in loads:
        if pool_of(load) == "b":
            load.priority = (0, graph_of_b, load.key)
        queue.add(load)
    values = [Task("b", i) for i in range(n_exports)]
    for value in values:
        value.waiters = {Task("a", 100)}
        lanes.note_value(value)
        value.state = "memory"
    return queue, scheduler.idle_task_count, values


# Two threads, of which distributed fills three slots; two rounds of that.
AHEAD = 6


def test_a_pool_whose_values_pile_up_for_another_pool_waits_for_its_turn():
    queue, idle, values = two_queues(AHEAD)
    assert queue.next_to_start(idle, set()) is None
    values[0].state = "released"  # read
    assert queue.next_to_start(idle, set())[1].key == 11


def test_a_pool_whose_values_are_few_or_read_at_home_does_not_wait():
    queue, idle, values = two_queues(AHEAD - 1)
    assert queue.next_to_start(idle, set())[1].key == 11
    queue, idle, values = two_queues(2 * AHEAD)
    for value in values:
        value.waiters = {Task("b", 100)}
    assert queue.next_to_start(idle, set())[1].key == 11


def test_a_relayed_value_counts_until_it_is_read_at_its_destination():
    queue, idle, values = two_queues(AHEAD)
    for i, value in enumerate(values):
        relay = Task("a", 50 + i)
        relay.resource_restrictions = Held("a", is_pinned=False, is_fetching=True)
        relay.prefix = SimpleNamespace(name="relay-a-load")
        relay.dependencies, relay.waiters = {value}, {Task("a", 100)}
        queue.lanes.note_value(relay)
        value.state, relay.state = "released", "memory"
        values[i] = relay
    assert queue.next_to_start(idle, set()) is None
    values[0].waiters.clear()
    assert queue.next_to_start(idle, set())[1].key == 11


def test_a_pool_waits_for_no_other_graph_and_for_no_pool_without_workers():
    queue, idle, _ = two_queues(AHEAD, graph_of_b=2)
    assert queue.next_to_start(idle, set())[1].key == 11
    queue, idle, _ = two_queues(AHEAD, workers_of_a=())
    assert queue.next_to_start(idle, set())[1].key == 11


def test_the_first_task_of_all_never_waits():
    queue, idle, _ = two_queues(AHEAD)
    queue.discard(next(task for task in queue if task.key == 10))
    assert queue.next_to_start(idle, set())[1].key == 11


def test_values_that_are_gone_are_not_kept_by_the_count_of_them():
    queue, idle, values = two_queues(AHEAD)
    left = weakref.ref(values[0])
    values.clear()
    gc.collect()
    assert left() is None
    assert queue.next_to_start(idle, set()) is not None


# ---------------------------------------------------------------------- shuffles and errors


@pytest.mark.parametrize(
    ("outputs", "barrier", "inputs", "expected"),
    [
        ([("a", True), ("b", False)], "b", ["b"], "a"),
        ([("a", False), ("a", False)], "b", ["a"], "b"),
        ([("a", False), ("a", False), ("b", False)], None, ["b"], "a"),
        ([(None, False)], None, ["a", "a"], "a"),
        ([(None, False)], None, ["a", "b"], None),
        ([(None, False)], None, ["a", None], None),
        ([], None, [], None),
    ],
)
def test_a_shuffle_delivers_where_its_outputs_are_pinned_else_where_its_barrier_is(outputs, barrier, inputs, expected):
    assert shuffle_pool(outputs, barrier, inputs) == expected


def test_an_unmet_demand_pickles_with_its_facts_and_says_what_to_do():
    error = UnmetDemandError("a", ["b", "a"], 30.0, "key", {"GPU": 1}, ["tcp://1.2.3.4:5"])
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, UnknownPoolError)
    assert (again.pool, again.pools, again.demands, again.workers) == ("a", ("a", "b"), {"GPU": 1}, error.workers)
    assert "GPU=1" in str(again)
    assert "tcp://1.2.3.4:5" in str(again)
    assert str(again) == str(error)


# ---------------------------------------------------------------------- a scheduler without any worker


def test_installing_twice_changes_a_scheduler_once_and_keeps_what_is_queued():
    async def check():
        async with Scheduler(dashboard=False, dashboard_address="127.0.0.1:0", port=0, host="127.0.0.1") as scheduler:
            task = scheduler.new_task("x-1", None, "queued")
            task.priority = (0, 1, 2)
            scheduler.queued.add(task)
            guard = Guard.install(scheduler)
            kind = type(scheduler)
            assert isinstance(scheduler, PoolScheduler)
            assert kind.__name__ == "Scheduler"  # what clients show
            assert list(scheduler.queued) == [task]
            assert Guard.install(scheduler) is guard
            assert type(scheduler) is kind
            assert scheduler.handlers["set_resources"].__func__ is PoolScheduler.add_resources
            for name in EXTENSIONS:
                assert isinstance(scheduler.extensions[name], EXTENSIONS[name])
            guard.expect_workers("a", 60)
            assert guard.is_expected("a")
            assert not guard.is_expected("b")
            guard.expect_workers("a", 0)
            assert not guard.is_expected("a")
            scheduler.queued.clear()
            scheduler.tasks.clear()

    asyncio.run(check())


def test_workers_with_the_same_load_get_the_work_of_a_big_pool_in_turn():
    # Hundreds of workers are not all compared: the window has to move.
    ring = [Worker(f"w{i:03}") for i in range(100)]
    lane = SimpleNamespace(idle=set(ring), ring=ring)
    seen = set()
    for n_tasks in itertools.count(step=20):
        some = PoolScheduler._some_of(SimpleNamespace(n_tasks=n_tasks), lane)
        assert len(some) == 20
        seen |= names(some)
        if n_tasks >= 100:
            break
    assert seen == names(ring)
    lane.idle = set(ring[:3])
    assert PoolScheduler._some_of(SimpleNamespace(n_tasks=50), lane) == lane.idle
