"""House rules: imports point one way, nothing heavy at import, names are documented, the README is true."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import useg

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "useg"
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py"))


def order() -> list[str]:
    """The modules in the order of the README's "How it is built"."""
    block = re.search(r"## How it is built.*?```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block
    folders: list[tuple[int, str]] = []  # (indent, name) of those that the line lies in
    modules = []
    for line in block[1].splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        folders = [entry for entry in folders if entry[0] < indent]
        if name.endswith("/"):
            folders.append((indent, name))
        else:
            modules.append("".join(folder for _, folder in folders).removeprefix("useg/") + name)
    return modules


def imports(module: str) -> set[str]:
    """Modules of useg that a module imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "useg":
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "useg"]
        found |= {name.removeprefix("useg.").replace(".", "/") + ".py" for name in names}
    return found & set(MODULES)


def test_readme_lists_every_module() -> None:
    assert sorted(order()) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_up_the_list(module: str) -> None:
    place = order().index(module)
    assert {other for other in imports(module) if order().index(other) >= place} == set()


@pytest.mark.parametrize("module", MODULES)
def test_a_file_opens_by_saying_what_it_does(module: str) -> None:
    docstring = ast.get_docstring(ast.parse((PACKAGE / module).read_text()))
    assert docstring
    assert len(docstring.splitlines()[0]) <= 140


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("command", [[], ["--help"], ["train", "--help"], ["predict", "--help"], ["inspect", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    code = f"""
import sys
from useg.cli import main
try: main({command!r})
except SystemExit: pass
print("HEAVY", sorted({{"torch", "numpy", "matplotlib", "PIL", "jinja2"}} & set(sys.modules)))
"""
    assert python(code).splitlines()[-1] == "HEAVY []"


@pytest.mark.parametrize(
    "arguments",
    [
        ["scenes", "{tmp}/s", "--count", "1", "--size", "64x48"],
        ["inspect", "/nowhere"],
        ["train", "/nowhere", "--out", "{tmp}/run", "--set", "train.epcohs=1"],
    ],
)
def test_no_command_imports_torch_before_it_needs_it(arguments: list[str], tmp_path: Path) -> None:
    filled = [argument.format(tmp=tmp_path) for argument in arguments]
    code = f"""
import sys
from useg.cli import main
try: main({filled!r})
except SystemExit: pass
print("TORCH", "torch" in sys.modules)
"""
    assert python(code).splitlines()[-1] == "TORCH False"


def test_public_names_are_complete_and_resolve() -> None:
    assert useg.__all__ == sorted(useg.__all__)
    assert set(useg.__all__) == set(useg._PUBLIC)
    for name in useg.__all__:
        assert getattr(useg, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        useg.trian  # noqa: B018


def test_changelog_and_version_agree_on_the_form() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", useg.__version__)
    assert "## Unreleased" in (ROOT / "CHANGELOG.md").read_text()


def test_no_paths_of_a_machine_in_tracked_files() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"(^|[^a-z.])/(wor[k]|hom[e]|User[s])/")
    guilty = []
    for name in listed.stdout.split():
        path = ROOT / name
        if (
            path.is_file()
            and path.suffix in {".py", ".md", ".toml", ".json", ".txt", ".html", ""}
            and pattern.search(path.read_text("utf-8", "ignore"))
        ):
            guilty.append(name)
    assert guilty == []
