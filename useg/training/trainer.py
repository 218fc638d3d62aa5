"""A data set + a plan -> everything that a training run works with: batches, model, loss; and how many steps fit into its time."""

from __future__ import annotations

import copy
import math
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from useg import ranks
from useg.config import Settings
from useg.data.cache import build_cache
from useg.data.dataset import Dataset, Pair
from useg.data.samples import CachedSample, Samples
from useg.data.statistics import class_shares, pixel_statistics
from useg.errors import UsageError
from useg.models import encoders
from useg.models.segmenter import Segmenter, output_size
from useg.scoring.losses import Loss, make_loss
from useg.training.batches import Batches
from useg.training.devices import choose_device, choose_precision
from useg.training.length import Length, Timer
from useg.training.optimizer import make_optimizer
from useg.training.plan import Plan
from useg.training.resident import resident
from useg.training.validation import Validation, compute, validate
from useg.training.watch import guess_loss

VALIDATING = 0.15  # share of a run's time that scoring the held-out pictures may take
PROBED = 40  # steps at most, to measure how long one takes
AROUND = 8.0  # seconds to load Python and torch, and to write the report

Row = dict[str, Any]


class Progress(Protocol):
    """What a training run tells while it goes on; the command line shows it as a bar."""

    def say(self, text: str) -> None:
        """A line worth reading once."""

    def decoded(self, done: int, total: int) -> None:
        """Pictures decoded so far."""

    def step(self, row: Row, steps: int, seconds_left: float) -> None:
        """One step done, of ``steps``."""

    def validated(self, row: Row) -> None:
        """An epoch was scored."""


@dataclass
class Trainer:
    """What a run works with.

    ``about`` says in a line per setting, and a digest of the pictures, what it is a run of; ``shares`` are the classes' of the training pixels;
    ``guess`` is the loss of who knows nothing but these; ``parts`` is how many parts of a batch are computed one after the other.
    """

    settings: Settings
    batches: Batches
    val: Sequence[CachedSample]
    model: Segmenter
    loss: Loss
    precision: torch.dtype | None
    pretrained: bool
    about: str
    shares: NDArray[np.float64]
    guess: float
    parts: int = 1
    parallel: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.parallel = ranks.parallel(self.model)

    def learn(self, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor) -> float:
        """One step of gradient descent; returns the loss. A batch too large for the memory is computed in twice as many ``parts`` from then on.

        Raises:
            UsageError: not even one crop fits into memory.
        """
        while True:
            try:
                loss = self._descend(x, target)
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                if self.parts >= len(x) or ranks.joined():  # the other processes would wait for what this one computes again
                    count = -(-len(x) // self.parts)
                    raise UsageError(
                        f"{count} crop(s) of {x.shape[3]}x{x.shape[2]} pixels need more memory than there is ({error}); choose a "
                        "smaller data.crop, data.size or model.width, or a larger train.accumulate"
                    ) from error
                self.parts *= 2
                self.model.zero_grad(set_to_none=True)
                continue
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return float(loss)  # read last: until here nothing has waited for a GPU

    def _descend(self, x: Tensor, target: Tensor) -> Tensor:
        """Add up the gradients of a batch's parts; returns the mean loss."""
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        for part, truth in zip(x.chunk(self.parts), target.chunk(self.parts), strict=True):
            loss = self.loss(compute(self.parallel, part, self.precision), truth) * (len(part) / len(x))
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def optimizer(self, length: Length) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """Make the optimiser and schedule of a run."""
        encoder = self.model.network.encoder if self.pretrained and isinstance(self.model.network, encoders.EncoderUNet) else None
        return make_optimizer(self.model, encoder, self.settings.train, length)

    def validate(self) -> Validation:
        """Look at the validation samples with the model as it stands."""
        return validate(self.model, self.val, self.precision)


def prepare(dataset: Dataset, plan: Plan, progress: Progress) -> Trainer:
    """Decode the data, measure it, build the network.

    Raises:
        UsageError: a loss that is not known, unreadable data, or nothing in it that counts.
    """
    settings = plan.settings
    make_loss(settings.train.loss)  # a slip is answered before minutes of decoding
    assert settings.train.batch
    assert settings.model.encoder
    if settings.train.batch % ranks.world():
        raise UsageError(f"a batch of {settings.train.batch} cannot be shared out among {ranks.world()} processes; set train.batch to a multiple")
    say = cache(progress.say)  # what is true of both is said once
    with ranks.first_before_the_others():
        train, val = (_decoded(dataset, dataset.of(name), plan, progress, say) for name in ("train", "val"))
    shares = class_shares(train)
    if not shares.any():
        raise UsageError(f"every pixel of the {len(train)} training masks in {dataset.root} is ignored; check the ignore ids in classes.toml")
    device = choose_device()
    torch.manual_seed(settings.train.seed)
    pretrained = settings.model.pretrained and settings.model.encoder in encoders.ENCODERS
    mean, std = (imagenet_statistics(settings.model.encoder, plan) if pretrained else None) or pixel_statistics(train)
    network = {**settings.model.architecture(), "channels": plan.channels, "classes": len(dataset.classes)}
    model = Segmenter(network, dataset.classes, mean, std, plan.working, plan.pixels)
    if pretrained and isinstance(model.network, encoders.EncoderUNet):
        encoders.load_pretrained(model.network, Path(settings.model.weights) if settings.model.weights else None)
    model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    weights = None
    if settings.train.class_weights == "sqrt":
        weight = np.where(shares > 0, 1 / np.sqrt(np.maximum(shares, 1e-4)), 0)
        weights = torch.tensor(weight / (weight * shares).sum(), dtype=torch.float32, device=device)
    assert settings.data.crop
    batches = Batches(
        train, settings.data.crop, settings.train.batch, settings.train.seed, settings.train.flips if settings.train.augment else None,
        np.array(mean, np.float32), np.array(std, np.float32), model.margin, device, resident(train, device),
        coarse_size=output_size(model, (settings.data.crop[0] // 2, settings.data.crop[1] // 2)),
    )  # fmt: skip
    loss = make_loss(settings.train.loss, weights, settings.train.label_smoothing)
    precision = choose_precision(settings.train.precision, device)
    guess = float(np.mean([guess_loss(loss, batches.at(k)[1], shares, weights) for k in range(4)]))
    about = _about(settings, dataset, train, val)
    return Trainer(settings, batches, val, model, loss, precision, pretrained, about, shares, guess, settings.train.accumulate)


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def _decoded(dataset: Dataset, pairs: Sequence[Pair], plan: Plan, progress: Progress, say: Callable[[str], None]) -> Samples:
    return build_cache(
        dataset, pairs, plan.working, plan.channels, plan.pixels, native=pairs[0].split == "val",
        progress=lambda done: progress.decoded(done, len(pairs)), say=say,
    )  # fmt: skip


def _about(settings: Settings, dataset: Dataset, train: Samples, val: Samples) -> str:
    parts = settings.model_dump(exclude={"train": {"minutes", "epochs", "steps", "recounts", "validate_every", "tensorboard"}})
    lines = [f"{section}.{name} = {value}" for section, content in parts.items() for name, value in content.items()]
    pictures = [
        f"{len(part)} {name} pictures, {zlib.crc32(part.ledger.checks.tobytes()):08x}" for name, part in (("training", train), ("held-out", val))
    ]
    return "\n".join([*lines, str(dataset.classes), *pictures])


def imagenet_statistics(encoder: str, plan: Plan) -> tuple[list[float], list[float]] | None:
    """Return the mean and deviation that a pretrained encoder expects, in the pictures' units; None where these are unknown (float pictures)."""
    found = encoders.pixel_statistics(encoder, plan.channels)
    if found is None or plan.pixels not in ("uint8", "uint16"):
        return None
    factor = 257 if plan.pixels == "uint16" else 1  # 65535 / 255
    mean, std = ([value * factor for value in part] for part in found)
    return mean, std


def count_steps(trainer: Trainer, began: float) -> tuple[int, int, Timer | None]:
    """Decide how many steps there are, and how many epochs lie between two validations.

    As set; otherwise as many steps as fit into the time, after a few on a copy of the model have been measured, and validations so seldom
    that they take ``VALIDATING`` of the time at most; what then keeps the run within its time comes as the third.

    Args:
        trainer: what is to be trained; of it only ``parts`` may change.
        began: when the time began to count, but for what is ``AROUND``.
    """
    settings = trainer.settings.train
    per_epoch = trainer.batches.per_epoch
    if settings.steps is not None:
        return settings.steps, settings.validate_every or 1, None
    if settings.epochs is not None:
        return max(1, round(settings.epochs * per_epoch)), settings.validate_every or 1, None
    assert settings.minutes is not None
    probe = replace(trainer, model=copy.deepcopy(trainer.model))
    step = _step_seconds(probe, 0.03 * 60 * settings.minutes)
    trainer.parts = probe.parts
    assert settings.coarse is not None
    if settings.coarse:
        coarse = _step_seconds(probe, 0.01 * 60 * settings.minutes, coarse=True)
        step = settings.coarse * coarse + (1 - settings.coarse) * step
    measured = time.perf_counter()
    probe.val = trainer.val[:4]
    probe.validate()
    now = time.perf_counter()
    validation = (now - measured) / len(probe.val) * len(trainer.val)
    every = settings.validate_every or math.ceil(validation * (1 - VALIDATING) / (VALIDATING * step * per_epoch))
    every = ranks.agreed(every)
    timer = Timer(began + 60 * settings.minutes - AROUND, validation, per_epoch * every)
    return ranks.agreed(max(1, int(timer.fitting(now, step)))), every, timer


def _step_seconds(probe: Trainer, most: float, coarse: bool = False) -> float:
    """Measure how long a step takes, in at least 5 steps and about ``most`` seconds."""
    optimizer, _ = probe.optimizer(Length(1))
    seconds: list[float] = []
    began = time.perf_counter()
    for x, target in islice(probe.batches.stream(0, lambda number: coarse), PROBED):
        probe.learn(optimizer, x, target)
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        if ranks.agreed(len(seconds) >= 5 and sum(seconds) > most):
            break
    return float(np.mean(seconds[2:]))  # the first ones warm up; the mean, because what disturbs these will disturb later ones
