"""Each loss against its formula written out by hand, pixel by pixel."""

from __future__ import annotations

import math

import pytest
import torch

from useg.classes import IGNORE
from useg.errors import UsageError
from useg.scoring.losses import LOSSES, boundary, cross_entropy, dice, focal, lovasz, make_loss

pytestmark = pytest.mark.wheel


def pixels(logits: torch.Tensor, target: torch.Tensor) -> list[tuple[list[float], int]]:
    """Chances and truth of every pixel that counts."""
    found = []
    for n, row, column in torch.cartesian_prod(
        *(torch.arange(size) for size in target.shape)
    ).tolist():
        values = [
            math.exp(float(v))
            for v in logits[n, :, row, column].double() - logits[n, :, row, column].double().max()
        ]
        if int(target[n, row, column]) != IGNORE:
            found.append(([v / sum(values) for v in values], int(target[n, row, column])))
    return found


def by_hand(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: list[float] | None = None,
    smoothing: float = 0.0,
    focus: float = 0.0,
) -> float:
    total = norm = 0.0
    for chances, k in pixels(logits, target):
        weights = weight or [1.0] * len(chances)
        total += (1 - smoothing) * weights[k] * -math.log(chances[k]) * (1 - chances[k]) ** focus
        total += (
            sum(
                smoothing / len(chances) * w * -math.log(p)
                for w, p in zip(weights, chances, strict=True)
            )
            if smoothing
            else 0
        )
        norm += weights[k]
    return total / norm


def some(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of 4 classes, and a truth in which class 3 is absent and some pixels are ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 4, 7, 6, generator=generator) * 2
    target = torch.randint(0, 3, (2, 7, 6), generator=generator)
    target[0, 1] = IGNORE
    return logits, target


@pytest.mark.parametrize("weight", [None, [0.5, 2.0, 7.0, 1.0]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_equals_the_sum_by_hand(weight: list[float] | None, smoothing: float) -> None:
    logits, target = some()
    loss = cross_entropy(logits, target, torch.tensor(weight) if weight else None, smoothing)
    assert loss.item() == pytest.approx(by_hand(logits, target, weight, smoothing), rel=1e-5)


@pytest.mark.parametrize("weight", [None, [0.5, 2.0, 7.0, 1.0]])
def test_focal_equals_the_sum_by_hand(weight: list[float] | None) -> None:
    logits, target = some()
    loss = focal(logits, target, torch.tensor(weight) if weight else None)
    assert loss.item() == pytest.approx(by_hand(logits, target, weight, focus=2), rel=1e-5)


def lovasz_by_hand(logits: torch.Tensor, target: torch.Tensor) -> float:
    """Sum the sorted errors of a class, each times its increase of the Jaccard loss."""
    seen = pixels(logits, target)
    losses = []
    for k in sorted({truth for _, truth in seen}):
        errors = sorted(
            ((1 - chances[k] if truth == k else chances[k], truth == k) for chances, truth in seen),
            key=lambda pair: -pair[0],
        )
        own = sum(is_own for _, is_own in errors)

        def jaccard(wrong: int, own: int = own, errors: list[tuple[float, bool]] = errors) -> float:
            missed = sum(is_own for _, is_own in errors[:wrong])
            return 1 - (own - missed) / (own + wrong - missed)

        losses.append(
            sum(error * (jaccard(n + 1) - jaccard(n)) for n, (error, _) in enumerate(errors))
        )
    return sum(losses) / len(losses)


@pytest.mark.parametrize("seed", [0, 1])
def test_lovasz_equals_the_definition_by_hand(seed: int) -> None:
    logits, target = some(seed)
    assert lovasz(logits, target).item() == pytest.approx(lovasz_by_hand(logits, target), rel=1e-4)


def test_lovasz_of_certain_answers_is_one_minus_mean_iou() -> None:
    _, target = some()
    said = target.clamp(max=3).roll(1, 2)
    certain = torch.nn.functional.one_hot(said, 4).permute(0, 3, 1, 2) * 100.0
    ious = []
    for k in range(3):
        a, b = (said == k) & (target != IGNORE), target == k
        ious.append(float((a & b).sum() / (a | b).sum()))
    assert lovasz(certain, target).item() == pytest.approx(1 - sum(ious) / 3, abs=1e-5)


def boundary_by_hand(logits: torch.Tensor, target: torch.Tensor) -> float:
    N, K, H, W = logits.shape
    chances = logits.double().softmax(1)

    def around(values: torch.Tensor, n: int, row: int, column: int, far: int) -> list[float]:
        return [
            float(values[n, r, c])
            for r in range(max(0, row - far), min(H, row + far + 1))
            for c in range(max(0, column - far), min(W, column + far + 1))
        ]

    places = [(n, row, column) for n in range(N) for row in range(H) for column in range(W)]
    losses = []
    for k in range(K):
        areas = {"said": chances[:, k], "true": (target == k).double()}
        edges = {}
        for name, area in areas.items():
            edges[name] = torch.zeros(N, H, W, dtype=torch.float64)
            for n, row, column in places:
                if IGNORE not in around(target, n, row, column, 1):
                    edges[name][n, row, column] = float(area[n, row, column]) - min(
                        around(area, n, row, column, 1)
                    )
        if not edges["true"].sum():
            continue
        shares = []
        for one, other in (("said", "true"), ("true", "said")):
            near = sum(
                float(edges[one][place]) * max(around(edges[other], *place, 2)) for place in places
            )
            shares.append(near / float(edges[one].sum()))
        losses.append(1 - 2 * shares[0] * shares[1] / (shares[0] + shares[1]))
    return sum(losses) / len(losses)


def test_boundary_equals_the_definition_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 9, 8, generator=generator) * 3
    target = torch.zeros(2, 9, 8, dtype=torch.int64)
    target[:, 3:7, 2:6] = 1
    target[1, :2, :2] = IGNORE
    assert boundary(logits, target).item() == pytest.approx(
        boundary_by_hand(logits, target), rel=1e-4
    )
    perfect = torch.nn.functional.one_hot(target.clamp(max=2), 3).permute(0, 3, 1, 2) * 100.0
    assert boundary(perfect, target).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("size", [1, 4])
def test_nothing_that_counts_is_zero_with_zero_gradient(name: str, size: int) -> None:
    logits = torch.randn(1, 3, size, size, requires_grad=True)
    loss = make_loss(name, torch.ones(3))(logits, torch.full((1, size, size), IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.abs().sum() == 0


@pytest.mark.parametrize("name", list(LOSSES))
def test_one_pixel_and_bf16_are_safe(name: str) -> None:
    logits = torch.tensor([300.0, -300.0, 0.0]).view(1, 3, 1, 1).bfloat16().requires_grad_()
    for truth in range(3):
        loss = make_loss(name)(logits, torch.full((1, 1, 1), truth))
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        loss.backward()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()


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


def test_losses_by_name_add_up() -> None:
    logits, target, weight = (
        torch.randn(1, 3, 4, 4),
        torch.randint(0, 3, (1, 4, 4)),
        torch.tensor([1.0, 2.0, 3.0]),
    )
    torch.testing.assert_close(
        make_loss("ce + dice", weight)(logits, target),
        cross_entropy(logits, target, weight) + dice(logits, target),
    )
    expected = (
        0.5 * cross_entropy(logits, target, weight, 0.1)
        + 2 * lovasz(logits, target)
        + focal(logits, target, weight)
    )
    torch.testing.assert_close(
        make_loss("0.5*ce + 2 lovasz+focal", weight, 0.1)(logits, target), expected
    )
    with pytest.raises(UsageError, match=r"train.loss 'dcie' is not known.*did you mean 'dice'"):
        make_loss("ce + dcie")
    with pytest.raises(
        UsageError, match=r"train.loss = 'ce \+' has the term ''; write names joined by \+"
    ):
        make_loss("ce +")
