"""The model that useg trains and saves: raw pixels in, logits out.

A ``Segmenter`` is a network with the mean and standard deviation of the training pixels and the
class table. The statistics are buffers of the model, so there is no second copy of the
preprocessing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from useg.classes import ClassTable
from useg.errors import ModelError, SettingsError, choose
from useg.files import replacing
from useg.models import baselines, encoders
from useg.models.description import (
    MAX_MODEL_TEXT_BYTES,
    OBJECT_CHANNELS,
    ModelDescription,
    model_fields_from_json,
    model_fields_to_json,
    unusable,
)
from useg.models.geometry import WorkingSize
from useg.models.unet import UNet
from useg.ownership import is_own_model
from useg.parsing import open_file, shorten

Network = UNet | baselines.PixelClassifier | baselines.FCN | encoders.EncoderUNet

MODEL_NAME = "model.safetensors"

# A table of 10,000 tensors needs 1 MB.
MAX_HEADER_BYTES = MAX_MODEL_TEXT_BYTES + (4 << 20)

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


class Segmenter(nn.Module):
    """A network with everything that is needed to use it.

    Args:
        settings: what ``build_network`` needs:
            ``{"encoder": "plain", "channels": 3, "classes": 13, ...}``.
        classes: the class table; K entries.
        mean: mean of each band over the training images, in raw pixel units (0-255 for 8 bits);
            C numbers.
        std: their standard deviations; at least a small positive number.
        working: the size at which the model processes images.
        pixels: pixel type of the images: ``"uint8"``, ``"uint16"`` or ``"float32"``.
        provenance: how the model was trained, and its scores; free, JSON-ready.
        temperature: divisor of the logits when probabilities are computed; label maps do not
            depend on it.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        settings: Mapping[str, Any],
        classes: ClassTable,
        mean: Sequence[float],
        std: Sequence[float],
        working: WorkingSize | None = None,
        pixels: str = "uint8",
        provenance: Mapping[str, Any] | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.settings = dict(settings)
        self.network = build_network(settings)
        self.classes = classes
        self.working = working or WorkingSize()
        self.pixels = pixels
        self.provenance = dict(provenance or {})
        self.temperature = temperature
        self.margin = self.network.margin
        self.stride = self.network.stride
        self.context = self.network.context
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    @property
    def channels(self) -> int:
        """Number of bands of the images that the model takes."""
        return self.mean.shape[1]

    def valid_size(self, size: int) -> int:
        """Return the smallest height or width that the network takes, at least ``size``."""
        return self.network.valid_size(size)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits.

        Args:
            x: raw pixels ``(N, C, H, W)`` of any number type.

        Returns:
            ``(N, K, H - 2 * margin, W - 2 * margin)``; with objects, the logit of the depth
            follows the K classes (:mod:`useg.objects.separation`).
        """
        x = (x.to(self.mean.dtype) - self.mean) / self.std
        logits: Tensor = self.network(x.contiguous(memory_format=torch.channels_last))
        return logits


def describe_model(model: Segmenter) -> ModelDescription:
    """Return the description of a model in memory."""
    return ModelDescription(
        network=model.settings,
        classes=model.classes,
        working=model.working,
        channels=model.channels,
        pixels=model.pixels,
        mean=tuple(model.mean.flatten().tolist()),
        std=tuple(model.std.flatten().tolist()),
        margin=model.margin,
        stride=model.stride,
        context=model.context,
        smallest=model.valid_size(1),
        temperature=model.temperature,
        provenance=model.provenance,
    )


def check_geometry(description: ModelDescription, source: object) -> None:
    """Refuse an exported description whose sizes are not those of the network that it names.

    Raises:
        ModelError: they differ.
    """
    with on_meta(source):
        network = build_network(description.network)
    for name, given, needed in (
        ("channels", description.channels, description.network["channels"]),
        ("margin", description.margin, network.margin),
        ("stride", description.stride, network.stride),
        ("context", description.context, network.context),
        ("smallest", description.smallest, network.valid_size(1)),
    ):
        if given != needed:
            raise unusable(source, f"its {name} is {given}, but that of its network is {needed}")


@contextmanager
def on_meta(source: object) -> Iterator[None]:
    """Build networks of whatever size without memory for their weights.

    Raises:
        ModelError: the settings of the network are impossible; ``source`` is the file.
    """
    try:
        with torch.device("meta"), _WithoutInitialization():
            yield
    except SettingsError as error:
        raise unusable(source, str(error).partition(";")[0]) from error


class _WithoutInitialization(TorchFunctionMode):
    """Skips random initialisation: on ``meta`` it needs seconds, in which torch imports sympy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch."""
        if func in (nn.init.normal_, nn.init.uniform_, Tensor.normal_, Tensor.uniform_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def save_model(model: Segmenter, path: Path) -> None:
    """Write the model file atomically; the same model gives the same bytes."""
    from safetensors.torch import save as to_bytes

    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    text = model_fields_to_json(describe_model(model))
    # A single entry, because safetensors writes several in any order.
    content = to_bytes(tensors, {"useg": f"{_digest(text, tensors)} {text}"})
    with replacing(path, is_own_model) as draft:
        draft.write_bytes(content)


def model_file(path: Path) -> Path:
    """Return the model file of a run folder; any other path is the file itself."""
    return path / MODEL_NAME if path.is_dir() else path


def load_model(path: Path) -> Segmenter:
    """Read a model file; the model is in evaluation mode.

    Args:
        path: the file, or the run folder that holds ``model.safetensors``.

    Raises:
        ModelError: the file is missing, damaged, not a useg model, or from a newer useg.
    """
    path = model_file(path)
    header, digest, text = _read_header(path)
    fields = model_fields_from_json(text, str(path))
    settings = fields.pop("network")
    channels = settings["channels"]
    # Without memory for weights until the file is known to have them all.
    with on_meta(path):
        model = Segmenter(settings, mean=[0.0] * channels, std=[1.0] * channels, **fields)
    expected = {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in model.state_dict().items()
    }
    if header.tensors != expected:
        raise unusable(path, first_difference(header.tensors, expected))
    tensors = read_safetensors(path)
    if digest != _digest(text, tensors):
        raise ModelError(
            f"{path} is damaged: its content does not match its checksum; copy or train it again"
        )
    check_weights(tensors, path)
    if not (tensors["std"] > 0).all():
        raise unusable(path, "its tensor 'std' has standard deviations that are not above 0")
    model.load_state_dict(tensors, assign=True)
    model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _read_header(path: Path) -> tuple[SafetensorsHeader, str, str]:
    """Read what stands before the weights of a model file; also returns its digest and its JSON."""
    if not path.is_file():
        raise ModelError(
            f"there is no model at {path}; "
            "give a run folder, or a model.safetensors that useg train wrote"
        )
    header = read_safetensors_header(path)
    if "useg" not in header.metadata:
        raise ModelError(
            f"{path} is a safetensors file, but not a useg model; give one that useg train wrote"
        )
    digest, _, text = header.metadata["useg"].partition(" ")
    return header, digest, text


def read_model_provenance(path: Path) -> dict[str, Any]:
    """Read how the model of a file was made, without its weights.

    Raises:
        ModelError: the file is missing, not a useg model, or from a newer useg.
    """
    path = model_file(path)
    provenance: dict[str, Any] = model_fields_from_json(_read_header(path)[2], str(path))[
        "provenance"
    ]
    return provenance


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
        # The file is not a mapping.
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
    """Say which tensor of a file is the first that differs from what its network needs."""
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


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the JSON and of every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def build_network(settings: Mapping[str, Any]) -> Network:
    """Build the untrained network that ``settings`` describe.

    If ``settings["objects"]``, the last layer computes ``OBJECT_CHANNELS`` more than the classes.

    Raises:
        SettingsError: an unknown encoder or impossible settings.
    """
    layers = {key: value for key, value in settings.items() if key != "objects"}
    if settings.get("objects"):
        layers["classes"] = settings["classes"] + OBJECT_CHANNELS
    return choose("model.encoder", str(settings.get("encoder") or "plain"), NETWORKS)(layers)


def _build_plain_unet(settings: Mapping[str, Any]) -> Network:
    excluded = ("encoder", "skips")
    network = UNet(
        **{
            key: value
            for key, value in settings.items()
            if key not in excluded and value is not None
        }
    )
    if not settings.get("skips", True):
        network.skips = (False,) * network.depth
    return network


NETWORKS: dict[str, Callable[[Mapping[str, Any]], Network]] = {
    "plain": _build_plain_unet,
    **dict.fromkeys(baselines.BASELINES, baselines.build_baseline),
    **dict.fromkeys(encoders.ENCODERS, encoders.build_encoder_unet),
}
