"""The Guard on a stock scheduler in a process of its own, with workers from the command line.

The scheduler checks its own state at every transition (``distributed.scheduler.validate``), and every cluster's log
must be free of tracebacks in the end. Tasks are held to pools by hand here, without the rest of meshcompute.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cloudpickle
import dask
import dask.array as da
import numpy as np
import pytest
from distributed import (
    Client,
    Event,
    Scheduler,
    SchedulerPlugin,
    SpecCluster,
    Worker,
    futures_of,
    get_client,
    get_worker,
    secede,
    wait,
)
from waiting import wait_until

from meshcompute.errors import UnknownPoolError, UnmetDemandError
from meshcompute.scheduler.guard import Guard

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file

SETTINGS = {
    "DASK_OPTIMIZATION__FUSE__ACTIVE": "False",  # annotations of layers get lost otherwise
    "DASK_DISTRIBUTED__SCHEDULER__VALIDATE": "True",
    "DASK_DISTRIBUTED__SCHEDULER__ACTIVE_MEMORY_MANAGER__START": "False",  # tests run it by hand
    "DASK_DISTRIBUTED__SCHEDULER__WORK_STEALING_INTERVAL": "20ms",
    "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "20",
    "DASK_ARRAY__CHUNK_SIZE": "1kiB",  # small inputs of a P2P rechunk would be merged into one
    "DASK_DISTRIBUTED__ADMIN__TICK__LIMIT": "60s",
    "DASK_MESHCOMPUTE__MISSING_POOL_TIMEOUT": "1s",
}
# Dask sends a worker ceil(1.1 * threads) root tasks at once.
SLOTS_BY_THREADS = {1: 2, 2: 3}


class Cluster:
    """A scheduler and workers as a user starts them, each a process that this object ends by its pid."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder
        self.environment = os.environ | SETTINGS | settings
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        file = folder / "scheduler.json"
        options = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
        self._start("scheduler", ["scheduler", *options])
        wait_until(lambda: file.exists() and file.read_text().strip().endswith("}"), "a scheduler")
        self.address = json.loads(file.read_text())["address"]

    def _start(self, name: str, arguments: list[str]) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "dask", *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd=self.folder,
            )

    def add_worker(self, name: str, resources: str, threads: int = 1) -> None:
        options = ["--name", name, "--nthreads", str(threads), "--host", "127.0.0.1", "--memory-limit", "0"]
        options += ["--no-nanny", "--no-dashboard", "--local-directory", str(self.folder)]
        options += ["--resources", resources] if resources else []
        self._start(name, ["worker", self.address, *options])

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        process.kill()
        process.wait(30)

    def close(self) -> None:
        for name in list(self.processes):
            self.kill(name)


@contextlib.contextmanager
def cluster_of(folder: Path, workers: dict[str, tuple[str, int]], **settings: str) -> Iterator[tuple[Cluster, Client]]:
    cluster = Cluster(folder, **settings)
    try:
        for name, (resources, threads) in workers.items():
            cluster.add_worker(name, resources, threads)
        with Client(cluster.address) as client:
            client.wait_for_workers(len(workers), timeout=60)
            on_scheduler(client, Guard.install)
            yield cluster, client
            assert statistics(client)["wrong_pool"] == 0
            assert statistics(client)["failures"] == 0
            on_scheduler(client, Scheduler.validate_state)
    finally:
        cluster.close()
    log = (folder / "scheduler.log").read_text()
    assert "Traceback" not in log, log[-6000:]


@pytest.fixture(autouse=True)
def _plain_client(monkeypatch):
    """These tests write what the planner would write: a client that was hooked by other tests must not plan again."""
    plain = getattr(Client._graph_to_futures, "__wrapped__", Client._graph_to_futures)
    monkeypatch.setattr(Client, "_graph_to_futures", plain)


@pytest.fixture(scope="module")
def two_pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Pools of different size: a has 2 workers with 2 threads each, b 2 workers with one."""
    workers = {"a-0": ("pool-a=1", 2), "a-1": ("pool-a=1", 2), "b-0": ("pool-b=1", 1), "b-1": ("pool-b=1", 1)}
    with cluster_of(tmp_path_factory.mktemp("two"), workers) as (_, client):
        yield client


def on_scheduler(client: Client, function: Callable, *args):
    """Call a function with the scheduler, there, and return plain results."""

    def call(dask_scheduler):
        result = function(dask_scheduler, *args)
        return None if isinstance(result, Guard) else result

    return client.run_on_scheduler(call)


def statistics(client: Client) -> dict:
    return on_scheduler(client, lambda scheduler: scheduler.plugins["meshcompute"].statistics())


def held(pool: str, *, pinned: bool = True, resources: dict | None = None):
    return dask.annotate(resources={f"pool-{pool}": 0, **(resources or {})}, pool={"name": pool, "pinned": pinned})


def submit(client: Client, pool: str, function: Callable, *args, pinned: bool = True, resources=None, **kwargs):
    with held(pool, pinned=pinned, resources=resources):
        return client.submit(function, *args, pure=False, **kwargs)


def names_of(client: Client) -> dict[str, str]:
    return on_scheduler(client, lambda scheduler: {ws.address: ws.name for ws in scheduler.workers.values()})


def holders(client: Client, futures) -> list[set[str]]:
    """Names of the workers that hold each of some results."""
    wait(futures, timeout=60)
    names = names_of(client)
    return [{names[address] for address in client.who_has([f])[f.key]} for f in futures]


def pools_that_hold(client: Client, futures) -> set[str]:
    return {name[0] for found in holders(client, futures) for name in found}


def processing(client: Client) -> dict[str, int]:
    """Number of tasks that each worker has been sent and has not finished."""
    return on_scheduler(client, lambda s: {ws.name: len(ws.processing) for ws in s.workers.values()})


def wait_for_event(name: str, *_) -> bool:
    return Event(name).wait(60)


def my_name(*_) -> str:
    return get_worker().name


# ---------------------------------------------------------------------- running inside of a pool


def test_amount_zero_lets_every_thread_work_at_once(two_pools):
    def meet(i):
        Event(f"here-{i}").set()
        return all(Event(f"here-{j}").wait(30) for j in range(4))

    futures = [submit(two_pools, "a", meet, i) for i in range(4)]
    assert two_pools.gather(futures) == [True] * 4


def test_stealing_never_leaves_a_pool_even_where_restrictions_are_loose(two_pools):
    client = two_pools
    before = statistics(client)["steals_refused"]
    a0 = next(address for address, name in names_of(client).items() if name == "a-0")

    def work(i):
        time.sleep(0.05)
        return get_worker().name

    # Names of their own: root tasks of one group would be queued, and nobody could steal them.
    keys = [(f"loose-{i}", 0) for i in range(40)]
    loose = [client.submit(work, i, key=k, workers=[a0], allow_other_workers=True) for i, k in enumerate(keys)]
    assert {name[0] for name in client.gather(loose)} == {"a", "b"}, "stealing was not provoked"

    keys = [(f"held-{i}", 0) for i in range(40)]
    with held("a"):
        futures = [client.submit(work, i, key=k, workers=[a0], allow_other_workers=True) for i, k in enumerate(keys)]
    assert set(client.gather(futures)) == {"a-0", "a-1"}  # within the pool it is welcome
    assert statistics(client)["steals_refused"] > before


def test_tasks_without_a_pool_are_left_alone(two_pools):
    client = two_pools
    before = statistics(client)
    x = da.random.default_rng(0).random((200, 200), chunks=(20, 20))
    assert abs(float(x.mean().compute()) - 0.5) < 0.1
    by_hand = client.submit(my_name, resources={"pool-b": 1}, pure=False)  # a restriction of Dask's own
    assert by_hand.result(timeout=30)[0] == "b"
    assert statistics(client) == before


def test_children_of_a_task_inherit_its_pool_unless_they_say_otherwise(two_pools):
    client = two_pools

    def parent(n):
        inner = get_client()
        secede()
        plain = inner.map(my_name, range(n), pure=False)
        with dask.annotate(pool={"name": None}):
            free = inner.submit(describe, pure=False)
        with dask.annotate(resources={"pool-a": 0}, pool={"name": "a", "pinned": True}):
            other = inner.submit(my_name, pure=False)
        return inner.gather(plain), free.result(), other.result()

    def describe():
        return get_worker().state.tasks[get_worker().get_current_task()].resource_restrictions

    names, restrictions, other = submit(client, "b", parent, 8).result(timeout=60)
    assert {name[0] for name in names} == {"b"}
    assert not restrictions
    assert other[0] == "a"
    names, *_ = client.submit(parent, 40, pure=False).result(timeout=60)  # a parent without a pool
    assert {name[0] for name in names} == {"a", "b"}


# ---------------------------------------------------------------------- queues


def test_a_full_pool_queues_its_root_tasks_and_blocks_nobody_else(two_pools):
    client = two_pools
    go = Event("go", client=client)
    go.clear()
    with held("a"):
        blocked = client.map(wait_for_event, ["go"] * 60, pure=False)
    wait_until(lambda: statistics(client)["queued"].get("a") == 60 - 2 * SLOTS_BY_THREADS[2], "a full pool")
    assert processing(client) == {"a-0": 3, "a-1": 3, "b-0": 0, "b-1": 0}

    with held("b"):  # root tasks of the same group
        other = client.map(wait_for_event, ["now"] * 60, pure=False)
    wait_until(lambda: statistics(client)["queued"].get("b") == 60 - 2 * SLOTS_BY_THREADS[1], "another full pool")
    Event("now", client=client).set()
    assert client.gather(other) == [True] * 60
    assert client.gather(client.map(pow, range(100), [2] * 100)) == [i**2 for i in range(100)]  # no pool at all
    assert statistics(client)["queued"] == {"a": 54}

    # Priorities hold within a pool: what is more urgent overtakes the queue.
    with held("a"):
        urgent = client.map(my_name, range(20), pure=False, priority=10)
    wait_until(lambda: statistics(client)["queued"] == {"a": 74}, "urgent tasks in the queue")
    go.set()
    wait(urgent, timeout=60)
    assert {name[0] for name in client.gather(urgent)} == {"a"}
    assert client.gather(blocked) == [True] * 60
    assert statistics(client)["queued"] == {}


def test_cancelled_tasks_leave_the_queue_and_the_pool_works_on(two_pools):
    client = two_pools
    with held("b"):
        futures = client.map(wait_for_event, ["cancelled"] * 40, pure=False)
    wait_until(lambda: statistics(client)["queued"].get("b") == 40 - 2 * SLOTS_BY_THREADS[1], "a full pool")
    client.cancel(futures)
    wait_until(lambda: statistics(client)["queued"] == {}, "an empty queue")
    Event("cancelled", client=client).set()  # threads cannot be interrupted
    with held("b"):
        assert {name[0] for name in client.gather(client.map(my_name, range(20), pure=False))} == {"b"}


class PeakOfLoads(SchedulerPlugin):
    """The largest number of values of ``load`` in memory at any time."""

    name = "peak-of-loads"

    def __init__(self) -> None:
        self.scheduler = None
        self.held: set = set()
        self.peak = 0

    def transition(self, key, start, finish, *args, **kwargs):
        if key[0].startswith("load"):
            (self.held.add if finish == "memory" else self.held.discard)(key)
            self.peak = max(self.peak, len(self.held))


def test_pinned_loads_hold_no_more_in_memory_than_stock(tmp_path):
    def load(block_info=None):
        return np.ones((10, 10))

    def consume(block):
        time.sleep(0.02)
        return block[:1, :1]

    def peak(client: Client, name: str, annotations: dict) -> int:
        plugin = PeakOfLoads()
        on_scheduler(client, lambda s: s.add_plugin(plugin))
        with dask.annotate(**annotations):
            x = da.map_blocks(load, chunks=((10,) * 120, (10,)), name=f"load-{name}", meta=np.ones((0, 0)))
            y = x.map_blocks(consume, chunks=((1,) * 120, (1,)), name=f"consume-{name}", meta=np.ones((0, 0)))
        y = y.persist(optimize_graph=False)
        wait(y, timeout=60)
        return on_scheduler(client, lambda s: (s.plugins["peak-of-loads"].peak, s.remove_plugin("peak-of-loads"))[0])

    # Like for like: all three have the same workers. The naive way floods them at once.
    with cluster_of(tmp_path, {"a-0": ("pool-a=1", 2), "a-1": ("pool-a=1", 2)}) as (_, client):
        ours = peak(client, "ours", {"resources": {"pool-a": 0}, "pool": {"name": "a", "pinned": True}})
        naive = peak(client, "naive", {"resources": {"pool-a": 0}})
        stock = peak(client, "stock", {})
    print(f"values of load in memory at once: stock {stock}, ours {ours}, naive {naive}")
    assert ours <= 1.1 * stock
    assert ours < naive


# ---------------------------------------------------------------------- replicas


def test_values_are_fetched_from_the_own_pool_where_it_has_a_copy(two_pools):
    client = two_pools
    b0, b1 = (address for address, name in sorted(names_of(client).items(), key=lambda i: i[1]) if name[0] == "b")
    values = [submit(client, "a", np.full, 1000, float(i)) for i in range(20)]
    wait(values)
    with held("b"):
        first = client.map(np.sum, values, workers=[b0], pure=False)
    wait(first, timeout=30)
    assert all({"b-0"} == {name for name in found if name[0] == "b"} for found in holders(client, values))
    with held("b"):
        second = client.map(np.max, values, workers=[b1], pure=False)
    assert client.gather(second) == [float(i) for i in range(20)]

    values_keys = {f.key for f in values}

    def incoming(dask_worker):
        return [entry["who"] for entry in dask_worker.transfer_incoming_log if values_keys & set(entry["keys"])]

    assert set(client.run(incoming, workers=[b1])[b1]) == {b0}

    # A worker whose known holders are all busy asks the scheduler for others.
    busy = submit(client, "b", lambda _: Event("busy").wait(60), values[0], workers=[b1])
    wait_until(lambda: processing(client)["b-1"] == 1, "a task that needs the value")
    assert on_scheduler(client, holders_told, values[0].key, b1, "task-finished") == {b0, b1}
    everywhere = set(client.who_has([values[0]])[values[0].key])
    assert on_scheduler(client, holders_told, values[0].key, b1, "find-missing") == everywhere > {b0, b1}
    Event("busy", client=client).set()
    assert busy.result(timeout=30)


def holders_told(scheduler, key, worker: str, stimulus_id: str) -> set[str]:
    """What a worker that asks for holders of a value would be told."""
    told = []
    comm = scheduler.stream_comms[worker]
    scheduler.stream_comms[worker] = type("Listener", (), {"send": lambda self, message: told.append(message)})()
    try:
        scheduler.stream_handlers["request-refresh-who-has"](keys=[key], worker=worker, stimulus_id=stimulus_id)
    finally:
        scheduler.stream_comms[worker] = comm
    return {holder for message in told for holder in message["who_has"][key]}


def test_the_memory_manager_keeps_the_last_copy_of_every_pool_that_needs_one(two_pools):
    client = two_pools
    values = [submit(client, "a", np.full, 1000, float(i)) for i in range(10)]
    here = [submit(client, "b", np.sum, value) for value in values]
    wait(here, timeout=30)
    assert all({name[0] for name in found} == {"a", "b"} for found in holders(client, values))

    gate = submit(client, "b", wait_for_event, "gate")  # not before: what is behind it at its worker waits for it
    waiting = [submit(client, "b", lambda x, _: float(x.sum()), value, gate) for value in values[:5]]
    wait_until(lambda: on_scheduler(client, is_waited_for, [v.key for v in values[:5]]), "consumers that wait in b")
    client.amm.run_once()
    wait_until(lambda: all(len(found) == 1 for found in holders(client, values[5:])), "fewer replicas")
    assert all({name[0] for name in found} == {"a"} for found in holders(client, values[5:]))  # where they belong
    assert all({name[0] for name in found} == {"a", "b"} for found in holders(client, values[:5]))

    Event("gate", client=client).set()
    assert client.gather(waiting) == [1000.0 * i for i in range(5)]
    client.amm.run_once()
    wait_until(lambda: all(len(found) == 1 for found in holders(client, values)), "one replica of each")
    assert pools_that_hold(client, values) == {"a"}


def is_waited_for(scheduler, keys) -> bool:
    return all(scheduler.tasks[key].waiters for key in keys)


def test_a_retired_worker_leaves_its_values_in_the_pool(tmp_path):
    workers = {"a-0": ("pool-a=1", 1), "a-1": ("pool-a=1", 1), "b-0": ("pool-b=1", 1), "b-1": ("pool-b=1", 1)}
    running = {"DASK_DISTRIBUTED__SCHEDULER__ACTIVE_MEMORY_MANAGER__START": "True"}  # as by default
    with cluster_of(tmp_path, workers, **running) as (_, client):
        values = [submit(client, "a", np.full, 1000, float(i)) for i in range(40)]
        assert {name for found in holders(client, values) for name in found} == {"a-0", "a-1"}
        client.retire_workers(names=["a-0"])
        assert all(found == {"a-1"} for found in holders(client, values))


# ---------------------------------------------------------------------- pools that are missing or get lost


def test_a_pool_that_nobody_has_is_named_in_the_error(two_pools):
    client = two_pools
    future = submit(client, "mars", time.sleep, 0)
    dependent = client.submit(lambda x: x, future)
    with pytest.raises(UnknownPoolError) as caught:
        dependent.result(timeout=20)
    assert caught.value.pool == "mars"
    assert caught.value.pools == ("a", "b")
    assert caught.value.timeout_seconds == 1
    assert client.submit(lambda: 1).result(timeout=20) == 1  # the scheduler is as usable as before


def test_a_pool_without_what_else_the_work_asks_for_is_named_too(two_pools):
    client = two_pools
    future = submit(client, "a", time.sleep, 0, resources={"GPU": 1})
    with pytest.raises(UnmetDemandError, match="GPU=1") as caught:
        future.result(timeout=20)
    assert isinstance(caught.value, UnknownPoolError)
    assert caught.value.pool == "a"
    assert caught.value.demands == {"GPU": 1}
    b0 = next(address for address, name in names_of(client).items() if name == "b-0")
    with pytest.raises(UnmetDemandError, match=b0):
        submit(client, "a", time.sleep, 0, workers=[b0]).result(timeout=20)


def test_work_placed_in_a_pool_that_never_was_runs_elsewhere(two_pools):
    assert submit(two_pools, "mars", my_name, pinned=False).result(timeout=20)[0] in "ab"
    names = [submit(two_pools, "a", my_name, pinned=False, resources={"pool-b": 0}) for _ in range(4)]
    assert {name[0] for name in two_pools.gather(names)} <= {"a", "b"}


def test_announced_workers_are_waited_for_and_not_flooded(tmp_path):
    with cluster_of(tmp_path, {"a-0": ("pool-a=1", 1)}) as (cluster, client):
        announce = client.scheduler.meshcompute_expect_workers
        client.sync(announce, pool="c", seconds=600)
        client.sync(announce, pool="d", seconds=0.5)
        with held("c"):
            expected = client.map(wait_for_event, ["c"] * 50, pure=False)
        late = submit(client, "d", time.sleep, 0)
        with pytest.raises(UnknownPoolError, match="'d'"):  # announced, but not for long enough
            late.result(timeout=20)
        assert {future.status for future in expected} == {"pending"}

        cluster.add_worker("c-0", "pool-c=1", 2)
        wait_until(lambda: statistics(client)["queued"] == {"c": 50 - SLOTS_BY_THREADS[2]}, "a full worker")
        cluster.add_worker("c-1", "pool-c=1", 2)
        wait_until(lambda: processing(client).get("c-1") == SLOTS_BY_THREADS[2], "its part for a second worker")
        Event("c", client=client).set()
        assert client.gather(expected) == [True] * 50


def test_when_a_pool_is_lost_placed_work_goes_elsewhere_and_pinned_work_waits_for_it(tmp_path):
    workers = {"a-0": ("pool-a=1", 2), "b-0": ("pool-b=1", 2)}
    with cluster_of(tmp_path, workers, DASK_MESHCOMPUTE__MISSING_POOL_TIMEOUT="20s") as (cluster, client):
        gate = submit(client, "b", wait_for_event, "gate")
        with held("a", pinned=False):
            placed = client.map(wait_for_event, ["go"] * 30, pure=False)  # running and queued
            later = client.map(lambda x, _: x, placed, [gate] * 30, pure=False)  # waiting
        with held("a"):
            pinned = client.map(wait_for_event, ["go"] * 30, pure=False)
        wait_until(lambda: statistics(client)["queued"] == {"a": 60 - SLOTS_BY_THREADS[2]}, "a full pool")
        cluster.kill("a-0")
        wait_until(lambda: statistics(client)["released"] >= 30, "placed tasks that leave the lost pool")
        Event("go", client=client).set()
        Event("gate", client=client).set()
        assert client.gather(later) == [True] * 30
        assert pools_that_hold(client, placed) == {"b"}
        assert {future.status for future in pinned} == {"pending"}

        cluster.add_worker("a-1", "pool-a=1", 2)  # in time
        assert client.gather(pinned) == [True] * 30
        assert pools_that_hold(client, pinned) == {"a"}


def test_pinned_work_of_a_pool_that_stays_lost_fails_and_a_restart_mends_all(tmp_path):
    workers = {"a-0": ("pool-a=1", 1), "b-0": ("pool-b=1", 1)}
    with cluster_of(tmp_path, workers) as (cluster, client):
        with held("a"):
            pinned = client.map(wait_for_event, ["never"] * 20, pure=False)
        wait_until(lambda: statistics(client)["queued"] == {"a": 20 - SLOTS_BY_THREADS[1]}, "a full pool")
        cluster.kill("a-0")
        for future in pinned:
            with pytest.raises(UnknownPoolError, match="'a'"):
                future.result(timeout=20)

        del pinned, future
        client.restart(wait_for_workers=False)  # without nannies, workers end for good
        for name in ("a", "b"):
            cluster.add_worker(f"{name}-1", f"pool-{name}=1", 1)
        wait_until(lambda: set(names_of(client).values()) == {"a-1", "b-1"}, "new workers")
        with held("a"):
            names = client.map(my_name, range(20), pure=False)
        assert set(client.gather(names)) == {"a-1"}


# ---------------------------------------------------------------------- P2P

# What a planner or the user's pins say about the three kinds of tasks of a P2P rechunk, pinned where upper case, and
# which pools hold the result. Two letters: tasks alternate between two pools.
SHUFFLES = {
    "all in one pool": ("a", "a", "a", "a"),
    "outputs placed in two pools": ("b", "b", "ab", "b"),
    "inputs of two pools": ("ab", "b", "", "b"),
    "inputs alone have a pool": ("B", "", "", "b"),
    "outputs pinned elsewhere": ("A", "a", "B", "b"),
    "barrier pinned elsewhere": ("A", "A", "B", "b"),
    "no pool at all": ("", "", "", "ab"),
}


def rechunk(say: tuple[str, str, str], *, gate: str = "", n_blocks: int = 8) -> tuple[da.Array, np.ndarray]:
    """Persist a P2P rechunk; all loads but the first wait for an event, where one is named."""
    values = np.random.default_rng(0).random((400, 400))

    def pool_for(key) -> str:
        name = key if isinstance(key, str) else key[0]
        kinds = {"rechunk-transfer": 0, "shuffle-barrier": 1, "rechunk-p2p": 2}
        kind = next((number for prefix, number in kinds.items() if name.startswith(prefix)), None)
        letters = "" if kind is None else say[kind]
        return letters[sum(key[1:]) % len(letters)] if len(letters) > 1 else letters

    def load(block_info=None):
        rows, columns = block_info[None]["array-location"]
        if gate and columns[0]:  # the first block's transfer starts the shuffle
            assert Event(gate).wait(250)
        return values[slice(*rows), slice(*columns)]

    width = 400 // n_blocks
    x = da.map_blocks(load, chunks=((400,), (width,) * n_blocks), meta=np.ones((0, 0)))
    with dask.config.set({"array.rechunk.method": "p2p", "array.chunk-size": "1kiB"}):
        y = x.rechunk((width, 400))
    with dask.annotate(
        resources=lambda key: {f"pool-{pool.lower()}": 0} if (pool := pool_for(key)) else {},
        pool=lambda key: {"name": pool.lower(), "pinned": pool.isupper()} if (pool := pool_for(key)) else None,
    ):
        return y.persist(optimize_graph=False), values


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_a_p2p_rechunk_delivers_into_one_pool(two_pools, shuffle):
    *say, where = SHUFFLES[shuffle]
    y, expected = rechunk(tuple(say))
    assert pools_that_hold(two_pools, futures_of(y)) == set(where)
    assert on_scheduler(two_pools, lambda s: sum("rechunk-transfer" in str(key) for key in s.tasks)) == 8
    np.testing.assert_array_equal(y.compute(), expected)


def test_a_p2p_rechunk_with_outputs_pinned_apart_is_right_or_says_why_and_never_hangs(two_pools):
    y, expected = rechunk(("A", "a", "AB"))
    wait(y, timeout=60)  # which worker gets which output is Dask's choice: it may happen to fit
    errors = [future.exception() for future in futures_of(y) if future.status == "error"]
    assert all(isinstance(error, UnmetDemandError) and error.workers for error in errors)
    assert statistics(two_pools)["wrong_pool"] == 0  # whatever came of it, every pin held
    if not errors:
        np.testing.assert_array_equal(y.compute(), expected)


@pytest.mark.timeout(300)  # five processes start, one after the other
def test_a_p2p_rechunk_survives_workers_that_leave_and_join_its_pool(tmp_path):
    """More threads everywhere than loads that wait: else these may fill the worker that is to start the shuffle."""
    workers = {"a-0": ("pool-a=1", 4), "a-1": ("pool-a=1", 4), "b-0": ("pool-b=1", 4)}
    with cluster_of(tmp_path, workers) as (cluster, client):
        y, expected = rechunk(("a", "A", "A"), gate="load", n_blocks=4)

        def running() -> set[str]:
            return on_scheduler(client, lambda s: {ws.name for ws in s.running})

        def runs_of_shuffle() -> list[int]:
            return on_scheduler(
                client, lambda s: [run.run_id for run in s.extensions["shuffle"].active_shuffles.values()]
            )

        (first,) = wait_until(runs_of_shuffle, "a shuffle", 100)
        cluster.add_worker("a-2", "pool-a=1", 4)
        wait_until(lambda: running() == {"a-0", "a-1", "a-2", "b-0"}, "a worker that joins", 100)
        cluster.kill("a-0")
        wait_until(lambda: running() == {"a-1", "a-2", "b-0"}, "a worker that leaves", 100)
        (second,) = wait_until(lambda: [run for run in runs_of_shuffle() if run != first], "the shuffle again", 100)
        assert second > first
        Event("load", client=client).set()
        assert pools_that_hold(client, futures_of(y)) == {"a"}
        np.testing.assert_array_equal(y.compute(), expected)


# ---------------------------------------------------------------------- kinds of schedulers, and faults


def test_without_worker_saturation_nothing_is_queued(tmp_path):
    infinite = {"DASK_DISTRIBUTED__SCHEDULER__WORKER_SATURATION": "inf"}
    with cluster_of(tmp_path, {"a-0": ("pool-a=1", 1)}, **infinite) as (_, client):
        with held("a"):
            futures = client.map(wait_for_event, ["go"] * 20, pure=False)
        wait_until(lambda: processing(client) == {"a-0": 20}, "all tasks on the worker")
        Event("go", client=client).set()
        assert client.gather(futures) == [True] * 20


def test_decisions_that_fail_are_left_to_dask_and_pins_hold_even_then():
    def break_lanes(scheduler):
        scheduler.pool_lanes.of = None

    specs = {
        name: {"cls": Worker, "options": {"nthreads": 1, "resources": {f"pool-{name[0]}": 1}}}
        for name in ("a-0", "b-0")
    }
    scheduler = {"cls": Scheduler, "options": {"dashboard": False, "dashboard_address": "127.0.0.1:0", "port": 0}}
    with SpecCluster(specs, scheduler) as cluster, Client(cluster) as client:  # in this very process
        client.wait_for_workers(2, timeout=30)
        on_scheduler(client, Guard.install)
        assert on_scheduler(client, lambda s: Guard.install(s) is Guard.install(s) is s.plugins["meshcompute"])
        with held("a"):
            before = client.map(my_name, range(20), pure=False)
        assert set(client.gather(before)) == {"a-0"}
        assert statistics(client)["failures"] == 0
        on_scheduler(client, break_lanes)
        for pinned in (True, False):
            with held("b", pinned=pinned):
                futures = client.map(my_name, range(20), pure=False)
            assert set(client.gather(futures)) == {"b-0"}
        assert sum(client.gather(client.map(abs, range(50)))) == sum(range(50))
        assert statistics(client)["failures"] > 0
        assert statistics(client)["wrong_pool"] == 0
