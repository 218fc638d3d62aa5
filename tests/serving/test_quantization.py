"""Models in 8 bits stay accurate, or are not written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run
from made_serving import FORMATS, make_network

import useg
from useg.data.dataset import Dataset
from useg.data.splits import open_dataset
from useg.errors import ModelError, UsageError
from useg.images.image_files import read_image
from useg.inference import runtimes
from useg.inference.predictor import Predictor
from useg.inference.runtimes import make_probe
from useg.models.segmenter import describe_model
from useg.reporting.report import open_evaluation_data
from useg.serving import export, quantization


@pytest.fixture(scope="module")
def dataset(scenes: Path) -> Dataset:
    return open_dataset(scenes)


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_export_to_8_bits_keeps_its_accuracy(
    suffix: str, valid: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("nncf")
    code, out, _ = run(
        capsys,
        "export",
        valid / "run",
        tmp_path / f"small{suffix}",
        "--int8",
        scenes,
        "--json",
        tmp_path / "x.json",
        "--quiet",
    )
    assert code == 0
    assert "held-out images" in out
    assert "all 9 layers are in 8 bits" in out
    content = json.loads((tmp_path / "x.json").read_text())["int8"]
    assert content["before"] - content["after"] <= quantization.MAX_QUANTIZATION_LOSS
    assert (content["num_layers"], content["num_images"]) == (9, 3)
    runtime = runtimes.load_runtime(tmp_path / f"small{suffix}")
    assert runtime.description == replace(describe_model(make_network("valid")), precision="int8")
    assert (
        quantization.held_out_mean_iou(runtime, open_evaluation_data(Predictor(runtime), scenes))
        == content["after"]
    )
    assert (
        sum(path.stat().st_size for path in tmp_path.glob("small.*"))
        < sum(path.stat().st_size for path in valid.glob(f"model{suffix}")) + 60_000
    )


def quantize(
    name: str, suffix: str, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> quantization.QuantizationResult:
    """Quantise; in the place of the mean IoU counts how little the logits of a probe change."""
    model = make_network(name)
    with torch.no_grad():
        # Next to such weights, all others of a channel are rounded to 0.
        layer = model.get_submodule("network.merge.0.0")
        layer.weight[:, 0] *= 300  # type: ignore[index, union-attr]
        layer.weight[:, 0, 0, 0] *= -1  # type: ignore[index, union-attr]
    stored = runtimes.StoredModel(describe_model(model), Path("memory"), model)
    reference = runtimes.start_runtime(stored, "torch")
    x = make_probe(stored.description, (model.valid_size(48), model.valid_size(40)))
    expected = reference.run(x)

    def fidelity(
        runtime: runtimes.Runtime, dataset: Dataset, pairs: Iterable[Any]
    ) -> tuple[float, list[float]]:
        change = np.abs(runtime.run(x) - expected).mean() / np.abs(expected).mean()
        return 1 - float(change), [1 - float(change) for _ in pairs]

    monkeypatch.setattr(quantization, "_mean_iou", fidelity)
    convert, _ = export.EXPORT_FORMATS[suffix]
    return quantization.quantize(convert(stored), suffix, reference, dataset)[1]


@pytest.mark.parametrize("suffix", FORMATS)
def test_layers_that_cost_accuracy_stay_in_higher_precision(
    suffix: str, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nncf")
    monkeypatch.setattr(quantization, "MAX_QUANTIZATION_LOSS", 0.05)
    result = quantize("valid", suffix, dataset, monkeypatch)
    assert result.before == 1
    assert result.everything < 0.95 <= result.after
    assert 0 < len(result.kept) <= 4
    assert result.num_layers == 9
    assert result.lines()[0].endswith(
        f"100.0 % before, {100 * result.after:.1f} % after "
        f"({100 * result.everything:.1f} % with every layer in 8 bits)"
    )
    assert result.lines()[1] == (
        f"{len(result.kept)} of 9 layers stay in higher precision: {', '.join(result.kept)}"
    )


def test_a_model_that_loses_too_much_is_refused(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nncf")
    pytest.importorskip("openvino")
    monkeypatch.setattr(quantization, "MAX_QUANTIZATION_LOSS", 0.001)
    with pytest.raises(
        ModelError,
        match=r"loses .* points of mean IoU \(from 100\.0 %\), even with [1-9] of 9 .*nothing was",
    ):
        quantize("valid", ".xml", dataset, monkeypatch)


def test_calibration_uses_the_windows_of_prediction(dataset: Dataset) -> None:
    model = make_network("valid")
    runtime = runtimes.runtime_of_model(model, Path("memory"))
    seen: list[Any] = []
    windows = quantization.calibration_windows(runtime, dataset)
    spied = Predictor(replace(runtime, run=lambda x: (seen.append(x), runtime.run(x))[1]))
    spied(read_image(dataset.of("train")[0].image))
    assert len(windows) == len(dataset.of("train"))
    assert (windows[0] == seen[0]).all()


def test_other_classes_are_refused(dataset: Dataset, valid: Path) -> None:
    model = make_network("valid")
    runtime = runtimes.runtime_of_model(model, Path("memory"))
    other = replace(
        runtime, description=replace(runtime.description, classes=useg.ClassTable(("a", "b")))
    )
    with pytest.raises(UsageError, match="does not have the classes of the model"):
        quantization.quantize(None, ".xml", other, dataset)
