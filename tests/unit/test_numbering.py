"""Keys as integers, in an order that no process decides by itself."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import pytest
from dask._task_spec import Task, TaskRef

from meshcompute.graphs.numbering import Index, dependencies_of, ordered

KEYS: list[Any] = [("x", 1), ("x", 0, 1), ("x", "extra", 0), ("x", 0), "x", b"x", ("y",), 3, ("x", 10), ("x", 2)]


def test_keys_of_all_kinds_have_one_order_wherever_they_stood():
    orders = {tuple(ordered(keys)) for keys in itertools.islice(itertools.permutations(KEYS), 0, 3_000_000, 9973)}
    assert len(orders) == 1
    assert set(orders.pop()) == set(KEYS)


def test_blocks_of_an_array_are_in_the_order_of_their_indices():
    blocks = [("x", i, j) for i in range(12) for j in range(3)]
    assert ordered(reversed(blocks)) == blocks


@pytest.mark.parametrize("has_numpy", [True, False])
def test_every_task_reads_what_it_reads_and_nothing_that_has_no_number(monkeypatch, has_numpy):
    if not has_numpy:
        monkeypatch.setitem(sys.modules, "numpy", None)
    tasks = {
        "c": Task("c", max, TaskRef("b"), TaskRef("a"), TaskRef("elsewhere")),
        "a": Task("a", int),
        "d": Task("d", max, TaskRef("c"), TaskRef("a")),
        "sealed": Task("sealed", max, TaskRef("a")),
    }
    index = Index(ordered([*tasks, "b"]))
    flat = dependencies_of(index, tasks, {"sealed"})
    rows = [list(flat.indices[a:b]) for a, b in itertools.pairwise(flat.indptr)]
    keys = list(index)
    assert {keys[i]: [keys[j] for j in row] for i, row in enumerate(rows)} == {
        "a": [],
        "b": [],
        "c": ["a", "b"],
        "d": ["a", "c"],
        "sealed": [],
    }
    assert len(dependencies_of(Index([]), {}).indptr) == 1


def test_the_order_does_not_depend_on_the_hashes_of_strings():
    program = "from meshcompute.graphs.numbering import ordered; print(ordered({*'abcdef', *zip('ghij', range(4))}))"
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1
