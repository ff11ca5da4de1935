"""Dask's graphs as meshcompute knows them: pins, sizes, reductions. All that touches Dask's graph internals is here."""
