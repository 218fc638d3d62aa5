"""Say what a job spends its time on: its phases, and the lines at which its threads are found."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from record import ROOT

PACKAGE = ROOT / "useg"
INTERVAL_SECONDS = 0.02
NUM_LINES = 15


class StackSampler:
    """Looks at the stacks of all threads many times a second, from a thread of its own.

    ``with StackSampler(phases) as sampler: ...`` and then ``sampler.found()``.

    Args:
        phases: Names of functions. The phase of a moment is the chain of those that the main thread
            is in.
        quiet: Phases whose lines are not counted.
    """

    def __init__(self, phases: Iterable[str], quiet: Iterable[str] = ()) -> None:
        self.phases, self.quiet = set(phases), set(quiet)
        self.seconds: Counter[str] = Counter()
        self.lines: Counter[str] = Counter()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> StackSampler:
        self.thread.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self.ended.set()
        self.thread.join()

    def found(self) -> dict[str, Any]:
        """Return seconds of the phases, and of the most frequent lines (of any thread)."""
        return {
            "phases": {name: round(taken, 2) for name, taken in self.seconds.most_common()},
            "lines": {name: round(taken, 2) for name, taken in self.lines.most_common(NUM_LINES)},
        }

    def _sample(self) -> None:
        main, own = threading.main_thread().ident, threading.get_ident()
        last = time.perf_counter()
        while not self.ended.wait(INTERVAL_SECONDS):
            frames = sys._current_frames()
            # A thread that holds the interpreter keeps this one waiting.
            now = time.perf_counter()
            taken, last = now - last, now
            called = [frame.f_code.co_name for frame in callers(frames.get(main))]
            chain = [name for name in reversed(called) if name in self.phases]
            self.seconds[" > ".join(dict.fromkeys(chain)) or "other"] += taken
            if self.quiet & set(chain):
                continue
            found = {describe(frame) for thread, frame in frames.items() if thread != own}
            self.lines.update(dict.fromkeys(found - {""}, taken))


def callers(frame: FrameType | None) -> list[FrameType]:
    """Return a frame and those that called it."""
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def describe(frame: FrameType) -> str:
    """Name the innermost line of useg of a stack, and the function that it waits for; or ``""``."""
    for each in callers(frame):
        path = Path(each.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            place = f"{path.relative_to(PACKAGE)}:{each.f_lineno} {each.f_code.co_name}"
            return place if each is frame else f"{place}, in {frame.f_code.co_name}"
    return ""
