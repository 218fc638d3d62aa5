"""OME-Zarr folders that lie: no chunk unpacks to more than its array declares."""

import json
import zlib
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest

from useg.errors import UsageError
from useg.images import ome_zarr
from useg.images.ome_zarr import is_zarr, open_zarr
from useg.images.zarr_limits import ChunkLimits

zarr = pytest.importorskip("zarr")
numcodecs = pytest.importorskip("numcodecs")
PIXELS = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
AXES = [{"name": axis, "type": "space"} for axis in "yx"]


def scales(path: str = "0") -> dict[str, Any]:
    return {"version": "0.4", "axes": AXES, "datasets": [{"path": path}]}


def folder(tmp_path: Path, chunk: Any, array_path: str = "0", **array: Any) -> Path:
    """An OME-Zarr 0.4 of one chunk, put together by hand."""
    path = tmp_path / "a.zarr"
    (path / "0").mkdir(parents=True)
    (path / ".zgroup").write_text('{"zarr_format": 2}')
    (path / ".zattrs").write_text(json.dumps({"multiscales": [scales(array_path)]}))
    metadata = {"zarr_format": 2, "shape": [64, 64], "chunks": [64, 64], "dtype": "|u1"}
    metadata |= {"compressor": None, "fill_value": 0, "order": "C", "filters": None}
    (path / "0" / ".zarray").write_text(json.dumps(metadata | array))
    (path / "0" / "0.0").write_bytes(chunk)
    return path


def refused(path: Path, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        open_zarr(path)[0:64, 0:64]


@pytest.mark.parametrize(
    ("limit", "lowered", "array", "sentence"),
    [
        ("_MAX_CHUNKS", 3, {"chunks": [32, 32]}, "its 4,096 bytes are in 4 chunks"),
        ("_MAX_CELL_BYTES", 1023, {"chunks": [4, 16]}, r"64x64 pixels of it have 4,096 bytes"),
    ],
)
def test_very_many_or_large_chunks_at_a_time_are_refused(
    tmp_path, monkeypatch, limit, lowered, array, sentence
):
    path = folder(tmp_path, b"", **array)
    (path / "0" / "0.0").unlink()
    monkeypatch.setattr(ome_zarr, "_BYTES_PER_CHUNK", 1 << 20)
    # The control: missing chunks are read as zeros.
    assert not open_zarr(path)[0:64, 0:64].any()
    monkeypatch.setattr(ome_zarr, limit, lowered)
    refused(path, sentence)


def test_bands_count_as_declared_pixels(tmp_path):
    path = folder(tmp_path, b"", shape=[10**6, 64, 64], chunks=[1, 64, 64])
    axes = [{"name": "c", "type": "channel"}, *AXES]
    (path / ".zattrs").write_text(json.dumps({"multiscales": [scales() | {"axes": axes}]}))
    refused(path, r"it declares 4,096,000,000 pixels, but holds only \d+ bytes")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_a_place_that_is_not_finite_is_refused(tmp_path, number):
    path = folder(tmp_path, PIXELS.tobytes())
    step = '{"type": "scale", "scale": [1, ' + number + "]}"
    text = json.dumps({"multiscales": [scales()]})
    path.joinpath(".zattrs").write_text(
        text.replace('{"path"', '{"coordinateTransformations": [' + step + '], "path"')
    )
    refused(path, "the size or place of its pixels is not finite")


def test_what_an_error_repeats_of_a_file_is_cut(tmp_path):
    path = folder(tmp_path, b"", dtype="|u" + "1" * 100_000)
    with pytest.raises(UsageError) as caught:
        open_zarr(path)
    assert len(str(caught.value)) < 600 + len(str(path))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("codec", ["blosc", "zstd", "gzip", None])
def test_honest_chunks_and_shards_are_read(tmp_path, codec, sharded):
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=3)
    options: dict[str, Any] = {"shards": (32, 64)} if sharded else {}
    compressors = codec and {
        "name": codec,
        "configuration": {} if codec == "blosc" else {"level": 1},
    }
    if codec == "blosc":
        compressors = zarr.codecs.BloscCodec()
    group.create_array("0", data=PIXELS, chunks=(16, 32), compressors=compressors, **options)
    group.attrs["ome"] = {"version": "0.5", "multiscales": [scales()]}
    image = open_zarr(tmp_path / "a.zarr")
    assert np.array_equal(image[0:64, 0:64][..., 0], PIXELS)
    assert np.array_equal(image[17:20, 40:60][..., 0], PIXELS[17:20, 40:60])


def packed(codec, num_bytes):
    content = bytes(num_bytes)
    if codec == "zlib":
        return zlib.compress(content), {"id": "zlib", "level": 1}
    if codec == "gzip":
        return imagecodecs.gzip_encode(content), {"id": "gzip", "level": 1}
    if codec == "zstd":
        return imagecodecs.zstd_encode(content), {"id": "zstd", "level": 1}
    if codec == "lz4":
        return imagecodecs.lz4_encode(content, header=True), {"id": "lz4", "acceleration": 1}
    options = {"id": "blosc", "cname": "lz4", "clevel": 1, "shuffle": 0, "blocksize": 0}
    return imagecodecs.blosc_encode(content), options


@pytest.mark.parametrize("codec", ["zlib", "gzip", "zstd", "lz4", "blosc"])
def test_a_chunk_that_unpacks_to_more_than_its_array_declares_is_refused(tmp_path, codec):
    content, compressor = packed(codec, 20_000_000)
    sentence = "a chunk of 5,120 bytes unpacks to|has .* bytes, but at most"
    refused(folder(tmp_path / "bad", content, compressor=compressor), sentence)
    content, compressor = packed(codec, PIXELS.size)
    assert not open_zarr(folder(tmp_path / "good", content, compressor=compressor))[0:9, 0:9].any()


def test_a_zstd_frame_without_a_size_is_measured(tmp_path):
    # Frame header without a size, then blocks of one byte repeated 128 kB times (RFC 8878).
    block = ((131_072 << 3) | 2).to_bytes(3, "little") + b"\7"
    last = ((131_072 << 3) | 3).to_bytes(3, "little") + b"\7"
    content = b"\x28\xb5\x2f\xfd\0\x88" + block * 4000 + last
    refused(folder(tmp_path, content, compressor={"id": "zstd", "level": 1}), "damaged")


def test_a_shard_is_measured_chunk_by_chunk(tmp_path):
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=3)
    zstd = {"name": "zstd", "configuration": {"level": 1}}
    group.create_array("0", data=PIXELS, chunks=(32, 32), shards=(64, 64), compressors=zstd)
    group.attrs["ome"] = {"version": "0.5", "multiscales": [scales()]}
    shard = tmp_path / "a.zarr" / "0" / "c" / "0" / "0"
    bomb = imagecodecs.zstd_encode(bytes(50_000_000))
    index = np.array([[0, len(bomb)]] * 4, "<u8").tobytes()
    checksum = numcodecs.get_codec({"id": "crc32c"}).encode(index)[-4:]
    shard.write_bytes(bomb + index + bytes(checksum))
    refused(tmp_path / "a.zarr", "a chunk of 2,048 bytes unpacks to 50,000,000")
    with pytest.raises(UsageError, match="unpacks to 50,000,000"):
        open_zarr(tmp_path / "a.zarr")[0:3, 0:3]


def shard_of(tmp_path, chunks, places, at="end"):
    """An OME-Zarr of one shard of 1,024 chunks of 2x2 pixels, with this index."""
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=3)
    group.attrs["ome"] = {"version": "0.5", "multiscales": [scales()]}
    plain = {"name": "bytes"}
    options = {"chunk_shape": [2, 2], "index_codecs": [plain], "index_location": at}
    options |= {"codecs": [plain, {"name": "gzip", "configuration": {"level": 1}}]}
    array = {"zarr_format": 3, "node_type": "array", "shape": [64, 64], "data_type": "uint8"}
    array |= {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [64, 64]}}}
    array |= {"chunk_key_encoding": {"name": "default"}, "fill_value": 0, "attributes": {}}
    array |= {"codecs": [{"name": "sharding_indexed", "configuration": options}]}
    shard = tmp_path / "a.zarr" / "0" / "c" / "0" / "0"
    shard.parent.mkdir(parents=True)
    (tmp_path / "a.zarr" / "0" / "zarr.json").write_text(json.dumps(array))
    rows = np.full((1024, 2), 2**64 - 1, "<u8")
    rows[: len(places)] = np.array(places, "<u8").reshape(-1, 2)
    index = rows.tobytes()
    shard.write_bytes(chunks + index if at == "end" else index + chunks)
    return tmp_path / "a.zarr"


CHUNK = zlib.compress(bytes(4), wbits=31)
INDEX_BYTES = 16 * 1024


@pytest.mark.parametrize("at", ["end", "start"])
def test_the_index_of_a_shard_is_checked(tmp_path, at):
    first = 0 if at == "end" else INDEX_BYTES
    path = shard_of(tmp_path / "good", CHUNK, [(first, len(CHUNK))], at)
    assert not open_zarr(path)[0:64, 0:64].any()
    assert not open_zarr(path)[0:2, 0:2].any()
    beyond, repeated = "lies beyond the end of its shard", "chunks of a shard overlap"
    places = [(2**64 - 2, 3), (first, 2**63), (first + 9_999_999, 9)]
    for place in places if at == "end" else [*places, (0, INDEX_BYTES)]:
        path = shard_of(tmp_path / f"{place}", CHUNK, [place], at)
        refused(path, beyond)
        with pytest.raises(UsageError, match=beyond):
            open_zarr(path)[0:2, 0:2]
    many = [(first + k, len(CHUNK)) for k in range(1024)]
    refused(shard_of(tmp_path / "many", CHUNK + bytes(1024), many, at), repeated)


@pytest.mark.parametrize("at", ["end", "start"])
def test_a_chunk_as_long_as_the_index_is_measured(tmp_path, at):
    """Some versions of Zarr read the index and the chunks of a shard one by one."""
    path = shard_of(tmp_path, CHUNK, [], at)
    limits = ChunkLimits(path)
    limits.set_array(json.loads((path / "0" / "zarr.json").read_text()), (2, 2), 1)
    index = (path / "0" / "c" / "0" / "0").read_bytes()
    index = index[len(CHUNK) :] if at == "end" else index[: -len(CHUNK)]
    requests = zarr.abc.store
    ranges = {
        "end": requests.SuffixByteRequest(INDEX_BYTES),
        "start": requests.RangeByteRequest(0, INDEX_BYTES),
    }
    limits.check("0/c/0/0", index, ranges[at])
    bomb = zlib.compress(bytes(9_000_000), wbits=31).ljust(INDEX_BYTES, b"\0")
    place = requests.RangeByteRequest(7, 7 + INDEX_BYTES)
    with pytest.raises(ValueError, match="a chunk of 1,028 bytes unpacks to more"):
        limits.check("0/c/0/0", bomb, place)


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        ({"compressor": {"id": "bz2", "level": 1}}, "its chunks are packed by bz2"),
        (
            {"compressor": {"id": "zlib", "level": 1}, "filters": [{"id": "zlib", "level": 1}]},
            "zlib",
        ),
        ({"chunks": [65_536, 65_536]}, "a chunk of it has 4,294,967,296 bytes"),
        ({"shape": [10**9, 10**9]}, "it declares 1,000,000,000,000,000,000 pixels, but holds only"),
        ({"shape": [2**63, 2**63]}, "damaged|pixels"),
        ({"shape": [-5, 64]}, "damaged|pixels"),
    ],
)
def test_what_an_array_declares_is_checked_before_anything_is_unpacked(tmp_path, array, sentence):
    refused(folder(tmp_path, bytes(PIXELS.size), **array), sentence)


@pytest.mark.parametrize("count", [3, 300])
def test_long_lists_of_an_array_are_refused_before_zarr_makes_objects_of_them(tmp_path, count):
    shuffle = {"id": "shuffle", "elementsize": 1}
    second = folder(tmp_path / "v2", bytes(4096), filters=[shuffle] * count)
    group = zarr.open_group(tmp_path / "v3.zarr", mode="w", zarr_format=3)
    group.create_array("0", data=PIXELS, attributes={f"key {k}": [{}] for k in range(count)})
    group.attrs["ome"] = {"version": "0.5", "multiscales": [scales()]}
    third = tmp_path / "v3.zarr"
    assert np.array_equal(open_zarr(third)[0:64, 0:64][..., 0], PIXELS)
    file = third / "0" / "zarr.json"
    content = json.loads(file.read_text())
    transpose = {"name": "transpose", "configuration": {"order": [0, 1]}}
    file.write_text(json.dumps(content | {"codecs": [transpose] * count + content["codecs"]}))
    for path in (second, third):
        if count > 200:
            refused(path, "more than 200 codecs, filters or fields")
        else:
            assert open_zarr(path)[0:64, 0:64].shape == (64, 64, 1)


@pytest.mark.parametrize("count", [2, 17])
def test_an_image_has_few_coordinate_transformations(tmp_path, count):
    path = folder(tmp_path, bytes(4096))
    steps = {"coordinateTransformations": [{"type": "scale", "scale": [2, 2]}] * count}
    content = {"multiscales": [{**scales(), "datasets": [{"path": "0", **steps}]}]}
    (path / ".zattrs").write_text(json.dumps(content))
    if count > 16:
        refused(path, "more than 16 axes or coordinate transformations")
    else:
        assert open_zarr(path).placement.scale == (4, 4)


def test_a_path_that_leaves_the_folder_is_refused(tmp_path):
    folder(tmp_path / "outside", PIXELS.tobytes())
    path = folder(tmp_path, bytes(PIXELS.size), array_path="../outside/a.zarr/0")
    refused(path, "contains '.' or '..' segments")


def test_metadata_that_is_no_file_is_not_read(tmp_path):
    path = folder(tmp_path, bytes(PIXELS.size))
    (path / ".zattrs").unlink()
    (path / ".zattrs").symlink_to("/dev/zero")
    refused(path, "is not a file")
    assert is_zarr(path), "by its name"
    assert not is_zarr(path.rename(tmp_path / "a"))
