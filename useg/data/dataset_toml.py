"""``dataset.toml`` -> pairs of images and masks: its content, its globs, and working proposals.

It lies in DATA, or is given as DATA, and wins over everything that the folders say::

    images = "photos/*.jpg"          # the text for the stars pairs an image with its mask
    masks = "truth/*_mask.png"       # or annotation files: "truth.json", "outlines/*.txt"
    classes = "classes.toml"         # optional: names, values and colours; or "carla-0.9.14",
                                     # "cityscapes", "pascal-voc" and other published tables
    ignore = [255, "void"]           # optional: values or class names that do not count
    splits = "split.csv"             # optional: columns image,split; or globs over images:
    # [splits]
    # train = "photos/a*.jpg"
    # val = "photos/b*.jpg"
    valid = "fields/*.png"           # optional: masks that are 0 where nothing counts
    missing = "skip"                 # optional: images without a mask are left out, or
                                     # "background"; by default they are an error
    # Or one mask per class, the last one on top, instead of masks = "...":
    # [masks]
    # water = "water/*.png"
    # weeds = "weeds/*.png"
"""

from __future__ import annotations

import json
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from useg.classes import ClassTable
from useg.data.annotations.pairing import pair_annotated, pair_yolo
from useg.data.dataset import ClassMasks, DetectedLayout, Pair
from useg.data.file_names import MASK_WORDS
from useg.data.globs import check_glob, common_glob, glob_files
from useg.data.ground_truth import (
    OTHER_WORDS,
    Candidate,
    OpenChoiceError,
    are_class_masks,
    name_differences,
)
from useg.data.official_splits import find_official_splits, leave_for_prediction, split_by_masks
from useg.data.pairing import describe_foreign, match_lists
from useg.errors import DataError, suggest
from useg.files import natural_key
from useg.images.image_files import list_image_files
from useg.parsing import read_toml, shorten

_KEYS = (
    *("images", "masks", "classes", "ignore", "splits", "valid", "objects", "alpha", "empty"),
    "missing",
)
_OFFICIAL_SPLITS = ("train", "val", "test")


# Settings that a message proposes.
_MAX_OPTIONS = 5

# Sets of masks with these words in their names may not be classes.
_NO_CLASS_WORDS = (
    MASK_WORDS
    | OTHER_WORDS
    | frozenset(
        [
            *("annotator", "expert", "rater", "reader", "observer", "grader", "student", "human"),
            *("auto", "automatic", "machine", "model", "first", "second", "third", "new", "final"),
            *("raw", "orig", "original", "fixed", "corrected", "checked", "reviewed", "draft"),
            *("ignore", "ignored", "uncertain", "unsure", "invalid", "valid", "roi", "fov"),
            *("train", "training", "val", "validation", "test", "part", "version", "batch"),
            *("low", "high", "small", "large", "half", "full", "coarse", "fine", "image", "images"),
        ]
    )
)


@dataclass(frozen=True)
class GlobSettings:
    """The content of a ``dataset.toml``.

    Args:
        images: Glob of the images.
        masks: Glob of the masks or annotation files.
        class_masks: Or one mask per class, as (class name, glob).
        valid: Glob of masks that are 0 where an image does not count.
        classes: Path of a ``classes.toml``, or a published table such as ``carla-0.9.14``.
        ignore: Values and class names that do not count.
        splits: Path of a CSV file with the splits.
        globs: Or the splits as (split, glob over images).
        objects: Whether masks number objects; None: the masks decide.
        alpha: Whether the classes are in the masks' transparency; None: the masks decide.
        empty: What an image without annotations is: ``background``, or ``ignore`` if it is not
            finished.
        has_ignore: Whether ``ignore`` is given, even if it is empty.
        missing: What happens to images without a mask: ``error``, ``skip``, or ``background``.
    """

    images: str = ""
    masks: str = ""
    classes: str = ""
    ignore: tuple[int | str, ...] = ()
    splits: str = ""
    globs: tuple[tuple[str, str], ...] = ()
    class_masks: tuple[tuple[str, str], ...] = ()
    valid: str = ""
    objects: bool | None = None
    alpha: bool | None = None
    empty: str = ""
    has_ignore: bool = False
    missing: str = ""


def read_dataset_toml(file: Path) -> GlobSettings:
    """Read a ``dataset.toml``.

    Raises:
        DataError: The file is not valid TOML, or has an unknown key or value.
    """
    try:
        content = read_toml(file)
    except (OSError, ValueError) as error:
        raise DataError(
            f'{file} is not valid TOML ({error}); correct it, for example: images = "photos/*.jpg"'
        ) from error
    return _check_settings(file, content)


def _check_settings(file: Path, content: dict[str, Any]) -> GlobSettings:
    """Return the settings in the content of a ``dataset.toml``; unknown ones are an error."""
    for key in content:
        if key not in _KEYS:
            raise DataError(
                f"{file} has the unknown key {key!r}; choose from {', '.join(_KEYS)}"
                f"{suggest(key, _KEYS)}"
            )
    masks, splits = content.get("masks", ""), content.get("splits", "")
    class_masks = masks if isinstance(masks, dict) else {}
    split_globs = splits if isinstance(splits, dict) else {}
    globs = [content.get("images", ""), content.get("valid", "")]
    globs += [*(class_masks.values() or [masks]), *split_globs.values()]
    texts = [*globs, content.get("classes", ""), *([] if split_globs else [splits])]
    _check_types(file, texts, content)
    _check_choices(file, content)
    for split in split_globs:
        if split not in _OFFICIAL_SPLITS:
            raise DataError(
                f"{file} has the unknown split {split!r}; "
                f"choose from {', '.join(_OFFICIAL_SPLITS)}{suggest(split, _OFFICIAL_SPLITS)}"
            )
    if bool(content.get("images")) != bool(masks):
        raise DataError(
            f'{file} needs both images = "..." and masks = "...", or neither if useg recognises '
            "the folders"
        )
    for pattern in globs:
        check_glob(file, pattern)
    return GlobSettings(
        images=content.get("images", ""),
        masks="" if class_masks else masks,
        classes=content.get("classes", ""),
        ignore=tuple(content.get("ignore", ())),
        splits="" if split_globs else splits,
        globs=tuple(split_globs.items()),
        class_masks=tuple(class_masks.items()),
        valid=content.get("valid", ""),
        objects=content.get("objects"),
        alpha=content.get("alpha"),
        empty=content.get("empty", ""),
        has_ignore="ignore" in content,
        missing=content.get("missing", ""),
    )


def _check_types(file: Path, texts: Sequence[object], content: Mapping[str, Any]) -> None:
    """Refuse values of the wrong type."""
    ignore = content.get("ignore", [])
    if (
        not all(isinstance(text, str) for text in texts)
        or not isinstance(ignore, list)
        or not all(isinstance(value, int | str) for value in ignore)
    ):
        raise DataError(
            f"{file} has a value of the wrong type; images, masks, classes and splits are text in "
            "quotes, ignore is a list of whole numbers or class names"
        )
    for key in ("objects", "alpha"):
        if not isinstance(content.get(key), bool | None):
            raise DataError(f"{file} has {key} = {content[key]!r}; choose true or false")


def _check_choices(file: Path, content: Mapping[str, Any]) -> None:
    """Refuse unknown values of the keys that accept only a few."""
    empty, missing = content.get("empty", ""), content.get("missing", "")
    if empty not in ("", "background", "ignore"):
        raise DataError(
            f'{file} has empty = {shorten(empty)}; choose "background", or "ignore" if images '
            "without annotations are unfinished"
        )
    if missing not in ("", "error", "skip", "background"):
        raise DataError(
            f'{file} has missing = {shorten(missing)}; choose "error", "skip" to leave out '
            'images without a mask, or "background" if they show only background'
        )


def pair_by_globs(folder: Path, file: Path, settings: GlobSettings) -> DetectedLayout:
    """Pair images with masks by the text for the wildcards of their globs.

    Masks may also be annotation files.

    Raises:
        DataError: A glob matches no files, or no names agree.
    """
    globs = settings.class_masks or (("masks", settings.masks),)
    masks = [glob_files(folder, pattern) for _, pattern in globs]
    images = {
        path: key
        for path, key in glob_files(folder, settings.images).items()
        if not any(path in files for files in masks)
    }
    for (what, pattern), paths in zip(
        (("images", settings.images), *globs), (images, *masks), strict=True
    ):
        if not paths:
            raise DataError(
                f"{file}: {what} = \"{pattern}\" matches no file; paths are relative to '{folder}'"
            )
    each = [_pair_by_wildcards(folder, file, images, files) for files in masks]
    found = _join_classes(each, settings) if settings.class_masks else each[0]
    return replace(found, layout="dataset.toml")


def _join_classes(each: Sequence[DetectedLayout], settings: GlobSettings) -> DetectedLayout:
    """Join the pairs of several classes: one pair per image, with a mask for each class."""
    masks: dict[Path, list[tuple[str, Path]]] = defaultdict(list)
    splits: dict[Path, str] = {}
    for found, (name, _) in zip(each, settings.class_masks, strict=True):
        for pair in found.pairs:
            masks[pair.image].append((name, pair.mask))
            splits[pair.image] = pair.split
    names = [name for name, _ in settings.class_masks]
    return DetectedLayout(
        "dataset.toml",
        tuple(
            Pair(image, masks[image][0][1], splits[image], truth=ClassMasks(tuple(masks[image])))
            for image in sorted(masks, key=natural_key)
        ),
        tuple(path for path in each[0].images if path not in masks),
        tuple(path for found in each for path in found.masks),
        ClassTable(tuple(dict.fromkeys(("background", *names)))),
        notes=tuple(dict.fromkeys(note for found in each for note in found.notes)),
    )


def _pair_by_wildcards(
    folder: Path, file: Path, images: dict[Path, str], masks: dict[Path, str]
) -> DetectedLayout:
    suffixes = {path.suffix.lower() for path in masks}
    if suffixes <= {".json", ".xml"}:
        found = pair_annotated(folder, list(images), list(masks))
        if found is None:
            raise DataError(
                f"{file}: '{next(iter(masks))}' is not an annotation file of COCO, CVAT, LabelMe, "
                "Label Studio, Supervisely or VIA; choose such a file, or masks"
            )
        return found
    named = _by_wildcards(images), _by_wildcards(masks)
    near = _leave_out_farther(*named), _leave_out_farther(*reversed(named))
    farther = [
        [path for key, path in each.items() if key not in left]
        for each, left in zip(named, near, strict=True)
    ]
    matched = match_lists(*near)
    matched = replace(
        matched, images=(*matched.images, *farther[0]), masks=(*matched.masks, *farther[1])
    )
    if not matched.pairs:
        raise DataError(
            f"{file}: {len(images)} images and {len(masks)} masks match the globs, but no two "
            f"have the same name (such as '{next(iter(images))}' and '{next(iter(masks))}'); the "
            "stars in both globs must stand for the same text"
        )
    if suffixes == {".txt"}:
        return replace(pair_yolo(folder, matched.pairs), images=matched.images, masks=matched.masks)
    splits = split_by_masks(find_official_splits(images, folder), dict(matched.pairs), folder)
    labelled = [splits[image] for image, _ in matched.pairs]
    alone, notes = leave_for_prediction(matched.images, splits, labelled)
    return DetectedLayout(
        "dataset.toml",
        tuple(Pair(image, mask, splits[image]) for image, mask in matched.pairs),
        alone,
        matched.masks,
        notes=notes,
    )


def _by_wildcards(files: dict[Path, str]) -> dict[str, Path]:
    """Return files by the text for the wildcards.

    Raises:
        DataError: Two files have one text.
    """
    found: dict[str, Path] = {}
    for path, key in files.items():
        if key in found:
            raise DataError(
                f"'{found[key]}' and '{path}' have the same name ({key!r}), so it is unclear which "
                "of them to pair; choose more exact globs in dataset.toml"
            )
        found[key] = path
    return found


def _leave_out_farther(names: dict[str, Path], others: dict[str, Path]) -> dict[str, Path]:
    """Return the names without those in farther folders, if a name of the others fits several.

    Of ``*/images/*.png``, the images in ``rust/images`` belong to ``rust/masks/*.png``.
    """
    ends: dict[str, list[str]] = defaultdict(list)
    for name in names:
        ends[name.rpartition("/")[2]].append(name)
    farther: set[str] = set()
    for other in others.keys() - names.keys():
        folders = {*others[other].parts}
        shared = {name: len(folders & {*names[name].parts}) for name in ends.get(other, ())}
        nearest = [name for name in shared if shared[name] == max(shared.values())]
        if len(nearest) == 1:
            farther |= shared.keys() - nearest
    return {name: path for name, path in names.items() if name not in farther}


def make_choice(error: OpenChoiceError, folder: Path) -> DetectedLayout:
    """Join the sets of masks of an open choice if they certainly have one class each.

    All images have a mask in each set, the masks hardly overlap, and the names of the sets differ
    by words that do not describe masks: ``masks/road`` and ``masks/tree``.

    Raises:
        DataError: The choice stays open. The message has the lines of a ``dataset.toml`` for each
            possible choice; all of them were tried.
    """
    file, files = folder / "dataset.toml", list_image_files(folder)
    joined = _find_class_masks(error.left, folder, file, files)
    found_files = [*joined[1].images, *_list_files(joined[1])] if joined else []
    rest = sorted({*files} - {*found_files}, key=natural_key)
    if joined is None or 2 * len(rest) > len(files) or not _are_certain(joined[0], error):
        options = [_describe_class_masks(*joined, file)] if joined else []
        for candidate in (*error.left, *error.candidates):
            options.append(_try_settings(candidate, folder, file, files))
        raise DataError(f"'{folder}': {error}. {_describe_options(options, file)}") from error
    settings, found = joined
    globs = " and ".join(glob for _, glob in settings.class_masks)
    note = (
        f"{globs} became one class each, because their masks hardly overlap; otherwise write the "
        f"globs of the images and of the right masks into {file}"
    )
    notes = (note, describe_foreign(rest, folder)) if rest else (note,)
    return replace(found, layout="masks by class", notes=(*found.notes, *notes))


def _list_files(found: DetectedLayout) -> Iterator[Path]:
    """Yield the images and masks of pairs with one mask for each class."""
    for pair in found.pairs:
        yield pair.image
        if isinstance(pair.truth, ClassMasks):
            yield from (path for _, path in pair.truth.masks)


def _are_certain(settings: GlobSettings, error: OpenChoiceError) -> bool:
    """Return whether sets of masks have one class each by their images and their names too."""
    sets, classes = error.left, settings.class_masks
    if any(each not in error.candidates or {*each.masks} != {*sets[0].masks} for each in sets):
        return False
    words = {frozenset(re.findall("[a-z]{3,}", name.casefold())) for name, _ in classes}
    return len(words) == len(classes) and all(each and not each & _NO_CLASS_WORDS for each in words)


def _describe_options(options: Sequence[str], file: Path) -> str:
    """Say how to choose by a dataset.toml, whose possible contents are ``options``."""
    tried = list(dict.fromkeys(option for option in options if option))[:_MAX_OPTIONS]
    if not tried:
        return f"Write the globs of the right ones as images and masks into {file}"
    return f"To choose, write {file}:\n" + "\nor\n".join(tried)


def _try_settings(candidate: Candidate, folder: Path, file: Path, files: Sequence[Path]) -> str:
    """Return the lines of a dataset.toml for a candidate, or ``""`` if they pair otherwise."""
    images = common_glob(list(candidate.masks), folder, files)
    masks = common_glob(list(candidate.masks.values()), folder, files)
    lines = [f"images = {quote_toml(images)}", f"masks = {quote_toml(masks)}"]
    found = _follow("\n".join(lines), folder, file)
    if found is None or {pair.image: pair.mask for pair in found.pairs} != dict(candidate.masks):
        return ""
    return "\n".join((*lines, *_skip_missing(found), *_use_for_training(found, images)))


def _follow(option: str, folder: Path, file: Path) -> DetectedLayout | None:
    """Return the pairs of a possible dataset.toml, or None if useg would refuse it."""
    settings = _parse(option, file)
    if settings is None:
        return None
    try:
        found = pair_by_globs(folder, file, settings)
    except DataError:
        return None
    return found if _can_train(found) else None


def _parse(option: str, file: Path) -> GlobSettings | None:
    """Return the settings of a possible dataset.toml, or None if useg would refuse them."""
    if not option.replace("\n", "").isprintable():
        return None
    try:
        return _check_settings(file, tomllib.loads(option))
    except (DataError, ValueError):
        return None


def _can_train(found: DetectedLayout) -> bool:
    """Return whether there are pairs, and no mask is left."""
    return bool(found.pairs) and not found.masks


def _skip_missing(found: DetectedLayout) -> list[str]:
    """Return the line of a dataset.toml that leaves out images without a mask, if there are any."""
    return ['missing = "skip"'] * bool(found.images)


def _use_for_training(found: DetectedLayout, images: str) -> list[str]:
    """Return the lines of a dataset.toml that put all pairs into training, if none of them is."""
    if any(pair.split in ("", "train") for pair in found.pairs):
        return []
    return ["[splits]", f"train = {quote_toml(images)}"]


def _find_class_masks(
    candidates: Sequence[Candidate], folder: Path, file: Path, files: Sequence[Path]
) -> tuple[GlobSettings, DetectedLayout] | None:
    """Return the settings and the pairs of candidates that have one class each; None for others."""
    if not are_class_masks(candidates):
        return None
    labelled = list(dict.fromkeys(image for each in candidates for image in each.masks))
    globs = [common_glob(list(each.masks.values()), folder, files) for each in candidates]
    settings = GlobSettings(
        common_glob(labelled, folder, files),
        class_masks=tuple(zip(name_differences(globs), globs, strict=True)),
    )
    try:
        found = pair_by_globs(folder, file, settings)
    except DataError:
        return None
    return (settings, found) if len(found.pairs) == len(labelled) else None


def _describe_class_masks(settings: GlobSettings, found: DetectedLayout, file: Path) -> str:
    """Return the lines of a dataset.toml that join one mask per class; ``""`` if refused."""
    images = f"images = {quote_toml(settings.images)}"
    globs = [f"{quote_toml(name)} = {quote_toml(glob)}" for name, glob in settings.class_masks]
    if _parse("\n".join((images, "[masks]", *globs)), file) != settings or not _can_train(found):
        return ""
    splits = _use_for_training(found, settings.images)
    return "\n".join((images, *_skip_missing(found), "[masks]", *globs, *splits))


def quote_toml(text: str) -> str:
    """Write a text as TOML does."""
    return json.dumps(text, ensure_ascii=False)
