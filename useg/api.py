"""Whole jobs: train a model and report how good it is, and the demo, which does everything on made street scenes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from useg import distributed
from useg.config import Settings, read_provenance, read_settings
from useg.data.dataset import Dataset, read_sample, read_split_csv
from useg.data.layouts import find_dataset
from useg.data.splits import open_dataset
from useg.errors import UsageError
from useg.files import make_folder, write_json
from useg.images.files import resize_image, write_picture
from useg.inference.files import predict_files
from useg.inference.predictor import Predictor, load
from useg.machine import describe_machine
from useg.pictures import add_legend, paint_label, side_by_side
from useg.reporting.causes import add_causes
from useg.reporting.evaluate import Evaluation, calibrate, evaluate_dataset
from useg.reporting.html import collect_thumbnails
from useg.reporting.inspection import inspect_dataset
from useg.reporting.report import command_lines, publish_report, run_facts
from useg.reporting.text import Report
from useg.scenes.scene import write_scenes
from useg.training import trainer
from useg.training.checkpoint import (
    STATE_NAME,
    close_state,
)
from useg.training.loop import Run, fit
from useg.training.trainer import Progress, SilentProgress


def train(
    data: str | Path,
    out: str | Path,
    *,
    minutes: float | None = None,
    epochs: int | None = None,
    settings: Mapping[str, Any] | None = None,
    config: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Train a U-Net on a data set and report how good it is.

    Args:
        data: a folder whose layout is recognised, or a ``dataset.toml``.
        out: the run folder to make.
        minutes: time for the whole job, or
        epochs: passes over the training pictures; with neither, 10 minutes.
        settings: dotted settings, such as ``{"model.padding": "valid", "data.size": "256x192"}``.
        config: a ``run.toml`` to start from; one that a run left repeats that run.
        resume: go on with the run that was interrupted or killed in ``out``, as its ``run.toml`` says, to the same result to the bit; a run
            that has not begun is begun, one that has ended is reported anew.
        progress: told what happens.

    Returns:
        The run: settings, scores on the held-out pictures, log.

    Raises:
        UsageError: unusable data or settings, or a folder that cannot be written.
    """
    began = time.perf_counter()
    out = Path(out)
    progress = progress if progress and distributed.is_main_process() else trainer.SilentProgress()
    if (resume or distributed.is_restarted()) and (out / "run.toml").exists():
        return _resume(Path(data), out, progress)
    chosen = read_settings(Path(config)) if config else Settings()
    limits: dict[str, Any] = {"train.minutes": minutes} if minutes is not None else {}
    limits |= {"train.epochs": epochs} if epochs is not None else {}
    if len(limits) > 1:
        raise UsageError("both minutes and epochs are given; give one of them")
    given = {
        **(
            {"train.minutes": None, "train.epochs": None, "train.steps": None, **limits}
            if limits
            else {}
        ),
        **(settings or {}),
    }
    if "train.steps" in given:  # another number of steps has not been counted again yet
        given = {"train.recounts": (), **given}
    chosen = chosen.with_(given)
    dataset = open_dataset(data, chosen)
    return _train_and_report(dataset, out, chosen, progress, began)


def _resume(data: Path, out: Path, progress: Progress) -> Run:
    """Go on with the run in ``out``."""
    began = time.perf_counter()
    settings = read_settings(out / "run.toml")
    progress.say(f"going on with {out} as its run.toml says")
    dataset = find_dataset(data, Path(settings.data.classes) if settings.data.classes else None)
    splits_by = read_provenance(out / "run.toml").get("splits_by", "")
    dataset = replace(read_split_csv(out / "split.csv", dataset), splits_by=splits_by)
    return _train_and_report(dataset, out, settings, progress, began, resume=True)


def _train_and_report(
    dataset: Dataset,
    out: Path,
    settings: Settings,
    progress: Progress,
    began: float,
    *,
    resume: bool = False,
) -> Run:
    """Train, in as many processes as torchrun has started; calibrate and score the kept model of a run that has ended, and write its report."""
    with distributed.process_group():
        run = fit(dataset, out, settings, progress, resume=resume, began=began)
    if run.interrupted or not distributed.is_main_process():
        return run
    calibrate(run.out, dataset)
    predictor = load(run.out)
    thumbnails: list[bytes] = []
    evaluation = add_causes(
        evaluate_dataset(predictor, dataset, "val", on_prediction=collect_thumbnails(thumbnails)),
        dataset,
        predictor,
    )
    seconds = time.perf_counter() - began
    notices = [asdict(notice) for notice in run.notices]
    write_json(
        run.out / "scores.json",
        {
            **evaluation.as_dict(),
            "notices": notices,
            "seconds": seconds,
            "machine": describe_machine(),
        },
    )
    facts = {"Trained": f"{len(run.log)} steps in {seconds / 60:.1f} minutes", **run_facts(run)}
    report = Report(
        title=f"{dataset.root.name}: U-Net",
        evaluation=evaluation,
        classes=predictor.classes,
        thumbnails=thumbnails,
        log=run.log,
        facts=facts,
        commands=command_lines(str(run.out), str(dataset.root), "val"),
    )
    publish_report(run.out / "report.html", report, predictor, dataset)
    close_state(run.out / STATE_NAME)
    return run


DEMO_SIZE = (128, 96)


DEMO_SCENES = {"train": 800, "test": 100}


DEMO_MINUTES = 4.2


# the short form: enough to see that every step works, too little for good scores
QUICK_SCENES = {"train": 80, "test": 10}


QUICK_MINUTES = 0.5


DEMO_SETTINGS = {  # each scene is a street of its own: no film, whatever the numbers in the names say
    "model.encoder": "plain", "data.split": "random", "data.holdout": 0.025
}  # fmt: skip


@dataclass(frozen=True)
class Demo:
    """What the demo made: its page, and the scores on scenes that training never saw."""

    report: Path
    evaluation: Evaluation
    seconds: float


def run_demo(
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
    out, progress = Path(out), progress or SilentProgress()
    marker = out / ".useg-demo"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not marker.exists():
            raise UsageError(
                f"{out} exists and was not made by useg demo; choose another folder with --out"
            )
        shutil.rmtree(out)
    make_folder(out)
    marker.touch()
    num_scenes = QUICK_SCENES if quick else DEMO_SCENES
    if minutes is None:
        minutes = QUICK_MINUTES if quick else DEMO_MINUTES
    for seed, (name, count) in enumerate(num_scenes.items()):
        progress.say(f"making {count} street scenes in {out / name}")
        write_scenes(out / name, count, DEMO_SIZE, seed)
    progress.say(f"looking through them into {out / 'inspect.html'}")
    inspect_dataset(out / "train", Settings().with_(DEMO_SETTINGS), out / "inspect.html")
    run = train(
        out / "train", out / "run", minutes=minutes, settings=DEMO_SETTINGS, progress=progress
    )
    predictor = load(out / "run")
    progress.say(f"scoring it on {num_scenes['test']} scenes of other seeds")
    dataset = find_dataset(out / "test")
    dataset = replace(dataset, pairs=tuple(replace(pair, split="test") for pair in dataset.pairs))
    thumbnails: list[bytes] = []
    evaluation = evaluate_dataset(
        predictor, dataset, "test", on_prediction=collect_thumbnails(thumbnails)
    )
    progress.say(f"labelling them into {out / 'labels'}")
    predict_files(predictor, [str(out / "test" / "CameraRGB")], out / "labels")
    seconds = time.perf_counter() - began
    write_json(
        out / "scores.json",
        {
            **evaluation.scores.as_dict(),
            "seconds": seconds,
            "seed": run.settings.train.seed,
            "machine": describe_machine(),
        },
    )
    facts = {"Whole demo": f"{seconds / 60:.1f} minutes", **run_facts(run)}
    _draw_demo(out / "picture.png", predictor, dataset, evaluation)
    report = Report(
        title="useg demo: made street scenes",
        evaluation=evaluation,
        classes=predictor.classes,
        thumbnails=thumbnails,
        log=run.log,
        facts=facts,
        commands=command_lines(str(out / "run"), str(out / "test"), "all"),
    )
    publish_report(out / "report.html", report, predictor, dataset)
    return Demo(out / "report.html", evaluation, seconds)


def _draw_demo(path: Path, predictor: Predictor, dataset: Dataset, evaluation: Evaluation) -> None:
    """Draw the scene of median score: image | truth | prediction, twice enlarged, with the classes in it."""
    median = sorted(evaluation.images, key=lambda image: image.mean_iou)[
        len(evaluation.images) // 2
    ]
    sample = read_sample(median.pair, dataset)
    prediction = predictor(sample.image)
    height, width = sample.label.shape
    maps = [
        np.repeat(np.repeat(paint_label(label, predictor.classes), 2, 0), 2, 1)
        for label in (sample.label, prediction)
    ]
    enlarged = [resize_image(sample.image, (2 * width, 2 * height)), *maps]
    write_picture(
        path,
        add_legend(
            side_by_side(enlarged, ("image", "truth", "prediction")),
            sample.label,
            predictor.classes,
        ),
    )
