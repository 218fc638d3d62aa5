"""The queue of images that wait for a thread: first in, first out.

Work for a request that has ended is cancelled. Threads cannot be stopped from outside, so long work
calls :func:`check_cancelled` between its steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from fastapi import Request

from useg.serving.middleware import client_disconnected, service_unavailable
from useg.serving.uploads import Reservation

# The threads of large images have a lower priority by this much, so that they take what the event
# loop, the network and small images leave.
LARGE_NICENESS = 10

# Images of one request that wait in the queue or are in progress at a time.
IMAGES_AT_A_TIME = 4

WorkResult = TypeVar("WorkResult")


class WorkCancelledError(Exception):
    """The request that this work is for has ended."""


class Work(Generic[WorkResult]):
    """A function that a thread calls; ``cancelled`` asks it to stop.

    Args:
        function: the function.
        is_large: whether it works on a large image.
    """

    def __init__(self, function: Callable[[], WorkResult], is_large: bool = False) -> None:
        self.cancelled = False
        self.is_large = is_large
        self._function = function

    def __call__(self) -> WorkResult:
        """Call the function."""
        _thread.work = self
        try:
            check_cancelled()
            return self._function()
        finally:
            _thread.work = None


class _ThreadState(threading.local):
    work: Work[Any] | None = None


_thread = _ThreadState()


def current_work() -> Work[Any] | None:
    """Return the work that this thread runs; None outside a queue."""
    return _thread.work


def check_cancelled() -> None:
    """Stop the work of this thread if its request has ended.

    Raises:
        WorkCancelledError: the client has disconnected, or the deadline has passed.
    """
    if _thread.work is not None and _thread.work.cancelled:
        raise WorkCancelledError


def lower_priority(niceness: int) -> None:
    """Lower the priority of this thread, and of those that it starts.

    Only on Linux does a thread have a priority of its own. Elsewhere this does nothing.
    """
    if niceness and sys.platform == "linux":
        thread = threading.get_native_id()
        # The priority may be the lowest already.
        with contextlib.suppress(OSError):
            os.setpriority(
                os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + niceness
            )


def set_own_threads(count: int) -> None:
    """Set how many threads PyTorch and OpenVINO use, for this thread and those that start later.

    :mod:`useg.machine` says why training limits a thread in another way.
    """
    # At first use in a thread, PyTorch sets the number that another one has set last.
    torch.get_num_threads()
    torch.set_num_threads(count)


def image_threads(count: int, niceness: int = 0) -> ThreadPoolExecutor:
    """Make threads that work on an image each, with a core of its own for PyTorch and OpenVINO."""

    def start() -> None:
        set_own_threads(1)
        lower_priority(niceness)

    return ThreadPoolExecutor(count, "image", start)


@dataclass(frozen=True)
class _QueuedRequest:
    memory: int
    started: asyncio.Future[None]


class RequestQueue:
    """Work waits here for a thread, first come, first served; use it in the event loop only.

    Args:
        threads: maximum number of images in progress at a time.
        memory: maximum bytes that these images take together.
        waiting: maximum number of images that wait.
        is_large: whether it is for large images; their threads have a lower priority.
    """

    def __init__(self, threads: int, memory: int, waiting: int, is_large: bool = False) -> None:
        self.pool = image_threads(threads, LARGE_NICENESS if is_large else 0)
        self._is_large = is_large
        self.running = 0
        self.memory = memory
        self._max_running, self._max_waiting = threads, waiting
        self._waiting: deque[_QueuedRequest] = deque()
        self._running_memory = 0

    @property
    def waiting(self) -> int:
        """How many images wait."""
        return len(self._waiting)

    def check_capacity(self, count: int) -> None:
        """Refuse ``count`` images for which the queue has no room.

        Raises:
            HTTPException: 503.
        """
        free_threads = max(0, self._max_running - self.running)
        if self.waiting + count > self._max_waiting + free_threads:
            raise service_unavailable(f"the request queue is full ({self.waiting} images wait)")

    async def run(
        self,
        function: Callable[[], WorkResult],
        memory: int,
        reservation: Reservation | None = None,
    ) -> WorkResult:
        """Wait for a thread, then call ``function`` in it.

        Cancelled while it waits, a request leaves the queue. Work that has started ends at its next
        :func:`check_cancelled`.

        Args:
            function: the work.
            memory: maximum bytes that the work takes.
            reservation: the memory reserved for the request, which the work shares until it ends.

        Raises:
            HTTPException: 503, the queue is full.
        """
        self.check_capacity(1)
        loop = asyncio.get_running_loop()
        request = _QueuedRequest(min(memory, self.memory), loop.create_future())
        self._waiting.append(request)
        self._start_waiting()
        try:
            await request.started
        except asyncio.CancelledError:
            if request in self._waiting:
                self._waiting.remove(request)
                self._start_waiting()
            elif not request.started.cancelled():
                # It was started in the same turn of the event loop.
                self._release(request)
            raise
        work = Work(function, self._is_large)
        if reservation:
            reservation.share()
        task = self.pool.submit(work)

        def release() -> None:
            self._release(request)
            if reservation:
                reservation.release()

        def schedule_release(_: object) -> None:
            # RuntimeError: the event loop is closed.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(release)

        task.add_done_callback(schedule_release)
        try:
            return await asyncio.wrap_future(task)
        except asyncio.CancelledError:
            work.cancelled = True
            raise

    def _start_waiting(self) -> None:
        while (
            self._waiting
            and self.running < self._max_running
            and self._running_memory + self._waiting[0].memory <= self.memory
        ):
            request = self._waiting.popleft()
            if request.started.cancelled():
                # Its task learns of this in the next turn of the event loop.
                continue
            self.running += 1
            self._running_memory += request.memory
            request.started.set_result(None)

    def _release(self, request: _QueuedRequest) -> None:
        self.running -= 1
        self._running_memory -= request.memory
        self._start_waiting()


async def gather_or_cancel(
    works: Iterable[Callable[[], Coroutine[Any, Any, WorkResult]]],
) -> list[WorkResult]:
    """Run all, a few at a time; the first failure cancels the others.

    That way the images of one request cannot fill the queue.
    """
    turns = asyncio.Semaphore(IMAGES_AT_A_TIME)

    async def take_turn(work: Callable[[], Coroutine[Any, Any, WorkResult]]) -> WorkResult:
        async with turns:
            return await work()

    tasks = [asyncio.ensure_future(take_turn(work)) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def cancel_on_disconnect(request: Request, work: Awaitable[WorkResult]) -> WorkResult:
    """Wait for work, or cancel it when the client disconnects; call it after reading the body.

    Raises:
        HTTPException: 499, the client has disconnected.
    """

    async def wait_for_disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working = asyncio.ensure_future(work)
    disconnecting = asyncio.ensure_future(wait_for_disconnect())
    try:
        await asyncio.wait((working, disconnecting), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise client_disconnected()
        return working.result()
    finally:
        disconnecting.cancel()
        working.cancel()
