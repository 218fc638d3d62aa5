"""The model in the loop: when rounds begin, what they are trained on, and honest scores."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_labelling import LabelSite, labelling, scene, write_images
from waiting import eventually

from useg.classes import IGNORE, ClassTable
from useg.config import Settings, write_settings
from useg.data.dataset import Dataset
from useg.data.layouts import find_dataset
from useg.data.split_files import write_split_csv
from useg.errors import DataError
from useg.labelling import rounds
from useg.labelling.app import LabelOptions, open_session
from useg.labelling.folder import NO_REVISION, LabelFolder
from useg.labelling.mask_files import find_paths
from useg.labelling.round_process import split_painted, train_round
from useg.labelling.rounds import Rounds, Suggestion, _make_suggestion
from useg.models.segmenter import Segmenter, save_model
from useg.scoring.metrics import confusion, mean_iou, tally
from useg.training.warm_start import find_seen

pytestmark = pytest.mark.usefixtures("blank_charts")

CHILD = Path(__file__).parent / "round_child.py"


def write_model(path: Path) -> None:
    """Write an untrained model of the classes of the folder."""
    network = {"encoder": "plain", "width": 2, "depth": 1, "padding": "same", "normalize": False}
    sizes = {"channels": 3, "classes": 2}
    table = ClassTable(("ground", "square"))
    save_model(Segmenter({**network, **sizes}, table, [100.0] * 3, [50.0] * 3).eval(), path)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LabelSite]:
    model = tmp_path / "model.safetensors"
    write_model(model)
    command = [sys.executable, "-S", str(CHILD), str(model), "100"]
    monkeypatch.setattr(rounds, "ROUND_COMMAND", command)
    with labelling(write_images(tmp_path, 6)) as running:
        running.join()
        yield running


def paint(site: LabelSite, k: int, ids: np.ndarray) -> None:
    site.session.paint(k, (0, 0), ids.astype(np.uint8), site.session.folder.read(k)[1])


def test_the_first_round_waits_for_three_images_and_all_classes(site: LabelSite) -> None:
    waits_for = site.session.rounds.waits_for
    assert waits_for() == "Training starts when you paint in 3 more images."
    for k in range(3):
        paint(site, k, np.zeros((4, 4)))
    assert waits_for() == "Training starts when you paint square, too."
    paint(site, 1, np.ones((2, 2)))
    assert waits_for() == ""


def test_a_round_trains_on_what_is_painted_and_ranks_the_rest(
    site: LabelSite, tmp_path: Path
) -> None:
    session = site.session
    for k in range(4):
        paint(site, k, scene(k)[1])
    session.rounds.paused = False
    session.rounds.notify()
    log = tmp_path / "masks" / ".useg-label" / "round-1.json"
    eventually(lambda: session.rounds.status.seconds)
    eventually(log.exists)
    task = json.loads(log.read_text())
    assert [Path(path).name for path in task["images"]] == [f"p{k}.png" for k in range(4)]
    assert [Path(path).name for path in task["others"]] == ["p4.png", "p5.png"]
    assert task["start"] is None
    state = site.ask("/state").json
    assert state["round"] == 1
    assert state["priorities"][4:] == [pytest.approx(0.1), pytest.approx(0.2)]
    suggestion = site.ask("/images/4/suggestion")
    assert (suggestion.headers["x-width"], suggestion.headers["x-height"]) == ("64", "48")
    assert len(suggestion.content) == 3 * 64 * 48
    # The next round goes on from this one, and replaces it.
    eventually(lambda: session.rounds.status.phase == "waiting")
    paint(site, 4, scene(4)[1])
    eventually(lambda: len(session.rounds.status.seconds) == 2)
    eventually(log.with_name("round-2.json").exists)
    assert json.loads(log.with_name("round-2.json").read_text())["start"].endswith("round-1")
    eventually(lambda: not log.with_suffix("").exists())
    # What an earlier model thought of other images does not count any more.
    assert list(session.rounds.gains) == ["p5.png"]


def test_a_round_of_few_steps_suggests_nothing_and_the_next_one_has_more_time(
    site: LabelSite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(rounds, "ROUND_COMMAND", [*rounds.ROUND_COMMAND[:-1], "3"])
    taken = []
    take = Rounds._use_model
    monkeypatch.setattr(
        Rounds, "_use_model", lambda own, *given: (taken.append(given[0]), take(own, *given))
    )
    for k in range(3):
        paint(site, k, scene(k)[1])
    site.session.rounds.paused = False
    site.session.rounds.notify()
    eventually(lambda: taken)
    assert taken == [2]
    task = json.loads((tmp_path / "masks/.useg-label/round-2.json").read_text())
    assert task["minutes"] == 2 * rounds.ROUND_MINUTES
    assert task["start"].endswith("round-1")


def test_a_round_is_not_compared_with_its_start_on_masks_that_were_accepted_from_it(
    tmp_path: Path,
) -> None:
    folder = LabelFolder(find_paths(write_images(tmp_path)), ("ground", "square"))
    for k in range(3):
        folder.patch(k, (0, 0), scene(k)[1], NO_REVISION)
    images = {str(each.path) for each in folder.images[:2]}
    dataset = split_painted(find_dataset(tmp_path), images)
    assert [pair.image.name for pair in dataset.of("train")] == ["p0.png", "p1.png"]
    assert [pair.image.name for pair in dataset.of("val")] == ["p0.png", "p1.png"]
    start = tmp_path / "masks" / ".useg-label" / "round-1"
    start.mkdir(parents=True)
    write_model(start / "model.safetensors")
    write_settings(start / "run.toml", Settings(), {"dataset": str(tmp_path)})
    write_split_csv(start / "split.csv", dataset)
    assert len(find_seen(start, dataset)) == 2


def test_a_round_takes_its_last_weights_and_not_those_that_fit_accepted_masks_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = LabelFolder(find_paths(write_images(tmp_path)), ("ground", "square"))
    for k in range(3):
        folder.patch(k, (0, 0), scene(k)[1], NO_REVISION)
    images = [str(each.path) for each in folder.images]
    asked: list[Settings] = []

    def fit(dataset: Dataset, out: Path, settings: Settings, *rest: Any, **options: Any) -> None:
        asked.append(settings)
        raise DataError("stop here")

    monkeypatch.setattr("useg.training.loop.fit", fit)
    task = {"root": str(tmp_path), "images": images, "others": [], "out": str(tmp_path / "r")}
    with pytest.raises(DataError, match="stop here"):
        train_round({**task, "round": 1, "minutes": 0.6, "start": None}, 0.0)
    # No round has so many epochs: only its last step is validated.
    assert asked[0].train.validate_every > 10**6


def test_a_round_that_fails_says_why_and_the_page_goes_on(
    site: LabelSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import sys; sys.exit('there is no memory')"
    monkeypatch.setattr(rounds, "ROUND_COMMAND", [sys.executable, "-c", code])
    for k in range(3):
        paint(site, k, scene(k)[1])
    site.session.rounds.paused = False
    site.session.rounds.notify()
    eventually(lambda: "there is no memory" in site.ask("/state").json["error"])
    paint(site, 3, scene(3)[1])
    assert site.ask("/images/3/mask").status == 200


def test_a_round_ends_with_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import time; time.sleep(600)"
    monkeypatch.setattr(rounds, "ROUND_COMMAND", [sys.executable, "-c", code])
    with labelling(write_images(tmp_path)) as site:
        for k in range(3):
            paint(site, k, scene(k)[1])
        site.session.rounds.paused = False
        site.session.rounds.notify()
        eventually(lambda: site.session.rounds._process is not None)
        process = site.session.rounds._process
    assert process.wait(30) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def fake_answer(
    site: LabelSite, monkeypatch: pytest.MonkeyPatch, ids: np.ndarray, number: int, k: int
) -> None:
    """What the model of a round says about an image, as the page has shown it."""
    own = site.session.rounds
    own.number = number
    own._suggestions[k, number] = Suggestion(ids, ids, ids, number)


def test_a_finished_image_is_scored_with_the_prediction_before_its_first_stroke(
    site: LabelSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth, first = scene(0)[1], scene(3)[1]
    fake_answer(site, monkeypatch, first, 1, 0)
    # A round that has begun meanwhile changes nothing.
    site.session.rounds._num_begun = 2
    paint(site, 0, truth)
    # A later model knows the image.
    fake_answer(site, monkeypatch, truth, 2, 0)
    paint(site, 0, truth)
    site.session.set_done(0, True)
    (value,) = site.session.rounds.score_curve()
    assert value == pytest.approx(float(mean_iou(tally(confusion(first, truth, 2)))))
    assert value < 0.9
    # Finished again, it counts once.
    site.session.set_done(0, False)
    site.session.set_done(0, True)
    assert len(site.session.rounds.score_curve()) == 1


def test_a_stroke_does_not_wait_for_a_suggestion(
    site: LabelSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, begun, may_end = site.session.rounds, threading.Event(), threading.Event()

    def compute(*_):
        begun.set()
        assert may_end.wait(60)
        raise DataError("the image cannot be read")

    monkeypatch.setattr(own, "_predictor", object())
    monkeypatch.setattr(own, "_probabilities", compute)
    asking = threading.Thread(target=site.ask, args=("/images/0/suggestion",))
    asking.start()
    assert begun.wait(60)
    paint(site, 0, scene(0)[1])
    assert site.session.folder.images[0].state == "scribbled"
    may_end.set()
    asking.join(60)


def test_an_image_that_was_trained_on_is_not_scored(
    site: LabelSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.session.folder.images[0].was_trained_on = True
    fake_answer(site, monkeypatch, scene(0)[1], 3, 0)
    paint(site, 0, scene(0)[1])
    site.session.set_done(0, True)
    assert site.session.rounds.score_curve() == []


def test_predictions_that_are_corrected_train_only_when_they_are_done(tmp_path: Path) -> None:
    with labelling(write_images(tmp_path)) as site:
        own = Rounds(site.session.folder, only_done=True)
        for k in range(3):
            site.session.folder.patch(k, (0, 0), scene(k)[1], NO_REVISION)
        assert own.waits_for() == "Training starts when you finish 3 more images."
        for k in range(3):
            site.session.folder.set_done(k, True)
        assert own.waits_for() == ""


def test_a_models_classes_become_those_of_the_folder_by_name() -> None:
    probabilities = np.zeros((3, 1, 3), np.float32)
    for k in range(3):
        probabilities[k, 0, k] = 1
    model = ClassTable(("sky", "road", "car"))
    found = _make_suggestion(probabilities, model, ClassTable(("car", "sky")), 1)
    assert found.ids.tolist() == [[1, IGNORE, 0]]
    assert found.confidence.tolist() == [[255, 255, 255]]


def plant_links(masks: Path, victim: Path) -> None:
    """What a stranger's folder of masks may hold: links to files of ours, by names of useg."""
    answer = Rounds(LabelFolder(find_paths(masks.parent / "images")))._prediction_path(0)
    answer.parent.mkdir(parents=True)
    for path in (answer, answer.parent.parent / "round.log"):
        path.symlink_to(victim)


def test_a_round_that_ends_before_it_has_read_its_task_says_why(
    site: LabelSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import sys; sys.exit('there is no memory')"
    monkeypatch.setattr(rounds, "ROUND_COMMAND", [sys.executable, "-S", "-c", code])
    # More than a pipe holds.
    monkeypatch.setattr(Rounds, "_images_to_rank", lambda own: [Path("p" * 1000)] * 1000)
    paint(site, 0, scene(0)[1])
    site.session.rounds.paused = False
    site.session.rounds.train_now()
    eventually(lambda: site.session.rounds.status.error)
    assert site.session.rounds.status.error == "the round failed: there is no memory"


@pytest.mark.parametrize("plain", [False, True])
def test_links_in_a_strangers_folder_lead_to_no_change_and_a_plain_save_is_seen(
    plain: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim.png"
    victim.write_bytes(b"holiday")
    images = write_images(tmp_path, 3)
    plant_links(tmp_path / "masks", victim)
    if plain:
        monkeypatch.setattr(rounds, "replacing", lambda path, _: contextlib.nullcontext(path))
    code = "import sys; sys.exit('there is no memory')"
    monkeypatch.setattr(rounds, "ROUND_COMMAND", [sys.executable, "-S", "-c", code])
    with labelling(images) as site:
        fake_answer(site, monkeypatch, scene(0)[1], 0, 0)
        with contextlib.suppress(DataError):
            paint(site, 0, scene(0)[1])
        for k in (1, 2):
            paint(site, k, scene(k)[1])
        site.session.rounds.paused = False
        site.session.rounds.train_now()
        eventually(lambda: "there is no memory" in site.session.rounds.status.error)
    assert (victim.read_bytes() == b"holiday") != plain


@pytest.mark.parametrize("name", [".useg-label", ".useg-label/before"])
def test_a_folder_of_rounds_that_is_a_link_is_refused_and_nothing_is_removed(
    name: str, tmp_path: Path
) -> None:
    images, elsewhere = write_images(tmp_path), tmp_path / "elsewhere"
    (elsewhere / "round-1").mkdir(parents=True)
    link = tmp_path / "masks" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(elsewhere)
    with pytest.raises(DataError, match="is a symbolic link"), open_session(LabelOptions(images)):
        pass
    assert (elsewhere / "round-1").is_dir()


def test_a_round_does_not_go_where_a_link_of_its_name_leads(tmp_path: Path) -> None:
    images, elsewhere = write_images(tmp_path), tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_model(elsewhere / "model.safetensors")
    work = tmp_path / "masks" / ".useg-label"
    work.mkdir(parents=True)
    (work / "round-4").symlink_to(elsewhere)
    with labelling(images) as site:
        own = site.session.rounds
        assert (own._num_begun, own.has_model) == (4, False)
        write_model(work / "model.safetensors")
        own._use_model(5, work)
    assert (elsewhere / "model.safetensors").exists()


def test_a_new_model_replaces_older_rounds_and_no_other_folder(site: LabelSite) -> None:
    own = site.session.rounds
    for name in ("round-1", "round-2", "round-3", "round-of-mine"):
        (own.work / name).mkdir(parents=True)
    for name in ("round-1", "round-3"):
        write_model(own.work / name / "model.safetensors")
    own._use_model(3, own.work / "round-3")
    left = sorted(path.name for path in own.work.iterdir())
    assert left == ["round-2", "round-3", "round-of-mine"]
