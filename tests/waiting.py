"""Waiting for states, as tests do it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

LOOK_SECONDS = 0.05


def wait_until(is_so: Callable[[], Any], what: str, seconds: float = 30.0) -> Any:
    """Wait until something is true, and give it; after so many seconds it is a failure that says what is missing."""
    deadline = time.monotonic() + seconds
    while not (found := is_so()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(LOOK_SECONDS)
    return found
