"""A request's body -> the files in it, kept in memory only, and no more of them than the limits allow."""

from __future__ import annotations

import contextlib
import io
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from useg.data.decode import stored_size
from useg.data.limits import clear_errors
from useg.serving.limits import Limits, RefusalError, busy

_FIELDS = 16  # of a form, beside its files
_FIELD_BYTES = 1000


@dataclass(frozen=True)
class Upload:
    """One file that was sent: ``name`` is for error messages."""

    name: str
    content: bytes


class Uploads:
    """Receives bodies; knows how many bytes of them are in memory."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.held = 0

    @contextlib.asynccontextmanager
    async def receive(self, request: Request) -> AsyncIterator[list[Upload]]:
        """Read the body: the files of a form (multipart/form-data), or else the body itself as one file; held until the block ends.

        Raises:
            RefusalError: too large, empty, damaged, compressed, or too many files; 503 when the service holds too much already.
        """
        before = self.held
        held = _Held(self)
        try:
            if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
                yield await self._form(request, held)
            else:
                yield [Upload("the picture", await self._body(request, held))]
        finally:
            self.held -= held.bytes
        assert self.held >= 0, before

    async def body(self, request: Request) -> bytes:
        """Read the whole body; errors as for :meth:`receive`. It counts as held only while it is read."""
        held = _Held(self)
        try:
            return await self._body(request, held)
        finally:
            self.held -= held.bytes

    async def _body(self, request: Request, held: _Held) -> bytes:
        content = b"".join([chunk async for chunk in self._chunks(request, held)])
        if not content:
            raise RefusalError(400, "the request has no body; send a picture file as the body, or as a file of a form")
        return content

    async def _form(self, request: Request, held: _Held) -> list[Upload]:
        parser = _Parser(
            request.headers,
            self._chunks(request, held),
            max_files=self.limits.pictures,
            max_fields=_FIELDS,
            max_part_size=_FIELD_BYTES,
        )
        parser.stream = parser.whole(parser.stream)
        parser.spool_max_size = self.limits.upload + 1  # nothing is ever written to disk
        try:
            form = await parser.parse()
        except MultiPartException as error:
            raise RefusalError(400, f"the form cannot be read ({error.message.rstrip('.')}); send at most {self.limits.pictures} files") from error
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        uploads = [Upload(f"picture {k + 1} ({_short(file.filename)})", await file.read()) for k, file in enumerate(files)]
        await form.close()
        if not uploads:
            raise RefusalError(400, "the form has no file; send each picture as a file with a name")
        return uploads

    async def _chunks(self, request: Request, held: _Held) -> AsyncGenerator[bytes, None]:
        """Yield the body as it arrives; a declared size is refused before anything is read."""
        if request.headers.get("content-encoding", "identity") != "identity":
            raise RefusalError(415, "the body is compressed, which is not taken; send it as it is")
        declared = request.headers.get("content-length", "0")
        self._check(int(declared) if declared.isascii() and declared.isdigit() else 0)
        async for chunk in request.stream():
            held.add(len(chunk))
            self._check(held.bytes)
            if chunk:
                yield chunk
        request.state.received = True

    def _check(self, size: int) -> None:
        if size > self.limits.upload:
            raise RefusalError(413, f"the body has more than {self.limits.upload:,} bytes, which is the most that is taken; send less at a time")


class _Parser(MultiPartParser):
    """Refuses a form that ends before its end; the files that it began are closed then, too."""

    ended = False

    def on_end(self) -> None:
        self.ended = True

    async def whole(self, stream: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        """Yield what arrives, and see to it that this was all."""
        async for chunk in stream:
            yield chunk
        if not self.ended:
            raise MultiPartException("it ends in the middle of a part")


class _Held:
    """The bytes of one request."""

    def __init__(self, uploads: Uploads) -> None:
        self.bytes, self._uploads = 0, uploads

    def add(self, size: int) -> None:
        self.bytes += size
        self._uploads.held += size
        if self._uploads.held > self._uploads.limits.held:
            raise busy("too many uploads are in memory")


def declared_pixels(upload: Upload, most: int) -> int:
    """Return how many pixels a picture file declares; nothing is decoded.

    Raises:
        UsageError: it is no picture.
        RefusalError: it declares more than ``most``.
    """
    with clear_errors(upload.name):
        width, height = stored_size(io.BytesIO(upload.content), page=None)
    if width * height > most:
        raise RefusalError(413, f"{upload.name} has {width}x{height} pixels, but at most {most:,} are taken; send a smaller one")
    return width * height


def _short(name: str | None) -> str:
    shown = "".join(letter if letter.isprintable() else "?" for letter in name or "no name")
    return shown if len(shown) <= 60 else shown[:57] + "..."
