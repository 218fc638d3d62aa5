"""A model ready to be served: its shared network, request queues, limits of memory, description."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from fastapi import Request
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from useg.classes import hex_color
from useg.inference.predictor import MAX_SINGLE_PASS_PIXELS, Predictor
from useg.inference.runtimes import MAX_WINDOW_BYTES, Runtime, probe_size
from useg.machine import count_cores
from useg.serving.middleware import Limits, Metrics, service_unavailable
from useg.serving.request_queue import RequestQueue
from useg.serving.responses import ModelClass
from useg.serving.shared_network import (
    MAX_TIMES_WORKING_SIZE,
    LoadPlan,
    SharedNetwork,
    find_plan,
)
from useg.serving.site import model_name
from useg.serving.uploads import SMALL_SHARE, UploadReader

# An image is large if it takes more than this share of the memory for images, or if its file has
# more bytes than that. One of 800x600 pixels with 20 classes is small. Large ones take turns in a
# queue of their own, so that small ones need not wait for them.
LARGE_SHARE = 1 / 40
LARGE_UPLOAD_BYTES = 2_000_000

# So it is if its response may take more than this to encode: Python writes that for seconds.
LARGE_ENCODING_BYTES = 39_000_000

# Memory of an image that is in progress, in addition to its logits: the decoded file, and label
# maps.
WORK_BYTES_PER_PIXEL = 32


class ModelWorkingSize(BaseModel):
    """How the model prepares images.

    Args:
        frame: The size (width, height) to which it resizes them; None if it scales them.
        scale: By how much it scales them, without a frame.
        standardize: Whether it gives all of them the same brightness and contrast.
    """

    frame: tuple[int, int] | None
    scale: float
    standardize: bool


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


@dataclass
class Service:
    """One model and all that serving it takes.

    Args:
        name: the model's name for clients.
        predictor: the model; several threads may call its network.
        network: the same network; counts its batches.
        limits: how much the service accepts.
        queue: where small images wait, and small uploads to be read.
        large_queue: where large ones wait.
        uploads: reads the bodies of requests.
        activation_bytes: memory of the network's activations.
        metrics: counts requests.
        draining: whether the service is shutting down: it still responds, but closes each
            connection after its response.
    """

    name: str
    predictor: Predictor
    network: SharedNetwork
    limits: Limits
    queue: RequestQueue
    large_queue: RequestQueue
    uploads: UploadReader
    activation_bytes: int
    metrics: Metrics = field(default_factory=Metrics)
    draining: bool = False

    def check_not_draining(self) -> None:
        """Refuse further requests during a shutdown.

        Raises:
            HTTPException: 503.
        """
        if self.draining:
            raise service_unavailable("the service is shutting down")

    @property
    def memory(self) -> int:
        """Maximum memory of all requests together, in bytes, in addition to the model itself."""
        held = self.limits.buffered_bytes + self.limits.response_bytes
        queues = self.queue.memory + self.large_queue.memory
        return held + held // SMALL_SHARE + queues + self.activation_bytes

    @property
    def is_working(self) -> bool:
        """Whether an image is in progress."""
        return bool(self.queue.running or self.large_queue.running)

    @property
    def small_work_bytes(self) -> int:
        """Maximum memory of a small image while it is in progress."""
        return round(self.limits.work_bytes * LARGE_SHARE)

    def is_large(self, upload_bytes: int, memory: int = 0, encoding_bytes: int = 0) -> bool:
        """Tell whether an upload of this size, and work that takes this memory, must take turns.

        ``encoding_bytes`` is what encoding the response takes of it.
        """
        return (
            memory > self.small_work_bytes
            or upload_bytes > LARGE_UPLOAD_BYTES
            or encoding_bytes > LARGE_ENCODING_BYTES
        )

    def queue_for(
        self, upload_bytes: int, memory: int = 0, encoding_bytes: int = 0
    ) -> RequestQueue:
        """Return the queue for an upload of this size and for work that takes this memory."""
        is_large = self.is_large(upload_bytes, memory, encoding_bytes)
        return self.large_queue if is_large else self.queue

    def work_bytes(self, width: int, height: int) -> int:
        """Return the memory that an image takes while it is in progress.

        Raises:
            HTTPException: 413, it is more than is allowed.
        """
        description = self.predictor.runtime.description
        working = description.working.of(width, height)
        values = width * height
        if working != (width, height):
            # Of the working size, while they are enlarged to the image's own.
            values += working[0] * working[1]
        num_classes = len(description.classes)
        needed = 4 * num_classes * values + WORK_BYTES_PER_PIXEL * width * height
        if needed > self.limits.work_bytes:
            raise HTTPException(
                413,
                f"an image of {width}x{height} pixels needs {needed / 1e6:,.0f} MB of memory for "
                f"{num_classes} classes, more than the allowed {self.limits.work_bytes / 1e6:,.0f} "
                "MB; send a smaller one",
            )
        return needed


def activation_bytes(runtime: Runtime, limits: Limits, plan: LoadPlan) -> int:
    """Return the memory of the network's activations: small images while a large one is computed.

    Args:
        runtime: the network.
        limits: how much the service accepts.
        plan: how many small images are computed at a time.
    """
    width, height = probe_size(runtime.description)
    logits_bytes = 4 * len(runtime.description.classes)
    largest_small = limits.work_bytes * LARGE_SHARE / (logits_bytes + WORK_BYTES_PER_PIXEL)
    small = min(limits.pixels, max(plan.batch_size * width * height, largest_small))
    if plan.threads > 1:
        small += plan.threads * MAX_TIMES_WORKING_SIZE * width * height
    large = min(limits.pixels, max(MAX_SINGLE_PASS_PIXELS, runtime.window_pixels))
    return round(MAX_WINDOW_BYTES * (small + large) / runtime.window_pixels)


def make_service(predictor: Predictor, limits: Limits, plan: LoadPlan | None = None) -> Service:
    """Prepare a model for serving.

    Args:
        predictor: the model.
        limits: how much the service accepts.
        plan: how it computes several small images; by default a short trial decides.
    """
    runtime = predictor.runtime
    plan = plan or find_plan(runtime.run, runtime.description)
    threads = max(plan.batch_size, plan.threads) + 2
    small = round(threads * limits.work_bytes * LARGE_SHARE)
    queue = RequestQueue(threads, small, limits.waiting)
    # Half of the cores stay free for small images.
    large_queue = RequestQueue(
        max(1, (count_cores() or 1) // 2), limits.work_bytes, limits.waiting, is_large=True
    )
    width, height = probe_size(runtime.description)
    network = SharedNetwork(
        runtime.run,
        plan,
        runtime.description.channels * width * height,
        lambda: queue.running + large_queue.running > 1,
    )
    return Service(
        model_name(runtime.source),
        Predictor(replace(runtime, run=network)),
        network,
        limits,
        queue,
        large_queue,
        UploadReader(limits),
        activation_bytes(runtime, limits, plan),
    )


def describe_service(service: Service) -> ServedModel:
    """Return what clients may know of the model and of the limits."""
    runtime, limits = service.predictor.runtime, service.limits
    description = runtime.description
    provenance = dict(description.provenance)
    provenance.pop("training_images", None)
    return ServedModel(
        name=service.name,
        classes=[
            ModelClass(id=k, name=name, color=hex_color(description.classes, k))
            for k, name in enumerate(description.classes.names)
        ],
        channels=description.channels,
        pixels=description.pixels,
        working=ModelWorkingSize(**asdict(description.working)),
        margin=description.margin,
        stride=description.stride,
        precision=description.precision,
        runtime=runtime.name,
        scores=provenance.pop("validation", None),
        provenance=provenance,
        limits=ServiceLimits(
            bytes=limits.upload_bytes,
            pixels=limits.pixels,
            pictures=limits.images,
            seconds=limits.seconds,
            memory=service.memory,
        ),
    )


def add_log_fields(request: Request, **entries: Any) -> None:
    """Add to the log entry of a request."""
    request.scope["state"].setdefault("log_fields", {}).update(entries)
