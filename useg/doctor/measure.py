"""What a detector says: one thing worth knowing, in words, with what proves it and what cures it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, Label
from useg.data.dataset import Dataset, Pair, pair_name, read_label, read_pair_image
from useg.errors import UsageError
from useg.images.files import read_colors, read_mask, read_palette

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Repair:
    """What mends one pair of image and mask.

    Args:
        pair: whose; None for a file that belongs to no pair.
        does: what is done, for the log of changes.
        ids: what the mask stores (its codes, see :mod:`useg.doctor.measure`) -> class id, or ``IGNORE``; wins over the class table.
        source: the pair whose mask is the right one.
        change: turns the label map ``(H, W)`` into the right one.
        split: the split into which the pair goes.
        leave_out: the pair is not taken over.
    """

    pair: Pair | None
    does: str
    ids: Mapping[int, int] = field(default_factory=dict)
    source: Pair | None = None
    change: Callable[[Label], Label] | None = None
    split: str = ""
    leave_out: bool = False


@dataclass(frozen=True)
class Finding:
    """One thing worth knowing: ``message`` says what, ``remedy`` what to do; ``error`` means that training would stop or mislead.

    ``cures`` are what ``useg inspect --fix`` does about it, and ``evidence`` is what a page needs to draw it.
    """

    kind: str
    severity: Severity
    files: tuple[Path, ...]
    message: str
    remedy: str
    cures: tuple[Repair, ...] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)


def join_with_and(items: Sequence[object]) -> str:
    """``[1, 2, 3]`` -> ``"1, 2 and 3"``."""
    return " and ".join(filter(None, (", ".join(str(item) for item in items[:-1]), str(items[-1]))))


def pluralize(number: int, what: str) -> str:
    """``(2, "image")`` -> ``"2 images"``."""
    return f"{number:,} {what}{'s' * (number != 1)}"


MAX_SHIFT_PIXELS = 8  # pixels that a fit looks around


_ROWS = 150  # rows of a mask that are searched for boundaries, about


_POINTS = 160  # boundary pixels looked at, in each direction


_FEW = 24  # fewer say nothing


EdgeAlignment = NDArray[
    np.float32
]  # (2 * REACH + 1, 2 * REACH + 1): edge strength under the boundary moved by (row, column) - REACH, mean 1


CodeMap = NDArray[Any]  # (H, W): what a mask stores


def measure_edge_alignment(image: NDArray[Any], codes: CodeMap) -> EdgeAlignment | None:
    """Measure the image's edges under the mask's boundaries.

    Args:
        image: ``(H, W, C)``; one band, the middle one, is looked at.
        codes: ``(H, W)``, equal where the class is.

    Returns:
        Strength of the image's edges for each shift, relative to the mean of all shifts; None where there are too few boundaries.
    """
    if min(codes.shape) < 4 * MAX_SHIFT_PIXELS:
        return None
    band = image[..., image.shape[2] // 2]
    windows = np.lib.stride_tricks.sliding_window_view(
        band, (2 * MAX_SHIFT_PIXELS + 2, 2 * MAX_SHIFT_PIXELS + 2)
    )
    maps = []
    for axis in (0, 1):
        rows, columns = _boundary(codes, axis)
        if len(rows) < _FEW:
            continue
        patches = windows[rows - MAX_SHIFT_PIXELS, columns - MAX_SHIFT_PIXELS]
        ahead = patches[:, 1:, :-1] if axis == 0 else patches[:, :-1, 1:]
        here = patches[:, :-1, :-1]
        strength = np.sqrt(
            (np.maximum(ahead, here) - np.minimum(ahead, here)).astype(np.float32)
        ).mean(0)  # the root tames single strong edges
        if strength.any():  # a blank image has no edges to lie on
            maps.append(strength / strength.mean())
    return np.mean(maps, axis=0, dtype=np.float32) if maps else None


def _boundary(codes: CodeMap, axis: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return rows and columns of pixels whose next pixel along ``axis`` is of another class, evenly picked, away from the border."""
    step = max(1, codes.shape[0] // _ROWS)
    inner = codes[
        MAX_SHIFT_PIXELS : -MAX_SHIFT_PIXELS - 1 : step, MAX_SHIFT_PIXELS : -MAX_SHIFT_PIXELS - 1
    ]
    ahead = (
        codes[
            MAX_SHIFT_PIXELS + 1 : -MAX_SHIFT_PIXELS : step,
            MAX_SHIFT_PIXELS : -MAX_SHIFT_PIXELS - 1,
        ]
        if axis == 0
        else codes[
            MAX_SHIFT_PIXELS : -MAX_SHIFT_PIXELS - 1 : step,
            MAX_SHIFT_PIXELS + 1 : -MAX_SHIFT_PIXELS,
        ]
    )
    places = np.flatnonzero(inner != ahead)
    if len(places) > _POINTS:
        places = places[np.linspace(0, len(places) - 1, _POINTS).astype(np.intp)]
    rows, columns = np.divmod(places, inner.shape[1])
    return rows * step + MAX_SHIFT_PIXELS, columns + MAX_SHIFT_PIXELS


def strength_at(fitted: EdgeAlignment, shift: tuple[int, int] = (0, 0)) -> float:
    """Return the edge strength where the mask is moved by ``shift = (right, down)``, one pixel of play included."""
    x, y = shift[0] + MAX_SHIFT_PIXELS, shift[1] + MAX_SHIFT_PIXELS
    return float(fitted[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].max())


def find_strongest_shift(fitted: EdgeAlignment) -> tuple[int, int]:
    """Return the shift ``(right, down)`` of the mask that fits best."""
    row, column = np.unravel_index(int(fitted.argmax()), fitted.shape)
    return int(column) - MAX_SHIFT_PIXELS, int(row) - MAX_SHIFT_PIXELS


def shift_z_score(fitted: EdgeAlignment, shift: tuple[int, int] = (0, 0)) -> float:
    """Return by how many standard deviations the fit at ``shift`` stands out from shifts that are further away."""
    places = np.arange(-MAX_SHIFT_PIXELS, MAX_SHIFT_PIXELS + 1)
    rest = fitted[np.maximum(np.abs(places - shift[1])[:, None], np.abs(places - shift[0])) > 3]
    return (strength_at(fitted, shift) - float(rest.mean())) / max(float(rest.std()), 1e-3)


def shift_label(label: NDArray[Any], shift: tuple[int, int], fill: int) -> NDArray[Any]:
    """Move a label map ``(H, W)`` right and down; what nothing moved into is ``fill``."""
    right, down = shift
    H, W = label.shape
    result = np.full_like(label, fill)
    result[max(0, down) : H + min(0, down), max(0, right) : W + min(0, right)] = label[
        max(0, -down) : H - max(0, down), max(0, -right) : W - max(0, right)
    ]
    return result


# The ways in which a mask may have been turned or mirrored, in words.
ORIENTATIONS: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "transposed": lambda label: label.T,
    "turned by 90 degrees": lambda label: np.rot90(label, -1),
    "turned by 270 degrees": lambda label: np.rot90(label, 1),
    "transposed and turned by 180 degrees": lambda label: label[::-1, ::-1].T,
    "turned by 180 degrees": lambda label: label[::-1, ::-1],
    "mirrored left to right": lambda label: label[:, ::-1],
    "turned upside down": lambda label: label[::-1],
}


def orientation_change(turn: Callable[[NDArray[Any]], NDArray[Any]]) -> Callable[[Label], Label]:
    """Return what turns a label map."""
    return lambda label: np.ascontiguousarray(turn(label))


_SMALL = 3  # pixels: a speck is no wider and no higher


_MOST = 500  # candidates looked at in one mask


@dataclass(frozen=True)
class Specks:
    """``number`` of specks in a mask, and the place (x, y) of the first of them."""

    number: int = 0
    place: tuple[int, int] = (0, 0)


def find_specks(codes: NDArray[Any], starts: NDArray[np.intp], lengths: NDArray[np.intp]) -> Specks:
    """Count spots of at most 3 by 3 pixels that one other class surrounds.

    Args:
        codes: the mask ``(H, W)``.
        starts: where its runs begin, in the flat mask.
        lengths: of the runs.
    """
    H, W = codes.shape
    flat = codes.ravel()
    inner = np.flatnonzero((lengths[1:-1] <= _SMALL) & (flat[starts[:-2]] == flat[starts[2:]])) + 1
    y, x = np.divmod(starts[inner], W)
    reach = _SMALL + 1
    fits = (x >= reach) & (x + lengths[inner] + reach <= W) & (y >= reach) & (y < H - reach)
    inner, y, x = inner[fits], y[fits], x[fits]
    around = flat[starts[inner - 1]]
    lone = (codes[y - 1, x] == around) & (
        codes[y + _SMALL, x] == around
    )  # the topmost row of a spot stands for it
    y, x = y[lone][:_MOST], x[lone][:_MOST]
    if not len(y):
        return Specks()
    ring = np.array(
        [
            (r, c)
            for r in range(-1, reach + 1)
            for c in range(-reach + 1, reach + 1)
            if r in (-1, reach) or c in (-reach + 1, reach)
        ]
    )
    around = codes[
        np.minimum(y[:, None] + ring[:, 0], H - 1), np.minimum(x[:, None] + ring[:, 1], W - 1)
    ]
    lone = (around == around[:, :1]).all(1) & (around[:, 0] != codes[y, x])
    return Specks(int(lone.sum()), (int(x[lone][0]), int(y[lone][0]))) if lone.any() else Specks()


THUMBNAIL_SHAPE = (24, 32)  # rows and columns of a thumbnail


COLOR_FLAG = 1 << 24  # codes from here on are colours, 0xRRGGBB above it; those below are values


IGNORED_CODE = -1  # the code of what a drawing leaves uncounted


_LONG = 4  # pixels: a run of one code that is this long is no edge between two others


@dataclass(frozen=True)
class ImageMeasurement:
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
        return _unit(
            self.thumb - np.lib.stride_tricks.sliding_window_view(padded, (5, 5)).mean((2, 3))
        )


@dataclass(frozen=True)
class MaskMeasurement:
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
class Measurement:
    """A pair: its image and mask as far as they could be read (``trouble``: the file and the error), and how well they fit."""

    pair: Pair
    image: ImageMeasurement | None = None
    mask: MaskMeasurement | None = None
    trouble: tuple[Path, UsageError] | None = None
    fit: EdgeAlignment | None = None

    @property
    def whole(self) -> bool:
        """Image and mask are there and of one size."""
        return (
            self.image is not None and self.mask is not None and self.image.size == self.mask.size
        )


@dataclass(frozen=True)
class MeasuredDataset:
    """What the detectors look at: the data set, with its classes known, and a look at each of its pairs."""

    dataset: Dataset
    looks: tuple[Measurement, ...]
    guessed: bool = False  # nobody wrote the class table

    @cached_property
    def whole(self) -> tuple[Measurement, ...]:
        """The pairs whose image and mask could be read and are of one size."""
        return tuple(look for look in self.looks if look.whole)

    def name(self, path: Path) -> str:
        """Return a file's name as messages give it: its path below the data set's folder."""
        return (
            str(path.relative_to(self.dataset.root))
            if path.is_relative_to(self.dataset.root)
            else str(path)
        )

    def called(self, look: Measurement) -> str:
        """Return what a pair is called in messages."""
        return pair_name(look.pair, self.dataset.root)

    @cached_property
    def known(self) -> dict[int, int]:
        """Code -> class id, or ``IGNORE`` for what does not count."""
        return class_ids_by_code(self.dataset)

    def ids(self, codes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the class id of each code: ``IGNORE`` for what does not count, -1 for what the table does not have."""
        return map_codes(codes, self.known, -1)

    @cached_property
    def counts(self) -> dict[Pair, NDArray[np.int64]]:
        """The pixels ``(256,)`` of each class id in each whole pair's mask; unknown codes are left out."""
        found = {}
        for look in self.whole:
            assert look.mask is not None
            ids = self.ids(look.mask.codes)
            found[look.pair] = np.bincount(
                ids[ids >= 0], look.mask.counts[ids >= 0], minlength=256
            ).astype(np.int64)
        return found


def measure_pair(pair: Pair, dataset: Dataset, *, palettes: bool) -> Measurement:
    """Read a pair and measure it; with ``palettes``, the colours of palette files too."""
    try:
        image = read_pair_image(pair)
    except UsageError as error:
        return Measurement(pair, trouble=(pair.image, error))
    seen = ImageMeasurement(
        (image.shape[1], image.shape[0]), image.shape[2], str(image.dtype), _thumb(image)
    )
    try:
        codes = read_codes(pair, dataset)
        mask = _look_at_mask(codes, _palette(pair) if palettes else {})
    except UsageError as error:
        return Measurement(pair, seen, trouble=(pair.mask, error))
    return Measurement(
        pair,
        seen,
        mask,
        fit=measure_edge_alignment(image, codes) if seen.size == mask.size else None,
    )


def read_codes(pair: Pair, dataset: Dataset) -> NDArray[Any]:
    """Read what a pair's mask stores: codes ``(H, W)``, colours (from :data:`COLOR` on) where it stores colours.

    Raises:
        UsageError: it cannot be read.
    """
    if pair.truth is not None:
        stored = np.full(256, IGNORED_CODE, np.int64)
        stored[: len(dataset.classes)] = dataset.classes.values
        return stored[read_label(pair, dataset)]
    mask = (
        read_colors(pair.mask, page=pair.page)
        if dataset.classes.by_color
        else read_mask(pair.mask, page=pair.page)
    )
    if mask.ndim == 2:
        return mask
    red = np.ascontiguousarray(mask[..., 0])
    if not dataset.classes.by_color and np.count_nonzero(mask) == np.count_nonzero(red):
        return red
    return (
        mask[..., 0].astype(np.int32) << 16
        | mask[..., 1].astype(np.int32) << 8
        | mask[..., 2]
        | COLOR_FLAG
    )


def class_ids_by_code(dataset: Dataset) -> dict[int, int]:
    """Return code -> class id, or ``IGNORE`` for what does not count."""
    table = dataset.classes
    known = {IGNORED_CODE: IGNORE}
    if table.by_color:
        known |= {COLOR_FLAG | code: IGNORE for code in table.ignore}
        return known | {
            COLOR_FLAG | r << 16 | g << 8 | b: k for k, (r, g, b) in enumerate(table.colors)
        }
    known |= dict.fromkeys(table.ignore, IGNORE)
    known |= {value: k for k, value in enumerate(table.values)}
    return known | {
        COLOR_FLAG | r << 16 | g << 8 | b: known[value]
        for (r, g, b), value in dataset.recolored
        if value in known
    }


def map_codes(codes: NDArray[Any], known: dict[int, int], otherwise: int) -> NDArray[np.int64]:
    """Replace each code by what ``known`` says, or by ``otherwise``."""
    keys = np.array(sorted(known), np.int64)
    values = np.array([known[int(key)] for key in keys], np.int64)
    place = np.clip(np.searchsorted(keys, codes), 0, len(keys) - 1)
    return np.where(keys[place] == codes, values[place], otherwise)


def _palette(pair: Pair) -> dict[int, int]:
    colors = read_palette(pair.mask) if pair.truth is None else None
    return (
        {}
        if colors is None
        else {
            v: COLOR_FLAG | int(r) << 16 | int(g) << 8 | int(b)
            for v, (r, g, b) in enumerate(colors)
        }
    )


def _thumb(image: NDArray[Any]) -> NDArray[np.float32]:
    """Reduce an image ``(H, W, C)`` to a grey ``GRID``: the mean of at least four by four pixels of each cell."""
    H, W, _ = image.shape
    step = max(1, min(H // (4 * THUMBNAIL_SHAPE[0]), W // (4 * THUMBNAIL_SHAPE[1])))
    part: NDArray[Any] = image[step // 2 :: step, step // 2 :: step]
    grey: NDArray[Any] = np.zeros(part.shape[:2], np.float32)
    for band in range(part.shape[2]):  # several times as fast as a mean over so short an axis
        grey += part[..., band]
    grey /= part.shape[2]
    if grey.shape[0] < THUMBNAIL_SHAPE[0] or grey.shape[1] < THUMBNAIL_SHAPE[1]:
        grey = grey[
            np.ix_(
                np.arange(THUMBNAIL_SHAPE[0]) * grey.shape[0] // THUMBNAIL_SHAPE[0],
                np.arange(THUMBNAIL_SHAPE[1]) * grey.shape[1] // THUMBNAIL_SHAPE[1],
            )
        ]
    grey = np.nan_to_num(grey, posinf=0, neginf=0)
    rows, columns = (
        np.arange(size) * length // size
        for size, length in zip(THUMBNAIL_SHAPE, grey.shape, strict=True)
    )
    sums = np.add.reduceat(np.add.reduceat(grey, rows, 0), columns, 1)
    areas = np.outer(np.diff(rows, append=grey.shape[0]), np.diff(columns, append=grey.shape[1]))
    return (sums / areas).astype(np.float32)


def _look_at_mask(codes: NDArray[Any], palette: dict[int, int]) -> MaskMeasurement:
    H, W = codes.shape
    flat = codes.ravel()
    starts = np.append(
        0, np.flatnonzero(flat[1:] != flat[:-1]) + 1
    )  # a mask is made of long runs: counting those is many times faster
    lengths = np.diff(starts, append=len(flat))
    found, place = np.unique(flat[starts], return_inverse=True)
    counts = np.bincount(place, lengths).astype(np.int64)
    inner = np.bincount(place, lengths * (lengths >= _LONG)).astype(np.int64)
    rows, columns = (
        (2 * np.arange(size) + 1) * length // (2 * size)
        for size, length in zip(THUMBNAIL_SHAPE, (H, W), strict=True)
    )
    used = {int(code): palette[int(code)] for code in found if int(code) in palette}
    return MaskMeasurement(
        (W, H),
        found.astype(np.int64),
        counts,
        inner,
        codes[np.ix_(rows, columns)].astype(np.int64),
        find_specks(codes, starts, lengths),
        used,
    )


def _unit(values: NDArray[np.float32]) -> NDArray[np.float32]:
    flat = values.ravel() - values.mean()
    length = float(np.linalg.norm(flat))
    return (
        flat / length
        if length > 1e-3 * max(1.0, float(np.abs(values).max()))
        else np.zeros_like(flat)
    )
