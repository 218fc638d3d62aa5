"""Many machines: what is found, read, kept and written; with USEG_SOAK=1 also Ray itself, two workers of which one is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from made_inference import make_model, make_predictor

from useg.errors import UsageError
from useg.images.files import encode_picture, read_image, read_mask, write_picture
from useg.inference.cluster import (
    StorageFolder,
    Worker,
    cluster_label_path,
    list_images,
    predict_cluster,
    read_model_files,
    write_model_files,
)
from useg.models.segmenter import save_model

pytest.importorskip("pyarrow", reason="needs the extra 'ray'")


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)


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
    """A store that is no disk, as S3 is none."""
    from fsspec.implementations.memory import MemoryFileSystem
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    place = StorageFolder("s3://bucket/labels")
    place.opened = (PyFileSystem(FSSpecHandler(MemoryFileSystem())), "labels")
    return place


def make_worker(
    model: Path, places: list[StorageFolder], out: StorageFolder, monkeypatch: pytest.MonkeyPatch
) -> Worker:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=lambda files: files))
    return Worker(read_model_files(model), None, places, out)


def block(paths: list[str]) -> dict[str, np.ndarray]:
    return {
        "number": np.arange(len(paths)) + 7,
        "place": np.zeros(len(paths), int),
        "path": np.array(paths, object),
    }


def test_folders_are_looked_through_and_files_taken_as_they_are(
    folder: Path, tmp_path: Path
) -> None:
    write_picture(tmp_path / "c.png", picture(9))
    found = list_images(
        [str(folder), str(tmp_path / "c.png")], StorageFolder(str(tmp_path / "out"))
    )
    assert [(place.name, paths) for place, paths in found] == [
        (str(folder), ["a.1.jpg", "b.png", "north/b.png"]),
        (str(tmp_path), ["c.png"]),
    ]
    assert [cluster_label_path(path) for path in found[0][1]] == ["a.1.png", "b.png", "north/b.png"]


def test_addresses_are_opened_by_arrow(folder: Path, tmp_path: Path) -> None:
    place = StorageFolder(folder.as_uri())
    assert not place.is_local
    assert place.images() == StorageFolder(str(folder)).images()
    assert place.read("b.png") == (folder / "b.png").read_bytes()
    with pytest.raises(
        UsageError,
        match=r"ftp://here cannot be opened \(.*\); give a folder, or one at s3://, gs://, abfs:// or hdfs://",
    ):
        list_images(["ftp://here/"], StorageFolder(str(tmp_path / "out")))


def test_what_cannot_be_done_is_said_at_once(folder: Path, tmp_path: Path, model: Path) -> None:
    with pytest.raises(
        UsageError, match=r"there is no image at .*nothing; give image files or folders of them"
    ):
        list_images([str(folder), str(folder / "nothing")], StorageFolder(str(tmp_path / "out")))
    for out in (folder, folder / "labels"):
        with pytest.raises(
            UsageError, match=r"would lie among the images in .*; choose another folder with --out"
        ):
            list_images([str(folder)], StorageFolder(str(out)))
    list_images([str(folder)], StorageFolder(f"{folder}-labels"))
    write_picture(folder / "north/b.jpg", picture(0))
    with pytest.raises(
        UsageError,
        match=r"b\.jpg and .*north/b\.png would both become north/b\.png; predict them into different folders",
    ):
        list_images([str(folder)], StorageFolder(str(tmp_path / "out")))
    with pytest.raises(UsageError, match="runtime 'torhc' is not known; choose one of"):
        predict_cluster(model, [str(folder)], str(tmp_path / "out"), runtime="torhc")
    with pytest.raises(UsageError, match="there is no model at"):
        predict_cluster(tmp_path / "none", [str(folder)], str(tmp_path / "out"))


def test_without_the_package(
    folder: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'useg\[ray\]'"):
        predict_cluster(model, [str(folder)], str(tmp_path / "out"))


def test_a_model_travels_as_bytes(model: Path, tmp_path: Path) -> None:
    assert (
        write_model_files(read_model_files(model), tmp_path).read_bytes()
        == (model / "model.safetensors").read_bytes()
    )


def test_a_worker_labels_a_block_and_lists_what_it_cannot(
    folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "broken.png").write_bytes(b"broken")
    out = StorageFolder(str(tmp_path / "out"))
    worker = make_worker(model, [StorageFolder(str(folder))], out, monkeypatch)
    out.write("b.png", b"from before")
    paths = ["a.1.jpg", "b.png", "broken.png", "gone.png", "north/b.png"]
    reported = worker(block(paths))
    assert reported["number"].tolist() == [7, 8, 9, 10, 11]
    assert reported["kept"].tolist() == [False, True, False, False, False]
    assert [bool(reason) for reason in reported["reason"]] == [False, False, True, True, False]
    assert "broken.png' is not a picture useg can read" in reported["reason"][2]
    assert reported["reason"][3].startswith(f"{folder}/gone.png: FileNotFoundError: ")
    assert sorted(
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")
    ) == ["a.1.png", "b.png", "north/b.png"]
    assert (tmp_path / "out/b.png").read_bytes() == b"from before"
    predictor = make_predictor(make_model())
    for path in ("a.1.jpg", "north/b.png"):
        assert (
            read_mask(tmp_path / "out" / cluster_label_path(path))
            == predictor(read_image(folder / path))
        ).all()


def test_a_worker_writes_into_a_store_that_is_no_disk(
    model: Path, memory: StorageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.write("in/x.png", encode_picture(picture(0)))
    worker = make_worker(model, [memory], memory, monkeypatch)
    assert (
        worker.label(memory, "in/x.png") == ""
    )  # the label map takes the name of the image here: nothing is asked before it is written
    assert memory.read("in/x.png") != encode_picture(picture(0))
    assert memory.has(["in/x.png", "in/y.png"]) == [True, False]
    assert worker(block(["in/x.png"]))["kept"].tolist() == [True]


SCRIPT = """
import json, os, signal, sys
from pathlib import Path

import ray

from useg.inference import cluster

KILLED = []


class Fatal(cluster.Worker):
    def label(self, place, path):
        if "fatal" in path:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().label(place, path)


def kill_one(done, total):
    if done < 3 or KILLED:
        return
    mark = f"USEG_MARK={os.environ['USEG_MARK']}".encode()
    for process in Path("/proc").iterdir():
        try:
            named = process.name.isdigit() and (process / "cmdline").read_bytes().startswith(b"ray::MapWorker")
            if named and mark in (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
                KILLED.append(int(process.name))
                return
        except OSError:
            pass  # it has ended, or is not ours


model, source, out, mode = sys.argv[1:]
cluster.Worker = Fatal
progress = kill_one if mode == "kill" else lambda done, total: None
outcomes = [cluster.predict_cluster(model, [source], out, workers=2, progress=progress) for _ in range(2 if mode == 'kill' else 1)]
print(json.dumps([[each.num_images, each.num_kept, each.failed, len(KILLED)] for each in outcomes]))
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
    command = [
        sys.executable,
        "-c",
        SCRIPT,
        str(model),
        str(tmp_path / "in"),
        str(tmp_path / "out"),
        mode,
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "USEG_MARK": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])
    reason = (
        "is not a picture useg can read"
        if mode == "kill"
        else "its worker died 6 times; look at its memory and at this image"
    )
    for again, (num_images, num_kept, failed, killed) in enumerate(outcomes):
        assert num_images == 41
        assert list(failed) == [str(tmp_path / "in" / bad)]
        assert reason in failed[str(tmp_path / "in" / bad)]
        assert killed == (mode == "kill")
        assert (
            num_kept == 40 if again else num_kept <= 2
        )  # those that a worker had written, but not reported
    predictor = make_predictor(make_model())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert all(
        (read_mask(tmp_path / "out" / name) == predictor(read_image(tmp_path / "in" / name))).all()
        for name in names
    )
