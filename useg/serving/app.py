"""A service -> the HTTP application: predictions, the model, health, metrics, page, documentation.

The model is loaded once, before the first request. Images come only in the bodies of requests: no
route loads a model, or opens a path or URL that a client names.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from useg import __version__
from useg.errors import UsageError
from useg.serving import open_inference, responses
from useg.serving.middleware import (
    Access,
    RequestLog,
    RequestMiddleware,
    client_disconnected,
    error_response,
    resident_bytes,
    service_unavailable,
)
from useg.serving.request_queue import (
    IMAGES_AT_A_TIME,
    cancel_on_disconnect,
    gather_or_cancel,
)
from useg.serving.responses import (
    BatchSummary,
    EncodedPrediction,
    ErrorMessage,
    LabelSummary,
    PiecesResponse,
    ResponseFormat,
)
from useg.serving.service import (
    HealthStatus,
    ServedModel,
    Service,
    add_log_fields,
    describe_service,
)
from useg.serving.site import DOCS, PUBLIC_PATHS, docs_page, page_files
from useg.serving.uploads import (
    Reservation,
    Upload,
    declared_size,
    is_form,
    parse_count,
    parse_form,
)

# What FastAPI cannot read from the signatures: descriptions, examples, errors, streamed bodies.
_DOCUMENTATION: dict[str, Any] = json.loads((DOCS / "openapi.json").read_text("utf-8"))

FormatQuery = Annotated[
    ResponseFormat | None,
    Query(
        description="Format of the response. By default, the one that the Accept header prefers."
    ),
]
NamePath = Annotated[str, PathParameter(description="Name of the model.")]


def _documented(operation: str, model: type[BaseModel] | None = None) -> dict[str, Any]:
    """Return FastAPI's arguments that document an operation such as ``GET /model``.

    ``model`` is the class of a JSON response that the route's signature does not name.
    """
    documented = _DOCUMENTATION["operations"][operation]
    # FastAPI adds the schema to it.
    success = copy.deepcopy(documented["response"])
    if model is not None:
        success["model"] = model
    errors = {status: _documented_error(status) for status in documented["errors"]}
    body = documented.get("requestBody")
    return {
        "responses": {200: success, **errors},
        "openapi_extra": None if body is None else {"requestBody": body},
    }


def _documented_error(status: int) -> dict[str, Any]:
    error = _DOCUMENTATION["errors"][str(status)]
    content = {"application/json": {"example": {"error": error["example"]}}}
    return {"description": error["description"], "model": ErrorMessage, "content": content}


def application(
    service: Service,
    log: RequestLog = lambda entry: None,
    token: str = "",
    hosts: Iterable[str] = (),
) -> RequestMiddleware:
    """Return the ASGI application.

    Args:
        service: what it serves.
        log: takes one entry for each request.
        token: the token that clients must send; empty: they need none.
        hosts: names by which clients may call the service, besides its addresses and localhost.
    """
    # FastAPI's own pages at /docs load their code from other hosts.
    app = FastAPI(
        title="useg",
        summary="Semantic segmentation of images",
        version=__version__,
        docs_url=None,
        redoc_url=None,
    )
    files = page_files()
    for router in (
        _prediction_routes(service),
        _status_routes(service),
        _open_inference_routes(service),
        _page_routes(files),
    ):
        app.include_router(router)

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        name = "NAME" if token else service.name
        return HTMLResponse(docs_page(app.openapi(), str(request.base_url), name, bool(token)))

    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(UsageError, _on_usage_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_parameter)
    app.add_exception_handler(MemoryError, _on_memory_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_failure)
    return RequestMiddleware(
        app,
        service.metrics,
        log,
        seconds=service.limits.seconds,
        access=Access(
            token,
            frozenset(name.lower() for name in hosts),
            public=frozenset({*files, "/docs"}),
            health=frozenset(PUBLIC_PATHS),
        ),
        draining=lambda: service.draining,
    )


@dataclass(frozen=True)
class _Prediction:
    """The prediction of the images in one request.

    Args:
        service: predicts them.
        request: has them in its body.
        response_format: that of the response.
    """

    service: Service
    request: Request
    response_format: ResponseFormat

    @property
    def reservation(self) -> Reservation:
        """The memory that is reserved for the request."""
        return self.service.uploads.reservation(self.request)

    async def read_uploads(self) -> list[Upload]:
        """Read the files of a form, or any other body as one file."""
        service, request = self.service, self.request
        content = await service.uploads.read(request, service.limits.upload_bytes)
        if not content:
            raise HTTPException(
                400,
                "the request has no body; send an image file as the body, or in a form",
            )
        if not is_form(request):
            return [Upload("the image", content)]
        kind, most = request.headers["content-type"], service.limits.images
        queue, size = service.queue_for(len(content)), len(content)
        return await queue.run(lambda: parse_form(content, kind, most), size, self.reservation)

    async def predict(self, uploads: Sequence[Upload]) -> list[EncodedPrediction]:
        """Check the size of every image, and of the whole response, before any is decoded."""
        reservation, prediction = self.reservation, None
        if len(uploads) == 1 and not self.service.is_large(len(uploads[0].content)):
            size, prediction = await self._predict_if_small(uploads[0])
            sizes = [size]
        else:
            sizes = await gather_or_cancel(
                functools.partial(self._read_size, upload) for upload in uploads
            )
        pixels = sum(width * height for width, height in sizes)
        add_log_fields(self.request, pixels=pixels)
        if prediction is not None:
            reservation.hold_response(prediction.size)
            return [prediction]
        reservation.hold_response(self._known_size(pixels))
        return await gather_or_cancel(
            functools.partial(self._predict_one, upload, size)
            for upload, size in zip(uploads, sizes, strict=True)
        )

    async def _predict_if_small(
        self, upload: Upload
    ) -> tuple[tuple[int, int], EncodedPrediction | None]:
        """Check the size of an image, and predict it in the same turn of a thread if it is small.

        A second turn would wait once more for a thread, and twice for the event loop.
        """
        service = self.service

        def work() -> tuple[tuple[int, int], EncodedPrediction | None]:
            size = declared_size(upload, service.limits.pixels)
            needed, encoding = self._needed_bytes(size)
            is_held_first = self._known_size(1) > 0
            if is_held_first or service.is_large(len(upload.content), needed, encoding):
                return size, None
            return size, self._compute(upload)

        return await service.queue.run(work, service.small_work_bytes, self.reservation)

    async def _read_size(self, upload: Upload) -> tuple[int, int]:
        service, size = self.service, len(upload.content)
        return await service.queue_for(size).run(
            lambda: declared_size(upload, service.limits.pixels), size, self.reservation
        )

    async def _predict_one(self, upload: Upload, size: tuple[int, int]) -> EncodedPrediction:
        needed, encoding = self._needed_bytes(size)
        queue = self.service.queue_for(len(upload.content), needed, encoding)
        prediction = await queue.run(lambda: self._compute(upload), needed, self.reservation)
        self.reservation.hold_response(prediction.size, self._known_size(size[0] * size[1]))
        return prediction

    def _compute(self, upload: Upload) -> EncodedPrediction:
        service = self.service
        gzip = "gzip" in self.request.headers.get("accept-encoding", "")
        return responses.predict_upload(
            service.predictor, upload, self.response_format, service.limits, gzip
        )

    def _needed_bytes(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the memory for an image of this size, and how much of it encoding takes."""
        encoding = responses.encoding_bytes(self.response_format, *size)
        return self.service.work_bytes(*size) + encoding, encoding

    def _known_size(self, pixels: int) -> int:
        """Return the bytes of a response if they follow from its pixels; otherwise 0."""
        num_classes = len(self.service.predictor.classes)
        return responses.known_size(self.response_format, pixels, num_classes)


def _prediction_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["prediction"])

    @router.post(
        "/predict",
        summary="Label one image",
        **_documented("POST /predict", LabelSummary),
    )
    async def predict(request: Request, format: FormatQuery = None) -> Response:
        response_format = responses.negotiate_format(format, request.headers.get("accept", ""))
        prediction = _Prediction(service, request, response_format)
        uploads = await prediction.read_uploads()
        if len(uploads) > 1:
            raise HTTPException(
                400, f"the form has {len(uploads)} files; send one, or send them to /predict/batch"
            )
        (found,) = await cancel_on_disconnect(request, prediction.predict(uploads))
        return PiecesResponse(found, {"vary": "accept, accept-encoding"} | found.headers)

    @router.post(
        "/predict/batch",
        summary="Label several images",
        **_documented("POST /predict/batch", BatchSummary),
    )
    async def predict_batch(request: Request, format: FormatQuery = None) -> Response:
        response_format = format or ResponseFormat.JSON
        prediction = _Prediction(service, request, response_format)
        uploads = await prediction.read_uploads()
        service.queue.check_capacity(min(len(uploads), IMAGES_AT_A_TIME))
        found = await cancel_on_disconnect(request, prediction.predict(uploads))
        bundle = await service.queue.run(
            lambda: responses.bundle_predictions(found, response_format), 0, prediction.reservation
        )
        return PiecesResponse(bundle, bundle.headers)

    return router


def _status_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["status"])

    @router.get("/model", summary="The model and the limits", **_documented("GET /model"))
    async def model() -> ServedModel:
        return describe_service(service)

    @router.get("/healthz", summary="Whether the process is live", **_documented("GET /healthz"))
    async def healthz() -> HealthStatus:
        return HealthStatus(status="ok")

    @router.get(
        "/readyz", summary="Whether the service accepts requests", **_documented("GET /readyz")
    )
    async def readyz() -> HealthStatus:
        service.check_not_draining()
        service.queue.check_capacity(1)
        return HealthStatus(status="ready")

    @router.get("/metrics", summary="Metrics for Prometheus", **_documented("GET /metrics"))
    async def metrics() -> Response:
        counts, queues = service.network.counts, (service.queue, service.large_queue)
        values = {
            "useg_waiting": ("Images in the request queues.", sum(q.waiting for q in queues)),
            "useg_working": ("Images in progress.", sum(q.running for q in queues)),
            "useg_upload_bytes": ("Bytes of uploads in memory.", service.uploads.buffered_bytes),
            "useg_response_bytes": (
                "Bytes of responses in memory.",
                service.uploads.response_bytes,
            ),
            "useg_network_calls_total": ("Batches that the network computed.", counts.calls),
            "useg_network_pictures_total": (
                "Images, or windows of images, in those batches.",
                counts.images,
            ),
            "useg_network_seconds_total": ("Seconds spent on those batches.", counts.seconds),
            "process_resident_memory_bytes": ("Resident memory.", resident_bytes()),
        }
        return Response(service.metrics.text(values), media_type="text/plain; version=0.0.4")

    return router


def _open_inference_routes(service: Service) -> APIRouter:
    """The Open Inference Protocol, version 2."""
    router = APIRouter(prefix="/v2", tags=["open inference protocol"])

    def check_name(name: str) -> None:
        if name != service.name:
            raise HTTPException(
                404, f"there is no model {name[:80]!r} here; ask for {service.name!r}"
            )

    @router.get("", summary="Server metadata", **_documented("GET /v2"))
    async def server() -> open_inference.ServerMetadata:
        return open_inference.ServerMetadata(
            name="useg", version=__version__, extensions=["binary_tensor_data"]
        )

    @router.get(
        "/health/live", summary="Whether the server is live", **_documented("GET /v2/health/live")
    )
    async def live() -> open_inference.ServerLive:
        return open_inference.ServerLive(live=True)

    @router.get(
        "/health/ready",
        summary="Whether the server is ready",
        **_documented("GET /v2/health/ready"),
    )
    async def ready() -> open_inference.ServerReady:
        service.check_not_draining()
        return open_inference.ServerReady(ready=True)

    @router.get("/models/{name}", summary="Model metadata", **_documented("GET /v2/models/{name}"))
    async def metadata(name: NamePath) -> open_inference.ServedModelMetadata:
        check_name(name)
        content = open_inference.model_metadata(name, service.predictor.runtime.description)
        return open_inference.ServedModelMetadata.model_validate(content)

    @router.get(
        "/models/{name}/ready",
        summary="Whether the model is ready",
        **_documented("GET /v2/models/{name}/ready"),
    )
    async def model_ready(name: NamePath) -> open_inference.ServedModelReady:
        check_name(name)
        return open_inference.ServedModelReady(name=name, ready=True)

    @router.post(
        "/models/{name}/infer",
        summary="Label images given as tensors",
        **_documented("POST /v2/models/{name}/infer", open_inference.InferenceResponse),
    )
    async def infer(request: Request, name: NamePath) -> Response:
        check_name(name)
        json_length = _json_length(request)
        # Refused before a byte of the body is read.
        open_inference.check_json_length(json_length or 0)
        most = service.limits.upload_bytes
        if json_length is None:
            most = min(most, open_inference.MAX_JSON_BYTES)
        body = await service.uploads.read(request, most)
        content = await cancel_on_disconnect(request, _infer(service, request, body, json_length))
        return PiecesResponse(content, content.headers)

    return router


async def _infer(
    service: Service, request: Request, body: bytes, json_length: int | None
) -> EncodedPrediction:
    """Parse a request of tensors, wait for memory and a thread, and predict its images."""
    reservation = service.uploads.reservation(request)
    text_size = len(body) if json_length is None else json_length
    parsing_bytes = open_inference.JSON_EXPANSION * text_size
    wanted = await service.queue_for(len(body), parsing_bytes).run(
        lambda: open_inference.parse_inference_request(body, json_length),
        parsing_bytes,
        reservation,
    )
    _, height, width, _ = wanted.images.shape
    pixels, limit = wanted.images[..., 0].size, service.limits.pixels
    if pixels > limit:
        raise HTTPException(
            413,
            f"the input has {pixels:,} pixels, more than the allowed {limit:,}; send fewer or "
            "smaller images",
        )
    add_log_fields(request, pixels=pixels)
    needed = service.work_bytes(width, height)
    size = open_inference.inference_response_size(wanted, len(service.predictor.classes))
    reservation.hold_response(size)
    content = await service.queue_for(len(body), max(needed, size)).run(
        lambda: open_inference.run_inference(service.predictor, service.name, wanted),
        needed,
        reservation,
    )
    reservation.hold_response(content.size, counted=size)
    return content


def _json_length(request: Request) -> int | None:
    """Return how many bytes of the body are JSON, before its binary data; None: all."""
    name = open_inference.JSON_LENGTH_HEADER
    text = request.headers.get(name)
    if text is None:
        return None
    length = parse_count(text)
    if length is None:
        raise HTTPException(
            400, f"the header {name} is not a number; send the length of the JSON in bytes"
        )
    return length


def _page_routes(files: dict[str, tuple[bytes, str]]) -> APIRouter:
    router = APIRouter(include_in_schema=False)

    def make_route(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
        async def send() -> Response:
            headers = {"cache-control": "no-cache"}
            return Response(content, media_type=media_type, headers=headers)

        return send

    for path, (content, media_type) in files.items():
        router.add_api_route(path, make_route(content, media_type), methods=["GET"])
    return router


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    sentences = {
        404: "there is nothing at this address; see /docs",
        405: "this address does not accept this method; see /docs",
    }
    # Starlette's own errors say only "Not Found" or "Method Not Allowed".
    for status, sentence in sentences.items():
        if (error.status_code, error.detail) == (status, HTTPStatus(status).phrase):
            error = HTTPException(status, sentence, error.headers)
    add_log_fields(request, error=error.detail)
    return error_response(error)


async def _on_usage_error(request: Request, error: Exception) -> JSONResponse:
    return await _on_http_error(request, HTTPException(400, str(error)))


async def _on_invalid_parameter(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    sentence = f"{first['loc'][-1]!r} is not valid: {first['msg']}"
    return await _on_http_error(request, HTTPException(422, sentence))


async def _on_disconnect(request: Request, error: Exception) -> JSONResponse:
    return await _on_http_error(request, client_disconnected())


async def _on_memory_error(request: Request, error: Exception) -> JSONResponse:
    reason = "there is currently not enough memory for this image"
    return await _on_http_error(request, service_unavailable(reason))


async def _on_failure(request: Request, error: Exception) -> JSONResponse:
    sentence = "the service has an internal error; its log has the traceback"
    return await _on_http_error(request, HTTPException(500, sentence))
