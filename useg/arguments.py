"""The arguments that several commands share, and how they answer in JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

Data = Annotated[Path, typer.Argument(metavar="DATA", help="folder of images and masks whose layout is recognised, or a dataset.toml")]
Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="run folder, model.safetensors, or exported .onnx or .xml; several with commas between: an ensemble")
]
Computed = Annotated[
    str | None,
    typer.Option("--runtime", metavar="NAME", help="auto, torch, torch-bf16, gpu, onnx, openvino or openvino-bf16; by default the file's own"),
]
Augmented = Annotated[str, typer.Option("--augment", metavar="NAME", help="mean of several views of a picture: flip, flips, turns or scales")]
Out = Annotated[Path, typer.Option("--out", help="folder to write")]
Set = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="change a setting; may be repeated (useg train --settings lists them)")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the result as JSON ('-': to standard output)")]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="write a page with pictures, and the same in Markdown beside it")]


@dataclass
class Said:
    """What was said before the command: ``--quiet``."""

    quiet: bool = False


said = Said()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a command's result to a file, or to standard output for ``-``."""
    if path == Path("-"):
        print(json.dumps(content, indent=2))
    else:
        from useg import files

        files.write_json(path, content)
