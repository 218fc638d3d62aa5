"""Bodies of requests -> uploaded files in memory, with a limit for each and for all together.

Uploads are never written to disk, and no more than the limits allow is kept in memory. Each request
reserves memory: its body and its response count until the last byte is sent and the last thread
that works for the request has ended.
"""

from __future__ import annotations

import asyncio
import io
from dataclasses import dataclass

from python_multipart.multipart import parse_options_header
from starlette.exceptions import HTTPException
from starlette.requests import Request

from useg.images.decode import stored_size
from useg.images.formats import clear_errors
from useg.serving.middleware import Limits, service_unavailable

# Limits of a form, apart from its files.
MAX_FORM_FIELDS = 16
MAX_FORM_FIELD_BYTES = 1000
MAX_PART_HEAD_BYTES = 4096
# RFC 2046, section 5.1.1.
MAX_BOUNDARY_LENGTH = 70

# Bytes of a form that are searched at a time: a few milliseconds, even for carriage returns alone.
FOUND_BYTES = 1 << 20

MAX_SHOWN_NAME_LENGTH = 60

# Room is reserved for bodies and responses up to this size, even when larger ones fill the rest.
SMALL_BYTES = 1_000_000
SMALL_SHARE = 8


@dataclass(frozen=True)
class Upload:
    """An uploaded file; error messages refer to it by ``name``."""

    name: str
    content: bytes


class Reservation:
    """The bytes that one request holds: its body, then its response.

    Threads that work for a request share its reservation, because the request may end before they
    do.
    """

    def __init__(self, memory: UploadReader) -> None:
        self.body = 0
        self.response = 0
        self.is_refused = False
        self._chunks: list[bytes] = []
        self._memory = memory
        self._holders = 1

    def add_chunk(self, chunk: bytes) -> None:
        """Keep a further part of the body.

        Raises:
            HTTPException: 503, too many bytes are held, and this body is the newest.
        """
        if not self.is_refused:
            self._memory.make_room(self, len(chunk))
        if self.is_refused:
            raise service_unavailable("too many uploads are in memory")
        self._chunks.append(chunk)
        self.body += len(chunk)
        self._memory.buffered_bytes += len(chunk)

    def refuse_body(self) -> None:
        """Forget the parts of the body, and take no more of them."""
        self.is_refused = True
        self._chunks.clear()
        self._memory.buffered_bytes -= self.body
        self.body = 0

    def take_chunks(self) -> list[bytes]:
        """Return the parts of the body, which is complete; it still counts."""
        chunks, self._chunks = self._chunks, []
        return chunks

    def hold_response(self, size: int, counted: int = 0) -> None:
        """Count further bytes of the response, of which ``counted`` are counted already.

        Raises:
            HTTPException: 413, the response is too large; 503, too many bytes are held.
        """
        limit, added = self._memory.limits.response_bytes, size - counted
        if self.response + added > limit:
            raise HTTPException(
                413,
                f"the response has {self.response + added:,} bytes or more, but at most {limit:,} "
                "are allowed; send a smaller image, or fewer, or ask for labels",
            )
        if self.response + added <= SMALL_BYTES:
            limit += limit // SMALL_SHARE
        # Refused bytes are not counted, so they take no room from other requests.
        if self._memory.response_bytes + added > limit:
            raise service_unavailable(
                "too many responses are waiting for their clients to read them"
            )
        self.response += added
        self._memory.response_bytes += added

    def share(self) -> None:
        """Add a holder."""
        self._holders += 1

    def release(self) -> None:
        """Remove a holder; after the last one the bytes no longer count."""
        self._holders -= 1
        if not self._holders:
            self._memory.buffered_bytes -= self.body
            self._memory.response_bytes -= self.response
            self.body = self.response = 0


class UploadReader:
    """Reads the bodies of requests, with a limit for each and for all together.

    Starlette's ``RequestBodyLimitMiddleware`` limits each body as strictly, but not all of them
    together, and it replaces our sentence by the plain text "Content Too Large".
    """

    def __init__(self, limits: Limits) -> None:
        self.buffered_bytes = 0
        self.response_bytes = 0
        self.limits = limits
        # Bodies that are not complete, the oldest first; what ends the wait for the next part.
        self._incomplete: dict[Reservation, asyncio.Timeout] = {}

    def reservation(self, request: Request) -> Reservation:
        """Return the memory reserved for a request, which the middleware releases at its end."""
        if not hasattr(request.state, "reservation"):
            request.state.reservation = Reservation(self)
        reservation: Reservation = request.state.reservation
        return reservation

    async def read(self, request: Request, most: int) -> bytes:
        """Read the whole body, of at most ``most`` bytes.

        Raises:
            HTTPException: the body is too large or compressed; 503 when all bodies together are too
                large.
        """
        if request.headers.get("content-encoding", "identity") != "identity":
            raise HTTPException(415, "the body is compressed; send it uncompressed")
        reservation = self.reservation(request)
        # A declared size is checked before anything is read.
        declared = request.headers.get("content-length", "0")
        _check_size(parse_count(declared) or 0, most)
        try:
            async with asyncio.timeout(None) as waiting:
                self._incomplete[reservation] = waiting
                async for chunk in request.stream():
                    _check_size(reservation.body + len(chunk), most)
                    reservation.add_chunk(chunk)
        except TimeoutError as error:
            raise service_unavailable("too many uploads are in memory") from error
        finally:
            del self._incomplete[reservation]
        request.state.received = True
        chunks = reservation.take_chunks()
        # Let other requests run: joining a large body takes a tenth of a second.
        is_large = len(chunks) > 1 and reservation.body > SMALL_BYTES
        return await asyncio.to_thread(b"".join, chunks) if is_large else b"".join(chunks)

    def make_room(self, reservation: Reservation, size: int) -> None:
        """Refuse the newest bodies until ``size`` further bytes of a body fit; perhaps itself.

        Bodies that arrive together grow together. If each were refused that finds no room, all
        would be.
        """
        is_large = reservation.body + size > SMALL_BYTES
        limit = self.limits.buffered_bytes
        if is_large:
            limit -= limit // SMALL_SHARE
        while self.buffered_bytes + size > limit and not reservation.is_refused:
            newest = next(
                each
                for each in reversed(self._incomplete)
                if each is reservation
                or (not each.is_refused and (each.body > SMALL_BYTES) == is_large)
            )
            newest.refuse_body()
            if newest is not reservation:
                # It may wait for a client that sends nothing.
                self._incomplete[newest].reschedule(0)


def parse_count(text: str) -> int | None:
    """Return a count of bytes from a header; None where it is not one.

    >>> parse_count("512"), parse_count("-1"), parse_count("9" * 5000)
    (512, None, None)
    """
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def _check_size(size: int, most: int) -> None:
    if size > most:
        raise HTTPException(
            413, f"the body has more than the allowed {most:,} bytes; send less at a time"
        )


def is_form(request: Request) -> bool:
    """Tell whether the body is a form of files."""
    return request.headers.get("content-type", "").lower().startswith("multipart/form-data")


def parse_form(body: bytes, content_type: str, most: int) -> list[Upload]:
    """Return the files of a form (RFC 7578).

    Starlette's parser calls Python once for each byte that could begin a boundary, which takes it
    20 seconds for 32 MB of carriage returns, and it decodes names by any charset that a client
    asks for. This one searches the complete body, and names are UTF-8.

    Args:
        body: the whole form.
        content_type: of the request.
        most: files that are allowed.

    Raises:
        HTTPException: 400, it is damaged or truncated, or it has too many parts or no file.
    """
    try:
        uploads = [
            Upload(f"image {k} ({_shown_name(name)})", content)
            for k, (name, content) in enumerate(_form_files(body, content_type, most), 1)
        ]
    except (ValueError, LookupError) as error:
        reason = str(error) if type(error) is ValueError else "a part has an invalid header"
        raise HTTPException(
            400, f"the form cannot be read ({reason}); send a complete form of 1 to {most} files"
        ) from error
    if not uploads:
        raise HTTPException(400, "the form has no file; send each image as a file with a file name")
    return uploads


def _form_files(body: bytes, content_type: str, most: int) -> list[tuple[str, bytes]]:
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not 1 <= len(boundary) <= MAX_BOUNDARY_LENGTH:
        raise ValueError("its content type names no boundary")
    delimiter = b"\r\n--" + boundary
    files, fields = [], 0
    at = _end_of_first(body, delimiter[2:]) if body.startswith(delimiter[2:]) else None
    at = _end_of_first(body, delimiter) if at is None else at
    while body[at : at + 2] != b"--":
        head_end = body.find(b"\r\n\r\n", at, at + MAX_PART_HEAD_BYTES)
        if head_end < 0:
            raise ValueError("it ends in the middle of a part, or a part has too long a header")
        # An empty part ends with its head.
        end = _find(body, delimiter, head_end + 2)
        if end < 0:
            raise ValueError("it ends in the middle of a part")
        name = _file_name(body[at:head_end])
        if name is not None:
            files.append((name, _copy(body, head_end + 4, end)))
        else:
            fields += 1
            if end - head_end > MAX_FORM_FIELD_BYTES:
                raise ValueError(f"a field has more than {MAX_FORM_FIELD_BYTES} bytes")
        if len(files) > most or fields > MAX_FORM_FIELDS:
            raise ValueError(f"it has more than {most} files or {MAX_FORM_FIELDS} fields")
        at = end + len(delimiter)
    return files


def _end_of_first(body: bytes, delimiter: bytes) -> int:
    """Return where the first delimiter ends."""
    found = _find(body, delimiter, 0)
    if found < 0:
        raise ValueError("it has no part")
    return found + len(delimiter)


def _find(body: bytes, delimiter: bytes, start: int) -> int:
    """Do what ``bytes.find`` does, piece by piece, so that other threads can run."""
    for place in range(start, len(body), FOUND_BYTES):
        found = body.find(delimiter, place, place + FOUND_BYTES + len(delimiter) - 1)
        if found >= 0:
            return found
    return -1


def _copy(body: bytes, start: int, end: int) -> bytes:
    """Do what a slice does, piece by piece, so that other threads can run."""
    return b"".join(
        body[place : min(place + FOUND_BYTES, end)] for place in range(start, end, FOUND_BYTES)
    )


def _file_name(head: bytes) -> str | None:
    """Return the file name that the head of a part gives; None where the part is a field."""
    for line in head.split(b"\r\n"):
        key, _, value = line.partition(b":")
        if key.strip().lower() == b"content-disposition":
            options = parse_options_header(value.strip())[1]
            name = options.get(b"filename")
            return None if name is None else name.decode("utf-8", "replace")
    raise ValueError("a part has no Content-Disposition")


def _shown_name(name: str) -> str:
    shown = "".join(letter if letter.isprintable() else "?" for letter in name or "no name")
    if len(shown) <= MAX_SHOWN_NAME_LENGTH:
        return shown
    return shown[: MAX_SHOWN_NAME_LENGTH - 3] + "..."


def declared_size(upload: Upload, limit: int) -> tuple[int, int]:
    """Return the (width, height) that an image file declares, without decoding it.

    Raises:
        DataError: it is not an image.
        HTTPException: 413, it declares more than ``limit`` pixels.
    """
    with clear_errors(upload.name):
        width, height = stored_size(io.BytesIO(upload.content), page=None)
    if width * height > limit:
        raise HTTPException(
            413,
            f"{upload.name} has {width}x{height} pixels, more than the allowed {limit:,}; send a "
            "smaller one",
        )
    return width, height
