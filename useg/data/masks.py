"""Mask files -> a class table, where nobody wrote one: which ids, grey levels or colours are in them, and what that means."""

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

MAX_CLASS_VALUES = 64  # more colours or scattered values than this are no classes


_LOSSY = (".jpg", ".jpeg")


@dataclass(frozen=True)
class MaskContent:
    """What is in one mask: its ``values`` (None when only colours make sense of it), the same as packed colours, and its palette's colours."""

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
    """Look through all masks and derive the class table.

    Colours (bands that differ) become classes by colour; a palette gives ids their colours; exactly two values, such as 0 and 255, become
    background and foreground; 255 beside small ids means ignore; otherwise the values found are the classes, as they are.

    Args:
        masks: the mask files, at least one, each with its page (None for a file of one picture).
        ignore: values that are known to be no class.
        skip_unreadable: pass over damaged files instead of failing.

    Raises:
        DataError: a damaged file; more colours or values than classes can be.
    """
    seen = in_parallel(lambda mask: _scan_or_skip(*mask, skip_unreadable), masks)
    return derive_class_table([found for found in seen if found is not None], ignore)


def derive_class_table(seen: Sequence[MaskContent], ignore: Sequence[int] = ()) -> ClassTable:
    """Derive the class table from what is in the masks, as :func:`guess_classes` says.

    Raises:
        DataError: more colours or values than classes can be, or two codes for one thing.
    """
    if not seen:
        return ClassTable(("class 0",))
    palettes = _agreed_palette(seen)
    if palettes is None or any(found.values is None for found in seen):
        return _by_color(seen)
    values = frozenset().union(*(found.values or frozenset() for found in seen)) - frozenset(ignore)
    _refuse_smeared(seen, values)
    _refuse_two_codes(seen, values)
    if len(values) == 2:
        low, high = sorted(values)
        return ClassTable(
            ("background", "foreground"), _colors((low, high), palettes), values=(low, high)
        )
    ids = tuple(sorted(values - {IGNORE} if _is_ignore(values) else values))
    return ClassTable(
        tuple(f"class {v}" for v in ids),
        _colors(ids, palettes),
        values=ids,
        ignore=(IGNORE,) if _is_ignore(values) else (),
    )


def _is_ignore(values: frozenset[int]) -> bool:
    """255 beside ids (0, 1, 2, 255) is not a class; beside grey levels (0, 128, 255) it is."""
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
        values = _distinct(mask)
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
    codes = _distinct(
        mask[..., 0].astype(np.int32) << 16 | mask[..., 1].astype(np.int32) << 8 | mask[..., 2]
    )
    red_only = not mask[..., 1:].any()
    return MaskContent(
        path, frozenset(code >> 16 for code in codes) if red_only else None, codes, {}
    )


def _distinct(values: NDArray[Any]) -> frozenset[int]:
    flat = values.ravel()
    changes = np.flatnonzero(
        flat[1:] != flat[:-1]
    )  # a mask is made of long runs: sorting their starts alone is many times faster
    return frozenset(int(v) for v in np.unique(np.append(flat[changes], flat[-1:])))


def _agreed_palette(seen: Iterable[MaskContent]) -> dict[int, Color] | None:
    """Join the files' palettes; None when one index has two colours, as after saving each mask with a palette of its own."""
    joined: dict[int, Color] = {}
    for found in seen:
        for value, color in found.colors.items():
            if joined.setdefault(value, color) != color:
                return None
    return joined


def _by_color(seen: Sequence[MaskContent]) -> ClassTable:
    codes = sorted(frozenset().union(*(found.codes for found in seen)))
    if len(codes) > MAX_CLASS_VALUES:
        worst = max(seen, key=lambda found: len(found.codes))
        raise DataError(
            f"the masks hold {len(codes)} different colours ('{worst.path}' alone {len(worst.codes)}), but at most {MAX_CLASS_VALUES} can be classes: they look "
            f"like photographs, or like label pictures saved as JPEG or resized with smoothing; check which folder holds the masks, save them "
            f"as PNG without smoothing, or list the true colours in classes.toml with by_color = true"
        )
    colors = tuple((code >> 16, code >> 8 & 255, code & 255) for code in codes)
    two = len(codes) == 2 and colors[0] == (0, 0, 0)
    names = ("background", "foreground") if two else tuple(f"color #{code:06x}" for code in codes)
    return ClassTable(names, colors, by_color=True)


def _refuse_smeared(seen: Sequence[MaskContent], values: frozenset[int]) -> None:
    """Grey levels in between, made by JPEG or by smoothing, would pass for ids."""
    worst = max(seen, key=lambda found: len(found.values or ()))
    lossy = next((found.path for found in seen if found.path.suffix.lower() in _LOSSY), None)
    ids = values - {IGNORE}
    if lossy is not None and len(values) > 2:
        raise DataError(
            f"the masks hold {len(values)} different values, and '{lossy}' is a JPEG, which blurs values; "
            f"a mask needs exact ones: save the masks as PNG again (for two classes: 255 where the value is above 127, otherwise 0)"
        )
    if len(values) > 255 or (len(values) > MAX_CLASS_VALUES and max(ids) > 1.5 * len(ids)):
        raise DataError(
            f"the masks hold {len(values)} different values from {min(values)} to {max(values)} ('{worst.path}' alone {len(worst.values or ())}), "
            f"which look like a photograph, a smoothed mask or numbered objects and not like class ids; check which folder holds the masks, "
            f"or list the true values in classes.toml"
        )


def mixes_two_encodings(values: Iterable[frozenset[int]]) -> bool:
    """Tell whether some masks say 1 and others 255 for the same class: together 0, 1 and 255, but never 1 and 255 in one mask."""
    each = [found for found in values if found]
    return frozenset().union(*each) == {0, 1, IGNORE} and not any(
        {1, IGNORE} <= found for found in each
    )


def _refuse_two_codes(seen: Sequence[MaskContent], values: frozenset[int]) -> None:
    if values == {0, 1, IGNORE} and mixes_two_encodings(
        found.values or frozenset() for found in seen
    ):
        one, other = (
            next(found.path for found in seen if value in (found.values or ()))
            for value in (1, IGNORE)
        )
        raise DataError(
            f"some masks hold 0 and 1, such as '{one}', and others 0 and 255, such as '{other}', but none holds 1 and 255: one class has two values; "
            f"let useg inspect DATA --fix OUT write a clean copy, or list 1 as a class and 255 under ignore in classes.toml"
        )


# Oxford-IIIT Pet's trimaps.
OXFORD_PETS = ClassTable(
    ("background", "pet", "border"), ((0, 0, 0), (220, 120, 20), (240, 240, 240)), values=(2, 1, 3)
)


# Cityscapes' ``labelTrainIds`` files.
CITYSCAPES_TRAIN_IDS = replace(CITYSCAPES, values=tuple(range(19)), ignore=(255,))


# The 32 colours of CamVid's own masks, and which of SegNet's eleven classes (11: void) each belongs to.
CAMVID_COLORS: tuple[tuple[Color, int], ...] = (
    ((128, 128, 128), 0),  # Sky
    ((192, 0, 128), 1), ((0, 128, 64), 1), ((128, 0, 0), 1), ((64, 0, 64), 1), ((64, 192, 0), 1),  # Archway, Bridge, Building, Tunnel, Wall
    ((192, 192, 128), 2), ((0, 0, 64), 2),  # Column_Pole, TrafficCone
    ((128, 64, 128), 3), ((128, 0, 192), 3), ((192, 0, 64), 3),  # Road, LaneMkgsDriv, LaneMkgsNonDriv
    ((0, 0, 192), 4), ((64, 192, 128), 4), ((128, 128, 192), 4),  # Sidewalk, ParkingBlock, RoadShoulder
    ((128, 128, 0), 5), ((192, 192, 0), 5),  # Tree, VegetationMisc
    ((192, 128, 128), 6), ((128, 128, 64), 6), ((0, 64, 64), 6),  # SignSymbol, Misc_Text, TrafficLight
    ((64, 64, 128), 7),  # Fence
    ((64, 0, 128), 8), ((64, 128, 192), 8), ((192, 128, 192), 8), ((192, 64, 128), 8), ((128, 64, 64), 8),  # Car, SUV, Truck_Bus, Train, OtherMoving
    ((64, 64, 0), 9), ((192, 128, 64), 9), ((64, 0, 192), 9), ((64, 128, 64), 9),  # Pedestrian, Child, CartLuggagePram, Animal
    ((0, 128, 192), 10), ((192, 0, 192), 10),  # Bicyclist, MotorcycleScooter
    ((0, 0, 0), 11),  # Void
)  # fmt: skip


_ROAD = 0x804080


def recognize_published(found: DetectedLayout, root: Path) -> DetectedLayout:
    """Add what is known of a published data set; others are returned as they are."""
    masks = [pair.mask for pair in found.pairs if pair.truth is None]
    if not masks:
        return found
    if masks[0].parent.name == "trimaps":
        return _pet(found)
    if all(path.stem.startswith(("ADE_train_", "ADE_val_")) for path in masks):
        listed = (
            folder / "objectInfo150.txt"
            for folder in masks[0].parents
            if folder.is_relative_to(root)
        )
        return replace(
            found, layout="ade20k", classes=_ade20k(next(filter(Path.is_file, listed), None))
        )
    if found.layout == "cityscapes":
        return replace(
            found,
            classes=CITYSCAPES_TRAIN_IDS
            if masks[0].stem.endswith("_labelTrainIds")
            else CITYSCAPES,
        )
    if found.layout in ("folders", "camvid") and _in_camvid_colors(masks[:3]):
        return replace(found, layout="camvid", classes=CAMVID, recolored=CAMVID_COLORS)
    return replace(found, classes={"carla": CARLA, "camvid": CAMVID}.get(found.layout))


def _pet(found: DetectedLayout) -> DetectedLayout:
    """Oxford-IIIT Pet: ``trainval.txt`` and ``test.txt`` list names with numbers behind; what neither lists is in no split."""
    folder = found.pairs[0].mask.parent.parent
    splits = {
        name: split
        for file, split in (("trainval", "train"), ("test", "test"))
        for name in _listed(folder / f"{file}.txt")
    }
    pairs = tuple(
        replace(pair, split=splits.get(pair.image.stem, "gap") if splits else pair.split)
        for pair in found.pairs
    )
    return replace(found, layout="pets", pairs=pairs, classes=OXFORD_PETS)


def _listed(path: Path) -> list[str]:
    """Return the first word of each line that is no comment; none when there is no such file."""
    try:
        lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"'{path}' cannot be read ({error}); save or copy it again, or remove it"
        ) from error
    return [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]


def _ade20k(listed: Path | None) -> ClassTable:
    """ADE20K's 150 classes, 1 to 150 in masks; named as ``objectInfo150.txt`` has them (the first of several words, if no other class has it)."""
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


def _in_camvid_colors(masks: Iterable[Path]) -> bool:
    """Tell CamVid's colours: a road and four others of the 32, and nothing else, as no other published palette has them."""
    codes: set[int] = set()
    for path in masks:
        try:
            mask = read_mask(path)
        except UsageError:
            continue  # it is named when all masks are read
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
        and _ROAD in codes
        and len(codes) > 4
    )
