"""A DATA folder -> its pairs of images and masks, their official splits and the class table.

Images and masks are found in this order:

- ``dataset.toml`` (:mod:`useg.data.dataset_toml`), which wins over everything else;
- one folder per image with one mask per object: ``ID/images/ID.png`` + ``ID/masks/*.png``, which
  become background and foreground;
- images and masks whose names agree (:mod:`useg.data.pairing`), in one folder or in several:
  ``images/a.png`` + ``masks/a.png``, ``a.jpg`` + ``a_m.png``, and the layouts of CARLA, CamVid,
  Cityscapes, VOC, ADE20K and Oxford-IIIT Pet, whose classes are known;
- tables such as ``train.csv`` that list the paths of images and masks in two columns;
- annotation files: COCO's JSON (instances or panoptic), CVAT's XML, the JSON of LabelMe,
  Supervisely, Label Studio and VIA, YOLO's ``images`` + ``labels`` with outlines in text files.

All of these may lie in sub-folders. Folders called train, val or test are official splits, and so
are lists such as ``train.txt``, and a ``split.csv`` in DATA. Stacks (TIFF, ``.npy``) with the same
number of pages are paired page by page. A ``classes.toml`` in DATA wins over every other class
table.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from useg.classes import ClassTable, read_classes
from useg.data.annotations.pairing import find_annotated, find_described
from useg.data.annotations.platforms import BRUSH_MASK_NAME
from useg.data.annotations.shapes import IGNORE_NAME, Drawing
from useg.data.classes_from_masks import ClassDecision, infer_classes
from useg.data.dataset import (
    MISSING_ADVICE,
    ClassMasks,
    Dataset,
    DetectedLayout,
    MaskEncoding,
    Pair,
    has_no_shapes,
)
from useg.data.dataset_toml import (
    GlobSettings,
    make_choice,
    pair_by_globs,
    quote_toml,
    read_dataset_toml,
)
from useg.data.file_names import name_files
from useg.data.globs import glob_files
from useg.data.ground_truth import OpenChoiceError
from useg.data.mask_encoding import find_encoding
from useg.data.mask_problems import describe_unfinished
from useg.data.official_splits import LIST_SUFFIXES, find_splits, read_split_lists
from useg.data.pair_lists import find_table_pairs
from useg.data.pairing import find_pairs, match_lists
from useg.data.published_classes import PUBLISHED_TABLES, distinguish_carla, recognize_published
from useg.data.scribbles import describe_scribbles
from useg.data.split_files import read_split_csv
from useg.data.unrecognized import ask_about_numbers, describe_unrecognized
from useg.errors import DataError, UsageError, format_count, suggest
from useg.files import cached_walks, list_files, natural_key, walk_folders
from useg.images.formats import ALL_PAGES, STACK_SUFFIXES
from useg.images.image_files import read_size
from useg.images.stacks import count_pages, read_stack
from useg.parsing import open_file

# Annotation files that are examined beside masks: this many, and this many bytes at both ends.
_MAX_ANNOTATION_FILES = 8
_END_BYTES = 4096
_ANNOTATED = re.compile(rb'"(annotations|shapes|regions)"\s*:\s*[\[{]\s*[\[{"]|<(image|polygon) ')

# The first recognizer that finds pairs, or asks, wins.
_RECOGNIZERS = (find_pairs, find_table_pairs, find_annotated, ask_about_numbers)


_TIFF_SUFFIXES = (".tif", ".tiff")
# If an image has up to this many pages and its mask has one, the pages are bands; more are a stack.
_MAX_BAND_PAGES = 16
# Called with the pairs, how their masks hold the classes, the ignored values, and
# skip_unreadable=...
ClassInference = Callable[..., ClassDecision]


@cached_walks()
def find_dataset(
    root: Path,
    classes: str | Path | ClassTable | None = None,
    *,
    strict: bool = True,
    infer: ClassInference = infer_classes,
) -> Dataset:
    """Recognise a data set.

    Args:
        root: Its folder, or a ``dataset.toml``.
        classes: A ``classes.toml`` or a model's class table, which wins over the data set's own;
            None or an empty text: there is none.
        strict: Whether files without a partner and unreadable masks are errors. Otherwise the
            former are listed in the result, and :func:`useg.data.dataset.read_label` raises the
            error for the latter.
        infer: Makes a class table from mask files and ignored values if no file has one.

    Returns:
        The pairs in natural order, with official splits if there are any.

    Raises:
        DataError: There is no such folder, no layout is recognised, files have no partner, masks
            have values that cannot be classes, or an annotation file is damaged.
    """
    file = _find_dataset_toml(Path(root))
    folder = file.parent
    settings = read_dataset_toml(file) if file.is_file() else GlobSettings()
    found = _find_layout(folder, file, settings, strict)
    masks = [pair for pair in found.pairs if pair.truth is None]
    is_known = classes or settings.classes or found.classes or (folder / "classes.toml").is_file()
    encoding, notes = find_encoding(
        masks,
        settings.objects,
        settings.alpha,
        are_inferred=not is_known and not settings.has_ignore,
    )
    encoding = replace(encoding, ignore_empty=settings.empty == "ignore")
    if not settings.empty:
        notes += _describe_empty(found)
    decision = _decide_classes(
        folder,
        found,
        encoding,
        classes,
        settings,
        partial(infer, root=folder, skip_unreadable=not strict),
    )
    dataset = Dataset(
        folder,
        found.layout,
        found.pairs,
        decision.table,
        found.splits_by,
        found.images,
        found.masks,
        found.recolored,
        (*found.notes, *notes, *decision.notes, *_describe_links(folder)),
        encoding=encoding,
        skipped=found.skipped,
    )
    csv = folder / (settings.splits or "split.csv")
    if settings.splits or csv.is_file():
        return read_split_csv(csv, dataset)
    if any(pair.split for pair in found.pairs):
        return replace(dataset, splits_by=found.splits_by or "official")
    return dataset


def _find_dataset_toml(root: Path) -> Path:
    """Return where the ``dataset.toml`` of a data set is, or would be.

    Raises:
        DataError: There is no such folder or file.
    """
    if not root.exists():
        near = (
            suggest(root.name, (path.name for path in root.parent.iterdir()))
            if root.parent.is_dir()
            else ""
        )
        raise DataError(
            f"the data '{root}' does not exist; choose a folder with images and masks, or a "
            f"dataset.toml{near}"
        )
    file = root if root.suffix == ".toml" else root / "dataset.toml"
    if root.is_file() and root != file:
        raise DataError(
            f"'{root}' is a file; choose a folder with images and masks, or a dataset.toml"
        )
    return file


def _find_layout(folder: Path, file: Path, settings: GlobSettings, strict: bool) -> DetectedLayout:
    """Find the pairs: recognised or described, with official splits, one for each page."""
    found = _recognize(folder, file, settings)
    if found.unnamed or (settings.missing and found.images):
        found = _settle_missing(found, folder, settings.missing)
    if settings.globs:
        found = _split_by_globs(found, folder, settings.globs)
    found = _split_by_lists(found, folder, settings.splits)
    found = _add_valid(found, folder, file, settings.valid)
    found = _split_pages(found, strict)
    if found.classes is not None and settings.ignore:
        found = _ignore_shapes(found, found.classes, settings.ignore)
    if strict and (found.images or found.masks):
        _refuse_unpaired(found)
    return found


def _split_by_globs(
    found: DetectedLayout, folder: Path, globs: Sequence[tuple[str, str]]
) -> DetectedLayout:
    """Split pairs by the globs over images in a ``dataset.toml``."""
    splits = {path: split for split, pattern in globs for path in glob_files(folder, pattern)}
    pairs = (replace(pair, split=splits.get(pair.image, pair.split)) for pair in found.pairs)
    return replace(found, pairs=tuple(pairs))


def _settle_missing(found: DetectedLayout, folder: Path, missing: str) -> DetectedLayout:
    """Leave out images without a mask, or take them as background, if ``missing`` says so."""
    images = [*found.images, *found.unnamed]
    note = f"{format_count(len(images), 'image')} without a mask"
    pairs = found.pairs
    if missing == "background":
        everything = [*images, *(pair.image for pair in pairs)]
        has_splits = any(pair.split for pair in pairs)
        splits = find_splits(everything, folder, everything) if has_splits else {}
        added = (Pair(path, path, splits.get(path, ""), truth=ClassMasks(())) for path in images)
        pairs = tuple(sorted((*pairs, *added), key=lambda pair: natural_key(pair.image)))
        note += ', all background, because dataset.toml has missing = "background"'
    elif missing == "skip":
        note += " left out"
    elif found.unnamed:
        count = format_count(len(found.unnamed), "image")
        note = f"{count} without an annotation left out, such as '{found.unnamed[0].name}'; "
        note += MISSING_ADVICE
        return replace(found, notes=(*found.notes, note))
    else:
        return found
    return replace(found, pairs=pairs, images=(), notes=(*found.notes, note))


def _recognize(folder: Path, file: Path, settings: GlobSettings) -> DetectedLayout:
    if settings.images:
        return pair_by_globs(folder, file, settings)
    for recognizer in _RECOGNIZERS:
        try:
            found = recognizer(folder)
        except OpenChoiceError as error:
            candidates = (*error.left, *error.candidates)
            masks = [mask for each in candidates for mask in each.masks.values()]
            found = _find_described(folder, masks) or make_choice(error, folder)
        if found is not None:
            found = _prefer_table(found, folder) if found.images or found.masks else found
            masks = [pair.mask for pair in found.pairs if pair.truth is None]
            described = _find_described(folder, masks)
            if described is None and recognizer is find_pairs:
                found = replace(found, notes=(*found.notes, *_describe_annotations(folder)))
            return recognize_published(described or found, folder)
    raise DataError(describe_unrecognized(folder))


def _find_described(folder: Path, masks: Sequence[Path]) -> DetectedLayout | None:
    """Return what annotation files say of masks whose pixels alone do not name their classes.

    By their names, these are the PNGs of COCO's panoptic segmentation, which number segments, and
    the brush masks of Label Studio. None for other masks.
    """
    are_described = any(
        "panoptic" in mask.parent.name.casefold() or BRUSH_MASK_NAME.fullmatch(mask.stem)
        for mask in masks
    )
    return find_described(folder, masks) if are_described else None


def _prefer_table(found: DetectedLayout, folder: Path) -> DetectedLayout:
    """Return the pairs of a table if only some names agree, which then is an accident."""
    listed = find_table_pairs(folder)
    return listed if listed is not None and len(listed.pairs) > len(found.pairs) else found


def _add_valid(found: DetectedLayout, folder: Path, file: Path, valid: str) -> DetectedLayout:
    """Give each pair the mask that shows where it counts; without the setting, say that it exists.

    Raises:
        DataError: The glob matches no file, or a pair has none.
    """
    if not valid:
        if not found.field_of_view:
            return found
        try:
            _add_valid(found, folder, file, found.field_of_view)
        except DataError:
            return found
        note = (
            f"to ignore the pixels outside the field of view, create {file} with the line "
            f"valid = {quote_toml(found.field_of_view)}"
        )
        return replace(found, notes=(*found.notes, note))
    files = list(glob_files(folder, valid))
    if not files:
        raise DataError(
            f"{file}: valid = \"{valid}\" matches no file; paths are relative to '{folder}'"
        )
    images = [pair.image for pair in found.pairs]
    matched = match_lists(name_files(images, folder), name_files(files, folder))
    if matched.images:
        raise DataError(
            f'{file}: valid = "{valid}" matches no file for {len(matched.images)} images, such '
            f"as '{matched.images[0]}'; correct or remove the glob"
        )
    masks = dict(matched.pairs)
    return replace(
        found, pairs=tuple(replace(pair, valid=masks[pair.image]) for pair in found.pairs)
    )


def _split_by_lists(found: DetectedLayout, folder: Path, own: str) -> DetectedLayout:
    """Split pairs by ``train.txt`` and its like, unless folders hold out some for validation."""
    files = list_files(folder, LIST_SUFFIXES)
    lists = [path for path in files if path != folder / (own or "split.csv")]
    if not lists or {"train", "val"} <= {pair.split for pair in found.pairs}:
        return found
    listed = read_split_lists(lists, found.pairs, folder)
    names = ", ".join(path.name for path in listed.files)
    return replace(
        found,
        pairs=listed.pairs,
        splits_by=f"official: {names}" if names else found.splits_by,
        notes=(*found.notes, *listed.notes),
    )


def _describe_links(folder: Path) -> Iterator[str]:
    for _, _, links in walk_folders(folder):
        for link in links:
            yield (
                f"the link '{link}' leads to '{os.path.realpath(link)}'; useg reads the files there"
            )


def _split_pages(found: DetectedLayout, strict: bool) -> DetectedLayout:
    """Split TIFF stacks: an image and a mask with equally many pages become one pair per page."""
    strict = strict or len(found.pairs) == 1
    pairs = tuple(page for pair in found.pairs for page in _pages(pair, strict))
    joined = [pair for pair in pairs if pair.page == ALL_PAGES]
    first = next((pair.image for pair in pairs if pair.page == 0), None)
    notes = (*found.notes, *(_describe_volume(first) if first else ()))
    if not joined:
        return replace(found, pairs=pairs, notes=notes)
    note = (
        f"the pages of {format_count(len(joined), 'image')}, such as '{joined[0].image}', are read "
        "as the bands of one image, since the mask has one page"
    )
    return replace(found, pairs=pairs, notes=(*notes, note))


def _describe_volume(path: Path) -> Iterator[str]:
    """Say that an array whose first two axes are equal may have its slices along the last."""
    shape = read_stack(path).npy_shape
    if len(shape) == 3 and shape[0] == shape[1] != shape[2]:
        height, width, depth = shape
        yield (
            f"'{path}' has the shape {shape}, and is read as {height} images of {depth}x{width} "
            f"pixels; if it has {depth} slices along its last axis, put that first, in images and "
            "masks: numpy.save(file, numpy.moveaxis(numpy.load(file), -1, 0))"
        )


def _are_rows(pair: Pair, images: int, masks: int) -> bool:
    """Whether the pages of an image have the size of the rows of its mask."""
    return masks == 1 < images and read_size(pair.mask) == (read_size(pair.image, 0)[1], images)


def _describe_page_counts(pair: Pair, images: int, masks: int) -> str:
    """Say that an image has more or fewer pages than its mask."""
    if _are_rows(pair, images, masks):
        return (
            f"image '{pair.image}' has {images} pages, each as large as one row of its mask: it "
            "seems to be an array (H, W, C) that tifffile saved row by row; save it as one image, "
            "in Python: tifffile.imwrite(file, tifffile.imread(file), photometric='minisblack', "
            "planarconfig='contig')"
        )
    return (
        f"image '{pair.image}' has {format_count(images, 'page')}, but its mask '{pair.mask}' has "
        f"{masks}; each page needs a mask (up to {_MAX_BAND_PAGES} pages with one mask are the "
        "bands of one image)"
    )


def _pages(pair: Pair, strict: bool) -> Iterator[Pair]:
    suffixes = {pair.image.suffix.lower(), pair.mask.suffix.lower()}
    if pair.truth is not None or STACK_SUFFIXES.isdisjoint(suffixes):
        yield pair
        return
    try:
        images, masks = count_pages(pair.image, pair.mask)
        if masks == 1 < images <= _MAX_BAND_PAGES and pair.image.suffix.lower() in _TIFF_SUFFIXES:
            yield replace(pair, page=ALL_PAGES)
            return
        if images != masks:
            strict = strict or _are_rows(pair, images, masks)
            raise DataError(_describe_page_counts(pair, images, masks))
    except UsageError:
        if strict:
            raise
        # Reading the pair raises the error.
        yield pair
        return
    if images == 1:
        yield pair
    else:
        yield from (replace(pair, page=page) for page in range(images))


def _ignore_shapes(
    found: DetectedLayout, classes: ClassTable, ignore: tuple[int | str, ...]
) -> DetectedLayout:
    """Rename shapes of ignored classes, so that :func:`draw_shapes` ignores them."""
    ignored = {
        name
        for name, value in zip(classes.names, classes.values, strict=True)
        if {name, value} & set(ignore)
    }

    def rename(pair: Pair) -> Pair:
        if not isinstance(pair.truth, Drawing):
            return pair
        shapes = (
            replace(shape, name=IGNORE_NAME) if shape.name in ignored else shape
            for shape in pair.truth.shapes
        )
        return replace(pair, truth=replace(pair.truth, shapes=tuple(shapes)))

    return replace(found, pairs=tuple(map(rename, found.pairs)))


def _describe_empty(found: DetectedLayout) -> tuple[str, ...]:
    """Say that images without shapes are background, which unfinished ones are not."""
    empty = [pair.image.name for pair in found.pairs if has_no_shapes(pair)]
    if not empty:
        return ()
    have = "has" if len(empty) == 1 else "have"
    images = format_count(len(found.pairs), "image")
    return (describe_unfinished(empty, f"{images} {have} no shapes"),)


def _decide_classes(
    folder: Path,
    found: DetectedLayout,
    encoding: MaskEncoding,
    classes: str | Path | ClassTable | None,
    settings: GlobSettings,
    infer: ClassInference,
) -> ClassDecision:
    if isinstance(classes, ClassTable):
        # These files may store other values for the same classes than the training data.
        has_same = found.classes is not None and found.classes.names == classes.names
        return ClassDecision(found.classes if has_same and found.classes else classes)
    named = Path(classes) if classes else folder / (settings.classes or "classes.toml")
    values = tuple(value for value in settings.ignore if isinstance(value, int))
    pairs = [pair for pair in found.pairs if pair.truth is None]
    if not classes and settings.classes in PUBLISHED_TABLES:
        decision = ClassDecision(PUBLISHED_TABLES[settings.classes])
    elif classes or settings.classes or named.is_file():
        decision = ClassDecision(read_classes(named))
    elif found.layout == "carla":
        table, note = distinguish_carla(pairs)
        decision = ClassDecision(table, notes=(note,) if note else ())
    elif found.classes is not None:
        decision = ClassDecision(found.classes)
    else:
        note = "" if settings.has_ignore else describe_scribbles(pairs, encoding, folder)
        decision = infer(pairs, encoding, values)
        decision = replace(decision, notes=(*filter(None, (note,)), *decision.notes))
    return replace(decision, table=_drop_ignored(decision.table, settings.ignore))


def _drop_ignored(table: ClassTable, ignore: tuple[int | str, ...]) -> ClassTable:
    """Remove ignored classes from a table, and ignore the values that masks store for them."""
    for name in ignore:
        if isinstance(name, str) and name not in table.names:
            raise DataError(
                f"dataset.toml ignores the class {name!r}, but the classes are "
                f"{', '.join(table.names)}{suggest(name, table.names)}"
            )
    kept = [k for k in range(len(table)) if not {table.names[k], table.stored[k]} & set(ignore)]
    removed = [table.stored[k] for k in range(len(table)) if k not in kept]
    values = [value for value in ignore if isinstance(value, int)]
    ignored = dict.fromkeys((*table.ignore, *values, *removed))
    return replace(
        table,
        names=tuple(table.names[k] for k in kept),
        colors=tuple(table.colors[k] for k in kept),
        values=tuple(table.values[k] for k in kept),
        ignore=tuple(ignored),
        objects=table.objects and tuple(kept.index(k) for k in table.objects if k in kept),
    )


def _refuse_unpaired(found: DetectedLayout) -> NoReturn:
    alone, what, other, article = found.masks, "mask", "image", "an"
    advice = "pair them in a dataset.toml"
    if found.images:
        alone, what, other, article = found.images, "image", "mask", "a"
        advice += f"; {MISSING_ADVICE}"
    names = ", ".join(f"'{path}'" for path in alone[:3])
    names += f" and {len(alone) - 3} more" if len(alone) > 3 else ""
    raise DataError(
        f"{format_count(len(alone), what)} without {article} {other} ({len(found.pairs)} pairs are "
        f"complete): {names}; add the missing {other}s under the same names, remove the {what}s, "
        f"or {advice}; useg inspect DATA --fix OUT writes a copy without these {what}s"
    )


def _describe_annotations(folder: Path) -> Iterator[str]:
    """Say that there are annotation files beside masks, which were taken."""
    for path in list_files(folder, (".json", ".xml"))[:_MAX_ANNOTATION_FILES]:
        try:
            with open_file(path) as file:
                start = file.read(_END_BYTES)
                file.seek(max(0, path.stat().st_size - _END_BYTES))
                ends = start + file.read()
        except OSError:
            continue
        if _ANNOTATED.search(ends):
            yield (
                f"'{path.relative_to(folder)}' looks like annotations of these images, but "
                "useg reads the masks; to read annotations, name their files as masks in a "
                "dataset.toml, otherwise ignore this note"
            )
            return
