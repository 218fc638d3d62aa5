"""The tree of errors, and what the helpers that raise them say."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import useg
from useg.errors import choose, need, suggest


@pytest.mark.parametrize(
    "name", ["DataError", "ModelError", "SettingsError", "MachineError", "MissingPackageError"]
)
def test_every_error_is_public_documented_and_a_usage_error(name: str) -> None:
    error = getattr(useg, name)
    assert issubclass(error, useg.UsageError)
    assert error.__doc__


def test_missing_package_is_an_error_of_the_machine_with_the_install_command() -> None:
    assert issubclass(useg.MissingPackageError, useg.MachineError)
    with pytest.raises(useg.MissingPackageError, match=r"run: pip install 'useg\[serve\]'"):
        need("no_such_package", "serve")


def test_unknown_option_is_an_error_of_the_settings_that_lists_all_and_suggests_one() -> None:
    with pytest.raises(useg.SettingsError) as caught:
        choose("augmentation", "filp", {"flip": 1, "dihedral": 2})
    assert str(caught.value) == (
        "augmentation 'filp' is not known; choose one of dihedral, flip; did you mean 'flip'?"
    )


def test_nothing_is_suggested_when_nothing_is_similar() -> None:
    assert suggest("zzz", ["flip", "dihedral"]) == ""


# Only the command line uses these: they define its options, parse them or describe commands.
COMMAND_LINE = (
    *("cli.py", "predict_command.py", "train_commands.py", "console.py"),
    *("config.py", "reporting/report.py", "labelling/mask_files.py"),
    *("serving/run.py", "serving/middleware.py", "serving/site.py"),
)
OPTION = re.compile(r"(?<![\w\-\"'=])--[a-z][a-z-]+")
# Whole commands may have options, and so may messages that say the argument in Python too.
HAS_BOTH = re.compile(r"in Python|\b(useg|pip|ray|tensorboard) [a-z{]")


def messages_of(path: Path) -> list[str]:
    """The texts in a module, apart from docstrings; f-strings as a whole."""
    tree = ast.parse(path.read_text())
    inside = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values
    }
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and isinstance(node.body[0], ast.Expr)
    }
    return [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        or (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in inside | docs
        )
    ]


def test_messages_of_the_library_help_on_the_command_line_and_in_python() -> None:
    package = Path(useg.__file__).parent
    found = [
        f"{path.name}: {text}"
        for path in sorted(package.rglob("*.py"))
        if path.relative_to(package).as_posix() not in COMMAND_LINE
        for text in messages_of(path)
        if OPTION.search(text) and not HAS_BOTH.search(text) and "style=" not in text
    ]
    assert not found, "\n".join(found)
