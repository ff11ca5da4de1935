"""A cluster over two data centres, from its start to its end."""

from __future__ import annotations

import re

from labbench import LabBench

COMPUTE = """
import sys
from distributed import Client
import dask.array as da
from meshcompute import pool, propagate_pools
with Client(sys.argv[1]) as client:
    client.wait_for_workers(8)
    with pool("ecmwf"):
        left = da.ones((1000, 1000), chunks=250)
    with pool("eumetsat"):
        right = da.ones((1000, 1000), chunks=250)
    with propagate_pools():
        print(float((left.mean(axis=0) + right.mean(axis=0)).sum().compute()))
"""


def test_a_cluster_is_started_computes_and_leaves_nothing(bench: LabBench) -> None:
    before = bench.observe()
    with bench.booted() as boot:
        assert re.search(r"ready: 8 workers", boot.said)
        assert bench.python(COMPUTE, boot.address).split()[-1] == "2000.0"
        assert boot.stop() == 0
        assert "everything is taken down" in boot.said
    bench.wait_as(before)
