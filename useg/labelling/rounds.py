"""The model in the loop: trains in rounds from what is painted, suggests, and is scored honestly.

A round is a process of its own at low priority; there is never more than one. A finished picture is
scored with what a model said about it before any of its pixels was trained on.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageFilter
from numpy.typing import NDArray

from useg.classes import IGNORE, ClassTable, Label, most_probable, softmax
from useg.errors import DataError, UsageError
from useg.files import make_folder, replacing
from useg.images.files import Image, encode_png, read_image, read_mask, resize_image, resize_label
from useg.inference.predictor import Predictor
from useg.inference.ranking import margin_uncertainty
from useg.labelling.folder import LabelFolder
from useg.ownership import is_own_model, is_own_run_toml, read_ends
from useg.scoring.metrics import confusion, mean_iou, tally

WORK_NAME = ".useg-label"
ROUND_COMMAND = [sys.executable, "-m", "useg.labelling.round_process"]
MIN_PICTURES = 3
# For the whole round: it ends within a minute, with start and ranking.
ROUND_MINUTES = 0.6
# A model of fewer steps suggests nothing: the machine is busy, and the next round gets more time.
MIN_ROUND_STEPS = 30
MAX_ROUND_MINUTES = 10.0
# Pictures that a round ranks.
MAX_RANKED = 24
# Pixels of a suggestion; larger pictures are reduced.
MAX_SUGGESTED_PIXELS = 2_000_000
# The score is that of the pictures finished last.
NUM_SCORED = 10
# More than the gain of any picture.
FAULTY_GAIN = 100.0
# Less than the gain of any picture without a stroke.
SCRIBBLED_GAIN = -1.0
# Share of a picture that is called least sure, and the least uncertainty of such a place.
_UNSURE_SHARE = 0.12
_MIN_UNCERTAINTY = 0.25
_MAX_CACHED_SUGGESTIONS = 6
_MAX_ERROR_LENGTH = 400


@dataclass(frozen=True)
class Suggestion:
    """What a model says about a picture, perhaps at a reduced size ``(h, w)``.

    Args:
        ids: Class ids of the folder; ``IGNORE`` for a class that it does not have.
        confidence: Probability of that class, 0 to 255.
        unsure: 1 in the regions where the model is least sure.
        round: The round of the model.
    """

    ids: Label
    confidence: NDArray[np.uint8]
    unsure: NDArray[np.uint8]
    round: int


@dataclass
class RoundStatus:
    """What the page shows of the rounds."""

    phase: str = "waiting"
    step: int = 0
    steps: int = 0
    error: str = ""
    seconds: list[float] = field(default_factory=list)


class Rounds:
    """Trains in the background, and answers with the newest model.

    Args:
        folder: What is painted.
        model: A model to begin with.
        only_done: Train on finished pictures alone, because the others hold predictions.
    """

    def __init__(
        self, folder: LabelFolder, model: Predictor | None = None, *, only_done: bool = False
    ) -> None:
        self.folder = folder
        self.work = folder.place.masks / WORK_NAME
        self.status = RoundStatus()
        self.gains: dict[str, float] = {}
        # The round of the model that answers, and how many rounds have begun.
        self.number = 0
        self._num_begun = 0
        self.paused = False
        self.minutes = ROUND_MINUTES
        self._only_done = only_done
        self._predictor = model
        self._start = str(model.runtime.source) if model else None
        self._lock = threading.Lock()
        self._computing = threading.Lock()
        self._suggestions: OrderedDict[tuple[int, int], Suggestion] = OrderedDict()
        self._trained_changes = -1
        self._wanted = threading.Event()
        self._forced = False
        self._stopping = False
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._run_forever, name="rounds", daemon=True)

    def start(self) -> None:
        """Take the model of an earlier session, and wait for strokes.

        Raises:
            DataError: The folder of the rounds, or a folder in it, is a link to another place.
            ModelError: The model of an earlier session is damaged.
        """
        for place in (self.work, self._answers):
            if place.is_symlink():
                raise DataError(
                    f"{place} is a link, and useg label would write where it leads; remove it"
                )
        self.take_newest()
        self._thread.start()

    def take_newest(self) -> None:
        """Take the model of an earlier session."""
        found = self._rounds_on_disk()
        self._num_begun = max((number for number, _ in found), default=0)
        finished = [
            (number, path)
            for number, path in found
            if (path / "model.safetensors").exists() and not path.is_symlink()
        ]
        if finished:
            self._take_model(*max(finished))

    def _rounds_on_disk(self) -> list[tuple[int, Path]]:
        """Return number and folder of each round that is on disk."""
        return [
            (int(path.name.removeprefix("round-")), path)
            for path in (self.work.iterdir() if self.work.is_dir() else ())
            if re.fullmatch(r"round-[0-9]{1,9}", path.name)
        ]

    def stop(self) -> None:
        """End the round in progress."""
        self._stopping = True
        self._wanted.set()
        process = self._process
        if process and process.poll() is None:
            process.kill()
        self._thread.join(10)

    @property
    def has_model(self) -> bool:
        """Whether there is something to suggest."""
        return self._predictor is not None

    def train_now(self) -> None:
        """Train although not all classes are painted."""
        self._forced = True
        self._wanted.set()

    def changed(self) -> None:
        """Take notice of a stroke."""
        self._wanted.set()

    def waits_for(self) -> str:
        """Return what a first round needs, as a sentence; "" if nothing."""
        folder = self.folder
        if folder.table is None:
            return "Name the classes first."
        usable = self.usable()
        if len(usable) < MIN_PICTURES:
            left = MIN_PICTURES - len(usable)
            what = f"{self.what_to_do} {left} more image{'s' * (left > 1)}"
            return f"The model starts when you {what}."
        seen = set().union(*(folder.pictures[k].classes for k in usable))
        missing = [name for k, name in enumerate(folder.table.names) if k not in seen]
        return f"The model waits for a stroke of {', '.join(missing)}." if missing else ""

    def gain(self, k: int) -> float:
        """Return how much a picture helps when it is labelled next; most if its mask is faulty.

        Pictures that no model has ranked have less than 0: those far apart in the list come first,
        because neighbours often show the same. Those with strokes come behind all others.
        """
        if self.folder.pictures[k].finding:
            return FAULTY_GAIN
        if self.folder.pictures[k].state == "scribbled":
            return SCRIBBLED_GAIN
        num_bits = (len(self.folder.pictures) - 1).bit_length()
        spread = int(f"{k:0{num_bits}b}"[::-1], 2) / (1 << num_bits)
        return self.gains.get(self.folder.pictures[k].name, -spread)

    @property
    def what_to_do(self) -> str:
        """What a person does with a picture so that models train on it."""
        return "finish" if self._only_done else "paint in"

    def usable(self) -> list[int]:
        """Return the pictures to train on."""
        states = ("done",) if self._only_done else ("scribbled", "done")
        return [k for k, each in enumerate(self.folder.pictures) if each.state in states]

    def _run_forever(self) -> None:
        while not self._stopping:
            self._wanted.wait()
            self._wanted.clear()
            changes = self.folder.changes
            is_due = changes != self._trained_changes and not self.waits_for()
            is_forced = self._forced and bool(self.usable())
            self._forced = False
            if self._stopping or self.paused or not (is_due or is_forced):
                continue
            self._trained_changes = changes
            self.status = RoundStatus("training", seconds=self.status.seconds)
            try:
                self._run_round()
            except (OSError, UsageError, ValueError) as error:
                self.status.error = str(error)[:_MAX_ERROR_LENGTH]
            self.status.phase = "waiting"
            # Strokes that came meanwhile.
            if self._trained_changes != self.folder.changes:
                self._wanted.set()

    def _run_round(self) -> None:
        self._num_begun += 1
        out = make_folder(self.work) / f"round-{self._num_begun}"
        with self.folder.lock:
            usable = self.usable()
            pictures = self.folder.pictures
            task = {
                "root": str(self.folder.place.root),
                "pictures": [str(pictures[k].path) for k in usable],
                "others": [str(path) for path in self._to_rank()],
                "out": str(out),
                "round": self._num_begun,
                "minutes": self.minutes,
                "start": self._start,
            }
            for k in usable:
                pictures[k].was_trained = True
            self.folder.write_states()
        with tempfile.TemporaryFile() as log:
            self._process = subprocess.Popen(
                ROUND_COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
            # A process that has failed already does not read its task; its log says why it failed.
            with suppress(BrokenPipeError), self._process as process:
                assert process.stdin
                assert process.stdout
                process.stdin.write(json.dumps(task) + "\n")
                process.stdin.flush()
                for line in process.stdout:
                    self._take_line(json.loads(line), out)
            if process.returncode and not self.status.error and not self._stopping:
                log.seek(0)
                last = log.read().decode("utf-8", "replace").strip().splitlines()
                self.status.error = f"the round failed: {last[-1] if last else process.returncode}"

    def describe_last_training(self, out: Path, minutes: float) -> dict[str, Any]:
        """Return the task of the process that trains on everything, without ``scored``."""
        with self.folder.lock:
            pictures = self.folder.pictures
            return {
                "root": str(self.folder.place.root),
                "pictures": [str(pictures[k].path) for k in self.usable()],
                "out": str(out),
                "minutes": minutes,
                "start": self._start,
            }

    def _to_rank(self) -> list[Path]:
        """Return pictures that nobody has painted yet, spread over the list; others each round."""
        empty = [each.path for each in self.folder.pictures if each.state == "empty"]
        step = max(1, len(empty) // MAX_RANKED)
        return empty[self._num_begun % step :: step][:MAX_RANKED]

    def _take_line(self, line: Mapping[str, Any], out: Path) -> None:
        if "step" in line:
            self.status.step, self.status.steps = line["step"], line["steps"]
        elif "error" in line:
            self.status.error = str(line["error"])[:_MAX_ERROR_LENGTH]
        elif "trained" in line and line["trained"] < MIN_ROUND_STEPS:
            self._start = str(out)
            self.minutes = min(MAX_ROUND_MINUTES, 2 * self.minutes)
            self._trained_changes = -1
        elif "trained" in line:
            self._take_model(self._num_begun, out)
            self.status.phase = "ranking"
        elif "ranked" in line:
            # Gains of earlier rounds do not count any more: those models had seen fewer pictures.
            names = {str(each.path): each.name for each in self.folder.pictures}
            gains = {row["path"]: float(row["gain"]) for row in line["ranked"]}
            self.gains = {names[path]: gain for path, gain in gains.items() if path in names}
            self.status.seconds.append(float(line["seconds"]))

    def _take_model(self, number: int, out: Path) -> None:
        """Answer with a new model from now on, and remove the older ones."""
        predictor = Predictor.load(out)
        with self._lock:
            self._predictor, self._start, self.number = predictor, str(out), number
            self._suggestions.clear()
        for _, path in self._rounds_on_disk():
            is_own = is_own_run_toml(path / "run.toml") or is_own_model(path / "model.safetensors")
            if path != out and is_own:
                # It never follows a link.
                shutil.rmtree(path, ignore_errors=True)

    def suggest(self, k: int) -> Suggestion | None:
        """Return what the newest model says about a picture; None without a model.

        Raises:
            UsageError: The picture cannot be read, or does not fit the model.
        """
        # One at a time: the logits of a large picture take much memory. Strokes do not wait for it.
        with self._computing:
            with self._lock:
                predictor, number, table = self._predictor, self.number, self.folder.table
                if predictor is None or table is None:
                    return None
                if (k, number) in self._suggestions:
                    self._suggestions.move_to_end((k, number))
                    return self._suggestions[k, number]
            probabilities = self._probabilities(predictor, k)
            suggestion = _make_suggestion(probabilities, predictor.classes, table, number)
            with self._lock:
                self._suggestions[k, number] = suggestion
                while len(self._suggestions) > _MAX_CACHED_SUGGESTIONS:
                    self._suggestions.popitem(last=False)
            return suggestion

    def _probabilities(self, predictor: Predictor, k: int) -> NDArray[np.float32]:
        image = read_image(self.folder.pictures[k].path)
        height, width = image.shape[:2]
        if predictor.runtime.description.working.frame is not None:
            image = reduce_image(image, MAX_SUGGESTED_PIXELS)
        logits = predictor.logits(image)
        step = max(1, round((height * width / MAX_SUGGESTED_PIXELS) ** 0.5))
        if logits[0].size > 2 * MAX_SUGGESTED_PIXELS:
            logits = logits[:, ::step, ::step]
        return softmax(logits, predictor.temperature)

    def remember_answer(self, k: int) -> None:
        """Keep what the model says about a picture before its first stroke, for its score."""
        picture = self.folder.pictures[k]
        if picture.was_trained or picture.state != "empty":
            return
        with self._lock:
            known = self._suggestions.get((k, self.number))
        if known is not None:
            path = self._answer_path(k)
            make_folder(path.parent)
            with replacing(path, _is_png) as draft:
                draft.write_bytes(encode_png(known.ids))

    @property
    def _answers(self) -> Path:
        """Where answers are kept until their pictures are finished."""
        return self.work / "before"

    def _answer_path(self, k: int) -> Path:
        name = hashlib.sha256(self.folder.pictures[k].name.encode()).hexdigest()[:24]
        return self._answers / f"{name}.png"

    def score_finished(self, k: int) -> None:
        """Score a finished picture with what a model said before its first stroke."""
        folder, path = self.folder, self._answer_path(k)
        if not path.exists() or folder.table is None:
            return
        label, _ = folder.read(k)
        answer = np.asarray(read_mask(path), np.uint8)
        answer = resize_label(answer, (label.shape[1], label.shape[0]))
        # Classes that the model did not have yet are errors, of the first other class.
        num_classes = len(folder.table)
        answer = np.where(answer < num_classes, answer, num_classes).astype(np.uint8)
        counts = confusion(answer, label, num_classes + 1)
        name = folder.pictures[k].name
        folder.scores[:] = [row for row in folder.scores if row.get("name") != name]
        folder.scores.append(
            {"name": name, "tally": tally(counts)[:, :num_classes].tolist(), "round": self.number}
        )
        folder.write_states()

    def score_curve(self) -> list[float | None]:
        """Return the mean IoU of the last finished pictures, after each of them."""
        tallies = [np.array(row["tally"], np.int64) for row in self.folder.scores]
        width = max((each.shape[1] for each in tallies), default=0)
        padded = [np.pad(each, ((0, 0), (0, width - each.shape[1]))) for each in tallies]
        values = [
            float(mean_iou(np.sum(padded[max(0, end - NUM_SCORED) : end], axis=0)))
            for end in range(1, len(padded) + 1)
        ]
        return [None if np.isnan(value) else value for value in values]


def _is_png(path: Path) -> bool:
    """Recognize an answer in the folder that is useg's own; a link is none."""
    return read_ends(path, 8) == b"\x89PNG\r\n\x1a\n"


def reduce_image(image: Image, most: int) -> Image:
    """Return an image ``(H, W, C)`` with ``most`` pixels at most."""
    height, width = image.shape[:2]
    factor = (most / (height * width)) ** 0.5
    if factor >= 1:
        return image
    return resize_image(image, (max(1, round(width * factor)), max(1, round(height * factor))))


def _make_suggestion(
    probabilities: NDArray[np.float32], model: ClassTable, table: ClassTable, number: int
) -> Suggestion:
    ids = np.full(256, IGNORE, np.uint8)
    for k, name in enumerate(model.names):
        if name in table.names:
            ids[k] = table.names.index(name)
    best = probabilities.max(0)
    uncertainty = margin_uncertainty(probabilities)
    return Suggestion(
        ids[most_probable(probabilities)],
        np.rint(255 * best).astype(np.uint8),
        _least_sure(uncertainty),
        number,
    )


def _least_sure(uncertainty: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return 1 where the neighbourhood is among the least sure ones, ``(h, w)``."""
    radius = max(2, max(uncertainty.shape) // 40)
    picture = PIL.Image.fromarray(np.rint(255 * uncertainty).astype(np.uint8))
    smooth = np.asarray(picture.filter(PIL.ImageFilter.BoxBlur(radius)), np.float32) / 255
    limit = max(float(np.quantile(smooth, 1 - _UNSURE_SHARE)), _MIN_UNCERTAINTY)
    unsure: NDArray[np.uint8] = (smooth > limit).astype(np.uint8)
    return unsure
