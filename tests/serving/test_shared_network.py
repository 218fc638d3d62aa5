"""Batching of a network's calls, and the memory of images."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from served import SMALL, served, tiny

from useg.errors import UsageError
from useg.inference.predictor import Predictor
from useg.serving import shared_network
from useg.serving.request_queue import image_threads
from useg.serving.shared_network import (
    MAX_CHECKED_SHAPES,
    BatchingFunction,
    ExactShapes,
    LoadPlan,
    SharedNetwork,
    find_plan,
)

pytestmark = pytest.mark.wheel


class DoublingNetwork:
    """Doubles its input once it may; records the shapes of its inputs."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.may_run = threading.Event()

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.shapes.append(x.shape)
        assert self.may_run.wait(60)
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
    ("threads", "on_threads", "seconds", "expected"),
    [
        (2, 0.002, lambda count: 0.002 * count, LoadPlan(1, threads=2)),
        (2, 0.005, lambda count: 0.002 * count, LoadPlan()),
        (2, 0.020, lambda count: 0.018 * count, LoadPlan(1, threads=2)),
        (2, 0.002, lambda count: 0.0017 * count if count > 1 else 0.002, LoadPlan(1, threads=2)),
        (1, 0.001, lambda count: 0.002 * count, LoadPlan()),
        (2, 0.004, lambda count: 0.004 + 0.0005 * count, LoadPlan(8)),
        (2, 0.004, lambda count: 0.01 if count > 2 else 0.004, LoadPlan(8)),
        (2, 0.005, lambda count: 0.05 * count if count > 2 else 0.004, LoadPlan(2)),
        (2, 0.001, lambda count: 1.0, LoadPlan()),
    ],
)
def test_the_plan_is_the_fastest(
    threads: int,
    on_threads: float,
    seconds: Callable[[int], float],
    expected: LoadPlan,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shared_network.torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(shared_network, "measure_seconds", lambda network, x: seconds(len(x)))
    monkeypatch.setattr(shared_network, "_seconds_on_threads", lambda *arguments: on_threads)
    monkeypatch.setattr(shared_network, "probe_size", lambda description: (16, 16))
    assert find_plan(lambda x: x.astype(np.float32), tiny().runtime.description) == expected


def test_the_trial_computes_an_image_in_each_thread() -> None:
    both_run, threads = threading.Barrier(2), set()

    def network(x: np.ndarray) -> np.ndarray:
        both_run.wait(60)
        threads.add((threading.get_ident(), torch.get_num_threads()))
        return x

    assert shared_network._seconds_on_threads(network, block(1, 1, 1, 2, 2), 2) > 0
    assert sorted(count for _, count in threads) == [1, 1]


def shared(network: Callable[[np.ndarray], np.ndarray], is_loaded: bool) -> SharedNetwork:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        return SharedNetwork(network, LoadPlan(threads=2), 10, lambda: is_loaded)
    finally:
        torch.set_num_threads(threads)


def test_an_image_that_is_alone_is_computed_by_all_threads() -> None:
    for is_loaded, expected in ((False, [2, 2]), (True, [1, 2, 1])):
        threads: list[int] = []

        def network(x: np.ndarray, threads: list[int] = threads) -> np.ndarray:
            threads.append(torch.get_num_threads())
            return x.astype(np.float32)

        both = shared(network, is_loaded)
        with image_threads(1) as pool:
            for _ in range(2):
                np.testing.assert_array_equal(
                    pool.submit(both, block(3, 1, 1, 2, 2)).result(60), block(3, 1, 1, 2, 2)
                )
        # The first image of a shape is computed both ways.
        assert threads == expected
        assert both.counts.images == len(expected)


def test_an_image_larger_than_the_working_size_is_computed_by_all_threads() -> None:
    threads: list[int] = []

    def network(x: np.ndarray) -> np.ndarray:
        threads.append(torch.get_num_threads())
        return x.astype(np.float32)

    both = shared(network, True)
    with image_threads(1) as pool:
        pool.submit(both, block(3, 1, 1, 4, 5)).result(60)
        pool.submit(both, block(3, 1, 1, 3, 7)).result(60)
    assert threads == [1, 2, 2]


def test_images_are_computed_by_all_threads_where_one_rounds_differently() -> None:
    def network(x: np.ndarray) -> np.ndarray:
        return x + np.float32(1e-6 if torch.get_num_threads() == 1 else 0)

    both = shared(network, True)
    with image_threads(1) as pool:
        for _ in range(3):
            x = block(3, 1, 1, 2, 2)
            np.testing.assert_array_equal(pool.submit(both, x).result(60), x)
    assert both.counts.calls == 4


def test_after_many_shapes_others_are_trusted_to_be_like_them() -> None:
    for exception in (None, 3):
        shapes = ExactShapes()
        for k in range(MAX_CHECKED_SHAPES):
            assert shapes.known((k,)) is None
            shapes.add((k,), k != exception)
        assert shapes.known((3,)) == shapes.known((100,)) == (exception is None)
        assert shapes.known((4,))


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


def test_the_memory_of_a_service_counts_the_activations_of_its_network() -> None:
    memory = {}
    for pixel_bytes in (50_000, 100_000):
        predictor = Predictor(replace(tiny().runtime, pixel_bytes=pixel_bytes))
        with served(predictor, plan=LoadPlan()) as site:
            memory[pixel_bytes] = site.ask("/model").json["limits"]["memory"]
    # Of a small image beside a large one.
    added = 2 * SMALL.pixels * 50_000
    assert memory[100_000] - memory[50_000] == pytest.approx(added, rel=0.001)
