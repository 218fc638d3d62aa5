"""What the tests of exports share: conversions, which take seconds, and the first exports."""

from __future__ import annotations

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
    """A run of an unpadded U-Net, and beside it what it was exported to."""
    folder = tmp_path_factory.mktemp("valid")
    run_folder = save_run("valid", folder / "run")
    for suffix, package in ((".onnx", "onnxruntime"), (".xml", "openvino")):
        if find_spec(package):
            export.export_model(run_folder, folder / f"model{suffix}")
    return folder


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, 10, (64, 48), 0)
    return folder
