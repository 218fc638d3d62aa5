"""What the tests of exports share: conversions, which take seconds, and the first exports."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from made_serving import make_network, save_run

from useg.inference import exported
from useg.models.segmenter import Segmenter
from useg.scenes.generate import write_scenes
from useg.serving import export

# Models that were converted to ONNX: each, its weights then, and the file.
known: list[tuple[Segmenter, dict[str, torch.Tensor], bytes]] = []


@pytest.fixture(autouse=True, scope="module")
def converted_once() -> Iterator[None]:
    """Convert each model to ONNX once."""
    convert = exported.to_onnx

    def remembered(model: Segmenter) -> bytes:
        weights = model.state_dict()
        for other, others, content in known:
            if (
                (model.settings, model.pixels) == (other.settings, other.pixels)
                and weights.keys() == others.keys()
                and all(torch.equal(weights[name], others[name]) for name in weights)
            ):
                return content
        content = convert(model)
        known.append((model, {name: value.clone() for name, value in weights.items()}, content))
        return content

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exported, "to_onnx", remembered)
        yield


def without_entries(path: Path) -> bytes:
    """Return an ONNX file as it was converted, without the description and the digest."""
    content, text = exported.read_onnx(path)
    entries = ("useg", text), ("sha256", "0" * 64)
    return content[: -sum(len(exported._metadata_entry(*entry)) for entry in entries)]


@pytest.fixture(scope="session")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an unpadded U-Net, and beside it what it was exported to.

    ONNX files take ten seconds, so the command writes the one, and ``printed.json`` has its output.
    """
    folder = tmp_path_factory.mktemp("valid")
    run_folder = save_run("valid", folder / "run")
    if find_spec("onnxruntime"):
        command = ["export", str(run_folder), str(folder / "model.onnx")]
        done = subprocess.run(
            [sys.executable, "-m", "useg", *command], capture_output=True, text=True, check=True
        )
        (folder / "printed.json").write_text(json.dumps([done.stdout, done.stderr]))
        model = make_network("valid")
        known.append((model, model.state_dict(), without_entries(folder / "model.onnx")))
    if find_spec("openvino"):
        export.export_model(run_folder, folder / "model.xml")
    return folder


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, 10, (64, 48), 0)
    return folder
