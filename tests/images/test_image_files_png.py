"""PNG files: what is written is read back by another program, and what is read quickly is what
Pillow reads.
"""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from useg.classes import CARLA
from useg.errors import UsageError
from useg.images import decode
from useg.images.image_files import (
    decode_image,
    encode_png,
    has_mark,
    read_mask,
    read_palette,
    write_label,
)

pytestmark = pytest.mark.wheel

PIXELS = np.random.default_rng(0).integers(0, 256, (21, 30, 4), np.uint8)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([(), (3,)]).flatmap(
        lambda bands: st.tuples(st.integers(1, 9), st.integers(1, 9)).map(
            lambda size: (*size, *bands)
        )
    ),
    st.data(),
)
def test_others_read_what_is_written(shape: tuple[int, ...], data: st.DataObject) -> None:
    pixels = data.draw(arrays(np.uint8, shape))
    with PIL.Image.open(io.BytesIO(encode_png(pixels, mark="a mark"))) as opened:
        assert opened.mode == ("L" if pixels.ndim == 2 else "RGB")
        assert opened.info["useg"] == "a mark"
        assert (np.array(opened) == pixels).all()


def test_indices_and_their_colours() -> None:
    colors = np.arange(60, dtype=np.uint8).reshape(20, 3)
    indices = PIXELS[..., 0] % 20
    with PIL.Image.open(io.BytesIO(encode_png(indices, colors))) as opened:
        assert opened.mode == "P"
        assert (np.array(opened) == indices).all()
        assert opened.getpalette() == colors.ravel().tolist()


def test_rows_that_lie_apart_in_memory() -> None:
    with PIL.Image.open(io.BytesIO(encode_png(PIXELS[::2, ::-1, :3]))) as opened:
        assert (np.array(opened) == PIXELS[::2, ::-1, :3]).all()


def test_a_mark_changes_nothing_else(tmp_path: Path) -> None:
    label = PIXELS[..., 0] % 13
    write_label(tmp_path / "a.png", label, CARLA, "a mark")
    assert (read_mask(tmp_path / "a.png") == label).all()
    colors = read_palette(tmp_path / "a.png")
    assert colors is not None
    assert tuple(colors[12]) == CARLA.colors[12]
    assert has_mark(tmp_path / "a.png", "a mark")
    assert not any(
        has_mark(tmp_path / name, mark)
        for name, mark in (
            ("a.png", "a mar"),
            ("a.png", "a mark!"),
            ("a.png", ""),
            ("b.png", "a mark"),
        )
    )


def written(bands: int, chunk: bytes = b"", content: bytes = b"", **options: object) -> bytes:
    """A PNG as Pillow writes it, with another chunk before its pixels."""
    target = io.BytesIO()
    PIL.Image.fromarray(PIXELS[..., :bands]).save(target, "PNG", **options)
    file = target.getvalue()
    extra = (
        len(content).to_bytes(4, "big")
        + chunk
        + content
        + zlib.crc32(chunk + content).to_bytes(4, "big")
        if chunk
        else b""
    )
    return file[:33] + extra + file[33:]


ODD = {
    "plain": written(3),
    "alpha": written(4),
    "one colour transparent": written(3, transparency=(1, 2, 3)),
    "gamma": written(3, b"gAMA", (100_000).to_bytes(4, "big")),
    "significant bits": written(3, b"sBIT", bytes((5, 5, 5))),
    "background": written(4, b"bKGD", bytes(6)),
    "a chunk of somebody's": written(3, b"abCd", b"text"),
    "turned": written(
        3, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_the_fast_decoder_reads_what_pillow_reads(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = decode_image(ODD[name])
    assert quick.flags.c_contiguous
    monkeypatch.setattr(decode, "_decode_plain_png", lambda file, size: None)
    assert np.array_equal(quick, decode_image(ODD[name]))
    assert np.array_equal(
        quick, np.rot90(PIXELS[..., :3], -1) if name == "turned" else PIXELS[..., :3]
    )


def test_the_fast_decoder_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        PIL.ImageFile.ImageFile, "load", lambda opened: pytest.fail("Pillow decoded")
    )
    for name in ODD:
        decode_image(ODD[name])


def test_damage_is_refused_with_the_usual_sentence() -> None:
    for cut in (60, len(ODD["plain"]) // 2, len(ODD["plain"]) - 40):
        with pytest.raises(UsageError, match="damaged or incomplete"):
            decode_image(ODD["plain"][:cut])
