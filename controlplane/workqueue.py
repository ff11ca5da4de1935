"""A queue of keys to look at, each at most once and never twice at the same time; pure.

Covers order, delays and failures. Time is an argument. This is what makes a level-triggered loop cheap: a hundred
reasons to look at a cluster are one look.
"""

from __future__ import annotations

from controlplane.reconcile import retry_seconds

__all__ = ["WorkQueue"]


class WorkQueue:
    """Keys with the time from which each is due.

    Notes
    -----
    A key that is added while it is worked on is due again afterwards. A failure delays the key, more each time, but
    whoever adds it anew gets it at once: there is news, and the news may be the cure.
    """

    def __init__(self) -> None:
        self._due: dict[str, float] = {}
        self._busy: set[str] = set()
        self._failures: dict[str, int] = {}

    def add(self, key: str, due: float) -> None:
        """Ask for a look at a key, at a time or earlier."""
        self._due[key] = min(due, self._due.get(key, due))

    def take_due(self, now: float) -> list[str]:
        """Take all keys that are due and that nobody works on; each must be given back with :meth:`done`."""
        ready = sorted(
            (key for key, due in self._due.items() if due <= now and key not in self._busy),
            key=lambda key: (self._due[key], key),
        )
        for key in ready:
            del self._due[key]
            self._busy.add(key)
        return ready

    def done(self, key: str, *, again: float | None, has_failed: bool = False, now: float = 0.0) -> None:
        """Give a key back, with the time of the next look; after a failure the delay decides."""
        self._busy.discard(key)
        if has_failed:
            self._failures[key] = self._failures.get(key, 0) + 1
            self.add(key, now + retry_seconds(self._failures[key]))
            return
        self._failures.pop(key, None)
        if again is not None:
            self.add(key, again)

    def next_due(self) -> float | None:
        """When the next key that nobody works on is due."""
        return min((due for key, due in self._due.items() if key not in self._busy), default=None)
