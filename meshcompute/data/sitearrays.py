"""What runs on the workers of a site when a dataset there is opened and its chunks are read.

Covers describing a dataset, and reading parts of its variables. Travels by value, see :mod:`meshcompute.data.siteside`.
Does not cover what the client makes of it (:mod:`meshcompute.data.opening`).
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import zlib
from dataclasses import dataclass
from typing import Any

import cloudpickle

from meshcompute.data.siteside import portable, unseal

__all__ = ["Reader", "VariableAtSite", "describe_dataset"]


@dataclass(frozen=True, kw_only=True)
class VariableAtSite:
    """One variable of a dataset, as its site describes it.

    Notes
    -----
    The values of an index or of a scalar come along. All others stay: ``sealed`` is the lazy variable then, and
    ``needs_guard`` says whether reading it goes through the HDF5 library. ``sample`` is one element of it where the
    type is object.
    """

    dims: tuple[Any, ...]
    attrs: dict[Any, Any]
    encoding: dict[Any, Any]
    values: Any
    shape: tuple[int, ...]
    dtype: Any
    sealed: bytes | None
    needs_guard: bool
    sample: Any


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


def _held(guard: Any) -> Any:
    """Hold a client's lock around HDF5, unless it is this process's own, which xarray takes by itself."""
    from xarray.backends.locks import HDF5_LOCK

    return contextlib.nullcontext() if guard is None or guard.token == HDF5_LOCK.token else guard


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

    with _held(guard):
        dataset = xarray.open_dataset(path, chunks=None, cache=False, **options)
        try:
            variables = {}
            for name, variable in dataset.variables.items():
                values, sealed, is_locked, sample = None, None, False, None
                if isinstance(variable, xarray.IndexVariable) or variable.ndim == 0:
                    values = variable.values  # xarray makes no Dask array of a scalar
                else:
                    lazy = variable.copy(deep=False)
                    lazy.attrs, lazy.encoding = {}, {}
                    file = io.BytesIO()
                    pickler = _Pickler(file, locks)
                    pickler.dump(lazy)
                    sealed, is_locked = zlib.compress(file.getvalue()), pickler.is_locked
                    if variable.dtype == object and variable.size:
                        sample = variable[(0,) * variable.ndim].values.item()
                variables[name] = VariableAtSite(
                    dims=variable.dims,
                    attrs=dict(variable.attrs),
                    encoding=dict(variable.encoding),
                    values=values,
                    shape=variable.shape,
                    dtype=variable.dtype,
                    sealed=sealed,
                    needs_guard=is_locked,
                    sample=sample,
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
            with _held(self.guard):
                if self.variable is None:
                    self.variable = unseal(self.sealed)
                return self.variable[key].values
        except Exception as exc:
            exc.add_note(f"While reading {self.label}, on {socket.gethostname()}.")
            if (error := portable(exc)) is exc:
                raise
        raise error  # here, where it gets no context
