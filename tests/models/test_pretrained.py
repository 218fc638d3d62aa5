"""Files of weights: what torch.save writes is read, anything more is refused."""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
import torch

from useg.models import pretrained
from useg.models.pretrained import load_pickled

pytestmark = pytest.mark.wheel


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def packed(content: bytes, change: Callable[[str, bytes], bytes], compression: int = 0) -> bytes:
    """The same archive with its parts changed or compressed."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(buffer, "w", compression) as new,
    ):
        for part in old.infolist():
            new.writestr(part.filename, change(part.filename, old.read(part)))
    return buffer.getvalue()


class ByteArray:
    """A pickle of it makes an array of any length, which ``weights_only`` allows."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (self.length,)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saves_comes_back(zipped: bool) -> None:
    content = {"a": torch.arange(6.0).view(2, 3), "b": [1, 2.5, None, "x", torch.ones(1).half()]}
    again = load_pickled(io.BytesIO(saved(content, _use_new_zipfile_serialization=zipped)))
    assert torch.equal(again["a"], content["a"])
    assert again["b"][:4] == content["b"][:4]


GOOD = saved({"a": torch.ones(8), "n": 1})
HOSTILE = {
    "nothing": b"",
    "a plain pickle": pickle.dumps({"a": 1}),
    "code": saved({"a": print}),
    "a compressed part": packed(
        GOOD, lambda name, part: part + bytes(10**6), compression=zipfile.ZIP_DEFLATED
    ),
    "another pickle": packed(
        GOOD, lambda name, part: part if "data.pkl" not in name else pickle.dumps(ByteArray(9))
    ),
    "a byte array": saved({"a": ByteArray(1 << 30)}),
    "a byte array of old": saved({"a": ByteArray(1 << 30)}, _use_new_zipfile_serialization=False),
    "one number as a million": saved({"a": torch.ones(1).expand(1000, 1000)}),
    "fewer numbers than declared": packed(
        GOOD, lambda name, part: part[:4] if name.endswith("data/0") else part
    ),
    "cut short": GOOD[: len(GOOD) // 2],
    "a counter": saved({"a": collections.Counter("abc")}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_anything_more_is_refused(name: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of which kind does not matter
        load_pickled(io.BytesIO(HOSTILE[name]))


def test_a_long_list_of_parts_is_refused_before_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    buffer = io.BytesIO(GOOD)
    with zipfile.ZipFile(buffer, "a") as archive:
        for k in range(100):
            archive.writestr(f"archive/{k:0100}", b"")
    monkeypatch.setattr(pretrained, "MAX_LIST_BYTES", 10_000)
    with pytest.raises(ValueError, match="its list of zip entries is too long"):
        load_pickled(buffer)
    # The control: without the limit, all are listed.
    monkeypatch.setattr(pretrained, "MAX_LIST_BYTES", 100_000)
    assert load_pickled(buffer)["n"] == 1


@pytest.mark.parametrize("zipped", [True, False])
def test_a_long_pickle_is_refused(zipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    content = saved({"a": [[] for _ in range(1000)]}, _use_new_zipfile_serialization=zipped)
    assert len(load_pickled(io.BytesIO(content))["a"]) == 1000
    monkeypatch.setattr(pretrained, "MAX_PICKLE_BYTES", 1000)
    with pytest.raises(ValueError, match=r"its data.pkl has 5,\d+ bytes|exhausted"):
        load_pickled(io.BytesIO(content))


def test_a_list_that_contains_itself_ends() -> None:
    content: list[Any] = [torch.ones(2)]
    content.append(content)
    assert torch.equal(load_pickled(io.BytesIO(saved(content)))[0], torch.ones(2))


def test_without_the_checks_torch_makes_the_byte_array(monkeypatch: pytest.MonkeyPatch) -> None:
    small = saved({"a": ByteArray(1000)})
    with pytest.raises(ValueError, match="its pickle imports '__builtin__ bytearray'"):
        load_pickled(io.BytesIO(small))
    monkeypatch.setattr(pretrained, "_check_pickle", lambda pickled: None)
    assert load_pickled(io.BytesIO(small)) == {"a": bytearray(1000)}
