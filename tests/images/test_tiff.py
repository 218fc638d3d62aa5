"""TIFF as it is written: every type, band count, compression and page; what lies is refused before
it costs anything.
"""

import io
import struct
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tifffile
from handmade import grey_tiff, tiff
from hypothesis import given
from hypothesis import strategies as st

from useg.errors import UsageError
from useg.images import image_files
from useg.images.stacks import read_stack
from useg.images.tiff_directories import GEO_TAGS

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (5, 7), np.uint8)
RGB = RNG.integers(0, 256, (5, 7, 3), np.uint8)
STACK = RNG.integers(0, 65536, (6, 16, 20), np.uint16)
LOSSLESS = ["none", "lzw", "deflate", "packbits", "zstd", "lzma"]


def written(pixels: np.ndarray, **options: Any) -> bytes:
    target = io.BytesIO()
    tifffile.imwrite(target, pixels, **options)
    return target.getvalue()


@given(
    dtype=st.sampled_from(["u1", "u2", "f4"]),
    bands=st.integers(1, 12),
    compression=st.sampled_from(LOSSLESS),
    predicted=st.booleans(),
    planar=st.booleans(),
    tiled=st.booleans(),
    order=st.sampled_from("<>"),
    big=st.booleans(),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 9),
)
def test_every_lossless_tiff_comes_back_exactly(
    dtype, bands, compression, predicted, planar, tiled, order, big, shape, seed
):
    pixels = np.random.default_rng(seed).integers(0, 256, (*shape, bands), np.uint8).astype(dtype)
    pixels = pixels * np.dtype(dtype).type(257 if dtype == "u2" else 1)
    options: dict[str, Any] = {"tile": (16, 32)} if tiled else {"rowsperstrip": 7}
    if compression != "none":
        options["compression"] = compression
        if predicted and compression != "packbits":
            options["predictor"] = 3 if dtype == "f4" else 2
    if bands > 1:
        options |= {
            "planarconfig": "separate" if planar else "contig",
            "extrasamples": [0] * (bands - 1),
        }
    stored = pixels[..., 0] if bands == 1 else np.moveaxis(pixels, -1, 0) if planar else pixels
    content = written(
        stored, photometric="minisblack", byteorder=order, bigtiff=big, metadata=None, **options
    )
    image = image_files.decode_image(content)
    assert image.dtype == dtype
    assert image.dtype.isnative
    assert np.array_equal(image, pixels)


@pytest.mark.parametrize(
    ("stored", "read"),
    [
        ("u2", "u2"),
        ("f4", "f4"),
        ("f8", "f4"),
        ("f2", "f4"),
        ("i1", "f4"),
        ("i2", "f4"),
        ("i4", "f4"),
        ("u4", "f4"),
    ],
)
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_number_types(tmp_path, stored, read, compression):
    array = (GREY.astype(np.float64) / 4).astype(stored) * np.array(
        -1 if stored[0] == "i" else 1, stored
    )
    tifffile.imwrite(tmp_path / "a.tif", array, compression=compression)
    image = image_files.read_image(tmp_path / "a.tif")
    assert image.dtype == np.dtype(read)
    assert np.array_equal(image[..., 0], array.astype(read))
    if stored[0] != "f":
        assert np.array_equal(image_files.read_mask(tmp_path / "a.tif"), array)


@pytest.mark.parametrize(("bits", "white"), [(2, 3), (4, 15), (10, 1023), (12, 4095), (14, 16383)])
def test_packed_bits_are_numbers(tmp_path, bits, white):
    values = np.linspace(0, white, 21).astype(np.uint8 if bits < 8 else np.uint16).reshape(3, 7)
    tifffile.imwrite(tmp_path / "a.tif", values, bitspersample=bits)
    assert np.array_equal(image_files.read_mask(tmp_path / "a.tif"), values)
    image = image_files.read_image(tmp_path / "a.tif")[..., 0]
    assert np.array_equal(image, values * (255 // white) if bits < 8 else values)


@pytest.mark.parametrize(
    "options",
    [{"tile": (16, 16)}, {"rowsperstrip": 8}, {"subsampling": (2, 2), "rowsperstrip": 16}],
)
def test_jpeg_in_a_tiff_is_rgb(tmp_path, options):
    flat = np.full((32, 48, 3), (200, 90, 30), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", flat, compression="jpeg", photometric="rgb", **options)
    assert np.abs(image_files.read_image(tmp_path / "a.tif").astype(int) - flat).max() <= 3


def test_fax_in_a_tiff_is_zero_and_one(tmp_path):
    bits = GREY > 100
    for compression in ("group3", "group4", "tiff_ccitt"):
        PIL.Image.fromarray(bits).save(tmp_path / "a.tif", compression=compression)
        assert np.array_equal(image_files.read_mask(tmp_path / "a.tif"), bits), compression
        assert np.array_equal(image_files.read_image(tmp_path / "a.tif")[..., 0], bits * 255), (
            compression
        )


def test_colours_that_are_not_rgb_are_refused_and_cmyk_becomes_rgb(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", RGB, photometric="cielab")
    with pytest.raises(UsageError, match=r"cannot be read: its colours are CIE Lab, not RGB"):
        image_files.read_image(tmp_path / "a.tif")
    PIL.Image.fromarray(RGB).convert("CMYK").save(tmp_path / "c.tif", compression="tiff_lzw")
    assert np.array_equal(image_files.read_image(tmp_path / "c.tif"), RGB)


def test_a_compression_that_is_not_read_is_named(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", RGB, photometric="rgb", compression="jpeg2000")
    with pytest.raises(
        UsageError,
        match=r"a.tif' cannot be read: it is compressed by JPEG2000; "
        r"save it as PNG, or as a plain TIFF",
    ):
        image_files.read_image(tmp_path / "a.tif")


# Bands: which are transparency?


def four_bands(fourth: np.ndarray, kind: str | int, dtype: str = "u1") -> bytes:
    rgb = np.random.default_rng(1).integers(1, 255, (20, 30, 3)).astype(dtype)
    pixels = np.dstack([rgb, fourth.astype(dtype)]) * np.array(257 if dtype == "u2" else 1, dtype)
    return written(pixels, photometric="rgb", extrasamples=[kind])


NEAR_INFRARED = np.clip(np.random.default_rng(2).normal(120, 50, (20, 30)), 0, 255)
CUT_OUT = np.where(np.arange(30) < 14, 0, 255) * np.ones((20, 1))


@pytest.mark.parametrize("dtype", ["u1", "u2"])
@pytest.mark.parametrize("kind", ["unspecified", "assocalpha", "unassalpha"])
def test_near_infrared_is_kept_whatever_the_file_calls_it(kind, dtype):
    assert image_files.decode_image(four_bands(NEAR_INFRARED, kind, dtype)).shape == (20, 30, 4)


@pytest.mark.parametrize("dtype", ["u1", "u2"])
@pytest.mark.parametrize(
    "alpha",
    [CUT_OUT, np.full((20, 30), 255), np.zeros((20, 30))],
    ids=["cut out", "opaque", "transparent"],
)
def test_transparency_is_dropped_but_an_unspecified_band_is_not(alpha, dtype):
    assert image_files.decode_image(four_bands(alpha, "unassalpha", dtype)).shape == (20, 30, 3)
    assert image_files.decode_image(four_bands(alpha, "unspecified", dtype)).shape == (20, 30, 4)


def test_soft_edges_are_transparency_too():
    soft = np.clip(np.add.outer(np.zeros(20), np.arange(30) * 40 - 400), 0, 255)
    assert image_files.decode_image(four_bands(soft, "assocalpha")).shape == (20, 30, 3)


def test_an_empty_border_does_not_make_near_infrared_transparency():
    bands = tifffile.imread(io.BytesIO(four_bands(NEAR_INFRARED, "unassalpha")))
    bands[:, :25] = 0
    content = written(bands, photometric="rgb", extrasamples=["unassalpha"])
    assert image_files.decode_image(content).shape == (20, 30, 4)


def test_a_mask_has_no_band_that_is_called_alpha(tmp_path):
    ids = np.full((20, 30, 3), 3, np.uint8)
    tifffile.imwrite(
        tmp_path / "a.tif",
        np.dstack([ids, NEAR_INFRARED.astype(np.uint8)]),
        photometric="rgb",
        extrasamples=["unassalpha"],
    )
    assert np.array_equal(image_files.read_mask(tmp_path / "a.tif"), ids[..., 0])
    assert np.array_equal(image_files.read_colors(tmp_path / "a.tif"), ids)


# Pages


@pytest.mark.parametrize(
    "options",
    [
        {},  # one after the other, one entry in the file
        {"compression": "lzw", "tile": (16, 16)},
        {"compression": "deflate", "byteorder": ">", "bigtiff": True},
        {"imagej": True, "metadata": {"axes": "ZYX"}},
        {"ome": True, "metadata": {"axes": "ZYX"}},
        {"metadata": None, "contiguous": False},
    ],
)
def test_a_page_of_a_stack_is_read_by_its_number(tmp_path, options):
    path = tmp_path / "z.tif"
    with tifffile.TiffWriter(
        path, **{k: options[k] for k in ("byteorder", "bigtiff", "imagej", "ome") if k in options}
    ) as writer:
        parts = STACK if "contiguous" in options else [STACK]
        for part in parts:
            writer.write(
                part,
                **{
                    k: v
                    for k, v in options.items()
                    if k not in ("byteorder", "bigtiff", "imagej", "ome")
                },
            )
    assert read_stack(path).num_pages == 6
    for page in range(6):
        assert np.array_equal(image_files.read_image(path, page=page)[..., 0], STACK[page])
        assert np.array_equal(image_files.read_mask(path, page=page), STACK[page])
        assert np.array_equal(
            image_files.decode_image(path.read_bytes(), page=page)[..., 0], STACK[page]
        )
    assert image_files.read_size(path, page=5) == (20, 16)


def test_a_stack_is_never_one_picture_and_one_picture_has_one_page(tmp_path):
    tifffile.imwrite(tmp_path / "z.tif", STACK)
    for reader in (
        image_files.read_image,
        image_files.read_mask,
        image_files.read_colors,
        image_files.read_size,
    ):
        with pytest.raises(
            UsageError,
            match=r"z.tif' is a stack of 6 pages, not one image; "
            r"useg predict labels each page; for all else, save each page as a file of its own, "
            r"in Python: for k, page in enumerate\(tifffile",
        ):
            reader(tmp_path / "z.tif")
        for page in (6, -1):
            with pytest.raises(
                UsageError,
                match=rf"z.tif' has 6 pages, but page {page} was requested; "
                r"pages count from 0 to 5",
            ):
                reader(tmp_path / "z.tif", page=page)
    for path in (tmp_path / "a.png", tmp_path / "a.tif"):
        PIL.Image.fromarray(GREY).save(path)
        assert read_stack(path).num_pages == 1
        assert np.array_equal(image_files.read_image(path, page=0)[..., 0], GREY)
        assert image_files.read_size(path, page=0) == (7, 5)
        for reader in (image_files.read_image, image_files.read_size):
            with pytest.raises(
                UsageError, match="has one page, but page 1 was requested; pages count from 0 to 0"
            ):
                reader(path, page=1)


@pytest.mark.parametrize("options", [{"imagej": True}, {"ome": True}, {}, {"compression": "zstd"}])
def test_an_axis_of_channels_is_bands_and_the_others_are_pages(tmp_path, options):
    path = tmp_path / "c.tif"
    tifffile.imwrite(path, STACK, metadata={"axes": "CYX"}, photometric="minisblack", **options)
    assert read_stack(path).num_pages == 1
    assert np.array_equal(image_files.read_image(path), np.moveaxis(STACK, 0, -1))
    assert image_files.read_size(path) == (20, 16)
    stack = STACK.reshape(2, 3, 16, 20)
    tifffile.imwrite(path, stack, metadata={"axes": "ZCYX"}, photometric="minisblack", **options)
    assert read_stack(path).num_pages == 2
    assert np.array_equal(image_files.read_image(path, page=1), np.moveaxis(stack[1], 0, -1))
    if "imagej" not in options:  # ImageJ's own order is fixed
        tifffile.imwrite(
            path, stack, metadata={"axes": "CZYX"}, photometric="minisblack", **options
        )
        assert read_stack(path).num_pages == 3
        assert np.array_equal(image_files.read_image(path, page=2), np.moveaxis(stack[:, 2], 0, -1))


def test_pages_of_colour(tmp_path):
    stack = STACK.reshape(6, 16, 20, 1).repeat(3, axis=3) + np.arange(3, dtype=np.uint16)
    for planar in ("contig", "separate"):
        tifffile.imwrite(
            tmp_path / "c.tif",
            stack if planar == "contig" else np.moveaxis(stack, -1, 1),
            photometric="rgb",
            planarconfig=planar,
        )
        assert read_stack(tmp_path / "c.tif").num_pages == 6
        assert np.array_equal(image_files.read_image(tmp_path / "c.tif", page=4), stack[4])


# Files that lie


def refused(content: bytes, sentence: str) -> None:
    for _ in range(2):
        with pytest.raises(UsageError, match=sentence):
            image_files.decode_image(content, "a.tif")


def test_missing_strips_are_not_filled_with_zeros(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", RGB, photometric="rgb", compression="lzw", rowsperstrip=2)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as opened:
        opened.pages[0].tags["ImageLength"].overwrite(500)
    refused(
        (tmp_path / "a.tif").read_bytes(),
        r"a.tif' is damaged or incomplete \(it has 3 of 250 strips or tiles\)",
    )


def test_a_circular_list_of_pages_is_refused():
    page = grey_tiff(2, 2, 4)
    size = 6 + 12 * len(page)
    refused(
        tiff(page, page, following=(8 + size, 8), behind=b"abcd"), r"its list of pages is circular"
    )
    far = [page] * 150  # tifffile looks for rings at its hundredth page only
    refused(
        tiff(
            *far,
            following=(*(8 + (k + 1) * size for k in range(149)), 8 + 120 * size),
            behind=b"abcd",
        ),
        r"its list of pages is circular",
    )


def test_very_many_pages_are_refused_at_once():
    empty = struct.pack("<H", 0)
    content = (
        b"II*\0" + b"".join(struct.pack("<I", 8 + 6 * k) + empty for k in range(30_000)) + bytes(4)
    )
    refused(content, "it has more than 20,000 pages")


def test_tags_that_claim_the_same_bytes_over_and_over_are_refused():
    content = tiff(
        grey_tiff(2, 2, 4) | dict.fromkeys(GEO_TAGS, (12, 2500, 8)), behind=bytes(20_000)
    )
    refused(content, "its directories declare more data than the file holds")


def test_pages_may_share_what_they_point_at():
    note = b"\1\0" + struct.pack("<HHII", 0x9000, 7, 4, 0) + bytes(4)
    pages = [grey_tiff(2, 2, 4, t34665=(4, 1, -1)) for _ in range(3)]
    content = tiff(*pages, behind=note)
    assert np.array_equal(
        image_files.decode_image(content, page=2)[..., 0],
        np.frombuffer(note[:4], np.uint8).reshape(2, 2),
    )


@pytest.mark.parametrize("compression", [1, 5, 8, 32773, 34925])
def test_a_few_bytes_cannot_hold_a_hundred_megapixels(compression):
    refused(
        tiff(grey_tiff(10_000, 10_000, 100, t259=(3, 1, compression)), behind=bytes(100)),
        "(can hold|failed to read|beyond the end)",
    )


def test_a_size_above_the_limit_is_refused(tmp_path):
    refused(
        tiff(grey_tiff(50_000, 50_000, 4), behind=b"abcd"),
        "declares 50000x50000 pixels of 1 byte, but at most 300,000,000 pixels of 16 bytes",
    )
    tifffile.imwrite(tmp_path / "a.tif", RGB, photometric="rgb")
    with pytest.raises(UsageError, match="declares 7x5 pixels of 3 bytes, but at most 34 pixels"):
        image_files.decode_image((tmp_path / "a.tif").read_bytes(), max_pixels=34)
    with pytest.raises(
        UsageError, match="declares 2x2 pixels of 136 bytes, but at most 4 pixels of 16 bytes"
    ):
        image_files.decode_image(
            written(np.zeros((2, 2, 17)), photometric="minisblack", planarconfig="contig"),
            max_pixels=4,
        )


def test_a_tile_of_a_gigapixel_is_refused():
    tags = grey_tiff(
        16,
        16,
        9,
        t259=(3, 1, 8),
        t322=(4, 1, 65536),
        t323=(4, 1, 65536),
        t324=(4, 1, -1),
        t325=(4, 1, 9),
    )
    refused(
        tiff(
            {tag: value for tag, value in tags.items() if tag not in (273, 278, 279)},
            behind=bytes(9),
        ),
        "one of its strips or tiles has 4,294,967,296 bytes of pixels, the whole image only 256",
    )


def test_a_jpeg_larger_than_its_strip_is_refused():
    content = bytearray(
        written(np.full((16, 16, 3), 9, np.uint8), photometric="rgb", compression="jpeg")
    )
    place = content.index(b"\xff\xc0")
    content[place + 5 : place + 9] = struct.pack(">HH", 30000, 30000)
    refused(bytes(content), "one of its strips or tiles of 16x16 pixels declares 30000x30000")


def test_a_cut_jpeg_is_not_half_a_picture():
    """Decoders of JPEG fill what is missing with grey, without a word."""
    content = written(
        np.random.default_rng(3).integers(0, 256, (64, 64, 3), np.uint8),
        photometric="rgb",
        compression="jpeg",
    )
    with tifffile.TiffFile(io.BytesIO(content)) as opened:
        start, length = opened.pages[0].dataoffsets[0], opened.pages[0].databytecounts[0]
    refused(
        content[: start + length // 2] + bytes(length - length // 2) + content[start + length :],
        "one of its strips or tiles is cut off",
    )


def test_lzw_that_names_a_string_not_yet_made_is_refused():
    """imagecodecs' own decoder follows a stray pointer here, and the process may die."""
    codes = "".join(f"{code:09b}" for code in (256, 300, 301, 257)).ljust(40, "0")
    content = int(codes, 2).to_bytes(5, "big")
    refused(tiff(grey_tiff(4, 4, 5, t259=(3, 1, 5)), behind=content), "code not yet in table")


@pytest.mark.parametrize(
    "tags",
    [
        {"t278": (4, 1, 0), "t259": (3, 1, 5)},
        {"t258": (3, 1, 0)},
        {"t277": (3, 1, 0)},
        {"t256": (2, 1, 65)},
        {"t257": (4, 1, 0)},
        {"t339": (3, 1, 9)},
    ],
)
def test_broken_tiffs_are_one_kind_of_error(tags):
    """tifffile alone raises ZeroDivisionError, TypeError, MemoryError and others."""
    refused(
        tiff(grey_tiff(4, 4, 16, **tags), behind=bytes(16)),
        r"'a.tif' (is damaged or incomplete|cannot be read)",
    )


def test_an_ome_tiff_does_not_open_other_files(tmp_path):
    for name in ("a", "b"):
        tifffile.imwrite(tmp_path / f"{name}.ome.tif", STACK[:1], metadata={"axes": "ZYX"})
    description = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
        'UUID="urn:uuid:1"><Image ID="Image:0">'
        '<Pixels DimensionOrder="XYZCT" Type="uint16" SizeX="20" SizeY="16" SizeZ="2" SizeC="1" '
        'SizeT="1" ID="Pixels:0">'
        '<Channel ID="Channel:0" SamplesPerPixel="1"/>'
        '<TiffData IFD="0" FirstZ="0" PlaneCount="1"><UUID '
        'FileName="a.ome.tif">urn:uuid:1</UUID></TiffData>'
        '<TiffData IFD="0" FirstZ="1" PlaneCount="1"><UUID '
        'FileName="b.ome.tif">urn:uuid:2</UUID></TiffData></Pixels></Image></OME>'
    )
    tifffile.imwrite(tmp_path / "a.ome.tif", STACK[:1], description=description, metadata=None)
    assert tifffile.imread(tmp_path / "a.ome.tif").shape == (2, 16, 20), "tifffile follows the name"
    assert read_stack(tmp_path / "a.ome.tif").num_pages == 1
    assert np.array_equal(image_files.read_image(tmp_path / "a.ome.tif")[..., 0], STACK[0])


# Descriptions arrange the pages that a file has; they make none.


def described(description: str, pages: int = 2, **options: Any) -> bytes:
    target = io.BytesIO()
    with tifffile.TiffWriter(target) as writer:
        for k in range(pages):
            text = description if k == 0 else None
            writer.write(STACK[k], description=text, metadata=None, contiguous=False, **options)
    return target.getvalue()


def ome(planes: str, channels: int = 1, slices: int = 2) -> str:
    return (
        '<?xml version="1.0"?><OME><Image><Pixels DimensionOrder="XYZCT" Type="uint16" SizeX="20" '
        f'SizeY="16" SizeC="{channels}" SizeZ="{slices}" SizeT="1">{planes}</Pixels></Image></OME>'
    )


@pytest.mark.parametrize(
    "description",
    [
        ome('<TiffData IFD="0" PlaneCount="100000000"/>'),
        ome('<TiffData IFD="0" FirstZ="-9" NumPlanes="9999999999999999999"/>'),
        ome("", slices=10**12),
        ome("", slices=3),
        ome('<TiffData IFD="0"><UUID FileName="a"/></TiffData><TiffData><UUID FileName="b"/>', 5),
        "ImageJ=1.5\nimages=900000000\nslices=900000000\n",
        '{"shape": [900000000, 16, 20], "axes": "ZYX"}',
        '<?xml version="1.0"?><scn><collection><image/></collection></scn>',
    ],
)
def test_a_file_has_the_pages_of_its_own_directories(description):
    content = described(description)
    for page in (0, 1):
        image = image_files.decode_image(content, page=page)
        assert np.array_equal(image[..., 0], STACK[page])
    with pytest.raises(UsageError, match="'the image' is a stack of 2 pages"):
        image_files.decode_image(content)
    assert np.array_equal(image_files.decode_image(described(description, 1))[..., 0], STACK[0])


def test_channels_that_do_not_fit_the_pages_are_refused():
    sentence = "its description of 1 x 3 x 1 images does not fit its 2 pages"
    refused(described(ome("", channels=3, slices=1)), sentence)
    refused(described("ImageJ=1.5\nchannels=3\nslices=1\n"), "of 1 x 1 x 3 images does not fit")
    refused(described('{"shape": [3, 16, 20], "axes": "CYX"}'), "of 3 images does not fit its 2")
    refused(described(ome("", channels=0)), "gives the axes 'TCZ' impossible lengths")


@pytest.mark.parametrize("count", [64, 65])
def test_more_channels_of_imagej_than_an_image_has_bands_are_pages(count, tmp_path):
    # tifffile calls the first axis channels if it is not named.
    stack = np.arange(count * 30, dtype=np.uint8).reshape(count, 5, 6)
    tifffile.imwrite(tmp_path / "z.tif", stack, imagej=True)
    assert read_stack(tmp_path / "z.tif").num_pages == (1 if count == 64 else 65)
    if count == 65:
        page = image_files.read_image(tmp_path / "z.tif", page=64)
        np.testing.assert_array_equal(page[..., 0], stack[64])


def test_many_channels_of_few_pixels_are_bands():
    content = described('{"shape": [6, 16, 20], "axes": "CYX"}', 6, compression="deflate")
    assert np.array_equal(image_files.decode_image(content), np.moveaxis(STACK, 0, -1))
    target = io.BytesIO()
    with tifffile.TiffWriter(target) as writer:
        for k in range(1100):
            text = '{"shape": [1100, 1, 1], "axes": "CYX"}' if k == 0 else None
            pixels = np.full((1, 1), k % 256, np.uint8)
            writer.write(pixels, description=text, metadata=None, contiguous=False)
    refused(target.getvalue(), "it stores 1,100 bands, each in a page of its own")
    fewer = target.getvalue().replace(b"[1100", b"[ 550")
    assert image_files.decode_image(fewer, page=1).shape == (1, 1, 550)


def test_a_description_with_entities_of_its_own_is_refused():
    text = ome("").replace("<OME>", '<!DOCTYPE a [<!ENTITY x "yyyyyyyyyyyy">]><OME>')
    refused(described(text), "its description defines XML entities")


def test_an_ome_description_may_store_its_planes_in_another_order():
    planes = "".join(f'<TiffData IFD="{1 - k}" FirstZ="{k}" PlaneCount="1"/>' for k in range(2))
    for page in (0, 1):
        image = image_files.decode_image(described(ome(planes)), page=page)
        assert np.array_equal(image[..., 0], STACK[1 - page])


@pytest.mark.parametrize(
    "description",
    [
        "ImageJ=1.5\nimages=6\nslices=6\n",
        '{"shape": [6, 16, 20], "axes": "ZYX", "truncated": true}',
    ],
)
def test_one_directory_may_stand_for_a_stack_that_the_file_holds(description):
    content = written(STACK[0], description=description, metadata=None) + STACK[1:].tobytes()
    for page in (0, 5):
        assert np.array_equal(image_files.decode_image(content, page=page)[..., 0], STACK[page])
    refused(content[: -STACK[0].nbytes], "its description declares 6 images, but it holds 5")


def test_an_index_beside_a_file_opens_no_other_file(tmp_path):
    """NDTiff's index names files, and tifffile follows it wherever it points."""
    inside = tmp_path / "inside"
    inside.mkdir()
    secret = np.full((8, 8), 77, np.uint8)
    tifffile.imwrite(tmp_path / "secret.tif", secret, metadata=None, compression="deflate")
    whole = written(
        np.zeros((8, 8), np.uint8), metadata=None, extratags=[(51123, "s", 0, '{"a": 1}', 1)]
    )
    (count,) = struct.unpack_from("<H", whole, 8)
    directory = whole[8 : 8 + 2 + 12 * count + 4]
    summary = struct.pack("<4I", 483729, 2, 2355492, 2) + b"{}"
    head = b"II*\0" + struct.pack("<I", len(whole)) + summary
    (inside / "a.tif").write_bytes(head + whole[len(head) :] + directory + bytes(1000))
    name, axes = b"../secret.tif", b'{"time":0}'
    entry = struct.pack("<I", len(axes)) + axes + struct.pack("<I", len(name)) + name
    (inside / "NDTiff.index").write_bytes(entry + struct.pack("<8I", 0, 8, 8, 0, 0, 0, 0, 0))
    with pytest.warns(UserWarning, match="closed file"):
        assert tifffile.imread(inside / "a.tif").max() == 77, "tifffile follows the name"
    assert not image_files.read_image(inside / "a.tif").any()
