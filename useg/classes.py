"""The class table: stored values of mask files <-> class ids, and logits -> class ids.

Everything behind a mask file works with class ids 0..K-1 and ``IGNORE``. What the file itself
stores (ids, grey levels such as 0 and 255, colours) is known only here.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.errors import DataError, suggest
from useg.parsing import read_toml, shorten

Color = tuple[int, int, int]
Label = NDArray[np.uint8]

# The id of pixels that count neither in the loss nor in a score.
IGNORE = 255

# Class ids are 0 to 254.
MAX_CLASSES = IGNORE
# Keys of a class in ``classes.toml``.
CLASS_KEYS = ("name", "value", "color", "objects")
# Rows of an image that are processed at a time: they stay in the processor's cache. Fewer would not
# be faster, and threads that share the interpreter would wait for each other more often.
ROWS_AT_A_TIME = 256
# Images of so few pixels take a few calls of numpy instead of three for each class: between two
# calls, a thread may wait for the interpreter.
MAX_FEW_CALLS_PIXELS = 1 << 14
# Pixels that are counted at a time.
MAX_COUNTED_PIXELS = 1 << 20
# Longest name of a class, and largest number of ignored values.
MAX_NAME_LENGTH = 200
MAX_IGNORED = 1 << 16


@dataclass(frozen=True)
class ClassTable:
    """The classes of a data set or a model.

    Args:
        names: ``names[k]`` is the name of class ``k``.
        colors: ``colors[k]`` is its colour in pictures, RGB 0-255.
        values: ``values[k]`` is what a mask file stores for class ``k``; by default ``k``.
        ignore: further values in mask files, which become ``IGNORE``; colours as ``0xRRGGBB`` when
            ``by_color``.
        by_color: mask files are RGB images that store ``colors`` instead of ids.
        objects: ids of the classes whose objects are separated; None if they are not known.

    Raises:
        DataError: there are no classes or more than 255, the lists differ in length, a name,
            value or colour is of another type or out of range, or two classes share one.
    """

    names: tuple[str, ...]
    colors: tuple[Color, ...] = ()
    values: tuple[int, ...] = ()
    ignore: tuple[int, ...] = ()
    by_color: bool = False
    # Checkpoints store the representation of the other fields.
    objects: tuple[int, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.colors:
            object.__setattr__(self, "colors", spread_colors(len(self.names)))
        if not self.values:
            object.__setattr__(self, "values", tuple(range(len(self.names))))
        if problem := next(self._find_problems(), None):
            raise DataError(f"a class table {problem}; check classes.toml")

    def _find_problems(self) -> Iterator[str]:
        """Say what is wrong: a check may rely on those before it."""
        names, colors, values = len(self.names), len(self.colors), len(self.values)
        if not 1 <= names <= MAX_CLASSES:
            yield f"has {names} classes, but 1 to {MAX_CLASSES} are possible"
        if not names == colors == values:
            yield f"has {names} names, {colors} colours and {values} values; each class needs one"
        for name in self.names:
            if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME_LENGTH:
                yield (
                    f"has the name {shorten(name)}, but a name is a text of 1 to "
                    f"{MAX_NAME_LENGTH} characters"
                )
        for number in (*self.values, *self.ignore, *chain.from_iterable(self.colors)):
            if isinstance(number, bool) or not isinstance(number, int | np.integer):
                yield f"has the value {shorten(number)}, but values and colours are whole numbers"
        if any(not 0 <= value < 1 << 16 for value in self.values):
            yield (
                f"has the values {_ranges(self.values)}, but a mask stores whole numbers from 0 to "
                "65535"
            )
        if any(len(color) != 3 or min(color) < 0 or max(color) > 255 for color in self.colors):
            yield "has a colour that is not three numbers from 0 to 255"
        for value in self.ignore:
            # Maps have negative numbers where they have no data.
            if not -(1 << 31) <= value < 1 << 24:
                yield (
                    f"ignores {shorten(value)}, but mask files store whole numbers from "
                    "-2147483648 to 65535, or colours up to 0xFFFFFF"
                )
        if len(self.ignore) > MAX_IGNORED:
            yield f"ignores {len(self.ignore):,} values, but {MAX_IGNORED:,} are possible"
        stored = self.colors if self.by_color else self.values
        if repeated := [item for item in stored if stored.count(item) > 1]:
            what = "colour" if self.by_color else "value"
            yield f"gives the {what} {repeated[0]} to two classes, but each needs its own"
        if not set(self.objects or ()) <= set(range(len(self))):
            yield (
                f"says that the classes {_ranges(self.objects or ())} consist of objects, but it "
                f"has the classes 0-{len(self) - 1}"
            )

    @property
    def stored(self) -> tuple[int, ...]:
        """What masks store for each class: its value, or its colour as ``0xRRGGBB``."""
        return tuple(map(pack_color, self.colors)) if self.by_color else self.values

    def __len__(self) -> int:
        return len(self.names)


def pack_color(color: Sequence[int]) -> int:
    """Return a colour (red, green, blue) as one number.

    >>> hex(pack_color((1, 2, 255)))
    '0x102ff'
    """
    red, green, blue = (int(channel) for channel in color)
    return red << 16 | green << 8 | blue


def pack_colors(pixels: NDArray[Any]) -> NDArray[np.int32]:
    """Return the colour of each pixel ``(..., 3)``, of 8 bits a band, as one number ``(...)``."""
    red, green, blue = (pixels[..., band].astype(np.int32) for band in range(3))
    packed: NDArray[np.int32] = red << 16 | green << 8 | blue
    return packed


def spread_colors(count: int) -> tuple[Color, ...]:
    """Return ``count`` colours that are easy to distinguish.

    Black comes first, then hues a golden angle apart.
    """
    colors: list[Color] = [(0, 0, 0)]
    for k in range(count - 1):
        hue = (0.02 + k * 0.618034) % 1.0
        saturation = (0.75, 0.55, 0.9)[k % 3]
        brightness = (0.95, 0.8, 0.65)[k // 3 % 3]
        rgb = colorsys.hsv_to_rgb(hue, saturation, brightness)
        colors.append((round(rgb[0] * 255), round(rgb[1] * 255), round(rgb[2] * 255)))
    return tuple(colors[:count])


def hex_color(table: ClassTable, k: int) -> str:
    """Return a class's colour in CSS's notation.

    >>> hex_color(ClassTable(("sky",), ((0, 128, 255),)), 0)
    '#0080ff'
    """
    return "#{:02x}{:02x}{:02x}".format(*table.colors[k])


def to_label(mask: NDArray[Any], table: ClassTable, source: str = "mask") -> Label:
    """Turn what a mask file stores into a label map.

    Args:
        mask: stored values ``(H, W)``, whole numbers or booleans, or colours ``(H, W, 3)`` uint8
            when ``table.by_color``.
        table: the classes.
        source: the file's name, for error messages.

    Returns:
        Label map ``(H, W)`` uint8: class ids, and ``IGNORE`` where the stored value is negative
        or in ``table.ignore``.

    Raises:
        DataError: a value or colour is not in the table.
    """
    if table.by_color:
        return _label_from_colors(mask, table, source)
    if mask.ndim != 2 or mask.dtype.kind not in "bui":
        raise DataError(
            f"{source} holds {mask.dtype} values of shape {mask.shape}, but a mask holds one band "
            "of class ids, whole numbers of 0 or more; save it as such"
        )
    mask = mask.astype(np.uint8) if mask.dtype == bool else mask
    low, high = int(mask.min(initial=0)), int(mask.max(initial=0))
    if high >= 1 << 16:
        raise DataError(
            f"{source} has values from {low} to {high}, but a mask holds class ids, whole numbers "
            "from 0 to 65535; save it as such"
        )
    known = np.zeros(max(256, high + 1), bool)
    ids = np.full(len(known), IGNORE, np.uint8)
    known[[value for value in table.ignore if 0 <= value < len(known)]] = True
    for k, value in enumerate(table.values):
        if value < len(known):
            known[value], ids[value] = True, k
    if low < 0:
        # A last place for all of them: negative numbers mark pixels without data.
        mask = np.where(mask < 0, len(known), mask.astype(np.int64))
        known, ids = np.append(known, True), np.append(ids, np.uint8(IGNORE))
    unknown = ~known[mask]
    if unknown.any():
        row, column = np.argwhere(unknown)[0]
        ignored = f"; ignored: {_ranges(table.ignore)}" if table.ignore else ""
        raise DataError(
            f"{source} has the value {mask[row, column]} at (row {row}, column {column}), "
            f"but there are {len(table)} classes ({_ranges(table.values)}{ignored}); "
            f"map it in classes.toml or set ignore = [{mask[row, column]}]"
        )
    label: Label = np.take(ids, mask)
    return label


def _label_from_colors(mask: NDArray[Any], table: ClassTable, source: str) -> Label:
    if mask.ndim != 3 or mask.shape[2] != 3:
        raise DataError(
            f"{source} does not have three bands, but the class table says that masks store "
            "colours; set by_color = false in classes.toml"
        )
    packed = pack_colors(mask)
    codes = np.array([*table.stored, *table.ignore])
    ids = np.array([*range(len(table)), *(IGNORE for _ in table.ignore)], np.uint8)
    order = np.argsort(codes, kind="stable")
    place = order[np.clip(np.searchsorted(codes[order], packed), 0, len(codes) - 1)]
    unknown = codes[place] != packed
    if unknown.any():
        row, column = np.argwhere(unknown)[0]
        r, g, b = (int(value) for value in mask[row, column])
        raise DataError(
            f"{source} has the colour ({r}, {g}, {b}) at (row {row}, column {column}), which is "
            f"not a colour of the {len(table)} classes; "
            f"add it to classes.toml or set ignore = [0x{packed[row, column]:06x}]"
        )
    label: Label = np.take(ids, place)
    return label


def to_color(label: Label, table: ClassTable) -> NDArray[np.uint8]:
    """Paint a label map: ids ``(H, W)`` uint8 -> colours ``(H, W, 3)`` uint8.

    Ids outside the table, and ``IGNORE``, become black.
    """
    return np.take(palette(table), label, axis=0)


def palette(table: ClassTable) -> NDArray[np.uint8]:
    """Return the colours as a look-up table ``(256, 3)`` uint8, black past the last class."""
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(table)] = table.colors
    return colors


def _ranges(values: tuple[int, ...]) -> str:
    """Shorten numbers: ``(0, 1, 2, 5)`` -> ``"0-2, 5"``."""
    parts: list[tuple[int, int]] = []
    for value in sorted(set(values)):
        if parts and value == parts[-1][1] + 1:
            parts[-1] = (parts[-1][0], value)
        else:
            parts.append((value, value))
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)


def read_classes(path: Path) -> ClassTable:
    """Read ``classes.toml``.

    The file has one ``[[class]]`` per class with ``name`` and, optionally, ``value`` (what masks
    store), ``color`` and ``objects`` (true if the class consists of objects that are separated,
    such as cells). ``ignore = [11]`` lists further values that do not count; ``by_color = true``
    says that masks store the colours.

    Raises:
        DataError: the file is not TOML, not a class table, or has an unknown key.
    """
    try:
        content = read_toml(path)
        entries: list[dict[str, Any]] = content["class"]
        if not isinstance(entries, list):
            raise TypeError("class is not a list")
        _check_keys(path, content, ("class", "ignore", "by_color"))
        for entry in entries:
            _check_keys(path, entry, CLASS_KEYS)
        spread = spread_colors(len(entries))
        return ClassTable(
            names=tuple(_name(entry["name"]) for entry in entries),
            colors=tuple(_color(entry.get("color", spread[k])) for k, entry in enumerate(entries)),
            values=tuple(_whole(entry.get("value", k)) for k, entry in enumerate(entries)),
            ignore=tuple(_whole(value) for value in content.get("ignore", ())),
            by_color=_truth(content.get("by_color", False)),
            objects=_objects(entries),
        )
    # A UnicodeDecodeError is a ValueError.
    except (OSError, LookupError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise DataError(
            f"{path} is not a class table ({error}); it needs one [[class]] with a name per class"
        ) from error


def _check_keys(path: Path, given: Iterable[str], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            raise DataError(
                f"{path} has the key {key!r}; known are {', '.join(known)}{suggest(key, known)}"
            )


def _name(value: Any) -> str:
    # A class may be called 5.
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TypeError(f"{shorten(value)} is not a name")
    return str(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{shorten(value)} is not a whole number")
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{shorten(value)} is neither true nor false")
    return value


def _objects(entries: Sequence[dict[str, Any]]) -> tuple[int, ...] | None:
    """Return the classes of objects; None if no class has the key."""
    if not any("objects" in entry for entry in entries):
        return None
    return tuple(k for k, entry in enumerate(entries) if _truth(entry.get("objects", False)))


def _color(parts: Sequence[int]) -> Color:
    r, g, b = (_whole(part) for part in parts)
    return r, g, b


def write_classes(path: Path, table: ClassTable) -> None:
    """Write ``classes.toml``; :func:`read_classes` returns the same table."""
    path.write_text(classes_to_toml(table), "utf-8")


def classes_to_toml(table: ClassTable) -> str:
    """Return the content of ``classes.toml``."""
    import tomli_w

    content: dict[str, Any] = {"ignore": list(table.ignore)}
    if table.by_color:
        content["by_color"] = True
    content["class"] = [
        {"name": _valid_utf8(name), "value": value, "color": list(color)}
        for name, color, value in zip(table.names, table.colors, table.values, strict=True)
    ]
    for k, entry in enumerate(content["class"]):
        if table.objects is not None:
            entry["objects"] = k in table.objects
    return tomli_w.dumps(content)


def _valid_utf8(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _published_table(
    rows: Sequence[tuple[str, Color] | tuple[str, Color, int]], ignore: tuple[int, ...] = ()
) -> ClassTable:
    """Make a table of rows (name, colour) or (name, colour, stored value)."""
    return ClassTable(
        names=tuple(row[0] for row in rows),
        colors=tuple(row[1] for row in rows),
        values=tuple(row[2] if len(row) == 3 else k for k, row in enumerate(rows)),
        ignore=ignore,
    )


# CARLA 0.8's semantic segmentation sensor: names, ids and colours of its documentation.
CARLA = _published_table(
    (
        ("None", (0, 0, 0)),
        ("Buildings", (70, 70, 70)),
        ("Fences", (190, 153, 153)),
        ("Other", (72, 0, 90)),
        ("Pedestrians", (220, 20, 60)),
        ("Poles", (153, 153, 153)),
        ("RoadLines", (157, 234, 50)),
        ("Roads", (128, 64, 128)),
        ("Sidewalks", (244, 35, 232)),
        ("Vegetation", (107, 142, 35)),
        ("Vehicles", (0, 0, 255)),
        ("Walls", (102, 102, 156)),
        ("TrafficSigns", (220, 220, 0)),
    )
)

# CamVid's eleven classes and colours, in the order of SegNet's release; 11 is void.
CAMVID = _published_table(
    (
        ("Sky", (128, 128, 128)),
        ("Building", (128, 0, 0)),
        ("Pole", (192, 192, 128)),
        ("Road", (128, 64, 128)),
        ("Pavement", (60, 40, 222)),
        ("Tree", (128, 128, 0)),
        ("Sign", (192, 128, 128)),
        ("Fence", (64, 64, 128)),
        ("Car", (64, 0, 128)),
        ("Pedestrian", (64, 64, 0)),
        ("Bicyclist", (0, 128, 192)),
    ),
    ignore=(11,),
)

# Cityscapes' nineteen training classes as its ``labelIds`` files store them. The values that its
# benchmark does not count are ignored.
CITYSCAPES = _published_table(
    (
        ("road", (128, 64, 128), 7),
        ("sidewalk", (244, 35, 232), 8),
        ("building", (70, 70, 70), 11),
        ("wall", (102, 102, 156), 12),
        ("fence", (190, 153, 153), 13),
        ("pole", (153, 153, 153), 17),
        ("traffic light", (250, 170, 30), 19),
        ("traffic sign", (220, 220, 0), 20),
        ("vegetation", (107, 142, 35), 21),
        ("terrain", (152, 251, 152), 22),
        ("sky", (70, 130, 180), 23),
        ("person", (220, 20, 60), 24),
        ("rider", (255, 0, 0), 25),
        ("car", (0, 0, 142), 26),
        ("truck", (0, 0, 70), 27),
        ("bus", (0, 60, 100), 28),
        ("train", (0, 80, 100), 31),
        ("motorcycle", (0, 0, 230), 32),
        ("bicycle", (119, 11, 32), 33),
    ),
    ignore=(0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30, 255),
)


def count_pixels(label: Label, num_classes: int) -> NDArray[np.int64]:
    """Return the number of pixels of each class in a label map ``(H, W)``: ``(num_classes,)``.

    Pixels with other ids, such as ``IGNORE``, do not count.

    >>> count_pixels(np.uint8([[1, 1], [0, 255]]), 3).tolist()
    [1, 2, 0]
    """
    import PIL.Image

    # Ten times as fast as bincount, which converts to int64 first. In parts, because other threads
    # wait meanwhile.
    rows = max(1, MAX_COUNTED_PIXELS // label.shape[1])
    parts = [label[top : top + rows] for top in range(0, len(label), rows)]
    counts: NDArray[np.int64] = np.sum(
        [PIL.Image.fromarray(part).histogram() for part in parts], axis=0, dtype=np.int64
    )
    return counts[:num_classes]


def most_probable(logits: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the class with the highest logit at each pixel, the first of equal ones.

    This takes a tenth of the time of ``argmax`` along the first axis.

    Args:
        logits: ``(K, H, W)``.

    Returns:
        Class ids ``(H, W)``.
    """
    if logits[0].size <= MAX_FEW_CALLS_PIXELS:
        ids = np.arange(len(logits), dtype=np.uint8)[:, None, None]
        return np.asarray(np.where(logits == logits.max(0), ids, 255).min(0), np.uint8)
    labels = np.zeros(logits.shape[1:], np.uint8)
    for top in range(0, len(labels), ROWS_AT_A_TIME):
        rows = slice(top, top + ROWS_AT_A_TIME)
        part, best = logits[:, rows], logits[0, rows].copy()
        for k in range(1, len(part)):
            labels[rows][part[k] > best] = k
            np.maximum(best, part[k], out=best)
    return labels


def softmax(logits: NDArray[np.float32], temperature: float = 1.0) -> NDArray[np.float32]:
    """Return each class's probability, ``(K, H, W)`` from logits divided by ``temperature``."""
    probabilities: NDArray[np.float32] = logits - logits.max(0)
    # In place, because the logits of a large image take gigabytes.
    probabilities *= np.float32(1 / temperature)
    np.exp(probabilities, out=probabilities)
    probabilities /= probabilities.sum(0)
    return probabilities


def take_log(probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the logarithm of probabilities, in place."""
    np.maximum(probabilities, np.finfo(np.float32).tiny, out=probabilities)
    return np.log(probabilities, out=probabilities)


def confidence(logits: NDArray[np.float32], temperature: float = 1.0) -> NDArray[np.float32]:
    """Return the probability of the most probable class, ``(H, W)``; less memory than softmax."""
    confident = np.empty(logits.shape[1:], np.float32)
    for top in range(0, len(confident), ROWS_AT_A_TIME):
        part = logits[:, top : top + ROWS_AT_A_TIME]
        best = part.max(0)
        total = np.zeros_like(best)
        for values in part:
            total += np.exp((values - best) * np.float32(1 / temperature))
        confident[top : top + ROWS_AT_A_TIME] = 1 / total
    return confident
