"""Files as people have them -> arrays: every silent trap, and every damaged file as one clear
sentence.
"""

import contextlib
import io
import os
import tempfile
from pathlib import Path

import imagecodecs
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import tifffile
from handmade import chunk, png
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from useg.classes import CAMVID, CARLA, palette
from useg.errors import UsageError
from useg.images import image_files
from useg.images.large_tiff import tiff_declared_pixels
from useg.images.stacks import read_stack

pytestmark = pytest.mark.wheel

GREY = np.arange(5 * 7, dtype=np.uint8).reshape(5, 7) * 7
RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
DEEP = np.random.default_rng(1).integers(0, 65536, (5, 7, 3), np.uint16)


def save(path: Path, array: np.ndarray, mode: str | None = None, **options: object) -> Path:
    PIL.Image.fromarray(array, mode).save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp"])
def test_rgb_comes_back_exactly(tmp_path, suffix):
    path = save(tmp_path / f"a.{suffix}", RGB, **({"lossless": True} if suffix == "webp" else {}))
    image = image_files.read_image(path)
    assert image.dtype == np.uint8
    assert np.array_equal(image, RGB)
    assert image_files.read_size(path) == (7, 5)


def test_a_jpeg_is_read(tmp_path):
    image = image_files.read_image(save(tmp_path / "a.jpg", np.full((16, 16, 3), 77, np.uint8)))
    assert image.shape == (16, 16, 3)
    assert np.abs(image.astype(int) - 77).max() <= 2


def test_a_cmyk_jpeg_becomes_rgb(tmp_path):
    PIL.Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).convert("CMYK").save(tmp_path / "a.jpg")
    assert image_files.read_image(tmp_path / "a.jpg").shape == (8, 8, 3)


def test_grey_stays_one_band(tmp_path):
    assert np.array_equal(image_files.read_image(save(tmp_path / "a.png", GREY)), GREY[..., None])


def test_alpha_is_dropped(tmp_path):
    assert np.array_equal(
        image_files.read_image(save(tmp_path / "a.png", np.dstack([RGB, GREY]))), RGB
    )
    assert np.array_equal(
        image_files.read_image(save(tmp_path / "la.png", np.dstack([GREY, GREY]), "LA")),
        GREY[..., None],
    )


def test_one_bit_is_black_and_white_as_an_image_and_zero_and_one_as_a_mask(tmp_path):
    bits = GREY > 100
    for name in ("a.png", "a.tif", "a.bmp"):
        PIL.Image.fromarray(bits).save(tmp_path / name)
        assert np.array_equal(image_files.read_image(tmp_path / name)[..., 0], bits * 255), name
        assert np.array_equal(image_files.read_mask(tmp_path / name), bits), name


def test_a_one_bit_tiff_with_white_as_zero_shows_white_as_one(tmp_path):
    bits = GREY > 100
    tifffile.imwrite(tmp_path / "a.tif", ~bits, photometric="miniswhite")
    assert np.array_equal(image_files.read_mask(tmp_path / "a.tif"), bits)
    assert np.array_equal(image_files.read_image(tmp_path / "a.tif")[..., 0], bits * 255)


def test_a_palette_is_colours_as_an_image_and_indices_as_a_mask(tmp_path):
    ids = (GREY // 7 % 4).astype(np.uint8)
    picture = PIL.Image.fromarray(ids)
    picture.putpalette(palette(CARLA).tobytes())
    for name in ("a.png", "a.tif", "a.gif", "a.bmp"):
        picture.save(tmp_path / name)
        assert np.array_equal(image_files.read_image(tmp_path / name), palette(CARLA)[ids]), name
    for name in ("a.png", "a.tif", "a.bmp"):  # a GIF's writer renumbers
        assert np.array_equal(image_files.read_mask(tmp_path / name), ids), name
        assert np.array_equal(image_files.read_palette(tmp_path / name)[:4], palette(CARLA)[:4]), (
            name
        )
    assert image_files.read_palette(save(tmp_path / "grey.png", GREY)) is None


def test_sixteen_bit_colour_png_keeps_its_bits(tmp_path):
    (tmp_path / "a.png").write_bytes(png(DEEP, 2, 16))
    assert np.asarray(PIL.Image.open(tmp_path / "a.png")).dtype == np.uint8, (
        "Pillow now reads 16 bit: the detour can go"
    )
    image = image_files.read_image(tmp_path / "a.png")
    assert image.dtype == np.uint16
    assert np.array_equal(image, DEEP)
    (tmp_path / "rgba.png").write_bytes(png(np.dstack([DEEP, DEEP[..., 0]]), 6, 16))
    assert np.array_equal(image_files.read_image(tmp_path / "rgba.png"), DEEP)
    (tmp_path / "la.png").write_bytes(png(DEEP[..., :2], 4, 16))
    assert np.array_equal(image_files.read_image(tmp_path / "la.png"), DEEP[..., :1])


@settings(deadline=None)
@given(
    pixels=st.sampled_from([(0, 1), (2, 3), (4, 2), (6, 4)]).flatmap(
        lambda form: st.tuples(
            st.just(form[0]),
            hnp.arrays(
                st.sampled_from([np.dtype(np.uint8), np.dtype(np.uint16)]),
                st.tuples(st.integers(1, 19), st.integers(1, 19), st.just(form[1])),
            ),
        )
    ),
    interlaced=st.booleans(),
)
def test_every_png_of_8_or_16_bits_comes_back_exactly(pixels, interlaced):
    kind, array = pixels
    image = image_files.decode_image(png(array, kind, 8 * array.itemsize, interlaced=interlaced))
    assert image.dtype == array.dtype
    assert np.array_equal(image, array[..., : 3 if kind in (2, 6) else 1])


def test_sixteen_bit_grey_png(tmp_path):
    image = image_files.read_image(save(tmp_path / "a.png", DEEP[..., 0].copy()))
    assert image.dtype == np.uint16
    assert np.array_equal(image, DEEP[..., :1])
    assert np.array_equal(image_files.read_mask(tmp_path / "a.png"), DEEP[..., 0])


@pytest.mark.parametrize(
    ("bits", "packed", "values"), [(2, 0b00011011, [0, 1, 2, 3]), (4, 0x3A, [3, 10])]
)
def test_few_bits_of_grey_are_ids_in_a_mask_and_stretched_in_an_image(
    tmp_path, bits, packed, values
):
    (tmp_path / "a.png").write_bytes(png(np.full((2, 1), packed, np.uint8), 0, bits))
    assert image_files.read_mask(tmp_path / "a.png")[0].tolist() == values
    assert image_files.read_image(tmp_path / "a.png")[0, :, 0].tolist() == [
        v * 255 // (2**bits - 1) for v in values
    ]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_exif_rotation_is_honoured_for_image_mask_and_size(tmp_path, orientation, suffix):
    path = tmp_path / f"a.{suffix}"
    if suffix == "tif":
        tifffile.imwrite(
            path, GREY, extratags=[(0x0112, "H", 1, orientation, True)], compression="lzw"
        )  # Pillow scrambles uncompressed ones
    else:
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        save(path, GREY, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    with PIL.Image.open(path) as opened:
        upright = np.asarray(
            opened if suffix == "tif" else PIL.ImageOps.exif_transpose(opened)
        )  # Pillow turns a TIFF when it loads it
    assert image_files.read_image(path).shape[:2] == upright.shape[:2]
    assert np.array_equal(image_files.read_image(path), upright.reshape(*upright.shape[:2], -1))
    assert np.array_equal(
        image_files.read_mask(path), upright if upright.ndim == 2 else upright[..., 0]
    )
    assert image_files.read_size(path) == upright.shape[1::-1]


def test_sixteen_bit_png_is_rotated_too(tmp_path):
    content = png(DEEP, 2, 16)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    payload = exif.tobytes()[6:]
    block = chunk(b"eXIf", payload)
    (tmp_path / "a.png").write_bytes(
        content[:-12] + block + content[-12:]
    )  # after the pixels, where PNG allows it
    assert np.array_equal(image_files.read_image(tmp_path / "a.png"), np.rot90(DEEP, -1))
    assert image_files.read_size(tmp_path / "a.png") == (5, 7)


def test_size_is_read_without_decoding(tmp_path):
    content = png(np.zeros((50, 60, 3), np.uint16), 2, 16)
    (tmp_path / "a.png").write_bytes(content[:60])
    assert image_files.read_size(tmp_path / "a.png") == (60, 50)


def test_masks_in_three_bands(tmp_path):
    red = np.zeros((5, 7, 3), np.uint8)
    red[..., 0] = GREY % 13
    assert np.array_equal(image_files.read_mask(save(tmp_path / "red.png", red)), red)
    assert np.array_equal(
        image_files.read_mask(save(tmp_path / "grey.png", np.dstack([GREY] * 3))), GREY
    )
    assert np.array_equal(
        image_files.read_mask(save(tmp_path / "alpha.png", np.dstack([red, GREY]))), red
    )
    assert np.array_equal(image_files.read_colors(tmp_path / "red.png"), red)
    assert np.array_equal(image_files.read_colors(tmp_path / "grey.png"), np.dstack([GREY] * 3))
    assert np.array_equal(
        image_files.read_colors(save(tmp_path / "one.png", GREY)), np.dstack([GREY] * 3)
    )


def test_float_masks_of_whole_numbers_are_ids_and_fractions_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", GREY.astype(np.float32))
    assert np.array_equal(image_files.read_mask(tmp_path / "a.tif"), GREY)
    tifffile.imwrite(tmp_path / "b.tif", np.full((4, 4), 0.5, np.float32))
    with pytest.raises(
        UsageError, match=r"b.tif' holds fractions, but a mask stores whole numbers"
    ):
        image_files.read_mask(tmp_path / "b.tif")


def test_nan_and_negative_fractions_of_a_mask_become_negative(tmp_path):
    stored = np.array([[0, 3, np.nan, -9999, -3.4e38, np.inf]], np.float32)
    tifffile.imwrite(tmp_path / "a.tif", stored)
    assert image_files.read_mask(tmp_path / "a.tif").tolist() == [[0, 3, -1, -1, -1, -1]]


def test_masks_with_odd_bands_are_refused(tmp_path):
    tifffile.imwrite(
        tmp_path / "a.tif",
        np.zeros((8, 8, 5), np.uint8),
        photometric="minisblack",
        planarconfig="contig",
    )
    with pytest.raises(
        UsageError,
        match=r"a.tif' has 5 bands, but a mask has one band of class ids, three of colours",
    ):
        image_files.read_mask(tmp_path / "a.tif")
    with pytest.raises(UsageError, match="has 5 bands; colours need three"):
        image_files.read_colors(tmp_path / "a.tif")
    tifffile.imwrite(tmp_path / "deep.tif", DEEP, photometric="rgb")
    with pytest.raises(UsageError, match="three bands of uint16, but colours have 8 bits"):
        image_files.read_mask(tmp_path / "deep.tif")


@pytest.mark.parametrize(
    "reader",
    [
        image_files.read_image,
        image_files.read_mask,
        image_files.read_colors,
        image_files.read_size,
        image_files.read_palette,
    ],
)
def test_what_is_no_picture_is_one_clear_sentence(tmp_path, reader):
    with pytest.raises(UsageError, match=r"none.png' does not exist; check the path"):
        reader(tmp_path / "none.png")
    (tmp_path / "empty.png").touch()
    with pytest.raises(
        UsageError,
        match=r"empty.png' is damaged or incomplete \(the file is empty\); save or copy it again",
    ):
        reader(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(
        UsageError,
        match=r"text.png' is not an image that useg can read \(PNG, JPEG, WebP, .* TIFF\)",
    ):
        reader(tmp_path / "text.png")
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        reader(tmp_path)


@pytest.mark.parametrize(
    "name", ["a.jpg", "a.png", "deep.png", "a.webp", "a.bmp", "a.gif", "lzw.tif", "raw.tif"]
)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_half_a_file_is_an_error_and_never_half_a_picture(tmp_path, name, share):
    noise = np.random.default_rng(3).integers(0, 256, (64, 64, 3), np.uint8)
    if name == "deep.png":
        (tmp_path / name).write_bytes(png(noise.astype(np.uint16) * 257, 2, 16))
    elif name.endswith(".tif"):
        tifffile.imwrite(
            tmp_path / name,
            noise,
            compression="lzw" if name == "lzw.tif" else None,
            photometric="rgb",
            rowsperstrip=8,
        )
    else:
        save(tmp_path / name, noise)
    image_files.read_image(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UsageError, match=r"'.*' is (damaged or incomplete|not a picture)"):
        image_files.read_image(tmp_path / name)


@settings(deadline=None)
@given(
    place=st.integers(0, 400),
    value=st.integers(0, 255),
    kind=st.sampled_from(["tif", "png", "jpg"]),
)
def test_a_damaged_file_gives_pixels_or_a_usage_error_and_nothing_else(place, value, kind):
    target = io.BytesIO()
    if kind == "tif":
        tifffile.imwrite(target, RGB, photometric="rgb", compression="lzw")
    else:
        PIL.Image.fromarray(RGB).save(target, {"png": "PNG", "jpg": "JPEG"}[kind])
    content = bytearray(target.getvalue())
    content[place % len(content)] = value
    with contextlib.suppress(UsageError):
        assert image_files.decode_image(bytes(content), "upload").ndim == 3


def test_content_decides_and_not_the_suffix(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", RGB, photometric="rgb")
    (tmp_path / "a.tif").rename(tmp_path / "a.png")
    assert np.array_equal(image_files.read_image(tmp_path / "a.png"), RGB)


def test_decode_image_reads_content_in_memory():
    assert np.array_equal(image_files.decode_image(image_files.encode_picture(RGB)), RGB)
    with pytest.raises(UsageError, match="'the upload' is not an image"):
        image_files.decode_image(b"hello", "the upload")


@settings(deadline=None)
@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_a_written_label_is_read_back_with_every_id(label):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.png")
        image_files.write_label(path, label, CAMVID)
        assert np.array_equal(image_files.read_mask(path), label)
        assert np.array_equal(image_files.read_colors(path), palette(CAMVID)[label])


def test_a_label_file_is_a_palette_png_in_the_tables_colours(tmp_path):
    image_files.write_label(tmp_path / "a.png", np.array([[0, 3, 255]], np.uint8), CARLA)
    with PIL.Image.open(tmp_path / "a.png") as opened:
        assert opened.mode == "P"
        assert np.asarray(opened.convert("RGB"))[0].tolist() == [[0, 0, 0], [72, 0, 90], [0, 0, 0]]
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_pictures_are_written_by_suffix_and_whole(tmp_path):
    image_files.write_picture(tmp_path / "a.png", RGB)
    assert np.array_equal(image_files.read_image(tmp_path / "a.png"), RGB)
    image_files.write_picture(tmp_path / "a.JPG", RGB)
    assert imagecodecs.jpeg8_decode((tmp_path / "a.JPG").read_bytes()).shape == RGB.shape
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.JPG", "a.png"]
    with pytest.raises(
        UsageError, match=r"a picture is written as .png, .jpg, .jpeg, but the suffix is '.webm'"
    ):
        image_files.write_picture(tmp_path / "a.webm", RGB)
    with pytest.raises(UsageError, match=r"but the file is named 'a.jpg'; end it in .png"):
        image_files.write_label(tmp_path / "a.jpg", GREY, CARLA)
    with pytest.raises(UsageError, match="cannot be written"):
        image_files.write_label(tmp_path / "none" / "a.png", GREY, CARLA)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("bands", [1, 2, 3, 4, 7])
def test_resizing_keeps_type_bands_and_mean(dtype, bands):
    rng = np.random.default_rng(4)
    image = (rng.random((60, 80, bands)) * 200).astype(dtype)
    small = image_files.resize_image(image, (20, 15))
    assert small.shape == (15, 20, bands)
    assert small.dtype == dtype
    assert small.flags.writeable
    assert np.abs(small.mean((0, 1)) - image.mean((0, 1))).max() < 3
    assert small.std() < image.std() / 2, "shrinking must average, not pick"
    assert image_files.resize_image(image, (80, 60)) is image


def test_a_fourth_band_is_not_taken_for_alpha():
    image = np.full((8, 8, 4), 200, np.uint8)
    image[::2, :, 3] = 0
    assert (image_files.resize_image(image, (4, 4))[..., :3] == 200).all()


@given(
    hnp.arrays(np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12))),
    st.integers(1, 20),
    st.integers(1, 20),
)
def test_resizing_a_label_makes_no_new_ids(label, width, height):
    resized = image_files.resize_label(label, (width, height))
    assert resized.shape == (height, width)
    assert set(np.unique(resized)) <= set(np.unique(label))
    assert np.array_equal(image_files.resize_label(label, label.shape[::-1]), label)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for reader in (
        image_files.read_image,
        image_files.read_size,
        image_files.read_palette,
        read_stack,
    ):
        with pytest.raises(UsageError, match=r"a\.png' is a pipe or a device, not a file"):
            reader(tmp_path / "a.png")
    assert tiff_declared_pixels(tmp_path / "a.png") == 0


def test_colors_of_zero_and_one_are_not_a_band_for_each_class(tmp_path):
    """Id 1 in red alone, as CARLA stores it, is not the first of three classes."""
    mask = np.zeros((4, 4, 3), np.uint8)
    mask[..., 0] = 1
    assert np.array_equal(image_files.read_mask(save(tmp_path / "a.png", mask)), mask)
