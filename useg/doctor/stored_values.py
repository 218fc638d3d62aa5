"""Check the values in masks: unknown values, two values for one class, smeared edges.

It also finds inverted masks and masks of one class, and describes how the masks of a data set
without a class table are read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, ClassTable, Label
from useg.data.class_mapping import has_made_up_names
from useg.data.dataset import COLOR_FLAG, read_label
from useg.data.mask_content import (
    MAX_JPEG_DISTANCE,
    channels_of,
    exchange_channels,
    has_exchanged_channels,
)
from useg.data.schemes import KNOWN_PALETTES, grey_levels, match_grey_palette
from useg.doctor.damage import detect_file_format
from useg.doctor.measure import (
    THUMBNAIL_SHAPE,
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

# What masks differ in at least: share of foreground, of that at the border, and brightness.
_MIN_DEVIATIONS = (0.08, 0.12, 0.35)
# Standard deviations by which a swapped mask must be more similar to the others.
_MIN_SWAP_EVIDENCE = 4
_MAX_ROUNDS = 5

# With fewer masks, typical values are not known.
_MIN_MASKS = 8

# Two classes look exchanged in a mask if its pixels are more likely that way, by where they are and
# how bright they are in the other masks. The places are rows of the image, and so many levels.
_NUM_ROWS, _NUM_LEVELS = 6, 8
# The log-likelihood of a cell of the thumbnail that is gained or lost is at most this.
_MAX_CELL_GAIN = 3
_MIN_PROBABILITY = 1e-4
# All cells of a mask must gain that much together, and a cell on average.
_MIN_GAIN, _MIN_MEAN_GAIN = 100, 0.5
# Each of two classes must gain in so many cells: without a fault, no mask of seven public data sets
# did in 6,900 trials. Exchanged red and blue are usual, so there both together are enough.
_MIN_CELLS = 16
# Pairs are made of so many classes, which are in that share of the masks.
_MAX_COMPARED_CLASSES, _MIN_SHARE_OF_MASKS = 8, 0.25


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
    if not data.classes_derived or not has_made_up_names(table):
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


def check_single_class_masks(data: MeasuredDataset) -> Iterator[Finding]:
    """Find a few masks with one class only while the others have several."""
    single = [
        (each.pair, int(data.ids(each.mask.codes)[0]))
        for each in data.complete
        if each.mask is not None and len(each.mask.codes) == 1
    ]
    if len(data.complete) < _MIN_MASKS or len(single) > max(1, len(data.complete) // 10):
        return
    for pair, k in single:
        if k == IGNORE:
            content = "is ignored everywhere"
        elif k >= 0:
            content = f"is {data.dataset.classes.names[k]} everywhere"
        else:
            content = "has one value everywhere"
        yield Finding(
            "mask of one class",
            "warning",
            (pair.mask,),
            f"mask '{data.name(pair.mask)}' {content}, while the others have several classes",
            "check whether its labels were lost",
        )


def check_inverted_masks(data: MeasuredDataset) -> Iterator[Finding]:
    """Find a few binary masks whose foreground and background are swapped."""
    binary = [each for each in data.complete if each.mask is not None and len(each.mask.codes) == 2]
    if len(data.dataset.classes) != 2 or len(binary) < _MIN_MASKS:
        return
    features = np.array([_foreground_features(data, each) for each in binary])
    swapped = np.array([1, 1, 0]) - features
    median = np.median(features, axis=0)
    deviation = 1.48 * np.median(np.abs(features - median), axis=0)
    deviation = np.maximum(deviation, _MIN_DEVIATIONS)
    own, other = (
        np.minimum(np.abs(part - median) / deviation, 6).sum(1) for part in (features, swapped)
    )
    found = np.flatnonzero(own - other > _MIN_SWAP_EVIDENCE)
    if len(found) > len(binary) // 3 or not len(found):
        yield from _masks_of_two_kinds(data, binary, features)
        return
    for k in found:
        pair = binary[k].pair
        description = "mask: foreground and background swapped back"
        yield Finding(
            "inverted mask",
            "error",
            (pair.mask,),
            f"mask '{data.name(pair.mask)}' has foreground and background swapped: "
            f"{100 * features[k, 0]:.0f} % of it is foreground, {100 * median[0]:.0f} % is usual",
            "swap its two values",
            (Repair(pair, description, transform=swap_foreground),),
        )


def _masks_of_two_kinds(
    data: MeasuredDataset, binary: Sequence[Measurement], features: NDArray[np.float64]
) -> Iterator[Finding]:
    """Report that many masks are like the others with foreground and background swapped."""
    swapped = np.array([1, 1, 0]) - features
    is_swapped = np.zeros(len(features), bool)
    median = features[0]
    for _ in range(_MAX_ROUNDS):
        own, other = (
            np.abs((part - median) / _MIN_DEVIATIONS).sum(1) for part in (features, swapped)
        )
        is_swapped = other < own
        median = np.median(np.where(is_swapped[:, None], swapped, features), axis=0)
    num_swapped = int(is_swapped.sum())
    if min(num_swapped, len(features) - num_swapped) < len(features) // 4:
        return
    # Objects are rarely at the image border.
    if features[is_swapped, 1].mean() < features[~is_swapped, 1].mean():
        is_swapped, num_swapped = ~is_swapped, len(features) - num_swapped
    alike = np.where(is_swapped[:, None], swapped, features)
    deviation = np.maximum(
        1.48 * np.median(np.abs(alike - np.median(alike, axis=0)), axis=0), _MIN_DEVIATIONS
    )
    near, far = (
        np.minimum(np.abs(part - np.median(alike, axis=0)) / deviation, 6).sum(1)
        for part in (alike, np.array([1, 1, 0]) - alike)
    )
    if float((far - near > _MIN_SWAP_EVIDENCE).mean()) < 0.9:
        return
    pairs = [each.pair for each, is_odd in zip(binary, is_swapped, strict=True) if is_odd]
    usual = next(each.pair for each, is_odd in zip(binary, is_swapped, strict=True) if not is_odd)
    yield Finding(
        "masks of two kinds",
        "error",
        tuple(pair.mask for pair in pairs),
        f"{num_swapped} of {len(features)} masks, such as '{data.name(pairs[0].mask)}', look like "
        f"the others, such as '{data.name(usual.mask)}', with foreground and background swapped",
        "swap the two values in one of these parts",
        tuple(
            Repair(pair, "mask: foreground and background swapped back", transform=swap_foreground)
            for pair in pairs
        ),
    )


def check_exchanged_classes(data: MeasuredDataset) -> Iterator[Finding]:
    """Find a few masks in which two classes, or red and blue, are exchanged.

    Where red and blue are both classes, colours do not show that a mask stores them as blue, green,
    red. Nor do values if a mask was saved with another order of the classes.
    """
    table, masks = data.dataset.classes, data.complete
    if len(table) < 3 or len(masks) < _MIN_MASKS:
        return
    counts = _count_places(data, masks)
    found: dict[int, tuple[float, tuple[int, ...]]] = {}
    exchanged = _exchange_colors(table)
    if exchanged:
        masks_of_colors = _find_exchanged(counts, exchanged, by_color=True)
        found = dict.fromkeys(masks_of_colors, (np.inf, exchanged))
    frequent = np.argsort(-(counts.sum(2) > 0).mean(0), kind="stable")[:_MAX_COMPARED_CLASSES]
    common = [k for k in frequent if (counts[:, k].any(1)).mean() >= _MIN_SHARE_OF_MASKS]
    for one, other in itertools.combinations(common, 2):
        partner = {int(one): int(other), int(other): int(one)}
        order = tuple(partner.get(k, k) for k in range(len(table)))
        for k, gain in _find_exchanged(counts, order, by_color=False).items():
            found[k] = max(found.get(k, (0.0, ())), (gain, order))
    for k, (_, best) in sorted(found.items()):
        yield _exchanged_classes(data, masks[k], best, by_color=best == exchanged)


def _exchanged_classes(
    data: MeasuredDataset, each: Measurement, order: tuple[int, ...], *, by_color: bool
) -> Finding:
    names, pair = data.dataset.classes.names, each.pair
    moved = [names[k] for k, other in enumerate(order) if k != other]
    ids = np.arange(256, dtype=np.uint8)
    ids[: len(order)] = order
    what = "red and blue" if by_color else join_names(moved)
    return Finding(
        "red and blue exchanged" if by_color else "classes exchanged",
        "error",
        (pair.mask,),
        f"mask '{data.name(pair.mask)}' seems to have {what} exchanged: where the other masks have "
        f"{moved[0]}, by position and brightness, it has {names[order[names.index(moved[0])]]}",
        "compare it with its image; if it is wrong, save it with the order of the others",
        (Repair(pair, f"mask: {what} exchanged back", transform=lambda label: ids[label]),),
    )


def _exchange_colors(table: ClassTable) -> tuple[int, ...]:
    """Return the class of each colour when red and blue are exchanged; () if nothing changes."""
    colors = table.colors
    if not table.by_color or any(color[::-1] not in colors for color in colors):
        return ()
    order = tuple(colors.index(color[::-1]) for color in colors)
    return order if order != tuple(range(len(colors))) else ()


def _count_places(data: MeasuredDataset, masks: Sequence[Measurement]) -> NDArray[np.float64]:
    """Count each class's cells at each place ``(N, K, P)``: a band of rows and a grey level."""
    num_classes, num_places = len(data.dataset.classes), _NUM_ROWS * _NUM_LEVELS
    counts = np.zeros((len(masks), num_classes, num_places))
    rows, columns = THUMBNAIL_SHAPE
    bands = np.repeat(np.arange(rows) * _NUM_ROWS // rows, columns).reshape(THUMBNAIL_SHAPE)
    for k, each in enumerate(masks):
        assert each.image is not None
        assert each.mask is not None
        grey = each.image.thumbnail.astype(np.float64)
        deviations = (grey - grey.mean()) / max(float(grey.std()), 1e-6)
        # From two standard deviations below the mean to two above it.
        levels = np.clip((deviations + 2) * (_NUM_LEVELS / 4), 0, _NUM_LEVELS - 1).astype(np.intp)
        ids = data.ids(each.mask.code_grid)
        known = (ids >= 0) & (ids < num_classes)
        places = (ids * num_places + bands * _NUM_LEVELS + levels)[known]
        counts[k] = np.bincount(places, minlength=counts[k].size).reshape(counts[k].shape)
    return counts


def _find_exchanged(
    counts: NDArray[np.float64], order: tuple[int, ...], *, by_color: bool
) -> dict[int, float]:
    """Return the masks that are like the others in this order of the classes.

    They are at most a third, or half of them if red and blue are exchanged.

    Args:
        counts: from :func:`_count_places`.
        order: the class that each class becomes.
        by_color: whether this exchanges red and blue.

    Returns:
        What each of these masks gains in log-likelihood.
    """
    is_exchanged = np.zeros(len(counts), bool)
    for _ in range(2 * _MAX_ROUNDS):
        gains, cells = _gain_by_order(counts, order, is_exchanged)
        change = gains.sum(1) > 0
        if not change.any():
            break
        is_exchanged ^= change
    if 2 * is_exchanged.sum() > len(counts):
        is_exchanged = ~is_exchanged
    if not is_exchanged.any() or (3 - by_color) * is_exchanged.sum() > len(counts):
        return {}
    gains, cells = _gain_by_order(counts, order, is_exchanged)
    total, mean = -gains.sum(1), -gains / np.maximum(cells, 1)
    overall = total / np.maximum(cells.sum(1), 1)
    is_seen = cells.sum(1) >= _MIN_CELLS
    is_clear = ((cells >= _MIN_CELLS) & (mean >= _MIN_MEAN_GAIN)).sum(1) >= 2
    is_sure = (total >= _MIN_GAIN) & (overall >= _MIN_MEAN_GAIN) & (is_clear | by_color)
    fits = np.quantile(overall[is_seen], 0.1) >= _MIN_MEAN_GAIN if is_seen.any() else False
    if not fits or not is_sure[is_exchanged].all():
        return {}
    return {int(k): float(total[k]) for k in np.flatnonzero(is_exchanged)}


def _gain_by_order(
    counts: NDArray[np.float64], order: tuple[int, ...], is_exchanged: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what the classes ``(N, M)`` of each mask gain if they are exchanged, and their cells.

    A mask's own cells do not count for the probabilities that it is compared with.
    """
    moved = [k for k, other in enumerate(order) if k != other]
    partners = [moved.index(order[k]) for k in moved]
    own = counts[:, moved]
    own = np.where(is_exchanged[:, None, None], own[:, partners], own)
    rest = own.sum(0) - own
    share = rest / np.maximum(counts.sum() - counts.sum((1, 2)), 1)[:, None, None]
    share += _MIN_PROBABILITY
    log_share = np.log(share / share.sum(2, keepdims=True))
    gain = np.clip(log_share[:, partners] - log_share, -_MAX_CELL_GAIN, _MAX_CELL_GAIN)
    return (gain * own).sum(2), own.sum(2)


def swap_foreground(label: Label) -> Label:
    """Exchange the classes 0 and 1; ignored pixels stay ignored."""
    return np.where(label <= 1, 1 - label, label).astype(np.uint8)


def _foreground_features(data: MeasuredDataset, each: Measurement) -> tuple[float, float, float]:
    """Return the foreground's share of a mask, of its border, and its relative brightness.

    The brightness is relative to the background, in standard deviations of the image.
    """
    assert each.mask is not None
    assert each.image is not None
    grid = data.ids(each.mask.code_grid) == 1
    border = np.concatenate((grid[0], grid[-1], grid[1:-1, 0], grid[1:-1, -1]))
    pixels = data.counts[each.pair]
    share = float(pixels[1] / max(1, pixels[:2].sum()))
    thumbnail = each.image.thumbnail
    brighter = 0.0
    if 0 < grid.sum() < grid.size:
        brighter = float(thumbnail[grid].mean() - thumbnail[~grid].mean())
    brighter /= max(float(thumbnail.std()), 1e-6)
    return share, float(border.mean()), float(np.clip(brighter, -3, 3))


def _color_points(codes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return codes as points ``(N, 3)`` in colour space; a value is a grey."""
    packed = np.where(codes >= COLOR_FLAG, codes - COLOR_FLAG, codes * 0x010101)
    return np.stack([packed >> 16 & 255, packed >> 8 & 255, packed & 255], axis=1).astype(float)
