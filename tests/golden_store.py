"""Results -> JSON files under ``golden/``, and what differs from those that are stored there.

``USEG_GOLDEN=write pytest tests/test_golden.py`` stores new results on purpose. With
``USEG_GOLDEN=exact`` floats have to agree to five digits and label maps in every pixel: on the
machine that stored the results a refactoring passes this.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden"
OLD = GOLDEN / "old"
WRITE = os.environ.get("USEG_GOLDEN") == "write"
EXACT = os.environ.get("USEG_GOLDEN") == "exact"
MOST_SHOWN = 20
# Sentences, paths and times are not results.
LEFT_OUT = {
    "against",
    "commit",
    "date",
    "evidence",
    "failed",
    "files",
    "label_maps",
    "machine",
    "message",
    "model",
    "runtime",
    "note",
    "remedy",
    "root",
    "seconds",
    "splits_by",
    "written",
}


def cli(*words: object) -> tuple[int, str]:
    """Run the command line in this process; returns its exit status and output."""
    output, before = io.StringIO(), sys.argv
    sys.argv = ["useg", *map(str, words)]
    try:
        with contextlib.redirect_stdout(output):
            runpy.run_module("useg", run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0), output.getvalue()
    finally:
        sys.argv = before
    raise AssertionError("the command line ended without an exit status")


def answer(*words: object, status: int = 0) -> Any:
    """Run the command line with ``--json -``; returns what it says."""
    code, output = cli("--quiet", *words, "--json", "-")
    assert code == status, f"useg {' '.join(map(str, words))} ended with {code}"
    return json.loads(output)


def results_of(content: Any) -> Any:
    """Return the content without what is no result, such as messages and paths."""
    if isinstance(content, Mapping):
        return {
            str(key): results_of(value) for key, value in content.items() if key not in LEFT_OUT
        }
    if isinstance(content, list | tuple):
        return [results_of(value) for value in content]
    if isinstance(content, np.generic):
        return content.item()
    return content


def digest(pixels: np.ndarray) -> str:
    """Return a digest of an array: its shape, type and content."""
    head = f"{pixels.shape} {pixels.dtype.str}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(pixels).tobytes()).hexdigest()[:16]


def check(
    name: str, found: Any, *, rtol: float = 1e-4, atol: float = 1e-6, slack: float = 0.0
) -> None:
    """Compare results with those stored as ``golden/NAME.json``, or store them.

    Args:
        name: of the group of results.
        found: what this code gives: dicts, lists, numbers and texts.
        rtol: relative tolerance of floats.
        atol: absolute tolerance of floats.
        slack: relative tolerance of whole numbers; 0 wants them exactly.
    """
    path = GOLDEN / f"{name}.json"
    found = rounded(results_of(found))
    rtol, atol = (min(rtol, 1e-5), min(atol, 1e-5)) if EXACT else (rtol, atol)
    if WRITE:
        path.write_text(stored_form(found))
    kept = json.loads(path.read_text())
    different = list(differences(json.loads(json.dumps(found)), kept, rtol, atol, slack))
    shown = "\n".join(different[:MOST_SHOWN])
    assert not different, f"{len(different)} results of {path.name} differ:\n{shown}"


def rounded(content: Any) -> Any:
    """Round floats to seven digits, so that the stored files stay small."""
    if isinstance(content, dict):
        return {key: rounded(value) for key, value in content.items()}
    if isinstance(content, list):
        return [rounded(value) for value in content]
    return float(f"{content:.7g}") if isinstance(content, float) else content


def stored_form(content: Any) -> str:
    """Return JSON with one line per entry of the two upper levels, for readable diffs."""
    lines = []
    for key, value in content.items():
        if isinstance(value, dict):
            inner = ",\n".join(
                f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items()
            )
            lines.append(f" {json.dumps(key)}: {{\n{inner}\n }}")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def differences(
    found: Any, kept: Any, rtol: float, atol: float, slack: float, place: str = ""
) -> Iterator[str]:
    """Yield a line for each place in which two results differ."""
    if isinstance(found, dict) and isinstance(kept, dict):
        for key in dict.fromkeys((*kept, *found)):
            inside = f"{place}.{key}".strip(".")
            if key not in found:
                yield f"{inside}: stored, but no longer there"
            elif key not in kept:
                yield f"{inside}: there, but not stored"
            else:
                yield from differences(found[key], kept[key], rtol, atol, slack, inside)
    elif isinstance(found, list) and isinstance(kept, list):
        if len(found) != len(kept):
            yield f"{place}: {len(found)} entries, stored are {len(kept)}"
        for k, (one, other) in enumerate(zip(found, kept, strict=False)):
            yield from differences(one, other, rtol, atol, slack, f"{place}[{k}]")
    elif not _equal(found, kept, rtol, atol, slack):
        yield f"{place}: {found!r}, stored is {kept!r}"


def _equal(found: Any, kept: Any, rtol: float, atol: float, slack: float) -> bool:
    numbers = [
        isinstance(each, int | float) and not isinstance(each, bool) for each in (found, kept)
    ]
    if not all(numbers):
        return bool(found == kept)
    if isinstance(found, int) and isinstance(kept, int):
        return abs(found - kept) <= (
            math.ceil(slack * max(abs(found), abs(kept))) + 2 if slack else 0
        )
    return math.isclose(found, kept, rel_tol=rtol, abs_tol=atol)


def check_label_maps(name: str, found: Mapping[str, np.ndarray]) -> list[str]:
    """Compare label maps with those stored as ``golden/NAME.npz``, or store them.

    At least 99.9 % of the pixels of each have to be equal. Other processors round differently,
    and a pixel that is undecided between two classes then takes the other one.

    Returns:
        The names of those that are not equal to the last pixel.
    """
    path = GOLDEN / f"{name}.npz"
    if WRITE:
        np.savez_compressed(path, **dict(found))  # type: ignore[arg-type]
    with np.load(path) as content:
        kept: dict[str, np.ndarray] = {key: content[key] for key in content.files}
    assert set(found) == set(kept)
    unequal, wrong = [], []
    for key, label in found.items():
        assert label.dtype == np.uint8
        assert label.shape == kept[key].shape, f"{key}: {label.shape}, stored is {kept[key].shape}"
        share = float((label == kept[key]).mean())
        same = digest(label) == digest(kept[key])
        print(f"{key}: digests {'equal' if same else 'differ'}, {share:.4%} of the pixels equal")
        if not same:
            unequal.append(key)
        if share < 0.999:
            wrong.append(
                f"{key}: {share:.2%} of the pixels are as stored, {_confused(label, kept[key])}"
            )
    assert not wrong, "\n".join(["label maps differ:", *wrong])
    assert not (EXACT and unequal), f"these are not equal to the last pixel: {', '.join(unequal)}"
    return unequal


def _confused(found: np.ndarray, kept: np.ndarray) -> str:
    pairs, counts = np.unique(
        np.stack([kept[found != kept], found[found != kept]], -1), axis=0, return_counts=True
    )
    most: Sequence[int] = pairs[counts.argmax()].tolist()
    return f"most often {most[1]} instead of {most[0]}"
