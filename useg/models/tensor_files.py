"""Read files of tensors that a stranger may have made: safetensors, and what ``torch.save`` writes.

Nothing in a file is executed, no tensor is larger than the bytes that the file has for it, and a
file that is not as expected is a ``ValueError`` or a ``ModelError``.
"""

from __future__ import annotations

import io
import os
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from useg.errors import ModelError
from useg.models.description import MAX_MODEL_TEXT_BYTES, unusable
from useg.parsing import open_file, shorten

# A table of 10,000 tensors needs 1 MB.
MAX_HEADER_BYTES = MAX_MODEL_TEXT_BYTES + (4 << 20)
MAX_PICKLE_BYTES = 16 << 20

# What a file of torch.save may name: the functions that make a tensor of stored bytes, and types.
ALLOWED_GLOBALS = {
    "collections OrderedDict",
    "torch Size",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    *(
        f"torch {name}Storage"
        for name in (
            *("BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long"),
            "Short",
        )
    ),
}
# The number with which a file begins that torch.save wrote before version 1.6.
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# Its pickles: the magic number, a version, facts about the system, the content, names of storages.
NUM_LEGACY_PICKLES = 5

# Type and shape of a tensor.
Form = tuple[torch.dtype, tuple[int, ...]]

SAFETENSORS_TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class SafetensorsHeader:
    """What stands before the tensors of a file.

    Args:
        metadata: texts by name.
        tensors: type and shape of each tensor; the file has exactly the bytes for them.
    """

    metadata: dict[str, str]
    tensors: dict[str, Form]


def read_safetensors_header(path: Path) -> SafetensorsHeader:
    """Read the header of a safetensors file, but no tensor.

    Raises:
        ModelError: the file is damaged or of another format, or has an unusual type of numbers.
    """
    with _open_safetensors(path) as file:
        forms = {}
        # The file is no mapping.
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_slice(name)
            kind = tensor.get_dtype()
            if kind not in SAFETENSORS_TYPES:
                raise unusable(path, f"its tensor {shorten(name)} has numbers of type {kind}")
            forms[name] = SAFETENSORS_TYPES[kind], tuple(tensor.get_shape())
        return SafetensorsHeader(file.metadata() or {}, forms)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file into memory.

    Raises:
        ModelError: the file is damaged or of another format.
    """
    with _open_safetensors(path) as file:
        # get_tensor maps the file, which another process may change.
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with open_file(path) as file:
            # The first 8 bytes are the length of the header, which is parsed as a whole.
            header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise ValueError(f"its header has {header_bytes:,} bytes")
        with safe_open(str(path), framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"{path} is not a readable model file ({error}); "
            "it is damaged or has another format: copy or train it again"
        ) from error


def first_difference(found: Mapping[str, Form], expected: Mapping[str, Form]) -> str:
    """Say in which tensor a file differs from what a network needs; empty if in none."""
    for name in (*expected, *found):
        if name not in found:
            return f"it has no tensor {shorten(name)}"
        if name not in expected:
            return f"it has the tensor {shorten(name)}, which its network does not have"
        if found[name] != expected[name]:
            (kind, shape), (needed_kind, needed_shape) = found[name], expected[name]
            return (
                f"its tensor {shorten(name)} has {kind} numbers of shape {shape}, and its network "
                f"needs {needed_kind} of shape {needed_shape}"
            )
    return ""


def check_weights(tensors: Mapping[str, Tensor], source: object) -> None:
    """Refuse weights that are not finite, and variances below 0.

    Raises:
        ModelError: there are such numbers.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise unusable(source, f"its tensor {shorten(name)} has numbers that are not finite")
        if name.endswith("running_var") and (tensor < 0).any():
            raise unusable(source, f"its tensor {shorten(name)} has variances below 0")


def load_pickled(file: BinaryIO) -> Any:
    """Read what ``torch.save`` wrote: tensors, numbers and texts in lists and mappings.

    ``torch.load`` with ``weights_only`` runs no code either, but it unpacks compressed parts of any
    size, makes byte arrays of any length, and repeats few numbers into tensors of any shape.

    Raises:
        ValueError: the file has something else, or is damaged.
        OSError: it cannot be read.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    try:
        if zipfile.is_zipfile(file):
            _check_archive(file, num_bytes)
        else:
            _check_legacy(file)
        file.seek(0)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    # PyTorch's unpickler raises errors of nearly every class for damaged files.
    except Exception as error:
        raise ValueError(" ".join(str(error).split())[:200]) from error
    for tensor in _tensors_in(content):
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} repeats stored numbers")
    return content


def _check_archive(file: BinaryIO, num_bytes: int) -> None:
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise ValueError("a part is compressed")
        if sum(part.file_size for part in parts) > num_bytes:
            raise ValueError("its parts are larger than the file")
        pickles = [part for part in parts if part.filename.endswith(".pkl")]
        if [part.filename.rpartition("/")[2] for part in pickles] != ["data.pkl"]:
            raise ValueError("it has not exactly one data.pkl")
        if pickles[0].file_size > MAX_PICKLE_BYTES:
            raise ValueError(f"its data.pkl has {pickles[0].file_size:,} bytes")
        _check_pickle(io.BytesIO(archive.read(pickles[0])))


def _check_legacy(file: BinaryIO) -> None:
    file.seek(0)
    if file.read(len(LEGACY_MAGIC)) != LEGACY_MAGIC:
        raise ValueError("torch.save did not write it")
    start = io.BytesIO(LEGACY_MAGIC + file.read(MAX_PICKLE_BYTES))
    for _ in range(NUM_LEGACY_PICKLES):
        _check_pickle(start)


def _check_pickle(pickled: BinaryIO) -> None:
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "GLOBAL" and argument not in ALLOWED_GLOBALS:
            raise ValueError(f"it names {shorten(argument)}")
        if opcode.name in ("INST", "OBJ", "NEWOBJ", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"it has the operation {opcode.name}")


def _tensors_in(content: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists and mappings, which may contain themselves."""
    seen: set[int] = set()
    left = [content]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, list | tuple | set):
            left += value
