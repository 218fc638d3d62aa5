"""Pairs of a published data set -> the same with its classes, its official splits and what its masks store."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from useg.classes import CAMVID, CARLA, CITYSCAPES, ClassTable, Color
from useg.data.dataset import Found
from useg.data.images import read_mask
from useg.errors import UsageError

# Oxford-IIIT Pet's trimaps.
PET = ClassTable(("background", "pet", "border"), ((0, 0, 0), (220, 120, 20), (240, 240, 240)), values=(2, 1, 3))

# Cityscapes' ``labelTrainIds`` files.
TRAIN_IDS = replace(CITYSCAPES, values=tuple(range(19)), ignore=(255,))

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


def complete(found: Found, root: Path) -> Found:
    """Add what is known of a published data set; others are returned as they are."""
    masks = [pair.mask for pair in found.pairs if pair.truth is None]
    if not masks:
        return found
    if masks[0].parent.name == "trimaps":
        return _pet(found)
    if all(path.stem.startswith(("ADE_train_", "ADE_val_")) for path in masks):
        listed = (folder / "objectInfo150.txt" for folder in masks[0].parents if folder.is_relative_to(root))
        return replace(found, layout="ade20k", classes=_ade20k(next(filter(Path.is_file, listed), None)))
    if found.layout == "cityscapes":
        return replace(found, classes=TRAIN_IDS if masks[0].stem.endswith("_labelTrainIds") else CITYSCAPES)
    if found.layout in ("folders", "camvid") and _in_camvid_colors(masks[:3]):
        return replace(found, layout="camvid", classes=CAMVID, recolored=CAMVID_COLORS)
    return replace(found, classes={"carla": CARLA, "camvid": CAMVID}.get(found.layout))


def _pet(found: Found) -> Found:
    """Oxford-IIIT Pet: ``trainval.txt`` and ``test.txt`` list names with numbers behind; what neither lists is in no split."""
    folder = found.pairs[0].mask.parent.parent
    splits = {name: split for file, split in (("trainval", "train"), ("test", "test")) for name in _listed(folder / f"{file}.txt")}
    pairs = tuple(replace(pair, split=splits.get(pair.image.stem, "gap") if splits else pair.split) for pair in found.pairs)
    return replace(found, layout="pets", pairs=pairs, classes=PET)


def _listed(path: Path) -> list[str]:
    """Return the first word of each line that is no comment; none when there is no such file."""
    try:
        lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"'{path}' cannot be read ({error}); save or copy it again, or remove it") from error
    return [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]


def _ade20k(listed: Path | None) -> ClassTable:
    """ADE20K's 150 classes, 1 to 150 in masks; named as ``objectInfo150.txt`` has them (the first of several words, if no other class has it)."""
    numbers = tuple(range(1, 151))
    rows = [line.split("\t") for line in listed.read_text("utf-8", "replace").splitlines()] if listed else []
    full = {int(row[0]): row[-1].strip() for row in rows if row[0].strip().isdecimal() and row[-1].strip()}
    first = {number: name.split(",")[0].split(";")[0].strip() for number, name in full.items()}
    names = {number: first[number] if list(first.values()).count(first[number]) == 1 else full[number] for number in full}
    return ClassTable(tuple(names.get(number, f"class {number}") for number in numbers), values=numbers, ignore=(0,))


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
        codes |= set(np.unique(mask[..., 0].astype(np.int32) << 16 | mask[..., 1].astype(np.int32) << 8 | mask[..., 2]).tolist())
    return codes <= {r << 16 | g << 8 | b for (r, g, b), _ in CAMVID_COLORS} and _ROAD in codes and len(codes) > 4
