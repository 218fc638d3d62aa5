"""Damaged settings, class tables, data set descriptions and lists are read or refused.

``USEG_SOAK=1`` reads 100,000 of them.
"""

from __future__ import annotations

import os
import random
import time
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from made_data import write_folders

from useg import classes, config
from useg.classes import CAMVID, classes_to_toml, read_classes
from useg.config import Settings, read_settings, write_settings
from useg.data.layouts import find_dataset
from useg.errors import UsageError

COUNT = 100_000 if os.environ.get("USEG_SOAK") == "1" else 400
# Of work, for one file; usually milliseconds.
SECONDS = 10

WORDS = (
    *("nan", "inf", "-inf", "1e999", "9" * 5000, "-1", "0", "0x7fffffffffffffff", "2e308", "true"),
    *('""', '"\\u001b[31m"', '"' + "x" * 5000 + '"', '"../../**/*"', '"*a*a*a*a"', '"[[]"', "'/'"),
    *("[" * 3000, "[]", "[[]]", "{}", "{a=" * 300, "a" + ".a" * 90, "1979-05-27", "=", ",", "#"),
    *("\0", "\x1b[2J", "\u202e", "\ud800", "=cmd()", ",,,,", '"', "\r", "train", "gap", "255"),
)


def run_toml(root: Path) -> Path:
    write_settings(root / "run.toml", Settings(), {})
    return root / "run.toml"


def classes_toml(root: Path) -> Path:
    (root / "classes.toml").write_text(classes_to_toml(CAMVID), "utf-8")
    return root / "classes.toml"


def in_dataset(name: str, content: str) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        write_folders(root)
        (root / name).write_text(content)
        return root / name

    return make


DATASET = 'images = "images/*.jpg"\nmasks = "masks/*.png"\nignore = [2]\nempty = "background"\n'
KINDS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], object]]] = {
    "settings": (run_toml, read_settings),
    "class table": (classes_toml, read_classes),
    **{
        name: (in_dataset(name, content), lambda path: find_dataset(path.parent))
        for name, content in {
            "dataset.toml": DATASET,
            "split.csv": "image,split\nimages/1.jpg,train\nimages/2.jpg,val\nimages/10.jpg,test\n",
            "train.txt": "1\n2.jpg\nimages/10.jpg\n",
            "_classes.csv": "Pixel Value, Class\n0, road\n1, car\n2, tree\n",
            "labelmap.txt": "# label:color_rgb:parts:actions\nroad:0,0,0::\ncar:1,1,1::\n",
            "data.yaml": "names:\n  0: road\n  1: car\n  2: tree\n",
            "dataset.json": '{"labels": {"0": "road", "1": "car", "2": "tree"}}',
        }.items()
    },
}


def damaged(text: str, draw: random.Random) -> bytes:
    """Change words, lines or bytes."""
    for _ in range(draw.choice((0, 1, 1, 2, 5))):
        at = draw.randrange(len(text) + 1)
        end = min(len(text), at + draw.choice((0, 1, 3, 20)))
        match draw.randrange(4):
            case 0:
                lines = text.split("\n")
                lines[draw.randrange(len(lines))] *= draw.choice((0, 2, 50))
                text = "\n".join(lines)
            case 1:
                words = text.split(" ")
                words[draw.randrange(len(words))] = draw.choice(WORDS)
                text = " ".join(words)
            case _:
                text = text[:at] + draw.choice(WORDS) + text[end:]
    content = text.encode("utf-8", "surrogatepass")
    return content[: draw.randrange(len(content) + 1)] if draw.random() < 0.05 else content


def outcome(read: Callable[[Path], object], path: Path) -> str:
    """``read`` or ``refused``, or what went wrong."""
    began = time.process_time()
    try:
        read(path)
        result = "read"
    except UsageError as error:
        result = "refused" if str(error).strip() else "an empty sentence"
    except Exception as error:
        result = f"{type(error).__name__}: {error}"[:200]
    return result if time.process_time() - began < SECONDS else "slow"


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_text_is_read_or_refused(kind: str, tmp_path: Path) -> None:
    make, read = KINDS[kind]
    path = make(tmp_path)
    text, outcomes = path.read_text("utf-8"), Counter[str]()
    for seed in range(COUNT // len(KINDS)):
        path.write_bytes(damaged(text, random.Random(f"{kind} {seed}")))
        result = outcome(read, path)
        assert result in ("read", "refused"), (seed, result)
        outcomes[result] += 1
    assert outcomes["read"] + outcomes["refused"] == COUNT // len(KINDS)
    assert outcomes["read"]


def test_the_test_sees_a_reader_without_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlimited(path: Path) -> object:
        return tomllib.loads(path.read_text("utf-8"))

    monkeypatch.setattr(config, "read_toml", unlimited)
    monkeypatch.setattr(classes, "read_toml", unlimited)
    for kind in ("settings", "class table"):
        path = KINDS[kind][0](tmp_path)
        path.write_text("a = " + "[" * 3000)
        assert outcome(KINDS[kind][1], path).startswith("RecursionError")
