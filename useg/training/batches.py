"""Cut random crops out of the cached samples, and stack them into batches on the device.

Batch number s is a function of (seed, s) alone, whichever process computes it and however often a
run was interrupted. Pixels outside an image are its mirror image, as in the overlap-tile strategy
of the U-Net paper. With unpadded convolutions, the crop of the image is larger than the crop of
the label by ``margin`` pixels on each side.

On a GPU the samples are kept in its memory where they fit, and the same crops are cut there, so
that it never waits for images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from useg.classes import IGNORE
from useg.data.cache import CachedSample, Samples
from useg.device import (
    CPU,
    free_memory,
    is_out_of_memory,
    move_arrays,
    move_tensor,
    release_memory,
)
from useg.distributed import process_rank, world_size
from useg.machine import prefetch
from useg.models.geometry import reflect_indices
from useg.training.augment import (
    NO_PHOTOMETRIC,
    PhotometricRange,
    PixelChange,
    apply_changes,
    draw_change,
    draw_uniform,
    measure_colours,
)

Numbers = NDArray[Any]

# Natural logarithm of the largest change of the contrast of all bands together, and of each band.
MAX_CONTRAST_CHANGE = 0.3
MAX_TINT_CHANGE = 0.08

# Largest change of the brightness, in standard deviations of the pixels.
MAX_BRIGHTNESS_CHANGE = 0.35

# Share of crops recoloured to match an image without a mask, if there are any. With 0.9, models
# were worse on images like the training images, and not always better on others.
MATCHED_SHARE = 0.5

# Pixels of 16-bit and float images from which mean and deviation are computed, and the percentage
# at either end that is clipped first (hot and dead pixels).
MAX_SAMPLED_PIXELS = 1_000_000
_CLIPPED_PERCENT = 0.5

# Share of the free GPU memory that the samples may take.
MAX_GPU_MEMORY_SHARE = 0.3


def pixel_statistics(samples: Samples) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each band, in raw pixel units.

    Of 8-bit images, all pixels with data count. Of 16-bit and float images, a million pixels count,
    evenly spread over all images; each band is clipped to its percentiles 0.5 and 99.5, so that a
    few hot pixels do not matter. Of those with pixels without data, labelled ones count. A constant
    band has deviation 1.
    """
    measure = _exact_statistics if samples.pixels == "uint8" else _robust_statistics
    mean, std = measure(samples)
    means, deviations = mean.tolist(), std.tolist()
    # A constant band may have a tiny deviation from rounding.
    return means, [
        value if value > 1e-6 * abs(middle) else 1.0
        for value, middle in zip(deviations, means, strict=True)
    ]


def _exact_statistics(samples: Samples) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    num_pixels = max(1, samples.table.counted.sum())
    total, squares = samples.table.moments.sum(0)
    mean = total / num_pixels
    return mean, np.sqrt(np.maximum(squares / num_pixels - mean**2, 0))


def _robust_statistics(samples: Samples) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    per_sample = max(1, MAX_SAMPLED_PIXELS // len(samples))
    chosen = []
    for sample, area, counted in zip(
        samples, samples.table.areas, samples.table.counted, strict=True
    ):
        pixels = sample.image.reshape(-1, sample.image.shape[2])
        if counted < area:
            # Pixels without data can only be recognised by their ignored labels.
            is_labelled = sample.label.ravel() != IGNORE
            pixels = pixels[is_labelled] if is_labelled.any() else pixels[:1]
        indices = np.linspace(0, len(pixels) - 1, min(per_sample, len(pixels))).astype(np.intp)
        chosen.append(pixels[indices].astype(np.float64))
    values = np.concatenate(chosen)
    limits = np.percentile(values, (_CLIPPED_PERCENT, 100 - _CLIPPED_PERCENT), axis=0)
    clipped = np.clip(values, *limits)
    std = clipped.std(0)
    # If nearly all pixels have one value, clipping removes the rest: then use all pixels.
    return clipped.mean(0), np.where(std > 0, std, values.std(0))


def class_shares(samples: Samples) -> NDArray[np.float64]:
    """Return each class's share of the counted pixels ``(K,)``; all 0 if every pixel is ignored."""
    counts = samples.table.counts.sum(0)
    shares: NDArray[np.float64] = counts / max(1, counts.sum())
    return shares


@dataclass(frozen=True)
class Crop:
    """A crop of a sample, and how its pixels change.

    Args:
        top, left: Corner of the crop in the label, in its pixels; it may lie outside.
        zoom: Pixels of the sample per pixel of the crop (1 copies, below 1 enlarges).
        flip_left_right, flip_top_bottom: Whether to flip it.
        gain, offset: Per band (or one number), applied to the pixels as ``x * gain + offset``.
        change: Further changes of the pixels, after gain and offset; None for none.
    """

    top: float
    left: float
    zoom: float = 1.0
    flip_left_right: bool = False
    flip_top_bottom: bool = False
    gain: NDArray[np.float32] | float = 1.0
    offset: NDArray[np.float32] | float = 0.0
    change: PixelChange | None = None


def draw_crop(
    rng: np.random.Generator,
    shape: tuple[int, int],
    size: tuple[int, int],
    flips: str,
    mean: NDArray[np.float32],
    std: NDArray[np.float32],
    zoom_range: tuple[float, float],
) -> Crop:
    """Draw a random crop.

    Args:
        rng: Source of all randomness.
        shape: (height, width) of the sample.
        size: (width, height) of the label's crop.
        flips: ``"horizontal"`` or ``"all"``.
        mean, std: Of the pixels, per band; brightness and contrast change relative to them.
        zoom_range: Of the zoom: pixels of the sample per pixel of the crop.
    """
    zoom = float(np.exp(draw_uniform(rng, *np.log(zoom_range))))
    top = _draw_start(rng, shape[0], size[1] * zoom)
    left = _draw_start(rng, shape[1], size[0] * zoom)
    contrast = np.exp(draw_uniform(rng, -MAX_CONTRAST_CHANGE, MAX_CONTRAST_CHANGE)) * np.exp(
        rng.uniform(-MAX_TINT_CHANGE, MAX_TINT_CHANGE, mean.shape)
    )
    brightness = draw_uniform(rng, -MAX_BRIGHTNESS_CHANGE, MAX_BRIGHTNESS_CHANGE) * std
    return Crop(
        top,
        left,
        zoom,
        flip_left_right=bool(rng.random() < 0.5),
        flip_top_bottom=flips == "all" and bool(rng.random() < 0.5),
        gain=contrast.astype(np.float32),
        offset=(mean * (1 - contrast) + brightness).astype(np.float32),
    )


def _draw_start(rng: np.random.Generator, available: int, wanted: float) -> float:
    """Draw where a crop starts: anywhere inside if it fits, else so that it covers the sample."""
    low, high = sorted((0.0, available - wanted))
    return draw_uniform(rng, low, high)


@dataclass(frozen=True)
class CropPixels:
    """The pixels of a sample that a crop is made of, flipped and mirrored at the edges.

    Args:
        rows, columns: ``(2, height + 2 margin)`` and ``(2, width + 2 margin)``: the two pixels of
            the image between which each pixel of the crop lies.
        down, right: How near it is to the second, 0 to 1, float32.
        label_rows, label_columns: ``(height,)`` and ``(width,)``: the nearest pixel of the label.
    """

    rows: NDArray[np.intp]
    columns: NDArray[np.intp]
    down: NDArray[np.float32]
    right: NDArray[np.float32]
    label_rows: NDArray[np.intp]
    label_columns: NDArray[np.intp]


def find_crop_pixels(
    shape: tuple[int, int], crop: Crop, size: tuple[int, int], margin: int
) -> CropPixels:
    """Return the pixels of a crop.

    Args:
        shape: (height, width) of the sample.
        crop: The crop.
        size: (width, height) of the label's crop.
        margin: Further pixels on each side of the image's crop.
    """
    y = _crop_positions(crop.top, crop.zoom, size[1], margin, crop.flip_top_bottom)
    x = _crop_positions(crop.left, crop.zoom, size[0], margin, crop.flip_left_right)
    rows, down, label_rows = _neighbours(y, shape[0], margin)
    columns, right, label_columns = _neighbours(x, shape[1], margin)
    return CropPixels(rows, columns, down, right, label_rows, label_columns)


def _crop_positions(
    start: float | Numbers, zoom: float | Numbers, size: int, margin: int, flip: bool | Numbers
) -> NDArray[np.float64]:
    """Return the pixel centres of a crop in the sample, in which pixel k has its centre at k.

    With columns ``(N, 1)`` of numbers, those of N crops.
    """
    positions = start + (np.arange(-margin, size + margin, dtype=np.float64) + 0.5) * zoom - 0.5
    return np.where(flip, positions[..., ::-1], positions)


def _neighbours(
    positions: NDArray[np.float64], length: int | Numbers, margin: int
) -> tuple[NDArray[np.intp], NDArray[np.float32], NDArray[np.intp]]:
    """Return the two pixels around each position, how near it is to the second, and the nearest."""
    first = np.floor(positions).astype(np.intp)
    pairs = reflect_indices(np.stack([first, first + 1]), length)
    inner = positions[..., slice(margin, -margin or None)]
    nearest = reflect_indices(np.round(inner).astype(np.intp), length)
    return pairs, (positions - first).astype(np.float32), nearest


def cut_crop(
    sample: CachedSample, crop: Crop, size: tuple[int, int], margin: int
) -> tuple[NDArray[np.float32], NDArray[np.uint8] | NDArray[np.uint16]]:
    """Cut a crop out of a sample.

    Args:
        sample: The sample.
        crop: The crop.
        size: (width, height) of the label's crop.
        margin: Further pixels on each side of the image's crop.

    Returns:
        Image ``(height + 2 margin, width + 2 margin, C)`` float32 in raw pixel units, and label
        ``(height, width)``, of the number type of the sample's.
    """
    height, width = sample.label.shape
    pixels = find_crop_pixels((height, width), crop, size, margin)
    image = _interpolate(sample.image, pixels)
    image *= _repeat_bands(crop.gain, image)
    image += _repeat_bands(crop.offset, image)
    label = sample.label.take(pixels.label_rows, 0).take(pixels.label_columns, 1)
    return image.reshape(pixels.rows.shape[1], pixels.columns.shape[1], -1), label


def _repeat_bands(
    values: NDArray[np.float32] | float, image: NDArray[np.float32]
) -> NDArray[np.float32] | float:
    """Repeat the values of the bands along a row ``(columns * C)``."""
    return values if isinstance(values, float) else np.tile(values, image.shape[1] // len(values))


def _interpolate(image: NDArray[np.generic], pixels: CropPixels) -> NDArray[np.float32]:
    """Interpolate an image (H, W, C) bilinearly.

    Returns:
        ``(rows, columns * C)`` float32: numpy is several times as fast along long rows as along a
        few bands.
    """
    height, bands = pixels.rows.shape[1], image.shape[2]
    rows = image.take(pixels.rows[0], axis=0).astype(np.float32)
    if pixels.down.any():
        below = image.take(pixels.rows[1], axis=0).astype(np.float32)
        rows += (below - rows) * pixels.down[:, None, None]
    result: NDArray[np.float32] = rows.take(pixels.columns[0], axis=1).reshape(height, -1)
    if pixels.right.any():
        difference = rows.take(pixels.columns[1], axis=1).reshape(height, -1)
        difference -= result
        difference *= np.repeat(pixels.right, bands)
        result += difference
    return result


class DeviceSamples:
    """Samples in the memory of a device: 8-bit pixels as they are, others as float32.

    All pixels lie one after the other, so that a whole batch is cut at once, whatever the sizes of
    its samples are.
    """

    def __init__(self, samples: Samples, device: torch.device) -> None:
        self.device = device
        self.shapes = [sample.label.shape for sample in samples]
        areas = [height * width for height, width in self.shapes]
        self.starts = np.concatenate([[0], np.cumsum(areas)])
        first = pixels_to_move(samples[0].image)
        kind = torch.from_numpy(first).dtype
        size = int(self.starts[-1])
        self.pixels = torch.empty((size, first.shape[2]), dtype=kind, device=device)
        # The labels of objects have 16 bits, for which PyTorch has few operations.
        kind = torch.uint8 if samples[0].label.dtype == np.uint8 else torch.int32
        self.labels = torch.empty(size, dtype=kind, device=device)
        for k, sample in enumerate(samples):
            place = slice(int(self.starts[k]), int(self.starts[k + 1]))
            image = torch.from_numpy(pixels_to_move(sample.image)).to(device)
            self.pixels[place] = image.flatten(0, 1)
            label = sample.label.astype(np.uint8 if kind == torch.uint8 else np.int32)
            self.labels[place] = torch.from_numpy(label).to(device).flatten()

    def cut_crops(
        self, drawn: Sequence[tuple[int, Crop]], size: tuple[int, int], margin: int
    ) -> tuple[Tensor, Tensor]:
        """Cut the crops ``(index of the sample, crop)`` as :func:`cut_crop` does, all at once.

        Returns:
            Images ``(N, height + 2 margin, width + 2 margin, C)`` float32 in raw pixel units, and
            labels ``(N, height, width)`` int64.
        """
        crops = [crop for _, crop in drawn]
        places = [(self.starts[k], *self.shapes[k]) for k, _ in drawn]
        first, heights, widths = np.array(places).T[..., None]
        zoom = _column(crop.zoom for crop in crops)
        upside_down = _column(crop.flip_top_bottom for crop in crops)
        mirrored = _column(crop.flip_left_right for crop in crops)
        y = _crop_positions(_column(c.top for c in crops), zoom, size[1], margin, upside_down)
        x = _crop_positions(_column(c.left for c in crops), zoom, size[0], margin, mirrored)
        rows, down, label_rows = _neighbours(y, heights, margin)
        columns, right, label_columns = _neighbours(x, widths, margin)
        colors = np.empty((2, len(crops), self.pixels.shape[1]), np.float32)
        for k, crop in enumerate(crops):
            colors[0, k], colors[1, k] = crop.gain, crop.offset
        # Positions of the first pixels of rows, and of columns in their row.
        above_below, left_right, label_starts, label_offsets = move_arrays(
            [first + widths * rows, columns, first + widths * label_rows, label_columns],
            self.device,
        )
        to_below, to_right, gain, offset = move_arrays(
            [down[:, :, None, None], right[:, None, :, None], *colors], self.device
        )
        corners = [
            [self.pixels[start[:, :, None] + column[:, None]].float() for start in above_below]
            for column in left_right
        ]
        left_side, right_side = (torch.lerp(above, below, to_below) for above, below in corners)
        image = torch.lerp(left_side, right_side, to_right)
        image = image * gain[:, None, None] + offset[:, None, None]
        return image, self.labels[label_starts[:, :, None] + label_offsets[:, None]].long()


def _column(values: Iterable[float]) -> Numbers:
    return np.array(list(values))[:, None]


def pixels_to_move(image: NDArray[np.generic]) -> NDArray[np.generic]:
    """Return a copy of an image in a number type that devices take: uint8 or float32."""
    return np.array(image, np.uint8 if image.dtype == np.uint8 else np.float32)


def move_samples(samples: Samples, device: torch.device) -> DeviceSamples | None:
    """Copy samples to a GPU; None if there is none, or too little free memory on it."""
    if device == CPU:
        return None
    bands = samples.table.moments.shape[2]
    pixel_bytes = bands * (1 if samples.pixels == "uint8" else 4)
    pixel_bytes += 1 if samples.labels == "uint8" else 4
    num_bytes = int(samples.table.areas.sum()) * pixel_bytes
    try:
        if num_bytes >= MAX_GPU_MEMORY_SHARE * free_memory(device):
            return None
        return DeviceSamples(samples, device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        release_memory(device)
        return None


@dataclass(frozen=True)
class Batches:
    """Endless batches of crops.

    Args:
        samples: The training samples; an epoch shows each once, in a new random order.
        size: (width, height) of a crop of the label.
        batch: Crops in a batch, of all processes together; a batch may reach into the next epoch.
        seed: Seed of all randomness.
        flips: ``"horizontal"`` or ``"all"``; None turns augmentation off: crops are only cut out,
            not flipped, scaled or recoloured.
        mean, std: Of the pixels, per band; colours change relative to them.
        margin: Pixels by which the crop of the image is larger on each side.
        device: Where the batches go.
        device_samples: The samples on that device, where they fit.
        coarse_size: (width, height) of a crop at half the size.
        zoom: Range of the random zoom.
        photometric: How strongly colours, light and sharpness of crops change.
        colours: Colours of P images without masks, which crops may take: ``(P, C, quantiles)``, as
            :func:`useg.training.augment.measure_colours` returns them.
    """

    samples: Sequence[CachedSample]
    size: tuple[int, int]
    batch: int
    seed: int
    flips: str | None
    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    margin: int
    device: torch.device
    device_samples: DeviceSamples | None = None
    coarse_size: tuple[int, int] = (0, 0)
    zoom: tuple[float, float] = (1.0, 1.0)
    photometric: PhotometricRange = NO_PHOTOMETRIC
    colours: NDArray[np.float32] | None = None
    _measured: dict[int, NDArray[np.float32]] = field(default_factory=dict, init=False, repr=False)

    @property
    def per_epoch(self) -> float:
        """Batches per epoch, not rounded."""
        return len(self.samples) / self.batch

    def stream(
        self,
        first: int,
        is_coarse: Callable[[int], bool] = lambda number: False,
        is_matched: Callable[[int], bool] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches without end; the next one is cut while the network uses the current one.

        Args:
            first: Number of the first batch.
            is_coarse: Whether the batch of a number is at half the size.
            is_matched: Whether crops of that batch take the colours of images without masks; None
                if there are none.
        """
        yield from prefetch(
            self.at(number, is_coarse(number), bool(is_matched and is_matched(number)))
            for number in count(first)
        )

    def at(self, number: int, coarse: bool = False, matched: bool = False) -> tuple[Tensor, Tensor]:
        """Cut one batch, or this process's part of it.

        Args:
            number: The number of the batch.
            coarse: Whether it is at half the size.
            matched: Whether crops take the colours of images without masks.

        Returns:
            Raw pixels ``(N, C, H, W)`` float32 and class ids ``(N, h, w)`` int64; with objects,
            plus 256 times the depth.
        """
        per_process = self.batch // world_size()
        first = number * self.batch + process_rank() * per_process
        size, zoom = (self.coarse_size, 2) if coarse else (self.size, 1)
        drawn = [
            self._draw(*divmod(k, len(self.samples)), size, zoom, matched)
            for k in range(first, first + per_process)
        ]
        if self.device_samples:
            images, labels = self.device_samples.cut_crops(drawn, size, self.margin)
            return self._apply_changes(images, drawn).permute(0, 3, 1, 2), labels
        crops = [cut_crop(self.samples[index], crop, size, self.margin) for index, crop in drawn]
        images = torch.from_numpy(np.stack([image for image, _ in crops]))
        # The pixels are in channels-last order already.
        x = self._apply_changes(images, drawn).permute(0, 3, 1, 2)
        target = torch.from_numpy(np.stack([label for _, label in crops]).astype(np.int64))
        return move_tensor(x, self.device), move_tensor(target, self.device)

    def _apply_changes(self, images: Tensor, drawn: Sequence[tuple[int, Crop]]) -> Tensor:
        changes = [crop.change for _, crop in drawn if crop.change is not None]
        if not changes:
            return images
        limit = self.photometric.limit
        scale = limit or 4 * float(self.std.mean())
        is_on_gpu = self.device_samples is not None
        return apply_changes(images, changes, limit, scale, at_once=is_on_gpu)

    def _draw(
        self, epoch: int, position: int, size: tuple[int, int], zoom: int, matched: bool
    ) -> tuple[int, Crop]:
        """Return the index of a sample and a crop of it, ``size`` (width, height) times zoom."""
        index = int(_epoch_order(self.seed, epoch, len(self.samples))[position])
        rng = np.random.default_rng((self.seed, epoch, index))
        on_device = self.device_samples
        shape = on_device.shapes[index] if on_device else self.samples[index].label.shape
        width, height = zoom * size[0], zoom * size[1]
        if not self.flips:
            top = _draw_integer_start(rng, shape[0] - height)
            left = _draw_integer_start(rng, shape[1] - width)
            return index, Crop(top, left, zoom)
        crop = draw_crop(rng, shape, (width, height), self.flips, self.mean, self.std, self.zoom)
        change = None
        if self.photometric or matched:
            change = draw_change(rng, len(self.mean), self.photometric)
        if matched and change and self.colours is not None and rng.random() < MATCHED_SHARE:
            # Contrast and brightness change first, and matching removes these changes.
            old = self._colours_of(index)
            old = old * np.reshape(crop.gain, (-1, 1)) + np.reshape(crop.offset, (-1, 1))
            new = self.colours[rng.integers(len(self.colours))]
            change = replace(change, matched=(old, new))
        return index, replace(crop, zoom=zoom * crop.zoom, change=change)

    def _colours_of(self, index: int) -> NDArray[np.float32]:
        """Return the colours of a sample; they are measured at its first use."""
        if index not in self._measured:
            self._measured[index] = measure_colours(self.samples[index].image)
        return self._measured[index]


def _draw_integer_start(rng: np.random.Generator, room: int) -> int:
    return int(rng.integers(min(0, room), max(0, room) + 1))


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, num_samples: int) -> NDArray[np.intp]:
    """Return the order of the samples in an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(num_samples)
