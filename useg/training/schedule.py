"""The length of a run and its learning rate: how many steps, at half or full size, at which rate.

A run that has a time limit measures its speed while it trains, and changes its number of steps so
that it finishes on time (:class:`TimeBudget`). The learning rate follows the planned course
whatever happens: after a change, the rest of the course is spread over the remaining steps. The
changes are stored in ``run.toml`` (``train.recounts``), so that the run can be repeated exactly.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from dataclasses import dataclass, field

import torch
from torch import nn

from useg.config import TrainSettings
from useg.distributed import broadcast_from_main

# What follows the last step takes as long as this many validations: the last validation, and
# calibration, scores and error analysis in fp32.
ENDING_VALIDATIONS = 5

# A training step at half the size takes this share of the time of a step at full size.
COARSE_STEP_COST = 1 / 3

# The steps are counted again after these shares of a run.
RECOUNT_SHARES = (0.2, 0.4, 0.7, 0.85, 0.95)

# A recount that would change the number of steps by less than this share changes nothing.
MIN_RECOUNT_CHANGE = 0.01


@dataclass
class Schedule:
    """How many steps a run has.

    Args:
        steps: Number of steps in all, after the latest recount.
        recounts: ``(step, steps)`` for each recount: the step after which it happened, and the
            number of steps before it.
        coarse: Share of the run, from its beginning, that trains at half the size.
    """

    steps: int
    recounts: tuple[tuple[int, int], ...] = ()
    coarse: float = 0.0

    @property
    def planned_steps(self) -> int:
        """Number of steps before the first recount."""
        return self.recounts[0][1] if self.recounts else self.steps

    def position(self, step: int) -> float:
        """Return the position of a step in the run, in steps of the first plan."""
        position, first = 0.0, 0
        for until, steps in (*self.recounts, (self.steps, self.steps)):
            rate = (self.planned_steps - position) / max(1, steps - first)
            position += (min(step, until) - first) * rate
            if step <= until:
                break
            first = until
        return position

    @property
    def coarse_steps(self) -> int:
        """Number of steps, from the first one, that train at half the size."""
        steps = range(self.steps + 1)
        return bisect_left(steps, True, key=lambda number: not self.is_coarse(number))

    def is_coarse(self, number: int) -> bool:
        """Return whether batch ``number`` (from 0) is at half the size."""
        return self.position(number) < int(self.coarse * self.planned_steps)

    def work(self, step: int) -> float:
        """Return how much the steps up to this one compute, in steps at full size."""
        coarse = min(step, self.coarse_steps)
        return COARSE_STEP_COST * coarse + step - coarse

    def recount(self, step: int, remaining: int) -> None:
        """Set the number of steps that remain after this one."""
        self.recounts, self.steps = (*self.recounts, (step, self.steps)), step + remaining


@dataclass
class TimeBudget:
    """Keeps a run within its time, also when the machine becomes slower or faster meanwhile.

    Args:
        end: When the run has to be finished (``time.perf_counter``).
        validation_seconds: How long a validation takes.
        validation_interval: Steps from one validation to the next.
        since, step: When and after which step the current measurement began.
        validations: Seconds that each validation took since then.
        shares: Shares of the run after which the steps are still to be counted again.
    """

    end: float
    validation_seconds: float
    validation_interval: float
    since: float = field(default_factory=lambda: time.perf_counter())
    step: int = 0
    validations: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=lambda: list(RECOUNT_SHARES))

    def fitting_steps(self, now: float, step_seconds: float) -> float:
        """Return how many steps, with their validations and the end, fit into the time left."""
        left = self.end - now - ENDING_VALIDATIONS * self.validation_seconds
        return left / (step_seconds + self.validation_seconds / self.validation_interval)

    def is_recount_due(self, step: int, schedule: Schedule) -> bool:
        """Return whether :meth:`recount` would do something after this step."""
        share = schedule.position(step) / schedule.planned_steps
        return step == schedule.coarse_steps or bool(self.shares and share >= self.shares[0])

    def recount(self, step: int, schedule: Schedule) -> bool:
        """Count the remaining steps again if it is time to; return whether their number changes.

        One recount changes the number of remaining steps by a factor of 2 at most.
        """
        now = time.perf_counter()
        if step == schedule.coarse_steps:
            # From here on, the speed of full-size steps is measured instead of estimated.
            self._restart(now, step)
        share = schedule.position(step) / schedule.planned_steps
        due = self.shares and share >= self.shares[0] and step not in (self.step, schedule.steps)
        if not due:
            return False
        self.shares = [later for later in self.shares if later > share]
        if self.validations:
            self.validation_seconds = sum(self.validations) / len(self.validations)
        measured = schedule.work(step) - schedule.work(self.step)
        pace = (now - self.since - sum(self.validations)) / measured
        remaining = schedule.steps - step
        work = schedule.work(schedule.steps) - schedule.work(step)
        fitting = round(self.fitting_steps(now, pace * work / remaining))
        fitting = broadcast_from_main(min(max(fitting, -(-remaining // 2)), 2 * remaining))
        self._restart(now, step)
        if abs(fitting - remaining) <= MIN_RECOUNT_CHANGE * schedule.steps:
            return False
        schedule.recount(step, fitting)
        return True

    def _restart(self, now: float, step: int) -> None:
        self.since, self.step, self.validations = now, step, []


def make_optimizer(
    network: nn.Module, encoder: nn.Module | None, settings: TrainSettings, schedule: Schedule
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Make AdamW (or Adam, which is the same without weight decay) and its scheduler.

    Biases and normalization parameters do not decay.

    Args:
        network: What is trained.
        encoder: Its pretrained part, which has a lower learning rate; or None.
        settings: Learning rates, weight decay, kind of schedule.
        schedule: The number of steps.
    """
    assert settings.learning_rate
    decay = settings.weight_decay if settings.optimizer == "adamw" else 0.0
    pretrained = {id(parameter) for parameter in encoder.parameters()} if encoder else set()
    groups = []
    for is_encoder in (False, True):
        rate = settings.learning_rate * (settings.encoder_rate if is_encoder else 1.0)
        own = [each for each in network.parameters() if (id(each) in pretrained) == is_encoder]
        matrices = [parameter for parameter in own if parameter.ndim > 1]
        vectors = [parameter for parameter in own if parameter.ndim == 1]
        groups.append({"params": matrices, "lr": rate, "weight_decay": decay})
        groups.append({"params": vectors, "lr": rate, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], fused=True)

    def factor(step: int) -> float:
        return rate_factor(settings.schedule, schedule.position(step), schedule.planned_steps)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def rate_factor(schedule: str, step: float, steps: int) -> float:
    """Return the learning rate of a step (from 0) as a share of the highest.

    ``onecycle`` rises for 15 % of the steps, then falls along a cosine to 0; ``cosine`` falls from
    the start.
    """
    if schedule == "constant":
        return 1.0
    rise = max(1, round(0.15 * steps)) if schedule == "onecycle" else 0
    if step < rise:
        return 0.04 + 0.96 * step / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
