"""Values in a mask file <-> label map: the class table (ids, names, colours, stored values, what to ignore).

Everything downstream of a mask file speaks in class ids 0..K-1 plus ``IGNORE``; what the file itself stores (ids, grey
levels such as 0/255, colours) is known here alone.
"""

from __future__ import annotations

import colorsys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.errors import UsageError, suggest

IGNORE = 255  # the one id in a label that counts neither in the loss nor in a score


Color = tuple[int, int, int]


Label = NDArray[np.uint8]


@dataclass(frozen=True)
class ClassTable:
    """The classes of a data set or a model.

    Args:
        names: ``names[k]`` is the name of class ``k``.
        colors: ``colors[k]`` is its colour in pictures, RGB 0-255.
        values: ``values[k]`` is what a mask file stores for class ``k``; by default ``k`` itself.
        ignore: further values in mask files, which become ``IGNORE``; colours as ``0xRRGGBB`` when ``by_color``.
        by_color: mask files are RGB pictures that store ``colors``, not ids.

    Raises:
        UsageError: no class, more than 255, lists of different lengths, values or colours out of range, or twice the same.
    """

    names: tuple[str, ...]
    colors: tuple[Color, ...] = ()
    values: tuple[int, ...] = ()
    ignore: tuple[int, ...] = ()
    by_color: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.names) <= 255:
            raise UsageError(
                f"a class table has {len(self.names)} classes, but 1 to 255 are possible; check classes.toml"
            )
        if not self.colors:
            object.__setattr__(self, "colors", spread_colors(len(self.names)))
        if not self.values:
            object.__setattr__(self, "values", tuple(range(len(self.names))))
        if not len(self.names) == len(self.colors) == len(self.values):
            raise UsageError(
                f"a class table has {len(self.names)} names, {len(self.colors)} colours and {len(self.values)} values; give one of each per class"
            )
        if any(not 0 <= value < 1 << 16 for value in self.values):
            raise UsageError(
                f"a class table has the values {_ranges(self.values)}; a mask stores whole numbers from 0 to 65535: check classes.toml"
            )
        if any(
            len(color) != 3 or not all(0 <= part <= 255 for part in color) for color in self.colors
        ):
            raise UsageError(
                "a class table has a colour that is not three numbers from 0 to 255; check classes.toml"
            )
        if any(value < 0 for value in self.ignore):
            raise UsageError(
                f"a class table ignores {min(self.ignore)}; mask files store whole numbers of 0 or more: check classes.toml"
            )
        for what, stored in (
            ("colour", self.colors if self.by_color else ()),
            ("value", () if self.by_color else self.values),
        ):
            twice = [item for item in stored if stored.count(item) > 1]
            if twice:
                raise UsageError(
                    f"a class table gives the {what} {twice[0]} to two classes; give each class its own in classes.toml"
                )

    def __len__(self) -> int:
        return len(self.names)


def spread_colors(count: int) -> tuple[Color, ...]:
    """Return ``count`` colours that are told apart easily: black first, then hues a golden angle apart."""
    colors: list[Color] = [(0, 0, 0)]
    for k in range(count - 1):
        rgb = colorsys.hsv_to_rgb(
            (0.02 + k * 0.618034) % 1.0, (0.75, 0.55, 0.9)[k % 3], (0.95, 0.8, 0.65)[k // 3 % 3]
        )
        colors.append((round(rgb[0] * 255), round(rgb[1] * 255), round(rgb[2] * 255)))
    return tuple(colors[:count])


def to_label(mask: NDArray[Any], table: ClassTable, source: str = "mask") -> Label:
    """Turn what a mask file stores into a label map.

    Args:
        mask: stored values ``(H, W)``, whole numbers or booleans, or colours ``(H, W, 3)`` uint8 when ``table.by_color``.
        table: the classes.
        source: the file's name, for the error message.

    Returns:
        Label map ``(H, W)`` uint8: class ids, and ``IGNORE`` where the stored value is in ``table.ignore``.

    Raises:
        UsageError: a value or colour that the table does not have.
    """
    if table.by_color:
        return _from_color(mask, table, source)
    if mask.ndim != 2 or mask.dtype.kind not in "bui":
        raise UsageError(
            f"{source} holds {mask.dtype} values of shape {mask.shape}; a mask holds one band of class ids, whole numbers of 0 or more"
        )
    mask = mask.astype(np.uint8) if mask.dtype == bool else mask
    low, high = int(mask.min(initial=0)), int(mask.max(initial=0))
    if low < 0 or high >= 1 << 16:
        raise UsageError(
            f"{source} has values from {low} to {high}; a mask holds class ids, whole numbers from 0 to 65535"
        )
    known = np.zeros(max(256, high + 1), bool)
    ids = np.full(len(known), IGNORE, np.uint8)
    known[[v for v in table.ignore if v < len(known)]] = True
    for k, value in enumerate(table.values):
        if value < len(known):
            known[value], ids[value] = True, k
    unknown = ~known[mask]
    if unknown.any():
        row, column = np.argwhere(unknown)[0]
        raise UsageError(
            f"{source} has the value {mask[row, column]} at (row {row}, column {column}), but there are {len(table)} classes "
            f"({_ranges(table.values)}{'; ignored: ' + _ranges(table.ignore) if table.ignore else ''}); "
            f"map it in classes.toml or set ignore = [{mask[row, column]}]"
        )
    label: Label = np.take(ids, mask)
    return label


def _from_color(mask: NDArray[Any], table: ClassTable, source: str) -> Label:
    if mask.ndim != 3 or mask.shape[2] != 3:
        raise UsageError(
            f"{source} does not have three bands, but the class table says that masks store colours; set by_color = false in classes.toml"
        )
    packed = mask[..., 0].astype(np.int32) << 16 | mask[..., 1].astype(np.int32) << 8 | mask[..., 2]
    codes = np.array([*(r << 16 | g << 8 | b for r, g, b in table.colors), *table.ignore])
    ids = np.array([*range(len(table)), *(IGNORE for _ in table.ignore)], np.uint8)
    order = np.argsort(codes, kind="stable")
    place = order[np.clip(np.searchsorted(codes[order], packed), 0, len(codes) - 1)]
    unknown = codes[place] != packed
    if unknown.any():
        row, column = np.argwhere(unknown)[0]
        r, g, b = (int(v) for v in mask[row, column])
        raise UsageError(
            f"{source} has the colour ({r}, {g}, {b}) at (row {row}, column {column}), which is none of the {len(table)} classes' colours; "
            f"add it to classes.toml or set ignore = [0x{packed[row, column]:06x}]"
        )
    label: Label = np.take(ids, place)
    return label


def to_color(label: Label, table: ClassTable) -> NDArray[np.uint8]:
    """Paint a label map: ``(H, W)`` uint8 ids -> ``(H, W, 3)`` uint8; ids outside the table (and ``IGNORE``) are black."""
    return np.take(palette(table), label, axis=0)


def palette(table: ClassTable) -> NDArray[np.uint8]:
    """Return the colours as a look-up table ``(256, 3)`` uint8, black past the last class."""
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(table)] = table.colors
    return colors


def _ranges(values: tuple[int, ...]) -> str:
    """``(0, 1, 2, 5)`` -> ``"0-2, 5"``."""
    parts: list[tuple[int, int]] = []
    for value in sorted(set(values)):
        if parts and value == parts[-1][1] + 1:
            parts[-1] = (parts[-1][0], value)
        else:
            parts.append((value, value))
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)


def read_classes(path: Path) -> ClassTable:
    """Read ``classes.toml``.

    It has a list of ``[[class]]`` with ``name`` and, when wanted, ``value`` (what masks store) and ``color``; ``ignore = [11]`` lists further
    values that do not count; ``by_color = true`` says that masks store the colours.

    Raises:
        UsageError: the file is no TOML or no class table, or has a key that is not known.
    """
    try:
        content = tomllib.loads(path.read_text("utf-8"))
        entries: list[dict[str, Any]] = content["class"]
        if not isinstance(entries, list):
            raise TypeError("class is no list")
        for key, known in [(key, ("class", "ignore", "by_color")) for key in content] + [
            (key, _ENTRY) for entry in entries for key in entry
        ]:
            if key not in known:
                raise UsageError(
                    f"{path} has the key {key!r}; known are {', '.join(known)}{suggest(key, known)}"
                )
        spread = spread_colors(len(entries))
        return ClassTable(
            names=tuple(str(entry["name"]) for entry in entries),
            colors=tuple(_color(entry.get("color", spread[k])) for k, entry in enumerate(entries)),
            values=tuple(int(entry.get("value", k)) for k, entry in enumerate(entries)),
            ignore=tuple(int(value) for value in content.get("ignore", ())),
            by_color=bool(content.get("by_color", False)),
        )
    except (
        OSError,
        UnicodeDecodeError,
        tomllib.TOMLDecodeError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:
        raise UsageError(
            f"{path} is not a class table ({error}); it needs one [[class]] with a name per class"
        ) from error


def _color(parts: Sequence[int]) -> Color:
    r, g, b = (int(part) for part in parts)
    return r, g, b


def write_classes(path: Path, table: ClassTable) -> None:
    """Write ``classes.toml``; :func:`read_classes` gives the same table back."""
    import tomli_w

    content: dict[str, Any] = {"ignore": list(table.ignore)}
    if table.by_color:
        content["by_color"] = True
    content["class"] = [
        {"name": name, "value": value, "color": list(color)}
        for name, color, value in zip(table.names, table.colors, table.values, strict=True)
    ]
    path.write_text(tomli_w.dumps(content), "utf-8")


_ENTRY = ("name", "value", "color")


# CARLA 0.8's semantic segmentation sensor: names, ids and colours of its documentation.
CARLA = ClassTable(
    names=(
        "None", "Buildings", "Fences", "Other", "Pedestrians", "Poles", "RoadLines",
        "Roads", "Sidewalks", "Vegetation", "Vehicles", "Walls", "TrafficSigns",
    ),
    colors=(
        (0, 0, 0), (70, 70, 70), (190, 153, 153), (72, 0, 90), (220, 20, 60), (153, 153, 153), (157, 234, 50),
        (128, 64, 128), (244, 35, 232), (107, 142, 35), (0, 0, 255), (102, 102, 156), (220, 220, 0),
    ),
)  # fmt: skip


# CamVid's eleven classes and colours as SegNet's release orders them; 11 is void.
CAMVID = ClassTable(
    names=("Sky", "Building", "Pole", "Road", "Pavement", "Tree", "Sign", "Fence", "Car", "Pedestrian", "Bicyclist"),
    colors=(
        (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
        (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
    ),
    ignore=(11,),
)  # fmt: skip


# Cityscapes' nineteen training classes as its ``labelIds`` files store them; what the benchmark does not count is ignored.
CITYSCAPES = ClassTable(
    names=(
        "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
        "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
    ),
    colors=(
        (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30), (220, 220, 0),
        (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100),
        (0, 0, 230), (119, 11, 32),
    ),
    values=(7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33),
    ignore=(0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30, 255),
)  # fmt: skip


_ROWS = 64  # of an image at a time, which stay in the processor's cache


def most_probable(logits: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the class with the highest logit at each pixel, ``(H, W)`` uint8 from ``(K, H, W)``; of equals the first.

    It takes a tenth of the time of ``argmax`` along the first axis.
    """
    labels = np.zeros(logits.shape[1:], np.uint8)
    for top in range(0, len(labels), _ROWS):
        part, best = logits[:, top : top + _ROWS], logits[0, top : top + _ROWS].copy()
        for k in range(1, len(part)):
            labels[top : top + _ROWS][part[k] > best] = k
            np.maximum(best, part[k], out=best)
    return labels


def softmax(logits: NDArray[np.float32], temperature: float = 1.0) -> NDArray[np.float32]:
    """Return the probability of each class at each pixel, ``(K, H, W)`` from logits divided by ``temperature``."""
    probabilities: NDArray[np.float32] = np.exp(
        (logits - logits.max(0)) * np.float32(1 / temperature)
    )
    probabilities /= probabilities.sum(0)
    return probabilities


def confidence(logits: NDArray[np.float32], temperature: float = 1.0) -> NDArray[np.float32]:
    """Return the probability of the most probable class at each pixel, ``(H, W)``, without keeping the others."""
    confident = np.empty(logits.shape[1:], np.float32)
    for top in range(0, len(confident), _ROWS):
        part = logits[:, top : top + _ROWS]
        best = part.max(0)
        total = np.zeros_like(best)
        for values in part:
            total += np.exp((values - best) * np.float32(1 / temperature))
        confident[top : top + _ROWS] = 1 / total
    return confident
