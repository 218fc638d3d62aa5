"""Image and mask -> measurements of fixed size, on which all checks are based.

A pair is measured once, while its pixels are in memory. Measurements have the same size for every
image, so the memory of a survey does not depend on the number of pixels.

The module also defines what a check returns: a :class:`Finding`, with the repairs that
``useg inspect --fix`` makes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from useg.classes import Label
from useg.data.dataset import (
    CodeMap,
    Dataset,
    Pair,
    pair_name,
)
from useg.data.duplicates import (
    SIGNATURE_SIDE,
    Landmarks,
    compute_signature,
    find_landmarks,
)
from useg.data.mask_content import (
    MaskContent,
    count_codes,
    find_runs,
    read_palette_codes,
)
from useg.doctor.edges import EdgeAlignment, measure_edge_alignment
from useg.doctor.mask_codes import (
    IGNORED_CODE,
    class_ids_by_code,
    codes_to_ids,
    enlarge_codes,
    read_codes_and_band,
)
from useg.errors import UsageError
from useg.images.image_files import read_image_and_missing

Severity = Literal["error", "warning", "note"]
Computed = TypeVar("Computed")

# Rows and columns of a thumbnail.
THUMBNAIL_SHAPE = (24, 32)

# The tints of an image's cells are pairs of levels: of red less green, and of blue less green, each
# relative to the sum of the three. These are the limits between the levels.
TINT_LIMITS = (-0.1, -0.03, 0.03, 0.1)

# A speck is no wider and no higher than this.
_MAX_SPECK_PIXELS = 3

# The bands of masks with more codes are not counted.
_MAX_CODES_OF_BANDS = 64

# At most this many candidates for specks are tested in one mask.
_MAX_SPECK_CANDIDATES = 500


@dataclass(frozen=True)
class Repair:
    """The repair of one pair of image and mask.

    Args:
        pair: the pair; None for a file that belongs to no pair.
        description: what is done, for the log of changes.
        class_ids: code of the mask -> class id, or ``IGNORE``; it overrides the class table.
        mask_source: the pair whose mask is the right one.
        transform: turns the label map ``(H, W)`` into the right one.
        split: the split into which the pair moves.
        leave_out: the clean copy does not get the pair.
        is_doubtful: the pair may be right, so it is only omitted on request.
    """

    pair: Pair | None
    description: str
    class_ids: Mapping[int, int] = field(default_factory=dict)
    mask_source: Pair | None = None
    transform: Callable[[Label], Label] | None = None
    split: str = ""
    leave_out: bool = False
    is_doubtful: bool = False


@dataclass(frozen=True)
class Finding:
    """A problem or a note about a data set.

    Args:
        kind: a short name, the same for all findings of one check and cause.
        severity: ``error`` if training would stop or give misleading results.
        files: where it was found; empty if it concerns the whole data set.
        message: the problem.
        remedy: what to do about it.
        repairs: what ``useg inspect --fix`` does about it.
        evidence: what a page needs to draw it.
    """

    kind: str
    severity: Severity
    files: tuple[Path, ...]
    message: str
    remedy: str
    repairs: tuple[Repair, ...] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)


def relative_name(path: Path, dataset: Dataset) -> str:
    """Return a file's path below the data set's folder, as messages name it."""
    # There may be hundreds of thousands of files, for which pathlib takes seconds.
    return str(path).removeprefix(str(dataset.root).rstrip(os.sep) + os.sep)


@dataclass(frozen=True)
class Specks:
    """The number of specks in a mask, and the position (x, y) of the first one."""

    number: int = 0
    first: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class MaskFrame:
    """The border of a mask that has one code.

    Args:
        code: the code.
        width: pixels from each side that have it; 0 if the outermost do not all have it.
        cut: the share of other codes, 0 to 1, on the first line within, at the side where it is the
            second largest.
    """

    code: int = 0
    width: int = 0
    cut: float = 0.0


@dataclass(frozen=True)
class ClassBand:
    """The runs of a code in the rows of a mask: how many lie between the same two other codes.

    Args:
        runs: all that begin and end within a row.
        between: those between the two codes ``sides``.
        pixels: of the latter.
    """

    runs: int
    between: int
    pixels: int
    sides: tuple[int, int]


@dataclass(frozen=True)
class ImageMeasurement:
    """Measurements of an image.

    Args:
        size: (width, height).
        bands: number of bands.
        dtype: the pixels' number type.
        thumbnail: grey, ``THUMBNAIL_SHAPE`` float32, in the file's own numbers.
        tints: the level of red, times the number of levels, plus that of blue, ``THUMBNAIL_SHAPE``
            (see ``TINT_LIMITS``); None without three bands.
        is_grey: it has one band, or three that are equal.
        signature: what near duplicates share (:func:`useg.data.duplicates.compute_signature`).
        landmarks: what crops share (:func:`useg.data.duplicates.find_landmarks`).
    """

    size: tuple[int, int]
    bands: int
    dtype: str
    thumbnail: NDArray[np.float32]
    tints: NDArray[np.uint8] | None
    is_grey: bool
    signature: NDArray[np.uint8]
    landmarks: Landmarks

    @cached_property
    def thumbnail_detail(self) -> NDArray[np.float32]:
        """The fine structure of the thumbnail, as a vector of mean 0 and length 1."""
        # Equal to np.pad with the mode "edge", which takes ten times as long.
        rows, columns = (np.arange(-2, side + 2).clip(0, side - 1) for side in THUMBNAIL_SHAPE)
        padded = self.thumbnail[np.ix_(rows, columns)]
        blurred = np.lib.stride_tricks.sliding_window_view(padded, (5, 5)).mean((2, 3))
        return _normalize(self.thumbnail - blurred)


@dataclass(frozen=True)
class MaskMeasurement:
    """Measurements of a mask.

    Args:
        size: (width, height).
        content: the codes that occur and their numbers of pixels.
        code_grid: the code at the middle of each cell of a ``THUMBNAIL_SHAPE`` grid.
        specks: tiny spots.
        frame: its border.
        bands: the runs of each code, if they are few.
    """

    size: tuple[int, int]
    content: MaskContent
    code_grid: NDArray[np.int64]
    specks: Specks
    frame: MaskFrame = MaskFrame()
    bands: Mapping[int, ClassBand] = field(default_factory=dict)

    @property
    def codes(self) -> NDArray[np.int64]:
        """The codes that occur, sorted."""
        return self.content.codes

    @property
    def counts(self) -> NDArray[np.int64]:
        """The pixels of each code."""
        return self.content.counts

    @property
    def interior_counts(self) -> NDArray[np.int64]:
        """Those of them in horizontal runs of at least four."""
        return self.content.interior_counts


@dataclass(frozen=True)
class Measurement:
    """Measurements of a pair.

    Args:
        pair: the pair.
        image: None if the image cannot be read.
        mask: None if the mask, or its image, cannot be read.
        read_error: the file that cannot be read, and why.
        alignment: how well the mask lies on the image's edges; None if that cannot be measured.
    """

    pair: Pair
    image: ImageMeasurement | None = None
    mask: MaskMeasurement | None = None
    read_error: tuple[Path, UsageError] | None = None
    alignment: EdgeAlignment | None = None

    @property
    def is_complete(self) -> bool:
        """Whether image and mask were read and have the same size."""
        return (
            self.image is not None and self.mask is not None and self.image.size == self.mask.size
        )


@dataclass(frozen=True)
class MeasuredDataset:
    """The input of every check.

    Args:
        dataset: the data set, with its classes known.
        measurements: one of each pair.
        classes_derived: the class table was derived from the masks, since no file has one.
        class_problem: why no class table could be derived; usually empty.
    """

    dataset: Dataset
    measurements: tuple[Measurement, ...]
    classes_derived: bool = False
    class_problem: str = ""
    _computed: dict[Callable[..., Any], Any] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def once(self, compute: Callable[[MeasuredDataset], Computed]) -> Computed:
        """Return ``compute(self)``, which is cached because several checks need it."""
        if compute not in self._computed:
            self._computed[compute] = compute(self)
        result: Computed = self._computed[compute]
        return result

    @cached_property
    def complete(self) -> tuple[Measurement, ...]:
        """The pairs whose image and mask were read and have the same size."""
        return tuple(each for each in self.measurements if each.is_complete)

    def name(self, path: Path) -> str:
        """Return a file's path below the data set's folder, as messages name it."""
        return relative_name(path, self.dataset)

    def pair_name(self, measurement: Measurement) -> str:
        """Return a pair's name, as messages give it."""
        return pair_name(measurement.pair, self.dataset.root)

    @cached_property
    def class_ids(self) -> dict[int, int]:
        """Code -> class id, or ``IGNORE``."""
        return class_ids_by_code(self.dataset)

    def ids(self, codes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the class id of each code: ``IGNORE``, or -1 if no class has the code."""
        return codes_to_ids(codes, self.class_ids)

    @cached_property
    def counts(self) -> dict[Pair, NDArray[np.int64]]:
        """Pixels of each class id ``(256,)`` in each complete pair, without unknown codes."""
        found = {}
        for each in self.complete:
            assert each.mask is not None
            ids = self.ids(each.mask.codes)
            pixels = np.bincount(ids[ids >= 0], each.mask.counts[ids >= 0], minlength=256)
            found[each.pair] = pixels.astype(np.int64)
        return found


def measure_pair(pair: Pair, dataset: Dataset, *, palettes: bool) -> Measurement:
    """Read a pair and measure it; with ``palettes``, read the colours of palette files too."""
    try:
        image, missing = read_image_and_missing(pair.image, pair.page)
    except UsageError as error:
        return Measurement(pair, read_error=(pair.image, error))
    H, W, bands = image.shape
    measured = ImageMeasurement(
        (W, H),
        bands,
        str(image.dtype),
        _make_thumbnail(image),
        _find_tints(image),
        _is_grey(image),
        _compute_fast_signature(image),
        find_landmarks(image),
    )
    try:
        codes, band = read_codes_and_band(pair, dataset)
        codes = enlarge_codes(codes, measured.size, dataset)
        if missing is not None and missing.shape == codes.shape:
            codes = np.where(missing, IGNORED_CODE, codes.astype(np.int64))
        palette = read_palette_codes(pair.mask) if palettes and pair.truth is None else {}
        mask = _measure_mask(pair, codes, palette, band)
    except UsageError as error:
        return Measurement(pair, measured, read_error=(pair.mask, error))
    same_size = measured.size == mask.size
    alignment = measure_edge_alignment(image, codes) if same_size else None
    return Measurement(pair, measured, mask, alignment=alignment)


def find_specks(codes: CodeMap, starts: NDArray[np.intp], lengths: NDArray[np.intp]) -> Specks:
    """Count the specks of a mask: spots of at most 3 x 3 pixels that one other code surrounds.

    Specks are caused by slips of the mouse or bad conversions.

    Args:
        codes: the mask ``(H, W)``.
        starts: where its runs of equal codes begin, in the flat mask.
        lengths: the lengths of the runs.
    """
    H, W = codes.shape
    flat = codes.ravel()
    is_short = lengths[1:-1] <= _MAX_SPECK_PIXELS
    runs = np.flatnonzero(is_short & (flat[starts[:-2]] == flat[starts[2:]])) + 1
    y, x = np.divmod(starts[runs], W)
    reach = _MAX_SPECK_PIXELS + 1
    fits = (x >= reach) & (x + lengths[runs] + reach <= W) & (y >= reach) & (y < H - reach)
    runs, y, x = runs[fits], y[fits], x[fits]
    # Each spot is represented by its topmost run.
    around = flat[starts[runs - 1]]
    is_topmost = (codes[y - 1, x] == around) & (codes[y + _MAX_SPECK_PIXELS, x] == around)
    y, x = y[is_topmost][:_MAX_SPECK_CANDIDATES], x[is_topmost][:_MAX_SPECK_CANDIDATES]
    if not len(y):
        return Specks()
    rows, columns = range(-1, reach + 1), range(-reach + 1, reach + 1)
    border = ([-1, reach], [-reach + 1, reach])
    ring = np.array([(r, c) for r in rows for c in columns if r in border[0] or c in border[1]])
    ring_y = np.minimum(y[:, None] + ring[:, 0], H - 1)
    ring_x = np.minimum(x[:, None] + ring[:, 1], W - 1)
    surrounding = codes[ring_y, ring_x]
    is_speck = (surrounding == surrounding[:, :1]).all(1) & (surrounding[:, 0] != codes[y, x])
    if not is_speck.any():
        return Specks()
    return Specks(int(is_speck.sum()), (int(x[is_speck][0]), int(y[is_speck][0])))


def _measure_mask(
    pair: Pair, codes: CodeMap, palette: dict[int, int], band: int | None
) -> MaskMeasurement:
    H, W = codes.shape
    runs = find_runs(codes)
    rows, columns = (
        (2 * np.arange(cells) + 1) * pixels // (2 * cells)
        for cells, pixels in zip(THUMBNAIL_SHAPE, (H, W), strict=True)
    )
    return MaskMeasurement(
        size=(W, H),
        content=count_codes(pair.mask, codes, runs, palette, band),
        code_grid=codes[np.ix_(rows, columns)].astype(np.int64),
        specks=find_specks(codes, *runs),
        frame=_find_frame(codes),
        bands=_find_bands(codes, *runs),
    )


def _find_frame(codes: CodeMap) -> MaskFrame:
    lines = (codes[0], codes[-1], codes[:, 0], codes[:, -1])
    if any((line != codes[0, 0]).any() for line in lines):
        return MaskFrame()
    is_other = codes != codes[0, 0]
    rows, columns = (np.flatnonzero(is_other.any(axis)) for axis in (1, 0))
    if not len(rows):
        return MaskFrame()
    H, W = codes.shape
    width = int(min(rows[0], H - 1 - rows[-1], columns[0], W - 1 - columns[-1]))
    within = is_other[width : H - width, width : W - width]
    lines = (within[0], within[-1], within[:, 0], within[:, -1])
    return MaskFrame(int(codes[0, 0]), width, sorted(float(line.mean()) for line in lines)[-2])


def _find_bands(
    codes: CodeMap, starts: NDArray[np.intp], lengths: NDArray[np.intp]
) -> dict[int, ClassBand]:
    if len(starts) < 3:
        return {}
    values = codes.ravel()[starts].astype(np.int64)
    row = starts // codes.shape[1]
    is_inside = (starts[1:-1] % codes.shape[1] > 0) & (row[1:-1] == row[2:])
    before, here, after = (part[is_inside] for part in (values[:-2], values[1:-1], values[2:]))
    lengths = lengths[1:-1][is_inside]
    found, num_runs = np.unique(here, return_counts=True)
    if not 0 < len(found) <= _MAX_CODES_OF_BANDS:
        return {}
    sides = np.stack([np.minimum(before, after), np.maximum(before, after)], axis=1)
    bands = {}
    for code, number in zip(found.tolist(), num_runs.tolist(), strict=True):
        is_band = (here == code) & (before != after)
        pairs, place, counts = np.unique(
            sides[is_band], axis=0, return_inverse=True, return_counts=True
        )
        if len(pairs):
            most = int(counts.argmax())
            pixels = int(lengths[is_band][place.ravel() == most].sum())
            low, high = pairs[most].tolist()
            bands[code] = ClassBand(number, int(counts[most]), pixels, (low, high))
    return bands


def _compute_fast_signature(image: NDArray[Any]) -> NDArray[np.uint8]:
    """Compute an image's signature from every n-th pixel, at least 8 x 8 of each cell.

    It takes a third of the time, and correlates with the whole image's signature by 0.987 and more
    (CARLA, CHASE DB1, magnetic tiles, blood cells). Checks allow for more than that difference.
    """
    step = max(1, min(image.shape[:2]) // (8 * SIGNATURE_SIDE))
    return compute_signature(image[step // 2 :: step, step // 2 :: step])


def _make_thumbnail(image: NDArray[Any]) -> NDArray[np.float32]:
    """Reduce an image ``(H, W, C)`` to a grey thumbnail of ``THUMBNAIL_SHAPE``."""
    part = _every_nth_pixel(image)
    # Adding bands is several times faster than a mean over so short an axis.
    grey: NDArray[Any] = np.zeros(part.shape[:2], np.float32)
    for band in range(part.shape[2]):
        grey += part[..., band]
    grey /= part.shape[2]
    return _average_cells(grey)


def _find_tints(image: NDArray[Any]) -> NDArray[np.uint8] | None:
    """Return the tints of the cells of a colour image's thumbnail."""
    part = _every_nth_pixel(image)
    if part.shape[2] != 3:
        return None
    red, green, blue = (_average_cells(part[..., band].astype(np.float32)) for band in range(3))
    total = np.maximum(red + green + blue, 1e-6)
    of_red, of_blue = (np.digitize((band - green) / total, TINT_LIMITS) for band in (red, blue))
    tints: NDArray[np.uint8] = (of_red * (len(TINT_LIMITS) + 1) + of_blue).astype(np.uint8)
    return tints


def _is_grey(image: NDArray[Any]) -> bool:
    """Return whether an image has one band, or three that are equal."""
    part = _every_nth_pixel(image)
    return part.shape[2] == 1 or (
        part.shape[2] == 3 and all(np.array_equal(part[..., 0], part[..., band]) for band in (1, 2))
    )


def _every_nth_pixel(image: NDArray[Any]) -> NDArray[Any]:
    """Return at least 4 x 4 pixels of each cell of a thumbnail, if the image has them."""
    num_rows, num_columns = THUMBNAIL_SHAPE
    H, W, _ = image.shape
    step = max(1, min(H // (4 * num_rows), W // (4 * num_columns)))
    part: NDArray[Any] = image[step // 2 :: step, step // 2 :: step]
    return part


def _average_cells(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the means ``THUMBNAIL_SHAPE`` of the cells of values ``(H, W)``."""
    num_rows, num_columns = THUMBNAIL_SHAPE
    h, w = values.shape
    if h < num_rows or w < num_columns:
        rows, columns = (
            np.arange(num_rows) * h // num_rows,
            np.arange(num_columns) * w // num_columns,
        )
        values = values[np.ix_(rows, columns)]
        h, w = values.shape
    if not np.isfinite(values).all():
        values = np.nan_to_num(values, posinf=0, neginf=0)
    rows, columns, areas = _thumbnail_cells(h, w)
    sums = np.add.reduceat(np.add.reduceat(values, rows, 0), columns, 1)
    means: NDArray[np.float32] = (sums / areas).astype(np.float32)
    return means


@lru_cache(maxsize=64)
def _thumbnail_cells(
    height: int, width: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
    """Return where the cells of a thumbnail begin, in rows and columns, and their areas."""
    num_rows, num_columns = THUMBNAIL_SHAPE
    rows = np.arange(num_rows) * height // num_rows
    columns = np.arange(num_columns) * width // num_columns
    return rows, columns, np.outer(np.diff(rows, append=height), np.diff(columns, append=width))


def _normalize(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a vector of mean 0 and length 1, or of zeros if the values are nearly equal."""
    flat = values.ravel() - values.mean()
    length = float(np.linalg.norm(flat))
    has_content = length > 1e-3 * max(1.0, float(np.abs(values).max()))
    return flat / length if has_content else np.zeros_like(flat)
