"""Published data sets -> their class tables: CARLA, CamVid, Cityscapes, IDD, ADE20K, Pets.

They are recognised by their files' names, folders, colours or ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from useg.classes import (
    CAMVID,
    CARLA,
    CITYSCAPES,
    ClassTable,
    Color,
    count_pixels,
    pack_color,
    pack_colors,
)
from useg.data.dataset import DetectedLayout, Pair, pick_evenly
from useg.errors import DataError, UsageError
from useg.images.image_files import read_mask
from useg.parsing import read_limited

# Oxford-IIIT Pet's trimaps.
OXFORD_PETS = ClassTable(
    ("background", "pet", "border"), ((0, 0, 0), (220, 120, 20), (240, 240, 240)), values=(2, 1, 3)
)

# Cityscapes' ``labelTrainIds`` files.
CITYSCAPES_TRAIN_IDS = replace(CITYSCAPES, values=tuple(range(19)), ignore=(255,))

# The ``labellevel3Ids`` files of IDD, the Indian Driving Dataset: names, ids and colours of the
# tool that draws them (AutoNUE's ``anue_labels.py``). Rarer labels share the id of a fallback.
IDD_LEVEL_3 = ClassTable(
    names=(
        *("road", "drivable fallback", "sidewalk", "non-drivable fallback", "person or animal"),
        *("rider", "motorcycle", "bicycle", "autorickshaw", "car", "truck", "bus"),
        *("vehicle fallback", "curb", "wall", "fence", "guard rail", "billboard"),
        *("traffic sign", "traffic light", "pole", "obs-str-bar-fallback", "building"),
        *("bridge or tunnel", "vegetation", "sky"),
    ),
    colors=(
        *((128, 64, 128), (81, 0, 81), (244, 35, 232), (152, 251, 152), (220, 20, 60)),
        *((255, 0, 0), (0, 0, 230), (119, 11, 32), (255, 204, 54), (0, 0, 142), (0, 0, 70)),
        *((0, 60, 100), (136, 143, 153), (220, 190, 40), (102, 102, 156), (190, 153, 153)),
        *((180, 165, 180), (174, 64, 67), (220, 220, 0), (250, 170, 30), (153, 153, 153)),
        *((169, 187, 214), (70, 70, 70), (150, 100, 100), (107, 142, 35), (70, 130, 180)),
    ),
    ignore=(255,),
)

# The last word of a mask's name, and its table; of masks beside each other, the first ones count.
# IDD's tool also writes the ids of Cityscapes ("cs"); ACDC and others have the names of Cityscapes
# in folders of their own.
TABLES_BY_NAME = {
    "labelIds": CITYSCAPES,
    "labelTrainIds": CITYSCAPES_TRAIN_IDS,
    "labellevel3Ids": IDD_LEVEL_3,
    "labelcsTrainIds": CITYSCAPES_TRAIN_IDS,
    "labelcsIds": CITYSCAPES,
}

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
# The largest list of these data sets has 300 kB.
_MAX_LIST_BYTES = 5_000_000

# This many masks show which version of CARLA made them, and whether they have a table's ids.
_NUM_MASKS_READ = 16


def grey_levels(colors: Sequence[Color]) -> dict[int, int]:
    """Return grey level -> id for a palette, as Pillow's ``convert("L")`` makes them.

    The weights are those of ITU-R BT.601. Of colours with the same grey level the first id counts.
    """
    greys: dict[int, int] = {}
    for k, (r, g, b) in enumerate(colors):
        greys.setdefault((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16, k)
    return greys


def voc_colors(number: int = 21) -> tuple[Color, ...]:
    """Return Pascal VOC's palette.

    A colour spreads the bits of its id over the three channels, from the highest bit down.
    """

    def channel(k: int, shift: int) -> int:
        return sum(((k >> (3 * bit + shift)) & 1) << (7 - bit) for bit in range(3))

    return tuple((channel(k, 0), channel(k, 1), channel(k, 2)) for k in range(number))


# The colour of the border around objects, which has no label.
VOC_BORDER = 0xE0E0C0

# Pascal VOC's classes; 255 is the border of the objects.
PASCAL_VOC = ClassTable(
    (
        *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat"),
        *("chair", "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant"),
        *("sheep", "sofa", "train", "tvmonitor"),
    ),
    voc_colors(),
    ignore=(255,),
)

KNOWN_PALETTES: dict[str, Sequence[Color]] = {
    "Pascal VOC": voc_colors(),
    "CamVid": CAMVID.colors,
    "CARLA": CARLA.colors,
    "Cityscapes": CITYSCAPES.colors,
}


# CARLA 0.9's ids up to 0.9.13: those of 0.8, and more.
CARLA_0_9 = replace(
    CARLA,
    names=(
        *CARLA.names,
        *("Sky", "Ground", "Bridge", "RailTrack", "GuardRail", "TrafficLight"),
        *("Static", "Dynamic", "Water", "Terrain"),
    ),
    colors=(
        *CARLA.colors,
        *((70, 130, 180), (81, 0, 81), (150, 100, 100), (230, 150, 140), (180, 165, 180)),
        *((250, 170, 30), (110, 190, 160), (170, 120, 50), (45, 60, 150), (145, 170, 100)),
    ),
    values=tuple(range(23)),
)
# The colours that CARLA 0.9 draws otherwise than 0.8.
_CARLA_0_9_COLORS: dict[str, Color] = {
    "Fences": (100, 40, 40),
    "Other": (55, 90, 80),
    "Vehicles": (0, 0, 142),
}
# Cityscapes' labels that its nineteen classes leave out.
_CITYSCAPES_OTHERS: dict[str, Color] = {
    "unlabeled": (0, 0, 0),
    "dynamic": (111, 74, 0),
    "ground": (81, 0, 81),
    "parking": (250, 170, 160),
    "rail track": (230, 150, 140),
    "guard rail": (180, 165, 180),
    "bridge": (150, 100, 100),
    "tunnel": (150, 120, 90),
    "caravan": (0, 0, 90),
    "trailer": (0, 0, 110),
}


def _colors_by_name(table: ClassTable) -> dict[str, Color]:
    return dict(zip(table.names, table.colors, strict=True))


# Colours that name classes. Tools that write the colours of Pascal VOC have classes of their own.
_COLOR_NAMES: dict[str, dict[str, Color]] = {
    "CARLA 0.8": _colors_by_name(CARLA),
    "CARLA 0.9": _colors_by_name(CARLA_0_9) | _CARLA_0_9_COLORS,
    "Cityscapes": _colors_by_name(CITYSCAPES) | _CITYSCAPES_OTHERS,
    "IDD": _colors_by_name(IDD_LEVEL_3) | {"unlabeled": (0, 0, 0)},
}
_MIN_KNOWN_COLORS = 4


def name_colors(colors: Sequence[Color]) -> tuple[str, tuple[str, ...]]:
    """Return the source of these colours, and the name of each; ``""`` and ``()`` if unknown.

    >>> name_colors([(0, 0, 0), (128, 64, 128), (244, 35, 232), (0, 0, 255)])
    ('CARLA 0.8', ('None', 'Roads', 'Sidewalks', 'Vehicles'))
    """
    for source, known in _COLOR_NAMES.items():
        names = {color: name for name, color in known.items()}
        if len(colors) >= _MIN_KNOWN_COLORS and set(colors) <= names.keys():
            return source, tuple(names[color] for color in colors)
    return "", ()


# Colours by which matplotlib and OpenCV display values, in even steps from the lowest value on.
_COLOR_MAPS = {
    "viridis": (
        *(0x440154, 0x482576, 0x414487, 0x35608D, 0x2A788E, 0x21908C, 0x22A884, 0x43BF71),
        *(0x7AD151, 0xBBDF27, 0xFDE725),
    ),
    "jet": (
        *(0x000080, 0x0000FF, 0x0080FF, 0x00FFFF, 0x80FF80, 0xFFFF00, 0xFF8000, 0xFF0000),
        0x800000,
    ),
}
_NUM_STEPS, _MAX_DISTANCE_FROM_MAP = 1021, 12


def find_displayed_levels(colors: Sequence[Color]) -> list[float] | None:
    """Return the levels (0 to 255) that colours display in viridis or jet; None if in neither.

    >>> find_displayed_levels([(68, 1, 84), (253, 231, 36)])
    [0.0, 255.0]
    """
    for packed in _COLOR_MAPS.values():
        stops = [[code >> shift & 255 for code in packed] for shift in (16, 8, 0)]
        places = np.linspace(0, len(packed) - 1, _NUM_STEPS)
        steps = np.stack([np.interp(places, range(len(packed)), band) for band in stops], axis=1)
        distances = np.abs(np.array(colors, float)[:, None] - steps).max(2)
        if (distances.min(1) <= _MAX_DISTANCE_FROM_MAP).all():
            return [255 * int(step) / (_NUM_STEPS - 1) for step in distances.argmin(1)]
    return None


def match_grey_palette(
    values: frozenset[int], palettes: dict[str, Sequence[Color]] = KNOWN_PALETTES
) -> str:
    """Return the name of the palette whose colours have these grey levels, or ``""``.

    Few or small values prove nothing.
    """
    if len(values - {0}) < 2 or max(values) < 2 * len(values) or values <= {0, 127, 128, 255}:
        return ""
    for name, colors in palettes.items():
        if values - {220} <= grey_levels(colors).keys():
            return name
    return ""


# CARLA's ids since 0.9.14, in the order of Cityscapes.
CARLA_0_9_14 = ClassTable(
    (
        *("Unlabeled", "Roads", "SideWalks", "Building", "Wall", "Fence", "Pole", "TrafficLight"),
        *("TrafficSign", "Vegetation", "Terrain", "Sky", "Pedestrian", "Rider", "Car", "Truck"),
        *("Bus", "Train", "Motorcycle", "Bicycle", "Static", "Dynamic", "Other", "Water"),
        *("RoadLine", "Ground", "Bridge", "RailTrack", "GuardRail"),
    )
)

# The road fills this much more of the bottom of the images than what has its id in the other table.
_MIN_ROAD_RATIO = 3


def distinguish_carla(pairs: Sequence[Pair]) -> tuple[ClassTable, str]:
    """Return the ids that CARLA masks have, and a note about it, which may be empty.

    CARLA 0.8 has the ids 0 to 12, and 0.9 up to 0.9.13 adds ten more. Since 0.9.14 the same numbers
    mean other classes: 1 is the road and not a building. The road is at the bottom of the images.

    Raises:
        DataError: The masks fit both, and no road shows which it is.
    """
    used, bottom = np.zeros(1 << 8, np.int64), np.zeros(1 << 8, np.int64)
    for pair in pick_evenly(pairs, _NUM_MASKS_READ):
        try:
            mask = read_mask(pair.mask, page=pair.page)
        except UsageError:
            # Reading all masks reports it.
            continue
        ids = (mask if mask.ndim == 2 else mask[..., 0]).astype(np.uint8)
        used += count_pixels(ids, 256)
        bottom += count_pixels(ids[-(len(ids) // 3 or 1) :], 256)
    highest = int(np.flatnonzero(used).max(initial=0))
    # Ids of neither are reported when all masks are read.
    if highest > 28 or (highest <= 12 and (used[7] or 2 * bottom[1] < bottom.sum())):
        return CARLA, ""
    is_new = highest > 22 or bottom[1] >= _MIN_ROAD_RATIO * max(1, bottom[7])
    is_old = highest <= 22 and bottom[7] >= _MIN_ROAD_RATIO * max(1, bottom[1])
    if highest <= 12 or not (is_new or is_old):
        raise DataError(
            f"the masks have ids up to {highest} and few or no pixels of 7, the road of CARLA 0.8, "
            "so it is unclear whether they are the ids of CARLA 0.8 (1 building, 7 road) or those "
            'of 0.9.14 and later (1 road, 11 sky); choose with classes = "carla-0.8" or classes = '
            '"carla-0.9.14" in dataset.toml'
        )
    version, table = ("0.9.14", CARLA_0_9_14) if is_new else ("0.9", CARLA_0_9)
    return table, (
        f"ids up to {highest} are those of CARLA {version}, so useg uses its classes, such as "
        f"1 {table.names[1]}; a classes.toml overrides them"
    )


def recognize_published(found: DetectedLayout, root: Path) -> DetectedLayout:
    """Add the classes and splits of a published data set; others are returned unchanged."""
    masks = [pair.mask for pair in found.pairs if pair.truth is None]
    if not masks:
        return found
    if masks[0].parent.name == "trimaps" and _contain_only_ids(masks[:3], OXFORD_PETS):
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
    table = TABLES_BY_NAME.get(masks[0].stem.rpartition("_")[2])
    if found.layout == "cityscapes" or (table and _contain_only_ids(masks[:3], table)):
        return _take_cityscapes(found, masks, table)
    if found.layout in ("folders", "camvid"):
        return _take_camvid(found, masks)
    return replace(found, classes=CARLA if found.layout == "carla" else None)


def _take_cityscapes(
    found: DetectedLayout, masks: Sequence[Path], table: ClassTable | None
) -> DetectedLayout:
    """Add a table of Cityscapes, unless a tool exported classes of its own in this layout."""
    table = table if table and _have_any_class(masks, table) else None
    return replace(found, classes=table, layout="cityscapes" if table else "folders")


def _take_camvid(found: DetectedLayout, masks: Sequence[Path]) -> DetectedLayout:
    """Add the classes of CamVid, if the masks have its colours, or its folders and its ids."""
    if _has_camvid_colors(masks[:3]):
        return replace(found, layout="camvid", classes=CAMVID, recolored=CAMVID_COLORS)
    if found.layout != "camvid" or not _contain_only_ids(masks[:3], CAMVID):
        return replace(found, layout="folders")
    note = (
        "the names of the folders and the ids are those of CamVid, so useg uses its classes; a "
        "classes.toml overrides them"
    )
    return replace(found, classes=CAMVID, notes=(*found.notes, note))


def _have_any_class(masks: Sequence[Path], table: ClassTable) -> bool:
    """Return whether some masks have a class of a table, or cannot be read."""
    for path in pick_evenly(masks, _NUM_MASKS_READ):
        try:
            if not set(table.values).isdisjoint(np.unique(read_mask(path)).tolist()):
                return True
        except UsageError:
            # Reading all masks reports it.
            return True
    return False


def _contain_only_ids(masks: Iterable[Path], table: ClassTable) -> bool:
    """Return whether masks have the values of a table only."""
    for path in masks:
        try:
            values = np.unique(read_mask(path)).tolist()
        except UsageError:
            # Reading all masks reports it.
            continue
        if not set(values) <= {*table.values, *table.ignore}:
            return False
    return True


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
        lines = _read_table(path).decode("utf-8").splitlines() if path.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"'{path}' cannot be read ({error}); save or copy it again, or remove it"
        ) from error
    return [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]


def _read_table(path: Path) -> bytes:
    try:
        return read_limited(path, _MAX_LIST_BYTES)
    except ValueError as error:
        raise DataError(f"'{path}' cannot be read ({error}); correct or remove it") from error


def _build_ade20k_table(listed: Path | None) -> ClassTable:
    """Return ADE20K's 150 classes, which have the values 1 to 150.

    ``objectInfo150.txt`` names them; the first of several words is taken if no other class has it.
    """
    numbers = tuple(range(1, 151))
    rows = (
        [line.split("\t") for line in _read_table(listed).decode("utf-8", "replace").splitlines()]
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
        codes |= set(np.unique(pack_colors(mask)).tolist())
    return (
        codes <= {pack_color(color) for color, _ in CAMVID_COLORS}
        and _CAMVID_ROAD_CODE in codes
        and len(codes) > 4
    )


@dataclass(frozen=True)
class _PublishedIds:
    """The ids of a published data set: these may occur, these surely do, and what to do."""

    name: str
    possible: frozenset[int]
    typical: frozenset[int]
    advice: str


# COCO-Stuff counts from 0, and eleven of COCO's numbers were never given away.
_UNUSED_COCO_STUFF_IDS = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
_PUBLISHED_IDS = (
    _PublishedIds(
        "Cityscapes' training ids",
        frozenset(range(19)),
        frozenset({0, 1, 2, 5, 7, 8, 10, 11, 13, 18}),
        'classes = "cityscapes-train" in dataset.toml names them',
    ),
    _PublishedIds(
        "Cityscapes",
        frozenset(range(34)),
        frozenset({7, 8, 11, 17, 20, 21, 23, 26}),
        'classes = "cityscapes" in dataset.toml names them and ignores those without a label',
    ),
    _PublishedIds(
        "Pascal VOC",
        frozenset(range(21)),
        frozenset({0, 15, 19, 20}),
        'classes = "pascal-voc" in dataset.toml names them',
    ),
    _PublishedIds(
        "Mapillary Vistas",
        frozenset(range(66)),
        frozenset({13, 15, 17, 27, 30, 55, 65}),
        "its config.json beside the masks names them; 65 has no label: ignore = [65]",
    ),
    _PublishedIds(
        "ADE20K",
        frozenset(range(151)),
        frozenset({0, 1, 3, 4, 5, 13}),
        "a table of its classes beside the masks names them; 0 has no label: ignore = [0]",
    ),
    _PublishedIds(
        "COCO-Stuff",
        frozenset(range(182)) - _UNUSED_COCO_STUFF_IDS,
        frozenset({0}),
        "its labels.txt beside the masks names them",
    ),
)
# A scheme of many classes is recognised by this many of them, and one of few by most of them.
_MIN_SHARE_OF_IDS = 0.7
_MIN_NUM_IDS = 40


def describe_ids(values: Iterable[int]) -> str:
    """Return a sentence if unnamed ids suggest a published data set, or "".

    >>> describe_ids(range(4))
    ''
    """
    used = frozenset(values)
    for scheme in _PUBLISHED_IDS:
        number = len(scheme.possible)
        fits = scheme.typical <= used <= scheme.possible and max(used) >= 0.85 * (number - 1)
        if fits and len(used) >= min(_MIN_NUM_IDS, _MIN_SHARE_OF_IDS * number):
            return (
                f"the {len(used)} ids up to {max(used)} fit those of {scheme.name}, but nothing "
                f"says what they mean, so they have no names; {scheme.advice}, otherwise ignore "
                "this note"
            )
    return ""


# Class tables that ``classes`` in ``dataset.toml`` may name.
PUBLISHED_TABLES = {
    "carla-0.8": CARLA,
    "carla-0.9": CARLA_0_9,
    "carla-0.9.14": CARLA_0_9_14,
    "camvid": CAMVID,
    "cityscapes": CITYSCAPES,
    "cityscapes-train": CITYSCAPES_TRAIN_IDS,
    "idd-level3": IDD_LEVEL_3,
    "pascal-voc": PASCAL_VOC,
    "oxford-pets": OXFORD_PETS,
}
