"""Paths -> whole jobs: train, evaluate, compare, predict, export, bench. What the command line does is one call of these."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from useg.classes import ClassTable
from useg.config import Settings, read_provenance, read_settings
from useg.data.dataset import Dataset, pair_name, read_sample
from useg.data.layouts import find
from useg.data.splits import assign_splits, read_split_csv, recall_splits
from useg.errors import UsageError
from useg.files import write_json
from useg.inference.bench import Bench
from useg.inference.bench import bench as measure
from useg.inference.predictor import Predictor
from useg.inference.streams import find_images, predict_files
from useg.machine import describe
from useg.reporting.calibrate import calibrate
from useg.reporting.counting import Extras
from useg.reporting.evaluate import Comparison, Evaluation
from useg.reporting.evaluate import compare as compare_evaluations
from useg.reporting.evaluate import evaluate as evaluate_dataset
from useg.reporting.report import Command, Showcase, write_report
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


def load(model: str | Path, runtime: str | None = None) -> Predictor:
    """Load a model: a run folder, a ``model.safetensors``, or an ``.onnx`` or ``.xml`` that was exported.

    Args:
        model: where it is.
        runtime: what computes it: ``"torch"``, ``"torch-bf16"``, ``"gpu"``, ``"onnx"``, ``"openvino"``, ``"openvino-bf16"``; ``"auto"`` tries
            which is fastest; by default the one that the file is for, in fp32.

    Returns:
        A function from image ``(H, W, C)`` to label map ``(H, W)`` uint8.

    Raises:
        UsageError: there is no model, it is damaged, or the runtime cannot run it.
    """
    return Predictor.load(model, runtime)


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
    if resume and (out / "run.toml").exists():
        return _go_on(Path(data), out, progress or loop.Silent())
    chosen = read_settings(Path(config)) if config else Settings()
    limits: dict[str, Any] = {"train.minutes": minutes} if minutes is not None else {}
    limits |= {"train.epochs": epochs} if epochs is not None else {}
    if len(limits) > 1:
        raise UsageError("both minutes and epochs are given; give one of them")
    if limits:
        chosen = chosen.with_({"train.minutes": None, "train.epochs": None, "train.steps": None, **limits})
    chosen = chosen.with_(settings or {})
    dataset = open_dataset(data, chosen)
    return _reported(loop.train(dataset, out, chosen, progress), dataset, began)


def _go_on(data: Path, out: Path, progress: Progress) -> Run:
    """Go on with the run in ``out``."""
    began = time.perf_counter()
    settings = read_settings(out / "run.toml")
    progress.say(f"going on with {out} as its run.toml says")
    dataset = find(data, Path(settings.data.classes) if settings.data.classes else None)
    splits_by = read_provenance(out / "run.toml").get("splits_by", "")
    dataset = replace(read_split_csv(out / "split.csv", dataset), splits_by=splits_by)
    return _reported(loop.train(dataset, out, settings, progress, resume=True), dataset, began)


def _reported(run: Run, dataset: Dataset, began: float) -> Run:
    """Calibrate and score the kept model of a run that has ended, and write its report."""
    if run.interrupted:
        return run
    calibrate(run.out, dataset)
    predictor = load(run.out)
    evaluation = evaluate_dataset(predictor, dataset, "val")
    seconds = time.perf_counter() - began
    write_json(run.out / "scores.json", {**evaluation.as_dict(), "seconds": seconds, "machine": describe()})
    facts = {"Trained": f"{len(run.log)} steps in {seconds / 60:.1f} minutes", **run_facts(run)}
    page(run.out / "report.html", f"{dataset.root.name}: U-Net", predictor, dataset, evaluation, run.log, facts, commands(str(run.out)))
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
    progress: Counting = lambda done, total: None,
) -> Evaluation:
    """Score a model on a data set at the labels' native resolution.

    Args:
        model: a run folder, a model file, or a loaded predictor.
        data: a folder whose layout is recognised, or a ``dataset.toml``.
        split: ``"val"``, ``"train"``, ``"test"`` or ``"all"``.
        settings: dotted ``data.*`` settings that say how the set is split; by default as when the model was trained.
        extras: what to leave out, and what to measure besides: ``useg.Extras(ignore_mask="hood.png", objects="cell")``.
        html: also write the report there.
        runtime: what computes the model, as for :func:`load`.
        progress: called with (images done, images in all).

    Raises:
        UsageError: no model, no such split, unreadable data, other classes than the model's, or extras that do not fit.
    """
    predictor = model if isinstance(model, Predictor) else load(model, runtime)
    dataset = held_out(predictor, data, settings)
    evaluation = evaluate_dataset(predictor, dataset, split, extras=extras, progress=progress)
    if html:
        page(
            Path(html),
            f"{dataset.root.name}: {split}",
            predictor,
            dataset,
            evaluation,
            (),
            _machine_facts(),
            commands(str(model) if not isinstance(model, Predictor) else "RUN"),
        )
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
    of_first, of_second = (predictor.runtime.card.provenance.get("split", {}) for predictor in (first, second))
    if not settings and of_first and of_second and of_first != of_second:
        raise UsageError(
            f"the two models were trained with different splits ({of_first} and {of_second}), so that one may have seen what the other is scored on; "
            f"say with --set data.split=... and data.holdout=... which images to take"
        )
    dataset = held_out(first, data, settings)
    return compare_evaluations(*(evaluate_dataset(predictor, dataset, split, extras=extras, progress=progress) for predictor in (first, second)))


def held_out(predictor: Predictor, data: str | Path, settings: Mapping[str, Any] | None = None) -> Dataset:
    """Open a data set split as when the model was trained, unless ``settings`` say otherwise, and with its classes where the set names none.

    Where the run folder is there, its ``split.csv`` says what the model has trained on, whatever has become of the data set since; an exported
    file alone says only how the set was split.

    Raises:
        UsageError: as for :func:`open_dataset`.
    """
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
    overlays: bool = True,
    runtime: str | None = None,
    progress: Counting = lambda done, total: None,
) -> list[Path]:
    """Label image files: ``out/STEM.png`` (palette PNG of class ids) and ``out/overlays/STEM.png``.

    Args:
        model: a run folder, a model file, or a loaded predictor.
        sources: image files, folders, globs.
        out: where to write.
        overlays: draw overlays too.
        runtime: what computes the model, as for :func:`load`.
        progress: called with (images done, images in all).

    Returns:
        The label maps written.

    Raises:
        UsageError: no model, no images, an unreadable image, or a folder that cannot be written.
    """
    names = [str(sources)] if isinstance(sources, str | Path) else [str(source) for source in sources]
    predictor = model if isinstance(model, Predictor) else Predictor.load(model, runtime, len(find_images(names)) if runtime == "auto" else 1)
    return predict_files(predictor, names, Path(out), overlays=overlays, progress=progress)


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
        out: ``NAME.onnx``, or ``NAME.xml`` for OpenVINO.
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


def page(
    path: Path,
    title: str,
    predictor: Predictor,
    dataset: Dataset,
    evaluation: Evaluation,
    log: Sequence[Mapping[str, Any]],
    facts: Mapping[str, str],
    lines: Sequence[Command],
) -> None:
    """Write the HTML report of an evaluation with its best, median and worst picture."""
    ranked = sorted((image for image in evaluation.images if not np.isnan(image.mean_iou)), key=lambda image: -image.mean_iou)
    showcases = []
    for rank, k in {"best": 0, "median": len(ranked) // 2, "worst": len(ranked) - 1}.items() if ranked else ():
        sample = read_sample(ranked[k].pair, dataset)
        showcases.append(
            Showcase(rank, pair_name(ranked[k].pair, dataset.root), ranked[k].mean_iou, sample.image, sample.label, predictor(sample.image))
        )
    write_report(
        path,
        title=title,
        evaluation=evaluation,
        table=predictor.classes,
        showcases=showcases,
        log=log,
        facts=facts,
        warnings=_warnings(dataset, evaluation),
        commands=lines,
    )


def _warnings(dataset: Dataset, evaluation: Evaluation) -> list[str]:
    """What could make the scores flatter the model."""
    found = []
    if evaluation.split == "val":
        found.append("The model kept is the one that scored best on these very pictures, which flatters it a little.")
        if dataset.splits_by.startswith("blocks"):
            found.append("Training saw other parts of the same recordings, so expect lower scores on other places and other days.")
    if evaluation.split in ("train", "all") and any(pair.split == "train" for pair in dataset.pairs):
        found.append("If the model was trained on this data set, these are pictures that it has seen.")
    if evaluation.scores.absent:
        found.append(f"No pixel of {', '.join(evaluation.scores.absent)} is in the truth; these classes are left out of the means.")
    return found


def run_facts(run: Run) -> dict[str, str]:
    """Return what a reader needs to repeat a run, in words."""
    model, working = run.settings.model, run.settings.data
    return {
        "Network": f"U-Net, encoder {model.encoder}, width {model.width}, depth {model.depth}, {model.padding} padding",
        "Working size": "x".join(map(str, working.size)) if working.size else f"scale {working.scale}",
        "Seed": str(run.settings.train.seed),
        **_machine_facts(),
    }


def _machine_facts() -> dict[str, str]:
    machine = describe()
    return {"Machine": f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, useg {machine['useg']}"}


def commands(run: str) -> list[Command]:
    """Return the command lines to do the same with one's own data."""
    return [
        Command("useg inspect DATA", "see what is in your folder of images and masks, and how it would be split"),
        Command("useg train DATA --out RUN --minutes 10", "train on it for ten minutes"),
        Command("useg evaluate RUN DATA", "score the model on the held-out pictures"),
        Command("useg predict RUN PICTURES --out LABELS", "label new pictures"),
    ]
