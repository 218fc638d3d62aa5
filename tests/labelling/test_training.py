"""Training properly: what it starts from, what it is trained on, and what its score is."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from made_labelling import LabelSite, scene
from waiting import eventually

from useg.classes import ClassTable
from useg.labelling import round_process, session
from useg.labelling.round_process import choose_start, train_final_model
from useg.models.segmenter import Segmenter, load_model, save_model
from useg.training import loop

pytestmark = pytest.mark.usefixtures("blank_charts")

NAMES = ("ground", "square")
NETWORK = {"encoder": "plain", "width": 2, "depth": 1, "padding": "same", "normalize": False}
# Stands for the process that trains on everything: says its task.
CHILD = """
import json, sys
task = json.loads(sys.stdin.readline())
print(json.dumps({"step": 3, "steps": 4}), flush=True)
open(task["out"] + ".json", "w").write(json.dumps(task))
print(json.dumps({"said": "it is trained"}), flush=True)
"""


def write_model(folder: Path, names: tuple[str, ...] = NAMES, width: int = 2) -> Path:
    """Write an untrained model that was scored, at a temperature of its own."""
    folder.mkdir(parents=True)
    network = {**NETWORK, "width": width, "channels": 3, "classes": len(names)}
    scores = {"mean_iou": 0.25, "num_images": 2}
    model = Segmenter(
        network,
        ClassTable(names),
        [100.0] * 3,
        [50.0] * 3,
        provenance={"validation": scores},
        temperature=1.5,
    )
    save_model(model.eval(), folder / "model.safetensors")
    return folder


def paint(site: LabelSite, *numbers: int) -> None:
    """Paint a corner of each image."""
    for k in numbers:
        ids = scene(k)[1][:24, :32]
        site.session.paint(k, (0, 0), ids, site.session.folder.read(k)[1])


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What would be run in the place of ``useg train``; the second part says its task."""
    asked: list[list[str]] = []
    run = session.FinalTraining._run

    def fake(own: session.FinalTraining, command: list[str], task: str = "") -> bool:
        asked.append(command)
        shown = [sys.executable, "-c", CHILD if task else "print('a line')"]
        return run(own, shown, task)

    monkeypatch.setattr(session.FinalTraining, "_run", fake)
    return asked


def test_training_is_scored_first_and_then_goes_on_from_the_last_round_with_all_images(
    site: LabelSite, commands: list[list[str]], tmp_path: Path
) -> None:
    paint(site, 0, 2)
    site.session.rounds._start = "last-round"
    assert site.ask("/train?minutes=8", b"").status == 200
    out = tmp_path / "useg-run-1"
    eventually(lambda: not site.session.training.state()["running"])
    state = site.session.training.state()
    assert (state["line"], state["failed"]) == ("it is trained", False)
    assert commands[0][2:5] == ["useg", "train", str(tmp_path)]
    assert commands[0][5:9] == ["--out", str(out / "scored"), "--minutes", "2"]
    task = json.loads(out.with_name("useg-run-1.json").read_text())
    assert [Path(path).name for path in task["images"]] == ["p0.png", "p2.png"]
    assert (task["start"], task["scored"]) == ("last-round", str(out / "scored"))
    assert (task["minutes"], task["out"]) == (6, str(out))
    assert site.session.rounds.paused is False


def test_stopped_training_does_not_begin_its_second_part(
    site: LabelSite, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    paint(site, 0, 1)
    training = site.session.training
    # The first part ends by itself while somebody stops the training.
    monkeypatch.setattr(training, "_train_scored", lambda out: training.stop() or True)
    training.start(3)
    eventually(lambda: not training.state()["running"])
    assert training.state()["failed"]
    assert commands == [[sys.executable, "-m", "useg.labelling.round_process"]]
    assert training.state()["line"] == ""


def test_a_link_that_leads_nowhere_is_not_the_folder_of_a_new_training(
    site: LabelSite, commands: list[list[str]], tmp_path: Path
) -> None:
    paint(site, 0, 1)
    (tmp_path / "useg-run-1").symlink_to(tmp_path / "elsewhere")
    site.session.training.start(3)
    eventually(lambda: not site.session.training.state()["running"])
    assert site.session.training.state()["out"] == str(tmp_path / "useg-run-2")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ({}, "last"),
        ({"names": ("square", "ground")}, "scored"),
        ({"width": 4}, "scored"),
        (None, "scored"),
    ],
)
def test_the_last_round_is_gone_on_from_if_it_is_what_is_planned(
    last: dict | None, expected: str, tmp_path: Path
) -> None:
    scored = write_model(tmp_path / "scored")
    if last is not None:
        write_model(tmp_path / "last", **last)
    assert choose_start(str(tmp_path / "last"), scored) == tmp_path / expected
    assert choose_start(None, scored) == scored


def test_the_last_model_is_trained_on_all_images_and_has_the_score_of_another(
    site: LabelSite, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paint(site, 0, 1)
    before = {path: path.read_bytes() for path in (tmp_path / "masks").iterdir() if path.is_file()}
    out = tmp_path / "useg-run-1"
    scored, last = write_model(out / "scored"), write_model(tmp_path / "last")
    task = site.session.rounds.final_training_task(out, 0.05)
    train_final_model({**task, "start": str(last), "scored": str(scored)}, 0.0)
    model = load_model(out)
    assert model.provenance["num_train"] == 2
    assert model.provenance["start"]["model"] == "last"
    assert model.provenance["validation"] == {"mean_iou": 0.25, "num_images": 2}
    assert "scored_by" in model.provenance
    assert model.temperature == 1.5
    said = json.loads(capsys.readouterr().out.splitlines()[-1])["said"]
    assert "was trained on all 2 painted images. " in said
    assert "reached 25.0 % mIoU on 2 held-out images" in said
    # Nothing that was painted has changed.
    assert {path: path.read_bytes() for path in before} == before


def test_the_last_model_is_the_mean_of_its_weights_before_and_after(
    site: LabelSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(folder: Path, weight: float) -> Path:
        model = load_model(write_model(folder))
        for value in model.state_dict().values():
            value.fill_(weight)
        save_model(model, folder / "model.safetensors")
        return folder

    paint(site, 0, 1)
    out = tmp_path / "useg-run-1"
    scored, last = write_model(tmp_path / "scored"), write(tmp_path / "last", 1)
    monkeypatch.setattr(loop, "fit", lambda dataset, folder, *rest, **more: write(folder, 3))
    task = site.session.rounds.final_training_task(out, 1)
    train_final_model({**task, "start": str(last), "scored": str(scored)}, 0.0)
    weights = load_model(out).network.state_dict().values()
    assert {float(value) for each in weights for value in each.unique()} == {2.5}


def test_stopped_training_keeps_what_it_has_learned(
    site: LabelSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paint(site, 0, 1)
    out = tmp_path / "useg-run-1"
    scored = write_model(out / "scored")

    def step(own: object, row: dict, *rest: object) -> None:
        if row["step"] == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(round_process._Progress, "step", step)
    task = site.session.rounds.final_training_task(out, 20)
    train_final_model({**task, "scored": str(scored)}, 0.0)
    assert 2 <= load_model(out).provenance["step"] <= 3
    assert load_model(out).temperature == 1.5
    assert load_model(scored).provenance["validation"]["num_images"] == 2


@pytest.mark.parametrize(("task", "expected"), [({}, "round 10"), ({"scored": "a"}, "last 0")])
def test_only_rounds_leave_the_processor_to_the_page(task: dict[str, str], expected: str) -> None:
    code = (
        "import os, useg.machine as machine, useg.labelling.round_process as process\n"
        "machine.tune = lambda: None\n"
        "process.train_round = lambda *_: print('round', os.nice(0) - before)\n"
        "process.train_final_model = lambda *_: print('last', os.nice(0) - before)\n"
        "before = os.nice(0)\n"
        "process._main()\n"
    )
    child = [sys.executable, "-c", code]
    with subprocess.Popen(
        child, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(json.dumps(task) + "\n")
        process.stdin.flush()
        assert process.stdout.read().strip() == expected
