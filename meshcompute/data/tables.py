"""Open tables that lie at a site, from a client that cannot see them.

Covers Parquet as dataframes of Dask. Does not cover arrays (:mod:`meshcompute.data.opening`), and needs
``dask.dataframe``, which it imports when it is used.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from dask.tokenize import tokenize

from meshcompute.clients import pool
from meshcompute.data.sitecalls import Site, call_at, names_of_site
from meshcompute.data.siteside import SiteCall
from meshcompute.data.sitetables import TableReader, describe_table
from meshcompute.errors import MissingDependencyError
from meshcompute.shipping import by_value

__all__ = ["open_dataframe"]


def open_dataframe(
    site: Site,
    path: str | os.PathLike[str] | Sequence[str],
    *,
    columns: Sequence[str] | None = None,
    filters: Any = None,
    split_row_groups: bool | int = False,
    storage_options: dict[str, Any] | None = None,
) -> Any:
    """Open a Parquet table that lies at a site.

    Parameters
    ----------
    site
        Name of the pool whose workers can see it; several names if each of them has it at that path.
    path
        A file, a folder, a pattern with ``*``, or several files, as the workers there know them.
    columns
        Names of the columns; all if not given. Those that a computation does not need are not read in any case.
    filters
        Rows to read, as in :func:`pyarrow.parquet.read_table`.
    split_row_groups
        False makes a partition of each file, True of each row group, a number of that many row groups.
    storage_options
        Options of the site's fsspec file system, if the path is an address. They go into no message.

    Returns
    -------
    dask.dataframe.DataFrame
        Lazy, with its loading tasks pinned to the site. Only the schema, the names of files and what they say of
        their rows have been read, by the site.

    Raises
    ------
    MissingDependencyError
        ``dask.dataframe`` is not installed here.
    NoClientError, PoolsMissingError, UnknownPoolError
        As of :func:`meshcompute.open_dataset`.
    Exception
        What opening raised at the site (FileNotFoundError, pyarrow's ArrowInvalid where it is no Parquet file...),
        as it is, with a note that names the site.

    Examples
    --------
    >>> stations = open_dataframe("eumetsat", "/data/eumetsat/stations/*.parquet")  # doctest: +SKIP
    """
    try:
        from dask import dataframe
    except ImportError as exc:
        raise MissingDependencyError("open_dataframe", "dask.dataframe", "pip install 'dask[dataframe]'") from exc
    sites = names_of_site(site)
    where = os.fspath(path) if isinstance(path, str | os.PathLike) else [os.fspath(item) for item in path]
    call = SiteCall(describe_table, where, storage_options, filters, int(split_row_groups))
    description = call_at("open_dataframe", sites, call, str(where))
    token = tokenize(sites, where, description["version"], str(filters), int(split_row_groups))
    reader = TableReader(f"{where} at {' or '.join(sites)}", filters, token, description["row_nbytes"])
    pieces = [(_Piece(piece), rows) for piece, rows in zip(description["pieces"], description["rows"], strict=True)]
    with pool(*sites):
        frame = dataframe.from_map(_ReadTable(reader), pieces, meta=description["meta"], label="read-parquet")
        return frame if columns is None else frame[list(columns)]


class _ReadTable:
    """The function that Dask calls: unpickled anywhere, it is a :class:`meshcompute.data.sitetables.TableReader`."""

    def __init__(self, reader: TableReader) -> None:
        self.reader = reader

    def __repr__(self) -> str:
        return repr(self.reader)

    def estimated_nbytes(self, piece: tuple[bytes, int], columns: list[str] | None = None) -> float:
        return self.reader.estimated_nbytes(piece, columns)

    def __call__(self, piece: tuple[bytes, int], columns: list[str] | None = None) -> Any:
        # Only Dask's synchronous and threaded schedulers come here: they run in this process, which has no file.
        return self.reader(piece, columns)

    def __dask_tokenize__(self) -> Any:
        return self.reader.__dask_tokenize__()

    def __reduce__(self) -> tuple[Any, ...]:
        return by_value(self.reader, ["meshcompute.data.siteside"]).__reduce__()


class _Piece(bytes):
    """A sealed piece of a table. It may hold credentials, so that it is not shown."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "<piece>"

    def __reduce__(self) -> tuple[Any, ...]:
        return bytes, (bytes(self),)

    def __dask_tokenize__(self) -> bytes:
        return bytes(self)
