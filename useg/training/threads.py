"""The number of threads of a run with a time limit: as many as other programs leave cores free.

Threads that compute a layer together wait for each other. Where other programs want the same cores,
one of them is always late: with ten other busy processes on two cores, two threads took 0.2 steps
of EfficientNet-Lite0 in a second (0.7 if waiting threads sleep), and one thread took 1.4.

Sums depend on the number of threads in their last bits, so each change is stored in ``run.toml``
(``train.thread_changes``), and the run can be repeated exactly.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import torch

from useg.distributed import is_distributed
from useg.errors import format_count
from useg.machine import count_cores

# Other programs that use less than this share of a core take no thread away. A program that wants a
# whole core gets at least two thirds of one, while this run has two threads on two cores.
MIN_TAKEN_SHARE = 0.5

# A thread comes back if other programs leave its core idle, except for this share.
MAX_IDLE_SHARE = 0.25

# The use of the cores is measured after this many seconds, and at first for this long.
WATCH_SECONDS = 1.0
FIRST_WATCH_SECONDS = 0.1


class OtherPrograms:
    """How many cores other programs use, from one measurement to the next."""

    def __init__(self) -> None:
        self._last = _read_processor_seconds()

    def cores(self) -> float | None:
        """Return how many cores they have used since the last call; None where that is unknown.

        Linux counts in hundredths of a second, so less than a tenth of a second says little.
        """
        last, self._last = self._last, _read_processor_seconds()
        if not last or not self._last:
            return None
        seconds, busy, own = (now - before for now, before in zip(self._last, last, strict=True))
        return max(0.0, busy - own) / max(1e-9, seconds)


def _read_processor_seconds() -> tuple[float, float, float] | None:
    """Return seconds now: of the clock, of the busy cores, and of this process on them.

    Those of processes that it has started count as its own when they have ended.
    """
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        allowed = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        rows = [line.split() for line in lines if line.partition(" ")[0] in allowed]
        # user, nice, system, idle, iowait, irq, softirq, steal
        ticks = sum(int(row[k]) for row in rows for k in (1, 2, 3, 6, 7, 8))
    except (OSError, ValueError, IndexError, AttributeError):
        # Not Linux.
        return None
    children = os.times()[2:4]
    own = time.process_time() + sum(children)
    return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), own


def fitting_threads(threads: int, most: int, cores: int, others: float) -> int:
    """Return how many threads to use.

    Args:
        threads: The present number.
        most: The largest number.
        cores: How many cores this process may use.
        others: How many of them other programs use.
    """
    fewer = math.floor(cores - others + MIN_TAKEN_SHARE)
    more = math.floor(cores - others + MAX_IDLE_SHARE)
    return max(1, min(most, fewer if fewer < threads else max(threads, more)))


class ThreadControl:
    """Changes the number of threads of a run with a time limit, or repeats its changes.

    Args:
        changes: ``(step, threads)`` for each change: the number of threads after that step.
    """

    def __init__(self, changes: tuple[tuple[int, int], ...] = ()) -> None:
        self.changes = changes
        self._most = torch.get_num_threads()
        self._programs, self._others = OtherPrograms(), 0.0
        self._watched = time.monotonic()

    def apply_changes_until(self, step: int) -> None:
        """Set the number of threads of the step after this one."""
        if earlier := [threads for changed, threads in self.changes if changed <= step]:
            torch.set_num_threads(earlier[-1])

    def begin(self) -> bool:
        """Decide before the first step; return whether the number of threads changes."""
        if not self._may_change():
            return False
        self.restart()
        time.sleep(FIRST_WATCH_SECONDS)
        return self._adapt(0)

    def restart(self) -> None:
        """Forget what has happened so far, such as preparations with processes of their own."""
        self._programs.cores()
        self._watched = time.monotonic()

    def adapt(self, step: int) -> bool:
        """Decide after a step, if it is time to; return whether the number of threads changes."""
        is_due = time.monotonic() - self._watched >= WATCH_SECONDS
        return is_due and self._may_change() and self._adapt(step)

    def describe(self) -> str:
        """Say why the number of threads has changed."""
        cores = count_cores() or 1
        return (
            f"other programs use {min(self._others, cores):.1f} of {format_count(cores, 'core')}: "
            f"training uses {format_count(torch.get_num_threads(), 'thread')}"
        )

    def _may_change(self) -> bool:
        """Return whether there are several threads, and torchrun has not divided them."""
        return self._most > 1 and not is_distributed()

    def _adapt(self, step: int) -> bool:
        self._watched = time.monotonic()
        others, threads = self._programs.cores(), torch.get_num_threads()
        if others is None:
            return False
        self._others = others
        fitting = fitting_threads(threads, self._most, count_cores() or 1, others)
        if fitting == threads:
            return False
        self.changes = (*self.changes, (step, fitting))
        self.apply_changes_until(step)
        return True
