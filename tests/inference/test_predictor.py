"""From image to label map: working size, bands, windows, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_inference import make_model, make_predictor, make_runtime, random_image
from torch.nn import functional as F

from useg.classes import ClassTable, softmax
from useg.errors import UsageError
from useg.images.image_files import read_image, resize_image
from useg.inference.predictor import AUGMENTATIONS, AugmentedView, Predictor
from useg.models.geometry import WorkingSize, standardize
from useg.models.segmenter import Segmenter, save_model


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("shape", [(1, 1), (13, 40), (64, 48)])
def test_label_map_is_the_most_probable_class(padding: str, shape: tuple[int, int]) -> None:
    predictor = make_predictor(make_model(padding))
    image = random_image(*shape)
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
    image = random_image(150, 130)
    assert (predictor(image, tile=64) == predictor(image, tile=0)).all()
    np.testing.assert_allclose(
        predictor.probabilities(image, tile=64), predictor.probabilities(image, tile=0), atol=1e-5
    )


def test_prediction_at_the_working_size_enlarges_logits_not_labels() -> None:
    model = make_model(working=WorkingSize((32, 24)))
    image = random_image(96, 128)
    reduced = torch.from_numpy(resize_image(image, (32, 24))).permute(2, 0, 1)[None]
    with torch.inference_mode():
        expected = F.interpolate(model(reduced), (96, 128), mode="bilinear", align_corners=False)[
            0
        ].softmax(0)
    np.testing.assert_allclose(
        make_predictor(model).probabilities(image), expected.numpy(), atol=1e-5
    )


@pytest.mark.parametrize("tile", [None, 16])
def test_standardised_images_are_standardised_as_a_whole_before_they_are_cut(
    tile: int | None,
) -> None:
    model = make_model(working=WorkingSize((64, 48), standardize=True))
    dark = random_image(96, 128) // 4
    reduced = standardize(resize_image(dark, (64, 48)))
    with torch.inference_mode():
        logits = model(torch.from_numpy(reduced).permute(2, 0, 1)[None])
        expected = F.interpolate(logits, (96, 128), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(
        make_predictor(model).logits(dark, tile), expected[0].numpy(), atol=1e-4
    )


def test_grey_pictures_fit_a_colour_model_and_plain_arrays_a_grey_one() -> None:
    grey = random_image(20, 20, 1)
    assert (
        make_predictor(make_model())(grey) == make_predictor(make_model())(np.repeat(grey, 3, 2))
    ).all()
    predictor = make_predictor(make_model(channels=1))
    assert (predictor(grey[..., 0]) == predictor(grey)).all()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (random_image(8, 8, 4), "has 4 bands, but 3 are needed"),
        (random_image(8, 8).astype(np.float32), "holds float32 values from .* or fractions from 0"),
        (np.zeros((0, 4, 3), np.uint8), "with at least one pixel"),
        (np.zeros((1, 2, 3, 4, 5), np.uint8), r"has the shape \(1, 2, 3, 4, 5\)"),
    ],
)
def test_images_of_other_bands_or_types_are_refused(image: np.ndarray, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_predictor(make_model())(image)


def test_pixels_may_lie_in_memory_in_any_way() -> None:
    predictor, image = (
        make_predictor(make_model(working=WorkingSize((32, 24)))),
        random_image(40, 50),
    )
    for turned in (
        image[::-1, ::-1],
        image[..., ::-1],
        image.transpose(1, 0, 2),
        image[::2, 1::3],
        np.asfortranarray(image),
    ):
        assert (predictor(turned) == predictor(np.ascontiguousarray(turned))).all()
    read_only = image.copy()
    read_only.flags.writeable = False
    assert (predictor(read_only) == predictor(image)).all()


@pytest.mark.parametrize("number", [np.uint16, np.int64, np.int8, bool])
def test_other_number_types_are_refused_not_converted(number: type) -> None:
    with pytest.raises(
        UsageError,
        match=rf"holds {np.dtype(number)} pixels, but the others \(or the model\) have uint8;",
    ):
        make_predictor(make_model())(random_image(8, 8).astype(number))


COLOUR, GREY = random_image(12, 17), random_image(12, 17, 1)[..., 0]
DEEP = np.random.default_rng(0).integers(0, 65536, (12, 17), np.uint16)


@pytest.mark.parametrize(
    ("name", "made", "same_as"),
    [
        ("rgb.png", lambda: PIL.Image.fromarray(COLOUR), COLOUR),
        ("rgba.png", lambda: PIL.Image.fromarray(np.dstack([COLOUR, GREY])), COLOUR),
        (
            "rgba.tif",
            lambda: PIL.Image.fromarray(
                np.dstack([COLOUR, np.where(GREY > 99, 255, 0).astype(np.uint8)])
            ),
            COLOUR,
        ),
        ("grey.png", lambda: PIL.Image.fromarray(GREY), np.dstack([GREY] * 3)),
        (
            "grey-alpha.png",
            lambda: PIL.Image.fromarray(np.dstack([GREY, GREY]), "LA"),
            np.dstack([GREY] * 3),
        ),
        ("palette.png", lambda: PIL.Image.fromarray(GREY).convert("P"), np.dstack([GREY] * 3)),
        (
            "one-bit.png",
            lambda: PIL.Image.fromarray(GREY > 99),
            np.dstack([np.where(GREY > 99, 255, 0).astype(np.uint8)] * 3),
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
def test_files_of_every_kind_fit_a_colour_model(
    name: str, made: Callable[[], PIL.Image.Image], same_as: np.ndarray, tmp_path: Path
) -> None:
    made().save(tmp_path / name)
    predictor = make_predictor(make_model())
    assert (predictor(read_image(tmp_path / name)) == predictor(same_as)).all()


def test_files_of_16_bits_do_not_fit_a_model_of_8_bits_nor_the_other_way_round(
    tmp_path: Path,
) -> None:
    PIL.Image.fromarray(DEEP).save(tmp_path / "deep.png")
    with pytest.raises(
        UsageError,
        match=r"the image holds uint16 pixels, but the others .* have uint8; convert it to uint8",
    ):
        make_predictor(make_model())(read_image(tmp_path / "deep.png"))
    deep = make_predictor(make_model(pixels="uint16"))
    assert deep(read_image(tmp_path / "deep.png")).shape == (12, 17)
    with pytest.raises(
        UsageError, match=r"the image holds uint8 pixels, but the others .* have uint16"
    ):
        deep(GREY)


def test_16_bit_images_are_labelled() -> None:
    image = np.random.default_rng(0).integers(0, 65536, (16, 16, 2)).astype(np.uint16)
    assert make_predictor(make_model(channels=2, pixels="uint16"))(image).shape == (16, 16)


def test_a_saved_model_predicts_the_same(tmp_path: Path) -> None:
    model = make_model(working=WorkingSize(scale=0.5))
    save_model(model, tmp_path / "model.safetensors")
    image = random_image(50, 70)
    for path in (tmp_path, str(tmp_path / "model.safetensors")):
        assert (
            Predictor.load(path).probabilities(image) == make_predictor(model).probabilities(image)
        ).all()


@given(
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.sampled_from([view for views in AUGMENTATIONS.values() for view in views]),
)
def test_the_output_of_a_rotated_image_is_rotated_back(
    shape: tuple[int, int], view: AugmentedView
) -> None:
    image = random_image(*shape)
    assert (view.undo(view.apply(image).transpose(2, 0, 1)) == image.transpose(2, 0, 1)).all()


@pytest.mark.parametrize(
    ("name", "count"), [("none", 1), ("flip", 2), ("flips", 4), ("turns", 8), ("scales", 3)]
)
def test_no_two_views_are_alike_and_the_first_is_the_picture_itself(name: str, count: int) -> None:
    image, views = random_image(4, 3), AUGMENTATIONS[name]
    assert (
        len({view.apply(resize_image(image, view.size(3, 4))).tobytes() for view in views})
        == len(views)
        == count
    )
    assert any(
        (view.apply(image) == image).all()
        for view in views
        if view.scale == 1 and not view.transpose
    )


def by_pixel(predictor: Predictor, augment: str) -> Predictor:
    """A stand-in that turns with the picture: each pixel's logits depend on that pixel alone."""
    weights = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32) / 20
    margin = predictor.runtime.description.margin

    def run(x: np.ndarray) -> np.ndarray:
        return np.einsum(
            "kc,nchw->nkhw",
            weights,
            x[..., margin : x.shape[2] - margin, margin : x.shape[3] - margin].astype(np.float32),
        )

    return Predictor(replace(predictor.runtime, run=run), augment=augment)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("working", [None, WorkingSize((32, 24))])
@pytest.mark.parametrize("augment", ["flip", "flips", "turns"])
def test_augmentation_undoes_itself(
    padding: str, working: WorkingSize | None, augment: str
) -> None:
    predictor = make_predictor(make_model(padding, working=working))
    for shape, tile in (((1, 1), 0), ((13, 40), 0), ((37, 21), 0), ((90, 30), 48)):
        image = random_image(*shape)
        plain, augmented = (by_pixel(predictor, name) for name in ("none", augment))
        np.testing.assert_allclose(
            augmented.probabilities(image, tile), plain.probabilities(image, tile), atol=1e-6
        )
        np.testing.assert_allclose(
            softmax(augmented.logits(image, tile)), plain.probabilities(image, tile), atol=1e-6
        )
        assert (augmented(image, tile) == plain(image, tile)).all()


def test_scales_agree_where_there_is_one_colour() -> None:
    plain, augmented = (by_pixel(make_predictor(make_model()), name) for name in ("none", "scales"))
    for shape in ((1, 1), (3, 50)):
        image = np.full((*shape, 3), (9, 80, 200), np.uint8)
        np.testing.assert_allclose(
            augmented.probabilities(image), plain.probabilities(image), atol=1e-6
        )


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("augment", ["turns", "scales"])
def test_the_network_sees_sizes_that_it_takes(padding: str, augment: str) -> None:
    runtime, seen = make_predictor(make_model(padding)).runtime, []

    def run(x: np.ndarray) -> np.ndarray:
        seen.append(x.shape[2:])
        return runtime.run(x)

    for shape in ((1, 1), (13, 41)):
        assert (
            Predictor(replace(runtime, run=run), augment=augment)(random_image(*shape)).shape
            == shape
        )
    assert {runtime.description.valid_size(side) - side for sides in seen for side in sides} == {0}
    assert len(set(seen)) > 2


def test_augmentation_is_the_mean_of_the_calibrated_probabilities() -> None:
    model = make_model(working=WorkingSize(scale=0.5))
    model.temperature = 0.5
    # With even sides, halving the image commutes with flips.
    plain, image = make_predictor(model), random_image(30, 44)
    expected = np.mean(
        [
            plain.probabilities(image[::down, ::across])[:, ::down, ::across]
            for down, across in product((1, -1), (1, -1))
        ],
        axis=0,
    )
    augmented = Predictor(plain.runtime, augment="flips")
    np.testing.assert_allclose(augmented.probabilities(image), expected, atol=1e-5)
    assert np.abs(augmented.probabilities(image) - plain.probabilities(image)).max() > 1e-3, (
        "a network does not turn with the picture"
    )
    np.testing.assert_allclose(
        softmax(augmented.logits(image), augmented.temperature), expected, atol=1e-5
    )
    assert (augmented(image) == augmented.probabilities(image).argmax(0)).all()
    assert (plain.temperature, augmented.temperature) == (0.5, 1)


def two_models() -> tuple[Segmenter, Segmenter]:
    first, second = (
        make_model(working=WorkingSize((32, 24))),
        make_model("valid", working=WorkingSize(scale=0.7), seed=1),
    )
    first.temperature, second.temperature = 0.5, 2.0
    return first, second


def test_an_ensemble_is_the_mean_of_the_calibrated_probabilities() -> None:
    alone = [make_predictor(model) for model in two_models()]
    together = Predictor(*(predictor.runtime for predictor in alone))
    image = random_image(25, 41)
    expected = np.mean([predictor.probabilities(image) for predictor in alone], axis=0)
    np.testing.assert_allclose(together.probabilities(image), expected, atol=1e-6)
    np.testing.assert_allclose(
        softmax(together.logits(image), together.temperature), expected, atol=1e-6
    )
    assert (together(image) == expected.argmax(0)).all()
    assert (together(image, tile=64) == together(image, tile=0)).all()
    assert together.classes == alone[0].classes
    assert not together.is_single
    flipped = np.mean(
        [Predictor(predictor.runtime, augment="flip").probabilities(image) for predictor in alone],
        axis=0,
    )
    np.testing.assert_allclose(
        Predictor(*together.runtimes, augment="flip").probabilities(image),
        flipped,
        atol=1e-6,
    )


def test_logits_of_an_ensemble_are_finite_where_a_class_is_impossible() -> None:
    runtime = make_predictor(make_model()).runtime

    def sure(x: np.ndarray) -> np.ndarray:
        return 1000 * runtime.run(x)

    together = Predictor(*[replace(runtime, run=sure)] * 2)
    assert (together.probabilities(random_image(8, 8)) == 0).any()
    assert np.isfinite(together.logits(random_image(8, 8))).all()


def test_models_with_commas_between_them_are_an_ensemble(tmp_path: Path) -> None:
    image = random_image(20, 30)
    for name, model in zip(("a", "b"), two_models(), strict=True):
        (tmp_path / name).mkdir()
        save_model(model, tmp_path / name / "model.safetensors")
    names = f"{tmp_path / 'a'},{tmp_path / 'b'}"
    together = Predictor.load(names)
    assert (together(image) == Predictor(*map(make_runtime, two_models()))(image)).all()
    assert (
        Predictor.load(Path(names), augment="flip").name
    ) == f"{tmp_path / 'a'}, {tmp_path / 'b'} (flip)"
    (tmp_path / "a").rename(tmp_path / "a,c")
    assert Predictor.load(tmp_path / "a,c").is_single
    assert Predictor.load(tmp_path / "a,c").name == str(tmp_path / "a,c")


def test_models_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    runtime = make_runtime(make_model())
    card = runtime.description
    other = replace(
        runtime,
        source=Path("other"),
        description=replace(card, classes=ClassTable(("a", "c", "b", "d"))),
    )
    with pytest.raises(
        UsageError,
        match=r"memory has the classes a, b, c, d, but other has a, c, b, d; an ensemble needs",
    ):
        Predictor(runtime, other)
    with pytest.raises(
        UsageError,
        match="memory takes images with 3 bands of uint8, but memory 1 bands of uint8; an ensemble",
    ):
        Predictor(runtime, replace(runtime, description=replace(card, channels=1)))
    with pytest.raises(
        UsageError,
        match="'run,' lacks a model before or after a comma; give RUN, or RUN,RUN",
    ):
        Predictor.load("run,")
    with pytest.raises(
        UsageError,
        match=r"augmentation 'flp' is not known; choose one of flip, .*; did you mean 'flip'",
    ):
        Predictor.load("nowhere", augment="flp")
    with pytest.raises(UsageError, match="augmentation 'mirror' is not known"):
        Predictor(runtime, augment="mirror")
