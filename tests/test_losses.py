"""Cross-entropy against a sum written out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from useg.classes import IGNORE
from useg.errors import UsageError
from useg.scoring.losses import cross_entropy, dice, make_loss


def by_hand(logits: torch.Tensor, target: torch.Tensor, weight: list[float] | None = None) -> float:
    total = norm = 0.0
    for n, row, column in torch.cartesian_prod(*(torch.arange(size) for size in target.shape)).tolist():
        k = int(target[n, row, column])
        if k == IGNORE:
            continue
        values = [float(v) for v in logits[n, :, row, column]]
        w = weight[k] if weight else 1.0
        total += w * (math.log(sum(math.exp(v) for v in values)) - values[k])
        norm += w
    return total / norm


@pytest.mark.parametrize("weight", [None, [0.5, 2.0, 7.0]])
def test_equals_the_sum_by_hand(weight: list[float] | None) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, generator=generator)
    target = torch.randint(0, 3, (2, 4, 5), generator=generator)
    target[0, 1] = IGNORE
    loss = cross_entropy(logits, target, torch.tensor(weight) if weight else None)
    assert loss.item() == pytest.approx(by_hand(logits, target, weight), rel=1e-5)


def test_all_ignored_is_zero_with_zero_gradient() -> None:
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    for weight in (None, torch.ones(3)):
        loss = cross_entropy(logits, torch.full((1, 2, 2), IGNORE), weight)
        loss.backward()
        assert loss.item() == 0
        assert logits.grad is not None
        assert logits.grad.abs().sum() == 0


def test_bf16_logits_are_judged_in_fp32() -> None:
    logits = torch.tensor([300.0, 299.0, 0.0]).view(1, 3, 1, 1).bfloat16()
    loss = cross_entropy(logits, torch.ones(1, 1, 1, dtype=torch.int64))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(by_hand(logits, torch.ones(1, 1, 1)), rel=1e-5)


def dice_by_hand(logits: torch.Tensor, target: torch.Tensor) -> float:
    chances = logits.double().softmax(1)
    losses = []
    for k in range(logits.shape[1]):
        truth = (target == k).double()
        if truth.sum():
            p = chances[:, k] * (target != IGNORE)
            losses.append(1 - float(2 * (p * truth).sum() / (p.sum() + truth.sum())))
    return sum(losses) / len(losses)


def test_dice_equals_the_formula_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 5, 6, generator=generator)
    target = torch.randint(0, 3, (2, 5, 6), generator=generator)  # class 3 is absent
    target[1, :2] = IGNORE
    assert dice(logits, target).item() == pytest.approx(dice_by_hand(logits, target), rel=1e-5)
    perfect = torch.nn.functional.one_hot(target.clamp(max=3), 4).permute(0, 3, 1, 2) * 100.0
    assert dice(perfect, target).item() == pytest.approx(0, abs=1e-6)


def test_dice_of_nothing_is_zero_with_zero_gradient() -> None:
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = dice(logits, torch.full((1, 2, 2), IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.abs().sum() == 0


def test_losses_by_name_add_up() -> None:
    logits, target, weight = torch.randn(1, 3, 4, 4), torch.randint(0, 3, (1, 4, 4)), torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(make_loss("ce + dice", weight)(logits, target), cross_entropy(logits, target, weight) + dice(logits, target))
    with pytest.raises(UsageError, match=r"train.loss 'dcie' is not known.*did you mean 'dice'"):
        make_loss("ce + dcie")
