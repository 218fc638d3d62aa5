"""Logits + true ids -> one number to make smaller."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from useg.classes import IGNORE
from useg.errors import choose

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sparse categorical cross-entropy, pixel by pixel: the mean of ``-log softmax(logits)[target]``.

    "Sparse" means that the truth is one integer per pixel, not K zeros and ones. Computed in fp32 whatever the logits' type.

    Args:
        logits: ``(N, K, h, w)``, any float type.
        target: ``(N, h, w)`` int64 ids 0..K-1; ``IGNORE`` (255) does not count.
        weight: ``(K,)``, how much a pixel of each class counts; the mean is weighted accordingly.

    Returns:
        Scalar fp32 tensor; 0 with zero gradients when every pixel is ignored.

    >>> import torch
    >>> round(cross_entropy(torch.zeros(1, 4, 1, 1), torch.tensor([[[2]]])).item(), 4)  # log 4
    1.3863
    """
    logits = logits.float()
    total = F.cross_entropy(logits, target, weight, ignore_index=IGNORE, reduction="sum")
    counted = target != IGNORE
    if weight is None:
        return total / counted.sum().clamp(min=1)
    return total / (weight[target.clamp(max=len(weight) - 1)] * counted).sum().clamp(min=1e-12)


def dice(logits: Tensor, target: Tensor) -> Tensor:
    """Soft Dice loss: one minus the mean, over the classes in the batch's truth, of ``2 sum(p t) / (sum(p) + sum(t))``.

    Every class counts the same however few its pixels are, which cross-entropy does not give. (Milletari, Navab, Ahmadi 2016,
    V-Net, with p in place of its square.)

    Args:
        logits: ``(N, K, h, w)``, any float type.
        target: ``(N, h, w)`` int64 ids 0..K-1; ``IGNORE`` (255) does not count.

    Returns:
        Scalar fp32 tensor, 0 to 1; 0 with zero gradients when every pixel is ignored.
    """
    counted = (target != IGNORE).unsqueeze(1)
    chances = logits.float().softmax(1) * counted
    own = target.clamp(max=logits.shape[1] - 1).unsqueeze(1)
    hits = chances.new_zeros(logits.shape[1]).scatter_add(0, own.flatten(), (chances.gather(1, own)).flatten())
    truth = chances.new_zeros(logits.shape[1]).scatter_add(0, own.flatten(), counted.flatten().to(chances.dtype))
    scores = 2 * hits / (chances.sum((0, 2, 3)) + truth).clamp(min=1e-6)
    present = truth > 0
    return ((1 - scores) * present).sum() / present.sum().clamp(min=1)


def make_loss(name: str, weight: Tensor | None = None) -> Loss:
    """Make a loss by name: ``"ce"``, ``"dice"``, or a sum such as ``"ce + dice"``; ``weight`` is cross-entropy's.

    Raises:
        UsageError: an unknown name.
    """
    terms = [choose("train.loss", part.strip(), LOSSES)(weight) for part in name.split("+")]

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        total = terms[0](logits, target)
        for term in terms[1:]:
            total = total + term(logits, target)
        return total

    return loss


def _weighted_cross_entropy(weight: Tensor | None) -> Loss:
    return lambda logits, target: cross_entropy(logits, target, weight)


LOSSES: dict[str, Callable[[Tensor | None], Loss]] = {"ce": _weighted_cross_entropy, "dice": lambda weight: dice}
