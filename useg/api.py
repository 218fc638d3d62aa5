"""Paths -> whole jobs: train, evaluate, predict. What the command line does is one call of these."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from useg.classes import ClassTable
from useg.config import Settings, read_settings
from useg.data.dataset import Dataset, Pair, read_sample
from useg.data.layouts import find
from useg.data.splits import assign_splits
from useg.errors import UsageError
from useg.files import write_json
from useg.inference.predictor import Predictor
from useg.inference.streams import predict_files
from useg.machine import describe
from useg.reporting.evaluate import Evaluation
from useg.reporting.evaluate import evaluate as evaluate_dataset
from useg.reporting.report import Command, Showcase, write_report
from useg.training import loop
from useg.training.loop import Progress, Run

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


def load(model: str | Path) -> Predictor:
    """Load a model: a run folder or a ``model.safetensors``.

    Returns:
        A function from image ``(H, W, C)`` to label map ``(H, W)`` uint8.

    Raises:
        UsageError: there is no model, or it is damaged.
    """
    return Predictor.load(model)


def train(
    data: str | Path,
    out: str | Path,
    *,
    minutes: float | None = None,
    epochs: int | None = None,
    settings: Mapping[str, Any] | None = None,
    config: str | Path | None = None,
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
        progress: told what happens.

    Returns:
        The run: settings, scores on the held-out pictures, log.

    Raises:
        UsageError: unusable data or settings, or a folder that cannot be written.
    """
    began = time.perf_counter()
    chosen = read_settings(Path(config)) if config else Settings()
    limits: dict[str, Any] = {"train.minutes": minutes} if minutes is not None else {}
    limits |= {"train.epochs": epochs} if epochs is not None else {}
    if len(limits) > 1:
        raise UsageError("both minutes and epochs are given; give one of them")
    if limits:
        chosen = chosen.with_({"train.minutes": None, "train.epochs": None, "train.steps": None, **limits})
    chosen = chosen.with_(settings or {})
    dataset = open_dataset(data, chosen)
    run = loop.train(dataset, Path(out), chosen, progress)
    if not run.interrupted:
        predictor = load(out)
        evaluation = evaluate_dataset(predictor, dataset, "val")
        seconds = time.perf_counter() - began
        write_json(Path(out) / "scores.json", {**evaluation.scores.as_dict(), "seconds": seconds, "machine": describe()})
        facts = {"Trained": f"{len(run.log)} steps in {seconds / 60:.1f} minutes", **run_facts(run)}
        page(Path(out) / "report.html", f"{dataset.root.name}: U-Net", predictor, dataset, evaluation, run.log, facts, commands(str(out)))
    return run


def evaluate(
    model: str | Path | Predictor,
    data: str | Path,
    split: str = "val",
    *,
    settings: Mapping[str, Any] | None = None,
    html: str | Path | None = None,
    progress: Counting = lambda done, total: None,
) -> Evaluation:
    """Score a model on a data set at the labels' native resolution.

    Args:
        model: a run folder, a model file, or a loaded predictor.
        data: a folder whose layout is recognised, or a ``dataset.toml``.
        split: ``"val"``, ``"train"``, ``"test"`` or ``"all"``.
        settings: dotted ``data.*`` settings that say how the set is split; by default as when the model was trained.
        html: also write the report there.
        progress: called with (images done, images in all).

    Raises:
        UsageError: no model, no such split, unreadable data, or other classes than the model's.
    """
    predictor = model if isinstance(model, Predictor) else load(model)
    chosen = Settings().with_({**predictor.runtime.provenance.get("split", {}), **(settings or {})})  # what training held out
    says_itself = chosen.data.classes or not Path(data).is_dir() or (Path(data) / "classes.toml").exists()
    dataset = open_dataset(data, chosen, None if says_itself else predictor.classes)
    evaluation = evaluate_dataset(predictor, dataset, split, progress=progress)
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


def predict(
    model: str | Path | Predictor,
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    overlays: bool = True,
    progress: Counting = lambda done, total: None,
) -> list[Path]:
    """Label image files: ``out/STEM.png`` (palette PNG of class ids) and ``out/overlays/STEM.png``.

    Args:
        model: a run folder, a model file, or a loaded predictor.
        sources: image files, folders, globs.
        out: where to write.
        overlays: draw overlays too.
        progress: called with (images done, images in all).

    Returns:
        The label maps written.

    Raises:
        UsageError: no model, no images, an unreadable image, or a folder that cannot be written.
    """
    names = [str(sources)] if isinstance(sources, str | Path) else [str(source) for source in sources]
    predictor = model if isinstance(model, Predictor) else load(model)
    return predict_files(predictor, names, Path(out), overlays=overlays, progress=progress)


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
        sample = read_sample(Pair(ranked[k].image, ranked[k].mask), dataset)
        showcases.append(Showcase(rank, ranked[k].image.name, ranked[k].mean_iou, sample.image, sample.label, predictor(sample.image)))
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
