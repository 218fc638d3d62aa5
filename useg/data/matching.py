"""File names -> which image belongs to which mask, in natural order (1, 2, 10)."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from useg.data.images import IMAGE_SUFFIXES, natural_key
from useg.errors import UsageError

# Words that say what a file is, not which one it is: 'road_7_mask' and 'road_7', 'img_001' and 'mask_001', Cityscapes' and ISIC's names.
_WORDS = (
    "image|img|rgb|sat|leftimg8bit|mask|masks|label|labels|labelids|labeltrainids|lbl|lab|seg|segm|segmentation|gt|gtfine|groundtruth|truth"
    "|annotation|annot|anno|ann|target|volume|stack|l"
)
_TAIL = re.compile(rf"[_\-. ](?:{_WORDS})$", re.IGNORECASE)
_HEAD = re.compile(rf"^(?:{_WORDS})[_\-. ]?(?=\d)", re.IGNORECASE)


@dataclass(frozen=True)
class Match:
    """Images and masks that belong together, and those left alone."""

    pairs: tuple[tuple[Path, Path], ...]
    images: tuple[Path, ...]
    masks: tuple[Path, ...]


def pictures_in(folder: Path) -> list[Path]:
    """List the picture files in a folder and below it, in natural order; hidden ones (and macOS's shadow files) are left out."""
    return files_in(folder, IMAGE_SUFFIXES)


def files_in(folder: Path, suffixes: Container[str]) -> list[Path]:
    """As :func:`pictures_in`, for files with these suffixes (lower case, with the dot)."""
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not _hidden(name)]
        found += [Path(place, name) for name in names if not _hidden(name) and os.path.splitext(name)[1].lower() in suffixes]
    return sorted(found, key=natural_key)


def keyed(paths: Iterable[Path], folder: Path) -> dict[str, Path]:
    """Key each file by its path inside ``folder`` without the suffix.

    Raises:
        UsageError: two files differ in their suffix alone.
    """
    return unique((path.relative_to(folder).with_suffix("").as_posix(), path) for path in paths)


def unique(items: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """Build a dict; two files under one key are an error, since nobody could say which one is meant."""
    found: dict[str, Path] = {}
    for key, path in items:
        if key in found:
            raise UsageError(
                f"'{found[key]}' and '{path}' have the same name ({key!r}), so it is unclear which one belongs to its partner; remove one"
            )
        found[key] = path
    return found


def match(images: Mapping[str, Path], masks: Mapping[str, Path]) -> Match:
    """Match by key; what is left over once more without words such as ``_mask``, and, when nothing matches, without folders.

    Raises:
        UsageError: two files claim the same partner.
    """
    pairs = {key: (path, masks[key]) for key, path in images.items() if key in masks}
    rest_images = {key: path for key, path in images.items() if key not in pairs}
    rest_masks = {key: path for key, path in masks.items() if key not in pairs}
    if rest_images and rest_masks:
        _match_rest(rest_images, rest_masks, pairs, bare)
    if not pairs:
        _match_rest(rest_images, rest_masks, pairs, lambda key: bare(key.rpartition("/")[2]))
    ordered = sorted(pairs.items(), key=lambda item: natural_key(item[0]))
    return Match(tuple(pair for _, pair in ordered), tuple(rest_images.values()), tuple(rest_masks.values()))


def _match_rest(images: dict[str, Path], masks: dict[str, Path], pairs: dict[str, tuple[Path, Path]], key_of: Callable[[str], str]) -> None:
    """Move the files whose reduced keys agree from ``images`` and ``masks`` to ``pairs``."""
    image_keys = {key_of(key) for key in images}
    wanted = image_keys & {key_of(key) for key in masks}
    short_images = unique((key_of(key), path) for key, path in images.items() if key_of(key) in wanted)
    short_masks = unique((key_of(key), path) for key, path in masks.items() if key_of(key) in wanted)
    for key in [key for key in images if key_of(key) in wanted]:
        pairs[key] = (images.pop(key), short_masks[key_of(key)])
    for key in [key for key in masks if key_of(key) in wanted]:
        del masks[key]
    assert len(short_images) == len(short_masks) == len(wanted)


def bare(key: str) -> str:
    """Drop the words that say what a file is: ``city/a_gtFine_labelIds`` -> ``city/a``; a name is never emptied."""
    folder, slash, stem = key.rpartition("/")
    while (shorter := _TAIL.sub("", stem)) not in ("", stem):
        stem = shorter
    return folder + slash + (_HEAD.sub("", stem) or stem).casefold()


def says_mask(stem: str) -> bool:
    """Tell whether a name ends as masks' names do while images lie in the same folder: ``a_mask``, ``a-label``, ``a_segmentation``."""
    return re.search(r"[_\-. ](?:mask|masks|label|labels|seg|segmentation|gt|annotation)$", stem, re.IGNORECASE) is not None


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
