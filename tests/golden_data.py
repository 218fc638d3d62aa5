"""Made data sets in several layouts, for ``test_golden.py``. Uses useg's command line alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import tifffile
from golden_store import cli

WORDS = [
    "ash", "beech", "cedar", "daisy", "elm", "fir", "grape", "hazel",
    "iris", "jasmine", "kale", "lilac", "maple", "nettle", "oak", "pine",
    "quince", "rose", "sage", "thyme", "umber", "violet", "willow", "yew",
]  # fmt: skip
COLORS = np.array([(0, 0, 0), (200, 40, 40), (40, 160, 60), (40, 80, 220)], np.uint8)
_MERGED = np.array([0, 1, 1, 9, 9, 9, 2, 2, 2, 3, 4, 1, 9], np.uint8)  # of the scenes' classes


def scenes(folder: Path, count: int = 12, size: str = "96x72", seed: int = 2) -> Path:
    """Street scenes as the command makes them."""
    assert (
        cli("--quiet", "scenes", folder, "--count", count, "--size", size, "--seed", seed)[0] == 0
    )
    return folder


def pixels_of(path: Path) -> np.ndarray:
    """Decode a picture; of a palette file the ids."""
    if path.suffix == ".tif":
        return np.asarray(tifffile.imread(path))
    with PIL.Image.open(path) as opened:
        return np.array(opened)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        tifffile.imwrite(path, pixels)
    else:
        PIL.Image.fromarray(pixels).save(path)


def shapes(seed: int, size: tuple[int, int] = (64, 48), classes: int = 3) -> np.ndarray:
    """A label map ``(H, W)`` uint8 of discs on ground."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[1], : size[0]]
    label = np.zeros(size[::-1], np.uint8)
    for k in range(1, classes):
        for _ in range(2):
            center = rng.integers(0, size[0]), rng.integers(0, size[1])
            label[(x - center[0]) ** 2 + (y - center[1]) ** 2 < int(rng.integers(30, 120))] = k
    return label


def looks(label: np.ndarray, seed: int) -> np.ndarray:
    """A colour picture ``(H, W, 3)`` uint8 of a label map, with noise."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 60, (*label.shape, 3), np.uint8)
    return np.asarray(COLORS[label] // 2 + 60 + noise, np.uint8)


def film(folder: Path) -> Path:
    """Forty numbered frames in which discs move, in two folders."""
    label = shapes(1, (64, 48))
    for k in range(40):
        frame = np.roll(label, k, 1)
        save(folder / "images" / f"frame_{k:04}.png", looks(frame, k))
        save(folder / "masks" / f"frame_{k:04}.png", frame)
    return folder


def patients(folder: Path) -> Path:
    """Three slices of each of eight patients: 16-bit grey TIFFs and masks of 0 and 255, square."""
    for k in range(24):
        label = shapes(100 + k, (48, 48), 2)
        rng = np.random.default_rng(k)
        image = label.astype(np.uint16) * 9000 + rng.integers(500, 6000, label.shape, np.uint16)
        save(folder / "images" / f"P{k // 3:02}_slice{k % 3}.tif", image)
        save(folder / "masks" / f"P{k // 3:02}_slice{k % 3}.png", label * 255)
    return folder


def words(folder: Path) -> Path:
    """Unrelated pictures with masks in colours; one class is in few of them."""
    for k, word in enumerate(WORDS):
        label = shapes(200 + k, (64, 64), 4 if k % 6 == 0 else 3)
        save(folder / f"{word}.png", looks(label, 200 + k))
        save(folder / f"{word}_mask.png", COLORS[label])
    names = ("ground", "red", "green", "blue")
    entries = zip(names, COLORS.tolist(), strict=True)
    table = "".join(f'[[class]]\nname = "{name}"\ncolor = {color}\n\n' for name, color in entries)
    (folder / "classes.toml").write_text(f"by_color = true\n\n{table}")
    return folder


def official(folder: Path) -> Path:
    """Folders train and val, palette masks of ids 0 to 2, with 255 along an edge."""
    for k in range(14):
        label = shapes(300 + k)
        label[:, -2:] = 255
        part = "train" if k < 10 else "val"
        save(folder / part / "images" / f"{WORDS[k]}.png", looks(np.minimum(label, 3), 300 + k))
        mask = PIL.Image.fromarray(label)
        mask.putpalette(np.resize(COLORS, (256, 3)).tobytes())
        (folder / part / "masks").mkdir(parents=True, exist_ok=True)
        mask.save(folder / part / "masks" / f"{WORDS[k]}.png")
    return folder


def outlines(folder: Path) -> Path:
    """COCO's annotation file: rectangles and triangles as polygons."""
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for k in range(12):
        label = np.zeros((48, 64), np.uint8)
        left, top = 4 + 3 * k, 5 + k
        label[top : top + 14, left : left + 18] = 1
        save(folder / "images" / f"{WORDS[k]}.png", looks(label, 400 + k))
        images.append({"id": k, "file_name": f"{WORDS[k]}.png", "width": 64, "height": 48})
        square = [left, top, left + 18, top, left + 18, top + 14, left, top + 14]
        triangle = [2, 40, 12 + k, 30, 22, 46]
        for kind, ring in ((1, square), (2, triangle)):
            entry = {
                "id": len(annotations),
                "image_id": k,
                "category_id": kind,
                "segmentation": [ring],
                "iscrowd": 0,
            }
            annotations.append({**entry, "area": 1, "bbox": [0, 0, 1, 1]})
    categories = [{"id": 1, "name": "box"}, {"id": 2, "name": "wedge"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


LAYOUTS = {
    "scenes": scenes,
    "film": film,
    "patients": patients,
    "words": words,
    "official": official,
    "outlines": outlines,
}


def planted(folder: Path) -> Path:
    """Street scenes of five classes, with one defect each in thirteen of them."""
    source = scenes(folder.parent / f"{folder.name}_source", 24, "128x96", 11)
    images, masks = (sorted((source / part).glob("*.png")) for part in ("CameraRGB", "CameraSeg"))
    for word, image, mask in zip(WORDS, images, masks, strict=True):
        ids = pixels_of(mask)
        save(folder / "images" / f"{word}.png", pixels_of(image))
        save(folder / "masks" / f"{word}.png", _MERGED[ids[..., 0] if ids.ndim == 3 else ids])
    names = ("sky", "building", "ground", "green", "vehicle")
    (folder / "classes.toml").write_text(
        "ignore = [9]\n\n" + "".join(f'[[class]]\nname = "{name}"\n\n' for name in names)
    )

    def changed(word: str, change: object, part: str = "masks") -> None:
        path = folder / part / f"{word}.png"
        save(path, np.ascontiguousarray(change(pixels_of(path))))  # type: ignore[operator]

    (folder / "masks" / "ash.png").unlink()
    (folder / "images" / "beech.png").unlink()
    whole = (folder / "images" / "cedar.png").read_bytes()
    (folder / "images" / "cedar.png").write_bytes(whole[: len(whole) // 2])
    (folder / "masks" / "daisy.png").write_bytes(b"")
    changed("elm", lambda mask: mask[:-7])
    changed("fir", lambda mask: np.rot90(mask))
    changed("grape", lambda mask: mask[:, ::-1])
    changed(
        "hazel",
        lambda mask: np.where(np.add.outer(np.arange(96), np.arange(128)) < 30, 17, mask).astype(
            np.uint8
        ),
    )
    changed("iris", np.zeros_like)
    changed("jasmine", np.zeros_like, "images")
    changed("kale", lambda mask: np.roll(mask, (6, 9), (0, 1)))
    for part in ("images", "masks"):
        save(folder / part / "copy.png", pixels_of(folder / part / "lilac.png"))
    changed(
        "oak",
        lambda mask: np.where(np.random.default_rng(0).random(mask.shape) < 0.02, 4, mask).astype(
            np.uint8
        ),
    )
    return folder
