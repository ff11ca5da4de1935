"""Python's collector of cyclic garbage, kept off while a graph is planned and taken in.

Covers one block, :func:`uncollected`, and the way to ask for it from inside. Does not cover what is planned in it
(:mod:`meshcompute.planning`).

Notes
-----
A graph of a hundred thousand tasks is some two million objects that stay. While they are made, the collector looks at
all objects of the process again and again, with every growth by a quarter, and finds nothing: half of the time that
making them takes, and each look holds the interpreter's lock, and with it a scheduler's event loop, for up to a second.
"""

from __future__ import annotations

import contextlib
import contextvars
import gc
import sys
import threading
from collections.abc import Iterator

__all__ = ["ask_uncollected", "uncollected", "uncollected_if_asked"]

# Fewer new objects than that are left to the collector as they are: milliseconds.
_MANY = 50_000

_lock = threading.Lock()
_n_open = 0
_was_enabled = False
_n_unsearched = 0  # objects that were called old without a search
_n_full_searches = 0  # of the process, when they were last counted


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Make many objects that stay, without having them searched for garbage meanwhile.

    Notes
    -----
    The collector is one for the whole process: garbage of other threads waits for the end of the block, too, unless it
    is freed by its reference counts, as nearly all is. Blocks of several threads may overlap; the last one to end turns
    the collector on again, if it was on.

    If many objects were made, they are then counted among the old ones, by a freeze and a thaw, as mypy does after it
    has read its cache (``mypy/build.py``): as young ones, all would be searched at once. A freeze also sets back what
    the collector counts to decide when it searches the old ones, so that this has to see to it: at the latest when as
    many objects were called old as there are, the next block begins with a full search.
    """
    global _n_open, _was_enabled, _n_unsearched, _n_full_searches  # noqa: PLW0603 - the collector is the process's
    with _lock:
        if _n_open == 0:
            _was_enabled = gc.isenabled()
            if (n := gc.get_stats()[-1]["collections"]) != _n_full_searches:
                _n_full_searches, _n_unsearched = n, 0
            if _was_enabled and _n_unsearched > sys.getallocatedblocks():
                gc.collect()
            gc.disable()
        _n_open += 1
    try:
        yield
    finally:
        with _lock:
            _n_open -= 1
            if _n_open == 0 and _was_enabled:
                n_made = gc.get_count()[0]
                if n_made > _MANY and not gc.get_freeze_count():  # what somebody else has frozen stays so
                    gc.freeze()
                    gc.unfreeze()
                    _n_unsearched += n_made
                gc.enable()


_asked: contextvars.ContextVar[contextlib.ExitStack | None] = contextvars.ContextVar("_asked", default=None)


@contextlib.contextmanager
def uncollected_if_asked() -> Iterator[None]:
    """Do the same from the call of :func:`ask_uncollected` in this block, or coroutine, to its end."""
    with contextlib.ExitStack() as stack:
        token = _asked.set(stack)
        try:
            yield
        finally:
            _asked.reset(token)


def ask_uncollected() -> None:
    """Ask the block around for it; once. Outside of any, nothing happens."""
    if (stack := _asked.get()) is not None:
        _asked.set(None)
        stack.enter_context(uncollected())
