"""``useg train`` and ``useg evaluate``: train a model or K models on a data set; score a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from useg.console import (
    Assignments,
    Augmentation,
    Data,
    Device,
    HtmlFile,
    JsonFile,
    Model,
    Out,
    Reporter,
    finite,
    global_options,
    print_json,
    runtime_option,
    show,
)
from useg.errors import SettingsError


def _print_settings(wanted: bool) -> None:
    if wanted:
        from useg.config import describe_settings

        show("'-' as default: useg decides from the data, the machine and the time.\n")
        for key, default, text in describe_settings():
            show(f"{key:22} {default:>12}  {text}")
        raise typer.Exit


def train_command(
    data: Data,
    out: Out,
    minutes: Annotated[
        float | None,
        typer.Option(
            callback=finite, help="Total minutes, including decoding and report (default 10)"
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the training images, instead of --minutes")
    ] = None,
    assign: Assignments = [],  # noqa: B006 - typer copies it
    config: Annotated[
        Path | None,
        typer.Option("--config", help="TOML file of settings; a run.toml repeats its run"),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="MODEL",
            help="Run folder or model.safetensors with the initial weights; also sets the network "
            "and the working size",
        ),
    ] = None,
    class_map: Annotated[
        str | None,
        typer.Option(
            "--map",
            metavar="NAME=NAME,...",
            help="With --from, for renamed classes: class of DATA=class of MODEL",
        ),
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            help="K-fold cross-validation: estimate scores on new images, and on new groups if "
            "file names show groups",
        ),
    ] = None,
    final: Annotated[
        bool,
        typer.Option("--final", help="With --folds: also train a model on all images"),
    ] = False,
    unlabelled: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder of unlabelled images from the place where the model will work; if their "
            "colours lower the score, training crops are recoloured to match them",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Continue the interrupted run in --out; the result is identical")
    ] = False,
    deterministic: Annotated[
        bool, typer.Option(help="Reproducible results on a GPU (slower)")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Train even if useg inspect finds errors in DATA")
    ] = False,
    device: Device = None,
    json_file: JsonFile = None,
    settings_: Annotated[
        bool,
        typer.Option(
            "--settings", help="List all settings and exit", is_eager=True, callback=_print_settings
        ),
    ] = False,
) -> None:
    """Train a U-Net on DATA and write model.safetensors and report.html to --out.

    useg picks every setting that you omit and prints why.
    """
    from useg.config import Settings, parse_assignments

    settings = parse_assignments(assign)
    if deterministic:
        settings["train.deterministic"] = True
    if unlabelled is not None:
        if "data.unlabelled" in settings:
            raise SettingsError("--unlabelled and data.unlabelled are both set; give only one")
        settings["data.unlabelled"] = str(unlabelled)
    if class_map is not None:
        if start is None:
            raise SettingsError("--map only works with --from MODEL; add it")
        from useg.data.class_mapping import parse_class_map

        parse_class_map(class_map)
        settings["model.start_map"] = class_map
    # A mistake in the settings is reported at once, before torch is loaded.
    Settings().with_(settings)
    if final and folds is None:
        raise SettingsError("--final only works with --folds K; add it")
    from useg.api import train
    from useg.distributed import is_main_process

    arguments: dict[str, Any] = {
        "minutes": minutes,
        "epochs": epochs,
        "settings": settings,
        "config": config,
        "start": start,
        "resume": resume,
        "force": force,
    }
    if folds is not None:
        _train_folds(data, out, folds, final, json_file, arguments)
        return
    with Reporter(global_options.quiet) as reporter:
        run = train(data, out, progress=reporter, **arguments)
    if not is_main_process():
        return
    if json_file:
        steps = {"steps": len(run.log), "interrupted": run.interrupted}
        print_json(json_file, {**run.scores.as_dict(), **steps})
    if json_file != Path("-"):
        mean_iou, accuracy = 100 * run.scores.mean_iou, 100 * run.scores.pixel_accuracy
        show(f"validation mIoU {mean_iou:.1f} %, pixel accuracy {accuracy:.1f} %")
        show(out / ("model.safetensors" if run.interrupted else "report.html"))
    if run.interrupted:
        raise typer.Exit(130)


def _train_folds(
    data: Path,
    out: Path,
    folds: int,
    final: bool,
    json_file: Path | None,
    arguments: dict[str, Any],
) -> None:
    from useg.cross_validation import FOLDS_NAME, train_folds

    with Reporter(global_options.quiet) as reporter:
        result = train_folds(data, out, folds, final=final, progress=reporter, **arguments)
    if json_file:
        print_json(json_file, result.as_dict())
    if result.interrupted:
        show(f"interrupted; continue with the same command and --resume: {out}")
        raise typer.Exit(130)
    if json_file != Path("-"):
        show("\n".join(result.lines()))
        show(out / ("model.safetensors" if final else FOLDS_NAME))


def evaluate_command(
    model: Model,
    data: Data,
    split: Annotated[
        str | None,
        typer.Option(
            help="Images to score: val, train, test or all "
            "(default: val of the training data, all of other data)"
        ),
    ] = None,
    class_map: Annotated[
        str | None,
        typer.Option(
            "--map",
            metavar="NAME=NAME,...",
            help="Class of DATA=class of the model; or 'ids' if both use the same ids for the "
            "same classes",
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", help="Compare with a second model on the same images"),
    ] = None,
    ignore_mask: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Ignore pixels that are not 0 in this image, such as a car's hood"
        ),
    ] = None,
    objects: Annotated[
        str | None,
        typer.Option(
            metavar="CLASS",
            help="Also count found, merged and split objects (connected regions) of a class",
        ),
    ] = None,
    membranes: Annotated[
        str | None,
        typer.Option(
            metavar="CLASS",
            help="Also compute the ISBI 2012 errors (warping, Rand, pixel); CLASS is the membrane",
        ),
    ] = None,
    tolerance: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS",
            help="Tolerance of the boundary F-score (default: 0.8 % of the image diagonal)",
        ),
    ] = None,
    tile: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS",
            help="Side of the tiles to predict in (0: one pass); scores do not change",
        ),
    ] = None,
    runtime: Annotated[
        str | None, runtime_option("the one that the model file was made for, in fp32")
    ] = None,
    device: Device = None,
    augment: Augmentation = "none",
    json_file: JsonFile = None,
    html: HtmlFile = None,
    assign: Assignments = [],  # noqa: B006 - typer copies it
) -> None:
    """Score a model on a data set, at the resolution of the masks, with 95 % intervals."""
    from useg.config import parse_assignments
    from useg.data.class_mapping import parse_class_map
    from useg.inference.predictor import load
    from useg.reporting.evaluate import Extras
    from useg.reporting.report import compare, evaluate
    from useg.reporting.text import comparison_lines, evaluation_lines

    if against and html:
        raise SettingsError(
            "--html and --against cannot be combined, because a report shows one model; omit one"
        )
    extras = Extras(ignore_mask, tolerance, objects, membranes, tile)
    settings = parse_assignments(assign)
    mapping = None if class_map is None else parse_class_map(class_map)
    with Reporter(global_options.quiet) as reporter:

        def count(done: int, total: int) -> None:
            reporter.count("scoring", done, total)

        if against:
            first, second = load(model, runtime, augment), load(against, runtime, augment)
            comparison = compare(
                first,
                second,
                data,
                split,
                settings=settings,
                extras=extras,
                class_map=mapping,
                progress=count,
            )
            content, lines = comparison.as_dict(), comparison_lines(comparison)
        else:
            evaluation = evaluate(
                model,
                data,
                split,
                settings=settings,
                extras=extras,
                class_map=mapping,
                html=html,
                runtime=runtime,
                augment=augment,
                progress=count,
            )
            content, lines = evaluation.as_dict(), evaluation_lines(evaluation)
    if json_file:
        print_json(json_file, content)
    if json_file != Path("-"):
        show("\n".join(lines))
