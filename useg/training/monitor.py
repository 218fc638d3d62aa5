"""Watches a training run: what goes wrong, the likely cause, and what to do; each printed once.

Problems are recognised by comparison with values that need no tuning: the chance-level loss (of a
prediction that gives every pixel the class frequencies), the loss of the first steps, and the time
of a step. Runs of fewer than ``MIN_STEPS`` steps are not judged.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
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

# The course of the loss is judged from this step on.
MIN_STEPS = 60

# Scores are judged after this share of the steps.
_LATE_SHARE = 0.7

# Data loading is the bottleneck if a step waits for its batch for this share of its time.
_MAX_WAIT_SHARE = 0.4

# A loss above this share of the chance-level loss means that nothing has been learned.
_NOT_LEARNED_SHARE = 0.95

# Up to this value of Cohen's kappa two label maps agree "slightly" at most (Landis and Koch 1977
# draw that line at 0.2).
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
# The first three explain every bad score, so nothing is said about scores then.
_DIVERGING = "loss rises"
_TOO_SLOW = "learns too slowly"
_CHANCE_LEVEL = "no better than a guess"
_SINGLE_CLASS = "one class for all"
_EXPLAIN_ALL = {_DIVERGING, _TOO_SLOW, _CHANCE_LEVEL}


@dataclass(frozen=True)
class Notice:
    """Something that goes wrong in a run.

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
    """Watches a run; every check returns the notices that are new.

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
        # The classes of which a notice says that they are not learned.
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
        """Take in the steps of a run that continues; they cause no new notices later."""
        for step, loss in enumerate(losses, 1):
            self.check_step(step, loss, 1, 0)

    def check_classes(self) -> list[Notice]:
        """Check that most classes occur in the training masks."""
        missing = [name for name, share in zip(self.names, self.shares, strict=True) if not share]
        num_classes = len(self.names)
        if 2 * len(missing) <= num_classes or num_classes < 3:
            return []
        return self._add(
            "wrong number of classes",
            f"only {num_classes - len(missing)} of {num_classes} classes occur in the training "
            f"masks; missing: {join_names(missing, MAX_NAMES)}",
            "run useg inspect and check that classes.toml lists the classes of the masks",
        )

    def check_passed_over(self, reasons: Sequence[str]) -> list[Notice]:
        """Check that all annotations could be read; ``reasons`` say what was passed over."""
        if not reasons:
            return []
        message, _, remedy = reasons[0].rpartition("; ")
        more = f" (and {len(reasons) - 1} more: useg inspect lists them)"
        return self._add(
            "annotations passed over",
            f"{message}{more if len(reasons) > 1 else ''}: this is passed over",
            remedy,
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
        waits = f"{100 * share:.0f} % of each step is spent waiting for the batch"
        if self.cuts_on_device:
            return self._add(
                "waiting for pictures",
                f"the GPU is not busy: {waits}, whose crops the processor draws",
                "use the time for larger images or a larger network, or set train.augment = false",
            )
        return self._add(
            "waiting for pictures",
            f"data loading is the bottleneck: {waits}",
            "put the cache on a faster disk (USEG_CACHE), set train.augment = false, or use the "
            "time for a larger network",
        )

    def _check_loss(self, step: int, level: float) -> list[Notice]:
        initial, chance = float(np.median(self._initial)), self.chance_loss
        learned_nothing = level > _NOT_LEARNED_SHARE * chance
        rose = self._highest > 1.15 * initial and self._highest > 1.2 * chance
        jumped = self._peak > 2.5 * max(initial, chance) and learned_nothing
        if rose or jumped:
            top = self._highest if rose else self._peak
            return self._add(
                _DIVERGING,
                f"training diverges: the loss rose from {initial:.3g} to {top:.3g} (chance level: "
                f"{chance:.3g}), because the learning rate is too high",
                "set train.learning_rate to a tenth",
            )
        is_early = 2 * step < self.num_steps
        if is_early or _DIVERGING in self.notices or level < _NOT_LEARNED_SHARE * chance:
            return []
        if level > 0.95 * self._first:
            return self._add(
                _TOO_SLOW,
                f"the loss hardly falls: it is {level:.3g} after half of the steps and was "
                f"{self._first:.3g} at the beginning, because the learning rate is too low",
                "set train.learning_rate to ten times its value",
            )
        # If one class covers nearly everything, chance level is good: the validation decides.
        if self.shares.max() > 0.9:
            return []
        return self._add_chance_level(
            f"after half of the steps the loss is {level:.3g}; predicting the class frequencies "
            f"everywhere gives {chance:.3g}"
        )

    def _add_chance_level(self, evidence: str) -> list[Notice]:
        return self._add(
            _CHANCE_LEVEL,
            f"the model is at chance level: {evidence}; the masks probably belong to other images",
            "compare some pairs with useg inspect DATA --html page.html, and check how images and "
            "masks are paired",
        )

    def check_memory(self, num_parts: int, accumulate: int) -> list[Notice]:
        """Check whether batches are computed in more parts than ``train.accumulate`` says."""
        if num_parts <= accumulate:
            return []
        return self._add(
            "too little memory",
            f"a batch does not fit into memory; from now on it is computed in {num_parts} parts",
            f"set train.accumulate = {num_parts}, or choose a smaller train.batch or data.crop",
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
        found = (
            self._check_single_class(counts)
            or self._check_agreement(counts)
            or self._check_overfitting(loss)
        )
        if found or self.notices.keys() & {_SINGLE_CLASS, *_EXPLAIN_ALL}:
            return found
        return self._check_classes_learned(counts)

    def _check_single_class(self, counts: Confusion) -> list[Notice]:
        total = max(1, counts.sum())
        predicted, true = counts.sum(0) / total, counts.sum(1) / total
        k = int(predicted.argmax())
        is_truth = true[k] > 0.5 + 0.5 * predicted[k] - 0.001
        if predicted[k] < _SINGLE_CLASS_SHARE or is_truth:
            return []
        return self._add(
            _SINGLE_CLASS,
            f"the model predicts {self.names[k]} for {100 * predicted[k]:.1f} % of the validation "
            f"pixels ({100 * self.shares[k]:.0f} % of the training pixels): the other classes are "
            "so rare that the loss ignores them",
            'set train.class_weights = sqrt and train.loss = "ce + dice", or train longer',
        )

    def _check_agreement(self, counts: Confusion) -> list[Notice]:
        """Compare the accuracy with agreement by chance (Cohen 1960).

        The training loss alone does not show it: a network that memorises training images has a
        loss below chance level.
        """
        total = max(1, int(counts.sum()))
        accuracy = np.trace(counts) / total
        chance = float((counts.sum(0) / total) @ (counts.sum(1) / total))
        kappa = (accuracy - chance) / max(1e-9, 1 - chance)
        if kappa > _MAX_CHANCE_KAPPA or _SINGLE_CLASS in self.notices:
            return []
        return self._add_chance_level(
            f"{100 * accuracy:.0f} % of the validation pixels are correct, and "
            f"{100 * chance:.0f} % would be correct by chance"
        )

    def _check_overfitting(self, loss: float | None) -> list[Notice]:
        """Compare training and validation loss, each relative to its chance level.

        The two need not be losses of the same kind.
        """
        counted = self.shares[self.shares > 0]
        chance_cross_entropy = float(-(counted * np.log(counted)).sum())
        if loss is None or not chance_cross_entropy or not self._losses:
            return []
        validation = loss / chance_cross_entropy
        training = float(np.median(self._losses)) / self.chance_loss
        if validation < _OVERFITTING_FACTOR * training:
            return []
        return self._add(
            "overfit",
            f"overfitting: the training loss is down to {100 * training:.1f} % of chance level, "
            f"the validation loss only to {100 * validation:.1f} %",
            "use more training images, train.augment = true, a smaller model.width or fewer steps; "
            "the model with the best validation score is kept",
        )

    def _check_classes_learned(self, counts: Confusion) -> list[Notice]:
        num_true, correct = counts.sum(1), counts.diagonal()
        union = num_true + counts.sum(0) - correct
        is_missed = (num_true >= _MIN_CLASS_PIXELS) & (correct <= _MIN_LEARNED_IOU * union)
        # Each class is named once.
        classes = [k for k in np.flatnonzero(is_missed).tolist() if k not in self._not_learned]
        self._not_learned.update(classes)
        absent = [k for k in classes if not self.shares[k]]
        rare = [k for k in classes if 0 < self.shares[k] < _RARE_SHARE]
        confused = [k for k in classes if self.shares[k] >= _RARE_SHARE]
        return [*self._explain_absent(absent), *self._explain_hardly_found(rare, confused, counts)]

    def _explain_absent(self, classes: Sequence[int]) -> list[Notice]:
        return self._add_classes(
            classes,
            f"no training mask shows {join_names([self.names[k] for k in classes], MAX_NAMES)}, "
            "but validation masks do: what is never shown cannot be learned",
            "move images with such classes to training in split.csv, or label some",
        )

    def _explain_hardly_found(
        self, rare: Sequence[int], confused: Sequence[int], counts: Confusion
    ) -> list[Notice]:
        others = counts.copy()
        np.fill_diagonal(others, -1)
        instead = [self.names[k] for k in others.argmax(1)]

        def hardly_found(classes: Sequence[int]) -> str:
            names: dict[str, list[str]] = {}
            for k in classes:
                names.setdefault(instead[k], []).append(self.names[k])
            found = [
                f"{join_names(each, MAX_NAMES)} (it predicts {other})"
                for other, each in names.items()
            ]
            return f"the model hardly ever finds {', '.join(found)}"

        shares = join_names([f"{100 * self.shares[k]:.2f} %" for k in rare], MAX_NAMES)
        return [
            *self._add_classes(
                rare,
                f"{hardly_found(rare)}: only {shares} of the training pixels show it",
                "label more images with rare classes, or set a smaller data.crop so that they "
                "fill more of a crop",
            ),
            *self._add_classes(
                confused,
                f"{hardly_found(confused)}: at this image size the network cannot tell such "
                "classes apart",
                "set a larger data.size, train longer, or check the masks with useg inspect",
            ),
        ]

    def _add_classes(self, classes: Sequence[int], message: str, remedy: str) -> list[Notice]:
        names = ", ".join(self.names[k] for k in classes)
        return self._add(f"never learned: {names}", message, remedy) if classes else []

    def _add(self, kind: str, message: str, remedy: str) -> list[Notice]:
        if kind in self.notices:
            return []
        self.notices[kind] = Notice(kind, message, remedy)
        return [self.notices[kind]]


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
