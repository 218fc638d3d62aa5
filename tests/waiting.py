"""Wait for what a test expects: a fixed pause would be too short for a slow or busy machine."""

from __future__ import annotations

import time
from collections.abc import Callable


def eventually(true: Callable[[], object], seconds: float = 60) -> None:
    """Wait until it is true, at most a minute; on an idle machine this takes milliseconds."""
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.01)
