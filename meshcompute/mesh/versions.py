"""Versions of packages at the places of a cluster, compared.

Covers which differ and how that is shown; pure but for :func:`installed_versions`. Does not cover what Dask itself
checks when a client connects (it warns, too, and later).
"""

from __future__ import annotations

import platform
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version

__all__ = ["differing_versions", "installed_versions", "render_versions"]

MISSING = "-"


def installed_versions(names: Collection[str]) -> dict[str, str]:
    """Look up versions of what is installed here.

    Parameters
    ----------
    names
        Names of packages, and ``python``.

    Returns
    -------
    dict
        Version by name; packages that are not installed are left out.
    """
    found = {}
    for name in names:
        if name == "python":
            found[name] = platform.python_version()
            continue
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def differing_versions(places: Mapping[str, Mapping[str, str]]) -> dict[str, tuple[str, ...]]:
    """Find the packages that are not the same everywhere.

    Parameters
    ----------
    places
        Version by package, by place.

    Returns
    -------
    dict
        For every package that differs its version at each place, in the order of the places; ``-`` where it is
        missing.
    """
    names = sorted({name for packages in places.values() for name in packages})
    rows = {name: tuple(packages.get(name, MISSING) for packages in places.values()) for name in names}
    return {name: row for name, row in rows.items() if len(set(row)) > 1}


def render_versions(places: Mapping[str, Mapping[str, str]]) -> str:
    """Draw the packages that differ as a table.

    Parameters
    ----------
    places
        Version by package, by place.

    Returns
    -------
    str
        Lines of text; empty if nothing differs.
    """
    rows = differing_versions(places)
    if not rows:
        return ""
    table = [("package", *places), *((name, *row) for name, row in rows.items())]
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
    )
