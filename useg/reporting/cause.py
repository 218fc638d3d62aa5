"""Why a class is weak: what an evaluation says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "label noise",
    "few examples",
    "small things",
    "split shift",
    "not carried over",
    "learnt too little",
    "confused at borders",
    "confused in regions",
]


@dataclass(frozen=True)
class Cause:
    """Why a class is weak, as far as can be told.

    Args:
        class_name: which; empty for a cause of the whole.
        kind: a fixed term.
        message: a sentence.
        evidence: the numbers behind it.
        remedy: the setting, command or data that would help.
    """

    class_name: str
    kind: Kind
    message: str
    evidence: str
    remedy: str
