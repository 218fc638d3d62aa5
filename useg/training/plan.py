"""Plan a training run: choose each setting that the user left open, and give the reason.

The decisions follow from the data, the machine and the time. The rules, in the order in which they
are applied:

| setting | rule |
|---|---|
| ``model.encoder`` | pretrained for grey and colour; plain for others and if its shape is set |
| ``train.precision`` | bf16 where it is measured to be faster; on GPUs without it, fp16 |
| ``model.objects`` | true if the masks distinguish objects and some of them touch |
| ``data.size`` | images of whole scenes are downscaled, as far as the time requires and their \
labels allow |
| ``data.scale`` | other images keep their resolution |
| ``data.crop`` | whole frames if they are small or their size is set, else what fits the time |
| ``model.width`` | the paper's network, as wide as the time allows |
| ``train.class_weights`` | larger for rare classes, where a class is rare |
| ``train.learning_rate`` | depends on batch normalisation and pretraining |
| ``train.coarse`` | short runs on images of whole scenes start at half the size |
| ``train.batch`` | 4 to 8 crops, 16 of small objects: about 200,000 pixels, if possible |
| ``train.encoder_rate`` | low for images with a natural orientation, to keep more of the \
pretraining |
| ``train.optimizer`` | muon for images with a natural orientation, else adamw |
| ``train.zoom`` | wider for images that are not of whole scenes |
| ``train.photometric`` | on for whole scenes, unless their light differs much already |
| ``train.steps`` | as many as fit into the time, measured at the start \
(:func:`useg.training.schedule.count_steps`) and during training \
(:class:`useg.training.schedule.TimeBudget`) |
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from useg import distributed
from useg.config import Settings, TrainSettings
from useg.data.dataset import (
    Dataset,
    object_classes,
    pick_evenly,
    read_objects,
    read_pair_image,
    read_pair_size,
)
from useg.device import (
    CPU,
    PRECISIONS,
    choose_device,
    choose_precision,
    describe_device,
    fastest_precision,
    find_fault,
    first_line,
    measure_speedup,
    measure_training_speed,
)
from useg.errors import MachineError, SettingsError
from useg.images.image_files import Image
from useg.models import encoders
from useg.models.geometry import WorkingSize, output_size
from useg.models.pretrained import load_pretrained
from useg.models.segmenter import Network, build_network
from useg.objects.separation import ObjectStatistics
from useg.scoring.losses import make_loss
from useg.training.plan_rules import (
    COARSE_SHARE,
    COARSE_STEP_COST,
    MIN_POSITION_INFORMATION,
    NUM_MASKS_READ,
    LabelStatistics,
    choose_batch,
    choose_class_weights,
    choose_coarse,
    choose_encoder,
    choose_encoder_rate,
    choose_flips,
    choose_learning_rate,
    choose_optimizer,
    choose_photometric,
    choose_standardize,
    choose_zoom,
    measure_labels,
)

DEFAULT_MINUTES = 10.0

# Camera frames are reduced to about this many pixels, or more where the time allows.
FRAME_PIXELS = 256 * 192

# Side of the crops of images that are not whole scenes; with unpadded convolutions 196 pixels
# come out of 380.
CROP_SIDE = 256
VALID_CROP_SIDE = 196
# Side of the crops for objects whose typical side is at most this number of pixels.
OBJECT_CROP_SIDE, MAX_SMALL_OBJECT_SIDE = 128, 32

# A run should train on at least this many crops: with fewer, smaller crops are better. Steps take
# this share of the time.
MIN_CROPS_PER_RUN = 6000
STEP_TIME_SHARE = 0.8

# Labels that are reduced to the working size and enlarged again have to keep this mean IoU with
# the originals: in scenes, and in photographs in which classes differ only by their own details.
MIN_LABEL_IOU, MIN_DETAIL_IOU = 0.8, 0.9

# Width of the networks where the time does not allow more.
DEFAULT_WIDTH = 16
PAPER_WIDTH = 64

# A device is compared with the CPU on this number of crops, with sides of about this many pixels.
PROBE_CROPS, PROBE_SIDE = 2, 96


@dataclass(frozen=True)
class Decision:
    """A setting that was left open, its value, and the reason."""

    key: str
    value: Any
    reason: str

    @property
    def shown(self) -> str:
        """The value in few characters: a size is shown as 256x192, a range as 0.5-2.0."""
        if not isinstance(self.value, tuple):
            return str(self.value)
        return ("-" if self.key == "train.zoom" else "x").join(map(str, self.value))


@dataclass(frozen=True)
class Plan:
    """Complete settings, except for the number of steps.

    Args:
        settings: The settings.
        channels: Number of bands of the images.
        pixels: Number type of the images, such as ``"uint8"``.
        decisions: What was decided.
        device: The device that trains.
        fault: Why another device does not train, as a sentence; empty if none was found wanting.
        objects: The objects of the training images; None if the model does not learn them.
    """

    settings: Settings
    channels: int
    pixels: str
    decisions: tuple[Decision, ...]
    device: torch.device = CPU
    fault: str = ""
    objects: ObjectStatistics | None = None

    @property
    def working(self) -> WorkingSize:
        """The size at which the model works."""
        data = self.settings.data
        return WorkingSize(data.size, data.scale or 1.0, bool(data.standardize))

    @property
    def reasons(self) -> dict[str, str]:
        """The reason of each decision, by its setting."""
        return {decision.key: decision.reason for decision in self.decisions}

    def explain(self) -> list[str]:
        """Return a line for each decision (setting, value, reason), and the fault, if any."""
        key_width = max((len(each.key) for each in self.decisions), default=0)
        value_width = max((len(each.shown) for each in self.decisions), default=0)
        lines = [
            f"{each.key:<{key_width}}  {each.shown:<{value_width}}  {each.reason}"
            for each in self.decisions
        ]
        return [*lines, self.fault] if self.fault else lines


def time_limit(train: TrainSettings) -> float | None:
    """Return the seconds of a run; None if its length is given in epochs or steps."""
    if train.epochs is not None or train.steps is not None:
        return None
    return 60 * (train.minutes or DEFAULT_MINUTES)


def make_plan(settings: Settings, dataset: Dataset) -> Plan:
    """Decide every setting that is None.

    Args:
        settings: What the user has set; the rest is None.
        dataset: Pairs with their splits assigned.

    Raises:
        SettingsError: Both a size and a scale are set, or a size does not fit the network.
        UsageError: A file cannot be read.
    """
    if settings.data.size and settings.data.scale:
        raise SettingsError(
            "data.size and data.scale are both set; set data.size for whole frames, or data.scale "
            "for images whose pixels have a physical size"
        )
    device = choose_device()
    if device == CPU:
        return _plan_on(device, settings, dataset)
    try:
        plan = _plan_on(device, settings, dataset)
        fault = _find_fault(plan, len(dataset.classes))
    except RuntimeError as error:
        fault = f"it fails ({first_line(error)})"
    if not distributed.any_process(bool(fault)):
        return plan
    if distributed.is_distributed():
        raise MachineError(
            f"a device of this distributed run cannot be used: {fault or 'see above'}; omit "
            "it, or train on the device cpu"
        )
    sentence = f"{describe_device(device)} is not used, because {fault}; the CPU trains instead"
    return replace(_plan_on(CPU, settings, dataset), fault=sentence)


def _plan_on(device: torch.device, settings: Settings, dataset: Dataset) -> Plan:
    planner = _Planner(settings, dataset, device)
    size, pixels = settings.data.size, planner.pixels
    if settings.data.standardize and not (size and pixels == "uint8"):
        reason = f"the images are {pixels}" if size else "data.size is not set"
        raise SettingsError(
            f"data.standardize is true, but {reason}; it needs 8-bit images and one size for them, "
            "such as data.size=256x192"
        )
    planner.choose_network()
    planner.choose_objects()
    planner.choose_size()
    planner.choose_crop()
    planner.choose_flips()
    planner.choose_width()
    planner.choose_training()
    return Plan(
        planner.settings,
        planner.channels,
        planner.pixels,
        tuple(planner.decisions),
        device,
        objects=planner.object_statistics if planner.settings.model.objects else None,
    )


def _find_fault(plan: Plan, num_classes: int) -> str | None:
    """Train the planned network once on the device and on the CPU; return what is wrong."""
    settings = plan.settings
    assert settings.data.crop
    architecture = settings.model.architecture()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.train.seed)
        network = build_network(
            {**architecture, "channels": plan.channels, "classes": num_classes}
        ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        is_pretrained = settings.model.pretrained and not settings.model.start
        if is_pretrained and isinstance(network, encoders.EncoderUNet):
            load_pretrained(network, settings.model.weights)
        crop = settings.data.crop
        width, height = output_size(network, (min(crop[0], PROBE_SIDE), min(crop[1], PROBE_SIDE)))
        sides = height + 2 * network.margin, width + 2 * network.margin
        x = torch.randn(PROBE_CROPS, plan.channels, *sides)
        target = torch.randint(num_classes, (PROBE_CROPS, height, width))
    precision = choose_precision(settings.train.precision, plan.device)
    return find_fault(network, make_loss(settings.train.loss), x, target, precision, plan.device)


@dataclass
class _Planner:
    """Completes settings, one after the other."""

    settings: Settings
    dataset: Dataset
    device: torch.device
    decisions: list[Decision] = field(default_factory=list)

    def decide(self, key: str, value: Any, reason: str) -> None:
        section, name = key.split(".")
        if getattr(getattr(self.settings, section), name) is None:
            self.settings = self.settings.with_({key: value})
            self.decisions.append(Decision(key, value, reason))

    @cached_property
    def sizes(self) -> set[tuple[int, int]]:
        return {read_pair_size(pair) for pair in self.dataset.of("train")}

    @property
    def frame(self) -> tuple[int, int]:
        """The median of the images' sizes, by their area."""
        return sorted(self.sizes, key=lambda size: (size[0] * size[1], size))[len(self.sizes) // 2]

    @cached_property
    def label_statistics(self) -> LabelStatistics:
        return measure_labels(self.dataset)

    @cached_property
    def object_statistics(self) -> ObjectStatistics:
        pairs = pick_evenly(self.dataset.of("train"), NUM_MASKS_READ)
        return ObjectStatistics.of(read_objects(pair, self.dataset) for pair in pairs)

    @property
    def has_small_objects(self) -> bool:
        """Whether the network learns small objects from small crops of larger images."""
        model, data = self.settings.model, self.settings.data
        if not model.objects or data.size or self.network.margin:
            return False
        is_cut = max(data.crop or (0,)) <= OBJECT_CROP_SIDE < min(map(min, self.sizes))
        side = self.object_statistics.side * (data.scale or 1)
        return is_cut and 0 < side <= MAX_SMALL_OBJECT_SIDE

    @cached_property
    def first_image(self) -> Image:
        return read_pair_image(self.dataset.of("train")[0])

    @property
    def channels(self) -> int:
        return int(self.first_image.shape[2])

    @property
    def pixels(self) -> str:
        return str(self.first_image.dtype)

    @cached_property
    def network(self) -> Network:
        """A network of the right geometry, with a single channel."""
        architecture = self.settings.model.architecture()
        return build_network({**architecture, "width": 1, "channels": 1, "classes": 2})

    @property
    def is_timed(self) -> bool:
        """Whether the time decides how many steps there are."""
        return time_limit(self.settings.train) is not None

    @cached_property
    def affordable_pixels(self) -> float:
        """Pixels per crop so that ``MIN_CROPS_PER_RUN`` fit into the time; 0 without a time.

        It is measured when it is first needed, which takes a moment.
        """
        settings, device = self.settings, self.device
        seconds = time_limit(settings.train)
        if seconds is None:
            return 0.0
        width = settings.model.width or DEFAULT_WIDTH
        architecture = settings.model.architecture()
        network = build_network(
            {**architecture, "width": width, "channels": self.channels, "classes": 2}
        )
        side = network.valid_size(CROP_SIDE)
        x = torch.ones(2, self.channels, side, side).to(device, memory_format=torch.channels_last)
        network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        precision = choose_precision(settings.train.precision, device)
        # As in training (Trainer).
        graphed = not distributed.is_distributed()
        speed = measure_training_speed(network, x, precision, graphed)
        speed *= distributed.world_size()
        pixels = STEP_TIME_SHARE * seconds * speed
        return distributed.broadcast_from_main(pixels / MIN_CROPS_PER_RUN)

    @property
    def crop_pixels(self) -> int:
        """Pixels of a crop, ``FRAME_PIXELS`` or more: twice as many in four times the time."""
        affordable, settings = self.affordable_pixels, self.settings
        if settings.model.encoder in encoders.ENCODERS and not settings.model.start:
            # Steps at half the size leave time for larger images.
            coarse = settings.train.coarse
            coarse = COARSE_SHARE if coarse is None else coarse
            affordable /= 1 - coarse * (1 - COARSE_STEP_COST)
        return round(FRAME_PIXELS * math.sqrt(max(1.0, affordable / FRAME_PIXELS)))

    def choose_network(self) -> None:
        encoder, reason = choose_encoder(self.settings.model, self.channels)
        self.decide("model.encoder", encoder, reason)
        is_plain = self.settings.model.encoder == "plain"
        depth = self.network.stride.bit_length() - 1
        reason = "the depth of the paper's U-Net" if is_plain else "the depth of this encoder"
        self.decide("model.depth", depth, reason)
        if self.settings.train.precision is None:
            precision = distributed.broadcast_from_main(fastest_precision(self.device))
            reduced = "bf16" if precision == "fp32" else precision
            speedup = measure_speedup(self.device, PRECISIONS[reduced])
            self.decide(
                "train.precision",
                precision,
                f"on this machine a convolution in {reduced} is {speedup:.1f} times as fast as in "
                "fp32",
            )
        if self.is_timed:
            reason = "the default, because no minutes, epochs or steps are set"
            self.decide("train.minutes", DEFAULT_MINUTES, reason)

    def choose_objects(self) -> None:
        """Let the network learn to separate objects if some of them touch."""
        if not object_classes(self.dataset):
            if self.settings.model.objects:
                raise SettingsError(
                    "model.objects = true, but the masks do not distinguish objects; use masks "
                    "with numbered objects or drawn shapes, or set objects = true in classes.toml "
                    "for classes whose connected regions are objects"
                )
            return
        if self.settings.model.objects is not None:
            return
        share = self.object_statistics.touching
        if share:
            reason = (
                f"up to {100 * share:.0f} % of the objects of an image touch another one: the "
                "network also learns to separate them"
            )
        else:
            reason = "no objects touch: each connected region is one object"
        self.decide("model.objects", share > 0, reason)

    def choose_size(self) -> None:
        """Choose a size for images of whole scenes; others keep their resolution."""
        if self.settings.data.size or self.settings.data.scale:
            return
        position_information = self.label_statistics.position_information()
        explained = f"{100 * position_information:.0f} % of its class"
        if position_information >= MIN_POSITION_INFORMATION:
            whole = f"whole scenes: the position of a pixel explains {explained}, so images are"
            self.choose_frame(whole, MIN_LABEL_IOU)
        elif _are_photographs(self.sizes, self.channels):
            whole = "photographs (colour images that all have the same oblong size) are"
            self.choose_frame(whole, MIN_DETAIL_IOU)
        else:
            reason = (
                "images keep their resolution, because they are neither whole scenes (the position "
                f"of a pixel explains only {explained}) nor colour photographs of one size"
            )
            self.decide("data.scale", 1.0, reason)

    def choose_frame(self, whole: str, min_iou: float) -> None:
        """Choose one size for whole images, which the reason calls ``whole``.

        It has the pixels for which there is time, or more so that reduced labels keep ``min_iou``.
        """
        frame, pixels = self.frame, self.crop_pixels
        size = _reduce(frame, pixels, self.network.stride)
        limit = "as the time allows" if self.is_timed else "by default"
        reason = f"{whole} reduced to about {round(pixels, -3):,} pixels, {limit}"
        label_iou = self.label_statistics.iou_after_reduction
        while size != frame and (iou := label_iou(size[0] / frame[0])) < min_iou:
            reason = (
                f"{whole} not reduced further: at half as many pixels, labels would lose fine "
                f"structures (IoU with the original labels: {100 * iou:.0f} %)"
            )
            pixels *= 2
            size = _reduce(frame, pixels, self.network.stride)
        if size == frame and frame[0] * frame[1] <= self.crop_pixels:
            reason = f"{whole} used at their original size, which is small"
        self.decide("data.size", size, reason)

    def choose_crop(self) -> None:
        data, network = self.settings.data, self.network
        if data.size:
            is_decided = any(decision.key == "data.size" for decision in self.decisions)
            is_set = not (is_decided or self.settings.model.start)
            # This measures the speed, so it comes last.
            share = 1.0 if is_set else self.crop_pixels / (data.size[0] * data.size[1])
            # A frame that is only a little too large is not cut into crops.
            is_whole = share > 0.8
            wanted = data.size if is_whole else _scale(data.size, math.sqrt(share), network.stride)
            limit = "the time allows" if self.is_timed else "fit the default size"
            reason = "the whole frame" if is_whole else f"crops of the frame, as large as {limit}"
        else:
            side = VALID_CROP_SIDE if network.margin else CROP_SIDE
            reason = "crops, so that a batch fits into memory and shows parts of many images"
            if self.has_small_objects:
                side, reason = OBJECT_CROP_SIDE, "small crops show small objects from many images"
            narrowest, lowest = (min(side, *(size[k] for size in self.sizes)) for k in (0, 1))
            wanted = narrowest, lowest
        crop = _fit_crop(self.settings, data.crop or wanted, network, self.sizes)
        if crop != wanted:
            reason += ", rounded up to a size that the network takes"
        self.decide("data.crop", crop, reason)

    def choose_flips(self) -> None:
        vertical_information = self.label_statistics.vertical_information()
        self.decide("train.flips", *choose_flips(vertical_information))

    def choose_width(self) -> None:
        crop = self.settings.data.crop
        assert crop
        if self.settings.model.encoder != "plain":
            self.decide("model.width", DEFAULT_WIDTH, "a light decoder, which trains fast")
            return
        # This measures the speed, so it comes last.
        is_set = self.settings.model.width is not None
        spare = 0.0 if is_set else self.affordable_pixels / (crop[0] * crop[1])
        # Twice the width costs nearly four times as much.
        width = PAPER_WIDTH if spare >= 16 else 32 if spare >= 4 else DEFAULT_WIDTH
        if width == PAPER_WIDTH:
            reason = "the paper's width, for which there is time"
        elif self.is_timed:
            reason = (
                f"a wider network (the paper has {PAPER_WIDTH}) would see fewer than "
                f"{MIN_CROPS_PER_RUN:,} crops in the time"
            )
        else:
            reason = f"fast to train, because no time is set (the paper has {PAPER_WIDTH})"
        self.decide("model.width", width, reason)

    def choose_training(self) -> None:
        crop = self.settings.data.crop
        assert crop
        self.decide("train.class_weights", *choose_class_weights(self.label_statistics))
        self.decide("train.learning_rate", *choose_learning_rate(self.settings.model))
        self.decide("train.coarse", *choose_coarse(self.settings, self.is_timed))
        pixels = math.prod(side + 2 * self.network.margin for side in crop)
        self.decide("train.batch", *choose_batch(pixels, small_objects=self.has_small_objects))
        model = self.settings.model
        position_information = self.label_statistics.position_information()
        vertical_information = self.label_statistics.vertical_information()
        if model.encoder in encoders.ENCODERS and (model.pretrained or model.start):
            self.decide("train.encoder_rate", *choose_encoder_rate(model, vertical_information))
        self.decide("train.optimizer", *choose_optimizer(model, vertical_information))
        self.decide("train.zoom", *choose_zoom(position_information))
        standardize = choose_standardize(vertical_information, self.settings, self.pixels)
        self.decide("data.standardize", *standardize)
        if self.settings.train.photometric is None:
            photometric = choose_photometric(position_information, self.dataset)
            self.decide("train.photometric", *photometric)


def _fit_crop(
    settings: Settings, crop: tuple[int, int], network: Network, sizes: set[tuple[int, int]]
) -> tuple[int, int]:
    """Return the smallest output size of the network that is at least ``crop`` (width, height).

    Raises:
        SettingsError: A size that the user has set does not fit the network.
    """
    margin, model = network.margin, settings.model
    width, height = output_size(network, crop)
    wanted, smallest = settings.data.size, network.valid_size(1)
    if settings.data.crop and (width, height) != settings.data.crop:
        raise SettingsError(
            f"data.crop = {_format_size(settings.data.crop)} is not an output size of this U-Net "
            f"({model.padding} padding, depth {network.stride.bit_length() - 1}); the next larger "
            f"one is {width}x{height}"
        )
    # Images that are this small themselves are mirrored at their edges.
    if margin and wanted and min(wanted) < smallest and wanted not in sizes:
        raise SettingsError(
            f"data.size = {_format_size(wanted)} is too small for this unpadded U-Net, which needs "
            f"at least {smallest} pixels each way; choose a larger data.size, a smaller "
            "model.depth, or model.padding = same"
        )
    return width, height


def _format_size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _are_photographs(sizes: set[tuple[int, int]], channels: int) -> bool:
    """Return whether the shape of images suggests a camera.

    Square images are usually cut from something larger, and grey ones come from instruments.
    """
    return len(sizes) == 1 and channels == 3 and len(set(next(iter(sizes)))) == 2


def _reduce(size: tuple[int, int], pixels: int, stride: int) -> tuple[int, int]:
    """Reduce a larger (width, height) to about ``pixels`` pixels."""
    factor = math.sqrt(pixels / (size[0] * size[1]))
    return size if factor >= 1 else _scale(size, factor, stride)


def _scale(size: tuple[int, int], factor: float, stride: int) -> tuple[int, int]:
    """Scale (width, height) by a factor, rounded to multiples of the stride."""
    width, height = (max(stride, round(side * factor / stride) * stride) for side in size)
    return width, height
