"""Cached samples -> batches on the device: batch number s is a function of (seed, s) alone, whichever process asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from useg.data.cache import CachedSample, Samples
from useg.distributed import process_rank, world_size
from useg.machine import ahead
from useg.models.geometry import reflect_indices

PICKED = 1_000_000  # pixels that stand for all of a set of 16-bit or float pictures


_TAIL = (
    0.5  # per cent of them at either end that count as the last value before: hot pixels, dead ones
)


def pixel_statistics(samples: Samples) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each band, in raw pixel units; a constant band has deviation 1.

    8-bit pixels all count. Of 16-bit and float pixels, which have no bounds to speak of, a million evenly spread over all pictures do, each
    band clipped to its percentiles 0.5 and 99.5, so that a few hot pixels do not flatten the rest.
    """
    mean, std = _exact(samples) if samples.pixels == "uint8" else _robust(samples)
    # What is left of a constant by rounding is no deviation, in whatever unit.
    return mean.tolist(), [
        value if value > 1e-6 * abs(middle) else 1.0
        for value, middle in zip(std.tolist(), mean.tolist(), strict=True)
    ]


def _exact(samples: Samples) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    count = samples.table.areas.sum()
    total, squares = samples.table.moments.sum(0)
    mean = total / count
    return mean, np.sqrt(np.maximum(squares / count - mean**2, 0))


def _robust(samples: Samples) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    each = max(1, PICKED // len(samples))
    picked = []
    for sample in samples:
        pixels = sample.image.reshape(-1, sample.image.shape[2])
        picked.append(
            pixels[np.linspace(0, len(pixels) - 1, min(each, len(pixels))).astype(np.intp)].astype(
                np.float64
            )
        )
    values = np.concatenate(picked)
    clipped = np.clip(values, *np.percentile(values, (_TAIL, 100 - _TAIL), axis=0))
    std = clipped.std(0)
    return clipped.mean(0), np.where(
        std > 0, std, values.std(0)
    )  # the rest is all there is where nearly every pixel has one value


def class_shares(samples: Samples) -> NDArray[np.float64]:
    """Return each class's share of the counted pixels, ``(K,)``, summing to 1 (all 0 when every pixel is ignored)."""
    counts = samples.table.counts.sum(0)
    shares: NDArray[np.float64] = counts / max(1, counts.sum())
    return shares


ZOOM = 0.6, 1.15  # pixels of the sample per pixel of a crop, from and to


CONTRAST = 0.3  # natural logarithm of the most by which all bands' contrast changes


TINT = 0.08  # and of the most by which each band's changes beside


BRIGHTNESS = 0.35  # deviations by which brightness changes at most


@dataclass(frozen=True)
class Crop:
    """Where and how to look.

    Args:
        top, left: corner of the window in the label, in its pixels; may lie outside.
        zoom: pixels of the sample per pixel of the crop (1 copies, below 1 enlarges).
        mirror, turn: flip left-right, flip top-bottom.
        gain, offset: per band (or one number), applied to the pixels as ``x * gain + offset``.
    """

    top: float
    left: float
    zoom: float = 1.0
    mirror: bool = False
    turn: bool = False
    gain: NDArray[np.float32] | float = 1.0
    offset: NDArray[np.float32] | float = 0.0


def draw_crop(
    rng: np.random.Generator,
    height: int,
    width: int,
    size: tuple[int, int],
    flips: str,
    mean: NDArray[np.float32],
    std: NDArray[np.float32],
) -> Crop:
    """Draw a random crop of ``size`` (width, height) from a sample of ``height`` x ``width``.

    Args:
        rng: source of all randomness.
        height, width: of the sample.
        size: (width, height) of the label's crop.
        flips: ``"horizontal"`` or ``"all"``.
        mean, std: of the pixels, per band; brightness and contrast change relative to them.
    """
    zoom = float(np.exp(rng.uniform(*np.log(ZOOM))))
    top, left = (
        _corner(rng, have, want * zoom) for have, want in ((height, size[1]), (width, size[0]))
    )
    contrast = np.exp(rng.uniform(-CONTRAST, CONTRAST)) * np.exp(
        rng.uniform(-TINT, TINT, mean.shape)
    )
    brightness = rng.uniform(-BRIGHTNESS, BRIGHTNESS) * std
    return Crop(
        top,
        left,
        zoom,
        mirror=bool(rng.random() < 0.5),
        turn=flips == "all" and bool(rng.random() < 0.5),
        gain=contrast.astype(np.float32),
        offset=(mean * (1 - contrast) + brightness).astype(np.float32),
    )


def _corner(rng: np.random.Generator, have: int, want: float) -> float:
    """Where a window of ``want`` pixels starts: anywhere inside when it fits, centred with some play when it does not."""
    low, high = sorted((0.0, have - want))
    return float(rng.uniform(low, high))


@dataclass(frozen=True)
class CropWindow:
    """Which pixels of a sample a crop is made of, flipped and mirrored.

    Args:
        rows, columns: ``(2, height + 2 margin)`` and ``(2, width + 2 margin)``: of the image, the two between which each lies.
        down, right: how near it is to the second, 0 to 1, float32.
        label_rows, label_columns: ``(height,)`` and ``(width,)``: of the label, the nearest.
    """

    rows: NDArray[np.intp]
    columns: NDArray[np.intp]
    down: NDArray[np.float32]
    right: NDArray[np.float32]
    label_rows: NDArray[np.intp]
    label_columns: NDArray[np.intp]


def look_through(
    shape: tuple[int, int], crop: Crop, size: tuple[int, int], margin: int
) -> CropWindow:
    """Find the pixels of a crop: of ``size`` (width, height) in the label, of a sample of ``shape`` (height, width)."""
    rows = _positions(crop.top, crop.zoom, size[1], margin, crop.turn)
    columns = _positions(crop.left, crop.zoom, size[0], margin, crop.mirror)
    inner, found = slice(margin, -margin or None), []
    for places, length in ((rows, shape[0]), (columns, shape[1])):
        first = np.floor(places).astype(np.intp)
        pairs = np.stack([reflect_indices(first, length), reflect_indices(first + 1, length)])
        found.append(
            (
                pairs,
                (places - first).astype(np.float32),
                reflect_indices(np.round(places[inner]).astype(np.intp), length),
            )
        )
    (rows_, down, label_rows), (columns_, right, label_columns) = found
    return CropWindow(rows_, columns_, down, right, label_rows, label_columns)


def take(
    sample: CachedSample, crop: Crop, size: tuple[int, int], margin: int
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Cut a crop out of a sample.

    Args:
        sample: what to look at.
        crop: where and how.
        size: (width, height) of the label's crop.
        margin: further pixels on each side of the image's crop.

    Returns:
        Image ``(height + 2 margin, width + 2 margin, C)`` float32 in raw pixel units, and label ``(height, width)`` uint8.
    """
    height, width = sample.label.shape
    window = look_through((height, width), crop, size, margin)
    image = _bilinear(sample.image, window)
    image *= _along(crop.gain, image)
    image += _along(crop.offset, image)
    label = sample.label.take(window.label_rows, 0).take(window.label_columns, 1)
    return image.reshape(window.rows.shape[1], window.columns.shape[1], -1), label


def _along(
    amount: NDArray[np.float32] | float, image: NDArray[np.float32]
) -> NDArray[np.float32] | float:
    """Repeat what there is of each band along a row ``(columns * C)``."""
    return amount if isinstance(amount, float) else np.tile(amount, image.shape[1] // len(amount))


def _positions(
    start: float, zoom: float, size: int, margin: int, flip: bool
) -> NDArray[np.float64]:
    """Pixel centres of a crop in the coordinates of the sample (pixel k has its centre at k)."""
    positions = start + (np.arange(-margin, size + margin, dtype=np.float64) + 0.5) * zoom - 0.5
    return positions[::-1] if flip else positions


def _bilinear(image: NDArray[np.generic], window: CropWindow) -> NDArray[np.float32]:
    """Sample ``image`` (H, W, C) at every pair of a row and a column, linear in each direction.

    Returns:
        ``(rows, columns * C)`` float32: numpy is several times as fast along long rows as along a few bands.
    """
    low, bands = window.rows.shape[1], image.shape[2]
    upper = image.take(window.rows[0], axis=0).astype(np.float32)
    if window.down.any():
        upper += (image.take(window.rows[1], axis=0).astype(np.float32) - upper) * window.down[
            :, None, None
        ]
    west: NDArray[np.float32] = upper.take(window.columns[0], axis=1).reshape(low, -1)
    if window.right.any():
        east = upper.take(window.columns[1], axis=1).reshape(low, -1)
        east -= west
        east *= np.repeat(window.right, bands)
        west += east
    return west


RESIDENT_SHARE = 0.3  # of the free memory that samples may take


class Resident:
    """Samples on a device: pixels of 8 bits as they are, others as float32; labels of 8 bits."""

    def __init__(self, samples: Samples, device: torch.device) -> None:
        self.device = device
        self.images = [
            self._moved(
                sample.image if sample.image.dtype == np.uint8 else sample.image.astype(np.float32)
            )
            for sample in samples
        ]
        self.labels = [self._moved(sample.label) for sample in samples]

    def take(
        self, index: int, crop: Crop, size: tuple[int, int], margin: int
    ) -> tuple[Tensor, Tensor]:
        """Cut a crop out of sample ``index``, as :func:`useg.training.batches.take` does.

        Returns:
            Image ``(height + 2 margin, width + 2 margin, C)`` float32 in raw pixel units, and label ``(height, width)`` int64.
        """
        image, label = self.images[index], self.labels[index]
        window = look_through((label.shape[0], label.shape[1]), crop, size, margin)
        rows, columns = self._moved(window.rows), self._moved(window.columns)
        upper, lower = image[rows].float()
        image = torch.lerp(upper, lower, self._moved(window.down)[:, None, None])
        image = torch.lerp(
            image[:, columns[0]], image[:, columns[1]], self._moved(window.right)[:, None]
        )
        gain, offset = (self._moved(np.float32(each)) for each in (crop.gain, crop.offset))
        label = label[self._moved(window.label_rows)[:, None], self._moved(window.label_columns)]
        return image * gain + offset, label.long()

    def _moved(self, array: NDArray[np.generic] | np.generic) -> Tensor:
        return torch.from_numpy(np.array(array)).to(self.device, non_blocking=True)


def resident(samples: Samples, device: torch.device) -> Resident | None:
    """Bring samples to a GPU, if they fit into a part of its free memory."""
    if device.type != "cuda":
        return None
    bands = samples.table.moments.shape[2]
    needed = int(samples.table.areas.sum()) * (bands * (1 if samples.pixels == "uint8" else 4) + 1)
    return (
        Resident(samples, device)
        if needed < RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]
        else None
    )


@dataclass(frozen=True)
class Batches:
    """Endless batches of crops.

    Args:
        samples: the training samples; each is seen once in an epoch, in an order drawn anew.
        size: (width, height) of a crop of the label.
        batch: crops in a batch, of all processes together; a batch may reach from one epoch into the next.
        seed: of all randomness.
        flips: ``"horizontal"`` or ``"all"``, or None for crops that are only cut out, not flipped, scaled or recoloured.
        mean, std: of the pixels per band: what changes of colour are relative to.
        margin: pixels by which the crop of the image is larger on each side.
        device: where the batches go.
        resident: the samples on that device, where they fit; crops are then cut there.
        coarse_size: of crops that show everything at half the size.
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
    resident: Resident | None = None
    coarse_size: tuple[int, int] = (0, 0)

    @property
    def per_epoch(self) -> float:
        """Batches in an epoch, not rounded."""
        return len(self.samples) / self.batch

    def stream(
        self, first: int, coarse: Callable[[int], bool] = lambda number: False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches from ``first`` on, without end; the next one is cut while the network works on this one.

        Args:
            first: number of the first batch.
            coarse: whether a batch shows everything at half the size.
        """
        yield from ahead(self.at(number, coarse(number)) for number in count(first))

    def at(self, number: int, coarse: bool = False) -> tuple[Tensor, Tensor]:
        """Cut one batch, or of it what is this process's part: raw pixels (N, C, H, W) float32 and ids (N, h, w) int64."""
        part = self.batch // world_size()
        first = number * self.batch + process_rank() * part
        size, zoom = (self.coarse_size, 2) if coarse else (self.size, 1)
        drawn = [
            self._draw(*divmod(place, len(self.samples)), size, zoom)
            for place in range(first, first + part)
        ]
        if self.resident:
            seen = [self.resident.take(index, crop, size, self.margin) for index, crop in drawn]
            return torch.stack([image for image, _ in seen]).permute(0, 3, 1, 2), torch.stack(
                [label for _, label in seen]
            )
        crops = [take(self.samples[index], crop, size, self.margin) for index, crop in drawn]
        x = torch.from_numpy(np.stack([image for image, _ in crops])).permute(
            0, 3, 1, 2
        )  # channels last as it is
        target = torch.from_numpy(np.stack([label for _, label in crops]).astype(np.int64))
        return x.to(self.device, non_blocking=True), target.to(self.device, non_blocking=True)

    def _draw(
        self, epoch: int, position: int, size: tuple[int, int], zoom: int
    ) -> tuple[int, Crop]:
        """Return which sample it is, and the crop of it: of ``size`` (width, height) after it was reduced ``zoom`` times."""
        index = int(_order(self.seed, epoch, len(self.samples))[position])
        rng = np.random.default_rng((self.seed, epoch, index))
        wide, high = zoom * size[0], zoom * size[1]
        height, width = self.samples[index].label.shape
        if self.flips:
            crop = draw_crop(rng, height, width, (wide, high), self.flips, self.mean, self.std)
        else:
            top, left = (
                int(rng.integers(min(0, room), max(0, room) + 1))
                for room in (height - high, width - wide)
            )
            crop = Crop(top, left)
        return index, replace(crop, zoom=zoom * crop.zoom)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> NDArray[np.intp]:
    """The order in which an epoch visits the samples."""
    return np.random.default_rng((seed, epoch)).permutation(count)
