"""Sizes, bands and mirroring, against brute force and hand-computed values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_data import build_samples, write_tiff_dataset

from useg.errors import DataError
from useg.images.image_files import resize_image
from useg.models.geometry import (
    Geometry,
    WorkingSize,
    fit_bands,
    next_multiple,
    output_size,
    reflect_indices,
    round_up,
    standardize,
)
from useg.models.unet import UNet
from useg.training.batches import pixel_statistics


def test_nan_and_infinity_are_replaced_before_resizing(tmp_path: Path) -> None:
    image = np.arange(24, dtype=np.float32).reshape(3, 4, 2)
    image[0, 0] = np.nan
    image[1, 1, 0], image[2, 2, 1] = np.inf, -np.inf
    image[:, 3, 1] = np.nan
    band = image[..., 0][np.isfinite(image[..., 0])]
    fitted = fit_bands(image, 2, "float32", "x.tif")
    assert np.isfinite(fitted).all()
    assert (fitted[0, 0, 0], fitted[1, 1, 0]) == (np.float32(band.mean()), band.max())
    assert fitted[2, 2, 1] == np.nanmin(image[..., 1][np.isfinite(image[..., 1])])
    known = np.isfinite(image)
    assert (fitted[known] == image[known]).all()
    assert not fit_bands(np.full((2, 2, 1), np.nan, np.float32), 1, "float32", "x.tif").any()
    sample = build_samples(
        write_tiff_dataset(tmp_path, [image]), 2, "float32", WorkingSize(scale=2.0)
    )[0]
    assert np.isfinite(sample.image).all(), "before resizing, which would spread it"
    assert np.isfinite(
        pixel_statistics(build_samples(write_tiff_dataset(tmp_path, [image]), 2, "float32"))
    ).all()


def test_bands_are_repeated_or_refused() -> None:
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
    assert (fit_bands(grey, 3, "uint8", "x.png") == np.repeat(grey, 3, 2)).all()
    with pytest.raises(DataError, match=r"x.png has 1 band, but 4 are needed"):
        fit_bands(grey, 4, "uint8", "x.png")
    with pytest.raises(DataError, match=r"x.png holds uint8 pixels, but .* uint16"):
        fit_bands(grey, 1, "uint16", "x.png")


@pytest.mark.parametrize(
    ("working", "picture", "expected"),
    [
        (WorkingSize((256, 192)), (800, 600), (256, 192)),
        (WorkingSize((256, 192)), (600, 800), (192, 256)),
        (WorkingSize((100, 100)), (1, 10_000), (1, 10_000)),
        (WorkingSize(scale=0.5), (512, 301), (256, 150)),
        (WorkingSize(), (1, 1), (1, 1)),
    ],
)
def test_working_size_keeps_the_area_of_the_frame_or_the_scale(
    working: WorkingSize, picture: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert working.of(*picture) == expected


def test_standardised_images_have_one_brightness_and_contrast_and_keep_their_colours() -> None:
    image = np.random.default_rng(0).integers(60, 160, (40, 50, 3), np.uint8)
    for given_image in (image, image // 2, image + 90):
        found = standardize(given_image).astype(float)
        assert (abs(found.mean() - 120) < 0.5, abs(found.std() - 56) < 1) == (True, True)
        # A brighter band stays brighter, and one that is equal stays equal.
        order = given_image[..., 0] < given_image[..., 1]
        assert (found[..., 0] < found[..., 1])[order].all()
    assert (standardize(np.full((4, 4, 1), 7, np.uint8)) == 120).all()
    # The noise of an empty image grows by at most 56 / 8.
    assert np.ptp(standardize(np.tile(np.uint8([[[3], [4]]]), (9, 9, 1)))) == 7


def test_images_are_resized_and_standardised_only_if_the_model_wants_that() -> None:
    image = np.random.default_rng(0).integers(0, 90, (40, 60, 3), np.uint8)
    assert WorkingSize((60, 40)).prepare(image) is image
    for size in (None, (24, 16)):
        reduced = resize_image(image, size or (30, 20))
        assert (WorkingSize((30, 20)).prepare(image, size) == reduced).all()
        found = WorkingSize((30, 20), standardize=True).prepare(image, size)
        assert (found == standardize(reduced)).all()


def test_training_sees_the_standardised_images_that_prediction_sees(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 90, (40, 60, 3), np.uint8)
    working = WorkingSize((30, 20), standardize=True)
    dataset = write_tiff_dataset(tmp_path, [image])
    plain = build_samples(dataset, working=WorkingSize((30, 20)))[0].image
    found = build_samples(dataset, working=working)[0].image
    assert (found == standardize(np.asarray(plain))).all()
    assert (found != plain).any()


@given(st.integers(0, 500), st.integers(1, 40))
def test_multiples_equal_a_search(value: int, step: int) -> None:
    found = value
    while found % step:
        found += 1
    assert round_up(value, step) == found
    assert next_multiple(value, step) == (found or step)


@given(st.integers(-50, 50), st.integers(1, 7))
def test_mirroring_equals_walking_to_and_fro(index: int, length: int) -> None:
    row = [*range(length), *reversed(range(length))]
    assert reflect_indices(np.array([index]), length) == row[index % len(row)]


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("size", [(1, 1), (20, 33), (64, 47)])
def test_output_size_is_the_smallest_that_fits(padding: str, size: tuple[int, int]) -> None:
    network = UNet(1, 2, width=1, depth=2, padding=padding)  # type: ignore[arg-type]
    accepted = {
        side - 2 * network.margin for side in range(1, 200) if network.valid_size(side) == side
    }
    expected = tuple(min(out for out in accepted if out >= side) for side in size)
    assert output_size(network, size) == expected
    geometry = Geometry(network.margin, network.stride, network.context, network.valid_size)
    assert output_size(geometry, size) == expected


def test_halo_is_the_context_rounded_up_to_the_stride_if_the_network_pads() -> None:
    assert Geometry(0, 16, 93, lambda size: size).halo == 96
    assert Geometry(92, 16, 93, lambda size: size).halo == 0
