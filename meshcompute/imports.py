"""Do something to a module when it is imported, without importing it.

Covers waiting for modules that the user may never load: importing them just to hook them would cost seconds.
Does not cover any hook itself.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

__all__ = ["when_imported"]

Hook = Callable[[ModuleType], None]


def when_imported(name: str, hook: Hook) -> None:
    """Call a hook with a module, now if it is loaded, else as soon as it is.

    Parameters
    ----------
    name
        Full name of the module.
    hook
        What to do with it. Called again by every call for a module that is loaded, so it has to be idempotent.
    """
    if name in sys.modules:
        # Another thread may be in the middle of importing it: this waits.
        hook(importlib.import_module(name))
        return
    watcher = next((finder for finder in sys.meta_path if isinstance(finder, _Watcher)), None)
    if watcher is None:
        watcher = _Watcher()
        sys.meta_path.insert(0, watcher)
    watcher.hooks[name] = hook


class _Watcher(importlib.abc.MetaPathFinder):
    """Hook modules as they are imported first, then leave."""

    def __init__(self) -> None:
        self.hooks: dict[str, Hook] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.hooks:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(fullname, path, target)) is not None:
                self._hook_after(spec)
                return spec
        return None

    def _hook_after(self, spec: importlib.machinery.ModuleSpec) -> None:
        loader: Any = spec.loader  # made for this import alone
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if hook := self.hooks.pop(module.__name__, None):
                hook(module)
            if not self.hooks and self in sys.meta_path:
                sys.meta_path.remove(self)

        loader.exec_module = exec_module
