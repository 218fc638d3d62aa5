"""Pictures that declare more than they hold: refused in a moment, by one sentence, before they cost
memory.
"""

import contextlib
import io
import struct
import threading
import time
import tracemalloc
import warnings
import zlib

import numpy as np
import PIL.Image
import pytest
from handmade import GREY, RGB, chunk, declaring, png

from useg.errors import UsageError
from useg.images import formats, image_files

PICTURE = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


def saved(form: str, **options: object) -> bytes:
    target = io.BytesIO()
    PIL.Image.fromarray(PICTURE).save(target, form, **options)
    return target.getvalue()


def refused(content: bytes, sentence: str) -> None:
    """Decoding fails by this sentence, with little work and two megabytes."""
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(UsageError, match=sentence):
        image_files.decode_image(content, "a.png")
    assert time.process_time() - started < 5
    assert tracemalloc.get_traced_memory()[1] < len(content) + 2_000_000
    tracemalloc.stop()


def test_a_small_png_that_declares_400_megapixels_is_refused_before_decoding(tmp_path):
    bomb = declaring(png(np.zeros((600, 3000, 1), np.uint8), GREY) + bytes(40_000), 20_000, 20_000)
    assert len(bomb) < 48_000
    refused(
        bomb,
        r"'a.png' declares 20000x20000 pixels of 1 byte, but at most 300,000,000 pixels of 16 "
        r"bytes are read; cut it into smaller images",
    )
    (tmp_path / "bomb.png").write_bytes(bomb)
    assert image_files.read_size(tmp_path / "bomb.png") == (20_000, 20_000), "from its header"
    assert image_files.read_palette(tmp_path / "bomb.png") is None


def test_a_png_that_cannot_hold_its_pixels_is_refused_below_the_limit_too():
    honest = png(np.zeros((600, 3000, 1), np.uint8), GREY)
    refused(
        declaring(honest, 17_000, 17_000),
        "it declares 289,000,000 bytes of pixels, more than its .* bytes can hold",
    )
    assert image_files.decode_image(honest).shape == (600, 3000, 1), (
        "zeros are as small as they get"
    )


def test_a_jpeg_that_cannot_hold_its_pixels_is_refused():
    content = bytearray(saved("JPEG", progressive=True))
    place = content.index(b"\xff\xc2")
    content[place + 5 : place + 9] = struct.pack(">HH", 17_000, 17_000)
    refused(bytes(content), "it declares 289,000,000 bytes of pixels, more than its")
    flat = io.BytesIO()
    PIL.Image.new("L", (4000, 4000)).save(flat, "JPEG", quality=1, optimize=True, progressive=True)
    assert image_files.decode_image(flat.getvalue()).shape == (4000, 4000, 1), (
        "flat grey is as small as they get"
    )


def test_the_limit_is_in_pixels_and_in_bytes():
    content = png(PICTURE, RGB)
    assert image_files.decode_image(content, max_pixels=35).shape == (5, 7, 3)
    with pytest.raises(
        UsageError,
        match="declares 7x5 pixels of 3 bytes, but at most 34 pixels of 16 bytes are read",
    ):
        image_files.decode_image(content, max_pixels=34)


def test_the_environment_sets_the_limit_when_a_file_is_read(monkeypatch):
    content = png(PICTURE, RGB)
    monkeypatch.setenv("USEG_MAX_PIXELS", "34")
    with pytest.raises(
        UsageError,
        match=(
            "at most 34 pixels of 16 bytes are read; cut it into smaller images, or raise the "
            "environment variable USEG_MAX"
        ),
    ):
        image_files.decode_image(content)
    assert image_files.decode_image(content, max_pixels=35).shape == (5, 7, 3), (
        "what a call says goes first"
    )
    monkeypatch.setenv("USEG_MAX_PIXELS", "1_000")
    assert image_files.decode_image(content).shape == (5, 7, 3)
    for wrong in ("many", "-5", "0", "1e6", "_"):
        monkeypatch.setenv("USEG_MAX_PIXELS", wrong)
        with pytest.raises(
            UsageError,
            match=(
                f"the environment variable USEG_MAX_PIXELS is '{wrong}', which is not a number of "
                "pixels; set a whole number above 0"
            ),
        ):
            image_files.decode_image(content)
    monkeypatch.setenv("USEG_MAX_PIXELS", "")
    assert image_files.decode_image(content).shape == (5, 7, 3)


@pytest.mark.parametrize(
    "block",
    [
        (b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000))),
        (b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(50_000_000))),
        (b"iCCP", b"a\0\0" + zlib.compress(bytes(50_000_000))),
    ],
    ids=["zTXt", "iTXt", "iCCP"],
)
def test_fifty_megabytes_of_text_in_a_png_are_never_unpacked(block):
    content = png(PICTURE, RGB, chunks=(block,))
    tracemalloc.start()
    with contextlib.suppress(UsageError):
        assert np.array_equal(image_files.decode_image(content), PICTURE)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_of_thousands_of_frames_one_is_decoded(form):
    frames = [PIL.Image.fromarray(np.full((40, 40, 3), k % 256, np.uint8)) for k in range(1000)]
    target = io.BytesIO()
    frames[7].save(
        target,
        form,
        save_all=True,
        append_images=frames[8:],
        **({"lossless": True} if form == "WEBP" else {}),
    )
    times = [time.process_time()]
    for _ in range(3):
        image = image_files.decode_image(target.getvalue())
        times.append(time.process_time())
    assert (image == 7).all()
    with PIL.Image.open(target) as opened:
        for k in range(993):
            opened.seek(k)
            opened.load()
    # The first time, code and tables are loaded.
    assert np.diff(times).min() < (time.process_time() - times[-1]) / 3


def test_a_webp_of_a_few_bytes_obeys_the_limit():
    target = io.BytesIO()
    PIL.Image.new("RGB", (16_000, 200)).save(target, "WEBP", lossless=True, method=0)
    content = bytearray(target.getvalue())
    assert len(content) < 10_000
    with pytest.raises(
        UsageError, match="declares 16000x200 pixels of 3 bytes, but at most 1,000,000 pixels"
    ):
        image_files.decode_image(bytes(content), max_pixels=1_000_000)


def test_reading_a_palette_does_not_decode_pixels(tmp_path):
    picture = PIL.Image.fromarray(PICTURE[..., 0] // 16)
    picture.putpalette(bytes(range(256)) * 3)
    for name in ("a.png", "a.gif", "a.bmp", "a.tif"):
        picture.save(tmp_path / name)
        whole = image_files.read_palette(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        if name != "a.tif":  # its directory comes last
            place = {
                "a.png": content.find(b"IDAT"),
                "a.gif": content.find(b",\0\0\0\0") + 10,
                "a.bmp": 54 + 1024,
            }[name]
            (tmp_path / name).write_bytes(content[: place + 5])
            assert np.array_equal(image_files.read_palette(tmp_path / name), whole), name
        assert name == "a.gif" or whole[:16].tolist() == [
            [k * 3 % 256, (k * 3 + 1) % 256, (k * 3 + 2) % 256] for k in range(16)
        ], "a GIF's writer renumbers"


def test_the_size_of_a_png_with_exif_behind_its_pixels_is_read_without_decoding(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    bomb = declaring(png(np.zeros((9, 9, 1), np.uint8), GREY), 20_000, 10_000)
    (tmp_path / "a.png").write_bytes(bomb[:-12] + chunk(b"eXIf", exif.tobytes()[6:]) + bomb[-12:])
    assert image_files.read_size(tmp_path / "a.png") == (10_000, 20_000)


@pytest.mark.parametrize("form", ["TGA", "ICO", "PCX", "SGI", "EPS", "DDS", "ICNS"])
def test_other_formats_are_never_opened(form):
    with pytest.raises(
        UsageError,
        match=r"'a' is not an image that useg can read \(PNG, JPEG, WebP, .* TIFF\), "
        r"or it is damaged; convert",
    ):
        image_files.decode_image(saved(form), "a")


def test_pillows_warnings_stay_inside():
    exif = (
        b"Exif\0\0II*\0\x08\0\0\0\x02\0"
        + struct.pack("<HHII", 0x0112, 3, 9, 6)
        + struct.pack("<HHII", 0x010E, 2, 4000, 99)
    )
    contents = [
        saved("JPEG", exif=exif),
        saved("WEBP", exif=exif),
        png(PICTURE, RGB, chunks=((b"eXIf", exif[6:]),)),
        png(PICTURE, RGB, chunks=((b"acTL", bytes(8)),)),
        png(PICTURE[..., :1] // 64, 3, chunks=((b"PLTE", bytes(range(12))), (b"tRNS", b"\0\1\2"))),
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for content in contents:
            image_files.decode_image(content)
    assert caught == []


def test_pillows_own_limit_is_neither_in_the_way_nor_changed(monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 10)
    assert image_files.decode_image(png(PICTURE, RGB)).shape == (5, 7, 3)
    assert PIL.Image.MAX_IMAGE_PIXELS == 10


def test_threads_may_read_at_once():
    contents, wrong = [png(PICTURE + k, RGB) for k in range(8)], []

    def work(k: int) -> None:
        for _ in range(30):
            if not np.array_equal(image_files.decode_image(contents[k]), PICTURE + np.uint8(k)):
                wrong.append(k)

    filters = list(warnings.filters)
    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert warnings.filters == filters


@pytest.mark.parametrize(
    ("num_scans", "num_pixels", "is_read"),
    [
        (64, 25_000_000, True),
        (65, 64, False),
        (16, 300_000_000, True),
        (17, 300_000_000, False),
        (32, 50_000_000, True),
        (33, 50_000_000, False),
    ],
)
def test_a_larger_jpeg_may_have_fewer_scans(num_scans: int, num_pixels: int, is_read: bool) -> None:
    content = b"\xff\xd8" + b"\xff\xda\0\x02pixels\xff\0\xff\xd0" * num_scans + b"\xff\xd9"
    # What lies behind the end does not count.
    content += b"\xff\xda\0\x02" * 100
    with contextlib.nullcontext() if is_read else pytest.raises(ValueError, match="more than"):
        formats.check_scans(content, num_pixels)
