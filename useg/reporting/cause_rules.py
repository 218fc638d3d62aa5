"""Rules that find the likely causes of a weak class, each with its evidence and a remedy.

Each rule takes what :mod:`useg.reporting.causes` measured and returns a cause or None. All
thresholds are here, with their reasons.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from useg.data.dataset import Dataset
from useg.doctor.edges import describe_shift
from useg.errors import MAX_NAMES, format_count, join_names
from useg.models.description import ModelDescription
from useg.reporting.error_analysis import ClassErrors, SplitStatistics, find_split_differences
from useg.reporting.evaluation_result import Cause, Evaluation
from useg.reporting.text import format_percent

# A class is weak if its IoU is below ALWAYS_WEAK_IOU, or below both WEAK_IOU and the mean IoU.
WEAK_IOU, ALWAYS_WEAK_IOU = 0.6, 0.5

# Fewer training images show a class from a handful of views only.
MIN_TRAIN_IMAGES = 20

# Share of the training pixels: 200 of the 200,000 pixels in a mini-batch, or one or two objects.
MIN_TRAIN_SHARE = 0.001

# Width in pixels at the working size. In a region this wide, half of the pixels are on the outline
# and mixed with their surroundings.
NARROW_PIXELS = 4.0
# Minimum factor between the working size and a proposed larger one.
_MIN_ENLARGEMENT = 1.25

# Best possible IoU at the working size. Below it, the network's own errors make any class weak.
MIN_BEST_IOU = 0.7

# A class that this share of the training images contains is not rare, however few they are.
_MIN_TRAIN_IMAGE_SHARE = 0.5

# Share of the errors that a cause must explain; less for one confusion among many possible ones.
_MIN_EXPLAINED_SHARE = 0.5
_MIN_CONFUSION_SHARE = 0.4

# Share of a class that counts as nearly all of it.
_NEARLY_ALL = 0.8

# Increase of recall from narrow to wide regions that makes the width a cause.
_MIN_RECALL_INCREASE = 0.15

# Wrong labels: the edges agree with the prediction to this degree, where 0.5 shows nothing, and the
# confidence in errors relative to that in correct pixels is this high. The errors of a network
# itself can reach the first, but their relative confidence is 0.6 to 0.75.
_MIN_PREDICTION_SUPPORT = 0.6
_MIN_RELATIVE_CONFIDENCE = 0.85

# Edge strength under shared outlines, relative to the mean: below it, texture hides the edges.
_MIN_OUTLINE_EDGE = 1.05

# Fewer pixels on outlines, pixels in masks, or regions show nothing.
_MIN_OUTLINE_PIXELS, _MIN_PIXELS, _MIN_REGIONS = 100, 50, 8

# A model with a lower mean IoU on training images has learned almost nothing.
MIN_LEARNED_IOU = 0.1

# Difference of mean IoU between training and held-out images: from the first on, differences
# between the images matter; from the second on, it is a cause by itself.
_MIN_IOU_GAP = 0.1
_MIN_OVERFITTING_GAP = 0.2

# Ratio of the shares of a class in both splits (a ratio of 2 is common), and standard errors of
# a difference that counts.
_MIN_SHARE_RATIO = 3.0
_MIN_STANDARD_ERRORS = 4.0

# Share of the true objects that are joined or split from which it is reported, and their number.
_MIN_JOINED_SHARE, _MIN_JOINED = 0.05, 5


@dataclass(frozen=True)
class SplitComparison:
    """Training images and held-out images.

    Args:
        train, held_out: statistics of some images of each split.
        num_train: number of training images in all.
        train_iou, held_out_iou: mean IoU of some training images and of the held-out images, over
            the classes that both contain.
    """

    train: SplitStatistics
    held_out: SplitStatistics
    num_train: int
    train_iou: float
    held_out_iou: float

    @property
    def gap(self) -> float:
        """Mean IoU on training images minus that on held-out images."""
        return self.train_iou - self.held_out_iou


@dataclass(frozen=True)
class EvaluationContext:
    """Context of the rules, in addition to the weak class.

    Args:
        evaluation: the scores.
        dataset: the data set that they were measured on.
        description: the description of the model.
        size: (width, height) of a held-out image.
        shift: (right, down) by which the masks would have to move to fit the edges of their images
            as well as the predictions do.
        splits: None unless the evaluation is of held-out images.
    """

    evaluation: Evaluation
    dataset: Dataset
    description: ModelDescription
    size: tuple[int, int]
    shift: tuple[int, int]
    splits: SplitComparison | None

    @property
    def working(self) -> tuple[int, int]:
        """(width, height) of a held-out image in the network."""
        return self.description.working.of(*self.size)


@dataclass(frozen=True)
class WeakClass:
    """A weak class.

    Args:
        id, name: the class.
        other_id: the class that it is most often confused with.
        errors: its errors in some images.
        worst_images: the names of the images with most of its errors.
    """

    id: int
    name: str
    other_id: int
    errors: ClassErrors
    worst_images: tuple[str, ...]


def check_label_noise(context: EvaluationContext, weak: WeakClass) -> Cause | None:
    """The ground truth is wrong: the model is confident where it differs, and the edges agree."""
    errors = weak.errors
    predicted, true, shared = errors.outlines[:, 0]
    if (
        predicted + true < _MIN_OUTLINE_PIXELS
        or shared < _MIN_OUTLINE_PIXELS
        or errors.edge_support[2] < _MIN_OUTLINE_EDGE
        or errors.confidences[:, 0].min() < _MIN_PIXELS
    ):
        return None
    support, confidence = errors.prediction_support, errors.relative_confidence
    if not (support >= _MIN_PREDICTION_SUPPORT and confidence >= _MIN_RELATIVE_CONFIDENCE):
        return None
    images = join_names(weak.worst_images, MAX_NAMES)
    return Cause(
        weak.name,
        "label noise",
        f"the ground truth of {weak.name} may be wrong: where it differs from the prediction, the "
        "edges of the images agree with the prediction",
        f"the edges agree with the prediction on {format_percent(support, brief=True)} of the "
        f"disputed outlines, and the model is {format_percent(confidence, brief=True)} as "
        f"confident in these errors as in correct pixels; most errors are in {images}",
        f"check the masks of {images} first, and run useg inspect DATA",
    )


def check_few_examples(context: EvaluationContext, weak: WeakClass) -> Cause | None:
    """The training set contains too little of the class."""
    splits = context.splits
    if splits is None:
        return None
    pixels = splits.train.pixels
    num_images = float((pixels[:, weak.id] > 0).mean()) * splits.num_train
    share = float(pixels[:, weak.id].sum() / max(1, pixels.sum()))
    enough = min(MIN_TRAIN_IMAGES, _MIN_TRAIN_IMAGE_SHARE * splits.num_train)
    if num_images >= enough and share >= MIN_TRAIN_SHARE:
        return None
    about = "" if len(pixels) == splits.num_train else "about "
    return Cause(
        weak.name,
        "few examples",
        f"the training set has {'few' if num_images else 'almost no'} examples of {weak.name}",
        f"{about}{round(num_images)} of {format_count(splits.num_train, 'training image')} contain "
        f"the class, which has {100 * share:.2g} % of the training pixels",
        f"add training images that contain {weak.name}; useg predict --rank shows which images to "
        "label next",
    )


def check_small_regions(context: EvaluationContext, weak: WeakClass) -> Cause | None:
    """Regions of the class are too narrow at the working size."""
    regions = weak.errors.regions[np.argsort(weak.errors.regions[:, 0], kind="stable")]
    if len(regions) < _MIN_REGIONS or regions[:, 1].sum() < _MIN_PIXELS:
        return None
    width, pixels, found = regions.T
    missed, narrow = pixels - found, width < NARROW_PIXELS
    if missed[narrow].sum() < _MIN_EXPLAINED_SHARE * missed.sum() or not missed.any():
        return None
    # The narrow half holds half of the pixels, and so does the wide half.
    middle = int(np.searchsorted(pixels.cumsum(), pixels.sum() / 2)) + 1
    low, low_error = _recall(found[:middle], pixels[:middle])
    high, high_error = _recall(found[middle:], pixels[middle:])
    # If all regions are narrow and lost, there are no wide ones to compare with.
    all_lost = (
        found.sum() < _MIN_RECALL_INCREASE * pixels.sum()
        and pixels[narrow].sum() > _NEARLY_ALL * pixels.sum()
    )
    standard_errors = _MIN_STANDARD_ERRORS * math.hypot(low_error, high_error)
    increases = high - low >= max(_MIN_RECALL_INCREASE, standard_errors)
    if not (increases or all_lost or weak.errors.best_iou < MIN_BEST_IOU):
        return None
    effect = "they disappear when the images are downscaled"
    if all_lost:
        effect = "the model finds almost none of them"
    elif increases:
        effect = "the narrower a region, the less of it the model finds"
    half_width = float(width[middle - 1])
    size = f"{context.working[0]}x{context.working[1]}"
    return Cause(
        weak.name,
        "small things",
        f"regions of {weak.name} are too narrow for the network at {size} pixels: {effect}",
        f"at {size}, half of the {weak.name} pixels are in regions up to {half_width:.1f} pixels "
        f"wide; the recall is {100 * low:.0f} % in them and {100 * high:.0f} % in wider regions; "
        f"the best possible IoU is {100 * weak.errors.best_iou:.0f} %",
        "train at a larger size: "
        + larger_size_setting(context, NARROW_PIXELS / max(half_width, 0.1)),
    )


def _recall(found: NDArray[np.float64], pixels: NDArray[np.float64]) -> tuple[float, float]:
    """Return the recall of some regions and its standard error; 0 if there are no regions.

    The regions count as independent of each other.
    """
    total = max(1.0, float(pixels.sum()))
    recall = float(found.sum()) / total
    return recall, float(np.sqrt(((found - recall * pixels) ** 2).sum())) / total


def check_class_share(context: EvaluationContext, weak: WeakClass) -> Cause | None:
    """The held-out images contain far more or far less of the class than the training images."""
    splits, tallies = context.splits, context.evaluation.tallies
    if (
        splits is None
        or min(len(tallies), len(splits.train.pixels)) < _MIN_REGIONS
        or check_few_examples(context, weak)
    ):
        return None
    true = tallies[:, 1]
    held_out = true[:, weak.id] / np.maximum(true.sum(1), 1)
    train = splits.train.shares[:, weak.id]
    error = math.sqrt(held_out.var(ddof=1) / len(held_out) + train.var(ddof=1) / len(train))
    low, high = sorted((float(held_out.mean()), float(train.mean())))
    _, num_true, num_predicted = tallies.sum(0)[:, weak.id]
    # A model that expects the share of the training set errs in its direction.
    as_expected = (num_predicted > num_true) == (train.mean() > held_out.mean())
    if (
        high < _MIN_SHARE_RATIO * low
        or high - low < _MIN_STANDARD_ERRORS * error
        or not as_expected
    ):
        return None
    larger = "larger" if held_out.mean() > train.mean() else "smaller"
    return Cause(
        weak.name,
        "split shift",
        f"the share of {weak.name} is much {larger} in the held-out images than in the training "
        "images",
        f"{100 * train.mean():.2f} % of the pixels in training, {100 * held_out.mean():.2f} % held "
        f"out; the model predicts {num_predicted / max(1, num_true):.2g} times the true number of "
        "pixels",
        f"choose training images with a typical share of {weak.name}, or hold out images of every "
        "kind (data.split=stratified)",
    )


def check_confusion(context: EvaluationContext, weak: WeakClass) -> Cause | None:
    """Most errors are confusions with one other class, at the border or in whole regions."""
    counts, other = context.evaluation.counts, context.dataset.classes.names[weak.other_id]
    wrong = counts[weak.id].sum() + counts[:, weak.id].sum() - 2 * counts[weak.id, weak.id]
    missed, added = int(counts[weak.id, weak.other_id]), int(counts[weak.other_id, weak.id])
    swapped, near, expected = weak.errors.confusions
    if missed + added < _MIN_CONFUSION_SHARE * wrong or swapped < _MIN_PIXELS:
        return None
    evidence = (
        f"{format_percent((missed + added) / wrong, brief=True)} of the wrong pixels: {missed:,} "
        f"{weak.name} pixels are predicted as {other}, and {added:,} {other} pixels as "
        f"{weak.name}; in the examined images, {format_percent(near / swapped, brief=True)} of "
        f"them are near the border between the two, compared with "
        f"{format_percent(expected / swapped, brief=True)} by chance"
    )
    if weak.errors.border_share < _MIN_EXPLAINED_SHARE:
        return Cause(
            weak.name,
            "confused in regions",
            f"{weak.name} is confused with {other} in whole regions",
            evidence,
            f"add training images that contain both, or {_train_longer(context)}; if people can "
            "hardly distinguish the two, merge them into one class in classes.toml",
        )
    return Cause(
        weak.name, "confused at borders", *_border_confusion(context, weak, other, evidence)
    )


def _border_confusion(
    context: EvaluationContext, weak: WeakClass, other: str, evidence: str
) -> tuple[str, str, str]:
    """Return message, evidence and remedy of a confusion at the border."""
    width, pixels, _ = weak.errors.regions.T
    message = f"the border between {weak.name} and {other} is misplaced by a few pixels"
    if pixels[width < NARROW_PIXELS].sum() > _NEARLY_ALL * pixels.sum():
        message = (
            f"nearly all of {weak.name} is at the border with {other}, which is misplaced by a few "
            "pixels"
        )
    remedy = 'train with train.loss="ce + dice + 0.5 boundary"'
    if context.working[0] < 0.9 * context.size[0]:
        setting = larger_size_setting(context, context.size[0] / context.working[0])
        remedy = f"train at a larger size ({setting})"
    return (
        message,
        evidence,
        f"{remedy}; if people do not draw the border exactly either, use a score with a tolerance "
        "(boundary F), or label the border as ignored",
    )


def check_shifted_masks(context: EvaluationContext) -> Cause | None:
    """The held-out masks are shifted relative to their images, and the predictions are not."""
    if context.shift == (0, 0):
        return None
    return Cause(
        "",
        "label noise",
        "the held-out masks are shifted relative to their images, so correct predictions count as "
        "errors",
        f"moved {describe_shift(context.shift)}, the masks fit the edges of their images; the "
        "predictions fit them without a shift",
        "correct the export of the masks; useg inspect DATA --fix CLEAN writes a corrected copy",
    )


def check_generalization(context: EvaluationContext) -> Cause | None:
    """The model underfits, the held-out images look different, or the model overfits."""
    splits = context.splits
    if splits is None:
        return None
    ious = (
        f"the mean IoU is {100 * splits.train_iou:.0f} % on training images and "
        f"{100 * splits.held_out_iou:.0f} % on held-out images"
    )
    if splits.gap < _MIN_IOU_GAP:
        if splits.train_iou >= WEAK_IOU:
            return None
        message = "the model underfits: its scores are low on its training images too"
        return Cause("", "learnt too little", message, ious, _train_longer(context))
    differences = find_split_differences(splits.train, splits.held_out)
    if differences:
        adjectives = join_names([difference.adjective for difference in differences])
        return Cause(
            "",
            "split shift",
            f"the held-out images differ from the training images: they are {adjectives}",
            "; ".join([*(difference.numbers for difference in differences), ious]),
            "add training images of this kind, or, to measure on typical images, hold out images "
            "of every kind (data.split=stratified)",
        )
    if splits.gap < _MIN_OVERFITTING_GAP:
        return None
    return Cause(
        "",
        "not carried over",
        "the model overfits: its scores are much higher on training images than on held-out images",
        ious,
        f"add training images of other places and days{_or_pretrained(context)}",
    )


def _train_longer(context: EvaluationContext) -> str:
    return f"train longer{_or_pretrained(context)}"


def _or_pretrained(context: EvaluationContext) -> str:
    if context.description.network.get("encoder", "plain") != "plain":
        return ""
    return ", or start from pretrained weights (model.encoder=lite0)"


def larger_size_setting(context: EvaluationContext, factor: float) -> str:
    """Return the setting that enlarges the working size by a factor.

    It is at most the images' own size; if the working size is already about that, twice the size.
    A smaller factor than ``_MIN_ENLARGEMENT`` is raised to it: it would change little or nothing.
    """
    (width, height), (working_width, working_height) = context.size, context.working
    native_factor = math.sqrt(width * height / (working_width * working_height))
    factor = min(max(factor, _MIN_ENLARGEMENT), native_factor if native_factor > 1.1 else 2.0)
    if context.description.working.frame is None:
        return f"data.scale={context.description.working.scale * factor:.2g}"
    stride = context.description.stride
    sides = [max(1, round(side * factor / stride)) * stride for side in context.working]
    return f"data.size={sides[0]}x{sides[1]}"


# In this order, because a cause may explain what later rules find: wrong labels put every other
# number in doubt, and a class without training examples can only be weak.
CLASS_RULES: tuple[Callable[[EvaluationContext, WeakClass], Cause | None], ...] = (
    check_label_noise,
    check_few_examples,
    check_small_regions,
    check_class_share,
    check_confusion,
)


def check_touching_objects(evaluation: Evaluation, has_objects: bool) -> tuple[Cause, ...]:
    """Find classes in which touching objects are joined, or single objects are split.

    Args:
        evaluation: the scores.
        has_objects: whether the model has learned to keep touching objects apart.
    """
    causes = []
    for name, scores in evaluation.object_scores.items():
        for count, message, evidence in (
            (
                scores.merged,
                "touching objects are predicted as one object",
                "predictions join several",
            ),
            (
                scores.split,
                "single objects are predicted as several objects",
                "true objects are split",
            ),
        ):
            if not name or count < max(_MIN_JOINED, _MIN_JOINED_SHARE * scores.num_true):
                continue
            remedy = "label more images in which objects touch, or train at a larger data.scale"
            if not has_objects:
                remedy = (
                    "train with model.objects = true: the network then learns to separate objects"
                )
            causes.append(
                Cause(
                    name,
                    "touching objects",
                    f"{name}: {message}",
                    f"{count} {evidence}, of {scores.num_true:,} true objects",
                    remedy,
                )
            )
    return tuple(causes)
