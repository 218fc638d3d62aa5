"""Pixel statistics + network + class table <-> the one model file: raw pixels in, logits out.

The mean and deviation of the pixels are buffers of the model, so no second copy of the preprocessing can exist anywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from useg.classes import ClassTable
from useg.errors import UsageError, choose
from useg.files import replacing
from useg.models import baselines, encoders
from useg.models.geometry import Geometry, WorkingSize
from useg.models.unet import UNet

MODEL_FORMAT = 1  # of the model file; raised when an older useg could not read a newer file


Network = UNet | baselines.PixelClassifier | baselines.FCN | encoders.EncoderUNet


MODEL_NAME = "model.safetensors"


class Segmenter(nn.Module):
    """A network with all that is needed to use it.

    Args:
        settings: what ``build`` needs to make the network: ``{"encoder": "plain", "channels": 3, "classes": 13, ...}``.
        classes: the class table; K entries.
        mean: mean of each band over the training images, in raw pixel units (0-255 for 8 bit), C numbers.
        std: their standard deviation; at least a small positive number.
        working: the size at which the model looks at pictures.
        pixels: number type of the pictures: ``"uint8"``, ``"uint16"`` or ``"float32"``.
        provenance: what was it trained on, how, and how good it is; free, JSON-ready.
        temperature: what its logits are divided by before they become probabilities; no label map depends on it.
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
        """Bands of the pictures that it takes."""
        return self.mean.shape[1]

    def valid_size(self, size: int) -> int:
        """Return the smallest height or width of at least ``size`` pixels that the network takes."""
        return self.network.valid_size(size)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, K, H - 2 * margin, W - 2 * margin) for raw pixels (N, C, H, W) of any number type."""
        x = (x.to(self.mean.dtype) - self.mean) / self.std
        logits: Tensor = self.network(x.contiguous(memory_format=torch.channels_last))
        return logits


def output_size(network: Network | Segmenter, size: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest (width, height) of at least ``size`` that comes out of one pass."""
    width, height = (
        network.valid_size(side + 2 * network.margin) - 2 * network.margin for side in size
    )
    return width, height


def _plain(settings: Mapping[str, Any]) -> Network:
    network = UNet(
        **{
            key: value
            for key, value in settings.items()
            if key not in ("encoder", "skips") and value is not None
        }
    )
    if not settings.get("skips", True):
        network.skips = (False,) * network.depth
    return network


def build_network(settings: Mapping[str, Any]) -> Network:
    """Make the untrained network that ``settings`` describe; it has ``margin``, ``stride``, ``context`` and ``valid_size``.

    Raises:
        UsageError: an unknown encoder or impossible settings.
    """
    return choose("model.encoder", str(settings.get("encoder") or "plain"), NETWORKS)(settings)


@dataclass(frozen=True)
class _Header:
    """What the model file says beside its tensors."""

    format: int
    network: dict[str, Any]
    classes: dict[str, Any]
    working: dict[str, Any]
    pixels: str
    provenance: dict[str, Any]
    temperature: float


def save_model(model: Segmenter, path: Path) -> None:
    """Write the model file, whole or not at all."""
    from safetensors.torch import save as to_bytes

    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    header = _Header(
        MODEL_FORMAT,
        model.settings,
        asdict(model.classes),
        asdict(model.working),
        model.pixels,
        model.provenance,
        model.temperature,
    )
    text = json.dumps(asdict(header), sort_keys=True)
    content = to_bytes(
        tensors, {"useg": f"{_digest(text, tensors)} {text}"}
    )  # one entry: safetensors writes several in any order
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def load_model(path: Path) -> Segmenter:
    """Read a model file in evaluation mode.

    Args:
        path: the file, or the run folder that holds ``model.safetensors``.

    Raises:
        UsageError: no such file, not a useg model, cut short, or a bit of it has changed.
    """
    from safetensors import SafetensorError, safe_open

    path = path / MODEL_NAME if path.is_dir() else path
    if not path.is_file():
        raise UsageError(
            f"there is no model at {path}; give a run folder, or a model.safetensors that useg train wrote"
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(
            f"{path} is not a readable model file ({error}); it is damaged or of another kind: copy or train it again"
        ) from error
    if "useg" not in metadata:
        raise UsageError(
            f"{path} is a safetensors file, but not a useg model; give one that useg train wrote"
        )
    digest, _, text = metadata["useg"].partition(" ")
    if digest != _digest(text, tensors):
        raise UsageError(
            f"{path} is damaged: its content does not match its checksum; copy or train it again"
        )
    content = json.loads(text)
    if content["format"] > MODEL_FORMAT:
        raise UsageError(
            f"{path} has format {content['format']}, this useg reads up to {MODEL_FORMAT}; update useg"
        )
    header = _Header(**content)
    classes = ClassTable(**{key: _tuples_segmenter(value) for key, value in header.classes.items()})
    working = WorkingSize(
        **{key: _tuples_segmenter(value) for key, value in header.working.items()}
    )
    channels = tensors["mean"].shape[1]
    model = Segmenter(
        header.network,
        classes,
        [0.0] * channels,
        [1.0] * channels,
        working,
        header.pixels,
        header.provenance,
        header.temperature,
    )
    model.load_state_dict(tensors)
    model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the header's text and every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tuples_segmenter(value: Any) -> Any:
    return tuple(_tuples_segmenter(item) for item in value) if isinstance(value, list) else value


NETWORKS: dict[str, Callable[[Mapping[str, Any]], Network]] = {
    "plain": _plain,
    **dict.fromkeys(baselines.BASELINES, baselines.build_baseline),
    **dict.fromkeys(encoders.ENCODERS, encoders.build_encoder_unet),
}


DESCRIPTION_FORMAT = 1  # of the text; raised when an older useg could not read a newer file


@dataclass(frozen=True)
class ModelDescription:
    """All that is needed to use a model whose numbers are in a graph.

    Args:
        network: the settings that the network was built from.
        classes: what the K logits stand for.
        working: the size at which it looks at pictures.
        channels: bands that it takes.
        pixels: number type that it takes: ``"uint8"``, ``"uint16"`` or ``"float32"``.
        mean: mean of each band over the training pictures, in raw pixel units; the graph subtracts it itself.
        std: their standard deviation; the graph divides by it itself.
        margin: pixels lost on each side.
        stride: sizes that it takes are ``smallest`` plus multiples of this.
        context: how far outside an aligned block of output pixels its inputs reach.
        smallest: the smallest height or width that it takes.
        temperature: what the logits are divided by before they become probabilities; no label map depends on it.
        precision: of the numbers in the file: ``"fp32"`` or ``"int8"``.
        provenance: what it was trained on, how, and how good it is.
    """

    network: dict[str, Any]
    classes: ClassTable
    working: WorkingSize
    channels: int
    pixels: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    margin: int
    stride: int
    context: int
    smallest: int
    temperature: float = 1.0
    precision: str = "fp32"
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def geometry(self) -> Geometry:
        """Which sizes the network takes and what it loses."""
        return Geometry(self.margin, self.stride, self.context, self.valid_size)

    def valid_size(self, size: int) -> int:
        """Return the smallest height or width of at least ``size`` pixels that the network takes."""
        return self.smallest + max(0, -(-(size - self.smallest) // self.stride)) * self.stride


def describe_model(model: Segmenter) -> ModelDescription:
    """Say of a model in memory what its exported forms will say."""
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


def description_to_json(card: ModelDescription) -> str:
    """Return the card as JSON, in ASCII, on one line."""
    return json.dumps({"format": DESCRIPTION_FORMAT, **asdict(card)}, sort_keys=True)


def description_from_json(text: str, source: str) -> ModelDescription:
    """Read what ``to_text`` wrote.

    Raises:
        UsageError: a newer useg wrote it.
    """
    content = json.loads(text)
    if content.pop("format") > DESCRIPTION_FORMAT:
        raise UsageError(f"{source} was exported by a newer useg than this; update useg")
    classes = ClassTable(**{key: _tuples(value) for key, value in content.pop("classes").items()})
    working = WorkingSize(**{key: _tuples(value) for key, value in content.pop("working").items()})
    mean, std = _tuples(content.pop("mean")), _tuples(content.pop("std"))
    return ModelDescription(classes=classes, working=working, mean=mean, std=std, **content)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
