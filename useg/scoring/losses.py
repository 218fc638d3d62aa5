"""Losses: sparse categorical cross-entropy and its relatives.

All take logits ``(N, K, h, w)`` of any float type and compute in fp32. Pixels whose target is
``IGNORE`` do not count; a batch without counted pixels gives 0 with zero gradients. In distributed
training the batch spans all processes: sums over pixels are sums over processes too. Only Lovasz,
which sorts pixels, is computed in each process and averaged.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from useg.classes import IGNORE
from useg.distributed import all_reduce_sum, all_reduce_with_gradient, world_size
from useg.errors import SettingsError, choose
from useg.models.kernels import cross_entropy_and_dice

# Logits (N, K, h, w) and target (N, h, w) -> scalar.
Loss = Callable[[Tensor, Tensor], Tensor]

FOCAL_EXPONENT = 2.0
# Sides, in pixels, of the max-pooling windows that find an edge and what is near it.
EDGE_WINDOW, NEAR_WINDOW = 3, 5


def cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """Sparse categorical cross-entropy per pixel: the mean of ``-log softmax(logits)[target]``.

    "Sparse" means that the target is one integer per pixel instead of a one-hot vector of length K.

    Args:
        logits: ``(N, K, h, w)``, any float type.
        target: ``(N, h, w)`` int64 ids 0..K-1; ``IGNORE`` (255) does not count.
        weight: class weights ``(K,)``; the mean is weighted accordingly.
        smoothing: label smoothing, 0 to 1: share of the target that is spread evenly over all
            classes (Szegedy et al. 2016, section 7).

    Returns:
        Scalar fp32 tensor; 0 with zero gradients when every pixel is ignored.

    >>> round(cross_entropy(torch.zeros(1, 4, 1, 1), torch.tensor([[[2]]])).item(), 4)  # log 4
    1.3863
    """
    total = sum_cross_entropy(logits.float(), target, weight, smoothing)
    return all_reduce_with_gradient(total) / _counted_weight(target, weight)


def sum_cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """Return the sum that :func:`cross_entropy` divides, of this process alone."""
    # On GPUs, torch's own sum adds in another order every time.
    is_on_cpu = logits.device.type == "cpu"
    losses = F.cross_entropy(
        logits,
        target,
        weight,
        ignore_index=IGNORE,
        reduction="sum" if is_on_cpu else "none",
        label_smoothing=smoothing,
    )
    return losses if is_on_cpu else losses.sum()


def focal(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Focal loss: cross-entropy in which a pixel counts ``(1 - p) ** 2``.

    Here p is the probability of the true class, so well-classified pixels count little (Lin et al.
    2017, equation 5, with softmax instead of the sigmoid). Arguments and result are those of
    :func:`cross_entropy`.
    """
    index = target.clamp(max=logits.shape[1] - 1).unsqueeze(1)
    own = F.log_softmax(logits.float(), 1).gather(1, index).squeeze(1)
    losses = -own * (1 - own.exp()) ** FOCAL_EXPONENT * (target != IGNORE)
    if weight is not None:
        losses = losses * weight[target.clamp(max=len(weight) - 1)]
    return all_reduce_with_gradient(losses.sum()) / _counted_weight(target, weight)


def _counted_weight(target: Tensor, weight: Tensor | None) -> Tensor:
    """Return the sum of the weights of the pixels that count."""
    counted = target != IGNORE
    if weight is None:
        return all_reduce_sum(counted.sum()).clamp(min=1)
    weights = weight[target.clamp(max=len(weight) - 1)] * counted
    return all_reduce_sum(weights.sum()).clamp(min=1e-12)


def dice(logits: Tensor, target: Tensor) -> Tensor:
    """Soft Dice loss: one minus the mean Dice score of the classes in the batch's target.

    The score of a class is ``2 sum(p t) / (sum(p) + sum(t))``. Every class counts the same, however
    few pixels it has, unlike in cross-entropy (Milletari, Navab, Ahmadi 2016, V-Net, with p instead
    of its square).

    Args:
        logits: ``(N, K, h, w)``, any float type.
        target: ``(N, h, w)`` int64 ids 0..K-1; ``IGNORE`` (255) does not count.

    Returns:
        Scalar fp32 tensor, 0 to 1; 0 with zero gradients when every pixel is ignored.
    """
    counted = (target != IGNORE).unsqueeze(1)
    probabilities = logits.float().softmax(1) * counted
    index = target.clamp(max=logits.shape[1] - 1).unsqueeze(1)
    sums = _sum_by_scattering if logits.device.type == "cpu" else _sum_by_masks
    hits, truth = sums(probabilities, index, counted)
    hits, truth, predicted = all_reduce_with_gradient(
        torch.stack([hits, truth, probabilities.sum((0, 2, 3))])
    )
    scores = 2 * hits / (predicted + truth).clamp(min=1e-6)
    present = truth > 0
    loss: Tensor = ((1 - scores) * present).sum() / present.sum().clamp(min=1)
    return loss


def _sum_by_scattering(
    probabilities: Tensor, index: Tensor, counted: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the sums ``(K,)`` over the pixels of each true class: its probability, and 1."""
    zeros = probabilities.new_zeros(probabilities.shape[1])
    hits = zeros.scatter_add(0, index.flatten(), probabilities.gather(1, index).flatten())
    truth = zeros.scatter_add(0, index.flatten(), counted.flatten().to(probabilities.dtype))
    return hits, truth


def _sum_by_masks(probabilities: Tensor, index: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Return what :func:`_sum_by_scattering` returns.

    On GPUs, where all pixels of a class would wait to be added to one number, in any order.
    """
    classes = torch.arange(probabilities.shape[1], device=index.device)[:, None, None]
    masks = ((index == classes) & counted).to(probabilities.dtype)
    return (probabilities * masks).sum((0, 2, 3)), masks.sum((0, 2, 3))


def lovasz(logits: Tensor, target: Tensor) -> Tensor:
    """Lovasz-softmax loss: a convex surrogate of one minus the mean IoU of the classes present.

    It sorts the pixels once per class and is slower than the other losses (Berman, Triki, Blaschko
    2018, equation 8 and algorithm 1).

    Args:
        logits: ``(N, K, h, w)``, any float type.
        target: ``(N, h, w)`` int64 ids 0..K-1; ``IGNORE`` (255) does not count.

    Returns:
        Scalar fp32 tensor, 0 to 1; 0 with zero gradients when every pixel is ignored.
    """
    probabilities = logits.float().softmax(1)
    counted = target != IGNORE
    truth = target[counted]
    losses = [probabilities.sum() * 0]
    for k in torch.unique(truth).tolist():
        own = (truth == k).float()
        errors, order = (own - probabilities[:, k][counted]).abs().sort(descending=True)
        hits = own[order]
        # The Jaccard loss if exactly the pixels up to each place are wrong.
        missed, invented = hits.cumsum(0), (1 - hits).cumsum(0)
        jaccard = 1 - (hits.sum() - missed) / (hits.sum() + invented)
        losses.append(errors @ jaccard.diff(prepend=jaccard.new_zeros(1)))
    mean = torch.stack(losses).sum() / max(1, len(losses) - 1)
    return all_reduce_with_gradient(mean) / world_size()


def boundary(logits: Tensor, target: Tensor) -> Tensor:
    """Boundary loss: one minus the mean boundary F score of the classes in the batch's target.

    Max pooling finds the edge of a class: the pixels that it gains when its complement shrinks by
    one pixel. An edge pixel is correct if the other edge lies within 2 pixels. There are no edges
    next to ignored pixels (Bokhovkin and Burnaev 2019, section 3).

    Args:
        logits: ``(N, K, h, w)``, any float type.
        target: ``(N, h, w)`` int64 ids 0..K-1; ``IGNORE`` (255) does not count.

    Returns:
        Scalar fp32 tensor, 0 to 1; 0 with zero gradients when no edge counts.
    """
    counted = (target != IGNORE).float().unsqueeze(1)
    # Pixels without an ignored neighbour.
    inner = 1 - _max_pool(1 - counted, EDGE_WINDOW)
    num_classes = logits.shape[1]
    truth = F.one_hot(target.clamp(max=num_classes - 1), num_classes).permute(0, 3, 1, 2).float()
    predicted, true = (_edges(area) * inner for area in (logits.float().softmax(1), truth))
    parts = (
        predicted * _max_pool(true, NEAR_WINDOW),
        predicted,
        true * _max_pool(predicted, NEAR_WINDOW),
        true,
    )
    correct, num_predicted, found, num_true = all_reduce_with_gradient(
        torch.stack([part.sum((0, 2, 3)) for part in parts])
    )
    precision, recall = correct / num_predicted.clamp(min=1e-6), found / num_true.clamp(min=1e-6)
    scores = 2 * precision * recall / (precision + recall).clamp(min=1e-6)
    present = num_true > 0
    loss: Tensor = ((1 - scores) * present).sum() / present.sum().clamp(min=1)
    return loss


def _edges(area: Tensor) -> Tensor:
    return _max_pool(1 - area, EDGE_WINDOW) - (1 - area)


def _max_pool(values: Tensor, window: int) -> Tensor:
    """Return the largest value in the square of ``window`` pixels around each pixel."""
    return F.max_pool2d(values, window, 1, window // 2)


def depth_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of the depth of pixels in their objects (:mod:`useg.objects.separation`).

    Only pixels in objects count: where they are is learned with the classes.

    Args:
        logits: ``(N, 1, h, w)``, any float type.
        target: ``(N, h, w)`` int64: class ids 0..K-1 or ``IGNORE``, plus 256 times the depth 0-255.

    Returns:
        Scalar fp32 tensor; 0 with zero gradients when there is no object.
    """
    depth = (target >> 8).float() / 255
    counted = (depth > 0) & ((target & 0xFF) != IGNORE)
    losses = F.binary_cross_entropy_with_logits(
        logits[:, 0].float().contiguous(), depth, reduction="none"
    )
    total = all_reduce_with_gradient((losses * counted).sum())
    return total / all_reduce_sum(counted.sum()).clamp(min=1)


def chance_depth_loss(target: Tensor) -> Tensor:
    """Return :func:`depth_loss` of a network that predicts the mean depth everywhere."""
    depth = (target >> 8).float() / 255
    share = (depth.sum() / (depth > 0).sum().clamp(min=1)).clamp(1e-6, 1 - 1e-6)
    constant: Tensor = (share / (1 - share)).log()
    return depth_loss(constant.expand(target.shape)[:, None], target)


def with_objects(loss: Loss, num_classes: int) -> Loss:
    """Return the loss of a network with objects: that of its classes plus that of the depth.

    Args:
        loss: the loss of the classes.
        num_classes: K; the logit of the depth follows those of the classes.
    """

    def total(logits: Tensor, target: Tensor) -> Tensor:
        of_classes = loss(logits[:, :num_classes], target & 0xFF)
        return of_classes + depth_loss(logits[:, num_classes:], target)

    return total


def make_loss(name: str, weight: Tensor | None = None, smoothing: float = 0.0) -> Loss:
    """Make a loss by name: ``"ce"``, or a sum such as ``"ce + 0.5 dice"``.

    Args:
        name: names of ``LOSSES`` joined by ``+``, each with an optional factor before it.
        weight: class weights ``(K,)`` for ce and focal.
        smoothing: label smoothing for ce.

    Raises:
        SettingsError: a name is unknown, or a term cannot be parsed.
    """
    terms, factors = [], dict.fromkeys(LOSSES, 0.0)
    for part in name.split("+"):
        match = re.fullmatch(r"\s*(?:(\d+\.?\d*|\.\d+)\s*\*?\s*)?([a-z]\w*)\s*", part)
        if not match:
            raise SettingsError(
                f"train.loss = {name!r} has the term {part.strip()!r}; "
                'write names joined by +, such as "ce + 0.5 dice"'
            )
        make_term = choose("train.loss", match[2], LOSSES)
        factor = float(match[1] or 1)
        terms.append((factor, make_term(weight, smoothing)))
        factors[match[2]] += factor
    is_simple = not smoothing and {key for key in factors if factors[key]} <= {"ce", "dice"}

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        if is_simple and world_size() == 1:
            total = cross_entropy_and_dice(logits, target, weight, factors["ce"], factors["dice"])
            if total is not None:
                return total
        # Class-major order: on CPUs the softmax of channels-last logits takes twice as long.
        logits = logits.float().contiguous()
        return sum((factor * term(logits, target) for factor, term in terms), logits.new_zeros(()))

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
