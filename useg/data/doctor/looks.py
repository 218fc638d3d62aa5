"""A pair -> one small look: what is measured once per pair, while its pixels are in memory; the detectors know nothing else.

A look has the same size for every picture, so a survey's memory does not grow with the pixels of the set.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE
from useg.data.dataset import Dataset, Pair, pair_name, read_label, read_pair_image
from useg.data.doctor.edges import Fit, fit
from useg.data.doctor.specks import Specks, find_specks
from useg.data.images import read_colors, read_mask, read_palette
from useg.errors import UsageError

GRID = (24, 32)  # rows and columns of a thumbnail
COLOR = 1 << 24  # codes from here on are colours, 0xRRGGBB above it; those below are values
IGNORED = -1  # the code of what a drawing leaves uncounted
_LONG = 4  # pixels: a run of one code that is this long is no edge between two others


@dataclass(frozen=True)
class ImageLook:
    """An image: ``size`` (width, height), ``bands``, ``dtype``, and a grey thumbnail ``GRID`` float32 in the file's own numbers."""

    size: tuple[int, int]
    bands: int
    dtype: str
    thumb: NDArray[np.float32]

    @cached_property
    def shape(self) -> NDArray[np.float32]:
        """The thumbnail as a vector of mean 0 and length 1, whatever the exposure; 0 everywhere for a blank picture."""
        return _unit(self.thumb)

    @cached_property
    def detail(self) -> NDArray[np.float32]:
        """The same without what is smooth in it, such as a bright sky over a dark road, which all pictures of a set may share."""
        padded = np.pad(self.thumb, 2, mode="edge")
        return _unit(self.thumb - np.lib.stride_tricks.sliding_window_view(padded, (5, 5)).mean((2, 3)))


@dataclass(frozen=True)
class MaskLook:
    """A mask.

    Args:
        size: (width, height).
        codes: sorted: what it stores, values or colours (from :data:`COLOR` on).
        counts: pixels of each code; ``inner``: those that lie in runs of at least four.
        grid: code at the middle of each cell of a ``GRID``.
        specks: tiny spots.
        palette: code -> colour as a code, for palette files.
    """

    size: tuple[int, int]
    codes: NDArray[np.int64]
    counts: NDArray[np.int64]
    inner: NDArray[np.int64]
    grid: NDArray[np.int64]
    specks: Specks
    palette: dict[int, int]


@dataclass(frozen=True)
class Look:
    """A pair: its image and mask as far as they could be read (``trouble``: the file and the error), and how well they fit."""

    pair: Pair
    image: ImageLook | None = None
    mask: MaskLook | None = None
    trouble: tuple[Path, UsageError] | None = None
    fit: Fit | None = None

    @property
    def whole(self) -> bool:
        """Image and mask are there and of one size."""
        return self.image is not None and self.mask is not None and self.image.size == self.mask.size


@dataclass(frozen=True)
class Case:
    """What the detectors look at: the data set, with its classes known, and a look at each of its pairs."""

    dataset: Dataset
    looks: tuple[Look, ...]
    guessed: bool = False  # nobody wrote the class table

    @cached_property
    def whole(self) -> tuple[Look, ...]:
        """The pairs whose image and mask could be read and are of one size."""
        return tuple(look for look in self.looks if look.whole)

    def name(self, path: Path) -> str:
        """Return a file's name as messages give it: its path below the data set's folder."""
        return str(path.relative_to(self.dataset.root)) if path.is_relative_to(self.dataset.root) else str(path)

    def called(self, look: Look) -> str:
        """Return what a pair is called in messages."""
        return pair_name(look.pair, self.dataset.root)

    @cached_property
    def known(self) -> dict[int, int]:
        """Code -> class id, or ``IGNORE`` for what does not count."""
        return known_codes(self.dataset)

    def ids(self, codes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the class id of each code: ``IGNORE`` for what does not count, -1 for what the table does not have."""
        return translated(codes, self.known, -1)

    @cached_property
    def counts(self) -> dict[Pair, NDArray[np.int64]]:
        """The pixels ``(256,)`` of each class id in each whole pair's mask; unknown codes are left out."""
        found = {}
        for look in self.whole:
            assert look.mask is not None
            ids = self.ids(look.mask.codes)
            found[look.pair] = np.bincount(ids[ids >= 0], look.mask.counts[ids >= 0], minlength=256).astype(np.int64)
        return found


def look_at(pair: Pair, dataset: Dataset, *, palettes: bool) -> Look:
    """Read a pair and measure it; with ``palettes``, the colours of palette files too."""
    try:
        image = read_pair_image(pair)
    except UsageError as error:
        return Look(pair, trouble=(pair.image, error))
    seen = ImageLook((image.shape[1], image.shape[0]), image.shape[2], str(image.dtype), _thumb(image))
    try:
        codes = read_codes(pair, dataset)
        mask = _look_at_mask(codes, _palette(pair) if palettes else {})
    except UsageError as error:
        return Look(pair, seen, trouble=(pair.mask, error))
    return Look(pair, seen, mask, fit=fit(image, codes) if seen.size == mask.size else None)


def read_codes(pair: Pair, dataset: Dataset) -> NDArray[Any]:
    """Read what a pair's mask stores: codes ``(H, W)``, colours (from :data:`COLOR` on) where it stores colours.

    Raises:
        UsageError: it cannot be read.
    """
    if pair.truth is not None:
        stored = np.full(256, IGNORED, np.int64)
        stored[: len(dataset.classes)] = dataset.classes.values
        return stored[read_label(pair, dataset)]
    mask = read_colors(pair.mask, page=pair.page) if dataset.classes.by_color else read_mask(pair.mask, page=pair.page)
    if mask.ndim == 2:
        return mask
    red = np.ascontiguousarray(mask[..., 0])
    if not dataset.classes.by_color and np.count_nonzero(mask) == np.count_nonzero(red):
        return red
    return mask[..., 0].astype(np.int32) << 16 | mask[..., 1].astype(np.int32) << 8 | mask[..., 2] | COLOR


def known_codes(dataset: Dataset) -> dict[int, int]:
    """Return code -> class id, or ``IGNORE`` for what does not count."""
    table = dataset.classes
    known = {IGNORED: IGNORE}
    if table.by_color:
        known |= {COLOR | code: IGNORE for code in table.ignore}
        return known | {COLOR | r << 16 | g << 8 | b: k for k, (r, g, b) in enumerate(table.colors)}
    known |= dict.fromkeys(table.ignore, IGNORE)
    known |= {value: k for k, value in enumerate(table.values)}
    return known | {COLOR | r << 16 | g << 8 | b: known[value] for (r, g, b), value in dataset.recolored if value in known}


def translated(codes: NDArray[Any], known: dict[int, int], otherwise: int) -> NDArray[np.int64]:
    """Replace each code by what ``known`` says, or by ``otherwise``."""
    keys = np.array(sorted(known), np.int64)
    values = np.array([known[int(key)] for key in keys], np.int64)
    place = np.clip(np.searchsorted(keys, codes), 0, len(keys) - 1)
    return np.where(keys[place] == codes, values[place], otherwise)


def _palette(pair: Pair) -> dict[int, int]:
    colors = read_palette(pair.mask) if pair.truth is None else None
    return {} if colors is None else {v: COLOR | int(r) << 16 | int(g) << 8 | int(b) for v, (r, g, b) in enumerate(colors)}


def _thumb(image: NDArray[Any]) -> NDArray[np.float32]:
    """Reduce an image ``(H, W, C)`` to a grey ``GRID``: the mean of at least four by four pixels of each cell."""
    H, W, _ = image.shape
    step = max(1, min(H // (4 * GRID[0]), W // (4 * GRID[1])))
    part: NDArray[Any] = image[step // 2 :: step, step // 2 :: step]
    grey: NDArray[Any] = np.zeros(part.shape[:2], np.float32)
    for band in range(part.shape[2]):  # several times as fast as a mean over so short an axis
        grey += part[..., band]
    grey /= part.shape[2]
    if grey.shape[0] < GRID[0] or grey.shape[1] < GRID[1]:
        grey = grey[np.ix_(np.arange(GRID[0]) * grey.shape[0] // GRID[0], np.arange(GRID[1]) * grey.shape[1] // GRID[1])]
    grey = np.nan_to_num(grey, posinf=0, neginf=0)
    rows, columns = (np.arange(size) * length // size for size, length in zip(GRID, grey.shape, strict=True))
    sums = np.add.reduceat(np.add.reduceat(grey, rows, 0), columns, 1)
    areas = np.outer(np.diff(rows, append=grey.shape[0]), np.diff(columns, append=grey.shape[1]))
    return (sums / areas).astype(np.float32)


def _look_at_mask(codes: NDArray[Any], palette: dict[int, int]) -> MaskLook:
    H, W = codes.shape
    flat = codes.ravel()
    starts = np.append(0, np.flatnonzero(flat[1:] != flat[:-1]) + 1)  # a mask is made of long runs: counting those is many times faster
    lengths = np.diff(starts, append=len(flat))
    found, place = np.unique(flat[starts], return_inverse=True)
    counts = np.bincount(place, lengths).astype(np.int64)
    inner = np.bincount(place, lengths * (lengths >= _LONG)).astype(np.int64)
    rows, columns = ((2 * np.arange(size) + 1) * length // (2 * size) for size, length in zip(GRID, (H, W), strict=True))
    used = {int(code): palette[int(code)] for code in found if int(code) in palette}
    return MaskLook(
        (W, H), found.astype(np.int64), counts, inner, codes[np.ix_(rows, columns)].astype(np.int64), find_specks(codes, starts, lengths), used
    )


def _unit(values: NDArray[np.float32]) -> NDArray[np.float32]:
    flat = values.ravel() - values.mean()
    length = float(np.linalg.norm(flat))
    return flat / length if length > 1e-3 * max(1.0, float(np.abs(values).max())) else np.zeros_like(flat)
