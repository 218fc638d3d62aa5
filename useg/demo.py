"""Nothing -> made street scenes, a trained U-Net, its scores and a page: the whole job, to see it work."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from useg import api
from useg.config import Settings
from useg.data.dataset import Dataset, read_sample
from useg.data.images import resize_image, write_picture
from useg.data.layouts import find
from useg.data.scenes import write_scenes
from useg.errors import UsageError
from useg.files import make_folder, write_json
from useg.inference.predictor import Predictor
from useg.inference.streams import predict_files
from useg.machine import describe
from useg.pictures import painted, side_by_side, with_legend
from useg.reporting.evaluate import Evaluation
from useg.reporting.evaluate import evaluate as evaluate_dataset
from useg.reporting.gallery import keep
from useg.reporting.inspection import inspect
from useg.reporting.publish import command_lines, publish, run_facts
from useg.training.loop import Progress, Silent

SIZE = (128, 96)
SCENES = {"train": 800, "test": 100}
MINUTES = 4.2
# the short form: enough to see that every step works, too little for good scores
QUICK_SCENES = {"train": 80, "test": 10}
QUICK_MINUTES = 0.5
CHOICES = {  # each scene is a street of its own: no film, whatever the numbers in the names say
    "model.encoder": "plain", "data.split": "random", "data.holdout": 0.025
}  # fmt: skip


@dataclass(frozen=True)
class Demo:
    """What the demo made: its page, and the scores on scenes that training never saw."""

    report: Path
    evaluation: Evaluation
    seconds: float


def demo(
    out: str | Path = "demo",
    *,
    minutes: float | None = None,
    quick: bool = False,
    progress: Progress | None = None,
) -> Demo:
    """Do the whole job on made street scenes: scenes, training, evaluation on scenes of other seeds, prediction, page.

    Args:
        out: a new or empty folder, or one that an earlier demo made (it is replaced).
        minutes: time for training; by default 4.2, or 0.5 with ``quick``.
        quick: make a tenth of the scenes, so that the whole job takes about half a minute. It shows
            that every step works; the scores are low.
        progress: told what happens.

    Raises:
        UsageError: the folder holds something else, or cannot be written.
    """
    began = time.perf_counter()
    out, progress = Path(out), progress or Silent()
    marker = out / ".useg-demo"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not marker.exists():
            raise UsageError(f"{out} exists and was not made by useg demo; choose another folder with --out")
        shutil.rmtree(out)
    make_folder(out)
    marker.touch()
    num_scenes = QUICK_SCENES if quick else SCENES
    if minutes is None:
        minutes = QUICK_MINUTES if quick else MINUTES
    for seed, (name, count) in enumerate(num_scenes.items()):
        progress.say(f"making {count} street scenes in {out / name}")
        write_scenes(out / name, count, SIZE, seed)
    progress.say(f"looking through them into {out / 'inspect.html'}")
    inspect(out / "train", Settings().with_(CHOICES), out / "inspect.html")
    run = api.train(out / "train", out / "run", minutes=minutes, settings=CHOICES, progress=progress)
    predictor = api.load(out / "run")
    progress.say(f"scoring it on {num_scenes['test']} scenes of other seeds")
    dataset = find(out / "test")
    dataset = replace(dataset, pairs=tuple(replace(pair, split="test") for pair in dataset.pairs))
    thumbnails: list[bytes] = []
    evaluation = evaluate_dataset(predictor, dataset, "test", seen=keep(thumbnails))
    progress.say(f"labelling them into {out / 'labels'}")
    predict_files(predictor, [str(out / "test" / "CameraRGB")], out / "labels")
    seconds = time.perf_counter() - began
    write_json(out / "scores.json", {**evaluation.scores.as_dict(), "seconds": seconds, "seed": run.settings.train.seed, "machine": describe()})
    facts = {"Whole demo": f"{seconds / 60:.1f} minutes", **run_facts(run)}
    _draw(out / "picture.png", predictor, dataset, evaluation)
    publish(
        out / "report.html", "useg demo: made street scenes", predictor, dataset, evaluation,
        thumbnails=thumbnails, log=run.log, facts=facts, commands=command_lines(str(out / "run"), str(out / "test"), "all"),
    )  # fmt: skip
    return Demo(out / "report.html", evaluation, seconds)


def _draw(path: Path, predictor: Predictor, dataset: Dataset, evaluation: Evaluation) -> None:
    """Draw the scene of median score: image | truth | prediction, twice enlarged, with the classes in it."""
    median = sorted(evaluation.images, key=lambda image: image.mean_iou)[len(evaluation.images) // 2]
    sample = read_sample(median.pair, dataset)
    prediction = predictor(sample.image)
    height, width = sample.label.shape
    maps = [np.repeat(np.repeat(painted(label, predictor.classes), 2, 0), 2, 1) for label in (sample.label, prediction)]
    enlarged = [resize_image(sample.image, (2 * width, 2 * height)), *maps]
    write_picture(path, with_legend(side_by_side(enlarged, ("image", "truth", "prediction")), sample.label, predictor.classes))
