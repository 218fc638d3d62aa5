"""A folder of images and the masks that a person paints for them; every stroke is saved at once.

A mask is a palette PNG of class ids, with 255 for unpainted pixels. The revision of a mask is made
of its modification time, size and inode, so a mask that another program changed is never
overwritten.
"""

from __future__ import annotations

import glob
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from useg.classes import (
    IGNORE,
    ClassTable,
    Color,
    Label,
    classes_to_toml,
    count_pixels,
    read_classes,
)
from useg.data.dataset import Dataset, Pair, read_label
from useg.data.layouts import find_dataset
from useg.errors import DataError, SettingsError, UsageError
from useg.files import refuse_same_names, replacing
from useg.images.image_files import list_image_files, read_size
from useg.labelling.mask_files import (
    LabelPaths,
    check_editable,
    encode_mask,
    extend_table,
    with_ignored_value,
)
from useg.ownership import read_ends
from useg.parsing import parse_json, read_limited, shorten

STATE_NAME = ".useg-label.json"
STATES = ("empty", "scribbled", "done")
# The revision of a missing mask.
NO_REVISION = "0"

# Limits on the size of the state file; its names and scores need less.
_STATE_BYTES, _STATE_BYTES_PER_IMAGE = 1_000_000, 16_384
# For each class: correct, true and predicted pixels.
_TALLY_ROWS = 3
# Decoded masks kept in memory.
_MAX_CACHED_MASKS = 4
_DATASET_COMMENT = "# Written by useg label.\n"


class StaleMaskError(DataError):
    """The mask has changed since the page read it, so the stroke is refused."""


@dataclass
class ImageEntry:
    """An image of the folder, and the state of its mask.

    Args:
        name: The path relative to the image folder, with ``/``.
        path: The image file.
        size: ``(width, height)``.
        mask: The mask file, which may not exist yet.
        state: ``empty``, ``scribbled`` or ``done``.
        classes: The ids of the painted classes.
        was_trained_on: Whether a model has been trained on pixels of this image.
        finding: The problem that ``useg inspect`` found in the mask, or an empty string.
    """

    name: str
    path: Path
    size: tuple[int, int]
    mask: Path
    state: str = "empty"
    classes: frozenset[int] = frozenset()
    was_trained_on: bool = False
    finding: str = ""


def file_revision(path: Path) -> str:
    """Return a string that changes whenever the file is written; "0" if there is no file."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return NO_REVISION
    return f"{status.st_mtime_ns:x}-{status.st_size:x}-{status.st_ino:x}"


class LabelFolder:
    """The images, masks, classes and states of a folder; each method saves its changes to disk.

    Args:
        paths: The folders.
        classes: Class names for a folder without classes, or names to add to the existing ones.

    Raises:
        UsageError: There are no images, two images would share a mask file, or existing masks
            cannot be edited.
    """

    def __init__(self, paths: LabelPaths, classes: Sequence[str] = ()) -> None:
        self.paths = paths
        self.lock = threading.RLock()
        self.notes: list[str] = []
        self.images = self._list_images()
        self.scores: list[dict[str, Any]] = []
        # Number of changes in this session.
        self.changes = 0
        self._dataset: Dataset | None = None
        self._pairs: dict[Path, Pair] = {}
        self._labels: OrderedDict[int, tuple[str, Label]] = OrderedDict()
        self._classes_revision = file_revision(self._classes_file)
        self.table = self._load_table()
        if classes:
            self._add_classes(classes)
        self._load_states()

    @property
    def _classes_file(self) -> Path:
        return self.paths.root / "classes.toml"

    def _list_images(self) -> list[ImageEntry]:
        paths, images = self.paths, []
        names: dict[Path, str] = {}
        for path in list_image_files(paths.images):
            is_mask = path.is_relative_to(paths.masks)
            if is_mask or any(
                (folder / "run.toml").exists()
                for folder in path.parents
                if folder.is_relative_to(paths.images)
            ):
                continue
            name = path.relative_to(paths.images).as_posix()
            try:
                name.encode()
                size = read_size(path)
            except UsageError as error:
                self.notes.append(f"skipped: {error}")
                continue
            except UnicodeEncodeError:
                self.notes.append(
                    f"skipped: the name of {path!r} is not valid UTF-8; rename the file"
                )
                continue
            mask = (paths.masks / name).with_suffix(".png")
            if mask in names:
                raise DataError(
                    f"the images '{names[mask]}' and '{name}' would have the same mask, "
                    f"'{mask.name}'; rename one of them"
                )
            names[mask] = name
            images.append(ImageEntry(name, path, size, mask))
        if not images:
            raise DataError(f"'{paths.images}' contains no images; give a folder that does")
        refuse_same_names(image.mask for image in images)
        return images

    def _load_table(self) -> ClassTable | None:
        """Return the class table of the folder, and find existing masks."""
        paths = self.paths
        if paths.masks.is_dir() and list_image_files(paths.masks):
            return self._load_masks()
        return read_classes(self._classes_file) if self._classes_file.exists() else None

    def _load_masks(self) -> ClassTable:
        """Find existing masks, and check that they can be written back in their own format."""
        try:
            dataset = find_dataset(self.paths.root, strict=False)
        except DataError as error:
            raise DataError(
                f"the masks in '{self.paths.masks}' cannot be opened: {error}"
            ) from error
        pairs = {Path(os.path.realpath(pair.image)): pair for pair in dataset.pairs}
        found = [image for image in self.images if image.path in pairs]
        if not found:
            raise DataError(
                f"no mask in '{self.paths.masks}' belongs to an image in "
                f"'{self.paths.images}'; give the folder that contains their masks"
            )
        table = with_ignored_value(dataset.classes)
        self._dataset = replace(dataset, classes=table)
        for image in found:
            pair = pairs[image.path]
            image.mask = pair.mask
            self._pairs[image.path] = pair
        check_editable(self._dataset, [pairs[image.path] for image in found])
        return table

    def _add_classes(self, names: Sequence[str]) -> None:
        """Use the names of ``--classes`` for a new folder, or add them to the existing classes."""
        known = self.table.names if self.table else ()
        if tuple(names[: len(known)]) != known[: len(names)]:
            raise SettingsError(
                f"the given classes are {', '.join(names)}, but the folder already has the classes "
                f"{', '.join(known)}; give none, or append new names to these"
            )
        if len(names) > len(known):
            self.table = with_ignored_value(extend_table(self.table, [*names]))

    def mark_faulty(self, findings: Mapping[Path, str]) -> None:
        """Store the findings of ``useg inspect``, and mark these images as not done.

        Args:
            findings: Mask file -> the problem with it.
        """
        for image in self.images:
            image.finding = findings.get(Path(os.path.realpath(image.mask)), "")
            if image.finding and image.state == "done":
                image.state = "scribbled"
        if not any(image.finding for image in self.images):
            self.notes.append("useg inspect found no faulty masks in this folder")

    def use_model_classes(self, table: ClassTable) -> None:
        """Use the class names and colours of a model, for a folder without classes."""
        self.table = with_ignored_value(ClassTable(table.names, table.colors))

    def _load_states(self) -> None:
        stored = self._read_state_file()
        for k, image in enumerate(self.images):
            entry = stored.get(image.name)
            entry = entry if isinstance(entry, dict) else {}
            image.was_trained_on = entry.get("was_trained") is True
            revision = file_revision(image.mask)
            if revision == NO_REVISION:
                continue
            state, classes = entry.get("state"), entry.get("classes")
            if (
                entry.get("revision") == revision
                and state in STATES
                and isinstance(classes, list)
                and all(type(each) is int and 0 <= each < IGNORE for each in classes)
            ):
                image.state, image.classes = state, frozenset(classes)
                continue
            ids = np.flatnonzero(count_pixels(self.read(k)[0], 256))
            self._labels.pop(k, None)
            image.classes = frozenset(ids.tolist()) - {IGNORE}
            is_done = state == "done" if state in STATES else IGNORE not in ids
            image.state = "done" if is_done else "scribbled" if image.classes else "empty"

    def _read_state_file(self) -> dict[str, Any]:
        path = self.paths.masks / STATE_NAME
        try:
            content = parse_json(read_limited(path, self._max_state_bytes))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            self.notes.append(
                f"'{path}' cannot be read ({error}), so states are determined from the masks"
            )
            return {}
        content = content if isinstance(content, dict) else {}
        scores, images = content.get("scores"), content.get("pictures")
        self.scores = (
            [row for row in scores if _is_valid_score(row)] if isinstance(scores, list) else []
        )
        return images if isinstance(images, dict) else {}

    @property
    def _max_state_bytes(self) -> int:
        return _STATE_BYTES + _STATE_BYTES_PER_IMAGE * len(self.images)

    def write_states(self) -> None:
        """Save the states of all images, and the scores."""
        with self.lock:
            content = {
                "useg_label": 1,
                "pictures": {
                    image.name: {
                        "state": image.state,
                        "revision": file_revision(image.mask),
                        "classes": sorted(image.classes),
                        "was_trained": image.was_trained_on,
                    }
                    for image in self.images
                    if image.state != "empty" or image.was_trained_on
                },
                "scores": self.scores,
            }
            self.paths.masks.mkdir(parents=True, exist_ok=True)
            with replacing(self.paths.masks / STATE_NAME, self._is_state_file) as draft:
                draft.write_text(json.dumps(content), "utf-8")

    def _is_state_file(self, path: Path) -> bool:
        try:
            content = parse_json(read_ends(path, self._max_state_bytes))
        except (OSError, ValueError):
            return False
        return isinstance(content, dict) and "useg_label" in content

    def read(self, k: int) -> tuple[Label, str]:
        """Return the mask ``(H, W)`` of class ids, ``IGNORE`` where unpainted, and its revision.

        Raises:
            DataError: The mask cannot be read, or its size differs from the image's.
        """
        image = self.images[k]
        with self.lock:
            revision = file_revision(image.mask)
            cached = self._labels.get(k)
            if cached and cached[0] == revision:
                self._labels.move_to_end(k)
                return cached[1], revision
            label = self._decode(image, revision)
            self._cache(k, revision, label)
            return label, revision

    def _decode(self, image: ImageEntry, revision: str) -> Label:
        width, height = image.size
        if revision == NO_REVISION:
            return np.full((height, width), IGNORE, np.uint8)
        assert self.table
        pair = self._pairs.get(image.path, Pair(image.path, image.mask))
        own = Dataset(self.paths.root, "label", (), self.table)
        label = read_label(pair, replace(self._dataset or own, classes=self.table))
        if label.shape != (height, width):
            raise DataError(
                f"mask '{image.mask}' is {label.shape[1]}x{label.shape[0]} pixels, but its "
                f"image is {width}x{height}; fix or remove the mask"
            )
        return label

    def _cache(self, k: int, revision: str, label: Label) -> None:
        self._labels[k] = revision, label
        self._labels.move_to_end(k)
        while len(self._labels) > _MAX_CACHED_MASKS:
            self._labels.popitem(last=False)

    def patch(self, k: int, corner: tuple[int, int], part: Label, revision: str) -> str:
        """Replace a rectangle of a mask, and save the mask.

        Args:
            k: The index of the image.
            corner: Column and row of the upper left pixel.
            part: The new class ids, or ``IGNORE``, ``(h, w)``.
            revision: The revision that the page has painted on.

        Returns:
            The new revision.

        Raises:
            StaleMaskError: The mask has a different revision.
            DataError: The rectangle exceeds the image, or an id belongs to no class.
        """
        image = self.images[k]
        (x, y), (h, w), (width, height) = corner, part.shape, image.size
        if not (h and w and 0 <= x <= width - w and 0 <= y <= height - h):
            raise DataError(
                f"the rectangle {w}x{h} at ({x}, {y}) exceeds '{image.name}', which is "
                f"{width}x{height} pixels"
            )
        with self.lock:
            table = self.table
            if table is None:
                raise DataError("there are no classes yet; define at least one")
            highest = int(part[part != IGNORE].max(initial=0))
            if highest >= len(table):
                raise DataError(
                    f"the stroke uses class {highest}, but there are {len(table)} classes "
                    f"(0-{len(table) - 1})"
                )
            old, present = self.read(k)
            if present != revision:
                raise StaleMaskError(
                    f"the mask of '{image.name}' was changed by another program; the page has "
                    "reloaded it, so repeat your last stroke"
                )
            label = old.copy()
            label[y : y + h, x : x + w] = part
            return self._write(k, label, present)

    def _write(self, k: int, label: Label, revision: str) -> str:
        image = self.images[k]
        assert self.table
        counts = count_pixels(label, 256)
        classes = frozenset(np.flatnonzero(counts).tolist()) - {IGNORE}
        self.write_description()
        image.mask.parent.mkdir(parents=True, exist_ok=True)
        is_first = image.state == "empty" and bool(classes)
        if is_first:
            # Saved before the mask: a complete mask without a stored state would count as done.
            image.state = "scribbled"
            self.write_states()
        try:
            with replacing(image.mask, lambda path: file_revision(path) == revision) as draft:
                draft.write_bytes(encode_mask(label, self.table))
        except UsageError:
            image.state = "empty" if is_first else image.state
            raise
        revision = file_revision(image.mask)
        self._cache(k, revision, label)
        self.changes += 1
        state = image.state if classes else "empty"
        if is_first or (state, classes) != (image.state, image.classes):
            image.state, image.classes = state, classes
            self.write_states()
        return revision

    def set_done(self, k: int, done: bool) -> None:
        """Mark an image as done or not done."""
        with self.lock:
            image = self.images[k]
            if done and image.state == "empty":
                raise DataError(
                    f"'{image.name}' has no painted pixels; paint or accept something before "
                    "you mark it as done"
                )
            if image.state != "empty":
                image.state = "done" if done else "scribbled"
                self.changes += 1
                self.write_states()

    def set_classes(self, classes: Sequence[tuple[str, Color]]) -> None:
        """Rename, recolour or add classes; existing ids never change.

        Raises:
            DataError: A class is missing, or the table is not valid.
        """
        with self.lock:
            table = extend_table(self.table, [name for name, _ in classes])
            colors = tuple(color for _, color in classes)
            if (
                table.by_color
                and table.colors[: len(self.table or ())] != colors[: len(self.table or ())]
            ):
                raise DataError(
                    "the masks of this folder store classes as colours, so these cannot change; "
                    "change only the names"
                )
            before = self.table
            self.table = with_ignored_value(replace(table, colors=colors))
            try:
                self.write_description()
            except UsageError:
                self.table = before
                raise

    def write_description(self) -> None:
        """Write ``classes.toml``, and ``dataset.toml`` if the folder has none."""
        paths = self.paths
        assert self.table
        content = classes_to_toml(self.table)
        path = self._classes_file
        expected = self._classes_revision
        paths.masks.mkdir(parents=True, exist_ok=True)
        if expected == NO_REVISION or read_classes(path) != self.table:
            with replacing(path, lambda path: file_revision(path) == expected) as draft:
                draft.write_text(content, "utf-8")
            self._classes_revision = file_revision(path)
        described = paths.root / "dataset.toml"
        if not os.path.lexists(described) and not self._dataset:
            with replacing(described, lambda path: False) as draft:
                draft.write_text(_dataset_toml(paths, self.images), "utf-8")


def _is_valid_score(row: Any) -> bool:
    """Whether a row of the state file is a valid score, as ``Rounds`` writes it."""
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        return False
    tally = row.get("tally")
    return (
        isinstance(tally, list)
        and len(tally) == _TALLY_ROWS
        and all(isinstance(counts, list) and len(counts) == len(tally[0]) for counts in tally)
        and 1 <= len(tally[0]) <= IGNORE
        and all(type(count) is int and 0 <= count < 1 << 40 for counts in tally for count in counts)
    )


def _dataset_toml(paths: LabelPaths, images: Sequence[ImageEntry]) -> str:
    """Return the text of a ``dataset.toml`` that lets ``useg train`` find images and masks."""

    def pattern(folder: Path, suffix: str) -> str:
        path = Path(os.path.relpath(folder, paths.root)).as_posix()
        is_nested = any("/" in image.name for image in images)
        start = "" if path == "." else f"{glob.escape(path)}/"
        return json.dumps(f"{start}{'**/' if is_nested else ''}*{suffix}", ensure_ascii=False)

    suffixes = {image.path.suffix for image in images}
    is_common = {suffix.casefold() for suffix in suffixes} <= {".jpg", ".jpeg", ".png"}
    suffix = suffixes.pop() if len(suffixes) == 1 else ".[jJpP]*[gG]" if is_common else ""
    return (
        f"{_DATASET_COMMENT}images = {pattern(paths.images, suffix)}\n"
        f"masks = {pattern(paths.masks, '.png')}\n"
        "# Skip images without a mask.\n"
        'missing = "skip"\n'
    )


def split_names(text: str) -> list[str]:
    """Split the value of ``--classes`` into names.

    Raises:
        SettingsError: A name is empty or given twice.

    >>> split_names("road, sky")
    ['road', 'sky']
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if not name or names.count(name) > 1:
            raise SettingsError(
                f"--classes {shorten(text)} contains "
                f"{f'{name!r} twice' if name else 'an empty name'}; give each name once, such as "
                "road,sky"
            )
    return names
