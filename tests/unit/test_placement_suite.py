"""What the benchmark of placement judges plans by: exact optima, rivals, bars."""

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from distributed import Client, LocalCluster
from distributed.shuffle._rechunk import ArrayRechunkRun
from distributed.shuffle._shuffle import DataFrameShuffleRun
from hypothesis import given, settings
from hypothesis import strategies as st

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts/benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _scripts():
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def graphs(_scripts):
    import placement_graphs

    return placement_graphs


@pytest.fixture(scope="module")
def exact(_scripts):
    import placement_optimum

    return placement_optimum


@pytest.fixture(scope="module")
def figures(_scripts):
    import placement_figures

    return placement_figures


@pytest.fixture(scope="module")
def workloads(_scripts):
    import placement_workloads

    return placement_workloads


@pytest.fixture(scope="module")
def runs(_scripts):
    import placement_runs

    return placement_runs


@pytest.fixture(scope="module")
def record(_scripts):
    import placement_record

    return placement_record


def problem_of(graphs, sizes, edges, pins, together=()):
    dependencies = [sorted({a for a, b in edges if b == task}) for task in range(len(sizes))]
    return graphs.Problem(dependencies=dependencies, nbytes=sizes, pins=pins, together=together)


def best_by_trying_all(problem, links):
    n_sites = len(links.sites)
    choices = [range(n_sites) if pin is None else pin for pin in problem.pins]
    plans = (p for p in itertools.product(*choices) if all(len({p[t] for t in g}) == 1 for g in problem.together))
    return min(problem.cost(plan, links) for plan in plans)


@st.composite
def small_problems(draw, n_sites):
    n = draw(st.integers(2, 6))
    sizes = draw(st.lists(st.integers(0, 40), min_size=n, max_size=n))
    edges = [(a, b) for a in range(n) for b in range(a + 1, n) if draw(st.booleans())]
    pin = st.one_of(
        st.none(), st.lists(st.integers(0, n_sites - 1), min_size=1, max_size=n_sites, unique=True).map(tuple)
    )
    pins = draw(st.lists(pin, min_size=n, max_size=n))
    free = [task for task in range(n) if pins[task] is None]
    together = [free[:2]] if len(free) > 1 and draw(st.booleans()) else []
    return sizes, edges, pins, together


@pytest.mark.parametrize("kind", ["equal_links", "skewed_links"])
@pytest.mark.parametrize("n_sites", [2, 3])
def test_the_exact_optimum_is_the_best_of_all_plans(graphs, exact, n_sites, kind):
    links = getattr(graphs, kind)("abc"[:n_sites])

    @given(small_problems(n_sites))
    @settings(max_examples=60)
    def check(drawn):
        problem = problem_of(graphs, *drawn)
        found = exact.optimum(problem, links, 10)
        assert found.is_exact
        assert found.cost == pytest.approx(best_by_trying_all(problem, links), abs=1e-4)

    check()


def test_a_cut_of_more_bytes_than_32_bits_hold_is_exact(graphs, exact):
    sizes, links = [3e10, 5e9, 1.0], graphs.equal_links("ab")
    problem = problem_of(graphs, sizes, [(0, 2), (1, 2)], [(0,), (1,), None])
    assert exact.optimum(problem, links, 1).cost == 5e9


def test_a_value_counts_once_for_each_site_that_reads_it(graphs):
    links = graphs.equal_links("abc")
    problem = problem_of(graphs, [10, 1, 1, 1], [(0, 1), (0, 2), (0, 3)], [None] * 4)
    assert problem.cost([0, 1, 1, 1], links) == 10
    assert problem.cost([0, 1, 1, 2], links) == 20


def test_what_goes_to_the_client_is_left_out(graphs):
    links = graphs.skewed_links("ab")
    assert links.weigh({("a", "b"): 3, ("b", "a"): 4, ("b", "client"): 100}) == 3 * 1 + 4 * 5


def test_the_rule_by_layers_brings_a_whole_layer_to_most_of_its_input(graphs):
    keys = [("load-a", 0), ("load-b", 0), ("load-b", 1), ("joined", 0), ("joined", 1), ("joined", 2)]
    problem = problem_of(graphs, [10, 10, 10, 1, 1, 1], [(0, 3), (1, 4), (2, 5)], [(0,), (1,), (1,)] + [None] * 3)
    links = graphs.equal_links("ab")
    assert graphs.layer_rule_cost(problem, keys, links) == 10
    assert graphs.single_site_cost(problem, links) == 10
    assert problem.cost([0, 1, 1, 0, 1, 1], links) == 0


def test_layers_that_read_each_other_are_ordered_with_inputs_first(graphs):
    order = graphs.inputs_first({"c": ["b"], "b": ["a"], "a": [], "loop": ["pool"], "pool": ["loop"]})
    assert order.index("a") < order.index("b") < order.index("c")
    assert sorted(order) == ["a", "b", "c", "loop", "pool"]


def row_of(figures, **changed):
    row = figures.Row(
        workload="mean",
        n_sites=2,
        links="equal",
        n_tasks=9,
        stock=1e6,
        layers=1e6,
        single=1e6,
        optimum=1e5,
        bound=1e5,
        predicted=1e5,
        planned=1e5,
        measured=1e5,
        wrong="",
        regroups=False,
    )
    return replace(row, **changed)


def test_good_figures_miss_no_bar(figures):
    assert figures.missed_bars([row_of(figures)]) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"wrong": "ours: a result is not right"}, "ours: a result is not right"),
        ({"planned": 1.2e5, "measured": 1.2e5}, "planned is 1.20 x the optimum"),
        ({"measured": 1.2e5}, "measured is 1.20 x planned"),
        ({"measured": 1.2e5, "single": 1e5}, "single moves 0.100 MB, we move 0.120"),
        ({"layers": 0.5e5}, "layers moves 0.050 MB"),
        ({"stock": 0.5e5}, "stock moves 0.050 MB"),
        ({"regroups": True, "planned": 0.5e5, "measured": 0.5e5}, "planned is 2.0 x below"),
        ({"stock": 3e5}, "the median is 3.0 x below stock Dask"),
    ],
)
def test_a_bar_that_is_missed_is_named(figures, changed, said):
    missed = figures.missed_bars([row_of(figures, **changed)])
    assert any(said in line for line in missed), missed


def test_the_table_has_every_row_and_marks_what_is_missed_or_not_proved(figures):
    rows = [row_of(figures), row_of(figures, links="skewed", measured=9e9, bound=0.5e5)]
    table = figures.render_table(rows)
    assert "2 sites, equal links" in table
    assert "0.100*" in table
    assert [line.endswith("!") for line in table.splitlines() if line.startswith("mean")] == [False, True]


def test_the_picture_shows_a_panel_for_each_number_of_sites_and_kind_of_links(figures, tmp_path):
    rows = [row_of(figures, n_sites=n, links=kind, measured=0) for n in (2, 3) for kind in ("equal", "skewed")]
    figures.save_picture(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_parts_of_a_field_make_up_the_whole(workloads):
    whole = workloads.Field((), (6, 3), seed=2)[:]
    parts = [workloads.Field((), (2, 3), seed=2, start=i)[:] for i in (0, 2, 4)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert np.array_equal(workloads.Field((), (6, 3), seed=2)[1:4, 2], whole[1:4, 2])


def test_a_field_can_be_read_by_workers_of_its_sites_alone(workloads, monkeypatch):
    field = workloads.Field(["a"], (2, 2))
    monkeypatch.setenv("POOL_NAME", "a")
    assert field[:].shape == (2, 2)
    monkeypatch.setenv("POOL_NAME", "b")
    with pytest.raises(FileNotFoundError, match="this is a worker of b"):
        field[:]


@pytest.mark.parametrize("n_sites", [2, 3, 5])
@pytest.mark.parametrize("name", ["headline", "mean, interleaved", "covariance", "sparse regrid", "delayed", "frames"])
def test_a_workload_computes_what_numpy_and_pandas_do(workloads, runs, name, n_sites, tmp_path):
    workload = next(w for w in workloads.WORKLOADS if w.name.startswith(name))
    stores = {site: tmp_path / site for site in "abcde"[:n_sites]}
    for store in stores.values():
        store.mkdir()
    job = workload.job(tuple(stores), stores)
    with dask.config.set(scheduler="sync"):
        assert all(runs.is_right(r.compute(), e) for r, e in zip(job.results, job.expected, strict=True))


def test_a_result_that_is_off_is_not_right(runs):
    assert runs.is_right(np.ones(3), np.ones(3) + 1e-12)
    assert not runs.is_right(np.ones(3), np.ones(3) + 1e-6)
    assert not runs.is_right(np.ones(3), np.ones((1, 3)))
    table = pd.DataFrame({"x": [1.0, 2.0]}, index=[1, 0])
    assert runs.is_right(table, table.sort_index())
    assert not runs.is_right(table, table.set_axis([5, 6]))


@pytest.mark.parametrize("kind", ["table", "array"])
def test_what_the_senders_of_a_shuffle_send_is_noted_under_their_keys(record, monkeypatch, kind):
    for run in (DataFrameShuffleRun, ArrayRechunkRun):
        monkeypatch.setattr(run, "_shard_partition", run._shard_partition)  # put back afterwards
    record.note_senders()
    record.note_senders()
    record.take_sent()
    with LocalCluster(n_workers=1, processes=False, dashboard_address="127.0.0.1:0") as cluster, Client(cluster):
        if kind == "table":
            frame = pd.DataFrame({"k": np.arange(9000) % 97, "v": np.arange(9000.0)})
            dd.from_pandas(frame, npartitions=3).shuffle("k").map_partitions(len).compute()
            least = 9000 * (8 + 8 + 8 + 1)  # with the index and the partition of every row
        else:
            values = da.ones((90, 90), chunks=(30, 90))
            values.rechunk((90, 30), method="p2p").sum().compute()
            least = values.nbytes
    sent = record.take_sent()
    assert sent
    assert all("transfer" in str(key) for key in sent)
    assert least <= sum(sent.values()) <= least * 1.1
    assert record.take_sent() == {}
