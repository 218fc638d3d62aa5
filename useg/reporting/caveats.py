"""Say what could make the scores of an evaluation wrong.

Scores are doubtful because of leaks between training and measured images, selections made on the
measured images, and too little data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from useg.data.dataset import Dataset
from useg.data.folds import find_groups_by_split
from useg.data.splits import are_numbered, find_sequences
from useg.errors import MAX_NAMES, format_count, join_names
from useg.reporting.evaluation import Evaluation
from useg.reporting.text import to_sentence

# The score of a class with fewer images or pixels is not reliable.
_MIN_CLASS_IMAGES, _MIN_CLASS_PIXELS = 3, 2000


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
