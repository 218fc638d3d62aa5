"""Results equal those that are stored: losses, label maps, scores, exports, splits, findings.

A change that should not alter results passes. One that should stores new results, on purpose:
``USEG_GOLDEN=write pytest tests/test_golden.py``. The tests use the public functions and the
command line alone, so modules can move, and they compare no sentences, so messages can be
rewritten. An earlier useg wrote the files in ``golden/old`` (see ``golden_artefacts.py``); they
must still load.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import golden_data
import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
from blank_charts import render_nothing
from golden_data import pixels_of
from golden_store import OLD, answer, check, check_label_maps, cli, digest

import useg

RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "valid": {"model.padding": "valid", "model.depth": 2, "data.size": "96x64"},
    "paper": {
        "model.normalize": False,
        "train.loss": "ce",
        "train.class_weights": "none",
        "train.learning_rate": 1e-3,
    },
    "pretrained": {"model.encoder": "lite0", "data.standardize": True, "train.steps": 5},
    "losses": {
        "train.loss": "focal + 0.5 lovasz + 0.1 boundary",
        "train.accumulate": 2,
        "train.steps": 6,
    },
    "coarse": {
        "train.coarse": 0.5,
        "data.size": None,
        "data.scale": 0.75,
        "data.crop": "48x48",
        "train.flips": "all",
        "train.steps": 8,
    },
    "muon": {"train.optimizer": "muon", "train.steps": 8},
    "adam": {
        "train.optimizer": "adam",
        "train.schedule": "cosine",
        "train.seed": 3,
        "model.dropout": 0.3,
        "train.steps": 8,
    },
}
QUICK = {
    "model.width": 4,
    "data.size": "64x48",
    "data.standardize": False,
    "train.precision": "fp32",
    "train.steps": 14,
    "train.optimizer": "adamw",
    "data.split": "random",
    "train.validate_every": 100,
}
MODELS = {
    "valid": OLD / "valid.safetensors",
    "grey": OLD / "grey.safetensors",
    "run": OLD / "ended",
}
ENCODERS = ("lite0", "resnet18", "cnn", "fcn8s")
NETWORKS = (
    "lite0",
    "lite1",
    "lite2",
    "resnet18",
    "resnet34",
    "resnet50",
    "cnn",
    "fcn32s",
    "fcn16s",
    "fcn8s",
)
INFERENCE = 1e-3  # relative tolerance of what a stored model answers
PLACES = [(0, 0), (0, -1), (7, 11), (20, 5), (-1, 0), (-1, -1), (-9, -20), (13, 31)]


pytestmark = pytest.mark.usefixtures("blank_charts")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute in one thread: how many there are changes the last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Made data sets in several layouts."""
    folder = tmp_path_factory.mktemp("golden_data")
    return {name: make(folder / name) for name, make in golden_data.LAYOUTS.items()}


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder, so that paths in results are relative."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


# Scenes


def test_scenes_are_the_same_to_the_last_pixel(tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    for name, count, size, seed in (
        ("small", 3, "64x48", 0),
        ("usual", 2, "256x192", 7),
        ("odd", 2, "97x75", 3),
    ):
        golden_data.scenes(tmp_path / name, count, size, seed)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        found[name] = {
            path.relative_to(tmp_path / name).as_posix(): digest(pixels_of(path))
            if path.suffix == ".png"
            else hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            for path in files
        }
    check("scenes", found)


# Loss curves, and runs that go on


Logs = dict[str, tuple[dict[str, Any], ...]]


@pytest.fixture(scope="module")
def logs(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Logs:
    folder = tmp_path_factory.mktemp("curves")
    return {
        name: useg.train(data["scenes"], folder / name, settings={**QUICK, **changes}).log
        for name, changes in RECIPES.items()
    }


def test_every_recipe_gives_the_curve_that_is_kept(logs: Logs) -> None:
    # Other processors round differently, and a run amplifies that. A change of the recipe shows at
    # the second or third digit.
    curves = {name: [row["loss"] for row in log] for name, log in logs.items()}
    check("loss_curve", curves, rtol=2e-3)


def test_every_recipe_has_the_same_schedule(logs: Logs) -> None:
    keys = ("step", "epoch", "learning_rate")
    check(
        "schedules",
        {name: {key: [row[key] for row in log] for key in keys} for name, log in logs.items()},
    )


def test_the_same_recipe_gives_the_same_curve_to_the_bit(
    logs: Logs, data: dict[str, Path], tmp_path: Path
) -> None:
    settings = {**QUICK, "train.deterministic": True}
    try:
        run = useg.train(data["scenes"], tmp_path / "run", settings=settings)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [row["loss"] for row in run.log] == [row["loss"] for row in logs["plain"]]


def test_old_runs_go_on(data: dict[str, Path], tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    for name in ("interrupted", "ended"):
        shutil.copytree(OLD / name, tmp_path / name)
        before = (tmp_path / name / "log.jsonl").read_text()
        code, _ = cli("--quiet", "train", data["scenes"], "--out", tmp_path / name, "--resume")
        assert code == 0
        after = (tmp_path / name / "log.jsonl").read_text()
        assert after.startswith(before), f"{name}: the steps that were done have changed"
        assert {"report.html", "scores.json", "curves.png"} <= {
            path.name for path in (tmp_path / name).iterdir()
        }
        rows = [json.loads(line) for line in after.splitlines()]
        found[name] = {
            key: [row[key] for row in rows]
            for key in ("step", "epoch", "learning_rate", "loss", "mean_iou")
        }
    # The run that went on is the unbroken one, up to what another processor rounds.
    assert np.allclose(found["interrupted"]["loss"], found["ended"]["loss"], rtol=2e-3)
    check("resumed", found, rtol=5e-3)


# Old models: label maps, logits, scores


def pretend(name: str, folder: Path) -> Path:
    """Write a model file with an old file's header and tensor names, and with random numbers.

    The files themselves are too large to store.
    """
    content = json.loads((OLD / f"{name}.json").read_text())
    rng = np.random.default_rng(0)
    tensors = {}
    for key, (kind, shape) in content["tensors"].items():
        numbers = rng.standard_normal(shape, np.float32)
        if kind == "I64":
            tensors[key] = torch.ones(shape, dtype=torch.int64)
            continue
        if key in ("mean", "std"):
            numbers = np.full(shape, 110 if key == "mean" else 60, np.float32)
        elif len(shape) > 1:
            numbers *= np.float32((2 / np.prod(shape[1:])) ** 0.5)
        elif key.endswith(("running_var", "weight")):
            numbers = 1 + np.abs(numbers) / 10
        else:
            numbers /= 10
        tensors[key] = torch.from_numpy(numbers)
    sums = hashlib.sha256(content["header"].encode())
    for key in sorted(tensors):
        sums.update(f"{key} {tensors[key].dtype} {tuple(tensors[key].shape)}".encode())
        sums.update(tensors[key].numpy().tobytes())
    path = folder / f"{name}.safetensors"
    path.write_bytes(
        safetensors.torch.save(tensors, {"useg": f"{sums.hexdigest()} {content['header']}"})
    )
    return path


@pytest.fixture(scope="session")
def photos(
    data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, np.ndarray]:
    """Colour pictures of several sizes."""
    folder = tmp_path_factory.mktemp("photos")
    sizes = {"same": "96x72", "larger": "150x113", "smaller": "41x33"}
    found = {}
    for k, (name, size) in enumerate(sizes.items()):
        golden_data.scenes(folder / name, 1, size, 20 + k)
        [path] = (folder / name / "CameraRGB").iterdir()
        found[name] = pixels_of(path)
    return found


@pytest.fixture(scope="session")
def greys() -> dict[str, np.ndarray]:
    """Grey pictures of 16 bits."""
    found = {}
    for k, size in enumerate([(48, 48), (61, 47)]):
        label = golden_data.shapes(700 + k, size, 2).astype(np.uint16)
        found[f"{size[0]}x{size[1]}"] = label * 9000 + np.random.default_rng(k).integers(
            500, 6000, label.shape, np.uint16
        )
    return found


Answers = tuple[dict[str, np.ndarray], dict[str, Any]]


@pytest.fixture(scope="session")
def answers(
    photos: dict[str, np.ndarray],
    greys: dict[str, np.ndarray],
    tmp_path_factory: pytest.TempPathFactory,
) -> Answers:
    """What old models answer: label maps, and numbers about them."""
    folder = tmp_path_factory.mktemp("models")
    kinds: dict[str, tuple[useg.Predictor, dict[str, np.ndarray], int | None]] = {
        "valid": (useg.load(MODELS["valid"]), photos, None),
        "valid tiled": (useg.load(MODELS["valid"]), photos, 64),
        "valid flips": (useg.load(MODELS["valid"], augment="flips"), photos, None),
        "valid scales": (useg.load(MODELS["valid"], augment="scales"), photos, None),
        "valid onnx": (useg.load(OLD / "valid.onnx"), photos, None),
        "valid openvino": (useg.load(OLD / "valid.xml"), photos, None),
        "ensemble": (useg.load(f"{MODELS['valid']},{MODELS['run']}"), photos, None),
        "run": (useg.load(MODELS["run"]), photos, None),
        "run tiled": (useg.load(MODELS["run"]), photos, 64),
        "interrupted": (useg.load(OLD / "interrupted"), photos, None),
        "grey": (useg.load(MODELS["grey"]), greys, None),
        "grey turns": (useg.load(MODELS["grey"], augment="turns"), greys, 32),
        **{
            name: (useg.load(pretend(name, folder)), {"same": photos["same"]}, None)
            for name in ENCODERS
        },
    }
    labels, numbers = {}, {}
    for name, (predictor, pictures, tile) in kinds.items():
        for which, image in pictures.items():
            label = predictor(image, tile)
            logits, probabilities = (
                predictor.logits(image, tile),
                predictor.probabilities(image, tile),
            )
            labels[f"{name}, {which}"] = label
            numbers[f"{name}, {which}"] = {
                "histogram": np.bincount(label.ravel(), minlength=len(probabilities)).tolist(),
                "logits": [logits[:, y, x].tolist() for y, x in PLACES],
                "scale": float(np.abs(logits).max()),
                "probabilities": probabilities.mean((1, 2)).tolist(),
                "classes": list(predictor.classes.names),
            }
    return labels, numbers


def test_old_models_give_the_label_maps_that_are_kept(
    answers: Answers, record_property: Callable[[str, object], None]
) -> None:
    record_property(
        "label maps that are not equal to the last pixel",
        check_label_maps("label_maps", answers[0]),
    )


@pytest.fixture(scope="session")
def slack(answers: Answers) -> float:
    """How far counts of pixels may differ: not at all where every label map is as stored."""
    return 2e-3 if check_label_maps("label_maps", answers[0]) else 0.0


def test_old_models_give_the_numbers_that_are_kept(answers: Answers, slack: float) -> None:
    largest = max(entry["scale"] for entry in answers[1].values() if entry["scale"] < 100)
    check("logits", answers[1], rtol=INFERENCE, atol=1e-5 * largest, slack=slack)


def test_evaluations_are_the_same(data: dict[str, Path], slack: float, tmp_path: Path) -> None:
    hood = np.zeros((72, 96), np.uint8)
    hood[60:] = 255
    golden_data.save(tmp_path / "hood.png", hood)
    scenes, patients = data["scenes"], data["patients"]
    # The default is the fastest runtime, which differs from machine to machine.
    exact = "--runtime", "torch"
    found = {
        "valid": answer(
            "evaluate", MODELS["valid"], scenes, "--split", "all", "--objects", "Vehicles", *exact
        ),
        "hood": answer(
            "evaluate",
            MODELS["valid"],
            scenes,
            "--ignore-mask",
            tmp_path / "hood.png",
            "--tolerance",
            2,
            *exact,
        ),
        "tiled": answer(
            "evaluate", MODELS["run"], scenes, "--split", "train", "--tile", 48, *exact
        ),
        "run": answer("evaluate", MODELS["run"], scenes, "--augment", "flip", *exact),
        "against": answer(
            "evaluate",
            MODELS["valid"],
            scenes,
            "--split",
            "all",
            "--against",
            MODELS["run"],
            *exact,
        ),
        "grey": answer(
            "evaluate",
            MODELS["grey"],
            patients,
            "--split",
            "all",
            "--membranes",
            "foreground",
            *exact,
        ),
    }
    found["function"] = useg.evaluate(
        MODELS["run"], scenes, html=tmp_path / "report.html"
    ).as_dict()
    assert (tmp_path / "report.md").exists()
    check("evaluations", found, rtol=INFERENCE, atol=1e-4 if slack else 1e-6, slack=slack)


def test_what_predict_writes_is_the_same(
    data: dict[str, Path], slack: float, tmp_path: Path
) -> None:
    pictures = data["scenes"] / "CameraRGB"
    with inside(tmp_path):
        outcome = answer(
            "predict",
            MODELS["valid"],
            pictures,
            "--out",
            "out",
            "--polygons",
            "--coco",
            "--areas",
            "--confidence",
            "png",
            "--probabilities",
            "float16",
            "--min-region",
            6,
            "--max-hole",
            4,
            # A busy machine would look for a faster runtime.
            "--runtime",
            "torch",
        )
        ranking = answer(
            "predict", MODELS["valid"], pictures, "--out", "ranked", "--rank", "--runtime", "torch"
        )
        assert (
            cli(
                "--quiet",
                "predict",
                MODELS["grey"],
                data["patients"] / "images",
                "--out",
                "tif",
                "--labels",
                "tif",
                "--runtime",
                "torch",
            )[0]
            == 0
        )
        shard = answer(
            *("predict", MODELS["run"], pictures, "--out", "part", "--shard", "2/3"),
            *("--no-overlays", "--runtime", "torch"),
        )
    out = tmp_path / "out"
    coco = json.loads((out / "coco.json").read_text())
    features = {
        path.stem: json.loads(path.read_text())["features"]
        for path in sorted((out / "polygons").iterdir())
    }
    found = {
        "outcome": {**outcome, "files": None},
        "tree": {
            path.name: dict(Counter(file.suffix for file in path.rglob("*")))
            for path in sorted(tmp_path.iterdir())
        },
        "label maps": {
            path.stem: np.bincount(pixels_of(path).ravel(), minlength=13).tolist()
            for path in sorted(out.glob("*.png"))
        },
        "areas.csv": list(csv.reader((out / "areas.csv").read_text().splitlines())),
        "coco.json": {
            "images": len(coco["images"]),
            "categories": [[each["id"], each["name"]] for each in coco["categories"]],
            "annotations": sorted(
                Counter(each["category_id"] for each in coco["annotations"]).items()
            ),
            "areas": np.bincount(
                [each["category_id"] for each in coco["annotations"]],
                [each["area"] for each in coco["annotations"]],
            ).tolist(),
            "boxes": np.sum([each["bbox"] for each in coco["annotations"]], 0).tolist(),
        },
        "polygons": {
            stem: sorted((area(each["geometry"]) for each in entries), reverse=True)
            for stem, entries in features.items()
        },
        "probabilities": {
            path.stem: np.asarray(pixels_of(path), np.float64).reshape(13, -1).mean(1).tolist()
            for path in sorted((out / "probabilities").iterdir())
        },
        "confidence": {
            path.stem: pixels_of(path).mean() for path in sorted((out / "confidence").iterdir())
        },
        "overlays": {
            path.stem: list(pixels_of(path).shape) for path in sorted((out / "overlays").iterdir())
        },
        "ranking": [
            [Path(each["path"]).name, each["gain"], each["uncertainty"]]
            for each in ranking["ranking"]
        ],
        "ranking.csv": [
            [Path(cell).name for cell in row[:2]]
            for row in csv.reader((tmp_path / "ranked" / "ranking.csv").read_text().splitlines())
        ],
        "tif": {
            path.stem: np.bincount(pixels_of(path).ravel(), minlength=2).tolist()
            for path in sorted((tmp_path / "tif").glob("*.tif"))
        },
        "shard": [Path(path).name for path in shard["label_maps"]],
    }
    check("predictions", json.loads(json.dumps(found)), rtol=INFERENCE, slack=slack)


def area(geometry: dict[str, Any]) -> float:
    """Area of GeoJSON's polygons in pixels; holes are taken off."""
    polygons = (
        geometry["coordinates"] if geometry["type"] == "MultiPolygon" else [geometry["coordinates"]]
    )
    total = 0.0
    for rings in polygons:
        sizes = []
        for ring in rings:
            x, y = np.array(ring, float).T
            sizes.append(abs(float(x[:-1] @ y[1:] - x[1:] @ y[:-1])) / 2)
        total += sizes[0] - sum(sizes[1:])
    return total


# Exports


@pytest.mark.filterwarnings("ignore")  # of the exporters
def test_exports_answer_as_the_model(
    greys: dict[str, np.ndarray], photos: dict[str, np.ndarray], tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    openvino = pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    found: dict[str, Any] = {}
    for name, image in (
        ("valid.onnx", photos["same"]),
        ("valid.xml", photos["same"]),
        ("grey.xml", greys["48x48"][..., None]),
    ):
        model, path = MODELS[name.partition(".")[0]], tmp_path / name
        said = answer("export", model, path)
        assert said["difference"] < 1e-3
        assert said["agreement"] > 0.999
        difference = np.abs(useg.load(path).logits(image) - useg.load(model).logits(image)).max()
        assert difference < 1e-3, f"{name}: logits differ by {difference} from PyTorch's"
        raw = raw_logits(path, image, onnxruntime, openvino)
        found[name] = {
            "shape": list(raw.shape),
            "logits": [raw[0, :, y, x].tolist() for y, x in PLACES[:3]],
        }
    found["files"] = sorted(path.name for path in tmp_path.iterdir())
    check("exports", found, rtol=INFERENCE, atol=1e-4)


def raw_logits(path: Path, image: np.ndarray, onnxruntime: Any, openvino: Any) -> np.ndarray:
    """Run an exported file without useg; returns logits (1, K, h, w).

    The image is mirrored out to a size that every model here takes.
    """
    x = np.pad(image, ((20, 20 + 4), (20, 20 + 4), (0, 0)), "reflect").transpose(2, 0, 1)[None]
    size = tuple(side // 4 * 4 for side in x.shape[2:])
    x = np.ascontiguousarray(x[:, :, : size[0], : size[1]])
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(
            path.read_bytes(), providers=["CPUExecutionProvider"]
        )
        return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])
    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.asarray(model(x)[0])


# Networks


def test_networks_have_the_same_layers() -> None:
    table = useg.ClassTable(("a", "b", "c", "d", "e"))
    found: dict[str, Any] = {}
    networks: dict[str, Any] = {
        "unet": useg.UNet(3, 5, width=8, padding="same"),
        "unet valid": useg.UNet(1, 2, width=8, padding="valid", depth=2),
    }
    for name in NETWORKS:
        settings = {"encoder": name, "channels": 3, "classes": 5, "width": 16}
        networks[name] = useg.Segmenter(settings, table, [1.0] * 3, [1.0] * 3)
    for name, network in networks.items():
        described = useg.describe(network, (108, 92) if name == "unet valid" else (96, 64))
        names = "\n".join(
            f"{key} {tuple(value.shape)} {value.dtype}"
            for key, value in network.state_dict().items()
        )
        found[name] = {
            "parameters": described.parameters,
            "macs": described.macs,
            "field": described.field,
            "layers": len(described.layers),
            "shapes": [
                sum(each) for each in zip(*(layer.shape for layer in described.layers), strict=True)
            ],
            "geometry": [network.margin, network.stride, network.context, network.valid_size(100)],
            "tensors": len(network.state_dict()),
            "names": hashlib.sha256(names.encode()).hexdigest()[:16],
        }
    paper = useg.describe(useg.UNet(), (572, 572))
    found["paper"] = {
        "parameters": paper.parameters,
        "macs": paper.macs,
        "layers": [
            [layer.name, *layer.shape, layer.parameters, layer.macs, layer.field]
            for layer in paper.layers
        ],
    }
    drawn = re.sub(
        r"<(title|desc)>.*?</\1>", "", useg.drawing(networks["unet"], (96, 64)), flags=re.DOTALL
    )
    found["drawing"] = {
        "texts": [
            text
            for text in re.findall(r">([^<>]+)</text>", drawn)
            if re.fullmatch(r"[\d\s\u00d7x,.]+", text)
        ],
        "boxes": [float(number) for number in re.findall(r'<rect [^>]*?width="([\d.]+)"', drawn)],
        "tags": dict(sorted(Counter(re.findall(r"<(\w+)", drawn)).items())),
    }
    check("networks", found)


# Data sets: layouts, splits, plans, class tables, findings


def test_plans_splits_and_class_tables_are_the_same(
    data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("useg.visualization._render", render_nothing)
    found: dict[str, Any] = {}
    given: dict[str, dict[str, Any]] = {
        "scenes": {},
        "film": {"model.pretrained": False},
        "patients": {},
        "words": {"model.width": 8},
        "official": {"model.depth": 3, "model.normalize": False},
        "outlines": {"model.padding": "valid", "model.depth": 2},
        "patients, groups": {"data.split": "groups", "model.width": 4},
        "scenes, random": {
            "data.split": "random",
            "data.holdout": 0.4,
            "model.width": 4,
            "model.depth": 1,
        },
    }
    for name, settings in given.items():
        out = tmp_path / name
        layout = name.partition(",")[0]
        run = useg.train(
            data[layout], out, settings={"train.steps": 1, "train.precision": "fp32", **settings}
        )
        resolved = tomllib.loads((out / "run.toml").read_text())
        table = useg.load(run.out).classes
        found[name] = {
            "network": resolved["model"],
            "data": resolved["data"],
            "train": resolved["train"],
            "decided": sorted(resolved["provenance"]["plan"]),
            "layout": resolved["provenance"]["layout"],
            "splits": {
                row["image"]: row["split"]
                for row in csv.DictReader((out / "split.csv").read_text().splitlines())
            },
            "classes": [table.names, table.colors, table.values, table.ignore, table.by_color],
            "files": sorted(path.name for path in out.iterdir()),
        }
    check("plans", json.loads(json.dumps(found)))


def test_what_inspect_finds_is_the_same(data: dict[str, Path], tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    spoilt = golden_data.planted(tmp_path / "planted")
    folders = {**data, "planted": spoilt}
    for name, folder in folders.items():
        words = (
            ("--fix", tmp_path / "clean", "--drop-doubtful", "--html", tmp_path / "page.html")
            if name == "planted"
            else ()
        )
        content = answer("inspect", folder, *words, status=int(name == "planted"))
        findings = [
            [each["kind"], each["severity"], len(each["files"])] for each in content.pop("findings")
        ]
        found[name] = {**content, "findings": findings}
    clean = sorted(path for path in (tmp_path / "clean").rglob("*") if path.suffix == ".png")
    found["mended"] = {
        path.relative_to(tmp_path / "clean").as_posix(): digest(pixels_of(path)) for path in clean
    }
    check("findings", found)


# The service


def test_the_service_gives_the_label_map(
    photos: dict[str, np.ndarray], answers: Answers, slack: float, tmp_path: Path
) -> None:
    # It skips where the packages of the service are missing.
    from served import served

    golden_data.save(tmp_path / "picture.png", photos["larger"])
    content, replies = (tmp_path / "picture.png").read_bytes(), {}
    with served(useg.load(MODELS["valid"])) as site:
        for kind in ("image/png", "application/json", "application/geo+json"):
            reply = site.ask("/predict", content, accept=kind, content_type="image/png")
            assert reply.status == 200
            replies[kind] = reply.content
    (tmp_path / "label.png").write_bytes(replies["image/png"])
    with PIL.Image.open(tmp_path / "label.png") as opened:
        label, colors = np.array(opened), opened.getpalette()
    assert digest(label) == digest(answers[0]["valid, larger"]), (
        "the service's label map is not the function's"
    )
    counted = json.loads(replies["application/json"])
    found = {
        "size": [counted["width"], counted["height"]],
        "classes": counted["classes"],
        "palette": colors[: 3 * len(counted["classes"])] if colors else None,
        "polygons": len(json.loads(replies["application/geo+json"])["features"]),
    }
    check("service", found, rtol=INFERENCE, slack=slack)
