"""Arrays of the benchmark of placement, which only the workers of their own site can read.

Covers values that are made up when they are read: any part of an array can be had, and nothing lies on a disk.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import dask.array as da
import numpy as np


class Field:
    """An array that only the workers of its sites can read, by parts, as arrays in files are read.

    Parameters
    ----------
    sites
        Where it is; nowhere in particular if empty. A process that is no worker of a site may read it too.
    shape
        Shape.
    dtype
        Type of its values.
    seed
        What sets its values apart from those of another one.
    start
        Where on the first axis this part begins: parts of one series make up the whole.
    """

    def __init__(
        self, sites: Sequence[str], shape: tuple[int, ...], *, dtype: str = "f8", seed: int = 0, start: int = 0
    ) -> None:
        self.sites = tuple(sites)
        self.shape = shape
        self.ndim = len(shape)
        self.dtype = np.dtype(dtype)
        self.seed = seed
        self.start = start

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return ("Field", self.sites, self.shape, str(self.dtype), self.seed, self.start)

    def __getitem__(self, index: Any) -> np.ndarray:
        check_site(self.sites)
        index = index if isinstance(index, tuple) else (index,)
        axes = [np.arange(n, dtype="f8") for n in self.shape]
        axes[0] += self.start
        index = (*index, *[slice(None)] * (self.ndim - len(index)))
        kept = [axis[i] for axis, i in zip(axes, index, strict=True)]
        total = np.zeros([len(axis) for axis in kept if axis.ndim])
        dim = 0
        for number, axis in enumerate(kept):
            wave = np.cos((number + 1.7) * 0.37 * axis + self.seed) + 0.01 * axis
            if axis.ndim:
                wave = wave.reshape([-1 if i == dim else 1 for i in range(total.ndim)])
                dim += 1
            total = total * wave + wave
        return total.astype(self.dtype)

    def array(self, chunks: Any) -> da.Array:
        """Make a Dask array of it."""
        return da.from_array(self, chunks=chunks, meta=np.empty((0,) * self.ndim, self.dtype), asarray=False)


def check_site(sites: Sequence[str]) -> None:
    """Raise FileNotFoundError on a worker of a site that the data is not at."""
    here = os.environ.get("POOL_NAME")  # of the workers of an embedded mesh
    if sites and here is not None and here not in sites:
        raise FileNotFoundError(f"The data is at {', '.join(sites)}, and this is a worker of {here}")
