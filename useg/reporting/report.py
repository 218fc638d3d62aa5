"""A report -> the same in Markdown: tables and sentences, no pictures."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from useg.config import Settings
from useg.data.dataset import Dataset, restore_splits
from useg.data.duplicates import compute_signatures, group_near_duplicates, is_quick_to_compare
from useg.data.layouts import find_dataset
from useg.data.splits import open_dataset
from useg.errors import UsageError
from useg.files import replacing
from useg.inference.predictor import Predictor, check_same_split, load
from useg.machine import CountProgress, describe_machine
from useg.reporting import text
from useg.reporting.causes import add_causes
from useg.reporting.evaluate import (
    Comparison,
    CountSettings,
    Evaluation,
    Extras,
    compare_evaluations,
    evaluate_dataset,
)
from useg.reporting.html import choose_gallery, collect_thumbnails, read_gallery
from useg.reporting.page import write_report
from useg.reporting.text import (
    Command,
    Report,
    find_caveats,
    format_interval,
    format_percent,
    format_percent_number,
    is_training_dataset,
    to_sentence,
)

if TYPE_CHECKING:
    from useg.reporting.evaluate import Cause
    from useg.training.loop import Run


def write_markdown(path: Path, report: Report) -> None:
    """Write the report of an evaluation as Markdown; arguments and errors as for :func:`useg.reporting.page.write_report`."""
    with replacing(path) as temporary:
        temporary.write_text("\n\n".join(_parts(report)) + "\n", "utf-8")


def _parts(report: Report) -> Iterator[str]:
    evaluation = report.evaluation
    scores, intervals = evaluation.scores, evaluation.intervals
    yield f"# {_plain(report.title)}"
    yield _plain(text.dataset_sentence(evaluation))
    rows = [
        ("mean IoU", scores.mean_iou, intervals and intervals.mean_iou),
        ("pixel accuracy", scores.pixel_accuracy, intervals and intervals.pixel_accuracy),
    ]
    rows += [("mean Dice", scores.mean_dice, None)]
    if evaluation.boundaries:
        rows += [
            ("mean boundary IoU", evaluation.boundaries.mean_boundary_iou, None),
            ("mean boundary F", evaluation.boundaries.mean_boundary_f, None),
        ]
    yield _table(
        ("score", "%", "95 % interval"),
        [
            (name, format_percent_number(value), format_interval(interval or None))
            for name, value, interval in rows
        ],
    )
    yield from filter(None, (text.interval_sentence(evaluation),))
    yield from _list("Before you trust these numbers", report.caveats)
    yield from _list("Likely causes of low scores", [_cause(cause) for cause in report.causes])
    yield "## Classes"
    yield _classes(report)
    yield from _list(
        "Worst confusions", text.confusion_sentences(evaluation.counts, report.classes.names)
    )
    if evaluation.sizes:
        yield "## Errors by size"
        yield text.size_sentence(evaluation.sizes)
        sizes = [
            (
                size.size,
                text.format_size_bound(size.up_to),
                f"{size.num_regions:,}",
                format_percent_number(size.found),
                format_percent_number(size.recall),
            )
            for size in evaluation.sizes.overall
        ]
        yield _table(("size", "area", "regions", "found, %", "pixels found, %"), sizes)
    yield from _list(
        "Errors by position",
        [text.position_sentence(evaluation)] if evaluation.places is not None else [],
    )
    yield from _list("Calibration", text.calibration_sentences(report))
    yield from _list("Objects", text.object_sentences(evaluation))
    if len(evaluation.images) > 1:
        yield from _list(
            "Images with the lowest IoU",
            [
                text.quartile_sentence(evaluation),
                *(
                    f"{format_percent(value)}: {name}"
                    for name, value in text.lowest_iou_images(evaluation)
                ),
            ],
        )
    yield from _list(
        "How to reproduce this",
        [f"{key}: {value}" for key, value in {"Model": evaluation.model, **report.facts}.items()],
    )
    if report.commands:
        yield (
            "```sh\n"
            + "\n".join(f"{command.text}   # {command.does}" for command in report.commands)
            + "\n```"
        )


def _classes(report: Report) -> str:
    evaluation = report.evaluation
    count = len(evaluation.scores.classes)
    spans = evaluation.intervals.classes if evaluation.intervals else (None,) * count
    edges = evaluation.boundaries.classes if evaluation.boundaries else (None,) * count
    head = [
        "class",
        "IoU",
        "95 % interval",
        "Dice",
        "precision",
        "recall",
        *(("boundary IoU", "boundary F", "thin recall") if evaluation.boundaries else ()),
        "pixels",
    ]
    rows = []
    for entry, interval, edge in zip(evaluation.scores.classes, spans, edges, strict=True):
        if entry.pixels:
            values = [
                entry.dice,
                entry.precision,
                entry.recall,
                *((edge.boundary_iou, edge.boundary_f, edge.thin_recall) if edge else ()),
            ]
            rows.append(
                (
                    entry.name,
                    format_percent_number(entry.iou),
                    format_interval(interval),
                    *(format_percent_number(value) for value in values),
                    f"{entry.pixels:,}",
                )
            )
    return "Scores are in percent.\n\n" + _table(head, rows)


def _cause(cause: Cause) -> str:
    return f"{to_sentence(cause.message)} {to_sentence(cause.evidence)} What to do: {to_sentence(cause.remedy)}"


def _list(heading: str, entries: Sequence[str]) -> Iterator[str]:
    if entries:
        yield f"## {heading}"
        yield "\n".join(f"- {_plain(entry)}" for entry in entries)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [
        head,
        [":--", *("--:" for _ in head[1:])],
        *([_plain(cell) for cell in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _plain(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(text.split()))


def publish_report(
    path: Path,
    title: str,
    predictor: Predictor,
    dataset: Dataset,
    evaluation: Evaluation,
    *,
    extras: Extras = Extras(),  # noqa: B008 - frozen
    thumbnails: Sequence[bytes] = (),
    log: Sequence[Mapping[str, Any]] = (),
    facts: Mapping[str, str] = {},
    commands: Sequence[Command] = (),
) -> None:
    """Write the report of an evaluation: the page ``path``, and ``.md`` of the same stem beside it.

    Args:
        path: the page.
        title: its heading.
        predictor: the model; some images are predicted again for the gallery.
        dataset: what was measured on.
        evaluation: what was measured.
        extras: with what it was measured.
        thumbnails: :func:`useg.reporting.html.make_thumbnail` of each image, or none at all.
        log: rows of ``log.jsonl``, or none.
        facts: what a reader needs to repeat the numbers.
        commands: the exact command lines.

    Raises:
        UsageError: a file that cannot be read any more, or written.
    """
    beside = markdown_path(path)
    provenance = predictor.runtime.description.provenance
    report = Report(
        title,
        evaluation,
        predictor.classes,
        gallery=read_gallery(
            choose_gallery(evaluation),
            evaluation,
            predictor,
            dataset,
            CountSettings.from_extras(extras, predictor.classes),
        ),
        thumbnails=thumbnails,
        log=log,
        facts={**facts, "Held out": dataset.splits_by} if dataset.splits_by else facts,
        caveats=find_caveats(
            evaluation,
            dataset,
            provenance,
            _twins(evaluation, dataset) if is_training_dataset(dataset, provenance) else None,
        ),
        causes=evaluation.causes,
        commands=commands,
        temperature_fitted_here=evaluation.split == "val"
        and is_training_dataset(dataset, provenance),
    )
    write_report(path, report)
    write_markdown(beside, report)


def markdown_path(path: Path) -> Path:
    """Return where the Markdown beside a page goes.

    Raises:
        UsageError: the page itself has that name, or there is no such folder.
    """
    if not path.parent.is_dir():
        raise UsageError(
            f"'{path}' cannot be written, because there is no folder '{path.parent}'; make it or choose another place"
        )
    beside = path.with_suffix(".md")
    if beside == path:
        raise UsageError(
            f"the page is to be written to '{path}', but its Markdown beside it takes that name; give a name that ends in .html"
        )
    return beside


def _twins(evaluation: Evaluation, dataset: Dataset) -> int | None:
    """Count the images that are nearly the same as one of the training split; None where it takes too long to look."""
    own, trained = [image.pair for image in evaluation.images], list(dataset.of("train"))
    if (
        evaluation.split in ("train", "all")
        or not trained
        or not is_quick_to_compare([*own, *trained])
    ):
        return None
    groups = group_near_duplicates(compute_signatures(dataset, [*own, *trained]))
    there = set(groups[len(own) :].tolist())
    return sum(group in there for group in groups[: len(own)].tolist())


def run_facts(run: Run) -> dict[str, str]:
    """Return what a reader needs to repeat a run, in words."""
    model, working = run.settings.model, run.settings.data
    return {
        "Network": f"U-Net, encoder {model.encoder}, width {model.width}, depth {model.depth}, {model.padding} padding",
        "Working size": "x".join(map(str, working.size))
        if working.size
        else f"scale {working.scale}",
        "Seed": str(run.settings.train.seed),
        **machine_facts(),
    }


def machine_facts() -> dict[str, str]:
    """Return on what the numbers were computed, in words."""
    machine = describe_machine()
    return {
        "Machine": f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, useg {machine['useg']}"
    }


def command_lines(model: str, data: str, split: str) -> list[Command]:
    """Return the command lines that measure a model again and use it."""
    quoted, source = shlex.quote(model), shlex.quote(data)
    return [
        Command(
            f"useg evaluate {quoted} {source} --split {split} --html report.html",
            "measure this again",
        ),
        Command(f"useg predict {quoted} PICTURES --out LABELS", "label new pictures"),
        Command(f"useg inspect {source}", "look through the data set for what is wrong with it"),
    ]


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
    progress: CountProgress = lambda done, total: None,
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
    dataset = open_evaluation_data(predictor, data, settings)
    if not html:
        return add_causes(
            evaluate_dataset(predictor, dataset, split, extras=extras, progress=progress),
            dataset,
            predictor,
            extras,
        )
    markdown_path(Path(html))  # a slip is answered before the work
    thumbnails: list[bytes] = []
    evaluation = evaluate_dataset(
        predictor,
        dataset,
        split,
        extras=extras,
        progress=progress,
        on_prediction=collect_thumbnails(thumbnails),
    )
    evaluation = add_causes(evaluation, dataset, predictor, extras)
    lines = command_lines("MODEL" if isinstance(model, Predictor) else str(model), str(data), split)
    publish_report(
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
    progress: CountProgress = lambda done, total: None,
) -> Comparison:
    """Score two models on the same images, and say how much better the first is and how sure that is.

    The images are split as when ``model`` was trained; arguments and errors as for :func:`evaluate`.

    Raises:
        UsageError: also when ``against`` held out other images, so that it may have trained on these.
    """
    first, second = (
        part if isinstance(part, Predictor) else load(part) for part in (model, against)
    )
    if not settings:
        check_same_split(first, second)
    dataset = open_evaluation_data(first, data, settings)
    return compare_evaluations(
        *(
            evaluate_dataset(predictor, dataset, split, extras=extras, progress=progress)
            for predictor in (first, second)
        )
    )


def open_evaluation_data(
    predictor: Predictor, data: str | Path, settings: Mapping[str, Any] | None = None
) -> Dataset:
    """Open a data set split as when the model was trained, unless ``settings`` say otherwise, and with its classes where the set names none.

    Where the run folder is there, its ``split.csv`` says what the model has trained on, whatever has become of the data set since; an exported
    file alone says only how the set was split.

    Raises:
        UsageError: as for :func:`open_dataset`.
    """
    if not settings:
        check_same_split(predictor)
    provenance = predictor.runtime.description.provenance
    chosen = Settings().with_({**provenance.get("split", {}), **(settings or {})})
    says_itself = (
        chosen.data.classes or not Path(data).is_dir() or (Path(data) / "classes.toml").exists()
    )
    classes = None if says_itself else predictor.classes
    source = Path(predictor.runtime.source)
    splits = (source if source.is_dir() else source.parent) / "split.csv"
    if not settings and splits.exists() and splits.with_name("run.toml").exists():
        dataset = find_dataset(Path(data), classes)
        if dataset.root.name == provenance.get("dataset") and (
            recalled := restore_splits(splits, dataset, provenance.get("splits_by", ""))
        ):
            return recalled
    return open_dataset(data, chosen, classes)
