"""A run starts from another model: exactly where it fits, by name where classes differ."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from made_training import SHAPES_SETTINGS, Interrupter, make_shapes, run_results
from PIL import Image

import useg
from useg import api
from useg.classes import ClassTable, write_classes
from useg.cli import main
from useg.config import VALIDATE_AT_END, Settings
from useg.data.layouts import find_dataset
from useg.data.splits import open_dataset
from useg.errors import DataError, ModelError, SettingsError
from useg.inference.predictor import load
from useg.models.geometry import WorkingSize
from useg.models.segmenter import Segmenter, load_model, save_model
from useg.reporting.report import evaluate
from useg.training import session
from useg.training.plan import make_plan
from useg.training.trainer import SilentProgress, prepare_trainer
from useg.training.warm_start import WarmStart, adopt_settings, read_start

NAMES = ("ground", "disc", "bar")
SHORT = {
    "data.split": "random",
    "train.batch": 4,
    "train.steps": 3,
    "train.precision": "fp32",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shapes whose classes a file names."""
    folder = tmp_path_factory.mktemp("warm") / "data"
    return name_classes(make_shapes(folder, 0, count=10), NAMES)


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    """A run that has learned a little."""
    settings = {**SHAPES_SETTINGS, "train.steps": 12, "model.encoder": "plain"}
    return useg.train(data, data.parent / "run", settings=settings).out


def name_classes(folder: Path, names: tuple[str, ...]) -> Path:
    write_classes(folder / "classes.toml", ClassTable(names))
    return folder


def copy_data(data: Path, to: Path, *names: str) -> Path:
    """Return a copy of the data whose stored values have other names."""
    shutil.copytree(data, to)
    return name_classes(to, names or NAMES)


def made_model(names: tuple[str, ...], channels: int = 3, **settings: Any) -> Segmenter:
    """Return a model with random weights, statistics of batches too."""
    torch.manual_seed(1)
    network = {"encoder": "plain", "width": 4, "depth": 2, "padding": "same", "normalize": True}
    network |= {"channels": channels, "classes": len(names), **settings}
    statistics = [90.0, 100.0, 110.0][:channels], [40.0, 50.0, 60.0][:channels]
    model = Segmenter(network, ClassTable(names), *statistics).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_var", "score_pool.0.weight")):
            tensor.uniform_(0.5, 1.5)
    return model


def begin(model: Segmenter, data: Path, **changes: Any) -> tuple[Segmenter, WarmStart]:
    """Return the model of a run before its first step, and what it starts from."""
    path = data / f"start {len(list(data.iterdir()))}.safetensors"
    save_model(model, path)
    settings, _ = adopt_settings(path, api.Settings().with_({**SHORT, **changes}), changes)
    dataset = open_dataset(data, settings)
    plan = make_plan(settings, dataset)
    start = read_start(plan, dataset)
    trainer = prepare_trainer(dataset, plan, SilentProgress(), start)
    return trainer.model.eval(), start


def logits(model: Segmenter, channels: int = 3) -> torch.Tensor:
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, channels, 64, 64)))
    with torch.inference_mode():
        return model(x)


@pytest.mark.parametrize("encoder", ["plain", "lite0", "fcn8s", "cnn"])
def test_same_classes_go_on_exactly(encoder: str, data: Path, tmp_path: Path) -> None:
    model = made_model(
        NAMES, encoder=encoder, **({} if encoder in ("plain", "cnn") else {"depth": 5})
    )
    begun, start = begin(model, copy_data(data, tmp_path / "data"))
    assert torch.equal(logits(begun), logits(model))
    assert start.keeps_all_classes
    assert start.notes == ("the model's classes are those of the data",)


@pytest.mark.parametrize("encoder", ["plain", "fcn8s"])
def test_rows_of_the_output_layer_follow_the_names(
    encoder: str, data: Path, tmp_path: Path
) -> None:
    model = made_model(NAMES, encoder=encoder, **({} if encoder == "plain" else {"depth": 5}))
    begun, start = begin(model, copy_data(data, tmp_path / "data", "bars", "Disc", "sky", "ground"))
    assert start.rows == (2, 1, -1, 0)
    assert logits(begun)[:, [3, 1, 0]].allclose(logits(model), atol=1e-4)
    assert not logits(begun)[:, 2].allclose(logits(begun)[:, 3])


def test_what_happens_to_other_classes_is_said(data: Path, tmp_path: Path) -> None:
    folder = copy_data(data, tmp_path / "data", "ground", "ball", "sky")
    _, start = begin(made_model(NAMES), folder, **{"model.start_map": "ball=disc"})
    assert start.rows == (0, 1, -1)
    assert start.notes[0] == (
        "2 of 3 classes are reused; renamed: ball from disc; new: sky; dropped: bar "
        "(list them in classes.toml to keep them)"
    )
    said = start.provenance(ClassTable(("ground", "ball", "sky")))
    assert (said["new_classes"], said["dropped_classes"]) == (["sky"], ["bar"])
    _, start = begin(made_model(("a", "b")), folder)
    assert "none of the model's classes (a, b) is among those of the data" in start.notes[0]
    with pytest.raises(
        SettingsError, match=r"the mapping names the class 'boll', but .* ball, sky"
    ):
        begin(made_model(NAMES), folder, **{"model.start_map": "boll=disc"})


def test_first_convolutions_are_averaged_over_other_bands(data: Path, tmp_path: Path) -> None:
    model = made_model(NAMES, channels=1)
    begun, start = begin(model, copy_data(data, tmp_path / "data"))
    grey = torch.full((1, 1, 64, 64), 7.0)
    grey[..., 20:40] = 200
    with torch.inference_mode():
        assert begun(grey.expand(-1, 3, -1, -1)).allclose(model(grey), atol=1e-4)
    assert "the images have 3 bands, but the model takes 1" in " ".join(start.notes)


def test_another_number_type_is_refused(data: Path, tmp_path: Path) -> None:
    folder = copy_data(data, tmp_path / "data")
    for path in (folder / "images").iterdir():
        deep = np.asarray(Image.open(path).convert("L"), np.uint16) * 257
        Image.fromarray(deep).save(path)
    with pytest.raises(DataError, match=r"are uint16, but .* takes uint8; convert the images"):
        begin(made_model(NAMES), folder)


def test_network_and_size_are_taken_over_where_nothing_is_set(
    run: Path, data: Path, tmp_path: Path
) -> None:
    again = useg.train(data, tmp_path / "a", start=run, settings=SHORT)
    assert (again.settings.model.width, again.settings.model.depth) == (8, 2)
    assert again.settings.data.size == (48, 32)
    assert again.settings.train.coarse == 0
    other = useg.train(data, tmp_path / "b", start=again, settings={**SHORT, "data.size": "32x32"})
    assert load_model(other.out).working.frame == (32, 32)
    message = r"do not fit model.width = 4, where the model has 8; leave such settings out"
    with pytest.raises(SettingsError, match=message):
        useg.train(data, tmp_path / "c", start=run, settings={**SHORT, "model.width": 4})
    with pytest.raises(ModelError, match="there is no model at"):
        useg.train(data, tmp_path / "c", start=tmp_path / "nothing", settings=SHORT)
    assert not (tmp_path / "c").exists()


def test_other_sizes_are_said(data: Path, tmp_path: Path) -> None:
    folder = copy_data(data, tmp_path / "data")
    _, start = begin(made_model(NAMES), folder, **{"data.size": "64x64"})
    assert start.notes[1:] == (
        "the working size of the model is scale 1, that of this run 64x64 pixels",
        "images of 48x32 pixels are distorted to 64x64, the working size of the model; "
        "set another one with data.size=WIDTHxHEIGHT",
    )


def test_another_preparation_of_images_is_said(data: Path, tmp_path: Path) -> None:
    folder, changes = copy_data(data, tmp_path / "data"), {"data.size": "48x32"}
    _, start = begin(made_model(NAMES), folder, **changes, **{"data.standardize": True})
    assert "data.standardize is true in this run, but false in the model" in start.notes
    _, start = begin(made_model(NAMES), folder, **changes)
    assert not any("standardize" in note for note in start.notes)


def test_images_at_a_scale_are_not_standardised_like_those_of_the_model(
    data: Path, tmp_path: Path
) -> None:
    folder, model = copy_data(data, tmp_path / "data"), made_model(NAMES)
    model.working = WorkingSize((48, 32), standardize=True)
    assert begin(model, folder)[0].working == model.working
    scaled = begin(model, folder, **{"data.scale": 1.0})[0].working
    assert scaled == WorkingSize(scale=1.0)


def test_frozen_encoder_stays_as_it_is(run: Path, data: Path, tmp_path: Path) -> None:
    frozen = {**SHORT, "train.freeze": "encoder", "train.learning_rate": 0.1}
    # Five classes, so that the model that it starts from is not kept.
    folder = copy_data(data, tmp_path / "data", *NAMES, "sky", "sea")
    useg.train(folder, tmp_path / "a", start=run, settings=frozen)
    before, after = (load_model(path).network.state_dict() for path in (run, tmp_path / "a"))
    encoder = {name for name in before if name.startswith("down.")}
    assert len(encoder) > 10
    assert all(torch.equal(before[name], after[name]) for name in encoder)
    assert not torch.equal(before["merge.0.0.weight"], after["merge.0.0.weight"])
    with pytest.raises(SettingsError, match="the encoder starts from random weights; start from"):
        useg.train(data, tmp_path / "b", settings={**frozen, "model.encoder": "plain"})


def test_warm_started_runs_repeat_and_resume_exactly(run: Path, data: Path, tmp_path: Path) -> None:
    settings = {**SHORT, "train.steps": 8, "train.freeze": "encoder"}
    useg.train(data, tmp_path / "whole", start=run, settings=settings)
    useg.train(data, tmp_path / "again", config=tmp_path / "whole" / "run.toml")
    useg.train(data, tmp_path / "cut", start=run, settings=settings, progress=Interrupter(5))
    with pytest.raises(SettingsError, match=r"has started from .*run, not from .*other"):
        useg.train(data, tmp_path / "cut", start=tmp_path / "other", resume=True)
    useg.train(data, tmp_path / "cut", start=run, resume=True)
    whole = run_results(tmp_path / "whole")
    assert run_results(tmp_path / "again")[:2] == run_results(tmp_path / "cut")[:2] == whole[:2]


def test_run_whose_start_has_changed_is_neither_continued_nor_repeated(
    run: Path, data: Path, tmp_path: Path
) -> None:
    path = tmp_path / "start.safetensors"
    shutil.copy(run / "model.safetensors", path)
    useg.train(data, tmp_path / "cut", start=path, settings=SHORT, progress=Interrupter(2))
    save_model(made_model(NAMES, width=8), path)
    for how in ({"resume": True}, {"config": tmp_path / "cut" / "run.toml"}):
        out = tmp_path / ("cut" if "resume" in how else "again")
        with pytest.raises(
            ModelError, match=r"start.safetensors is not the model from which .* started; "
        ):
            useg.train(data, out, **how)
    assert not (tmp_path / "again").exists()


def spoil(
    run: Path, folder: Path, num_held_out: int, monkeypatch: pytest.MonkeyPatch, **more: Any
) -> tuple[useg.Run, str]:
    """Start from a model with a learning rate that spoils it; return the run and what it says."""
    data = name_classes(make_shapes(folder / "new", 7, count=10), NAMES)
    said: list[str] = []
    progress = SilentProgress()
    monkeypatch.setattr(progress, "say", said.append)
    settings = {**SHORT, "train.learning_rate": 1.0, "train.schedule": "constant"}
    settings |= {"data.holdout": num_held_out / 10, **more}
    return (
        useg.train(data, folder / "a", start=run, settings=settings, progress=progress),
        "\n".join(said),
    )


def test_model_is_scored_before_training_and_kept_if_nothing_is_better(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, said = spoil(run, tmp_path, 5, monkeypatch)
    percent = f"{100 * kept.scores.mean_iou:.1f} %"
    assert f"the initial model scores mIoU {percent} on the 5 held-out images" in said
    assert "too few" not in said
    provenance = load_model(kept.out).provenance
    assert provenance["step"] == 0
    assert provenance["start"]["model"] == "run"
    image = np.asarray(Image.open(tmp_path / "new" / "images" / "p003.png"))
    assert np.array_equal(load(kept)(image), load(run)(image))


def test_few_held_out_images_do_not_choose_the_model_before_training(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, said = spoil(run, tmp_path, 3, monkeypatch)
    assert "on the 3 held-out images, too few to decide between it and the trained model" in said
    assert load_model(kept.out).provenance["step"] == 3


def test_model_before_training_is_not_kept_where_held_out_images_choose_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"train.validate_every": VALIDATE_AT_END}
    kept, said = spoil(run, tmp_path, 5, monkeypatch, **more)
    assert "on the 5 held-out images, which do not decide between it and the trained" in said
    assert load_model(kept.out).provenance["step"] == 3


def test_delivered_model_takes_a_quarter_of_the_weights_of_its_start_at_a_new_place(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = name_classes(make_shapes(tmp_path / "new", 7, count=10), NAMES)
    settings = {**SHORT, "train.steps": 10, "data.holdout": 0.2}
    said: list[str] = []
    progress = SilentProgress()
    monkeypatch.setattr(progress, "say", said.append)
    monkeypatch.setattr(session, "MAX_MIXING_LOSS", 1.0)
    mixed = useg.train(data, tmp_path / "a", start=run, settings=settings, progress=progress)
    only_trained = {**settings, "model.start_share": 0.0}
    trained = useg.train(data, tmp_path / "b", start=run, settings=only_trained)
    assert any(
        line.startswith("mixed 25 % of the initial model into the final weights") for line in said
    )
    old, new, result = (load_model(path) for path in (run, trained.out, mixed.out))
    assert result.provenance["start"]["share"] == 0.25
    assert new.provenance["start"]["share"] == 0
    assert new.provenance["step"] == result.provenance["step"] > 0
    weights = zip(
        *(model.network.state_dict().values() for model in (old, new, result)), strict=True
    )
    for before, after, final in weights:
        expected = 0.25 * before + 0.75 * after if before.is_floating_point() else after
        assert torch.allclose(final, expected.to(final.dtype), atol=1e-6)
    assert evaluate(mixed, data, split="val").scores.mean_iou == mixed.scores.mean_iou
    assert "run, with 25 % of its weights" in (mixed.out / "report.md").read_text()
    stored = (mixed.out / "model.safetensors").read_bytes()
    assert useg.train(data, mixed.out, resume=True).scores == mixed.scores
    assert (mixed.out / "model.safetensors").read_bytes() == stored


def test_weights_of_the_start_are_left_out_where_they_lower_the_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = name_classes(make_shapes(tmp_path / "new", 7, count=10), NAMES)
    start = tmp_path / "start.safetensors"
    save_model(made_model(NAMES, width=8, depth=2), start)
    settings = {**SHORT, "train.steps": 24, "data.holdout": 0.5, "train.learning_rate": 0.01}
    result = useg.train(data, tmp_path / "a", start=start, settings=settings)
    share = {**settings, "model.start_share": 0.25}
    assert load_model(result.out).provenance["start"]["share"] == 0
    forced = useg.train(data, tmp_path / "b", start=start, settings=share)
    assert load_model(forced.out).provenance["start"]["share"] == 0.25
    assert forced.scores.mean_iou < result.scores.mean_iou - session.MAX_MIXING_LOSS
    # A run that an earlier version has finished stays as it is.
    finished = load_model(result.out)
    del finished.provenance["start"]["share"]
    path = result.out / "model.safetensors"
    save_model(finished, path)
    stored = path.read_bytes()
    monkeypatch.setattr(session, "MAX_MIXING_LOSS", 1.0)
    useg.train(data, result.out, resume=True)
    assert path.read_bytes() == stored


def test_model_that_goes_on_with_its_own_images_keeps_what_it_learns(
    run: Path, data: Path, tmp_path: Path
) -> None:
    result = useg.train(data, tmp_path / "a", start=run, settings=SHORT)
    assert load_model(result.out).provenance["start"]["share"] == 0


@pytest.mark.parametrize(("is_new_place", "seconds"), [(True, 7.0), (False, 2.0)])
def test_time_is_reserved_for_mixing_only_where_weights_are_mixed(
    is_new_place: bool, seconds: float
) -> None:
    model, reserved = made_model(NAMES, width=8), []
    start = WarmStart(model, Path(), (0, 1, 2), 0, is_new_place, ())
    ending = SimpleNamespace(
        trainer=SimpleNamespace(
            settings=Settings(), start=start, model=model, val=[1], set_training_mode=model.train
        ),
        predict_report_seconds=lambda model: 2.0,
        unlabelled=None,
        budget=SimpleNamespace(
            validation_seconds=5.0, report_measured=reserved.append, restart_clock=lambda: None
        ),
    )
    session.TrainingSession.update_report_seconds(ending)
    assert reserved == [seconds]


def test_start_is_not_scored_where_no_image_is_held_out(
    run: Path, data: Path, tmp_path: Path
) -> None:
    dataset = find_dataset(data)
    pairs = tuple(replace(pair, split="train") for pair in dataset.pairs)
    said: list[str] = []
    progress = SilentProgress()
    progress.say = said.append  # type: ignore[method-assign]
    everything = replace(dataset, pairs=pairs)
    useg.train(everything, tmp_path / "a", start=run, settings=SHORT, progress=progress)
    assert not [line for line in said if "initial model scores" in line or "nan" in line]


def test_held_out_images_that_an_ancestor_was_trained_on_are_counted(
    run: Path, data: Path, tmp_path: Path
) -> None:
    middle = useg.train(data, tmp_path / "middle", start=run, settings=SHORT)
    assert load_model(middle.out).provenance["start"]["num_seen"] == 0
    turned = copy_data(data, tmp_path / "data")
    rows = (run / "split.csv").read_text().replace("train", "TRAIN")
    rows = rows.replace("val", "train").replace("TRAIN", "val")
    (turned / "split.csv").write_text(rows)
    last = useg.train(
        turned, tmp_path / "last", start=middle, settings={**SHORT, "data.split": "auto"}
    )
    num_val = len(open_dataset(turned).of("val"))
    assert load_model(last.out).provenance["start"]["num_seen"] == num_val > 5
    report = (tmp_path / "last" / "report.md").read_text()
    assert f"started from one that was trained on {num_val} of these images" in report
    assert "Started from" in report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--map", "a=b"], "--map only works with --from MODEL; add it"),
        (["--from", "{run}", "--map", "a"], "the mapping has the part 'a'"),
        (["--from", "{run}", "--set", "model.start=x"], "start and model.start are both set"),
        (["--from", "{data}"], "there is no model at"),
    ],
)
def test_mistakes_are_refused_in_a_sentence(
    arguments: list[str],
    message: str,
    run: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [argument.format(run=run, data=data) for argument in arguments]
    with pytest.raises(SystemExit) as ended:
        main(["train", str(data), "--out", str(tmp_path / "out"), *filled])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_command_starts_from_a_model(run: Path, data: Path, tmp_path: Path) -> None:
    folder = copy_data(data, tmp_path / "data", "ground", "ball", "bar")
    settings = [f"--set={key}={value}" for key, value in SHORT.items()]
    command = ["train", str(folder), "--out", str(tmp_path / "out"), "--from", str(run), "--quiet"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--map", "ball=disc", *settings])
    assert ended.value.code == 0
    start = load_model(tmp_path / "out").provenance["start"]
    assert start["new_classes"] == start["dropped_classes"] == []
    assert evaluate(tmp_path / "out", folder).scores.num_images > 0
