"""Paths -> whole jobs: train, evaluate, compare, predict, export, bench. What the command line does is one call of these."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from useg import ranks
from useg.classes import ClassTable
from useg.config import Settings, read_provenance, read_settings
from useg.data.dataset import Dataset
from useg.data.layouts import find
from useg.data.splits import assign_splits, read_split_csv, recall_splits
from useg.errors import UsageError
from useg.files import write_json
from useg.inference.bench import Bench
from useg.inference.bench import bench as measure
from useg.inference.outputs import Wanted
from useg.inference.predictor import Predictor
from useg.inference.streams import Outcome, find_images, predict_files
from useg.inference.video import Film
from useg.inference.video import predict_video as label_video
from useg.machine import describe
from useg.reporting.calibrate import calibrate
from useg.reporting.causes import explained
from useg.reporting.counting import Extras
from useg.reporting.evaluate import Comparison, Evaluation
from useg.reporting.evaluate import compare as compare_evaluations
from useg.reporting.evaluate import evaluate as evaluate_dataset
from useg.reporting.gallery import keep
from useg.reporting.publish import command_lines, machine_facts, markdown_path, publish, run_facts
from useg.serving.export import Export, check_target
from useg.serving.export import export as write_export
from useg.training import loop
from useg.training.loop import Progress, Run
from useg.training.state import STATE_NAME, close_state

Counting = Callable[[int, int], None]


def open_dataset(data: str | Path, settings: Settings | None = None, classes: ClassTable | None = None) -> Dataset:
    """Find the pairs in a folder (or ``dataset.toml``) and say which train and which are held out.

    Args:
        data: the folder or file.
        settings: its ``data.*`` settings count.
        classes: how masks are to be read; by default as the folder says, or as the values found suggest.

    Raises:
        UsageError: no such folder, no pairs, or too few to hold some out.
    """
    choices = (settings or Settings()).data
    dataset = find(Path(data), Path(choices.classes) if choices.classes else classes)
    return assign_splits(dataset, choices.split, choices.holdout)


def load(model: str | Path, runtime: str | None = None, augment: str = "none") -> Predictor:
    """Load a model: a run folder, a ``model.safetensors``, or an ``.onnx`` or ``.xml`` that was exported; several make an ensemble.

    Args:
        model: where it is; ``"A,B"`` for the mean of several.
        runtime: what computes it: ``"torch"``, ``"torch-bf16"``, ``"gpu"``, ``"onnx"``, ``"openvino"``, ``"openvino-bf16"``; ``"auto"`` tries
            which is fastest; by default the one that the file is for, in fp32.
        augment: look at each image in several ways, too: ``"flip"``, ``"flips"``, ``"turns"`` or ``"scales"``.

    Returns:
        A function from image ``(H, W, C)`` to label map ``(H, W)`` uint8.

    Raises:
        UsageError: there is no model, it is damaged, or the runtime cannot run it.
    """
    return Predictor.load(model, runtime, augment=augment)


def train(
    data: str | Path,
    out: str | Path,
    *,
    minutes: float | None = None,
    epochs: int | None = None,
    settings: Mapping[str, Any] | None = None,
    config: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Train a U-Net on a data set and report how good it is.

    Args:
        data: a folder whose layout is recognised, or a ``dataset.toml``.
        out: the run folder to make.
        minutes: time for the whole job, or
        epochs: passes over the training pictures; with neither, 10 minutes.
        settings: dotted settings, such as ``{"model.padding": "valid", "data.size": "256x192"}``.
        config: a ``run.toml`` to start from; one that a run left repeats that run.
        resume: go on with the run that was interrupted or killed in ``out``, as its ``run.toml`` says, to the same result to the bit; a run
            that has not begun is begun, one that has ended is reported anew.
        progress: told what happens.

    Returns:
        The run: settings, scores on the held-out pictures, log.

    Raises:
        UsageError: unusable data or settings, or a folder that cannot be written.
    """
    began = time.perf_counter()
    out = Path(out)
    progress = progress if progress and ranks.first() else loop.Silent()
    if (resume or ranks.restarted()) and (out / "run.toml").exists():
        return _go_on(Path(data), out, progress)
    chosen = read_settings(Path(config)) if config else Settings()
    limits: dict[str, Any] = {"train.minutes": minutes} if minutes is not None else {}
    limits |= {"train.epochs": epochs} if epochs is not None else {}
    if len(limits) > 1:
        raise UsageError("both minutes and epochs are given; give one of them")
    given = {**({"train.minutes": None, "train.epochs": None, "train.steps": None, **limits} if limits else {}), **(settings or {})}
    if "train.steps" in given:  # another number of steps has not been counted again yet
        given = {"train.recounts": (), **given}
    chosen = chosen.with_(given)
    dataset = open_dataset(data, chosen)
    return _trained(dataset, out, chosen, progress, began)


def _go_on(data: Path, out: Path, progress: Progress) -> Run:
    """Go on with the run in ``out``."""
    began = time.perf_counter()
    settings = read_settings(out / "run.toml")
    progress.say(f"going on with {out} as its run.toml says")
    dataset = find(data, Path(settings.data.classes) if settings.data.classes else None)
    splits_by = read_provenance(out / "run.toml").get("splits_by", "")
    dataset = replace(read_split_csv(out / "split.csv", dataset), splits_by=splits_by)
    return _trained(dataset, out, settings, progress, began, resume=True)


def _trained(dataset: Dataset, out: Path, settings: Settings, progress: Progress, began: float, *, resume: bool = False) -> Run:
    """Train, in as many processes as torchrun has started; calibrate and score the kept model of a run that has ended, and write its report."""
    with ranks.together():
        run = loop.train(dataset, out, settings, progress, resume=resume, began=began)
    if run.interrupted or not ranks.first():
        return run
    calibrate(run.out, dataset)
    predictor = load(run.out)
    thumbnails: list[bytes] = []
    evaluation = explained(evaluate_dataset(predictor, dataset, "val", seen=keep(thumbnails)), dataset, predictor)
    seconds = time.perf_counter() - began
    notices = [asdict(notice) for notice in run.notices]
    write_json(run.out / "scores.json", {**evaluation.as_dict(), "notices": notices, "seconds": seconds, "machine": describe()})
    facts = {"Trained": f"{len(run.log)} steps in {seconds / 60:.1f} minutes", **run_facts(run)}
    publish(
        run.out / "report.html", f"{dataset.root.name}: U-Net", predictor, dataset, evaluation,
        thumbnails=thumbnails, log=run.log, facts=facts, commands=command_lines(str(run.out), str(dataset.root), "val"),
    )  # fmt: skip
    close_state(run.out / STATE_NAME)
    return run


def evaluate(
    model: str | Path | Predictor,
    data: str | Path,
    split: str = "val",
    *,
    settings: Mapping[str, Any] | None = None,
    extras: Extras = Extras(),  # noqa: B008 - frozen
    html: str | Path | None = None,
    runtime: str | None = None,
    augment: str = "none",
    progress: Counting = lambda done, total: None,
) -> Evaluation:
    """Score a model on a data set at the labels' native resolution.

    Args:
        model: a run folder, a model file, or a loaded predictor.
        data: a folder whose layout is recognised, or a ``dataset.toml``.
        split: ``"val"``, ``"train"``, ``"test"`` or ``"all"``.
        settings: dotted ``data.*`` settings that say how the set is split; by default as when the model was trained.
        extras: what to leave out, and what to measure besides: ``useg.Extras(ignore_mask="hood.png", objects="cell")``.
        html: also write the report there, and the same in Markdown beside it.
        runtime: what computes the model, as for :func:`load`.
        augment: the ways to look at each image, as for :func:`load`.
        progress: called with (images done, images in all).

    Raises:
        UsageError: no model, no such split, unreadable data, other classes than the model's, or extras that do not fit.
    """
    predictor = model if isinstance(model, Predictor) else load(model, runtime, augment)
    dataset = held_out(predictor, data, settings)
    if not html:
        return explained(evaluate_dataset(predictor, dataset, split, extras=extras, progress=progress), dataset, predictor, extras)
    markdown_path(Path(html))  # a slip is answered before the work
    thumbnails: list[bytes] = []
    evaluation = evaluate_dataset(predictor, dataset, split, extras=extras, progress=progress, seen=keep(thumbnails))
    evaluation = explained(evaluation, dataset, predictor, extras)
    lines = command_lines("MODEL" if isinstance(model, Predictor) else str(model), str(data), split)
    publish(
        Path(html), f"{dataset.root.name}: {split}", predictor, dataset, evaluation,
        extras=extras, thumbnails=thumbnails, facts=machine_facts(), commands=lines,
    )  # fmt: skip
    return evaluation


def compare(
    model: str | Path | Predictor,
    against: str | Path | Predictor,
    data: str | Path,
    split: str = "val",
    *,
    settings: Mapping[str, Any] | None = None,
    extras: Extras = Extras(),  # noqa: B008 - frozen
    progress: Counting = lambda done, total: None,
) -> Comparison:
    """Score two models on the same images, and say how much better the first is and how sure that is.

    The images are split as when ``model`` was trained; arguments and errors as for :func:`evaluate`.

    Raises:
        UsageError: also when ``against`` held out other images, so that it may have trained on these.
    """
    first, second = (part if isinstance(part, Predictor) else load(part) for part in (model, against))
    if not settings:
        _check_same_split(first, second)
    dataset = held_out(first, data, settings)
    return compare_evaluations(*(evaluate_dataset(predictor, dataset, split, extras=extras, progress=progress) for predictor in (first, second)))


def _check_same_split(*predictors: Predictor) -> None:
    """Refuse models that held out different images, as far as they say."""
    splits = [runtime.card.provenance.get("split", {}) for predictor in predictors for runtime in predictor.runtimes]
    different = [split for split in splits if split and split != splits[0]]
    if splits[0] and different:
        raise UsageError(
            f"the models were trained with different splits ({splits[0]} and {different[0]}), so that one may have seen what another is scored on; "
            f"say with --set data.split=... and data.holdout=... which images to take"
        )


def held_out(predictor: Predictor, data: str | Path, settings: Mapping[str, Any] | None = None) -> Dataset:
    """Open a data set split as when the model was trained, unless ``settings`` say otherwise, and with its classes where the set names none.

    Where the run folder is there, its ``split.csv`` says what the model has trained on, whatever has become of the data set since; an exported
    file alone says only how the set was split.

    Raises:
        UsageError: as for :func:`open_dataset`.
    """
    if not settings:
        _check_same_split(predictor)
    provenance = predictor.runtime.card.provenance
    chosen = Settings().with_({**provenance.get("split", {}), **(settings or {})})
    says_itself = chosen.data.classes or not Path(data).is_dir() or (Path(data) / "classes.toml").exists()
    classes = None if says_itself else predictor.classes
    source = Path(predictor.runtime.source)
    splits = (source if source.is_dir() else source.parent) / "split.csv"
    if not settings and splits.exists() and splits.with_name("run.toml").exists():
        dataset = find(Path(data), classes)
        if dataset.root.name == provenance.get("dataset") and (recalled := recall_splits(splits, dataset, provenance.get("splits_by", ""))):
            return recalled
    return open_dataset(data, chosen, classes)


def predict(
    model: str | Path | Predictor,
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    wanted: Wanted = Wanted(),  # noqa: B008 - frozen
    shard: tuple[int, int] = (1, 1),
    overwrite: bool = False,
    runtime: str | None = None,
    augment: str = "none",
    progress: Counting = lambda done, total: None,
) -> Outcome:
    """Label image files: ``out/STEM.png`` (palette PNG of class ids), ``out/overlays/STEM.png``, and more when it is wanted.

    The same call again goes on where it was stopped: what the same model made of the same picture is kept.

    Args:
        model: a run folder, a model file, or a loaded predictor.
        sources: image files, folders, globs.
        out: where to write.
        wanted: what to write of each image, and of all together: ``Wanted(overlays=False)`` label maps alone.
        shard: (i, n): the i-th of n parts of the pictures, for n processes or machines that share the work.
        overwrite: keep nothing that is there.
        runtime: what computes the model, as for :func:`load`.
        augment: the ways to look at each image, as for :func:`load`.
        progress: called with (images done, images in all).

    Returns:
        The label maps, how many of them were there before, and the images that could not be labelled, with the reason.

    Raises:
        UsageError: no model, no images, none that could be labelled, or a folder that cannot be written.
    """
    names = [str(sources)] if isinstance(sources, str | Path) else [str(source) for source in sources]
    if not isinstance(model, Predictor):
        model = Predictor.load(model, runtime, len(find_images(names)) if runtime == "auto" else 1, augment)
    return predict_files(model, names, Path(out), wanted=wanted, shard=shard, overwrite=overwrite, progress=progress)


def predict_video(
    model: str | Path | Predictor,
    path: str | Path,
    out: str | Path,
    *,
    overlays: bool = True,
    smooth: float = 0.0,
    runtime: str | None = None,
    augment: str = "none",
    progress: Counting = lambda done, total: None,
) -> Film:
    """Label every frame of a video: ``out/STEM_overlay.mp4`` to look at, ``out/STEM_mask.mp4`` with the exact class ids.

    Arguments and errors as for :func:`useg.inference.video.predict_video` and :func:`load`.
    """
    predictor = model if isinstance(model, Predictor) else load(model, runtime, augment)
    return label_video(predictor, Path(path), Path(out), overlays=overlays, smooth=smooth, progress=progress)


def export(
    model: str | Path,
    out: str | Path,
    int8: str | Path | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Export:
    """Write a trained model for other programs: raw pixels in, logits out, for any batch, height and width that it takes.

    Args:
        model: a run folder or ``model.safetensors``.
        out: ``NAME.onnx``, ``NAME.xml`` for OpenVINO, or a folder for a site: a page that runs the model in the browser.
        int8: a data set: quantise to 8 bits, calibrated on its training pictures and judged on its held-out ones.
        settings: dotted ``data.*`` settings that say how the set is split; by default as when the model was trained.
        say: told what happens.

    Raises:
        UsageError: no model, a target that cannot be written, a missing package, or a result too far from the model.
    """
    check_target(Path(out))
    dataset = held_out(load(model), int8, settings) if int8 else None
    return write_export(Path(model), Path(out), dataset, say=say)


def bench(model: str | Path, size: tuple[int, int] | None = None, *, say: Callable[[str], None] = lambda text: None) -> Bench:
    """Measure every runtime that can run a model here; arguments and errors as for :func:`useg.inference.bench.bench`."""
    return measure(Path(model), size, say=say)
