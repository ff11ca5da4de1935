"""Open what lies at a site, from a client that cannot see it.

Covers NetCDF, Zarr and whatever else xarray opens at the site, as lazy datasets that are pinned to it, and Parquet
as dataframes (:mod:`meshcompute.data.tables`), and files (:mod:`meshcompute.data.sitefiles`). Does not cover writing
(:mod:`meshcompute.data.writing`).

Notes
-----
::

    client                                  a worker of the site
    open_dataset("ecmwf", path) ─────────►  xarray.open_dataset(path): reads metadata and index coordinates
    xarray: chunks, combining   ◄─────────  description; the lazy variables are sealed
    compute()                   ─────────►  a task per chunk opens the variable and reads its part

The client's part is xarray's own: it opens the description with a backend of ours, so that ``chunks`` and the
combining of many files mean what they mean in xarray.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dask.array
import numpy as np
import xarray
from dask.tokenize import normalize_token
from distributed import Future
from xarray.backends import BackendArray, BackendEntrypoint
from xarray.backends.locks import HDF5_LOCK
from xarray.core import indexing

from meshcompute.clients import pool
from meshcompute.data import writing
from meshcompute.data.sitearrays import Reader, VariableAtSite, describe_dataset
from meshcompute.data.sitecalls import Site, client_for, names_of_site, result_at, submit_at
from meshcompute.data.sitefiles import filesystem
from meshcompute.data.siteside import SiteCall, find_paths
from meshcompute.data.tables import open_dataframe
from meshcompute.shipping import by_value

__all__ = ["filesystem", "open_dataframe", "open_dataset", "open_mfdataset", "open_zarr"]

# Keywords of xarray.open_dataset that concern what the client makes of the metadata; all others go to the site.
_LOCAL_OPTIONS = ("chunks", "inline_array", "from_array_kwargs", "overwrite_encoded_chunks")

# Keywords of xarray.open_mfdataset that concern the combining of files, likewise.
_COMBINING_OPTIONS = (
    "attrs_file",
    "combine",
    "combine_attrs",
    "compat",
    "concat_dim",
    "coords",
    "data_vars",
    "errors",
    "join",
)

Path = str | os.PathLike[str]


def open_dataset(
    site: Site,
    path: Path,
    *,
    engine: Any = None,
    chunks: Any = None,
    **options: Any,
) -> xarray.Dataset:
    """Open a dataset that lies at a site.

    Parameters
    ----------
    site
        Name of the pool whose workers can see it; several names if each of them has it at that path.
    path
        Path or address, as the workers there know it. A ``~`` is expanded there.
    engine
        As in :func:`xarray.open_dataset`; chosen at the site if it is not given.
    chunks
        As in :func:`xarray.open_dataset`, but None means ``{}``: the chunks that the file prefers. What comes back
        is always made of Dask arrays, because there is no file here from which values could be loaded later.
    **options
        Everything else that :func:`xarray.open_dataset` takes, ``group`` and ``storage_options`` for instance.

    Returns
    -------
    xarray.Dataset
        Lazy, with its loading tasks pinned to the site. Only metadata, index coordinates and scalars have been read.

    Raises
    ------
    NoClientError
        There is no Dask client.
    PoolsMissingError
        None of the cluster's workers belongs to a pool.
    UnknownPoolError
        The cluster has pools, and this is none of them.
    Exception
        What opening raised at the site (FileNotFoundError, PermissionError, ValueError where it is no dataset...), as
        it is, with a note that names the site.

    Examples
    --------
    >>> observations = open_dataset("eumetsat", "/data/eumetsat/observations.nc")  # doctest: +SKIP
    """
    sites = names_of_site(site)
    options |= {"chunks": chunks, "engine": engine}
    at_site, local = _split_options(options)
    client = client_for("open_dataset", sites)
    future = submit_at(client, sites, _describe(path, at_site))
    return _open_description(_Description(sites, path, at_site, future), local)


def open_zarr(
    site: Site,
    store: Path,
    *,
    chunks: Any = None,
    **options: Any,
) -> xarray.Dataset:
    """Open a Zarr store that lies at a site.

    Parameters
    ----------
    site
        Name of the pool whose workers can see it; several names if each of them has it at that path.
    store
        Path or address, as the workers there know it.
    chunks
        As in :func:`open_dataset`.
    **options
        Everything else that :func:`xarray.open_zarr` takes: ``group``, ``consolidated``, ``storage_options``...

    Returns
    -------
    xarray.Dataset
        As of :func:`open_dataset`, which also says what is raised.
    """
    if chunks == "auto":
        chunks = None  # xarray.open_zarr calls the store's own chunks "auto"
    return open_dataset(site, store, engine="zarr", chunks=chunks, **options)


def open_mfdataset(
    site: Site,
    paths: Path | Sequence[Any],
    *,
    engine: Any = None,
    chunks: Any = None,
    preprocess: Callable[[xarray.Dataset], xarray.Dataset] | None = None,
    **options: Any,
) -> xarray.Dataset:
    """Open many files that lie at a site as one dataset.

    Parameters
    ----------
    site
        Name of the pool whose workers can see them; several names if each of them has them at those paths.
    paths
        A pattern with ``*``, ``?`` or ``[``, expanded at the site and sorted, or a list of paths; a nested list as
        in :func:`xarray.open_mfdataset`.
    engine, chunks
        As in :func:`open_dataset`.
    preprocess
        Called here, with the lazy dataset of each file.
    **options
        Everything else that :func:`xarray.open_mfdataset` and :func:`xarray.open_dataset` take. The metadata of all
        files is always read in parallel, so ``parallel`` changes nothing.

    Returns
    -------
    xarray.Dataset
        As of :func:`open_dataset`.

    Raises
    ------
    FileNotFoundError
        Nothing at the site matches the pattern.
    Exception
        As in :func:`open_dataset`.
    """
    sites = names_of_site(site)
    client = client_for("open_mfdataset", sites)
    options.pop("parallel", None)
    combining: dict[str, Any] = {name: options.pop(name) for name in _COMBINING_OPTIONS if name in options}
    options |= {"chunks": chunks, "engine": engine}
    at_site, local = _split_options(options)
    if isinstance(paths, str):
        storage_options = at_site.get("storage_options")
        future = submit_at(client, sites, SiteCall(find_paths, paths, storage_options))
        pattern, paths = paths, result_at(future, sites, paths)
        if not paths:
            error = FileNotFoundError(f"No file matches {pattern!r}.")
            error.add_note(f"Looked for at site {' or '.join(map(repr, sites))}.")
            raise error
    elif isinstance(paths, os.PathLike):
        paths = [paths]

    descriptions: list[_Description] = []

    def described(nested: Any) -> Any:
        if isinstance(nested, list | tuple):
            return [described(item) for item in nested]
        future = submit_at(client, sites, _describe(nested, at_site))
        descriptions.append(_Description(sites, nested, at_site, future))
        return descriptions[-1]

    sources = described(paths)
    if combining.get("attrs_file") is not None:
        wanted = os.fspath(combining["attrs_file"])
        combining["attrs_file"] = next((d for d in descriptions if os.fspath(d.path) == wanted), wanted)

    def with_readers(dataset: xarray.Dataset) -> xarray.Dataset:
        source = dataset.encoding.pop(_SOURCE)
        dataset = _use_readers(dataset, source, local)
        return dataset if preprocess is None else preprocess(dataset)

    with pool(*sites):
        return xarray.open_mfdataset(sources, engine=_SiteBackend, preprocess=with_readers, **local, **combining)


def _split_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keywords of ``xarray.open_dataset`` into those for the site and those for this process."""
    options = dict(options)
    options |= options.pop("backend_kwargs", None) or {}
    options.pop("cache", None)  # values are not cached here: xarray's own default with chunks
    if options.pop("chunked_array_type", None) not in (None, "dask"):
        raise ValueError("Only Dask arrays can be loaded at a site: leave out chunked_array_type.")
    local = {name: options.pop(name) for name in _LOCAL_OPTIONS if name in options}
    if local["chunks"] is None:
        local["chunks"] = {}
    if "create_default_indexes" in options:
        local["create_default_indexes"] = options["create_default_indexes"]
    return {name: value for name, value in options.items() if (name, value) != ("engine", None)}, local


def _describe(path: Path, options: dict[str, Any]) -> SiteCall:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"A dataset at a site is opened by its path or address there, not by {type(path).__name__}.")
    return SiteCall(describe_dataset, os.fspath(path), options, HDF5_LOCK)


class _Description:
    """Metadata of a dataset at a site: what our backend opens."""

    def __init__(self, sites: tuple[str, ...], path: Path, options: dict[str, Any], future: Future) -> None:
        self.sites = sites
        self.path = path
        self.options = options
        self.future = future
        self._content: dict[str, Any] | None = None

    @property
    def content(self) -> dict[str, Any]:
        if self._content is None:
            self._content = result_at(self.future, self.sites, os.fspath(self.path))
        return self._content

    def __dask_tokenize__(self) -> object:
        # The same path at two sites, or a file that has been replaced, is another dataset.
        parts = ("meshcompute.remote", self.sites, os.fspath(self.path), self.options, self.content["version"])
        return normalize_token(parts)

    def __str__(self) -> str:
        return f"{os.fspath(self.path)} at {' or '.join(self.sites)}"

    def backend_dataset(self) -> xarray.Dataset:
        """Lay out the dataset with placeholders for what stays at the site."""
        variables = {name: _placeholder(v) for name, v in self.content["variables"].items()}
        coords = {name: variables.pop(name) for name in self.content["coords"]}
        dataset = xarray.Dataset(variables, xarray.Coordinates(coords, indexes={}), self.content["attrs"])
        dataset.encoding = {**self.content["encoding"], _SOURCE: self}
        return dataset


_SOURCE = "meshcompute-source"


class _Placeholder(BackendArray):
    """Shape and type of values that stay at a site."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, sample: Any) -> None:
        self.shape = shape
        self.dtype = dtype
        self.sample = sample

    def __getitem__(self, key: Any) -> Any:
        # xarray looks at one element of type object, to see whether it is a date
        assert self.sample is not None, "a placeholder is replaced before anybody asks for its values"
        values = np.empty((), object)
        values[()] = self.sample
        return np.broadcast_to(values, self.shape)[key.tuple]


def _placeholder(variable: VariableAtSite) -> xarray.Variable:
    data = variable.values
    if variable.sealed is not None:
        data = indexing.LazilyIndexedArray(_Placeholder(variable.shape, variable.dtype, variable.sample))
    return xarray.Variable(variable.dims, data, variable.attrs, variable.encoding)


class _SiteBackend(BackendEntrypoint):
    """Backend with which xarray opens a description."""

    description = "Open a dataset at a site of a Dask cluster"
    open_dataset_parameters = ("filename_or_obj", "drop_variables")

    def open_dataset(self, filename_or_obj: Any, *, drop_variables: Any = None) -> xarray.Dataset:
        dataset: xarray.Dataset = filename_or_obj.backend_dataset()
        return dataset


# One object, so that a graph of many variables has the code only once.
_READER = by_value(Reader, ["meshcompute.data.siteside"])


class _ReadAtSite:
    """The array that Dask slices: unpickled anywhere, it is a :class:`meshcompute.data.sitearrays.Reader`."""

    def __init__(self, reader: Reader, shape: tuple[int, ...], dtype: Any) -> None:
        self.reader = reader
        self.shape = shape
        self.dtype = dtype
        self.ndim = len(shape)

    def __getitem__(self, key: Any) -> Any:
        # Only Dask's synchronous and threaded schedulers come here: they run in this process, which has no file.
        return self.reader[key]

    def __repr__(self) -> str:
        return repr(self.reader)

    def __reduce__(self) -> tuple[Any, ...]:
        return operator.call, (_READER, self.reader.sealed, self.reader.label, self.reader.guard)


def _open_description(source: _Description, local: Mapping[str, Any]) -> xarray.Dataset:
    with pool(*source.sites):
        dataset = xarray.open_dataset(source, engine=_SiteBackend, **local)  # type: ignore[arg-type] # a backend takes what it likes
        del dataset.encoding[_SOURCE]
        return _use_readers(dataset, source, local)


def _use_readers(dataset: xarray.Dataset, source: _Description, local: Mapping[str, Any]) -> xarray.Dataset:
    """Replace the placeholders that xarray has made Dask arrays of."""
    writing.activate()
    for name, variable in source.content["variables"].items():
        if variable.sealed is None:
            continue
        planned = dataset.variables[name].data
        label = f"{name} of {source}"
        reader = Reader(variable.sealed, label, HDF5_LOCK if variable.needs_guard else None)
        dataset.variables[name].data = dask.array.from_array(
            _ReadAtSite(reader, variable.shape, variable.dtype),
            chunks=planned.chunks,
            name=planned.name,
            asarray=True,
            inline_array=local.get("inline_array", False),
            meta=np.empty((0,) * len(variable.shape), variable.dtype),
        )
    return dataset
