"""How many workers a site should have, and which packages differ."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshcompute.mesh.scaling import ScalingError, SiteLoad, adapted_containers, containers_for, share_workers
from meshcompute.mesh.versions import differing_versions, installed_versions, render_versions


@given(st.integers(1, 200), st.integers(1, 8))
def test_shares_add_up_and_differ_by_one_at_most(total, n_sites):
    pools = {site: f"p{site}" for site in range(1, n_sites + 1)}
    if total < n_sites:
        with pytest.raises(ScalingError, match="too few"):
            share_workers(total, pools)
        return
    shares = share_workers(total, pools)
    assert sum(shares.values()) == total
    assert max(shares.values()) - min(shares.values()) <= 1


def test_workers_come_in_whole_containers():
    assert [containers_for(workers, 4) for workers in (1, 4, 5, 8)] == [1, 1, 2, 2]
    with pytest.raises(ScalingError, match="0 workers were asked for"):
        containers_for(0, 4)


def load(containers=2, busy=0, idle=0):
    return SiteLoad(
        containers=containers, n_threads=4, n_executing=4, n_waiting=1, n_busy_looks=busy, n_idle_looks=idle
    )


@pytest.mark.parametrize(
    ("now", "wanted"),
    [
        (load(busy=2), 4),
        (load(busy=1), 2),
        (load(idle=2), 2),
        (load(idle=3), 1),
        (load(containers=1, idle=99), 1),
        (load(containers=4, busy=2), 5),
        (load(containers=9), 5),
    ],
)
def test_a_site_grows_while_tasks_queue_and_shrinks_after_a_while_of_nothing(now, wanted):
    assert adapted_containers(now, minimum=1, maximum=5) == wanted


def test_only_packages_that_differ_are_shown_and_missing_ones_count():
    places = {
        "client": {"dask": "2026.8.0", "numpy": "2.3", "lz4": "4.4"},
        "ecmwf": {"dask": "2026.8.0", "numpy": "2.4"},
    }
    assert differing_versions(places) == {"lz4": ("4.4", "-"), "numpy": ("2.3", "2.4")}
    assert render_versions(places).splitlines() == [
        "package  client  ecmwf",
        "lz4      4.4     -",
        "numpy    2.3     2.4",
    ]
    assert render_versions({"client": places["client"], "scheduler": places["client"]}) == ""


def test_versions_of_what_is_installed_are_found_and_others_left_out():
    found = installed_versions({"python", "distributed", "no-such-package"})
    assert set(found) == {"python", "distributed"}
