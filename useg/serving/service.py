"""A model and what it needs to be served: its network computed for many, the line, the uploads, the counts; and how a request waits."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from fastapi import Request
from numpy.typing import NDArray

from useg.inference.predictor import Predictor
from useg.inference.runtimes import make_probe, probe_size
from useg.inference.tiles import LogitsFunction
from useg.machine import seconds_of
from useg.models.segmenter import ModelDescription
from useg.serving import responses
from useg.serving.middleware import Limits, Metrics, Uploads, busy, gone

LARGEST_BATCH = 8  # pictures at a time


BATCH_WORTH = 0.95  # a batch has to take at most this share of its pictures' time alone


_TRIAL_SECONDS = 0.3  # a picture that takes longer keeps all cores busy by itself


@dataclass(eq=False)
class _Call:
    x: NDArray[np.generic]
    answer: Future[NDArray[np.float32]] = field(default_factory=Future)


@dataclass
class BatchCounts:
    """How often the network was called, with how many pictures (or windows of pictures), and for how long."""

    calls: int = 0
    pictures: int = 0
    seconds: float = 0.0


class BatchingFunction:
    """A network like the one it is given, which any thread may call; a single thread computes.

    Args:
        network: the network.
        most: pictures that are computed together.
        values: numbers in those pictures, so that windows of large ones are not.

    >>> network = Gathering(lambda x: x.astype(np.float32), 8, 1000)
    >>> network(np.ones((1, 3, 2, 2), np.uint8)).shape
    (1, 3, 2, 2)
    """

    def __init__(self, network: LogitsFunction, most: int, values: int) -> None:
        self.counts = BatchCounts()
        self._network, self._most, self._values = network, most, values
        self._exact: dict[tuple[int, ...], bool] = {}
        self._calls: deque[_Call] = deque()
        self._called = threading.Condition()
        threading.Thread(target=self._compute, name="network", daemon=True).start()

    def __call__(self, x: NDArray[np.generic]) -> NDArray[np.float32]:
        """Compute ``x``, when its turn has come."""
        call = _Call(x)
        with self._called:
            self._calls.append(call)
            self._called.notify()
        return call.answer.result()

    def _compute(self) -> None:
        while True:
            with self._called:
                self._called.wait_for(lambda: self._calls)
                together = self._next()
            began = time.perf_counter()
            try:
                answers = self._answers([call.x for call in together])
            except BaseException as error:
                for call in together:
                    call.answer.set_exception(error)
                continue
            self.counts = BatchCounts(
                self.counts.calls + 1,
                self.counts.pictures + len(answers),
                self.counts.seconds + time.perf_counter() - began,
            )
            for call, answer in zip(together, answers, strict=True):
                call.answer.set_result(answer)

    def _answers(self, pictures: list[NDArray[np.generic]]) -> list[NDArray[np.float32]]:
        form = len(pictures), *pictures[0].shape
        if self._exact.get(form):
            return np.split(self._network(np.concatenate(pictures)), len(pictures))
        alone = [self._network(x) for x in pictures]
        if len(pictures) > 1 and form not in self._exact:
            self._exact[form] = np.array_equal(
                self._network(np.concatenate(pictures)), np.concatenate(alone)
            )
        return alone

    def _next(self) -> list[_Call]:
        """Take the oldest call, and those that can be computed with it."""
        first = self._calls.popleft()
        alike = [
            call
            for call in self._calls
            if (call.x.dtype, *call.x.shape) == (first.x.dtype, *first.x.shape)
        ]
        together = [first, *alike[: max(1, min(self._most, self._values // first.x.size)) - 1]]
        for call in together[1:]:
            self._calls.remove(call)
        return together


def best_batch(network: LogitsFunction, card: ModelDescription) -> int:
    """Return how many pictures of the model's working size are best computed together: 1, unless more are faster."""
    x = make_probe(card, probe_size(card), LARGEST_BATCH)
    alone = seconds_of(network, x[:1])
    best, least, count = 1, BATCH_WORTH * alone, 2
    while alone < _TRIAL_SECONDS and count <= LARGEST_BATCH:
        seconds = seconds_of(network, x[:count]) / count
        if seconds < least:
            best, least = count, seconds
        count *= 2
    return best


def batch_calls(network: LogitsFunction, card: ModelDescription, batch: int) -> BatchingFunction:
    """Wrap a network so that up to ``batch`` pictures of the working size are computed together, and fewer windows of larger ones."""
    width, height = probe_size(card)
    return BatchingFunction(network, batch, batch * card.channels * width * height)


Work = TypeVar("Work")


@dataclass(frozen=True)
class _Ticket:
    pixels: int
    turn: asyncio.Future[None]


class RequestQueue:
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

    async def do(self, work: Callable[[], Work], pixels: int) -> Work:
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
        while (
            self._line
            and self.working < self._threads
            and self._taken + self._line[0].pixels <= self._pixels
        ):
            ticket = self._line.popleft()
            if (
                ticket.turn.cancelled()
            ):  # who waited has left, and will know in the loop's next turn
                continue
            self.working, self._taken = self.working + 1, self._taken + ticket.pixels
            ticket.turn.set_result(None)

    def _leave(self, ticket: _Ticket) -> None:
        self.working, self._taken = self.working - 1, self._taken - ticket.pixels
        self._call_in()


Answered = TypeVar("Answered")


@dataclass
class Service:
    """One model and all that is needed to serve it.

    Args:
        name: of the model, for clients.
        predictor: the model; its network may be called by several threads.
        network: counts the network's calls.
        limits: what is taken on.
        desk: where pictures wait.
        uploads: receives them.
        metrics: counts requests.
        draining: whether the service is about to end: it answers, but wants no more.
    """

    name: str
    predictor: Predictor
    network: BatchingFunction
    limits: Limits
    desk: RequestQueue
    uploads: Uploads
    metrics: Metrics = field(default_factory=Metrics)
    draining: bool = False


def make_service(predictor: Predictor, limits: Limits, batch: int | None = None) -> Service:
    """Prepare a model for being served.

    Args:
        predictor: the model.
        limits: what is taken on.
        batch: pictures of the working size that are computed together; by default a trial decides.
    """
    runtime = predictor.runtime
    batch = batch or best_batch(runtime.run, runtime.description)
    network = batch_calls(runtime.run, runtime.description, batch)
    desk = RequestQueue(batch + 2, limits.pixels, limits.waiting)
    return Service(
        responses.name_of(runtime.source),
        Predictor(replace(runtime, run=network)),
        network,
        limits,
        desk,
        Uploads(limits),
    )


async def all_of(works: Iterable[Coroutine[Any, Any, Answered]]) -> list[Answered]:
    """Wait for all; when one fails, the others are given up."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def unless_gone(request: Request, work: Awaitable[Answered]) -> Answered:
    """Wait for work, or give it up when the client hangs up; the request's body has been read.

    Raises:
        RefusalError: 499, the client has gone.
    """

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(hung_up())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise gone()
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()


def note(request: Request, **entries: Any) -> None:
    """Add to what is logged of a request."""
    request.scope["state"].setdefault("notes", {}).update(entries)
