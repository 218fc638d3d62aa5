"""Batching of a network's calls, and the request queue."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from served import tiny
from starlette.exceptions import HTTPException

from useg.errors import UsageError
from useg.serving import service
from useg.serving.service import BatchingFunction, RequestQueue, find_batch_size

pytestmark = pytest.mark.wheel


class DoublingNetwork:
    """Doubles its input once it may; records the shapes of its inputs."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.may_run = threading.Event()

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.shapes.append(x.shape)
        assert self.may_run.wait(10)
        if x.max() == 13:
            raise UsageError("13 is refused")
        return 2 * x.astype(np.float32)


def call_all(
    network: DoublingNetwork, max_batch_size: int, max_values: int, inputs: list[np.ndarray]
) -> list[object]:
    """Call a batched network from one thread per input; the first call runs alone."""
    batching = BatchingFunction(network, max_batch_size, max_values)
    results: list[object] = [None] * len(inputs)

    def call(k: int) -> None:
        try:
            results[k] = batching(inputs[k])
        except UsageError as error:
            results[k] = error

    threads = [threading.Thread(target=call, args=(k,)) for k in range(len(inputs))]
    for k, thread in enumerate(threads):
        thread.start()
        while len(batching._calls) < k or not network.shapes:
            time.sleep(0.001)
    network.may_run.set()
    for thread in threads:
        thread.join()
    return results


def block(value: int, *shape: int) -> np.ndarray:
    return np.full(shape, value, np.uint8)


def test_waiting_calls_are_computed_in_one_batch() -> None:
    network = DoublingNetwork()
    inputs = [block(k, 1, 3, 4, 4) for k in range(6)]
    results = call_all(network, 4, 10_000, inputs)
    # The first batch of four is computed both ways.
    assert [shape[0] for shape in network.shapes] == [1, 1, 1, 1, 1, 4, 1]
    for x, result in zip(inputs, results, strict=True):
        np.testing.assert_array_equal(result, 2.0 * x)  # type: ignore[arg-type]


def test_a_batch_has_images_of_one_shape_within_the_limit_of_values() -> None:
    network = DoublingNetwork()
    shapes = [(1, 1, 2, 2), (1, 1, 2, 2), (1, 1, 2, 3), (1, 1, 2, 2), (1, 1, 9, 9), (1, 1, 9, 9)]
    call_all(network, 8, 100, [block(1, *shape) for shape in shapes])
    assert [shape for shape in network.shapes if shape[0] > 1] == [(2, 1, 2, 2)]
    assert network.shapes[-3:] == [(1, 1, 2, 3), (1, 1, 9, 9), (1, 1, 9, 9)]


def test_an_error_reaches_its_caller_and_the_next_call_runs() -> None:
    network = DoublingNetwork()
    results = call_all(network, 1, 100, [block(13, 1, 1, 2, 2), block(1, 1, 1, 2, 2)])
    assert isinstance(results[0], UsageError)
    np.testing.assert_array_equal(results[1], np.full((1, 1, 2, 2), 2.0))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (lambda count: 0.002 * count, 1),
        (lambda count: 0.004 + 0.0005 * count, 8),
        (lambda count: 0.01 if count > 2 else 0.004, 8),
        (lambda count: 0.05 * count if count > 2 else 0.004, 2),
    ],
)
def test_the_batch_size_is_the_fastest(
    seconds: Callable[[int], float], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "measure_seconds", lambda network, x: seconds(len(x)))
    monkeypatch.setattr(service, "probe_size", lambda description: (16, 16))
    assert find_batch_size(lambda x: x.astype(np.float32), tiny().runtime.description) == expected


def test_images_are_computed_alone_where_a_batch_rounds_differently() -> None:
    shapes = []

    def network(x: np.ndarray) -> np.ndarray:
        shapes.append(len(x))
        return x.astype(np.float32) + np.float32(1e-6 if len(x) == 3 else 0)

    batching = BatchingFunction(network, 8, 1000)
    for count, computed in ((2, [1, 1, 2]), (2, [2]), (3, [1, 1, 1, 3]), (3, [1, 1, 1])):
        shapes.clear()
        images = [block(k, 1, 1, 2, 2) for k in range(count)]
        np.testing.assert_array_equal(np.stack(batching._compute(images)), np.stack(images))
        assert shapes == computed


def test_the_desk_serves_in_order_and_large_pictures_take_turns() -> None:
    started: list[str] = []
    gate = threading.Event()

    def work(name: str) -> str:
        started.append(name)
        gate.wait(5)
        return name

    async def check() -> list[str]:
        queue = RequestQueue(threads=2, pixels=100, waiting=9)
        sizes = {"a": 60, "b": 60, "c": 10, "d": 1000}
        tasks = [
            asyncio.ensure_future(queue.run(lambda name=name: work(name), pixels))  # type: ignore[misc]
            for name, pixels in sizes.items()
        ]  # type: ignore[misc]
        await asyncio.sleep(0.05)
        # b has too many pixels beside a, and c waits behind b.
        assert (started, queue.running, queue.waiting) == (["a"], 1, 3)
        gate.set()
        return await asyncio.gather(*tasks)

    assert asyncio.run(check()) == ["a", "b", "c", "d"]
    assert started[0] == "a"
    assert started[-1] == "d"


def test_a_cancelled_request_leaves_the_queue_and_running_work_finishes() -> None:
    gate = threading.Event()

    async def check() -> None:
        queue = RequestQueue(threads=1, pixels=100, waiting=1)
        first = asyncio.ensure_future(queue.run(lambda: gate.wait(5), 1))
        second = asyncio.ensure_future(queue.run(lambda: True, 1))
        await asyncio.sleep(0.02)
        with pytest.raises(HTTPException, match="the request queue is full \\(1 images wait\\)"):
            await queue.run(lambda: True, 1)
        second.cancel()
        first.cancel()
        await asyncio.sleep(0.02)
        assert (queue.running, queue.waiting) == (1, 0)
        third = asyncio.ensure_future(queue.run(lambda: 3, 1))
        gate.set()
        assert await third == 3
        await asyncio.sleep(0.02)
        assert (queue.running, queue.waiting) == (0, 0)

    asyncio.run(check())


def test_a_request_cancelled_in_the_moment_it_starts_frees_its_thread() -> None:
    async def check() -> None:
        queue = RequestQueue(threads=1, pixels=100, waiting=1)
        queue.running = 1
        request = asyncio.ensure_future(queue.run(lambda: True, 1))
        await asyncio.sleep(0)
        queue.running = 0
        queue._start_waiting()
        request.cancel()
        await asyncio.wait([request])
        assert (request.cancelled(), queue.running, queue.waiting) == (True, 0, 0)

    asyncio.run(check())


def test_a_request_cancelled_in_the_same_turn_is_not_started() -> None:
    async def check() -> None:
        queue = RequestQueue(threads=1, pixels=100, waiting=2)
        queue.running = 1
        left = asyncio.ensure_future(queue.run(lambda: "left", 1))
        following = asyncio.ensure_future(queue.run(lambda: "following", 1))
        await asyncio.sleep(0)
        left.cancel()
        queue.running = 0
        # In the same turn of the event loop a thread becomes free.
        queue._start_waiting()
        assert await following == "following"
        await asyncio.sleep(0.02)
        assert (left.cancelled(), queue.running, queue.waiting) == (True, 0, 0)

    asyncio.run(check())
