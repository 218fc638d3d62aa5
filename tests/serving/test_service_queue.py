"""The request queue: order, memory, and work that nobody waits for any more."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest
from starlette.exceptions import HTTPException

from useg.serving.service import (
    BatchingFunction,
    RequestQueue,
    WorkCancelledError,
    check_cancelled,
)

pytestmark = pytest.mark.wheel


def test_work_starts_in_order_within_the_memory() -> None:
    started: list[str] = []
    gate = threading.Event()

    def work(name: str) -> str:
        started.append(name)
        gate.wait(5)
        return name

    async def check() -> list[str]:
        queue = RequestQueue(threads=2, memory=100, waiting=9)
        sizes = {"a": 60, "b": 60, "c": 10, "d": 1000}
        tasks = [
            asyncio.ensure_future(queue.run(lambda name=name: work(name), memory))  # type: ignore[misc]
            for name, memory in sizes.items()
        ]  # type: ignore[misc]
        await asyncio.sleep(0.05)
        # b takes too much memory beside a, and c waits behind b.
        assert (started, queue.running, queue.waiting) == (["a"], 1, 3)
        gate.set()
        return await asyncio.gather(*tasks)

    assert asyncio.run(check()) == ["a", "b", "c", "d"]
    assert started[0] == "a"
    assert started[-1] == "d"


def test_a_cancelled_request_leaves_the_queue_and_running_work_finishes() -> None:
    gate = threading.Event()

    async def check() -> None:
        queue = RequestQueue(threads=1, memory=100, waiting=1)
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
        queue = RequestQueue(threads=1, memory=100, waiting=1)
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
        queue = RequestQueue(threads=1, memory=100, waiting=2)
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


@pytest.mark.parametrize("checks", [True, False])
def test_work_that_nobody_waits_for_stops(checks: bool) -> None:
    """Without the check it goes on, as the control shows."""
    steps = 0

    def work() -> None:
        nonlocal steps
        while steps < 50:
            steps += 1
            time.sleep(0.005)
            if checks:
                check_cancelled()

    async def check() -> None:
        queue = RequestQueue(threads=1, memory=100, waiting=1)
        request = asyncio.ensure_future(queue.run(work, 1))
        await asyncio.sleep(0.05)
        request.cancel()
        while queue.running:
            await asyncio.sleep(0.01)

    asyncio.run(check())
    assert (steps < 50) == checks


def test_the_network_drops_calls_that_nobody_waits_for() -> None:
    started, may_run = threading.Event(), threading.Event()
    inputs: list[int] = []

    def network(x: np.ndarray) -> np.ndarray:
        inputs.append(int(x.max()))
        started.set()
        assert may_run.wait(5)
        return x.astype(np.float32)

    batching = BatchingFunction(network, 1, 100)
    errors: list[type[BaseException]] = []

    def call(value: int) -> None:
        try:
            batching(np.full((1, 1, 2, 2), value, np.uint8))
        except WorkCancelledError as error:
            errors.append(type(error))

    async def check() -> None:
        queue = RequestQueue(threads=3, memory=100, waiting=3)
        first = asyncio.ensure_future(queue.run(lambda: call(1), 1))
        await asyncio.to_thread(started.wait, 5)
        left = asyncio.ensure_future(queue.run(lambda: call(2), 1))
        while not batching._calls:
            await asyncio.sleep(0.005)
        left.cancel()
        await asyncio.wait([left])
        may_run.set()
        await first
        while queue.running:
            await asyncio.sleep(0.005)

    asyncio.run(check())
    assert (inputs, errors) == ([1], [WorkCancelledError])
