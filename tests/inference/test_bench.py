"""``useg bench``: every runtime that computes a model is measured, the others are explained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_inference import make_model_of, skip_if_missing

import useg
from useg.cli import main
from useg.inference import bench, exported, runtimes
from useg.models.description import description_to_json
from useg.models.segmenter import describe_model, save_model

PEAKS = {"fp32": 1e11, "bf16": 2e11, "int8": 4e11}


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "MEASURE_SECONDS", 0.0)
    monkeypatch.setattr(bench, "measure_peaks", lambda: PEAKS)


def test_every_runtime_is_measured_and_the_shares_of_the_peak_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The conversion to ONNX takes seconds.
    monkeypatch.delitem(runtimes.RUNTIMES, "onnx")
    model = make_model_of("valid")
    save_model(model, tmp_path / "model.safetensors")
    target = tmp_path / "bench.json"
    command = ["bench", str(tmp_path), "--size", "40x40", "--json", str(target), "--quiet"]
    with pytest.raises(SystemExit, match="0"):
        main(command)
    out = capsys.readouterr().out
    content = json.loads(target.read_text())
    measured = {entry["name"]: entry for entry in content["runtimes"]}
    assert {"torch", "torch-bf16"} <= set(measured) <= set(runtimes.RUNTIMES)
    size = model.valid_size(40 + 2 * model.margin)
    assert content["size"] == [size, size]
    assert content["macs"] == useg.describe(model, (size, size)).macs
    for entry in measured.values():
        assert entry["name"] in out
        assert entry["precision"] == ("bf16" if "bf16" in entry["name"] else "fp32")
        assert 0 < entry["share_of_peak"] < 1
        operations = entry["share_of_peak"] * PEAKS[entry["precision"]]
        assert operations / entry["images_per_second"] == pytest.approx(2 * content["macs"])


def test_an_exported_model_runs_only_in_its_own_runtime(tmp_path: Path) -> None:
    skip_if_missing("openvino")
    model = make_model_of("valid")
    text = description_to_json(describe_model(model))
    exported.write_openvino(tmp_path / "model.xml", exported.to_openvino(model), text)
    measured = useg.bench(tmp_path / "model.xml")
    names = {speed.name for speed in measured.speeds}
    assert {"openvino"} <= names <= {"openvino", "openvino-bf16"}
    assert {"torch", "torch-bf16", "gpu", "onnx"} <= set(measured.missing)
    assert "is an exported model, which PyTorch does not run" in measured.missing["torch"]


def test_the_peak_is_one_that_a_convolution_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    peaks = bench.measure_peaks()
    assert peaks["int8"] >= 4 * peaks["fp32"] > 1e9
