"""The model file: the same model comes back, and a damaged one is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from useg.classes import CAMVID
from useg.errors import ModelError, SettingsError
from useg.models.description import description_to_json
from useg.models.geometry import WorkingSize
from useg.models.segmenter import (
    Segmenter,
    describe_model,
    load_model,
    read_safetensors_header,
    save_model,
)

pytestmark = pytest.mark.wheel


@pytest.fixture
def model() -> Segmenter:
    torch.manual_seed(0)
    settings = {
        "encoder": "plain",
        "channels": 3,
        "classes": 11,
        "width": 2,
        "depth": 1,
        "padding": "same",
        "normalize": True,
    }
    return Segmenter(
        settings,
        CAMVID,
        [10.0, 20.0, 30.0],
        [1.0, 2.0, 3.0],
        WorkingSize((48, 32)),
        "uint8",
        {"seed": 7},
    ).eval()


def test_raw_pixels_are_normalised_inside_the_model(model: Segmenter) -> None:
    x = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    by_hand = (x.float() - torch.tensor([10.0, 20, 30]).view(3, 1, 1)) / torch.tensor(
        [1.0, 2, 3]
    ).view(3, 1, 1)
    torch.testing.assert_close(model(x), model.network(by_hand), rtol=1e-4, atol=1e-4)


def test_saved_model_loads_with_the_same_description_and_logits(
    model: Segmenter, tmp_path: Path
) -> None:
    save_model(model, tmp_path / "model.safetensors")
    again = load_model(tmp_path)
    assert describe_model(again) == describe_model(model)
    x = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(again(x), model(x))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_one_flipped_bit_is_refused_wherever_it_is(model: Segmenter, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(model, path)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    places = {*range(0, 64), *rng.integers(0, 8 * len(content), 300).tolist()}
    accepted = []
    for bit in places:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            load_model(path)
        except ModelError:
            continue
        accepted.append(bit)
    assert accepted == []


def test_a_model_is_always_saved_as_the_same_bytes(model: Segmenter, tmp_path: Path) -> None:
    contents = set()
    for _ in range(8):
        save_model(model, tmp_path / "model.safetensors")
        contents.add((tmp_path / "model.safetensors").read_bytes())
    assert len(contents) == 1


def test_a_file_cut_short_is_refused_wherever_it_is_cut(model: Segmenter, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(model, path)
    content = path.read_bytes()
    for length in [0, 1, 7, 8, 100, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(ModelError, match="not a readable model file"):
            load_model(path)


def test_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(ModelError, match="there is no model at"):
        load_model(path)
    path.write_bytes(pickle.dumps({"weight": 1}))
    with pytest.raises(ModelError, match="not a readable model file"):
        load_model(path)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match="not a useg model"):
        load_model(path)


def test_a_file_of_a_newer_format_is_refused(
    model: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from useg.models import description

    save_model(model, tmp_path / "model.safetensors")
    monkeypatch.setattr(description, "MODEL_FORMAT", 0)
    with pytest.raises(
        ModelError, match="format 1, but this useg reads formats up to 0; update useg"
    ):
        load_model(tmp_path)


def test_an_unknown_encoder_is_refused() -> None:
    with pytest.raises(
        SettingsError, match=r"model.encoder 'plian' is not known.*did you mean 'plain'"
    ):
        Segmenter({"encoder": "plian", "channels": 1, "classes": 2}, CAMVID, [0.0], [1.0])


def test_a_model_file_stores_these_fields_of_the_description(
    model: Segmenter, tmp_path: Path
) -> None:
    save_model(model, tmp_path / "model.safetensors")
    with safe_open(str(tmp_path / "model.safetensors"), framework="pt") as file:
        header = json.loads(file.metadata()["useg"].partition(" ")[2])
    exported = json.loads(description_to_json(describe_model(model)))
    assert list(header) == [
        "classes",
        "format",
        "network",
        "pixels",
        "provenance",
        "temperature",
        "working",
    ]
    assert header == {key: exported[key] for key in header}


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
