"""``useg predict``: label images, large images and videos here or on a cluster, or rank images.

The command refuses options that its mode does not use, so that none is dropped without a word.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from useg.console import (
    Augmentation,
    Device,
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
from useg.errors import SettingsError, UsageError, format_count
from useg.files import refuse_same_names
from useg.machine import paused_garbage_collection
from useg.ownership import is_own_video, refuse_foreign_files
from useg.parsing import printable, shorten

if TYPE_CHECKING:
    from useg.inference.outputs import OutputOptions

MAX_FAILURES_PRINTED = 20


def predict_command(
    model: Model,
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...", help="Images, folders, quoted globs, videos, TIFFs of any size"
        ),
    ],
    out: Out,
    overlays: Annotated[bool, typer.Option(help="Also write overlays")] = True,
    labels: Annotated[
        str, typer.Option(metavar="FORMAT", help="Format of the label maps: png or tif")
    ] = "png",
    probabilities: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE", help="Also write class probabilities as TIFF: uint8 or float16"
        ),
    ] = None,
    confidence: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT", help="Also write the probability of the predicted class: png or tif"
        ),
    ] = None,
    polygons: Annotated[
        bool,
        typer.Option(
            "--polygons", help="Also write regions as GeoJSON, in map coordinates for GeoTIFFs"
        ),
    ] = False,
    coco: Annotated[
        bool, typer.Option("--coco", help="Also write all regions to one coco.json")
    ] = False,
    areas: Annotated[
        bool, typer.Option("--areas", help="Also write pixel counts per class to one areas.csv")
    ] = False,
    tool: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Also write files for corrections in a tool: labelme, cvat or label-studio",
        ),
    ] = None,
    objects: Annotated[
        bool,
        typer.Option(
            "--objects",
            help="Also write numbered objects: OUT/objects/*.tif, and a table, OUT/objects.csv",
        ),
    ] = False,
    min_region: Annotated[
        int, typer.Option(metavar="PIXELS", help="Merge smaller regions into their surroundings")
    ] = 0,
    max_hole: Annotated[int, typer.Option(metavar="PIXELS", help="Fill smaller holes")] = 0,
    augment: Augmentation = "none",
    smooth: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            callback=finite,
            help="Reduce video flicker: share of the previous frame to blend in (0 to below 1)",
        ),
    ] = 0.0,
    rank: Annotated[
        bool,
        typer.Option(
            "--rank", help="Only write OUT/ranking.csv: the images to label next, most useful first"
        ),
    ] = False,
    shard: Annotated[
        str,
        typer.Option(
            metavar="I/N", help="Label only part I of N, to divide the work between N processes"
        ),
    ] = "1/1",
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Label on the Ray cluster at this address (label maps only); local starts one on "
            "this machine",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Number of workers on the cluster (default: one per core)")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option(help="Label images again even if their label maps are up to date")
    ] = False,
    runtime: Annotated[
        str | None,
        runtime_option(
            "auto; for shards, clusters and images larger than memory, the one that the model "
            "file was made for, in fp32"
        ),
    ] = None,
    device: Device = None,
    json_file: JsonFile = None,
) -> None:
    """Label images: write label maps (palette PNGs) to OUT, and overlays to OUT/overlays.

    Run the same command again to continue an interrupted job. Exit status 1 means that some images
    could not be labelled.
    """
    with paused_garbage_collection(freeze=True):
        from useg.inference.outputs import OutputOptions
        from useg.inference.video import VIDEO_SUFFIXES

    options = OutputOptions(
        labels,
        overlays,
        probabilities,
        confidence,
        polygons,
        coco,
        areas,
        min_region,
        max_hole,
        tool,
        objects,
    )
    job = _Job(
        model, tuple(sources), out, options, parse_shard(shard), overwrite, runtime, augment, smooth
    )
    videos = [source for source in sources if Path(source).suffix.lower() in VIDEO_SUFFIXES]
    images = [source for source in sources if source not in videos]
    given = _given_options(job)
    if workers is not None and cluster is None:
        raise SettingsError("--workers applies to --cluster, which is not given; leave it out")
    if rank:
        given |= {"--cluster": cluster is not None, "a video": bool(videos)}
        _refuse(given, "--rank, which writes a ranking and no label maps")
    elif cluster is not None:
        _refuse({**given, "a video": bool(videos)}, "--cluster, which writes label maps only")
    elif not images:
        _refuse({**given, "--augment": False, "--smooth": False}, "videos alone")
    elif not videos and smooth:
        raise SettingsError("--smooth applies to videos, and no source is one; leave it out")
    with Reporter(global_options.quiet) as reporter:
        if rank:
            result = _rank(job, reporter)
        elif cluster is not None:
            result = _label_on_cluster(job, cluster, workers, reporter)
        else:
            result = _label(job, images, videos, reporter)
    if json_file:
        failed = [{"path": path, "error": reason} for path, reason in result.failed]
        print_json(json_file, {**result.content, "failed": failed})
    if json_file != Path("-"):
        show(result.summary)
    _report_failures(result, "ranked" if rank else "labelled")


def parse_shard(text: str) -> tuple[int, int]:
    """Parse ``"2/3"``, the second of three parts of a job, into ``(2, 3)``.

    Raises:
        SettingsError: The text has another form, or the part is out of range.
    """
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    shard = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= shard[0] <= shard[1]:
        raise SettingsError(
            f"{shorten(text)} is not a shard; "
            f"give I/N with I from 1 to N: 2/3 is the second of three shards"
        )
    return shard


@dataclass(frozen=True)
class _Job:
    """The arguments of the command, but for its mode."""

    model: Path
    sources: tuple[str, ...]
    out: Path
    options: OutputOptions
    shard: tuple[int, int]
    overwrite: bool
    runtime: str | None
    augment: str
    smooth: float

    def runtime_for(self, images: Sequence[Path]) -> str | None:
        """Return the runtime: by default the fastest, but exact where parts have to fit together.

        These are the shards of a job, and the tiles of images larger than memory.
        """
        from useg.inference.predict_files import is_larger_than_memory

        if self.runtime is not None:
            return self.runtime
        is_whole = self.shard == (1, 1) and not any(map(is_larger_than_memory, images))
        return "auto" if is_whole else None


@dataclass(frozen=True)
class _Result:
    """What a mode returns: content for JSON, a summary to print, and (path, reason) of failures."""

    content: dict[str, Any]
    summary: str
    failed: Sequence[tuple[str, str]] = ()


def _given_options(job: _Job) -> dict[str, bool]:
    """Return the options that only labelling images here uses, and whether each was given."""
    options = job.options
    return {
        "--labels tif": options.labels != "png",
        "--probabilities": options.probabilities is not None,
        "--confidence": options.confidence is not None,
        "--polygons": options.polygons,
        "--coco": options.coco,
        "--areas": options.areas,
        "--tool": options.tool is not None,
        "--objects": options.objects,
        "--min-region": options.min_region != 0,
        "--max-hole": options.max_hole != 0,
        "--augment": job.augment != "none",
        "--smooth": job.smooth != 0,
        "--shard": job.shard != (1, 1),
        "--overwrite": job.overwrite,
    }


def _refuse(given: Mapping[str, bool], mode: str) -> None:
    """Refuse options that a mode does not use.

    Raises:
        SettingsError: one of them was given.
    """
    unused = [option for option, is_given in given.items() if is_given]
    if unused:
        verb = "does" if len(unused) == 1 else "do"
        it = "it" if len(unused) == 1 else "them"
        raise SettingsError(f"{', '.join(unused)} {verb} not apply to {mode}; leave {it} out")


def _label(job: _Job, images: Sequence[str], videos: Sequence[str], reporter: Reporter) -> _Result:
    content: dict[str, Any] = {"num_images": 0, "kept": 0, "label_maps": [], "videos": []}
    lines = []
    failed: list[tuple[str, str]] = []
    if images:
        from useg.inference.predict_files import find_sources, find_stack, plan_outputs, predict

        found = find_sources(images)
        if videos:
            # The videos come first, but neither may begin if the other is refused.
            stacks = {path: find_stack(path) for path in found.images}
            plan_outputs(stacks, job.out, job.options)
    for entry, line in _label_videos(job, videos, reporter):
        content["videos"].append(entry)
        lines.append(line)
    if images:
        outcome = predict(
            job.model,
            found,
            job.out,
            wanted=job.options,
            shard=job.shard,
            overwrite=job.overwrite,
            runtime=job.runtime_for(found.images),
            augment=job.augment,
            progress=reporter.timed("labelling"),
        )
        failed = [(str(failure.path), failure.reason) for failure in outcome.failed]
        label_maps = [str(path) for path in outcome.label_maps]
        content |= {"num_images": len(label_maps), "kept": outcome.kept, "label_maps": label_maps}
        lines += _describe_left_out(outcome.left_out)
        content["left_out"] = [str(path) for path in outcome.left_out]
        content["runtime"] = outcome.runtime
        content["unlike_training"] = [str(path) for path in outcome.unlike]
        lines += _describe_unlike(outcome.unlike, outcome.num_images - outcome.kept)
        line = _count_label_maps(len(label_maps), outcome.kept, job.out)
        lines += [f"{line}, computed by {outcome.runtime}", *outcome.notes]
    return _Result(content, "\n".join(lines), failed)


def _describe_unlike(unlike: Sequence[Path], num_labelled: int) -> list[str]:
    """Name the images that differ from the training images, if there are any."""
    if not unlike:
        return []
    more = f" and {len(unlike) - 3:,} more" if len(unlike) > 3 else ""
    names = ", ".join(printable(path.name) for path in unlike[:3])
    differ = "differs" if len(unlike) == 1 else "differ"
    return [
        f"{len(unlike):,} of {format_count(num_labelled, 'image')} {differ} from the training "
        f"images in brightness, contrast, colours or sharpness: {names}{more}; expect more errors "
        "there"
    ]


def _label_videos(
    job: _Job, videos: Sequence[str], reporter: Reporter
) -> list[tuple[dict[str, Any], str]]:
    """Label videos; returns an entry for JSON and a line for each."""
    if not videos:
        return []
    from useg.inference.video import predict_video, video_target

    stems = sorted(Path(video).stem for video in videos)
    if len(set(stems)) < len(stems):
        raise UsageError(
            f"two videos have the same name ({', '.join(stems)}), so one would overwrite the "
            "other; label them into different folders"
        )
    names = ("mask", *(("overlay",) if job.options.overlays else ()))
    targets = [video_target(job.out, Path(video), name) for video in videos for name in names]
    refuse_same_names(targets)
    refuse_foreign_files((target, is_own_video) for target in targets)
    results = []
    for video in videos:
        result = predict_video(
            job.model,
            video,
            job.out,
            overlays=job.options.overlays,
            smooth=job.smooth,
            runtime=job.runtime or "auto",
            augment=job.augment,
            progress=reporter.timed("labelling"),
        )
        written = [str(path) for path in (result.overlay, result.masks) if path]
        entry = {
            "path": video,
            "frames": result.frames,
            "seconds": result.seconds,
            "flicker": result.flicker,
            "written": written,
        }
        line = (
            f"{' and '.join(written)}: {result.frames} frames at "
            f"{result.frames_per_second:.1f} frames/s, "
            f"flicker {100 * result.flicker:.2f} %; sound is not copied"
        )
        results.append((entry, line))
    return results


def _rank(job: _Job, reporter: Reporter) -> _Result:
    from useg.inference.predict_files import find_sources
    from useg.inference.predictor import load
    from useg.inference.ranking import write_ranking

    model = load(job.model, job.runtime or "auto")
    ranking = write_ranking(model, job.sources, job.out, progress=reporter.timed("ranking"))
    order = [
        {"path": str(one.path), "gain": one.gain, "uncertainty": one.uncertainty}
        for one in ranking.order
    ]
    failed = [(str(failure.path), failure.reason) for failure in ranking.failed]
    content = {"num_images": len(order), "ranking": order}
    lines = [*_describe_left_out(find_sources(job.sources).left_out), str(job.out / "ranking.csv")]
    return _Result(content, "\n".join(lines), failed)


def _label_on_cluster(job: _Job, address: str, workers: int | None, reporter: Reporter) -> _Result:
    from useg.inference.cluster import predict_cluster

    done = predict_cluster(
        job.model,
        job.sources,
        str(job.out),
        address=None if address == "local" else address,
        workers=workers,
        runtime=job.runtime,
        progress=reporter.timed("labelling"),
    )
    count = done.num_images - len(done.failed)
    content = {"num_images": count, "kept": done.kept, "seconds": done.seconds}
    line = _count_label_maps(count, done.kept, job.out)
    return _Result(content, line, [(str(each.path), each.reason) for each in done.failed])


def _describe_left_out(masks: Sequence[Path]) -> list[str]:
    if not masks:
        return []
    return [
        f"left out {format_count(len(masks), 'mask')} of other images, such as {masks[0]}; to "
        f"label such files too, name them, for example '{masks[0].parent}/*{masks[0].suffix}'"
    ]


def _count_label_maps(count: int, kept: int, out: Path) -> str:
    up_to_date = f", {kept} of them already up to date" if kept else ""
    return f"{format_count(count, 'label map')} in {out}{up_to_date}"


def _report_failures(result: _Result, verb: str) -> None:
    """Print the images that failed and end with exit status 1, if there are any."""
    if not result.failed:
        return
    for _, reason in result.failed[:MAX_FAILURES_PRINTED]:
        show(f"useg: {reason}", file=sys.stderr)
    count = len(result.failed)
    total = count + result.content["num_images"]
    rest = "; --json FILE lists them all" if count > MAX_FAILURES_PRINTED else ""
    show(f"useg: {count} of {total} images could not be {verb}{rest}", file=sys.stderr)
    raise typer.Exit(1)
