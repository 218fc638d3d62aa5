"""Many things on all cores: in order, a few ahead, and no more once somebody has stopped."""

from __future__ import annotations

import threading
import time

from useg.machine import in_parallel


def test_results_come_in_the_order_of_the_things() -> None:
    assert list(in_parallel(lambda k: (time.sleep(0.002 * (k % 3)), k)[1], range(20), 3)) == list(
        range(20)
    )


def test_only_a_few_are_ahead() -> None:
    begun: list[int] = []
    results = in_parallel(begun.append, range(100), 2)
    next(results)
    time.sleep(0.05)
    assert len(begun) == 5
    results.close()


def test_what_has_not_begun_is_left_when_somebody_stops() -> None:
    begun: list[int] = []
    go_on = threading.Event()

    def work(k: int) -> None:
        begun.append(k)
        assert k == 0 or go_on.wait(10)

    results = in_parallel(work, range(100), 2)
    next(results)
    threading.Timer(0.05, go_on.set).start()
    results.close()
    assert begun == [0, 1, 2]
