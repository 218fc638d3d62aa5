"""A model + settings -> optimiser and course of the learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from useg.config import TrainSettings
from useg.training.length import Length


def make_optimizer(
    network: nn.Module, encoder: nn.Module | None, settings: TrainSettings, length: Length
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
        own = [parameter for parameter in network.parameters() if (id(parameter) in learned) == slow]
        groups.append({"params": [parameter for parameter in own if parameter.ndim > 1], "lr": rate, "weight_decay": decay})
        groups.append({"params": [parameter for parameter in own if parameter.ndim == 1], "lr": rate, "weight_decay": 0.0})  # biases, normalisation
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], fused=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(settings.schedule, length.place(step), length.planned))


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
