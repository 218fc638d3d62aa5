"""A model ready to be served: its network batched over threads, its request queue, its uploads.

While the network computes one batch, further calls gather; the next batch takes what has gathered.
No call waits for others to come, so at low load each image is computed at once and alone.

Every response is, to the bit, that of an image computed alone. A library may choose another
algorithm for a batch, which rounds differently. So the first batch of each shape is computed both
ways, and where the results differ, images of that shape are computed one by one from then on.
"""

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
from useg.machine import measure_seconds
from useg.models.segmenter import ModelDescription
from useg.serving.middleware import (
    Limits,
    Metrics,
    UploadReader,
    client_disconnected,
    service_unavailable,
)
from useg.serving.site import model_name

MAX_BATCH_SIZE = 8

# A larger batch is used if an image takes at most this share of the smaller batch's time.
MAX_BATCH_TIME_SHARE = 0.95

# An image that takes longer keeps all cores busy alone, so larger batches are not tried.
MAX_BATCH_TRIAL_SECONDS = 0.3

WorkResult = TypeVar("WorkResult")


@dataclass(eq=False)
class _Call:
    x: NDArray[np.generic]
    logits: Future[NDArray[np.float32]] = field(default_factory=Future)


@dataclass(frozen=True)
class BatchCounts:
    """How often the network ran, on how many images (or windows of images), for how long."""

    calls: int = 0
    images: int = 0
    seconds: float = 0.0


class BatchingFunction:
    """A network that any thread may call: one thread computes the waiting calls in batches.

    Args:
        network: the network.
        max_batch_size: most images in a batch.
        max_values: most numbers in a batch, so that windows of large images are not batched.

    >>> network = BatchingFunction(lambda x: x.astype(np.float32), 8, 1000)
    >>> network(np.ones((1, 3, 2, 2), np.uint8)).shape
    (1, 3, 2, 2)
    """

    def __init__(self, network: LogitsFunction, max_batch_size: int, max_values: int) -> None:
        self.counts = BatchCounts()
        self._network = network
        self._max_batch_size = max_batch_size
        self._max_values = max_values
        self._batch_is_exact: dict[tuple[int, ...], bool] = {}
        self._calls: deque[_Call] = deque()
        self._called = threading.Condition()
        threading.Thread(target=self._run_forever, name="network", daemon=True).start()

    def __call__(self, x: NDArray[np.generic]) -> NDArray[np.float32]:
        """Wait until a batch with ``x`` has been computed; returns the logits."""
        call = _Call(x)
        with self._called:
            self._calls.append(call)
            self._called.notify()
        return call.logits.result()

    def _run_forever(self) -> None:
        while True:
            with self._called:
                self._called.wait_for(lambda: self._calls)
                batch = self._take_batch()
            start = time.perf_counter()
            try:
                results = self._compute([call.x for call in batch])
            except BaseException as error:
                for call in batch:
                    call.logits.set_exception(error)
                continue
            self.counts = BatchCounts(
                self.counts.calls + 1,
                self.counts.images + len(results),
                self.counts.seconds + time.perf_counter() - start,
            )
            for call, logits in zip(batch, results, strict=True):
                call.logits.set_result(logits)

    def _compute(self, images: list[NDArray[np.generic]]) -> list[NDArray[np.float32]]:
        shape = len(images), *images[0].shape
        if self._batch_is_exact.get(shape):
            return np.split(self._network(np.concatenate(images)), len(images))
        alone = [self._network(x) for x in images]
        if len(images) > 1 and shape not in self._batch_is_exact:
            batched = self._network(np.concatenate(images))
            self._batch_is_exact[shape] = np.array_equal(batched, np.concatenate(alone))
        return alone

    def _take_batch(self) -> list[_Call]:
        """Take the oldest call, and those of the same shape and number type."""
        first = self._calls.popleft()
        alike = [
            call
            for call in self._calls
            if (call.x.dtype, call.x.shape) == (first.x.dtype, first.x.shape)
        ]
        size = max(1, min(self._max_batch_size, self._max_values // first.x.size))
        batch = [first, *alike[: size - 1]]
        for call in batch[1:]:
            self._calls.remove(call)
        return batch


def find_batch_size(network: LogitsFunction, description: ModelDescription) -> int:
    """Time the network on images of its working size; returns the fastest batch size, often 1."""
    x = make_probe(description, probe_size(description), MAX_BATCH_SIZE)
    alone = measure_seconds(network, x[:1])
    best, best_seconds, size = 1, MAX_BATCH_TIME_SHARE * alone, 2
    while alone < MAX_BATCH_TRIAL_SECONDS and size <= MAX_BATCH_SIZE:
        seconds = measure_seconds(network, x[:size]) / size
        if seconds < best_seconds:
            best, best_seconds = size, seconds
        size *= 2
    return best


def batch_calls(
    network: LogitsFunction, description: ModelDescription, batch_size: int
) -> BatchingFunction:
    """Batch up to ``batch_size`` images of the working size, and fewer of larger ones."""
    width, height = probe_size(description)
    max_values = batch_size * description.channels * width * height
    return BatchingFunction(network, batch_size, max_values)


@dataclass(frozen=True)
class _QueuedRequest:
    pixels: int
    started: asyncio.Future[None]


class RequestQueue:
    """Images wait here for a thread, first come, first served; use it in the event loop only.

    Args:
        threads: most images in progress at one time.
        pixels: most pixels that they have together; a larger image waits until it is alone.
        waiting: most images that wait.
    """

    def __init__(self, threads: int, pixels: int, waiting: int) -> None:
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="image")
        self.running = 0
        self._max_running, self._max_pixels, self._max_waiting = threads, pixels, waiting
        self._waiting: deque[_QueuedRequest] = deque()
        self._running_pixels = 0

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

    async def run(self, work: Callable[[], WorkResult], pixels: int) -> WorkResult:
        """Wait for a thread, then run ``work`` in it.

        Cancelled while it waits, a request leaves the queue. Work that has started is finished.

        Raises:
            HTTPException: 503, the queue is full.
        """
        self.check_capacity(1)
        loop = asyncio.get_running_loop()
        request = _QueuedRequest(min(pixels, self._max_pixels), loop.create_future())
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
        task = self.pool.submit(work)

        def release(_: object) -> None:
            # RuntimeError: the event loop is closed.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._release, request)

        task.add_done_callback(release)
        return await asyncio.wrap_future(task)

    def _start_waiting(self) -> None:
        while (
            self._waiting
            and self.running < self._max_running
            and self._running_pixels + self._waiting[0].pixels <= self._max_pixels
        ):
            request = self._waiting.popleft()
            if request.started.cancelled():
                # Its task learns of this in the next turn of the event loop.
                continue
            self.running += 1
            self._running_pixels += request.pixels
            request.started.set_result(None)

    def _release(self, request: _QueuedRequest) -> None:
        self.running -= 1
        self._running_pixels -= request.pixels
        self._start_waiting()


@dataclass
class Service:
    """One model and all that serving it takes.

    Args:
        name: the model's name for clients.
        predictor: the model; several threads may call its network.
        network: the same network; counts its batches.
        limits: how much the service accepts.
        queue: where images wait.
        uploads: reads the bodies of requests.
        metrics: counts requests.
        draining: whether the service shuts down: it still responds, but asks for no more requests.
    """

    name: str
    predictor: Predictor
    network: BatchingFunction
    limits: Limits
    queue: RequestQueue
    uploads: UploadReader
    metrics: Metrics = field(default_factory=Metrics)
    draining: bool = False

    def check_not_draining(self) -> None:
        """Refuse further requests during a shutdown.

        Raises:
            HTTPException: 503.
        """
        if self.draining:
            raise service_unavailable("the service is shutting down")


def make_service(predictor: Predictor, limits: Limits, batch_size: int | None = None) -> Service:
    """Prepare a model for serving.

    Args:
        predictor: the model.
        limits: how much the service accepts.
        batch_size: most images of the working size in a batch; by default a short trial decides.
    """
    runtime = predictor.runtime
    batch_size = batch_size or find_batch_size(runtime.run, runtime.description)
    network = batch_calls(runtime.run, runtime.description, batch_size)
    return Service(
        model_name(runtime.source),
        Predictor(replace(runtime, run=network)),
        network,
        limits,
        RequestQueue(batch_size + 2, limits.pixels, limits.waiting),
        UploadReader(limits),
    )


async def gather_or_cancel(works: Iterable[Coroutine[Any, Any, WorkResult]]) -> list[WorkResult]:
    """Wait for all; the first failure cancels the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
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


def add_log_fields(request: Request, **entries: Any) -> None:
    """Add to the log entry of a request."""
    request.scope["state"].setdefault("log_fields", {}).update(entries)
