"""An evaluation -> why its weak classes are weak: the likely causes, each with its evidence and what would help.

Most is read off what was counted already. For the rest some held-out pictures are predicted once more, some training pictures too, and some
are only read: together about a quarter of the evaluation's own time for 40 pictures, and less for more. Where no class is weak nothing is
done and nothing said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from useg.classes import most_probable
from useg.data.dataset import Dataset, Pair, pair_name, pick_evenly, read_sample
from useg.doctor.measure import (
    MAX_SHIFT_PIXELS,
    EdgeAlignment,
    find_strongest_shift,
    measure_edge_alignment,
    shift_z_score,
)
from useg.reporting.cause_rules import (
    ALWAYS_WEAK_IOU,
    CLASS_RULES,
    WEAK_IOU,
    EvaluationContext,
    SplitComparison,
    WeakClass,
    check_generalization,
    check_shifted_masks,
)
from useg.reporting.error_analysis import (
    ClassErrors,
    measure_class_errors,
    measure_split,
    predict_image,
)
from useg.reporting.evaluate import Cause, CountSettings, Evaluation, Extras, apply_ignore_mask
from useg.scoring.metrics import class_ious, confusion, tally

if TYPE_CHECKING:
    from useg.inference.predictor import Predictor

MAX_CAUSES_PER_CLASS = 2  # causes of one class


# Pictures, where the evaluation had N; each costs about 1.1, 0.7 and 0.07 of one of those.
MIN_ERROR_IMAGES = 5  # held-out ones looked at again, or N / 10


MIN_TRAIN_IOU_IMAGES = 3  # training ones predicted, or N / 20


MIN_STATISTICS_IMAGES, MAX_STATISTICS_IMAGES = (
    16,
    150,
)  # only read, on each side; of the training pictures N / 4, if that is more


def find_causes(
    evaluation: Evaluation,
    dataset: Dataset,
    predictor: Predictor,
    extras: Extras = Extras(),  # noqa: B008 - frozen
) -> tuple[Cause, ...]:
    """Say why the weak classes of an evaluation are weak.

    Args:
        evaluation: what was measured.
        dataset: on what.
        predictor: with which model.
        extras: what the evaluation left out.

    Returns:
        Causes of the whole first, then at most ``MOST`` of each weak class, the weakest class first; none where no class is weak.

    Raises:
        UsageError: a file that can no longer be read.
    """
    classes = find_weak_classes(evaluation)
    if not classes:
        return ()
    case, weak = _look(
        evaluation,
        dataset,
        predictor,
        classes,
        CountSettings.from_extras(extras, predictor.classes),
    )
    if shifted := check_shifted_masks(case):
        return (shifted,)  # nothing else that was measured means anything
    causes = []
    for one in weak:
        found = [cause for verdict in CLASS_RULES if (cause := verdict(case, one))]
        causes += found[
            : 1 if found and found[0].kind == "label noise" else MAX_CAUSES_PER_CLASS
        ]  # what else is seen may be the noise
    if (whole := check_generalization(case)) and not _accounted(whole, causes, len(weak)):
        causes.insert(0, whole)
    return tuple(causes)


def add_causes(
    evaluation: Evaluation,
    dataset: Dataset,
    predictor: Predictor,
    extras: Extras = Extras(),  # noqa: B008 - frozen
) -> Evaluation:
    """Return an evaluation with its causes; arguments and errors as for :func:`explain`."""
    return replace(evaluation, causes=find_causes(evaluation, dataset, predictor, extras))


def _accounted(whole: Cause, causes: Sequence[Cause], num_weak: int) -> bool:
    """Whether a cause of the whole is only what causes of classes come to: wrong held-out truth, or a size at which many cannot be known."""
    kinds = Counter(cause.kind for cause in causes)
    if kinds["label noise"]:
        return True
    return (
        whole.kind == "learnt too little"
        and 2 * (kinds["small things"] + kinds["confused at borders"]) >= num_weak
    )


def find_weak_classes(evaluation: Evaluation) -> list[int]:
    """Return the ids of the weak classes, the weakest first."""
    scores = evaluation.scores
    weak = [
        entry
        for entry in scores.classes
        if entry.pixels
        and entry.iou < WEAK_IOU
        and entry.iou < max(ALWAYS_WEAK_IOU, scores.mean_iou)
    ]
    return [entry.id for entry in sorted(weak, key=lambda entry: entry.iou)]


def _look(
    evaluation: Evaluation,
    dataset: Dataset,
    predictor: Predictor,
    classes: list[int],
    asked: CountSettings,
) -> tuple[EvaluationContext, list[WeakClass]]:
    """Look at some pictures again, where the weak classes have their mistakes."""
    partners = {k: _partner(evaluation, k) for k in classes}
    sums: dict[int, ClassErrors] = {}
    fits = []
    size = (0, 0)
    for pair in _telling(evaluation, classes):
        sample = apply_ignore_mask(read_sample(pair, dataset), asked, str(pair.mask))
        size = (sample.label.shape[1], sample.label.shape[0])
        seen = predict_image(predictor, sample)
        for k in classes:
            found = measure_class_errors(seen, k, partners[k])
            sums[k] = sums[k] + found if k in sums else found
        fits.append(
            [measure_edge_alignment(sample.image, map_) for map_ in (sample.label, seen.prediction)]
        )
    sides = (
        _sides(evaluation, dataset, predictor, asked)
        if evaluation.split not in ("train", "all")
        else None
    )
    case = EvaluationContext(
        evaluation, dataset, predictor.runtime.description, size, _shift(fits), sides
    )
    names = predictor.classes.names
    return case, [
        WeakClass(k, names[k], partners[k], sums[k], _worst(evaluation, k, dataset))
        for k in classes
    ]


def _telling(evaluation: Evaluation, classes: Sequence[int]) -> list[Pair]:
    """Choose held-out pictures to look at again: in turn, for each class, the one with most of its mistakes."""
    orders = [_by_mistakes(evaluation, k) for k in classes]
    in_turn = dict.fromkeys(place for places in zip(*orders, strict=True) for place in places)
    return [
        evaluation.images[place].pair
        for place in list(in_turn)[: max(MIN_ERROR_IMAGES, len(evaluation.images) // 10)]
    ]


def _by_mistakes(evaluation: Evaluation, class_id: int) -> list[int]:
    """Order the pictures by their mistakes in a class, most first, the worst of each block before the second worst of any."""
    hits, true, called = evaluation.tallies[:, :, class_id].T
    wrong = true + called - 2 * hits
    order = np.argsort(-wrong, kind="stable").tolist()
    seen: Counter[int] = Counter()
    turns = {}
    for place in order:
        turns[place] = seen[evaluation.blocks[place]]
        seen[evaluation.blocks[place]] += 1
    return sorted(order, key=lambda place: (wrong[place] == 0, turns[place]))


def _worst(evaluation: Evaluation, class_id: int, dataset: Dataset) -> tuple[str, ...]:
    return tuple(
        pair_name(evaluation.images[place].pair, dataset.root)
        for place in _by_mistakes(evaluation, class_id)[:2]
    )


def _partner(evaluation: Evaluation, class_id: int) -> int:
    """Return the class with which a class is most often confused, either way."""
    swapped = evaluation.counts[class_id] + evaluation.counts[:, class_id]
    swapped[class_id] = -1
    return int(swapped.argmax())


def _sides(
    evaluation: Evaluation, dataset: Dataset, predictor: Predictor, asked: CountSettings
) -> SplitComparison | None:
    """Look at both sides of the split, and at how well the model does on training pictures."""
    pairs, num_held = dataset.of("train"), len(evaluation.images)
    if not pairs:
        return None
    counts = np.zeros_like(evaluation.counts)
    for pair in pick_evenly(pairs, max(MIN_TRAIN_IOU_IMAGES, num_held // 20)):
        sample = apply_ignore_mask(read_sample(pair, dataset), asked, str(pair.mask))
        counts += confusion(
            most_probable(predictor.logits(sample.image)), sample.label, len(predictor.classes)
        )
    ious = class_ious(np.stack([tally(counts), tally(evaluation.counts)]))
    common = ~np.isnan(ious).any(0)
    trained_iou, held_iou = ious[:, common].mean(1).tolist() if common.any() else (0.0, 0.0)
    trained = measure_split(
        dataset,
        pick_evenly(pairs, max(MIN_STATISTICS_IMAGES, min(num_held // 4, MAX_STATISTICS_IMAGES))),
    )
    held = measure_split(
        dataset, pick_evenly([image.pair for image in evaluation.images], MIN_STATISTICS_IMAGES)
    )
    return SplitComparison(trained, held, len(pairs), trained_iou, held_iou)


def _shift(fits: Sequence[Sequence[EdgeAlignment | None]]) -> tuple[int, int]:
    """Return by how much the masks would have to move to lie on edges as the predictions do; (0, 0) where that is not clear.

    Args:
        fits: of the mask and of the prediction, for each picture.
    """
    masks, predictions = (
        [one for one in part if one is not None] for part in zip(*fits, strict=True)
    )
    if not masks or not predictions:
        return 0, 0
    usual: EdgeAlignment = np.mean(masks, axis=0, dtype=np.float32)
    shift, other = (
        find_strongest_shift(usual),
        find_strongest_shift(np.mean(predictions, axis=0, dtype=np.float32)),
    )
    stronger = float(usual.max()) - 1 >= 1.3 * (
        float(usual[MAX_SHIFT_PIXELS, MAX_SHIFT_PIXELS]) - 1
    )  # as the doctor has it
    away = max(abs(shift[0] - other[0]), abs(shift[1] - other[1]))
    return (
        shift
        if away >= 2 and max(map(abs, shift)) >= 2 and stronger and shift_z_score(usual, shift) >= 6
        else (0, 0)
    )
