"""The compiled labels and images against PyTorch's and Pillow's, and where they are not used."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_inference import make_model, make_predictor, random_image
from numpy.typing import NDArray

from useg.images.image_files import resize_image
from useg.inference import predictor, resampling
from useg.inference.predictor import _label_resized
from useg.inference.resampling import (
    RESAMPLING_SIGNATURES,
    _label_probe,
    _resize_probe,
    label_compiled,
    resize_compiled,
)
from useg.models.geometry import WorkingSize
from useg.models.kernels import COMPILERS, compile_sources

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, COMPILERS)), reason="there is no C compiler"
)
SOURCE = Path(resampling.__file__).with_name("resampling.c")


@pytest.fixture
def no_cache() -> Iterator[None]:
    """Let this test and those after it decide anew whether there is a kernel."""
    resampling._kernels.clear()
    yield
    resampling._kernels.clear()


def nearly_equal(classes: int, height: int, width: int, seed: int = 0) -> NDArray[np.float32]:
    """Return logits whose classes differ in their last bits alone."""
    random = np.random.default_rng(seed)
    logits = np.repeat(random.standard_normal((1, height, width), np.float32), classes, 0)
    logits.view(np.int32)[:] += random.integers(-1, 2, logits.shape, np.int32)
    return logits


def compile_changed(folder: Path, part: str, other: str) -> ctypes.CDLL:
    source = SOURCE.read_text("utf-8")
    assert part in source
    changed = folder / "resampling.c"
    changed.write_text(source.replace(part, other), "utf-8")
    kernel = compile_sources([changed], RESAMPLING_SIGNATURES)
    assert kernel
    return kernel


def unused(logits: NDArray[np.float32], height: int, width: int) -> NDArray[np.uint8]:
    raise AssertionError("PyTorch is not needed")


@needs_compiler
@pytest.mark.parametrize(
    ("classes", "before", "after"),
    [
        (13, (48, 64), (150, 200)),
        (3, (20, 33), (57, 101)),
        (2, (60, 50), (17, 8)),
        (1, (5, 5), (9, 9)),
        (255, (1, 1), (3, 70)),
        (4, (31, 7), (31, 130)),
        (5, (7, 90), (80, 47)),
    ],
)
def test_labels_are_those_of_pytorch_to_the_last_bit(
    classes: int, before: tuple[int, int], after: tuple[int, int]
) -> None:
    kernel = resampling._find_kernel(_label_resized, _label_probe)
    if kernel is None and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("PyTorch rounds in another way here")
    assert kernel
    for seed in range(3):
        logits = nearly_equal(classes, *before, seed)
        found = resampling._label(kernel, logits, *after)
        assert (found == _label_resized(logits, *after)).all()


def regions(height: int, width: int, margin: float, seed: int) -> NDArray[np.float32]:
    """Return logits of six classes; in squares of 24 pixels one is larger by about a margin."""
    random = np.random.default_rng(seed)
    logits = 100 * np.repeat(random.standard_normal((1, height, width)), 6, 0)
    squares = random.integers(0, 6, (-(-height // 24), -(-width // 24)))
    largest = squares.repeat(24, 0).repeat(24, 1)[:height, :width]
    steps = margin * random.uniform(1, 2, (height, width))
    return (logits + steps * (np.arange(6)[:, None, None] == largest)).astype(np.float32)


@needs_compiler
@pytest.mark.parametrize("margin", [5.0, 1e-3, 1e-4, 3e-5])
def test_labels_of_large_regions_are_those_of_pytorch(margin: float, tmp_path: Path) -> None:
    kernel = resampling._find_kernel(_label_resized, _label_probe)
    if kernel is None:
        pytest.skip("PyTorch rounds in another way here")
    without = compile_changed(tmp_path, "#define ROUNDING 1e-6f", "#define ROUNDING -1.0f")
    wrong = 0
    for seed in range(3):
        logits = regions(70, 90, margin, seed)
        expected = _label_resized(logits, 210, 280)
        assert (resampling._label(kernel, logits, 210, 280) == expected).all()
        wrong += (resampling._label(without, logits, 210, 280) != expected).sum()
    assert (wrong > 0) == (margin < 1e-4), "rounding decides no pixel, or too many"


def noise(height: int, width: int, channels: int = 3) -> NDArray[np.uint8]:
    shape = height, width, channels
    return np.random.default_rng(height).integers(0, 256, shape, np.uint8)


@needs_compiler
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((600, 800), (192, 256)),
        ((48, 64), (150, 200)),
        ((31, 97), (17, 13)),
        ((40, 40), (40, 9)),
        ((1, 1), (3, 2)),
        ((5, 700), (4, 1)),
    ],
)
def test_resized_images_are_those_of_pillow_to_the_last_bit(
    before: tuple[int, int], after: tuple[int, int]
) -> None:
    def unused(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
        raise AssertionError("Pillow is not needed")

    # The kernel is found with Pillow, and stored for the function that is not needed, too.
    resampling._kernels[unused] = resampling._find_kernel(resize_image, _resize_probe)
    image, size = noise(*before), after[::-1]
    assert (resize_compiled(image, size, unused) == resize_image(image, size)).all()
    reversed_image = image[::-1]
    found = resize_compiled(reversed_image, size, unused)
    assert (found == resize_image(reversed_image, size)).all()
    del resampling._kernels[unused]


@pytest.mark.parametrize(
    "image",
    [noise(50, 60, 1), noise(50, 60, 4), noise(50, 60).astype(np.uint16), noise(190, 12)],
    ids=["grey", "four bands", "16 bits", "rows first"],
)
def test_pillow_resizes_what_the_kernel_does_not_know(image: NDArray[np.uint8]) -> None:
    called = []

    def count(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
        called.append(size)
        return resize_image(image, size)

    found = resize_compiled(image, (10, 20), count)
    assert (found == resize_image(image, (10, 20))).all()
    assert called == [(10, 20)]


@needs_compiler
@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("sums[r] = HALF - (pixel){0};", "sums[r] = (pixel){0};"),
        ("sums[x] = HALF;", "sums[x] = HALF + 1000;"),
        ("#define WEIGHT_BITS 22", "#define WEIGHT_BITS 21"),
    ],
)
def test_a_kernel_that_resizes_otherwise_is_not_used(tmp_path: Path, part: str, other: str) -> None:
    kernel = compile_changed(tmp_path, part, other)
    assert not resampling._agrees(kernel, resize_image, _resize_probe)


@needs_compiler
@pytest.mark.parametrize(
    ("part", "other"),
    [
        (
            "return fmaf(first, 1 - weight, second * weight);",
            "return fmaf(second, weight, first * (1 - weight));",
        ),
        ("fmaf(k + 0.5f, scale, -0.5f)", "(float)((k + 0.5f) * scale * 1.0000001f - 0.5f)"),
        ("#define GROUP 8", "#define GROUP 1"),
        ("value > best[j] ? (int32_t)k", "value >= best[j] ? (int32_t)k"),
    ],
)
def test_a_kernel_that_rounds_or_chooses_otherwise_is_not_used(
    tmp_path: Path, part: str, other: str
) -> None:
    kernel = compile_changed(tmp_path, part, other)
    assert not resampling._agrees(kernel, _label_resized, _label_probe)


def test_pytorch_labels_without_a_compiler(monkeypatch: pytest.MonkeyPatch, no_cache: None) -> None:
    monkeypatch.setenv("USEG_KERNELS", "off")
    logits = nearly_equal(3, 6, 8)
    assert (label_compiled(logits, 12, 16, _label_resized) == _label_resized(logits, 12, 16)).all()


def test_no_thread_waits_while_another_one_compiles(no_cache: None) -> None:
    logits = nearly_equal(3, 6, 8)
    with resampling._compile_lock:
        labels = label_compiled(logits, 12, 16, _label_resized)
    assert (labels == _label_resized(logits, 12, 16)).all()
    assert not resampling._kernels


@pytest.mark.parametrize("after", [(6, 8), (90, 7)])
def test_pytorch_labels_what_keeps_its_size_and_what_is_narrow(after: tuple[int, int]) -> None:
    logits = nearly_equal(3, 6, 8)
    assert (label_compiled(logits, *after, _label_resized) == _label_resized(logits, *after)).all()
    if resampling._find_kernel(_label_resized, _label_probe):
        with pytest.raises(AssertionError, match="not needed"):
            label_compiled(logits, *after, unused)


def test_a_predictor_compiles_when_it_has_labelled_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def count(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(values: NDArray[Any], *rest: Any, **reference: Any) -> NDArray[Any]:
            called.append(values.shape)
            result: NDArray[Any] = function(values, *rest, **reference)
            return result

        return counted

    monkeypatch.setattr(resampling, "resize_compiled", count(resize_compiled))
    monkeypatch.setattr(resampling, "label_compiled", count(label_compiled))
    monkeypatch.setattr(predictor, "MIN_COMPILED_LOGITS", 4 * 96 * 128)
    model = make_predictor(make_model(working=WorkingSize((32, 24))))
    image = random_image(96, 128)
    first = model(image)
    assert not called
    assert (model(image) == first).all()
    assert called == [(96, 128, 3), (4, 24, 32)]
    assert (model(image) == model.probabilities(image).argmax(0)).all()
