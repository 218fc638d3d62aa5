"""Evaluate and compare models, and publish the report of an evaluation.

:func:`evaluate` and :func:`compare` are ``useg.evaluate`` and ``useg.compare``.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from useg.config import DataSettings, Settings
from useg.data.class_mapping import has_default_names, match_classes, unnamed_classes_error
from useg.data.classes_from_masks import ClassDecision, infer_classes
from useg.data.dataset import Dataset
from useg.data.duplicates import (
    MIN_REPORTED_CORRELATION,
    compute_signatures,
    find_near_duplicates,
    is_quick_to_compare,
)
from useg.data.layouts import find_dataset
from useg.data.split_files import restore_splits
from useg.data.splits import assign_splits
from useg.errors import ModelError, format_count
from useg.inference.predictor import Predictor, load
from useg.machine import CountProgress, describe_machine
from useg.parsing import printable
from useg.reporting.causes import (
    add_causes,
    find_caveats,
    is_other_dataset,
    is_training_dataset,
)
from useg.reporting.evaluate import CountSettings, Extras, evaluate_dataset
from useg.reporting.evaluation_result import Comparison, Evaluation, compare_evaluations
from useg.reporting.html import choose_gallery, collect_thumbnails, markdown_path, read_gallery
from useg.reporting.page import write_markdown, write_report
from useg.reporting.text import Command, Report, format_percent

if TYPE_CHECKING:
    from useg.classes import Label
    from useg.images.image_files import Sample
    from useg.training.loop import Run


def evaluate(
    model: str | os.PathLike[str] | Predictor,
    data: str | Path,
    split: str | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    extras: Extras = Extras(),  # noqa: B008 - frozen
    class_map: str | Mapping[str, str] | None = None,
    html: str | Path | None = None,
    runtime: str | None = None,
    augment: str = "none",
    progress: CountProgress = lambda done, total: None,
) -> Evaluation:
    """Score a model on a data set at the native resolution of the labels.

    Args:
        model: a run folder, a model file, or a loaded predictor.
        data: a folder whose layout is recognised, or a ``dataset.toml``.
        split: ``"val"``, ``"train"``, ``"test"`` or ``"all"``. By default the held-out images
            (``"val"``) of the data that the model was trained on, and all images of other data.
        settings: ``data.*`` settings that define the split; by default, those of the training.
        extras: what to ignore, and what else to measure, such as
            ``useg.Extras(ignore_mask="hood.png", objects="cell")``.
        class_map: which classes of the data are which of the model, such as
            ``{"Car": "Vehicles"}``; others are ignored unless the names are equal. ``"ids"`` says
            that equal ids mean equal classes. By default the names must agree.
        html: also write the report to this file, and as Markdown next to it.
        runtime: the inference runtime, as for :func:`load`.
        augment: test-time augmentation, as for :func:`load`.
        progress: called with (images done, images in all).

    Returns:
        The scores, from 0 to 1, with 95 % intervals, and likely causes of weak classes.

    Raises:
        UsageError: no model, no such split, unreadable data, classes that do not match the
            model's, or extras that do not fit.
    """
    predictor = model if isinstance(model, Predictor) else load(model, runtime, augment)
    dataset = open_evaluation_data(predictor, data, settings, split=split, class_map=class_map)
    split, notes = _decide_split(dataset, predictor, split, settings)
    thumbnails: list[bytes] = []
    thumbnail = collect_thumbnails(thumbnails) if html else lambda sample, prediction: None
    is_other = is_other_dataset(dataset, predictor.runtime.description.provenance)
    distances: list[float | None] = []

    def on_prediction(sample: Sample, prediction: Label) -> None:
        thumbnail(sample, prediction)
        if is_other:
            distances.append(predictor.training_distance(sample.image))

    if html:
        # Fail now rather than after the evaluation.
        markdown_path(Path(html))
    evaluation = evaluate_dataset(
        predictor, dataset, split, extras=extras, progress=progress, on_prediction=on_prediction
    )
    if is_other:
        notes += _compare_with_training(evaluation, predictor, distances)
    evaluation = add_causes(replace(evaluation, notes=notes), dataset, predictor, extras)
    if html:
        report = Report(
            title=f"{dataset.root.name}: {split}",
            evaluation=evaluation,
            classes=predictor.classes,
            thumbnails=thumbnails,
            facts=machine_facts(),
            commands=command_lines(
                "MODEL" if isinstance(model, Predictor) else os.fspath(model), str(data), split
            ),
        )
        publish_report(Path(html), report, predictor, dataset, extras)
    return evaluation


def compare(
    model: str | os.PathLike[str] | Predictor,
    against: str | os.PathLike[str] | Predictor,
    data: str | Path,
    split: str | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    extras: Extras = Extras(),  # noqa: B008 - frozen
    class_map: str | Mapping[str, str] | None = None,
    progress: CountProgress = lambda done, total: None,
) -> Comparison:
    """Score two models on the same images, and compute how much better the first one is.

    The images are split as in the training of ``model``. Arguments and errors are those of
    :func:`evaluate`.

    Args:
        against: the second model.

    Returns:
        Both evaluations, and the difference of their scores with its 95 % interval.

    Raises:
        UsageError: also if ``against`` was trained with a different split, because it may have
            been trained on these images.
    """
    first, second = (
        part if isinstance(part, Predictor) else load(part) for part in (model, against)
    )
    if not settings:
        _check_same_split(first, second)
    dataset = open_evaluation_data(first, data, settings, split=split, class_map=class_map)
    split, notes = _decide_split(dataset, first, split, settings)
    evaluations = [
        replace(
            evaluate_dataset(predictor, dataset, split, extras=extras, progress=progress),
            notes=notes,
        )
        for predictor in (first, second)
    ]
    return compare_evaluations(*evaluations)


def _check_same_split(*predictors: Predictor) -> None:
    """Refuse models that are known to have held out different images.

    Raises:
        ModelError: The splits differ, so that one model may have trained on the other's test
            images.
    """
    splits = [
        runtime.description.provenance.get("split", {})
        for predictor in predictors
        for runtime in predictor.runtimes
    ]
    different = [split for split in splits if split and split != splits[0]]
    if splits[0] and different:
        raise ModelError(
            f"the models were trained with different splits ({splits[0]} and {different[0]}), "
            f"so one may have been trained on images that the other is scored on; "
            f"choose the images with the settings data.split and data.holdout"
        )


def _decide_split(
    dataset: Dataset,
    predictor: Predictor,
    split: str | None,
    settings: Mapping[str, Any] | None,
) -> tuple[str, tuple[str, ...]]:
    """Return the split to score, and what was decided about its images and classes, in words."""
    notes = []
    if split is None:
        provenance = predictor.runtime.description.provenance
        is_other = not settings and is_other_dataset(dataset, provenance)
        split = "all" if is_other else "val"
        if is_other:
            notes.append(
                f"scored all {format_count(len(dataset.pairs), 'image')}, because the model was "
                f"not trained on {dataset.root.name}; choose a split to score only that one"
            )
    if dataset.mapping:
        notes.append(
            f"classes of the data and of the model: {dataset.mapping.describe(dataset.classes)}"
        )
    return split, tuple(notes)


def _compare_with_training(
    evaluation: Evaluation, predictor: Predictor, distances: Sequence[float | None]
) -> tuple[str, ...]:
    """Return how scores and images of another data set compare with those of training, in words."""
    provenance = predictor.runtime.description.provenance
    notes = []
    expected = {
        entry.get("name"): entry.get("iou")
        for entry in provenance.get("validation", {}).get("classes", ())
        if entry.get("pixels")
    }
    here = {entry.name: entry.iou for entry in evaluation.scores.classes if entry.pixels}
    common = [name for name in here if isinstance(expected.get(name), float)]
    if common:
        before, now = (
            sum(ious[name] for name in common) / len(common) for ious in (expected, here)
        )
        notes.append(
            f"the mean IoU of {format_count(len(common), 'class', 'classes')} was "
            f"{format_percent(before)} on the images held out in training, and is "
            f"{format_percent(now)} here"
        )
    known = [distance for distance in distances if distance is not None]
    if num_unlike := sum(distance > 1 for distance in known):
        differ = "differs" if num_unlike == 1 else "differ"
        notes.append(
            f"{num_unlike:,} of {format_count(len(known), 'image')} {differ} from the training "
            "images in brightness, contrast, colours or sharpness"
        )
    return tuple(notes)


def open_evaluation_data(
    predictor: Predictor,
    data: str | Path,
    settings: Mapping[str, Any] | None = None,
    *,
    split: str | None = "val",
    class_map: str | Mapping[str, str] | None = None,
) -> Dataset:
    """Open a data set with the classes of a model and the split that it was trained with.

    If the run folder is available, its ``split.csv`` lists the training images exactly, even if
    the data set has changed since. An exported file contains only the settings of the split.

    Args:
        predictor: the model.
        data: a folder or a ``dataset.toml``.
        settings: ``data.*`` settings that replace the split of the training.
        split: the split to score. None means the held-out images of the training data;
            of another data set nothing is held out, because the model has seen none of it.
        class_map: as for :func:`evaluate`.

    Raises:
        UsageError: as for :func:`open_dataset`; also if the classes differ from the model's and
            ``class_map`` does not say which belong together.
    """
    if not settings:
        _check_same_split(predictor)
    provenance = predictor.runtime.description.provenance
    chosen = Settings().with_({**provenance.get("split", {}), **(settings or {})}).data
    dataset = _find_with_classes_of(predictor, Path(data), chosen.classes, class_map)
    if not settings and (restored := _restore_training_split(dataset, predictor)):
        return restored
    if split is None and not settings and is_other_dataset(dataset, provenance):
        return dataset
    return assign_splits(dataset, chosen.split, chosen.holdout)


def _find_with_classes_of(
    predictor: Predictor,
    data: Path,
    classes_file: str | None,
    class_map: str | Mapping[str, str] | None,
) -> Dataset:
    """Find a data set, with labels in the classes of the model."""
    model, is_named = predictor.classes, True

    def adopt(
        pairs: object, encoding: object, ignore: object = (), **options: object
    ) -> ClassDecision:
        nonlocal is_named
        is_named = False
        return ClassDecision(model)

    # Two values may be 0 and 1 here and 0 and 255 there, so they are read from the masks.
    must_infer = isinstance(class_map, Mapping) or model.names == ("background", "foreground")
    dataset = find_dataset(data, classes_file, infer=infer_classes if must_infer else adopt)
    if is_named or dataset.classes.names != model.names:
        mapping = match_classes(dataset.classes, model, class_map, str(dataset.root))
        return replace(dataset, classes=model, mapping=mapping) if mapping else dataset
    is_unsaid = class_map is None and not has_default_names(model)
    if is_unsaid and is_other_dataset(dataset, predictor.runtime.description.provenance):
        raise unnamed_classes_error(model, str(dataset.root))
    return dataset


def _restore_training_split(dataset: Dataset, predictor: Predictor) -> Dataset | None:
    """Give the data set the split of the run folder if the model was trained on it."""
    provenance, source = predictor.runtime.description.provenance, predictor.runtime.source
    splits = (source if source.is_dir() else source.parent) / "split.csv"
    if not is_training_dataset(dataset, provenance):
        return None
    if not splits.exists() or not splits.with_name("run.toml").exists():
        return None
    return restore_splits(splits, dataset, provenance.get("splits_by", ""))


def publish_report(
    path: Path,
    report: Report,
    predictor: Predictor,
    dataset: Dataset,
    extras: Extras = Extras(),  # noqa: B008 - frozen
) -> None:
    """Add gallery, caveats and causes to a report, and write it as HTML and Markdown.

    Args:
        path: the page; the Markdown gets the same name with the suffix ``.md``.
        report: title, evaluation and classes; optionally thumbnails, log, facts and commands.
        predictor: the model, which predicts the images of the gallery again.
        dataset: the data set of the evaluation.
        extras: the extras of the evaluation.

    Raises:
        UsageError: a file can no longer be read, or cannot be written.
    """
    beside = markdown_path(path)
    evaluation, facts = report.evaluation, dict(report.facts)
    provenance = predictor.runtime.description.provenance
    trained_here = is_training_dataset(dataset, provenance)
    num_duplicates = _count_duplicates(evaluation, dataset) if trained_here else None
    if dataset.splits_by:
        facts["Split"] = dataset.splits_by
    settings = CountSettings.from_extras(extras, predictor.classes)
    chosen = choose_gallery(evaluation)
    report = replace(
        report,
        gallery=read_gallery(chosen, evaluation, predictor, dataset, settings),
        facts=facts,
        caveats=find_caveats(evaluation, dataset, provenance, num_duplicates),
        causes=evaluation.causes,
        temperature_fitted_here=evaluation.split == "val" and trained_here,
    )
    write_report(path, report)
    write_markdown(beside, report)


def _count_duplicates(evaluation: Evaluation, dataset: Dataset) -> int | None:
    """Count the images that are near-duplicates of training images.

    Returns:
        The number; None if the split contains training images, or if there are too many images to
        compare quickly.
    """
    train = dataset.of("train")
    pairs = [*train, *(image.pair for image in evaluation.images)]
    is_held_out = evaluation.split not in ("train", "all")
    if not is_held_out or not train or not is_quick_to_compare(pairs):
        return None
    found = find_near_duplicates(compute_signatures(dataset, pairs), MIN_REPORTED_CORRELATION)
    return sum(int(index >= len(train) > earlier[0]) for index, earlier, _ in found)


def run_facts(run: Run, predictor: Predictor) -> dict[str, str]:
    """Return what a reader needs to reproduce a run."""
    model, data = run.settings.model, run.settings.data
    return {
        "Network": f"U-Net, encoder {model.encoder}, width {model.width}, depth {model.depth}, "
        f"{model.padding} padding",
        "Working size": "x".join(map(str, data.size)) if data.size else f"scale {data.scale}",
        **_images_used(data),
        "Seed": str(run.settings.train.seed),
        **_describe_start(predictor.runtime.description.provenance),
        **machine_facts(),
    }


def _describe_start(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Return which model a run started from; nothing if there was none."""
    if not (start := provenance.get("start")):
        return {}
    share = 100 * start.get("share", 0)
    part = f", with {share:.0f} % of its weights" if share else ""
    return {"Started from": f"{printable(start['model'])}{part}"}


def _images_used(data: DataSettings) -> dict[str, str]:
    """Return which images a run had time for; nothing if it used all of them."""
    used = {"training": data.train_every or 1, "validation": data.val_every or 1}
    parts = [f"one in {every} {split} images" for split, every in used.items() if every > 1]
    return {"Images used": " and ".join(parts)} if parts else {}


def machine_facts() -> dict[str, str]:
    """Return the machine and the versions that produced the scores."""
    machine = describe_machine()
    return {
        "Machine": f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, "
        f"useg {machine['useg']}"
    }


def command_lines(model: str, data: str, split: str) -> list[Command]:
    """Return the command lines that repeat an evaluation and use the model."""
    quoted, source = shlex.quote(model), shlex.quote(data)
    evaluate_again = f"useg evaluate {quoted} {source} --split {split} --html report.html"
    return [
        Command(evaluate_again, "repeat this evaluation"),
        Command(f"useg predict {quoted} IMAGES --out LABELS", "predict new images"),
        Command(f"useg inspect {source}", "check the data set for errors"),
    ]
