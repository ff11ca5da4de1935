"""Write datasets at a site: ``with pool("ecmwf"): dataset.to_zarr(path)``.

Covers ``to_zarr`` of xarray's datasets, arrays and trees inside a ``pool()`` block, and :func:`to_zarr`, which says
the same in one call. Does not cover NetCDF, whose library writes a file from one process only: inside a block,
``to_netcdf`` of lazy data is an error that says what to do instead.

Notes
-----
Without this, xarray would write the metadata into the client's own file system and the chunks at the site: two
halves of a store, and no error. The chunks are written by tasks that run at the site in any case, so a path inside
of a block can only mean a path there. Stores that are objects (``zarr.storage``, ``fsspec``) are left alone.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import xarray
from dask.base import is_dask_collection

from meshcompute.clients import pool
from meshcompute.data.sitecalls import Site, names_of_site
from meshcompute.errors import UnsupportedPinError
from meshcompute.pools import current_pin

__all__ = ["activate", "to_zarr"]


def to_zarr(site: Site, dataset: Any, path: str | os.PathLike[str], **options: Any) -> Any:
    """Write a dataset as a Zarr store at a site.

    Parameters
    ----------
    site
        Name of the pool whose workers write it.
    dataset
        A :class:`xarray.Dataset`, ``DataArray`` or ``DataTree``, lazy or in memory.
    path
        Absolute path or address, as the workers there know it.
    **options
        Everything else that :meth:`xarray.Dataset.to_zarr` takes, ``storage_options`` for instance.

    Returns
    -------
    xarray.backends.ZarrStore or dask.delayed.Delayed
        As of :meth:`xarray.Dataset.to_zarr`.

    Raises
    ------
    ValueError
        The path is relative, or the site is more than one pool.
    NoClientError, PoolsMissingError, UnknownPoolError
        As of :func:`meshcompute.open_dataset`.
    Exception
        What writing raised at the site, as it is, with a note that names the site.

    Examples
    --------
    >>> to_zarr("ecmwf", means, "/data/ecmwf/means.zarr")  # doctest: +SKIP
    """
    activate()
    with pool(*names_of_site(site)):
        return dataset.to_zarr(path, **options)


def activate() -> None:
    """Make ``to_zarr`` and ``to_netcdf`` respect ``pool()``. Idempotent."""
    for kind in (xarray.Dataset, xarray.DataArray, xarray.DataTree):
        for name, hook in (("to_zarr", _to_zarr), ("to_netcdf", _to_netcdf)):
            method = getattr(kind, name)
            if not hasattr(method, "meshcompute_hook"):
                setattr(kind, name, _hooked(method, hook))


def _hooked(original: Callable[..., Any], hook: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        pin = current_pin()
        if pin is None or not pin.pools:
            return original(self, *args, **kwargs)
        return hook(functools.partial(original, self), self, pin.pools, *args, **kwargs)

    wrapper.meshcompute_hook = True  # type: ignore[attr-defined] # a mark on a function
    return wrapper


def _to_zarr(
    original: Callable[..., Any], dataset: Any, pools: tuple[str, ...], store: Any = None, *args: Any, **kwargs: Any
) -> Any:
    if not isinstance(store, str | os.PathLike):
        return original(store, *args, **kwargs)
    path = os.fspath(store)
    if not path.startswith("/") and "://" not in path and "::" not in path:
        if not _is_lazy(dataset):
            return original(store, *args, **kwargs)  # nothing that Dask would run
        raise ValueError(
            f"Inside of pool({', '.join(map(repr, pools))}) a dataset is written at that site, and {path!r} is no "
            "absolute path there. Give one, or write here: dataset.compute().to_zarr(...) outside of the block."
        )
    if len(pools) != 1:
        raise ValueError(
            f"Inside of pool({', '.join(map(repr, pools))}) it is not clear where {path!r} should be written. "
            f"Write at one site at a time: with pool({pools[0]!r}): dataset.to_zarr(...)."
        )
    from meshcompute.data.sitestore import SiteStore

    at_site = SiteStore(pools, path, kwargs.pop("storage_options", None))
    compute = kwargs.pop("compute", True)
    try:
        writes = original(at_site, *args, compute=False, **kwargs)
        at_site.flush()  # tasks open what the metadata describes
        if not compute:
            return writes
        writes.compute()
        return xarray.backends.ZarrStore.open_group(at_site, mode="r", consolidated=False)
    except Exception as exc:
        exc.add_note(f"While writing {at_site}.")
        raise


def _to_netcdf(
    original: Callable[..., Any], dataset: Any, pools: tuple[str, ...], path: Any = None, *args: Any, **kwargs: Any
) -> Any:
    if isinstance(path, str | os.PathLike) and _is_lazy(dataset):
        raise UnsupportedPinError(
            f"Inside of pool({', '.join(map(repr, pools))}), lazy data cannot be written to the NetCDF file "
            f"{os.fspath(path)!r}: its library writes from one process only. Write it at the site with "
            "dataset.to_zarr(path), or bring it here: dataset.compute().to_netcdf(path)."
        )
    return original(path, *args, **kwargs)


def _is_lazy(dataset: Any) -> bool:
    parts = [node.dataset for node in dataset.subtree] if isinstance(dataset, xarray.DataTree) else [dataset]
    return any(is_dask_collection(part) for part in parts)
