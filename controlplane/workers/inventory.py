"""Which versions of packages workers run with, asked of the interpreter that they are run by.

Covers the question and reading the answer; pure. Does not cover where it is asked: each runtime does.
"""

from __future__ import annotations

import json

__all__ = ["inventory_command", "parse_inventory"]

# What a client compares with its own: Dask and what travels between its processes.
PACKAGES = (
    *("dask", "distributed", "xarray", "numpy", "pandas", "pyarrow", "msgpack", "cloudpickle", "tornado", "toolz"),
    *("zarr", "netCDF4", "fsspec", "s3fs", "lz4", "meshcompute"),
)
_ASK = """
import importlib.metadata, json, platform, sys
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def inventory_command(python: str) -> list[str]:
    """Write the command that tells the versions of what an interpreter has.

    Parameters
    ----------
    python
        The interpreter.

    Returns
    -------
    list of str
        Program and arguments.
    """
    return [python, "-I", "-c", _ASK, *PACKAGES]


def parse_inventory(text: str) -> dict[str, str]:
    """Read what the command has written.

    Parameters
    ----------
    text
        All of it.

    Returns
    -------
    dict
        Version by package, ``python`` among them; what is not installed is left out.

    Raises
    ------
    ValueError
        It is something else.
    """
    found = json.loads(text)
    if not isinstance(found, dict) or not all(isinstance(version, str) for version in found.values()):
        raise ValueError(f"{text[:80]!r} are no versions of packages")
    return found
