"""Forms are split as they were joined, and hostile ones are refused at little cost."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from useg.serving import uploads as reader
from useg.serving.uploads import parse_form

pytestmark = pytest.mark.wheel


def joined(files: list[bytes], boundary: str = "edge") -> bytes:
    head = b'Content-Disposition: form-data; name="f"; filename="a.png"\r\n\r\n'
    parts = [b"--" + boundary.encode() + b"\r\n" + head + file + b"\r\n" for file in files]
    return b"".join(parts) + b"--" + boundary.encode() + b"--\r\n"


NEARLY_BOUNDARIES = [b"\r\n--edg", b"\r", b"--edge", b""]


@given(st.lists(st.binary(max_size=60) | st.sampled_from(NEARLY_BOUNDARIES), min_size=1))
def test_files_come_out_as_they_went_in(files: list[bytes]) -> None:
    if any(b"\r\n--edge" in b"\r\n" + file for file in files):
        return
    kind = "multipart/form-data; boundary=edge"
    uploads = parse_form(joined(files), kind, len(files))
    assert [upload.content for upload in uploads] == files
    assert uploads[0].name == "image 1 (a.png)"


@given(st.data())
def test_a_truncated_form_is_refused(data: st.DataObject) -> None:
    body = joined([b"abc", b"defg"])
    cut = data.draw(st.integers(0, len(body) - 5))
    with pytest.raises(HTTPException, match="the form cannot be read"):
        parse_form(body[:cut], "multipart/form-data; boundary=edge", 2)


@pytest.mark.parametrize("length", range(20))
def test_a_boundary_is_found_wherever_it_lies(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "FOUND_BYTES", 7)
    contents = [b"\r" * length, b"abc"]
    files = parse_form(joined(contents), "multipart/form-data; boundary=edge", 2)
    assert all(type(file.content) is bytes for file in files)
    assert [file.content for file in files] == contents


@pytest.mark.parametrize("unit", [b"\r", b"\n", b"-", b"\r\n", b"\r\n-", b"\r\n--edg", b"\0"])
def test_a_form_of_partial_boundaries_costs_little(unit: bytes) -> None:
    content = unit * (8_000_000 // len(unit))
    began = time.process_time()
    [upload] = parse_form(joined([content]), "multipart/form-data; boundary=edge", 1)
    assert upload.content == content
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    "charset", ["utf-16", "idna", "rot13", "zlib", "undefined", "unicode_escape", "\0", "x" * 3000]
)
def test_names_are_utf_8_whatever_charset_is_named(charset: str) -> None:
    body = joined([b"x"]).replace(b"a.png", "ä\x1b[31m".encode() + b"\xff")
    [upload] = parse_form(body, f"multipart/form-data; boundary=edge; charset={charset}", 1)
    assert upload.name == "image 1 (ä?[31m\ufffd)"


@pytest.mark.parametrize(
    ("kind", "head", "reason"),
    [
        ("multipart/form-data", b"", "its content type names no boundary"),
        ("multipart/form-data; boundary=", b"", "its content type names no boundary"),
        ("multipart/form-data; boundary=" + "a" * 71, b"", "its content type names no boundary"),
        ("multipart/form-data; boundary=other", b"", "it has no part"),
        ("multipart/form-data; boundary=edge", b"X: y", "a part has no Content-Disposition"),
        ("multipart/form-data; boundary=edge", b"X: " + b"y" * 5000, "it ends in the middle of"),
    ],
)
def test_a_damaged_form_is_refused(kind: str, head: bytes, reason: str) -> None:
    body = b"--edge\r\n" + head + b"\r\n\r\nabc\r\n--edge--\r\n"
    with pytest.raises(HTTPException) as refused:
        parse_form(body, kind, 4)
    assert refused.value.detail.startswith(f"the form cannot be read ({reason}")
