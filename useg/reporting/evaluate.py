"""Measure a model on a data set, at the native resolution of the labels.

A predictor and a data set come in; an :class:`Evaluation` goes out: the scores with intervals, the
boundaries, the calibration, the errors by size and position, and the scores of each image. Each
image is counted by itself and the counts are added, so order and grouping cannot change a score.

After training, :func:`calibrate` measures what the model file then holds: the temperature that
calibrates the probabilities on held-out images, and statistics of the training images, which tell
later which images are unlike them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, ClassTable, Label, most_probable, softmax
from useg.data.dataset import (
    Dataset,
    Pair,
    object_classes,
    pair_name,
    pick_evenly,
    read_objects,
    read_pair_image,
    read_pair_size,
    read_sample,
)
from useg.data.splits import are_numbered, find_sequences
from useg.device import CPU, choose_device
from useg.errors import DataError, SettingsError, choose
from useg.images.image_files import Sample, read_mask, resize_label
from useg.inference import runtimes
from useg.inference.predictor import Predictor
from useg.machine import in_parallel, prefetch
from useg.models import segmenter
from useg.models.description import (
    Statistics,
    TrainingImages,
    fit_training_images,
    measure_image,
)
from useg.models.geometry import fit_bands
from useg.objects.scores import (
    ComponentCounts,
    ObjectScores,
    ObjectTally,
    count_components,
    score_components,
    score_tallies,
    tally_classes,
)
from useg.objects.separation import ObjectIds
from useg.objects.table import find_objects
from useg.reporting.evaluation_result import Evaluation, ImageScore
from useg.scoring import boundaries, uncertainty
from useg.scoring.boundaries import BoundaryCounts, MembraneCounts, boundary_counts, membrane_counts
from useg.scoring.metrics import (
    Confusion,
    PlaceCounts,
    RegionCounts,
    confusion,
    mean_iou,
    pixel_accuracy,
    place_counts,
    region_counts,
    score,
    score_regions,
    tally,
)
from useg.scoring.uncertainty import (
    FIT_PIXELS,
    Reliability,
    fit_temperature,
    reliability,
    sample_pixels,
)

# Neighbouring images of a video or stack that are resampled together: the longest gap that a split
# leaves between its parts.
MAX_BOOTSTRAP_BLOCK_IMAGES = 10

# More images would take longer and hardly change the one number that is fitted.
MAX_TEMPERATURE_IMAGES = 40
# Training and held-out images that are described: at most this many images and pixels in all, but
# always some.
MAX_TRAINING_IMAGES, MAX_HELD_OUT_IMAGES = 64, 100
MAX_DESCRIBED_PIXELS, MIN_DESCRIBED_IMAGES = 64_000_000, 12

PredictionCallback = Callable[[Sample, Label], None]


@dataclass(frozen=True)
class Extras:
    """What an evaluation ignores, and what it measures in addition to its scores.

    Args:
        ignore_mask: an image file whose pixels other than 0 are left out of every image, such as
            the car's own hood; of the size or the aspect ratio of the images.
        tolerance: pixels by which a predicted boundary may miss the true one in ``boundary_f``; by
            default a share of the image diagonal.
        objects: name of a class whose connected regions are counted as objects.
        membranes: name of the membrane class, for the errors of the ISBI 2012 challenge.
        tile: tile size, as for a call of the predictor; scores do not depend on it.
    """

    ignore_mask: str | Path | None = None
    tolerance: int | None = None
    objects: str | None = None
    membranes: str | None = None
    tile: int | None = None


@dataclass(frozen=True)
class CountSettings:
    """:class:`Extras` with class ids instead of names and the ignore mask in memory.

    Args:
        ignored: ``(h, w)``, 1 where pixels are left out; None if all pixels count.
        tolerance: as in :class:`Extras`.
        objects: id of the class whose regions are objects.
        membranes: id of the membrane class.
        tile: as in :class:`Extras`.
        object_classes: ids of the classes whose objects the truth distinguishes, if they are
            scored.
    """

    ignored: NDArray[np.uint8] | None
    tolerance: int | None
    objects: int | None
    membranes: int | None
    tile: int | None
    object_classes: tuple[int, ...] = ()

    @classmethod
    def from_extras(cls, extras: Extras, classes: ClassTable) -> CountSettings:
        """Look up the classes of a model and read the ignore mask.

        Raises:
            SettingsError: an unknown class or a negative tolerance.
            DataError: the ignore mask cannot be read or ignores every pixel.
        """
        ids = {name: k for k, name in enumerate(classes.names)}
        if extras.tolerance is not None and extras.tolerance < 0:
            raise SettingsError(
                f"the boundary tolerance is {extras.tolerance} pixels, but it cannot be negative; "
                "0 requires an exact match"
            )
        objects, membranes = (
            None if name is None else choose("the class", name, ids)
            for name in (extras.objects, extras.membranes)
        )
        ignored = None
        if extras.ignore_mask is not None:
            ignored = _read_ignore_mask(Path(extras.ignore_mask))
        return cls(ignored, extras.tolerance, objects, membranes, extras.tile)


@dataclass(frozen=True)
class ImageCounts:
    """All counts of an image; images add up. Objects and membranes are empty unless requested.

    ``instances`` has the counts of the objects of each class ``(C, 18)``; C is 0 unless the truth
    tells objects apart.
    """

    confusion: Confusion
    boundaries: BoundaryCounts
    reliability: Reliability
    regions: RegionCounts
    places: PlaceCounts
    objects: ComponentCounts
    membranes: MembraneCounts
    instances: ObjectTally = field(default_factory=lambda: np.zeros((0, 18)))

    def __add__(self, other: ImageCounts) -> ImageCounts:
        return ImageCounts(
            *(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__)
        )


def evaluate_dataset(
    predictor: Predictor,
    dataset: Dataset,
    split: str = "val",
    *,
    extras: Extras = Extras(),
    progress: Callable[[int, int], None] = lambda done, total: None,
    on_prediction: PredictionCallback = lambda sample, prediction: None,
) -> Evaluation:
    """Score a model on one split of a data set, each image at the native size of its label.

    Args:
        predictor: the model.
        dataset: pairs with their splits.
        split: ``"train"``, ``"val"``, ``"test"``, or ``"all"`` for every pair.
        extras: what to ignore, and what else to measure.
        progress: called with (images done, images in all).
        on_prediction: called in order with each sample, as it is scored, and its prediction.

    Raises:
        UsageError: no pair in that split, an unreadable file, other classes than the model's, or
            extras that do not fit.
    """
    pairs = _select_pairs(predictor, dataset, split)
    settings = CountSettings.from_extras(extras, predictor.classes)
    if predictor.has_objects or extras.objects is not None:
        settings = replace(settings, object_classes=object_classes(dataset))
    sums: ImageCounts | None = None
    images, instances = [], []
    samples = prefetch(read_sample(pair, dataset) for pair in pairs)
    for pair, unmasked in zip(pairs, samples, strict=True):
        sample = apply_ignore_mask(unmasked, settings, str(pair.mask))
        objects = read_objects(pair, dataset) if settings.object_classes else None
        counts, prediction = count_image(predictor, sample, settings, objects)
        on_prediction(sample, prediction)
        own = tally(counts.confusion)
        images.append(ImageScore(pair, float(mean_iou(own)), float(pixel_accuracy(own)), own))
        instances.append(counts.instances)
        sums = counts if sums is None else sums + counts
        progress(len(images), len(pairs))
    assert sums is not None
    blocks = find_blocks(pairs, dataset)
    return Evaluation(
        scores=score(sums.confusion, predictor.classes.names, len(pairs)),
        images=tuple(images),
        counts=sums.confusion,
        model=predictor.name,
        dataset=str(dataset.root),
        split=split,
        blocks=tuple(blocks),
        intervals=uncertainty.score_intervals(np.stack([image.tally for image in images]), blocks),
        boundaries=boundaries.score_boundaries(sums.boundaries),
        calibration=uncertainty.calibration(sums.reliability, predictor.temperature),
        sizes=score_regions(sums.regions),
        places=sums.places,
        objects=score_components(sums.objects) if sums.objects.size else None,
        membranes=boundaries.score_membranes(sums.membranes) if sums.membranes.size else None,
        object_scores=_score_objects(np.stack(instances), blocks, settings, predictor.classes),
    )


def _score_objects(
    tallies: ObjectTally, blocks: Sequence[int], settings: CountSettings, classes: ClassTable
) -> dict[str, ObjectScores]:
    """Score the objects ``(N, C, 18)`` of all classes together, and of each class."""
    if not settings.object_classes:
        return {}
    names = [classes.names[k] for k in settings.object_classes]
    by_class = dict(zip(names, np.moveaxis(tallies, 1, 0), strict=True))
    return {
        name: score_tallies(each, blocks) for name, each in {"": tallies.sum(1), **by_class}.items()
    }


def count_image(
    predictor: Predictor,
    sample: Sample,
    settings: CountSettings,
    true_objects: ObjectIds | None = None,
) -> tuple[ImageCounts, Label]:
    """Predict one image and count its pixels, boundaries and regions.

    Args:
        predictor: the model.
        sample: image and label, as :func:`apply_ignore_mask` returns it.
        settings: what to count.
        true_objects: the number of each pixel's object ``(H, W)``, if objects are scored.

    Returns:
        The counts, and the prediction ``(H, W)``.

    Raises:
        UsageError: the image does not fit the model.
    """
    label = sample.label
    outputs = predictor.pixel_outputs(sample.image, settings.tile)
    logits = outputs.logits
    prediction = most_probable(logits)
    num_classes, temperature = len(predictor.classes), predictor.temperature
    objects, membranes = np.zeros(0, np.int64), np.zeros(0)
    known = label != IGNORE
    if settings.objects is not None:
        is_predicted = (prediction == settings.objects) & known
        objects = count_components(is_predicted, label == settings.objects)
    if settings.membranes is not None:
        cell_probability = 1 - softmax(logits, temperature)[settings.membranes]
        true_cells = (label != settings.membranes) & known
        membranes = membrane_counts(cell_probability, true_cells, known)
    counts = ImageCounts(
        confusion=confusion(prediction, label, num_classes),
        boundaries=boundary_counts(prediction, label, num_classes, settings.tolerance),
        reliability=reliability(logits, prediction, label, temperature),
        regions=region_counts(prediction, label, num_classes),
        places=place_counts(prediction, label),
        objects=objects,
        membranes=membranes,
    )
    if true_objects is not None:
        found = find_objects(outputs, settings.object_classes, temperature)
        instances = tally_classes(found, true_objects, label, settings.object_classes)
        counts = replace(counts, instances=instances)
    return counts, prediction


def apply_ignore_mask(sample: Sample, settings: CountSettings, name: str) -> Sample:
    """Return the sample with ``IGNORE`` in its label wherever the ignore mask is set.

    Args:
        sample: as it was read.
        settings: contains the ignore mask, of the label's size or aspect ratio, or None.
        name: name of the label, for the error.

    Raises:
        DataError: the ignore mask does not fit the label.
    """
    if settings.ignored is None:
        return sample
    (height, width), (rows, columns) = sample.label.shape, settings.ignored.shape
    # The aspect ratios may differ by the rounding of one side to whole pixels.
    if 2 * abs(rows * width - columns * height) > max(rows, columns, height, width):
        raise DataError(
            f"the ignore mask has {columns}x{rows} pixels, but '{name}' has {width}x{height}; "
            "give an ignore mask of the same size or the same aspect ratio"
        )
    label = sample.label.copy()
    label[resize_label(settings.ignored, (width, height)) != 0] = IGNORE
    return replace(sample, label=label)


def _read_ignore_mask(path: Path) -> NDArray[np.uint8]:
    mask = read_mask(path)
    ignored = np.any(mask.reshape(*mask.shape[:2], -1) != 0, axis=2)
    if np.all(ignored):
        raise DataError(
            f"the ignore mask '{path}' ignores every pixel, because all its values differ from 0; "
            "set the pixels that count to 0"
        )
    return np.asarray(ignored, np.uint8)


def find_blocks(pairs: Sequence[Pair], dataset: Dataset) -> list[int]:
    """Group images that are not independent of each other, as far as their names show.

    Images with consecutive numbers count as frames of a video or slices of a stack. Up to
    ``MAX_BOOTSTRAP_BLOCK_IMAGES`` neighbours form a block. If the data set was split at random,
    every image is a block of its own.

    Returns:
        The number of its block for each pair.
    """
    if dataset.splits_by.startswith("random") or not are_numbered(pairs):
        return list(range(len(pairs)))
    numbers: dict[Pair, int] = {}
    number = 0
    for sequence in find_sequences(pairs):
        num_parts = math.ceil(len(sequence) / MAX_BOOTSTRAP_BLOCK_IMAGES)
        for part in np.array_split(np.arange(len(sequence)), num_parts):
            numbers |= {sequence[k]: number for k in part}
            number += 1
    return [numbers[pair] for pair in pairs]


def _select_pairs(predictor: Predictor, dataset: Dataset, split: str) -> list[Pair]:
    """Return the pairs of a split, or raise if the model cannot be scored on them."""
    pairs = [pair for pair in dataset.pairs if split in ("all", pair.split)]
    if not pairs:
        counts = Counter(pair.split for pair in dataset.pairs)
        available = ", ".join(f"{name}: {count}" for name, count in sorted(counts.items()))
        raise DataError(
            f"{dataset.root} has no pair in the split {split!r}; it has {available}; choose "
            "one of these"
        )
    own, other = predictor.classes.names, dataset.classes.names
    if own != other:
        raise DataError(
            f"the model has {len(own)} classes ({', '.join(own)}), but {dataset.root} has "
            f"{len(other)} ({', '.join(other)}); give a classes.toml with the model's classes"
        )
    return pairs


def find_temperature(predictor: Predictor, dataset: Dataset, pairs: Sequence[Pair]) -> float:
    """Fit the temperature on some pixels of images that the model was not trained on.

    Args:
        predictor: the model; its present temperature does not matter.
        dataset: the data set of the pairs.
        pairs: held-out images; at most ``MAX_TEMPERATURE_IMAGES`` of them are used.

    Raises:
        UsageError: an unreadable file, or an image that does not fit the model.
    """
    chosen = pick_evenly(pairs, MAX_TEMPERATURE_IMAGES)
    if not chosen:
        return 1.0
    num_pixels = FIT_PIXELS // len(chosen)
    parts = []
    for k, pair in enumerate(chosen):
        sample = read_sample(pair, dataset)
        logits = predictor.logits(sample.image)
        parts.append(sample_pixels(logits, sample.label, num_pixels, seed=k))
    logits, truth = (np.concatenate(part) for part in zip(*parts, strict=True))
    return fit_temperature(logits, truth)


def describe_images(model: segmenter.Segmenter, dataset: Dataset) -> TrainingImages:
    """Describe how some training images look, with a limit from held-out images.

    Raises:
        UsageError: an unreadable file.
    """
    mean, std = (part.flatten().tolist() for part in (model.mean, model.std))

    def measure(pair: Pair) -> Statistics:
        image = fit_bands(read_pair_image(pair), model.channels, model.pixels, pair_name(pair))
        return measure_image(image, mean, std, model.working)

    parts = []
    for split, most in (("train", MAX_TRAINING_IMAGES), ("val", MAX_HELD_OUT_IMAGES)):
        pairs = dataset.of(split)
        width, height = read_pair_size(pairs[0])
        count = max(MIN_DESCRIBED_IMAGES, min(most, MAX_DESCRIBED_PIXELS // (width * height)))
        parts.append(list(in_parallel(measure, pick_evenly(pairs, count))))
    return fit_training_images(*parts)


def calibrate(run: Path, dataset: Dataset) -> None:
    """Fit the temperature of a run and describe its images, and write both into the model file.

    A GPU computes if there is one.

    Raises:
        UsageError: as for :func:`find_temperature`; also if there is no model, or the file cannot
            be written.
    """
    model = segmenter.load_model(run)
    name = "torch" if choose_device() == CPU else "gpu"
    predictor = Predictor(runtimes.runtime_of_model(model, run, name))
    model.temperature = find_temperature(predictor, dataset, dataset.of("val"))
    if dataset.of("train") and dataset.of("val"):
        model.provenance["training_images"] = describe_images(model, dataset).as_dict()
    segmenter.save_model(model, run / segmenter.MODEL_NAME)
