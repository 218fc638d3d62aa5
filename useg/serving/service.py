"""A model ready to be served: how requests share its network, request queues and uploads.

An image that is alone is computed by all cores. Several images are computed by a thread and a core
for each, or in batches, whichever a short trial finds faster. Calls that arrive while the network
computes a batch form the next one; no call waits for a batch to fill.

Every response equals, to the bit, that of the image computed alone. A library may choose another
algorithm for a batch or for one thread, which rounds differently. So the first images of each shape
are computed both ways; if the results differ, images of that shape are always computed alone.

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
import torch
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

# A plan replaces the one before it if an image takes at most this share of its time.
MAX_TIME_SHARE = 0.95

# A thread for each image may take this many times as long in the trial, which does not show that no
# core waits for another that decodes an image.
MAX_TIME_ON_THREADS = 1.25

# An image that takes longer keeps all cores busy alone, so nothing else is tried.
MAX_TRIAL_SECONDS = 0.3

# Images of up to so many times the working size are computed by a thread each, which takes memory
# for each; larger ones keep all cores busy alone.
MAX_TIMES_WORKING_SIZE = 2

# After so many shapes whose images were computed both ways, others are trusted to be like them.
MAX_CHECKED_SHAPES = 16

# An image is large if it takes more than this share of the memory for images, or if its file has
# more bytes than that. One of 800x600 pixels with 20 classes is small. Large ones take turns in a
# queue of their own, so that small ones need not wait for them.
LARGE_SHARE = 1 / 40
LARGE_UPLOAD_BYTES = 2_000_000

# So it is if its response may take more than this to encode: Python writes that for seconds.
LARGE_ENCODING_BYTES = 39_000_000

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


def set_own_threads(count: int) -> None:
    """Set how many threads PyTorch and OpenVINO use for this one, and for new ones."""
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

    def __add__(self, other: BatchCounts) -> BatchCounts:
        """Return the sum of both."""
        return BatchCounts(
            self.calls + other.calls, self.images + other.images, self.seconds + other.seconds
        )


class ExactShapes:
    """Remembers for which shapes another way to compute images gives the same numbers."""

    def __init__(self) -> None:
        self._shapes: dict[tuple[int, ...], bool] = {}

    def known(self, shape: tuple[int, ...]) -> bool | None:
        """Return whether it gives the same; None: images of this shape must be computed twice."""
        if len(self._shapes) < MAX_CHECKED_SHAPES:
            return self._shapes.get(shape)
        return self._shapes.get(shape, all(self._shapes.values()))

    def add(self, shape: tuple[int, ...], is_exact: bool) -> None:
        """Remember what was found for a shape."""
        self._shapes[shape] = is_exact


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
        self._exact = ExactShapes()
        self._calls: deque[_Call] = deque()
        self._called = threading.Condition()
        arguments = niceness, torch.get_num_threads()
        threading.Thread(
            target=self._run_forever, args=arguments, name="network", daemon=True
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

    def _run_forever(self, niceness: int, threads: int) -> None:
        set_own_threads(threads)
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
            self.counts += BatchCounts(1, len(results), time.perf_counter() - start)
            for call, logits in zip(batch, results, strict=True):
                call.logits.set_result(logits)

    def _compute(self, images: list[NDArray[np.generic]]) -> list[NDArray[np.float32]]:
        shape = len(images), *images[0].shape
        if len(images) > 1 and self._exact.known(shape):
            return np.split(self._network(np.concatenate(images)), len(images))
        alone = [self._network(x) for x in images]
        if len(images) > 1 and self._exact.known(shape) is None:
            batched = self._network(np.concatenate(images))
            self._exact.add(shape, np.array_equal(batched, np.concatenate(alone)))
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


@dataclass(frozen=True)
class LoadPlan:
    """How a network computes several small images.

    Args:
        batch_size: maximum number of images that all cores compute together.
        threads: number of images that each have a thread and a core of their own; 1: none.
    """

    batch_size: int = 1
    threads: int = 1


def find_plan(network: LogitsFunction, description: ModelDescription) -> LoadPlan:
    """Return the fastest way to compute several images, timed at the working size."""
    x = make_probe(description, probe_size(description), MAX_BATCH_SIZE)
    best, threads = LoadPlan(), torch.get_num_threads()
    alone = measure_seconds(network, x[:1])
    if alone > MAX_TRIAL_SECONDS:
        return best
    least_seconds, size = alone, 2
    if threads > 1:
        on_threads = _seconds_on_threads(network, x[:1], threads) / MAX_TIME_ON_THREADS
        if on_threads < alone:
            best, least_seconds = LoadPlan(threads=threads), on_threads
    while size <= MAX_BATCH_SIZE:
        seconds = measure_seconds(network, x[:size]) / size
        if seconds < MAX_TIME_SHARE * least_seconds:
            best, least_seconds = LoadPlan(size), seconds
        size *= 2
    return best


def _seconds_on_threads(network: LogitsFunction, x: NDArray[np.generic], threads: int) -> float:
    with image_threads(threads) as pool:
        return (
            measure_seconds(lambda images: list(pool.map(network, images)), [x] * threads) / threads
        )


class SharedNetwork:
    """A network for all threads: small images need not wait for the windows of large ones.

    Args:
        network: the network.
        plan: how it computes several small images.
        values: count of numbers of an image of the working size.
        is_loaded: whether several images are in progress.
    """

    def __init__(
        self,
        network: LogitsFunction,
        plan: LoadPlan,
        values: int,
        is_loaded: Callable[[], bool],
    ) -> None:
        self._network, self._is_loaded = network, is_loaded
        self._max_thread_values = MAX_TIMES_WORKING_SIZE * values if plan.threads > 1 else 0
        self._small = BatchingFunction(network, plan.batch_size, plan.batch_size * values)
        # Windows are computed one at a time.
        self._large = BatchingFunction(network, 1, values, LARGE_NICENESS)
        self._exact = ExactShapes()
        self._cores = threading.BoundedSemaphore(plan.threads)
        self._counts, self._counts_lock = BatchCounts(), threading.Lock()

    def __call__(self, x: NDArray[np.generic]) -> NDArray[np.float32]:
        """Wait until ``x`` has been computed; returns the logits.

        Raises:
            WorkCancelledError: nobody waits for them any more.
        """
        work = current_work()
        if work and work.is_large:
            return self._large(x)
        exact = self._exact.known(x.shape)
        if x.size > self._max_thread_values or exact is False or not self._is_loaded():
            return self._small(x)
        logits = self._compute_here(x)
        if exact is None:
            expected = self._small(x)
            self._exact.add(x.shape, np.array_equal(logits, expected))
            return expected
        return logits

    def _compute_here(self, x: NDArray[np.generic]) -> NDArray[np.float32]:
        with self._cores:
            check_cancelled()
            start = time.perf_counter()
            logits = self._network(x)
            seconds = time.perf_counter() - start
        with self._counts_lock:
            self._counts += BatchCounts(1, len(x), seconds)
        return logits

    @property
    def counts(self) -> BatchCounts:
        """What all threads have done."""
        return self._counts + self._small.counts + self._large.counts


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

    def queue_for(
        self, upload_bytes: int, memory: int = 0, encoding_bytes: int = 0
    ) -> RequestQueue:
        """Return the queue for an upload of this size and for work that takes this memory.

        ``encoding_bytes`` is what encoding the response takes of it.
        """
        is_large = memory > self.limits.work_bytes * LARGE_SHARE
        is_large |= upload_bytes > LARGE_UPLOAD_BYTES
        is_large |= encoding_bytes > LARGE_ENCODING_BYTES
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


def activation_bytes(runtime: Runtime, limits: Limits, plan: LoadPlan) -> int:
    """Return the memory of the network's activations: small images beside a large one.

    Args:
        runtime: the network.
        limits: how much the service accepts.
        plan: how many small images are computed at a time.
    """
    width, height = probe_size(runtime.description)
    logits_bytes = 4 * len(runtime.description.classes)
    largest_small = limits.work_bytes * LARGE_SHARE / (logits_bytes + WORK_BYTES_PER_PIXEL)
    small = min(limits.pixels, max(plan.batch_size * width * height, largest_small))
    if plan.threads > 1:
        small += plan.threads * MAX_TIMES_WORKING_SIZE * width * height
    large = min(limits.pixels, max(MAX_SINGLE_PASS_PIXELS, runtime.window_pixels))
    return round(MAX_WINDOW_BYTES * (small + large) / runtime.window_pixels)


def make_service(predictor: Predictor, limits: Limits, plan: LoadPlan | None = None) -> Service:
    """Prepare a model for serving.

    Args:
        predictor: the model.
        limits: how much the service accepts.
        plan: how it computes several small images; by default a short trial decides.
    """
    runtime = predictor.runtime
    plan = plan or find_plan(runtime.run, runtime.description)
    threads = max(plan.batch_size, plan.threads) + 2
    small = round(threads * limits.work_bytes * LARGE_SHARE)
    queue = RequestQueue(threads, small, limits.waiting)
    # Half of the cores stay free for small images.
    large_queue = RequestQueue(
        max(1, (count_cores() or 1) // 2), limits.work_bytes, limits.waiting, is_large=True
    )
    width, height = probe_size(runtime.description)
    network = SharedNetwork(
        runtime.run,
        plan,
        runtime.description.channels * width * height,
        lambda: queue.running + large_queue.running > 1,
    )
    return Service(
        model_name(runtime.source),
        Predictor(replace(runtime, run=network)),
        network,
        limits,
        queue,
        large_queue,
        UploadReader(limits),
        activation_bytes(runtime, limits, plan),
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
