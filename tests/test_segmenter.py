"""The model file: the same model comes back, and a damaged one is refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from useg.classes import CAMVID
from useg.errors import UsageError
from useg.models.geometry import WorkingSize
from useg.models.segmenter import Segmenter, load_model, save_model

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


def test_raw_pixels_in(model: Segmenter) -> None:
    x = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    by_hand = (x.float() - torch.tensor([10.0, 20, 30]).view(3, 1, 1)) / torch.tensor(
        [1.0, 2, 3]
    ).view(3, 1, 1)
    torch.testing.assert_close(model(x), model.network(by_hand), rtol=1e-4, atol=1e-4)


def test_everything_comes_back(model: Segmenter, tmp_path: Path) -> None:
    save_model(model, tmp_path / "model.safetensors")
    again = load_model(tmp_path)
    assert (again.settings, again.classes, again.working, again.pixels, again.provenance) == (
        model.settings, model.classes, model.working, model.pixels, model.provenance,
    )  # fmt: skip
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
        except UsageError:
            continue
        accepted.append(bit)
    assert accepted == []


def test_one_model_is_one_file_to_the_bit(model: Segmenter, tmp_path: Path) -> None:
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
        with pytest.raises(UsageError, match="not a readable model file"):
            load_model(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(UsageError, match="there is no model at"):
        load_model(path)
    path.write_bytes(pickle.dumps({"weight": 1}))
    with pytest.raises(UsageError, match="not a readable model file"):
        load_model(path)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(UsageError, match="not a useg model"):
        load_model(path)


def test_a_file_of_a_newer_format_is_refused(
    model: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from useg.models import segmenter

    monkeypatch.setattr(segmenter, "MODEL_FORMAT", 2)
    save_model(model, tmp_path / "model.safetensors")
    monkeypatch.setattr(segmenter, "MODEL_FORMAT", 1)
    with pytest.raises(UsageError, match="format 2, this useg reads up to 1; update useg"):
        load_model(tmp_path)


def test_an_unknown_encoder_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"model.encoder 'plian' is not known.*did you mean 'plain'"
    ):
        Segmenter({"encoder": "plian", "channels": 1, "classes": 2}, CAMVID, [0.0], [1.0])


@pytest.mark.parametrize(
    ("working", "picture", "expected"),
    [
        (WorkingSize((256, 192)), (800, 600), (256, 192)),
        (WorkingSize((256, 192)), (600, 800), (192, 256)),
        (WorkingSize((100, 100)), (1, 10_000), (1, 10_000)),
        (WorkingSize(scale=0.5), (512, 301), (256, 150)),
        (WorkingSize(), (1, 1), (1, 1)),
    ],
)
def test_working_size(
    working: WorkingSize, picture: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert working.of(*picture) == expected
