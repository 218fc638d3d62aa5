"""One model in every runtime: the same numbers, the same refusals, and how ``auto`` chooses."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_inference import NETWORKS, make_model_of, skip_if_missing, store

from useg.classes import ClassTable
from useg.errors import UsageError
from useg.inference import bench, runtimes
from useg.inference.bench import fastest_runtime
from useg.inference.predictor import Predictor
from useg.inference.runtimes import (
    RUNTIMES,
    StoredModel,
    bytes_per_pixel,
    label_agreement,
    load_runtime,
    make_probe,
    probe_size,
    read_model,
    start_runtime,
    window_pixels,
)
from useg.models.description import description_from_json, description_to_json
from useg.models.segmenter import Segmenter, describe_model, save_model

ALL = ["torch", "torch-bf16", "onnx", "openvino", "openvino-bf16"]


@pytest.fixture(scope="module")
def model() -> Segmenter:
    return make_model_of()


@pytest.fixture(scope="module")
def forms(model: Segmenter) -> StoredModel:
    """The model, and its other forms once they are made."""
    return store(model)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_description_comes_back_and_knows_the_sizes(network: str) -> None:
    model = make_model_of(network)
    found = describe_model(model)
    assert description_from_json(description_to_json(found), "here") == found
    sizes = range(300)
    assert [found.valid_size(size) for size in sizes] == [model.valid_size(size) for size in sizes]
    geometry = found.geometry
    assert (geometry.margin, geometry.stride) == (model.margin, model.stride)
    assert geometry.context == model.context
    assert (found.temperature, found.provenance) == (1.5, {"seed": 7})
    assert found.mean == (110, 110, 110)


def test_a_description_of_a_newer_useg_is_refused(model: Segmenter) -> None:
    text = description_to_json(describe_model(model)).replace('"format": 1', '"format": 4')
    with pytest.raises(
        UsageError, match=r"here has format 4, but this useg reads formats up to 3; update useg"
    ):
        description_from_json(text, "here")


@pytest.mark.parametrize(("pixels", "channels"), [("uint8", 3), ("uint16", 1), ("float32", 7)])
def test_a_probe_looks_like_the_training_pictures(pixels: str, channels: int) -> None:
    description = replace(
        describe_model(make_model_of(channels=channels, pixels=pixels)),
        mean=(100.0,) * channels,
        std=(20.0,) * channels,
    )
    x = make_probe(description, (64, 48), 2)
    assert (x.shape, x.dtype) == ((2, channels, 48, 64), np.dtype(pixels))
    assert (x == make_probe(description, (64, 48), 2)).all()
    np.testing.assert_allclose(x.astype(float).mean((0, 2, 3)), 100, atol=1)
    np.testing.assert_allclose(x.astype(float).std((0, 2, 3)), 20, atol=1)


def test_agreement_counts_labels() -> None:
    logits = np.zeros((1, 2, 4, 5), np.float32)
    others = logits.copy()
    others[0, 1, 0, :2] = 1
    assert label_agreement(logits, others) == 0.9


@pytest.mark.parametrize("name", ALL)
def test_every_runtime_computes_what_torch_computes(name: str, forms: StoredModel) -> None:
    skip_if_missing(name)
    runtime = start_runtime(forms, name)
    assert (runtime.name, runtime.description) == (name, forms.description)
    for size, count in (((48, 40), 1), ((16, 36), 3)):
        x = make_probe(forms.description, size, count)
        with torch.inference_mode():
            expected = forms.as_torch(torch.from_numpy(x)).numpy()
        logits = runtime.run(x)
        assert (logits.shape, logits.dtype) == (expected.shape, np.float32)
        if name.endswith("bf16"):
            assert 1e-4 < np.abs(logits - expected).max() < 0.1, (
                "bf16 was asked for, and nothing less exact"
            )
            assert label_agreement(logits, expected) > 0.9
        else:
            np.testing.assert_allclose(logits, expected, atol=0 if name == "torch" else 2e-5)


@pytest.mark.parametrize(
    ("name", "pixels"), [("onnx", "uint16"), ("openvino", "uint16"), ("openvino", "float32")]
)
def test_exported_models_take_other_number_types(name: str, pixels: str) -> None:
    skip_if_missing(name)
    model = store(make_model_of(channels=2, pixels=pixels))
    x = make_probe(model.description, (24, 16), 2)
    np.testing.assert_allclose(
        start_runtime(model, name).run(x), start_runtime(model, "torch").run(x), atol=2e-5
    )


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_any_picture_size_through_the_predictor(name: str, forms: StoredModel) -> None:
    skip_if_missing(name)
    exact, other = Predictor(start_runtime(forms, "torch")), Predictor(start_runtime(forms, name))
    image = np.random.default_rng(0).integers(0, 256, (61, 33, 3), np.uint8)
    for tile in (0, 24):
        np.testing.assert_allclose(
            other.probabilities(image, tile), exact.probabilities(image, tile), atol=1e-5
        )


def test_bf16_leaves_the_model_as_it_is(model: Segmenter) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    runtimes.torch_bf16_function(model)
    assert all(
        tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
        for name, tensor in model.state_dict().items()
    )


def test_grouped_layers_stay_exact_in_bf16() -> None:
    run = runtimes.torch_bf16_function(make_model_of("fcn8s"))  # its enlargement computes in fp32
    assert np.isfinite(run(make_probe(describe_model(make_model_of("fcn8s")), (64, 32)))).all()


def test_an_unknown_runtime_suggests_the_nearest(forms: StoredModel) -> None:
    with pytest.raises(
        UsageError, match=r"runtime 'opnvino' is not known.*did you mean 'openvino'"
    ):
        start_runtime(forms, "opnvino")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_reported(forms: StoredModel) -> None:
    with pytest.raises(UsageError, match="PyTorch finds no GPU here; choose the runtime auto"):
        start_runtime(forms, "gpu")


@pytest.mark.parametrize(
    ("name", "package"), [("onnx", "onnxruntime"), ("onnx", "onnxscript"), ("openvino", "openvino")]
)
def test_a_missing_package_is_its_install_line(
    name: str, package: str, model: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_if_missing(name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        UsageError, match=rf"needs the package '{package}'.*pip install 'useg\[{name}\]'"
    ):
        start_runtime(store(model), name)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Runtimes that take as long as the dictionary says; the slowest number of all is wrong."""
    seconds = {"torch": 3.0, "gpu": 9.0, "torch-bf16": 2.0, "openvino-bf16": 1.0, "openvino": 1.5}

    def fake(name: str) -> Any:
        def network(stored: StoredModel) -> Any:
            run = runtimes.torch_function(stored.as_torch)

            def wrapped(x: Any) -> Any:
                return run(x)

            wrapped.__name__ = name
            return wrapped

        return network

    for name in seconds:
        monkeypatch.setitem(RUNTIMES, name, fake(name))
    monkeypatch.setattr(bench, "measure_seconds", lambda network, x: seconds[network.__name__])
    return seconds


def test_auto_takes_the_fastest(timed: dict[str, float], forms: StoredModel) -> None:
    assert bench.find_fastest(forms) == "openvino-bf16"
    timed["torch-bf16"] = 0.5
    assert bench.find_fastest(forms) == "torch-bf16"
    timed |= dict.fromkeys(timed, 4.0)
    assert bench.find_fastest(forms) == "torch"


def test_auto_rejects_runtimes_with_other_labels(
    timed: dict[str, float], forms: StoredModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def turned(x: Any) -> Any:
        return -runtimes.torch_function(forms.as_torch)(x)

    monkeypatch.setitem(RUNTIMES, "openvino-bf16", lambda stored: turned)
    timed["turned"] = 0.1
    assert bench.find_fastest(forms) == "openvino"


def test_auto_takes_what_is_installed(
    timed: dict[str, float], forms: StoredModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(stored: StoredModel) -> Any:
        raise UsageError("not installed")

    for name in ("openvino", "openvino-bf16", "gpu"):
        monkeypatch.setitem(RUNTIMES, name, missing)
    assert bench.find_fastest(forms) == "torch-bf16"


def test_auto_remembers_its_choice_for_a_model_and_this_machine(
    timed: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bench, "_measure_apart", lambda path: bench.find_fastest(read_model(path)))
    for seed in (1, 2):
        model = make_model_of()
        torch.nn.init.normal_(next(model.parameters()), generator=torch.manual_seed(seed))
        save_model(model, tmp_path / f"{seed}.safetensors")
    first, other = (read_model(tmp_path / f"{seed}.safetensors") for seed in (1, 2))
    # A choice takes longer than labelling a few images.
    assert fastest_runtime(first, 1).name == "torch"
    assert fastest_runtime(first).name == "openvino-bf16"
    timed["torch-bf16"] = 0.1
    assert fastest_runtime(first).name == fastest_runtime(first, 4).name == "openvino-bf16"
    # So does starting what was chosen.
    assert fastest_runtime(first, 3).name == "torch"
    assert fastest_runtime(other).name == "torch-bf16"
    monkeypatch.setattr(bench, "describe_machine", lambda: {"processor": "another"})
    assert fastest_runtime(first).name == "torch-bf16"


@pytest.mark.parametrize("content", ["", "[]", '{"choices": 3}', "[" * 100_000])
def test_auto_measures_where_choices_cannot_be_read(
    content: str, timed: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it leaves the file alone, which may be somebody else's."""
    monkeypatch.setenv("USEG_CACHE", str(tmp_path))
    monkeypatch.setattr(bench, "_measure_apart", lambda path: bench.find_fastest(read_model(path)))
    (tmp_path / bench.CHOICES_NAME).write_text(content)
    save_model(make_model_of(), tmp_path / "model.safetensors")
    assert fastest_runtime(read_model(tmp_path / "model.safetensors")).name == "openvino-bf16"
    assert (tmp_path / bench.CHOICES_NAME).read_text() == content


def test_the_default_is_exact_and_the_same_everywhere(model: Segmenter, tmp_path: Path) -> None:
    save_model(model, tmp_path / "model.safetensors")
    assert (load_runtime(tmp_path).name, load_runtime(tmp_path / "model.safetensors").name) == (
        "torch",
        "torch",
    )
    x = make_probe(describe_model(model), probe_size(describe_model(model)))
    assert (load_runtime(tmp_path).run(x) == runtimes.torch_function(model)(x)).all()


def test_auto_really_runs(model: Segmenter, tmp_path: Path) -> None:
    save_model(model, tmp_path / "model.safetensors")
    runtime = fastest_runtime(read_model(tmp_path))
    x = make_probe(runtime.description, probe_size(runtime.description))
    assert label_agreement(runtime.run(x), load_runtime(tmp_path).run(x)) >= 0.999


@pytest.mark.parametrize("name", ["model.onnx", "model.xml"])
def test_a_missing_exported_model_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no model at"):
        load_runtime(tmp_path / name)


# Growth of a process's peak memory for each pixel of a window, in bytes (benchmarks/tiles.py).
MEASURED_BYTES = [
    ({"encoder": "plain", "width": 32, "depth": 4, "padding": "same"}, 784),
    ({"encoder": "lite0"}, 494),
    ({"encoder": "resnet18"}, 518),
]


@pytest.mark.parametrize(("settings", "measured"), MEASURED_BYTES)
def test_the_estimated_memory_is_about_what_was_measured(
    settings: dict[str, object], measured: int
) -> None:
    classes = ClassTable(tuple(f"class {k}" for k in range(13)))
    network = {"channels": 3, "classes": 13, **settings}
    description = describe_model(Segmenter(network, classes, [0.0] * 3, [1.0] * 3))
    estimated = bytes_per_pixel(description)
    assert measured < estimated < 2 * measured
    assert window_pixels(description, 1 << 30) == (1 << 30) // estimated
