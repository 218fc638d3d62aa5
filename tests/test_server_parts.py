"""The parts of the service by themselves: calls that are computed together, the line, what a client accepts, limits."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from served import tiny

from useg.errors import UsageError
from useg.serving import service
from useg.serving.middleware import Limits, Metrics, RefusalError
from useg.serving.responses import Form, name_of, negotiated
from useg.serving.run import listen
from useg.serving.service import BatchingFunction, RequestQueue, best_batch

pytestmark = pytest.mark.wheel


class Counting:
    """A network that doubles, waits at the first call until it is let, and remembers the shapes that it was given."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.let = threading.Event()

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.shapes.append(x.shape)
        assert self.let.wait(10)
        if x.max() == 13:
            raise UsageError("unlucky")
        return 2 * x.astype(np.float32)


def call_all(network: Counting, most: int, values: int, inputs: list[np.ndarray]) -> list[object]:
    """Call a gathering network by as many threads, the first while nothing else is there."""
    gathering = BatchingFunction(network, most, values)
    answers: list[object] = [None] * len(inputs)

    def call(k: int) -> None:
        try:
            answers[k] = gathering(inputs[k])
        except UsageError as error:
            answers[k] = error

    threads = [threading.Thread(target=call, args=(k,)) for k in range(len(inputs))]
    for k, thread in enumerate(threads):
        thread.start()
        while len(gathering._calls) < k or not network.shapes:
            time.sleep(0.001)
    network.let.set()
    for thread in threads:
        thread.join()
    return answers


def block(value: int, *shape: int) -> np.ndarray:
    return np.full(shape, value, np.uint8)


def test_calls_that_gather_are_computed_together_and_answered_apart() -> None:
    network = Counting()
    inputs = [block(k, 1, 3, 4, 4) for k in range(6)]
    answers = call_all(network, 4, 10_000, inputs)
    assert [shape[0] for shape in network.shapes] == [
        1,
        1,
        1,
        1,
        1,
        4,
        1,
    ]  # the first four are tried both ways
    for x, answer in zip(inputs, answers, strict=True):
        np.testing.assert_array_equal(answer, 2.0 * x)  # type: ignore[arg-type]


def test_only_pictures_of_one_size_and_not_too_large_are_computed_together() -> None:
    network = Counting()
    shapes = [(1, 1, 2, 2), (1, 1, 2, 2), (1, 1, 2, 3), (1, 1, 2, 2), (1, 1, 9, 9), (1, 1, 9, 9)]
    call_all(network, 8, 100, [block(1, *shape) for shape in shapes])
    assert [shape for shape in network.shapes if shape[0] > 1] == [(2, 1, 2, 2)]
    assert network.shapes[-3:] == [(1, 1, 2, 3), (1, 1, 9, 9), (1, 1, 9, 9)]


def test_a_failure_reaches_those_who_called_and_the_next_call_is_computed() -> None:
    network = Counting()
    answers = call_all(network, 1, 100, [block(13, 1, 1, 2, 2), block(1, 1, 1, 2, 2)])
    assert isinstance(answers[0], UsageError)
    np.testing.assert_array_equal(answers[1], np.full((1, 1, 2, 2), 2.0))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (lambda count: 0.002 * count, 1),
        (lambda count: 0.004 + 0.0005 * count, 8),
        (lambda count: 0.01 if count > 2 else 0.004, 8),
        (lambda count: 0.05 * count if count > 2 else 0.004, 2),
    ],
)
def test_a_batch_has_to_pay(
    seconds: Callable[[int], float], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "seconds_of", lambda network, x: seconds(len(x)))
    monkeypatch.setattr(service, "probe_size", lambda card: (16, 16))
    assert best_batch(lambda x: x.astype(np.float32), tiny().runtime.description) == expected


def test_where_a_batch_rounds_differently_pictures_are_computed_alone() -> None:
    shapes = []

    def network(x: np.ndarray) -> np.ndarray:
        shapes.append(len(x))
        return x.astype(np.float32) + np.float32(1e-6 if len(x) == 3 else 0)

    gathering = BatchingFunction(network, 8, 1000)
    for count, computed in ((2, [1, 1, 2]), (2, [2]), (3, [1, 1, 1, 3]), (3, [1, 1, 1])):
        shapes.clear()
        pictures = [block(k, 1, 1, 2, 2) for k in range(count)]
        np.testing.assert_array_equal(gathering._answers(pictures), np.stack(pictures))  # type: ignore[arg-type]
        assert shapes == computed


def test_the_desk_serves_in_order_and_large_pictures_take_turns() -> None:
    begun: list[str] = []
    gate = threading.Event()

    def work(name: str) -> str:
        begun.append(name)
        gate.wait(5)
        return name

    async def visit() -> list[str]:
        desk = RequestQueue(threads=2, pixels=100, waiting=9)
        sizes = {"a": 60, "b": 60, "c": 10, "d": 1000}
        tasks = [
            asyncio.ensure_future(desk.do(lambda name=name: work(name), pixels))
            for name, pixels in sizes.items()
        ]  # type: ignore[misc]
        await asyncio.sleep(0.05)
        assert (begun, desk.working, desk.waiting) == (
            ["a"],
            1,
            3,
        )  # b does not fit beside a, and c waits behind b
        gate.set()
        return await asyncio.gather(*tasks)

    assert asyncio.run(visit()) == ["a", "b", "c", "d"]
    assert begun[0] == "a"
    assert begun[-1] == "d"


def test_who_leaves_the_line_makes_room_and_work_that_was_begun_keeps_its_place() -> None:
    gate = threading.Event()

    async def visit() -> None:
        desk = RequestQueue(threads=1, pixels=100, waiting=1)
        first = asyncio.ensure_future(desk.do(lambda: gate.wait(5), 1))
        second = asyncio.ensure_future(desk.do(lambda: True, 1))
        await asyncio.sleep(0.02)
        with pytest.raises(RefusalError, match="1 pictures are waiting already"):
            await desk.do(lambda: True, 1)
        second.cancel()
        first.cancel()
        await asyncio.sleep(0.02)
        assert (desk.working, desk.waiting) == (1, 0)
        third = asyncio.ensure_future(desk.do(lambda: 3, 1))
        gate.set()
        assert await third == 3
        await asyncio.sleep(0.02)
        assert (desk.working, desk.waiting) == (0, 0)

    asyncio.run(visit())


def test_who_leaves_in_the_moment_of_being_called_gives_the_place_back() -> None:
    async def visit() -> None:
        desk = RequestQueue(threads=1, pixels=100, waiting=1)
        desk.working = 1
        called = asyncio.ensure_future(desk.do(lambda: True, 1))
        await asyncio.sleep(0)
        desk.working = 0
        desk._call_in()
        called.cancel()
        await asyncio.wait([called])
        assert (called.cancelled(), desk.working, desk.waiting) == (True, 0, 0)

    asyncio.run(visit())


def test_who_has_left_but_does_not_know_yet_is_not_called() -> None:
    async def visit() -> None:
        desk = RequestQueue(threads=1, pixels=100, waiting=2)
        desk.working = 1
        left, next_one = (
            asyncio.ensure_future(desk.do(lambda name=name: name, 1)) for name in ("left", "next")
        )  # type: ignore[misc]
        await asyncio.sleep(0)
        left.cancel()
        desk.working = 0
        desk._call_in()  # in the same turn of the loop, in which a thread becomes free
        assert await next_one == "next"
        await asyncio.sleep(0.02)
        assert (left.cancelled(), desk.working, desk.waiting) == (True, 0, 0)

    asyncio.run(visit())


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", Form.JSON),
        ("*/*", Form.JSON),
        ("image/png", Form.LABELS),
        ("image/*", Form.LABELS),
        ("text/html, image/png;q=0.5, application/json;q=0.4", Form.LABELS),
        ("image/png;q=0.2, */*;q=0.1", Form.LABELS),
        ("image/png;q=0, */*", Form.JSON),
        ("application/json;q=0, application/*", Form.POLYGONS),
        ("application/geo+json", Form.POLYGONS),
        ("APPLICATION/X-NPZ", Form.PROBABILITIES),
    ],
)
def test_negotiation(accept: str, expected: Form) -> None:
    assert negotiated(None, accept) is expected
    assert negotiated(Form.OVERLAY, accept) is Form.OVERLAY


@pytest.mark.parametrize(
    "accept",
    ["text/html", "image/jpeg", "*/*;q=0", "application/json;q=nan", "image/png;q=-1", ";;;,,"],
)
def test_nothing_acceptable(accept: str) -> None:
    with pytest.raises(RefusalError, match="nothing is answered as"):
        negotiated(None, accept)


def test_histograms_count_from_below() -> None:
    metrics = Metrics()
    for seconds in (0.01, 0.02, 99):
        metrics.request("/predict", 200, seconds)
    lines = metrics.text({"x_total": ("What.", 3)}).splitlines()
    for line in (
        'useg_request_seconds_bucket{route="/predict",le="0.01"} 1',
        'useg_request_seconds_bucket{route="/predict",le="30.0"} 2',
        'useg_request_seconds_bucket{route="/predict",le="+Inf"} 3',
        'useg_request_seconds_sum{route="/predict"} 99.030000',
        "# TYPE x_total counter",
        "x_total 3",
    ):
        assert line in lines


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/street", "street"),
        ("runs/street/model.safetensors", "street"),
        ("a/b.onnx", "b"),
        ("b.xml", "b"),
        (".", Path.cwd().name),
    ],
)
def test_a_model_is_called_as_its_folder_or_file(path: str, name: str) -> None:
    assert name_of(Path(path)) == name


def test_limits_and_addresses_that_cannot_be() -> None:
    with pytest.raises(
        UsageError,
        match="the limit 'waiting' is 0, but nothing could be served below 1; give a number above 0",
    ):
        Limits(waiting=0)
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            UsageError,
            match=f"127.0.0.1:{port} cannot be listened to .*; choose another --host or --port",
        ):
            listen("127.0.0.1", port)
