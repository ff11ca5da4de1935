"""What runs on the workers of a site when something there is opened.

Covers calls that hide their arguments, reading a dataset's metadata, and reading its chunks. Does not cover asking
a site for it (:mod:`meshcompute.sitecalls`) or what the user gets (:mod:`meshcompute.remote`).

Notes
-----
Everything here travels by value, to workers that may not have meshcompute: it imports nothing of ours, and anything
that is not in the standard library inside functions. What is opened is *sealed*: pickled and compressed bytes that
only a worker of the site opens. Neither the client nor the scheduler ever makes the objects in it, since making one
may already mean to ask a server that only the site can reach. It also keeps credentials out of logs: Dask logs the
arguments of a task that failed, and the bytes of a message that it cannot read.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import socket
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cloudpickle

__all__ = ["Reader", "SiteCall", "VariableAtSite", "call_file_system", "describe_dataset", "seal", "unseal"]


def seal(content: object) -> bytes:
    """Pickle and compress."""
    return zlib.compress(cloudpickle.dumps(content))


def unseal(sealed: bytes) -> Any:
    """Undo :func:`seal`."""
    return pickle.loads(zlib.decompress(sealed))


class SiteCall:
    """A function with its arguments, on its way to a worker. Its repr shows no argument.

    Parameters
    ----------
    function
        What to call there.
    *args, **kwargs
        Its arguments.
    """

    def __init__(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
        self.function = function
        self.sealed = seal((args, kwargs))

    def __call__(self) -> Any:
        args, kwargs = unseal(self.sealed)
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<{self.function.__name__} at a site>"


@dataclass(frozen=True, kw_only=True)
class VariableAtSite:
    """One variable of a dataset, as its site describes it.

    Notes
    -----
    The values of an index or of a scalar come along. All others stay: ``sealed`` is the lazy variable then, and
    ``needs_guard`` says whether reading it goes through the HDF5 library.
    """

    dims: tuple[Any, ...]
    attrs: dict[Any, Any]
    encoding: dict[Any, Any]
    values: Any
    shape: tuple[int, ...]
    dtype: Any
    sealed: bytes | None
    needs_guard: bool


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc, unused-ignore] # cloudpickle ships no types
    """Pickle xarray's locks around HDF5 as "that of the process where this is unpickled".

    xarray's own pickling keeps the lock of the process that opened the file. Files that two workers opened would
    then have two locks in a third one, and HDF5 crashes when two threads enter it.
    """

    def __init__(self, file: Any, locks: Any) -> None:
        super().__init__(file)
        self.locks = locks
        self.is_locked = False

    def reducer_override(self, obj: Any) -> Any:
        for name in ("HDF5_LOCK", "NETCDFC_LOCK"):
            if obj is getattr(self.locks, name):
                self.is_locked = True
                return getattr, (self.locks, name)
        return super().reducer_override(obj)


def describe_dataset(path: str, options: dict[str, Any], guard: Any) -> dict[str, Any]:
    """Open a dataset lazily and describe it.

    Parameters
    ----------
    path
        Path or address, as this site knows it.
    options
        Keywords of ``xarray.open_dataset``.
    guard
        The client's own lock around HDF5: files that the client opened are read under it in this process.

    Returns
    -------
    dict
        ``attrs``, ``encoding``, ``coords`` (names), ``variables`` (name to VariableAtSite) and ``version`` (of the
        file, as far as it is known).
    """
    import xarray
    from xarray.backends import locks

    with guard or contextlib.nullcontext():
        dataset = xarray.open_dataset(path, chunks=None, cache=False, **options)
        try:
            variables = {}
            for name, variable in dataset.variables.items():
                values, sealed, is_locked = None, None, False
                if isinstance(variable, xarray.IndexVariable) or variable.ndim == 0:
                    values = variable.values  # xarray makes no Dask array of a scalar
                else:
                    lazy = variable.copy(deep=False)
                    lazy.attrs, lazy.encoding = {}, {}
                    file = io.BytesIO()
                    pickler = _Pickler(file, locks)
                    pickler.dump(lazy)
                    sealed, is_locked = zlib.compress(file.getvalue()), pickler.is_locked
                variables[name] = VariableAtSite(
                    dims=variable.dims,
                    attrs=dict(variable.attrs),
                    encoding=dict(variable.encoding),
                    values=values,
                    shape=variable.shape,
                    dtype=variable.dtype,
                    sealed=sealed,
                    needs_guard=is_locked,
                )
        finally:
            dataset.close()
    version = None
    with contextlib.suppress(OSError):
        status = os.stat(os.path.expanduser(path))  # noqa: PTH111, PTH116 - pathlib would spoil an address
        version = status.st_mtime_ns, status.st_size, status.st_ino
    return {
        "attrs": dict(dataset.attrs),
        "encoding": dict(dataset.encoding),
        "coords": list(dataset.coords),
        "variables": variables,
        "version": version,
    }


class Reader:
    """Reads parts of one variable of a file, on a worker that can see the file.

    Parameters
    ----------
    sealed
        The lazy variable.
    label
        Variable, file and site, for messages.
    guard
        The client's own lock around HDF5, if reading goes through it.

    Notes
    -----
    It stays open as long as Dask keeps it, so that the chunks of a variable share a file handle; where it goes when
    it is pickled, the file is opened again.
    """

    def __init__(self, sealed: bytes, label: str, guard: Any) -> None:
        self.sealed = sealed
        self.label = label
        self.guard = guard
        self.variable: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "variable": None}

    def __repr__(self) -> str:
        return f"<{self.label}>"

    def __getitem__(self, key: Any) -> Any:
        try:
            with self.guard or contextlib.nullcontext():
                if self.variable is None:
                    self.variable = unseal(self.sealed)
                return self.variable[key].values
        except Exception as exc:
            exc.add_note(f"While reading {self.label}, on {socket.gethostname()}.")
            raise


def call_file_system(protocol: str, options: dict[str, Any], method: str, args: Any, kwargs: Any) -> Any:
    """Call a method of an fsspec file system here.

    Parameters
    ----------
    protocol, options
        What ``fsspec.filesystem`` takes.
    method
        Name of the method.
    args, kwargs
        Its arguments.
    """
    import fsspec

    file_system = fsspec.filesystem(protocol, **options)
    if method != "cat_file":
        file_system.invalidate_cache()  # this worker's listing may be older than what another one has written
    return getattr(file_system, method)(*args, **kwargs)


def find_paths(pattern: str, storage_options: dict[str, Any] | None) -> list[str]:
    """Expand a pattern with ``*``, ``?`` or ``[`` to sorted paths."""
    import fsspec

    if "://" not in pattern and "::" not in pattern:
        pattern = os.path.abspath(os.path.expanduser(pattern))  # noqa: PTH100, PTH111 - text in, text out
    file_system, _, paths = fsspec.get_fs_token_paths(pattern, storage_options=storage_options)
    if "://" not in pattern:
        return sorted(paths)
    return sorted(file_system.unstrip_protocol(path) for path in paths)


def zarr_store(path: str, storage_options: dict[str, Any] | None, *, read_only: bool = False) -> Any:
    """Make the Zarr store that stands for a path or address here."""
    from zarr.storage import FsspecStore, LocalStore

    if "://" in path or "::" in path:
        return FsspecStore.from_url(path, storage_options=storage_options, read_only=read_only)
    return LocalStore(path, read_only=read_only)


def unseal_store(sealed: bytes) -> Any:
    """Undo the sealing of the arguments of :func:`zarr_store`."""
    path, storage_options, read_only = unseal(sealed)
    return zarr_store(path, storage_options, read_only=read_only)


def read_store(path: str, storage_options: dict[str, Any] | None, key: str) -> bytes | None:
    """Read one value of a Zarr store; None if there is none."""
    from zarr.core.buffer import default_buffer_prototype
    from zarr.core.sync import sync

    value = sync(zarr_store(path, storage_options).get(key, default_buffer_prototype()))
    return None if value is None else value.to_bytes()


def list_store(path: str, storage_options: dict[str, Any] | None, prefix: str, *, direct: bool) -> list[str]:
    """List the keys of a Zarr store below a prefix, or only what is directly in it."""
    from zarr.core.sync import sync

    store = zarr_store(path, storage_options)

    async def collect() -> list[str]:
        return [key async for key in (store.list_dir(prefix) if direct else store.list_prefix(prefix))]

    return sync(collect())


def write_store(path: str, storage_options: dict[str, Any] | None, steps: list[tuple[str, str, bytes | None]]) -> None:
    """Change a Zarr store.

    Parameters
    ----------
    path, storage_options
        The store.
    steps
        In order: ("set", key, value), ("delete", key, None) or ("delete_dir", prefix, None).
    """
    from zarr.core.buffer import default_buffer_prototype
    from zarr.core.sync import sync

    store = zarr_store(path, storage_options)
    make = default_buffer_prototype().buffer.from_bytes

    async def apply() -> None:
        for method, key, value in steps:
            if method == "set":
                await store.set(key, make(value or b""))
            else:
                await getattr(store, method)(key)

    sync(apply())


def describe_table(
    path: str | list[str], storage_options: dict[str, Any] | None, filters: Any, split_row_groups: int
) -> dict[str, Any]:
    """Find the files of a Parquet table and describe it.

    Parameters
    ----------
    path
        A file, a folder, a pattern, or several files.
    storage_options
        Options of the fsspec file system.
    filters
        As of ``pyarrow.parquet.read_table``; leaves out partitions (folders named ``key=value``) as a whole.
    split_row_groups
        How many row groups make a piece; 0 for one piece per file.

    Returns
    -------
    dict
        ``meta`` (an empty pandas frame), ``pieces`` (each sealed), ``paths`` and ``version`` (of the files, as far as
        they are known).
    """
    import fsspec
    import pyarrow.dataset
    import pyarrow.parquet

    file_system, _, paths = fsspec.get_fs_token_paths(path, mode="rb", storage_options=storage_options)
    is_single = len(paths) == 1
    table = pyarrow.dataset.dataset(
        paths[0] if is_single else sorted(paths), format="parquet", partitioning="hive", filesystem=file_system
    )
    expression = None if filters is None else pyarrow.parquet.filters_to_expression(filters)
    fragments = sorted(table.get_fragments(filter=expression), key=lambda fragment: fragment.path)
    if not fragments:
        raise FileNotFoundError(f"No Parquet file at {path!r}" + ("." if filters is None else " fits the filters."))
    versions = []
    for fragment in fragments:
        info = file_system.info(fragment.path)
        versions.append((info.get("size"), str(info.get("mtime") or info.get("ETag"))))
    if split_row_groups:
        rows = [group for fragment in fragments for group in fragment.split_by_row_group()]
        by_file: dict[str, list[Any]] = {}
        for group in rows:
            by_file.setdefault(group.path, []).append(group)
        fragments = []
        for fragment in sorted(table.get_fragments(filter=expression), key=lambda fragment: fragment.path):
            numbers = [group.row_groups[0].id for group in by_file[fragment.path]]
            for start in range(0, len(numbers), split_row_groups):
                fragments.append(fragment.subset(row_group_ids=numbers[start : start + split_row_groups]))
    return {
        "meta": table.schema.empty_table().to_pandas(),
        "pieces": [seal((fragment, table.schema)) for fragment in fragments],
        "version": versions,
    }


class TableReader:
    """Reads pieces of a Parquet table, on a worker that can see the files.

    Parameters
    ----------
    label
        Table and site, for messages.
    filters
        As of ``pyarrow.parquet.read_table``.
    token
        What distinguishes this table from others in the names of tasks.
    """

    def __init__(self, label: str, filters: Any, token: str) -> None:
        self.label = label
        self.filters = filters
        self.token = token

    def __repr__(self) -> str:
        return f"<read {self.label}>"

    def __dask_tokenize__(self) -> tuple[str, str]:
        return "meshcompute.TableReader", self.token

    def __call__(self, piece: bytes, columns: list[str] | None = None) -> Any:
        import pyarrow.parquet

        try:
            fragment, schema = unseal(piece)
            if columns is not None:  # an index is a column of the file
                described = schema.pandas_metadata or {"index_columns": []}
                index = [name for name in described["index_columns"] if isinstance(name, str)]
                columns = [*columns, *(name for name in index if name not in columns)]
            expression = None if self.filters is None else pyarrow.parquet.filters_to_expression(self.filters)
            table = fragment.to_table(schema=schema, columns=columns, filter=expression)
            return table.replace_schema_metadata(schema.metadata).to_pandas()
        except Exception as exc:
            exc.add_note(f"While reading {self.label}, on {socket.gethostname()}.")
            raise
