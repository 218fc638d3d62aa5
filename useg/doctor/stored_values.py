"""Check the values in masks: unknown values, two values for one class, smeared edges.

It also describes how the masks of a data set without a class table are read.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, ClassTable, Label
from useg.data.class_mapping import has_default_names
from useg.data.dataset import COLOR_FLAG, read_label
from useg.data.mask_content import (
    MAX_JPEG_DISTANCE,
    channels_of,
    exchange_channels,
    has_exchanged_channels,
)
from useg.data.published_classes import KNOWN_PALETTES, grey_levels, match_grey_palette
from useg.doctor.faulty_files import detect_file_format
from useg.doctor.measure import (
    Finding,
    MaskMeasurement,
    MeasuredDataset,
    Measurement,
    Repair,
)
from useg.errors import UsageError, format_count, join_names

# Findings of masks with values along edges, or anywhere, that no class has.
NOISY_KINDS = ("mask damaged by JPEG", "smeared mask")

# The id of a smeared pixel until its neighbours decide.
_UNSURE_ID = 254


def check_class_table(data: MeasuredDataset) -> Iterator[Finding]:
    """Report why no class table could be derived, and decisions that no file states."""
    if data.class_problem:
        message, _, remedy = data.class_problem.rpartition("; ")
        root = f"{data.dataset.root}/"
        yield Finding("no class table", "error", (), message.replace(root, ""), remedy)
    for note in data.dataset.notes:
        message, _, remedy = note.rpartition("; ")
        yield Finding(
            "decided", "note", (), message or note, remedy if message else "nothing to do"
        )


def check_mask_values(data: MeasuredDataset) -> Iterator[Finding]:
    """Find masks with codes that are not in the class table, and the meaning of each code."""
    for each in data.measurements:
        if each.mask is None:
            continue
        unknown = each.mask.codes[data.ids(each.mask.codes) < 0]
        if len(unknown):
            yield (
                _exchanged_channels(data, each, unknown)
                or _two_values(data, each, each.mask)
                or _grey_levels_of_palette(data, each, each.mask)
                or _smeared_mask(data, each, each.mask, unknown)
                or _unknown_values(data, each, unknown)
            )


def _exchanged_channels(
    data: MeasuredDataset, each: Measurement, unknown: NDArray[np.int64]
) -> Finding | None:
    """A mask has the others' colours with red and blue exchanged, as OpenCV writes them."""
    table, pair = data.dataset.classes, each.pair
    if not has_exchanged_channels(unknown.tolist(), table):
        return None
    assert each.mask is not None
    back = {code: channels_of(exchange_channels(code)) for code in each.mask.codes.tolist()}
    class_ids = {
        code: table.colors.index(color) for code, color in back.items() if color in table.colors
    }
    return Finding(
        "red and blue exchanged",
        "error",
        (pair.mask,),
        f"mask '{data.name(pair.mask)}' has the colours of the others with red and blue exchanged",
        "save it in the order red, green, blue",
        (Repair(pair, "mask: red and blue exchanged back", class_ids=class_ids),),
    )


def _two_values(data: MeasuredDataset, each: Measurement, mask: MaskMeasurement) -> Finding | None:
    """A binary mask stores 0/255 while the others store 0/1, or the other way round."""
    table = data.dataset.classes
    if len(table) != 2 or table.by_color or min(table.values) != 0:
        return None
    usual = max(table.values)
    if usual not in (1, IGNORE):
        return None
    other = IGNORE if usual == 1 else 1
    if not set(mask.codes.tolist()) <= {0, other}:
        return None
    pair = each.pair
    return Finding(
        "two values for one class",
        "error",
        (pair.mask,),
        f"mask '{data.name(pair.mask)}' contains 0 and {other}, but the others contain 0 and "
        f"{usual}: one class has two values",
        f"save it with {usual} instead of {other}",
        (Repair(pair, f"mask: {other} became class 1", class_ids={other: 1}),),
    )


def _grey_levels_of_palette(
    data: MeasuredDataset, each: Measurement, mask: MaskMeasurement
) -> Finding | None:
    """A mask stores the grey levels of a palette's colours instead of its ids."""
    table = data.dataset.classes
    codes = frozenset(mask.codes.tolist())
    if table.by_color or max(codes) >= COLOR_FLAG:
        return None
    name = match_grey_palette(codes, {"the data set's own palette": table.colors, **KNOWN_PALETTES})
    if not name:
        return None
    if name in KNOWN_PALETTES:
        values = grey_levels(KNOWN_PALETTES[name])
        class_ids = {code: int(data.ids(np.array([values.get(code, IGNORE)]))[0]) for code in codes}
    else:
        greys = grey_levels(table.colors)
        class_ids = {code: greys.get(code, IGNORE) for code in codes}
    if min(class_ids.values()) < 0:
        return None
    pair = each.pair
    ids = join_names([class_ids[code] for code in sorted(codes)])
    return Finding(
        "grey levels of a palette",
        "error",
        (pair.mask,),
        f"mask '{data.name(pair.mask)}' contains {join_names(sorted(codes)[:5])}: the grey levels "
        f'of {name}\'s colours, not ids (as .convert("L") makes them)',
        "save the palette image's indices instead",
        (Repair(pair, f"mask: grey levels of a palette became ids {ids}", class_ids=class_ids),),
    )


def _smeared_mask(
    data: MeasuredDataset, each: Measurement, mask: MaskMeasurement, unknown: NDArray[np.int64]
) -> Finding | None:
    """A mask has codes that JPEG compression or smoothing made."""
    table, pair = data.dataset.classes, each.pair
    ids = data.ids(mask.codes)
    # A value between neighbouring ids does not show which of them it was.
    if not table.by_color and (len(table) < 2 or min(np.diff(sorted(table.values))) < 20):
        return None
    is_jpeg = pair.truth is None and detect_file_format(pair.mask) == "JPEG"
    is_unknown = ids < 0
    num_unknown = int(mask.counts[is_unknown].sum())
    share = float(num_unknown / mask.counts.sum())
    interior_share = float(mask.interior_counts[is_unknown].sum() / max(1, num_unknown))
    nearest = _nearest_classes(unknown, table, snap_all=False)
    is_noise = len(table) == 2 and _UNSURE_ID not in nearest.values()
    is_smooth = len(unknown) >= 3 and share <= 0.6 and interior_share <= 0.7
    if not (is_jpeg or is_noise or is_smooth):
        return None
    num_present = len(np.unique(ids[(ids >= 0) & (ids != IGNORE)]))
    snap_all = len(table) == 2 or num_present <= 2
    repair = Repair(
        pair,
        f"mask: {format_count(len(unknown), 'smeared value')} became the nearest class",
        class_ids=_nearest_classes(unknown, table, snap_all=snap_all),
        transform=fill_unsure_pixels,
    )
    cause = (
        "JPEG compression, which changes values"
        if is_jpeg
        else "smoothing along the edges (anti-aliasing or resizing)"
    )
    return Finding(
        "mask damaged by JPEG" if is_jpeg else "smeared mask",
        "error",
        (pair.mask,),
        f"{100 * share:.1f} % of the pixels of mask '{data.name(pair.mask)}' have values that no "
        f"class has ({format_count(len(unknown), 'value')}), because of {cause}",
        "save masks as PNG, and resize them with nearest-neighbour interpolation",
        (repair,),
    )


def _nearest_classes(
    unknown: NDArray[np.int64], table: ClassTable, *, snap_all: bool
) -> dict[int, int]:
    """Return code -> nearest class; unless ``snap_all``, ``_UNSURE_ID`` for codes far from all."""
    if table.by_color:
        colors = np.array(table.colors, float)
    else:
        colors = np.repeat(np.array(table.values, float)[:, None], 3, axis=1)
    distances = np.abs(_color_points(unknown)[:, None] - colors[None]).sum(2)
    return {
        int(code): int(row.argmin()) if snap_all or row.min() <= MAX_JPEG_DISTANCE else _UNSURE_ID
        for code, row in zip(unknown, distances, strict=True)
    }


def _unknown_values(
    data: MeasuredDataset, each: Measurement, unknown: NDArray[np.int64]
) -> Finding:
    """Report unknown values with the error that training would raise; it names the position."""
    path = each.pair.mask
    name = data.name(path)
    try:
        read_label(each.pair, data.dataset)
        message, remedy = f"mask '{name}' cannot be used", "check it"
    except UsageError as error:
        message, _, remedy = str(error).replace(str(path), name).rpartition("; ")
    codes = unknown.tolist()
    shown = [f"#{code - COLOR_FLAG:06x}" if code >= COLOR_FLAG else code for code in codes[:4]]
    more = " and others" if len(codes) > 4 else ""
    repair = Repair(
        each.pair,
        f"mask: {join_names(shown)}{more}, which no class has, became ignored",
        class_ids=dict.fromkeys(codes, IGNORE),
    )
    return Finding("unknown value", "error", (path,), message, remedy, (repair,))


def fill_unsure_pixels(label: Label) -> Label:
    """Give unsure pixels of a smeared mask the class of the nearest sure pixel."""
    label = label.copy()
    for _ in range(64):
        unsure = label == _UNSURE_ID
        if not unsure.any():
            break
        padded = np.pad(label, 1, constant_values=_UNSURE_ID)
        neighbours = (padded[1:-1, :-2], padded[1:-1, 2:], padded[:-2, 1:-1], padded[2:, 1:-1])
        for neighbour in neighbours:
            take = unsure & (label == _UNSURE_ID) & (neighbour != _UNSURE_ID)
            label[take] = neighbour[take]
    return label


def describe_stored_values(data: MeasuredDataset) -> Iterator[Finding]:
    """Describe how the masks of a data set without a class table are read, unless it is plain."""
    table = data.dataset.classes
    if not data.classes_derived or not has_default_names(table):
        return
    values = join_names(table.values)
    remedy = "nothing to do; to name the classes, write a classes.toml"
    if table.by_color:
        colors = join_names([f"({r}, {g}, {b})" for r, g, b in table.colors[:6]])
        more = f" and {len(table) - 6} more" if len(table) > 6 else ""
        message = (
            f"the masks store {format_count(len(table), 'colour')}: {colors}{more}; "
            "each became a class"
        )
        yield Finding("colour masks", "note", (), message, remedy)
    elif len(table) == 2 and table.values != (0, 1):
        message = f"the masks contain two grey levels, {values}, which became the classes 0 and 1"
        yield Finding("two grey levels", "note", (), message, remedy)
    elif name := match_grey_palette(frozenset(table.values)):
        greys = grey_levels(KNOWN_PALETTES[name])
        ids = join_names([greys.get(value, IGNORE) for value in table.values])
        yield Finding(
            "grey levels of a palette",
            "warning",
            (),
            f"the masks contain {values}: the grey levels of {name}'s palette colours {ids} "
            '(as .convert("L") makes them)',
            "save the palette images' indices; colours with the same grey level have become one "
            "class",
        )
    elif table.values != tuple(range(len(table))) and len(table) > 2:
        yield from _skipped_ids(table)


def _skipped_ids(table: ClassTable) -> Iterator[Finding]:
    missing = sorted(set(range(max(table.values))) - set(table.values) - set(table.ignore))
    if missing:
        shown = join_names([*missing[:8], "others"] if len(missing) > 8 else missing)
        yield Finding(
            "ids skipped",
            "note",
            (),
            f"the masks contain the ids {join_names(table.values)}; {shown} never occur",
            "if these classes exist elsewhere, list them in classes.toml; otherwise ignore this "
            "note",
        )


def _color_points(codes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return codes as points ``(N, 3)`` in colour space; a value is a grey."""
    packed = np.where(codes >= COLOR_FLAG, codes - COLOR_FLAG, codes * 0x010101)
    return np.stack([packed >> 16 & 255, packed >> 8 & 255, packed & 255], axis=1).astype(float)
