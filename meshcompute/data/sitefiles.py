"""The files of a site, as an fsspec file system, for a client that cannot see them.

Covers listing, searching and reading; every call is made by a worker of the site. Does not cover writing files
(:mod:`meshcompute.data.writing` writes datasets) or lazy data (:mod:`meshcompute.data.opening`).
"""

from __future__ import annotations

import re
from typing import Any

from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from meshcompute.data.sitecalls import Site, call_at, names_of_site
from meshcompute.data.siteside import SiteCall, call_file_system

__all__ = ["SiteFileSystem", "filesystem"]

# Each block is a task and a message: large enough that a WAN's round trip does not count, small enough for a header.
_BLOCK_NBYTES = 4 * 2**20

_PROTOCOL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")


def filesystem(site: Site, protocol: str = "file", **storage_options: Any) -> SiteFileSystem:
    """Return the file system of a site.

    Parameters
    ----------
    site
        Name of the pool whose workers can see the files; several names if each of them has the same ones.
    protocol
        What kind of file system the workers open, as fsspec calls it: ``"file"``, ``"s3"``...
    **storage_options
        Its options, as of ``fsspec.filesystem``. They go to the site and into no message.

    Returns
    -------
    SiteFileSystem
        A file system for reading: ``ls``, ``glob``, ``find``, ``walk``, ``info``, ``exists``, ``open``, ``cat``...

    Raises
    ------
    PoolNameError
        No pool can have this name.

    Notes
    -----
    Nothing is asked before the first call, which raises NoClientError, PoolsMissingError or UnknownPoolError like
    :func:`meshcompute.open_dataset`, and what the file system at the site raises, with a note that names the site.

    Examples
    --------
    >>> filesystem("ecmwf").glob("/data/ecmwf/*.nc")  # doctest: +SKIP
    """
    return SiteFileSystem(names_of_site(site), protocol, **storage_options)


class SiteFileSystem(AbstractFileSystem):
    """A file system that lies at a site.

    Parameters
    ----------
    sites
        Names of pools; a worker of any of them is asked.
    target_protocol
        Kind of file system there.
    **storage_options
        Its options.
    """

    protocol = "site"
    cachable = False  # instances would keep credentials in memory for the life of the process
    async_impl = False

    def __init__(self, sites: tuple[str, ...], target_protocol: str = "file", **storage_options: Any) -> None:
        super().__init__()
        self.sites = sites
        self.target_protocol = target_protocol
        self._options = storage_options

    def __repr__(self) -> str:
        return f"<{self.target_protocol} file system at {' or '.join(self.sites)}>"

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(item) for item in path]
        path = _PROTOCOL.sub("", str(path))
        return path.rstrip("/") or path[:1]

    def unstrip_protocol(self, name: str) -> str:
        """Return the address that the site's workers know a path by."""
        return f"{self.target_protocol}://{self._strip_protocol(name)}"

    def _call(self, method: str, path: Any, *args: Any, **kwargs: Any) -> Any:
        call = SiteCall(
            call_file_system, self.target_protocol, self._options, method, (self._strip_protocol(path), *args), kwargs
        )
        return call_at("filesystem", self.sites, call, f"{method} of {path}")

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        """List a folder, as :meth:`fsspec.spec.AbstractFileSystem.ls`."""
        return self._call("ls", path, detail=detail, **kwargs)

    def info(self, path: str, **kwargs: Any) -> Any:
        """Describe a file or folder, as :meth:`fsspec.spec.AbstractFileSystem.info`."""
        return self._call("info", path, **kwargs)

    def exists(self, path: str, **kwargs: Any) -> bool:
        """Tell whether there is such a file or folder, as :meth:`fsspec.spec.AbstractFileSystem.exists`."""
        # fsspec's own takes every error for "no", a site that is unknown or gone included.
        return bool(self._call("exists", path, **kwargs))

    def glob(self, path: str, maxdepth: int | None = None, **kwargs: Any) -> Any:
        """Find paths by pattern, as :meth:`fsspec.spec.AbstractFileSystem.glob`, in one call."""
        return self._call("glob", path, maxdepth=maxdepth, **kwargs)

    def find(
        self, path: str, maxdepth: int | None = None, withdirs: bool = False, detail: bool = False, **kwargs: Any
    ) -> Any:
        """List everything below a folder, as :meth:`fsspec.spec.AbstractFileSystem.find`, in one call."""
        return self._call("find", path, maxdepth=maxdepth, withdirs=withdirs, detail=detail, **kwargs)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> Any:
        """Read a file or a range of it, as :meth:`fsspec.spec.AbstractFileSystem.cat_file`."""
        return self._call("cat_file", path, start=start, end=end, **kwargs)

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | str | None = None,
        autocommit: bool = True,
        cache_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        if mode != "rb":
            raise NotImplementedError(
                f"Files at a site are opened for reading only, not with mode {mode!r}. Datasets are written there by "
                "`with pool(site): dataset.to_zarr(path)`."
            )
        block_nbytes = _BLOCK_NBYTES if block_size in (None, "default") else block_size
        return _SiteFile(self, path, mode, block_nbytes, autocommit, cache_options=cache_options, **kwargs)


class _SiteFile(AbstractBufferedFile):
    """A file at a site, read in blocks."""

    def _fetch_range(self, start: int, end: int) -> Any:
        return self.fs.cat_file(self.path, start, end)
