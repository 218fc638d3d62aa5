"""Made annotation files of each tool, in their published structure, and how tests read them."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import PIL.Image

from useg.data.dataset import Dataset, read_sample

SIZE = (12, 10)


BOX = [2, 1, 6, 1, 6, 5, 2, 5]  # 4 x 4 pixels from row 1, column 2


def write_photo(path: Path, size: tuple[int, int] = SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full((size[1], size[0], 3), 90, np.uint8)).save(path)
    return path


def write_file(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def read_first_label(dataset: Dataset, k: int = 0) -> np.ndarray:
    return read_sample(dataset.pairs[k], dataset).label


def images_and_splits(dataset: Dataset) -> list[tuple[str, str]]:
    return [(pair.image.relative_to(dataset.root).as_posix(), pair.split) for pair in dataset.pairs]


def expect_block(
    value: int,
    top: int = 1,
    left: int = 2,
    bottom: int = 5,
    right: int = 6,
    size: tuple[int, int] = SIZE,
) -> np.ndarray:
    expected = np.zeros((size[1], size[0]), np.uint8)
    expected[top:bottom, left:right] = value
    return expected


def coco_compress(lengths: list[int]) -> str:
    """COCO's ``rleToString``."""
    text = ""
    for k, length in enumerate(lengths):
        value = length - (lengths[k - 2] if k > 2 else 0)
        while True:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text += chr(bits + 32 * more + 48)
            if not more:
                break
    return text


def coco(
    *annotations: dict[str, object], names: tuple[str, ...] = ("a.jpg",), **more: object
) -> dict[str, object]:
    return {
        "info": {"year": 2017},
        "licenses": [],
        "images": [
            {"id": 7 + k, "file_name": name, "width": SIZE[0], "height": SIZE[1]}
            for k, name in enumerate(names)
        ],
        "annotations": [
            {"id": k, "image_id": 7, "iscrowd": 0, "bbox": [0, 0, 1, 1], "area": 1.0, **each}
            for k, each in enumerate(annotations)
        ],
        "categories": [
            {"id": 90, "name": "toothbrush", "supercategory": "indoor"},
            {"id": 3, "name": "car", "supercategory": "vehicle"},
        ],
        **more,
    }


def labelme(*shapes: dict[str, object], image: str = "a.jpg", **more: object) -> dict[str, object]:
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": [
            {
                "label": "cat",
                "group_id": None,
                "description": "",
                "shape_type": "polygon",
                "flags": {},
                "mask": None,
                **shape,
            }
            for shape in shapes
        ],
        "imagePath": image,
        "imageData": None,
        "imageHeight": SIZE[1],
        "imageWidth": SIZE[0],
        **more,
    }


CORNERS = [[2, 1], [6, 1], [6, 5], [2, 5]]


def png(mask: np.ndarray) -> str:
    target = io.BytesIO()
    PIL.Image.fromarray(mask.astype(np.uint8)).save(target, "PNG")
    return base64.b64encode(target.getvalue()).decode()


def cvat(shapes: str, *, name: str = "a.jpg", more: str = "", size: tuple[int, int] = SIZE) -> str:
    return f"""<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta>
    <task>
      <id>4</id><name>segmentation</name><size>1</size><mode>annotation</mode>
      <labels>
        <label>
          <name>car</name><color>#33ddff</color><type>any</type><attributes></attributes>
        </label>
        <label>
          <name>line</name><color>#fa3253</color><type>any</type><attributes></attributes>
        </label>
        <label>
          <name>knee</name><type>points</type><attributes></attributes><parent>body</parent>
        </label>
      </labels>
    </task>
  </meta>
  <image id="0" name="{name}" width="{size[0]}" height="{size[1]}">{shapes}
    <tag label="good_frame" source="manual"></tag>
  </image>
  {more}
</annotations>"""


OUTLINE = "0.25 0.1 0.75 0.1 0.75 0.5 0.25 0.5"  # columns 3 to 9, rows 1 to 5


def yolo(
    root: Path, line: str = f"1 {OUTLINE}", yaml: str = "names:\n  0: cat\n  1: dog\n"
) -> Path:
    for split in ("train", "val"):
        write_photo(root / "images" / split / "a.jpg")
        write_file(root / "labels" / split / "a.txt", line + "\n")
    write_file(
        root / "data.yaml",
        f"path: ../elsewhere # the root\ntrain: images/train\nval: images/val\n\n{yaml}\nnc: 2\n",
    )
    return root
