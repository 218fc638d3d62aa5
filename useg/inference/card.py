"""What a model file says of its model, beside the numbers, as one JSON text: the same in every format that useg writes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from useg.classes import ClassTable
from useg.data.cache import WorkingSize
from useg.errors import UsageError
from useg.inference.tiles import Geometry
from useg.models.segmenter import Segmenter

FORMAT = 1  # of the text; raised when an older useg could not read a newer file


@dataclass(frozen=True)
class Card:
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


def card_of(model: Segmenter) -> Card:
    """Say of a model in memory what its exported forms will say."""
    return Card(
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


def to_text(card: Card) -> str:
    """Return the card as JSON, in ASCII, on one line."""
    return json.dumps({"format": FORMAT, **asdict(card)}, sort_keys=True)


def from_text(text: str, source: str) -> Card:
    """Read what ``to_text`` wrote.

    Raises:
        UsageError: a newer useg wrote it.
    """
    content = json.loads(text)
    if content.pop("format") > FORMAT:
        raise UsageError(f"{source} was exported by a newer useg than this; update useg")
    classes = ClassTable(**{key: _tuples(value) for key, value in content.pop("classes").items()})
    working = WorkingSize(**{key: _tuples(value) for key, value in content.pop("working").items()})
    mean, std = _tuples(content.pop("mean")), _tuples(content.pop("std"))
    return Card(classes=classes, working=working, mean=mean, std=std, **content)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
