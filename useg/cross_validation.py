"""K models, each scored on the images that it has not seen: what to expect of new images.

A data set and settings come in; a folder of K runs and ``folds.json`` come out, and, if asked for,
a model that is trained on all images and carries the score of the folds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from useg import api, distributed
from useg.config import VALIDATE_AT_END, Settings, read_settings
from useg.data.dataset import Dataset, Pair, pair_name, read_sample
from useg.data.folds import Folds, make_folds
from useg.data.layouts import find_dataset
from useg.errors import DataError, SettingsError, UsageError, format_count
from useg.files import locked_folder, make_folder, write_json
from useg.inference.predictor import Predictor, load
from useg.machine import prefetch
from useg.models.segmenter import load_model, save_model
from useg.ownership import is_own_json
from useg.parsing import parse_json, read_limited
from useg.scoring.metrics import Confusion, Scores, confusion, plain, score, tally
from useg.scoring.uncertainty import Interval, Intervals, score_intervals
from useg.training.checkpoint import RUN_FILES
from useg.training.plan import DEFAULT_MINUTES, time_limit
from useg.training.trainer import Progress, SilentProgress

FOLDS_NAME = "folds.json"
# A line for each of a million images.
_MAX_FOLDS_BYTES = 256 << 20


@dataclass(frozen=True)
class CrossValidation:
    """The scores of models on images that they have not seen.

    Args:
        out: The folder of the runs.
        by: How the folds were made.
        scores: Over all images, each scored by the model that held it out.
        intervals: 95 % intervals of these scores, resampled by group if there are groups.
        near: Scores of images of the groups that a model was trained on; None without groups.
        groups: Mean IoU of each group.
        interrupted: Whether a fold was interrupted; the scores then cover no image.
    """

    out: Path
    by: str
    scores: Scores
    intervals: Intervals | None = None
    near: Scores | None = None
    groups: Mapping[str, float] | None = None
    interrupted: bool = False

    def lines(self) -> list[str]:
        """Return the scores in words."""
        interval = self.intervals.mean_iou if self.intervals else None
        new = _in_words(self.scores.mean_iou, interval)
        images = format_count(self.scores.num_images, "image")
        if self.near is None:
            return [
                f"out-of-fold mIoU {new} over all {images}, each scored by a model that has not "
                f"seen it ({self.by})",
                "file names show no groups: the score applies to images like these; scores on "
                "other places or recordings are unknown",
            ]
        ious = sorted((self.groups or {}).values())
        return [
            f"expect an mIoU of {_in_words(self.near.mean_iou)} on images like these, and of {new} "
            f"on images of a new group ({self.by})",
            f"the scores of the groups range from {100 * ious[0]:.1f} to {100 * ious[-1]:.1f} %; "
            f"each of the {images} is scored by a model that has not seen its group",
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        interval = self.intervals and self.intervals.mean_iou
        content = {
            **self.scores.as_dict(),
            "interval": [interval.low, interval.high] if interval else None,
            "near": self.near and self.near.as_dict(),
            "groups": self.groups and dict(self.groups),
            "interrupted": self.interrupted,
        }
        plain_content: dict[str, Any] = plain(content)
        return plain_content


def _in_words(value: float, interval: Interval | None = None) -> str:
    between = f" ({100 * interval.low:.1f} to {100 * interval.high:.1f} %)" if interval else ""
    return f"{100 * value:.1f} %{between}"


def train_folds(
    data: str | Path,
    out: str | Path,
    folds: int = 5,
    *,
    final: bool = False,
    minutes: float | None = None,
    epochs: int | None = None,
    settings: Mapping[str, Any] | None = None,
    config: str | Path | None = None,
    start: str | os.PathLike[str] | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> CrossValidation:
    """Train one model for each fold, and score every image with a model that has not seen it.

    The first fold decides all settings and the number of steps; the others repeat them. Held-out
    images influence nothing: the last model of each fold is scored.

    Args:
        data: As for :func:`useg.train`.
        out: The folder to write: ``fold_1`` to ``fold_K``, and ``folds.json``.
        folds: Number of folds, 2 or more. Where names show groups (patients, places, recordings),
            whole groups are held out.
        final: Also train a model on all images for as many steps, into ``out`` itself. Its score is
            that of the folds.
        minutes: Time for all models together.
        epochs: Passes of each model over its training images, instead of ``minutes``.
        settings, config, start, force: As for :func:`useg.train`.
        resume: Continue with the fold at which an earlier call stopped.
        progress: Receives what happens.

    Returns:
        The scores over all images, with 95 % intervals, and those of each group.

    Raises:
        UsageError: As for :func:`useg.train`; also if there are too few images.

    Example:
        >>> import useg
        >>> useg.train_folds("data", "folds", 5, minutes=30).lines()  # doctest: +SKIP
    """
    if distributed.is_distributed():
        raise SettingsError(
            "cross-validation runs in one process, but torchrun started several; start useg "
            "without torchrun"
        )
    out, progress = Path(out), progress or SilentProgress()
    base = read_settings(Path(config)) if config else Settings()
    classes = base.with_(dict(settings or {})).data.classes
    dataset = find_dataset(Path(data), classes)
    made = make_folds(dataset, folds)
    for fold in made.folds:
        api.refuse_data_folder(out, fold.dataset)
    described = _describe_folds(made)
    _check_folder(out, described, resume)
    if not force:
        given = {"train.minutes": minutes, "train.epochs": epochs}
        given = {**(settings or {}), **{key: each for key, each in given.items() if each}}
        api.check_dataset(made.folds[0].dataset, time_limit(base.with_(given).train), progress)
    make_folder(out)
    with locked_folder(out):
        write_json(out / FOLDS_NAME, described)
    count = len(made.folds) + final
    progress.say(made.by)
    chosen = {
        "train.validate_every": VALIDATE_AT_END,
        # By default, held-out images decide whether weights of the initial model are mixed in.
        "model.start_share": base.model.start_share or 0.0,
        **(settings or {}),
    }
    length = _length_of_each(minutes, epochs, chosen, base, count)
    arguments = {"settings": chosen, "config": config, "start": start, **length}
    for number, fold in enumerate(made.folds, 1):
        progress.say(f"fold {number} of {len(made.folds)}")
        place = out / f"fold_{number}"
        if not (place / "report.html").exists():
            run = api.train(
                fold.dataset, place, **arguments, resume=True, force=True, progress=progress
            )
            if run.interrupted:
                return _interrupted(out, made, dataset)
        # The first fold has decided everything.
        arguments = {"settings": _settings_of(place)}
    result = _score_folds(out, made, dataset)
    if final:
        result = _train_final(dataset, made, out, result, arguments["settings"], progress)
    with locked_folder(out):
        write_json(out / FOLDS_NAME, {**described, **result.as_dict()})
    return result


def _length_of_each(
    minutes: float | None,
    epochs: int | None,
    settings: Mapping[str, Any],
    base: Settings,
    count: int,
) -> dict[str, Any]:
    """Return the length of one of ``count`` models, as arguments of ``train``."""
    own = {f"train.{name}" for name in ("minutes", "epochs", "steps")} & settings.keys()
    lengths = (base.train.minutes, base.train.epochs, base.train.steps)
    if epochs is not None or own or any(length is not None for length in lengths):
        return {"minutes": minutes, "epochs": epochs}
    return {"minutes": (DEFAULT_MINUTES if minutes is None else minutes) / count}


def _settings_of(run: Path) -> dict[str, Any]:
    """Return the settings of a run, to be repeated on other images."""
    content = read_settings(run / "run.toml").model_dump()
    flat = {f"{part}.{key}": value for part in content for key, value in content[part].items()}
    if flat["train.unlabelled_from"] is None:
        # The colours of images without masks did not matter.
        flat["data.unlabelled"] = None
    return {**flat, "train.recounts": (), "train.thread_changes": ()}


def _check_folder(out: Path, described: Mapping[str, Any], resume: bool) -> None:
    """Refuse a folder with other runs, or with folds that cannot be continued."""
    path = out / FOLDS_NAME
    if not os.path.lexists(path):
        names = [name for name in RUN_FILES if os.path.lexists(out / name)]
        names += [entry.name for entry in out.glob("fold_*")]
        if names:
            raise UsageError(
                f"{out} already contains {names[0]}; choose another folder for the output"
            )
        return
    if not is_own_json(path) or not resume:
        raise UsageError(
            f"{out} already contains folds; continue with --resume (resume=True in Python), choose "
            "another folder for the output, or remove it first"
        )
    content = parse_json(read_limited(path, _MAX_FOLDS_BYTES))
    if content.get("images") != described["images"]:
        raise DataError(
            f"the images or the number of folds have changed since {path} was written; restore "
            "them, or choose another folder for the output"
        )


def _describe_folds(folds: Folds) -> dict[str, Any]:
    images = {
        pair_name(pair, fold.dataset.root): number
        for number, fold in enumerate(folds.folds, 1)
        for pair in fold.dataset.of("val")
    }
    return {"num_folds": len(folds.folds), "split_by": folds.by, "images": images}


def _interrupted(out: Path, folds: Folds, dataset: Dataset) -> CrossValidation:
    size = len(dataset.classes)
    nothing = score(np.zeros((size, size), np.int64), dataset.classes.names, 0)
    return CrossValidation(out, folds.by, nothing, interrupted=True)


def _score_folds(out: Path, folds: Folds, dataset: Dataset) -> CrossValidation:
    """Score every image by the model of the fold that held it out."""
    held_out: list[tuple[Pair, Confusion]] = []
    near: list[Confusion] = []
    for number, fold in enumerate(folds.folds, 1):
        predictor = load(out / f"fold_{number}")
        held_out += _count(predictor, fold.dataset.of("val"), fold.dataset)
        near += [counts for _, counts in _count(predictor, fold.near, fold.dataset)]
    names = dataset.classes.names
    every = [counts for _, counts in held_out]
    groups = [folds.groups.get(pair.identity, "") for pair, _ in held_out]
    by_group: dict[str, list[Confusion]] = {}
    for group, counts in zip(groups, every, strict=True):
        by_group.setdefault(group, []).append(counts)
    number_of = {group: number for number, group in enumerate(by_group)}
    blocks = [number_of[group] for group in groups] if folds.groups else range(len(every))
    tallies = np.stack([tally(counts) for counts in every])
    return CrossValidation(
        out,
        folds.by,
        _score(every, names),
        score_intervals(tallies, blocks),
        _score(near, names) if near else None,
        {group: _score(each, names).mean_iou for group, each in by_group.items()}
        if folds.groups
        else None,
    )


def _score(each: Sequence[Confusion], names: Sequence[str]) -> Scores:
    return score(np.sum(each, 0), names, len(each))


def _count(
    predictor: Predictor, pairs: Sequence[Pair], dataset: Dataset
) -> list[tuple[Pair, Confusion]]:
    """Count the pixels of each image at the native size of its label."""
    num_classes = len(predictor.classes)
    samples = prefetch(read_sample(pair, dataset) for pair in pairs)
    return [
        (pair, confusion(predictor(sample.image), sample.label, num_classes))
        for pair, sample in zip(pairs, samples, strict=True)
    ]


def _train_final(
    dataset: Dataset,
    folds: Folds,
    out: Path,
    result: CrossValidation,
    settings: Mapping[str, Any],
    progress: Progress,
) -> CrossValidation:
    """Train a model on all images, and give it the score and the temperature of the folds."""
    files = {pair.identity for fold in folds.folds for pair in fold.dataset.of("val")}
    pairs = tuple(
        replace(pair, split="train" if pair.identity in files else pair.split)
        for pair in dataset.pairs
    )
    progress.say("the final model, on all images")
    everything = replace(dataset, pairs=pairs, splits_by="all images, scored by folds")
    run = api.train(everything, out, settings=settings, resume=True, force=True, progress=progress)
    if run.interrupted:
        return replace(result, interrupted=True)
    temperatures = [
        load_model(out / f"fold_{number}").temperature for number in range(1, len(folds.folds) + 1)
    ]
    model = load_model(out)
    model.temperature = math.exp(float(np.mean(np.log(temperatures))))
    model.provenance |= {"validation": result.scores.as_dict(), "scored_by": folds.by}
    save_model(model, out / "model.safetensors")
    return result
