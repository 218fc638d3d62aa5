"""A function and many things -> its results in their order, computed on all cores, or one ahead of whoever takes them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_parallel(function: Callable[[T], R], things: Iterable[T], threads: int | None = None) -> Iterator[R]:
    """Yield ``function(thing)`` for each of them, computed by as many threads as there are cores, or as asked for.

    ``ThreadPoolExecutor.map`` starts them all at once: its results pile up in memory when they are taken more slowly than they are made.
    """
    threads = threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for thing in things:
                waiting.append(pool.submit(function, thing))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # whoever was interrupted does not wait for what has not begun
            for future in waiting:
                future.cancel()


def ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield items, each of which was made while the one before it was used."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item  # type: ignore[misc]
