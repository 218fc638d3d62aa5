"""Tables of harder tasks: other recordings, objects that touch, and painted strokes as labels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from board_format import Results, cite, count_of, format_table, judge, names_with, percent

SMP = "segmentation_models.pytorch"
GENERALISATION = """\
The models are trained on some streets, recordings, laboratories or patients, and scored on others
that were left out of training. A cell has the mean IoU and the share of right pixels on what was
left out. In brackets is the mean IoU on held-out images of the groups that the model was trained
on. `carla` is scored on other towns, lights and weather, in another renderer; `camvid 0006R0` on
that recording; `cells d1` on laboratory 1 after training on laboratory 2.

Each recipe trains for as many steps as two idle cores compute in two minutes. The earlier recipe
does not change colours or exposure, and zooms less. segmentation_models.pytorch starts from the
same ImageNet weights, and has the loss and the learning rate of its CamVid example. It trains on as
many pixels as useg, for which it needs two and a half times as long.
[Trials behind the plan](plan_trials.md) has other runs."""
LABELLING = """\
A script uses the page of `useg label` in Chromium, like a person who knows the true masks. In each
image it paints five strokes per class, clicks to accept correct regions of the suggestion, and
paints 24 strokes in the largest remaining errors. After 20 images it goes through all of them
*again*, because the first ones had no suggestion or a poor one: it clicks, and paints 24 strokes in
each. After each number of images in the table, a round of training follows, and its model is scored
on a held-out block.

The goal is a share of the score that a model reaches after ten minutes of training on all true
masks. *Whole masks* are the same rounds on complete true masks of images in random order. Each
training has as many steps as two idle cores compute in its time."""
CLICKS = """\
A script selects twenty objects of each data set, without a model, by at most 20 clicks or brush
strokes each. The view is four times as large as the object. The seconds estimate what a person
needs: 1.2 to aim and press, the time of the drag, and 0.5 to change the size of the brush."""


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
            right = percent(fmean(each["pixels_right"] for each in groups))
            cell = f"{away[name][fold]:.3f}, {right}"
            if all("home" in each and "away" in each for each in own):
                home[name][fold] = fmean(each["home"]["mean_iou"] for each in own)
                cell += f" ({home[name][fold]:.3f})"
            cells.append(f"{cell}, {count_of(len(own), 'seed')}")
        rows.append((fold, *cells))
    verdicts = []
    for name, goal in (("earlier recipe", 5), (SMP, 3)):
        gains = {fold: 100 * (away["default"][fold] - each) for fold, each in away[name].items()}
        if not gains:
            continue
        lowest = min(gains, key=lambda fold: gains[fold])
        the = "" if name == SMP else "the "
        sentence = (
            f"over {count_of(len(gains), 'set')} useg scores {fmean(gains.values()):.1f} points "
            f"more than {the}{shown[name]} on what was left out, from {gains[lowest]:+.1f} "
            f"({lowest}) to {max(gains.values()):+.1f}"
        )
        verdicts.append(judge(sentence, fmean(gains.values()) >= goal, f"{goal} points"))
    verdicts += _judge_half_the_steps(found["generalise"]["runs"])
    lowest = {name: min(each.values()) for name, each in away.items() if each}
    verdicts.append(
        judge(
            f"the lowest score of a set is {lowest['default']:.3f}; with the earlier recipe it is "
            f"{lowest['earlier recipe']:.3f}",
            lowest["default"] >= lowest["earlier recipe"],
            "not lower",
        )
    )
    kept = [100 * (home["default"][fold] - each) for fold, each in home["earlier recipe"].items()]
    sentence = "on held-out images of the training groups, useg gains "
    sentence += (
        f"{fmean(kept):+.1f} points over the earlier recipe, {min(kept):+.1f} in the worst set"
    )
    verdicts.append(judge(sentence, min(kept) >= -1, "at most 1 point lower"))
    return "\n\n".join(
        [
            GENERALISATION,
            format_table(("left out", *shown.values()), rows),
            " ".join(verdicts),
            cite("generalise", found["generalise"]),
        ]
    )


def _judge_half_the_steps(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Compare the steps of one minute with those of a peer in two."""

    def by_fold(name: str, minutes: float) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for run in runs:
            if (run["name"], run["minutes"]) == (name, minutes):
                found[run["fold"]].append(run)
        return found

    own, peer = by_fold("default", 1), by_fold(SMP, 2)
    both = [fold for fold in own if fold in peer]
    if not both:
        return []

    def mean_score(found: dict[str, list[dict[str, Any]]]) -> float:
        return fmean(
            fmean(run["scores"]["away"]["mean_iou"] for run in found[fold]) for fold in both
        )

    def seconds(found: dict[str, list[dict[str, Any]]]) -> float:
        return sum(min(run["cpu_seconds"] for run in found[fold]) for fold in both)

    gain, share = 100 * (mean_score(own) - mean_score(peer)), seconds(own) / seconds(peer)
    sentence = (
        f"after half of its steps, useg scores {gain:.1f} points more than the package on "
        f"{count_of(len(both), 'set')}, in {percent(share)} of the processor time (of the fastest "
        f"seed each)"
    )
    return [
        judge(sentence, gain >= 3 and round(share, 2) <= 0.2, "3 points in a fifth of the time")
    ]


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
            steps = count_of(own[0]["settings"]["train.steps"], "step")
            shown.append(
                (
                    name,
                    what,
                    f"{mean['ap50']:.3f}",
                    f"{mean['count_error']:.2f}",
                    f"{mean['merged']:.1f}",
                    f"{mean['foreground_iou']:.3f}",
                    f"{steps}, {count_of(len(own), 'seed')}",
                )
            )
        if True in merged and False in merged:
            gone = 1 - merged[True] / max(merged[False], 1e-9)
            sentence = f"of the joined objects of {name}, {percent(gone)} are now separate"
            verdicts.append(judge(sentence, gone >= 0.5, "at least half"))
    head = ("data", "recipe", "AP at IoU 0.5", "count error", "joined", "foreground IoU", "trained")
    source = cite("objects", found["objects"])
    return "\n\n".join([format_table(head, shown), " ".join(verdicts), source])


def labelling(found: Results) -> str:
    """Return the scores by number of labelled images, and clicks compared with strokes."""
    parts = []
    for name in names_with(found, "labelling_"):
        content = found[name]
        if "fold" not in content or not content.get("strokes"):
            continue
        whole = {row["pictures"]: row["mean_iou"] for row in content.get("whole_masks", [])}
        rows = [
            (
                f"{row['pictures']}{', again' * (row.get('looks', 1) - 1)}",
                str(row["strokes"]),
                percent(row["painted"]),
                f"{row['mean_iou']:.3f}",
                f"{whole[row['pictures']]:.3f}" if row["pictures"] in whole else "not run",
            )
            for row in content["strokes"]
        ]
        head = ("images", "strokes", "painted", "mean IoU", "whole masks, random order")
        seconds = median(row["round_cpu_seconds"] for row in content["strokes"])
        said = [judge(f"the median round takes {seconds:.0f} s of one core", seconds < 60, "60 s")]
        all_labels = content.get("trained_on_all_labels")
        if all_labels:
            best = _best_of_strokes(content)
            sentence = f"{percent(best / all_labels['mean_iou'])} of the score of all labels, "
            sentence += f"{all_labels['mean_iou']:.3f}"
            said.insert(0, judge(sentence, best >= 0.9 * all_labels["mean_iou"], "90 %"))
        if trained := content.get("trained_on_strokes"):
            said.append(
                f"A model that is trained on the strokes for {trained['minutes']:g} minutes scores "
                f"{trained['mean_iou']:.3f}."
            )
            if shown := trained.get("shown_mean_iou"):
                said.append(f"The page shows the score of an earlier model, {shown:.3f}.")
        title = f"### {content['fold']}: {content['pool']} images to choose from"
        parts.append(
            "\n\n".join([title, format_table(head, rows), " ".join(said), cite(name, content)])
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
            rows.append((name, kind, percent(each[kind]["reached"]), *means))
    head = ("objects of", "by", "reach 90 % IoU", "mean number", "mean seconds")
    speed = content["one_megapixel"]
    first, next_ = speed["prepare_ms"] + speed["answer_ms"], speed["answer_ms"]
    sentence = f"at 1 megapixel the first click is answered after {first} ms, others after {next_}"
    verdict = judge(sentence, first <= 300, "300 ms")
    source = cite("labelling_clicks", content)
    return "\n\n".join(["### Clicks on objects", CLICKS, format_table(head, rows), verdict, source])
