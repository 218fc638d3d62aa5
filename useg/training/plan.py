"""A data set + this machine -> every setting that its user left open, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from useg.config import Settings
from useg.data.cache import WorkingSize
from useg.data.dataset import Pair, pair_size, read_pair_image
from useg.errors import UsageError
from useg.models.segmenter import Network, build

FRAME_PIXELS = 256 * 192  # whole frames are reduced to about this many pixels
CROP_SIDE = 256  # and pictures that are not frames are cropped to this
VALID_CROP_SIDE = 196  # that comes out of 380
BATCH_PIXELS = 4 * FRAME_PIXELS
DEFAULT_MINUTES = 10.0


@dataclass(frozen=True)
class Plan:
    """Settings with nothing left open but the number of steps, the bands and number type of the pictures, and why."""

    settings: Settings
    channels: int
    pixels: str
    reasons: tuple[str, ...]

    @property
    def working(self) -> WorkingSize:
        """The size at which the model will look at pictures."""
        return WorkingSize(self.settings.data.size, self.settings.data.scale or 1.0)


def make_plan(settings: Settings, pairs: Sequence[Pair]) -> Plan:
    """Decide what the user left open.

    Args:
        settings: what the user has set; the rest is None.
        pairs: the training pairs.

    Raises:
        UsageError: both a size and a scale are set.
    """
    if settings.data.size and settings.data.scale:
        raise UsageError(
            "data.size and data.scale are both set; data.size is for whole frames, data.scale for pictures whose pixels have a size: set one"
        )
    sizes = {pair_size(pair) for pair in pairs}
    first = read_pair_image(pairs[0])
    changes: dict[str, object] = {}
    reasons: list[str] = []

    def decide(key: str, value: object, reason: str) -> None:
        section, name = key.split(".")
        if getattr(getattr(settings, section), name) is None:
            changes[key] = value
            shown = _by(value) if isinstance(value, tuple) else value
            reasons.append(f"{key} = {shown}: {reason}")

    with torch.device("meta"):  # its geometry alone
        network = build({**settings.model.architecture(), "width": 1, "channels": 1, "classes": 2})
    decide("model.depth", network.stride.bit_length() - 1, "the paper's" if settings.model.encoder == "plain" else "as this network is made")
    if not settings.data.size and not settings.data.scale:
        if _are_frames(sizes, first.shape[2]):
            decide(
                "data.size",
                _reduced(next(iter(sizes)), network.stride),
                "colour pictures of one oblong size are a camera's frames: each is looked at whole, reduced to what fits the time",
            )
        else:
            decide("data.scale", 1.0, "not a camera's frames: a pixel has a size in the world, so pictures keep theirs")
    size = settings.with_(changes).data.size
    side = VALID_CROP_SIDE if network.margin else CROP_SIDE
    narrow, low = (min(side, *(each[k] for each in sizes)) for k in (0, 1))
    crop = _fit_crop(settings, settings.data.crop or size or (narrow, low), network, sizes)
    decide("data.crop", crop, "the whole frame" if size else "crops of it, so that a batch fits and each step sees many places")
    decide("train.flips", "horizontal" if size else "all", "a street has an up and a down" if size else "no direction is special")
    decide("model.width", 16, "a quarter of the paper's: sees four times as many pictures in the time as half of it would")
    pixels = (crop[0] + 2 * network.margin) * (crop[1] + 2 * network.margin)
    decide(
        "train.batch",
        max(4, min(8, round(BATCH_PIXELS / pixels))),
        "4 to 8, of about 200,000 pixels: in a short time many small steps learn more than few large ones, but batch normalisation needs a few",
    )
    if settings.train.steps is None and settings.train.epochs is None:
        decide("train.minutes", DEFAULT_MINUTES, "no time and no number of epochs given")
    return Plan(settings.with_(changes), first.shape[2], str(first.dtype), tuple(reasons))


def _fit_crop(settings: Settings, crop: tuple[int, int], network: Network, sizes: set[tuple[int, int]]) -> tuple[int, int]:
    """Return the smallest crop of at least ``crop`` (width, height) that the network gives; a size that is set must fit by itself."""
    margin = network.margin
    width, height = (network.valid_size(side + 2 * margin) - 2 * margin for side in crop)
    wanted, smallest = settings.data.size, network.valid_size(1)
    if settings.data.crop and (width, height) != settings.data.crop:
        raise UsageError(
            f"data.crop = {_by(settings.data.crop)} is no size that comes out of this U-Net ({settings.model.padding} padding, depth "
            f"{network.stride.bit_length() - 1}); the next that does is {width}x{height}"
        )
    if margin and wanted and min(wanted) < smallest and wanted not in sizes:  # small pictures themselves are mirrored up
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


def _reduced(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Reduce a larger (width, height) to about ``FRAME_PIXELS`` pixels, proportions kept to within rounding to multiples of the stride."""
    scale = math.sqrt(FRAME_PIXELS / (size[0] * size[1]))
    if scale >= 1:
        return size
    return max(stride, round(size[0] * scale / stride) * stride), max(stride, round(size[1] * scale / stride) * stride)


def choose_device() -> torch.device:
    """Return the GPU when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_precision(wanted: str, device: torch.device) -> torch.dtype | None:
    """Return the type of the autocast: bf16 where it is native (or asked for), else None for fp32."""
    if wanted == "fp32":
        return None
    native = torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_has_bf16()
    return torch.bfloat16 if wanted == "bf16" or native else None


def _cpu_has_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False  # not Linux: bf16 may be emulated, and slow
    return "avx512_bf16" in flags or "amx_bf16" in flags
