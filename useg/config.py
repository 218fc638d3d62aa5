"""The settings of a run: ``run.toml`` and ``--set key=value`` in, checked frozen settings out.

A setting that is None is planned from the data and the machine (``training/plan.py``). The
``run.toml`` of a run contains all resolved settings, so training from it repeats the run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from useg.errors import SettingsError, suggest
from useg.files import replacing
from useg.ownership import MARKED_RUN, is_own_run_toml
from useg.parsing import parse_toml, read_toml, shorten

_SIZE_RULE = "a size is WIDTHxHEIGHT in pixels, such as 256x192"

# As train.validate_every: more epochs than any run has. The model is validated after the last step
# only, and held-out images do not choose which model is kept.
VALIDATE_AT_END = 10**9


def _size(value: Any) -> Any:
    """``"256x192"`` -> ``(256, 192)``: width, height."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]{1,9})\s*[xX]\s*([0-9]{1,9})\s*", value)
        if not match:
            raise ValueError(_SIZE_RULE)
        return int(match[1]), int(match[2])
    if not isinstance(value, tuple | list):
        raise ValueError(_SIZE_RULE)
    return value


def parse_size(text: str) -> tuple[int, int]:
    """Read ``"256x192"`` as (width, height).

    Raises:
        SettingsError: The text is not a size.
    """
    try:
        width, height = _size(text)
    except ValueError as error:
        raise SettingsError(f"{shorten(text)} is not a size: {error}") from error
    return int(width), int(height)


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("the text contains an unprintable character; remove it")
    return text


Share = Annotated[float, Field(ge=0, le=1)]
Zoom = Annotated[float, Field(ge=0.1, le=10)]
PixelCount = Annotated[int, Field(ge=1, le=65536)]
StepCount = Annotated[int, Field(ge=1, le=10**9)]
# A step after which something changes (0: before the first one), and a number of threads.
ThreadChange = tuple[Annotated[int, Field(ge=0, le=10**9)], Annotated[int, Field(ge=1, le=65536)]]
# A path or a short text.
Text = Annotated[str, Field(max_length=4096), AfterValidator(_printable)]
Size = Annotated[tuple[PixelCount, PixelCount], BeforeValidator(_size)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSettings(_Settings):
    """The network."""

    encoder: Text | None = Field(
        None,
        description="network: plain (the paper's U-Net), U-Net with a pretrained encoder (lite0 "
        "to lite2, resnet18, resnet34, resnet50), or a baseline (cnn, fcn32s, fcn16s, fcn8s)",
    )
    pretrained: bool = Field(
        True, description="start from ImageNet weights if they exist for the encoder"
    )
    weights: Text | None = Field(
        None,
        description="file with ImageNet weights for resnet18, resnet34 or resnet50, with the layer "
        "names of torchvision",
    )
    start: Text | None = Field(
        None,
        description="run folder or model file with the initial weights (--from MODEL)",
    )
    start_map: Text | None = Field(
        None,
        description="initial weights of renamed classes: class of DATA=class of model.start, "
        "separated by commas (--map)",
    )
    start_share: Share | None = Field(
        None,
        description="share of the weights of model.start to mix into the trained ones, so that the "
        "model forgets less; by default 0.25 unless it lowers the score (0 to 1; 0 disables it)",
    )
    padding: Literal["same", "valid"] = Field(
        "same",
        description="same (zero padding) or valid (unpadded convolutions, as in the paper)",
    )
    width: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None,
        description="number of channels at full resolution; a wider network is more accurate but "
        "slower (1 to 1024; 64 in the paper)",
    )
    depth: Annotated[int, Field(ge=1, le=7)] | None = Field(
        None, description="number of poolings of the plain U-Net (1 to 7; 4 in the paper)"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="dropout rate after the two deepest blocks, against overfitting (0 to below 1)",
    )
    normalize: bool = Field(
        True, description="batch normalisation after each 3x3 convolution of the plain U-Net"
    )
    up_kernel: Literal[2, 3] = Field(
        2, description="kernel size of the up-convolutions of the plain U-Net (2 or 3)"
    )
    extra_conv: bool = Field(
        False, description="add a 3x3 convolution before the final 1x1 convolution"
    )
    skips: bool = Field(
        True, description="skip connections; false removes them, to show their effect"
    )

    objects: bool | None = Field(
        None,
        description="also learn to separate touching objects of one class, such as cells; needs "
        "masks with numbered objects, or drawn shapes",
    )

    def architecture(self) -> dict[str, Any]:
        """Return the settings that determine the layers, but not their initial weights.

        Models without an output for objects omit ``objects``, like those of earlier versions.
        """
        unused = {"pretrained", "weights", "start", "start_map", "start_share"}
        return self.model_dump(exclude=unused | (set() if self.objects else {"objects"}))


class DataSettings(_Settings):
    """The images, their sizes, and the validation set."""

    size: Size | None = Field(
        None, description="WIDTHxHEIGHT in pixels; every image is resized to it"
    )
    scale: Annotated[float, Field(gt=0, le=4)] | None = Field(
        None,
        description="resize factor, instead of data.size, for images whose pixels have a physical "
        "size (above 0, up to 4)",
    )
    crop: Size | None = Field(
        None,
        description="WIDTHxHEIGHT of training crops in pixels, after resizing; with valid padding, "
        "of the output",
    )
    split: Literal["auto", "groups", "blocks", "stratified", "random", "official"] = Field(
        "auto",
        description="how to choose the validation set: groups (whole groups of images), blocks (of "
        "consecutive frames), stratified (by class), random, official (defined by the data set), "
        "or auto (useg picks one)",
    )
    holdout: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="share of the images in the validation set (above 0, below 1)"
    )
    train_every: StepCount | None = Field(
        None,
        description="train on every n-th training image; above 1 if reading all of them would take "
        "more than a quarter of train.minutes",
    )
    val_every: StepCount | None = Field(
        None,
        description="validate on every n-th validation image; above 1 if scoring all of them and "
        "the report would take more than a tenth of train.minutes",
    )
    standardize: bool | None = Field(
        None,
        description="give every image the same brightness and contrast, against differences in "
        "light; needs data.size and 8-bit images",
    )
    classes: Text | None = Field(None, description="path of a classes.toml")
    unlabelled: Text | None = Field(
        None,
        description="folder of unlabelled images from the place where the model will work; if "
        "their colours lower the score, training crops are recoloured to match them",
    )


class TrainSettings(_Settings):
    """The training."""

    minutes: Annotated[float, Field(gt=0, le=10**6)] | None = Field(
        None,
        description="total minutes, including decoding and report; determines the number of steps",
    )
    epochs: StepCount | None = Field(
        None, description="passes over the training images, instead of minutes"
    )
    steps: StepCount | None = Field(
        None, description="number of training steps; overrides minutes and epochs"
    )
    recounts: tuple[tuple[StepCount, StepCount], ...] = Field(
        (),
        max_length=10_000,
        description="written by useg: changes of the number of steps to finish on time, as [step, "
        "previous number of steps]",
    )
    thread_changes: tuple[ThreadChange, ...] = Field(
        (),
        max_length=10_000,
        description="written by useg: changes of the number of threads, because other programs "
        "started or stopped using cores, as [step, number of threads from then on]",
    )
    unlabelled_from: StepCount | None = Field(
        None,
        description="written by useg: first step with recoloured crops (data.unlabelled)",
    )
    validate_every: StepCount | None = Field(None, description="epochs between validations")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="random seed; the same seed gives the same result"
    )
    batch: Annotated[int, Field(ge=1, le=65536)] | None = Field(
        None, description="batch size: crops per training step"
    )
    coarse: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None,
        description="share of the steps that use half-size images, which is about three times as "
        "fast; these come first (0 to below 1)",
    )
    accumulate: Annotated[int, Field(ge=1, le=65536)] = Field(
        1,
        description="gradient accumulation: number of parts per batch; more parts need less memory",
    )
    optimizer: Literal["adamw", "adam", "muon"] | None = Field(
        None,
        description="adamw, adam (no weight decay), or muon: adamw, with orthogonal steps for the "
        "convolutions of the decoder, which then learn in fewer steps",
    )
    learning_rate: Annotated[float, Field(gt=0, le=10**6)] | None = Field(
        None, description="maximum learning rate of the schedule"
    )
    weight_decay: Annotated[float, Field(ge=0, le=10**6)] = Field(
        1e-2, description="weight decay of adamw and muon, against overfitting"
    )
    schedule: Literal["onecycle", "cosine", "constant"] = Field(
        "onecycle",
        description="learning-rate schedule: onecycle (rises for 15 % of the steps, then falls to "
        "0), cosine (falls from the first step) or constant",
    )
    flips: Literal["horizontal", "all"] | None = Field(
        None,
        description="random flips: horizontal, or all (also vertical, for images without a natural "
        "orientation)",
    )
    encoder_rate: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="learning rate of a pretrained encoder, relative to the decoder; a low rate "
        "keeps more of the pretraining (above 0, up to 1)",
    )
    freeze: Literal["none", "encoder"] = Field(
        "none",
        description="none, or encoder: freeze a pretrained encoder and train only the decoder, "
        "which is faster",
    )
    augment: bool = Field(
        True,
        description="data augmentation: random flips, zoom, contrast, tint and brightness, and the "
        "settings below; false disables all of it",
    )
    zoom: tuple[Zoom, Zoom] | None = Field(
        None,
        description="range of the random zoom, in image pixels per crop pixel; [0.5, 2.0] makes "
        "objects twice to half as large (0.1 to 10)",
    )
    photometric: Share | None = Field(
        None,
        description="strength of photometric augmentation, for other cameras, places and light; "
        "scales the six settings from train.color_jitter to train.noise (0 to 1; 0 disables these "
        "and train.exposure)",
    )
    color_jitter: Share = Field(
        1.0,
        description="strength of random changes of gamma, band gains, saturation and hue (0 to 1)",
    )
    grayscale: Share = Field(0.1, description="share of training crops converted to grey (0 to 1)")
    shading: Share = Field(
        0.3,
        description="share of training crops with uneven light, as from shadows, dusk or a lamp (0 "
        "to 1)",
    )
    fog: Share = Field(0.15, description="share of training crops with fog or haze (0 to 1)")
    blur: Share = Field(0.3, description="share of blurred training crops (0 to 1)")
    noise: Share = Field(0.3, description="share of training crops with noise (0 to 1)")
    exposure: Share = Field(
        0.25,
        description="share of much darker or brighter training crops, for other times of day (0 to "
        "1); train.photometric = 0 disables it",
    )
    loss: Text = Field(
        "ce + dice",
        description="loss: ce (cross-entropy), dice, focal, lovasz, boundary, or a weighted sum "
        "such as ce + 0.5 dice",
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="label smoothing of the cross-entropy (0 to below 1)",
    )
    class_weights: Literal["none", "sqrt"] | None = Field(
        None,
        description="class weights of the cross-entropy: none, or sqrt (1 / sqrt(share of the "
        "class), for rare classes)",
    )
    deterministic: bool = Field(
        False,
        description="reproducible results on a GPU, which is slower; on a CPU they are always "
        "reproducible",
    )
    tensorboard: bool = Field(
        False, description="also write RUN/tensorboard, for tensorboard --logdir RUN"
    )
    precision: Literal["bf16", "fp16", "fp32"] | None = Field(
        None,
        description="precision of the convolutions: bf16 (if it is faster), fp16 (on GPUs without "
        "bf16, with scaled gradients) or fp32 (TF32 on NVIDIA GPUs that support it)",
    )


# Settings that earlier versions lacked, with the values that match their behaviour, grouped by
# the version that introduced them.
_PHOTOMETRIC_SETTINGS: dict[str, Any] = {
    "zoom": (0.6, 1.15),
    "photometric": 0.0,
    "color_jitter": 1.0,
    "grayscale": 0.1,
    "shading": 0.3,
    "fog": 0.15,
    "blur": 0.3,
    "noise": 0.3,
}
_LATER_VERSIONS: tuple[dict[str, Any], ...] = (_PHOTOMETRIC_SETTINGS, {"exposure": 0.0})
LATER_SETTINGS = {name: value for version in _LATER_VERSIONS for name, value in version.items()}


class Settings(_Settings):
    """All settings of a run.

    Example:
        >>> Settings().with_({"train.epochs": 3}).train.epochs
        3
    """

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()

    def with_(self, changes: Mapping[str, Any]) -> Settings:
        """Return these settings with dotted keys changed: ``{"train.epochs": 3}``.

        Raises:
            SettingsError: Unknown keys or impossible values; the message lists all of them.
        """
        content = self.model_dump()
        known = _known()
        unknown = [key for key in changes if key not in known]
        if unknown:
            raise SettingsError(
                "; ".join(
                    f"there is no setting {shorten(key)}{suggest(key, known)}" for key in unknown
                )
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
        # One problem per setting, in order: pydantic reports each member of a union.
        problems: dict[str, str] = {}
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"][:2])
            if item["type"] == "extra_forbidden":
                message = f"there is no such setting{suggest(key, _known())}"
            else:
                message = item["msg"].removeprefix("Value error, ")
                message = message[0].lower() + message[1:]
            problems.setdefault(key, f"setting {key} = {shorten(item['input'])}: {message}")
        raise SettingsError("; ".join(problems.values())) from error


def describe_settings() -> Iterator[tuple[str, str, str]]:
    """Yield ``(dotted key, default, description)`` of every setting.

    The default of a setting that is planned is ``"-"``.
    """
    for section, content in Settings().model_dump().items():
        fields = type(getattr(Settings(), section)).model_fields
        for name, default in content.items():
            shown = "-" if default is None else str(default)
            yield f"{section}.{name}", shown, fields[name].description or ""


def _known() -> list[str]:
    return [key for key, _, _ in describe_settings()]


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Turn ``["train.epochs=3", "data.size=256x192"]`` into a dict of values.

    A value is read as TOML if it is TOML, else as text.

    Raises:
        SettingsError: An assignment has no ``=``.
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise SettingsError(
                f"--set {shorten(assignment)} has no '='; "
                "write --set key=value, such as --set train.epochs=20"
            )
        try:
            changes[key.strip()] = parse_toml(f"value = {text}")["value"]
        except ValueError:
            changes[key.strip()] = text.strip()
    return changes


def read_settings(path: Path) -> Settings:
    """Read a ``run.toml``: its sections ``[model]``, ``[data]`` and ``[train]``.

    Settings that did not exist when an earlier useg wrote the file get the values by which its run
    trained, so that it can be repeated and continued.

    Raises:
        SettingsError: The file cannot be read, or has unknown keys or impossible values.
    """
    content = _read_toml(path)
    train = content.get("train")
    if "provenance" in content and isinstance(train, dict):
        for version in _LATER_VERSIONS:
            # A line that the user has removed is planned again; an older file has none of them.
            if not version.keys() & train.keys():
                content["train"] = {**version, **content["train"]}
        data = content.get("data")
        # A run that has been planned, by a version that did not standardise images.
        if "photometric" in content["train"] and isinstance(data, dict):
            content["data"] = {"standardize": False, **data}
    return _checked({key: value for key, value in content.items() if key != "provenance"})


def read_provenance(path: Path) -> dict[str, Any]:
    """Read the section ``[provenance]`` of a ``run.toml``; errors as for :func:`read_settings`."""
    provenance = _read_toml(path).get("provenance", {})
    if not isinstance(provenance, dict) or not isinstance(provenance.get("splits_by", ""), str):
        raise SettingsError(
            f"{path} does not have the expected [provenance]; pass a run.toml that useg train wrote"
        )
    return provenance


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return read_toml(path)
    # A UnicodeDecodeError is a ValueError.
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{path} is not a readable run.toml ({error}); pass one that useg train has written"
        ) from error


def write_settings(path: Path, settings: Settings, provenance: Mapping[str, Any]) -> None:
    """Write ``run.toml``: every setting that is not None, and the origin of the run."""
    import tomli_w

    content = settings.model_dump(exclude_none=True)
    for key in ("size", "crop"):
        if content["data"].get(key):
            content["data"][key] = "x".join(str(side) for side in content["data"][key])
    content["provenance"] = {MARKED_RUN: True, **provenance}
    # A timed run has dozens of recounts and changes: one on a line, instead of four lines for each.
    text = re.sub(r"\[\n\s+(\d+),\n\s+(\d+),\n\s+\]", r"[\1, \2]", tomli_w.dumps(content))
    with replacing(path, is_own_run_toml) as draft:
        draft.write_text(text, "utf-8")
