"""Runs end on time when the speed of the machine changes; learning rates follow their schedule."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from useg.config import TrainSettings
from useg.models.unet import UNet
from useg.training.schedule import (
    ENDING_VALIDATIONS,
    Schedule,
    TimeBudget,
    make_optimizer,
    rate_factor,
)


def test_position_without_recounts_is_the_step() -> None:
    assert [Schedule(7).position(step) for step in range(8)] == [0, 1, 2, 3, 4, 5, 6, 7]


def test_recount_spreads_the_rest_of_the_course_over_the_remaining_steps() -> None:
    schedule = Schedule(10)
    schedule.recount(4, 3)
    assert (schedule.steps, schedule.planned_steps, schedule.recounts) == (7, 10, ((4, 10),))
    assert [schedule.position(step) for step in range(8)] == pytest.approx(
        [0, 1, 2, 3, 4, 6, 8, 10]
    )
    schedule.recount(6, 4)
    assert [schedule.position(step) for step in range(5, 11)] == pytest.approx(
        [6, 8, 8.5, 9, 9.5, 10]
    )
    assert Schedule(schedule.steps, schedule.recounts) == schedule


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
def test_run_ends_on_time_when_the_speed_changes(
    speed: Callable[[float], float], coarse: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, steps, between, validation, pace, speedup = 0.0, 400, 50, 0.5, 0.25, 2.5
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    coarse_steps = int(coarse * steps)
    num_validations = steps // between - coarse_steps // between + ENDING_VALIDATIONS
    training = (coarse_steps / speedup + steps - coarse_steps) * pace
    total = training + num_validations * validation
    schedule, budget = Schedule(steps, coarse=coarse), TimeBudget(total, validation, between)
    step = 0
    while step < schedule.steps:
        step += 1
        now += pace / (speedup if schedule.is_coarse(step - 1) else 1) / speed(now / total)
        if step % between == 0 and step > schedule.coarse_steps:
            budget.validations.append(validation / speed(now / total))
            now += budget.validations[-1]
        budget.recount(step, schedule)
    now += ENDING_VALIDATIONS * validation / speed(now / total)
    assert now == pytest.approx(total, rel=0.03)
    assert 1 <= len(schedule.recounts) <= 5
    # The share of the steps at half the size stays what it was.
    assert schedule.position(schedule.coarse_steps) == pytest.approx(coarse_steps, abs=2)


def test_one_recount_halves_the_remaining_steps_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    schedule, budget = Schedule(100), TimeBudget(100.0, 0.1, 50)
    now = 3600.0
    assert budget.recount(40, schedule)
    assert schedule.steps == 70
    now += 30
    # The next recount is not due yet.
    assert not budget.recount(41, schedule)


def test_small_difference_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    schedule, budget = Schedule(100), TimeBudget(100.0, 0.0, 50)
    now = 40.3
    assert not budget.recount(40, schedule)
    assert schedule == Schedule(100)


@pytest.mark.parametrize("kind", ["onecycle", "cosine", "constant"])
def test_learning_rate_starts_peaks_and_ends_where_it_should(kind: str) -> None:
    factors = [rate_factor(kind, step, 200) for step in range(200)]
    assert max(factors) == pytest.approx(1)
    assert min(factors) >= 0
    if kind == "constant":
        assert set(factors) == {1.0}
        return
    assert factors[-1] < 0.001
    assert factors.index(max(factors)) == (30 if kind == "onecycle" else 0)


def test_encoder_has_a_lower_rate_and_only_matrices_decay() -> None:
    network = UNet(1, 2, width=2, depth=1, normalize=True)
    settings = TrainSettings(learning_rate=0.1, encoder_rate=0.5, schedule="constant")
    optimizer, _ = make_optimizer(network, network.down, settings, Schedule(10))
    num_parameters = sum(len(group["params"]) for group in optimizer.param_groups)
    assert num_parameters == len(list(network.parameters()))
    slow = {id(parameter) for parameter in network.down.parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["lr"] == pytest.approx(0.05 if id(parameter) in slow else 0.1)
            assert (group["weight_decay"] > 0) == (parameter.ndim > 1)
