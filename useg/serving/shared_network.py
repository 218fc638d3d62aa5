"""A network that all threads share: images alone, by a thread each, or in batches.

An image that is alone is computed by all cores. Several images are computed by a thread and a core
for each, or in batches, whichever a short trial finds faster. Calls that arrive while the network
computes a batch form the next one; no call waits for a batch to fill.

Every response equals, to the bit, that of the image computed alone. A library may choose another
algorithm for a batch or for one thread, which rounds differently. So the first images of each shape
are computed both ways; if the results differ, images of that shape are always computed alone.

Windows of large images are computed apart from these batches, one at a time and at a lower
priority: with a large network, a window takes seconds on a CPU.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from useg.inference.runtimes import make_probe, probe_size
from useg.inference.tiles import LogitsFunction
from useg.machine import measure_seconds
from useg.models.description import ModelDescription
from useg.serving.request_queue import (
    LARGE_NICENESS,
    Work,
    WorkCancelledError,
    check_cancelled,
    current_work,
    image_threads,
    lower_priority,
    set_own_threads,
)

MAX_BATCH_SIZE = 8

# A plan replaces the one before it if an image takes at most this share of its time.
MAX_TIME_SHARE = 0.95

# A thread for each image may take this many times as long in the trial, which does not show what
# batches cost in a service: they need all cores at once, and wait for one that decodes an image or
# computes a large one. On a CPU the trial finds both about as fast. Beside hostile requests, the
# default network then responds to twice as many good requests if each image has a thread.
MAX_TIME_ON_THREADS = 2.0

# An image that takes longer keeps all cores busy alone, so nothing else is tried.
MAX_TRIAL_SECONDS = 0.3

# An image of up to this many times the working size may have a thread of its own, which takes
# memory; a larger one keeps all cores busy alone.
MAX_TIMES_WORKING_SIZE = 2

# Images of this many shapes are computed both ways. After that, other shapes are trusted to agree.
MAX_CHECKED_SHAPES = 16


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
