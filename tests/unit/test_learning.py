"""Sizes learnt: kinds of tasks, the book of what was measured, corrected estimates; predicted against measured."""

from __future__ import annotations

import math

import dask.array as da
import pytest
from dask import delayed
from dask._task_spec import Alias, Task
from dask.base import collections_to_expr
from hypothesis import given
from hypothesis import strategies as st

from meshcompute.comparing import Comparison
from meshcompute.graphs.learning import Kind, SizeBook, correct, group_of, kinds_of
from meshcompute.graphs.sizes import estimate_nbytes
from meshcompute.graphs.taskgraph import layers_of, materialize


def ended(book, group, *sizes):
    """Tasks of a group end, as the scheduler counts them."""
    for nbytes in sizes:
        book.ended(group, nbytes)


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


def test_aliases_and_senders_have_no_kind_since_their_values_are_those_of_others():
    tasks = {key: Task(key, int) for key in ("load-0", "send-0")} | {"name-0": Alias("name-0", "load-0")}
    assert kinds_of(tasks, dict.fromkeys(tasks, 8.0), {"send-0"}) == {"load": Kind("load", 0, 8.0)}


def test_what_was_measured_replaces_an_estimate_that_was_wrong_and_keeps_proportions():
    book = SizeBook()
    nbytes = {("load-0123abcd", i): size for i, size in enumerate((100.0, 100.0, 40.0))}
    kinds = kinds_of({key: Task(key, int) for key in nbytes}, nbytes)
    book.expect(kinds)
    ended(book, "load-0123abcd", 1000, 1000, 400)
    sizes, known = correct(nbytes, kinds, book.learnt(kinds))
    assert known == {"load-0123abcd"}
    assert sizes.keys() == nbytes.keys()
    assert list(sizes.values()) == pytest.approx([1000, 1000, 400])


def test_of_two_tables_read_by_one_function_each_has_its_own_size_in_the_next_run():
    book = SizeBook()
    kinds = {"read-0123abcd": Kind("read", 0, 1024.0), "read-4567cdef": Kind("read", 0, 1024.0)}
    book.expect(kinds)
    ended(book, "read-0123abcd", *[99_000] * 12)
    ended(book, "read-4567cdef", *[7_000] * 4)
    assert book.learnt(kinds) == {"read-0123abcd": 99_000, "read-4567cdef": 7_000}
    assert book.learnt({"read-89ab0123": Kind("read", 0, 1024.0)}) == {"read-89ab0123": 76_000}


def test_when_the_same_tasks_run_again_the_last_time_counts_most():
    book = SizeBook()
    kinds = {"read-0123abcd": Kind("read", 0, 1024.0)}
    for size in (*[1000] * 20, *[10] * 5):
        book.expect(kinds)
        ended(book, "read-0123abcd", *[size] * 4)
    assert book.learnt(kinds)["read-0123abcd"] < 50


def test_a_size_is_expected_to_be_what_was_measured_or_else_estimated():
    book = SizeBook()
    assert math.isnan(book.expected("read-0123abcd"))
    book.expect({"read-0123abcd": Kind("read", 0, 1024.0)})
    assert book.expected("read-0123abcd") == 1024
    book.expect({"read-4567cdef": Kind("read", 0, 1024.0)})
    ended(book, "read-4567cdef", 50)
    assert book.expected("read-0123abcd") == book.expected("read-4567cdef") == 50
    ended(book, "read-0123abcd", 70)
    assert book.expected("read-0123abcd") == 70
    book.ended("nobody-0", 5)
    assert math.isnan(book.expected("nobody-0"))


def test_estimates_that_were_right_stay_as_they_are():
    kinds = {"load": Kind("load", 0, 100.0)}
    assert correct({"load-0": 100.0}, kinds, {"load": 105.0}) == ({}, {"load"})


def test_an_estimate_that_was_right_is_fixed_when_another_one_was_wrong():
    # What it was made of may turn out to be larger: it was measured all the same.
    kinds = {"load": Kind("load", 0, 100.0), "sum": Kind("sum", 1, 100.0)}
    sizes, _ = correct({"load-0": 100.0, "sum-0": 100.0}, kinds, {"load": 10_000.0, "sum": 101.0})
    assert sizes == {"load-0": 10_000.0, "sum-0": 100.0}


def test_an_estimate_of_nothing_is_replaced_too():
    sizes, _ = correct({"load-0": 0.0}, {"load": Kind("load", 0, 0.0)}, {"load": 105.0})
    assert sizes == {"load-0": 105.0}


def test_what_nobody_measured_is_not_learnt():
    book = SizeBook()
    kinds = {"load": Kind("load", 0, 8.0)}
    assert book.learnt(kinds) == {}
    book.expect(kinds)
    assert book.learnt(kinds) == {}


def test_of_a_kind_what_was_measured_lately_outweighs_what_was_long_ago():
    book = SizeBook()
    kind = Kind("load", 0, 8.0)
    for size, rounds in ((100, 40), (10, 40)):
        for i in range(rounds):
            book.expect({f"load-{size}{i}": kind})
            ended(book, f"load-{size}{i}", *[size] * 500)
    assert book.learnt({"new": kind})["new"] < 12


def test_ten_thousand_small_graphs_leave_a_book_of_bounded_size():
    book = SizeBook()
    for i in range(10_000):
        book.expect({f"load-{i}": Kind("load", 0, float(i)), f"sum-{i}": Kind("sum", 1, float(i))})
    assert len(book) <= 4096
    assert not math.isnan(book.expected(f"sum-{9_999}"))


@given(st.dictionaries(st.sampled_from("abcdef"), st.lists(st.floats(0, 1e12), min_size=1, max_size=5)), st.data())
def test_corrected_sizes_have_the_mean_that_was_measured(sizes_by_name, data):
    nbytes = {(name, i): size for name, sizes in sizes_by_name.items() for i, size in enumerate(sizes)}
    kinds = kinds_of({key: Task(key, int) for key in nbytes}, nbytes)
    means = {name: data.draw(st.floats(1, 1e12)) for name in kinds}
    sizes, known = correct(nbytes, kinds, means)
    assert known == set(sizes_by_name)
    nbytes.update(sizes)
    for name, sizes in sizes_by_name.items():
        assert all(math.isfinite(nbytes[name, i]) and nbytes[name, i] >= 0 for i in range(len(sizes)))
        if kinds[name].nbytes:
            mean = sum(nbytes[name, i] for i in range(len(sizes))) / len(sizes)
            assert mean == pytest.approx(means[name], rel=0.12)


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


def test_keys_without_a_token_are_known_by_their_kind_alone():
    # Dask's last task of every computation is called the same, and the scheduler counts all of them as one group.
    book = SizeBook()
    name = "finalize-hlgfinalizecompute"
    small, large = {name: Kind(name, 1, 80.0)}, {name: Kind(name, 1, 3200.0)}
    for kinds, nbytes in ((large, 3200), (small, 80)):
        book.expect(kinds)
        book.ended(name, nbytes)
    assert book.learnt(large) == {name: 3200.0}
    assert book.learnt(small) == {name: 80.0}
    assert book.learnt({name: Kind(name, 1, 8.0)}) == {}
