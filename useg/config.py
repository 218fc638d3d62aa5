"""run.toml + ``--set key=value`` -> checked, frozen settings.

A setting that is None is decided from the data and the machine (``training/plan.py``); the ``run.toml`` that a run leaves has
every one resolved, so that training from it repeats the run.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from useg.errors import UsageError, suggest
from useg.files import replacing


def _size(value: Any) -> Any:
    """``"256x192"`` -> ``(256, 192)``: width x height."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+)\s*[xX]\s*(\d+)\s*", value)
        if not match:
            raise ValueError("a size is WIDTHxHEIGHT in pixels, such as 256x192")
        return int(match[1]), int(match[2])
    if not isinstance(value, tuple | list):
        raise ValueError("a size is WIDTHxHEIGHT in pixels, such as 256x192")
    return value


def parse_size(text: str) -> tuple[int, int]:
    """Read ``"256x192"`` as (width, height).

    Raises:
        UsageError: it is no such size.
    """
    try:
        width, height = _size(text)
    except ValueError as error:
        raise UsageError(f"{text!r} is not a size: {error}") from error
    return int(width), int(height)


PixelCount = Annotated[int, Field(ge=1, le=65536)]


Size = Annotated[tuple[PixelCount, PixelCount], BeforeValidator(_size)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSettings(_Settings):
    """What network is trained."""

    encoder: str | None = Field(
        None,
        description="contracting path: plain (the paper's), lite0 to lite2, resnet18, 34, 50; or cnn, fcn32s, fcn16s, fcn8s to compare with",
    )
    pretrained: bool = Field(
        True, description="start from ImageNet weights where the encoder has them"
    )
    weights: str | None = Field(
        None, description="file of ImageNet weights (resnet18, 34, 50: torchvision's layer names)"
    )
    padding: Literal["same", "valid"] = Field(
        "same",
        description="same: zeros outside the picture; valid: the paper's unpadded convolutions",
    )
    width: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None, description="channels of the first level (64 in the paper)"
    )
    depth: Annotated[int, Field(ge=1, le=7)] | None = Field(
        None, description="number of poolings (4 in the paper)"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of features dropped after the two deepest blocks"
    )
    normalize: bool = Field(True, description="batch normalisation after each 3x3 convolution")
    up_kernel: Literal[2, 3] = Field(2, description="kernel of the up-convolutions")
    extra_conv: bool = Field(False, description="one more 3x3 convolution before the final 1x1 one")
    skips: bool = Field(
        True, description="skip connections; false cuts them, to see what they are for"
    )

    def architecture(self) -> dict[str, Any]:
        """Return what determines the network's layers; the rest says where its first weights come from."""
        return self.model_dump(exclude={"pretrained", "weights"})


class DataSettings(_Settings):
    """What the network sees."""

    size: Size | None = Field(
        None, description="WIDTHxHEIGHT to which every whole picture is brought before the network"
    )
    scale: Annotated[float, Field(gt=0, le=4)] | None = Field(
        None,
        description="factor by which every picture is reduced instead, where pixels have a size in the world",
    )
    crop: Size | None = Field(
        None,
        description="WIDTHxHEIGHT of the crops that training looks at (of what comes out, with valid padding)",
    )
    split: Literal["auto", "groups", "blocks", "stratified", "random", "official"] = Field(
        "auto", description="how validation pictures are held out"
    )
    holdout: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="share of the pictures held out for validation"
    )
    classes: str | None = Field(None, description="path of a classes.toml")


class TrainSettings(_Settings):
    """How it is trained."""

    minutes: Annotated[float, Field(gt=0)] | None = Field(
        None, description="time for the whole command; decides how many steps there are"
    )
    epochs: Annotated[int, Field(ge=1)] | None = Field(
        None, description="passes over the training pictures"
    )
    steps: Annotated[int, Field(ge=1)] | None = Field(
        None, description="exact number of steps; wins over minutes and epochs"
    )
    recounts: tuple[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], ...] = Field(
        (),
        description="[step, steps]: until that step there were to be so many; noted where steps are counted again, to end in time",
    )
    validate_every: Annotated[int, Field(ge=1)] | None = Field(
        None, description="epochs between two scorings of the held-out pictures"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="of all randomness")
    batch: Annotated[int, Field(ge=1, le=65536)] | None = Field(None, description="crops in a step")
    coarse: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None,
        description="share of the steps, the first ones, that look at everything at half the size, in a quarter of the pixels",
    )
    accumulate: Annotated[int, Field(ge=1)] = Field(
        1, description="parts in which a batch is computed: more take less memory, to the same step"
    )
    optimizer: Literal["adamw", "adam"] = Field("adamw", description="adamw or adam")
    learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None, description="highest learning rate"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(1e-2, description="of adamw")
    schedule: Literal["onecycle", "cosine", "constant"] = Field(
        "onecycle", description="course of the learning rate"
    )
    flips: Literal["horizontal", "all"] | None = Field(
        None, description="horizontal: left-right; all: top-bottom too, where up means nothing"
    )
    encoder_rate: Annotated[float, Field(gt=0, le=1)] = Field(
        0.25, description="learning rate of a pretrained encoder, as a share of the others'"
    )
    augment: bool = Field(True, description="flips, scale-crops and colour changes")
    loss: str = Field(
        "ce + dice",
        description="ce (sparse categorical cross-entropy), dice, focal, lovasz, boundary, or a sum such as ce + 0.5 dice",
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="in cross-entropy: share of the truth spread over all classes"
    )
    class_weights: Literal["none", "sqrt"] | None = Field(
        None, description="in cross-entropy; sqrt: a pixel counts 1 / sqrt(share of its class)"
    )
    deterministic: bool = Field(
        False,
        description="the same result to the bit on a GPU too, more slowly; a processor's is in any case",
    )
    tensorboard: bool = Field(
        False, description="also write RUN/tensorboard, to be watched with tensorboard --logdir RUN"
    )
    precision: Literal["bf16", "fp32"] | None = Field(
        None, description="of the convolutions; bf16 where it is faster"
    )


class Settings(_Settings):
    """All settings of a run."""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()

    def with_(self, changes: Mapping[str, Any]) -> Settings:
        """Return these settings with dotted keys changed: ``{"train.epochs": 3}``.

        Raises:
            UsageError: unknown keys or impossible values, all of them in one message.
        """
        content = self.model_dump()
        known = _known()
        unknown = [key for key in changes if key not in known]
        if unknown:
            raise UsageError(
                "; ".join(f"there is no setting {key!r}{suggest(key, known)}" for key in unknown)
                + "; useg train --settings lists them"
            )
        for key, value in changes.items():
            section, name = key.split(".")
            content[section][name] = value
        return _checked(content)


def _checked(content: Mapping[str, Any]) -> Settings:
    try:
        return Settings.model_validate(content)
    except ValidationError as error:
        problems: list[str] = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"][:2])
            near = suggest(key, _known()) if item["type"] == "extra_forbidden" else ""
            message = (
                "there is no such setting"
                if item["type"] == "extra_forbidden"
                else item["msg"].removeprefix("Value error, ")
            )
            problem = f"setting {key} = {item['input']!r}: {message[0].lower()}{message[1:]}{near}"
            if not any(earlier.startswith(f"setting {key} ") for earlier in problems):
                problems.append(problem)
        raise UsageError("; ".join(problems)) from error


def describe_settings() -> Iterator[tuple[str, str, str]]:
    """Yield ``(dotted key, default, description)`` of every setting; the default of one that is planned is ``"-"``."""
    for section, content in Settings().model_dump().items():
        for name, default in content.items():
            entry = getattr(Settings(), section).__class__.model_fields[name]
            yield (
                f"{section}.{name}",
                "-" if default is None else str(default),
                entry.description or "",
            )


def _known() -> list[str]:
    return [key for key, _, _ in describe_settings()]


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Turn ``["train.epochs=3", "data.size=256x192"]`` into ``{"train.epochs": 3, "data.size": "256x192"}``; values are read as TOML, else as text.

    Raises:
        UsageError: no ``=``.
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UsageError(
                f"--set {assignment!r} has no '='; write --set key=value, such as --set train.epochs=20"
            )
        try:
            changes[key.strip()] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            changes[key.strip()] = text.strip()
    return changes


def read_settings(path: Path) -> Settings:
    """Read a ``run.toml`` (the sections ``[model]``, ``[data]``, ``[train]``; others, such as ``[provenance]``, are for people).

    Raises:
        UsageError: no such file, no TOML, unknown keys or impossible values.
    """
    return _checked({key: value for key, value in _read_toml(path).items() if key != "provenance"})


def read_provenance(path: Path) -> dict[str, Any]:
    """Read where the run of a ``run.toml`` came from, as :func:`write_settings` was told; errors as for :func:`read_settings`."""
    return dict(_read_toml(path).get("provenance", {}))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(
            f"{path} is not a readable run.toml ({error}); give one that useg train wrote"
        ) from error


def write_settings(path: Path, settings: Settings, provenance: Mapping[str, Any]) -> None:
    """Write ``run.toml``: every setting that is not None, and where the run came from."""
    import tomli_w

    content = settings.model_dump(exclude_none=True)
    for key in ("size", "crop"):
        if content["data"].get(key):
            content["data"][key] = "x".join(str(side) for side in content["data"][key])
    with replacing(path) as temporary:
        temporary.write_text(tomli_w.dumps({**content, "provenance": dict(provenance)}), "utf-8")
