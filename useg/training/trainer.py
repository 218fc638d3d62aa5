"""A data set + a plan -> everything that a training run works with: batches, model, loss; and how many steps fit into its time."""

from __future__ import annotations

import copy
import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from useg import distributed
from useg.classes import IGNORE, ClassTable
from useg.config import Settings
from useg.data.cache import CachedSample, Samples, build_cache
from useg.data.dataset import Dataset, Pair
from useg.distributed import (
    all_reduce_sum,
    choose_device,
    choose_precision,
    process_rank,
    world_size,
)
from useg.errors import UsageError
from useg.images.files import resize_image, write_picture
from useg.models import encoders
from useg.models.segmenter import Segmenter, output_size
from useg.pictures import paint_label, side_by_side, to_picture
from useg.scoring.losses import Loss, make_loss
from useg.scoring.metrics import Confusion, confusion
from useg.training.batches import Batches, Crop, class_shares, pixel_statistics, resident, take
from useg.training.checkpoint import TrainerRow
from useg.training.monitor import chance_level_loss
from useg.training.plan import Plan
from useg.training.schedule import Schedule, Timer, make_optimizer


def compute(model: nn.Module, x: Tensor, precision: torch.dtype | None) -> Tensor:
    """Return logits, under autocast to ``precision`` (None: fp32)."""
    with torch.autocast(x.device.type, precision, enabled=precision is not None):
        logits: Tensor = model(x)
    return logits


@dataclass(frozen=True)
class Validation:
    """What held-out samples say of a model.

    Args:
        counts: of all of them, ``(K, K)``, at native resolution.
        loss: the plain cross-entropy of their pixels at the working size, whatever loss is trained on; ``nan`` when all are ignored.
        predictions: label maps at native size of the samples that are drawn (by the first process).
    """

    counts: Confusion
    loss: float
    predictions: Mapping[int, NDArray[np.uint8]]


def validate(
    model: Segmenter, samples: Sequence[CachedSample], precision: torch.dtype | None
) -> Validation:
    """Predict every sample, one at a time and whole; several processes share them out."""
    model.eval()
    counts, losses = (
        np.zeros((len(model.classes),) * 2, np.int64),
        torch.zeros(2, dtype=torch.float64),
    )
    predictions = {}
    shown = _shown(len(samples)) if process_rank() == 0 else set()
    own = set(range(process_rank(), len(samples), world_size()))
    with torch.inference_mode():
        for k in sorted(own | shown):
            sample = samples[k]
            assert sample.native is not None
            height, width = sample.label.shape
            image, _ = take(
                sample, Crop(0, 0), output_size(model, (width, height)), model.margin
            )  # mirrored up to what the network takes
            x = torch.from_numpy(image[None]).permute(0, 3, 1, 2).to(model.mean.device)
            logits = compute(model, x, precision)[..., :height, :width].float()
            if k in own:
                target = torch.from_numpy(sample.label[None].astype(np.int64)).to(x.device)
                loss = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
                losses += torch.tensor([loss.item(), (target != IGNORE).sum().item()])
            logits = F.interpolate(
                logits, sample.native.shape, mode="bilinear", align_corners=False
            )
            prediction = logits[0].argmax(0).to(torch.uint8).cpu().numpy()
            if k in own:
                counts += confusion(prediction, sample.native, len(model.classes))
            if k in shown:
                predictions[k] = prediction
    model.train()
    total, pixels = all_reduce_sum(losses).tolist()
    return Validation(
        all_reduce_sum(torch.from_numpy(counts)).numpy(),
        total / pixels if pixels else float("nan"),
        predictions,
    )


def _shown(count: int) -> set[int]:
    """The first, the middle and the last sample are drawn."""
    return {0, count // 2, count - 1}


def draw_validation(
    samples: Sequence[CachedSample],
    predictions: Mapping[int, NDArray[np.uint8]],
    classes: ClassTable,
    path: Path,
) -> None:
    """Draw image | truth | prediction of the samples that there are predictions of."""
    rows = []
    for k in sorted(predictions):
        truth = samples[k].native
        assert truth is not None
        height, width = truth.shape
        pictures = [
            resize_image(to_picture(samples[k].image), (width, height)),
            paint_label(truth, classes),
            paint_label(predictions[k], classes),
        ]
        rows.append(side_by_side(pictures, ("image", "truth", "prediction")))
    width = max(row.shape[1] for row in rows)
    write_picture(
        path,
        np.concatenate(
            [
                np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255)
                for row in rows
            ]
        ),
    )


VALIDATION_SHARE = 0.15  # share of a run's time that scoring the held-out pictures may take


PROBED_STEPS = 40  # steps at most, to measure how long one takes


RESERVED_SECONDS = 8.0  # seconds to load Python and torch, and to write the report


class Progress(Protocol):
    """What a training run tells while it goes on; the command line shows it as a bar."""

    def say(self, text: str) -> None:
        """A line worth reading once."""

    def decoded(self, done: int, total: int) -> None:
        """Pictures decoded so far."""

    def step(self, row: TrainerRow, steps: int, seconds_left: float) -> None:
        """One step done, of ``steps``."""

    def validated(self, row: TrainerRow) -> None:
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
        self.parallel = distributed.wrap_parallel(self.model)

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
                if (
                    self.parts >= len(x) or distributed.is_distributed()
                ):  # the other processes would wait for what this one computes again
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
            loss = self.loss(compute(self.parallel, part, self.precision), truth) * (
                len(part) / len(x)
            )
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def optimizer(
        self, length: Schedule
    ) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """Make the optimiser and schedule of a run."""
        encoder = (
            self.model.network.encoder
            if self.pretrained and isinstance(self.model.network, encoders.EncoderUNet)
            else None
        )
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
    if settings.train.batch % distributed.world_size():
        raise UsageError(
            f"a batch of {settings.train.batch} cannot be shared out among {distributed.world_size()} processes; set train.batch to a multiple"
        )
    say = cache(progress.say)  # what is true of both is said once
    with distributed.main_process_first():
        train, val = (
            _decoded(dataset, dataset.of(name), plan, progress, say) for name in ("train", "val")
        )
    shares = class_shares(train)
    if not shares.any():
        raise UsageError(
            f"every pixel of the {len(train)} training masks in {dataset.root} is ignored; check the ignore ids in classes.toml"
        )
    device = choose_device()
    torch.manual_seed(settings.train.seed)
    pretrained = settings.model.pretrained and settings.model.encoder in encoders.ENCODERS
    mean, std = (
        imagenet_statistics(settings.model.encoder, plan) if pretrained else None
    ) or pixel_statistics(train)
    network = {
        **settings.model.architecture(),
        "channels": plan.channels,
        "classes": len(dataset.classes),
    }
    model = Segmenter(network, dataset.classes, mean, std, plan.working, plan.pixels)
    if pretrained and isinstance(model.network, encoders.EncoderUNet):
        encoders.load_pretrained(
            model.network, Path(settings.model.weights) if settings.model.weights else None
        )
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
    guess = float(
        np.mean([chance_level_loss(loss, batches.at(k)[1], shares, weights) for k in range(4)])
    )
    about = _about(settings, dataset, train, val)
    return Trainer(
        settings,
        batches,
        val,
        model,
        loss,
        precision,
        pretrained,
        about,
        shares,
        guess,
        settings.train.accumulate,
    )


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def _decoded(
    dataset: Dataset,
    pairs: Sequence[Pair],
    plan: Plan,
    progress: Progress,
    say: Callable[[str], None],
) -> Samples:
    return build_cache(
        dataset, pairs, plan.working, plan.channels, plan.pixels, native=pairs[0].split == "val",
        progress=lambda done: progress.decoded(done, len(pairs)), warn=say,
    )  # fmt: skip


def _about(settings: Settings, dataset: Dataset, train: Samples, val: Samples) -> str:
    parts = settings.model_dump(
        exclude={
            "train": {"minutes", "epochs", "steps", "recounts", "validate_every", "tensorboard"}
        }
    )
    lines = [
        f"{section}.{name} = {value}"
        for section, content in parts.items()
        for name, value in content.items()
    ]
    pictures = [
        f"{len(part)} {name} pictures, {zlib.crc32(part.table.checks.tobytes()):08x}"
        for name, part in (("training", train), ("held-out", val))
    ]
    return "\n".join([*lines, str(dataset.classes), *pictures])


def imagenet_statistics(encoder: str, plan: Plan) -> tuple[list[float], list[float]] | None:
    """Return the mean and deviation that a pretrained encoder expects, in the pictures' units; None where these are unknown (float pictures)."""
    found = encoders.encoder_pixel_statistics(encoder, plan.channels)
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
    every = settings.validate_every or math.ceil(
        validation * (1 - VALIDATION_SHARE) / (VALIDATION_SHARE * step * per_epoch)
    )
    every = distributed.broadcast_from_main(every)
    timer = Timer(began + 60 * settings.minutes - RESERVED_SECONDS, validation, per_epoch * every)
    return distributed.broadcast_from_main(max(1, int(timer.fitting(now, step)))), every, timer


def _step_seconds(probe: Trainer, most: float, coarse: bool = False) -> float:
    """Measure how long a step takes, in at least 5 steps and about ``most`` seconds."""
    optimizer, _ = probe.optimizer(Schedule(1))
    seconds: list[float] = []
    began = time.perf_counter()
    for x, target in islice(probe.batches.stream(0, lambda number: coarse), PROBED_STEPS):
        probe.learn(optimizer, x, target)
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        if distributed.broadcast_from_main(len(seconds) >= 5 and sum(seconds) > most):
            break
    return float(
        np.mean(seconds[2:])
    )  # the first ones warm up; the mean, because what disturbs these will disturb later ones


class SilentProgress:
    """Tells nothing."""

    def say(self, text: str) -> None:  # noqa: D102
        pass

    def decoded(self, done: int, total: int) -> None:  # noqa: D102
        pass

    def step(self, row: TrainerRow, steps: int, seconds_left: float) -> None:  # noqa: D102
        pass

    def validated(self, row: TrainerRow) -> None:  # noqa: D102
        pass
