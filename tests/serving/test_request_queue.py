"""The request queue: order, memory, and work that nobody waits for any more."""

from __future__ import annotations

import asyncio
import functools
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from served import SMALL, encoded, picture, served, tiny
from starlette.exceptions import HTTPException
from waiting import eventually

from useg.inference.predictor import Predictor
from useg.serving import request_queue, responses, service, shared_network
from useg.serving.request_queue import RequestQueue, WorkCancelledError, check_cancelled
from useg.serving.responses import EncodedPrediction, ResponseFormat
from useg.serving.shared_network import BatchingFunction, LoadPlan
from useg.serving.uploads import Upload

pytestmark = pytest.mark.wheel

LARGE, SMALL_IMAGE = encoded(picture(200, 200)), encoded(picture(60, 40))


async def until(true: Callable[[], object]) -> None:
    """Let the event loop run until it is true."""
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.005)


def test_work_starts_in_order_within_the_memory() -> None:
    started: list[str] = []
    gate = threading.Event()

    def work(name: str) -> str:
        started.append(name)
        gate.wait(60)
        return name

    async def check() -> list[str]:
        queue = RequestQueue(threads=2, memory=100, waiting=9)
        sizes = {"a": 60, "b": 60, "c": 10, "d": 1000}
        tasks = [
            asyncio.ensure_future(queue.run(functools.partial(work, name), memory))
            for name, memory in sizes.items()
        ]
        await until(lambda: started and queue.waiting == 3)
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
        first = asyncio.ensure_future(queue.run(lambda: gate.wait(60), 1))
        second = asyncio.ensure_future(queue.run(lambda: True, 1))
        await until(lambda: (queue.running, queue.waiting) == (1, 1))
        with pytest.raises(HTTPException, match="the request queue is full \\(1 images wait\\)"):
            await queue.run(lambda: True, 1)
        second.cancel()
        first.cancel()
        await asyncio.wait([first, second])
        assert (queue.running, queue.waiting) == (1, 0)
        third = asyncio.ensure_future(queue.run(lambda: 3, 1))
        gate.set()
        assert await third == 3
        await until(lambda: (queue.running, queue.waiting) == (0, 0))

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
        await until(lambda: not queue.running)
        assert (left.cancelled(), queue.running, queue.waiting) == (True, 0, 0)

    asyncio.run(check())


@pytest.mark.parametrize("checks", [True, False])
def test_work_that_nobody_waits_for_stops(checks: bool) -> None:
    """Without the check it goes on, as the control shows."""
    started, may_go_on = threading.Event(), threading.Event()
    steps = 0

    def work() -> None:
        nonlocal steps
        started.set()
        assert may_go_on.wait(60)
        for _ in range(3):
            if checks:
                check_cancelled()
            steps += 1

    async def check() -> None:
        queue = RequestQueue(threads=1, memory=100, waiting=1)
        request = asyncio.ensure_future(queue.run(work, 1))
        await until(started.is_set)
        request.cancel()
        await asyncio.wait([request])
        may_go_on.set()
        await until(lambda: not queue.running)

    asyncio.run(check())
    assert steps == (0 if checks else 3)


def test_the_network_drops_calls_that_nobody_waits_for() -> None:
    started, may_run = threading.Event(), threading.Event()
    inputs: list[int] = []

    def network(x: np.ndarray) -> np.ndarray:
        inputs.append(int(x.max()))
        started.set()
        assert may_run.wait(60)
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
        await until(started.is_set)
        left = asyncio.ensure_future(queue.run(lambda: call(2), 1))
        await until(lambda: batching._calls)
        left.cancel()
        await asyncio.wait([left])
        may_run.set()
        await first
        await until(lambda: not queue.running)

    asyncio.run(check())
    assert (inputs, errors) == ([1], [WorkCancelledError])


@pytest.mark.parametrize(("share", "waits"), [(service.LARGE_SHARE, False), (1.0, True)])
def test_small_images_do_not_wait_for_large_ones(
    share: float, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one queue for both they wait, as the control shows."""
    may_run, predict_upload = threading.Event(), responses.predict_upload

    def slow(predictor: Predictor, upload: Upload, *others: Any) -> EncodedPrediction:
        assert upload.content != LARGE or may_run.wait(60)
        return predict_upload(predictor, upload, *others)

    monkeypatch.setattr(responses, "predict_upload", slow)
    monkeypatch.setattr(service, "LARGE_SHARE", share)
    with (
        served(limits=replace(SMALL, work_bytes=62_500_000), plan=LoadPlan()) as site,
        ThreadPoolExecutor(4) as clients,
    ):
        large = [clients.submit(site.ask, "/predict", LARGE) for _ in range(3)]
        queues = (site.service.queue, site.service.large_queue)
        eventually(lambda: sum(queue.running + queue.waiting for queue in queues) == 3)
        small = clients.submit(site.ask, "/predict", SMALL_IMAGE)
        done, _ = wait([small], timeout=0.3 if waits else 60)
        assert bool(done) != waits
        may_run.set()
        assert {future.result().status for future in (small, *large)} == {200}


@pytest.mark.parametrize("apart", [True, False])
def test_small_images_do_not_wait_for_a_window_of_a_large_one(
    apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one network for both they wait, as the control shows."""
    started, may_run, network = threading.Event(), threading.Event(), tiny().runtime.run

    def slow(x: np.ndarray) -> np.ndarray:
        if x.shape[-1] == 200:
            started.set()
            assert may_run.wait(60)
        return network(x)

    if not apart:
        monkeypatch.setattr(shared_network, "current_work", lambda: None)
    predictor = Predictor(replace(tiny().runtime, run=slow))
    limits = replace(SMALL, work_bytes=62_500_000)
    with served(predictor, limits, plan=LoadPlan()) as site, ThreadPoolExecutor(2) as clients:
        large = clients.submit(site.ask, "/predict", LARGE)
        assert started.wait(60)
        small = clients.submit(site.ask, "/predict", SMALL_IMAGE)
        done, _ = wait([small], timeout=60 if apart else 0.3)
        assert bool(done) == apart
        may_run.set()
        assert {future.result().status for future in (small, large)} == {200}
        assert site.service.network.counts.calls == 2


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities of their own here")
@pytest.mark.parametrize("niceness", [request_queue.LARGE_NICENESS, 0])
def test_threads_of_large_images_have_a_lower_priority(
    niceness: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control is a queue for large images whose threads are like all others."""
    priorities: dict[object, int] = {}
    predict_upload, network = responses.predict_upload, tiny().runtime.run

    def note(place: object) -> None:
        thread = threading.get_native_id()
        priorities[place] = os.getpriority(os.PRIO_PROCESS, thread)

    def noting_upload(predictor: Predictor, upload: Upload, *others: Any) -> EncodedPrediction:
        note(upload.content)
        return predict_upload(predictor, upload, *others)

    def noting_network(x: np.ndarray) -> np.ndarray:
        note(x.shape[-1])
        return network(x)

    monkeypatch.setattr(responses, "predict_upload", noting_upload)
    for module in (request_queue, shared_network):
        monkeypatch.setattr(module, "LARGE_NICENESS", niceness)
    predictor = Predictor(replace(tiny().runtime, run=noting_network))
    with served(predictor, replace(SMALL, work_bytes=62_500_000), plan=LoadPlan()) as site:
        for image in (LARGE, SMALL_IMAGE, LARGE):
            assert site.ask("/predict", image).status == 200
    own = os.getpriority(os.PRIO_PROCESS, 0)
    lower = min(19, own + niceness)
    assert priorities == {SMALL_IMAGE: own, 60: own, LARGE: lower, 200: lower}


@pytest.mark.parametrize(
    ("image", "response_format", "turns"),
    [(SMALL_IMAGE, "labels", 1), (SMALL_IMAGE, "probabilities", 2), (LARGE, "labels", 2)],
)
def test_a_small_image_takes_one_turn_of_a_thread(
    image: bytes, response_format: str, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others take one to check their size and that of the response, before they are decoded."""
    calls, run = [], RequestQueue.run

    async def counting_run(queue: RequestQueue, *arguments: Any) -> Any:
        calls.append(queue)
        return await run(queue, *arguments)

    monkeypatch.setattr(RequestQueue, "run", counting_run)
    with served(limits=replace(SMALL, work_bytes=62_500_000), plan=LoadPlan()) as site:
        assert site.ask(f"/predict?format={response_format}", image).status == 200
        assert len(calls) == turns
        assert (calls[-1] is site.service.large_queue) == (image is LARGE)


def test_polygons_count_as_large_where_noise_would_take_long() -> None:
    with served() as site:
        for side, is_large in ((100, False), (190, True)):
            needed = site.service.work_bytes(side, side)
            assert site.service.queue_for(1000, needed) is site.service.queue
            encoding = responses.encoding_bytes(ResponseFormat.POLYGONS, side, side)
            expected = site.service.large_queue if is_large else site.service.queue
            assert site.service.queue_for(1000, needed + encoding, encoding) is expected
        assert site.service.queue_for(3_000_000) is site.service.large_queue
