"""A model -> an HTTP application: the page, predictions of uploaded pictures, what the model is, the service's health.

No route loads a model or reads a path or an address that a client names: the model is loaded once, before the first request, and pictures
come in requests' bodies alone.
"""

from __future__ import annotations

import asyncio
import mimetypes
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from useg import __version__
from useg.errors import UsageError
from useg.serving import openapi, protocol
from useg.serving.answers import Answer, Form, answer, bundled, hex_color, negotiated
from useg.serving.frontdoor import OPEN, FrontDoor, Log, refused
from useg.serving.limits import RefusalError, busy, gone
from useg.serving.metrics import resident_bytes
from useg.serving.service import Service, all_of, note, unless_gone
from useg.serving.uploads import Upload, declared_pixels

PAGE = Path(__file__).parent / "page"
Asked = Annotated[Form | None, Query(description="the form of the answer; by default what the header Accept asks for, and else `json`")]


def application(service: Service, log: Log = lambda entry: None, token: str = "") -> FrontDoor:
    """Return the ASGI application.

    Args:
        service: what it serves.
        log: takes one entry for each request.
        token: what clients have to show; empty: nothing.
    """
    app = FastAPI(title="useg", summary="Label every pixel.", version=__version__, docs_url=None, redoc_url=None)
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
    return FrontDoor(app, service.metrics, log, service.limits.seconds, token, public, lambda: service.draining)


def _prediction(service: Service) -> APIRouter:
    router = APIRouter(tags=["prediction"])

    async def predicted(request: Request, upload: Upload, form: Form) -> Answer:
        pixels = await asyncio.to_thread(declared_pixels, upload, service.limits.pixels)
        note(request, pixels=pixels)
        compress = "gzip" in request.headers.get("accept-encoding", "")
        return await service.desk.do(lambda: answer(service.predictor, upload, form, service.limits, compress), pixels)

    @router.post("/predict", summary="Label the pixels of one picture", openapi_extra=openapi.PICTURE, responses=openapi.PREDICTED)
    async def predict(request: Request, format: Asked = None) -> Response:
        form = negotiated(format, request.headers.get("accept", ""))
        async with service.uploads.receive(request) as uploads:
            if len(uploads) > 1:
                raise RefusalError(400, f"the form has {len(uploads)} files; send one, or all of them to /predict/batch")
            found = await unless_gone(request, predicted(request, uploads[0], form))
        return Response(found.content, media_type=found.media, headers={**found.headers, "vary": "accept, accept-encoding"})

    @router.post("/predict/batch", summary="Label several pictures", openapi_extra=openapi.PICTURES, responses=openapi.PREDICTED_BATCH)
    async def predict_batch(request: Request, format: Asked = None) -> Response:
        form = format or Form.JSON
        async with service.uploads.receive(request) as uploads:
            service.desk.check_room(len(uploads))
            found = bundled(await unless_gone(request, all_of(predicted(request, upload, form) for upload in uploads)), form)
        return Response(found.content, media_type=found.media)

    return router


def _status(service: Service) -> APIRouter:
    router = APIRouter(tags=["status"])
    card, limits = service.predictor.runtime.card, service.limits

    @router.get("/model", summary="What the model is", responses=openapi.MODEL)
    async def model() -> JSONResponse:
        provenance = dict(card.provenance)
        return JSONResponse(
            {
                "name": service.name,
                "classes": [{"id": k, "name": name, "color": hex_color(card.classes, k)} for k, name in enumerate(card.classes.names)],
                "channels": card.channels,
                "pixels": card.pixels,
                "working": {"frame": card.working.frame, "scale": card.working.scale},
                "margin": card.margin,
                "stride": card.stride,
                "precision": card.precision,
                "runtime": service.predictor.runtime.name,
                "scores": provenance.pop("validation", None),
                "provenance": provenance,
                "limits": {"bytes": limits.upload, "pixels": limits.pixels, "pictures": limits.pictures, "seconds": limits.seconds},
            }
        )

    @router.get("/healthz", summary="Whether the process lives", responses=openapi.HEALTHY)
    async def healthz() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    @router.get("/readyz", summary="Whether requests are wanted", responses=openapi.READY)
    async def readyz() -> JSONResponse:
        if service.draining:
            raise busy("the service is about to end")
        service.desk.check_room(1)
        return JSONResponse({"status": "ready"})

    @router.get("/metrics", summary="Counts for Prometheus", responses=openapi.METRICS)
    async def metrics() -> Response:
        counts = service.network.counts
        gauges = {
            "useg_waiting": ("Pictures that wait for their turn.", service.desk.waiting),
            "useg_working": ("Pictures that are worked on.", service.desk.working),
            "useg_upload_bytes": ("Bytes of uploads in memory.", service.uploads.held),
            "useg_network_calls_total": ("Calls of the network.", counts.calls),
            "useg_network_pictures_total": ("Pictures, or windows of pictures, in those calls.", counts.pictures),
            "useg_network_seconds_total": ("Seconds spent in those calls.", counts.seconds),
            "process_resident_memory_bytes": ("Memory of the process.", resident_bytes()),
        }
        return Response(service.metrics.text(gauges), media_type="text/plain; version=0.0.4")

    return router


def _open_inference(service: Service) -> APIRouter:
    """The Open Inference Protocol, version 2."""
    router = APIRouter(prefix="/v2", tags=["open inference protocol"])
    card = service.predictor.runtime.card

    def check(name: str) -> None:
        if name != service.name:
            raise RefusalError(404, f"there is no model {name[:80]!r} here; ask for {service.name!r}")

    @router.get("", summary="The server", responses=openapi.JSON)
    async def server() -> JSONResponse:
        return JSONResponse({"name": "useg", "version": __version__, "extensions": ["binary_tensor_data"]})

    @router.get("/health/live", summary="Whether the process lives", responses=openapi.JSON)
    async def live() -> JSONResponse:
        return JSONResponse({"live": True})

    @router.get("/health/ready", summary="Whether requests are wanted", responses=openapi.READY)
    async def ready() -> JSONResponse:
        if service.draining:
            raise busy("the service is about to end")
        return JSONResponse({"ready": True})

    @router.get("/models/{name}", summary="The model's inputs and outputs", responses=openapi.NAMED)
    async def metadata(name: str) -> JSONResponse:
        check(name)
        return JSONResponse(protocol.described(name, card))

    @router.get("/models/{name}/ready", summary="Whether the model is loaded", responses=openapi.NAMED)
    async def model_ready(name: str) -> JSONResponse:
        check(name)
        return JSONResponse({"name": name, "ready": True})

    @router.post("/models/{name}/infer", summary="Label images given as tensors", openapi_extra=openapi.TENSORS, responses=openapi.INFERRED)
    async def infer(request: Request, name: str) -> Response:
        check(name)
        length = request.headers.get(protocol.LENGTH)
        if length is not None and not (length.isascii() and length.isdigit()):
            raise RefusalError(400, f"the header {protocol.LENGTH} is no number; give the bytes of the JSON")
        body = await service.uploads.body(request)
        wanted = await asyncio.to_thread(protocol.read_request, body, None if length is None else int(length))
        pixels = wanted.images[..., 0].size
        if pixels > service.limits.pixels:
            raise RefusalError(
                413, f"the input has {pixels:,} pixels, but at most {service.limits.pixels:,} are taken; send fewer or smaller pictures"
            )
        note(request, pixels=pixels)
        work = service.desk.do(lambda: protocol.infer(service.predictor, name, wanted, service.limits), pixels)
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
    files = {f"/{path.name}": (path.read_bytes(), mimetypes.guess_type(path.name)[0] or "text/plain") for path in sorted(PAGE.iterdir())}
    return files | {"/": files["/index.html"], "/engine.js": files.pop("/engine-server.js")}


def _on_refusal(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RefusalError)
    note(request, error=error.sentence)
    return refused(error)


def _on_usage_error(request: Request, error: Exception) -> JSONResponse:
    return _on_refusal(request, RefusalError(400, str(error)))


def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    sentences = {404: "there is nothing at this address; see /openapi.json", 405: "this address does not take this method; see /openapi.json"}
    answer = _on_refusal(request, RefusalError(error.status_code, sentences.get(error.status_code, str(error.detail))))
    answer.headers.update(error.headers or {})
    return answer


def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return _on_refusal(request, RefusalError(422, f"{first['loc'][-1]!r} is not valid: {first['msg']}"))


def _on_gone(request: Request, error: Exception) -> JSONResponse:
    return _on_refusal(request, gone())


def _on_no_memory(request: Request, error: Exception) -> JSONResponse:
    return _on_refusal(request, busy("there is not enough memory for this picture now"))


def _on_failure(request: Request, error: Exception) -> JSONResponse:
    return _on_refusal(request, RefusalError(500, "something went wrong inside the service; its log says what"))
