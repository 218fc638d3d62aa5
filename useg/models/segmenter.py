"""The model that useg trains and saves: raw pixels in, logits out.

A ``Segmenter`` is a network with the mean and standard deviation of the training pixels and the
class table. The statistics are buffers of the model, so there is no second copy of the
preprocessing. ``ModelDescription`` is what every file format says about a model beside its weights.
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
from useg.errors import ModelError, choose
from useg.files import replacing
from useg.models import baselines, encoders
from useg.models.geometry import Geometry, WorkingSize, round_up
from useg.models.unet import UNet
from useg.ownership import is_own_model

Network = UNet | baselines.PixelClassifier | baselines.FCN | encoders.EncoderUNet

MODEL_NAME = "model.safetensors"
# Format versions of the model file and of the description in exported files. They are raised when
# an older useg could not read a newer file.
MODEL_FORMAT = 1
DESCRIPTION_FORMAT = 1
# The fields of a ModelDescription in a model file. The others follow from its tensors and network.
MODEL_FILE_FIELDS = ("network", "classes", "working", "pixels", "provenance", "temperature")


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
            ``(N, K, H - 2 * margin, W - 2 * margin)``.
        """
        x = (x.to(self.mean.dtype) - self.mean) / self.std
        logits: Tensor = self.network(x.contiguous(memory_format=torch.channels_last))
        return logits


@dataclass(frozen=True)
class ModelDescription:
    """Everything that is needed to use a model, except its weights.

    A model file stores the fields of ``MODEL_FILE_FIELDS``, an exported file all of them.

    Args:
        network: the settings from which the network was built.
        classes: the class of each of the K logits.
        working: the size at which the model processes images.
        channels: number of bands that it takes.
        pixels: pixel type that it takes: ``"uint8"``, ``"uint16"`` or ``"float32"``.
        mean: mean of each band over the training images, in raw pixel units; the exported graph
            subtracts it itself.
        std: their standard deviations; the exported graph divides by them itself.
        margin: pixels that the network loses on each side.
        stride: the valid sizes are ``smallest`` plus multiples of it.
        context: how far the inputs of an aligned block of output pixels reach beyond the block.
        smallest: smallest height or width that it takes.
        temperature: divisor of the logits when probabilities are computed; label maps do not
            depend on it.
        precision: number type of the weights in the file: ``"fp32"`` or ``"int8"``.
        provenance: how the model was trained, and its scores.
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
        """The sizes that the network takes, and the pixels that it loses."""
        return Geometry(self.margin, self.stride, self.context, self.valid_size)

    def valid_size(self, size: int) -> int:
        """Return the smallest height or width that the network takes, at least ``size``."""
        return self.smallest + max(0, round_up(size - self.smallest, self.stride))


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


def description_to_json(description: ModelDescription) -> str:
    """Return the whole description for an exported file, as one line of ASCII JSON."""
    return _to_json(asdict(description), DESCRIPTION_FORMAT)


def description_from_json(text: str, source: str) -> ModelDescription:
    """Read what :func:`description_to_json` wrote; ``source`` names the file in errors.

    Raises:
        ModelError: a newer useg wrote it.
    """
    content = json.loads(text)
    if content["format"] > DESCRIPTION_FORMAT:
        raise ModelError(f"{source} was exported by a newer useg than this; update useg")
    return ModelDescription(**_from_json(content))


def _to_json(fields: Mapping[str, Any], version: int) -> str:
    return json.dumps({"format": version, **fields}, sort_keys=True)


def _from_json(content: Mapping[str, Any]) -> dict[str, Any]:
    """Convert fields of a description from their JSON form; without the format version."""
    fields = {key: value for key, value in content.items() if key != "format"}
    for key, make in (("classes", ClassTable), ("working", WorkingSize)):
        fields[key] = make(**{name: _to_tuples(value) for name, value in fields[key].items()})
    for key in {"mean", "std"} & fields.keys():
        fields[key] = _to_tuples(fields[key])
    return fields


def _to_tuples(value: Any) -> Any:
    return tuple(_to_tuples(item) for item in value) if isinstance(value, list) else value


def save_model(model: Segmenter, path: Path) -> None:
    """Write the model file atomically; the same model gives the same bytes."""
    from safetensors.torch import save as to_bytes

    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    description = asdict(describe_model(model))
    text = _to_json({key: description[key] for key in MODEL_FILE_FIELDS}, MODEL_FORMAT)
    # A single entry, because safetensors writes several in any order.
    content = to_bytes(tensors, {"useg": f"{_digest(text, tensors)} {text}"})
    with replacing(path, is_own_model) as draft:
        draft.write_bytes(content)


def load_model(path: Path) -> Segmenter:
    """Read a model file; the model is in evaluation mode.

    Args:
        path: the file, or the run folder that holds ``model.safetensors``.

    Raises:
        ModelError: the file is missing, damaged, not a useg model, or from a newer useg.
    """
    path = path / MODEL_NAME if path.is_dir() else path
    if not path.is_file():
        raise ModelError(
            f"there is no model at {path}; "
            "give a run folder, or a model.safetensors that useg train wrote"
        )
    entry, tensors = _read_safetensors(path)
    digest, _, text = entry.partition(" ")
    if digest != _digest(text, tensors):
        raise ModelError(
            f"{path} is damaged: its content does not match its checksum; copy or train it again"
        )
    content = json.loads(text)
    if content["format"] > MODEL_FORMAT:
        raise ModelError(
            f"{path} has format {content['format']}, but this useg reads formats up to "
            f"{MODEL_FORMAT}; update useg"
        )
    fields = _from_json(content)
    # The state dict brings the true statistics.
    channels = tensors["mean"].shape[1]
    model = Segmenter(fields.pop("network"), mean=[0.0] * channels, std=[1.0] * channels, **fields)
    model.load_state_dict(tensors)
    model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _read_safetensors(path: Path) -> tuple[str, dict[str, Tensor]]:
    """Return useg's entry in the metadata of a safetensors file, and the tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"{path} is not a readable model file ({error}); "
            "it is damaged or has another format: copy or train it again"
        ) from error
    if "useg" not in metadata:
        raise ModelError(
            f"{path} is a safetensors file, but not a useg model; give one that useg train wrote"
        )
    return metadata["useg"], tensors


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

    Raises:
        SettingsError: an unknown encoder or impossible settings.
    """
    return choose("model.encoder", str(settings.get("encoder") or "plain"), NETWORKS)(settings)


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
