"""What was found of a weak class -> the likely causes of its weakness, in words, each with its evidence and what would help.

Every threshold stands here, with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from useg.data.dataset import Dataset
from useg.doctor.alignment import describe_shift
from useg.doctor.measure import join_with_and, pluralize
from useg.models.segmenter import ModelDescription
from useg.reporting.error_analysis import ClassErrors, SplitStatistics, find_split_differences
from useg.reporting.evaluate import Cause, Evaluation

WEAK_IOU, ALWAYS_WEAK_IOU = (
    0.6,
    0.5,
)  # IoU: below HALF a class is weak anyhow, below WEAK if it is below the mean too


MIN_TRAIN_IMAGES = 20  # training pictures: fewer give a handful of views of a thing


MIN_TRAIN_SHARE = (
    0.001  # share of the training pixels: 200 of the 200,000 that a batch holds, an object or two
)


NARROW_PIXELS = 4.0  # pixels at the working size: of a thing this wide half of the pixels lie on its outline, mixed with what is beside it


MIN_BEST_IOU = 0.7  # IoU of the best answer at the working size: with less, what a network adds of its own makes any class weak


_FEW_TRAINED = (
    0.5  # share of the training pictures: what most of them show is not rare, however few they are
)


_ACCOUNTS = 0.5  # share of the mistakes that a cause must account for


_PARTNER = 0.4  # the same for one confusion of the many that there may be


_MOSTLY = 0.8  # share of a class that is as good as all of it


_TREND = 0.15  # recall by which wider things are found better than narrower ones, for the width to matter


_SIDES = 0.6  # how far the picture sides with the model: 0.5 shows nothing; a network's own mistakes reach it too, but not with


_SURE = (
    0.85  # such confidence in mistakes, relative to that elsewhere: in a network's own 0.6 to 0.75
)


_CLEAR_EDGE = 1.05  # edges under agreed outlines, where anywhere is 1: below that they do not stand out from the texture


_PLACES, _PIXELS, _THINGS = 100, 50, 8  # on outlines, in masks, things: fewer show nothing


_GAP = 0.1  # mean IoU by which training pictures do better, for a difference between the sides to matter


_BY_HEART = 0.2  # the same, to be worth saying by itself


_FACTOR = 3.0  # between the shares of a class on both sides: twos are common


_ERRORS = 4.0  # standard errors between them


@dataclass(frozen=True)
class SplitComparison:
    """Both sides of the split.

    Args:
        trained, held: a sample of the pictures of each.
        num_trained: training pictures in all.
        trained_iou, held_iou: mean IoU of some training pictures and of the held-out ones, over the classes that both show.
    """

    trained: SplitStatistics
    held: SplitStatistics
    num_trained: int
    trained_iou: float
    held_iou: float

    @property
    def gap(self) -> float:
        """Mean IoU by which training pictures do better."""
        return self.trained_iou - self.held_iou


@dataclass(frozen=True)
class EvaluationContext:
    """What is known of the whole.

    Args:
        evaluation: what was measured, on which ``dataset``.
        card: of the model.
        size: (width, height) of a held-out picture.
        shift: (right, down) by which the masks would have to move to lie on the edges of their pictures as the predictions do.
        sides: None where the evaluation was not of held-out pictures.
    """

    evaluation: Evaluation
    dataset: Dataset
    card: ModelDescription
    size: tuple[int, int]
    shift: tuple[int, int]
    sides: SplitComparison | None


@dataclass(frozen=True)
class WeakClass:
    """A weak class: the ``partner`` that it is most often confused with, its mistakes in some pictures, and which of these show most."""

    id: int
    name: str
    partner: int
    mistakes: ClassErrors
    worst: tuple[str, ...]


def check_label_noise(case: EvaluationContext, weak: WeakClass) -> Cause | None:
    """The truth is wrong: the model is as sure where it differs as elsewhere, and the picture's edges side with it."""
    found = weak.mistakes
    predicted, true, agreed = found.outlines[:, 0]
    if (
        predicted + true < _PLACES
        or agreed < _PLACES
        or found.support[2] < _CLEAR_EDGE
        or found.sure[:, 0].min() < _PIXELS
    ):
        return None
    if not (found.taken_side >= _SIDES and found.sureness >= _SURE):
        return None
    message = f"the truth of {weak.name} may be wrong: where it and the model differ, edges of the pictures lie where the model draws them"
    evidence = (
        f"the edges side with the model on {found.taken_side:.0%} of the disputed outlines, and in its mistakes it is {found.sureness:.0%} as sure "
        f"as where it is right; most in {join_with_and(weak.worst)}"
    )
    return Cause(
        weak.name,
        "label noise",
        message,
        evidence,
        f"look at the masks of {join_with_and(weak.worst)} first, and at what useg inspect DATA says",
    )


def check_few_examples(case: EvaluationContext, weak: WeakClass) -> Cause | None:
    """Training saw too little of the class."""
    if case.sides is None:
        return None
    sides = case.sides
    shown = float((sides.trained.pixels[:, weak.id] > 0).mean()) * sides.num_trained
    share = float(sides.trained.pixels[:, weak.id].sum() / max(1, sides.trained.pixels.sum()))
    if (
        shown >= min(MIN_TRAIN_IMAGES, _FEW_TRAINED * sides.num_trained)
        and share >= MIN_TRAIN_SHARE
    ):
        return None
    about = "" if len(sides.trained.pixels) == sides.num_trained else "about "
    evidence = f"{about}{round(shown)} of {pluralize(sides.num_trained, 'training picture')} show it, {100 * share:.2g} % of their pixels"
    message = (
        f"training saw little of {weak.name}"
        if shown
        else f"training hardly saw {weak.name} at all"
    )
    return Cause(
        weak.name,
        "few examples",
        message,
        evidence,
        f"add training pictures that show {weak.name}: useg predict --rank says which to label next",
    )


def check_small_regions(case: EvaluationContext, weak: WeakClass) -> Cause | None:
    """Things of the class are too narrow at the size at which the network works: the narrower, the more are lost."""
    things = weak.mistakes.things[np.argsort(weak.mistakes.things[:, 0], kind="stable")]
    if len(things) < _THINGS or things[:, 1].sum() < _PIXELS:
        return None
    width, pixels, found = things.T
    missed = pixels - found
    narrow = width < NARROW_PIXELS
    if missed[narrow].sum() < _ACCOUNTS * missed.sum() or not missed.any():
        return None
    middle = int(np.searchsorted(pixels.cumsum(), pixels.sum() / 2)) + 1
    (low, low_error), (high, high_error) = (
        _recall(found[part], pixels[part]) for part in (slice(0, middle), slice(middle, None))
    )
    none_found = (
        found.sum() < _TREND * pixels.sum() and pixels[narrow].sum() > _MOSTLY * pixels.sum()
    )  # nothing to compare with
    falls = high - low >= max(_TREND, _ERRORS * math.hypot(low_error, high_error))
    if not (falls or none_found or weak.mistakes.best_iou < MIN_BEST_IOU):
        return None
    half = float(width[middle - 1])
    now = case.card.working.of(*case.size)
    trend = (
        "hardly any of it is found"
        if none_found
        else "the narrower a thing, the less of it is found"
        if falls
        else "it is lost in reducing"
    )
    message = f"{weak.name} is too small for the network at {now[0]}x{now[1]} pixels: {trend}"
    evidence = f"half of it lies in things up to {half:.1f} pixels wide at that size; recall {100 * low:.0f} % there, {100 * high:.0f} % in what is wider; "
    evidence += (
        f"the best answer at that size would have an IoU of {100 * weak.mistakes.best_iou:.0f} %"
    )
    return Cause(
        weak.name,
        "small things",
        message,
        evidence,
        f"train larger: {larger_size_setting(case, NARROW_PIXELS / max(half, 0.1))}",
    )


def _recall(found: NDArray[np.float64], pixels: NDArray[np.float64]) -> tuple[float, float]:
    """Return the recall of some things, and its standard error, the things taken for independent; no thing has a recall of 0."""
    total = max(1.0, float(pixels.sum()))
    recall = float(found.sum()) / total
    return recall, float(np.sqrt(((found - recall * pixels) ** 2).sum())) / total


def check_class_share(case: EvaluationContext, weak: WeakClass) -> Cause | None:
    """Held-out pictures show far more or far less of the class than training pictures, and the model expects what it knows."""
    if (
        case.sides is None
        or len(case.evaluation.images) < _THINGS
        or len(case.sides.trained.pixels) < _THINGS
        or check_few_examples(case, weak)
    ):
        return None
    true = case.evaluation.tallies[:, 1]
    held, trained = (
        true[:, weak.id] / np.maximum(true.sum(1), 1),
        case.sides.trained.shares[:, weak.id],
    )
    error = math.sqrt(held.var(ddof=1) / len(held) + trained.var(ddof=1) / len(trained))
    low, high = sorted((float(held.mean()), float(trained.mean())))
    total = case.evaluation.tallies.sum(0)[:, weak.id]
    as_expected = (total[2] > total[1]) == (trained.mean() > held.mean())
    if high < _FACTOR * low or high - low < _ERRORS * error or not as_expected:
        return None
    more = "far more" if held.mean() > trained.mean() else "far less"
    message = f"the held-out pictures show {more} {weak.name} than those that the model learnt from"
    evidence = f"{trained.mean():.2%} of the pixels in training, {held.mean():.2%} held out"
    evidence += f"; the model finds {total[2] / max(1, total[1]):.2g} times what there is"
    remedy = "let training see as much of it as there will be, or hold out pictures of every kind: --set data.split=stratified"
    return Cause(weak.name, "split shift", message, evidence, remedy)


def check_confusion(case: EvaluationContext, weak: WeakClass) -> Cause | None:
    """One other class has most of the mistakes: along the border between the two, or in whole regions."""
    counts, partner = case.evaluation.counts, case.dataset.classes.names[weak.partner]
    mistaken = counts[weak.id].sum() + counts[:, weak.id].sum() - 2 * counts[weak.id, weak.id]
    lost, wrongly = int(counts[weak.id, weak.partner]), int(counts[weak.partner, weak.id])
    if lost + wrongly < _PARTNER * mistaken or weak.mistakes.confused[0] < _PIXELS:
        return None
    swapped, near, expected = weak.mistakes.confused
    evidence = (
        f"{(lost + wrongly) / mistaken:.0%} of the wrong pixels: {lost:,} of {weak.name} are called {partner}, {wrongly:,} of {partner} {weak.name}; "
        f"{near / swapped:.0%} of those looked at lie along their border, where {expected / swapped:.0%} would lie by chance"
    )
    if weak.mistakes.near_border < _ACCOUNTS:
        message = f"{weak.name} is confused with {partner} in whole regions"
        remedy = f"add training pictures that show both, or {_longer(case)}"
        remedy += "; if people can hardly tell the two apart, make them one class in classes.toml"
        return Cause(weak.name, "confused in regions", message, evidence, remedy)
    width, pixels, _ = weak.mistakes.things.T
    message = f"the border between {weak.name} and {partner} is misjudged, by few pixels"
    if pixels[width < NARROW_PIXELS].sum() > _MOSTLY * pixels.sum():
        message = f"{weak.name} is so fine that nearly all of it is border with {partner}, which is misjudged by few pixels"
    now = case.card.working.of(*case.size)
    remedy = (
        f"train larger ({larger_size_setting(case, case.size[0] / now[0])})"
        if now[0] < 0.9 * case.size[0]
        else 'train with --set "train.loss=ce + dice + 0.5 boundary"'
    )
    remedy += "; where people draw the border differently too, score with a tolerance (boundary F) or mask it as ignored"
    return Cause(weak.name, "confused at borders", message, evidence, remedy)


def check_shifted_masks(case: EvaluationContext) -> Cause | None:
    """The held-out masks lie beside their pictures, and the predictions do not."""
    if case.shift == (0, 0):
        return None
    message = "the held-out masks lie beside what they label, so that right answers count as wrong"
    evidence = f"moved {describe_shift(case.shift)} they lie on the edges of their pictures, where the predictions lie as they are"
    return Cause(
        "",
        "label noise",
        message,
        evidence,
        "correct the export that made them; useg inspect DATA --fix CLEAN moves them in a copy",
    )


def check_generalization(case: EvaluationContext) -> Cause | None:
    """Held-out pictures look different, or are known less well than those learnt by heart, or even these are not known."""
    sides = case.sides
    if sides is None:
        return None
    gap = f"mean IoU {100 * sides.trained_iou:.0f} % on training pictures, {100 * sides.held_iou:.0f} % held out"
    if sides.gap < _GAP:
        message = "the model does not know its own training pictures well either: it has not learnt enough yet"
        return (
            Cause("", "learnt too little", message, gap, _longer(case))
            if sides.trained_iou < WEAK_IOU
            else None
        )
    different = find_split_differences(sides.trained, sides.held)
    if different:
        message = f"the held-out pictures are {join_with_and([part.what for part in different])} than those that the model learnt from"
        remedy = "train on pictures of that kind too; to measure something else, hold out pictures of every kind: --set data.split=stratified"
        return Cause(
            "",
            "split shift",
            message,
            "; ".join([*(part.numbers for part in different), gap]),
            remedy,
        )
    if sides.gap < _BY_HEART:
        return None
    message = "the model knows its training pictures far better than others: it has learnt these rather than their kind"
    remedy = f"add training pictures of other places and days{_or_pretrained(case)}"
    return Cause("", "not carried over", message, gap, remedy)


def _longer(case: EvaluationContext) -> str:
    return f"train longer (--minutes){_or_pretrained(case)}"


def _or_pretrained(case: EvaluationContext) -> str:
    return (
        ", or start from pretrained weights (--set model.encoder=lite0)"
        if case.card.network.get("encoder", "plain") == "plain"
        else ""
    )


def larger_size_setting(case: EvaluationContext, factor: float) -> str:
    """Return the setting that enlarges what the network sees by ``factor``, up to the pictures' own size, or to twice that where it is there."""
    (width, height), now = case.size, case.card.working.of(*case.size)
    own = math.sqrt(width * height / (now[0] * now[1]))
    factor = min(factor, own if own > 1.1 else 2.0)
    if case.card.working.frame is None:
        return f"--set data.scale={case.card.working.scale * factor:.2g}"
    stride = case.card.stride
    sides = [max(1, round(side * factor / stride)) * stride for side in now]
    return f"--set data.size={sides[0]}x{sides[1]}"


# The first explains what those after it describe: wrong truth makes every other number doubtful, and what was never seen has no other chance.
CLASS_RULES: tuple[Callable[[EvaluationContext, WeakClass], Cause | None], ...] = (
    check_label_noise,
    check_few_examples,
    check_small_regions,
    check_class_share,
    check_confusion,
)
