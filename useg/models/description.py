"""What every model file says about a model besides its weights: written as JSON, read with a check.

A model file may be untrusted, and a checksum only shows damage. So every field is checked
here, before a network is built from it.

Scores of training hold for images like those of training. So a description has the statistics of
some training images: brightness, contrast, colour and sharpness. A new image is compared with the
training image that is nearest to it; the limit is such that about 3 % of the held-out images are
beyond it. This is a nearest-neighbour test for out-of-distribution inputs (Sun and others 2022) on
statistics of the pixels, which take less than a thousandth of a second and do not depend on what
computes the model. It does not notice new things in familiar light.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from useg.classes import MAX_CLASSES, ClassTable
from useg.config import ModelSettings, PixelCount
from useg.errors import ModelError, UsageError
from useg.images.formats import pixel_limit
from useg.models.geometry import Geometry, WorkingSize, round_up
from useg.parsing import parse_json, shorten

# Newest format versions of the model file and of the description in exported files. They are raised
# when an older useg could not read a newer file: version 2 knows objects, version 3 standardised
# images. Models that have neither are written as version 1.
MODEL_FORMAT = 3
DESCRIPTION_FORMAT = 3
# The fields of a ModelDescription in a model file. The others follow from its tensors and network.
MODEL_FILE_FIELDS = ("network", "classes", "working", "pixels", "provenance", "temperature")
# The description of a model with 255 classes has 100 kB.
MAX_MODEL_TEXT_BYTES = 1 << 22
_MAX_CHANNELS = 65535
# Outputs in addition to the classes, of a model that separates objects: the logit of the depth.
OBJECT_CHANNELS = 1

# Objects are hardly larger than in training if the factor on the working size is above this.
MAX_REDUCED_SCALE = 0.75

Statistics = NDArray[np.float64]  # (F,)

# Most training images in a description, and most numbers of all of them together.
MAX_EXAMPLES, MAX_EXAMPLE_NUMBERS = 64, 10_000

# Share of the held-out images that are beyond the limit.
FALSE_ALARM_SHARE = 0.03

# At most this number of rows and columns of an image is looked at.
SAMPLED_SIDE = 32

# Differences to neighbours at these distances show how sharp an image is; in pixels of the size at
# which the model works.
NEIGHBOUR_DISTANCES = 1, 4

# Smallest deviation of a number among the training images, and smallest limit: tiny differences
# from images that are all alike do not count.
MIN_DEVIATION, MIN_LIMIT = 0.05, 0.25

# Pixels, and differences between neighbours, are clipped to this many standard deviations.
MAX_PIXEL = 1e4

# Examples are stored in whole hundredths of the deviations.
EXAMPLE_UNIT = 0.01


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
    def min_object_pixels(self) -> int:
        """The minimum number of pixels of an object; 0 if the model has not learned objects."""
        return int(self.provenance.get("min_object_pixels", 0)) if self.has_objects else 0

    def min_pixels_at(self, scale: float) -> int:
        """Return the pixels that an object needs in an image of larger or smaller objects.

        The limit grows with the side of the objects. It does not shrink, and is fixed for models
        of earlier versions, which lack the entry ``specks_grow``.

        Args:
            scale: The factor on the working size at which objects are as large as in training.
        """
        growth = max(1.0, 1 / scale) if self.provenance.get("specks_grow") else 1.0
        return round(growth * self.min_object_pixels)

    @property
    def object_side(self) -> float:
        """Side of a typical object in the training images, in pixels; 0 if no scale is better.

        It is 0 for models that give every image the same area: their images show whole scenes,
        in which near objects are larger than far ones.
        """
        has_side = self.has_objects and not self.working.frame
        return float(self.provenance.get("object_side", 0.0)) if has_side else 0.0

    def are_objects_larger(self, scale: float) -> bool:
        """Whether objects are larger than those of every training image.

        Args:
            scale: The factor on the working size at which they are as large as a typical one.
        """
        largest = self.provenance.get("largest_object_side", math.inf)
        return scale <= MAX_REDUCED_SCALE and self.object_side >= scale * largest

    @property
    def enlarged_biases(self) -> tuple[float, ...]:
        """What is added to the logit of each class in images that are enlarged."""
        return tuple(self.provenance.get("enlarged_biases", [0.0] * len(self.classes)))

    @cached_property
    def training_images(self) -> TrainingImages | None:
        """The training images in numbers; None if the file says nothing of them."""
        content = self.provenance.get("training_images")
        return TrainingImages.from_dict(content) if content else None

    def training_distance(self, image: NDArray[np.generic]) -> float | None:
        """Return how far an image ``(H, W, C)`` is from the training images; the limit is 1.

        The distance is None if the file says nothing of its training images.
        """
        if self.training_images is None:
            return None
        return self.training_images.distance(
            measure_image(image, self.mean, self.std, self.working)
        )

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
    if fields["working"]["standardize"]:
        return json.dumps({"format": 3, **fields}, sort_keys=True)
    working = {key: value for key, value in fields["working"].items() if key != "standardize"}
    fields = {**fields, "working": working}
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
    standardize: bool = False


class _Split(_Checked):
    split: str = Field("", alias="data.split")
    holdout: float = Field(0.2, alias="data.holdout")


class _Start(_Checked):
    """The model that the training started from."""

    model_config = ConfigDict(extra="ignore")

    model: str = ""
    num_seen: Annotated[int, Field(ge=0)] = 0
    share: Annotated[float, Field(ge=0, le=1)] = 0


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
    # The same in the image with the largest objects.
    largest_object_side: Annotated[float, Field(ge=0, le=10**6)] = 0.0
    specks_grow: bool = False
    enlarged_biases: list[Annotated[float, Field(ge=-100, le=100)]] = []


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
    for key, most in (("channels", _MAX_CHANNELS), ("classes", MAX_CLASSES)):
        count = network.pop(key, None)
        if type(count) is not int or not 1 <= count <= most:
            raise unusable(source, f"network.{key} = {shorten(count)} is not from 1 to {most}")
    _validate(ModelSettings, network, source, "network.")
    origin = _validate(_Provenance, checked.provenance, source, "provenance.")
    if images := origin.training_images:
        needed = count_statistics(checked.network["channels"])
        if {len(images.mean), len(images.deviation), *map(len, images.examples)} != {needed}:
            raise unusable(source, f"its training images do not have {needed} numbers each")
    if len(origin.enlarged_biases or checked.classes.names) != len(checked.classes.names):
        raise unusable(source, "provenance.enlarged_biases does not have a number for each class")
    return checked


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
    stored, size = checked.classes, checked.working
    frame = (size.frame[0], size.frame[1]) if size.frame else None
    working = WorkingSize(frame, size.scale, size.standardize)
    if size.standardize and not (frame and checked.pixels == "uint8"):
        raise unusable(source, "only 8-bit images of a fixed size can be standardised")
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
            source, f"it has {len(classes)} class names for {checked.network['classes']} logits"
        )
    if frame and frame[0] * frame[1] > pixel_limit(None):
        raise unusable(
            source,
            f"it processes images at {frame[0]}x{frame[1]} pixels, and USEG_MAX_PIXELS allows "
            f"{pixel_limit(None):,}",
        )
    return {"classes": classes, "working": working}


def measure_image(
    image: NDArray[np.generic], mean: Sequence[float], std: Sequence[float], working: WorkingSize
) -> Statistics:
    """Return the statistics of an image, as many as :func:`count_statistics` says.

    Args:
        image: ``(H, W, C)`` raw pixels, none of them NaN or infinite.
        mean, std: Of the bands, in raw pixel units.
        working: The size at which the model works.
    """
    height, width = image.shape[:2]
    down, across = (-(-side // SAMPLED_SIDE) for side in (height, width))
    scale = np.asarray(std, np.float32)

    def standardize(values: NDArray[np.generic], base: Any) -> NDArray[np.float32]:
        with np.errstate(over="ignore"):
            deviations = (values.astype(np.float32) - base) / scale
        clipped: NDArray[np.float32] = np.clip(deviations, -MAX_PIXEL, MAX_PIXEL)
        return clipped.reshape(-1, len(scale))

    pixels = standardize(image[::down, ::across], np.asarray(mean, np.float32))
    ordered = np.sort(pixels, axis=0)
    end = len(ordered) // 20
    zoom = height / working.of(width, height)[1]
    steps = []
    for away in (max(1, round(distance * zoom)) for distance in NEIGHBOUR_DISTANCES):
        pairs = (
            (image[:-away:down, ::across], image[away::down, ::across]),
            (image[::down, :-away:across], image[::down, away::across]),
        )
        for first, second in pairs:
            step = np.abs(standardize(second, first.astype(np.float32)))
            steps.append(float(step.mean()) if step.size else 0.0)
    colour = pixels - pixels.mean(1, keepdims=True)
    spread = np.concatenate([pixels.std(0), colour.std(0), steps])
    levels = (pixels.mean(0), ordered[end], ordered[-1 - end])
    found: Statistics = np.concatenate([*levels, np.log(spread + MIN_DEVIATION)])
    return found.astype(np.float64)


def count_statistics(channels: int) -> int:
    """Return how many numbers :func:`measure_image` returns for images of ``channels`` bands."""
    return 5 * channels + 2 * len(NEIGHBOUR_DISTANCES)


@dataclass(frozen=True)
class TrainingImages:
    """The statistics of some training images.

    Args:
        mean, deviation: Of each number among the training images, ``(F,)``.
        examples: Numbers of some images ``(N, F)``, less the mean, in deviations.
        limit: Distance, in deviations, beyond which an image is unlike them.
    """

    mean: Statistics
    deviation: Statistics
    examples: NDArray[np.float64]
    limit: float

    def distance(self, statistics: Statistics) -> float:
        """Return how far an image is from the nearest of the training images; the limit is 1."""
        differences = (statistics - self.mean) / self.deviation - self.examples
        return float(np.sqrt((differences**2).mean(1)).min()) / self.limit

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for the description of a model."""
        return {
            "mean": [round(value, 5) for value in self.mean.tolist()],
            "deviation": [round(value, 5) for value in self.deviation.tolist()],
            "examples": np.rint(self.examples / EXAMPLE_UNIT).astype(int).tolist(),
            "limit": self.limit,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> TrainingImages:
        """Return what :meth:`as_dict` has stored."""
        mean, deviation = (np.array(content[key], np.float64) for key in ("mean", "deviation"))
        examples = np.array(content["examples"], np.float64) * EXAMPLE_UNIT
        return cls(mean, deviation, examples, content["limit"])


def fit_training_images(
    train: Sequence[Statistics], held_out: Sequence[Statistics]
) -> TrainingImages:
    """Describe training images, with the limit that held-out images give.

    Args:
        train: Statistics of at least one training image.
        held_out: Statistics of at least one image that the model was not trained on.
    """
    numbers = np.stack(train)
    mean, deviation = numbers.mean(0), np.maximum(numbers.std(0), MIN_DEVIATION)
    count = max(1, min(len(train), MAX_EXAMPLES, MAX_EXAMPLE_NUMBERS // numbers.shape[1]))
    chosen = [k * len(train) // count for k in range(count)]
    examples = (numbers[chosen] - mean) / deviation
    # What is stored decides about the limit.
    stored = TrainingImages.from_dict(TrainingImages(mean, deviation, examples, 1.0).as_dict())
    distances = sorted(stored.distance(each) for each in held_out)
    beyond = math.floor(FALSE_ALARM_SHARE * len(distances))
    limit = max(MIN_LIMIT, distances[-1 - beyond])
    return TrainingImages(stored.mean, stored.deviation, stored.examples, limit)
