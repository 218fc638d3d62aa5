"""The overlap of windows that a network with a very large receptive field really needs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from useg.inference import tiles
from useg.inference.tiles import (
    MIN_OVERLAP_STRIDES,
    crop_center,
    find_sufficient_overlap,
    measure_overlaps,
)
from useg.models.geometry import Geometry

STRIDE, REACH = 8, 120
GEOMETRY = Geometry(0, STRIDE, REACH, lambda size: -(-size // STRIDE) * STRIDE)
IMAGE = np.random.default_rng(0).normal(size=(320, 360, 1)).astype(np.float32)


def blurred(reach: float) -> NDArray[np.float32]:
    """Weights of a blur of ``REACH`` pixels; those further than ``reach`` hardly count."""
    return np.exp(-np.abs(np.arange(-REACH, REACH + 1)) / reach).astype(np.float32)


def network(reach: float):
    weights = torch.from_numpy(blurred(reach))

    def run(x: NDArray[np.generic]) -> NDArray[np.float32]:
        pixels = F.conv2d(
            torch.from_numpy(np.ascontiguousarray(x)), weights.view(1, 1, -1, 1), padding=(REACH, 0)
        )
        pixels = F.conv2d(pixels, weights.view(1, 1, 1, -1), padding=(0, REACH))
        logits: NDArray[np.float32] = torch.cat([pixels, -pixels], 1).numpy()
        return logits

    return run


def test_agreement_grows_with_the_margin_and_the_exact_margin_agrees_everywhere() -> None:
    curve = measure_overlaps(network(12), IMAGE, GEOMETRY, [0, 16, 32, 64, REACH])
    shares = [margin.agreement for margin in curve]
    assert shares == sorted(shares)
    assert shares[0] < 0.97
    assert shares[-1] == 1
    assert curve[-1].difference < 1e-3 < curve[1].difference


def test_the_smallest_sufficient_overlap_is_chosen() -> None:
    far, near = (
        find_sufficient_overlap(network(12), IMAGE, GEOMETRY),
        find_sufficient_overlap(network(2), IMAGE, GEOMETRY),
    )
    assert near.context == MIN_OVERLAP_STRIDES * STRIDE < far.context < REACH
    assert min(near.agreement, far.agreement) >= 0.999


def test_the_exact_overlap_is_chosen_if_none_suffices() -> None:
    found = find_sufficient_overlap(network(12), IMAGE, GEOMETRY, least=1.5)
    assert (found.context, found.agreement) == (REACH, 1.0)


def test_overlaps_are_measured_for_large_receptive_fields_and_images_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiles, "OVERLAP_SAMPLE_PIXELS", 300)
    assert tiles.overlap_geometry(network(2), IMAGE, GEOMETRY) == GEOMETRY
    monkeypatch.setattr(tiles, "MAX_EXACT_CONTEXT_PIXELS", REACH - 1)
    assert tiles.overlap_geometry(network(2), IMAGE[:300, :300], GEOMETRY) == GEOMETRY
    assert (
        tiles.overlap_geometry(network(2), IMAGE, GEOMETRY).context == MIN_OVERLAP_STRIDES * STRIDE
    )


def test_crop_center_takes_the_middle() -> None:
    assert np.array_equal(crop_center(IMAGE, 100), IMAGE[110:210, 130:230])
    assert np.array_equal(crop_center(IMAGE, 1000), IMAGE)
