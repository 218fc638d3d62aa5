"""A DATA folder -> its pairs of image and truth, their official splits and the class table.

Recognised, in this order; folder names in upper or lower case, singular or plural:

- ``dataset.toml`` (in DATA, or given as DATA), which wins over everything found by itself::

      images = "photos/*.jpg"          # what the stars stand for matches an image to its mask
      masks = "truth/*_mask.png"       # or annotation files: "truth.json", "outlines/*.txt"
      classes = "classes.toml"         # optional: names, values and colours
      ignore = [255, "void"]           # optional: further values in masks, or names of classes, that do not count
      splits = "split.csv"             # optional: columns image,split; or a table of globs over images:
      # [splits]
      # train = "photos/a*.jpg"
      # val = "photos/b*.jpg"

- CARLA and the Lyft challenge: ``CameraRGB`` + ``CameraSeg`` (or ``CameraMask``), the id in the red channel;
- CamVid as SegNet ships it: ``train`` + ``trainannot``, ``val`` + ``valannot``, ``test`` + ``testannot``; and as published, in 32 colours;
- Cityscapes: ``leftImg8bit`` + ``gtFine`` (labelIds or labelTrainIds); VOC: ``JPEGImages`` + ``SegmentationClass``; ADE20K and the Oxford-IIIT
  pets: ``images`` + ``annotations``;
- two folders: ``images`` + ``masks`` (labels, annotations, targets, ...), or ``train_images`` + ``train_masks``, or ``train`` + ``train_masks``;
- one folder per image with the masks of single things: ``ID/images/ID.png`` + ``ID/masks/*.png``, which become background and foreground;
- one folder that holds ``a.png`` and ``a_mask.png``;
- annotation files: COCO's JSON, CVAT's XML, LabelMe's JSON, YOLO's ``images`` + ``labels`` with outlines in text files.

All of these may lie in sub-folders (``dataA``, ``dataB``); folders called train, val or test are official splits, and so is a ``split.csv``
in DATA. TIFF stacks of as many pages each are pairs page by page. A ``classes.toml`` in DATA wins over every other class table.
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from useg.classes import ClassTable, read_classes
from useg.data.annotations.pairing import find_annotated, pair_annotated, pair_yolo
from useg.data.annotations.rasterize import IGNORE_NAME, Drawing
from useg.data.dataset import Dataset, DetectedLayout, Pair, read_split_csv
from useg.data.masks import infer_classes, recognize_published
from useg.data.pairing import (
    build_unique,
    find_paired_folders,
    find_pairs_in_one_folder,
    list_files,
    list_image_files,
    list_subfolders,
    match_by_name,
)
from useg.errors import DataError, UsageError, suggest
from useg.images.files import natural_key, num_pages

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


def read_dataset_toml(file: Path) -> GlobSettings:
    """Read a ``dataset.toml``.

    Raises:
        DataError: it is no TOML, or has keys or values that are not known.
    """
    try:
        content: dict[str, Any] = tomllib.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DataError(
            f'{file} is no TOML ({error}); correct it, for example: images = "photos/*.jpg"'
        ) from error
    for key in content:
        if key not in _KEYS:
            raise DataError(
                f"{file} has the key {key!r}; known are {', '.join(_KEYS)}{suggest(key, _KEYS)}"
            )
    splits = content.pop("splits", "")
    globs = splits if isinstance(splits, dict) else {}
    texts = [content.get(key, "") for key in ("images", "masks", "classes")]
    texts += list(globs.values()) + ([] if globs else [splits])
    ignore = content.get("ignore", [])
    if (
        not all(isinstance(text, str) for text in texts)
        or not isinstance(ignore, list)
        or not all(isinstance(v, int | str) for v in ignore)
    ):
        raise DataError(
            f"{file}: images, masks, classes and splits are text in quotes, ignore is a list of whole numbers (or names of classes); correct them"
        )
    for split in globs:
        if split not in ("train", "val", "test"):
            raise DataError(
                f"{file} has the split {split!r}; known are train, val, test{suggest(split, ('train', 'val', 'test'))}"
            )
    if bool(texts[0]) != bool(texts[1]):
        raise DataError(
            f'{file} needs both images = "..." and masks = "..." (or neither, when the folders are recognised without)'
        )
    return GlobSettings(
        texts[0], texts[1], texts[2], tuple(ignore), "" if globs else splits, tuple(globs.items())
    )


def pair_by_globs(folder: Path, file: Path, settings: GlobSettings) -> DetectedLayout:
    """Match images to masks by what the wildcards of their two globs stand for; masks may also be annotation files.

    Raises:
        DataError: a glob without files, or no names that agree.
    """
    masks = _glob(folder, settings.masks)
    images = {
        path: key for path, key in _glob(folder, settings.images).items() if path not in masks
    }
    for what, paths, pattern in (
        ("images", images, settings.images),
        ("masks", masks, settings.masks),
    ):
        if not paths:
            raise DataError(
                f"{file}: {what} = \"{pattern}\" matches no file below '{folder}'; paths are relative to that folder"
            )
    found = _pair(folder, file, images, masks)
    splits = {path: split for split, pattern in settings.globs for path in _glob(folder, pattern)}
    return replace(
        found,
        layout="dataset.toml",
        pairs=tuple(
            replace(pair, split=splits.get(pair.image, pair.split)) for pair in found.pairs
        ),
    )


def _pair(
    folder: Path, file: Path, images: dict[Path, str], masks: dict[Path, str]
) -> DetectedLayout:
    suffixes = {path.suffix.lower() for path in masks}
    if suffixes <= {".json", ".xml"}:
        found = pair_annotated(folder, list(images), list(masks))
        if found is None:
            raise DataError(
                f"{file}: '{next(iter(masks))}' is no annotation file of COCO, CVAT or LabelMe; give one of these, or masks"
            )
        return found
    matched = match_by_name(
        build_unique((key, path) for path, key in images.items()),
        build_unique((key, path) for path, key in masks.items()),
    )
    if not matched.pairs:
        raise DataError(
            f"{file}: {len(images)} images and {len(masks)} masks match, but no names agree (such as '{next(iter(images))}' "
            f"and '{next(iter(masks))}'); the stars in both globs must stand for the same text"
        )
    if suffixes == {".txt"}:
        return replace(pair_yolo(folder, matched.pairs), images=matched.images, masks=matched.masks)
    return DetectedLayout(
        "dataset.toml",
        tuple(Pair(image, mask) for image, mask in matched.pairs),
        matched.images,
        matched.masks,
    )


def _glob(folder: Path, pattern: str) -> dict[Path, str]:
    """List the files that match, in natural order, each with the text its wildcards stand for: ``a/*_x.png`` -> ``{a/1_x.png: "1"}``."""
    while pattern.startswith("../"):
        folder, pattern = folder.resolve().parent, pattern[3:]
    if Path(pattern).is_absolute():
        folder, pattern = (
            Path(Path(pattern).anchor),
            Path(pattern).relative_to(Path(pattern).anchor).as_posix(),
        )
    paths = sorted((path for path in folder.glob(pattern) if path.is_file()), key=natural_key)
    regex = _wildcards(re.sub(r"\.[^./]*$", "", pattern))
    names = {path: path.relative_to(folder).with_suffix("").as_posix() for path in paths}
    fits = {path: regex.fullmatch(name) for path, name in names.items()}
    return {
        path: "/".join(part.strip("/") for part in fit.groups() if part) if fit else names[path]
        for path, fit in fits.items()
    }


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


ClassInference = Callable[
    ..., ClassTable
]  # (mask files with their pages, ignored values, skip_unreadable=...)


_RECOGNISERS = (
    find_paired_folders,
    find_pairs_in_one_folder,
    find_annotated,
)  # the first that finds pairs


_TIFF = (".tif", ".tiff")


_OTHERS = (".json", ".xml", ".txt", ".csv", ".zip", ".npy", ".npz", ".mat", ".nii", ".gz", ".h5")


def find_dataset(
    root: Path,
    classes: Path | ClassTable | None = None,
    *,
    strict: bool = True,
    guess: ClassInference = infer_classes,
) -> Dataset:
    """Recognise a data set.

    Args:
        root: its folder, or a ``dataset.toml``.
        classes: a ``classes.toml``, or a model's class table; wins over whatever the data set says.
        strict: an image without a mask (or the other way round) and an unreadable mask are errors; otherwise the former are listed in the
            result and the latter left for :func:`read_label` to meet.
        guess: makes a class table of mask files and ignored values where nobody wrote one.

    Returns:
        The pairs in natural order, with official splits where there are some.

    Raises:
        DataError: no such folder, nothing recognised in it, files without partner, masks that cannot be masks, damaged annotation files.
    """
    root = Path(root)
    if not root.exists():
        near = (
            suggest(root.name, (path.name for path in root.parent.iterdir()))
            if root.parent.is_dir()
            else ""
        )
        raise DataError(
            f"the data '{root}' does not exist; give a folder with images and masks, or a dataset.toml{near}"
        )
    file = root if root.suffix == ".toml" else root / "dataset.toml"
    if root.is_file() and root != file:
        raise DataError(
            f"'{root}' is a file; give a folder with images and masks, or a dataset.toml"
        )
    folder = file.parent
    settings = read_dataset_toml(file) if file.is_file() else GlobSettings()
    found = _ignore_shapes(_by_page(_recognise(folder, file, settings), strict), settings)
    if strict:
        _check_partners(found)
    table = _class_table(
        folder, found, classes, settings, partial(guess, skip_unreadable=not strict)
    )
    dataset = Dataset(
        folder, found.layout, found.pairs, table, "", found.images, found.masks, found.recolored
    )
    csv = folder / (settings.splits or "split.csv")
    if settings.splits or csv.is_file():
        return read_split_csv(csv, dataset)
    return (
        replace(dataset, splits_by="official")
        if any(pair.split for pair in found.pairs)
        else dataset
    )


def _recognise(folder: Path, file: Path, settings: GlobSettings) -> DetectedLayout:
    if settings.images:
        return pair_by_globs(folder, file, settings)
    for recogniser in _RECOGNISERS:
        found = recogniser(folder)
        if found is not None:
            return recognize_published(found, folder)
    raise DataError(_nothing_found(folder))


def _by_page(found: DetectedLayout, strict: bool) -> DetectedLayout:
    """Take stacks apart: an image and a mask of as many pages are as many pairs."""
    return replace(
        found, pairs=tuple(page for pair in found.pairs for page in _pages(pair, strict))
    )


def _pages(pair: Pair, strict: bool) -> Iterator[Pair]:
    if pair.truth is not None or not {pair.image.suffix.lower(), pair.mask.suffix.lower()} & set(
        _TIFF
    ):
        yield pair
        return
    try:
        images, masks = num_pages(pair.image), num_pages(pair.mask)
        if images != masks:
            raise DataError(
                f"image '{pair.image}' has {_count(images, 'page')}, but its mask '{pair.mask}' has {masks}; give a mask for every page"
            )
    except UsageError:
        if strict:
            raise
        yield pair  # whoever reads it meets the error
    else:
        yield from (replace(pair, page=page) for page in range(images)) if images > 1 else (pair,)


def _ignore_shapes(found: DetectedLayout, settings: GlobSettings) -> DetectedLayout:
    """Rename the shapes of classes that ``dataset.toml`` ignores to what :func:`useg.data.annotations.rasterize.draw_shapes` ignores."""
    if found.classes is None or not settings.ignore:
        return found
    ignored = {
        name
        for name, value in zip(found.classes.names, found.classes.values, strict=True)
        if {name, value} & set(settings.ignore)
    }

    def without(pair: Pair) -> Pair:
        if not isinstance(pair.truth, Drawing):
            return pair
        shapes = (
            replace(shape, name=IGNORE_NAME) if shape.name in ignored else shape
            for shape in pair.truth.shapes
        )
        return replace(pair, truth=replace(pair.truth, shapes=tuple(shapes)))

    return replace(found, pairs=tuple(map(without, found.pairs)))


def _class_table(
    folder: Path,
    found: DetectedLayout,
    classes: Path | ClassTable | None,
    settings: GlobSettings,
    guess: ClassInference,
) -> ClassTable:
    if isinstance(classes, ClassTable):
        # Other values may stand for the same classes in these files than where the model was trained.
        return found.classes if found.classes and found.classes.names == classes.names else classes
    named = (
        classes
        or (folder / settings.classes if settings.classes else None)
        or folder / "classes.toml"
    )
    values = tuple(value for value in settings.ignore if isinstance(value, int))
    if classes or settings.classes or named.is_file():
        table = read_classes(Path(named))
    elif found.classes is not None:
        table = found.classes
    else:
        table = guess([(pair.mask, pair.page) for pair in found.pairs], values)
    return _without(table, settings.ignore)


def _without(table: ClassTable, ignore: tuple[int | str, ...]) -> ClassTable:
    """Take ignored classes out of a table, and ignore what masks store for them."""
    for name in ignore:
        if isinstance(name, str) and name not in table.names:
            raise DataError(
                f"dataset.toml ignores the class {name!r}, but the classes are {', '.join(table.names)}{suggest(name, table.names)}"
            )
    stored = (
        [r << 16 | g << 8 | b for r, g, b in table.colors] if table.by_color else list(table.values)
    )
    kept = [k for k in range(len(table)) if not {table.names[k], stored[k]} & set(ignore)]
    gone = [stored[k] for k in range(len(table)) if k not in kept]
    ignored = dict.fromkeys(
        (*table.ignore, *(value for value in ignore if isinstance(value, int)), *gone)
    )
    return replace(
        table,
        names=tuple(table.names[k] for k in kept),
        colors=tuple(table.colors[k] for k in kept),
        values=tuple(table.values[k] for k in kept),
        ignore=tuple(ignored),
    )


def _check_partners(found: DetectedLayout) -> None:
    for alone, what, other in ((found.images, "image", "mask"), (found.masks, "mask", "image")):
        if alone:
            names = ", ".join(f"'{path}'" for path in alone[:3]) + (
                f" and {len(alone) - 3} more" if len(alone) > 3 else ""
            )
            article = "a" if other == "mask" else "an"
            raise DataError(
                f"{_count(len(alone), what)} without {article} {other} ({len(found.pairs)} pairs are complete): {names}; "
                f"add the missing {other}s under the same names, remove the {what}s, or say in a dataset.toml what belongs together"
            )


def _nothing_found(folder: Path) -> str:
    """Say what was found instead of pairs, and give a ``dataset.toml`` to start from."""
    pictures = {child: len(list_image_files(child)) for child in list_subfolders(folder)}
    loose = sum(path.parent == folder for path in list_image_files(folder))
    others = list_files(folder, _OTHERS)
    suffixes = Counter(path.suffix.lower() for path in others)
    shown = [f"{child.name}/ ({_count(count, 'picture')})" for child, count in pictures.items()][:8]
    beside = _count(loose, "picture")
    shown += (
        [f"{beside} beside them" if pictures else f"{beside} and no sub-folders"]
        if loose or not pictures
        else []
    )
    shown += [_count(count, f"{suffix} file") for suffix, count in suffixes.most_common(3)]
    said = f"no pairs of image and mask were found in '{folder}': it has {', '.join(shown)}; "
    annotated = [path for path in others if path.suffix.lower() in (".json", ".xml")]
    full = [child.name for child, count in pictures.items() if count]
    if annotated and not full and not loose:
        return f"{said}put the pictures that '{annotated[0]}' speaks of there too, or give the folder that holds both"
    images = full[0] if full else "." if loose else "photos"
    masks = (
        f"{full[1]}/{_common_suffix(folder / full[1])}"
        if len(full) > 1
        else f"truth/{_common_suffix(folder / 'truth')}"
    )
    masks = annotated[0].relative_to(folder).as_posix() if annotated and len(full) < 2 else masks
    return (
        f"{said}known are CameraRGB + CameraSeg, train + trainannot, images + masks (or labels, annotations, targets), a.png + a_mask.png, and "
        f"annotation files of COCO, CVAT, LabelMe and YOLO; name your folders so, or write {folder / 'dataset.toml'}:\n"
        f'images = "{images}/{_common_suffix(folder / images)}"\nmasks = "{masks}"\nignore = [255]'
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _common_suffix(folder: Path) -> str:
    suffixes = (
        Counter(path.suffix for path in list_image_files(folder)) if folder.is_dir() else Counter()
    )
    return f"*{suffixes.most_common(1)[0][0] if suffixes else '.png'}"
