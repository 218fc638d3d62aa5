"""Exported models predict as PyTorch does and carry their description."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run
from made_serving import FORMATS, NETWORKS, make_network, save_run
from PIL import Image

import useg
from useg.errors import ModelError, UsageError
from useg.images.image_files import read_image
from useg.inference import bench, exported, runtimes
from useg.inference.runtimes import make_probe
from useg.models.segmenter import describe_model
from useg.serving import export


@pytest.mark.parametrize(
    ("name", "suffix"), [*((name, ".xml") for name in NETWORKS), ("cnn", ".onnx")]
)
def test_every_network_is_exported_for_every_size(name: str, suffix: str, tmp_path: Path) -> None:
    for package in ("onnxruntime", "openvino"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    exported = export.export_model(save_run(name, tmp_path / "run"), tmp_path / f"model{suffix}")
    assert exported.difference < export.EXPORT_LOGIT_TOLERANCE
    assert exported.agreement >= export.EXPORT_LABEL_AGREEMENT
    model, runtime = make_network(name), runtimes.load_runtime(exported.files[0])
    for height, width, count in ((1, 50, 1), (70, 33, 2)):
        x = make_probe(
            runtime.description, (model.valid_size(width), model.valid_size(height)), count
        )
        with torch.inference_mode():
            np.testing.assert_allclose(
                runtime.run(x), model(torch.from_numpy(x)).numpy(), atol=1e-4
            )


@pytest.mark.parametrize("name", [*NETWORKS, "resnet50"])
def test_batch_normalisation_is_part_of_the_convolutions_that_are_exported(name: str) -> None:
    model = make_network(name)
    norms = [layer for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            for numbers in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
                assert numbers is not None
                numbers.uniform_(0.5, 1.5)
    folded = exported._fold_normalization(model)
    side = model.valid_size(64)
    x = torch.randint(256, (2, 3, side, side + model.stride))
    with torch.inference_mode():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in folded.modules())
    assert all(norm in [*model.modules()] for norm in norms), "the model itself stays as it is"


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_exported_model_carries_its_description(suffix: str, valid: Path) -> None:
    predictor = useg.load(valid / f"model{suffix}")
    assert predictor.runtime.description == describe_model(make_network("valid"))
    image = np.random.default_rng(0).integers(0, 256, (61, 75, 3), np.uint8)
    for tile in (0, 40):
        np.testing.assert_allclose(
            predictor.probabilities(image, tile),
            useg.load(valid / "run").probabilities(image, tile),
            atol=1e-5,
        )
    with pytest.raises(UsageError, match="is an exported model, which PyTorch does not run"):
        useg.load(valid / f"model{suffix}", "torch")


def test_an_onnx_export_prints_nothing_but_its_result(valid: Path) -> None:
    pytest.importorskip("onnxruntime")
    printed, errors = json.loads((valid / "printed.json").read_text())
    assert errors == ""
    assert printed.splitlines()[-1] == str(valid / "model.onnx")


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_file_contains_no_paths_of_the_machine(suffix: str, valid: Path) -> None:
    content = (valid / f"model{suffix}").read_bytes()
    assert b"/useg/" not in content
    assert b".py" not in content


@pytest.mark.parametrize(
    ("name", "refused"),
    [("model.onnx", "damaged"), ("model.xml", "damaged"), ("model.bin", "damaged")],
)
def test_any_flipped_bit_is_refused(name: str, refused: str, valid: Path, tmp_path: Path) -> None:
    originals = [
        path
        for path in valid.glob("model.*")
        if path.suffix in ((".onnx",) if name.endswith("onnx") else (".xml", ".bin"))
    ]
    if not originals:
        pytest.skip("not installed")
    for path in originals:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = (tmp_path / name).read_bytes()
    places = np.random.default_rng(0).integers(0, 8 * len(content), 60).tolist()
    for bit in [0, 8 * len(content) - 1, 8 * len(content) - 600, *places]:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(UsageError, match=refused):
            runtimes.load_runtime(
                tmp_path / ("model.onnx" if name.endswith("onnx") else "model.xml")
            )
    for shorter in (content[:-1], content[: len(content) // 2], b""):
        (tmp_path / name).write_bytes(shorter)
        with pytest.raises(UsageError, match=refused):
            runtimes.load_runtime(
                tmp_path / ("model.onnx" if name.endswith("onnx") else "model.xml")
            )


def test_an_xml_without_its_bin_is_refused(valid: Path, tmp_path: Path) -> None:
    if not (valid / "model.xml").exists():
        pytest.skip("not installed")
    (tmp_path / "model.xml").write_bytes((valid / "model.xml").read_bytes())
    with pytest.raises(UsageError, match=r"model.bin, which are missing; copy both files"):
        runtimes.load_runtime(tmp_path / "model.xml")


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_wrong_conversion_is_not_written(
    suffix: str, valid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if the conversion had lost a bias: another model's graph in the place of its own.
    other = make_network("valid")
    with torch.no_grad():
        other.network.head.bias[3] += 3e-3  # type: ignore[union-attr]
    if suffix == ".xml":
        spoiled = exported.to_openvino(other)
    else:
        mean = make_network("valid").mean.numpy()
        content = runtimes.read_model(valid / "model.onnx").as_onnx
        spoiled = content.replace(mean.tobytes(), (mean + np.float32(0.01)).tobytes())
    monkeypatch.setitem(
        export.EXPORT_FORMATS, suffix, (lambda stored: spoiled, export.EXPORT_FORMATS[suffix][1])
    )
    with pytest.raises(
        UsageError, match=r"differs from PyTorch by .* in a logit .* nothing was written"
    ):
        export.export_model(valid / "run", tmp_path / f"model{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_unusable_sources_and_targets_are_refused(
    valid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model, out, expected in (
        (
            valid / "run",
            tmp_path / "model.pt",
            "useg export does not write .pt files",
        ),
        (valid / "run", tmp_path / "nowhere/model.onnx", "does not exist; make it first"),
        (valid / "model.xml", tmp_path / "again.xml", "is already an exported model"),
        (tmp_path / "none", tmp_path / "model.xml", "there is no model at"),
    ):
        code, out_text, err = run(capsys, "export", model, out)
        assert (code, out_text) == (2, "")
        assert expected in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_command_takes_an_exported_model(
    suffix: str, valid: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = []
    for model in (valid / "run", valid / f"model{suffix}"):
        code, _, _ = run(
            capsys, "evaluate", model, scenes, "--json", tmp_path / "scores.json", "--quiet"
        )
        assert code == 0
        scores.append(json.loads((tmp_path / "scores.json").read_text()))
        assert (
            run(
                capsys,
                "predict",
                model,
                scenes / "CameraRGB",
                "--out",
                tmp_path / model.name,
                "--quiet",
            )[0]
            == 0
        )
    assert scores[0]["num_images"] == scores[1]["num_images"] == 3, (
        "the split of the training travels"
    )
    assert scores[0]["mean_iou"] == pytest.approx(scores[1]["mean_iou"], abs=1e-4)
    first = sorted((tmp_path / "run").glob("*.png"))
    assert len(first) == 10
    for path in first:
        assert (
            np.asarray(Image.open(path))
            == np.asarray(Image.open(tmp_path / f"model{suffix}" / path.name))
        ).all()


def test_predict_and_the_library_make_the_same_choice(
    valid: Path,
    scenes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    picture = scenes / "CameraRGB" / "scene_00000.png"
    for name in (None, "torch-bf16"):
        code, _, _ = run(
            capsys,
            "predict",
            valid / "run",
            picture,
            "--out",
            tmp_path,
            "--quiet",
            *(["--runtime", name] if name else []),
        )
        assert code == 0
        assert (
            np.asarray(Image.open(tmp_path / picture.name))
            == useg.load(valid / "run", name)(read_image(picture))
        ).all()
    asked: list[float] = []
    monkeypatch.setattr(
        bench,
        "fastest_runtime",
        lambda stored, pictures: asked.append(pictures) or runtimes.start_runtime(stored, "torch"),
    )
    assert (
        run(
            capsys,
            "predict",
            valid / "run",
            scenes / "CameraRGB",
            "--out",
            tmp_path,
            "--quiet",
            "--runtime",
            "auto",
        )[0]
        == 0
    )
    assert asked == [10]


def test_sources_that_cannot_be_converted_are_refused(valid: Path, tmp_path: Path) -> None:
    for source, expected in (
        ("street.onnx", "street.onnx is already an exported model, and useg export needs the mode"),
        ("street.xml", "street.xml is already an exported model"),
        ("run_1,run_2", "run_1,run_2 names an ensemble, and useg export writes one model to one"),
    ):
        with pytest.raises(ModelError, match=expected):
            export.export(source, tmp_path / "model.onnx")
        with pytest.raises(ModelError, match=expected):
            export.export_model(Path(source), tmp_path / "model.onnx")
