"""The picture of traffic and the colours of pools."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import dask.array as da
import pytest
from matplotlib.figure import Figure

from meshcompute import plots, pool
from meshcompute.explaining import explain
from meshcompute.plots import colour_of_pool, plot_traffic

TRAFFIC = {("ecmwf", "eumetsat"): 5_000_000, ("eumetsat", "client"): 20_000}


def measured(traffic: dict[tuple[str, str], int], pools: tuple[str, ...] = ()) -> Any:
    return SimpleNamespace(bytes_between_pools=traffic, pools=pools)


def texts(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.texts]


@pytest.fixture(autouse=True)
def _fresh_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "_colour_by_pool", dict(plots._colour_by_pool))


@pytest.fixture
def ax() -> Iterator[Any]:
    return Figure().subplots()


def test_sixteen_pools_have_sixteen_colours() -> None:
    colours = {colour_of_pool(f"site{i}") for i in range(16)} | {colour_of_pool("client")}
    assert len(colours) == 17


def test_a_pool_keeps_its_colour_whatever_comes_later() -> None:
    first = colour_of_pool("ecmwf")
    for i in range(40):
        assert colour_of_pool(f"site{i}").startswith("#")
    assert colour_of_pool("ecmwf") == first


def test_the_colour_follows_from_the_name_in_every_process() -> None:
    script = "from meshcompute.plots import colour_of_pool; print(colour_of_pool('a lonely pool'))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == colour_of_pool("a lonely pool")


def test_importing_plots_does_not_import_matplotlib() -> None:
    script = "import sys, meshcompute.plots; print('matplotlib' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "False"


def test_the_picture_shows_the_bytes_of_every_pair(ax: Any) -> None:
    assert plot_traffic(measured(TRAFFIC), ax=ax) is ax
    assert sorted(filter(None, texts(ax))) == ["19.5 kiB", "4.8 MiB"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["ecmwf", "eumetsat"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["ecmwf", "eumetsat", "client"]
    assert "4.8 MiB in all" in ax.get_title(loc="left")


def test_predicted_stands_beside_measured_in_either_order() -> None:
    with pool("ecmwf"):
        here = da.ones(100_000, chunks=50_000)
    with pool("eumetsat"):
        there = da.ones(200_000, chunks=100_000)
    plan = explain(here.sum() + there.sum())
    assert plan.bytes_between_pools
    for sources in ((plan, measured(TRAFFIC)), (measured(TRAFFIC), plan)):
        ax = plot_traffic(*sources, ax=Figure().subplots())
        assert ax.get_title(loc="left").splitlines()[1].startswith("measured 4.8 MiB in all (predicted ")
        assert any(text.startswith("4.8 MiB\n(") for text in texts(ax))


@pytest.mark.parametrize("n", [2, 3, 9, 16])
def test_it_draws_any_number_of_pools(ax: Any, n: int) -> None:
    names = [f"site{i}" for i in range(n)]
    plot_traffic(measured({(a, b): 10 ** (i % 9) for i, a in enumerate(names) for b in names if a != b}), ax=ax)
    assert len(list(filter(None, texts(ax)))) == n * (n - 1)
    ax.figure.canvas.draw()


def test_no_traffic_is_a_picture_too(ax: Any) -> None:
    plot_traffic(measured({}, pools=("a", "b")), ax=ax)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b"]
    ax.figure.canvas.draw()


def test_with_axes_given_pyplot_makes_no_figure(ax: Any) -> None:
    from matplotlib import pyplot as plt

    before = plt.get_fignums()
    plot_traffic(measured(TRAFFIC), ax=ax)
    assert plt.get_fignums() == before


def test_without_axes_a_new_figure_is_made() -> None:
    from matplotlib import pyplot as plt

    plt.switch_backend("agg")
    ax = plot_traffic(measured(TRAFFIC))
    assert plt.get_fignums() == [ax.figure.number]
    plt.close(ax.figure)


@pytest.mark.parametrize("sources", [(), (1,), ({("a", "b"): 1},), (measured({}),) * 3])
def test_what_cannot_be_drawn_is_refused(sources: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match="measure_traffic"):
        plot_traffic(*sources)
