"""The length of a run, its learning rate and its optimizer.

A run with a time limit keeps measuring its speed, and changes its number of steps so that it
finishes on time (:class:`TimeBudget`). After such a recount, the rest of the learning-rate schedule
is spread over the remaining steps, so the schedule always ends with the run. Recounts are stored in
``run.toml`` (``train.recounts``), so that the run can be repeated exactly.
"""

from __future__ import annotations

import copy
import math
import time
from bisect import bisect_left, bisect_right
from collections import deque
from dataclasses import dataclass, replace
from itertools import islice
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from useg.device import CPU, WARMUP_CALLS
from useg.distributed import broadcast_from_main, is_distributed
from useg.models.encoders import EncoderUNet
from useg.training.plan_rules import COARSE_STEP_COST
from useg.training.trainer import Trainer, validate

# The steps are recounted when this share of the whole time has passed since the last count, or this
# share of the steps that remained, whichever comes first.
RECOUNT_TIME_SHARE = 0.02
RECOUNT_REMAINING_SHARE = 0.1

# A recount that would change the number of remaining steps by less than this share changes nothing.
MIN_RECOUNT_CHANGE = 0.02

# The speed is that of the latest steps, which took this share of the whole time, and are at least
# this many.
SPEED_TIME_SHARE = 0.03
MIN_SPEED_STEPS = 4

# A step that took longer than this many typical ones was interrupted, for example because the
# computer slept. It counts as a typical one.
MAX_STEP_RATIO = 5.0

# A validation, or the report, is never expected to take more than this share of the time: a longer
# measurement was interrupted.
MAX_REST_SHARE = 0.1

# If the time is over before the schedule is, the rest of the schedule takes this share of the time,
# so that the learning rate falls to its end. The less of it is left, the less time it gets.
COOL_DOWN_SHARE = 0.02

# Validation may take this share of the time of a run.
MAX_VALIDATION_SHARE = 0.15

# The time of a step is measured in at most this many steps.
MAX_PROBE_STEPS = 40

# Time to load Python and PyTorch, and to end the process.
RESERVED_SECONDS = 3.0

# A timed run is planned with at least this many steps, so that a recount is possible: the first
# measurement may have been disturbed.
MIN_FIRST_STEPS = MIN_SPEED_STEPS + 1

# The report is assumed to take as long as this many validations, until it has been measured.
REPORT_VALIDATIONS = 5


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

    def __post_init__(self) -> None:
        self._divide_into_parts()

    def _divide_into_parts(self) -> None:
        """Compute for each part between recounts: its first step, position there, and rate."""
        self._parts: list[tuple[int, float, float]] = []
        first, position = 0, 0.0
        for until, steps in (*self.recounts, (self.steps, self.steps)):
            rate = (self.planned_steps - position) / max(1, steps - first)
            self._parts.append((first, position, rate))
            first, position = until, position + (until - first) * rate
        numbers = range(self.steps + 1)
        # Number of steps, from the first one, that train at half the size.
        self.coarse_steps = bisect_left(numbers, True, key=lambda k: not self.is_coarse(k))

    @property
    def planned_steps(self) -> int:
        """Number of steps before the first recount."""
        return self.recounts[0][1] if self.recounts else self.steps

    def position(self, step: int) -> float:
        """Return the position of a step in the run, in steps of the first plan."""
        part = bisect_left(self._parts, step, key=lambda part: part[0]) - 1
        first, position, rate = self._parts[max(0, part)]
        return position + (min(step, self.steps) - first) * rate

    def is_coarse(self, number: int) -> bool:
        """Return whether batch ``number`` (from 0) is at half the size."""
        return self.position(number) < int(self.coarse * self.planned_steps)

    def coarse_share(self, step: int) -> float:
        """Return the share of the steps after this one that train at half the size."""
        planned, position = self.planned_steps, self.position(step)
        left = int(self.coarse * planned) - position
        return max(0.0, left / (planned - position)) if position < planned else 0.0

    def work(self, step: int) -> float:
        """Return the work of the steps up to this one, in steps at full size."""
        coarse = min(step, self.coarse_steps)
        return COARSE_STEP_COST * coarse + step - coarse

    def recount(self, step: int, remaining: int) -> None:
        """Set the number of steps that remain after this one."""
        self.recounts, self.steps = (*self.recounts, (step, self.steps)), step + remaining
        self._divide_into_parts()


@dataclass
class TimeBudget:
    """Keeps a run within its time, even if the machine becomes slower or faster.

    The unit of all work is a training step at full size: a slower machine slows down validations
    and the report as much as the steps.

    Args:
        end: When everything has to be finished (``time.perf_counter``).
        seconds: The whole time of the run.
        step_seconds: How long a step at full size took when it was first measured.
        validation_seconds: How long a validation took then.
        validation_interval: Steps from one validation to the next.
        report_seconds: How long the report, and what else follows training, would have taken then.
        coarse_cost: Time of a step at half the size, as a share of one at full size.
    """

    end: float
    seconds: float
    step_seconds: float
    validation_seconds: float
    validation_interval: float
    report_seconds: float = 0.0
    coarse_cost: float = COARSE_STEP_COST

    def __post_init__(self) -> None:
        self._since = time.perf_counter()
        # The latest steps: their work, in steps at full size, and their seconds.
        self._latest: deque[tuple[float, float]] = deque()
        self._latest_seconds = 0.0
        self._validation_costs = [self.validation_seconds / self.step_seconds]
        self._report_cost = self.report_seconds / self.step_seconds
        self.next_recount = 1

    def step_done(self, *, is_coarse: bool) -> None:
        """Measure the step that has just ended."""
        seconds = self._lap()
        self._latest.append((self.coarse_cost if is_coarse else 1.0, seconds))
        self._latest_seconds += seconds
        if seconds > RECOUNT_TIME_SHARE * self.seconds and not is_distributed():
            # Processes of a group might decide differently, so they wait for the next recount.
            self.next_recount = 0
        while (
            len(self._latest) > MIN_SPEED_STEPS
            and self._latest_seconds - self._latest[0][1] >= SPEED_TIME_SHARE * self.seconds
        ):
            self._latest_seconds -= self._latest.popleft()[1]

    def validated(self) -> None:
        """Measure the validation that has just ended."""
        self._validation_costs.append(self._lap() / self.seconds_per_step())

    def report_measured(self, seconds: float) -> None:
        """Take in how long the report would take now."""
        self._report_cost = seconds / self.seconds_per_step()

    def restart_clock(self) -> None:
        """Leave out the time since the last step: its cause will not happen again."""
        self._since = time.perf_counter()

    def _lap(self) -> float:
        before, self._since = self._since, time.perf_counter()
        return self._since - before

    def seconds_per_step(self) -> float:
        """Return how long a step at full size takes at present, in seconds."""
        if len(self._latest) < MIN_SPEED_STEPS:
            return self.step_seconds
        typical = median(seconds / work for work, seconds in self._latest)
        total = sum(
            seconds if seconds <= MAX_STEP_RATIO * typical * work else typical * work
            for work, seconds in self._latest
        )
        return max(1e-9, total / sum(work for work, _ in self._latest))

    def seconds_left(self) -> float:
        """Return how much of the time is left."""
        return max(0.0, self.end - time.perf_counter())

    def fitting_steps(self, step: int, coarse_share: float) -> int:
        """Return how many steps after this one fit into the time left, with all that follows.

        Args:
            step: Number of steps done.
            coarse_share: Share of the remaining steps that train at half the size.
        """
        step_seconds, interval = self.seconds_per_step(), self.validation_interval
        max_seconds = MAX_REST_SHARE * self.seconds
        # A single validation that was interrupted does not count.
        validation_seconds = min(step_seconds * median(self._validation_costs[-3:]), max_seconds)
        report_seconds = min(step_seconds * self._report_cost, max_seconds)

        def seconds(count: int) -> float:
            coarse = round(coarse_share * count)
            last = step + count - 1
            validations = 1 + max(0, last // interval - (step + coarse) // interval)
            steps = self.coarse_cost * coarse + count - coarse
            return step_seconds * steps + validation_seconds * validations + report_seconds

        left = self.seconds_left()
        most = int(left / step_seconds / min(1.0, self.coarse_cost)) + 1
        return bisect_right(range(1, most + 1), left, key=seconds)

    def is_recount_due(self, step: int, schedule: Schedule) -> bool:
        """Return whether :meth:`recount` would do something after this step."""
        is_measured = len(self._latest) >= MIN_SPEED_STEPS
        return is_measured and self.next_recount <= step < schedule.steps

    def recount(self, step: int, schedule: Schedule) -> bool:
        """Count the remaining steps again if it is time to; return whether their number changes."""
        if not self.is_recount_due(step, schedule):
            return False
        remaining, interval = broadcast_from_main(self._count(step, schedule))
        self.next_recount = step + interval
        if abs(remaining - (schedule.steps - step)) <= MIN_RECOUNT_CHANGE * remaining:
            return False
        schedule.recount(step, remaining)
        return True

    def _count(self, step: int, schedule: Schedule) -> tuple[int, int]:
        """Return how many steps remain, and after how many to count again."""
        share, planned = schedule.coarse_share(step), schedule.planned_steps
        step_seconds = self.seconds_per_step() * (1 - share + share * self.coarse_cost)
        rest = COOL_DOWN_SHARE * (1 - schedule.position(step) / planned)
        cool_down = max(1, math.ceil(rest * self.seconds / step_seconds))
        remaining = max(self.fitting_steps(step, share), cool_down)
        interval = min(
            RECOUNT_TIME_SHARE * self.seconds / step_seconds, RECOUNT_REMAINING_SHARE * remaining
        )
        return remaining, max(1, int(interval))


class Muon(torch.optim.AdamW):
    """AdamW, except for weight matrices, which follow Muon (Jordan and others 2024).

    Muon replaces the momentum of a matrix by a nearly orthogonal matrix, so that the weights learn
    in all directions at the same speed, and not just in the few directions in which most gradients
    lie. The root mean square of a step is about 0.2 times the rate, as with AdamW (Liu and others
    2025). The weights of a convolution are a matrix with a row for each of the first dimension.

    Args:
        groups: Parameter groups. Those with ``"muon": True`` follow Muon.
        options: Passed to AdamW.
    """

    MOMENTUM = 0.95

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        super().__init__(groups, **options)
        # A gradient scaler has to divide the gradients before the step.
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step; the gradients of matrices are dropped, so that AdamW leaves these out."""
        for group in self.param_groups:
            for weights in group["params"] if group.get("muon") else ():
                state = self.state[weights]
                if not state:
                    # AdamW expects a number of steps when a checkpoint is read.
                    state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(weights)}
                assert weights.grad is not None
                state["momentum"].lerp_(weights.grad, 1 - self.MOMENTUM)
                direction = weights.grad.lerp(state["momentum"], self.MOMENTUM)
                step = orthogonalize(direction.flatten(1)).view_as(weights)
                size = 0.2 * max(len(step), step[0].numel()) ** 0.5
                weights.mul_(1 - group["lr"] * group["weight_decay"])
                weights.sub_(step, alpha=group["lr"] * size)
                weights.grad = None
        return super().step(closure)


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return a matrix with the same singular vectors, whose singular values are about 1.

    The five iterations by Newton and Schulz have the coefficients of Jordan and others (2024): the
    values end between 0.7 and 1.2, but those below 0.001 of the matrix's norm stay smaller. All
    iterations compute with ``matrix @ matrix.T``, which is much smaller than a wide matrix.

    Args:
        matrix: ``(rows, columns)``.
    """
    if len(matrix) > matrix.shape[1]:
        return orthogonalize(matrix.T).T
    unit = matrix / (matrix.norm() + 1e-7)
    gram = unit @ unit.T
    product = identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(5):
        squares = product @ gram @ product.T
        product = (3.4445 * identity - 4.775 * squares + 2.0315 * squares @ squares) @ product
    return torch.mm(product, unit)


def make_optimizer(
    trainer: Trainer, schedule: Schedule
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Make the optimizer of ``train.optimizer``, and its scheduler.

    A pretrained encoder has a lower learning rate. Biases and normalisation parameters do not
    decay. Muon is for the convolutions of the decoder: the other parameters have AdamW's steps.
    """
    settings, network = trainer.settings.train, trainer.model.network
    assert settings.learning_rate
    decay = settings.weight_decay if settings.optimizer != "adam" else 0.0
    pretrained = set()
    if trainer.pretrained and isinstance(network, EncoderUNet):
        pretrained = {id(parameter) for parameter in network.encoder.parameters()}
    groups = []
    for is_encoder in (False, True):
        rate = settings.learning_rate * ((settings.encoder_rate or 1.0) if is_encoder else 1.0)
        own = [each for each in trainer.parameters if (id(each) in pretrained) == is_encoder]
        matrices = [parameter for parameter in own if parameter.ndim > 1]
        vectors = [parameter for parameter in own if parameter.ndim == 1]
        if settings.optimizer == "muon" and not is_encoder:
            # The last matrix is the one that computes the logits.
            *hidden, head = matrices
            groups.append({"params": hidden, "lr": rate, "weight_decay": decay, "muon": True})
            matrices = [head]
        groups.append({"params": matrices, "lr": rate, "weight_decay": decay})
        groups.append({"params": vectors, "lr": rate, "weight_decay": 0.0})
    optimizer_class = Muon if settings.optimizer == "muon" else torch.optim.AdamW
    optimizer = optimizer_class([group for group in groups if group["params"]], fused=True)

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


@dataclass(frozen=True)
class RunLength:
    """The length of a new run: its steps, epochs between two validations, and its time, if any."""

    steps: int
    validate_every: int
    budget: TimeBudget | None = None


def count_steps(trainer: Trainer, began: float, *, has_report: bool = False) -> RunLength:
    """Decide how many steps a run has, and how often it validates.

    If neither steps nor epochs are set, a few steps and validations of a copy of the model are
    measured: the run has as many steps as fit into its time, and validation takes at most
    ``MAX_VALIDATION_SHARE`` of it.

    Args:
        trainer: What is to be trained; only its ``num_parts`` may change.
        began: When the time began to count.
        has_report: Whether a report follows training within the time.
    """
    settings, per_epoch = trainer.settings.train, trainer.batches.per_epoch
    if settings.steps is not None:
        return RunLength(settings.steps, settings.validate_every or 1)
    if settings.epochs is not None:
        steps = max(1, round(settings.epochs * per_epoch))
        return RunLength(steps, settings.validate_every or 1)
    assert settings.minutes is not None
    assert settings.coarse is not None
    seconds = 60 * settings.minutes
    probe = replace(trainer, model=copy.deepcopy(trainer.model))
    step_seconds = _measure_step(probe, 0.03 * seconds)
    trainer.num_parts = probe.num_parts
    coarse_cost = COARSE_STEP_COST
    if settings.coarse:
        coarse_cost = _measure_step(probe, 0.01 * seconds, coarse=True) / step_seconds
    validation_seconds = _measure_validation(probe)
    share = MAX_VALIDATION_SHARE
    epoch_seconds = step_seconds * (1 - settings.coarse * (1 - coarse_cost)) * per_epoch
    every = settings.validate_every or math.ceil(
        validation_seconds * (1 - share) / (share * epoch_seconds)
    )
    every = broadcast_from_main(every)
    budget = TimeBudget(
        end=began + seconds - RESERVED_SECONDS,
        seconds=seconds,
        step_seconds=step_seconds,
        validation_seconds=validation_seconds,
        validation_interval=per_epoch * every,
        report_seconds=REPORT_VALIDATIONS * validation_seconds if has_report else 0.0,
        coarse_cost=coarse_cost,
    )
    steps = max(MIN_FIRST_STEPS, budget.fitting_steps(0, settings.coarse))
    return RunLength(broadcast_from_main(steps), every, budget)


def _measure_step(probe: Trainer, max_seconds: float, coarse: bool = False) -> float:
    """Return the seconds of a training step, from at least 5 steps in about ``max_seconds``."""
    optimizer, _ = make_optimizer(probe, Schedule(1))
    # The first steps warm up, and record a CUDA graph.
    warmup = 2 if probe.device == CPU else WARMUP_CALLS + 2
    seconds: list[float] = []
    began = time.perf_counter()
    for x, target in islice(probe.batches.stream(0, lambda number: coarse), MAX_PROBE_STEPS):
        # Reading the loss waits for a GPU.
        float(probe.train_step(optimizer, x, target))
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        enough = len(seconds) >= warmup + 3 and sum(seconds) > max_seconds
        if broadcast_from_main(enough):
            break
    # The mean, not the median: whatever disturbed these steps will disturb later ones too.
    return float(np.mean(seconds[warmup:]))


def _measure_validation(probe: Trainer) -> float:
    """Return the seconds of a validation, from a few samples."""
    samples = probe.val[:4]
    if probe.device != CPU:
        # A GPU takes seconds for the first image of a size: it chooses and loads its kernels. Then
        # a graph is recorded.
        for _ in range(WARMUP_CALLS + 1):
            validate(probe, samples[:1])
    began = time.perf_counter()
    validate(probe, samples)
    return (time.perf_counter() - began) / max(1, len(samples)) * len(probe.val)
