"""Logits + true ids -> one number to make smaller."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from useg.classes import IGNORE


def cross_entropy(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sparse categorical cross-entropy, pixel by pixel: the mean of ``-log softmax(logits)[target]``.

    "Sparse" means that the truth is one integer per pixel, not K zeros and ones. Computed in fp32 whatever the logits' type.

    Args:
        logits: ``(N, K, h, w)``, any float type.
        target: ``(N, h, w)`` int64 ids 0..K-1; ``IGNORE`` (255) does not count.
        weight: ``(K,)``, how much a pixel of each class counts; the mean is weighted accordingly.

    Returns:
        Scalar fp32 tensor; 0 with zero gradients when every pixel is ignored.

    >>> round(cross_entropy(torch.zeros(1, 4, 1, 1), torch.tensor([[[2]]])).item(), 4)  # log 4
    1.3863
    """
    logits = logits.float()
    total = F.cross_entropy(logits, target, weight, ignore_index=IGNORE, reduction="sum")
    counted = target != IGNORE
    if weight is None:
        return total / counted.sum().clamp(min=1)
    return total / (weight[target.clamp(max=len(weight) - 1)] * counted).sum().clamp(min=1e-12)
