"""What runs on the workers of a site when something there is opened.

Covers calls that hide their arguments, and what they do with file systems and Zarr stores. Arrays and tables are in
:mod:`meshcompute.data.sitearrays` and :mod:`meshcompute.data.sitetables`. Does not cover asking a site for it
(:mod:`meshcompute.data.sitecalls`) or what the user gets (:mod:`meshcompute.data.opening`).

Notes
-----
All three travel by value, to workers that may not have meshcompute: of ours they import only each other, and what is
not in the standard library or cloudpickle inside functions. What is opened is *sealed*: pickled and compressed bytes
that only a worker of the site opens. Neither the client nor the scheduler ever makes the objects in it, since making
one may already mean to ask a server that only the site can reach. It also keeps credentials out of logs: Dask logs
the arguments of a task that failed, and the bytes of a message that it cannot read.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import zlib
from collections.abc import Callable
from typing import Any

import cloudpickle

__all__ = [
    "SiteCall",
    "call_file_system",
    "find_paths",
    "list_store",
    "portable",
    "read_store",
    "seal",
    "unseal",
    "unseal_error",
    "unseal_store",
    "write_store",
    "zarr_store",
]


def seal(content: object) -> bytes:
    """Pickle and compress."""
    return zlib.compress(cloudpickle.dumps(content))


def unseal(sealed: bytes) -> Any:
    """Undo :func:`seal`."""
    return pickle.loads(zlib.decompress(sealed))


def portable(exc: Exception) -> Exception:
    """Find the exception that tells most about one, of those that Dask can bring to a client.

    Parameters
    ----------
    exc
        The exception that is being handled.

    Returns
    -------
    Exception
        The same; or the same without its chain, which is then a note; or one of the nearest base class.

    Notes
    -----
    An exception that cannot be pickled, or whose chain cannot (those of HTTP libraries hold sockets), becomes a plain
    ``Exception`` in Dask, so that nobody could catch it as what it is.
    """
    if _survives(exc):
        return exc
    if (cause := exc.__cause__ or exc.__context__) is not None:
        exc.add_note(f"Caused by {cause!r}.")
        exc.__cause__ = exc.__context__ = None
    if _survives(exc):
        return exc
    for base in type(exc).__mro__[1:]:
        if base in (Exception, BaseException):
            break
        for args in (exc.args, (str(exc),)):
            with contextlib.suppress(Exception):
                other: Exception = base(*args)
                other.__dict__.update(exc.__dict__)
                if _survives(other):
                    return other
    return exc


def _survives(exc: Exception) -> bool:
    from distributed.core import error_message

    return type(pickle.loads(error_message(exc)["exception"].data)) is type(exc)


def unseal_error(sealed: bytes) -> Exception:
    """Make the exception that a :class:`SiteCall` has returned."""
    kind, args, state = unseal(sealed)
    error: Exception = kind(*args)
    error.__dict__.update(state)
    return error


class SiteCall:
    """A function with its arguments, on its way to a worker. Its repr shows no argument.

    Calling it returns what the function returns and None, or None and a sealed exception.

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

    def __call__(self) -> tuple[Any, bytes | None]:
        args, kwargs = unseal(self.sealed)
        try:
            return self.function(*args, **kwargs), None
        except Exception as exc:
            # Most errors travel in Dask's own way, with their traceback. It fails for some that have two bases with a
            # layout of their own, among them zarr's "no group found" (tblib 3.2): those go as a value.
            error = portable(exc)
            if error is exc:
                raise
            with contextlib.suppress(Exception):
                sealed = seal((type(exc), exc.args, exc.__dict__))
                unseal_error(sealed)
                return None, sealed
        raise error  # here, where it gets no context

    def __repr__(self) -> str:
        return f"<{self.function.__name__} at a site>"


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
    """Expand a pattern with ``*``, ``?`` or ``[`` to sorted paths of files and folders."""
    from fsspec.core import url_to_fs

    is_address = "://" in pattern or "::" in pattern
    if not is_address:
        pattern = os.path.abspath(os.path.expanduser(pattern))  # noqa: PTH100, PTH111 - text in, text out
    file_system, path = url_to_fs(pattern, **(storage_options or {}))
    file_system.invalidate_cache()
    return [file_system.unstrip_protocol(found) if is_address else found for found in sorted(file_system.glob(path))]


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
