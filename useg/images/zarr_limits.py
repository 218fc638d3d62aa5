"""Zarr files -> the same files, checked: no chunk decompresses to more than its array declares.

Zarr's codecs decompress whatever a chunk holds: 2 MB of zlib can become 2 GB. So each file is
checked between the disk and the codecs, and only codecs whose output can be checked are allowed.
"""

from __future__ import annotations

import json
import math
import stat
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from useg.images.formats import EXTRA_BYTES, UnreadableError
from useg.parsing import parse_json

# Of an image with ten levels and all its channels, they have a few kB.
MAX_METADATA_BYTES = 2 << 20
# Codecs whose output has about as many bytes as their input.
_PLAIN = {"bytes", "endian", "transpose", "crc32c", "shuffle"}
_SHARDS = "sharding_indexed"
_MAX_MEMBERS = 16
# Lists and objects in the metadata of an array, apart from its attributes: Zarr takes a quarter of
# a millisecond to make a codec of one.
_MAX_ARRAY_ITEMS = 200
_MAX_SHARD_CHUNKS = 1 << 20
# Offset and length in the index for a chunk that is missing from a shard.
_NO_CHUNK = (1 << 64) - 1
_ZSTD_START = b"\x28\xb5\x2f\xfd"
_ARRAY_METADATA = {".zarray", "zarr.json"}
_METADATA = {*_ARRAY_METADATA, ".zattrs", ".zgroup", ".zmetadata"}


class ChunkLimits:
    """Checks the files of one array; before :meth:`set_array`, only those of metadata are read.

    Args:
        folder: the Zarr group.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._chunk_bytes, self._file_bytes = 0, MAX_METADATA_BYTES
        self._compressor: str | None = None
        # Number of chunks of a shard, bytes of its index, whether that stands at the end.
        self._shard: tuple[int, int, bool] | None = None

    def set_array(self, metadata: Mapping[str, Any], chunks: Sequence[int], itemsize: int) -> None:
        """Check the codecs of an array, whose chunks are read from now on.

        Args:
            metadata: of the array, as its file has it.
            chunks: shape of the smallest part that is compressed on its own.
            itemsize: bytes of a value.
        """
        codecs = _codecs(metadata)
        self._chunk_bytes = math.prod(chunks) * itemsize
        file_bytes = self._chunk_bytes
        if codecs and codecs[-1][0] == _SHARDS:
            options = codecs[-1][1]
            outer = metadata["chunk_grid"]["configuration"]["chunk_shape"]
            num_chunks = math.prod(outer) // max(math.prod(chunks), 1)
            index = [str(codec["name"]) for codec in options["index_codecs"]]
            if not 1 <= num_chunks <= _MAX_SHARD_CHUNKS or index not in (
                ["bytes"],
                ["bytes", "crc32c"],
            ):
                raise UnreadableError("its shards have an unusual index")
            self._shard = (
                num_chunks,
                16 * num_chunks + 4 * len(index[1:]),
                options.get("index_location", "end") == "end",
            )
            file_bytes = math.prod(outer) * itemsize + self._shard[1]
            codecs = codecs[:-1] + _codecs(options)
        compressors = [name for name, _ in codecs if name not in _PLAIN]
        if len(compressors) > 1 or not set(compressors) <= set(_CHECKS):
            raise UnreadableError(f"its chunks are packed by {', '.join(compressors)}")
        self._compressor = compressors[0] if compressors else None
        self._file_bytes = 2 * file_bytes + EXTRA_BYTES

    def check_file(self, key: str) -> None:
        """Refuse anything but a file, and a file that is larger than its content can be."""
        try:
            status = (self._folder / key).stat()
        except OSError:
            return
        most = MAX_METADATA_BYTES if key.rsplit("/")[-1] in _METADATA else self._file_bytes
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"'{key}' is not a file")
        if status.st_size > most:
            raise ValueError(f"'{key}' has {status.st_size:,} bytes, but at most {most:,} are read")

    def check(self, key: str, content: bytes, byte_range: Any) -> None:
        """Refuse a chunk that decompresses to more than the array declares.

        Args:
            key: the file's path in the group.
            content: what was read of it.
            byte_range: Zarr's name of the part that was read; None: the whole file.
        """
        if (name := key.rsplit("/")[-1]) in _METADATA:
            if name in _ARRAY_METADATA:
                _check_items(content)
            return
        limit = self._chunk_bytes + 1024
        if self._shard is None or (byte_range is not None and not self._is_index(byte_range)):
            self._check_chunk(content, limit)
            return
        num_chunks, index_bytes, at_end = self._shard
        index = content[-index_bytes:] if at_end else content[:index_bytes]
        whole = len(content) if byte_range is None else self._file_bytes
        places = _shard_places(index[: 16 * num_chunks], whole, 0 if at_end else index_bytes)
        if byte_range is None:
            for start, end in places:
                self._check_chunk(content[start:end], limit)

    def _check_chunk(self, content: bytes, limit: int) -> None:
        if self._compressor is not None:
            _CHECKS[self._compressor](content, limit)

    def _is_index(self, byte_range: Any) -> bool:
        """Tell whether the index of a shard is read; no chunk of it has the same place."""
        assert self._shard
        _, index_bytes, at_end = self._shard
        if at_end:
            return getattr(byte_range, "suffix", None) == index_bytes
        return (getattr(byte_range, "start", -1), getattr(byte_range, "end", -1)) == (
            0,
            index_bytes,
        )


def _shard_places(index: bytes, num_bytes: int, first: int) -> set[tuple[int, int]]:
    """Return where the chunks of a shard begin and end.

    Args:
        index: offset and length of each chunk.
        num_bytes: of the shard.
        first: where the first chunk can begin.
    """
    places = {
        (start, start + length)
        for start, length in struct.iter_unpack("<QQ", index)
        if (start, length) != (_NO_CHUNK, _NO_CHUNK)
    }
    if any(start < first or end > num_bytes for start, end in places):
        raise ValueError("a chunk lies beyond the end of its shard")
    if sum(end - start for start, end in places) > num_bytes:
        raise ValueError("the chunks of a shard overlap")
    return places


def open_group(folder: Path, limits: ChunkLimits) -> Any:
    """Open a Zarr group whose files are checked as they are read."""
    import zarr
    from zarr.storage import LocalStore, WrapperStore

    class CheckedStore(WrapperStore[LocalStore]):
        async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
            limits.check_file(key)
            buffer = await super().get(key, prototype, byte_range)
            if buffer is not None:
                limits.check(key, buffer.to_bytes(), byte_range)
            return buffer

        async def get_partial_values(
            self, prototype: Any, key_ranges: Iterable[tuple[str, Any]]
        ) -> list[Any]:
            return [await self.get(key, prototype, part) for key, part in key_ranges]

    store = CheckedStore(LocalStore(folder, read_only=True))
    return zarr.open_group(store, mode="r", use_consolidated=False)


def _check_items(content: bytes) -> None:
    """Refuse the metadata of an array with very many codecs, filters or fields."""
    if content.count(b"{") + content.count(b"[") <= _MAX_ARRAY_ITEMS:
        return
    metadata = parse_json(content)
    if isinstance(metadata, dict) and metadata.get("node_type") != "group":
        text = json.dumps({**metadata, "attributes": None})
        if text.count("{") + text.count("[") > _MAX_ARRAY_ITEMS:
            raise ValueError(f"an array has more than {_MAX_ARRAY_ITEMS} codecs, filters or fields")


def _codecs(metadata: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the names and options of the codecs of an array, of Zarr v2 or v3."""
    if "codecs" in metadata:
        found = [(codec["name"], codec.get("configuration") or {}) for codec in metadata["codecs"]]
    else:
        steps = [*(metadata.get("filters") or ()), metadata.get("compressor")]
        found = [(step["id"], step) for step in steps if step is not None]
    return [(str(name).removeprefix("numcodecs."), options) for name, options in found]


def _check_size(num_bytes: int, limit: int) -> None:
    if num_bytes > limit:
        raise ValueError(f"a chunk of {limit:,} bytes unpacks to {num_bytes:,}")


def _check_blosc(content: bytes, limit: int) -> None:
    if len(content) >= 16:
        _check_size(int.from_bytes(content[4:8], "little"), limit)


def _check_lz4(content: bytes, limit: int) -> None:
    _check_size(int.from_bytes(content[:4], "little"), limit)


def _check_zstd(content: bytes, limit: int) -> None:
    """Check the size that a frame declares, which may be missing (RFC 8878, section 3.1.1)."""
    if content[:4] != _ZSTD_START or len(content) < 18:
        _check_by_decoding(content, limit)
        return
    flags = content[4]
    is_single, kind = bool(flags & 0x20), flags >> 6
    start = 5 + (0 if is_single else 1) + (0, 1, 2, 4)[flags & 3]
    width = (1 if is_single else 0, 2, 4, 8)[kind]
    if not width:
        _check_by_decoding(content, limit)
        return
    size = int.from_bytes(content[start : start + width], "little") + (256 if kind == 1 else 0)
    _check_size(size, limit)


def _check_by_decoding(content: bytes, limit: int) -> None:
    import imagecodecs

    imagecodecs.zstd_decode(content, out=limit)


def _check_deflate(content: bytes, limit: int) -> None:
    left, rest = limit, content
    for _ in range(_MAX_MEMBERS):
        decoder = zlib.decompressobj(47)
        while not decoder.eof:
            part = decoder.decompress(rest, 1 << 20)
            left, rest = left - len(part), decoder.unconsumed_tail
            if left < 0:
                raise ValueError(f"a chunk of {limit:,} bytes unpacks to more")
            if not part and not rest:
                return
        rest = decoder.unused_data
        if not rest:
            return
    raise ValueError(f"a chunk is packed in more than {_MAX_MEMBERS} parts")


_CHECKS = {
    "blosc": _check_blosc,
    "zstd": _check_zstd,
    "lz4": _check_lz4,
    "gzip": _check_deflate,
    "zlib": _check_deflate,
}
