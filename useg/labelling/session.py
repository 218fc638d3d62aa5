"""A labelling session: a folder, its rounds, the final training, and the browser that edits.

All methods take and return plain values; the HTTP application is a thin layer on top.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from useg.classes import Color, Label, classes_to_toml
from useg.errors import DataError, UsageError
from useg.images.image_files import encode_label, encode_picture, read_image
from useg.inference.summaries import LabelledImage, write_coco
from useg.labelling.folder import LabelFolder
from useg.labelling.mask_files import encode_mask
from useg.labelling.regions import Superpixels, find_superpixels, propose_region, superpixel_at
from useg.labelling.rounds import ROUND_COMMAND, Rounds, downscale_image
from useg.parsing import open_file
from useg.visualization import to_picture

# A browser that has not polled the state for this long is considered closed.
EDITOR_SECONDS = 8.0
THUMBNAIL_SIZE = (160, 120)
# The most clicks in one request for a region.
MAX_CLICKS = 200
_MAX_CACHED_VIEWS = 4
_MAX_CACHED_IMAGES = 2
_SHOWN_AS_STORED = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png"}

# Run folders of the final training, and the subfolder of the scored model.
RUN_NAME, SCORED_NAME = "useg-run", "scored"
# Share of the time in which the scored model trains.
SCORED_SHARE = 0.25
# Lines of output to keep.
_MAX_LINES = 200
_CLOSE_SECONDS = 10


class EditorError(DataError):
    """Another browser has taken over editing."""


class LabelSession:
    """The state of one ``useg label``.

    Args:
        folder: The images and masks.
        rounds: The training in rounds.
        prefill: Whether the mask of each image starts with the prediction of the model.
    """

    def __init__(
        self,
        folder: LabelFolder,
        rounds: Rounds,
        *,
        prefill: bool = False,
    ) -> None:
        self.folder = folder
        self.rounds = rounds
        self.training = FinalTraining(folder, rounds)
        self.prefill = prefill
        self.is_shutting_down = False
        self._editor = ""
        self._editor_seen = -math.inf
        self._lock = threading.Lock()
        self._images: OrderedDict[int, NDArray[Any]] = OrderedDict()
        self._cached_superpixels: OrderedDict[tuple[int, ...], Superpixels] = OrderedDict()
        self._thumbnails: dict[int, bytes] = {}

    def join(self, key: str, *, take: bool) -> bool:
        """Register a browser; return whether it may edit: no other one does, or it takes over."""
        with self._lock:
            is_free = time.monotonic() - self._editor_seen > EDITOR_SECONDS
            if take or is_free:
                self._editor, self._editor_seen = key, time.monotonic()
            return self._editor == key

    def check_editor(self, key: str) -> None:
        """Check that a browser may edit.

        Raises:
            EditorError: Another browser is editing.
        """
        with self._lock:
            if not key or key != self._editor:
                raise EditorError(
                    "another browser is editing this folder; take over to continue here (its "
                    "strokes are saved)"
                )
            self._editor_seen = time.monotonic()

    def state(self, key: str) -> dict[str, Any]:
        """Return what the page polls: states, priorities, and the progress of training."""
        with self._lock:
            is_editor = bool(key) and key == self._editor
            if is_editor:
                self._editor_seen = time.monotonic()
        rounds, images = self.rounds, self.folder.images
        return {
            "editor": is_editor,
            "states": [each.state for each in images],
            "priorities": [rounds.priority(k) for k in range(len(images))],
            "waits_for": rounds.waits_for(),
            "phase": rounds.status.phase,
            "step": rounds.status.step,
            "steps": rounds.status.steps,
            "error": rounds.status.error,
            "round": rounds.number if rounds.has_model else None,
            "curve": rounds.score_curve(),
            "training": self.training.state(),
        }

    def paint(self, k: int, corner: tuple[int, int], part: Label, revision: str) -> str:
        """Replace a rectangle of a mask; see :meth:`useg.labelling.folder.LabelFolder.patch`."""
        self.rounds.store_prediction(k)
        revision = self.folder.patch(k, corner, part, revision)
        self.rounds.notify()
        return revision

    def set_done(self, k: int, done: bool) -> None:
        """Mark an image as done or not done, and score the model on it."""
        self.folder.set_done(k, done)
        if done:
            self.rounds.score_finished(k)
        self.rounds.notify()

    def set_classes(self, classes: Any) -> None:
        """Set the classes, given as a list of ``{"name": ..., "color": "#rrggbb"}``.

        Raises:
            DataError: The list is not valid.
        """
        if not isinstance(classes, list) or not all(isinstance(each, dict) for each in classes):
            raise DataError("classes must be a list of objects with a name and a color")
        chosen = []
        for each in classes:
            name, color = each.get("name"), each.get("color")
            if not isinstance(name, str) or not name.strip() or not name.isprintable():
                raise DataError("a class has no printable name; name each class")
            if not isinstance(color, str) or not re.fullmatch(r"#[0-9a-fA-F]{6}", color):
                raise DataError(f"the colour of the class {name!r} is not of the form #3060ff")
            chosen.append((name.strip(), _rgb(color)))
        names = [name for name, _ in chosen]
        if len(set(names)) < len(names):
            raise DataError("two classes have the same name; give each class a different one")
        self.folder.set_classes(chosen)
        self.rounds.notify()

    def image_for_browser(self, k: int) -> tuple[bytes, str]:
        """Return an image as a file that browsers can show, and its media type."""
        path = self.folder.images[k].path
        media_type = _SHOWN_AS_STORED.get(path.suffix.lower())
        content = _read_plain(path) if media_type else None
        if media_type and content is not None:
            return content, media_type
        return encode_picture(to_picture(self._image(k))), "image/png"

    def thumbnail(self, k: int) -> bytes:
        """Return a small JPEG."""
        if k not in self._thumbnails:
            path = self.folder.images[k].path
            width, height = THUMBNAIL_SIZE
            small = to_picture(downscale_image(read_image(path), 2 * width * height))
            target = io.BytesIO()
            image = PIL.Image.fromarray(small)
            image.thumbnail(THUMBNAIL_SIZE)
            image.save(target, "JPEG", quality=80)
            self._thumbnails[k] = target.getvalue()
        return self._thumbnails[k]

    def _image(self, k: int) -> NDArray[Any]:
        with self._lock:
            if k in self._images:
                self._images.move_to_end(k)
                return self._images[k]
        image = read_image(self.folder.images[k].path)
        with self._lock:
            self._images[k] = image
            while len(self._images) > _MAX_CACHED_IMAGES:
                self._images.popitem(last=False)
        return image

    def find_region(
        self, k: int, wanted: Mapping[str, Any]
    ) -> tuple[tuple[int, int], NDArray[np.bool_]]:
        """Return the region that clicks select: its upper left corner, and its pixels.

        Args:
            k: The index of the image.
            wanted: ``view`` (the visible part of the image, [x, y, width, height]), ``kind``
                (``superpixel`` or ``object``), ``inside`` and ``outside`` (lists of [x, y]).
                Without clicks, only the superpixels of the view are prepared.

        Raises:
            DataError: The view exceeds the image, or a click is outside the view.
        """
        width, height = self.folder.images[k].size
        x, y, w, h = _whole_numbers(wanted.get("view"), 4)
        if not (w > 0 and h > 0 and 0 <= x <= width - w and 0 <= y <= height - h):
            raise DataError(f"the view exceeds the image, which is {width}x{height} pixels")
        inside, outside = (
            _clicks(wanted.get(name, []), x, y, w, h) for name in ("inside", "outside")
        )
        superpixels = self._superpixels(k, (x, y, w, h))
        if not inside:
            return (x, y), np.zeros((0, 0), bool)
        if wanted.get("kind") == "superpixel":
            region = superpixel_at(superpixels, inside[-1])
        else:
            region = propose_region(superpixels, inside, outside)
        rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
        top, left = int(rows[0]), int(columns[0])
        part = region[top : rows[-1] + 1, left : columns[-1] + 1]
        return (x + left, y + top), part

    def _superpixels(self, k: int, view: tuple[int, int, int, int]) -> Superpixels:
        key = (k, self.rounds.number, *view)
        with self._lock:
            if key in self._cached_superpixels:
                self._cached_superpixels.move_to_end(key)
                return self._cached_superpixels[key]
        x, y, w, h = view
        found = find_superpixels(
            self._image(k)[y : y + h, x : x + w], self._class_confidence(k, view)
        )
        with self._lock:
            self._cached_superpixels[key] = found
            while len(self._cached_superpixels) > _MAX_CACHED_VIEWS:
                self._cached_superpixels.popitem(last=False)
        return found

    def _class_confidence(
        self, k: int, view: tuple[int, int, int, int]
    ) -> NDArray[np.float32] | None:
        """Return the confidence in the predicted class, one plane per class, for a view."""
        try:
            suggestion = self.rounds.suggest(k)
        except UsageError:
            return None
        if suggestion is None or self.folder.table is None:
            return None
        (width, height), (h, w) = self.folder.images[k].size, suggestion.ids.shape
        rows = slice(view[1] * h // height, max(1, math.ceil((view[1] + view[3]) * h / height)))
        columns = slice(view[0] * w // width, max(1, math.ceil((view[0] + view[2]) * w / width)))
        ids = suggestion.ids[rows, columns]
        sure = suggestion.confidence[rows, columns].astype(np.float32) / 255
        return np.stack([np.where(ids == c, sure, 0) for c in range(len(self.folder.table))])

    def zip_masks(self) -> bytes:
        """Return a zip file with the masks of all painted images and the class table."""
        folder = self.folder
        target = io.BytesIO()
        with folder.lock, zipfile.ZipFile(target, "w") as archive:
            if folder.table is not None:
                archive.writestr("classes.toml", classes_to_toml(folder.table))
            for k, image in enumerate(folder.images):
                if image.state != "empty" and folder.table is not None:
                    name = Path(image.name).with_suffix(".png").as_posix()
                    archive.writestr(f"masks/{name}", encode_mask(folder.read(k)[0], folder.table))
        return target.getvalue()

    def coco(self) -> bytes:
        """Return the painted regions as COCO JSON."""
        folder = self.folder
        if folder.table is None:
            raise DataError("there is nothing to export; define classes and paint first")
        with tempfile.TemporaryDirectory() as place, folder.lock:
            entries: list[LabelledImage] = []
            for k, image in enumerate(folder.images):
                if image.state == "empty":
                    continue
                label = Path(place, f"{k}.png")
                label.write_bytes(encode_label(folder.read(k)[0], folder.table))
                entries.append(LabelledImage(len(entries) + 1, Path(image.name), label, image.name))
            write_coco(Path(place, "coco.json"), entries, folder.table)
            return Path(place, "coco.json").read_bytes()

    def close(self) -> None:
        """Stop all background work."""
        self.is_shutting_down = True
        self.training.close()
        self.rounds.stop()


def _read_plain(path: Path) -> bytes | None:
    """Read a file that browsers display with the same pixels as useg: 8 bits, no alpha channel.

    Returns None for other files.
    """
    try:
        # Read only once, so that the bytes that are checked are the bytes that are sent.
        with open_file(path) as file:
            content = file.read()
        with PIL.Image.open(io.BytesIO(content), formats=["JPEG", "PNG"]) as image:
            is_plain = image.mode in ("L", "RGB") and image.info.get("transparency") is None
            return content if is_plain else None
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError):
        return None


def _rgb(color: str) -> Color:
    red, green, blue = bytes.fromhex(color[1:])
    return red, green, blue


def _whole_numbers(value: Any, count: int) -> list[int]:
    if (
        not isinstance(value, list)
        or len(value) != count
        or any(isinstance(each, bool) or not isinstance(each, int) for each in value)
    ):
        raise DataError(f"expected a list of {count} integers")
    return value


def _clicks(value: Any, x: int, y: int, w: int, h: int) -> list[tuple[int, int]]:
    if not isinstance(value, list) or len(value) > MAX_CLICKS:
        raise DataError(f"clicks must be a list of at most {MAX_CLICKS} points")
    points = [_whole_numbers(point, 2) for point in value]
    if any(not (x <= column < x + w and y <= row < y + h) for column, row in points):
        raise DataError("a click is outside the view")
    return [(column - x, row - y) for column, row in points]


class FinalTraining:
    """The final training, for the chosen number of minutes; rounds pause meanwhile.

    First, ``useg train`` trains a model on the folder. It holds out some of the painted images to
    write a score and a report. Then the model of the last round trains on all painted images.
    """

    def __init__(self, folder: LabelFolder, rounds: Rounds) -> None:
        self._folder = folder
        self._rounds = rounds
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[str] | None = None
        self._lines: list[str] = []
        self._out: Path | None = None
        self._began = 0.0
        self._minutes = 0.0
        self._is_stopped = self._has_failed = False
        self._lock = threading.Lock()

    def start(self, minutes: float) -> None:
        """Start training.

        Raises:
            DataError: Training is running already, or there are fewer than two images.
        """
        with self._lock:
            if self._is_running:
                raise DataError("training is already running; wait for it to finish, or stop it")
            if len(self._rounds.trainable()) < 2:
                action = self._rounds.required_action
                raise DataError(f"training needs at least two images; {action} another image")
            root = self._folder.paths.root
            numbered = (root / f"{RUN_NAME}-{number}" for number in range(1, 1 << 20))
            # A broken link takes a name, too.
            self._out = next(path for path in numbered if not os.path.lexists(path))
            self._lines, self._began, self._minutes = [], time.monotonic(), minutes
            self._is_stopped = self._has_failed = False
            self._rounds.paused = True
            self._thread = threading.Thread(target=self._train, args=(self._out,), daemon=True)
            self._thread.start()

    @property
    def _is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _train(self, out: Path) -> None:
        try:
            self._has_failed = not (self._train_scored(out) and self._train_final_model(out))
        finally:
            self._rounds.paused = False
            self._rounds.notify()

    def _train_scored(self, out: Path) -> bool:
        minutes = SCORED_SHARE * self._minutes
        root, scored = str(self._folder.paths.root), str(out / SCORED_NAME)
        options = ["--out", scored, "--minutes", f"{minutes:g}", "--force"]
        return self._run([sys.executable, "-m", "useg", "train", root, *options])

    def _train_final_model(self, out: Path) -> bool:
        # Wait for the current round: training starts from its model.
        while self._rounds.status.phase != "waiting" and not self._is_stopped:
            time.sleep(0.1)
        task = self._rounds.final_training_task(out, (1 - SCORED_SHARE) * self._minutes)
        return self._run(ROUND_COMMAND, json.dumps({**task, "scored": str(out / SCORED_NAME)}))

    def _run(self, command: Sequence[str], task: str = "") -> bool:
        """Run a process, unless training was stopped; return whether it succeeded."""
        with self._lock:
            if self._is_stopped:
                return False
            self._process = process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
        assert process.stdin
        assert process.stdout
        with process:
            # A process that has already failed does not read its task.
            with suppress(BrokenPipeError):
                process.stdin.write(task + "\n")
                process.stdin.flush()
            for line in process.stdout:
                self._lines = [*self._lines, _format_progress(line.rstrip())][-_MAX_LINES:]
        return process.returncode == 0

    def stop(self) -> None:
        """Stop training; the model trained so far and the model of the rounds are kept."""
        with self._lock:
            self._is_stopped = True
            if self._process and self._process.poll() is None:
                self._process.terminate()

    def close(self) -> None:
        """Stop training, and wait a moment until its model is saved."""
        self.stop()
        if self._thread:
            self._thread.join(_CLOSE_SECONDS)

    def state(self) -> dict[str, Any] | None:
        """Return the progress for the page, or None before the first training."""
        if self._out is None:
            return None
        running = self._is_running
        elapsed = time.monotonic() - self._began
        return {
            "running": running,
            "failed": not running and self._has_failed,
            "share": min(1.0, elapsed / (60 * self._minutes)) if running else 1.0,
            "line": next((line for line in reversed(self._lines) if line), ""),
            "out": str(self._out),
            "report": self._report.exists(),
        }

    @property
    def _report(self) -> Path:
        assert self._out
        return self._out / SCORED_NAME / "report.html"

    def report(self) -> bytes:
        """Return the report of the last training.

        Raises:
            DataError: There is no report.
        """
        if self._out is None or not self._report.exists():
            raise DataError("there is no report yet; start training first")
        return self._report.read_bytes()


def _format_progress(line: str) -> str:
    """Return a line of output as text; the round process reports its progress as JSON."""
    try:
        said = json.loads(line)
    except ValueError:
        return line
    if not isinstance(said, dict):
        return line
    if "step" in said:
        return f"training on all painted images: step {said['step']} of {said['steps']}"
    return str(said.get("said") or said.get("error") or "")
