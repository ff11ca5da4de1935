"""One Dask cluster across several data centres: work runs at the data.

Covers the public names, loaded when first used, so that importing a part (on a scheduler, say) does not load
xarray or matplotlib. Does not cover any behaviour of its own.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME_OF = {
    "get_pool": "planning",
    "pool": "clients",
    "propagate_pools": "clients",
}

__all__ = sorted([*_HOME_OF, "errors"])  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(f"meshcompute.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module 'meshcompute' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
