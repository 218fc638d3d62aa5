"""What images without masks of a new place are worth to a run that may take their colours.

    python benchmarks/unlabelled.py FOLDER [--folds carla camvid ...] [--seeds 0 1] [--always]

The folds, their scores and the fixed steps are those of ``generalise.py``. The images of the groups
that are left out are the images without masks; their masks serve for the scores only. A run is
trained until it compares its colours with theirs. If they matter, it is finished twice from there:
with these colours and without. If not, both would be the same run, and the comparison is stored;
``--always`` finishes it with the colours all the same. Each run becomes a row of
``results/unlabelled.json`` as soon as it ends; a stored row is not computed again.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from generalise import (
    FOLDS,
    Fold,
    count_steps,
    is_left_out,
    read_rows,
    reference_speed,
    score_groups,
    split,
    store,
)
from record import RESULTS, commit

from useg.config import Settings
from useg.data.dataset import pick_evenly
from useg.data.layouts import find_dataset
from useg.training import plan as planning
from useg.training.schedule import Schedule, make_optimizer
from useg.training.trainer import SilentProgress, Trainer, prepare_trainer
from useg.training.unlabelled import MAX_SCORED, Unlabelled, compare_colours, read_colours

MINUTES = 2.0
# Of ISBI's single recording, nothing is left out.
NAMES = [name for name in FOLDS if name != "isbi"]


def left_out(folder: Path, fold: Fold) -> list[Path]:
    """Return the images of the groups that a fold leaves out."""
    if fold.elsewhere:
        return [pair.image.absolute() for pair in find_dataset(folder / fold.elsewhere).pairs]
    pairs = find_dataset(folder / fold.folder).pairs
    return [pair.image.absolute() for pair in pairs if is_left_out(pair, fold)]


def link_images(folder: Path, images: Iterable[Path]) -> Path:
    """Return a folder with links to images."""
    folder.mkdir(exist_ok=True)
    for path in images:
        (folder / path.name).symlink_to(path.absolute())
    return folder


def run(folder: Path, fold: Fold, seed: int, always: bool) -> dict[str, Any]:
    """Train once; return the comparison, and the scores with the colours and without."""
    dataset, scored = split(folder, fold)
    settings = Settings().with_({"train.minutes": MINUTES, "train.seed": seed})
    with reference_speed():
        plan = planning.make_plan(settings, dataset)
        trainer = prepare_trainer(dataset, plan, SilentProgress())
    with tempfile.TemporaryDirectory() as place:
        link_images(Path(place), left_out(folder, fold))
        colours = read_colours(place, plan, trainer.batches.samples)
    trainer.batches = replace(trainer.batches, colours=colours)
    groups = [scored[pair.image] for pair in dataset.of("val")]
    home = [trainer.val[k] for k, group in enumerate(groups) if group == "home"]
    length = Schedule(count_steps(trainer.settings, MINUTES), coarse=trainer.settings.train.coarse)
    course = Course(trainer, length)
    due = Unlabelled(colours, None, home)
    at = next(step for step in range(1, length.steps) if due.is_due(step, length))
    course.go_on(at)
    trainer.model.eval()
    found = compare_colours(trainer, pick_evenly(home, MAX_SCORED), colours)
    row = {"steps": length.steps, "compared_at": at, **asdict(found), "matters": found.matters}
    if found.matters or always:
        state = course.state()
        for name, is_matched in (("without", None), ("with", lambda number: number > at)):
            course.restore(state)
            course.go_on(length.steps, is_matched)
            row[name] = score_groups(trainer.model, trainer, groups, fold)["scores"]
    return row


class Course:
    """The steps of a run, which can go on twice from one state."""

    def __init__(self, trainer: Trainer, length: Schedule) -> None:
        self.trainer, self.length, self.step = trainer, length, 0
        torch.manual_seed(trainer.settings.train.seed)
        self.parts = (trainer.model, *make_optimizer(trainer, length))

    def go_on(self, until: int, is_matched: Callable[[int], bool] | None = None) -> None:
        """Train up to a step."""
        _, optimizer, scheduler = self.parts
        self.trainer.set_training_mode()
        batches = self.trainer.batches.stream(self.step, self.length.is_coarse, is_matched)
        for x, target in islice(batches, until - self.step):
            self.trainer.train_step(optimizer, x, target)
            scheduler.step()
        self.step = until

    def state(self) -> tuple[Any, ...]:
        parts = [part.state_dict() for part in self.parts]
        return copy.deepcopy((self.step, torch.get_rng_state(), parts))

    def restore(self, state: tuple[Any, ...]) -> None:
        self.step, random, parts = copy.deepcopy(state)
        torch.set_rng_state(random)
        for part, content in zip(self.parts, parts, strict=True):
            part.load_state_dict(content)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--folds", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--always", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "unlabelled.json")
    given = parser.parse_args()
    for seed in given.seeds:
        for name in given.folds:
            wanted = {"fold": name, "seed": seed, "always": given.always}
            if any(wanted.items() <= row.items() for row in read_rows(given.out)):
                continue
            result = run(given.folder, FOLDS[name], seed, given.always)
            row = {**wanted, "commit": commit(), **result}
            store(given.out, row)
            print(row, flush=True)


if __name__ == "__main__":
    main()
