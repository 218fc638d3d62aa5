"""House rules: imports point one way, nothing heavy at import, one name for one thing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import useg

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "useg"
MODULES = sorted(
    path.relative_to(PACKAGE).as_posix()
    for path in PACKAGE.rglob("*.py")
    if path.name not in ("__init__.py", "__main__.py")
)

# The rooms in the order in which they build on each other: a module imports from its own room and
# from earlier ones.
ROOMS = (
    "errors",
    "ownership",
    "files",
    "parsing",
    "machine",
    "classes",
    "config",
    "device",
    "distributed",
    "visualization",
    "console",
    "images",
    "models",
    "scoring",
    "objects",
    "data",
    "scenes",
    "doctor",
    "training",
    "inference",
    "reporting",
    "serving",
    "labelling",
    "api",
    "cross_validation",
    "train_commands",
    "predict_command",
    "cli",
)


@cache
def parsed(module: str) -> ast.Module:
    return ast.parse((PACKAGE / module).read_text())


@cache
def imports(module: str) -> set[str]:
    """Modules of useg that a module imports anywhere, also inside functions."""
    return imported_by(parsed(module))


def imported_by(code: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(code):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "useg":
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "useg"]
        found |= {name.removeprefix("useg.").replace(".", "/") + ".py" for name in names}
    return found & set(MODULES)


def room(module: str) -> int:
    return ROOMS.index(module.split("/")[0].removesuffix(".py"))


def test_there_are_few_modules() -> None:
    assert len(MODULES) <= 159  # and __main__


def test_every_module_stands_in_a_room_of_the_list() -> None:
    assert {module.split("/")[0].removesuffix(".py") for module in MODULES} == set(ROOMS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_to_earlier_rooms(module: str) -> None:
    assert {other for other in imports(module) if room(other) > room(module)} == set()


def test_no_modules_import_each_other() -> None:
    uses = {module: imports(module) for module in MODULES}
    while free := [module for module, others in uses.items() if not others & set(uses)]:
        for module in free:
            del uses[module]
    assert uses == {}


def imported_at_once(module: str) -> set[str]:
    """Modules of useg that are loaded when a module is imported, with itself."""
    found, waiting = {module}, [module]
    while waiting:
        body = parsed(waiting.pop()).body
        at_top = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
        waiting += (new := imported_by(ast.Module(at_top, [])) - found)
        found |= new
    return found


def test_prediction_imports_nothing_of_training() -> None:
    loaded = imported_at_once("inference/predict_files.py")
    assert "inference/tiles.py" in loaded
    assert not {m for m in loaded if m.startswith("training/") or m == "data/cache.py"}
    assert "training/loop.py" in imported_at_once("api.py")


def test_no_public_name_is_defined_twice() -> None:
    places: dict[str, list[str]] = {}
    for module in MODULES:
        for node in parsed(module).body:
            for name in defined(node):
                if not name.startswith("_"):
                    places.setdefault(name, []).append(module)
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}


def defined(node: ast.stmt) -> list[str]:
    """Names that a statement at the top of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [node.target]
        if isinstance(node, ast.AnnAssign)
        else []
    )
    return [
        name.id
        for target in targets
        for name in ast.walk(target)
        if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
    ]


def test_no_line_has_more_than_100_columns() -> None:
    paths = [
        path
        for folder in ("useg", "tests", "benchmarks", "scripts")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".py", ".c") or path.parent.name == "scripts"
        if path.is_file()
    ]
    long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in paths
        for number, line in enumerate(path.read_text("utf-8").split("\n"), 1)
        if len(line) > 100
    ]
    assert long == []


@pytest.mark.parametrize("module", MODULES)
def test_a_file_opens_by_saying_what_it_does(module: str) -> None:
    docstring = ast.get_docstring(parsed(module))
    assert docstring
    assert len(docstring.splitlines()[0]) <= 140


def python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["--help"],
        ["train", "--help"],
        ["predict", "--help"],
        ["inspect", "--help"],
        ["--version"],
    ],
)
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


# Installed only where somebody asks for them: the extras of pyproject.toml.
EXTRAS = (
    "av", "fastapi", "multipart", "nncf", "onnx", "onnxruntime", "onnxscript", "openvino", "ray",
    "starlette", "tensorboard", "uvicorn", "zarr",
)  # fmt: skip
# Only `useg serve` and `useg label` import them, after a check for the packages of the extra.
SERVICE = {
    f"serving/{name}.py"
    for name in (
        *("app", "connections", "middleware", "open_inference", "request_queue", "responses"),
        *("run", "service", "shared_network", "uploads"),
    )
} | {"labelling/app.py", "labelling/session.py"}


def test_everything_but_the_service_imports_without_the_extras() -> None:
    modules = ["useg." + m.removesuffix(".py").replace("/", ".") for m in set(MODULES) - SERVICE]
    code = f"""
import importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}")
sys.meta_path.insert(0, Refuse())
failed = []
for module in {sorted(modules)!r}:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        failed.append(f"{{module}}: {{error}}")
print(failed)
"""
    assert python(code).splitlines()[-1] == "[]"


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
