"""Human in the loop: train a model in rounds on painted images, suggest labels, and score them.

Each round is a separate process at low priority, and only one runs at a time. A finished image is
scored with the prediction of a model that was never trained on it, so the score is honest.
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
from useg.images.image_files import (
    Image,
    encode_png,
    read_image,
    read_mask,
    resize_image,
    resize_label,
)
from useg.inference.predictor import Predictor
from useg.inference.ranking import margin_uncertainty
from useg.labelling.folder import LabelFolder
from useg.ownership import is_own_model, is_own_run_toml, read_ends
from useg.scoring.metrics import confusion, mean_iou, tally

WORK_NAME = ".useg-label"
ROUND_COMMAND = [sys.executable, "-m", "useg.labelling.round_process"]
MIN_ROUND_IMAGES = 3
# Training time of a round; with start-up and ranking, a round ends within a minute.
ROUND_MINUTES = 0.6
# A model with fewer steps is not used: the machine is busy, and the next round gets more time.
MIN_ROUND_STEPS = 30
MAX_ROUND_MINUTES = 10.0
# Images that a round ranks, at most.
MAX_RANKED = 24
# Pixels of a suggestion, at most; larger images are downscaled.
MAX_SUGGESTED_PIXELS = 2_000_000
# The score is computed over the last finished images.
NUM_SCORED = 10
# Higher than the priority of any other image.
FAULTY_PRIORITY = 100.0
# Lower than the priority of any image without strokes.
SCRIBBLED_PRIORITY = -1.0
# Share of the image that is marked as least certain, and the minimum uncertainty there.
_UNSURE_SHARE = 0.12
_MIN_UNCERTAINTY = 0.25
_MAX_CACHED_SUGGESTIONS = 6
_MAX_ERROR_LENGTH = 400


@dataclass(frozen=True)
class Suggestion:
    """The prediction of a model for an image, downscaled to ``(h, w)`` if the image is large.

    Args:
        ids: Class ids of the folder; ``IGNORE`` for classes that the folder does not have.
        confidence: The probability of the predicted class, 0 to 255.
        unsure: 1 where the model is least certain.
        round: The number of the round that trained the model.
    """

    ids: Label
    confidence: NDArray[np.uint8]
    unsure: NDArray[np.uint8]
    round: int


@dataclass
class RoundStatus:
    """The progress of the current round, for the page."""

    phase: str = "waiting"
    step: int = 0
    steps: int = 0
    error: str = ""
    seconds: list[float] = field(default_factory=list)


class Rounds:
    """Trains models in the background, and suggests labels with the latest one.

    Args:
        folder: The images and masks.
        model: An initial model.
        only_done: Train only on finished images, because other masks contain predictions.
    """

    def __init__(
        self, folder: LabelFolder, model: Predictor | None = None, *, only_done: bool = False
    ) -> None:
        self.folder = folder
        self.work = folder.paths.masks / WORK_NAME
        self.status = RoundStatus()
        self.gains: dict[str, float] = {}
        # The round of the model in use, and the number of rounds started so far.
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
        """Load the model of an earlier session, and wait for strokes.

        Raises:
            DataError: The folder of the rounds, or a folder in it, is a symbolic link.
            ModelError: The model of an earlier session is damaged.
        """
        for folder in (self.work, self._predictions):
            if folder.is_symlink():
                raise DataError(
                    f"'{folder}' is a symbolic link, and useg label would write to its target; "
                    "remove the link"
                )
        self.load_latest_model()
        self._thread.start()

    def load_latest_model(self) -> None:
        """Use the latest finished model of an earlier session."""
        found = self._rounds_on_disk()
        self._num_begun = max((number for number, _ in found), default=0)
        finished = [
            (number, path)
            for number, path in found
            if (path / "model.safetensors").exists() and not path.is_symlink()
        ]
        if finished:
            self._use_model(*max(finished))

    def _rounds_on_disk(self) -> list[tuple[int, Path]]:
        """Return the number and the folder of each round on disk."""
        return [
            (int(path.name.removeprefix("round-")), path)
            for path in (self.work.iterdir() if self.work.is_dir() else ())
            if re.fullmatch(r"round-[0-9]{1,9}", path.name)
        ]

    def stop(self) -> None:
        """Stop the current round."""
        self._stopping = True
        self._wanted.set()
        process = self._process
        if process and process.poll() is None:
            process.kill()
        self._thread.join(10)

    @property
    def has_model(self) -> bool:
        """Whether there is a model that can make suggestions."""
        return self._predictor is not None

    def train_now(self) -> None:
        """Start a round even if some classes are not painted yet."""
        self._forced = True
        self._wanted.set()

    def notify(self) -> None:
        """Tell the background thread that something has changed."""
        self._wanted.set()

    def waits_for(self) -> str:
        """Return what is missing for the first round, as a sentence; "" if nothing is."""
        folder = self.folder
        if folder.table is None:
            return "Define the classes first."
        trainable = self.trainable()
        if len(trainable) < MIN_ROUND_IMAGES:
            left = MIN_ROUND_IMAGES - len(trainable)
            what = f"{self.required_action} {left} more image{'s' * (left > 1)}"
            return f"Training starts when you {what}."
        seen = set().union(*(folder.images[k].classes for k in trainable))
        missing = [name for k, name in enumerate(folder.table.names) if k not in seen]
        return f"Training starts when you paint {', '.join(missing)}, too." if missing else ""

    def priority(self, k: int) -> float:
        """Return how useful it is to label an image next; faulty masks have the highest priority.

        Images that no model has ranked are below 0. Of these, images far apart in the list come
        first, because neighbours are often similar. Images with strokes come last.
        """
        if self.folder.images[k].finding:
            return FAULTY_PRIORITY
        if self.folder.images[k].state == "scribbled":
            return SCRIBBLED_PRIORITY
        num_bits = (len(self.folder.images) - 1).bit_length()
        spread = int(f"{k:0{num_bits}b}"[::-1], 2) / (1 << num_bits)
        return self.gains.get(self.folder.images[k].name, -spread)

    @property
    def required_action(self) -> str:
        """What a person must do with an image before models train on it, as a verb."""
        return "finish" if self._only_done else "paint in"

    def trainable(self) -> list[int]:
        """Return the indices of the images to train on."""
        states = ("done",) if self._only_done else ("scribbled", "done")
        return [k for k, each in enumerate(self.folder.images) if each.state in states]

    def _run_forever(self) -> None:
        while not self._stopping:
            self._wanted.wait()
            self._wanted.clear()
            changes = self.folder.changes
            is_due = changes != self._trained_changes and not self.waits_for()
            is_forced = self._forced and bool(self.trainable())
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
            # Start again if strokes arrived during the round.
            if self._trained_changes != self.folder.changes:
                self._wanted.set()

    def _run_round(self) -> None:
        self._num_begun += 1
        out = make_folder(self.work) / f"round-{self._num_begun}"
        with self.folder.lock:
            trainable = self.trainable()
            images = self.folder.images
            task = {
                "root": str(self.folder.paths.root),
                "images": [str(images[k].path) for k in trainable],
                "others": [str(path) for path in self._images_to_rank()],
                "out": str(out),
                "round": self._num_begun,
                "minutes": self.minutes,
                "start": self._start,
            }
            for k in trainable:
                images[k].was_trained_on = True
            self.folder.write_states()
        with tempfile.TemporaryFile() as log:
            self._process = subprocess.Popen(
                ROUND_COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
            # A process that has already failed does not read its task; its log says why.
            with suppress(BrokenPipeError), self._process as process:
                assert process.stdin
                assert process.stdout
                process.stdin.write(json.dumps(task) + "\n")
                process.stdin.flush()
                for line in process.stdout:
                    self._handle_message(json.loads(line), out)
            if process.returncode and not self.status.error and not self._stopping:
                log.seek(0)
                last = log.read().decode("utf-8", "replace").strip().splitlines()
                self.status.error = f"the round failed: {last[-1] if last else process.returncode}"

    def final_training_task(self, out: Path, minutes: float) -> dict[str, Any]:
        """Return the task of ``round_process.train_final_model``, without ``scored``."""
        with self.folder.lock:
            images = self.folder.images
            return {
                "root": str(self.folder.paths.root),
                "images": [str(images[k].path) for k in self.trainable()],
                "out": str(out),
                "minutes": minutes,
                "start": self._start,
            }

    def _images_to_rank(self) -> list[Path]:
        """Return unpainted images, spread over the list, and different ones in each round."""
        empty = [each.path for each in self.folder.images if each.state == "empty"]
        step = max(1, len(empty) // MAX_RANKED)
        return empty[self._num_begun % step :: step][:MAX_RANKED]

    def _handle_message(self, line: Mapping[str, Any], out: Path) -> None:
        if "step" in line:
            self.status.step, self.status.steps = line["step"], line["steps"]
        elif "error" in line:
            self.status.error = str(line["error"])[:_MAX_ERROR_LENGTH]
        elif "trained" in line and line["trained"] < MIN_ROUND_STEPS:
            self._start = str(out)
            self.minutes = min(MAX_ROUND_MINUTES, 2 * self.minutes)
            self._trained_changes = -1
        elif "trained" in line:
            self._use_model(self._num_begun, out)
            self.status.phase = "ranking"
        elif "ranked" in line:
            # Drop the ranking of earlier rounds: their models were trained on fewer images.
            names = {str(each.path): each.name for each in self.folder.images}
            gains = {row["path"]: float(row["gain"]) for row in line["ranked"]}
            self.gains = {names[path]: gain for path, gain in gains.items() if path in names}
            self.status.seconds.append(float(line["seconds"]))

    def _use_model(self, number: int, out: Path) -> None:
        """Switch to a new model, and delete the older ones."""
        predictor = Predictor.load(out)
        with self._lock:
            self._predictor, self._start, self.number = predictor, str(out), number
            self._suggestions.clear()
        for _, path in self._rounds_on_disk():
            is_own = is_own_run_toml(path / "run.toml") or is_own_model(path / "model.safetensors")
            if path != out and is_own:
                # ``rmtree`` never follows a link.
                shutil.rmtree(path, ignore_errors=True)

    def suggest(self, k: int) -> Suggestion | None:
        """Return the suggestion of the latest model for an image, or None without a model.

        Raises:
            UsageError: The image cannot be read, or the model cannot process it.
        """
        # One at a time, because the logits of a large image need much memory. Strokes do not wait.
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
        image = read_image(self.folder.images[k].path)
        height, width = image.shape[:2]
        if predictor.runtime.description.working.frame is not None:
            image = downscale_image(image, MAX_SUGGESTED_PIXELS)
        logits = predictor.logits(image)
        step = max(1, round((height * width / MAX_SUGGESTED_PIXELS) ** 0.5))
        if logits[0].size > 2 * MAX_SUGGESTED_PIXELS:
            logits = logits[:, ::step, ::step]
        return softmax(logits, predictor.temperature)

    def store_prediction(self, k: int) -> None:
        """Store the prediction for an image before its first stroke, to compute the score later."""
        image = self.folder.images[k]
        if image.was_trained_on or image.state != "empty":
            return
        with self._lock:
            known = self._suggestions.get((k, self.number))
        if known is not None:
            path = self._prediction_path(k)
            make_folder(path.parent)
            with replacing(path, _is_png) as draft:
                draft.write_bytes(encode_png(known.ids))

    @property
    def _predictions(self) -> Path:
        """The folder with predictions for images that are not finished."""
        return self.work / "before"

    def _prediction_path(self, k: int) -> Path:
        name = hashlib.sha256(self.folder.images[k].name.encode()).hexdigest()[:24]
        return self._predictions / f"{name}.png"

    def score_finished(self, k: int) -> None:
        """Score the prediction that was stored before the first stroke in a finished image."""
        folder, path = self.folder, self._prediction_path(k)
        if not path.exists() or folder.table is None:
            return
        label, _ = folder.read(k)
        prediction = np.asarray(read_mask(path), np.uint8)
        prediction = resize_label(prediction, (label.shape[1], label.shape[0]))
        # Pixels without a class of the folder count as errors, in an additional class.
        num_classes = len(folder.table)
        prediction = np.where(prediction < num_classes, prediction, num_classes).astype(np.uint8)
        counts = confusion(prediction, label, num_classes + 1)
        name = folder.images[k].name
        folder.scores[:] = [row for row in folder.scores if row.get("name") != name]
        folder.scores.append(
            {"name": name, "tally": tally(counts)[:, :num_classes].tolist(), "round": self.number}
        )
        folder.write_states()

    def score_curve(self) -> list[float | None]:
        """Return the mean IoU over the last ``NUM_SCORED`` images, after each finished image."""
        tallies = [np.array(row["tally"], np.int64) for row in self.folder.scores]
        width = max((each.shape[1] for each in tallies), default=0)
        padded = [np.pad(each, ((0, 0), (0, width - each.shape[1]))) for each in tallies]
        values = [
            float(mean_iou(np.sum(padded[max(0, end - NUM_SCORED) : end], axis=0)))
            for end in range(1, len(padded) + 1)
        ]
        return [None if np.isnan(value) else value for value in values]


def _is_png(path: Path) -> bool:
    """Whether a file in the folder of predictions is a PNG and not a link."""
    return read_ends(path, 8) == b"\x89PNG\r\n\x1a\n"


def downscale_image(image: Image, max_pixels: int) -> Image:
    """Return an image ``(H, W, C)`` with at most ``max_pixels`` pixels."""
    height, width = image.shape[:2]
    factor = (max_pixels / (height * width)) ** 0.5
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
    """Return 1 where the model is least certain in the neighbourhood of a pixel, ``(h, w)``."""
    radius = max(2, max(uncertainty.shape) // 40)
    grey = PIL.Image.fromarray(np.rint(255 * uncertainty).astype(np.uint8))
    smooth = np.asarray(grey.filter(PIL.ImageFilter.BoxBlur(radius)), np.float32) / 255
    limit = max(float(np.quantile(smooth, 1 - _UNSURE_SHARE)), _MIN_UNCERTAINTY)
    unsure: NDArray[np.uint8] = (smooth > limit).astype(np.uint8)
    return unsure
