"""No command changes a file that useg did not write, whatever its arguments.

Random command lines run in a folder full of files of somebody else, many of which have the names of
outputs; after each one every file is compared with its digest. ``USEG_SOAK=1`` runs 2,000.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tifffile
import typer
from fuzz_child import make_videos
from PIL import Image

from useg import api
from useg.cli import app, main
from useg.files import LOCK_NAME, is_draft
from useg.images import image_files
from useg.inference import exported, predict_files
from useg.labelling.app import LabelServer
from useg.ownership import is_own_json
from useg.serving import export, site

OLD = Path(__file__).parent / "golden" / "old"
SOAK = os.environ.get("USEG_SOAK") == "1"
COUNT = 2000 if SOAK else 20
FAST = ["--set", "model.encoder=plain", "--set", "model.width=2", "--set", "train.steps=1"]

# Names of outputs, and content that another program could have given them.
NAMESAKES = {
    "split.csv": "image,split\nimages/p0.png,train\n",
    "report.html": "<!doctype html><title>thesis</title>",
    "report.md": "# my notes\n",
    "scores.json": '{"mean_iou": 0.9}',
    "areas.csv": "image,area\n",
    "coco.json": '{"images": [], "annotations": [], "categories": []}',
    "ranking.csv": "rank\n1\n",
    "run.toml": "[train]\nsteps = 3\n",
    "log.jsonl": "mine\n",
    "model.onnx": "mine",
    "model.xml": "<annotations/>",
    "model.bin": "mine",
    "model.json": '{"name": "mine"}',
    "index.html": "<!doctype html>",
    "curves.png": "mine",
    "changes.txt": "mine\n",
    "p0.tif": "mine",
    "a_mask.mp4": "mine",
    "a_overlay.mp4": "mine",
    "inspect.html": "<!doctype html>",
    "inspect.md": "# mine\n",
    "objects.csv": "image,object\n",
    "folds.json": "{}",
    "truth.json": "{}",
    "dataset.toml": "[images]\n",
    "changes.json": "[]",
    "cvat.xml": "<annotations/>",
    "label_studio.json": "[]",
    "p0.json": "{}",
    "p0.txt": "0 0.5 0.5 1 1\n",
    "state.pt": "mine",
    "empty": "",
    ".useg-demo": "",
    "classes.toml": '[[class]]\nname = "a"\n\n[[class]]\nname = "b"\n',
}


# An OME-Zarr image of one chunk.
ZARR = {
    ".zgroup": '{"zarr_format": 2}',
    ".zattrs": '{"multiscales": [{"version": "0.4", "datasets": [{"path": "0"}], "axes": '
    '[{"name": "y", "type": "space"}, {"name": "x", "type": "space"}]}]}',
    "0/.zarray": '{"zarr_format": 2, "shape": [16, 24], "chunks": [16, 24], "dtype": "|u1", '
    '"compressor": null, "fill_value": 0, "order": "C", "filters": null}',
    "0/0.0": "\7" * 384,
}


def make_tree(root: Path) -> None:
    """Make a data set, a model, and folders of files that have the names of outputs."""
    rng = np.random.default_rng(0)
    for folder in ("set/images", "set/masks", "other"):
        (root / folder).mkdir(parents=True)
    for k in range(6):
        pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"set/images/p{k}.png")
        Image.fromarray(pixels[..., 0] % 2).save(root / f"set/masks/p{k}.png")
        Image.fromarray(pixels).save(root / f"other/p{k}.png")
    tifffile.imwrite(root / "other/p1.tif", rng.integers(0, 256, (16, 16), np.uint8))
    for folder in (
        *("names", "names/overlays", "names/pictures", "names/objects", "names/p0_masks"),
        *("names/images", "names/masks", "names/fold1", "names/fold_1", "names/CameraRGB"),
        *("site", "site/runtime", "demo", "demo/run"),
    ):
        (root / folder).mkdir(exist_ok=True)
        (root / folder / "mine.png").write_text("mine")
    for name, content in ZARR.items():
        for folder in ("other", "names"):
            path = root / folder / "z.zarr" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    (root / "videos").mkdir()
    make_videos(root / "videos")
    for folder in ("names", "site", "demo", "other", "set"):
        for name, content in NAMESAKES.items():
            # The data set stays one that can be read.
            if folder != "set" or name not in ("split.csv", "dataset.toml", "p0.json", "p0.txt"):
                (root / folder / name).write_text(content)
    for k in range(6):
        for folder in ("names", "names/overlays", "names/masks"):
            shutil.copy(root / f"set/masks/p{k}.png", root / folder)
    (root / "names/objects/p0.tif").write_text("mine")
    (root / "links").mkdir()
    (root / "links/p0.png").symlink_to(root / "set/masks/p0.png")
    (root / "links/report.html").symlink_to("nowhere")
    (root / "links/folder").symlink_to(root / "names")
    (root / "loop").symlink_to(root / "loop")
    os.mkfifo(root / "pipe.json")
    shutil.copy(OLD / "valid.safetensors", root / "model.safetensors")


def make_conversions_fast(patch: pytest.MonkeyPatch) -> None:
    """Take stored graphs for those of the model, and files of a few bytes for the browser's."""
    graph = (OLD / "valid.onnx").read_bytes()
    formats = {
        ".onnx": (lambda stored: graph, exported.write_onnx),
        ".xml": (
            lambda stored: exported.read_openvino(OLD / "valid.xml")[0],
            exported.write_openvino,
        ),
    }
    runtime_files = {f"runtime/{name}": b"code" for name in site.RUNTIME_FILES}
    patch.setattr(export, "EXPORT_FORMATS", formats)
    patch.setattr(export, "compare_exports", lambda *models, exact: (0.0, 1.0))
    patch.setattr(site, "_extract_runtime", lambda say: runtime_files)


def snapshot(root: Path) -> dict[str, str]:
    """Return what each file and link contains."""
    found = {}
    for path in root.rglob("*"):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            found[name] = f"link {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif not path.is_dir():
            found[name] = "pipe"
    return found


FOLDERS = [
    *("set", "set/images", "set/masks", "other", "names", "names/overlays", "site", "demo", "."),
    *("links", "links/folder", "loop", "new", "new2", "new/deeper", "empty_name", "pipe.json"),
    *("model.safetensors", "names/model.json", "x" * 300),
]
FILES = [
    *(f"names/{name}" for name in NAMESAKES),
    *("links/report.html", "pipe.json", "loop", "fresh.html", "fresh.json", "new/report.html"),
    *("model.safetensors", "set/images/p0.png", "no/such/folder.json", "y" * 250 + ".html", "new"),
]


def predict_line(rng: random.Random) -> list[str]:
    options = [
        *(["--no-overlays"], ["--polygons"], ["--coco"], ["--areas"], ["--overwrite"], ["--rank"]),
        *(["--probabilities", "uint8"], ["--confidence", "png"], ["--confidence", "tif"]),
        *(["--labels", "tif"], ["--shard", "2/3"], ["--min-region", "3"], ["--smooth", "nan"]),
        *(["--objects"], ["--tool", "qupath"], ["--tool", "labelme"], ["--max-hole", "2"]),
        *(["--min-region", "9" * 30], ["--shard", "1/" + "9" * 5000], ["--augment", "flip"]),
        *(["--tool", "cvat"], ["--tool", "label-studio"], ["--no-overwrite"], ["--overlays"]),
        ["--smooth", "0.5"],
    ]
    sources = rng.choice(
        [
            *(["set/images"], ["other"], ["other/p1.tif"], ["**a"], ["loop"], ["pipe.json"]),
            *(["other/z.zarr"], ["videos"], ["videos/a.mp4"], ["names", "set/images"], ["."]),
        ]
    )
    chosen = [word for option in rng.sample(options, rng.randrange(4)) for word in option]
    return ["predict", "model.safetensors", *sources, "--out", rng.choice(FOLDERS), *chosen]


def train_line(rng: random.Random) -> list[str]:
    extra = rng.choice(
        [
            *([], [], ["--resume"], ["--minutes", "nan"], ["--epochs", "-1"], ["--folds", "2"]),
            *(["--folds", "2", "--final"], ["--from", rng.choice(["model.safetensors", "new"])]),
            *(["--from", "model.safetensors", "--map", "ids"], ["--unlabelled", "other"]),
            *(["--force"], ["--no-resume"], ["--resume", "--force"], ["--settings"]),
            *(
                ["--config", rng.choice(["names/run.toml", "new/run.toml"])],
                ["--unlabelled", "new"],
            ),
        ]
    )
    return ["train", "set", "--out", rng.choice(FOLDERS), *FAST, *extra]


def adapt_line(rng: random.Random) -> list[str]:
    model = rng.choice(["model.safetensors", "new"])
    sources = rng.choice(["set/images", "other", "loop", "set"])
    return ["adapt", model, sources, "--out", rng.choice(FOLDERS)]


def label_line(rng: random.Random) -> list[str]:
    options = [
        *(["--classes", "a,b"], ["--masks", rng.choice(FOLDERS)], ["--model", "model.safetensors"]),
        *(["--from", "model.safetensors"], ["--masks", rng.choice(FOLDERS)], ["--faulty"]),
    ]
    chosen = [word for option in rng.sample(options, rng.randrange(4)) for word in option]
    return ["label", rng.choice(["set/images", *FOLDERS]), "--port", "0", "--no-open", *chosen]


def export_line(rng: random.Random) -> list[str]:
    targets = [*FOLDERS, *FILES, "a.onnx", "a.xml", "names/", "site/", "new/", "links/folder/"]
    extra = rng.choice([[], [], ["--int8", "set"], ["--set", "data.classes=carla"]])
    return ["export", "model.safetensors", rng.choice(targets), *extra]


def inspect_line(rng: random.Random) -> list[str]:
    folder = rng.choice(["set", "set", "set", *FOLDERS])
    options = (
        *(["--html", rng.choice(FILES)], ["--fix", rng.choice(FOLDERS)], ["--init"]),
        *(["--fix", rng.choice(FOLDERS), "--drop-doubtful"], ["--set", "data.classes=carla"]),
    )
    return ["inspect", folder, *rng.choice(options)]


def evaluate_line(rng: random.Random) -> list[str]:
    model = rng.choice(["model.safetensors", "new"])
    extra = rng.choice(
        [
            *([], [], ["--objects", "b"], ["--against", "model.safetensors"], ["--membranes", "b"]),
            ["--set", "data.classes=carla"],
            *(["--map", "ids"], ["--ignore-mask", "set/masks/p0.png"], ["--augment", "flip"]),
        ]
    )
    return ["evaluate", model, "set", "--split", "all", "--html", rng.choice(FILES), *extra]


def scenes_line(rng: random.Random) -> list[str]:
    seed = str(rng.randrange(3))
    return ["scenes", rng.choice(FOLDERS), "--count", "1", "--size", "32x32", "--seed", seed]


def demo_line(rng: random.Random) -> list[str]:
    return ["demo", "--out", rng.choice(FOLDERS), "--quick", "--minutes", "0.001"]


def bench_line(rng: random.Random) -> list[str]:
    return ["bench", rng.choice(["new", "nothing"]), "--json", rng.choice(FILES)]


LINES: dict[Callable[[random.Random], list[str]], float] = {
    predict_line: 30,
    train_line: 10,
    export_line: 12,
    inspect_line: 12,
    evaluate_line: 8,
    scenes_line: 8,
    demo_line: 6,
    adapt_line: 8,
    label_line: 12,
    bench_line: 1,
}

# Those that say only how something is computed or tested elsewhere: Ray's jobs in test_cluster.py.
OPTIONS_WITHOUT_FILES = {
    *("--help", "--runtime", "--device", "--tile", "--tolerance", "--size", "--port"),
    *("--deterministic", "--no-deterministic", "--settings", "--cluster", "--workers"),
}


def random_line(rng: random.Random) -> list[str]:
    """Return a command line; one in five also writes JSON."""
    line = rng.choices([*LINES], [*LINES.values()])[0](rng)
    has_json = line[0] not in ("scenes", "demo", "label") and rng.random() < 0.2
    return [*line, "--quiet", *(["--json", rng.choice([*FILES, "-"])] if has_json else [])]


def changed_files(root: Path, before: dict[str, str], line: list[str]) -> list[str]:
    """Run a command line; return the files of somebody else that it has changed."""
    with pytest.raises(SystemExit) as end:
        main(line)
    assert end.value.code in (0, 1, 2), line
    now = snapshot(root)
    return [name for name, content in before.items() if now.get(name) != content]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    make_tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "QUICK_SCENES", {"train": 4, "test": 1})
    make_conversions_fast(monkeypatch)
    # The labelling page opens its folder, and ends before anybody paints.
    monkeypatch.setattr(LabelServer, "run", lambda self, sockets: None)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_the_random_lines_have_every_command_and_option() -> None:
    """``useg serve`` writes no file."""
    rng, used = random.Random(0), dict[str, set[str]]()
    for _ in range(5000):
        line = random_line(rng)
        used.setdefault(line[0], set()).update(line)
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert {*used} == {*commands} - {"serve"}
    for name in used:
        options = {each for option in commands[name].params for each in option.opts}
        options |= {each for option in commands[name].params for each in option.secondary_opts}
        options = {each for each in options if each.startswith("--")}
        assert options - used[name] - OPTIONS_WITHOUT_FILES == set(), name


@pytest.mark.filterwarnings("ignore")
def test_random_command_lines_change_no_file_of_somebody_else(tree: Path) -> None:
    before, rng = snapshot(tree), random.Random(int(os.environ.get("USEG_SEED", "0")))
    for number in range(COUNT):
        line = random_line(rng)
        assert changed_files(tree, before, line) == [], f"{number}: {line}"
        if number % 100 == 99:
            for name in ("new", "new2", "empty_name"):
                shutil.rmtree(tree / name, ignore_errors=True)
    assert not [path for path in tree.rglob("*") if is_draft(path) or path.name == LOCK_NAME]


@contextmanager
def plain_save(path: Path, is_own: object) -> Iterator[Path]:
    yield path


@pytest.mark.parametrize("out", ["set/masks", "names"])
def test_a_plain_save_is_found(out: str, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict_files, "refuse_foreign_files", lambda targets: None)
    line = ["predict", "model.safetensors", "set/images", "--out", out, "--quiet"]
    before = snapshot(tree)
    assert changed_files(tree, before, line) == [], "what puts files in place refuses them too"
    monkeypatch.setattr(image_files, "replacing", plain_save)
    assert f"{out}/p0.png" in changed_files(tree, before, line)


def test_outputs_of_useg_are_replaced(tree: Path) -> None:
    lines = [
        ["predict", "model.safetensors", "set/images", "--out", "new", "--coco", "--areas"],
        ["inspect", "set", "--html", "new/a.html", "--json", "new/a.json"],
        ["export", "model.safetensors", "new/a.onnx"],
        ["export", "model.safetensors", "site2/"],
    ]
    for line in [*lines, *lines]:
        options = ["--overwrite"] if line[0] == "predict" else []
        with pytest.raises(SystemExit) as end:
            main([*line, *options, "--quiet"])
        assert end.value.code in (0, 1), line
    assert is_own_json(tree / "new/a.json")
