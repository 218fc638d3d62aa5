"""Files of tensors: what torch.save and safetensors write is read, anything more is refused."""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from useg.errors import ModelError
from useg.models import tensor_files
from useg.models.tensor_files import load_pickled, read_safetensors_header

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


def test_a_list_that_contains_itself_ends() -> None:
    content: list[Any] = [torch.ones(2)]
    content.append(content)
    assert torch.equal(load_pickled(io.BytesIO(saved(content)))[0], torch.ones(2))


def test_without_the_checks_torch_makes_the_byte_array(monkeypatch: pytest.MonkeyPatch) -> None:
    small = saved({"a": ByteArray(1000)})
    with pytest.raises(ValueError, match="it names '__builtin__ bytearray'"):
        load_pickled(io.BytesIO(small))
    monkeypatch.setattr(tensor_files, "_check_pickle", lambda pickled: None)
    assert load_pickled(io.BytesIO(small)) == {"a": bytearray(1000)}


def test_a_header_longer_than_any_network_needs_is_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2)}, path, {"x": "y" * (9 << 20)})
    with pytest.raises(ModelError, match=r"its header has 9,\d+,\d+ bytes"):
        read_safetensors_header(path)
    path.write_bytes((1 << 62).to_bytes(8, "little"))
    with pytest.raises(ModelError, match="its header has 4,611,686,018,427,387,904 bytes"):
        read_safetensors_header(path)


def test_unusual_numbers_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match="its tensor 'a' has numbers of type F8_E4M3"):
        read_safetensors_header(tmp_path / "a.safetensors")
