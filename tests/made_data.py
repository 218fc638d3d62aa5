"""Data sets that tests make: names without files, and images that are near duplicates or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import tifffile

from useg.classes import CARLA, ClassTable
from useg.data.cache import Samples, build_cache
from useg.data.dataset import Dataset, Pair
from useg.data.roles import NamedFiles
from useg.images.image_files import list_image_files
from useg.models.geometry import WorkingSize

# Names that show neither groups nor an order.
WORDS = [
    *("ash", "beech", "cedar", "daisy", "elm", "fir", "grape", "hazel", "iris", "jasmine"),
    *("kale", "lilac", "maple", "nettle", "oak", "pine", "quince", "rose", "sage", "thyme"),
]


def dataset_of_names(*names: str, splits: dict[str, str] | None = None) -> Dataset:
    """A data set whose files need not exist, with some official splits."""
    root = Path("/data")
    pairs = (
        Pair(
            root / "images" / f"{name}.png",
            root / "masks" / f"{name}.png",
            (splits or {}).get(name, ""),
        )
        for name in names
    )
    return Dataset(root, "folders", tuple(pairs), CARLA)


def film_names(count: int, prefix: str = "", step: int = 1) -> list[str]:
    """Numbered names, as the frames of a film have them."""
    return [f"{prefix}{k * step:04}" for k in range(count)]


def splits_of(dataset: Dataset) -> list[str]:
    return [pair.split for pair in dataset.pairs]


def blob_image(seed: int, cells: int = 12) -> np.ndarray:
    """Blobs of 8 pixels, ``(64, 8 * cells, 3)``; images of different seeds are no duplicates."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, cells, 3), np.uint8)
    large = PIL.Image.fromarray(coarse).resize((8 * cells, 64), PIL.Image.Resampling.BICUBIC)
    return np.asarray(large)


def write_blob_dataset(folder: Path) -> Dataset:
    """Write 20 images under ``WORDS``: ``kale`` is a copy of ``ash``; three have a rare class."""
    pairs = []
    for k, name in enumerate(WORDS):
        pairs.append(Pair(folder / f"{name}.png", folder / f"{name}_mask.png"))
        PIL.Image.fromarray(blob_image(0 if name == "kale" else k)).save(pairs[-1].image)
        mask = np.zeros((64, 96), np.uint8)
        mask[:5, :5] = name in ("elm", "fir", "iris")
        PIL.Image.fromarray(mask).save(pairs[-1].mask)
    return Dataset(folder, "folders", tuple(pairs), ClassTable(("ground", "rare")))


def random_dataset(folder: Path, count: int = 4) -> Dataset:
    """The data set that :func:`write_random_dataset` writes."""
    pairs = (Pair(folder / f"{k}.png", folder / f"{k}_mask.png", "train") for k in range(count))
    return Dataset(folder, "folders", tuple(pairs), ClassTable(("a", "b", "c")))


def write_random_dataset(folder: Path, count: int = 4, size: tuple[int, int] = (12, 8)) -> Dataset:
    """Write RGB images of noise with masks of three classes."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True, parents=True)
    dataset = random_dataset(folder, count)
    for pair in dataset.pairs:
        image = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
        PIL.Image.fromarray(image).save(pair.image)
        mask = rng.integers(0, 3, (size[1], size[0]), np.uint8)
        PIL.Image.fromarray(mask).save(pair.mask)
    return dataset


def write_tiff_dataset(folder: Path, images: list[np.ndarray]) -> Dataset:
    """Write images ``(H, W, C)`` of any number type; every label is 0."""
    pairs = []
    for k, image in enumerate(images):
        pairs.append(Pair(folder / f"{k}.tif", folder / f"{k}.png", "train"))
        planar = "contig" if image.shape[2] > 1 else None
        tifffile.imwrite(pairs[-1].image, image, photometric="minisblack", planarconfig=planar)
        PIL.Image.fromarray(np.zeros(image.shape[:2], np.uint8)).save(pairs[-1].mask)
    return Dataset(folder, "folders", tuple(pairs), ClassTable(("a",)))


def build_samples(
    dataset: Dataset,
    channels: int = 3,
    pixels: str = "uint8",
    working: WorkingSize | None = None,
    **options: Any,
) -> Samples:
    """Decode a data set at its own size, or as asked for."""
    working = working or WorkingSize()
    return build_cache(dataset, dataset.pairs, working, channels, pixels, **options)


def list_cache_entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("set-*"))


def write_image(path: Path, size: tuple[int, int] = (8, 6)) -> Path:
    """Write a grey RGB image of (width, height)."""
    return write_pixels(path, np.full((size[1], size[0], 3), 90))


def write_pixels(path: Path, pixels: object) -> Path:
    """Write pixels as uint8: TIFF by tifffile, other formats by Pillow."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        tifffile.imwrite(path, np.array(pixels, np.uint8))
    else:
        PIL.Image.fromarray(np.array(pixels, np.uint8)).save(path)
    return path


def write_mask(
    path: Path, values: Sequence[object] = (0, 1, 2), size: tuple[int, int] = (8, 6)
) -> Path:
    """Write a mask that has these values: numbers, or colours as triples."""
    listed = np.array(values, np.uint8)
    indices = np.arange(size[0] * size[1]) % len(listed)
    return write_pixels(path, listed[indices].reshape(size[1], size[0], *listed.shape[1:]))


def write_folders(
    root: Path,
    images: str = "images",
    masks: str = "masks",
    names: tuple[str, ...] = ("1", "2", "10"),
    values: Sequence[object] = (0, 1, 2),
) -> Path:
    """Write images and masks of the same names into two folders."""
    for name in names:
        write_image(root / images / f"{name}.jpg")
        write_mask(root / masks / f"{name}.png", values)
    return root


def describe_pairs(dataset: Dataset) -> list[tuple[str, str, str]]:
    """Return (image, mask, split) of each pair, as paths below the root."""
    return [
        (
            pair.image.relative_to(dataset.root).as_posix(),
            pair.mask.relative_to(dataset.root).as_posix(),
            pair.split,
        )
        for pair in dataset.pairs
    ]


def named_files(root: Path) -> NamedFiles:
    """Return the image files below a folder by their names."""
    return NamedFiles(root, list_image_files(root))
