"""Parts of resized pictures and logits = parts of what Pillow and PyTorch make of the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from useg.images.image_files import resize_image
from useg.inference import resampling
from useg.inference.resampling import LogitsPart, ResizedView, bilinear_source, resize_logits_part

LENGTH = st.integers(1, 70)


def part(data: st.DataObject, length: int) -> slice:
    first = data.draw(st.integers(0, length - 1))
    return slice(first, data.draw(st.integers(first + 1, length)))


@given(
    st.data(),
    st.sampled_from([("u1", 1), ("u1", 3), ("u1", 4), ("u2", 2), ("f4", 1)]),
    LENGTH,
    LENGTH,
    LENGTH,
    LENGTH,
)
def test_parts_of_a_resized_picture_are_pillows_to_the_bit(data, kind, height, width, h, w):
    rng = np.random.default_rng(height * width)
    image = rng.integers(0, 256, (height, width, kind[1])).astype(kind[0]) * np.array(
        257 if kind[0] == "u2" else 1, kind[0]
    )
    image = image + rng.random(image.shape, np.float32) if kind[0] == "f4" else image
    rows, columns = part(data, h), part(data, w)
    assert np.array_equal(
        ResizedView(image, image.dtype, (w, h))[rows, columns],
        resize_image(image, (w, h))[rows, columns],
    )


def test_a_strong_reduction_reads_the_picture_piece_by_piece(monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (900, 700, 3), np.uint8)
    monkeypatch.setattr(resampling, "MAX_READ_PIXELS", 20_000)
    read = []

    class Watched:
        shape = image.shape

        def __getitem__(self, place):
            read.append(image[place].size)
            return image[place]

    small = ResizedView(Watched(), image.dtype, (35, 40))
    assert np.array_equal(small[0:40, 0:35], resize_image(image, (35, 40)))
    assert max(read) < 3 * 4 * 20_000


@given(st.data(), LENGTH, LENGTH, st.integers(1, 300), st.integers(1, 300))
def test_parts_of_enlarged_logits_are_pytorchs(data, h, w, height, width):
    logits = np.random.default_rng(h * w).normal(size=(2, h, w)).astype(np.float32)
    whole = F.interpolate(
        torch.from_numpy(logits)[None], (height, width), mode="bilinear", align_corners=False
    )[0].numpy()
    rows, columns = part(data, height), part(data, width)
    held = bilinear_source(h, height, rows), bilinear_source(w, width, columns)
    corner = held[0].start, held[1].start
    answer = resize_logits_part(
        LogitsPart(logits[:, held[0], held[1]], corner, (h, w)), (height, width), rows, columns
    )
    np.testing.assert_allclose(answer, whole[:, rows, columns], rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [(3, 2), (40, 30)])
def test_the_same_size_is_the_picture_itself(size):
    image = np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(size[1], size[0], 3)
    assert np.array_equal(ResizedView(image, image.dtype, size)[0:2, 1:3], image[0:2, 1:3])
