"""A folder of pictures and its masks, while somebody paints them: every stroke is written at once.

A mask is a palette PNG of class ids, 255 where nothing is painted. Its revision is what the file
system says about the file, so a mask that anybody else has changed is never overwritten.
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
from useg.images.files import list_image_files, read_size
from useg.labelling.mask_format import check_editable, encode_mask, extend_table, with_ignored_value
from useg.ownership import read_ends
from useg.parsing import parse_json, read_limited, shorten

STATE_NAME = ".useg-label.json"
STATES = ("empty", "scribbled", "done")
# The revision of a mask that does not exist.
NO_REVISION = "0"

# Of the file of states: names and scores take less.
_STATE_BYTES, _STATE_BYTES_PER_PICTURE = 1_000_000, 16_384
# Of each class: the correct, true and predicted pixels.
_TALLIED = 3
# Decoded masks in memory.
_MAX_CACHED_MASKS = 4
_DATASET_COMMENT = "# Written by useg label.\n"


class StaleMaskError(DataError):
    """A mask has changed since the page read it, so a stroke on the old one is refused."""


@dataclass(frozen=True)
class LabelPlace:
    """Where pictures and masks lie.

    Args:
        pictures: Folder of the pictures.
        masks: Folder of the masks.
        root: Folder that ``useg train`` reads: it holds ``dataset.toml`` and ``classes.toml``.
    """

    pictures: Path
    masks: Path
    root: Path


def find_place(pictures: Path, masks: Path | None = None) -> LabelPlace:
    """Return where the masks of a folder of pictures lie.

    Beside a folder called ``images`` they lie in ``masks``; elsewhere in the folder ``masks`` among
    the pictures; or where the user says.

    Raises:
        DataError: There is no such folder of pictures, or the masks would mix with them.
    """
    if not pictures.is_dir():
        raise DataError(f"'{pictures}' is not a folder; give the folder that holds the images")
    pictures = Path(os.path.realpath(pictures))
    if masks is None:
        beside = pictures.name.casefold() == "images"
        root = pictures.parent if beside else pictures
        return LabelPlace(pictures, root / "masks", root)
    masks = Path(os.path.realpath(masks))
    if masks == pictures or pictures.is_relative_to(masks):
        raise DataError(
            f"the masks would lie among the images in '{masks}'; give another folder of masks"
        )
    siblings = masks.parent in (pictures.parent, pictures)
    return LabelPlace(pictures, masks, masks.parent if siblings else masks)


@dataclass
class LabelPicture:
    """A picture that is or will be labelled.

    Args:
        name: Path below the folder of pictures, with ``/``.
        path: The file.
        size: ``(width, height)``.
        mask: The file of its mask, which need not exist.
        state: ``empty``, ``scribbled`` or ``done``.
        classes: Ids that are painted.
        was_trained: Whether a model has seen some of its pixels.
        finding: What ``useg inspect`` says about its mask; empty if nothing.
    """

    name: str
    path: Path
    size: tuple[int, int]
    mask: Path
    state: str = "empty"
    classes: frozenset[int] = frozenset()
    was_trained: bool = False
    finding: str = ""


def file_revision(path: Path) -> str:
    """Return a text that changes whenever a file is replaced or written; "0" if there is none."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return NO_REVISION
    return f"{status.st_mtime_ns:x}-{status.st_size:x}-{status.st_ino:x}"


class LabelFolder:
    """Pictures, masks, classes and states of a folder; every change is on disk when a call returns.

    Args:
        place: Where everything lies.
        classes: Names of the classes for a folder that has none yet, or to be added to it.

    Raises:
        UsageError: There are no pictures, two have one name, or the masks that exist cannot be
            edited.
    """

    def __init__(self, place: LabelPlace, classes: Sequence[str] = ()) -> None:
        self.place = place
        self.lock = threading.RLock()
        self.notes: list[str] = []
        self.pictures = self._list_pictures()
        self.scores: list[dict[str, Any]] = []
        # Counts the strokes of this session.
        self.changes = 0
        self._dataset: Dataset | None = None
        self._pairs: dict[Path, Pair] = {}
        self._labels: OrderedDict[int, tuple[str, Label]] = OrderedDict()
        self._classes_revision = file_revision(self._classes_file)
        self.table = self._open_table()
        if classes:
            self._use_names(classes)
        self._open_states()

    @property
    def _classes_file(self) -> Path:
        return self.place.root / "classes.toml"

    def _list_pictures(self) -> list[LabelPicture]:
        place, pictures = self.place, []
        names: dict[Path, str] = {}
        for path in list_image_files(place.pictures):
            is_mask = path.is_relative_to(place.masks)
            if is_mask or any(
                (folder / "run.toml").exists()
                for folder in path.parents
                if folder.is_relative_to(place.pictures)
            ):
                continue
            name = path.relative_to(place.pictures).as_posix()
            try:
                name.encode()
                size = read_size(path)
            except UsageError as error:
                self.notes.append(f"left out: {error}")
                continue
            except UnicodeEncodeError:
                self.notes.append(f"left out: the name of {path!r} is not UTF-8; rename the file")
                continue
            mask = (place.masks / name).with_suffix(".png")
            if mask in names:
                raise DataError(
                    f"the images '{names[mask]}' and '{name}' would have the same mask, "
                    f"'{mask.name}'; rename one of them"
                )
            names[mask] = name
            pictures.append(LabelPicture(name, path, size, mask))
        if not pictures:
            raise DataError(
                f"there is no image in '{place.pictures}'; give a folder that holds images"
            )
        refuse_same_names(picture.mask for picture in pictures)
        return pictures

    def _open_table(self) -> ClassTable | None:
        """Return the classes of the folder, and find the masks that exist."""
        place = self.place
        if place.masks.is_dir() and list_image_files(place.masks):
            return self._open_masks()
        return read_classes(self._classes_file) if self._classes_file.exists() else None

    def _open_masks(self) -> ClassTable:
        """Find the masks that exist, and check that they can be written as they are stored."""
        try:
            dataset = find_dataset(self.place.root, strict=False)
        except DataError as error:
            raise DataError(
                f"the masks in '{self.place.masks}' cannot be opened: {error}"
            ) from error
        pairs = {Path(os.path.realpath(pair.image)): pair for pair in dataset.pairs}
        found = [picture for picture in self.pictures if picture.path in pairs]
        if not found:
            raise DataError(
                f"no mask in '{self.place.masks}' belongs to an image in "
                f"'{self.place.pictures}'; give the folder of their masks"
            )
        table = with_ignored_value(dataset.classes)
        self._dataset = replace(dataset, classes=table)
        for picture in found:
            pair = pairs[picture.path]
            picture.mask = pair.mask
            self._pairs[picture.path] = pair
        check_editable(self._dataset, [pairs[picture.path] for picture in found])
        return table

    def _use_names(self, names: Sequence[str]) -> None:
        """Take the names of ``--classes``: for a new folder, or to add classes to an old one."""
        known = self.table.names if self.table else ()
        if tuple(names[: len(known)]) != known[: len(names)]:
            raise SettingsError(
                f"the given classes are {', '.join(names)}, but the folder has the classes "
                f"{', '.join(known)}; leave them out, or add new names behind these"
            )
        if len(names) > len(known):
            self.table = with_ignored_value(extend_table(self.table, [*names]))

    def mark_faulty(self, findings: Mapping[Path, str]) -> None:
        """Show pictures first whose masks have findings, and as not done.

        Args:
            findings: Mask file -> what is wrong with it.
        """
        for picture in self.pictures:
            picture.finding = findings.get(Path(os.path.realpath(picture.mask)), "")
            if picture.finding and picture.state == "done":
                picture.state = "scribbled"
        if not any(picture.finding for picture in self.pictures):
            self.notes.append("useg inspect finds no faulty mask here")

    def use_model_classes(self, table: ClassTable) -> None:
        """Take names and colours of a model's classes, for a folder that has none."""
        self.table = with_ignored_value(ClassTable(table.names, table.colors))

    def _open_states(self) -> None:
        stored = self._read_state_file()
        for k, picture in enumerate(self.pictures):
            entry = stored.get(picture.name)
            entry = entry if isinstance(entry, dict) else {}
            picture.was_trained = entry.get("was_trained") is True
            revision = file_revision(picture.mask)
            if revision == NO_REVISION:
                continue
            state, classes = entry.get("state"), entry.get("classes")
            if (
                entry.get("revision") == revision
                and state in STATES
                and isinstance(classes, list)
                and all(type(each) is int and 0 <= each < IGNORE for each in classes)
            ):
                picture.state, picture.classes = state, frozenset(classes)
                continue
            ids = np.flatnonzero(count_pixels(self.read(k)[0], 256))
            self._labels.pop(k, None)
            picture.classes = frozenset(ids.tolist()) - {IGNORE}
            is_done = state == "done" if state in STATES else IGNORE not in ids
            picture.state = "done" if is_done else "scribbled" if picture.classes else "empty"

    def _read_state_file(self) -> dict[str, Any]:
        path = self.place.masks / STATE_NAME
        try:
            content = parse_json(read_limited(path, self._max_state_bytes))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            self.notes.append(f"'{path}' cannot be read ({error}), so the states are found anew")
            return {}
        content = content if isinstance(content, dict) else {}
        scores, pictures = content.get("scores"), content.get("pictures")
        self.scores = [row for row in scores if _is_score(row)] if isinstance(scores, list) else []
        return pictures if isinstance(pictures, dict) else {}

    @property
    def _max_state_bytes(self) -> int:
        return _STATE_BYTES + _STATE_BYTES_PER_PICTURE * len(self.pictures)

    def write_states(self) -> None:
        """Write the states of all pictures, and the scores."""
        with self.lock:
            content = {
                "useg_label": 1,
                "pictures": {
                    picture.name: {
                        "state": picture.state,
                        "revision": file_revision(picture.mask),
                        "classes": sorted(picture.classes),
                        "was_trained": picture.was_trained,
                    }
                    for picture in self.pictures
                    if picture.state != "empty" or picture.was_trained
                },
                "scores": self.scores,
            }
            self.place.masks.mkdir(parents=True, exist_ok=True)
            with replacing(self.place.masks / STATE_NAME, self._is_state_file) as draft:
                draft.write_text(json.dumps(content), "utf-8")

    def _is_state_file(self, path: Path) -> bool:
        try:
            content = parse_json(read_ends(path, self._max_state_bytes))
        except (OSError, ValueError):
            return False
        return isinstance(content, dict) and "useg_label" in content

    def read(self, k: int) -> tuple[Label, str]:
        """Read the mask of a picture: class ids ``(H, W)``, ``IGNORE`` where unpainted; revision.

        Raises:
            DataError: The mask cannot be read, or has another size than the picture.
        """
        picture = self.pictures[k]
        with self.lock:
            revision = file_revision(picture.mask)
            cached = self._labels.get(k)
            if cached and cached[0] == revision:
                self._labels.move_to_end(k)
                return cached[1], revision
            label = self._decode(picture, revision)
            self._keep(k, revision, label)
            return label, revision

    def _decode(self, picture: LabelPicture, revision: str) -> Label:
        width, height = picture.size
        if revision == NO_REVISION:
            return np.full((height, width), IGNORE, np.uint8)
        assert self.table
        pair = self._pairs.get(picture.path, Pair(picture.path, picture.mask))
        own = Dataset(self.place.root, "label", (), self.table)
        label = read_label(pair, replace(self._dataset or own, classes=self.table))
        if label.shape != (height, width):
            raise DataError(
                f"mask '{picture.mask}' is {label.shape[1]}x{label.shape[0]} pixels, but its "
                f"image is {width}x{height}; correct or remove it"
            )
        return label

    def _keep(self, k: int, revision: str, label: Label) -> None:
        self._labels[k] = revision, label
        self._labels.move_to_end(k)
        while len(self._labels) > _MAX_CACHED_MASKS:
            self._labels.popitem(last=False)

    def patch(self, k: int, corner: tuple[int, int], part: Label, revision: str) -> str:
        """Change a rectangle of a mask, and write the mask.

        Args:
            k: The picture.
            corner: Column and row of the upper left pixel.
            part: Class ids and ``IGNORE``, ``(h, w)``.
            revision: The revision that was painted on.

        Returns:
            The new revision.

        Raises:
            StaleMaskError: The mask has another revision.
            DataError: The rectangle is not inside the picture, or an id is no class.
        """
        picture = self.pictures[k]
        (x, y), (h, w), (width, height) = corner, part.shape, picture.size
        if not (h and w and 0 <= x <= width - w and 0 <= y <= height - h):
            raise DataError(
                f"the rectangle {w}x{h} at ({x}, {y}) is not inside of '{picture.name}' with its "
                f"{width}x{height} pixels"
            )
        with self.lock:
            table = self.table
            if table is None:
                raise DataError("there are no classes yet; name at least one")
            highest = int(part[part != IGNORE].max(initial=0))
            if highest >= len(table):
                raise DataError(
                    f"a stroke has the class {highest}, but there are {len(table)} classes "
                    f"(0-{len(table) - 1})"
                )
            old, present = self.read(k)
            if present != revision:
                raise StaleMaskError(
                    f"the mask of '{picture.name}' has changed since this page read it; it is "
                    "loaded again"
                )
            label = old.copy()
            label[y : y + h, x : x + w] = part
            return self._write(k, label, present)

    def _write(self, k: int, label: Label, revision: str) -> str:
        picture = self.pictures[k]
        assert self.table
        counts = count_pixels(label, 256)
        classes = frozenset(np.flatnonzero(counts).tolist()) - {IGNORE}
        self.describe()
        picture.mask.parent.mkdir(parents=True, exist_ok=True)
        is_first = picture.state == "empty" and bool(classes)
        if is_first:
            # Before the mask: a mask of an unknown state that covers everything counts as done.
            picture.state = "scribbled"
            self.write_states()
        try:
            with replacing(picture.mask, lambda path: file_revision(path) == revision) as draft:
                draft.write_bytes(encode_mask(label, self.table))
        except UsageError:
            picture.state = "empty" if is_first else picture.state
            raise
        revision = file_revision(picture.mask)
        self._keep(k, revision, label)
        self.changes += 1
        state = picture.state if classes else "empty"
        if is_first or (state, classes) != (picture.state, picture.classes):
            picture.state, picture.classes = state, classes
            self.write_states()
        return revision

    def set_done(self, k: int, done: bool) -> None:
        """Say whether a picture is finished."""
        with self.lock:
            picture = self.pictures[k]
            if done and picture.state == "empty":
                raise DataError(
                    f"nothing is painted in '{picture.name}'; paint or accept something before it "
                    "is done"
                )
            if picture.state != "empty":
                picture.state = "done" if done else "scribbled"
                self.changes += 1
                self.write_states()

    def set_classes(self, classes: Sequence[tuple[str, Color]]) -> None:
        """Rename, recolour or add classes; ids stay.

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
                    "the masks of this folder store colours, so the colours of classes cannot "
                    "change; change only names"
                )
            before = self.table
            self.table = with_ignored_value(replace(table, colors=colors))
            try:
                self.describe()
            except UsageError:
                self.table = before
                raise

    def describe(self) -> None:
        """Write ``classes.toml`` and, where there is none, ``dataset.toml``."""
        place = self.place
        assert self.table
        content = classes_to_toml(self.table)
        path = self._classes_file
        expected = self._classes_revision
        place.masks.mkdir(parents=True, exist_ok=True)
        if expected == NO_REVISION or read_classes(path) != self.table:
            with replacing(path, lambda path: file_revision(path) == expected) as draft:
                draft.write_text(content, "utf-8")
            self._classes_revision = file_revision(path)
        described = place.root / "dataset.toml"
        if not os.path.lexists(described) and not self._dataset:
            with replacing(described, lambda path: False) as draft:
                draft.write_text(_dataset_toml(place, self.pictures), "utf-8")


def _is_score(row: Any) -> bool:
    """Whether a row of the file of states is the score of a picture, as ``Rounds`` writes it."""
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        return False
    tally = row.get("tally")
    return (
        isinstance(tally, list)
        and len(tally) == _TALLIED
        and all(isinstance(counts, list) and len(counts) == len(tally[0]) for counts in tally)
        and 1 <= len(tally[0]) <= IGNORE
        and all(type(count) is int and 0 <= count < 1 << 40 for counts in tally for count in counts)
    )


def _dataset_toml(place: LabelPlace, pictures: Sequence[LabelPicture]) -> str:
    """Return a ``dataset.toml`` by which ``useg train`` finds pictures and masks."""

    def pattern(folder: Path, suffix: str) -> str:
        path = Path(os.path.relpath(folder, place.root)).as_posix()
        below = any("/" in picture.name for picture in pictures)
        start = "" if path == "." else f"{glob.escape(path)}/"
        return json.dumps(f"{start}{'**/' if below else ''}*{suffix}", ensure_ascii=False)

    suffixes = {picture.path.suffix for picture in pictures}
    usual = {suffix.casefold() for suffix in suffixes} <= {".jpg", ".jpeg", ".png"}
    suffix = suffixes.pop() if len(suffixes) == 1 else ".[jJpP]*[gG]" if usual else ""
    return (
        f"{_DATASET_COMMENT}images = {pattern(place.pictures, suffix)}\n"
        f"masks = {pattern(place.masks, '.png')}\n"
        "# Images that are not painted yet are left out.\n"
        'missing = "skip"\n'
    )


def name_list(text: str) -> list[str]:
    """Split the names of ``--classes``.

    Raises:
        SettingsError: A name is empty or given twice.

    >>> name_list("road, sky")
    ['road', 'sky']
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if not name or names.count(name) > 1:
            raise SettingsError(
                f"the classes {shorten(text)} have "
                f"{f'{name!r} twice' if name else 'an empty name'}; give each class once, such as "
                "road,sky"
            )
    return names
