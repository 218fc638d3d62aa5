"""A run ends in its time, however the machine's speed changes meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from useg.training.schedule import ENDING_VALIDATIONS, Schedule, Timer


def test_without_recounts_a_step_is_where_its_number_says() -> None:
    assert [Schedule(7).place(step) for step in range(8)] == [0, 1, 2, 3, 4, 5, 6, 7]


def test_after_a_recount_the_rest_of_the_course_is_spread_over_the_steps_that_are_left() -> None:
    length = Schedule(10)
    length.recount(4, 3)
    assert (length.steps, length.planned, length.recounts) == (7, 10, ((4, 10),))
    assert [length.place(step) for step in range(8)] == pytest.approx([0, 1, 2, 3, 4, 6, 8, 10])
    length.recount(6, 4)
    assert [length.place(step) for step in range(5, 11)] == pytest.approx([6, 8, 8.5, 9, 9.5, 10])
    assert Schedule(length.steps, length.recounts) == length


@pytest.mark.parametrize("coarse", [0.0, 0.67])
@pytest.mark.parametrize(
    "speed",
    [
        lambda share: 0.8,
        lambda share: 1.2,
        lambda share: 1 if share < 0.3 else 0.8,
        lambda share: 1.3 - 0.5 * share,
        lambda share: 2.4,
    ],
)
def test_a_run_ends_in_its_time_on_a_machine_that_changes_its_speed(
    speed: Callable[[float], float], coarse: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, steps, between, scoring, pace, third = 0.0, 400, 50, 0.5, 0.25, 2.5
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    first = int(coarse * steps)  # as planned
    total = (first / third + steps - first) * pace + (
        steps // between - first // between + ENDING_VALIDATIONS
    ) * scoring
    length, timer = Schedule(steps, coarse=coarse), Timer(total, scoring, between)
    step = 0
    while step < length.steps:
        step += 1
        now += pace / (third if length.is_coarse(step - 1) else 1) / speed(now / total)
        if step % between == 0 and step > length.coarse_steps:
            timer.scored.append(scoring / speed(now / total))
            now += timer.scored[-1]
        timer.keep(step, length)
    now += ENDING_VALIDATIONS * scoring / speed(now / total)
    assert now == pytest.approx(total, rel=0.03)
    assert 1 <= len(length.recounts) <= 5
    assert length.place(length.coarse_steps) == pytest.approx(
        first, abs=2
    )  # the share at half the size stays what it was


def test_a_machine_that_slept_does_not_cut_the_rest_off(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    length, timer = Schedule(100), Timer(100.0, 0.1, 50)
    now = 3600.0
    assert timer.keep(40, length)
    assert length.steps == 70
    now += 30
    assert not timer.keep(41, length)  # not yet due


def test_a_small_difference_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    length, timer = Schedule(100), Timer(100.0, 0.0, 50)
    now = 40.3
    assert not timer.keep(40, length)
    assert length == Schedule(100)
