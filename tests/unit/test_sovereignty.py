"""Values that must not leave their pools: what the planner confines, releases and refuses."""

from __future__ import annotations

import pickle

import dask
import dask.array as da
import numpy as np
import pytest
import toolz
import xarray as xr
from dask import delayed
from dask._task_spec import Task, TaskRef
from dask.base import collections_to_expr
from dask.core import flatten
from hypothesis import given
from hypothesis import strategies as st

from meshcompute import errors, explain, may_leave, pool
from meshcompute.graphs.sovereignty import confine, refuse_delivery
from meshcompute.planning import Request, assign
from meshcompute.pools import Pin
from meshcompute.scheduler.live import EmptyView


def task(key, *inputs):
    return Task(key, toolz.identity, *map(TaskRef, inputs))


def graph(**inputs):
    return {key: task(key, *deps) for key, deps in inputs.items()}


STAYS, LEAVES = Pin(("a",), stays=True), Pin((), leaves=True)


def test_what_is_made_of_confined_values_is_confined_until_it_may_leave():
    pins = {"raw": STAYS, "may": LEAVES}
    stays = confine(graph(raw=(), mean=("raw",), may=("mean",), out=("may",)), pins, {})
    assert stays == {"raw": ("a",), "mean": ("a",)}
    assert pins["mean"].pools == pins["may"].pools == ("a",)
    assert "out" not in pins


def test_values_that_the_cluster_has_are_confined_too():
    pins: dict = {}
    tasks = {"sum": task("sum", "held")}
    assert confine(tasks, pins, {"held": ("a",)}) == {"held": ("a",), "sum": ("a",)}
    assert pins["sum"].pools == ("a",)


def test_without_never_leave_nothing_is_confined():
    pins = {"x": Pin(("a",))}
    assert confine(graph(x=(), y=("x",)), pins, {}) == {}
    assert pins == {"x": Pin(("a",))}


def test_a_reader_in_another_pool_is_refused_with_data_reader_and_cure():
    pins = {"raw": STAYS, "join": Pin(("b",))}
    with pytest.raises(errors.SovereigntyError, match=r"'raw' must not leave pool 'a', and 'join' in pool b") as caught:
        confine(graph(raw=(), join=("raw",)), pins, {})
    assert "may_leave" in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_values_of_two_pools_that_must_not_leave_cannot_be_joined():
    pins = {"x": STAYS, "y": Pin(("b",), stays=True)}
    with pytest.raises(errors.SovereigntyError, match="'a' and 'b'"):
        confine(graph(x=(), y=(), sum=("x", "y")), pins, {})


def test_replicas_leave_a_choice_that_readers_narrow():
    pins = {"x": Pin(("a", "b"), stays=True), "y": Pin(("b", "c"), stays=True)}
    stays = confine(graph(x=(), y=(), sum=("x", "y"), out=("sum",)), pins, {})
    assert stays["sum"] == stays["out"] == ("b",)


def test_the_client_is_a_place_too():
    with pytest.raises(errors.SovereigntyError, match="the client"):
        refuse_delivery({"raw": ("a",)}, ["raw"])
    refuse_delivery({"raw": ("a",)}, ["mean"])


@st.composite
def random_graphs(draw):
    n = draw(st.integers(1, 12))
    tasks, pins = {}, {}
    for i in range(n):
        tasks[f"t{i}"] = task(f"t{i}", *[f"t{j}" for j in draw(st.sets(st.integers(0, i - 1)))] if i else [])
        pin = draw(st.sampled_from([None, None, STAYS, Pin(("b",), stays=True), LEAVES, Pin(("a",)), Pin(("a", "b"))]))
        if pin is not None:
            pins[f"t{i}"] = pin
    return tasks, pins


@given(random_graphs())
def test_no_plan_lets_a_confined_value_be_read_outside_of_its_pools(case):
    tasks, pins = case
    given_pins = dict(pins)
    try:
        stays = confine(tasks, pins, {})
    except errors.SovereigntyError:
        return
    for key, node in tasks.items():
        confined = [dep for dep in node.dependencies if dep in stays]
        for dep in confined:
            assert set(pins[key].pools) <= set(stays[dep])
        if confined and not (key in given_pins and given_pins[key].leaves):
            assert key in stays
        if key in given_pins and given_pins[key].stays:
            assert key in stays


# ---------------------------------------------------------------------- through Dask's collections


def planned(collection, *, is_gathered=False, is_propagating=True, is_regrouping=True):
    expr = collections_to_expr([collection]).optimize()
    keys = tuple(flatten(expr.__dask_keys__()))
    request = Request(keys=keys, is_gathered=is_gathered, is_propagating=is_propagating, is_regrouping=is_regrouping)
    return assign(expr, request, EmptyView())


def borders(assignment):
    """Pools that the value of each kind of task must not leave."""
    return {key: held.stays for key, held in assignment.held_by_key.items() if held.stays}


@pytest.mark.parametrize("is_propagating", [False, True])
def test_an_array_is_confined_with_all_that_is_made_of_it(is_propagating):
    with pool("a", never_leave=True):
        x = da.ones((40, 40), chunks=10)
    plan = planned((x * 2).sum(0), is_propagating=is_propagating)
    assert set(borders(plan)) == set(plan.tasks)
    assert set(borders(plan).values()) == {("a",)}
    with pytest.raises(errors.SovereigntyError, match="the client"):
        planned((x * 2).sum(0), is_gathered=True, is_propagating=is_propagating)


@pytest.mark.parametrize("is_propagating", [False, True])
def test_a_reduction_may_leave_where_the_user_says_so(is_propagating):
    with pool("a", never_leave=True):
        x = da.ones((40, 40), chunks=10)
    plan = planned(may_leave(x.mean()) + 1, is_gathered=True, is_propagating=is_propagating)
    assert borders(plan)
    wanted = plan.keys[0]
    assert wanted not in borders(plan)
    inputs = {dep for key in plan.tasks if key not in borders(plan) for dep in plan.tasks[key].dependencies}
    for key in inputs & borders(plan).keys():  # what reads confined values itself still runs there
        for reader, node in plan.tasks.items():
            if key in node.dependencies:
                assert plan.pool_by_key[reader] == "a"


def test_a_reduction_may_leave_to_another_pool():
    with pool("a", never_leave=True):
        x = da.ones((40, 40), chunks=10)
    partial = x.sum(0)
    with pool("b"):
        y = da.ones((40, 40), chunks=10)
        total = may_leave(partial) + y.sum(0)
    plan = planned(total, is_gathered=True)
    assert plan.pool_by_key[plan.keys[0]] == "b"
    with pool("b"):
        total = partial + y.sum(0)
    with pytest.raises(errors.SovereigntyError, match="in pool b"):
        planned(total)


def alternating(n, *, in_a, in_b):
    """Blocks that lie in pools a and b in turn."""
    blocks = []
    for i in range(n):
        with pool("ab"[i % 2], never_leave=(in_a, in_b)[i % 2]):
            blocks.append(da.from_array(np.arange(i, i + 1600.0).reshape(4, 400), chunks=(2, 400)))
    return blocks


def refuses_to_leave(plan, pools):
    """Check that no reader of a confined value runs outside of its pools. Says how many values are confined."""
    confined = borders(plan)
    for key, node in plan.tasks.items():
        for dep in node.dependencies & confined.keys():
            assert plan.pool_by_key[dep] in confined[dep]
            assert plan.pool_by_key[key] in confined[dep]
    assert {name for names in confined.values() for name in names} == set(pools)
    return len(confined)


@pytest.mark.parametrize("reduce", ["sum", "mean", "std", "max"])
def test_reductions_of_confined_values_and_others_are_regrouped_and_nothing_leaves(reduce):
    x = getattr(da.concatenate(alternating(24, in_a=True, in_b=False)), reduce)(0)
    plan = planned(may_leave(x), is_gathered=True)
    assert plan.regrouped
    assert refuses_to_leave(plan, "a") > 12
    crossing = {
        dep
        for key, node in plan.tasks.items()
        for dep in node.dependencies
        if plan.pool_by_key[dep] != plan.pool_by_key[key]
    }
    assert [plan.pool_by_key[key] for key in crossing] == ["b"]  # one part of b's, to where the rest must stay
    with dask.config.set(scheduler="sync"):
        expected = x.compute()
    (key,) = plan.keys
    np.testing.assert_allclose(dask.get(dict(plan.tasks), key), expected)
    with pytest.raises(errors.SovereigntyError, match="the client"):
        planned(x, is_gathered=True)


def test_what_may_leave_of_two_pools_is_regrouped_by_pool():
    parts = [may_leave(block.sum(0)) for block in alternating(24, in_a=True, in_b=True)]
    x = da.stack(parts).sum(0)
    plan = planned(x, is_gathered=True)
    assert plan.regrouped
    assert refuses_to_leave(plan, "ab") >= 24
    with dask.config.set(scheduler="sync"):
        np.testing.assert_allclose(dask.get(dict(plan.tasks), plan.keys[0]), x.compute())
    with pytest.raises(errors.SovereigntyError, match="'a' and 'b'"):
        planned(may_leave(da.concatenate(alternating(24, in_a=True, in_b=True)).sum(0)))


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "ab", "c"]), st.booleans()), min_size=2, max_size=20))
def test_regrouped_or_not_the_same_is_refused(places):
    blocks = []
    for names, stays in places:
        with pool(*names, never_leave=stays):
            blocks.append(da.ones((1, 50), chunks=-1))
    x = may_leave(da.concatenate(blocks).mean(0))
    outcomes = []
    for is_regrouping in (False, True):
        try:
            plan = planned(x, is_regrouping=is_regrouping)
        except errors.SovereigntyError:
            outcomes.append("refused")
        else:
            outcomes.append("planned")
            if borders(plan):
                refuses_to_leave(plan, {name for names in borders(plan).values() for name in names})
    assert outcomes[0] == outcomes[1]


def test_marks_survive_dask_optimize_pickle_and_xarray():
    with pool("a", never_leave=True):
        x = xr.DataArray(da.ones((40, 40), chunks=10), dims=("t", "x"))
    for carried in (dask.optimize(x)[0], pickle.loads(pickle.dumps(x))):
        with pytest.raises(errors.SovereigntyError):
            planned(carried.mean(), is_gathered=True)
        released = may_leave(carried.mean("t"))
        for again in (released, dask.optimize(released)[0], pickle.loads(pickle.dumps(released))):
            planned(again.max(), is_gathered=True)


def test_delayed_results_may_leave_one_by_one():
    with pool("a", never_leave=True):
        raw = delayed(np.ones)(3)
    total = delayed(sum)(raw)
    with pytest.raises(errors.SovereigntyError):
        planned(total, is_gathered=True)
    assert may_leave(total).compute(scheduler="sync") == 3
    planned(may_leave(total), is_gathered=True)


def test_a_marked_collection_is_equal_to_the_one_it_was_made_of():
    x = xr.DataArray(da.arange(12, chunks=5), dims="x", coords={"x": da.arange(12, chunks=4)}, name="n")
    marked = may_leave(x)
    xr.testing.assert_identical(marked.compute(scheduler="sync"), x.compute(scheduler="sync"))
    assert may_leave(x.data).name == may_leave(x.data).name


def test_explain_refuses_what_compute_would():
    with pool("a", never_leave=True):
        x = da.ones((40, 40), chunks=10)
    with pytest.raises(errors.SovereigntyError, match="the client"):
        explain(x.sum())
    assert explain(may_leave(x.sum())).tasks_by_pool


def test_never_leave_needs_a_pool_to_stay_in():
    with pytest.raises(errors.PoolNameError, match="never_leave"):
        pool(None, never_leave=True)


def test_what_is_no_collection_cannot_be_marked():
    with pytest.raises(errors.NotACollectionError, match="may_leave"):
        may_leave(7)


def test_a_dataframe_says_how_its_results_may_leave():
    dd = pytest.importorskip("dask.dataframe")
    pd = pytest.importorskip("pandas")
    with pytest.raises(errors.UnsupportedPinError, match="to_delayed"):
        may_leave(dd.from_pandas(pd.DataFrame({"x": [1, 2]}), npartitions=1))
