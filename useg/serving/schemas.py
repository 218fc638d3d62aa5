"""The JSON documents that the service answers with: their fields, types and descriptions.

FastAPI makes the OpenAPI document of them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class ErrorMessage(BaseModel):
    """What was wrong, what is allowed, what to do."""

    error: str


class ModelClass(BaseModel):
    """A class of the model; the colour is CSS's ``#rrggbb``."""

    id: int
    name: str
    color: str


class ClassShare(ModelClass):
    """The pixels of an image that belong to a class, and their share, 0 to 1."""

    pixels: int
    share: float


class LabelSummary(BaseModel):
    """The size of a label map and its classes.

    ``unlike_training`` says whether the image looks unlike the training images; null for a model
    that does not know them.
    """

    width: int
    height: int
    classes: list[ClassShare]
    unlike_training: bool | None = None


class BatchSummary(BaseModel):
    """The label maps of a batch, in the order of its files."""

    pictures: list[LabelSummary]


class ModelWorkingSize(BaseModel):
    """The size (width, height) to which the model resizes images, or by how much it scales them."""

    frame: tuple[int, int] | None
    scale: float


class ServiceLimits(BaseModel):
    """The limits of the service."""

    bytes: int
    pixels: int
    pictures: int
    seconds: float
    memory: int


class ServedModel(BaseModel):
    """The model: what it takes and returns, its scores on held-out images, its training."""

    name: str
    classes: list[ModelClass]
    channels: int
    pixels: str
    working: ModelWorkingSize
    margin: int
    stride: int
    precision: str
    runtime: str
    scores: Any
    provenance: dict[str, Any]
    limits: ServiceLimits


class HealthStatus(BaseModel):
    """Health of the service."""

    status: Literal["ok", "ready"]


class ServerMetadata(BaseModel):
    """Open Inference Protocol: the server and its extensions of the protocol."""

    name: str
    version: str
    extensions: list[str]


class ServerLive(BaseModel):
    """Open Inference Protocol: whether the server is live."""

    live: bool


class ServerReady(BaseModel):
    """Open Inference Protocol: whether the server is ready."""

    ready: bool


class TensorMetadata(BaseModel):
    """Open Inference Protocol: a tensor; -1 stands for any length."""

    name: str
    datatype: str
    shape: list[int]


class ServedModelMetadata(BaseModel):
    """Open Inference Protocol: the model's inputs and outputs."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ServedModelReady(BaseModel):
    """Open Inference Protocol: whether the model is ready."""

    name: str
    ready: bool


class OutputTensor(TensorMetadata):
    """Open Inference Protocol: an output, with its data unless they follow as binary data."""

    data: list[float] | None = None
    parameters: dict[str, Any] | None = None


class InferenceResponse(BaseModel):
    """Open Inference Protocol: the requested outputs."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]
