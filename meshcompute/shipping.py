"""Objects that reach schedulers and workers that do not have meshcompute.

Covers pickling by value: :func:`by_value` for one function or instance, :class:`Shipment` for an object of ours
together with the sources of the modules that it needs. Does not cover when something is sent.

Notes
-----
``cloudpickle.register_pickle_by_value`` alone is not enough: Dask compares an object's exact module before it
asks cloudpickle. An object whose ``__reduce__`` names ``pickle.loads`` and bytes made by cloudpickle works
inside anything.
"""

from __future__ import annotations

import functools
import pickle
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cloudpickle
from distributed.protocol import pickle as distributed_pickle

import meshcompute

__all__ = ["Shipment", "by_value", "by_value_once"]

#: What a scheduler needs of us. Nothing here imports more than Dask does.
SCHEDULER_MODULES = (
    "errors",
    "settings",
    "imports",
    "collecting",
    "pools",
    "placement.objective",
    "placement.localsearch",
    "placement.hypergraph",
    "placement.heuristics",
    "placement.balancing",
    "placement.core",
    "placement.contraction",
    "placement.mincut",
    "placement.bisection",
    "placement.multiway",
    "placement.exact",
    "placement.placing",
    "graphs.associativegroups",
    "graphs.tablesizes",
    "graphs.sizes",
    "graphs.learning",
    "links",
    "graphs.sovereignty",
    "scheduler.adapting",
    "graphs.pinnedtasks",
    "graphs.taskgraph",
    "graphs.numbering",
    "graphs.associative",
    "graphs.associativetables",
    "graphs.reductionsteps",
    "graphs.reductiontrees",
    "graphs.regrouping",
    "graphs.pinnedframes",
    "graphs.frames",
    "scheduler.queues",
    "scheduler.extensions",
    "scheduler.internals",
    "scheduler.links",
    "scheduler.borders",
    "scheduler.replacing",
    "scheduler.state",
    "scheduler.guard",
    "scheduler.live",
    "packing",
    "packedtransfers",
    "planning",
    "shipping",
    "scheduler.packing",
    "clients",
)


class by_value:  # noqa: N801 - reads as what it does
    """Wrap a function or instance so that it unpickles where its module is not installed.

    Parameters
    ----------
    obj
        Anything that cloudpickle can pickle. What comes out of unpickling is the object itself.
    modules
        Names of further modules of ours that it refers to.
    """

    def __init__(self, obj: Any, modules: Iterable[str] = ()) -> None:
        self.obj = obj
        self.modules = tuple(modules)

    def __reduce__(self) -> tuple[Any, ...]:
        kind = self.obj if hasattr(self.obj, "__module__") else type(self.obj)
        names = {getattr(kind, "__module__", type(self.obj).__module__), *self.modules}
        registered = []
        for name in names:
            if name.partition(".")[0] != meshcompute.__name__:
                continue
            module = sys.modules[name]
            if module.__name__ not in cloudpickle.list_registry_pickle_by_value():
                cloudpickle.register_pickle_by_value(module)
                registered.append(module)
        try:
            return pickle.loads, (cloudpickle.dumps(self.obj),)
        finally:
            for module in registered:
                cloudpickle.unregister_pickle_by_value(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.obj(*args, **kwargs)


class by_value_once(by_value):  # noqa: N801 - reads as what it does
    """The same for what never changes: pickled once per process, not each time."""

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reduced

    @functools.cached_property
    def _reduced(self) -> tuple[Any, ...]:
        return super().__reduce__()


class Shipment:
    """An object of ours on its way to a scheduler that may not have meshcompute.

    Parameters
    ----------
    content
        What should come out at the other end.
    with_sources
        Send the sources of :data:`SCHEDULER_MODULES` along, for a scheduler where they are not installed.
        False where they have been sent before.

    Notes
    -----
    The content is pickled on its own, so that it is read only after its classes can be imported; large buffers
    stay out of band. If it cannot be read, what comes out is an object that fails with the reason as soon as
    Dask asks it for its tasks, so that the reason reaches the user's future.
    """

    def __init__(self, content: Any, *, with_sources: bool) -> None:
        self.content = content
        self.with_sources = with_sources
        self._frames: tuple[bytes, list[pickle.PickleBuffer]] | None = None

    def pack(self) -> tuple[bytes, list[pickle.PickleBuffer]]:
        """Pickle the content, once.

        Raises
        ------
        TypeError
            It holds something that cannot be pickled.
        """
        if self._frames is None:
            buffers: list[pickle.PickleBuffer] = []
            try:
                self._frames = distributed_pickle.dumps(self.content, buffer_callback=buffers.append), buffers
            except Exception as exc:
                raise TypeError(
                    f"This work cannot be sent to the scheduler: {exc}. Something that its functions use or are given "
                    "(a lock, an open file, a connection) cannot be pickled: make it inside the function."
                ) from exc
        return self._frames

    def __reduce__(self) -> tuple[Any, ...]:
        payload, buffers = self.pack()
        sources = _sources() if self.with_sources else None
        return _RECEIVE, (meshcompute.__version__, sources, payload, *buffers)


@functools.cache
def _sources() -> dict[str, str]:
    folder = Path(meshcompute.__file__).parent
    packages = {"", *(f".{name.rpartition('.')[0]}" for name in SCHEDULER_MODULES if "." in name)}
    paths = {f"meshcompute{name}": folder / name[1:] / "__init__.py" for name in packages}
    paths |= {f"meshcompute.{name}": folder / f"{name.replace('.', '/')}.py" for name in SCHEDULER_MODULES}
    return {name: path.read_text(encoding="utf-8") for name, path in paths.items()}


def _receive(version: str, sources: dict[str, str] | None, payload: Any, *buffers: Any) -> Any:
    # Runs on the scheduler and travels by value: everything it uses is imported in here.
    import importlib.abc
    import importlib.machinery
    import importlib.util
    import sys

    from distributed.protocol.pickle import loads

    class Sources(importlib.abc.MetaPathFinder, importlib.abc.Loader):
        """Import the modules that came along; nothing is written to disk."""

        def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
            if sources is None or fullname not in sources:
                return None
            is_package = any(name.startswith(f"{fullname}.") for name in sources)
            return importlib.machinery.ModuleSpec(fullname, self, origin="shipped", is_package=is_package)

        def exec_module(self, module: Any) -> None:
            assert sources is not None
            code = compile(sources[module.__name__], f"<shipped {module.__name__}>", "exec")
            exec(code, module.__dict__)  # noqa: S102 - a client may run any code on its scheduler anyway

    class Refused:
        """Stands in for what could not be read: fails with the reason where Dask asks for tasks."""

        def __init__(self, reason: Exception) -> None:
            self.reason = reason

        def __dask_graph__(self) -> Any:
            raise self.reason

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            raise self.reason

    try:
        try:
            import meshcompute
        except ModuleNotFoundError as exc:
            if exc.name != "meshcompute":
                raise
            if sources is None:
                return Refused(
                    RuntimeError(
                        "The scheduler was started again and has lost meshcompute, which this client had sent it. "
                        "Connect a new Client and compute again."
                    )
                )
            sys.meta_path.append(Sources())
            import meshcompute
        if meshcompute.__version__ != version:
            from meshcompute.errors import VersionMismatchError

            return Refused(VersionMismatchError(version, meshcompute.__version__))
        return loads(payload, buffers=buffers)
    except Exception as exc:
        return Refused(exc)


_RECEIVE = by_value_once(_receive)
