"""Labelling on many machines: listing, marks, writing; with USEG_SOAK=1 also Ray itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from made_inference import make_model, make_predictor

from useg.errors import DataError, MachineError, MissingPackageError, SettingsError, UsageError
from useg.images.image_files import read_image, read_mask, write_picture
from useg.inference import cluster
from useg.inference.cluster import (
    ClusterJob,
    StorageFolder,
    Worker,
    cluster_label_path,
    list_images,
    predict_cluster,
    read_model_files,
    write_model_files,
)
from useg.inference.outputs import OutputOptions
from useg.inference.predict_files import predict
from useg.models.segmenter import save_model

pytest.importorskip("pyarrow", reason="needs the extra 'ray'")


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)


def local(folder: Path) -> StorageFolder:
    return StorageFolder(str(folder))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in/north").mkdir(parents=True)
    for k, name in enumerate(("b.png", "a.1.jpg", "north/b.png")):
        write_picture(tmp_path / "in" / name, picture(k))
    (tmp_path / "in/notes.txt").write_text("not a picture")
    (tmp_path / "in/.b.png").write_text("hidden")
    return tmp_path / "in"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    save_model(make_model(), tmp_path / "run/model.safetensors")
    return tmp_path / "run"


@pytest.fixture
def memory() -> StorageFolder:
    """A store that is not a disk, as S3 is not."""
    from fsspec.implementations.memory import MemoryFileSystem
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    folder = StorageFolder("s3://bucket/labels")
    folder.opened = (PyFileSystem(FSSpecHandler(MemoryFileSystem())), "labels")
    return folder


@pytest.fixture
def make_worker(model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Worker]:
    """Make a worker without Ray."""
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=lambda files: files))

    def make(source: StorageFolder, out: StorageFolder, fingerprint: str = "a model") -> Worker:
        return Worker(read_model_files(model), ClusterJob([source], out, fingerprint, None))

    return make


def block(paths: list[str]) -> dict[str, np.ndarray]:
    return {
        "number": np.arange(len(paths)) + 7,
        "folder": np.zeros(len(paths), int),
        "path": np.array(paths, object),
    }


def test_subfolders_are_listed_and_hidden_files_skipped(folder: Path, tmp_path: Path) -> None:
    write_picture(tmp_path / "c.png", picture(9))
    listed = list_images([str(folder), str(tmp_path / "c.png")], local(tmp_path / "out"))
    assert [(each.name, paths) for each, paths in listed] == [
        (str(folder), ["a.1.jpg", "b.png", "north/b.png"]),
        (str(tmp_path), ["c.png"]),
    ]
    targets = [cluster_label_path(path) for path in listed[0][1]]
    assert targets == ["a.1.png", "b.png", "north/b.png"]


def test_addresses_are_opened_by_arrow(folder: Path, tmp_path: Path) -> None:
    opened = StorageFolder(folder.as_uri())
    assert not opened.is_local
    assert opened.images() == local(folder).images()
    assert opened.read("b.png") == (folder / "b.png").read_bytes()
    message = r"ftp://here cannot be opened \(.*\); give a folder, or one at s3://, gs://, abfs://"
    with pytest.raises(MachineError, match=message):
        list_images(["ftp://here/"], local(tmp_path / "out"))


def test_a_source_without_images_is_refused(folder: Path, tmp_path: Path) -> None:
    message = r"there is no image at .*nothing; give image files or folders of them"
    with pytest.raises(DataError, match=message):
        list_images([str(folder), str(folder / "nothing")], local(tmp_path / "out"))


def test_label_maps_among_the_images_are_refused(folder: Path) -> None:
    for out in (folder, folder / "labels"):
        message = r"would lie among the images in .*; choose another folder for the output"
        with pytest.raises(DataError, match=message):
            list_images([str(folder)], local(out))
    list_images([str(folder)], StorageFolder(f"{folder}-labels"))


def test_two_images_of_one_label_map_are_refused(folder: Path, tmp_path: Path) -> None:
    write_picture(folder / "north/b.jpg", picture(0))
    message = r"b\.jpg and .*north/b\.png would both become north/b\.png; predict them into"
    with pytest.raises(DataError, match=message):
        list_images([str(folder)], local(tmp_path / "out"))


def test_an_unknown_runtime_and_a_missing_model_are_refused_before_ray_starts(
    folder: Path, tmp_path: Path, model: Path
) -> None:
    with pytest.raises(SettingsError, match="runtime 'torhc' is not known; choose one of"):
        predict_cluster(model, [str(folder)], str(tmp_path / "out"), runtime="torhc")
    with pytest.raises(UsageError, match="there is no model at"):
        predict_cluster(tmp_path / "none", [str(folder)], str(tmp_path / "out"))


def test_without_ray_the_install_line_is_given(
    folder: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'useg\[ray\]'"):
        predict_cluster(model, [str(folder)], str(tmp_path / "out"))


def test_a_model_travels_as_bytes(model: Path, tmp_path: Path) -> None:
    written = write_model_files(read_model_files(model), tmp_path)
    assert written.read_bytes() == (model / "model.safetensors").read_bytes()


def test_a_worker_labels_a_block_and_gives_reasons_for_failures(
    folder: Path, tmp_path: Path, make_worker: Callable[..., Worker]
) -> None:
    (folder / "broken.png").write_bytes(b"broken")
    worker = make_worker(local(folder), local(tmp_path / "out"))
    rows = worker(block(["a.1.jpg", "b.png", "broken.png", "gone.png", "north/b.png"]))
    assert rows["number"].tolist() == [7, 8, 9, 10, 11]
    assert not rows["kept"].any()
    assert [bool(reason) for reason in rows["reason"]] == [False, False, True, True, False]
    assert "broken.png' is not an image that useg can read" in rows["reason"][2]
    assert rows["reason"][3].startswith(f"{folder}/gone.png: FileNotFoundError: ")
    written = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.*")]
    assert sorted(map(str, written)) == ["a.1.png", "b.png", "north/b.png"]
    predictor = make_predictor(make_model())
    for path in ("a.1.jpg", "b.png", "north/b.png"):
        label = read_mask(tmp_path / "out" / cluster_label_path(path))
        assert (label == predictor(read_image(folder / path))).all()


def test_a_worker_keeps_label_maps_of_the_same_model_and_image(
    folder: Path, tmp_path: Path, make_worker: Callable[..., Worker]
) -> None:
    out, paths = local(tmp_path / "out"), ["a.1.jpg", "b.png"]
    assert make_worker(local(folder), out)(block(paths))["kept"].tolist() == [False, False]
    assert make_worker(local(folder), out)(block(paths))["kept"].tolist() == [True, True]
    write_picture(folder / "b.png", picture(5))
    assert make_worker(local(folder), out)(block(paths))["kept"].tolist() == [True, False]


def test_a_label_map_of_another_program_stays(
    folder: Path, tmp_path: Path, memory: StorageFolder, make_worker: Callable[..., Worker]
) -> None:
    for out in (local(tmp_path / "out"), memory):
        out.write("a.1.png", b"of another program")
        rows = make_worker(local(folder), out)(block(["a.1.jpg", "b.png"]))
        assert "this job would replace 1 file that useg did not write" in rows["reason"][0]
        assert rows["reason"][1] == ""
        assert out.read("a.1.png") == b"of another program"
    out = local(tmp_path / "out")
    with pytest.raises(UsageError, match=r"a\.1\.png; choose another folder"):
        cluster._refuse_foreign_files(out, list_images([str(folder)], out))


def test_a_label_map_of_another_model_is_made_again(
    folder: Path, tmp_path: Path, make_worker: Callable[..., Worker]
) -> None:
    out = local(tmp_path / "out")
    assert make_worker(local(folder), out)(block(["a.1.jpg"]))["kept"].tolist() == [False]
    worker = make_worker(local(folder), out, "another model")
    assert worker(block(["a.1.jpg"]))["kept"].tolist() == [False]
    assert worker(block(["a.1.jpg"]))["kept"].tolist() == [True]


def test_marks_are_those_of_predict_on_one_machine(
    folder: Path, tmp_path: Path, model: Path, make_worker: Callable[..., Worker]
) -> None:
    fingerprint = cluster._cluster_fingerprint(model, None)
    worker = make_worker(local(folder), local(tmp_path / "out"), fingerprint)
    worker(block(["a.1.jpg", "b.png"]))
    outcome = predict(model, folder, tmp_path / "out", wanted=OutputOptions(overlays=False))
    assert (outcome.num_images, outcome.kept) == (2, 2)


def test_a_worker_writes_into_a_store_that_is_not_a_disk(
    memory: StorageFolder, folder: Path, make_worker: Callable[..., Worker]
) -> None:
    worker = make_worker(local(folder), memory)
    assert worker(block(["b.png"]))["kept"].tolist() == [False]
    assert memory.read("b.png").startswith(b"\x89PNG")
    assert worker(block(["b.png"]))["kept"].tolist() == [True]
    assert not memory.has_mark("missing.png", "mark")


def test_temporary_files_of_killed_workers_are_removed_and_nothing_else(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / "north").mkdir(parents=True)
    left = ("b.png", ".b.png", ".a.1-tree.png", ".useg-0123.png")
    for name in (*left, ".useg-0123456789abcdef.png", "north/.useg-fedcba9876543210.png"):
        (out / name).touch()
    cluster._clear_drafts(out)
    assert sorted(path.name for path in out.rglob("*") if path.is_file()) == sorted(left)


SCRIPT = """
import json, os, signal, sys
from pathlib import Path

import ray

from useg.inference import cluster

KILLED = []


class Fatal(cluster.Worker):
    def label(self, folder, path):
        if "fatal" in path:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().label(folder, path)


def kill_one(done, total):
    if done < 3 or KILLED:
        return
    mark = f"USEG_MARK={os.environ['USEG_MARK']}".encode()
    for process in Path("/proc").iterdir():
        try:
            command = process.name.isdigit() and (process / "cmdline").read_bytes()
            named = command and command.startswith(b"ray::MapWorker")
            if named and mark in (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
                KILLED.append(int(process.name))
                return
        except OSError:
            pass  # it has ended, or is not ours


model, source, out, mode = sys.argv[1:]
cluster.Worker = Fatal
progress = kill_one if mode == "kill" else lambda done, total: None
outcomes = [
    cluster.predict_cluster(model, [source], out, workers=2, progress=progress)
    for _ in range(2 if mode == "kill" else 1)
]
print(json.dumps([
    [each.num_images, each.kept, {str(f.path): f.reason for f in each.failed}, len(KILLED)]
    for each in outcomes
]))
"""


@pytest.mark.skipif(not os.environ.get("USEG_SOAK"), reason="half a minute: make soak")
@pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="finds the worker to kill in /proc"
)
@pytest.mark.parametrize("mode", ["kill", "fatal"])
def test_two_workers_of_which_one_is_killed(mode: str, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra 'ray'")
    (tmp_path / "in").mkdir()
    names = [f"{k:02d}.png" for k in range(40)]
    for k, name in enumerate(names):
        write_picture(tmp_path / "in" / name, picture(k))
    bad = "broken.png" if mode == "kill" else "fatal.png"
    (tmp_path / "in" / bad).write_bytes(b"broken")
    folders = [str(model), str(tmp_path / "in"), str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *folders, mode],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "USEG_MARK": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])
    reason = (
        "is not an image that useg can read"
        if mode == "kill"
        else "its worker died 6 times; check the memory of the machines and this image"
    )
    for again, (num_images, kept, failed, killed) in enumerate(outcomes):
        assert num_images == 41
        assert list(failed) == [str(tmp_path / "in" / bad)]
        assert reason in failed[str(tmp_path / "in" / bad)]
        assert killed == (mode == "kill")
        # In the first run, only label maps that the killed worker wrote but did not report.
        assert kept == 40 if again else kept <= 2
    predictor = make_predictor(make_model())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name in names:
        label = read_mask(tmp_path / "out" / name)
        assert (label == predictor(read_image(tmp_path / "in" / name))).all()
