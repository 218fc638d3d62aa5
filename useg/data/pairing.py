"""Folder and file names -> pairs of images and masks, in natural order (1, 2, 10).

Folders are recognized by their names (``CameraRGB`` + ``CameraSeg``, ``images`` + ``masks``), and
so are masks beside their images (``a_mask.png``). Files are paired by their names without words
such as ``mask``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from useg.classes import ClassTable
from useg.data.dataset import SPLIT_FOLDERS, DetectedLayout, Instances, Pair
from useg.errors import DataError
from useg.images.decode import IMAGE_SUFFIXES
from useg.images.files import natural_key

# Words that say what a file is, not which image it belongs to: 'road_7_mask' and 'road_7',
# 'img_001' and 'mask_001', the names of Cityscapes and ISIC.
_ROLE_WORDS = (
    "image|img|rgb|sat|leftimg8bit|mask|masks|label|labels|labelids|labeltrainids|lbl|lab|seg|segm"
    "|segmentation|gt|gtfine|groundtruth|truth|annotation|annot|anno|ann|target|volume|stack|l"
)
_ROLE_SUFFIX = re.compile(rf"[_\-. ](?:{_ROLE_WORDS})$", re.IGNORECASE)
_ROLE_PREFIX = re.compile(rf"^(?:{_ROLE_WORDS})[_\-. ]?(?=\d)", re.IGNORECASE)

# The name of a mask that lies in the same folder as its image.
_MASK_NAME = re.compile(
    r"[_\-. ](?:mask|masks|label|labels|seg|segmentation|gt|annotation)$", re.IGNORECASE
)

# Names of folders with images or masks, the most specific first.
_IMAGE_FOLDERS = (
    *("camerargb", "leftimg8bit", "jpegimages", "images", "image", "imgs", "img", "inputs"),
    *("input", "photos", "photo", "pictures", "rgb", "701stillsrawfull", "701stillsraw"),
)
_MASK_FOLDERS = (
    *("cameraseg", "cameramask", "gtfine", "segmentationclass", "masks", "mask", "labels"),
    *("label", "annotations", "annotation", "annots", "annot", "anns", "ann", "targets"),
    *("target", "segmentations", "segmentation", "seg", "groundtruth", "gt"),
    *("labeledapprovedfull", "labeledapproved"),
)
_LAYOUTS = {"camerargb": "carla", "leftimg8bit": "cityscapes", "jpegimages": "voc"}

# Levels of sub-folders of DATA that are searched.
_MAX_DEPTH = 3


@dataclass(frozen=True)
class MatchedFiles:
    """Images and masks that belong together, and those without a partner."""

    pairs: tuple[tuple[Path, Path], ...]
    images: tuple[Path, ...]
    masks: tuple[Path, ...]


def list_image_files(folder: Path) -> list[Path]:
    """List the image files in a folder and its sub-folders, in natural order.

    Hidden files, and the copies that macOS makes, are left out.
    """
    return list_files(folder, IMAGE_SUFFIXES)


def list_files(folder: Path, suffixes: Container[str]) -> list[Path]:
    """List files like :func:`list_image_files`, by suffix (in lower case, with the dot)."""
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        found += [
            Path(place, name)
            for name in names
            if not _is_hidden(name) and os.path.splitext(name)[1].lower() in suffixes
        ]
    return sorted(found, key=natural_key)


def key_by_stem(paths: Iterable[Path], folder: Path) -> dict[str, Path]:
    """Return the files by their paths inside ``folder`` without the suffix.

    Raises:
        DataError: Two files differ only in their suffix.
    """
    return build_unique(
        (path.relative_to(folder).with_suffix("").as_posix(), path) for path in paths
    )


def build_unique(items: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """Build a dictionary of files.

    Raises:
        DataError: Two files have one key, so it is unclear which one is meant.
    """
    found: dict[str, Path] = {}
    for key, path in items:
        if key in found:
            raise DataError(
                f"'{found[key]}' and '{path}' have the same name ({key!r}), so it is unclear which "
                "of them to pair; remove one"
            )
        found[key] = path
    return found


def match_by_name(images: Mapping[str, Path], masks: Mapping[str, Path]) -> MatchedFiles:
    """Pair images with masks of the same key.

    The rest is paired by keys without words such as ``_mask`` and, if nothing matches, without
    folders.

    Raises:
        DataError: Two files have the same partner.
    """
    pairs = {key: (path, masks[key]) for key, path in images.items() if key in masks}
    rest_images = {key: path for key, path in images.items() if key not in pairs}
    rest_masks = {key: path for key, path in masks.items() if key not in pairs}
    if rest_images and rest_masks:
        _match_rest(rest_images, rest_masks, pairs, strip_role_words)
    if not pairs:
        _match_rest(
            rest_images, rest_masks, pairs, lambda key: strip_role_words(key.rpartition("/")[2])
        )
    ordered = sorted(pairs.items(), key=lambda item: natural_key(item[0]))
    return MatchedFiles(
        tuple(pair for _, pair in ordered), tuple(rest_images.values()), tuple(rest_masks.values())
    )


def _match_rest(
    images: dict[str, Path],
    masks: dict[str, Path],
    pairs: dict[str, tuple[Path, Path]],
    key_of: Callable[[str], str],
) -> None:
    """Move the files whose reduced keys agree from ``images`` and ``masks`` to ``pairs``."""
    image_keys = {key_of(key) for key in images}
    wanted = image_keys & {key_of(key) for key in masks}
    short_images = build_unique(
        (key_of(key), path) for key, path in images.items() if key_of(key) in wanted
    )
    short_masks = build_unique(
        (key_of(key), path) for key, path in masks.items() if key_of(key) in wanted
    )
    for key in [key for key in images if key_of(key) in wanted]:
        pairs[key] = (images.pop(key), short_masks[key_of(key)])
    for key in [key for key in masks if key_of(key) in wanted]:
        del masks[key]
    assert len(short_images) == len(short_masks) == len(wanted)


def strip_role_words(key: str) -> str:
    """Remove the words that say what a file is: ``city/a_gtFine_labelIds`` -> ``city/a``.

    A file name never becomes empty.
    """
    folder, slash, stem = key.rpartition("/")
    while (shorter := _ROLE_SUFFIX.sub("", stem)) not in ("", stem):
        stem = shorter
    return folder + slash + (_ROLE_PREFIX.sub("", stem) or stem).casefold()


def is_mask_name(stem: str) -> bool:
    """Return whether a name without suffix is a mask's: ``a_mask``, ``a-label``, ``a_gt``."""
    return _MASK_NAME.search(stem) is not None


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def find_paired_folders(root: Path) -> DetectedLayout | None:
    """Pair the images and masks of sub-folders, or return None if there is no known layout.

    Raises:
        DataError: Two files have the same partner.
    """
    places = list(_folder_pairs(root, _MAX_DEPTH))
    if _are_instances([(images, masks) for images, masks, _ in places]):
        return _pair_instances(root, [(images, masks) for images, masks, _ in places])
    found = [_match_folders(root, images, masks, layout) for images, masks, layout in places]
    pairs = tuple(pair for part in found for pair in part.pairs)
    if not pairs:
        return None
    has_masks = {pair.split for pair in pairs}
    # Test images are often published without their masks.
    images = tuple(
        path
        for part in found
        for path in part.images
        if find_official_split(path, root) != "test" or "test" in has_masks
    )
    return DetectedLayout(
        found[0].layout, pairs, images, tuple(path for part in found for path in part.masks)
    )


def find_official_split(path: Path, root: Path) -> str:
    """Return the official split from a file's folders, or ``""``.

    Examples are ``train/images``, ``images/train`` and ``train_images``.
    """
    inside = path.relative_to(root) if path.is_relative_to(root) else path
    splits = [_classify_folder(part)[1] for part in inside.parts[:-1]]
    return next((split for split in reversed(splits) if split), "")


def _classify_folder(folder: str) -> tuple[str, str]:
    """Return the kind and the split that a folder's name stands for.

    ``train_masks`` is (mask, train), ``CameraRGB`` is (image, ""), ``test2017`` is ("", test).
    """
    name = re.sub(r"20[0-9]{2}$", "", folder.casefold())
    for kind, known in (("image", _IMAGE_FOLDERS), ("mask", _MASK_FOLDERS)):
        plain = re.sub(r"[_\-. ]", "", name)
        if plain in known:
            return kind, ""
        for word, split in SPLIT_FOLDERS.items():
            if any(plain in (word + other, other + word) for other in known):
                return kind, split
    return "", SPLIT_FOLDERS.get(name, "")


def _folder_pairs(folder: Path, depth: int) -> Iterator[tuple[Path, Path, str]]:
    """Yield (image folder, mask folder, layout) in and below ``folder``."""
    children = list_subfolders(folder)
    kinds = {child: _classify_folder(child.name) for child in children}
    paired: set[Path] = set()
    for split in ("", "train", "val", "test"):
        masks = _sort_by_name(
            (child for child in children if kinds[child] == ("mask", split)), _MASK_FOLDERS
        )
        images = _sort_by_name(
            (child for child in children if kinds[child] == ("image", split)), _IMAGE_FOLDERS
        )
        plain = [child for child in children if split and kinds[child] == ("", split)]
        if masks and (images or plain):
            image, mask = (images or plain)[0], masks[0]
            paired |= {image, mask}
            layout = (
                "camvid"
                if not images and mask.name.casefold().endswith("annot")
                else _LAYOUTS.get(image.name.casefold(), "folders")
            )
            yield image, mask, layout
    if depth:
        for child in children:
            if child not in paired:
                yield from _folder_pairs(child, depth - 1)


def list_subfolders(folder: Path) -> list[Path]:
    """List the visible sub-folders by name.

    Raises:
        DataError: The folder cannot be read.
    """
    try:
        return sorted(
            child for child in folder.iterdir() if child.is_dir() and not _is_hidden(child.name)
        )
    except OSError as error:
        raise DataError(
            f"the folder '{folder}' cannot be read ({error.strerror}); "
            "make it readable, or choose another"
        ) from error


def _sort_by_name(folders: Iterable[Path], order: tuple[str, ...]) -> list[Path]:
    """Return the folders that have image files, the most specific name first."""
    ranks = {name: rank for rank, name in enumerate(order)}
    return sorted(
        (folder for folder in folders if list_image_files(folder)),
        key=lambda folder: ranks.get(folder.name.casefold(), len(order)),
    )


def _match_folders(root: Path, images: Path, masks: Path, layout: str) -> DetectedLayout:
    mask_files = list_image_files(masks)
    # Cityscapes has colours and instances in the same folder.
    ids = [
        [path for path in mask_files if path.stem.endswith(end)]
        for end in ("_labelIds", "_labelTrainIds")
    ]
    found = match_by_name(
        key_by_stem(list_image_files(images), images),
        key_by_stem(ids[0] or ids[1] or mask_files, masks),
    )
    result = _to_layout(root, layout, found)
    if layout != "voc":
        return result
    splits = _read_voc_splits(images.parent / "ImageSets" / "Segmentation")
    pairs = tuple(
        replace(pair, split=splits.get(pair.image.stem, pair.split)) for pair in result.pairs
    )
    # VOC has masks for some of its images only.
    return replace(result, pairs=pairs, images=())


def _read_voc_splits(folder: Path) -> dict[str, str]:
    splits: dict[str, str] = {}
    for split in ("test", "val", "train"):
        if (folder / f"{split}.txt").is_file():
            splits |= dict.fromkeys((folder / f"{split}.txt").read_text("utf-8").split(), split)
    return splits


def _are_instances(places: Sequence[tuple[Path, Path]]) -> bool:
    """Return whether each place has one image and one mask per object (2018 Data Science Bowl)."""
    files = [(list_image_files(images), list_image_files(masks)) for images, masks in places]
    if len(files) < 2 or any(len(images) != 1 for images, _ in files):
        return False
    return any(
        len(masks) > 1 and images[0].stem not in {path.stem for path in masks}
        for images, masks in files
    )


def _pair_instances(root: Path, places: Iterable[tuple[Path, Path]]) -> DetectedLayout:
    pairs = (
        Pair(
            image,
            masks,
            find_official_split(image, root),
            truth=Instances(tuple(list_image_files(masks))),
        )
        for images, masks in places
        for image in list_image_files(images)
    )
    return DetectedLayout(
        "instances", tuple(pairs), classes=ClassTable(("background", "foreground"))
    )


def find_pairs_in_one_folder(root: Path) -> DetectedLayout | None:
    """Pair ``a.png`` with ``a_mask.png`` in one folder, or return None.

    ``train-volume.tif`` and ``test-volume.tif`` are official splits.

    Raises:
        DataError: Two files have the same partner.
    """
    files = list_image_files(root)
    masks = [path for path in files if is_mask_name(path.stem)]
    if not masks:
        return None
    images = [path for path in files if not is_mask_name(path.stem)]
    found = _to_layout(
        root, "one folder", match_by_name(key_by_stem(images, root), key_by_stem(masks, root))
    )
    splits = {path: SPLIT_FOLDERS.get(strip_role_words(path.stem), "") for path in images}
    if not found.pairs or not all(splits.values()):
        return found if found.pairs else None
    pairs = tuple(replace(pair, split=splits[pair.image]) for pair in found.pairs)
    has_test_masks = any(pair.split == "test" for pair in pairs)
    images_alone = (path for path in found.images if has_test_masks or splits[path] != "test")
    return replace(found, pairs=pairs, images=tuple(images_alone))


def _to_layout(root: Path, layout: str, found: MatchedFiles) -> DetectedLayout:
    return DetectedLayout(
        layout,
        tuple(Pair(image, mask, find_official_split(image, root)) for image, mask in found.pairs),
        found.images,
        found.masks,
    )
