"""The course of a run -> what goes wrong in it, why, and what would help: each told once.

The thresholds compare with what needs no tuning: the loss of a guess that says of every pixel how common each class is, the loss of the
first steps, and the time of a step. A run of a few steps is not judged.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from useg.scoring.losses import Loss
from useg.scoring.metrics import Confusion

WINDOW_STEPS = 20  # steps whose median loss is compared: single batches differ too much


ENOUGH_STEPS = 60  # steps before which nothing is said of the course of the loss


_WAITING = 0.4  # share of the time that may pass in waiting for pictures


_NO_BETTER = (
    0.95  # of the guess's loss: what is less than 5 % below it has learnt nothing from the pictures
)


_COURSE = {
    "loss rises",
    "learns too slowly",
    "no better than a guess",
}  # these explain every bad score


_LATE = 0.7  # of the steps, from which a score is judged


_CHANCE = 0.1  # Cohen's kappa up to which two label maps agree "slightly" at most (Landis and Koch 1977 have 0.2)


_NEVER = 0.05  # IoU below which a class counts as not learned


_ONE_CLASS = 0.995  # share of the pixels called one class from which nothing else counts as found


_GAP = 4.0  # times as far as training pictures may held-out ones be from a loss of 0, a guess's being 1; 1 where both are learnt, 8 and more by heart


_FEW = 1e-3  # share of the training pixels below which a class is rare: 1 in 1,000


@dataclass(frozen=True)
class Notice:
    """Something that goes wrong: ``kind`` is a fixed term, ``message`` says what and why, ``remedy`` what to do."""

    kind: str
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}"


class Monitor:
    """Looks at a run while it goes on.

    Args:
        names: of the classes.
        shares: of the classes among the training pixels, ``(K,)``.
        guess: loss of a guess, as :func:`guess_loss` computes it.
        steps: of the whole run.
    """

    def __init__(
        self, names: Sequence[str], shares: NDArray[np.float64], guess: float, steps: int
    ) -> None:
        self.names, self.shares, self.guess, self.steps = names, shares, guess, steps
        self.told: dict[str, Notice] = {}
        self.losses: deque[float] = deque(maxlen=WINDOW_STEPS)
        self.waits: deque[tuple[float, float]] = deque(maxlen=WINDOW_STEPS)
        self.untouched: list[
            float
        ] = []  # losses of the first 3 steps, which hardly anything was learnt before
        self.first = self.highest = float(
            "nan"
        )  # median losses: of the first steps, the most since
        self.peak = 0.0  # highest loss of any step

    def replay(self, losses: Sequence[float]) -> None:
        """Take up a run that goes on: nothing of its past is told again."""
        for step, loss in enumerate(losses, 1):
            self.step(step, loss, 1, 0)

    def start(self) -> list[Notice]:
        """Look at the training masks."""
        missing = [name for name, share in zip(self.names, self.shares, strict=True) if not share]
        if 2 * len(missing) <= len(self.names) or len(self.names) < 3:
            return []
        return self._tell(
            "wrong number of classes",
            f"of {len(self.names)} classes only {len(self.names) - len(missing)} occur in the training masks (not: {_listed(missing)})",
            "check that classes.toml lists what the masks hold, with useg inspect",
        )

    def step(self, step: int, loss: float, seconds: float, waited: float) -> list[Notice]:
        """Look at a step, from 1: its loss, how long it took, and how much of that it waited for its pictures."""
        self.losses.append(loss)
        self.untouched += [loss] if len(self.untouched) < 3 else []
        self.waits.append((waited, seconds))
        self.peak = max(self.peak, loss)
        if len(self.losses) < WINDOW_STEPS:
            return []
        level = float(np.median(self.losses))
        if np.isnan(self.first):
            self.first = self.highest = level
        self.highest = max(self.highest, level)
        return self._waits() + (self._course(step, level) if step >= ENOUGH_STEPS else [])

    def _waits(self) -> list[Notice]:
        share = float(np.median([waited / max(seconds, 1e-9) for waited, seconds in self.waits]))
        if share < _WAITING:
            return []
        return self._tell(
            "waiting for pictures",
            f"{share:.0%} of a step is spent waiting for its pictures: cutting and changing them takes longer than the network",
            "put the cache on a faster disk (USEG_CACHE), leave train.augment out, or take the larger network that is free here",
        )

    def _course(self, step: int, level: float) -> list[Notice]:
        untouched = float(np.median(self.untouched))
        higher = self.highest > 1.15 * untouched and self.highest > 1.2 * self.guess
        dead = (
            self.peak > 2.5 * max(untouched, self.guess) and level > _NO_BETTER * self.guess
        )  # it jumped, and learnt nothing since
        if higher or dead:
            top = self.highest if higher else self.peak
            return self._tell(
                "loss rises",
                f"the loss has risen from {untouched:.3g} to {top:.3g} (a guess has {self.guess:.3g}): the learning rate is too high",
                "set train.learning_rate to a tenth",
            )
        if 2 * step < self.steps or "loss rises" in self.told or level < _NO_BETTER * self.guess:
            return []
        if level > 0.95 * self.first:
            return self._tell(
                "learns too slowly",
                f"after half of the steps the loss is {level:.3g}, at the beginning it was {self.first:.3g}: the learning rate is too low",
                "set train.learning_rate to ten times as much",
            )
        if self.shares.max() > 0.9:  # then a guess is good: see what validation says
            return []
        return self._guessed(
            f"after half of the steps the loss is {level:.3g}, as that of a guess that does not look at them ({self.guess:.3g})"
        )

    def _guessed(self, evidence: str) -> list[Notice]:
        return self._tell(
            "no better than a guess",
            f"the pictures tell the network nothing of the masks: {evidence}; the masks seem not to belong to the pictures",
            "look at some pairs with useg inspect DATA --html page.html, and check how images and masks are matched",
        )

    def memory(self, parts: int) -> list[Notice]:
        """Say that a batch did not fit into memory, and is computed in ``parts``."""
        return self._tell(
            "too little memory",
            f"a batch does not fit into memory at once, and is computed in {parts} parts from now on",
            f"set train.accumulate = {parts} to begin so, or choose a smaller train.batch or data.crop",
        )

    def validated(self, step: int, counts: Confusion, loss: float | None) -> list[Notice]:
        """Look at a scoring of the held-out pictures: confusion counts ``(K, K)``, rows = truth, and their cross-entropy if any counts."""
        if step < max(ENOUGH_STEPS, _LATE * self.steps) or self.told.keys() & _COURSE:
            return []
        found = self._one_class(counts) or self._chance(counts) or self._overfit(loss)
        return found or (
            []
            if self.told.keys() & {"one class for all", *_COURSE}
            else self._never_learned(counts)
        )

    def _one_class(self, counts: Confusion) -> list[Notice]:
        said, true = counts.sum(0) / max(1, counts.sum()), counts.sum(1) / max(1, counts.sum())
        k = int(said.argmax())
        if (
            said[k] < _ONE_CLASS or true[k] > 0.5 + 0.5 * said[k] - 0.001
        ):  # the truth itself is nearly all that class
            return []
        return self._tell(
            "one class for all",
            f"{said[k]:.1%} of the held-out pixels are called {self.names[k]}, which is {self.shares[k]:.0%} of the training pixels: "
            "the other classes are too rare for the loss to pay for finding them",
            'set train.class_weights = sqrt and train.loss = "ce + dice", or train longer',
        )

    def _chance(self, counts: Confusion) -> list[Notice]:
        """Compare with an agreement by chance (Cohen 1960): a network that learns training pictures by heart has a loss better than a guess's."""
        total = max(1, int(counts.sum()))
        agree, chance = (
            np.trace(counts) / total,
            float((counts.sum(0) / total) @ (counts.sum(1) / total)),
        )
        kappa = (agree - chance) / max(1e-9, 1 - chance)
        if kappa > _CHANCE or self.told.keys() & {"one class for all"}:
            return []
        return self._guessed(
            f"on held-out pictures {agree:.0%} of the pixels are right, and {chance:.0%} would be by chance"
        )

    def _never_learned(self, counts: Confusion) -> list[Notice]:
        found: list[Notice] = []
        for k, name in enumerate(self.names):
            true = int(counts[k].sum())
            if true < 20 or counts[k, k] > _NEVER * (true + counts[:, k].sum() - counts[k, k]):
                continue
            if not self.shares[k]:
                found += self._tell(
                    f"never learned: {name}",
                    f"{name} is in the held-out masks but in no training mask, so it cannot be learned",
                    "move images that show it to training with a split.csv, or label some",
                )
                continue
            other = self.names[
                int(np.delete(counts[k], k).argmax() + (np.delete(counts[k], k).argmax() >= k))
            ]
            few = self.shares[k] < _FEW
            why = (
                f"it has {self.shares[k]:.2%} of the training pixels"
                if few
                else f"it looks like {other} at this size to this network"
            )
            remedy = (
                "label more pictures that show it, or crop closer (data.crop) so that it fills more of a crop"
                if few
                else "look at it at a larger data.size, train longer, or check its masks with useg inspect"
            )
            found += self._tell(
                f"never learned: {name}",
                f"{name} is hardly ever found, and called {other} instead: {why}",
                remedy,
            )
        return found

    def _overfit(self, loss: float | None) -> list[Notice]:
        """Compare training and held-out pictures, each with a guess: the two losses need not be of one kind."""
        counted = self.shares[self.shares > 0]
        entropy = float(-(counted * np.log(counted)).sum())  # a guess's cross-entropy
        if loss is None or not entropy or not self.losses:
            return []
        there, here = loss / entropy, float(np.median(self.losses)) / self.guess
        if there < _GAP * here:
            return []
        return self._tell(
            "overfit",
            f"the loss of the training pictures is down to {here:.1%} of a guess's, that of the held-out pictures to {there:.1%}: "
            "the network learns the training pictures by heart",
            "give it more training pictures, train.augment = true, a smaller model.width, or fewer steps; the model of the best score is kept",
        )

    def _tell(self, kind: str, message: str, remedy: str) -> list[Notice]:
        if kind in self.told:
            return []
        self.told[kind] = Notice(kind, message, remedy)
        return [self.told[kind]]


def chance_level_loss(
    loss: Loss, target: Tensor, shares: NDArray[np.float64], weights: Tensor | None
) -> float:
    """Return the loss of a guess that gives every pixel of a batch ``(N, h, w)`` the classes' shares, as they are or weighted as the loss does."""
    plain = torch.tensor(np.maximum(shares, 1e-6), dtype=torch.float32, device=target.device)
    chances = [plain] if weights is None else [plain, plain * weights.clamp(min=1e-6)]
    shape = (target.shape[0], len(shares), *target.shape[1:])
    with torch.no_grad():
        return min(
            float(loss((each / each.sum()).log()[None, :, None, None].expand(shape), target))
            for each in chances
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
