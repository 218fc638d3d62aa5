"""What a hostile picture costs, measured in a process of its own: at most 512 MB and a second.

``USEG_SOAK=1`` gives files of many blocks the 30 MB that a request may have. Without it they are so
small that even a slow and busy machine reads them in that time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hostile
import pytest

SOAK = os.environ.get("USEG_SOAK") == "1"
BYTES = 30_000_000 if SOAK else 60_000
SECONDS, MEGABYTES = 1.0 if SOAK else 5.0, 512
CHILD = Path(__file__).parents[1] / "hostile_child.py"
Measure = Callable[[str, str], tuple[str, float, int]]


@pytest.fixture(scope="module")
def measure() -> Iterator[Measure]:
    """Return a function of the reader's and the file's name: outcome, seconds, megabytes."""
    with subprocess.Popen(
        [sys.executable, str(CHILD), str(BYTES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHILD.parents[1])},
    ) as process:
        assert process.stdin
        assert process.stdout

        def ask(reader: str, name: str) -> tuple[str, float, int]:
            process.stdin.write(f"{reader}\t{name}\n")
            process.stdin.flush()
            outcome, seconds, megabytes = json.loads(process.stdout.readline())
            return outcome, seconds, megabytes

        yield ask
        process.stdin.close()


@pytest.mark.parametrize("name", hostile.ATTACKS)
def test_a_hostile_file_costs_little(measure: Measure, name: str) -> None:
    outcome, seconds, megabytes = measure("useg", name)
    assert outcome.startswith(("refused: ", "(")), outcome
    assert megabytes <= MEGABYTES, outcome
    assert seconds <= SECONDS, outcome


@pytest.mark.parametrize(
    ("reader", "name"),
    [
        ("tifffile", "ome plane count"),
        ("Pillow", "webp canvas"),
        ("a believed size", "jpeg size"),
        ("OpenJPEG", "jpeg 2000 precincts"),
        ("OpenJPEG", "jpeg 2000 palette"),
        ("pydicom", "dicom of precincts"),
    ],
)
def test_the_measurement_shows_what_other_readers_take(
    measure: Measure, reader: str, name: str
) -> None:
    assert measure(reader, name)[2] > MEGABYTES
