"""Make what lies in ``golden/old``: models, runs and exported files of an earlier useg.

    python tests/golden_artefacts.py

Do not make them anew: they show that the files of an earlier version still load. Store the files of
a new format beside them instead. ``test_golden.py`` reads them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import golden_data
from golden_store import OLD, cli
from safetensors import safe_open

import useg

QUICK = {"train.precision": "fp32", "data.split": "random", "train.validate_every": 4}
SMALL = {"model.encoder": "plain", "model.width": 4, "model.depth": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "valid": (
        "scenes",
        {
            **SMALL,
            "model.padding": "valid",
            "data.size": "96x72",
            "train.steps": 500,
            "train.validate_every": 20,
        },
    ),
    "grey": (
        "patients",
        {
            **SMALL,
            "model.normalize": False,
            "model.up_kernel": 3,
            "model.extra_conv": True,
            "model.dropout": 0.2,
            "train.steps": 400,
            "train.validate_every": 20,
        },
    ),
}
RUN = {
    **SMALL,
    "model.width": 3,
    "data.size": "64x48",
    "model.dropout": 0.2,
    "train.steps": 24,
    "train.validate_every": 2,
}
STOPS_AFTER = 11
ENCODERS = ("lite0", "resnet18", "cnn", "fcn8s")
FILES = ("model.safetensors", "run.toml", "split.csv", "log.jsonl", "scores.json", "state.pt")


class Stopper:
    """Sends this process a signal after a step, as a user's Ctrl-C does."""

    def say(self, text: str) -> None:
        pass

    def decoded(self, done: int, total: int) -> None:
        pass

    def validated(self, row: Any) -> None:
        pass

    def step(self, row: Any, steps: int, seconds_left: float) -> None:
        if row["step"] == STOPS_AFTER:
            os.kill(os.getpid(), signal.SIGTERM)


def keep(run: Path, out: Path) -> None:
    """Keep a run's files but for its pictures and pages."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name in FILES:
        if (run / name).exists():
            shutil.copy(run / name, out / name)


def layout_of(path: Path) -> dict[str, Any]:
    """Return a model file without its numbers: the header, and all tensors' types and shapes."""
    with safe_open(str(path), framework="np") as file:
        tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        named = {name: [part.get_dtype(), part.get_shape()] for name, part in tensors.items()}
        return {"header": file.metadata()["useg"].partition(" ")[2], "tensors": named}


def main() -> None:
    OLD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # so that no file holds a path of this machine
        for name in {data for data, _ in MODELS.values()}:
            golden_data.LAYOUTS[name](Path(name))
        for name, (data, settings) in MODELS.items():
            run = useg.train(data, name, settings={**QUICK, **settings})
            print(name, run.scores.mean_iou)
            shutil.copy(Path(name) / "model.safetensors", OLD / f"{name}.safetensors")
        for suffix in ("onnx", "xml"):
            assert cli("export", OLD / "valid.safetensors", OLD / f"valid.{suffix}")[0] == 0
        run = useg.train("scenes", "interrupted", settings={**QUICK, **RUN}, progress=Stopper())
        assert run.interrupted
        keep(Path("interrupted"), OLD / "interrupted")
        assert not useg.train("scenes", "ended", settings={**QUICK, **RUN}).interrupted
        keep(Path("ended"), OLD / "ended")
        for name in ENCODERS:
            settings = {
                "model.encoder": name,
                "model.pretrained": False,
                "data.size": "64x48",
                "train.steps": 1,
            }
            useg.train("scenes", name, settings={**QUICK, **settings})
            (OLD / f"{name}.json").write_text(
                json.dumps(layout_of(Path(name) / "model.safetensors")) + "\n"
            )


if __name__ == "__main__":
    main()
