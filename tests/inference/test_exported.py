"""Exported models: batches over threads, errors, telemetry, and the first use by many threads.

That files come back and give PyTorch's numbers is tested in tests/serving and test_runtimes.py.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_inference import make_model_of, skip_if_missing, store
from torch import nn

from useg.classes import ClassTable
from useg.errors import UsageError
from useg.inference import exported
from useg.inference.runtimes import StoredModel, make_probe, start_runtime
from useg.models.encoders import EncoderUNet, ExpandingLevel
from useg.models.segmenter import Segmenter, save_model


@pytest.fixture(scope="module")
def model() -> Segmenter:
    return make_model_of()


@pytest.fixture(scope="module")
def forms(model: Segmenter) -> StoredModel:
    """The model, and its other forms once they are made."""
    return store(model)


def test_a_batch_spread_over_threads_is_the_same(
    forms: StoredModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_if_missing("openvino")
    x = make_probe(forms.description, (48, 40), 5)
    expected = start_runtime(forms, "openvino").run(x)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    # The trial prefers either way.
    for fewest in (0, 1):
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


def test_batches_of_two_threads_are_those_of_one(
    forms: StoredModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_if_missing("openvino")
    batches = [make_probe(forms.description, (48, 40), count) for count in (3, 4)]
    expected = [start_runtime(forms, "openvino").run(x) for x in batches]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    # The trial prefers to spread the images of a batch over the threads.
    times = iter((1.0, 0.0))
    monkeypatch.setattr(exported, "measure_seconds", lambda network, x: next(times))
    run = start_runtime(forms, "openvino").run
    run(batches[0])
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda k: run(batches[k % 2]), range(100)))
    for k, logits in enumerate(found):
        np.testing.assert_allclose(logits, expected[k % 2], atol=1e-5)


def test_the_first_size_of_parallel_images_has_its_own_graph_with_the_same_numbers(
    forms: StoredModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_if_missing("openvino")
    images = [make_probe(forms.description, size) for size in ((48, 40), (64, 40), (48, 40))]
    # A later image of that size must not change the result of an earlier one.
    images[2] = 255 - images[2]
    expected = [start_runtime(forms, "openvino").run(x) for x in images]
    threads = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    shapes: list[str] = []
    genuine = exported._one_request_per_thread

    def observe(compiled: Any) -> Any:
        shapes.append(str(compiled.inputs[0].partial_shape))
        return genuine(compiled)

    monkeypatch.setattr(exported, "_one_request_per_thread", observe)
    run = start_runtime(forms, "openvino").run
    threads[0] = 1
    for found, logits in zip([run(x) for x in images], expected, strict=True):
        np.testing.assert_array_equal(found, logits)
    assert shapes == ["[?,3,?,?]", "[1,3,40,48]", "[?,3,?,?]"]


@pytest.mark.parametrize("detail", [True, False])
def test_transposed_levels_compute_the_same(detail: bool) -> None:
    torch.manual_seed(0)
    network = EncoderUNet("lite0", 3, 5, width=4, detail=detail).eval()
    for level in network.merge:
        # As after folding the batch normalisation.
        assert isinstance(level, ExpandingLevel)
        level[1] = nn.Identity()
        conv = level[0]
        conv.register_parameter("bias", nn.Parameter(torch.randn(len(conv.weight))))
    x = torch.randn(2, 3, 32, 96)
    with torch.no_grad():
        expected = network(x)
        exported.transpose_levels(network)
        torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-5)
    kinds = [type(level).__name__ for level in network.merge]
    assert kinds == ["ExpandingLevel", *["TransposedLevel"] * 4]


def test_only_the_deepest_level_of_an_openvino_graph_repeats_pixels() -> None:
    skip_if_missing("openvino")
    settings = {"encoder": "lite0", "width": 4, "channels": 3, "classes": 5}
    model = Segmenter(settings, ClassTable(tuple("abcde")), [0.0] * 3, [1.0] * 3).eval()
    graph = exported.to_openvino(model)
    kinds = Counter(operation.get_type_name() for operation in graph.get_ordered_ops())
    assert (kinds["Interpolate"], kinds["ConvolutionBackpropData"]) == (1, 4)
    assert isinstance(model.network, EncoderUNet)
    assert isinstance(model.network.merge[4], ExpandingLevel), "the model itself has changed"


def test_errors_of_onnx_runtime_are_one_sentence(forms: StoredModel) -> None:
    skip_if_missing("onnx")
    with pytest.raises(UsageError, match=r"ONNX Runtime cannot run m\.onnx"):
        exported.onnx_function(b"nonsense", Path("m.onnx"))
    with pytest.raises(UsageError, match="ONNX Runtime failed on memory"):
        start_runtime(forms, "onnx").run(np.zeros((1, 4, 8, 8), np.uint8))


def test_openvino_sends_no_telemetry() -> None:
    skip_if_missing("openvino")
    code = (
        "import sys; from useg.inference.exported import import_openvino; "
        "import_openvino().convert_model; print(sys.modules['openvino_telemetry'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "None\n"


DEADLOCK_SCRIPT = """
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


def test_threads_that_first_use_openvino_at_once_do_not_deadlock(
    model: Segmenter, tmp_path: Path
) -> None:
    # A third of such processes hung until one thread alone read the data of a tensor first. It
    # happens once per process.
    pytest.importorskip("openvino")
    save_model(model, tmp_path / "model.safetensors")
    subprocess.run(
        [sys.executable, "-c", DEADLOCK_SCRIPT, str(tmp_path / "model.safetensors")],
        check=True,
        timeout=100,
    )
