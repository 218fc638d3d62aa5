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
from made_serving import save_run

from useg.inference import exported
from useg.models.segmenter import Segmenter
from useg.scenes.scene import write_scenes
from useg.serving import export


@pytest.fixture(autouse=True, scope="session")
def converted_once() -> Iterator[None]:
    """Convert each model to ONNX once."""
    known: list[tuple[Segmenter, dict[str, torch.Tensor], bytes]] = []
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
    if find_spec("openvino"):
        export.export_model(run_folder, folder / "model.xml")
    return folder


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, 10, (64, 48), 0)
    return folder
