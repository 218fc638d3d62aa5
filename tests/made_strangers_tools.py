"""Made exports of annotation tools, each of the same yards (:func:`made_strangers.yard`).

Every function writes a data set of ``NUM_YARDS`` pictures into a folder as one tool exports it; its
truth is :func:`expected`. Structures follow the tools' own documentation.
"""

from __future__ import annotations

import base64
import io
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from made_strangers import HEIGHT, NAMES, WIDTH, save, yard

from useg.data.annotations.platforms import encode_brush_rle

NUM_YARDS = 3

# Classes that are drawn as masks, and the rectangle that every picture has as an outline.
HOUSE, BALL = 1, 3
LAWN = (0, HEIGHT - 6, WIDTH, HEIGHT)


def expected(k: int) -> np.ndarray:
    """The label map ``(H, W)`` of a yard by the names ``background, ball, house, lawn``."""
    _, label = yard(k)
    truth = np.zeros_like(label)
    left, top, right, bottom = LAWN
    truth[top:bottom, left:right] = 3
    truth[label == HOUSE] = 2
    truth[label == BALL] = 1
    return truth


def write_file(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def png(pixels: np.ndarray) -> bytes:
    target = io.BytesIO()
    PIL.Image.fromarray(pixels).save(target, "PNG")
    return target.getvalue()


def crop(mask: np.ndarray) -> tuple[list[int], np.ndarray]:
    """The place ``[x, y]`` of what a mask covers, and the smallest mask of it."""
    rows, columns = np.nonzero(mask)
    top, left = int(rows.min()), int(columns.min())
    return [left, top], mask[top : rows.max() + 1, left : columns.max() + 1]


def masks(k: int) -> list[tuple[str, np.ndarray]]:
    """The masks of a yard that are drawn over its lawn, from below."""
    return [(NAMES[value], yard(k)[1] == value) for value in (HOUSE, BALL)]


def supervisely(root: Path) -> None:
    classes = [
        {"title": name, "shape": shape, "color": "#967B46"}
        for name, shape in (("ball", "bitmap"), ("house", "bitmap"), ("lawn", "rectangle"))
    ]
    write_file(root / "meta.json", {"classes": classes, "tags": [], "projectType": "images"})
    left, top, right, bottom = LAWN
    for k in range(NUM_YARDS):
        save(root / "ds" / "img" / f"y_{k}.png", yard(k)[0])
        corners = [[left, top], [right - 1, bottom - 1]]
        objects: list[dict[str, Any]] = [
            {
                "classTitle": "lawn",
                "geometryType": "rectangle",
                "points": {"exterior": corners, "interior": []},
            }
        ]
        for name, mask in masks(k):
            place, cut = crop(mask)
            rgba = np.dstack([cut * np.uint8(255)] * 4)
            content = base64.b64encode(zlib.compress(png(rgba))).decode()
            bitmap = {"origin": place, "data": content}
            objects.append({"classTitle": name, "geometryType": "bitmap", "bitmap": bitmap})
        size = {"height": HEIGHT, "width": WIDTH}
        content = {"description": "", "tags": [], "size": size, "objects": objects}
        write_file(root / "ds" / "ann" / f"y_{k}.png.json", content)


def _studio_regions(k: int, kind: str) -> list[dict[str, Any]]:
    left, top, right, bottom = LAWN
    whole = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0}
    lawn = {
        "x": 100 * left / WIDTH,
        "y": 100 * top / HEIGHT,
        "width": 100 * (right - left) / WIDTH,
        "height": 100 * (bottom - top) / HEIGHT,
        "rotation": 0,
        "rectanglelabels": ["lawn"],
    }
    regions = [{**whole, "id": "l", "type": "rectanglelabels", "value": lawn}]
    for name, mask in masks(k):
        value: dict[str, object]
        if kind == "bitmask":
            rgba = np.dstack([np.zeros((HEIGHT, WIDTH, 3), np.uint8), mask * np.uint8(255)])
            url = "data:image/png;base64," + base64.b64encode(png(rgba)).decode()
            value = {"imageDataURL": url, "bitmasklabels": [name]}
        else:
            value = {"format": "rle", "rle": encode_brush_rle(mask), "brushlabels": [name]}
        regions.append({**whole, "id": name, "type": f"{kind}labels", "value": value})
    return regions


def label_studio(root: Path, kind: str = "brush") -> None:
    tasks = []
    for k in range(NUM_YARDS):
        save(root / "images" / f"0a1b2c3{k}-y {k}.png", yard(k)[0])
        old = {"id": 1, "result": [], "updated_at": "2026-01-01T00:00:00Z", "was_cancelled": True}
        own = {"id": 2, "result": _studio_regions(k, kind), "updated_at": "2026-01-02T00:00:00Z"}
        data = {"image": f"/data/upload/3/0a1b2c3{k}-y%20{k}.png"}
        tasks.append({"id": k + 7, "data": data, "annotations": [own, old], "predictions": []})
    write_file(root / "project-3-at-2026-01-05.json", tasks)


def label_studio_bitmask(root: Path) -> None:
    label_studio(root, "bitmask")


def label_studio_minimal(root: Path) -> None:
    tasks = []
    for k in range(NUM_YARDS):
        # In local storage, and without the prefix of uploads.
        save(root / f"y_{k}.png", yard(k)[0])
        values = [
            {**region["value"], "original_width": WIDTH, "original_height": HEIGHT}
            for region in _studio_regions(k, "brush")
        ]
        about = {"id": k + 7, "annotator": 1, "annotation_id": 3, "lead_time": 9.5}
        image = f"/data/local-files/?d=yards/y_{k}.png"
        tasks.append({"image": image, "label": values[:1], "tag": values[1:], **about})
    write_file(root / "min.json", tasks)


def label_studio_masks(root: Path) -> None:
    tasks = []
    for k in range(NUM_YARDS):
        save(root / "images" / f"0a1b2c3{k}-y_{k}.png", yard(k)[0])
        lawn = np.zeros((HEIGHT, WIDTH), bool)
        lawn[LAWN[1] :] = True
        # By name, ball lies below house: so the masks must not overlap.
        drawn = [*masks(k), ("lawn", lawn & ~(masks(k)[0][1] | masks(k)[1][1]))]
        for name, mask in drawn:
            file = f"task-{k + 40}-annotation-{k + 7}-by-1-tag-{name}-0.png"
            save(root / "masks" / file, mask * np.uint8(255))
        data = {"image": f"/data/upload/1/0a1b2c3{k}-y_{k}.png"}
        tasks.append({"id": k + 40, "data": data, "annotations": [{"id": k + 7, "result": []}]})
    write_file(root / "project.json", tasks)


def _columns(mask: np.ndarray) -> list[tuple[int, int, int, int]]:
    """The upright runs of a mask: x, y, width, height."""
    found = []
    for x in range(mask.shape[1]):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask[:, x].astype(int), [0]])))
        found += [(x, int(a), 1, int(b - a)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return found


def _boxes(k: int) -> list[tuple[str, tuple[int, int, int, int]]]:
    left, top, right, bottom = LAWN
    drawn = [("lawn", (left, top, right - left, bottom - top))]
    return drawn + [(name, box) for name, mask in masks(k) for box in _columns(mask)]


def _via_region(name: str, box: tuple[int, int, int, int], number: int) -> dict[str, Any]:
    x, y, width, height = box
    shape: dict[str, Any] = {"name": "rect", "x": x, "y": y, "width": width, "height": height}
    if number % 2:
        columns, rows = [x, x + width, x + width, x], [y, y, y + height, y + height]
        shape = {"name": "polygon", "all_points_x": columns, "all_points_y": rows}
    return {"shape_attributes": shape, "region_attributes": {"thing": name, "note": ""}}


def via(root: Path, version: int = 2) -> None:
    content = {}
    for k in range(NUM_YARDS):
        save(root / f"y_{k}.png", yard(k)[0])
        regions: Any = [_via_region(*item, n) for n, item in enumerate(_boxes(k))]
        if version == 1:
            regions = {str(n): region for n, region in enumerate(regions)}
        content[f"y_{k}.png99"] = {"filename": f"y_{k}.png", "size": 99, "regions": regions}
    project = {"_via_settings": {}, "_via_img_metadata": content, "_via_attributes": {}}
    write_file(root / "via_region_data.json", content if version == 1 else project)


def via_1(root: Path) -> None:
    via(root, 1)


def via_3(root: Path) -> None:
    files, views, metadata = {}, {}, {}
    for k in range(NUM_YARDS):
        save(root / f"y_{k}.png", yard(k)[0])
        files[str(k + 1)] = {"fid": str(k + 1), "fname": f"y_{k}.png", "type": 2, "loc": 1}
        views[str(k + 1)] = {"fid_list": [str(k + 1)]}
        for n, (name, box) in enumerate(_boxes(k)):
            option = str(NAMES.index(name))
            about = {"vid": str(k + 1), "flg": 0, "z": [], "xy": [2, *box], "av": {"1": option}}
            metadata[f"{k + 1}_{n}"] = about
    options = {str(n): name for n, name in enumerate(NAMES)}
    attribute = {"1": {"aname": "thing", "type": 4, "options": options}}
    shared = {"config": {}, "attribute": attribute, "file": files, "view": views}
    write_file(root / "via3.json", {"project": {"pid": "x"}, "metadata": metadata, **shared})


def via_csv(root: Path) -> None:
    lines = [
        "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,"
        "region_attributes"
    ]
    for k in range(NUM_YARDS):
        save(root / f"y_{k}.png", yard(k)[0])
        for n, item in enumerate(_boxes(k)):
            region = _via_region(*item, n)
            cells = [json.dumps(region[f"{part}_attributes"]) for part in ("shape", "region")]
            quoted = ['"' + cell.replace('"', '""') + '"' for cell in cells]
            lines.append(f'y_{k}.png,99,"{{}}",1,{n},{quoted[0]},{quoted[1]}')
    write_file(root / "via.csv", "\n".join(lines) + "\n")


def labelme(root: Path) -> None:
    """As X-AnyLabeling and new versions of LabelMe write it: rectangles have all four corners."""
    for k in range(NUM_YARDS):
        save(root / f"y_{k}.png", yard(k)[0])
        shapes = []
        kinds = ("rectangle", "rotation", "oriented_rectangle", "polygon")
        for n, (name, (x, y, width, height)) in enumerate(_boxes(k)):
            corners = [[x, y], [x + width, y], [x + width, y + height], [x, y + height]]
            shapes.append({"label": name, "shape_type": kinds[n % 4], "points": corners})
        size = {"imageHeight": HEIGHT, "imageWidth": WIDTH}
        write_file(root / f"y_{k}.json", {"shapes": shapes, "imagePath": f"y_{k}.png", **size})


TOOLS = {
    "supervisely": supervisely,
    "label studio, brush": label_studio,
    "label studio, bitmask": label_studio_bitmask,
    "label studio, minimal": label_studio_minimal,
    "label studio, masks": label_studio_masks,
    "via 1": via_1,
    "via 2": via,
    "via 3": via_3,
    "via, csv": via_csv,
    "labelme, four corners": labelme,
}
