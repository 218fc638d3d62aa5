"""An evaluation -> its report on disk: the page with pictures, and the same in Markdown beside it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from useg.data.dataset import Dataset
from useg.data.glances import affordable, signatures
from useg.data.twins import clusters
from useg.errors import UsageError
from useg.machine import describe
from useg.reporting.counting import Asked, Extras
from useg.reporting.evaluate import Evaluation
from useg.reporting.gallery import choose, read_cases
from useg.reporting.markdown import write_markdown
from useg.reporting.report import write_report
from useg.reporting.story import Command, Report, caveats, trained_here

if TYPE_CHECKING:
    from useg.inference.predictor import Predictor
    from useg.training.loop import Run


def publish(
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
        thumbnails: :func:`useg.reporting.gallery.thumbnail` of each image, or none at all.
        log: rows of ``log.jsonl``, or none.
        facts: what a reader needs to repeat the numbers.
        commands: the exact command lines.

    Raises:
        UsageError: a file that cannot be read any more, or written.
    """
    beside = markdown_path(path)
    provenance = predictor.runtime.card.provenance
    report = Report(
        title,
        evaluation,
        predictor.classes,
        cases=read_cases(choose(evaluation), evaluation, predictor, dataset, Asked.of(extras, predictor.classes)),
        thumbnails=thumbnails,
        log=log,
        facts={**facts, "Held out": dataset.splits_by} if dataset.splits_by else facts,
        caveats=caveats(evaluation, dataset, provenance, _twins(evaluation, dataset) if trained_here(dataset, provenance) else None),
        causes=evaluation.causes,
        commands=commands,
        fitted_here=evaluation.split == "val" and trained_here(dataset, provenance),
    )
    write_report(path, report)
    write_markdown(beside, report)


def markdown_path(path: Path) -> Path:
    """Return where the Markdown beside a page goes.

    Raises:
        UsageError: the page itself has that name, or there is no such folder.
    """
    if not path.parent.is_dir():
        raise UsageError(f"'{path}' cannot be written, because there is no folder '{path.parent}'; make it or choose another place")
    beside = path.with_suffix(".md")
    if beside == path:
        raise UsageError(f"the page is to be written to '{path}', but its Markdown beside it takes that name; give a name that ends in .html")
    return beside


def _twins(evaluation: Evaluation, dataset: Dataset) -> int | None:
    """Count the images that are nearly the same as one of the training split; None where it takes too long to look."""
    own, trained = [image.pair for image in evaluation.images], list(dataset.of("train"))
    if evaluation.split in ("train", "all") or not trained or not affordable([*own, *trained]):
        return None
    groups = clusters(signatures(dataset, [*own, *trained]))
    there = set(groups[len(own) :].tolist())
    return sum(group in there for group in groups[: len(own)].tolist())


def run_facts(run: Run) -> dict[str, str]:
    """Return what a reader needs to repeat a run, in words."""
    model, working = run.settings.model, run.settings.data
    return {
        "Network": f"U-Net, encoder {model.encoder}, width {model.width}, depth {model.depth}, {model.padding} padding",
        "Working size": "x".join(map(str, working.size)) if working.size else f"scale {working.scale}",
        "Seed": str(run.settings.train.seed),
        **machine_facts(),
    }


def machine_facts() -> dict[str, str]:
    """Return on what the numbers were computed, in words."""
    machine = describe()
    return {"Machine": f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, useg {machine['useg']}"}


def command_lines(model: str, data: str, split: str) -> list[Command]:
    """Return the command lines that measure a model again and use it."""
    quoted, source = shlex.quote(model), shlex.quote(data)
    return [
        Command(f"useg evaluate {quoted} {source} --split {split} --html report.html", "measure this again"),
        Command(f"useg predict {quoted} PICTURES --out LABELS", "label new pictures"),
        Command(f"useg inspect {source}", "look through the data set for what is wrong with it"),
    ]
