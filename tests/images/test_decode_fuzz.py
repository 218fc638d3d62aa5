"""Damaged files by the thousand: pixels or one clear error, soon, in little memory; whatever
happens inside a decoder written in C, and with the limits that users have.

``USEG_SOAK=1`` (``make soak``) reads a million of them, on all cores.
"""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mutations import mutated, seeds

SOAK = os.environ.get("USEG_SOAK") == "1"
FILES, AT_ONCE = (1_000_000, os.cpu_count() or 1) if SOAK else (3_000, 1)
# The number of a file that gives pixels in spite of its damage.
READABLE = 8
CHILD = Path(__file__).parents[1] / "fuzz_child.py"


def read_range(first: int, last: int, folder: Path) -> tuple[list[str], int]:
    """Let child processes read the files of these numbers; what went wrong, each by its number, and
    how many files gave pixels.
    """
    folder.mkdir()
    found, readable = [], 0
    while first < last:
        child = subprocess.run(
            [sys.executable, CHILD, str(first), str(last), folder],
            env=os.environ
            | {
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(CHILD.parent.parent),
            },
            capture_output=True,
            text=True,
            errors="replace",
            timeout=3600,
        )
        number, read = struct.unpack("qq", (folder / "number").read_bytes())
        readable += read
        found += child.stdout.splitlines()
        if child.stderr:
            found.append(f"{first} to {number}\tprinted: {child.stderr[-2000:]}")
        if child.returncode < 0:
            found.append(f"{number}\tkilled by {signal.Signals(-child.returncode).name}")
        elif child.returncode not in (0, 3):
            found.append(f"{number}\texit status {child.returncode}")
        first = number + (child.returncode not in (0, 3))
    return found, readable


def test_damaged_files_are_read_or_refused_within_limits(tmp_path: Path) -> None:
    step = 20_000
    ranges = [
        (first, min(first + step, FILES), tmp_path / str(first)) for first in range(0, FILES, step)
    ]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = list(pool.map(lambda args: read_range(*args), ranges))
    found = [line for lines, _ in results for line in lines]
    for line in found:
        if (number := line.split("\t")[0]).isdigit():
            name, content = mutated(int(number))
            (tmp_path / f"{number}-{name}").write_bytes(content)
    assert not found, f"{len(found)} of {FILES} files, kept in {tmp_path}:\n" + "\n".join(
        found[:50]
    )
    assert FILES // 10 < sum(readable for _, readable in results) < FILES // 2, (
        "damage should mostly show, but not always"
    )


def test_a_number_makes_the_same_file_again() -> None:
    for number in range(0, 2000, 100):
        assert mutated(number) == mutated(number)
    assert {mutated(number)[0] for number in range(2000)} == set(seeds())


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("bytearray(700 << 20)", " MB"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("warnings.warn('oh')", "warning: oh"),
        ("os.write(2, b'oh')", "printed: oh"),
        ("image_files.read_size = lambda path: (0, 0)", "AssertionError"),
        pytest.param(
            "time.sleep(99)",
            "killed by SIGALRM",
            marks=pytest.mark.skipif(not SOAK, reason="takes twenty seconds"),
        ),
        pytest.param(
            "re.match('(a*)*b', 'a' * 40)",
            "killed by SIGPROF",
            marks=pytest.mark.skipif(not SOAK, reason="takes three seconds"),
        ),
    ],
)
def test_the_check_finds_planted_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, sentence: str
) -> None:
    monkeypatch.setenv("USEG_FUZZ_FAULT", fault)
    found, _ = read_range(READABLE, READABLE + 1, tmp_path / "child")
    assert sum(sentence in line for line in found) >= 1, found
