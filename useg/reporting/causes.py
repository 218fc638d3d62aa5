"""Explain an evaluation: likely causes of its weak classes, and what could make its scores wrong.

Most of the evidence for causes is in the counts of the evaluation already. For the rest, some
held-out images and some training images are predicted again, and others are only read. This takes
about a quarter of the evaluation's time for 40 images, and a smaller share for more. If no class is
weak, it takes no time. The rules are in :mod:`useg.reporting.cause_rules`.

Scores are doubtful if training and measured images are related, if something was selected on the
measured images, or if there is little data. :func:`find_caveats` says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from useg.classes import most_probable
from useg.data.dataset import Dataset, Pair, pair_name, pick_evenly, read_sample
from useg.data.folds import find_groups_by_split
from useg.data.splits import are_numbered, find_sequences
from useg.doctor.edges import (
    MAX_SHIFT_PIXELS,
    EdgeAlignment,
    find_strongest_shift,
    measure_edge_alignment,
    shift_z_score,
)
from useg.errors import MAX_NAMES, format_count, join_names
from useg.reporting.cause_rules import (
    ALWAYS_WEAK_IOU,
    CLASS_RULES,
    MIN_LEARNED_IOU,
    WEAK_IOU,
    EvaluationContext,
    SplitComparison,
    WeakClass,
    check_generalization,
    check_shifted_masks,
    check_touching_objects,
)
from useg.reporting.error_analysis import (
    ClassErrors,
    measure_class_errors,
    measure_split,
    predict_image,
)
from useg.reporting.evaluate import CountSettings, Extras, apply_ignore_mask
from useg.reporting.evaluation_result import Cause, Evaluation
from useg.reporting.text import to_sentence
from useg.scoring.metrics import class_ious, confusion, tally

if TYPE_CHECKING:
    from useg.inference.predictor import Predictor

MAX_CAUSES_PER_CLASS = 2

# Numbers of images to measure in an evaluation of N images. An image costs about 1.1, 0.7 and 0.07
# times an image of the evaluation.
# Held-out images that are predicted again: at least this many, or N / 10.
MIN_ERROR_IMAGES = 5
# Training images that are predicted: at least this many, or N / 20.
MIN_TRAIN_IOU_IMAGES = 3
# Images of each split that are only read: at least this many; of the training images N / 4, up to
# the second number.
MIN_STATISTICS_IMAGES, MAX_STATISTICS_IMAGES = 16, 150

# Masks count as shifted if the shift is at least this many pixels, if edges are this much stronger
# under the shifted masks, and if the shift stands out among all others (as in useg.doctor).
_MIN_SHIFT_PIXELS = 2
_MIN_EDGE_GAIN = 1.3
_MIN_SHIFT_Z_SCORE = 6
# The score of a class with fewer images or pixels is not reliable.
_MIN_CLASS_IMAGES, _MIN_CLASS_PIXELS = 3, 2000


def add_causes(
    evaluation: Evaluation,
    dataset: Dataset,
    predictor: Predictor,
    extras: Extras = Extras(),  # noqa: B008 - frozen
) -> Evaluation:
    """Return the evaluation with its causes; arguments and errors are those of find_causes."""
    return replace(evaluation, causes=find_causes(evaluation, dataset, predictor, extras))


def find_causes(
    evaluation: Evaluation,
    dataset: Dataset,
    predictor: Predictor,
    extras: Extras = Extras(),  # noqa: B008 - frozen
) -> tuple[Cause, ...]:
    """Find likely causes of the weak classes of an evaluation.

    Args:
        evaluation: the scores.
        dataset: the data set that they were measured on.
        predictor: the model.
        extras: the extras of the evaluation.

    Returns:
        First a cause that concerns all classes, then at most ``MAX_CAUSES_PER_CLASS`` for each
        weak class, lowest IoU first. Empty if no class is weak.

    Raises:
        UsageError: a file can no longer be read.
    """
    class_ids = find_weak_classes(evaluation)
    touching = check_touching_objects(evaluation, predictor.has_objects)
    if not class_ids:
        return touching
    settings = CountSettings.from_extras(extras, predictor.classes)
    context, weak_classes = _measure(evaluation, dataset, predictor, class_ids, settings)
    if shifted := check_shifted_masks(context):
        # All other measurements mean nothing then.
        return (shifted,)
    general = check_generalization(context)
    if general and context.splits and context.splits.train_iou < MIN_LEARNED_IOU:
        # The errors of a model that has learned almost nothing do not show their causes.
        return (general, *touching)
    causes = []
    for weak in weak_classes:
        found = [cause for rule in CLASS_RULES if (cause := rule(context, weak))]
        # Wrong labels may be what the other rules find, too.
        is_noise = bool(found) and found[0].kind == "label noise"
        causes += found[: 1 if is_noise else MAX_CAUSES_PER_CLASS]
    if general and not _is_explained(general, causes, len(weak_classes)):
        causes.insert(0, general)
    return (*causes, *touching)


def _is_explained(general: Cause, causes: Sequence[Cause], num_weak: int) -> bool:
    """Whether causes of single classes explain the general cause.

    Wrong held-out labels do, and so does a working size at which many classes are too small.
    """
    kinds = Counter(cause.kind for cause in causes)
    if kinds["label noise"]:
        return True
    num_small = kinds["small things"] + kinds["confused at borders"]
    return general.kind == "learnt too little" and 2 * num_small >= num_weak


def find_weak_classes(evaluation: Evaluation) -> list[int]:
    """Return the ids of the weak classes, lowest IoU first."""
    scores = evaluation.scores
    weak = [
        entry
        for entry in scores.classes
        if entry.pixels
        and entry.iou < WEAK_IOU
        and entry.iou < max(ALWAYS_WEAK_IOU, scores.mean_iou)
    ]
    return [entry.id for entry in sorted(weak, key=lambda entry: entry.iou)]


def _measure(
    evaluation: Evaluation,
    dataset: Dataset,
    predictor: Predictor,
    class_ids: list[int],
    settings: CountSettings,
) -> tuple[EvaluationContext, list[WeakClass]]:
    """Predict the images with most errors of the weak classes again, and measure these errors."""
    other_ids = {k: _most_confused_class(evaluation, k) for k in class_ids}
    sums: dict[int, ClassErrors] = {}
    alignments = []
    size = (0, 0)
    for pair in _choose_error_images(evaluation, class_ids):
        sample = apply_ignore_mask(read_sample(pair, dataset), settings, str(pair.mask))
        size = (sample.label.shape[1], sample.label.shape[0])
        image = predict_image(predictor, sample)
        for k in class_ids:
            errors = measure_class_errors(image, k, other_ids[k])
            sums[k] = sums[k] + errors if k in sums else errors
        maps = (sample.label, image.prediction)
        alignments.append([measure_edge_alignment(sample.image, map_) for map_ in maps])
    splits = None
    if evaluation.split not in ("train", "all"):
        splits = _compare_splits(evaluation, dataset, predictor, settings)
    context = EvaluationContext(
        evaluation=evaluation,
        dataset=dataset,
        description=predictor.runtime.description,
        size=size,
        shift=_find_shift(alignments),
        splits=splits,
    )
    names = predictor.classes.names
    return context, [
        WeakClass(k, names[k], other_ids[k], sums[k], _worst_images(evaluation, k, dataset))
        for k in class_ids
    ]


def _choose_error_images(evaluation: Evaluation, class_ids: Sequence[int]) -> list[Pair]:
    """Choose held-out images: for each class in turn, the one with most of its errors."""
    orders = [_rank_by_errors(evaluation, k) for k in class_ids]
    in_turn = dict.fromkeys(k for images in zip(*orders, strict=True) for k in images)
    num_images = max(MIN_ERROR_IMAGES, len(evaluation.images) // 10)
    return [evaluation.images[k].pair for k in list(in_turn)[:num_images]]


def _rank_by_errors(evaluation: Evaluation, class_id: int) -> list[int]:
    """Order the images by their errors in a class, most first.

    The worst image of each block comes before the second worst of any, and images without errors
    come last.
    """
    correct, true, predicted = evaluation.tallies[:, :, class_id].T
    wrong = true + predicted - 2 * correct
    order = np.argsort(-wrong, kind="stable").tolist()
    block_sizes: Counter[int] = Counter()
    rank_in_block = {}
    for k in order:
        rank_in_block[k] = block_sizes[evaluation.blocks[k]]
        block_sizes[evaluation.blocks[k]] += 1
    return sorted(order, key=lambda k: (wrong[k] == 0, rank_in_block[k]))


def _worst_images(evaluation: Evaluation, class_id: int, dataset: Dataset) -> tuple[str, ...]:
    """Return the names of the two images with most errors in a class."""
    ranked = _rank_by_errors(evaluation, class_id)
    return tuple(pair_name(evaluation.images[k].pair, dataset.root) for k in ranked[:2])


def _most_confused_class(evaluation: Evaluation, class_id: int) -> int:
    """Return the class with which a class is most often confused, in either direction."""
    confusions = evaluation.counts[class_id] + evaluation.counts[:, class_id]
    confusions[class_id] = -1
    return int(confusions.argmax())


def _compare_splits(
    evaluation: Evaluation, dataset: Dataset, predictor: Predictor, settings: CountSettings
) -> SplitComparison | None:
    """Compare held-out images with training images, and the scores on both."""
    pairs, num_held_out = dataset.of("train"), len(evaluation.images)
    if not pairs or is_other_dataset(dataset, predictor.runtime.description.provenance):
        return None
    counts = np.zeros_like(evaluation.counts)
    for pair in pick_evenly(pairs, max(MIN_TRAIN_IOU_IMAGES, num_held_out // 20)):
        sample = apply_ignore_mask(read_sample(pair, dataset), settings, str(pair.mask))
        prediction = most_probable(predictor.logits(sample.image))
        counts += confusion(prediction, sample.label, len(predictor.classes))
    ious = class_ious(np.stack([tally(counts), tally(evaluation.counts)]))
    common = ~np.isnan(ious).any(0)
    train_iou, held_out_iou = ious[:, common].mean(1).tolist() if common.any() else (0.0, 0.0)
    num_read = max(MIN_STATISTICS_IMAGES, min(num_held_out // 4, MAX_STATISTICS_IMAGES))
    held_out = [image.pair for image in evaluation.images]
    return SplitComparison(
        train=measure_split(dataset, pick_evenly(pairs, num_read)),
        held_out=measure_split(dataset, pick_evenly(held_out, MIN_STATISTICS_IMAGES)),
        num_train=len(pairs),
        train_iou=train_iou,
        held_out_iou=held_out_iou,
    )


def _find_shift(alignments: Sequence[Sequence[EdgeAlignment | None]]) -> tuple[int, int]:
    """Find the shift (right, down) after which the masks would fit the edges of the images.

    Args:
        alignments: edge alignment of the mask and of the prediction of each image.

    Returns:
        (0, 0) if the masks fit, if the predictions do not fit either, or if it is not clear.
    """
    masks, predictions = (
        [alignment for alignment in part if alignment is not None]
        for part in zip(*alignments, strict=True)
    )
    if not masks or not predictions:
        return 0, 0
    mean: EdgeAlignment = np.mean(masks, axis=0, dtype=np.float32)
    shift = find_strongest_shift(mean)
    other = find_strongest_shift(np.mean(predictions, axis=0, dtype=np.float32))
    unshifted = float(mean[MAX_SHIFT_PIXELS, MAX_SHIFT_PIXELS])
    is_stronger = float(mean.max()) - 1 >= _MIN_EDGE_GAIN * (unshifted - 1)
    distance = max(abs(shift[0] - other[0]), abs(shift[1] - other[1]))
    is_shifted = min(distance, max(map(abs, shift))) >= _MIN_SHIFT_PIXELS
    if is_shifted and is_stronger and shift_z_score(mean, shift) >= _MIN_SHIFT_Z_SCORE:
        return shift
    return 0, 0


def find_caveats(
    evaluation: Evaluation,
    dataset: Dataset,
    provenance: Mapping[str, Any],
    num_duplicates: int | None = None,
) -> list[str]:
    """Say what could make the scores wrong, most serious first.

    Args:
        evaluation: the scores.
        dataset: the data set that they were measured on.
        provenance: what the model file says about the training; empty if it says nothing.
        num_duplicates: how many of the images are near-duplicates of training images; None if
            unknown.
    """
    return [
        *map(to_sentence, evaluation.notes),
        *_leakage_caveats(evaluation, dataset, provenance, num_duplicates),
        *_selection_caveats(evaluation, dataset, provenance),
        *_sample_size_caveats(evaluation),
    ]


def is_training_dataset(dataset: Dataset, provenance: Mapping[str, Any]) -> bool:
    """Whether the model file says that the model was trained on this data set."""
    return provenance.get("dataset") == dataset.root.name


def is_other_dataset(dataset: Dataset, provenance: Mapping[str, Any]) -> bool:
    """Whether the model file says that the model was trained on another data set."""
    return "dataset" in provenance and not is_training_dataset(dataset, provenance)


def _leakage_caveats(
    evaluation: Evaluation,
    dataset: Dataset,
    provenance: Mapping[str, Any],
    num_duplicates: int | None,
) -> list[str]:
    """Say which images the model may have been trained on."""
    caveats = []
    trained_here, num_train = is_training_dataset(dataset, provenance), len(dataset.of("train"))
    if evaluation.split in ("train", "all") and num_train and (trained_here or not provenance):
        caveats.append(
            "If the model was trained on this data set, these images include its training images. "
            "The scores are then too high for new images."
        )
    elif trained_here and provenance.get("num_train", num_train) != num_train:
        caveats.append(
            f"The model was trained on {provenance['num_train']} images of this data set, but "
            f"this split has {num_train} training images. The splits differ, so the model may "
            "have been trained on some of these images."
        )
    num_seen = provenance.get("start", {}).get("num_seen", 0)
    if num_seen and trained_here and evaluation.split == "val":
        caveats.append(
            f"This model started from one that was trained on {num_seen:,} of these images, so the "
            "scores are too high."
        )
    if num_duplicates:
        caveats.append(
            f"{num_duplicates:,} of these images "
            + (
                "is a near-duplicate of a training image"
                if num_duplicates == 1
                else "are near-duplicates of training images"
            )
            + ", so the scores are too high."
        )
    return caveats


def _selection_caveats(
    evaluation: Evaluation, dataset: Dataset, provenance: Mapping[str, Any]
) -> list[str]:
    """Say what was selected on the validation set."""
    trained_here = is_training_dataset(dataset, provenance)
    if evaluation.split != "val" or not (trained_here or not provenance):
        return []
    caveats = [
        "Training selected the checkpoint and fitted the temperature on these images, so the "
        "scores are slightly too high."
    ]
    if not dataset.splits_by.startswith("random") and _shares_recordings(dataset, evaluation.split):
        caveats.append(
            "The training images come from the same recordings, so expect lower scores in other "
            "places and on other days."
        )
    return caveats


def _shares_recordings(dataset: Dataset, split: str) -> bool:
    """Whether names show images of one group, video or stack in both splits."""
    if sides := find_groups_by_split(dataset, split):
        train, held_out = sides
        return not train.isdisjoint(held_out)
    if not are_numbered(dataset.pairs):
        return False
    return any(
        {"train", split} <= {pair.split for pair in sequence}
        for sequence in find_sequences(dataset.pairs)
    )


def _sample_size_caveats(evaluation: Evaluation) -> list[str]:
    """Say which scores rest on too little data."""
    caveats = []
    if evaluation.intervals and evaluation.intervals.note and evaluation.intervals.mean_iou:
        caveats.append(to_sentence(evaluation.intervals.note))
    if evaluation.images:
        num_images = (evaluation.tallies[:, 1] > 0).sum(0)
        small = [
            f"{entry.name} ({format_count(entry.pixels, 'pixel')} in "
            f"{format_count(int(num_images[entry.id]), 'image')})"
            for entry in evaluation.scores.classes
            if entry.pixels
            and (num_images[entry.id] < _MIN_CLASS_IMAGES or entry.pixels < _MIN_CLASS_PIXELS)
        ]
        if small:
            caveats.append(
                "These classes have too few images or pixels for a reliable score, but count "
                f"fully in the mean: {join_names(small, MAX_NAMES)}."
            )
    if evaluation.scores.absent:
        caveats.append(
            "Not in the ground truth, so not scored and not part of any mean: "
            f"{join_names(evaluation.scores.absent, 40)}."
        )
    return caveats
