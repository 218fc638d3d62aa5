"""Logits + true ids -> one number to make smaller: sparse categorical cross-entropy and its relatives.

All take logits ``(N, K, h, w)`` of any float type and compute in fp32; pixels whose truth is ``IGNORE`` do not count, and a batch in
which none counts gives 0 with zero gradients. Where several processes train together, the batch is that of all of them: what is summed over
pixels is summed over processes too (but Lovasz, which sorts pixels, is computed in each and averaged).
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from useg.classes import IGNORE
from useg.distributed import all_reduce_sum, all_reduce_with_gradient, world_size
from useg.errors import UsageError, choose

Loss = Callable[[Tensor, Tensor], Tensor]


FOCUS = 2.0  # the focal loss's exponent


EDGE, NEAR = 3, 5  # windows, in pixels, that find an edge and what lies near it


def cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """Sparse categorical cross-entropy, pixel by pixel: the mean of ``-log softmax(logits)[target]``.

    "Sparse" means that the truth is one integer per pixel, not K zeros and ones.

    Args:
        logits: ``(N, K, h, w)``, any float type.
        target: ``(N, h, w)`` int64 ids 0..K-1; ``IGNORE`` (255) does not count.
        weight: ``(K,)``, how much a pixel of each class counts; the mean is weighted accordingly.
        smoothing: share of the truth that is spread evenly over all classes (label smoothing: Szegedy and others 2016, section 7), 0 to 1.

    Returns:
        Scalar fp32 tensor; 0 with zero gradients when every pixel is ignored.

    >>> round(cross_entropy(torch.zeros(1, 4, 1, 1), torch.tensor([[[2]]])).item(), 4)  # log 4
    1.3863
    """
    total = F.cross_entropy(
        logits.float(),
        target,
        weight,
        ignore_index=IGNORE,
        reduction="sum",
        label_smoothing=smoothing,
    )
    return all_reduce_with_gradient(total) / _counted(target, weight)


def focal(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Focal loss: cross-entropy in which a pixel counts ``(1 - p) ** 2``, p being its chance of the truth: what is known counts little.

    (Lin and others 2017, equation 5, softmax in place of the sigmoid.) Arguments and result as ``cross_entropy``.
    """
    own = (
        F.log_softmax(logits.float(), 1)
        .gather(1, target.clamp(max=logits.shape[1] - 1).unsqueeze(1))
        .squeeze(1)
    )
    losses = -own * (1 - own.exp()) ** FOCUS * (target != IGNORE)
    if weight is not None:
        losses = losses * weight[target.clamp(max=len(weight) - 1)]
    return all_reduce_with_gradient(losses.sum()) / _counted(target, weight)


def _counted(target: Tensor, weight: Tensor | None) -> Tensor:
    """Return the sum of the weights of the pixels that count."""
    counted = target != IGNORE
    if weight is None:
        return all_reduce_sum(counted.sum()).clamp(min=1)
    return all_reduce_sum((weight[target.clamp(max=len(weight) - 1)] * counted).sum()).clamp(
        min=1e-12
    )


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
    hits = chances.new_zeros(logits.shape[1]).scatter_add(
        0, own.flatten(), (chances.gather(1, own)).flatten()
    )
    truth = chances.new_zeros(logits.shape[1]).scatter_add(
        0, own.flatten(), counted.flatten().to(chances.dtype)
    )
    hits, truth, chances = all_reduce_with_gradient(
        torch.stack([hits, truth, chances.sum((0, 2, 3))])
    )
    scores = 2 * hits / (chances + truth).clamp(min=1e-6)
    present = truth > 0
    loss: Tensor = ((1 - scores) * present).sum() / present.sum().clamp(min=1)
    return loss


def lovasz(logits: Tensor, target: Tensor) -> Tensor:
    """Lovasz-softmax loss: a convex stand-in for one minus the mean IoU of the classes in the batch's truth.

    (Berman, Triki, Blaschko 2018, equation 8 and algorithm 1.) It sorts the pixels once per class, and is slower than the others.

    Args:
        logits: ``(N, K, h, w)``, any float type.
        target: ``(N, h, w)`` int64 ids 0..K-1; ``IGNORE`` (255) does not count.

    Returns:
        Scalar fp32 tensor, 0 to 1; 0 with zero gradients when every pixel is ignored.
    """
    chances = logits.float().softmax(1)
    truth = target[target != IGNORE]
    losses = [chances.sum() * 0]
    for k in torch.unique(truth).tolist():
        own = (truth == k).float()
        errors, order = (own - chances[:, k][target != IGNORE]).abs().sort(descending=True)
        hits = own[order]
        missed = hits.cumsum(0)
        jaccard = 1 - (hits.sum() - missed) / (
            hits.sum() + (1 - hits).cumsum(0)
        )  # if the pixels up to here are wrong
        losses.append(errors @ jaccard.diff(prepend=jaccard.new_zeros(1)))
    return (
        all_reduce_with_gradient(torch.stack(losses).sum() / max(1, len(losses) - 1)) / world_size()
    )


def boundary(logits: Tensor, target: Tensor) -> Tensor:
    """Boundary loss: one minus the mean F score of the classes' edges, of those in the batch's truth.

    (Bokhovkin and Burnaev 2019, section 3.) An edge is what a class gains when its complement shrinks by a pixel, found with max pooling;
    an edge pixel is right when one of the other edge lies within 2 pixels. Next to ignored pixels there are no edges.

    Args:
        logits: ``(N, K, h, w)``, any float type.
        target: ``(N, h, w)`` int64 ids 0..K-1; ``IGNORE`` (255) does not count.

    Returns:
        Scalar fp32 tensor, 0 to 1; 0 with zero gradients when no edge counts.
    """
    counted = (target != IGNORE).float().unsqueeze(1)
    inner = 1 - _highest(1 - counted, EDGE)  # pixels none of whose neighbours is ignored
    truth = (
        F.one_hot(target.clamp(max=logits.shape[1] - 1), logits.shape[1])
        .permute(0, 3, 1, 2)
        .float()
    )
    said, true = (_edges(area) * inner for area in (logits.float().softmax(1), truth))
    parts = (said * _highest(true, NEAR), said, true * _highest(said, NEAR), true)
    near, edges, found, there = all_reduce_with_gradient(
        torch.stack([part.sum((0, 2, 3)) for part in parts])
    )
    precision, recall = near / edges.clamp(min=1e-6), found / there.clamp(min=1e-6)
    scores = 2 * precision * recall / (precision + recall).clamp(min=1e-6)
    present = there > 0
    loss: Tensor = ((1 - scores) * present).sum() / present.sum().clamp(min=1)
    return loss


def _edges(area: Tensor) -> Tensor:
    return _highest(1 - area, EDGE) - (1 - area)


def _highest(values: Tensor, window: int) -> Tensor:
    """Return the highest value in the square of ``window`` pixels around each."""
    return F.max_pool2d(values, window, 1, window // 2)


def make_loss(name: str, weight: Tensor | None = None, smoothing: float = 0.0) -> Loss:
    """Make a loss by name: ``"ce"``, or a sum such as ``"ce + 0.5 dice"``.

    Args:
        name: terms of ``LOSSES``, joined by ``+``, each with a factor before it or not.
        weight: ``(K,)``, of the classes, in ce and focal.
        smoothing: label smoothing, in ce.

    Raises:
        UsageError: an unknown name, or a term that cannot be read.
    """
    terms = []
    for part in name.split("+"):
        match = re.fullmatch(r"\s*(?:(\d+\.?\d*|\.\d+)\s*\*?\s*)?([a-z]\w*)\s*", part)
        if not match:
            raise UsageError(
                f'train.loss = {name!r} has the term {part.strip()!r}; write names joined by +, such as "ce + 0.5 dice"'
            )
        terms.append(
            (float(match[1] or 1), choose("train.loss", match[2], LOSSES)(weight, smoothing))
        )

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        logits = (
            logits.float().contiguous()
        )  # class by class: on CPUs a softmax of pixel by pixel takes twice as long
        total = logits.new_zeros(())
        for factor, term in terms:
            total = total + factor * term(logits, target)
        return total

    return loss


LOSSES: dict[str, Callable[[Tensor | None, float], Loss]] = {
    "ce": lambda weight, smoothing: (
        lambda logits, target: cross_entropy(logits, target, weight, smoothing)
    ),
    "dice": lambda weight, smoothing: dice,
    "focal": lambda weight, smoothing: lambda logits, target: focal(logits, target, weight),
    "lovasz": lambda weight, smoothing: lovasz,
    "boundary": lambda weight, smoothing: boundary,
}
