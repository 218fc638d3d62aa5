"""Tables of training: its speed, the scores after given times, and trials of recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from board_format import (
    Results,
    cite,
    count_of,
    format_table,
    judge,
    names_with,
    percent,
    three_digits,
)

TRAINING = """\
Images per second in wall time, of the whole `useg train`: they include cropping and augmentation,
the log and checkpoints. The other packages are measured in wall time, too. *By step* is the speed
of the median training step alone, without the work between epochs."""
ACCURACY = """\
Seconds of the whole command, including decoding and the report. All models are scored on the same
held-out block, at native resolution. The course's recipe is a U-Net as courses teach it: width 32,
images of 128x96, Adam, no augmentation."""
TRIALS = """\
Each row is a change to the training recipe, tried on parts of the training images alone, never on
the images that score the results above. Each cell has the mean IoU after the same time on the same
machine, then the gain over the recipe in the column *compared with* (mean, lowest and highest of
the seeds). `useg train` uses only changes that help on both street data sets."""
# Data set -> the goal: the share of the time of a course's 40 epochs that reaches its score.
SHARES_OF_COURSE = {"carla": 0.2}
# Minutes of training that should each exceed the score of the course's recipe.
BETTER_MINUTES = ("2", "5", "10")
# What trials.py scores of a run besides its last weights.
AVERAGED = {
    "ema_0.02": "weights averaged over 2 % of the steps",
    "ema_0.1": "over 10 %",
    "new_statistics": "batch-norm statistics recomputed",
}
_HOW = {"images_per_second": "", "by_step": ", by step"}


def training(found: Results) -> str:
    parts = []
    for name in names_with(found, "peers_"):
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
                three_digits(row["images_per_second"]),
                three_digits(row["by_step"]),
                percent(row["share_of_peak"]),
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
        table = format_table(
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
        medians = f"Medians of {count_of(len(content['rounds']), 'round')}."
        verdicts = [
            judge(what, ratio["value"] >= ratio["bar"], f"at least {ratio['bar']:g}")
            for what, ratio in bars
        ]
        parts.append(
            "\n\n".join(
                [
                    f"### {content['title']}",
                    table,
                    " ".join([medians, *verdicts, *left]),
                    cite(name, content),
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
    heads = ("useg", older, package, "speed-up over before", "over the package")
    verdicts = [
        judge(f"at least {min(found):.2f} times as fast as {name}", min(found) >= goal, f"{goal}")
        for name, found, goal in (("before", before, 1.8), (package, peer, 4))
    ]
    title = "### A step of EfficientNet-Lite0, in milliseconds"
    rounds = f"Medians of {count_of(content['rounds'], 'round')}, {content['threads']} threads."
    sentences = " ".join([rounds, *verdicts])
    table = format_table(("crop", "batch", *heads), shown)
    return ["\n\n".join([title, table, sentences, cite("training_step", content)])]


def accuracy(found: Results) -> str:
    parts = []
    for name in names_with(found, "accuracy_"):
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
            verdicts = [judge(sentence, share <= bar, f"at most {bar:g}")]
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
        table = format_table(
            ("what", "seconds", "mean IoU", "from, to", "seeds", "share of the course's time"), rows
        )
        source = cite(name, {"machine": content["course_runs"][0].get("machine", {}), **content})
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
        three_digits(mean["wall_seconds"]),
        f"{mean['mean_iou']:.3f}",
        f"{min(scores):.3f}, {max(scores):.3f}",
        str(len(scores)),
        share,
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
            format_table(("", "mean IoU", "seconds", "training steps"), rows),
            judge(sentence, lost <= 2, "at most 2"),
            cite("demo", content),
        ]
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
                f"{fmean(own.values()):.3f}{gained}, {count_of(len(own), 'seed')}" if own else ""
            )
        rows.append((variant, base, *cells))
    averages = [
        f"{what}: {fmean(run[key] - run['mean_iou'] for run in runs):+.4f}"
        for key, what in AVERAGED.items()
    ]
    table = format_table(("change", "compared with", *sets), rows)
    return "\n\n".join(
        [
            TRIALS,
            table,
            f"Mean gain over all {len(runs)} runs: {', '.join(averages)}.",
            cite("trials", found["trials"]),
        ]
    )
