"""A predictor takes what people have: files, PIL images, tensors, fractions, batches."""

import pickle
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from made_inference import make_model, make_predictor, random_image

from useg.errors import DataError, ModelError
from useg.inference.predictor import Predictor, load
from useg.models.segmenter import save_model


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return make_predictor(make_model())


@pytest.mark.parametrize("kind", ["file", "text", "PIL", "HWC tensor", "CHW tensor", "CHW array"])
def test_every_form_of_an_image_has_the_same_label_map(
    kind: str, predictor: Predictor, tmp_path: Path
) -> None:
    image = random_image(20, 28)
    file = tmp_path / "image.png"
    PIL.Image.fromarray(image).save(file)
    form = {
        "file": file,
        "text": str(file),
        "PIL": PIL.Image.fromarray(image),
        "HWC tensor": torch.from_numpy(image),
        "CHW tensor": torch.from_numpy(image).permute(2, 0, 1),
        "CHW array": image.transpose(2, 0, 1),
    }[kind]
    assert np.array_equal(predictor(form), predictor(image))  # type: ignore[arg-type]


def test_palettes_and_transparency_of_pil_images_become_colours(predictor: Predictor) -> None:
    image = PIL.Image.fromarray(random_image(16, 16)).quantize(8)
    expected = predictor(np.asarray(image.convert("RGB")))
    assert np.array_equal(predictor(image), expected)
    assert np.array_equal(predictor(image.convert("RGBA")), expected)


def test_fractions_are_scaled_with_a_warning(predictor: Predictor) -> None:
    image = random_image(16, 16)
    with pytest.warns(UserWarning, match="fractions from 0 to 1, which are multiplied by 255"):
        labels = predictor(torch.from_numpy(image).permute(2, 0, 1) / 255)
    assert np.array_equal(labels, predictor(image))


@pytest.mark.parametrize("value", [-0.5, 1.5, np.nan])
def test_other_fractions_are_refused(value: float, predictor: Predictor) -> None:
    image = np.full((8, 8, 3), 0.5)
    image[2, 3, 1] = value
    with pytest.raises(DataError, match="give the stored uint8 values, or fractions from 0 to 1"):
        predictor(image)


def test_a_batch_has_a_label_map_per_image(predictor: Predictor) -> None:
    images = np.stack([np.roll(random_image(16, 20), k, 1) for k in range(3)])
    each = np.stack([predictor(image) for image in images])
    assert np.array_equal(predictor(images), each)
    assert np.array_equal(predictor(list(images)), each)
    assert predictor.probabilities(images).shape == (3, 4, 16, 20)
    assert predictor.logits(torch.from_numpy(images).permute(0, 3, 1, 2)).shape == (3, 4, 16, 20)
    with pytest.raises(DataError, match="a batch holds 20x16 and 24x16; give images of one size"):
        predictor([images[0], random_image(16, 24)])
    with pytest.raises(DataError, match="a batch holds no image"):
        predictor([])


def test_a_pickled_predictor_loads_its_model_again(tmp_path: Path) -> None:
    save_model(make_model(), tmp_path / "model.safetensors")
    predictor, image = load(tmp_path, augment="flip"), random_image(16, 16)
    content = pickle.dumps(predictor)
    assert len(content) < 10_000
    again = pickle.loads(content)
    assert (again.name, np.array_equal(again(image), predictor(image))) == (predictor.name, True)

    save_model(make_model(channels=1), tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="has changed since the predictor was pickled"):
        pickle.loads(content)


def test_a_model_in_memory_cannot_be_pickled(predictor: Predictor) -> None:
    with pytest.raises(ModelError, match="cannot be pickled"):
        pickle.dumps(predictor)
