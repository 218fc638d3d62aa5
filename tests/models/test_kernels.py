"""Compiled layers against PyTorch's own in double precision, and where they are not used."""

from __future__ import annotations

import copy
import ctypes
import shutil
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from useg.models import kernels
from useg.models.encoders import EncoderUNet, InvertedResidual, describe_block, describe_level
from useg.models.kernels import (
    COMPILERS,
    SIGNATURES,
    compute_blocks,
    compute_levels,
    convolve_normalized,
    convolve_repeated,
    cross_entropy_and_dice,
    filter_normalized,
    load_kernels,
)
from useg.models.unet import DoubleConv, normalize
from useg.scoring.losses import make_loss

# Rounding to bf16, once or twice.
CLOSE = 5e-3

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, COMPILERS)), reason="there is no C compiler"
)


@pytest.fixture
def no_cache() -> Iterator[None]:
    """Let this test and those after it decide anew whether there are kernels."""
    load_kernels.cache_clear()
    yield
    load_kernels.cache_clear()


def features(*shape: int, seed: int = 0) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5
    return made.bfloat16().contiguous(memory_format=torch.channels_last)


def difference(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None
    assert expected is not None
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def with_gradients(function: Any, *inputs: Tensor) -> list[Tensor]:
    """Return the result of a function and its gradients, for a fixed gradient of the result."""
    leaves = [each.detach().requires_grad_() for each in inputs]
    y = function(*leaves)
    gradient = features(*y.shape, seed=7).to(y.dtype)
    return [y, *torch.autograd.grad(y, leaves, gradient)]


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "activation"),
    [
        ((2, 16, 20, 31), nn.ReLU()),
        ((4, 24, 9, 5), None),
        ((1, 96, 33, 64), nn.ReLU6()),
        ((3, 13, 7, 3), nn.ReLU()),
        ((1, 1152, 2, 3), nn.ReLU6()),
        ((2, 5, 1, 1), None),
    ],
    ids=str,
)
def test_normalization_equals_pytorch_in_double_precision(
    shape: tuple[int, ...], activation: nn.Module | None
) -> None:
    norm = nn.BatchNorm2d(shape[1], eps=1e-3)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
        norm.bias.normal_(1, 1, generator=torch.Generator().manual_seed(2))
    exact = copy.deepcopy(norm).double()
    x, residual = features(*shape), features(*shape, seed=3)

    def ours(x: Tensor, weight: Tensor, bias: Tensor, *residual: Tensor) -> Tensor:
        layer = copy.copy(norm)
        layer._parameters = {"weight": weight, "bias": bias}  # type: ignore[dict-item]
        y = normalize(layer, activation, x, *residual)
        assert "NormActivation" in str(y.grad_fn)
        return y

    def theirs(x: Tensor, weight: Tensor, bias: Tensor, *residual: Tensor) -> Tensor:
        y = F.batch_norm(
            x, exact.running_mean, exact.running_var, weight, bias, True, 0.1, exact.eps
        )
        return (y if activation is None else activation(y)) + sum(residual)

    inputs = (x, norm.weight, norm.bias) + ((residual,) if activation is None else ())
    found = with_gradients(ours, *inputs)
    expected = with_gradients(theirs, *(each.double() for each in inputs))
    if shape[2:] == (1, 1):
        # Of two values, the gradient is a small difference of large numbers.
        found, expected = found[:1], expected[:1]
    for mine, other in zip(found, expected, strict=True):
        assert difference(mine, other) < CLOSE
    assert difference(norm.running_mean, exact.running_mean) < 1e-5
    assert difference(norm.running_var, exact.running_var) < 1e-5
    assert norm.num_batches_tracked == 1


@needs_compiler
@pytest.mark.parametrize("normalized", ["both", "before", "neither"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize(
    "shape",
    # The last has several strips of rows and blocks of channels.
    [(2, 144, 11, 14), (2, 32, 3, 5), (3, 16, 1, 8), (1, 240, 37, 6)],
    ids=str,
)
def test_depthwise_convolution_equals_pytorch_in_double_precision(
    shape: tuple[int, ...], kernel: int, stride: int, normalized: str
) -> None:
    channels, random = shape[1], torch.manual_seed(1)
    conv = nn.Conv2d(channels, channels, kernel, stride, groups=channels, bias=False)
    norms = [nn.BatchNorm2d(channels, eps=1e-3) for _ in range(2)]
    exact = [nn.BatchNorm2d(channels, eps=1e-3).double() for _ in range(2)]
    is_used = normalized != "neither", normalized == "both"
    parameters = [torch.rand(channels, generator=random) + 0.5 for _ in range(4)]
    # Rounding shall not move features across the limits of ReLU6.
    parameters[2], parameters[3] = 0.5 * parameters[2], 2 + parameters[3]
    before, after = (kernel - stride) // 2, kernel

    def ours(x: Tensor, weight: Tensor, *parameters: Tensor) -> Tensor:
        conv._parameters["weight"] = weight  # type: ignore[assignment]
        for k, norm in enumerate(norms):
            named = zip(("weight", "bias"), parameters[2 * k :], strict=False)
            norm._parameters = dict(named)  # type: ignore[assignment]
        given = [norm if used else None for norm, used in zip(norms, is_used, strict=True)]
        y = filter_normalized(given, conv, nn.ReLU6(), x)
        assert y is not None
        return y + 0 * sum(parameters).mean()  # type: ignore[attr-defined, no-any-return]

    def normalize_exactly(k: int, x: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        if not is_used[k]:
            return x
        mean, variance = exact[k].running_mean, exact[k].running_var
        weight, bias = parameters[2 * k : 2 * k + 2]
        return F.relu6(F.batch_norm(x, mean, variance, weight, bias, True, 0.1, 1e-3))

    def theirs(x: Tensor, weight: Tensor, *parameters: Tensor) -> Tensor:
        padded = F.pad(normalize_exactly(0, x, parameters), (before, after, before, after))
        y = F.conv2d(padded, weight, None, stride, groups=channels)
        y = y[..., : -(-shape[2] // stride), : -(-shape[3] // stride)]
        unused = torch.stack([each.mean() for each in parameters]).sum()
        return normalize_exactly(1, y, parameters) + 0 * unused

    inputs = features(*shape), conv.weight, *parameters
    found = with_gradients(ours, *inputs)
    expected = with_gradients(theirs, *(each.double() for each in inputs))
    for mine, other in zip(found, expected, strict=True):
        # Twice normalised, of a few pixels, the gradient is a difference of larger numbers.
        assert difference(mine, other) < (3 * CLOSE if normalized == "both" else CLOSE)
    for norm, exact_norm, used in zip(norms, exact, is_used, strict=True):
        assert difference(norm.running_mean, exact_norm.running_mean) < 1e-3
        assert difference(norm.running_var, exact_norm.running_var) < 1e-3
        assert norm.num_batches_tracked == used


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "out_channels"),
    [((2, 16, 70, 64), 16), ((1, 48, 5, 6), 32), ((3, 16, 1, 8), 48), ((2, 32, 11, 10), 16)],
    ids=str,
)
def test_convolution_between_normalizations_equals_pytorch_in_double_precision(
    shape: tuple[int, int, int, int], out_channels: int
) -> None:
    loaded = load_kernels()
    if loaded is None or not loaded.useg_has_convolutions():
        pytest.skip("this processor multiplies no vectors of bf16 numbers")
    C, D, random, relu = shape[1], out_channels, torch.Generator().manual_seed(1), nn.ReLU()
    conv = nn.Conv2d(C, D, 3, padding=1, bias=False)
    norms = [nn.BatchNorm2d(C, eps=1e-3), nn.BatchNorm2d(D, eps=1e-3)]
    exact = [copy.deepcopy(norm).double() for norm in norms]
    # Rounding shall not move features across the limit of ReLU.
    parameters = [torch.rand(channels, generator=random) + 0.5 for channels in (C, C, D, D)]
    parameters[1], parameters[3] = 3 + parameters[1], 3 + parameters[3]

    def ours(x: Tensor, weight: Tensor, *parameters: Tensor) -> Tensor:
        conv._parameters["weight"] = weight  # type: ignore[assignment]
        for k, norm in enumerate(norms):
            named = zip(("weight", "bias"), parameters[2 * k :], strict=False)
            norm._parameters = dict(named)  # type: ignore[assignment]
        y, rest = convolve_normalized([norms[0], relu, conv, norms[1], relu], x)
        assert not list(rest)
        return y

    def normalize_exactly(k: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean, variance = exact[k].running_mean, exact[k].running_var
        return F.relu(F.batch_norm(x, mean, variance, weight, bias, True, 0.1, 1e-3))

    def theirs(x: Tensor, weight: Tensor, *parameters: Tensor) -> Tensor:
        y = F.conv2d(normalize_exactly(0, x, *parameters[:2]), weight, padding=1)
        return normalize_exactly(1, y, *parameters[2:])

    weight = (torch.randn((D, C, 3, 3), generator=random) / 10).bfloat16().float()
    inputs = features(*shape), weight, *parameters
    found = with_gradients(ours, *inputs)
    expected = with_gradients(theirs, *(each.double() for each in inputs))
    for mine, other in zip(found, expected, strict=True):
        # Twice normalised, far from 0, the gradient is a difference of larger numbers.
        assert difference(mine, other) < 6 * CLOSE
    for norm, exact_norm in zip(norms, exact, strict=True):
        assert difference(norm.running_mean, exact_norm.running_mean) < 1e-3
        assert difference(norm.running_var, exact_norm.running_var) < 1e-3
        assert norm.num_batches_tracked == 1


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "out_channels", "kernel", "stride", "expansion"),
    [
        ((2, 24, 5, 7), 24, 3, 1, 6),
        ((1, 40, 14, 12), 80, 5, 2, 6),
        ((3, 32, 9, 8), 16, 3, 1, 1),
        ((4, 16, 16, 16), 16, 5, 1, 3),
    ],
    ids=str,
)
def test_inverted_residual_equals_pytorch_in_double_precision(
    shape: tuple[int, ...], out_channels: int, kernel: int, stride: int, expansion: int
) -> None:
    torch.manual_seed(0)
    block = InvertedResidual(shape[1], out_channels, kernel, stride, expansion)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(parameter.bfloat16())
        for norm in (block.bn0, block.bn1):
            if norm is not None:
                norm.bias.uniform_(-1, 1)
    exact, leaf = copy.deepcopy(block).double(), features(*shape).requires_grad_()
    results = compute_blocks([describe_block(block, True)], leaf)
    if results is None:
        pytest.skip("this processor multiplies no vectors of bf16 numbers")
    (y,) = results

    def rounded(x: Tensor) -> Tensor:
        """Round to bf16 as the block does, so that ReLU6 cuts off the same values."""
        return x + (x.bfloat16() - x).detach()

    x = exact_leaf = leaf.detach().double().requires_grad_()
    hidden = x
    if exact.expand_conv is not None and exact.bn0 is not None:
        hidden = F.relu6(exact.bn0(rounded(exact.expand_conv(x))))
    if exact.pad is not None:
        hidden = exact.pad(F.pad(hidden, (0, -shape[3] % 2, 0, -shape[2] % 2)))
    hidden = rounded(F.relu6(exact.bn1(rounded(exact.depthwise_conv(hidden)))))
    expected = exact.bn2(rounded(exact.project_conv(hidden))) + (x if exact.residual else 0)
    gradient = features(*y.shape, seed=7)
    for result in (y, expected):
        result.backward(gradient.to(result.dtype))
    assert difference(y, expected) < CLOSE
    ours, theirs = [leaf, *block.parameters()], [exact_leaf, *exact.parameters()]
    for own, other in zip(ours, theirs, strict=True):
        # Twice normalised, the gradient is a difference of larger numbers.
        assert difference(own.grad, other.grad) < 10 * CLOSE
    for one, two in zip(block.buffers(), exact.buffers(), strict=True):
        assert difference(one, two) < 1e-3


@needs_compiler
def test_blocks_after_one_another_equal_single_blocks() -> None:
    torch.manual_seed(0)
    # The first does not expand, and the results before the third and after the last are kept.
    layers = [(32, 16, 3, 1, 1), (16, 16, 3, 1, 6), (16, 24, 5, 2, 6), (24, 24, 5, 1, 6)]
    blocks, x = [InvertedResidual(*each) for each in layers], features(2, 32, 12, 10)
    are_kept = (False, True, False, True)

    def together(leaf: Tensor) -> list[Tensor]:
        described = [
            describe_block(block, kept) for block, kept in zip(blocks, are_kept, strict=True)
        ]
        results = compute_blocks(described, leaf)
        return [] if results is None else [*results]

    def one_by_one(leaf: Tensor) -> list[Tensor]:
        results = []
        for block, is_kept in zip(blocks, are_kept, strict=True):
            (leaf,) = compute_blocks([describe_block(block, True)], leaf) or ()
            results += [leaf] * is_kept
        return results

    if not together(x):
        pytest.skip("this processor multiplies no vectors of bf16 numbers")
    parameters = [parameter for block in blocks for parameter in block.parameters()]
    for used in ((0, 1), (1,), (0,)):
        found = []
        for function in (together, one_by_one):
            leaf = x.clone().requires_grad_()
            results = [function(leaf)[k] for k in used]
            gradients = [features(*y.shape, seed=7) for y in results]
            leaves = [leaf, *parameters]
            computed = torch.autograd.grad(results, leaves, gradients, materialize_grads=True)
            found.append([*results, *computed])
        for k, (one, other) in enumerate(zip(*found, strict=True)):
            # The sum of two gradients is rounded once instead of twice.
            assert torch.equal(one, other) if k < len(used) else difference(one, other) < CLOSE


@needs_compiler
def test_blocks_that_do_not_fit_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_compiled(*blocks: InvertedResidual) -> bool:
        x = features(1, 16, 6, 6)
        return compute_blocks([describe_block(block, True) for block in blocks], x) is not None

    block = InvertedResidual(16, 24, 3, 1, 6)
    loaded = load_kernels()
    assert loaded is not None
    assert is_compiled(block) == loaded.useg_has_convolutions()
    assert not is_compiled(InvertedResidual(16, 12, 3, 1, 6))
    # Nothing adds the gradient of x, or there are two others.
    assert not is_compiled(InvertedResidual(16, 16, 3, 1, 1))
    assert not is_compiled(InvertedResidual(16, 24, 3, 1, 6), InvertedResidual(24, 24, 3, 1, 6))
    assert not is_compiled(block, InvertedResidual(24, 24, 3, 1, 1))
    # One pixel is left.
    assert not is_compiled(*(InvertedResidual(16, 16, 3, 2, 6) for _ in range(4)))
    frozen = copy.deepcopy(block)
    frozen.bn1.eval()
    assert not is_compiled(frozen)
    monkeypatch.setattr(loaded, "useg_has_convolutions", lambda: 0)
    assert not is_compiled(block)


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "levels"),
    [
        # Channels of the skip connection and of the result of each level.
        ((2, 32, 5, 7), [(24, 48), (16, 16)]),
        ((3, 48, 3, 4), [(0, 32)]),
        ((1, 16, 40, 66), [(8, 16)]),
        ((1, 16, 1, 1), [(40, 16), (0, 16)]),
    ],
    ids=str,
)
def test_levels_equal_pytorch_in_double_precision(
    shape: tuple[int, ...], levels: list[tuple[int, int]]
) -> None:
    random = torch.Generator().manual_seed(0)
    (N, C, H, W), doubles, skips = shape, [], []
    for S, D in levels:
        H, W = 2 * H, 2 * W
        double = DoubleConv(C + S, D, padding="same", normalize=True)
        for k in (0, 3):
            conv, norm = double[k], double[k + 1]
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(norm, nn.BatchNorm2d)
            # Sums of these weights are exact in bf16.
            conv.weight.data = torch.randint(-8, 9, conv.weight.shape, generator=random) / 64
            # Rounding shall not move features across the limit of ReLU.
            nn.init.constant_(norm.bias, 3)
        doubles.append(double)
        skips.append(features(N, S, H, W, seed=S).requires_grad_() if S else None)
        C = D
    exact, leaf = [copy.deepcopy(double).double() for double in doubles], features(*shape)
    y = compute_levels([*map(describe_level, doubles)], leaf.requires_grad_(), skips)
    if y is None:
        pytest.skip("this processor multiplies no vectors of bf16 numbers")

    x = exact_leaf = leaf.detach().double().requires_grad_()
    exact_skips = [None if s is None else s.detach().double().requires_grad_() for s in skips]
    for double, skip in zip(exact, exact_skips, strict=True):
        x = F.interpolate(x, scale_factor=2.0)
        x = x if skip is None else torch.cat([x, skip], 1)
        x = double(x)
    gradient = features(*y.shape, seed=7)
    for result in (y, x):
        result.backward(gradient.to(result.dtype))
    assert difference(y, x) < CLOSE
    ours = [leaf, *skips, *(each for double in doubles for each in double.parameters())]
    theirs = [exact_leaf, *exact_skips, *(each for own in exact for each in own.parameters())]
    for own, other in zip(ours, theirs, strict=True):
        if own is not None and other is not None:
            assert difference(own.grad, other.grad) < 6 * CLOSE
    for double, own in zip(doubles, exact, strict=True):
        for one, two in zip(double.buffers(), own.buffers(), strict=True):
            assert difference(one, two) < CLOSE


def test_levels_that_do_not_fit_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_compiled(channels: int, more: int, width: int) -> bool:
        level = DoubleConv(channels + more, width, padding="same", normalize=True)
        x, skip = features(1, channels, 4, 4), features(1, more, 8, 8) if more else None
        return compute_levels([describe_level(level)], x, [skip]) is not None

    loaded = load_kernels()
    can = loaded is not None and bool(loaded.useg_has_convolutions())
    assert is_compiled(16, 8, 16) == can
    assert not is_compiled(24, 8, 16)
    assert not is_compiled(16, 4, 16)
    assert not is_compiled(16, 0, 8)
    if loaded is not None:
        monkeypatch.setattr(loaded, "useg_has_convolutions", lambda: 0)
        assert not is_compiled(16, 8, 16)


@needs_compiler
def test_products_of_any_number_of_pixels_and_channels_are_exact_to_rounding() -> None:
    loaded = load_kernels()
    if loaded is None or not loaded.useg_has_convolutions():
        pytest.skip("this processor multiplies no vectors of bf16 numbers")
    for pixels, C, D in ((1, 8, 8), (7, 24, 40), (49, 16, 96), (1001, 64, 16), (301, 8, 1152)):
        x, g, added = (
            features(1, C, 1, pixels),
            features(1, D, 1, pixels),
            features(1, C, 1, pixels),
        )
        weight = features(D, C, 1, 1, seed=3).float()
        y, of_x, of_weight = (torch.empty_like(each) for each in (g, x, weight))
        sizes = (ctypes.c_int64 * 3)(pixels, C, D)
        for compute, tensors in (
            (loaded.useg_pointwise_forward, (x, weight, y)),
            (loaded.useg_pointwise_backward, (x, weight, g, added, of_x, of_weight)),
        ):
            assert not compute(sizes, *(ctypes.c_void_p(each.data_ptr()) for each in tensors))
        rows, of_rows = (each[0, :, 0].T.double() for each in (x, g))
        matrix = weight[:, :, 0, 0].double()
        assert difference(y[0, :, 0].T, rows @ matrix.T) < CLOSE
        assert difference(of_x[0, :, 0].T, of_rows @ matrix + added[0, :, 0].T) < CLOSE
        assert difference(of_weight[:, :, 0, 0], of_rows.T @ rows) < 1e-5


def test_convolutions_that_do_not_fit_are_left_to_pytorch() -> None:
    def is_compiled(width: int, channels: int, padding: Any = "same", **settings: Any) -> bool:
        layers = DoubleConv(channels, channels, padding=padding, **{"normalize": True, **settings})
        return not list(convolve_normalized([*layers][1:], features(1, channels, 6, width))[1])

    assert not is_compiled(5, 16)
    assert not is_compiled(6, 24)
    assert not is_compiled(6, 16, "valid")
    assert not is_compiled(6, 16, normalize=False)
    loaded = load_kernels()
    assert is_compiled(6, 16) == (loaded is not None and loaded.useg_has_convolutions())


@needs_compiler
@pytest.mark.parametrize("name", ["ce", "dice", "ce + 0.5 dice"])
@pytest.mark.parametrize(("classes", "weighted"), [(2, False), (13, True), (40, True)])
def test_loss_equals_that_of_pytorch(name: str, classes: int, weighted: bool) -> None:
    random = torch.Generator().manual_seed(0)
    logits = features(2, classes, 9, 11) * 4
    target = torch.randint(0, classes, (2, 9, 11), generator=random)
    target[0, :3] = 255
    weight = torch.rand(classes, generator=random) if weighted else None
    loss = make_loss(name, weight)
    leaves = [logits.detach().requires_grad_(), logits.detach().float().requires_grad_()]
    values = [loss(leaf, target) for leaf in leaves]
    assert "Loss" in str(values[0].grad_fn)
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-5)
    for value in values:
        (3 * value).backward()
    assert difference(leaves[0].grad, leaves[1].grad) < CLOSE
    assert not leaves[0].grad[0, :, :3].any()  # type: ignore[index]


@needs_compiler
def test_loss_of_ignored_pixels_is_zero_and_nan_is_not_hidden() -> None:
    ignored = torch.full((1, 4, 4), 255)
    loss = make_loss("ce + dice")
    logits = features(1, 3, 4, 4).requires_grad_()
    value = loss(logits, ignored)
    value.backward()
    assert value == 0
    assert not logits.grad.any()  # type: ignore[union-attr]
    for broken in (float("nan"), float("inf")):
        logits = features(1, 3, 4, 4)
        logits[0, 1, 2, 2] = broken
        assert loss(logits.requires_grad_(), ignored * 0).isnan()
        norm = nn.BatchNorm2d(3)
        assert normalize(norm, nn.ReLU6(), logits).isnan()[:, 1].all()
        assert norm.running_mean is not None
        assert not norm.running_mean[1].isfinite()


@needs_compiler
@pytest.mark.parametrize("channels", [(24, 8, 48), (24, 16, 48), (5, 0, 3), (3, 20, 17)], ids=str)
def test_convolution_of_repeated_pixels_equals_pytorch_in_double_precision(
    channels: tuple[int, int, int],
) -> None:
    C, S, D = channels
    conv = nn.Conv2d(C + S, D, 3, padding=1, bias=False)

    def ours(x: Tensor, weight: Tensor, *skip: Tensor) -> Tensor:
        conv._parameters["weight"] = weight  # type: ignore[assignment]
        y = convolve_repeated(conv, x, skip[0] if skip else None)
        assert y is not None
        return y

    def theirs(x: Tensor, weight: Tensor, *skip: Tensor) -> Tensor:
        return F.conv2d(
            torch.cat([F.interpolate(x, scale_factor=2.0), *skip], 1), weight, padding=1
        )

    inputs = (features(2, C, 4, 5), conv.weight) + ((features(2, S, 8, 10, seed=1),) if S else ())
    found = with_gradients(ours, *inputs)
    expected = with_gradients(theirs, *(each.double() for each in inputs))
    for mine, other in zip(found, expected, strict=True):
        assert difference(mine, other) < CLOSE


@needs_compiler
def test_gradients_of_the_network_are_as_near_to_fp32_as_pytorchs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    network = EncoderUNet("lite0", 3, 5, width=4)
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    target = torch.randint(0, 5, (2, 64, 64))
    loss = make_loss("ce + dice")

    def gradients(precision: torch.dtype | None) -> Tensor:
        own = copy.deepcopy(network).train()
        with torch.autocast("cpu", precision, enabled=precision is not None):
            logits = own(x)
        loss(logits, target).backward()
        # Deeper layers magnify rounding until their gradients are noise.
        parts = [*own.head.parameters(), *own.merge[-1].parameters()]
        return torch.cat([each.grad.flatten() for each in parts if each.grad is not None])

    exact, compiled = gradients(None), gradients(torch.bfloat16)
    monkeypatch.setattr(kernels, "load_kernels", lambda: None)
    plain = gradients(torch.bfloat16)
    assert not torch.equal(compiled, plain)
    assert difference(compiled, exact) < 1.5 * difference(plain, exact)


@needs_compiler
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    blocks = [InvertedResidual(16, 16, 5, 1, 6), InvertedResidual(16, 16, 3, 1, 6)]
    double = DoubleConv(16, 16, padding="same", normalize=True)
    level = DoubleConv(32, 16, padding="same", normalize=True)
    parameters = [each for block in blocks for each in block.parameters()]
    parameters += [*islice(double.parameters(), 1, None), *level.parameters()]
    x, coarse = features(2, 16, 40, 52), features(2, 16, 20, 26)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with torch.autocast("cpu", torch.bfloat16):
                y = normalize(blocks[0].bn2, None, x)
                described = [describe_block(block, block is blocks[1]) for block in blocks]
                computed = compute_blocks(described, y)
                y = double.finish(blocks[1](blocks[0](y)) if computed is None else computed[0])
                merged = compute_levels([describe_level(level)], coarse, [y])
                if merged is None:
                    y = level(torch.cat([F.interpolate(coarse, scale_factor=2.0), y], 1))
                else:
                    y = merged
            loss = make_loss("ce + dice")(y, (x[:, 0] > 0).long())
            results.append(torch.autograd.grad(loss, parameters))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_pytorch_computes_where_nothing_can_be_compiled(
    monkeypatch: pytest.MonkeyPatch, no_cache: None
) -> None:
    for name, value in (("CC", "false"), ("CC", "no-such-compiler"), ("USEG_KERNELS", "off")):
        monkeypatch.setenv(name, value)
        load_kernels.cache_clear()
        assert load_kernels() is None
        monkeypatch.delenv(name)
    monkeypatch.setenv("USEG_KERNELS", "off")
    block = InvertedResidual(16, 16, 5, 2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(features(1, 16, 8, 8))
    y.float().sum().backward()
    assert y.shape == (1, 16, 4, 4)


@needs_compiler
def test_kernels_that_compute_something_else_are_not_used(
    monkeypatch: pytest.MonkeyPatch, no_cache: None
) -> None:
    loaded = load_kernels()
    assert loaded is not None

    class Wrong:
        """As the kernels, but one of them does nothing."""

        def __getattr__(self, name: str) -> Any:
            return (lambda *_: 0) if name == self.name else getattr(loaded, name)

        def __init__(self, name: str) -> None:
            self.name = name

    # With a wrong length, the kernels would write beyond their memory.
    names = set(SIGNATURES) - {"useg_blocks_length", "useg_levels_length"}
    if not loaded.useg_has_convolutions():
        parts = "_convolution", "_blocks", "_levels"
        names = {name for name in names if not any(part in name for part in parts)}
    found = {}
    # Memory that nothing is written to holds NaN.
    torch.use_deterministic_algorithms(True)
    try:
        for name in names:
            wrong = Wrong(name)
            monkeypatch.setattr(kernels, "_compile", lambda compiler, folder, wrong=wrong: wrong)
            load_kernels.cache_clear()
            found[name] = load_kernels()
    finally:
        torch.use_deterministic_algorithms(False)
    assert found == dict.fromkeys(names)


def test_other_number_types_and_evaluation_are_left_to_pytorch() -> None:
    norm = nn.BatchNorm2d(16)
    for x in (features(1, 16, 4, 4).float(), features(1, 16, 4, 4).contiguous()):
        assert "NormActivation" not in str(normalize(norm, None, x).grad_fn)
    norm.eval()
    assert "NormActivation" not in str(normalize(norm, None, features(1, 16, 4, 4)).grad_fn)
    logits = features(1, 3, 4, 4)
    with torch.no_grad():
        assert cross_entropy_and_dice(logits, torch.zeros(1, 4, 4).long(), None, 1.0, 1.0) is None
