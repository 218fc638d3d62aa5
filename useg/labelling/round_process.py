"""The process that trains on painted images: in a round, or for the final model.

After a round it also ranks the other images. It reads its task from standard input, as a line of
JSON, and writes its progress to standard output, as lines of JSON. It exits when its input closes,
so it never outlives the labelling server.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from useg.data.dataset import Dataset, Pair

# Images to validate on after the last step of a round, at most.
MAX_VALIDATION_IMAGES = 6
# Painted images that the ranking compares others with, at most.
MAX_COMPARED_IMAGES = 24
# The final weights are a weighted mean of the weights before and after training. This is the weight
# of those after it. On unpainted images of a CamVid recording and a CARLA street, this mean scored
# 53.1 and 57.6 % mIoU; weights after training 52.0 and 57.5 %; weights before it 52.2 and 55.4 %;
# and a plain mean 53.4 and 57.0 %.
LAST_SHARE = 0.75
# Low priority keeps the page responsive.
NICENESS = 10


def _report(**content: Any) -> None:
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


class _Progress:
    """Reports the progress of training."""

    def say(self, text: str) -> None:
        """Ignore messages for a terminal."""

    def decoded(self, done: int, total: int) -> None:
        """Ignore decoding, which is quick."""

    def step(self, row: dict[str, Any], steps: int, seconds_left: float) -> None:
        """Report a step."""
        _report(step=row["step"], steps=steps)

    def validated(self, row: dict[str, Any]) -> None:
        """Ignore the score, because the round also trains on these images."""


def split_painted(dataset: Dataset, images: Collection[str]) -> Dataset:
    """Return all painted images for training, and some of them for validation, too.

    Validation pairs come first: the last entry of an image in the list of splits counts, so the
    model file says that it was trained on them. Otherwise the next round would consider its initial
    model the best one, judged on masks that were accepted from its own predictions.
    """
    from useg.data.dataset import pick_evenly

    painted = _painted(dataset, images)
    train = [replace(pair, split="train") for pair in painted]
    chosen = [replace(pair, split="val") for pair in pick_evenly(painted, MAX_VALIDATION_IMAGES)]
    return replace(dataset, pairs=(*chosen, *train), splits_by="all painted images", notes=())


def _painted(dataset: Dataset, images: Collection[str]) -> list[Pair]:
    return [pair for pair in dataset.pairs if os.path.realpath(pair.image) in images]


def train_round(task: Mapping[str, Any], began: float) -> None:
    """Train a model on the painted images, then rank others, those unlike the painted ones first.

    Args:
        task: ``root``, ``images`` (paths to train on), ``others`` (paths to rank), ``out``,
            ``minutes``, ``start`` (an initial model, or None).
        began: The start time of the round.
    """
    from useg.config import VALIDATE_AT_END, Settings
    from useg.data.dataset import pick_evenly
    from useg.data.layouts import find_dataset
    from useg.errors import UsageError
    from useg.inference.predictor import load
    from useg.inference.ranking import rank_images
    from useg.training.loop import fit
    from useg.training.warm_start import adopt_settings

    dataset = find_dataset(Path(task["root"]), strict=False)
    dataset = split_painted(dataset, task["images"])
    changes = {
        "train.minutes": task["minutes"],
        "train.seed": task["round"],
        # Validation would favour weights close to the initial model, because that model has
        # suggested many of the labels.
        "train.validate_every": VALIDATE_AT_END,
    }
    settings = Settings().with_(changes)
    if task["start"]:
        settings, _ = adopt_settings(task["start"], settings, changes.keys())
    run = fit(dataset, Path(task["out"]), settings, _Progress(), began=began)
    (run.out / "state.pt").unlink(missing_ok=True)
    _report(trained=len(run.log), seconds=time.perf_counter() - began)
    others = [Path(path) for path in task["others"]]
    ranked: list[dict[str, Any]] = []
    if others:
        try:
            painted = [Path(path) for path in pick_evenly(task["images"], MAX_COMPARED_IMAGES)]
            order = rank_images(load(run.out), others, labelled=painted).order
            ranked = [{"path": str(image.path), "gain": image.gain} for image in order]
        except UsageError as error:
            print(error, file=sys.stderr)
    _report(ranked=ranked, seconds=time.perf_counter() - began)


def train_final_model(task: Mapping[str, Any], began: float) -> None:
    """Train the final model: start from the last round, and train on all painted images.

    No image is held out. The final weights are a mean of those before and after training, see
    ``LAST_SHARE``. The model file contains the score of the model ``scored``.

    Args:
        task: ``root``, ``images`` (paths of all painted images), ``out``, ``minutes``, ``start``
            (the model of the last round, or None), ``scored`` (the run folder of a model that held
            out some of the painted images).
        began: The start time.
    """
    from useg.config import VALIDATE_AT_END, Settings
    from useg.data.layouts import find_dataset
    from useg.training.loop import fit
    from useg.training.warm_start import adopt_settings

    dataset = find_dataset(Path(task["root"]), strict=False)
    pairs = tuple(replace(pair, split="train") for pair in _painted(dataset, task["images"]))
    dataset = replace(dataset, pairs=pairs, splits_by="all painted images", notes=())
    changes = {"train.minutes": task["minutes"], "train.validate_every": VALIDATE_AT_END}
    start = choose_start(task["start"], Path(task["scored"]))
    settings, _ = adopt_settings(start, Settings().with_(changes), changes.keys())
    out = Path(task["out"])
    fit(dataset, out, settings, _Progress(), began=began)
    (out / "state.pt").unlink(missing_ok=True)
    _finish(out, start, Path(task["scored"]))
    _report(said=_describe_score(out, Path(task["scored"]), len(task["images"])))


def choose_start(last: str | None, scored: Path) -> Path:
    """Return the model of the last round if its settings match the plan, else the scored one."""
    from useg.errors import ModelError
    from useg.models.segmenter import load_model

    planned = load_model(scored)
    try:
        model = load_model(Path(last)) if last else planned
    except ModelError:
        return scored
    is_planned = (
        model.settings == planned.settings
        and model.working == planned.working
        and model.pixels == planned.pixels
        and model.classes.names == planned.classes.names
    )
    return Path(last) if last and is_planned else scored


def _finish(out: Path, start: Path, scored: Path) -> None:
    """Average a model with its initial weights, and store a score in its file.

    The score and the temperature come from the model that held out some images.
    """
    import torch

    from useg.models.segmenter import MODEL_NAME, load_model, save_model

    model, measured = load_model(out), load_model(scored)
    before = load_model(start).state_dict()
    mean = {
        name: torch.lerp(before[name], value, LAST_SHARE) if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(mean)
    model.temperature = measured.temperature
    model.provenance |= {
        "validation": measured.provenance["validation"],
        "scored_by": "an earlier model, which was not trained on the held-out images",
    }
    save_model(model, out / MODEL_NAME)


def _describe_score(out: Path, scored: Path, num_images: int) -> str:
    """Return a sentence about the final model, and about the model that was scored."""
    from useg.errors import format_count
    from useg.models.segmenter import load_model

    scores = load_model(out).provenance["validation"]
    return (
        f"{out.name}/model.safetensors was trained on all {num_images} painted images. The model "
        f"in {out.name}/{scored.name} reached {100 * scores['mean_iou']:.1f} % mIoU on "
        f"{format_count(scores['num_images'], 'held-out image')}"
    )


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(1)


def _main() -> None:
    began = time.perf_counter()
    task = json.loads(sys.stdin.readline())
    train = train_final_model if "scored" in task else train_round
    if train is train_round:
        os.nice(NICENESS)
    threading.Thread(target=_end_with_input, daemon=True).start()
    from useg.errors import UsageError
    from useg.machine import tune

    tune()
    try:
        train(task, began)
    except UsageError as error:
        _report(error=str(error))
        sys.exit(2)
    # A normal exit would wait for the thread that reads the input.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    _main()
