"""A model ready to be served, with dynamic batching, request queues and uploads.

Calls that arrive while the network computes a batch form the next batch. No call waits for a batch
to fill, so at low load each image is computed at once and alone.

Every response equals, to the bit, that of the image computed alone. A library may choose another
algorithm for a batch, which rounds differently. So the first batch of each shape is also computed
one image at a time; if the results differ, images of that shape are never batched again.

Windows of large images are computed apart from these batches, one at a time and at a lower
priority: with a large network, a window takes seconds on a CPU.

Images wait for a thread, first come, first served. Work for a request that has ended is cancelled.
Threads cannot be stopped from outside, so long work calls :func:`check_cancelled` between its
steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np
from fastapi import Request
from numpy.typing import NDArray
from starlette.exceptions import HTTPException

from useg.inference.predictor import MAX_SINGLE_PASS_PIXELS, Predictor
from useg.inference.runtimes import MAX_WINDOW_BYTES, Runtime, make_probe, probe_size
from useg.inference.tiles import LogitsFunction
from useg.machine import count_cores, measure_seconds
from useg.models.description import ModelDescription
from useg.serving.middleware import Limits, Metrics, client_disconnected, service_unavailable
from useg.serving.site import model_name
from useg.serving.uploads import SMALL_SHARE, Lease, UploadReader

MAX_BATCH_SIZE = 8

# A larger batch is used if an image takes at most this share of the smaller batch's time.
MAX_BATCH_TIME_SHARE = 0.95

# An image that takes longer keeps all cores busy alone, so larger batches are not tried.
MAX_BATCH_TRIAL_SECONDS = 0.3

# An image is large if it takes more than this share of the memory for images, or if its file has
# more bytes than that. Large ones take turns in a queue of their own, so that small ones need not
# wait for them.
LARGE_SHARE = 1 / 64
LARGE_UPLOAD_BYTES = 2_000_000

# The threads of large images have a lower priority by this much, so that they take what the event
# loop, the network and small images leave.
LARGE_NICENESS = 10

# Images of one request that wait in the queue or are in progress at a time.
IMAGES_AT_A_TIME = 4

# Memory of an image that is in progress, beside its logits: the decoded file, and label maps.
WORK_BYTES_PER_PIXEL = 32


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
        niceness = LARGE_NICENESS if is_large else 0
        self.pool = ThreadPoolExecutor(threads, "image", lower_priority, (niceness,))
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
        self, function: Callable[[], WorkResult], memory: int, lease: Lease | None = None
    ) -> WorkResult:
        """Wait for a thread, then call ``function`` in it.

        Cancelled while it waits, a request leaves the queue. Work that has started ends at its next
        :func:`check_cancelled`.

        Args:
            function: the work.
            memory: maximum bytes that the work takes.
            lease: the request's lease on memory, which the work shares until it ends.

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
        if lease:
            lease.share()
        task = self.pool.submit(work)

        def release() -> None:
            self._release(request)
            if lease:
                lease.release()

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


@dataclass(eq=False)
class _Call:
    x: NDArray[np.generic]
    work: Work[Any] | None
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
        max_batch_size: maximum number of images in a batch.
        max_values: maximum count of numbers in a batch, so that windows of large images are not
            batched.
        niceness: by how much the priority of the thread is lower.

    >>> network = BatchingFunction(lambda x: x.astype(np.float32), 8, 1000)
    >>> network(np.ones((1, 3, 2, 2), np.uint8)).shape
    (1, 3, 2, 2)
    """

    def __init__(
        self, network: LogitsFunction, max_batch_size: int, max_values: int, niceness: int = 0
    ) -> None:
        self.counts = BatchCounts()
        self._network = network
        self._max_batch_size = max_batch_size
        self._max_values = max_values
        self._batch_is_exact: dict[tuple[int, ...], bool] = {}
        self._calls: deque[_Call] = deque()
        self._called = threading.Condition()
        threading.Thread(
            target=self._run_forever, args=(niceness,), name="network", daemon=True
        ).start()

    def __call__(self, x: NDArray[np.generic]) -> NDArray[np.float32]:
        """Wait until a batch with ``x`` has been computed; returns the logits.

        Raises:
            WorkCancelledError: nobody waits for them any more.
        """
        check_cancelled()
        call = _Call(x, current_work())
        with self._called:
            self._calls.append(call)
            self._called.notify()
        return call.logits.result()

    def _run_forever(self, niceness: int) -> None:
        lower_priority(niceness)
        while True:
            with self._called:
                self._called.wait_for(lambda: self._calls)
                self._drop_cancelled()
                if not self._calls:
                    continue
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

    def _drop_cancelled(self) -> None:
        for call in [call for call in self._calls if call.work and call.work.cancelled]:
            self._calls.remove(call)
            call.logits.set_exception(WorkCancelledError())

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


@dataclass(frozen=True)
class SharedNetwork:
    """A network for all threads: small images need not wait for the windows of large ones.

    Args:
        small: for the work on small images.
        large: for the work on large ones, which computes one window at a time.
    """

    small: BatchingFunction
    large: BatchingFunction

    def __call__(self, x: NDArray[np.generic]) -> NDArray[np.float32]:
        """Wait until ``x`` has been computed; returns the logits."""
        work = current_work()
        return (self.large if work and work.is_large else self.small)(x)

    @property
    def counts(self) -> BatchCounts:
        """What both have done."""
        small, large = self.small.counts, self.large.counts
        return BatchCounts(
            small.calls + large.calls, small.images + large.images, small.seconds + large.seconds
        )


def share_network(
    network: LogitsFunction, description: ModelDescription, batch_size: int
) -> SharedNetwork:
    """Batch up to ``batch_size`` images of the working size, and fewer of larger ones."""
    width, height = probe_size(description)
    max_values = batch_size * description.channels * width * height
    return SharedNetwork(
        BatchingFunction(network, batch_size, max_values),
        BatchingFunction(network, 1, max_values, LARGE_NICENESS),
    )


@dataclass
class Service:
    """One model and all that serving it takes.

    Args:
        name: the model's name for clients.
        predictor: the model; several threads may call its network.
        network: the same network; counts its batches.
        limits: how much the service accepts.
        queue: where small images wait, and small uploads to be read.
        large_queue: where large ones wait.
        uploads: reads the bodies of requests.
        activation_bytes: memory of the network's activations.
        metrics: counts requests.
        draining: whether the service is shutting down: it still responds, but closes each
            connection after its response.
    """

    name: str
    predictor: Predictor
    network: SharedNetwork
    limits: Limits
    queue: RequestQueue
    large_queue: RequestQueue
    uploads: UploadReader
    activation_bytes: int
    metrics: Metrics = field(default_factory=Metrics)
    draining: bool = False

    def check_not_draining(self) -> None:
        """Refuse further requests during a shutdown.

        Raises:
            HTTPException: 503.
        """
        if self.draining:
            raise service_unavailable("the service is shutting down")

    @property
    def memory(self) -> int:
        """Maximum memory of all requests together, in bytes, beside the model itself."""
        held = self.limits.buffered_bytes + self.limits.response_bytes
        queues = self.queue.memory + self.large_queue.memory
        return held + held // SMALL_SHARE + queues + self.activation_bytes

    @property
    def is_working(self) -> bool:
        """Whether an image is in progress."""
        return bool(self.queue.running or self.large_queue.running)

    def queue_for(self, upload_bytes: int, memory: int = 0) -> RequestQueue:
        """Return the queue for an upload of this size and for work that takes this memory."""
        is_large = memory > self.limits.work_bytes * LARGE_SHARE
        is_large |= upload_bytes > LARGE_UPLOAD_BYTES
        return self.large_queue if is_large else self.queue

    def work_bytes(self, width: int, height: int) -> int:
        """Return the memory that an image takes while it is in progress.

        Raises:
            HTTPException: 413, it is more than is allowed.
        """
        description = self.predictor.runtime.description
        working = description.working.of(width, height)
        values = width * height
        if working != (width, height):
            # Of the working size, while they are enlarged to the image's own.
            values += working[0] * working[1]
        num_classes = len(description.classes)
        needed = 4 * num_classes * values + WORK_BYTES_PER_PIXEL * width * height
        if needed > self.limits.work_bytes:
            raise HTTPException(
                413,
                f"an image of {width}x{height} pixels needs {needed / 1e6:,.0f} MB of memory for "
                f"{num_classes} classes, more than the allowed {self.limits.work_bytes / 1e6:,.0f} "
                "MB; send a smaller one",
            )
        return needed


def activation_bytes(runtime: Runtime, limits: Limits, batch_size: int) -> int:
    """Return the memory of the network's activations: a batch of small images beside a large one.

    Args:
        runtime: the network.
        limits: how much the service accepts.
        batch_size: most images of the working size in a batch.
    """
    width, height = probe_size(runtime.description)
    logits_bytes = 4 * len(runtime.description.classes)
    largest_small = limits.work_bytes * LARGE_SHARE / (logits_bytes + WORK_BYTES_PER_PIXEL)
    small = min(limits.pixels, max(batch_size * width * height, largest_small))
    large = min(limits.pixels, max(MAX_SINGLE_PASS_PIXELS, runtime.window_pixels))
    return round(MAX_WINDOW_BYTES * (small + large) / runtime.window_pixels)


def make_service(predictor: Predictor, limits: Limits, batch_size: int | None = None) -> Service:
    """Prepare a model for serving.

    Args:
        predictor: the model.
        limits: how much the service accepts.
        batch_size: most images of the working size in a batch; by default a short trial decides.
    """
    runtime = predictor.runtime
    batch_size = batch_size or find_batch_size(runtime.run, runtime.description)
    network = share_network(runtime.run, runtime.description, batch_size)
    threads = batch_size + 2
    small = round(threads * limits.work_bytes * LARGE_SHARE)
    return Service(
        model_name(runtime.source),
        Predictor(replace(runtime, run=network)),
        network,
        limits,
        RequestQueue(threads, small, limits.waiting),
        # Half of the cores stay free for small images.
        RequestQueue(
            max(1, (count_cores() or 1) // 2), limits.work_bytes, limits.waiting, is_large=True
        ),
        UploadReader(limits),
        activation_bytes(runtime, limits, batch_size),
    )


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


def add_log_fields(request: Request, **entries: Any) -> None:
    """Add to the log entry of a request."""
    request.scope["state"].setdefault("log_fields", {}).update(entries)
