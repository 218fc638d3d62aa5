"""Whole jobs: ``train`` makes a model and its report, ``run_demo`` does it all on made scenes."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from useg import distributed
from useg.classes import CARLA, classes_to_toml
from useg.config import Settings, read_provenance, read_settings
from useg.data.dataset import Dataset, read_sample
from useg.data.folds import describe_score
from useg.data.layouts import find_dataset
from useg.data.split_files import read_split_csv
from useg.data.splits import keep_every, open_dataset
from useg.device import CPU
from useg.doctor.survey import refuse_faulty
from useg.errors import DataError, SettingsError, UsageError
from useg.files import LOCK_NAME, clear_drafts, locked_folder, make_folder, write_json
from useg.images.image_files import resize_image, write_picture
from useg.inference.predict_files import predict
from useg.inference.predictor import Predictor, load
from useg.inference.runtimes import runtime_of_model
from useg.machine import describe_machine, measure_seconds
from useg.models.segmenter import MODEL_NAME, Segmenter
from useg.ownership import (
    is_own_markdown,
    is_own_page,
    is_own_picture,
    is_own_run_toml,
    png_mark,
    read_ends,
)
from useg.reporting.causes import add_causes
from useg.reporting.evaluate import (
    MAX_TEMPERATURE_IMAGES,
    CountSettings,
    Extras,
    calibrate,
    count_image,
    evaluate_dataset,
)
from useg.reporting.evaluation_result import Evaluation
from useg.reporting.html import collect_thumbnails
from useg.reporting.inspection import inspect_dataset
from useg.reporting.report import command_lines, publish_report, run_facts
from useg.reporting.text import Report
from useg.scenes.generate import write_scenes
from useg.training.checkpoint import CHECKPOINT_NAME, RUN_FILES, run_folder, strip_checkpoint
from useg.training.loop import Run, fit
from useg.training.plan import time_limit
from useg.training.plan_rules import choose_checked, choose_images
from useg.training.trainer import Progress, SilentProgress
from useg.training.warm_start import adopt_settings, refuse_changed_start
from useg.visualization import add_legend, paint_label, side_by_side

DEMO_SIZE = (128, 96)
DEMO_SCENES = {"train": 800, "test": 100}
DEMO_MINUTES = 4.2
_DEMO_MARKER = ".useg-demo"
# Files by which others are recognised, in the order in which they are removed.
_DEMO_MARKS = {"run.toml": 1, _DEMO_MARKER: 2}
_DEMO_FOLDERS = {"train", "test", "CameraRGB", "CameraSeg", "run", "pictures", "labels", "overlays"}

# What follows training takes as long as the evaluation of this many images more than it evaluates:
# some that are predicted again for the causes and the pictures, in proportion and beside it. The
# rest takes these seconds. Measured on the demo and on 204 frames of CARLA.
REPORT_IMAGE_RATIO, REPORT_IMAGES = 1.2, 25
REPORT_SECONDS = 0.5

# The short form: enough to show that every step works, too little for good scores.
QUICK_SCENES = {"train": 80, "test": 10}
QUICK_MINUTES = 0.5

# Each scene is a street of its own, not a frame of a video, although the names are numbered.
# The scenes that the demo labels come from the same renderer as those that it trains on.
DEMO_SETTINGS = {
    "model.encoder": "plain",
    "data.split": "random",
    "data.holdout": 0.025,
    "data.standardize": False,
    "train.photometric": 0.0,
}


@contextmanager
def _kept_state() -> Iterator[None]:
    """Restore the caller's random state of Python, NumPy and PyTorch, and number of threads."""
    python, numpy_state, threads = random.getstate(), np.random.get_state(), torch.get_num_threads()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)
            torch.set_num_threads(threads)


@_kept_state()
def train(
    data: str | Path | Dataset,
    out: str | Path,
    *,
    minutes: float | None = None,
    epochs: int | None = None,
    settings: Mapping[str, Any] | None = None,
    config: str | Path | None = None,
    start: str | os.PathLike[str] | None = None,
    unlabelled: str | os.PathLike[str] | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Train a U-Net on a data set and report how good it is.

    Args:
        data: A folder whose layout is recognised, a ``dataset.toml``, or a data set whose images
            have their splits. If no image is held out, the last model is kept, and there is no
            score and no report.
        out: The run folder to write.
        minutes: Time for the whole job, including decoding and report.
        epochs: Passes over the training images, instead of ``minutes``. If neither is set, the job
            takes 10 minutes.
        settings: Dotted settings, such as ``{"model.padding": "valid", "data.size": "256x192"}``.
        config: A ``run.toml`` to start from; the one of a finished run repeats that run.
        start: A run, run folder or model file to start from. Its weights, network and working size
            are reused; the rows of the output layer are matched by class name.
        unlabelled: A folder of 4 or more images without masks, from the place where the model will
            work. If it scores much lower on held-out images recoloured like them, half of the
            training crops are recoloured from then on; otherwise these images change nothing.
        resume: Continue the interrupted or killed run in ``out`` with the settings of its
            ``run.toml``; the result is bit for bit that of an uninterrupted run. If there is no
            run, it is started; if it is finished, its report is written again.
        force: Train although ``useg inspect`` finds errors in the data.
        progress: Receives what happens.

    Returns:
        The run: settings, validation scores, log.

    Raises:
        UsageError: The data have errors, the settings cannot be used, or the folder cannot be
            written.

    Example:
        >>> import useg
        >>> run = useg.train("data", "run", minutes=10)  # doctest: +SKIP
        >>> run.scores.mean_iou  # doctest: +SKIP
        0.73
    """
    began = time.perf_counter()
    out = Path(out)
    progress = progress if progress and distributed.is_main_process() else SilentProgress()
    changes = _changed_settings(minutes, epochs, settings or {}, unlabelled)
    if (resume or distributed.is_restarted()) and _has_begun(out):
        return _resume(data, out, progress, start, changes.get("data.unlabelled"))
    chosen = _choose_settings(changes, config, start, progress)
    dataset = data if isinstance(data, Dataset) else open_dataset(data, chosen)
    refuse_data_folder(out, dataset)
    if not force and distributed.is_main_process():
        check_dataset(dataset, time_limit(chosen.train), progress)
    return _train_and_report(dataset, out, chosen, progress, began)


def check_dataset(dataset: Dataset, seconds: float | None, progress: Progress) -> None:
    """Refuse a data set with errors; check as many images as fit into a run of this length.

    Raises:
        DataError: There are errors.
    """
    pairs = dataset.pairs if seconds is None else choose_checked(dataset, seconds)
    refuse_faulty(replace(dataset, pairs=pairs), progress.say)
    if len(pairs) < len(dataset.pairs):
        progress.say(
            f"to save time, only {len(pairs):,} of {len(dataset.pairs):,} images were checked for "
            "errors; useg inspect checks all of them"
        )


def _has_begun(out: Path) -> bool:
    """Whether there is a run to continue.

    One that was killed before it had decided its splits is removed, to be started again.
    """
    run, has_splits = out / "run.toml", os.path.exists(out / "split.csv")
    if has_splits or not is_own_run_toml(run) or not distributed.is_main_process():
        return has_splits and os.path.exists(run)
    with run_folder(out, locked=True):
        run.unlink(missing_ok=True)
    return False


def refuse_data_folder(out: Path, dataset: Dataset) -> None:
    """Refuse a run among the data, whose ``split.csv`` would become that of the data set.

    Raises:
        DataError: ``out`` is the folder of the data set or of some of its files.
    """
    files = (path for pair in dataset.pairs for path in (pair.image, pair.mask))
    folders = {dataset.root, *(path.parent for path in files)}
    place = os.path.realpath(out)
    if any(os.path.realpath(folder) == place for folder in folders):
        raise DataError(
            f"{out} contains the data, and the files of a run would mix with them; "
            "choose another folder for the output"
        )


def _changed_settings(
    minutes: float | None,
    epochs: int | None,
    settings: Mapping[str, Any],
    unlabelled: str | os.PathLike[str] | None,
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
        # Recounts and changes of threads in the config belong to its own number of steps.
        changes = {"train.recounts": (), "train.thread_changes": (), **changes}
    if unlabelled is not None and changes.get("data.unlabelled") is not None:
        raise SettingsError("unlabelled and data.unlabelled are both set; set only one of them")
    unlabelled = changes.get("data.unlabelled") if unlabelled is None else unlabelled
    if unlabelled is not None:
        # What was decided about other images does not hold for these.
        changes = {"train.unlabelled_from": None, **changes}
        changes["data.unlabelled"] = os.path.abspath(unlabelled)
    return changes


def _choose_settings(
    changes: Mapping[str, Any],
    config: str | Path | None,
    start: str | os.PathLike[str] | None,
    progress: Progress,
) -> Settings:
    """Return the settings of a config with changes, and those of the model to start from."""
    base = read_settings(Path(config)) if config else Settings()
    given = {
        f"{name}.{key}"
        for name in base.model_fields_set
        for key in getattr(base, name).model_fields_set
    }
    chosen = base.with_(changes)
    # A run.toml that names a model has its settings already.
    if "model.start" in changes:
        if start is not None:
            raise SettingsError("start and model.start are both set; set only one of them")
        start = chosen.model.start
    if start is None:
        if config and chosen.model.start:
            refuse_changed_start(Path(config))
        return chosen
    chosen, said = adopt_settings(start, chosen, given | changes.keys())
    progress.say(said)
    return chosen


def _resume(
    data: str | Path | Dataset,
    out: Path,
    progress: Progress,
    start: str | os.PathLike[str] | None,
    unlabelled: str | None,
) -> Run:
    """Continue the run in ``out``."""
    began = time.perf_counter()
    settings = read_settings(out / "run.toml")
    if unlabelled is not None and settings.data.unlabelled != unlabelled:
        before = settings.data.unlabelled or "none"
        raise SettingsError(
            f"the unlabelled images of the run in {out} are {before}, not {unlabelled}; continue "
            "it with its own, or choose another folder for the output"
        )
    if start is not None and settings.model.start != os.path.abspath(start):
        before = settings.model.start or "no other model"
        raise SettingsError(
            f"the run in {out} has started from {before}, not from {os.fspath(start)}; continue it "
            "with its own, or choose another folder for the output"
        )
    refuse_changed_start(out / "run.toml")
    progress.say(f"continuing {out} with the settings of its run.toml")
    if not isinstance(data, Dataset):
        data = find_dataset(Path(data), settings.data.classes)
    splits_by = read_provenance(out / "run.toml").get("splits_by", "")
    dataset = replace(read_split_csv(out / "split.csv", data), splits_by=splits_by)
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
    with run_folder(out, locked=True):
        with distributed.process_group():
            if not resume:
                dataset, settings = _leave_out_images(dataset, settings, progress)
            run = fit(
                dataset,
                out,
                settings,
                progress,
                resume=resume,
                began=began,
                predict_report_seconds=partial(_predict_report_seconds, dataset),
            )
        if not run.interrupted and distributed.is_main_process():
            if dataset.of("val"):
                _report(run, dataset, began)
                if scope := describe_score(dataset):
                    progress.say(scope)
            strip_checkpoint(out / CHECKPOINT_NAME)
    return run


def _leave_out_images(
    dataset: Dataset, settings: Settings, progress: Progress
) -> tuple[Dataset, Settings]:
    """Leave out images if the settings say so, or if a timed run cannot read all of them."""
    seconds, given = time_limit(settings.train), settings.data.model_dump()
    if seconds is not None and None in (given["train_every"], given["val_every"]):
        chosen = distributed.broadcast_from_main(choose_images(dataset, seconds))
        for key, (every, reason) in chosen.items():
            if given[key.removeprefix("data.")] is None:
                settings = settings.with_({key: every})
                if every > 1:
                    progress.say(f"{key} = {every}: {reason}")
    dataset = keep_every(dataset, "train", settings.data.train_every or 1)
    return keep_every(dataset, "val", settings.data.val_every or 1), settings


def _predict_report_seconds(dataset: Dataset, model: Segmenter) -> float:
    """Measure one held-out image, and return how long :func:`_report` would take.

    Args:
        dataset: The data set.
        model: The model so far, in evaluation mode.
    """
    pairs = dataset.of("val")
    # As in _report.
    name = "torch" if model.mean.device == CPU else "gpu"
    predictor = Predictor(runtime_of_model(model, Path(MODEL_NAME), name))
    settings = CountSettings.from_extras(Extras(), predictor.classes)
    seconds = measure_seconds(
        lambda pair: count_image(predictor, read_sample(pair, dataset), settings),
        pairs[len(pairs) // 2],
    )
    num_evaluated = len(pairs) + min(len(pairs), MAX_TEMPERATURE_IMAGES)
    return REPORT_SECONDS + seconds * (REPORT_IMAGES + REPORT_IMAGE_RATIO * num_evaluated)


def _report(run: Run, dataset: Dataset, began: float) -> None:
    """Calibrate the model of a finished run, score it, and write the report."""
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
    facts = {
        "Trained": f"{len(run.log)} steps in {seconds / 60:.1f} minutes",
        **run_facts(run, predictor),
    }
    if compared := [row["unlabelled"] for row in run.log if "unlabelled" in row]:
        from useg.training.unlabelled import describe_comparisons

        facts["Unlabelled images"] = describe_comparisons(compared)
        scores["unlabelled"] = compared
    write_json(run.out / "scores.json", scores)
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
    if minutes is None:
        minutes = QUICK_MINUTES if quick else DEMO_MINUTES
    num_scenes = QUICK_SCENES if quick else DEMO_SCENES
    with _demo_folder(Path(out)):
        return _run_demo(Path(out), minutes, num_scenes, progress or SilentProgress())


def _run_demo(out: Path, minutes: float, num_scenes: Mapping[str, int], progress: Progress) -> Demo:
    """Run all steps in the empty folder of the demo."""
    began = time.perf_counter()
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
    predict(predictor, [str(out / "test" / "CameraRGB")], out / "labels")
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
        facts={"Whole demo": f"{seconds / 60:.1f} minutes", **run_facts(run, predictor)},
        commands=command_lines(str(out / "run"), str(out / "test"), "all"),
    )
    publish_report(out / "report.html", report, predictor, dataset)
    return Demo(out / "report.html", evaluation, seconds)


@contextmanager
def _demo_folder(out: Path) -> Iterator[None]:
    """Make the folder of the demo and lock it, and remove what an earlier demo wrote there."""
    if os.path.lexists(out) and not out.is_dir():
        raise UsageError(f"{out} is not a folder; choose another folder for the output")
    make_folder(out)
    with locked_folder(out):
        _remove_demo(out)
        (out / _DEMO_MARKER).touch()
        yield


def _remove_demo(out: Path) -> None:
    """Remove the files of an earlier demo, one by one, if there are no others.

    Raises:
        DataError: There are files that no demo has written; nothing is removed.
    """
    clear_drafts(out)
    paths = [path for path in sorted(out.rglob("*")) if path.name != LOCK_NAME]
    files = [path for path in paths if path.is_symlink() or not path.is_dir()]
    foreign = [path for path in files if not _is_demo_file(path)]
    if foreign:
        more = f" and {len(foreign) - 1:,} more" if len(foreign) > 1 else ""
        raise DataError(
            f"{foreign[0]} was not made by useg demo{more}; choose another folder for the output"
        )
    for path in sorted(files, key=lambda path: _DEMO_MARKS.get(path.name, 0)):
        path.unlink()
    for folder in sorted((path for path in paths if path not in files), reverse=True):
        if folder.name in _DEMO_FOLDERS:
            # Of somebody else's folders the demo's may be empty now.
            with suppress(OSError):
                folder.rmdir()


def _is_demo_file(path: Path) -> bool:
    if path.name == _DEMO_MARKER:
        return not path.is_symlink() and path.is_file() and not path.stat().st_size
    if path.name == "classes.toml":
        return read_ends(path, 1 << 20) == classes_to_toml(CARLA).encode()
    by_suffix = {".png": png_mark, ".jpg": is_own_picture}
    recognizers = {**RUN_FILES, "inspect.html": is_own_page, "inspect.md": is_own_markdown}
    is_own = recognizers.get(path.name) or by_suffix.get(path.suffix)
    return is_own is not None and bool(is_own(path))


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
