"""The mask of a pair -> its codes ``(H, W)``; codes -> class ids.

What a mask stores at a pixel is a *code*: a value, or a colour (see :mod:`useg.data.mask_content`).
The checks compare codes, since the classes may be what is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, pack_colors
from useg.data.dataset import (
    COLOR_FLAG,
    ClassMasks,
    CodeMap,
    Dataset,
    Pair,
    find_background,
    is_reduced,
    read_label,
    read_pair_size,
    read_stored_mask,
    read_valid,
    to_codes,
)
from useg.data.mask_content import color_code
from useg.images.image_files import read_colors

# The code of pixels that an annotation file excludes.
IGNORED_CODE = -1


def read_codes(pair: Pair, dataset: Dataset) -> CodeMap:
    """Read the codes ``(H, W)`` that a pair's mask stores.

    Raises:
        UsageError: the mask cannot be read.
    """
    return read_codes_and_band(pair, dataset)[0]


def read_codes_and_band(pair: Pair, dataset: Dataset) -> tuple[CodeMap, int | None]:
    """Read the codes ``(H, W)``, and the only band of an RGB mask that is not 0, if it is one.

    Raises:
        UsageError: the mask cannot be read.
    """
    codes, band = _read_whole_codes(pair, dataset)
    if pair.valid is None or pair.truth is not None:
        return codes, band
    is_valid = read_valid(pair, (codes.shape[1], codes.shape[0]))
    return np.where(is_valid, codes.astype(np.int64), IGNORED_CODE), band


def _read_whole_codes(pair: Pair, dataset: Dataset) -> tuple[CodeMap, int | None]:
    table = dataset.classes
    if pair.truth == ClassMasks(()) and find_background(table) is None:
        # The classes are not decided yet.
        return np.zeros(read_pair_size(pair)[::-1], np.int64), None
    if pair.truth is not None:
        stored = np.full(256, IGNORED_CODE, np.int64)
        stored[: len(table)] = table.values
        return stored[read_label(pair, dataset)], None
    if table.by_color:
        mask = read_colors(pair.mask, page=pair.page)
        if dataset.encoding.ignore_empty and not mask.any():
            return np.full(mask.shape[:2], IGNORED_CODE, np.int64), None
        return pack_colors(mask) | COLOR_FLAG, None
    return to_codes(read_stored_mask(pair, dataset.encoding))


def enlarge_codes(codes: CodeMap, size: tuple[int, int], dataset: Dataset) -> CodeMap:
    """Enlarge the codes of a reduced mask to its image's ``(width, height)``."""
    if not is_reduced((codes.shape[1], codes.shape[0]), size, dataset.encoding.scale):
        return codes
    rows, columns = (
        np.arange(pixels) * stored // pixels
        for pixels, stored in zip(size[::-1], codes.shape, strict=True)
    )
    return codes[np.ix_(rows, columns)]


def class_ids_by_code(dataset: Dataset) -> dict[int, int]:
    """Return code -> class id, or ``IGNORE`` for ignored codes."""
    table = dataset.classes
    known = {IGNORED_CODE: IGNORE}
    if table.by_color:
        known |= {COLOR_FLAG | code: IGNORE for code in table.ignore}
        return known | {color_code(color): k for k, color in enumerate(table.colors)}
    known |= dict.fromkeys(table.ignore, IGNORE)
    known |= {value: k for k, value in enumerate(table.values)}
    recolored = dataset.recolored
    return known | {color_code(color): known[value] for color, value in recolored if value in known}


def map_codes(codes: NDArray[Any], mapping: Mapping[int, int], default: int) -> NDArray[np.int64]:
    """Replace each code by its value in ``mapping``, or by ``default``."""
    keys = np.array(sorted(mapping), np.int64)
    values = np.array([mapping[int(key)] for key in keys], np.int64)
    place = np.clip(np.searchsorted(keys, codes), 0, len(keys) - 1)
    return np.where(keys[place] == codes, values[place], default)


def codes_to_ids(codes: NDArray[Any], class_ids: Mapping[int, int]) -> NDArray[np.int64]:
    """Return the class id of each code, ``IGNORE`` for negative ones, and -1 for unknown ones."""
    return np.where(codes < 0, IGNORE, map_codes(codes, class_ids, -1))


def read_ids(
    pair: Pair, dataset: Dataset, class_ids: Mapping[int, int] | None = None
) -> NDArray[np.int64]:
    """Read a mask as class ids ``(H, W)``, at its image's size if it is reduced as all masks are.

    Args:
        pair: the pair.
        dataset: its data set.
        class_ids: code -> class id; by default :func:`class_ids_by_code`.

    Returns:
        Class ids, ``IGNORE``, and -1 where no class has the code.

    Raises:
        UsageError: the mask cannot be read.
    """
    codes = read_codes(pair, dataset)
    if dataset.encoding.scale > 1:
        codes = enlarge_codes(codes, read_pair_size(pair), dataset)
    return codes_to_ids(codes, class_ids or class_ids_by_code(dataset))
