"""One Dask cluster across several data centres: work runs at the data.

Covers the public names, loaded when first used, so that importing a part (on a scheduler, say) does not load
xarray or matplotlib. Does not cover any behaviour of its own.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME_OF = {
    "Crossing": "explaining",
    "MeshCluster": "mesh.cluster",
    "Plan": "explaining",
    "errors": "",
    "explain": "explaining",
    "filesystem": "data.opening",
    "get_pool": "explaining",
    "may_leave": "leaving",
    "measure_traffic": "traffic",
    "open_dataframe": "data.opening",
    "open_dataset": "data.opening",
    "open_mfdataset": "data.opening",
    "open_zarr": "data.opening",
    "plot_traffic": "plots",
    "pool": "clients",
    "propagate_pools": "clients",
    "propagate_pools_in_collection": "explaining",
    "to_zarr": "data.writing",
    "visualize_pools": "plots",
}

__all__ = list(_HOME_OF)


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'meshcompute' has no attribute {name!r}")
    if not home:
        return importlib.import_module(f"meshcompute.{name}")
    return getattr(importlib.import_module(f"meshcompute.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
