"""Runs the command line in the process of the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from useg.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Run the command line; return its exit status, standard output and standard error."""
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(exit_.value.code or 0), captured.out, captured.err
