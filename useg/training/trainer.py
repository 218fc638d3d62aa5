"""The parts of a training run: batches, model, loss, one training step, and the validation.

:func:`prepare_trainer` decodes the data and builds the network; ``loop.py`` then takes the steps.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from useg import distributed
from useg.classes import IGNORE, ClassTable
from useg.config import LATER_SETTINGS, Settings, TrainSettings
from useg.data.cache import CachedSample, Samples, build_cache, label_of
from useg.data.dataset import Dataset, Pair, object_classes
from useg.device import (
    CPU,
    TensorFunction,
    allow_compiling,
    choose_precision,
    graph_on_gpu,
    is_out_of_memory,
    move_arrays,
    release_memory,
)
from useg.distributed import all_reduce_sum, process_rank, world_size
from useg.errors import DataError, MachineError, SettingsError, format_count
from useg.images.image_files import resize_image, write_picture
from useg.models import encoders
from useg.models.geometry import output_size
from useg.models.pretrained import imagenet_statistics, load_pretrained
from useg.models.segmenter import Network, Segmenter
from useg.objects.separation import ObjectStatistics
from useg.scoring.losses import Loss, chance_depth_loss, make_loss, sum_cross_entropy, with_objects
from useg.scoring.metrics import Confusion, confusion
from useg.training.augment import PhotometricRange
from useg.training.batches import (
    Batches,
    Crop,
    class_shares,
    cut_crop,
    find_crop_pixels,
    move_samples,
    pixel_statistics,
    pixels_to_move,
)
from useg.training.checkpoint import LogRow
from useg.training.monitor import chance_level_loss
from useg.training.plan import Plan
from useg.training.warm_start import WarmStart
from useg.visualization import paint_label, side_by_side, to_picture

# In a run of this many minutes, or steps without a time limit, the kernels that cuDNN compiles save
# more time than compiling takes.
MIN_LONG_MINUTES, MIN_LONG_STEPS = 5.0, 10_000

# Smaller shares of the pixels do not make the weight of a class larger.
MIN_WEIGHTED_SHARE = 1e-4
# In enlarged images, this share of the logarithm of the class weights is taken back.
ENLARGED_WEIGHT_SHARE = 0.4

# Settings that older checkpoints do not name, with the values for which these are right.
_NEWER_SETTINGS = {
    "model.start_map": None,
    "model.start_share": None,
    "data.standardize": False,
    "data.train_every": None,
    "data.val_every": None,
    "train.freeze": "none",
    **{f"train.{name}": value for name, value in LATER_SETTINGS.items()},
}


class Progress(Protocol):
    """Receives what happens in a training run; the command line shows it as a progress bar."""

    def say(self, text: str) -> None:
        """Receive a message to print."""

    def decoded(self, done: int, total: int) -> None:
        """Receive the number of images decoded so far."""

    def step(self, row: LogRow, steps: int, seconds_left: float) -> None:
        """Receive the log row of a step, and the number of steps of the run."""

    def validated(self, row: LogRow) -> None:
        """Receive the log row of a step after which the model was validated."""


class SilentProgress:
    """Shows nothing."""

    def say(self, text: str) -> None: ...  # noqa: D102

    def decoded(self, done: int, total: int) -> None: ...  # noqa: D102

    def step(self, row: LogRow, steps: int, seconds_left: float) -> None: ...  # noqa: D102

    def validated(self, row: LogRow) -> None: ...  # noqa: D102


@dataclass
class Trainer:
    """The parts of a run: data, model, loss, and how a step is computed.

    Args:
        settings: All settings, none of them open but the number of steps.
        batches: Training batches.
        val: Validation samples.
        model: The model to train, on its device.
        loss: The loss to minimise.
        precision: Autocast type; None is fp32.
        pretrained: Whether the encoder starts from ImageNet weights, or those of another model.
        identity: Settings and data of the run, one per line; see :class:`RunState`.
        shares: Each class's share of the training pixels, ``(K,)``.
        chance_loss: Loss of a prediction that gives every pixel these shares.
        num_parts: Parts in which a batch is computed, one after the other.
        start: The model that the run starts from, if any.
        objects: The objects of the training images; None if the model does not learn them.
    """

    settings: Settings
    batches: Batches
    val: Sequence[CachedSample]
    model: Segmenter
    loss: Loss
    precision: torch.dtype | None
    pretrained: bool
    identity: str
    shares: NDArray[np.float64]
    chance_loss: float
    num_parts: int = 1
    start: WarmStart | None = None
    objects: ObjectStatistics | None = None
    parallel: nn.Module = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.parallel = distributed.wrap_parallel(self.model)
        self.set_training_mode()
        self.parameters = list(self.model.parameters())
        # Without fp16 it changes nothing.
        enabled = self.precision is torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=enabled)
        self.graphed = self._graph_gradients()
        self.graphed_logits = graph_on_gpu(self._logits, self.device)

    @property
    def device(self) -> torch.device:
        """The device of the model and of the batches."""
        return self.batches.device

    @property
    def is_long(self) -> bool:
        """Whether compiling kernels pays, by the settings, so that a resumed run computes alike."""
        train = self.settings.train
        if train.minutes is not None:
            return train.minutes >= MIN_LONG_MINUTES
        return (train.steps or (train.epochs or 0) * self.batches.per_epoch) >= MIN_LONG_STEPS

    def set_training_mode(self) -> None:
        """Prepare the model for training steps; a frozen encoder keeps its batch statistics."""
        self.model.train()
        if self.settings.train.freeze == "encoder":
            frozen_part(self.model.network).eval()

    def _graph_gradients(self) -> TensorFunction:
        # Processes of a group wait for each other in the middle of the function.
        device = CPU if distributed.is_distributed() else self.device
        return graph_on_gpu(self._gradients, device)

    def train_step(self, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor) -> Tensor:
        """Take one step of gradient descent; return the loss, float64.

        Reading the loss waits for the GPU. If a batch does not fit into memory, this and later
        batches are computed in twice as many parts, to the same gradients.

        Raises:
            MachineError: Not even one crop fits into memory.
        """
        while True:
            try:
                loss, *gradients = self.graphed(x, target)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                # With several processes the others would wait while this one computes again.
                if self.num_parts >= len(x) or distributed.is_distributed():
                    raise self._does_not_fit(x, error) from error
                self.num_parts *= 2
                self.model.zero_grad(set_to_none=True)
                self.graphed = self._graph_gradients()
                release_memory(self.device)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        assert loss is not None
        # The next step may overwrite it before it is read.
        return loss.clone()

    def _gradients(self, x: Tensor, target: Tensor) -> list[Tensor | None]:
        """Return the mean loss of a batch and the gradient of each parameter, part by part."""
        self.model.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        parts = zip(x.chunk(self.num_parts), target.chunk(self.num_parts), strict=True)
        for part, part_target in parts:
            with allow_compiling(self.is_long):
                logits = compute_logits(self.parallel, part, self.precision)
            loss = self.loss(logits, part_target) * (len(part) / len(x))
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return [total, *(parameter.grad for parameter in self.parameters)]

    def _logits(self, x: Tensor) -> list[Tensor | None]:
        """Return the logits of a batch ``(N, K, h, w)``, for validation."""
        return [compute_logits(self.model, x, self.precision)]

    def _does_not_fit(self, x: Tensor, error: RuntimeError) -> MachineError:
        num_crops = -(-len(x) // self.num_parts)
        return MachineError(
            f"there is not enough memory for {format_count(num_crops, 'crop')} of "
            f"{x.shape[3]}x{x.shape[2]} pixels ({error}); choose a smaller data.crop, data.size or "
            "model.width, or a larger train.accumulate"
        )


def compute_logits(model: nn.Module, x: Tensor, precision: torch.dtype | None) -> Tensor:
    """Return the model's logits, under autocast to ``precision`` (None is fp32)."""
    with torch.autocast(x.device.type, precision, enabled=precision is not None):
        logits: Tensor = model(x)
    return logits


@dataclass(frozen=True)
class Validation:
    """How a model predicts the validation samples.

    Args:
        counts: Confusion counts of all samples ``(K, K)``, at the labels' own resolution.
        loss: Mean cross-entropy of their pixels at the working size, whatever the training loss
            is; NaN if every pixel is ignored.
        predictions: Label maps at the labels' own size, of the samples to draw (main process only).
    """

    counts: Confusion
    loss: float
    predictions: Mapping[int, NDArray[np.uint8]]


def validate(trainer: Trainer, samples: Sequence[CachedSample]) -> Validation:
    """Predict every sample whole, one at a time; several processes divide them among themselves.

    On a GPU, results are read after the last sample only.
    """
    model = trainer.model
    model.eval()
    num_classes, device = len(model.classes), model.mean.device
    counts = torch.zeros((num_classes,) * 2, dtype=torch.int64, device=device)
    losses = torch.zeros(2, dtype=torch.float64, device=device)
    predictions = {}
    drawn = {0, len(samples) // 2, len(samples) - 1} if samples and not process_rank() else set()
    own = set(range(process_rank(), len(samples), world_size()))
    with torch.inference_mode():
        for k in sorted(own | drawn):
            native = samples[k].native
            assert native is not None
            logits = _predict_sample(trainer, samples[k])
            if k in own:
                label = label_of(samples[k].label)
                (target,) = move_arrays([label[None].astype(np.int64)], device)
                num_pixels = (target != IGNORE).sum()
                losses += torch.stack([sum_cross_entropy(logits, target), num_pixels]).double()
            logits = F.interpolate(logits, native.shape, mode="bilinear", align_corners=False)
            prediction = logits[0].argmax(0).to(torch.uint8)
            if k in own:
                counts += _count(prediction, native, num_classes)
            if k in drawn:
                predictions[k] = prediction.cpu().numpy()
    trainer.set_training_mode()
    total, total_pixels = all_reduce_sum(losses).tolist()
    return Validation(
        all_reduce_sum(counts).cpu().numpy(),
        total / total_pixels if total_pixels else float("nan"),
        predictions,
    )


def _predict_sample(trainer: Trainer, sample: CachedSample) -> Tensor:
    """Return the class logits ``(1, K, h, w)`` of a sample at the working size, in fp32."""
    height, width = sample.label.shape
    model, crop = trainer.model, Crop(0, 0)
    # The image is mirrored at its edges, up to a size that the network takes.
    size = output_size(model, (width, height))
    if trainer.device == CPU:
        image, _ = cut_crop(sample, crop, size, model.margin)
        x = torch.from_numpy(image[None])
    else:
        pixels = find_crop_pixels((height, width), crop, size, model.margin)
        rows, columns = move_arrays([pixels.rows[0], pixels.columns[0]], trainer.device)
        (whole,) = move_arrays([pixels_to_move(sample.image)], trainer.device)
        x = whole[rows][:, columns][None].float()
    (logits,) = trainer.graphed_logits(x.permute(0, 3, 1, 2))
    assert logits is not None
    return logits[:, : len(model.classes), :height, :width].float()


def _count(prediction: Tensor, native: NDArray[np.uint8], num_classes: int) -> Tensor:
    """Return the confusion counts ``(K, K)`` of a label map, on its device."""
    if prediction.device.type == "cpu":
        return torch.from_numpy(confusion(prediction.numpy(), native, num_classes))
    (label,) = move_arrays([native], prediction.device)
    return confusion_of_tensors(prediction, label, num_classes)


def confusion_of_tensors(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Count what :func:`useg.scoring.metrics.confusion` counts, for tensors ``(H, W)``."""
    # Ignored pixels fall into rows from K on.
    pairs = label.long() * num_classes + prediction
    counts = pairs.new_zeros(256 * num_classes)
    counts.scatter_add_(0, pairs.flatten(), torch.ones_like(pairs).flatten())
    return counts[: num_classes**2].view(num_classes, num_classes)


def draw_validation(
    samples: Sequence[CachedSample],
    predictions: Mapping[int, NDArray[np.uint8]],
    classes: ClassTable,
    path: Path,
) -> None:
    """Draw image, truth and prediction side by side, for the samples that have a prediction."""
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
    padding = [((0, 0), (0, width - row.shape[1]), (0, 0)) for row in rows]
    padded = [np.pad(row, pad, constant_values=255) for row, pad in zip(rows, padding, strict=True)]
    write_picture(path, np.concatenate(padded))


def prepare_trainer(
    dataset: Dataset, plan: Plan, progress: Progress, start: WarmStart | None = None
) -> Trainer:
    """Decode the data, measure it, and build the network, with the weights of ``start``.

    Raises:
        SettingsError: The loss is not known, or the batch cannot be divided among the processes.
        DataError: A file cannot be read, or every training pixel is ignored.
    """
    settings = plan.settings
    has_weights = settings.model.pretrained or start is not None
    pretrained = has_weights and settings.model.encoder in encoders.ENCODERS
    _check_settings(settings.train, has_encoder_weights=pretrained or start is not None)
    train, val = _decode(dataset, plan, progress)
    shares = class_shares(train)
    if not shares.any():
        raise DataError(
            f"every pixel of the {len(train)} training masks in {dataset.root} is ignored; "
            "check the ignore ids in classes.toml"
        )
    device = plan.device
    torch.manual_seed(settings.train.seed)
    classes = dataset.classes
    if settings.model.objects:
        classes = replace(classes, objects=object_classes(dataset))
    model = _make_model(classes, plan, train, pretrained, start)
    model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batches = _make_batches(settings, train, model, device)
    loss, chance_loss = _make_loss(settings, batches, shares)
    return Trainer(
        settings=settings,
        batches=batches,
        val=val,
        model=model,
        loss=loss,
        precision=choose_precision(settings.train.precision, device),
        pretrained=pretrained,
        identity=_describe_run(settings, dataset, train, val, start),
        shares=shares,
        chance_loss=chance_loss,
        num_parts=settings.train.accumulate,
        start=start,
        objects=plan.objects,
    )


def _check_settings(train: TrainSettings, *, has_encoder_weights: bool) -> None:
    """Refuse settings that do not fit together, before minutes of decoding."""
    make_loss(train.loss)
    if train.freeze == "encoder" and not has_encoder_weights:
        raise SettingsError(
            "train.freeze = encoder is set, but the encoder starts from random weights; start from "
            "a model of your own, or omit train.freeze"
        )
    assert train.batch
    if train.batch % world_size():
        raise SettingsError(
            f"train.batch = {train.batch} cannot be divided among {world_size()} processes; "
            f"set it to a multiple of {world_size()}"
        )


def _decode(
    dataset: Dataset, plan: Plan, progress: Progress
) -> tuple[Samples, Samples | tuple[()]]:
    """Return the training and validation samples at the working size."""
    # A message about both parts is printed once.
    say = cache(progress.say)

    def decode(pairs: Sequence[Pair], *, native: bool) -> Samples:
        return build_cache(
            dataset,
            pairs,
            plan.working,
            plan.channels,
            plan.pixels,
            native=native,
            objects=bool(plan.settings.model.objects),
            progress=lambda done: progress.decoded(done, len(pairs)),
            warn=say,
        )

    held_out = dataset.of("val")
    with distributed.main_process_first():
        train = decode(dataset.of("train"), native=False)
        return train, decode(held_out, native=True) if held_out else ()


def _make_model(
    classes: ClassTable, plan: Plan, train: Samples, pretrained: bool, start: WarmStart | None
) -> Segmenter:
    """Build the network with its pixel statistics, and load pretrained weights."""
    settings = plan.settings.model
    assert settings.encoder
    statistics = None
    if start:
        statistics = start.pixel_statistics(plan.channels)
    elif pretrained:
        statistics = imagenet_statistics(settings.encoder, plan.channels, plan.pixels)
    mean, std = statistics or pixel_statistics(train)
    network = {**settings.architecture(), "channels": plan.channels, "classes": len(classes)}
    model = Segmenter(network, classes, mean, std, plan.working, plan.pixels)
    if start:
        start.initialize(model)
    elif pretrained and isinstance(model.network, encoders.EncoderUNet):
        load_pretrained(model.network, settings.weights)
    if plan.settings.train.freeze == "encoder":
        frozen_part(model.network).requires_grad_(False)
    return model


def frozen_part(network: Network) -> nn.Module:
    """Return the part of a network that ``train.freeze = encoder`` keeps as it is."""
    return network.encoder if isinstance(network, encoders.EncoderUNet) else network.down


def _make_batches(
    settings: Settings, train: Samples, model: Segmenter, device: torch.device
) -> Batches:
    crop, batch, zoom = settings.data.crop, settings.train.batch, settings.train.zoom
    assert crop
    assert batch
    assert zoom
    return Batches(
        train,
        crop,
        batch,
        settings.train.seed,
        settings.train.flips if settings.train.augment else None,
        model.mean.flatten().cpu().numpy(),
        model.std.flatten().cpu().numpy(),
        model.margin,
        device,
        move_samples(train, device),
        coarse_size=output_size(model, (crop[0] // 2, crop[1] // 2)),
        zoom=zoom,
        photometric=_choose_photometric(settings.train, train.pixels),
    )


def _choose_photometric(train: TrainSettings, pixels: str) -> PhotometricRange:
    """Return the strength of each photometric change: all but exposure are scaled together."""
    strength = train.photometric or 0.0
    return PhotometricRange(
        strength * train.color_jitter,
        strength * train.grayscale,
        strength * train.shading,
        strength * train.fog,
        strength * train.blur,
        strength * train.noise,
        train.exposure if strength else 0.0,
        limit=255.0 if pixels == "uint8" else None,
    )


def _make_loss(
    settings: Settings, batches: Batches, shares: NDArray[np.float64]
) -> tuple[Loss, float]:
    """Return the loss, and what it is for a model that predicts the same everywhere."""
    is_weighted = settings.train.class_weights == "sqrt"
    weights = _class_weights(shares, batches.device) if is_weighted else None
    loss = make_loss(settings.train.loss, weights, settings.train.label_smoothing)
    targets = [batches.at(number)[1] for number in range(4)]
    chance_loss = np.mean(
        [chance_level_loss(loss, each & 0xFF, shares, weights) for each in targets]
    )
    if settings.model.objects:
        loss = with_objects(loss, len(shares))
        chance_loss += np.mean([float(chance_depth_loss(each)) for each in targets])
    return loss, float(chance_loss)


def _class_weights(shares: NDArray[np.float64], device: torch.device) -> Tensor:
    """Return weights of ``1 / sqrt(share)``, whose mean over the pixels is 1."""
    weight = np.where(shares > 0, 1 / np.sqrt(np.maximum(shares, MIN_WEIGHTED_SHARE)), 0)
    return torch.tensor(weight / (weight * shares).sum(), dtype=torch.float32, device=device)


def choose_enlarged_biases(shares: NDArray[np.float64]) -> list[float]:
    """Return what takes back a part of the class weights: for the logit of each class, at most 0.

    Args:
        shares: Each class's share of the training pixels, ``(K,)``.
    """
    weights = 1 / np.sqrt(np.maximum(shares, MIN_WEIGHTED_SHARE))
    biases = ENLARGED_WEIGHT_SHARE * np.log(weights.min() / weights)
    return [round(float(bias), 3) for bias in biases]


def _describe_run(
    settings: Settings,
    dataset: Dataset,
    train: Samples,
    val: Samples | tuple[()],
    start: WarmStart | None,
) -> str:
    """Return the identity of a run: each setting that matters, the classes, a digest of the data.

    It is stored in checkpoints, so its form does not change: a newer setting has a line only where
    it is used.
    """
    duration = {"minutes", "epochs", "steps", "recounts", "validate_every", "tensorboard"}
    duration |= {"unlabelled_from", "thread_changes"}
    unused = {"start"} | (set() if settings.model.objects else {"objects"})
    parts = settings.model_dump(
        exclude={"model": unused, "data": {"unlabelled"}, "train": duration}
    )
    lines = [
        f"{section}.{name} = {value}"
        for section, content in parts.items()
        for name, value in content.items()
        if _NEWER_SETTINGS.get(f"{section}.{name}", ()) != value
    ]
    lines += [f"model.start = {start.digest}"] if start else []
    pictures = [
        f"{len(part)} {name} pictures, {zlib.crc32(part.table.checks.tobytes()):08x}"
        for name, part in (("training", train), ("held-out", val))
        if part
    ]
    objects = [f"objects {object_classes(dataset)}"] if settings.model.objects else []
    return "\n".join([*lines, str(dataset.classes), *objects, *pictures])
