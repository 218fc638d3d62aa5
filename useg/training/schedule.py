"""A number of steps -> how far along each of them is; and a time -> that number, counted again while a run goes on."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from dataclasses import dataclass, field

import torch
from torch import nn

from useg.config import TrainSettings
from useg.distributed import broadcast_from_main

ENDING_VALIDATIONS = 5  # times as long as one scoring takes what follows the last step: that scoring, and calibration, scores and causes in fp32


COARSE_COST = 1 / 3  # of the time of another step: one that looks at everything at half the size


RECOUNT_SHARES = (
    0.2,
    0.4,
    0.7,
    0.85,
    0.95,
)  # of a run's course after which its steps are counted again


RECOUNT_WORTH = 0.01  # of the steps: smaller differences stay


@dataclass
class Schedule:
    """How many steps a run has.

    Args:
        steps: in all, as it stands.
        recounts: (step, steps) as many as there were to be in all until that step, where they were counted again.
        coarse: share of it, the first one, in which everything is looked at at half the size.
    """

    steps: int
    recounts: tuple[tuple[int, int], ...] = ()
    coarse: float = 0.0

    @property
    def planned(self) -> int:
        """How many steps there were to be at first."""
        return self.recounts[0][1] if self.recounts else self.steps

    def place(self, step: int) -> float:
        """Return how far along a step is, in steps of the first plan: after a recount the rest of these is spread over the steps that are left."""
        place, first = 0.0, 0
        for until, steps in (*self.recounts, (self.steps, self.steps)):
            place += (min(step, until) - first) * ((self.planned - place) / max(1, steps - first))
            if step <= until:
                break
            first = until
        return place

    @property
    def coarse_steps(self) -> int:
        """How many steps, the first ones, look at everything at half the size."""
        return bisect_left(
            range(self.steps + 1), True, key=lambda number: not self.is_coarse(number)
        )

    def is_coarse(self, number: int) -> bool:
        """Tell whether batch ``number`` (from 0) shows everything at half the size."""
        return self.place(number) < int(self.coarse * self.planned)

    def work(self, step: int) -> float:
        """Return how much the steps up to this one are to compute, in whole steps."""
        coarse = min(step, self.coarse_steps)
        return COARSE_COST * coarse + step - coarse

    def recount(self, step: int, rest: int) -> None:
        """Let there be ``rest`` steps after this one."""
        self.recounts, self.steps = (*self.recounts, (step, self.steps)), step + rest


@dataclass
class Timer:
    """Keeps a run within its time: a machine is as fast for minutes as it was for seconds only where nobody else works on it.

    Args:
        end: when a run is to have ended (``time.perf_counter``).
        validation: seconds that scoring takes.
        between: steps from one scoring to the next.
        since, step: when and after which step measuring began.
        scored: seconds that scorings took since.
        shares: of the course, that are still to come.
    """

    end: float
    validation: float
    between: float
    since: float = field(default_factory=lambda: time.perf_counter())
    step: int = 0
    scored: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=lambda: list(RECOUNT_SHARES))

    def fitting(self, now: float, step: float) -> float:
        """Return how many steps of so many seconds fit into what is left of the time, with their scorings and the end."""
        return (self.end - now - ENDING_VALIDATIONS * self.validation) / (
            step + self.validation / self.between
        )

    def keep(self, step: int, length: Schedule) -> bool:
        """Count the steps of a run again if it is time to; tell whether there are more or fewer now, half to twice what was left."""
        now = time.perf_counter()
        if (
            step == length.coarse_steps
        ):  # from here on the pace is measured, not guessed from that of coarse steps
            self.since, self.step, self.scored = now, step, []
        share = length.place(step) / length.planned
        if not self.shares or share < self.shares[0] or step in (self.step, length.steps):
            return False
        self.shares = [later for later in self.shares if later > share]
        if self.scored:
            self.validation = sum(self.scored) / len(self.scored)
        pace = (now - self.since - sum(self.scored)) / (length.work(step) - length.work(self.step))
        rest = length.steps - step
        fitting = round(
            self.fitting(now, pace * (length.work(length.steps) - length.work(step)) / rest)
        )
        wanted = broadcast_from_main(min(max(fitting, -(-rest // 2)), 2 * rest))
        self.since, self.step, self.scored = now, step, []
        if abs(wanted - rest) <= RECOUNT_WORTH * length.steps:
            return False
        length.recount(step, wanted)
        return True


def make_optimizer(
    network: nn.Module, encoder: nn.Module | None, settings: TrainSettings, length: Schedule
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Make AdamW (or Adam, which is the same without decay) and its schedule.

    Args:
        network: what is trained.
        encoder: the part of it that is pretrained, which learns more slowly; or None.
        settings: rates, decay, schedule.
        length: of the run.
    """
    assert settings.learning_rate
    decay = settings.weight_decay if settings.optimizer == "adamw" else 0.0
    learned = {id(parameter) for parameter in encoder.parameters()} if encoder else set()
    groups = []
    for slow in (False, True):
        rate = settings.learning_rate * (settings.encoder_rate if slow else 1.0)
        own = [
            parameter for parameter in network.parameters() if (id(parameter) in learned) == slow
        ]
        groups.append(
            {
                "params": [parameter for parameter in own if parameter.ndim > 1],
                "lr": rate,
                "weight_decay": decay,
            }
        )
        groups.append(
            {
                "params": [parameter for parameter in own if parameter.ndim == 1],
                "lr": rate,
                "weight_decay": 0.0,
            }
        )  # biases, normalisation
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], fused=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(settings.schedule, length.place(step), length.planned)
    )


def rate_factor(schedule: str, step: float, steps: int) -> float:
    """Return the learning rate of a step (from 0) as a share of the highest.

    ``onecycle`` rises for 15 % of the steps, then falls along a cosine to 0; ``cosine`` falls from the start.
    """
    if schedule == "constant":
        return 1.0
    rise = max(1, round(0.15 * steps)) if schedule == "onecycle" else 0
    if step < rise:
        return 0.04 + 0.96 * step / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
