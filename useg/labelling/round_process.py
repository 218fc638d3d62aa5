"""The process that trains on what is painted: in a round, and at the end of "train properly".

After a round it also ranks the other pictures. It reads its task as a line of JSON from standard
input, and writes its progress as lines of JSON to standard output. It ends when its input does, so
it never outlives the labelling page.
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

# Pictures that are scored after the last step of a round.
MAX_VALIDATION_PICTURES = 6
# Painted pictures with which those are compared that are ranked.
MAX_COMPARED_PICTURES = 24
# More epochs than any round has, so its last weights are taken. The model that it starts from has
# suggested much of what is painted, and scores would choose weights that are close to that model.
_NEVER = 10**9
# How much the weights after the last training count in its model; those before it have the rest.
# On images that nobody had painted, of a CamVid recording and a CARLA street, the mean scored 53.1
# and 57.6 % mIoU, the weights after it 52.0 and 57.5 %, those before it 52.2 and 55.4 %, and an
# even mean 53.4 and 57.0 %.
LAST_SHARE = 0.75
# The page stays fluid: the round takes what it leaves.
NICENESS = 10


def _report(**content: Any) -> None:
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


class _Progress:
    """Reports the steps of training."""

    def say(self, text: str) -> None:
        """Ignore what is for people at a terminal."""

    def decoded(self, done: int, total: int) -> None:
        """Ignore the decoding, which takes a moment."""

    def step(self, row: dict[str, Any], steps: int, seconds_left: float) -> None:
        """Report a step."""
        _report(step=row["step"], steps=steps)

    def validated(self, row: dict[str, Any]) -> None:
        """Ignore the score, since the round has seen these pictures."""


def split_painted(dataset: Dataset, pictures: Collection[str]) -> Dataset:
    """Return the painted pictures, all for training, and some of them for validation, too.

    Those for validation come first, so that the list of splits, where the last entry of an image
    counts, says that the model was trained on them. Otherwise the next round would take the model
    that it starts from for the best one: on masks that were accepted from its own answers.
    """
    from useg.data.dataset import pick_evenly

    painted = _painted(dataset, pictures)
    train = [replace(pair, split="train") for pair in painted]
    chosen = [replace(pair, split="val") for pair in pick_evenly(painted, MAX_VALIDATION_PICTURES)]
    return replace(dataset, pairs=(*chosen, *train), splits_by="all painted images", notes=())


def _painted(dataset: Dataset, pictures: Collection[str]) -> list[Pair]:
    return [pair for pair in dataset.pairs if os.path.realpath(pair.image) in pictures]


def train_round(task: Mapping[str, Any], began: float) -> None:
    """Train a model on the painted pictures, then rank others, unlike the painted ones first.

    Args:
        task: ``root``, ``pictures`` (paths of those to train on), ``others`` (to rank), ``out``,
            ``minutes``, ``start`` (a model to go on from, or None).
        began: When the round began.
    """
    from useg.config import Settings
    from useg.data.dataset import pick_evenly
    from useg.data.layouts import find_dataset
    from useg.errors import UsageError
    from useg.inference.predictor import load
    from useg.inference.ranking import rank_images
    from useg.training.loop import fit
    from useg.training.warm_start import take_over

    dataset = find_dataset(Path(task["root"]), strict=False)
    dataset = split_painted(dataset, task["pictures"])
    changes = {
        "train.minutes": task["minutes"],
        "train.seed": task["round"],
        "train.validate_every": _NEVER,
    }
    settings = Settings().with_(changes)
    if task["start"]:
        settings, _ = take_over(task["start"], settings, changes.keys())
    run = fit(dataset, Path(task["out"]), settings, _Progress(), began=began)
    (run.out / "state.pt").unlink(missing_ok=True)
    _report(trained=len(run.log), seconds=time.perf_counter() - began)
    others = [Path(path) for path in task["others"]]
    ranked: list[dict[str, Any]] = []
    if others:
        try:
            painted = [Path(path) for path in pick_evenly(task["pictures"], MAX_COMPARED_PICTURES)]
            order = rank_images(load(run.out), others, labelled=painted).order
            ranked = [{"path": str(image.path), "gain": image.gain} for image in order]
        except UsageError as error:
            print(error, file=sys.stderr)
    _report(ranked=ranked, seconds=time.perf_counter() - began)


def train_on_everything(task: Mapping[str, Any], began: float) -> None:
    """Train the last model: the one of the rounds goes on with all painted pictures.

    No picture is held out. The weights that are kept are a mean of those before and after, see
    ``LAST_SHARE``. The model file says the score of the model ``scored``.

    Args:
        task: ``root``, ``pictures`` (paths of the painted ones), ``out``, ``minutes``, ``start``
            (the model of the last round, or None), ``scored`` (the run folder of a model for which
            some of the painted pictures were held out).
        began: When the time began to count.
    """
    from useg.config import Settings
    from useg.data.layouts import find_dataset
    from useg.training.loop import fit
    from useg.training.warm_start import take_over

    dataset = find_dataset(Path(task["root"]), strict=False)
    pairs = tuple(replace(pair, split="train") for pair in _painted(dataset, task["pictures"]))
    dataset = replace(dataset, pairs=pairs, splits_by="all painted images", notes=())
    changes = {"train.minutes": task["minutes"], "train.validate_every": _NEVER}
    start = choose_start(task["start"], Path(task["scored"]))
    settings, _ = take_over(start, Settings().with_(changes), changes.keys())
    out = Path(task["out"])
    fit(dataset, out, settings, _Progress(), began=began)
    (out / "state.pt").unlink(missing_ok=True)
    _finish(out, start, Path(task["scored"]))
    _report(said=_describe_score(out, len(task["pictures"])))


def choose_start(last: str | None, scored: Path) -> Path:
    """Return the model of the last round if it is what is planned now, otherwise the scored one."""
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
    """Average a model with the one that it started from, and give it a score.

    Score and temperature are those of a model for which pictures were held out.
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
        "scored_by": "a model that was trained before, without the images held out for the score",
    }
    save_model(model, out / MODEL_NAME)


def _describe_score(out: Path, num_pictures: int) -> str:
    """Say what was trained, and on what the score was measured."""
    from useg.errors import format_count
    from useg.models.segmenter import load_model

    scores = load_model(out).provenance["validation"]
    return (
        f"{out.name}/model.safetensors is trained on all {num_pictures} painted images; mIoU "
        f"{100 * scores['mean_iou']:.1f} % is that of a model before it, on "
        f"{format_count(scores['num_images'], 'image')} held out from that one"
    )


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(1)


def _main() -> None:
    began = time.perf_counter()
    task = json.loads(sys.stdin.readline())
    train = train_on_everything if "scored" in task else train_round
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
    # Not by way of the thread that waits for the end of the input.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    _main()
