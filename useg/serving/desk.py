"""Work of many requests -> a bounded line -> a few threads; what nobody waits for any more is not begun."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from useg.serving.limits import busy

T = TypeVar("T")


@dataclass(frozen=True)
class _Ticket:
    pixels: int
    turn: asyncio.Future[None]


class Desk:
    """Where pictures wait for one of the threads, first come first served. All methods belong to the event loop.

    Args:
        threads: how many pictures are worked on at one time.
        pixels: how many pixels they have together at most; a larger picture waits until it is alone.
        waiting: how many pictures may wait.
    """

    def __init__(self, threads: int, pixels: int, waiting: int) -> None:
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="picture")
        self.working = 0
        self._threads, self._pixels, self._waiting = threads, pixels, waiting
        self._line: deque[_Ticket] = deque()
        self._taken = 0

    @property
    def waiting(self) -> int:
        """How many pictures wait."""
        return len(self._line)

    def check_room(self, count: int) -> None:
        """Refuse ``count`` pictures that the line has no room for.

        Raises:
            RefusalError: 503.
        """
        if self.waiting + count > self._waiting + max(0, self._threads - self.working):
            raise busy(f"{self.waiting} pictures are waiting already")

    async def do(self, work: Callable[[], T], pixels: int) -> T:
        """Wait for a turn, then do ``work`` in a thread. Who is cancelled while waiting leaves the line; work that has begun is finished.

        Raises:
            RefusalError: 503, the line is full.
        """
        self.check_room(1)
        loop = asyncio.get_running_loop()
        ticket = _Ticket(min(pixels, self._pixels), loop.create_future())
        self._line.append(ticket)
        self._call_in()
        try:
            await ticket.turn
        except asyncio.CancelledError:
            if ticket in self._line:
                self._line.remove(ticket)
                self._call_in()
            elif not ticket.turn.cancelled():  # it had been called in that moment
                self._leave(ticket)
            raise
        task = self.pool.submit(work)

        def done(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._leave, ticket)

        task.add_done_callback(done)
        return await asyncio.wrap_future(task)

    def _call_in(self) -> None:
        while self._line and self.working < self._threads and self._taken + self._line[0].pixels <= self._pixels:
            ticket = self._line.popleft()
            if ticket.turn.cancelled():  # who waited has left, and will know in the loop's next turn
                continue
            self.working, self._taken = self.working + 1, self._taken + ticket.pixels
            ticket.turn.set_result(None)

    def _leave(self, ticket: _Ticket) -> None:
        self.working, self._taken = self.working - 1, self._taken - ticket.pixels
        self._call_in()
