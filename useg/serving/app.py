"""What the OpenAPI document says of requests and answers beyond what the routes' signatures do: bodies, examples, errors."""

from __future__ import annotations

import asyncio
import mimetypes
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from useg import __version__
from useg.errors import UsageError
from useg.serving import responses
from useg.serving.middleware import (
    OPEN,
    RefusalError,
    RequestLog,
    RequestMiddleware,
    Upload,
    busy,
    gone,
    refused,
    resident_bytes,
    upload_declared_pixels,
)
from useg.serving.responses import Answer, Form, bundled, hex_color, negotiated, respond
from useg.serving.service import Service, all_of, note, unless_gone

Schema = dict[str, Any]


Answers = dict[int | str, dict[str, Any]]


_BYTES: Schema = {"type": "string", "format": "binary"}


_CLASS = {"id": 7, "name": "Roads", "color": "#804080"}


_SHARES = {"width": 800, "height": 600, "classes": [{**_CLASS, "pixels": 115680, "share": 0.241}]}


_FEATURE = {
    "type": "Feature",
    "properties": {"class": "Roads", "id": 7, "pixels": 4},
    "geometry": {"type": "Polygon", "coordinates": [[[0, 0], [2, 0], [2, 2], [0, 2], [0, 0]]]},
}


_ERRORS = {
    400: (
        "the picture cannot be read, or does not fit the model",
        "'the picture' is not a picture useg can read (PNG, JPEG, WEBP, BMP, GIF or TIFF), ...",
    ),
    401: (
        "the token is missing or wrong",
        "this service wants a token; send the header 'Authorization: Bearer TOKEN'",
    ),
    404: ("there is no such model", "there is no model 'x' here; ask for 'street'"),
    406: (
        "no form of answer is acceptable",
        "nothing is answered as 'text/html'; accept one of application/json, image/png, ...",
    ),
    408: (
        "the body came too slowly",
        "the request's body was not complete after 25 seconds; send it faster, or less at a time",
    ),
    413: (
        "the body, the picture or the answer is too large",
        "the body has more than 32,000,000 bytes, which is the most that is taken; ...",
    ),
    415: ("the body is compressed", "the body is compressed, which is not taken; send it as it is"),
    422: (
        "a parameter is not valid",
        "'format' is not valid: Input should be 'labels', 'overlay', ...",
    ),
    503: (
        "too much to do; the header Retry-After says when to come again",
        "64 pictures are waiting already; try again in 2 seconds",
    ),
}


def _errors(*statuses: int) -> Answers:
    schema: Schema = {
        "type": "object",
        "required": ["error"],
        "properties": {"error": {"type": "string"}},
    }
    return {
        status: {
            "description": _ERRORS[status][0],
            "content": {
                "application/json": {"schema": schema, "example": {"error": _ERRORS[status][1]}}
            },
        }
        for status in statuses
    }


def _object(example: Schema, *required: str) -> Schema:
    return {"schema": {"type": "object", "required": list(required)}, "example": example}


def _ok(description: str, content: Schema) -> Answers:
    return {200: {"description": description, "content": content}}


def _body(content: Schema) -> Schema:
    return {"requestBody": {"required": True, "content": content}}


_FORM: Schema = {"schema": {"type": "object", "required": ["file"], "properties": {"file": _BYTES}}}


_FILES: Schema = {
    "schema": {
        "type": "object",
        "required": ["files"],
        "properties": {"files": {"type": "array", "items": _BYTES}},
    }
}


_PICTURE_KINDS = ("image/png", "image/jpeg", "image/webp", "image/tiff", "application/octet-stream")


PICTURE_BODY = _body(
    {"multipart/form-data": _FORM, **{kind: {"schema": _BYTES} for kind in _PICTURE_KINDS}}
)


PICTURES = _body({"multipart/form-data": _FILES})


TENSORS = _body(
    {
        "application/json": {
            "schema": {"type": "object", "required": ["inputs"]},
            "example": {
                "inputs": [
                    {
                        "name": "image",
                        "datatype": "UINT8",
                        "shape": [1, 1, 2, 3],
                        "data": [[[[90, 80, 70], [30, 40, 50]]]],
                    }
                ]
            },
        },
        "application/octet-stream": {"schema": _BYTES},
    }
)


_REFUSED = _errors(400, 401, 406, 408, 413, 415, 422, 503)


PREDICTED = _REFUSED | _ok(
    "`labels`: a palette PNG whose values are class ids. `overlay`: a PNG to look at. `json`: every class's share. `polygons`: GeoJSON of every "
    "region, in pixels. `probabilities`: numpy's npz with `probabilities` (K, H, W) float32 and `names`. `planes`: the label map's bytes, then a "
    "byte of confidence for each pixel; the size is in the headers X-Width and X-Height.",
    {
        "application/json": _object(_SHARES, "width", "height", "classes"),
        "image/png": {"schema": _BYTES},
        "application/geo+json": _object(
            {"type": "FeatureCollection", **_SHARES, "features": [_FEATURE]}, "type", "features"
        ),
        "application/x-npz": {"schema": _BYTES},
        "application/vnd.useg.planes": {"schema": _BYTES},
    },
)


PREDICTED_BATCH = _REFUSED | _ok(
    "`json` and `polygons`: a list in the order of the files. Everything else: a zip of `0.png`, `1.png`, ...",
    {
        "application/json": _object({"pictures": [_SHARES]}, "pictures"),
        "application/zip": {"schema": _BYTES},
    },
)


MODEL_BODY = _errors(401) | _ok(
    "Classes and colours, sizes, scores on held-out pictures, what it was trained on, and what the service takes.",
    {
        "application/json": _object(
            {"name": "street", "classes": [_CLASS], "working": {"frame": [256, 192], "scale": 1.0}},
            "name",
            "classes",
        )
    },
)


HEALTHY = _ok("It lives.", {"application/json": _object({"status": "ok"}, "status")})


READY = _errors(503) | _ok(
    "Requests are wanted.", {"application/json": _object({"status": "ready"})}
)


METRICS_BODY = _errors(401) | _ok(
    "Prometheus's text format.",
    {"text/plain": {"schema": {"type": "string"}, "example": "useg_waiting 0"}},
)


JSON_BODY = _errors(401) | _ok("An object.", {"application/json": _object({"name": "useg"})})


NAMED = _errors(401, 404, 422) | _ok(
    "An object.", {"application/json": _object({"name": "street"}, "name")}
)


INFERRED = (
    _REFUSED
    | _errors(404)
    | _ok(
        "The outputs asked for, by default `label_map`; as bytes behind the JSON where the request says `binary_data`.",
        {
            "application/json": _object(
                {
                    "model_name": "street",
                    "outputs": [
                        {
                            "name": "label_map",
                            "datatype": "UINT8",
                            "shape": [1, 1, 2],
                            "data": [7, 7],
                        }
                    ],
                }
            ),
            "application/octet-stream": {"schema": _BYTES},
        },
    )
)


PAGE = Path(__file__).parent / "page"


FormQuery = Annotated[
    Form | None,
    Query(
        description="the form of the answer; by default what the header Accept asks for, and else `json`"
    ),
]


def application(
    service: Service, log: RequestLog = lambda entry: None, token: str = ""
) -> RequestMiddleware:
    """Return the ASGI application.

    Args:
        service: what it serves.
        log: takes one entry for each request.
        token: what clients have to show; empty: nothing.
    """
    app = FastAPI(
        title="useg",
        summary="Label every pixel.",
        version=__version__,
        docs_url=None,
        redoc_url=None,
    )
    files = page_files()
    for router in (_prediction(service), _status(service), _open_inference(service), _page(files)):
        app.include_router(router)
    app.add_exception_handler(RefusalError, _on_refusal)
    app.add_exception_handler(UsageError, _on_usage_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(MemoryError, _on_no_memory)
    app.add_exception_handler(ClientDisconnect, _on_gone)
    app.add_exception_handler(Exception, _on_failure)
    public = frozenset({*OPEN, *files})
    return RequestMiddleware(
        app, service.metrics, log, service.limits.seconds, token, public, lambda: service.draining
    )


def _prediction(service: Service) -> APIRouter:
    router = APIRouter(tags=["prediction"])

    async def predicted(request: Request, upload: Upload, form: Form) -> Answer:
        pixels = await asyncio.to_thread(upload_declared_pixels, upload, service.limits.pixels)
        note(request, pixels=pixels)
        compress = "gzip" in request.headers.get("accept-encoding", "")
        return await service.desk.do(
            lambda: respond(service.predictor, upload, form, service.limits, compress), pixels
        )

    @router.post(
        "/predict",
        summary="Label the pixels of one picture",
        openapi_extra=PICTURE_BODY,
        responses=PREDICTED,
    )
    async def predict(request: Request, format: FormQuery = None) -> Response:
        form = negotiated(format, request.headers.get("accept", ""))
        async with service.uploads.receive(request) as uploads:
            if len(uploads) > 1:
                raise RefusalError(
                    400,
                    f"the form has {len(uploads)} files; send one, or all of them to /predict/batch",
                )
            found = await unless_gone(request, predicted(request, uploads[0], form))
        return Response(
            found.content,
            media_type=found.media,
            headers={**found.headers, "vary": "accept, accept-encoding"},
        )

    @router.post(
        "/predict/batch",
        summary="Label several pictures",
        openapi_extra=PICTURES,
        responses=PREDICTED_BATCH,
    )
    async def predict_batch(request: Request, format: FormQuery = None) -> Response:
        form = format or Form.JSON
        async with service.uploads.receive(request) as uploads:
            service.desk.check_room(len(uploads))
            found = bundled(
                await unless_gone(
                    request, all_of(predicted(request, upload, form) for upload in uploads)
                ),
                form,
            )
        return Response(found.content, media_type=found.media)

    return router


def _status(service: Service) -> APIRouter:
    router = APIRouter(tags=["status"])
    card, limits = service.predictor.runtime.description, service.limits

    @router.get("/model", summary="What the model is", responses=MODEL_BODY)
    async def model() -> JSONResponse:
        provenance = dict(card.provenance)
        return JSONResponse(
            {
                "name": service.name,
                "classes": [
                    {"id": k, "name": name, "color": hex_color(card.classes, k)}
                    for k, name in enumerate(card.classes.names)
                ],
                "channels": card.channels,
                "pixels": card.pixels,
                "working": {"frame": card.working.frame, "scale": card.working.scale},
                "margin": card.margin,
                "stride": card.stride,
                "precision": card.precision,
                "runtime": service.predictor.runtime.name,
                "scores": provenance.pop("validation", None),
                "provenance": provenance,
                "limits": {
                    "bytes": limits.upload,
                    "pixels": limits.pixels,
                    "pictures": limits.pictures,
                    "seconds": limits.seconds,
                },
            }
        )

    @router.get("/healthz", summary="Whether the process lives", responses=HEALTHY)
    async def healthz() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    @router.get("/readyz", summary="Whether requests are wanted", responses=READY)
    async def readyz() -> JSONResponse:
        if service.draining:
            raise busy("the service is about to end")
        service.desk.check_room(1)
        return JSONResponse({"status": "ready"})

    @router.get("/metrics", summary="Counts for Prometheus", responses=METRICS_BODY)
    async def metrics() -> Response:
        counts = service.network.counts
        gauges = {
            "useg_waiting": ("Pictures that wait for their turn.", service.desk.waiting),
            "useg_working": ("Pictures that are worked on.", service.desk.working),
            "useg_upload_bytes": ("Bytes of uploads in memory.", service.uploads.held),
            "useg_network_calls_total": ("Calls of the network.", counts.calls),
            "useg_network_pictures_total": (
                "Pictures, or windows of pictures, in those calls.",
                counts.pictures,
            ),
            "useg_network_seconds_total": ("Seconds spent in those calls.", counts.seconds),
            "process_resident_memory_bytes": ("Memory of the process.", resident_bytes()),
        }
        return Response(service.metrics.text(gauges), media_type="text/plain; version=0.0.4")

    return router


def _open_inference(service: Service) -> APIRouter:
    """The Open Inference Protocol, version 2."""
    router = APIRouter(prefix="/v2", tags=["open inference protocol"])
    card = service.predictor.runtime.description

    def check(name: str) -> None:
        if name != service.name:
            raise RefusalError(
                404, f"there is no model {name[:80]!r} here; ask for {service.name!r}"
            )

    @router.get("", summary="The server", responses=JSON_BODY)
    async def server() -> JSONResponse:
        return JSONResponse(
            {"name": "useg", "version": __version__, "extensions": ["binary_tensor_data"]}
        )

    @router.get("/health/live", summary="Whether the process lives", responses=JSON_BODY)
    async def live() -> JSONResponse:
        return JSONResponse({"live": True})

    @router.get("/health/ready", summary="Whether requests are wanted", responses=READY)
    async def ready() -> JSONResponse:
        if service.draining:
            raise busy("the service is about to end")
        return JSONResponse({"ready": True})

    @router.get("/models/{name}", summary="The model's inputs and outputs", responses=NAMED)
    async def metadata(name: str) -> JSONResponse:
        check(name)
        return JSONResponse(responses.model_metadata(name, card))

    @router.get("/models/{name}/ready", summary="Whether the model is loaded", responses=NAMED)
    async def model_ready(name: str) -> JSONResponse:
        check(name)
        return JSONResponse({"name": name, "ready": True})

    @router.post(
        "/models/{name}/infer",
        summary="Label images given as tensors",
        openapi_extra=TENSORS,
        responses=INFERRED,
    )
    async def infer(request: Request, name: str) -> Response:
        check(name)
        length = request.headers.get(responses.LENGTH)
        if length is not None and not (length.isascii() and length.isdigit()):
            raise RefusalError(
                400, f"the header {responses.LENGTH} is no number; give the bytes of the JSON"
            )
        body = await service.uploads.body(request)
        wanted = await asyncio.to_thread(
            responses.read_request, body, None if length is None else int(length)
        )
        pixels = wanted.images[..., 0].size
        if pixels > service.limits.pixels:
            raise RefusalError(
                413,
                f"the input has {pixels:,} pixels, but at most {service.limits.pixels:,} are taken; send fewer or smaller pictures",
            )
        note(request, pixels=pixels)
        work = service.desk.do(
            lambda: responses.infer(service.predictor, name, wanted, service.limits), pixels
        )
        content, headers = await unless_gone(request, work)
        return Response(content, headers=headers)

    return router


def _page(files: dict[str, tuple[bytes, str]]) -> APIRouter:
    router = APIRouter(include_in_schema=False)

    def file(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
        async def send() -> Response:
            return Response(content, media_type=kind, headers={"cache-control": "no-cache"})

        return send

    for path, (content, kind) in files.items():
        router.add_api_route(path, file(content, kind), methods=["GET"])
    return router


def page_files() -> dict[str, tuple[bytes, str]]:
    """Read the page: address -> content and type. ``engine.js`` is how this page predicts: by asking this server."""
    files = {
        f"/{path.name}": (path.read_bytes(), mimetypes.guess_type(path.name)[0] or "text/plain")
        for path in sorted(PAGE.iterdir())
    }
    return files | {"/": files["/index.html"], "/engine.js": files.pop("/engine-server.js")}


def _on_refusal(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RefusalError)
    note(request, error=error.sentence)
    return refused(error)


def _on_usage_error(request: Request, error: Exception) -> JSONResponse:
    return _on_refusal(request, RefusalError(400, str(error)))


def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    sentences = {
        404: "there is nothing at this address; see /openapi.json",
        405: "this address does not take this method; see /openapi.json",
    }
    answer = _on_refusal(
        request,
        RefusalError(error.status_code, sentences.get(error.status_code, str(error.detail))),
    )
    answer.headers.update(error.headers or {})
    return answer


def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return _on_refusal(
        request, RefusalError(422, f"{first['loc'][-1]!r} is not valid: {first['msg']}")
    )


def _on_gone(request: Request, error: Exception) -> JSONResponse:
    return _on_refusal(request, gone())


def _on_no_memory(request: Request, error: Exception) -> JSONResponse:
    return _on_refusal(request, busy("there is not enough memory for this picture now"))


def _on_failure(request: Request, error: Exception) -> JSONResponse:
    return _on_refusal(
        request, RefusalError(500, "something went wrong inside the service; its log says what")
    )
