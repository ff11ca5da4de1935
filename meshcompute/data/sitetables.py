"""What runs on the workers of a site when a table there is opened and its pieces are read.

Covers Parquet. Travels by value, see :mod:`meshcompute.data.siteside`. Does not cover what the client makes of it
(:mod:`meshcompute.data.tables`).
"""

from __future__ import annotations

import socket
from typing import Any

from meshcompute.data.siteside import portable, seal, unseal

__all__ = ["TableReader", "describe_table"]

# Of so many pieces the footers are read, here at the site; the rest is taken to be like them.
_MOST_FOOTERS = 200
_OFFSET_NBYTES = 4  # what pandas adds to the length that Parquet writes before a text: an offset of 8 bytes, not 4
_OBJECT_NBYTES = 53  # what Python adds instead: a pointer of 8 bytes and a str's header of 49 (sys.getsizeof)


def _row_counts(fragments: list[Any]) -> list[int]:
    """Count the rows of pieces: by their footers, and beyond the first ones by the mean of those."""
    counts = [sum(group.num_rows for group in fragment.row_groups) for fragment in fragments[:_MOST_FOOTERS]]
    return counts + [sum(counts) // len(counts)] * (len(fragments) - len(counts))


def _row_nbytes(fragment: Any, meta: Any) -> dict[str, float]:
    """Tell how many bytes of memory one row of each column takes, by the dtypes and one piece's footer."""
    written: dict[str, int] = {}
    n_rows = 0
    footer = fragment.metadata
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        n_rows += group.num_rows
        for column in (group.column(i) for i in range(footer.num_columns)):
            name = column.path_in_schema.partition(".")[0]
            written[name] = written.get(name, 0) + column.total_uncompressed_size
    nbytes = {}
    for name, dtype in meta.dtypes.items():
        if dtype.kind in "biufcmM":
            nbytes[str(name)] = float(dtype.itemsize)
        else:
            extra = _OBJECT_NBYTES if str(dtype) == "object" else _OFFSET_NBYTES
            nbytes[str(name)] = written.get(str(name), 0) / max(n_rows, 1) + extra
    return nbytes


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
        ``meta`` (an empty pandas frame), ``pieces`` (each sealed), ``rows`` (of each piece, before filters),
        ``row_nbytes`` (bytes of memory by column) and ``version`` (of the files, as far as they are known).
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
    meta = table.schema.empty_table().to_pandas()
    return {
        "meta": meta,
        "rows": _row_counts(fragments),
        "row_nbytes": _row_nbytes(fragments[0], meta),
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
    row_nbytes
        Bytes of memory that a row takes, by column.
    """

    def __init__(self, label: str, filters: Any, token: str, row_nbytes: dict[str, float]) -> None:
        self.label = label
        self.filters = filters
        self.token = token
        self.row_nbytes = row_nbytes

    def __repr__(self) -> str:
        return f"<read {self.label}>"

    def __dask_tokenize__(self) -> tuple[str, str]:
        return "meshcompute.TableReader", self.token

    def estimated_nbytes(self, piece: tuple[bytes, int], columns: list[str] | None = None) -> float:
        """Tell how many bytes of memory a piece will take, at most: filters leave rows out."""
        names = self.row_nbytes if columns is None else columns
        return piece[1] * sum(self.row_nbytes.get(str(name), 0.0) for name in names)

    def __call__(self, piece: tuple[bytes, int], columns: list[str] | None = None) -> Any:
        import pyarrow.parquet

        try:
            fragment, schema = unseal(piece[0])
            if columns is not None:  # an index is a column of the file
                described = schema.pandas_metadata or {"index_columns": []}
                index = [name for name in described["index_columns"] if isinstance(name, str)]
                columns = [*columns, *(name for name in index if name not in columns)]
            expression = None if self.filters is None else pyarrow.parquet.filters_to_expression(self.filters)
            table = fragment.to_table(schema=schema, columns=columns, filter=expression)
            return table.replace_schema_metadata(schema.metadata).to_pandas()
        except Exception as exc:
            exc.add_note(f"While reading {self.label}, on {socket.gethostname()}.")
            if (error := portable(exc)) is exc:
                raise
        raise error  # here, where it gets no context
