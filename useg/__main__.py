"""``python -m useg``: the command line."""

from __future__ import annotations

from useg.cli import main

main()
