"""Batch statistics are adapted to pictures without masks, or stay where nothing gets better."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import useg
from useg.classes import ClassTable
from useg.cli import main
from useg.errors import DataError, ModelError, UsageError
from useg.inference import adapt
from useg.models.geometry import WorkingSize
from useg.models.segmenter import Segmenter, load_model, save_model


def made_model(*, normalize: bool = True, objects: bool = False) -> Segmenter:
    torch.manual_seed(0)
    network = {"encoder": "plain", "width": 4, "depth": 2, "padding": "same", "channels": 3}
    network |= {"classes": 3, "normalize": normalize, "objects": objects}
    classes = ClassTable(("a", "b", "c"))
    return Segmenter(network, classes, [100.0] * 3, [50.0] * 3, provenance={"step": 7}).eval()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model(made_model(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for k in range(5):
        pixels = rng.integers(0, 256, (50, 70 + k, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"p{k}.png")
    return tmp_path / "pictures"


def images(count: int = 3) -> list[torch.Tensor]:
    rng = np.random.default_rng(1)
    return [
        torch.from_numpy(rng.integers(0, 256, (1, 3, 32, 48)).astype(np.float32))
        for _ in range(count)
    ]


def test_statistics_are_those_of_all_pixels_and_weights_stay() -> None:
    source, seen = made_model(), images()
    whole = adapt.mix_statistics(source, seen, 1.0)
    first = source.network.down[0][0]
    with torch.no_grad():
        x = torch.cat([first((image - source.mean) / source.std) for image in seen])
    layer = whole.network.down[0][1]
    assert torch.allclose(layer.running_mean, x.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(layer.running_var, x.var((0, 2, 3), correction=0), rtol=1e-4)
    half = adapt.mix_statistics(source, seen, 0.5).network.down[0][1]
    assert torch.allclose(half.running_mean, layer.running_mean / 2, atol=1e-5)
    for name, tensor in whole.state_dict().items():
        if "running" not in name:
            assert torch.equal(tensor, source.state_dict()[name])
    assert torch.equal(source.network.down[0][1].running_mean, torch.zeros(4))


@pytest.mark.parametrize("objects", [False, True])
def test_agreement_counts_the_pixels_on_which_all_views_agree(objects: bool) -> None:
    source = made_model(objects=objects)
    # With objects, the last logit is that of the depth.
    bias = torch.tensor([0.0, 1.0, 0.0, 2.0])
    with torch.no_grad():
        source.network.head.weight.zero_()
        source.network.head.bias.copy_(bias[: 3 + objects])
    assert adapt.measure_agreement(source, images()) == (1.0, 0.0)
    agreement, variety = adapt.measure_agreement(made_model(), images())
    assert 0 < agreement < 1
    assert variety > 0.5


@pytest.mark.parametrize(
    ("agreements", "varieties", "share", "reason"),
    [
        (
            [0.80, 0.82, 0.85, 0.84],
            [1, 1, 1, 1],
            0.4,
            "with 40 % of the new statistics blended in, the predictions for augmented views of an "
            "image agree on 85.0 % of the pixels; without them, on 80.0 %",
        ),
        (
            [0.80, 0.82, 0.85, 0.84],
            [1, 1, 0.5, 0.5],
            0.2,
            "image agree on 82.0 % of the pixels; without them",
        ),
        ([0.80, 0.85, 0.85, 0.99], [1, 0.8, 0.5, 0.5], 0, "would make it predict fewer classes"),
        ([0.80, 0.801, 0.79, 0.7], [1, 1, 1, 1], 0, "and the new statistics do not improve this"),
    ],
)
def test_share_is_chosen_without_labels(
    agreements: list[float],
    varieties: list[float],
    share: float,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = iter(zip(agreements, varieties, strict=True))
    monkeypatch.setattr(adapt, "measure_agreement", lambda model, images: next(answers))
    source = made_model()
    chosen, adaptation = adapt.choose_share(source, images())
    assert adaptation.share == share
    assert reason in adaptation.reason
    assert (chosen is source) == (share == 0)


def test_models_with_the_same_brightness_and_contrast_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adapt, "measure_agreement", lambda model, images: (0.5, 1.0))
    source = made_model()
    source.working = WorkingSize((48, 32), standardize=True)
    chosen, adaptation = adapt.choose_share(source, images())
    assert chosen is source
    assert adaptation.as_dict()["share"] == 0
    assert "the same brightness and contrast (data.standardize)" in adaptation.reason


def test_command_writes_a_model(
    model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "adapted"
    command = ["adapt", str(model), str(pictures), "--out", str(out), "--json", str(out) + ".json"]
    for _ in range(2):  # its own file is replaced
        with pytest.raises(SystemExit) as ended:
            main([*command, "--quiet"])
        assert ended.value.code == 0
    written = json.loads((tmp_path / "adapted.json").read_text())
    assert written["num_pictures"] == 5
    assert [entry["share"] for entry in written["tried"]] == [0, *adapt.SHARES]
    assert written["reason"] in capsys.readouterr().out
    provenance = load_model(out).provenance
    assert provenance["step"] == 7
    assert provenance["adapted"] == {
        "share": written["share"],
        "num_pictures": 5,
        "pictures": "pictures",
    }


def test_what_cannot_be_adapted_is_refused(model: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapted"
    for path in sorted(pictures.iterdir())[3:]:
        path.unlink()
    with pytest.raises(DataError, match="has 3 images, but batch statistics need 4 or more"):
        useg.adapt(model, pictures, out)
    save_model(made_model(normalize=False), tmp_path / "plain.safetensors")
    with pytest.raises(ModelError, match="no batch normalisation, so there are no statistics"):
        useg.adapt(tmp_path / "plain.safetensors", pictures, out)
    with pytest.raises(ModelError, match="there is no model at"):
        useg.adapt(tmp_path / "nothing", pictures, out)
    out.mkdir()
    (out / "run.toml").touch()
    with pytest.raises(UsageError, match="contains a run; choose another folder for the output"):
        useg.adapt(model, pictures, out)
    (out / "run.toml").unlink()
    (out / "model.safetensors").write_bytes(b"somebody's")
    with pytest.raises(DataError, match="would replace a file that useg did not write"):
        useg.adapt(model, pictures, out)


def test_only_models_that_it_wrote_are_replaced(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    before = model.read_bytes()
    with pytest.raises(UsageError, match="is the model itself; choose another folder"):
        useg.adapt(model, pictures, tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="is the model itself; choose another folder"):
        useg.adapt(model, pictures, tmp_path / "link")
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_bytes(before)
    with pytest.raises(UsageError, match="is a model that useg adapt did not write"):
        useg.adapt(model, pictures, out)
    assert model.read_bytes() == (out / "model.safetensors").read_bytes() == before
    (out / "model.safetensors").unlink()
    for _ in range(2):
        useg.adapt(model, pictures, out)
