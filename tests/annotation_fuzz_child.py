"""Run: python annotation_fuzz_child.py FOLDER COUNT SEED [plant].

Damages annotation files and reads them.

Numbers, names and structure of every format are changed. Reading must end in label maps of the
images' size or in a UsageError, within ``SECONDS`` and ``MOST_MEGABYTES`` of further memory; what
does not is printed, with its file. ``plant`` makes reading take memory, which must be printed.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import signal
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

from made_annotations import BOX, CORNERS, coco, cvat, labelme, png, write_file, write_photo, yolo
from made_strangers_tools import TOOLS

from useg.data.dataset import read_label, read_pair_size
from useg.data.layouts import find_dataset
from useg.errors import UsageError

SECONDS = 10
MOST_MEGABYTES = 256

NUMBERS = (0, -1, 1, 3, 255, 256, 65_536, 2**31, 2**32 + 1, 10**9, 10**18, 10**400, -(10**9))
OTHERS = (
    *(None, True, "", "x", "\x1b[31m", "a" * 5000, [], {}, [[]], [1], [[1, 2]], {"a": 1}, 0.5),
    *(1e300, float("nan"), float("inf"), "nan", "1e999", "9" * 5000),
)


def small_coco(root: Path) -> None:
    write_photo(root / "a.jpg")
    runs = {"size": [10, 12], "counts": [21, 4, 6, 89]}
    more = {"size": [10, 12], "counts": "e04Fl2"}
    shapes = (
        {"category_id": 3, "segmentation": [BOX]},
        {"category_id": 90, "segmentation": runs},
        {"category_id": 90, "segmentation": more, "iscrowd": 1},
    )
    write_file(root / "x.json", coco(*shapes))


def small_labelme(root: Path) -> None:
    import numpy as np

    write_photo(root / "a.jpg")
    kinds = ("polygon", "rectangle", "circle", "line", "linestrip", "point", "rotation")
    shapes = [{"points": CORNERS[: 2 if k in (1, 2, 3) else 4], "shape_type": kind}
              for k, kind in enumerate(kinds)]  # fmt: skip
    shapes.append({"points": CORNERS[::2], "shape_type": "mask", "mask": png(np.eye(4))})
    write_file(root / "a.json", labelme(*shapes))


def small_cvat(root: Path) -> None:
    write_photo(root / "a.jpg")
    drawn = (
        '<polygon label="car" points="1,1;6,1;6,5" z_order="1"/>'
        '<polyline label="car" points="1,1;6,5"/><box label="car" xtl="1" ytl="1" xbr="6" ybr="5" '
        'rotation="9"/><ellipse label="line" cx="5" cy="5" rx="3" ry="2"/>'
        '<mask label="car" rle="1, 2, 0, 3" left="8" top="1" width="3" height="2"/>'
        '<cuboid label="car" xtl1="1" ytl1="1" xbl1="1" ybl1="5" xtr1="5" ytr1="1" xbr1="5" '
        'ybr1="5" xtl2="2" ytl2="2" xbl2="2" ybl2="6" xtr2="6" ytr2="2" xbr2="6" ybr2="6"/>'
    )
    write_file(root / "a.xml", cvat(drawn))


def small_yolo(root: Path) -> None:
    yolo(root)


MAKERS: dict[str, Callable[[Path], Any]] = {
    "coco": small_coco,
    "labelme, all shapes": small_labelme,
    "cvat": small_cvat,
    "yolo": small_yolo,
    **TOOLS,
}


def damage_json(value: Any, dice: random.Random) -> Any:
    """Change one place of a JSON value."""
    if isinstance(value, dict | list) and value and dice.random() < 0.93:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = dice.choice(list(keys))
        if dice.random() < 0.05:
            del value[key]
        elif isinstance(value, list) and dice.random() < 0.03:
            value[:] = value * 50
        else:
            value[key] = damage_json(value[key], dice)
        return value
    if dice.random() < 0.03:
        nested: Any = []
        for _ in range(dice.choice((10, 50_000))):
            nested = [nested]
        return nested
    return copy.deepcopy(dice.choice(NUMBERS if dice.random() < 0.6 else OTHERS))


def damage_xml(text: str, dice: random.Random) -> str:
    """Change an attribute, a name, or the order of elements."""
    root = ET.fromstring(text)
    element = dice.choice(list(root.iter()))
    if element.attrib and dice.random() < 0.8:
        name = dice.choice(list(element.attrib))
        numbers = [str(dice.choice(NUMBERS)) for _ in range(dice.randint(1, 4))]
        element.set(name, dice.choice((",", ";", ", ")).join(numbers))
    elif dice.random() < 0.5:
        element.tag = dice.choice(("image", "mask", "track", "x", "labels", "label"))
    else:
        element.extend(list(element) * dice.choice((1, 100)))
    return ET.tostring(root, "unicode")


def damage_text(text: str, dice: random.Random) -> str:
    """Change words and characters."""
    words = text.split(" ")
    for _ in range(dice.randint(1, 3)):
        words[dice.randrange(len(words))] = str(dice.choice((*NUMBERS, "nan", "", "\n", "x")))[:300]
    return " ".join(words)


def damage(path: Path, dice: random.Random) -> None:
    """Damage a file: its content, or its bytes."""
    content = path.read_bytes()
    if dice.random() < 0.15:
        place = dice.randrange(len(content))
        flipped = bytes([dice.randrange(256)])
        path.write_bytes(content[:place] + flipped + content[place + dice.choice((0, 1, 50)) :])
        return
    text = content.decode()
    if path.suffix == ".json":
        value = json.loads(text)
        for _ in range(dice.randint(1, 3)):
            value = damage_json(value, dice)
        text = dump(value)
    elif path.suffix == ".xml":
        text = damage_xml(text, dice)
    else:
        text = damage_text(text, dice)
    path.write_text(text, "utf-8")


def dump(value: Any) -> str:
    """Write JSON, also what is nested too deeply for the json module."""
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value)
    except RecursionError:
        return "[" * 50_000 + "]" * 50_000


def read_all(root: Path) -> None:
    """Read a data set; its label maps must have the size of its images."""
    dataset = find_dataset(root)
    for pair in dataset.pairs:
        width, height = read_pair_size(pair)
        assert read_label(pair, dataset).shape == (height, width)


def used_megabytes() -> int:
    """The most memory that this process has used; its parent's does not count."""
    status = Path("/proc/self/status").read_text("utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


def main(folder: Path, count: int, seed: int, plant: bool) -> None:
    """Damage ``count`` data sets."""
    masters = {}
    for name, make in MAKERS.items():
        masters[name] = folder / "masters" / name.replace(" ", "_").replace(",", "")
        make(masters[name])
        read_all(masters[name])
    limit = sys.get_int_max_str_digits()
    began = used_megabytes()
    for number in range(count):
        dice = random.Random(seed + number)
        name = list(masters)[number % len(masters)]
        root = folder / "damaged"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(masters[name], root)
        suffixes = (".json", ".xml", ".txt", ".csv", ".yaml")
        files = sorted(path for path in root.rglob("*") if path.suffix in suffixes)
        damage(dice.choice(files), dice)
        sys.set_int_max_str_digits(limit)
        signal.alarm(SECONDS)
        try:
            leak = b"x" * (2 * MOST_MEGABYTES << 20) if plant else b""
            del leak
            read_all(root)
        except UsageError:
            pass
        except BaseException as error:
            print(f"seed {seed + number} ({name}): {type(error).__name__}: {error}"[:300])
        signal.alarm(0)
        if used_megabytes() > began + MOST_MEGABYTES:
            print(f"seed {seed + number} ({name}): {used_megabytes() - began} MB")
            began = used_megabytes()
    print(f"read {count}")


def _is_late(*_: object) -> None:
    raise TimeoutError(f"took more than {SECONDS} s")


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, _is_late)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), "plant" in sys.argv)
