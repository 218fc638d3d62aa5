"""PPM, JPEG 2000, AVIF, HEIC, DICOM and .npy are read as stored, and their sizes not believed."""

import io
import struct
import warnings

import imagecodecs
import numpy as np
import PIL.Image
import pytest

from useg.errors import MissingPackageError, UsageError
from useg.images import image_files, jpeg2000
from useg.images.formats import IMAGE_SUFFIXES, UNREAD_SUFFIXES
from useg.images.stacks import read_stack

RNG = np.random.default_rng(5)
RGB = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
GREY = RGB[..., 0]
IDS = GREY % 4


def npy(array, **options):
    target = io.BytesIO()
    np.save(target, array, **options)
    return target.getvalue()


def saved(pixels, form, **options):
    target = io.BytesIO()
    PIL.Image.fromarray(pixels).save(target, form, **options)
    return target.getvalue()


def text(kind, values, *header):
    return f"P{kind}\n# made\n30 20 {' '.join(header)}\n".encode() + values


@pytest.mark.parametrize(
    ("content", "image", "mask"),
    [
        (saved(RGB, "PPM"), RGB, RGB),
        (saved(GREY, "PPM"), GREY, GREY),
        # Ids below a small highest value are not stretched in a mask.
        (text(5, IDS.tobytes(), "3"), IDS * 85, IDS),
        (text(2, " ".join(map(str, IDS.ravel())).encode(), "3"), IDS * 85, IDS),
        (text(5, (GREY * np.uint16(200)).astype(">u2").tobytes(), "65535"), GREY * np.uint16(200),
         GREY * np.uint16(200)),
        # In a bitmap, 1 is black.
        (text(1, " ".join(map(str, IDS.ravel() // 2)).encode()), (1 - IDS // 2) * 255,
         1 - IDS // 2),
        (saved(IDS > 1, "PPM"), (IDS > 1) * np.uint8(255), (IDS > 1).astype(np.uint8)),
        (npy(GREY.astype(np.int64)), GREY.astype(np.float32), GREY),
        (npy(np.asfortranarray(GREY)), GREY, GREY),
        (npy(RGB), RGB, RGB),
        (npy(np.moveaxis(RGB, 2, 0)), RGB, RGB),
        (npy(IDS > 1), (IDS > 1) * np.uint8(255), IDS > 1),
        (npy(IDS / 1.0), IDS.astype(np.float32), IDS),
        (saved(RGB, "JPEG2000", irreversible=False), RGB, RGB),
        (saved(np.dstack([RGB, GREY]), "JPEG2000", irreversible=False), RGB, RGB),
        (imagecodecs.jpeg2k_encode(RGB * np.uint16(99), level=0), RGB * np.uint16(99), None),
        # Near infrared is no transparency.
        (imagecodecs.jpeg2k_encode(np.dstack([RGB, GREY]), level=0), np.dstack([RGB, GREY]), None),
    ],
)  # fmt: skip
def test_what_a_file_stores_is_read(tmp_path, content, image, mask):
    path = tmp_path / "a"
    path.write_bytes(content)
    read = image_files.read_image(path)
    assert np.array_equal(np.squeeze(read), image)
    assert read.dtype in (np.uint8, np.uint16, np.float32)
    assert image_files.read_size(path) == (30, 20)
    assert read_stack(path).num_pages == 1
    if mask is not None:
        assert np.array_equal(image_files.read_mask(path), mask)


def test_avif_and_heic_are_read():
    smooth = np.repeat(np.repeat(RGB[::10, ::10], 10, 0), 10, 1)
    contents = [saved(smooth, "AVIF", quality=95)]
    heif = pytest.importorskip("pillow_heif")
    target = io.BytesIO()
    heif.from_pillow(PIL.Image.fromarray(smooth)).save(target, quality=95)
    for content in (*contents, target.getvalue()):
        read = image_files.decode_image(content)
        assert read.shape == smooth.shape
        assert np.abs(read.astype(int) - smooth).mean() < 12


def test_a_missing_package_is_named_with_its_install_line(monkeypatch):
    heic = b"\0\0\0\x18ftypheic" + bytes(200)
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'useg\[heic\]'"):
        image_files.decode_image(heic)


def dicom(array, photometric="MONOCHROME2", **more):
    pydicom = pytest.importorskip("pydicom")
    frames = array if array.ndim == 3 and photometric != "RGB" else array[None]
    dataset, meta = pydicom.Dataset(), pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1"
    meta.TransferSyntaxUID = more.pop("syntax", pydicom.uid.ExplicitVRLittleEndian)
    dataset.file_meta = meta
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, "1"
    dataset.Rows, dataset.Columns = frames.shape[1:3]
    dataset.SamplesPerPixel = 3 if photometric == "RGB" else 1
    dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = photometric
    bits = 8 * array.dtype.itemsize
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit, dataset.PixelRepresentation = bits - 1, int(array.dtype.kind == "i")
    dataset.NumberOfFrames = len(frames)
    for name, value in more.items():
        setattr(dataset, name, value)
    dataset.PixelData = array.tobytes()
    target = io.BytesIO()
    dataset.save_as(target, enforce_file_format=True)
    return target.getvalue()


def test_dicom_is_read(tmp_path):
    path = tmp_path / "a.dcm"
    path.write_bytes(dicom(GREY.astype(np.int16), RescaleSlope=2, RescaleIntercept=-1024))
    assert np.array_equal(image_files.read_image(path)[..., 0], GREY * np.float32(2) - 1024)
    path.write_bytes(dicom(RGB, "RGB"))
    assert np.array_equal(image_files.read_image(path), RGB)
    path.write_bytes(dicom(GREY, "MONOCHROME1"))
    assert np.array_equal(image_files.read_image(path)[..., 0], 255 - GREY)
    path.write_bytes(dicom(np.stack([IDS, GREY])))
    assert (read_stack(path).num_pages, image_files.read_size(path, 0)) == (2, (30, 20))
    assert np.array_equal(image_files.read_mask(path, page=0), IDS)
    assert np.array_equal(image_files.read_image(path, page=1)[..., 0], GREY)


def test_nothing_is_printed_of_a_damaged_dicom(capfd):
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.dcmread(io.BytesIO(dicom(IDS.astype(np.uint8))))
    dataset.compress(pydicom.uid.RLELossless)
    target = io.BytesIO()
    dataset.save_as(target)
    content = target.getvalue()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(UsageError, match="it ends before its pixels do"):
            image_files.decode_image(content[:-20])
        image_files.decode_image(
            content.replace(b"1.2.840.10008.5.1.4.1.1.7", b"1.2.840.\x1b[31m.5.1.4.1.1.7")
        )
    assert not caught
    assert capfd.readouterr() == ("", "")
    # The control: pydicom itself warns of it.
    with pytest.warns(UserWarning, match="End of file reached"):
        pydicom.dcmread(io.BytesIO(content[:-20]))


@pytest.mark.parametrize("syntax", ["JPEG2000Lossless", "RLELossless", "JPEGBaseline8Bit"])
def test_a_compressed_dicom_is_read(tmp_path, syntax):
    pydicom = pytest.importorskip("pydicom")
    encaps = pytest.importorskip("pydicom.encaps")
    path, image = tmp_path / "a.dcm", GREY.astype(np.uint8)
    path.write_bytes(dicom(np.stack([image, image[::-1]])))
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
    if syntax == "RLELossless":
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        dataset.compress(pydicom.uid.RLELossless)
    else:
        form = "JPEG2000" if "2000" in syntax else "JPEG"
        frames = [saved(page, form) for page in (image, image[::-1])]
        dataset.PixelData = encaps.encapsulate(frames)
    dataset.save_as(path, enforce_file_format=True)
    for page, expected in enumerate((image, image[::-1])):
        read = image_files.read_image(path, page=page)[..., 0]
        assert np.abs(read.astype(int) - expected).max() <= (60 if "Baseline" in syntax else 0)


def huge_jpeg2000():
    content = bytearray(saved(RGB, "JPEG2000"))
    place = content.find(b"\xff\x4f\xff\x51") + 8
    struct.pack_into(">8I", content, place, 60_000, 60_000, 0, 0, 60_000, 60_000, 0, 0)
    return bytes(content)


def sparse_bands(*steps):
    """A JPEG 2000 whose bands have values at only some of the columns and rows."""
    content = bytearray(saved(RGB, "JPEG2000"))
    place = content.find(b"\xff\x4f\xff\x51") + 42
    for band, step in enumerate(steps):
        content[place + 3 * band + 1 : place + 3 * band + 3] = step
    return bytes(content)


def many_tiles():
    content = bytearray(saved(RGB, "JPEG2000"))
    place = content.find(b"\xff\x4f\xff\x51") + 8
    struct.pack_into(">8I", content, place, 9_000, 9_000, 0, 0, 1, 1, 0, 0)
    return bytes(content)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: b"P6 60000 60000 255\n" + bytes(99), "declares 60000x60000 pixels"),
        (lambda: b"P6 9000 9000 255\n" + bytes(99), "more than its .* bytes can hold"),
        (lambda: b"P5 9 9 99999\n" + bytes(99), "its highest value is 99999"),
        (lambda: b"P2 2 1 9\n3 77", "a value outside of 0 to 9"),
        (lambda: b"P5 # " + b"x" * 9000, "is not an image that useg can read"),
        (lambda: b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer .*; run git"),
        (lambda: npy(GREY)[:200], "is shorter"),
        (lambda: npy(GREY).replace(b"(20, 30)", b"(9000000000000, 30)"), "damaged|declares"),
        (lambda: npy(RGB).replace(b", 3)", b", -3)", 1).replace(b" \n", b"\n", 1), "the shape"),
        (lambda: npy(np.array([{}]), allow_pickle=True), "instead of numbers"),
        (lambda: npy(GREY).replace(b"(20, 30)", b"(2**9,30)"), "its header is not that of"),
        (lambda: npy(GREY).replace(b"shape", b"shale"), "its header is not that of"),
        (lambda: npy(GREY).replace(b"NUMPY\1\0", b"NUMPY\2\0"), "its header is too long"),
        (lambda: npy(np.zeros((2, 2, 2, 2))), "neither an image"),
        (lambda: npy(np.zeros((90, 90, 90), np.uint8)), "a stack of 90 pages"),
        (lambda: npy(np.zeros((4, 4), complex)), "instead of numbers"),
        (huge_jpeg2000, "declares 60000x60000 pixels"),
        (many_tiles, "more tiles than it can hold"),
        (lambda: sparse_bands((2, 2), (2, 2), (2, 2)), "the sizes of its bands are inconsistent"),
        (lambda: sparse_bands((1, 1), (1, 2), (1, 2)), "the sizes of its bands are inconsistent"),
        (lambda: b"\0\0\0\x1cftypavif" + bytes(99), "is not an image|damaged"),
        (lambda: dicom(GREY, Rows=60_000, Columns=60_000), "60000x60000 pixels"),
        (lambda: dicom(GREY, Rows=9_000, Columns=9_000), "bytes can hold"),
        (lambda: dicom(GREY, Rows=25), "damaged or incomplete"),
        (lambda: dicom(GREY, syntax="1.2.840.10008.1.2.1.99"), "compressed as a whole"),
        (lambda: bytes(128) + b"DICM" + bytes(40), "damaged or incomplete"),
    ],
)
def test_what_a_header_declares_is_compared_with_the_file_first(make, reason):
    with pytest.raises(UsageError, match=reason):
        image_files.decode_image(make(), "a")


@pytest.mark.parametrize("checked", [True, False])
def test_a_damaged_jpeg_2000_prints_nothing(checked, capfd, monkeypatch):
    """Without the check its decoder prints, as the control shows."""
    steps = [(2, 2)] * 3
    if not checked:
        monkeypatch.setattr(jpeg2000, "_COLOR_STEPS", [steps])
    with pytest.raises(UsageError, match="damaged or incomplete"):
        image_files.decode_image(sparse_bands(*steps), "a")
    assert ("CAN NOT CONVERT" in capfd.readouterr().err) == (not checked)


def test_no_suffix_is_both_read_and_unread():
    assert not IMAGE_SUFFIXES & UNREAD_SUFFIXES.keys()
    assert all(suffix.startswith(".") and advice for suffix, advice in UNREAD_SUFFIXES.items())


def test_an_array_of_many_images_says_how_to_save_each(tmp_path):
    np.save(tmp_path / "stack.npy", np.zeros((3, 20, 30, 3), np.uint8))
    with pytest.raises(UsageError, match=r"is a stack of 3 pages.*: for k, page") as raised:
        image_files.read_image(tmp_path / "stack.npy")
    program = str(raised.value).partition("in Python: ")[2]
    exec(program.replace("f'page", f"f'{tmp_path}/page"), {"numpy": np})
    assert image_files.read_image(tmp_path / "page0002.npy").shape == (20, 30, 3)
