"""A Zarr store at a site, as the client sees it while it writes metadata there.

Covers reading, listing and changing keys by calls at the site. Does not cover when it is used
(:mod:`meshcompute.data.writing`). Chunks do not come through here: unpickled on a worker, the store is Zarr's own store
of that path.

Notes
-----
Creating a dataset of n variables is about 10 n small reads and writes, one after the other. Each would be a round
trip to the site. So changes are collected until :meth:`SiteStore.flush`, and a store that was empty when it was
opened is known to have only what was put into it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.storage import MemoryStore

from meshcompute.data.sitecalls import call_at
from meshcompute.data.siteside import SiteCall, list_store, read_store, seal, unseal_store, write_store
from meshcompute.shipping import by_value

__all__ = ["SiteStore"]

# Values of coordinates in memory are sent before they become a message that a scheduler would feel.
_FLUSH_NBYTES = 8 * 2**20


class SiteStore(Store):
    """A Zarr store that lies at a site.

    Parameters
    ----------
    sites
        Name of the pool whose workers can see it.
    path
        Path or address, as they know it.
    storage_options
        Options of its fsspec file system, if it is an address.
    read_only
        Whether writing is refused.
    """

    supports_writes = True
    supports_deletes = True
    supports_listing = True

    def __init__(
        self,
        sites: tuple[str, ...],
        path: str,
        storage_options: dict[str, Any] | None = None,
        *,
        read_only: bool = False,
    ) -> None:
        super().__init__(read_only=read_only)
        self.sites = sites
        self.path = path
        self.storage_options = storage_options
        self.changes = _Changes()

    async def _open(self) -> None:
        await super()._open()
        if not self.changes.is_probed:
            self.changes.is_probed = True
            if not await self._list("", direct=True):
                self.changes.gone.append("")

    def with_read_only(self, read_only: bool = False) -> SiteStore:
        """Return a view of the same store, see :meth:`zarr.abc.store.Store.with_read_only`."""
        store = type(self)(self.sites, self.path, self.storage_options, read_only=read_only)
        store.changes = self.changes
        return store

    def flush(self) -> None:
        """Make all changes at the site that have been collected."""
        steps, self.changes.steps, self.changes.nbytes = self.changes.steps, [], 0
        if steps:
            self._call(write_store, steps)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, SiteStore)
            and (self.sites, self.path, self.read_only) == (other.sites, other.path, other.read_only)
            and self.storage_options == other.storage_options
        )

    __hash__ = None  # type: ignore[assignment] # as Zarr's own stores

    def __str__(self) -> str:
        return f"{self.path} at {' or '.join(self.sites)}"

    def __repr__(self) -> str:
        return f"<Zarr store {self}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return by_value(unseal_store), (seal((self.path, self.storage_options, self.read_only)),)

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return "meshcompute.SiteStore", self.sites, self.path

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = SiteCall(function, self.path, self.storage_options, *args, **kwargs)
        return call_at("to_zarr", self.sites, call, self.path)

    # What Zarr asks for

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Read a value, see :meth:`zarr.abc.store.Store.get`."""
        await self._ensure_open()
        prototype = prototype or default_buffer_prototype()
        known = self.changes.known
        if key not in known and not self.changes.is_gone(key):
            value = await asyncio.to_thread(self._call, read_store, key)
            if value is not None:
                known.setdefault(key, prototype.buffer.from_bytes(value))
        return await MemoryStore(known).get(key, prototype, byte_range)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Read parts of values, see :meth:`zarr.abc.store.Store.get_partial_values`."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        """Tell whether there is a value, see :meth:`zarr.abc.store.Store.exists`."""
        return await self.get(key) is not None

    async def set(self, key: str, value: Buffer) -> None:
        """Write a value, see :meth:`zarr.abc.store.Store.set`."""
        await self._ensure_open()
        self._check_writable()
        data = value.to_bytes()
        self.changes.set(key, data)
        if self.changes.nbytes > _FLUSH_NBYTES:
            await asyncio.to_thread(self.flush)

    async def delete(self, key: str) -> None:
        """Remove a value, see :meth:`zarr.abc.store.Store.delete`."""
        await self._ensure_open()
        self._check_writable()
        self.changes.delete(key)

    async def delete_dir(self, prefix: str) -> None:
        """Remove everything below a prefix, see :meth:`zarr.abc.store.Store.delete_dir`."""
        await self._ensure_open()
        self._check_writable()
        self.changes.delete_dir(prefix)

    async def list(self) -> AsyncIterator[str]:
        """List all keys, see :meth:`zarr.abc.store.Store.list`."""
        for key in await self._list("", direct=False):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """List the keys below a prefix, see :meth:`zarr.abc.store.Store.list_prefix`."""
        for key in await self._list(prefix, direct=False):
            yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """List what is directly below a prefix, see :meth:`zarr.abc.store.Store.list_dir`."""
        for key in await self._list(prefix, direct=True):
            yield key

    async def _list(self, prefix: str, *, direct: bool) -> Any:
        if self.changes.is_gone(prefix):
            memory = MemoryStore(self.changes.known)
            found = memory.list_dir(prefix) if direct else memory.list_prefix(prefix)
            return [key async for key in found]
        await asyncio.to_thread(self.flush)
        return await asyncio.to_thread(self._call, list_store, prefix, direct=direct)


class _Changes:
    """What a client has changed in a store, and what it knows of the store thereby.

    Notes
    -----
    ``known``: values that are there. ``deleted``: keys that are not. ``gone``: prefixes below which there is nothing
    but what is known. ``steps``: what the site has not been told yet.
    """

    def __init__(self) -> None:
        self.is_probed = False
        self.known: dict[str, Buffer] = {}
        self.deleted: set[str] = set()
        self.gone: list[str] = []
        self.steps: list[tuple[str, str, bytes | None]] = []
        self.nbytes = 0

    def is_gone(self, key: str) -> bool:
        """Tell whether the site has nothing at or below a key that is not known here."""
        if key in self.deleted:
            return True
        key = key.rstrip("/")
        return any(prefix in ("", key) or key.startswith(f"{prefix}/") for prefix in self.gone)

    def set(self, key: str, data: bytes) -> None:
        self.known[key] = default_buffer_prototype().buffer.from_bytes(data)
        self.steps.append(("set", key, data))
        self.nbytes += len(data)

    def delete(self, key: str) -> None:
        self.known.pop(key, None)
        self.deleted.add(key)
        self.steps.append(("delete", key, None))

    def delete_dir(self, prefix: str) -> None:
        prefix = prefix.rstrip("/")
        for key in [key for key in self.known if prefix == "" or key.startswith(prefix + "/")]:
            del self.known[key]
        self.gone.append(prefix)
        self.steps.append(("delete_dir", prefix, None))
