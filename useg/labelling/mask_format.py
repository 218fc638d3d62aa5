"""Encode painted masks in the format that a folder already uses, plus a value for "unpainted".

A folder keeps its format: palette PNGs of stored values, or RGB PNGs of class colours.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from useg.classes import IGNORE, ClassTable, Label
from useg.data.dataset import Dataset, Pair, read_label
from useg.errors import DataError, UsageError, format_count
from useg.images.files import encode_png


def extend_table(table: ClassTable | None, names: Sequence[str]) -> ClassTable:
    """Return the table with these names; each new class gets a free value and a distinct colour."""
    if table is None:
        return ClassTable(tuple(names))
    if len(names) < len(table):
        raise DataError(
            f"{format_count(len(names), 'class', 'classes')} were sent, but the masks have "
            f"{len(table)}; classes cannot be removed, so rename one that you do not need"
        )
    values, colors = list(table.values), list(table.colors)
    own = ClassTable(tuple(names)).colors
    while len(values) < len(names):
        taken = {*values, *table.ignore}
        values.append(next(value for value in range(1 << 16) if value not in taken))
        colors.append(next(color for color in (*own[len(colors) :], *own) if color not in colors))
    return replace(table, names=tuple(names), values=tuple(values), colors=tuple(colors))


def with_ignored_value(table: ClassTable) -> ClassTable:
    """Return the table with a stored value for unpainted pixels."""
    if _ignored_value(table) is not None:
        return table
    if table.by_color:
        colors = (0xFFFFFF, 0, *range(0xFF00FF, 0, -1))
        free = next(color for color in colors if color not in table.stored)
    else:
        free = next((value for value in range(255, 0, -1) if value not in table.values), -1)
        if free < 0:
            raise DataError(
                "the masks use all 256 values, which leaves no value for unpainted pixels"
            )
    return replace(table, ignore=(*table.ignore, free))


def _ignored_value(table: ClassTable) -> int | None:
    """Return the value that unpainted pixels have in a file: a number, or a colour as a number."""
    highest = 0xFFFFFF if table.by_color else 255
    fitting = [value for value in table.ignore if 0 <= value <= highest]
    return 255 if 255 in fitting and not table.by_color else fitting[0] if fitting else None


def encode_mask(label: Label, table: ClassTable) -> bytes:
    """Encode a label map as a PNG in the format of the class table.

    The file does not carry the mark of useg, so no other command replaces a person's work.
    """
    ignored = _ignored_value(table)
    assert ignored is not None
    colors = np.zeros((256, 3), np.uint8)
    if table.by_color:
        colors[: len(table)] = table.colors
        colors[IGNORE] = ignored >> 16, ignored >> 8 & 255, ignored & 255
        return encode_png(np.take(colors, label, axis=0))
    values = np.full(256, ignored, np.uint8)
    values[: len(table)] = table.values
    colors[list(table.values)] = table.colors
    return encode_png(np.take(values, label), colors)


def check_editable(dataset: Dataset, pairs: Sequence[Pair]) -> None:
    """Check that useg can write the masks back in their own format.

    Raises:
        DataError: It cannot.
    """
    advice = (
        f"useg inspect {dataset.root} --fix OUT writes a copy with masks that useg label can edit"
    )
    for pair in pairs:
        if pair.truth is not None or pair.valid is not None or pair.page is not None:
            raise DataError(f"'{pair.mask}' is not a single mask image; {advice}")
        if pair.mask.suffix.lower() != ".png":
            raise DataError(f"the mask '{pair.mask}' is not a PNG; {advice}")
    too_large = not dataset.classes.by_color and max(dataset.classes.values) > 255
    if too_large or not _survives_writing(dataset, pairs[0]):
        raise DataError(
            f"'{pairs[0].mask}' stores classes in a format that useg cannot write; {advice}"
        )


def _survives_writing(dataset: Dataset, pair: Pair) -> bool:
    """Whether writing a mask and reading it again returns the same mask."""
    label = read_label(pair, dataset)
    label[0, 0] = IGNORE
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "mask.png")
        copy.write_bytes(encode_mask(label, dataset.classes))
        try:
            again = read_label(replace(pair, mask=copy), dataset)
        except UsageError:
            return False
    return bool(np.array_equal(again, label))
