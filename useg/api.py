"""Whole jobs: ``train`` makes a model and its report, ``run_demo`` does it all on made scenes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from useg import distributed
from useg.config import Settings, read_provenance, read_settings
from useg.data.dataset import Dataset, read_sample, read_split_csv
from useg.data.layouts import find_dataset
from useg.data.splits import open_dataset
from useg.errors import SettingsError, UsageError
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
from useg.training.checkpoint import CHECKPOINT_NAME, strip_checkpoint
from useg.training.loop import Run, fit
from useg.training.trainer import Progress, SilentProgress

DEMO_SIZE = (128, 96)
DEMO_SCENES = {"train": 800, "test": 100}
DEMO_MINUTES = 4.2

# The short form: enough to show that every step works, too little for good scores.
QUICK_SCENES = {"train": 80, "test": 10}
QUICK_MINUTES = 0.5

# Each scene is a street of its own, not a frame of a film, whatever the numbers in the names say.
DEMO_SETTINGS = {"model.encoder": "plain", "data.split": "random", "data.holdout": 0.025}


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
        data: A folder whose layout is recognised, or a ``dataset.toml``.
        out: The run folder to write.
        minutes: Time for the whole job, including decoding and report.
        epochs: Passes over the training images, instead of ``minutes``. If neither is set, the job
            takes 10 minutes.
        settings: Dotted settings, such as ``{"model.padding": "valid", "data.size": "256x192"}``.
        config: A ``run.toml`` to start from; the one of a finished run repeats that run.
        resume: Continue the interrupted or killed run in ``out`` with the settings of its
            ``run.toml``, to the same result to the bit. A run that does not exist is started, and
            the report of a finished run is written again.
        progress: Receives what happens.

    Returns:
        The run: settings, validation scores, log.

    Raises:
        UsageError: The data or settings cannot be used, or the folder cannot be written.

    Example:
        >>> import useg
        >>> run = useg.train("data", "run", minutes=10)  # doctest: +SKIP
        >>> run.scores.mean_iou  # doctest: +SKIP
        0.73
    """
    began = time.perf_counter()
    out = Path(out)
    progress = progress if progress and distributed.is_main_process() else SilentProgress()
    if (resume or distributed.is_restarted()) and (out / "run.toml").exists():
        return _resume(Path(data), out, progress)
    chosen = read_settings(Path(config)) if config else Settings()
    chosen = chosen.with_(_changed_settings(minutes, epochs, settings or {}))
    dataset = open_dataset(data, chosen)
    return _train_and_report(dataset, out, chosen, progress, began)


def _changed_settings(
    minutes: float | None, epochs: int | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the settings that the arguments change."""
    if minutes is not None and epochs is not None:
        raise SettingsError("both minutes and epochs are set; set only one of them")
    changes: dict[str, Any] = dict(settings)
    if minutes is not None or epochs is not None:
        # A length that is an argument replaces every length of the config.
        length = {"train.minutes": minutes, "train.epochs": epochs, "train.steps": None}
        changes = {**length, **changes}
    if "train.steps" in changes:
        # The recounts of the config belong to its own number of steps.
        changes = {"train.recounts": (), **changes}
    return changes


def _resume(data: Path, out: Path, progress: Progress) -> Run:
    """Continue the run in ``out``."""
    began = time.perf_counter()
    settings = read_settings(out / "run.toml")
    progress.say(f"continuing {out} with the settings of its run.toml")
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
    """Train, in all processes that torchrun has started; then calibrate, score and report."""
    with distributed.process_group():
        run = fit(dataset, out, settings, progress, resume=resume, began=began)
    if run.interrupted or not distributed.is_main_process():
        return run
    calibrate(run.out, dataset)
    predictor = load(run.out)
    thumbnails: list[bytes] = []
    keep = collect_thumbnails(thumbnails)
    evaluation = evaluate_dataset(predictor, dataset, "val", on_prediction=keep)
    evaluation = add_causes(evaluation, dataset, predictor)
    seconds = time.perf_counter() - began
    scores = {
        **evaluation.as_dict(),
        "notices": [asdict(notice) for notice in run.notices],
        "seconds": seconds,
        "machine": describe_machine(),
    }
    write_json(run.out / "scores.json", scores)
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
    strip_checkpoint(run.out / CHECKPOINT_NAME)
    return run


@dataclass(frozen=True)
class Demo:
    """The result of the demo: its report, and the scores on scenes that training never saw."""

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
    """Do the whole job on made street scenes: train, evaluate on new scenes, predict, report.

    Args:
        out: A new or empty folder, or one that an earlier demo made (it is replaced).
        minutes: Time for training; by default 4.2, or 0.5 with ``quick``.
        quick: Make a tenth of the scenes, so that the whole job takes about half a minute. It shows
            that every step works; the scores are low.
        progress: Receives what happens.

    Raises:
        UsageError: The folder contains something else, or cannot be written.
    """
    began = time.perf_counter()
    out, progress = Path(out), progress or SilentProgress()
    _clear_demo_folder(out)
    num_scenes = QUICK_SCENES if quick else DEMO_SCENES
    if minutes is None:
        minutes = QUICK_MINUTES if quick else DEMO_MINUTES
    for seed, (name, count) in enumerate(num_scenes.items()):
        progress.say(f"making {count} street scenes in {out / name}")
        write_scenes(out / name, count, DEMO_SIZE, seed)
    progress.say(f"inspecting the training scenes: {out / 'inspect.html'}")
    inspect_dataset(out / "train", Settings().with_(DEMO_SETTINGS), out / "inspect.html")
    run = train(
        out / "train", out / "run", minutes=minutes, settings=DEMO_SETTINGS, progress=progress
    )
    predictor = load(out / "run")
    progress.say(f"evaluating the model on {num_scenes['test']} new scenes")
    dataset = find_dataset(out / "test")
    dataset = replace(dataset, pairs=tuple(replace(pair, split="test") for pair in dataset.pairs))
    thumbnails: list[bytes] = []
    keep = collect_thumbnails(thumbnails)
    evaluation = evaluate_dataset(predictor, dataset, "test", on_prediction=keep)
    progress.say(f"writing their label maps to {out / 'labels'}")
    predict_files(predictor, [str(out / "test" / "CameraRGB")], out / "labels")
    seconds = time.perf_counter() - began
    scores = {
        **evaluation.scores.as_dict(),
        "seconds": seconds,
        "seed": run.settings.train.seed,
        "machine": describe_machine(),
    }
    write_json(out / "scores.json", scores)
    _draw_demo(out / "picture.png", predictor, dataset, evaluation)
    report = Report(
        title="useg demo: made street scenes",
        evaluation=evaluation,
        classes=predictor.classes,
        thumbnails=thumbnails,
        log=run.log,
        facts={"Whole demo": f"{seconds / 60:.1f} minutes", **run_facts(run)},
        commands=command_lines(str(out / "run"), str(out / "test"), "all"),
    )
    publish_report(out / "report.html", report, predictor, dataset)
    return Demo(out / "report.html", evaluation, seconds)


def _clear_demo_folder(out: Path) -> None:
    """Make the folder of the demo, or clear that of an earlier one."""
    marker = out / ".useg-demo"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not marker.exists():
            raise UsageError(
                f"{out} exists and was not made by useg demo; choose another folder with --out"
            )
        shutil.rmtree(out)
    make_folder(out)
    marker.touch()


def _draw_demo(path: Path, predictor: Predictor, dataset: Dataset, evaluation: Evaluation) -> None:
    """Draw the scene of median score: image, truth and prediction at double size, and a legend."""
    by_score = sorted(evaluation.images, key=lambda image: image.mean_iou)
    sample = read_sample(by_score[len(by_score) // 2].pair, dataset)
    height, width = sample.label.shape
    maps = [
        paint_label(label, predictor.classes).repeat(2, axis=0).repeat(2, axis=1)
        for label in (sample.label, predictor(sample.image))
    ]
    pictures = [resize_image(sample.image, (2 * width, 2 * height)), *maps]
    strip = side_by_side(pictures, ("image", "truth", "prediction"))
    write_picture(path, add_legend(strip, sample.label, predictor.classes))
