"""One way to compute, as a user's program on the client's host.

Covers the seven ways of ``reference.py``, and what its floor is made of. Does not cover clusters, mounts and what
crosses: the benchmark sees to those.

As a program (``reference_programs.py`` starts it) it says "ready" when the cluster is connected, computes after a line
on standard input, from the opening of the files to the painted picture, says "done", and after another line gives its
result as JSON. Ways 1 to 5 never import meshcompute.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import matplotlib as mpl
import numpy as np
from distributed import Client, wait
from reference_calculations import SITES, calculation
from reference_watch import peak_nbytes, reset_peak, say, start_watching, stop_watching, wait_for_go

mpl.use("Agg")
from matplotlib import pyplot as plt

# Schedulers have no such module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

Work = Callable[[], Any]


class Way:
    """What a way knows: the calculation, where the files are, and where schedulers are.

    Parameters
    ----------
    options
        From the benchmark.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.calculation = calculation(options["calculation"], options["scale"])
        self.addresses: list[str] = options["addresses"]
        self.options = options
        self.told: dict[str, Any] = {}

    def define(self) -> Any:
        """Define the calculation on what this host sees."""
        return self.calculation.define(*map(self.calculation.open, SITES))

    # The ways. Each is a context that gives what is measured; what a user has ready beforehand is outside of it.

    @contextmanager
    def compute_over_mount(self) -> Iterator[Work]:
        """(1) Everything here, the files over a remote mount."""
        with self._local_client():
            yield lambda: self.define().compute()

    @contextmanager
    def copy_then_compute(self) -> Iterator[Work]:
        """(2) Everything here, on copies of the files."""
        top = Path.home() / "data"

        def work() -> Any:
            for site in SITES:
                self.calculation.copy(site, top, self.options["copier"])
            self.told["copied_seconds"] = time.perf_counter() - self.began
            return self.calculation.define(*(self.calculation.open(site, str(top)) for site in SITES)).compute()

        with self._local_client():
            yield work
        shutil.rmtree(top, ignore_errors=True)  # it lies in memory

    @contextmanager
    def one_stock_cluster(self) -> Iterator[Work]:
        """(3) One cluster over both sites, each file mounted at the other site, no pools."""
        with Client(self.addresses[0]):
            yield lambda: self.define().compute()

    @contextmanager
    def a_cluster_per_site(self) -> Iterator[Work]:
        """(4) A cluster at each site; the user brings the parts together."""

        def work() -> Any:
            parts = self.calculation.parts(*map(self.calculation.open, SITES))
            futures = [client.compute(part) for client, part in zip(clients, parts, strict=True)]
            return self.calculation.combine(*(future.result() for future in futures))

        with (
            Client(self.addresses[0], set_as_default=False) as one,
            Client(self.addresses[1], set_as_default=False) as two,
        ):
            clients = one, two
            yield work

    @contextmanager
    def plain_annotations(self) -> Iterator[Work]:
        """(5) Dask's own resources on what loads, and no fusion anywhere, which would lose them."""

        def work() -> Any:
            datasets = []
            for site in SITES:
                with dask.annotate(resources={f"pool-{site}": 1}):
                    datasets.append(self.calculation.open(site))
            return self.calculation.define(*datasets).compute(optimize_graph=False)

        with Client(self.addresses[0]) as client:
            client.run_on_scheduler(_no_fusion)
            yield work

    @contextmanager
    def pools(self) -> Iterator[Work]:
        """(6) Pools; the client sees the files' metadata over a mount."""
        from meshcompute import pool, propagate_pools

        def define() -> Any:
            datasets = []
            for site in SITES:
                with pool(site):
                    datasets.append(self.calculation.open(site))
            return self.calculation.define(*datasets)

        with Client(self.addresses[0]), propagate_pools():
            yield lambda: define().compute()
            self._explain(define())

    @contextmanager
    def pools_without_files(self) -> Iterator[Work]:
        """(7) Pools; the client sees no file."""
        from meshcompute import propagate_pools

        with Client(self.addresses[0]), propagate_pools():
            yield lambda: self._define_remotely().compute()
            self._explain(self._define_remotely())

    # What the floor is made of.

    @contextmanager
    def average_at_its_site(self) -> Iterator[Work]:
        """Read and average at the site, and send nothing anywhere."""
        from meshcompute import pool, propagate_pools

        def work() -> Any:
            with pool(SITES[0]):
                wait(self.calculation.average(self.calculation.open_remotely(SITES[0])).persist())

        with Client(self.addresses[0]), propagate_pools():
            yield work

    @contextmanager
    def one_transfer(self) -> Iterator[Work]:
        """Send bytes that nothing can pack from a worker of one site to a worker of the other."""
        with Client(self.addresses[0]) as client:
            names = {str(w["name"]): a for a, w in client.scheduler_info(n_workers=-1)["workers"].items()}
            first, second = (min(a for name, a in names.items() if name.startswith(site)) for site in SITES)
            n = self.options["nbytes"]
            data = client.submit(np.random.default_rng(1).bytes, n, workers=[first])
            wait(data)
            yield lambda: client.submit(len, data, workers=[second]).result()

    def _define_remotely(self) -> Any:
        return self.calculation.define(*map(self.calculation.open_remotely, SITES))

    def _explain(self, collection: Any) -> None:
        from meshcompute import explain

        plan = explain(collection)
        self.told["predicted"] = {f"{a}>{b}": nbytes for (a, b), nbytes in plan.bytes_between_pools.items()}
        self.told["plan"] = str(plan)

    @contextmanager
    def _local_client(self) -> Iterator[None]:
        with Client(dashboard_address=None, local_directory="/tmp/dask-local") as client:  # noqa: S108 - the lab's own
            client.run(start_watching, has_objects=self.calculation.has_objects)
            yield
            self.told["workers"] = list(client.run(stop_watching).values())

    # Measuring

    def run(self) -> None:
        """Compute when the benchmark says so, and tell what came of it."""
        dask.config.set({"meshcompute.compression": self.options["compression"]})
        if self.calculation.has_objects:
            importlib.import_module("s3fs")  # as everything else, before the time begins
            importlib.import_module("xarray.backends.zarr")
        context = getattr(self, self.options["program"])()
        with context as work:
            reset_peak()
            say("ready")
            wait_for_go()
            self.began = time.perf_counter()
            try:
                result = work()
                if self.options["picture"]:
                    field = self.calculation.field(result)
                    figure, axes = plt.subplots(figsize=(6, 6))
                    axes.imshow(field, origin="lower")
                    figure.savefig(self.options["picture"])
            except Exception as exc:
                self.told["error"] = f"{type(exc).__name__}: {exc}"
            self.told["seconds"] = time.perf_counter() - self.began
            self.told["client_peak_nbytes"] = peak_nbytes()
            say("done")
            wait_for_go()
        if self.options["picture"] and "error" not in self.told:
            np.save(self.options["result"], np.asarray(field))
        self.told["has_meshcompute"] = "meshcompute" in sys.modules
        say(json.dumps(self.told))


def _no_fusion() -> None:
    dask.config.set({"optimization.fuse.active": False})
