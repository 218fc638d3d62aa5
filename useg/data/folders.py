"""A folder -> the pairs of image and mask in it, recognised by the names of its sub-folders."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from useg.classes import ClassTable
from useg.data.dataset import Found, Instances, Pair
from useg.data.matching import Match, bare, keyed, match, pictures_in, says_mask
from useg.data.splits import SPLIT_FOLDERS
from useg.errors import UsageError

_IMAGES = (
    "camerargb", "leftimg8bit", "jpegimages", "images", "image", "imgs", "img", "inputs", "input", "photos", "photo", "pictures", "rgb",
    "701stillsrawfull", "701stillsraw",
)  # fmt: skip
_MASKS = (
    "cameraseg", "cameramask", "gtfine", "segmentationclass", "masks", "mask", "labels", "label", "annotations", "annotation", "annots", "annot",
    "anns", "ann", "targets", "target", "segmentations", "segmentation", "seg", "groundtruth", "gt",
    "labeledapprovedfull", "labeledapproved",
)  # fmt: skip
_LAYOUTS = {"camerargb": "carla", "leftimg8bit": "cityscapes", "jpegimages": "voc"}
_DEPTH = 3  # folders below DATA that are looked at


def find_pairs(root: Path) -> Found | None:
    """Return what is in a folder, or None when it has no known layout.

    Raises:
        UsageError: two files claim one partner.
    """
    places = list(_folder_pairs(root, _DEPTH))
    if _are_instances([(images, masks) for images, masks, _ in places]):
        return _pair_instances(root, [(images, masks) for images, masks, _ in places])
    found = [_match_folders(root, images, masks, layout) for images, masks, layout in places]
    pairs = tuple(pair for part in found for pair in part.pairs)
    if not pairs:
        return None
    has_masks = {pair.split for pair in pairs}
    # Test images are often published without their masks.
    images = tuple(path for part in found for path in part.images if split_of(path, root) != "test" or "test" in has_masks)
    return Found(found[0].layout, pairs, images, tuple(path for part in found for path in part.masks))


def split_of(path: Path, root: Path) -> str:
    """Return the official split that a file's folders name (``train/images``, ``images/train``, ``train_images``), or ``""``."""
    inside = path.relative_to(root) if path.is_relative_to(root) else path
    splits = [_meaning(part)[1] for part in inside.parts[:-1]]
    return next((split for split in reversed(splits) if split), "")


def _meaning(folder: str) -> tuple[str, str]:
    """Read a folder's name as (kind, split): ``train_masks`` -> (mask, train), ``CameraRGB`` -> (image, ""), ``test2017`` -> ("", test)."""
    name = re.sub(r"20[0-9]{2}$", "", folder.casefold())
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
    # Cityscapes keeps colours and instances in the same folder.
    ids = [[path for path in mask_files if path.stem.endswith(end)] for end in ("_labelIds", "_labelTrainIds")]
    found = match(keyed(pictures_in(images), images), keyed(ids[0] or ids[1] or mask_files, masks))
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


def _are_instances(places: Sequence[tuple[Path, Path]]) -> bool:
    """Tell whether these folders hold one image each, and masks of the single things in it (the 2018 Data Science Bowl)."""
    files = [(pictures_in(images), pictures_in(masks)) for images, masks in places]
    alone = all(len(images) == 1 for images, _ in files)
    return alone and len(files) > 1 and any(len(masks) > 1 and images[0].stem not in {path.stem for path in masks} for images, masks in files)


def _pair_instances(root: Path, places: Iterable[tuple[Path, Path]]) -> Found:
    pairs = (
        Pair(image, masks, split_of(image, root), truth=Instances(tuple(pictures_in(masks))))
        for images, masks in places
        for image in pictures_in(images)
    )
    return Found("instances", tuple(pairs), classes=ClassTable(("background", "foreground")))


def find_in_place(root: Path) -> Found | None:
    """Pair ``a.png`` with ``a_mask.png`` in one folder, or return None; ``train-volume.tif`` and ``test-volume.tif`` are official splits.

    Raises:
        UsageError: two files claim one partner.
    """
    files = pictures_in(root)
    masks = [path for path in files if says_mask(path.stem)]
    if not masks:
        return None
    images = [path for path in files if not says_mask(path.stem)]
    found = _found(root, "one folder", match(keyed(images, root), keyed(masks, root)))
    splits = {path: SPLIT_FOLDERS.get(bare(path.stem), "") for path in images}
    if not found.pairs or not all(splits.values()):
        return found if found.pairs else None
    pairs = tuple(replace(pair, split=splits[pair.image]) for pair in found.pairs)
    tested = any(pair.split == "test" for pair in pairs)
    return replace(found, pairs=pairs, images=tuple(path for path in found.images if tested or splits[path] != "test"))


def _found(root: Path, layout: str, found: Match) -> Found:
    return Found(layout, tuple(Pair(image, mask, split_of(image, root)) for image, mask in found.pairs), found.images, found.masks)
