"""A DATA folder -> its pairs of image and mask, their official splits and the class table.

Recognised, in this order; folder names in upper or lower case, singular or plural:

- ``dataset.toml`` (in DATA, or given as DATA), which wins over everything found by itself::

      images = "photos/*.jpg"          # what the stars stand for matches an image to its mask
      masks = "truth/*_mask.png"
      classes = "classes.toml"         # optional: names, values and colours
      ignore = [255]                   # optional: further values in masks that do not count
      splits = "split.csv"             # optional: columns image,split; or a table of globs over images:
      # [splits]
      # train = "photos/a*.jpg"
      # val = "photos/b*.jpg"

- CARLA and the Lyft challenge: ``CameraRGB`` + ``CameraSeg`` (or ``CameraMask``), the id in the red channel;
- CamVid as SegNet ships it: ``train`` + ``trainannot``, ``val`` + ``valannot``, ``test`` + ``testannot``;
- Cityscapes: ``leftImg8bit`` + ``gtFine``; VOC: ``JPEGImages`` + ``SegmentationClass``;
- two folders: ``images`` + ``masks`` (labels, annotations, targets, ...), or ``train_images`` + ``train_masks``;
- one folder that holds ``a.png`` and ``a_mask.png``.

All of these may lie in sub-folders (``dataA``, ``dataB``); folders called train, val or test are official splits, and so is a ``split.csv``
in DATA. A ``classes.toml`` in DATA wins over every other class table.
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from useg.classes import CAMVID, CARLA, CITYSCAPES, ClassTable, read_classes
from useg.data.dataset import Dataset, Pair, read_label, read_sample
from useg.data.folders import Found, find_pairs, subfolders
from useg.data.images import natural_key
from useg.data.matching import match, pictures_in, unique
from useg.data.splits import read_split_csv
from useg.data.values import guess_classes
from useg.errors import UsageError, suggest

__all__ = ["Dataset", "Pair", "find", "read_label", "read_sample"]

_KEYS = ("images", "masks", "classes", "ignore", "splits")
_KNOWN = {"carla": CARLA, "camvid": CAMVID, "cityscapes": CITYSCAPES}


def find(root: Path, classes: Path | ClassTable | None = None, *, strict: bool = True) -> Dataset:
    """Recognise a data set.

    Args:
        root: its folder, or a ``dataset.toml``.
        classes: a ``classes.toml``, or a model's class table; wins over whatever the data set says.
        strict: an image without a mask (or the other way round) and an unreadable mask are errors; otherwise the former are listed in the
            result and the latter left for :func:`read_label` to meet.

    Returns:
        The pairs in natural order, with official splits where there are some.

    Raises:
        UsageError: no such folder, nothing recognised in it, files without partner, masks that cannot be masks.
    """
    root = Path(root)
    if not root.exists():
        near = suggest(root.name, (path.name for path in root.parent.iterdir())) if root.parent.is_dir() else ""
        raise UsageError(f"the data '{root}' does not exist; give a folder with images and masks, or a dataset.toml{near}")
    file = root if root.suffix == ".toml" else root / "dataset.toml"
    if root.is_file() and root != file:
        raise UsageError(f"'{root}' is a file; give a folder with images and masks, or a dataset.toml")
    folder = file.parent
    settings = _read_settings(file) if file.is_file() else _Settings()
    found = _find_globs(folder, file, settings) if settings.images else find_pairs(folder)
    if found is None:
        raise UsageError(_nothing_found(folder))
    if strict:
        _check_partners(found)
    table = _class_table(folder, found, classes, settings, strict)
    dataset = Dataset(folder, found.layout, found.pairs, table, "", found.images, found.masks)
    csv = folder / (settings.splits or "split.csv")
    if settings.splits or csv.is_file():
        return read_split_csv(csv, dataset)
    return replace(dataset, splits_by="official") if any(pair.split for pair in found.pairs) else dataset


def _class_table(folder: Path, found: Found, classes: Path | ClassTable | None, settings: _Settings, strict: bool) -> ClassTable:
    if isinstance(classes, ClassTable):
        return classes
    named = classes or (folder / settings.classes if settings.classes else None) or folder / "classes.toml"
    if classes or settings.classes or named.is_file():
        table = read_classes(Path(named))
    elif found.layout in _KNOWN:
        table = _KNOWN[found.layout]
    else:
        table = guess_classes([pair.mask for pair in found.pairs], settings.ignore, skip_unreadable=not strict)
    return replace(table, ignore=tuple(dict.fromkeys((*table.ignore, *settings.ignore))))


def _check_partners(found: Found) -> None:
    for alone, what, other in ((found.images, "image", "mask"), (found.masks, "mask", "image")):
        if alone:
            names = ", ".join(f"'{path}'" for path in alone[:3]) + (f" and {len(alone) - 3} more" if len(alone) > 3 else "")
            article = "a" if other == "mask" else "an"
            raise UsageError(
                f"{len(alone)} {what}{'s' if len(alone) > 1 else ''} without {article} {other} ({len(found.pairs)} pairs are complete): {names}; "
                f"add the missing {other}s under the same names, remove the {what}s, or say in a dataset.toml what belongs together"
            )


def _nothing_found(folder: Path) -> str:
    """Say what was found instead of pairs, and give a ``dataset.toml`` to start from."""
    counts = Counter({child: len(pictures_in(child)) for child in subfolders(folder)})
    loose = sum(path.parent == folder for path in pictures_in(folder))
    shown = [f"{child.name}/ ({count} picture{'s' * (count != 1)})" for child, count in counts.items()][:8]
    beside = f"{loose} picture{'s' * (loose != 1)}"
    shown += [f"{beside} beside them" if counts else f"{beside} and no sub-folders"] if loose or not counts else []
    full = [child for child, count in counts.items() if count]
    image, mask = (full[0].name, full[1].name) if len(full) > 1 else ("photos", "truth")
    return (
        f"no pairs of image and mask were found in '{folder}': it has {', '.join(shown)}; known are CameraRGB + CameraSeg, train + trainannot, "
        f"images + masks (or labels, annotations, targets) and a.png + a_mask.png; name your folders so, or write {folder / 'dataset.toml'}:\n"
        f'images = "{image}/{_common_suffix(folder / image)}"\nmasks = "{mask}/{_common_suffix(folder / mask)}"\nignore = [255]'
    )


def _common_suffix(folder: Path) -> str:
    suffixes = Counter(path.suffix for path in pictures_in(folder)) if folder.is_dir() else Counter()
    return f"*{suffixes.most_common(1)[0][0] if suffixes else '.png'}"


@dataclass(frozen=True)
class _Settings:
    """A checked ``dataset.toml``; ``splits`` names a CSV file, ``globs`` gives (split, glob over images)."""

    images: str = ""
    masks: str = ""
    classes: str = ""
    ignore: tuple[int, ...] = ()
    splits: str = ""
    globs: tuple[tuple[str, str], ...] = ()


def _read_settings(file: Path) -> _Settings:
    try:
        content: dict[str, Any] = tomllib.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f'{file} is no TOML ({error}); correct it, for example: images = "photos/*.jpg"') from error
    for key in content:
        if key not in _KEYS:
            raise UsageError(f"{file} has the key {key!r}; known are {', '.join(_KEYS)}{suggest(key, _KEYS)}")
    splits = content.pop("splits", "")
    globs = splits if isinstance(splits, dict) else {}
    texts = [content.get(key, "") for key in ("images", "masks", "classes")]
    texts += list(globs.values()) + ([] if globs else [splits])
    ignore = content.get("ignore", [])
    if not all(isinstance(text, str) for text in texts) or not isinstance(ignore, list) or not all(isinstance(v, int) for v in ignore):
        raise UsageError(f"{file}: images, masks, classes and splits are text in quotes, ignore is a list of whole numbers; correct them")
    for split in globs:
        if split not in ("train", "val", "test"):
            raise UsageError(f"{file} has the split {split!r}; known are train, val, test{suggest(split, ('train', 'val', 'test'))}")
    if bool(texts[0]) != bool(texts[1]):
        raise UsageError(f'{file} needs both images = "..." and masks = "..." (or neither, when the folders are recognised without)')
    return _Settings(texts[0], texts[1], texts[2], tuple(ignore), "" if globs else splits, tuple(globs.items()))


def _find_globs(folder: Path, file: Path, settings: _Settings) -> Found:
    """Match images to masks by what the wildcards of their two globs stand for."""
    masks = _glob(folder, settings.masks)
    images = {path: key for path, key in _glob(folder, settings.images).items() if path not in masks}
    for what, paths, pattern in (("images", images, settings.images), ("masks", masks, settings.masks)):
        if not paths:
            raise UsageError(f"{file}: {what} = \"{pattern}\" matches no file below '{folder}'; paths are relative to that folder")
    found = match(unique((key, path) for path, key in images.items()), unique((key, path) for path, key in masks.items()))
    if not found.pairs:
        raise UsageError(
            f"{file}: {len(images)} images and {len(masks)} masks match, but no names agree (such as '{next(iter(images))}' "
            f"and '{next(iter(masks))}'); the stars in both globs must stand for the same text"
        )
    splits = {path: split for split, pattern in settings.globs for path in _glob(folder, pattern)}
    return Found("dataset.toml", tuple(Pair(image, mask, splits.get(image, "")) for image, mask in found.pairs), found.images, found.masks)


def _glob(folder: Path, pattern: str) -> dict[Path, str]:
    """List the files that match, in natural order, each with the text its wildcards stand for: ``a/*_x.png`` -> ``{a/1_x.png: "1"}``."""
    while pattern.startswith("../"):
        folder, pattern = folder.resolve().parent, pattern[3:]
    if Path(pattern).is_absolute():
        folder, pattern = Path(Path(pattern).anchor), Path(pattern).relative_to(Path(pattern).anchor).as_posix()
    paths = sorted((path for path in folder.glob(pattern) if path.is_file()), key=natural_key)
    regex = _wildcards(re.sub(r"\.[^./]*$", "", pattern))
    names = {path: path.relative_to(folder).with_suffix("").as_posix() for path in paths}
    fits = {path: regex.fullmatch(name) for path, name in names.items()}
    return {path: "/".join(part.strip("/") for part in fit.groups() if part) if fit else names[path] for path, fit in fits.items()}


def _wildcards(pattern: str) -> re.Pattern[str]:
    """Turn a glob into a regular expression with a group for each ``**/`` and for each run of ``*``, ``?`` and ``[...]``."""
    inner = {"*": "[^/]*", "?": "[^/]"}
    text = ""
    for part in re.split(r"(\*\*/|(?:\*|\?|\[[^]]+\])+)", pattern):
        if part == "**/":
            text += "(.*/)?"
        elif re.match(r"[*?]|\[[^]]+\]", part):
            tokens = re.findall(r"\*|\?|\[[^]]+\]", part)
            text += f"({''.join(inner.get(token, token.replace('[!', '[^')) for token in tokens)})"
        else:
            text += re.escape(part)
    return re.compile(text, re.DOTALL)
