"""``dataset.toml`` -> its settings, and the pairs that its globs name."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from useg.data.dataset import Found, Pair
from useg.data.drawn.pairing import pair_drawn, pair_yolo
from useg.data.images import natural_key
from useg.data.matching import match, unique
from useg.errors import UsageError, suggest

_KEYS = ("images", "masks", "classes", "ignore", "splits")


@dataclass(frozen=True)
class GlobSettings:
    """A checked ``dataset.toml``; ``ignore`` lists values and names, ``splits`` names a CSV file, ``globs`` gives (split, glob over images)."""

    images: str = ""
    masks: str = ""
    classes: str = ""
    ignore: tuple[int | str, ...] = ()
    splits: str = ""
    globs: tuple[tuple[str, str], ...] = ()


def read_settings(file: Path) -> GlobSettings:
    """Read a ``dataset.toml``.

    Raises:
        UsageError: it is no TOML, or has keys or values that are not known.
    """
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
    if not all(isinstance(text, str) for text in texts) or not isinstance(ignore, list) or not all(isinstance(v, int | str) for v in ignore):
        raise UsageError(
            f"{file}: images, masks, classes and splits are text in quotes, ignore is a list of whole numbers (or names of classes); correct them"
        )
    for split in globs:
        if split not in ("train", "val", "test"):
            raise UsageError(f"{file} has the split {split!r}; known are train, val, test{suggest(split, ('train', 'val', 'test'))}")
    if bool(texts[0]) != bool(texts[1]):
        raise UsageError(f'{file} needs both images = "..." and masks = "..." (or neither, when the folders are recognised without)')
    return GlobSettings(texts[0], texts[1], texts[2], tuple(ignore), "" if globs else splits, tuple(globs.items()))


def find_globs(folder: Path, file: Path, settings: GlobSettings) -> Found:
    """Match images to masks by what the wildcards of their two globs stand for; masks may also be annotation files.

    Raises:
        UsageError: a glob without files, or no names that agree.
    """
    masks = _glob(folder, settings.masks)
    images = {path: key for path, key in _glob(folder, settings.images).items() if path not in masks}
    for what, paths, pattern in (("images", images, settings.images), ("masks", masks, settings.masks)):
        if not paths:
            raise UsageError(f"{file}: {what} = \"{pattern}\" matches no file below '{folder}'; paths are relative to that folder")
    found = _pair(folder, file, images, masks)
    splits = {path: split for split, pattern in settings.globs for path in _glob(folder, pattern)}
    return replace(found, layout="dataset.toml", pairs=tuple(replace(pair, split=splits.get(pair.image, pair.split)) for pair in found.pairs))


def _pair(folder: Path, file: Path, images: dict[Path, str], masks: dict[Path, str]) -> Found:
    suffixes = {path.suffix.lower() for path in masks}
    if suffixes <= {".json", ".xml"}:
        found = pair_drawn(folder, list(images), list(masks))
        if found is None:
            raise UsageError(f"{file}: '{next(iter(masks))}' is no annotation file of COCO, CVAT or LabelMe; give one of these, or masks")
        return found
    matched = match(unique((key, path) for path, key in images.items()), unique((key, path) for path, key in masks.items()))
    if not matched.pairs:
        raise UsageError(
            f"{file}: {len(images)} images and {len(masks)} masks match, but no names agree (such as '{next(iter(images))}' "
            f"and '{next(iter(masks))}'); the stars in both globs must stand for the same text"
        )
    if suffixes == {".txt"}:
        return replace(pair_yolo(folder, matched.pairs), images=matched.images, masks=matched.masks)
    return Found("dataset.toml", tuple(Pair(image, mask) for image, mask in matched.pairs), matched.images, matched.masks)


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
