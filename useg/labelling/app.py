"""``useg label``: a labelling session -> its HTTP application, served on this machine only.

Images are identified by their index, never by a path. Only one browser edits at a time; another one
can take over.
"""

from __future__ import annotations

import contextlib
import logging
import math
import mimetypes
import secrets
import signal
import sys
import tempfile
import webbrowser
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from useg.classes import Label, hex_color
from useg.errors import MachineError, UsageError
from useg.files import clear_drafts, locked_folder, make_folder
from useg.inference.predictor import Predictor
from useg.labelling.folder import LabelFolder, StaleMaskError
from useg.labelling.mask_files import find_faulty, find_paths
from useg.labelling.rounds import Rounds
from useg.labelling.session import EditorError, LabelSession
from useg.parsing import parse_json
from useg.serving.connections import bounded_config
from useg.serving.middleware import (
    Access,
    Limits,
    Metrics,
    RequestMiddleware,
    error_response,
)
from useg.serving.run import listen, listener_url
from useg.serving.site import PAGE
from useg.serving.uploads import UploadReader

HOST = "127.0.0.1"
_MAX_CONNECTIONS = 64
_SHUTDOWN_SECONDS = 3
PAGE_FILES = Path(__file__).parent / "page"
# Files that the labelling page shares with the page of `useg serve`.
SHARED_FILES = ("style.css", "icon.svg", "labels.js", "legend.js")
# Size limit of requests other than strokes.
MAX_SMALL_BYTES = 200_000
# Strokes up to this size are read concurrently, eight at a time.
STROKE_BYTES = 4_000_000
REQUEST_SECONDS = 120.0
# A report contains inline styles and scripts. The sandbox gives it an opaque origin, so that they
# cannot access this page.
REPORT_POLICY = (
    "sandbox allow-scripts allow-popups; default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; img-src data:"
)

Place = Annotated[int, Query(ge=0, lt=1 << 24)]
Length = Annotated[int, Query(ge=1, lt=1 << 24)]


@dataclass(frozen=True)
class LabelOptions:
    """The options of ``useg label``.

    Args:
        images: The folder of the images.
        classes: The class names, for a folder without classes.
        masks: The folder of the masks; None for the default.
        model: A model that makes the first suggestions.
        correct: Whether each image starts with the prediction of the model as its mask.
        port: The port to listen on; 0 picks a free one.
        faulty: Whether to show images with faulty masks first, as ``useg inspect`` finds them.
    """

    images: Path
    classes: Sequence[str] = ()
    masks: Path | None = None
    model: Path | None = None
    correct: bool = False
    port: int = 0
    faulty: bool = False


@contextmanager
def open_session(options: LabelOptions) -> Iterator[LabelSession]:
    """Open a folder for labelling, and lock it until the block ends.

    Raises:
        UsageError: The images, masks or model cannot be used, or another process uses the folder.
    """
    paths = find_paths(options.images, options.masks)
    predictor = Predictor.load(options.model) if options.model else None
    make_folder(paths.masks)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked_folder(paths.masks))
        except MachineError as error:
            raise MachineError(
                f"another useg label uses '{paths.masks}', or the folder is not writable ({error})"
            ) from error
        clear_drafts(paths.masks)
        folder = LabelFolder(paths, options.classes)
        if options.faulty:
            folder.mark_faulty(find_faulty(paths))
        if predictor and folder.table is None:
            folder.use_model_classes(predictor.classes)
        rounds = Rounds(folder, predictor, only_done=options.correct)
        session = LabelSession(folder, rounds, prefill=options.correct)
        rounds.start()
        try:
            yield session
        finally:
            session.close()


class LabelServer(uvicorn.Server):
    """A server that shuts down without an error on SIGINT and SIGTERM."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start the shutdown; the method of uvicorn would raise the signal again."""
        self.force_exit = self.should_exit
        self.should_exit = True


def make_label_server(session: LabelSession, token: str, port: int) -> LabelServer:
    """Return a server for a session; ``run(sockets=[...])`` returns after its shutdown."""
    application = label_application(session, token, port)
    return LabelServer(bounded_config(application, _MAX_CONNECTIONS, _SHUTDOWN_SECONDS))


def serve_labelling_page(
    options: LabelOptions,
    show: Callable[[str], None],
    say: Callable[[str], None],
    *,
    browse: bool = True,
) -> None:
    """Serve the labelling page until SIGINT or SIGTERM.

    Args:
        options: What to label.
        show: Receives the address with its token.
        say: Receives notices, such as skipped images.
        browse: Whether to open a browser.

    Raises:
        UsageError: See :func:`open_session`; also if the port is in use.
    """
    token = secrets.token_urlsafe(24)
    with listen(HOST, options.port) as listener, open_session(options) as session:
        for note in session.folder.notes:
            say(note)
        address = listener_url(listener)
        server = make_label_server(session, token, listener.getsockname()[1])
        logging.getLogger("uvicorn").addHandler(logging.StreamHandler(sys.stderr))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, server.handle_exit)
        url = f"{address}/?token={token}"
        show(url)
        with tempfile.TemporaryDirectory() as private:
            if browse:
                _open_browser(Path(private, "useg-label.html"), url)
            server.run(sockets=[listener])


def _open_browser(file: Path, url: str) -> None:
    """Open the page through a private file, since all users can see the arguments of a process."""
    file.write_text(f'<meta http-equiv="refresh" content="0; url={url}">', "utf-8")
    with contextlib.suppress(webbrowser.Error):
        webbrowser.open(file.as_uri())


def label_application(session: LabelSession, token: str, port: int) -> RequestMiddleware:
    """Return the ASGI application of a session.

    Args:
        session: The labelling session.
        token: Required in every request: in the address, in a cookie, or as a bearer token.
        port: The port; part of the cookie's name, because all ports of a host share cookies.
    """
    app = FastAPI(title="useg label", docs_url=None, redoc_url=None, openapi_url=None)
    cookie = f"useg-label-{port}"
    largest = max(math.prod(each.size) for each in session.folder.images)
    # All bodies together may be 8 times as large: two strokes over the largest image fit.
    bodies = UploadReader(Limits(upload_bytes=max(STROKE_BYTES, largest // 3)))
    _add_page(app, cookie, token)
    _add_image_views(app, session)
    _add_image_edits(app, session, bodies)
    _add_session(app, session, bodies)
    _add_exports(app, session)
    for kind, handler in (
        (HTTPException, _on_http_error),
        (UsageError, _on_usage_error),
        (RequestValidationError, _on_invalid_parameter),
        (Exception, _on_failure),
    ):
        app.add_exception_handler(kind, handler)
    return RequestMiddleware(
        app,
        Metrics(),
        lambda entry: None,
        seconds=REQUEST_SECONDS,
        access=Access(token, cookie=cookie),
        draining=lambda: session.is_shutting_down,
    )


def _add_page(app: FastAPI, cookie: str, token: str) -> None:
    paths = [*sorted(PAGE_FILES.iterdir()), *(PAGE / name for name in SHARED_FILES)]

    def add(address: str, path: Path) -> None:
        content = path.read_bytes()
        media_type = mimetypes.guess_type(path.name)[0] or "text/plain"

        async def send() -> Response:
            response = Response(content, media_type=media_type)
            response.headers["cache-control"] = "no-cache"
            if address == "/":
                response.set_cookie(cookie, token, httponly=True, samesite="strict")
            return response

        app.add_api_route(address, send, methods=["GET"])

    for path in paths:
        add("/" if path.name == "index.html" else f"/{path.name}", path)


def _add_image_views(app: FastAPI, session: LabelSession) -> None:
    """Add the addresses that show an image, its mask and its suggestion."""
    folder = session.folder

    @app.get("/images/{k}")
    def image(k: int) -> Response:
        content, media_type = session.image_for_browser(_check_image(folder, k))
        return Response(content, media_type=media_type)

    @app.get("/images/{k}/thumbnail")
    def thumbnail(k: int) -> Response:
        content = session.thumbnail(_check_image(folder, k))
        headers = {"cache-control": "private, max-age=3600"}
        return Response(content, media_type="image/jpeg", headers=headers)

    @app.get("/images/{k}/mask")
    def mask(k: int) -> Response:
        label, revision = folder.read(_check_image(folder, k))
        return _pixels_response([label], {"x-revision": revision})

    @app.get("/images/{k}/suggestion")
    def suggestion(k: int) -> Response:
        found = session.rounds.suggest(_check_image(folder, k))
        if found is None:
            return Response(status_code=204)
        height, width = found.ids.shape
        return _pixels_response(
            [found.ids, found.confidence, found.unsure],
            {"x-width": width, "x-height": height, "x-round": found.round},
        )


def _add_image_edits(app: FastAPI, session: LabelSession, bodies: UploadReader) -> None:
    """Add the addresses that change a mask, and the one that finds a region to paint."""
    folder = session.folder

    @app.patch("/images/{k}/mask")
    async def paint(
        request: Request,
        k: int,
        x: Place,
        y: Place,
        width: Length,
        height: Length,
        revision: Annotated[str, Query(max_length=80)],
    ) -> dict[str, Any]:
        session.check_editor(request.headers.get("x-session", ""))
        size = folder.images[_check_image(folder, k)].size
        if x + width > size[0] or y + height > size[1]:
            raise HTTPException(
                400,
                f"the rectangle {width}x{height} at ({x}, {y}) exceeds the image, which is "
                f"{size[0]}x{size[1]} pixels",
            )
        part = await _read_rectangle(bodies, request, width, height)
        new = await run_in_threadpool(session.paint, k, (x, y), part, revision)
        return {"revision": new, "state": folder.images[k].state}

    @app.post("/images/{k}/done")
    def done(request: Request, k: int, done: bool) -> dict[str, Any]:
        session.check_editor(request.headers.get("x-session", ""))
        session.set_done(_check_image(folder, k), done)
        return {"state": folder.images[k].state}

    @app.post("/images/{k}/region")
    async def region(request: Request, k: int) -> Response:
        content = _json_object(await bodies.read(request, MAX_SMALL_BYTES))
        k = _check_image(folder, k)
        (x, y), mask = await run_in_threadpool(session.find_region, k, content)
        height, width = mask.shape
        box = {"x-x": x, "x-y": y, "x-width": width, "x-height": height}
        return _pixels_response([mask.astype(np.uint8)], box)


def _check_image(folder: LabelFolder, k: int) -> int:
    """Return the number of an image, if there is one of this number."""
    if not 0 <= k < len(folder.images):
        raise HTTPException(
            404, f"image {k} does not exist; there are {len(folder.images)} images, from 0"
        )
    return k


async def _read_rectangle(bodies: UploadReader, request: Request, width: int, height: int) -> Label:
    """Read the painted ids of a rectangle, one byte for each pixel: ``(height, width)``."""
    content = await bodies.read(request, width * height)
    if len(content) != width * height:
        raise HTTPException(
            400,
            f"the body has {len(content)} bytes, but {width}x{height} pixels need {width * height}",
        )
    return np.frombuffer(content, np.uint8).reshape(height, width)


def _pixels_response(planes: Sequence[NDArray[Any]], headers: Mapping[str, object]) -> Response:
    """Return the bytes of arrays one after the other, with what describes them as headers."""
    return Response(
        b"".join(plane.tobytes() for plane in planes),
        media_type="application/octet-stream",
        headers={name: str(value) for name, value in headers.items()},
    )


def _add_session(app: FastAPI, session: LabelSession, bodies: UploadReader) -> None:
    folder = session.folder

    @app.get("/folder")
    def describe() -> dict[str, Any]:
        table = folder.table
        return {
            "name": folder.paths.images.name,
            "root": str(folder.paths.root),
            "images": [
                {
                    "name": each.name,
                    "width": each.size[0],
                    "height": each.size[1],
                    "finding": each.finding,
                }
                for each in folder.images
            ],
            "classes": [
                {"id": k, "name": name, "color": hex_color(table, k)}
                for k, name in enumerate(table.names if table else ())
                if table
            ],
            "prefill": session.prefill,
            "notes": folder.notes,
        }

    @app.get("/state")
    def state(request: Request) -> dict[str, Any]:
        return session.state(request.headers.get("x-session", ""))

    @app.post("/session")
    def join(take: bool = False) -> dict[str, Any]:
        key = secrets.token_hex(8)
        return {"session": key, "editor": session.join(key, take=take)}

    @app.post("/classes")
    async def classes(request: Request) -> dict[str, Any]:
        session.check_editor(request.headers.get("x-session", ""))
        content = _json_object(await bodies.read(request, MAX_SMALL_BYTES))
        await run_in_threadpool(session.set_classes, content.get("classes"))
        return describe()

    @app.post("/round")
    def train_now(request: Request) -> dict[str, Any]:
        session.check_editor(request.headers.get("x-session", ""))
        session.rounds.train_now()
        return {}

    @app.post("/train")
    def train(request: Request, minutes: Annotated[float, Query(gt=0, le=1440)]) -> dict[str, Any]:
        session.check_editor(request.headers.get("x-session", ""))
        session.training.start(minutes)
        return {"training": session.training.state()}

    @app.post("/train/stop")
    def stop(request: Request) -> dict[str, Any]:
        session.check_editor(request.headers.get("x-session", ""))
        session.training.stop()
        return {"training": session.training.state()}


def _add_exports(app: FastAPI, session: LabelSession) -> None:
    @app.get("/masks.zip")
    def masks() -> Response:
        headers = {"content-disposition": 'attachment; filename="masks.zip"'}
        return Response(session.zip_masks(), media_type="application/zip", headers=headers)

    @app.get("/coco.json")
    def coco() -> Response:
        headers = {"content-disposition": 'attachment; filename="coco.json"'}
        return Response(session.coco(), media_type="application/json", headers=headers)

    @app.get("/report")
    def report() -> Response:
        content = session.training.report()
        headers = {"content-security-policy": REPORT_POLICY}
        return Response(content, media_type="text/html; charset=utf-8", headers=headers)


def _json_object(content: bytes) -> dict[str, Any]:
    try:
        parsed = parse_json(content)
    except ValueError as error:
        raise HTTPException(400, f"the body is not JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise HTTPException(400, "the body is not a JSON object")
    return parsed


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    # Replace the bare phrases of Starlette, such as "Not Found", with a sentence.
    if error.detail == HTTPStatus(error.status_code).phrase:
        sentence = "this address does not exist, or it does not support this method"
        error = HTTPException(error.status_code, sentence, error.headers)
    return error_response(error)


async def _on_usage_error(request: Request, error: Exception) -> JSONResponse:
    by_kind: dict[type[Exception], int] = {StaleMaskError: 409, EditorError: 423}
    return error_response(HTTPException(by_kind.get(type(error), 400), str(error)))


async def _on_invalid_parameter(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return error_response(HTTPException(422, f"{first['loc'][-1]!r} is not valid: {first['msg']}"))


async def _on_failure(request: Request, error: Exception) -> JSONResponse:
    return error_response(HTTPException(500, "internal error of the labelling server"))
