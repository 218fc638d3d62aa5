"""A mask -> the values or colours that it stores, and how many pixels have each.

What a mask stores at a pixel is a *code*: a value, or a colour. The class table, the checks of
``useg inspect`` and its repairs all begin with the counts of codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import Color, pack_color, pack_colors
from useg.data.dataset import MaskEncoding, Pair, find_only_band, read_stored_mask
from useg.images.files import read_palette

# (H, W): the codes of a mask. A code is a value, or a colour: ``COLOR_FLAG | 0xRRGGBB``.
CodeMap = NDArray[Any]


# Codes from here on are colours; those below are values.
COLOR_FLAG = 1 << 24


# Ids are smaller than this; larger values are grey levels.
MIN_GREY_LEVEL = 14


# A run of one code that is this long is no smeared edge between two others.
_MIN_INTERIOR_RUN_PIXELS = 4


@dataclass(frozen=True)
class MaskContent:
    """What one mask stores.

    Args:
        path: The mask file.
        codes: The codes that occur, sorted.
        counts: Pixels of each code.
        interior_counts: Those of them in horizontal runs of at least four.
        ramp_counts: Those of them on a short slope from a lower to a higher value.
        palette: The colour of each value as a code, if the file has a palette.
        band: The band of an RGB file that alone is not 0, or None for files of one band or colours.
    """

    path: Path
    codes: NDArray[np.int64]
    counts: NDArray[np.int64]
    interior_counts: NDArray[np.int64]
    ramp_counts: NDArray[np.int64]
    palette: Mapping[int, int] = field(default_factory=dict)
    band: int | None = None

    @property
    def has_colors(self) -> bool:
        """Whether it stores colours."""
        return bool(len(self.codes)) and int(self.codes[-1]) >= COLOR_FLAG

    def as_color(self, code: int) -> int:
        """Return a code as a colour: of the palette, of its band, or grey."""
        if code >= COLOR_FLAG:
            return code
        value = min(max(code, 0), 255)
        if self.band is not None:
            return COLOR_FLAG | value << 16 - 8 * self.band
        return self.palette.get(code, COLOR_FLAG | value * 0x010101)


def to_codes(mask: NDArray[Any]) -> tuple[CodeMap, int | None]:
    """Turn what a mask stores into codes ``(H, W)``, and the only band of RGB that is not 0."""
    if mask.ndim == 2:
        return mask, None
    band = find_only_band(mask)
    if band is not None:
        return np.ascontiguousarray(mask[..., band]), band
    return pack_colors(mask) | COLOR_FLAG, None


def color_code(color: Sequence[int]) -> int:
    """Return the code of a colour (red, green, blue)."""
    return COLOR_FLAG | pack_color(color)


def channels_of(code: int) -> Color:
    """Return the colour (red, green, blue) of a code."""
    return code >> 16 & 255, code >> 8 & 255, code & 255


def find_runs(codes: CodeMap) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return where runs of equal codes begin in the flat mask, and their lengths."""
    flat = codes.ravel()
    ends = np.append(np.flatnonzero(flat[1:] != flat[:-1]) + 1, len(flat))
    starts = np.append(0, ends[:-1])
    return starts, ends - starts


def count_codes(
    path: Path,
    codes: CodeMap,
    runs: tuple[NDArray[np.intp], NDArray[np.intp]] | None = None,
    palette: Mapping[int, int] | None = None,
    band: int | None = None,
) -> MaskContent:
    """Count the pixels of each code of a mask.

    A mask consists of long runs, and counting runs is many times faster than counting pixels.

    Args:
        path: The mask file.
        codes: Its codes ``(H, W)``.
        runs: What :func:`find_runs` returns for them, if that is known.
        palette: The colour of each value, as a code.
        band: As in :class:`MaskContent`.
    """
    starts, lengths = runs or find_runs(codes)
    found, place = _find_distinct(codes.ravel()[starts])
    interior = lengths * (lengths >= _MIN_INTERIOR_RUN_PIXELS)
    return MaskContent(
        path,
        codes=found.astype(np.int64),
        counts=np.bincount(place, lengths).astype(np.int64),
        interior_counts=np.bincount(place, interior).astype(np.int64),
        ramp_counts=_count_ramps(codes, found),
        palette={int(code): palette[int(code)] for code in found if int(code) in palette}
        if palette
        else {},
        band=band,
    )


def _find_distinct(values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """Return the distinct values, sorted, and the place of each value among them."""
    if values.dtype != np.uint8:
        return np.unique(values, return_inverse=True)
    # Sorting takes several times as long.
    occurs = np.bincount(values, minlength=256) > 0
    return np.flatnonzero(occurs), (np.cumsum(occurs) - 1)[values]


def _count_ramps(codes: CodeMap, found: NDArray[Any]) -> NDArray[np.int64]:
    """Count the pixels of each grey level on short slopes, which smoothing leaves along edges."""
    if len(found) < 3 or not MIN_GREY_LEVEL <= found[-1] < COLOR_FLAG:
        return np.zeros(len(found), np.int64)
    on_ramp = _find_ramps(codes) | _find_ramps(np.ascontiguousarray(codes.T)).T
    values, counts = np.unique(codes[on_ramp], return_counts=True)
    ramps = np.zeros(len(found), np.int64)
    ramps[np.searchsorted(found, values)] = counts
    return ramps


def _find_ramps(codes: CodeMap) -> NDArray[np.bool_]:
    """Return which pixels are in short runs between a lower and a higher one of the same row."""
    width = codes.shape[1]
    starts, lengths = find_runs(codes)
    values = codes.ravel()[starts].astype(np.int64)
    before, here, after = values[:-2], values[1:-1], values[2:]
    row = starts // width
    is_inside = (row[:-2] == row[1:-1]) & (row[1:-1] == row[2:])
    rises = (before < here) & (here < after) | (before > here) & (here > after)
    is_ramp = np.zeros(len(starts), bool)
    is_ramp[1:-1] = rises & is_inside & (lengths[1:-1] < _MIN_INTERIOR_RUN_PIXELS)
    return np.repeat(is_ramp, lengths).reshape(codes.shape)


def read_content(pair: Pair, encoding: MaskEncoding) -> MaskContent:
    """Read what a pair's mask stores.

    Raises:
        DataError: The file cannot be read.
    """
    codes, band = to_codes(read_stored_mask(pair, encoding))
    return count_codes(pair.mask, codes, palette=read_palette_codes(pair.mask), band=band)


def read_palette_codes(path: Path) -> dict[int, int]:
    """Return the colours of a palette file as codes; empty for other files."""
    colors = read_palette(path)
    return {} if colors is None else {v: color_code(color) for v, color in enumerate(colors)}
