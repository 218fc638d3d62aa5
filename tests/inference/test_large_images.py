"""TIFFs in parts: rectangles equal the whole file, label maps equal one pass and lie on the map."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_inference import make_model, make_predictor, textured_image

from useg.errors import UsageError
from useg.images import large_tiff
from useg.images.image_files import read_image, read_mask, read_palette
from useg.images.large_tiff import halved, open_raster
from useg.images.stacks import read_stack
from useg.inference import large_images
from useg.inference.large_images import is_large_image, predict_large_image
from useg.inference.predictor import Predictor
from useg.models.geometry import WorkingSize

RNG = np.random.default_rng(0)

# A GeoTIFF with tiles, as rasterio writes it, without its height and width.
TILED_RGB = {
    "driver": "GTiff",
    "count": 3,
    "dtype": "uint8",
    "tiled": True,
    "blockxsize": 64,
    "blockysize": 64,
}


@settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    data=st.data(),
    dtype=st.sampled_from(["u1", "u2", "f4", "i2"]),
    bands=st.sampled_from([1, 3, 4, 7]),
    compression=st.sampled_from([None, "lzw", "deflate", "zstd"]),
    planar=st.booleans(),
    layout=st.sampled_from([{"tile": (16, 32)}, {"rowsperstrip": 7}, {}]),
    order=st.sampled_from("<>"),
    big=st.booleans(),
)
def test_every_rectangle_is_that_of_the_whole(
    tmp_path, data, dtype, bands, compression, planar, layout, order, big
):
    height, width = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 90))
    pixels = (
        np.random.default_rng(height * width).integers(0, 256, (height, width, bands)).astype(dtype)
    )
    stored = pixels[..., 0] if bands == 1 else np.moveaxis(pixels, -1, 0) if planar else pixels
    options: dict[str, Any] = (
        {"extrasamples": [0] * (bands - 1), "planarconfig": "separate" if planar else "contig"}
        if bands > 1
        else {}
    )
    tifffile.imwrite(
        tmp_path / "a.tif",
        stored,
        photometric="minisblack",
        metadata=None,
        compression=compression,
        byteorder=order,
        bigtiff=big,
        **layout,
        **options,
    )
    whole = read_image(tmp_path / "a.tif")
    with open_raster(tmp_path / "a.tif", bands) as raster:
        assert (raster.shape, raster.dtype) == (whole.shape, whole.dtype)
        for _ in range(3):
            top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
            place = (
                slice(top, data.draw(st.integers(top + 1, height))),
                slice(left, data.draw(st.integers(left + 1, width))),
            )
            assert np.array_equal(raster[place], whole[place])


@pytest.mark.parametrize(
    "options",
    [
        {"photometric": "palette", "colormap": RNG.integers(0, 65536, (3, 256)).astype(np.uint16)},
        {"photometric": "miniswhite", "compression": "deflate"},
        {"bitspersample": 2},
    ],
)
def test_palettes_and_white_that_is_zero_and_packed_bits(tmp_path, options):
    values = RNG.integers(0, 4, (70, 50)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", values, tile=(16, 16), **options)
    with open_raster(tmp_path / "a.tif", 3) as raster:
        assert np.array_equal(raster[10:60, 3:44], read_image(tmp_path / "a.tif")[10:60, 3:44])


def test_jpeg_tiles_and_alpha(tmp_path):
    tifffile.imwrite(
        tmp_path / "a.tif",
        textured_image(100, 80),
        tile=(32, 32),
        compression="jpeg",
        photometric="rgb",
    )
    with open_raster(tmp_path / "a.tif", 3) as raster:
        assert np.array_equal(raster[10:90, 3:77], read_image(tmp_path / "a.tif")[10:90, 3:77])
    pixels = RNG.integers(0, 256, (40, 50, 4), np.uint8)
    tifffile.imwrite(
        tmp_path / "b.tif", pixels, photometric="rgb", extrasamples=["unassalpha"], tile=(16, 16)
    )
    for channels in (3, 4):
        with open_raster(tmp_path / "b.tif", channels) as raster:
            assert np.array_equal(raster[0:40, 0:50], pixels[..., :channels])


# Label maps


MODELS = [
    ("same", WorkingSize()),
    ("valid", WorkingSize()),
    ("same", WorkingSize(scale=0.37)),
    ("valid", WorkingSize(scale=1.3)),
    ("same", WorkingSize(frame=(80, 60))),
    ("same", WorkingSize(frame=(80, 60), standardize=True)),
]


@pytest.fixture(params=MODELS, ids=str)
def predictor(request):
    padding, working = request.param
    return make_predictor(make_model(padding, working=working))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(large_tiff, "TILE_SIDE", 64)
    monkeypatch.setattr(large_images, "TILE_SIDE", 64)
    monkeypatch.setattr(large_images, "MAX_ACTIVATION_BYTES", 4_000_000)


def test_the_label_map_is_that_of_the_whole_picture(predictor, tmp_path):
    image = textured_image(301, 407)
    tifffile.imwrite(
        tmp_path / "a.tif", image, tile=(64, 64), compression="deflate", photometric="rgb"
    )
    predict_large_image(predictor, tmp_path / "a.tif", tmp_path / "labels.tif")
    label, logits = read_mask(tmp_path / "labels.tif"), np.sort(predictor.logits(image), 0)
    sure = logits[-1] - logits[-2] > 1e-4
    assert sure.mean() > 0.7  # a random network often answers nothing at all
    assert len(np.unique(label)) > 1
    assert (label == predictor(image))[sure].all()
    assert (label == predictor(image)).mean() > 0.9999
    assert np.array_equal(read_palette(tmp_path / "labels.tif")[:4], predictor.classes.colors)
    assert read_stack(tmp_path / "labels.tif").num_pages == 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_there_are_several_blocks_and_windows_of_one_size():
    predictor = make_predictor(make_model())
    blocks, windows = large_images.plan_blocks(
        np.zeros((301, 407, 3)),
        (301, 407),
        predictor.runtime.description.geometry,
        20_000,
        lambda rows: 407,
    )
    sizes = {window.size for window in windows}
    assert len(blocks) > 5
    assert len(sizes) == 1
    assert np.prod(sizes.pop()) <= 20_000


def test_overviews_are_read_by_other_programs(tmp_path):
    predictor = make_predictor(make_model())
    tifffile.imwrite(tmp_path / "a.tif", textured_image(301, 407), tile=(64, 64), photometric="rgb")
    predict_large_image(predictor, tmp_path / "a.tif", tmp_path / "labels.tif")
    label = read_mask(tmp_path / "labels.tif")
    with tifffile.TiffFile(tmp_path / "labels.tif") as file:
        assert file.is_bigtiff
        assert [page.shape for page in file.pages] == [(301, 407), (151, 204), (76, 102), (38, 51)]
        assert [page.is_reduced for page in file.pages] == [False, True, True, True]
        half = file.pages[1].asarray()
    even = np.pad(label, [(0, 1), (0, 1)], "edge")
    assert np.array_equal(half, halved(even))


def test_halving_takes_the_most_frequent_class():
    fours = np.array(list(product(range(4), repeat=4)), np.uint8)
    # Of equally frequent classes, most_common takes the first.
    expected = [Counter(four.tolist()).most_common(1)[0][0] for four in fours]
    assert halved(fours.reshape(-1, 2, 2).reshape(-1, 2)).ravel().tolist() == expected


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # of rasterio about affine
def test_the_label_map_lies_over_the_image(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    from rasterio.control import GroundControlPoint
    from rasterio.transform import Affine, from_origin

    image = textured_image(150, 200)
    image[:40, :50] = 0
    predictor = make_predictor(make_model())
    turned = Affine.translation(500_000, 5_400_000) @ Affine.rotation(30) @ Affine.scale(0.5, -0.5)
    for number, place in enumerate(
        (
            {"crs": "EPSG:32633", "transform": from_origin(500_000, 5_400_000, 0.5, 0.5)},
            {"crs": "EPSG:4326", "transform": turned},
            {
                "crs": "EPSG:32633",
                "gcps": [
                    GroundControlPoint(r, c, 500 + c, 900 - r)
                    for r, c in ((0, 0), (0, 199), (149, 0), (149, 199))
                ],
            },
        )
    ):
        path, target = tmp_path / f"{number}.tif", tmp_path / f"{number}_labels.tif"
        options = {**TILED_RGB, "height": 150, "width": 200}
        with rasterio.open(
            path, "w", **options, nodata=0, compress="deflate", photometric="rgb", **place
        ) as file:
            file.write(image.transpose(2, 0, 1))
        predict_large_image(predictor, path, target)
        with rasterio.open(path) as before, rasterio.open(target) as after:
            assert after.crs == before.crs
            assert after.transform == before.transform
            assert [(p.row, p.col, p.x, p.y) for p in after.gcps[0]] == [
                (p.row, p.col, p.x, p.y) for p in before.gcps[0]
            ]
            assert after.nodata == 255
            assert after.overviews(1) == [2, 4]
            assert after.colormap(1)[1][:3] == predictor.classes.colors[1]
            label = after.read(1)
        assert (label[:40, :50] == 255).all()
        assert (label == 255).sum() == (image == 0).all(2).sum()


def test_overviews_of_the_picture_itself_are_no_pages(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    image = textured_image(300, 200)
    options = {**TILED_RGB, "height": 300, "width": 200}
    with rasterio.open(
        tmp_path / "a.tif",
        "w",
        **options,
        photometric="rgb",
        transform=rasterio.Affine(2, 0, 5, 0, -2, 9),
    ) as file:
        file.write(image.transpose(2, 0, 1))
        file.build_overviews([2, 4])
    with open_raster(tmp_path / "a.tif", 3) as raster:
        assert np.array_equal(raster[0:300, 0:200], image)


def test_holes_in_float_pictures_have_no_class_and_the_mean_of_the_training_pictures(tmp_path):
    predictor = make_predictor(make_model(channels=1, pixels="float32"))
    image = RNG.normal(100, 50, (90, 120, 1)).astype(np.float32)
    holes = image.copy()
    image[20:40, 30:60], holes[20:40, 30:60], holes[25, 31] = 100, np.nan, np.inf
    tifffile.imwrite(tmp_path / "a.tif", holes[..., 0], tile=(32, 32))
    predict_large_image(predictor, tmp_path / "a.tif", tmp_path / "labels.tif")
    expected = np.where(np.isnan(holes[..., 0]), 255, predictor(image))
    assert (read_mask(tmp_path / "labels.tif") == expected).mean() > 0.999


def test_a_failed_prediction_leaves_no_file(tmp_path):
    predictor = make_predictor(make_model())
    good = tmp_path / "a.tif"
    tifffile.imwrite(
        good, textured_image(200, 300), tile=(64, 64), compression="deflate", photometric="rgb"
    )
    with pytest.raises(UsageError, match=r"the target is 'labels\.png'; end the name in \.tif"):
        predict_large_image(predictor, good, tmp_path / "labels.png")
    with pytest.raises(UsageError, match="would overwrite the image itself; choose another"):
        predict_large_image(predictor, good, good)
    with pytest.raises(
        UsageError,
        match="which ensembles and augmentation do not support; give one model, without",
    ):
        predict_large_image(
            Predictor(predictor.runtime, augment="flip"), good, tmp_path / "labels.tif"
        )
    tifffile.imwrite(
        tmp_path / "four.tif",
        textured_image(70, 70, 4),
        tile=(64, 64),
        photometric="minisblack",
        planarconfig="contig",
    )
    with pytest.raises(UsageError, match=r"four\.tif has 4 bands, but 3 are needed"):
        predict_large_image(predictor, tmp_path / "four.tif", tmp_path / "labels.tif")
    (tmp_path / "no.tif").write_bytes(b"not a TIFF at all")
    with pytest.raises(
        UsageError,
        match="is not a TIFF, and only TIFFs are read in parts; save it as a tiled TIFF",
    ):
        predict_large_image(predictor, tmp_path / "no.tif", tmp_path / "labels.tif")
    broken = bytearray(good.read_bytes())
    with tifffile.TiffFile(good) as file:
        place = file.pages[0].dataoffsets[13]
    broken[place : place + 40] = bytes(40)
    (tmp_path / "broken.tif").write_bytes(broken)
    with pytest.raises(
        UsageError, match=r"broken\.tif' is damaged or incomplete .*; save or copy it again"
    ):
        predict_large_image(predictor, tmp_path / "broken.tif", tmp_path / "labels.tif")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.tif",
        "broken.tif",
        "four.tif",
        "no.tif",
    ]


def test_one_strip_as_large_as_the_picture_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    tifffile.imwrite(
        tmp_path / "a.tif",
        textured_image(200, 300),
        rowsperstrip=200,
        compression="deflate",
        photometric="rgb",
    )
    monkeypatch.setenv("USEG_MAX_PIXELS", "30000")
    with (
        pytest.raises(UsageError, match="declares 300x200 pixels"),
        open_raster(tmp_path / "a.tif", 3),
    ):
        pass


def test_only_large_tiffs_are_large_images(tmp_path, monkeypatch):
    monkeypatch.setattr(large_images, "MAX_IN_MEMORY_PIXELS", 10_000)
    for name, shape in (("large.tif", (101, 100)), ("small.tif", (100, 100))):
        tifffile.imwrite(tmp_path / name, np.zeros(shape, np.uint8))
    (tmp_path / "broken.tif").write_bytes(b"II*\0 and no more")
    assert [
        is_large_image(tmp_path / name)
        for name in ("large.tif", "small.tif", "broken.tif", "none.tif")
    ] == [True, False, False, False]


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads the peak memory as Linux counts it"
)
def test_memory_does_not_grow_with_the_picture(tmp_path):
    """4 million pixels take little more memory than a quarter of a million.

    Their logits and intermediate steps together would take 128 MB and more.
    """
    code = """
import resource, sys
import numpy as np, tifffile
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from made_inference import make_model, make_predictor
from useg.inference import large_images
from useg.inference.predictor import Predictor
large_images.MAX_ACTIVATION_BYTES = 16 << 20
path, target = (Path(sys.argv[2]) / name for name in ("a.tif", "labels.tif"))
tile = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
for side in (512, 2048):
    some = (tile for _ in range((side // 256) ** 2))
    options = dict(shape=(side, side, 3), dtype="u1", tile=(256, 256), photometric="rgb")
    tifffile.imwrite(path, some, **options)
    large_images.predict_large_image(make_predictor(make_model()), path, target)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    command = [sys.executable, "-c", code, str(Path(__file__).parent.parent), str(tmp_path)]
    run = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    small, large = (int(line) // 1024 for line in run.stdout.split())
    assert large - small < 48


def test_cached_tiles_are_decoded_once(tmp_path, monkeypatch):
    tifffile.imwrite(
        tmp_path / "a.tif",
        textured_image(128, 128),
        tile=(32, 32),
        compression="deflate",
        photometric="rgb",
    )
    decoded = []
    exact = large_tiff.Raster._decode
    monkeypatch.setattr(
        large_tiff.Raster,
        "_decode",
        lambda self, plane, number: decoded.append(number) or exact(self, plane, number),
    )
    with open_raster(tmp_path / "a.tif", 3) as raster:
        for _ in range(2):
            raster[0:128, 0:128]
    assert sorted(decoded) == list(range(16))


@pytest.mark.parametrize(
    ("layout", "most"), [({"tile": (64, 64)}, 1.25), ({"rowsperstrip": 32}, 1.0)]
)
def test_a_wide_picture_is_decoded_about_once(tmp_path, monkeypatch, layout, most):
    """Only part of a row of tiles fits into memory; blocks in rows would decode most twice."""
    monkeypatch.setattr(large_tiff, "TILE_CACHE_BYTES", 30 * 64 * 64 * 3)
    monkeypatch.setattr(large_tiff, "STRIP_CACHE_BYTES", 6 * 1024 * 32 * 3)
    tifffile.imwrite(
        tmp_path / "a.tif",
        textured_image(512, 1024),
        compression="deflate",
        photometric="rgb",
        **layout,
    )
    monkeypatch.setattr(large_images, "MAX_ACTIVATION_BYTES", 2_000_000)
    decoded = []
    exact = large_tiff.Raster._decode
    monkeypatch.setattr(
        large_tiff.Raster,
        "_decode",
        lambda self, plane, number: decoded.append(number) or exact(self, plane, number),
    )
    predict_large_image(make_predictor(make_model()), tmp_path / "a.tif", tmp_path / "labels.tif")
    # The first tile is decoded twice: the number type of the image was read from it.
    assert len(decoded) <= most * len(set(decoded)) + 1
