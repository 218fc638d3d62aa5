"""One model through every runtime: the same numbers, the same refusals, and how ``auto`` chooses."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from useg.classes import ClassTable
from useg.errors import UsageError
from useg.inference import exported, runtimes
from useg.inference.predictor import Predictor
from useg.inference.runtimes import (
    RUNTIMES,
    StoredModel,
    fastest_runtime,
    label_agreement,
    load_runtime,
    make_probe,
    probe_size,
    start_runtime,
)
from useg.models.geometry import WorkingSize
from useg.models.segmenter import (
    Segmenter,
    describe_model,
    description_from_json,
    description_to_json,
    save_model,
)

NETWORKS: dict[str, dict[str, Any]] = {
    "same": {"encoder": "plain", "depth": 1, "padding": "same"},
    "valid": {"encoder": "plain", "depth": 2, "padding": "valid", "extra_conv": True},
    "fcn8s": {"encoder": "fcn8s"},
    "cnn": {"encoder": "cnn", "depth": 3},
}
ALL = ["torch", "torch-bf16", "onnx", "openvino", "openvino-bf16"]


def make_model(name: str = "same", channels: int = 3, pixels: str = "uint8") -> Segmenter:
    torch.manual_seed(0)
    settings = {"width": 4, "normalize": True, **NETWORKS[name], "channels": channels, "classes": 5}
    model = Segmenter(
        settings,
        ClassTable(tuple("abcde")),
        [110.0] * channels,
        [60.0] * channels,
        WorkingSize((48, 40)),
        pixels,
        {"seed": 7},
    )
    model.temperature = 1.5
    return model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def stored(model: Segmenter) -> StoredModel:
    return StoredModel(describe_model(model), Path("memory"), model)


def installed(name: str) -> None:
    for package in {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}.get(
        name.removesuffix("-bf16"), ()
    ):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    if name == "openvino-bf16" and not exported.has_bf16():
        pytest.skip("this processor has no bf16")


@pytest.fixture(scope="module")
def model() -> Segmenter:
    return make_model()


@pytest.fixture(scope="module")
def forms(model: Segmenter) -> StoredModel:
    """The model, and its other forms once they are made."""
    return stored(model)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_card_comes_back_and_knows_the_sizes(name: str) -> None:
    model = make_model(name)
    card = describe_model(model)
    assert description_from_json(description_to_json(card), "here") == card
    assert [card.valid_size(size) for size in range(300)] == [
        model.valid_size(size) for size in range(300)
    ]
    assert (card.geometry.margin, card.geometry.stride, card.geometry.context) == (
        model.margin,
        model.stride,
        model.context,
    )
    assert (card.temperature, card.provenance, card.mean) == (1.5, {"seed": 7}, (110, 110, 110))


def test_a_card_of_a_newer_useg_is_refused(model: Segmenter) -> None:
    with pytest.raises(
        UsageError, match=r"here was exported by a newer useg than this; update useg"
    ):
        description_from_json(
            description_to_json(describe_model(model)).replace('"format": 1', '"format": 2'), "here"
        )


@pytest.mark.parametrize(("pixels", "channels"), [("uint8", 3), ("uint16", 1), ("float32", 7)])
def test_a_probe_looks_like_the_training_pictures(pixels: str, channels: int) -> None:
    card = replace(
        describe_model(make_model(channels=channels, pixels=pixels)),
        mean=(100.0,) * channels,
        std=(20.0,) * channels,
    )
    x = make_probe(card, (64, 48), 2)
    assert (x.shape, x.dtype) == ((2, channels, 48, 64), np.dtype(pixels))
    assert (x == make_probe(card, (64, 48), 2)).all()
    np.testing.assert_allclose(x.astype(float).mean((0, 2, 3)), 100, atol=1)
    np.testing.assert_allclose(x.astype(float).std((0, 2, 3)), 20, atol=1)


def test_agreement_counts_labels() -> None:
    logits = np.zeros((1, 2, 4, 5), np.float32)
    others = logits.copy()
    others[0, 1, 0, :2] = 1
    assert label_agreement(logits, others) == 0.9


@pytest.mark.parametrize("name", ALL)
def test_every_runtime_answers_as_torch_does(name: str, forms: StoredModel) -> None:
    installed(name)
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
def test_other_number_types(name: str, pixels: str) -> None:
    installed(name)
    model = stored(make_model(channels=2, pixels=pixels))
    x = make_probe(model.description, (24, 16), 2)
    np.testing.assert_allclose(
        start_runtime(model, name).run(x), start_runtime(model, "torch").run(x), atol=2e-5
    )


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_any_picture_size_through_the_predictor(name: str, forms: StoredModel) -> None:
    installed(name)
    exact, other = Predictor(start_runtime(forms, "torch")), Predictor(start_runtime(forms, name))
    image = np.random.default_rng(0).integers(0, 256, (61, 33, 3), np.uint8)
    for tile in (0, 24):
        np.testing.assert_allclose(
            other.probabilities(image, tile), exact.probabilities(image, tile), atol=1e-5
        )


def test_a_batch_spread_over_threads_is_the_same(
    forms: StoredModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed("openvino")
    x = make_probe(forms.description, (48, 40), 5)
    expected = start_runtime(forms, "openvino").run(x)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for fewest in (0, 1):  # the trial prefers either way
        tried: list[Any] = []
        monkeypatch.setattr(
            exported,
            "measure_seconds",
            lambda network, x, tried=tried, fewest=fewest: (
                tried.append(network),
                abs(fewest - len(tried)),
            )[1],
        )
        run = start_runtime(forms, "openvino").run
        np.testing.assert_allclose(run(x), expected, atol=1e-5)
        np.testing.assert_allclose(run(x[:1]), expected[:1], atol=1e-5)
        assert len(tried) == 2, "one trial, on the first batch"


def test_bf16_leaves_the_model_as_it_is(model: Segmenter) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    runtimes.torch_bf16_function(model)
    assert all(
        tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
        for name, tensor in model.state_dict().items()
    )


def test_grouped_layers_stay_exact_in_bf16() -> None:
    run = runtimes.torch_bf16_function(make_model("fcn8s"))  # its enlargement computes in fp32
    assert np.isfinite(run(make_probe(describe_model(make_model("fcn8s")), (64, 32)))).all()


def test_an_unknown_runtime_suggests_the_nearest(forms: StoredModel) -> None:
    with pytest.raises(
        UsageError, match=r"runtime 'opnvino' is not known.*did you mean 'openvino'"
    ):
        start_runtime(forms, "opnvino")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_sentence(forms: StoredModel) -> None:
    with pytest.raises(UsageError, match="PyTorch sees no GPU here; choose --runtime auto"):
        start_runtime(forms, "gpu")


@pytest.mark.parametrize(
    ("name", "package"), [("onnx", "onnxruntime"), ("onnx", "onnxscript"), ("openvino", "openvino")]
)
def test_a_missing_package_is_its_install_line(
    name: str, package: str, model: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        UsageError, match=rf"needs the package '{package}'.*pip install 'useg\[{name}\]'"
    ):
        start_runtime(stored(model), name)


def test_what_onnx_runtime_raises_is_one_sentence(forms: StoredModel) -> None:
    installed("onnx")
    with pytest.raises(UsageError, match=r"ONNX Runtime cannot run m\.onnx"):
        exported.onnx_function(b"nonsense", Path("m.onnx"))
    with pytest.raises(UsageError, match="ONNX Runtime failed on memory"):
        start_runtime(forms, "onnx").run(np.zeros((1, 4, 8, 8), np.uint8))


def test_no_conversion_is_reported_to_anybody() -> None:
    installed("openvino")
    code = "import sys; from useg.inference.exported import import_openvino; import_openvino().convert_model; print(sys.modules['openvino_telemetry'])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "None\n"
    )


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
    monkeypatch.setattr(runtimes, "measure_seconds", lambda network, x: seconds[network.__name__])
    return seconds


def test_auto_takes_the_fastest(timed: dict[str, float], forms: StoredModel) -> None:
    assert fastest_runtime(forms).name == "openvino-bf16"
    timed["torch-bf16"] = 0.5
    assert fastest_runtime(forms).name == "torch-bf16"
    timed |= dict.fromkeys(timed, 4.0)
    assert fastest_runtime(forms).name == "torch"


def test_auto_takes_none_that_answers_otherwise(
    timed: dict[str, float], forms: StoredModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def turned(x: Any) -> Any:
        return -runtimes.torch_function(forms.as_torch)(x)

    monkeypatch.setitem(RUNTIMES, "openvino-bf16", lambda stored: turned)
    timed["turned"] = 0.1
    assert fastest_runtime(forms).name == "openvino"


def test_auto_takes_what_is_installed(
    timed: dict[str, float], forms: StoredModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(stored: StoredModel) -> Any:
        raise UsageError("not installed")

    for name in ("openvino", "openvino-bf16", "gpu"):
        monkeypatch.setitem(RUNTIMES, name, missing)
    assert fastest_runtime(forms).name == "torch-bf16"


def test_auto_converts_nothing_for_a_few_pictures(
    timed: dict[str, float], forms: StoredModel
) -> None:
    assert fastest_runtime(forms, 1).name == "torch-bf16"
    assert fastest_runtime(forms, 3).name == "openvino-bf16"


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
    runtime = load_runtime(tmp_path, "auto")
    x = make_probe(runtime.description, probe_size(runtime.description))
    assert label_agreement(runtime.run(x), load_runtime(tmp_path).run(x)) >= 0.999


@pytest.mark.parametrize("name", ["model.onnx", "model.xml"])
def test_no_such_model(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no model at"):
        load_runtime(tmp_path / name)


MEETING = """
import sys, threading
import numpy as np, torch
from pathlib import Path
from useg.inference import runtimes
sys.setswitchinterval(1e-6)
torch.set_num_threads(2)
runtime = runtimes.load_runtime(Path(sys.argv[1]), "openvino")
torch.set_num_threads(1)
start = threading.Barrier(8)
def label():
    start.wait()
    runtime.run(np.zeros((1, 3, 32, 32), np.uint8))
threads = [threading.Thread(target=label, daemon=True) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join(30)
assert not any(thread.is_alive() for thread in threads)
"""


def test_threads_that_ask_openvino_for_the_first_time_together_do_not_wait_for_each_other(
    model: Segmenter, tmp_path: Path
) -> None:
    # a third of such processes hung before a tensor was asked for its data by one thread alone; it happens once a process
    pytest.importorskip("openvino")
    save_model(model, tmp_path / "model.safetensors")
    subprocess.run(
        [sys.executable, "-c", MEETING, str(tmp_path / "model.safetensors")],
        check=True,
        timeout=100,
    )
