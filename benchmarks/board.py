"""The results of the benchmarks -> docs/benchmarks.md: a table per question, and the missed goals.

    python benchmarks/board.py

Reads results/*.json and measures nothing. A question without a result names the command that
answers it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from record import RESULTS, ROOT

Results = Mapping[str, Mapping[str, Any]]
# Data set -> the goal: the share of the time of a course's 40 epochs that reaches its score.
SHARES_OF_COURSE = {"carla": 0.2}
_HOW = {"images_per_second": "", "by_step": ", by step"}
# What trials.py scores of a run besides its last weights.
AVERAGED = {
    "ema_0.02": "weights averaged over 2 % of the steps",
    "ema_0.1": "over 10 %",
    "new_statistics": "batch-norm statistics recomputed",
}
# Minutes of training that should each exceed the score of the course's recipe.
BETTER_MINUTES = ("2", "5", "10")


def results() -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def page(found: Results) -> str:
    """Return the page for results by name."""
    parts = [
        f"## {title}\n\n{section(found) or f'Not measured yet: `{command}`.'}"
        for title, command, section in SECTIONS
    ]
    return "\n\n".join([HEAD, *parts]) + "\n"


def training(found: Results) -> str:
    parts = []
    for name in _named(found, "peers_"):
        content = found[name]
        whole = {
            ratio["of"]: ratio["value"]
            for ratio in content["ratios"]
            if ratio["measured"] == "images_per_second"
        }
        rows = []
        for row in content["rows"]:
            ours = row["name"] == "useg"
            speeds = (
                _3(row["images_per_second"]),
                _3(row["by_step"]),
                _percent(row["share_of_peak"]),
            )
            rows.append(
                (
                    "**useg train**" if ours else row["name"],
                    row["precision"],
                    *speeds,
                    "" if ours else f"{whole[row['name']]:.2f} x",
                )
            )
        bars = [
            (
                f"{ratio['value']:.2f} of the {content['rows'][0]['precision']} peak"
                if ratio["of"] == "peak"
                else f"{ratio['value']:.2f} times as fast as {ratio['of']}"
                f"{_HOW[ratio['measured']]}",
                ratio,
            )
            for ratio in content["ratios"]
            if ratio["bar"] is not None
        ]
        left = [f"Left out: {peer} ({why})." for peer, why in content["left_out"].items()]
        table = _table(
            (
                "trained by",
                "precision",
                "images/s",
                "by step",
                "share of peak",
                "useg is faster by",
            ),
            rows,
        )
        medians = f"Medians of {_many(len(content['rounds']), 'round')}."
        verdicts = [
            _verdict(what, ratio["value"] >= ratio["bar"], f"at least {ratio['bar']:g}")
            for what, ratio in bars
        ]
        parts.append(
            "\n\n".join(
                [
                    f"### {content['title']}",
                    table,
                    " ".join([medians, *verdicts, *left]),
                    _source(name, content),
                ]
            )
        )
    parts += training_steps(found)
    return "\n\n".join([TRAINING, *parts]) if parts else ""


def training_steps(found: Results) -> list[str]:
    """Return steps of the default network beside those of an older commit and of a package."""
    if "training_step" not in found:
        return []
    content = found["training_step"]
    before, peer, shown = [], [], []
    for row in content["rows"]:
        seconds = {name: row[name]["milliseconds"] for name in ("after", "before", "smp")}
        before.append(row["after"]["times_as_fast"][0])
        peer.append(seconds["smp"] / seconds["after"])
        times = [f"{milliseconds:.0f}" for milliseconds in seconds.values()]
        ratios = [f"{ratio:.2f} x" for ratio in (before[-1], peer[-1])]
        shown.append((row["size"], str(row["batch"]), *times, *ratios))
    package = "segmentation_models.pytorch"
    older = f"useg before (commit {content['commits']['before'][:7]})"
    heads = ("useg", older, package, "times as fast as before", "as the package")
    verdicts = [
        _verdict(
            f"at least {min(found):.2f} times as fast as {name}", min(found) >= goal, f"{goal}"
        )
        for name, found, goal in (("before", before, 1.8), (package, peer, 4))
    ]
    title = "### A step of EfficientNet-Lite0, in milliseconds"
    rounds = f"Medians of {_many(content['rounds'], 'round')}, {content['threads']} threads."
    sentences = " ".join([rounds, *verdicts])
    table = _table(("crops", "batch", *heads), shown)
    return ["\n\n".join([title, table, sentences, _source("training_step", content)])]


def accuracy(found: Results) -> str:
    parts = []
    for name in _named(found, "accuracy_"):
        content = found[name]
        course = content["course"]
        rows = [
            _scored(
                f"course's recipe, {content['epochs']} epochs",
                course,
                content["course_runs"],
                course,
            )
        ]
        for minutes, mean in sorted(content["minutes"].items(), key=lambda entry: float(entry[0])):
            rows.append(
                _scored(f"`useg train --minutes {minutes}`", mean, content["runs"][minutes], course)
            )
        reached = content["time_to_accuracy"]
        least, bar = min(content["minutes"], key=float), SHARES_OF_COURSE.get(content["dataset"])
        if not reached:
            goal = f" (goal: in at most {bar} of its time)" if bar else ""
            verdicts = [f"**Missed**: no run reaches the course's score{goal}."]
        elif bar:
            share = reached["share_of_course"]
            sentence = f"the course's score is reached in {share:.2f} of its time"
            verdicts = [_verdict(sentence, share <= bar, f"at most {bar:g}")]
        else:
            verdicts = [
                f"The course's score is reached in {reached['share_of_course']:.2f} of its time; "
                f"`--minutes {least}` is the shortest run here."
            ]
        lower = [
            minutes
            for minutes in BETTER_MINUTES
            if minutes in content["minutes"]
            and content["minutes"][minutes]["mean_iou"] <= course["mean_iou"]
        ]
        if lower:
            verdicts.append(f"**Missed**: {' and '.join(lower)} minutes do not exceed that score.")
        table = _table(
            ("what", "seconds", "mean IoU", "from, to", "seeds", "share of the course's time"), rows
        )
        source = _source(name, {"machine": content["course_runs"][0].get("machine", {}), **content})
        parts.append(
            "\n\n".join(
                [
                    f"### {content['dataset']}, means over the seeds",
                    table,
                    " ".join(verdicts),
                    source,
                ]
            )
        )
    return "\n\n".join([ACCURACY, *parts]) if parts else ""


def _scored(
    what: str, mean: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], course: Mapping[str, Any]
) -> tuple[str, ...]:
    scores = [run["mean_iou"] for run in runs]
    share = "" if mean is course else f"{mean['wall_seconds'] / course['wall_seconds']:.2f}"
    return (
        what,
        _3(mean["wall_seconds"]),
        f"{mean['mean_iou']:.3f}",
        f"{min(scores):.3f}, {max(scores):.3f}",
        str(len(scores)),
        share,
    )


def trials(found: Results) -> str:
    if "trials" not in found:
        return ""
    runs = found["trials"]["runs"]
    by_case = {(run["variant"], run["set"], run["seed"]): run["mean_iou"] for run in runs}
    sets, rows = sorted({run["set"] for run in runs}), []
    for variant in dict.fromkeys(run["variant"] for run in runs):
        base = variant.rpartition(", ")[0] or {"lite0": "plain", "plain": ""}.get(variant, "lite0")
        cells = []
        for name in sets:
            own = {
                seed: score
                for (what, where, seed), score in by_case.items()
                if (what, where) == (variant, name)
            }
            gains = [
                score - by_case[base, name, seed]
                for seed, score in own.items()
                if (base, name, seed) in by_case
            ]
            span = f" ({min(gains):+.3f} .. {max(gains):+.3f})" if len(gains) > 1 else ""
            gained = f", {fmean(gains):+.3f}{span}" if gains else ""
            cells.append(
                f"{fmean(own.values()):.3f}{gained}, {_many(len(own), 'seed')}" if own else ""
            )
        rows.append((variant, base, *cells))
    averages = [
        f"{what}: {fmean(run[key] - run['mean_iou'] for run in runs):+.4f}"
        for key, what in AVERAGED.items()
    ]
    table = _table(("change", "compared with", *sets), rows)
    return "\n\n".join(
        [
            TRIALS,
            table,
            f"Mean gain over all {len(runs)} runs: {', '.join(averages)}.",
            _source("trials", found["trials"]),
        ]
    )


def generalisation(found: Results) -> str:
    """Compare the default with the earlier recipe and a peer, after the steps of two minutes."""
    if "generalise" not in found:
        return ""
    runs = [run for run in found["generalise"]["runs"] if run["minutes"] == 2]
    shown = {"default": "useg", "earlier recipe": "earlier recipe", SMP: SMP}
    folds = list(dict.fromkeys(run["fold"] for run in runs if run["name"] == "default"))
    rows: list[tuple[str, ...]] = []
    away: dict[str, dict[str, float]] = defaultdict(dict)
    home: dict[str, dict[str, float]] = defaultdict(dict)
    for fold in folds:
        cells = []
        for name in shown:
            own = [run["scores"] for run in runs if (run["name"], run["fold"]) == (name, fold)]
            if not own:
                cells.append("not run")
                continue
            groups = [each.get("away") or each["home"] for each in own]
            away[name][fold] = fmean(each["mean_iou"] for each in groups)
            right = _percent(fmean(each["pixels_right"] for each in groups))
            cell = f"{away[name][fold]:.3f}, {right}"
            if all("home" in each and "away" in each for each in own):
                home[name][fold] = fmean(each["home"]["mean_iou"] for each in own)
                cell += f" ({home[name][fold]:.3f})"
            cells.append(f"{cell}, {_many(len(own), 'seed')}")
        rows.append((fold, *cells))
    verdicts = []
    for name, goal in (("earlier recipe", 5), (SMP, 3)):
        gains = {fold: 100 * (away["default"][fold] - each) for fold, each in away[name].items()}
        if not gains:
            continue
        lowest = min(gains, key=lambda fold: gains[fold])
        sentence = (
            f"over {_many(len(gains), 'set')} useg scores {fmean(gains.values()):.1f} points more "
            f"than {shown[name]} on what was left out, from {gains[lowest]:+.1f} ({lowest}) to "
            f"{max(gains.values()):+.1f}"
        )
        verdicts.append(_verdict(sentence, fmean(gains.values()) >= goal, f"{goal} points"))
    lowest = {name: min(each.values()) for name, each in away.items() if each}
    verdicts.append(
        _verdict(
            f"the lowest score of a set is {lowest['default']:.3f}, and "
            f"{lowest['earlier recipe']:.3f} with the earlier recipe",
            lowest["default"] >= lowest["earlier recipe"],
            "not lower",
        )
    )
    kept = [100 * (home["default"][fold] - each) for fold, each in home["earlier recipe"].items()]
    sentence = f"on held-out images of the training groups it scores {fmean(kept):+.1f} points, "
    sentence += f"{min(kept):+.1f} in the worst set"
    verdicts.append(_verdict(sentence, min(kept) >= -1, "at most 1 point lower"))
    return "\n\n".join(
        [
            GENERALISATION,
            _table(("left out", *shown.values()), rows),
            " ".join(verdicts),
            _source("generalise", found["generalise"]),
        ]
    )


def demo(found: Results) -> str:
    if "demo" not in found:
        return ""
    content = found["demo"]
    quiet, disturbed = content["quiet"], content["disturbed"]
    lost = 100 * (quiet["mean_iou"] - disturbed["mean_iou"])
    rows = [
        (
            f"both cores busy for {each['busy_seconds']:.0f} s",
            f"{each['mean_iou']:.3f}",
            f"{each['seconds']:.0f}",
            f"{each['steps']}",
        )
        for each in (quiet, disturbed)
    ]
    sentence = f"a disturbed demo scores {lost:.1f} points less"
    return "\n\n".join(
        [
            _table(("", "mean IoU", "seconds", "training steps"), rows),
            _verdict(sentence, lost <= 2, "at most 2"),
            _source("demo", content),
        ]
    )


def objects(found: Results) -> str:
    """Return the means over the seeds, of connected regions and of objects that are kept apart."""
    if "objects" not in found:
        return ""
    rows, verdicts = found["objects"]["rows"], []
    shown: list[tuple[str, ...]] = []
    for name in dict.fromkeys(row["data"] for row in rows):
        merged = {}
        for kind, what in (
            (False, "connected regions"),
            ("border weights", "connected regions, border weights"),
            (True, "objects kept apart"),
        ):
            own = [row for row in rows if (row["data"], row["objects"]) == (name, kind)]
            if not own:
                continue
            mean = {
                key: fmean(row[key] for row in own)
                for key in ("ap50", "count_error", "merged", "foreground_iou")
            }
            merged[kind] = mean["merged"]
            steps = _many(own[0]["settings"]["train.steps"], "step")
            shown.append(
                (
                    name,
                    what,
                    f"{mean['ap50']:.3f}",
                    f"{mean['count_error']:.2f}",
                    f"{mean['merged']:.1f}",
                    f"{mean['foreground_iou']:.3f}",
                    f"{steps}, {_many(len(own), 'seed')}",
                )
            )
        if True in merged and False in merged:
            gone = 1 - merged[True] / max(merged[False], 1e-9)
            sentence = f"{_percent(gone)} of the joined objects of {name} are apart"
            verdicts.append(_verdict(sentence, gone >= 0.5, "at least half"))
    head = ("data", "", "AP at IoU 0.5", "count error", "joined", "foreground IoU", "")
    source = _source("objects", found["objects"])
    return "\n\n".join([_table(head, shown), " ".join(verdicts), source])


def labelling(found: Results) -> str:
    """Return the scores by number of labelled images, and clicks compared with strokes."""
    parts = []
    for name in _named(found, "labelling_"):
        content = found[name]
        if "fold" not in content or not content.get("strokes"):
            continue
        whole = {row["pictures"]: row["mean_iou"] for row in content.get("whole_masks", [])}
        rows = [
            (
                f"{row['pictures']}{', again' * (row.get('looks', 1) - 1)}",
                str(row["strokes"]),
                _percent(row["painted"]),
                f"{row['mean_iou']:.3f}",
                f"{whole[row['pictures']]:.3f}" if row["pictures"] in whole else "not run",
            )
            for row in content["strokes"]
        ]
        head = ("images", "strokes", "painted", "mean IoU", "whole masks, random order")
        seconds = median(row["round_cpu_seconds"] for row in content["strokes"])
        said = [_verdict(f"the median round takes {seconds:.0f} s of one core", seconds < 60, "60")]
        all_labels = content.get("trained_on_all_labels")
        if all_labels:
            best = _best_of_strokes(content)
            sentence = f"{_percent(best / all_labels['mean_iou'])} of {all_labels['mean_iou']:.3f}"
            said.insert(0, _verdict(sentence, best >= 0.9 * all_labels["mean_iou"], "90 %"))
        if trained := content.get("trained_on_strokes"):
            said.append(
                f"Trained on the strokes for {trained['minutes']:g} minutes: "
                f"{trained['mean_iou']:.3f}."
            )
            if shown := trained.get("shown_mean_iou"):
                said.append(f"The page shows {shown:.3f}, of the model that was scored before.")
        title = f"### {content['fold']}: {content['pool']} images to choose from"
        parts.append(
            "\n\n".join([title, _table(head, rows), " ".join(said), _source(name, content)])
        )
    if "labelling_clicks" in found:
        parts.append(_clicks(found["labelling_clicks"]))
    return "\n\n".join([LABELLING, *parts]) if parts else ""


def _best_of_strokes(content: Mapping[str, Any]) -> float:
    """Return the score of the last round, or of training on the strokes if that is better."""
    trained = content.get("trained_on_strokes", {"mean_iou": 0.0})
    return float(max(content["strokes"][-1]["mean_iou"], trained["mean_iou"]))


def _clicks(content: Mapping[str, Any]) -> str:
    rows = []
    for name, each in content["sets"].items():
        for kind in ("clicks", "strokes"):
            means = (f"{each[kind][f'mean_{key}']:.1f}" for key in ("actions", "seconds"))
            rows.append((name, kind, _percent(each[kind]["reached"]), *means))
    head = ("objects of", "by", "reach 90 % IoU", "mean number", "mean seconds")
    speed = content["one_megapixel"]
    first, next_ = speed["prepare_ms"] + speed["answer_ms"], speed["answer_ms"]
    sentence = f"at 1 megapixel the first click is answered after {first} ms, others after {next_}"
    verdict = _verdict(sentence, first <= 300, "300 ms")
    source = _source("labelling_clicks", content)
    return "\n\n".join(["### Clicks on objects", CLICKS, _table(head, rows), verdict, source])


def runtimes(found: Results) -> str:
    names = _named(found, "runtimes_")
    # By image, runtime and precision; then by file.
    cells: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for name in names:
        for case in ("M1", "M3"):
            for row in found[name].get(case, {"runtimes": []})["runtimes"]:
                key = (
                    "x".join(str(side) for side in found[name][case]["size"]),
                    row["name"],
                    row["precision"],
                )
                speeds = [
                    _3(row["images_per_second"]),
                    _percent(row["share_of_peak"]),
                    f"{1000 * row['seconds_per_image']:.1f}",
                ]
                cells.setdefault(key, {})[name] = speeds
    head = [
        f"{part}, {_many(found[name]['threads'], 'thread')}"
        for name in names
        for part in ("images/s", "share of peak", "ms for one")
    ]
    rows = [
        (*key, *(cell for name in names for cell in files.get(name, ["-"] * 3)))
        for key, files in cells.items()
    ]
    table = _table(("image", "runtime", "precision", *head), rows)
    return (
        "\n\n".join([RUNTIMES, table, *(_source(name, found[name]) for name in names)])
        if names
        else ""
    )


def exports(found: Results) -> str:
    parts = []
    for name in _named(found, "exports_"):
        content, rows, said = found[name], [], []
        exact = content["forms"][0]["mean_iou"]
        for form in content["forms"]:
            what, speed = f"{form['runtime']} {form['precision']}", form["images_per_second"]
            peer = speed.get("benchmark_app")
            rows.append(
                (
                    form["runtime"],
                    form["precision"],
                    f"{100 * form['mean_iou']:.1f} %",
                    f"{100 * form['equal_labels']:.2f} %",
                    _3(speed["useg"]),
                    _3(peer) if peer else "",
                    _percent(speed["share"]) if peer else "",
                )
            )
            if peer:
                sentence = f"{_percent(speed['share'])} of benchmark_app with {what}"
                said.append(_verdict(sentence, speed["share"] >= 0.95, "95 %"))
            if form["precision"] == "int8":
                lost = 100 * (exact - form["mean_iou"])
                sentence = f"8 bits lose {lost:.1f} points of mean IoU"
                said.append(_verdict(sentence, lost <= 1, "at most 1"))
        kept, layers = content["int8"]["kept"], content["int8"]["num_layers"]
        said.append(f"{layers - len(kept)} of {_many(layers, 'layer')} are in 8 bits.")
        head = (
            "runtime",
            "precision",
            "mean IoU",
            "equal labels",
            "images/s",
            "benchmark_app",
            "share of it",
        )
        width, height = content["size"]
        title = f"### {content['network']['encoder']} at {width}x{height}"
        parts.append(
            "\n\n".join([title, _table(head, rows), " ".join(said), _source(name, content)])
        )
    return "\n\n".join([EXPORTS, *parts]) if parts else ""


def predicting(found: Results) -> str:
    rows, sources, said = [], [], []
    for name in _named(found, "predict_"):
        content = found[name]
        speed = content["images_per_second"]
        share, times = content["share_of_bound"], content["times_the_loop"]
        said += [
            _verdict(f"`{name}`: {_percent(share)} of the bound", share >= 0.9, "90 %"),
            _verdict(f"{times:.1f} times the usual loop", times >= 5, "5"),
        ]
        one, shown = content["seconds_of_one_picture"], content["seconds_of_help"]
        starts = (f"{one:.2f}", f"{shown:.2f}")
        rows.append(
            (
                content["network"]["encoder"],
                content["runtime"],
                content["precision_of_the_file"],
                content["pictures"],
                _3(speed["predict"]),
                _3(speed["predict with overlays"]),
                _3(speed["loop"]),
                f"{times:.2f} x",
                _percent(share),
                *starts,
            )
        )
        said.append(_verdict(f"one image takes {one:.2f} s", one < 1.5, "below 1.5 s"))
        said.append(_verdict(f"`useg --help` {shown:.2f} s", shown < 0.3, "below 0.3 s"))
        sources.append(_source(name, content))
    head = (
        "network",
        "runtime",
        "model file",
        "images",
        "images/s",
        "with overlays",
        "usual loop",
        "speed-up",
        "share of the bound",
        "s for one image",
        "s for --help",
    )
    return "\n\n".join([PREDICTING, _table(head, rows), " ".join(said), *sources]) if rows else ""


def scans(found: Results) -> str:
    if "scans" not in found:
        return ""
    content = found["scans"]
    rows = [
        (
            f"{scan['side']:,} x {scan['side']:,}",
            _3(scan["seconds"]),
            _3(scan["megapixels_per_second"]),
            f"{scan['peak_mb']:.0f}",
        )
        for scan in content["scans"]
    ]
    table = _table(("pixels", "seconds", "megapixels/s", "peak memory, MB"), rows)
    return f"{SCANS}\n\n{table}\n\n{_source('scans', content)}{scan_objects(found)}"


def scan_objects(found: Results) -> str:
    if "scan_objects" not in found:
        return ""
    content = found["scan_objects"]
    rows = [
        (
            f"{scan['side']:,} x {scan['side']:,}",
            f"{scan['objects']:,}",
            f"{scan['found']:,}",
            _3(scan["processor_seconds"]),
            f"{scan['peak_mb']:.0f}",
        )
        for scan in content["scans"]
    ]
    heads = ("pixels", "objects", "found", "processor seconds", "peak memory, MB")
    source = _source("scan_objects", content)
    return f"\n\n{SCAN_OBJECTS}\n\n{_table(heads, rows)}\n\n{source}"


def serving(found: Results) -> str:
    rows, sources, said = [], [], []
    for name in _named(found, "serving_"):
        content = found[name]
        alone, slow = content["milliseconds_alone"], content["milliseconds_alone_p95"]
        share = content["share_of_offline"]
        rows.append(
            (
                content["network"]["encoder"],
                content["runtime"],
                str(content["clients"]),
                _3(content["served"]),
                _percent(share),
                _percent(content["share_of_bound"]),
                f"{content['gain_of_several']:.2f} x",
                f"{content['milliseconds']:.0f} / {content['milliseconds_p99']:.0f}",
                f"{alone:.0f} / {slow:.0f}",
            )
        )
        said.append(_verdict(f"{_percent(share)} of the speed without it", share >= 0.9, "90 %"))
        sources.append(_source(name, content))
    head = (
        "network",
        "runtime",
        "clients",
        "images/s",
        "share of the speed without a service",
        "share of the processor time's bound",
        "gain from computing several",
        "ms under load, median / 99 %",
        "ms alone, median / 95 %",
    )
    return "\n\n".join([SERVING, _table(head, rows), " ".join(said), *sources]) if rows else ""


def video(found: Results) -> str:
    rows, sources = [], []
    for name in _named(found, "video_"):
        content = found[name]
        times = content["speed"]["milliseconds_per_frame"]
        rows.append(
            (
                content["runtime"],
                *(f"{times[part]:.1f}" for part in ("network", "codecs", "together")),
                f"{1000 / times['together']:.0f}",
            )
        )
        sources.append(_source(name, content))
    head = ("runtime", "ms of the network", "ms of reading and writing", "ms together", "frames/s")
    return "\n\n".join([_table(head, rows), *sources]) if rows else ""


def gpu(found: Results) -> str:
    tables = [
        _gpu_table(found[name]) + f"\n\n{_source(name, found[name])}"
        for name in _named(found, "gpu_")
    ]
    return "\n\n".join([GPU, *tables]) if tables else ""


def _gpu_table(content: Mapping[str, Any]) -> str:
    """Return a row per network: training and prediction, before CUDA graphs and with them."""
    parts = content["parts"]
    rows = []
    for what, part, key, busy in (
        ("training", "training", "loop_images_per_second", "loop_busy_share"),
        ("training, steps alone", "training", "step_images_per_second", ""),
        ("prediction", "inference", "runtime_images_per_second", ""),
        ("prediction, ms for one", "inference", "milliseconds_one_image", ""),
    ):
        before = parts.get(f"{part}_before", {}).get("cases", {})
        for name, case in parts.get(part, {}).get("cases", {}).items():
            speeds = [before.get(name, {}).get(key), case.get(key)]
            if isinstance(speeds[1], dict):
                speeds[0] = speeds[0] or {"bf16": speeds[1].get("bf16, not as a graph")}
            speeds = [each["bf16"] if isinstance(each, dict) else each for each in speeds]
            cells = ["not run" if each is None else _3(each) for each in speeds]
            share = case.get(busy)
            rows.append((f"{name}: {what}", *cells, "" if share is None else _percent(share)))
    gpu_name = parts["machine"]["gpu"]
    passed = [each["passed"] for part in parts.values() for each in part.get("checks", ())]
    head = (gpu_name, "kernel by kernel", "as CUDA graphs", "GPU busy")
    verdict = _verdict(f"{sum(passed)} of {len(passed)} checks pass", all(passed), "all")
    missing: dict[str, list[str]] = {}
    for name, part in parts.items():
        if "not_run" in part:
            missing.setdefault(part["not_run"], []).append(name)
    left = [f"Not run: {', '.join(names)} ({reason})." for reason, names in missing.items()]
    tables = [_table(head, rows) if rows else "", _start_table(parts), _timed_run(parts)]
    return "\n\n".join([*filter(None, tables), " ".join([verdict, *left])])


def _start_table(parts: Mapping[str, Any]) -> str:
    """Return a row per way to compute depthwise convolutions: the first step, and later ones."""
    found = {label: parts[name] for name, label in START_VARIANTS.items() if name in parts}
    sizes = list(dict.fromkeys(key for part in found.values() for key in part if "batch" in key))
    if not sizes:
        return ""
    speed, first = "images_per_second", "seconds_of_first_step"
    rows = []
    for label, part in found.items():
        predicted = part.get("prediction", {})
        values = [
            *(part.get(size, {}).get(key) for key in (first, speed) for size in sizes),
            predicted.get(speed),
            predicted.get("seconds_of_first_forward_in_another_thread"),
        ]
        rows.append((label, *("not run" if each is None else _3(each) for each in values)))
    columns = [f"{what}, {size}" for what in ("first step, s", "images/s") for size in sizes]
    last = "prediction, images/s", "first call of another thread, s"
    return _table(("lite0: depthwise convolutions", *columns, *last), rows)


def _timed_run(parts: Mapping[str, Any]) -> str:
    """Return what a timed run and its prediction spent their time on."""
    plan = parts.get("plan", {})
    if "phases" not in plan or "seconds" not in plan:
        return ""
    phases = [f"{name} {taken:.0f}" for name, taken in plan["phases"].items() if taken >= 1]
    sentences = [f"A timed run took {plan['seconds']:.0f} s (in seconds: {', '.join(phases)})."]
    for key, name in (("predict_gpu", "first"), ("predict_auto", "second")):
        if key in plan:
            sentences.append(f"The {name} prediction took {plan[key]['seconds']:.1f} s.")
    return " ".join(sentences)


def _named(found: Results, prefix: str) -> list[str]:
    return [name for name in found if name.startswith(prefix)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _verdict(sentence: str, met: bool, goal: str) -> str:
    return f"{'Met' if met else '**Missed**'}: {sentence} (goal: {goal})."


def _source(name: str, content: Mapping[str, Any]) -> str:
    parts = [f"`{name}.json`", content["date"], f"commit {content['commit']}"]
    if machine := content.get("machine"):
        cores = _many(int(machine["cores"]), "core")
        parts += [machine["processor"], cores, f"torch {machine['torch']}"]
    return f"<sub>{', '.join(parts)}</sub>"


def _3(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


START_VARIANTS = {
    "start-cudnn": "by cuDNN",
    "start-parallel": "by cuDNN, after many threads",
    "start-mixed": "forward by cuDNN, backward by PyTorch",
    "start-native": "by PyTorch",
    "start-contiguous": "by PyTorch, not channels-last",
}

GPU = """\
Images per second in bf16, images in memory, on one NVIDIA GPU. The checks compare logits, loss and
gradients with the CPU, a repeated and a resumed run with the first to the bit, and tiles with one
pass."""

HEAD = """\
# Benchmarks

Generated by `python benchmarks/board.py` from `benchmarks/results/`; do not edit.

How fast useg is compared with other packages, and how good its models are after how much time.
Every package runs on the same machine, in turn with useg; figures are medians of several rounds.
*Peak* is the speed of a convolution that suits the processor, measured in the same run. On another
machine the figures differ; the ratios differ less. Measurements that were never made are marked.
[Models compared](models.md) has the accuracy of all networks."""
TRAINING = """\
Images per second of the whole `useg train`, in wall time: cropping and augmenting images, the log
and checkpoints are included. The other packages are measured in wall time too. *By step* counts the
median step alone, without what happens between epochs."""
ACCURACY = """\
Seconds of the whole command, decoding and reports included. All models are scored on the same
held-out block, at native resolution. The course's recipe is a U-Net as courses teach it: width 32,
128x96, Adam, no augmentation."""
TRIALS = """\
Changes to the training recipe, tried on parts of the training images alone, never on the images
that the results above are scored on. Each cell has the mean IoU after the same time on the same
machine, then the gain over the recipe in the column *compared with* (mean, lowest and highest of
the seeds). `useg train` uses only what helps on both street data sets."""
SMP = "segmentation_models.pytorch"
GENERALISATION = """\
Trained on some streets, recordings, laboratories and patients, judged on others that were left out:
mean IoU and the share of right pixels there, and in brackets the mean IoU on held-out images of
those that it was trained on. `carla` is judged on other towns, lights and weather, in another
renderer; `camvid 0006R0` on that recording; `cells d1` on laboratory 1 after training on laboratory
2. Each recipe takes as many steps as two idle cores reach in two minutes, the earlier one at its
own speed. It changes no colours and exposures, and zooms less. segmentation_models.pytorch has the
same ImageNet weights, the loss and the rate of its CamVid example, and at the earlier speed as many
steps of as many pixels, for which it needs about four times as long. [Trials behind the
plan](plan_trials.md) has other runs."""
LABELLING = """\
A script uses the page of `useg label` in Chromium. In each image it paints five strokes per class,
clicks to accept correct regions of the suggestion, and paints 24 strokes in the largest remaining
errors. After 20 images it goes through all of them *again*, because the first ones had no
suggestion or a poor one: clicks, and 24 strokes in each. After each number of images in the table,
a round trains, and its model is scored on a held-out block. *All labels* means training for ten
minutes on all true masks; *whole masks* means the same rounds on complete true masks of images in
random order. Rounds and training have the number of steps that two idle cores reach in their
time."""
CLICKS = """\
Twenty objects of each data set, without a model, in a view of four times the object: at most 20
clicks, or strokes of a brush. The seconds are a model of a person: 1.2 to aim and press, the drag,
and half a second for another size."""
RUNTIMES = """\
The network alone, a course's U-Net of width 32: images/s in batches, and milliseconds for one image
at a time."""
EXPORTS = """\
A trained model and its exports, on held-out images: mean IoU, the share of pixels with the label of
PyTorch in fp32, and images/s of the network alone. `benchmark_app` is OpenVINO's own benchmark of
the same file, in the same precision and tuned for throughput."""
PREDICTING = """\
`useg predict` from image files to label map files, with the runtime that it chooses. The *bound* is
the speed if nothing waited and only the parts of the work took time. The *usual loop* decodes with
Pillow, computes with PyTorch in fp32 and saves a PNG, one image after the other. The seconds for
one image are those of the whole command, from a cold start of Python to the written files."""
SERVING = """\
Clients send images to `useg serve` and wait for each label map, on the same cores. The speed
without a service is that of the same work in one process, with one image on each core; the bound
is what all cores would do at the processor time of that work in one thread."""
SCANS = "`useg predict` on a synthetic scan, into a tiled label map with overviews."
SCAN_OBJECTS = (
    "`useg predict --objects` on a scan of discs, of which every fifth touches the next one, with "
    "a function in the place of the network: what it takes to find the objects, keep them apart "
    "and write them."
)
SECTIONS = (
    ("Training speed", "python benchmarks/peers.py --tensorflow PYTHON --smp PYTHON", training),
    ("Time to accuracy", "python benchmarks/accuracy.py DATA", accuracy),
    ("The demo on a busy machine", "python benchmarks/demo.py", demo),
    ("Trials of training recipes", "python benchmarks/trials.py FOLDER", trials),
    ("On other recordings", "python benchmarks/generalise.py FOLDER", generalisation),
    ("Objects that touch", "python benchmarks/objects.py made", objects),
    (
        "Labelling in the browser",
        "python benchmarks/labelling_annotator.py FOLDER FOLD --work DIR",
        labelling,
    ),
    ("Network speed in each runtime", "python benchmarks/runtimes.py", runtimes),
    ("Exported forms", "python benchmarks/exports.py MODEL DATA", exports),
    ("Prediction from file to file", "python benchmarks/predict.py MODEL", predicting),
    ("Images larger than memory", "python benchmarks/scans.py", scans),
    ("The service", "python benchmarks/serving.py MODEL PICTURES", serving),
    ("Videos", "python benchmarks/video.py RUN DATA", video),
    ("On a GPU", "scripts/gpu-check", gpu),
)


def main() -> None:
    (ROOT / "docs" / "benchmarks.md").write_text(page(results()))


if __name__ == "__main__":
    main()
