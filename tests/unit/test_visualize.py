"""Graphs coloured by pool. The first test asks what the published library's own test asks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import dask.array as da
import dask.bag as db
import pytest

from meshcompute import pool
from meshcompute.errors import MissingDependencyError, NotACollectionError
from meshcompute.plots import colour_of_pool, visualize_pools

graphviz = pytest.importorskip("graphviz")


@pytest.fixture
def collections() -> tuple[Any, Any]:
    with pool("A"):
        a = da.random.random((10, 10), chunks=5)
    with pool("B"):
        b = da.random.random(10, chunks=5)
    return (a - 1).sum(), b - a.mean()


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Draw, and give the picture's source instead of a picture: this needs no program dot."""
    seen: list[Any] = []

    def keep(picture: Any, filename: str | None, format: str | None) -> None:  # noqa: A002
        seen.append(picture)

    monkeypatch.setattr("dask.dot.graphviz_to_file", keep)

    def source(*objects: Any, **options: Any) -> str:
        visualize_pools(*objects, **options)
        return str(seen.pop().source)

    return source


@pytest.mark.usefixtures("dot")
def test_collections_and_graphs_are_drawn_into_files(tmp_path: Path, collections: tuple[Any, Any]) -> None:
    in_a, in_b = collections
    visualize_pools(in_a, filename=tmp_path / "a.svg")
    visualize_pools(in_a, in_b, filename=tmp_path / "both.svg")
    visualize_pools(in_a, in_b.dask, filename=tmp_path / "both-graph.svg")
    for name, pools in (("a", "A"), ("both", "AB"), ("both-graph", "AB")):
        picture = (tmp_path / f"{name}.svg").read_text(encoding="utf-8").lower()
        for wanted in "AB":
            assert (colour_of_pool(wanted).lower() in picture) == (wanted in pools)


@pytest.mark.usefixtures("dot")
@pytest.mark.parametrize(("name", "given", "written"), [("x.png", None, "x.png"), ("x", "svg", "x.svg")])
def test_the_format_follows_from_the_name_or_is_given(
    tmp_path: Path,
    collections: tuple[Any, Any],
    name: str,
    given: str | None,
    written: str,
) -> None:
    visualize_pools(collections[0], filename=tmp_path / name, format=given)
    assert (tmp_path / written).stat().st_size > 500


def test_layers_carry_the_pool_of_the_plan_and_a_legend_names_it(source: Any, collections: tuple[Any, Any]) -> None:
    text = source(*collections)
    nodes = [line for line in text.splitlines() if "label=" in line and "->" not in line]
    assert any("random_sample" in line and colour_of_pool("A") in line for line in nodes)
    assert any("random_sample" in line and colour_of_pool("B") in line for line in nodes)
    assert any("sum-aggregate" in line and colour_of_pool("A") in line for line in nodes)
    assert "cluster_legend" in text


def test_a_layer_in_two_pools_is_striped(source: Any) -> None:
    with pool("A"):
        a = da.ones(10, chunks=5)
    with pool("B"):
        b = da.ones(10, chunks=5)
    text = source(da.concatenate([a, b]) + 1)
    striped = [line for line in text.splitlines() if "style=striped" in line]
    assert striped
    assert all("A + B" in line for line in striped)


def test_what_has_no_pool_is_grey(source: Any) -> None:
    text = source(da.ones(10, chunks=5) + 1)
    assert "anywhere" in text
    assert "#DDDDDD" in text


def test_tasks_are_drawn_one_by_one(source: Any, collections: tuple[Any, Any]) -> None:
    layers, tasks = source(collections[0]), source(collections[0], tasks=True)
    assert tasks.count("label=") > layers.count("label=")
    assert "(0, 1)" in tasks


def test_attributes_of_the_graph_are_passed_on(source: Any, collections: tuple[Any, Any]) -> None:
    assert "rankdir=LR" in source(collections[0], rankdir="LR")


def test_bags_and_dataframes_are_drawn(source: Any) -> None:
    with pool("A"):
        bag = db.from_sequence(range(10), npartitions=2).map(str)
    assert colour_of_pool("A") in source(bag)
    pandas, frames = pytest.importorskip("pandas"), pytest.importorskip("dask.dataframe")
    with pool("B"):
        frame = frames.from_pandas(pandas.DataFrame({"k": [1, 2, 1, 2], "v": [1.0, 2, 3, 4]}), npartitions=2)
    assert colour_of_pool("B") in source(frame.groupby("k").v.sum())


@pytest.mark.parametrize("objects", [(), (1,), ("text",), (da.ones(3), None)])
def test_what_is_no_collection_is_refused(objects: tuple[Any, ...]) -> None:
    with pytest.raises(NotACollectionError, match="visualize_pools"):
        visualize_pools(*objects)


def test_without_the_package_the_error_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, collections: tuple[Any, Any]
) -> None:
    monkeypatch.setitem(sys.modules, "graphviz", None)
    with pytest.raises(MissingDependencyError, match="pip install graphviz"):
        visualize_pools(collections[0], filename=None)


def test_without_the_program_dot_the_error_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, collections: tuple[Any, Any]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match="apt install graphviz"):
        visualize_pools(collections[0], filename=tmp_path / "x.svg")
    assert not (tmp_path / "x.svg").exists()
