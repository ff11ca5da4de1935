"""Waiting for states, as tests do it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

LOOK_SECONDS = 0.05


def wait_until(is_so: Callable[[], Any], what: str, seconds: float = 30.0) -> Any:
    """Wait until something is true, and give it; after so many seconds it is a failure that says what is missing."""
    deadline = time.monotonic() + seconds
    while not (found := is_so()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(LOOK_SECONDS)
    return found


class Lines:
    """What a process writes, line by line, as it comes.

    Parameters
    ----------
    pipe
        Where it writes to.
    """

    def __init__(self, pipe: IO[str]) -> None:
        self.lines: list[str] = []
        self._pipe = pipe
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._pipe:
            self.lines.append(line.rstrip("\n"))

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self.lines))

    def wait_until(self, is_so: Callable[[], Any], what: str, seconds: float) -> Any:
        """Wait until what was written makes something true, and give it; the end without is a failure."""

        def look() -> Any:
            has_ended = not self._reader.is_alive()  # asked first: what came last counts
            found = is_so()
            assert found or not has_ended, f"it ended without {what}:\n" + "\n".join(self.lines)
            return found

        return wait_until(look, what, seconds)

    def close(self, seconds: float) -> None:
        """Read what is left of a process that has ended."""
        self._reader.join(seconds)
        self._pipe.close()
