"""One labelling session: a folder, its rounds, its training, who edits, what the page asks for.

Everything here takes and returns plain values; the HTTP application is a thin layer above it.
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
from useg.images.files import encode_label, encode_picture, read_image
from useg.inference.annotation_tools import LabelledImage
from useg.inference.summaries import write_coco
from useg.labelling.folder import LabelFolder
from useg.labelling.mask_format import encode_mask
from useg.labelling.regions import Superpixels, find_superpixels, propose_region, superpixel_at
from useg.labelling.rounds import ROUND_COMMAND, Rounds, reduce_image
from useg.parsing import open_file
from useg.pictures import to_picture
from useg.serving.middleware import RequestLog

# A browser that has not asked for the state for so long has gone.
EDITOR_SECONDS = 8.0
THUMBNAIL_SIZE = (160, 120)
# A region is looked for in what the page shows of the picture, with at most so many clicks.
MAX_CLICKS = 200
_MAX_CACHED_EXCERPTS = 4
_MAX_CACHED_IMAGES = 2
_SHOWN_AS_STORED = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png"}

# Run folders of the training that is started from the page, the folder in it of the run that is
# scored, the share of the time for that one, and how much of the output is kept.
RUN_NAME, SCORED_NAME = "useg-run", "scored"
SCORED_SHARE = 0.25
_MAX_LINES = 200
_CLOSE_SECONDS = 10


class EditorError(DataError):
    """Another browser has taken over."""


class LabelSession:
    """What one ``useg label`` works on.

    Args:
        folder: Pictures and masks.
        rounds: The model in the loop.
        log: Takes one entry for each request.
        prefill: Whether the page begins a picture with the model's whole answer.
    """

    def __init__(
        self,
        folder: LabelFolder,
        rounds: Rounds,
        log: RequestLog = lambda entry: None,
        *,
        prefill: bool = False,
    ) -> None:
        self.folder = folder
        self.rounds = rounds
        self.training = ProperTraining(folder, rounds)
        self.log = log
        self.prefill = prefill
        self.is_ending = False
        self._editor = ""
        self._editor_seen = -math.inf
        self._lock = threading.Lock()
        self._images: OrderedDict[int, NDArray[Any]] = OrderedDict()
        self._excerpts: OrderedDict[tuple[int, ...], Superpixels] = OrderedDict()
        self._thumbnails: dict[int, bytes] = {}

    def join(self, key: str, *, take: bool) -> bool:
        """Let a browser in; return whether it may edit: nobody else does, or it takes over."""
        with self._lock:
            is_free = time.monotonic() - self._editor_seen > EDITOR_SECONDS
            if take or is_free:
                self._editor, self._editor_seen = key, time.monotonic()
            return self._editor == key

    def check_editor(self, key: str) -> None:
        """Refuse a change from a browser that does not edit.

        Raises:
            EditorError: Another browser does.
        """
        with self._lock:
            if not key or key != self._editor:
                raise EditorError(
                    "another browser edits this folder; take over here to go on, and nothing it "
                    "has painted is lost"
                )
            self._editor_seen = time.monotonic()

    def state(self, key: str) -> dict[str, Any]:
        """Return what changes while the page is open."""
        with self._lock:
            is_editor = bool(key) and key == self._editor
            if is_editor:
                self._editor_seen = time.monotonic()
        rounds, pictures = self.rounds, self.folder.pictures
        return {
            "editor": is_editor,
            "states": [each.state for each in pictures],
            "gains": [rounds.gain(k) for k in range(len(pictures))],
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
        """Change a rectangle of a mask; see :meth:`useg.labelling.folder.LabelFolder.patch`."""
        self.rounds.remember_answer(k)
        revision = self.folder.patch(k, corner, part, revision)
        self.rounds.changed()
        return revision

    def set_done(self, k: int, done: bool) -> None:
        """Say whether a picture is finished, and score the model on it."""
        self.folder.set_done(k, done)
        if done:
            self.rounds.score_finished(k)
        self.rounds.changed()

    def set_classes(self, classes: Any) -> None:
        """Take the classes of the page: a list of ``{"name": ..., "color": "#rrggbb"}``.

        Raises:
            DataError: It is something else.
        """
        if not isinstance(classes, list) or not all(isinstance(each, dict) for each in classes):
            raise DataError("classes are a list of objects with name and color")
        chosen = []
        for each in classes:
            name, color = each.get("name"), each.get("color")
            if not isinstance(name, str) or not name.strip() or not name.isprintable():
                raise DataError("a class has no name; give each class a printable name")
            if not isinstance(color, str) or not re.fullmatch(r"#[0-9a-fA-F]{6}", color):
                raise DataError(f"the class {name!r} has no colour such as #3060ff")
            chosen.append((name.strip(), _rgb(color)))
        names = [name for name, _ in chosen]
        if len(set(names)) < len(names):
            raise DataError("two classes have the same name; give each its own")
        self.folder.set_classes(chosen)
        self.rounds.changed()

    def shown_picture(self, k: int) -> tuple[bytes, str]:
        """Return a picture as a file for browsers, and its media type."""
        path = self.folder.pictures[k].path
        media_type = _SHOWN_AS_STORED.get(path.suffix.lower())
        content = _read_plain(path) if media_type else None
        if media_type and content is not None:
            return content, media_type
        return encode_picture(to_picture(self._image(k))), "image/png"

    def thumbnail(self, k: int) -> bytes:
        """Return a small JPEG."""
        if k not in self._thumbnails:
            path = self.folder.pictures[k].path
            width, height = THUMBNAIL_SIZE
            small = to_picture(reduce_image(read_image(path), 2 * width * height))
            target = io.BytesIO()
            picture = PIL.Image.fromarray(small)
            picture.thumbnail(THUMBNAIL_SIZE)
            picture.save(target, "JPEG", quality=80)
            self._thumbnails[k] = target.getvalue()
        return self._thumbnails[k]

    def _image(self, k: int) -> NDArray[Any]:
        with self._lock:
            if k in self._images:
                self._images.move_to_end(k)
                return self._images[k]
        image = read_image(self.folder.pictures[k].path)
        with self._lock:
            self._images[k] = image
            while len(self._images) > _MAX_CACHED_IMAGES:
                self._images.popitem(last=False)
        return image

    def find_region(
        self, k: int, wanted: Mapping[str, Any]
    ) -> tuple[tuple[int, int], NDArray[np.bool_]]:
        """Return the region that clicks mean: its upper left corner, and its pixels.

        Args:
            k: The picture.
            wanted: ``view`` ([x, y, width, height] of the excerpt that the page shows), ``kind``
                (``superpixel`` or ``object``), ``inside`` and ``outside`` (lists of [x, y]).
                Without clicks, the excerpt is only prepared.

        Raises:
            DataError: The excerpt or a click is not in the picture.
        """
        width, height = self.folder.pictures[k].size
        x, y, w, h = _whole_numbers(wanted.get("view"), 4)
        if not (w > 0 and h > 0 and 0 <= x <= width - w and 0 <= y <= height - h):
            raise DataError(f"the view is not inside of the image with its {width}x{height} pixels")
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
            if key in self._excerpts:
                self._excerpts.move_to_end(key)
                return self._excerpts[key]
        x, y, w, h = view
        found = find_superpixels(self._image(k)[y : y + h, x : x + w], self._answers(k, view))
        with self._lock:
            self._excerpts[key] = found
            while len(self._excerpts) > _MAX_CACHED_EXCERPTS:
                self._excerpts.popitem(last=False)
        return found

    def _answers(self, k: int, view: tuple[int, int, int, int]) -> NDArray[np.float32] | None:
        """Return the model's confidence in its class, as a plane for each class, in an excerpt."""
        try:
            suggestion = self.rounds.suggest(k)
        except UsageError:
            return None
        if suggestion is None or self.folder.table is None:
            return None
        (width, height), (h, w) = self.folder.pictures[k].size, suggestion.ids.shape
        rows = slice(view[1] * h // height, max(1, math.ceil((view[1] + view[3]) * h / height)))
        columns = slice(view[0] * w // width, max(1, math.ceil((view[0] + view[2]) * w / width)))
        ids = suggestion.ids[rows, columns]
        sure = suggestion.confidence[rows, columns].astype(np.float32) / 255
        return np.stack([np.where(ids == c, sure, 0) for c in range(len(self.folder.table))])

    def zip_masks(self) -> bytes:
        """Return the masks of all painted pictures, and the class table, as a zip file."""
        folder = self.folder
        target = io.BytesIO()
        with folder.lock, zipfile.ZipFile(target, "w") as archive:
            if folder.table is not None:
                archive.writestr("classes.toml", classes_to_toml(folder.table))
            for k, picture in enumerate(folder.pictures):
                if picture.state != "empty" and folder.table is not None:
                    name = Path(picture.name).with_suffix(".png").as_posix()
                    archive.writestr(f"masks/{name}", encode_mask(folder.read(k)[0], folder.table))
        return target.getvalue()

    def coco(self) -> bytes:
        """Return the painted regions as COCO JSON."""
        folder = self.folder
        if folder.table is None:
            raise DataError("there are no classes yet, so there is nothing to export")
        with tempfile.TemporaryDirectory() as place, folder.lock:
            entries: list[LabelledImage] = []
            for k, picture in enumerate(folder.pictures):
                if picture.state == "empty":
                    continue
                label = Path(place, f"{k}.png")
                label.write_bytes(encode_label(folder.read(k)[0], folder.table))
                entries.append(LabelledImage(len(entries) + 1, Path(picture.name), label))
            write_coco(Path(place, "coco.json"), entries, folder.table)
            return Path(place, "coco.json").read_bytes()

    def close(self) -> None:
        """End what runs in the background."""
        self.is_ending = True
        self.training.close()
        self.rounds.stop()


def _read_plain(path: Path) -> bytes | None:
    """Read a file that browsers show as useg reads it: 8 bits, grey or colour, without alpha.

    Returns None for other files.
    """
    try:
        # What is checked is what is sent, whatever takes the file's place meanwhile.
        with open_file(path) as file:
            content = file.read()
        with PIL.Image.open(io.BytesIO(content), formats=["JPEG", "PNG"]) as picture:
            is_plain = picture.mode in ("L", "RGB") and picture.info.get("transparency") is None
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
        raise DataError(f"{count} whole numbers are needed, but something else was sent")
    return value


def _clicks(value: Any, x: int, y: int, w: int, h: int) -> list[tuple[int, int]]:
    if not isinstance(value, list) or len(value) > MAX_CLICKS:
        raise DataError(f"clicks are a list of at most {MAX_CLICKS} points")
    points = [_whole_numbers(point, 2) for point in value]
    if any(not (x <= column < x + w and y <= row < y + h) for column, row in points):
        raise DataError("a click is outside of the view")
    return [(column - x, row - y) for column, row in points]


class ProperTraining:
    """Trains for the minutes that a person chooses; the rounds pause meanwhile.

    First ``useg train`` on the folder: it holds some of the painted pictures out, and writes score
    and report. In the rest of the time the model of the last round goes on, on all pictures.
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
        """Start to train for so many minutes.

        Raises:
            DataError: It runs already, or there are fewer than two pictures to train on.
        """
        with self._lock:
            if self._is_running:
                raise DataError("a training is in progress; stop it first, or wait for its end")
            if len(self._rounds.usable()) < 2:
                raise DataError(
                    f"training needs at least two images; {self._rounds.what_to_do} more"
                )
            root = self._folder.place.root
            numbered = (root / f"{RUN_NAME}-{number}" for number in range(1, 1 << 20))
            # A link that leads nowhere has the name, too.
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
            self._has_failed = not (self._train_scored(out) and self._train_on_everything(out))
        finally:
            self._rounds.paused = False
            self._rounds.changed()

    def _train_scored(self, out: Path) -> bool:
        minutes = SCORED_SHARE * self._minutes
        root, scored = str(self._folder.place.root), str(out / SCORED_NAME)
        options = ["--out", scored, "--minutes", f"{minutes:g}", "--force"]
        return self._run([sys.executable, "-m", "useg", "train", root, *options])

    def _train_on_everything(self, out: Path) -> bool:
        # The model of a round that is in progress replaces the one to start from.
        while self._rounds.status.phase != "waiting" and not self._is_stopped:
            time.sleep(0.1)
        task = self._rounds.describe_last_training(out, (1 - SCORED_SHARE) * self._minutes)
        return self._run(ROUND_COMMAND, json.dumps({**task, "scored": str(out / SCORED_NAME)}))

    def _run(self, command: Sequence[str], task: str = "") -> bool:
        """Run a process to its end, unless the training was stopped; return whether it succeeds."""
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
            # A process that has failed already does not read its task.
            with suppress(BrokenPipeError):
                process.stdin.write(task + "\n")
                process.stdin.flush()
            for line in process.stdout:
                self._lines = [*self._lines, _in_words(line.rstrip())][-_MAX_LINES:]
        return process.returncode == 0

    def stop(self) -> None:
        """End the training; what it has learnt so far is kept, and the model of the rounds too."""
        with self._lock:
            self._is_stopped = True
            if self._process and self._process.poll() is None:
                self._process.terminate()

    def close(self) -> None:
        """End the training, and give it a moment to write what it has learnt."""
        self.stop()
        if self._thread:
            self._thread.join(_CLOSE_SECONDS)

    def state(self) -> dict[str, Any] | None:
        """Return what the page shows; None before the first training."""
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
            DataError: There is none.
        """
        if self._out is None or not self._report.exists():
            raise DataError("there is no report yet; train first")
        return self._report.read_bytes()


def _in_words(line: str) -> str:
    """Return what a process says: a line of text, or the progress of a round as JSON."""
    try:
        said = json.loads(line)
    except ValueError:
        return line
    if not isinstance(said, dict):
        return line
    if "step" in said:
        return f"all painted images: step {said['step']} of {said['steps']}"
    return str(said.get("said") or said.get("error") or "")
