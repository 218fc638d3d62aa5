"""``python -m useg``: the command line."""

from useg.cli import main

main()
