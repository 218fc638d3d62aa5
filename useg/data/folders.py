"""A folder -> the pairs of image and mask in it, recognised by the names of its sub-folders."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from useg.data.dataset import Pair
from useg.data.matching import Match, keyed, match, pictures_in, says_mask
from useg.data.splits import SPLIT_FOLDERS
from useg.errors import UsageError

_IMAGES = ("camerargb", "leftimg8bit", "jpegimages", "images", "image", "imgs", "img", "inputs", "input", "photos", "photo", "pictures", "rgb")
_MASKS = (
    "cameraseg", "cameramask", "gtfine", "segmentationclass", "masks", "mask", "labels", "label", "annotations", "annotation", "annots", "annot",
    "anns", "ann", "targets", "target", "segmentations", "segmentation", "seg", "groundtruth", "gt",
)  # fmt: skip
_LAYOUTS = {"camerargb": "carla", "leftimg8bit": "cityscapes", "jpegimages": "voc"}
_DEPTH = 3  # folders below DATA that are looked at


@dataclass(frozen=True)
class Found:
    """What a folder holds: pairs with their official splits, and images and masks without a partner that should have one."""

    layout: str
    pairs: tuple[Pair, ...]
    images: tuple[Path, ...] = ()
    masks: tuple[Path, ...] = ()


def find_pairs(root: Path) -> Found | None:
    """Return what is in a folder, or None when it has no known layout.

    Raises:
        UsageError: two files claim one partner.
    """
    places = list(_folder_pairs(root, _DEPTH))
    found = [_match_folders(root, images, masks, layout) for images, masks, layout in places] or [_match_in_place(root)]
    pairs = tuple(pair for part in found for pair in part.pairs)
    if not pairs:
        return None
    has_masks = {pair.split for pair in pairs}
    # Test images are often published without their masks.
    images = tuple(path for part in found for path in part.images if split_of(path, root) != "test" or "test" in has_masks)
    return Found(found[0].layout, pairs, images, tuple(path for part in found for path in part.masks))


def split_of(path: Path, root: Path) -> str:
    """Return the official split that a file's folders name (``train/images``, ``images/train``, ``train_images``), or ``""``."""
    splits = [_meaning(part)[1] for part in path.relative_to(root).parts[:-1]]
    return next((split for split in reversed(splits) if split), "")


def _meaning(folder: str) -> tuple[str, str]:
    """Read a folder's name as (kind, split): ``train_masks`` -> (mask, train), ``CameraRGB`` -> (image, ""), ``test`` -> ("", test)."""
    name = folder.casefold()
    for kind, known in (("image", _IMAGES), ("mask", _MASKS)):
        plain = re.sub(r"[_\-. ]", "", name)
        if plain in known:
            return kind, ""
        for word, split in SPLIT_FOLDERS.items():
            if any(plain in (word + other, other + word) for other in known):
                return kind, split
    return "", SPLIT_FOLDERS.get(name, "")


def _folder_pairs(folder: Path, depth: int) -> Iterator[tuple[Path, Path, str]]:
    """Yield (image folder, mask folder, layout) in and below ``folder``."""
    children = subfolders(folder)
    meanings = {child: _meaning(child.name) for child in children}
    paired: set[Path] = set()
    for split in ("", "train", "val", "test"):
        masks = _ranked((child for child in children if meanings[child] == ("mask", split)), _MASKS)
        images = _ranked((child for child in children if meanings[child] == ("image", split)), _IMAGES)
        plain = [child for child in children if split and meanings[child] == ("", split)]
        if masks and (images or plain):
            image, mask = (images or plain)[0], masks[0]
            paired |= {image, mask}
            layout = "camvid" if not images and mask.name.casefold().endswith("annot") else _LAYOUTS.get(image.name.casefold(), "folders")
            yield image, mask, layout
    if depth:
        for child in children:
            if child not in paired:
                yield from _folder_pairs(child, depth - 1)


def subfolders(folder: Path) -> list[Path]:
    """List the visible sub-folders by name.

    Raises:
        UsageError: the folder cannot be read.
    """
    try:
        return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".") and child.name != "__MACOSX")
    except OSError as error:
        raise UsageError(f"the folder '{folder}' cannot be read ({error.strerror}); make it readable, or give another") from error


def _ranked(folders: Iterable[Path], order: tuple[str, ...]) -> list[Path]:
    """Keep the folders with pictures in them (``labels`` may hold text files), the most telling name first."""
    ranks = {name: rank for rank, name in enumerate(order)}
    return sorted((folder for folder in folders if pictures_in(folder)), key=lambda folder: ranks.get(folder.name.casefold(), len(order)))


def _match_folders(root: Path, images: Path, masks: Path, layout: str) -> Found:
    mask_files = pictures_in(masks)
    ids = [path for path in mask_files if path.stem.endswith("_labelIds")]  # Cityscapes keeps colours and instances in the same folder
    found = match(keyed(pictures_in(images), images), keyed(ids or mask_files, masks))
    result = _found(root, layout, found)
    if layout != "voc":
        return result
    splits = _voc_splits(images.parent / "ImageSets" / "Segmentation")
    pairs = tuple(replace(pair, split=splits.get(pair.image.stem, pair.split)) for pair in result.pairs)
    return replace(result, pairs=pairs, images=())  # VOC has masks for some of its images only


def _voc_splits(folder: Path) -> dict[str, str]:
    splits: dict[str, str] = {}
    for split in ("test", "val", "train"):
        if (folder / f"{split}.txt").is_file():
            splits |= dict.fromkeys((folder / f"{split}.txt").read_text("utf-8").split(), split)
    return splits


def _match_in_place(root: Path) -> Found:
    """Pair ``a.png`` with ``a_mask.png`` in one folder."""
    files = pictures_in(root)
    masks = [path for path in files if says_mask(path.stem)]
    images = [path for path in files if not says_mask(path.stem)]
    return _found(root, "one folder", match(keyed(images, root), keyed(masks, root)))


def _found(root: Path, layout: str, found: Match) -> Found:
    return Found(layout, tuple(Pair(image, mask, split_of(image, root)) for image, mask in found.pairs), found.images, found.masks)
