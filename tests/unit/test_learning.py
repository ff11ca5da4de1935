"""Sizes learnt: kinds of tasks, the book of what was measured, corrected estimates; predicted against measured."""

from __future__ import annotations

import math

import dask.array as da
import pytest
from dask import delayed
from dask._task_spec import Task
from dask.base import collections_to_expr
from hypothesis import given
from hypothesis import strategies as st

from meshcompute.comparing import Comparison
from meshcompute.learning import Kind, SizeBook, correct, group_of, kinds_of
from meshcompute.sizes import estimate_nbytes
from meshcompute.taskgraph import layers_of, materialize


def ended(book, group, *sizes):
    """Tasks of a group end, as the scheduler counts them."""
    for nbytes in sizes:
        book.groups[group][0] += 1
        book.groups[group][1] += nbytes


def test_the_same_function_on_chunks_of_another_shape_is_another_kind():
    small, large = "load-0123abcd", "load-4567cdef"
    tasks = {(name, i): Task((name, i), int) for name in (small, large) for i in range(3)}
    kinds = kinds_of(tasks, {key: 800.0 if key[0] == small else 1600.0 for key in tasks})
    assert kinds == {small: Kind("load", 0, 800.0), large: Kind("load", 0, 1600.0)}


def test_tasks_of_another_graph_with_other_tokens_are_of_the_same_kind():
    first, second = (
        kinds_of({(f"load-{token}", 0): Task((f"load-{token}", 0), int)}, {(f"load-{token}", 0): 8.0})
        for token in ("0123abcd", "4567cdef")
    )
    assert set(first.values()) == set(second.values())


def test_what_was_measured_replaces_an_estimate_that_was_wrong_and_keeps_proportions():
    book = SizeBook()
    nbytes = {("load-0123abcd", i): size for i, size in enumerate((100.0, 100.0, 40.0))}
    kinds = kinds_of({key: Task(key, int) for key in nbytes}, nbytes)
    book.expect(kinds)
    ended(book, "load-0123abcd", 1000, 1000, 400)
    known = correct(nbytes, kinds, book.learnt(kinds.values()))
    assert known == {"load-0123abcd"}
    assert list(nbytes.values()) == pytest.approx([1000, 1000, 400])


def test_an_estimate_that_was_right_stays_as_it_is():
    nbytes = {"load-0": 100.0}
    kinds = {"load": Kind("load", 0, 100.0)}
    assert correct(nbytes, kinds, {Kind("load", 0, 100.0): 105.0}) == {"load"}
    assert nbytes == {"load-0": 100.0}


def test_an_estimate_of_nothing_is_replaced_too():
    nbytes = {"load-0": 0.0}
    correct(nbytes, {"load": Kind("load", 0, 0.0)}, {Kind("load", 0, 0.0): 105.0})
    assert nbytes == {"load-0": 105.0}


def test_what_nobody_measured_is_not_learnt():
    book = SizeBook()
    kind = Kind("load", 0, 8.0)
    assert book.learnt([kind]) == {}
    book.expect({"load": kind})
    assert book.learnt([kind]) == {}


def test_what_was_measured_lately_outweighs_what_was_long_ago():
    book = SizeBook()
    kind = Kind("load", 0, 8.0)
    for size, rounds in ((100, 40), (10, 40)):
        for _ in range(rounds):
            book.expect({"load": kind})
            ended(book, "load", *[size] * 500)
    assert book.learnt([kind])[kind] < 12


def test_ten_thousand_small_graphs_leave_a_book_of_bounded_size():
    book = SizeBook()
    for i in range(10_000):
        book.expect({f"load-{i}": Kind("load", 0, float(i)), f"sum-{i}": Kind("sum", 1, float(i))})
    assert len(book) <= 4096
    assert len(book.groups) <= 4096
    assert f"sum-{9_999}" in book.groups


@given(st.dictionaries(st.sampled_from("abcdef"), st.lists(st.floats(0, 1e12), min_size=1, max_size=5)), st.data())
def test_corrected_sizes_have_the_mean_that_was_measured(sizes_by_name, data):
    nbytes = {(name, i): size for name, sizes in sizes_by_name.items() for i, size in enumerate(sizes)}
    kinds = kinds_of({key: Task(key, int) for key in nbytes}, nbytes)
    means = {kind: data.draw(st.floats(1, 1e12)) for kind in kinds.values()}
    known = correct(nbytes, kinds, means)
    assert known == set(sizes_by_name)
    for name, sizes in sizes_by_name.items():
        assert all(math.isfinite(nbytes[name, i]) and nbytes[name, i] >= 0 for i in range(len(sizes)))
        kind = kinds[name]
        if kind.nbytes:
            mean = sum(nbytes[name, i] for i in range(len(sizes))) / len(sizes)
            assert mean == pytest.approx(means[kind], rel=0.12)


def test_what_a_shuffle_sends_is_what_its_senders_read_whatever_they_were_seen_to_return():
    nbytes = {("load", 0): 100.0, ("send", 0): 100.0, ("fused", 0): 70.0}
    kinds = {"load": Kind("load", 0, 100.0), "send": Kind("send", 1, 100.0), "fused": Kind("fused", 0, 70.0)}
    learnt = {kinds["load"]: 5000.0, kinds["send"]: 28.0, kinds["fused"]: 28.0}
    correct(nbytes, kinds, learnt, {("send", 0): [("load", 0)], ("fused", 0): []})
    assert nbytes == {("load", 0): 5000.0, ("send", 0): 5000.0, ("fused", 0): 70.0}


def test_groups_are_those_that_the_scheduler_counts_in():
    from distributed.utils import key_split_group

    for key in (("x-0123abcd", 0, 1), "load-0123abcd", ("x", 0)):
        assert group_of(key) == key_split_group(key)


# ---------------------------------------------------------------------- which estimates are guesses


def guesses_of(collection):
    """Keys of a collection's graph, and those of them whose sizes are guessed."""
    expr = collections_to_expr([collection]).optimize()
    tasks, _ = materialize(expr, list(expr.__dask_keys__()))
    guessed: set = set()
    estimate_nbytes(tasks, layers_of(expr), guessed)
    return set(tasks), guessed


def test_sizes_of_chunks_with_a_dtype_are_no_guesses():
    x = da.ones((40, 40), chunks=10)
    keys, guessed = guesses_of((x + 1).mean(0))
    assert keys
    assert not guessed


def test_what_a_delayed_call_returns_is_a_guess_and_so_is_what_is_made_of_it():
    loaded = delayed(len, pure=True)("abc", dask_key_name="load-1")
    keys, guessed = guesses_of(delayed([loaded, loaded]))
    assert guessed == {key for key in keys if key in guessed}
    assert "load-1" in guessed
    assert len(guessed) == len(keys)


# ---------------------------------------------------------------------- predicted against measured


def test_a_comparison_has_a_row_for_every_pair_that_was_predicted_or_measured():
    comparison = Comparison({("a", "b"): 1000, ("b", "client"): 10}, {("a", "b"): 1100, ("client", "a"): 5})
    assert comparison.rows == (("a", "b", 1000, 1100), ("b", "client", 10, 0), ("client", "a", 0, 5))
    assert comparison.ratio == pytest.approx(1105 / 1010)
    assert "1.10" in str(comparison)
    assert "total" in str(comparison)
    assert "1.10" in comparison._repr_html_()


def test_a_comparison_of_nothing_says_so():
    assert "nothing did" in str(Comparison({}, {}))
    assert Comparison({}, {}).ratio == 1
    assert Comparison({}, {("a", "b"): 1}).ratio == math.inf
