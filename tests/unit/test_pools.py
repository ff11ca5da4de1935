"""Names, pins and what they are read from."""

from __future__ import annotations

import pickle

import dask
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshcompute.clients import pool
from meshcompute.errors import PoolNameError
from meshcompute.pools import (
    UNPINNED,
    Pin,
    current_pin,
    pin_of_annotations,
    pools_of_resources,
    resource_of,
    split_resources,
    validate_pool_name,
)


@given(st.text())
def test_a_valid_name_passes_through_dasks_command_line_unchanged(name: str) -> None:
    try:
        validate_pool_name(name)
    except PoolNameError:
        return
    text = f"{resource_of(name)}=1 GPU=2"
    # what `dask worker --resources` does with its text
    parsed = {k: float(v) for k, v in (pair.split("=") for pair in text.replace(",", " ").split())}
    assert pools_of_resources(parsed) == (name,)


@pytest.mark.parametrize("name", ["ecmwf", "met-office.2", "Météo", "x:y"])
def test_ordinary_names_are_accepted(name: str) -> None:
    assert validate_pool_name(name) == name


def test_the_innermost_block_counts() -> None:
    assert current_pin() is None
    with pool("a"):
        assert current_pin() == Pin(("a",))
        with pool("b", "c"):
            assert current_pin() == Pin(("b", "c"))
            with pool(None):
                assert current_pin() == UNPINNED
        assert current_pin() == Pin(("a",))
    assert current_pin() is None


def test_a_name_given_twice_counts_once() -> None:
    with pool("a", "a"):
        assert current_pin() == Pin(("a",))


def test_a_pin_keeps_the_other_resources_of_its_block() -> None:
    with dask.annotate(resources={"GPU": 1}), pool("a"):
        assert current_pin() == Pin(("a",), (("GPU", 1),))
    with pool("a"), dask.annotate(resources={"GPU": 2}):
        assert current_pin() == Pin(("a",), (("GPU", 2),))


def test_the_long_form_of_the_reference_is_a_pin() -> None:
    with dask.annotate(resources={"pool-ecmwf": 1}):
        assert current_pin() == Pin(("ecmwf",))


def test_resources_without_a_pool_are_no_pin() -> None:
    assert pin_of_annotations({"resources": {"GPU": 1}}) is None
    assert pin_of_annotations({"resources": lambda key: {"pool-a": 1}}) is None
    assert split_resources({"GPU": 1, "pool-b": 0, "pool-a": 1}) == (("a", "b"), {"GPU": 1})


def test_what_the_planner_chose_is_no_pin() -> None:
    assert pin_of_annotations({"pool": {"name": "a", "pinned": True}}) == Pin(("a",))
    assert pin_of_annotations({"pool": {"name": "a", "pinned": False}, "resources": {"pool-a": 0}}) is None
    assert pin_of_annotations({"pool": {"name": None}}) == UNPINNED


def test_a_pin_is_the_same_after_pickling() -> None:
    pin = Pin(("a", "b"), (("GPU", 1),))
    assert pickle.loads(pickle.dumps(pin)) == pin
