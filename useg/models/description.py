"""What every model file says about a model beside its weights: written as JSON, read with a check.

A model file may come from a stranger, and a checksum only shows damage. So every field is checked
here, before a network is built from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from useg.classes import ClassTable
from useg.config import ModelSettings, PixelCount
from useg.errors import ModelError, UsageError
from useg.images.limits import pixel_limit
from useg.models.geometry import Geometry, WorkingSize, round_up
from useg.parsing import parse_json, shorten

# Newest format versions of the model file and of the description in exported files. They are raised
# when an older useg could not read a newer file: version 2 knows objects. Models that have none are
# written as version 1.
MODEL_FORMAT = 2
DESCRIPTION_FORMAT = 2
# The fields of a ModelDescription in a model file. The others follow from its tensors and network.
MODEL_FILE_FIELDS = ("network", "classes", "working", "pixels", "provenance", "temperature")
# The description of a model with 255 classes has 100 kB.
MAX_MODEL_TEXT_BYTES = 1 << 22
_MAX_CHANNELS, _MAX_CLASSES = 65535, 255
# What a model that tells objects apart computes beside its classes: the logit of the depth.
OBJECT_CHANNELS = 1


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
    def has_objects(self) -> bool:
        """Whether the model computes what keeps touching objects apart."""
        return bool(self.network.get("objects"))

    @property
    def num_outputs(self) -> int:
        """Number of values that the network computes for a pixel."""
        return len(self.classes) + OBJECT_CHANNELS * self.has_objects

    @property
    def geometry(self) -> Geometry:
        """The sizes that the network takes, and the pixels that it loses."""
        return Geometry(self.margin, self.stride, self.context, self.valid_size)

    def valid_size(self, size: int) -> int:
        """Return the smallest height or width that the network takes, at least ``size``."""
        return self.smallest + max(0, round_up(size - self.smallest, self.stride))


def unusable(source: object, reason: str) -> ModelError:
    """Return the error for a model file that useg did not write like this."""
    return ModelError(
        f"{source} is not a usable model: {reason}; it is damaged, or useg did not write it: "
        "copy, train or export it again"
    )


def description_to_json(description: ModelDescription) -> str:
    """Return the whole description for an exported file, as one line of ASCII JSON."""
    return _to_json(asdict(description))


def model_fields_to_json(description: ModelDescription) -> str:
    """Return the fields of ``MODEL_FILE_FIELDS`` for a model file, as one line of ASCII JSON."""
    fields = asdict(description)
    return _to_json({key: fields[key] for key in MODEL_FILE_FIELDS})


def _to_json(fields: Mapping[str, Any]) -> str:
    if fields["network"].get("objects") or fields["classes"]["objects"] is not None:
        return json.dumps({"format": 2, **fields}, sort_keys=True)
    classes = {key: value for key, value in fields["classes"].items() if key != "objects"}
    return json.dumps({"format": 1, **fields, "classes": classes}, sort_keys=True)


def description_from_json(text: str, source: str) -> ModelDescription:
    """Read what :func:`description_to_json` wrote; ``source`` names the file in errors.

    Raises:
        ModelError: a newer useg wrote it, or a field is missing, unknown or impossible.
    """
    checked = _checked(text, _ExportedFile, source, DESCRIPTION_FORMAT)
    assert isinstance(checked, _ExportedFile)
    content = checked.model_dump(exclude={"format", "classes", "working"})
    for key in ("mean", "std"):
        content[key] = tuple(content[key])
        if len(content[key]) != checked.channels:
            raise unusable(
                source, f"it has {len(content[key])} values of {key} for {checked.channels} bands"
            )
    return ModelDescription(**content, **_tables(checked, source))


def model_fields_from_json(text: str, source: str) -> dict[str, Any]:
    """Read what :func:`model_fields_to_json` wrote: the arguments of a ``Segmenter``.

    Raises:
        ModelError: a newer useg wrote it, or a field is missing, unknown or impossible.
    """
    checked = _checked(text, _ModelFile, source, MODEL_FORMAT)
    content = checked.model_dump(exclude={"format", "classes", "working"})
    return content | _tables(checked, source)


CheckedT = TypeVar("CheckedT", bound=BaseModel)


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _Classes(_Checked):
    names: list[str]
    colors: list[Annotated[list[int], Field(min_length=3, max_length=3)]]
    values: list[int]
    ignore: list[int]
    by_color: bool
    objects: list[int] | None = None


class _Working(_Checked):
    frame: Annotated[list[PixelCount], Field(min_length=2, max_length=2)] | None
    scale: Annotated[float, Field(gt=0, le=4)]


class _Split(_Checked):
    split: str = Field("", alias="data.split")
    holdout: float = Field(0.2, alias="data.holdout")


class _Start(_Checked):
    """The model that the training started from."""

    model_config = ConfigDict(extra="ignore")

    model: str = ""
    num_seen: Annotated[int, Field(ge=0)] = 0


class _TrainingImages(_Checked):
    mean: list[Annotated[float, Field(ge=-1e6, le=1e6)]]
    deviation: list[Annotated[float, Field(ge=1e-6, le=1e6)]]
    examples: Annotated[
        list[list[Annotated[int, Field(ge=-(10**9), le=10**9)]]],
        Field(min_length=1),
    ]
    limit: Annotated[float, Field(ge=1e-6, le=1e6)]


class _ClassIou(_Checked):
    model_config = ConfigDict(extra="ignore")

    name: str = ""
    iou: float | None = None
    pixels: int = 0


class _Validation(_Checked):
    model_config = ConfigDict(extra="ignore")

    classes: list[_ClassIou] = Field(default_factory=list)


class _Provenance(_Checked):
    """Only the entries that useg itself uses; everything else is shown as it is."""

    model_config = ConfigDict(extra="ignore")

    dataset: str = ""
    num_train: Annotated[int, Field(ge=0)] = 0
    splits_by: str = ""
    split: _Split = Field(default_factory=_Split)
    training_images: _TrainingImages | None = None
    validation: _Validation = Field(default_factory=_Validation)
    start: _Start = Field(default_factory=_Start)
    min_object_pixels: Annotated[int, Field(ge=0, le=10**9)] = 0
    # Of a typical object in a training image, in pixels of the image; 0 if it is not known.
    object_side: Annotated[float, Field(ge=0, le=10**6)] = 0.0


class _ModelFile(_Checked):
    """The fields of a model file."""

    format: Annotated[int, Field(ge=1)]
    network: dict[str, Any]
    classes: _Classes
    working: _Working
    pixels: Literal["uint8", "uint16", "float32"]
    provenance: dict[str, Any]
    temperature: Annotated[float, Field(ge=1e-6, le=1e6)]


class _ExportedFile(_ModelFile):
    """All fields of a description."""

    channels: Annotated[int, Field(ge=1, le=65535)]
    mean: list[float]
    std: list[Annotated[float, Field(gt=0)]]
    margin: Annotated[int, Field(ge=0)]
    stride: Annotated[int, Field(ge=1)]
    context: Annotated[int, Field(ge=0)]
    smallest: Annotated[int, Field(ge=1)]
    precision: Literal["fp32", "int8"]


def _checked(text: str, schema: type[_ModelFile], source: str, newest: int) -> _ModelFile:
    """Parse the JSON of a description, and check its fields one by one.

    Raises:
        ModelError: as for the functions that call it.
    """
    try:
        if len(text) > MAX_MODEL_TEXT_BYTES:
            raise ValueError(f"it has {len(text):,} characters")
        content = parse_json(text)
    except ValueError as error:
        raise unusable(source, f"its description is not valid JSON ({error})") from error
    version = content.get("format") if isinstance(content, dict) else None
    if type(version) is int and version > newest:
        raise ModelError(
            f"{source} has format {shorten(version)}, but this useg reads formats up to {newest}; "
            "update useg"
        )
    checked = _validate(schema, content, source)
    network = dict(checked.network)
    for key, most in (("channels", _MAX_CHANNELS), ("classes", _MAX_CLASSES)):
        count = network.pop(key, None)
        if type(count) is not int or not 1 <= count <= most:
            raise unusable(source, f"network.{key} = {shorten(count)} is not from 1 to {most}")
    _validate(ModelSettings, network, source, "network.")
    origin = _validate(_Provenance, checked.provenance, source, "provenance.")
    if origin.training_images:
        _check_training_images(origin.training_images, checked.network["channels"], source)
    return checked


def _check_training_images(images: _TrainingImages, channels: int, source: str) -> None:
    """Refuse statistics of images with another number of bands."""
    # Only models that know their training images need the module.
    from useg.models.image_statistics import count_statistics

    needed = count_statistics(channels)
    counts = {len(images.mean), len(images.deviation), *map(len, images.examples)}
    if counts != {needed}:
        raise unusable(source, f"its training images do not have {needed} numbers each")


def _validate(schema: type[CheckedT], content: Any, source: str, prefix: str = "") -> CheckedT:
    try:
        return schema.model_validate(content, strict=True)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = prefix + ".".join(str(part) for part in problem["loc"])
        value = "" if problem["type"] == "missing" else f" = {shorten(problem['input'])}"
        message = problem["msg"][0].lower() + problem["msg"][1:]
        raise unusable(source, f"{shorten(place)[1:-1]}{value}: {message}") from error


def _tables(checked: _ModelFile, source: str) -> dict[str, Any]:
    """Return the class table and the working size of a description."""
    stored = checked.classes
    frame = checked.working.frame
    working = WorkingSize((frame[0], frame[1]) if frame else None, checked.working.scale)
    try:
        classes = ClassTable(
            names=tuple(stored.names),
            colors=tuple((r, g, b) for r, g, b in stored.colors),
            values=tuple(stored.values),
            ignore=tuple(stored.ignore),
            by_color=stored.by_color,
            objects=None if stored.objects is None else tuple(stored.objects),
        )
    except UsageError as error:
        raise unusable(source, str(error).partition(";")[0]) from error
    if len(classes) != checked.network["classes"]:
        raise unusable(
            source, f"it names {len(classes)} classes for {checked.network['classes']} logits"
        )
    if frame and frame[0] * frame[1] > pixel_limit(None):
        raise unusable(
            source,
            f"it processes images at {frame[0]}x{frame[1]} pixels, and USEG_MAX_PIXELS allows "
            f"{pixel_limit(None):,}",
        )
    return {"classes": classes, "working": working}
