"""Monitor a training run: report each problem once, with its likely cause and a remedy.

Problems are recognised by comparison with values that need no tuning: the chance-level loss (of a
prediction that gives every pixel the class frequencies), the loss of the first steps, and the time
of a step. Runs of fewer than ``MIN_STEPS`` steps are not judged.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from useg.errors import MAX_NAMES, join_names
from useg.scoring.losses import Loss
from useg.scoring.metrics import Confusion

# Losses are compared as medians over this many steps: single batches differ too much.
WINDOW_STEPS = 20

# The trend of the loss is judged from this step on.
MIN_STEPS = 60

# Scores are judged after this share of the steps.
_LATE_SHARE = 0.7

# Data loading is the bottleneck if a step waits for its batch for this share of its time.
_MAX_WAIT_SHARE = 0.4

# A loss above this share of the chance-level loss means that nothing has been learned.
_NOT_LEARNED_SHARE = 0.95

# Up to this value of Cohen's kappa, two label maps agree at most "slightly" (Landis and Koch 1977
# use 0.2).
_MAX_CHANCE_KAPPA = 0.1

# A class with a lower IoU has not been learned; one with fewer validation pixels is not judged.
_MIN_LEARNED_IOU = 0.05
_MIN_CLASS_PIXELS = 20

# If one class covers this share of the predicted pixels, nothing else has been found.
_SINGLE_CLASS_SHARE = 0.995

# Overfitting: relative to chance level, the validation loss is this many times the training loss.
# The factor is 1 if both are learned equally well, and 8 or more for memorised training images.
_OVERFITTING_FACTOR = 4.0

# A class with a smaller share of the training pixels is rare.
_RARE_SHARE = 1e-3

# Kinds of notices, as scores.json stores them: programs read them, so they stay as they are.
# The first three explain every bad score, so they suppress notices about scores.
_DIVERGING = "loss rises"
_TOO_SLOW = "learns too slowly"
_CHANCE_LEVEL = "no better than a guess"
_SINGLE_CLASS = "one class for all"
_EXPLAIN_ALL = {_DIVERGING, _TOO_SLOW, _CHANCE_LEVEL}


@dataclass(frozen=True)
class Notice:
    """A problem of a run.

    Args:
        kind: A fixed term, such as ``"overfit"``.
        message: What was observed, and the likely cause.
        remedy: What to do.
    """

    kind: str
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}"


class Monitor:
    """Monitors a run; every check returns the new notices.

    Args:
        names: Names of the classes.
        shares: Each class's share of the training pixels, ``(K,)``.
        chance_loss: The chance-level loss (:func:`chance_level_loss`).
        num_steps: Number of steps of the run.
        cuts_on_device: Whether the samples lie in the memory of a GPU, which cuts the crops.
    """

    def __init__(
        self,
        names: Sequence[str],
        shares: NDArray[np.float64],
        chance_loss: float,
        num_steps: int,
        *,
        cuts_on_device: bool = False,
    ) -> None:
        self.names, self.shares = names, shares
        self.chance_loss, self.num_steps = chance_loss, num_steps
        self.cuts_on_device = cuts_on_device
        self.notices: dict[str, Notice] = {}
        # The classes that a notice has named as not learned.
        self._not_learned: set[int] = set()
        self._losses: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._waits: deque[tuple[float, float]] = deque(maxlen=WINDOW_STEPS)
        # Losses of the first 3 steps, at which hardly anything has been learned.
        self._initial: list[float] = []
        # Median losses: of the first steps, and the highest since.
        self._first = self._highest = float("nan")
        # Highest loss of any step.
        self._peak = 0.0

    def replay(self, losses: Sequence[float]) -> None:
        """Replay the log of a resumed run, so that it causes no notices again."""
        for step, loss in enumerate(losses, 1):
            self.check_step(step, loss, 1, 0)

    def check_classes(self) -> list[Notice]:
        """Check that most classes, and more than one, occur in the training masks."""
        missing = [name for name, share in zip(self.names, self.shares, strict=True) if not share]
        num_classes = len(self.names)
        num_found = num_classes - len(missing)
        if not missing or (num_found > 1 and (2 * len(missing) <= num_classes or num_classes < 3)):
            return []
        return self._add(
            Notice(
                "wrong number of classes",
                f"only {num_found} of {num_classes} classes occur in the training masks; missing: "
                f"{join_names(missing, MAX_NAMES)}",
                "check with useg inspect that classes.toml lists the classes of the masks, or move "
                "images that show the missing ones to the split train with a split.csv",
            )
        )

    def check_skipped(self, reasons: Sequence[str]) -> list[Notice]:
        """Check that all annotations could be read; ``reasons`` list what was skipped."""
        if not reasons:
            return []
        message, _, remedy = reasons[0].rpartition("; ")
        more = f" (and {len(reasons) - 1} more: useg inspect lists them)"
        return self._add(
            Notice(
                "annotations passed over",
                f"some annotations are left out: {message}{more if len(reasons) > 1 else ''}",
                remedy,
            )
        )

    def check_step(self, step: int, loss: float, seconds: float, waited: float) -> list[Notice]:
        """Check a step, from 1: its loss, its time, and how long it waited for its batch."""
        self._losses.append(loss)
        self._initial += [loss] if len(self._initial) < 3 else []
        self._waits.append((waited, seconds))
        self._peak = max(self._peak, loss)
        if len(self._losses) < WINDOW_STEPS:
            return []
        level = float(np.median(self._losses))
        if np.isnan(self._first):
            self._first = self._highest = level
        self._highest = max(self._highest, level)
        return self._check_waiting() + (self._check_loss(step, level) if step >= MIN_STEPS else [])

    def _check_waiting(self) -> list[Notice]:
        share = float(np.median([waited / max(seconds, 1e-9) for waited, seconds in self._waits]))
        if share < _MAX_WAIT_SHARE:
            return []
        return self._add(_explain_waiting(share, self.cuts_on_device))

    def _check_loss(self, step: int, level: float) -> list[Notice]:
        initial, chance = float(np.median(self._initial)), self.chance_loss
        learned_nothing = level > _NOT_LEARNED_SHARE * chance
        rose = self._highest > 1.15 * initial and self._highest > 1.2 * chance
        jumped = self._peak > 2.5 * max(initial, chance) and learned_nothing
        if rose or jumped:
            top = self._highest if rose else self._peak
            return self._add(_explain_divergence(initial, top, chance))
        is_early = 2 * step < self.num_steps
        if is_early or _DIVERGING in self.notices or level < _NOT_LEARNED_SHARE * chance:
            return []
        if level > 0.95 * self._first:
            return self._add(_explain_slow_learning(self._first, level))
        # If one class covers nearly everything, the chance level is high: the validation decides.
        if self.shares.max() > 0.9:
            return []
        return self._add(
            _explain_chance_level(
                f"after half of the steps the loss is {level:.3g}; predicting the class "
                f"frequencies everywhere gives {chance:.3g}"
            )
        )

    def check_memory(self, num_parts: int, accumulate: int) -> list[Notice]:
        """Check whether batches are computed in more parts than ``train.accumulate`` says."""
        if num_parts <= accumulate:
            return []
        return self._add(
            Notice(
                "too little memory",
                "a batch does not fit into memory; from now on it is computed in "
                f"{num_parts} parts",
                f"set train.accumulate = {num_parts}, or choose a smaller train.batch or data.crop",
            )
        )

    def check_validation(self, step: int, counts: Confusion, loss: float | None) -> list[Notice]:
        """Check a validation.

        Args:
            step: The step after which it happened.
            counts: Confusion counts ``(K, K)``, rows are the truth.
            loss: Cross-entropy; None if every pixel is ignored.
        """
        is_early = step < max(MIN_STEPS, _LATE_SHARE * self.num_steps)
        if is_early or self.notices.keys() & _EXPLAIN_ALL:
            return []
        found = self._add(_find_single_class(counts, self.names, self.shares))
        if not found and _SINGLE_CLASS not in self.notices:
            found = self._add(_find_chance_agreement(counts))
        if not found and loss is not None and self._losses:
            training = float(np.median(self._losses)) / self.chance_loss
            found = self._add(_find_overfitting(training, loss, self.shares))
        if found or self.notices.keys() & {_SINGLE_CLASS, *_EXPLAIN_ALL}:
            return found
        # Each class is named once.
        missed = [k for k in _find_missed_classes(counts) if k not in self._not_learned]
        self._not_learned.update(missed)
        explained = _explain_missed_classes(missed, counts, self.names, self.shares)
        return [new for notice in explained for new in self._add(notice)]

    def _add(self, notice: Notice | None) -> list[Notice]:
        """Keep a notice, and return it if it is new."""
        if notice is None or notice.kind in self.notices:
            return []
        self.notices[notice.kind] = notice
        return [notice]


def _explain_waiting(share: float, cuts_on_device: bool) -> Notice:
    waits = f"{100 * share:.0f} % of each step is spent waiting for the batch"
    if cuts_on_device:
        return Notice(
            "waiting for pictures",
            f"the GPU is partly idle: {waits}, because the CPU cuts the crops too slowly",
            "use the time for larger images or a larger network, or set train.augment = false",
        )
    return Notice(
        "waiting for pictures",
        f"data loading is the bottleneck: {waits}",
        "put the cache on a faster disk (USEG_CACHE), set train.augment = false, or use the "
        "time for a larger network",
    )


def _explain_divergence(initial: float, top: float, chance: float) -> Notice:
    return Notice(
        _DIVERGING,
        f"training diverges: the loss rose from {initial:.3g} to {top:.3g} (chance level: "
        f"{chance:.3g}), because the learning rate is too high",
        "set train.learning_rate to a tenth",
    )


def _explain_slow_learning(first: float, level: float) -> Notice:
    return Notice(
        _TOO_SLOW,
        f"the loss hardly decreases: it is {level:.3g} after half of the steps and was "
        f"{first:.3g} at the beginning, because the learning rate is too low",
        "set train.learning_rate to ten times its value",
    )


def _explain_chance_level(evidence: str) -> Notice:
    return Notice(
        _CHANCE_LEVEL,
        f"the model is at chance level: {evidence}; the masks probably belong to other images",
        "compare some pairs with useg inspect DATA --html page.html, and check how images and "
        "masks are paired",
    )


def _find_single_class(
    counts: Confusion, names: Sequence[str], shares: NDArray[np.float64]
) -> Notice | None:
    total = max(1, counts.sum())
    predicted, true = counts.sum(0) / total, counts.sum(1) / total
    k = int(predicted.argmax())
    is_truth = true[k] > 0.5 + 0.5 * predicted[k] - 0.001
    if predicted[k] < _SINGLE_CLASS_SHARE or is_truth:
        return None
    return Notice(
        _SINGLE_CLASS,
        f"the model predicts {names[k]} for {100 * predicted[k]:.1f} % of the validation "
        f"pixels ({100 * shares[k]:.0f} % of the training pixels): the other classes are "
        "so rare that the loss ignores them",
        'set train.class_weights = sqrt and train.loss = "ce + dice", or train longer',
    )


def _find_chance_agreement(counts: Confusion) -> Notice | None:
    """Compare the accuracy with agreement by chance (Cohen 1960).

    The training loss alone does not show it: a network that memorises training images has a loss
    below chance level.
    """
    total = max(1, int(counts.sum()))
    accuracy = np.trace(counts) / total
    chance = float((counts.sum(0) / total) @ (counts.sum(1) / total))
    kappa = (accuracy - chance) / max(1e-9, 1 - chance)
    if kappa > _MAX_CHANCE_KAPPA:
        return None
    return _explain_chance_level(
        f"{100 * accuracy:.0f} % of the validation pixels are correct, and "
        f"{100 * chance:.0f} % would be correct by chance"
    )


def _find_overfitting(training: float, loss: float, shares: NDArray[np.float64]) -> Notice | None:
    """Compare training and validation loss, each relative to its chance level.

    The two need not be losses of the same kind.

    Args:
        training: The training loss as a share of its chance level.
        loss: The validation's cross-entropy.
        shares: Each class's share of the training pixels, ``(K,)``.
    """
    counted = shares[shares > 0]
    chance_cross_entropy = float(-(counted * np.log(counted)).sum())
    if not chance_cross_entropy:
        return None
    validation = loss / chance_cross_entropy
    if validation < _OVERFITTING_FACTOR * training:
        return None
    return Notice(
        "overfit",
        f"overfitting: the training loss is down to {100 * training:.1f} % of chance level, "
        f"the validation loss only to {100 * validation:.1f} %",
        "use more training images, train.augment = true, a smaller model.width or fewer steps; "
        "the model with the best validation score is kept",
    )


def _find_missed_classes(counts: Confusion) -> list[int]:
    num_true, correct = counts.sum(1), counts.diagonal()
    union = num_true + counts.sum(0) - correct
    is_missed = (num_true >= _MIN_CLASS_PIXELS) & (correct <= _MIN_LEARNED_IOU * union)
    missed: list[int] = np.flatnonzero(is_missed).tolist()
    return missed


def _explain_missed_classes(
    classes: Sequence[int], counts: Confusion, names: Sequence[str], shares: NDArray[np.float64]
) -> Iterator[Notice]:
    """Yield one notice for each likely cause: not in the training masks, rare, or too alike."""
    others = counts.copy()
    np.fill_diagonal(others, -1)
    instead = [names[k] for k in others.argmax(1)]

    def hardly_found(classes: Sequence[int]) -> str:
        by_answer: dict[str, list[str]] = {}
        for k in classes:
            by_answer.setdefault(instead[k], []).append(names[k])
        found = [
            f"{join_names(each, MAX_NAMES)} (it predicts {other})"
            for other, each in by_answer.items()
        ]
        return f"the model hardly ever finds {', '.join(found)}"

    def it(classes: Sequence[int]) -> str:
        return "it" if len(classes) == 1 else "them"

    def never_learned(classes: Sequence[int], message: str, remedy: str) -> Notice:
        return Notice(f"never learned: {', '.join(names[k] for k in classes)}", message, remedy)

    if absent := [k for k in classes if not shares[k]]:
        yield never_learned(
            absent,
            f"no training mask shows {join_names([names[k] for k in absent], MAX_NAMES)}, "
            f"but validation masks do, so the model cannot learn {it(absent)}",
            "move images with such classes to training in split.csv, or label some",
        )
    if rare := [k for k in classes if 0 < shares[k] < _RARE_SHARE]:
        percent = join_names([f"{100 * shares[k]:.2f} %" for k in rare], MAX_NAMES)
        yield never_learned(
            rare,
            f"{hardly_found(rare)}: only {percent} of the training pixels show {it(rare)}",
            "label more images with rare classes, or set a smaller data.crop so that they "
            "fill more of a crop",
        )
    if confused := [k for k in classes if shares[k] >= _RARE_SHARE]:
        yield never_learned(
            confused,
            f"{hardly_found(confused)}: at this image size, the network may not be able to tell "
            "such classes apart",
            "set a larger data.size, train longer, or check the masks with useg inspect",
        )


def chance_level_loss(
    loss: Loss, target: Tensor, shares: NDArray[np.float64], weights: Tensor | None
) -> float:
    """Return the loss of predicting the class frequencies for every pixel.

    Args:
        loss: The loss.
        target: Class ids ``(N, h, w)``.
        shares: Class frequencies, ``(K,)``.
        weights: Class weights of the loss, ``(K,)``, or None. With weights, the better of two
            predictions counts: the frequencies as they are, or multiplied by the weights.
    """
    plain = torch.tensor(np.maximum(shares, 1e-6), dtype=torch.float32, device=target.device)
    chances = [plain] if weights is None else [plain, plain * weights.clamp(min=1e-6)]
    shape = (target.shape[0], len(shares), *target.shape[1:])
    with torch.no_grad():
        return min(
            float(loss((each / each.sum()).log()[None, :, None, None].expand(shape), target))
            for each in chances
        )
