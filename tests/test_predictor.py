"""From image to label map: working size, bands, windows, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from useg import ClassTable, UsageError
from useg.data.cache import WorkingSize
from useg.data.images import resize_image
from useg.inference import runtimes
from useg.inference.predictor import Predictor
from useg.models.segmenter import Segmenter, save


def make_model(padding: str = "same", channels: int = 3, working: WorkingSize | None = None, pixels: str = "uint8") -> Segmenter:
    torch.manual_seed(0)
    settings = {"encoder": "plain", "channels": channels, "classes": 4, "width": 2, "depth": 2, "padding": padding, "normalize": False}
    return Segmenter(settings, ClassTable(("a", "b", "c", "d")), [100.0] * channels, [50.0] * channels, working, pixels).eval()


def make_predictor(model: Segmenter) -> Predictor:
    return Predictor(runtimes.of_model(model, Path("memory")))


def picture(height: int, width: int, bands: int = 3) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, bands), np.uint8)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("shape", [(1, 1), (13, 40), (64, 48)])
def test_label_map_is_the_most_probable_class(padding: str, shape: tuple[int, int]) -> None:
    predictor = make_predictor(make_model(padding))
    image = picture(*shape)
    probabilities = predictor.probabilities(image)
    assert probabilities.shape == (4, *shape)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(0), 1, rtol=1e-5)
    prediction = predictor(image)
    assert prediction.dtype == np.uint8
    assert (prediction == probabilities.argmax(0)).all()


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_forced_windows_give_the_same_labels(padding: str) -> None:
    predictor = make_predictor(make_model(padding))
    image = picture(150, 130)
    assert (predictor(image, tile=64) == predictor(image, tile=0)).all()
    np.testing.assert_allclose(predictor.probabilities(image, tile=64), predictor.probabilities(image, tile=0), atol=1e-5)


def test_works_at_its_size_and_enlarges_the_logits_not_the_labels() -> None:
    model = make_model(working=WorkingSize((32, 24)))
    image = picture(96, 128)
    reduced = torch.from_numpy(resize_image(image, (32, 24))).permute(2, 0, 1)[None]
    with torch.inference_mode():
        expected = F.interpolate(model(reduced), (96, 128), mode="bilinear", align_corners=False)[0].softmax(0)
    np.testing.assert_allclose(make_predictor(model).probabilities(image), expected.numpy(), atol=1e-5)


def test_grey_pictures_fit_a_colour_model_and_plain_arrays_a_grey_one() -> None:
    grey = picture(20, 20, 1)
    assert (make_predictor(make_model())(grey) == make_predictor(make_model())(np.repeat(grey, 3, 2))).all()
    predictor = make_predictor(make_model(channels=1))
    assert (predictor(grey[..., 0]) == predictor(grey)).all()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (picture(8, 8, 4), "has 4 bands, but 3 are needed"),
        (picture(8, 8).astype(np.float32), "holds float32 pixels"),
        (np.zeros((0, 4, 3), np.uint8), "with at least one pixel"),
        (np.zeros((1, 2, 3, 4), np.uint8), r"has the shape \(1, 2, 3, 4\)"),
    ],
)
def test_other_pictures_are_refused(image: np.ndarray, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_predictor(make_model())(image)


def test_16_bit_pictures() -> None:
    image = np.random.default_rng(0).integers(0, 65536, (16, 16, 2)).astype(np.uint16)
    assert make_predictor(make_model(channels=2, pixels="uint16"))(image).shape == (16, 16)


def test_a_saved_model_predicts_the_same(tmp_path: Path) -> None:
    model = make_model(working=WorkingSize(scale=0.5))
    save(model, tmp_path / "model.safetensors")
    image = picture(50, 70)
    for path in (tmp_path, str(tmp_path / "model.safetensors")):
        assert (Predictor.load(path).probabilities(image) == make_predictor(model).probabilities(image)).all()
