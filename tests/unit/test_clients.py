"""The hooks on Dask's client, and what they say when they cannot hold."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from distributed import Client

from meshcompute import clients
from meshcompute.clients import pool, propagate_pools
from meshcompute.errors import MeshError, NoClientError, UnsupportedPinError
from meshcompute.settings import DEFAULTS, setting, setting_seconds


def test_everything_that_is_hooked_is_still_there() -> None:
    clients.check_internals()


def test_a_dask_that_is_built_differently_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Client, "_scatter", lambda self: None)
    with pytest.raises(MeshError, match=r"_scatter.*newer meshcompute"):
        clients.check_internals()


def test_arrays_in_query_planning_mode_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["dask.array"], "ARRAY_EXPR_ENABLED", True)
    with pytest.raises(UnsupportedPinError, match=r"array\.query-planning"):
        pool("a")


def test_no_client_is_said_with_the_cure() -> None:
    with pytest.raises(NoClientError, match=r"open_it\(\) needs a Dask client"):
        clients.current_client("open_it")


def test_propagate_pools_works_as_a_call_and_as_a_block() -> None:
    assert setting("propagate") is False
    with propagate_pools():
        assert setting("propagate") is True
        with propagate_pools():
            assert setting("propagate") is True
        assert setting("propagate") is True
    assert setting("propagate") is False
    try:
        propagate_pools()
        assert setting("propagate") is True
    finally:
        dask.config.set({"meshcompute.propagate": False})


def test_settings_are_read_when_they_are_used() -> None:
    assert setting_seconds("missing-pool-timeout") == 30
    with dask.config.set({"meshcompute.missing-pool-timeout": "2 minutes"}):
        assert setting_seconds("missing-pool-timeout") == 120
    names = {"compression", "links", "missing-pool-timeout", "objective", "propagate", "regroup-reductions"}
    assert set(DEFAULTS) == names


def test_without_a_cluster_pinned_arrays_compute_locally_as_dask_does() -> None:
    with pool("a"):
        x = da.ones(6, chunks=2)
    assert (x + 1).sum().compute(scheduler="threads") == 12


def test_keys_are_salted_inside_a_block_only() -> None:
    def name() -> Any:
        return da.from_array(np.zeros(3)).name

    plain = name()
    with pool("a"):
        inside = name()
        assert name() == inside
    with pool("b"):
        assert name() != inside
    assert name() == plain != inside


def test_an_optimiser_of_the_users_own_stays_in_force() -> None:
    seen = []

    def own(dsk: Any, keys: Any, **kwargs: Any) -> Any:
        seen.append(keys)
        return dsk

    with dask.config.set(array_optimize=own):
        clients.hook_optimizers()
        with pool("a"):
            x = da.ones(6, chunks=2)
        (y,) = dask.optimize(x + 1)
        assert seen
        assert y.compute(scheduler="sync").sum() == 12


@pytest.mark.parametrize("order", ["import xarray; from meshcompute import pool", "from meshcompute import pool"])
def test_what_xarray_writes_in_a_block_is_written_at_the_site(order: str) -> None:
    code = f"""{order}
with pool("a"):
    import xarray
assert xarray.Dataset.to_zarr.meshcompute_hook
import subprocess
import sys
assert not any("xarray" in getattr(finder, "hooks", ()) for finder in sys.meta_path)
"""
    run = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
