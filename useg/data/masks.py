"""Mask files -> the class table, where no file defines the classes.

Published data sets (CARLA, CamVid, Cityscapes, ADE20K, Oxford-IIIT Pet) are recognized and get
their own classes. For others the ids, grey levels or colours of all masks become the classes.
Smoothed or JPEG masks are refused, since their values would pass for classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import CAMVID, CARLA, CITYSCAPES, IGNORE, ClassTable, Color, spread_colors
from useg.data.dataset import DetectedLayout
from useg.errors import DataError, UsageError
from useg.images.files import read_mask, read_palette
from useg.machine import in_parallel

# More colours or scattered values than this are not classes.
MAX_CLASS_VALUES = 64

_LOSSY_SUFFIXES = (".jpg", ".jpeg")

# Oxford-IIIT Pet's trimaps.
OXFORD_PETS = ClassTable(
    ("background", "pet", "border"), ((0, 0, 0), (220, 120, 20), (240, 240, 240)), values=(2, 1, 3)
)

# Cityscapes' ``labelTrainIds`` files.
CITYSCAPES_TRAIN_IDS = replace(CITYSCAPES, values=tuple(range(19)), ignore=(255,))

# The 32 colours of CamVid's own masks, and SegNet's eleven classes (11: void) for them.
CAMVID_COLORS: tuple[tuple[Color, int], ...] = (
    ((128, 128, 128), 0),  # Sky
    ((192, 0, 128), 1),  # Archway
    ((0, 128, 64), 1),  # Bridge
    ((128, 0, 0), 1),  # Building
    ((64, 0, 64), 1),  # Tunnel
    ((64, 192, 0), 1),  # Wall
    ((192, 192, 128), 2),  # Column_Pole
    ((0, 0, 64), 2),  # TrafficCone
    ((128, 64, 128), 3),  # Road
    ((128, 0, 192), 3),  # LaneMkgsDriv
    ((192, 0, 64), 3),  # LaneMkgsNonDriv
    ((0, 0, 192), 4),  # Sidewalk
    ((64, 192, 128), 4),  # ParkingBlock
    ((128, 128, 192), 4),  # RoadShoulder
    ((128, 128, 0), 5),  # Tree
    ((192, 192, 0), 5),  # VegetationMisc
    ((192, 128, 128), 6),  # SignSymbol
    ((128, 128, 64), 6),  # Misc_Text
    ((0, 64, 64), 6),  # TrafficLight
    ((64, 64, 128), 7),  # Fence
    ((64, 0, 128), 8),  # Car
    ((64, 128, 192), 8),  # SUVPickupTruck
    ((192, 128, 192), 8),  # Truck_Bus
    ((192, 64, 128), 8),  # Train
    ((128, 64, 64), 8),  # OtherMoving
    ((64, 64, 0), 9),  # Pedestrian
    ((192, 128, 64), 9),  # Child
    ((64, 0, 192), 9),  # CartLuggagePram
    ((64, 128, 64), 9),  # Animal
    ((0, 128, 192), 10),  # Bicyclist
    ((192, 0, 192), 10),  # MotorcycleScooter
    ((0, 0, 0), 11),  # Void
)
_CAMVID_ROAD_CODE = 0x804080


@dataclass(frozen=True)
class MaskContent:
    """The values of one mask.

    Args:
        path: The mask file.
        values: Its values; None if the mask has colours.
        codes: The same as packed colours, ``0xRRGGBB``.
        colors: The palette's colour of each value, if the file has a palette.
    """

    path: Path
    values: frozenset[int] | None
    codes: frozenset[int]
    colors: dict[int, Color]


def infer_classes(
    masks: Sequence[tuple[Path, int | None]],
    ignore: Sequence[int] = (),
    *,
    skip_unreadable: bool = False,
) -> ClassTable:
    """Read all masks and derive the class table from their values.

    Colours (channels that differ) become classes by colour. A palette gives ids their colours. Two
    values, such as 0 and 255, become background and foreground. 255 beside small ids is ignored.
    Otherwise the values are the class ids.

    Args:
        masks: The mask files, at least one, each with its page (None for a file of one page).
        ignore: Values that are not classes.
        skip_unreadable: Skip damaged files instead of raising an error.

    Raises:
        DataError: A file is damaged, or there are more colours or values than classes can be.
    """
    contents = in_parallel(lambda mask: _scan_or_skip(*mask, skip_unreadable), masks)
    return derive_class_table([mask for mask in contents if mask is not None], ignore)


def derive_class_table(seen: Sequence[MaskContent], ignore: Sequence[int] = ()) -> ClassTable:
    """Derive the class table from the content of masks; :func:`infer_classes` has the rules.

    Raises:
        DataError: There are more colours or values than classes can be, or two encodings of one
            class.
    """
    if not seen:
        return ClassTable(("class 0",))
    palettes = _join_palettes(seen)
    if palettes is None or any(found.values is None for found in seen):
        return _build_color_table(seen)
    values = frozenset().union(*(found.values or frozenset() for found in seen)) - frozenset(ignore)
    _refuse_smoothed(seen, values)
    _refuse_two_encodings(seen, values)
    if len(values) == 2:
        low, high = sorted(values)
        return ClassTable(
            ("background", "foreground"), _colors((low, high), palettes), values=(low, high)
        )
    ids = tuple(sorted(values - {IGNORE} if _has_ignored_255(values) else values))
    return ClassTable(
        tuple(f"class {v}" for v in ids),
        _colors(ids, palettes),
        values=ids,
        ignore=(IGNORE,) if _has_ignored_255(values) else (),
    )


def _has_ignored_255(values: frozenset[int]) -> bool:
    """Return whether 255 is ignored: beside ids (0, 1, 2, 255), not beside levels (0, 128, 255)."""
    ids = values - {IGNORE}
    return IGNORE in values and len(ids) > 1 and max(ids) <= max(40, 2 * len(ids))


def _colors(values: Sequence[int], palettes: dict[int, Color]) -> tuple[Color, ...]:
    colors = tuple(palettes.get(v, (-1, -1, -1)) for v in values)
    return (
        colors
        if len(set(colors)) == len(colors) and (-1, -1, -1) not in colors
        else spread_colors(len(values))
    )


def _scan_or_skip(path: Path, page: int | None, skip: bool) -> MaskContent | None:
    try:
        return _scan(path, page)
    except UsageError:
        if skip:
            return None
        raise


def _scan(path: Path, page: int | None) -> MaskContent:
    mask = read_mask(path, page=page)
    if mask.ndim == 2:
        values = _find_distinct(mask)
        lut = read_palette(path)
        if lut is None:
            return MaskContent(
                path, values, frozenset(v * 0x010101 for v in values if 0 <= v <= 255), {}
            )
        colors = {
            v: (int(lut[v, 0]), int(lut[v, 1]), int(lut[v, 2])) for v in values if v < len(lut)
        }
        return MaskContent(
            path, values, frozenset(r << 16 | g << 8 | b for r, g, b in colors.values()), colors
        )
    codes = _find_distinct(
        mask[..., 0].astype(np.int32) << 16 | mask[..., 1].astype(np.int32) << 8 | mask[..., 2]
    )
    red_only = not mask[..., 1:].any()
    return MaskContent(
        path, frozenset(code >> 16 for code in codes) if red_only else None, codes, {}
    )


def _find_distinct(values: NDArray[Any]) -> frozenset[int]:
    flat = values.ravel()
    # A mask consists of long runs: sorting only their ends is many times faster.
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return frozenset(int(v) for v in np.unique(np.append(flat[changes], flat[-1:])))


def _join_palettes(seen: Iterable[MaskContent]) -> dict[int, Color] | None:
    """Join the files' palettes; None if one index has two colours in different files."""
    joined: dict[int, Color] = {}
    for found in seen:
        for value, color in found.colors.items():
            if joined.setdefault(value, color) != color:
                return None
    return joined


def _build_color_table(seen: Sequence[MaskContent]) -> ClassTable:
    codes = sorted(frozenset().union(*(found.codes for found in seen)))
    if len(codes) > MAX_CLASS_VALUES:
        worst = max(seen, key=lambda found: len(found.codes))
        raise DataError(
            f"the masks have {len(codes)} different colours ('{worst.path}' alone has "
            f"{len(worst.codes)}), but at most {MAX_CLASS_VALUES} can be classes; they look like "
            "photographs, or like masks that were saved as JPEG or resized with smoothing. Check "
            "which folder has the masks, save them as PNG without smoothing, or list the true "
            "colours in classes.toml with by_color = true"
        )
    colors = tuple((code >> 16, code >> 8 & 255, code & 255) for code in codes)
    two = len(codes) == 2 and colors[0] == (0, 0, 0)
    names = ("background", "foreground") if two else tuple(f"color #{code:06x}" for code in codes)
    return ClassTable(names, colors, by_color=True)


def _refuse_smoothed(seen: Sequence[MaskContent], values: frozenset[int]) -> None:
    """Refuse grey levels that JPEG or smoothing has made, since they would pass for ids."""
    worst = max(seen, key=lambda found: len(found.values or ()))
    lossy = next(
        (found.path for found in seen if found.path.suffix.lower() in _LOSSY_SUFFIXES), None
    )
    ids = values - {IGNORE}
    if lossy is not None and len(values) > 2:
        raise DataError(
            f"the masks have {len(values)} different values, and '{lossy}' is a JPEG, which alters "
            "values; save the masks as PNG (for two classes: 255 where the value is above 127, "
            "otherwise 0)"
        )
    if len(values) > 255 or (len(values) > MAX_CLASS_VALUES and max(ids) > 1.5 * len(ids)):
        raise DataError(
            f"the masks have {len(values)} different values from {min(values)} to {max(values)} "
            f"('{worst.path}' alone has {len(worst.values or ())}), which look like a photograph, "
            "a smoothed mask or numbered objects and not like class ids; check which folder has "
            "the masks, or list the true values in classes.toml"
        )


def mixes_two_encodings(values: Iterable[frozenset[int]]) -> bool:
    """Return whether some masks store 1 and others 255 for one class: never both in one mask."""
    each = [found for found in values if found]
    return frozenset().union(*each) == {0, 1, IGNORE} and not any(
        {1, IGNORE} <= found for found in each
    )


def _refuse_two_encodings(seen: Sequence[MaskContent], values: frozenset[int]) -> None:
    if values == {0, 1, IGNORE} and mixes_two_encodings(
        found.values or frozenset() for found in seen
    ):
        one, other = (
            next(found.path for found in seen if value in (found.values or ()))
            for value in (1, IGNORE)
        )
        raise DataError(
            f"some masks have 0 and 1, such as '{one}', and others 0 and 255, such as '{other}', "
            "so one class seems to have two values; run useg inspect DATA --fix OUT, which writes "
            "a clean copy, or list 1 as a class and 255 under ignore in classes.toml"
        )


def recognize_published(found: DetectedLayout, root: Path) -> DetectedLayout:
    """Add the classes and splits of a published data set; others are returned unchanged."""
    masks = [pair.mask for pair in found.pairs if pair.truth is None]
    if not masks:
        return found
    if masks[0].parent.name == "trimaps":
        return _add_pet_splits(found)
    if all(path.stem.startswith(("ADE_train_", "ADE_val_")) for path in masks):
        listed = (
            folder / "objectInfo150.txt"
            for folder in masks[0].parents
            if folder.is_relative_to(root)
        )
        return replace(
            found,
            layout="ade20k",
            classes=_build_ade20k_table(next(filter(Path.is_file, listed), None)),
        )
    if found.layout == "cityscapes":
        return replace(
            found,
            classes=CITYSCAPES_TRAIN_IDS
            if masks[0].stem.endswith("_labelTrainIds")
            else CITYSCAPES,
        )
    if found.layout in ("folders", "camvid") and _has_camvid_colors(masks[:3]):
        return replace(found, layout="camvid", classes=CAMVID, recolored=CAMVID_COLORS)
    return replace(found, classes={"carla": CARLA, "camvid": CAMVID}.get(found.layout))


def _add_pet_splits(found: DetectedLayout) -> DetectedLayout:
    """Add the splits of Oxford-IIIT Pet, which ``trainval.txt`` and ``test.txt`` list."""
    folder = found.pairs[0].mask.parent.parent
    splits = {
        name: split
        for file, split in (("trainval", "train"), ("test", "test"))
        for name in _read_first_words(folder / f"{file}.txt")
    }
    pairs = tuple(
        replace(pair, split=splits.get(pair.image.stem, "gap") if splits else pair.split)
        for pair in found.pairs
    )
    return replace(found, layout="pets", pairs=pairs, classes=OXFORD_PETS)


def _read_first_words(path: Path) -> list[str]:
    """Return the first word of each line that is not a comment; none if there is no such file."""
    try:
        lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"'{path}' cannot be read ({error}); save or copy it again, or remove it"
        ) from error
    return [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]


def _build_ade20k_table(listed: Path | None) -> ClassTable:
    """Return ADE20K's 150 classes, which have the values 1 to 150.

    ``objectInfo150.txt`` names them; the first of several words is taken if no other class has it.
    """
    numbers = tuple(range(1, 151))
    rows = (
        [line.split("\t") for line in listed.read_text("utf-8", "replace").splitlines()]
        if listed
        else []
    )
    full = {
        int(row[0]): row[-1].strip()
        for row in rows
        if row[0].strip().isdecimal() and row[-1].strip()
    }
    first = {number: name.split(",")[0].split(";")[0].strip() for number, name in full.items()}
    names = {
        number: first[number] if list(first.values()).count(first[number]) == 1 else full[number]
        for number in full
    }
    return ClassTable(
        tuple(names.get(number, f"class {number}") for number in numbers),
        values=numbers,
        ignore=(0,),
    )


def _has_camvid_colors(masks: Iterable[Path]) -> bool:
    """Return whether masks have CamVid's colours: the road's and four others of the 32, only."""
    codes: set[int] = set()
    for path in masks:
        try:
            mask = read_mask(path)
        except UsageError:
            # Reading all masks reports it.
            continue
        if mask.ndim != 3:
            return False
        codes |= set(
            np.unique(
                mask[..., 0].astype(np.int32) << 16
                | mask[..., 1].astype(np.int32) << 8
                | mask[..., 2]
            ).tolist()
        )
    return (
        codes <= {r << 16 | g << 8 | b for (r, g, b), _ in CAMVID_COLORS}
        and _CAMVID_ROAD_CODE in codes
        and len(codes) > 4
    )
